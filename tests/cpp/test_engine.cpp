// The engine end to end within one process, over every transport: handshake, regions, batches, faults, errors.
#include <doctest/doctest.h>

#include <chrono>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>

#include "engine/engine.hpp"

using namespace pdxfer;
using namespace std::chrono_literals;
using engine::Engine;

namespace {

const std::vector<std::string> kTransports{"loopback", "shm", "tcp"};

Config config_for(const std::string& transport) {
  Config config;
  config.transports = transport;
  config.peer_timeout_ms = 1000;
  config.log_level = "error";
  return config;
}

struct Pool {
  std::vector<std::byte> memory;
  explicit Pool(size_t bytes, unsigned seed = 0) : memory(bytes) {
    std::minstd_rand random(seed + 1);
    if (seed != 0)
      for (std::byte& b : memory) b = static_cast<std::byte>(random());
  }
  Buffer buffer() { return {memory.data(), memory.size(), kHost}; }
};

std::shared_ptr<TransferPlan> plan_of(const Region& src, const Region& dst, uint64_t slot, std::vector<Run> runs) {
  auto plan = std::make_shared<TransferPlan>();
  PagedCopy copy;
  copy.pairs.push_back({src.id, dst.id, 0, 0, slot, slot, slot});
  copy.runs = std::move(runs);
  copy.seal();
  plan->copies.push_back(std::move(copy));
  return plan;
}

Region remote_region(const Engine& from, PeerId peer, const Region& region) {
  const auto found = from.peer(peer)->regions.find(reinterpret_cast<uint64_t>(region.buffer.data), 1, 2000ms);
  REQUIRE(found.has_value());
  return *found;
}

std::vector<Completion> arrivals(Engine& engine, size_t count) {
  std::vector<Completion> all;
  for (int i = 0; i < 3000 && all.size() < count; ++i) {
    for (auto& completion : engine.poll(64)) all.push_back(std::move(completion));
    if (all.size() < count) std::this_thread::sleep_for(1ms);
  }
  return all;
}

Status wait(const std::shared_ptr<engine::Batch>& batch) {
  REQUIRE(batch->wait_until(std::chrono::steady_clock::now() + 10s));
  return batch->status();
}

}  // namespace

TEST_CASE("bytes, tags and tails arrive over every transport") {
  for (const std::string& name : kTransports) {
    CAPTURE(name);
    Engine a(config_for(name)), b(config_for(name));
    Pool source(1 << 20, 7), destination(1 << 20);
    const Region src = a.register_memory(source.buffer()), dst = b.register_memory(destination.buffer());
    const PeerId to_b = a.connect(b.address(), 5000ms);
    const Region there = remote_region(a, to_b, dst);
    const auto plan = plan_of(src, there, 1024, {{0, 512, 16}, {100, 3, 1}, {900, 700, 124}});
    const std::string tail = "metadata";
    const auto raw = std::as_bytes(std::span(tail));
    const auto batch = a.submit(to_b, plan, 42, Bytes(raw.begin(), raw.end()));
    CHECK(wait(batch).ok());
    const auto arrived = arrivals(b, 1);
    REQUIRE(arrived.size() == 1);
    CHECK(arrived[0].status.ok());
    CHECK(arrived[0].tag == 42);
    CHECK(arrived[0].tail.size() == tail.size());
    std::vector<std::byte> expected(1 << 20);
    for (const Run& run : plan->copies[0].runs)
      std::memcpy(expected.data() + run.dst_slot * 1024, source.memory.data() + run.src_slot * 1024, run.count * 1024);
    CHECK(expected == destination.memory);
  }
}

TEST_CASE("regions added after the connection are published, deregistered ones are refused") {
  for (const std::string& name : kTransports) {
    CAPTURE(name);
    Engine a(config_for(name)), b(config_for(name));
    const PeerId to_b = a.connect(b.address(), 5000ms);
    Pool source(1 << 16, 3), destination(1 << 16);
    const Region src = a.register_memory(source.buffer()), dst = b.register_memory(destination.buffer());
    const Region there = remote_region(a, to_b, dst);
    CHECK(wait(a.submit(to_b, plan_of(src, there, 256, {{0, 0, 256}}), std::nullopt, {})).ok());
    CHECK(source.memory == destination.memory);
    b.deregister_memory(dst.id);
    CHECK_THROWS_AS(a.submit(to_b, plan_of(src, there, 256, {{0, 0, 1}}), std::nullopt, {}), Error);
    a.deregister_memory(src.id);
    CHECK_THROWS_AS(a.deregister_memory(src.id), Error);
    // The same memory may come back, as another region.
    const Region again = b.register_memory(destination.buffer());
    CHECK(again.id != dst.id);
    CHECK(remote_region(a, to_b, again).id == again.id);
  }
}

TEST_CASE("slots outside their regions are refused and touch nothing") {
  Engine a(config_for("shm")), b(config_for("shm"));
  Pool source(4096, 1), destination(4096);
  const Region src = a.register_memory(source.buffer()), dst = b.register_memory(destination.buffer());
  const PeerId to_b = a.connect(b.address(), 5000ms);
  const Region there = remote_region(a, to_b, dst);
  CHECK_THROWS_AS(a.submit(to_b, plan_of(src, there, 1024, {{3, 0, 2}}), std::nullopt, {}), Error);
  CHECK_THROWS_AS(a.submit(to_b, plan_of(src, there, 1024, {{0, 3, 2}}), std::nullopt, {}), Error);
  CHECK_THROWS_AS(a.submit(to_b, plan_of(src, there, 1024, {{0, 4294967295u, 1}}), std::nullopt, {}), Error);
  Region unknown = there;
  unknown.id = 999;
  CHECK_THROWS_AS(a.submit(to_b, plan_of(src, unknown, 1024, {{0, 0, 1}}), std::nullopt, {}), Error);
  CHECK_THROWS_AS(a.submit(77, plan_of(src, there, 1024, {{0, 0, 1}}), std::nullopt, {}), Error);
  CHECK(destination.memory == std::vector<std::byte>(4096));
  CHECK_THROWS_AS(a.register_memory({source.memory.data() + 100, 10, kHost}), Error);  // overlaps
  CHECK_THROWS_AS(a.register_memory({nullptr, 10, kHost}), Error);
  CHECK_THROWS_AS(a.register_memory({source.memory.data(), 0, kHost}), Error);
}

TEST_CASE("a peer that closes fails its batches, the others go on") {
  for (const std::string& name : kTransports) {
    CAPTURE(name);
    Config slow = config_for(name);
    slow.chunk_bytes = 4096;
    slow.fault = "throttle=4MB/s";
    Engine a(slow), c(config_for(name));
    auto b = std::make_unique<Engine>(config_for(name));
    Pool source(8 << 20, 5), doomed(8 << 20), fine(8 << 20);
    const Region src = a.register_memory(source.buffer());
    const Region dst_b = b->register_memory(doomed.buffer()), dst_c = c.register_memory(fine.buffer());
    const PeerId to_b = a.connect(b->address(), 5000ms), to_c = a.connect(c.address(), 5000ms);
    const auto lost = a.submit(to_b, plan_of(src, remote_region(a, to_b, dst_b), 4096, {{0, 0, 2048}}), 1, {});
    const auto kept = a.submit(to_c, plan_of(src, remote_region(a, to_c, dst_c), 4096, {{0, 0, 256}}), 2, {});
    std::this_thread::sleep_for(50ms);
    b.reset();
    CHECK(wait(lost).code == Code::kPeerLost);
    CHECK(wait(kept).ok());
    CHECK(std::memcmp(fine.memory.data(), source.memory.data(), 1 << 20) == 0);
    CHECK_FALSE(a.peer(to_b)->alive());
    CHECK_THROWS_AS(a.submit(to_b, plan_of(src, dst_b, 4096, {{0, 0, 1}}), std::nullopt, {}), Error);
  }
}

TEST_CASE("after a cancelled batch completes nothing of it lands") {
  for (const std::string& name : kTransports) {
    CAPTURE(name);
    Config slow = config_for(name);
    slow.chunk_bytes = 4096;
    slow.fault = "throttle=2MB/s";
    Engine a(slow), b(config_for(name));
    Pool source(4 << 20, 9), destination(4 << 20);
    const Region src = a.register_memory(source.buffer()), dst = b.register_memory(destination.buffer());
    const PeerId to_b = a.connect(b.address(), 5000ms);
    const auto batch = a.submit(to_b, plan_of(src, remote_region(a, to_b, dst), 4096, {{0, 0, 1024}}), 1, {});
    std::this_thread::sleep_for(100ms);
    a.cancel(batch);
    CHECK(wait(batch).code == Code::kCancelled);
    std::fill(destination.memory.begin(), destination.memory.end(), std::byte{0});
    std::this_thread::sleep_for(200ms);
    CHECK(destination.memory == std::vector<std::byte>(4 << 20));
    CHECK(wait(a.submit(to_b, plan_of(src, remote_region(a, to_b, dst), 4096, {{0, 0, 8}}), std::nullopt, {})).ok());
  }
}

TEST_CASE("secrets: the same one connects, another or none is refused by both ends") {
  const auto with = [](const std::string& secret) {
    Config config = config_for("tcp");
    config.secret = secret;
    return config;
  };
  Engine a(with("alpha")), same(with("alpha")), other(with("beta")), open(with(""));
  CHECK_NOTHROW(a.connect(same.address(), 5000ms));
  const auto refused = [&](Engine& from, Engine& to) {
    try {
      from.connect(to.address(), 5000ms);
    } catch (const Error& error) {
      return error.code() == Code::kUnavailable && std::string(error.what()).find("secret") != std::string::npos;
    }
    return false;
  };
  CHECK(refused(a, other));
  CHECK(refused(a, open));
  CHECK(refused(open, a));
  CHECK(a.peers().size() == 1);
}

TEST_CASE("nobody there, a port in use, a stranger: typed errors in time") {
  Engine a(config_for("tcp"));
  const auto code = [&](const std::string& address) {
    try {
      a.connect(address, 500ms);
    } catch (const Error& error) {
      return error.code();
    }
    return Code::kOk;
  };
  CHECK(code("127.0.0.1:1") == Code::kUnavailable);
  CHECK(code("nonsense") == Code::kInvalid);
  const sys::UniqueFd silent = sys::listen_on("127.0.0.1", 0);
  CHECK(code(sys::local_address(silent.get()).to_string()) == Code::kTimeout);
  Config taken = config_for("tcp");
  taken.port = sys::split_host_port(a.address()).second;
  CHECK_THROWS_AS(Engine{taken}, Error);
}

TEST_CASE("batches beyond max_batches are refused, not queued without bound") {
  Config config = config_for("shm");
  config.max_batches = 4;
  config.chunk_bytes = 4096;
  config.fault = "throttle=1MB/s";
  Engine a(config), b(config_for("shm"));
  Pool source(1 << 20, 2), destination(1 << 20);
  const Region src = a.register_memory(source.buffer()), dst = b.register_memory(destination.buffer());
  const PeerId to_b = a.connect(b.address(), 5000ms);
  const auto plan = plan_of(src, remote_region(a, to_b, dst), 4096, {{0, 0, 256}});
  std::vector<std::shared_ptr<engine::Batch>> batches;
  for (int i = 0; i < 4; ++i) batches.push_back(a.submit(to_b, plan, std::nullopt, {}));
  CHECK_THROWS_AS(a.submit(to_b, plan, std::nullopt, {}), Error);
  for (const auto& batch : batches) a.cancel(batch);
  for (const auto& batch : batches) CHECK(wait(batch).code == Code::kCancelled);
}

TEST_CASE("closing an engine while others connect to it and it connects itself") {
  for (int round = 0; round < 15; ++round) {
    Engine a(config_for("tcp")), b(config_for("shm,tcp"));
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t)
      threads.emplace_back([&, t] {
        try {
          for (int i = 0; i < 50; ++i) (t == 0 ? a : b).connect((t == 0 ? b : a).address(), 2000ms);
        } catch (const Error& error) {
          const Code code = error.code();
          CHECK((code == Code::kUnavailable || code == Code::kPeerLost || code == Code::kTimeout));
        }
      });
    std::this_thread::sleep_for(std::chrono::milliseconds(round * 3));
    b.close();
    for (std::thread& thread : threads) thread.join();
  }
}

TEST_CASE("a hundred short-lived engines") {
  for (int i = 0; i < 100; ++i) {
    Engine a(config_for("tcp"));
    if (i % 10 == 0) {
      Engine b(config_for("tcp"));
      CHECK_NOTHROW(a.connect(b.address(), 5000ms));
    }
  }
}
