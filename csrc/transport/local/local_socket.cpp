// See local_socket.hpp.
#include "transport/local/local_socket.hpp"

#include <sys/stat.h>

#include <array>
#include <cstring>
#include <fstream>

#include "core/codec.hpp"
#include "core/sha256.hpp"
#include "sys/seqpacket.hpp"

namespace pdxfer::transport::local {

Address Address::here(const char* prefix) {
  std::array<std::byte, 16> raw{};
  random_bytes(raw);
  Address address{prefix, "", 0};
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

Bytes Address::encode(const Protocol& protocol) const {
  return Writer().integer(protocol.magic).integer(protocol.version).text(name).text(boot).integer(netns).take();
}

Address Address::decode(const Protocol& protocol, ByteView bytes) {
  const std::string who = std::string(protocol.name) + ": ";
  Reader reader(bytes);
  const auto magic = reader.integer<uint32_t>();
  const auto version = reader.integer<uint32_t>();
  Address address;
  address.name = reader.text();
  address.boot = reader.text();
  address.netns = reader.integer<uint64_t>();
  if (!reader.ok() || magic != protocol.magic || address.name.empty() || address.name.size() > 107)
    throw Error(Code::kUnavailable, who + "the peer's address is not one of " + protocol.name);
  if (version != protocol.version)
    throw Error(Code::kUnavailable, who + "the peer speaks version " + std::to_string(version) + ", this end " +
                                        std::to_string(protocol.version) + "; install the same release on both");
  return address;
}

void Address::require_reachable(const Protocol& protocol, const Address& peer) const {
  const std::string who = std::string(protocol.name) + ": ";
  if (peer.boot != boot) throw Error(Code::kUnavailable, who + "the peer runs on another machine; use tcp");
  if (peer.netns != netns)
    throw Error(Code::kUnavailable,
                who +
                    "the peer is in another network namespace of this machine, where its socket cannot be reached; "
                    "run both with the same network (docker --network=host, one pod), or use tcp");
}

sys::UniqueFd open_socket(const Protocol& protocol, const Address& here, sys::TokenListener& listener,
                          const transport::Link& link) {
  const Address there = Address::decode(protocol, link.address);
  here.require_reachable(protocol, there);
  sys::Token token;
  std::memcpy(token.data(), link.token, token.size());
  if (link.role == Role::kConnect) {
    sys::UniqueFd socket = sys::connect_seqpacket(there.name, link.deadline);
    auto preamble = sys::encode_preamble(token, 0);
    const iovec part{preamble.data(), preamble.size()};
    if (const int error = sys::send_message(socket.get(), {&part, 1}); error != 0)
      throw Error(Code::kUnavailable, std::string(protocol.name) + ": greeting the peer: " + errno_name(error), error);
    return socket;
  }
  listener.expect(token, 1);
  try {
    sys::UniqueFd socket = listener.take(token, 0, link.deadline);
    listener.forget(token);
    return socket;
  } catch (...) {
    listener.forget(token);
    throw;
  }
}

}  // namespace pdxfer::transport::local
