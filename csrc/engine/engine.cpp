// See engine.hpp.
#include "engine/engine.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "core/cuda_options.hpp"
#include "core/log.hpp"
#include "core/sha256.hpp"
#include "engine/registry.hpp"
#include "pack/device_copier.hpp"
#include "sys/cuda_memory.hpp"
#include "sys/mapping.hpp"

namespace pdxfer::engine {
namespace {

std::string own_name() {
  char host[256] = "unknown";
  if (::gethostname(host, sizeof host - 1) != 0) std::strcpy(host, "unknown");
  return std::string(host) + ":" + std::to_string(::getpid());
}

LogLevel level_of(const std::string& name) {
  return name == "debug"   ? LogLevel::kDebug
         : name == "info"  ? LogLevel::kInfo
         : name == "error" ? LogLevel::kError
                           : LogLevel::kWarning;
}

// A quarter of the cores, for the model owns the machine; one on a small one. More than four gain little on one socket.
uint32_t copy_threads_or(uint32_t configured) {
  return configured != 0 ? configured : std::clamp(std::thread::hardware_concurrency() / 4, 1u, 4u);
}

// As many as there are cores, where those are few: more only take them from each other. At least two: threads at both
// ends of a socket take turns, and a core that one of them leaves idle is another's. A quarter of them where they are
// many: a stream carries what one core copies.
uint32_t io_threads_or(uint32_t configured) {
  const uint32_t cores = std::thread::hardware_concurrency();
  return configured != 0 ? configured : std::clamp(cores, 2u, std::clamp(cores / 4, 4u, 8u));
}

// A transport that asks for a number of blocks gets it; else the configuration's.
DeviceCopyFactory device_copy_factory(const std::string& text) {
  return [cuda = CudaOptions::parse(text)](int ordinal, const DeviceCopyOptions& wanted) {
    DeviceCopyOptions options = wanted;
    if (options.blocks == 0) options.blocks = cuda.sm_budget;
    options.copy_engine = options.copy_engine && cuda.copy_engine;
    return std::make_unique<pack::DeviceCopier>(ordinal, options);
  };
}

Config checked(Config config) {
  config.validate();
  return config;
}

}  // namespace

Engine::Engine(Config config)
    : config_(checked(std::move(config))),
      copier_(copy_threads_or(config_.copy_threads)),
      worker_(config_, regions_, [this](const transport::Transport& transport) { return notices(transport); }) {
  set_log_level(level_of(config_.log_level));
  random_bytes(std::as_writable_bytes(std::span(identity_.instance)));
  identity_.name = own_name();
  make_transports();
  std::vector<transport::Transport*> started;
  for (const Slot& slot : transports_)
    if (slot.transport) started.push_back(slot.transport.get());
  worker_.start(std::move(started));
  try {
    acceptor_.emplace(config_.host, static_cast<uint16_t>(config_.port),
                      std::chrono::milliseconds(config_.connect_timeout_ms),
                      [this](FrameLink link, Deadline deadline) { welcome(std::move(link), deadline); });
  } catch (const Error&) {
    worker_.stop();  // before the transports that it polls are destroyed
    throw;
  }
  address_ = sys::join_host_port(config_.host, acceptor_->port());
}

Engine::~Engine() { close(); }

void Engine::make_transports() {
  const Faults faults = Faults::parse(config_.fault);
  // What was not asked for by name may be missing without a word: every machine lacks something.
  const LogLevel expected = config_.transports == "auto" ? LogLevel::kInfo : LogLevel::kWarning;
  std::string refusals;
  for (const std::string& name : parse_transports(config_.transports)) {
    const auto entry = std::ranges::find_if(registry(), [&](const Entry& e) { return name == e.name; });
    transport::Context context;
    context.limits.chunk_bytes = config_.chunk_bytes;
    context.limits.staging_bytes = config_.staging_bytes;
    context.limits.peer_timeout_ms = config_.peer_timeout_ms;
    // A throttle is charged by the chunk, so a throttled engine copies chunk by chunk.
    context.limits.copy_threads = faults.throttle_bytes_per_s != 0 ? 1 : copy_threads_or(config_.copy_threads);
    context.limits.io_threads = io_threads_or(config_.io_threads);
    context.limits.tcp_streams = config_.tcp_streams;
    context.copy = [this](const PagedCopy& copy, Cursor& cursor, uint64_t budget, std::span<std::byte* const> src,
                          std::span<std::byte* const> dst) { return copier_.copy(copy, cursor, budget, src, dst); };
    context.host = config_.host;
    context.shm_path = config_.shm_path;
    context.cuda = config_.cuda;
    context.device_copy = device_copy_factory(config_.cuda);
    context.pin = sys::pin_host;
    context.rdma = RdmaOptions::parse(config_.rdma);
    context.wake = [this] { worker_.wake(); };
    Slot slot;
    try {
      slot.transport = entry->make(std::move(context));
      if (std::ranges::find(faults.refuse, name) != faults.refuse.end()) slot.refusal = "refused by Config::fault";
    } catch (const Error& error) {
      slot.refusal = error.what();
      log(expected, "transport " + name + " is not usable here: " + error.what());
    }
    if (slot.transport) {
      transports_.push_back(std::move(slot));
    } else {
      refusals += "; " + name + ": " + slot.refusal;
    }
  }
  if (transports_.empty())
    throw Error(Code::kUnavailable,
                "no transport of \"" + config_.transports + "\" is usable here" + refusals + "; run `pdxfer doctor`");
}

void Engine::require_open() const {
  if (closed_.load()) throw Error(Code::kUnavailable, "this engine was closed");
}

std::shared_lock<std::shared_mutex> Engine::operation() {
  if (!in_own_process())  // before the lock, which another thread may have held when the process forked
    throw Error(Code::kUnavailable, "this engine belongs to process " + std::to_string(process_) +
                                        "; threads do not survive fork(): make one in this process");
  std::shared_lock held(operations_);
  require_open();
  return held;
}

// The worker answers every command while it runs; close() ends it, and then nothing is left to wait for.
void Engine::await(const std::future<void>& answer) const {
  while (answer.wait_for(std::chrono::milliseconds(20)) != std::future_status::ready)
    if (closed_.load()) return;
}

Region Engine::register_memory(const Buffer& buffer) {
  const auto held = operation();
  Region region;
  {
    std::lock_guard lock(mutex_);
    region = {next_region_++, buffer};
  }
  regions_.add(region);  // refuses overlaps before any transport is asked
  std::map<const transport::Transport*, Bytes> keys;
  std::string reasons;
  for (const Slot& slot : transports_) {
    try {
      keys[slot.transport.get()] = slot.transport->register_memory(region);
    } catch (const Error& error) {
      reasons += (reasons.empty() ? "" : "; ") + std::string(slot.transport->name()) + ": " + error.what();
    }
  }
  if (keys.empty()) {
    regions_.remove(region.id);
    throw Error(Code::kUnavailable, "no transport can take this memory (" + reasons + ")");
  }
  // After shm has made the memory shared, where it does, and before a peer maps it.
  if (buffer.device == kHost) sys::prefer_huge_pages(buffer.data, buffer.bytes);
  if (!reasons.empty())
    log(config_.transports == "auto" ? LogLevel::kInfo : LogLevel::kWarning,
        "region " + std::to_string(region.id) + " is not reachable by every transport: " + reasons);
  {
    std::lock_guard lock(mutex_);
    keys_[region.id] = std::move(keys);
  }
  worker_.region_added();
  return region;
}

void Engine::deregister_memory(RegionId region) {
  const auto held = operation();
  std::map<const transport::Transport*, Bytes> keys;
  {
    std::lock_guard lock(mutex_);
    const auto it = keys_.find(region);
    if (it == keys_.end() || !regions_.remove(region))
      throw Error(Code::kInvalid, "region " + std::to_string(region) + " is not registered with this engine");
    keys = std::move(it->second);
    keys_.erase(it);
  }
  await(worker_.withdraw(region));  // bounded by the worker: it drops peers that hold on
  for (const Slot& slot : transports_)
    if (keys.contains(slot.transport.get())) slot.transport->deregister_memory(region);
}

std::vector<RegionNotice> Engine::notices(const transport::Transport& transport) const {
  std::lock_guard lock(mutex_);
  std::vector<RegionNotice> all;
  for (const auto& [id, keys] : keys_) {
    const auto key = keys.find(&transport);
    const auto region = regions_.get(id);
    if (key != keys.end() && region) all.push_back({*region, key->second});
  }
  return all;
}

PeerId Engine::connect(const std::string& address, std::chrono::milliseconds timeout) {
  const auto held = operation();
  const auto [host, port] = sys::split_host_port(address);
  const Deadline deadline = std::chrono::steady_clock::now() + timeout;
  FrameLink link(sys::connect_to(host, port, deadline), sys::join_host_port(host, port));
  return handshake(std::move(link), transport::Role::kConnect, deadline);
}

void Engine::welcome(FrameLink link, Deadline deadline) {
  handshake(std::move(link), transport::Role::kAccept, deadline);
}

PeerId Engine::handshake(FrameLink link, transport::Role role, Deadline deadline) {
  const Identity identity = greet(link, role, identity_, config_.secret, deadline);
  PeerId id = kNoId;
  {
    std::lock_guard lock(mutex_);
    id = next_peer_++;
  }
  std::vector<Candidate> candidates;
  for (const Slot& slot : transports_) candidates.push_back({slot.transport.get(), slot.refusal});
  Choice choice = choose_transport(link, role, id, candidates, deadline);

  const std::vector<RegionNotice> ours = notices(*choice.transport);
  const std::vector<RegionNotice> theirs = exchange_regions(link, role, ours, deadline);
  auto peer = std::make_shared<PeerState>(id, role, identity, std::move(link), std::move(choice));
  for (const RegionNotice& notice : ours) peer->published.insert(notice.region.id);
  for (const RegionNotice& notice : theirs) {
    peer->link->import_region(notice.region, notice.key);
    peer->regions.add(notice.region);
  }
  log(LogLevel::kInfo,
      "peer " + std::to_string(id) + ": " + identity.name + " at " + peer->address + " over " + peer->transport_name);
  {
    std::lock_guard lock(mutex_);
    require_open();
    size_t lost = 0;
    for (auto it = peers_.rbegin(); it != peers_.rend(); ++it) lost += !it->second->alive();
    for (auto it = peers_.begin(); it != peers_.end() && lost > kMaxLostPeers;)
      if (!it->second->alive()) {
        it = peers_.erase(it);
        --lost;
      } else {
        ++it;
      }
    peers_.emplace(id, peer);
    worker_.adopt(std::move(peer));
  }
  return id;
}

std::shared_ptr<PeerState> Engine::peer(PeerId id) const {
  std::lock_guard lock(mutex_);
  const auto it = peers_.find(id);
  if (it == peers_.end()) throw Error(Code::kInvalid, "peer " + std::to_string(id) + " is not known to this engine");
  return it->second;
}

std::vector<std::shared_ptr<PeerState>> Engine::peers() const {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<PeerState>> all;
  for (const auto& [id, peer] : peers_) all.push_back(peer);
  return all;
}

std::vector<std::pair<std::string, std::string>> Engine::transports() const {
  std::vector<std::pair<std::string, std::string>> all;
  for (const Slot& slot : transports_) all.emplace_back(slot.transport->name(), slot.refusal);
  return all;
}

void Engine::disconnect(PeerId id) {
  const auto held = operation();
  await(worker_.drop(peer(id), "the other engine disconnected"));
}

std::shared_ptr<Batch> Engine::submit(PeerId id, std::shared_ptr<const TransferPlan> plan, std::optional<uint64_t> tag,
                                      Bytes tail) {
  const auto held = operation();
  const std::shared_ptr<PeerState> to = peer(id);
  if (!to->alive())
    throw Error(Code::kPeerLost, "peer " + std::to_string(id) + " (" + to->address + ") is lost: " + to->lost_reason());
  if (tail.size() > transport::Limits{}.max_tail_bytes)
    throw Error(Code::kInvalid, "a tail of " + std::to_string(tail.size()) + " bytes, at most " +
                                    std::to_string(transport::Limits{}.max_tail_bytes) + " ride with a notification");
  for (const Side side : {Side::kSrc, Side::kDst}) {
    const RegionTable& table = side == Side::kSrc ? regions_ : to->regions;
    if (const Status status = table.check(*plan, side); !status.ok())
      throw Error(status.code, std::string(status.where) + (side == Side::kSrc ? " (this engine's)" : " (the peer's)") +
                                   "; check the layout's offsets, page bytes and page numbers");
  }
  if (worker_.in_flight() >= config_.max_batches)
    throw Error(Code::kUnavailable, std::to_string(config_.max_batches) +
                                        " batches are in flight (max_batches): wait for some, then submit again");
  const bool launches = to->transport->launches();
  auto batch =
      std::make_shared<Batch>(next_batch_.fetch_add(1), id, std::move(plan), tag, std::move(tail), launches && spins_);
  worker_.submit(batch, launches);
  return batch;
}

bool Engine::in_own_process() const noexcept { return ::getpid() == process_; }

void Engine::close() {
  closed_.store(true);  // first: calls under way that wait for the worker look at it
  const std::unique_lock closing(operations_);
  if (!acceptor_) return;
  acceptor_.reset();
  worker_.stop();
  for (const auto& peer : peers()) peer->mark_lost("this engine was closed");
  transports_.clear();
}

}  // namespace pdxfer::engine
