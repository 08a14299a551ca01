// The set-up half of a link: its memory, its first queue pairs, what the other end told; and what explain() shows.
#include <algorithm>
#include <cstring>
#include <map>
#include <thread>

#include "core/log.hpp"
#include "transport/rdma/rdma_link.hpp"

namespace pdxfer::transport::rdma {
namespace {

constexpr uint32_t kLeastSlots = 2, kMostSlots = 16;
constexpr uint64_t kMostSlotBytes = 256 << 10;
constexpr uint64_t kLeastSlotBytes = 4096;
constexpr int kTurns = 8;
constexpr auto kCalibration = std::chrono::milliseconds(100);  // it holds the mutex; defaults stand in for the rest

// Slots small enough to overlap gather, wire and scatter, large enough that their messages cost nothing.
uint32_t slot_bytes(const Limits& limits) {
  return static_cast<uint32_t>(std::clamp(limits.chunk_bytes, kLeastSlotBytes, kMostSlotBytes) & ~uint64_t{63});
}
uint32_t slot_count(const Limits& limits) {
  return static_cast<uint32_t>(
      std::clamp<uint64_t>(limits.staging_bytes / slot_bytes(limits), kLeastSlots, kMostSlots));
}

}  // namespace

Arena::Arena(const Hub& hub, uint32_t count, uint32_t bytes)
    : slots(count),
      slot_bytes(bytes),
      memory(std::make_unique<std::byte[]>((size_t{2} * count + 1) * bytes + size_t{kMessageSlots} * kMessageBytes)) {
  const size_t inbound_bytes = (size_t{slots} + 1) * slot_bytes, outbound_bytes = size_t{slots} * slot_bytes;
  for (const auto& port : hub.ports) {
    written.push_back(port->register_host(memory.get(), inbound_bytes, true));
    read.push_back(port->register_host(memory.get() + inbound_bytes,
                                       outbound_bytes + size_t{kMessageSlots} * kMessageBytes, false));
  }
}

RdmaLink::RdmaLink(Hub& hub, const Link& link, sys::UniqueFd side, std::vector<NicPair> pairs, size_t their_ports)
    : hub_(hub),
      peer_(link.peer),
      role_(link.role),
      side_(std::move(side)),
      arena_(hub, slot_count(hub.context.limits), slot_bytes(hub.context.limits)),
      their_ports_(their_ports),
      inbound_(hub, link.peer, arena_.inbound(), arena_.slots, arena_.slot_bytes),
      chunks_(arena_.slots) {
  const std::lock_guard lock(hub_.mutex);
  for (NicPair& pair : pairs)
    for (uint32_t i = 0; i < hub_.context.rdma.queue_pairs; ++i) {
      Port& port = *hub_.ports[pair.local];
      rails_.push_back(std::make_unique<Rail>(static_cast<uint32_t>(rails_.size()), port, pair, hub_.context.rdma));
      rails_.back()->open();
    }
  for (const auto& port : hub_.ports) port->add_link();
  hub_.links.push_back(this);
}

RdmaLink::~RdmaLink() {
  if (started_) hub_.unwatch(side_.get());
  const std::lock_guard lock(hub_.mutex);
  rails_.clear();  // destroys the queue pairs: after this nothing of either end lands
  std::erase(hub_.links, this);
  for (const auto& port : hub_.ports) port->drop_link();
}

Hello RdmaLink::hello() {
  Hello hello;
  for (const auto& rail : rails_) hello.rails.push_back(rail->address());
  hello.staging = reinterpret_cast<uint64_t>(arena_.inbound());
  hello.slots = arena_.slots;
  hello.slot_bytes = arena_.slot_bytes;
  for (const MemoryKey& key : arena_.written) hello.rkeys.push_back(key.remote());
  return hello;
}

void RdmaLink::start(const Hello& theirs) {
  const std::lock_guard lock(hub_.mutex);
  theirs_ = theirs;
  std::string reasons;
  size_t failed = 0;
  for (size_t i = 0; i < rails_.size(); ++i) {
    try {
      rails_[i]->connect(theirs.rails[i]);
    } catch (const Error& error) {
      ++failed;
      reasons += (reasons.empty() ? "" : "; ") + std::string(error.what());
      rails_[i]->state = Rail::State::kConnecting;
      doom(*rails_[i], error.at("ibv_modify_qp failed"));
    }
  }
  if (failed == rails_.size()) throw Error(Code::kUnavailable, reasons);
}

void RdmaLink::begin() {
  hub_.watch(side_.get());
  const std::lock_guard lock(hub_.mutex);
  started_ = true;
  for (const auto& rail : rails_)
    if (rail->state == Rail::State::kConnecting) probe(*rail);
}

bool RdmaLink::advance() {
  const std::lock_guard lock(hub_.mutex);
  hub_.drain();
  progress(true);
  return established_ = usable();
}

// What one request more, one byte more and one byte copied cost here, measured while the link is new and idle: the
// quickest of several turns, since whatever disturbs one only adds to it, and could hide a request's cost altogether.
void RdmaLink::calibrate(Deadline deadline) {
  const std::lock_guard lock(hub_.mutex);
  Rail* rail = choose();
  if (rail == nullptr) return;
  deadline = std::min(deadline, Clock::now() + kCalibration);
  const auto timed = [&](uint32_t requests, uint32_t bytes) {
    // Into the slot that nobody reads: a trial that was given up may land when the others are in use.
    const uint64_t beyond = theirs_.staging + uint64_t{theirs_.slots} * theirs_.slot_bytes;
    Work work{Work::Kind::kProbe, nullptr, 0, kArena, kStaging, beyond, bytes, 1, {}};
    work.piece[0] = {reinterpret_cast<uint64_t>(arena_.outbound(0)), bytes};
    const std::optional<Keys> keys = keys_for(work, *rail);
    const std::vector<Work> works(requests, work);
    const std::vector<Keys> all(requests, *keys);
    const auto begin = Clock::now();
    for (uint32_t posted = 0; posted < requests;) {
      const uint32_t taken = rail->post(std::span(works).subspan(posted), std::span(all).subspan(posted));
      if (taken == 0) return -1.0;
      posted += taken;
    }
    while (rail->up() && rail->outstanding() > 0) {
      if (Clock::now() > deadline) return -1.0;
      if (!hub_.drain()) std::this_thread::yield();  // a device that is software needs the CPU too
    }
    return std::chrono::duration<double, std::nano>(Clock::now() - begin).count();
  };
  constexpr uint32_t kFew = 8, kMany = 80, kLarge = 2;  // few and many fit in a send queue
  const uint32_t slot = std::min(arena_.slot_bytes, theirs_.slot_bytes);
  struct Trial {
    uint32_t requests, bytes;
    double best = 1e12;  // never measured
    bool measured() const { return best < 1e12; }
  };
  Trial few{kFew, 64}, many{kFew + kMany, 64}, large{kLarge, slot};
  for (int turn = 0; turn < kTurns && Clock::now() < deadline; ++turn)
    for (Trial* trial : {&few, &many, &large})
      if (const double ns = timed(trial->requests, trial->bytes); ns > 0) trial->best = std::min(trial->best, ns);
  if (few.measured() && many.measured() && many.best > few.best)
    rates_.request_ns = std::max(20.0, (many.best - few.best) / kMany);
  const double once_ns = few.measured() ? few.best / kFew : 0;
  if (few.measured() && large.measured())
    rates_.byte_ns = std::max(0.01, (large.best - once_ns) / (double(kLarge) * slot));

  PagedCopy copy;
  constexpr uint32_t kPage = 1024;
  copy.pairs.push_back({1, 1, 0, 0, kPage, kPage, kPage});
  for (uint32_t i = 0; i < slot / kPage; ++i) copy.runs.push_back({(i * 7) % (slot / kPage), i, 1});
  if (copy.runs.empty()) return;
  copy.seal();
  std::array<std::byte*, 1> src{arena_.outbound(0)}, dst{arena_.outbound(1)};
  double best = 1e12;
  for (int repeat = 0; repeat < 3; ++repeat) {
    Cursor cursor;
    const auto begin = Clock::now();
    hub_.context.copy(copy, cursor, copy.bytes, src, dst);
    best = std::min(best, std::chrono::duration<double, std::nano>(Clock::now() - begin).count());
  }
  rates_.copied_ns = best / static_cast<double>(copy.bytes);
  rates_.chunk_ns = once_ns + best + slot * rates_.byte_ns / 2;
}

void RdmaLink::import_region(const Region& region, ByteView key) {
  RegionKey decoded = decode_region_key(key, their_ports_);
  const std::lock_guard lock(hub_.mutex);
  imported_[region.id] = {region.buffer.bytes, std::move(decoded)};
}

void RdmaLink::forget_region(RegionId region) {
  const std::lock_guard lock(hub_.mutex);
  if (imported_.erase(region) > 0) ++hub_.epoch;  // batches that use it are checked again, and refused
}

Status RdmaLink::lost() const {
  const std::lock_guard lock(hub_.mutex);
  return lost_;
}

std::string RdmaLink::describe() const {
  const std::lock_guard lock(hub_.mutex);
  size_t up = 0;
  std::string ways;
  for (const auto& rail : rails_) {
    up += rail->up() ? 1 : 0;
    if (rail->index % std::max(1u, hub_.context.rdma.queue_pairs) != 0) continue;
    ways += (ways.empty() ? "" : "; ") + rail->pair.why;
    if (!rail->up() && !rail->why.ok()) ways += " [down: " + rail->why.to_string() + "]";
  }
  std::map<std::string, size_t> registered;
  for (const auto& [id, region] : hub_.regions) ++registered[region.how];
  std::string regions;
  for (const auto& [how, count] : registered)
    regions += (regions.empty() ? "; regions here: " : ", ") + std::to_string(count) + " " + how;
  char text[320];
  std::snprintf(
      text, sizeof text,
      "%zu of %zu queue pairs up, %llu failures; copies: %llu direct, %llu packed; measured %.0f ns a request, "
      "%.2f GB/s on the wire, %.2f GB/s gathered; last copy: %llu requests, direct %.0f us, packed %.0f us (%s)",
      up, rails_.size(), static_cast<unsigned long long>(failovers_), static_cast<unsigned long long>(direct_copies_),
      static_cast<unsigned long long>(packed_copies_), rates_.request_ns, 1 / rates_.byte_ns, 1 / rates_.copied_ns,
      static_cast<unsigned long long>(last_.requests), last_.direct_ns / 1000, last_.packed_ns / 1000,
      hub_.context.rdma.path == RdmaOptions::Path::kAuto ? "the cheaper is taken" : "set by the path option");
  return ways + "; " + text + regions;
}

}  // namespace pdxfer::transport::rdma
