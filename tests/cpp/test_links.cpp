// The table of links between processes of one machine: whose socket and whose process an event is of, and that a link
// which was taken out hears nothing more.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>

#include "transport/local/links.hpp"

namespace {

using namespace pdxfer;

struct FakeLink {
  int received = 0, exited = 0;
  void receive() { ++received; }
  void process_exited() { ++exited; }
};

struct Ends {
  Ends() {
    int made[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, made) == 0);
    mine = sys::UniqueFd(made[0]);
    theirs = sys::UniqueFd(made[1]);
    REQUIRE(::pipe2(made, O_CLOEXEC) == 0);  // becomes readable when its other end closes, as a pidfd does at exit
    process = sys::UniqueFd(made[0]);
    alive = sys::UniqueFd(made[1]);
  }
  void say() const { REQUIRE(::send(theirs.get(), "x", 1, 0) == 1); }
  sys::UniqueFd mine, theirs, process, alive;
};

using Links = transport::local::Links<FakeLink>;

// Hands out all events that are there now; how many.
size_t dispatch_all(Links& links) {
  std::array<sys::Poller::Event, 16> events;
  const size_t n = links.poller.wait(events, 0);
  for (size_t i = 0; i < n; ++i) links.dispatch(events[i]);
  return n;
}

}  // namespace

TEST_CASE("an event reaches the link that it is of, and no other") {
  Links links;
  const Ends a_ends, b_ends;
  const auto a = std::make_shared<FakeLink>(), b = std::make_shared<FakeLink>();
  const uint64_t a_number = links.add(a, a_ends.mine.get(), a_ends.process.get());
  const uint64_t b_number = links.add(b, b_ends.mine.get(), -1);
  CHECK(a_number != b_number);
  REQUIRE(links.all().size() == 2);
  CHECK(links.all()[0] == a);
  CHECK(links.listed().at(b_number) == b);
  dispatch_all(links);  // both sockets have room
  a->received = b->received = 0;
  a_ends.say();
  CHECK(dispatch_all(links) == 1);
  CHECK(a->received == 1);
  CHECK(b->received == 0);
  b_ends.say();
  CHECK(dispatch_all(links) == 1);
  CHECK(a->received == 1);
  CHECK(b->received == 1);
  CHECK(a->exited == 0);
  CHECK(b->exited == 0);
}

TEST_CASE("the end of the other process is told, though its socket lives on in a child") {
  Links links;
  Ends ends;
  const auto link = std::make_shared<FakeLink>();
  links.add(link, ends.mine.get(), ends.process.get());
  dispatch_all(links);
  link->received = 0;
  ends.alive.reset();
  CHECK(dispatch_all(links) == 1);
  CHECK(link->exited == 1);
  CHECK(link->received == 0);
}

TEST_CASE("a link that was taken out hears nothing, not even of an event that was out already") {
  Links links;
  const Ends ends;
  auto link = std::make_shared<FakeLink>();
  const std::weak_ptr<FakeLink> alive = link;
  const uint64_t number = links.add(link, ends.mine.get(), ends.process.get());
  dispatch_all(links);
  link->received = 0;
  ends.say();
  std::array<sys::Poller::Event, 4> events;
  REQUIRE(links.poller.wait(events, 0) == 1);
  links.remove(number, ends.mine.get(), ends.process.get());
  links.dispatch(events[0]);
  CHECK(link->received == 0);
  ends.say();
  CHECK(dispatch_all(links) == 0);
  CHECK(links.all().empty());
  link.reset();
  CHECK(alive.expired());
  const auto next = std::make_shared<FakeLink>();
  CHECK(links.add(next, ends.mine.get(), -1) != number);  // a number is not given twice
}
