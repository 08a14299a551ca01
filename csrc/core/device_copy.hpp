// DeviceCopy: the seam to copies that a GPU makes. pack implements it, the engine hands a factory to transports through
// transport::Context::device_copy, because transport may not include pack. Addresses are the device's (unified
// addressing): its own memory, a peer's memory mapped here, or pinned host memory.
//
// One object belongs to one thread at a time and has low-priority streams of its own. Pieces from slots to slots run in
// the order of their launch; those through a buffer may overlap. Nothing here waits for the device, allocates or throws
// after set-up, but the destructor, which waits (bounded) for what was launched.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "core/types.hpp"

namespace pdxfer {

// What a piece of a copy reads and writes.
enum class DeviceForm : uint8_t {
  kPaged,    // slots to slots
  kGather,   // slots to one contiguous buffer, in canonical order from the cursor on
  kScatter,  // one contiguous buffer to slots, likewise
  kSum,      // the destination's slots, which are read for their checksum and not written
};

using DeviceTicket = uint64_t;  // one launched piece; 0: none
using DeviceTables = uint64_t;  // one copy's tables on the device; 0: none

struct DeviceCopyOptions {
  uint32_t blocks = 0;           // thread blocks of a piece at most, each on a multiprocessor; 0: measured default
  uint64_t table_bytes = 0;      // room for the tables of copies in flight, pinned and on the device; 0: default
  uint32_t pieces = 64;          // in flight at most
  bool copy_engine = true;       // long contiguous runs by the copy engine in place of a kernel
  bool checksum = false;         // pieces of kPaged and kSum are summed, so the kernel moves all of them
  uint32_t* progress = nullptr;  // pinned memory that outlives the copies: see tells()
  std::function<void()> wake{};  // when set: called, on a thread of the driver, after each piece; must not call CUDA
};

class DeviceCopy {
 public:
  virtual ~DeviceCopy() = default;

  // The tables of `copy` for launches of this form, good for all its pieces; src[i] and dst[i] are where the regions of
  // pair i begin. kGather ignores dst, kScatter and kSum src (they may be empty). Ok with tables == 0: no room now, so
  // release others or wait for pieces, then try again; kInvalid: larger than the room will ever be.
  virtual Status prepare(const PagedCopy& copy, DeviceForm form, std::span<const uint64_t> src,
                         std::span<const uint64_t> dst, DeviceTables& tables) noexcept = 0;
  // No launch uses them from now on; pieces under way may.
  virtual void release(DeviceTables tables) noexcept = 0;

  // Starts the piece of at most `budget` bytes at the cursor and moves the cursor over it. `copy` is what prepare was
  // given. `buffer` is the contiguous side of kGather and kScatter, best 16-byte aligned. Ok with ticket == 0 and the
  // cursor where it was: no room now, poll, then try again. A device error is final for this object (kInternal with the
  // driver's code): every later call returns it, and nothing more is written once done() said so for a piece.
  virtual Status launch(DeviceTables tables, const PagedCopy& copy, Cursor& cursor, uint64_t budget, uint64_t buffer,
                        DeviceTicket& ticket) noexcept = 0;

  // Are this piece and those before it over? Their writes are then visible to the whole system. Ok and !over: not yet.
  virtual Status done(DeviceTicket ticket, bool& over) noexcept = 0;

  // The checksum of a piece that is over, as long as no more than `pieces` were launched since: of what it read, by its
  // place in the copy (pack/checksum.hpp), so the sums of a copy's pieces add up (modulo 2^64) to the same at both
  // ends, however each cuts it. 0 without DeviceCopyOptions::checksum.
  virtual uint64_t sum(DeviceTicket ticket) const noexcept = 0;

  // At least so many bytes of the piece, from its beginning on, are in place and visible to the whole system: told
  // while it is under way, so that the other end may begin to look at them. 0 without DeviceCopyOptions::checksum.
  virtual uint64_t landed(DeviceTicket ticket) const noexcept = 0;

  // Is the lower half of each kPaged piece's ticket written to DeviceCopyOptions::progress when that piece and those
  // before it are over, so that whoever can read the word knows without asking the driver? False where the driver
  // cannot; asked after a launch, it is true of that piece.
  virtual bool tells() const noexcept = 0;

  // "16 blocks, copy engine from 1 MiB runs, ...": for explain().
  virtual std::string describe() const = 0;
};

// Throws Error(kUnavailable) with the reason: no driver, no such device, no device code for it.
using DeviceCopyFactory = std::function<std::unique_ptr<DeviceCopy>(int ordinal, const DeviceCopyOptions& options)>;

}  // namespace pdxfer
