// Encoding and decoding; see cuda_ipc_wire.hpp.
#include "transport/cuda_ipc/cuda_ipc_wire.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <mutex>
#include <utility>

#include "core/sha256.hpp"

namespace pdxfer::transport::cuda_ipc {
namespace {

constexpr uint32_t kAddressMagic = 0x44584450;  // "PDXD"
constexpr uint32_t kKeyMagic = 0x47584450;      // "PDXG"
constexpr uint32_t kMaxPieces = 6000;           // of 8 bytes: what a key of 64 KiB holds

}  // namespace

// A forked child is another process, though it has its parent's memory.
ProcessId this_process() {
  static std::mutex mutex;
  static ProcessId id{};
  static pid_t owner = 0;
  const std::lock_guard lock(mutex);
  if (owner != ::getpid()) {
    random_bytes(std::as_writable_bytes(std::span(id)));
    owner = ::getpid();
  }
  return id;
}

Address Address::here() {
  std::array<std::byte, 16> raw{};
  random_bytes(raw);
  Address address{"pdxfer-gpu-", "", 0};
  for (const std::byte byte : raw) {
    address.name += "0123456789abcdef"[std::to_integer<unsigned>(byte) >> 4];
    address.name += "0123456789abcdef"[std::to_integer<unsigned>(byte) & 15];
  }
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::getline(file, address.boot);
  struct stat info {};
  if (::stat("/proc/self/ns/net", &info) == 0) address.netns = info.st_ino;
  return address;
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
    throw Error(Code::kUnavailable, "cuda_ipc: the peer's address is not one of cuda_ipc");
  if (version != kVersion)
    throw Error(Code::kUnavailable, "cuda_ipc: the peer speaks version " + std::to_string(version) + ", this end " +
                                        std::to_string(kVersion) + "; install the same release on both");
  return address;
}

void Address::require_reachable(const Address& peer) const {
  if (peer.boot != boot) throw Error(Code::kUnavailable, "cuda_ipc: the peer runs on another machine");
  if (peer.netns != netns)
    throw Error(Code::kUnavailable,
                "cuda_ipc: the peer is in another network namespace of this machine, where its socket cannot be "
                "reached; run both with the same network (docker --network=host, one pod)");
}

Bytes Hello::encode() const { return Writer().integer(kVersion).integer(device).take(); }

Hello Hello::decode(ByteView body) {
  Reader reader(body);
  const auto version = reader.integer<uint32_t>();
  Hello hello;
  hello.device = reader.integer<int32_t>();
  if (!reader.done() || version != kVersion) throw Error(Code::kUnavailable, "cuda_ipc: the peer's hello is malformed");
  return hello;
}

Bytes Key::encode() const {
  Writer writer;
  writer.integer(kKeyMagic).integer(static_cast<uint8_t>(kind)).integer(process[0]).integer(process[1]);
  writer.integer(device).integer(offset).integer(allocation);
  writer.bytes(std::as_bytes(std::span(handle.bytes)));
  writer.integer(static_cast<uint32_t>(pieces.size()));
  for (const uint64_t bytes : pieces) writer.integer(bytes);
  return writer.text(refusal).take();
}

Key Key::decode(ByteView bytes) {
  Reader reader(bytes);
  const auto magic = reader.integer<uint32_t>();
  Key key;
  const auto kind = reader.integer<uint8_t>();
  key.process = {reader.integer<uint64_t>(), reader.integer<uint64_t>()};
  key.device = reader.integer<int32_t>();
  key.offset = reader.integer<uint64_t>();
  key.allocation = reader.integer<uint64_t>();
  const ByteView handle = reader.bytes();
  const auto count = reader.integer<uint32_t>();
  for (uint32_t i = 0; reader.ok() && i < count && i < kMaxPieces; ++i)
    key.pieces.push_back(reader.integer<uint64_t>());
  key.refusal = reader.text();
  if (!reader.done() || magic != kKeyMagic || kind > static_cast<uint8_t>(Kind::kNone) || count > kMaxPieces ||
      handle.size() != sizeof key.handle.bytes)
    throw Error(Code::kInvalid, "cuda_ipc: the key is not one of cuda_ipc");
  key.kind = static_cast<Kind>(kind);
  std::copy(handle.begin(), handle.end(), reinterpret_cast<std::byte*>(key.handle.bytes));
  return key;
}

}  // namespace pdxfer::transport::cuda_ipc
