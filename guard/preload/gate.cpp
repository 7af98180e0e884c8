// SONAME libcuda.so.1: whoever opens that name gets this library. Each of the driver's entry points is a
// trampoline (trampolines.awk) that jumps to the real one, found at its first call; launches look at the
// page's gate before.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "guard/preload/process.hpp"

extern "C" {
// Made by trampolines.awk.
struct GatedEntry {
  const char* name;
  void* trampoline;
};
extern const char* const bulkhead_guard_names[];
extern const GatedEntry bulkhead_guard_gated[];  // ends with a null name
extern char bulkhead_guard_copy;
// Called by the trampolines.
void* bulkhead_guard_resolve(std::uint32_t index);
void bulkhead_guard_wait(std::uint32_t kind, const std::uint64_t* registers, const std::uint64_t* stack);
}

namespace bulkhead::guard {

namespace {

constexpr int not_found = 500;    // CUDA_ERROR_NOT_FOUND
constexpr int no_device = 100;    // CUDA_ERROR_NO_DEVICE
constexpr int unknown = 999;      // CUDA_ERROR_UNKNOWN
constexpr int out_of_memory = 2;  // CUDA_ERROR_OUT_OF_MEMORY
int answer_not_found() { return not_found; }
int answer_no_device() { return no_device; }

std::atomic<void*> library{nullptr};

// A library at this path that is neither this one nor another copy of it.
void* open_real(const char* path) {
  struct stat candidate = {};
  if (path[0] != '/' || stat(path, &candidate) != 0 || !S_ISREG(candidate.st_mode)) return nullptr;
  Dl_info self = {};
  struct stat own = {};
  if (dladdr(&bulkhead_guard_copy, &self) != 0 && self.dli_fname != nullptr &&
      stat(self.dli_fname, &own) == 0 && own.st_ino == candidate.st_ino && own.st_dev == candidate.st_dev) {
    return nullptr;
  }
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (handle != nullptr && dlsym(handle, "bulkhead_guard_copy") != nullptr) {
    dlclose(handle);
    return nullptr;
  }
  return handle;
}

void* open_in(const char* folder, std::size_t length) {
  constexpr char name[] = "/libcuda.so.1";
  char path[PATH_MAX];
  if (length == 0 || length + sizeof name > sizeof path) return nullptr;
  memcpy(path, folder, length);
  memcpy(path + length, name, sizeof name);
  return open_real(path);
}

// What ldconfig found: /etc/ld.so.cache, "glibc-ld.so.cache1.1": a header of 48 bytes, entries of 24 (flags,
// key, value, os version, hwcap), then strings, offsets counted from the start of the file.
void* open_from_cache() {
  const int fd = open("/etc/ld.so.cache", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return nullptr;
  struct stat about = {};
  void* found = nullptr;
  if (fstat(fd, &about) == 0 && about.st_size > 48) {
    const auto size = static_cast<std::size_t>(about.st_size);
    void* at = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (at != MAP_FAILED) {
      const char* text = static_cast<const char*>(at);
      std::uint32_t count = 0;
      if (memcmp(text, "glibc-ld.so.cache1.1", 20) == 0) memcpy(&count, text + 20, sizeof count);
      for (std::size_t i = 0; i < count && 48 + (i + 1) * 24 <= size && found == nullptr; ++i) {
        std::uint32_t entry[3];
        memcpy(entry, text + 48 + i * 24, sizeof entry);
        if (entry[1] >= size || entry[2] >= size) continue;
        constexpr char wanted[] = "libcuda.so.1";
        if (size - entry[1] < sizeof wanted || memcmp(text + entry[1], wanted, sizeof wanted) != 0) continue;
        if (memchr(text + entry[2], 0, size - entry[2]) != nullptr) found = open_real(text + entry[2]);
      }
      ::munmap(at, size);
    }
  }
  close(fd);
  return found;
}

void* find_library() {
  if (const char* path = getenv("BULKHEAD_GUARD_CUDA"); path != nullptr && *path != 0) return open_real(path);
  if (const char* list = getenv("LD_LIBRARY_PATH")) {
    while (*list != 0) {
      const std::size_t length = strcspn(list, ":;");
      if (void* handle = open_in(list, length)) return handle;
      list += length;
      if (*list != 0) ++list;
    }
  }
  if (void* handle = open_in("/usr/local/nvidia/lib64", 23)) return handle;
  if (void* handle = open_from_cache()) return handle;
  constexpr const char* folders[] = {"/usr/lib/x86_64-linux-gnu",
                                     "/usr/lib/aarch64-linux-gnu",
                                     "/usr/lib64",
                                     "/usr/lib",
                                     "/run/opengl-driver/lib",
                                     "/usr/lib/wsl/lib"};
  for (const char* folder : folders) {
    if (void* handle = open_in(folder, strlen(folder))) return handle;
  }
  return nullptr;
}

void* real_library() {
  void* handle = library.load(std::memory_order_acquire);
  if (handle != nullptr) return handle;
  const int saved = errno;
  handle = find_library();
  if (handle != nullptr) library.store(handle, std::memory_order_release);
  errno = saved;
  return handle;
}

template <class Function>
Function real(const char* name) {
  void* handle = real_library();
  return handle == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(handle, name));
}

std::uint64_t now_ns() {
  timespec now = {};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000U + static_cast<std::uint64_t>(now.tv_nsec);
}

constexpr std::uint64_t silence_ns = 1'000'000'000;

bool closed() {
  if (page->gate.load(std::memory_order_acquire) == 0) return false;
  const std::uint64_t beat = page->arbiter_beat.load(std::memory_order_acquire);
  const std::uint64_t now = now_ns();
  // A beat from the future is nobody's either, but clocks of two processors may differ a little.
  return now >= beat ? now - beat < silence_ns : beat - now < silence_ns;
}

// Inside a capture nothing is launched, and a capture must not be held up half-way. Where the stream is, by
// kind: 0 none (the legacy stream), 1 the 2nd argument, 2 the 4th, 3 the 9th, 4 in the CUlaunchConfig that
// the 1st points to; + 8 for the forms with a default stream a thread.
bool capturing(std::uint32_t kind, const std::uint64_t* registers, const std::uint64_t* stack) {
  std::uint64_t stream = 0;
  switch (kind & 7U) {
    case 1:
      stream = registers[1];
      break;
    case 2:
      stream = registers[3];
      break;
    case 3:
      stream = stack[2];
      break;
    case 4:
      if (registers[0] == 0) return true;  // the driver refuses it
      memcpy(&stream, reinterpret_cast<const char*>(registers[0]) + 32, sizeof stream);
      break;
    default:
      break;
  }
  using IsCapturing = int (*)(std::uint64_t, int*);
  const auto ask = real<IsCapturing>((kind & 8U) != 0 ? "cuStreamIsCapturing_ptsz" : "cuStreamIsCapturing");
  if (ask == nullptr) return false;
  int status = 0;
  return ask(stream, &status) != 0 || status != 0;
}

struct Seen {
  std::atomic<void*> real;
};
Seen seen[64];
std::atomic<std::uint32_t> seen_all{0};

// What the real cuGetProcAddress returned, or the trampoline that stands before it. Mapping its answer, not
// the name asked for, gets versions and flags right.
void* gated(void* entry) {
  if (entry == nullptr) return nullptr;
  if (seen_all.load(std::memory_order_acquire) == 0) {
    void* handle = real_library();
    for (unsigned i = 0; i < 64 && bulkhead_guard_gated[i].name != nullptr; ++i) {
      seen[i].real.store(handle == nullptr ? nullptr : dlsym(handle, bulkhead_guard_gated[i].name));
    }
    seen_all.store(1, std::memory_order_release);
  }
  for (unsigned i = 0; i < 64 && bulkhead_guard_gated[i].name != nullptr; ++i) {
    if (seen[i].real.load(std::memory_order_relaxed) == entry) return bulkhead_guard_gated[i].trampoline;
  }
  return entry;
}

}  // namespace
}  // namespace bulkhead::guard

using namespace bulkhead::guard;

void* bulkhead_guard_resolve(std::uint32_t index) {
  void* handle = real_library();
  if (handle == nullptr) return reinterpret_cast<void*>(answer_no_device);
  const int saved = errno;
  void* entry = dlsym(handle, bulkhead_guard_names[index]);
  errno = saved;
  return entry != nullptr ? entry : reinterpret_cast<void*>(answer_not_found);
}

void bulkhead_guard_wait(std::uint32_t kind, const std::uint64_t* registers, const std::uint64_t* stack) {
  if (page == nullptr || !closed() || capturing(kind, registers, stack)) return;
  const std::uint64_t began = now_ns();
  do {
    const timespec limit = {0, 100'000'000};
    system_call(SYS_futex, reinterpret_cast<long>(&page->gate), FUTEX_WAIT,
                static_cast<long>(page->gate.load(std::memory_order_relaxed) == 0 ? 1 : page->gate.load()),
                reinterpret_cast<long>(&limit));
  } while (closed());
  if (Slot* slot = own_slot()) slot->gated_ns.fetch_add(now_ns() - began, std::memory_order_relaxed);
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cuGetProcAddress(const char* symbol, void** entry, int version, std::uint64_t flags) {
  using Function = int (*)(const char*, void**, int, std::uint64_t);
  const auto ask = real<Function>("cuGetProcAddress");
  if (ask == nullptr) return library.load() == nullptr ? no_device : not_found;
  const int result = ask(symbol, entry, version, flags);
  if (result == 0 && entry != nullptr) *entry = gated(*entry);
  return result;
}

EXPORT int cuGetProcAddress_v2(const char* symbol, void** entry, int version, std::uint64_t flags,
                               int* status) {
  using Function = int (*)(const char*, void**, int, std::uint64_t, int*);
  const auto ask = real<Function>("cuGetProcAddress_v2");
  if (ask == nullptr) return library.load() == nullptr ? no_device : not_found;
  const int result = ask(symbol, entry, version, flags, status);
  if (result == 0 && entry != nullptr) *entry = gated(*entry);
  return result;
}

// libcuda answers CUDA_ERROR_UNKNOWN when its mapping of managed memory is refused (H100); a program past its
// cap shall see what it sees past the end of a GPU.
EXPORT int cuMemAllocManaged(std::uint64_t* address, std::size_t bytes, unsigned flags) {
  using Function = int (*)(std::uint64_t*, std::size_t, unsigned);
  const auto ask = real<Function>("cuMemAllocManaged");
  if (ask == nullptr) return library.load() == nullptr ? no_device : not_found;
  managed_refused = false;
  const int result = ask(address, bytes, flags);
  return result == unknown && managed_refused ? out_of_memory : result;
}
