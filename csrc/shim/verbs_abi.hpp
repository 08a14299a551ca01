// The part of the verbs ABI that we use, declared by us so that building needs no rdma-core header and the wheel no
// libibverbs: names and layouts are those of infiniband/verbs.h (IBVERBS_1.1), which rdma-core has kept since 2006
// because providers and applications are built apart. tests/cpp/test_verbs_abi.cpp compares every size and offset with
// the real header where that is installed. Plain data, any thread.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>

namespace pdxfer::shim {

struct IbvPd;
struct IbvDevice;
struct IbvQp;
struct IbvCq;
struct IbvSrq;

union IbvGid {
  uint8_t raw[16];
  uint64_t words[2];  // big-endian: subnet prefix, interface id
};

inline constexpr int kIbvPortActive = 4;
inline constexpr uint8_t kIbvLinkEthernet = 2;

struct IbvDeviceAttr {
  char fw_ver[64];
  uint64_t node_guid, sys_image_guid, max_mr_size, page_size_cap;
  uint32_t vendor_id, vendor_part_id, hw_ver;
  int max_qp, max_qp_wr;
  unsigned device_cap_flags;
  int max_sge, max_sge_rd, max_cq, max_cqe, max_mr, max_pd;
  int max_qp_rd_atom, max_ee_rd_atom, max_res_rd_atom, max_qp_init_rd_atom, max_ee_init_rd_atom;
  int atomic_cap;
  int max_ee, max_rdd, max_mw, max_raw_ipv6_qp, max_raw_ethy_qp, max_mcast_grp, max_mcast_qp_attach;
  int max_total_mcast_qp_attach, max_ah, max_fmr, max_map_per_fmr, max_srq, max_srq_wr, max_srq_sge;
  uint16_t max_pkeys;
  uint8_t local_ca_ack_delay, phys_port_cnt;
};

struct IbvPortAttr {
  int state, max_mtu, active_mtu, gid_tbl_len;
  uint32_t port_cap_flags, max_msg_sz, bad_pkey_cntr, qkey_viol_cntr;
  uint16_t pkey_tbl_len, lid, sm_lid;
  uint8_t lmc, max_vl_num, sm_sl, subnet_timeout, init_type_reply, active_width, active_speed, phys_state, link_layer;
  uint8_t flags;
  uint16_t port_cap_flags2;
};

inline constexpr int kIbvEventDeviceFatal = 8, kIbvEventPortActive = 9, kIbvEventPortErr = 10;
struct IbvAsyncEvent {
  union {
    void* object;
    int port_num;
  } element;
  int event_type;
};

inline constexpr int kIbvWcSuccess = 0, kIbvWcLocLenErr = 1, kIbvWcLocProtErr = 4, kIbvWcFlushErr = 5,
                     kIbvWcLocAccessErr = 8, kIbvWcRemInvReqErr = 9, kIbvWcRemAccessErr = 10, kIbvWcRemOpErr = 11,
                     kIbvWcRetryExcErr = 12, kIbvWcRnrRetryExcErr = 13, kIbvWcGeneralErr = 21;
inline constexpr int kIbvWcRecv = 1 << 7;
struct IbvWc {
  uint64_t wr_id;
  int status, opcode;
  uint32_t vendor_err, byte_len, imm_data, qp_num, src_qp;
  unsigned wc_flags;
  uint16_t pkey_index, slid;
  uint8_t sl, dlid_path_bits;
};

inline constexpr unsigned kIbvAccessLocalWrite = 1, kIbvAccessRemoteWrite = 2, kIbvAccessRelaxedOrdering = 1u << 20;
struct IbvContext;
struct IbvMr {
  IbvContext* context;
  IbvPd* pd;
  void* addr;
  size_t length;
  uint32_t handle, lkey, rkey;
};

struct IbvAhAttr {
  struct {
    IbvGid dgid;
    uint32_t flow_label;
    uint8_t sgid_index, hop_limit, traffic_class;
  } grh;
  uint16_t dlid;
  uint8_t sl, src_path_bits, static_rate, is_global, port_num;
};

struct IbvSrqInitAttr {
  void* srq_context;
  uint32_t max_wr, max_sge, srq_limit;
};

struct IbvQpCap {
  uint32_t max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data;
};
inline constexpr int kIbvQptRc = 2;
struct IbvQpInitAttr {
  void* qp_context;
  IbvCq *send_cq, *recv_cq;
  IbvSrq* srq;
  IbvQpCap cap;
  int qp_type, sq_sig_all;
};

inline constexpr int kIbvQpState = 1 << 0, kIbvQpAccessFlags = 1 << 3, kIbvQpPkeyIndex = 1 << 4, kIbvQpPort = 1 << 5,
                     kIbvQpAv = 1 << 7, kIbvQpPathMtu = 1 << 8, kIbvQpTimeout = 1 << 9, kIbvQpRetryCnt = 1 << 10,
                     kIbvQpRnrRetry = 1 << 11, kIbvQpRqPsn = 1 << 12, kIbvQpMaxRdAtomic = 1 << 13,
                     kIbvQpMinRnrTimer = 1 << 15, kIbvQpSqPsn = 1 << 16, kIbvQpMaxDestRdAtomic = 1 << 17,
                     kIbvQpDestQpn = 1 << 20;
inline constexpr int kIbvQpsInit = 1, kIbvQpsRtr = 2, kIbvQpsRts = 3, kIbvQpsErr = 6;
struct IbvQpAttr {
  int qp_state, cur_qp_state, path_mtu, path_mig_state;
  uint32_t qkey, rq_psn, sq_psn, dest_qp_num;
  unsigned qp_access_flags;
  IbvQpCap cap;
  IbvAhAttr ah_attr, alt_ah_attr;
  uint16_t pkey_index, alt_pkey_index;
  uint8_t en_sqd_async_notify, sq_draining, max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout;
  uint8_t retry_cnt, rnr_retry, alt_port_num, alt_timeout;
  uint32_t rate_limit;
};

struct IbvSge {
  uint64_t addr;
  uint32_t length, lkey;
};
inline constexpr int kIbvWrRdmaWrite = 0, kIbvWrSend = 2;
inline constexpr unsigned kIbvSendSignaled = 2, kIbvSendInline = 8;
struct IbvSendWr {
  uint64_t wr_id;
  IbvSendWr* next;
  IbvSge* sg_list;
  int num_sge, opcode;
  unsigned send_flags;
  uint32_t imm_data;
  struct {
    uint64_t remote_addr;
    uint32_t rkey;
    uint8_t other_members[20];  // of the union of operations: 32 bytes in all
  } rdma;
  uint64_t xrc;
  uint8_t bind_or_tso[48];
};
struct IbvRecvWr {
  uint64_t wr_id;
  IbvRecvWr* next;
  IbvSge* sg_list;
  int num_sge;
};

// What providers fill in at open: the data path goes through these, without a call into the library.
struct IbvContextOps {
  void* unused_0[11];
  int (*poll_cq)(IbvCq*, int entries, IbvWc*);
  int (*req_notify_cq)(IbvCq*, int solicited_only);
  void* unused_1[7];
  int (*post_srq_recv)(IbvSrq*, IbvRecvWr*, IbvRecvWr** bad);
  void* unused_2[4];
  int (*post_send)(IbvQp*, IbvSendWr*, IbvSendWr** bad);
  int (*post_recv)(IbvQp*, IbvRecvWr*, IbvRecvWr** bad);
  void* unused_3[5];
};
struct IbvContext {
  IbvDevice* device;
  IbvContextOps ops;
  int cmd_fd, async_fd, num_comp_vectors;
  pthread_mutex_t mutex;
  void* abi_compat;
};
struct IbvCompChannel {
  IbvContext* context;
  int fd, refcnt;
};
// The leading members of what the library hands out; it owns the rest.
struct IbvQp {
  IbvContext* context;
  void* qp_context;
  IbvPd* pd;
  IbvCq *send_cq, *recv_cq;
  IbvSrq* srq;
  uint32_t handle, qp_num;
};
struct IbvCq {
  IbvContext* context;
  IbvCompChannel* channel;
  void* cq_context;
};
struct IbvSrq {
  IbvContext* context;
  void* srq_context;
};

}  // namespace pdxfer::shim
