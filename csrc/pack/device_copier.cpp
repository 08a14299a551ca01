// See device_copier.hpp.
#include "pack/device_copier.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <thread>
#include <utility>

#include "core/log.hpp"
#include "core/paged_copy.hpp"
#include "core/progress_word.hpp"

namespace pdxfer::pack {
namespace {

constexpr uint64_t kDefaultTableBytes = 16 << 20;
constexpr size_t kTableEntries = 256;
constexpr size_t kMaxParts = 128;  // kernels of one piece, and calls for the copy engine
constexpr auto kFarewell = std::chrono::seconds(5);

// Makes the context current; the data path's CudaScope, which does not throw.
class Current {
 public:
  explicit Current(const sys::CudaContext& context) noexcept : result_(shim::cuda().api.context_push(context.get())) {}
  ~Current() {
    shim::CuContext popped = nullptr;
    if (result_ == shim::kCuSuccess) shim::cuda().api.context_pop(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  shim::CuResult result() const noexcept { return result_; }

 private:
  const shim::CuResult result_;
};

// Slots and pairs: what a kernel reads of it.
uint64_t bytes_of(const TableRing::Entry& entry) noexcept {
  return entry.pairs_at - entry.begin + entry.pairs * sizeof(DevicePair);
}

// The copy engine sums nothing.
DeviceCopyOptions settled(DeviceCopyOptions options) {
  options.copy_engine = options.copy_engine && !options.checksum;
  return options;
}

// One run in pairs without gaps: to a kernel it is one slot, whose table travels with the launch.
bool one_slot(const PagedCopy& copy) noexcept {
  return copy.runs.size() == 1 && std::ranges::all_of(copy.pairs, [&](const RegionPair& pair) {
           return dense(pair) && copy.slots * pair.slot_bytes <= DeviceCopier::kMaxWords / 2;
         });
}

void wake_caller(void* options) { static_cast<const DeviceCopyOptions*>(options)->wake(); }

}  // namespace

DeviceCopier::DeviceCopier(int ordinal, const DeviceCopyOptions& options)
    : options_(settled(options)),
      kernels_(ordinal),
      stream_(kernels_.context()),
      beside_(kernels_.context()),
      ring_(options.table_bytes != 0 ? options.table_bytes : kDefaultTableBytes, kTableEntries),
      host_tables_((sys::CudaScope(kernels_.context()), ring_.bytes())),
      device_tables_((sys::CudaScope(kernels_.context()), ring_.bytes())),
      tiles_taken_((sys::CudaScope(kernels_.context()), std::as_bytes(std::span(tiles_given_)))),
      blocks_over_((sys::CudaScope(kernels_.context()), std::as_bytes(std::span(tiles_given_).first(1)))),
      fork_((sys::CudaScope(kernels_.context()), sys::CudaEvent())),
      join_((sys::CudaScope(kernels_.context()), sys::CudaEvent())) {
  const auto processors = static_cast<unsigned>(kernels_.context().attribute(shim::kCuAttributeMultiprocessors));
  const auto blocks = [&](unsigned measured) {
    return std::clamp(options.blocks != 0 ? options.blocks : measured, 1u, std::max(1u, processors));
  };
  blocks_ = blocks(options.checksum ? kSummingBlocks : kDefaultBlocks);
  reading_blocks_ = blocks(kReadingBlocks);
  clusters_ =
      kernels_.context().attribute(shim::kCuAttributeMajor) >= 9 && shim::cuda().api.launch_kernel_ex != nullptr;
  tells_ = options.progress != nullptr && shim::cuda().api.stream_write_value != nullptr;
  const sys::CudaScope scope(kernels_.context());
  events_.reserve(std::max<size_t>(options.pieces, 1));
  for (size_t i = 0; i < std::max<size_t>(options.pieces, 1); ++i) events_.emplace_back();
  on_beside_.resize(events_.size());
  told_.resize(events_.size());
  from_.reserve(kMostBatched);
  to_.reserve(kMostBatched);
  sizes_.reserve(kMostBatched);
  if (!options.checksum) return;
  reports_ = std::make_unique<sys::PinnedMemory>(events_.size() * report_bytes());
  const std::vector<uint64_t> none((1 + blocks_) * kShares);
  landing_ = std::make_unique<sys::CudaMemory>(std::as_bytes(std::span(none)));
}

// A launch that failed half-way counts too, so it is the streams that have to be idle.
DeviceCopier::~DeviceCopier() {
  const shim::CudaDriver& api = shim::cuda().api;
  const Current current(kernels_.context());
  const shim::CuEvent last = events_[(launched_ + 1) % events_.size()].get();
  shim::CuResult result = api.event_record(join_.get(), beside_.get());
  if (result == shim::kCuSuccess) result = api.stream_wait_event(stream_.get(), join_.get(), 0);
  if (result == shim::kCuSuccess) result = api.event_record(last, stream_.get());
  const auto deadline = std::chrono::steady_clock::now() + kFarewell;
  while (result == shim::kCuSuccess && (result = api.event_query(last)) == shim::kCuNotReady &&
         std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    result = shim::kCuSuccess;
  }
  if (result != shim::kCuSuccess)
    log(LogLevel::kError, "device copies were not over at the end of their owner: " + shim::cuda_error(result));
}

Status DeviceCopier::fail(shim::CuResult result, const char* what) noexcept {
  if (error_.ok()) error_ = {Code::kInternal, result, what, shim::cuda_error_name(result)};
  return error_;
}

// Of copies of the engine that the driver does not take: the kernel moves them, over what had begun of them.
Status DeviceCopier::fail_engine(shim::CuResult result, const char* what) noexcept {
  if (result != shim::kCuInvalidValue && result != shim::kCuNotSupported) return fail(result, what);
  engine_ = false;
  engine_refused_ = true;
  log(LogLevel::kWarning, std::string(what) + " was refused (" + shim::cuda_error_name(result) +
                              "): the kernel moves long runs of this link from now on; please report this");
  return kOkStatus;
}

Status DeviceCopier::prepare(const PagedCopy& copy, DeviceForm form, std::span<const uint64_t> src,
                             std::span<const uint64_t> dst, DeviceTables& tables) noexcept {
  tables = 0;
  if (!error_.ok()) return error_;
  // Slots, then pairs: what the kernel reads. Then where each run's slots begin, for us.
  const bool one_run = one_slot(copy);
  const uint64_t slot_bytes = (one_run ? 1 : copy.slots) * sizeof(DeviceSlot);
  const uint64_t pairs_begin = (slot_bytes + 15) / 16 * 16;
  const uint64_t read = pairs_begin + copy.pairs.size() * sizeof(DevicePair);
  const bool single = copy.slots == copy.runs.size();  // every run is one slot, the one of its own number
  const uint64_t bytes = read + (single ? 0 : copy.runs.size() * sizeof(uint32_t));
  if (copy.slots > kMaxWords || bytes > ring_.bytes())
    return {Code::kInvalid, 0, "more slots in one copy than the device's tables hold: split the plan"};
  const uint64_t name = ring_.take(bytes, done_);
  if (name == 0) return kOkStatus;
  TableRing::Entry& entry = *ring_.find(name);
  entry.pairs = static_cast<uint32_t>(copy.pairs.size());
  entry.slots = static_cast<uint32_t>(copy.slots);
  entry.pairs_at = entry.begin + pairs_begin;
  entry.firsts_at = single ? TableRing::kSingle : entry.begin + read;
  entry.form = form;
  entry.one_run = one_run;
  if (!single) {
    auto* firsts = reinterpret_cast<uint32_t*>(host_tables_.data() + entry.firsts_at);
    uint32_t at = 0;
    for (const Run& run : copy.runs) {
      *firsts++ = at;
      at += run.count;
    }
  }
  auto* pairs = reinterpret_cast<DevicePair*>(host_tables_.data() + entry.pairs_at);
  for (size_t i = 0; i < copy.pairs.size(); ++i)
    pairs[i] = {form == DeviceForm::kScatter || form == DeviceForm::kSum ? 0 : src[i] + copy.pairs[i].src_offset,
                form == DeviceForm::kGather ? 0 : dst[i] + copy.pairs[i].dst_offset};
  tables = name;
  return kOkStatus;
}

// For the first kernel: what the copy engine moves needs none.
void DeviceCopier::write_slots(TableRing::Entry& entry, const PagedCopy& copy) noexcept {
  if (std::exchange(entry.written, true)) return;
  auto* slots = reinterpret_cast<DeviceSlot*>(host_tables_.data() + entry.begin);
  if (entry.one_run || entry.firsts_at == TableRing::kSingle)
    for (const Run& run : copy.runs) *slots++ = {run.src_slot, run.dst_slot};
  else
    for (const Run& run : copy.runs)
      for (uint32_t i = 0; i < run.count; ++i) *slots++ = {run.src_slot + i, run.dst_slot + i};
}

// For the first kernel whose tables do not travel with its launch. The entry stays until a piece after this is over.
Status DeviceCopier::upload(TableRing::Entry& entry) noexcept {
  if (std::exchange(entry.uploaded, true)) return kOkStatus;
  const auto result = shim::cuda().api.copy_to_device_async(
      device_tables_.get() + entry.begin, host_tables_.data() + entry.begin, bytes_of(entry), stream_.get());
  if (result != shim::kCuSuccess) return fail(result, "cuMemcpyHtoDAsync of a copy's tables");
  return !entry.buffered() ? kOkStatus : follow(fork_.get(), stream_.get(), beside_.get());
}

void DeviceCopier::release(DeviceTables tables) noexcept {
  TableRing::Entry* entry = ring_.find(tables);
  if (entry == nullptr) return;
  entry->released = true;
  ring_.reclaim(done_);
}

// Pieces through a buffer take the streams in turn; a device with one block to spare would have nothing to overlap.
bool DeviceCopier::beside(const TableRing::Entry& entry) const noexcept {
  return entry.buffered() && blocks_ > 1 && launched_ % 2 != 0;
}

void DeviceCopier::hand_out_tiles(PagedCopyArgs& args, unsigned blocks, bool beside) noexcept {
  const uint64_t tiles = (uint64_t{args.count} + kTileWords - 1) / kTileWords;
  if (tiles < kTilesToHandOut * blocks * (kBlockThreads / kWarpThreads)) return;
  args.tiles_taken = reinterpret_cast<unsigned*>(tiles_taken_.get()) + beside;
  args.taken_before = tiles_given_[beside];
  tiles_given_[beside] += static_cast<uint32_t>(tiles);
}

// Blocks next to one another leave whole neighbourhoods of multiprocessors to a model whose kernels need them that way.
shim::CuResult DeviceCopier::launch_kernel(shim::CuFunction kernel, unsigned blocks, shim::CuStream stream,
                                           void** parameters) noexcept {
  const shim::CudaDriver& api = shim::cuda().api;
  if (clusters_ && blocks % kClusterBlocks == 0) {
    shim::CuLaunchAttribute cluster{shim::kCuLaunchCluster, 0, {kClusterBlocks, 1, 1}};
    const shim::CuLaunch launch{blocks, 1, 1, kBlockThreads, 1, 1, 0, stream, &cluster, 1};
    if (const auto result = api.launch_kernel_ex(&launch, kernel, parameters, nullptr); result == shim::kCuSuccess)
      return result;
    clusters_ = false;  // a slice of a GPU may have no room for them; what else is wrong shows without
  }
  return api.launch_kernel(kernel, blocks, 1, 1, kBlockThreads, 1, 1, 0, stream, parameters, nullptr);
}

Status DeviceCopier::start_kernel(TableRing::Entry& entry, const PagedCopy& copy, const Cursor& cursor,
                                  const Part& part, uint64_t buffer) noexcept {
  const RegionPair& pair = copy.pairs[cursor.pair];
  const uint64_t slot = slots_before(entry, cursor);
  const uint64_t per_slot = pair.slot_bytes >> part.log2_word;
  const uint64_t per_pair = entry.slots * per_slot;
  const uint64_t count = part.bytes >> part.log2_word;
  uint64_t first = slot * per_slot + (cursor.byte >> part.log2_word);
  uint64_t first_slot = 0;
  PagedCopyInlineArgs all;
  PagedCopyArgs& args = all.args;
  args = {};
  if (first + count > kMaxWords || per_pair > kMaxWords) {  // within one pair: count from this slot on
    first_slot = slot;
    first = cursor.byte >> part.log2_word;
    args.per_pair = divisor_of(kMaxWords);
  } else {
    args.per_pair = divisor_of(static_cast<unsigned>(per_pair));
  }
  args.src_stride = pair.src_stride;
  args.dst_stride = pair.dst_stride;
  args.buffer = buffer;
  args.per_slot = divisor_of(static_cast<unsigned>(entry.one_run ? per_pair : per_slot));
  args.first = static_cast<unsigned>(first);
  args.count = static_cast<unsigned>(count);
  args.side = static_cast<unsigned>(entry.form);
  constexpr uint64_t kBlockWords = uint64_t{kBlockThreads} * kDepth;
  const unsigned most = entry.form == DeviceForm::kSum ? reading_blocks_
                        : entry.buffered()             ? std::clamp(blocks_ / 2, 1u, kBufferBlocks / 2)
                                                       : blocks_;
  const auto blocks = static_cast<unsigned>(std::min<uint64_t>(most, (count + kBlockWords - 1) / kBlockWords));
  hand_out_tiles(args, blocks, part.beside);
  const bool sum = reports_ && !entry.buffered();
  if (sum) {
    args.sum_pair = cursor.pair;
    args.sum_at = first_slot * pair.slot_bytes;
    args.report = report_of(launched_ + 1);
    if (part.whole && entry.form == DeviceForm::kPaged) tell_shares(args, part);
  }
  if (tells_ && part.last && entry.form == DeviceForm::kPaged) have_progress_told(args);
  write_slots(entry, copy);
  const uint64_t slots_at = first_slot * sizeof(DeviceSlot);
  const uint64_t pairs_at = entry.pairs_at - entry.begin + cursor.pair * sizeof(DevicePair);
  const bool inlined = bytes_of(entry) <= kInlineBytes && part.log2_word == 4;
  if (inlined) {
    std::memcpy(all.tables, host_tables_.data() + entry.begin, bytes_of(entry));
    all.slots_at = static_cast<unsigned>(slots_at);
    all.pairs_at = static_cast<unsigned>(pairs_at);
  } else {
    if (const Status s = upload(entry); !s.ok()) return s;
    args.slots = reinterpret_cast<const DeviceSlot*>(device_tables_.get() + entry.begin + slots_at);
    args.pairs = reinterpret_cast<const DevicePair*>(device_tables_.get() + entry.begin + pairs_at);
  }
  void* parameters[] = {&all};  // args are its beginning
  const auto result = launch_kernel(inlined ? kernels_.copy_inlined(sum) : kernels_.copy(part.log2_word, sum), blocks,
                                    (part.beside ? beside_ : stream_).get(), parameters);
  return result == shim::kCuSuccess ? kOkStatus : fail(result, "cuLaunchKernel of pdx_paged_copy");
}

// What is launched on `stream` from now on begins after what `before` has now.
Status DeviceCopier::follow(shim::CuEvent event, shim::CuStream before, shim::CuStream stream) noexcept {
  const shim::CudaDriver& api = shim::cuda().api;
  if (const auto r = api.event_record(event, before); r != shim::kCuSuccess) return fail(r, "cuEventRecord");
  const auto r = api.stream_wait_event(stream, event, 0);
  return r == shim::kCuSuccess ? kOkStatus : fail(r, "cuStreamWaitEvent");
}

// By the kernel that ends a piece of slots to slots.
void DeviceCopier::have_progress_told(PagedCopyArgs& args) const noexcept {
  args.piece = static_cast<unsigned>(launched_ + 1);
  args.progress = options_.progress;
  args.blocks_over = reinterpret_cast<unsigned*>(blocks_over_.get());
}

// Where no kernel ends a piece of slots to slots. The driver makes everything before the write visible to the whole
// system first, and what comes after it in the stream waits for that: 1 % of the rate of 235 MB pieces, one behind the
// other, so kernels write it themselves.
Status DeviceCopier::tell_progress(DeviceTicket ticket, shim::CuStream stream) noexcept {
  const auto result = shim::cuda().api.stream_write_value(
      stream, reinterpret_cast<shim::CuDevicePtr>(options_.progress), static_cast<uint32_t>(ticket), 0);
  if (result == shim::kCuNotSupported) tells_ = false;
  return result == shim::kCuSuccess || !tells_ ? kOkStatus : fail(result, "cuStreamWriteValue32");
}

// Does the word say that this piece is over? It is cheaper to look at than an event, and tells no errors.
bool DeviceCopier::told(DeviceTicket ticket) const noexcept {
  return tells_ && !on_beside_[ticket % events_.size()] &&
         progress_reached(*options_.progress, static_cast<uint32_t>(ticket));
}

// A piece of long runs that finds nothing else under way begins with a kernel, whose launch takes little time. The copy
// engine's batches begin beside it on the second stream, where the piece ends, after the kernel, which is over by then.
// `budget` is no more than there is.
Status DeviceCopier::launch_parts(TableRing::Entry& entry, const PagedCopy& copy, Cursor& cursor, uint64_t budget,
                                  uint64_t buffer, Launched& piece) noexcept {
  const bool batches = in_batches(entry, copy);
  uint64_t lead = batches && launched_ == done_ ? kernel_lead(copy, cursor, budget) : 0;
  uint64_t& moved = piece.bytes;
  for (size_t parts = 0; parts < kMaxParts && moved < budget; ++parts) {
    const uint64_t before = moved;
    if (moved >= lead)
      if (const Status s = start_engine(entry, copy, cursor, budget - moved, batches ? 1 : kEngineBytes,
                                        (lead != 0 ? beside_ : stream_).get(), moved);
          !s.ok())
        return s;
    if (moved != before) {
      piece.by_engine = true;
      continue;
    }
    if (engine_refused_ && std::exchange(lead, 0) != 0)  // the kernel moves it, after what had begun of it
      if (const Status s = follow(join_.get(), beside_.get(), stream_.get()); !s.ok()) return s;
    Part part = next_part(entry, copy, cursor, (moved < lead ? lead : budget) - moved, buffer + moved);
    part.beside = beside(entry);
    part.last = lead == 0 && moved + part.bytes == budget;  // else there may be copies on the second stream
    part.whole = part.last && moved == 0;
    if (const Status s = start_kernel(entry, copy, cursor, part, buffer + moved); !s.ok()) return s;
    piece.told = part.last && !entry.buffered();
    moved += advance(copy, cursor, part.bytes);
  }
  piece.led = lead != 0;
  return piece.led ? follow(fork_.get(), stream_.get(), beside_.get()) : kOkStatus;
}

Status DeviceCopier::launch(DeviceTables tables, const PagedCopy& copy, Cursor& cursor, uint64_t budget,
                            uint64_t buffer, DeviceTicket& ticket) noexcept {
  ticket = 0;
  if (!error_.ok()) return error_;
  TableRing::Entry* entry = ring_.find(tables);
  if (entry == nullptr || entry->released) return {Code::kInternal, 0, "tables that are not prepared"};
  bool over = false;
  if (launched_ - done_ >= events_.size())
    if (const Status s = done(done_ + 1, over); !s.ok() || !over) return s;
  if (launched_ != done_ && told(launched_))  // nobody asked since
    if (const Status s = done(launched_, over); !s.ok()) return s;
  const Current current(kernels_.context());
  if (current.result() != shim::kCuSuccess) return fail(current.result(), "cuCtxPushCurrent");
  if (reports_) {
    std::memset(report_of(launched_ + 1), 0, report_bytes());
    told_[(launched_ + 1) % told_.size()] = {};
  }
  budget = std::min(budget, bytes_left(*entry, copy, cursor));
  Timed timed;
  if (entry->form == DeviceForm::kPaged && copy.bytes >= EngineChoice::kLeastBytes) {
    timed.bytes = budget;
    timed.since = std::chrono::steady_clock::now();
  }
  engine_ = options_.copy_engine && !engine_refused_ && choice_.next(timed.bytes) == EngineChoice::kEngine;
  Launched piece;
  const bool on_beside = beside(*entry);
  if (const Status s = launch_parts(*entry, copy, cursor, budget, buffer, piece); !s.ok()) return s;
  if (piece.bytes == 0) return kOkStatus;
  const shim::CuStream stream = (on_beside || piece.led ? beside_ : stream_).get();
  if (tells_ && !piece.told && entry->form == DeviceForm::kPaged)
    if (const Status s = tell_progress(launched_ + 1, stream); !s.ok()) return s;
  const shim::CudaDriver& api = shim::cuda().api;
  const shim::CuEvent event = events_[(launched_ + 1) % events_.size()].get();
  if (const auto r = api.event_record(event, stream); r != 0) return fail(r, "cuEventRecord");
  if (piece.led)  // what is launched next begins after it
    if (const auto r = api.stream_wait_event(stream_.get(), event, 0); r != 0) return fail(r, "cuStreamWaitEvent");
  on_beside_[(launched_ + 1) % events_.size()] = on_beside;
  const bool alone = launched_ == done_;
  ticket = entry->last_piece = ++launched_;
  if (alone && piece.bytes == timed.bytes) {
    timed.ticket = ticket;
    timed.way = piece.by_engine ? EngineChoice::kEngine : EngineChoice::kKernel;
    timed_ = timed;
  }
  if (options_.wake)
    if (const auto r = api.launch_host_function(stream, &wake_caller, const_cast<DeviceCopyOptions*>(&options_));
        r != 0)
      return fail(r, "cuLaunchHostFunc");
  return kOkStatus;
}

// Each stream is in order, so two pieces say it of all: this one, and the latest one before it on the other stream.
Status DeviceCopier::done(DeviceTicket ticket, bool& over) noexcept {
  over = ticket <= done_;
  if (over) return kOkStatus;
  if (!error_.ok()) return error_;
  if (ticket > launched_) return {Code::kInternal, 0, "a piece that was never launched"};
  const Current current(kernels_.context());
  const auto index = [&](DeviceTicket of) { return of % events_.size(); };
  DeviceTicket other = ticket;
  while (other > done_ && on_beside_[index(other)] == on_beside_[index(ticket)]) --other;
  for (const DeviceTicket asked : {ticket, other}) {
    if (asked <= done_ || told(asked)) continue;
    const auto result = shim::cuda().api.event_query(events_[index(asked)].get());
    if (result == shim::kCuNotReady) return kOkStatus;
    if (result != shim::kCuSuccess) return fail(result, "cuEventQuery");
  }
  done_ = std::max(done_, ticket);
  over = true;
  if (timed_.ticket == ticket)
    choice_.tell(
        timed_.way, timed_.bytes,
        static_cast<uint64_t>((std::chrono::steady_clock::now() - timed_.since) / std::chrono::nanoseconds(1)));
  if (timed_.ticket <= ticket) timed_ = {};
  return kOkStatus;
}

// Of each piece under way.
size_t DeviceCopier::report_bytes() const noexcept {
  const size_t warps = size_t{std::max(blocks_, reading_blocks_)} * (kBlockThreads / kWarpThreads);
  return offsetof(PieceReport, sums) + warps * sizeof(uint64_t);
}

PieceReport* DeviceCopier::report_of(DeviceTicket ticket) const noexcept {
  return reinterpret_cast<PieceReport*>(reports_->data() + ticket % events_.size() * report_bytes());
}

// Of a piece that is one kernel: others are in place when they are over.
void DeviceCopier::tell_shares(PagedCopyArgs& args, const Part& part) noexcept {
  args.landing = reinterpret_cast<unsigned long long*>(landing_->get());
  told_[(launched_ + 1) % told_.size()] = {(args.count + kTileWords - 1) / kTileWords, part.log2_word, part.bytes};
}

uint64_t DeviceCopier::landed(DeviceTicket ticket) const noexcept {
  if (!reports_) return 0;
  const Told& told = told_[ticket % told_.size()];
  PieceReport& report = *report_of(ticket);
  uint64_t tiles = 0;
  for (unsigned share = std::max<unsigned>(std::bit_width(told.tiles), kLastShare);
       tiles < told.tiles && std::atomic_ref(report.landed[share]).load(std::memory_order_acquire) != 0; --share)
    tiles += tiles_of_share(told.tiles, share);
  return std::min(tiles * kTileWords << told.log2_word, told.bytes);
}

uint64_t DeviceCopier::sum(DeviceTicket ticket) const noexcept {
  if (!reports_) return 0;
  const auto* sums = report_of(ticket)->sums;
  return std::accumulate(sums, sums + (report_bytes() - offsetof(PieceReport, sums)) / sizeof(uint64_t), uint64_t{0});
}

std::string DeviceCopier::describe() const {
  std::string text =
      std::to_string(blocks_) + " thread blocks" +
      (options_.checksum ? ", which sum what they read"
       : engine_refused_ ? ", copy engine refused by the driver"
       : options_.copy_engine
           ? ", copy engine for runs of " +
                 std::to_string((shim::cuda().api.copy_batch_async != nullptr ? kBatchedRun : kEngineBytes) >> 10) +
                 " KiB and more"
           : ", no copy engine");
  const auto measured = [&](EngineChoice::Way way, const char* name) {
    if (choice_.gbps(way) > 0) text += ", " + std::to_string(std::lround(choice_.gbps(way))) + " GB/s by " + name;
  };
  measured(EngineChoice::kKernel, "the kernel");
  measured(EngineChoice::kEngine, "the copy engine");
  return text;
}

}  // namespace pdxfer::pack
