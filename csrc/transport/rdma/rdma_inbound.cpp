// Checking and scattering; see rdma_inbound.hpp.
#include "transport/rdma/rdma_inbound.hpp"

#include <cstring>

#include "transport/check_copy.hpp"

namespace pdxfer::transport::rdma {
namespace {
constexpr size_t kMaxBatches = 16384;
constexpr uint64_t kMaxPlanBytes = 256 << 20;  // of all plans under way from one peer

uint64_t memory_of(uint64_t pairs, uint64_t runs) { return pairs * sizeof(RegionPair) + runs * sizeof(Run); }
}  // namespace

bool number_stream(PagedCopy& copy, Side side) noexcept {
  uint64_t slots = 0, bytes = 0;
  for (Run& run : copy.runs) {
    (side == Side::kSrc ? run.src_slot : run.dst_slot) = static_cast<uint32_t>(slots);
    slots += run.count;
  }
  if (slots > UINT32_MAX) return false;
  for (RegionPair& pair : copy.pairs) {
    (side == Side::kSrc ? pair.src_offset : pair.dst_offset) = bytes;
    (side == Side::kSrc ? pair.src_stride : pair.dst_stride) = pair.slot_bytes;
    uint64_t all = 0;
    if (__builtin_mul_overflow(slots, pair.slot_bytes, &all) || __builtin_add_overflow(bytes, all, &bytes))
      return false;
  }
  return true;
}

const char* Inbound::take(const MessageHeader& header, ByteView body, Ended& out) {
  if (header.type != MessageType::kPlan && header.type != MessageType::kChunk && header.type != MessageType::kTail &&
      header.type != MessageType::kEnd)
    return "malformed message: unknown type";
  if (batches_.size() >= kMaxBatches && !batches_.contains(header.batch)) return "too many unfinished batches";
  Batch& batch = batches_[header.batch];
  if (header.type == MessageType::kPlan) return on_plan(batch, header, body);
  if (header.type == MessageType::kChunk) return on_chunk(batch, header);
  if (batch.tail.size() + body.size() > hub_.context.limits.max_tail_bytes) return "malformed message: tail too long";
  batch.tail.insert(batch.tail.end(), body.begin(), body.end());
  if (header.type == MessageType::kEnd) {
    on_end(batch, header, out);
    for (const auto& [copy, plan] : batch.plans) plan_bytes_ -= memory_of(plan.pairs, plan.runs);
    batches_.erase(header.batch);
  }
  return nullptr;
}

const char* Inbound::on_plan(Batch& batch, const MessageHeader& header, ByteView body) {
  const uint32_t copy_index = header.words[0], pairs = header.words[1], runs = header.words[2];
  if (copy_index >= kMaxCopies || pairs == 0 || pairs > kMaxPairs || runs == 0 || runs > kMaxRuns)
    return "malformed message: plan out of bounds";
  auto [found, fresh] = batch.plans.try_emplace(copy_index);
  Plan& plan = found->second;
  if (fresh) {
    plan.pairs = pairs;
    plan.runs = runs;
    plan_bytes_ += memory_of(pairs, runs);
    if (plan_bytes_ > kMaxPlanBytes) return "too many plans under way";
  }
  if (plan.ready || plan.pairs != pairs || plan.runs != runs) return "malformed message: a second plan for one copy";
  size_t at = 0;
  for (; plan.copy.pairs.size() < pairs && at + sizeof(WirePair) <= body.size(); at += sizeof(WirePair)) {
    WirePair wire;
    std::memcpy(&wire, body.data() + at, sizeof wire);
    plan.copy.pairs.push_back({1, wire.region, 0, wire.offset, wire.slot_bytes, wire.stride, wire.slot_bytes});
  }
  for (; plan.copy.runs.size() < runs && at + sizeof(WireRun) <= body.size(); at += sizeof(WireRun)) {
    WireRun wire;
    std::memcpy(&wire, body.data() + at, sizeof wire);
    plan.copy.runs.push_back({0, wire.slot, wire.count});
  }
  if (at != body.size()) return "malformed message: plan longer than announced";
  if (plan.copy.runs.size() == runs) finish(batch, plan);
  return nullptr;
}

// The whole plan is here: nothing of it is used before all of it was found good.
void Inbound::finish(Batch& batch, Plan& plan) {
  plan.ready = true;
  const auto bytes = [&](RegionId id) {
    const LocalRegion* region = hub_.find(id);
    return region == nullptr ? uint64_t{0} : region->buffer.bytes;
  };
  bool good = number_stream(plan.copy, Side::kSrc);
  plan.copy.seal();
  good = good && check_sealed(plan.copy).ok();
  if (!good) return refuse(batch, {Code::kInvalid, 0, "plan refused by the receiver: it is inconsistent"});
  if (!check_range(plan.copy, Side::kDst, bytes).ok())
    refuse(batch, {Code::kInvalid, 0, "plan refused by the receiver: destination outside its region"});
  for (const RegionPair& pair : plan.copy.pairs)
    if (const LocalRegion* region = hub_.find(pair.dst); region != nullptr && region->buffer.device != kHost)
      refuse(batch, {Code::kInvalid, 0, "packed plan refused by the receiver: destination is device memory"});
}

const char* Inbound::on_chunk(Batch& batch, const MessageHeader& header) {
  const uint32_t slot = chunks_done_++ % slots_;  // refused or not, the slot is free again afterwards
  const uint64_t bytes = header.words[1];
  if (bytes == 0 || bytes > slot_bytes_) return "malformed message: chunk larger than its slot";
  const auto found = batch.plans.find(header.words[0]);
  if (found == batch.plans.end() || !found->second.ready) return "malformed message: chunk without a plan";
  if (!batch.refused.ok()) return nullptr;
  const PagedCopy& copy = found->second.copy;
  Cursor cursor{header.words[2], header.words[3], static_cast<uint32_t>(header.longs[0]), header.longs[1]};
  if (!inside(copy, cursor)) {
    refuse(batch, {Code::kInvalid, 0, "chunk refused by the receiver: cursor outside its copy"});
    return nullptr;
  }
  const RegionPair& first = copy.pairs[cursor.pair];
  const uint64_t at =
      first.src_offset + (uint64_t{copy.runs[cursor.run].src_slot} + cursor.slot) * first.slot_bytes + cursor.byte;
  // The stream's byte 0 would lie `at` before the slot: an address to count from, never touched.
  const auto base = reinterpret_cast<uintptr_t>(staging_) + uintptr_t{slot} * slot_bytes_ - at;
  src_.assign(copy.pairs.size(), reinterpret_cast<std::byte*>(base));
  dst_.clear();
  for (const RegionPair& pair : copy.pairs) {
    const LocalRegion* region = hub_.find(pair.dst);
    if (region == nullptr) {
      refuse(batch, {Code::kInvalid, 0, "chunk refused by the receiver: a destination region was deregistered"});
      return nullptr;
    }
    dst_.push_back(region->buffer.data);
  }
  if (hub_.context.copy(copy, cursor, bytes, src_, dst_) != bytes)
    refuse(batch, {Code::kInvalid, 0, "chunk refused by the receiver: longer than the rest of its copy"});
  return nullptr;
}

void Inbound::on_end(Batch& batch, const MessageHeader& header, Ended& out) {
  out.ended = true;
  out.status = batch.refused;
  const uint32_t code = header.words[1];
  if (code != 0) out.status = {static_cast<Code>(code <= static_cast<uint32_t>(Code::kInternal) ? code : 1), 0, ""};
  if (!out.status.ok() || header.words[0] == 0) return;
  Completion& arrival = out.arrival.emplace();
  arrival.kind = Completion::Kind::kArrived;
  arrival.peer = peer_;
  arrival.batch = header.batch;
  arrival.tag = header.longs[0];
  arrival.tail = std::move(batch.tail);
}

}  // namespace pdxfer::transport::rdma
