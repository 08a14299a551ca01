// Opening and closing ports, registering memory, receive buffers; see rdma_port.hpp.
#include "transport/rdma/rdma_port.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>

#include "core/log.hpp"
#include "transport/rdma/rdma_rail.hpp"

namespace pdxfer::transport::rdma {
namespace {

constexpr int kCompletions = 16384;
constexpr uint32_t kReceives = 16384;

[[noreturn]] void fail(const Nic& nic, const char* call, int error, const char* step = "") {
  throw Error(Code::kUnavailable,
              "rdma: " + std::string(call) + " on " + nic.address.name() + ": " + errno_name(error) + step, error);
}

shim::IbvContext* open_device(const shim::VerbsApi& api, const Nic& nic) {
  int count = 0;
  shim::IbvDevice** list = api.get_device_list(&count);
  if (list == nullptr) fail(nic, "ibv_get_device_list", errno);
  shim::IbvContext* context = nullptr;
  int error = ENODEV;
  for (int i = 0; i < count && context == nullptr; ++i) {
    if (nic.address.device != api.get_device_name(list[i])) continue;
    context = api.open_device(list[i]);
    error = errno;
  }
  api.free_device_list(list);
  if (context == nullptr) fail(nic, "ibv_open_device", error, "; is /dev/infiniband visible in this container?");
  return context;
}

}  // namespace

MemoryKey::~MemoryKey() {
  if (mr_ == nullptr) return;
  if (const int error = api_->dereg_mr(mr_); error != 0)
    log(LogLevel::kError, "rdma: ibv_dereg_mr: " + errno_name(error));
}

Port::Port(const shim::VerbsApi& table, const Nic& which) : api(table), nic(which) {
  context = open_device(api, nic);
  try {
    shim::IbvDeviceAttr attr{};
    if (const int e = api.query_device(context, &attr); e != 0) fail(nic, "ibv_query_device", e);
    shim::IbvPortAttr port{};
    if (const int e = api.query_port(context, nic.address.port, &port); e != 0) fail(nic, "ibv_query_port", e);
    max_sge = static_cast<uint32_t>(std::clamp<int>(attr.max_sge, 1, kMaxPieces));
    max_message = std::min<uint32_t>(port.max_msg_sz == 0 ? max_message : port.max_msg_sz, 1u << 30);
    if ((pd = api.alloc_pd(context)) == nullptr) fail(nic, "ibv_alloc_pd", errno);
    if ((channel = api.create_comp_channel(context)) == nullptr) fail(nic, "ibv_create_comp_channel", errno);
    for (const int fd : {channel->fd, context->async_fd})
      if (::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK) != 0) fail(nic, "fcntl", errno);
    const int entries = std::min(attr.max_cqe, kCompletions);
    if ((cq = api.create_cq(context, entries, this, channel, 0)) == nullptr) fail(nic, "ibv_create_cq", errno);
    shim::IbvSrqInitAttr receive{nullptr, std::min<uint32_t>(static_cast<uint32_t>(attr.max_srq_wr), kReceives), 1, 0};
    if ((srq = api.create_srq(pd, &receive)) == nullptr) fail(nic, "ibv_create_srq", errno);
  } catch (...) {
    release();
    throw;
  }
}

Port::~Port() { release(); }

void Port::release() noexcept {
  const auto check = [](const char* call, int error) {
    if (error != 0) log(LogLevel::kError, "rdma: " + std::string(call) + ": " + errno_name(error));
  };
  if (srq != nullptr) check("ibv_destroy_srq", api.destroy_srq(srq));
  blocks_.clear();
  if (cq != nullptr) check("ibv_destroy_cq", api.destroy_cq(cq));
  if (channel != nullptr) check("ibv_destroy_comp_channel", api.destroy_comp_channel(channel));
  if (pd != nullptr) check("ibv_dealloc_pd", api.dealloc_pd(pd));
  if (context != nullptr) check("ibv_close_device", api.close_device(context));
}

MemoryKey Port::register_host(void* data, size_t bytes, bool remote_write) const {
  const unsigned access = shim::kIbvAccessLocalWrite | (remote_write ? shim::kIbvAccessRemoteWrite : 0);
  shim::IbvMr* mr = nullptr;
  // Relaxed ordering lets the device's writes pass each other on PCIe; a message behind them is still behind them.
  if (remote_write && api.reg_mr_iova2 != nullptr)
    mr = api.reg_mr_iova2(pd, data, bytes, reinterpret_cast<uint64_t>(data), access | shim::kIbvAccessRelaxedOrdering);
  if (mr == nullptr) mr = api.reg_mr(pd, data, bytes, static_cast<int>(access));
  if (mr == nullptr)
    fail(nic, "ibv_reg_mr", errno,
         errno == ENOMEM ? "; raise the limit of locked memory: ulimit -l unlimited, or LimitMEMLOCK=infinity" : "");
  return {api, mr};
}

MemoryKey Port::register_dmabuf(int fd, uint64_t offset, uint64_t address, size_t bytes) const {
  if (api.reg_dmabuf_mr == nullptr) fail(nic, "ibv_reg_dmabuf_mr", ENOSYS, "; rdma-core 34 or later has it");
  shim::IbvMr* mr = api.reg_dmabuf_mr(
      pd, offset, bytes, address, fd,
      static_cast<int>(shim::kIbvAccessLocalWrite | shim::kIbvAccessRemoteWrite | shim::kIbvAccessRelaxedOrdering));
  if (mr == nullptr) fail(nic, "ibv_reg_dmabuf_mr", errno);
  return {api, mr};
}

void Port::add_link() {
  if (spare_ > 0) {
    --spare_;
    return;
  }
  auto memory = std::make_unique<std::byte[]>(size_t{kReceivesPerLink} * kMessageBytes);
  MemoryKey key = register_host(memory.get(), size_t{kReceivesPerLink} * kMessageBytes, false);
  blocks_.push_back({std::move(memory), std::move(key)});
  const auto first = static_cast<uint32_t>((blocks_.size() - 1) * kReceivesPerLink);
  for (uint32_t i = 0; i < kReceivesPerLink; ++i) repost(first + i);
}

const std::byte* Port::received(uint32_t buffer) const noexcept {
  return blocks_[buffer / kReceivesPerLink].memory.get() + size_t{buffer % kReceivesPerLink} * kMessageBytes;
}

void Port::repost(uint32_t buffer) noexcept {
  shim::IbvSge piece{reinterpret_cast<uint64_t>(received(buffer)), kMessageBytes,
                     blocks_[buffer / kReceivesPerLink].key.local()};
  shim::IbvRecvWr wr{kReceiveId | buffer, nullptr, &piece, 1};
  shim::IbvRecvWr* bad = nullptr;
  // A full queue cannot be: it holds every buffer there is. A dead device is seen elsewhere.
  if (srq->context->ops.post_srq_recv(srq, &wr, &bad) != 0) dead.store(true);
}

bool Port::arm() noexcept {
  if (armed_.exchange(true)) return false;
  if (cq->context->ops.req_notify_cq(cq, 0) != 0) dead.store(true);
  return true;
}

bool Port::take_events() noexcept {
  bool any = false;
  shim::IbvCq* which = nullptr;
  void* ignored = nullptr;
  while (api.get_cq_event(channel, &which, &ignored) == 0) {
    api.ack_cq_events(which, 1);
    armed_.store(false);
    any = true;
  }
  shim::IbvAsyncEvent event{};
  while (api.get_async_event(context, &event) == 0) {
    const bool ours = event.element.port_num == nic.address.port;
    if (event.event_type == shim::kIbvEventPortErr && ours) dead.store(true);
    if (event.event_type == shim::kIbvEventDeviceFatal) dead.store(true);
    if (event.event_type == shim::kIbvEventPortActive && ours) dead.store(false);
    api.ack_async_event(&event);
    any = true;
  }
  return any;
}

Rail* Port::find(uint32_t qp_num) const noexcept {
  for (Rail* rail : rails)
    if (rail->qp_num() == qp_num) return rail;
  return nullptr;
}

}  // namespace pdxfer::transport::rdma
