// The reference transport; see loopback_transport.hpp. Everything below is guarded by one mutex of the process, so
// that "is the region still registered?", the copy and "has the other end gone?" are one step, and nothing can be late.
#include "transport/loopback/loopback_transport.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>

#include "transport/check_copy.hpp"

namespace pdxfer::transport {
namespace {

class LoopbackTransport;
class LoopbackPeer;
using Token = std::array<uint8_t, 16>;

struct Rendezvous {
  std::mutex mutex;
  std::condition_variable met;
  std::map<Token, LoopbackPeer*> waiting;  // the end that came first
};

Rendezvous& rendezvous() {
  static auto* const process_wide = new Rendezvous;  // never destroyed: transports may outlive main's statics
  return *process_wide;
}

class LoopbackTransport final : public Transport {
 public:
  explicit LoopbackTransport(Context context) : context_(std::move(context)) {}

  const char* name() const override { return "loopback"; }
  Bytes address() override;
  Bytes register_memory(const Region& region) override;
  void deregister_memory(RegionId region) override;
  std::unique_ptr<Peer> connect(const Link& link) override;
  size_t poll(std::span<Completion> out) override;

 private:
  friend class LoopbackPeer;

  std::byte* base(RegionId region) const {
    const auto found = regions_.find(region);
    return found == regions_.end() ? nullptr : found->second.data;
  }
  uint64_t bytes(RegionId region) const {
    const auto found = regions_.find(region);
    return found == regions_.end() ? 0 : found->second.bytes;
  }
  void wake() const {
    if (context_.wake) context_.wake();
  }

  const Context context_;
  std::map<RegionId, Buffer> regions_;
  std::vector<LoopbackPeer*> peers_;
};

class LoopbackPeer final : public Peer {
 public:
  LoopbackPeer(LoopbackTransport& transport, PeerId id) : transport_(transport), id_(id) {}
  ~LoopbackPeer() override;

  void import_region(const Region& region, ByteView key) override;
  void forget_region(RegionId region) override;
  Status submit(BatchId batch, const TransferPlan& plan, uint32_t copy_index, Cursor& cursor) override;
  bool notify(BatchId batch, std::optional<uint64_t> tag, ByteView tail) override;
  void cancel(BatchId batch) override;
  Status lost() const override;
  std::string describe() const override { return "loopback in this process"; }

 private:
  friend class LoopbackTransport;
  struct Batch {
    bool over = false;  // its kSent is queued
    Status status;
  };

  Status check(const PagedCopy& copy, const Cursor& cursor) const;
  Status finish(BatchId batch, Status status);
  void far_end_gone();

  LoopbackTransport& transport_;
  const PeerId id_;
  LoopbackPeer* far_ = nullptr;
  Status lost_;
  std::map<RegionId, uint64_t> imported_;  // bytes of the other end's regions
  std::map<BatchId, Batch> batches_;       // until their kSent was polled
  std::deque<Completion> ready_;
};

Bytes LoopbackTransport::address() {
  const auto self = static_cast<uint64_t>(::getpid());
  Bytes bytes(sizeof self);
  std::memcpy(bytes.data(), &self, sizeof self);
  return bytes;
}

Bytes LoopbackTransport::register_memory(const Region& region) {
  const std::lock_guard lock(rendezvous().mutex);
  if (region.id == kNoId || region.buffer.data == nullptr || region.buffer.bytes == 0)
    throw Error(Code::kInvalid, "register region " + std::to_string(region.id) + " with loopback: it is empty");
  if (region.buffer.device != kHost)
    throw Error(Code::kUnavailable, "register region " + std::to_string(region.id) +
                                        " with loopback: it moves host memory only; register a host buffer");
  if (!regions_.emplace(region.id, region.buffer).second)
    throw Error(Code::kInvalid, "register region " + std::to_string(region.id) + " with loopback: the id is taken");
  return {};
}

void LoopbackTransport::deregister_memory(RegionId region) {
  const std::lock_guard lock(rendezvous().mutex);
  if (regions_.erase(region) == 0)
    throw Error(Code::kInvalid, "deregister region " + std::to_string(region) + " with loopback: no such region");
}

std::unique_ptr<Peer> LoopbackTransport::connect(const Link& link) {
  if (link.address != address())
    throw Error(Code::kUnavailable, "loopback: the peer is another process; use shm or tcp");
  Rendezvous& r = rendezvous();
  Token token;
  std::copy(std::begin(link.token), std::end(link.token), token.begin());
  auto peer = std::make_unique<LoopbackPeer>(*this, link.peer);
  std::unique_lock lock(r.mutex);
  if (const auto first = r.waiting.find(token); first != r.waiting.end()) {
    peer->far_ = first->second;
    first->second->far_ = peer.get();
    r.waiting.erase(first);
    r.met.notify_all();
  } else {
    r.waiting.emplace(token, peer.get());
    while (peer->far_ == nullptr && peer->lost_.ok()) {
      if (r.met.wait_until(lock, link.deadline) == std::cv_status::no_timeout || peer->far_ != nullptr) continue;
      r.waiting.erase(token);
      lock.unlock();  // the peer's destructor takes it
      throw Error(Code::kUnavailable, "loopback: the other end did not connect in time");
    }
  }
  peers_.push_back(peer.get());
  return peer;
}

size_t LoopbackTransport::poll(std::span<Completion> out) {
  const std::lock_guard lock(rendezvous().mutex);
  size_t n = 0;
  for (LoopbackPeer* peer : peers_) {
    for (; n < out.size() && !peer->ready_.empty(); peer->ready_.pop_front()) {
      out[n] = std::move(peer->ready_.front());
      if (out[n].kind == Completion::Kind::kSent) peer->batches_.erase(out[n].batch);
      ++n;
    }
  }
  return n;
}

LoopbackPeer::~LoopbackPeer() {
  const std::lock_guard lock(rendezvous().mutex);
  std::erase(transport_.peers_, this);
  if (far_ != nullptr) far_->far_end_gone();
}

void LoopbackPeer::far_end_gone() {
  far_ = nullptr;
  lost_ = {Code::kPeerLost, 0, "the other end closed"};
  for (auto& [id, batch] : batches_)
    if (!batch.over) finish(id, lost_);
  transport_.wake();
}

void LoopbackPeer::import_region(const Region& region, ByteView) {
  const std::lock_guard lock(rendezvous().mutex);
  imported_[region.id] = region.buffer.bytes;
}

void LoopbackPeer::forget_region(RegionId region) {
  const std::lock_guard lock(rendezvous().mutex);
  imported_.erase(region);
}

// The last word on a batch: nothing of it is under way here, so its completion can follow at once.
Status LoopbackPeer::finish(BatchId batch, Status status) {
  Batch& b = batches_[batch];
  if (b.over) return b.status;
  b = {true, status};
  Completion sent;
  sent.peer = id_;
  sent.batch = batch;
  sent.status = status;
  ready_.push_back(std::move(sent));
  transport_.wake();
  return status;
}

Status LoopbackPeer::check(const PagedCopy& copy, const Cursor& cursor) const {
  if (cursor == Cursor{})
    if (const Status s = check_sealed(copy); !s.ok()) return s;
  if (!inside(copy, cursor)) return {Code::kInvalid, 0, "cursor outside its copy"};
  if (const Status s = check_range(copy, Side::kSrc, [&](RegionId id) { return transport_.bytes(id); }); !s.ok())
    return s;
  const auto imported = [&](RegionId id) {
    const auto found = imported_.find(id);
    return found == imported_.end() ? uint64_t{0} : found->second;
  };
  if (const Status s = check_range(copy, Side::kDst, imported); !s.ok()) return s;
  return check_range(copy, Side::kDst, [&](RegionId id) { return far_->transport_.bytes(id); });
}

Status LoopbackPeer::submit(BatchId batch, const TransferPlan& plan, uint32_t copy_index, Cursor& cursor) {
  const std::lock_guard lock(rendezvous().mutex);
  if (batches_[batch].over) return batches_[batch].status;
  if (!lost_.ok()) return finish(batch, lost_);
  if (copy_index >= plan.copies.size()) return finish(batch, {Code::kInvalid, 0, "no such copy in the plan"});
  const PagedCopy& copy = plan.copies[copy_index];
  if (at_end(copy, cursor)) return kOkStatus;
  if (const Status s = check(copy, cursor); !s.ok()) return finish(batch, s);
  std::vector<std::byte*> src, dst;
  for (const RegionPair& p : copy.pairs) {
    src.push_back(transport_.base(p.src));
    dst.push_back(far_->transport_.base(p.dst));
  }
  transport_.context_.copy(copy, cursor, transport_.context_.limits.chunk_bytes, src, dst);
  return kOkStatus;
}

bool LoopbackPeer::notify(BatchId batch, std::optional<uint64_t> tag, ByteView tail) {
  const std::lock_guard lock(rendezvous().mutex);
  if (batches_[batch].over) return true;
  if (!lost_.ok()) return finish(batch, lost_), true;
  if (tail.size() > transport_.context_.limits.max_tail_bytes)
    return finish(batch, {Code::kInvalid, 0, "tail larger than the limit"}), true;
  if (tag.has_value()) {
    Completion arrived;
    arrived.kind = Completion::Kind::kArrived;
    arrived.peer = far_->id_;
    arrived.batch = batch;
    arrived.tag = *tag;
    arrived.tail.assign(tail.begin(), tail.end());
    far_->ready_.push_back(std::move(arrived));
    far_->transport_.wake();
  }
  finish(batch, kOkStatus);
  return true;
}

void LoopbackPeer::cancel(BatchId batch) {
  const std::lock_guard lock(rendezvous().mutex);
  finish(batch, {Code::kCancelled, 0, "cancelled by the sender"});
}

Status LoopbackPeer::lost() const {
  const std::lock_guard lock(rendezvous().mutex);
  return lost_;
}

}  // namespace

std::unique_ptr<Transport> make_loopback(Context context) {
  if (!context.copy) throw Error(Code::kInvalid, "loopback: no copy function in its context");
  return std::make_unique<LoopbackTransport>(std::move(context));
}

}  // namespace pdxfer::transport
