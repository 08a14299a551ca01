// What the fake driver does before it writes a progress word, so that ThreadSanitizer knows what the word orders.
#pragma once

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>

#include "transport/cuda_ipc/cuda_ipc_progress.hpp"
#endif

namespace fake_cuda {

inline void before_progress() noexcept {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&pdxfer::transport::cuda_ipc::tsan_progress);
#endif
}

}  // namespace fake_cuda
