// The conformance suite over TCP on this machine's loopback interface.
#include "conformance.hpp"
#include "transport/tcp/tcp_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) { return pdxfer::transport::make_tcp(std::move(c)); })

TEST_CASE("IPv6, a name and wildcard addresses carry a batch") {
  for (const char* host : {"::1", "localhost", "0.0.0.0"}) {
    CAPTURE(host);
    const conformance::Factory make = [host](pdxfer::transport::Context c) {
      c.host = host;
      return pdxfer::transport::make_tcp(std::move(c));
    };
    conformance::completes_exactly_once(make);
  }
}

TEST_CASE("device memory without device copies is refused by name, and a wildcard needs a hint") {
  conformance::End a(kFactory);
  std::byte some[16];
  CHECK_THROWS_WITH_AS(a.transport->register_memory({7, {some, 16, 1}}), doctest::Contains("CUDA device 1"),
                       pdxfer::Error);
  pdxfer::transport::Context context;
  context.host = "0.0.0.0";
  const auto wildcard = pdxfer::transport::make_tcp(context);
  pdxfer::transport::Link link;
  link.address = wildcard->address();
  link.deadline = conformance::Clock::now() + std::chrono::seconds(1);
  CHECK_THROWS_WITH_AS(a.transport->connect(link), doctest::Contains("PDXFER_HOST"), pdxfer::Error);
}
