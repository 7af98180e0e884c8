// libcuda's side of the RM calls. The real one imports ioctl, mmap and munmap from the C library; so does
// this, for whoever is preloaded between the two.
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "abi/rm/rm.hpp"
#include "twin/cuda/driver.hpp"

namespace bulkhead::twin::cuda {

namespace {

std::uint64_t address(const void* pointer) { return reinterpret_cast<std::uint64_t>(pointer); }

CUresult result_of(int answer, std::uint32_t status) {
  if (answer != 0) return CUDA_ERROR_UNKNOWN;
  switch (status) {
    case abi::ok:
      return CUDA_SUCCESS;
    case abi::err_no_memory:
    case 0x1a:
      return CUDA_ERROR_OUT_OF_MEMORY;  // insufficient resources
    case abi::err_insufficient_permissions:
      return CUDA_ERROR_NOT_PERMITTED;
    case abi::err_invalid_state:
      return CUDA_ERROR_DEVICE_UNAVAILABLE;
    case abi::err_not_supported:
      return CUDA_ERROR_NOT_SUPPORTED;
    case abi::err_invalid_argument:
      return CUDA_ERROR_INVALID_VALUE;
    default:
      return CUDA_ERROR_UNKNOWN;
  }
}

}  // namespace

CUresult Rm::open(const std::string& root) {
  root_ = root;
  file_ = ::open((root + "/dev/nvidiactl").c_str(), O_RDWR | O_CLOEXEC);
  if (file_ < 0) return CUDA_ERROR_NO_DEVICE;
  abi::Alloc call{};
  call.cls = abi::class_client;
  if (::ioctl(file_, abi::request(abi::esc_alloc, sizeof call), &call) != 0 || call.status != abi::ok) {
    ::close(file_);
    file_ = -1;
    return call.status == abi::err_insufficient_permissions ? CUDA_ERROR_NOT_PERMITTED : CUDA_ERROR_NO_DEVICE;
  }
  client_ = call.handle;
  return CUDA_SUCCESS;
}

CUresult Rm::alloc(Handle parent, std::uint32_t cls, void* params, Handle wanted) {
  abi::Alloc call{};
  call.root = client_;
  call.parent = parent != 0 ? parent : client_;
  call.handle = wanted;
  call.cls = cls;
  call.params = address(params);
  const int answer = ::ioctl(file_, abi::request(abi::esc_alloc, sizeof call), &call);
  return result_of(answer, call.status);
}

CUresult Rm::alloc_memory(Handle device, std::uint64_t bytes, Handle& made) {
  abi::MemoryParams params{};
  params.owner = client_;
  params.flags = 0x1c101;  // these as libcuda 580 has them
  params.attr = 0x11800000;
  params.attr2 = 0x100005;
  params.size = bytes;
  params.alignment = granule;
  const Handle wanted = made != 0 ? made : take_handle();
  const CUresult result = alloc(device, abi::class_device_memory, &params, wanted);
  if (result != CUDA_SUCCESS && made == 0) {
    give_back(wanted);
    return result;
  }
  made = wanted;
  return result;
}

void Rm::free(Handle parent, Handle object) {
  abi::Free call{client_, parent != 0 ? parent : client_, object, 0};
  static_cast<void>(::ioctl(file_, abi::request(abi::esc_free, sizeof call), &call));
}

CUresult Rm::control(Handle object, std::uint32_t command, void* params, std::uint32_t size) {
  abi::Control call{client_, object != 0 ? object : client_, command, 0, address(params), size, 0};
  const int answer = ::ioctl(file_, abi::request(abi::esc_control, sizeof call), &call);
  return result_of(answer, call.status);
}

CUresult Rm::duplicate(Handle parent, Handle client, Handle object, Handle& made) {
  abi::Dup call{};
  call.client = client_;
  call.parent = parent;
  call.handle = take_handle();
  call.source_client = client;
  call.source_handle = object;
  const int answer = ::ioctl(file_, abi::request(abi::esc_dup_object, sizeof call), &call);
  const CUresult result = result_of(answer, call.status);
  if (result != CUDA_SUCCESS) {
    give_back(call.handle);
    return result;
  }
  made = call.handle;
  return result;
}

void Rm::lend(Handle object) {
  struct {  // NVOS57_PARAMETERS
    std::uint32_t client, object, target, rights;
    std::uint16_t type;
    std::uint8_t action, pad;
    std::uint32_t status;
  } call{client_, object, client_, 1, 2, 0, 0, 0};
  static_cast<void>(::ioctl(file_, abi::request(abi::esc_share, sizeof call), &call));
}

Handle Rm::take_handle() {
  if (free_.empty()) return next_++;
  const Handle lowest = *free_.begin();
  free_.erase(free_.begin());
  return lowest;
}

Handle Rm::take_handles(std::uint32_t count) {
  const Handle first = next_;
  next_ += count;
  return first;
}

void Rm::give_back(Handle first, std::uint32_t count) {
  for (Handle h = first; h < first + count; ++h) free_.insert(h);
}

}  // namespace bulkhead::twin::cuda
