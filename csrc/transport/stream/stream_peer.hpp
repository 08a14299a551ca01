// StreamPeer: the worker's side of a link over streams. It cuts copies into chunks, hands them to the streams with the
// least to do, ends batches, and turns acknowledgements into completions.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "transport/stream/outbound.hpp"
#include "transport/stream/stream.hpp"
#include "transport/stream/stream_hub.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport::stream {

class StreamPeer final : public Peer {
 public:
  StreamPeer(StreamHub& hub, PeerId id, std::vector<std::unique_ptr<Channel>> channels, std::string description,
             std::unique_ptr<SlotRing> ring);
  ~StreamPeer() override;

  void import_region(const Region& region, ByteView key) override;
  void forget_region(RegionId region) override;
  Status submit(BatchId batch, const TransferPlan& plan, uint32_t copy_index, Cursor& cursor) override;
  bool notify(BatchId batch, std::optional<uint64_t> tag, ByteView tail) override;
  void cancel(BatchId batch) override;
  Status lost() const override;
  std::string describe() const override;

  // For StreamHub. Begins to move; throws Error.
  void start();
  size_t poll(std::span<Completion> out);                                  // worker
  void revoke(const IoLoop& loop, RegionId region, const Buffer& buffer);  // that loop's thread

 private:
  struct Entry {
    std::unique_ptr<Outbound> out;
    uint64_t total = 0;  // of the plan
    uint32_t home = 0;   // the stream of a small batch and of one without bytes
  };

  Entry& open(BatchId batch, const TransferPlan* plan);
  bool closed_to(Outbound& out, Status& why);
  Status check(Outbound& out, uint32_t copy_index, const Cursor& cursor);
  uint32_t choose(const Entry& entry);
  void end(Entry& entry);
  Status give_up(Entry& entry, Status why);
  void finish(Outbound& out, Status status);
  void take_events();
  void on_ack(BatchId batch, const Status& status);
  void on_flushed(Outbound& out);
  void kick_all() noexcept;

  StreamHub& hub_;
  LinkState link_;
  const std::string description_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::unordered_map<RegionId, uint64_t> imported_;  // bytes of the other end's regions

  // Worker thread.
  std::unordered_map<BatchId, Entry> batches_;  // until their kSent was polled
  std::deque<Completion> ready_;
  std::vector<LinkEvent> events_;
  uint32_t rotate_ = 0;
  bool dead_ = false;  // every stream is closed and every batch complete
};

}  // namespace pdxfer::transport::stream
