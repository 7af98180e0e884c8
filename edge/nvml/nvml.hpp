// The NVIDIA driver's management library, dlopen'ed through one symbol table: a missing symbol is `unsupported`,
// never a crash. Methods are thin: one question or one command each, errors translated, nothing chosen. Outside
// text is made printable and bounded here. Handles carry the generation of the instances they came from; after
// any MIG change they are asked for again.
#pragma once

#include <cstdint>
#include <memory>
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
  int code = 0;            // nvmlReturn_t of the activation: IN_USE, RESET_REQUIRED ...
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

class Nvml {
 public:
  // Opens and initialises. `library` empty: libnvidia-ml.so.1 by the loader's rules.
  static Result<std::unique_ptr<Nvml>> open(const std::string& library);
  ~Nvml();
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  Result<std::string> driver_version();
  Result<std::string> cuda_version();   // "13.0"
  Result<std::vector<Device>> devices();            // those NVML can open, in index order
  Result<unsigned> device_count();
  Result<Device> device(unsigned index);
  Result<Device> device(const Uuid& uuid);          // of the whole GPU

  Result<Uuid> uuid(Device);
  Result<std::string> name(Device);
  Result<PciAddress> pci_address(Device);
  // ... further readings of a GPU for the inventory, one method each (see nvml.cpp's table)

  // ---- MIG
  Result<MigMode> mig_mode(Device);                 // unsupported: the chip has none
  Result<mig::Geometry> geometry(Device);           // answers with MIG off as well
  Result<std::vector<GpuInstance>> instances(Device);
  Result<std::vector<ProcessEntry>> processes(Device);
  Result<Activation> set_mig_mode(Device, bool on);
  Result<GpuInstance> create_instance(Device, unsigned profile_id, mig::Placement place);
  Result<ComputeInstance> create_compute(Device, unsigned gpu_instance, unsigned compute_slices);  // 0: fills it
  Status destroy_compute(Device, unsigned gpu_instance, unsigned compute_instance);
  Status destroy_instance(Device, unsigned gpu_instance);

  // ---- settings
  Result<bool> persistence(Device);
  Status set_persistence(Device, bool on);
  Result<Milliwatts> power_limit(Device);
  Status set_power_limit(Device, Milliwatts limit);
  Status lock_clocks(Device, Megahertz low, Megahertz high);
  Status unlock_clocks(Device);

  // How many driver calls were made, by name or in all: for benchmarks and the cost of a plan.
  std::uint64_t calls() const;

 private:
  Nvml();
  struct Table;
  std::unique_ptr<Table> table_;
};

}  // namespace bulkhead::nvml
