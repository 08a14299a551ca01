// Encoding and decoding; see shm_key.hpp.
#include "transport/shm/shm_key.hpp"

#include <sys/stat.h>

#include <cstdio>
#include <fstream>
#include <utility>

namespace pdxfer::transport::shm {
namespace {

constexpr uint32_t kAddressMagic = 0x41584450;  // "PDXA"
constexpr uint32_t kKeyMagic = 0x4b584450;      // "PDXK"

std::string boot_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  return id;
}

}  // namespace

Address Address::here(std::string name) {
  struct stat info {};
  const bool known = ::stat("/proc/self/ns/net", &info) == 0;
  return {std::move(name), boot_id(), known ? info.st_ino : 0};
}

Bytes Address::encode() const {
  return Writer().integer(kAddressMagic).integer(kVersion).text(name).text(boot).integer(netns).take();
}

Address Address::decode(ByteView bytes) {
  Reader reader(bytes);
  const auto magic = reader.integer<uint32_t>();
  const auto version = reader.integer<uint32_t>();
  Address address;
  address.name = reader.text();
  address.boot = reader.text();
  address.netns = reader.integer<uint64_t>();
  if (!reader.ok() || magic != kAddressMagic || address.name.empty() || address.name.size() > 107)
    throw Error(Code::kUnavailable, "shm: the peer's address is not one of shm");
  if (version != kVersion)
    throw Error(Code::kUnavailable, "shm: the peer speaks version " + std::to_string(version) + ", this end " +
                                        std::to_string(kVersion) + "; install the same release on both");
  return address;
}

void Address::require_reachable(const Address& peer) const {
  if (peer.boot != boot) throw Error(Code::kUnavailable, "shm: the peer runs on another machine; use tcp");
  if (peer.netns != netns)
    throw Error(Code::kUnavailable,
                "shm: the peer is in another network namespace of this machine, where its socket cannot be reached; "
                "run both with the same network (docker --network=host, one pod), or use tcp");
}

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
