/* Takes device memory in every way the driver API has, one after the other, and prints a line of JSON for
 * each: how many bytes it got, what the call answered, and how many were free while it had them. cuda_alloc
 * [--bytes N] [--hold SECONDS] [--leak] [--until-refused] [--gpu N] [PATH...] PATH: malloc small pitch
 * managed host array mipmap async pool vmm export ipc graph stack context (default: all). */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "twin/cuda/cuda_api.h"

static size_t bytes = 64UL << 20;
static double hold_seconds;
static int leak;
static CUcontext context;

static void hold(void) {
  if (hold_seconds <= 0) return;
  const struct timespec span = {(time_t)hold_seconds,
                                (long)((hold_seconds - (double)(time_t)hold_seconds) * 1e9)};
  fflush(stdout);
  nanosleep(&span, NULL);
}

static void say(const char* path, CUresult result, size_t got) {
  size_t free_bytes = 0, total = 0;
  const CUresult asked = cuMemGetInfo_v2(&free_bytes, &total);
  const char* name = "?";
  cuGetErrorName(result, &name);
  printf(
      "{\"path\": \"%s\", \"result\": \"%s\", \"code\": %d, \"bytes\": %zu, \"free\": %zu, \"total\": "
      "%zu%s}\n",
      path, name, result, got, free_bytes, total, asked == CUDA_SUCCESS ? "" : ", \"no_info\": true");
  if (result == CUDA_SUCCESS && strcmp(path, "start") != 0) hold();
}

static void do_malloc(void) {
  CUdeviceptr p = 0;
  const CUresult result = cuMemAlloc_v2(&p, bytes);
  say("malloc", result, result == CUDA_SUCCESS ? bytes : 0);
  if (result == CUDA_SUCCESS && !leak) cuMemFree_v2(p);
}

static void do_small(void) { /* two halves of one 2 MiB granule */
  CUdeviceptr p = 0, q = 0;
  CUresult result = cuMemAlloc_v2(&p, 1UL << 20);
  if (result == CUDA_SUCCESS) result = cuMemAlloc_v2(&q, 1UL << 20);
  say("small", result, result == CUDA_SUCCESS ? 2UL << 20 : 0);
  if (!leak) {
    if (p != 0) cuMemFree_v2(p);
    if (q != 0) cuMemFree_v2(q);
  }
}

static void do_pitch(void) {
  CUdeviceptr p = 0;
  size_t pitch = 0;
  const size_t rows = bytes / 1024;
  const CUresult result = cuMemAllocPitch_v2(&p, &pitch, 1000, rows, 4);
  say("pitch", result, pitch * rows);
  if (result == CUDA_SUCCESS && !leak) cuMemFree_v2(p);
}

static void do_managed(void) {
  CUdeviceptr p = 0;
  CUresult result = cuMemAllocManaged(&p, bytes, 1);
  if (result == CUDA_SUCCESS) {
    volatile char* const text = (volatile char*)p; /* the host may use it */
    text[0] = 'a';
    text[bytes - 1] = 'z';
  }
  say("managed", result, result == CUDA_SUCCESS ? bytes : 0);
  if (result == CUDA_SUCCESS && !leak) cuMemFree_v2(p);
}

static void do_host(void) {
  void* p = NULL;
  const CUresult result = cuMemAllocHost_v2(&p, bytes);
  if (result == CUDA_SUCCESS) memset(p, 1, 4096);
  say("host", result, result == CUDA_SUCCESS ? bytes : 0);
  if (result == CUDA_SUCCESS && !leak) cuMemFreeHost(p);
}

static void do_array(void) {
  CUDA_ARRAY_DESCRIPTOR descriptor = {4096, bytes / 4096 / 4, CU_AD_FORMAT_FLOAT, 1};
  CUarray array = NULL;
  const CUresult result = cuArrayCreate_v2(&array, &descriptor);
  say("array", result, result == CUDA_SUCCESS ? descriptor.Width * descriptor.Height * 4 : 0);
  if (result == CUDA_SUCCESS && !leak) cuArrayDestroy(array);
}

static void do_mipmap(void) {
  CUDA_ARRAY3D_DESCRIPTOR descriptor = {4096, bytes / 4096 / 4, 0, CU_AD_FORMAT_FLOAT, 1, 0};
  CUmipmappedArray array = NULL;
  const CUresult result = cuMipmappedArrayCreate(&array, &descriptor, 3);
  say("mipmap", result, result == CUDA_SUCCESS ? descriptor.Width * descriptor.Height * 4 : 0);
  if (result == CUDA_SUCCESS && !leak) cuMipmappedArrayDestroy(array);
}

static void do_async(void) {
  CUstream stream = NULL;
  CUdeviceptr p = 0;
  cuStreamCreate(&stream, 1);
  CUresult result = cuMemAllocAsync(&p, bytes, stream);
  if (result == CUDA_SUCCESS) result = cuStreamSynchronize(stream);
  say("async", result, result == CUDA_SUCCESS ? bytes : 0);
  if (p != 0 && !leak) {
    cuMemFreeAsync(p, stream);
    cuStreamSynchronize(stream);
  }
  if (!leak) cuStreamDestroy_v2(stream);
}

static void do_pool(int gpu) {
  CUmemPoolProps properties = {1, 0, {1, gpu}, NULL, 0, 0, {0}};
  CUmemoryPool pool = NULL;
  CUstream stream = NULL;
  CUdeviceptr p = 0;
  unsigned long long keep = ~0ULL, reserved = 0;
  cuStreamCreate(&stream, 1);
  CUresult result = cuMemPoolCreate(&pool, &properties);
  if (result == CUDA_SUCCESS) {
    cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &keep);
    result = cuMemAllocFromPoolAsync(&p, bytes, pool, stream);
    if (p != 0 && !leak) cuMemFreeAsync(p, stream); /* which the pool keeps */
    cuStreamSynchronize(stream);
    cuMemPoolGetAttribute(pool, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, &reserved);
  }
  say("pool", result, (size_t)reserved);
  if (pool != NULL && !leak) cuMemPoolDestroy(pool);
  if (!leak) cuStreamDestroy_v2(stream);
}

static CUresult make_vmm(int gpu, CUmemGenericAllocationHandle* handle) {
  CUmemAllocationProp properties;
  memset(&properties, 0, sizeof properties);
  properties.type = 1;
  properties.requestedHandleTypes = 1;
  properties.location.type = 1;
  properties.location.id = gpu;
  return cuMemCreate(handle, (bytes + (2UL << 20) - 1) / (2UL << 20) * (2UL << 20), &properties, 0);
}

static void do_vmm(int gpu) {
  const size_t whole = (bytes + (2UL << 20) - 1) / (2UL << 20) * (2UL << 20);
  CUmemGenericAllocationHandle handle = 0;
  CUdeviceptr p = 0;
  CUmemAccessDesc access = {{1, gpu}, 3};
  CUresult result = make_vmm(gpu, &handle);
  if (result != CUDA_SUCCESS) {
    say("vmm", result, 0);
    return;
  }
  result = cuMemAddressReserve(&p, whole, 0, 0, 0);
  if (result == CUDA_SUCCESS) result = cuMemMap(p, whole, 0, handle, 0);
  if (result == CUDA_SUCCESS) result = cuMemSetAccess(p, whole, &access, 1);
  cuMemRelease(handle); /* the mapping keeps it */
  say("vmm", result, result == CUDA_SUCCESS ? whole : 0);
  if (!leak) {
    cuMemUnmap(p, whole);
    cuMemAddressFree(p, whole);
  }
}

static void do_export(int gpu) { /* alive through an open file alone, then through the handle made from it */
  CUmemGenericAllocationHandle handle = 0, imported = 0;
  int file = -1;
  CUresult result = make_vmm(gpu, &handle);
  if (result == CUDA_SUCCESS) {
    result = cuMemExportToShareableHandle(&file, handle, 1, 0);
    cuMemRelease(handle);
  }
  if (result == CUDA_SUCCESS) result = cuMemImportFromShareableHandle(&imported, (void*)(long)file, 1);
  if (file >= 0) close(file);
  say("export", result, result == CUDA_SUCCESS ? bytes : 0);
  if (imported != 0 && !leak) cuMemRelease(imported);
}

static void do_ipc(
    int gpu) { /* a child of our own opens it: made by fork and exec, as a fork alone may not use CUDA */
  CUdeviceptr p = 0;
  CUipcMemHandle handle;
  CUresult result = cuMemAlloc_v2(&p, bytes);
  if (result == CUDA_SUCCESS) result = cuMemsetD8_v2(p, 0x5a, 64);
  if (result == CUDA_SUCCESS) result = cuIpcGetMemHandle(&handle, p);
  if (result == CUDA_SUCCESS) {
    char text[2 * sizeof handle + 1], number[16];
    for (size_t i = 0; i < sizeof handle; ++i)
      sprintf(text + 2 * i, "%02x", (unsigned char)handle.reserved[i]);
    snprintf(number, sizeof number, "%d", gpu);
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
      execl("/proc/self/exe", "cuda_alloc", "--gpu", number, "--open-ipc", text, (char*)NULL);
      _exit(127);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) result = CUDA_ERROR_UNKNOWN;
  }
  say("ipc", result, result == CUDA_SUCCESS ? bytes : 0);
  if (p != 0 && !leak) cuMemFree_v2(p);
}

static int open_ipc(const char* text) {
  CUipcMemHandle handle;
  CUdeviceptr p = 0;
  for (size_t i = 0; i < sizeof handle; ++i) {
    unsigned value = 0;
    if (sscanf(text + 2 * i, "%2x", &value) != 1) return 2;
    handle.reserved[i] = (char)value;
  }
  const CUresult result = cuIpcOpenMemHandle_v2(&p, handle, 1);
  say("opened", result, 0);
  if (result != CUDA_SUCCESS) return 1;
  return cuIpcCloseMemHandle(p) == CUDA_SUCCESS ? 0 : 1;
}

static void do_graph(int gpu) {
  CUDA_MEM_ALLOC_NODE_PARAMS params;
  CUgraph graph = NULL;
  CUgraphExec exec = NULL;
  CUgraphNode allocate = NULL, release = NULL;
  CUstream stream = NULL;
  memset(&params, 0, sizeof params);
  params.poolProps.allocType = 1;
  params.poolProps.location.type = 1;
  params.poolProps.location.id = gpu;
  params.bytesize = bytes;
  cuStreamCreate(&stream, 1);
  cuGraphCreate(&graph, 0);
  CUresult result = cuGraphAddMemAllocNode(&allocate, graph, NULL, 0, &params);
  if (result == CUDA_SUCCESS) result = cuGraphAddMemFreeNode(&release, graph, &allocate, 1, params.dptr);
  if (result == CUDA_SUCCESS) result = cuGraphInstantiateWithFlags(&exec, graph, 0);
  if (result == CUDA_SUCCESS) result = cuGraphLaunch(exec, stream);
  if (result == CUDA_SUCCESS) result = cuStreamSynchronize(stream);
  say("graph", result, result == CUDA_SUCCESS ? bytes : 0);
  if (exec != NULL) cuGraphExecDestroy(exec);
  if (graph != NULL) cuGraphDestroy(graph);
  if (!leak) {
    cuDeviceGraphMemTrim(gpu);
    cuStreamDestroy_v2(stream);
  }
}

static void do_stack(void) { /* local memory for every thread there can be, at the next launch */
  CUmodule module = NULL;
  CUfunction function = NULL;
  static const char image[] = "an image";
  cuModuleLoadData(&module, image);
  cuModuleGetFunction(&function, module, "spin_us_10");
  CUresult result = cuCtxSetLimit(CU_LIMIT_STACK_SIZE, 16384);
  if (result == CUDA_SUCCESS) result = cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, NULL, NULL, NULL);
  if (result == CUDA_SUCCESS) result = cuCtxSynchronize();
  say("stack", result, 0);
}

static void do_context(int gpu) {
  CUcontext second = NULL;
  const CUresult result = cuCtxCreate_v4(&second, NULL, 0, gpu);
  say("context", result, 0);
  if (result == CUDA_SUCCESS && !leak) cuCtxDestroy_v2(second);
  cuCtxSetCurrent(context);
}

static void run(const char* path, int gpu) {
  if (strcmp(path, "malloc") == 0)
    do_malloc();
  else if (strcmp(path, "small") == 0)
    do_small();
  else if (strcmp(path, "pitch") == 0)
    do_pitch();
  else if (strcmp(path, "managed") == 0)
    do_managed();
  else if (strcmp(path, "host") == 0)
    do_host();
  else if (strcmp(path, "array") == 0)
    do_array();
  else if (strcmp(path, "mipmap") == 0)
    do_mipmap();
  else if (strcmp(path, "async") == 0)
    do_async();
  else if (strcmp(path, "pool") == 0)
    do_pool(gpu);
  else if (strcmp(path, "vmm") == 0)
    do_vmm(gpu);
  else if (strcmp(path, "export") == 0)
    do_export(gpu);
  else if (strcmp(path, "ipc") == 0)
    do_ipc(gpu);
  else if (strcmp(path, "graph") == 0)
    do_graph(gpu);
  else if (strcmp(path, "stack") == 0)
    do_stack();
  else if (strcmp(path, "context") == 0)
    do_context(gpu);
  else {
    fprintf(stderr, "cuda_alloc: no way to allocate is called %s\n", path);
    exit(2);
  }
}

int main(int count, char** words) {
  static const char* all[] = {"malloc", "small", "pitch",  "managed", "host",  "array",   "mipmap", "async",
                              "pool",   "vmm",   "export", "ipc",     "graph", "context", "stack"};
  const char* wanted[64];
  const char* ipc = NULL;
  int paths = 0, gpu = 0, until_refused = 0;
  for (int i = 1; i < count; ++i) {
    if (strcmp(words[i], "--bytes") == 0 && i + 1 < count)
      bytes = strtoull(words[++i], NULL, 0);
    else if (strcmp(words[i], "--hold") == 0 && i + 1 < count)
      hold_seconds = atof(words[++i]);
    else if (strcmp(words[i], "--gpu") == 0 && i + 1 < count)
      gpu = atoi(words[++i]);
    else if (strcmp(words[i], "--open-ipc") == 0 && i + 1 < count)
      ipc = words[++i];
    else if (strcmp(words[i], "--leak") == 0)
      leak = 1;
    else if (strcmp(words[i], "--until-refused") == 0)
      until_refused = 1;
    else if (paths < 64)
      wanted[paths++] = words[i];
  }
  const CUresult started = cuInit(0);
  CUresult result = started != CUDA_SUCCESS ? started : cuDevicePrimaryCtxRetain(&context, gpu);
  if (result == CUDA_SUCCESS) result = cuCtxSetCurrent(context);
  if (result != CUDA_SUCCESS) {
    const char* name = "?";
    cuGetErrorName(result, &name);
    printf("{\"path\": \"start\", \"result\": \"%s\", \"code\": %d, \"bytes\": 0}\n", name, result);
    return 1;
  }
  if (ipc != NULL) return open_ipc(ipc);
  say("start", CUDA_SUCCESS, 0);
  if (until_refused) { /* malloc again and again: how much is to be had */
    size_t got = 0;
    CUdeviceptr p = 0;
    while ((result = cuMemAlloc_v2(&p, bytes)) == CUDA_SUCCESS) got += bytes;
    say("refused", result, got);
    hold();
    return result == CUDA_ERROR_OUT_OF_MEMORY ? 0 : 1;
  }
  if (paths == 0) {
    for (size_t i = 0; i < sizeof all / sizeof all[0]; ++i) run(all[i], gpu);
  }
  for (int i = 0; i < paths; ++i) run(wanted[i], gpu);
  say("end", CUDA_SUCCESS, 0);
  cuDevicePrimaryCtxRelease_v2(gpu);
  return 0;
}
