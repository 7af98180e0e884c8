// Stream-ordered memory: pools reserve 32 MiB at a time (as seen on an H100) and keep what is beyond their
// threshold until the program waits for something. Graphs have a cache of the same pieces, kept until it is
// trimmed.
#include <algorithm>

#include "twin/cuda/driver.hpp"

namespace bulkhead::twin::cuda {

namespace {

bool settled(const Block& block) {
  return !block.used && (block.context == nullptr || done(block.context, block.freed));
}

void join(PoolRegion& region) {  // neighbours that are free and settled
  for (auto it = region.blocks.begin(); it != region.blocks.end();) {
    const auto next = std::next(it);
    if (next == region.blocks.end()) break;
    if (settled(it->second) && settled(next->second)) {
      it->second.bytes += next->second.bytes;
      it->second.context = nullptr;
      region.blocks.erase(next);
    } else {
      it = next;
    }
  }
}

bool unused(const PoolRegion& region) {
  return std::all_of(region.blocks.begin(), region.blocks.end(),
                     [](const auto& entry) { return settled(entry.second); });
}

void free_chunks(CUdeviceptr base, std::vector<Backing*>& chunks) {
  CUdeviceptr at = base;
  for (Backing* chunk : chunks) {
    unmap(at);
    at += chunk->bytes;
    drop(chunk);
  }
  chunks.clear();
}

void free_region(Pool& pool, PoolRegion& region) {
  const std::uint64_t bytes = region.chunks.size() * pool_granule;
  free_chunks(region.base, region.chunks);
  free_addresses(region.base, bytes);
  pool.reserved -= bytes;
}

CUresult add_region(Pool& pool, std::uint64_t bytes) {
  auto region = std::make_unique<PoolRegion>();
  const std::uint64_t reserve = round_up(bytes, pool_granule);
  if (pool.max_bytes != 0 && pool.reserved + reserve > pool.max_bytes) return CUDA_ERROR_OUT_OF_MEMORY;
  for (std::uint64_t at = 0; at < reserve; at += pool_granule) {
    Backing* chunk = nullptr;
    if (const auto failed = make_backing(*pool.device, pool_granule, chunk); failed != CUDA_SUCCESS) {
      for (Backing* made : region->chunks) drop(made);
      return failed;
    }
    region->chunks.push_back(chunk);
  }
  region->base = reserve_addresses(reserve);
  if (region->base == 0) {
    for (Backing* made : region->chunks) drop(made);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  CUdeviceptr at = region->base;
  for (Backing* chunk : region->chunks) {
    map(at, chunk, 0, chunk->bytes);
    at += chunk->bytes;
  }
  region->blocks[0].bytes = reserve;
  pool.reserved += reserve;
  pool.reserved_high = std::max(pool.reserved_high, pool.reserved);
  pool.regions.push_back(std::move(region));
  return CUDA_SUCCESS;
}

bool take(Pool& pool, const CUstream_st& stream, std::uint64_t bytes, CUdeviceptr& pointer) {
  for (auto& region : pool.regions) {
    join(*region);
    for (auto& [offset, block] : region->blocks) {
      // What this stream freed is free for what comes later in this stream.
      if (block.used || block.bytes < bytes || !(settled(block) || block.stream == &stream)) continue;
      if (block.bytes > bytes) {
        Block rest = block;
        rest.bytes -= bytes;
        region->blocks[offset + bytes] = rest;
      }
      block.bytes = bytes;
      block.used = true;
      block.context = nullptr;
      pointer = region->base + offset;
      return true;
    }
  }
  return false;
}

template <class Do>
void for_each_pool(const Device& device, Do&& what) {
  for (auto& candidate : process().devices) {
    if (candidate.get() == &device) what(candidate->default_pool);
  }
  for (const auto& pool : process().pools) {
    if (pool->device == &device) what(*pool);
  }
}

}  // namespace

CUresult pool_allocate(Pool& pool, CUstream_st& stream, std::uint64_t bytes, CUdeviceptr& pointer) {
  if (bytes > (1UL << 47)) return CUDA_ERROR_OUT_OF_MEMORY;
  const std::uint64_t size = round_up(bytes, 512);
  if (!take(pool, stream, size, pointer)) {
    if (const auto failed = add_region(pool, size); failed != CUDA_SUCCESS) return failed;
    if (!take(pool, stream, size, pointer)) return CUDA_ERROR_OUT_OF_MEMORY;
  }
  Allocation made;
  made.kind = Kind::async;
  made.bytes = bytes;
  made.mapped_bytes = size;
  made.context = stream.context;
  made.pool = &pool;
  made.id = process().next_id++;
  process().allocations[pointer] = made;
  pool.used += size;
  pool.used_high = std::max(pool.used_high, pool.used);
  return CUDA_SUCCESS;
}

void pool_free(Pool& pool, CUdeviceptr pointer, CUstream_st& stream) {
  for (auto& region : pool.regions) {
    if (pointer - region->base >= region->chunks.size() * pool_granule) continue;
    const auto block = region->blocks.find(pointer - region->base);
    if (block == region->blocks.end() || !block->second.used) return;
    block->second.used = false;
    block->second.context = stream.context;
    block->second.stream = &stream;
    block->second.freed = stream.last;
    pool.used -= block->second.bytes;
    process().allocations.erase(pointer);
    return;
  }
}

void pool_trim(Pool& pool, std::uint64_t keep) {
  for (std::size_t i = pool.regions.size(); i-- > 0 && pool.reserved > keep;) {
    if (!unused(*pool.regions[i])) continue;
    free_region(pool, *pool.regions[i]);
    pool.regions.erase(pool.regions.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void pool_empty(Pool& pool) {
  std::erase_if(process().allocations, [&](const auto& entry) { return entry.second.pool == &pool; });
  for (auto& region : pool.regions) free_region(pool, *region);
  pool.regions.clear();
  pool.used = 0;
}

void settle_pools(CUcontext context) {
  for_each_pool(*context->device, [](Pool& pool) {
    if (pool.reserved > pool.threshold) pool_trim(pool, pool.threshold);
  });
}

// Before memory is refused: what is only kept for later goes.
void trim_everything(Device& device) {
  for_each_pool(device, [](Pool& pool) { pool_trim(pool, 0); });
  graph_cache_trim(device);
}

void graph_cache_trim(Device& device) {
  if (device.graph_cache_context != nullptr && !done(device.graph_cache_context, device.graph_cache_free))
    return;
  for (Backing* chunk : device.graph_cache) {
    device.graph_reserved -= chunk->bytes;
    drop(chunk);
  }
  device.graph_cache.clear();
}

CUresult graph_attach(GraphMemory& memory) {
  Device& device = *memory.device;
  std::vector<Backing*> chunks;
  for (std::uint64_t at = 0; at < memory.mapped_bytes; at += pool_granule) {
    Backing* chunk = nullptr;
    if (!device.graph_cache.empty()) {
      chunk = device.graph_cache.back();
      device.graph_cache.pop_back();
    } else if (const auto failed = make_backing(device, pool_granule, chunk); failed != CUDA_SUCCESS) {
      for (Backing* made : chunks) device.graph_cache.push_back(made);
      return failed;
    } else {
      device.graph_reserved += pool_granule;
      device.graph_reserved_high = std::max(device.graph_reserved_high, device.graph_reserved);
    }
    chunks.push_back(chunk);
  }
  memory.chunks = std::move(chunks);
  CUdeviceptr at = memory.base;
  for (Backing* chunk : memory.chunks) {
    map(at, chunk, 0, chunk->bytes);
    at += chunk->bytes;
  }
  device.graph_used += memory.bytes;
  device.graph_used_high = std::max(device.graph_used_high, device.graph_used);
  return CUDA_SUCCESS;
}

void graph_detach(GraphMemory& memory, CUcontext context, Point when) {
  if (memory.chunks.empty()) return;
  Device& device = *memory.device;
  CUdeviceptr at = memory.base;
  for (Backing* chunk : memory.chunks) {
    unmap(at);
    at += chunk->bytes;
    device.graph_cache.push_back(chunk);
  }
  memory.chunks.clear();
  device.graph_used -= memory.bytes;
  if (context != nullptr) {
    device.graph_cache_context = context;
    device.graph_cache_free = when;
  }
  process().allocations.erase(memory.base);
}

GraphMemory::~GraphMemory() {
  graph_detach(*this, nullptr, {});
  if (base != 0) free_addresses(base, mapped_bytes);
}

}  // namespace bulkhead::twin::cuda

using namespace bulkhead::twin::cuda;

namespace {

Pool* find_pool(CUmemoryPool handle) {
  auto* const pool = reinterpret_cast<Pool*>(handle);
  for (const auto& device : process().devices) {
    if (pool == &device->default_pool) return pool;
  }
  for (const auto& owned : process().pools) {
    if (pool == owned.get()) return pool;
  }
  return nullptr;
}
CUmemoryPool handle_of(Pool* pool) { return reinterpret_cast<CUmemoryPool>(pool); }

CUresult allocate_async(CUdeviceptr* pointer, std::uint64_t bytes, Pool* pool, CUstream handle) {
  ENTER(call, context);
  const auto stream = find_stream(call.context(), handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (pool == nullptr) pool = stream->context->device->pool;
  if (pointer == nullptr || bytes == 0 || find_pool(handle_of(pool)) == nullptr)
    return CUDA_ERROR_INVALID_VALUE;
  if (stream->capture != nullptr) {
    CUgraphNode const node = capture_node(*stream, CU_GRAPH_NODE_TYPE_MEM_ALLOC);
    node->memory = std::make_shared<GraphMemory>();
    node->memory->device = pool->device;
    node->memory->bytes = bytes;
    node->memory->mapped_bytes = round_up(bytes, pool_granule);
    node->memory->base = reserve_addresses(node->memory->mapped_bytes);
    if (node->memory->base == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    node->alloc.bytesize = bytes;
    node->alloc.dptr = node->memory->base;
    process().graph_memory[node->memory->base] = node->memory;
    *pointer = node->memory->base;
    return CUDA_SUCCESS;
  }
  CUdeviceptr made = 0;
  if (const auto failed = pool_allocate(*pool, *stream, bytes, made); failed != CUDA_SUCCESS) return failed;
  *pointer = made;
  return CUDA_SUCCESS;
}

}  // namespace

EXPORT CUresult cuMemAllocAsync(CUdeviceptr* pointer, size_t bytes, CUstream stream) {
  return allocate_async(pointer, bytes, nullptr, stream);
}
EXPORT CUresult cuMemAllocFromPoolAsync(CUdeviceptr* pointer, size_t bytes, CUmemoryPool pool,
                                        CUstream stream) {
  return pool == nullptr ? CUDA_ERROR_INVALID_VALUE
                         : allocate_async(pointer, bytes, reinterpret_cast<Pool*>(pool), stream);
}
EXPORT CUresult cuMemFreeAsync(CUdeviceptr pointer, CUstream handle) {
  ENTER(call, context);
  const auto stream = find_stream(call.context(), handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (pointer == 0) return CUDA_SUCCESS;
  Process& all = process();
  if (stream->capture != nullptr) {
    capture_node(*stream, CU_GRAPH_NODE_TYPE_MEM_FREE)->pointer = pointer;
    return CUDA_SUCCESS;
  }
  const auto found = all.allocations.find(pointer);
  if (found == all.allocations.end()) return CUDA_ERROR_INVALID_VALUE;
  switch (found->second.kind) {
    case Kind::async:
      pool_free(*found->second.pool, pointer, *stream);
      return CUDA_SUCCESS;
    case Kind::graph: {
      const auto memory = all.graph_memory.at(pointer);
      graph_detach(*memory, stream->context, stream->last);
      return CUDA_SUCCESS;
    }
    case Kind::device:  // allowed; it is freed when the stream is there
      return do_in_order(call.lock(), stream, [pointer, stream](Lock& lock) {
        static_cast<void>(wait(lock, stream->context, {stream->last.ticket, 0}));
        if (const auto still = process().allocations.find(pointer); still != process().allocations.end())
          release(still);
      });
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

EXPORT CUresult cuMemPoolCreate(CUmemoryPool* out, const CUmemPoolProps* properties) {
  ENTER(call, driver);
  if (out == nullptr || properties == nullptr || properties->allocType != 1) return CUDA_ERROR_INVALID_VALUE;
  if (properties->location.type != 1 || (properties->handleTypes & ~1) != 0) return CUDA_ERROR_NOT_SUPPORTED;
  Device* const device = device_of(properties->location.id);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  auto pool = std::make_unique<Pool>();
  pool->device = device;
  pool->handle_types = properties->handleTypes;
  pool->max_bytes = properties->maxSize;
  *out = handle_of(pool.get());
  process().pools.insert(std::move(pool));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolDestroy(CUmemoryPool handle) {
  ENTER(call, driver);
  Pool* const pool = find_pool(handle);
  if (pool == nullptr || pool->is_default) return CUDA_ERROR_INVALID_VALUE;
  if (pool->device->pool == pool) pool->device->pool = &pool->device->default_pool;
  for (CUcontext context : process().contexts) {
    if (context->alive && context->device == pool->device) static_cast<void>(wait_all(call.lock(), context));
  }
  pool_empty(*pool);
  for (auto it = process().pools.begin(); it != process().pools.end(); ++it) {
    if (it->get() != pool) continue;
    process().pools.erase(it);
    break;
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolTrimTo(CUmemoryPool handle, size_t keep) {
  ENTER(call, driver);
  Pool* const pool = find_pool(handle);
  if (pool == nullptr) return CUDA_ERROR_INVALID_VALUE;
  pool_trim(*pool, keep);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolSetAttribute(CUmemoryPool handle, int attribute, void* value) {
  ENTER(call, driver);
  Pool* const pool = find_pool(handle);
  if (pool == nullptr || value == nullptr) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES:
      pool->flags[attribute - 1] = static_cast<std::uint64_t>(*static_cast<int*>(value));
      return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD:
      pool->threshold = *static_cast<std::uint64_t*>(value);
      return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH:
    case CU_MEMPOOL_ATTR_USED_MEM_HIGH:
      if (*static_cast<std::uint64_t*>(value) != 0) return CUDA_ERROR_INVALID_VALUE;
      (attribute == CU_MEMPOOL_ATTR_USED_MEM_HIGH ? pool->used_high : pool->reserved_high) =
          attribute == CU_MEMPOOL_ATTR_USED_MEM_HIGH ? pool->used : pool->reserved;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}
EXPORT CUresult cuMemPoolGetAttribute(CUmemoryPool handle, int attribute, void* value) {
  ENTER(call, driver);
  Pool* const pool = find_pool(handle);
  if (pool == nullptr || value == nullptr) return CUDA_ERROR_INVALID_VALUE;
  auto& wide = *static_cast<std::uint64_t*>(value);
  switch (attribute) {
    case CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES:
      *static_cast<int*>(value) = static_cast<int>(pool->flags[attribute - 1]);
      return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD:
      wide = pool->threshold;
      return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT:
      wide = pool->reserved;
      return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH:
      wide = pool->reserved_high;
      return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_USED_MEM_CURRENT:
      wide = pool->used;
      return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_USED_MEM_HIGH:
      wide = pool->used_high;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}
EXPORT CUresult cuMemPoolSetAccess(CUmemoryPool handle, const CUmemAccessDesc* access, size_t count) {
  ENTER(call, driver);
  return find_pool(handle) == nullptr || (access == nullptr && count != 0) ? CUDA_ERROR_INVALID_VALUE
                                                                           : CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolGetAccess(int* flags, CUmemoryPool handle, CUmemLocation* location) {
  ENTER(call, driver);
  const Pool* const pool = find_pool(handle);
  if (pool == nullptr || flags == nullptr || location == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *flags = location->type == 1 && location->id == pool->device->ordinal ? 3 : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice ordinal) {
  ENTER(call, driver);
  Device* const device = device_of(ordinal);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  if (pool == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *pool = handle_of(&device->default_pool);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice ordinal) {
  ENTER(call, driver);
  Device* const device = device_of(ordinal);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  if (pool == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *pool = handle_of(device->pool);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceSetMemPool(CUdevice ordinal, CUmemoryPool handle) {
  ENTER(call, driver);
  Device* const device = device_of(ordinal);
  Pool* const pool = find_pool(handle);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  if (pool == nullptr || pool->device != device) return CUDA_ERROR_INVALID_VALUE;
  device->pool = pool;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGraphMemTrim(CUdevice ordinal) {
  ENTER(call, driver);
  Device* const device = device_of(ordinal);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  graph_cache_trim(*device);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetGraphMemAttribute(CUdevice ordinal, int attribute, void* value) {
  ENTER(call, driver);
  const Device* const device = device_of(ordinal);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  if (value == nullptr || attribute < 0 || attribute > 3) return CUDA_ERROR_INVALID_VALUE;
  const std::uint64_t values[] = {device->graph_used, device->graph_used_high, device->graph_reserved,
                                  device->graph_reserved_high};
  *static_cast<std::uint64_t*>(value) = values[attribute];
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceSetGraphMemAttribute(CUdevice ordinal, int attribute, void* value) {
  ENTER(call, driver);
  Device* const device = device_of(ordinal);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  if (value == nullptr || (attribute != 1 && attribute != 3)) return CUDA_ERROR_INVALID_VALUE;
  (attribute == 1 ? device->graph_used_high : device->graph_reserved_high) =
      attribute == 1 ? device->graph_used : device->graph_reserved;
  return CUDA_SUCCESS;
}

// The same by place and type of memory: devices have pools of pinned memory, nothing else has any.
namespace {
CUresult device_at(const CUmemLocation* location, int type, CUdevice& ordinal) {
  if (location == nullptr || type != 1) return CUDA_ERROR_INVALID_VALUE;
  if (location->type != 1) return CUDA_ERROR_NOT_SUPPORTED;
  ordinal = location->id;
  return CUDA_SUCCESS;
}
}  // namespace
EXPORT CUresult cuMemGetDefaultMemPool(CUmemoryPool* pool, CUmemLocation* location, int type) {
  CUdevice ordinal = 0;
  const auto failed = device_at(location, type, ordinal);
  return failed != CUDA_SUCCESS ? failed : cuDeviceGetDefaultMemPool(pool, ordinal);
}
EXPORT CUresult cuMemGetMemPool(CUmemoryPool* pool, CUmemLocation* location, int type) {
  CUdevice ordinal = 0;
  const auto failed = device_at(location, type, ordinal);
  return failed != CUDA_SUCCESS ? failed : cuDeviceGetMemPool(pool, ordinal);
}
EXPORT CUresult cuMemSetMemPool(CUmemLocation* location, int type, CUmemoryPool pool) {
  CUdevice ordinal = 0;
  const auto failed = device_at(location, type, ordinal);
  return failed != CUDA_SUCCESS ? failed : cuDeviceSetMemPool(ordinal, pool);
}
