// Set-up of cuda_ipc: registration, the listener, the poll thread. See cuda_ipc_transport.hpp.
#include "transport/cuda_ipc/cuda_ipc_transport.hpp"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <thread>

#include "core/log.hpp"
#include "transport/cuda_ipc/cuda_ipc_link.hpp"

namespace pdxfer::transport {
namespace cuda_ipc {
namespace {

using CudaPeer = local::LinkPeer<CudaLink, Key>;

class CudaTransport final : public Transport {
 public:
  explicit CudaTransport(Context context)
      : core_(std::make_shared<Core>(std::move(context))),
        hub_(core_->context, "cuda_ipc", stream::StreamHub::TryDevices::kNever),
        address_(local::Address::here("pdxfer-gpu-")),
        listener_(sys::listen_seqpacket(address_.name), "pdx-gpu-listen"),
        thread_([this] { run(); }) {}

  ~CudaTransport() override {
    stopping_ = true;
    core_->links.poller.wake();
    thread_.join();
  }

  const char* name() const override { return "cuda_ipc"; }
  Bytes address() override { return address_.encode(kProtocol); }
  Bytes register_memory(const Region& region) override;
  void deregister_memory(RegionId region) override;
  std::unique_ptr<Peer> connect(const transport::Link& link) override;
  size_t poll(std::span<Completion> out) override;
  bool spinning() const override;
  bool launches() const override { return true; }

 private:
  void run() noexcept;

  const std::shared_ptr<Core> core_;
  stream::StreamHub hub_;  // staged halves
  const local::Address address_;
  sys::TokenListener listener_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

Bytes CudaTransport::register_memory(const Region& region) {
  const std::string what = "cuda_ipc: registering region " + std::to_string(region.id) + ": ";
  const Buffer& buffer = region.buffer;
  if (region.id == kNoId || buffer.data == nullptr || buffer.bytes == 0)
    throw Error(Code::kInvalid, what + "it is empty");
  const std::lock_guard lock(core_->regions_mutex);
  if (buffer.device != kHost && core_->device && core_->ordinal != buffer.device)
    throw Error(Code::kUnavailable, what + "it is on CUDA device " + std::to_string(buffer.device) +
                                        " and earlier regions are on " + std::to_string(core_->ordinal) +
                                        "; an engine serves one device: make one engine per device");
  if (core_->regions.contains(region.id)) throw Error(Code::kInvalid, what + "the id is taken");
  const bool first = buffer.device != kHost && !core_->device;
  try {
    if (first) {
      core_->device = std::make_shared<sys::CudaContext>(buffer.device);
      core_->ordinal = buffer.device;
    }
    ExportedRegion exported = buffer.device == kHost ? host_region(buffer) : export_region(*core_->device, buffer);
    const Bytes key = exported.key.encode();
    hub_.register_memory(region);
    core_->regions.emplace(region.id, std::move(exported));
    core_->generation.fetch_add(1, std::memory_order_acq_rel);
    return key;
  } catch (const Error& error) {
    if (first) core_->device.reset();
    throw Error(error.code(), what + error.what(), error.status().native);
  }
}

void CudaTransport::deregister_memory(RegionId region) {
  {
    const std::lock_guard lock(core_->regions_mutex);
    if (!core_->regions.contains(region))
      throw Error(Code::kInvalid, "cuda_ipc: deregistering region " + std::to_string(region) + ": no such region");
  }
  ExportedRegion old;  // its descriptors are open until no letter can name them
  {
    const std::lock_guard lock(core_->regions_mutex);
    old = std::move(core_->regions.at(region));
    core_->regions.erase(region);
    core_->generation.fetch_add(1, std::memory_order_acq_rel);
  }
  const auto all = core_->links.all();
  for (const auto& link : all) link->ask_back(region);
  const Deadline deadline = Clock::now() + std::chrono::milliseconds(core_->context.limits.peer_timeout_ms);
  for (const auto& link : all) {
    link->wait_for_pieces(deadline);
    link->wait_back(region, deadline);
  }
  hub_.deregister_memory(region);
}

std::unique_ptr<Peer> CudaTransport::connect(const transport::Link& link) {
  Hello hello;
  {
    const std::lock_guard lock(core_->regions_mutex);
    if (core_->device) hello.device = core_->ordinal;
  }
  Connection connection = make_connection(core_->context, address_, hello, listener_, link);
  return std::make_unique<CudaPeer>(std::make_shared<CudaLink>(core_, link.peer, std::move(connection), hub_));
}

size_t CudaTransport::poll(std::span<Completion> out) {
  const std::lock_guard lock(core_->links.mutex);
  size_t n = 0;
  for (const auto& [number, link] : core_->links.listed()) {
    if (n == out.size()) break;
    n += link->take(out.subspan(n));
  }
  // What the staged half of a link has to say of a batch that both have a part in goes no further.
  const auto forward = [&](const Completion& done) {
    if (done.kind != Completion::Kind::kSent) return true;
    return std::ranges::any_of(core_->links.listed(), [&](const auto& entry) {
      return entry.second->peer() == done.peer && entry.second->staged_over(done.batch, done.status);
    });
  };
  for (size_t i = n, end = n + hub_.poll(out.subspan(n)); i < end; ++i) {
    if (!forward(out[i])) continue;
    if (i != n) out[n] = std::move(out[i]);
    ++n;
  }
  return n;
}

bool CudaTransport::spinning() const {
  const std::lock_guard lock(core_->links.mutex);
  if (core_->links.listed().empty()) return false;
  const auto now = Clock::now();
  for (const auto& [number, link] : core_->links.listed())
    if (link->hot(now)) return true;
  return false;
}

void CudaTransport::run() noexcept {
  ::pthread_setname_np(::pthread_self(), "pdx-gpu-poll");
  std::array<sys::Poller::Event, 32> events;
  bool waiting = false;
  while (!stopping_) {
    const size_t n = core_->links.poller.wait(events, waiting ? 1 : -1);
    for (size_t i = 0; i < n; ++i) {
      try {
        core_->links.dispatch(events[i]);
        core_->wake();  // there may be room again for what notify could not send
      } catch (const std::exception& e) {
        log(LogLevel::kError, std::string("cuda_ipc: message dropped: ") + e.what());
      }
    }
    waiting = false;
    for (const auto& link : core_->links.all()) waiting |= link->settle();
  }
}

}  // namespace
}  // namespace cuda_ipc

std::unique_ptr<Transport> make_cuda_ipc(Context context) {
  if (!context.device_copy) throw Error(Code::kInvalid, "cuda_ipc: no device copies in its context");
  if (const shim::CudaLibrary& cuda = shim::cuda(); !cuda.reason.empty())
    throw Error(Code::kUnavailable, "cuda_ipc: no CUDA device can be used: " + cuda.reason);
  return std::make_unique<cuda_ipc::CudaTransport>(std::move(context));
}

}  // namespace pdxfer::transport
