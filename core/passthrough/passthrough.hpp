// Handing whole PCI devices and virtual functions to virtual machines, as values: what the bus and the IOMMU
// groups look like, what stands in the way, what has to be done in which order, and what each errno of the
// kernel's files means. Pure; edge/vfio reads and writes, core/plan journals.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/ids.hpp"
#include "base/result.hpp"
#include "base/units.hpp"
#include "core/inventory/inventory.hpp"

namespace bulkhead::passthrough {

inline constexpr std::string_view vfio_driver = "vfio-pci";
// What VFIO needs, by the kernel's names below /sys/module.
inline constexpr std::string_view vfio_modules[] = {"vfio_pci", "vfio_iommu_type1"};

// ---- what there is

struct Function {
  PciAddress address = {};
  std::uint16_t vendor = 0, device = 0;
  std::uint32_t class_code = 0;      // 0x030200 = 3D controller
  std::string driver = {};           // empty: none is bound
  std::string driver_override = {};  // empty: none
  std::optional<unsigned> group = {};
  std::optional<PciAddress> physical = {};  // set on a virtual function
  std::optional<unsigned> vfs_total = {};   // missing: no SR-IOV
  unsigned vfs_now = 0;
  bool autoprobe = true;                           // the host's drivers take new virtual functions at once
  std::vector<PciAddress> virtual_functions = {};  // by their number
  std::optional<unsigned> numa_node = {};          // missing: the firmware names none
  std::string local_cpus = {};                     // list format: those near it
  bool boot_vga = false;                           // the display that the firmware started on
  std::vector<unsigned> bars_without_room = {};    // BARs the kernel found no address for
  std::vector<std::string> uses = {};   // what the host itself does with it: "mounted on /", "swap"
  std::vector<std::string> nodes = {};  // device files: who has one open uses it
  std::vector<inventory::Holder> holders = {};
  // Of PCI buses and the host; an NVSwitch (0680) is a device.
  bool is_bridge() const {
    const auto kind = class_code >> 8U;
    return kind == 0x0600 || kind == 0x0604 || kind == 0x0609;
  }
  bool with_vfio() const { return driver.starts_with("vfio"); }
};

struct Group {
  unsigned number = 0;
  std::string type = {};  // "DMA", "DMA-FQ", "identity"
  bool noiommu = false;   // made without an IOMMU: isolates nothing
};

struct Tree {
  std::vector<Function> functions = {};  // in address order
  std::vector<Group> groups = {};
  std::vector<std::string> modules_missing = {};  // of vfio_modules
  bool firmware_table = false;                    // ACPI DMAR or IVRS: the firmware offers an IOMMU
  std::optional<unsigned> fabric_mode = {};       // FABRIC_MODE of the Fabric Manager's configuration

  const Function* find(const PciAddress& address) const;
  std::vector<const Function*> members(unsigned group) const;
};

// A function, or the vf-th virtual function of one: before it is made it has no address.
struct Target {
  PciAddress function = {};
  std::optional<unsigned> vf = {};
  friend auto operator<=>(const Target&, const Target&) = default;
};
std::string str(const Target& target);  // "0000:01:00.0", "0000:01:00.0 VF 2"
// Its address now; nullopt: a virtual function that is not made.
std::optional<PciAddress> resolve(const Tree& tree, const Target& target);

// ---- what is done: each holds the state before and after, so that its undo is a swap
struct LoadModules {
  std::vector<std::string> modules = {};
  bool before = false, after = true;
};
struct SetVirtualFunctions {
  PciAddress physical = {};
  unsigned before = 0, after = 0;
  bool autoprobe_before = true, autoprobe_after = false;
};
struct Binding {
  std::string driver = {};           // empty: none; "*": whichever the kernel has for it, VFIO's excepted
  std::string driver_override = {};  // empty: none
  friend bool operator==(const Binding&, const Binding&) = default;
};
struct SetDriver {
  Target target = {};
  Binding before = {}, after = {};
};
struct Permission {
  std::string owner = "root";  // of the host's /etc/passwd
  unsigned mode = 0600;
  friend bool operator==(const Permission&, const Permission&) = default;
};
struct SetPermission {  // of the group's device file, which is made anew at each bind
  Target target = {};
  Permission before = {}, after = {};
};
struct Prove {  // opens it as a virtual machine monitor would; changes nothing
  Target target = {};
  bool forget = false;  // the undo: nothing is proved any more
};
using Deed = std::variant<LoadModules, SetVirtualFunctions, SetDriver, SetPermission, Prove>;

struct Ordered {
  Deed deed = {};
  std::string why = {};
  std::vector<inventory::Holder> evicts = {};
};

// ---- what is wanted
enum class Purpose {
  leave,  // of the function itself: as it is (the host's, beside its virtual functions)
  virtual_machine,
  host,
};
struct Wanted {
  PciAddress address = {};
  // With `vfs`, it is what the virtual functions are for; the physical function stays with the host.
  Purpose purpose = Purpose::virtual_machine;
  std::optional<unsigned> vfs = {};
  std::string label = {};  // "gpu 3", for words; empty: the address alone
};
struct Original {  // what a function had before bulkhead gave it away, from the journal
  Target target = {};
  Binding binding = {};
};
struct Wishes {
  std::vector<Wanted> devices = {};
  std::optional<Permission> permission = {};
  std::vector<Target> proved = {};  // on this boot, and bound ever since
  std::vector<Original> originals = {};
  bool evict = false;
};

// ---- what stands in the way
enum class Hindrance {
  no_such_function,
  no_group,      // the IOMMU is off, or there is none
  no_isolation,  // a no-IOMMU group
  stranger,      // somebody else's device in the group
  bridge,        // a bridge in the group with a driver that does DMA
  boot_display,
  host_uses,       // a mounted file system, swap, the default route
  held,            // processes
  live_functions,  // a physical function with virtual functions
  no_sriov,
  too_many,
  no_host_driver,  // a physical function that cannot make virtual ones
  no_room,         // a BAR without an address
  fabric,          // an NVSwitch system in the wrong fabric mode
  asked_twice,
};
struct Obstacle {
  Hindrance hindrance = {};
  std::string subject = {};
  std::string why = {};
  std::vector<inventory::Holder> holders = {};
  std::string way_out = {};
};

struct Order {
  std::vector<Ordered> deeds = {};
  std::vector<std::string> notes = {};
};
// All obstacles at once, or the deeds in order; none when everything is as wanted.
std::variant<Order, std::vector<Obstacle>> order(const Tree& tree, const Wishes& wishes);

// ---- the kernel's answers
enum class File {
  driver_override,
  unbind,
  drivers_probe,
  bind,
  sriov_numvfs,
  sriov_autoprobe,
  remove,
  rescan,
  reset,
  reset_method,
  group_type,
  resource_resize,
  vfio_node,     // open /dev/vfio/vfio
  group_node,    // open /dev/vfio/N
  group_status,  // VFIO_GROUP_GET_STATUS; EBUSY stands for "not viable"
  set_container,
  set_iommu,
  map_dma,
  unmap_dma,
  get_device,
  get_irq,
  device_reset,
  cdev,        // open /dev/vfio/devices/vfioN
  iommu_node,  // open /dev/iommu
  bind_iommufd,
  ioas,
  attach,
};
std::string_view name_of(File file);

struct Cause {
  File file = {};
  int err = 0;  // 0: the write succeeded, and what reads back is not what was asked
  std::string_view cause = {};
  std::string_view mend = {};
};
std::span<const Cause> causes();
const Cause* cause_of(File file, int err);
std::string errno_name(int err);  // "EBUSY"
// "0000:01:00.0: unbind: EBUSY: cause", with the mend as its hint. An errno the table lacks keeps its name.
Error refused(File file, int err, std::string_view what);
// ---- libvirt
struct Machine {
  std::string name = {};
  Bytes memory = {};
  unsigned vcpus = 1;
  std::string cpus = {};              // list format: those near the device; empty: not pinned
  std::optional<unsigned> node = {};  // NUMA node of the device; missing: unknown, so memory is not bound
  bool hugepages = true;
  std::vector<PciAddress> devices = {};
};
// A domain that libvirt defines; `managed='no'`.
std::string domain_xml(const Machine& machine);
// One <hostdev>, to put into a domain that is there already.
std::string host_device_xml(const PciAddress& address, std::string_view indent);

// The table as Markdown, for docs/design/passthrough.md.
std::string causes_as_markdown();

}  // namespace bulkhead::passthrough
