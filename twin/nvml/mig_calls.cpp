// MIG: the entry points over twin/mig. What each may answer: nvml-mig-error-codes.tsv.
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "twin/nvml/library.hpp"

using namespace bulkhead::twin;        // NOLINT(google-build-using-namespace): this file is the library
using namespace bulkhead::twin::nvml;  // NOLINT(google-build-using-namespace)

namespace {

using Dev = const bulkhead::twin::nvml::Device&;

bool has_mig(Dev d) { return d.chip->mig != MigActivation::unsupported; }

constexpr unsigned profile_enums = 17;  // NVML_GPU_INSTANCE_PROFILE_COUNT of the 13 header

// Profiles answer with MIG off too (read on the H100).
nvmlReturn_t find_profile(Dev d, unsigned nvml_enum, const MigProfile** out) {
  *out = mig::profile_by_enum(*d.state, d.slot, nvml_enum);
  return has_mig(d) && *out != nullptr ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
}

// For what takes the id (19, 14, 9 ...).
nvmlReturn_t find_profile_id(Dev d, unsigned id, const MigProfile** out) {
  if (!has_mig(d)) return NVML_ERROR_NOT_SUPPORTED;
  *out = mig::profile_by_id(*d.state, d.slot, id);
  return *out != nullptr ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
}

void fill(const MigProfile& profile, nvmlGpuInstanceProfileInfo_v2_t& out) {
  const unsigned version = out.version;
  out = {};
  out.version = version;
  out.id = profile.id;
  out.sliceCount = profile.slices;
  out.instanceCount = profile.max_instances;
  out.multiprocessorCount = profile.sm;
  out.copyEngineCount = profile.ce;
  out.decoderCount = profile.dec;
  out.encoderCount = profile.enc;
  out.jpegCount = profile.jpg;
  out.ofaCount = profile.ofa;
  out.memorySizeMB = profile.memory_mib;
  put(fmt::format("MIG {}", profile.name.view()), out.name);
}

void fill(const MigProfile& profile, abi::GpuInstanceProfile3& out) {
  nvmlGpuInstanceProfileInfo_v2_t two{};
  fill(profile, two);
  const unsigned version = out.version;
  out = {version,
         two.id,
         two.sliceCount,
         two.instanceCount,
         two.multiprocessorCount,
         two.copyEngineCount,
         two.decoderCount,
         two.encoderCount,
         two.jpegCount,
         two.ofaCount,
         two.memorySizeMB,
         {},
         0};
  put(two.name, out.name);
}

nvmlReturn_t fill_versioned(const MigProfile& profile, void* info) {
  unsigned version = 0;
  std::memcpy(&version, info, sizeof version);
  if (version == abi::version_word<nvmlGpuInstanceProfileInfo_v2_t>(2)) {
    fill(profile, *static_cast<nvmlGpuInstanceProfileInfo_v2_t*>(info));
  } else if (version == abi::version_word<abi::GpuInstanceProfile3>(3)) {
    fill(profile, *static_cast<abi::GpuInstanceProfile3*>(info));
  } else {
    return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
  }
  return NVML_SUCCESS;
}

void fill(Dev d, const mig::ComputeProfile& profile, nvmlComputeInstanceProfileInfo_t& out) {
  const MigProfile& of = *mig::profile_by_id(*d.state, d.slot, d.instance->profile_id);
  out = {profile.id, profile.slices, profile.max_instances, profile.sm, of.ce, of.dec, of.enc,
         of.jpg,     of.ofa};
}

std::string compute_name(Dev d, const mig::ComputeProfile& profile) {
  const MigProfile& of = *mig::profile_by_id(*d.state, d.slot, d.instance->profile_id);
  if (profile.slices == of.slices) return fmt::format("MIG {}", of.name.view());
  return fmt::format("MIG {}c.{}", profile.slices, of.name.view());
}

// Profiles of compute instances: enum out of bounds INVALID_ARGUMENT, one this instance lacks NOT_SUPPORTED.
nvmlReturn_t find_compute(Dev d, unsigned nvml_enum, mig::ComputeProfile* out) {
  const auto found = mig::compute_profile(*d.state, d.slot, *d.instance, nvml_enum);
  if (!found) return NVML_ERROR_NOT_SUPPORTED;
  *out = *found;
  return NVML_SUCCESS;
}

nvmlReturn_t on(Dev d) { return has_mig(d) && d.mig_on() ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED; }

// mig/config is readable by root alone; nvml.h calls these functions privileged.
bool is_root() { return ::geteuid() == 0; }
}  // namespace

extern "C" {
#pragma GCC visibility push(default)
nvmlReturn_t nvmlDeviceGetGpuInstanceProfileInfoByIdV(nvmlDevice_t device, unsigned id, void* info);
nvmlReturn_t nvmlGpuInstanceCreateComputeInstanceWithPlacement(nvmlGpuInstance_t instance, unsigned profile,
                                                               const abi::ComputeInstancePlacement* place,
                                                               nvmlComputeInstance_t* out);
nvmlReturn_t nvmlGpuInstanceGetComputeInstancePossiblePlacements(nvmlGpuInstance_t instance, unsigned profile,
                                                                 abi::ComputeInstancePlacement* places,
                                                                 unsigned* count);
#pragma GCC visibility pop
}

// ---- mode
nvmlReturn_t nvmlDeviceSetMigMode(nvmlDevice_t device, unsigned mode, nvmlReturn_t* activation) {
  return tell(
      __func__, device, activation != nullptr && mode <= NVML_DEVICE_MIG_ENABLE,
      [&](State& state, std::uint32_t gpu) {
        const mig::ModeAnswer answer =
            mig::set_mode(state, gpu, mode == NVML_DEVICE_MIG_ENABLE, held_by_others(state, gpu));
        if (answer.code == mig::success) *activation = to_nvml(answer.activation);
        return to_nvml(answer.code);
      },
      true);
}
nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned* now, unsigned* pending) {
  return ask(__func__, device, now != nullptr && pending != nullptr, [&](Dev d) {
    if (!has_mig(d)) return NVML_ERROR_NOT_SUPPORTED;
    *now = d.gpu->mig_current;
    *pending = d.gpu->mig_pending;
    return NVML_SUCCESS;
  });
}

// ---- profiles
nvmlReturn_t nvmlDeviceGetGpuInstanceProfileInfo(nvmlDevice_t device, unsigned profile,
                                                 nvmlGpuInstanceProfileInfo_t* info) {
  return ask(__func__, device, info != nullptr && profile < profile_enums, [&](Dev d) {
    const MigProfile* found = nullptr;
    if (const auto code = find_profile(d, profile, &found); code != NVML_SUCCESS) return code;
    *info = {found->id,  0,          found->slices, found->max_instances, found->sm,        found->ce,
             found->dec, found->enc, found->jpg,    found->ofa,           found->memory_mib};
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetGpuInstanceProfileInfoV(nvmlDevice_t device, unsigned profile,
                                                  nvmlGpuInstanceProfileInfo_v2_t* info) {
  return ask(__func__, device, info != nullptr && profile < profile_enums, [&](Dev d) {
    const MigProfile* found = nullptr;
    if (const auto code = find_profile(d, profile, &found); code != NVML_SUCCESS) return code;
    return fill_versioned(*found, info);
  });
}
nvmlReturn_t nvmlDeviceGetGpuInstanceProfileInfoByIdV(nvmlDevice_t device, unsigned id, void* info) {
  return ask(__func__, device, info != nullptr, [&](Dev d) {
    const MigProfile* found = nullptr;
    if (const auto code = find_profile_id(d, id, &found); code != NVML_SUCCESS) return code;
    return fill_versioned(*found, info);
  });
}
nvmlReturn_t nvmlDeviceGetGpuInstancePossiblePlacements_v2(nvmlDevice_t device, unsigned id,
                                                           nvmlGpuInstancePlacement_t* places,
                                                           unsigned* count) {
  return ask(__func__, device, count != nullptr, [&](Dev d) {
    const MigProfile* found = nullptr;
    if (const auto code = find_profile_id(d, id, &found); code != NVML_SUCCESS) return code;
    if (places == nullptr) {  // asking for the count alone is allowed
      *count = found->start_count;
      return NVML_SUCCESS;
    }
    const std::vector<unsigned> starts(found->starts, found->starts + found->start_count);
    return put_list(starts, count, places, [&](unsigned start) {
      return nvmlGpuInstancePlacement_t{start, found->size};
    });
  });
}
nvmlReturn_t nvmlDeviceGetGpuInstancePossiblePlacements(nvmlDevice_t device, unsigned id,
                                                        nvmlGpuInstancePlacement_t* places, unsigned* count) {
  return nvmlDeviceGetGpuInstancePossiblePlacements_v2(device, id, places, count);
}
nvmlReturn_t nvmlDeviceGetGpuInstanceRemainingCapacity(nvmlDevice_t device, unsigned id, unsigned* count) {
  return ask(__func__, device, count != nullptr, [&](Dev d) {
    const MigProfile* found = nullptr;
    if (const auto code = find_profile_id(d, id, &found); code != NVML_SUCCESS) return code;
    // With MIG off the driver of the recorded hosts answers for an empty board, whatever nvml.h says.
    *count = mig::capacity(*d.state, d.slot, *found);
    return NVML_SUCCESS;
  });
}

// ---- GPU instances
namespace {
nvmlReturn_t create(const char* function, nvmlDevice_t device, unsigned id,
                    const nvmlGpuInstancePlacement_t* place, bool ok, nvmlGpuInstance_t* out) {
  return tell(
      function, device, ok && out != nullptr,
      [&](State& state, std::uint32_t gpu) {
        std::optional<mig::Place> at;
        if (place != nullptr) at = mig::Place{place->start, place->size};
        GpuInstance* made = nullptr;
        const auto code = to_nvml(mig::create(state, gpu, id, at, &made));
        if (code == NVML_SUCCESS) *out = handle_of(gpu, *made);
        return code;
      },
      true);
}
}  // namespace
nvmlReturn_t nvmlDeviceCreateGpuInstance(nvmlDevice_t device, unsigned id, nvmlGpuInstance_t* out) {
  return create(__func__, device, id, nullptr, true, out);
}
nvmlReturn_t nvmlDeviceCreateGpuInstanceWithPlacement(nvmlDevice_t device, unsigned id,
                                                      const nvmlGpuInstancePlacement_t* place,
                                                      nvmlGpuInstance_t* out) {
  return create(__func__, device, id, place, place != nullptr, out);
}
nvmlReturn_t nvmlGpuInstanceDestroy(nvmlGpuInstance_t instance) {
  return tell_instance(__func__, instance, true,
                       [](State& state, std::uint32_t gpu, GpuInstance& found, ComputeInstance*) {
                         return to_nvml(mig::destroy(state, gpu, found.id));
                       });
}
nvmlReturn_t nvmlDeviceGetGpuInstances(nvmlDevice_t device, unsigned id, nvmlGpuInstance_t* out,
                                       unsigned* count) {
  return ask(__func__, device, out != nullptr && count != nullptr, [&](Dev d) {
    if (const auto code = on(d); code != NVML_SUCCESS) return code;
    const MigProfile* profile = nullptr;
    if (const auto code = find_profile_id(d, id, &profile); code != NVML_SUCCESS) return code;
    if (!is_root()) return NVML_ERROR_NO_PERMISSION;
    std::vector<const GpuInstance*> found;
    for (const GpuInstance& instance : d.gpu->instances) {
      if (instance.used != 0 && instance.profile_id == id) found.push_back(&instance);
    }
    std::sort(found.begin(), found.end(), [](const auto* a, const auto* b) { return a->id < b->id; });
    // `*count` is out alone: the array has the profile's instanceCount entries.
    *count = static_cast<unsigned>(found.size());
    for (std::size_t i = 0; i < found.size(); ++i) out[i] = handle_of(d.slot, *found[i]);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetGpuInstanceById(nvmlDevice_t device, unsigned id, nvmlGpuInstance_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    if (const auto code = on(d); code != NVML_SUCCESS) return code;
    if (!is_root()) return NVML_ERROR_NO_PERMISSION;
    const GpuInstance* found = mig::find(*d.state, d.slot, id);
    if (found == nullptr) return NVML_ERROR_NOT_FOUND;
    *out = handle_of(d.slot, *found);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlGpuInstanceGetInfo(nvmlGpuInstance_t instance, nvmlGpuInstanceInfo_t* info) {
  return ask_instance(__func__, instance, info != nullptr, [&](Dev d) {
    *info = {
        handle_of_gpu(d.slot), d.instance->id, d.instance->profile_id, {d.instance->start, d.instance->size}};
    return NVML_SUCCESS;
  });
}

// ---- compute instances
nvmlReturn_t nvmlGpuInstanceGetComputeInstanceProfileInfo(nvmlGpuInstance_t instance, unsigned profile,
                                                          unsigned engine,
                                                          nvmlComputeInstanceProfileInfo_t* info) {
  const bool ok = info != nullptr && profile < 9 && engine < NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_COUNT;
  return ask_instance(__func__, instance, ok, [&](Dev d) {
    mig::ComputeProfile found;
    if (const auto code = find_compute(d, profile, &found); code != NVML_SUCCESS) return code;
    fill(d, found, *info);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlGpuInstanceGetComputeInstanceProfileInfoV(nvmlGpuInstance_t instance, unsigned profile,
                                                           unsigned engine,
                                                           nvmlComputeInstanceProfileInfo_v2_t* info) {
  const bool ok = info != nullptr && profile < 9 && engine < NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_COUNT;
  return ask_instance(__func__, instance, ok, [&](Dev d) {
    mig::ComputeProfile found;
    if (const auto code = find_compute(d, profile, &found); code != NVML_SUCCESS) return code;
    nvmlComputeInstanceProfileInfo_t one{};
    fill(d, found, one);
    // Versions 2 and 3 agree up to the capabilities word behind the name.
    if (info->version == abi::version_word<abi::ComputeInstanceProfile3>(3)) {
      reinterpret_cast<abi::ComputeInstanceProfile3*>(info)->capabilities = 0;
    } else if (info->version != abi::version_word<nvmlComputeInstanceProfileInfo_v2_t>(2)) {
      return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    }
    std::memcpy(&info->id, &one, sizeof one);
    put(compute_name(d, found), info->name);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlGpuInstanceGetComputeInstanceRemainingCapacity(nvmlGpuInstance_t instance, unsigned profile,
                                                                unsigned* count) {
  return ask_instance(__func__, instance, count != nullptr, [&](Dev d) {
    mig::ComputeProfile found;
    if (const auto code = find_compute(d, profile, &found); code != NVML_SUCCESS) return code;
    *count = mig::compute_capacity(*d.state, d.slot, *d.instance, found);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlGpuInstanceGetComputeInstancePossiblePlacements(nvmlGpuInstance_t instance, unsigned profile,
                                                                 abi::ComputeInstancePlacement* places,
                                                                 unsigned* count) {
  return ask_instance(__func__, instance, count != nullptr, [&](Dev d) {
    mig::ComputeProfile found;
    if (const auto code = find_compute(d, profile, &found); code != NVML_SUCCESS) return code;
    const auto all =
        mig::compute_places(*mig::profile_by_id(*d.state, d.slot, d.instance->profile_id), found);
    if (places == nullptr) {
      *count = static_cast<unsigned>(all.size());
      return NVML_SUCCESS;
    }
    return put_list(all, count, places, [](mig::Place p) {
      return abi::ComputeInstancePlacement{p.start, p.size};
    });
  });
}
namespace {
nvmlReturn_t create_compute(const char* function, nvmlGpuInstance_t instance, unsigned profile,
                            const abi::ComputeInstancePlacement* place, bool ok, nvmlComputeInstance_t* out) {
  return tell_instance(function, instance, ok && out != nullptr,
                       [&](State& state, std::uint32_t gpu, GpuInstance& found, ComputeInstance*) {
                         std::optional<mig::Place> at;
                         if (place != nullptr) at = mig::Place{place->start, place->size};
                         ComputeInstance* made = nullptr;
                         const auto code =
                             to_nvml(mig::create_compute(state, gpu, found, profile, at, &made));
                         if (code == NVML_SUCCESS) *out = handle_of(gpu, found, *made);
                         return code;
                       });
}
}  // namespace
nvmlReturn_t nvmlGpuInstanceCreateComputeInstance(nvmlGpuInstance_t instance, unsigned profile,
                                                  nvmlComputeInstance_t* out) {
  return create_compute(__func__, instance, profile, nullptr, true, out);
}
nvmlReturn_t nvmlGpuInstanceCreateComputeInstanceWithPlacement(nvmlGpuInstance_t instance, unsigned profile,
                                                               const abi::ComputeInstancePlacement* place,
                                                               nvmlComputeInstance_t* out) {
  return create_compute(__func__, instance, profile, place, place != nullptr, out);
}
nvmlReturn_t nvmlComputeInstanceDestroy(nvmlComputeInstance_t compute) {
  return tell_instance(
      __func__, compute, true,
      [](State& state, std::uint32_t gpu, GpuInstance& instance, ComputeInstance* found) {
        return to_nvml(mig::destroy_compute(state, gpu, instance, found->id));
      },
      true);
}
nvmlReturn_t nvmlGpuInstanceGetComputeInstances(nvmlGpuInstance_t instance, unsigned profile,
                                                nvmlComputeInstance_t* out, unsigned* count) {
  return ask_instance(__func__, instance, out != nullptr && count != nullptr, [&](Dev d) {
    mig::ComputeProfile known;
    if (const auto code = find_compute(d, profile, &known); code != NVML_SUCCESS) return code;
    if (!is_root()) return NVML_ERROR_NO_PERMISSION;
    std::vector<const ComputeInstance*> found;
    for (const ComputeInstance& compute : d.instance->compute) {
      if (compute.used != 0 && compute.profile == profile) found.push_back(&compute);
    }
    std::sort(found.begin(), found.end(), [](const auto* a, const auto* b) { return a->id < b->id; });
    *count = static_cast<unsigned>(found.size());
    for (std::size_t i = 0; i < found.size(); ++i) out[i] = handle_of(d.slot, *d.instance, *found[i]);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlGpuInstanceGetComputeInstanceById(nvmlGpuInstance_t instance, unsigned id,
                                                   nvmlComputeInstance_t* out) {
  return ask_instance(__func__, instance, out != nullptr, [&](Dev d) {
    if (!is_root()) return NVML_ERROR_NO_PERMISSION;
    for (const ComputeInstance& compute : d.instance->compute) {
      if (compute.used == 0 || compute.id != id) continue;
      *out = handle_of(d.slot, *d.instance, compute);
      return NVML_SUCCESS;
    }
    return NVML_ERROR_NOT_FOUND;
  });
}
nvmlReturn_t nvmlComputeInstanceGetInfo_v2(nvmlComputeInstance_t compute, nvmlComputeInstanceInfo_t* info) {
  return ask_instance(
      __func__, compute, info != nullptr,
      [&](Dev d) {
        *info = {handle_of_gpu(d.slot),
                 handle_of(d.slot, *d.instance),
                 d.compute->id,
                 d.compute->profile,
                 {d.compute->start, d.compute->size}};
        return NVML_SUCCESS;
      },
      true);
}
nvmlReturn_t nvmlComputeInstanceGetInfo(nvmlComputeInstance_t compute, nvmlComputeInstanceInfo_t* info) {
  nvmlComputeInstanceInfo_t whole{};
  if (info == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  const nvmlReturn_t code = nvmlComputeInstanceGetInfo_v2(compute, &whole);
  // The first version ends before the placement.
  if (code == NVML_SUCCESS) std::memcpy(info, &whole, offsetof(nvmlComputeInstanceInfo_t, placement));
  return code;
}

// ---- MIG devices
nvmlReturn_t nvmlDeviceIsMigDeviceHandle(nvmlDevice_t device, unsigned* out) {
  return ask(
      __func__, device, out != nullptr,
      [&](Dev d) {
        *out = d.is_mig() ? 1 : 0;
        return NVML_SUCCESS;
      },
      Accept::gpu_or_mig);
}
nvmlReturn_t nvmlDeviceGetGpuInstanceId(nvmlDevice_t device, unsigned* id) {
  return ask(
      __func__, device, id != nullptr,
      [&](Dev d) {
        if (!d.is_mig()) return NVML_ERROR_INVALID_ARGUMENT;  // read on the H100
        *id = d.instance->id;
        return NVML_SUCCESS;
      },
      Accept::gpu_or_mig);
}
nvmlReturn_t nvmlDeviceGetComputeInstanceId(nvmlDevice_t device, unsigned* id) {
  return ask(
      __func__, device, id != nullptr,
      [&](Dev d) {
        if (!d.is_mig()) return NVML_ERROR_INVALID_ARGUMENT;
        *id = d.compute->id;
        return NVML_SUCCESS;
      },
      Accept::gpu_or_mig);
}
nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned* count) {
  return ask(__func__, device, count != nullptr, [&](Dev d) {
    *count = mig::max_devices(*d.state, d.slot);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned index, nvmlDevice_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    if (!has_mig(d)) return NVML_ERROR_NOT_SUPPORTED;
    if (!d.mig_on()) return NVML_ERROR_NOT_FOUND;
    if (index >= mig::max_devices(*d.state, d.slot)) return NVML_ERROR_INVALID_ARGUMENT;
    const auto slices = mig::devices(*d.state, d.slot);
    if (index >= slices.size()) return NVML_ERROR_NOT_FOUND;
    *out = handle_of_mig(d.slot, *slices[index].instance, *slices[index].compute);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t device, nvmlDevice_t* out) {
  return ask(
      __func__, device, out != nullptr,
      [&](Dev d) {
        if (!d.is_mig()) return NVML_ERROR_INVALID_ARGUMENT;  // read on the H100
        *out = handle_of_gpu(d.slot);
        return NVML_SUCCESS;
      },
      Accept::gpu_or_mig);
}
nvmlReturn_t nvmlDeviceGetAttributes_v2(nvmlDevice_t device, nvmlDeviceAttributes_t* out) {
  return ask(
      __func__, device, out != nullptr,
      [&](Dev d) {
        if (!d.is_mig()) return NVML_ERROR_NOT_SUPPORTED;
        const MigProfile& of = *mig::profile_by_id(*d.state, d.slot, d.instance->profile_id);
        const auto profile = mig::compute_profile(*d.state, d.slot, *d.instance, d.compute->profile);
        *out = {profile ? profile->sm : of.sm,
                of.ce,
                of.dec,
                of.enc,
                of.jpg,
                of.ofa,
                of.slices,
                d.compute->size,
                of.memory_mib};
        return NVML_SUCCESS;
      },
      Accept::gpu_or_mig);
}
nvmlReturn_t nvmlDeviceGetAttributes(nvmlDevice_t device, nvmlDeviceAttributes_t* out) {
  return nvmlDeviceGetAttributes_v2(device, out);
}
