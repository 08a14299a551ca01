// The clauses of the seam over TCP where some regions are host memory and some are two GPUs', within one copy.
#include "conformance.hpp"
#include "fake_device_copy.hpp"
#include "transport/tcp/tcp_transport.hpp"

static const bool kMixed =
    (conformance::device_of = [](pdxfer::RegionId id) { return static_cast<int>(id % 3) - 1; }, true);

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) {
  return pdxfer::transport::make_tcp(conformance::with_fake_devices(std::move(c)));
})
