// epoll and eventfd; see poller.hpp.
#include "sys/poller.hpp"

#include <sys/eventfd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <string>

#include "core/status.hpp"

namespace pdxfer::sys {
namespace {
void control(int epoll, int operation, int fd, uint32_t events, void* what) {
  epoll_event event{};
  event.events = events;
  event.data.ptr = what;
  if (::epoll_ctl(epoll, operation, fd, &event) != 0)
    throw Error(Code::kUnavailable, "epoll_ctl: " + errno_name(errno), errno);
}
}  // namespace

Poller::Poller() : epoll_(::epoll_create1(EPOLL_CLOEXEC)), wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!epoll_ || !wake_)
    throw Error(Code::kUnavailable, "epoll_create1 or eventfd (limit of open files, ulimit -n?): " + errno_name(errno),
                errno);
  control(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), EPOLLIN, nullptr);
}

void Poller::add(int fd, uint32_t events, void* what) { control(epoll_.get(), EPOLL_CTL_ADD, fd, events, what); }
void Poller::modify(int fd, uint32_t events, void* what) { control(epoll_.get(), EPOLL_CTL_MOD, fd, events, what); }
void Poller::remove(int fd) noexcept { ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr); }

size_t Poller::wait(std::span<Event> out, int timeout_ms) noexcept {
  std::array<epoll_event, 64> events;
  const int want = static_cast<int>(std::min(out.size(), events.size()));
  if (want == 0) return 0;
  const int n = ::epoll_wait(epoll_.get(), events.data(), want, timeout_ms);
  size_t kept = 0;
  for (int i = 0; i < n; ++i) {
    if (events[static_cast<size_t>(i)].data.ptr == nullptr) {
      uint64_t count = 0;
      [[maybe_unused]] const auto got = ::read(wake_.get(), &count, sizeof count);
      continue;
    }
    out[kept++] = {events[static_cast<size_t>(i)].data.ptr, events[static_cast<size_t>(i)].events};
  }
  return kept;
}

void Poller::wake() noexcept {
  const uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(wake_.get(), &one, sizeof one);
}

}  // namespace pdxfer::sys
