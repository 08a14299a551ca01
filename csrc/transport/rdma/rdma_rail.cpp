// Queue pairs and posting; see rdma_rail.hpp.
#include "transport/rdma/rdma_rail.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/sha256.hpp"

namespace pdxfer::transport::rdma {
namespace {

constexpr uint32_t kSignalEvery = 16;
constexpr uint8_t kMinRnrTimer = 12;  // 0.64 ms

int mtu_code(uint32_t bytes) {
  int code = 1;
  for (uint32_t size = 256; size * 2 <= bytes && code < 5; size *= 2) ++code;
  return code;
}

}  // namespace

QpAddress Rail::open() {
  close();
  shim::IbvQpInitAttr init{};
  init.send_cq = init.recv_cq = port.cq;
  init.srq = port.srq;
  init.cap = {kSendDepth + 1, 0, port.max_sge, 0, 128};
  init.qp_type = shim::kIbvQptRc;
  qp_ = port.api.create_qp(port.pd, &init);
  if (qp_ == nullptr) {  // a device without inline data
    init.cap.max_inline_data = 0;
    qp_ = port.api.create_qp(port.pd, &init);
  }
  if (qp_ == nullptr)
    throw Error(Code::kUnavailable, "rdma: ibv_create_qp on " + port.nic.address.name() + ": " + errno_name(errno),
                errno);
  inline_bytes_ = init.cap.max_inline_data;
  ++generation;
  posted_ = retired_ = signaled_ = bytes_ = 0;
  fenced_here = fenced_there = false;
  retired_then_ = 0;
  moved_at_ = since = std::chrono::steady_clock::now();
  state = State::kConnecting;
  port.rails.push_back(this);
  shim::IbvQpAttr attr{};
  attr.qp_state = shim::kIbvQpsInit;
  attr.pkey_index = port.nic.pkey_index;
  attr.port_num = port.nic.address.port;
  attr.qp_access_flags = shim::kIbvAccessRemoteWrite;
  modify(attr, shim::kIbvQpState | shim::kIbvQpPkeyIndex | shim::kIbvQpPort | shim::kIbvQpAccessFlags, "INIT");
  random_bytes(std::as_writable_bytes(std::span(&psn_, 1)));  // std::random_device would ask for glibc 2.36
  psn_ &= 0xffffff;
  return {qp_->qp_num, psn_};
}

void Rail::modify(shim::IbvQpAttr& attr, int mask, const char* what) {
  const int error = port.api.modify_qp(qp_, &attr, mask);
  if (error == 0) return;
  close();
  throw Error(Code::kUnavailable,
              "rdma: ibv_modify_qp to " + std::string(what) + ", " + pair.why + ": " +
                  errno_name(error < 0 ? errno : error) +
                  "; check the GID (PDXFER_RDMA=gid=N) and the route to the peer",
              error);
}

void Rail::connect(const QpAddress& remote) {
  shim::IbvQpAttr attr{};
  attr.qp_state = shim::kIbvQpsRtr;
  attr.path_mtu = mtu_code(pair.mtu == 0 ? 1024 : pair.mtu);
  attr.dest_qp_num = remote.qp_num;
  attr.rq_psn = remote.psn;
  attr.max_dest_rd_atomic = 1;
  attr.min_rnr_timer = kMinRnrTimer;
  attr.ah_attr.is_global = pair.use_grh ? 1 : 0;
  std::memcpy(attr.ah_attr.grh.dgid.raw, pair.remote_gid.gid.raw.data(), sizeof attr.ah_attr.grh.dgid.raw);
  attr.ah_attr.grh.sgid_index = static_cast<uint8_t>(pair.local_gid.index);
  attr.ah_attr.grh.hop_limit = 64;
  attr.ah_attr.grh.traffic_class = options_.traffic_class;
  attr.ah_attr.dlid = pair.dlid;
  attr.ah_attr.sl = options_.service_level;
  attr.ah_attr.port_num = port.nic.address.port;
  modify(attr,
         shim::kIbvQpState | shim::kIbvQpAv | shim::kIbvQpPathMtu | shim::kIbvQpDestQpn | shim::kIbvQpRqPsn |
             shim::kIbvQpMaxDestRdAtomic | shim::kIbvQpMinRnrTimer,
         "RTR");
  attr = {};
  attr.qp_state = shim::kIbvQpsRts;
  attr.sq_psn = psn_;
  attr.timeout = options_.timeout;
  attr.retry_cnt = options_.retry;
  attr.rnr_retry = options_.rnr_retry;
  attr.max_rd_atomic = 1;
  modify(attr,
         shim::kIbvQpState | shim::kIbvQpTimeout | shim::kIbvQpRetryCnt | shim::kIbvQpRnrRetry | shim::kIbvQpSqPsn |
             shim::kIbvQpMaxRdAtomic,
         "RTS");
}

void Rail::fence() noexcept {
  if (qp_ == nullptr) return;
  shim::IbvQpAttr attr{};
  attr.qp_state = shim::kIbvQpsErr;
  (void)port.api.modify_qp(qp_, &attr, shim::kIbvQpState);  // destroyed next in any case
}

void Rail::close() noexcept {
  state = State::kDown;
  if (qp_ == nullptr) return;
  fence();
  std::erase(port.rails, this);
  if (port.api.destroy_qp(qp_) != 0) port.dead.store(true);
  qp_ = nullptr;
}

uint32_t Rail::post(std::span<const Work> works, std::span<const Keys> keys) noexcept {
  const auto count = static_cast<uint32_t>(std::min<size_t>(works.size(), kMaxChain));
  uint64_t last = signaled_;  // one past the last request for a completion that was really taken
  if (qp_ == nullptr || count == 0) return 0;
  for (uint32_t i = 0; i < count; ++i) {
    const Work& work = works[i];
    shim::IbvSendWr& wr = wrs_[i];
    const uint64_t at = posted_ + i;
    wr.wr_id = uint64_t{generation & 0x7fff} << 48 | at;
    wr.next = i + 1 < count ? &wrs_[i + 1] : nullptr;
    wr.sg_list = &sges_[size_t{i} * kMaxPieces];
    wr.num_sge = static_cast<int>(work.pieces);
    wr.opcode = work.kind == Work::Kind::kMessage ? shim::kIbvWrSend : shim::kIbvWrRdmaWrite;
    const bool signal = i + 1 == count || at - signaled_ >= kSignalEvery;
    if (signal) signaled_ = at + 1;
    wr.send_flags = (signal ? shim::kIbvSendSignaled : 0) |
                    (work.bytes > 0 && work.bytes <= inline_bytes_ ? shim::kIbvSendInline : 0);
    wr.rdma.remote_addr = work.remote;
    wr.rdma.rkey = keys[i].remote;
    for (uint32_t p = 0; p < work.pieces; ++p)
      wr.sg_list[p] = {work.piece[p].first, work.piece[p].second, keys[i].local};
    ring_[at % kSendDepth] = work;
  }
  shim::IbvSendWr* bad = nullptr;
  uint32_t taken = count;
  if (qp_->context->ops.post_send(qp_, wrs_.data(), &bad) != 0)
    taken = bad == nullptr ? 0 : static_cast<uint32_t>(bad - wrs_.data());
  for (uint32_t i = 0; i < taken; ++i) bytes_ += works[i].bytes;
  posted_ += taken;
  if (taken < count) {
    for (uint32_t i = 0; i < taken; ++i)
      if ((wrs_[i].send_flags & shim::kIbvSendSignaled) != 0) last = posted_ - taken + i + 1;
    signaled_ = last;
  }
  return taken;
}

bool Rail::flush() noexcept {
  if (signaled_ >= posted_ || posted_ == retired_ || full()) return true;
  const Work probe{};
  const Keys none{};
  return post({&probe, 1}, {&none, 1}) == 1;
}

}  // namespace pdxfer::transport::rdma
