// Checking headers and naming refusals; see frame.hpp.
#include "transport/stream/frame.hpp"

namespace pdxfer::transport::stream {

const char* refusal_text(Refusal refusal) noexcept {
  switch (refusal) {
    case Refusal::kNone:
      return "refused by the receiver";
    case Refusal::kUnknownRegion:
      return "a destination region is not registered at the receiver";
    case Refusal::kRange:
      return "a destination slot lies outside its region at the receiver";
    case Refusal::kPlan:
      return "the receiver found the plan malformed";
    case Refusal::kChunk:
      return "the receiver found a chunk outside its plan";
    case Refusal::kCount:
      return "the receiver counted other bytes than were announced";
    case Refusal::kDeregistered:
      return "a destination region was deregistered at the receiver";
    case Refusal::kCrowded:
      return "the receiver holds too many unfinished batches";
    case Refusal::kSender:
      return "given up by the sender";
    case Refusal::kDevice:
      return "the receiver's GPU failed";
    case Refusal::kStaging:
      return "the receiver has no staging memory for its GPU: lower staging_bytes there; its log says why";
  }
  return "refused by the receiver for a reason unknown here";
}

Status status_from_wire(uint32_t code, uint32_t refusal) noexcept {
  if (code == static_cast<uint32_t>(Code::kOk)) return kOkStatus;
  const bool known = code <= static_cast<uint32_t>(Code::kInternal);
  return {known ? static_cast<Code>(code) : Code::kInternal, 0, refusal_text(static_cast<Refusal>(refusal))};
}

const char* decode_header(const std::byte* bytes, uint64_t max_tail, FrameHeader& header) noexcept {
  std::memcpy(&header, bytes, kHeaderBytes);
  if (header.magic != kFrameMagic) return "malformed frame: wrong magic";
  if (header.version != kFrameVersion) return "malformed frame: wrong version";
  if (header.reserved != 0) return "malformed frame: reserved field in use";
  if (header.flags != 0 && !(header.type == FrameType::kEnd && header.flags == kTagged))
    return "malformed frame: unknown flags";
  const auto& w = header.words;
  switch (header.type) {
    case FrameType::kPlan:
      if (header.copy >= kMaxCopies || w[0] == 0 || w[0] > kMaxPairs || w[1] == 0 || w[1] > kMaxRuns)
        return "malformed frame: plan too large or empty";
      if (header.body != w[0] * sizeof(WirePair) + w[1] * sizeof(WireRun)) return "malformed frame: length of plan";
      return nullptr;
    case FrameType::kChunk:
      if (header.copy >= kMaxCopies || header.body == 0 || header.body > kMaxChunk)
        return "malformed frame: length of chunk";
      return nullptr;
    case FrameType::kEnd:
      if (header.body > max_tail) return "malformed frame: tail larger than the limit";
      if (w[1] == 0 || w[1] > kMaxStreams) return "malformed frame: number of streams";
      return nullptr;
    case FrameType::kSlot:
      if (header.copy >= kMaxCopies || header.body != 0) return "malformed frame: length of slot";
      return nullptr;
    case FrameType::kCredit:
      return header.body == 0 ? nullptr : "malformed frame: length of credit";
    case FrameType::kAck:
      return header.body == 0 ? nullptr : "malformed frame: length of acknowledgement";
  }
  return "malformed frame: unknown type";
}

}  // namespace pdxfer::transport::stream
