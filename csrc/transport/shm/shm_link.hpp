// ShmLink: one end of a shm connection, and Core: what the links of one transport share.
//
// Threads. The worker calls submit, notify, cancel and take; the transport's poll thread (pdx-shm-poll) receives every
// message and calls receive; set-up threads call import, forget and revoke. One mutex per link guards its tables and
// is never held during a copy. Order of locks: Core::links.mutex, ShmLink's mutex, Core::regions_mutex.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <unordered_map>
#include <vector>

#include "sys/shared_memory.hpp"
#include "transport/local/links.hpp"
#include "transport/shm/shm_cma.hpp"
#include "transport/shm/shm_export.hpp"
#include "transport/shm/shm_handshake.hpp"
#include "transport/shm/shm_key.hpp"
#include "transport/stream/stream_hub.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport::shm {

class ShmLink;

struct LocalRegion {
  Buffer buffer;
  std::vector<sys::Segment> segments;  // empty: not shared
};

struct Core {
  explicit Core(Context c) : context(std::move(c)) {}

  const Context context;

  std::mutex regions_mutex;
  std::unordered_map<RegionId, LocalRegion> regions;
  std::atomic<uint64_t> generation{1};  // of `regions`

  local::Links<ShmLink> links;
  bool populate = false;  // poll thread: links have mapped regions to enter into the page tables

  void wake() const {
    if (context.wake) context.wake();
  }
};

// How bytes get into a region of the other end, best first; a copy uses the worst of its regions'.
enum class Way : uint8_t { kMap, kCma, kStaging };

class ShmLink {
 public:
  // `hub` makes the staged half when the connection has rings; it outlives the link's stop().
  ShmLink(std::shared_ptr<Core> core, PeerId peer, Connection connection, stream::StreamHub& hub);

  // Set-up threads.
  void start(std::shared_ptr<ShmLink> self);  // from here on messages are received
  void stop() noexcept;
  void import(const Region& region, const Key& key);
  void forget(RegionId region);
  // Ask the other end to let go of a region of ours; then wait until it did. A link that does not answer is closed.
  void ask_back(RegionId region);
  void wait_back(RegionId region, Deadline deadline);
  void wait_for_copy();  // until no copy that began before this call is running

  // Worker.
  Status submit(BatchId batch, const TransferPlan& plan, uint32_t copy_index, Cursor& cursor);
  bool notify(BatchId batch, std::optional<uint64_t> tag, ByteView tail);
  void cancel(BatchId batch);
  size_t take(std::span<Completion> out);
  Status lost() const;
  std::string describe() const;
  void staged_over(BatchId batch);  // its kSent came out of the hub
  PeerId peer() const noexcept { return peer_; }

  // Poll thread.
  void receive();
  void process_exited();
  // Enter a piece of the mapped regions into the page tables; false when all of them are.
  bool populate();

 private:
  struct Import {
    Region region;
    Way way = Way::kCma;
    bool waiting = false;  // for the owner's kSegments
    MappedRegion mapped;
    uint64_t populated = 0;  // bytes of `mapped`, from the first page on
    std::string reason;      // why not a better way
    Status refused;          // no way at all
  };
  // One copy of a batch with its addresses looked up, good for one state of the region tables.
  struct Prepared {
    uint64_t local_generation = 0, import_generation = 0;
    Way way = Way::kMap;
    bool waiting = false;
    std::vector<std::byte*> src, dst;
  };
  enum class Route : uint8_t { kUndecided, kDirect, kStaged };
  struct Batch {
    Route route = Route::kUndecided;
    bool ended = false;  // kEnd is sent
    bool over = false;   // its kSent is queued
    Status status;
    std::vector<Prepared> copies;
  };

  Route choose_route(const TransferPlan& plan) const;
  Status prepare(Batch& batch, const TransferPlan& plan, uint32_t copy_index, const Cursor& cursor);
  Status look_up(const PagedCopy& copy, Prepared& out);
  Status move(const PagedCopy& copy, Cursor& cursor, const Prepared& prepared) noexcept;
  void end_copy();
  Status finish(BatchId id, Batch& batch, Status status);
  void complete(Completion completion);
  void lose(Status why);
  // See Outbox::post: now or, when the socket is full, by the poll thread.
  void post(const Header& header, ByteView body = {}, std::vector<int> fds = {},
            std::shared_ptr<const void> owner = {});
  void flush();
  void handle(const Header& header, ByteView body, const std::vector<sys::UniqueFd>& fds);
  void handle_want(RegionId region);
  void handle_segments(const Header& header, ByteView body, const std::vector<sys::UniqueFd>& fds);
  void handle_end(const Header& header, ByteView tail);
  void give_back(RegionId region);
  void go_without(Import& import, std::string reason);
  Way second_best() const noexcept;
  int exit_fd() const noexcept { return connection_.cma ? connection_.cma->exit_fd() : -1; }

  const std::shared_ptr<Core> core_;
  const PeerId peer_;
  Connection connection_;
  uint64_t number_ = 0;                      // in Core::links
  RingChannel* ring_ = nullptr;              // the staged half's, until stop()
  std::unique_ptr<transport::Peer> staged_;  // batches with a region that nothing better reaches; null without rings

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::unordered_map<RegionId, Import> imports_;
  uint64_t import_generation_ = 1;
  std::set<RegionId> gone_;        // asked back before they were imported
  std::set<RegionId> asked_back_;  // of ours, unanswered
  std::unordered_map<BatchId, Batch> batches_;
  std::deque<Completion> ready_;
  std::atomic<size_t> ready_count_{0};
  local::Outbox<Type> outbox_;
  bool copying_ = false;
  uint64_t copies_done_ = 0;
  std::vector<RegionId> give_back_later_;  // asked back during a copy
  Status lost_;
  Bytes inbox_;  // poll thread
};

}  // namespace pdxfer::transport::shm
