/* Does what a GPU does not forgive, in a process of its own each time, so that the driver tells of it:
 *   cuda_fault KIND [--gpu N] [--times N] [--at-once N]
 * KIND: address (a store far outside: Xid 31), illegal (a trap instruction: Xid 13 or none), misaligned (Xid
 * 13), killed (SIGKILL in a kernel that never ends: Xid 43 or 45), steady (launches and checks until
 * SIGTERM). A line of JSON for each: pid and what the driver answered. At once: that many processes beside
 * each other (not of those that are killed). */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "twin/cuda/cuda_api.h"

static const char ptx[] =
    ".version 7.0\n.target sm_80\n.address_size 64\n"
    ".visible .entry address() { .reg .b64 %p; .reg .b32 %v; mov.u64 %p, 0x7e0000000000; mov.u32 %v, 1;\n"
    "  st.global.u32 [%p], %v; ret; }\n"
    ".visible .entry illegal() { trap; }\n"
    ".visible .entry misaligned(.param .b64 at) { .reg .b64 %p; .reg .b32 %v; ld.param.u64 %p, [at];\n"
    "  add.s64 %p, %p, 1; mov.u32 %v, 1; st.global.u32 [%p], %v; ret; }\n"
    ".visible .entry killed(.param .b64 at) { .reg .b64 %p; .reg .b32 %v; .reg .pred %q; ld.param.u64 %p, "
    "[at];\n"
    "again: ld.volatile.global.u32 %v, [%p]; setp.ne.u32 %q, %v, 7; @%q bra again; ret; }\n"
    ".visible .entry steady(.param .b64 at) { .reg .b64 %p; .reg .b32 %v; ld.param.u64 %p, [at];\n"
    "  ld.global.u32 %v, [%p]; add.u32 %v, %v, 1; st.global.u32 [%p], %v; ret; }\n";

static volatile sig_atomic_t stopped;
static void stop(int signal_number) {
  (void)signal_number;
  stopped = 1;
}

static CUresult begin(const char* kind, int gpu, CUfunction* kernel, CUdeviceptr* memory) {
  CUdevice device = 0;
  CUcontext context = NULL;
  CUmodule module = NULL;
  CUresult code = cuInit(0);
  if (code == CUDA_SUCCESS) code = cuDeviceGet(&device, gpu);
  if (code == CUDA_SUCCESS) code = cuCtxCreate_v2(&context, 0, device);
  if (code == CUDA_SUCCESS) code = cuModuleLoadData(&module, ptx);
  if (code == CUDA_SUCCESS) code = cuModuleGetFunction(kernel, module, kind);
  if (code == CUDA_SUCCESS) code = cuMemAlloc_v2(memory, 4096);
  const unsigned zero[1024] = {0};
  if (code == CUDA_SUCCESS) code = cuMemcpyHtoD_v2(*memory, zero, sizeof zero);
  return code;
}

static int fault(const char* kind, int gpu, int ready) {
  CUfunction kernel = NULL;
  CUdeviceptr memory = 0;
  CUresult code = begin(kind, gpu, &kernel, &memory);
  void* arguments[] = {&memory};
  if (code == CUDA_SUCCESS) code = cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, NULL, arguments, NULL);
  if (ready >= 0 && write(ready, "r", 1) != 1) return 1;
  if (code == CUDA_SUCCESS) code = cuCtxSynchronize();
  const char* name = "?";
  cuGetErrorName(code, &name);
  // In one write: others of its kind write there, too.
  char line[256];
  const int length =
      snprintf(line, sizeof line, "{\"kind\": \"%s\", \"pid\": %d, \"code\": %d, \"name\": \"%s\"}\n", kind,
               getpid(), (int)code, name);
  return write(STDOUT_FILENO, line, (size_t)length) == length ? 0 : 1;
}

static int steady(int gpu) {
  CUfunction kernel = NULL;
  CUdeviceptr memory = 0;
  unsigned long long launches = 0;
  CUresult code = begin("steady", gpu, &kernel, &memory);
  void* arguments[] = {&memory};
  signal(SIGTERM, stop);
  while (code == CUDA_SUCCESS && !stopped) {
    code = cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, NULL, arguments, NULL);
    if (code == CUDA_SUCCESS) code = cuCtxSynchronize();
    if (code == CUDA_SUCCESS) ++launches;
  }
  unsigned sum = 0;
  if (code == CUDA_SUCCESS) code = cuMemcpyDtoH_v2(&sum, memory, sizeof sum);
  printf("{\"kind\": \"steady\", \"pid\": %d, \"code\": %d, \"launches\": %llu, \"right\": %s}\n", getpid(),
         (int)code, launches, code == CUDA_SUCCESS && sum == (unsigned)launches ? "true" : "false");
  return code == CUDA_SUCCESS ? 0 : 1;
}

int main(int argc, char** words) {
  int gpu = 0, times = 1, at_once = 1, under_way = 0;
  if (argc < 2) return fprintf(stderr, "cuda_fault: address, illegal, misaligned, killed or steady?\n"), 2;
  for (int i = 2; i + 1 < argc; i += 2) {
    if (strcmp(words[i], "--gpu") == 0)
      gpu = atoi(words[i + 1]);
    else if (strcmp(words[i], "--times") == 0)
      times = atoi(words[i + 1]);
    else if (strcmp(words[i], "--at-once") == 0)
      at_once = atoi(words[i + 1]);
    else
      return fprintf(stderr, "cuda_fault: %s?\n", words[i]), 2;
  }
  if (strcmp(words[1], "steady") == 0) return steady(gpu);
  const int kills = strcmp(words[1], "killed") == 0;
  if (kills) at_once = 1;
  for (int i = 0; i < times; ++i) {
    if (under_way == at_once && wait(NULL) > 0) --under_way;
    int ends[2];
    if (pipe(ends) != 0) return perror("pipe"), 1;
    const pid_t child = fork();
    if (child == 0) _exit(fault(words[1], gpu, kills ? ends[1] : -1));
    close(ends[1]);
    char byte = 0;
    if (kills && read(ends[0], &byte, 1) == 1) {
      usleep(100000);
      kill(child, SIGKILL);
      printf("{\"kind\": \"killed\", \"pid\": %d}\n", (int)child);
      fflush(stdout);
    }
    close(ends[0]);
    ++under_way;
  }
  while (wait(NULL) > 0) {
  }
  return 0;
}
