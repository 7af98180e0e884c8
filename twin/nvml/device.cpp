// What a GPU is and how it does: identity, memory, link, clocks, power, heat, errors, processes.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "twin/nvml/library.hpp"

using namespace bulkhead::twin;        // NOLINT(google-build-using-namespace): this file is the library
using namespace bulkhead::twin::nvml;  // NOLINT(google-build-using-namespace)

namespace {

using Dev = const bulkhead::twin::nvml::Device&;

template <class T>
nvmlReturn_t set(T* out, T value) {
  *out = value;
  return NVML_SUCCESS;
}

nvmlEnableState_t enabled(bool on) { return on ? NVML_FEATURE_ENABLED : NVML_FEATURE_DISABLED; }

unsigned rounded(double value) { return value <= 0 ? 0U : static_cast<unsigned>(std::lround(value)); }

const MigProfile& profile_of(Dev d) { return *mig::profile_by_id(*d.state, d.slot, d.instance->profile_id); }

std::string bus_id(const Gpu& gpu) {
  return fmt::format("{:08X}:{:02X}:{:02X}.0", gpu.pci_domain, gpu.pci_bus, gpu.pci_device);
}

void fill_pci(Dev d, nvmlPciInfo_t& pci) {
  pci = {};
  put(fmt::format("{:04X}:{:02X}:{:02X}.0", d.gpu->pci_domain & 0xffffU, d.gpu->pci_bus, d.gpu->pci_device),
      pci.busIdLegacy);
  pci.domain = d.gpu->pci_domain;
  pci.bus = d.gpu->pci_bus;
  pci.device = d.gpu->pci_device;
  pci.pciDeviceId = d.chip->pci_device;
  pci.pciSubSystemId = d.chip->pci_subsystem;
  put(bus_id(*d.gpu), pci.busId);
}

// "00000000:1B:00.0", "0000:1b:00.0" and "1b:00.0" all name the same function.
bool same_bus(std::string_view text, const Gpu& gpu) {
  unsigned domain = 0, bus = 0, device = 0, function = 0;
  const std::string copy(text);
  if (std::sscanf(copy.c_str(), "%x:%x:%x.%x", &domain, &bus, &device, &function) < 3) {
    domain = 0;
    if (std::sscanf(copy.c_str(), "%x:%x.%x", &bus, &device, &function) < 2) return false;
  }
  return function == 0 && domain == gpu.pci_domain && bus == gpu.pci_bus && device == gpu.pci_device;
}

nvmlReturn_t open_gpu(const State& state, std::uint32_t slot, nvmlDevice_t* device) {
  if (off_the_bus(state, slot)) return lost;
  return set(device, handle_of_gpu(slot));
}

unsigned clock_now(Dev d, unsigned type) {
  switch (type) {
    case NVML_CLOCK_GRAPHICS:
    case NVML_CLOCK_SM:
      return rounded(d.gpu->clock_graphics);
    case NVML_CLOCK_MEM:
      return rounded(d.gpu->clock_memory);
    default:
      return rounded(d.gpu->clock_graphics * d.chip->clock_video_max /
                     std::max(d.chip->clock_graphics_max, 1U));
  }
}

unsigned clock_most(Dev d, unsigned type) {
  switch (type) {
    case NVML_CLOCK_GRAPHICS:
    case NVML_CLOCK_SM:
      return d.chip->clock_graphics_max;
    case NVML_CLOCK_MEM:
      return d.chip->clock_memory[0];
    default:
      return d.chip->clock_video_max;
  }
}

std::vector<unsigned> graphics_clocks(const Chip& chip) {
  std::vector<unsigned> clocks;
  for (unsigned mhz = chip.clock_graphics_max; mhz >= chip.clock_graphics_min && chip.clock_graphics_step > 0;
       mhz -= chip.clock_graphics_step) {
    clocks.push_back(mhz);
    if (mhz < chip.clock_graphics_step) break;
  }
  return clocks;
}

std::string clock_line(const Chip& chip, unsigned now, unsigned memory) {
  return fmt::format(
      "nvclock={}, nvclockmin={}, nvclockmax={}, nvclockeditable=0, memclock={}, memclockmin={}, "
      "memclockmax={}, memclockeditable=0, "
      "memTransferRate={}, memTransferRatemin={}, memTransferRatemax={}, memTransferRateeditable=0",
      now, chip.clock_graphics_min, chip.clock_graphics_max, memory, memory, memory, memory * 2, memory * 2,
      memory * 2);
}

struct Split {
  std::uint64_t total, reserved, used;  // used: without reserved
};

Split memory_of(Dev d) {
  if (d.is_mig()) {
    const std::uint64_t total = static_cast<std::uint64_t>(profile_of(d).memory_mib) << 20U;
    return {total, 0, std::min(total, memory_of_processes(*d.state, d.slot, d.instance->id))};
  }
  const std::uint64_t total = d.chip->memory_bytes, reserved = d.chip->reserved_bytes;
  return {total, reserved, std::min(total - reserved, memory_of_processes(*d.state, d.slot))};
}

constexpr std::uint64_t bar1_in_use = 1703936;  // read on an idle H100 and an idle H200

template <class T>
T process_entry(const Process& process, Dev d) {
  T entry{};
  entry.pid = process.pid;
  entry.usedGpuMemory = process.memory_bytes;
  if constexpr (sizeof(T) > sizeof(nvmlProcessInfo_v1_t)) {
    entry.gpuInstanceId = d.mig_on() ? process.gpu_instance : none;
    entry.computeInstanceId = d.mig_on() ? process.compute_instance : none;
  }
  return entry;
}

std::vector<const Process*> processes_of(Dev d, bool graphics) {
  std::vector<const Process*> found;
  for (const Process& process : d.state->processes) {
    if (process.used == 0 || process.gpu != d.slot || (process.graphics != 0) != graphics) continue;
    if (d.is_mig() && (process.gpu_instance != d.instance->id || process.compute_instance != d.compute->id))
      continue;
    found.push_back(&process);
  }
  return found;
}

template <class T>
nvmlReturn_t list_processes(const char* function, nvmlDevice_t device, unsigned* count, T* infos,
                            bool graphics) {
  return ask(
      function, device, count != nullptr && (*count == 0 || infos != nullptr),
      [&](Dev d) {
        return put_list(processes_of(d, graphics), count, infos,
                        [&](const Process* p) { return process_entry<T>(*p, d); });
      },
      Accept::gpu_or_mig);
}

nvmlReturn_t no_processes(const char* function, nvmlDevice_t device, unsigned* count) {
  return ask(
      function, device, count != nullptr, [&](Dev) { return set(count, 0U); }, Accept::gpu_or_mig);
}

// Utilisation of the whole board is not known under MIG (nvml.h).
nvmlReturn_t idle_engine(const char* function, nvmlDevice_t device, unsigned* utilization, unsigned* period) {
  return ask(function, device, utilization != nullptr && period != nullptr, [&](Dev d) {
    if (d.mig_on()) return NVML_ERROR_NOT_SUPPORTED;
    *utilization = 0;
    return set(period, 100000U);
  });
}

nvmlReturn_t text_of(const char* function, nvmlDevice_t device, char* out, unsigned length,
                     std::string_view (*pick)(Dev)) {
  return ask(function, device, out != nullptr && length > 0, [&](Dev d) {
    const std::string_view text = pick(d);
    return text.empty() ? NVML_ERROR_NOT_SUPPORTED : put(text, out, length);
  });
}

nvmlReturn_t number_of(const char* function, nvmlDevice_t device, unsigned* out, unsigned (*pick)(Dev)) {
  return ask(function, device, out != nullptr, [&](Dev d) { return set(out, pick(d)); });
}

std::uint64_t ecc_count(Dev d, unsigned type, unsigned counter) {
  const bool since_load = counter == NVML_VOLATILE_ECC;
  if (type == NVML_MEMORY_ERROR_TYPE_CORRECTED)
    return since_load ? d.gpu->ecc_corrected : d.gpu->ecc_corrected_total;
  return since_load ? d.gpu->ecc_uncorrected : d.gpu->ecc_uncorrected_total;
}

}  // namespace

// ---- the host
nvmlReturn_t nvmlSystemGetDriverVersion(char* version, unsigned length) {
  return ask_host(__func__, version != nullptr,
                  [&](const State& s) { return put(s.driver_version.view(), version, length); });
}
nvmlReturn_t nvmlSystemGetNVMLVersion(char* version, unsigned length) {
  return ask_host(__func__, version != nullptr,
                  [&](const State& s) { return put(s.nvml_version.view(), version, length); });
}
nvmlReturn_t nvmlSystemGetCudaDriverVersion(int* version) {
  return ask_host(__func__, version != nullptr,
                  [&](const State& s) { return set(version, static_cast<int>(s.cuda_version)); });
}
nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int* version) {
  return nvmlSystemGetCudaDriverVersion(version);
}
nvmlReturn_t nvmlSystemGetProcessName(unsigned pid, char* name, unsigned length) {
  return ask_host(__func__, name != nullptr && length > 0, [&](const State& s) {
    for (const Process& process : s.processes) {
      if (process.used != 0 && process.pid == pid)
        return put(process.name.view().substr(0, length - 1), name, length);
    }
    return NVML_ERROR_NOT_FOUND;
  });
}
nvmlReturn_t nvmlUnitGetCount(unsigned* count) {
  return ask_host(__func__, count != nullptr,
                  [&](const State&) { return set(count, 0U); });  // no S-class units
}
nvmlReturn_t nvmlSystemGetHicVersion(unsigned* count, nvmlHwbcEntry_t*) {
  return ask_host(__func__, count != nullptr, [&](const State&) { return set(count, 0U); });
}
nvmlReturn_t nvmlGetExcludedDeviceCount(unsigned* count) {
  return ask_host(__func__, count != nullptr, [&](const State&) { return set(count, 0U); });
}
nvmlReturn_t nvmlGetExcludedDeviceInfoByIndex(unsigned, nvmlExcludedDeviceInfo_t* info) {
  return ask_host(__func__, info != nullptr, [&](const State&) { return NVML_ERROR_INVALID_ARGUMENT; });
}

// ---- handles
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned* count) {
  return ask_host(__func__, count != nullptr, [&](const State& s) {
    unsigned n = 0;
    for (std::uint32_t g = 0; g < s.gpu_count; ++g) n += enumerated(s, g) ? 1U : 0U;
    return set(count, n);
  });
}
nvmlReturn_t nvmlDeviceGetCount(unsigned* count) { return nvmlDeviceGetCount_v2(count); }

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t* device) {
  return ask_host(__func__, device != nullptr, [&](const State& s) {
    const std::uint32_t slot = slot_at(s, index);
    return slot == none ? NVML_ERROR_INVALID_ARGUMENT : open_gpu(s, slot, device);
  });
}
nvmlReturn_t nvmlDeviceGetHandleByIndex(unsigned index, nvmlDevice_t* device) {
  return nvmlDeviceGetHandleByIndex_v2(index, device);
}

nvmlReturn_t nvmlDeviceGetHandleBySerial(const char* serial, nvmlDevice_t* device) {
  return ask_host(__func__, serial != nullptr && device != nullptr, [&](const State& s) {
    for (std::uint32_t g = 0; g < s.gpu_count; ++g) {
      if (enumerated(s, g) && s.gpus[g].serial.view() == serial) return open_gpu(s, g, device);
    }
    return NVML_ERROR_NOT_FOUND;
  });
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char* uuid, nvmlDevice_t* device) {
  return ask_host(__func__, uuid != nullptr && device != nullptr, [&](const State& s) {
    const std::string_view wanted(uuid);
    for (std::uint32_t g = 0; g < s.gpu_count; ++g) {
      if (!enumerated(s, g)) continue;
      if (s.gpus[g].uuid.view() == wanted) return open_gpu(s, g, device);
      for (const mig::Device& slice : mig::devices(s, g)) {
        // Both spellings are accepted: MIG-<uuid> and, from before R470, MIG-GPU-<gpu uuid>/<gi>/<ci>.
        if (slice.compute->uuid.view() == wanted ||
            wanted ==
                fmt::format("MIG-{}/{}/{}", s.gpus[g].uuid.view(), slice.instance->id, slice.compute->id)) {
          return set(device, handle_of_mig(g, *slice.instance, *slice.compute));
        }
      }
    }
    return NVML_ERROR_NOT_FOUND;
  });
}

extern "C" __attribute__((visibility("default"))) nvmlReturn_t nvmlDeviceGetHandleByUUIDV(
    const abi::UuidValue* uuid, nvmlDevice_t* device);
nvmlReturn_t nvmlDeviceGetHandleByUUIDV(const abi::UuidValue* uuid, nvmlDevice_t* device) {
  if (uuid == nullptr || device == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  if (uuid->version != abi::version_word<abi::UuidValue>(1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
  if (uuid->type == 1) return nvmlDeviceGetHandleByUUID(uuid->value.text, device);
  if (uuid->type != 2) return NVML_ERROR_INVALID_ARGUMENT;
  std::string hex;
  for (int i = 0; i < 16; ++i) {
    hex += fmt::format("{:02x}", uuid->value.bytes[i]);
    if (i == 3 || i == 5 || i == 7 || i == 9) hex += '-';
  }
  const nvmlReturn_t code = nvmlDeviceGetHandleByUUID(("GPU-" + hex).c_str(), device);
  return code == NVML_ERROR_NOT_FOUND ? nvmlDeviceGetHandleByUUID(("MIG-" + hex).c_str(), device) : code;
}

nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char* text, nvmlDevice_t* device) {
  return ask_host(__func__, text != nullptr && device != nullptr, [&](const State& s) {
    for (std::uint32_t g = 0; g < s.gpu_count; ++g) {
      if (enumerated(s, g) && same_bus(text, s.gpus[g])) return open_gpu(s, g, device);
    }
    return NVML_ERROR_NOT_FOUND;
  });
}
nvmlReturn_t nvmlDeviceGetHandleByPciBusId(const char* text, nvmlDevice_t* device) {
  return nvmlDeviceGetHandleByPciBusId_v2(text, device);
}

// ---- identity
nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char* name, unsigned length) {
  return ask(
      __func__, device, name != nullptr && length > 0,
      [&](Dev d) {
        if (!d.is_mig()) return put(d.chip->model.view(), name, length);
        return put(fmt::format("{} MIG {}", d.chip->model.view(),
                               mig::device_name(*d.chip, *d.instance, *d.compute)),
                   name, length);
      },
      Accept::gpu_or_mig);
}
nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char* uuid, unsigned length) {
  return ask(
      __func__, device, uuid != nullptr && length > 0,
      [&](Dev d) { return put(d.is_mig() ? d.compute->uuid.view() : d.gpu->uuid.view(), uuid, length); },
      Accept::gpu_or_mig);
}
nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned* index) {
  return ask(
      __func__, device, index != nullptr,
      [&](Dev d) {
        if (!d.is_mig()) return set(index, index_of(*d.state, d.slot));
        const auto slices = mig::devices(*d.state, d.slot);
        for (unsigned i = 0; i < slices.size(); ++i) {
          if (slices[i].compute == d.compute) return set(index, i);
        }
        return NVML_ERROR_NOT_FOUND;
      },
      Accept::gpu_or_mig);
}
nvmlReturn_t nvmlDeviceGetSerial(nvmlDevice_t device, char* out, unsigned length) {
  return text_of(__func__, device, out, length, [](Dev d) { return d.gpu->serial.view(); });
}
nvmlReturn_t nvmlDeviceGetBoardPartNumber(nvmlDevice_t device, char* out, unsigned length) {
  return text_of(__func__, device, out, length, [](Dev d) { return d.chip->board_part.view(); });
}
nvmlReturn_t nvmlDeviceGetVbiosVersion(nvmlDevice_t device, char* out, unsigned length) {
  return text_of(__func__, device, out, length, [](Dev d) { return d.chip->vbios.view(); });
}
nvmlReturn_t nvmlDeviceGetInforomImageVersion(nvmlDevice_t device, char* out, unsigned length) {
  return text_of(__func__, device, out, length, [](Dev d) { return d.chip->inforom_image.view(); });
}
nvmlReturn_t nvmlDeviceGetInforomVersion(nvmlDevice_t device, nvmlInforomObject_t object, char* out,
                                         unsigned length) {
  return ask(__func__, device, out != nullptr && static_cast<unsigned>(object) < NVML_INFOROM_COUNT,
             [&](Dev d) {
               const auto& text = object == NVML_INFOROM_OEM   ? d.chip->inforom_oem
                                  : object == NVML_INFOROM_ECC ? d.chip->inforom_ecc
                                                               : d.chip->inforom_power;
               return text.view().empty() ? NVML_ERROR_NOT_SUPPORTED : put(text.view(), out, length);
             });
}
nvmlReturn_t nvmlDeviceGetInforomConfigurationChecksum(nvmlDevice_t device, unsigned* checksum) {
  return number_of(__func__, device, checksum, [](Dev) { return 0U; });
}
nvmlReturn_t nvmlDeviceValidateInforom(nvmlDevice_t device) {
  return ask(__func__, device, true, [](Dev) { return NVML_SUCCESS; });
}
nvmlReturn_t nvmlDeviceGetBrand(nvmlDevice_t device, nvmlBrandType_t* brand) {
  return ask(__func__, device, brand != nullptr,
             [&](Dev d) { return set(brand, static_cast<nvmlBrandType_t>(d.chip->brand)); });
}
nvmlReturn_t nvmlDeviceGetArchitecture(nvmlDevice_t device, nvmlDeviceArchitecture_t* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.chip->architecture; });
}
nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int* major, int* minor) {
  return ask(
      __func__, device, major != nullptr && minor != nullptr,
      [&](Dev d) {
        *major = static_cast<int>(d.chip->cc_major);
        return set(minor, static_cast<int>(d.chip->cc_minor));
      },
      Accept::gpu_or_mig);
}
nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.gpu->minor; });
}
extern "C" __attribute__((visibility("default"))) nvmlReturn_t nvmlDeviceGetModuleId(nvmlDevice_t device,
                                                                                     unsigned* out);
nvmlReturn_t nvmlDeviceGetModuleId(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.gpu->module; });
}
nvmlReturn_t nvmlDeviceGetBoardId(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out,
                   [](Dev d) { return d.gpu->pci_domain << 16U | d.gpu->pci_bus << 8U | d.gpu->pci_device; });
}
nvmlReturn_t nvmlDeviceGetMultiGpuBoard(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev) { return 0U; });
}
nvmlReturn_t nvmlDeviceOnSameBoard(nvmlDevice_t device, nvmlDevice_t other, int* out) {
  nvmlDevice_t same = device;
  return ask(__func__, device, out != nullptr && other != nullptr,
             [&](Dev) { return set(out, same == other ? 1 : 0); });
}
nvmlReturn_t nvmlDeviceGetNumGpuCores(nvmlDevice_t device, unsigned* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    return d.mig_on() ? NVML_ERROR_NOT_SUPPORTED : set(out, d.chip->cores);  // nvml.h: not under MIG
  });
}
nvmlReturn_t nvmlDeviceGetIrqNum(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.gpu->irq; });
}
nvmlReturn_t nvmlDeviceGetBusType(nvmlDevice_t device, nvmlBusType_t* out) {
  return number_of(__func__, device, out, [](Dev) { return static_cast<unsigned>(NVML_BUS_TYPE_PCIE); });
}
nvmlReturn_t nvmlDeviceGetGspFirmwareVersion(nvmlDevice_t device, char* version) {
  return ask(__func__, device, version != nullptr, [&](Dev d) {
    return put(d.state->driver_version.view(), version, NVML_GSP_FIRMWARE_VERSION_BUF_SIZE);
  });
}
nvmlReturn_t nvmlDeviceGetGspFirmwareMode(nvmlDevice_t device, unsigned* is_enabled, unsigned* by_default) {
  return ask(__func__, device, is_enabled != nullptr && by_default != nullptr, [&](Dev) {
    *is_enabled = 1;
    return set(by_default, 1U);
  });
}
nvmlReturn_t nvmlDeviceGetVirtualizationMode(nvmlDevice_t device, nvmlGpuVirtualizationMode_t* mode) {
  return ask(__func__, device, mode != nullptr, [&](Dev d) {
    return set(mode, static_cast<nvmlGpuVirtualizationMode_t>(d.state->virtualization));
  });
}
nvmlReturn_t nvmlDeviceGetDisplayMode(nvmlDevice_t device, nvmlEnableState_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) { return set(out, NVML_FEATURE_ENABLED); });
}
nvmlReturn_t nvmlDeviceGetDisplayActive(nvmlDevice_t device, nvmlEnableState_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) { return set(out, NVML_FEATURE_DISABLED); });
}
nvmlReturn_t nvmlDeviceGetPersistenceMode(nvmlDevice_t device, nvmlEnableState_t* out) {
  return ask(__func__, device, out != nullptr,
             [&](Dev d) { return set(out, enabled(d.gpu->persistence != 0)); });
}
nvmlReturn_t nvmlDeviceGetComputeMode(nvmlDevice_t device, nvmlComputeMode_t* out) {
  return ask(__func__, device, out != nullptr,
             [&](Dev d) { return set(out, static_cast<nvmlComputeMode_t>(d.gpu->compute_mode)); });
}

// ---- the link
nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t* pci) {
  return ask(__func__, device, pci != nullptr, [&](Dev d) {
    fill_pci(d, *pci);
    return NVML_SUCCESS;
  });
}
namespace {
// Before v3 the structure ended with four reserved words where busId is now: 52 bytes, legacy id only.
nvmlReturn_t old_pci_info(const char* function, nvmlDevice_t device, nvmlPciInfo_t* pci,
                          bool with_subsystem) {
  return ask(function, device, pci != nullptr, [&](Dev d) {
    nvmlPciInfo_t whole;
    fill_pci(d, whole);
    const std::size_t size =
        offsetof(nvmlPciInfo_t, pciSubSystemId) + (with_subsystem ? sizeof(unsigned) : 0);
    std::memcpy(pci, &whole, size);
    return NVML_SUCCESS;
  });
}
}  // namespace
nvmlReturn_t nvmlDeviceGetPciInfo_v2(nvmlDevice_t device, nvmlPciInfo_t* pci) {
  return old_pci_info(__func__, device, pci, true);
}
nvmlReturn_t nvmlDeviceGetPciInfo(nvmlDevice_t device, nvmlPciInfo_t* pci) {
  return old_pci_info(__func__, device, pci, false);
}

extern "C" {
#pragma GCC visibility push(default)
nvmlReturn_t nvmlDeviceGetPciInfoExt(nvmlDevice_t device, abi::PciInfoExt* pci);
nvmlReturn_t nvmlDeviceGetGpuMaxPcieLinkGeneration(nvmlDevice_t device, unsigned* out);
nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, unsigned long long* out);
nvmlReturn_t nvmlDeviceGetSupportedClocksEventReasons(nvmlDevice_t device, unsigned long long* out);
nvmlReturn_t nvmlDeviceGetJpgUtilization(nvmlDevice_t device, unsigned* utilization, unsigned* period);
nvmlReturn_t nvmlDeviceGetOfaUtilization(nvmlDevice_t device, unsigned* utilization, unsigned* period);
nvmlReturn_t nvmlDeviceGetFanSpeedRPM(nvmlDevice_t device, void* out);
nvmlReturn_t nvmlDeviceGetMarginTemperature(nvmlDevice_t device, abi::MarginTemperature* out);
nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, abi::Temperature* out);
nvmlReturn_t nvmlDeviceGetPerformanceModes(nvmlDevice_t device, abi::PerfModes* out);
nvmlReturn_t nvmlDeviceGetCurrentClockFreqs(nvmlDevice_t device, abi::PerfModes* out);
nvmlReturn_t nvmlDeviceGetSramEccErrorStatus(nvmlDevice_t device, abi::SramErrors* out);
nvmlReturn_t nvmlDeviceGetRemappedRows_v2(nvmlDevice_t device, abi::RemappedRows2* out);
nvmlReturn_t nvmlDeviceGetRunningProcessDetailList(nvmlDevice_t device, abi::ProcessDetails* out);
#pragma GCC visibility pop
}

nvmlReturn_t nvmlDeviceGetPciInfoExt(nvmlDevice_t device, abi::PciInfoExt* pci) {
  return ask(__func__, device, pci != nullptr, [&](Dev d) {
    if (pci->version != abi::version_word<abi::PciInfoExt>(1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    pci->domain = d.gpu->pci_domain;
    pci->bus = d.gpu->pci_bus;
    pci->device = d.gpu->pci_device;
    pci->device_id = d.chip->pci_device;
    pci->subsystem_id = d.chip->pci_subsystem;
    pci->base_class = 3;
    pci->sub_class = 2;
    put(bus_id(*d.gpu), pci->bus_id);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetMaxPcieLinkGeneration(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.chip->pcie_gen; });
}
nvmlReturn_t nvmlDeviceGetGpuMaxPcieLinkGeneration(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.chip->pcie_gen; });
}
nvmlReturn_t nvmlDeviceGetMaxPcieLinkWidth(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.chip->pcie_width; });
}
nvmlReturn_t nvmlDeviceGetCurrPcieLinkGeneration(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.chip->pcie_gen; });
}
nvmlReturn_t nvmlDeviceGetCurrPcieLinkWidth(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.chip->pcie_width; });
}
nvmlReturn_t nvmlDeviceGetPcieLinkMaxSpeed(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out,
                   [](Dev d) { return d.chip->pcie_gen; });  // the enum counts generations
}
nvmlReturn_t nvmlDeviceGetPcieSpeed(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) {
    static constexpr unsigned speeds[] = {0, 2500, 5000, 8000, 16000, 32000, 64000};  // MT/s
    return speeds[std::min(d.chip->pcie_gen, 6U)];
  });
}
nvmlReturn_t nvmlDeviceGetPcieThroughput(nvmlDevice_t device, nvmlPcieUtilCounter_t counter, unsigned* out) {
  return ask(__func__, device, out != nullptr && static_cast<unsigned>(counter) < NVML_PCIE_UTIL_COUNT,
             [&](Dev d) {
               return set(out, rounded(d.gpu->busy * 100000));  // KB/s; the twin moves no data
             });
}
nvmlReturn_t nvmlDeviceGetPcieReplayCounter(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return static_cast<unsigned>(d.gpu->pcie_replays); });
}

// ---- memory
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t* out) {
  return ask(
      __func__, device, out != nullptr,
      [&](Dev d) {
        const Split memory = memory_of(d);
        out->total = memory.total;
        out->used = memory.reserved + memory.used;
        out->free = memory.total - memory.reserved - memory.used;
        return NVML_SUCCESS;
      },
      Accept::gpu_or_mig);
}
nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t* out) {
  return ask(
      __func__, device, out != nullptr,
      [&](Dev d) {
        if (out->version != abi::version_word<nvmlMemory_v2_t>(2))
          return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
        const Split memory = memory_of(d);
        out->total = memory.total;
        out->reserved = memory.reserved;
        out->used = memory.used;
        out->free = memory.total - memory.reserved - memory.used;
        return NVML_SUCCESS;
      },
      Accept::gpu_or_mig);
}
nvmlReturn_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t device, nvmlBAR1Memory_t* out) {
  return ask(
      __func__, device, out != nullptr,
      [&](Dev d) {
        std::uint64_t total = d.chip->bar1_bytes;
        if (d.is_mig()) total = total / std::max(d.chip->memory_slices, 1U) * d.instance->size;
        out->bar1Total = total;
        out->bar1Used = d.is_mig() ? 0 : bar1_in_use;
        out->bar1Free = total - out->bar1Used;
        return NVML_SUCCESS;
      },
      Accept::gpu_or_mig);
}
nvmlReturn_t nvmlDeviceGetMemoryBusWidth(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.chip->memory_bus_bits; });
}

// ---- clocks
nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, nvmlClockType_t type, unsigned* out) {
  return ask(__func__, device, out != nullptr && static_cast<unsigned>(type) < NVML_CLOCK_COUNT,
             [&](Dev d) { return set(out, clock_now(d, type)); });
}
nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, nvmlClockType_t type, unsigned* out) {
  return ask(__func__, device, out != nullptr && static_cast<unsigned>(type) < NVML_CLOCK_COUNT,
             [&](Dev d) { return set(out, clock_most(d, type)); });
}
nvmlReturn_t nvmlDeviceGetClock(nvmlDevice_t device, nvmlClockType_t type, nvmlClockId_t id, unsigned* out) {
  const bool ok = out != nullptr && static_cast<unsigned>(type) < NVML_CLOCK_COUNT &&
                  static_cast<unsigned>(id) < NVML_CLOCK_ID_COUNT;
  return ask(__func__, device, ok, [&](Dev d) {
    switch (id) {
      case NVML_CLOCK_ID_CURRENT:
        return set(out, clock_now(d, type));
      case NVML_CLOCK_ID_CUSTOMER_BOOST_MAX:
        return set(out, clock_most(d, type));
      default:
        break;
    }
    if (type == NVML_CLOCK_VIDEO) return NVML_ERROR_NOT_SUPPORTED;
    const unsigned app = type == NVML_CLOCK_MEM ? d.gpu->app_clock_memory : d.gpu->app_clock_graphics;
    return set(out, id == NVML_CLOCK_ID_APP_CLOCK_TARGET && app != 0 ? app : clock_most(d, type));
  });
}
nvmlReturn_t nvmlDeviceGetApplicationsClock(nvmlDevice_t device, nvmlClockType_t type, unsigned* out) {
  return ask(__func__, device, out != nullptr && static_cast<unsigned>(type) < NVML_CLOCK_COUNT, [&](Dev d) {
    if (type == NVML_CLOCK_VIDEO) return NVML_ERROR_NOT_SUPPORTED;
    const unsigned app = type == NVML_CLOCK_MEM ? d.gpu->app_clock_memory : d.gpu->app_clock_graphics;
    return set(out, app != 0 ? app : clock_most(d, type));
  });
}
nvmlReturn_t nvmlDeviceGetDefaultApplicationsClock(nvmlDevice_t device, nvmlClockType_t type, unsigned* out) {
  return ask(__func__, device, out != nullptr && static_cast<unsigned>(type) < NVML_CLOCK_COUNT, [&](Dev d) {
    return type == NVML_CLOCK_VIDEO ? NVML_ERROR_NOT_SUPPORTED : set(out, clock_most(d, type));
  });
}
nvmlReturn_t nvmlDeviceGetMaxCustomerBoostClock(nvmlDevice_t device, nvmlClockType_t type, unsigned* out) {
  return ask(__func__, device, out != nullptr && static_cast<unsigned>(type) < NVML_CLOCK_COUNT,
             [&](Dev d) { return set(out, clock_most(d, type)); });
}
nvmlReturn_t nvmlDeviceGetSupportedMemoryClocks(nvmlDevice_t device, unsigned* count, unsigned* clocks) {
  return ask(__func__, device, count != nullptr, [&](Dev d) {
    const std::vector<unsigned> all(d.chip->clock_memory, d.chip->clock_memory + d.chip->clock_memory_count);
    return put_list(all, count, clocks, [](unsigned mhz) { return mhz; });
  });
}
nvmlReturn_t nvmlDeviceGetSupportedGraphicsClocks(nvmlDevice_t device, unsigned memory, unsigned* count,
                                                  unsigned* clocks) {
  return ask(__func__, device, count != nullptr, [&](Dev d) {
    const auto* end = d.chip->clock_memory + d.chip->clock_memory_count;
    if (std::find(d.chip->clock_memory, end, memory) == end) return NVML_ERROR_NOT_FOUND;
    return put_list(graphics_clocks(*d.chip), count, clocks, [](unsigned mhz) { return mhz; });
  });
}
nvmlReturn_t nvmlDeviceGetMinMaxClockOfPState(nvmlDevice_t device, nvmlClockType_t type, nvmlPstates_t pstate,
                                              unsigned* low, unsigned* high) {
  const bool ok = low != nullptr && high != nullptr && static_cast<unsigned>(type) < NVML_CLOCK_COUNT;
  return ask(__func__, device, ok, [&](Dev d) {
    if (pstate != NVML_PSTATE_0 && pstate != NVML_PSTATE_2) return NVML_ERROR_NOT_SUPPORTED;
    *high = clock_most(d, type);
    *low = type == NVML_CLOCK_MEM ? *high : d.chip->clock_graphics_min;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetSupportedPerformanceStates(nvmlDevice_t device, nvmlPstates_t* states,
                                                     unsigned size) {
  return ask(__func__, device, states != nullptr && size > 0, [&](Dev) {
    // Read on the H100: P2 and P0, in this order; `size` is in bytes.
    const nvmlPstates_t known[] = {NVML_PSTATE_2, NVML_PSTATE_0};
    const unsigned room = size / static_cast<unsigned>(sizeof(nvmlPstates_t));
    for (unsigned i = 0; i < room; ++i) states[i] = i < 2 ? known[i] : NVML_PSTATE_UNKNOWN;
    return room < 2 ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetPerformanceState(nvmlDevice_t device, nvmlPstates_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) { return set(out, NVML_PSTATE_0); });
}
nvmlReturn_t nvmlDeviceGetPowerState(nvmlDevice_t device, nvmlPstates_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) { return set(out, NVML_PSTATE_0); });
}
nvmlReturn_t nvmlDeviceGetPerformanceModes(nvmlDevice_t device, abi::PerfModes* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    if (out->version != abi::version_word<abi::PerfModes>(1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    std::string text;
    for (unsigned i = 0; i < d.chip->clock_memory_count; ++i) {
      const unsigned memory = d.chip->clock_memory[d.chip->clock_memory_count - 1 - i];
      text += fmt::format("{}perf={}, {}", i == 0 ? "" : " ; ", i,
                          clock_line(*d.chip, d.chip->clock_graphics_min, memory));
    }
    put(text, out->text);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetCurrentClockFreqs(nvmlDevice_t device, abi::PerfModes* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    if (out->version != abi::version_word<abi::PerfModes>(1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    put(clock_line(*d.chip, clock_now(d, NVML_CLOCK_GRAPHICS), clock_now(d, NVML_CLOCK_MEM)), out->text);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, unsigned long long* out) {
  return ask(__func__, device, out != nullptr,
             [&](Dev d) { return set(out, static_cast<unsigned long long>(d.gpu->clock_reasons)); });
}
nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device, unsigned long long* out) {
  return nvmlDeviceGetCurrentClocksEventReasons(device, out);
}
nvmlReturn_t nvmlDeviceGetSupportedClocksEventReasons(nvmlDevice_t device, unsigned long long* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) { return set(out, 511ULL); });  // read on the H100
}
nvmlReturn_t nvmlDeviceGetSupportedClocksThrottleReasons(nvmlDevice_t device, unsigned long long* out) {
  return nvmlDeviceGetSupportedClocksEventReasons(device, out);
}
nvmlReturn_t nvmlDeviceGetAdaptiveClockInfoStatus(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev) { return 1U; });
}
nvmlReturn_t nvmlDeviceGetGpcClkVfOffset(nvmlDevice_t device, int* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) { return set(out, 0); });
}
nvmlReturn_t nvmlDeviceGetMemClkVfOffset(nvmlDevice_t device, int* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) { return set(out, 0); });
}
nvmlReturn_t nvmlDeviceGetGpcClkMinMaxVfOffset(nvmlDevice_t device, int* low, int* high) {
  return ask(__func__, device, low != nullptr && high != nullptr,
             [&](Dev) { return *low = 0, set(high, 0); });
}
nvmlReturn_t nvmlDeviceGetMemClkMinMaxVfOffset(nvmlDevice_t device, int* low, int* high) {
  return ask(__func__, device, low != nullptr && high != nullptr,
             [&](Dev) { return *low = 0, set(high, 0); });
}
nvmlReturn_t nvmlDeviceGetDynamicPstatesInfo(nvmlDevice_t device, nvmlGpuDynamicPstatesInfo_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    *out = {};
    for (unsigned i = 0; i < 4; ++i) out->utilization[i].bIsPresent = 1;
    out->utilization[0].percentage = rounded(d.gpu->busy * 100);
    return NVML_SUCCESS;
  });
}

// ---- power and heat
nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return rounded(d.gpu->watts_average * 1000); });
}
nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long* out) {
  return ask(__func__, device, out != nullptr,
             [&](Dev d) { return set(out, static_cast<unsigned long long>(d.gpu->energy_mj)); });
}
nvmlReturn_t nvmlDeviceGetPowerManagementMode(nvmlDevice_t device, nvmlEnableState_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) { return set(out, NVML_FEATURE_ENABLED); });
}
nvmlReturn_t nvmlDeviceGetPowerManagementLimit(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.gpu->power_limit_mw; });
}
nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.gpu->power_limit_mw; });
}
nvmlReturn_t nvmlDeviceGetPowerManagementDefaultLimit(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.chip->power_default_mw; });
}
nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t device, unsigned* low,
                                                          unsigned* high) {
  return ask(__func__, device, low != nullptr && high != nullptr, [&](Dev d) {
    *low = d.chip->power_min_mw;
    return set(high, d.chip->power_max_mw);
  });
}
nvmlReturn_t nvmlDeviceGetPowerSource(nvmlDevice_t device, nvmlPowerSource_t* out) {
  return number_of(__func__, device, out, [](Dev) { return 0U; });
}
nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, nvmlTemperatureSensors_t sensor, unsigned* out) {
  return ask(__func__, device, out != nullptr && sensor == NVML_TEMPERATURE_GPU,
             [&](Dev d) { return set(out, rounded(d.gpu->temperature)); });
}
nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, abi::Temperature* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    if (out->version != abi::version_word<abi::Temperature>(1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (out->sensor != NVML_TEMPERATURE_GPU) return NVML_ERROR_INVALID_ARGUMENT;
    return set(&out->temperature, static_cast<int>(rounded(d.gpu->temperature)));
  });
}
nvmlReturn_t nvmlDeviceGetMarginTemperature(nvmlDevice_t device, abi::MarginTemperature* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    if (out->version != abi::version_word<abi::MarginTemperature>(1))
      return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (d.chip->tlimit_zero_at == 0) return NVML_ERROR_NOT_SUPPORTED;
    return set(&out->margin, d.chip->tlimit_zero_at - static_cast<int>(rounded(d.gpu->temperature)));
  });
}
nvmlReturn_t nvmlDeviceGetTemperatureThreshold(nvmlDevice_t device, nvmlTemperatureThresholds_t type,
                                               unsigned* out) {
  return ask(__func__, device, out != nullptr && static_cast<unsigned>(type) < 8, [&](Dev d) {
    const std::int32_t known[] = {d.chip->threshold_shutdown, d.chip->threshold_slowdown,
                                  d.chip->threshold_mem_max, d.chip->threshold_gpu_max};
    if (static_cast<unsigned>(type) >= 4 || known[type] == 0) return NVML_ERROR_NOT_SUPPORTED;
    return set(out, static_cast<unsigned>(known[type]));
  });
}
nvmlReturn_t nvmlDeviceGetNumFans(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev d) { return d.chip->fan_count; });
}
nvmlReturn_t nvmlDeviceGetMinMaxFanSpeed(nvmlDevice_t device, unsigned* low, unsigned* high) {
  // A board without fans answers INVALID_ARGUMENT (read on the H100); no board of ours has any.
  return ask(__func__, device, low != nullptr && high != nullptr, [](Dev d) {
    return d.chip->fan_count == 0 ? NVML_ERROR_INVALID_ARGUMENT : NVML_ERROR_NOT_SUPPORTED;
  });
}
nvmlReturn_t nvmlDeviceGetFanSpeedRPM(nvmlDevice_t device, void* out) {
  return ask(__func__, device, out != nullptr, [](Dev d) {
    return d.chip->fan_count == 0 ? NVML_ERROR_INVALID_ARGUMENT : NVML_ERROR_NOT_SUPPORTED;
  });
}
nvmlReturn_t nvmlDeviceGetViolationStatus(nvmlDevice_t device, nvmlPerfPolicyType_t type,
                                          nvmlViolationTime_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    out->referenceTime = d.state->now_ns / 1000;
    switch (type) {
      case NVML_PERF_POLICY_POWER:
        out->violationTime = d.gpu->ns_power_cap;
        return NVML_SUCCESS;
      case NVML_PERF_POLICY_THERMAL:
        out->violationTime = d.gpu->ns_sw_thermal + d.gpu->ns_hw_thermal;
        return NVML_SUCCESS;
      case NVML_PERF_POLICY_SYNC_BOOST:
        out->violationTime = d.gpu->ns_sync_boost;
        return NVML_SUCCESS;
      case NVML_PERF_POLICY_BOARD_LIMIT:
      case NVML_PERF_POLICY_LOW_UTILIZATION:
      case NVML_PERF_POLICY_RELIABILITY:
        out->violationTime = 0;
        return NVML_SUCCESS;
      default:
        return NVML_ERROR_NOT_SUPPORTED;
    }
  });
}

// ---- use
nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    if (d.mig_on()) return NVML_ERROR_NOT_SUPPORTED;
    out->gpu = rounded(d.gpu->busy * 100);
    out->memory = rounded(d.gpu->busy * 40);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetEncoderUtilization(nvmlDevice_t device, unsigned* u, unsigned* p) {
  return idle_engine(__func__, device, u, p);
}
nvmlReturn_t nvmlDeviceGetDecoderUtilization(nvmlDevice_t device, unsigned* u, unsigned* p) {
  return idle_engine(__func__, device, u, p);
}
nvmlReturn_t nvmlDeviceGetJpgUtilization(nvmlDevice_t device, unsigned* u, unsigned* p) {
  return idle_engine(__func__, device, u, p);
}
nvmlReturn_t nvmlDeviceGetOfaUtilization(nvmlDevice_t device, unsigned* u, unsigned* p) {
  return idle_engine(__func__, device, u, p);
}
nvmlReturn_t nvmlDeviceGetEncoderStats(nvmlDevice_t device, unsigned* sessions, unsigned* fps,
                                       unsigned* latency) {
  return ask(__func__, device, sessions != nullptr && fps != nullptr && latency != nullptr,
             [&](Dev) { return *sessions = 0, *fps = 0, set(latency, 0U); });
}
nvmlReturn_t nvmlDeviceGetEncoderSessions(nvmlDevice_t device, unsigned* count, nvmlEncoderSessionInfo_t*) {
  return number_of(__func__, device, count, [](Dev) { return 0U; });
}
nvmlReturn_t nvmlDeviceGetFBCStats(nvmlDevice_t device, nvmlFBCStats_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) { return set(out, nvmlFBCStats_t{}); });
}
nvmlReturn_t nvmlDeviceGetFBCSessions(nvmlDevice_t device, unsigned* count, nvmlFBCSessionInfo_t*) {
  return number_of(__func__, device, count, [](Dev) { return 0U; });
}
nvmlReturn_t nvmlDeviceGetAccountingMode(nvmlDevice_t device, nvmlEnableState_t* out) {
  return ask(__func__, device, out != nullptr,
             [&](Dev d) { return set(out, enabled(d.gpu->accounting != 0 && !d.mig_on())); });
}
nvmlReturn_t nvmlDeviceGetAccountingBufferSize(nvmlDevice_t device, unsigned* out) {
  return number_of(__func__, device, out, [](Dev) { return 4000U; });
}
nvmlReturn_t nvmlDeviceGetAccountingPids(nvmlDevice_t device, unsigned* count, unsigned*) {
  return number_of(__func__, device, count, [](Dev) { return 0U; });
}
nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t device, nvmlProcessUtilizationSample_t* samples,
                                             unsigned* count, unsigned long long) {
  return ask(__func__, device, count != nullptr, [&](Dev d) {
    if (d.mig_on()) return NVML_ERROR_NOT_SUPPORTED;
    const auto all = processes_of(d, false);
    if (all.empty()) return *count = 0, NVML_ERROR_NOT_FOUND;
    return put_list(all, count, samples, [&](const Process* p) {
      nvmlProcessUtilizationSample_t sample{};
      sample.pid = p->pid;
      sample.timeStamp = d.state->now_ns / 1000;
      sample.smUtil = rounded(p->busy * 100);
      return sample;
    });
  });
}
nvmlReturn_t nvmlDeviceGetGridLicensableFeatures_v4(nvmlDevice_t device, nvmlGridLicensableFeatures_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) { return set(out, nvmlGridLicensableFeatures_t{}); });
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(nvmlDevice_t device, unsigned* count,
                                                  nvmlProcessInfo_v1_t* infos) {
  return list_processes(__func__, device, count, infos, false);
}
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned* count,
                                                     nvmlProcessInfo_v2_t* infos) {
  return list_processes(__func__, device, count, infos, false);
}
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned* count,
                                                     nvmlProcessInfo_t* infos) {
  return list_processes(__func__, device, count, infos, false);
}
nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses(nvmlDevice_t device, unsigned* count,
                                                   nvmlProcessInfo_v1_t* infos) {
  return list_processes(__func__, device, count, infos, true);
}
nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v2(nvmlDevice_t device, unsigned* count,
                                                      nvmlProcessInfo_v2_t* infos) {
  return list_processes(__func__, device, count, infos, true);
}
nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t device, unsigned* count,
                                                      nvmlProcessInfo_t* infos) {
  return list_processes(__func__, device, count, infos, true);
}
nvmlReturn_t nvmlDeviceGetMPSComputeRunningProcesses(nvmlDevice_t device, unsigned* count,
                                                     nvmlProcessInfo_v1_t*) {
  return no_processes(__func__, device, count);
}
nvmlReturn_t nvmlDeviceGetMPSComputeRunningProcesses_v2(nvmlDevice_t device, unsigned* count,
                                                        nvmlProcessInfo_v2_t*) {
  return no_processes(__func__, device, count);
}
nvmlReturn_t nvmlDeviceGetMPSComputeRunningProcesses_v3(nvmlDevice_t device, unsigned* count,
                                                        nvmlProcessInfo_t*) {
  return no_processes(__func__, device, count);
}
nvmlReturn_t nvmlDeviceGetRunningProcessDetailList(nvmlDevice_t device, abi::ProcessDetails* out) {
  return ask(
      __func__, device, out != nullptr,
      [&](Dev d) {
        if (out->version != abi::version_word<abi::ProcessDetails>(1))
          return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
        if (out->mode > 2) return NVML_ERROR_INVALID_ARGUMENT;
        const auto all = out->mode == 2 ? std::vector<const Process*>{} : processes_of(d, out->mode == 1);
        return put_list(all, &out->count, out->entries, [&](const Process* p) {
          const auto entry = process_entry<nvmlProcessInfo_t>(*p, d);
          return abi::ProcessDetail{entry.pid, entry.usedGpuMemory, entry.gpuInstanceId,
                                    entry.computeInstanceId, 0};
        });
      },
      Accept::gpu_or_mig);
}

// ---- errors
nvmlReturn_t nvmlDeviceGetEccMode(nvmlDevice_t device, nvmlEnableState_t* now, nvmlEnableState_t* pending) {
  return ask(__func__, device, now != nullptr && pending != nullptr, [&](Dev d) {
    *now = enabled(d.gpu->ecc_current != 0);
    return set(pending, enabled(d.gpu->ecc_pending != 0));
  });
}
nvmlReturn_t nvmlDeviceGetDefaultEccMode(nvmlDevice_t device, nvmlEnableState_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) { return set(out, NVML_FEATURE_ENABLED); });
}
nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, nvmlMemoryErrorType_t type,
                                         nvmlEccCounterType_t counter, unsigned long long* out) {
  const bool ok = out != nullptr && static_cast<unsigned>(type) < NVML_MEMORY_ERROR_TYPE_COUNT &&
                  static_cast<unsigned>(counter) < NVML_ECC_COUNTER_TYPE_COUNT;
  return ask(__func__, device, ok, [&](Dev d) {
    return d.gpu->ecc_current == 0 ? NVML_ERROR_NOT_SUPPORTED
                                   : set(out, static_cast<unsigned long long>(ecc_count(d, type, counter)));
  });
}
nvmlReturn_t nvmlDeviceGetDetailedEccErrors(nvmlDevice_t device, nvmlMemoryErrorType_t type,
                                            nvmlEccCounterType_t counter, nvmlEccErrorCounts_t* out) {
  const bool ok = out != nullptr && static_cast<unsigned>(type) < NVML_MEMORY_ERROR_TYPE_COUNT &&
                  static_cast<unsigned>(counter) < NVML_ECC_COUNTER_TYPE_COUNT;
  return ask(__func__, device, ok, [&](Dev d) {
    if (d.gpu->ecc_current == 0) return NVML_ERROR_NOT_SUPPORTED;
    *out = {};
    return set(&out->deviceMemory, static_cast<unsigned long long>(ecc_count(d, type, counter)));
  });
}
nvmlReturn_t nvmlDeviceGetMemoryErrorCounter(nvmlDevice_t device, nvmlMemoryErrorType_t type,
                                             nvmlEccCounterType_t counter, nvmlMemoryLocation_t location,
                                             unsigned long long* out) {
  const bool ok = out != nullptr && static_cast<unsigned>(type) < NVML_MEMORY_ERROR_TYPE_COUNT &&
                  static_cast<unsigned>(counter) < NVML_ECC_COUNTER_TYPE_COUNT &&
                  static_cast<unsigned>(location) < NVML_MEMORY_LOCATION_COUNT;
  return ask(
      __func__, device, ok,
      [&](Dev d) {
        if (d.gpu->ecc_current == 0) return NVML_ERROR_NOT_SUPPORTED;
        switch (location) {
          case NVML_MEMORY_LOCATION_DRAM:
            return set(out, d.is_mig() ? 0ULL : static_cast<unsigned long long>(ecc_count(d, type, counter)));
          case NVML_MEMORY_LOCATION_SRAM:
            return set(out, 0ULL);
          default:
            return NVML_ERROR_NOT_SUPPORTED;
        }
      },
      Accept::gpu_or_mig);
}
nvmlReturn_t nvmlDeviceGetSramEccErrorStatus(nvmlDevice_t device, abi::SramErrors* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) {
    if (out->version != abi::version_word<abi::SramErrors>(1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    const unsigned version = out->version;
    *out = {};
    return set(&out->version, version);
  });
}
nvmlReturn_t nvmlDeviceGetRemappedRows(nvmlDevice_t device, unsigned* corrected, unsigned* uncorrected,
                                       unsigned* pending, unsigned* failed) {
  return ask(__func__, device,
             corrected != nullptr && uncorrected != nullptr && pending != nullptr && failed != nullptr,
             [&](Dev d) {
               *corrected = static_cast<unsigned>(d.gpu->remapped_correctable);
               *uncorrected = static_cast<unsigned>(d.gpu->remapped_uncorrectable);
               *pending = d.gpu->remap_pending != 0 ? 1 : 0;
               return set(failed, d.gpu->remap_failed != 0 ? 1U : 0U);
             });
}
nvmlReturn_t nvmlDeviceGetRemappedRows_v2(nvmlDevice_t device, abi::RemappedRows2* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    *out = {static_cast<unsigned>(d.gpu->remapped_correctable),
            0,
            static_cast<unsigned>(d.gpu->remapped_uncorrectable),
            0,
            d.gpu->remap_pending != 0 ? 1U : 0U,
            d.gpu->remap_failed != 0 ? 1U : 0U};
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetRowRemapperHistogram(nvmlDevice_t device, nvmlRowRemapperHistogramValues_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    *out = {};
    // 512 banks a memory stack: 2560 read on the H100 (5 stacks), 3072 on the H200 (6).
    const unsigned banks = (d.chip->memory_bus_bits + 1023) / 1024 * 512;
    const auto rows = static_cast<unsigned>(d.gpu->remapped_correctable + d.gpu->remapped_uncorrectable);
    out->partial = std::min(rows, banks);
    return set(&out->max, banks - out->partial);
  });
}
