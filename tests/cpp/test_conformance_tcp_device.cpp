// The clauses of the seam over TCP with device memory on both ends, by way of pinned slots and a fake GPU.
#include "conformance.hpp"
#include "fake_device_copy.hpp"
#include "passing_device_copy.hpp"
#include "transport/tcp/tcp_transport.hpp"

static const bool kOnDevice =
    (conformance::device_of = [](pdxfer::RegionId id) { return static_cast<int>(id % 2); }, true);

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) {
  return pdxfer::transport::make_tcp(conformance::with_fake_devices(std::move(c)));
})
#include "device_cases.hpp"

TEST_CASE("registering memory tries a GPU once and keeps nothing of it") {
  struct Counted final : conformance::PassingDeviceCopy {
    Counted(std::unique_ptr<pdxfer::DeviceCopy> made, int& count) : PassingDeviceCopy(std::move(made)), alive(count) {
      ++alive;
    }
    ~Counted() override { --alive; }
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
