// Parsing of /proc/self/{maps,smaps,status,fd}. Set-up path only; see proc_maps.hpp.
#include "sys/proc_maps.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string_view>

#include "core/status.hpp"
#include "sys/fd.hpp"

namespace pdxfer::sys {
namespace {

// The whole file at once: a maps read in several pieces is consistent per piece only, so pieces are as big as possible.
std::string read_all(const char* path) {
  const UniqueFd fd(::open(path, O_RDONLY | O_CLOEXEC));
  if (!fd)
    throw Error(Code::kUnavailable,
                std::string("cannot open ") + path + ": " + errno_name(errno) + "; is /proc mounted?", errno);
  std::string text(1 << 16, '\0');
  size_t have = 0;
  for (;;) {
    if (have == text.size()) text.resize(text.size() * 2);
    const ssize_t n = ::read(fd.get(), text.data() + have, text.size() - have);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw Error(Code::kUnavailable, std::string("reading ") + path + ": " + errno_name(errno), errno);
    if (n == 0) break;
    have += static_cast<size_t>(n);
  }
  text.resize(have);
  return text;
}

std::string_view next_line(std::string_view& rest) {
  const size_t end = std::min(rest.find('\n'), rest.size());
  const std::string_view line = rest.substr(0, end);
  rest.remove_prefix(std::min(end + 1, rest.size()));
  return line;
}

template <typename T>
bool take_number(std::string_view& rest, T& value, int base, char after) {
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), value, base);
  if (error != std::errc{}) return false;
  rest.remove_prefix(static_cast<size_t>(end - rest.data()));
  if (after != '\0') {
    if (rest.empty() || rest.front() != after) return false;
    rest.remove_prefix(1);
  }
  return true;
}

// "7f20-7f21 rw-s 00001000 00:01 1082   /dev/zero (deleted)"; false for a line that is no such header.
bool parse_area(std::string_view line, VmArea& area) {
  uint32_t major = 0, minor = 0;
  if (!take_number(line, area.begin, 16, '-') || !take_number(line, area.end, 16, ' ') || line.size() < 5) return false;
  area.prot = (line[0] == 'r' ? PROT_READ : 0) | (line[1] == 'w' ? PROT_WRITE : 0) | (line[2] == 'x' ? PROT_EXEC : 0);
  area.shared = line[3] == 's';
  line.remove_prefix(5);
  if (!take_number(line, area.offset, 16, ' ') || !take_number(line, major, 16, ':') ||
      !take_number(line, minor, 16, ' ') || !take_number(line, area.inode, 10, '\0'))
    return false;
  area.dev = makedev(major, minor);
  const size_t path = line.find_first_not_of(' ');
  area.path = path == std::string_view::npos ? std::string() : std::string(line.substr(path));
  return true;
}

}  // namespace

std::vector<VmArea> read_maps(uintptr_t begin, uintptr_t end) {
  const std::string text = read_all("/proc/self/maps");
  std::vector<VmArea> areas;
  std::string_view rest = text;
  uintptr_t last = 0;
  while (!rest.empty()) {
    std::string_view line = next_line(rest);
    uintptr_t line_begin = 0, line_end = 0;
    std::string_view peek = line;
    if (!take_number(peek, line_begin, 16, '-') || !take_number(peek, line_end, 16, ' ')) continue;
    // Between two reads the kernel may show an area that grew again; keep the list sorted and disjoint.
    if (line_end <= begin || line_begin >= end || line_begin < last) continue;
    VmArea area;
    if (!parse_area(line, area)) continue;
    last = area.end;
    areas.push_back(std::move(area));
  }
  return areas;
}

bool has_locked_memory(uintptr_t begin, uintptr_t end) {
  const std::string status = read_all("/proc/self/status");
  const size_t at = status.find("VmLck:");
  if (at == std::string::npos || std::strtoull(status.c_str() + at + 6, nullptr, 10) == 0) return false;
  const std::string smaps = read_all("/proc/self/smaps");
  std::string_view rest = smaps;
  bool inside = false;
  while (!rest.empty()) {
    const std::string_view line = next_line(rest);
    if (!line.starts_with("VmFlags:")) {
      VmArea area;
      if (parse_area(line, area)) inside = area.begin < end && area.end > begin;
      continue;
    }
    if (!inside) continue;
    for (const char* flag : {" lo", " dc", " io", " pf"})
      if (line.find(flag) != std::string_view::npos) return true;
  }
  return false;
}

std::string find_pinning_descriptor() {
  const std::unique_ptr<DIR, int (*)(DIR*)> dir(::opendir("/proc/self/fd"), ::closedir);
  if (!dir) return "";
  char target[256];
  while (const dirent* entry = ::readdir(dir.get())) {
    const ssize_t n = ::readlinkat(::dirfd(dir.get()), entry->d_name, target, sizeof target - 1);
    if (n <= 0) continue;
    const std::string_view name(target, static_cast<size_t>(n));
    for (const char* prefix : {"/dev/infiniband/", "/dev/vfio/", "/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/gdrdrv",
                               "/dev/iommu", "/dev/xpmem", "anon_inode:[io_uring]"})
      if (name.starts_with(prefix)) return std::string("fd ") + entry->d_name + " is " + std::string(name);
  }
  return "";
}

std::string map_files_path(const VmArea& area) {
  char text[96];
  std::snprintf(text, sizeof text, "/proc/self/map_files/%lx-%lx", static_cast<unsigned long>(area.begin),
                static_cast<unsigned long>(area.end));
  return text;
}

uint64_t page_bytes() noexcept {
  static const uint64_t bytes = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace pdxfer::sys
