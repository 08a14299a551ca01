// The worker alone, between transports that do as they are told: what its callers may rely on in which order.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/socket.h>

#include <thread>
#include <utility>

#include "engine/worker.hpp"

using namespace pdxfer;
using namespace std::chrono_literals;

namespace {

constexpr PeerId kPeer = 7;
constexpr Status kGone{Code::kPeerLost, ESRCH, "the process is gone"};

// A link that ends with its first batch, as shared memory's does when the copy finds the process gone.
struct DoomedLink : transport::Peer {
  std::vector<Completion>& completions;
  Status lost_;
  explicit DoomedLink(std::vector<Completion>& completions) : completions(completions) {}
  void import_region(const Region&, ByteView) override {}
  void forget_region(RegionId) override {}
  Status submit(BatchId, const TransferPlan&, uint32_t, Cursor&) override { return kOkStatus; }
  bool notify(BatchId batch, std::optional<uint64_t>, ByteView) override {
    lost_ = kGone;
    completions.push_back({Completion::Kind::kSent, kPeer, batch, 0, kGone, {}});
    return true;
  }
  void cancel(BatchId) override {}
  Status lost() const override { return lost_; }
  std::string describe() const override { return "doomed"; }
};

// A link on which a batch is over with its notification, and which remembers whose thread brought that.
struct PromptLink : transport::Peer {
  std::vector<Completion>& completions;
  std::vector<std::thread::id>& threads;
  PromptLink(std::vector<Completion>& completions, std::vector<std::thread::id>& threads)
      : completions(completions), threads(threads) {}
  void import_region(const Region&, ByteView) override {}
  void forget_region(RegionId) override {}
  Status submit(BatchId, const TransferPlan&, uint32_t, Cursor&) override { return kOkStatus; }
  bool notify(BatchId batch, std::optional<uint64_t>, ByteView) override {
    threads.push_back(std::this_thread::get_id());
    completions.push_back({Completion::Kind::kSent, kPeer, batch, 0, kOkStatus, {}});
    return true;
  }
  void cancel(BatchId) override {}
  Status lost() const override { return kOkStatus; }
  std::string describe() const override { return "prompt"; }
};

// A link that takes with it what it has completed and nobody has polled.
struct ForgetfulLink : PromptLink {
  using PromptLink::PromptLink;
  ~ForgetfulLink() override { completions.clear(); }
};

struct FakeTransport : transport::Transport {
  std::vector<Completion> completions;  // under the worker's turn, as `threads`
  std::vector<std::thread::id> threads;
  std::function<void()> before_poll = [] {};
  bool nothing_yet = false;  // for the poll under way
  const char* name() const override { return "fake"; }
  Bytes address() override { return {}; }
  Bytes register_memory(const Region&) override { return {}; }
  void deregister_memory(RegionId) override {}
  std::unique_ptr<transport::Peer> connect(const transport::Link&) override {
    return std::make_unique<PromptLink>(completions, threads);
  }
  bool launches() const override { return true; }
  size_t poll(std::span<Completion> out) override {
    before_poll();
    if (std::exchange(nothing_yet, false)) return 0;
    const size_t count = std::min(out.size(), completions.size());
    std::move(completions.begin(), completions.begin() + static_cast<long>(count), out.begin());
    completions.erase(completions.begin(), completions.begin() + static_cast<long>(count));
    return count;
  }
};

Config patient() {
  Config config;
  config.peer_timeout_ms = 120'000;  // nobody answers pings here
  return config;
}

// A worker with one peer over `link`; `other_end` is that peer's end of the control connection.
struct Bench {
  const Config config = patient();
  engine::RegionTable regions;
  engine::Worker worker{config, regions,
                        [](const transport::Transport&) { return std::vector<engine::RegionNotice>(); }};
  sys::UniqueFd other_end;
  std::shared_ptr<engine::PeerState> peer;

  Bench(std::vector<transport::Transport*> transports, std::unique_ptr<transport::Peer> link) {
    int pair[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    other_end = sys::UniqueFd(pair[1]);
    engine::Choice choice{transports.front(), std::move(link), {}};
    peer = std::make_shared<engine::PeerState>(kPeer, transport::Role::kConnect, engine::Identity{},
                                               engine::FrameLink(sys::UniqueFd(pair[0]), "test"), std::move(choice));
    worker.start(std::move(transports));
    worker.adopt(peer);
  }
  ~Bench() { worker.stop(); }
};

std::shared_ptr<engine::Batch> new_batch() {
  static BatchId next = 1;
  return std::make_shared<engine::Batch>(next++, kPeer, std::make_shared<TransferPlan>(), std::nullopt, Bytes{});
}

std::chrono::steady_clock::time_point bound() { return std::chrono::steady_clock::now() + 20s; }

}  // namespace

TEST_CASE("a batch is begun on its caller's thread when the worker is asleep, else by the worker") {
  FakeTransport transport;
  std::atomic<bool> hold{false}, held{false};
  transport.before_poll = [&] {
    const auto end = bound();
    while (hold && std::chrono::steady_clock::now() < end) held = true, std::this_thread::sleep_for(1ms);
  };
  Bench bench({&transport}, transport.connect({}));

  const auto begun_here = [&](bool here) {
    const auto batch = new_batch();
    bench.worker.submit(batch, here);
    REQUIRE(batch->wait_until(bound()));
    REQUIRE(batch->status().ok());
    return transport.threads.back() == std::this_thread::get_id();  // the worker reads it no more: one batch at a time
  };
  bool once = false;
  for (int i = 0; i < 2000 && !once; ++i) {
    std::this_thread::sleep_for(1ms);  // asleep most of the time, but nobody promises when
    once = begun_here(true);
  }
  CHECK(once);
  for (int i = 0; i < 20; ++i) CHECK_FALSE(begun_here(false));

  hold = true;  // the worker has its turn, and keeps it
  bench.worker.wake();
  while (!held) std::this_thread::sleep_for(1ms);
  const auto batch = new_batch();
  bench.worker.submit(batch, true);  // does not wait for the turn
  CHECK_FALSE(batch->done());
  hold = false;
  REQUIRE(batch->wait_until(bound()));
  CHECK(batch->status().ok());
  CHECK(transport.threads.back() != std::this_thread::get_id());
}

TEST_CASE("a batch that fails with its peer completes only after the peer is marked lost") {
  // The worker polls `doomed`, which fails the batch, and then `slow`, which holds it up: whoever saw the batch
  // complete now looks at the peer before the worker took its link down.
  FakeTransport doomed, slow;
  const auto batch = new_batch();
  std::atomic<bool> checked{false};
  slow.before_poll = [&] {
    const auto end = bound();
    while (batch->done() && !checked && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(1ms);
  };
  Bench bench({&doomed, &slow}, std::make_unique<DoomedLink>(doomed.completions));
  bench.worker.submit(batch, false);

  const bool completed = batch->wait_until(bound());
  const bool alive = bench.peer->alive();
  const std::string reason = bench.peer->lost_reason();
  checked = true;
  REQUIRE(completed);
  CHECK(batch->status().code == Code::kPeerLost);
  CHECK_FALSE(alive);
  CHECK(reason.find("the process is gone") != std::string::npos);
  // The link goes too, though the peer was marked already: the control connection is closed.
  REQUIRE(::fcntl(bench.other_end.get(), F_SETFL, O_NONBLOCK) == 0);
  std::byte byte;
  const auto end = bound();
  while (::recv(bench.other_end.get(), &byte, 1, 0) != 0 && std::chrono::steady_clock::now() < end)
    std::this_thread::yield();
  CHECK(::recv(bench.other_end.get(), &byte, 1, 0) == 0);
}

TEST_CASE("what arrived before the peer was gone is told, though its link is gone before anybody looked") {
  FakeTransport transport;
  std::atomic<bool> hold{false}, held{false};
  transport.before_poll = [&] {
    const auto end = bound();
    while (hold && std::chrono::steady_clock::now() < end) held = true, std::this_thread::sleep_for(1ms);
  };
  Bench bench({&transport}, std::make_unique<ForgetfulLink>(transport.completions, transport.threads));
  constexpr size_t kArrivals = 200;  // more than one poll takes
  hold = true;
  bench.worker.wake();
  while (!held) std::this_thread::sleep_for(1ms);
  for (BatchId id = 1; id <= kArrivals; ++id)
    transport.completions.push_back({Completion::Kind::kArrived, kPeer, id, id, kOkStatus, {}});
  transport.nothing_yet = true;
  bench.other_end.reset();  // which the worker sees before it polls again
  hold = false;

  std::vector<Completion> arrived;
  for (const auto end = bound(); arrived.size() < kArrivals && std::chrono::steady_clock::now() < end;) {
    for (Completion& completion : bench.worker.take_arrivals(64)) arrived.push_back(std::move(completion));
    std::this_thread::sleep_for(1ms);
  }
  REQUIRE(arrived.size() == kArrivals);
  for (size_t i = 0; i < kArrivals; ++i) CHECK(arrived[i].tag == i + 1);
  for (const auto end = bound(); bench.peer->alive() && std::chrono::steady_clock::now() < end;)
    std::this_thread::sleep_for(1ms);
  CHECK_FALSE(bench.peer->alive());
}
