// The loop of an io thread; see io_loop.hpp.
#include "transport/stream/io_loop.hpp"

#include <pthread.h>
#include <sched.h>

#include <array>
#include <condition_variable>
#include <string>
#include <system_error>
#include <utility>

#include "core/status.hpp"

namespace pdxfer::transport::stream {
namespace {
// A piece takes a GPU some tens of microseconds: less than it takes to be woken. One that waits behind a model's
// kernels takes milliseconds, which are slept.
constexpr auto kSpin = std::chrono::microseconds(300);
// A thread that sleeps for every gap between two pieces makes the other end pay for waking it.
constexpr auto kLook = std::chrono::microseconds(10);
constexpr int kDeviceSleepMs = 1;
constexpr int kSleepMs = 1000;

// Where processors are few, the two ends of a stream within a machine keep to the same one: what one end writes is in
// the caches when the other reads it, and nobody wakes a thread elsewhere. Left to itself, the kernel places them anew
// after each pause, and slow placements last for milliseconds (docs/design/wire.md). Threads that have processors to
// spare are faster side by side.
void stay_apart(pthread_t thread, uint32_t index, uint32_t count) noexcept {
  cpu_set_t allowed;
  if (::sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;  // more processors than the set holds
  const auto processors = static_cast<uint32_t>(CPU_COUNT(&allowed));
  if (processors > count) return;
  uint32_t before = index % processors;
  int own = 0;
  while (!CPU_ISSET(own, &allowed) || before-- > 0) ++own;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(own, &one);
  (void)::pthread_setaffinity_np(thread, sizeof one, &one);  // taken away meanwhile: it runs where it may
}
}  // namespace

struct IoLoop::Task {
  const std::function<void()>& work;
  std::condition_variable done_signal;
  bool done = false;  // under the loop's mutex
};

IoLoop::IoLoop(uint32_t index, uint32_t count) {
  try {
    thread_ = std::thread([this] { work(); });
  } catch (const std::system_error& error) {
    throw Error(Code::kUnavailable, std::string("start an io thread: ") + error.what(), error.code().value());
  }
  ::pthread_setname_np(thread_.native_handle(), ("pdx-io-" + std::to_string(index)).substr(0, 15).c_str());
  stay_apart(thread_.native_handle(), index, count);
}

IoLoop::~IoLoop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  poller_.wake();
  thread_.join();
}

void IoLoop::add(int fd, Driven& driven) { poller_.add(fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, &driven); }

void IoLoop::remove(int fd, Driven& driven) noexcept {
  poller_.remove(fd);
  run([this, &driven] {
    std::erase(due_, &driven);
    std::erase(on_device_, &driven);
    const std::lock_guard lock(mutex_);
    std::erase(kicked_, &driven);
    driven.removed_ = true;
  });
}

void IoLoop::run(const std::function<void()>& task) {
  Task entry{task, {}, false};
  std::unique_lock lock(mutex_);
  tasks_.push_back(&entry);
  sleeping_ = false;
  poller_.wake();
  entry.done_signal.wait(lock, [&] { return entry.done; });
}

void IoLoop::kick(Driven& driven) noexcept {
  if (driven.kicked_.exchange(true)) return;
  const std::lock_guard lock(mutex_);
  if (driven.removed_) return;
  kicked_.push_back(&driven);
  if (std::exchange(sleeping_, false)) poller_.wake();
}

void IoLoop::mark_due(Driven& driven) {
  if (std::exchange(driven.due_, true)) return;
  due_.push_back(&driven);
}

void IoLoop::take_inbox() {
  std::vector<Task*> tasks;
  {
    const std::lock_guard lock(mutex_);
    for (Driven* driven : kicked_) {
      driven->kicked_ = false;
      mark_due(*driven);
    }
    kicked_.clear();
    tasks.swap(tasks_);
  }
  for (Task* task : tasks) {
    task->work();
    const std::lock_guard lock(mutex_);
    task->done = true;
    task->done_signal.notify_all();
  }
}

// How long to wait for an edge, in milliseconds.
int IoLoop::patience(bool idle) noexcept {
  if (!idle) return 0;
  if (look_until_ != std::chrono::steady_clock::time_point{}) {
    if (std::chrono::steady_clock::now() < look_until_) return 0;
    look_until_ = {};
  }
  if (on_device_.empty()) return kSleepMs;
  return std::chrono::steady_clock::now() < spin_until_ ? 0 : kDeviceSleepMs;
}

void IoLoop::work() noexcept {
  std::array<sys::Poller::Event, 64> events;
  for (;;) {
    int timeout_ms = 0;
    {
      const std::lock_guard lock(mutex_);
      if (stopping_) return;
      timeout_ms = patience(due_.empty() && kicked_.empty() && tasks_.empty());
      // Whoever fills the inbox while sleeping_ is set wakes the poller.
      sleeping_ = timeout_ms != 0;
    }
    const size_t n = poller_.wait(events, timeout_ms);
    for (size_t i = 0; i < n; ++i) mark_due(*static_cast<Driven*>(events[i].what));
    take_inbox();
    for (Driven* driven : on_device_) mark_due(*driven);
    on_device_.clear();
    turning_.swap(due_);
    due_.clear();
    for (Driven* driven : turning_) driven->due_ = false;
    for (Driven* driven : turning_) {
      const Turn turn = driven->turn();
      if (turn == Turn::kDevice) on_device_.push_back(driven);
      if (turn == Turn::kAgain) mark_due(*driven);
      if (turn == Turn::kSoon) look_until_ = std::chrono::steady_clock::now() + kLook;
      if (turn != Turn::kDevice) spin_until_ = {};
    }
    if (!on_device_.empty() && spin_until_ == std::chrono::steady_clock::time_point{})
      spin_until_ = std::chrono::steady_clock::now() + kSpin;
    turning_.clear();
  }
}

}  // namespace pdxfer::transport::stream
