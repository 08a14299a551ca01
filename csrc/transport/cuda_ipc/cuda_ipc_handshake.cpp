// Three steps of set-up: token, hello, staging. See cuda_ipc_handshake.hpp.
#include "transport/cuda_ipc/cuda_ipc_handshake.hpp"

#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "transport/stream/socket_channel.hpp"

namespace pdxfer::transport::cuda_ipc {
namespace {

struct Answer {
  Bytes body;
  std::vector<sys::UniqueFd> fds;
};

// Says ours and hears theirs of one step.
Answer exchange(int socket, Type type, ByteView mine, std::span<const int> fds, Deadline deadline) {
  Header header;
  header.type = type;
  const iovec parts[] = {{&header, sizeof header}, {const_cast<std::byte*>(mine.data()), mine.size()}};
  if (const int error = sys::send_message(socket, parts, fds); error != 0)
    throw Error(Code::kUnavailable, "cuda_ipc: set-up message to the peer: " + errno_name(error), error);
  sys::wait_readable(socket, deadline, "cuda_ipc: waiting for the peer's set-up");
  std::array<std::byte, 256> buffer;
  Answer answer;
  const int64_t n = sys::recv_message(socket, buffer, &answer.fds);
  if (n < static_cast<int64_t>(sizeof header))
    throw Error(Code::kUnavailable, n < 0
                                        ? "cuda_ipc: set-up message from the peer: " + errno_name(static_cast<int>(-n))
                                        : std::string("cuda_ipc: the peer gave up during set-up; its log says why"));
  std::memcpy(&header, buffer.data(), sizeof header);
  if (header.type != type) throw Error(Code::kUnavailable, "cuda_ipc: the peer's set-up is out of order");
  answer.body.assign(buffer.begin() + sizeof header, buffer.begin() + n);
  return answer;
}

std::pair<sys::UniqueFd, sys::UniqueFd> make_stream() {
  int ends[2] = {-1, -1};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) != 0)
    throw Error(Code::kUnavailable, "cuda_ipc: socketpair: " + errno_name(errno), errno);
  return {sys::UniqueFd(ends[0]), sys::UniqueFd(ends[1])};
}

bool is_stream_socket(int fd) noexcept {
  int domain = 0, type = 0;
  socklen_t bytes = sizeof domain;
  if (::getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &bytes) != 0) return false;
  bytes = sizeof type;
  return ::getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &bytes) == 0 && domain == AF_UNIX && type == SOCK_STREAM;
}

// Both rings, both progress words, and the stream of which the connecting end hands over one half.
void exchange_staging(Connection& made, const Context& context, const transport::Link& link) {
  const bool ours = link.role == Role::kConnect;
  stream::SlotRingEnd mine = stream::SlotRingEnd::make(context.limits);
  auto [keep, give] = ours ? make_stream() : std::pair<sys::UniqueFd, sys::UniqueFd>();
  const sys::UniqueFd progress = Progress::make();
  const int fds[] = {mine.memory.get(), progress.get(), give.get()};
  Answer there =
      exchange(made.socket.get(), Type::kStaging, Writer().integer(mine.slot_bytes).integer(mine.slots).take(),
               std::span(fds).first(ours ? 3 : 2), link.deadline);
  Reader reader(there.body);
  stream::SlotRingEnd theirs;
  theirs.slot_bytes = reader.integer<uint64_t>();
  theirs.slots = reader.integer<uint32_t>();
  if (!reader.done() || there.fds.size() != (ours ? 2 : 3) || (!ours && !is_stream_socket(there.fds[2].get())))
    throw Error(Code::kUnavailable, "cuda_ipc: the peer's staging is malformed");
  theirs.memory = std::move(there.fds[0]);
  made.channel = std::make_unique<stream::SocketChannel>(ours ? std::move(keep) : std::move(there.fds[2]));
  made.progress = std::make_unique<Progress>(progress);
  made.peer_progress = std::make_unique<Progress>(there.fds[1]);
  made.ring = std::make_unique<stream::SlotRing>(std::move(mine), std::move(theirs), context.pin);
}

}  // namespace

Connection make_connection(const Context& context, const local::Address& here, const Hello& hello,
                           sys::TokenListener& listener, const transport::Link& link) {
  Connection made;
  made.socket = local::open_socket(kProtocol, here, listener, link);
  const Hello there = Hello::decode(exchange(made.socket.get(), Type::kHello, hello.encode(), {}, link.deadline).body);
  if (hello.device == kHost || there.device == kHost)
    throw Error(Code::kUnavailable, std::string("cuda_ipc: ") + (hello.device == kHost ? "this end" : "the peer") +
                                        " has registered no device memory; register it before connecting to move it");
  exchange_staging(made, context, link);
  if (const int process = sys::peer_process(made.socket.get()); process != 0)
    made.process = sys::UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, process, 0)));
  return made;
}

}  // namespace pdxfer::transport::cuda_ipc
