// Setting up links over RDMA; see rdma_transport.hpp. Queue pairs are told over a TCP connection of the link, which
// stays open: it says at once that the other process ended, and repairs queue pairs.
#include "transport/rdma/rdma_transport.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>

#include <algorithm>
#include <thread>

#include "sys/token_listener.hpp"
#include "sys/topology.hpp"
#include "transport/rdma/rdma_link.hpp"

namespace pdxfer::transport {
namespace {

using namespace rdma;

constexpr size_t kMostHello = 64 << 10;
constexpr auto kProbePatience = std::chrono::milliseconds(2000);  // at least, while the peer's process is busy
constexpr auto kTurn = std::chrono::microseconds(100);

std::vector<Nic> choose(std::span<const sys::DeviceInfo> devices, const RdmaOptions& options) {
  std::vector<sys::Gpu> gpus;
  if (options.gpu >= 0) gpus = sys::list_gpus();
  NicChoice choice = choose_nics(devices, gpu_place(gpus, options, "/sys"), options);
  if (choice.nics.empty()) throw Error(Code::kUnavailable, "rdma: no port can be used: " + describe_refusals(choice));
  return std::move(choice.nics);
}

class RdmaTransport final : public Transport {
 public:
  RdmaTransport(const Context& context, const shim::VerbsApi& api, std::span<const Nic> nics)
      : hub_(context, api, nics), listener_(sys::listen_on(context.host, 0), "pdx-rdma-in"), nics_(encode_nics(nics)) {
    for (const Nic& nic : nics) ours_.push_back(nic.address);
  }

  const char* name() const override { return "rdma"; }
  Bytes address() override;
  Bytes register_memory(const Region& region) override;
  void deregister_memory(RegionId region) override;
  std::unique_ptr<Peer> connect(const Link& link) override;
  size_t poll(std::span<Completion> out) override { return hub_.poll(out); }
  bool spinning() const override { return hub_.spinning(); }

 private:
  struct Address {
    std::string host;
    uint16_t port = 0;
    std::vector<NicAddress> nics;
  };
  static Address parse(const Link& link);
  sys::UniqueFd join(const Link& link, const Address& theirs);
  std::vector<NicPair> pairs_with(const Link& link, const Address& theirs) const;
  std::unique_ptr<Peer> make_link(const Link& link);

  Hub hub_;
  sys::TokenListener listener_;
  const Bytes nics_;
  std::vector<NicAddress> ours_;
};

Bytes RdmaTransport::address() {
  const sys::SocketAddress address = listener_.address();
  return Writer{}.integer(kWireVersion).integer(address.port()).text(address.host()).bytes(nics_).take();
}

RdmaTransport::Address RdmaTransport::parse(const Link& link) {
  Reader reader{link.address};
  Address address;
  const auto version = reader.integer<uint32_t>();
  address.port = reader.integer<uint16_t>();
  address.host = reader.text();
  const ByteView nics = reader.bytes();
  if (!reader.done() || version != kWireVersion || address.host.find('\0') != std::string::npos)
    throw Error(Code::kUnavailable, "rdma: the peer's address is malformed or of another version of pdxfer");
  if (address.host == "0.0.0.0" || address.host == "::") address.host = link.host_hint;
  if (address.host.empty())
    throw Error(Code::kUnavailable,
                "rdma: the peer listens on every interface and no host to reach it is known; give it an address of "
                "its own with PDXFER_HOST");
  address.nics = decode_nics(nics);
  return address;
}

Bytes RdmaTransport::register_memory(const Region& region) {
  const std::string what = "register region " + std::to_string(region.id) + " with rdma: ";
  if (region.id == kNoId || region.buffer.data == nullptr || region.buffer.bytes == 0)
    throw Error(Code::kInvalid, what + "it has no id or no bytes");
  {
    const std::lock_guard lock(hub_.mutex);
    if (hub_.find(region.id) != nullptr) throw Error(Code::kInvalid, what + "the id is registered already");
  }
  LocalRegion local = register_region(hub_, region);
  std::vector<uint32_t> rkeys;
  for (const MemoryKey& key : local.keys) rkeys.push_back(key.remote());
  const std::lock_guard lock(hub_.mutex);
  if (!hub_.regions.emplace(region.id, std::move(local)).second)
    throw Error(Code::kInvalid, what + "the id is registered already");
  return encode_region_key(reinterpret_cast<uint64_t>(region.buffer.data), rkeys);
}

void RdmaTransport::deregister_memory(RegionId region) {
  decltype(hub_.regions)::node_type gone;
  {
    const std::lock_guard lock(hub_.mutex);
    gone = hub_.regions.extract(region);
    if (!gone.empty()) ++hub_.epoch;
  }
  if (gone.empty())
    throw Error(Code::kInvalid, "deregister region " + std::to_string(region) + ": no such region is registered");
  // Its keys go here: ibv_dereg_mr returns when the device has let go. Without the mutex, since nobody finds the keys
  // any more and unpinning gigabytes takes its time; what was posted with them fails at the device.
}

std::vector<NicPair> RdmaTransport::pairs_with(const Link& link, const Address& theirs) const {
  Pairing pairing = pair_nics(ours_, theirs.nics);
  if (pairing.pairs.empty()) {
    std::string reasons;
    for (const std::string& reason : pairing.refused) reasons += (reasons.empty() ? "" : "; ") + reason;
    throw Error(Code::kUnavailable, "rdma: no port of ours reaches one of the peer's: " + reasons);
  }
  // Both ends count pairs in the connecting end's order.
  std::ranges::sort(pairing.pairs, {}, [&](const NicPair& pair) {
    return link.role == Role::kConnect ? std::pair(pair.local, pair.remote) : std::pair(pair.remote, pair.local);
  });
  return std::move(pairing.pairs);
}

sys::UniqueFd RdmaTransport::join(const Link& link, const Address& theirs) {
  sys::Token token;
  std::copy(std::begin(link.token), std::end(link.token), token.begin());
  sys::UniqueFd side;
  if (link.role == Role::kConnect) {
    side = sys::connect_to(theirs.host, theirs.port, link.deadline);
    sys::send_preamble(side.get(), token, 0, link.deadline);
  } else {
    listener_.expect(token, 1);
    try {
      side = listener_.take(token, 0, link.deadline);
    } catch (...) {
      listener_.forget(token);
      throw;
    }
    listener_.forget(token);
  }
  const int timeout_ms = static_cast<int>(std::clamp<uint32_t>(hub_.context.limits.peer_timeout_ms, 100, 600000));
  const int seconds = std::max(1, timeout_ms / 3000);
  sys::set_option(side.get(), IPPROTO_TCP, TCP_NODELAY, 1, "TCP_NODELAY");
  sys::set_option(side.get(), IPPROTO_TCP, TCP_USER_TIMEOUT, timeout_ms, "TCP_USER_TIMEOUT");
  sys::set_option(side.get(), SOL_SOCKET, SO_KEEPALIVE, 1, "SO_KEEPALIVE");
  sys::set_option(side.get(), IPPROTO_TCP, TCP_KEEPIDLE, seconds, "TCP_KEEPIDLE");
  sys::set_option(side.get(), IPPROTO_TCP, TCP_KEEPINTVL, seconds, "TCP_KEEPINTVL");
  sys::set_option(side.get(), IPPROTO_TCP, TCP_KEEPCNT, 3, "TCP_KEEPCNT");
  return side;
}

std::unique_ptr<Peer> RdmaTransport::make_link(const Link& link) {
  const Address theirs = parse(link);
  std::vector<NicPair> pairs = pairs_with(link, theirs);
  sys::UniqueFd side = join(link, theirs);
  const int fd = side.get();
  auto made = std::make_unique<RdmaLink>(hub_, link, std::move(side), std::move(pairs), theirs.nics.size());
  const Hello mine = made->hello();
  const Bytes hello = encode_hello(mine);
  sys::send_exact(fd, Writer{}.bytes(hello).view(), link.deadline);
  std::array<std::byte, sizeof(uint32_t)> length{};
  sys::recv_exact(fd, length, link.deadline);
  const auto bytes = Reader{length}.integer<uint32_t>();
  if (bytes > kMostHello) throw Error(Code::kUnavailable, "rdma: the peer's hello is malformed");
  Bytes answer(bytes);
  sys::recv_exact(fd, answer, link.deadline);
  made->start(decode_hello(answer, mine.rails.size(), theirs.nics.size()));
  // Nothing may be sent to a queue pair that cannot receive yet.
  std::array<std::byte, 1> ready{std::byte{1}};
  sys::send_exact(fd, ready, link.deadline);
  sys::recv_exact(fd, ready, link.deadline);
  made->begin();
  const Deadline deadline =
      std::min(link.deadline,
               Clock::now() + std::max(kProbePatience, std::chrono::milliseconds(hub_.context.limits.peer_timeout_ms)));
  while (!made->advance()) {
    const Status lost = made->lost();  // the end that gives up first closes the other's side connection
    if (!lost.ok() || Clock::now() >= deadline)
      throw Error(Code::kUnavailable, "rdma: no packet came through" +
                                          (lost.ok() ? "" : std::string(" before this: ") + lost.where) + " (" +
                                          made->describe() + "); run `pdxfer doctor` on both machines");
    std::this_thread::sleep_for(kTurn);
  }
  made->calibrate(link.deadline);
  return made;
}

std::unique_ptr<Peer> RdmaTransport::connect(const Link& link) {
  try {
    return make_link(link);
  } catch (const Error& error) {
    if (error.code() == Code::kUnavailable) throw;
    throw Error(Code::kUnavailable, std::string("rdma: ") + error.what(), error.status().native);
  }
}

}  // namespace

std::unique_ptr<Transport> make_rdma_on(Context context, const shim::VerbsApi& api,
                                        std::span<const sys::DeviceInfo> devices) {
  const std::vector<Nic> nics = choose(devices, context.rdma);
  return std::make_unique<RdmaTransport>(context, api, nics);
}

std::unique_ptr<Transport> make_rdma(Context context) {
  static const shim::VerbsLibrary& verbs = *new shim::VerbsLibrary(shim::load_verbs());  // lives as the process does
  if (!verbs.library.present() || verbs.devices.empty()) throw Error(Code::kUnavailable, "rdma: " + verbs.reason);
  return make_rdma_on(std::move(context), verbs.api, sys::list_rdma_devices());
}

}  // namespace pdxfer::transport
