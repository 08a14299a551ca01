// IoLoop: one thread that drives channels with epoll. What it drives is Driven; turn() is called on the loop's thread
// only, whenever its descriptor had an edge, somebody kicked it, or its last turn asked for another.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "sys/poller.hpp"

namespace pdxfer::transport::stream {

enum class Turn : uint8_t {
  kIdle,    // an edge or a kick will say when there is more to do
  kSoon,    // the same, and an edge is due within microseconds
  kAgain,   // there is more to do at once
  kDevice,  // a GPU has something under way that gives no sign: look again soon
};

class Driven {
 public:
  virtual ~Driven() = default;
  // A bounded piece of work.
  virtual Turn turn() noexcept = 0;

 private:
  friend class IoLoop;
  std::atomic<bool> kicked_{false};
  bool due_ = false;      // loop thread
  bool removed_ = false;  // under the loop's mutex: a late kick must not bring it back
};

class IoLoop {
 public:
  // The `index`-th of `count`. Where there are no more processors than that, it stays on one of its own. Throws
  // Error(kUnavailable).
  IoLoop(uint32_t index, uint32_t count);
  ~IoLoop();  // everything driven was removed before
  IoLoop(const IoLoop&) = delete;
  IoLoop& operator=(const IoLoop&) = delete;

  // Any thread but the loop's own.
  void add(int fd, Driven& driven);              // throws Error(kUnavailable)
  void remove(int fd, Driven& driven) noexcept;  // on return turn() is not running and will not run again
  void run(const std::function<void()>& task);   // runs it between turns; returns when it has
  // Any thread.
  void kick(Driven& driven) noexcept;

 private:
  struct Task;
  void work() noexcept;
  void mark_due(Driven& driven);
  void take_inbox();
  int patience(bool idle) noexcept;

  sys::Poller poller_;
  std::vector<Driven*> due_, turning_, on_device_;      // loop thread
  std::chrono::steady_clock::time_point spin_until_{};  // likewise; for a GPU
  std::chrono::steady_clock::time_point look_until_{};  // likewise; for an edge
  std::mutex mutex_;                                    // guards what follows
  std::vector<Driven*> kicked_;
  std::vector<Task*> tasks_;
  bool sleeping_ = false, stopping_ = false;
  std::thread thread_;
};

}  // namespace pdxfer::transport::stream
