// The NVIDIA driver's management library, dlopen'ed through one symbol table: a missing symbol is
// `unsupported`, never a crash. Methods are thin: one question or one command each, errors translated,
// nothing chosen. Outside text is made printable and bounded here. Handles carry the generation of the
// instances they came from; after any MIG change they are asked for again.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/ids.hpp"
#include "base/reading.hpp"
#include "base/result.hpp"
#include "base/units.hpp"
#include "core/mig/mig.hpp"

namespace bulkhead::nvml {

// A GPU as NVML knows it in this process. Cheap to copy; valid while its Nvml lives.
struct Device {
  void* handle = nullptr;
  unsigned index = 0;
};

struct MigMode {
  bool now = false, pending = false;
};

// nvmlDeviceSetMigMode's two answers: accepted, and in force already or why not.
struct Activation {
  bool in_force = true;
  int code = 0;  // nvmlReturn_t of the activation: IN_USE, RESET_REQUIRED ...
  std::string why = {};
};

struct ComputeInstance {
  unsigned id = 0, profile = 0;
  mig::Placement place = {};  // compute slices of the GPU instance
};

struct GpuInstance {
  unsigned id = 0, profile_id = 0;
  mig::Placement place = {};
  std::vector<ComputeInstance> compute = {};
};

struct ProcessEntry {
  int pid = 0;
  Reading<Bytes> memory = {};
  std::optional<unsigned> gpu_instance = {}, compute_instance = {};
};

// How much of a GPU's time a process had since the sample before: the driver's own sampling, some times a
// second.
struct ProcessBusy {
  int pid = 0;
  unsigned sm_percent = 0;
  std::uint64_t timestamp_us = 0;
};

struct Memory {
  Bytes total = {}, used = {};  // used includes what the driver keeps for itself
};

struct Clocks {
  Megahertz graphics = {}, sm = {}, memory = {};
};

// What one batched call answers (nvmlDeviceGetFieldValues), with single calls only for what the batch
// refused.
struct Sensors {
  Reading<Milliwatts> power_average = {};  // one second
  Reading<Milliwatts> limit = {}, limit_default = {}, limit_min = {}, limit_max = {};
  Reading<std::uint64_t> ecc_corrected = {}, ecc_uncorrected = {};  // volatile
  std::optional<unsigned> nvlinks = {};  // how many the chip has; empty: the batch does not say
};

struct NvLinks {
  unsigned links = 0, active = 0;
};

struct Fabric {
  std::string state = {};            // "completed", "in progress", "not started", "not supported"
  Reading<std::string> status = {};  // once completed: "success" or the driver's words
};

// A MIG device: what a compute instance looks like to CUDA.
struct MigDevice {
  unsigned gpu_instance = 0, compute_instance = 0;
  Uuid uuid = {};
  Reading<Bytes> used = {};  // of its memory; where asked for
  void* handle = nullptr;    // for memory(); valid until the next MIG change, and an error after it
};

struct Utilization {  // percent of the driver's last sampling period; no such thing with MIG on
  unsigned gpu = 0, memory = 0;
};

// One of a batch that the driver answers in one call (nvmlDeviceGetFieldValues); ids are nvml.h's
// NVML_FI_DEV_*. What a field costs differs by a factor of a thousand: docs/design/telemetry.md.
struct Field {
  unsigned id = 0, scope = 0;
  std::optional<double> number = {};  // as the driver typed it
  std::uint64_t count = 0;            // the same, where it is a whole number that is not negative
  std::optional<Errc> refused = {};   // why there is none
};

// One of the metrics between two GPM samples (nvmlGpmMetricsGet); ids are nvml.h's NVML_GPM_METRIC_*.
struct Metric {
  unsigned id = 0;
  std::optional<double> value = {};  // percent, or MiB/s
};

class Nvml;
// What nvmlGpmSampleGet fills: the counters of a GPU or of an instance at one moment. Must go before its
// Nvml.
class GpmSample {
 public:
  GpmSample() = default;
  ~GpmSample();
  GpmSample(GpmSample&& other) noexcept;
  GpmSample& operator=(GpmSample&& other) noexcept;
  explicit operator bool() const { return handle_ != nullptr; }

 private:
  friend class Nvml;
  Nvml* owner_ = nullptr;
  void* handle_ = nullptr;
};

// The driver call that this process is in.
struct CallInFlight {
  const char* function = "";
  std::optional<unsigned> gpu = {};  // its index, when the call is about a GPU that was asked for by index
  std::uint64_t since_ns = 0;        // monotonic_ns()
};
// May be asked from any thread: a watchdog asks while another thread hangs. Of several threads that call the
// driver at once, the last to begin.
std::optional<CallInFlight> call_in_flight();

// The price of asking, per driver function.
struct CallCost {
  std::string function = {};
  std::uint64_t calls = 0, nanoseconds = 0;
};

class Nvml {
 public:
  // Opens and initialises. `library` empty: libnvidia-ml.so.1 by the loader's rules.
  static Result<std::unique_ptr<Nvml>> open(const std::string& library);
  ~Nvml();
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  Result<std::string> driver_version();
  Result<std::string> cuda_version();     // "13.0"
  Result<std::vector<Device>> devices();  // those NVML can open, in index order
  Result<unsigned> device_count();
  Result<Device> device(unsigned index);
  Result<Device> device(const Uuid& uuid);  // of the whole GPU

  Result<Uuid> uuid(Device);
  Result<std::string> name(Device);
  Result<PciAddress> pci_address(Device);
  Result<std::string> serial(Device);
  Result<std::string> vbios(Device);
  Result<std::string> compute_capability(Device);  // "9.0"
  Result<unsigned> minor(Device);                  // /dev/nvidiaN
  Result<Memory> memory(Device);
  Result<Celsius> temperature(Device);  // of the die
  Result<Celsius> margin(Device);       // degrees left to slowdown (T.Limit); Ada, Hopper and later
  Result<Celsius> slowdown_at(Device);
  Result<Celsius> shutdown_at(Device);
  Result<Clocks> clocks(Device);
  Result<Clocks> clocks_max(Device);
  Result<std::uint64_t> clock_event_reasons(Device);
  Result<std::string> virtualization(Device);  // "none", "pass-through", "vgpu", "host-vgpu", "host-vsga"
  Result<Sensors> sensors(Device);
  Result<NvLinks> nvlinks(Device, std::optional<unsigned> count);  // count: what sensors() said
  Result<Utilization> utilization(Device);
  // Fills in what came; an Error means that none did. At most 64 at once.
  Status fields(Device, std::span<Field> batch);

  // ---- GPM: how busy the parts of a Hopper and later are, of the whole GPU or of one GPU instance
  Result<bool> gpm_supported(Device);
  Result<GpmSample> gpm_sample();
  // Errc::not_found, invalid: the instance is gone.
  Status gpm_take(Device, std::optional<unsigned> gpu_instance, GpmSample& into);
  // Between two samples of the same thing, at least 100 ms apart. At most 64 at once.
  Status gpm_metrics(const GpmSample& before, const GpmSample& after, std::span<Metric> metrics);
  Result<Fabric> fabric(Device);
  Result<std::string> process_name(int pid);  // as the driver knows it, for pids of other namespaces

  // ---- MIG
  Result<MigMode> mig_mode(Device);        // unsupported: the chip has none
  Result<mig::Geometry> geometry(Device);  // answers with MIG off as well
  // `only` asks for one profile alone: a fraction of the calls.
  Result<std::vector<GpuInstance>> instances(Device, std::optional<unsigned> only = {});
  // Says that `device` is the same board as `like`: what cannot differ (MIG profiles) is asked of one of
  // them.
  void alike(Device device, Device like);
  // One instance by its id, without its compute instances: two calls. Errc::not_found: it is not there.
  Result<GpuInstance> instance(Device, unsigned id);
  // How many compute instances of this profile the instance holds.
  Result<unsigned> compute_count(Device, unsigned gpu_instance, unsigned compute_profile);
  // Compute, graphics and MPS clients of the GPU and of all its instances, each pid and instance once.
  Result<std::vector<ProcessEntry>> processes(Device);
  // Samples newer than `since_us`. Errc::not_found: none yet. Errc::unsupported: MIG, or an old chip.
  Result<std::vector<ProcessBusy>> process_utilization(Device, std::uint64_t since_us);
  // Only compute instances appear; `expected` (how many there are) saves asking on after the last one.
  Result<std::vector<MigDevice>> mig_devices(Device, std::size_t expected, bool with_memory = false);
  Result<Activation> set_mig_mode(Device, bool on);
  Result<GpuInstance> create_instance(Device, unsigned profile_id, mig::Placement place);
  Result<ComputeInstance> create_compute(Device, unsigned gpu_instance,
                                         unsigned compute_slices);  // 0: fills it
  // As create_compute, but answers the profile it took and leaves reading back to the caller.
  Result<unsigned> add_compute(Device, unsigned gpu_instance, unsigned compute_slices);
  Status destroy_compute(Device, unsigned gpu_instance, unsigned compute_instance);
  Status destroy_compute_of(Device, unsigned gpu_instance, unsigned compute_profile);  // all of that profile
  Status destroy_instance(Device, unsigned gpu_instance);

  // ---- settings
  Result<bool> persistence(Device);
  Status set_persistence(Device, bool on);
  Result<Milliwatts> power_limit(Device);
  Status set_power_limit(Device, Milliwatts limit);
  Status lock_clocks(Device, Megahertz low, Megahertz high);
  Status unlock_clocks(Device);

  // The call that a thread is in through this object; may be asked from any other.
  std::optional<CallInFlight> in_flight() const;

  // How many driver calls were made, by name or in all: for benchmarks and the cost of a plan.
  std::uint64_t calls() const;
  std::vector<CallCost> costs() const;  // functions called at least once, dearest first

 private:
  friend class GpmSample;
  Nvml();
  struct Table;
  std::unique_ptr<Table> table_;
};

}  // namespace bulkhead::nvml
