// See cuda_ipc_progress.hpp.
#include "transport/cuda_ipc/cuda_ipc_progress.hpp"

#include <sys/stat.h>

#include <exception>
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include "core/progress_word.hpp"

namespace pdxfer::transport::cuda_ipc {

#if defined(__SANITIZE_THREAD__)
char tsan_progress;
#endif

// As large as it should be, or looking at it would be SIGBUS.
Progress::Progress(const sys::UniqueFd& memory) {
  struct stat info {};
  if (::fstat(memory.get(), &info) != 0 || !S_ISREG(info.st_mode) || info.st_size < static_cast<off_t>(kBytes))
    throw Error(Code::kInvalid, "the memory of a progress word is smaller than it should be");
  memory_ = sys::map_shared(memory.get(), 0, kBytes);
}

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
