// The worker's loop and its mailbox; see worker.hpp. Batches are in worker_batches.cpp, control in worker_control.cpp.
#include "engine/worker.hpp"

#include <pthread.h>

#include <algorithm>
#include <array>

#include "core/log.hpp"

namespace pdxfer::engine {
namespace {

// Arrivals that nobody collects stop the polling of transports, so that senders feel it and memory stays bounded.
constexpr size_t kMaxArrivals = 65536;
constexpr size_t kPollBatch = 64;
// With a batch blocked on a transport that wakes us anyway: a safety net, and the throttle's tick.
constexpr int kBlockedMilliseconds = 1;

}  // namespace

Worker::Worker(const Config& config, RegionTable& regions, Notices notices)
    : config_(config), faults_(Faults::parse(config.fault)), regions_(regions), notices_(std::move(notices)) {
  polled_.resize(kPollBatch);
}

Worker::~Worker() { stop(); }

void Worker::start(std::vector<transport::Transport*> transports) {
  transports_ = std::move(transports);
  throttle_at_ = Clock::now();
  thread_ = std::thread([this] {
    ::pthread_setname_np(::pthread_self(), "pdx-worker");
    run();
  });
}

void Worker::stop() {
  stopping_.store(true);
  poller_.wake();
  if (thread_.joinable()) thread_.join();
}

void Worker::post(Command command) {
  {
    std::lock_guard lock(commands_mutex_);
    commands_.push_back(std::move(command));
  }
  poller_.wake();
}

void Worker::adopt(std::shared_ptr<PeerState> peer) { post(Adopt{std::move(peer)}); }
void Worker::cancel(std::shared_ptr<Batch> batch) { post(Cancel{std::move(batch)}); }
void Worker::region_added() { post(Publish{}); }

void Worker::submit(std::shared_ptr<Batch> batch, bool here) {
  in_flight_.fetch_add(1);
  if (here && begin(batch))
    poller_.wake();  // it goes on from here, while the bytes are on their way
  else
    post(Submit{std::move(batch)});
}

std::future<void> Worker::withdraw(RegionId region) {
  auto done = std::make_shared<std::promise<void>>();
  std::future<void> future = done->get_future();
  post(Withdraw{region, std::move(done)});
  return future;
}

std::future<void> Worker::drop(std::shared_ptr<PeerState> peer, std::string reason) {
  auto done = std::make_shared<std::promise<void>>();
  std::future<void> future = done->get_future();
  post(Drop{std::move(peer), std::move(reason), std::move(done)});
  return future;
}

std::vector<Completion> Worker::take_arrivals(size_t max) {
  std::vector<Completion> taken;
  if (arrived_.load(std::memory_order_acquire) == 0) return taken;
  bool was_full = false;
  {
    std::lock_guard lock(arrivals_mutex_);
    was_full = arrivals_.size() >= kMaxArrivals;
    while (taken.size() < max && !arrivals_.empty()) {
      taken.push_back(std::move(arrivals_.front()));
      arrivals_.pop_front();
    }
    arrived_.store(arrivals_.size(), std::memory_order_release);
  }
  if (was_full) poller_.wake();
  return taken;
}

bool Worker::take_commands() {
  std::vector<Command> taken;
  {
    std::lock_guard lock(commands_mutex_);
    taken.swap(commands_);
  }
  for (Command& command : taken) std::visit([this](auto& c) { on(c); }, command);
  return !taken.empty();
}

bool Worker::poll_transports() {
  if (arrived_.load(std::memory_order_acquire) >= kMaxArrivals) return false;
  bool any = false;
  for (transport::Transport* transport : transports_) {
    const size_t n = transport->poll(polled_);
    for (size_t i = 0; i < n; ++i) completed(polled_[i]);
    any |= n > 0;
  }
  return any;
}

// However much nobody has collected yet; bounded, as other peers go on.
void Worker::drain(transport::Transport& transport) {
  for (size_t taken = 0; taken < kMaxArrivals;) {
    const size_t n = transport.poll(polled_);
    if (n == 0) return;
    for (size_t i = 0; i < n; ++i) completed(polled_[i]);
    taken += n;
  }
}

bool Worker::spinning() const {
  return std::ranges::any_of(transports_, [](const auto* transport) { return transport->spinning(); });
}

int Worker::idle_milliseconds() const {
  for (const auto& [id, peer] : peers_)
    for (const auto& batch : peer->active)
      if (batch->stage != Batch::Stage::kWaiting && batch->stage != Batch::Stage::kCancelling)
        return kBlockedMilliseconds;
  // Heartbeats and deadlines are a third of the peer time-out apart; look four times as often.
  return static_cast<int>(std::clamp<uint32_t>(config_.peer_timeout_ms / 12, 5, 250));
}

void Worker::run() {
  std::array<sys::Poller::Event, 64> events;
  int sleep = 0;  // milliseconds
  while (!stopping_.load()) {
    loops_.fetch_add(1, std::memory_order_relaxed);
    const size_t ready = poller_.wait(events, sleep);
    const std::lock_guard turn(turn_);
    const Clock::time_point now = Clock::now();
    if (faults_.throttle_bytes_per_s != 0) {
      const double rate = static_cast<double>(faults_.throttle_bytes_per_s);
      throttle_credit_ =
          std::min(rate / 20, throttle_credit_ + rate * std::chrono::duration<double>(now - throttle_at_).count());
      throttle_at_ = now;
    }
    bool busy = take_commands();
    for (size_t i = 0; i < ready; ++i) {
      PeerState& peer = *static_cast<PeerState*>(events[i].what);
      if (peer.alive()) busy |= control_io(peer, true);
    }
    busy |= poll_transports();
    for (const auto& [id, peer] : peers_) {
      if (!peer->alive()) continue;
      if (const Status status = peer->link->lost(); !status.ok())
        lose(*peer, status.to_string());
      else
        busy |= progress(*peer);
      if (peer->alive() && !peer->forgetting.empty()) forget_finished(*peer);
      if (peer->alive() && peer->control.wants_to_send()) control_io(*peer, false);
    }
    keep_alive(now);
    settle_withdrawals(now);
    reap();
    sleep = busy || spinning() ? 0 : idle_milliseconds();
  }
  const std::lock_guard turn(turn_);
  take_commands();
  for (const auto& [id, peer] : peers_) {
    peer->control.enqueue(FrameType::kGoodbye, encode_refusal(Code::kPeerLost, "the engine was closed"));
    (void)peer->control.flush();
    lose(*peer, "this engine was closed");
  }
  reap();
  settle_withdrawals(Clock::now());
}

}  // namespace pdxfer::engine
