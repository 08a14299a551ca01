// Encoding and decoding; see rdma_wire.hpp.
#include "transport/rdma/rdma_wire.hpp"

namespace pdxfer::transport::rdma {

Bytes encode_hello(const Hello& hello) {
  Writer writer;
  writer.integer(kWireVersion).integer(static_cast<uint32_t>(hello.rails.size()));
  for (const QpAddress& qp : hello.rails) writer.integer(qp.qp_num).integer(qp.psn);
  writer.integer(hello.staging).integer(hello.slots).integer(hello.slot_bytes);
  writer.integer(static_cast<uint32_t>(hello.rkeys.size()));
  for (const uint32_t key : hello.rkeys) writer.integer(key);
  return writer.take();
}

Hello decode_hello(ByteView bytes, size_t rails, size_t ports) {
  Reader reader{bytes};
  const auto version = reader.integer<uint32_t>();
  if (version != kWireVersion)
    throw Error(Code::kUnavailable, "rdma: the peer speaks version " + std::to_string(version) + " of the wire, not " +
                                        std::to_string(kWireVersion) + "; run the same pdxfer at both ends");
  Hello hello;
  const auto count = reader.integer<uint32_t>();
  if (count != rails)
    throw Error(Code::kUnavailable, "rdma: the peer counts " + std::to_string(count) + " queue pairs where " +
                                        std::to_string(rails) + " were agreed; give both ends the same qps= option");
  for (uint32_t i = 0; i < count; ++i) {
    hello.rails.push_back({reader.integer<uint32_t>(), 0});
    hello.rails.back().psn = reader.integer<uint32_t>() & 0xffffff;
  }
  hello.staging = reader.integer<uint64_t>();
  hello.slots = reader.integer<uint32_t>();
  hello.slot_bytes = reader.integer<uint32_t>();
  const auto keys = reader.integer<uint32_t>();
  for (uint32_t i = 0; i < keys && reader.ok(); ++i) hello.rkeys.push_back(reader.integer<uint32_t>());
  if (!reader.done() || keys != ports || hello.slots == 0 || hello.slots > 4096 || hello.slot_bytes < 4096 ||
      hello.slot_bytes > (64u << 20))
    throw Error(Code::kUnavailable, "rdma: the peer's hello is malformed");
  return hello;
}

Bytes encode_region_key(uint64_t address, std::span<const uint32_t> rkeys) {
  Writer writer;
  writer.integer(address).integer(static_cast<uint32_t>(rkeys.size()));
  for (const uint32_t key : rkeys) writer.integer(key);
  return writer.take();
}

RegionKey decode_region_key(ByteView bytes, size_t ports) {
  Reader reader{bytes};
  RegionKey key;
  key.address = reader.integer<uint64_t>();
  const auto count = reader.integer<uint32_t>();
  for (uint32_t i = 0; i < count && reader.ok(); ++i) key.rkeys.push_back(reader.integer<uint32_t>());
  if (!reader.done() || count != ports) throw Error(Code::kInvalid, "rdma: a region's key is malformed");
  return key;
}

}  // namespace pdxfer::transport::rdma
