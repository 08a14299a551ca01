// Loading of libibverbs; see verbs.hpp.
#include "shim/verbs.hpp"

#include <cerrno>

#include "core/status.hpp"

namespace pdxfer::shim {
namespace {

// The first name that the library lacks, or null.
const char* load_table(DynamicLibrary& library, VerbsApi& api) {
  const char* missing = nullptr;
  const auto need = [&](auto& target, const char* symbol) {
    if (!library.load(target, symbol) && missing == nullptr) missing = symbol;
  };
  need(api.fork_init, "ibv_fork_init");
  need(api.get_device_list, "ibv_get_device_list");
  need(api.free_device_list, "ibv_free_device_list");
  need(api.get_device_name, "ibv_get_device_name");
  need(api.open_device, "ibv_open_device");
  need(api.close_device, "ibv_close_device");
  need(api.query_device, "ibv_query_device");
  need(api.query_port, "ibv_query_port");
  need(api.query_gid, "ibv_query_gid");
  need(api.alloc_pd, "ibv_alloc_pd");
  need(api.dealloc_pd, "ibv_dealloc_pd");
  need(api.reg_mr, "ibv_reg_mr");
  need(api.dereg_mr, "ibv_dereg_mr");
  need(api.create_comp_channel, "ibv_create_comp_channel");
  need(api.destroy_comp_channel, "ibv_destroy_comp_channel");
  need(api.create_cq, "ibv_create_cq");
  need(api.destroy_cq, "ibv_destroy_cq");
  need(api.get_cq_event, "ibv_get_cq_event");
  need(api.ack_cq_events, "ibv_ack_cq_events");
  need(api.create_srq, "ibv_create_srq");
  need(api.destroy_srq, "ibv_destroy_srq");
  need(api.create_qp, "ibv_create_qp");
  need(api.modify_qp, "ibv_modify_qp");
  need(api.destroy_qp, "ibv_destroy_qp");
  need(api.get_async_event, "ibv_get_async_event");
  need(api.ack_async_event, "ibv_ack_async_event");
  need(api.wc_status_str, "ibv_wc_status_str");
  library.load(api.reg_mr_iova2, "ibv_reg_mr_iova2");
  library.load(api.reg_dmabuf_mr, "ibv_reg_dmabuf_mr");
  return missing;
}

}  // namespace

VerbsLibrary load_verbs() {
  VerbsLibrary verbs{DynamicLibrary({"libibverbs.so.1"}), {}, {}, {}};
  verbs.reason = verbs.library.reason();
  if (!verbs.library.present()) return verbs;
  if (const char* missing = load_table(verbs.library, verbs.api)) {
    verbs.reason = verbs.library.path() + " lacks " + missing + ": not a libibverbs, or one older than 1.1";
    verbs.library.reject(verbs.reason);
    return verbs;
  }
  int count = 0;
  errno = 0;
  IbvDevice** list = verbs.api.get_device_list(&count);
  if (list == nullptr) {
    verbs.reason = "ibv_get_device_list: " + errno_name(errno);
    return verbs;
  }
  for (int i = 0; i < count; ++i) verbs.devices.emplace_back(verbs.api.get_device_name(list[i]));
  verbs.api.free_device_list(list);
  if (verbs.devices.empty())
    verbs.reason = "libibverbs lists no device: no RDMA NIC here, or its kernel driver or provider is not installed";
  return verbs;
}

}  // namespace pdxfer::shim
