// One write(2) per line so that lines of several threads and processes do not mix; see log.hpp.
#include "core/log.hpp"

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <string>

namespace pdxfer {
namespace {
constinit std::atomic<int> g_level{static_cast<int>(LogLevel::kWarning)};
constexpr const char* kNames[] = {"debug", "info", "warning", "error"};
}  // namespace

void set_log_level(LogLevel level) noexcept { g_level.store(static_cast<int>(level), std::memory_order_relaxed); }

bool log_enabled(LogLevel level) noexcept { return static_cast<int>(level) >= g_level.load(std::memory_order_relaxed); }

void log(LogLevel level, std::string_view text) noexcept {
  if (!log_enabled(level)) return;
  try {
    std::string line = "pdxfer[" + std::to_string(::getpid()) + "] " + kNames[static_cast<int>(level)] + ": ";
    line.append(text).push_back('\n');
    [[maybe_unused]] const auto written = ::write(STDERR_FILENO, line.data(), line.size());
  } catch (const std::exception&) {
    std::fputs("pdxfer: out of memory while logging\n", stderr);
  }
}

}  // namespace pdxfer
