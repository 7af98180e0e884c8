// The CUDA C++ tenants of the GPU benchmark, and its small measurements. One program, so that one nvcc call builds it.
//
//   kernels worker KIND SLOT BOARD   a tenant driven by the board (board.py): small graph coop spin launch alloc idle
//   kernels costs                    launch rate, allocation and memory query costs, as JSON
//   kernels clients N | contexts N   N processes at once that initialise the driver, or make a context; seconds as JSON
//   kernels faults S | flood S | forks S   one tenant that misbehaves for S seconds
#include <cooperative_groups.h>
#include <cuda.h>
#include <cuda_runtime.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <string>
#include <thread>
#include <vector>

namespace {

// Dependent multiply-adds: time is proportional to the count and hardly draws power, so the clock stays where it is and the
// number done is a measure of the time the tenant had on the GPU. About 495 of them take a microsecond at 1.98 GHz.
__device__ float chain(float x, int n) {
#pragma unroll 16
  for (int i = 0; i < n; ++i) x = x * 1.0000001f + 0.5f;
  return x;
}
__global__ void busy(float* out, int n) {
  const float x = chain(static_cast<float>(threadIdx.x), n);
  if (x == 12345.0f) *out = x;
}
__global__ void together(float* out, int n, int phases) {
  auto grid = cooperative_groups::this_grid();
  float x = static_cast<float>(threadIdx.x);
  for (int i = 0; i < phases; ++i) {
    x = chain(x, n);
    grid.sync();
  }
  if (x == 12345.0f) *out = x;
}
__global__ void nothing() {}
__global__ void wild(int* nowhere) { *nowhere = 1; }

constexpr int per_us = 495;

double now() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "kernels: %s: %s\n", what, cudaGetErrorString(code));
  std::_Exit(3);
}

// One slot of the board; the layout is board.py's.
struct Slot {
  volatile std::uint64_t* word;
  volatile double* ring;
  Slot(const char* path, int index) {
    const int fd = open(path, O_RDWR);
    if (fd < 0) std::perror(path), std::_Exit(2);
    void* at = mmap(nullptr, 1u << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(index) << 20);
    if (at == MAP_FAILED) std::perror("mmap"), std::_Exit(2);
    word = static_cast<volatile std::uint64_t*>(at);
    ring = reinterpret_cast<volatile double*>(static_cast<char*>(at) + 64);
    word[4] = static_cast<std::uint64_t>(getpid());
  }
  std::uint64_t run() const { return word[0]; }
  void ready() { word[3] = 1; }
  void stamp(double t) {
    if (word[6] == 0) word[6] = static_cast<std::uint64_t>(t * 1e9);
  }
  void push(double t, double value) {
    const std::uint64_t n = word[2];
    ring[(n % 32768) * 2] = t;
    ring[(n % 32768) * 2 + 1] = value;
    word[2] = n + 1;
  }
};

int worker(const std::string& kind, Slot slot) {
  check(cudaSetDevice(0), "set device");
  check(cudaFree(nullptr), "context");
  slot.stamp(now());
  float* out = nullptr;
  check(cudaMalloc(&out, 256), "memory");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "properties");

  cudaGraphExec_t replay = nullptr;
  if (kind == "graph") {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < 16; ++i) busy<<<128, 128, 0, stream>>>(out, 25 * per_us);
    check(cudaStreamEndCapture(stream, &graph), "capture");
    check(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
  }
  int blocks = 0;
  if (kind == "coop") {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, together, 256, 0), "occupancy");
    blocks = std::min(blocks, 2) * device.multiProcessorCount;
  }
  // About two milliseconds of work each, so that an event is fine against a window and rare against a launch.
  const auto batch = [&]() -> int {
    if (kind == "small") {
      for (int i = 0; i < 300; ++i) busy<<<64, 128, 0, stream>>>(out, 6 * per_us);
      return 300;
    }
    if (kind == "launch") {
      for (int i = 0; i < 500; ++i) nothing<<<1, 32, 0, stream>>>();
      return 500;
    }
    if (kind == "graph") {
      for (int i = 0; i < 5; ++i) check(cudaGraphLaunch(replay, stream), "graph launch");
      return 5;
    }
    if (kind == "coop") {
      int n = 25 * per_us, phases = 8;
      void* arguments[] = {&out, &n, &phases};
      for (int i = 0; i < 10; ++i)
        check(cudaLaunchCooperativeKernel(together, dim3(static_cast<unsigned>(blocks)), dim3(256), arguments, 0, stream),
              "cooperative launch");
      return 10;
    }
    for (int i = 0; i < 4; ++i) busy<<<264, 128, 0, stream>>>(out, 500 * per_us);  // spin
    return 4;
  };

  std::deque<cudaEvent_t> flight;
  std::deque<int> sizes;
  std::vector<cudaEvent_t> spare;
  double done = 0;
  const auto finish_one = [&] {
    check(cudaEventSynchronize(flight.front()), "step");
    done += sizes.front();
    slot.push(now(), done);
    slot.word[1] = static_cast<std::uint64_t>(done);
    spare.push_back(flight.front());
    flight.pop_front();
    sizes.pop_front();
  };
  if (kind != "idle" && kind != "alloc") batch();
  check(cudaStreamSynchronize(stream), "warm-up");
  slot.ready();
  double pushed = 0;
  for (;;) {
    const auto run = slot.run();
    if (run == 2) break;
    if (run == 0 || kind == "idle") {
      while (!flight.empty()) finish_one();
      usleep(1000);
      continue;
    }
    if (kind == "alloc") {
      void* p = nullptr;
      check(cudaMalloc(&p, 1u << 20), "allocate");
      check(cudaFree(p), "free");
      // A call every 40 us would fill the ring within a second: an event a quarter of a millisecond, and one after each
      // call that took longer, so that the longest gap is right to that much.
      ++done;
      if (const double t = now(); t - pushed > 0.25e-3) slot.push(pushed = t, done);
      slot.word[1] = static_cast<std::uint64_t>(done);
      continue;
    }
    cudaEvent_t event = nullptr;
    if (spare.empty()) check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
    else event = spare.back(), spare.pop_back();
    sizes.push_back(batch());
    check(cudaEventRecord(event, stream), "record");
    flight.push_back(event);
    while (flight.size() > 4) finish_one();
  }
  return 0;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

int costs() {
  const double before = now();
  check(cudaFree(nullptr), "context");
  const double context_ms = (now() - before) * 1e3;
  std::vector<double> launch, alloc, query;
  for (int i = 0; i < 2000; ++i) nothing<<<1, 32>>>();
  check(cudaDeviceSynchronize(), "warm-up");
  for (int round = 0; round < 7; ++round) {
    double t = now();
    for (int i = 0; i < 20000; ++i) nothing<<<1, 32>>>();
    check(cudaDeviceSynchronize(), "launches");
    launch.push_back((now() - t) / 20000 * 1e9);
    t = now();
    for (int i = 0; i < 200; ++i) {
      void* p = nullptr;
      check(cudaMalloc(&p, 1u << 20), "allocate");
      check(cudaFree(p), "free");
    }
    alloc.push_back((now() - t) / 200 * 1e9);
    t = now();
    for (int i = 0; i < 200; ++i) {
      std::size_t available = 0, total = 0;
      check(cudaMemGetInfo(&available, &total), "memory query");
    }
    query.push_back((now() - t) / 200 * 1e9);
  }
  std::printf("{\"context_ms\": %.1f, \"launch_ns\": %.1f, \"alloc_free_ns\": %.1f, \"memory_query_ns\": %.1f}\n", context_ms,
              median(launch), median(alloc), median(query));
  return 0;
}

// N processes start at once. They are this program executed anew, as a server's workers would be; each writes one byte when it is
// up and stays until all are, so that they are all there together.
int many(const char* self, const char* mode, int count) {
  int up[2] = {}, stay[2] = {};
  if (pipe(up) != 0 || pipe(stay) != 0) return 2;
  const double before = now();
  for (int i = 0; i < count; ++i) {
    const pid_t pid = fork();
    if (pid == 0) {
      dup2(up[1], 3 + 100);
      dup2(stay[0], 3 + 101);
      for (const int fd : {up[0], up[1], stay[0], stay[1]}) close(fd);  // else nobody would see the end of the pipes
      execl(self, self, "one", mode, static_cast<char*>(nullptr));
      _exit(127);
    }
    if (pid < 0) std::perror("fork");
  }
  close(up[1]);
  int good = 0, bad = 0;
  char byte = 0;
  while (good + bad < count && read(up[0], &byte, 1) == 1) ++(byte == 'y' ? good : bad);
  const double took = now() - before;
  close(stay[0]);
  close(stay[1]);
  while (wait(nullptr) > 0) {}
  std::printf("{\"processes\": %d, \"up\": %d, \"failed\": %d, \"seconds\": %.3f}\n", count, good, count - good, took);
  return good == count ? 0 : 1;
}

int one(const std::string& mode) {
  bool good = cuInit(0) == CUDA_SUCCESS;
  if (good && mode == "contexts") good = cudaFree(nullptr) == cudaSuccess;
  const char answer = good ? 'y' : 'n';
  if (write(3 + 100, &answer, 1) != 1) return 2;
  close(3 + 100);
  char byte = 0;
  (void)!read(3 + 101, &byte, 1);  // end of file: all are up
  return good ? 0 : 1;
}

int again_and_again(const char* self, const char* what, double seconds) {
  const double end = now() + seconds;
  int rounds = 0;
  while (now() < end) {
    const pid_t pid = fork();
    if (pid == 0) {
      execl(self, self, what, static_cast<char*>(nullptr));
      _exit(127);
    }
    if (pid > 0) waitpid(pid, nullptr, 0);
    ++rounds;
  }
  std::printf("{\"rounds\": %d}\n", rounds);
  return 0;
}

int fault() {
  check(cudaFree(nullptr), "context");
  wild<<<1, 1>>>(reinterpret_cast<int*>(0x10));
  const auto code = cudaDeviceSynchronize();
  return code == cudaErrorIllegalAddress ? 0 : 1;
}

int flood(double seconds) {
  check(cudaFree(nullptr), "context");
  std::vector<std::thread> threads;
  std::uint64_t total[8] = {};
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([&total, i, seconds] {
      cudaStream_t stream = nullptr;
      if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess) return;
      const double end = now() + seconds;
      while (now() < end)
        for (int k = 0; k < 200; ++k) nothing<<<1, 32, 0, stream>>>(), ++total[i];
      cudaStreamSynchronize(stream);
    });
  for (auto& thread : threads) thread.join();
  std::uint64_t sum = 0;
  for (const auto value : total) sum += value;
  std::printf("{\"launches\": %llu}\n", static_cast<unsigned long long>(sum));
  return cudaGetLastError() == cudaSuccess ? 0 : 3;
}

// Bounded: at most 64 alive, each initialises the driver and forks once more before it ends.
int forks(double seconds) {
  const double end = now() + seconds;
  int started = 0, alive = 0;
  while (now() < end) {
    while (alive < 64) {
      const pid_t pid = fork();
      if (pid == 0) {
        if (fork() == 0) _exit(0);
        cuInit(0);
        wait(nullptr);
        _exit(0);
      }
      if (pid < 0) break;
      ++alive, ++started;
    }
    if (wait(nullptr) > 0) --alive;
  }
  while (wait(nullptr) > 0) {}
  std::printf("{\"forks\": %d}\n", started * 2);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "worker" && argc == 5) return worker(argv[2], Slot(argv[4], std::atoi(argv[3])));
  if (mode == "costs") return costs();
  if ((mode == "clients" || mode == "contexts") && argc == 3) return many("/proc/self/exe", argv[1], std::atoi(argv[2]));
  if (mode == "one" && argc == 3) return one(argv[2]);
  if (mode == "faults" && argc == 3) return again_and_again("/proc/self/exe", "fault", std::atof(argv[2]));
  if (mode == "fault") return fault();
  if (mode == "flood" && argc == 3) return flood(std::atof(argv[2]));
  if (mode == "forks" && argc == 3) return forks(std::atof(argv[2]));
  std::fprintf(stderr, "kernels: see the head of kernels.cu\n");
  return 2;
}
