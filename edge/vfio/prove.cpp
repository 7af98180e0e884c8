// Binding shows nothing: a group that is not viable, interrupts that are not remapped and a dead device all
// bind. Only use shows them.
#include <fcntl.h>
#include <linux/pci_regs.h>
#include <linux/vfio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <vector>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"
#include "edge/vfio/patient.hpp"
#include "edge/vfio/slot.hpp"
#include "edge/vfio/vfio.hpp"

namespace bulkhead::vfio {

namespace fs = std::filesystem;
using passthrough::File;

namespace {

constexpr unsigned answer_wait_ms = 5'000;  // a reset by whoever let go of it last takes less than a second
constexpr std::size_t page_bytes = 4096;
constexpr std::uint64_t guest_address = 0x10000000;  // below the MSI window of x86 (0xfee00000)

// linux/vfio.h and linux/iommufd.h of Linux 6.6; the headers here are of 6.1.
struct BindIommufd {
  std::uint32_t argsz, flags;
  std::int32_t iommufd;
  std::uint32_t out_devid;
};
struct AttachTable {
  std::uint32_t argsz, flags, table;
};
struct AllocateSpace {
  std::uint32_t size, flags, out_space;
};
struct MapSpace {
  std::uint32_t size, flags, space, reserved;
  std::uint64_t user_address, length, address;
};
constexpr unsigned long bind_iommufd = _IO(VFIO_TYPE, VFIO_BASE + 18);
constexpr unsigned long attach_table = _IO(VFIO_TYPE, VFIO_BASE + 19);
constexpr unsigned long allocate_space = _IO(';', 0x81);
constexpr unsigned long map_space = _IO(';', 0x85);
constexpr std::uint32_t map_fixed = 1, map_writeable = 2, map_readable = 4;

class Page {
 public:
  Page() : at_(::mmap(nullptr, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {}
  ~Page() {
    if (at_ != MAP_FAILED) ::munmap(at_, page_bytes);
  }
  Page(const Page&) = delete;
  Page& operator=(const Page&) = delete;
  bool ok() const { return at_ != MAP_FAILED; }
  std::uint64_t address() const { return reinterpret_cast<std::uintptr_t>(at_); }

 private:
  void* at_;
};

UniqueFd open_node(const fs::path& root, const std::string& node) {
  return UniqueFd(::open((root / fs::path(node).relative_path()).c_str(), O_RDWR | O_CLOEXEC));
}

Error dead(const std::string& what) {
  return Error(Errc::gone, fmt::format("{}: {}", what, passthrough::dead_words),
               fmt::format("{}\nan AMD MI300X needs a reboot after a reset of its physical function",
                           passthrough::dead_mend));
}

// A dead device answers all ones. Its ids VFIO answers from what it read when it opened the device; class and
// revision come from the device itself.
Status alive(int device, const std::string& what) {
  vfio_region_info region{};
  region.argsz = sizeof region;
  region.index = VFIO_PCI_CONFIG_REGION_INDEX;
  if (::ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &region) != 0 || region.size < 4) return ok_status();
  const auto reads = [&](std::uint32_t at) {
    std::uint32_t word = 0;
    return ::pread(device, &word, sizeof word, static_cast<off_t>(region.offset + at)) == sizeof word &&
           word != 0xffffffffU;
  };
  if (reads(PCI_VENDOR_ID) && reads(PCI_CLASS_REVISION)) return ok_status();
  return dead(what);
}

struct Owner {  // of the group that the device is in
  const fs::path& root;
  int group = -1;
  std::uint32_t number = 0;
};

// A device without a way of its own is reset with its slot, or its bus, which takes every function there
// along.
void with_its_slot(const Owner& owner, int device, const std::string& what, Proof& proof) {
  auto answer = room_for_slot();
  if (::ioctl(device, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, answer.data()) != 0) {
    proof.reset_why += "; " + passthrough::refused(File::slot_reset_info, errno, what).message();
    return;
  }
  auto all = taken_along(answer);
  if (!all.ok()) {
    proof.reset_why += "; nor with its slot: " + all.error().message();
    return;
  }
  for (auto& one : *all) {
    std::error_code failed;
    const auto driver =
        fs::read_symlink(owner.root / "sys/bus/pci/devices" / one.address.str() / "driver", failed);
    if (!failed) one.driver = driver.filename().string();
  }
  if (const auto slot = passthrough::slot_reset(*all, owner.number); !slot.may) {
    proof.reset_why += "; " + slot.why;
    return;
  }
  std::vector<std::uint32_t> ask(sizeof(vfio_pci_hot_reset) / sizeof(std::uint32_t) + 1);
  auto* reset = reinterpret_cast<vfio_pci_hot_reset*>(ask.data());
  reset->argsz = static_cast<std::uint32_t>(ask.size() * sizeof(std::uint32_t));
  reset->count = 1;
  reset->group_fds[0] = owner.group;
  proof.reset = proof.with_slot = ::ioctl(device, VFIO_DEVICE_PCI_HOT_RESET, reset) == 0;
  if (!proof.reset) proof.reset_why += "; " + passthrough::refused(File::slot_reset, errno, what).message();
}

// What the open device says of itself. `owner`: whose reset of the whole slot it may be.
Status ask_device(int device, const std::string& what, const Owner* owner, Proof& proof) {
  vfio_device_info info{};
  info.argsz = sizeof info;
  if (::ioctl(device, VFIO_DEVICE_GET_INFO, &info) != 0)
    return passthrough::refused(File::get_device, errno, what);
  proof.regions = info.num_regions;
  proof.can_reset = (info.flags & VFIO_DEVICE_FLAGS_RESET) != 0;
  vfio_irq_info irq{};
  irq.argsz = sizeof irq;
  irq.index = VFIO_PCI_MSIX_IRQ_INDEX;
  if (::ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &irq) == 0) {
    proof.msix = irq.count;
  } else if (errno != EINVAL) {
    return passthrough::refused(File::get_irq, errno, what);
  }
  BH_CHECK(alive(device, what));
  if (!proof.can_reset) {
    proof.reset_why = "it has no reset of its own";
  } else if (::ioctl(device, VFIO_DEVICE_RESET) == 0) {
    proof.reset = true;
  } else {
    proof.reset_why = passthrough::refused(File::device_reset, errno, what).message();
  }
  if (!proof.reset && owner) with_its_slot(*owner, device, what, proof);
  // The kernel has one errno for a device that cannot be reset and for one that did not come back from it.
  return alive(device, what);
}

Status through_group(const fs::path& root, const PciAddress& address, Proof& proof) {
  const std::string what = address.str();
  BH_TRY(const std::string node, group_node(root, address));
  // The order matters at the end: the device and the group are closed before the container.
  const UniqueFd container = open_node(root, "/dev/vfio/vfio");
  if (!container) return passthrough::refused(File::vfio_node, errno, what);
  const UniqueFd group = open_node(root, node);
  if (!group && errno == EBUSY) {
    proof.busy = true;
    return ok_status();
  }
  if (!group) return passthrough::refused(File::group_node, errno, what);
  vfio_group_status status{};
  status.argsz = sizeof status;
  if (::ioctl(group.get(), VFIO_GROUP_GET_STATUS, &status) != 0)
    return passthrough::refused(File::group_status, errno, what);
  if ((status.flags & VFIO_GROUP_FLAGS_VIABLE) == 0)
    return passthrough::refused(File::group_status, EBUSY, what);
  int container_fd = container.get();
  if (::ioctl(group.get(), VFIO_GROUP_SET_CONTAINER, &container_fd) != 0)
    return passthrough::refused(File::set_container, errno, what);
  if (::ioctl(container.get(), VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) != 0)
    return passthrough::refused(File::set_iommu, errno, what);
  const Page page;
  if (!page.ok()) return errno_error("a page of memory", errno);
  vfio_iommu_type1_dma_map map{};
  map.argsz = sizeof map;
  map.flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
  map.vaddr = page.address();
  map.iova = guest_address;
  map.size = page_bytes;
  if (::ioctl(container.get(), VFIO_IOMMU_MAP_DMA, &map) != 0)
    return passthrough::refused(File::map_dma, errno, what);
  const UniqueFd device(::ioctl(group.get(), VFIO_GROUP_GET_DEVICE_FD, what.c_str()));
  if (!device) return passthrough::refused(File::get_device, errno, what);
  const auto number = parse_u64(fs::path(node).filename().string());
  const Owner owner{root, group.get(), static_cast<std::uint32_t>(number.value_or(0))};
  BH_CHECK(ask_device(device.get(), what, number ? &owner : nullptr, proof));
  vfio_iommu_type1_dma_unmap unmap{};
  unmap.argsz = sizeof unmap;
  unmap.iova = guest_address;
  unmap.size = page_bytes;
  if (::ioctl(container.get(), VFIO_IOMMU_UNMAP_DMA, &unmap) != 0 || unmap.size != page_bytes)
    return passthrough::refused(File::unmap_dma, errno, what);
  return ok_status();
}

Status through_iommufd(const fs::path& root, const PciAddress& address, const std::string& node,
                       Proof& proof) {
  const std::string what = address.str();
  const UniqueFd iommu = open_node(root, "/dev/iommu");
  if (!iommu && errno == ENOENT) return ok_status();
  if (!iommu) return passthrough::refused(File::iommu_node, errno, what);
  const UniqueFd device = open_node(root, node);
  if (!device) return passthrough::refused(File::cdev, errno, what);
  BindIommufd bind = {sizeof bind, 0, iommu.get(), 0};
  if (::ioctl(device.get(), bind_iommufd, &bind) != 0)
    return passthrough::refused(File::bind_iommufd, errno, what);
  AllocateSpace space = {sizeof space, 0, 0};
  if (::ioctl(iommu.get(), allocate_space, &space) != 0) return passthrough::refused(File::ioas, errno, what);
  AttachTable attach = {sizeof attach, 0, space.out_space};
  if (::ioctl(device.get(), attach_table, &attach) != 0)
    return passthrough::refused(File::attach, errno, what);
  const Page page;
  if (!page.ok()) return errno_error("a page of memory", errno);
  MapSpace map = {
      sizeof map,   map_fixed | map_readable | map_writeable, space.out_space, 0, page.address(), page_bytes,
      guest_address};
  if (::ioctl(iommu.get(), map_space, &map) != 0) return passthrough::refused(File::map_dma, errno, what);
  Proof here;
  BH_CHECK(ask_device(device.get(), what, nullptr, here));
  proof.iommufd = true;
  return ok_status();
}

}  // namespace

Result<Proof> prove(const fs::path& root, const PciAddress& address) {
  Proof proof;
  // Opening a dead device makes the kernel reset it, and wait a minute for an answer, past kill -9.
  switch (answers(root, address, answer_wait_ms)) {
    case Answers::yes:
      break;
    case Answers::all_ones:
      return dead(address.str());
    case Answers::waits:
      return Error(
          Errc::in_use,
          fmt::format("{}: its config space cannot be read: a reset of it does not end", address.str()),
          "see dmesg (\"not ready ... after FLR\"): the kernel gives up after a minute; if it says "
          "\"giving up\", power-cycle its slot or the machine");
  }
  BH_CHECK(through_group(root, address, proof));
  if (proof.busy) return proof;
  if (const auto node = device_node(root, address); !node.empty())
    BH_CHECK(through_iommufd(root, address, node, proof));
  return proof;
}

std::string words(const Proof& proof) {
  if (proof.busy) return "a virtual machine has it open";
  return fmt::format("opened, a page mapped and unmapped{}; {} MSI-X vectors; {}",
                     proof.iommufd ? ", through IOMMUFD too" : "", proof.msix,
                     proof.with_slot ? "reset with its slot"
                     : proof.reset   ? "reset"
                                     : "not reset: " + proof.reset_why);
}

}  // namespace bulkhead::vfio
