// The layouts of shim/verbs_abi.hpp against infiniband/verbs.h, where rdma-core's headers are installed; what the shim
// says of the library otherwise.
#include <doctest/doctest.h>

#include "shim/verbs.hpp"

#if __has_include(<infiniband/verbs.h>)
#include <infiniband/verbs.h>

using namespace pdxfer::shim;

#define SAME_SIZE(ours, theirs) static_assert(sizeof(ours) == sizeof(theirs))
#define SAME_PLACE(ours, our_member, theirs, their_member) \
  static_assert(offsetof(ours, our_member) == offsetof(theirs, their_member))
#define SAME_NAME(ours, theirs, member) SAME_PLACE(ours, member, theirs, member)

SAME_SIZE(IbvGid, ibv_gid);
SAME_SIZE(IbvDeviceAttr, ibv_device_attr);
SAME_NAME(IbvDeviceAttr, ibv_device_attr, max_qp_wr);
SAME_NAME(IbvDeviceAttr, ibv_device_attr, max_sge);
SAME_NAME(IbvDeviceAttr, ibv_device_attr, max_srq_wr);
SAME_NAME(IbvDeviceAttr, ibv_device_attr, phys_port_cnt);
SAME_SIZE(IbvPortAttr, ibv_port_attr);
SAME_NAME(IbvPortAttr, ibv_port_attr, max_msg_sz);
SAME_NAME(IbvPortAttr, ibv_port_attr, lid);
SAME_NAME(IbvPortAttr, ibv_port_attr, link_layer);
SAME_SIZE(IbvAsyncEvent, ibv_async_event);
SAME_NAME(IbvAsyncEvent, ibv_async_event, event_type);
SAME_SIZE(IbvWc, ibv_wc);
SAME_NAME(IbvWc, ibv_wc, status);
SAME_NAME(IbvWc, ibv_wc, byte_len);
SAME_NAME(IbvWc, ibv_wc, qp_num);
SAME_SIZE(IbvMr, ibv_mr);
SAME_NAME(IbvMr, ibv_mr, lkey);
SAME_NAME(IbvMr, ibv_mr, rkey);
SAME_SIZE(IbvAhAttr, ibv_ah_attr);
SAME_NAME(IbvAhAttr, ibv_ah_attr, dlid);
SAME_NAME(IbvAhAttr, ibv_ah_attr, port_num);
SAME_SIZE(IbvSrqInitAttr, ibv_srq_init_attr);
SAME_SIZE(IbvQpInitAttr, ibv_qp_init_attr);
SAME_NAME(IbvQpInitAttr, ibv_qp_init_attr, cap);
SAME_NAME(IbvQpInitAttr, ibv_qp_init_attr, qp_type);
SAME_SIZE(IbvQpAttr, ibv_qp_attr);
SAME_NAME(IbvQpAttr, ibv_qp_attr, dest_qp_num);
SAME_NAME(IbvQpAttr, ibv_qp_attr, ah_attr);
SAME_NAME(IbvQpAttr, ibv_qp_attr, pkey_index);
SAME_NAME(IbvQpAttr, ibv_qp_attr, port_num);
SAME_NAME(IbvQpAttr, ibv_qp_attr, rnr_retry);
SAME_SIZE(IbvSge, ibv_sge);
SAME_NAME(IbvSge, ibv_sge, lkey);
SAME_SIZE(IbvSendWr, ibv_send_wr);
SAME_NAME(IbvSendWr, ibv_send_wr, opcode);
SAME_NAME(IbvSendWr, ibv_send_wr, send_flags);
SAME_PLACE(IbvSendWr, rdma, ibv_send_wr, wr);
SAME_PLACE(IbvSendWr, rdma.rkey, ibv_send_wr, wr.rdma.rkey);
SAME_PLACE(IbvSendWr, xrc, ibv_send_wr, qp_type);
SAME_SIZE(IbvRecvWr, ibv_recv_wr);
SAME_SIZE(IbvContextOps, ibv_context_ops);
SAME_NAME(IbvContextOps, ibv_context_ops, poll_cq);
SAME_NAME(IbvContextOps, ibv_context_ops, req_notify_cq);
SAME_NAME(IbvContextOps, ibv_context_ops, post_srq_recv);
SAME_NAME(IbvContextOps, ibv_context_ops, post_send);
SAME_NAME(IbvContextOps, ibv_context_ops, post_recv);
SAME_SIZE(IbvContext, ibv_context);
SAME_NAME(IbvContext, ibv_context, async_fd);
SAME_NAME(IbvCompChannel, ibv_comp_channel, fd);
SAME_NAME(IbvQp, ibv_qp, qp_num);
SAME_NAME(IbvCq, ibv_cq, cq_context);

TEST_CASE("the numbers of the verbs ABI are the header's") {
  CHECK(kIbvPortActive == IBV_PORT_ACTIVE);
  CHECK(kIbvLinkEthernet == IBV_LINK_LAYER_ETHERNET);
  CHECK(kIbvEventPortErr == IBV_EVENT_PORT_ERR);
  CHECK(kIbvEventPortActive == IBV_EVENT_PORT_ACTIVE);
  CHECK(kIbvWcFlushErr == IBV_WC_WR_FLUSH_ERR);
  CHECK(kIbvWcLocProtErr == IBV_WC_LOC_PROT_ERR);
  CHECK(kIbvWcRemAccessErr == IBV_WC_REM_ACCESS_ERR);
  CHECK(kIbvWcRemOpErr == IBV_WC_REM_OP_ERR);
  CHECK(kIbvWcRetryExcErr == IBV_WC_RETRY_EXC_ERR);
  CHECK(kIbvWcRnrRetryExcErr == IBV_WC_RNR_RETRY_EXC_ERR);
  CHECK(kIbvWcGeneralErr == IBV_WC_GENERAL_ERR);
  CHECK(kIbvWcRecv == IBV_WC_RECV);
  CHECK(kIbvAccessRemoteWrite == IBV_ACCESS_REMOTE_WRITE);
  CHECK(kIbvAccessRelaxedOrdering == IBV_ACCESS_RELAXED_ORDERING);
  CHECK(kIbvQptRc == IBV_QPT_RC);
  CHECK(kIbvQpMinRnrTimer == IBV_QP_MIN_RNR_TIMER);
  CHECK(kIbvQpMaxDestRdAtomic == IBV_QP_MAX_DEST_RD_ATOMIC);
  CHECK(kIbvQpDestQpn == IBV_QP_DEST_QPN);
  CHECK(kIbvQpsErr == IBV_QPS_ERR);
  CHECK(kIbvWrSend == IBV_WR_SEND);
  CHECK(kIbvSendSignaled == IBV_SEND_SIGNALED);
  CHECK(kIbvSendInline == IBV_SEND_INLINE);
}
#endif

TEST_CASE("the table is whole or the reason is told") {
  const pdxfer::shim::VerbsLibrary verbs = pdxfer::shim::load_verbs();
  if (verbs.library.present()) {
    CHECK((verbs.api.create_qp != nullptr));
    CHECK((verbs.api.wc_status_str != nullptr));
  } else {
    CHECK_FALSE(verbs.reason.empty());
  }
  CHECK(verbs.devices.empty() == !verbs.reason.empty());
}
