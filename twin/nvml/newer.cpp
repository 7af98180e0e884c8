// Entry points of the 12 and 13 drivers that a bare-metal or passed-through board answers.
#include <algorithm>
#include <string>

#include "twin/nvml/library.hpp"

using namespace bulkhead::twin;        // NOLINT(google-build-using-namespace): this file is the library
using namespace bulkhead::twin::nvml;  // NOLINT(google-build-using-namespace)

namespace {

using Dev = const bulkhead::twin::nvml::Device&;

// The version word of a structure, checked before anything is written.
template <class T>
bool is_version(const T* out, unsigned version) {
  return out->version == abi::version_word<T>(version);
}

struct Fabric {
  unsigned char state;
  int status;
};
Fabric fabric_of(Dev d) {
  for (const Fault& fault : d.state->faults) {
    // Registration never completes while the Fabric Manager is away: IN_PROGRESS.
    if (fault.kind == FaultKind::fabric_lost && fault.remaining != 0 &&
        (fault.gpu == none || fault.gpu == d.slot) && d.gpu->fabric_state != 0) {
      return {2, 0};
    }
  }
  return {static_cast<unsigned char>(d.gpu->fabric_state), static_cast<int>(d.gpu->fabric_status)};
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)
nvmlReturn_t nvmlDeviceGetGpuFabricInfo(nvmlDevice_t device, abi::FabricInfo* out);
nvmlReturn_t nvmlDeviceGetGpuFabricInfoV(nvmlDevice_t device, void* out);
nvmlReturn_t nvmlDeviceGetPlatformInfo(nvmlDevice_t device, abi::PlatformInfo* out);
nvmlReturn_t nvmlDeviceGetPdi(nvmlDevice_t device, abi::Pdi* out);
nvmlReturn_t nvmlDeviceGetRepairStatus(nvmlDevice_t device, abi::RepairStatus* out);
nvmlReturn_t nvmlDeviceGetUnrepairableMemoryFlag_v1(nvmlDevice_t device, abi::UnrepairableMemory* out);
nvmlReturn_t nvmlDeviceGetC2cModeInfoV(nvmlDevice_t device, abi::C2cMode* out);
nvmlReturn_t nvmlDeviceGetAddressingMode(nvmlDevice_t device, abi::AddressingMode* out);
nvmlReturn_t nvmlDeviceGetCapabilities(nvmlDevice_t device, abi::Capabilities* out);
nvmlReturn_t nvmlDeviceGetNumaNodeId(nvmlDevice_t device, unsigned* out);
nvmlReturn_t nvmlDeviceGetLastBBXFlushTime(nvmlDevice_t device, unsigned long long* time,
                                           unsigned long* duration);
nvmlReturn_t nvmlDeviceGetConfComputeMemSizeInfo(nvmlDevice_t device, abi::ConfComputeMemory* out);
nvmlReturn_t nvmlDeviceGetConfComputeProtectedMemoryUsage(nvmlDevice_t device, nvmlMemory_t* out);
nvmlReturn_t nvmlDeviceGetConfComputeGpuCertificate(nvmlDevice_t device, void* out);
nvmlReturn_t nvmlSystemGetConfComputeCapabilities(abi::ConfComputeCaps* out);
nvmlReturn_t nvmlSystemGetConfComputeState(abi::ConfComputeState* out);
nvmlReturn_t nvmlSystemGetConfComputeSettings(abi::ConfComputeSettings* out);
nvmlReturn_t nvmlSystemGetConfComputeGpusReadyState(unsigned* out);
nvmlReturn_t nvmlSystemGetDriverBranch(abi::DriverBranch* out, unsigned length);
nvmlReturn_t nvmlSystemGetNvlinkBwMode(unsigned* out);
nvmlReturn_t nvmlGetBlacklistDeviceCount(unsigned* count);
nvmlReturn_t nvmlGetBlacklistDeviceInfoByIndex(unsigned index, nvmlExcludedDeviceInfo_t* info);
#pragma GCC visibility pop
}

nvmlReturn_t nvmlDeviceGetGpuFabricInfo(nvmlDevice_t device, abi::FabricInfo* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    const Fabric fabric = fabric_of(d);
    *out = {{}, fabric.status, 0, fabric.state};
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetGpuFabricInfoV(nvmlDevice_t device, void* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    unsigned version = 0;
    std::memcpy(&version, out, sizeof version);
    const Fabric fabric = fabric_of(d);
    if (version == abi::version_word<abi::FabricInfo2>(2)) {
      *static_cast<abi::FabricInfo2*>(out) = {version, {}, fabric.status, 0, fabric.state, 0};
    } else if (version == abi::version_word<abi::FabricInfo3>(3)) {
      *static_cast<abi::FabricInfo3*>(out) = {
          version,
          {},
          fabric.status,
          0,
          fabric.state,
          0,
          fabric.state == 3 ? static_cast<unsigned char>(1) : static_cast<unsigned char>(0)};
    } else {
      return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    }
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetPlatformInfo(nvmlDevice_t device, abi::PlatformInfo* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) {
    return is_version(out, 1) || is_version(out, 2) ? NVML_ERROR_NOT_SUPPORTED
                                                    : NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
  });
}
nvmlReturn_t nvmlDeviceGetPdi(nvmlDevice_t device, abi::Pdi* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    if (!is_version(out, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    out->value = d.slot + 1;  // per-die serial: the recorded ones are blanked to 1
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetRepairStatus(nvmlDevice_t device, abi::RepairStatus* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) {
    if (!is_version(out, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    out->channel_pending = out->tpc_pending = 0;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetUnrepairableMemoryFlag_v1(nvmlDevice_t device, abi::UnrepairableMemory* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    out->unrepairable = d.gpu->remap_failed != 0 ? 1 : 0;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetC2cModeInfoV(nvmlDevice_t device, abi::C2cMode* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) {
    out->enabled = 0;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetAddressingMode(nvmlDevice_t device, abi::AddressingMode* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) {
    if (!is_version(out, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    out->value = 0;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetCapabilities(nvmlDevice_t device, abi::Capabilities* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) {
    if (!is_version(out, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    out->mask = 0;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetNumaNodeId(nvmlDevice_t device, unsigned* out) {
  // The GPU's own NUMA node: coherent-memory systems alone have one.
  return ask(__func__, device, out != nullptr, [](Dev) { return NVML_ERROR_NOT_SUPPORTED; });
}
nvmlReturn_t nvmlDeviceGetLastBBXFlushTime(nvmlDevice_t device, unsigned long long* time,
                                           unsigned long* duration) {
  return ask(__func__, device, time != nullptr && duration != nullptr,
             [](Dev) { return abi::error_not_ready; });
}
nvmlReturn_t nvmlDeviceGetConfComputeMemSizeInfo(nvmlDevice_t device, abi::ConfComputeMemory* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    *out = {0, (d.chip->memory_bytes - d.chip->reserved_bytes) / 1024};
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetConfComputeProtectedMemoryUsage(nvmlDevice_t device, nvmlMemory_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev) {
    *out = {};
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetConfComputeGpuCertificate(nvmlDevice_t device, void* out) {
  return ask(__func__, device, out != nullptr,
             [](Dev) { return NVML_ERROR_UNKNOWN; });  // read with the feature off
}
nvmlReturn_t nvmlSystemGetConfComputeCapabilities(abi::ConfComputeCaps* out) {
  return ask_host(__func__, out != nullptr, [&](const State&) {
    *out = {};
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlSystemGetConfComputeState(abi::ConfComputeState* out) {
  return ask_host(__func__, out != nullptr, [&](const State&) {
    *out = {};
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlSystemGetConfComputeSettings(abi::ConfComputeSettings* out) {
  return ask_host(__func__, out != nullptr, [&](const State&) {
    if (!is_version(out, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    *out = {out->version, 0, 0, 0, 0};
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlSystemGetConfComputeGpusReadyState(unsigned* out) {
  return ask_host(__func__, out != nullptr, [](const State&) { return NVML_ERROR_NOT_SUPPORTED; });
}
nvmlReturn_t nvmlSystemGetDriverBranch(abi::DriverBranch* out, unsigned length) {
  return ask_host(__func__, out != nullptr && length > 0, [&](const State& s) {
    if (!is_version(out, 1)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    // "580.159.04" is of branch r580_00.
    const std::string_view driver = s.driver_version.view();
    const std::string branch = "r" + std::string(driver.substr(0, driver.find('.'))) + "_00";
    return put(branch, out->branch, std::min<std::size_t>(length, sizeof out->branch));
  });
}
nvmlReturn_t nvmlSystemGetNvlinkBwMode(unsigned* out) {
  return ask_host(__func__, out != nullptr, [](const State&) { return NVML_ERROR_NOT_SUPPORTED; });
}
// Names from before R470.
nvmlReturn_t nvmlGetBlacklistDeviceCount(unsigned* count) { return nvmlGetExcludedDeviceCount(count); }
nvmlReturn_t nvmlGetBlacklistDeviceInfoByIndex(unsigned index, nvmlExcludedDeviceInfo_t* info) {
  return nvmlGetExcludedDeviceInfoByIndex(index, info);
}
