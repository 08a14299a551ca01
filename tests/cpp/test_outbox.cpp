// The outbox of links between processes of one machine: messages in order through a socket that is full at times,
// descriptors that travel or are left out with a reason, owners kept no longer than needed, and its two losses.
#include <doctest/doctest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <string>

#include "sys/mapping.hpp"
#include "transport/local/outbox.hpp"

namespace {

using namespace pdxfer;
using transport::local::kMaxLetters;

enum class Type : uint32_t { kNote = 1, kFiles, kEnd };
using Header = transport::local::Header<Type>;

struct Heard {
  Header header;
  Bytes body;
  std::vector<sys::UniqueFd> fds;
};

// An outbox over one half of a socketpair that holds few messages, and the other half.
struct Line {
  Line() : Line(ends()) {}
  explicit Line(std::array<int, 2> ends) : mine(ends[0]), theirs(ends[1]), outbox(mine.get()) {}
  static std::array<int, 2> ends() {
    std::array<int, 2> made{};
    REQUIRE(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, made.data()) == 0);
    const int bytes = 4096;
    REQUIRE(::setsockopt(made[0], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes) == 0);
    return made;
  }
  // The next message; nothing: none is there.
  std::optional<Heard> hear() const {
    std::array<std::byte, 1024> buffer;
    Heard heard;
    const int64_t n = sys::recv_message(theirs.get(), buffer, &heard.fds);
    if (n == -EAGAIN) return std::nullopt;
    REQUIRE(n >= static_cast<int64_t>(sizeof heard.header));
    std::memcpy(&heard.header, buffer.data(), sizeof heard.header);
    heard.body.assign(buffer.begin() + sizeof heard.header, buffer.begin() + n);
    return heard;
  }

  sys::UniqueFd mine, theirs;
  transport::local::Outbox<Type> outbox;
};

Header note(uint64_t batch) {
  Header header;
  header.type = Type::kNote;
  header.batch = batch;
  return header;
}

uint64_t inode(int fd) {
  struct stat found {};
  REQUIRE(::fstat(fd, &found) == 0);
  return found.st_ino;
}

}  // namespace

TEST_CASE("what an end sent before it closed is read, also when it left messages unread") {
  const auto [mine, theirs] = Line::ends();
  const sys::UniqueFd here(mine);
  {
    const sys::UniqueFd there(theirs);
    char said[] = "done", unread[] = "more";
    const iovec parts[] = {{said, 4}}, rest[] = {{unread, 4}};
    REQUIRE(sys::send_message(there.get(), parts) == 0);
    REQUIRE(sys::send_message(here.get(), rest) == 0);
  }
  std::array<std::byte, 16> got;
  CHECK(sys::recv_message(here.get(), got, nullptr) == 4);
  CHECK(std::memcmp(got.data(), "done", 4) == 0);
  CHECK(sys::recv_message(here.get(), got, nullptr) == 0);
}

TEST_CASE("every message arrives once and in order, whatever the socket has room for") {
  Line line;
  uint64_t posted = 0, heard = 0;
  while (line.outbox.empty()) REQUIRE(line.outbox.post(note(posted++), Bytes(100, std::byte{7})).ok());
  while (posted < 500) REQUIRE(line.outbox.post(note(posted++), Bytes(100, std::byte{7})).ok());
  const Header end = transport::local::end_of(Type::kEnd, 1000, 77);
  CHECK(line.outbox.offer(end, {}) == EAGAIN);  // not before what waits
  while (heard < posted) {
    while (const auto message = line.hear()) {
      CHECK(message->header.type == Type::kNote);
      CHECK(message->header.batch == heard++);
      CHECK(message->body == Bytes(100, std::byte{7}));
    }
    REQUIRE(line.outbox.flush().ok());
  }
  CHECK(line.outbox.empty());
  CHECK_FALSE(line.hear().has_value());
  CHECK(line.outbox.offer(end, Bytes(3, std::byte{9})) == 0);
  const auto message = line.hear();
  REQUIRE(message.has_value());
  const Completion told = transport::local::arrival(5, message->header, message->body);
  CHECK(told.kind == Completion::Kind::kArrived);
  CHECK(told.peer == 5);
  CHECK(told.batch == 1000);
  CHECK(told.tag == 77);
  CHECK(told.tail == Bytes(3, std::byte{9}));
  CHECK(message->header.tagged == 1);
  CHECK(transport::local::end_of(Type::kEnd, 1000, std::nullopt).tagged == 0);
}

TEST_CASE("what is offered to a full socket is not sent, and not kept") {
  Line line;
  int sent = 0, error = 0;
  while ((error = line.outbox.offer(note(1), Bytes(100, std::byte{1}))) == 0) ++sent;
  CHECK(error == EAGAIN);
  CHECK(sent > 0);
  CHECK(line.outbox.empty());
  for (; sent > 0; --sent) CHECK(line.hear().has_value());
  CHECK_FALSE(line.hear().has_value());
}

TEST_CASE("descriptors wait with their message and are kept open for it, and no longer") {
  Line line;
  uint64_t notes = 0;
  while (line.outbox.empty()) REQUIRE(line.outbox.post(note(++notes)).ok());
  auto file = std::make_shared<const sys::UniqueFd>(sys::make_memfd("test-outbox", 4096));
  const uint64_t which = inode(file->get());
  const std::weak_ptr<const sys::UniqueFd> alive = file;
  Header files;
  files.type = Type::kFiles;
  REQUIRE(line.outbox.post(files, Bytes(5, std::byte{3}), {file->get()}, file).ok());
  file.reset();
  CHECK_FALSE(alive.expired());
  while (notes > 0) {
    if (const auto message = line.hear())
      --notes;
    else
      REQUIRE(line.outbox.flush().ok());
  }
  REQUIRE(line.outbox.flush().ok());
  CHECK(alive.expired());
  const auto message = line.hear();
  REQUIRE(message.has_value());
  CHECK(message->header.code == 0);
  CHECK(message->body.size() == 5);
  REQUIRE(message->fds.size() == 1);
  CHECK(inode(message->fds[0].get()) == which);
}

TEST_CASE("a descriptor that cannot be passed on: the message goes without, and says why") {
  Line line;
  Header files;
  files.type = Type::kFiles;
  files.region = 9;
  REQUIRE(line.outbox.post(files, Bytes(5, std::byte{3}), {1 << 30}).ok());
  REQUIRE(line.outbox.post(note(2)).ok());
  const auto message = line.hear();
  REQUIRE(message.has_value());
  CHECK(message->header.region == 9);
  CHECK(message->header.code == static_cast<int32_t>(Code::kUnavailable));
  CHECK(message->header.native == EBADF);
  CHECK(message->body.empty());
  CHECK(message->fds.empty());
  const auto next = line.hear();
  REQUIRE(next.has_value());
  CHECK(next->header.batch == 2);
  CHECK(next->header.code == 0);
}

TEST_CASE("a peer that is gone, or does not read, is lost") {
  Line gone;
  gone.theirs.reset();
  const Status status = gone.outbox.post(note(1));
  CHECK(status.code == Code::kPeerLost);
  CHECK(status.native == EPIPE);
  gone.outbox.clear();
  CHECK(gone.outbox.offer(note(1), {}) == EPIPE);

  Line deaf;
  size_t posted = 0;
  while (deaf.outbox.empty()) REQUIRE(deaf.outbox.post(note(posted++)).ok());
  for (size_t waiting = 1; waiting < kMaxLetters; ++waiting) REQUIRE(deaf.outbox.post(note(posted++)).ok());
  const Status full = deaf.outbox.post(note(posted));
  CHECK(full.code == Code::kPeerLost);
  CHECK(std::string(full.where) == "the peer does not read its messages");
}
