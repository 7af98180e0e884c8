// Below the guard in guard_bench.cpp: a driver that says yes and a libcuda that returns. Descriptor 1000 is
// the driver.
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "abi/rm/rm.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int ioctl(int fd, unsigned long request, ...) noexcept {
  va_list rest;
  va_start(rest, request);
  void* argument = va_arg(rest, void*);
  va_end(rest);
  if (fd != 1000) return static_cast<int>(syscall(SYS_ioctl, fd, request, argument));
  if (auto* form = static_cast<bulkhead::abi::Alloc*>(argument);
      (request & 0xffU) == bulkhead::abi::esc_alloc && form->cls == bulkhead::abi::class_client) {
    form->handle = 0xc1d00001;
  }
  return 0;
}

EXPORT int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                          void**, void**) {
  asm volatile("" ::: "memory");
  return 0;
}
