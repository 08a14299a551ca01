// TokenListener: the door through which the data connections of a link come in. It owns a listening socket (TCP or
// abstract AF_UNIX) and one thread; each connection must present, within 2 s, a fixed 24-byte preamble
// {16-byte token, u32 index, u32 magic} little-endian, and is then parked until the end that knows the token takes it.
// Strangers are bounded in number and time and never delay anybody: at most 64 connections without a preamble, of which
// the oldest gives way to a newcomer, and at most 64 parked under a token that nobody expects yet (the other end may be
// a little faster), those for 3 s.
// Used by tcp and shm at set-up; expect, take and forget may be called from any thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "sys/fd.hpp"
#include "sys/socket.hpp"

namespace pdxfer::sys {

using Token = std::array<uint8_t, 16>;

inline constexpr size_t kPreambleBytes = 24;
inline constexpr uint32_t kPreambleMagic = 0x31584450;  // "PDX1"

// What the connecting end sends first.
std::array<std::byte, kPreambleBytes> encode_preamble(const Token& token, uint32_t index) noexcept;
void send_preamble(int fd, const Token& token, uint32_t index, Deadline deadline);

class TokenListener {
 public:
  // Takes over a socket from listen_on. `name` names the thread (at most 15 characters). Throws Error.
  explicit TokenListener(UniqueFd listening, const std::string& name = "pdx-listen");
  ~TokenListener();  // closes the socket and everything parked; a waiting take() throws kUnavailable
  TokenListener(const TokenListener&) = delete;
  TokenListener& operator=(const TokenListener&) = delete;

  SocketAddress address() const;

  // From now on at most `connections` connections with this token are kept until taken or forgotten.
  void expect(const Token& token, uint32_t connections = 64);
  // The connection of (token, index), waiting for it. Throws Error(kTimeout) at the deadline, Error(kUnavailable)
  // when the token is not expected or the listener closes.
  UniqueFd take(const Token& token, uint32_t index, Deadline deadline);
  // Whichever connection of the token comes first, with its index.
  std::pair<uint32_t, UniqueFd> take_any(const Token& token, Deadline deadline);
  // Stop expecting; closes what is parked under it. Harmless for an unknown token.
  void forget(const Token& token) noexcept;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace pdxfer::sys
