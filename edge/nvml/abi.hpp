// What NVML gained after the 11.8 header we build with: structures, field ids, profile enums and error codes
// of the 12 and 13 drivers. Read from NVIDIA's nvml.h 13 (NVIDIA/go-nvml); the layouts are checked below, and
// the driver checks them again: each versioned structure carries its size.
#pragma once

#include <cstddef>

#include <nvml.h>

namespace bulkhead::nvml::abi {

// The first word of a versioned structure.
template <class T>
constexpr unsigned version_word(unsigned version) {
  return static_cast<unsigned>(sizeof(T)) | (version << 24U);
}

struct MarginTemperature {  // nvmlMarginTemperature_v1_t
  unsigned version;
  int margin;  // degrees C left to the slowdown point
};
static_assert(sizeof(MarginTemperature) == 8);

struct ProfileInfo2 {  // nvmlGpuInstanceProfileInfo_v2_t
  unsigned version, id, p2p, slices, instances, multiprocessors;
  unsigned copy_engines, decoders, encoders, jpeg, ofa;
  unsigned long long memory_mib;
  char name[96];
};
static_assert(sizeof(ProfileInfo2) == 152 && offsetof(ProfileInfo2, memory_mib) == 48 &&
              offsetof(ProfileInfo2, name) == 56);
static_assert(sizeof(ProfileInfo2) == sizeof(nvmlGpuInstanceProfileInfo_v2_t));

struct ProfileInfo3 {  // nvmlGpuInstanceProfileInfo_v3_t
  unsigned version, id, slices, instances, multiprocessors;
  unsigned copy_engines, decoders, encoders, jpeg, ofa;
  unsigned long long memory_mib;
  char name[96];
  unsigned capabilities;
};
static_assert(sizeof(ProfileInfo3) == 152 && offsetof(ProfileInfo3, memory_mib) == 40 &&
              offsetof(ProfileInfo3, name) == 48 && offsetof(ProfileInfo3, capabilities) == 144);

struct FabricInfo1 {  // nvmlGpuFabricInfo_t
  unsigned char cluster[16];
  int status;
  unsigned clique;
  unsigned char state;
};
static_assert(sizeof(FabricInfo1) == 28 && offsetof(FabricInfo1, status) == 16 &&
              offsetof(FabricInfo1, state) == 24);

struct FabricInfo2 {  // nvmlGpuFabricInfo_v2_t
  unsigned version;
  unsigned char cluster[16];
  int status;
  unsigned clique;
  unsigned char state;
  unsigned health;
};
static_assert(sizeof(FabricInfo2) == 36 && offsetof(FabricInfo2, status) == 20 &&
              offsetof(FabricInfo2, state) == 28 && offsetof(FabricInfo2, health) == 32);

// NVML_GPU_INSTANCE_PROFILE_*: 11.8 knows 8 of them, 13 knows 18. The loop looks a little further.
inline constexpr unsigned gpu_profile_count = 0x12;
inline constexpr unsigned gpu_profile_ceiling = 0x20;
inline constexpr unsigned compute_profile_count = 0x9;

// nvmlDeviceGetFieldValues ids.
inline constexpr unsigned field_ecc_corrected = 3, field_ecc_uncorrected = 4;  // volatile, in all
inline constexpr unsigned field_nvlink_count = 91;
inline constexpr unsigned field_nvlink_state = 165;  // scope: the link
inline constexpr unsigned field_power_average = 185, field_power_min = 187, field_power_max = 188;
inline constexpr unsigned field_power_default = 189, field_power_limit = 190;

inline constexpr unsigned value_signed_int = 5;      // NVML_VALUE_TYPE_SIGNED_INT, 12.x
inline constexpr unsigned value_unsigned_short = 6;  // NVML_VALUE_TYPE_UNSIGNED_SHORT, 12.x

inline constexpr int error_deprecated = 26, error_not_ready = 27, error_gpu_not_found = 28,
                     error_invalid_state = 29;

}  // namespace bulkhead::nvml::abi
