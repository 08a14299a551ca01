// Encoding and incremental decoding of control frames; see frame.hpp.
#include "engine/frame.hpp"

#include "core/codec.hpp"

namespace pdxfer::engine {

Bytes encode_frame(FrameType type, ByteView payload, uint16_t version) {
  Writer writer;
  writer.integer(kMagic).integer(version).integer(static_cast<uint16_t>(type));
  writer.integer(static_cast<uint32_t>(payload.size())).raw(payload);
  return writer.take();
}

Bytes encode_refusal(Code code, std::string_view text) {
  Writer writer;
  writer.integer(static_cast<int32_t>(code)).text(text.substr(0, 1024));
  return writer.take();
}

Refusal decode_refusal(ByteView payload) {
  Reader reader{payload};
  const int32_t code = reader.integer<int32_t>();
  std::string text = reader.text();
  if (!reader.done()) return {Code::kUnavailable, "(its reason could not be read)"};
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';  // a stranger's text goes to logs and terminals
  const bool known = code > 0 && code <= static_cast<int32_t>(Code::kInternal);
  return {known ? static_cast<Code>(code) : Code::kUnavailable, text};
}

std::optional<Frame> FrameReader::next() {
  const ByteView have = ByteView(buffer_).subspan(start_);
  if (have.size() < kHeaderBytes) return std::nullopt;
  Reader header{have};
  const uint32_t magic = header.integer<uint32_t>();
  const uint16_t version = header.integer<uint16_t>();
  const uint16_t type = header.integer<uint16_t>();
  const uint32_t bytes = header.integer<uint32_t>();
  if (magic != kMagic)
    throw Error(Code::kUnavailable,
                "the other end does not speak pdxfer's protocol (first bytes differ); is this the "
                "control port of a pdxfer engine?");
  if (version != kWireVersion)
    throw Error(Code::kUnavailable, "wire version " + std::to_string(version) + " at the other end, " +
                                        std::to_string(kWireVersion) +
                                        " here; install the same pdxfer release on both machines");
  if (bytes > max_payload_)
    throw Error(Code::kUnavailable, "a control frame of " + std::to_string(bytes) + " bytes, at most " +
                                        std::to_string(max_payload_) + " are accepted at this point");
  if (have.size() < kHeaderBytes + bytes) return std::nullopt;
  const ByteView payload = header.raw(bytes);
  Frame frame{static_cast<FrameType>(type), Bytes(payload.begin(), payload.end())};
  start_ += kHeaderBytes + bytes;
  if (start_ == buffer_.size()) {
    buffer_.clear();
    start_ = 0;
  } else if (start_ > kMaxFrame) {
    buffer_.erase(buffer_.begin(), buffer_.begin() + static_cast<ptrdiff_t>(start_));
    start_ = 0;
  }
  return frame;
}

}  // namespace pdxfer::engine
