// lab_answers [-u USER] group GROUP DEVICE | device FILE [GROUP]: provokes every refusal of VFIO and IOMMUFD
// that needs no broken hardware, and prints "what: ERRNO" for each, asked without a line of bulkhead. With
// -u it is that user, without capabilities and without a byte of locked memory. The scenario judges.
#include <fcntl.h>
#include <linux/vfio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

constexpr std::uint64_t page_bytes = 4096, guest_address = 0x10000000, msi_window = 0xfee00000;

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
constexpr unsigned long bind_iommufd = _IO(VFIO_TYPE, VFIO_BASE + 18);
constexpr unsigned long attach_table = _IO(VFIO_TYPE, VFIO_BASE + 19);
constexpr unsigned long allocate_space = _IO(';', 0x81);

bool say(const char* what, bool good) {
  const int err = errno;
  std::printf("%s: %s\n", what, good ? "ok" : strerrorname_np(err));
  return good;
}

bool map(int container, void* from, std::uint64_t at) {
  vfio_iommu_type1_dma_map one{};
  one.argsz = sizeof one;
  one.flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
  one.vaddr = reinterpret_cast<std::uintptr_t>(from);
  one.iova = at;
  one.size = page_bytes;
  return ioctl(container, VFIO_IOMMU_MAP_DMA, &one) == 0;
}

bool write_to(const std::string& path, const char* text) {
  const int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  const bool good = fd >= 0 && write(fd, text, std::strlen(text)) > 0;
  if (fd >= 0) close(fd);
  return good;
}

int of_group(const char* number, const char* name) {
  int container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);
  if (!say("open /dev/vfio/vfio", container >= 0)) return 1;
  const int group = open((std::string("/dev/vfio/") + number).c_str(), O_RDWR | O_CLOEXEC);
  if (!say("open the group", group >= 0)) return 1;
  say("device without a container", ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name) >= 0);
  say("iommu without a group", ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) == 0);
  if (!say("container", ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) == 0)) return 1;
  say("container twice", ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) == 0);
  if (!say("iommu", ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) == 0)) return 1;
  say("iommu twice", ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) == 0);

  void* page = mmap(nullptr, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  void* none = mmap(nullptr, page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (!say("map", map(container, page, guest_address))) return 1;
  say("map twice", map(container, page, guest_address));
  say("map the MSI window", map(container, page, msi_window));
  say("map memory that cannot be touched", map(container, none, 2 * guest_address));
  vfio_iommu_type1_dma_unmap part{};
  part.argsz = sizeof part;
  part.iova = guest_address;
  part.size = page_bytes / 2;
  say("unmap half a page", ioctl(container, VFIO_IOMMU_UNMAP_DMA, &part) == 0);

  say("a device that is not there", ioctl(group, VFIO_GROUP_GET_DEVICE_FD, "9999:00:00.0") >= 0);
  const int device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name);
  if (!say("device", device >= 0)) return 1;
  vfio_irq_info irq{};
  irq.argsz = sizeof irq;
  irq.index = 99;
  say("an interrupt of no kind", ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &irq) == 0);
  say("reset", ioctl(device, VFIO_DEVICE_RESET) == 0);
  const std::string method = std::string("/sys/bus/pci/devices/") + name + "/reset_method";
  say("take its ways to be reset", write_to(method, "\n"));
  say("reset without a way", ioctl(device, VFIO_DEVICE_RESET) == 0);
  close(device);
  const int again = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name);
  say("device again", again >= 0);
  say("reset of one that never had a way", ioctl(again, VFIO_DEVICE_RESET) == 0);
  say("give them back", write_to(method, "default"));
  return 0;
}

int of_device(const char* file, const char* group) {
  const int iommu = open("/dev/iommu", O_RDWR | O_CLOEXEC);
  const bool there = say("open /dev/iommu", iommu >= 0);
  const int device = open(file, O_RDWR | O_CLOEXEC);
  if (!say("open the device's file", device >= 0) || !there) return 1;
  BindIommufd bind = {sizeof bind, 0, iommu, 0};
  if (group != nullptr) {
    const int fd = open((std::string("/dev/vfio/") + group).c_str(), O_RDWR | O_CLOEXEC);
    if (!say("open the group", fd >= 0)) return 1;
    say("bind while the group is open", ioctl(device, bind_iommufd, &bind) == 0);
    close(fd);
  }
  if (!say("bind", ioctl(device, bind_iommufd, &bind) == 0)) return 1;
  say("bind twice", ioctl(device, bind_iommufd, &bind) == 0);
  AllocateSpace one = {sizeof one, 0, 0}, other = {sizeof other, 0, 0};
  say("space", ioctl(iommu, allocate_space, &one) == 0 && ioctl(iommu, allocate_space, &other) == 0);
  AttachTable nothing = {sizeof nothing, 0, 9999};
  say("attach to a table that is not there", ioctl(device, attach_table, &nothing) == 0);
  AttachTable attach = {sizeof attach, 0, one.out_space};
  say("attach", ioctl(device, attach_table, &attach) == 0);
  const int second = open("/dev/iommu", O_RDWR | O_CLOEXEC);
  const int twice = open(file, O_RDWR | O_CLOEXEC);
  say("open the device's file twice", twice >= 0);
  BindIommufd elsewhere = {sizeof elsewhere, 0, second, 0};
  say("bind elsewhere", ioctl(twice, bind_iommufd, &elsewhere) == 0);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 3 && std::strcmp(argv[1], "-u") == 0) {
    const rlimit no_memory = {0, 0};
    const auto user = static_cast<uid_t>(std::strtoul(argv[2], nullptr, 10));
    if (setrlimit(RLIMIT_MEMLOCK, &no_memory) != 0 || setgid(user) != 0 || setuid(user) != 0) return 2;
    argv += 2;
    argc -= 2;
  }
  if (argc > 3 && std::strcmp(argv[1], "group") == 0) return of_group(argv[2], argv[3]);
  if (argc > 2 && std::strcmp(argv[1], "device") == 0)
    return of_device(argv[2], argc > 3 ? argv[3] : nullptr);
  return 64;
}
