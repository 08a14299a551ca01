// Sockets and the token listener: the right connection to the right taker, strangers bounded and harmless.
#include <doctest/doctest.h>

#include <cstring>
#include <future>
#include <vector>

#include "core/status.hpp"
#include "sys/socket.hpp"
#include "sys/token_listener.hpp"

namespace {

using namespace pdxfer;
using namespace pdxfer::sys;
using std::chrono::milliseconds;

Deadline in(int ms) { return Clock::now() + milliseconds(ms); }
Token token_of(uint8_t value) {
  Token token{};
  token[7] = value;
  return token;
}
UniqueFd knock(const TokenListener& listener, const Token& token, uint32_t index) {
  UniqueFd fd = connect_to(listener.address(), in(2000));
  send_preamble(fd.get(), token, index, in(2000));
  return fd;
}
// Does the other end close the connection within `ms`?
bool closes(const UniqueFd& fd, int ms) {
  std::byte byte;
  try {
    recv_exact(fd.get(), {&byte, 1}, in(ms));
  } catch (const Error& error) {
    return error.code() == Code::kPeerLost;
  }
  return false;
}
// How many of them the other end has closed, as soon as that is `enough`, or at the deadline.
int closed_of(const std::vector<UniqueFd>& fds, int enough, Deadline deadline) {
  int closed = 0;
  do {
    closed = 0;
    for (const UniqueFd& fd : fds) closed += closes(fd, 1) ? 1 : 0;
  } while (closed < enough && Clock::now() < deadline);
  return closed;
}
void say(int fd, char c) { send_exact(fd, {reinterpret_cast<const std::byte*>(&c), 1}, in(1000)); }
char hear(int fd) {
  std::byte byte;
  recv_exact(fd, {&byte, 1}, in(1000));
  return static_cast<char>(byte);
}

}  // namespace

TEST_CASE("connections reach who expects them, over every family") {
  const SocketAddress where[] = {
      resolve("127.0.0.1", 0)[0], resolve("::1", 0)[0],
      abstract_address("pdxfer-test-" + std::to_string(Clock::now().time_since_epoch().count()))};
  for (const SocketAddress& address : where) {
    CAPTURE(address.to_string());
    TokenListener listener(listen_on(address));
    listener.expect(token_of(1));
    const UniqueFd second = knock(listener, token_of(1), 1), first = knock(listener, token_of(1), 0);
    say(first.get(), 'a');
    say(second.get(), 'b');
    CHECK(hear(listener.take(token_of(1), 0, in(2000)).get()) == 'a');
    const auto [index, fd] = listener.take_any(token_of(1), in(2000));
    CHECK(index == 1);
    CHECK(hear(fd.get()) == 'b');
  }
}

TEST_CASE("who comes early is kept for who expects it later; a second claim is refused") {
  TokenListener listener(listen_on("127.0.0.1", 0));
  const UniqueFd early = knock(listener, token_of(1), 4);
  std::this_thread::sleep_for(milliseconds(50));
  listener.expect(token_of(1));
  const UniqueFd claim = knock(listener, token_of(1), 4);
  CHECK(closes(claim, 1000));
  say(early.get(), 'e');
  CHECK(hear(listener.take(token_of(1), 4, in(1000)).get()) == 'e');
}

TEST_CASE("take is bounded, and ends with forget and with the listener") {
  auto listener = std::make_unique<TokenListener>(listen_on("127.0.0.1", 0));
  const auto code = [&](auto&& call) {
    try {
      call();
    } catch (const Error& error) {
      return error.code();
    }
    return Code::kOk;
  };
  CHECK(code([&] { (void)listener->take(token_of(1), 0, in(50)); }) == Code::kUnavailable);
  listener->expect(token_of(1));
  CHECK(code([&] { (void)listener->take(token_of(1), 0, in(50)); }) == Code::kTimeout);
  auto waiting =
      std::async(std::launch::async, [&] { return code([&] { (void)listener->take(token_of(1), 0, in(8000)); }); });
  std::this_thread::sleep_for(milliseconds(30));
  const UniqueFd parked = knock(*listener, token_of(1), 3);
  std::this_thread::sleep_for(milliseconds(30));
  listener->forget(token_of(1));
  CHECK(waiting.get() == Code::kUnavailable);
  CHECK(closes(parked, 6000));  // at once, or in 3 s when the listener's thread came to it after forget
  const UniqueFd idle = connect_to(listener->address(), in(1000));
  listener.reset();
  CHECK(closes(idle, 1000));
}

TEST_CASE("strangers are bounded and delay nobody") {
  TokenListener listener(listen_on("127.0.0.1", 0));
  std::vector<UniqueFd> silent, unknown;
  for (int i = 0; i < 80; ++i) silent.push_back(connect_to(listener.address(), in(2000)));
  CHECK(closed_of(silent, 16, in(1500)) >= 16);  // before their 2 s without a preamble are over
  CHECK_FALSE(closes(silent.back(), 1));         // the newest stays
  for (size_t i = 0; i < 80; ++i) silent[i].reset();
  for (uint32_t i = 0; i < 100; ++i) unknown.push_back(knock(listener, token_of(9), i));
  const UniqueFd wrong = connect_to(listener.address(), in(1000));
  auto bytes = encode_preamble(token_of(1), 0);
  bytes[23] = std::byte{0};
  send_exact(wrong.get(), bytes, in(1000));
  CHECK(closes(wrong, 1000));
  listener.expect(token_of(1));
  const auto start = Clock::now();
  const UniqueFd welcome = knock(listener, token_of(1), 0);
  CHECK(listener.take(token_of(1), 0, in(4000)).get() >= 0);
  CHECK(Clock::now() - start < milliseconds(1900));  // not behind strangers, who have 2 s
  const int refused = closed_of(unknown, 36, in(2000));
  CHECK(refused >= 36);
  CHECK(refused < 100);
  const UniqueFd slow = connect_to(listener.address(), in(1000));
  say(slow.get(), 'x');
  CHECK(closes(slow, 4000));             // 2 s without a preamble
  CHECK(closes(unknown.front(), 4000));  // 3 s without a taker
}

TEST_CASE("addresses") {
  CHECK(split_host_port("127.0.0.1:80") == std::pair<std::string, uint16_t>("127.0.0.1", 80));
  CHECK(split_host_port("[::1]:65535") == std::pair<std::string, uint16_t>("::1", 65535));
  CHECK(join_host_port("::1", 7) == "[::1]:7");
  for (const char* bad : {"", ":", "a", "a:", ":80", "a:b", "a:65536", "::1:80", "a:-1", "a:80x"}) {
    CAPTURE(bad);
    CHECK_THROWS_AS(split_host_port(bad), Error);
  }
  CHECK(resolve("0.0.0.0", 1)[0].wildcard());
  CHECK(resolve("::", 1)[0].wildcard());
  CHECK_FALSE(resolve("127.0.0.1", 1)[0].wildcard());
  CHECK_THROWS_AS(abstract_address(std::string(108, 'x')), Error);
  CHECK_THROWS_AS(resolve("no.such.host.invalid", 1), Error);
  const UniqueFd taken = listen_on("127.0.0.1", 0);
  CHECK_THROWS_AS(listen_on("127.0.0.1", local_address(taken.get()).port()), Error);
  const uint16_t port = local_address(listen_on("127.0.0.1", 0).get()).port();  // closed again
  CHECK_THROWS_AS(connect_to("127.0.0.1", port, in(500)), Error);
  CHECK_THROWS_AS(accept_from(taken.get(), in(30)), Error);
}
