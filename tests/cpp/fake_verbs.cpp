// See fake_verbs.hpp.
#include "fake_verbs.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace fake {
namespace {

using namespace pdxfer::shim;

constexpr int kDevices = 8;
struct Device {
  std::string name;
  bool alive = true;
};
struct Context : IbvContext {
  int index = 0;
  std::deque<IbvAsyncEvent> events;
};
struct Cq : IbvCq {
  std::deque<IbvWc> done;
  bool armed = false;
};
struct Srq : IbvSrq {
  std::deque<std::pair<uint64_t, IbvSge>> buffers;
};
struct Request {
  uint64_t id;
  int opcode;
  bool signaled;
  std::vector<IbvSge> pieces;
  std::vector<std::byte> inlined;
  uint64_t remote;
  uint32_t rkey;
};
struct Qp : IbvQp {
  int index = 0, state = 0;
  uint32_t peer = 0;
  std::deque<Request> queue;
};
struct Mr : IbvMr {
  unsigned access = 0;
};
struct World {
  std::mutex mutex;
  std::array<Device, kDevices> devices;
  std::map<uint32_t, Qp*> qps;
  std::map<uint32_t, Mr*> keys;
  std::vector<Context*> contexts;
  uint32_t next_qp = 100, next_key = 7;
  uint64_t posts = 0, requests = 0, random = 1;
  Faults faults;
  Counts counts;
};
World& world() {
  static World& w = *[] {
    auto* made = new World;
    for (int i = 0; i < kDevices; ++i) made->devices[static_cast<size_t>(i)].name = "fake" + std::to_string(i);
    return made;
  }();
  return w;
}
using Lock = std::lock_guard<std::mutex>;

void ring(int fd) {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(fd, &one, sizeof one);
}

void complete(IbvCq* where, uint64_t id, int status, int opcode, uint32_t qp_num, uint32_t bytes = 0) {
  auto* cq = static_cast<Cq*>(where);
  IbvWc wc{};
  wc.wr_id = id;
  wc.status = status;
  wc.opcode = opcode;
  wc.qp_num = qp_num;
  wc.byte_len = bytes;
  cq->done.push_back(wc);
  if (!std::exchange(cq->armed, false) || cq->channel == nullptr) return;
  ring(cq->channel->fd);
}

void flush(Qp& qp) {
  qp.state = kIbvQpsErr;
  for (const Request& r : qp.queue) complete(qp.send_cq, r.id, kIbvWcFlushErr, 0, qp.qp_num);
  qp.queue.clear();
}

Mr* covers(uint32_t key, uint64_t address, uint64_t bytes, unsigned access) {
  const auto found = world().keys.find(key);
  if (found == world().keys.end()) return nullptr;
  Mr* mr = found->second;
  const auto begin = reinterpret_cast<uint64_t>(mr->addr);
  const bool inside = address >= begin && bytes <= mr->length && address - begin <= mr->length - bytes;
  return inside && (mr->access & access) == access ? mr : nullptr;
}

// The status with which a request completes; its bytes are moved when that is success.
int perform(Qp& qp, const Request& r) {
  World& w = world();
  const auto there = w.qps.find(qp.peer);
  if (there == w.qps.end() || there->second->state != kIbvQpsRts || !w.devices[static_cast<size_t>(qp.index)].alive ||
      !w.devices[static_cast<size_t>(there->second->index)].alive)
    return kIbvWcRetryExcErr;
  if (w.faults.fail_every > 0 && ++w.requests % static_cast<uint64_t>(w.faults.fail_every) == 0)
    return w.faults.fail_status;
  std::vector<std::byte> bytes = r.inlined;
  for (const IbvSge& piece : r.pieces) {
    if (covers(piece.lkey, piece.addr, piece.length, 0) == nullptr) return kIbvWcLocProtErr;
    const auto* from = reinterpret_cast<const std::byte*>(piece.addr);
    bytes.insert(bytes.end(), from, from + piece.length);
  }
  if (w.faults.drop_above > 0 && bytes.size() > w.faults.drop_above) return kIbvWcRetryExcErr;
  Qp& peer = *there->second;
  if (r.opcode == kIbvWrRdmaWrite) {
    ++w.counts.writes;
    if (bytes.empty()) return kIbvWcSuccess;
    if (covers(r.rkey, r.remote, bytes.size(), kIbvAccessRemoteWrite) == nullptr) {
      flush(peer);
      return kIbvWcRemAccessErr;
    }
    std::memcpy(reinterpret_cast<void*>(r.remote), bytes.data(), bytes.size());
    return kIbvWcSuccess;
  }
  ++w.counts.sends;
  auto* srq = static_cast<Srq*>(peer.srq);
  if (srq->buffers.empty()) return kIbvWcRnrRetryExcErr;
  const auto [id, buffer] = srq->buffers.front();
  srq->buffers.pop_front();
  std::memcpy(reinterpret_cast<void*>(buffer.addr), bytes.data(), bytes.size());
  complete(peer.recv_cq, id, kIbvWcSuccess, kIbvWcRecv, peer.qp_num, static_cast<uint32_t>(bytes.size()));
  return kIbvWcSuccess;
}

void advance(Cq* cq) {
  World& w = world();
  if (w.faults.silent) return;
  std::vector<Qp*> mine;
  for (const auto& [number, qp] : w.qps)
    if (qp->send_cq == cq) mine.push_back(qp);
  for (Qp* qp : mine) {
    w.random = w.random * 6364136223846793005ull + 1442695040888963407ull;
    for (uint64_t steps = 1 + (w.random >> 60); steps > 0 && !qp->queue.empty(); --steps) {
      const Request r = std::move(qp->queue.front());
      qp->queue.pop_front();
      const int status = perform(*qp, r);
      if (status != kIbvWcSuccess || r.signaled) complete(cq, r.id, status, 0, qp->qp_num);
      if (status != kIbvWcSuccess) flush(*qp);
    }
  }
}

int poll_cq(IbvCq* where, int entries, IbvWc* out) {
  const Lock lock(world().mutex);
  auto* cq = static_cast<Cq*>(where);
  advance(cq);
  int n = 0;
  for (; n < entries && !cq->done.empty(); cq->done.pop_front()) out[n++] = cq->done.front();
  return n;
}

int req_notify_cq(IbvCq* where, int) {
  const Lock lock(world().mutex);
  auto* cq = static_cast<Cq*>(where);
  cq->armed = true;
  for (const auto& [number, qp] : world().qps)  // what polling would move: call for the next poll
    if (qp->send_cq == cq && !qp->queue.empty() && std::exchange(cq->armed, false)) ring(cq->channel->fd);
  return 0;
}

int post_srq_recv(IbvSrq* where, IbvRecvWr* wr, IbvRecvWr**) {
  const Lock lock(world().mutex);
  for (; wr != nullptr; wr = wr->next) static_cast<Srq*>(where)->buffers.emplace_back(wr->wr_id, wr->sg_list[0]);
  return 0;
}

int post_send(IbvQp* where, IbvSendWr* wr, IbvSendWr** bad) {
  World& w = world();
  const Lock lock(w.mutex);
  auto* qp = static_cast<Qp*>(where);
  ++w.counts.doorbells;
  ++w.posts;
  const auto every = [&](int n) { return n > 0 && w.posts % static_cast<uint64_t>(n) == 0; };
  size_t limit = every(w.faults.refuse_every) ? 0 : SIZE_MAX;
  if (every(w.faults.cut_every)) {
    limit = 0;
    for (const IbvSendWr* at = wr; at != nullptr; at = at->next) ++limit;
    limit /= 2;
  }
  for (; wr != nullptr; wr = wr->next) {
    if (limit-- == 0) {
      *bad = wr;
      return ENOMEM;
    }
    Request r{wr->wr_id,    wr->opcode, (wr->send_flags & kIbvSendSignaled) != 0, {}, {}, wr->rdma.remote_addr,
              wr->rdma.rkey};
    w.counts.gathered += wr->num_sge > 1 ? 1 : 0;
    for (int i = 0; i < wr->num_sge; ++i) {
      const auto* from = reinterpret_cast<const std::byte*>(wr->sg_list[i].addr);
      if ((wr->send_flags & kIbvSendInline) != 0)
        r.inlined.insert(r.inlined.end(), from, from + wr->sg_list[i].length);
      else
        r.pieces.push_back(wr->sg_list[i]);
    }
    w.counts.inlined += r.inlined.empty() ? 0 : 1;
    if (qp->state != kIbvQpsRts)
      complete(qp->send_cq, r.id, kIbvWcFlushErr, 0, qp->qp_num);
    else
      qp->queue.push_back(std::move(r));
  }
  auto* cq = static_cast<Cq*>(qp->send_cq);
  if (std::exchange(cq->armed, false)) ring(cq->channel->fd);
  return 0;
}

IbvDevice** get_device_list(int* count) {
  auto** list = new IbvDevice* [kDevices + 1] {};
  for (int i = 0; i < kDevices; ++i) list[i] = reinterpret_cast<IbvDevice*>(&world().devices[static_cast<size_t>(i)]);
  *count = kDevices;
  return list;
}
const char* get_device_name(IbvDevice* d) { return reinterpret_cast<Device*>(d)->name.c_str(); }

IbvContext* open_device(IbvDevice* device) {
  const Lock lock(world().mutex);
  auto* c = new Context;
  c->device = device;
  c->index = static_cast<int>(reinterpret_cast<Device*>(device) - world().devices.data());
  c->ops = {};
  c->ops.poll_cq = poll_cq;
  c->ops.req_notify_cq = req_notify_cq;
  c->ops.post_srq_recv = post_srq_recv;
  c->ops.post_send = post_send;
  c->async_fd = ::eventfd(0, 0);
  world().contexts.push_back(c);
  ++world().counts.contexts;
  return c;
}
int close_device(IbvContext* context) {
  const Lock lock(world().mutex);
  auto* c = static_cast<Context*>(context);
  std::erase(world().contexts, c);
  ::close(c->async_fd);
  delete c;
  --world().counts.contexts;
  return 0;
}

int query_device(IbvContext*, IbvDeviceAttr* attr) {
  *attr = {};
  attr->max_sge = 4;
  attr->max_cqe = 32768;
  attr->max_srq_wr = 32768;
  attr->max_qp_wr = 1024;
  return 0;
}
int query_port(IbvContext*, uint8_t, IbvPortAttr* attr) {
  *attr = {};
  attr->state = kIbvPortActive;
  attr->max_msg_sz = 1u << 30;
  return 0;
}

IbvPd* alloc_pd(IbvContext* context) {
  const Lock lock(world().mutex);
  ++world().counts.pds;
  return reinterpret_cast<IbvPd*>(new IbvContext*(context));
}
int dealloc_pd(IbvPd* pd) {
  const Lock lock(world().mutex);
  --world().counts.pds;
  delete reinterpret_cast<IbvContext**>(pd);
  return 0;
}

IbvMr* new_mr(IbvPd* pd, void* addr, size_t length, unsigned access) {
  World& w = world();
  auto* mr = new Mr;
  mr->pd = pd;
  mr->addr = addr;
  mr->length = length;
  mr->access = access;
  mr->lkey = mr->rkey = w.next_key++;
  w.keys[mr->lkey] = mr;
  ++w.counts.mrs;
  return mr;
}
IbvMr* reg_mr(IbvPd* pd, void* addr, size_t length, int access) {
  const Lock lock(world().mutex);
  if (world().faults.no_registration != 0) return errno = world().faults.no_registration, nullptr;
  return new_mr(pd, addr, length, static_cast<unsigned>(access));
}
IbvMr* reg_mr_iova2(IbvPd* pd, void* addr, size_t length, uint64_t, unsigned access) {
  return reg_mr(pd, addr, length, static_cast<int>(access));
}
// The dma-buf tells which addresses it stands for (fake_cuda::DmabufContent); here it must be those of the region.
IbvMr* reg_dmabuf_mr(IbvPd* pd, uint64_t offset, size_t length, uint64_t iova, int fd, int access) {
  const Lock lock(world().mutex);
  if (world().faults.no_dmabuf != 0) return errno = world().faults.no_dmabuf, nullptr;
  uint64_t begin_and_bytes[2] = {};
  if (::pread(fd, begin_and_bytes, sizeof begin_and_bytes, 0) != static_cast<ssize_t>(sizeof begin_and_bytes) ||
      begin_and_bytes[0] + offset != iova || offset + length > begin_and_bytes[1])
    return errno = EINVAL, nullptr;
  ++world().counts.dmabufs;
  return new_mr(pd, reinterpret_cast<void*>(iova), length, static_cast<unsigned>(access));
}
int dereg_mr(IbvMr* mr) {
  const Lock lock(world().mutex);
  world().keys.erase(mr->lkey);
  --world().counts.mrs;
  delete static_cast<Mr*>(mr);
  return 0;
}

IbvCompChannel* create_comp_channel(IbvContext* context) {
  return new IbvCompChannel{context, ::eventfd(0, EFD_SEMAPHORE), 0};
}
int destroy_comp_channel(IbvCompChannel* channel) {
  ::close(channel->fd);
  delete channel;
  return 0;
}
IbvCq* create_cq(IbvContext* context, int, void* cq_context, IbvCompChannel* channel, int) {
  const Lock lock(world().mutex);
  auto* cq = new Cq;
  cq->context = context;
  cq->channel = channel;
  cq->cq_context = cq_context;
  ++world().counts.cqs;
  return cq;
}
int destroy_cq(IbvCq* cq) {
  const Lock lock(world().mutex);
  --world().counts.cqs;
  delete static_cast<Cq*>(cq);
  return 0;
}
int get_cq_event(IbvCompChannel* channel, IbvCq** cq, void**) {
  uint64_t value = 0;
  *cq = nullptr;
  return ::read(channel->fd, &value, sizeof value) == sizeof value ? 0 : -1;
}
void ack_cq_events(IbvCq*, unsigned) {}

IbvSrq* create_srq(IbvPd* pd, IbvSrqInitAttr*) {
  const Lock lock(world().mutex);
  auto* srq = new Srq;
  srq->context = *reinterpret_cast<IbvContext**>(pd);
  ++world().counts.srqs;
  return srq;
}
int destroy_srq(IbvSrq* srq) {
  const Lock lock(world().mutex);
  --world().counts.srqs;
  delete static_cast<Srq*>(srq);
  return 0;
}

IbvQp* create_qp(IbvPd* pd, IbvQpInitAttr* init) {
  World& w = world();
  const Lock lock(w.mutex);
  if (w.faults.no_qp) return errno = ENOMEM, nullptr;
  auto* qp = new Qp;
  qp->context = *reinterpret_cast<IbvContext**>(pd);
  qp->index = static_cast<Context*>(qp->context)->index;
  qp->send_cq = init->send_cq;
  qp->recv_cq = init->recv_cq;
  qp->srq = init->srq;
  qp->qp_num = w.next_qp++;
  w.qps[qp->qp_num] = qp;
  ++w.counts.qps;
  return qp;
}
int modify_qp(IbvQp* where, IbvQpAttr* attr, int mask) {
  const Lock lock(world().mutex);
  auto* qp = static_cast<Qp*>(where);
  if ((mask & kIbvQpDestQpn) != 0) qp->peer = attr->dest_qp_num;
  qp->state = attr->qp_state;
  if (qp->state == kIbvQpsErr) flush(*qp);
  return 0;
}
int destroy_qp(IbvQp* where) {
  World& w = world();
  const Lock lock(w.mutex);
  w.qps.erase(where->qp_num);
  --w.counts.qps;
  delete static_cast<Qp*>(where);
  return 0;
}

int get_async_event(IbvContext* context, IbvAsyncEvent* event) {
  const Lock lock(world().mutex);
  auto* c = static_cast<Context*>(context);
  uint64_t value = 0;
  if (c->events.empty()) return -1;
  [[maybe_unused]] const ssize_t n = ::read(c->async_fd, &value, sizeof value);
  *event = c->events.front();
  c->events.pop_front();
  return 0;
}
void ack_async_event(IbvAsyncEvent*) {}

}  // namespace

const VerbsApi& table() {
  static const VerbsApi api = [] {
    VerbsApi t{};
    t.fork_init = [] { return 0; };
    t.get_device_list = get_device_list;
    t.free_device_list = [](IbvDevice** list) { delete[] list; };
    t.get_device_name = get_device_name;
    t.open_device = open_device;
    t.close_device = close_device;
    t.query_device = query_device;
    t.query_port = query_port;
    t.query_gid = [](IbvContext*, uint8_t, int, IbvGid* gid) { return *gid = {}, 0; };
    t.alloc_pd = alloc_pd;
    t.dealloc_pd = dealloc_pd;
    t.reg_mr = reg_mr;
    t.reg_mr_iova2 = reg_mr_iova2;
    t.reg_dmabuf_mr = reg_dmabuf_mr;
    t.dereg_mr = dereg_mr;
    t.create_comp_channel = create_comp_channel;
    t.destroy_comp_channel = destroy_comp_channel;
    t.create_cq = create_cq;
    t.destroy_cq = destroy_cq;
    t.get_cq_event = get_cq_event;
    t.ack_cq_events = ack_cq_events;
    t.create_srq = create_srq;
    t.destroy_srq = destroy_srq;
    t.create_qp = create_qp;
    t.modify_qp = modify_qp;
    t.destroy_qp = destroy_qp;
    t.get_async_event = get_async_event;
    t.ack_async_event = ack_async_event;
    t.wc_status_str = [](int status) { return status == kIbvWcRetryExcErr ? "transport retry counter exceeded" : "?"; };
    return t;
  }();
  return api;
}

Faults& faults() { return world().faults; }
void reset_faults() {
  for (int i = 0; i < kDevices; ++i)
    if (!world().devices[static_cast<size_t>(i)].alive) set_port(i, true);
  const Lock lock(world().mutex);
  world().faults = {};
  world().posts = world().requests = 0;
}
void set_port(int device, bool alive) {
  const Lock lock(world().mutex);
  world().devices[static_cast<size_t>(device)].alive = alive;
  for (Context* c : world().contexts) {
    if (c->index != device) continue;
    IbvAsyncEvent event{};
    event.element.port_num = 1;
    event.event_type = alive ? kIbvEventPortActive : kIbvEventPortErr;
    c->events.push_back(event);
    ring(c->async_fd);
  }
}
Counts counts() {
  const Lock lock(world().mutex);
  return world().counts;
}

}  // namespace fake
