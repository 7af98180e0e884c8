// What each errno of these files means, and where that comes from: a scenario of tests/lab has Linux 6.1 and
// 6.12 say it again (IOMMUFD: 6.12, compiled with it), or the function of the kernel's source that says it is
// named. What no kernel has shown us may have another cause than the row says.
#include <array>
#include <cerrno>
#include <cstring>

#include <fmt/format.h>

#include "core/passthrough/passthrough.hpp"

namespace bulkhead::passthrough {

namespace {

constexpr Evidence seen(std::string_view scenario) { return {.scenario = scenario}; }
constexpr Evidence read(std::string_view source) { return {.source = source}; }

constexpr std::array table = std::to_array<Cause>({
    {File::driver_override, ENODEV, "the device is gone",
     "look for it: bulkhead inventory; echo 1 > /sys/bus/pci/rescan", seen("answers")},
    {File::driver_override, EINVAL, "longer than a page: no driver's name",
     "name a driver as /sys/bus/pci/drivers lists it", seen("answers")},
    {File::driver_override, 0, "an empty write changes nothing; only a line end clears it",
     "write a line end", seen("probe-fails")},
    {File::unbind, ENODEV, "the device is not bound to this driver",
     "somebody else unbound it: look again with bulkhead inventory", seen("probe-fails")},
    {File::unbind, ETIMEDOUT, "the unbind waits: somebody holds the device, through VFIO or in the driver",
     "end the holder (a virtual machine, nvidia-persistenced, dcgm); the unbind then goes on by itself",
     seen("unbind-waits")},
    {File::bind, ENODEV, "the driver does not know this device, or it is gone",
     "set driver_override first, and see that the module is loaded", seen("probe-fails")},
    {File::bind, EBUSY, "a driver has it already", "unbind it first", seen("answers")},
    {File::bind, EINVAL, "VFIO refuses a device without an IOMMU group; or the driver's probe failed so",
     "see dmesg; check the IOMMU: bulkhead doctor --for passthrough", seen("iommu-off")},
    {File::drivers_probe, EINVAL, "another member of the IOMMU group is open in a virtual machine",
     "stop the virtual machine that has the group", seen("group-not-viable")},
    {File::drivers_probe, ENODEV, "the device is gone", "look for it: bulkhead inventory", seen("answers")},
    {File::drivers_probe, 0,
     "no driver took it: its module is not loaded, its probe failed, or the IOMMU is off (the kernel says "
     "yes all the same)",
     "see why: dmesg; load the module; check the IOMMU: bulkhead doctor --for passthrough",
     seen("probe-refused")},
    {File::sriov_numvfs, EINVAL, "not a number", "write a number from 0 to sriov_totalvfs", seen("sriov")},
    {File::sriov_numvfs, ERANGE, "more virtual functions than the device has",
     "ask for at most sriov_totalvfs", seen("sriov")},
    {File::sriov_numvfs, EBUSY,
     "there are virtual functions already, and their number changes only through 0",
     "release them, write 0, then the new number", seen("sriov")},
    {File::sriov_numvfs, ENOENT,
     "the physical function has no driver that makes virtual ones (none at all, or vfio-pci)",
     "bind the vendor's driver to it: bulkhead reclaim ADDRESS", seen("sriov")},
    {File::sriov_numvfs, ENOMEM,
     "no address space behind its bridge for the virtual functions' BARs, or no spare bus number",
     "turn on SR-IOV and Above 4G decoding in the firmware; boot with pci=realloc", seen("vf-no-room")},
    {File::sriov_numvfs, ENOSPC, "the device has too few MSI-X vectors or queues left for so many",
     "ask for fewer; free what the physical function has reserved",
     read("drivers/net/ethernet/intel/ice/ice_sriov.c: ice_set_per_vf_res")},
    {File::sriov_numvfs, EIO, "the device does not answer as it should: it may have fallen off the bus",
     "see dmesg; reset it or reboot", read("drivers/pci/iov.c: sriov_enable, InitialVFs is not TotalVFs")},
    {File::sriov_numvfs, ETIMEDOUT,
     "the write waits: a virtual machine has one of the virtual functions open",
     "stop it; the write then goes on by itself", seen("sriov")},
    {File::sriov_numvfs, 0,
     "the driver made fewer virtual functions than asked (a warning in dmesg is all it says)",
     "ask for fewer, or see dmesg", read("drivers/pci/iov.c: sriov_numvfs_store")},
    {File::sriov_autoprobe, EINVAL, "neither 0 nor 1", "write 0 or 1", seen("answers")},
    {File::remove, ENOENT, "the device is gone already", "bring it back: echo 1 > /sys/bus/pci/rescan",
     seen("answers")},
    {File::rescan, 0, "the device did not come back", "power-cycle the slot or the machine",
     seen("rescan-gone")},
    {File::reset, ENOTTY,
     "the device has no way to be reset, or did not come back from its reset (dmesg: giving up)",
     "bind its audio and USB functions too, so that a bus reset works; one that did not come back needs a "
     "power cycle",
     seen("answers")},
    {File::reset_method, EINVAL, "no such reset method on this device",
     "one of those that reset_method lists; \"default\" restores", seen("answers")},
    {File::group_type, EBUSY, "a member of the group has a driver (as Linux 6.1 says it)",
     "unbind all members first", seen("answers")},
    {File::group_type, EPERM, "a member of the group has a driver", "unbind all members first",
     seen("answers")},
    {File::group_type, EINVAL, "no such type, or the platform forbids it",
     "one of DMA, DMA-FQ, identity, auto", seen("answers")},
    {File::resource_resize, EBUSY, "a driver is bound, or virtual functions exist",
     "unbind it and remove its virtual functions first",
     read("drivers/pci/pci-sysfs.c: __resource_resize_store")},
    {File::resource_resize, ENOSPC, "the larger BAR finds no room behind its bridge",
     "turn on Above 4G decoding and Resizable BAR in the firmware",
     read("drivers/pci/setup-bus.c: pci_reassign_bridge_resources")},
    {File::resource_resize, EINVAL, "the BAR has no such size", "one that resourceN_resize lists",
     read("drivers/pci/setup-res.c: pci_resize_resource")},
    {File::vfio_node, ENOENT, "VFIO is not loaded", "modprobe vfio-pci", seen("answers")},
    {File::vfio_node, ENODEV, "the vfio module is not loaded", "modprobe vfio-pci", seen("answers")},
    {File::vfio_node, EACCES, "this user may not open it",
     "run as root, or set host.vfio.owner in the node file", seen("answers")},
    {File::group_node, ENOENT, "the group has no member on vfio-pci, so there is no device file",
     "bind the device first: bulkhead apply", seen("answers")},
    {File::group_node, EBUSY, "another process has the group open",
     "a group is for one virtual machine at a time: stop the holder", seen("group-not-viable")},
    {File::group_node, EACCES, "this user may not open it: the file is made anew for root at each bind",
     "set host.vfio.owner in the node file", seen("answers")},
    {File::group_node, EPERM, "a no-IOMMU group, which only CAP_SYS_RAWIO may open",
     "turn the IOMMU on: bulkhead doctor --for passthrough", seen("no-iommu")},
    {File::group_status, EBUSY,
     "the group is not viable: another member is still bound to a driver of the host",
     "bind every member of the group to vfio-pci, or unbind it", seen("group-not-viable")},
    {File::set_container, EINVAL,
     "the group is in a container already; or (Linux 6.6 and later) the firmware keeps memory of the device "
     "mapped (RMRR)",
     "start from a fresh container; see dmesg for a 1:1 mapping and update the firmware", seen("answers")},
    {File::set_container, EPERM,
     "the group is not viable: another member has a driver of the host; or a no-IOMMU group is put beside a "
     "real one",
     "bind every member of the group to vfio-pci", seen("answers")},
    {File::set_iommu, EPERM,
     "interrupts are not remapped: a guest could inject any interrupt into the host (or, before Linux 6.6, "
     "the firmware keeps memory of the device: dmesg says RMRR)",
     "turn on interrupt remapping (VT-d, AMD-Vi, x2APIC) in the firmware; allow_unsafe_interrupts=1 of "
     "vfio_iommu_type1 gives up the protection",
     seen("no-remapping")},
    {File::set_iommu, ENODEV, "vfio_iommu_type1 is not loaded, or no IOMMU serves the group",
     "modprobe vfio_iommu_type1", seen("answers")},
    {File::set_iommu, EINVAL, "the container has no group, or an IOMMU already",
     "start from a fresh container", seen("answers")},
    {File::set_iommu, EBUSY, "another domain has the device", "see who: fuser /dev/vfio/*",
     read("drivers/iommu/iommu.c: __iommu_attach_group")},
    {File::map_dma, ENOMEM, "locked memory is limited below what is mapped",
     "raise RLIMIT_MEMLOCK of the virtual machine monitor", seen("answers")},
    {File::map_dma, EEXIST, "the address is mapped already", "start from a fresh container", seen("answers")},
    {File::map_dma, EINVAL, "the address is reserved (the MSI window) or beyond what the IOMMU translates",
     "see /sys/kernel/iommu_groups/N/reserved_regions", seen("answers")},
    {File::map_dma, EFAULT, "the memory cannot be pinned", "see dmesg", seen("answers")},
    {File::unmap_dma, EINVAL, "not mapped as asked", "start from a fresh container", seen("answers")},
    {File::get_device, ENODEV, "the group has no such device on vfio-pci", "bind it first: bulkhead apply",
     seen("answers")},
    {File::get_device, EINVAL, "the group has no container with an IOMMU yet",
     "set the container and its IOMMU first", seen("answers")},
    {File::get_device, EACCES,
     "a virtual function whose physical function is with vfio-pci too: it takes that one's VF token",
     "give the physical function back to its driver: bulkhead reclaim ADDRESS", seen("answers")},
    {File::get_device, EAGAIN,
     "somebody works on the device at this moment, so it could not be reset for its opener",
     "try again; see who: dmesg", read("drivers/vfio/pci/vfio_pci_core.c: vfio_pci_core_enable")},
    {File::get_device, EIO, "the device does not come out of power saving: it is dead or off the bus",
     "see dmesg; power-cycle the machine", read("drivers/pci/pci.c: pci_enable_device")},
    {File::get_irq, EINVAL, "the device has no such kind of interrupt",
     "nothing: a device without MSI-X is slower, not broken", seen("answers")},
    {File::device_reset, ENOTTY,
     "it has no way left to be reset, or did not come back from its reset (dmesg: giving up)",
     "bind its other functions too, so that a bus reset works; one that did not come back needs a power "
     "cycle",
     seen("answers")},
    {File::device_reset, EINVAL, "the device has no reset",
     "it is given on as the last guest left it: reboot between guests", seen("answers")},
    {File::device_reset, EAGAIN, "somebody works on the device at this moment", "try again",
     read("drivers/pci/pci.c: pci_try_reset_function")},
    {File::slot_reset_info, ENODEV, "neither its slot nor its bus can be reset (it sits on the root bus)",
     "it is given on as the last guest left it: reboot between guests",
     read("drivers/vfio/pci/vfio_pci_core.c: vfio_pci_ioctl_get_pci_hot_reset_info")},
    {File::slot_reset_info, ENOSPC, "its bus has more functions than there is room to name",
     "it is given on as the last guest left it: reboot between guests",
     read("drivers/vfio/pci/vfio_pci_core.c: vfio_pci_ioctl_get_pci_hot_reset_info")},
    {File::slot_reset_info, EAGAIN, "a function came while they were counted", "try again",
     read("drivers/vfio/pci/vfio_pci_core.c: vfio_pci_fill_devs")},
    {File::slot_reset_info, EPERM, "a function of its slot is in no IOMMU group",
     "see which: bulkhead inventory; check the IOMMU: bulkhead doctor --for passthrough",
     read("drivers/vfio/pci/vfio_pci_core.c: vfio_pci_fill_devs")},
    {File::slot_reset, EINVAL, "a function of its slot is not with VFIO, or in a group that is not ours",
     "bind every function of the slot to vfio-pci: list them under devices with mode: passthrough",
     read("drivers/vfio/pci/vfio_pci_core.c: vfio_pci_dev_set_hot_reset")},
    {File::slot_reset, EBUSY, "somebody works on a function of its slot at this moment", "try again",
     read("drivers/vfio/pci/vfio_pci_core.c: vfio_pci_dev_set_hot_reset")},
    {File::slot_reset, EAGAIN, "somebody works on its slot at this moment", "try again",
     read("drivers/pci/pci.c: __pci_reset_bus")},
    {File::slot_reset, ENODEV, "neither its slot nor its bus can be reset",
     "it is given on as the last guest left it: reboot between guests",
     read("drivers/vfio/pci/vfio_pci_core.c: vfio_pci_ioctl_pci_hot_reset")},
    {File::slot_reset, ENOTTY, "the port above has no way to reset what is behind it",
     "it is given on as the last guest left it: reboot between guests",
     read("drivers/pci/pci.c: __pci_reset_bus")},
    {File::cdev, ENOENT, "this kernel has no VFIO device files (CONFIG_VFIO_DEVICE_CDEV)",
     "nothing: the group's file is used instead", seen("answers")},
    {File::cdev, ENODEV, "the device is being unbound", "bind it again: bulkhead apply",
     read("drivers/vfio/device_cdev.c: vfio_device_fops_cdev_open")},
    {File::cdev, EACCES, "this user may not open it", "set host.vfio.owner in the node file",
     seen("iommufd")},
    {File::iommu_node, ENOENT, "this kernel has no IOMMUFD", "nothing: the group's file is used instead",
     seen("answers")},
    {File::bind_iommufd, EPERM,
     "interrupts are not remapped, or another member of the group has a driver of the host",
     "turn on interrupt remapping (VT-d, AMD-Vi, x2APIC) in the firmware; bind every member of the group",
     read("drivers/iommu/iommufd/device.c: iommufd_device_bind")},
    {File::bind_iommufd, EINVAL,
     "the device is bound already; or the firmware keeps memory of the device mapped (RMRR)",
     "stop the holder; see dmesg for a 1:1 mapping and update the firmware", seen("iommufd")},
    {File::bind_iommufd, EBUSY, "the group is open through its own file", "stop the holder", seen("iommufd")},
    {File::ioas, ENOMEM, "no memory for the tables", "free memory",
     read("drivers/iommu/iommufd/ioas.c: iommufd_ioas_alloc")},
    {File::attach, EINVAL, "another member of the group is attached to another table",
     "give the whole group to one virtual machine",
     read("drivers/iommu/iommufd/device.c: iommufd_hw_pagetable_attach")},
    {File::attach, EBUSY, "another domain has the group", "give the whole group to one virtual machine",
     read("drivers/iommu/iommu.c: __iommu_attach_group")},
});

}  // namespace

std::string_view name_of(File file) {
  switch (file) {
    case File::driver_override:
      return "driver_override";
    case File::unbind:
      return "unbind";
    case File::drivers_probe:
      return "drivers_probe";
    case File::bind:
      return "bind";
    case File::sriov_numvfs:
      return "sriov_numvfs";
    case File::sriov_autoprobe:
      return "sriov_drivers_autoprobe";
    case File::remove:
      return "remove";
    case File::rescan:
      return "rescan";
    case File::reset:
      return "reset";
    case File::reset_method:
      return "reset_method";
    case File::group_type:
      return "iommu_groups/N/type";
    case File::resource_resize:
      return "resourceN_resize";
    case File::vfio_node:
      return "open /dev/vfio/vfio";
    case File::group_node:
      return "open /dev/vfio/N";
    case File::group_status:
      return "VFIO_GROUP_GET_STATUS";
    case File::set_container:
      return "VFIO_GROUP_SET_CONTAINER";
    case File::set_iommu:
      return "VFIO_SET_IOMMU";
    case File::map_dma:
      return "VFIO_IOMMU_MAP_DMA";
    case File::unmap_dma:
      return "VFIO_IOMMU_UNMAP_DMA";
    case File::get_device:
      return "VFIO_GROUP_GET_DEVICE_FD";
    case File::get_irq:
      return "VFIO_DEVICE_GET_IRQ_INFO";
    case File::device_reset:
      return "VFIO_DEVICE_RESET";
    case File::slot_reset_info:
      return "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO";
    case File::slot_reset:
      return "VFIO_DEVICE_PCI_HOT_RESET";
    case File::cdev:
      return "open /dev/vfio/devices/vfioN";
    case File::iommu_node:
      return "open /dev/iommu";
    case File::bind_iommufd:
      return "VFIO_DEVICE_BIND_IOMMUFD";
    case File::ioas:
      return "IOMMU_IOAS_ALLOC";
    case File::attach:
      return "VFIO_DEVICE_ATTACH_IOMMUFD_PT";
  }
  return "?";
}

std::span<const Cause> causes() { return table; }

const Cause* cause_of(File file, int err) {
  for (const auto& row : table) {
    if (row.file == file && row.err == err) return &row;
  }
  return nullptr;
}

std::string errno_name(int err) {
  if (err == 0) return "success";
  const char* name = ::strerrorname_np(err);
  return name != nullptr ? name : fmt::format("errno {}", err);
}

Error refused(File file, int err, std::string_view what) {
  const Errc code = err == EBUSY || err == ETIMEDOUT                  ? Errc::in_use
                    : err == EACCES || err == EPERM                   ? Errc::permission
                    : err == ENODEV || err == ENOENT                  ? Errc::not_found
                    : err == ENOMEM || err == ENOSPC || err == ERANGE ? Errc::no_capacity
                                                                      : Errc::io;
  const Cause* row = cause_of(file, err);
  const std::string_view said =
      row != nullptr ? row->cause : std::string_view("the kernel's log may say why");
  return {code,
          fmt::format("{}: {}: {}{}{}", what, name_of(file), err != 0 ? errno_name(err) : "",
                      err != 0 ? ": " : "", said),
          row != nullptr ? std::string(row->mend) : "dmesg", err};
}

std::string causes_as_markdown() {
  std::string out = "| file or call | answer | cause | mend | known from |\n|---|---|---|---|---|\n";
  for (const auto& row : table) {
    const auto& [scenario, source] = row.evidence;
    out += fmt::format("| `{}` | {} | {} | {} | {} |\n", name_of(row.file),
                       row.err == 0 ? "yes, but not so" : errno_name(row.err), row.cause, row.mend,
                       scenario.empty() ? fmt::format("`{}`", source) : fmt::format("seen: {}", scenario));
  }
  return out;
}

}  // namespace bulkhead::passthrough
