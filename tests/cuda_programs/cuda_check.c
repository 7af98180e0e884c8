/* What a program may rely on, one scenario a run: cuda_check NAME. Prints what was wrong; exit 1 if anything
 * was. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "twin/cuda/cuda_api.h"

static int wrong;
#define WANT(condition)                              \
  do {                                               \
    if (!(condition)) {                              \
      printf("line %d: %s\n", __LINE__, #condition); \
      ++wrong;                                       \
    }                                                \
  } while (0)
#define GIVES(code, call)                                                                       \
  do {                                                                                          \
    const CUresult answer_ = (call);                                                            \
    if (answer_ != (code)) {                                                                    \
      const char* name = "?";                                                                   \
      cuGetErrorName(answer_, &name);                                                           \
      printf("line %d: %s answered %d (%s), not %d\n", __LINE__, #call, answer_, name, (code)); \
      ++wrong;                                                                                  \
    }                                                                                           \
  } while (0)
#define MUST(call) GIVES(CUDA_SUCCESS, call)

static CUcontext context;
static CUmodule module;
static const size_t mib = 1UL << 20, gib = 1UL << 30;

static void start(void) {
  MUST(cuInit(0));
  MUST(cuDevicePrimaryCtxRetain(&context, 0));
  MUST(cuCtxSetCurrent(context));
  MUST(cuModuleLoadData(&module, "an image"));
}
static CUfunction function(const char* name) {
  CUfunction f = NULL;
  MUST(cuModuleGetFunction(&f, module, name));
  return f;
}
static CUresult launch(CUfunction f, CUstream stream) {
  return cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, stream, NULL, NULL);
}
static size_t free_now(void) {
  size_t left = 0, total = 0;
  MUST(cuMemGetInfo_v2(&left, &total));
  return left;
}

static void lookup(void) {
  static const struct {
    const char *asked, *symbol;
    int version;
    uint64_t flags;
  } rows[] = {
      {"cuMemAlloc", "cuMemAlloc_v2", 13000, 0},
      {"cuMemAlloc", "cuMemAlloc", 2000, 0},
      {"cuCtxCreate", "cuCtxCreate_v3", 12040, 0},
      {"cuCtxCreate", "cuCtxCreate_v4", 12050, 0},
      {"cuLaunchKernel", "cuLaunchKernel", 13000, 1},
      {"cuLaunchKernel", "cuLaunchKernel_ptsz", 13000, 2},
      {"cuMemcpyHtoD", "cuMemcpyHtoD_v2_ptds", 13000, 2},
      {"cuMemcpyHtoDAsync", "cuMemcpyHtoDAsync_v2_ptsz", 13000, 2},
      {"cuStreamGetCaptureInfo", "cuStreamGetCaptureInfo_v3", 13000, 0},
      {"cuGetProcAddress", "cuGetProcAddress_v2", 12000, 0},
      {"cuGetProcAddress", "cuGetProcAddress", 11030, 0},
      {"cuInit", "cuInit", 2000, 2},
  };
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  void* found = NULL;
  int status = -1;
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
    MUST(cuGetProcAddress_v2(rows[i].asked, &found, rows[i].version, rows[i].flags, &status));
    WANT(status == 0 && found != NULL);
    if (found != dlsym(library, rows[i].symbol)) {
      printf("%s for %d is not %s\n", rows[i].asked, rows[i].version, rows[i].symbol);
      ++wrong;
    }
  }
  GIVES(CUDA_ERROR_NOT_FOUND, cuGetProcAddress_v2("cuMakeTea", &found, 13000, 0, &status));
  WANT(status == 1 && found == NULL);
  GIVES(CUDA_ERROR_NOT_FOUND, cuGetProcAddress_v2("cuMemAllocAsync", &found, 11010, 0, &status));
  WANT(status == 2 && found == NULL);
  GIVES(CUDA_ERROR_INVALID_VALUE, cuGetProcAddress_v2(NULL, &found, 13000, 0, &status));
  const char* text = NULL;
  MUST(cuGetErrorName(CUDA_ERROR_OUT_OF_MEMORY, &text));
  WANT(strcmp(text, "CUDA_ERROR_OUT_OF_MEMORY") == 0);
  MUST(cuGetErrorString(CUDA_ERROR_OUT_OF_MEMORY, &text));
  WANT(strcmp(text, "out of memory") == 0);
  GIVES(CUDA_ERROR_INVALID_VALUE, cuGetErrorName(12345, &text));
}

static void devices(void) {
  int count = 0, value = 0;
  size_t total = 0, left = 0, all = 0;
  char name[100] = "", pci[20] = "";
  CUuuid uuid;
  CUdevice device = -1, again = -1;
  GIVES(CUDA_ERROR_NOT_INITIALIZED, cuDeviceGetCount(&count));
  start();
  MUST(cuDeviceGetCount(&count));
  for (int i = 0; i < count; ++i) {
    MUST(cuDeviceGet(&device, i));
    MUST(cuDeviceGetUuid_v2(&uuid, device));
    MUST(cuDeviceGetPCIBusId(pci, sizeof pci, device));
    MUST(cuDeviceGetByPCIBusId(&again, pci));
    WANT(again == device);
    printf("%s GPU-", pci);
    for (int b = 0; b < 16; ++b)
      printf("%s%02x", b == 4 || b == 6 || b == 8 || b == 10 ? "-" : "", (unsigned char)uuid.bytes[b]);
    printf("\n");
  }
  GIVES(CUDA_ERROR_INVALID_DEVICE, cuDeviceGet(&device, count));
  GIVES(CUDA_ERROR_INVALID_DEVICE, cuDeviceGet(&device, -1));
  MUST(cuDeviceGetName(name, sizeof name, 0));
  printf("%s\n", name);
  MUST(cuDeviceGetAttribute(&value, 16, 0));
  printf("%d multiprocessors\n", value);
  MUST(cuDeviceTotalMem_v2(&total, 0));
  MUST(cuMemGetInfo_v2(&left, &all));
  WANT(total == all && left < all);
  GIVES(CUDA_ERROR_INVALID_VALUE, cuDeviceGetAttribute(&value, 9999, 0));
}

static void contents(void) {
  start();
  CUdeviceptr a = 0, b = 0, managed = 0;
  unsigned char out[4096], back[4096];
  for (size_t i = 0; i < sizeof out; ++i) out[i] = (unsigned char)(i * 7 + 1);
  MUST(cuMemAlloc_v2(&a, 3 * mib));
  MUST(cuMemAlloc_v2(&b, 4096));
  memset(back, 0xee, sizeof back);
  MUST(cuMemcpyDtoH_v2(back, a, sizeof back));
  WANT(back[0] == 0 && back[4095] == 0);
  MUST(cuMemcpyHtoD_v2(a + 2 * mib, out, sizeof out));
  MUST(cuMemcpyDtoH_v2(back, a + 2 * mib, sizeof back));
  WANT(memcmp(out, back, sizeof out) == 0);
  MUST(cuMemsetD8_v2(b, 0x42, 4096));
  MUST(cuMemsetD32_v2(b + 8, 0x01020304, 2));
  MUST(cuMemcpyDtoH_v2(back, b, sizeof back));
  WANT(back[7] == 0x42 && back[8] == 4 && back[11] == 1 && back[12] == 4 && back[16] == 0x42);
  MUST(cuMemAllocManaged(&managed, mib, 1));
  ((volatile char*)managed)[5] = 'm';
  MUST(cuMemcpyDtoH_v2(back, managed, 16));
  WANT(back[5] == 'm');
  CUarray array = NULL;
  CUDA_ARRAY_DESCRIPTOR shape = {16, 16, CU_AD_FORMAT_UNSIGNED_INT8, 1};
  CUresult (*copy)(const CUDA_MEMCPY2D*) =
      (CUresult(*)(const CUDA_MEMCPY2D*))dlsym(RTLD_DEFAULT, "cuMemcpy2D_v2");
  MUST(cuArrayCreate_v2(&array, &shape));
  CUDA_MEMCPY2D part;
  memset(&part, 0, sizeof part);
  part.srcMemoryType = CU_MEMORYTYPE_HOST;
  part.srcHost = out;
  part.srcPitch = 64;
  part.dstMemoryType = CU_MEMORYTYPE_ARRAY;
  part.dstArray = array;
  part.WidthInBytes = 16;
  part.Height = 16;
  MUST(copy(&part));
  memset(back, 0, sizeof back);
  part.srcMemoryType = CU_MEMORYTYPE_ARRAY;
  part.srcArray = array;
  part.srcY = 3;
  part.dstMemoryType = CU_MEMORYTYPE_HOST;
  part.dstHost = back;
  part.dstPitch = 16;
  part.Height = 2;
  MUST(copy(&part));
  WANT(memcmp(back, out + 3 * 64, 16) == 0 && memcmp(back + 16, out + 4 * 64, 16) == 0);
  MUST(cuArrayDestroy(array));
  MUST(cuMemFree_v2(managed));
  MUST(cuMemFree_v2(a));
  GIVES(CUDA_ERROR_INVALID_VALUE, cuMemFree_v2(a));
  GIVES(CUDA_ERROR_INVALID_VALUE, cuMemFree_v2(b + 512));
  MUST(cuMemFree_v2(b));
  GIVES(CUDA_ERROR_INVALID_VALUE, cuMemAlloc_v2(&a, 0));
}

static atomic_int gate, order, seen_first, seen_second;
static void wait_at_gate(void* unused) {
  (void)unused;
  while (atomic_load(&gate) == 0) usleep(200);
  atomic_store(&seen_first, atomic_fetch_add(&order, 1) + 1);
}
static void second(void* unused) {
  (void)unused;
  atomic_store(&seen_second, atomic_fetch_add(&order, 1) + 1);
}

static void streams(void) {
  start();
  CUstream a = NULL, b = NULL;
  CUevent event = NULL, first = NULL, last = NULL;
  CUdeviceptr memory = 0;
  char buffer[16] = "before";
  MUST(cuStreamCreate(&a, 1));
  MUST(cuStreamCreate(&b, 1));
  MUST(cuEventCreate(&event, 0));
  MUST(cuMemAlloc_v2(&memory, 4096));
  MUST(cuMemcpyHtoD_v2(memory, "after", 6));
  MUST(cuEventQuery(event)); /* never recorded: done */
  MUST(launch(function("spin_us_100"), a));
  MUST(cuLaunchHostFunc(a, wait_at_gate, NULL));
  MUST(cuEventRecord(event, a));
  MUST(cuStreamWaitEvent(b, event, 0));
  MUST(cuMemcpyDtoHAsync_v2(buffer, memory, 6, b));
  MUST(cuLaunchHostFunc(b, second, NULL));
  GIVES(CUDA_ERROR_NOT_READY, cuStreamQuery(b));
  GIVES(CUDA_ERROR_NOT_READY, cuEventQuery(event));
  WANT(strcmp(buffer, "before") == 0);
  atomic_store(&gate, 1);
  MUST(cuStreamSynchronize(b));
  WANT(strcmp(buffer, "after") == 0);
  WANT(atomic_load(&seen_first) == 1 && atomic_load(&seen_second) == 2);
  MUST(cuStreamQuery(a));
  MUST(cuEventCreate(&first, 0));
  MUST(cuEventCreate(&last, 0));
  MUST(cuEventRecord(first, a));
  for (int i = 0; i < 3000; ++i) MUST(launch(function("spin_us_2"), a)); /* more than the channel holds */
  MUST(cuEventRecord(last, a));
  float ms = -1;
  MUST(cuEventSynchronize(last));
  MUST(cuEventElapsedTime(&ms, first, last));
  WANT(ms >= 6.0f);
  CUevent untimed = NULL;
  MUST(cuEventCreate(&untimed, 2));
  MUST(cuEventRecord(untimed, a));
  GIVES(CUDA_ERROR_INVALID_HANDLE, cuEventElapsedTime(&ms, first, untimed));
  uint64_t many = 7000;
  void* params[] = {&many};
  MUST(cuEventRecord(first, a));
  MUST(cuLaunchKernel(function("spin_us_param"), 1, 1, 1, 32, 1, 1, 0, a, params, NULL));
  MUST(cuEventRecord(last, a));
  MUST(cuStreamSynchronize(a));
  MUST(cuEventElapsedTime(&ms, first, last));
  WANT(ms >= 7.0f);
  GIVES(CUDA_ERROR_INVALID_VALUE, cuLaunchKernel(function("k"), 0, 1, 1, 1, 1, 1, 0, a, NULL, NULL));
  GIVES(CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE,
        cuLaunchCooperativeKernel(function("k"), 100000, 1, 1, 1024, 1, 1, 0, a, NULL));
  MUST(cuLaunchCooperativeKernel(function("k"), 132, 1, 1, 1024, 1, 1, 0, a, NULL));
  MUST(cuStreamDestroy_v2(a));
  GIVES(CUDA_ERROR_INVALID_HANDLE, cuStreamQuery(a));
}

static atomic_int called;
static void call(void* unused) {
  (void)unused;
  atomic_fetch_add(&called, 1);
}

static void graphs(void) {
  start();
  CUresult (*nodes_of)(CUgraph, CUgraphNode*, size_t*) =
      (CUresult(*)(CUgraph, CUgraphNode*, size_t*))dlsym(RTLD_DEFAULT, "cuGraphGetNodes");
  const size_t before = free_now();
  CUstream a = NULL, b = NULL;
  CUevent fork_point = NULL, join_point = NULL;
  CUgraph graph = NULL;
  CUgraphExec exec = NULL;
  CUdeviceptr memory = 0;
  size_t count = 0;
  MUST(cuStreamCreate(&a, 1));
  MUST(cuStreamCreate(&b, 1));
  MUST(cuEventCreate(&fork_point, 2));
  MUST(cuEventCreate(&join_point, 2));
  MUST(cuStreamBeginCapture_v2(a, 0));
  MUST(launch(function("spin_us_20"), a));
  MUST(cuEventRecord(fork_point, a));
  MUST(cuStreamWaitEvent(b, fork_point, 0));
  MUST(launch(function("spin_us_30"), b));
  MUST(cuLaunchHostFunc(b, call, NULL));
  MUST(cuMemAllocAsync(&memory, 40 * mib, a));
  MUST(cuMemFreeAsync(memory, a));
  MUST(cuEventRecord(join_point, b));
  MUST(cuStreamWaitEvent(a, join_point, 0));
  MUST(cuStreamEndCapture(a, &graph));
  WANT(atomic_load(&called) == 0);
  MUST(nodes_of(graph, NULL, &count));
  WANT(count == 5);
  MUST(cuGraphInstantiateWithFlags(&exec, graph, 0));
  WANT(free_now() == before);
  for (int i = 0; i < 3; ++i) MUST(cuGraphLaunch(exec, a));
  MUST(cuStreamSynchronize(a));
  WANT(atomic_load(&called) == 3);
  WANT(free_now() == before - 64 * mib);
  MUST(cuGraphExecDestroy(exec));
  MUST(cuGraphDestroy(graph));
  MUST(cuDeviceGraphMemTrim(0));
  WANT(free_now() == before);
  /* What another stream did must come back. */
  MUST(cuStreamBeginCapture_v2(a, 0));
  MUST(launch(function("k"), a));
  MUST(cuEventRecord(fork_point, a));
  MUST(cuStreamWaitEvent(b, fork_point, 0));
  MUST(launch(function("k"), b));
  GIVES(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, cuStreamEndCapture(a, &graph));
  MUST(cuStreamBeginCapture_v2(a, 0));
  GIVES(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuStreamSynchronize(a));
  GIVES(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(a, &graph));
  MUST(cuStreamSynchronize(a));
  /* A launch that does not fit leaves nothing behind. */
  CUDA_MEM_ALLOC_NODE_PARAMS params;
  CUgraphNode node = NULL, small = NULL;
  memset(&params, 0, sizeof params);
  params.poolProps.allocType = 1;
  params.poolProps.location.type = 1;
  params.bytesize = 64 * mib;
  MUST(cuGraphCreate(&graph, 0));
  MUST(cuGraphAddMemAllocNode(&small, graph, NULL, 0, &params));
  params.bytesize = 200 * gib;
  MUST(cuGraphAddMemAllocNode(&node, graph, &small, 1, &params));
  MUST(cuGraphInstantiateWithFlags(&exec, graph, 0));
  GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuGraphLaunch(exec, a));
  MUST(cuDeviceGraphMemTrim(0));
  WANT(free_now() == before);
}

static void refused(void) {
  start();
  const size_t before = free_now();
  CUdeviceptr p = 0;
  CUstream stream = NULL;
  CUcontext other = NULL;
  MUST(cuStreamCreate(&stream, 1));
  GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc_v2(&p, 200 * gib));
  GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuMemAllocAsync(&p, 200 * gib, stream));
  CUmemAllocationProp properties;
  CUmemGenericAllocationHandle handle = 0;
  memset(&properties, 0, sizeof properties);
  properties.type = properties.location.type = 1;
  GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuMemCreate(&handle, 200 * gib, &properties, 0));
  CUarray array = NULL;
  CUDA_ARRAY3D_DESCRIPTOR shape = {131072, 65536, 16, CU_AD_FORMAT_FLOAT, 4, 0};
  GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuArray3DCreate_v2(&array, &shape));
  WANT(free_now() == before);
  /* What a pool keeps is not lost to others. */
  CUmemoryPool pool = NULL;
  uint64_t keep = ~0ULL;
  MUST(cuDeviceGetDefaultMemPool(&pool, 0));
  MUST(cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &keep));
  MUST(cuMemAllocAsync(&p, gib, stream));
  MUST(cuMemFreeAsync(p, stream));
  MUST(cuStreamSynchronize(stream));
  WANT(free_now() == before - gib);
  MUST(cuMemAlloc_v2(&p, before / (2 * mib) * (2 * mib)));
  WANT(free_now() < 2 * mib);
  /* With nothing left, contexts, stacks and small things are refused as well, and what was goes on. */
  CUdeviceptr q = 0;
  GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc_v2(&q, 1));
  GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuCtxCreate_v4(&other, NULL, 0, 0));
  MUST(cuCtxSetLimit(CU_LIMIT_STACK_SIZE, 65536));
  GIVES(CUDA_ERROR_OUT_OF_MEMORY, launch(function("k"), NULL));
  MUST(cuCtxSetLimit(CU_LIMIT_STACK_SIZE, 1024));
  MUST(launch(function("k"), NULL));
  MUST(cuCtxSynchronize());
  MUST(cuMemFree_v2(p));
  WANT(free_now() == before);
}

static void contexts(void) {
  start();
  CUcontext second = NULL, now = NULL;
  CUdeviceptr p = 0;
  const size_t before = free_now();
  MUST(cuCtxCreate_v2(&second, 0, 0));
  WANT(before - free_now() == 518 * mib);
  MUST(cuMemAlloc_v2(&p, 10 * mib));
  MUST(cuCtxGetCurrent(&now));
  WANT(now == second);
  MUST(cuCtxPopCurrent_v2(&now));
  WANT(now == second);
  MUST(cuCtxGetCurrent(&now));
  WANT(now == context);
  MUST(cuCtxPushCurrent_v2(second));
  MUST(cuCtxDestroy_v2(second));
  WANT(free_now() == before); /* with all that it had */
  MUST(cuCtxGetCurrent(&now));
  WANT(now == context);
  GIVES(CUDA_ERROR_CONTEXT_IS_DESTROYED, cuCtxSetCurrent(second));
  MUST(cuCtxSetLimit(CU_LIMIT_STACK_SIZE, 16384));
  WANT(free_now() == before);
  MUST(launch(function("k"), NULL));
  MUST(cuCtxSynchronize());
  WANT(before - free_now() == (4374 - 414) * mib); /* as on an H100 */
  MUST(cuDevicePrimaryCtxRelease_v2(0));
  GIVES(CUDA_ERROR_CONTEXT_IS_DESTROYED, cuCtxSynchronize());
}

static void forked(void) {
  start();
  CUdeviceptr p = 0;
  MUST(cuMemAlloc_v2(&p, mib));
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    int count = 0;
    CUcontext got = NULL;
    GIVES(CUDA_ERROR_NOT_INITIALIZED, cuInit(0));
    GIVES(CUDA_ERROR_NOT_INITIALIZED, cuDeviceGetCount(&count));
    GIVES(CUDA_ERROR_NOT_INITIALIZED, cuMemFree_v2(p));
    GIVES(CUDA_ERROR_NOT_INITIALIZED, cuDevicePrimaryCtxRetain(&got, 0));
    fflush(stdout);
    _exit(wrong != 0);
  }
  int status = 0;
  WANT(waitpid(child, &status, 0) == child && status == 0);
  MUST(launch(function("k"), NULL));
  MUST(cuMemFree_v2(p));
}

static void forked_first(void) { /* before it uses CUDA, a fork is a process like any other */
  fflush(stdout);
  const pid_t child = fork();
  start();
  MUST(launch(function("k"), NULL));
  MUST(cuCtxSynchronize());
  if (child == 0) _exit(wrong != 0);
  int status = 0;
  WANT(waitpid(child, &status, 0) == child && status == 0);
}

static void faulted(void) {
  start();
  CUdeviceptr p = 0;
  CUstream stream = NULL;
  const CUfunction fault = function("fault"), k = function("k");
  MUST(cuMemAlloc_v2(&p, 5 * mib));
  const size_t before = free_now();
  MUST(launch(fault, NULL));
  GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuCtxSynchronize());
  GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuMemAlloc_v2(&p, mib));
  GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, launch(k, NULL));
  GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuStreamCreate(&stream, 0));
  GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuCtxSynchronize());
  MUST(cuDevicePrimaryCtxReset_v2(0));
  MUST(cuDevicePrimaryCtxRetain(&context, 0));
  MUST(cuCtxSetCurrent(context));
  WANT(free_now() > before);
  MUST(cuModuleLoadData(&module, "an image"));
  MUST(launch(function("k"), NULL));
  MUST(cuCtxSynchronize());
}

static void* one_thread(void* unused) {
  (void)unused;
  CUstream stream = NULL;
  MUST(cuCtxSetCurrent(context));
  MUST(cuStreamCreate(&stream, 1));
  const CUfunction f = function("spin_us_1");
  for (int i = 0; i < 150; ++i) {
    CUdeviceptr p = 0, q = 0;
    unsigned value = 0;
    MUST(cuMemAlloc_v2(&p, 1000 + (size_t)i * 20000));
    MUST(cuMemAllocAsync(&q, 300000, stream));
    MUST(cuMemsetD32_v2(p, (unsigned)i, 10));
    MUST(launch(f, stream));
    MUST(launch(f, CU_STREAM_PER_THREAD));
    if (i % 10 == 0) MUST(cuLaunchHostFunc(stream, call, NULL));
    MUST(cuMemFreeAsync(q, stream));
    MUST(cuStreamSynchronize(stream));
    MUST(cuMemcpyDtoH_v2(&value, p + 36, 4));
    WANT(value == (unsigned)i);
    MUST(cuMemFree_v2(p));
  }
  MUST(cuStreamDestroy_v2(stream));
  return NULL;
}

static void threads(void) {
  start();
  const size_t before = free_now();
  pthread_t all[8];
  for (int i = 0; i < 8; ++i) pthread_create(&all[i], NULL, one_thread, NULL);
  for (int i = 0; i < 8; ++i) pthread_join(all[i], NULL);
  MUST(cuCtxSynchronize());
  WANT(atomic_load(&called) == 8 * 15);
  WANT(free_now() == before);
}

static void vmm(void) {
  start();
  const size_t before = free_now();
  CUmemAllocationProp properties;
  CUmemGenericAllocationHandle a = 0, b = 0, c = 0;
  CUdeviceptr at = 0;
  CUmemAccessDesc access = {{1, 0}, 3};
  char back[8] = "";
  memset(&properties, 0, sizeof properties);
  properties.type = properties.location.type = properties.requestedHandleTypes = 1;
  GIVES(CUDA_ERROR_INVALID_VALUE, cuMemCreate(&a, 1000, &properties, 0));
  MUST(cuMemCreate(&a, 4 * mib, &properties, 0));
  MUST(cuMemCreate(&b, 2 * mib, &properties, 0));
  MUST(cuMemAddressReserve(&at, 16 * mib, 0, 0, 0));
  MUST(cuMemMap(at, 4 * mib, 0, a, 0));
  MUST(cuMemMap(at + 4 * mib, 2 * mib, 0, b, 0));
  MUST(cuMemMap(at + 6 * mib, 2 * mib, 2 * mib, a, 0)); /* the second half of a once more */
  GIVES(CUDA_ERROR_INVALID_VALUE, cuMemMap(at + 2 * mib, 2 * mib, 0, b, 0));
  GIVES(CUDA_ERROR_INVALID_VALUE, cuMemMap(at + 14 * mib, 4 * mib, 0, a, 0));
  MUST(cuMemSetAccess(at, 8 * mib, &access, 1));
  MUST(cuMemcpyHtoD_v2(at + 2 * mib - 2, "across", 7)); /* over the border of pages */
  MUST(cuMemcpyDtoH_v2(back, at + 6 * mib, 5));
  WANT(strcmp(back, "ross") == 0);
  MUST(cuMemcpyHtoD_v2(at + 4 * mib - 3, "bridge", 7)); /* over the border of objects */
  MUST(cuMemcpyDtoH_v2(back, at + 4 * mib - 3, 7));
  WANT(strcmp(back, "bridge") == 0);
  MUST(cuMemRetainAllocationHandle(&c, (void*)(at + 100)));
  WANT(c == a);
  MUST(cuMemRelease(a));
  MUST(cuMemRelease(a));
  GIVES(CUDA_ERROR_INVALID_VALUE, cuMemRelease(a));
  MUST(cuMemRelease(b));
  WANT(free_now() == before - 6 * mib);
  GIVES(CUDA_ERROR_INVALID_VALUE, cuMemAddressFree(at, 16 * mib));
  GIVES(CUDA_ERROR_INVALID_VALUE, cuMemUnmap(at, 2 * mib));
  MUST(cuMemUnmap(at, 8 * mib));
  WANT(free_now() == before);
  MUST(cuMemAddressFree(at, 16 * mib));
}

int main(int count, char** words) {
  static const struct {
    const char* name;
    void (*run)(void);
  } scenarios[] = {{"lookup", lookup},     {"devices", devices}, {"contents", contents},
                   {"streams", streams},   {"graphs", graphs},   {"refused", refused},
                   {"contexts", contexts}, {"forked", forked},   {"forked-first", forked_first},
                   {"faulted", faulted},   {"threads", threads}, {"vmm", vmm}};
  for (size_t i = 0; i < sizeof scenarios / sizeof scenarios[0]; ++i) {
    if (count != 2 || strcmp(words[1], scenarios[i].name) != 0) continue;
    scenarios[i].run();
    return wrong != 0;
  }
  fprintf(stderr, "usage: cuda_check SCENARIO\n");
  return 2;
}
