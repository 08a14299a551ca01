// Text for Status and errno values; see status.hpp.
#include "core/status.hpp"

#include <cstring>

namespace pdxfer {

const char* code_name(Code code) noexcept {
  switch (code) {
    case Code::kOk:
      return "ok";
    case Code::kInvalid:
      return "invalid";
    case Code::kUnavailable:
      return "unavailable";
    case Code::kPeerLost:
      return "peer lost";
    case Code::kTimeout:
      return "timeout";
    case Code::kCancelled:
      return "cancelled";
    case Code::kInternal:
      return "internal error";
    case Code::kCorrupt:
      return "corrupted";
  }
  return "unknown code";
}

std::string errno_name(int error) {
  const char* name = ::strerrorname_np(error);
  const char* text = ::strerrordesc_np(error);
  if (name == nullptr || text == nullptr) return "errno " + std::to_string(error);
  return std::string(name) + " (" + text + ")";
}

std::string Status::to_string() const {
  std::string text = code_name(code);
  if (where != nullptr && *where != '\0') text += std::string(": ") + where;
  if (native_name != nullptr)
    text += std::string(": ") + native_name + " (" + std::to_string(native) + ")";
  else if (native != 0)
    text += ": " + errno_name(native);
  return text;
}

}  // namespace pdxfer
