// Set-up of shm: registration, the listener, the poll thread. See shm_transport.hpp.
#include "transport/shm/shm_transport.hpp"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <string>
#include <thread>

#include "core/log.hpp"
#include "transport/shm/shm_link.hpp"

namespace pdxfer::transport {
namespace shm {
namespace {

using ShmPeer = local::LinkPeer<ShmLink, Key>;

class ShmTransport final : public Transport {
 public:
  explicit ShmTransport(Context context)
      : core_(std::make_shared<Core>(std::move(context))),
        hub_(core_->context, "shm"),
        address_(local::Address::here("pdxfer-")),
        listener_(sys::listen_seqpacket(address_.name), "pdx-shm-listen"),
        thread_([this] { run(); }) {}

  ~ShmTransport() override {
    stopping_ = true;
    core_->links.poller.wake();
    thread_.join();
    sys::release_vanished();
  }

  const char* name() const override { return "shm"; }
  Bytes address() override { return address_.encode(kProtocol); }
  Bytes register_memory(const Region& region) override;
  void deregister_memory(RegionId region) override;
  std::unique_ptr<Peer> connect(const transport::Link& link) override {
    auto connection = make_connection(core_->context, address_, listener_, link);
    return std::make_unique<ShmPeer>(std::make_shared<ShmLink>(core_, link.peer, std::move(connection), hub_));
  }
  size_t poll(std::span<Completion> out) override;

 private:
  void run() noexcept;
  bool populate_some();

  const std::shared_ptr<Core> core_;
  stream::StreamHub hub_;  // staged links
  const local::Address address_;
  sys::TokenListener listener_;
  std::atomic<bool> stopping_{false};
  std::atomic<bool> watch_freed_{false};  // memory was deregistered that the program may free any time
  std::thread thread_;
};

Bytes ShmTransport::register_memory(const Region& region) {
  const std::string what = "shm: registering region " + std::to_string(region.id) + ": ";
  const Buffer& buffer = region.buffer;
  if (region.id == kNoId || buffer.data == nullptr || buffer.bytes == 0)
    throw Error(Code::kInvalid, what + "it is empty");
  if (buffer.device != kHost)
    throw Error(Code::kUnavailable, what + "it is device memory, and shm moves host memory only");
  {
    const std::lock_guard lock(core_->regions_mutex);
    if (core_->regions.contains(region.id)) throw Error(Code::kInvalid, what + "the id is taken");
  }
  const std::string& path = core_->context.shm_path;
  sys::SharedView view;
  if (path == "auto" || path == "map")
    view = sys::share_memory(buffer.data, buffer.bytes, path == "map" ? sys::Adopt::kAlways : sys::Adopt::kWhenSafe);
  else
    view.refusal = "shm_path=" + path + " at its owner";
  if (!view.segments.empty()) view.refusal = why_not_exportable(view.segments);
  if (!view.refusal.empty()) {
    view.segments.clear();
    if (path == "map")
      throw Error(Code::kUnavailable, what + "shm_path=map, but the memory cannot be shared: " + view.refusal);
  }
  const Key key{view.refusal.empty(), view.refusal.substr(0, 1024)};
  hub_.register_memory(region);  // refuses an id that another thread has taken meanwhile
  const std::lock_guard lock(core_->regions_mutex);
  core_->regions.emplace(region.id, LocalRegion{buffer, std::move(view.segments)});
  core_->generation.fetch_add(1, std::memory_order_acq_rel);
  return key.encode();
}

void ShmTransport::deregister_memory(RegionId region) {
  {
    const std::lock_guard lock(core_->regions_mutex);
    if (core_->regions.erase(region) == 0)
      throw Error(Code::kInvalid, "shm: deregistering region " + std::to_string(region) + ": no such region");
    core_->generation.fetch_add(1, std::memory_order_acq_rel);
  }
  const auto links = core_->links.all();
  for (const auto& link : links) link->ask_back(region);
  const Deadline deadline = Clock::now() + std::chrono::milliseconds(core_->context.limits.peer_timeout_ms);
  for (const auto& link : links) {
    link->wait_for_copy();
    link->wait_back(region, deadline);
  }
  hub_.deregister_memory(region);
  watch_freed_ = true;
  core_->links.poller.wake();
}

size_t ShmTransport::poll(std::span<Completion> out) {
  const std::lock_guard lock(core_->links.mutex);
  size_t n = 0;
  for (const auto& [number, link] : core_->links.listed()) {
    if (n == out.size()) break;
    n += link->take(out.subspan(n));
  }
  const size_t staged = hub_.poll(out.subspan(n));
  for (const Completion& done : out.subspan(n, staged)) {
    if (done.kind != Completion::Kind::kSent) continue;
    for (const auto& [number, link] : core_->links.listed())
      if (link->peer() == done.peer) link->staged_over(done.batch);
  }
  return n + staged;
}

bool ShmTransport::populate_some() {
  const auto links = core_->links.all();
  return std::any_of(links.begin(), links.end(), [](const auto& link) { return link->populate(); });
}

void ShmTransport::run() noexcept {
  ::pthread_setname_np(::pthread_self(), "pdx-shm-poll");
  std::array<sys::Poller::Event, 32> events;
  while (!stopping_) {
    const size_t n = core_->links.poller.wait(events, core_->populate ? 0 : watch_freed_ ? 1000 : -1);
    for (size_t i = 0; i < n; ++i) {
      try {
        core_->links.dispatch(events[i]);
      } catch (const std::exception& e) {
        log(LogLevel::kError, std::string("shm: message dropped: ") + e.what());
      }
    }
    if (core_->populate)
      core_->populate = populate_some();
    else if (n == 0 && watch_freed_)
      watch_freed_ = sys::release_vanished() > 0;
  }
}

}  // namespace
}  // namespace shm

std::unique_ptr<Transport> make_shm(Context context) {
  if (!context.copy) throw Error(Code::kInvalid, "shm: no copy function in its context");
  if (context.shm_path.empty()) context.shm_path = "auto";
  for (const char* path : {"auto", "map", "cma", "staging"})
    if (context.shm_path == path) return std::make_unique<shm::ShmTransport>(std::move(context));
  throw Error(Code::kInvalid, "shm_path is '" + context.shm_path + "': use auto, map, cma or staging");
}

}  // namespace pdxfer::transport
