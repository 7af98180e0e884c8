// The vendor's header, and what the ABI gained after the 11.8 one we build with: structures of the 12 and 13
// drivers, read from NVIDIA's nvml.h 13 (NVIDIA/go-nvml). Sizes are checked here; clients check them again,
// since a versioned structure's first word carries its size.
#pragma once

#define NVML_NO_UNVERSIONED_FUNC_DEFS
#pragma GCC visibility push(default)
#include <nvml.h>
#pragma GCC visibility pop

#include <cstddef>

namespace bulkhead::twin::nvml::abi {

template <class T>
constexpr unsigned version_word(unsigned version) {
  return static_cast<unsigned>(sizeof(T)) | version << 24U;
}

inline constexpr auto error_deprecated = static_cast<nvmlReturn_t>(26);
inline constexpr auto error_not_ready = static_cast<nvmlReturn_t>(27);

struct MarginTemperature {  // nvmlMarginTemperature_v1_t
  unsigned version;
  int margin;
};
static_assert(sizeof(MarginTemperature) == 8);

struct Temperature {  // nvmlTemperature_v1_t
  unsigned version, sensor;
  int temperature;
};
static_assert(sizeof(Temperature) == 12);

struct FabricInfo {  // nvmlGpuFabricInfo_t
  unsigned char cluster[16];
  int status;
  unsigned clique;
  unsigned char state;
};
static_assert(sizeof(FabricInfo) == 28 && offsetof(FabricInfo, state) == 24);

struct FabricInfo2 {  // nvmlGpuFabricInfo_v2_t
  unsigned version;
  unsigned char cluster[16];
  int status;
  unsigned clique;
  unsigned char state;
  unsigned health_mask;
};
static_assert(sizeof(FabricInfo2) == 36);

struct FabricInfo3 {  // nvmlGpuFabricInfo_v3_t
  unsigned version;
  unsigned char cluster[16];
  int status;
  unsigned clique;
  unsigned char state;
  unsigned health_mask;
  unsigned char health_summary;
};
static_assert(sizeof(FabricInfo3) == 40 && offsetof(FabricInfo3, health_summary) == 36);

struct PlatformInfo {  // nvmlPlatformInfo_v1_t and _v2_t: same layout, other names for the bytes
  unsigned version;
  unsigned char ib_guid[16], chassis[16];
  unsigned char slot, tray, host, peer_type, module;
};
static_assert(sizeof(PlatformInfo) == 44);

struct Pdi {  // nvmlPdi_v1_t
  unsigned version;
  unsigned long long value;
};
static_assert(sizeof(Pdi) == 16);

struct RepairStatus {  // nvmlRepairStatus_v1_t
  unsigned version, channel_pending, tpc_pending;
};
static_assert(sizeof(RepairStatus) == 12);

struct C2cMode {  // nvmlC2cModeInfo_v1_t
  unsigned enabled;
};

struct PerfModes {  // nvmlDevicePerfModes_v1_t, nvmlDeviceCurrentClockFreqs_v1_t
  unsigned version;
  char text[2048];
};
static_assert(sizeof(PerfModes) == 2052);

struct SramErrors {  // nvmlEccSramErrorStatus_v1_t
  unsigned version;
  unsigned long long aggregate_parity, aggregate_secded, aggregate_corrected, volatile_parity,
      volatile_secded, volatile_corrected;
  unsigned long long bucket_l2, bucket_sm, bucket_pcie, bucket_mcu, bucket_other;
  unsigned threshold_exceeded;
};
static_assert(sizeof(SramErrors) == 104);

struct UnrepairableMemory {  // nvmlUnrepairableMemoryStatus_v1_t
  unsigned unrepairable;
};

struct AddressingMode {  // nvmlDeviceAddressingMode_v1_t
  unsigned version, value;
};

struct ConfComputeMemory {  // nvmlConfComputeMemSizeInfo_t
  unsigned long long protected_kib, unprotected_kib;
};

struct ConfComputeState {  // nvmlConfComputeSystemState_t
  unsigned environment, feature, dev_tools;
};

struct ConfComputeCaps {  // nvmlConfComputeSystemCaps_t
  unsigned cpu, gpus;
};

struct ConfComputeSettings {  // nvmlSystemConfComputeSettings_v1_t
  unsigned version, environment, feature, dev_tools, multi_gpu;
};
static_assert(sizeof(ConfComputeSettings) == 20);

struct GpuInstanceProfile3 {  // nvmlGpuInstanceProfileInfo_v3_t
  unsigned version, id, slices, instances, multiprocessors, copy_engines, decoders, encoders, jpeg, ofa;
  unsigned long long memory_mib;
  char name[96];
  unsigned capabilities;
};
static_assert(sizeof(GpuInstanceProfile3) == 152);

struct ComputeInstanceProfile3 {  // nvmlComputeInstanceProfileInfo_v3_t
  unsigned version, id, slices, instances, multiprocessors, copy_engines, decoders, encoders, jpeg, ofa;
  char name[96];
  unsigned capabilities;
};
static_assert(sizeof(ComputeInstanceProfile3) == 140);

struct Capabilities {  // nvmlDeviceCapabilities_v1_t
  unsigned version, mask;
};

struct DriverBranch {  // nvmlSystemDriverBranchInfo_v1_t
  unsigned version;
  char branch[80];
};
static_assert(sizeof(DriverBranch) == 84);

struct UuidValue {  // nvmlUUID_v1_t
  unsigned version, type;
  union {
    char text[41];
    unsigned char bytes[16];
  } value;
};
static_assert(sizeof(UuidValue) == 52);

struct ProcessDetail {  // nvmlProcessDetail_v1_t
  unsigned pid;
  unsigned long long memory;
  unsigned gpu_instance, compute_instance;
  unsigned long long protected_memory;
};
static_assert(sizeof(ProcessDetail) == 32);

struct ProcessDetails {  // nvmlProcessDetailList_v1_t
  unsigned version, mode, count;
  ProcessDetail* entries;
};
static_assert(sizeof(ProcessDetails) == 24);

struct PciInfoExt {  // nvmlPciInfoExt_v1_t
  unsigned version, domain, bus, device, device_id, subsystem_id, base_class, sub_class;
  char bus_id[32];
};
static_assert(sizeof(PciInfoExt) == 64);

struct RemappedRows2 {  // nvmlRemappedRowsInfo_v2_t
  unsigned corrected_active, corrected_inactive, uncorrected_active, uncorrected_inactive, pending, failure;
};
static_assert(sizeof(RemappedRows2) == 24);

struct PowerValue2 {  // nvmlPowerValue_v2_t
  unsigned version;
  unsigned char scope;
  unsigned milliwatts;
};
static_assert(sizeof(PowerValue2) == 12);

struct ComputeInstancePlacement {  // nvmlComputeInstancePlacement_t
  unsigned start, size;
};

// What the 11.8 header fixes: a change here would break every client.
static_assert(sizeof(nvmlPciInfo_t) == 68);
static_assert(sizeof(nvmlGpuInstanceProfileInfo_t) == 48 && sizeof(nvmlGpuInstanceProfileInfo_v2_t) == 152);
static_assert(sizeof(nvmlComputeInstanceProfileInfo_t) == 36 &&
              sizeof(nvmlComputeInstanceProfileInfo_v2_t) == 136);
static_assert(sizeof(nvmlGpuInstanceInfo_t) == 24 && sizeof(nvmlComputeInstanceInfo_t) == 32);
static_assert(sizeof(nvmlProcessInfo_t) == 24 && sizeof(nvmlProcessInfo_v1_t) == 16);
static_assert(sizeof(nvmlMemory_t) == 24 && sizeof(nvmlMemory_v2_t) == 40);
static_assert(sizeof(nvmlFieldValue_t) == 40 && sizeof(nvmlEventData_t) == 32);
static_assert(sizeof(nvmlDeviceAttributes_t) == 40 && sizeof(nvmlUtilization_t) == 8);

}  // namespace bulkhead::twin::nvml::abi
