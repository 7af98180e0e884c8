// Addresses and what lies behind them: cuMemAlloc, managed, host, arrays, virtual memory management, IPC.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "abi/rm/rm.hpp"
#include "twin/cuda/driver.hpp"

namespace bulkhead::twin::cuda {

namespace {

constexpr std::uint64_t largest_small = 1UL << 20;  // up to here allocations share a granule
constexpr std::uint64_t small_alignment = 512;

void* pointer_to(std::uint64_t address) {
  return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
}
std::uint64_t address_of(const void* pointer) { return reinterpret_cast<std::uint64_t>(pointer); }

}  // namespace

// Device addresses are unique in the process and fault when the host reads them, as real ones do.
CUdeviceptr reserve_addresses(std::uint64_t bytes, CUdeviceptr wanted) {
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (wanted != 0 && wanted % granule == 0) {
    void* at = ::mmap(pointer_to(wanted), bytes, PROT_NONE, flags | MAP_FIXED_NOREPLACE, -1, 0);
    if (at == pointer_to(wanted)) return wanted;
    if (at != MAP_FAILED) ::munmap(at, bytes);
  }
  void* at = ::mmap(nullptr, bytes + granule, PROT_NONE, flags, -1, 0);
  if (at == MAP_FAILED) return 0;
  const std::uint64_t start = address_of(at), base = round_up(start, granule);
  if (base > start) ::munmap(at, base - start);
  if (const std::uint64_t rest = start + granule - base; rest > 0) ::munmap(pointer_to(base + bytes), rest);
  return base;
}

void free_addresses(CUdeviceptr base, std::uint64_t bytes) { ::munmap(pointer_to(base), bytes); }

Backing* add_backing(Device& device, Handle handle, std::uint64_t bytes) {
  auto backing = std::make_unique<Backing>();
  backing->device = &device;
  backing->handle = handle;
  backing->bytes = bytes;
  Backing* const made = backing.get();
  process().backings.emplace(made, std::move(backing));
  return made;
}

CUresult make_backing(Device& device, std::uint64_t bytes, Backing*& made) {
  Process& all = process();
  Handle handle = 0;
  CUresult result = all.rm.alloc_memory(device.device, bytes, handle);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    trim_everything(device);
    result = all.rm.alloc_memory(device.device, bytes, handle);
  }
  if (result != CUDA_SUCCESS) return result;
  made = add_backing(device, handle, bytes);
  return CUDA_SUCCESS;
}

void drop(Backing* backing) {
  if (--backing->references > 0) return;
  Process& all = process();
  all.rm.free(backing->device->device, backing->handle);
  all.rm.give_back(backing->handle);
  if (backing->content != nullptr) {
    ::munmap(backing->content, backing->content_bytes);
    all.content_bytes -= backing->content_bytes;
  }
  all.backings.erase(backing);
}

void map(CUdeviceptr base, Backing* backing, std::uint64_t offset, std::uint64_t bytes) {
  process().mappings[base] = {bytes, backing, offset};
}

void unmap(CUdeviceptr base) { process().mappings.erase(base); }

std::map<CUdeviceptr, Allocation>::iterator allocation_at(CUdeviceptr pointer) {
  auto& all = process().allocations;
  auto after = all.upper_bound(pointer);
  if (after == all.begin()) return all.end();
  --after;
  return pointer - after->first < std::max<std::uint64_t>(after->second.bytes, 1) ? after : all.end();
}

namespace {

CUresult allocate_own(CUcontext context, std::uint64_t bytes, CUdeviceptr& base) {
  Backing* backing = nullptr;
  if (const auto failed = make_backing(*context->device, bytes, backing); failed != CUDA_SUCCESS)
    return failed;
  base = reserve_addresses(bytes);
  if (base == 0) {
    drop(backing);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  map(base, backing, 0, bytes);
  return CUDA_SUCCESS;
}

void free_own(CUdeviceptr base, std::uint64_t bytes) {
  const auto mapping = process().mappings.find(base);
  if (mapping != process().mappings.end()) {
    drop(mapping->second.backing);
    process().mappings.erase(mapping);
  }
  free_addresses(base, bytes);
}

bool take_from(Slab& slab, std::uint64_t bytes, CUdeviceptr& pointer) {
  for (auto hole = slab.free.begin(); hole != slab.free.end(); ++hole) {
    if (hole->second < bytes) continue;
    pointer = slab.base + hole->first;
    if (hole->second > bytes) slab.free[hole->first + bytes] = hole->second - bytes;
    slab.free.erase(hole);
    return true;
  }
  return false;
}

void give_back_small(CUcontext context, CUdeviceptr pointer, std::uint64_t bytes) {
  auto& slabs = context->slabs;
  const auto at = std::find_if(slabs.begin(), slabs.end(),
                               [&](const auto& slab) { return pointer - slab->base < granule; });
  if (at == slabs.end()) return;
  Slab& slab = **at;
  auto [hole, added] = slab.free.emplace(pointer - slab.base, bytes);
  if (const auto next = std::next(hole);
      next != slab.free.end() && hole->first + hole->second == next->first) {
    hole->second += next->second;
    slab.free.erase(next);
  }
  if (hole != slab.free.begin()) {
    const auto before = std::prev(hole);
    if (before->first + before->second == hole->first) {
      before->second += hole->second;
      slab.free.erase(hole);
    }
  }
  if (slab.free.begin()->second != granule) return;
  // An empty one is not kept (H100: two allocations of 1 MiB freed, and 2 MiB went back).
  free_own(slab.base, granule);
  slabs.erase(at);
}

}  // namespace

CUresult allocate(CUcontext context, std::uint64_t bytes, CUdeviceptr& pointer) {
  Process& all = process();
  Allocation made;
  made.context = context;
  made.bytes = bytes;
  made.id = all.next_id++;
  if (bytes > (1UL << 47)) return CUDA_ERROR_OUT_OF_MEMORY;
  if (bytes > largest_small) {
    made.mapped_bytes = round_up(bytes, granule);
    if (const auto failed = allocate_own(context, made.mapped_bytes, pointer); failed != CUDA_SUCCESS)
      return failed;
    all.allocations[pointer] = made;
    return CUDA_SUCCESS;
  }
  made.pooled = true;
  made.mapped_bytes = round_up(bytes, small_alignment);
  bool found = false;
  for (auto& slab : context->slabs) {
    if ((found = take_from(*slab, made.mapped_bytes, pointer))) break;
  }
  if (!found) {
    auto slab = std::make_unique<Slab>();
    if (const auto failed = allocate_own(context, granule, slab->base); failed != CUDA_SUCCESS) return failed;
    slab->free[0] = granule;
    take_from(*slab, made.mapped_bytes, pointer);
    context->slabs.push_back(std::move(slab));
  }
  all.allocations[pointer] = made;
  return CUDA_SUCCESS;
}

void release(std::map<CUdeviceptr, Allocation>::iterator which) {
  Process& all = process();
  const CUdeviceptr pointer = which->first;
  const Allocation allocation = which->second;
  all.allocations.erase(which);
  switch (allocation.kind) {
    case Kind::device:
      if (allocation.pooled) {
        give_back_small(allocation.context, pointer, allocation.mapped_bytes);
      } else {
        free_own(pointer, allocation.mapped_bytes);
      }
      break;
    case Kind::ipc:
      free_own(pointer, allocation.mapped_bytes);
      break;
    case Kind::managed:
      unmap_managed(pointer, allocation.mapped_bytes);
      break;
    case Kind::host:
      all.rm.free(allocation.context->device->device, allocation.object);
      all.rm.give_back(allocation.object);
      ::munmap(pointer_to(pointer), allocation.mapped_bytes);
      break;
    case Kind::registered:
      all.rm.free(allocation.context->device->device, allocation.object);
      all.rm.give_back(allocation.object);
      break;
    case Kind::async:
      break;  // the pool's business
    case Kind::graph:
      if (const auto memory = all.graph_memory.find(pointer); memory != all.graph_memory.end())
        graph_detach(*memory->second, nullptr, {});
      break;
  }
}

// Managed memory is a mapping of nvidia-uvm at the offset that is its address. The twin's is a regular file,
// in which two processes with one address would meet: pages of the process's own go over it, by a system call
// of our own, as whoever watches mappings has seen all there is to see.
CUresult map_managed(std::uint64_t bytes, CUdeviceptr& base) {
  Process& all = process();
  const CUdeviceptr at = reserve_addresses(bytes);
  if (at == 0) return CUDA_ERROR_OUT_OF_MEMORY;
  if (::mmap(pointer_to(at), bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, all.uvm,
             static_cast<off_t>(at)) == MAP_FAILED) {
    free_addresses(at, bytes);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  ::syscall(SYS_mmap, at, bytes, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  base = at;
  return CUDA_SUCCESS;
}

void unmap_managed(CUdeviceptr base, std::uint64_t bytes) { ::munmap(pointer_to(base), bytes); }

}  // namespace bulkhead::twin::cuda

namespace rm = bulkhead::twin::rm;
using namespace bulkhead::twin::cuda;

EXPORT CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  ENTER(call, context);
  std::uint64_t free_now = 0, total = 0;
  if (const auto failed = memory_info(call.device(), free_now, total); failed != CUDA_SUCCESS) return failed;
  if (free_bytes != nullptr) *free_bytes = free_now;
  if (total_bytes != nullptr) *total_bytes = total;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t bytes) {
  ENTER(call, context);
  if (pointer == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  CUdeviceptr made = 0;
  if (const auto failed = allocate(call.context(), bytes, made); failed != CUDA_SUCCESS) return failed;
  *pointer = made;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAllocPitch_v2(CUdeviceptr* pointer, size_t* pitch, size_t width, size_t height,
                                   unsigned element) {
  ENTER(call, context);
  if (pointer == nullptr || pitch == nullptr || width == 0 || height == 0 ||
      (element != 4 && element != 8 && element != 16))
    return CUDA_ERROR_INVALID_VALUE;
  if (width > (1UL << 40) || height > (1UL << 40)) return CUDA_ERROR_OUT_OF_MEMORY;
  const std::uint64_t row = round_up(width, 512);
  std::uint64_t bytes = 0;
  if (__builtin_mul_overflow(row, height, &bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  CUdeviceptr made = 0;
  if (const auto failed = allocate(call.context(), bytes, made); failed != CUDA_SUCCESS) return failed;
  *pointer = made;
  *pitch = row;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer) {
  ENTER(call, context);
  if (pointer == 0) return CUDA_SUCCESS;
  Process& all = process();
  const auto before = all.allocations.find(pointer);
  if (before == all.allocations.end() || before->second.kind == Kind::host ||
      before->second.kind == Kind::registered || before->second.kind == Kind::ipc)
    return CUDA_ERROR_INVALID_VALUE;
  // Nothing may use it any more: the real call waits for the device as well.
  if (const auto failed = wait_all(call.lock(), call.context()); failed != CUDA_SUCCESS) return failed;
  const auto found = all.allocations.find(pointer);
  if (found == all.allocations.end()) return CUDA_ERROR_INVALID_VALUE;
  if (found->second.kind == Kind::async) {
    pool_free(*found->second.pool, pointer, *call.context()->legacy);
    settle_pools(call.context());
    return CUDA_SUCCESS;
  }
  release(found);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAllocManaged(CUdeviceptr* pointer, size_t bytes, unsigned flags) {
  ENTER(call, context);
  if (pointer == nullptr || bytes == 0 || (flags != 1 && flags != 2)) return CUDA_ERROR_INVALID_VALUE;
  if (bytes > (1UL << 46)) return CUDA_ERROR_OUT_OF_MEMORY;
  Allocation made;
  made.kind = Kind::managed;
  made.bytes = bytes;
  made.mapped_bytes = round_up(bytes, granule);
  made.context = call.context();
  made.id = process().next_id++;
  CUdeviceptr base = 0;
  if (const auto failed = map_managed(made.mapped_bytes, base); failed != CUDA_SUCCESS) return failed;
  process().allocations[base] = made;
  *pointer = base;
  return CUDA_SUCCESS;
}

// ---- host memory
namespace {

CUresult host_object(Device& device, std::uint64_t bytes, Handle& made) {
  Process& all = process();
  bulkhead::abi::MemoryParams params{};
  params.owner = all.rm.client();
  params.size = bytes;
  made = all.rm.take_handle();
  const auto result = all.rm.alloc(device.device, bulkhead::abi::class_system_memory, &params, made);
  if (result != CUDA_SUCCESS) all.rm.give_back(made);
  return result;
}

CUresult host_allocate(void** pointer, std::uint64_t bytes) {
  ENTER(call, context);
  if (pointer == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (bytes > (1UL << 46)) return CUDA_ERROR_OUT_OF_MEMORY;
  Allocation made;
  made.kind = Kind::host;
  made.bytes = bytes;
  made.mapped_bytes = round_up(bytes, 4096);
  made.context = call.context();
  made.id = process().next_id++;
  void* at = ::mmap(nullptr, made.mapped_bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  if (const auto failed = host_object(call.device(), made.mapped_bytes, made.object);
      failed != CUDA_SUCCESS) {
    ::munmap(at, made.mapped_bytes);
    return failed;
  }
  process().allocations[reinterpret_cast<CUdeviceptr>(at)] = made;
  *pointer = at;
  return CUDA_SUCCESS;
}

}  // namespace

EXPORT CUresult cuMemAllocHost_v2(void** pointer, size_t bytes) { return host_allocate(pointer, bytes); }
EXPORT CUresult cuMemHostAlloc(void** pointer, size_t bytes, unsigned flags) {
  return flags > 7 ? CUDA_ERROR_INVALID_VALUE : host_allocate(pointer, bytes);
}
EXPORT CUresult cuMemFreeHost(void* pointer) {
  ENTER(call, context);
  if (pointer == nullptr) return CUDA_SUCCESS;
  if (const auto failed = wait_all(call.lock(), call.context()); failed != CUDA_SUCCESS) return failed;
  const auto found = process().allocations.find(reinterpret_cast<CUdeviceptr>(pointer));
  if (found == process().allocations.end() || found->second.kind != Kind::host)
    return CUDA_ERROR_INVALID_VALUE;
  release(found);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* out, void* pointer, unsigned) {
  ENTER(call, context);
  const auto found = allocation_at(reinterpret_cast<CUdeviceptr>(pointer));
  if (out == nullptr || found == process().allocations.end() ||
      (found->second.kind != Kind::host && found->second.kind != Kind::registered))
    return CUDA_ERROR_INVALID_VALUE;
  *out = reinterpret_cast<CUdeviceptr>(pointer);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostGetFlags(unsigned* flags, void* pointer) {
  ENTER(call, context);
  const auto found = allocation_at(reinterpret_cast<CUdeviceptr>(pointer));
  if (flags == nullptr || found == process().allocations.end() || found->second.kind != Kind::host)
    return CUDA_ERROR_INVALID_VALUE;
  *flags = 2;  // mapped into device addresses, as all host memory with unified addresses
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostRegister_v2(void* pointer, size_t bytes, unsigned) {
  ENTER(call, context);
  if (pointer == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  const auto base = reinterpret_cast<CUdeviceptr>(pointer);
  const auto after = process().allocations.lower_bound(base);
  if (allocation_at(base) != process().allocations.end() ||
      (after != process().allocations.end() && after->first < base + bytes))
    return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  Allocation made;
  made.kind = Kind::registered;
  made.bytes = bytes;
  made.context = call.context();
  made.id = process().next_id++;
  if (const auto failed = host_object(call.device(), round_up(bytes, 4096), made.object);
      failed != CUDA_SUCCESS)
    return failed;
  process().allocations[base] = made;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostUnregister(void* pointer) {
  ENTER(call, context);
  const auto found = process().allocations.find(reinterpret_cast<CUdeviceptr>(pointer));
  if (found == process().allocations.end() || found->second.kind != Kind::registered)
    return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
  release(found);
  return CUDA_SUCCESS;
}

// ---- what a pointer is
EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr pointer) {
  ENTER(call, context);
  const auto found = allocation_at(pointer);
  if (found != process().allocations.end()) {
    if (base != nullptr) *base = found->first;
    if (bytes != nullptr) *bytes = found->second.bytes;
    return CUDA_SUCCESS;
  }
  auto mapping = process().mappings.upper_bound(pointer);
  if (mapping == process().mappings.begin()) return CUDA_ERROR_NOT_FOUND;
  --mapping;
  if (pointer - mapping->first >= mapping->second.bytes) return CUDA_ERROR_NOT_FOUND;
  if (base != nullptr) *base = mapping->first;
  if (bytes != nullptr) *bytes = mapping->second.bytes;
  return CUDA_SUCCESS;
}

namespace {

CUresult pointer_attribute(void* data, int attribute, CUdeviceptr pointer) {
  const auto found = allocation_at(pointer);
  Process& all = process();
  CUdeviceptr start = 0;
  std::uint64_t bytes = 0, id = 0;
  Kind kind = Kind::device;
  CUcontext context = nullptr;
  const Device* device = nullptr;
  Pool* pool = nullptr;
  if (found != all.allocations.end()) {
    start = found->first;
    bytes = found->second.bytes;
    id = found->second.id;
    kind = found->second.kind;
    context = found->second.context;
    pool = found->second.pool;
    device = pool != nullptr ? pool->device : context != nullptr ? context->device : nullptr;
  } else {
    auto mapping = all.mappings.upper_bound(pointer);
    if (mapping == all.mappings.begin()) return CUDA_ERROR_INVALID_VALUE;
    --mapping;
    if (pointer - mapping->first >= mapping->second.bytes) return CUDA_ERROR_INVALID_VALUE;
    start = mapping->first;
    bytes = mapping->second.bytes;
    id = mapping->second.backing->handle;
    device = mapping->second.backing->device;
  }
  const bool host = kind == Kind::host || kind == Kind::registered;
  const auto give = [data](auto value) {
    *static_cast<decltype(value)*>(data) = value;
    return CUDA_SUCCESS;
  };
  switch (attribute) {
    case 1:
      return context != nullptr ? give(context) : CUDA_ERROR_INVALID_VALUE;
    case 2:
      return give(static_cast<unsigned>(host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE));
    case 3:
      return give(pointer);
    case 4:
      return host || kind == Kind::managed ? give(pointer_to(pointer)) : CUDA_ERROR_INVALID_VALUE;
    case 6:
      return give(0U);
    case 7:
      return give(static_cast<unsigned long long>(id));
    case 8:
      return give(static_cast<unsigned>(kind == Kind::managed ? 1 : 0));
    case 9:
      return give(device != nullptr ? device->ordinal : 0);
    case 10:
      return give(static_cast<unsigned>(kind == Kind::device && found != all.allocations.end() ? 1 : 0));
    case 11:
      return give(start);
    case 12:
      return give(static_cast<std::size_t>(bytes));
    case 13:
      return give(1U);
    case 14:
      return give(static_cast<unsigned long long>(found == all.allocations.end() ? 1 : 0));
    case 15:
      return give(static_cast<unsigned>(host ? 0 : 1));
    case 16:
      return give(3U);
    case 17:
      return give(static_cast<void*>(pool));
    default:
      return CUDA_ERROR_NOT_SUPPORTED;
  }
}

}  // namespace

EXPORT CUresult cuPointerGetAttribute(void* data, int attribute, CUdeviceptr pointer) {
  ENTER(call, context);
  return data == nullptr ? CUDA_ERROR_INVALID_VALUE : pointer_attribute(data, attribute, pointer);
}
EXPORT CUresult cuPointerGetAttributes(unsigned count, int* attributes, void** data, CUdeviceptr pointer) {
  ENTER(call, context);
  if (attributes == nullptr || data == nullptr) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < count; ++i) {
    if (data[i] == nullptr || pointer_attribute(data[i], attributes[i], pointer) == CUDA_SUCCESS) continue;
    // A pointer of nobody's: nulls, as the real one answers, so that callers need not know whose it is.
    const bool wide = attributes[i] == 1 || attributes[i] == 3 || attributes[i] == 4 || attributes[i] == 7 ||
                      attributes[i] == 11 || attributes[i] == 12 || attributes[i] == 14 ||
                      attributes[i] == 17;
    std::memset(data[i], 0, wide ? 8 : 4);
    if (attributes[i] == 9) std::memset(data[i], 0xff, 4);
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerSetAttribute(const void*, int attribute, CUdeviceptr pointer) {
  ENTER(call, context);
  if (attribute != 6) return CUDA_ERROR_NOT_SUPPORTED;
  return allocation_at(pointer) != process().allocations.end() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

namespace {
CUresult is_managed(CUdeviceptr pointer) {
  ENTER(call, context);
  const auto found = allocation_at(pointer);
  return found != process().allocations.end() && found->second.kind == Kind::managed
             ? CUDA_SUCCESS
             : CUDA_ERROR_INVALID_VALUE;
}
}  // namespace
// Pages of managed memory have no place here: advice and prefetching are for real ones.
EXPORT CUresult cuMemAdvise(CUdeviceptr pointer, size_t, int, CUdevice) { return is_managed(pointer); }
EXPORT CUresult cuMemAdvise_v2(CUdeviceptr pointer, size_t, int, CUmemLocation) {
  return is_managed(pointer);
}
EXPORT CUresult cuMemPrefetchAsync(CUdeviceptr pointer, size_t, CUdevice, CUstream) {
  return is_managed(pointer);
}
EXPORT CUresult cuMemPrefetchAsync_v2(CUdeviceptr pointer, size_t, CUmemLocation, unsigned, CUstream) {
  return is_managed(pointer);
}

// ---- arrays
namespace {

std::uint64_t element_bytes(int format, unsigned channels) {
  if (channels != 1 && channels != 2 && channels != 4) return 0;
  switch (format) {
    case CU_AD_FORMAT_UNSIGNED_INT8:
    case CU_AD_FORMAT_SIGNED_INT8:
      return channels;
    case CU_AD_FORMAT_UNSIGNED_INT16:
    case CU_AD_FORMAT_SIGNED_INT16:
    case CU_AD_FORMAT_HALF:
      return 2UL * channels;
    case CU_AD_FORMAT_UNSIGNED_INT32:
    case CU_AD_FORMAT_SIGNED_INT32:
    case CU_AD_FORMAT_FLOAT:
      return 4UL * channels;
    default:
      return 0;
  }
}

// 0: not a size an array can have.
std::uint64_t array_bytes(const CUDA_ARRAY3D_DESCRIPTOR& of, std::uint64_t element) {
  const std::uint64_t height = std::max<std::uint64_t>(of.Height, 1),
                      depth = std::max<std::uint64_t>(of.Depth, 1);
  if (of.Width == 0 || of.Width > (1UL << 28) || height > (1UL << 17) || depth > (1UL << 14)) return 0;
  return of.Width * element * height * depth;
}

CUresult make_array(CUarray* out, const CUDA_ARRAY3D_DESCRIPTOR& descriptor) {
  ENTER(call, context);
  const std::uint64_t element = element_bytes(descriptor.Format, descriptor.NumChannels);
  const std::uint64_t bytes = element != 0 ? array_bytes(descriptor, element) : 0;
  if (out == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  auto array = std::make_unique<CUarray_st>();
  array->context = call.context();
  array->descriptor = descriptor;
  array->element = element;
  if (const auto failed = allocate(call.context(), bytes, array->base); failed != CUDA_SUCCESS) return failed;
  *out = array.get();
  process().arrays.emplace(array.get(), std::move(array));
  return CUDA_SUCCESS;
}

void release_at(CUdeviceptr base) {
  if (const auto found = process().allocations.find(base); found != process().allocations.end())
    release(found);
}

}  // namespace

EXPORT CUresult cuArrayCreate_v2(CUarray* array, const CUDA_ARRAY_DESCRIPTOR* descriptor) {
  if (descriptor == nullptr) return CUDA_ERROR_INVALID_VALUE;
  return make_array(
      array, {descriptor->Width, descriptor->Height, 0, descriptor->Format, descriptor->NumChannels, 0});
}
EXPORT CUresult cuArray3DCreate_v2(CUarray* array, const CUDA_ARRAY3D_DESCRIPTOR* descriptor) {
  return descriptor == nullptr ? CUDA_ERROR_INVALID_VALUE : make_array(array, *descriptor);
}
EXPORT CUresult cuArrayDestroy(CUarray array) {
  ENTER(call, context);
  if (process().arrays.count(array) == 0) return CUDA_ERROR_INVALID_HANDLE;
  if (const auto failed = wait_all(call.lock(), call.context()); failed != CUDA_SUCCESS) return failed;
  const auto found = process().arrays.find(array);
  if (found == process().arrays.end()) return CUDA_ERROR_INVALID_HANDLE;
  release_at(found->second->base);
  process().arrays.erase(found);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuArray3DGetDescriptor_v2(CUDA_ARRAY3D_DESCRIPTOR* descriptor, CUarray array) {
  ENTER(call, context);
  if (descriptor == nullptr || array == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *descriptor = array->descriptor;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuArrayGetDescriptor_v2(CUDA_ARRAY_DESCRIPTOR* descriptor, CUarray array) {
  ENTER(call, context);
  if (descriptor == nullptr || array == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *descriptor = {array->descriptor.Width, array->descriptor.Height, array->descriptor.Format,
                 array->descriptor.NumChannels};
  return CUDA_SUCCESS;
}
EXPORT CUresult cuArrayGetMemoryRequirements(CUDA_ARRAY_MEMORY_REQUIREMENTS* out, CUarray array, CUdevice) {
  ENTER(call, context);
  if (out == nullptr || array == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *out = {round_up(array_bytes(array->descriptor, array->element), 65536), 65536, {}};
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMipmappedArrayCreate(CUmipmappedArray* out, const CUDA_ARRAY3D_DESCRIPTOR* descriptor,
                                       unsigned levels) {
  ENTER(call, context);
  if (out == nullptr || descriptor == nullptr || levels == 0 || levels > 32) return CUDA_ERROR_INVALID_VALUE;
  const std::uint64_t element = element_bytes(descriptor->Format, descriptor->NumChannels);
  if (element == 0 || array_bytes(*descriptor, element) == 0) return CUDA_ERROR_INVALID_VALUE;
  auto mipmap = std::make_unique<CUmipmappedArray_st>();
  mipmap->context = call.context();
  mipmap->descriptor = *descriptor;
  CUDA_ARRAY3D_DESCRIPTOR level = *descriptor;
  for (unsigned i = 0; i < levels; ++i) {
    auto array = std::make_unique<CUarray_st>();
    array->context = call.context();
    array->descriptor = level;
    array->element = element;
    array->base = mipmap->bytes;  // moved to its place below
    array->owned = false;
    mipmap->bytes += round_up(array_bytes(level, element), 512);
    mipmap->levels.push_back(std::move(array));
    if (level.Width <= 1 && level.Height <= 1 && level.Depth <= 1) break;
    level.Width = std::max<std::size_t>(level.Width / 2, 1);
    if (level.Height != 0) level.Height = std::max<std::size_t>(level.Height / 2, 1);
    if (level.Depth != 0) level.Depth = std::max<std::size_t>(level.Depth / 2, 1);
  }
  if (const auto failed = allocate(call.context(), mipmap->bytes, mipmap->base); failed != CUDA_SUCCESS)
    return failed;
  for (auto& array : mipmap->levels) array->base += mipmap->base;
  *out = mipmap.get();
  process().mipmaps.emplace(mipmap.get(), std::move(mipmap));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMipmappedArrayGetLevel(CUarray* level, CUmipmappedArray mipmap, unsigned which) {
  ENTER(call, context);
  const auto found = process().mipmaps.find(mipmap);
  if (level == nullptr || found == process().mipmaps.end() || which >= found->second->levels.size())
    return CUDA_ERROR_INVALID_VALUE;
  *level = found->second->levels[which].get();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMipmappedArrayDestroy(CUmipmappedArray mipmap) {
  ENTER(call, context);
  if (process().mipmaps.count(mipmap) == 0) return CUDA_ERROR_INVALID_HANDLE;
  if (const auto failed = wait_all(call.lock(), call.context()); failed != CUDA_SUCCESS) return failed;
  const auto found = process().mipmaps.find(mipmap);
  if (found == process().mipmaps.end()) return CUDA_ERROR_INVALID_HANDLE;
  release_at(found->second->base);
  process().mipmaps.erase(found);
  return CUDA_SUCCESS;
}

// ---- virtual memory management
namespace {

Backing* vmm_of(CUmemGenericAllocationHandle handle) {
  const auto found = process().vmm.find(handle);
  return found != process().vmm.end() ? found->second.first : nullptr;
}

CUmemGenericAllocationHandle vmm_add(Backing* backing) {
  const auto handle = reinterpret_cast<CUmemGenericAllocationHandle>(backing);
  process().vmm[handle] = {backing, 1};
  return handle;
}

// Open files are how memory goes to other processes: what the exporter says with them.
struct ExportNote {
  char magic[8];
  std::uint64_t bytes;
};
constexpr char export_magic[8] = {'b', 'h', 'k', 'd', 'v', 'm', 'm', '\0'};

}  // namespace

EXPORT CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp* properties, int) {
  ENTER(call, driver);
  if (bytes == nullptr || properties == nullptr || properties->location.type != 1)
    return CUDA_ERROR_INVALID_VALUE;
  if (device_of(properties->location.id) == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  *bytes = granule;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes,
                            const CUmemAllocationProp* properties, unsigned long long flags) {
  ENTER(call, driver);
  if (handle == nullptr || properties == nullptr || flags != 0 || properties->type != 1 || bytes == 0 ||
      bytes % granule != 0)
    return CUDA_ERROR_INVALID_VALUE;
  if (properties->location.type != 1 || (properties->requestedHandleTypes & ~1) != 0)
    return CUDA_ERROR_NOT_SUPPORTED;
  Device* const device = device_of(properties->location.id);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  Backing* made = nullptr;
  if (const auto failed = make_backing(*device, bytes, made); failed != CUDA_SUCCESS) return failed;
  *handle = vmm_add(made);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  ENTER(call, driver);
  const auto found = process().vmm.find(handle);
  if (found == process().vmm.end()) return CUDA_ERROR_INVALID_VALUE;
  if (--found->second.second > 0) return CUDA_SUCCESS;
  Backing* const backing = found->second.first;
  process().vmm.erase(found);
  drop(backing);  // maps keep it
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* pointer) {
  ENTER(call, driver);
  Process& all = process();
  const auto at = reinterpret_cast<CUdeviceptr>(pointer);
  auto mapping = all.mappings.upper_bound(at);
  if (handle == nullptr || mapping == all.mappings.begin()) return CUDA_ERROR_INVALID_VALUE;
  --mapping;
  if (at - mapping->first >= mapping->second.bytes || allocation_at(at) != all.allocations.end())
    return CUDA_ERROR_INVALID_VALUE;
  Backing* const backing = mapping->second.backing;
  *handle = reinterpret_cast<CUmemGenericAllocationHandle>(backing);
  auto [entry, added] = all.vmm.try_emplace(*handle, backing, 0);
  if (added) ++backing->references;
  ++entry->second.second;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* out,
                                                       CUmemGenericAllocationHandle handle) {
  ENTER(call, driver);
  const Backing* const backing = vmm_of(handle);
  if (out == nullptr || backing == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *out = CUmemAllocationProp{};
  out->type = 1;
  out->requestedHandleTypes = 1;
  out->location = {1, backing->device->ordinal};
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemAddressReserve(CUdeviceptr* pointer, size_t bytes, size_t alignment, CUdeviceptr wanted,
                                    unsigned long long flags) {
  ENTER(call, driver);
  if (pointer == nullptr || bytes == 0 || bytes % granule != 0 || flags != 0 ||
      (alignment & (alignment - 1)) != 0)
    return CUDA_ERROR_INVALID_VALUE;
  const CUdeviceptr base = alignment <= granule ? reserve_addresses(bytes, wanted) : 0;
  if (base != 0) {
    process().reservations[base] = bytes;
    *pointer = base;
    return CUDA_SUCCESS;
  }
  if (alignment <= granule) return CUDA_ERROR_OUT_OF_MEMORY;
  const CUdeviceptr wide = reserve_addresses(bytes + alignment);
  if (wide == 0) return CUDA_ERROR_OUT_OF_MEMORY;
  const CUdeviceptr aligned = round_up(wide, alignment);
  if (aligned > wide) free_addresses(wide, aligned - wide);
  if (wide + alignment > aligned) free_addresses(aligned + bytes, wide + alignment - aligned);
  process().reservations[aligned] = bytes;
  *pointer = aligned;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemAddressFree(CUdeviceptr pointer, size_t bytes) {
  ENTER(call, driver);
  const auto found = process().reservations.find(pointer);
  if (found == process().reservations.end() || found->second != bytes) return CUDA_ERROR_INVALID_VALUE;
  const auto inside = process().mappings.lower_bound(pointer);
  if (inside != process().mappings.end() && inside->first < pointer + bytes)
    return CUDA_ERROR_INVALID_VALUE;  // still mapped
  process().reservations.erase(found);
  free_addresses(pointer, bytes);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemMap(CUdeviceptr pointer, size_t bytes, size_t offset,
                         CUmemGenericAllocationHandle handle, unsigned long long flags) {
  ENTER(call, driver);
  Process& all = process();
  Backing* const backing = vmm_of(handle);
  if (backing == nullptr || flags != 0 || bytes == 0 || bytes % granule != 0 || pointer % granule != 0 ||
      offset % granule != 0 || offset > backing->bytes || bytes > backing->bytes - offset)
    return CUDA_ERROR_INVALID_VALUE;
  auto reservation = all.reservations.upper_bound(pointer);
  if (reservation == all.reservations.begin()) return CUDA_ERROR_INVALID_VALUE;
  --reservation;
  if (pointer + bytes > reservation->first + reservation->second) return CUDA_ERROR_INVALID_VALUE;
  const auto next = all.mappings.lower_bound(pointer);
  if (next != all.mappings.end() && next->first < pointer + bytes) return CUDA_ERROR_INVALID_VALUE;
  if (next != all.mappings.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second.bytes > pointer) return CUDA_ERROR_INVALID_VALUE;
  }
  ++backing->references;
  map(pointer, backing, offset, bytes);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemUnmap(CUdeviceptr pointer, size_t bytes) {
  ENTER(call, driver);
  Process& all = process();
  for (CUcontext context : all.contexts) {
    if (context->alive) static_cast<void>(wait_all(call.lock(), context));
  }
  // Whole mappings only.
  auto first = all.mappings.find(pointer);
  CUdeviceptr end = pointer;
  for (auto it = first; it != all.mappings.end() && it->first == end && end < pointer + bytes; ++it)
    end += it->second.bytes;
  if (first == all.mappings.end() || end != pointer + bytes ||
      allocation_at(pointer) != all.allocations.end())
    return CUDA_ERROR_INVALID_VALUE;
  while (first != all.mappings.end() && first->first < end) {
    drop(first->second.backing);
    first = all.mappings.erase(first);
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemSetAccess(CUdeviceptr pointer, size_t bytes, const CUmemAccessDesc* access,
                               size_t count) {
  ENTER(call, driver);
  if (access == nullptr || count == 0 || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  CUdeviceptr end = pointer;
  for (auto it = process().mappings.find(pointer);
       it != process().mappings.end() && it->first == end && end < pointer + bytes; ++it)
    end += it->second.bytes;
  return end >= pointer + bytes ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult cuMemGetAccess(unsigned long long* flags, const CUmemLocation* location,
                               CUdeviceptr pointer) {
  ENTER(call, driver);
  if (flags == nullptr || location == nullptr) return CUDA_ERROR_INVALID_VALUE;
  auto mapping = process().mappings.upper_bound(pointer);
  if (mapping == process().mappings.begin()) return CUDA_ERROR_INVALID_VALUE;
  --mapping;
  if (pointer - mapping->first >= mapping->second.bytes) return CUDA_ERROR_INVALID_VALUE;
  *flags = location->type == 1 && location->id == mapping->second.backing->device->ordinal ? 3 : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemExportToShareableHandle(void* shareable, CUmemGenericAllocationHandle handle, int type,
                                             unsigned long long flags) {
  ENTER(call, driver);
  Process& all = process();
  const Backing* const backing = vmm_of(handle);
  if (shareable == nullptr || backing == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (type != 1) return CUDA_ERROR_NOT_SUPPORTED;
  const int file = ::open((all.rm.root() + "/dev/nvidiactl").c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  bulkhead::abi::ExportObjects params{};
  params.fd = file;
  params.device = backing->device->gpu;
  params.max_objects = 1;
  params.count = 1;
  params.objects[0] = backing->handle;
  ExportNote note{};
  std::memcpy(note.magic, export_magic, sizeof note.magic);
  note.bytes = backing->bytes;
  std::memcpy(params.metadata, &note, sizeof note);
  if (const auto failed = all.rm.control(0, bulkhead::abi::cmd_export_objects_to_fd, &params, sizeof params);
      failed != CUDA_SUCCESS) {
    ::close(file);
    return failed;
  }
  std::memcpy(shareable, &file, sizeof file);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* shareable,
                                               int type) {
  ENTER(call, driver);
  Process& all = process();
  if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (type != 1) return CUDA_ERROR_NOT_SUPPORTED;
  const int file = static_cast<int>(reinterpret_cast<std::intptr_t>(shareable));
  rm::ExportInfo info{};
  info.fd = file;
  if (all.rm.control(0, rm::cmd_get_export_info, &info, sizeof info) != CUDA_SUCCESS)
    return CUDA_ERROR_INVALID_VALUE;
  ExportNote note{};
  std::memcpy(&note, info.metadata, sizeof note);
  if (std::memcmp(note.magic, export_magic, sizeof note.magic) != 0) return CUDA_ERROR_INVALID_VALUE;
  Device* device = nullptr;
  for (auto& candidate : all.devices) {
    if (candidate->gpu == info.device) device = candidate.get();
  }
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  rm::ImportObjects params{};
  params.fd = file;
  params.parent = device->device;
  params.objects[0] = all.rm.take_handle();
  params.count = 1;
  if (const auto failed =
          all.rm.control(0, bulkhead::abi::cmd_import_objects_from_fd, &params, sizeof params);
      failed != CUDA_SUCCESS) {
    all.rm.give_back(params.objects[0]);
    return failed == CUDA_ERROR_OUT_OF_MEMORY ? failed : CUDA_ERROR_INVALID_VALUE;
  }
  *handle = vmm_add(add_backing(*device, params.objects[0], note.bytes));
  return CUDA_SUCCESS;
}

// ---- IPC
namespace {
struct IpcNote {  // what a CUipcMemHandle says
  char magic[8];
  std::uint32_t client, object, gpu, pid;
  std::uint64_t backing_bytes, offset, bytes;
};
static_assert(sizeof(IpcNote) <= sizeof(CUipcMemHandle));
constexpr char ipc_magic[8] = {'b', 'h', 'k', 'd', 'i', 'p', 'c', '\0'};
}  // namespace

EXPORT CUresult cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr pointer) {
  ENTER(call, context);
  Process& all = process();
  const auto found = allocation_at(pointer);
  if (handle == nullptr || found == all.allocations.end() || found->second.kind != Kind::device)
    return CUDA_ERROR_INVALID_VALUE;
  auto mapping = all.mappings.upper_bound(pointer);
  --mapping;
  const Backing* const backing = mapping->second.backing;
  all.rm.lend(backing->handle);
  IpcNote note{};
  std::memcpy(note.magic, ipc_magic, sizeof note.magic);
  note.client = all.rm.client();
  note.object = backing->handle;
  note.gpu = backing->device->gpu;
  note.pid = static_cast<std::uint32_t>(::getpid());
  note.backing_bytes = backing->bytes;
  note.offset = found->first - mapping->first;
  note.bytes = found->second.bytes;
  std::memset(handle, 0, sizeof *handle);
  std::memcpy(handle->reserved, &note, sizeof note);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuIpcOpenMemHandle_v2(CUdeviceptr* pointer, CUipcMemHandle handle, unsigned flags) {
  ENTER(call, context);
  Process& all = process();
  IpcNote note{};
  std::memcpy(&note, handle.reserved, sizeof note);
  if (pointer == nullptr || flags > 1 || std::memcmp(note.magic, ipc_magic, sizeof note.magic) != 0)
    return CUDA_ERROR_INVALID_VALUE;
  if (note.pid == static_cast<std::uint32_t>(::getpid()))
    return CUDA_ERROR_INVALID_CONTEXT;  // one's own is not opened
  if (note.gpu != call.device().gpu) return CUDA_ERROR_INVALID_DEVICE;
  const std::uint64_t source = static_cast<std::uint64_t>(note.client) << 32U | note.object;
  for (auto& [base, allocation] : all.allocations) {
    if (allocation.kind != Kind::ipc || allocation.ipc_source != source ||
        allocation.context != call.context())
      continue;
    ++allocation.opens;
    *pointer = base + note.offset;
    return CUDA_SUCCESS;
  }
  Handle object = 0;
  if (const auto failed = all.rm.duplicate(call.device().device, note.client, note.object, object);
      failed != CUDA_SUCCESS)
    return failed == CUDA_ERROR_OUT_OF_MEMORY
               ? failed
               : CUDA_ERROR_INVALID_VALUE;  // its owner has freed it, or has ended
  Backing* const backing = add_backing(call.device(), object, note.backing_bytes);
  const CUdeviceptr base = reserve_addresses(backing->bytes);
  if (base == 0) {
    drop(backing);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  map(base, backing, 0, backing->bytes);
  Allocation made;
  made.kind = Kind::ipc;
  made.context = call.context();
  made.bytes = made.mapped_bytes = backing->bytes;
  made.ipc_source = source;
  made.id = all.next_id++;
  all.allocations[base] = made;
  *pointer = base + note.offset;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuIpcOpenMemHandle(CUdeviceptr* pointer, CUipcMemHandle handle, unsigned flags) {
  return cuIpcOpenMemHandle_v2(pointer, handle, flags);
}
EXPORT CUresult cuIpcCloseMemHandle(CUdeviceptr pointer) {
  ENTER(call, context);
  const auto found = allocation_at(pointer);
  if (found == process().allocations.end() || found->second.kind != Kind::ipc)
    return CUDA_ERROR_INVALID_VALUE;
  if (--found->second.opens == 0) release(found);
  return CUDA_SUCCESS;
}
