// How two processes of one machine find each other: the address that a transport publishes, an abstract AF_UNIX name
// and where it means something, and the socket between the two, guarded by the link's token. What shm and cuda_ipc
// share. Any thread; owns nothing.
#pragma once

#include <string>

#include "core/types.hpp"
#include "sys/token_listener.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport::local {

// Which transport speaks, in addresses and in errors.
struct Protocol {
  const char* name;  // "shm"
  uint32_t magic, version;
};

struct Address {
  std::string name;    // abstract AF_UNIX name
  std::string boot;    // /proc/sys/kernel/random/boot_id: the running kernel
  uint64_t netns = 0;  // inode of /proc/self/ns/net

  static Address here(const char* prefix);  // a fresh name that begins with it; throws Error(kUnavailable)
  Bytes encode(const Protocol& protocol) const;
  static Address decode(const Protocol& protocol, ByteView bytes);  // throws Error(kUnavailable)
  // Throws Error(kUnavailable) with the reason when `peer` is another machine or network namespace.
  void require_reachable(const Protocol& protocol, const Address& peer) const;
};

// The SOCK_SEQPACKET connection of a link, which both ends ask for at once. Throws Error(kUnavailable, kTimeout).
sys::UniqueFd open_socket(const Protocol& protocol, const Address& here, sys::TokenListener& listener,
                          const transport::Link& link);

}  // namespace pdxfer::transport::local
