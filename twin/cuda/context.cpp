// Contexts: the RM objects of one, and which is current.
#include <unistd.h>

#include <algorithm>

#include "abi/rm/rm.hpp"
#include "twin/cuda/driver.hpp"

namespace bulkhead::twin::cuda {

namespace {

// 1 KiB of stack a thread took 414 MiB of local memory and 16 KiB took 4374 MiB on an H100: 2048 threads on
// each of 132 multiprocessors, and 150 MiB.
std::uint64_t local_memory(const Device& device, std::uint64_t stack_bytes) {
  const std::uint64_t fixed = (150UL << 20) * device.multiprocessors / 132;
  return round_up(device.multiprocessors * 2048UL * stack_bytes + fixed, granule);
}

constexpr Handle parent_device = 0xfff0, parent_subdevice = 0xfff1;
constexpr std::uint32_t cls_channel = 0xffff0001, cls_compute = 0xffff0002, cls_copy = 0xffff0003;
constexpr std::uint64_t value_local = ~0ULL;

struct Row {
  Handle handle, parent;
  std::uint32_t cls;
  std::uint64_t value;
};
constexpr Handle DEVICE = parent_device, SUBDEVICE = parent_subdevice;
constexpr std::uint32_t CHANNEL = cls_channel, COMPUTE = cls_compute, COPY = cls_copy;
constexpr std::uint64_t LOCAL = value_local;
constexpr Row rows[] = {
#define ROW(handle, parent, cls, value) {handle, parent, cls, value},
#include "twin/cuda/context_objects.inc"
#undef ROW
};
constexpr Handle handles_of_a_context = 0x88;

// Of Ampere, Ada, Hopper and Blackwell.
std::uint32_t class_on(const Device& device, std::uint32_t cls) {
  const std::size_t generation = device.cc_major >= 10  ? 3
                                 : device.cc_major == 9 ? 2
                                 : device.cc_minor == 9 ? 1
                                                        : 0;
  constexpr std::uint32_t channel[] = {0xc56f, 0xc56f, 0xc86f, 0xc96f},
                          compute[] = {0xc6c0, 0xc9c0, 0xcbc0, 0xcdc0},
                          copy[] = {0xc6b5, 0xc7b5, 0xc8b5, 0xc9b5};
  switch (cls) {
    case cls_channel:
      return channel[generation];
    case cls_compute:
      return compute[generation];
    case cls_copy:
      return copy[generation];
    default:
      return cls;
  }
}

CUresult make_object(CUcontext context, const Row& row) {
  Process& all = process();
  const Device& device = *context->device;
  const Handle handle = context->first_handle + row.handle;
  const Handle parent = row.parent == parent_device      ? device.device
                        : row.parent == parent_subdevice ? device.subdevice
                                                         : context->first_handle + row.parent;
  CUresult result = CUDA_SUCCESS;
  if (row.cls == abi::class_device_memory) {
    Handle made = handle;
    const std::uint64_t bytes =
        row.value == value_local ? local_memory(device, context->stack_bytes) : row.value;
    result = all.rm.alloc_memory(parent, bytes, made);
    if (row.value == value_local) context->local_memory = handle;
  } else if (row.cls == abi::class_channel_group) {
    abi::GroupParams params{};
    params.engine = static_cast<std::uint32_t>(row.value);
    result = all.rm.alloc(parent, row.cls, &params, handle);
    if (params.engine == abi::engine_compute) context->group = handle;
  } else if (row.cls == abi::class_system_memory) {
    abi::MemoryParams params{};
    params.owner = all.rm.client();
    params.size = row.value;
    result = all.rm.alloc(parent, row.cls, &params, handle);
  } else {
    result = all.rm.alloc(parent, class_on(device, row.cls), nullptr, handle);
  }
  if (result == CUDA_SUCCESS) context->objects.push_back({parent, handle});
  return result;
}

void free_objects(CUcontext context) {
  Process& all = process();
  for (auto object = context->objects.rbegin(); object != context->objects.rend(); ++object)
    all.rm.free(object->parent, object->handle);
  context->objects.clear();
  if (context->internal_managed != 0) unmap_managed(context->internal_managed, granule);
  context->internal_managed = 0;
  all.rm.give_back(context->first_handle, handles_of_a_context);
}

CUresult make_objects(CUcontext context) {
  Process& all = process();
  context->first_handle = all.rm.take_handles(handles_of_a_context);
  if (const auto failed = map_managed(granule, context->internal_managed); failed != CUDA_SUCCESS)
    return failed;
  for (const Row& row : rows) {
    if (const auto failed = make_object(context, row); failed != CUDA_SUCCESS) return failed;
  }
  for (const Row& row : rows) {
    if (row.cls != abi::class_channel_group) continue;
    std::uint8_t enable[3] = {1, 0, 0};
    const auto failed =
        all.rm.control(context->first_handle + row.handle, abi::cmd_group_schedule, enable, sizeof enable);
    if (failed != CUDA_SUCCESS) return failed;
  }
  std::uint64_t slice_us = rm::slice_when_scheduled_us;  // libcuda sets it itself
  return all.rm.control(context->group, abi::cmd_group_set_timeslice, &slice_us, sizeof slice_us);
}

}  // namespace

CUresult make_context(Device& device, unsigned flags, CUcontext& made) {
  Process& all = process();
  auto owned = std::make_unique<CUctx_st>();
  CUctx_st* const context = owned.get();
  context->device = &device;
  context->flags = flags;
  context->id = all.next_id++;
  CUresult result = make_objects(context);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    free_objects(context);
    trim_everything(device);
    result = make_objects(context);
  }
  if (result != CUDA_SUCCESS) {
    free_objects(context);
    return result;
  }
  context->alive = true;
  context->legacy = std::make_shared<CUstream_st>();
  context->legacy->context = context;
  context->legacy->id = all.next_id++;
  all.contexts.insert(context);
  all.owned_contexts.insert(std::move(owned));
  made = context;
  return CUDA_SUCCESS;
}

void destroy_context(Lock& lock, CUcontext context) {
  Process& all = process();
  static_cast<void>(wait_all(lock, context));
  if (!context->alive) return;  // somebody else was faster
  stop_thread(lock, context);
  context->alive = false;
  for (auto& other : all.contexts) other->peers.erase(context);
  for (auto it = all.allocations.begin(); it != all.allocations.end();) {
    const auto next = std::next(it);
    // Stream-ordered memory is the pool's and imported memory the process's.
    if (it->second.context == context && it->second.kind != Kind::async) release(it);
    it = next;
  }
  std::erase_if(all.arrays, [&](const auto& entry) { return entry.second->context == context; });
  std::erase_if(all.mipmaps, [&](const auto& entry) { return entry.second->context == context; });
  std::erase_if(all.modules, [&](const auto& entry) { return entry.second->context == context; });
  for (auto& [handle, event] : all.events) {
    if (event->context == context) event->state = nullptr;
  }
  for (auto& device : all.devices) {
    if (device->graph_cache_context == context) device->graph_cache_context = nullptr;
  }
  context->slabs.clear();
  context->streams.clear();
  context->of_threads.clear();
  context->timed.clear();
  free_objects(context);
}

// Grown at the launch that follows the new limit; the old one goes first, as there may be no room for both.
CUresult fit_stack(CUcontext context) {
  if (context->stack_bytes <= context->stack_made) return CUDA_SUCCESS;
  Process& all = process();
  const Handle device = context->device->device;
  all.rm.free(device, context->local_memory);
  Handle handle = context->local_memory;
  CUresult result = all.rm.alloc_memory(device, local_memory(*context->device, context->stack_bytes), handle);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    trim_everything(*context->device);
    result = all.rm.alloc_memory(device, local_memory(*context->device, context->stack_bytes), handle);
  }
  if (result == CUDA_SUCCESS) {
    context->stack_made = context->stack_bytes;
    return result;
  }
  if (all.rm.alloc_memory(device, local_memory(*context->device, context->stack_made), handle) !=
      CUDA_SUCCESS)
    context->sticky = CUDA_ERROR_LAUNCH_FAILED;
  return result;
}

}  // namespace bulkhead::twin::cuda

using namespace bulkhead::twin::cuda;

namespace {

bool known(CUcontext context) { return process().contexts.count(context) != 0; }

CUresult create(CUcontext* out, unsigned flags, CUdevice ordinal, unsigned version) {
  ENTER(call, driver);
  Device* const device = device_of(ordinal);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  if (out == nullptr) return CUDA_ERROR_INVALID_VALUE;
  CUcontext made = nullptr;
  if (const auto failed = make_context(*device, flags, made); failed != CUDA_SUCCESS) return failed;
  made->version = version;
  context_stack().push_back(made);
  *out = made;
  return CUDA_SUCCESS;
}

void forget(CUcontext context) {  // on this thread; on others calls find it dead
  std::erase(context_stack(), context);
}

}  // namespace

EXPORT CUresult cuCtxCreate_v2(CUcontext* context, unsigned flags, CUdevice device) {
  return create(context, flags, device, 3020);
}
EXPORT CUresult cuCtxCreate_v3(CUcontext* context, void* affinity, int count, unsigned flags,
                               CUdevice device) {
  if (affinity != nullptr || count != 0) return CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY;
  return create(context, flags, device, 3020);
}
EXPORT CUresult cuCtxCreate_v4(CUcontext* context, CUctxCreateParams* params, unsigned flags,
                               CUdevice device) {
  if (params != nullptr && params->execAffinityParams != nullptr) return CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY;
  if (params != nullptr && params->cigParams != nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  return create(context, flags, device, 3020);
}
EXPORT CUresult cuCtxDestroy_v2(CUcontext context) {
  ENTER(call, driver);
  if (!known(context) || context->primary) return CUDA_ERROR_INVALID_CONTEXT;
  if (!context->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  forget(context);
  destroy_context(call.lock(), context);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxDestroy(CUcontext context) { return cuCtxDestroy_v2(context); }
EXPORT CUresult cuCtxAttach(CUcontext* context, unsigned flags) {
  ENTER(call, context);
  if (context == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  *context = call.context();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxDetach(CUcontext context) { return cuCtxDestroy_v2(context); }

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
  ENTER(call, driver);
  if (!known(context)) return CUDA_ERROR_INVALID_CONTEXT;
  if (!context->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  context_stack().push_back(context);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxPushCurrent(CUcontext context) { return cuCtxPushCurrent_v2(context); }
EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  ENTER(call, driver);
  if (context_stack().empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (context != nullptr) *context = context_stack().back();
  context_stack().pop_back();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxPopCurrent(CUcontext* context) { return cuCtxPopCurrent_v2(context); }
EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
  ENTER(call, driver);
  auto& stack = context_stack();
  if (context == nullptr) {
    if (!stack.empty()) stack.pop_back();
    return CUDA_SUCCESS;
  }
  if (!known(context)) return CUDA_ERROR_INVALID_CONTEXT;
  if (!context->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  if (stack.empty()) stack.push_back(context);
  stack.back() = context;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
  ENTER(call, driver);
  if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *context = current();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
  ENTER(call, context);
  if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *device = call.device().ordinal;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice_v2(CUdevice* device, CUcontext context) {
  if (context == nullptr) return cuCtxGetDevice(device);
  ENTER(call, driver);
  if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (!known(context)) return CUDA_ERROR_INVALID_CONTEXT;
  *device = context->device->ordinal;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetFlags(unsigned* flags) {
  ENTER(call, context);
  if (flags == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *flags = call.context()->flags;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetFlags(unsigned flags) {
  ENTER(call, context);
  call.context()->flags = flags;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetId(CUcontext context, unsigned long long* id) {
  ENTER(call, driver);
  if (context == nullptr) context = current();
  if (!known(context)) return CUDA_ERROR_INVALID_CONTEXT;
  if (id == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *id = context->id;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetApiVersion(CUcontext context, unsigned* version) {
  ENTER(call, driver);
  if (context == nullptr) context = current();
  if (!known(context)) return CUDA_ERROR_INVALID_CONTEXT;
  if (version == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *version = context->version;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSynchronize() {
  ENTER(call, context);
  return wait_all(call.lock(), call.context());
}
EXPORT CUresult cuCtxSynchronize_v2(CUcontext context) {
  if (context == nullptr) return cuCtxSynchronize();
  ENTER(call, driver);
  if (!known(context) || !context->alive) return CUDA_ERROR_INVALID_CONTEXT;
  return wait_all(call.lock(), context);
}

EXPORT CUresult cuCtxSetLimit(int limit, size_t value) {
  ENTER(call, context);
  CUctx_st& context = *call.context();
  switch (limit) {
    case CU_LIMIT_STACK_SIZE:
      if (value > 512UL << 10)
        return CUDA_ERROR_INVALID_VALUE;  // 512 KiB of local memory a thread is the architecture's most
      context.stack_bytes = context.limits[0] = round_up(std::max<std::uint64_t>(value, 16), 16);
      return CUDA_SUCCESS;
    case CU_LIMIT_PRINTF_FIFO_SIZE:
    case CU_LIMIT_MALLOC_HEAP_SIZE:
    case CU_LIMIT_DEV_RUNTIME_SYNC_DEPTH:
    case CU_LIMIT_DEV_RUNTIME_PENDING_LAUNCH_COUNT:
    case CU_LIMIT_MAX_L2_FETCH_GRANULARITY:
    case CU_LIMIT_PERSISTING_L2_CACHE_SIZE:
      context.limits[limit] = value;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_UNSUPPORTED_LIMIT;
  }
}
EXPORT CUresult cuCtxGetLimit(size_t* value, int limit) {
  ENTER(call, context);
  if (value == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (limit < 0 || limit > CU_LIMIT_PERSISTING_L2_CACHE_SIZE) return CUDA_ERROR_UNSUPPORTED_LIMIT;
  *value = call.context()->limits[limit];
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  ENTER(call, context);
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCacheConfig(int* config) {
  ENTER(call, context);
  if (config == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *config = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetCacheConfig(int) {
  ENTER(call, context);
  return CUDA_SUCCESS;  // a hint
}
EXPORT CUresult cuCtxGetSharedMemConfig(int* config) { return cuCtxGetCacheConfig(config); }
EXPORT CUresult cuCtxSetSharedMemConfig(int config) { return cuCtxSetCacheConfig(config); }
EXPORT CUresult cuCtxResetPersistingL2Cache() {
  ENTER(call, context);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned flags) {
  ENTER(call, context);
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (!known(peer) || !peer->alive || peer == call.context()) return CUDA_ERROR_INVALID_CONTEXT;
  if (peer->device == call.context()->device || peer->device->nvlinks == 0)
    return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
  return call.context()->peers.insert(peer).second ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
}
EXPORT CUresult cuCtxDisablePeerAccess(CUcontext peer) {
  ENTER(call, context);
  return call.context()->peers.erase(peer) != 0 ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_NOT_ENABLED;
}

// ---- the primary context
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice ordinal) {
  ENTER(call, driver);
  Device* const device = device_of(ordinal);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (device->primary == nullptr) {
    CUcontext made = nullptr;
    if (const auto failed = make_context(*device, device->primary_flags, made); failed != CUDA_SUCCESS)
      return failed;
    made->primary = true;
    device->primary = made;
  }
  ++device->primary_count;
  *context = device->primary;
  return CUDA_SUCCESS;
}
namespace {
void end_primary(Lock& lock, Device& device) {
  CUcontext const context = device.primary;
  device.primary = nullptr;
  if (context != nullptr) destroy_context(lock, context);
  pool_empty(device.default_pool);
  graph_cache_trim(device);
}
}  // namespace
EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice ordinal) {
  ENTER(call, driver);
  Device* const device = device_of(ordinal);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  if (device->primary_count == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (--device->primary_count == 0) end_primary(call.lock(), *device);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return cuDevicePrimaryCtxRelease_v2(device); }
EXPORT CUresult cuDevicePrimaryCtxReset_v2(CUdevice ordinal) {
  ENTER(call, driver);
  Device* const device = device_of(ordinal);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  if (device->primary == nullptr) return CUDA_SUCCESS;
  // Whoever retained it keeps the right to release it; the next retain makes it anew.
  end_primary(call.lock(), *device);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxReset(CUdevice device) { return cuDevicePrimaryCtxReset_v2(device); }
EXPORT CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice ordinal, unsigned flags) {
  ENTER(call, driver);
  Device* const device = device_of(ordinal);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  device->primary_flags = flags;
  if (device->primary != nullptr) device->primary->flags = flags;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxSetFlags(CUdevice device, unsigned flags) {
  return cuDevicePrimaryCtxSetFlags_v2(device, flags);
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice ordinal, unsigned* flags, int* active) {
  ENTER(call, driver);
  const Device* const device = device_of(ordinal);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  if (flags != nullptr) *flags = device->primary_flags;
  if (active != nullptr) *active = device->primary != nullptr ? 1 : 0;
  return CUDA_SUCCESS;
}
