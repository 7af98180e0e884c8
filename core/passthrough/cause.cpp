// What each errno of these files means: seen on Linux 6.1 or 6.12 (tests/lab makes the common ones again), or read in the
// kernel's source and ABI documents. What no kernel has shown us yet may have another cause than the row says.
#include <array>
#include <cerrno>
#include <cstring>

#include <fmt/format.h>

#include "core/passthrough/passthrough.hpp"

namespace bulkhead::passthrough {

namespace {

constexpr std::array table = std::to_array<Cause>({
    {File::driver_override, ENODEV, "the device is gone",
     "look for it: bulkhead inventory; echo 1 > /sys/bus/pci/rescan"},
    {File::driver_override, EINVAL, "longer than a page: no driver's name",
     "name a driver as /sys/bus/pci/drivers lists it"},
    {File::driver_override, 0, "an empty write changes nothing; only a line end clears it",
     "write a line end"},
    {File::unbind, ENODEV, "the device is not bound to this driver",
     "somebody else unbound it: look again with bulkhead inventory"},
    {File::unbind, ETIMEDOUT, "the unbind waits: somebody holds the device, through VFIO or in the driver",
     "end the holder (a virtual machine, nvidia-persistenced, dcgm); the unbind then goes on by itself"},
    {File::bind, ENODEV, "the driver does not know this device, or it is gone",
     "set driver_override first, and see that the module is loaded"},
    {File::bind, EBUSY, "a driver has it already", "unbind it first"},
    {File::bind, EINVAL, "the driver's probe failed, or VFIO refuses a device without an IOMMU group",
     "see dmesg; check the IOMMU: bulkhead doctor --for passthrough"},
    {File::drivers_probe, EINVAL,
     "another member of the IOMMU group is open in a virtual machine, or the name is no device",
     "stop the virtual machine that has the group"},
    {File::drivers_probe, ENODEV, "the device is gone", "look for it: bulkhead inventory"},
    {File::drivers_probe, 0,
     "no driver took it: its module is not loaded, its probe failed, or the IOMMU is off (the kernel says "
     "yes all the same)",
     "see why: dmesg; load the module; check the IOMMU: bulkhead doctor --for passthrough"},
    {File::sriov_numvfs, EINVAL, "not a number", "write a number from 0 to sriov_totalvfs"},
    {File::sriov_numvfs, ERANGE, "more virtual functions than the device has",
     "ask for at most sriov_totalvfs"},
    {File::sriov_numvfs, EBUSY,
     "there are virtual functions already, and their number changes only through 0",
     "release them, write 0, then the new number"},
    {File::sriov_numvfs, ENOENT,
     "the physical function has no driver that makes virtual ones (none at all, or vfio-pci)",
     "bind the vendor's driver to it: bulkhead reclaim ADDRESS"},
    {File::sriov_numvfs, ENOMEM,
     "no address space behind its bridge for the virtual functions' BARs, or no spare bus number",
     "turn on SR-IOV and Above 4G decoding in the firmware; boot with pci=realloc"},
    {File::sriov_numvfs, ENOSPC, "the device has too few MSI-X vectors or queues left for so many",
     "ask for fewer; free what the physical function has reserved"},
    {File::sriov_numvfs, EIO, "the device did not answer: it may have fallen off the bus",
     "see dmesg; reset it or reboot"},
    {File::sriov_numvfs, ETIMEDOUT,
     "the write waits: a virtual machine has one of the virtual functions open",
     "stop it; the write then goes on by itself"},
    {File::sriov_numvfs, 0,
     "the driver made fewer virtual functions than asked (a warning in dmesg is all it says)",
     "ask for fewer, or see dmesg"},
    {File::sriov_autoprobe, EINVAL, "neither 0 nor 1", "write 0 or 1"},
    {File::remove, ENOENT, "the device is gone already", "bring it back: echo 1 > /sys/bus/pci/rescan"},
    {File::rescan, 0, "the device did not come back", "power-cycle the slot or the machine"},
    {File::reset, ENOTTY, "the device has no way to be reset",
     "it can be given away only once a boot; bind its audio and USB functions too, then a bus reset works"},
    {File::reset, EAGAIN, "something else on its bus is in use, so the bus cannot be reset",
     "bind the other functions of the slot to vfio-pci too"},
    {File::reset, EIO, "the device did not come back from its reset", "see dmesg; power-cycle the machine"},
    {File::reset_method, EINVAL, "no such reset method on this device",
     "one of those that reset_method lists; \"default\" restores"},
    {File::group_type, EBUSY, "a member of the group has a driver", "unbind all members first"},
    {File::group_type, EINVAL, "no such type, or the platform forbids it",
     "one of DMA, DMA-FQ, identity, auto"},
    {File::resource_resize, EBUSY, "a driver is bound, or virtual functions exist",
     "unbind it and remove its virtual functions first"},
    {File::resource_resize, ENOSPC, "the larger BAR finds no room behind its bridge",
     "turn on Above 4G decoding and Resizable BAR in the firmware"},
    {File::resource_resize, EINVAL, "the BAR has no such size", "one that resourceN_resize lists"},
    {File::vfio_node, ENOENT, "VFIO is not loaded", "modprobe vfio-pci"},
    {File::vfio_node, ENODEV, "the vfio module is not loaded", "modprobe vfio-pci"},
    {File::vfio_node, EACCES, "this user may not open it",
     "run as root, or set host.vfio.owner in the node file"},
    {File::group_node, ENOENT, "the group has no member on vfio-pci, so there is no device file",
     "bind the device first: bulkhead apply"},
    {File::group_node, EBUSY, "another process has the group open",
     "a group is for one virtual machine at a time: stop the holder"},
    {File::group_node, EACCES, "this user may not open it: the file is made anew for root at each bind",
     "set host.vfio.owner in the node file"},
    {File::group_node, EPERM, "a no-IOMMU group, which only CAP_SYS_RAWIO may open",
     "turn the IOMMU on: bulkhead doctor --for passthrough"},
    {File::group_status, EBUSY,
     "the group is not viable: another member is still bound to a driver of the host",
     "bind every member of the group to vfio-pci, or unbind it"},
    {File::set_container, EINVAL, "the group is in a container already, or not viable",
     "bind every member of the group to vfio-pci"},
    {File::set_container, EPERM, "a no-IOMMU group beside a real one", "turn the IOMMU on"},
    {File::set_iommu, EPERM, "interrupts are not remapped: a guest could inject any interrupt into the host",
     "turn on interrupt remapping (VT-d, AMD-Vi, x2APIC) in the firmware; allow_unsafe_interrupts=1 of "
     "vfio_iommu_type1 gives up the protection"},
    {File::set_iommu, ENODEV, "vfio_iommu_type1 is not loaded, or no IOMMU serves the group",
     "modprobe vfio_iommu_type1"},
    {File::set_iommu, ENOTTY, "vfio_iommu_type1 is not loaded", "modprobe vfio_iommu_type1"},
    {File::set_iommu, EINVAL, "the group's reserved memory (RMRR) forbids giving it away",
     "see dmesg for the reserved region; update the firmware"},
    {File::set_iommu, EBUSY, "another domain has the device", "see who: fuser /dev/vfio/*"},
    {File::map_dma, ENOMEM, "locked memory is limited below what is mapped",
     "raise RLIMIT_MEMLOCK of the virtual machine monitor"},
    {File::map_dma, EEXIST, "the address is mapped already", "start from a fresh container"},
    {File::map_dma, EINVAL, "the address is reserved (the MSI window) or beyond what the IOMMU translates",
     "see /sys/kernel/iommu_groups/N/reserved_regions"},
    {File::map_dma, EFAULT, "the memory cannot be pinned", "see dmesg"},
    {File::unmap_dma, EINVAL, "not mapped as asked", "start from a fresh container"},
    {File::get_device, ENODEV, "the group has no such device on vfio-pci", "bind it first: bulkhead apply"},
    {File::get_device, EIO, "the device does not come out of power saving: it is dead or off the bus",
     "see dmesg; power-cycle the machine"},
    {File::get_device, EBUSY, "another process has the device", "stop the holder"},
    {File::get_device, EINVAL, "the device's VF token is missing, or its config space reads all ones",
     "see dmesg; an AMD MI300X whose physical function was reset needs a reboot"},
    {File::get_device, EPERM, "the group is not viable any more",
     "bind every member of the group to vfio-pci"},
    {File::get_irq, EINVAL, "the device has no such kind of interrupt",
     "nothing: a device without MSI-X is slower, not broken"},
    {File::device_reset, ENOTTY, "the device has no function reset and shares its bus",
     "bind its other functions too"},
    {File::device_reset, EINVAL, "the device has no reset",
     "it is given on as the last guest left it: reboot between guests"},
    {File::device_reset, EIO, "the device did not come back from its reset",
     "see dmesg; power-cycle the machine"},
    {File::cdev, ENOENT, "this kernel has no VFIO device files (CONFIG_VFIO_DEVICE_CDEV)",
     "nothing: the group's file is used instead"},
    {File::cdev, EBUSY, "the group's file is open, or another process has the device", "stop the holder"},
    {File::cdev, EACCES, "this user may not open it", "set host.vfio.owner in the node file"},
    {File::iommu_node, ENOENT, "this kernel has no IOMMUFD", "nothing: the group's file is used instead"},
    {File::bind_iommufd, EPERM,
     "interrupts are not remapped: a guest could inject any interrupt into the host",
     "turn on interrupt remapping (VT-d, AMD-Vi, x2APIC) in the firmware"},
    {File::bind_iommufd, EINVAL, "the device is bound already, or the group is not viable",
     "bind every member of the group to vfio-pci"},
    {File::bind_iommufd, EBUSY,
     "the group is open through its own file, or a member has a driver of the host",
     "stop the holder; bind every member of the group"},
    {File::ioas, ENOMEM, "no memory for the tables", "free memory"},
    {File::attach, EINVAL, "the group's reserved memory (RMRR) forbids giving it away",
     "see dmesg for the reserved region; update the firmware"},
    {File::attach, EPERM, "interrupts are not remapped", "turn on interrupt remapping in the firmware"},
    {File::attach, EBUSY, "another member of the group is attached elsewhere",
     "give the whole group to one virtual machine"},
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
  std::string out = "| file or call | answer | cause | mend |\n|---|---|---|---|\n";
  for (const auto& row : table) {
    out += fmt::format("| `{}` | {} | {} | {} |\n", name_of(row.file),
                       row.err == 0 ? "yes, but not so" : errno_name(row.err), row.cause, row.mend);
  }
  return out;
}

}  // namespace bulkhead::passthrough
