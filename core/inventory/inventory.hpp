// What a host has, as observed at one moment. Values only: the engine fills it, everything else reads it.
// What could not be read carries the reason in its Reading.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.hpp"
#include "base/json.hpp"
#include "base/reading.hpp"
#include "base/units.hpp"
#include "core/mig/mig.hpp"

namespace bulkhead::inventory {

// A process that holds a GPU or a slice of it. (pid, start_time) names it for ever; a pid alone does not.
struct Holder {
  int pid = 0;
  std::uint64_t start_time =
      0;                    // clock ticks since boot, field 22 of /proc/PID/stat; 0 when the process is gone
  std::string name = {};    // comm, made printable
  std::string cgroup = {};  // the v2 path, or empty
  Reading<Bytes> memory = {};  // device memory
  std::optional<unsigned> gpu_instance = {};
  std::optional<unsigned> compute_instance = {};
};

struct ComputeInstance {
  unsigned id = 0;
  unsigned profile = 0;       // NVML_COMPUTE_INSTANCE_PROFILE_*
  mig::Placement place = {};  // in compute slices of its GPU instance
  Reading<Uuid> uuid = {};    // of the MIG device it makes: MIG-...
  std::vector<Holder> holders = {};
  Reading<Bytes> memory_used = {};  // of the MIG device; read where one GPU alone is looked at
};

struct GpuInstance {
  unsigned id = 0;
  unsigned profile = 0;   // profile id (19, 14, 9 ...)
  std::string name = {};  // profile name
  mig::Placement place = {};
  std::vector<ComputeInstance> compute = {};
  bool ours = false;  // made by bulkhead on this boot, says the journal; the rest is foreign
  bool busy() const;
  std::vector<Holder> holders() const;  // of all its compute instances
};

struct PciLink {
  double speed_gts = 0;  // GT/s per lane, 32.0 = PCIe 5
  unsigned width = 0;    // lanes
  friend bool operator==(const PciLink&, const PciLink&) = default;
};

struct Bar {
  unsigned index = 0;       // 0..5, 6 the ROM
  std::uint64_t start = 0;  // bus address; 0 when unassigned
  std::uint64_t size = 0;   // bytes; 0 when the kernel gave it no window
  std::uint64_t flags = 0;  // as in the sysfs `resource` file
};

// Any PCI function bulkhead knows something about: GPUs, NVSwitches, their siblings, virtual functions.
struct PciDevice {
  PciAddress address = {};
  std::uint16_t vendor = 0, device = 0, subsystem_vendor = 0, subsystem_device = 0;
  std::uint32_t class_code = 0;  // 0x030200 = 3D controller
  Reading<unsigned> iommu_group = {};
  std::vector<PciAddress> group_siblings = {};  // other members of its group
  Reading<int> numa_node = {};                  // missing when the kernel says -1
  std::string local_cpus = {};                  // list format "0-15"
  Reading<std::string> driver = {};             // missing: no driver is bound
  Reading<PciLink> link_now = {}, link_max = {};
  std::vector<Bar> bars = {};
  bool boot_vga = false;
  Reading<unsigned> vfs_total = {}, vfs_now = {};    // SR-IOV; missing: no such capability
  std::optional<PciAddress> physical_function = {};  // set on a virtual function
};

enum class Pool { exclusive, mig, share, passthrough, broken };
std::string_view name_of(Pool pool);

struct Clocks {
  Megahertz graphics = {}, sm = {}, memory = {};
};

struct Power {
  Reading<Milliwatts> draw = {};   // one-second average
  Reading<Milliwatts> limit = {};  // enforced now
  Reading<Milliwatts> limit_default = {}, limit_min = {}, limit_max = {};
};

struct NvLink {
  unsigned links = 0;  // links the chip has
  unsigned active = 0;
  Reading<std::string> fabric_state = {};   // "completed", "in progress", "not started", "not supported"
  Reading<std::string> fabric_status = {};  // "success" or the driver's error
};

struct EccCounts {
  std::uint64_t corrected = 0, uncorrected = 0;  // volatile: since the last driver load
};

struct Gpu {
  unsigned index = 0;  // NVML index
  Uuid uuid = {};
  std::string model = {};  // "NVIDIA H100 80GB HBM3"
  Reading<std::string> serial = {};
  Reading<unsigned> minor = {};  // /dev/nvidiaN
  PciDevice pci = {};
  Bytes memory = {};  // total; 0 when unread
  Reading<Bytes> memory_used = {};
  Reading<std::string> vbios = {};
  Reading<std::string> compute_capability = {};  // "9.0"
  Reading<bool> persistence = {};
  Reading<Celsius> temperature = {};
  Reading<Celsius> margin = {};  // degrees left to the slowdown point (T.Limit)
  Reading<Celsius> slowdown_at = {}, shutdown_at = {};
  Power power = {};
  Reading<Clocks> clocks = {}, clocks_max = {};
  Reading<std::uint64_t> clock_event_reasons = {};  // bit mask, nvml.h nvmlClocksEventReason*
  Reading<EccCounts> ecc = {};
  Reading<std::string> virtualization = {};  // "none", "pass-through", "vgpu", ...
  NvLink nvlink = {};
  // MIG. `mig_capable` false: the chip has none (mig_why says the driver's words).
  bool mig_capable = false;
  std::string mig_why = {};
  bool mig_now = false, mig_pending = false;
  mig::Geometry geometry = {};  // empty when not MIG capable
  std::vector<GpuInstance> instances = {};
  std::vector<Holder> holders = {};  // processes on the whole GPU (MIG off)
  Pool pool = Pool::exclusive;

  bool busy() const;  // any holder, whole or sliced
  const GpuInstance* instance(unsigned id) const;
};

// A GPU that the PCI bus shows and NVML does not: fell off the bus, driver not bound, held by VFIO.
struct LostGpu {
  PciDevice pci = {};
  std::string why = {};
};

// What a physical function gave one of its functions: Intel's xe, sriov_admin/{pf,vfN}/profile.
struct VirtualShare {
  unsigned number = 0;                     // 0: the physical function itself
  Reading<std::uint64_t> quantum_ms = {};  // its turn of the engines; 0: no limit
  Reading<std::uint64_t> preempt_us = {};  // how long it may take to give them up; 0: no limit
  Reading<std::string> priority = {};      // "low", "normal", "high"
  Reading<Bytes> memory = {};              // quota of device memory; Linux 7.0
};

// A GPU or accelerator that is not NVIDIA's, as its driver shows it in sysfs. bulkhead shows these and gives
// them to virtual machines; it does not partition them.
struct Accelerator {
  PciDevice pci = {};
  std::string maker = {};  // "AMD", "Intel", or the vendor's number
  Reading<std::string> model = {};
  Reading<Bytes> memory = {}, memory_used = {};
  // AMD's amdgpu: "SPX" and "NPS1", and what it could be set to.
  Reading<std::string> compute_partition = {}, memory_partition = {};
  std::vector<std::string> compute_partitions = {}, memory_partitions = {};
  bool shares_set = false;  // Intel's xe: sriov_admin is there, so `shares` can be set
  std::vector<VirtualShare> shares = {};
};
// What it can do, a sentence each.
std::vector<std::string> abilities(const Accelerator& accelerator);

// Large pages of one size that a NUMA node has set aside for those who ask by name.
struct Hugepages {
  Bytes size = {};
  std::uint64_t total = 0, free = 0;
};

struct NumaNode {
  unsigned id = 0;
  std::string cpus = {};  // list format
  Bytes memory = {};
  std::vector<Hugepages> hugepages = {};  // smallest first
};

struct SystemdUnit {
  std::string name = {};
  std::string load_state = {}, active_state = {}, sub_state = {}, file_state = {};  // systemd's words
};

struct Host {
  std::string hostname = {};
  Reading<std::string> os = {};       // PRETTY_NAME
  Reading<std::string> os_id = {};    // ID of os-release: debian, ubuntu, rhel ...
  Reading<std::string> kernel = {};   // release
  Reading<std::string> machine = {};  // "NVIDIA DGXH100", from DMI
  Reading<std::string> cpu_model = {};
  unsigned cpus_online = 0;
  Reading<std::string> cpu_governor = {};  // of all policies, or "mixed"
  std::vector<NumaNode> numa = {};
  Bytes memory = {};
  Reading<std::string> kernel_cmdline = {};
  Reading<std::string> boot_id = {};
  Reading<std::string> driver_version = {};  // NVIDIA kernel driver
  Reading<std::string> cuda_version = {};    // that the driver supports: "13.0"
  std::vector<Gpu> gpus = {};
  std::vector<LostGpu> lost = {};
  std::vector<PciDevice> nvswitches = {};
  std::vector<Accelerator> accelerators = {};  // of other makers
  std::vector<PciDevice> virtual_functions = {};
  std::vector<SystemdUnit> units = {};  // the units bulkhead looks after
  std::vector<std::string> notes = {};  // what could not be read at all, and why
};

Json to_json(const Host& host);

}  // namespace bulkhead::inventory
