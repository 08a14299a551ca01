// Poller: epoll with an eventfd to wake it. One thread waits; any thread may wake, add and remove.
#pragma once

#include <sys/epoll.h>

#include <cstdint>
#include <span>

#include "sys/fd.hpp"

namespace pdxfer::sys {

class Poller {
 public:
  struct Event {
    void* what = nullptr;  // as given to add
    uint32_t events = 0;   // EPOLLIN, ...
  };

  Poller();  // throws Error(kUnavailable)

  // `what` is not null. Throws Error(kUnavailable).
  void add(int fd, uint32_t events, void* what);
  void modify(int fd, uint32_t events, void* what);
  // Events already handed out for it may still be in the caller's hands.
  void remove(int fd) noexcept;

  // Waits at most `timeout_ms`; returns the events, without wakes. Never throws: an impossible error reads as none.
  size_t wait(std::span<Event> out, int timeout_ms) noexcept;
  void wake() noexcept;

 private:
  UniqueFd epoll_, wake_;
};

}  // namespace pdxfer::sys
