// Adversarial suite of the memory cap: every way to device memory that the driver's API has, each tried to the cap and on to one and a
// half times it. Run as one tenant under a cap, on an otherwise idle GPU, while somebody outside reads NVML.
//
//   leak CAP_MIB [PATH...]    each path in a process of its own; a line "BEGIN path seconds" and one "END path seconds {json}" each
//   leak --one PATH CAP_MIB   one of them, here
//   leak --list
//
// What a path reports: MiB it got, whether it met a refusal and which, and a note. Verdicts are for the one outside.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <cuda.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MIB (1ull << 20)
static unsigned long long cap, got;  // bytes
static CUresult refusal;
static char note[200];
static CUdevice device;
static CUcontext context;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// Stays a moment at the top, so that a sampler outside sees it.
static void linger(void) { usleep(30000); }

static int up(void) {
  CUresult code = cuInit(0);
  if (!code) code = cuDeviceGet(&device, 0);
  if (!code) code = cuDevicePrimaryCtxRetain(&context, device);
  if (!code) code = cuCtxSetCurrent(context);
  if (code) refusal = code, snprintf(note, sizeof note, "no context");
  return code == CUDA_SUCCESS;
}
static unsigned long long goal(void) { return cap + cap / 2; }
static int took(CUresult code, unsigned long long bytes) {  // 0: refused, or far enough beyond the cap
  if (code) {
    refusal = code;
    return 0;
  }
  got += bytes;
  return got < goal();
}

static const char* tiny =
    ".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry k(.param .u64 p){ ret; }\n";
static CUresult launch_tiny(void) {
  CUmodule module;
  CUfunction function;
  CUdeviceptr p = 0;
  void* arguments[] = {&p};
  CUresult code = cuModuleLoadData(&module, tiny);
  if (!code) code = cuModuleGetFunction(&function, module, "k");
  if (!code) code = cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, 0, arguments, 0);
  if (!code) code = cuCtxSynchronize();
  return code;
}

// ---- the paths
static void plain(void) {  // to the last MiB: the usable part of the cap is read here
  CUdeviceptr p;
  unsigned long long sizes[] = {64 * MIB, 8 * MIB, 2 * MIB, MIB};
  for (int i = 0; i < 4; ++i) {
    refusal = 0;
    while (took(cuMemAlloc(&p, sizes[i]), sizes[i])) {}
    if (got >= goal()) return;
  }
}
static void pitch(void) {
  CUdeviceptr p;
  size_t row;
  while (took(cuMemAllocPitch(&p, &row, 65536, 1024, 16), 64 * MIB)) {}
}
static void small_pieces(void) {  // below the driver's suballocation size
  CUdeviceptr p;
  while (took(cuMemAlloc(&p, 100000), 100000)) {}
}
static void pool_default(void) {
  CUdeviceptr p;
  CUstream stream;
  if (cuStreamCreate(&stream, 1)) return;
  while (took(cuMemAllocAsync(&p, 64 * MIB, stream), 64 * MIB)) {}
  cuStreamSynchronize(stream);
}
static void pools_own(void) {
  CUmemPoolProps properties;
  CUstream stream;
  if (cuStreamCreate(&stream, 1)) return;
  memset(&properties, 0, sizeof properties);
  properties.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  for (;;) {
    CUmemoryPool pool;
    cuuint64_t keep = ~0ull;
    CUdeviceptr p;
    if ((refusal = cuMemPoolCreate(&pool, &properties))) return;
    cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &keep);
    if (!took(cuMemAllocFromPoolAsync(&p, 128 * MIB, pool, stream), 128 * MIB)) return;
    cuMemFreeAsync(p, stream);  // kept by the pool
    cuStreamSynchronize(stream);
  }
}
static CUmemAllocationProp shareable(void) {
  CUmemAllocationProp properties;
  memset(&properties, 0, sizeof properties);
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return properties;
}
static CUresult map(CUmemGenericAllocationHandle handle, size_t bytes) {
  CUdeviceptr at;
  CUmemAccessDesc access;
  CUresult code = cuMemAddressReserve(&at, bytes, 0, 0, 0);
  if (!code) code = cuMemMap(at, bytes, 0, handle, 0);
  memset(&access, 0, sizeof access);
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  if (!code) code = cuMemSetAccess(at, bytes, &access, 1);
  return code;
}
static void vmm_unmapped(void) {
  CUmemAllocationProp properties = shareable();
  CUmemGenericAllocationHandle handle;
  while (took(cuMemCreate(&handle, 64 * MIB, &properties, 0), 64 * MIB)) {}
}
static void vmm_mapped(void) {
  CUmemAllocationProp properties = shareable();
  CUmemGenericAllocationHandle handle;
  for (;;) {
    CUresult code = cuMemCreate(&handle, 64 * MIB, &properties, 0);
    if (!code) code = map(handle, 64 * MIB);
    if (!code) cuMemRelease(handle);  // kept by the mapping
    if (!took(code, 64 * MIB)) return;
  }
}
static void vmm_exported(void) {  // released, but kept by a descriptor
  CUmemAllocationProp properties = shareable();
  for (;;) {
    CUmemGenericAllocationHandle handle;
    int fd = -1;
    CUresult code = cuMemCreate(&handle, 64 * MIB, &properties, 0);
    if (!code) code = cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    if (!code) cuMemRelease(handle);
    if (!took(code, 64 * MIB)) return;
  }
}
static void vmm_imported_twice(void) {  // exported, imported, the first handle and the descriptor given up
  CUmemAllocationProp properties = shareable();
  for (;;) {
    CUmemGenericAllocationHandle handle, other;
    int fd = -1;
    CUresult code = cuMemCreate(&handle, 64 * MIB, &properties, 0);
    if (!code) code = cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    if (!code) code = cuMemImportFromShareableHandle(&other, (void*)(long)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (!code) cuMemRelease(handle), close(fd);
    if (!took(code, 64 * MIB)) return;
  }
}
// Does a program that only ever holds 64 MiB, thousands of times over, still find its cap where it was?
static void vmm_churn(void) {
  CUmemAllocationProp properties = shareable();
  CUdeviceptr p;
  int rounds = 0;
  for (; rounds < 100; ++rounds) {
    CUmemGenericAllocationHandle handle, other;
    int fd = -1;
    CUresult code = cuMemCreate(&handle, 64 * MIB, &properties, 0);
    if (!code) code = cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    if (!code) code = cuMemImportFromShareableHandle(&other, (void*)(long)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (code) {
      refusal = code;
      break;
    }
    close(fd);
    cuMemRelease(handle);
    cuMemRelease(other);
  }
  snprintf(note, sizeof note, "%d rounds of export, import, close, release", rounds);
  while (took(cuMemAlloc(&p, 64 * MIB), 64 * MIB)) {}
}
static void arrays(void) {
  CUDA_ARRAY_DESCRIPTOR flat = {4096, 4096, CU_AD_FORMAT_FLOAT, 1};
  CUDA_ARRAY3D_DESCRIPTOR deep = {256, 256, 256, CU_AD_FORMAT_FLOAT, 1, 0};
  CUarray array;
  while (took(cuArrayCreate(&array, &flat), 64 * MIB) && took(cuArray3DCreate(&array, &deep), 64 * MIB)) {}
}
static void mipmaps(void) {
  CUDA_ARRAY3D_DESCRIPTOR shape = {4096, 4096, 0, CU_AD_FORMAT_FLOAT, 1, 0};
  CUmipmappedArray array;
  while (took(cuMipmappedArrayCreate(&array, &shape, 8), 85 * MIB)) {}
}
// Never more than one and a half times the cap in all: too much managed memory can hang a GPU.
static void managed(void) {
  CUdeviceptr p;
  for (;;) {
    CUresult code = cuMemAllocManaged(&p, 256 * MIB, CU_MEM_ATTACH_GLOBAL);
    if (!code) code = cuMemsetD8(p, 1, 256 * MIB);  // touched on the GPU, so that it is there
    if (!took(code, 256 * MIB)) return;
  }
}
static void graphs(void) {
  CUstream stream;
  if (cuStreamCreate(&stream, 1)) return;
  for (;;) {
    CUgraph graph;
    CUgraphExec replay;
    CUgraphNode node;
    CUDA_MEM_ALLOC_NODE_PARAMS wanted;
    memset(&wanted, 0, sizeof wanted);
    wanted.poolProps.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    wanted.poolProps.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    wanted.poolProps.location.id = device;
    wanted.bytesize = 128 * MIB;
    CUresult code = cuGraphCreate(&graph, 0);
    if (!code) code = cuGraphAddMemAllocNode(&node, graph, 0, 0, &wanted);  // and never freed in the graph
    if (!code) code = cuGraphInstantiateWithFlags(&replay, graph, 0);
    if (!code) code = cuGraphLaunch(replay, stream);
    if (!code) code = cuStreamSynchronize(stream);
    if (!took(code, 128 * MIB)) return;
  }
}
static CUresult another_context(CUcontext* made) {
#if CUDA_VERSION >= 13000
  return cuCtxCreate(made, NULL, 0, device);
#else
  return cuCtxCreate(made, 0, device);
#endif
}
static void contexts(void) {  // bytes are NVML's to tell
  CUcontext made;
  int count = 0;
  while (count < 24 && !(refusal = another_context(&made))) ++count;
  snprintf(note, sizeof note, "%d more contexts", count);
}
static void streams(void) {
  CUstream stream;
  int count = 0;
  while (count < 2000 && !(refusal = cuStreamCreate(&stream, 1))) ++count;
  snprintf(note, sizeof note, "%d streams", count);
}
static void limit_grows(CUlimit limit, size_t start, const char* what) {
  size_t value = start;
  for (; value <= goal() * 2; value *= 2) {
    refusal = cuCtxSetLimit(limit, value);
    if (!refusal) refusal = launch_tiny();
    if (refusal) break;
  }
  snprintf(note, sizeof note, "%s up to %zu KiB", what, value >> 11);
}
static void stack_limit(void) {
  size_t value = 1024;
  for (; value <= 65536 && !refusal; value *= 2) {
    refusal = cuCtxSetLimit(CU_LIMIT_STACK_SIZE, value);
    if (!refusal) refusal = launch_tiny();
  }
  snprintf(note, sizeof note, "stack of a thread up to %zu bytes", value / (refusal ? 4 : 2));
}
static void heap_limit(void) { limit_grows(CU_LIMIT_MALLOC_HEAP_SIZE, 64 * MIB, "device heap"); }
static void printf_limit(void) { limit_grows(CU_LIMIT_PRINTF_FIFO_SIZE, 64 * MIB, "printf buffer"); }
static void globals(void) {
  char ptx[400];
  for (int i = 0;; ++i) {
    CUmodule module;
    snprintf(ptx, sizeof ptx,
             ".version 7.0\n.target sm_70\n.address_size 64\n.visible .global .align 16 .b8 big%d[268435456];\n"
             ".visible .entry k(.param .u64 p){ ret; }\n",
             i);
    if (!took(cuModuleLoadData(&module, ptx), 256 * MIB)) return;
  }
}
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void* one_thread(void* unused) {
  (void)unused;
  cuCtxSetCurrent(context);
  for (int more = 1; more;) {
    CUdeviceptr p;
    const CUresult code = cuMemAlloc(&p, 16 * MIB);
    pthread_mutex_lock(&lock);
    more = took(code, 16 * MIB);
    pthread_mutex_unlock(&lock);
  }
  return NULL;
}
static void threads(void) {
  pthread_t all[32];
  for (int i = 0; i < 32; ++i) pthread_create(&all[i], NULL, one_thread, NULL);
  for (int i = 0; i < 32; ++i) pthread_join(all[i], NULL);
}
static void* churning_thread(void* seed) {
  unsigned state = (unsigned)(unsigned long)seed;
  CUdeviceptr held[64] = {0};
  cuCtxSetCurrent(context);
  for (int i = 0; i < 3000; ++i) {
    const int k = rand_r(&state) % 64;
    if (held[k]) cuMemFree(held[k]), held[k] = 0;
    else if (cuMemAlloc(&held[k], (1 + (unsigned)rand_r(&state) % 32) * MIB)) held[k] = 0;
  }
  for (int k = 0; k < 64; ++k)
    if (held[k]) cuMemFree(held[k]);
  return NULL;
}
static void churn(void) {  // after a storm of allocations and frees, refused ones too, all of the cap is there again
  pthread_t all[8];
  for (long i = 0; i < 8; ++i) pthread_create(&all[i], NULL, churning_thread, (void*)(i + 1));
  for (int i = 0; i < 8; ++i) pthread_join(all[i], NULL);
  snprintf(note, sizeof note, "after 24000 allocations and frees by 8 threads");
  plain();
}

// Paths with several processes start before this one has a context (a context does not survive a fork): `gate` lets go, `done` is
// the shared tally.
struct shared {
  volatile unsigned long long got;
  volatile int refusal, ready, fds;
  CUipcMemHandle ipc[64];
};
static struct shared* common;
static void wait_for(int count, double seconds) {
  for (const double end = now() + seconds; common->ready < count && now() < end;) usleep(1000);
}
static void children(void) {
  for (int i = 0; i < 4; ++i)
    if (fork() == 0) {
      if (up()) {
        CUdeviceptr p;
        while (took(cuMemAlloc(&p, 16 * MIB), 16 * MIB)) __sync_fetch_and_add(&common->got, 16 * MIB);
      }
      if (refusal) common->refusal = (int)refusal;
      __sync_fetch_and_add(&common->ready, 1);
      wait_for(4, 8);
      linger();
      _exit(0);
    }
  while (wait(NULL) > 0) {}
  got = common->got;
  refusal = (CUresult)common->refusal;
}
// Each exporter allocates 512 MiB, lets the keeper open it, and dies: does the keeper end up with more than the cap?
static void ipc(void) {
  const int rounds = (int)(goal() / (512 * MIB));
  const pid_t keeper = fork();
  if (keeper == 0) {
    int opened = 0;
    if (up())
      for (const double end = now() + 20; opened < rounds && now() < end;) {
        if (common->ready <= opened) {
          usleep(1000);
          continue;
        }
        CUdeviceptr p;
        const CUresult code = cuIpcOpenMemHandle(&p, common->ipc[opened], CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
        if (code) {
          common->refusal = (int)code;
          break;
        }
        cuMemsetD8(p, 1, 512 * MIB);
        ++opened;
        common->got += 512 * MIB;
      }
    common->fds = 1;  // no more wanted
    linger();
    _exit(0);
  }
  for (int i = 0; i < rounds && !common->fds; ++i) {
    const pid_t exporter = fork();
    if (exporter == 0) {
      CUdeviceptr p;
      if (!up()) _exit(1);
      const CUresult code = cuMemAlloc(&p, 512 * MIB);
      if (code || cuIpcGetMemHandle(&common->ipc[i], p)) {
        common->refusal = (int)code;
        common->fds = 1;
        _exit(1);
      }
      common->ready = i + 1;
      for (const double end = now() + 5; common->got < (unsigned long long)(i + 1) * 512 * MIB && !common->fds && now() < end;)
        usleep(1000);
      _exit(0);
    }
    waitpid(exporter, NULL, 0);
  }
  common->fds = 1;
  waitpid(keeper, NULL, 0);
  got = common->got;
  refusal = (CUresult)common->refusal;
}
static int send_fd(int socket, int fd) {
  char byte = 'f', control[CMSG_SPACE(sizeof(int))];
  struct iovec io = {&byte, 1};
  struct msghdr message;
  memset(&message, 0, sizeof message);
  memset(control, 0, sizeof control);
  message.msg_iov = &io;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  struct cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(header), &fd, sizeof fd);
  return sendmsg(socket, &message, 0) == 1;
}
static int receive_fd(int socket) {
  char byte, control[CMSG_SPACE(sizeof(int))];
  struct iovec io = {&byte, 1};
  struct msghdr message;
  memset(&message, 0, sizeof message);
  message.msg_iov = &io;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  if (recvmsg(socket, &message, 0) != 1) return -1;
  struct cmsghdr* header = CMSG_FIRSTHDR(&message);
  if (!header || header->cmsg_type != SCM_RIGHTS) return -1;
  int fd;
  memcpy(&fd, CMSG_DATA(header), sizeof fd);
  return fd;
}
// Each maker exports 512 MiB, hands the descriptor over and dies: the memory lives on, and is in nobody's NVML bytes until somebody
// imports it. Read on the GPU's total.
static void orphans(void) {
  const int rounds = (int)(goal() / (512 * MIB));
  int fds[64], count = 0;
  for (int i = 0; i < rounds && i < 64; ++i) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) return;
    const pid_t maker = fork();
    if (maker == 0) {
      close(pair[0]);
      if (!up()) _exit(1);
      CUmemAllocationProp properties = shareable();
      CUmemGenericAllocationHandle handle;
      int fd = -1;
      CUresult code = cuMemCreate(&handle, 512 * MIB, &properties, 0);
      if (!code) code = cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
      if (code) {
        common->refusal = (int)code;
        _exit(1);
      }
      _exit(send_fd(pair[1], fd) ? 0 : 1);
    }
    close(pair[1]);
    const int fd = receive_fd(pair[0]);
    close(pair[0]);
    waitpid(maker, NULL, 0);
    if (fd < 0) break;
    fds[count++] = fd;
    linger();
  }
  got = (unsigned long long)count * 512 * MIB;
  refusal = (CUresult)common->refusal;
  int mapped = 0;
  if (up())
    for (int i = 0; i < count; ++i) {
      CUmemGenericAllocationHandle handle;
      CUresult code = cuMemImportFromShareableHandle(&handle, (void*)(long)fds[i], CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
      if (!code) code = map(handle, 512 * MIB);
      if (code) {
        refusal = code;
        break;
      }
      ++mapped;
    }
  snprintf(note, sizeof note, "%d of 512 MiB kept by a descriptor alone, %d imported and mapped after", count, mapped);
}

static const struct {
  const char* name;
  void (*run)(void);
  int alone;  // makes its own processes: no context before
} paths[] = {
    {"cuMemAlloc", plain, 0},
    {"small pieces", small_pieces, 0},
    {"cuMemAllocPitch", pitch, 0},
    {"default pool", pool_default, 0},
    {"own pools", pools_own, 0},
    {"VMM, unmapped", vmm_unmapped, 0},
    {"VMM, mapped and released", vmm_mapped, 0},
    {"VMM, exported and released", vmm_exported, 0},
    {"VMM, imported again", vmm_imported_twice, 0},
    {"VMM churn", vmm_churn, 0},
    {"arrays", arrays, 0},
    {"mipmaps", mipmaps, 0},
    {"managed", managed, 0},
    {"graphs", graphs, 0},
    {"contexts", contexts, 0},
    {"streams", streams, 0},
    {"stack limit", stack_limit, 0},
    {"heap limit", heap_limit, 0},
    {"printf limit", printf_limit, 0},
    {"module globals", globals, 0},
    {"32 threads", threads, 0},
    {"4 children", children, 1},
    {"IPC, exporter dies", ipc, 1},
    {"orphaned descriptors", orphans, 1},
    {"churn, then all", churn, 0},
};
enum { count_of_paths = sizeof paths / sizeof paths[0] };

static int one(const char* name) {
  for (int i = 0; i < count_of_paths; ++i)
    if (!strcmp(paths[i].name, name)) {
      common = mmap(NULL, sizeof *common, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
      if (common == MAP_FAILED) return 2;
      if (paths[i].alone || up()) paths[i].run();
      linger();
      const char* word = "none";
      if (refusal && cuGetErrorName(refusal, &word)) word = "unknown";
      printf("{\"mib\": %llu, \"refusal\": \"%s\", \"note\": \"%s\"}\n", got >> 20, refusal ? word : "none", note);
      return 0;
    }
  fprintf(stderr, "leak: no path '%s'\n", name);
  return 2;
}

// A child and a time limit: a path that hangs or is killed is a finding about that path alone.
static void guarded(const char* name, const char* mib) {
  int pipes[2];
  if (pipe(pipes)) return;
  printf("BEGIN %s|%.4f\n", name, now());
  fflush(stdout);
  const pid_t pid = fork();
  if (pid == 0) {
    dup2(pipes[1], 1);
    close(pipes[0]);
    close(pipes[1]);
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    execl("/proc/self/exe", "leak", "--one", name, mib, (char*)NULL);
    _exit(127);
  }
  close(pipes[1]);
  char answer[600] = "";
  int status = 0, late = 0;
  for (const double end = now() + 30;;) {
    if (waitpid(pid, &status, WNOHANG) == pid) break;
    if (now() > end) {
      late = 1;
      kill(-pid, SIGKILL);
      waitpid(pid, &status, 0);
      break;
    }
    usleep(2000);
  }
  fcntl(pipes[0], F_SETFL, O_NONBLOCK);
  const ssize_t size = read(pipes[0], answer, sizeof answer - 1);
  answer[size > 0 ? size : 0] = 0;
  answer[strcspn(answer, "\n")] = 0;
  close(pipes[0]);
  if (!answer[0])
    snprintf(answer, sizeof answer, "{\"mib\": 0, \"refusal\": \"none\", \"note\": \"%s\", \"broken\": true}",
             late ? "no end in 30 s" : WIFSIGNALED(status) ? strsignal(WTERMSIG(status)) : "no answer");
  printf("END %s|%.4f|%s\n", name, now(), answer);
  fflush(stdout);
  usleep(100000);  // the driver gives memory back a moment after the process
}

int main(int argc, char** argv) {
  if (argc == 2 && !strcmp(argv[1], "--list")) {
    for (int i = 0; i < count_of_paths; ++i) puts(paths[i].name);
    return 0;
  }
  if (argc == 4 && !strcmp(argv[1], "--one")) {
    cap = strtoull(argv[3], NULL, 10) * MIB;
    return one(argv[2]);
  }
  if (argc < 2 || argv[1][0] == '-') {
    fprintf(stderr, "leak CAP_MIB [PATH...] | leak --one PATH CAP_MIB | leak --list\n");
    return 2;
  }
  if (argc > 2)
    for (int i = 2; i < argc; ++i) guarded(argv[i], argv[1]);
  else
    for (int i = 0; i < count_of_paths; ++i) guarded(paths[i].name, argv[1]);
  return 0;
}
