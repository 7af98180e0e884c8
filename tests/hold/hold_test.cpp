// The hold over the twin's driver, in processes of their own: a tenant under the real filter, an arbiter that
// may be killed. usage: hold_test SCENARIO [ARGUMENT]; says why and exits 1 when something is wrong.
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "abi/rm/rm.hpp"
#include "base/clock.hpp"
#include "base/fd.hpp"
#include "edge/seccomp/seccomp.hpp"
#include "engine/hold/hold.hpp"
#include "guard/wire/wire.hpp"
#include "twin/rm/rm.hpp"
#include "twin/state/state.hpp"

namespace fs = std::filesystem;
using namespace bulkhead;
namespace abi = bulkhead::abi;

namespace {

constexpr std::uint64_t MiB = 1ULL << 20, GiB = 1ULL << 30;
fs::path twin_dir;

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::fflush(nullptr);
  ::_exit(1);
}
#define WANT(condition)                                                                               \
  do {                                                                                                \
    if (!(condition)) fail(std::string(__func__) + ":" + std::to_string(__LINE__) + ": " #condition); \
  } while (false)
#define SAME(a, b)                                                                                         \
  do {                                                                                                     \
    const auto one_ = (a);                                                                                 \
    const auto two_ = (b);                                                                                 \
    if (!(one_ == two_))                                                                                   \
      fail(std::string(__func__) + ":" + std::to_string(__LINE__) + ": " #a " = " + std::to_string(one_) + \
           ", " #b " = " + std::to_string(two_));                                                          \
  } while (false)

// ---- what a program does to the driver

struct Device {
  int fd = -1;
  std::uint32_t client = 0, next = 0x5c000010;
  static constexpr std::uint32_t device = 0x5c000002, subdevice = 0x5c000003;

  void open_file() {
    fd = ::open((twin_dir / "root/dev/nvidiactl").c_str(), O_RDWR | O_CLOEXEC);
    WANT(fd >= 0);
  }
  std::uint32_t make(std::uint32_t root, std::uint32_t parent, std::uint32_t& handle, std::uint32_t cls,
                     void* params = nullptr) const {
    abi::Alloc call{};
    call.root = root;
    call.parent = parent;
    call.handle = handle;
    call.cls = cls;
    call.params = reinterpret_cast<std::uint64_t>(params);
    if (::ioctl(fd, abi::request(abi::esc_alloc, sizeof call), &call) != 0)
      return 0x10000U + static_cast<unsigned>(errno);
    handle = call.handle;
    return call.status;
  }
  void start(std::uint32_t gpu = 0) {
    open_file();
    std::uint32_t handle = 0;
    SAME(make(0, 0, handle, abi::class_client), 0U);
    client = handle;
    abi::DeviceParams params{};
    params.device = gpu;
    handle = device;
    SAME(make(client, client, handle, abi::class_device, &params), 0U);
    handle = subdevice;
    SAME(make(client, device, handle, abi::class_subdevice), 0U);
  }
  std::uint32_t memory(std::uint64_t bytes, std::uint32_t* given = nullptr, std::uint32_t wanted = ~0U) {
    abi::MemoryParams params{};
    params.size = bytes;
    std::uint32_t handle = wanted == ~0U ? next++ : wanted;
    const auto status = make(client, device, handle, abi::class_device_memory, &params);
    if (given != nullptr) *given = handle;
    return status;
  }
  std::uint32_t free(std::uint32_t handle) const {
    abi::Free call{client, device, handle, 0xffff};
    if (::ioctl(fd, abi::request(abi::esc_free, sizeof call), &call) != 0)
      return 0x10000U + static_cast<unsigned>(errno);
    return call.status;
  }
  std::uint32_t control(std::uint32_t object, std::uint32_t command, void* params, std::size_t size) const {
    abi::Control call{};
    call.client = client;
    call.object = object;
    call.command = command;
    call.params = reinterpret_cast<std::uint64_t>(params);
    call.params_size = static_cast<std::uint32_t>(size);
    if (::ioctl(fd, abi::request(abi::esc_control, sizeof call), &call) != 0)
      return 0x10000U + static_cast<unsigned>(errno);
    return call.status;
  }
};

// ---- the twin, and what its driver knows for certain

std::unique_ptr<twin::rm::Driver> driver;
std::unique_ptr<twin::StateFile> state;

void make_twin() {
  fs::create_directories(twin_dir / "root/dev");
  fs::create_directories(twin_dir / "root/proc");
  WANT(write_file_atomic(twin_dir / "root/dev/nvidiactl", "", 0666).ok());
  WANT(write_file_atomic(twin_dir / "root/dev/nvidia-uvm", "", 0666).ok());
  WANT(::truncate((twin_dir / "root/dev/nvidia-uvm").c_str(), 64LL << 30) == 0);
  const auto fresh = std::make_unique<twin::State>();
  fresh->version = twin::state_version;
  fresh->gpu_count = 2;
  fresh->chip_count = 1;
  fresh->driver_loaded = 1;
  fresh->realtime = 1;
  fresh->chips[0].memory_bytes = 80 * GiB;
  fresh->chips[0].reserved_bytes = 1 * GiB;
  fresh->gpus[0].on_pci = fresh->gpus[1].on_pci = 1;
  WANT(twin::StateFile::create(twin_dir / "state.bin", *fresh).ok());
}
void open_twin() {
  auto opened = twin::rm::Driver::open(twin_dir);
  WANT(opened.ok());
  driver = std::move(*opened);
  auto file = twin::StateFile::open(twin_dir / "state.bin");
  WANT(file.ok());
  state = std::move(*file);
}
std::uint64_t truth(std::uint32_t gpu = 0) {
  WANT(driver->follow().ok());
  std::uint64_t sum = 0;
  state->read([&](const twin::State& now) {
    sum = 0;
    for (const auto& process : now.processes)
      if (process.used != 0 && process.gpu == gpu) sum += process.memory_bytes;
  });
  return sum;
}

// ---- a tenant and its arbiter

struct Tenant {
  int pid = 0, listener = -1, inflight = -1;
  int to = -1, from = -1;  // a byte each way: the program's steps
  guard::Page* page = nullptr;

  explicit Tenant(const std::function<int(Tenant&)>& program, std::uint64_t cap = 1 * GiB) {
    page = static_cast<guard::Page*>(
        ::mmap(nullptr, sizeof(guard::Page), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    for (auto& one : page->cap) one = guard::no_cap;
    page->cap[0] = cap;
    auto record = hold::make_inflight();
    WANT(record.ok());
    inflight = record->release();
    int pair[2], steps[2];
    WANT(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    WANT(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, steps) == 0);
    pid = ::fork();
    if (pid == 0) {
      ::close(pair[0]);
      ::close(steps[0]);
      to = from = steps[1];
      const auto installed = seccomp::install();
      WANT(installed.listener >= 0);
      WANT(seccomp::send_fd(pair[1], installed.listener) == 0);
      ::close(installed.listener);
      ::close(inflight);
      std::exit(program(*this));
    }
    ::close(pair[1]);
    ::close(steps[1]);
    to = from = steps[0];
    listener = seccomp::recv_fd(pair[0]);
    ::close(pair[0]);
    WANT(listener >= 0);
  }
  ~Tenant() {
    ::close(listener);
    ::close(inflight);
    ::close(to);
    ::munmap(page, sizeof *page);
  }
  void tell() const { WANT(::write(to, "x", 1) == 1); }
  void await() const {
    char byte = 0;
    WANT(::read(from, &byte, 1) == 1);
  }
  std::unique_ptr<hold::Hold> hold(bool memory = true) const {
    auto mapped = hold::map_inflight(inflight);
    WANT(mapped.ok());
    auto made = hold::Hold::make(UniqueFd(::dup(listener)), *page,
                                 {.root = twin_dir / "root", .memory = memory, .inflight = *mapped});
    if (!made.ok()) fail(made.error().message());
    return std::move(*made);
  }
  int reap() const {
    int status = 0;
    WANT(::waitpid(pid, &status, 0) == pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
};

// Pumps until the program says a byte, or ends (false).
bool serve(hold::Hold& hold, const Tenant& tenant, bool stop_at_byte = true) {
  for (;;) {
    pollfd fds[3] = {
        {hold.listener(), POLLIN, 0}, {hold.processes_fd(), POLLIN, 0}, {tenant.from, POLLIN, 0}};
    ::poll(fds, stop_at_byte ? 3 : 2, -1);
    const auto pumped = hold.pump();
    if (!pumped.ok()) {
      if (pumped.error().code() != Errc::gone) fail(pumped.error().message());
      return false;
    }
    for (std::uint32_t gpu = 0; gpu < 1; ++gpu) WANT(hold.used(gpu) <= tenant.page->cap[gpu]);
    if (stop_at_byte && (fds[2].revents & POLLIN) != 0) {
      char byte = 0;
      if (::read(tenant.from, &byte, 1) == 1) return true;
      return serve(hold, tenant, false);
    }
    if (stop_at_byte && (fds[2].revents & POLLHUP) != 0) return serve(hold, tenant, false);
  }
}

// Runs a program that steps: at each byte `look` is called, then it goes on.
void run(const std::function<int(Tenant&)>& program,
         const std::function<void(hold::Hold&, Tenant&, int)>& look = {}, std::uint64_t cap = 1 * GiB) {
  Tenant tenant(program, cap);
  open_twin();
  auto hold = tenant.hold();
  for (int step = 0; serve(*hold, tenant); ++step) {
    if (look) look(*hold, tenant, step);
    tenant.tell();
  }
  SAME(tenant.reap(), 0);
  hold->reconcile();
  SAME(hold->used(0), 0U);
  SAME(truth(), 0U);
}
void step(const Tenant& tenant) {
  tenant.tell();
  tenant.await();
}
void equal(hold::Hold& hold, std::uint64_t want) {
  SAME(hold.used(0), want);
  SAME(truth(), want);
}

// ---- scenarios

void cap() {
  run(
      [](Tenant& t) {
        Device d;
        d.start();
        std::uint32_t last = 0;
        for (int i = 0; i < 16; ++i) SAME(d.memory(64 * MiB, &last), 0U);
        SAME(d.memory(2 * MiB), std::uint32_t{abi::err_no_memory});
        step(t);
        SAME(d.free(last), 0U);
        SAME(d.memory(128 * MiB), std::uint32_t{abi::err_no_memory});
        SAME(d.memory(64 * MiB), 0U);
        step(t);
        SAME(d.free(d.client), 0U);
        step(t);
        return 0;
      },
      [](hold::Hold& h, Tenant&, int at) {
        equal(h, at == 2 ? 0 : 1 * GiB);
        SAME(h.refused(), at == 0 ? 1U : 2U);
        SAME(h.escapes(), 0U);
      });
}

void sizes() {
  run(
      [](Tenant& t) {
        Device d;
        d.start();
        for (const std::uint64_t size :
             {1ULL, 4096ULL, 65536ULL, 65537ULL, 1000000ULL, 1048576ULL, 3000000ULL})
          SAME(d.memory(size), 0U);
        std::uint32_t chosen = 0;
        SAME(d.memory(2 * MiB, &chosen, 0), 0U);
        WANT(chosen != 0);
        SAME(d.memory(0), std::uint32_t{abi::err_invalid_argument});
        SAME(d.memory(2 * MiB, nullptr, chosen), std::uint32_t{abi::err_insert_duplicate_name});
        SAME(d.memory(~0ULL), std::uint32_t{abi::err_no_memory});
        step(t);
        SAME(d.free(chosen), 0U);
        SAME(d.free(chosen), std::uint32_t{abi::err_object_not_found});
        step(t);
        return 0;
      },
      [](hold::Hold& h, Tenant&, int) { SAME(h.used(0), truth()); });
}

void processes() {
  run([](Tenant&) {
    for (int round = 0; round < 20; ++round) {
      int children[4];
      for (int& child : children) {
        child = ::fork();
        if (child == 0) {
          Device d;
          d.start();
          SAME(d.memory(256 * MiB), 0U);
          ::_exit(0);
        }
      }
      for (const int child : children) {
        int status = 1;
        ::waitpid(child, &status, 0);
        SAME(status, 0);
      }
    }
    // What a process had is to be had again as soon as it was waited for, although its file was borrowed.
    Device d;
    d.start();
    SAME(d.memory(1 * GiB), 0U);
    return 0;
  });
}

void closed() {
  run([](Tenant&) {
    for (int i = 0; i < 10; ++i) {
      Device d;
      d.start();
      SAME(d.memory(700 * MiB), 0U);
      ::close(d.fd);
    }
    Device d;
    d.start();
    SAME(d.memory(1 * GiB), 0U);
    const int copy = ::dup(d.fd);
    ::close(d.fd);
    Device e;
    e.start();  // takes the number that was given up
    SAME(e.memory(2 * MiB), std::uint32_t{abi::err_no_memory});
    ::close(copy);
    SAME(e.memory(2 * MiB), 0U);
    return 0;
  });
}

void inherited() {
  run(
      [](Tenant& t) {
        int up[2];
        WANT(::pipe(up) == 0);
        const int middle = ::fork();
        if (middle == 0) {
          Device d;
          d.start();
          SAME(d.memory(512 * MiB), 0U);
          if (::fork() == 0) {  // holds the file of a parent that is gone
            char byte = 0;
            ::close(up[1]);
            static_cast<void>(::read(up[0], &byte, 1));
            ::_exit(0);
          }
          ::_exit(0);
        }
        int status = 0;
        ::waitpid(middle, &status, 0);
        SAME(status, 0);
        step(t);
        ::close(up[1]);
        ::close(up[0]);
        return 0;
      },
      [](hold::Hold& h, Tenant&, int) {
        ::usleep(20000);
        h.reconcile();
        equal(h, 512 * MiB);
      });
}

// The same with an arbiter that was away while the parent ended.
void inherited_meanwhile() {
  int up[2];
  WANT(::pipe(up) == 0);
  Tenant tenant([&up](Tenant& t) {
    ::close(up[1]);
    const int middle = ::fork();
    if (middle == 0) {
      Device d;
      d.start();
      SAME(d.memory(512 * MiB), 0U);
      step(t);
      if (::fork() == 0) {
        char byte = 0;
        static_cast<void>(::read(up[0], &byte, 1));
        ::_exit(0);
      }
      ::_exit(0);
    }
    int status = 0;
    ::waitpid(middle, &status, 0);
    SAME(status, 0);
    step(t);
    return 0;
  });
  ::close(up[0]);
  open_twin();
  {
    auto hold = tenant.hold();
    WANT(serve(*hold, tenant));
  }
  tenant.tell();
  tenant.await();
  auto hold = tenant.hold();
  equal(*hold, 512 * MiB);
  tenant.tell();
  ::close(up[1]);
  serve(*hold, tenant, false);
  SAME(tenant.reap(), 0);
  equal(*hold, 0);
}

void threads() {
  run(
      [](Tenant& t) {
        Device d;
        d.start();
        std::vector<std::thread> all;
        for (std::uint32_t n = 0; n < 8; ++n)
          all.emplace_back([&d, n] {
            std::mt19937 random(n);
            std::vector<std::uint32_t> mine;
            Device own = d;
            own.next = 0x5d000000 + n * 0x10000;
            for (int i = 0; i < 200; ++i) {
              std::uint32_t handle = 0;
              if (random() % 3 != 0 || mine.empty()) {
                const auto status = own.memory((1 + random() % 64) * 2 * MiB, &handle);
                WANT(status == 0 || status == abi::err_no_memory);
                if (status == 0) mine.push_back(handle);
              } else {
                SAME(own.free(mine.back()), 0U);
                mine.pop_back();
              }
            }
          });
        for (auto& one : all) one.join();
        step(t);
        return 0;
      },
      [](hold::Hold& h, Tenant&, int) { SAME(h.used(0), truth()); });
}

void signals() {  // a call that was received is made once, whatever signals come meanwhile
  run(
      [](Tenant& t) {
        struct sigaction action {};
        action.sa_handler = [](int) {};
        ::sigaction(SIGALRM, &action, nullptr);  // without SA_RESTART: an interrupted call would be seen
        Device d;
        d.start();
        const itimerval often{{0, 200}, {0, 200}};
        ::setitimer(ITIMER_REAL, &often, nullptr);
        std::uint32_t handle = 0;
        for (int i = 0; i < 500; ++i) {
          std::uint32_t status = 0;
          do {
            status = d.memory(512 * MiB, &handle);
          } while (status == 0x10000U + EINTR);
          SAME(status, 0U);
          do {
            status = d.free(handle);
          } while (status == 0x10000U + EINTR);
          SAME(status, 0U);
        }
        const itimerval never{};
        ::setitimer(ITIMER_REAL, &never, nullptr);
        step(t);
        return 0;
      },
      [](hold::Hold& h, Tenant&, int) { equal(h, 0); });
}

// Threads with descriptors of their own are no place to hide a driver file.
void unshared() {
  run(
      [](Tenant& t) {
        Device first;  // the twin's own descriptors must be in both tables
        first.start();
        std::atomic<bool> done{false}, ready{false};
        std::thread hidden([&] {
          WANT(::unshare(CLONE_FILES) == 0);
          WANT(::open("/dev/null", O_RDONLY) >= 0);  // the same number for two driver files is refused
          Device d;
          d.start();
          SAME(d.memory(512 * MiB), 0U);
          ready = true;
          while (!done) ::usleep(1000);
        });
        while (!ready) ::usleep(1000);
        step(t);
        Device e;
        e.start();
        SAME(e.memory(600 * MiB), std::uint32_t{abi::err_no_memory});
        done = true;
        hidden.join();
        return 0;
      },
      [](hold::Hold& h, Tenant&, int) {
        h.reconcile();
        equal(h, 512 * MiB);
      });
}

void groups() {
  run(
      [](Tenant& t) {
        Device d;
        d.start();
        abi::GroupParams params{};
        params.engine = abi::engine_compute;
        std::uint32_t group = 0x5c000100, channel = 0x5c000101;
        SAME(d.make(d.client, d.device, group, abi::class_channel_group, &params), 0U);
        step(t);
        for (int i = 0; i < 8; ++i, ++channel) SAME(d.make(d.client, group, channel, 0xc86f), 0U);
        params.engine = 0xb;
        std::uint32_t copier = 0x5c000200, copies = 0x5c000201;
        SAME(d.make(d.client, d.device, copier, abi::class_channel_group, &params), 0U);
        SAME(d.make(d.client, copier, copies, 0xc86f), 0U);
        std::uint64_t own = 2048;  // as libcuda does, last of all
        SAME(d.control(group, abi::cmd_group_set_timeslice, &own, sizeof own), 0U);
        step(t);
        std::uint64_t us = 77;
        SAME(d.control(group, abi::cmd_group_set_timeslice, &us, sizeof us), 0U);  // it hears so
        SAME(d.control(group, abi::cmd_group_get_timeslice, &us, sizeof us), 0U);
        SAME(us, 5000U);
        abi::DisableChannels off{};  // nor does it take itself off the GPU, or put itself back
        off.disable = 1;
        off.count = 1;
        off.clients[0] = d.client;
        off.channels[0] = 0x5c000101;
        SAME(d.control(Device::subdevice, abi::cmd_disable_channels, &off, sizeof off), 0U);
        step(t);
        SAME(d.free(group), 0U);
        step(t);
        return 0;
      },
      [](hold::Hold& h, Tenant& t, int at) {
        if (at == 0 || at == 3) {
          SAME(h.groups().size(), 0U);
          return;
        }
        SAME(h.groups().size(), 1U);
        const auto group = h.groups()[0];
        SAME(group.channels.size(), 8U);
        SAME(group.subdevice, Device::subdevice);
        SAME(group.pid, t.pid);
        WANT(group.start_time != 0 && group.born_ns != 0);
        if (at == 1) {
          WANT(h.set_slice_us(group, 5000).ok());
          SAME(*h.slice_us(group), 5000U);
          WANT(h.set_on(group, false).ok());
          WANT(h.set_on(group, false).ok());
          SAME(driver->progress({group.client, group.handle})->on, false);
          WANT(h.force_on(group).ok());
        }
        SAME(h.self_set(), at == 2 ? 2U : 0U);
      });
}

void sight() {
  run([](Tenant&) {
    Device d;
    d.start();
    SAME(d.memory(256 * MiB), 0U);
    abi::FbInfo info{};
    info.count = 3;
    info.list[0].index = abi::fb_total_ram_size;
    info.list[1].index = abi::fb_heap_free;
    info.list[2].index = abi::fb_usable_ram_size;
    SAME(d.control(d.subdevice, abi::cmd_fb_get_info_v2, &info, sizeof info), 0U);
    SAME(info.list[0].data, 1U << 20);
    SAME(info.list[1].data, 768U << 10);
    SAME(info.list[2].data, 1U << 20);
    return 0;
  });
}

void managed() {
  run(
      [](Tenant& t) {
        Device d;
        d.start();
        const int uvm = ::open((twin_dir / "root/dev/nvidia-uvm").c_str(), O_RDWR | O_CLOEXEC);
        const auto map = [uvm](std::uint64_t bytes) {
          return ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, uvm, 0);
        };
        void* first = map(512 * MiB);
        WANT(first != MAP_FAILED);
        WANT(map(768 * MiB) == MAP_FAILED && errno == ENOMEM);
        SAME(d.memory(512 * MiB + 1), std::uint32_t{abi::err_no_memory});
        step(t);
        ::munmap(first, 256 * MiB);
        step(t);
        WANT(map(768 * MiB) != MAP_FAILED);
        WANT(map(4096) == MAP_FAILED);
        step(t);
        return 0;
      },
      [](hold::Hold& h, Tenant&, int at) {
        ::usleep(110'000);  // a mapping just let through counts as made
        h.reconcile();
        SAME(h.managed(0), at == 0 ? 512 * MiB : at == 1 ? 256 * MiB : 1 * GiB);
      });
}

void exports() {
  run(
      [](Tenant& t) {
        Device d;
        d.start();
        std::uint32_t memory = 0, copy = 0x5e000000;
        SAME(d.memory(256 * MiB, &memory), 0U);
        abi::Dup dup{d.client, d.device, copy, d.client, memory, 0, 0};
        SAME(::ioctl(d.fd, abi::request(abi::esc_dup_object, sizeof dup), &dup), 0);
        SAME(dup.status, 0U);
        step(t);
        SAME(d.free(memory), 0U);
        step(t);
        abi::ExportObjects out{};
        out.fd = ::open((twin_dir / "root/dev/nvidiactl").c_str(), O_RDWR | O_CLOEXEC);
        out.count = 1;
        out.max_objects = 1;
        out.objects[0] = copy;
        SAME(d.control(d.client, abi::cmd_export_objects_to_fd, &out, sizeof out), 0U);
        SAME(d.free(copy), 0U);
        step(t);
        return 0;
      },
      [](hold::Hold& h, Tenant&, int) { SAME(h.used(0), 256 * MiB); });
}

// ---- exported memory that outlives its maker: a descriptor keeps it, and is in nobody's bytes

std::uint32_t export_to(const Device& d, std::uint32_t memory, int fd) {
  abi::ExportObjects out{};
  out.fd = fd;
  out.count = out.max_objects = 1;
  out.objects[0] = memory;
  return d.control(d.client, abi::cmd_export_objects_to_fd, &out, sizeof out);
}
std::uint32_t import_from(const Device& d, int fd, std::uint32_t& memory) {
  twin::rm::ImportObjects in{};
  in.fd = fd;
  in.parent = Device::device;
  in.count = 1;
  const auto status = d.control(d.client, abi::cmd_import_objects_from_fd, &in, sizeof in);
  memory = in.objects[0];
  return status;
}

// A child makes 512 MiB, exports them, sends the descriptor away and ends. What the driver told it.
std::uint32_t orphan_made(int to) {
  const int child = ::fork();
  if (child == 0) {
    Device d;
    d.start();
    std::uint32_t memory = 0;
    if (const auto status = d.memory(512 * MiB, &memory); status != 0) ::_exit(static_cast<int>(status));
    const int file = ::open((twin_dir / "root/dev/nvidiactl").c_str(), O_RDWR | O_CLOEXEC);
    SAME(export_to(d, memory, file), 0U);
    SAME(seccomp::send_fd(to, file), 0);
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  WANT(WIFEXITED(status));
  return static_cast<std::uint32_t>(WEXITSTATUS(status));
}

struct Pair {
  int ends[2] = {-1, -1};
  Pair() { WANT(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0); }
  ~Pair() {
    ::close(ends[0]);
    ::close(ends[1]);
  }
};

void orphans() {
  run(
      [](Tenant& t) {
        Device beside;  // a driver file to which nothing was exported holds no orphan
        beside.start();
        Pair way;
        int kept[2] = {-1, -1};
        for (int& one : kept) {
          SAME(orphan_made(way.ends[1]), 0U);
          one = seccomp::recv_fd(way.ends[0]);
          WANT(one >= 0);
        }
        SAME(orphan_made(way.ends[1]), std::uint32_t{abi::err_no_memory});
        step(t);  // 0: 1 GiB kept by descriptors alone
        std::uint32_t memory = 0;
        SAME(import_from(beside, kept[0], memory), 0U);
        step(t);  // 1: imported, and not charged twice
        SAME(beside.free(memory), 0U);
        ::close(kept[0]);
        SAME(beside.memory(2 * MiB), std::uint32_t{abi::err_no_memory});  // the other is open still
        step(t);  // 2
        ::close(kept[1]);
        SAME(beside.memory(1 * GiB, &memory), 0U);
        step(t);  // 3
        return 0;
      },
      [](hold::Hold& h, Tenant&, int at) {
        h.reconcile();
        SAME(h.used(0), 1 * GiB);
        SAME(truth(), at == 1 ? 512 * MiB : at == 3 ? 1 * GiB : 0);
        SAME(h.refused(), at < 2 ? 1U : 2U);
      });
}

// Places for a descriptor that no list of open files shows, or only another process's.
void orphans_hidden() {
  run(
      [](Tenant& t) {
        Device d;
        d.start();
        std::uint32_t memory = 0;
        const auto full = [&] { SAME(d.memory(1 * GiB), std::uint32_t{abi::err_no_memory}); };
        const auto all_back = [&](const char* where) {
          if (d.memory(1 * GiB, &memory) != 0) fail(std::string("not to be had again: ") + where);
          SAME(d.free(memory), 0U);
        };
        {  // in a socket
          Pair way;
          SAME(orphan_made(way.ends[1]), 0U);
          full();
        }
        all_back("a socket");
        {  // in a connection that nobody accepted
          sockaddr_un name{};
          name.sun_family = AF_UNIX;
          socklen_t size = sizeof name.sun_family;
          const int listener = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
          WANT(::bind(listener, reinterpret_cast<sockaddr*>(&name), size) == 0 && ::listen(listener, 1) == 0);
          size = sizeof name;
          WANT(::getsockname(listener, reinterpret_cast<sockaddr*>(&name), &size) == 0);
          const int peer = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
          WANT(::connect(peer, reinterpret_cast<sockaddr*>(&name), size) == 0);
          SAME(orphan_made(peer), 0U);
          ::close(peer);
          full();
          ::close(listener);
        }
        all_back("a listener");
        {  // in a process that never asks the driver for anything
          Pair way, leash;
          const int keeper = ::fork();
          if (keeper == 0) {
            ::close(d.fd);
            const int file = seccomp::recv_fd(way.ends[0]);
            WANT(file >= 0 && ::write(leash.ends[1], "x", 1) == 1);
            char byte = 0;
            static_cast<void>(::read(leash.ends[1], &byte, 1));
            ::_exit(0);
          }
          SAME(orphan_made(way.ends[1]), 0U);
          char byte = 0;
          WANT(::read(leash.ends[0], &byte, 1) == 1);
          full();
          WANT(::write(leash.ends[0], "x", 1) == 1);
          ::waitpid(keeper, nullptr, 0);
        }
        all_back("another process");
        {  // in a thread with descriptors of its own
          Pair way;
          std::atomic<bool> done{false}, ready{false};
          std::thread hidden([&] {
            WANT(::unshare(CLONE_FILES) == 0);
            WANT(seccomp::recv_fd(way.ends[0]) >= 0);
            ready = true;
            while (!done) ::usleep(1000);
          });
          SAME(orphan_made(way.ends[1]), 0U);
          while (!ready) ::usleep(1000);
          full();
          done = true;
          hidden.join();
        }
        all_back("a thread");
        step(t);
        return 0;
      },
      [](hold::Hold& h, Tenant&, int) { SAME(h.used(0), 0U); });
}

// An arbiter that died knows of them still; one that was away sees what was closed meanwhile.
void orphans_meanwhile() {
  Tenant tenant([](Tenant& t) {
    Pair way;
    SAME(orphan_made(way.ends[1]), 0U);
    const int kept = seccomp::recv_fd(way.ends[0]);
    step(t);
    step(t);
    ::close(kept);
    step(t);
    return 0;
  });
  open_twin();
  {
    auto hold = tenant.hold();
    WANT(serve(*hold, tenant));
  }
  tenant.tell();
  tenant.await();
  SAME(tenant.hold()->used(0), 512 * MiB);
  tenant.tell();
  tenant.await();
  auto hold = tenant.hold();
  SAME(hold->used(0), 0U);
  tenant.tell();
  serve(*hold, tenant, false);
  SAME(tenant.reap(), 0);
}

void ways_around() {
  run(
      [](Tenant& t) {
        Device d;
        d.start();
        abi::MemoryParams params{};
        params.size = 2 * GiB;
        abi::Alloc call{};
        call.root = d.client;
        call.parent = d.device;
        call.cls = abi::class_device_memory;
        call.params = reinterpret_cast<std::uint64_t>(&params);
        // Any letter, as the driver reads none.
        for (const unsigned long request : {0xc030002bUL, 0x0030582bUL, 0xc030462bUL}) {
          call.handle = d.next++;
          call.status = 0;
          const int code = ::ioctl(d.fd, request, &call);
          WANT(code != 0 || call.status == abi::err_no_memory);
        }
        abi::AllocOld old{};
        old.root = d.client;
        old.parent = d.device;
        old.handle = d.next++;
        old.cls = abi::class_device_memory;
        old.params = reinterpret_cast<std::uint64_t>(&params);
        SAME(::ioctl(d.fd, abi::request(abi::esc_alloc, sizeof old), &old), 0);
        SAME(old.status, std::uint32_t{abi::err_no_memory});
        params.size = 2 * MiB;
        SAME(::ioctl(d.fd, abi::request(abi::esc_alloc, sizeof old), &old), 0);
        SAME(old.status, 0U);
        struct {
          std::uint32_t number, size;
          std::uint64_t at;
        } indirect{0x2b, 48, reinterpret_cast<std::uint64_t>(&call)};
        WANT(::ioctl(d.fd, abi::request(0xd3, 16), &indirect) == -1 && errno == EINVAL);
        std::uint32_t legacy[14] = {d.client, d.device, 0x77, 0x40};
        SAME(::ioctl(d.fd, abi::request(0x27, 56), legacy), 0);
        SAME(legacy[10], std::uint32_t{abi::err_not_supported});
        std::uint32_t heap[46] = {d.client};
        SAME(::ioctl(d.fd, abi::request(0x4a, 184), heap), 0);
        SAME(heap[5], std::uint32_t{abi::err_not_supported});
        // A handle that is refused takes nothing out of the books.
        std::uint32_t taken = d.next - 1;
        SAME(d.make(d.client, d.device, taken, abi::class_subdevice),
             std::uint32_t{abi::err_insert_duplicate_name});
        // Addresses that are none.
        WANT(::ioctl(d.fd, abi::request(abi::esc_alloc, sizeof call), reinterpret_cast<void*>(8)) == -1 &&
             errno == EFAULT);
        call.params = 8;
        WANT(::ioctl(d.fd, abi::request(abi::esc_alloc, sizeof call), &call) == -1 && errno == EFAULT);
        step(t);
        return 0;
      },
      [](hold::Hold& h, Tenant&, int) {
        equal(h, 2 * MiB);
        SAME(h.escapes(), 3U);
      });
}

// ---- arbiters that die

// A program that notices a wrong answer: its exit code is 0 when every call did what it must.
int careful(Tenant& t) {
  Device d;
  d.start();
  std::map<std::uint32_t, std::uint64_t> mine;
  std::mt19937 random(7);
  std::uint64_t held = 0;
  for (int i = 0; i < 24; ++i) {
    const std::uint64_t bytes = (1 + random() % 160) * 2 * MiB;
    std::uint32_t handle = 0;
    if (random() % 4 != 0 || mine.empty()) {
      const auto status = d.memory(bytes, &handle, random() % 8 == 0 ? 0 : ~0U);
      SAME(status, held + bytes > 1 * GiB ? std::uint32_t{abi::err_no_memory} : 0U);
      if (status == 0) {
        mine[handle] = bytes;
        held += bytes;
      }
    } else {
      const auto at = mine.begin();
      SAME(d.free(at->first), 0U);
      held -= at->second;
      mine.erase(at);
    }
    WANT(held <= 1 * GiB);
  }
  abi::GroupParams params{};
  params.engine = abi::engine_compute;
  std::uint32_t group = 0x5e000100, channel = 0x5e000101;
  SAME(d.make(d.client, d.device, group, abi::class_channel_group, &params), 0U);
  SAME(d.make(d.client, group, channel, 0xc86f), 0U);
  const int uvm = ::open((twin_dir / "root/dev/nvidia-uvm").c_str(), O_RDWR | O_CLOEXEC);
  const std::uint64_t more = (1 * GiB - held) / 2 / 4096 * 4096;
  if (more != 0) WANT(::mmap(nullptr, more, PROT_READ, MAP_SHARED, uvm, 0) != MAP_FAILED);
  const std::uint64_t numbers[2] = {held, more};
  WANT(::write(t.to, numbers, sizeof numbers) == sizeof numbers);
  t.await();
  return 0;
}

// An arbiter in a process of its own. With `stops`, it is killed at that system call stop (entries and exits
// count); true: it was.
bool arbiter(const Tenant& tenant, long stops, long* counted = nullptr) {
  const int pid = ::fork();
  if (pid == 0) {
    if (stops > 0) {
      ::ptrace(PTRACE_TRACEME, 0, 0, 0);
      ::raise(SIGSTOP);
    }
    auto hold = tenant.hold();
    for (;;) {
      pollfd fds[3] = {
          {hold->listener(), POLLIN, 0}, {hold->processes_fd(), POLLIN, 0}, {tenant.from, POLLIN, 0}};
      ::poll(fds, 3, -1);
      if (!hold->pump().ok()) ::_exit(9);
      if (hold->used(0) > 1 * GiB) ::_exit(8);
      if ((fds[2].revents & POLLIN) != 0) ::_exit(0);
      if ((fds[2].revents & POLLHUP) != 0) ::_exit(9);
    }
  }
  int status = 0;
  long seen = 0;
  if (stops > 0) {
    ::waitpid(pid, &status, 0);
    ::ptrace(PTRACE_SETOPTIONS, pid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL);
    while (!WIFEXITED(status) && !WIFSIGNALED(status)) {
      if (++seen > stops) {
        ::kill(pid, SIGKILL);
        ::waitpid(pid, &status, 0);
        return true;
      }
      ::ptrace(PTRACE_SYSCALL, pid, 0, 0);
      ::waitpid(pid, &status, __WALL);
    }
  } else {
    ::waitpid(pid, &status, 0);
  }
  if (counted != nullptr) *counted = seen;
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) fail("an arbiter ended with " + std::to_string(status));
  return false;
}

void settle(Tenant& tenant, const std::string& where) {
  std::uint64_t numbers[2] = {};
  if (::read(tenant.from, numbers, sizeof numbers) != sizeof numbers)
    fail(where + ": the program did not get through");
  auto hold = tenant.hold();
  if (hold->used(0) != numbers[0] + numbers[1] || truth() != numbers[0])
    fail(where + ": used " + std::to_string(hold->used(0) / MiB) + " driver " +
         std::to_string(truth() / MiB) + " program " + std::to_string(numbers[0] / MiB) + " managed " +
         std::to_string(numbers[1] / MiB));
  if (hold->groups().size() != 1 || hold->groups()[0].channels.size() != 1)
    fail(where + ": the group is lost");
  tenant.tell();
  serve(*hold, tenant, false);
  if (tenant.reap() != 0) fail(where + ": the program failed");
  if (hold->used(0) != 0) fail(where + ": something is left over");
}

// Killed at each stop from `first` on, every `stride`-th.
void kill_each(long first, long stride) {
  open_twin();
  long kills = 0, at = first;
  for (;; at += stride) {
    Tenant tenant(careful);
    const bool killed = arbiter(tenant, at);
    if (killed) {
      ++kills;
      arbiter(tenant, 0);
    }
    settle(tenant, "killed at stop " + std::to_string(at));
    if (!killed) break;
  }
  std::printf("%ld kills", kills);
}

// One after the other is killed, until the program is through.
void kill_storm(long rounds) {
  open_twin();
  std::mt19937 random(static_cast<unsigned>(rounds));
  long kills = 0;
  for (long round = 0; round < rounds; ++round) {
    Tenant tenant(careful);
    for (int i = 0; arbiter(tenant, i > 400 ? 1'000'000 : static_cast<long>(60 + random() % 400)); ++i)
      ++kills;
    settle(tenant, "storm " + std::to_string(round));
  }
  std::printf("%ld kills", kills);
}

void orphan() {  // with no arbiter left at all the kernel refuses, and what was given stays within the cap
  Tenant tenant([](Tenant& t) {
    Device d;
    d.start();
    SAME(d.memory(512 * MiB), 0U);
    step(t);
    WANT(d.memory(2 * MiB) == 0x10000U + ENOSYS);
    return 0;
  });
  open_twin();
  {
    auto hold = tenant.hold();
    WANT(serve(*hold, tenant));
  }
  ::close(tenant.listener);
  tenant.listener = -1;
  tenant.tell();
  SAME(tenant.reap(), 0);
}

// ---- what it costs

void bench(long pairs) {
  const auto measure = [pairs] {
    Device d;
    d.start();
    std::uint32_t handle = 0;
    std::vector<double> took;
    for (long i = 0; i < pairs; ++i) {
      const auto before = monotonic_ns();
      WANT(d.memory(2 * MiB, &handle) == 0);
      WANT(d.free(handle) == 0);
      took.push_back(static_cast<double>(monotonic_ns() - before) / 1000);
    }
    std::sort(took.begin(), took.end());
    const double pair = took[took.size() / 2];
    took.clear();
    std::uint32_t wrong = 0;
    for (long i = 0; i < pairs; ++i) {
      const auto before = monotonic_ns();
      WANT(d.control(d.subdevice, abi::cmd_get_pid_info, &wrong, sizeof wrong) != 0);
      took.push_back(static_cast<double>(monotonic_ns() - before) / 1000);
    }
    std::sort(took.begin(), took.end());
    return std::pair{pair, took[took.size() / 2]};
  };
  const auto free_pair = measure();
  auto* shared = static_cast<std::pair<double, double>*>(
      ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  run([&](Tenant&) {
    *shared = measure();
    return 0;
  });
  std::printf(
      "alloc+free %.1f us unheld, %.1f held: +%.1f us, %.2f times; another control %.1f us, %.1f held",
      free_pair.first, shared->first, shared->first - free_pair.first, shared->first / free_pair.first,
      free_pair.second, shared->second);
}

// Any program, on whatever driver there is: hold_test run MIB PROGRAM...
int run_program(std::uint64_t cap, char** argv) {
  Tenant tenant(
      [argv](Tenant&) {
        ::execvp(argv[0], argv);
        return 127;
      },
      cap);
  auto mapped = hold::map_inflight(tenant.inflight);
  WANT(mapped.ok());
  auto made = hold::Hold::make(UniqueFd(::dup(tenant.listener)), *tenant.page, {.inflight = *mapped});
  if (!made.ok()) fail(made.error().message());
  hold::Hold& hold = **made;
  std::uint64_t peak = 0, managed = 0, pumps = 0, busy_ns = 0;
  std::size_t groups = 0;
  for (;;) {
    pollfd fds[2] = {{hold.listener(), POLLIN, 0}, {hold.processes_fd(), POLLIN, 0}};
    ::poll(fds, 2, 1000);
    const auto before = monotonic_ns();
    const auto pumped = hold.pump();
    busy_ns += monotonic_ns() - before;
    ++pumps;
    peak = std::max(peak, hold.used(0));
    managed = std::max(managed, hold.managed(0));
    groups = std::max(groups, hold.groups().size());
    if (!pumped.ok()) break;
  }
  std::fprintf(stderr,
               "held: peak %lu MiB, managed %lu MiB, left %lu MiB, refused %lu, escapes %lu, self set %lu, "
               "groups %zu; %lu pumps of %.1f us\n",
               peak / MiB, managed / MiB, hold.used(0) / MiB, hold.refused(), hold.escapes(), hold.self_set(),
               groups, pumps, static_cast<double>(busy_ns) / 1000 / static_cast<double>(pumps));
  return tenant.reap();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  const std::string scenario = argv[1];
  if (scenario == "run" && argc > 3)
    return run_program(static_cast<std::uint64_t>(std::atoll(argv[2])) * MiB, argv + 3);
  const char* root = std::getenv("BULKHEAD_ROOT");
  if (root == nullptr) {
    std::string pattern = "/dev/shm/bulkhead-hold-XXXXXX";
    WANT(::mkdtemp(pattern.data()) != nullptr);
    twin_dir = pattern;
    make_twin();
    ::setenv("BULKHEAD_ROOT", (twin_dir / "root").c_str(), 1);
    ::setenv("LD_PRELOAD", std::getenv("TEST_PRELOAD"), 1);
    const int pid = ::fork();
    if (pid == 0) {
      ::execv("/proc/self/exe", argv);
      ::_exit(127);
    }
    int status = 0;
    ::waitpid(pid, &status, 0);
    fs::remove_all(twin_dir);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
  }
  twin_dir = fs::path(root).parent_path();
  const long number = argc > 2 ? std::atol(argv[2]) : 1;
  const std::map<std::string, std::function<void()>> scenarios = {
      {"cap", cap},
      {"sizes", sizes},
      {"processes", processes},
      {"closed", closed},
      {"inherited", inherited},
      {"inherited-meanwhile", inherited_meanwhile},
      {"threads", threads},
      {"groups", groups},
      {"signals", signals},
      {"unshared", unshared},
      {"sight", sight},
      {"managed", managed},
      {"exports", exports},
      {"orphans", orphans},
      {"orphans-hidden", orphans_hidden},
      {"orphans-meanwhile", orphans_meanwhile},
      {"ways-around", ways_around},
      {"orphan", orphan},
      {"kill-each", [&] { kill_each(argc > 3 ? std::atol(argv[3]) : 1, number); }},
      {"kill-storm", [&] { kill_storm(number); }},
      {"bench", [&] { bench(number); }}};
  const auto found = scenarios.find(scenario);
  if (found == scenarios.end()) return 2;
  found->second();
  std::fflush(nullptr);
  return 0;
}
