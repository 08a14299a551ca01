// The cost model of rdma: what it learns of a request's cost from the copies that it sent request by request.
#include <doctest/doctest.h>

#include "core/paged_copy.hpp"
#include "transport/rdma/rdma_cost.hpp"

using namespace pdxfer::transport::rdma;

namespace {
constexpr uint64_t kRequests = 10000, kBytes = kRequests * 1024;
}  // namespace

TEST_CASE("two slow copies in turn raise a request's cost to the quicker one's") {
  Rates rates{100, 0.1, 0.2, 4000};
  RequestCost cost;
  cost.learn(rates, kRequests, kBytes, 30e3 * kRequests);
  CHECK(rates.request_ns == 100);  // one may have been held up by something else
  cost.learn(rates, kRequests, kBytes, 20e3 * kRequests);
  CHECK(rates.request_ns == doctest::Approx(20e3));
}

TEST_CASE("a copy as quick as expected in between takes the suspicion back") {
  Rates rates{100, 0.1, 0.2, 4000};
  RequestCost cost;
  cost.learn(rates, kRequests, kBytes, 30e3 * kRequests);
  cost.learn(rates, kRequests, kBytes, 150.0 * kRequests);
  cost.learn(rates, kRequests, kBytes, 30e3 * kRequests);
  CHECK(rates.request_ns == 100);
}

TEST_CASE("few requests, or time that the bytes explain, say nothing of requests") {
  Rates rates{100, 1, 0.2, 4000};
  RequestCost cost;
  for (int i = 0; i < 4; ++i) {
    cost.learn(rates, 8, 8 << 20, 1e9);
    cost.learn(rates, kRequests, kRequests * 16384, 1.5 * 16384.0 * kRequests);
  }
  CHECK(rates.request_ns == 100);
}

TEST_CASE("what was learnt decides: small pages go packed, large ones stay direct") {
  pdxfer::PagedCopy small, large;
  small.pairs.push_back({1, 1, 0, 0, 2048, 2048, 1024});
  for (uint32_t i = 0; i < 4096; ++i) small.runs.push_back({2 * i, i, 1});
  small.seal();
  large.pairs.push_back({1, 1, 0, 0, 1 << 20, 1 << 20, 1 << 20});
  large.runs.push_back({0, 0, 32});
  large.seal();
  Rates rates{100, 0.5, 0.1, 4000};
  CHECK_FALSE(estimate(small, rates).packed());
  RequestCost cost;
  for (int i = 0; i < 2; ++i) cost.learn(rates, 4096, small.bytes, 20e3 * 4096);
  CHECK(estimate(small, rates).packed());
  CHECK_FALSE(estimate(large, rates).packed());
}
