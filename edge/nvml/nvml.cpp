#include "edge/nvml/nvml.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <span>
#include <type_traits>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/limits.hpp"
#include "base/text.hpp"
#include "edge/nvml/abi.hpp"

namespace bulkhead::nvml {

namespace {

// Every entry point we use: member, exported name, type. nvml.h's own types where 11.8 declares the function.
// nvmlDeviceGetGpuInstanceProfileInfoV takes whichever version its first word names, hence void*.
#define BH_NVML_SYMBOLS(X)                                                                                  \
  X(init, nvmlInit_v2, decltype(::nvmlInit_v2))                                                             \
  X(shutdown, nvmlShutdown, decltype(::nvmlShutdown))                                                       \
  X(driver_version, nvmlSystemGetDriverVersion, decltype(::nvmlSystemGetDriverVersion))                     \
  X(cuda_version, nvmlSystemGetCudaDriverVersion_v2, decltype(::nvmlSystemGetCudaDriverVersion_v2))         \
  X(process_name, nvmlSystemGetProcessName, decltype(::nvmlSystemGetProcessName))                           \
  X(count, nvmlDeviceGetCount_v2, decltype(::nvmlDeviceGetCount_v2))                                        \
  X(by_index, nvmlDeviceGetHandleByIndex_v2, decltype(::nvmlDeviceGetHandleByIndex_v2))                     \
  X(by_uuid, nvmlDeviceGetHandleByUUID, decltype(::nvmlDeviceGetHandleByUUID))                              \
  X(index, nvmlDeviceGetIndex, decltype(::nvmlDeviceGetIndex))                                              \
  X(uuid, nvmlDeviceGetUUID, decltype(::nvmlDeviceGetUUID))                                                 \
  X(name, nvmlDeviceGetName, decltype(::nvmlDeviceGetName))                                                 \
  X(pci, nvmlDeviceGetPciInfo_v3, decltype(::nvmlDeviceGetPciInfo_v3))                                      \
  X(serial, nvmlDeviceGetSerial, decltype(::nvmlDeviceGetSerial))                                           \
  X(vbios, nvmlDeviceGetVbiosVersion, decltype(::nvmlDeviceGetVbiosVersion))                                \
  X(capability, nvmlDeviceGetCudaComputeCapability, decltype(::nvmlDeviceGetCudaComputeCapability))         \
  X(minor, nvmlDeviceGetMinorNumber, decltype(::nvmlDeviceGetMinorNumber))                                  \
  X(memory, nvmlDeviceGetMemoryInfo, decltype(::nvmlDeviceGetMemoryInfo))                                   \
  X(memory_v2, nvmlDeviceGetMemoryInfo_v2, decltype(::nvmlDeviceGetMemoryInfo_v2))                          \
  X(temperature, nvmlDeviceGetTemperature, decltype(::nvmlDeviceGetTemperature))                            \
  X(threshold, nvmlDeviceGetTemperatureThreshold, decltype(::nvmlDeviceGetTemperatureThreshold))            \
  X(margin, nvmlDeviceGetMarginTemperature, nvmlReturn_t(nvmlDevice_t, abi::MarginTemperature*))            \
  X(clock, nvmlDeviceGetClockInfo, decltype(::nvmlDeviceGetClockInfo))                                      \
  X(clock_max, nvmlDeviceGetMaxClockInfo, decltype(::nvmlDeviceGetMaxClockInfo))                            \
  X(event_reasons, nvmlDeviceGetCurrentClocksEventReasons, nvmlReturn_t(nvmlDevice_t, unsigned long long*)) \
  X(throttle_reasons, nvmlDeviceGetCurrentClocksThrottleReasons,                                            \
    decltype(::nvmlDeviceGetCurrentClocksThrottleReasons))                                                  \
  X(virtualization, nvmlDeviceGetVirtualizationMode, decltype(::nvmlDeviceGetVirtualizationMode))           \
  X(fields, nvmlDeviceGetFieldValues, decltype(::nvmlDeviceGetFieldValues))                                 \
  X(power, nvmlDeviceGetPowerUsage, decltype(::nvmlDeviceGetPowerUsage))                                    \
  X(limit_enforced, nvmlDeviceGetEnforcedPowerLimit, decltype(::nvmlDeviceGetEnforcedPowerLimit))           \
  X(limit_default, nvmlDeviceGetPowerManagementDefaultLimit,                                                \
    decltype(::nvmlDeviceGetPowerManagementDefaultLimit))                                                   \
  X(limit_range, nvmlDeviceGetPowerManagementLimitConstraints,                                              \
    decltype(::nvmlDeviceGetPowerManagementLimitConstraints))                                               \
  X(limit, nvmlDeviceGetPowerManagementLimit, decltype(::nvmlDeviceGetPowerManagementLimit))                \
  X(set_limit, nvmlDeviceSetPowerManagementLimit, decltype(::nvmlDeviceSetPowerManagementLimit))            \
  X(ecc_errors, nvmlDeviceGetTotalEccErrors, decltype(::nvmlDeviceGetTotalEccErrors))                       \
  X(nvlink_state, nvmlDeviceGetNvLinkState, decltype(::nvmlDeviceGetNvLinkState))                           \
  X(fabric, nvmlDeviceGetGpuFabricInfo, nvmlReturn_t(nvmlDevice_t, abi::FabricInfo1*))                      \
  X(fabric_v, nvmlDeviceGetGpuFabricInfoV, nvmlReturn_t(nvmlDevice_t, void*))                               \
  X(persistence, nvmlDeviceGetPersistenceMode, decltype(::nvmlDeviceGetPersistenceMode))                    \
  X(set_persistence, nvmlDeviceSetPersistenceMode, decltype(::nvmlDeviceSetPersistenceMode))                \
  X(lock_clocks, nvmlDeviceSetGpuLockedClocks, decltype(::nvmlDeviceSetGpuLockedClocks))                    \
  X(unlock_clocks, nvmlDeviceResetGpuLockedClocks, decltype(::nvmlDeviceResetGpuLockedClocks))              \
  X(compute_processes, nvmlDeviceGetComputeRunningProcesses_v3,                                             \
    decltype(::nvmlDeviceGetComputeRunningProcesses_v3))                                                    \
  X(graphics_processes, nvmlDeviceGetGraphicsRunningProcesses_v3,                                           \
    decltype(::nvmlDeviceGetGraphicsRunningProcesses_v3))                                                   \
  X(process_utilization, nvmlDeviceGetProcessUtilization, decltype(::nvmlDeviceGetProcessUtilization))      \
  X(mps_processes, nvmlDeviceGetMPSComputeRunningProcesses_v3,                                              \
    decltype(::nvmlDeviceGetMPSComputeRunningProcesses_v3))                                                 \
  X(mig_mode, nvmlDeviceGetMigMode, decltype(::nvmlDeviceGetMigMode))                                       \
  X(set_mig_mode, nvmlDeviceSetMigMode, decltype(::nvmlDeviceSetMigMode))                                   \
  X(profile, nvmlDeviceGetGpuInstanceProfileInfo, decltype(::nvmlDeviceGetGpuInstanceProfileInfo))          \
  X(profile_v, nvmlDeviceGetGpuInstanceProfileInfoV, nvmlReturn_t(nvmlDevice_t, unsigned, void*))           \
  X(placements, nvmlDeviceGetGpuInstancePossiblePlacements_v2,                                              \
    decltype(::nvmlDeviceGetGpuInstancePossiblePlacements_v2))                                              \
  X(gpu_instances, nvmlDeviceGetGpuInstances, decltype(::nvmlDeviceGetGpuInstances))                        \
  X(gpu_instance, nvmlDeviceGetGpuInstanceById, decltype(::nvmlDeviceGetGpuInstanceById))                   \
  X(gpu_instance_info, nvmlGpuInstanceGetInfo, decltype(::nvmlGpuInstanceGetInfo))                          \
  X(create_gpu_instance, nvmlDeviceCreateGpuInstanceWithPlacement,                                          \
    decltype(::nvmlDeviceCreateGpuInstanceWithPlacement))                                                   \
  X(destroy_gpu_instance, nvmlGpuInstanceDestroy, decltype(::nvmlGpuInstanceDestroy))                       \
  X(compute_profile, nvmlGpuInstanceGetComputeInstanceProfileInfo,                                          \
    decltype(::nvmlGpuInstanceGetComputeInstanceProfileInfo))                                               \
  X(compute_instances, nvmlGpuInstanceGetComputeInstances, decltype(::nvmlGpuInstanceGetComputeInstances))  \
  X(compute_instance, nvmlGpuInstanceGetComputeInstanceById,                                                \
    decltype(::nvmlGpuInstanceGetComputeInstanceById))                                                      \
  X(compute_instance_info, nvmlComputeInstanceGetInfo_v2, decltype(::nvmlComputeInstanceGetInfo_v2))        \
  X(create_compute_instance, nvmlGpuInstanceCreateComputeInstance,                                          \
    decltype(::nvmlGpuInstanceCreateComputeInstance))                                                       \
  X(destroy_compute_instance, nvmlComputeInstanceDestroy, decltype(::nvmlComputeInstanceDestroy))           \
  X(mig_device_ceiling, nvmlDeviceGetMaxMigDeviceCount, decltype(::nvmlDeviceGetMaxMigDeviceCount))         \
  X(mig_device, nvmlDeviceGetMigDeviceHandleByIndex, decltype(::nvmlDeviceGetMigDeviceHandleByIndex))       \
  X(gpu_instance_id, nvmlDeviceGetGpuInstanceId, decltype(::nvmlDeviceGetGpuInstanceId))                    \
  X(compute_instance_id, nvmlDeviceGetComputeInstanceId, decltype(::nvmlDeviceGetComputeInstanceId))        \
  X(utilization, nvmlDeviceGetUtilizationRates, decltype(::nvmlDeviceGetUtilizationRates))                  \
  X(gpm_support, nvmlGpmQueryDeviceSupport, decltype(::nvmlGpmQueryDeviceSupport))                          \
  X(gpm_alloc, nvmlGpmSampleAlloc, decltype(::nvmlGpmSampleAlloc))                                          \
  X(gpm_free, nvmlGpmSampleFree, decltype(::nvmlGpmSampleFree))                                             \
  X(gpm_get, nvmlGpmSampleGet, decltype(::nvmlGpmSampleGet))                                                \
  X(gpm_mig_get, nvmlGpmMigSampleGet, nvmlReturn_t(nvmlDevice_t, unsigned, nvmlGpmSample_t))                \
  X(gpm_metrics, nvmlGpmMetricsGet, decltype(::nvmlGpmMetricsGet))

struct Called {
  std::uint64_t calls = 0, nanoseconds = 0;
};

template <class F>
struct Symbol {
  const char* name = nullptr;
  F* function = nullptr;
  Called called = {};
};

// No GPU has more slices, instances or placements than this; a driver that says so is not believed.
constexpr unsigned sane = 64;

Errc code_of(int native) {
  switch (native) {
    case NVML_ERROR_UNINITIALIZED:
    case NVML_ERROR_DRIVER_NOT_LOADED:
    case NVML_ERROR_LIBRARY_NOT_FOUND:
    case NVML_ERROR_LIB_RM_VERSION_MISMATCH:
    case NVML_ERROR_RESET_REQUIRED:
    case abi::error_not_ready:
      return Errc::unavailable;
    case NVML_ERROR_INVALID_ARGUMENT:
    case NVML_ERROR_FREQ_NOT_SUPPORTED:
      return Errc::invalid;
    case NVML_ERROR_NOT_SUPPORTED:
    case NVML_ERROR_FUNCTION_NOT_FOUND:
    case NVML_ERROR_VGPU_ECC_NOT_SUPPORTED:
    case NVML_ERROR_ARGUMENT_VERSION_MISMATCH:
    case abi::error_deprecated:
      return Errc::unsupported;
    case NVML_ERROR_NO_PERMISSION:
    case NVML_ERROR_OPERATING_SYSTEM:
      return Errc::permission;
    case NVML_ERROR_NOT_FOUND:
    case NVML_ERROR_NO_DATA:
    case abi::error_gpu_not_found:
      return Errc::not_found;
    case NVML_ERROR_TIMEOUT:
      return Errc::timeout;
    case NVML_ERROR_CORRUPTED_INFOROM:
      return Errc::corrupt;
    case NVML_ERROR_GPU_IS_LOST:
      return Errc::gone;
    case NVML_ERROR_IN_USE:
      return Errc::in_use;
    case NVML_ERROR_MEMORY:
    case NVML_ERROR_INSUFFICIENT_SIZE:
    case NVML_ERROR_INSUFFICIENT_RESOURCES:
      return Errc::no_capacity;
    case abi::error_invalid_state:
      return Errc::conflict;
    default:
      return Errc::io;
  }
}

std::string hint_of(int native) {
  switch (native) {
    case NVML_ERROR_DRIVER_NOT_LOADED:
      return "load the driver: sudo modprobe nvidia";
    case NVML_ERROR_NO_PERMISSION:
      return "run it as root (sudo)";
    case NVML_ERROR_OPERATING_SYSTEM:
      return "the device cgroup of this process forbids the GPU: run it on the host";
    case NVML_ERROR_LIB_RM_VERSION_MISMATCH:
      return "the library and the loaded kernel module differ in version: reload the module, or reboot";
    case NVML_ERROR_GPU_IS_LOST:
      return "look for the XID: dmesg | grep -i xid";
    case NVML_ERROR_IN_USE:
      return "see who holds it: bulkhead inventory";
    case NVML_ERROR_RESET_REQUIRED:
      return "the GPU needs a reset: nvidia-smi --gpu-reset -i INDEX";
    default:
      return {};
  }
}

// A fixed buffer that the driver filled: it may have forgotten the NUL.
template <std::size_t N>
std::string text_of(const char (&buffer)[N]) {
  return printable(std::string_view(buffer, ::strnlen(buffer, N)));
}

Error lied(std::string_view function, std::string_view what) {
  return Error(Errc::corrupt, fmt::format("{}: the driver answered {}, which cannot be", function, what));
}

std::optional<double> number_of(const nvmlFieldValue_t& field) {
  switch (static_cast<unsigned>(field.valueType)) {
    case NVML_VALUE_TYPE_DOUBLE:
      return field.value.dVal;
    case NVML_VALUE_TYPE_UNSIGNED_INT:
      return field.value.uiVal;
    case NVML_VALUE_TYPE_UNSIGNED_LONG:
      return static_cast<double>(field.value.ulVal);
    case NVML_VALUE_TYPE_UNSIGNED_LONG_LONG:
      return static_cast<double>(field.value.ullVal);
    case NVML_VALUE_TYPE_SIGNED_LONG_LONG:
      return static_cast<double>(field.value.sllVal);
    case abi::value_signed_int:
      return static_cast<int>(field.value.uiVal);
    case abi::value_unsigned_short:
      return field.value.uiVal & 0xffffU;
    default:
      return std::nullopt;
  }
}

std::optional<std::uint64_t> count_of(const nvmlFieldValue_t& field) {
  const auto value = number_of(field);
  if (!value || !(*value >= 0) || *value >= 18446744073709551616.0) return std::nullopt;
  if (static_cast<unsigned>(field.valueType) == NVML_VALUE_TYPE_UNSIGNED_LONG_LONG) return field.value.ullVal;
  return static_cast<std::uint64_t>(*value);
}

// What a profile is called, for drivers that do not say (before 520): the rule nvidia-smi and mig-parted use.
std::string derived_name(unsigned nvml_enum, unsigned slices, std::uint64_t memory_mib, Bytes total) {
  constexpr double gib = 1024.0 * 1024 * 1024;
  const double total_gb = std::ceil(static_cast<double>(total.count) / gib);
  double fraction =
      total.count == 0 ? 0 : static_cast<double>(memory_mib) * 1024 * 1024 / static_cast<double>(total.count);
  fraction = std::ceil(fraction * 8) / 8;
  const char* suffix = "";
  switch (nvml_enum) {
    case 0x7:
      suffix = "+me";
      break;
    case 0x8:
      suffix = "+me";
      break;
    case 0xa:
    case 0xb:
    case 0xc:
    case 0x11:
      suffix = "+gfx";
      break;
    case 0xd:
    case 0xe:
      suffix = "-me";
      break;
    case 0xf:
    case 0x10:
      suffix = "+me.all";
      break;
    default:
      break;
  }
  return fmt::format("{}g.{:.0f}gb{}", slices, std::round(fraction * total_gb), suffix);
}

struct ComputeProfile {
  unsigned id = 0, slices = 0, instances = 0;
};

// NVML_COMPUTE_INSTANCE_PROFILE_N_SLICE by N; empty: none is made of so many.
std::optional<unsigned> compute_enum_of(unsigned slices) {
  switch (slices) {
    case 1:
    case 2:
    case 3:
    case 4:
      return slices - 1;
    case 6:
      return 6;
    case 7:
      return 4;
    case 8:
      return 5;
    default:
      return std::nullopt;
  }
}

// ---- the call in flight: written around each call, read by a watchdog
constexpr unsigned no_gpu = ~0U;
std::atomic<const char*> flying{nullptr};
std::atomic<std::uint64_t> flying_since{0};
std::atomic<unsigned> flying_gpu{no_gpu};

}  // namespace

std::optional<CallInFlight> call_in_flight() {
  const char* function = flying.load(std::memory_order_acquire);
  if (function == nullptr) return std::nullopt;
  CallInFlight call{.function = function, .since_ns = flying_since.load(std::memory_order_relaxed)};
  if (const unsigned gpu = flying_gpu.load(std::memory_order_relaxed); gpu != no_gpu) call.gpu = gpu;
  return call;
}

struct Nvml::Table {
  void* library = nullptr;
  std::atomic<const char*> now{nullptr};  // as `flying`, of this object alone
  std::atomic<std::uint64_t> now_since{0};
  std::unique_ptr<nvmlGpmMetricsGet_t> gpm;  // large, and used again and again
  bool initialised = false;
  const char* (*error_string)(nvmlReturn_t) = nullptr;
  // nvml.h: profiles are immutable for the life of a MIG mode. Kept per GPU handle until we change the mode.
  std::map<void*, mig::Geometry> geometries;
  std::map<std::pair<void*, unsigned>, std::vector<ComputeProfile>>
      compute_profiles;               // by GPU and GI profile
  std::map<void*, void*> boards;      // a GPU's handle to that of the one that answers for it
  std::map<void*, unsigned> indices;  // of the GPUs asked for by index
  // The instance looked at or made last, so that the calls of one step do not ask for its handle again.
  struct {
    nvmlDevice_t device = nullptr;
    unsigned id = 0;
    nvmlGpuInstance_t handle = nullptr;
  } last;

  void* board_of(nvmlDevice_t device) const {
    const auto found = boards.find(device);
    return found != boards.end() ? found->second : device;
  }

  struct Api {
#define BH_MEMBER(member, exported, type) Symbol<type> member = {#exported};
    BH_NVML_SYMBOLS(BH_MEMBER)
#undef BH_MEMBER
  } api;

  void resolve() {
#define BH_RESOLVE(member, exported, type) \
  api.member.function = reinterpret_cast<decltype(api.member.function)>(::dlsym(library, #exported));
    BH_NVML_SYMBOLS(BH_RESOLVE)
#undef BH_RESOLVE
    error_string = reinterpret_cast<decltype(error_string)>(::dlsym(library, "nvmlErrorString"));
  }

  ~Table() {
    if (initialised && api.shutdown.function != nullptr) api.shutdown.function();
    if (library != nullptr) ::dlclose(library);
  }

  std::string words(int code) const {
    const char* said = error_string != nullptr ? error_string(static_cast<nvmlReturn_t>(code)) : nullptr;
    return said != nullptr ? printable(std::string_view(said, ::strnlen(said, 256)))
                           : fmt::format("nvmlReturn {}", code);
  }

  Error failure(int code, const char* function) const {
    return Error(code_of(code), fmt::format("{} ({})", words(code), function), hint_of(code), code);
  }

  template <class First, class... Rest>
  unsigned gpu_in(First first, const Rest&...) const {
    if constexpr (std::is_same_v<First, nvmlDevice_t>) {
      if (const auto found = indices.find(first); found != indices.end()) return found->second;
    }
    return no_gpu;
  }
  unsigned gpu_in() const { return no_gpu; }

  // The raw code: for callers that treat some codes as answers.
  template <class F, class... A>
  nvmlReturn_t raw(Symbol<F>& symbol, A... arguments) {
    if (symbol.function == nullptr) return NVML_ERROR_FUNCTION_NOT_FOUND;
    const std::uint64_t before = monotonic_ns();
    flying_gpu.store(gpu_in(arguments...), std::memory_order_relaxed);
    flying_since.store(before, std::memory_order_relaxed);
    flying.store(symbol.name, std::memory_order_release);
    now_since.store(before, std::memory_order_relaxed);
    now.store(symbol.name, std::memory_order_release);
    const nvmlReturn_t code = symbol.function(arguments...);
    now.store(nullptr, std::memory_order_release);
    flying.store(nullptr, std::memory_order_release);
    symbol.called.nanoseconds += monotonic_ns() - before;
    ++symbol.called.calls;
    return code;
  }

  template <class F, class... A>
  Status call(Symbol<F>& symbol, A... arguments) {
    if (symbol.function == nullptr) {
      return Error(Errc::unsupported, fmt::format("this driver's library has no {}", symbol.name),
                   "a newer NVIDIA driver may have it", NVML_ERROR_FUNCTION_NOT_FOUND);
    }
    const nvmlReturn_t code = raw(symbol, arguments...);
    if (code != NVML_SUCCESS) return failure(code, symbol.name);
    return ok_status();
  }

  // A driver function that fills a character buffer.
  template <std::size_t N, class F>
  Result<std::string> text(Symbol<F>& symbol, nvmlDevice_t device) {
    char buffer[N] = {};
    BH_CHECK(call(symbol, device, buffer, static_cast<unsigned>(N)));
    return text_of(buffer);
  }

  Result<unsigned> number(Symbol<nvmlReturn_t(nvmlDevice_t, unsigned*)>& symbol, nvmlDevice_t device) {
    unsigned value = 0;
    BH_CHECK(call(symbol, device, &value));
    return value;
  }

  Result<Clocks> clocks_by(Symbol<nvmlReturn_t(nvmlDevice_t, nvmlClockType_t, unsigned*)>& symbol,
                           nvmlDevice_t device) {
    unsigned graphics = 0, sm = 0, memory_clock = 0;
    BH_CHECK(call(symbol, device, NVML_CLOCK_GRAPHICS, &graphics));
    BH_CHECK(call(symbol, device, NVML_CLOCK_SM, &sm));
    BH_CHECK(call(symbol, device, NVML_CLOCK_MEM, &memory_clock));
    return Clocks{Megahertz(graphics), Megahertz(sm), Megahertz(memory_clock)};
  }

  Result<nvmlGpuInstance_t> resolve_instance(nvmlDevice_t device, unsigned id) {
    if (last.handle != nullptr && last.device == device && last.id == id) return last.handle;
    nvmlGpuInstance_t handle = nullptr;
    if (auto status = call(api.gpu_instance, device, id, &handle); !status.ok()) {
      return std::move(status).error().in(fmt::format("GPU instance {}", id));
    }
    return handle;
  }

  Result<GpuInstance> describe(nvmlGpuInstance_t handle) {
    nvmlGpuInstanceInfo_t info = {};
    BH_CHECK(call(api.gpu_instance_info, handle, &info));
    if (info.id >= 0xffffU || info.placement.start >= sane || info.placement.size > sane) {
      return lied(api.gpu_instance_info.name,
                  fmt::format("instance {} at {}+{}", info.id, info.placement.start, info.placement.size));
    }
    return GpuInstance{
        .id = info.id, .profile_id = info.profileId, .place = {info.placement.start, info.placement.size}};
  }

  Result<ComputeInstance> describe(nvmlComputeInstance_t handle, const std::vector<ComputeProfile>&) {
    nvmlComputeInstanceInfo_t info = {};
    BH_CHECK(call(api.compute_instance_info, handle, &info));
    if (info.id >= 0xffffU || info.placement.start >= sane || info.placement.size > sane) {
      return lied(api.compute_instance_info.name,
                  fmt::format("instance {} at {}+{}", info.id, info.placement.start, info.placement.size));
    }
    return ComputeInstance{
        .id = info.id, .profile = info.profileId, .place = {info.placement.start, info.placement.size}};
  }

  // What compute instances a GPU instance of this profile may hold: the same for every such instance of the
  // GPU.
  Result<const std::vector<ComputeProfile>*> profiles_of(nvmlDevice_t device, const GpuInstance& of,
                                                         nvmlGpuInstance_t handle) {
    const auto key = std::make_pair(board_of(device), of.profile_id);
    if (const auto known = compute_profiles.find(key); known != compute_profiles.end()) return &known->second;
    std::vector<ComputeProfile> profiles;
    for (unsigned number_of_profile = 0; number_of_profile < abi::compute_profile_count;
         ++number_of_profile) {
      nvmlComputeInstanceProfileInfo_t info = {};
      const nvmlReturn_t code =
          raw(api.compute_profile, handle, number_of_profile,
              static_cast<unsigned>(NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED), &info);
      if (code == NVML_ERROR_NOT_SUPPORTED || code == NVML_ERROR_INVALID_ARGUMENT) continue;
      if (code != NVML_SUCCESS) return failure(code, api.compute_profile.name);
      if (info.instanceCount > sane || info.sliceCount > sane) {
        return lied(api.compute_profile.name,
                    fmt::format("{} instances of {} slices", info.instanceCount, info.sliceCount));
      }
      profiles.push_back({info.id, info.sliceCount, info.instanceCount});
    }
    return &compute_profiles.emplace(key, std::move(profiles)).first->second;
  }

  Status list_compute(nvmlDevice_t device, nvmlGpuInstance_t handle, GpuInstance& of) {
    BH_TRY(const auto* profiles, profiles_of(device, of, handle));
    unsigned taken = 0, most = 0;
    for (const auto& profile : *profiles) most = std::max(most, profile.slices);
    for (const auto& profile : *profiles) {
      // Slices are never shared, so a full GPU instance has no more to tell.
      if (taken >= most && most > 0) break;
      nvmlComputeInstance_t found[sane] = {};
      unsigned count = sane;
      const nvmlReturn_t code = raw(api.compute_instances, handle, profile.id, found, &count);
      if (code == NVML_ERROR_NOT_SUPPORTED) continue;
      if (code != NVML_SUCCESS) return failure(code, api.compute_instances.name);
      if (count > sane) return lied(api.compute_instances.name, fmt::format("{} instances", count));
      for (unsigned i = 0; i < count; ++i) {
        auto instance = describe(found[i], *profiles);
        if (!instance.ok() && instance.error().code() == Errc::not_found) continue;  // went away just now
        if (!instance.ok()) return std::move(instance).error();
        taken += instance->place.size;
        of.compute.push_back(std::move(instance).value());
      }
    }
    std::sort(of.compute.begin(), of.compute.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
    return ok_status();
  }
};

namespace {
nvmlDevice_t handle_of(Device device) { return static_cast<nvmlDevice_t>(device.handle); }
}  // namespace

Nvml::Nvml() : table_(std::make_unique<Table>()) {}
Nvml::~Nvml() = default;

Result<std::unique_ptr<Nvml>> Nvml::open(const std::string& library) {
  const std::string name = library.empty() ? "libnvidia-ml.so.1" : library;
  std::unique_ptr<Nvml> nvml(new Nvml());
  Table& t = *nvml->table_;
  t.library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (t.library == nullptr) {
    const char* why = ::dlerror();
    const std::string said = printable(why != nullptr ? why : "unknown");
    const bool absent = said.find("No such file") != std::string::npos;
    return Error(Errc::unavailable,
                 absent ? fmt::format("no NVIDIA driver library ({}) on this host", name)
                        : fmt::format("cannot load the NVIDIA driver library: {}", said),
                 absent && library.empty() ? "install the NVIDIA driver, or name the library with --nvml"
                                           : "check --nvml and BULKHEAD_NVML");
  }
  t.resolve();
  if (t.api.init.function == nullptr) {
    return Error(Errc::unavailable,
                 fmt::format("{} is no NVIDIA management library: it has no nvmlInit_v2", printable(name)),
                 "check --nvml and BULKHEAD_NVML");
  }
  if (auto status = t.call(t.api.init); !status.ok())
    return std::move(status).error().in("start the NVIDIA management library");
  t.initialised = true;
  return nvml;
}

// ---- the host
Result<std::string> Nvml::driver_version() {
  char buffer[NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE] = {};
  BH_CHECK(table_->call(table_->api.driver_version, buffer, static_cast<unsigned>(sizeof buffer)));
  return text_of(buffer);
}

Result<std::string> Nvml::cuda_version() {
  int version = 0;
  BH_CHECK(table_->call(table_->api.cuda_version, &version));
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

Result<std::string> Nvml::process_name(int pid) {
  char buffer[256] = {};
  BH_CHECK(table_->call(table_->api.process_name, static_cast<unsigned>(pid), buffer,
                        static_cast<unsigned>(sizeof buffer)));
  return text_of(buffer);
}

Result<unsigned> Nvml::device_count() {
  unsigned count = 0;
  BH_CHECK(table_->call(table_->api.count, &count));
  if (count > limits::gpus) return lied(table_->api.count.name, fmt::format("{} GPUs", count));
  return count;
}

Result<Device> Nvml::device(unsigned index) {
  nvmlDevice_t handle = nullptr;
  BH_CHECK(table_->call(table_->api.by_index, index, &handle));
  table_->indices[handle] = index;
  return Device{handle, index};
}

Result<Device> Nvml::device(const Uuid& uuid) {
  nvmlDevice_t handle = nullptr;
  if (auto status = table_->call(table_->api.by_uuid, uuid.text.c_str(), &handle); !status.ok()) {
    return std::move(status).error().in(fmt::format("GPU {}", printable(uuid.text, 96)));
  }
  unsigned index = 0;
  BH_CHECK(table_->call(table_->api.index, handle, &index));
  table_->indices[handle] = index;
  return Device{handle, index};
}

Result<std::vector<Device>> Nvml::devices() {
  BH_TRY(const unsigned count, device_count());
  std::vector<Device> found;
  for (unsigned index = 0; index < count; ++index) {
    if (auto one = device(index); one.ok()) found.push_back(*one);
  }
  return found;
}

// ---- one GPU
Result<Uuid> Nvml::uuid(Device device) {
  BH_TRY(std::string text,
         table_->text<NVML_DEVICE_UUID_V2_BUFFER_SIZE>(table_->api.uuid, handle_of(device)));
  return Uuid{std::move(text)};
}
Result<std::string> Nvml::name(Device device) {
  return table_->text<NVML_DEVICE_NAME_V2_BUFFER_SIZE>(table_->api.name, handle_of(device));
}
Result<std::string> Nvml::serial(Device device) {
  return table_->text<NVML_DEVICE_SERIAL_BUFFER_SIZE>(table_->api.serial, handle_of(device));
}
Result<std::string> Nvml::vbios(Device device) {
  return table_->text<NVML_DEVICE_VBIOS_VERSION_BUFFER_SIZE>(table_->api.vbios, handle_of(device));
}

Result<PciAddress> Nvml::pci_address(Device device) {
  nvmlPciInfo_t info = {};
  BH_CHECK(table_->call(table_->api.pci, handle_of(device), &info));
  return PciAddress::parse(std::string_view(info.busId, ::strnlen(info.busId, sizeof info.busId)));
}

Result<std::string> Nvml::compute_capability(Device device) {
  int major = 0, minor_number = 0;
  BH_CHECK(table_->call(table_->api.capability, handle_of(device), &major, &minor_number));
  return fmt::format("{}.{}", major, minor_number);
}

Result<unsigned> Nvml::minor(Device device) { return table_->number(table_->api.minor, handle_of(device)); }

Result<Memory> Nvml::memory(Device device) {
  // Version 2 tells what the driver keeps for itself apart from what is used, as nvidia-smi shows it.
  nvmlMemory_v2_t split = {};
  split.version = nvmlMemory_v2;
  if (table_->raw(table_->api.memory_v2, handle_of(device), &split) == NVML_SUCCESS)
    return Memory{Bytes(split.total), Bytes(split.used)};
  nvmlMemory_t whole = {};
  BH_CHECK(table_->call(table_->api.memory, handle_of(device), &whole));
  return Memory{Bytes(whole.total), Bytes(whole.used)};
}

Result<Celsius> Nvml::temperature(Device device) {
  unsigned degrees = 0;
  BH_CHECK(table_->call(table_->api.temperature, handle_of(device), NVML_TEMPERATURE_GPU, &degrees));
  return Celsius(static_cast<std::int32_t>(degrees));
}

Result<Celsius> Nvml::margin(Device device) {
  abi::MarginTemperature answer = {abi::version_word<abi::MarginTemperature>(1), 0};
  BH_CHECK(table_->call(table_->api.margin, handle_of(device), &answer));
  return Celsius(answer.margin);
}

Result<Celsius> Nvml::slowdown_at(Device device) {
  unsigned degrees = 0;
  BH_CHECK(
      table_->call(table_->api.threshold, handle_of(device), NVML_TEMPERATURE_THRESHOLD_SLOWDOWN, &degrees));
  return Celsius(static_cast<std::int32_t>(degrees));
}

Result<Celsius> Nvml::shutdown_at(Device device) {
  unsigned degrees = 0;
  BH_CHECK(
      table_->call(table_->api.threshold, handle_of(device), NVML_TEMPERATURE_THRESHOLD_SHUTDOWN, &degrees));
  return Celsius(static_cast<std::int32_t>(degrees));
}

Result<Clocks> Nvml::clocks(Device device) { return table_->clocks_by(table_->api.clock, handle_of(device)); }
Result<Clocks> Nvml::clocks_max(Device device) {
  return table_->clocks_by(table_->api.clock_max, handle_of(device));
}

Result<std::uint64_t> Nvml::clock_event_reasons(Device device) {
  unsigned long long mask = 0;
  auto& symbol = table_->api.event_reasons.function != nullptr ? table_->api.event_reasons
                                                               : table_->api.throttle_reasons;
  BH_CHECK(table_->call(symbol, handle_of(device), &mask));
  return std::uint64_t{mask};
}

Result<std::string> Nvml::virtualization(Device device) {
  nvmlGpuVirtualizationMode_t mode = NVML_GPU_VIRTUALIZATION_MODE_NONE;
  BH_CHECK(table_->call(table_->api.virtualization, handle_of(device), &mode));
  static constexpr const char* names[] = {"none", "pass-through", "vgpu", "host-vgpu", "host-vsga"};
  const auto number = static_cast<unsigned>(mode);
  if (number >= std::size(names)) return fmt::format("mode {}", number);
  return std::string(names[number]);
}

Result<Sensors> Nvml::sensors(Device device) {
  Table& t = *table_;
  constexpr std::array<unsigned, 8> ids = {abi::field_power_average,   abi::field_power_limit,
                                           abi::field_power_default,   abi::field_power_min,
                                           abi::field_power_max,       abi::field_ecc_corrected,
                                           abi::field_ecc_uncorrected, abi::field_nvlink_count};
  std::array<nvmlFieldValue_t, ids.size()> values = {};
  for (std::size_t i = 0; i < ids.size(); ++i) {
    values[i].fieldId = ids[i];
    values[i].nvmlReturn = NVML_ERROR_NOT_SUPPORTED;
  }
  const nvmlReturn_t batch =
      t.raw(t.api.fields, handle_of(device), static_cast<int>(ids.size()), values.data());
  if (batch == NVML_ERROR_GPU_IS_LOST) return t.failure(batch, t.api.fields.name);
  const auto got = [&](std::size_t i) -> std::optional<std::uint64_t> {
    if (batch != NVML_SUCCESS || values[i].nvmlReturn != NVML_SUCCESS) return std::nullopt;
    return count_of(values[i]);
  };
  // Older drivers, and GA100, answer some of these only one by one.
  const auto milliwatts = [&](std::size_t i, auto& symbol) -> Reading<Milliwatts> {
    if (const auto value = got(i)) return Milliwatts(*value);
    Result<unsigned> alone = t.number(symbol, handle_of(device));
    if (!alone.ok()) return Reading<Milliwatts>::missing(alone.error().message());
    return Milliwatts(*alone);
  };
  Sensors sensors;
  sensors.power_average = milliwatts(0, t.api.power);
  sensors.limit = milliwatts(1, t.api.limit_enforced);
  sensors.limit_default = milliwatts(2, t.api.limit_default);
  const auto low = got(3), high = got(4);
  if (low && high) {
    sensors.limit_min = Milliwatts(*low);
    sensors.limit_max = Milliwatts(*high);
  } else {
    unsigned least = 0, greatest = 0;
    if (const Status status = t.call(t.api.limit_range, handle_of(device), &least, &greatest); status.ok()) {
      sensors.limit_min = Milliwatts(least);
      sensors.limit_max = Milliwatts(greatest);
    } else {
      sensors.limit_min = sensors.limit_max = Reading<Milliwatts>::missing(status.error().message());
    }
  }
  const auto errors = [&](std::size_t i, nvmlMemoryErrorType_t type) -> Reading<std::uint64_t> {
    if (const auto value = got(i)) return *value;
    unsigned long long count = 0;
    if (const Status status = t.call(t.api.ecc_errors, handle_of(device), type, NVML_VOLATILE_ECC, &count);
        !status.ok()) {
      return Reading<std::uint64_t>::missing(status.error().message());
    }
    return std::uint64_t{count};
  };
  sensors.ecc_corrected = errors(5, NVML_MEMORY_ERROR_TYPE_CORRECTED);
  sensors.ecc_uncorrected =
      sensors.ecc_corrected ? errors(6, NVML_MEMORY_ERROR_TYPE_UNCORRECTED) : sensors.ecc_corrected;
  if (const auto links = got(7); links && *links <= sane) sensors.nvlinks = static_cast<unsigned>(*links);
  return sensors;
}

Result<Utilization> Nvml::utilization(Device device) {
  nvmlUtilization_t rates = {};
  BH_CHECK(table_->call(table_->api.utilization, handle_of(device), &rates));
  if (rates.gpu > 100 || rates.memory > 100)
    return lied(table_->api.utilization.name, fmt::format("{} % and {} %", rates.gpu, rates.memory));
  return Utilization{rates.gpu, rates.memory};
}

Status Nvml::fields(Device device, std::span<Field> batch) {
  std::array<nvmlFieldValue_t, sane> values;
  if (batch.size() > values.size()) return Error(Errc::invalid, "more than 64 fields at once");
  for (std::size_t i = 0; i < batch.size(); ++i) {
    values[i] = {};
    values[i].fieldId = batch[i].id;
    values[i].scopeId = batch[i].scope;
    values[i].nvmlReturn = NVML_ERROR_NOT_SUPPORTED;
    batch[i].number.reset();
    batch[i].count = 0;
    batch[i].refused = Errc::unsupported;
  }
  BH_CHECK(
      table_->call(table_->api.fields, handle_of(device), static_cast<int>(batch.size()), values.data()));
  for (std::size_t i = 0; i < batch.size(); ++i) {
    if (values[i].nvmlReturn != NVML_SUCCESS) {
      batch[i].refused = code_of(values[i].nvmlReturn);
      continue;
    }
    const auto number = number_of(values[i]);
    if (!number || !std::isfinite(*number)) {
      batch[i].refused = Errc::corrupt;
      continue;
    }
    batch[i].number = number;
    batch[i].count = count_of(values[i]).value_or(0);
    batch[i].refused.reset();
  }
  return ok_status();
}

// ---- GPM
GpmSample::~GpmSample() {
  if (handle_ != nullptr)
    owner_->table_->raw(owner_->table_->api.gpm_free, static_cast<nvmlGpmSample_t>(handle_));
}
GpmSample::GpmSample(GpmSample&& other) noexcept : owner_(other.owner_), handle_(other.handle_) {
  other.handle_ = nullptr;
}
GpmSample& GpmSample::operator=(GpmSample&& other) noexcept {
  std::swap(owner_, other.owner_);
  std::swap(handle_, other.handle_);
  return *this;
}

Result<bool> Nvml::gpm_supported(Device device) {
  nvmlGpmSupport_t support = {};
  support.version = NVML_GPM_SUPPORT_VERSION;
  BH_CHECK(table_->call(table_->api.gpm_support, handle_of(device), &support));
  return support.isSupportedDevice != 0;
}

Result<GpmSample> Nvml::gpm_sample() {
  nvmlGpmSample_t handle = nullptr;
  BH_CHECK(table_->call(table_->api.gpm_alloc, &handle));
  GpmSample sample;
  sample.owner_ = this;
  sample.handle_ = handle;
  return sample;
}

Status Nvml::gpm_take(Device device, std::optional<unsigned> gpu_instance, GpmSample& into) {
  const auto handle = static_cast<nvmlGpmSample_t>(into.handle_);
  if (gpu_instance) return table_->call(table_->api.gpm_mig_get, handle_of(device), *gpu_instance, handle);
  return table_->call(table_->api.gpm_get, handle_of(device), handle);
}

Status Nvml::gpm_metrics(const GpmSample& before, const GpmSample& after, std::span<Metric> metrics) {
  if (metrics.size() > sane) return Error(Errc::invalid, "more than 64 metrics at once");
  if (!table_->gpm) table_->gpm = std::make_unique<nvmlGpmMetricsGet_t>();
  nvmlGpmMetricsGet_t& asked = *table_->gpm;
  static_assert(std::size(decltype(asked.metrics){}) >= sane);
  asked.version = NVML_GPM_METRICS_GET_VERSION;
  asked.numMetrics = static_cast<unsigned>(metrics.size());
  asked.sample1 = static_cast<nvmlGpmSample_t>(before.handle_);
  asked.sample2 = static_cast<nvmlGpmSample_t>(after.handle_);
  for (std::size_t i = 0; i < metrics.size(); ++i) {
    asked.metrics[i] = {};
    asked.metrics[i].metricId = metrics[i].id;
    asked.metrics[i].nvmlReturn = NVML_ERROR_NOT_SUPPORTED;
    metrics[i].value.reset();
  }
  BH_CHECK(table_->call(table_->api.gpm_metrics, &asked));
  for (std::size_t i = 0; i < metrics.size(); ++i) {
    if (asked.metrics[i].nvmlReturn == NVML_SUCCESS && std::isfinite(asked.metrics[i].value))
      metrics[i].value = asked.metrics[i].value;
  }
  return ok_status();
}

Result<NvLinks> Nvml::nvlinks(Device device, std::optional<unsigned> count) {
  Table& t = *table_;
  NvLinks found;
  if (count && *count > 0) {
    const unsigned links = std::min(*count, sane);
    std::array<nvmlFieldValue_t, sane> values = {};
    for (unsigned i = 0; i < links; ++i) {
      values[i].fieldId = abi::field_nvlink_state;
      values[i].scopeId = i;
      values[i].nvmlReturn = NVML_ERROR_NOT_SUPPORTED;
    }
    const bool batch =
        t.raw(t.api.fields, handle_of(device), static_cast<int>(links), values.data()) == NVML_SUCCESS;
    if (batch && std::all_of(values.begin(), values.begin() + links,
                             [](const auto& value) { return value.nvmlReturn == NVML_SUCCESS; })) {
      found.links = links;
      for (unsigned i = 0; i < links; ++i) found.active += count_of(values[i]).value_or(0) == 1 ? 1U : 0U;
      return found;
    }
  }
  // One by one, until the driver knows no further link.
  for (unsigned i = 0; i < count.value_or(sane) && i < sane; ++i) {
    nvmlEnableState_t state = NVML_FEATURE_DISABLED;
    const nvmlReturn_t code = t.raw(t.api.nvlink_state, handle_of(device), i, &state);
    if (code == NVML_ERROR_NOT_SUPPORTED || code == NVML_ERROR_INVALID_ARGUMENT ||
        code == NVML_ERROR_FUNCTION_NOT_FOUND) {
      break;
    }
    if (code != NVML_SUCCESS) return t.failure(code, t.api.nvlink_state.name);
    ++found.links;
    found.active += state == NVML_FEATURE_ENABLED ? 1U : 0U;
  }
  return found;
}

Result<Fabric> Nvml::fabric(Device device) {
  Table& t = *table_;
  unsigned state = 0;
  int status = 0;
  abi::FabricInfo2 newer = {};
  newer.version = abi::version_word<abi::FabricInfo2>(2);
  if (t.raw(t.api.fabric_v, handle_of(device), static_cast<void*>(&newer)) == NVML_SUCCESS) {
    state = newer.state;
    status = newer.status;
  } else {
    abi::FabricInfo1 older = {};
    BH_CHECK(t.call(t.api.fabric, handle_of(device), &older));
    state = older.state;
    status = older.status;
  }
  static constexpr const char* names[] = {"not supported", "not started", "in progress", "completed"};
  Fabric fabric;
  fabric.state = state < std::size(names) ? names[state] : fmt::format("state {}", state);
  if (state != 3) {
    fabric.status = Reading<std::string>::missing("the fabric probe has not completed");
  } else {
    fabric.status = status == NVML_SUCCESS ? std::string("success") : t.words(status);
  }
  return fabric;
}

// ---- MIG
Result<MigMode> Nvml::mig_mode(Device device) {
  unsigned now = 0, pending = 0;
  BH_CHECK(table_->call(table_->api.mig_mode, handle_of(device), &now, &pending));
  if (now > NVML_DEVICE_MIG_ENABLE || pending > NVML_DEVICE_MIG_ENABLE)
    return lied(table_->api.mig_mode.name, fmt::format("mode {}, pending {}", now, pending));
  return MigMode{now == NVML_DEVICE_MIG_ENABLE, pending == NVML_DEVICE_MIG_ENABLE};
}

Result<mig::Geometry> Nvml::geometry(Device device) {
  Table& t = *table_;
  const nvmlDevice_t gpu = handle_of(device);
  if (const auto known = t.geometries.find(t.board_of(gpu)); known != t.geometries.end())
    return known->second;
  mig::Geometry geometry;
  std::optional<Bytes> total;
  bool named = t.api.profile_v.function != nullptr;  // the V function tells the name
  for (unsigned number = 0; number < abi::gpu_profile_ceiling; ++number) {
    mig::Profile profile;
    profile.nvml_enum = number;
    nvmlReturn_t code = NVML_ERROR_FUNCTION_NOT_FOUND;
    std::uint64_t memory_mib = 0;
    if (named) {
      abi::ProfileInfo2 info = {};
      info.version = abi::version_word<abi::ProfileInfo2>(2);
      code = t.raw(t.api.profile_v, gpu, number, static_cast<void*>(&info));
      if (code == NVML_SUCCESS) {
        profile.id = info.id;
        profile.compute_slices = info.slices;
        profile.max_instances = info.instances;
        profile.multiprocessors = info.multiprocessors;
        profile.copy_engines = info.copy_engines;
        profile.decoders = info.decoders;
        profile.encoders = info.encoders;
        profile.jpeg_engines = info.jpeg;
        profile.optical_flow = info.ofa;
        memory_mib = info.memory_mib;
        profile.name = text_of(info.name);
      } else if (code == NVML_ERROR_ARGUMENT_VERSION_MISMATCH) {
        abi::ProfileInfo3 later = {};
        later.version = abi::version_word<abi::ProfileInfo3>(3);
        code = t.raw(t.api.profile_v, gpu, number, static_cast<void*>(&later));
        if (code == NVML_SUCCESS) {
          profile.id = later.id;
          profile.compute_slices = later.slices;
          profile.max_instances = later.instances;
          profile.multiprocessors = later.multiprocessors;
          profile.copy_engines = later.copy_engines;
          profile.decoders = later.decoders;
          profile.encoders = later.encoders;
          profile.jpeg_engines = later.jpeg;
          profile.optical_flow = later.ofa;
          memory_mib = later.memory_mib;
          profile.name = text_of(later.name);
        } else if (code == NVML_ERROR_ARGUMENT_VERSION_MISMATCH) {
          named = false;
        }
      }
    }
    if (!named) {
      nvmlGpuInstanceProfileInfo_t info = {};
      code = t.raw(t.api.profile, gpu, number, &info);
      if (code == NVML_SUCCESS) {
        profile.id = info.id;
        profile.compute_slices = info.sliceCount;
        profile.max_instances = info.instanceCount;
        profile.multiprocessors = info.multiprocessorCount;
        profile.copy_engines = info.copyEngineCount;
        profile.decoders = info.decoderCount;
        profile.encoders = info.encoderCount;
        profile.jpeg_engines = info.jpegCount;
        profile.optical_flow = info.ofaCount;
        memory_mib = info.memorySizeMB;
      }
    }
    // Past the enums we know, INVALID_ARGUMENT means the driver knows no more either.
    if (code == NVML_ERROR_INVALID_ARGUMENT && number >= abi::gpu_profile_count) break;
    if (code == NVML_ERROR_NOT_SUPPORTED || code == NVML_ERROR_INVALID_ARGUMENT) continue;
    if (code != NVML_SUCCESS)
      return t.failure(code, named ? t.api.profile_v.name : t.api.profile.name).in("MIG profiles");
    if (profile.max_instances > sane || profile.compute_slices > sane || memory_mib > (1ULL << 32U)) {
      return lied(t.api.profile.name, fmt::format("a profile of {} instances, {} slices, {} MiB",
                                                  profile.max_instances, profile.compute_slices, memory_mib));
    }
    profile.memory = mebibytes(memory_mib);
    if (profile.name.starts_with("MIG ")) profile.name.erase(0, 4);
    if (profile.name.empty()) {
      if (!total) {
        BH_TRY(const Memory whole, memory(device));
        total = whole.total;
      }
      profile.name = derived_name(number, profile.compute_slices, memory_mib, *total);
    }
    nvmlGpuInstancePlacement_t places[256] = {};
    unsigned count = std::size(places);
    const nvmlReturn_t placed = t.raw(t.api.placements, gpu, profile.id, places, &count);
    if (placed == NVML_ERROR_NOT_SUPPORTED) continue;  // known, but not on this board
    if (placed != NVML_SUCCESS)
      return t.failure(placed, t.api.placements.name).in("MIG profile " + profile.name);
    if (count > std::size(places)) return lied(t.api.placements.name, fmt::format("{} placements", count));
    for (const auto& place : std::span(places, count)) {
      if (place.start >= sane || place.size == 0 || place.size > sane) {
        return lied(t.api.placements.name, fmt::format("placement {}+{}", place.start, place.size));
      }
      profile.starts.push_back(place.start);
      profile.size = place.size;
      geometry.memory_slices = std::max(geometry.memory_slices, place.start + place.size);
    }
    geometry.profiles.push_back(std::move(profile));
  }
  t.geometries.emplace(t.board_of(gpu), geometry);
  return geometry;
}

Result<std::vector<GpuInstance>> Nvml::instances(Device device, std::optional<unsigned> only) {
  Table& t = *table_;
  const nvmlDevice_t gpu = handle_of(device);
  std::vector<unsigned> ids;
  if (only) {
    ids.push_back(*only);
  } else {
    BH_TRY(const mig::Geometry profiles, geometry(device));
    for (const mig::Profile& profile : profiles.profiles) ids.push_back(profile.id);
  }
  std::vector<GpuInstance> all;
  for (const unsigned profile_id : ids) {
    // The driver writes up to the profile's instance count and does not look at ours: room for any sane
    // number.
    nvmlGpuInstance_t found[sane] = {};
    unsigned count = sane;
    const nvmlReturn_t code = t.raw(t.api.gpu_instances, gpu, profile_id, found, &count);
    if (code == NVML_ERROR_NOT_SUPPORTED) continue;
    if (code != NVML_SUCCESS) return t.failure(code, t.api.gpu_instances.name).in("GPU instances");
    if (count > sane) return lied(t.api.gpu_instances.name, fmt::format("{} instances", count));
    for (unsigned i = 0; i < count; ++i) {
      auto instance = t.describe(found[i]);
      if (!instance.ok() && instance.error().code() == Errc::not_found) continue;  // went away just now
      if (!instance.ok()) return std::move(instance).error().in("GPU instances");
      if (auto listed = t.list_compute(gpu, found[i], *instance); !listed.ok()) {
        // A half-made instance answers nothing but its place; it must still be seen, to be destroyed.
        instance->compute.clear();
      }
      all.push_back(std::move(instance).value());
    }
  }
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  return all;
}

Result<std::vector<ProcessBusy>> Nvml::process_utilization(Device device, std::uint64_t since_us) {
  Table& t = *table_;
  std::vector<nvmlProcessUtilizationSample_t> found(128);
  unsigned count = 0;
  for (int attempt = 0; attempt < 3; ++attempt) {
    count = static_cast<unsigned>(found.size());
    const nvmlReturn_t code = t.raw(t.api.process_utilization, handle_of(device), found.data(), &count,
                                    static_cast<unsigned long long>(since_us));
    if (code == NVML_SUCCESS) break;
    if (code != NVML_ERROR_INSUFFICIENT_SIZE || attempt == 2)
      return t.failure(code, t.api.process_utilization.name);
    if (count > limits::processes)
      return lied(t.api.process_utilization.name, fmt::format("{} samples", count));
    found.resize(count + std::size_t{64});  // more may come meanwhile
  }
  if (count > found.size()) return lied(t.api.process_utilization.name, fmt::format("{} samples", count));
  std::vector<ProcessBusy> all;
  for (const auto& sample : std::span(found.data(), count)) {
    // The driver pads its answer with old and empty samples.
    if (sample.pid == 0 || sample.pid > 0x7fffffffU || sample.timeStamp <= since_us || sample.smUtil > 100)
      continue;
    all.push_back({static_cast<int>(sample.pid), sample.smUtil, sample.timeStamp});
  }
  return all;
}

Result<std::vector<ProcessEntry>> Nvml::processes(Device device) {
  Table& t = *table_;
  std::vector<ProcessEntry> all;
  const auto add = [&](auto& symbol, bool required) -> Status {
    std::vector<nvmlProcessInfo_t> found(64);
    unsigned count = 0;
    for (int attempt = 0; attempt < 4; ++attempt) {
      count = static_cast<unsigned>(found.size());
      const nvmlReturn_t code = t.raw(symbol, handle_of(device), &count, found.data());
      if (code == NVML_SUCCESS) break;
      if (code == NVML_ERROR_INSUFFICIENT_SIZE && attempt < 3) {
        if (count > limits::processes) return lied(symbol.name, fmt::format("{} processes", count));
        found.resize(
            std::max<std::size_t>(found.size() * 2, count + std::size_t{16}));  // more may come meanwhile
        continue;
      }
      if (!required && (code == NVML_ERROR_NOT_SUPPORTED || code == NVML_ERROR_FUNCTION_NOT_FOUND))
        return ok_status();
      return t.failure(code, symbol.name);
    }
    if (count > found.size()) return lied(symbol.name, fmt::format("{} processes", count));
    for (const auto& info : std::span(found.data(), count)) {
      if (info.pid == 0 || info.pid > 0x7fffffffU) continue;
      ProcessEntry entry;
      entry.pid = static_cast<int>(info.pid);
      if (info.usedGpuMemory == ~0ULL) {
        entry.memory = Reading<Bytes>::missing("the driver does not say");
      } else {
        entry.memory = Bytes(info.usedGpuMemory);
      }
      if (info.gpuInstanceId != 0xffffffffU) entry.gpu_instance = info.gpuInstanceId;
      if (info.computeInstanceId != 0xffffffffU) entry.compute_instance = info.computeInstanceId;
      const auto same = [&](const ProcessEntry& other) {
        return other.pid == entry.pid && other.gpu_instance == entry.gpu_instance &&
               other.compute_instance == entry.compute_instance;
      };
      if (std::none_of(all.begin(), all.end(), same)) all.push_back(std::move(entry));
    }
    return ok_status();
  };
  BH_CHECK(add(t.api.compute_processes, true));
  BH_CHECK(add(t.api.graphics_processes, false));
  BH_CHECK(add(t.api.mps_processes, false));
  return all;
}

Result<std::vector<MigDevice>> Nvml::mig_devices(Device device, std::size_t expected, bool with_memory) {
  Table& t = *table_;
  std::vector<MigDevice> all;
  if (expected == 0) return all;
  BH_TRY(const unsigned ceiling, t.number(t.api.mig_device_ceiling, handle_of(device)));
  if (ceiling > 256) return lied(t.api.mig_device_ceiling.name, fmt::format("{} MIG devices", ceiling));
  for (unsigned i = 0; i < ceiling && all.size() < expected; ++i) {
    nvmlDevice_t mig_handle = nullptr;
    const nvmlReturn_t code = t.raw(t.api.mig_device, handle_of(device), i, &mig_handle);
    if (code == NVML_ERROR_NOT_FOUND) continue;  // indices have gaps
    if (code != NVML_SUCCESS) return t.failure(code, t.api.mig_device.name);
    MigDevice found;
    BH_CHECK(t.call(t.api.gpu_instance_id, mig_handle, &found.gpu_instance));
    BH_CHECK(t.call(t.api.compute_instance_id, mig_handle, &found.compute_instance));
    BH_TRY(std::string text, t.text<NVML_DEVICE_UUID_V2_BUFFER_SIZE>(t.api.uuid, mig_handle));
    found.uuid.text = std::move(text);
    found.handle = mig_handle;
    found.used = Reading<Bytes>::missing("not asked");
    if (with_memory) {
      const auto split = memory({mig_handle, device.index});
      found.used =
          split.ok() ? Reading<Bytes>(split->used) : Reading<Bytes>::missing(split.error().message());
    }
    all.push_back(std::move(found));
  }
  return all;
}

Result<Activation> Nvml::set_mig_mode(Device device, bool on) {
  Table& t = *table_;
  nvmlReturn_t activation = NVML_SUCCESS;
  const auto status = t.call(t.api.set_mig_mode, handle_of(device), on ? 1U : 0U, &activation);
  t.geometries.clear();
  t.compute_profiles.clear();
  t.boards.clear();
  t.last = {};
  if (!status.ok()) return status.error();
  if (activation == NVML_SUCCESS) return Activation{};
  return Activation{.in_force = false, .code = static_cast<int>(activation), .why = t.words(activation)};
}

Result<GpuInstance> Nvml::create_instance(Device device, unsigned profile_id, mig::Placement place) {
  Table& t = *table_;
  const nvmlGpuInstancePlacement_t where = {place.start, place.size};
  nvmlGpuInstance_t handle = nullptr;
  BH_CHECK(t.call(t.api.create_gpu_instance, handle_of(device), profile_id, &where, &handle));
  auto made = t.describe(handle);
  if (!made.ok()) return std::move(made).error().in("the GPU instance was made but cannot be read back");
  t.last = {.device = handle_of(device), .id = made->id, .handle = handle};
  return made;
}

void Nvml::alike(Device device, Device like) {
  table_->boards[handle_of(device)] = table_->board_of(handle_of(like));
}

Result<GpuInstance> Nvml::instance(Device device, unsigned id) {
  Table& t = *table_;
  t.last = {};  // what another process did meanwhile must be seen
  BH_TRY(const nvmlGpuInstance_t handle, t.resolve_instance(handle_of(device), id));
  BH_TRY(GpuInstance found, t.describe(handle));
  t.last = {.device = handle_of(device), .id = id, .handle = handle};
  return found;
}

Result<unsigned> Nvml::compute_count(Device device, unsigned gpu_instance, unsigned compute_profile) {
  Table& t = *table_;
  BH_TRY(const nvmlGpuInstance_t parent, t.resolve_instance(handle_of(device), gpu_instance));
  nvmlComputeInstance_t found[sane] = {};
  unsigned count = sane;
  BH_CHECK(t.call(t.api.compute_instances, parent, compute_profile, found, &count));
  if (count > sane) return lied(t.api.compute_instances.name, fmt::format("{} instances", count));
  return count;
}

Status Nvml::destroy_compute_of(Device device, unsigned gpu_instance, unsigned compute_profile) {
  Table& t = *table_;
  BH_TRY(const nvmlGpuInstance_t parent, t.resolve_instance(handle_of(device), gpu_instance));
  nvmlComputeInstance_t found[sane] = {};
  unsigned count = sane;
  BH_CHECK(t.call(t.api.compute_instances, parent, compute_profile, found, &count));
  if (count > sane) return lied(t.api.compute_instances.name, fmt::format("{} instances", count));
  for (unsigned i = 0; i < count; ++i) BH_CHECK(t.call(t.api.destroy_compute_instance, found[i]));
  return ok_status();
}

Result<unsigned> Nvml::add_compute(Device device, unsigned gpu_instance, unsigned compute_slices) {
  Table& t = *table_;
  BH_TRY(const nvmlGpuInstance_t parent, t.resolve_instance(handle_of(device), gpu_instance));
  if (const auto number = compute_enum_of(compute_slices)) {
    nvmlComputeInstanceProfileInfo_t info = {};
    const nvmlReturn_t code = t.raw(t.api.compute_profile, parent, *number,
                                    unsigned{NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED}, &info);
    if (code == NVML_SUCCESS && info.sliceCount == compute_slices) {
      nvmlComputeInstance_t made = nullptr;
      BH_CHECK(t.call(t.api.create_compute_instance, parent, info.id, &made));
      return info.id;
    }
  }
  BH_TRY(const ComputeInstance made, create_compute(device, gpu_instance, compute_slices));
  return made.profile;
}

Result<ComputeInstance> Nvml::create_compute(Device device, unsigned gpu_instance, unsigned compute_slices) {
  Table& t = *table_;
  BH_TRY(const nvmlGpuInstance_t handle, t.resolve_instance(handle_of(device), gpu_instance));
  BH_TRY(const GpuInstance parent, t.describe(handle));
  BH_TRY(const auto* profiles, t.profiles_of(handle_of(device), parent, handle));
  const ComputeProfile* chosen = nullptr;
  for (const auto& profile : *profiles) {
    // The first of equals: the plain profile comes before its special twins.
    const bool better = compute_slices == 0 ? chosen == nullptr || profile.slices > chosen->slices
                                            : chosen == nullptr && profile.slices == compute_slices;
    if (better) chosen = &profile;
  }
  if (chosen == nullptr) {
    return Error(Errc::invalid, fmt::format("GPU instance {} offers no compute instance of {} slices",
                                            gpu_instance, compute_slices));
  }
  nvmlComputeInstance_t made = nullptr;
  BH_CHECK(t.call(t.api.create_compute_instance, handle, chosen->id, &made));
  auto described = t.describe(made, *profiles);
  if (!described.ok())
    return std::move(described).error().in("the compute instance was made but cannot be read back");
  return described;
}

Status Nvml::destroy_compute(Device device, unsigned gpu_instance, unsigned compute_instance) {
  Table& t = *table_;
  BH_TRY(const nvmlGpuInstance_t parent, t.resolve_instance(handle_of(device), gpu_instance));
  nvmlComputeInstance_t handle = nullptr;
  if (auto status = t.call(t.api.compute_instance, parent, compute_instance, &handle); !status.ok()) {
    return std::move(status).error().in(
        fmt::format("compute instance {} of GPU instance {}", compute_instance, gpu_instance));
  }
  return t.call(t.api.destroy_compute_instance, handle);
}

Status Nvml::destroy_instance(Device device, unsigned gpu_instance) {
  BH_TRY(const nvmlGpuInstance_t handle, table_->resolve_instance(handle_of(device), gpu_instance));
  table_->last = {};
  return table_->call(table_->api.destroy_gpu_instance, handle);
}

// ---- settings
Result<bool> Nvml::persistence(Device device) {
  nvmlEnableState_t state = NVML_FEATURE_DISABLED;
  BH_CHECK(table_->call(table_->api.persistence, handle_of(device), &state));
  return state == NVML_FEATURE_ENABLED;
}

Status Nvml::set_persistence(Device device, bool on) {
  return table_->call(table_->api.set_persistence, handle_of(device),
                      on ? NVML_FEATURE_ENABLED : NVML_FEATURE_DISABLED);
}

Result<Milliwatts> Nvml::power_limit(Device device) {
  BH_TRY(const unsigned limit, table_->number(table_->api.limit, handle_of(device)));
  return Milliwatts(limit);
}

Status Nvml::set_power_limit(Device device, Milliwatts limit) {
  if (limit.count > 0xffffffffU)
    return Error(Errc::invalid, fmt::format("{} mW is no power limit", limit.count));
  return table_->call(table_->api.set_limit, handle_of(device), static_cast<unsigned>(limit.count));
}

Status Nvml::lock_clocks(Device device, Megahertz low, Megahertz high) {
  return table_->call(table_->api.lock_clocks, handle_of(device), low.count, high.count);
}

Status Nvml::unlock_clocks(Device device) {
  return table_->call(table_->api.unlock_clocks, handle_of(device));
}

std::optional<CallInFlight> Nvml::in_flight() const {
  const char* function = table_->now.load(std::memory_order_acquire);
  if (function == nullptr) return std::nullopt;
  return CallInFlight{.function = function, .since_ns = table_->now_since.load(std::memory_order_relaxed)};
}

// ---- the price
std::vector<CallCost> Nvml::costs() const {
  std::vector<CallCost> all;
#define BH_COST(member, exported, type)                                                                 \
  if (table_->api.member.called.calls > 0) {                                                            \
    all.push_back({#exported, table_->api.member.called.calls, table_->api.member.called.nanoseconds}); \
  }
  BH_NVML_SYMBOLS(BH_COST)
#undef BH_COST
  std::sort(all.begin(), all.end(),
            [](const auto& a, const auto& b) { return a.nanoseconds > b.nanoseconds; });
  return all;
}

std::uint64_t Nvml::calls() const {
  std::uint64_t sum = 0;
  for (const auto& cost : costs()) sum += cost.calls;
  return sum;
}

}  // namespace bulkhead::nvml
