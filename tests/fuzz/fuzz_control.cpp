// libFuzzer target: bytes of a stranger through the control connection's decoder and every payload decoder behind it.
// Nothing may crash, read out of bounds or hold more than the limit in force.
#include <cstddef>
#include <cstdint>

#include "engine/handshake.hpp"

using namespace pdxfer;
using namespace pdxfer::engine;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const ByteView input(reinterpret_cast<const std::byte*>(data), size);
  FrameReader reader(kMaxGreeting);
  size_t fed = 0, step = 1;
  try {
    while (fed < input.size()) {
      const size_t n = std::min(step, input.size() - fed);
      reader.feed(input.subspan(fed, n));
      fed += n;
      step = step * 2 + 1;
      while (auto frame = reader.next()) {
        if (frame->payload.size() > kMaxFrame) __builtin_trap();
        (void)decode_refusal(frame->payload);
        if (frame->type == FrameType::kProof) reader.allow(kMaxFrame);
        if (frame->type == FrameType::kRegion) {
          const RegionNotice notice = decode_region(frame->payload);
          if (notice.key.size() > frame->payload.size()) __builtin_trap();
        }
      }
    }
  } catch (const Error& error) {
    if (error.code() != Code::kUnavailable) __builtin_trap();
  }
  try {
    (void)decode_region(input);
  } catch (const Error& error) {
    if (error.code() != Code::kUnavailable) __builtin_trap();
  }
  return 0;
}
