// PCI functions, IOMMU groups and VFIO below a root directory: read into core/passthrough's values, written
// one attribute at a time with the errno kept, and proved by opening a device as a virtual machine monitor
// would. Writes may block for as long as somebody holds a device: callers that must go on make them in a
// process of their own.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.hpp"
#include "base/result.hpp"
#include "core/passthrough/passthrough.hpp"

namespace bulkhead::vfio {

// Every PCI function and group. Holders are left empty: `nodes` names the files to ask for.
Result<passthrough::Tree> read(const std::filesystem::path& root);

// Where a function's device file is, or would be: "/dev/vfio/7", "/dev/vfio/noiommu-7". Errc::not_found: it
// is in no group.
Result<std::string> group_node(const std::filesystem::path& root, const PciAddress& address);
// Its own device file, "/dev/vfio/devices/vfio0"; empty: this kernel makes none, or it is not with VFIO.
std::string device_node(const std::filesystem::path& root, const PciAddress& address);

// The files by which a process may have the function open, whatever driver it has, or had until its unbind
// began to wait. Waits for no lock.
std::vector<std::string> device_nodes(const std::filesystem::path& root, const PciAddress& address);

// ---- one function
bool is_there(const std::filesystem::path& root, const PciAddress& address);
// Its config space reads all ones, twice.
bool is_dead(const std::filesystem::path& root, const PciAddress& address);
// Errc::gone: it is not on the bus.
Result<passthrough::Binding> binding(const std::filesystem::path& root, const PciAddress& address);
// Writes the override, unbinds and probes until the function is bound so, and reads back; what is so already
// is left alone. Driver "*": whichever the kernel has. Errc::gone with ENXIO: unbound, and dead, so that no
// driver takes it. Errc::in_use: it would block on a holder of the VFIO group; nothing was written.
Status set_binding(const std::filesystem::path& root, const PciAddress& address,
                   const passthrough::Binding& wanted);

// Takes its driver away, removes it from the bus, scans the bus anew and waits until it is back: the kernel
// reads its registers again, and forgets its override, autoprobe and virtual functions. One that is missing
// is scanned for alone. Errc::in_use as above; Errc::gone: it did not come back.
Status replug(const std::filesystem::path& root, const PciAddress& address);

// ---- virtual functions
struct VirtualFunctions {
  unsigned count = 0, total = 0;
  bool autoprobe = true;
};
Result<VirtualFunctions> virtual_functions(const std::filesystem::path& root, const PciAddress& physical);
// The number-th; nullopt: it is not made.
Result<std::optional<PciAddress>> virtual_function(const std::filesystem::path& root,
                                                   const PciAddress& physical, unsigned number);
// Through 0 where it must; reads back. The kernel makes fewer than asked without an error: Errc::no_capacity.
Status set_virtual_functions(const std::filesystem::path& root, const PciAddress& physical, unsigned count,
                             bool autoprobe);

// ---- proof
struct Proof {
  bool iommufd = false;  // through its own device file; otherwise through the group's
  bool busy = false;     // a virtual machine has the group open: not opened again
  unsigned regions = 0, msix = 0;
  bool can_reset = false, reset = false;
  bool with_slot = false;      // reset with all functions of its slot, because it has no way of its own
  std::string reset_why = {};  // of a reset that was refused
};
std::string words(const Proof& proof);
// Opens the group, asks whether it is viable, sets the IOMMU, maps and unmaps a page, opens the device,
// counts its MSI-X vectors and resets it; then the same through IOMMUFD where the kernel has it. Errors are
// rows of core/passthrough's table.
Result<Proof> prove(const std::filesystem::path& root, const PciAddress& address);

// ---- the group's device file
// The owner is named as in `spelled` where that is the same user (a number, say).
Result<passthrough::Permission> permission(const std::filesystem::path& root, const PciAddress& address,
                                           std::string_view spelled = {});
Status set_permission(const std::filesystem::path& root, const PciAddress& address,
                      const passthrough::Permission& wanted);

bool module_is_loaded(const std::filesystem::path& root, std::string_view module);

}  // namespace bulkhead::vfio
