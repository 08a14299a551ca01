// The table of adopted memory, and finding or making the shared file behind a range. See shared_memory.hpp.
#include "sys/shared_memory.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <mutex>
#include <optional>

#include "core/log.hpp"
#include "core/status.hpp"
#include "sys/adoption.hpp"
#include "sys/mapping.hpp"
#include "sys/proc_maps.hpp"

namespace pdxfer::sys {
namespace {

constexpr uint64_t kWorthAdopting = 64 << 10;

using File = std::shared_ptr<const SharedFile>;

// Process-wide, because addresses are: two engines may register the same or neighbouring memory. Made once and never
// destroyed, so that threads and fork handlers may use it until the end of the process.
struct Table {
  std::mutex mutex;
  std::vector<File> adopted;
  struct Piece {
    void* address;
    uint64_t bytes;
    int prot, fd;
    uint64_t offset;
  };
  std::vector<Piece> inherited;  // between the fork handlers: what the child must make its own
};

Table& table() {
  static Table* const the_table = new Table;
  return *the_table;
}

bool same_file(const SharedFile& file, const VmArea& area) noexcept {
  return file.inode == area.inode && file.dev == area.dev;
}

File find_adopted(const VmArea& area) {
  for (const File& file : table().adopted)
    if (same_file(*file, area)) return file;
  return nullptr;
}

void forget_vanished(const std::vector<VmArea>& areas) {
  std::erase_if(table().adopted, [&](const File& file) {
    return std::none_of(areas.begin(), areas.end(),
                        [&](const VmArea& area) { return area.shared && same_file(*file, area); });
  });
}

// --- fork: a child must neither share adopted memory with its parent nor lose it ------------------------------------

void before_fork() {
  Table& t = table();
  t.mutex.lock();
  t.inherited.clear();
  if (t.adopted.empty()) return;
  try {
    for (const VmArea& area : read_maps()) {
      if (!area.shared || area.inode == 0) continue;
      if (const File file = find_adopted(area))
        t.inherited.push_back(
            {reinterpret_cast<void*>(area.begin), area.bytes(), area.prot, file->fd.get(), area.offset});
    }
  } catch (const std::exception& e) {
    log(LogLevel::kWarning, std::string("fork: a child will share registered memory with its parent: ") + e.what());
  }
}

void after_fork_in_parent() { table().mutex.unlock(); }

// Only system calls and plain stores: the parent may have had other threads.
void after_fork_in_child() {
  Table& t = table();
  for (const Table::Piece& piece : t.inherited) {
    void* at = ::mmap(piece.address, piece.bytes, piece.prot, MAP_PRIVATE | MAP_FIXED, piece.fd,
                      static_cast<off_t>(piece.offset));
    if (at == MAP_FAILED || !(piece.prot & PROT_WRITE)) continue;
    // The outer pages hold the program's own neighbours (a malloc header): copy them now, before the parent goes on.
    for (volatile char* page : {static_cast<char*>(at), static_cast<char*>(at) + piece.bytes - page_bytes()})
      *page = *page;
  }
  t.mutex.unlock();
}

void watch_forks() {
  static const int registered = ::pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  if (registered != 0) throw Error(Code::kUnavailable, "pthread_atfork: " + errno_name(registered), registered);
}

// --- memory that is shared already ----------------------------------------------------------------------------------

// Does the descriptor denote the area's file, long enough and open for both reading and writing?
bool denotes(int fd, const VmArea& area) {
  struct stat info {};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_ino != area.inode || info.st_dev != area.dev)
    return false;
  return (::fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR &&
         static_cast<uint64_t>(info.st_size) >= area.offset + area.bytes();
}

UniqueFd find_descriptor(const VmArea& area) {
  const std::unique_ptr<DIR, int (*)(DIR*)> dir(::opendir("/proc/self/fd"), ::closedir);
  if (!dir) return UniqueFd();
  while (const dirent* entry = ::readdir(dir.get())) {
    char* end = nullptr;
    const int fd = static_cast<int>(std::strtol(entry->d_name, &end, 10));
    if (end == entry->d_name || fd == ::dirfd(dir.get()) || !denotes(fd, area)) continue;
    UniqueFd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (copy && denotes(copy.get(), area)) return copy;  // the program may close and reuse the number meanwhile
  }
  return UniqueFd();
}

File find_shared_file(const VmArea& area, std::string& refusal) {
  if (File known = find_adopted(area)) return known;
  constexpr int kFlags = O_RDWR | O_CLOEXEC | O_NOFOLLOW;
  UniqueFd fd(::open(map_files_path(area).c_str(), O_RDWR | O_CLOEXEC));  // needs CAP_CHECKPOINT_RESTORE
  if (!fd || !denotes(fd.get(), area)) fd = UniqueFd(::open(area.path.c_str(), kFlags | O_NONBLOCK));
  if (!fd || !denotes(fd.get(), area)) fd = find_descriptor(area);
  if (!fd || !denotes(fd.get(), area)) {
    refusal = "no descriptor found for the shared file " + (area.path.empty() ? "behind the memory" : area.path);
    return nullptr;
  }
  return std::make_shared<SharedFile>(SharedFile{std::move(fd), area.dev, area.inode});
}

// --- private memory
// ---------------------------------------------------------------------------------------------------

// Empty when the area's pages may be exchanged.
std::string why_not_adoptable(const VmArea& area) {
  if (area.inode != 0) return "private mapping of the file " + area.path;
  if (!area.path.empty() && !area.path.starts_with("[anon")) return "memory of " + area.path;
  if (area.prot != (PROT_READ | PROT_WRITE)) return "memory that is not readable and writable";
  return "";
}

std::string why_not_adopt(uintptr_t begin, uintptr_t end, uint64_t bytes, Adopt adopt) {
  if (adopt == Adopt::kNever) return "private memory";
  // While a chunk is frozen this thread must not write to it: not even to its own frames, which are here and below.
  const auto here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  if (begin <= here && end + (256 << 10) > here) return "the calling thread's own stack";
  if (has_locked_memory(begin, end)) return "locked (mlock) or device memory";
  if (adopt == Adopt::kAlways) return "";
  if (bytes < kWorthAdopting) return "private memory smaller than 64 KiB";
  if (const std::string pinner = find_pinning_descriptor(); !pinner.empty())
    return "private memory that a device may have pinned (" + pinner + ")";
  return "";
}

// Where memory at `address` goes in a file that is filled up to `offset`: huge pages need both at the same distance
// from a multiple of their size. What is skipped is a hole, which costs nothing.
uint64_t offset_for(const std::byte* address, uint64_t offset) noexcept {
  return offset + ((reinterpret_cast<uintptr_t>(address) - offset) & (kHugePage - 1));
}

// Fills in the files of the segments that have none.
std::string adopt_segments(std::vector<Segment>& segments, Adopt adopt) {
  std::string why;
  std::optional<WriteFreeze> freeze = WriteFreeze::open(why);
  if (!freeze && adopt != Adopt::kAlways) return "concurrent writers cannot be held back: " + why;
  uint64_t total = 0;
  for (const Segment& segment : segments)
    if (!segment.file) total = offset_for(segment.address, total) + segment.bytes;
  auto file = std::make_shared<SharedFile>();
  file->fd = make_memfd("pdxfer", total);
  struct stat info {};
  if (::fstat(file->fd.get(), &info) != 0) return "fstat of a memfd: " + errno_name(errno);
  file->dev = info.st_dev;
  file->inode = info.st_ino;
  watch_forks();
  table().adopted.push_back(file);  // before the first exchange: what is shared is known even if a later piece fails
  uint64_t offset = 0;
  for (Segment& segment : segments) {
    if (segment.file) continue;
    offset = offset_for(segment.address, offset);
    const Status status = adopt_pages(segment.address, segment.bytes, PROT_READ | PROT_WRITE, file->fd.get(), offset,
                                      freeze ? &*freeze : nullptr);
    if (!status.ok()) return "adopting private memory: " + status.to_string();
    segment.offset = offset;
    segment.file = file;
    offset += segment.bytes;
  }
  return "";
}

// Neighbours of one file become one segment.
void merge(std::vector<Segment>& segments) {
  size_t kept = 0;
  for (size_t i = 1; i < segments.size(); ++i) {
    Segment& last = segments[kept];
    if (segments[i].file == last.file && segments[i].offset == last.offset + last.bytes)
      last.bytes += segments[i].bytes;
    else
      segments[++kept] = segments[i];
  }
  segments.resize(segments.empty() ? 0 : kept + 1);
}

std::string describe_range(uintptr_t begin, uintptr_t end) {
  char text[64];
  std::snprintf(text, sizeof text, "[%#lx, %#lx)", static_cast<unsigned long>(begin), static_cast<unsigned long>(end));
  return text;
}

// One segment per area of the range; those of private memory have no file yet.
std::vector<Segment> look_up(const std::vector<VmArea>& areas, uintptr_t begin, uintptr_t end, std::string& refusal) {
  std::vector<Segment> segments;
  uintptr_t at = begin;
  for (const VmArea& area : areas) {
    if (area.end <= begin || area.begin >= end) continue;
    if (area.begin > at) break;
    const uintptr_t stop = std::min(area.end, end);
    Segment segment{reinterpret_cast<std::byte*>(at), stop - at, area.offset + (at - area.begin), nullptr};
    if (!area.shared) {
      refusal = why_not_adoptable(area);
    } else {
      for (const Segment& seen : segments)
        if (seen.file && same_file(*seen.file, area)) segment.file = seen.file;
      if (!segment.file) segment.file = find_shared_file(area, refusal);
    }
    if (!refusal.empty()) return {};
    segments.push_back(std::move(segment));
    at = stop;
  }
  if (at < end)
    throw Error(Code::kInvalid, "memory " + describe_range(begin, end) + " is not mapped from " +
                                    describe_range(at, end) + " on: register memory that exists");
  return segments;
}

}  // namespace

SharedView share_memory(std::byte* data, uint64_t bytes, Adopt adopt) {
  const uint64_t page = page_bytes();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + page - 1) & ~(page - 1);
  const std::lock_guard lock(table().mutex);
  const std::vector<VmArea> areas = read_maps();
  forget_vanished(areas);
  SharedView view;
  view.segments = look_up(areas, begin, end, view.refusal);
  const bool all_shared =
      std::all_of(view.segments.begin(), view.segments.end(), [](const Segment& s) { return s.file != nullptr; });
  if (view.refusal.empty() && !all_shared) {
    view.refusal = why_not_adopt(begin, end, bytes, adopt);
    try {
      if (view.refusal.empty()) view.refusal = adopt_segments(view.segments, adopt);
    } catch (const Error& e) {
      view.refusal = e.what();
    }
  }
  if (!view.refusal.empty()) view.segments.clear();
  merge(view.segments);
  return view;
}

size_t release_vanished() noexcept {
  const std::lock_guard lock(table().mutex);
  const auto idle = [](const File& file) { return file.use_count() == 1; };
  try {
    if (std::any_of(table().adopted.begin(), table().adopted.end(), idle)) forget_vanished(read_maps());
  } catch (const std::exception& e) {
    log(LogLevel::kWarning, std::string("adopted memory is kept: ") + e.what());
  }
  return static_cast<size_t>(std::count_if(table().adopted.begin(), table().adopted.end(), idle));
}

size_t adopted_files() noexcept {
  const std::lock_guard lock(table().mutex);
  return table().adopted.size();
}

}  // namespace pdxfer::sys
