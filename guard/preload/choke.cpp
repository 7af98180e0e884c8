// The choke point: libcuda and NVML reach the driver through libc's ioctl, mmap and munmap, by whatever name
// they were loaded. Bytes are reserved before the driver is asked, and committed or given back after.
//
// Not handled, and on the safe side: close() of a driver file frees its clients in the driver, here their
// bytes stay charged until their handles come up again or the process ends.
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "abi/rm/rm.hpp"
#include "guard/preload/ledger.hpp"
#include "guard/preload/process.hpp"

namespace bulkhead::guard {

namespace {

using Ioctl = int (*)(int, unsigned long, void*);
using Mmap = void* (*)(void*, std::size_t, int, int, int, off_t);
using Munmap = int (*)(void*, std::size_t);
Ioctl next_ioctl = nullptr;
Mmap next_mmap = nullptr;
Mmap next_mmap64 = nullptr;
Munmap next_munmap = nullptr;

constexpr std::uint64_t granule = std::uint64_t{2} << 20;

__attribute__((constructor(101))) void begin() {
  const int saved = errno;
  next_ioctl = reinterpret_cast<Ioctl>(dlsym(RTLD_NEXT, "ioctl"));
  next_mmap = reinterpret_cast<Mmap>(dlsym(RTLD_NEXT, "mmap"));
  next_mmap64 = reinterpret_cast<Mmap>(dlsym(RTLD_NEXT, "mmap64"));
  next_munmap = reinterpret_cast<Munmap>(dlsym(RTLD_NEXT, "munmap"));
  open_page();
  errno = saved;
}

int call_ioctl(int fd, unsigned long request, void* argument) {
  if (next_ioctl != nullptr) return next_ioctl(fd, request, argument);
  return static_cast<int>(syscall(SYS_ioctl, fd, request, argument));
}

bool add_overflows(std::uint64_t a, std::uint64_t b) { return a + b < a; }

bool reserve_or_count(Slot& slot, std::size_t gpu, std::uint64_t bytes) {
  if (reserve(slot, gpu, bytes)) return true;
  if (collect_parked(slot, gpu) && reserve(slot, gpu, bytes)) return true;
  slot.refused.fetch_add(1, std::memory_order_relaxed);
  return false;
}

// Works for abi::Alloc and abi::AllocOld.
template <class Form>
int allocate_memory(int fd, unsigned long request, Form* form) {
  const std::uint32_t client = form->root;
  const std::uint32_t parent = form->parent;
  auto* params = reinterpret_cast<abi::MemoryParams*>(form->params);
  if (params == nullptr) return call_ioctl(fd, request, form);  // the driver refuses it
  const auto refuse = [&] {
    form->status = abi::err_no_memory;
    return 0;
  };
  if (books == nullptr || !knows_client(client)) return refuse();
  Slot* slot = own_slot();
  if (slot == nullptr) return refuse();
  const std::size_t gpu = gpu_of(client, parent);
  const std::uint64_t asked = params->size;
  if (add_overflows(asked, granule)) return call_ioctl(fd, request, form);
  std::uint64_t reserved = (asked + granule - 1) / granule * granule;
  if (!reserve_or_count(*slot, gpu, reserved)) return refuse();

  const int result = call_ioctl(fd, request, form);
  const int error = errno;
  if (result != 0 || form->status != abi::ok) {
    slot->used[gpu].fetch_sub(reserved);
    errno = error;
    return result;
  }
  const std::uint64_t got = (params->size + 4095) / 4096 * 4096;
  if (got > reserved) {
    if (!reserve_or_count(*slot, gpu, got - reserved)) {
      abi::Free undo = {client, parent, form->handle, 0};
      if (call_ioctl(fd, abi::request(abi::esc_free, sizeof undo), &undo) == 0 && undo.status == abi::ok) {
        slot->used[gpu].fetch_sub(reserved);
        params->size = asked;
        errno = error;
        return refuse();
      }
      slot->used[gpu].fetch_add(got - reserved);  // the driver keeps it: the truth, past the cap
    }
    reserved = got;
  }
  if (got < reserved) slot->used[gpu].fetch_sub(reserved - got);
  add_memory(client, parent, form->handle, gpu, got);
  errno = error;
  return result;
}

template <class Form>
int allocate(int fd, unsigned long request, Form* form) {
  const std::uint32_t cls = form->cls;
  if (cls == abi::class_device_memory && charging()) return allocate_memory(fd, request, form);
  const int result = call_ioctl(fd, request, form);
  if (result != 0 || form->status != abi::ok || books == nullptr) return result;
  switch (cls) {
    case abi::class_root:
    case abi::class_client:
      add_client(form->handle != 0 ? form->handle : form->root);
      break;
    case abi::class_device: {
      const auto* params = reinterpret_cast<const abi::DeviceParams*>(form->params);
      const std::uint32_t gpu = params == nullptr ? 0 : params->device;
      add_device(form->root, form->handle, gpu < max_gpus ? gpu : max_gpus - 1);
      break;
    }
    case abi::class_subdevice:
      add_below(form->root, form->parent, form->handle);
      break;
    case abi::class_channel_group: {
      const auto* params = reinterpret_cast<const abi::GroupParams*>(form->params);
      if (params != nullptr && params->engine == abi::engine_compute) {
        books->fresh_group.store(static_cast<std::uint64_t>(form->root) << 32 | form->handle);
      }
      break;
    }
    default:
      break;
  }
  return result;
}

int release(int fd, unsigned long request, abi::Free* form) {
  Taken object;
  const bool ours = books != nullptr && take(form->root, form->handle, object);
  const int result = call_ioctl(fd, request, form);
  if (!ours) return result;
  const int error = errno;
  if (result == 0 && form->status == abi::ok) {
    gone(object);
  } else {
    put_back(object);
  }
  errno = error;
  return result;
}

// The tenant's GPU is as large as its cap. Sizes are in KiB.
void show_share(std::uint32_t client, std::uint32_t subdevice, abi::FbInfo& info) {
  const std::size_t gpu = books == nullptr ? 0 : gpu_of(client, subdevice);
  const std::uint64_t cap = page->cap[gpu].load(std::memory_order_relaxed);
  if (cap == no_cap) return;
  const std::uint64_t used = charged(*page, gpu);
  const std::uint64_t room = used < cap ? cap - used : 0;
  const auto at_most = [](std::uint32_t& kib, std::uint64_t bytes) {
    if (bytes / 1024 < kib) kib = static_cast<std::uint32_t>(bytes / 1024);
  };
  const std::size_t count = info.count < 128 ? info.count : 128;
  for (std::size_t i = 0; i < count; ++i) {
    switch (info.list[i].index) {
      case abi::fb_ram_size:
      case abi::fb_total_ram_size:
      case abi::fb_heap_size:
      case abi::fb_usable_ram_size:
        at_most(info.list[i].data, cap);
        break;
      case abi::fb_heap_free:
        at_most(info.list[i].data, room);
        break;
      default:
        break;
    }
  }
}

int control(int fd, unsigned long request, abi::Control* form) {
  const int result = call_ioctl(fd, request, form);
  if (result != 0 || form->status != abi::ok || form->params == 0) return result;
  const auto* words = reinterpret_cast<const std::uint32_t*>(form->params);
  switch (form->command) {
    case abi::cmd_fb_get_info_v2:
      if (form->params_size >= sizeof(abi::FbInfo)) {
        show_share(form->client, form->object, *reinterpret_cast<abi::FbInfo*>(form->params));
      }
      break;
    case abi::cmd_group_set_timeslice: {
      // libcuda sets the slice of each group it makes, once, before the group's channels run, when it has no
      // effect.
      std::uint64_t group = static_cast<std::uint64_t>(form->client) << 32 | form->object;
      if (books == nullptr || books->fresh_group.compare_exchange_strong(group, 0)) break;
      if (Slot* slot = own_slot()) slot->self_set.fetch_add(1, std::memory_order_relaxed);
      break;
    }
    case abi::cmd_export_objects_to_fd: {
      const auto& params = *reinterpret_cast<const abi::ExportObjects*>(form->params);
      if (books == nullptr || form->params_size < sizeof params) break;
      for (std::size_t i = 0; i < params.count && i < 512; ++i) shared(form->client, params.objects[i], true);
      break;
    }
    case abi::cmd_export_object_to_fd:  // type, device, parent, object, fd, flags
      if (books != nullptr && form->params_size >= 16) shared(form->client, words[3], true);
      break;
    case abi::cmd_import_objects_from_fd: {  // fd, parent, 128 objects, 128 bytes of types, u16 count, u16
                                             // index
      if (books == nullptr || form->params_size < 652) break;
      const std::size_t count = words[162] & 0xffff;
      for (std::size_t i = 0; i < count && i < 128; ++i) add_import(form->client, words[2 + i]);
      break;
    }
    case 0x3d06:  // import of one object: fd, type, device, parent, object
      if (books != nullptr && form->params_size >= 20) add_import(form->client, words[4]);
      break;
    default:
      break;
  }
  return result;
}

// Device memory by the calls of older drivers' libraries, which nobody was seen to use and which are not
// accounted: out of memory while there is a cap.
bool legacy_refused(unsigned number, std::uint32_t* words) {
  if (page->cap[first_gpu()].load(std::memory_order_relaxed) == no_cap) return false;
  if (number == abi::esc_alloc_memory) {  // NVOS02: root, parent, handle, class, flags, -, u64 memory, u64
                                          // limit, status
    if (words[3] != abi::class_device_memory) return false;
    words[10] = abi::err_no_memory;
    return true;
  }
  // NVOS32: root, parent, function, va space, s16 heap, status, u64 total, u64 free, then by function; of
  // ALLOC_SIZE: owner, memory, type, flags, attributes, whose bits 26:25 say where: 0 is device memory
  const std::uint32_t function = words[2];
  const bool sized = function == 2 || function == 14;  // ALLOC_SIZE, ALLOC_SIZE_RANGE
  const bool shaped = function == 1 || function == 6 || function == 19;
  if (!shaped && (!sized || (words[14] >> 25 & 3) == 1)) return false;
  words[5] = abi::err_no_memory;
  return true;
}

int watched_ioctl(int fd, unsigned long request, void* argument) {
  const auto number = static_cast<unsigned>(request) & 0xffU;
  const std::size_t size = request >> 16 & 0x3fffU;
  switch (number) {
    case abi::esc_control:
      if (size == sizeof(abi::Control)) return control(fd, request, static_cast<abi::Control*>(argument));
      break;
    case abi::esc_alloc:
      if (size == sizeof(abi::Alloc)) return allocate(fd, request, static_cast<abi::Alloc*>(argument));
      if (size == sizeof(abi::AllocOld)) return allocate(fd, request, static_cast<abi::AllocOld*>(argument));
      break;
    case abi::esc_free:
      if (size == sizeof(abi::Free)) return release(fd, request, static_cast<abi::Free*>(argument));
      break;
    case abi::esc_dup_object:
      if (size == sizeof(abi::Dup)) {
        auto* form = static_cast<abi::Dup*>(argument);
        const int result = call_ioctl(fd, request, argument);
        if (result == 0 && form->status == abi::ok && books != nullptr && charging()) {
          duplicated(form->client, form->handle, form->source_client, form->source_handle);
        }
        return result;
      }
      break;
    case abi::esc_share:  // NVOS57: client, object, policy, status; how memory is lent for legacy IPC
      if (size == 24) {
        const auto* words = static_cast<const std::uint32_t*>(argument);
        const int result = call_ioctl(fd, request, argument);
        if (result == 0 && words[5] == abi::ok && books != nullptr) shared(words[0], words[1], false);
        return result;
      }
      break;
    case abi::esc_alloc_memory:
    case abi::esc_vid_heap_control:
      if (size >= 60 - 12 && charging() && (number == abi::esc_alloc_memory || size >= 60) &&
          legacy_refused(number, static_cast<std::uint32_t*>(argument))) {
        return 0;
      }
      break;
    default:
      break;
  }
  return call_ioctl(fd, request, argument);
}

bool is_uvm(int fd) {
  struct stat file = {};
  struct stat device = {};
  if (fstat(fd, &file) != 0) return false;
  if (S_ISCHR(file.st_mode)) {
    return stat("/dev/nvidia-uvm", &device) == 0 && S_ISCHR(device.st_mode) && device.st_rdev == file.st_rdev;
  }
  const char* root = getenv("BULKHEAD_ROOT");  // a twin, where the device is a regular file
  if (root == nullptr || !S_ISREG(file.st_mode)) return false;
  constexpr char name[] = "/dev/nvidia-uvm";
  char path[4096];
  const std::size_t length = strnlen(root, sizeof path - sizeof name);
  memcpy(path, root, length);
  memcpy(path + length, name, sizeof name);
  return stat(path, &device) == 0 && device.st_ino == file.st_ino && device.st_dev == file.st_dev;
}

void* call_mmap(Mmap next, void* address, std::size_t length, int protection, int flags, int fd,
                off_t offset) {
  if (next != nullptr) return next(address, length, protection, flags, fd, offset);
  return reinterpret_cast<void*>(syscall(SYS_mmap, address, length, protection, flags, fd, offset));
}

std::uint64_t whole_pages(std::size_t length) {
  return (static_cast<std::uint64_t>(length) + 4095) / 4096 * 4096;
}

void* watched_mmap(Mmap next, void* address, std::size_t length, int protection, int flags, int fd,
                   off_t offset) {
  const auto low = reinterpret_cast<std::uint64_t>(address);
  const bool over = (flags & MAP_FIXED) != 0 && any_ranges();
  // The driver takes only mappings whose offset is their address.
  const bool managed = fd >= 0 && (flags & (MAP_ANONYMOUS | MAP_PRIVATE)) == 0 && low != 0 &&
                       static_cast<std::uint64_t>(offset) == low && charging() && is_uvm(fd);
  if (!over && !managed) return call_mmap(next, address, length, protection, flags, fd, offset);
  const std::uint64_t bytes = whole_pages(length);
  const std::size_t gpu = first_gpu();
  Slot* slot = own_slot();
  if (managed && (slot == nullptr || bytes < length || !reserve_or_count(*slot, gpu, bytes))) {
    managed_refused = true;
    errno = ENOMEM;
    return MAP_FAILED;
  }
  if (managed) opened_gpu(gpu);  // what is charged to it is refunded to it
  Pieces replaced;
  if (over) cut(low, low + bytes, replaced);
  void* const at = call_mmap(next, address, length, protection, flags, fd, offset);
  const int error = errno;
  if (at == MAP_FAILED) {
    put_back(replaced);
    if (managed) slot->used[gpu].fetch_sub(bytes);
  } else {
    if (replaced.bytes != 0) refund(gpu, replaced.bytes);
    const auto placed = reinterpret_cast<std::uint64_t>(at);
    if (managed) add_range(placed, placed + bytes);
  }
  errno = error;
  return at;
}

int watched_munmap(void* address, std::size_t length) {
  const auto low = reinterpret_cast<std::uint64_t>(address);
  Pieces pieces;
  cut(low, low + whole_pages(length), pieces);
  const int result = next_munmap != nullptr ? next_munmap(address, length)
                                            : static_cast<int>(syscall(SYS_munmap, address, length));
  if (pieces.count == 0) return result;
  const int error = errno;
  if (result == 0) {
    refund(first_gpu(), pieces.bytes);
  } else {
    put_back(pieces);
  }
  errno = error;
  return result;
}

}  // namespace
}  // namespace bulkhead::guard

using namespace bulkhead::guard;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int ioctl(int fd, unsigned long request, ...) noexcept {
  va_list rest;
  va_start(rest, request);
  void* argument = va_arg(rest, void*);
  va_end(rest);
  if (page == nullptr || (request >> 8 & 0xffU) != bulkhead::abi::ioctl_magic || argument == nullptr) {
    return call_ioctl(fd, request, argument);
  }
  return watched_ioctl(fd, request, argument);
}

EXPORT void* mmap(void* address, size_t length, int protection, int flags, int fd, off_t offset) noexcept {
  if (page == nullptr || ((flags & MAP_ANONYMOUS) != 0 && !any_ranges())) {
    return call_mmap(next_mmap, address, length, protection, flags, fd, offset);
  }
  return watched_mmap(next_mmap, address, length, protection, flags, fd, offset);
}

EXPORT void* mmap64(void* address, size_t length, int protection, int flags, int fd,
                    off64_t offset) noexcept {
  if (page == nullptr || ((flags & MAP_ANONYMOUS) != 0 && !any_ranges())) {
    return call_mmap(next_mmap64, address, length, protection, flags, fd, offset);
  }
  return watched_mmap(next_mmap64, address, length, protection, flags, fd, offset);
}

EXPORT int munmap(void* address, size_t length) noexcept {
  if (page == nullptr || !any_ranges()) {
    return next_munmap != nullptr ? next_munmap(address, length)
                                  : static_cast<int>(syscall(SYS_munmap, address, length));
  }
  return watched_munmap(address, length);
}
