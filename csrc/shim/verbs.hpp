// libibverbs as a table of pointers, opened at run time; nothing is linked (even the inline functions of
// infiniband/verbs.h leave undefined symbols behind) and no header of rdma-core is needed: see verbs_abi.hpp. Any
// thread; the handle stays for the life of the process. Tests put a table of their own in its place.
//
// What the inline functions of the header would do is done here: posting and polling go through IbvContextOps, and
// registration with relaxed ordering through reg_mr_iova2.
#pragma once

#include <string>
#include <vector>

#include "shim/dynamic_library.hpp"
#include "shim/verbs_abi.hpp"

namespace pdxfer::shim {

struct VerbsApi {
  int (*fork_init)();
  IbvDevice** (*get_device_list)(int* count);
  void (*free_device_list)(IbvDevice** list);
  const char* (*get_device_name)(IbvDevice* device);
  IbvContext* (*open_device)(IbvDevice* device);
  int (*close_device)(IbvContext* context);
  int (*query_device)(IbvContext* context, IbvDeviceAttr* attr);
  int (*query_port)(IbvContext* context, uint8_t port, IbvPortAttr* attr);  // fills the attr up to link_layer
  int (*query_gid)(IbvContext* context, uint8_t port, int index, IbvGid* gid);
  IbvPd* (*alloc_pd)(IbvContext* context);
  int (*dealloc_pd)(IbvPd* pd);
  IbvMr* (*reg_mr)(IbvPd* pd, void* addr, size_t length, int access);
  // The three that an old library may lack are null then.
  IbvMr* (*reg_mr_iova2)(IbvPd* pd, void* addr, size_t length, uint64_t iova, unsigned access);
  IbvMr* (*reg_dmabuf_mr)(IbvPd* pd, uint64_t offset, size_t length, uint64_t iova, int fd, int access);
  int (*dereg_mr)(IbvMr* mr);
  IbvCompChannel* (*create_comp_channel)(IbvContext* context);
  int (*destroy_comp_channel)(IbvCompChannel* channel);
  IbvCq* (*create_cq)(IbvContext* context, int entries, void* cq_context, IbvCompChannel* channel, int vector);
  int (*destroy_cq)(IbvCq* cq);
  int (*get_cq_event)(IbvCompChannel* channel, IbvCq** cq, void** cq_context);
  void (*ack_cq_events)(IbvCq* cq, unsigned count);
  IbvSrq* (*create_srq)(IbvPd* pd, IbvSrqInitAttr* attr);
  int (*destroy_srq)(IbvSrq* srq);
  IbvQp* (*create_qp)(IbvPd* pd, IbvQpInitAttr* attr);
  int (*modify_qp)(IbvQp* qp, IbvQpAttr* attr, int mask);
  int (*destroy_qp)(IbvQp* qp);
  int (*get_async_event)(IbvContext* context, IbvAsyncEvent* event);
  void (*ack_async_event)(IbvAsyncEvent* event);
  const char* (*wc_status_str)(int status);
};

struct VerbsLibrary {
  DynamicLibrary library;
  VerbsApi api{};
  std::vector<std::string> devices;  // as ibv_get_device_list names them: those whose provider loaded
  std::string reason;                // why no device can be used; empty when one can
};

// Opens the library and lists its devices. Never throws for what the machine lacks.
VerbsLibrary load_verbs();

}  // namespace pdxfer::shim
