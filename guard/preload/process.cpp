#include "guard/preload/process.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

extern "C" {
// The first copy of the guard in a process finds its own address by this name; any other stays passive.
__attribute__((visibility("default"))) char bulkhead_guard_copy = 0;
// What the launch trampolines look at.
__attribute__((visibility("hidden"))) std::atomic<std::uint32_t> bulkhead_guard_always_open{0};
__attribute__((visibility("hidden"))) std::atomic<std::uint32_t>* bulkhead_guard_gate =
    &bulkhead_guard_always_open;
}

namespace bulkhead::guard {

Page* page = nullptr;
Books* books = nullptr;
__thread bool managed_refused = false;

namespace {

bool failed(long result) { return result < 0 && result > -4096; }

#if defined(__x86_64__)
long raw(long number, long a, long b, long c, long d, long e, long f) {
  register long r10 asm("r10") = d;
  register long r8 asm("r8") = e;
  register long r9 asm("r9") = f;
  long result = number;
  asm volatile("syscall"
               : "+a"(result)
               : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
               : "rcx", "r11", "memory");
  return result;
}
#elif defined(__aarch64__)
long raw(long number, long a, long b, long c, long d, long e, long f) {
  register long x8 asm("x8") = number;
  register long x0 asm("x0") = a;
  register long x1 asm("x1") = b;
  register long x2 asm("x2") = c;
  register long x3 asm("x3") = d;
  register long x4 asm("x4") = e;
  register long x5 asm("x5") = f;
  asm volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
  return x0;
}
#endif

Page* map_page(int fd) {
  struct stat about = {};
  if (fstat(fd, &about) != 0 || about.st_size < 0 ||
      static_cast<std::uint64_t>(about.st_size) < sizeof(Page)) {
    return nullptr;
  }
  const long seals = system_call(SYS_fcntl, fd, F_GET_SEALS);
  if (failed(seals) || (seals & F_SEAL_SHRINK) == 0) return nullptr;
  const long at = system_call(SYS_mmap, 0, sizeof(Page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (failed(at)) return nullptr;
  auto* mapped = reinterpret_cast<Page*>(at);
  if (mapped->magic == wire_magic && mapped->version == wire_version) return mapped;
  system_call(SYS_munmap, at, sizeof(Page));
  return nullptr;
}

Page* find_page() {
  if (const char* number = getenv(wire_environment)) {
    int fd = 0;
    const char* c = number;
    for (; *c >= '0' && *c <= '9' && fd < 100'000'000; ++c) fd = fd * 10 + (*c - '0');
    if (c != number && *c == 0) {
      if (Page* found = map_page(fd)) return found;
    }
  }
  if (const char* path = getenv(wire_path_environment)) {
    const long fd = system_call(SYS_openat, AT_FDCWD, reinterpret_cast<long>(path), O_RDWR | O_CLOEXEC);
    if (!failed(fd)) {
      Page* found = map_page(static_cast<int>(fd));
      system_call(SYS_close, fd);
      return found;
    }
  }
  return nullptr;
}

void forget_books() {  // in a forked child, where the kernel does not wipe
  if (books != nullptr) system_call(SYS_madvise, reinterpret_cast<long>(books), sizeof(Books), MADV_DONTNEED);
}

std::uint64_t identity() {
  const auto pid = static_cast<std::uint64_t>(system_call(SYS_getpid));
  char text[1024];
  std::uint32_t start = 0;
  const long fd =
      system_call(SYS_openat, AT_FDCWD, reinterpret_cast<long>("/proc/self/stat"), O_RDONLY | O_CLOEXEC);
  if (!failed(fd)) {
    const long got = system_call(SYS_read, fd, reinterpret_cast<long>(text), sizeof text);
    system_call(SYS_close, fd);
    long at = failed(got) ? 0 : got;
    while (at > 0 && text[at - 1] != ')') --at;  // the name may hold anything, brackets too
    int field = 2;                               // of man 5 proc; the start time is the 22nd
    if (at > 0) {
      for (; at < got; ++at) {
        if (text[at] == ' ') {
          if (++field > 22) break;
        } else if (field == 22 && text[at] >= '0' && text[at] <= '9') {
          start = start * 10 + static_cast<std::uint32_t>(text[at] - '0');
        }
      }
    }
  }
  return (pid << 32) | start;
}

std::uint32_t take_slot() {  // index + 1; 0: all are taken
  const std::uint64_t me = identity();
  for (std::size_t i = 0, n = slots_in_use(*page); i < n; ++i) {
    if (page->slots[i].owner.load(std::memory_order_acquire) == me) {
      clear_words(page->slots[i]);  // this process before it exec'ed: what it held went with its driver files
      return static_cast<std::uint32_t>(i) + 1;
    }
  }
  for (std::uint32_t i = 0; i < max_slots; ++i) {
    if (page->slots[i].owner.load(std::memory_order_relaxed) != 0) continue;
    std::uint32_t high = page->high_water.load(std::memory_order_relaxed);
    while (high < i + 1 && !page->high_water.compare_exchange_weak(high, i + 1)) {
    }
    std::uint64_t nobody = 0;
    if (page->slots[i].owner.compare_exchange_strong(nobody, me)) {
      clear_words(page->slots[i]);
      return i + 1;
    }
  }
  return 0;
}

// Whether `bytes` do not fit even if nobody else's open request is granted. Open requests are read before and
// after the charges, and the larger counts, so that one that comes or goes meanwhile is not taken for memory
// held.
bool full(std::size_t gpu, std::uint64_t bytes, std::uint64_t cap) {
  std::uint64_t held = add_saturating(page->outside[gpu].load(std::memory_order_acquire),
                                      page->orphaned[gpu].load(std::memory_order_acquire));
  for (std::size_t i = 0, n = slots_in_use(*page); i < n; ++i) {
    const Slot& slot = page->slots[i];
    const std::uint64_t before = slot.asking[gpu].load();
    const std::uint64_t used = slot.used[gpu].load();
    const std::uint64_t after = slot.asking[gpu].load();
    const std::uint64_t asking = before > after ? before : after;
    if (used > asking) held = add_saturating(held, used - asking);
  }
  return add_saturating(held, bytes) > cap;
}

bool somebody_before(const Slot& slot, std::size_t gpu) {
  const auto mine = static_cast<std::size_t>(&slot - page->slots);
  for (std::size_t i = 0; i < mine; ++i) {
    if (page->slots[i].asking[gpu].load() != 0) return true;
  }
  return false;
}

}  // namespace

long system_call(long number, long a, long b, long c, long d, long e, long f) {
  return raw(number, a, b, c, d, e, f);
}

void pause_briefly(unsigned round) {
  if (round < 16) {
    system_call(SYS_sched_yield);
    return;
  }
  timespec span = {0, 20'000};
  system_call(SYS_nanosleep, reinterpret_cast<long>(&span), 0);
}

void open_page() {
  if (getenv(wire_environment) == nullptr && getenv(wire_path_environment) == nullptr) return;
  if (void* first = dlsym(RTLD_DEFAULT, "bulkhead_guard_copy");
      first != nullptr && first != &bulkhead_guard_copy)
    return;
  Page* found = find_page();
  if (found == nullptr) return;
  const long room = system_call(SYS_mmap, 0, sizeof(Books), PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (!failed(room)) {
    books = reinterpret_cast<Books*>(room);
    system_call(SYS_madvise, room, sizeof(Books), MADV_DONTDUMP);
    if (failed(system_call(SYS_madvise, room, sizeof(Books), MADV_WIPEONFORK))) {
      pthread_atfork(nullptr, nullptr, forget_books);
    }
  }
  page = found;
  bulkhead_guard_gate = &page->gate;
}

bool charging() {
  return page != nullptr &&
         page->authority.load(std::memory_order_relaxed) == static_cast<std::uint32_t>(Authority::guard);
}

Slot* own_slot() {
  if (books == nullptr) return nullptr;
  for (unsigned round = 0; round < 2000; ++round) {
    const std::uint32_t taken = books->slot.load(std::memory_order_acquire);
    if (taken != 0) return taken <= max_slots ? &page->slots[taken - 1] : nullptr;
    std::uint32_t idle = 0;
    if (books->attaching.compare_exchange_strong(idle, 1)) {
      const std::uint32_t slot = books->slot.load(std::memory_order_acquire) != 0 ? 0 : take_slot();
      if (slot != 0) books->slot.store(slot, std::memory_order_release);
      books->attaching.store(0, std::memory_order_release);
      if (books->slot.load(std::memory_order_acquire) == 0) return nullptr;
      continue;
    }
    pause_briefly(round);
  }
  return nullptr;
}

// Optimistic: put the charge up, then look at the sum. Two that look at the same time may each see the
// other's charge and both step back although one would fit. So whoever does not fit asks why: if held memory
// alone leaves no room, that is an answer. If it is only other open requests, the process in the lowest slot
// (in it one thread, the elder) lets its request stand until the others have stepped back, and they step back
// and try again. Every wait is bounded, so a process killed here costs the others a refusal at worst, and
// only until its slot is given back.
bool reserve(Slot& slot, std::size_t gpu, std::uint64_t bytes) {
  const std::uint64_t cap = page->cap[gpu].load(std::memory_order_relaxed);
  constexpr unsigned rounds = 600;  // some 40 ms
  unsigned answers = 0;
  bool elder = false;
  const auto step_back = [&] {
    slot.used[gpu].fetch_sub(bytes);  // in this order: a request is never taken for memory held
    slot.asking[gpu].fetch_sub(bytes);
  };
  bool granted = false;
  bool standing = false;
  for (unsigned round = 0; round < rounds; ++round) {
    if (!standing) {
      slot.asking[gpu].fetch_add(bytes);
      slot.used[gpu].fetch_add(bytes);
      standing = true;
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (charged(*page, gpu) <= cap) {
      granted = true;
      break;
    }
    if (full(gpu, bytes, cap)) {
      if (++answers == 3) break;
      continue;
    }
    answers = 0;
    if (!elder) {
      std::uint32_t none = 0;
      elder = books->elder.compare_exchange_strong(none, 1);
    }
    if (!elder || somebody_before(slot, gpu)) {
      step_back();
      standing = false;
    }
    pause_briefly(round);
  }
  if (granted) {
    slot.asking[gpu].fetch_sub(bytes);
  } else if (standing) {
    step_back();
  }
  if (elder) books->elder.store(0, std::memory_order_release);
  return granted;
}

void refund(std::size_t gpu, std::uint64_t bytes) {
  if (Slot* slot = own_slot()) slot->used[gpu].fetch_sub(bytes);
}

std::size_t first_gpu() {
  const std::uint32_t first = books == nullptr ? 0 : books->first_gpu.load(std::memory_order_relaxed);
  return first == 0 || first > max_gpus ? 0 : first - 1;
}

void opened_gpu(std::size_t gpu) {
  std::uint32_t none = 0;
  if (books != nullptr) books->first_gpu.compare_exchange_strong(none, static_cast<std::uint32_t>(gpu) + 1);
}

}  // namespace bulkhead::guard
