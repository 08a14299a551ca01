// See device_copier.hpp.
#include "pack/device_copier.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <thread>
#include <utility>

#include "core/log.hpp"
#include "core/paged_copy.hpp"

namespace pdxfer::pack {
namespace {

constexpr uint64_t kDefaultTableBytes = 16 << 20;
constexpr size_t kTableEntries = 256;
constexpr size_t kMaxParts = 128;               // kernels and engine copies of one piece
constexpr uint64_t kMaxWords = (1u << 31) - 1;  // what a kernel counts; see Divisor
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

// The largest word, as a power of two, of which all of these are multiples.
unsigned alignment_of(uint64_t together) noexcept {
  return together == 0 ? 4 : std::min<unsigned>(4, static_cast<unsigned>(std::countr_zero(together)));
}

bool alike(const RegionPair& a, const RegionPair& b) noexcept {
  return a.slot_bytes == b.slot_bytes && a.src_stride == b.src_stride && a.dst_stride == b.dst_stride;
}

DeviceForm form_of(const TableRing::Entry& entry) noexcept { return static_cast<DeviceForm>(entry.form); }

// Slots and pairs: what a kernel reads of it.
uint64_t bytes_of(const TableRing::Entry& entry) noexcept {
  return entry.pairs_at - entry.begin + entry.pairs * sizeof(DevicePair);
}

unsigned alignment_of(const DevicePair& bases, const RegionPair& pair, DeviceForm form) noexcept {
  uint64_t together = pair.slot_bytes;
  if (form != DeviceForm::kScatter) together |= bases.src | pair.src_stride;
  if (form != DeviceForm::kGather) together |= bases.dst | pair.dst_stride;
  return alignment_of(together);
}

void wake_caller(void* options) { static_cast<const DeviceCopyOptions*>(options)->wake(); }

}  // namespace

DeviceCopier::DeviceCopier(int ordinal, const DeviceCopyOptions& options)
    : options_(options),
      kernels_(ordinal),
      stream_(kernels_.context()),
      beside_(kernels_.context()),
      ring_(options.table_bytes != 0 ? options.table_bytes : kDefaultTableBytes, kTableEntries),
      host_tables_((sys::CudaScope(kernels_.context()), ring_.bytes())),
      device_tables_((sys::CudaScope(kernels_.context()), ring_.bytes())),
      tiles_taken_((sys::CudaScope(kernels_.context()), std::as_bytes(std::span(tiles_given_)))),
      fork_((sys::CudaScope(kernels_.context()), sys::CudaEvent())),
      join_((sys::CudaScope(kernels_.context()), sys::CudaEvent())) {
  const auto processors = static_cast<unsigned>(kernels_.context().attribute(shim::kCuAttributeMultiprocessors));
  blocks_ = std::clamp(options.blocks != 0 ? options.blocks : kDefaultBlocks, 1u, std::max(1u, processors));
  clusters_ =
      kernels_.context().attribute(shim::kCuAttributeMajor) >= 9 && shim::cuda().api.launch_kernel_ex != nullptr;
  max_pitch_ = static_cast<uint64_t>(kernels_.context().attribute(shim::kCuAttributeMaxPitch));
  const sys::CudaScope scope(kernels_.context());
  events_.reserve(std::max<size_t>(options.pieces, 1));
  for (size_t i = 0; i < std::max<size_t>(options.pieces, 1); ++i) events_.emplace_back();
  on_beside_.resize(events_.size());
  row_order_.reserve(kMostRows);
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
  if (error_.ok()) error_ = {Code::kInternal, result, what};
  return error_;
}

uint64_t DeviceCopier::slots_before(const TableRing::Entry& entry, const Cursor& cursor) const noexcept {
  if (entry.firsts_at == TableRing::kSingle) return cursor.run;
  return reinterpret_cast<const uint32_t*>(host_tables_.data() + entry.firsts_at)[cursor.run] + uint64_t{cursor.slot};
}

const DevicePair* DeviceCopier::pairs_of(const TableRing::Entry& entry) const noexcept {
  return reinterpret_cast<const DevicePair*>(host_tables_.data() + entry.pairs_at);
}

Status DeviceCopier::prepare(const PagedCopy& copy, DeviceForm form, std::span<const uint64_t> src,
                             std::span<const uint64_t> dst, DeviceTables& tables) noexcept {
  tables = 0;
  if (!error_.ok()) return error_;
  // Slots, then pairs: what the kernel reads. Then where each run's slots begin, for us.
  const uint64_t slot_bytes = copy.slots * sizeof(DeviceSlot);
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
  entry.form = static_cast<uint8_t>(form);
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
    pairs[i] = {form == DeviceForm::kScatter ? 0 : src[i] + copy.pairs[i].src_offset,
                form == DeviceForm::kGather ? 0 : dst[i] + copy.pairs[i].dst_offset};
  tables = name;
  return kOkStatus;
}

// For the first kernel: what the copy engine moves needs none.
void DeviceCopier::write_slots(TableRing::Entry& entry, const PagedCopy& copy) noexcept {
  if (std::exchange(entry.written, true)) return;
  auto* slots = reinterpret_cast<DeviceSlot*>(host_tables_.data() + entry.begin);
  if (entry.firsts_at == TableRing::kSingle)
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
  return form_of(entry) == DeviceForm::kPaged ? kOkStatus : follow(fork_.get(), stream_.get(), beside_.get());
}

void DeviceCopier::release(DeviceTables tables) noexcept {
  TableRing::Entry* entry = ring_.find(tables);
  if (entry == nullptr) return;
  entry->released = true;
  ring_.reclaim(done_);
}

// Equal runs an equal distance apart, as in the buffers of a pool, are the rows of one engine copy. Takes the pairs
// from the cursor on that fit the budget, in the order of their addresses, when few such copies move them: an allocator
// may have laid them out in any order. Moves nothing when the kernel is ahead.
Status DeviceCopier::launch_rows(const TableRing::Entry& entry, const PagedCopy& copy, Cursor& cursor, uint64_t budget,
                                 uint64_t& moved) noexcept {
  const RegionPair& pair = copy.pairs[cursor.pair];
  const uint64_t row = copy.slots * pair.slot_bytes;
  if (form_of(entry) != DeviceForm::kPaged || !options_.copy_engine || !dense(pair) || copy.runs.size() != 1 ||
      row < kEngineRow || cursor != Cursor{cursor.pair, 0, 0, 0})
    return kOkStatus;
  const uint64_t most = std::min<uint64_t>({entry.pairs - cursor.pair, budget / row, row_order_.capacity()});
  row_order_.clear();
  for (uint32_t i = cursor.pair; row_order_.size() < most && alike(copy.pairs[i], pair); ++i) row_order_.push_back(i);
  const DevicePair* bases = pairs_of(entry);
  std::ranges::sort(row_order_, {}, [&](uint32_t i) { return bases[i].src; });
  size_t copies = 0;
  for (size_t i = 0; i < row_order_.size(); i += rows_of(bases, i, row).rows) ++copies;
  if (copies == row_order_.size() || copies * kEngineBytes > row_order_.size() * row) return kOkStatus;
  const Run& run = copy.runs[0];
  for (size_t i = 0; i < row_order_.size();) {
    shim::CuCopy2d rows = rows_of(bases, i, row);
    i += rows.rows;
    rows.from.device += run.src_slot * pair.src_stride;
    rows.to.device += run.dst_slot * pair.dst_stride;
    if (const auto r = shim::cuda().api.copy_2d_async(&rows, stream_.get()); r != shim::kCuSuccess)
      return fail(r, "cuMemcpy2DAsync");
  }
  moved += row_order_.size() * row;
  cursor.pair += static_cast<uint32_t>(row_order_.size());
  return kOkStatus;
}

// The pairs from the i-th of row_order_ on that are rows of one copy, from slot 0 on.
shim::CuCopy2d DeviceCopier::rows_of(const DevicePair* bases, size_t i, uint64_t row) const noexcept {
  shim::CuCopy2d rows{};
  rows.from.type = rows.to.type = shim::kCuMemoryUnified;
  rows.from.device = bases[row_order_[i]].src;
  rows.to.device = bases[row_order_[i]].dst;
  rows.row_bytes = rows.from.pitch = rows.to.pitch = row;
  rows.rows = 1;
  const auto step = [&](size_t at, auto side) { return bases[row_order_[at]].*side - bases[row_order_[at - 1]].*side; };
  for (size_t at = i + 1; at < row_order_.size(); ++at, ++rows.rows) {
    const uint64_t src = step(at, &DevicePair::src), dst = step(at, &DevicePair::dst);
    if (rows.rows == 1 && std::min(src, dst) >= row && std::max(src, dst) <= max_pitch_ &&
        (src | dst) % kPitchUnit == 0)
      rows.from.pitch = src, rows.to.pitch = dst;
    else if (rows.rows == 1 || src != rows.from.pitch || dst != rows.to.pitch)
      break;
  }
  return rows;
}

// Of a piece whose runs are all long enough to be shared: the bytes at its beginning that are the kernel's. 0: of
// others.
uint64_t DeviceCopier::kernel_share(const TableRing::Entry& entry, const PagedCopy& copy, const Cursor& cursor,
                                    uint64_t budget) const noexcept {
  const RegionPair& pair = copy.pairs[cursor.pair];
  const uint64_t bytes = std::min(budget, copy.bytes - position(copy, cursor));
  if (form_of(entry) != DeviceForm::kPaged || !options_.copy_engine || !dense(pair) || bytes < 4 * kSharedBytes)
    return 0;
  bool longest = true;  // the copy engine alone is as good
  for (const Run& run : copy.runs) {
    if (run.count * pair.slot_bytes < kSharedBytes) return 0;
    longest = longest && run.count * pair.slot_bytes >= kEngineBytes;
  }
  if (longest) return 0;
  uint64_t share = 0;  // whole runs: what is left of one might be too short for the engine
  for (Cursor at = cursor; share < bytes / 64 * kKernelShare;) {
    const uint64_t slots = copy.runs[at.run].count - uint64_t{at.slot};
    share += advance(copy, at, slots * copy.pairs[at.pair].slot_bytes - at.byte);
  }
  return share;
}

// The longest part at the cursor that one kernel or one engine copy can move.
DeviceCopier::Part DeviceCopier::next_part(const TableRing::Entry& entry, const PagedCopy& copy, const Cursor& cursor,
                                           uint64_t budget, uint64_t buffer, uint64_t engine_from) const noexcept {
  const RegionPair& pair = copy.pairs[cursor.pair];
  const DevicePair* bases = pairs_of(entry);
  const uint64_t done_slots = slots_before(entry, cursor);
  if (form_of(entry) == DeviceForm::kPaged && options_.copy_engine && dense(pair)) {
    const uint64_t run = (copy.runs[cursor.run].count - uint64_t{cursor.slot}) * pair.slot_bytes - cursor.byte;
    if (run >= engine_from && budget >= engine_from) return {std::min(run, budget), 0, true};
  }
  unsigned log2 = alignment_of(bases[cursor.pair], pair, form_of(entry));
  uint64_t bytes = (copy.slots - done_slots) * pair.slot_bytes - cursor.byte;
  // Pairs of one shape go together, while the words of all of them can be counted.
  const uint64_t per_pair = copy.slots * pair.slot_bytes;
  for (uint32_t next = cursor.pair + 1; next < entry.pairs && bytes < budget; ++next) {
    if (!alike(copy.pairs[next], pair) || alignment_of(bases[next], pair, form_of(entry)) != log2) break;
    bytes += per_pair;
  }
  if (form_of(entry) != DeviceForm::kPaged) log2 = std::min(log2, alignment_of(buffer));
  bytes = std::min(bytes, budget);
  const uint64_t word = uint64_t{1} << log2;
  if (cursor.byte % word != 0) return {std::min(bytes, word - cursor.byte % word), 0, false};
  if (bytes < word) return {bytes, 0, false};
  // The kernel counts words from slot 0 of the first pair on.
  const uint64_t before = (done_slots * pair.slot_bytes + cursor.byte) >> log2;
  uint64_t words = bytes >> log2;
  if (before + words > kMaxWords || (per_pair >> log2) > kMaxWords) {
    const uint64_t in_pair = ((copy.slots - done_slots) * pair.slot_bytes - cursor.byte) >> log2;
    words = std::min({words, in_pair, kMaxWords / 2});
  }
  return {words << log2, log2, false};
}

// Pieces through a buffer take the streams in turn; a device with one block to spare would have nothing to overlap.
bool DeviceCopier::beside(const TableRing::Entry& entry) const noexcept {
  return form_of(entry) != DeviceForm::kPaged && blocks_ > 1 && launched_ % 2 != 0;
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
  args.per_slot = divisor_of(static_cast<unsigned>(per_slot));
  args.first = static_cast<unsigned>(first);
  args.count = static_cast<unsigned>(count);
  args.side = entry.form;
  constexpr uint64_t kBlockWords = uint64_t{kBlockThreads} * kDepth;
  const unsigned most = form_of(entry) == DeviceForm::kPaged ? blocks_ : std::clamp(blocks_ / 2, 1u, kBufferBlocks / 2);
  const auto blocks = static_cast<unsigned>(std::min<uint64_t>(most, (count + kBlockWords - 1) / kBlockWords));
  hand_out_tiles(args, blocks, part.beside);
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
  const auto result = launch_kernel(inlined ? kernels_.copy_inlined() : kernels_.copy(part.log2_word), blocks,
                                    (part.beside ? beside_ : stream_).get(), parameters);
  return result == shim::kCuSuccess ? kOkStatus : fail(result, "cuLaunchKernel of pdx_paged_copy");
}

Status DeviceCopier::start_engine(const TableRing::Entry& entry, const PagedCopy& copy, const Cursor& cursor,
                                  const Part& part) noexcept {
  const RegionPair& pair = copy.pairs[cursor.pair];
  const DevicePair* bases = pairs_of(entry) + cursor.pair;
  const Run& run = copy.runs[cursor.run];
  const uint64_t src = bases->src + (uint64_t{run.src_slot} + cursor.slot) * pair.src_stride + cursor.byte;
  const uint64_t dst = bases->dst + (uint64_t{run.dst_slot} + cursor.slot) * pair.dst_stride + cursor.byte;
  const shim::CuStream stream = (part.beside ? beside_ : stream_).get();
  const auto result = shim::cuda().api.copy_async(dst, src, part.bytes, stream);
  return result == shim::kCuSuccess ? kOkStatus : fail(result, "cuMemcpyAsync");
}

// What is launched on `stream` from now on begins after what `before` has now.
Status DeviceCopier::follow(shim::CuEvent event, shim::CuStream before, shim::CuStream stream) noexcept {
  const shim::CudaDriver& api = shim::cuda().api;
  if (const auto r = api.event_record(event, before); r != shim::kCuSuccess) return fail(r, "cuEventRecord");
  const auto r = api.stream_wait_event(stream, event, 0);
  return r == shim::kCuSuccess ? kOkStatus : fail(r, "cuStreamWaitEvent");
}

// A shared piece begins with what the kernel moves, whose launch takes little time; the engine's copies follow on the
// second stream, which starts after what came before the piece and which the piece's event then waits for.
Status DeviceCopier::launch_parts(TableRing::Entry& entry, const PagedCopy& copy, Cursor& cursor, uint64_t budget,
                                  uint64_t buffer, uint64_t& moved) noexcept {
  uint64_t share = 0;
  for (size_t parts = 0; parts < kMaxParts && moved < budget && !at_end(copy, cursor); ++parts) {
    const uint64_t before = moved;
    if (share == 0)
      if (const Status s = launch_rows(entry, copy, cursor, budget - moved, moved); !s.ok()) return s;
    if (moved != before) continue;
    if (moved == 0 && (share = kernel_share(entry, copy, cursor, budget)) != 0)
      if (const Status s = follow(fork_.get(), stream_.get(), beside_.get()); !s.ok()) return s;
    const bool kernel = moved < share;
    const uint64_t engine_from = kernel ? UINT64_MAX : share != 0 ? kSharedBytes : kEngineBytes;
    Part part = next_part(entry, copy, cursor, (kernel ? share : budget) - moved, buffer + moved, engine_from);
    part.beside = share != 0 ? part.engine : beside(entry);
    const Status s =
        part.engine ? start_engine(entry, copy, cursor, part) : start_kernel(entry, copy, cursor, part, buffer + moved);
    if (!s.ok()) return s;
    moved += advance(copy, cursor, part.bytes);
  }
  return share == 0 ? kOkStatus : follow(join_.get(), beside_.get(), stream_.get());
}

Status DeviceCopier::launch(DeviceTables tables, const PagedCopy& copy, Cursor& cursor, uint64_t budget,
                            uint64_t buffer, DeviceTicket& ticket) noexcept {
  ticket = 0;
  if (!error_.ok()) return error_;
  TableRing::Entry* entry = ring_.find(tables);
  if (entry == nullptr || entry->released) return {Code::kInternal, 0, "tables that are not prepared"};
  if (launched_ - done_ >= events_.size()) {
    bool over = false;
    if (const Status s = done(done_ + 1, over); !s.ok() || !over) return s;
  }
  const Current current(kernels_.context());
  if (current.result() != shim::kCuSuccess) return fail(current.result(), "cuCtxPushCurrent");
  uint64_t moved = 0;
  const shim::CuStream stream = (beside(*entry) ? beside_ : stream_).get();
  if (const Status s = launch_parts(*entry, copy, cursor, budget, buffer, moved); !s.ok()) return s;
  if (moved == 0) return kOkStatus;
  const shim::CudaDriver& api = shim::cuda().api;
  if (const auto r = api.event_record(events_[(launched_ + 1) % events_.size()].get(), stream); r != 0)
    return fail(r, "cuEventRecord");
  on_beside_[(launched_ + 1) % events_.size()] = stream == beside_.get();
  ticket = entry->last_piece = ++launched_;
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
    if (asked <= done_) continue;
    const auto result = shim::cuda().api.event_query(events_[index(asked)].get());
    if (result == shim::kCuNotReady) return kOkStatus;
    if (result != shim::kCuSuccess) return fail(result, "cuEventQuery");
  }
  done_ = std::max(done_, ticket);
  over = true;
  return kOkStatus;
}

std::string DeviceCopier::describe() const {
  return std::to_string(blocks_) + " thread blocks" +
         (options_.copy_engine ? ", copy engine for runs and rows of " + std::to_string(kEngineBytes >> 10) +
                                     " KiB and more, shared from " + std::to_string(kSharedBytes >> 10)
                               : ", no copy engine");
}

}  // namespace pdxfer::pack
