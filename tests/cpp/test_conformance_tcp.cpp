// The conformance suite over TCP on this machine's loopback interface.
#include "conformance.hpp"
#include "transport/tcp/tcp_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) { return pdxfer::transport::make_tcp(std::move(c)); })
