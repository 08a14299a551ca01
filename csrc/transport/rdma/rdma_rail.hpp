// Rail: one RC queue pair of a link, from one of our ports to one of the peer's, and the requests outstanding on it. It
// posts chains with one doorbell, asks for a completion now and then, and knows what to do again elsewhere when it
// dies. A rail outlives its queue pairs: each new one is a generation. Under the transport's mutex.
#pragma once

#include <array>
#include <chrono>
#include <vector>

#include "core/rdma_options.hpp"
#include "transport/rdma/rdma_gid.hpp"
#include "transport/rdma/rdma_port.hpp"

namespace pdxfer::transport::rdma {

inline constexpr int kMaxPieces = 8;       // scatter/gather entries of one request
inline constexpr uint32_t kMaxChain = 32;  // requests behind one doorbell
inline constexpr uint32_t kReserved = 32;  // of kSendDepth, for messages and probes

struct OutBatch;

// One request, in terms that hold on every rail: keys are looked up when it is posted.
struct Work {
  enum class Kind : uint8_t { kExtent, kChunk, kMessage, kProbe } kind = Kind::kProbe;
  OutBatch* batch = nullptr;  // kExtent
  uint64_t number = 0;        // kChunk, kMessage
  RegionId src = kNoId, dst = kNoId;
  uint64_t remote = 0;  // virtual address at the peer
  uint32_t bytes = 0, pieces = 0;
  std::array<std::pair<uint64_t, uint32_t>, kMaxPieces> piece;  // address here and length
};

// What is needed to reach a queue pair; crosses the side channel.
struct QpAddress {
  uint32_t qp_num = 0, psn = 0;
};

struct Keys {
  uint32_t local = 0, remote = 0;
};

class Rail {
 public:
  enum class State : uint8_t { kDown, kConnecting, kProbing, kUp };

  Rail(uint32_t index, Port& port, NicPair pair, const RdmaOptions& options)
      : index(index), port(port), pair(std::move(pair)), options_(options) {}
  ~Rail() { close(); }
  Rail(const Rail&) = delete;
  Rail& operator=(const Rail&) = delete;

  // A fresh queue pair, ready to be told the other's. Throws Error(kUnavailable).
  QpAddress open();
  void connect(const QpAddress& remote);  // to ready-to-send; throws Error(kUnavailable)
  // No write of ours leaves, and none of the peer's lands, through this rail from now on.
  void fence() noexcept;
  void close() noexcept;

  bool up() const noexcept { return state == State::kUp; }
  uint32_t qp_num() const noexcept { return qp_ == nullptr ? 0 : qp_->qp_num; }
  QpAddress address() const noexcept { return {qp_num(), psn_}; }
  size_t outstanding() const noexcept { return posted_ - retired_; }
  uint64_t bytes() const noexcept { return bytes_; }
  uint32_t room() const noexcept {
    const auto used = static_cast<uint32_t>(outstanding());
    return used + kReserved >= kSendDepth ? 0 : kSendDepth - kReserved - used;
  }
  bool full() const noexcept { return outstanding() >= kSendDepth - 1; }

  // Posts up to kMaxChain works in order; returns how many were taken. `keys[i]` belongs to works[i].
  uint32_t post(std::span<const Work> works, std::span<const Keys> keys) noexcept;
  // Has nothing of what is outstanding completed for `patience`? Asked now and then; the hot path pays nothing.
  bool stuck(std::chrono::steady_clock::time_point now, std::chrono::milliseconds patience) noexcept {
    if (outstanding() == 0 || retired_ != retired_then_) {
      retired_then_ = retired_;
      moved_at_ = now;
    }
    return now - moved_at_ > patience;
  }
  // A completion of this generation: `done` sees every work that it retires, oldest first. False: not of ours.
  template <typename Done>
  bool retire(uint64_t wr_id, Done&& done) {
    if (!current(wr_id)) return false;
    for (const uint64_t end = position(wr_id) + 1; retired_ < end;) {
      const Work& work = ring_[retired_ % kSendDepth];
      bytes_ -= work.bytes;
      ++retired_;
      done(work);
    }
    return true;
  }
  const Work* failed(uint64_t wr_id) const noexcept {
    return current(wr_id) ? &ring_[position(wr_id) % kSendDepth] : nullptr;
  }
  // After fence(): what was not acknowledged, oldest first; the rail is empty then.
  template <typename Take>
  void take_unfinished(Take&& take) {
    for (; retired_ < posted_; ++retired_) take(ring_[retired_ % kSendDepth]);
    bytes_ = 0;
  }
  // Is anything but probes outstanding?
  bool has_real_work() const noexcept {
    for (uint64_t at = retired_; at < posted_; ++at)
      if (ring_[at % kSendDepth].kind != Work::Kind::kProbe) return true;
    return false;
  }
  // When a chain was cut short, nothing may be left without a request for a completion behind it.
  bool flush() noexcept;

  const uint32_t index;
  Port& port;
  const NicPair pair;
  uint32_t generation = 0;
  State state = State::kDown;
  bool fenced_here = false, fenced_there = false;
  std::chrono::steady_clock::time_point retry_at{}, since{};  // since: of kConnecting, and of fenced_here
  uint32_t failures = 0;
  Status why;  // of the last failure

 private:
  bool current(uint64_t wr_id) const noexcept {
    return wr_id >> 48 == (generation & 0x7fff) && position(wr_id) < posted_ && position(wr_id) >= retired_;
  }
  uint64_t position(uint64_t wr_id) const noexcept { return wr_id & 0xffffffffffff; }
  void modify(shim::IbvQpAttr& attr, int mask, const char* what);

  const RdmaOptions& options_;
  shim::IbvQp* qp_ = nullptr;
  uint32_t psn_ = 0, inline_bytes_ = 0;
  uint64_t retired_then_ = 0;
  std::chrono::steady_clock::time_point moved_at_{};
  uint64_t posted_ = 0, retired_ = 0, signaled_ = 0, bytes_ = 0;  // positions; signaled_: one past the last asked for
  std::vector<Work> ring_ = std::vector<Work>(kSendDepth);
  std::vector<shim::IbvSendWr> wrs_ = std::vector<shim::IbvSendWr>(kMaxChain);
  std::vector<shim::IbvSge> sges_ = std::vector<shim::IbvSge>(kMaxChain * kMaxPieces);
};

}  // namespace pdxfer::transport::rdma
