// DeviceCopier: core's DeviceCopy by the kernels of pack/paged_copy.cu and the copy engine. Made by the engine's
// factory; one thread at a time; owns a low-priority stream, a ring of tables and a ring of events.
#pragma once

#include <chrono>
#include <vector>

#include "core/device_copy.hpp"
#include "pack/device_kernels.hpp"
#include "pack/engine_choice.hpp"
#include "pack/paged_copy_args.hpp"
#include "pack/table_ring.hpp"
#include "sys/cuda_stream.hpp"

namespace pdxfer::pack {

// Measured on NVLink 4 (docs/design/cuda_ipc.md): what more blocks add beyond these is little.
inline constexpr unsigned kDefaultBlocks = 12;
// A block sums some 30 GB/s: so many keep up with the link, and so many read twice as fast as it.
inline constexpr unsigned kSummingBlocks = 16, kReadingBlocks = 32;
// PCIe, to a slot of host memory or from one, is full with these, of which a piece takes half: two overlap.
inline constexpr unsigned kBufferBlocks = 8;
inline constexpr unsigned kClusterBlocks = 4;  // launched next to one another, where the device can
// The copy engine is ahead of the kernel, unless EngineChoice learns otherwise, with runs from the first size on where
// it is given many in one call, else from the second on.
inline constexpr uint64_t kBatchedRun = 1 << 20;
inline constexpr uint64_t kEngineBytes = 16 << 20;
inline constexpr size_t kMostBatched = 256;
// The driver takes 0.5 to 1.3 us for a copy of a batch, and none of them begins before it has taken all: what the
// kernel moves meanwhile.
inline constexpr uint64_t kLeadPerCopy = 512 << 10;
// With fewer tiles for each warp than this, asking for them costs more than unequal shares.
inline constexpr uint64_t kTilesToHandOut = 16;

class DeviceCopier final : public DeviceCopy {
 public:
  static constexpr uint64_t kMaxWords = (1u << 31) - 1;  // what a kernel counts; see Divisor

  // Throws Error(kUnavailable).
  DeviceCopier(int ordinal, const DeviceCopyOptions& options);
  ~DeviceCopier() override;

  Status prepare(const PagedCopy& copy, DeviceForm form, std::span<const uint64_t> src, std::span<const uint64_t> dst,
                 DeviceTables& tables) noexcept override;
  void release(DeviceTables tables) noexcept override;
  Status launch(DeviceTables tables, const PagedCopy& copy, Cursor& cursor, uint64_t budget, uint64_t buffer,
                DeviceTicket& ticket) noexcept override;
  Status done(DeviceTicket ticket, bool& over) noexcept override;
  uint64_t sum(DeviceTicket ticket) const noexcept override;
  uint64_t landed(DeviceTicket ticket) const noexcept override;
  bool tells() const noexcept override { return tells_; }
  std::string describe() const override;

 private:
  struct Part {  // of a piece: one kernel
    uint64_t bytes = 0;
    unsigned log2_word = 0;
    bool beside = false;  // on the second stream
    bool whole = false;   // nothing else is of the piece,
    bool last = false;    // or nothing after it
  };
  struct Launched {  // of one piece
    uint64_t bytes = 0;
    bool by_engine = false;  // some of it
    bool told = false;       // its last kernel tells the progress
    bool led = false;        // a kernel begins it, and it ends on the second stream
  };
  struct Told {
    uint32_t tiles = 0, log2_word = 0;
    uint64_t bytes = 0;
  };
  struct Timed {  // the latest large piece that found nothing else under way
    DeviceTicket ticket = 0;
    EngineChoice::Way way{};
    uint64_t bytes = 0;
    std::chrono::steady_clock::time_point since;
  };

  Status fail(shim::CuResult result, const char* what) noexcept;
  Status fail_engine(shim::CuResult result, const char* what) noexcept;
  bool in_batches(const TableRing::Entry& entry, const PagedCopy& copy) const noexcept;
  uint64_t kernel_lead(const PagedCopy& copy, Cursor cursor, uint64_t budget) const noexcept;
  Part next_part(const TableRing::Entry& entry, const PagedCopy& copy, const Cursor& cursor, uint64_t budget,
                 uint64_t buffer) const noexcept;
  uint64_t bytes_left(const TableRing::Entry& entry, const PagedCopy& copy, const Cursor& cursor) const noexcept;
  Status launch_parts(TableRing::Entry& entry, const PagedCopy& copy, Cursor& cursor, uint64_t budget, uint64_t buffer,
                      Launched& piece) noexcept;
  bool told(DeviceTicket ticket) const noexcept;
  void have_progress_told(PagedCopyArgs& args) const noexcept;
  Status tell_progress(DeviceTicket ticket, shim::CuStream stream) noexcept;
  Status follow(shim::CuEvent event, shim::CuStream before, shim::CuStream stream) noexcept;
  Status start_engine(const TableRing::Entry& entry, const PagedCopy& copy, Cursor& cursor, uint64_t budget,
                      uint64_t least, shim::CuStream stream, uint64_t& moved) noexcept;
  Status start_kernel(TableRing::Entry& entry, const PagedCopy& copy, const Cursor& cursor, const Part& part,
                      uint64_t buffer) noexcept;
  shim::CuResult launch_kernel(shim::CuFunction kernel, unsigned blocks, shim::CuStream stream,
                               void** parameters) noexcept;
  void write_slots(TableRing::Entry& entry, const PagedCopy& copy) noexcept;
  Status upload(TableRing::Entry& entry) noexcept;
  void hand_out_tiles(PagedCopyArgs& args, unsigned blocks, bool beside) noexcept;
  bool beside(const TableRing::Entry& entry) const noexcept;  // where the next piece is launched
  uint64_t slots_before(const TableRing::Entry& entry, const Cursor& cursor) const noexcept;
  size_t report_bytes() const noexcept;
  PieceReport* report_of(DeviceTicket ticket) const noexcept;
  void tell_shares(PagedCopyArgs& args, const Part& part) noexcept;
  const DevicePair* pairs_of(const TableRing::Entry& entry) const noexcept;

  const DeviceCopyOptions options_;
  DeviceKernels kernels_;
  unsigned blocks_ = 0, reading_blocks_ = 0;
  bool clusters_ = false;
  // beside_ has the copy engine's part of a piece that the kernel begins, and every second piece through a buffer: the
  // end of one and the beginning of the next then overlap.
  sys::CudaStream stream_, beside_;
  TableRing ring_;
  sys::PinnedMemory host_tables_;
  sys::CudaMemory device_tables_;
  // What the counters will stand at when all that was launched is over; they wrap, as these do. One for each stream, as
  // kernels of one stream follow one another.
  uint32_t tiles_given_[2] = {};
  sys::CudaMemory tiles_taken_;                 // the counters
  sys::CudaMemory blocks_over_;                 // PagedCopyArgs::blocks_over
  sys::CudaEvent fork_, join_;                  // where beside_ waits for stream_, and stream_ for beside_
  std::vector<sys::CudaEvent> events_;          // of the latest pieces, by ticket,
  std::vector<bool> on_beside_;                 // and which of the two streams each is in order with
  std::unique_ptr<sys::PinnedMemory> reports_;  // with options_.checksum: of the latest pieces,
  std::vector<Told> told_;                      // and what those are of that tell their shares,
  std::unique_ptr<sys::CudaMemory> landing_;    // which they count here
  std::vector<shim::CuDevicePtr> from_, to_;    // scratch: copies of a batch,
  std::vector<size_t> sizes_;                   // and their bytes
  EngineChoice choice_;
  Timed timed_;
  bool tells_ = false;
  bool engine_ = false;               // may what is being launched use the copy engine?
  bool engine_refused_ = false;       // the driver did not take a copy of it
  uint64_t launched_ = 0, done_ = 0;  // tickets
  Status error_;
};

}  // namespace pdxfer::pack
