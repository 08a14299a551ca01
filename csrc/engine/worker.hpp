// Worker: the one thread of an engine that moves anything. It owns every peer's control connection and transport link
// after the handshake, takes commands from callers, gives each batch its turn, and completes it exactly once.
// Public members may be called from any thread; everything private runs under turn_, which the worker has whenever it
// is not asleep, and a caller has while it begins its own batch.
#pragma once

#include <deque>
#include <functional>
#include <future>
#include <thread>
#include <unordered_map>
#include <variant>

#include "core/config.hpp"
#include "engine/peer_state.hpp"
#include "sys/poller.hpp"

namespace pdxfer::engine {

class Worker {
 public:
  // Our regions as this transport's peers are to be told of them.
  using Notices = std::function<std::vector<RegionNotice>(const transport::Transport&)>;

  Worker(const Config& config, RegionTable& regions, Notices notices);
  ~Worker();  // stops, failing whatever is outstanding with kCancelled
  void start(std::vector<transport::Transport*> transports);
  void stop();

  void wake() noexcept { poller_.wake(); }
  void adopt(std::shared_ptr<PeerState> peer);
  // `here`: begin it on this thread when the worker is asleep, so that its first bytes need not wait for a thread to
  // wake.
  void submit(std::shared_ptr<Batch> batch, bool here);
  void cancel(std::shared_ptr<Batch> batch);
  void region_added();                          // publish what the peers do not know yet
  std::future<void> withdraw(RegionId region);  // ready when nothing of any peer or batch uses it any more
  std::future<void> drop(std::shared_ptr<PeerState> peer, std::string reason);  // orderly close
  // Up to `max` arrivals and errors of arrivals, oldest first.
  std::vector<Completion> take_arrivals(size_t max);
  size_t in_flight() const noexcept { return in_flight_.load(std::memory_order_relaxed); }
  uint64_t loops() const noexcept { return loops_.load(std::memory_order_relaxed); }

 private:
  using Clock = std::chrono::steady_clock;
  struct Adopt {
    std::shared_ptr<PeerState> peer;
  };
  struct Submit {
    std::shared_ptr<Batch> batch;
  };
  struct Cancel {
    std::shared_ptr<Batch> batch;
  };
  struct Publish {};
  struct Withdraw {
    RegionId region;
    std::shared_ptr<std::promise<void>> done;
  };
  struct Drop {
    std::shared_ptr<PeerState> peer;
    std::string reason;
    std::shared_ptr<std::promise<void>> done;
  };
  using Command = std::variant<Adopt, Submit, Cancel, Publish, Withdraw, Drop>;
  struct Withdrawal {
    RegionId region;
    std::shared_ptr<std::promise<void>> done;
    Clock::time_point deadline;  // a peer that has not let go by then is dropped
  };

  void run();
  void post(Command command);
  bool take_commands();
  bool poll_transports();
  void drain(transport::Transport& transport);
  bool spinning() const;
  int idle_milliseconds() const;

  // worker_batches.cpp
  bool begin(const std::shared_ptr<Batch>& batch);
  void on(Adopt& adopt);
  void on(Submit& submit);
  void on(Cancel& cancel);
  static bool uses(const Batch& batch, Side side, RegionId region) noexcept;
  bool progress(PeerState& peer);
  bool step(PeerState& peer, Batch& batch);
  bool throttled(PeerState& peer, uint64_t bytes);
  void refuse(PeerState& peer, Batch& batch, Status why);
  void finish(PeerState& peer, const std::shared_ptr<Batch>& batch, Status status);
  void completed(const Completion& completion);

  // worker_control.cpp
  void on(Publish& publish);
  void on(Withdraw& withdraw);
  void on(Drop& drop);
  bool control_io(PeerState& peer, bool readable);
  void handle(PeerState& peer, const Frame& frame);
  void forget_finished(PeerState& peer);
  void publish_to(PeerState& peer);
  void settle_withdrawals(Clock::time_point now);
  void keep_alive(Clock::time_point now);
  void lose(PeerState& peer, const std::string& reason);
  void reap();

  const Config& config_;
  const Faults faults_;
  RegionTable& regions_;
  const Notices notices_;
  std::vector<transport::Transport*> transports_;

  std::mutex turn_;  // before every other lock
  std::mutex commands_mutex_;
  std::vector<Command> commands_;  // bounded by Config::max_batches through the engine's count of batches
  mutable std::mutex arrivals_mutex_;
  std::deque<Completion> arrivals_;
  std::atomic<size_t> arrived_{0};  // its size, so that callers who poll do not hold the worker up
  std::atomic<size_t> in_flight_{0};
  std::atomic<uint64_t> loops_{0};
  std::atomic<bool> stopping_{false};

  std::unordered_map<PeerId, std::shared_ptr<PeerState>> peers_;
  std::unordered_map<BatchId, std::shared_ptr<Batch>> batches_;
  std::vector<Withdrawal> withdrawals_;
  std::vector<PeerId> lost_;  // to be erased at the end of the turn, when no loop holds them
  std::vector<Completion> polled_;
  double throttle_credit_ = 0;  // bytes that Config::fault's throttle allows now
  Clock::time_point throttle_at_{};

  sys::Poller poller_;
  std::thread thread_;
};

}  // namespace pdxfer::engine
