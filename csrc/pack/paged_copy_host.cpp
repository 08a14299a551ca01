// The host copy; see paged_copy_host.hpp. Extents are cut into pieces, and lists of pieces copied while the source of
// those a few KiB further on is prefetched; past the caches when the copy as a whole would not fit them. Long extents
// are copied by memcpy where that is found to be faster.
#include "pack/paged_copy_host.hpp"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <system_error>
#include <utility>

#include "core/paged_copy.hpp"
#include "pack/stream_copy.hpp"

namespace pdxfer::pack {
namespace {

// Measured (docs/design/plan.md): a prefetch of 2 to 4 KiB ahead, a line for every line copied. Hardware prefetchers
// stop at page borders and know nothing of the next page. Pieces shorter than a page keep them from starting at all.
constexpr size_t kPiece = 4096;
constexpr size_t kLongestPiece = kPiece + kPiece / 2;
constexpr size_t kHeadFirst = 2049;  // pieces from this on have their first line prefetched as soon as they are cut
constexpr uint64_t kManyLines = 32 << 10;  // the hardware foresees most of such an extent
constexpr size_t kMostAhead = 32;          // pieces prefetched and not yet copied, at most
constexpr size_t kList = 256;              // pieces
constexpr uint64_t kStreaming = 1 << 20;   // copies up to this stay in the cache, where their reader finds them
constexpr uint64_t kShared = 4 << 20;      // waking helpers costs more than they save on less than this
constexpr uint64_t kSlice = 512 << 10;     // what helpers take at a time, at least
constexpr auto kLongestWait = std::chrono::seconds(1);

struct Pace {
  size_t ahead;  // bytes prefetched and not yet copied
  size_t batch;  // pieces cut, then copied: long turns leave the memory idle meanwhile
};
// [long extents][level]. The second level has room for more lines on their way.
constexpr Pace kPaces[2][2] = {{{4096, 16}, {8192, 16}}, {{2048, 8}, {8192, 4}}};

uint64_t mean_extent(const PagedCopy& copy) noexcept {
  if (copy.pairs.empty() || copy.runs.empty()) return 0;
  const RegionPair& pair = copy.pairs[0];  // the others are like it, or nearly
  return dense(pair) ? copy.slots * pair.slot_bytes / copy.runs.size() : pair.slot_bytes;
}

// Cuts the extents of `bytes` bytes from the cursor on into pieces, and copies them list by list.
class Pieces {
 public:
  Pieces(const PagedCopy& copy, Cursor& cursor, uint64_t bytes, std::span<std::byte* const> src,
         std::span<std::byte* const> dst, CacheLevel level) noexcept
      : copy_(copy),
        cursor_(cursor),
        left_(bytes),
        src_(src),
        dst_(dst),
        level_(level),
        pace_(kPaces[mean_extent(copy) >= kHeadFirst][static_cast<size_t>(level)]) {}

  // Cuts and copies some pieces; false when all are done.
  bool step(CopyFn move) noexcept {
    static constexpr std::array<Piece, kMostAhead> kNothing{};
    if (end_ + pace_.batch + kMostAhead > kList) {
      std::copy(list_.begin() + begin_, list_.begin() + end_, list_.begin());
      end_ -= std::exchange(begin_, 0);
    }
    while (ahead_ < pace_.ahead && end_ - begin_ < kMostAhead && cut()) prefetch_all(list_[end_ - 1]);
    const size_t first_new = end_;
    while (end_ - first_new < pace_.batch && (cut_small(first_new + pace_.batch - end_) || cut())) {
    }
    const size_t count = end_ - first_new;
    if (count == 0) {
      move(list_.data() + begin_, kNothing.data(), end_ - begin_);
      return false;
    }
    move(list_.data() + begin_, list_.data() + first_new, count);
    for (size_t i = 0; i < count; ++i) ahead_ -= list_[begin_++].bytes;
    // Pieces have grown: enough is under way.
    for (; ahead_ > 2 * pace_.ahead; ahead_ -= list_[begin_++].bytes) move(list_.data() + begin_, kNothing.data(), 1);
    return true;
  }

  uint64_t left() const noexcept { return left_; }

 private:
  // The walk of the page tables for a page, and whatever the hardware makes of its first line, long before the rest is
  // prefetched. (For short pieces it is one more line out of order, and costs more than it gives.)
  void prefetch_head(const std::byte* at) const noexcept {
    level_ == CacheLevel::kFirst ? prefetch_line<CacheLevel::kFirst>(at) : prefetch_line<CacheLevel::kSecond>(at);
  }

  void prefetch_all(const Piece& piece) const noexcept {
    level_ == CacheLevel::kFirst ? prefetch<CacheLevel::kFirst>(piece.src, piece.bytes)
                                 : prefetch<CacheLevel::kSecond>(piece.src, piece.bytes);
  }

  // Whole extents that are no longer than a piece.
  bool cut_small(size_t most) noexcept {
    if (rest_.bytes != 0 || at_end(copy_, cursor_)) return false;
    std::byte* const dst = dst_[cursor_.pair];
    const std::byte* const src = src_[cursor_.pair];
    Piece* to = list_.data() + end_;
    uint64_t bytes = 0;
    take_small_extents(copy_, cursor_, left_, kLongestPiece, most, [&](uint64_t from, uint64_t at, uint64_t n) {
      if (n >= kHeadFirst) prefetch_head(src + from);
      *to++ = {dst + at, src + from, n};
      bytes += n;
    });
    left_ -= bytes;
    ahead_ += bytes;
    const bool some = to != list_.data() + end_;
    end_ = static_cast<size_t>(to - list_.data());
    return some;
  }

  // The next piece of whatever comes next.
  bool cut() noexcept {
    if (rest_.bytes == 0) {
      if (left_ == 0 || at_end(copy_, cursor_)) return false;
      const Extent e = next_extent(copy_, cursor_, left_);
      rest_ = {dst_[e.pair] + e.dst_offset, src_[e.pair] + e.src_offset, e.bytes};
      left_ -= e.bytes;
    }
    // End on a line of the destination, so that no line is stored in two halves; what would leave a stump
    // is taken whole.
    const size_t bytes =
        rest_.bytes <= kLongestPiece ? rest_.bytes : kPiece - reinterpret_cast<uintptr_t>(rest_.dst) % kCacheLine;
    if (bytes >= kHeadFirst) prefetch_head(rest_.src);
    list_[end_++] = {rest_.dst, rest_.src, bytes};
    ahead_ += bytes;
    rest_ = {rest_.dst + bytes, rest_.src + bytes, rest_.bytes - bytes};
    return true;
  }

  const PagedCopy& copy_;
  Cursor& cursor_;
  uint64_t left_;  // bytes not yet taken from the cursor
  std::span<std::byte* const> src_, dst_;
  const CacheLevel level_;
  const Pace pace_;
  Piece rest_;  // of the extent being cut
  std::array<Piece, kList> list_;
  size_t begin_ = 0, end_ = 0;  // of what is cut and not yet copied
  size_t ahead_ = 0;            // bytes of that
};

uint64_t stream(const PagedCopy& copy, Cursor& cursor, uint64_t budget, std::span<std::byte* const> src,
                std::span<std::byte* const> dst, CacheLevel level, CopyFn move) noexcept {
  Pieces pieces(copy, cursor, budget, src, dst, level);
  while (pieces.step(move)) {
  }
  streaming_fence();
  return budget - pieces.left();
}

uint64_t copy_extents(const PagedCopy& copy, Cursor& cursor, uint64_t budget, std::span<std::byte* const> src,
                      std::span<std::byte* const> dst) noexcept {
  uint64_t done = 0;
  while (done < budget && !at_end(copy, cursor)) {
    const Extent e = next_extent(copy, cursor, budget - done);
    std::memcpy(dst[e.pair] + e.dst_offset, src[e.pair] + e.src_offset, e.bytes);
    done += e.bytes;
  }
  return done;
}

// On the calling thread only. Moves the cursor; returns the bytes copied.
uint64_t copy_alone(const PagedCopy& copy, Cursor& cursor, uint64_t budget, std::span<std::byte* const> src,
                    std::span<std::byte* const> dst, CopyChoices& choices) noexcept {
  const uint64_t extent = mean_extent(copy);
  CopyChoice& choice = extent < kHeadFirst   ? choices.below_2k
                       : extent < kManyLines ? choices.below_32k
                                             : choices.longer;
  if (copy.bytes <= kStreaming) {
    const CacheLevel level = level_of(choice.best());
    return stream(copy, cursor, budget, src, dst, level, plain_copy(level));
  }
  const CopyWay way = choice.next();
  const CacheLevel level = level_of(way);
  const auto begin = std::chrono::steady_clock::now();
  const uint64_t bytes = way == CopyWay::kDirect ? copy_extents(copy, cursor, budget, src, dst)
                                                 : stream(copy, cursor, budget, src, dst, level, streaming_copy(level));
  choice.tell(way, bytes, static_cast<uint64_t>((std::chrono::steady_clock::now() - begin).count()));
  return bytes;
}

}  // namespace

HostCopier::HostCopier(unsigned threads) {
  threads = std::clamp(threads, 1u, 64u);
  try {
    helpers_.reserve(threads - 1);
    for (unsigned i = 1; i < threads; ++i) {
      helpers_.emplace_back([this](const std::stop_token& stop) { help(stop); });
      pthread_setname_np(helpers_.back().native_handle(), ("pdx-copy-" + std::to_string(i)).c_str());
    }
  } catch (const std::system_error& error) {
    throw Error(Code::kUnavailable,
                "starting copy thread " + std::to_string(helpers_.size() + 1) + " of " + std::to_string(threads - 1) +
                    ": " + errno_name(error.code().value()) + ": lower copy_threads or raise the limit on threads",
                error.code().value());
  }
}

uint64_t HostCopier::copy(const PagedCopy& copy, Cursor& cursor, uint64_t budget, std::span<std::byte* const> src,
                          std::span<std::byte* const> dst) noexcept {
  std::unique_lock<std::mutex> use(in_use_, std::defer_lock);
  if (helpers_.empty() || budget < kShared || copy.bytes < kShared || !use.try_lock())
    return copy_alone(copy, cursor, budget, src, dst, choices_);
  Cursor end = cursor;
  const uint64_t bytes = advance(copy, end, budget);
  if (bytes < kShared) return copy_alone(copy, cursor, bytes, src, dst, choices_);
  std::unique_lock<std::mutex> lock(mutex_);
  job_.copy = &copy;
  job_.src = src;
  job_.dst = dst;
  cut(copy, cursor, bytes);
  work_.notify_all();
  while (take_slice(lock)) {
  }
  // Slices that helpers took are memory being written: there is no leaving before they are done.
  while (job_.done != job_.count) finished_.wait_for(lock, kLongestWait);
  job_.count = job_.next = job_.done = 0;
  return bytes;
}

// Cuts `bytes` from the cursor on into slices, two per thread where they are large enough; moves the cursor past them.
void HostCopier::cut(const PagedCopy& copy, Cursor& cursor, uint64_t bytes) noexcept {
  const uint64_t count = std::min<uint64_t>({kMaxSlices, 2 * threads(), bytes / kSlice});
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t share = bytes / (count - i);
    job_.slices[i] = {cursor, share};
    advance(copy, cursor, share);
    bytes -= share;
  }
  job_.count = count;
}

// Takes the next slice, if any is left, and copies it with the lock released.
bool HostCopier::take_slice(std::unique_lock<std::mutex>& lock) noexcept {
  if (job_.next == job_.count) return false;
  Slice slice = job_.slices[job_.next++];
  lock.unlock();
  copy_alone(*job_.copy, slice.cursor, slice.bytes, job_.src, job_.dst, choices_);
  lock.lock();
  if (++job_.done == job_.count) finished_.notify_one();
  return true;
}

void HostCopier::help(const std::stop_token& stop) noexcept {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop.stop_requested()) {
    work_.wait_for(lock, stop, kLongestWait, [this] { return job_.next != job_.count; });
    while (take_slice(lock)) {
    }
  }
}

}  // namespace pdxfer::pack
