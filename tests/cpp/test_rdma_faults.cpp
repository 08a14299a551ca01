// What rdma does when devices fail, over the verbs table of fake_verbs.hpp: refused and cut posts, requests that fail,
// ports that die, a path that drops large packets, registrations refused. By ctest; owns two ends per case.
#include <thread>

#include "conformance_link.hpp"
#include "fake_verbs.hpp"
#include "transport/rdma/rdma_transport.hpp"

using namespace pdxfer;
using namespace conformance;

namespace {

Factory on_path(RdmaOptions::Path path) {
  return [path](Context c) {
    c.rdma.path = path;
    return transport::make_rdma_on(std::move(c), fake::table(), fake::devices(2));
  };
}

struct Reset {
  Reset() { fake::reset_faults(); }
  ~Reset() { fake::reset_faults(); }
};

// Eight batches of 512 KiB between two ends; `meanwhile` runs once, when some of them is under way.
struct Scene {
  explicit Scene(RdmaOptions::Path path, uint32_t peer_timeout_ms = 3000)
      : limits(make_limits(peer_timeout_ms)), a(on_path(path), limits), b(on_path(path), limits) {
    Memory& src = a.add(1, 4 << 20);
    Memory& dst = b.add(2, 4 << 20);
    pair = std::make_unique<Pair>(a, b);
    for (BatchId id = 1; id <= 8; ++id)
      batches.push_back(std::make_unique<Batch>(*pair->ab, id, plan_of(part_copy(src, dst, 1024, id - 1, 8)), id));
    for (auto& batch : batches) expect_plan(batch->plan, a.memories, b.memories);
  }
  static Limits make_limits(uint32_t peer_timeout_ms) {
    Limits limits;
    limits.chunk_bytes = 16 << 10;
    limits.peer_timeout_ms = peer_timeout_ms;
    return limits;
  }
  void start() {
    for (int i = 0; i < 4; ++i)
      for (auto& batch : batches) batch->step();
    a.poll();
  }
  // Each batch ends well, once, at both ends, and its bytes are where they belong.
  void expect_all_well() {
    REQUIRE(run(*pair, batches, a));
    REQUIRE(pair->poll_until([&] { return b.arrived.size() >= batches.size(); }));
    pair->poll_for(std::chrono::milliseconds(20));
    CHECK(a.sent.size() == batches.size());
    CHECK(b.arrived.size() == batches.size());
    for (const Completion& c : a.sent) CHECK_MESSAGE(c.status.ok(), c.status.to_string());
    CHECK(b.memory_as_expected());
    CHECK(pair->ab->lost().ok());
  }
  void expect_peer_lost(std::chrono::milliseconds within) {
    const auto begin = transport::Clock::now();
    REQUIRE(run(*pair, batches, a));
    CHECK(transport::Clock::now() - begin < within);
    CHECK(a.sent.size() == batches.size());
    CHECK(pair->ab->lost().code == Code::kPeerLost);
    for (const Completion& c : a.sent) CHECK_MESSAGE(c.status.code == Code::kPeerLost, c.status.to_string());
  }

  Reset reset;
  Limits limits;
  End a, b;
  std::unique_ptr<Pair> pair;
  Batches batches;
};

constexpr RdmaOptions::Path kPaths[] = {RdmaOptions::Path::kDirect, RdmaOptions::Path::kPacked};

}  // namespace

TEST_CASE("posts that are refused or cut short are made again") {
  for (const auto path : kPaths)
    for (const bool cut : {false, true}) {
      CAPTURE(cut);
      Scene scene(path);
      (cut ? fake::faults().cut_every : fake::faults().refuse_every) = 3;
      scene.expect_all_well();
    }
}

TEST_CASE("requests that fail go over another queue pair, none twice or half") {
  for (const auto path : kPaths) {
    Scene scene(path);
    fake::faults().fail_every = 97;
    scene.start();
    scene.expect_all_well();
    CHECK(scene.pair->ab->describe().find(" 0 failures") == std::string::npos);
  }
}

TEST_CASE("a queue pair that failed for whatever reason of the way is replaced") {
  for (const auto path : kPaths)
    for (const int status : {shim::kIbvWcRetryExcErr, shim::kIbvWcRnrRetryExcErr, shim::kIbvWcGeneralErr}) {
      CAPTURE(status);
      Scene scene(path);
      fake::faults().fail_every = 120;  // of some 300: fewer than would make one batch a suspect
      fake::faults().fail_status = status;
      scene.expect_all_well();
      CHECK(scene.pair->ab->describe().find(" 0 failures") == std::string::npos);
    }
}

TEST_CASE("a request that a device refuses as wrong ends its batch, typed, and no other") {
  for (const int status : {shim::kIbvWcLocLenErr, shim::kIbvWcLocProtErr, shim::kIbvWcLocAccessErr,
                           shim::kIbvWcRemInvReqErr, shim::kIbvWcRemAccessErr, shim::kIbvWcRemOpErr}) {
    CAPTURE(status);
    Scene scene(RdmaOptions::Path::kDirect);
    fake::faults().fail_every = 120;
    fake::faults().fail_status = status;
    REQUIRE(run(*scene.pair, scene.batches, scene.a));
    CHECK(scene.pair->ab->lost().ok());
    size_t refused = 0;
    for (const Completion& c : scene.a.sent) {
      if (c.status.ok()) continue;
      ++refused;
      CHECK(c.status.code == Code::kInvalid);
      CHECK(c.status.native == status);
      CHECK(std::string(c.status.where).find("was deregistered") != std::string::npos);
      CHECK(c.status.to_string().ends_with(": ? (" + std::to_string(status) + ")"));  // verbs' name, not an errno's
    }
    CHECK(refused > 0);
    CHECK(refused < scene.batches.size());
    REQUIRE(scene.pair->poll_until([&] { return scene.b.arrived.size() + refused == scene.batches.size(); }));
    CHECK(scene.a.sent.size() == scene.batches.size());
  }
}

TEST_CASE("a port that dies under way, or was dead before, leaves the other") {
  for (const auto path : kPaths) {
    {
      Scene scene(path);
      scene.start();
      fake::set_port(1, false);
      scene.expect_all_well();
    }
    Reset reset;
    fake::set_port(0, false);
    // Its own reset would bring the port back: the ends are made by hand.
    End a(on_path(path)), b(on_path(path));
    Memory& src = a.add(1, 1 << 20);
    Memory& dst = b.add(2, 1 << 20);
    Pair pair(a, b);
    Batches batches;
    batches.push_back(std::make_unique<Batch>(*pair.ab, 1, plan_of(whole_copy(src, dst, 1024)), 1));
    expect_plan(batches[0]->plan, a.memories, b.memories);
    REQUIRE(run(pair, batches, a));
    CHECK(a.find_sent(1)->status.ok());
    CHECK(b.memory_as_expected());
  }
}

TEST_CASE("no port left: the peer is lost within its time-out") {
  for (const auto path : kPaths) {
    Scene scene(path, 400);
    scene.start();
    fake::set_port(0, false);
    fake::set_port(1, false);
    scene.expect_peer_lost(std::chrono::milliseconds(3000));
  }
}

TEST_CASE("a path that lets probes through and nothing else is bounded too") {
  for (const auto path : kPaths) {
    Scene scene(path, 400);
    fake::faults().drop_above = 8;
    scene.expect_peer_lost(std::chrono::milliseconds(3000));
  }
}

TEST_CASE("a device that takes requests and completes nothing is found out") {
  for (const auto path : kPaths) {
    Scene scene(path, 400);
    scene.start();
    fake::faults().silent = true;
    scene.expect_peer_lost(kPatience);
    // Which end says so first is open; nothing but this bound ends such a wait.
  }
}

// The other end's worker stands still from here on, though its process lives and its other queue pairs work.
TEST_CASE("an end that never gives up a queue pair that failed is lost, and its writes with it") {
  for (const auto path : kPaths) {
    Scene scene(path, 400);  // its queue pairs are idle: with work on them, another bound would be as quick
    fake::set_port(0, false);
    const auto deadline = transport::Clock::now() + kPatience;
    while (scene.pair->ab->lost().ok() && transport::Clock::now() < deadline) scene.a.poll();
    const std::string why = scene.pair->ab->lost().where;
    CHECK_MESSAGE(why == "the other end did not give up a queue pair that failed here", why);
    scene.expect_peer_lost(kPatience);
  }
}

TEST_CASE("a new queue pair that is not answered for is given up in time, and offered again") {
  for (const auto path : kPaths) {
    Scene scene(path, 1500);  // not sooner: all must end well, also on a machine that lets this process wait
    const auto says = [&](const char* text) { return scene.pair->ab->describe().find(text) != std::string::npos; };
    fake::set_port(0, false);
    REQUIRE(scene.pair->poll_until([&] { return says("2 of 4 queue pairs up"); }));
    scene.pair->poll_for(std::chrono::milliseconds(20));  // both ends have fenced
    fake::set_port(0, true);
    const auto deadline = transport::Clock::now() + kPatience;
    while (!says("did not answer for a queue pair") && transport::Clock::now() < deadline) scene.a.poll();
    CHECK(says("did not answer for a queue pair"));
    CHECK(says("2 of 4 queue pairs up"));
    scene.expect_all_well();
    REQUIRE(scene.pair->poll_until([&] { return says("4 of 4 queue pairs up"); }));
  }
}

TEST_CASE("device memory: a refusal of each way is told") {
  const Reset reset;
  End end(on_path(RdmaOptions::Path::kAuto));
  Memory memory(5, 1 << 16, 1);
  const Region region{5, {memory.data(), 1 << 16, 0}};
  fake::faults().no_dmabuf = 95;
  (void)end.transport->register_memory(region);  // through nvidia-peermem, which looks like host memory
  CHECK(fake::counts().dmabufs == 0);
  end.transport->deregister_memory(5);
  fake::faults().no_registration = 14;
  try {
    (void)end.transport->register_memory(region);
    FAIL("registered");
  } catch (const Error& error) {
    const std::string said = error.what();
    CHECK(said.find("dma-buf: ") != std::string::npos);
    CHECK(said.find("nvidia-peermem: ") != std::string::npos);
    CHECK(said.find("EFAULT") != std::string::npos);
  }
}

TEST_CASE("poll asks to be called again while something moves, and stops asking") {
  Scene scene(RdmaOptions::Path::kDirect);
  bool spun = false;
  for (int i = 0; i < 4000 && scene.a.sent.size() < scene.batches.size(); ++i) {
    for (auto& batch : scene.batches) batch->step();
    scene.pair->poll();
    spun = spun || scene.a.transport->spinning();
  }
  CHECK(spun == (std::thread::hardware_concurrency() > 1));
  CHECK(scene.pair->poll_until([&] { return !scene.a.transport->spinning(); }));
}
