// The cold half of ShmLink: regions, messages, loss. See shm_link.hpp for who calls what.
#include "transport/shm/shm_link.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/log.hpp"

namespace pdxfer::transport::shm {

ShmLink::ShmLink(std::shared_ptr<Core> core, PeerId peer, Connection connection, stream::StreamHub& hub)
    : core_(std::move(core)), peer_(peer), connection_(std::move(connection)), outbox_(connection_.socket.get()) {
  inbox_.resize(sizeof(Header) + std::max<uint64_t>(core_->context.limits.max_tail_bytes, 1 << 16));
  if (!connection_.ring) return;
  ring_ = connection_.ring.get();
  std::vector<std::unique_ptr<stream::Channel>> channels;
  channels.push_back(std::move(connection_.ring));
  staged_ = hub.make_peer(peer, std::move(channels), "staged");
}

void ShmLink::start(std::shared_ptr<ShmLink> self) {
  number_ = core_->links.add(std::move(self), connection_.socket.get(), exit_fd());
}

void ShmLink::stop() noexcept {
  core_->links.remove(number_, connection_.socket.get(), exit_fd());
  std::unique_lock lock(mutex_);
  lose({Code::kPeerLost, 0, "this end closed"});
  ring_ = nullptr;
  const std::unique_ptr<transport::Peer> staged = std::move(staged_);
  lock.unlock();  // its threads are joined without the lock
}

// Every outstanding batch is answered, once, and nothing more is sent or received.
void ShmLink::lose(Status why) {
  if (!lost_.ok()) return;
  lost_ = why;
  ::shutdown(connection_.socket.get(), SHUT_RDWR);
  if (ring_ != nullptr) ring_->shutdown();  // the staged half then ends its batches itself
  for (auto& [id, batch] : batches_)
    if (batch.route != Route::kStaged) finish(id, batch, lost_);
  outbox_.clear();
  asked_back_.clear();
  changed_.notify_all();
  core_->wake();
}

// --- messages
// ---------------------------------------------------------------------------------------------------------

void ShmLink::post(const Header& header, ByteView body, std::vector<int> fds, std::shared_ptr<const void> owner) {
  if (!lost_.ok()) return;
  if (const Status s = outbox_.post(header, body, std::move(fds), std::move(owner)); !s.ok()) lose(s);
}

void ShmLink::flush() {
  if (const Status s = outbox_.flush(); !s.ok()) lose(s);
}

void ShmLink::receive() {
  for (;;) {
    std::vector<sys::UniqueFd> fds;
    const int64_t n = sys::recv_message(connection_.socket.get(), inbox_, &fds);
    const std::lock_guard lock(mutex_);
    if (n == -EAGAIN) return flush(), core_->wake();  // there may be room again for what notify could not send
    if (n == -EMFILE) {
      // A region's descriptors did not fit in this process: which region's is not known, so all that wait go without.
      for (auto& [id, import] : imports_)
        if (import.waiting) go_without(import, "no free descriptor for the peer's memory (ulimit -n)");
      continue;
    }
    if (n <= 0) return lose({Code::kPeerLost, static_cast<int32_t>(-n), n == 0 ? "the other end closed" : "recvmsg"});
    Header header;
    if (n < static_cast<int64_t>(sizeof header)) return lose({Code::kPeerLost, 0, "malformed message"});
    std::memcpy(&header, inbox_.data(), sizeof header);
    handle(header, ByteView(inbox_).subspan(sizeof header, static_cast<size_t>(n) - sizeof header), fds);
    if (!lost_.ok()) return;
  }
}

void ShmLink::process_exited() {
  receive();  // what it said before
  const std::lock_guard lock(mutex_);
  lose({Code::kPeerLost, ESRCH, "the peer's process ended"});
}

void ShmLink::handle(const Header& header, ByteView body, const std::vector<sys::UniqueFd>& fds) {
  switch (header.type) {
    case Type::kWant:
      return handle_want(header.region);
    case Type::kSegments:
      return handle_segments(header, body, fds);
    case Type::kRevoke:
      if (copying_)
        give_back_later_.push_back(header.region);
      else
        give_back(header.region);
      return;
    case Type::kRevoked:
      asked_back_.erase(header.region);
      changed_.notify_all();
      return;
    case Type::kEnd:
      return handle_end(header, body);
    case Type::kAck: {
      const auto found = batches_.find(header.batch);
      if (found != batches_.end() && found->second.ended)
        finish(header.batch, found->second, {static_cast<Code>(header.code), header.native, "the receiving end"});
      return;
    }
    default:
      return lose({Code::kPeerLost, 0, "message of an unknown kind"});
  }
}

void ShmLink::handle_end(const Header& header, ByteView tail) {
  if (header.tagged) complete(local::arrival(peer_, header, tail));
  Header ack;
  ack.type = Type::kAck;
  ack.batch = header.batch;
  post(ack);
}

// --- regions
// ----------------------------------------------------------------------------------------------------------

Way ShmLink::second_best() const noexcept { return connection_.cma ? Way::kCma : Way::kStaging; }

void ShmLink::go_without(Import& import, std::string reason) {
  import.waiting = false;
  import.reason = std::move(reason);
  import.way = second_best();
  if (import.way == Way::kStaging && !staged_)
    import.refused = {Code::kUnavailable, 0, "shm cannot map this region of the peer"};
  ++import_generation_;
  core_->wake();
}

void ShmLink::import(const Region& region, const Key& key) {
  const std::string& path = core_->context.shm_path;
  const std::lock_guard lock(mutex_);
  if (gone_.erase(region.id) > 0)
    throw Error(Code::kInvalid, "shm: the peer has deregistered region " + std::to_string(region.id));
  Import import;
  import.region = region;
  if (key.mappable && (path == "auto" || path == "map")) {
    import.way = Way::kMap;
    import.waiting = true;
    Header want;
    want.type = Type::kWant;
    want.region = region.id;
    post(want);
  } else {
    import.way = second_best();
    import.reason = key.mappable ? "shm_path=" + path : key.refusal;
    if (path == "map" || (import.way == Way::kStaging && !staged_))
      throw Error(Code::kUnavailable, "shm: region " + std::to_string(region.id) + " of the peer cannot be mapped (" +
                                          import.reason + ") and " + connection_.why_not_cma);
  }
  if (staged_) staged_->import_region(region, {});
  imports_.insert_or_assign(region.id, std::move(import));
  ++import_generation_;
}

void ShmLink::forget(RegionId region) {
  Import old;  // unmapped after the lock is released
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !copying_; });
  gone_.erase(region);
  if (staged_) staged_->forget_region(region);
  const auto found = imports_.find(region);
  if (found == imports_.end()) return;
  old = std::move(found->second);
  imports_.erase(found);
  ++import_generation_;
}

// The owner wants it back, and no copy is running.
void ShmLink::give_back(RegionId region) {
  const auto found = imports_.find(region);
  if (found != imports_.end()) {
    imports_.erase(found);  // staged batches are refused by the owner, whose own threads store the bytes
    ++import_generation_;
  } else {
    gone_.insert(region);
  }
  Header done;
  done.type = Type::kRevoked;
  done.region = region;
  post(done);
}

void ShmLink::handle_want(RegionId region) {
  Header answer;
  answer.type = Type::kSegments;
  answer.region = region;
  Bytes body;
  std::vector<int> fds;
  const auto files = std::make_shared<std::vector<std::shared_ptr<const sys::SharedFile>>>();  // open until it is sent
  {
    const std::lock_guard lock(core_->regions_mutex);
    const auto found = core_->regions.find(region);
    if (found == core_->regions.end() || found->second.segments.empty())
      answer.code = static_cast<int32_t>(Code::kInvalid);
    else
      body = encode_segments(found->second.buffer, found->second.segments, *files);
  }
  for (const auto& file : *files) fds.push_back(file->fd.get());
  post(answer, body, std::move(fds), files);
}

void ShmLink::handle_segments(const Header& header, ByteView body, const std::vector<sys::UniqueFd>& fds) {
  const auto found = imports_.find(header.region);
  if (found == imports_.end() || !found->second.waiting) return;
  Import& import = found->second;
  if (header.code != 0)
    return go_without(import, header.native != 0 ? "handing it over: " + errno_name(header.native)
                                                 : std::string("its owner has it no more"));
  try {
    import.mapped = map_segments(body, fds, import.region.buffer.bytes);
    import.waiting = false;
    ++import_generation_;
    core_->populate = true;
    core_->wake();
  } catch (const Error& e) {
    go_without(import, e.what());
  }
}

// The first store to each page would fault otherwise, which costs more than copying it. Between two pieces the poll
// thread looks at its sockets. Without the lock: should the region go meanwhile, the calls fail or touch nothing.
bool ShmLink::populate() {
  constexpr uint64_t kPiece = 4 << 20;
  std::byte* at = nullptr;
  uint64_t bytes = 0;
  {
    const std::lock_guard lock(mutex_);
    for (auto& [id, import] : imports_) {
      bytes = std::min(kPiece, import.mapped.pages.bytes() - import.populated);
      if (bytes == 0) continue;
      at = import.mapped.pages.data() + import.populated;
      import.populated += bytes;
      break;
    }
  }
  if (at != nullptr) sys::populate_existing(at, bytes);
  return at != nullptr;
}

void ShmLink::ask_back(RegionId region) {
  const std::lock_guard lock(mutex_);
  if (!lost_.ok()) return;
  asked_back_.insert(region);
  Header revoke;
  revoke.type = Type::kRevoke;
  revoke.region = region;
  post(revoke);
}

void ShmLink::wait_back(RegionId region, Deadline deadline) {
  std::unique_lock lock(mutex_);
  if (changed_.wait_until(lock, deadline, [&] { return !asked_back_.contains(region); })) return;
  log(LogLevel::kWarning, "shm: peer " + std::to_string(peer_) + " did not give back region " + std::to_string(region) +
                              " in time; its link is closed");
  lose({Code::kPeerLost, ETIMEDOUT, "the peer did not give back a region"});
}

void ShmLink::wait_for_copy() {
  std::unique_lock lock(mutex_);
  const uint64_t now = copies_done_;
  changed_.wait(lock, [&] { return !copying_ || copies_done_ != now; });
}

std::string ShmLink::describe() const {
  const std::lock_guard lock(mutex_);
  static constexpr const char* kNames[] = {"mapped", "cma", "staged"};
  std::string text;
  std::string reason;
  for (size_t way = 0; way < std::size(kNames); ++way) {
    size_t count = 0;
    uint64_t bytes = 0;
    for (const auto& [id, import] : imports_) {
      if (import.way != static_cast<Way>(way)) continue;
      ++count;
      bytes += import.region.buffer.bytes;
      if (!import.reason.empty()) reason = import.reason;
    }
    if (count == 0) continue;
    text += (text.empty() ? "" : ", ") + std::string(kNames[way]) + ": " + std::to_string(count) + " regions, " +
            std::to_string(bytes >> 20) + " MiB";
  }
  if (text.empty()) text = "no regions";
  if (!reason.empty()) text += " (not mapped: " + reason + ")";
  if (!connection_.cma && core_->context.shm_path == "auto") text += " (no cma: " + connection_.why_not_cma + ")";
  if (!lost_.ok()) text += "; lost: " + lost_.to_string();
  return text;
}

}  // namespace pdxfer::transport::shm
