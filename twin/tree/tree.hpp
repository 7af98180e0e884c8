// The pretend host's files: /sys, /proc, /etc, /dev, /boot, /var below one directory, made from a Host and a
// State. Production code reads them there with --root; `twin run` mounts them over the real ones for programs
// that know no --root. Symbolic links are relative, so the tree works wherever it lies.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "twin/state/state.hpp"

namespace bulkhead::twin {

struct BarSpec {
  unsigned index = 0;       // 0..5, 6 the ROM
  std::uint64_t size = 0;   // bytes; a power of two
  std::uint64_t flags = 0;  // as in the sysfs `resource` file
  std::uint64_t start = 0;  // bus address; 0: the tree places it
};

// A PCI function of the pretend host. What it is comes from profiles/devices.yaml or the chip file.
struct PciFunction {
  std::uint32_t domain = 0, bus = 0, device = 0, function = 0;
  std::string type = {};     // "gpu", or the row in devices.yaml
  std::uint32_t gpu = none;  // index into State::gpus
  std::uint16_t vendor = 0, device_id = 0, subsystem_vendor = 0, subsystem_device = 0;
  std::uint32_t class_code = 0;
  std::uint8_t revision = 0;
  int parent = -1;  // index of the bridge above it; -1: on the root bus
  bool is_bridge = false;
  int numa = -1;
  int iommu_group = -1;     // -1: none
  std::string driver = {};  // bound kernel driver; empty: none
  std::vector<BarSpec> bars = {};
  unsigned link_generation = 0, link_width = 0;  // 0: no PCI Express link; what it can
  unsigned link_generation_now = 0, link_width_now = 0;
  unsigned vfs_total = 0;         // SR-IOV capability; 0: none
  std::string reset_method = {};  // "flr bus"; empty: the file is not there
  // Files that its driver adds to its folder: {"sriov_admin/pf/profile/exec_quantum_ms", "0"}
  std::vector<std::pair<std::string, std::string>> attributes = {};
  unsigned irq = 0;
  unsigned slot = 0;  // physical slot number for SMBIOS type 9; 0: none
};

struct Cpu {
  std::string vendor = {}, model = {}, flags = {}, microcode = {};
  unsigned family = 0, model_number = 0, stepping = 0;
  unsigned sockets = 1, cores_per_socket = 1, threads_per_core = 1;
  unsigned mhz_min = 0, mhz_max = 0, mhz_base = 0;
  std::string governor = {}, cpufreq_driver = {};  // empty driver: no cpufreq (virtual machines)
  std::vector<std::string> governors = {};
  unsigned l1d_kib = 0, l1i_kib = 0, l2_kib = 0, l3_kib = 0;  // L3 per socket
};

struct KernelModule {
  std::string name = {};
  std::uint64_t size = 0;
  unsigned used = 0;
  std::vector<std::string> by = {};
};

// Everything of the host that no State field tells. From the profile.
struct Host {
  std::string hostname = {};
  std::string os_id = {}, os_version = {}, os_codename = {}, os_pretty = {};
  std::string kernel_release = {}, kernel_version = {}, cmdline = {};
  std::string nvidia_module_license = {};  // "Dual MIT/GPL": the open kernel modules
  std::vector<std::pair<std::string, std::string>> nvidia_parameters = {};  // /proc/driver/nvidia/params
  Cpu cpu = {};
  std::vector<std::uint64_t> numa_memory_kib = {};  // a node each
  std::uint64_t memory_available_kib = 0;           // 0: most of it
  bool virtual_machine = false;
  std::string bios_vendor = {}, bios_version = {}, bios_date = {};
  std::string system_vendor = {}, product_name = {}, product_version = {}, board_vendor = {}, board_name = {};
  unsigned chassis_type = 23;   // SMBIOS type 3: 23 rack mount chassis, 1 other
  std::string iommu = {};       // "intel", "amd", or empty: no IOMMU
  std::string iommu_type = {};  // of the groups' default domain: DMA, DMA-FQ, identity
  bool interrupt_remapping = false;
  std::vector<KernelModule> modules = {};
  std::vector<PciFunction> pci = {};
  std::vector<std::pair<std::string, std::string>> files =
      {};  // path below the root -> content, as the profile says
};

// Makes the whole tree below `root`, which must be empty or not there.
Status make_tree(const std::filesystem::path& root, const Host& host, const State& state);

// Brings what follows the State up to date: capabilities of GPU and compute instances, lost devices,
// processes. Called by libnvidia-ml.so.1 after each MIG change and by `twin` verbs; light, and safe to run
// concurrently.
Status refresh_tree(const std::filesystem::path& root, const State& state);

// Appends the kernel's line of an XID to var/log/kern.log and dev/kmsg, as the driver prints it.
Status log_xid(const std::filesystem::path& root, const State& state, const Event& event);

}  // namespace bulkhead::twin
