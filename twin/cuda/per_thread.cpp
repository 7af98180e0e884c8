// The forms of programs built with a default stream for each thread: no stream means that one.
// Made from the other forms' declarations; a synchronous copy or fill waits for all of the context's work in
// both.
#include "twin/cuda/driver.hpp"

namespace {
CUstream own(CUstream stream) { return stream == nullptr ? CU_STREAM_PER_THREAD : stream; }
}  // namespace

extern "C" CUresult cuEventRecord(CUevent, CUstream);
EXPORT CUresult cuEventRecord_ptsz(CUevent event, CUstream stream) {
  return cuEventRecord(event, own(stream));
}
extern "C" CUresult cuEventRecordWithFlags(CUevent, CUstream, unsigned);
EXPORT CUresult cuEventRecordWithFlags_ptsz(CUevent event_handle, CUstream handle, unsigned a2) {
  return cuEventRecordWithFlags(event_handle, own(handle), a2);
}
extern "C" CUresult cuGraphInstantiateWithParams(CUgraphExec*, CUgraph, CUDA_GRAPH_INSTANTIATE_PARAMS*);
EXPORT CUresult cuGraphInstantiateWithParams_ptsz(CUgraphExec* exec, CUgraph graph,
                                                  CUDA_GRAPH_INSTANTIATE_PARAMS* params) {
  return cuGraphInstantiateWithParams(exec, graph, params);
}
extern "C" CUresult cuGraphLaunch(CUgraphExec, CUstream);
EXPORT CUresult cuGraphLaunch_ptsz(CUgraphExec handle, CUstream stream_handle) {
  return cuGraphLaunch(handle, own(stream_handle));
}
extern "C" CUresult cuGraphUpload(CUgraphExec, CUstream);
EXPORT CUresult cuGraphUpload_ptsz(CUgraphExec exec, CUstream a1) { return cuGraphUpload(exec, own(a1)); }
extern "C" CUresult cuLaunchCooperativeKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned,
                                              unsigned, unsigned, CUstream, void**);
EXPORT CUresult cuLaunchCooperativeKernel_ptsz(CUfunction function, unsigned gx, unsigned gy, unsigned gz,
                                               unsigned bx, unsigned by, unsigned bz, unsigned a7,
                                               CUstream stream, void** params) {
  return cuLaunchCooperativeKernel(function, gx, gy, gz, bx, by, bz, a7, own(stream), params);
}
extern "C" CUresult cuLaunchHostFunc(CUstream, CUhostFn, void*);
EXPORT CUresult cuLaunchHostFunc_ptsz(CUstream handle, CUhostFn function, void* data) {
  return cuLaunchHostFunc(own(handle), function, data);
}
EXPORT CUresult cuLaunchKernelEx_ptsz(const CUlaunchConfig* config, CUfunction function, void** params,
                                      void** extra) {
  if (config == nullptr) return CUDA_ERROR_INVALID_VALUE;
  CUlaunchConfig own_config = *config;
  own_config.hStream = own(config->hStream);
  return cuLaunchKernelEx(&own_config, function, params, extra);
}
extern "C" CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                   unsigned, CUstream, void**, void**);
EXPORT CUresult cuLaunchKernel_ptsz(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                    unsigned by, unsigned bz, unsigned a7, CUstream stream, void** params,
                                    void** extra) {
  return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, a7, own(stream), params, extra);
}
extern "C" CUresult cuMemAllocAsync(CUdeviceptr*, size_t, CUstream);
EXPORT CUresult cuMemAllocAsync_ptsz(CUdeviceptr* pointer, size_t bytes, CUstream stream) {
  return cuMemAllocAsync(pointer, bytes, own(stream));
}
extern "C" CUresult cuMemAllocFromPoolAsync(CUdeviceptr*, size_t, CUmemoryPool, CUstream);
EXPORT CUresult cuMemAllocFromPoolAsync_ptsz(CUdeviceptr* pointer, size_t bytes, CUmemoryPool pool,
                                             CUstream stream) {
  return cuMemAllocFromPoolAsync(pointer, bytes, pool, own(stream));
}
extern "C" CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D*, CUstream);
EXPORT CUresult cuMemcpy2DAsync_v2_ptsz(const CUDA_MEMCPY2D* c, CUstream s) {
  return cuMemcpy2DAsync_v2(c, own(s));
}
extern "C" CUresult cuMemcpy2DUnaligned_v2(const CUDA_MEMCPY2D*);
EXPORT CUresult cuMemcpy2DUnaligned_v2_ptds(const CUDA_MEMCPY2D* c) { return cuMemcpy2DUnaligned_v2(c); }
extern "C" CUresult cuMemcpy2D_v2(const CUDA_MEMCPY2D*);
EXPORT CUresult cuMemcpy2D_v2_ptds(const CUDA_MEMCPY2D* c) { return cuMemcpy2D_v2(c); }
extern "C" CUresult cuMemcpy3DAsync_v2(const CUDA_MEMCPY3D*, CUstream);
EXPORT CUresult cuMemcpy3DAsync_v2_ptsz(const CUDA_MEMCPY3D* c, CUstream s) {
  return cuMemcpy3DAsync_v2(c, own(s));
}
extern "C" CUresult cuMemcpy3DPeerAsync(const CUDA_MEMCPY3D*, CUstream);
EXPORT CUresult cuMemcpy3DPeerAsync_ptsz(const CUDA_MEMCPY3D* c, CUstream s) {
  return cuMemcpy3DPeerAsync(c, own(s));
}
extern "C" CUresult cuMemcpy3DPeer(const CUDA_MEMCPY3D*);
EXPORT CUresult cuMemcpy3DPeer_ptds(const CUDA_MEMCPY3D* c) { return cuMemcpy3DPeer(c); }
extern "C" CUresult cuMemcpy3D_v2(const CUDA_MEMCPY3D*);
EXPORT CUresult cuMemcpy3D_v2_ptds(const CUDA_MEMCPY3D* c) { return cuMemcpy3D_v2(c); }
extern "C" CUresult cuMemcpyAsync(CUdeviceptr, CUdeviceptr, size_t, CUstream);
EXPORT CUresult cuMemcpyAsync_ptsz(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
  return cuMemcpyAsync(to, from, n, own(s));
}
extern "C" CUresult cuMemcpyAtoA_v2(CUarray, size_t, CUarray, size_t, size_t);
EXPORT CUresult cuMemcpyAtoA_v2_ptds(CUarray to, size_t to_at, CUarray from, size_t from_at, size_t n) {
  return cuMemcpyAtoA_v2(to, to_at, from, from_at, n);
}
extern "C" CUresult cuMemcpyAtoD_v2(CUdeviceptr, CUarray, size_t, size_t);
EXPORT CUresult cuMemcpyAtoD_v2_ptds(CUdeviceptr to, CUarray from, size_t from_at, size_t n) {
  return cuMemcpyAtoD_v2(to, from, from_at, n);
}
extern "C" CUresult cuMemcpyAtoHAsync_v2(void*, CUarray, size_t, size_t, CUstream);
EXPORT CUresult cuMemcpyAtoHAsync_v2_ptsz(void* to, CUarray from, size_t from_at, size_t n, CUstream s) {
  return cuMemcpyAtoHAsync_v2(to, from, from_at, n, own(s));
}
extern "C" CUresult cuMemcpyAtoH_v2(void*, CUarray, size_t, size_t);
EXPORT CUresult cuMemcpyAtoH_v2_ptds(void* to, CUarray from, size_t from_at, size_t n) {
  return cuMemcpyAtoH_v2(to, from, from_at, n);
}
extern "C" CUresult cuMemcpyDtoA_v2(CUarray, size_t, CUdeviceptr, size_t);
EXPORT CUresult cuMemcpyDtoA_v2_ptds(CUarray to, size_t to_at, CUdeviceptr from, size_t n) {
  return cuMemcpyDtoA_v2(to, to_at, from, n);
}
extern "C" CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, size_t, CUstream);
EXPORT CUresult cuMemcpyDtoDAsync_v2_ptsz(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
  return cuMemcpyDtoDAsync_v2(to, from, n, own(s));
}
extern "C" CUresult cuMemcpyDtoD_v2(CUdeviceptr, CUdeviceptr, size_t);
EXPORT CUresult cuMemcpyDtoD_v2_ptds(CUdeviceptr to, CUdeviceptr from, size_t n) {
  return cuMemcpyDtoD_v2(to, from, n);
}
extern "C" CUresult cuMemcpyDtoHAsync_v2(void*, CUdeviceptr, size_t, CUstream);
EXPORT CUresult cuMemcpyDtoHAsync_v2_ptsz(void* to, CUdeviceptr from, size_t n, CUstream s) {
  return cuMemcpyDtoHAsync_v2(to, from, n, own(s));
}
extern "C" CUresult cuMemcpyDtoH_v2(void*, CUdeviceptr, size_t);
EXPORT CUresult cuMemcpyDtoH_v2_ptds(void* to, CUdeviceptr from, size_t n) {
  return cuMemcpyDtoH_v2(to, from, n);
}
extern "C" CUresult cuMemcpyHtoAAsync_v2(CUarray, size_t, const void*, size_t, CUstream);
EXPORT CUresult cuMemcpyHtoAAsync_v2_ptsz(CUarray to, size_t to_at, const void* from, size_t n, CUstream s) {
  return cuMemcpyHtoAAsync_v2(to, to_at, from, n, own(s));
}
extern "C" CUresult cuMemcpyHtoA_v2(CUarray, size_t, const void*, size_t);
EXPORT CUresult cuMemcpyHtoA_v2_ptds(CUarray to, size_t to_at, const void* from, size_t n) {
  return cuMemcpyHtoA_v2(to, to_at, from, n);
}
extern "C" CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr, const void*, size_t, CUstream);
EXPORT CUresult cuMemcpyHtoDAsync_v2_ptsz(CUdeviceptr to, const void* from, size_t n, CUstream s) {
  return cuMemcpyHtoDAsync_v2(to, from, n, own(s));
}
extern "C" CUresult cuMemcpyHtoD_v2(CUdeviceptr, const void*, size_t);
EXPORT CUresult cuMemcpyHtoD_v2_ptds(CUdeviceptr to, const void* from, size_t n) {
  return cuMemcpyHtoD_v2(to, from, n);
}
extern "C" CUresult cuMemcpyPeerAsync(CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, size_t, CUstream);
EXPORT CUresult cuMemcpyPeerAsync_ptsz(CUdeviceptr to, CUcontext a1, CUdeviceptr from, CUcontext a3, size_t n,
                                       CUstream s) {
  return cuMemcpyPeerAsync(to, a1, from, a3, n, own(s));
}
extern "C" CUresult cuMemcpyPeer(CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, size_t);
EXPORT CUresult cuMemcpyPeer_ptds(CUdeviceptr to, CUcontext a1, CUdeviceptr from, CUcontext a3, size_t n) {
  return cuMemcpyPeer(to, a1, from, a3, n);
}
extern "C" CUresult cuMemcpy(CUdeviceptr, CUdeviceptr, size_t);
EXPORT CUresult cuMemcpy_ptds(CUdeviceptr to, CUdeviceptr from, size_t n) { return cuMemcpy(to, from, n); }
extern "C" CUresult cuMemFreeAsync(CUdeviceptr, CUstream);
EXPORT CUresult cuMemFreeAsync_ptsz(CUdeviceptr pointer, CUstream handle) {
  return cuMemFreeAsync(pointer, own(handle));
}
extern "C" CUresult cuMemPrefetchAsync(CUdeviceptr, size_t, CUdevice, CUstream);
EXPORT CUresult cuMemPrefetchAsync_ptsz(CUdeviceptr pointer, size_t a1, CUdevice a2, CUstream a3) {
  return cuMemPrefetchAsync(pointer, a1, a2, own(a3));
}
extern "C" CUresult cuMemPrefetchAsync_v2(CUdeviceptr, size_t, CUmemLocation, unsigned, CUstream);
EXPORT CUresult cuMemPrefetchAsync_v2_ptsz(CUdeviceptr pointer, size_t a1, CUmemLocation a2, unsigned a3,
                                           CUstream a4) {
  return cuMemPrefetchAsync_v2(pointer, a1, a2, a3, own(a4));
}
extern "C" CUresult cuMemsetD16Async(CUdeviceptr, unsigned short, size_t, CUstream);
EXPORT CUresult cuMemsetD16Async_ptsz(CUdeviceptr to, unsigned short v, size_t n, CUstream s) {
  return cuMemsetD16Async(to, v, n, own(s));
}
extern "C" CUresult cuMemsetD16_v2(CUdeviceptr, unsigned short, size_t);
EXPORT CUresult cuMemsetD16_v2_ptds(CUdeviceptr to, unsigned short v, size_t n) {
  return cuMemsetD16_v2(to, v, n);
}
extern "C" CUresult cuMemsetD2D16Async(CUdeviceptr, size_t, unsigned short, size_t, size_t, CUstream);
EXPORT CUresult cuMemsetD2D16Async_ptsz(CUdeviceptr to, size_t p, unsigned short v, size_t w, size_t h,
                                        CUstream s) {
  return cuMemsetD2D16Async(to, p, v, w, h, own(s));
}
extern "C" CUresult cuMemsetD2D16_v2(CUdeviceptr, size_t, unsigned short, size_t, size_t);
EXPORT CUresult cuMemsetD2D16_v2_ptds(CUdeviceptr to, size_t p, unsigned short v, size_t w, size_t h) {
  return cuMemsetD2D16_v2(to, p, v, w, h);
}
extern "C" CUresult cuMemsetD2D32Async(CUdeviceptr, size_t, unsigned, size_t, size_t, CUstream);
EXPORT CUresult cuMemsetD2D32Async_ptsz(CUdeviceptr to, size_t p, unsigned v, size_t w, size_t h,
                                        CUstream s) {
  return cuMemsetD2D32Async(to, p, v, w, h, own(s));
}
extern "C" CUresult cuMemsetD2D32_v2(CUdeviceptr, size_t, unsigned, size_t, size_t);
EXPORT CUresult cuMemsetD2D32_v2_ptds(CUdeviceptr to, size_t p, unsigned v, size_t w, size_t h) {
  return cuMemsetD2D32_v2(to, p, v, w, h);
}
extern "C" CUresult cuMemsetD2D8Async(CUdeviceptr, size_t, unsigned char, size_t, size_t, CUstream);
EXPORT CUresult cuMemsetD2D8Async_ptsz(CUdeviceptr to, size_t p, unsigned char v, size_t w, size_t h,
                                       CUstream s) {
  return cuMemsetD2D8Async(to, p, v, w, h, own(s));
}
extern "C" CUresult cuMemsetD2D8_v2(CUdeviceptr, size_t, unsigned char, size_t, size_t);
EXPORT CUresult cuMemsetD2D8_v2_ptds(CUdeviceptr to, size_t p, unsigned char v, size_t w, size_t h) {
  return cuMemsetD2D8_v2(to, p, v, w, h);
}
extern "C" CUresult cuMemsetD32Async(CUdeviceptr, unsigned, size_t, CUstream);
EXPORT CUresult cuMemsetD32Async_ptsz(CUdeviceptr to, unsigned v, size_t n, CUstream s) {
  return cuMemsetD32Async(to, v, n, own(s));
}
extern "C" CUresult cuMemsetD32_v2(CUdeviceptr, unsigned, size_t);
EXPORT CUresult cuMemsetD32_v2_ptds(CUdeviceptr to, unsigned v, size_t n) { return cuMemsetD32_v2(to, v, n); }
extern "C" CUresult cuMemsetD8Async(CUdeviceptr, unsigned char, size_t, CUstream);
EXPORT CUresult cuMemsetD8Async_ptsz(CUdeviceptr to, unsigned char v, size_t n, CUstream s) {
  return cuMemsetD8Async(to, v, n, own(s));
}
extern "C" CUresult cuMemsetD8_v2(CUdeviceptr, unsigned char, size_t);
EXPORT CUresult cuMemsetD8_v2_ptds(CUdeviceptr to, unsigned char v, size_t n) {
  return cuMemsetD8_v2(to, v, n);
}
extern "C" CUresult cuStreamAddCallback(CUstream, CUstreamCallback, void*, unsigned);
EXPORT CUresult cuStreamAddCallback_ptsz(CUstream handle, CUstreamCallback callback, void* data,
                                         unsigned flags) {
  return cuStreamAddCallback(own(handle), callback, data, flags);
}
extern "C" CUresult cuStreamAttachMemAsync(CUstream, CUdeviceptr, size_t, unsigned);
EXPORT CUresult cuStreamAttachMemAsync_ptsz(CUstream handle, CUdeviceptr a1, size_t a2, unsigned a3) {
  return cuStreamAttachMemAsync(own(handle), a1, a2, a3);
}
extern "C" CUresult cuStreamBeginCapture(CUstream);
EXPORT CUresult cuStreamBeginCapture_ptsz(CUstream stream) { return cuStreamBeginCapture(own(stream)); }
extern "C" CUresult cuStreamBeginCaptureToGraph(CUstream, CUgraph, const CUgraphNode*, const CUgraphEdgeData*,
                                                size_t, int);
EXPORT CUresult cuStreamBeginCaptureToGraph_ptsz(CUstream stream, CUgraph graph, const CUgraphNode* after,
                                                 const CUgraphEdgeData* a3, size_t count, int mode) {
  return cuStreamBeginCaptureToGraph(own(stream), graph, after, a3, count, mode);
}
extern "C" CUresult cuStreamBeginCapture_v2(CUstream, int);
EXPORT CUresult cuStreamBeginCapture_v2_ptsz(CUstream stream, int mode) {
  return cuStreamBeginCapture_v2(own(stream), mode);
}
extern "C" CUresult cuStreamCopyAttributes(CUstream, CUstream);
EXPORT CUresult cuStreamCopyAttributes_ptsz(CUstream to, CUstream from) {
  return cuStreamCopyAttributes(own(to), own(from));
}
extern "C" CUresult cuStreamEndCapture(CUstream, CUgraph*);
EXPORT CUresult cuStreamEndCapture_ptsz(CUstream handle, CUgraph* out) {
  return cuStreamEndCapture(own(handle), out);
}
extern "C" CUresult cuStreamGetCaptureInfo(CUstream, int*, uint64_t*);
EXPORT CUresult cuStreamGetCaptureInfo_ptsz(CUstream stream, int* status, uint64_t* id) {
  return cuStreamGetCaptureInfo(own(stream), status, id);
}
extern "C" CUresult cuStreamGetCaptureInfo_v2(CUstream, int*, uint64_t*, CUgraph*, const CUgraphNode**,
                                              size_t*);
EXPORT CUresult cuStreamGetCaptureInfo_v2_ptsz(CUstream stream, int* status, uint64_t* id, CUgraph* graph,
                                               const CUgraphNode** after, size_t* count) {
  return cuStreamGetCaptureInfo_v2(own(stream), status, id, graph, after, count);
}
extern "C" CUresult cuStreamGetCaptureInfo_v3(CUstream, int*, uint64_t*, CUgraph*, const CUgraphNode**,
                                              const CUgraphEdgeData**, size_t*);
EXPORT CUresult cuStreamGetCaptureInfo_v3_ptsz(CUstream handle, int* status, uint64_t* id, CUgraph* graph,
                                               const CUgraphNode** after, const CUgraphEdgeData** edges,
                                               size_t* count) {
  return cuStreamGetCaptureInfo_v3(own(handle), status, id, graph, after, edges, count);
}
extern "C" CUresult cuStreamGetCtx(CUstream, CUcontext*);
EXPORT CUresult cuStreamGetCtx_ptsz(CUstream handle, CUcontext* context) {
  return cuStreamGetCtx(own(handle), context);
}
extern "C" CUresult cuStreamGetCtx_v2(CUstream, CUcontext*, void**);
EXPORT CUresult cuStreamGetCtx_v2_ptsz(CUstream handle, CUcontext* context, void** green) {
  return cuStreamGetCtx_v2(own(handle), context, green);
}
extern "C" CUresult cuStreamGetDevice(CUstream, CUdevice*);
EXPORT CUresult cuStreamGetDevice_ptsz(CUstream handle, CUdevice* device) {
  return cuStreamGetDevice(own(handle), device);
}
extern "C" CUresult cuStreamGetFlags(CUstream, unsigned*);
EXPORT CUresult cuStreamGetFlags_ptsz(CUstream handle, unsigned* flags) {
  return cuStreamGetFlags(own(handle), flags);
}
extern "C" CUresult cuStreamGetId(CUstream, unsigned long long*);
EXPORT CUresult cuStreamGetId_ptsz(CUstream handle, unsigned long long* id) {
  return cuStreamGetId(own(handle), id);
}
extern "C" CUresult cuStreamGetPriority(CUstream, int*);
EXPORT CUresult cuStreamGetPriority_ptsz(CUstream handle, int* priority) {
  return cuStreamGetPriority(own(handle), priority);
}
extern "C" CUresult cuStreamIsCapturing(CUstream, int*);
EXPORT CUresult cuStreamIsCapturing_ptsz(CUstream handle, int* status) {
  return cuStreamIsCapturing(own(handle), status);
}
extern "C" CUresult cuStreamQuery(CUstream);
EXPORT CUresult cuStreamQuery_ptsz(CUstream handle) { return cuStreamQuery(own(handle)); }
extern "C" CUresult cuStreamSynchronize(CUstream);
EXPORT CUresult cuStreamSynchronize_ptsz(CUstream handle) { return cuStreamSynchronize(own(handle)); }
extern "C" CUresult cuStreamUpdateCaptureDependencies(CUstream, CUgraphNode*, size_t, unsigned);
EXPORT CUresult cuStreamUpdateCaptureDependencies_ptsz(CUstream handle, CUgraphNode* after, size_t count,
                                                       unsigned flags) {
  return cuStreamUpdateCaptureDependencies(own(handle), after, count, flags);
}
extern "C" CUresult cuStreamUpdateCaptureDependencies_v2(CUstream, CUgraphNode*, const CUgraphEdgeData*,
                                                         size_t, unsigned);
EXPORT CUresult cuStreamUpdateCaptureDependencies_v2_ptsz(CUstream stream, CUgraphNode* after,
                                                          const CUgraphEdgeData* a2, size_t count,
                                                          unsigned flags) {
  return cuStreamUpdateCaptureDependencies_v2(own(stream), after, a2, count, flags);
}
extern "C" CUresult cuStreamWaitEvent(CUstream, CUevent, unsigned);
EXPORT CUresult cuStreamWaitEvent_ptsz(CUstream handle, CUevent event_handle, unsigned a2) {
  return cuStreamWaitEvent(own(handle), event_handle, a2);
}
extern "C" CUresult cuStreamWriteValue32_v2(CUstream, CUdeviceptr, std::uint32_t, unsigned);
EXPORT CUresult cuStreamWriteValue32_v2_ptsz(CUstream stream, CUdeviceptr at, std::uint32_t value,
                                             unsigned a3) {
  return cuStreamWriteValue32_v2(own(stream), at, value, a3);
}
extern "C" CUresult cuStreamWriteValue64_v2(CUstream, CUdeviceptr, std::uint64_t, unsigned);
EXPORT CUresult cuStreamWriteValue64_v2_ptsz(CUstream stream, CUdeviceptr at, std::uint64_t value,
                                             unsigned a3) {
  return cuStreamWriteValue64_v2(own(stream), at, value, a3);
}
