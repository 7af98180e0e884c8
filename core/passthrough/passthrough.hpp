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

struct Permission {            // of a device file
  std::string owner = "root";  // of the host's /etc/passwd
  unsigned mode = 0600;
  friend bool operator==(const Permission&, const Permission&) = default;
};
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
  // Its lock is held for seconds: somebody's unbind, probe or reset of it hangs in the kernel, so that
  // nothing can be written, and the override or the config space not be read.
  bool stuck = false;
  bool dead = false;  // its config space reads all ones: off the bus, or without power
  std::vector<unsigned> bars_without_room = {};  // BARs the kernel found no address for
  std::vector<std::string> uses = {};            // what the host itself does with it: "mounted on /", "swap"
  std::vector<std::string> nodes = {};           // device files: who has one open uses it
  std::optional<Permission> permission = {};     // of its group's file; missing: there is none
  std::string owner_id = {};                     // the same owner as a number
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
  // Between unbinding and probing it is removed from the bus, and the bus is scanned anew: its registers are
  // read again. That loses its override and autoprobe, so `after` is written once it is back.
  bool replug = false;
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
  bool rescan = false;  // what goes back to the host is removed from the bus and found anew on the way
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
  stuck,           // an unbind of it hangs
  dead,            // it answers nothing
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

// ---- a reset of the whole slot
// A function that a reset of a slot, or of its bus, takes along.
struct TakenAlong {
  PciAddress address = {};
  unsigned group = 0;
  std::string driver = {};  // empty: none
};
struct SlotReset {
  bool may = false;
  std::string why = {};  // where it may not be
};
// VFIO resets a slot for whoever has every function there, and we have one group open: `group`. All must be
// in it and with VFIO; strangers are named.
SlotReset slot_reset(std::span<const TakenAlong> all, unsigned group);

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
  slot_reset_info,  // VFIO_DEVICE_GET_PCI_HOT_RESET_INFO
  slot_reset,       // VFIO_DEVICE_PCI_HOT_RESET
  cdev,             // open /dev/vfio/devices/vfioN
  iommu_node,       // open /dev/iommu
  bind_iommufd,
  ioas,
  attach,
};
std::string_view name_of(File file);

// How a row is known: seen in a scenario of tests/lab/scenarios, or read in the kernel's source.
struct Evidence {
  std::string_view scenario = {};
  std::string_view source = {};  // "drivers/pci/iov.c: sriov_enable"
};
struct Cause {
  File file = {};
  int err = 0;  // 0: the write succeeded, and what reads back is not what was asked
  std::string_view cause = {};
  std::string_view mend = {};
  Evidence evidence = {};
};
std::span<const Cause> causes();
const Cause* cause_of(File file, int err);
std::string errno_name(int err);  // "EBUSY"
// "0000:01:00.0: unbind: EBUSY: cause", with the mend as its hint. An errno the table lacks keeps its name.
Error refused(File file, int err, std::string_view what);
// ---- libvirt
// What a guest gets with the devices it asks for: whole groups, and the place they are near.
struct Handed {
  std::vector<PciAddress> devices = {};  // in the order asked for, each with the rest of its group
  std::optional<unsigned> node = {};     // missing: unknown, or devices of several nodes
  std::string cpus = {};                 // list format: those near all of them; empty: as above
  bool nodes_differ = false;
};
// Errc::not_found: no such device. Errc::conflict: a member of a group that is not with vfio-pci: the guest
// would not start.
Result<Handed> handed(const Tree& tree, std::span<const PciAddress> asked);

struct Machine {
  std::string name = {};
  Bytes memory = {};
  unsigned vcpus = 1;
  std::string cpus = {};              // list format: those near the device; empty: not pinned
  std::optional<unsigned> node = {};  // NUMA node of the device; missing: unknown, so memory is not bound
  std::optional<Bytes> hugepage =
      {};  // size of its pages; 0: the host's default size; missing: ordinary ones
  bool uefi = false;
  std::vector<PciAddress> devices = {};
};
// A domain that libvirt defines; `managed='no'`.
std::string domain_xml(const Machine& machine);
// The same parts without the domain around them, each under a comment that says where it goes.
std::string snippet_xml(const Machine& machine);
// One <hostdev>, to put into a domain that is there already.
std::string host_device_xml(const PciAddress& address, std::string_view indent);

// What to say of a device that answers nothing, and what to do about it.
inline constexpr std::string_view dead_words =
    "its config space reads all ones: the device is dead, off the bus or without power";
inline constexpr std::string_view dead_mend =
    "see since when: dmesg; power-cycle its slot or the machine, and look again: bulkhead inventory";

// The table as Markdown, for docs/design/passthrough.md.
std::string causes_as_markdown();

}  // namespace bulkhead::passthrough
