// The part of NVIDIA's resource manager (RM) that this project speaks: ioctl numbers and structures, as the open
// kernel modules declare them (NVIDIA/open-gpu-kernel-modules, MIT: nv_escape.h, nvos.h, ctrla06c.h, ctrl2080fifo.h,
// ctrl2080fb.h, ctrl0000unix.h), checked on an H100 with driver 580.159.04 by watching libcuda's own calls.
// A vendor fact like nvml.h: edge/rm, guard and twin/rm all speak it, so it belongs to none of them. Freestanding.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bulkhead::abi {

inline constexpr unsigned ioctl_magic = 'F';

// Numbers of the RM escapes (_IOC_NR); _IOC_TYPE is 'F'.
enum Escape : unsigned {
  esc_alloc_memory = 0x27,  // NVOS02, legacy; libcuda 580 does not use it for device memory
  esc_free = 0x29,          // Free
  esc_control = 0x2a,       // Control
  esc_alloc = 0x2b,         // Alloc (48 bytes) or its older form of 32 bytes (AllocOld)
  esc_dup_object = 0x34,    // Dup
  esc_share = 0x35,
  esc_vid_heap_control = 0x4a,  // NVOS32, legacy; libcuda 580 does not use it
  esc_card_info = 0xc8,
  esc_register_fd = 0xc9,  // on /dev/nvidiaN: u32 fd of the nvidiactl it belongs to
  esc_check_version = 0xd2,
  esc_sys_params = 0xd6,
};

constexpr unsigned long request(unsigned nr, std::size_t size) {  // _IOWR('F', nr, size)
  return (3UL << 30) | (static_cast<unsigned long>(size) << 16) | (static_cast<unsigned long>(ioctl_magic) << 8) | nr;
}

// RM status codes (nverror.h).
enum Status : std::uint32_t {
  ok = 0,
  err_insufficient_permissions = 0x1b,
  err_insert_duplicate_name = 0x19,
  err_invalid_argument = 0x1f,
  err_invalid_client = 0x23,
  err_invalid_object_handle = 0x33,
  err_invalid_state = 0x40,
  err_no_memory = 0x51,  // libcuda turns it into CUDA_ERROR_OUT_OF_MEMORY (seen on an H100)
  err_not_supported = 0x56,
  err_object_not_found = 0x57,
};

// Classes (hClass).
enum Class : std::uint32_t {
  class_root = 0x0,            // NV01_ROOT
  class_client = 0x41,         // NV01_ROOT_CLIENT: what libcuda allocates; the new handle is the client
  class_device = 0x80,         // NV01_DEVICE_0; params: DeviceParams
  class_subdevice = 0x2080,    // NV20_SUBDEVICE_0
  class_system_memory = 0x3e,  // NV01_MEMORY_SYSTEM: host memory
  class_device_memory = 0x40,  // NV01_MEMORY_LOCAL_USER: params: MemoryParams. Every byte of device memory a CUDA
                               // program holds, but for managed pages, is one of these: their sum equalled NVML's
                               // per-process bytes to the MiB (H100).
  class_channel_group = 0xa06c,  // KEPLER_CHANNEL_GROUP_A; params: GroupParams
  class_context_share = 0x9067,
  class_vaspace = 0x90f1,
};
// GPFIFO channels are 0x..6f: 0xc36f Volta, 0xc46f Turing, 0xc56f Ampere, 0xc86f Hopper, 0xc96f Blackwell.
constexpr bool is_channel(std::uint32_t cls) { return (cls & 0xffU) == 0x6fU && cls >= 0xa06fU; }

struct Free {  // NVOS00_PARAMETERS; frees the object and everything below it
  std::uint32_t root, parent, handle, status;
};
static_assert(sizeof(Free) == 16);

struct Control {  // NVOS54_PARAMETERS
  std::uint32_t client, object, command, flags;
  std::uint64_t params;
  std::uint32_t params_size, status;
};
static_assert(sizeof(Control) == 32);

struct Alloc {  // NVOS64_PARAMETERS
  std::uint32_t root, parent, handle, cls;  // handle: 0 lets RM choose
  std::uint64_t params, rights;
  std::uint32_t params_size, flags, status, pad;  // params_size is 0 in libcuda's calls: the class decides
};
static_assert(sizeof(Alloc) == 48);

struct AllocOld {  // NVOS21_PARAMETERS
  std::uint32_t root, parent, handle, cls;
  std::uint64_t params;
  std::uint32_t params_size, status;
};
static_assert(sizeof(AllocOld) == 32);

struct Dup {  // NVOS55_PARAMETERS
  std::uint32_t client, parent, handle, source_client, source_handle, flags, status;
};
static_assert(sizeof(Dup) == 28);

struct DeviceParams {  // NV0080_ALLOC_PARAMETERS, its beginning
  std::uint32_t device;  // RM device instance: which GPU
  std::uint32_t share_client, target_client, target_device, flags;
  std::uint32_t pad;
  std::uint64_t va_space_size, va_start, va_limit;
  std::uint32_t va_mode, pad2;
};
static_assert(sizeof(DeviceParams) == 56);

struct MemoryParams {  // NV_MEMORY_ALLOCATION_PARAMS
  std::uint32_t owner, type, flags, width, height;
  std::int32_t pitch;
  std::uint32_t attr, attr2, format, compression_coverage, zcull_coverage, pad;
  std::uint64_t range_lo, range_hi;
  std::uint64_t size;  // bytes; rounded up by RM on success
  std::uint64_t alignment, offset, limit, address;
  std::uint32_t ctag_offset, va_space, internal_flags, tag;
  std::uint32_t numa_node, pad2;
};
static_assert(offsetof(MemoryParams, size) == 64);
static_assert(sizeof(MemoryParams) == 128);

struct GroupParams {  // NV_CHANNEL_GROUP_ALLOCATION_PARAMETERS
  std::uint32_t error_object, ecc_error_object, va_space, engine;  // engine: 1 graphics/compute; 0xb.. copy engines
};
inline constexpr std::uint32_t engine_compute = 1;  // NV2080_ENGINE_TYPE_GRAPHICS

// Control commands.
enum Command : std::uint32_t {
  cmd_group_schedule = 0xa06c0101,
  cmd_group_set_timeslice = 0xa06c0103,  // u64 us. Unprivileged. Copy-engine groups refuse it
  cmd_group_get_timeslice = 0xa06c0104,  // u64 us. 1024 at creation; 2048 in a running process
  cmd_group_preempt = 0xa06c0105,        // 0.5 ms (H100)
  cmd_group_set_interleave = 0xa06c0107,  // u32 0..2; accepted, no effect seen with several busy groups (H100)
  cmd_disable_channels = 0x2080110b,      // on a subdevice: DisableChannels
  cmd_fb_get_info_v2 = 0x20801303,        // on a subdevice: FbInfo. What cuMemGetInfo and NVML's memory answers ask
  cmd_get_pids = 0x2080018d,
  cmd_get_pid_info = 0x2080018e,
  cmd_export_objects_to_fd = 0x3d0b,    // on the client: ExportObjects
  cmd_import_objects_from_fd = 0x3d0c,  // on the client: ImportObjects
  cmd_export_object_to_fd = 0x3d05,     // one object
};

// NV2080_CTRL_FIFO_DISABLE_CHANNELS_PARAMS: takes channels off the GPU and keeps them off, preempting what runs
// (0.4 ms; enabling 0.25 ms: H100). Unprivileged on the owner's file. Disables nest: a channel disabled twice needs
// enabling twice; enabling one that runs does nothing.
struct DisableChannels {
  std::uint8_t disable, pad[3];
  std::uint32_t count;
  std::uint8_t only_scheduling, rewind_put, pad2[6];
  std::uint64_t preempt_event;  // 0: the call returns when the channels are off
  std::uint32_t clients[64], channels[64];
};
static_assert(sizeof(DisableChannels) == 536);

struct FbInfo {  // NV2080_CTRL_FB_GET_INFO_V2_PARAMS
  std::uint32_t count;
  struct {
    std::uint32_t index, data;  // data in KiB for the sizes below
  } list[128];
};
static_assert(sizeof(FbInfo) == 1028);
enum FbIndex : std::uint32_t {
  fb_ram_size = 0x07,
  fb_total_ram_size = 0x08,
  fb_heap_size = 0x09,
  fb_heap_free = 0x16,
  fb_usable_ram_size = 0x20,
};

struct ExportObjects {  // NV0000_CTRL_OS_UNIX_EXPORT_OBJECTS_TO_FD_PARAMS
  std::int32_t fd;
  std::uint32_t device;
  std::uint16_t max_objects;
  std::uint8_t metadata[64];
  std::uint16_t pad;
  std::uint32_t objects[512];
  std::uint16_t count, index;
};
static_assert(sizeof(ExportObjects) == 2128);

// UVM (/dev/nvidia-uvm): managed memory. A managed range is an mmap of that file (MAP_SHARED | MAP_FIXED, offset =
// address); its pages are charged to nobody by NVML. cuMemAlloc's ranges are not mapped so. Freed by munmap.
enum Uvm : unsigned long { uvm_initialize = 0x30000001, uvm_free = 34, uvm_create_external_range = 73 };

}  // namespace bulkhead::abi
