// cuInit, and what stands before every call.
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include <fmt/format.h>

#include "abi/rm/rm.hpp"
#include "base/text.hpp"
#include "twin/cuda/driver.hpp"

namespace bulkhead::twin::cuda {

namespace fs = std::filesystem;

Process& process() {
  static auto* const the = new Process;
  return *the;
}

std::vector<CUcontext>& context_stack() {
  static thread_local std::vector<CUcontext> stack;
  return stack;
}

CUcontext current() { return context_stack().empty() ? nullptr : context_stack().back(); }

Call::Call(Needs needs) {
  Process& all = process();
  if (needs != Needs::nothing && (all.forked || !all.initialised)) {
    error_ = CUDA_ERROR_NOT_INITIALIZED;
    return;
  }
  lock_ = Lock(all.mutex);
  if (needs != Needs::context) return;
  context_ = current();
  if (context_ == nullptr) {
    error_ = CUDA_ERROR_INVALID_CONTEXT;
  } else if (!context_->alive) {
    error_ = CUDA_ERROR_CONTEXT_IS_DESTROYED;
  } else {
    error_ = fault_seen(context_);
  }
}

Device* device_of(CUdevice ordinal) {
  auto& devices = process().devices;
  return ordinal >= 0 && static_cast<std::size_t>(ordinal) < devices.size()
             ? devices[static_cast<std::size_t>(ordinal)].get()
             : nullptr;
}

namespace {

fs::path twin_directory() {
  if (const char* named = std::getenv("BULKHEAD_TWIN"); named != nullptr && *named != '\0') return named;
  Dl_info info{};  // a twin's lib folder holds a link to this library
  if (::dladdr(reinterpret_cast<void*>(&twin_directory), &info) == 0 || info.dli_fname == nullptr) return {};
  return fs::path(info.dli_fname).parent_path() / "..";
}

// Which of the twin's GPUs CUDA_VISIBLE_DEVICES names, in its order: indices and GPU-uuids, up to the first
// word that is neither, as the real library reads it.
std::vector<std::uint32_t> visible(const State& state, const std::vector<std::uint32_t>& all,
                                   const GpuInstance** slice) {
  const char* wanted = std::getenv("CUDA_VISIBLE_DEVICES");
  // Of MIG devices a process sees the first named, and nothing else.
  if (const auto first = wanted == nullptr ? "" : trim(split(wanted, ',').front());
      first.starts_with("MIG-")) {
    for (std::uint32_t gpu = 0; gpu < state.gpu_count; ++gpu)
      for (const auto& instance : state.gpus[gpu].instances)
        for (const auto& compute : instance.compute)
          if (instance.used != 0 && compute.used != 0 && compute.uuid.view() == first &&
              state.gpus[gpu].on_pci != 0) {
            *slice = &instance;
            return {gpu};
          }
    return {};
  }
  if (wanted == nullptr) return all;
  std::vector<std::uint32_t> chosen;
  for (const auto word : split(wanted, ',')) {
    const auto name = trim(word);
    std::uint32_t found = none;
    if (const auto index = parse_u64(name); index && *index < all.size()) {
      found = all[*index];
    } else if (name.size() > 4 && name.starts_with("GPU-")) {
      for (const auto gpu : all) {
        if (!state.gpus[gpu].uuid.view().starts_with(name)) continue;
        if (found != none) return chosen;  // the beginning of two uuids names neither
        found = gpu;
      }
    }
    if (found == none) break;
    if (std::find(chosen.begin(), chosen.end(), found) != chosen.end())
      return {};  // one GPU twice: none at all
    chosen.push_back(found);
  }
  return chosen;
}

void describe(const State& state, std::uint32_t index, Device& device) {
  const Gpu& gpu = state.gpus[index];
  const Chip& chip = state.chips[gpu.chip];
  device.gpu = index;
  device.name = chip.model.view();
  device.uuid = gpu.uuid.view();
  device.pci = fmt::format("{:04X}:{:02X}:{:02X}.0", gpu.pci_domain, gpu.pci_bus, gpu.pci_device);
  device.pci_domain = gpu.pci_domain;
  device.pci_bus = gpu.pci_bus;
  device.pci_device = gpu.pci_device;
  device.cc_major = chip.cc_major;
  device.cc_minor = chip.cc_minor;
  const std::uint32_t cores_of_one = chip.cc_major == 8 && chip.cc_minor == 0 ? 64 : 128;
  device.multiprocessors = std::max(1U, chip.cores / cores_of_one);
  device.clock_mhz = chip.clock_graphics_max;
  device.memory_clock_mhz = chip.clock_memory[0];
  device.memory_bus_bits = chip.memory_bus_bits;
  device.architecture = chip.architecture;
  device.numa = gpu.numa_node;
  device.nvlinks = chip.nvlinks;
  device.compute_mode = gpu.compute_mode;
  device.ecc = gpu.ecc_current;
  device.pci_id = chip.pci_device;
  device.pci_subsystem = chip.pci_subsystem;
  for (const auto& fault : state.faults)
    if (fault.kind == FaultKind::computes_wrong && (fault.gpu == none || fault.gpu == index))
      device.wrong = static_cast<std::uint32_t>(fault.code);
  device.default_pool.device = &device;
  device.default_pool.is_default = true;
  device.pool = &device.default_pool;
}

void narrow(const Chip& chip, const GpuInstance& slice, Device& device) {
  for (std::uint32_t i = 0; i < chip.profile_count; ++i) {
    const auto& profile = chip.profiles[i];
    if (profile.id != slice.profile_id) continue;
    device.part = std::uint64_t{profile.memory_mib} << 20U;
    device.multiprocessors = profile.sm;
  }
}

// The objects that the real cuInit makes for a GPU, in its order.
CUresult open_device(Process& all, Device& device, std::uint32_t minor) {
  const std::string path = fmt::format("{}/dev/nvidia{}", all.rm.root(), minor);
  device.file = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  abi::DeviceParams params{};
  params.device = device.gpu;
  device.device = all.rm.take_handle();
  if (const auto failed = all.rm.alloc(0, abi::class_device, &params, device.device); failed != CUDA_SUCCESS)
    return failed;
  device.subdevice = all.rm.take_handle();
  if (const auto failed = all.rm.alloc(device.device, abi::class_subdevice, nullptr, device.subdevice);
      failed != CUDA_SUCCESS)
    return failed;
  for (const std::uint32_t cls : {0x2081U, 0xc661U, 0xc661U, 0x90e6U, 0x00deU}) {
    if (const auto failed = all.rm.alloc(device.subdevice, cls, nullptr, all.rm.take_handle());
        failed != CUDA_SUCCESS)
      return failed;
  }
  const Handle next = all.rm.take_handles(5);
  for (const auto& [parent, cls, at] : {std::tuple{device.device, 0x90f1U, 0U},
                                        {device.device, 0x90f1U, 1U},
                                        {device.device, 0x50a0U, 3U},
                                        {device.subdevice, 0x503cU, 4U}}) {
    if (const auto failed = all.rm.alloc(parent, cls, nullptr, next + at); failed != CUDA_SUCCESS)
      return failed;
  }
  std::uint64_t free_bytes = 0;
  return memory_info(device, free_bytes, device.total);
}

CUresult start(Process& all) {
  const fs::path twin = twin_directory();
  if (twin.empty()) return CUDA_ERROR_NO_DEVICE;
  const char* root = std::getenv("BULKHEAD_ROOT");
  auto state = StateFile::open(twin / "state.bin");
  if (!state.ok()) return CUDA_ERROR_NO_DEVICE;
  auto driver = rm::Driver::open(twin);
  if (!driver.ok()) return CUDA_ERROR_NO_DEVICE;
  if (const auto failed = all.rm.open(root != nullptr && *root != '\0' ? root : (twin / "root").string());
      failed != CUDA_SUCCESS)
    return failed;
  all.driver = std::move(driver).value();
  all.uvm = ::open((all.rm.root() + "/dev/nvidia-uvm").c_str(), O_RDWR | O_CLOEXEC);
  if (all.uvm < 0) return CUDA_ERROR_NO_DEVICE;
  static_cast<void>(all.rm.alloc(0, 0xcb33, nullptr, all.rm.take_handle()));
  std::vector<std::uint32_t> minors;
  (*state)->read([&](const State& now) {
    if (now.driver_loaded == 0) return;
    // In nvidia-smi's order, which is CUDA's where all are equally fast. A GPU in MIG mode is not a CUDA
    // device; of its instances the memory's size and the multiprocessors are simulated, no more.
    std::vector<std::uint32_t> there;
    for (std::uint32_t i = 0; i < now.gpu_count; ++i) {
      if (now.gpus[i].on_pci != 0 && now.gpus[i].mig_current == 0) there.push_back(i);
    }
    const GpuInstance* slice = nullptr;
    for (const auto index : visible(now, there, &slice)) {
      auto device = std::make_unique<Device>();
      describe(now, index, *device);
      if (slice != nullptr) narrow(now.chips[now.gpus[index].chip], *slice, *device);
      device->ordinal = static_cast<int>(all.devices.size());
      minors.push_back(now.gpus[index].minor);
      all.devices.push_back(std::move(device));
    }
  });
  if (all.devices.empty()) return CUDA_ERROR_NO_DEVICE;
  for (std::size_t i = 0; i < all.devices.size(); ++i) {
    if (const auto failed = open_device(all, *all.devices[i], minors[i]); failed != CUDA_SUCCESS)
      return failed;
  }
  all.initialised = true;
  return CUDA_SUCCESS;
}

}  // namespace

CUresult memory_info(Device& device, std::uint64_t& free_bytes, std::uint64_t& total_bytes) {
  abi::FbInfo info{};
  info.count = 2;
  info.list[0].index = abi::fb_heap_size;
  info.list[1].index = abi::fb_heap_free;
  const auto result = process().rm.control(device.subdevice, abi::cmd_fb_get_info_v2, &info, sizeof info);
  if (result != CUDA_SUCCESS) return result;
  total_bytes = static_cast<std::uint64_t>(info.list[0].data) << 10U;
  free_bytes = static_cast<std::uint64_t>(info.list[1].data) << 10U;
  if (device.part != 0) {
    total_bytes = std::min(total_bytes, device.part);
    free_bytes = std::min(free_bytes, device.part);
  }
  return CUDA_SUCCESS;
}

}  // namespace bulkhead::twin::cuda

using namespace bulkhead::twin::cuda;

EXPORT CUresult cuInit(unsigned flags) {
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  Process& all = process();
  if (all.forked) return CUDA_ERROR_NOT_INITIALIZED;
  const Lock lock(all.mutex);
  if (all.initialised) return CUDA_SUCCESS;
  static bool tried = false;
  static CUresult answer = CUDA_SUCCESS;
  if (tried) return answer;  // the real one does not look again either
  tried = true;
  answer = start(all);
  if (answer == CUDA_SUCCESS) ::pthread_atfork(nullptr, nullptr, [] { process().forked = true; });
  return answer;
}

EXPORT CUresult cuDriverGetVersion(int* version) {
  if (version == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *version = 13000;
  return CUDA_SUCCESS;
}
