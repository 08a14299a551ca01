// Batch: one submitted plan, shared by the caller who waits for it and the worker who moves it.
// The caller's half is thread-safe; the worker's half belongs to whoever has the worker's turn.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "core/types.hpp"

namespace pdxfer::engine {

class Batch {
 public:
  // `soon`: over within about a millisecond, so that who waits for it spins first.
  Batch(BatchId id, PeerId peer, std::shared_ptr<const TransferPlan> plan, std::optional<uint64_t> tag, Bytes tail,
        bool soon = false)
      : id(id), peer(peer), plan(std::move(plan)), tag(tag), tail(std::move(tail)), soon(soon) {}

  const BatchId id;
  const PeerId peer;
  const std::shared_ptr<const TransferPlan> plan;
  const std::optional<uint64_t> tag;
  const Bytes tail;
  const bool soon;

  // Caller's half.
  bool done() const noexcept { return done_.load(std::memory_order_acquire); }
  // Meaningful once done().
  Status status() const noexcept { return done() ? status_ : kOkStatus; }
  // False when the batch is still moving at the deadline; it goes on moving.
  bool wait_until(std::chrono::steady_clock::time_point deadline) const {
    if (soon) spin_until(std::min(deadline, std::chrono::steady_clock::now() + kSpinTime));
    std::unique_lock lock(mutex_);
    return finished_.wait_until(lock, deadline, [this] { return done(); });
  }

  // Worker's half (under Worker's turn).
  enum class Stage : uint8_t { kSubmitting, kNotifying, kWaiting, kCancelling };
  Stage stage = Stage::kSubmitting;
  bool touched = false;     // the transport has seen the batch
  uint32_t copy_index = 0;  // the copy of the plan that is moving
  Cursor cursor;
  Status refused;  // why the worker gave up: replaces the transport's kCancelled

  // Exactly once. The lock makes the wake-up impossible to miss.
  void complete(Status status) {
    {
      std::lock_guard lock(mutex_);
      if (done()) return;
      status_ = status;
      done_.store(true, std::memory_order_release);
    }
    finished_.notify_all();
  }

 private:
  // A sleeping thread takes 20 to 70 us to wake on a machine that had gone idle, a transfer over NVLink some hundred.
  static constexpr std::chrono::microseconds kSpinTime{1000};

  void spin_until(std::chrono::steady_clock::time_point end) const {
    while (!done() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  }

  std::atomic<bool> done_{false};
  Status status_;
  mutable std::mutex mutex_;
  mutable std::condition_variable finished_;
};

}  // namespace pdxfer::engine
