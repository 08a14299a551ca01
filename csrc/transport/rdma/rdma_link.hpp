// RdmaLink: the Peer of rdma. It posts extents (direct) or packed chunks over its rails, sends small messages in order
// over one of them, and repairs what breaks over a side connection (TCP). Everything under the transport's mutex.
//
// Nothing is promised that another end did not confirm: a batch's END is sent when every request of it was
// acknowledged, whatever rail carried it, and a rail that died is replaced only when both ends have fenced it.
// rdma_link.cpp: batches; rdma_messages.cpp: messages; rdma_recovery.cpp: rails.
#pragma once

#include <deque>

#include "sys/fd.hpp"
#include "transport/rdma/rdma_cost.hpp"
#include "transport/rdma/rdma_inbound.hpp"

namespace pdxfer::transport::rdma {

inline constexpr uint32_t kMessageSlots = 64;     // messages not yet acknowledged by the wire
inline constexpr uint32_t kMessageWindow = 48;    // messages not yet processed by the other end
inline constexpr uint32_t kCreditEvery = 12;      // processed messages after which a silent end says so
inline constexpr RegionId kArena = UINT32_MAX;    // Work::src of staging slots and messages
inline constexpr RegionId kStaging = UINT32_MAX;  // Work::dst of the peer's staging slots

struct OutBatch {
  struct CopyState {
    uint64_t epoch = 0;
    bool decided = false, packed = false;
    PagedCopy stream;  // packed: the copy into the stream of its bytes
    std::vector<std::byte*> src, dst;
  };
  BatchId id = 0;
  const TransferPlan* plan = nullptr;
  std::vector<CopyState> copies;
  uint64_t outstanding = 0;  // requests and chunks that are not through
  uint32_t strikes = 0;      // queue pairs that broke with a request of it in front
  bool touched = false, ended = false, end_sent = false, over = false;
  Clock::time_point begun{};  // of the first copy
  uint64_t number = 0;        // counted by the link
  uint64_t direct_requests = 0;
  bool alone = false, packed = false;  // nothing else was under way when it began; some of it went packed
  Status given_up;
  std::optional<uint64_t> tag;
  Bytes tail;
};

// The memory of a link that devices see: slots the other end fills and one more for its trials, which nobody reads;
// slots we gather into; messages.
struct Arena {
  Arena(const Hub& hub, uint32_t slots, uint32_t slot_bytes);  // throws Error(kUnavailable)
  std::byte* inbound() const noexcept { return memory.get(); }
  std::byte* outbound(uint64_t chunk) const noexcept { return memory.get() + (slots + 1 + chunk % slots) * slot_bytes; }
  std::byte* message(uint64_t number) const noexcept {
    return memory.get() + (size_t{2} * slots + 1) * slot_bytes + number % kMessageSlots * kMessageBytes;
  }
  const uint32_t slots, slot_bytes;
  std::unique_ptr<std::byte[]> memory;
  std::vector<MemoryKey> written, read;  // by port: the inbound slots, the rest
};

class RdmaLink final : public Peer {
 public:
  // `pairs` in the order of the connecting end; queue pairs are opened, not yet connected. Throws Error.
  RdmaLink(Hub& hub, const Link& link, sys::UniqueFd side, std::vector<NicPair> pairs, size_t their_ports);
  ~RdmaLink() override;

  Hello hello();
  void start(const Hello& theirs);  // connects the queue pairs; throws Error(kUnavailable)
  void begin();                     // the other end is ready too: probe
  bool advance();                   // one turn of set-up; true once a rail was found to work
  void calibrate(Deadline deadline);

  void import_region(const Region& region, ByteView key) override;
  void forget_region(RegionId region) override;
  Status submit(BatchId batch, const TransferPlan& plan, uint32_t copy_index, Cursor& cursor) override;
  bool notify(BatchId batch, std::optional<uint64_t> tag, ByteView tail) override;
  void cancel(BatchId batch) override;
  Status lost() const override;
  std::string describe() const override;

  // Called by the hub, which holds the mutex.
  bool owns(const Rail& rail) const noexcept { return rail.index < rails_.size() && rails_[rail.index].get() == &rail; }
  void on_message(ByteView message);
  void on_completion(Rail& rail, const shim::IbvWc& wc);
  void progress(bool side_ready);
  size_t take_completions(std::span<Completion> out);

 private:
  struct Imported {
    uint64_t bytes = 0;
    RegionKey key;
  };
  struct Chunk {
    OutBatch* batch = nullptr;
    MessageHeader announcement;
    bool written = false;
  };
  struct Pending {
    MessageHeader header;
    Bytes body;
  };

  // rdma_link.cpp
  OutBatch& open(BatchId batch, const TransferPlan* plan);
  Status check(OutBatch& out, uint32_t copy_index, const Cursor& cursor);
  void decide(OutBatch& out, OutBatch::CopyState& state, const PagedCopy& copy);
  void learn(const OutBatch& out);
  Rail* choose() noexcept;
  void submit_direct(OutBatch& out, const PagedCopy& copy, Cursor& cursor);
  uint32_t unroll(OutBatch& out, const PagedCopy& copy, Cursor cursor, const Rail& rail, uint32_t limit);
  void submit_packed(OutBatch& out, uint32_t copy_index, Cursor& cursor);
  std::optional<Keys> keys_for(const Work& work, const Rail& rail) const noexcept;
  void work_done(const Work& work);
  Status give_up(OutBatch& out, Status why);
  void finish(OutBatch& out, Status status);
  void settle(OutBatch& out);

  // rdma_messages.cpp
  void enqueue(MessageType type, BatchId batch, std::span<const uint32_t> words, std::span<const uint64_t> longs,
               ByteView body);
  void send_plan(const OutBatch& out, uint32_t copy_index);
  void send_end(OutBatch& out);
  void announce();
  void pump();
  bool post_message(Rail& rail);
  void on_ack(const MessageHeader& header);

  // rdma_recovery.cpp
  void side_io();
  void on_frame(const Frame& frame);
  void send_frame(FrameType type, const Rail& rail, QpAddress qp = {});
  void doom(Rail& rail, Status why);
  void tear_down(Rail& rail);
  void reopen(Rail& rail, const Frame* offer);
  void probe(Rail& rail);
  void look_after_rails();
  void bound_rails(Clock::time_point now);
  void bound_outage(Clock::time_point now);
  void repost();
  bool fencing() const noexcept;
  bool usable() const noexcept;
  Status why_down() const;
  void die(Status why);

  Hub& hub_;
  const PeerId peer_;
  const Role role_;
  sys::UniqueFd side_;
  Arena arena_;
  const size_t their_ports_;
  std::vector<std::unique_ptr<Rail>> rails_;
  std::vector<Rail*> doomed_;
  Inbound inbound_;
  Hello theirs_;
  bool started_ = false, established_ = false;
  Status lost_;
  Clock::time_point outage_since_{}, fruitless_since_{};  // no rail is up; rails fail and nothing gets through
  Bytes side_in_, side_out_;

  std::unordered_map<RegionId, Imported> imported_;
  std::unordered_map<BatchId, std::unique_ptr<OutBatch>> batches_;
  std::deque<Completion> ready_;
  std::deque<Work> retry_;
  std::array<Work, kMaxChain> works_;
  std::array<Keys, kMaxChain> keys_;
  std::array<Cursor, kMaxChain> after_;

  std::vector<Chunk> chunks_;                        // by slot
  uint64_t chunks_made_ = 0, chunks_announced_ = 0;  // counted from the first
  uint32_t chunks_freed_ = 0;                        // as the other end counts, modulo 2^32
  std::deque<Pending> pending_;
  uint64_t messages_made_ = 0, messages_posted_ = 0, messages_acked_ = 0;  // in slots
  std::array<uint32_t, kMessageSlots> message_bytes_{};
  Rail* message_rail_ = nullptr;
  uint32_t counted_ = 0, their_consumed_ = 0;  // messages sent that want credit; processed there
  uint32_t next_expected_ = 0, consumed_ = 0, told_consumed_ = 0, told_chunks_ = 0;
  Rates rates_;
  RequestCost request_cost_;
  uint64_t opened_ = 0, live_ = 0;  // batches so far; those not over
  uint64_t direct_copies_ = 0, packed_copies_ = 0, failovers_ = 0;
  Estimate last_;
};

}  // namespace pdxfer::transport::rdma
