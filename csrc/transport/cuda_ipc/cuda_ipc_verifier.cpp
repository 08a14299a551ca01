// See cuda_ipc_verifier.hpp.
#include "transport/cuda_ipc/cuda_ipc_verifier.hpp"

#include <algorithm>
#include <cstring>

#include "transport/check_copy.hpp"
#include "transport/cuda_ipc/cuda_ipc_link.hpp"
#include "transport/stream/frame.hpp"

namespace pdxfer::transport::cuda_ipc {
namespace {

using stream::WirePair;
using stream::WireRun;

constexpr size_t kPiecesToRead = 8;  // in flight at most, of all batches
constexpr Status malformed(const char* what) { return {Code::kPeerLost, 0, what}; }

uint64_t wire_bytes(uint64_t pairs, uint64_t runs) { return pairs * sizeof(WirePair) + runs * sizeof(WireRun); }

}  // namespace

Bytes encode_destination(const PagedCopy& copy) {
  Bytes wire(wire_bytes(copy.pairs.size(), copy.runs.size()));
  std::byte* to = wire.data();
  const auto put = [&](const auto& value) {
    std::memcpy(to, &value, sizeof value);
    to += sizeof value;
  };
  for (const RegionPair& p : copy.pairs) put(stream::wire_of(p));
  for (const Run& r : copy.runs) put(stream::wire_of(r));
  return wire;
}

Status Verifier::plan(const Header& header, ByteView body) {
  const auto pairs = static_cast<uint32_t>(header.tag), runs = static_cast<uint32_t>(header.tag >> 32);
  if (pairs == 0 || pairs > stream::kMaxPairs || runs == 0 || runs > stream::kMaxRuns ||
      header.region >= stream::kMaxCopies)
    return malformed("malformed message: plan too large or empty");
  const uint64_t bytes = wire_bytes(pairs, runs);
  Inbound& batch = batches_[header.batch];
  Part& part = batch.parts[header.region];
  if (batch.end || batch.sum || (part.pairs != 0 && (part.pairs != pairs || part.runs != runs || part.wire.empty())))
    return malformed("malformed message: a plan out of turn");
  if (part.pairs == 0) {
    plan_bytes_ += bytes;
    if (plan_bytes_ > kMostPlans || batches_.size() > kMostUnverified)
      return malformed("more unverified batches than a link may have");
    part.pairs = pairs;
    part.runs = runs;
  }
  if (body.empty() || part.wire.size() + body.size() > bytes) return malformed("malformed message: length of plan");
  part.wire.insert(part.wire.end(), body.begin(), body.end());
  if (part.wire.size() == bytes) begin_part(batch, part);
  return kOkStatus;
}

// The whole plan is here: nothing of it is used before all of it was found good.
void Verifier::begin_part(Inbound& batch, Part& part) {
  const std::byte* from = part.wire.data();
  const auto get = [&](auto& value) {
    std::memcpy(&value, from, sizeof value);
    from += sizeof value;
  };
  PagedCopy& copy = part.copy;
  for (uint32_t i = 0; i < part.pairs; ++i) {
    WirePair wire;
    get(wire);
    copy.pairs.push_back(stream::from_wire(wire));
  }
  for (uint32_t i = 0; i < part.runs; ++i) {
    WireRun wire;
    get(wire);
    copy.runs.push_back(stream::from_wire(wire));
  }
  part.wire = {};
  copy.seal();
  if (const Status s = check_sealed(copy); !s.ok() && batch.status.ok()) batch.status = s;
}

Status Verifier::landed(const Header& header) {
  const auto found = batches_.find(header.batch);
  if (found == batches_.end()) return malformed("malformed message: bytes of an unknown batch");
  Inbound& batch = found->second;
  const auto part = batch.parts.find(header.region);
  if (part == batch.parts.end() || part->second.copy.pairs.empty() || batch.sum)
    return malformed("malformed message: bytes without a plan");
  if (__builtin_add_overflow(part->second.landed, header.tag, &part->second.landed))
    return malformed("malformed message: more bytes than their plan has");
  read_on(header.batch, batch);
  return kOkStatus;
}

Status Verifier::sum(const Header& header) {
  const auto found = batches_.find(header.batch);
  if (found == batches_.end() || found->second.sum) return malformed("malformed message: sum of an unknown batch");
  Inbound& batch = found->second;
  batch.sum = header.tag;
  for (auto& [index, part] : batch.parts) {
    if (part.copy.pairs.empty()) return malformed("malformed message: sum of half a plan");
    part.landed = part.copy.bytes - position(part.copy, part.cursor);
  }
  read_on(header.batch, batch);
  return kOkStatus;
}

void Verifier::give_up(BatchId id) {
  const auto found = batches_.find(id);
  if (found == batches_.end() || found->second.end) return;
  release(found->second);
  batches_.erase(found);
}

void Verifier::end(const Header& header, ByteView tail) {
  Inbound& batch = batches_.at(header.batch);
  if (batch.end) return;
  batch.end = header;
  batch.tail.assign(tail.begin(), tail.end());
  ended_.push_back(header.batch);
}

// Pieces under way may still use the tables: the reader sees to that.
void Verifier::release(Inbound& batch) noexcept {
  for (auto& [index, part] : batch.parts) {
    if (part.tables != 0) reader_->release(part.tables);
    plan_bytes_ -= wire_bytes(part.pairs, part.runs);
  }
}

// Where the destination lies now. Not ok: it is no device memory of ours, or no longer.
Status Verifier::prepare(Part& part) {
  const uint64_t generation = core_.generation.load(std::memory_order_acquire);
  if (part.tables != 0 && part.generation == generation) return kOkStatus;
  std::vector<uint64_t> addresses;
  bool host = false;
  {
    const std::lock_guard lock(core_.regions_mutex);
    const auto bytes_of = [&](RegionId id) -> uint64_t {
      const auto found = core_.regions.find(id);
      if (found == core_.regions.end()) return 0;
      host = host || found->second.buffer.device == kHost;
      addresses.push_back(reinterpret_cast<uint64_t>(found->second.buffer.data));
      return found->second.buffer.bytes;
    };
    if (const Status s = check_range(part.copy, Side::kDst, bytes_of); !s.ok()) return s;
  }
  if (host) return {Code::kInvalid, 0, "checksum of host memory"};
  part.generation = generation;
  return part.tables != 0 ? kOkStatus : reader_->prepare(part.copy, DeviceForm::kSum, {}, addresses, part.tables);
}

// Launches what has landed, as far as there is room.
void Verifier::read_on(BatchId id, Inbound& batch) {
  for (auto& [index, part] : batch.parts) {
    while (part.landed > 0 && batch.status.ok()) {
      if (!broken_.ok()) batch.status = broken_;
      if (at_end(part.copy, part.cursor)) batch.status = {Code::kInvalid, 0, "more bytes landed than the plan has"};
      if (batch.status.ok()) batch.status = prepare(part);
      if (!batch.status.ok() || part.tables == 0 || pieces_.size() >= kPiecesToRead) return;
      const Cursor before = part.cursor;
      DeviceTicket ticket = 0;
      if (const Status s = reader_->launch(part.tables, part.copy, part.cursor, part.landed, 0, ticket); !s.ok()) {
        broken_ = batch.status = s;
        return;
      }
      if (ticket == 0) return;
      part.landed -= bytes_between(part.copy, before, part.cursor);
      pieces_.push_back({ticket, id, index});
      launched_ = ticket;
      ++batch.under_way;
    }
  }
}

bool Verifier::over(DeviceTicket ticket) {
  while (!pieces_.empty() && pieces_.front().ticket <= ticket) {
    const Piece& piece = pieces_.front();
    bool is_over = false;
    const Status s = broken_.ok() ? reader_->done(piece.ticket, is_over) : broken_;
    if (!s.ok()) broken_ = s;
    if (s.ok() && !is_over) return false;
    if (const auto found = batches_.find(piece.batch); found != batches_.end()) {
      --found->second.under_way;
      if (!s.ok() && found->second.status.ok()) found->second.status = s;
      if (s.ok()) found->second.parts.at(piece.copy).sum += reader_->sum(piece.ticket);
    }
    pieces_.pop_front();
  }
  return true;
}

Status Verifier::verdict(const Inbound& batch) {
  if (!batch.status.ok()) return batch.status;
  if (!batch.sum) return {Code::kInvalid, 0, "a batch ended without its checksum"};
  uint64_t sum = 0;
  for (const auto& [index, part] : batch.parts) sum += weighted(index, part.sum);
  return *batch.sum == sum ? kOkStatus : kCorrupted;
}

std::vector<Verifier::Verdict> Verifier::settle() {
  (void)over(launched_);
  for (auto& [id, batch] : batches_) read_on(id, batch);
  std::vector<Verdict> verdicts;
  while (!ended_.empty()) {
    Inbound& batch = batches_.at(ended_.front());
    const bool waits = std::ranges::any_of(batch.parts, [](const auto& part) { return part.second.landed != 0; });
    if (batch.under_way != 0 || (batch.status.ok() && waits)) break;
    verdicts.push_back({*batch.end, std::move(batch.tail), verdict(batch)});
    release(batch);
    batches_.erase(ended_.front());
    ended_.pop_front();
  }
  return verdicts;
}

void Verifier::drop_all() noexcept {
  for (auto& [id, batch] : batches_) release(batch);
  batches_.clear();
  ended_.clear();
}

}  // namespace pdxfer::transport::cuda_ipc
