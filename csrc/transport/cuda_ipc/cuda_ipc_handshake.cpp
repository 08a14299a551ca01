// Two steps of set-up: token, hello. See cuda_ipc_handshake.hpp.
#include "transport/cuda_ipc/cuda_ipc_handshake.hpp"

#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstring>

namespace pdxfer::transport::cuda_ipc {
namespace {

sys::UniqueFd open_socket(const Address& here, sys::TokenListener& listener, const transport::Link& link) {
  const Address there = Address::decode(link.address);
  here.require_reachable(there);
  sys::Token token;
  std::memcpy(token.data(), link.token, token.size());
  if (link.role == Role::kConnect) {
    sys::UniqueFd socket = sys::connect_seqpacket(there.name, link.deadline);
    auto preamble = sys::encode_preamble(token, 0);
    const iovec part{preamble.data(), preamble.size()};
    if (const int error = sys::send_message(socket.get(), {&part, 1}); error != 0)
      throw Error(Code::kUnavailable, "cuda_ipc: greeting the peer: " + errno_name(error), error);
    return socket;
  }
  listener.expect(token, 1);
  try {
    sys::UniqueFd socket = listener.take(token, 0, link.deadline);
    listener.forget(token);
    return socket;
  } catch (...) {
    listener.forget(token);
    throw;
  }
}

Hello exchange(int socket, const Hello& hello, Deadline deadline) {
  Header header;
  header.type = Type::kHello;
  const Bytes mine = hello.encode();
  const iovec parts[] = {{&header, sizeof header}, {const_cast<std::byte*>(mine.data()), mine.size()}};
  if (const int error = sys::send_message(socket, parts); error != 0)
    throw Error(Code::kUnavailable, "cuda_ipc: set-up message to the peer: " + errno_name(error), error);
  sys::wait_readable(socket, deadline, "cuda_ipc: waiting for the peer's set-up");
  std::array<std::byte, 256> buffer;
  const int64_t n = sys::recv_message(socket, buffer, nullptr);
  if (n < static_cast<int64_t>(sizeof header))
    throw Error(Code::kUnavailable, "cuda_ipc: the peer gave up during set-up; its log says why");
  std::memcpy(&header, buffer.data(), sizeof header);
  if (header.type != Type::kHello) throw Error(Code::kUnavailable, "cuda_ipc: the peer's set-up is out of order");
  return Hello::decode(ByteView(buffer).subspan(sizeof header, static_cast<size_t>(n) - sizeof header));
}

}  // namespace

Connection make_connection(const Address& here, const Hello& hello, sys::TokenListener& listener,
                           const transport::Link& link) {
  Connection made;
  made.socket = open_socket(here, listener, link);
  const Hello there = exchange(made.socket.get(), hello, link.deadline);
  if (hello.device == kHost || there.device == kHost)
    throw Error(Code::kUnavailable, std::string("cuda_ipc: ") + (hello.device == kHost ? "this end" : "the peer") +
                                        " has registered no device memory; register it before connecting to move it");
  if (const int process = sys::peer_process(made.socket.get()); process != 0)
    made.process = sys::UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, process, 0)));
  return made;
}

}  // namespace pdxfer::transport::cuda_ipc
