// Messages between two processes of one machine: AF_UNIX SOCK_SEQPACKET under abstract names, with descriptors.
// Used by shm; any thread. Sockets are non-blocking and close-on-exec; a message arrives whole or not at all.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "sys/fd.hpp"
#include "sys/socket.hpp"

namespace pdxfer::sys {

inline constexpr size_t kMaxFds = 253;  // the kernel's SCM_MAX_FD

// Throw Error(kUnavailable).
UniqueFd listen_seqpacket(const std::string& name);
UniqueFd connect_seqpacket(const std::string& name, Deadline deadline);

// One message of all of `parts`. 0, or the errno: EAGAIN when the other end's queue is full. Never blocks.
int send_message(int fd, std::span<const iovec> parts, std::span<const int> fds = {}) noexcept;

// One message into `into`; its descriptors are appended to `fds` (nullptr: they are closed). Returns its size, 0 at the
// end of the connection, or -errno: -EAGAIN when there is none, -EMSGSIZE when it did not fit, -EMFILE when a
// descriptor could not be received. Never blocks.
int64_t recv_message(int fd, std::span<std::byte> into, std::vector<UniqueFd>* fds);

// Waits until `fd` is readable. Throws Error(kTimeout) at the deadline, naming `what`.
void wait_readable(int fd, Deadline deadline, const char* what);

// The process at the other end, 0 when it is not visible from this pid namespace.
int peer_process(int fd) noexcept;

}  // namespace pdxfer::sys
