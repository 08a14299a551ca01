// Adoption of private memory: contents, neighbours, racing writers, forks, leaks and refusals.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>
#include <thread>

#include "core/status.hpp"
#include "sys/mapping.hpp"
#include "sys/proc_maps.hpp"
#include "sys/shared_memory.hpp"

// Exchanging pages under a writer is what one test is about, and newer thread sanitizers take mmap for a write.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() { return "race:pdxfer::sys::adopt_pages\n"; }

namespace {
constexpr int kCollapse = 25;  // MADV_COLLAPSE
std::atomic<int> collapses{0}, refusals_left{0};
}  // namespace

// In place of libc's, so that a test can have the kernel busy.
extern "C" __attribute__((visibility("default"))) int madvise(void* at, size_t bytes, int advice) noexcept {
  if (advice == kCollapse) {
    ++collapses;
    if (refusals_left > 0) {
      --refusals_left;
      errno = EAGAIN;
      return -1;
    }
  }
  return static_cast<int>(::syscall(SYS_madvise, at, bytes, advice));
}

namespace {

using namespace pdxfer;
using sys::Adopt;

// Anonymous private memory of its own, as malloc gives for large sizes.
struct Anonymous {
  explicit Anonymous(uint64_t bytes)
      : map(static_cast<std::byte*>(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)),
            bytes) {
    REQUIRE(map.data() != MAP_FAILED);
  }
  std::byte* data() const { return map.data(); }
  sys::Mapping map;
};

void fill(std::byte* at, uint64_t bytes, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (uint64_t i = 0; i < bytes; ++i) at[i] = static_cast<std::byte>(random() >> 56);
}

// The region's bytes, seen through its descriptors as a peer sees them.
std::vector<std::byte> seen_by_peer(const sys::SharedView& view) {
  std::vector<std::byte> bytes;
  for (const sys::Segment& s : view.segments) {
    const sys::Mapping map = sys::map_shared(s.file->fd.get(), s.offset, s.bytes);
    bytes.insert(bytes.end(), map.data(), map.data() + s.bytes);
  }
  return bytes;
}

size_t count_entries(const char* directory) {
  size_t n = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory)) ++n;
  return n;
}

int run_child(int (*body)(std::byte*), std::byte* argument) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(body(argument));
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

}  // namespace

TEST_CASE("adopted memory keeps its contents and is the peer's memory too") {
  const uint64_t bytes = (70 << 20) + 12345;  // three chunks, the last of them partial
  Anonymous memory(bytes);
  fill(memory.data(), bytes, 1);
  const std::vector<std::byte> before(memory.data(), memory.data() + bytes);
  const sys::SharedView view = sys::share_memory(memory.data(), bytes, Adopt::kWhenSafe);
  REQUIRE_MESSAGE(view.refusal.empty(), view.refusal);
  REQUIRE(view.segments.size() == 1);
  CHECK(std::memcmp(memory.data(), before.data(), bytes) == 0);
  const sys::Segment& only = view.segments[0];
  const sys::Mapping peer = sys::map_shared(only.file->fd.get(), only.offset, only.bytes);
  CHECK(std::memcmp(peer.data(), before.data(), bytes) == 0);
  peer.data()[bytes - 1] ^= std::byte{0xff};
  CHECK(memory.data()[bytes - 1] == peer.data()[bytes - 1]);
  memory.data()[0] ^= std::byte{0xff};
  CHECK(memory.data()[0] == peer.data()[0]);
  // Sizes are sealed: no holder can make the other end's mapping fault.
  CHECK(::ftruncate(view.segments[0].file->fd.get(), 0) != 0);
  // Again: found, not adopted a second time.
  const size_t files = sys::adopted_files();
  const sys::SharedView again = sys::share_memory(memory.data(), bytes, Adopt::kNever);
  REQUIRE(again.segments.size() == 1);
  CHECK(again.segments[0].file == view.segments[0].file);
  CHECK(sys::adopted_files() == files);
}

TEST_CASE("memory of a peer that is too small, that it could shrink, or that is none is not mapped") {
  const auto refused = [](int fd, uint64_t bytes) {
    try {
      sys::map_memfd(fd, bytes, "a ring");
      return false;
    } catch (const Error& error) {
      CHECK(error.code() == Code::kInvalid);
      return std::string(error.what()).starts_with("a ring: ");
    }
  };
  const sys::UniqueFd sealed = sys::make_memfd("sealed", 8192);
  CHECK_FALSE(refused(sealed.get(), 8192));
  CHECK(refused(sealed.get(), 8193));
  CHECK(refused(sealed.get(), 0));
  const sys::UniqueFd open(::memfd_create("open", MFD_ALLOW_SEALING));
  REQUIRE(::ftruncate(open.get(), 8192) == 0);
  CHECK(refused(open.get(), 8192));
  REQUIRE(::fcntl(open.get(), F_ADD_SEALS, F_SEAL_GROW) == 0);
  CHECK(refused(open.get(), 8192));
  REQUIRE(::fcntl(open.get(), F_ADD_SEALS, F_SEAL_SHRINK) == 0);
  CHECK_FALSE(refused(open.get(), 8192));
  const sys::UniqueFd null(::open("/dev/null", O_RDWR));
  CHECK(refused(null.get(), 8192));
  CHECK(refused(-1, 8192));
}

TEST_CASE("huge pages change neither contents nor addresses, and adopted memory can have them") {
  constexpr uint64_t kBytes = 8 << 20;
  void* const at = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(at != MAP_FAILED);
  auto* const data = static_cast<std::byte*>(at);
  const auto expected = [](uint64_t i) { return static_cast<std::byte>(i / 512 % 251); };
  const auto wrong = [&] {
    uint64_t count = 0;
    for (uint64_t i = 0; i < kBytes; i += 512) count += data[i] != expected(i);
    return count;
  };
  for (uint64_t i = 0; i < kBytes; i += 512) data[i] = expected(i);
  pdxfer::sys::prefer_huge_pages(data, kBytes);
  CHECK(wrong() == 0);
  {
    const auto view = pdxfer::sys::share_memory(data, kBytes, pdxfer::sys::Adopt::kAlways);
    REQUIRE_MESSAGE(view.refusal.empty(), view.refusal);
    for (const auto& segment : view.segments)
      CHECK((segment.offset - reinterpret_cast<uintptr_t>(segment.address)) % pdxfer::sys::kHugePage == 0);
    pdxfer::sys::prefer_huge_pages(data, kBytes);
    CHECK(wrong() == 0);
  }
  ::munmap(at, kBytes);
  CHECK(pdxfer::sys::release_vanished() == 0);
}

TEST_CASE("a kernel that is busy is asked for huge pages again, but not for ever") {
  constexpr uint64_t kBytes = 8 << 20;
  Anonymous memory(kBytes);
  fill(memory.data(), kBytes, 3);
  const auto asked = [&](int refusals) {
    collapses = 0;
    refusals_left = refusals;
    sys::prefer_huge_pages(memory.data(), kBytes);
    refusals_left = 0;
    return collapses.load();
  };
  CHECK(asked(2) == 3);
  CHECK(asked(1000) == 4);
}

TEST_CASE("memory that was never used is not committed by adoption") {
  const uint64_t bytes = 256 << 20;
  Anonymous memory(bytes);
  memory.data()[100 << 20] = std::byte{1};
  const sys::SharedView view = sys::share_memory(memory.data(), bytes, Adopt::kWhenSafe);
  REQUIRE_MESSAGE(view.refusal.empty(), view.refusal);
  struct stat info {};
  REQUIRE(::fstat(view.segments[0].file->fd.get(), &info) == 0);
  CHECK(info.st_blocks * 512 <= 1 << 20);
  CHECK(memory.data()[100 << 20] == std::byte{1});
}

TEST_CASE("neighbours share their edge pages") {
  const uint64_t page = sys::page_bytes();
  Anonymous memory(64 * page);
  fill(memory.data(), 64 * page, 2);
  const std::vector<std::byte> before(memory.data(), memory.data() + 64 * page);
  // [1000, 20 pages + 1000), [.., 40 pages + 1000), [.., 63 pages): each begins in the page where the last one ends.
  const uint64_t edges[] = {1000, 20 * page + 1000, 40 * page + 1000, 63 * page};
  std::vector<sys::SharedView> views;
  for (int i : {1, 0, 2}) {
    views.push_back(sys::share_memory(memory.data() + edges[i], edges[i + 1] - edges[i], Adopt::kWhenSafe));
    REQUIRE_MESSAGE(views.back().refusal.empty(), views.back().refusal);
  }
  CHECK(views[0].segments.size() == 1);
  CHECK(views[1].segments.size() == 2);
  CHECK(std::memcmp(memory.data(), before.data(), 64 * page) == 0);
  for (uint64_t i = 0; i < 64 * page; ++i) memory.data()[i] ^= std::byte{0x5a};
  for (const auto& view : views) {
    const std::vector<std::byte> there = seen_by_peer(view);
    CHECK(std::memcmp(there.data(), view.segments[0].address, there.size()) == 0);
  }
}

TEST_CASE("a region over several areas, partly shared already") {
  const uint64_t page = sys::page_bytes();
  Anonymous memory(100 * page);
  const sys::UniqueFd file = sys::make_memfd("test", 10 * page);
  REQUIRE(::mmap(memory.data() + 40 * page, 10 * page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file.get(), 0) !=
          MAP_FAILED);
  fill(memory.data(), 100 * page, 3);
  const sys::SharedView view = sys::share_memory(memory.data() + 10, 100 * page - 20, Adopt::kWhenSafe);
  REQUIRE_MESSAGE(view.refusal.empty(), view.refusal);
  CHECK(view.segments.size() == 3);
  const std::vector<std::byte> there = seen_by_peer(view);
  REQUIRE(there.size() == 100 * page);
  CHECK(std::memcmp(there.data(), memory.data(), there.size()) == 0);
}

TEST_CASE("no write is lost while pages are exchanged") {
  constexpr int kThreads = 3;
  const uint64_t bytes = 96 << 20;
  Anonymous memory(bytes);
  auto* const words = reinterpret_cast<uint64_t*>(memory.data());
  const uint64_t count = bytes / sizeof(uint64_t);
  std::atomic<bool> stop{false};
  std::atomic<int> started{0};
  std::vector<std::vector<uint64_t>> written(kThreads, std::vector<uint64_t>(1 << 16, 0));
  std::vector<std::thread> writers;
  for (int t = 0; t < kThreads; ++t)
    writers.emplace_back([&, t] {
      // Thread t owns words t, t + kThreads, ... of a random selection spread over the whole range.
      std::mt19937_64 random(static_cast<uint64_t>(t));
      ++started;
      while (!stop)
        for (int burst = 0; burst < 1000; ++burst) {
          const uint64_t k = random() & 0xffff;
          const uint64_t at = (k * (count / (1 << 16)) / kThreads * kThreads + static_cast<uint64_t>(t)) % count;
          std::atomic_ref<uint64_t>(words[at]).store(std::atomic_ref<uint64_t>(words[at]).load() + 1);
          ++written[static_cast<size_t>(t)][k];
        }
    });
  while (started < kThreads) std::this_thread::yield();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const sys::SharedView view = sys::share_memory(memory.data(), bytes, Adopt::kWhenSafe);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  stop = true;
  for (auto& writer : writers) writer.join();
  REQUIRE_MESSAGE(view.refusal.empty(), view.refusal);
  std::vector<uint64_t> expected(count, 0);
  for (uint64_t t = 0; t < kThreads; ++t)
    for (uint64_t k = 0; k < 1 << 16; ++k)
      expected[(k * (count / (1 << 16)) / kThreads * kThreads + t) % count] += written[t][k];
  uint64_t wrong = 0;
  for (uint64_t i = 0; i < count; ++i) wrong += words[i] != expected[i];
  CHECK(wrong == 0);
}

TEST_CASE("a forked child has its own copy, as of any private memory") {
  const uint64_t bytes = 8 << 20;
  Anonymous memory(bytes);
  fill(memory.data(), bytes, 4);
  const std::vector<std::byte> before(memory.data(), memory.data() + bytes);
  {
    const sys::SharedView view = sys::share_memory(memory.data() + 100, bytes - 200, Adopt::kWhenSafe);
    REQUIRE_MESSAGE(view.refusal.empty(), view.refusal);
  }
  const int code = run_child(
      [](std::byte* data) {
        int sum = 0;
        for (uint64_t i = 0; i < 8 << 20; i += 4096) sum += std::to_integer<int>(data[i]);
        std::memset(data, 0xee, 8 << 20);
        return data[5] == std::byte{0xee} && sum > 0 ? 7 : 8;
      },
      memory.data());
  CHECK(code == 7);
  CHECK(std::memcmp(memory.data(), before.data(), bytes) == 0);
}

TEST_CASE("thousands of registrations leave nothing behind") {
  CHECK(sys::release_vanished() == 0);  // of the cases before
  const size_t before = count_entries("/proc/self/fd");
  const size_t areas = sys::read_maps().size();
  for (int i = 0; i < 2000; ++i) {
    Anonymous memory(128 << 10);
    memory.data()[i] = std::byte{1};
    const sys::SharedView view = sys::share_memory(memory.data() + 16, (128 << 10) - 32, Adopt::kWhenSafe);
    REQUIRE_MESSAGE(view.refusal.empty(), view.refusal);
  }
  CHECK(sys::release_vanished() == 0);
  CHECK(sys::adopted_files() == 0);
  CHECK(count_entries("/proc/self/fd") == before);
  CHECK(sys::read_maps().size() <= areas + 8);
}

TEST_CASE("without descriptors the refusal says so and the memory is as it was") {
  const uint64_t bytes = 1 << 20;
  Anonymous memory(bytes);
  fill(memory.data(), bytes, 5);
  const std::vector<std::byte> before(memory.data(), memory.data() + bytes);
  rlimit limit{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &limit) == 0);
  sys::SharedView view;
  for (rlim_t spare = 1; spare <= 4; ++spare) {
    const rlimit tight{count_entries("/proc/self/fd") - 1 + spare, limit.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &tight) == 0);
    try {
      view = sys::share_memory(memory.data(), bytes, Adopt::kWhenSafe);
    } catch (const Error& e) {
      view.refusal = e.what();
    }
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &limit) == 0);
    if (view.refusal.empty()) break;
    CHECK(view.refusal.find("EMFILE") != std::string::npos);
    CHECK(std::memcmp(memory.data(), before.data(), bytes) == 0);
  }
  CHECK_MESSAGE(view.refusal.empty(), view.refusal);
}

TEST_CASE("what must not be exchanged is refused") {
  const uint64_t page = sys::page_bytes();
  const uint64_t bytes = 1 << 20;
  const auto refusal = [&](std::byte* at, uint64_t n, Adopt adopt = Adopt::kWhenSafe) {
    return sys::share_memory(at, n, adopt).refusal;
  };
  Anonymous memory(bytes);
  CHECK(refusal(memory.data(), 8 * page).find("64 KiB") != std::string::npos);
  CHECK(refusal(memory.data(), bytes, Adopt::kNever) == "private memory");
  REQUIRE(::syscall(SYS_mlock, memory.data() + page, page) == 0);  // sanitizers turn mlock() into nothing
  CHECK(refusal(memory.data(), bytes, Adopt::kAlways).find("mlock") != std::string::npos);
  REQUIRE(::syscall(SYS_munlock, memory.data() + page, page) == 0);
  REQUIRE(::mprotect(memory.data() + page, page, PROT_READ) == 0);
  CHECK(refusal(memory.data(), bytes).find("writable") != std::string::npos);
  REQUIRE(::mprotect(memory.data() + page, page, PROT_READ | PROT_WRITE) == 0);
  std::byte on_stack[200000];
  CHECK_FALSE(refusal(on_stack, sizeof on_stack, Adopt::kAlways).empty());
  auto* program_break = static_cast<std::byte*>(::sbrk(static_cast<intptr_t>(8 * page)));
  CHECK(refusal(program_break + page, 4 * page, Adopt::kAlways).find("[heap]") != std::string::npos);
  std::thread([&] {
    std::byte on_thread_stack[200000];
    CHECK(refusal(on_thread_stack, sizeof on_thread_stack, Adopt::kAlways).find("stack") != std::string::npos);
  }).join();
  std::byte* gone = memory.data();
  memory.map.reset();
  CHECK_THROWS_AS(sys::share_memory(gone, bytes, Adopt::kWhenSafe), Error);
}

TEST_CASE("memory that a program shared itself is found by map_files, path or descriptor") {
  const uint64_t bytes = 1 << 20;
  const std::string path = "/dev/shm/pdxfer-test-" + std::to_string(::getpid());
  sys::UniqueFd file(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  REQUIRE(file);
  REQUIRE(::ftruncate(file.get(), bytes) == 0);
  const sys::Mapping map = sys::map_shared(file.get(), 0, bytes);
  fill(map.data(), bytes, 6);
  for (int stage = 0; stage < 2; ++stage) {
    if (stage == 1) ::unlink(path.c_str());
    const sys::SharedView view = sys::share_memory(map.data(), bytes, Adopt::kNever);
    REQUIRE_MESSAGE(view.refusal.empty(), view.refusal);
    CHECK(seen_by_peer(view) == std::vector<std::byte>(map.data(), map.data() + bytes));
  }
}
