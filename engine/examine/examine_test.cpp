// A check is one row, one line in docs/checks.md, and one case here: a real directory tree of a healthy host
// with one thing wrong, and exactly that check changes its mind.
#include "engine/examine/examine.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <set>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"

namespace bulkhead::examine {
namespace {

namespace fs = std::filesystem;
using doctor::Evidence;
using doctor::Finding;
using doctor::Verdict;

constexpr const char* gpu_addresses[] = {"0000:1b:00.0", "0000:9d:00.0"};

// Memory where there is any: the trees are many and small.
fs::path scratch() {
  return ::access("/dev/shm", W_OK | X_OK) == 0 ? fs::path("/dev/shm") : fs::temp_directory_path();
}

// A directory tree and the Host that NVML would add to it.
class World {
 public:
  World() {
    std::string name = (scratch() / "bulkhead-doctor-XXXXXX").string();
    root = ::mkdtemp(name.data());
  }
  ~World() {
    std::error_code ignored;
    fs::remove_all(root, ignored);
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  void write(const std::string& path, std::string_view text) const {
    const fs::path whole = root / path.substr(1);
    fs::create_directories(whole.parent_path());
    std::ofstream(whole, std::ios::binary) << text;
  }
  void link(const std::string& path, const std::string& target) const {
    const fs::path whole = root / path.substr(1);
    fs::create_directories(whole.parent_path());
    fs::create_symlink(target, whole);
  }
  void directory(const std::string& path) const { fs::create_directories(root / path.substr(1)); }
  void remove(const std::string& path) const { fs::remove_all(root / path.substr(1)); }
  void replace(const std::string& path, std::string_view old, std::string_view now) const {
    std::string text = read_file(root / path.substr(1)).value();
    const std::size_t at = text.find(old);
    ASSERT_NE(at, std::string::npos) << path << " does not hold " << old;
    text.replace(at, old.size(), now);
    write(path, text);
  }
  void append(const std::string& path, std::string_view text) const {
    std::ofstream(root / path.substr(1), std::ios::app | std::ios::binary) << text;
  }

  fs::path root;
  inventory::Host host = {};
  std::function<void(Evidence&)> afterwards = [](Evidence&) {};
};

// SMBIOS type 0 of 24 bytes with the given extension byte 2, no strings, then the end.
std::string smbios(char extension_2) {
  std::string table(0x18, '\0');
  table[1] = 0x18;
  table[0x13] = extension_2;
  table += std::string(2, '\0');
  table += std::string("\x7f\x04\x00\x00\x00\x00", 6);
  return table;
}

// Configuration space with three 64-bit prefetchable BARs, as an H100 has.
std::string configuration() {
  std::string space(256, '\0');
  for (const std::size_t at : {0x10U, 0x18U, 0x20U}) space[at] = 0x0c;
  return space;
}

constexpr const char* h100_windows =
    "0x0000102002000000 0x0000102002ffffff 0x000000000014220c\n"
    "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
    "0x0000100000000000 0x0000101fffffffff 0x000000000014220c\n"
    "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
    "0x0000102000000000 0x0000102001ffffff 0x000000000014220c\n"
    "0x0000000000000000 0x0000000000000000 0x0000000000000000\n";

void healthy_gpu(World& world, unsigned index) {
  const std::string address = gpu_addresses[index];
  const unsigned group = 24 + index;
  const std::string device = "/sys/bus/pci/devices/" + address;
  world.write(device + "/class", "0x030200\n");
  world.write(device + "/resource", h100_windows);
  world.write(device + "/config", configuration());
  world.write(device + "/numa_node", fmt::format("{}\n", index));
  world.write(device + "/sriov_totalvfs", "16\n");
  world.link(device + "/driver", "../../../bus/pci/drivers/nvidia");
  world.link(device + "/iommu_group", fmt::format("../../../../kernel/iommu_groups/{}", group));
  world.write(fmt::format("/sys/kernel/iommu_groups/{}/type", group), "identity\n");
  world.directory(fmt::format("/sys/kernel/iommu_groups/{}/devices/{}", group, address));

  inventory::Gpu gpu;
  gpu.index = index;
  gpu.uuid.text = fmt::format("GPU-{}", index);
  gpu.model = "NVIDIA H100 80GB HBM3";
  gpu.minor = index;
  gpu.pci.address = PciAddress::parse(address).value();
  gpu.pci.vendor = 0x10de;
  gpu.pci.class_code = 0x030200;
  gpu.pci.iommu_group = group;
  gpu.pci.numa_node = static_cast<int>(index);
  gpu.pci.driver = std::string("nvidia");
  gpu.pci.link_now = inventory::PciLink{2.5, 16};  // idle
  gpu.pci.link_max = inventory::PciLink{32.0, 16};
  gpu.pci.vfs_total = 16U;
  gpu.memory = Bytes(85520809984ULL);
  gpu.persistence = true;
  gpu.temperature = Celsius(30);
  gpu.margin = Celsius(57);
  gpu.slowdown_at = Celsius(89);
  gpu.power.limit = watts(700);
  gpu.clock_event_reasons = std::uint64_t{1};  // idle
  gpu.virtualization = std::string("none");
  gpu.nvlink = {.links = 18,
                .active = 18,
                .fabric_state = std::string("completed"),
                .fabric_status = std::string("success")};
  gpu.mig_capable = true;
  world.host.gpus.push_back(gpu);
  world.write(fmt::format("/dev/nvidia{}", index), "");
}

void make_healthy(World& world) {
  world.write("/proc/cpuinfo",
              "processor\t: 0\nvendor_id\t: GenuineIntel\naddress sizes\t: 52 bits physical, 57 bits "
              "virtual\nflags\t\t: fpu lm vmx sse2\n");
  world.write("/proc/cmdline", "root=/dev/md0 ro intel_iommu=on iommu=pt quiet\n");
  world.write("/proc/iomem", "00000000-00000fff : Reserved\n100000000000-1fffffffffff : PCI Bus 0000:18\n");
  world.write("/proc/interrupts", "           CPU0\n 120:  7  IR-PCI-MSI 14155776-edge      nvidia\n");
  world.write("/proc/meminfo", "MemTotal:       2113929216 kB\n");
  world.write("/proc/driver/nvidia/version",
              "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC "
              "version:  gcc version 12.2.0\n");
  world.write("/proc/driver/nvidia/params", "EnableMSI: 1\nDeviceFileMode: 438\n");
  world.write("/proc/sys/user/max_user_namespaces", "1030000\n");
  world.write(
      "/proc/net/tcp",
      "  sl  local_address rem_address   st\n   0: 0100007F:1A0A 00000000:0000 0A 00000000:00000000\n");
  world.write("/proc/4711/comm", "python3\n");
  world.write("/sys/firmware/acpi/tables/DMAR", "");
  world.write("/sys/firmware/acpi/tables/FACP", "");
  world.write("/sys/firmware/dmi/tables/DMI", smbios(0x08));
  world.write("/sys/class/dmi/id/sys_vendor", "NVIDIA\n");
  world.write("/sys/class/iommu/dmar0/intel-iommu/ecap", "f00f4e\n");
  world.write("/sys/module/apparmor/parameters/enabled", "Y\n");
  world.directory("/sys/bus/pci/drivers/vfio-pci");
  world.write("/etc/os-release", "ID=debian\nVERSION_ID=\"12\"\n");
  world.write("/etc/group", "root:x:0:\nsudo:x:27:ada\nvideo:x:44:\n");
  world.write("/etc/default/grub",
              "# comment\nGRUB_CMDLINE_LINUX_DEFAULT=\"quiet intel_iommu=on iommu=pt\"\n");
  world.write(
      "/boot/grub/grub.cfg",
      "menuentry 'Debian' {\n\tlinux\t/boot/vmlinuz root=/dev/md0 ro quiet intel_iommu=on iommu=pt\n}\n");
  world.write("/etc/docker/daemon.json", R"({"userns-remap": "default"})");
  world.write("/etc/nvidia-container-runtime/config.toml",
              "accept-nvidia-visible-devices-envvar-when-unprivileged = false\n");
  world.write("/etc/bulkhead/rack_watts", "10200\n");
  world.write("/usr/lib/x86_64-linux-gnu/libcuda.so.580.159.04", "");
  world.write("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.580.159.04", "");
  world.write("/usr/local/cuda-12.4/version.json", R"({"cuda": {"name": "CUDA SDK", "version": "12.4.1"}})");
  world.write("/var/lib/docker/image/overlay2/imagedb/content/sha256/aa",
              R"({"config":{"Env":["CUDA_VERSION=12.4.1","A=b"]}})");
  world.write("/var/log/kern.log", "kernel: pcieport 0000:00:01.0: AER: enabled\n");
  world.write("/var/log/audit/audit.log", "type=LOGIN msg=audit(1): pid=1 uid=0\n");
  world.write("/var/log/fabricmanager.log",
              "[Nov 01 2026 10:00:00] [INFO] [tid 1] Fabric Manager version 580.159.04 is running with the "
              "following configuration options\n"
              "[Nov 01 2026 10:00:05] [INFO] [tid 1] Successfully configured all the available NVSwitches\n");
  world.write("/usr/share/nvidia/nvswitch/fabricmanager.cfg", "LOG_LEVEL=4\nFM_CMD_PORT_NUMBER=6666\n");
  world.write("/dev/nvidiactl", "");
  world.write("/dev/ipmi0", "");

  inventory::Host& host = world.host;
  host.hostname = "node1";
  host.os_id = std::string("debian");
  host.kernel = std::string("6.1.0-28-amd64");
  host.memory = Bytes(2ULL << 40U);
  host.numa = {{.id = 0}, {.id = 1}};
  host.cpu_governor = std::string("performance");
  host.driver_version = std::string("580.159.04");
  host.cuda_version = std::string("13.0");
  host.units = {{.name = "nvidia-fabricmanager.service",
                 .load_state = "loaded",
                 .active_state = "active",
                 .sub_state = "running",
                 .file_state = "enabled"}};
  host.nvswitches.resize(4);
  healthy_gpu(world, 0);
  healthy_gpu(world, 1);
  // The tests may run as anybody: what the nodes' owner may do is what matters.
  world.afterwards = [](Evidence& e) {
    e.caller = {.uid = 0, .name = "root", .gids = {0}, .groups = {"root"}};
    for (auto& [path, node] : e.nodes) {
      if (node && path.starts_with("/dev/"))
        node.value = doctor::Node{.mode = 0666, .uid = 0, .gid = 0, .device = true};
    }
  };
}

std::vector<Finding> examined(World& world, const doctor::Purposes& purposes = {}) {
  Evidence evidence = look(world.root, world.host);
  world.afterwards(evidence);
  return doctor::examine(evidence, purposes);
}

void then(World& world, const std::function<void(Evidence&)>& change) {
  world.afterwards = [before = world.afterwards, change](Evidence& e) {
    before(e);
    change(e);
  };
}

const Finding& finding(const std::vector<Finding>& all, std::string_view id) {
  for (const Finding& one : all) {
    if (one.id == id) return one;
  }
  static const Finding none{.id = "no such finding"};
  ADD_FAILURE() << "no finding " << id;
  return none;
}

// One thing wrong, and who must notice.
struct Case {
  const char* id;
  const char* what;
  Verdict verdict;
  const char* says;      // part of the sentence
  const char* evidence;  // where it was read
  void (*mutate)(World&);
};

constexpr const char* gpu0 = "/sys/bus/pci/devices/0000:1b:00.0";

const Case cases[] = {
    {"iommu.firmware", "VT-d is off in the firmware", Verdict::fail, "neither a DMAR nor an IVRS",
     "/sys/firmware/acpi/tables",
     [](World& w) {
       w.remove("/sys/firmware/acpi/tables/DMAR");
       w.remove("/sys/class/iommu/dmar0");
       w.directory("/sys/class/iommu");
     }},
    {"iommu.kernel", "the command line asks and none is in force", Verdict::fail, "asking is not having",
     "/sys/class/iommu",
     [](World& w) {
       w.remove("/sys/class/iommu/dmar0");
       w.directory("/sys/class/iommu");
     }},
    {"iommu.kernel", "the command line turns it off", Verdict::fail, "turns it off (intel_iommu=off)",
     "/proc/cmdline",
     [](World& w) {
       w.remove("/sys/class/iommu/dmar0");
       w.write("/proc/cmdline", "ro intel_iommu=off iommu=pt quiet\n");
       w.write("/etc/default/grub", "GRUB_CMDLINE_LINUX_DEFAULT=\"quiet\"\n");
     }},
    {"iommu.host-dma", "groups translate", Verdict::warn, "1 of 2 GPUs pay",
     "/sys/kernel/iommu_groups/25/type",
     [](World& w) { w.write("/sys/kernel/iommu_groups/25/type", "DMA-FQ\n"); }},
    {"kernel.boot-arguments", "GRUB was edited and the host not restarted", Verdict::warn,
     "not in force until", "/etc/default/grub.d/50.cfg",
     [](World& w) {
       w.write("/proc/cmdline", "ro intel_iommu=on quiet\n");
       w.write("/etc/default/grub", "GRUB_CMDLINE_LINUX_DEFAULT=\"quiet intel_iommu=on\"\n");
       w.write("/etc/default/grub.d/50.cfg", "GRUB_CMDLINE_LINUX=\"iommu=pt\"\n");
     }},
    {"kernel.next-boot", "the loader's file was made without the argument", Verdict::warn,
     "gone after the next boot: iommu=pt", "/boot/grub/grub.cfg",
     [](World& w) { w.replace("/boot/grub/grub.cfg", " iommu=pt", ""); }},
    {"kernel.next-boot", "the loader's file turns it off", Verdict::fail,
     "turns off what works now: intel_iommu=off", "/boot/loader/entries/a-6.1.conf",
     [](World& w) {
       w.write("/boot/loader/entries/a-6.1.conf",
               "title A\nlinux /vmlinuz\noptions root=/dev/sda1 iommu=pt intel_iommu=on intel_iommu=off\n");
     }},
    {"vfio.boot", "a device was bound by hand", Verdict::warn,
     "1 of 1 devices that virtual machines have now", "/etc/udev/rules.d/10-bulkhead-vfio.rules",
     [](World& w) {
       w.host.nvswitches[0].address = PciAddress::parse("0000:05:00.0").value();
       w.host.nvswitches[0].driver = std::string("vfio-pci");
     }},
    {"vfio.boot", "the initramfs holds the host's driver", Verdict::warn,
     "nvidia may take a device before vfio-pci", "/etc/initramfs-tools/modules",
     [](World& w) {
       w.write("/etc/udev/rules.d/10-bulkhead-vfio.rules",
               "ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"0000:1b:00.0\", "
               "ATTR{driver_override}=\"vfio-pci\", RUN{builtin}+=\"kmod load vfio-pci\"\n");
       w.write("/sys/bus/pci/devices/0000:1b:00.0/vendor", "0x10de\n");
       w.write("/etc/initramfs-tools/modules", "# a comment about nvidia\nnvidia\n");
     }},
    {"iommu.gpu-groups", "a GPU has no group", Verdict::fail, "no IOMMU group: 0000:9d:00.0",
     "/sys/kernel/iommu_groups",
     [](World& w) { w.host.gpus[1].pci.iommu_group = Reading<unsigned>::missing("no such file"); }},
    {"iommu.isolation", "a SATA controller shares the group", Verdict::fail,
     "cannot be handed out without SATA 0000:1c:00.0", "/sys/bus/pci/devices/0000:1c:00.0/class",
     [](World& w) {
       w.write("/sys/bus/pci/devices/0000:1c:00.0/class", "0x010601\n");
       w.host.gpus[0].pci.group_siblings.push_back(PciAddress::parse("0000:1c:00.0").value());
     }},
    {"iommu.isolation", "two GPUs share a group", Verdict::warn, "goes to one tenant",
     "/sys/bus/pci/devices/0000:9d:00.0/class",
     [](World& w) { w.host.gpus[0].pci.group_siblings.push_back(w.host.gpus[1].pci.address); }},
    {"iommu.noiommu", "a group without an IOMMU", Verdict::fail, "without an IOMMU",
     "/sys/kernel/iommu_groups/90/name",
     [](World& w) { w.write("/sys/kernel/iommu_groups/90/name", "vfio-noiommu\n"); }},
    {"iommu.interrupt-remapping", "the unit's ecap has no bit 3", Verdict::fail, "cannot remap",
     "/sys/class/iommu/dmar0/intel-iommu/ecap",
     [](World& w) {
       w.write("/proc/interrupts", " 120:  7  PCI-MSI 14155776-edge      nvidia\n");
       w.write("/sys/class/iommu/dmar0/intel-iommu/ecap", "f42\n");
     }},
    {"iommu.interrupt-remapping", "unsafe interrupts are allowed", Verdict::fail, "may forge",
     "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
     [](World& w) { w.write("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n"); }},

    {"pci.bar-assigned", "a BAR got no window", Verdict::fail, "without a window",
     "/sys/bus/pci/devices/0000:1b:00.0/resource",
     [](World& w) {
       w.replace(std::string(gpu0) + "/resource", "0x0000102000000000 0x0000102001ffffff 0x000000000014220c",
                 "0x0000000000000000 0x0000000000000000 0x0000000000000000");
     }},
    {"pci.vf-windows", "the bridge has no room for virtual functions", Verdict::warn,
     "1 of 1 GPUs have no room for virtual functions", "/sys/bus/pci/devices/0000:1b:00.0/resource",
     [](World& w) {
       std::string text = h100_windows;
       for (int i = 0; i < 7; ++i) text += "0x0000000000000000 0x0000000000000000 0x0000000000000000\n";
       w.write(std::string(gpu0) + "/resource", text);
     }},
    {"pci.above-4g", "all windows lie low", Verdict::fail, "Above 4G Decoding is off", "/proc/iomem",
     [](World& w) {
       for (const char* address : gpu_addresses) {
         w.write(fmt::format("/sys/bus/pci/devices/{}/resource", address),
                 "0x90000000 0x90ffffff 0x40200\n0 0 0\n0xa0000000 0xafffffff 0x14220c\n0 0 0\n0xb0000000 "
                 "0xb1ffffff 0x14220c\n0 0 0\n");
       }
       for (auto& gpu : w.host.gpus) gpu.memory = mebibytes(128);
       w.write("/proc/iomem", "80000000-fbffffff : PCI Bus 0000:18\n");
     }},
    {"pci.bar-covers-memory", "a window of 256 MiB", Verdict::warn, "smaller than its memory",
     "/sys/bus/pci/devices/0000:1b:00.0/resource",
     [](World& w) {
       w.replace(std::string(gpu0) + "/resource", "0x0000101fffffffff", "0x000010000fffffff");
     }},
    {"cpu.address-width", "a guest with 36 address bits", Verdict::fail, "36 physical address bits",
     "/proc/cpuinfo", [](World& w) { w.replace("/proc/cpuinfo", "52 bits physical", "36 bits physical"); }},
    {"pci.link", "half the lanes", Verdict::warn, "less than it could",
     "/sys/bus/pci/devices/0000:1b:00.0/current_link_width",
     [](World& w) {
       w.host.gpus[0].pci.link_now = inventory::PciLink{32.0, 8};
     }},
    {"pci.link", "slow under load", Verdict::warn, "less than it could",
     "/sys/bus/pci/devices/0000:1b:00.0/current_link_speed",
     [](World& w) { w.host.gpus[0].holders.push_back({.pid = 4711, .name = "python3"}); }},
    {"pci.sriov", "no SR-IOV capability", Verdict::warn, "1 of 2 GPUs offer no virtual functions",
     "/sys/bus/pci/devices/0000:1b:00.0/sriov_totalvfs",
     [](World& w) { w.host.gpus[0].pci.vfs_total = Reading<unsigned>::missing("no such file"); }},
    {"firmware.smbios", "booted in legacy mode", Verdict::warn, "legacy mode", "/sys/firmware/dmi/tables/DMI",
     [](World& w) { w.write("/sys/firmware/dmi/tables/DMI", smbios(0)); }},
    {"pci.message-interrupts", "a wired interrupt", Verdict::fail, "wired interrupt", "/proc/interrupts",
     [](World& w) { w.append("/proc/interrupts", "  16:  9  IR-IO-APIC 16-fasteoi   nvidia\n"); }},
    {"pci.numa", "numa_node -1 on two nodes", Verdict::warn, "does not say",
     "/sys/bus/pci/devices/0000:1b:00.0/numa_node",
     [](World& w) { w.host.gpus[0].pci.numa_node = Reading<int>::missing("-1"); }},
    {"pci.numa", "numa_node -1 of an accelerator without a driver", Verdict::warn, "does not say",
     "/sys/bus/pci/devices/0000:9d:00.0/numa_node",
     [](World& w) {
       inventory::Accelerator one{.pci = w.host.gpus[1].pci, .maker = "AMD"};
       one.pci.driver = Reading<std::string>::missing("no driver is bound");
       one.pci.numa_node = Reading<int>::missing("-1");
       w.host.accelerators.push_back(one);
     }},

    {"driver.loaded", "no kernel driver", Verdict::fail, "not loaded", "/proc/driver/nvidia/version",
     [](World& w) { w.remove("/proc/driver/nvidia/version"); }},
    {"driver.library", "upgraded and not reloaded", Verdict::fail, "different versions",
     "/usr/lib/x86_64-linux-gnu/libcuda.so.590.48.01",
     [](World& w) {
       w.remove("/usr/lib/x86_64-linux-gnu");
       w.write("/usr/lib/x86_64-linux-gnu/libcuda.so.590.48.01", "");
     }},
    {"driver.api-mismatch", "a container ships libcuda", Verdict::warn, "another version",
     "/var/log/kern.log",
     [](World& w) {
       w.append("/var/log/kern.log", "kernel: NVRM: API mismatch: the client 'python3' (pid 4711)\n");
     }},
    {"driver.rival", "nouveau has a GPU", Verdict::fail, "another driver",
     "/sys/bus/pci/devices/0000:1b:00.0/driver",
     [](World& w) { w.host.gpus[0].pci.driver = std::string("nouveau"); }},
    {"gpu.lost", "a GPU fell off the bus", Verdict::fail, "does not answer for it", "/var/log/kern.log",
     [](World& w) {
       inventory::PciDevice device = w.host.gpus[1].pci;
       w.host.gpus.pop_back();
       w.host.lost.push_back({.pci = device, .why = "not in NVML"});
       w.append("/var/log/kern.log", "kernel: NVRM: GPU 0000:9d:00.0: GPU has fallen off the bus.\n");
     }},
    {"cuda.toolkit", "CUDA 14 with a driver for 13.0", Verdict::fail, "newer major toolkit",
     "/usr/local/cuda-14.1/version.json",
     [](World& w) {
       w.write("/usr/local/cuda-14.1/version.json", R"({"cuda": {"name": "CUDA SDK", "version": "14.1.0"}})");
     }},
    {"cuda.toolkit", "CUDA 13.1 with a driver for 13.0", Verdict::warn, "newer minor",
     "/usr/local/cuda-13.1/version.txt",
     [](World& w) { w.write("/usr/local/cuda-13.1/version.txt", "CUDA Version 13.1.0\n"); }},
    {"cuda.images", "an image for CUDA 14", Verdict::warn, "1 of 2 CUDA images",
     "/var/lib/docker/image/overlay2/imagedb/content/sha256/bb",
     [](World& w) {
       w.write("/var/lib/docker/image/overlay2/imagedb/content/sha256/bb",
               R"({"config":{"Env":["CUDA_VERSION=14.0.0"]}})");
     }},
    {"driver.persistence", "persistence is off", Verdict::warn, "off for 1 GPUs", "NVML",
     [](World& w) { w.host.gpus[1].persistence = false; }},

    {"fabric.unit", "Fabric Manager is stopped", Verdict::fail, "not running",
     "systemd: nvidia-fabricmanager.service",
     [](World& w) {
       w.host.units[0].active_state = "inactive";
       w.write("/proc/net/tcp", "  sl  local_address rem_address   st\n");
       for (auto& gpu : w.host.gpus)
         gpu.nvlink = {
             .links = 18, .active = 0, .fabric_state = std::string("not started"), .fabric_status = {}};
     }},
    {"fabric.unit", "Fabric Manager is not installed", Verdict::fail, "not installed",
     "systemd: nvidia-fabricmanager.service", [](World& w) { w.host.units[0].load_state = "not-found"; }},
    {"fabric.unit", "not enabled", Verdict::warn, "not after a reboot",
     "systemd: nvidia-fabricmanager.service", [](World& w) { w.host.units[0].file_state = "disabled"; }},
    {"fabric.version", "another version than the driver", Verdict::fail,
     "Fabric Manager 570.86.15 and driver 580.159.04 differ", "/var/log/fabricmanager.log",
     [](World& w) { w.replace("/var/log/fabricmanager.log", "580.159.04", "570.86.15"); }},
    {"fabric.port", "configured for 5555, nobody listens", Verdict::warn, "nobody listens", "TCP port 5555",
     [](World& w) { w.replace("/usr/share/nvidia/nvswitch/fabricmanager.cfg", "6666", "5555"); }},
    {"fabric.log", "an NVSwitch is missing", Verdict::fail, "does not find the NVSwitches",
     "/var/log/fabricmanager.log",
     [](World& w) {
       w.append("/var/log/fabricmanager.log",
                "[Nov 01 2026 10:00:06] [ERROR] [tid 1] detected number of NVSwitches don't match with any "
                "supported system topology, aborting fabric manager\n");
     }},
    {"fabric.state", "a GPU never registered", Verdict::fail, "error 802", "NVML",
     [](World& w) { w.host.gpus[0].nvlink.fabric_state = std::string("in progress"); }},
    {"fabric.same-model", "an H200 among H100s", Verdict::fail, "2 models", "NVML",
     [](World& w) { w.host.gpus[1].model = "NVIDIA H200"; }},
    {"fabric.links", "an NVLink is down", Verdict::warn, "is down", "NVML",
     [](World& w) { w.host.gpus[1].nvlink.active = 17; }},

    {"mig.capable", "an L40S", Verdict::warn, "1 of 2 GPUs have no MIG", "NVML",
     [](World& w) {
       w.host.gpus[0].mig_capable = false;
       w.host.gpus[0].mig_why = "Not Supported";
     }},
    {"mig.cuda", "a CUDA 11 driver", Verdict::warn, "12 or newer", "NVML",
     [](World& w) {
       w.host.cuda_version = std::string("11.8");
       w.write("/usr/local/cuda-12.4/version.json", R"({"cuda": {"version": "11.8.0"}})");
       w.write("/var/lib/docker/image/overlay2/imagedb/content/sha256/aa", "{}");
     }},
    {"mig.pending", "mode set, GPU not reset", Verdict::warn, "waits for the GPU to be reset", "NVML",
     [](World& w) { w.host.gpus[0].mig_pending = true; }},
    {"mig.empty-instance", "a GPU instance without compute instance", Verdict::fail, "0 MB", "NVML",
     [](World& w) {
       w.host.gpus[0].mig_now = w.host.gpus[0].mig_pending = true;
       w.host.gpus[0].instances.push_back({.id = 7, .profile = 19, .name = "1g.10gb"});
     }},
    {"mig.no-instance", "MIG on and nothing cut", Verdict::warn, "CUDA does not see it", "NVML",
     [](World& w) { w.host.gpus[0].mig_now = w.host.gpus[0].mig_pending = true; }},
    {"mig.monitors", "nv-hostengine on a sliced GPU", Verdict::warn, "In use by another client",
     "/proc/812/comm",
     [](World& w) {
       w.write("/proc/812/comm", "nv-hostengine\n");
       w.host.gpus[0].mig_now = w.host.gpus[0].mig_pending = true;
       w.host.gpus[0].instances.push_back(
           {.id = 7, .profile = 19, .name = "1g.10gb", .compute = {{.id = 0}}});
     }},

    {"access.nvidia", "a device node is missing", Verdict::fail, "1 of 3 device nodes are missing",
     "/dev/nvidia1", [](World& w) { w.remove("/dev/nvidia1"); }},
    {"access.nvidia", "an ordinary user, group video may", Verdict::fail, "ada may not open 1 of 3",
     "/dev/nvidia0",
     [](World& w) {
       then(w, [](Evidence& e) {
         e.caller = {.uid = 1000, .name = "ada", .gids = {1000, 27}, .groups = {"ada", "sudo"}};
         e.nodes["/dev/nvidia0"] = doctor::Node{.mode = 0660, .uid = 0, .gid = 44, .device = true};
       });
     }},
    {"access.vfio", "an ordinary user and a bound device", Verdict::warn, "ada may not open VFIO nodes",
     "/dev/vfio/24",
     [](World& w) {
       then(w, [](Evidence& e) {
         e.caller = {.uid = 1000, .name = "ada", .gids = {1000, 27}, .groups = {"ada", "sudo"}};
         e.nodes["/dev/vfio/24"] = doctor::Node{.mode = 0600, .uid = 0, .gid = 0, .device = true};
       });
     }},
    {"access.administrator", "a user without sudo", Verdict::warn, "neither root nor", "caller",
     [](World& w) {
       then(w,
            [](Evidence& e) { e.caller = {.uid = 1000, .name = "ada", .gids = {1000}, .groups = {"ada"}}; });
     }},
    {"vfio.module", "a kernel without vfio-pci", Verdict::fail, "no vfio-pci module",
     "/lib/modules/6.1.0-28-amd64/modules.dep",
     [](World& w) {
       w.remove("/sys/bus/pci/drivers/vfio-pci");
       w.write("/lib/modules/6.1.0-28-amd64/modules.dep", "kernel/drivers/net/dummy.ko:\n");
     }},
    {"vfio.node-modes", "chmod 666 on a group node", Verdict::fail, "any user", "/dev/vfio/24",
     [](World& w) {
       then(w, [](Evidence& e) {
         e.nodes["/dev/vfio/24"] = doctor::Node{.mode = 0666, .uid = 0, .gid = 0, .device = true};
       });
     }},
    {"vfio.log", "a window is taken", Verdict::fail, "another driver holds a window", "/var/log/kern.log",
     [](World& w) {
       w.append(
           "/var/log/kern.log",
           "kernel: vfio-pci 0000:1b:00.0: BAR 1: can't reserve [mem 0xc0000000-0xcfffffff 64bit pref]\n");
     }},
    {"vfio.log", "the guide's own words", Verdict::fail, "interrupts could not be set up",
     "/var/log/kern.log",
     [](World& w) {
       w.append("/var/log/kern.log", "kernel: vfio-pci 0000:1b:00.0: IRQs not enabled, cannot bind device\n");
     }},
    {"apparmor.gpu", "libvirt was denied", Verdict::fail, "AppArmor kept", "/var/log/audit/audit.log",
     [](World& w) {
       w.append("/var/log/audit/audit.log",
                "type=AVC msg=audit(2): apparmor=\"DENIED\" operation=\"open\" profile=\"libvirt-1\" "
                "name=\"/dev/vfio/24\" comm=\"qemu\"\n");
     }},
    {"selinux.gpu", "svirt was denied", Verdict::fail, "SELinux kept", "/var/log/audit/audit.log",
     [](World& w) {
       w.append("/var/log/audit/audit.log",
                "type=AVC msg=audit(2): avc:  denied  { open } for pid=9 comm=\"qemu\" path=\"/dev/vfio/24\" "
                "tclass=chr_file\n");
     }},
    {"container.user-namespaces", "Docker without userns-remap", Verdict::warn, "is root of this host",
     "/etc/docker/daemon.json", [](World& w) { w.write("/etc/docker/daemon.json", "{}"); }},
    {"container.devices", "GPU by environment variable", Verdict::warn, "any container may pick",
     "/etc/nvidia-container-runtime/config.toml",
     [](World& w) {
       w.write("/etc/nvidia-container-runtime/config.toml",
               "#accept-nvidia-visible-devices-envvar-when-unprivileged = true\n");
     }},

    {"thermal.headroom", "82 C with 4 C to the chip's limit", Verdict::warn, "within 5 C", "NVML",
     [](World& w) {
       w.host.gpus[0].temperature = Celsius(78);
       w.host.gpus[0].margin = Celsius(4);  // 85 - 78 = 7 would be fine: the margin decides
     }},
    {"thermal.headroom", "86 C", Verdict::fail, "past the ceiling", "NVML",
     [](World& w) { w.host.gpus[0].temperature = Celsius(86); }},
    {"thermal.slowdown", "software thermal slowdown", Verdict::fail, "slows for heat", "NVML",
     [](World& w) { w.host.gpus[0].clock_event_reasons = std::uint64_t{0x20}; }},
    {"power.brake", "the rack pulls the brake", Verdict::fail, "power brake", "NVML",
     [](World& w) { w.host.gpus[0].clock_event_reasons = std::uint64_t{0x80}; }},
    {"power.rack", "1400 W of limits, 1000 W of rack", Verdict::fail, "may draw 1400 W",
     "/etc/bulkhead/rack_watts", [](World& w) { w.write("/etc/bulkhead/rack_watts", "1000\n"); }},
    {"bmc.present", "no IPMI device", Verdict::warn, "no way to the BMC", "/dev/ipmi0",
     [](World& w) { w.remove("/dev/ipmi0"); }},

    {"kernel.version", "kernel 5.10", Verdict::fail, "older than 5.15", "/proc/sys/kernel/osrelease",
     [](World& w) { w.host.kernel = std::string("5.10.0-28-amd64"); }},
    {"cpu.virtualization", "VT-x is off", Verdict::fail, "virtualization is off", "/proc/cpuinfo",
     [](World& w) { w.replace("/proc/cpuinfo", "vmx ", ""); }},
    {"memory.size", "64 GiB", Verdict::warn, "128 GB or more", "/proc/meminfo",
     [](World& w) { w.host.memory = Bytes(64ULL << 30U); }},
    {"cpu.governor", "schedutil", Verdict::warn, "governor is schedutil",
     "/sys/devices/system/cpu/cpufreq/policy*/scaling_governor",
     [](World& w) { w.host.cpu_governor = std::string("schedutil"); }},
};

TEST(Doctor, FindsNothingOnAHealthyHost) {
  World world;
  make_healthy(world);
  for (const Finding& one : examined(world))
    EXPECT_EQ(one.verdict, Verdict::ok) << one.id << ": " << one.says;
}

TEST(Doctor, FindsExactlyWhatIsWrong) {
  for (const Case& one : cases) {
    SCOPED_TRACE(fmt::format("{}: {}", one.id, one.what));
    World world;
    make_healthy(world);
    one.mutate(world);
    const auto findings = examined(world);
    const Finding& found = finding(findings, one.id);
    EXPECT_EQ(found.verdict, one.verdict) << found.says;
    EXPECT_NE(found.says.find(one.says), std::string::npos) << found.says;
    EXPECT_FALSE(found.mend.empty());
    std::string where;
    for (const auto& source : found.evidence) where += source.where + "\n";
    EXPECT_NE(where.find(one.evidence), std::string::npos) << where;
    for (const Finding& other : findings) {
      if (other.id == one.id || other.verdict == Verdict::ok) continue;
      // Unknown is fine where the answer waits for this check, directly or through others.
      std::string root = other.waits_on;
      for (int hop = 0; hop < 5 && !root.empty() && root != one.id; ++hop)
        root = finding(findings, root).waits_on;
      EXPECT_TRUE(other.verdict == Verdict::unknown && root == one.id)
          << other.id << " became " << name_of(other.verdict) << ": " << other.says;
    }
  }
}

TEST(Doctor, HasACaseForEveryCheck) {
  std::set<std::string_view> tested;
  for (const Case& one : cases) tested.insert(one.id);
  std::set<std::string_view> ids;
  for (const auto& check : doctor::checks()) {
    EXPECT_TRUE(ids.insert(check.id).second) << check.id << " is there twice";
    EXPECT_TRUE(tested.contains(check.id)) << check.id << ": add a case to engine/examine/examine_test.cpp";
    EXPECT_FALSE(check.why.empty()) << check.id;
    EXPECT_FALSE(check.requirements.empty()) << check.id;
    EXPECT_LE(check.title.size() + check.id.size() + 10, 80U)
        << check.id << ": the heading does not fit 80 columns";
  }
  for (const auto id : tested) EXPECT_TRUE(ids.contains(id)) << id << " is tested and no check";
}

TEST(Doctor, CoversTheRequirementsItPromises) {
  std::set<std::string_view> covered;
  for (const auto& check : doctor::checks())
    covered.insert(check.requirements.begin(), check.requirements.end());
  for (const char* row :
       {"R1",  "R2",  "R3",  "R4",  "R6",  "R7",  "R8",  "R9",  "R10", "R15", "R16", "R17",
        "R19", "R20", "R21", "R22", "R23", "R24", "R28", "R30", "R31", "R32", "R37", "R40"}) {
    EXPECT_TRUE(covered.contains(row)) << row;
  }
}

// The source tree, found from the test program or the working directory.
std::string document(const std::string& name) {
  for (fs::path start : {fs::read_symlink("/proc/self/exe"), fs::current_path()}) {
    for (; start.has_relative_path(); start = start.parent_path()) {
      if (fs::exists(start / name)) return read_file(start / name).value();
    }
  }
  return {};
}

TEST(Doctor, ExplainsEveryCheckInTheDocumentation) {
  const std::string text = document("docs/checks.md");
  ASSERT_FALSE(text.empty()) << "docs/checks.md was not found above the test program";
  std::size_t lines = 0;
  for (const auto line : split_lines(text)) lines += line.starts_with("| `") ? 1U : 0U;
  EXPECT_EQ(lines, doctor::checks().size()) << "docs/checks.md has rows of checks that are gone";
  for (const auto& check : doctor::checks()) {
    const std::vector<std::string> rows(check.requirements.begin(), check.requirements.end());
    const std::string row = fmt::format("| `{}` | {} | {} |", check.id, join(rows, " "), check.title);
    EXPECT_NE(text.find(row), std::string::npos) << "docs/checks.md lacks the row: " << row;
  }
}

TEST(Doctor, SaysUnknownInAVirtualMachineWhereTheHostMustBeAsked) {
  World world;
  make_healthy(world);
  // What a passed-through H100 in a small virtual machine shows.
  for (const char* gone : {"/sys/firmware", "/sys/class", "/sys/kernel/iommu_groups", "/sys/bus/pci/drivers",
                           "/usr/local", "/var/lib/docker", "/etc/docker", "/etc/nvidia-container-runtime",
                           "/etc/bulkhead", "/dev/ipmi0", "/var/log/fabricmanager.log", "/etc/default"}) {
    world.remove(gone);
  }
  world.write("/proc/cpuinfo",
              "vendor_id\t: GenuineIntel\naddress sizes\t: 52 bits physical, 57 bits virtual\nflags\t\t: fpu "
              "lm hypervisor\n");
  world.write("/proc/interrupts", " 41:  7  PCI-MSI 98304-edge      nvidia\n");
  world.write("/proc/cmdline", "reboot=k panic=1\n");
  inventory::Host& host = world.host;
  host.gpus.pop_back();
  auto& gpu = host.gpus[0];
  gpu.virtualization = std::string("pass-through");
  gpu.pci.iommu_group = Reading<unsigned>::missing("no such file");
  gpu.pci.numa_node = Reading<int>::missing("-1");
  gpu.pci.vfs_total = Reading<unsigned>::missing("no such file");
  gpu.nvlink = {};
  host.numa.resize(1);
  host.nvswitches.clear();
  host.units.clear();
  host.cpu_governor = Reading<std::string>::missing("no cpufreq");
  const auto findings = examined(world);
  for (const Finding& one : findings) EXPECT_LE(one.verdict, Verdict::unknown) << one.id << ": " << one.says;
  for (const char* id : {"iommu.firmware", "iommu.kernel", "iommu.gpu-groups", "pci.sriov", "bmc.present",
                         "cpu.virtualization", "cpu.governor", "vfio.module"}) {
    EXPECT_EQ(finding(findings, id).verdict, Verdict::unknown) << id;
    EXPECT_TRUE(finding(findings, id).ask_host) << id;
  }
  EXPECT_EQ(finding(findings, "driver.loaded").verdict, Verdict::ok);
}

TEST(Doctor, BlamesAGpuOffTheBusOnce) {
  World world;
  make_healthy(world);
  world.write("/sys/bus/pci/devices/0000:9d:00.0/config", std::string(256, '\xff'));
  world.host.lost.push_back({.pci = world.host.gpus[1].pci, .why = "fell off the bus"});
  world.host.gpus.pop_back();
  for (const Finding& one : examined(world))
    EXPECT_EQ(one.verdict, one.id == "gpu.lost" ? Verdict::fail : Verdict::ok) << one.id << ": " << one.says;
}

TEST(Doctor, IsNotFooledByZerosInIomem) {
  World world;
  make_healthy(world);
  for (const char* address : gpu_addresses)
    world.remove(fmt::format("/sys/bus/pci/devices/{}/resource", address));
  world.write("/proc/iomem", "00000000-00000000 : Reserved\n00000000-00000000 : PCI Bus 0000:18\n");
  EXPECT_EQ(finding(examined(world), "pci.above-4g").verdict, Verdict::unknown);
}

TEST(Doctor, NeverFailsWhatItCouldNotSee) {
  World world;  // an empty directory: no evidence at all
  world.afterwards = [](Evidence& e) { e.caller.uid = 0; };
  for (const Finding& one : examined(world)) {
    EXPECT_FALSE(one.says.empty()) << one.id;
    const bool about_absence = one.id == "driver.loaded" || one.id == "bmc.present";
    if (!about_absence) {
      EXPECT_LE(one.verdict, Verdict::unknown) << one.id << ": " << one.says;
    }
  }
}

TEST(Doctor, MendsInTheWordsOfTheDistribution) {
  const auto mend = [](const char* release, const char* id) {
    World world;
    make_healthy(world);
    world.host.os_id = std::string(id);
    world.write("/etc/os-release", release);
    world.remove("/sys/class/iommu/dmar0");
    then(world, [](Evidence& e) { e.caller.uid = 1000; });
    return join(finding(examined(world), "iommu.kernel").mend, "\n");
  };
  EXPECT_NE(mend("ID=ubuntu\nID_LIKE=debian\n", "ubuntu").find("sudo update-grub"), std::string::npos);
  EXPECT_NE(mend("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n", "rocky")
                .find("sudo grubby --update-kernel=ALL --args='intel_iommu=on iommu=pt'"),
            std::string::npos);
  EXPECT_NE(mend("ID=sles\nID_LIKE=suse\n", "sles").find("update-bootloader --add-option 'intel_iommu=on'"),
            std::string::npos);
  EXPECT_NE(mend("ID=gentoo\n", "gentoo").find("# add to the kernel's command line"), std::string::npos);
}

TEST(Doctor, PrintsTheRuleThatAllowsWhatWasDeniedAndNoMore) {
  const auto mend = [](const char* id, const char* line) {
    World world;
    make_healthy(world);
    world.append("/var/log/audit/audit.log", std::string(line) + "\n");
    return join(finding(examined(world), id).mend, "\n");
  };
  EXPECT_EQ(mend("apparmor.gpu",
                 "type=AVC msg=audit(2): apparmor=\"DENIED\" operation=\"open\" profile=\"libvirt-1f\" "
                 "name=\"/dev/vfio/24\" pid=9 comm=\"qemu\" requested_mask=\"wr\" denied_mask=\"wr\""),
            "echo '  /dev/vfio/[0-9]* rw,' | tee -a /etc/apparmor.d/local/abstractions/libvirt-qemu\n"
            "systemctl reload apparmor\n# a guest that runs keeps its old profile: stop and start it");
  EXPECT_NE(mend("apparmor.gpu",
                 "type=AVC msg=audit(2): apparmor=\"DENIED\" operation=\"open\" profile=\"/usr/bin/thing\" "
                 "name=\"/dev/nvidia3\" denied_mask=\"r\"")
                .find("echo '  /dev/nvidia3 r,' | tee -a /etc/apparmor.d/local/usr.bin.thing\n"),
            std::string::npos);
  EXPECT_NE(mend("selinux.gpu",
                 "type=AVC msg=audit(2): avc:  denied  { open read } for pid=9 comm=\"qemu\" "
                 "path=\"/dev/vfio/24\" scontext=system_u:system_r:svirt_t:s0:c1,c2 "
                 "tcontext=system_u:object_r:vfio_device_t:s0 tclass=chr_file")
                .find("echo '(allow svirt_t vfio_device_t (chr_file (open read)))' > bulkhead-gpu.cil\n"),
            std::string::npos);
  // A name that a tenant could choose reaches no command.
  const auto hostile = mend(
      "apparmor.gpu", "type=AVC apparmor=\"DENIED\" profile=\"x';reboot;'\" name=\"/dev/vfio/1';reboot;'\"");
  EXPECT_EQ(hostile.find("reboot"), std::string::npos) << hostile;
}

TEST(Doctor, KnowsWhenVfioIsEarlyEnoughAtTheNextBoot) {
  World world;
  make_healthy(world);
  world.write("/etc/udev/rules.d/10-bulkhead-vfio.rules",
              "ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"0000:1b:00.0\", "
              "ATTR{driver_override}=\"vfio-pci\", RUN{builtin}+=\"kmod load vfio-pci\"\n");
  world.write("/sys/bus/pci/devices/0000:1b:00.0/vendor", "0x10de\n");
  EXPECT_EQ(finding(examined(world), "vfio.boot").verdict, Verdict::ok);
  world.write("/etc/initramfs-tools/modules", "nvidia\n");
  EXPECT_EQ(finding(examined(world), "vfio.boot").verdict, Verdict::warn);
  world.write("/etc/modprobe.d/v.conf", "softdep nvidia pre: vfio-pci\n");
  EXPECT_EQ(finding(examined(world), "vfio.boot").verdict, Verdict::ok);
  world.write("/lib/modules/6.1.0-28-amd64/modules.builtin", "kernel/drivers/gpu/drm/nouveau/nouveau.ko\n");
  const auto found = finding(examined(world), "vfio.boot");
  EXPECT_EQ(found.verdict, Verdict::warn);
  EXPECT_NE(found.says.find("nouveau"), std::string::npos);
}

TEST(Doctor, NamesFirmwareAndBoardAndSaysWhatSmbiosCannotTell) {
  World world;
  make_healthy(world);
  std::string table = smbios(0x08).substr(0, 0x18);
  table[4] = 1, table[5] = 2, table[8] = 3;
  table += std::string(
      "Vendor\0"
      "1.2\0"
      "01/02/2025\0\0",
      23);
  table += std::string(
      "\x02\x08\x01\x00\x01\x02\x00\x00"
      "Maker\0Board 7\0\0",
      8 + 15);
  table += std::string("\x7f\x04\x00\x00\x00\x00", 6);
  world.write("/sys/firmware/dmi/tables/DMI", table);
  const auto found = finding(examined(world), "firmware.smbios");
  EXPECT_EQ(found.verdict, Verdict::ok);
  EXPECT_NE(found.says.find("no bit for SR-IOV, VT-d, ACS or Above 4G"), std::string::npos) << found.says;
  ASSERT_FALSE(found.evidence.empty());
  EXPECT_NE(found.evidence[0].words.find("firmware Vendor 1.2 01/02/2025, board Maker Board 7"),
            std::string::npos)
      << found.evidence[0].words;
}

TEST(Doctor, KeepsToThePurposeAsked) {
  World world;
  make_healthy(world);
  world.remove("/sys/class/iommu/dmar0");
  for (const Finding& one : examined(world, {.mig = true, .passthrough = false, .share = false})) {
    EXPECT_EQ(one.verdict, Verdict::ok) << one.id;
    EXPECT_FALSE(one.id.starts_with("iommu.")) << one.id;
  }
}

TEST(Doctor, ShowsHostileTextWithoutObeyingIt) {
  World world;
  make_healthy(world);
  world.append("/var/log/kern.log", "kernel: NVRM: API mismatch: the client '\x1b[2J\x07evil' (pid 1)\n");
  const auto findings = examined(world);
  const Finding& found = finding(findings, "driver.api-mismatch");
  ASSERT_FALSE(found.evidence.empty());
  EXPECT_EQ(found.evidence[0].words.find('\x1b'), std::string::npos);
}

TEST(Look, StaysInsideItsRootWhenALinkPointsOut) {
  World outside, world;
  outside.write("/secret", "outside\n");
  world.directory("/proc");
  world.link("/proc/cmdline", (outside.root / "secret").string());
  const Evidence evidence = look(world.root, {});
  EXPECT_FALSE(evidence.text("/proc/cmdline")) << evidence.text("/proc/cmdline").value_or("");
}

TEST(Look, DoesNotHangOnAFifoOrReadADirectory) {
  World world;
  world.directory("/proc/cpuinfo");
  world.directory("/etc/default");
  ASSERT_EQ(::mkfifo((world.root / "etc/default/grub").c_str(), 0600), 0);
  const Evidence evidence = look(world.root, {});
  EXPECT_EQ(evidence.text("/proc/cpuinfo").why, "not a regular file");
  EXPECT_EQ(evidence.text("/etc/default/grub").why, "not a regular file");
}

TEST(Look, ReadsOnlyTheEndOfALargeLog) {
  World world;
  world.write("/var/log/fabricmanager.log", std::string(1U << 20U, 'x') + "the end\n");
  const Evidence evidence = look(world.root, {});
  const auto& text = evidence.text("/var/log/fabricmanager.log");
  ASSERT_TRUE(text);
  EXPECT_LE(text->size(), 256U << 10U);
  EXPECT_TRUE(text->ends_with("the end\n"));
}

TEST(PathMatches, LetsAStarStandForOneName) {
  EXPECT_TRUE(doctor::path_matches("/sys/*/type", "/sys/24/type"));
  EXPECT_FALSE(doctor::path_matches("/sys/*/type", "/sys/24/devices/type"));
  EXPECT_TRUE(doctor::path_matches("cuda*", "cuda"));
  EXPECT_TRUE(doctor::path_matches("cuda*a", "cuda-cuda"));
  EXPECT_FALSE(doctor::path_matches("cuda*", "/cuda"));
}

}  // namespace
}  // namespace bulkhead::examine
