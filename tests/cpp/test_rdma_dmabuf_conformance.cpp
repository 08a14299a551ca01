// The eight clauses over rdma between two GPUs' memories, which the NICs reach by dma-buf: the fake CUDA driver makes
// the memory and its handles, the fake verbs table takes a handle only for the addresses that it stands for.
#include "conformance.hpp"
#include "fake/fake_cuda.hpp"
#include "fake_verbs.hpp"
#include "transport/rdma/rdma_transport.hpp"

static const bool kInstalled = [] {
  fake_cuda::install();
  conformance::memory_kind = {0, [](size_t bytes) { return fake_cuda::allocate(0, bytes); }, &fake_cuda::release};
  return true;
}();

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) {
  return pdxfer::transport::make_rdma_on(std::move(c), fake::table(), fake::devices(2));
})
