// The driver's MIG state machine over twin::State: mode with its pending and current halves, GPU instances in
// the binary tree of ids, compute instances, and the rules of who may be destroyed when. Every function
// answers what NVML answers; facts: mig-semantics.md, nvml-mig-error-codes.tsv, mig-geometry.yaml. Permission
// and handles are the library's business, not this folder's.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "twin/state/state.hpp"

namespace bulkhead::twin::mig {

// nvmlReturn_t, as far as MIG needs it.
enum Code : int {
  success = 0,
  invalid_argument = 2,
  not_supported = 3,
  no_permission = 4,
  not_found = 6,
  insufficient_size = 7,
  reset_required = 16,
  in_use = 19,
  insufficient_resources = 23,
  unknown_error = 999,
};

// Memory slices of the GPU, or compute slices of a GPU instance.
struct Place {
  std::uint32_t start = 0, size = 0;
  friend bool operator==(const Place&, const Place&) = default;
};

// ---- mode
struct ModeAnswer {
  Code code = success;
  Code activation = success;  // other than success: pending changed, current did not
};
// Ampere changes mode by a reset, which the driver does itself on an idle board of a bare-metal host; in a
// virtual machine it answers RESET_REQUIRED. Hopper and later change at once. Anybody on the GPU: IN_USE.
ModeAnswer set_mode(State& state, std::uint32_t gpu, bool on, bool held = false);  // held: by somebody else
// A GPU reset: instances go, the pending mode becomes the current one. Ampere keeps the mode in its InfoROM.
void reset(State& state, std::uint32_t gpu);
// nvidia.ko unloaded or the host rebooted: instances go; Hopper and later forget the mode as well.
void forget(State& state, std::uint32_t gpu);

// ---- profiles
const MigProfile* profile_by_enum(const State& state, std::uint32_t gpu, std::uint32_t nvml_enum);
const MigProfile* profile_by_id(const State& state, std::uint32_t gpu, std::uint32_t id);

// A compute instance profile inside a GPU instance.
struct ComputeProfile {
  std::uint32_t nvml_enum = 0, id = 0;  // NVML_COMPUTE_INSTANCE_PROFILE_*; nvidia-smi prints the same number
  std::uint32_t slices = 0, max_instances = 0, sm = 0;
};
std::optional<ComputeProfile> compute_profile(const State& state, std::uint32_t gpu,
                                              const GpuInstance& instance, std::uint32_t nvml_enum);
std::vector<Place> compute_places(const MigProfile& of, const ComputeProfile& profile);

// ---- GPU instances
// The swizzid
// of a place: 0 the whole GPU, 1-2 halves, 3-6 quarters, 7-14 eighths.
std::uint32_t instance_id(const Chip& chip, Place place);
// How many more of this profile fit now.
std::uint32_t capacity(const State& state, std::uint32_t gpu, const MigProfile& profile);
// Without `place` the driver's default policy picks. On success `made` is set.
Code create(State& state, std::uint32_t gpu, std::uint32_t profile_id, std::optional<Place> place,
            GpuInstance** made);
Code destroy(State& state, std::uint32_t gpu, std::uint32_t id);
GpuInstance* find(State& state, std::uint32_t gpu, std::uint32_t id);
const GpuInstance* find(const State& state, std::uint32_t gpu, std::uint32_t id);

// ---- compute instances
std::uint32_t compute_capacity(const State& state, std::uint32_t gpu, const GpuInstance& instance,
                               const ComputeProfile& profile);
Code create_compute(State& state, std::uint32_t gpu, GpuInstance& instance, std::uint32_t profile,
                    std::optional<Place> place, ComputeInstance** made);
Code destroy_compute(State& state, std::uint32_t gpu, GpuInstance& instance, std::uint32_t id);

// ---- what follows from them
struct Device {  // a MIG device: a compute instance in its GPU instance
  const GpuInstance* instance = nullptr;
  const ComputeInstance* compute = nullptr;
};
// In NVML's order: by GPU instance id, then compute instance id.
std::vector<Device> devices(const State& state, std::uint32_t gpu);
// The length of that order on this chip (7 on A100 and H100); 0 with MIG off.
std::uint32_t max_devices(const State& state, std::uint32_t gpu);
// Version-5 UUID of (GPU, GPU instance, syspipe): the same slice comes back under the same name (gpu_uuid.c
// of RM).
std::string device_uuid(std::string_view gpu_uuid, std::uint32_t gpu_instance, std::uint32_t pipe);
bool process_on(const State& state, std::uint32_t gpu, std::uint32_t gpu_instance = none,
                std::uint32_t compute_instance = none);

// Minors of /dev/nvidia-caps/nvidia-capN (nv-caps.c of RM). `gpu_minor` is the GPU's device minor, not its
// index.
std::uint32_t cap_minor(std::uint32_t gpu_minor, std::uint32_t gpu_instance);
std::uint32_t cap_minor(std::uint32_t gpu_minor, std::uint32_t gpu_instance, std::uint32_t compute_instance);

// "3g.40gb", or "2c.3g.40gb" when the compute instance does not fill its GPU instance.
std::string device_name(const Chip& chip, const GpuInstance& instance, const ComputeInstance& compute);

}  // namespace bulkhead::twin::mig
