// A libcuda.so.1 small enough to see through: launches count, one stream is capturing, symbol lookup answers.
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

std::atomic<unsigned long> launches{0};

EXPORT int cuInit(unsigned) { return 0; }
EXPORT int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
EXPORT int cuLaunchKernel(void*, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned bytes, void* stream, void** params, void** extra) {
  ++launches;
  // Every argument must come through the trampoline as it was given.
  return gx == 1 && gy == 2 && gz == 3 && bx == 4 && by == 5 && bz == 6 && bytes == 7 &&
                 params == (void**)8 && extra == (void**)9 && (stream == nullptr || (uintptr_t)stream >= 100)
             ? 0
             : 1;
}
EXPORT int cuLaunchKernel_ptsz(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                               void*, void**, void**) {
  ++launches;
  return 0;
}
EXPORT int cuLaunchKernelEx(const void*, void*, void**, void**) {
  ++launches;
  return 0;
}
EXPORT int cuGraphLaunch(void*, void*) {
  ++launches;
  return 0;
}
EXPORT int cuStreamIsCapturing(void* stream, int* status) {
  *status = stream == (void*)101 ? 1 : 0;
  return 0;
}
// Vector arguments pass through a first call too.
EXPORT int cuEventElapsedTime(float* out, double a, double b) {
  *out = static_cast<float>(a + b);
  return 0;
}
// As libcuda does it: maps the managed file where the pages shall be, and knows no reason when that is
// refused.
EXPORT int cuMemAllocManaged(uint64_t* address, size_t bytes, unsigned) {
  const int uvm =
      open((std::string(getenv("BULKHEAD_ROOT")) + "/dev/nvidia-uvm").c_str(), O_RDWR | O_CLOEXEC);
  void* room = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *address = reinterpret_cast<uint64_t>(room);
  void* at =
      mmap(room, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, uvm, reinterpret_cast<off_t>(room));
  close(uvm);
  return at == MAP_FAILED ? 999 : 0;
}
EXPORT unsigned long test_launches() { return launches; }
EXPORT int cuGetProcAddress_v2(const char* symbol, void** entry, int, uint64_t flags, int* status) {
  *entry = nullptr;
  if (strcmp(symbol, "cuLaunchKernel") == 0)
    *entry = (flags & 2) != 0 ? (void*)cuLaunchKernel_ptsz : (void*)cuLaunchKernel;
  if (strcmp(symbol, "cuInit") == 0) *entry = (void*)cuInit;
  if (strcmp(symbol, "cuGetProcAddress") == 0) *entry = (void*)cuGetProcAddress_v2;
  if (status != nullptr) *status = *entry == nullptr;
  return *entry == nullptr ? 500 : 0;
}
