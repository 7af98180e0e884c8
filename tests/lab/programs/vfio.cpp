// lab_vfio status GROUP | open GROUP DEVICE | hold GROUP DEVICE SECONDS: the kernel's own answers about VFIO,
// asked without a line of bulkhead, so that its proof has a judge. Exit: 0 yes, 1 the kernel says no (printed
// with its errno).
#include <fcntl.h>
#include <linux/vfio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

int refused(const char* what) {
  std::printf("%s: %s\n", what, strerrorname_np(errno));
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 64;
  const std::string verb = argv[1], node = std::string("/dev/vfio/") + argv[2];
  const int container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);
  if (container < 0) return refused("/dev/vfio/vfio");
  const int group = open(node.c_str(), O_RDWR | O_CLOEXEC);
  if (group < 0) return refused("group");
  vfio_group_status status{};
  status.argsz = sizeof status;
  if (ioctl(group, VFIO_GROUP_GET_STATUS, &status) != 0) return refused("status");
  if ((status.flags & VFIO_GROUP_FLAGS_VIABLE) == 0) {
    std::printf("not viable\n");
    return 1;
  }
  if (verb == "status") {
    std::printf("viable\n");
    return 0;
  }
  if (argc < 4) return 64;
  if (ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) != 0) return refused("set container");
  if (ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) != 0) return refused("set iommu");
  void* page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  vfio_iommu_type1_dma_map map{};
  map.argsz = sizeof map;
  map.flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
  map.vaddr = reinterpret_cast<std::uintptr_t>(page);
  map.iova = 0x10000000;
  map.size = 4096;
  if (ioctl(container, VFIO_IOMMU_MAP_DMA, &map) != 0) return refused("map");
  const int device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, argv[3]);
  if (device < 0) return refused("device");
  vfio_irq_info interrupts{};
  interrupts.argsz = sizeof interrupts;
  interrupts.index = VFIO_PCI_MSIX_IRQ_INDEX;
  if (ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &interrupts) != 0) return refused("interrupts");
  std::printf("open msix=%u reset=%s\n", interrupts.count,
              ioctl(device, VFIO_DEVICE_RESET) == 0 ? "ok" : strerrorname_np(errno));
  if (verb == "hold" && argc > 4) {
    std::fflush(stdout);
    sleep(static_cast<unsigned>(std::strtoul(argv[4], nullptr, 10)));
  }
  return 0;
}
