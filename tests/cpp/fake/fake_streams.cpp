// Contexts, streams, events and launches of the fake driver; see fake_cuda.hpp.
#include <atomic>
#include <climits>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "cpu_kernels.hpp"
#include "fake_cuda.hpp"
#include "fake_memory.hpp"
#include "fake_progress.hpp"
#include "fake_tables.hpp"

namespace fake_cuda {
namespace {

using namespace pdxfer::shim;
thread_local std::vector<uintptr_t> contexts;  // ordinal + 1
std::atomic<unsigned> delay_us{0}, engine_delay_ms{0};
std::atomic<int> launch_failure{0};
std::atomic<unsigned> copies{0}, batches{0}, clustered{0};
std::atomic<bool> no_clusters{false}, no_engine{false}, no_progress{false};
std::atomic<int> engine_copies_left{INT_MAX};

class Stream {
 public:
  Stream() : thread_([this] { run(); }) {}
  ~Stream() {
    post(nullptr);
    thread_.join();
  }
  void post(std::function<void()> work) {
    const std::lock_guard lock(mutex_);
    work_.push_back(std::move(work));
    more_.notify_one();
  }

 private:
  void run() {
    std::mt19937 random(7);
    for (;;) {
      std::function<void()> next;
      {
        std::unique_lock lock(mutex_);
        more_.wait(lock, [&] { return !work_.empty(); });
        next = std::move(work_.front());
        work_.pop_front();
      }
      if (!next) return;
      if (const unsigned most = delay_us; most > 0)
        std::this_thread::sleep_for(std::chrono::microseconds(random() % most));
      next();
    }
  }
  std::mutex mutex_;
  std::condition_variable more_;
  std::deque<std::function<void()>> work_;
  std::thread thread_;
};

struct Event {
  std::shared_ptr<std::atomic<uint64_t>> recorded = std::make_shared<std::atomic<uint64_t>>(0);
  uint64_t wanted = 0;
};

Stream* stream_of(CuStream stream) { return reinterpret_cast<Stream*>(stream); }
Event* event_of(CuEvent event) { return reinterpret_cast<Event*>(event); }

CuResult launch(CuFunction function, unsigned blocks, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                CuStream stream, void** parameters, void**) {
  if (const int failure = launch_failure.exchange(0); failure != 0) return failure;
  if (contexts.empty()) return 201;
  stream_of(stream)->post(launch_of(*reinterpret_cast<const Kernel*>(function), blocks, parameters[0]));
  return kCuSuccess;
}

CuResult launch_ex(const CuLaunch* how, CuFunction function, void** parameters, void** extra) {
  for (unsigned i = 0; i < how->attribute_count; ++i) {
    const CuLaunchAttribute& attribute = how->attributes[i];
    if (attribute.id != kCuLaunchCluster || no_clusters || how->grid_x % attribute.value[0] != 0) return 912;
    ++clustered;
  }
  return launch(function, how->grid_x, 1, 1, how->block_x, 1, 1, 0, how->stream, parameters, extra);
}

CuResult record(CuEvent event, CuStream stream) {
  Event& e = *event_of(event);
  const uint64_t number = ++e.wanted;
  stream_of(stream)->post([recorded = e.recorded, number] { recorded->store(number, std::memory_order_release); });
  return kCuSuccess;
}

// The stream goes on when the event's latest record, as of now, has been reached.
CuResult wait_event(CuStream stream, CuEvent event, unsigned) {
  const Event& e = *event_of(event);
  stream_of(stream)->post([recorded = e.recorded, number = e.wanted] {
    while (recorded->load(std::memory_order_acquire) < number) std::this_thread::yield();
  });
  return kCuSuccess;
}

CuResult upload_async(CuDevicePtr to, const void* from, size_t bytes, CuStream stream) {
  stream_of(stream)->post([=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); });
  return kCuSuccess;
}

struct EngineCopy {
  CuDevicePtr to, from;
  size_t bytes;
};
void post_engine_copies(CuStream stream, std::vector<EngineCopy> all) {
  copies += static_cast<unsigned>(all.size());
  stream_of(stream)->post([all = std::move(all)] {
    std::this_thread::sleep_for(std::chrono::milliseconds(engine_delay_ms));
    for (const EngineCopy& c : all)
      std::memcpy(reinterpret_cast<void*>(c.to), reinterpret_cast<const void*>(c.from), c.bytes);
  });
}

// A copy that leaves cudaMalloc's memory is invalid, whatever lies behind that; pieces are one memory.
bool leaves_allocation(CuDevicePtr from, size_t bytes) {
  MemoryTable& table = memory();
  const std::lock_guard lock(table.mutex);
  const auto it = table.find(from);
  return it != table.by_address.end() && !it->second.piece && from + bytes > it->first + it->second.bytes;
}

bool takes(const EngineCopy& copy) {
  if (no_engine || leaves_allocation(copy.from, copy.bytes) || leaves_allocation(copy.to, copy.bytes)) return false;
  return engine_copies_left == INT_MAX || engine_copies_left-- > 0;
}

CuResult copy_async(CuDevicePtr to, CuDevicePtr from, size_t bytes, CuStream stream) {
  if (!takes({to, from, bytes})) return kCuInvalidValue;
  post_engine_copies(stream, {{to, from, bytes}});
  return kCuSuccess;
}

// What comes before a copy that is refused is done all the same, which a driver may do.
CuResult copy_batch_async(CuDevicePtr* to, CuDevicePtr* from, size_t* bytes, size_t count, CuCopyAttributes* attributes,
                          size_t* first_of_each, size_t attribute_count, size_t* refused, CuStream stream) {
  if (count == 0 || attribute_count != 1 || first_of_each[0] != 0 || attributes->source_order != kCuSourceStream)
    return kCuInvalidValue;
  std::vector<EngineCopy> all;
  for (size_t i = 0; i < count && takes({to[i], from[i], bytes[i]}); ++i) all.push_back({to[i], from[i], bytes[i]});
  *refused = all.size();
  ++batches;
  post_engine_copies(stream, std::move(all));
  return *refused == count ? kCuSuccess : kCuInvalidValue;
}

CuResult attribute(int* value, int which, CuDevice) {
  *value = which == kCuAttributeMultiprocessors ? 8 : which == kCuAttributeMajor ? 9 : 0;
  return kCuSuccess;
}

}  // namespace

int current_ordinal() { return contexts.empty() ? 0 : static_cast<int>(contexts.back() - 1); }
unsigned engine_copies() { return copies; }
unsigned engine_batches() { return batches; }
unsigned clustered_launches() { return clustered; }
void refuse_clusters(bool refused) { no_clusters = refused; }
void refuse_engine_copies(bool refused) { no_engine = refused; }
void allow_engine_copies(int count) { engine_copies_left = count; }
void refuse_progress(bool refused) { no_progress = refused; }
void set_delay_us(unsigned microseconds) { delay_us = microseconds; }
void set_engine_delay_ms(unsigned ms) { engine_delay_ms = ms; }
void fail_next_launch(int result) { launch_failure = result; }

void fill_device_table(CudaDriver& api) {
  api.device_get = [](CuDevice* out, int ordinal) { return *out = ordinal, kCuSuccess; };
  api.device_get_count = [](int* count) { return *count = 2, kCuSuccess; };
  api.device_get_attribute = &attribute;
  api.device_get_name = [](char* name, int bytes, CuDevice) {
    return std::snprintf(name, static_cast<size_t>(bytes), "fake"), kCuSuccess;
  };
  api.device_total_mem = [](size_t* bytes, CuDevice) { return *bytes = size_t{8} << 30, kCuSuccess; };
  api.device_can_access_peer = [](int* can, CuDevice, CuDevice) { return *can = 1, kCuSuccess; };
  api.device_get_uuid = [](CuUuid* uuid, CuDevice device) {
    std::memset(uuid, 7 + device, sizeof *uuid);
    return kCuSuccess;
  };
  api.primary_context_retain = [](CuContext* out, CuDevice device) {
    *out = reinterpret_cast<CuContext>(static_cast<uintptr_t>(device) + 1);
    return kCuSuccess;
  };
  api.primary_context_release = [](CuDevice) { return kCuSuccess; };
  api.context_push = [](CuContext context) {
    contexts.push_back(reinterpret_cast<uintptr_t>(context));
    return kCuSuccess;
  };
  api.context_pop = [](CuContext*) { return contexts.pop_back(), kCuSuccess; };
  api.context_enable_peer = [](CuContext, unsigned) { return kCuSuccess; };
  api.context_stream_priorities = [](int* lowest, int* highest) { return *lowest = 0, *highest = -5, kCuSuccess; };
  api.module_load_data = [](CuModule* out, const void*) {
    *out = reinterpret_cast<CuModule>(uintptr_t{1});
    return kCuSuccess;
  };
  api.module_unload = [](CuModule) { return kCuSuccess; };
  api.module_get_function = [](CuFunction* out, CuModule, const char* name) {
    *out = reinterpret_cast<CuFunction>(const_cast<Kernel*>(find_kernel(name)));
    return *out == nullptr ? 500 : kCuSuccess;
  };
}

void fill_stream_table(CudaDriver& api) {
  fill_device_table(api);
  api.launch_kernel = &launch;
  api.launch_kernel_ex = &launch_ex;
  api.stream_create_with_priority = [](CuStream* out, unsigned, int) {
    *out = reinterpret_cast<CuStream>(new Stream);
    return kCuSuccess;
  };
  api.stream_destroy = [](CuStream stream) { return delete stream_of(stream), kCuSuccess; };
  api.event_create = [](CuEvent* out, unsigned) {
    *out = reinterpret_cast<CuEvent>(new Event);
    return kCuSuccess;
  };
  api.event_destroy = [](CuEvent event) { return delete event_of(event), kCuSuccess; };
  api.event_record = &record;
  api.stream_wait_event = &wait_event;
  api.event_query = [](CuEvent event) {
    const Event& e = *event_of(event);
    return e.recorded->load(std::memory_order_acquire) >= e.wanted ? kCuSuccess : kCuNotReady;
  };
  api.stream_write_value = [](CuStream stream, CuDevicePtr to, unsigned value, unsigned) {
    if (no_progress) return kCuNotSupported;
    stream_of(stream)->post([=] {
      before_progress();
      std::atomic_ref(*reinterpret_cast<unsigned*>(to)).store(value, std::memory_order_release);
    });
    return kCuSuccess;
  };
  api.copy_async = &copy_async;
  api.copy_batch_async = &copy_batch_async;
  api.copy_to_device_async = &upload_async;
  api.copy_to_device = [](CuDevicePtr to, const void* from, size_t bytes) {
    return std::memcpy(reinterpret_cast<void*>(to), from, bytes), kCuSuccess;
  };
  api.copy_to_host = [](void* to, CuDevicePtr from, size_t bytes) {
    return std::memcpy(to, reinterpret_cast<const void*>(from), bytes), kCuSuccess;
  };
  api.launch_host_function = [](CuStream stream, void (*function)(void*), void* argument) {
    stream_of(stream)->post([=] { function(argument); });
    return kCuSuccess;
  };
  api.mem_alloc = [](CuDevicePtr* out, size_t bytes) { return *out = map_new(current_ordinal(), bytes), kCuSuccess; };
  api.get_error_name = [](CuResult, const char** name) { return *name = "CUDA_ERROR_FAKE", kCuSuccess; };
  api.get_error_string = [](CuResult, const char** text) { return *text = "of the fake driver", kCuSuccess; };
}

namespace {
CudaLibrary& library() {
  static CudaLibrary& made = *[] {
    auto* fresh = new CudaLibrary{DynamicLibrary({}), {}, 13000, 2, {}};
    fill_memory_table(fresh->api);
    fill_stream_table(fresh->api);
    return fresh;
  }();
  return made;
}
}  // namespace

void install() { replace_cuda(library()); }

void refuse_batches(bool refused) { library().api.copy_batch_async = refused ? nullptr : &copy_batch_async; }

void set_dmabuf(Dmabuf how) {
  refuse_dmabuf(how == Dmabuf::kRefused);
  static const auto works = library().api.mem_range_handle;
  library().api.mem_range_handle = how == Dmabuf::kOldDriver ? nullptr : works;
}

}  // namespace fake_cuda
