// FakeDeviceCopy: a DeviceCopy without a GPU, for tests on any machine. A thread of its own stands for the stream:
// pieces run there in order, each some time after its launch, and there is room for few at a time. "Device" addresses
// carry kDeviceTag, so that code which touches them itself faults. `faults()` makes a piece fail as a sticky device
// error.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "conformance_memory.hpp"

namespace conformance {

// Of all fakes of a process: how many more pieces go well (below 0: all), and how long each takes at most.
struct DeviceFaults {
  std::atomic<int64_t> good{-1};
  std::atomic<int64_t> delay_us{60};
  std::atomic<int64_t> pieces{0};  // that ran
  std::atomic<int64_t> tables{0};  // held now
  std::atomic<int64_t> pinned{0};  // bytes now
};
inline DeviceFaults& faults() {
  static DeviceFaults all;
  return all;
}

class FakeDeviceCopy final : public DeviceCopy {
 public:
  FakeDeviceCopy() : thread_([this] { run(); }) {}
  ~FakeDeviceCopy() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
    faults().tables -= static_cast<int64_t>(tables_.size());
  }

  Status prepare(const PagedCopy& copy, DeviceForm form, std::span<const uint64_t> src, std::span<const uint64_t> dst,
                 DeviceTables& tables) noexcept override {
    tables = 0;
    if (failed_.load()) return kFailed;
    if (tables_.size() >= 6) return kOkStatus;
    tables = ++last_tables_;
    ++faults().tables;
    tables_.emplace(tables, Tables{form, {src.begin(), src.end()}, {dst.begin(), dst.end()}, copy.pairs.size()});
    return kOkStatus;
  }
  void release(DeviceTables tables) noexcept override {
    REQUIRE(tables_.erase(tables) == 1);
    --faults().tables;
  }

  Status launch(DeviceTables tables, const PagedCopy& copy, Cursor& cursor, uint64_t budget, uint64_t buffer,
                DeviceTicket& ticket) noexcept override {
    ticket = 0;
    if (failed_.load()) return kFailed;
    if (launched_ - finished_.load() >= 3) return kOkStatus;
    const Tables& with = tables_.at(tables);
    REQUIRE(with.pairs == copy.pairs.size());
    Piece piece;
    if (launched_ % 3 == 2) budget = std::min<uint64_t>(budget, 5000);  // a launch may stop short
    for (uint64_t done = 0; done < budget && !at_end(copy, cursor);) {
      const Extent e = next_extent(copy, cursor, budget - done);
      const uint64_t paged =
          with.form == DeviceForm::kGather ? with.src[e.pair] + e.src_offset : with.dst[e.pair] + e.dst_offset;
      piece.moves.push_back({with.form == DeviceForm::kGather ? paged : buffer + done,
                             with.form == DeviceForm::kGather ? buffer + done : paged, e.bytes});
      done += e.bytes;
    }
    {
      const std::lock_guard lock(mutex_);
      queue_.push_back(std::move(piece));
    }
    changed_.notify_all();
    ticket = ++launched_;
    return kOkStatus;
  }

  Status done(DeviceTicket ticket, bool& over) noexcept override {
    REQUIRE(ticket <= launched_);
    over = finished_.load(std::memory_order_acquire) >= ticket;
    return !over && failed_.load(std::memory_order_acquire) ? kFailed : kOkStatus;
  }
  uint64_t sum(DeviceTicket) const noexcept override { return 0; }
  uint64_t landed(DeviceTicket) const noexcept override { return 0; }
  bool tells() const noexcept override { return false; }
  std::string describe() const override { return "a thread"; }

  static constexpr Status kFailed{Code::kInternal, 700, "cuEventQuery"};

 private:
  struct Tables {
    DeviceForm form;
    std::vector<uint64_t> src, dst;
    size_t pairs;
  };
  struct Move {
    uint64_t from, to, bytes;
  };
  struct Piece {
    std::vector<Move> moves;
  };

  static std::byte* memory(uint64_t address) { return reinterpret_cast<std::byte*>(address & ~kDeviceTag); }

  void run() {
    Random random(7);
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const Piece piece = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      const auto most = static_cast<uint64_t>(faults().delay_us.load());
      if (most > 0) std::this_thread::sleep_for(std::chrono::microseconds(pick(random, 0, most)));
      const int64_t good = faults().good.load() < 0 ? -1 : faults().good.fetch_sub(1);
      if (good == 0) failed_.store(true, std::memory_order_release);
      if (!failed_.load()) {
        for (const Move& m : piece.moves) std::memcpy(memory(m.to), memory(m.from), m.bytes);
        ++faults().pieces;
        finished_.fetch_add(1, std::memory_order_release);
      }
      lock.lock();
    }
  }

  std::unordered_map<DeviceTables, Tables> tables_;
  DeviceTables last_tables_ = 0;
  uint64_t launched_ = 0;
  std::atomic<uint64_t> finished_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Piece> queue_;
  bool stopping_ = false;
  std::thread thread_;
};

// A context with fake GPUs 0 to 3 and little staging, so that slots run out.
inline transport::Context with_fake_devices(transport::Context context) {
  context.limits.staging_bytes = 1 << 20;
  context.device_copy = [](int ordinal, const DeviceCopyOptions&) -> std::unique_ptr<DeviceCopy> {
    if (ordinal > 3) throw Error(Code::kUnavailable, "CUDA device " + std::to_string(ordinal) + " does not exist");
    return std::make_unique<FakeDeviceCopy>();
  };
  context.pin = [](int, std::byte*, uint64_t bytes) {
    faults().pinned += static_cast<int64_t>(bytes);
    return std::shared_ptr<void>(nullptr, [bytes](void*) { faults().pinned -= static_cast<int64_t>(bytes); });
  };
  return context;
}

}  // namespace conformance
