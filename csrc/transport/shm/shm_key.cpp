// Encoding and decoding; see shm_key.hpp.
#include "transport/shm/shm_key.hpp"

#include <utility>

namespace pdxfer::transport::shm {
namespace {

constexpr uint32_t kKeyMagic = 0x4b584450;  // "PDXK"

}  // namespace

Bytes Key::encode() const { return Writer().integer(kKeyMagic).integer<uint8_t>(mappable).text(refusal).take(); }

Key Key::decode(ByteView bytes) {
  Reader reader(bytes);
  const auto magic = reader.integer<uint32_t>();
  Key key;
  key.mappable = reader.integer<uint8_t>() != 0;
  key.refusal = reader.text();
  if (!reader.ok() || magic != kKeyMagic) throw Error(Code::kInvalid, "shm: the key is not one of shm");
  return key;
}

}  // namespace pdxfer::transport::shm
