// The progress word that DeviceCopier has written, over the fake driver: by kernels, by the driver, and by neither.
#include <atomic>
#include <climits>
#include <string>
#include <vector>

#include "core/paged_copy.hpp"
#include "device_buffers.hpp"

namespace pdxfer::pack {

TEST_CASE("the progress of pieces is told when they are in place, by their kernels or by the driver") {
  fake_cuda::install();
  fake_cuda::set_delay_us(300);
  constexpr uint64_t kPiece = 16 << 20;  // a run of this size is the engine's
  const Buffers memory(4 * kPiece);
  uint32_t progress = 0;
  const std::atomic_ref told(progress);
  for (const bool engine : {false, true}) {
    CAPTURE(engine);
    DeviceCopier copier(0, {.copy_engine = engine, .progress = &progress});
    CHECK(copier.tells());
    progress = 0;
    std::memset(memory.dst, 0, 4 * kPiece);
    const PagedCopy copy = buffers(1, 4 * kPiece >> 10, [](uint64_t) { return 0; });
    const uint64_t src[] = {reinterpret_cast<uint64_t>(memory.src)}, dst[] = {reinterpret_cast<uint64_t>(memory.dst)};
    DeviceTables tables = 0;
    REQUIRE(copier.prepare(copy, DeviceForm::kPaged, src, dst, tables).ok());
    const unsigned copies = fake_cuda::engine_copies();
    Cursor cursor;
    std::vector<DeviceTicket> tickets;
    while (!at_end(copy, cursor)) {
      REQUIRE(copier.launch(tables, copy, cursor, kPiece, 0, tickets.emplace_back()).ok());
      REQUIRE(tickets.back() == tickets.size());
    }
    CHECK(copier.tells());
    CHECK((fake_cuda::engine_copies() != copies) == engine);
    REQUIRE(tickets.size() == 4);
    for (size_t i = 0; i < tickets.size(); ++i) {
      for (int wait = 0; wait < 100000 && told.load() < tickets[i]; ++wait)
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      REQUIRE(told.load() >= tickets[i]);
      CHECK(std::memcmp(memory.dst + i * kPiece, memory.src + i * kPiece, kPiece) == 0);
    }
    wait_for(copier, tickets.back());
    CHECK(told.load() == tickets.back());
    copier.release(tables);
  }
  fake_cuda::set_delay_us(0);
}

TEST_CASE("a piece of which the copy engine took some is not told before that is in place") {
  fake_cuda::install();
  fake_cuda::set_engine_delay_ms(30);
  constexpr uint64_t kRun = 3 << 19, kPairs = 12;
  const Buffers memory(kPairs * kRun);
  // The kernel begins, and the engine refuses its second copy.
  const PagedCopy copy = buffers(kPairs, kRun >> 10, [](uint64_t) { return 0; });
  const std::vector<uint64_t> src(kPairs, reinterpret_cast<uint64_t>(memory.src));
  const std::vector<uint64_t> dst(kPairs, reinterpret_cast<uint64_t>(memory.dst));
  uint32_t progress = 0;
  const std::atomic_ref told(progress);
  DeviceCopier copier(0, {.progress = &progress});
  DeviceTables tables = 0;
  REQUIRE(copier.prepare(copy, DeviceForm::kPaged, src, dst, tables).ok());
  std::memset(memory.dst, 0, kPairs * kRun);
  const unsigned before = fake_cuda::engine_copies();
  fake_cuda::allow_engine_copies(1);
  Cursor cursor;
  DeviceTicket ticket = 0;
  REQUIRE(copier.launch(tables, copy, cursor, UINT64_MAX, 0, ticket).ok());
  fake_cuda::allow_engine_copies(INT_MAX);
  REQUIRE(at_end(copy, cursor));
  CHECK(fake_cuda::engine_copies() == before + 1);
  CHECK(copier.describe().find("refused by the driver") != std::string::npos);
  for (int wait = 0; wait < 100000 && told.load() < ticket; ++wait)
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  REQUIRE(told.load() == ticket);
  for (const RegionPair& pair : copy.pairs)
    CHECK(std::memcmp(memory.dst + pair.dst_offset, memory.src + pair.src_offset, kRun) == 0);
  copier.release(tables);
  fake_cuda::set_engine_delay_ms(0);
}

TEST_CASE("a driver that does not write the progress is found out, and its pieces are over all the same") {
  fake_cuda::install();
  fake_cuda::refuse_progress(true);
  const Buffers memory(16 << 20);
  uint32_t progress = 0;
  DeviceCopier copier(0, {.progress = &progress});
  const PagedCopy copy = buffers(1, 16 << 10, [](uint64_t) { return 0; });
  const uint64_t src[] = {reinterpret_cast<uint64_t>(memory.src)}, dst[] = {reinterpret_cast<uint64_t>(memory.dst)};
  DeviceTables tables = 0;
  for (int i = 0; i < 2; ++i) {
    REQUIRE(copier.prepare(copy, DeviceForm::kPaged, src, dst, tables).ok());
    Cursor cursor;
    DeviceTicket ticket = 0;
    REQUIRE(copier.launch(tables, copy, cursor, UINT64_MAX, 0, ticket).ok());
    CHECK_FALSE(copier.tells());
    wait_for(copier, ticket);
    CHECK(std::memcmp(memory.dst, memory.src, 16 << 20) == 0);
    copier.release(tables);
  }
  CHECK(std::atomic_ref(progress).load() == 0);
  fake_cuda::refuse_progress(false);
}

}  // namespace pdxfer::pack
