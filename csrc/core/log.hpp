// Logging to stderr, one line a call: "pdxfer[pid] warning: text". Set-up and rare events only, never per extent.
#pragma once

#include <string_view>

namespace pdxfer {

enum class LogLevel : int { kDebug = 0, kInfo = 1, kWarning = 2, kError = 3 };

void set_log_level(LogLevel level) noexcept;
bool log_enabled(LogLevel level) noexcept;
void log(LogLevel level, std::string_view text) noexcept;

}  // namespace pdxfer
