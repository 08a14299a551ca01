// How far one end's device copies have come, in a word that both ends of a link map and the sender's GPU writes: the
// receiver sees that bytes are in place without a word from the sender's CPU. And the ends of batches that wait for it
// there. Under the mutex of the link that owns them; nothing blocks.
#pragma once

#include <algorithm>
#include <deque>
#include <memory>
#include <optional>
#include <string>

#include "core/device_copy.hpp"
#include "sys/mapping.hpp"
#include "transport/cuda_ipc/cuda_ipc_wire.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport::cuda_ipc {

#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer does not know that two mappings are one memory. Whoever stands for the device in a test releases this
// before it writes a word; who looks at one acquires it.
extern char tsan_progress;
#endif

class Progress {
 public:
  static constexpr uint64_t kBytes = 4096;  // what can be page-locked

  // Throws Error(kUnavailable).
  static sys::UniqueFd make() { return sys::make_memfd("pdxfer-progress", kBytes); }
  // Throws as sys::map_memfd.
  explicit Progress(const sys::UniqueFd& memory);

  // Page-locks the word for the GPUs of this process, one of which writes it, and returns it; null: refusal() says why.
  uint32_t* pin(const HostPin& pin, int ordinal) noexcept;
  const std::string& refusal() const noexcept { return refusal_; }
  bool reached(uint32_t piece) const noexcept;

 private:
  uint32_t* word() const noexcept { return reinterpret_cast<uint32_t*>(memory_.data()); }

  sys::Mapping memory_;
  std::shared_ptr<void> pinned_;  // after memory_: unpinned before it goes
  std::string refusal_;
};

// Of a sender: an end that it sent ahead of the bytes.
struct EndAhead {
  BatchId batch = 0;
  DeviceTicket piece = 0;
  Clock::time_point sent, in_place{};  // in_place: when this end saw that they are
};

// Of a receiver: ends that came before their bytes, in the order in which they came.
class AwaitedEnds {
 public:
  struct End {
    Header header;
    Bytes tail;
  };
  // A sender has few pieces under way, and begins another only when one is over.
  static constexpr size_t kMost = 64;

  bool full() const noexcept { return ends_.size() >= kMost; }
  void add(const Header& header, ByteView tail) { ends_.push_back({header, {tail.begin(), tail.end()}}); }
  void clear() noexcept { ends_.clear(); }

  // The next one whose bytes are in place.
  std::optional<End> next(const Progress& progress) {
    return take([&](const End& end) { return progress.reached(end.header.piece); });
  }
  std::optional<End> take(BatchId batch) {
    return take([&](const End& end) { return end.header.batch == batch; });
  }

 private:
  template <typename Which>
  std::optional<End> take(Which which) {
    const auto found = std::ranges::find_if(ends_, which);
    if (found == ends_.end()) return std::nullopt;
    std::optional<End> end = std::move(*found);
    ends_.erase(found);
    return end;
  }

  std::deque<End> ends_;
};

}  // namespace pdxfer::transport::cuda_ipc
