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
