/* Keeps a GPU busy and says what it got, as a line of JSON.
 *   cuda_spin --us D [--seconds S] [--gpu N] [--depth N]       kernels of D us back to back: kernels/s, GPU
 * us completed cuda_spin --us D --rate R [--seconds S] [--gpu N]          R requests/s, each of one kernel,
 * sent when they are due whether or not the last is done: latency percentiles
 *   --graph N   launches graphs of N kernels;  --fault  ends with an illegal address;  --bytes N  holds that
 * much memory */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "twin/cuda/cuda_api.h"

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void sleep_until(double when) {
  const double left = when - now();
  if (left <= 0) return;
  const struct timespec span = {(time_t)left, (long)((left - (double)(time_t)left) * 1e9)};
  nanosleep(&span, NULL);
}

static void must(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  const char* name = "?";
  cuGetErrorName(result, &name);
  printf("{\"error\": \"%s\", \"code\": %d, \"call\": \"%s\"}\n", name, result, what);
  exit(1);
}
#define MUST(call) must(call, #call)

static int by_size(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return x < y ? -1 : x > y;
}

static CUfunction kernel;
static CUgraphExec graph_exec;
static CUstream stream;

static CUresult launch(void) {
  return graph_exec != NULL ? cuGraphLaunch(graph_exec, stream)
                            : cuLaunchKernel(kernel, 132, 1, 1, 256, 1, 1, 0, stream, NULL, NULL);
}

/* One kernel that lasts as long as its name says, at an H100's 1.98 GHz: a chain of multiply-adds, each
 * waiting for the one before, 72 cycles a round. A number of them rather than a time, so that what was done
 * stays the measure of what a program had of the GPU however often it was interrupted. The store that never
 * happens keeps them from being dropped. */
static const double rounds_a_us = 27.5;
static const char ptx[] =
    ".version 7.0\n.target sm_70\n.address_size 64\n"
    ".visible .entry %s() { .reg .b64 %%p; .reg .b32 %%i; .reg .f32 %%f, %%g; .reg .pred %%q;\n"
    "  mov.f32 %%f, 0f3F800000; mov.f32 %%g, 0f3F7FBE77; mov.u32 %%i, 0;\n"
    "again:\n"
#define FOUR                                                                                        \
  "  fma.rn.f32 %%f, %%f, %%g, %%g; fma.rn.f32 %%f, %%f, %%g, %%g; fma.rn.f32 %%f, %%f, %%g, %%g; " \
  "fma.rn.f32 %%f, %%f, %%g, %%g;\n"
    FOUR FOUR FOUR FOUR
    "  add.u32 %%i, %%i, 1; setp.lt.u32 %%q, %%i, %u;\n"
    "  @%%q bra again;\n"
    "  setp.eq.f32 %%q, %%f, 0f7F800000; mov.u64 %%p, 0x7e0000000000; @%%q st.global.f32 [%%p], %%f; ret; }\n"
    ".visible .entry fault() { .reg .b64 %%p; .reg .b32 %%v; mov.u64 %%p, 0x7e0000000000; mov.u32 %%v, 1;\n"
    "  st.global.u32 [%%p], %%v; ret; }\n";

int main(int count, char** words) {
  double us = 100, seconds = 1, rate = 0;
  int gpu = 0, depth = 64, fault = 0, nodes = 0;
  size_t bytes = 0;
  for (int i = 1; i < count; ++i) {
    if (strcmp(words[i], "--fault") == 0)
      fault = 1;
    else if (i + 1 == count)
      return fprintf(stderr, "cuda_spin: %s wants a value\n", words[i]), 2;
    else if (strcmp(words[i], "--us") == 0)
      us = atof(words[++i]);
    else if (strcmp(words[i], "--seconds") == 0)
      seconds = atof(words[++i]);
    else if (strcmp(words[i], "--rate") == 0)
      rate = atof(words[++i]);
    else if (strcmp(words[i], "--gpu") == 0)
      gpu = atoi(words[++i]);
    else if (strcmp(words[i], "--depth") == 0)
      depth = atoi(words[++i]);
    else if (strcmp(words[i], "--graph") == 0)
      nodes = atoi(words[++i]);
    else if (strcmp(words[i], "--bytes") == 0)
      bytes = strtoull(words[++i], NULL, 0);
    else
      return fprintf(stderr, "cuda_spin: what is %s\n", words[i]), 2;
  }
  CUcontext context = NULL;
  CUmodule module = NULL;
  CUdeviceptr memory = 0;
  char name[64], image[2048];
  snprintf(name, sizeof name, "spin_ns_%.0f", us * 1000);
  snprintf(image, sizeof image, ptx, name, (unsigned)(us * rounds_a_us) + 1);
  MUST(cuInit(0));
  MUST(cuDevicePrimaryCtxRetain(&context, gpu));
  MUST(cuCtxSetCurrent(context));
  MUST(cuModuleLoadData(&module, image));
  MUST(cuModuleGetFunction(&kernel, module, name));
  MUST(cuStreamCreate(&stream, 1));
  if (bytes != 0) MUST(cuMemAlloc_v2(&memory, bytes));
  if (nodes > 0) {
    CUgraph graph = NULL;
    MUST(cuStreamBeginCapture_v2(stream, 2));
    for (int i = 0; i < nodes; ++i) MUST(cuLaunchKernel(kernel, 132, 1, 1, 256, 1, 1, 0, stream, NULL, NULL));
    MUST(cuStreamEndCapture(stream, &graph));
    MUST(cuGraphInstantiateWithFlags(&graph_exec, graph, 0));
    us *= nodes;
  }
  if (fault) {
    CUfunction bad = NULL;
    MUST(cuModuleGetFunction(&bad, module, "fault"));
    MUST(cuLaunchKernel(bad, 1, 1, 1, 32, 1, 1, 0, stream, NULL, NULL));
    MUST(cuStreamSynchronize(stream));
  }

  const double start = now();
  if (rate <= 0) {
    CUevent marks[2];
    unsigned long long done = 0;
    int filled = 0;
    MUST(cuEventCreate(&marks[0], 2));
    MUST(cuEventCreate(&marks[1], 2));
    if (depth < 2) depth = 2;
    while (now() - start < seconds) { /* two halves of `depth` launches: while one runs the other is queued */
      const int half = filled & 1;
      if (filled >= 2) {
        MUST(cuEventSynchronize(marks[half]));
        done += (unsigned long long)(depth / 2);
      }
      for (int i = 0; i < depth / 2; ++i) MUST(launch());
      MUST(cuEventRecord(marks[half], stream));
      ++filled;
    }
    MUST(cuStreamSynchronize(stream));
    done += (unsigned long long)(depth / 2) * (unsigned long long)(filled < 2 ? filled : 2);
    const double took = now() - start;
    printf(
        "{\"us\": %.3f, \"seconds\": %.3f, \"kernels\": %llu, \"per_second\": %.2f, \"gpu_us\": %.0f, "
        "\"busy\": %.4f}\n",
        us, took, done, (double)done / took, (double)done * us, (double)done * us / 1e6 / took);
  } else {
    const size_t requests = (size_t)(rate * seconds);
    double* const latency = calloc(requests + 1, sizeof *latency);
    for (size_t i = 0; i < requests;
         ++i) { /* a request that comes late because the last one was slow counts from when it was due */
      const double due = start + (double)i / rate;
      sleep_until(due);
      MUST(launch());
      MUST(cuStreamSynchronize(stream));
      latency[i] = (now() - due) * 1e3;
    }
    qsort(latency, requests, sizeof *latency, by_size);
    const double took = now() - start;
    printf(
        "{\"us\": %.3f, \"seconds\": %.3f, \"requests\": %zu, \"p50_ms\": %.3f, \"p90_ms\": %.3f, "
        "\"p99_ms\": %.3f, \"max_ms\": %.3f}\n",
        us, took, requests, latency[requests / 2], latency[requests * 9 / 10], latency[requests * 99 / 100],
        requests != 0 ? latency[requests - 1] : 0);
    free(latency);
  }
  cuDevicePrimaryCtxRelease_v2(gpu);
  return 0;
}
