// shm between two real processes: every way moves bytes, and either end may be killed in the middle.
#include <doctest/doctest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <thread>

#include "core/codec.hpp"
#include "pack/paged_copy_host.hpp"
#include "sys/socket.hpp"
#include "transport/shm/shm_transport.hpp"

namespace {

using namespace pdxfer;
using transport::Clock;
using transport::Deadline;

constexpr uint64_t kBytes = 32 << 20;
constexpr uint64_t kPage = 1024;
constexpr auto kPatience = std::chrono::seconds(10);

// One end: a transport with one region of anonymous memory, and the pipe to the other process.
struct Party {
  Party(std::string path, int to_other, bool connects, uint8_t pattern) : pipe(to_other) {
    transport::Context context;
    context.copy = [this](const PagedCopy& c, Cursor& at, uint64_t budget, auto src, auto dst) {
      return copier.copy(c, at, budget, src, dst);
    };
    context.shm_path = std::move(path);
    transport = transport::make_shm(std::move(context));
    data = static_cast<std::byte*>(::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (uint64_t i = 0; i < kBytes; ++i) data[i] = static_cast<std::byte>((i / kPage * 7 + i) ^ pattern);
    const Region region{connects ? 1u : 2u, {data, kBytes, kHost}};
    const Bytes key = transport->register_memory(region);
    say(Writer().bytes(transport->address()).integer(reinterpret_cast<uint64_t>(data)).bytes(key).take());
    const Bytes heard = hear();
    Reader reader(heard);
    transport::Link link;
    const ByteView address = reader.bytes();
    link.address.assign(address.begin(), address.end());
    link.peer = 1;
    link.role = connects ? transport::Role::kConnect : transport::Role::kAccept;
    link.token[0] = 9;
    link.deadline = Clock::now() + kPatience;
    peer = transport->connect(link);
    const auto there = reader.integer<uint64_t>();
    peer->import_region({connects ? 2u : 1u, {reinterpret_cast<std::byte*>(there), kBytes, kHost}}, reader.bytes());
  }
  ~Party() {
    peer.reset();
    transport.reset();
    ::munmap(data, kBytes);
  }

  void say(const Bytes& what) {
    const Bytes message = Writer().bytes(what).take();
    sys::send_exact(pipe, message, Clock::now() + kPatience);
  }
  Bytes hear() {
    Bytes size(4);
    sys::recv_exact(pipe, size, Clock::now() + kPatience);
    Bytes what(Reader(size).integer<uint32_t>());
    sys::recv_exact(pipe, what, Clock::now() + kPatience);
    return what;
  }

  // Reversed pages of the whole region.
  static TransferPlan plan(RegionId from, RegionId to) {
    PagedCopy copy;
    copy.pairs.push_back({from, to, 0, 0, kPage, kPage, kPage});
    constexpr auto kPages = static_cast<uint32_t>(kBytes / kPage);
    for (uint32_t i = 0; i < kPages; ++i) copy.runs.push_back({i, kPages - 1 - i, 1});
    copy.seal();
    return TransferPlan{{copy}};
  }
  size_t poll() {
    Completion out[8];
    const size_t n = transport->poll(out);
    for (size_t i = 0; i < n; ++i) done.push_back(std::move(out[i]));
    if (n == 0) std::this_thread::sleep_for(std::chrono::microseconds(20));
    return n;
  }
  // Sends over and over until something comes back that is not ok, or `rounds` are through. The last status.
  Status send(const TransferPlan& what, uint64_t rounds) {
    const Deadline deadline = Clock::now() + kPatience;
    for (uint64_t round = 1; round <= rounds; ++round) {
      done.clear();
      Cursor cursor;
      Status status;
      while (status.ok() && !at_end(what.copies[0], cursor) && Clock::now() < deadline) {
        const Cursor before = cursor;
        status = peer->submit(round, what, 0, cursor);
        if (before == cursor) poll();
      }
      while (status.ok() && !peer->notify(round, round, {}) && Clock::now() < deadline) poll();
      while (done.empty() && Clock::now() < deadline) poll();
      if (done.size() != 1) return {Code::kTimeout, static_cast<int32_t>(done.size()), "completions"};
      if (!done[0].status.ok()) return done[0].status;
    }
    return kOkStatus;
  }

  int pipe;
  pack::HostCopier copier;
  std::unique_ptr<transport::Transport> transport;
  std::unique_ptr<transport::Peer> peer;
  std::byte* data = nullptr;
  std::vector<Completion> done;
};

// Runs `body` in a child with one end of a pipe; the parent has the other.
struct Child {
  template <typename Body>
  explicit Child(Body body) {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
    id = ::fork();
    if (id == 0) {
      ::close(ends[0]);
      int code = 99;
      try {
        code = body(ends[1]);
      } catch (const std::exception& e) {
        std::fprintf(stderr, "child: %s\n", e.what());
      }
      ::_exit(code);
    }
    ::close(ends[1]);
    pipe = ends[0];
  }
  ~Child() {
    if (!waited) {
      ::kill(id, SIGKILL);
      wait();
    }
    ::close(pipe);
  }
  int wait() {
    int status = 0;
    ::waitpid(id, &status, 0);
    waited = true;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  }
  pid_t id = 0;
  int pipe = -1;
  bool waited = false;
};

int receive_and_check(const char* path, int pipe) {
  Party side(path, pipe, false, 0);
  const Deadline deadline = Clock::now() + kPatience;
  while (side.done.empty() && Clock::now() < deadline) side.poll();
  if (side.done.empty() || !side.done[0].status.ok()) return 2;
  for (uint64_t i = 0; i < kBytes; ++i) {
    const uint64_t from = (kBytes / kPage - 1 - i / kPage) * kPage + i % kPage;
    if (side.data[i] != static_cast<std::byte>((from / kPage * 7 + from) ^ 0x55)) return 3;
  }
  side.hear();  // the parent is done
  return 0;
}

void wait_forever(Party& side) {
  for (;;) side.poll();
}

constexpr const char* kPaths[] = {"auto", "map", "cma", "staging"};

}  // namespace

TEST_CASE("every way moves bytes between processes") {
  for (const char* path : kPaths) {
    CAPTURE(path);
    Child child([&](int pipe) { return receive_and_check(path, pipe); });
    Party side(path, child.pipe, true, 0x55);
    const Status status = side.send(Party::plan(1, 2), 1);
    CHECK_MESSAGE(status.ok(), status.to_string());
    const std::string how = side.peer->describe();
    CHECK_MESSAGE(how.find(std::strcmp(path, "cma") == 0       ? "cma: 1"
                           : std::strcmp(path, "staging") == 0 ? "staged: 1"
                                                               : "mapped: 1") != std::string::npos,
                  how);
    side.say({});
    CHECK(child.wait() == 0);
  }
}

TEST_CASE("a receiver that is killed is lost at once") {
  for (const char* path : kPaths) {
    CAPTURE(path);
    Child child([&](int pipe) {
      Party side(path, pipe, false, 0);
      wait_forever(side);
      return 0;
    });
    Party side(path, child.pipe, true, 0x55);
    std::jthread killer([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      ::kill(child.id, SIGKILL);
    });
    const auto start = Clock::now();
    const Status status = side.send(Party::plan(1, 2), 100000);
    CHECK_MESSAGE(status.code == Code::kPeerLost, status.to_string());
    CHECK(Clock::now() - start < std::chrono::seconds(2));
    CHECK(side.peer->lost().code == Code::kPeerLost);
    side.done.clear();
    for (int i = 0; i < 100; ++i) side.poll();
    CHECK(side.done.empty());
  }
}

TEST_CASE("a receiver that is killed is lost even while its child holds the sockets") {
  Child child([&](int pipe) {
    Party side("auto", pipe, false, 0);
    if (::fork() == 0) {
      ::sleep(20);
      ::_exit(0);
    }
    wait_forever(side);
    return 0;
  });
  Party side("auto", child.pipe, true, 0x55);
  std::jthread killer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    ::kill(child.id, SIGKILL);
    child.wait();
  });
  const auto start = Clock::now();
  const Status status = side.send(Party::plan(1, 2), 100000);
  CHECK_MESSAGE(status.code == Code::kPeerLost, status.to_string());
  CHECK(Clock::now() - start < std::chrono::seconds(3));
}

TEST_CASE("a sender that is killed leaves the receiver whole") {
  for (const char* path : kPaths) {
    CAPTURE(path);
    Child child([&](int pipe) {
      Party side(path, pipe, true, 0x55);
      const Status status = side.send(Party::plan(1, 2), 100000);
      return static_cast<int>(status.code);
    });
    Party side(path, child.pipe, false, 0);
    const Deadline deadline = Clock::now() + kPatience;
    while (side.done.size() < 3 && Clock::now() < deadline) side.poll();
    ::kill(child.id, SIGKILL);
    const auto start = Clock::now();
    while (side.peer->lost().ok() && Clock::now() < deadline) side.poll();
    CHECK(side.peer->lost().code == Code::kPeerLost);
    CHECK(Clock::now() - start < std::chrono::seconds(2));
    std::memset(side.data, 1, kBytes);
    side.transport->deregister_memory(2);
    CHECK(side.data[kBytes - 1] == std::byte{1});
  }
}
