// What the guard adds on a CPU: to a launch through libcuda.so.1, to an allocation and a free at the choke
// point, and how long many processes take to get their slots. The driver and libcuda below it
// (driver_bench.cpp) do next to nothing, so that what is seen is the guard. It starts itself with and without
// the guard; both arms alternate.
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "abi/rm/rm.hpp"
#include "guard/wire/wire.hpp"

using namespace bulkhead;

namespace {

double now_ns() { return static_cast<double>(std::chrono::steady_clock::now().time_since_epoch().count()); }
double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

int page_file(guard::Page*& page) {
  const int fd = memfd_create("bench", MFD_ALLOW_SEALING);
  if (ftruncate(fd, sizeof(guard::Page)) != 0) return -1;
  fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
  void* at = mmap(nullptr, sizeof(guard::Page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  page = static_cast<guard::Page*>(at);
  page->magic = guard::wire_magic;
  page->version = guard::wire_version;
  for (auto& cap : page->cap) cap = guard::no_cap;
  page->cap[0] = 64ULL << 30;
  return fd;
}

struct Form {
  abi::Alloc alloc = {};
  abi::MemoryParams params = {};
};

void open_driver(std::uint32_t& client) {
  abi::Alloc form = {};
  form.cls = abi::class_client;
  ioctl(1000, abi::request(abi::esc_alloc, sizeof form), &form);
  client = form.handle;
  abi::DeviceParams params = {};
  form = {client, client, 2, abi::class_device, reinterpret_cast<std::uint64_t>(&params), 0, 0, 0, 0, 0};
  ioctl(1000, abi::request(abi::esc_alloc, sizeof form), &form);
}

void pair(std::uint32_t client, std::uint32_t handle) {
  Form f;
  f.params.size = 2 << 20;
  f.alloc = {client, 2, handle, abi::class_device_memory, reinterpret_cast<std::uint64_t>(&f.params), 0, 0,
             0,      0, 0};
  ioctl(1000, abi::request(abi::esc_alloc, sizeof f.alloc), &f.alloc);
  abi::Free release = {client, 2, handle, 0};
  ioctl(1000, abi::request(abi::esc_free, sizeof release), &release);
}

using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                       void**, void**);

// One arm: prints launch ns and allocation ns.
int arm(const char* library) {
  constexpr int launches = 20'000'000;
  constexpr int allocations = 300'000;
  void* cuda = dlopen(library, RTLD_NOW);
  const auto launch = cuda == nullptr ? nullptr : reinterpret_cast<Launch>(dlsym(cuda, "cuLaunchKernel"));
  if (launch == nullptr) return 1;
  for (int i = 0; i < 1000; ++i) launch(nullptr, 1, 1, 1, 32, 1, 1, 0, nullptr, nullptr, nullptr);
  double began = now_ns();
  for (int i = 0; i < launches; ++i) launch(nullptr, 1, 1, 1, 32, 1, 1, 0, nullptr, nullptr, nullptr);
  const double launch_ns = (now_ns() - began) / launches;
  std::uint32_t client = 0;
  open_driver(client);
  for (int i = 0; i < 1000; ++i) pair(client, 10);
  began = now_ns();
  for (int i = 0; i < allocations; ++i) pair(client, 10 + static_cast<std::uint32_t>(i) % 64);
  printf("%f %f\n", launch_ns, (now_ns() - began) / allocations);
  return 0;
}

std::string folder() {
  char path[4096] = {};
  if (readlink("/proc/self/exe", path, sizeof path - 1) <= 0) return {};
  return std::string(path).substr(0, std::string(path).rfind('/'));
}

std::pair<double, double> run_arm(const std::string& command) {
  double launch = 0;
  double allocation = 0;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr || fscanf(pipe, "%lf %lf", &launch, &allocation) != 2)
    fprintf(stderr, "failed: %s\n", command.c_str());
  if (pipe != nullptr) pclose(pipe);
  return {launch, allocation};
}

// The time from fork to the first byte charged, of `count` processes at once.
int storm(int count) {
  guard::Page* page = nullptr;
  const int fd = atoi(getenv(guard::wire_environment));
  page = static_cast<guard::Page*>(
      mmap(nullptr, sizeof(guard::Page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  int go[2];
  int done[2];
  if (pipe(go) != 0 || pipe(done) != 0) return 1;
  std::vector<pid_t> pids;
  for (int i = 0; i < count; ++i) {
    const pid_t pid = fork();
    if (pid == 0) {
      char c = 0;
      close(go[1]);
      (void)!read(go[0], &c, 1);
      std::uint32_t client = 0;
      open_driver(client);
      pair(client, 10);
      (void)!write(done[1], "x", 1);
      (void)!read(done[0], &c, 0);
      pause();
    }
    pids.push_back(pid);
  }
  const double began = now_ns();
  close(go[1]);
  for (int i = 0; i < count; ++i) {
    char c = 0;
    (void)!read(done[0], &c, 1);
  }
  const double all = now_ns() - began;
  std::uint32_t client = 0;
  open_driver(client);
  for (int i = 0; i < 1000; ++i) pair(client, 10);
  const double crowd = now_ns();
  for (int i = 0; i < 100'000; ++i) pair(client, 10);
  const double each = (now_ns() - crowd) / 100'000;
  for (const pid_t pid : pids) kill(pid, SIGKILL);
  for (const pid_t pid : pids) waitpid(pid, nullptr, 0);
  const double dead = now_ns();
  const auto released = guard::release_dead(
      *page, [](std::uint32_t pid, std::uint32_t) { return kill(static_cast<pid_t>(pid), 0) == 0; });
  printf("%f %f\n", all, each);
  fprintf(stderr,
          "%d processes at once, all with slot and first charge: %.1f ms; giving back %zu slots: %.2f ms\n",
          count, all / 1e6, released.slots, (now_ns() - dead) / 1e6);
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count == 3 && strcmp(words[1], "arm") == 0) return arm(words[2]);
  if (count == 3 && strcmp(words[1], "storm") == 0) return storm(atoi(words[2]));
  const std::string bin = folder();
  const std::string guard_path = bin + "/libbulkhead-guard.so";
  const std::string driver = bin + "/libbench_guard_driver.so";
  const std::string self = bin + "/bench_guard";
  guard::Page* page = nullptr;
  setenv(guard::wire_environment, std::to_string(page_file(page)).c_str(), 1);
  setenv("BULKHEAD_GUARD_CUDA", driver.c_str(), 1);
  std::vector<double> launch_with, launch_without, allocation_with, allocation_without;
  const auto alive = [](std::uint32_t pid, std::uint32_t) { return kill(static_cast<pid_t>(pid), 0) == 0; };
  for (int i = 0; i < 11; ++i) {
    const auto without = run_arm("LD_PRELOAD=" + driver + " " + self + " arm " + driver);
    const auto with = run_arm("LD_PRELOAD=" + guard_path + ":" + driver + " " + self + " arm libcuda.so.1");
    guard::release_dead(*page, alive);
    launch_without.push_back(without.first);
    launch_with.push_back(with.first);
    allocation_without.push_back(without.second);
    allocation_with.push_back(with.second);
  }
  const double launch = median(launch_with) - median(launch_without);
  const double allocation = median(allocation_with) - median(allocation_without);
  printf("launch: direct %.2f ns, through the guard %.2f ns: +%.2f ns (wanted: at most 5)\n",
         median(launch_without), median(launch_with), launch);
  printf("alloc + free: driver alone %.1f ns, guarded %.1f ns: +%.1f ns (wanted: at most 300)\n",
         median(allocation_without), median(allocation_with), allocation);
  const auto crowd = run_arm("LD_PRELOAD=" + guard_path + ":" + driver + " " + self + " storm 256");
  printf("alloc + free with 256 processes in the tenant: +%.1f ns\n",
         crowd.second - median(allocation_without));
  return launch <= 5 && allocation <= 300 && crowd.first < 1e9 ? 0 : 1;
}
