/* How long a tenant's driver calls take, window after window: cuLaunchKernel of an empty kernel, and cuMemAlloc with
 * its cuMemFree. A line of JSON for each window: when it began (CLOCK_MONOTONIC, s), and for both calls a histogram
 * whose bins are 1 % wide: [[bin, count], ...], bin b being 10 ns x 1.01^b.
 *   cuda_latency [--seconds S] [--window S] [--gpu N] */
#define _GNU_SOURCE
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "twin/cuda/cuda_api.h"

enum { bins = 2000, batch = 64 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void must(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  const char* name = "?";
  cuGetErrorName(result, &name);
  printf("{\"error\": \"%s\", \"code\": %d, \"call\": \"%s\"}\n", name, result, what);
  exit(1);
}
#define MUST(call) must(call, #call)

static void count(unsigned* histogram, double seconds) {
  const double bin = log(seconds / 1e-8) / log(1.01);
  ++histogram[bin < 0 ? 0 : bin >= bins ? bins - 1 : (int)bin];
}

static void print(const char* name, const unsigned* histogram) {
  const char* comma = "";
  printf(", \"%s\": [", name);
  for (int i = 0; i < bins; ++i)
    if (histogram[i] != 0) printf("%s[%d, %u]", comma, i, histogram[i]), comma = ", ";
  printf("]");
}

static const char ptx[] = ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry nothing() { ret; }\n";

int main(int argc, char** words) {
  double seconds = 1, window = 0.25;
  int gpu = 0;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (strcmp(words[i], "--seconds") == 0)
      seconds = atof(words[i + 1]);
    else if (strcmp(words[i], "--window") == 0)
      window = atof(words[i + 1]);
    else if (strcmp(words[i], "--gpu") == 0)
      gpu = atoi(words[i + 1]);
    else
      return fprintf(stderr, "cuda_latency: %s?\n", words[i]), 2;
  }
  CUdevice device = 0;
  CUcontext context = NULL;
  CUmodule module = NULL;
  CUfunction kernel = NULL;
  MUST(cuInit(0));
  MUST(cuDeviceGet(&device, gpu));
  MUST(cuCtxCreate_v2(&context, 0, device));
  MUST(cuModuleLoadData(&module, ptx));
  MUST(cuModuleGetFunction(&kernel, module, "nothing"));
  const double end = now() + seconds;
  for (double began = now(); began < end; began = now()) {
    unsigned launches[bins] = {0}, allocations[bins] = {0};
    double before = 0, after = 0;
    do {
      for (int i = 0; i < batch; ++i) {
        before = now();
        MUST(cuLaunchKernel(kernel, 1, 1, 1, 32, 1, 1, 0, NULL, NULL, NULL));
        after = now();
        count(launches, after - before);
      }
      MUST(cuCtxSynchronize());
      CUdeviceptr memory = 0;
      before = now();
      MUST(cuMemAlloc_v2(&memory, 4U << 20U));
      MUST(cuMemFree_v2(memory));
      after = now();
      count(allocations, after - before);
    } while (after < began + window);
    printf("{\"at\": %.6f", began);
    print("launch", launches);
    print("alloc", allocations);
    printf("}\n");
    fflush(stdout);
  }
  return 0;
}
