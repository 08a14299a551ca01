// Two engines in two processes, each seeing one GPU, and what cuda_ipc moves between them: rates against the copy
// engine's own over the same mapping, latency of small requests, and every byte compared afterwards, also outside the
// pages that were written. Built by tests/gpu/native/build.sh; `two_gpus [--cuda OPTIONS] [--pause US] [--same-gpu]
// [--allocations] [--only TEXT] | --selftest CASES`; OPTIONS as Config::cuda, --pause lets everything go idle before
// each transfer, --allocations gives each buffer one of its own, as a server's layers have, --only leaves rows out
// whose name has no TEXT in it. A line per row.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "engine/engine.hpp"
#include "pack/device_selftest.hpp"
#include "sys/cuda_stream.hpp"

using namespace pdxfer;
using Clock = std::chrono::steady_clock;

namespace {

constexpr uint64_t kPool = 1ull << 30;
constexpr uint32_t kMaxRegions = 64;  // of a pool; more than any workload has buffers

struct Workload {
  const char* name;
  uint32_t buffers;
  uint64_t page, stride;
  uint32_t count;  // pages per transfer
  uint32_t run;    // consecutive pages on both sides
};

constexpr Workload kWorkloads[] = {
    {"contiguous 1 KiB x 4096", 56, 1024, 1024, 4096, 4096},
    {"random 1 KiB", 56, 1024, 1024, 4096, 1},
    {"busy decode, runs of 8", 56, 1024, 1024, 4096, 8},
    {"random 16 KiB", 56, 16384, 16384, 256, 1},
    {"random 64 KiB", 56, 65536, 65536, 64, 1},
    {"MLA random 1152 B", 61, 1152, 1152, 4096, 1},
    {"MLA random 73728 B", 61, 73728, 73728, 64, 1},
    {"slices of 512 B", 56, 512, 1024, 8192, 1},
    {"slices of 256 B", 56, 256, 1024, 8192, 1},
    {"128 tokens (7 MB)", 56, 1024, 1024, 128, 1},
};

// What both processes see: where they meet, and when something arrived.
struct Board {
  std::atomic<int> stage;
  char address[128];
  uint32_t regions;  // of each pool: 1, or kMaxRegions
  RegionId pool[kMaxRegions];
  shim::CuIpcHandle handle;  // of memory for the ceiling
  std::atomic<int64_t> arrived_ns[1 << 16];
  std::atomic<uint64_t> bad;
  std::atomic<int> verify;  // workload + 1 to be compared; 0: done
};

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

// Buffer i is the i-th part of the only region, or region i.
PagedCopy make_copy(const Workload& w, std::span<const RegionId> src, std::span<const RegionId> dst) {
  std::mt19937 random(w.count + static_cast<uint32_t>(w.page));
  const bool single = src.size() == 1;
  const auto slots = static_cast<uint32_t>(kPool / (single ? w.buffers : src.size()) / w.stride);
  const uint32_t runs = slots / w.run;
  std::vector<uint32_t> from(runs), to(runs);
  for (uint32_t i = 0; i < runs; ++i) from[i] = to[i] = i * w.run;
  if (w.run != w.count) {
    std::shuffle(from.begin(), from.end(), random);
    std::shuffle(to.begin(), to.end(), random);
  }
  PagedCopy copy;
  for (uint32_t i = 0; i < w.buffers; ++i) {
    const uint64_t at = single ? uint64_t{i} * slots * w.stride : 0;
    const uint32_t region = single ? 0 : i;
    copy.pairs.push_back({src[region], dst[region], at, at, w.stride, w.stride, w.page});
  }
  for (uint32_t i = 0; i < w.count / w.run; ++i) copy.runs.push_back({from[i], to[i], w.run});
  copy.seal();
  return copy;
}

std::vector<std::byte> pattern() {
  std::vector<std::byte> data(kPool);
  std::mt19937_64 random(11);
  for (size_t i = 0; i < data.size(); i += 8) {
    const uint64_t word = random();
    std::memcpy(&data[i], &word, 8);
  }
  return data;
}

// kPool bytes of a device, in one allocation or several.
struct Pool {
  Pool(uint32_t count, const std::vector<std::byte>& content) : bytes(kPool / count) {
    for (uint32_t i = 0; i < count; ++i) parts.emplace_back(std::span(content).subspan(i * bytes, bytes));
  }
  void read(std::vector<std::byte>& into) const {
    for (size_t i = 0; i < parts.size(); ++i) parts[i].read(std::span(into).subspan(i * bytes, bytes));
  }
  void write(const std::vector<std::byte>& content) const {
    for (size_t i = 0; i < parts.size(); ++i)
      shim::cuda_check(shim::cuda().api.copy_to_device(parts[i].get(), content.data() + i * bytes, bytes),
                       "cuMemcpyHtoD");
  }
  void add_to(engine::Engine& engine, RegionId* regions) const {
    for (const sys::CudaMemory& part : parts)
      *regions++ = engine.register_memory({reinterpret_cast<std::byte*>(part.get()), bytes, 0}).id;
  }
  const uint64_t bytes;  // of each
  std::deque<sys::CudaMemory> parts;
};

uint64_t compare(const Workload& w, const Pool& pool, const std::vector<std::byte>& source) {
  std::vector<std::byte> want(kPool, std::byte{0xa5}), got(kPool);
  std::vector<RegionId> numbers(pool.parts.size());
  std::iota(numbers.begin(), numbers.end(), 0u);
  const PagedCopy copy = make_copy(w, numbers, numbers);
  for (Cursor at; !at_end(copy, at);) {
    const Extent e = next_extent(copy, at, UINT64_MAX);
    const uint64_t part = copy.pairs[e.pair].src * pool.bytes;
    std::memcpy(&want[part + e.dst_offset], &source[part + e.src_offset], e.bytes);
  }
  pool.read(got);
  uint64_t bad = 0;
  for (size_t i = 0; i < kPool; i += 4096) bad += std::memcmp(&got[i], &want[i], 4096) != 0;
  return bad;
}

Config config_of(const std::string& cuda) {
  Config config;
  config.transports = "cuda_ipc";
  if (!cuda.empty()) config.cuda = cuda;
  return config;
}

int receiver(Board& board, const char* gpu, const std::string& cuda) {
  ::setenv("CUDA_VISIBLE_DEVICES", gpu, 1);
  const std::vector<std::byte> source = pattern(), blank(kPool, std::byte{0xa5});
  const sys::CudaContext context(0);
  const sys::CudaScope scope(context);
  const Pool pool(board.regions, blank);
  const sys::CudaMemory spare(kPool);
  shim::cuda_check(shim::cuda().api.ipc_get_handle(&board.handle, spare.get()), "cuIpcGetMemHandle");
  engine::Engine engine(config_of(cuda));
  pool.add_to(engine, board.pool);
  std::snprintf(board.address, sizeof board.address, "%s", engine.address().c_str());
  board.stage = 1;
  while (board.stage != 3) {
    for (const Completion& c : engine.poll(64)) board.arrived_ns[c.tag & 0xffff] = now_ns();
    if (const int which = board.verify; which != 0) {
      board.bad = compare(kWorkloads[which - 1], pool, source);
      pool.write(blank);
      board.verify = 0;
    }
  }
  engine.close();
  return 0;
}

double ceiling(const Board& board, const sys::CudaContext& context) {
  const shim::CudaDriver& api = shim::cuda().api;
  const sys::CudaMemory here(kPool);
  shim::CuDevicePtr there = 0;
  shim::cuda_check(api.ipc_open_handle(&there, board.handle, shim::kCuIpcLazyPeerAccess), "cuIpcOpenMemHandle");
  double best = 0;
  {
    const sys::CudaStream stream(context);
    for (int i = 0; i < 6; ++i) {
      const int64_t begin = now_ns();
      shim::cuda_check(api.copy_async(there, here.get(), kPool, stream.get()), "cuMemcpyAsync");
      shim::cuda_check(api.stream_synchronize(stream.get()), "cuStreamSynchronize");
      best = std::max(best, static_cast<double>(kPool) / static_cast<double>(now_ns() - begin));
    }
  }
  shim::cuda_check(api.ipc_close_handle(there), "cuIpcCloseMemHandle");
  return best;
}

struct Times {
  double p50 = 0, p99 = 0;
};
Times times_of(std::vector<double> all) {
  std::sort(all.begin(), all.end());
  return {all[all.size() / 2], all[all.size() * 99 / 100]};
}

// GB/s of `count` transfers of which two are under way at any time.
double back_to_back(engine::Engine& engine, PeerId peer, const std::shared_ptr<TransferPlan>& plan, int count) {
  std::shared_ptr<engine::Batch> before;
  const int64_t begin = now_ns();
  for (int i = 0; i <= count; ++i) {
    const auto next = i < count ? engine.submit(peer, plan, 0, {}) : nullptr;
    if (before && !(before->wait_until(Clock::now() + std::chrono::seconds(10)) && before->status().ok())) return 0;
    before = next;
  }
  return static_cast<double>(plan->bytes()) * count / static_cast<double>(now_ns() - begin);
}

void row(engine::Engine& engine, PeerId peer, Board& board, int index, std::span<const RegionId> mine, double top,
         uint32_t pause) {
  const Workload& w = kWorkloads[index];
  auto plan = std::make_shared<TransferPlan>();
  plan->copies.push_back(make_copy(w, mine, std::span(board.pool).first(mine.size())));
  const int rounds = plan->bytes() > (32 << 20) ? 30 : pause > 1000 ? 100 : 1000;
  std::vector<double> notified, done;
  for (int i = 0; i < rounds; ++i) {
    const auto tag = static_cast<uint64_t>(index * 2000 + i) & 0xffff;
    board.arrived_ns[tag] = 0;
    if (pause != 0 || rounds > 100) std::this_thread::sleep_for(std::chrono::microseconds(pause != 0 ? pause : 500));
    const int64_t begin = now_ns();
    const auto batch = engine.submit(peer, plan, tag, {});
    if (!batch->wait_until(Clock::now() + std::chrono::seconds(10)) || !batch->status().ok()) {
      std::printf("%s: FAILED %s\n", w.name, batch->status().to_string().c_str());
      return;
    }
    done.push_back(static_cast<double>(now_ns() - begin) / 1e3);
    while (board.arrived_ns[tag] == 0) std::this_thread::yield();
    notified.push_back(static_cast<double>(board.arrived_ns[tag] - begin) / 1e3);
  }
  const double burst = back_to_back(engine, peer, plan, rounds > 30 ? 200 : 20);
  board.verify = index + 1;
  while (board.verify != 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const Times n = times_of(notified), d = times_of(done);
  const double rate = static_cast<double>(plan->bytes()) / n.p50 / 1e3;
  std::printf(
      "%-26s %6.1f MB  notified p50 %8.1f p99 %8.1f us  done p50 %8.1f us  %6.1f GB/s  %5.1f %%  "
      "two at a time %6.1f GB/s  %s\n",
      w.name, static_cast<double>(plan->bytes()) / 1e6, n.p50, n.p99, d.p50, rate, 100 * rate / top, burst,
      board.bad == 0 ? "verified" : "WRONG BYTES");
  std::fflush(stdout);
}

int sender(Board& board, const std::string& cuda, uint32_t pause, const char* only) {
  ::setenv("CUDA_VISIBLE_DEVICES", "0", 1);
  const std::vector<std::byte> source = pattern();
  const sys::CudaContext context(0);
  const sys::CudaScope scope(context);
  const Pool pool(board.regions, source);
  for (int i = 0; board.stage == 0 && i < 60000; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const double top = ceiling(board, context);
  engine::Engine engine(config_of(cuda));
  std::vector<RegionId> mine(board.regions);
  pool.add_to(engine, mine.data());
  const PeerId peer = engine.connect(board.address, std::chrono::seconds(20));
  std::printf("ceiling (copy engine, 1 GiB) %.1f GB/s; %s\n", top, engine.peer(peer)->link_text().c_str());
  for (int i = 0; i < static_cast<int>(std::size(kWorkloads)); ++i)
    if (std::strstr(kWorkloads[i].name, only) != nullptr) row(engine, peer, board, i, mine, top, pause);
  std::printf("afterwards: %s\n", engine.peer(peer)->link_text().c_str());
  engine.close();
  board.stage = 3;
  return 0;
}

}  // namespace

// Random copies by the kernels, gathered, scattered and paged, against the CPU's walk: also under compute-sanitizer.
int selftest(uint32_t cases) {
  const pack::SelfTestResult result = pack::device_selftest(0, 20261124, cases);
  std::printf("selftest: %u cases, %.1f MB, %s\n", result.cases, static_cast<double>(result.bytes) / 1e6,
              result.failure.empty() ? "all equal" : result.failure.c_str());
  return result.failure.empty() ? 0 : 1;
}

int main(int argc, char** argv) {
  uint32_t pause = 0, regions = 1;
  std::string cuda;
  const char *gpu = "1", *only = "";
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--selftest") == 0 && i + 1 < argc)
      return selftest(static_cast<uint32_t>(std::atoi(argv[i + 1])));
    if (std::strcmp(argv[i], "--same-gpu") == 0) gpu = "0";
    if (std::strcmp(argv[i], "--allocations") == 0) regions = kMaxRegions;
    if (std::strcmp(argv[i], "--only") == 0 && i + 1 < argc) only = argv[++i];
    if (std::strcmp(argv[i], "--cuda") == 0 && i + 1 < argc) cuda = argv[++i];
    if (std::strcmp(argv[i], "--pause") == 0 && i + 1 < argc) pause = static_cast<uint32_t>(std::atoi(argv[++i]));
  }
  auto* board = new (::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) Board{};
  board->regions = regions;
  const pid_t child = ::fork();  // before anything of CUDA
  try {
    if (child == 0) ::_exit(receiver(*board, gpu, cuda));
    const int result = sender(*board, cuda, pause, only);
    ::waitpid(child, nullptr, 0);
    return result;
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", child == 0 ? "receiver" : "sender", error.what());
    board->stage = 3;
    if (child == 0) ::_exit(1);
    return 1;
  }
}
