// A verbs table that needs no device: queue pairs, keys, completion queues and events of this process, with the rules
// that matter (ranges and keys are checked, a failed request flushes its queue) and faults to inject. Work is done when
// a queue is polled, a few requests at a time, so that things really are under way. One mutex; any thread.
#pragma once

#include <cstdint>
#include <vector>

#include "shim/verbs.hpp"
#include "sys/rdma_devices.hpp"

namespace fake {

const pdxfer::shim::VerbsApi& table();
// As many devices as asked for, "fake0" on, one active RoCE port each, all on one subnet.
std::vector<pdxfer::sys::DeviceInfo> devices(int count);

struct Faults {
  int refuse_every = 0;  // every n-th post_send fails with ENOMEM
  int cut_every = 0;     // every n-th post_send takes only half of its chain
  int fail_every = 0;    // every n-th request completes with fail_status
  int fail_status = pdxfer::shim::kIbvWcRetryExcErr;
  size_t drop_above = 0;    // requests of more bytes complete with "retry counter exceeded"; 0: none
  bool no_qp = false;       // ibv_create_qp fails
  bool silent = false;      // requests are taken and never complete
  int no_dmabuf = 0;        // errno of ibv_reg_dmabuf_mr; 0: it works
  int no_registration = 0;  // errno of ibv_reg_mr; 0: it works
};
Faults& faults();
void reset_faults();
// Nothing passes a dead port; its device tells with an event. Alive again: another event.
void set_port(int device, bool alive);

struct Counts {
  int qps = 0, mrs = 0, cqs = 0, srqs = 0, pds = 0, contexts = 0;
  uint64_t writes = 0, sends = 0, doorbells = 0, gathered = 0, dmabufs = 0, inlined = 0;
};
Counts counts();

}  // namespace fake
