// Scenarios for the guard; run.sh names them. Each starts with a fresh page and driver, runs itself again
// with the guard and the test's driver preloaded, and exits 0 or says what was wrong.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "abi/rm/rm.hpp"
#include "guard/wire/wire.hpp"
#include "tests/guard/truth.hpp"

using namespace bulkhead;
using guard::Page;

namespace {

constexpr std::uint64_t MiB = 1 << 20;
Page* page;
Truth* truth;
std::string root;

#define WANT(condition)                                                       \
  do {                                                                        \
    if (!(condition)) {                                                       \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      _exit(1);                                                               \
    }                                                                         \
  } while (0)
#define SAME(a, b)                                                                            \
  do {                                                                                        \
    const unsigned long long a_ = (a), b_ = (b);                                              \
    if (a_ != b_) {                                                                           \
      fprintf(stderr, "%s:%d: %s is %llu, %s is %llu\n", __FILE__, __LINE__, #a, a_, #b, b_); \
      _exit(1);                                                                               \
    }                                                                                         \
  } while (0)

std::uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<std::uint64_t>(t.tv_sec) * 1000000000U + static_cast<std::uint64_t>(t.tv_nsec);
}

// What libcuda does, in its order.
struct Program {
  std::uint32_t client = 0, device = 0x5c000002, subdevice = 0x5c000003;
  std::atomic<std::uint32_t> next{0x5c000010};
  int fd;

  explicit Program(std::uint32_t gpu = 0) {
    fd = open((root + "/dev/nvidiactl").c_str(), O_RDWR | O_CLOEXEC);
    abi::Alloc form = {};
    form.cls = abi::class_client;
    WANT(ioctl(fd, abi::request(abi::esc_alloc, sizeof form), &form) == 0 && form.status == 0);
    client = form.handle;
    make_device(gpu);
  }
  void make_device(std::uint32_t gpu) {
    abi::DeviceParams params = {};
    params.device = gpu;
    abi::Alloc form = {
        client, client, device, abi::class_device, reinterpret_cast<std::uint64_t>(&params), 0, 0, 0, 0, 0};
    WANT(ioctl(fd, abi::request(abi::esc_alloc, sizeof form), &form) == 0 && form.status == 0);
    make_subdevice();
  }
  void make_subdevice() {
    abi::Alloc form = {client, device, subdevice, abi::class_subdevice, 0, 0, 0, 0, 0, 0};
    WANT(ioctl(fd, abi::request(abi::esc_alloc, sizeof form), &form) == 0 && form.status == 0);
  }
  // 0: out of memory
  std::uint32_t allocate(std::uint64_t bytes, std::uint32_t parent = 0, std::uint32_t handle = 0) {
    if (handle == 0) handle = next.fetch_add(1);
    abi::MemoryParams params = {};
    params.size = bytes;
    abi::Alloc form = {client,
                       parent != 0 ? parent : device,
                       handle,
                       abi::class_device_memory,
                       reinterpret_cast<std::uint64_t>(&params),
                       0,
                       0,
                       0,
                       0,
                       0};
    WANT(ioctl(fd, abi::request(abi::esc_alloc, sizeof form), &form) == 0);
    if (form.status == abi::err_no_memory) return 0;
    SAME(form.status, 0);
    return handle;
  }
  std::uint32_t allocate_old(std::uint64_t bytes) {
    const std::uint32_t handle = next.fetch_add(1);
    abi::MemoryParams params = {};
    params.size = bytes;
    abi::AllocOld form = {
        client, device, handle, abi::class_device_memory, reinterpret_cast<std::uint64_t>(&params), 0, 0};
    WANT(ioctl(fd, abi::request(abi::esc_alloc, sizeof form), &form) == 0);
    return form.status == abi::err_no_memory ? 0 : handle;
  }
  std::uint32_t free(std::uint32_t handle) {
    abi::Free form = {client, device, handle, 0};
    WANT(ioctl(fd, abi::request(abi::esc_free, sizeof form), &form) == 0);
    return form.status;
  }
  std::uint32_t duplicate(std::uint32_t source_client, std::uint32_t source) {
    const std::uint32_t handle = next.fetch_add(1);
    abi::Dup form = {client, device, handle, source_client, source, 0, 0};
    WANT(ioctl(fd, abi::request(abi::esc_dup_object, sizeof form), &form) == 0 && form.status == 0);
    return handle;
  }
  template <class Params>
  void control(std::uint32_t object, std::uint32_t command, Params& params) {
    abi::Control form = {client,        object, command, 0, reinterpret_cast<std::uint64_t>(&params),
                         sizeof params, 0};
    WANT(ioctl(fd, abi::request(abi::esc_control, sizeof form), &form) == 0 && form.status == 0);
  }
  void export_fd(std::uint32_t handle) {
    abi::ExportObjects params = {};
    params.fd = 99;
    params.count = 1;
    params.objects[0] = handle;
    control(client, abi::cmd_export_objects_to_fd, params);
  }
  struct Import {
    std::int32_t fd;
    std::uint32_t parent, objects[128];
    std::uint8_t types[128];
    std::uint16_t count, index;
  };
  std::uint32_t import_fd() {
    Import params = {};
    static_assert(sizeof params == 652);
    params.count = 1;
    params.objects[0] = next.fetch_add(1);
    control(client, abi::cmd_import_objects_from_fd, params);
    return params.objects[0];
  }
  void lend(std::uint32_t handle) {
    std::uint32_t words[6] = {client, handle, client, 1, 0, 0};
    WANT(ioctl(fd, abi::request(abi::esc_share, sizeof words), words) == 0);
  }
};

guard::Slot* slot_of(pid_t pid) {
  for (auto& slot : page->slots) {
    if (slot.owner.load() >> 32 == static_cast<std::uint64_t>(pid)) return &slot;
  }
  return nullptr;
}
std::uint64_t used(std::size_t gpu = 0) {
  const auto* slot = slot_of(getpid());
  return slot == nullptr ? 0 : slot->used[gpu].load();
}
bool exists(std::uint32_t pid, std::uint32_t) { return kill(static_cast<pid_t>(pid), 0) == 0; }
void cap(std::uint64_t bytes) { page->cap[0] = bytes; }
int ends(pid_t pid) {
  int status = 0;
  WANT(waitpid(pid, &status, 0) == pid);
  truth->died(static_cast<std::uint32_t>(pid));
  return status;
}
pid_t child(const std::function<void()>& body) {
  const pid_t pid = fork();
  WANT(pid >= 0);
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    body();
    _exit(0);
  }
  return pid;
}
#define GOES_WELL(pid) SAME(ends(pid), 0)
void release() { guard::release_dead(*page, exists); }

// ---------------------------------------------------------------------------------------------------------------

void cap_holds() {
  cap(100 * MiB);
  Program p;
  const auto a = p.allocate(60 * MiB);
  WANT(a != 0);
  SAME(used(), 60 * MiB);
  WANT(p.allocate(60 * MiB) == 0);
  WANT(p.allocate_old(41 * MiB) == 0);
  SAME(slot_of(getpid())->refused.load(), 2);
  WANT(p.allocate(40 * MiB) != 0);
  WANT(p.allocate(1) == 0);
  SAME(p.free(a), 0);
  SAME(used(), 40 * MiB);
  WANT(p.allocate_old(60 * MiB) != 0);
  SAME(used(), truth->sum());
  SAME(truth->peak.load(), 100 * MiB);
  SAME(p.free(0x12345), abi::err_object_not_found);
  cap(50 * MiB);  // set lower while more is held: nothing breaks, nothing new fits
  WANT(p.allocate(1) == 0);
}

void sizes() {
  cap(64 * MiB);
  Program p;
  WANT(p.allocate(1) != 0);
  SAME(used(), truth->sum());  // what came back, not what was reserved
  WANT(p.allocate(~0ULL) == 0 || true);
  WANT(p.allocate(~0ULL - 5 * MiB) == 0);
  SAME(used(), truth->sum());
  setenv("TEST_DRIVER_ROUNDS", "4194304", 1);  // the driver gives more than was asked
  WANT(p.allocate(8 * MiB) != 0);
  SAME(used(), truth->sum());
  cap(used() + 9 * MiB);
  WANT(p.allocate(8 * MiB) == 0);  // fits as asked, not as given: taken back from the driver
  SAME(used(), truth->sum());
  unsetenv("TEST_DRIVER_ROUNDS");
  WANT(p.allocate(8 * MiB) != 0);
  SAME(used(), truth->sum());
  setenv("TEST_DRIVER_FAILS", "1", 1);
  cap(guard::no_cap);
  const auto before = used();
  abi::MemoryParams params = {};
  params.size = MiB;
  abi::Alloc form = {
      p.client, p.device, 0x77, abi::class_device_memory, reinterpret_cast<std::uint64_t>(&params), 0, 0,
      0,        0,        0};
  WANT(ioctl(p.fd, abi::request(abi::esc_alloc, sizeof form), &form) == 0 &&
       form.status == abi::err_invalid_argument);
  SAME(used(), before);
}

void sees_its_share() {
  cap(10 * MiB * 1024);
  Program p;
  p.allocate(1024 * MiB);
  abi::FbInfo info = {};
  info.count = 4;
  info.list[0].index = abi::fb_total_ram_size;
  info.list[1].index = abi::fb_heap_free;
  info.list[2].index = abi::fb_heap_size;
  info.list[3].index = 0x02;
  p.control(p.subdevice, abi::cmd_fb_get_info_v2, info);
  SAME(info.list[0].data, 10U << 20);
  SAME(info.list[1].data, 9U << 20);
  SAME(info.list[2].data, 10U << 20);
  SAME(info.list[3].data, 80U << 20);
  cap(guard::no_cap);
  p.control(p.subdevice, abi::cmd_fb_get_info_v2, info);
  SAME(info.list[0].data, 80U << 20);
  page->authority = static_cast<std::uint32_t>(guard::Authority::hold);
  cap(2 * MiB * 1024);
  page->outside[0] = 512 * MiB;
  p.control(p.subdevice, abi::cmd_fb_get_info_v2, info);
  SAME(info.list[1].data, 512U << 10);  // 2048 less 1024 in the slot less 512 outside
  info.count = 0xffffffff;
  p.control(p.subdevice, abi::cmd_fb_get_info_v2, *reinterpret_cast<abi::FbInfo*>(&info));
}

void frees_cascade() {
  cap(1024 * MiB);
  Program p;
  for (int i = 0; i < 10; ++i) WANT(p.allocate(2 * MiB) != 0);
  WANT(p.allocate(4 * MiB, p.subdevice) != 0);
  SAME(used(), 24 * MiB);
  abi::Alloc other = {p.client, p.device, 0x4444, 0x9999, 0,
                      0,        0,        0,      0,      0};  // some object memory can hang below
  WANT(ioctl(p.fd, abi::request(abi::esc_alloc, sizeof other), &other) == 0);
  WANT(p.allocate(6 * MiB, 0x4444) != 0);
  SAME(p.free(0x4444), 0);
  SAME(used(), 24 * MiB);
  SAME(p.free(p.subdevice), 0);
  SAME(used(), 20 * MiB);
  p.make_subdevice();
  WANT(p.allocate(4 * MiB, p.subdevice) != 0);
  SAME(p.free(p.device), 0);
  SAME(used(), 0);
  SAME(truth->sum(), 0);
  p.make_device(0);
  for (int i = 0; i < 10; ++i) WANT(p.allocate(2 * MiB, 0, 0x5c000010U + static_cast<unsigned>(i)) != 0);
  SAME(used(), 20 * MiB);
  SAME(p.free(p.client), 0);
  SAME(used(), 0);
  Program q;  // a client of the same process beside another
  Program r;
  WANT(q.allocate(2 * MiB) != 0 && r.allocate(8 * MiB) != 0);
  SAME(q.free(q.client), 0);
  SAME(used(), 8 * MiB);
}

void gpus_apart() {
  cap(10 * MiB);
  page->cap[3] = 20 * MiB;
  Program p(0);
  Program q(3);
  WANT(p.allocate(10 * MiB) != 0 && p.allocate(1) == 0);
  WANT(q.allocate(20 * MiB) != 0 && q.allocate(1) == 0);
  SAME(used(0), 10 * MiB);
  SAME(used(3), 20 * MiB);
  q.free(q.client);
  SAME(used(3), 0);
  SAME(used(0), 10 * MiB);
}

void duplicates() {
  cap(100 * MiB);
  Program p;
  Program q;
  const auto a = p.allocate(60 * MiB);
  const auto b = p.duplicate(p.client, a);
  const auto c = q.duplicate(p.client, b);
  SAME(used(), 60 * MiB);
  p.free(a);
  SAME(used(), 60 * MiB);
  p.free(b);
  SAME(used(), 60 * MiB);
  WANT(p.allocate(60 * MiB) == 0);
  q.free(c);
  SAME(used(), 0);
  for (int i = 0; i < 20000; ++i) {  // bodies come back
    const auto x = p.allocate(2 * MiB);
    const auto y = p.duplicate(p.client, x);
    p.free(x);
    p.free(y);
  }
  SAME(used(), 0);
  const auto d = p.allocate(10 * MiB);
  q.duplicate(p.client, d);
  p.free(p.client);
  SAME(used(), 10 * MiB);
  q.free(q.client);
  SAME(used(), 0);
  SAME(truth->sum(), 0);
}

void exports() {
  cap(100 * MiB);
  Program p;
  const auto a = p.allocate(60 * MiB);
  p.export_fd(a);
  p.export_fd(a);
  SAME(slot_of(getpid())->exported[0].load(), 60 * MiB);
  p.free(a);
  SAME(used(), 60 * MiB);  // a descriptor may keep it alive
  WANT(p.allocate(60 * MiB) == 0);
  // Of a process that died the bytes stay while another holds imports.
  int ready[2];
  WANT(pipe(ready) == 0);
  const pid_t exporter = child([&] {
    Program q;
    const auto x = q.allocate(20 * MiB);
    WANT(x != 0);
    q.export_fd(x);
    char c;
    WANT(read(ready[0], &c, 1) == 1);
  });
  const auto handle = p.import_fd();
  WANT(write(ready[1], "x", 1) == 1);
  GOES_WELL(exporter);
  release();
  SAME(guard::charged(*page, 0), 80 * MiB);
  WANT(p.allocate(21 * MiB) == 0);
  p.free(handle);
  release();
  SAME(guard::charged(*page, 0), 60 * MiB);
}

void lent_memory() {
  cap(100 * MiB);
  Program p;
  auto a = p.allocate(60 * MiB);
  p.lend(a);
  p.free(a);
  SAME(used(), 0);  // nobody imported
  a = p.allocate(60 * MiB);
  p.lend(a);
  int ready[2], go[2];
  WANT(pipe(ready) == 0 && pipe(go) == 0);
  const pid_t importer = child([&] {
    Program q;
    const auto x = q.duplicate(p.client, a);
    WANT(write(ready[1], "x", 1) == 1);
    char c;
    WANT(read(go[0], &c, 1) == 1);
    q.free(x);
    WANT(write(ready[1], "x", 1) == 1);
    WANT(read(go[0], &c, 1) == 1);
  });
  char c;
  WANT(read(ready[0], &c, 1) == 1);
  p.free(a);
  SAME(used(), 60 * MiB);  // the importer may still have it
  WANT(p.allocate(60 * MiB) == 0);
  WANT(write(go[1], "x", 1) == 1 && read(ready[0], &c, 1) == 1);
  WANT(p.allocate(60 * MiB) != 0);  // nobody imports: collected
  SAME(used(), 60 * MiB);
  WANT(write(go[1], "x", 1) == 1);
  GOES_WELL(importer);
}

void managed_memory() {
  cap(100 * MiB);
  Program p;
  const int uvm = open((root + "/dev/nvidia-uvm").c_str(), O_RDWR | O_CLOEXEC);
  WANT(uvm >= 0);
  char* base = static_cast<char*>(
      mmap(nullptr, 512 * MiB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  const auto manage = [&](std::uint64_t at, std::uint64_t bytes) {
    return mmap(base + at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, uvm,
                reinterpret_cast<off_t>(base + at));
  };
  WANT(manage(0, 60 * MiB) == base);
  SAME(used(), 60 * MiB);
  errno = 0;
  WANT(manage(100 * MiB, 60 * MiB) == MAP_FAILED && errno == ENOMEM);
  SAME(used(), 60 * MiB);
  WANT(p.allocate(41 * MiB) == 0);
  WANT(p.allocate(40 * MiB) != 0);
  WANT(munmap(base + 10 * MiB, 10 * MiB) == 0);  // out of the middle
  SAME(used(), 90 * MiB);
  WANT(munmap(base + 5 * MiB, 10 * MiB) == 0);  // half of it gone already
  SAME(used(), 85 * MiB);
  WANT(munmap(base + 50 * MiB, 100 * MiB) == 0);  // past its end
  SAME(used(), 75 * MiB);
  errno = 0;
  WANT(munmap(base + 1, MiB) == -1 && errno == EINVAL);  // refused by the kernel: put back
  SAME(used(), 75 * MiB);
  // Covered by something else.
  WANT(mmap(base, 5 * MiB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == base);
  SAME(used(), 70 * MiB);
  WANT(mmap64(base + 20 * MiB, MiB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
       base + 20 * MiB);
  SAME(used(), 69 * MiB);
  // Covered by itself: no double charge.
  WANT(manage(30 * MiB, 10 * MiB) == base + 30 * MiB);
  SAME(used(), 69 * MiB);
  GOES_WELL(child([&] {  // the kernel gives such mappings to no child
    WANT(used() == 0);
    munmap(base + 30 * MiB, 10 * MiB);
    WANT(used() == 0);
  }));
  SAME(used(), 69 * MiB);
  WANT(munmap(base, 512 * MiB) == 0);
  SAME(used(), 40 * MiB);
  // Another file is no managed memory.
  const int file = open((root + "/other").c_str(), O_RDWR | O_CREAT, 0600);
  WANT(mmap(base, MiB, PROT_READ, MAP_SHARED | MAP_FIXED, file, reinterpret_cast<off_t>(base)) == base);
  SAME(used(), 40 * MiB);
  std::vector<std::thread> threads;
  cap(guard::no_cap);
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      for (int i = 0; i < 2000; ++i) {
        const std::uint64_t at = (static_cast<std::uint64_t>(t) * 32 + random() % 24) * MiB;
        if (random() % 2 == 0) {
          manage(at, (1 + random() % 8) * MiB);
        } else {
          munmap(base + at, (1 + random() % 8) * MiB);
        }
      }
      munmap(base + static_cast<std::uint64_t>(t) * 32 * MiB, 32 * MiB);
    });
  }
  for (auto& t : threads) t.join();
  SAME(used(), 40 * MiB);
}

void threads_together() {
  cap(64 * MiB);
  Program p;
  std::vector<std::thread> threads;
  std::atomic<unsigned> denied{0};
  for (unsigned t = 0; t < 16; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      std::vector<std::uint32_t> mine;
      for (int i = 0; i < 2000; ++i) {
        if (mine.empty() || random() % 2 == 0) {
          const auto handle = p.allocate((1 + random() % 4) * 2 * MiB);
          if (handle != 0) mine.push_back(handle);
          if (handle == 0) ++denied;
        } else {
          const auto at = random() % mine.size();
          SAME(p.free(mine[at]), 0);
          mine[at] = mine.back();
          mine.pop_back();
        }
      }
      for (const auto handle : mine) SAME(p.free(handle), 0);
    });
  }
  for (auto& t : threads) t.join();
  SAME(used(), 0);
  SAME(truth->sum(), 0);
  SAME(slot_of(getpid())->asking[0].load(), 0);
  WANT(denied > 0);
  WANT(truth->peak.load() <= 64 * MiB);
}

// Two ask for more than half of what is left, at the same moment: one gets it.
void last_bytes() {
  cap(100 * MiB);
  struct Shared {
    std::atomic<unsigned> round, arrived, won, done;
  };
  auto* shared = static_cast<Shared*>(
      mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  constexpr unsigned rounds = 3000;
  const auto body = [&](unsigned count) {
    Program p;
    for (unsigned round = 1; round <= rounds; ++round) {
      shared->arrived.fetch_add(1);
      for (unsigned spin = 0; shared->arrived.load() < round * count; ++spin) {
        if (spin % 1024 == 1023) sched_yield();
      }
      const auto handle = p.allocate(60 * MiB);
      if (handle != 0) shared->won.fetch_add(1);
      shared->done.fetch_add(1);
      for (unsigned spin = 0; shared->done.load() < round * count; ++spin) {
        if (spin % 1024 == 1023) sched_yield();
      }
      if (shared->won.load() != round) {
        fprintf(stderr, "round %u: %u won in all\n", round, shared->won.load());
        _exit(1);
      }
      if (handle != 0) p.free(handle);
    }
  };
  const auto once = [&](unsigned count) {
    shared->arrived = shared->won = shared->done = 0;
    std::vector<pid_t> pids;
    for (unsigned i = 0; i < count; ++i) pids.push_back(child([&] { body(count); }));
    for (const auto pid : pids) GOES_WELL(pid);
    release();
    WANT(truth->peak.load() <= 100 * MiB);
  };
  once(2);
  once(3);
  shared->arrived = shared->won = shared->done = 0;
  GOES_WELL(child([&] {  // the same of two threads of one process
    std::thread other([&] { body(2); });
    body(2);
    other.join();
  }));
  WANT(truth->peak.load() <= 100 * MiB);
}

void fork_storm() {
  cap(200 * MiB);
  Program p;
  const auto mine = p.allocate(20 * MiB);
  WANT(mine != 0);
  std::mt19937 random(1);
  for (int storm = 0; storm < 10; ++storm) {
    std::map<pid_t, int> living;
    for (int i = 0; i < 40; ++i) {
      const unsigned seed = random();
      const pid_t pid = child([&] {
        std::mt19937 own(seed);
        Program q;
        for (int k = 0; k < 200; ++k) {
          const auto handle = q.allocate((1 + own() % 10) * 2 * MiB);
          if (handle != 0 && own() % 3 != 0) q.free(handle);
        }
        if (own() % 2 == 0) q.free(q.client);
      });
      living[pid] = i;
    }
    for (const auto& [pid, i] : living) {
      if (i % 3 == 0) kill(pid, SIGKILL);
    }
    for (const auto& [pid, i] : living) {
      const int status = ends(pid);
      WANT(i % 3 == 0 || status == 0);
    }
    release();
    SAME(guard::charged(*page, 0), 20 * MiB);
    SAME(truth->sum(), 20 * MiB);
  }
  WANT(truth->peak.load() <= 200 * MiB);
  SAME(used(), 20 * MiB);
  p.free(mine);
  SAME(guard::charged(*page, 0), 0);
}

void inherited_client() {
  cap(100 * MiB);
  Program p;
  GOES_WELL(child([&] { WANT(p.allocate(2 * MiB) == 0); }));
  WANT(p.allocate(2 * MiB) != 0);
}

void vfork_and_exec(const char* self) {
  cap(100 * MiB);
  Program p;
  WANT(p.allocate(30 * MiB) != 0);
  for (int i = 0; i < 50; ++i) {
    const pid_t pid = vfork();
    if (pid == 0) {
      execl(self, self, "exec-child", nullptr);
      _exit(9);
    }
    GOES_WELL(pid);
    release();
    SAME(used(), 30 * MiB);
    SAME(guard::charged(*page, 0), 30 * MiB);
  }
  const pid_t pid = fork();  // exec with memory held: the same pid, its slot swept and used again
  if (pid == 0) {
    Program q;
    WANT(q.allocate(50 * MiB) != 0);
    truth->died(static_cast<std::uint32_t>(getpid()));
    execl(self, self, "exec-child", "twice", nullptr);
    _exit(9);
  }
  GOES_WELL(pid);
  release();
  SAME(guard::charged(*page, 0), 30 * MiB);
}
void exec_child() {
  Program p;
  WANT(p.allocate(70 * MiB) != 0);
  SAME(used(), 70 * MiB);
  unsigned owned = 0;
  for (const auto& slot : page->slots)
    owned += slot.owner.load() >> 32 == static_cast<std::uint64_t>(getpid());
  SAME(owned, 1);
}

void table_overflows() {
  cap(guard::no_cap);
  Program p;
  std::vector<std::uint32_t> handles;
  for (unsigned i = 0; i < 400'000; ++i) handles.push_back(p.allocate(4096));
  SAME(used(), truth->sum());
  for (const auto handle : handles) SAME(p.free(handle), 0);
  SAME(truth->sum(), 0);
  const auto left = used();
  WANT(left > 0 && left < 200'000ULL * 4096);  // what found no place stays charged
  for (unsigned i = 0; i < 1000; ++i) {
    const auto handle = p.allocate(4096);
    WANT(used() == left + 4096);
    p.free(handle);
    WANT(used() == left || used() == left + 4096);
  }
}

void many_objects() {
  cap(guard::no_cap);
  Program p;
  std::vector<std::uint32_t> handles;
  for (unsigned i = 0; i < 70'000; ++i) handles.push_back(p.allocate(2 * MiB));  // 141 GB in 2 MiB pieces
  for (int round = 0; round < 5; ++round) {
    for (auto& handle : handles) {
      p.free(handle);
      handle = p.allocate(2 * MiB);
    }
  }
  for (const auto handle : handles) p.free(handle);
  SAME(used(), 0);
}

void hostile_page() {
  Program p;
  p.allocate(2 * MiB);
  std::mt19937_64 random(7);
  auto* words = reinterpret_cast<std::atomic<std::uint64_t>*>(page);
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    std::mt19937_64 own(8);
    while (!stop) words[own() % (sizeof(Page) / 8)] = own();
  });
  for (int i = 0; i < 3000; ++i) {
    if (i % 100 == 0) {
      for (std::size_t k = 0; k < sizeof(Page) / 8; ++k) words[k] = i % 200 == 0 ? random() : ~0ULL;
    }
    if (i % 50 == 0) page->arbiter_beat = 0;  // else a garbage gate may wait up to its second
    const auto handle = p.allocate((random() % 8) * MiB);
    if (handle != 0) p.free(handle);
    abi::FbInfo info = {};
    info.count = 3;
    p.control(p.subdevice, abi::cmd_fb_get_info_v2, info);
  }
  stop = true;
  writer.join();
  GOES_WELL(child([&] {
    Program q;
    const auto handle = q.allocate(MiB);
    if (handle != 0) q.free(handle);
  }));
  release();
}

void held_from_outside() {
  cap(10 * MiB);
  page->authority = static_cast<std::uint32_t>(guard::Authority::hold);
  Program p;
  const auto a = p.allocate(60 * MiB);
  WANT(a != 0);
  SAME(guard::charged(*page, 0), 0);
  p.free(a);
  SAME(guard::charged(*page, 0), 0);
}

void counts_and_legacy() {
  cap(100 * MiB);
  Program p;
  std::uint64_t us = 1000;
  p.control(0x5c000015, abi::cmd_group_set_timeslice, us);
  SAME(slot_of(getpid())->self_set.load(), 1);
  abi::GroupParams params = {0, 0, 0, abi::engine_compute};
  abi::Alloc form = {p.client,
                     p.device,
                     0x5c000020,
                     abi::class_channel_group,
                     reinterpret_cast<std::uint64_t>(&params),
                     0,
                     0,
                     0,
                     0,
                     0};
  WANT(ioctl(p.fd, abi::request(abi::esc_alloc, sizeof form), &form) == 0 && form.status == 0);
  p.control(0x5c000020, abi::cmd_group_set_timeslice, us);  // as libcuda does at once
  SAME(slot_of(getpid())->self_set.load(), 1);
  p.control(0x5c000020, abi::cmd_group_set_timeslice, us);
  SAME(slot_of(getpid())->self_set.load(), 2);
  std::uint32_t words[46] = {};
  words[0] = p.client;
  words[2] = 2;
  WANT(ioctl(p.fd, abi::request(abi::esc_vid_heap_control, sizeof words), words) == 0 &&
       words[5] == abi::err_no_memory);
  words[5] = 0;
  words[14] = 0x2a800000;  // system memory: none of ours
  WANT(ioctl(p.fd, abi::request(abi::esc_vid_heap_control, sizeof words), words) == 0 && words[5] == 0);
  cap(guard::no_cap);
  words[14] = 0;
  WANT(ioctl(p.fd, abi::request(abi::esc_vid_heap_control, sizeof words), words) == 0 && words[5] == 0);
}

void slots_run_out() {
  cap(100 * MiB);
  for (std::size_t i = 0; i < guard::max_slots; ++i) page->slots[i].owner = (0x7ffff000ULL + i) << 32 | 1;
  page->high_water = guard::max_slots;
  Program p;
  WANT(p.allocate(2 * MiB) == 0);
  release();
  WANT(p.allocate(2 * MiB) != 0);
  SAME(used(), 2 * MiB);
}

void processes_at_once() {
  cap(guard::no_cap);
  std::vector<pid_t> pids;
  int go[2], done[2];
  WANT(pipe(go) == 0 && pipe(done) == 0);
  for (int i = 0; i < 256; ++i) {
    pids.push_back(child([&] {
      char c;
      close(go[1]);
      WANT(read(go[0], &c, 1) == 0);
      Program p;
      WANT(p.allocate(2 * MiB) != 0);
      WANT(write(done[1], "x", 1) == 1);
      pause();
    }));
  }
  const auto began = now_ns();
  close(go[1]);
  for (int i = 0; i < 256; ++i) {
    char c;
    WANT(read(done[0], &c, 1) == 1);
  }
  const auto took = now_ns() - began;
  SAME(guard::charged(*page, 0), 256 * 2 * MiB);
  std::map<std::uint64_t, int> owners;
  for (const auto& slot : page->slots) {
    if (slot.owner != 0) ++owners[slot.owner];
  }
  SAME(owners.size(), 256);
  for (const auto pid : pids) kill(pid, SIGKILL);
  for (const auto pid : pids) ends(pid);
  const auto dead = now_ns();
  release();
  const auto released = now_ns() - dead;
  SAME(guard::charged(*page, 0), 0);
  printf("256 processes had slot and memory after %.1f ms; releasing all took %.2f ms\n",
         static_cast<double>(took) / 1e6, static_cast<double>(released) / 1e6);
}

// Where the guard's own instructions are.
std::pair<std::uint64_t, std::uint64_t> guard_text() {
  FILE* maps = fopen("/proc/self/maps", "r");
  char line[4096];
  std::pair<std::uint64_t, std::uint64_t> found = {0, 0};
  while (fgets(line, sizeof line, maps) != nullptr) {
    unsigned long low = 0, high = 0;
    char rights[8] = {};
    if (sscanf(line, "%lx-%lx %7s", &low, &high, rights) == 3 && strchr(rights, 'x') != nullptr &&
        strstr(line, "libbulkhead-guard.so") != nullptr) {
      found = {low, high};
    }
  }
  fclose(maps);
  WANT(found.first != 0);
  return found;
}

// A process that takes a slot, allocates, duplicates, exports and frees, stopped just before.
pid_t victim() {
  const pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    ptrace(PTRACE_TRACEME, 0, 0, 0);
    Program q;
    raise(SIGSTOP);
    const auto handle = q.allocate(40 * MiB);
    const auto twin = q.duplicate(q.client, handle);
    const auto kept = q.allocate(4 * MiB);
    q.export_fd(handle);
    q.free(handle);
    q.free(twin);
    q.free(kept);
    raise(SIGSTOP);
    _exit(0);
  }
  int status = 0;
  WANT(waitpid(pid, &status, 0) == pid && WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
  return pid;
}
bool step(pid_t pid) {
  int status = 0;
  WANT(ptrace(PTRACE_SINGLESTEP, pid, 0, 0) == 0);
  WANT(waitpid(pid, &status, 0) == pid);
  return WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP;
}
void finish(pid_t pid) {
  int status = 0;
  kill(pid, SIGKILL);
  while (waitpid(pid, &status, 0) == pid && !WIFSIGNALED(status) && !WIFEXITED(status)) {
  }
  truth->died(static_cast<std::uint32_t>(pid));
}

// SIGKILL after every instruction of the guard (only these write the page): what the dead held goes back
// whole, and a neighbour that holds and wants memory is served.
void killed_anywhere(unsigned stride) {
  cap(100 * MiB);
  Program p;
  WANT(p.allocate(30 * MiB) != 0);
  const auto survivor = used();
  const auto [low, high] = guard_text();
  std::vector<unsigned long> moments;  // steps after which an instruction of the guard was done
  pid_t pid = victim();
  for (unsigned long n = 1;; ++n) {
    user_regs_struct registers = {};
    WANT(ptrace(PTRACE_GETREGS, pid, 0, &registers) == 0);
    if (registers.rip >= low && registers.rip < high) moments.push_back(n);
    if (!step(pid)) break;
  }
  finish(pid);
  release();
  WANT(moments.size() > 500);
  unsigned kills = 0;
  for (std::size_t i = 0; i < moments.size(); i += stride) {
    pid = victim();
    for (unsigned long n = 0; n < moments[i] && step(pid); ++n) {
    }
    finish(pid);
    // Before the dead one's slot is back: never past the cap, and no wait without end.
    const auto early = p.allocate(10 * MiB);
    if (early != 0) p.free(early);
    SAME(used(), survivor);
    release();
    SAME(guard::charged(*page, 0), survivor);
    WANT(slot_of(pid) == nullptr);
    const auto rest = p.allocate(70 * MiB);
    WANT(rest != 0);
    SAME(p.free(rest), 0);
    SAME(used(), survivor);
    ++kills;
  }
  WANT(truth->peak.load() <= 100 * MiB);
  printf("%u kills over %zu instructions of the guard\n", kills, moments.size());
}

void* cuda() {
  static void* handle = dlopen("libcuda.so.1", RTLD_NOW);
  return handle;
}
template <class Function>
Function entry(const char* name) {
  return reinterpret_cast<Function>(dlsym(cuda(), name));
}
using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                       void**, void**);
int launch(Launch f, std::uint64_t stream) {
  return f(nullptr, 1, 2, 3, 4, 5, 6, 7, reinterpret_cast<void*>(stream), reinterpret_cast<void**>(8),
           reinterpret_cast<void**>(9));
}

void trampolines() {
  Dl_info info = {};
  WANT(dladdr(dlsym(cuda(), "cuInit"), &info) != 0 && strstr(info.dli_fname, "guard") != nullptr);
  SAME(entry<int (*)(unsigned)>("cuInit")(0), 0);
  int version = 0;
  SAME(entry<int (*)(int*)>("cuDriverGetVersion")(&version), 0);
  SAME(version, 13000);
  SAME(launch(entry<Launch>("cuLaunchKernel"), 0), 0);
  SAME(launch(entry<Launch>("cuLaunchKernel"), 200), 0);
  SAME(entry<int (*)(int)>("cuMemAlloc_v2")(1), 500);  // the small library has none
  float sum = 0;
  SAME(entry<int (*)(float*, double, double)>("cuEventElapsedTime")(&sum, 1.5, 2.25), 0);
  WANT(sum == 3.75F);
  using GetProcAddress = int (*)(const char*, void**, int, std::uint64_t, int*);
  const auto get = entry<GetProcAddress>("cuGetProcAddress_v2");
  void* found = nullptr;
  SAME(get("cuLaunchKernel", &found, 13000, 0, nullptr), 0);
  WANT(found == dlsym(cuda(), "cuLaunchKernel"));
  SAME(get("cuLaunchKernel", &found, 13000, 2, nullptr), 0);
  WANT(found == dlsym(cuda(), "cuLaunchKernel_ptsz"));
  SAME(get("cuGetProcAddress", &found, 13000, 0, nullptr), 0);
  WANT(found == reinterpret_cast<void*>(get));
  SAME(get("cuInit", &found, 13000, 0, nullptr), 0);
  WANT(found != nullptr && found != dlsym(cuda(), "cuInit"));
  SAME(get("cuNothing", &found, 13000, 0, nullptr), 500);
}

void managed_answer() {
  cap(100 * MiB);
  const auto allocate = entry<int (*)(std::uint64_t*, std::size_t, unsigned)>("cuMemAllocManaged");
  std::uint64_t at = 0;
  SAME(allocate(&at, 60 * MiB, 1), 0);
  SAME(allocate(&at, 60 * MiB, 1), 2);
  SAME(allocate(&at, 40 * MiB, 1), 0);
  SAME(used(), 100 * MiB);
}

void gate_holds() {
  const auto f = entry<Launch>("cuLaunchKernel");
  SAME(launch(f, 0), 0);
  page->arbiter_beat = now_ns() + 900'000'000;
  page->gate = 1;
  std::atomic<bool> launched{false};
  std::thread waiting([&] {
    SAME(launch(f, 200), 0);
    launched = true;
  });
  for (int i = 0; i < 15; ++i) {  // closed for 1.5 s by an arbiter that lives
    usleep(100'000);
    page->arbiter_beat = now_ns() + 900'000'000;  // a busy machine may keep this thread waiting
    WANT(!launched);
  }
  SAME(launch(f, 101), 0);  // that stream is capturing
  page->gate = 0;
  syscall(SYS_futex, &page->gate, FUTEX_WAKE, 1000, nullptr, nullptr, 0);
  waiting.join();
  const auto gated = slot_of(getpid())->gated_ns.load();
  WANT(gated > 1'000'000'000);
  page->gate = 1;  // and now the arbiter dies
  page->arbiter_beat = now_ns();
  SAME(entry<int (*)(void*, void*)>("cuGraphLaunch")(nullptr, nullptr), 0);
  page->arbiter_beat = 1;
  SAME(launch(f, 0), 0);
  page->arbiter_beat = ~0ULL;
  SAME(launch(f, 0), 0);
}

void other_names() {
  cap(10 * MiB);
  const char* path = getenv("BULKHEAD_GUARD_CUDA");
  WANT(dlopen(path, RTLD_NOW) != nullptr);  // however it was opened, its calls go through libc's ioctl
  Program p;
  WANT(p.allocate(11 * MiB) == 0);
  WANT(p.allocate(10 * MiB) != 0);
}

void passes_through() {
  Program p;
  WANT(p.allocate(500 * MiB) != 0);
  SAME(guard::charged(*page, 0), 0);
  abi::FbInfo info = {};
  info.count = 1;
  info.list[0].index = abi::fb_total_ram_size;
  p.control(p.subdevice, abi::cmd_fb_get_info_v2, info);
  SAME(info.list[0].data, 80U << 20);
  SAME(launch(entry<Launch>("cuLaunchKernel"), 0), 0);
}

void by_path() {
  cap(10 * MiB);
  Program p;
  WANT(p.allocate(11 * MiB) == 0);
  WANT(p.allocate(10 * MiB) != 0);
}

int memory_file(const char* name, std::size_t size, bool seal) {
  const int fd = memfd_create(name, seal ? MFD_ALLOW_SEALING : 0);
  WANT(fd >= 0 && ftruncate(fd, static_cast<off_t>(size)) == 0);
  if (seal) WANT(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0);
  return fd;
}

}  // namespace

int main(int count, char** words) {
  alarm(1800);
  const std::string scenario = count > 1 ? words[1] : "";
  if (getenv("TEST_STAGE") == nullptr) {
    // First stage: page, truth, preload, and again.
    root = getenv("BULKHEAD_ROOT");
    const bool sealed = scenario != "unsealed";
    const int fd = memory_file("page", scenario == "small" ? 4096 : sizeof(Page), sealed);
    if (scenario != "small") {
      auto* fresh =
          static_cast<Page*>(mmap(nullptr, sizeof(Page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
      fresh->magic = scenario == "magic" ? 1 : guard::wire_magic;
      fresh->version = scenario == "version" ? 99 : guard::wire_version;
      for (auto& c : fresh->cap) c = guard::no_cap;
      if (scenario == "unsealed" || scenario == "magic" || scenario == "version") fresh->cap[0] = 1;
    }
    const int truth_fd = memory_file("truth", sizeof(Truth), false);
    setenv("TEST_STAGE", "2", 1);
    setenv("TEST_PAGE", std::to_string(fd).c_str(), 1);
    setenv("TEST_TRUTH", ("/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(truth_fd)).c_str(),
           1);
    if (scenario == "by-path") {
      setenv(guard::wire_environment, "777", 1);
      setenv(guard::wire_path_environment,
             ("/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(fd)).c_str(), 1);
    } else if (scenario != "no-page") {
      setenv(guard::wire_environment, scenario == "words" ? "1x" : std::to_string(fd).c_str(), 1);
    }
    setenv("LD_PRELOAD", getenv("TEST_PRELOAD"), 1);
    execv(words[0], words);
    return 9;
  }
  root = getenv("BULKHEAD_ROOT");
  const int fd = atoi(getenv("TEST_PAGE"));
  page = static_cast<Page*>(mmap(nullptr, sizeof(Page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  truth = static_cast<Truth*>(mmap(nullptr, sizeof(Truth), PROT_READ | PROT_WRITE, MAP_SHARED,
                                   open(getenv("TEST_TRUTH"), O_RDWR), 0));
  const bool quick = getenv("BULKHEAD_QUICK") == nullptr || strcmp(getenv("BULKHEAD_QUICK"), "0") != 0;
  const std::map<std::string, std::function<void()>> scenarios = {
      {"cap", cap_holds},
      {"sizes", sizes},
      {"share", sees_its_share},
      {"cascade", frees_cascade},
      {"gpus", gpus_apart},
      {"duplicates", duplicates},
      {"exports", exports},
      {"lent", lent_memory},
      {"managed", managed_memory},
      {"threads", threads_together},
      {"last-bytes", last_bytes},
      {"fork-storm", fork_storm},
      {"inherited", inherited_client},
      {"exec", [&] { vfork_and_exec(words[0]); }},
      {"exec-child", exec_child},
      {"overflow", table_overflows},
      {"many", many_objects},
      {"hostile", hostile_page},
      {"outside", held_from_outside},
      {"counts", counts_and_legacy},
      {"slots", slots_run_out},
      {"at-once", processes_at_once},
      {"killed", [&] { killed_anywhere(quick ? 13 : 1); }},
      {"trampolines", trampolines},
      {"gate", gate_holds},
      {"managed-answer", managed_answer},
      {"other-names", other_names},
      {"no-page", passes_through},
      {"unsealed", passes_through},
      {"small",
       [] {
         page = new Page();
         passes_through();
       }},
      {"magic", passes_through},
      {"version", passes_through},
      {"words", passes_through},
      {"by-path", by_path},
  };
  const auto found = scenarios.find(scenario);
  if (found == scenarios.end()) return 2;
  found->second();
  return 0;
}
