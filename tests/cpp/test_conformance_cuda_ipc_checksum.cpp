// The clauses of the seam on cuda_ipc with checksums, over the fake driver; and that a byte which is not what was sent
// fails its batch at both ends.
#include <atomic>

#include "fake_cuda_memory.hpp"
#include "passing_device_copy.hpp"
#include "transport/cuda_ipc/cuda_ipc_transport.hpp"

namespace {

// What this process's receivers are about to read is changed when it is not 0.
std::atomic<uint64_t> g_spoil{0};

// A device whose memory lost a bit between a copy's end and the look at it.
struct Spoiling final : conformance::PassingDeviceCopy {
  using PassingDeviceCopy::PassingDeviceCopy;
  pdxfer::Status prepare(const pdxfer::PagedCopy& copy, pdxfer::DeviceForm form, std::span<const uint64_t> src,
                         std::span<const uint64_t> dst, pdxfer::DeviceTables& tables) noexcept override {
    if (form == pdxfer::DeviceForm::kSum) {
      const pdxfer::RegionPair& p = copy.pairs.back();
      victim = reinterpret_cast<std::byte*>(dst.back() + p.dst_offset + copy.runs.back().dst_slot * p.dst_stride);
    }
    return inner->prepare(copy, form, src, dst, tables);
  }
  pdxfer::Status launch(pdxfer::DeviceTables tables, const pdxfer::PagedCopy& copy, pdxfer::Cursor& cursor,
                        uint64_t budget, uint64_t buffer, pdxfer::DeviceTicket& ticket) noexcept override {
    if (victim != nullptr && g_spoil > 0 && budget >= bytes_between(copy, cursor, end_of(copy)) && --g_spoil == 0)
      *victim ^= std::byte{4};
    return inner->launch(tables, copy, cursor, budget, buffer, ticket);
  }
  static pdxfer::Cursor end_of(const pdxfer::PagedCopy& copy) {
    return {static_cast<uint32_t>(copy.pairs.size()), 0, 0, 0};
  }
  std::byte* victim = nullptr;
};

}  // namespace

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) {
  c.cuda = "checksum=on";
  c.device_copy = [inner = c.device_copy](int ordinal, const pdxfer::DeviceCopyOptions& options) {
    return std::make_unique<Spoiling>(inner(ordinal, options));
  };
  return pdxfer::transport::make_cuda_ipc(std::move(c));
})

static const bool kInstalled = conformance::use_fake_cuda();

namespace conformance {

TEST_CASE("a batch of which one byte is not what was sent is corrupted at both ends, others are not") {
  for (const BatchId bad : {1, 2, 3}) {
    CAPTURE(bad);
    Batches batches;
    End a(kFactory), b(kFactory);
    Memory& src = a.add(2, 8 << 20);
    Memory& dst = b.add(4, 8 << 20);
    Pair pair(a, b);
    g_spoil = bad;
    for (BatchId id = 1; id <= 3; ++id) {
      batches.push_back(std::make_unique<Batch>(*pair.ab, id, plan_of(part_copy(src, dst, 1024, id - 1, 3)), id));
      REQUIRE(pair.poll_until([&] { return batches.back()->step(), a.find_sent(id) != nullptr; }));
      const Status sent = a.find_sent(id)->status;
      CHECK_MESSAGE(sent.code == (id == bad ? Code::kCorrupt : Code::kOk), sent.to_string());
    }
    REQUIRE(pair.poll_until([&] { return b.arrived.size() == 3; }));
    for (const Completion& arrived : b.arrived) CHECK((arrived.status.code == Code::kCorrupt) == (arrived.tag == bad));
    CHECK(pair.ab->lost().ok());
    CHECK(g_spoil == 0);
  }
}

}  // namespace conformance
