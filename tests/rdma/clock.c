// A clock without a system call, for perftest in the test bed: LD_PRELOAD it. perftest calibrates the processor's counter
// against gettimeofday, gives up when that call is slow (user-mode Linux) and then prints 0.00. Built and used by
// tests/rdma/bench alone; single-threaded callers.
//
// gcc -O2 -shared -fPIC -o clock.so clock.c
#include <stdio.h>
#include <sys/time.h>
#include <time.h>
#include <x86intrin.h>

static double counts_per_microsecond, start_microseconds;
static unsigned long long start_count;

__attribute__((constructor)) static void calibrate(void) {
  char line[256];
  FILE* cpuinfo = fopen("/proc/cpuinfo", "r");
  while (cpuinfo && fgets(line, sizeof line, cpuinfo))
    if (sscanf(line, "cpu MHz : %lf", &counts_per_microsecond) == 1) break;
  if (cpuinfo) fclose(cpuinfo);
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  start_count = __rdtsc();
  start_microseconds = now.tv_sec * 1e6 + now.tv_nsec / 1e3;
}

int gettimeofday(struct timeval* restrict out, void* restrict zone) {
  (void)zone;
  const double microseconds = start_microseconds + (__rdtsc() - start_count) / counts_per_microsecond;
  out->tv_sec = microseconds / 1e6;
  out->tv_usec = microseconds - 1e6 * out->tv_sec;
  return 0;
}
