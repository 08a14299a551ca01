// DeviceCopier alone, in one process that sees two GPUs: rates by thread blocks, and what a single transfer takes with
// its tables, launch and event, after a pause when one is given; with checksums too, and reading alone. `copy_rates
// [PART OF A ROW'S NAME [PAUSE IN US]]`. Built by tests/gpu/native/build.sh; a line per row.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "pack/device_copier.hpp"
#include "sys/cuda_stream.hpp"

using namespace pdxfer;
using Clock = std::chrono::steady_clock;

namespace {

constexpr uint64_t kPool = 1ull << 30;
const shim::CudaDriver& api() { return shim::cuda().api; }
void must(shim::CuResult result, const char* what) { shim::cuda_check(result, what); }
void must(const Status& status) {
  if (!status.ok()) throw Error(status.code, status.to_string(), status.native);
}

double microseconds(const std::function<void()>& work, int rounds = 15) {
  std::vector<double> all;
  for (int i = 0; i < rounds; ++i) {
    const auto begin = Clock::now();
    work();
    all.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
  }
  std::sort(all.begin(), all.end());
  return all[all.size() / 2];
}

PagedCopy make_copy(uint32_t buffers, uint64_t page, uint64_t stride, uint32_t count, bool random) {
  std::mt19937 engine(3);
  const auto slots = static_cast<uint32_t>(kPool / buffers / stride);
  std::vector<uint32_t> from(slots), to(slots);
  for (uint32_t i = 0; i < slots; ++i) from[i] = to[i] = i;
  if (random) {
    std::shuffle(from.begin(), from.end(), engine);
    std::shuffle(to.begin(), to.end(), engine);
  }
  PagedCopy copy;
  for (uint32_t i = 0; i < buffers; ++i) {
    const uint64_t at = uint64_t{i} * slots * stride;
    copy.pairs.push_back({1, 2, at, at, stride, stride, page});
  }
  if (random)
    for (uint32_t i = 0; i < count; ++i) copy.runs.push_back({from[i], to[i], 1});
  else
    copy.runs.push_back({0, 0, count});
  copy.seal();
  return copy;
}

struct Ends {
  const sys::CudaMemory& src;
  const sys::CudaMemory& dst;
};

// `times` launches of the whole copy and the wait for the last. kSum reads what is here.
void move(pack::DeviceCopier& copier, const PagedCopy& copy, const Ends& ends, int times,
          DeviceForm form = DeviceForm::kPaged) {
  const std::vector<uint64_t> src(copy.pairs.size(), ends.src.get());
  const std::vector<uint64_t> dst(copy.pairs.size(), (form == DeviceForm::kSum ? ends.src : ends.dst).get());
  DeviceTables tables = 0;
  must(copier.prepare(copy, form, src, dst, tables));
  DeviceTicket ticket = 0;
  for (int i = 0; i < times; ++i) {
    Cursor cursor;
    must(copier.launch(tables, copy, cursor, UINT64_MAX, 0, ticket));
  }
  for (bool over = false; !over;) must(copier.done(ticket, over));
  copier.release(tables);
}

// GB/s of the whole copy, launches back to back.
double rate_of(pack::DeviceCopier& copier, const PagedCopy& copy, const Ends& ends, DeviceForm form) {
  move(copier, copy, ends, 2, form);
  const double one = microseconds([&] { move(copier, copy, ends, 1, form); });
  const double five = microseconds([&] { move(copier, copy, ends, 5, form); });
  return static_cast<double>(copy.bytes) / (five - one) * 4 / 1e3;
}

// Medians of a single transfer's parts, in us: the tables, the launch, and from there until its event was seen.
std::string parts_of(pack::DeviceCopier& copier, const PagedCopy& copy, const Ends& ends,
                     std::chrono::microseconds pause, int rounds = 15) {
  const std::vector<uint64_t> src(copy.pairs.size(), ends.src.get()), dst(copy.pairs.size(), ends.dst.get());
  std::vector<double> parts[3];
  for (int i = 0; i < rounds; ++i) {
    DeviceTables tables = 0;
    DeviceTicket ticket = 0;
    Cursor cursor;
    if (pause.count() != 0) std::this_thread::sleep_for(pause);
    const Clock::time_point begin = Clock::now();
    must(copier.prepare(copy, DeviceForm::kPaged, src, dst, tables));
    const Clock::time_point prepared = Clock::now();
    must(copier.launch(tables, copy, cursor, UINT64_MAX, 0, ticket));
    const Clock::time_point launched = Clock::now();
    for (bool over = false; !over;) must(copier.done(ticket, over));
    const Clock::time_point done = Clock::now();
    copier.release(tables);
    const Clock::duration took[] = {prepared - begin, launched - prepared, done - launched};
    for (int k = 0; k < 3; ++k) parts[k].push_back(std::chrono::duration<double, std::micro>(took[k]).count());
  }
  std::string text;
  for (std::vector<double>& all : parts) {
    std::sort(all.begin(), all.end());
    char number[32];
    std::snprintf(number, sizeof number, " %.1f", all[all.size() / 2]);
    text += number;
  }
  return text;
}

void rates(const Ends& ends, const std::string& only, std::chrono::microseconds pause) {
  struct Shape {
    const char* name;
    uint32_t buffers;
    uint64_t page, stride;
    uint32_t count;
    bool random;
  };
  constexpr Shape kShapes[] = {
      {"contiguous 4 MiB", 56, 1024, 1024, 4096, false}, {"contiguous 16 MiB", 56, 1024, 1024, 16384, false},
      {"contiguous 1 MiB", 56, 1024, 1024, 1024, false}, {"random 1 KiB", 56, 1024, 1024, 4096, true},
      {"random 16 KiB", 56, 16384, 16384, 256, true},    {"random 64 KiB", 56, 65536, 65536, 64, true},
      {"MLA 1152 B", 61, 1152, 1152, 4096, true},        {"MLA 73728 B", 61, 73728, 73728, 64, true},
      {"512 of 1 KiB", 56, 512, 1024, 8192, true},       {"256 of 1 KiB", 56, 256, 1024, 8192, true},
      {"7 MB of 1 KiB", 56, 1024, 1024, 128, true}};
  for (const Shape& s : kShapes) {
    if (std::string(s.name).find(only) == std::string::npos) continue;
    const PagedCopy copy = make_copy(s.buffers, s.page, s.stride, s.count, s.random);
    for (const unsigned blocks : {8u, 12u, 16u, 32u}) {
      DeviceCopyOptions options;
      options.blocks = blocks;
      pack::DeviceCopier copier(0, options);
      options.checksum = true;
      pack::DeviceCopier summing(0, options);
      const double alone = rate_of(copier, copy, ends, DeviceForm::kPaged);
      const double one = microseconds([&] { move(copier, copy, ends, 1); });
      std::printf(
          "rate %-18s blocks %2u: alone %6.1f GB/s, with checksum %6.1f, checksum alone %7.1f; whole %7.1f us; "
          "tables, launch, wait%s us\n",
          s.name, blocks, alone, rate_of(summing, copy, ends, DeviceForm::kPaged),
          rate_of(summing, copy, ends, DeviceForm::kSum), one, parts_of(copier, copy, ends, pause).c_str());
    }
  }
}

}  // namespace

int main(int argc, char** argv) try {
  const sys::CudaContext here(0), there(1);
  std::unique_ptr<sys::CudaMemory> far;
  {
    const sys::CudaScope scope(there);
    far = std::make_unique<sys::CudaMemory>(kPool);
  }
  const sys::CudaScope scope(here);
  must(api().context_enable_peer(there.get(), 0), "cuCtxEnablePeerAccess");
  const sys::CudaMemory near(kPool);
  rates({near, *far}, argc > 1 ? argv[1] : "", std::chrono::microseconds(argc > 2 ? std::atoi(argv[2]) : 0));
  return 0;
} catch (const std::exception& error) {
  std::printf("FAILED: %s\n", error.what());
  return 1;
}
