// The host below a root directory, as the kernel and firmware tell it: PCI functions, IOMMU groups, NUMA,
// CPUs, memory, DMI, the command line. The root is "/" in production, a directory for the twin and for a
// support bundle. Nothing is cached and nothing decided; every file is read bounded, and what cannot be read
// says why.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.hpp"
#include "base/result.hpp"
#include "core/inventory/inventory.hpp"

namespace bulkhead::sysfs {

inline constexpr std::uint16_t vendor_nvidia = 0x10de, vendor_amd = 0x1002, vendor_intel = 0x8086;

// The first lines of a PCI function: enough to decide whether to read the rest.
struct PciHead {
  PciAddress address = {};
  std::uint16_t vendor = 0;
  std::uint32_t class_code = 0;
  bool is_display() const { return class_code >> 16U == 0x03; }      // VGA, 3D controller
  bool is_accelerator() const { return class_code >> 16U == 0x12; }  // processing accelerator
  bool is_nvswitch() const { return vendor == vendor_nvidia && class_code >> 8U == 0x0680; }
};

// Every PCI function, in address order. Errc::not_found when the host has no PCI bus.
Result<std::vector<PciHead>> pci_heads(const std::filesystem::path& root);

enum class PciDetail {
  full,
  brief,  // ids, class, NUMA node, driver and physical function: a third of the files. The rest says "not
          // asked"
};

// One function.
Result<inventory::PciDevice> pci_device(const std::filesystem::path& root, const PciAddress& address,
                                        PciDetail detail = PciDetail::full);

// What the driver of an accelerator that is not NVIDIA's shows of it, beside its PCI function.
inventory::Accelerator accelerator(const std::filesystem::path& root, inventory::PciDevice pci);

// Fills what the kernel says of the host itself: names, kernel, CPUs, NUMA, memory, command line, boot id,
// governor and the version of a loaded NVIDIA kernel module. Adds notes for what is missing.
void read_host(const std::filesystem::path& root, inventory::Host& host);

Result<std::string> boot_id(const std::filesystem::path& root);

// The minor of the capability file of a GPU instance, or of one of its compute instances, as the driver shows
// it in /proc/driver/nvidia/capabilities: its node is /dev/nvidia-caps/nvidia-capMINOR. `gpu` is the device
// minor of the whole GPU.
Result<unsigned> mig_capability(const std::filesystem::path& root, unsigned gpu, unsigned gpu_instance,
                                std::optional<unsigned> compute_instance);

// The CPU frequency governor, one per policy (a policy is a set of CPUs that change together).
struct Governor {
  std::string policy = {};  // "policy0"
  std::string now = {};     // "performance"
  std::vector<std::string> offered = {};
};
// Errc::unsupported when the kernel drives no CPU frequency (a virtual machine, most often).
Result<std::vector<Governor>> governors(const std::filesystem::path& root);
// Writes the governor of one policy and reads it back.
Status set_governor(const std::filesystem::path& root, std::string_view policy, std::string_view governor);

}  // namespace bulkhead::sysfs
