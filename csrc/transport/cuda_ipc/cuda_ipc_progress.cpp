// See cuda_ipc_progress.hpp.
#include "transport/cuda_ipc/cuda_ipc_progress.hpp"

#include <exception>
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include "core/progress_word.hpp"

namespace pdxfer::transport::cuda_ipc {

#if defined(__SANITIZE_THREAD__)
char tsan_progress;
#endif

Progress::Progress(const sys::UniqueFd& memory) : memory_(sys::map_memfd(memory.get(), kBytes, "a progress word")) {}

uint32_t* Progress::pin(const HostPin& pin, int ordinal) noexcept {
  try {
    if (!pin) throw Error(Code::kUnavailable, "this engine cannot page-lock memory");
    pinned_ = pin(ordinal, memory_.data(), kBytes);
    return word();
  } catch (const std::exception& error) {
    refusal_ = error.what();
    return nullptr;
  }
}

bool Progress::reached(uint32_t piece) const noexcept {
  const bool reached = progress_reached(*word(), piece);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&tsan_progress);
#endif
  return reached;
}

}  // namespace pdxfer::transport::cuda_ipc
