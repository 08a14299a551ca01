// CudaLink: one end of a cuda_ipc connection, and Core: what the links of one transport share.
//
// Threads. The worker calls submit, notify, cancel and take; the transport's poll thread (pdx-gpu-poll) receives
// messages while nothing is under way, the worker itself while something is; set-up threads call import, forget and
// revoke. One mutex per link guards all of it, the device copies too; no call under it waits for the device.
// Order of locks: Core::links.mutex, CudaLink's mutex, Core::regions_mutex.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

#include "core/cuda_options.hpp"
#include "transport/cuda_ipc/cuda_ipc_handshake.hpp"
#include "transport/cuda_ipc/cuda_ipc_memory.hpp"
#include "transport/cuda_ipc/cuda_ipc_verifier.hpp"
#include "transport/local/links.hpp"
#include "transport/stream/stream_hub.hpp"

namespace pdxfer::transport::cuda_ipc {

class CudaLink;

// After a message or a piece the worker goes on polling for this long: waking a sleeping thread costs as much as moving
// some megabytes.
inline constexpr auto kHotTime = std::chrono::microseconds(1000);

struct Core {
  explicit Core(Context c) : context(std::move(c)), options(CudaOptions::parse(context.cuda)) {}

  const Context context;
  const CudaOptions options;

  std::mutex regions_mutex;
  std::shared_ptr<const sys::CudaContext> device;  // of the first region; one per transport
  int ordinal = kHost;
  std::unordered_map<RegionId, ExportedRegion> regions;
  std::atomic<uint64_t> generation{1};  // of `regions`

  local::Links<CudaLink> links;

  void wake() const {
    if (context.wake) context.wake();
  }
};

class CudaLink {
 public:
  // `hub` makes the staged half; it outlives the link's stop().
  CudaLink(std::shared_ptr<Core> core, PeerId peer, Connection connection, stream::StreamHub& hub);

  // Set-up threads.
  void start(std::shared_ptr<CudaLink> self);  // from here on messages are received
  void stop() noexcept;
  void import(const Region& region, Key key);
  void forget(RegionId region);
  void ask_back(RegionId region);                      // ask the other end to let go of a region of ours,
  void wait_back(RegionId region, Deadline deadline);  // and wait until it did: a link that does not answer is closed
  void wait_for_pieces(Deadline deadline);             // until no piece that was launched before this call is running

  // Worker.
  Status submit(BatchId batch, const TransferPlan& plan, uint32_t copy_index, Cursor& cursor);
  bool notify(BatchId batch, std::optional<uint64_t> tag, ByteView tail);
  void cancel(BatchId batch);
  size_t take(std::span<Completion> out);
  PeerId peer() const noexcept { return peer_; }
  bool staged_over(BatchId batch, Status status);  // the staged half's kSent was polled; true: it is the batch's
  bool hot(Clock::time_point now) const;           // something is under way that only take() notices
  Status lost() const;
  std::string describe() const;

  // Poll thread.
  void receive();
  void process_exited();
  bool settle();  // answers what waits for the device; true while something does

 private:
  struct Import {
    Region region;
    Key key;
    std::vector<sys::UniqueFd> pieces;  // those that have come
    std::shared_ptr<Mapped> mapped;
    uint64_t address = 0;  // of the region in this process; 0: not yet
    std::string unmapped;  // why it is reached through staging, or, when `refused` says so, not at all
    Status refused;
  };
  enum class Route : uint8_t { kUndecided, kMapped, kStaged };  // of a copy of a batch
  enum class Half : uint8_t { kUnused, kOpen, kEnded, kOver };  // the staged half's part of a batch
  struct Prepared {  // one copy of a batch, for one state of the region tables
    uint64_t local_generation = 0, import_generation = 0;
    DeviceTables tables = 0;
    Route route = Route::kUndecided;
  };
  struct Summed {  // a piece under way of a batch with a checksum
    DeviceTicket ticket = 0;
    BatchId batch = 0;
    uint32_t copy = 0;
    uint64_t bytes = 0, told = 0;  // told: that they are in place
  };
  struct Batch {
    bool begun = false, ended = false;  // kBegin, kEnd are sent
    bool ahead = false;                 // kEnd was, before the bytes are known here to be in place
    bool mapped = false;                // some of its copies are, so this half ends it when the staged one is over
    bool handed_over = false;           // the staged half ends it, and its kSent is the batch's
    Half staged = Half::kUnused;
    bool over = false;     // its kSent is queued
    bool failing = false;  // its kSent follows once nothing of it is under way
    Status status;
    DeviceTicket last = 0;  // its latest piece
    std::vector<Prepared> copies;
    bool announced = false;  // the receiver knows of it by kPlan,
    bool summed = false;     // and has its checksum by kSum
    uint64_t sum = 0;        // of what is over of it
  };

  Status prepare(Batch& batch, const TransferPlan& plan, uint32_t copy_index, const Cursor& cursor, bool& ready);
  bool all_mapped();
  Route choose_route(const PagedCopy& copy);
  Status submit_staged(BatchId id, Batch& batch, const TransferPlan& plan, uint32_t copy_index, Cursor& cursor);
  bool notify_staged(BatchId id, Batch& batch, std::optional<uint64_t> tag, ByteView tail);
  bool still(const Batch& batch);
  Status make_tables(Prepared& prepared, const PagedCopy& copy);
  Status fail(BatchId id, Batch& batch, Status status);
  void settle_batches();
  void finish(BatchId id, Batch& batch, Status status);
  bool over(DeviceTicket ticket);
  void announce(BatchId id, const PagedCopy& copy, uint32_t copy_index);
  void tell_landed();
  void settle_sums();
  bool ends_ahead(const Batch& batch) const;
  void settle_ahead();
  void give_up(BatchId id);
  void settle_awaited();
  void deliver(const Header& end, ByteView tail);
  void make_verifier();
  void handle_checked(const Header& header, ByteView body);
  void complete(Completion completion);
  void keep(const Header& header);  // sent by the next take(), or whoever flushes before
  void wake_worker() const {
    if (!taking_) core_->wake();
  }
  bool busy(Clock::time_point now) const {
    return launched_ != done_ || !ahead_.empty() || now < hot_until_ || (verifier_ && verifier_->busy());
  }
  void read_messages();
  void lose(Status why);
  void device_failed(Status why);
  void post(const Header& header, std::vector<int> fds = {});  // now or, when the socket is full, by who polls
  void acknowledge(BatchId batch, Status status, bool arrived);
  void flush();
  void handle(const Header& header, ByteView body, std::vector<sys::UniqueFd>& fds);
  void handle_want(RegionId region, uint64_t from);
  void handle_pieces(const Header& header, std::vector<sys::UniqueFd>& fds);
  void handle_end(const Header& header, ByteView tail);
  void settle_revoked();
  void map(Import& import);
  void go_without(Import& import, std::string reason);

  const std::shared_ptr<Core> core_;
  const PeerId peer_;
  Connection connection_;
  uint64_t number_ = 0;                      // in Core::links
  stream::Channel* channel_ = nullptr;       // the staged half's, until stop()
  std::unique_ptr<transport::Peer> staged_;  // batches with a region that cannot be mapped

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::shared_ptr<const sys::CudaContext> device_;
  int ordinal_ = kHost;
  std::unique_ptr<DeviceCopy> copier_;
  DeviceTicket launched_ = 0, done_ = 0;
  std::deque<Summed> summed_;           // in the order of their launch
  std::deque<EndAhead> ahead_;          // until they are answered, or the receiver need not look any more
  AwaitedEnds awaited_;                 // the other end's
  std::unique_ptr<Verifier> verifier_;  // with `checksum`, or the peer's first batch that has one
  std::unordered_map<RegionId, Import> imports_;
  uint64_t import_generation_ = 1;
  struct {
    uint64_t local_generation = 0, import_generation = 0;
    bool all = false;
  } mapped_;                         // all_mapped()'s answer, and for which state of the region tables
  std::vector<uint64_t> src_, dst_;  // scratch
  std::set<RegionId> gone_;          // asked back before they were imported
  std::set<RegionId> asked_back_;    // of ours, unanswered
  std::deque<std::pair<Import, DeviceTicket>> giving_back_;  // theirs: answered, and unmapped, when the piece is over
  std::unordered_map<BatchId, Batch> batches_;
  std::deque<Completion> ready_;
  std::atomic<size_t> ready_count_{0};
  local::Outbox<Type> outbox_;
  bool taking_ = false;  // the worker is in take(): it needs no waking
  Clock::time_point hot_until_{};
  Status lost_, broken_;  // broken_: the device failed
  Bytes inbox_;
};

}  // namespace pdxfer::transport::cuda_ipc
