// The clauses of the seam over TCP with device memory on both ends, by way of pinned slots and a fake GPU.
#include "conformance.hpp"
#include "fake_device_copy.hpp"
#include "transport/tcp/tcp_transport.hpp"

static const bool kOnDevice =
    (conformance::device_of = [](pdxfer::RegionId id) { return static_cast<int>(id % 2); }, true);

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) {
  return pdxfer::transport::make_tcp(conformance::with_fake_devices(std::move(c)));
})
#include "device_cases.hpp"

TEST_CASE("registering memory tries a GPU once and keeps nothing of it") {
  struct Counted final : pdxfer::DeviceCopy {
    Counted(std::unique_ptr<pdxfer::DeviceCopy> inner, int& alive) : inner(std::move(inner)), alive(alive) { ++alive; }
    ~Counted() override { --alive; }
    pdxfer::Status prepare(const pdxfer::PagedCopy& copy, pdxfer::DeviceForm form, std::span<const uint64_t> src,
                           std::span<const uint64_t> dst, pdxfer::DeviceTables& tables) noexcept override {
      return inner->prepare(copy, form, src, dst, tables);
    }
    void release(pdxfer::DeviceTables tables) noexcept override { inner->release(tables); }
    pdxfer::Status launch(pdxfer::DeviceTables tables, const pdxfer::PagedCopy& copy, pdxfer::Cursor& cursor,
                          uint64_t budget, uint64_t buffer, pdxfer::DeviceTicket& ticket) noexcept override {
      return inner->launch(tables, copy, cursor, budget, buffer, ticket);
    }
    pdxfer::Status done(pdxfer::DeviceTicket ticket, bool& over) noexcept override { return inner->done(ticket, over); }
    uint64_t sum(pdxfer::DeviceTicket ticket) const noexcept override { return inner->sum(ticket); }
    uint64_t landed(pdxfer::DeviceTicket ticket) const noexcept override { return inner->landed(ticket); }
    std::string describe() const override { return inner->describe(); }
    std::unique_ptr<pdxfer::DeviceCopy> inner;
    int& alive;
  };
  int made = 0, alive = 0;
  pdxfer::transport::Context context = conformance::with_fake_devices({});
  context.host = "127.0.0.1";
  context.device_copy = [&made, &alive, make = context.device_copy](int ordinal,
                                                                    const pdxfer::DeviceCopyOptions& options) {
    if (ordinal == 3) throw pdxfer::Error(pdxfer::Code::kUnavailable, "no code for it");
    ++made;
    return std::make_unique<Counted>(make(ordinal, options), alive);
  };
  const auto transport = pdxfer::transport::make_tcp(context);
  std::byte some[64];
  transport->register_memory({1, {some, 16, 0}});
  transport->register_memory({2, {some + 16, 16, 0}});
  CHECK(made == 1);
  transport->register_memory({3, {some + 32, 16, 1}});
  CHECK(made == 2);
  CHECK(alive == 0);
  CHECK_THROWS_WITH_AS(transport->register_memory({4, {some + 48, 16, 3}}), doctest::Contains("CUDA device 3: no code"),
                       pdxfer::Error);
}
