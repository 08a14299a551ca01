// The cold half of CudaLink: regions, messages, loss. See cuda_ipc_link.hpp for who calls what.
#include "transport/cuda_ipc/cuda_ipc_link.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include "core/log.hpp"

namespace pdxfer::transport::cuda_ipc {
namespace {

constexpr size_t kPiecesPerMessage = 64;  // descriptors

Status status_of(const Header& ack) noexcept {
  if (ack.code == static_cast<int32_t>(Code::kCorrupt)) return kCorrupted;
  const bool known = ack.code >= 0 && ack.code < static_cast<int32_t>(Code::kCorrupt);
  return {known ? static_cast<Code>(ack.code) : Code::kInternal, ack.native, "the receiving end",
          ack.native != 0 ? "its own code" : nullptr};  // an errno or one of CUDA's
}

// With checksums an end has to wait for the sum; what is staged has no pieces here.
bool wants_progress(const CudaOptions& options) noexcept {
  return !options.checksum && options.path != CudaOptions::Path::kStaging;
}

}  // namespace

CudaLink::CudaLink(std::shared_ptr<Core> core, PeerId peer, Connection connection, stream::StreamHub& hub)
    : core_(std::move(core)), peer_(peer), connection_(std::move(connection)), outbox_(connection_.socket.get()) {
  inbox_.resize(sizeof(Header) + std::max<uint64_t>(core_->context.limits.max_tail_bytes, 1 << 16));
  {
    const std::lock_guard lock(core_->regions_mutex);
    device_ = core_->device;
    ordinal_ = core_->ordinal;
  }
  DeviceCopyOptions options{.checksum = core_->options.checksum};
  if (wants_progress(core_->options)) options.progress = connection_.progress->pin(core_->context.pin, ordinal_);
  copier_ = core_->context.device_copy(ordinal_, options);
  if (core_->options.checksum) make_verifier();  // no batch waits for it
  channel_ = connection_.channel.get();
  std::vector<std::unique_ptr<stream::Channel>> channels;
  channels.push_back(std::move(connection_.channel));
  staged_ = hub.make_peer(peer, std::move(channels), "", std::move(connection_.ring));
}

void CudaLink::start(std::shared_ptr<CudaLink> self) {
  number_ = core_->links.add(std::move(self), connection_.socket.get(), connection_.process.get());
}

// Waits (bounded) for the device: nothing of ours writes to the peer's memory afterwards.
void CudaLink::stop() noexcept {
  core_->links.remove(number_, connection_.socket.get(), connection_.process.get());
  std::unique_ptr<DeviceCopy> copier;
  std::unique_ptr<Verifier> verifier;
  {
    const std::lock_guard lock(mutex_);
    copier = std::move(copier_);
    verifier = std::move(verifier_);
  }
  copier.reset();  // before the mappings that its pieces write to
  verifier.reset();
  std::unique_ptr<transport::Peer> staged;
  {
    const std::lock_guard lock(mutex_);
    staged = std::move(staged_);  // its batches end without a word: nobody polls this link any more
    done_ = launched_;
    flush();  // what arrived here and was handed on is acknowledged, however soon its owner closes
    lose({Code::kPeerLost, 0, "this end closed"});
    channel_ = nullptr;
    settle_batches();
    imports_.clear();
    giving_back_.clear();
  }
  staged.reset();  // without the lock: it waits for its io thread
}

// Every outstanding batch is answered, once, when its pieces are over; nothing more is sent or received.
void CudaLink::lose(Status why) {
  if (!lost_.ok()) return;
  settle_awaited();  // what is in place has arrived, whatever became of the sender
  if (!lost_.ok()) return;
  lost_ = why;
  ::shutdown(connection_.socket.get(), SHUT_RDWR);
  if (channel_ != nullptr) channel_->shutdown();  // the staged half then ends its batches itself
  for (auto& [id, batch] : batches_) fail(id, batch, lost_);
  outbox_.clear();
  summed_.clear();
  ahead_.clear();
  awaited_.clear();
  if (verifier_) verifier_->drop_all();
  asked_back_.clear();
  changed_.notify_all();
  core_->wake();
}

// The driver's errors are sticky: no piece of this link can be trusted, and nothing more is launched.
void CudaLink::device_failed(Status why) {
  if (!broken_.ok()) return;
  broken_ = why;
  done_ = launched_;
  log(LogLevel::kError, "cuda_ipc: peer " + std::to_string(peer_) + ": the device failed: " + why.to_string());
  for (auto& [id, batch] : batches_)
    if (batch.mapped) fail(id, batch, why);
}

void CudaLink::post(const Header& header, std::vector<int> fds) {
  if (!lost_.ok()) return;
  if (const Status s = outbox_.post(header, {}, std::move(fds)); !s.ok()) lose(s);
}

void CudaLink::keep(const Header& header) {
  if (!lost_.ok()) return;
  if (const Status s = outbox_.keep(header); !s.ok()) lose(s);
}

void CudaLink::flush() {
  if (const Status s = outbox_.flush(); !s.ok()) lose(s);
}

void CudaLink::receive() {
  const std::lock_guard lock(mutex_);
  read_messages();
  flush();
}

void CudaLink::read_messages() {
  while (lost_.ok() && !(taking_ && !ready_.empty())) {  // the worker hands on what there is, and comes again at once
    std::vector<sys::UniqueFd> fds;
    const int64_t n = sys::recv_message(connection_.socket.get(), inbox_, &fds);
    if (n == -EAGAIN) return;
    if (n <= 0) return lose({Code::kPeerLost, static_cast<int32_t>(-n), n == 0 ? "the other end closed" : "recvmsg"});
    Header header;
    if (n < static_cast<int64_t>(sizeof header)) return lose({Code::kPeerLost, 0, "malformed message"});
    std::memcpy(&header, inbox_.data(), sizeof header);
    handle(header, ByteView(inbox_).subspan(sizeof header, static_cast<size_t>(n) - sizeof header), fds);
  }
}

void CudaLink::process_exited() {
  const std::lock_guard lock(mutex_);
  read_messages();  // what it said before
  lose({Code::kPeerLost, ESRCH, "the peer's process ended"});
}

void CudaLink::handle(const Header& header, ByteView body, std::vector<sys::UniqueFd>& fds) {
  switch (header.type) {
    case Type::kBegin:
      hot_until_ = Clock::now() + kHotTime;
      return wake_worker();
    case Type::kWant:
      return handle_want(header.region, header.batch);
    case Type::kPieces:
      return handle_pieces(header, fds);
    case Type::kRevoke: {
      const auto found = imports_.find(header.region);
      if (found == imports_.end()) {
        gone_.insert(header.region);
        Import none;
        none.region.id = header.region;
        giving_back_.emplace_back(std::move(none), 0);
      } else {
        giving_back_.emplace_back(std::move(found->second), launched_);
        imports_.erase(found);
        ++import_generation_;
      }
      return settle_revoked();
    }
    case Type::kRevoked:
      asked_back_.erase(header.region);
      return changed_.notify_all();
    case Type::kEnd:
      return handle_end(header, body);
    case Type::kAck: {
      const auto found = batches_.find(header.batch);
      if (found == batches_.end() || !found->second.ended || found->second.over || found->second.failing) return;
      found->second.ahead = false;
      if (const Status status = status_of(header); status.ok())
        finish(header.batch, found->second, status);
      else
        fail(header.batch, found->second, status);  // pieces of one that was given up may be running
      return;
    }
    case Type::kInPlace:
      if (const auto end = awaited_.take(header.batch)) deliver(end->header, end->tail);
      return;
    case Type::kGiveUp:
      // An end that came and is not awaited has been acknowledged.
      if (awaited_.take(header.batch))
        acknowledge(header.batch, {Code::kCancelled, 0, "given up by its sender"}, false);
      if (verifier_) verifier_->give_up(header.batch);
      return;
    case Type::kPlan:
    case Type::kLanded:
    case Type::kSum:
      return handle_checked(header, body);
    default:
      return lose({Code::kPeerLost, 0, "message of an unknown kind"});
  }
}

void CudaLink::handle_end(const Header& header, ByteView tail) {
  hot_until_ = Clock::now() + kHotTime;
  if (verifier_ && verifier_->holds(header.batch)) {
    verifier_->end(header, tail);
    return wake_worker();  // which polls the checks that are under way
  }
  settle_awaited();  // where the worker does not come to it: what is left is then no more than the sender has under way
  if (header.piece == 0 || connection_.peer_progress->reached(header.piece)) return deliver(header, tail);
  if (awaited_.full()) return lose({Code::kPeerLost, 0, "more ends than a sender can have ahead of their bytes"});
  awaited_.add(header, tail);
  wake_worker();  // which looks at the progress from now on
}

void CudaLink::acknowledge(BatchId batch, Status status, bool arrived) {
  Header ack;
  ack.type = Type::kAck;
  ack.batch = batch;
  ack.code = static_cast<int32_t>(status.code);
  ack.native = status.native;
  if (taking_ && arrived)
    keep(ack);  // the worker hands the arrival on first, and comes again at once
  else
    post(ack);
}

void CudaLink::make_verifier() {
  verifier_ = std::make_unique<Verifier>(*core_, core_->context.device_copy(ordinal_, {.checksum = true}));
}

// What says how a batch with a checksum is to be checked.
void CudaLink::handle_checked(const Header& header, ByteView body) {
  if (!verifier_) {
    if (header.type != Type::kPlan) return lose({Code::kPeerLost, 0, "malformed message: no plan came before"});
    try {
      make_verifier();
    } catch (const Error& error) {
      log(LogLevel::kError, "cuda_ipc: peer " + std::to_string(peer_) + " sends checksums: " + error.what());
      return lose({Code::kPeerLost, 0, "this end cannot verify checksums; its log says why"});
    }
  }
  Status status;
  if (header.type == Type::kPlan) status = verifier_->plan(header, body);
  if (header.type == Type::kLanded) status = verifier_->landed(header);
  if (header.type == Type::kSum) status = verifier_->sum(header);
  if (!status.ok()) return lose(status);
  hot_until_ = Clock::now() + kHotTime;
  if (header.type != Type::kPlan) wake_worker();
}

// --- regions

// The region is reached through staging, or, with path=map and in device memory, not at all.
void CudaLink::go_without(Import& import, std::string reason) {
  import.pieces.clear();
  import.unmapped = std::move(reason);
  const bool host = import.region.buffer.device == kHost;
  const bool staged = host || core_->options.path != CudaOptions::Path::kMap;
  if (!staged) import.refused = {Code::kUnavailable, 0, "cuda path=map, and this region of the peer cannot be mapped"};
  if (!host && core_->options.path != CudaOptions::Path::kStaging)
    log(LogLevel::kWarning, "cuda_ipc: region " + std::to_string(import.region.id) + " of peer " +
                                std::to_string(peer_) + " cannot be mapped: " + import.unmapped +
                                (staged ? "; it is reached through pinned host memory, at the rate of PCIe" : ""));
  ++import_generation_;
  core_->wake();
}

void CudaLink::map(Import& import) {
  const Key& key = import.key;
  try {
    if (key.offset > key.allocation || key.allocation - key.offset < import.region.buffer.bytes)
      if (key.process != this_process()) throw Error(Code::kInvalid, "its key does not hold all of it");
    if (key.process == this_process()) {
      enable_peer(*device_, key.device);
      import.address = reinterpret_cast<uint64_t>(import.region.buffer.data);
    } else {
      import.mapped =
          key.kind == Key::Kind::kHandle ? map_handle(device_, key) : map_pieces(device_, key, import.pieces);
      import.address = import.mapped->address + key.offset;
    }
    import.pieces.clear();
    ++import_generation_;
    core_->wake();
  } catch (const Error& error) {
    go_without(import, error.what());
  }
}

void CudaLink::import(const Region& region, Key key) {
  const std::lock_guard lock(mutex_);
  if (gone_.erase(region.id) > 0)
    throw Error(Code::kInvalid, "cuda_ipc: the peer has deregistered region " + std::to_string(region.id));
  Import& import = imports_[region.id] = Import{};
  import.region = region;
  import.key = std::move(key);
  ++import_generation_;
  staged_->import_region(region, {});
  const bool here = import.key.process == this_process();
  if (region.buffer.device == kHost) return go_without(import, "host memory");
  if (core_->options.path == CudaOptions::Path::kStaging) return go_without(import, "cuda path=staging");
  if (import.key.kind == Key::Kind::kNone && !here) return go_without(import, import.key.refusal);
  if (import.key.kind != Key::Kind::kPieces || here) return map(import);
  Header want;
  want.type = Type::kWant;
  want.region = region.id;
  post(want);
}

void CudaLink::forget(RegionId region) {
  Import old;  // unmapped after the lock is released
  wait_for_pieces(Clock::now() + std::chrono::milliseconds(core_->context.limits.peer_timeout_ms));
  const std::lock_guard lock(mutex_);
  gone_.erase(region);
  if (staged_) staged_->forget_region(region);
  const auto found = imports_.find(region);
  if (found == imports_.end()) return;
  old = std::move(found->second);
  imports_.erase(found);
  ++import_generation_;
}

// The owner wants regions back: each is unmapped, and the owner told, when no piece that may write to it is running.
void CudaLink::settle_revoked() {
  while (!giving_back_.empty() && (over(giving_back_.front().second) || !lost_.ok())) {
    Header done;
    done.type = Type::kRevoked;
    done.region = giving_back_.front().first.region.id;
    giving_back_.pop_front();
    post(done);
  }
}

bool CudaLink::settle() {
  const std::lock_guard lock(mutex_);
  settle_revoked();
  return !giving_back_.empty();
}

void CudaLink::handle_want(RegionId region, uint64_t from) {
  Header answer;
  answer.type = Type::kPieces;
  answer.region = region;
  answer.batch = from;
  std::vector<int> fds;  // of ExportedRegion, which outlives the letter: see deregister_memory
  {
    const std::lock_guard lock(core_->regions_mutex);
    const auto found = core_->regions.find(region);
    if (found == core_->regions.end() || from >= found->second.pieces.size())
      answer.code = static_cast<int32_t>(Code::kInvalid);
    else
      for (size_t i = from; i < found->second.pieces.size() && fds.size() < kPiecesPerMessage; ++i)
        fds.push_back(found->second.pieces[i].get());
  }
  post(answer, std::move(fds));
}

void CudaLink::handle_pieces(const Header& header, std::vector<sys::UniqueFd>& fds) {
  const auto found = imports_.find(header.region);
  if (found == imports_.end() || found->second.address != 0 || header.batch != found->second.pieces.size()) return;
  Import& import = found->second;
  if (header.code != 0 || fds.empty() || import.pieces.size() + fds.size() > import.key.pieces.size())
    return go_without(import, header.native != 0 ? "handing it over: " + errno_name(header.native)
                                                 : std::string("its owner does not hand it over"));
  for (sys::UniqueFd& fd : fds) import.pieces.push_back(std::move(fd));
  if (import.pieces.size() == import.key.pieces.size()) return map(import);
  Header want;
  want.type = Type::kWant;
  want.region = header.region;
  want.batch = import.pieces.size();
  post(want);
}

void CudaLink::ask_back(RegionId region) {
  const std::lock_guard lock(mutex_);
  if (!lost_.ok()) return;
  asked_back_.insert(region);
  Header revoke;
  revoke.type = Type::kRevoke;
  revoke.region = region;
  post(revoke);
}

void CudaLink::wait_back(RegionId region, Deadline deadline) {
  std::unique_lock lock(mutex_);
  if (changed_.wait_until(lock, deadline, [&] { return !asked_back_.contains(region); })) return;
  log(LogLevel::kWarning, "cuda_ipc: peer " + std::to_string(peer_) + " did not give back region " +
                              std::to_string(region) + " in time; its link is closed");
  lose({Code::kPeerLost, ETIMEDOUT, "the peer did not give back a region"});
}

void CudaLink::wait_for_pieces(Deadline deadline) {
  std::unique_lock lock(mutex_);
  const DeviceTicket until = launched_, read_until = verifier_ ? verifier_->launched() : 0;
  while ((copier_ && !over(until)) || (verifier_ && !verifier_->over(read_until))) {
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    lock.lock();
    if (Clock::now() >= deadline) {
      device_failed({Code::kInternal, ETIMEDOUT, "the device did not finish a copy in time"});
      return;
    }
  }
}

std::string CudaLink::describe() const {
  const std::lock_guard lock(mutex_);
  struct Sum {
    size_t regions = 0;
    uint64_t bytes = 0;
    std::string reason;
  } mapped, staged, host, refused;
  for (const auto& [id, import] : imports_) {
    Sum& sum = import.region.buffer.device == kHost ? host
               : !import.refused.ok()               ? refused
               : !import.unmapped.empty()           ? staged
                                                    : mapped;
    if (&sum == &mapped && import.address == 0) continue;  // its descriptors are under way
    ++sum.regions;
    sum.bytes += import.region.buffer.bytes;
    if (&sum != &mapped) sum.reason = import.unmapped;
  }
  const auto count = [](const Sum& sum) {
    return std::to_string(sum.regions) + " regions, " + std::to_string(sum.bytes >> 20) + " MiB";
  };
  std::string text = "mapped: " + count(mapped);
  if (copier_) text += ", by " + copier_->describe();
  if (copier_ && !copier_->tells() && wants_progress(core_->options)) {
    const std::string& why = connection_.progress->refusal();
    text += ", arrivals told by messages alone (" + (why.empty() ? "the driver writes no progress" : why) + ")";
  }
  if (core_->options.checksum && staged.regions + host.regions > 0) text += "; no checksums of what is not mapped";
  if (staged.regions > 0)
    text += "; staged through pinned host memory: " + count(staged) +
            ", at the rate of PCIe (not mapped: " + staged.reason + ")";
  if (host.regions > 0) text += "; host memory through a socket: " + count(host);
  if (refused.regions > 0) text += "; unreachable: " + count(refused) + " (" + refused.reason + ")";
  if (staged_) text += staged_->describe();
  if (!broken_.ok()) text += "; device failed: " + broken_.to_string();
  if (!lost_.ok()) text += "; lost: " + lost_.to_string();
  return text;
}

}  // namespace pdxfer::transport::cuda_ipc
