// Setting up links over TCP; see tcp_transport.hpp. The connecting end decides the number of streams and tells it in
// the preamble of each: index = stream | streams << 16.
#include "transport/tcp/tcp_transport.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "sys/socket.hpp"
#include "sys/token_listener.hpp"
#include "transport/stream/frame.hpp"
#include "transport/stream/socket_channel.hpp"
#include "transport/stream/stream_hub.hpp"

namespace pdxfer::transport {
namespace {

constexpr uint8_t kAddressVersion = 1;
constexpr std::array<std::byte, 4> kWelcome{std::byte{'P'}, std::byte{'D'}, std::byte{'X'}, std::byte{'T'}};

class TcpTransport final : public Transport {
 public:
  explicit TcpTransport(const Context& context)
      : limits_(context.limits),
        listener_(sys::listen_on(context.host, 0), "pdx-tcp"),
        address_(listener_.address()),
        hub_(context, "tcp") {}

  const char* name() const override { return "tcp"; }
  Bytes address() override;
  Bytes register_memory(const Region& region) override { return hub_.register_memory(region); }
  void deregister_memory(RegionId region) override { hub_.deregister_memory(region); }
  std::unique_ptr<Peer> connect(const Link& link) override;
  size_t poll(std::span<Completion> out) override { return hub_.poll(out); }

 private:
  uint32_t streams_for(int fd) const;
  std::vector<sys::UniqueFd> dial(const Link& link, const sys::Token& token);
  std::vector<sys::UniqueFd> take(const Link& link, const sys::Token& token);
  void configure(int fd) const;

  const Limits limits_;
  sys::TokenListener listener_;
  const sys::SocketAddress address_;
  stream::StreamHub hub_;
};

// u8 version, u16 port little-endian, host as text.
Bytes TcpTransport::address() {
  const std::string host = address_.host();
  const uint16_t port = address_.port();
  Bytes bytes{std::byte{kAddressVersion}, static_cast<std::byte>(port & 0xff), static_cast<std::byte>(port >> 8)};
  for (const char c : host) bytes.push_back(static_cast<std::byte>(c));
  return bytes;
}

std::pair<std::string, uint16_t> parse_address(const Link& link) {
  const Bytes& bytes = link.address;
  if (bytes.size() < 4 || bytes.size() > 3 + 255 || std::to_integer<uint8_t>(bytes[0]) != kAddressVersion)
    throw Error(Code::kUnavailable, "tcp: the peer's address is malformed or of another version of pdxfer");
  const auto port =
      static_cast<uint16_t>(std::to_integer<unsigned>(bytes[1]) | std::to_integer<unsigned>(bytes[2]) << 8);
  std::string host(reinterpret_cast<const char*>(bytes.data()) + 3, bytes.size() - 3);
  if (host.find('\0') != std::string::npos) throw Error(Code::kUnavailable, "tcp: the peer's address is malformed");
  if (host == "0.0.0.0" || host == "::") {
    if (link.host_hint.empty())
      throw Error(Code::kUnavailable,
                  "tcp: the peer listens on every interface and no host to reach it is known; "
                  "give it an address of its own with PDXFER_HOST");
    host = link.host_hint;
  }
  return {host, port};
}

// Do both ends of the connection have the same address?
bool within_machine(int fd) noexcept {
  sockaddr_storage ours{}, theirs{};
  socklen_t our_length = sizeof ours, their_length = sizeof theirs;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&ours), &our_length) != 0 ||
      ::getpeername(fd, reinterpret_cast<sockaddr*>(&theirs), &their_length) != 0 || ours.ss_family != theirs.ss_family)
    return false;
  if (ours.ss_family == AF_INET)
    return std::memcmp(&reinterpret_cast<sockaddr_in&>(ours).sin_addr, &reinterpret_cast<sockaddr_in&>(theirs).sin_addr,
                       sizeof(in_addr)) == 0;
  return ours.ss_family == AF_INET6 &&
         std::memcmp(&reinterpret_cast<sockaddr_in6&>(ours).sin6_addr,
                     &reinterpret_cast<sockaddr_in6&>(theirs).sin6_addr, sizeof(in6_addr)) == 0;
}

// A connection whose other end is silent while bytes are outstanding, or does not even answer keep-alives, breaks.
// Within a machine there is no distance to bridge: with fewer bytes under way than the kernel would let grow (4 MiB a
// stream), they are still in the caches when they are read.
void TcpTransport::configure(int fd) const {
  constexpr int kLocalSendBuffer = 384 << 10;
  if (within_machine(fd)) sys::set_option(fd, SOL_SOCKET, SO_SNDBUF, kLocalSendBuffer, "SO_SNDBUF");
  const int timeout_ms = static_cast<int>(std::clamp<uint32_t>(limits_.peer_timeout_ms, 100, 600000));
  const int seconds = std::max(1, timeout_ms / 3000);
  sys::set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1, "TCP_NODELAY");
  sys::set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, timeout_ms, "TCP_USER_TIMEOUT");
  sys::set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1, "SO_KEEPALIVE");
  sys::set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, seconds, "TCP_KEEPIDLE");
  sys::set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, seconds, "TCP_KEEPINTVL");
  sys::set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 3, "TCP_KEEPCNT");
}

// How many connections to a peer, of which `fd` is the first. Within a machine there is no network to spread over, and
// streams that share an io thread push each other's buffers out of its cache.
uint32_t TcpTransport::streams_for(int fd) const {
  constexpr uint32_t kOverNetwork = 4;  // at least
  const uint32_t streams = limits_.tcp_streams != 0 ? limits_.tcp_streams
                           : within_machine(fd)     ? limits_.io_threads
                                                    : std::max(kOverNetwork, limits_.io_threads);
  return std::clamp<uint32_t>(streams, 1, stream::kMaxStreams);
}

std::vector<sys::UniqueFd> TcpTransport::dial(const Link& link, const sys::Token& token) {
  const auto [host, port] = parse_address(link);
  std::vector<sys::UniqueFd> fds;
  fds.push_back(sys::connect_to(host, port, link.deadline));
  const uint32_t streams = streams_for(fds[0].get());
  for (uint32_t i = 0; i < streams; ++i) {
    if (i > 0) fds.push_back(sys::connect_to(host, port, link.deadline));
    sys::send_preamble(fds.back().get(), token, i | streams << 16, link.deadline);
  }
  std::array<std::byte, kWelcome.size()> answer{};
  sys::recv_exact(fds[0].get(), answer, link.deadline);
  if (answer != kWelcome) throw Error(Code::kUnavailable, "tcp: " + host + " answered with something else");
  return fds;
}

std::vector<sys::UniqueFd> TcpTransport::take(const Link& link, const sys::Token& token) {
  auto [index, first] = listener_.take_any(token, link.deadline);
  const uint32_t streams = index >> 16;
  if (streams == 0 || streams > stream::kMaxStreams || (index & 0xffff) >= streams)
    throw Error(Code::kUnavailable,
                "tcp: the peer asks for " + std::to_string(streams) + " streams; 1 to 64 are possible");
  std::vector<sys::UniqueFd> fds(streams);
  fds[index & 0xffff] = std::move(first);
  for (uint32_t i = 0; i < streams; ++i)
    if (!fds[i]) fds[i] = listener_.take(token, i | streams << 16, link.deadline);
  sys::send_exact(fds[0].get(), kWelcome, link.deadline);
  return fds;
}

std::unique_ptr<Peer> TcpTransport::connect(const Link& link) {
  sys::Token token;
  std::copy(std::begin(link.token), std::end(link.token), token.begin());
  std::vector<sys::UniqueFd> fds;
  try {
    if (link.role == Role::kAccept) {
      listener_.expect(token, stream::kMaxStreams);
      try {
        fds = take(link, token);
      } catch (...) {
        listener_.forget(token);
        throw;
      }
      listener_.forget(token);
    } else {
      fds = dial(link, token);
    }
  } catch (const Error& error) {
    if (error.code() == Code::kUnavailable) throw;
    throw Error(Code::kUnavailable, std::string("tcp: ") + error.what(), error.status().native);
  }
  const std::string where = sys::remote_address(fds[0].get()).to_string();
  const bool nearby = within_machine(fds[0].get());
  std::vector<std::unique_ptr<stream::Channel>> channels;
  for (sys::UniqueFd& fd : fds) {
    configure(fd.get());
    channels.push_back(std::make_unique<stream::SocketChannel>(std::move(fd), nearby));
  }
  const std::string count = std::to_string(channels.size());
  return hub_.make_peer(link.peer, std::move(channels),
                        count + (count == "1" ? " stream with " : " streams with ") + where);
}

}  // namespace

std::unique_ptr<Transport> make_tcp(Context context) { return std::make_unique<TcpTransport>(context); }

}  // namespace pdxfer::transport
