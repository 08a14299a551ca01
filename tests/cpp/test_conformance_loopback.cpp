// The conformance suite on the reference transport.
#include "conformance.hpp"
#include "transport/loopback/loopback_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) { return pdxfer::transport::make_loopback(std::move(c)); })
