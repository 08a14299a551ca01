// The messages of a link between two processes of one machine (shm, cuda_ipc): their fixed part, and the Outbox, which
// sends them over the link's seqpacket socket and keeps what the socket has no room for. `Type` is the transport's list
// of messages. Any thread, under the link's mutex; owns the letters that wait, not the socket.
#pragma once

#include <sys/uio.h>

#include <cerrno>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "core/status.hpp"
#include "core/types.hpp"
#include "sys/seqpacket.hpp"

namespace pdxfer::transport::local {

inline constexpr size_t kMaxLetters = 1 << 16;  // unsent messages after which the other end counts as hung

// The fixed part of every message; some are followed by bytes.
template <typename Type>
struct Header {
  Type type{};
  uint32_t region = 0;
  uint64_t batch = 0, tag = 0;
  int32_t code = 0, native = 0;
  uint32_t tagged = 0;
  uint32_t piece = 0;  // of cuda_ipc's ends: what they wait for
};

// The message that ends a batch, and what the receiving engine is told when it comes.
template <typename Type>
Header<Type> end_of(Type type, BatchId batch, std::optional<uint64_t> tag) {
  Header<Type> end;
  end.type = type;
  end.batch = batch;
  end.tag = tag.value_or(0);
  end.tagged = tag.has_value();
  return end;
}
template <typename Type>
Completion arrival(PeerId peer, const Header<Type>& end, ByteView tail) {
  Completion arrived;
  arrived.kind = Completion::Kind::kArrived;
  arrived.peer = peer;
  arrived.batch = end.batch;
  arrived.tag = end.tag;
  arrived.tail.assign(tail.begin(), tail.end());
  return arrived;
}

template <typename Type>
class Outbox {
 public:
  static_assert(sizeof(Header<Type>) == 40 && std::is_trivially_copyable_v<Header<Type>>);

  explicit Outbox(int socket) noexcept : socket_(socket) {}

  // Sent now or by flush(), after what was posted before. The descriptors must be open until then; `owner` is kept for
  // that long. When they cannot be passed on, the message goes without them and its body, and its code and native say
  // why. Not ok (kPeerLost): the link is over.
  Status post(const Header<Type>& header, ByteView body = {}, std::vector<int> fds = {},
              std::shared_ptr<const void> owner = {}) {
    const Status kept = keep(header, body, std::move(fds), std::move(owner));
    return kept.ok() ? flush() : kept;
  }

  // Likewise, but by the next flush(), which the caller sees to.
  Status keep(const Header<Type>& header, ByteView body = {}, std::vector<int> fds = {},
              std::shared_ptr<const void> owner = {}) {
    letters_.push_back({header, Bytes(body.begin(), body.end()), std::move(fds), std::move(owner)});
    return letters_.size() > kMaxLetters ? Status{Code::kPeerLost, 0, "the peer does not read its messages"}
                                         : kOkStatus;
  }

  // When the socket may have room again.
  Status flush() {
    while (!letters_.empty()) {
      Letter& letter = letters_.front();
      const int error = send(letter.header, letter.body, letter.fds);
      if (error == EAGAIN) return kOkStatus;
      if (!letter.fds.empty() && (error == ETOOMANYREFS || error == EMFILE || error == EBADF)) {
        letter.fds.clear();
        letter.body.clear();
        letter.header.code = static_cast<int32_t>(Code::kUnavailable);
        letter.header.native = error;
        continue;
      }
      if (error != 0) return {Code::kPeerLost, error, "sendmsg"};
      letters_.pop_front();
    }
    return kOkStatus;
  }

  // Sent now, after everything else, or not at all: 0, EAGAIN when that cannot be now, else the errno that ends the
  // link.
  int offer(const Header<Type>& header, ByteView body) const {
    return letters_.empty() ? send(header, body, {}) : EAGAIN;
  }

  bool empty() const noexcept { return letters_.empty(); }
  void clear() noexcept { letters_.clear(); }

 private:
  struct Letter {
    Header<Type> header;
    Bytes body;
    std::vector<int> fds;
    std::shared_ptr<const void> owner;
  };

  int send(const Header<Type>& header, ByteView body, std::span<const int> fds) const {
    const iovec parts[] = {{const_cast<Header<Type>*>(&header), sizeof header},
                           {const_cast<std::byte*>(body.data()), body.size()}};
    const int error = sys::send_message(socket_, parts, fds);
    return error == ENOBUFS ? EAGAIN : error;
  }

  const int socket_;
  std::deque<Letter> letters_;
};

}  // namespace pdxfer::transport::local
