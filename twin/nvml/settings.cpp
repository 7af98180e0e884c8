// What root may change on a GPU besides MIG.
#include <algorithm>

#include "twin/nvml/library.hpp"

using namespace bulkhead::twin;        // NOLINT(google-build-using-namespace): this file is the library
using namespace bulkhead::twin::nvml;  // NOLINT(google-build-using-namespace)

namespace {
const Chip& chip_of(const State& state, std::uint32_t gpu) { return state.chips[state.gpus[gpu].chip]; }
bool is_memory_clock(const Chip& chip, unsigned mhz) {
  const auto* end = chip.clock_memory + chip.clock_memory_count;
  return std::find(chip.clock_memory, end, mhz) != end;
}
}  // namespace

nvmlReturn_t nvmlDeviceSetPersistenceMode(nvmlDevice_t device, nvmlEnableState_t mode) {
  return tell(__func__, device, static_cast<unsigned>(mode) <= 1, [&](State& state, std::uint32_t gpu) {
    state.gpus[gpu].persistence = mode == NVML_FEATURE_ENABLED ? 1 : 0;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceSetComputeMode(nvmlDevice_t device, nvmlComputeMode_t mode) {
  return tell(__func__, device, static_cast<unsigned>(mode) < NVML_COMPUTEMODE_COUNT,
              [&](State& state, std::uint32_t gpu) {
                state.gpus[gpu].compute_mode = mode;
                return NVML_SUCCESS;
              });
}
nvmlReturn_t nvmlDeviceSetEccMode(nvmlDevice_t device, nvmlEnableState_t ecc) {
  return tell(__func__, device, static_cast<unsigned>(ecc) <= 1, [&](State& state, std::uint32_t gpu) {
    state.gpus[gpu].ecc_pending = ecc == NVML_FEATURE_ENABLED ? 1 : 0;  // current after the next reset
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceClearEccErrorCounts(nvmlDevice_t device, nvmlEccCounterType_t type) {
  return tell(__func__, device, static_cast<unsigned>(type) < NVML_ECC_COUNTER_TYPE_COUNT,
              [&](State& state, std::uint32_t gpu) {
                Gpu& g = state.gpus[gpu];
                if (type == NVML_VOLATILE_ECC) {
                  g.ecc_corrected = g.ecc_uncorrected = 0;
                } else {
                  g.ecc_corrected_total = g.ecc_uncorrected_total = 0;
                }
                return NVML_SUCCESS;
              });
}
nvmlReturn_t nvmlDeviceSetAccountingMode(nvmlDevice_t device, nvmlEnableState_t mode) {
  return tell(__func__, device, static_cast<unsigned>(mode) <= 1, [&](State& state, std::uint32_t gpu) {
    if (state.gpus[gpu].mig_current != 0) return NVML_ERROR_NOT_SUPPORTED;
    state.gpus[gpu].accounting = mode == NVML_FEATURE_ENABLED ? 1 : 0;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceClearAccountingPids(nvmlDevice_t device) {
  return tell(__func__, device, true, [](State&, std::uint32_t) { return NVML_SUCCESS; });
}
nvmlReturn_t nvmlDeviceSetPowerManagementLimit(nvmlDevice_t device, unsigned milliwatts) {
  return tell(__func__, device, true, [&](State& state, std::uint32_t gpu) {
    const Chip& chip = chip_of(state, gpu);
    if (milliwatts < chip.power_min_mw || milliwatts > chip.power_max_mw) return NVML_ERROR_INVALID_ARGUMENT;
    state.gpus[gpu].power_limit_mw = milliwatts;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceSetGpuLockedClocks(nvmlDevice_t device, unsigned low, unsigned high) {
  return tell(__func__, device, low <= high && high != 0, [&](State& state, std::uint32_t gpu) {
    const Chip& chip = chip_of(state, gpu);
    // 0 means "the chip's own bound"; outside the range the driver clamps.
    state.gpus[gpu].clock_lock_low = std::clamp(low, chip.clock_graphics_min, chip.clock_graphics_max);
    state.gpus[gpu].clock_lock_high = std::clamp(high, chip.clock_graphics_min, chip.clock_graphics_max);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceResetGpuLockedClocks(nvmlDevice_t device) {
  return tell(__func__, device, true, [](State& state, std::uint32_t gpu) {
    state.gpus[gpu].clock_lock_low = state.gpus[gpu].clock_lock_high = 0;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceSetMemoryLockedClocks(nvmlDevice_t device, unsigned low, unsigned high) {
  return tell(__func__, device, low <= high && high != 0, [&](State& state, std::uint32_t gpu) {
    state.gpus[gpu].memory_lock_low = low;
    state.gpus[gpu].memory_lock_high = high;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceResetMemoryLockedClocks(nvmlDevice_t device) {
  return tell(__func__, device, true, [](State& state, std::uint32_t gpu) {
    state.gpus[gpu].memory_lock_low = state.gpus[gpu].memory_lock_high = 0;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceSetApplicationsClocks(nvmlDevice_t device, unsigned memory, unsigned graphics) {
  return tell(__func__, device, true, [&](State& state, std::uint32_t gpu) {
    const Chip& chip = chip_of(state, gpu);
    if (!is_memory_clock(chip, memory) || graphics < chip.clock_graphics_min ||
        graphics > chip.clock_graphics_max)
      return NVML_ERROR_INVALID_ARGUMENT;
    state.gpus[gpu].app_clock_memory = memory;
    state.gpus[gpu].app_clock_graphics = graphics;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceResetApplicationsClocks(nvmlDevice_t device) {
  return tell(__func__, device, true, [](State& state, std::uint32_t gpu) {
    state.gpus[gpu].app_clock_memory = state.gpus[gpu].app_clock_graphics = 0;
    return NVML_SUCCESS;
  });
}
extern "C" __attribute__((visibility("default"))) nvmlReturn_t nvmlDeviceSetPowerManagementLimit_v2(
    nvmlDevice_t device, abi::PowerValue2* value);
nvmlReturn_t nvmlDeviceSetPowerManagementLimit_v2(nvmlDevice_t device, abi::PowerValue2* value) {
  if (value == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  if (value->version != abi::version_word<abi::PowerValue2>(2)) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
  return value->scope == 0 ? nvmlDeviceSetPowerManagementLimit(device, value->milliwatts)
                           : NVML_ERROR_NOT_SUPPORTED;
}
