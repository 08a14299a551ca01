// Events, completions and their dispatch; see rdma_hub.hpp.
#include "transport/rdma/rdma_hub.hpp"

#include <pthread.h>

#include <array>

#include "transport/rdma/rdma_link.hpp"

namespace pdxfer::transport::rdma {
namespace {
constexpr int kIdleMilliseconds = 500;  // the event thread looks for its end this often
constexpr int kMostCompletions = 4096;  // of one port in one turn
char side_mark;

// With one CPU, spinning keeps it from whoever is waited for.
std::chrono::microseconds spin_time() {
  constexpr std::chrono::microseconds kSpin(60);
  return std::thread::hardware_concurrency() > 1 ? kSpin : std::chrono::microseconds(0);
}
}  // namespace

Hub::Hub(Context given, const shim::VerbsApi& table, std::span<const Nic> nics)
    : context(std::move(given)), api(table), spin_(spin_time()) {
  for (const Nic& nic : nics) ports.push_back(std::make_unique<Port>(api, nic));
  for (const auto& port : ports) {
    poller_.add(port->completion_fd(), EPOLLIN, port.get());
    poller_.add(port->async_fd(), EPOLLIN, port.get());
  }
  thread_ = std::thread([this] {
    ::pthread_setname_np(::pthread_self(), "pdx-rdma");
    wait_for_events();
  });
}

Hub::~Hub() {
  stopping_.store(true);
  poller_.wake();
  if (thread_.joinable()) thread_.join();
  regions.clear();  // before the protection domains
}

void Hub::watch(int fd) { poller_.add(fd, EPOLLIN | EPOLLRDHUP | EPOLLET, &side_mark); }

void Hub::wait_for_events() {
  std::array<sys::Poller::Event, 32> events;
  while (!stopping_.load()) {
    const size_t n = poller_.wait(events, kIdleMilliseconds);
    bool any = false;
    for (size_t i = 0; i < n; ++i) {
      if (events[i].what == &side_mark) {
        side_ready_.store(true);
        any = true;
      } else {
        any |= static_cast<Port*>(events[i].what)->take_events();
      }
    }
    if (any) wake();
  }
}

void Hub::dispatch(Port& port, const shim::IbvWc& wc) {
  Rail* rail = port.find(wc.qp_num);
  RdmaLink* link = nullptr;
  for (RdmaLink* candidate : links)
    if (rail != nullptr && candidate->owns(*rail)) link = candidate;
  const bool receive = (wc.wr_id & kReceiveId) != 0;
  const auto buffer = static_cast<uint32_t>(wc.wr_id & ~kReceiveId);
  if (link != nullptr && receive && wc.status == shim::kIbvWcSuccess)
    link->on_message({port.received(buffer), wc.byte_len});
  if (link != nullptr && !receive) link->on_completion(*rail, wc);
  if (receive) port.repost(buffer);
}

bool Hub::drain() {
  std::array<shim::IbvWc, 64> completions;
  bool any = false;
  for (const auto& port : ports) {
    for (int got = 1, total = 0; got > 0 && total < kMostCompletions; total += got) {
      got = port->poll(completions);
      if (got < 0) port->dead.store(true);
      for (int i = 0; i < got; ++i) dispatch(*port, completions[static_cast<size_t>(i)]);
      any |= got > 0;
    }
  }
  return any;
}

size_t Hub::poll(std::span<Completion> out) {
  const std::lock_guard lock(mutex);
  const bool side = side_ready_.exchange(false);
  if (drain()) touch();
  for (RdmaLink* link : links) link->progress(side);
  const bool spin = Clock::now() < active_until_;
  spinning_.store(spin, std::memory_order_relaxed);
  bool armed = false;
  for (const auto& port : ports) armed |= !spin && port->arm();
  if (armed && drain())
    for (RdmaLink* link : links) link->progress(false);
  size_t n = 0;
  for (RdmaLink* link : links) n += link->take_completions(out.subspan(n));
  return n;
}

}  // namespace pdxfer::transport::rdma
