/* A CUDA driver without a GPU, for tests of the bench: device memory is a memfd that is mapped, so another process can
 * open it as an IPC handle. Two devices; no kernels. Built by test_bench_device.py as libcuda.so.1; any thread, state
 * of the process: the table of allocations, behind a mutex. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { kSlots = 1024, kInvalid = 1, kOutOfMemory = 2, kInvalidHandle = 400 };
static struct {
  char* data;
  size_t bytes;
  int fd;
} slots[kSlots];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static int add(int fd, size_t bytes, uint64_t* pointer) {
  char* data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) return kOutOfMemory;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < kSlots; ++i)
    if (!slots[i].data) {
      slots[i].data = data, slots[i].bytes = bytes, slots[i].fd = fd;
      pthread_mutex_unlock(&mutex);
      *pointer = (uint64_t)data;
      return 0;
    }
  pthread_mutex_unlock(&mutex);
  munmap(data, bytes);
  return kOutOfMemory;
}
static int drop(uint64_t pointer) {
  int result = kInvalid;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < kSlots; ++i)
    if (slots[i].data == (char*)pointer) {
      munmap(slots[i].data, slots[i].bytes);
      close(slots[i].fd);
      slots[i].data = NULL;
      result = 0;
      break;
    }
  pthread_mutex_unlock(&mutex);
  return result;
}

int cuInit(unsigned flags) { return flags ? kInvalid : 0; }
int cuDeviceGetCount(int* count) { return *count = 2, 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal > 1 ? kInvalid : 0; }
int cuDeviceGetName(char* name, int bytes, int device) { return snprintf(name, bytes, "Fake GPU %d", device), 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)(intptr_t)(device + 1), 0; }
int cuCtxSetCurrent(void* context) { return context ? 0 : kInvalid; }
int cuCtxSynchronize(void) { return 0; }
int cuStreamCreate(void** stream, unsigned flags) { return *stream = (void*)(intptr_t)(flags + 1), 0; }
int cuStreamSynchronize(void* stream) { return stream ? 0 : kInvalid; }
int cuGetErrorName(int error, const char** name) {
  *name = error == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_INVALID_VALUE";
  return 0;
}
int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  return *free_bytes = (size_t)2 << 30, *total = (size_t)4 << 30, 0;
}
int cuMemAlloc_v2(uint64_t* pointer, size_t bytes) {
  int fd = memfd_create("fake-cuda", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, bytes)) return kOutOfMemory;
  return add(fd, bytes, pointer);
}
int cuMemFree_v2(uint64_t pointer) { return drop(pointer); }
int cuMemHostAlloc(void** pointer, size_t bytes, unsigned flags) {
  return *pointer = malloc(bytes), *pointer && !flags ? 0 : kOutOfMemory;
}
int cuMemsetD8_v2(uint64_t pointer, unsigned char value, size_t bytes) {
  return memset((void*)pointer, value, bytes), 0;
}
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) { return memcpy((void*)to, from, bytes), 0; }
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) { return memcpy(to, (void*)from, bytes), 0; }
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  return memcpy((void*)to, (void*)from, bytes), stream ? 0 : kInvalid;
}
struct Handle {
  int pid, fd;
  uint64_t bytes;
  char rest[48];
};
int cuIpcGetMemHandle(struct Handle* handle, uint64_t pointer) {
  for (int i = 0; i < kSlots; ++i)
    if (slots[i].data == (char*)pointer) {
      *handle = (struct Handle){.pid = getpid(), .fd = slots[i].fd, .bytes = slots[i].bytes};
      return 0;
    }
  return kInvalid;
}
int cuIpcOpenMemHandle_v2(uint64_t* pointer, struct Handle handle, unsigned flags) {
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.pid, handle.fd);
  FILE* file = fopen(path, "r+");
  if (!file || flags != 1) return kInvalidHandle;
  int fd = dup(fileno(file));
  fclose(file);
  return add(fd, handle.bytes, pointer);
}
int cuIpcCloseMemHandle(uint64_t pointer) { return drop(pointer); }
/* FAKE_CUDA_FAULT=skip leaves the last piece out; =stray also writes one byte before the first. */
int cuMemcpyBatchAsync_v2(uint64_t* to, uint64_t* from, size_t* sizes, size_t count, void* attributes, size_t* firsts,
                          size_t groups, void* stream) {
  const char* fault = getenv("FAKE_CUDA_FAULT");
  if (!attributes || groups != 1 || firsts[0] != 0 || !stream) return kInvalid;
  for (size_t i = 0; i < count; ++i)
    if (!(fault && !strcmp(fault, "skip") && i + 1 == count)) memcpy((void*)to[i], (void*)from[i], sizes[i]);
  if (fault && !strcmp(fault, "stray")) ((char*)to[0])[-1] = 0x5A;
  return 0;
}
