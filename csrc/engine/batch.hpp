// Batch: one submitted plan, shared by the caller who waits for it and the worker who moves it.
// The caller's half is thread-safe; the worker's half belongs to the worker thread alone.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>

#include "core/types.hpp"

namespace pdxfer::engine {

class Batch {
 public:
  Batch(BatchId id, PeerId peer, std::shared_ptr<const TransferPlan> plan, std::optional<uint64_t> tag, Bytes tail)
      : id(id), peer(peer), plan(std::move(plan)), tag(tag), tail(std::move(tail)) {}

  const BatchId id;
  const PeerId peer;
  const std::shared_ptr<const TransferPlan> plan;
  const std::optional<uint64_t> tag;
  const Bytes tail;

  // Caller's half.
  bool done() const noexcept { return done_.load(std::memory_order_acquire); }
  // Meaningful once done().
  Status status() const noexcept { return done() ? status_ : kOkStatus; }
  // False when the batch is still moving at the deadline; it goes on moving.
  bool wait_until(std::chrono::steady_clock::time_point deadline) const {
    std::unique_lock lock(mutex_);
    return finished_.wait_until(lock, deadline, [this] { return done(); });
  }

  // Worker's half.
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
  std::atomic<bool> done_{false};
  Status status_;
  mutable std::mutex mutex_;
  mutable std::condition_variable finished_;
};

}  // namespace pdxfer::engine
