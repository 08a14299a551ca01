// The control connection under strangers and mismatched peers: every refusal is typed, named and in time, and the
// engine goes on serving others.
#include <doctest/doctest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cstring>
#include <random>
#include <thread>

#include "core/codec.hpp"
#include "engine/engine.hpp"

using namespace pdxfer;
using namespace pdxfer::engine;
using namespace std::chrono_literals;

namespace {

Config config_for(const char* secret = "") {
  Config config;
  config.transports = "tcp";
  config.connect_timeout_ms = 2000;  // of the accepting end: room for a loaded machine
  config.log_level = "error";
  config.secret = secret;
  return config;
}

Deadline soon() { return std::chrono::steady_clock::now() + 3s; }

sys::UniqueFd dial(const Engine& engine) {
  const auto [host, port] = sys::split_host_port(engine.address());
  return sys::connect_to(host, port, soon());
}

void send_all(const sys::UniqueFd& socket, ByteView bytes) {
  // The engine may close before it has read everything: that is its right.
  (void)::send(socket.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
}

Bytes hello(uint16_t version) {
  Writer writer;
  writer.raw(Bytes(16)).raw(Bytes(32)).integer(uint8_t{0}).text("stranger");
  return encode_frame(FrameType::kHello, writer.view(), version);
}

void still_serves(Engine& engine) {
  Engine client(config_for());
  CHECK_NOTHROW(client.connect(engine.address(), 5000ms));
}

}  // namespace

TEST_CASE("a peer of another wire version is refused by name at both ends") {
  Engine engine(config_for());
  const sys::UniqueFd socket = dial(engine);
  send_all(socket, hello(kWireVersion + 1));
  FrameLink link(sys::UniqueFd(::dup(socket.get())), "engine");
  try {
    link.expect(FrameType::kHello, soon());
    FAIL("a hello of another version was accepted");
  } catch (const Error& error) {
    CHECK(error.code() == Code::kUnavailable);
    CHECK(std::string(error.what()).find("wire version 2") != std::string::npos);
  }
  // And the other way round: a listener that answers with another version.
  const sys::UniqueFd listener = sys::listen_on("127.0.0.1", 0);
  std::thread old([&] {
    const sys::UniqueFd peer = sys::accept_from(listener.get(), soon());
    send_all(peer, hello(7));
    std::this_thread::sleep_for(100ms);
  });
  try {
    engine.connect(sys::local_address(listener.get()).to_string(), 2000ms);
    FAIL("connected to another version");
  } catch (const Error& error) {
    CHECK(std::string(error.what()).find("wire version 7") != std::string::npos);
  }
  old.join();
  still_serves(engine);
}

TEST_CASE("truncated, oversized and random handshakes neither crash nor hang nor linger") {
  Engine engine(config_for());
  const Bytes good = hello(kWireVersion);
  for (size_t cut = 0; cut < good.size(); cut += 7) {
    const sys::UniqueFd socket = dial(engine);
    send_all(socket, ByteView(good).first(cut));
  }
  {
    const sys::UniqueFd socket = dial(engine);
    Writer writer;
    writer.integer(kMagic).integer(kWireVersion).integer(uint16_t{1}).integer(uint32_t{0xffffffff});
    send_all(socket, writer.view());
    FrameLink link(sys::UniqueFd(::dup(socket.get())), "engine");
    CHECK_THROWS_AS(link.expect(FrameType::kHello, soon()), Error);
  }
  std::mt19937 random(5);
  for (int i = 0; i < 60; ++i) {
    Bytes noise(random() % 512);
    for (std::byte& b : noise) b = static_cast<std::byte>(random());
    if (i % 2 == 0 && noise.size() > kHeaderBytes) std::memcpy(noise.data(), good.data(), kHeaderBytes);
    const sys::UniqueFd socket = dial(engine);
    send_all(socket, noise);
  }
  still_serves(engine);
  // connect returns when both ends agree; the accepting engine enters the peer a moment later.
  for (int i = 0; i < 2000 && engine.peers().empty(); ++i) std::this_thread::sleep_for(1ms);
  CHECK(engine.peers().size() == 1);
}

TEST_CASE("control frames are sent at once, at both ends") {
  const auto listening = sys::listen_on("127.0.0.1", 0);
  sys::UniqueFd ends[2];
  ends[0] = sys::connect_to(sys::local_address(listening.get()), soon());
  ends[1] = sys::accept_from(listening.get(), soon());
  for (sys::UniqueFd& end : ends) {
    const FrameLink link(std::move(end), "test");
    int at_once = 0;
    socklen_t size = sizeof at_once;
    REQUIRE(::getsockopt(link.fd(), IPPROTO_TCP, TCP_NODELAY, &at_once, &size) == 0);
    CHECK(at_once != 0);
  }
}

TEST_CASE("a silent newcomer is let go at the time-out while others connect") {
  Engine engine(config_for());
  const sys::UniqueFd silent = dial(engine);
  still_serves(engine);
  char byte = 0;
  const auto begin = std::chrono::steady_clock::now();
  bool closed = false;
  while (!closed && std::chrono::steady_clock::now() - begin < 8s) {
    closed = ::recv(silent.get(), &byte, 1, MSG_DONTWAIT) == 0;
    // The refusal comes first, then the end of the stream.
    std::this_thread::sleep_for(5ms);
  }
  CHECK(closed);
}

TEST_CASE("a proof is bound to the hellos and the role") {
  Engine engine(config_for("secret"));
  const auto attempt = [&](const Bytes& proof) {
    const sys::UniqueFd socket = dial(engine);
    Writer writer;
    writer.raw(Bytes(16)).raw(Bytes(32)).integer(uint8_t{1}).text("stranger");
    send_all(socket, encode_frame(FrameType::kHello, writer.view()));
    FrameLink link(sys::UniqueFd(::dup(socket.get())), "engine");
    link.expect(FrameType::kHello, soon());
    link.send(FrameType::kProof, proof, soon());
    link.expect(FrameType::kProof, soon());
  };
  for (const Bytes& proof : {Bytes(32), Bytes(0), Bytes(31), Bytes(4000)}) {
    try {
      attempt(proof);
      FAIL("a false proof was accepted");
    } catch (const Error& error) {
      CHECK(error.code() == Code::kUnavailable);
      CHECK(std::string(error.what()).find("secret") != std::string::npos);
    }
  }
  CHECK(engine.peers().empty());
}

TEST_CASE("an authenticated peer that then talks nonsense is dropped, and only it") {
  Engine engine(config_for()), good(config_for());
  const PeerId kept = good.connect(engine.address(), 5000ms);
  const sys::UniqueFd socket = dial(engine);
  send_all(socket, hello(kWireVersion));
  Writer writer;
  writer.integer(uint8_t{1}).text("tcp").bytes(Bytes(64, std::byte{0xff}));
  send_all(socket, encode_frame(FrameType::kOffer, writer.view()));
  Writer choose;
  choose.text("tcp").raw(Bytes(16));
  send_all(socket, encode_frame(FrameType::kTry, choose.view()));
  FrameLink link(sys::UniqueFd(::dup(socket.get())), "engine");
  link.allow(kMaxFrame);
  CHECK_NOTHROW(link.expect(FrameType::kHello, soon()));
  CHECK_NOTHROW(link.expect(FrameType::kOffer, soon()));
  const Bytes result = link.expect(FrameType::kResult, soon());
  CHECK(result.at(0) == std::byte{0});
  CHECK(good.peer(kept)->alive());
}
