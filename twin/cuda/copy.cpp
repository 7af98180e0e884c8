// What device memory contains. The beginning of what was written is kept, enough for small buffers to come
// back as they went; a trainer's gigabytes would be the host's, so the rest reads as zeros.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "twin/cuda/driver.hpp"

namespace bulkhead::twin::cuda {

namespace {

constexpr std::uint64_t kept_of_one = 16UL << 20, kept_in_all = 1UL << 30;

struct Piece {
  char* at = nullptr;  // null: device memory nothing is kept of
  std::uint64_t bytes = 0;
  Backing* backing = nullptr;
  std::uint64_t offset = 0;
};

Piece piece_at(std::uint64_t address, std::uint64_t bytes) {
  const auto& mappings = process().mappings;
  auto after = mappings.upper_bound(address);
  if (after != mappings.begin()) {
    const auto& [base, mapping] = *std::prev(after);
    if (address - base < mapping.bytes) {
      Piece piece;
      piece.bytes = std::min<std::uint64_t>(bytes, mapping.bytes - (address - base));
      piece.backing = mapping.backing;
      piece.offset = mapping.offset + (address - base);
      if (piece.backing->content != nullptr && piece.offset < piece.backing->content_bytes) {
        piece.at = piece.backing->content + piece.offset;
        piece.bytes = std::min(piece.bytes, piece.backing->content_bytes - piece.offset);
      }
      return piece;
    }
  }
  // The host's: up to where device memory begins.
  if (after != mappings.end()) bytes = std::min<std::uint64_t>(bytes, after->first - address);
  return {reinterpret_cast<char*>(address), bytes, nullptr, 0};  // NOLINT(performance-no-int-to-ptr)
}

// To write something into: memory is made for it while there is room.
Piece writable_at(std::uint64_t address, std::uint64_t bytes) {
  Piece piece = piece_at(address, bytes);
  if (piece.at != nullptr || piece.backing->content != nullptr || piece.offset >= kept_of_one) return piece;
  const std::uint64_t keep = std::min(piece.backing->bytes, kept_of_one);
  if (process().content_bytes + keep > kept_in_all) return piece;
  void* made =
      ::mmap(nullptr, keep, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) return piece;
  piece.backing->content = static_cast<char*>(made);
  piece.backing->content_bytes = keep;
  process().content_bytes += keep;
  return piece_at(address, bytes);
}

bool zeros(const char* at, std::uint64_t bytes) {
  return at == nullptr ||
         std::all_of(at, at + std::min<std::uint64_t>(bytes, 4096), [](char c) { return c == 0; });
}

}  // namespace

void copy_bytes(std::uint64_t to, std::uint64_t from, std::uint64_t bytes) {
  while (bytes > 0) {
    const Piece source = piece_at(from, bytes);
    Piece target = source.at != nullptr ? writable_at(to, source.bytes) : piece_at(to, source.bytes);
    const std::uint64_t step = std::min(source.bytes, target.bytes);
    if (target.at != nullptr) {
      if (source.at != nullptr) {
        std::memmove(target.at, source.at, step);
      } else {
        std::memset(target.at, 0, step);
      }
    }
    to += step;
    from += step;
    bytes -= step;
  }
}

namespace {

void fill(std::uint64_t to, const char* pattern, unsigned element, std::uint64_t bytes) {
  const bool zero = zeros(pattern, element);
  while (bytes > 0) {
    const Piece target = zero ? piece_at(to, bytes) : writable_at(to, bytes);
    if (target.at != nullptr) {
      if (element == 1) {
        std::memset(target.at, pattern[0], target.bytes);
      } else {
        for (std::uint64_t i = 0; i < target.bytes; ++i) target.at[i] = pattern[(to + i) % element];
      }
    }
    to += target.bytes;
    bytes -= target.bytes;
  }
}

}  // namespace

void set_bytes(const CUDA_MEMSET_NODE_PARAMS& set) {
  char pattern[4];
  std::memcpy(pattern, &set.value, sizeof pattern);
  const std::uint64_t row = set.width * set.elementSize;
  if (set.height <= 1 || set.pitch == row) {
    fill(set.dst, pattern, set.elementSize, row * std::max<std::uint64_t>(set.height, 1));
    return;
  }
  for (std::uint64_t y = 0; y < set.height; ++y) fill(set.dst + y * set.pitch, pattern, set.elementSize, row);
}

CUDA_MEMCPY3D as_3d(const CUDA_MEMCPY2D& from) {
  CUDA_MEMCPY3D copy{};
  copy.srcXInBytes = from.srcXInBytes;
  copy.srcY = from.srcY;
  copy.srcMemoryType = from.srcMemoryType;
  copy.srcHost = from.srcHost;
  copy.srcDevice = from.srcDevice;
  copy.srcArray = from.srcArray;
  copy.srcPitch = from.srcPitch;
  copy.dstXInBytes = from.dstXInBytes;
  copy.dstY = from.dstY;
  copy.dstMemoryType = from.dstMemoryType;
  copy.dstHost = from.dstHost;
  copy.dstDevice = from.dstDevice;
  copy.dstArray = from.dstArray;
  copy.dstPitch = from.dstPitch;
  copy.WidthInBytes = from.WidthInBytes;
  copy.Height = from.Height;
  copy.Depth = 1;
  return copy;
}

namespace {

struct Side {
  std::uint64_t base = 0, pitch = 0, height = 0;
};

Side side(int type, const void* host, CUdeviceptr device, CUarray array, std::uint64_t pitch,
          std::uint64_t height, std::uint64_t x, std::uint64_t y, std::uint64_t z, std::uint64_t width) {
  Side out;
  out.pitch = pitch != 0 ? pitch : width;
  out.height = height != 0 ? height : 1;
  switch (type) {
    case CU_MEMORYTYPE_HOST:
      out.base = reinterpret_cast<std::uint64_t>(host);
      break;
    case CU_MEMORYTYPE_ARRAY:
      if (array == nullptr) return {};
      out.base = array->base;
      out.pitch = array->descriptor.Width * array->element;
      out.height = std::max<std::uint64_t>(array->descriptor.Height, 1);
      break;
    default:
      out.base = device;
      break;
  }
  if (out.base != 0) out.base += (z * out.height + y) * out.pitch + x;
  return out;
}

}  // namespace

void copy_3d(const CUDA_MEMCPY3D& c) {
  const Side from = side(c.srcMemoryType, c.srcHost, c.srcDevice, c.srcArray, c.srcPitch, c.srcHeight,
                         c.srcXInBytes, c.srcY, c.srcZ, c.WidthInBytes);
  const Side to = side(c.dstMemoryType, c.dstHost, c.dstDevice, c.dstArray, c.dstPitch, c.dstHeight,
                       c.dstXInBytes, c.dstY, c.dstZ, c.WidthInBytes);
  if (from.base == 0 || to.base == 0) return;
  const std::uint64_t height = std::max<std::uint64_t>(c.Height, 1),
                      depth = std::max<std::uint64_t>(c.Depth, 1);
  for (std::uint64_t z = 0; z < depth; ++z) {
    if (from.pitch == c.WidthInBytes && to.pitch == c.WidthInBytes) {
      copy_bytes(to.base + z * to.height * to.pitch, from.base + z * from.height * from.pitch,
                 c.WidthInBytes * height);
      continue;
    }
    for (std::uint64_t y = 0; y < height; ++y)
      copy_bytes(to.base + (z * to.height + y) * to.pitch, from.base + (z * from.height + y) * from.pitch,
                 c.WidthInBytes);
  }
}

}  // namespace bulkhead::twin::cuda

using namespace bulkhead::twin::cuda;

namespace {

enum class Must { wait, not_wait };

// Copies have engines of their own and take none of the time that channel groups share.
CUresult copy(const CUDA_MEMCPY3D& what, CUstream handle, Must must) {
  ENTER(call, context);
  const auto stream = find_stream(call.context(), handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  for (const int type : {what.srcMemoryType, what.dstMemoryType}) {
    if (type < CU_MEMORYTYPE_HOST || type > CU_MEMORYTYPE_UNIFIED) return CUDA_ERROR_INVALID_VALUE;
  }
  if (what.WidthInBytes == 0 || what.Height == 0 || what.Depth == 0) return CUDA_SUCCESS;
  if (stream->capture != nullptr && must == Must::not_wait) {
    capture_node(*stream, CU_GRAPH_NODE_TYPE_MEMCPY)->copy = what;
    return CUDA_SUCCESS;
  }
  if (must == Must::wait) {
    if (const auto failed = wait_all(call.lock(), call.context()); failed != CUDA_SUCCESS) return failed;
    copy_3d(what);
    return CUDA_SUCCESS;
  }
  return do_in_order(call.lock(), stream, [what](Lock&) { copy_3d(what); });
}

CUresult linear(std::uint64_t to, int to_type, std::uint64_t from, int from_type, std::uint64_t bytes,
                CUstream stream, Must must) {
  if (bytes != 0 && (to == 0 || from == 0)) return CUDA_ERROR_INVALID_VALUE;
  CUDA_MEMCPY3D what{};
  what.srcMemoryType = from_type;
  what.srcHost = reinterpret_cast<const void*>(from);  // NOLINT(performance-no-int-to-ptr)
  what.srcDevice = from;
  what.dstMemoryType = to_type;
  what.dstHost = reinterpret_cast<void*>(to);  // NOLINT(performance-no-int-to-ptr)
  what.dstDevice = to;
  what.WidthInBytes = bytes;
  what.Height = what.Depth = 1;
  return copy(what, stream, must);
}
std::uint64_t at(const void* pointer) { return reinterpret_cast<std::uint64_t>(pointer); }

constexpr int host = CU_MEMORYTYPE_HOST, device = CU_MEMORYTYPE_DEVICE, unified = CU_MEMORYTYPE_UNIFIED;

CUresult array_copy(CUarray to_array, std::uint64_t to_offset, std::uint64_t to, int to_type,
                    CUarray from_array, std::uint64_t from_offset, std::uint64_t from, int from_type,
                    std::uint64_t bytes, CUstream stream, Must must) {
  // One row of bytes, whatever the array's shape: the array's memory has no gaps here.
  if (to_array != nullptr) to = to_array->base + to_offset;
  if (from_array != nullptr) from = from_array->base + from_offset;
  return linear(to, to_type, from, from_type, bytes, stream, must);
}

CUresult set(CUdeviceptr to, std::uint64_t pitch, unsigned value, unsigned element, std::uint64_t width,
             std::uint64_t height, CUstream handle, Must must) {
  ENTER(call, context);
  const auto stream = find_stream(call.context(), handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (width == 0 || height == 0) return CUDA_SUCCESS;
  if (to == 0 || to % element != 0) return CUDA_ERROR_INVALID_VALUE;
  const CUDA_MEMSET_NODE_PARAMS what{to, pitch, value, element, width, height};
  if (stream->capture != nullptr && must == Must::not_wait) {
    capture_node(*stream, CU_GRAPH_NODE_TYPE_MEMSET)->set = what;
    return CUDA_SUCCESS;
  }
  return do_in_order(call.lock(), stream, [what](Lock&) { set_bytes(what); });
}

}  // namespace

EXPORT CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t n) {
  return linear(to, unified, from, unified, n, nullptr, Must::wait);
}
EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
  return linear(to, unified, from, unified, n, s, Must::not_wait);
}
EXPORT CUresult cuMemcpyPeer(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t n) {
  return linear(to, device, from, device, n, nullptr, Must::wait);
}
EXPORT CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t n,
                                  CUstream s) {
  return linear(to, device, from, device, n, s, Must::not_wait);
}
EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t n) {
  return linear(to, device, at(from), host, n, nullptr, Must::wait);
}
EXPORT CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t n) {
  return linear(at(to), host, from, device, n, nullptr, Must::wait);
}
EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t n) {
  return linear(to, device, from, device, n, nullptr, Must::wait);
}
EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t n, CUstream s) {
  return linear(to, device, at(from), host, n, s, Must::not_wait);
}
EXPORT CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t n, CUstream s) {
  return linear(at(to), host, from, device, n, s, Must::not_wait);
}
EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
  return linear(to, device, from, device, n, s, Must::not_wait);
}
EXPORT CUresult cuMemcpyAtoA_v2(CUarray to, size_t to_at, CUarray from, size_t from_at, size_t n) {
  return array_copy(to, to_at, 0, device, from, from_at, 0, device, n, nullptr, Must::wait);
}
EXPORT CUresult cuMemcpyAtoD_v2(CUdeviceptr to, CUarray from, size_t from_at, size_t n) {
  return array_copy(nullptr, 0, to, device, from, from_at, 0, device, n, nullptr, Must::wait);
}
EXPORT CUresult cuMemcpyDtoA_v2(CUarray to, size_t to_at, CUdeviceptr from, size_t n) {
  return array_copy(to, to_at, 0, device, nullptr, 0, from, device, n, nullptr, Must::wait);
}
EXPORT CUresult cuMemcpyAtoH_v2(void* to, CUarray from, size_t from_at, size_t n) {
  return array_copy(nullptr, 0, at(to), host, from, from_at, 0, device, n, nullptr, Must::wait);
}
EXPORT CUresult cuMemcpyHtoA_v2(CUarray to, size_t to_at, const void* from, size_t n) {
  return array_copy(to, to_at, 0, device, nullptr, 0, at(from), host, n, nullptr, Must::wait);
}
EXPORT CUresult cuMemcpyAtoHAsync_v2(void* to, CUarray from, size_t from_at, size_t n, CUstream s) {
  return array_copy(nullptr, 0, at(to), host, from, from_at, 0, device, n, s, Must::not_wait);
}
EXPORT CUresult cuMemcpyHtoAAsync_v2(CUarray to, size_t to_at, const void* from, size_t n, CUstream s) {
  return array_copy(to, to_at, 0, device, nullptr, 0, at(from), host, n, s, Must::not_wait);
}
EXPORT CUresult cuMemcpy2D_v2(const CUDA_MEMCPY2D* c) {
  return c == nullptr ? CUDA_ERROR_INVALID_VALUE : copy(as_3d(*c), nullptr, Must::wait);
}
EXPORT CUresult cuMemcpy2DUnaligned_v2(const CUDA_MEMCPY2D* c) { return cuMemcpy2D_v2(c); }
EXPORT CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D* c, CUstream s) {
  return c == nullptr ? CUDA_ERROR_INVALID_VALUE : copy(as_3d(*c), s, Must::not_wait);
}
EXPORT CUresult cuMemcpy3D_v2(const CUDA_MEMCPY3D* c) {
  return c == nullptr ? CUDA_ERROR_INVALID_VALUE : copy(*c, nullptr, Must::wait);
}
EXPORT CUresult cuMemcpy3DAsync_v2(const CUDA_MEMCPY3D* c, CUstream s) {
  return c == nullptr ? CUDA_ERROR_INVALID_VALUE : copy(*c, s, Must::not_wait);
}
// Contexts stand where the other form has reserved words.
EXPORT CUresult cuMemcpy3DPeer(const CUDA_MEMCPY3D* c) { return cuMemcpy3D_v2(c); }
EXPORT CUresult cuMemcpy3DPeerAsync(const CUDA_MEMCPY3D* c, CUstream s) { return cuMemcpy3DAsync_v2(c, s); }

// The synchronous forms do not wait either, but for what stands before them in the default stream.
EXPORT CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char v, size_t n) {
  return set(to, 0, v, 1, n, 1, nullptr, Must::wait);
}
EXPORT CUresult cuMemsetD16_v2(CUdeviceptr to, unsigned short v, size_t n) {
  return set(to, 0, v, 2, n, 1, nullptr, Must::wait);
}
EXPORT CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned v, size_t n) {
  return set(to, 0, v, 4, n, 1, nullptr, Must::wait);
}
EXPORT CUresult cuMemsetD2D8_v2(CUdeviceptr to, size_t p, unsigned char v, size_t w, size_t h) {
  return set(to, p, v, 1, w, h, nullptr, Must::wait);
}
EXPORT CUresult cuMemsetD2D16_v2(CUdeviceptr to, size_t p, unsigned short v, size_t w, size_t h) {
  return set(to, p, v, 2, w, h, nullptr, Must::wait);
}
EXPORT CUresult cuMemsetD2D32_v2(CUdeviceptr to, size_t p, unsigned v, size_t w, size_t h) {
  return set(to, p, v, 4, w, h, nullptr, Must::wait);
}
EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char v, size_t n, CUstream s) {
  return set(to, 0, v, 1, n, 1, s, Must::not_wait);
}
EXPORT CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short v, size_t n, CUstream s) {
  return set(to, 0, v, 2, n, 1, s, Must::not_wait);
}
EXPORT CUresult cuMemsetD32Async(CUdeviceptr to, unsigned v, size_t n, CUstream s) {
  return set(to, 0, v, 4, n, 1, s, Must::not_wait);
}
EXPORT CUresult cuMemsetD2D8Async(CUdeviceptr to, size_t p, unsigned char v, size_t w, size_t h, CUstream s) {
  return set(to, p, v, 1, w, h, s, Must::not_wait);
}
EXPORT CUresult cuMemsetD2D16Async(CUdeviceptr to, size_t p, unsigned short v, size_t w, size_t h,
                                   CUstream s) {
  return set(to, p, v, 2, w, h, s, Must::not_wait);
}
EXPORT CUresult cuMemsetD2D32Async(CUdeviceptr to, size_t p, unsigned v, size_t w, size_t h, CUstream s) {
  return set(to, p, v, 4, w, h, s, Must::not_wait);
}
