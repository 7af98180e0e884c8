// The twin's world in one shared file: what the simulated driver, boards and processes are at this moment.
// Every nvidia-smi call is a new process, so nothing may live anywhere else. Plain data only: no pointers,
// fixed bounds.
//
// The file holds two copies of State and the number of the current one. A writer takes the lock, copies the
// current one over the other, changes that, and flips the number with one atomic store: a process killed at
// any instruction leaves the old state or the new one. The lock is an open-file-description lock, which the
// kernel releases with its holder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string_view>

#include "base/result.hpp"

namespace bulkhead::twin {

inline constexpr std::uint32_t state_version = 1;
inline constexpr std::size_t max_gpus = 16;
inline constexpr std::size_t max_chips = 4;
inline constexpr std::size_t max_gpu_instances = 8;      // KMIGMGR_MAX_GPU_INSTANCES
inline constexpr std::size_t max_compute_instances = 8;  // KMIGMGR_MAX_COMPUTE_INSTANCES
inline constexpr std::size_t max_processes = 256;
inline constexpr std::size_t max_events = 256;
inline constexpr std::size_t max_faults = 32;
inline constexpr std::size_t max_profiles = 16;
inline constexpr std::size_t max_fields = 320;
inline constexpr std::size_t max_nvlinks = 18;
inline constexpr std::size_t max_units = 16;
inline constexpr std::uint32_t none = 0xffffffffU;  // "no gpu", "no instance"

template <std::size_t N>
struct Text {  // a NUL-terminated string of bounded length
  char bytes[N] = {};
  std::string_view view() const { return std::string_view(bytes); }
  void set(std::string_view text) {
    const std::size_t n = text.size() < N - 1 ? text.size() : N - 1;
    for (std::size_t i = 0; i < n; ++i) bytes[i] = text[i];
    for (std::size_t i = n; i < N; ++i) bytes[i] = '\0';
  }
};

// ---- what a chip is: constants, from the profile's YAML, compiled in by `twin up`
struct MigProfile {
  Text<32> name;  // "1g.10gb+me"
  std::uint32_t nvml_enum, id, slices, max_instances, memory_mib, sm, ce, dec, enc, jpg, ofa;
  std::uint32_t start_count, starts[16], size;  // placements, memory slices
};

// A recorded answer of nvmlDeviceGetFieldValues, for fields that the physics does not compute.
struct FieldAnswer {
  std::uint32_t id, nvml_return, value_type;  // nvmlReturn_t, nvmlValueType_t
  std::uint64_t bits;                         // the union's bytes
};

enum class MigActivation : std::uint32_t {
  unsupported,
  needs_reset,
  immediate
};  // none; Ampere; Hopper and later
enum class PlacementPolicy : std::uint32_t { most_pairs_left, most_ids_left };  // mig-geometry.yaml, gi_ids

struct Chip {
  Text<96> model;
  std::uint32_t architecture, brand;  // nvmlDeviceArchitecture_t, nvmlBrandType_t
  std::uint32_t cc_major, cc_minor, cores;
  std::uint32_t pci_device, pci_subsystem;  // as NVML: device << 16 | vendor
  std::uint64_t memory_bytes, reserved_bytes, bar1_bytes;
  std::uint32_t memory_bus_bits, pcie_gen, pcie_width;
  Text<32> vbios, inforom_image, inforom_oem, inforom_ecc, inforom_power, board_part, gpu_part;
  MigActivation mig;
  PlacementPolicy placement_policy;
  std::uint32_t memory_slices, compute_slices, profile_count;
  MigProfile profiles[max_profiles];
  // Power and heat. Two thermal nodes: die and heat sink.
  std::uint32_t power_idle_mw, power_default_mw, power_min_mw, power_max_mw;
  std::int32_t threshold_shutdown, threshold_slowdown, threshold_mem_max,
      threshold_gpu_max;                         // C; 0 = not supported
  std::int32_t tlimit_zero_at;                   // GPU temperature at which the margin (T.Limit) reads 0
  double r_die_sink, r_sink_air, c_die, c_sink;  // K/W, K/W, J/K, J/K
  std::uint32_t clock_graphics_max, clock_graphics_min, clock_graphics_step, clock_graphics_idle;  // MHz
  std::uint32_t clock_memory[4], clock_memory_count, clock_video_max;
  std::uint32_t nvlinks, nvlink_version, fan_count;
  std::uint32_t row_remap_banks;     // nvmlRowRemapperHistogramValues_t.max of a healthy part; 0: unknown
  std::uint32_t memory_temperature;  // 1: field 82 answers
  std::uint32_t field_count;
  FieldAnswer fields[max_fields];
};

// ---- what changes -----------------------------------------------------------------------------------------
struct ComputeInstance {
  std::uint32_t used, id, profile, start,
      size;            // profile: NVML_COMPUTE_INSTANCE_PROFILE_*; compute slices of the GI
  Text<64> uuid;       // MIG-...
  std::uint64_t born;  // Gpu::generation that made it: tells it from a later namesake
};

struct GpuInstance {
  std::uint32_t used, id, profile_id, start, size;  // id is the swizzid; memory slices
  std::uint32_t half_made;                          // a fault: refuses everything but destroy
  std::uint64_t born;                               // as of a compute instance
  ComputeInstance compute[max_compute_instances];
};

struct Gpu {
  std::uint32_t chip;  // index into State::chips
  Text<64> uuid;
  Text<32> serial;
  std::uint32_t pci_domain, pci_bus, pci_device, minor, module, numa_node, irq;
  std::uint32_t on_pci, in_nvml;  // faults take these away one by one
  std::uint32_t mig_current, mig_pending, persistence, compute_mode, accounting;
  std::uint32_t ecc_current, ecc_pending;
  std::uint32_t power_limit_mw;
  std::uint32_t clock_lock_low, clock_lock_high;  // 0, 0: not locked
  std::uint32_t memory_lock_low, memory_lock_high;
  std::uint32_t app_clock_graphics, app_clock_memory;
  std::uint32_t fabric_state;   // NVML_GPU_FABRIC_STATE_*
  std::uint32_t fabric_status;  // nvmlReturn_t
  std::uint32_t nvlink_active[max_nvlinks];
  std::uint64_t generation;  // counts MIG changes and resets: handles older than it are stale
  GpuInstance instances[max_gpu_instances];
  // Physics. `asked_*` is what `twin load` wants; the rest is what it makes of it.
  double asked_busy;                            // 0..1 beyond what processes ask
  double asked_watts;                           // < 0: let `busy` decide
  double temperature, sink_temperature, inlet;  // C
  double watts, watts_average;                  // instant; one-second average
  double energy_mj;                             // since driver load
  double clock_graphics, clock_memory;          // MHz
  double busy;                                  // 0..1, smoothed utilisation
  std::uint64_t clock_reasons;                  // nvmlClocksEventReason bits now
  std::uint64_t ns_power_cap, ns_sw_thermal, ns_hw_thermal, ns_power_brake, ns_sync_boost;
  std::uint64_t ecc_corrected, ecc_uncorrected, ecc_corrected_total, ecc_uncorrected_total;
  std::uint64_t remapped_correctable, remapped_uncorrectable, remap_pending, remap_failed;
  std::uint64_t pcie_replays, nvlink_crc_errors[max_nvlinks];
};

struct Process {
  std::uint32_t used, pid, gpu, gpu_instance, compute_instance;  // instances: none when MIG is off
  std::uint32_t graphics;                                        // 1: a graphics client
  std::uint64_t start_time;  // clock ticks since boot; 0 for a pid that is only simulated
  std::uint64_t memory_bytes;
  double busy;  // 0..1 of its slice
  Text<64> name;
};

struct Event {  // an XID on its way to event sets and the kernel log
  std::uint64_t sequence, time_ns;
  std::uint32_t gpu, xid, pid, gpu_instance, compute_instance;
  Text<64> process;
};

enum class FaultKind : std::uint32_t {
  nothing,
  fail_call,
  hang_call,
  kill_before,
  kill_after,
  slow_destroy,
  half_made_gi,
  lost_from_nvml,
  off_the_bus,
  fabric_lost,
  no_systemd,
  ignores_slices,   // the driver accepts time slices and runs its own
  ignores_disable,  // the driver accepts DISABLE_CHANNELS and disables nothing
  failed_fan,       // less air over the board; a fan of the host's sensors stands still
  power_brake,      // the rack or a supply asserts the board's brake pin
  sagging_rail,     // 12 V as the host's sensors see it
  link_errors,      // NVLink is busy, and of a million flits `code` arrive damaged
  other_clients,    // MIG mode stays pending while another process has NVML open, as on a board
  computes_wrong    // the multiprocessor `code` answers one bit wrong, without a word in any log
};

struct Fault {
  FaultKind kind;
  std::uint32_t gpu;  // none: any
  Text<64> function;  // NVML entry point, for the *_call and kill_* kinds
  std::int32_t code;  // nvmlReturn_t to answer; link_errors: of a million flits; computes_wrong: multiprocessor
  std::uint64_t delay_ms;
  std::uint32_t remaining;  // times left; none: for ever
};

struct Unit {  // a systemd unit of the simulated host
  Text<64> name;
  Text<96> description;
  std::uint32_t used, loaded, enabled, active, failed;
};

struct State {
  std::uint32_t version, gpu_count, chip_count, nvswitch_count;
  std::uint32_t realtime;    // 1: the clock follows the host's; 0: it moves by `twin step` only
  std::uint32_t caps_major;  // char major of nvidia-caps
  std::uint64_t seed, boot_time_ns, now_ns, last_step_host_ns;  // now_ns: simulated time since boot
  std::uint64_t next_event;                                     // sequence of the next event
  Text<32> profile, driver_version, nvml_version;
  Text<48> boot_id;
  std::uint32_t cuda_version;    // 13000
  std::uint32_t virtualization;  // nvmlGpuVirtualizationMode_t of every GPU: 0 bare metal, 1 pass-through
  std::uint32_t driver_loaded;   // 0: nvidia.ko is not loaded, nvmlInit answers DRIVER_NOT_LOADED
  Chip chips[max_chips];
  Gpu gpus[max_gpus];
  Process processes[max_processes];
  Event events[max_events];  // ring by sequence
  Fault faults[max_faults];
  Unit units[max_units];
};

// A lock between open file descriptions, so that threads that share one need a mutex as well. F_RDLCK and
// F_WRLCK wait for it, F_UNLCK gives it back. False: errno says why.
bool set_lock(int fd, short type);

class StateFile {
 public:
  static Status create(const std::filesystem::path& path, const State& state);  // replaces atomically
  static Result<std::unique_ptr<StateFile>> open(const std::filesystem::path& path);
  ~StateFile();
  StateFile(const StateFile&) = delete;
  StateFile& operator=(const StateFile&) = delete;

  // Calls `look` with the current state, under the shared lock.
  void read(const std::function<void(const State&)>& look) const;
  // Calls `change` with a copy under the exclusive lock; commits it when `change` returns true.
  bool write(const std::function<bool(State&)>& change);

 private:
  StateFile() = default;
  struct Mapped;
  std::unique_ptr<Mapped> mapped_;
};

}  // namespace bulkhead::twin
