// Encoding and decoding; see cuda_ipc_wire.hpp.
#include "transport/cuda_ipc/cuda_ipc_wire.hpp"

#include <unistd.h>

#include <mutex>
#include <utility>

#include "core/sha256.hpp"

namespace pdxfer::transport::cuda_ipc {
namespace {

constexpr uint32_t kKeyMagic = 0x47584450;  // "PDXG"
constexpr uint32_t kMaxPieces = 6000;       // of 8 bytes: what a key of 64 KiB holds

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
