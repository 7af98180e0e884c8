#include "edge/sysfs/sysfs.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace bulkhead::sysfs {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;

// A host made of files below a directory of its own.
class SysfsTest : public testing::Test {
 protected:
  SysfsTest() {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-sysfs-XXXXXX").string();
    root_ = ::mkdtemp(pattern.data());
  }
  ~SysfsTest() override { fs::remove_all(root_); }

  void put(const std::string& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  void link(const std::string& path, const std::string& target) {
    fs::create_directories((root_ / path).parent_path());
    fs::create_symlink(target, root_ / path);
  }
  // The attributes of the H100 of a virtual machine, as read on one (hosts/h100-sxm-80gb.json).
  void put_h100(const std::string& address) {
    const std::string at = "sys/bus/pci/devices/" + address + "/";
    put(at + "vendor", "0x10de\n");
    put(at + "device", "0x2330\n");
    put(at + "subsystem_vendor", "0x10de\n");
    put(at + "subsystem_device", "0x16c1\n");
    put(at + "class", "0x030200\n");
    put(at + "numa_node", "-1\n");
    put(at + "local_cpulist", "0-15\n");
    put(at + "current_link_speed", "32.0 GT/s PCIe\n");
    put(at + "current_link_width", "16\n");
    put(at + "max_link_speed", "32.0 GT/s PCIe\n");
    put(at + "max_link_width", "16\n");
    put(at + "resource",
        "0x0000102002000000 0x0000102002ffffff 0x000000000014220c\n"
        "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
        "0x0000100000000000 0x0000101fffffffff 0x000000000014220c\n"
        "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
        "0x0000102000000000 0x0000102001ffffff 0x000000000014220c\n");
  }
  inventory::PciDevice device(const std::string& address) {
    auto read = pci_device(root_, *PciAddress::parse(address));
    EXPECT_TRUE(read.ok());
    return read.ok() ? std::move(read).value() : inventory::PciDevice{};
  }

  fs::path root_;
};

TEST_F(SysfsTest, ReadsAGpuAsTheKernelOfAVirtualMachineShowsIt) {
  put_h100("0000:00:06.0");
  link("sys/bus/pci/devices/0000:00:06.0/driver", "../../../bus/pci/drivers/nvidia");
  const auto gpu = device("0000:00:06.0");
  EXPECT_EQ(gpu.vendor, 0x10de);
  EXPECT_EQ(gpu.device, 0x2330);
  EXPECT_EQ(gpu.subsystem_device, 0x16c1);
  EXPECT_EQ(gpu.class_code, 0x030200U);
  EXPECT_EQ(gpu.driver.value_or(""), "nvidia");
  ASSERT_TRUE(gpu.link_now);
  EXPECT_EQ(*gpu.link_now, (inventory::PciLink{32.0, 16}));
  ASSERT_EQ(gpu.bars.size(), 3U);
  EXPECT_EQ(gpu.bars[1].index, 2U);
  EXPECT_EQ(gpu.bars[1].size, 128ULL << 30U);
  EXPECT_EQ(gpu.bars[2].size, 32ULL << 20U);
  EXPECT_FALSE(gpu.numa_node);
  EXPECT_THAT(gpu.numa_node.why, HasSubstr("-1"));
  EXPECT_FALSE(gpu.iommu_group);
  EXPECT_THAT(gpu.iommu_group.why, HasSubstr("IOMMU"));
  EXPECT_FALSE(gpu.vfs_total);
  EXPECT_FALSE(gpu.boot_vga);
}

TEST_F(SysfsTest, NamesTheOtherMembersOfAnIommuGroup) {
  put_h100("0000:1b:00.0");
  put("sys/bus/pci/devices/0000:1b:00.0/numa_node", "1\n");
  link("sys/bus/pci/devices/0000:1b:00.0/iommu_group", "../../../kernel/iommu_groups/42");
  put("sys/kernel/iommu_groups/42/devices/0000:1b:00.0", "");
  put("sys/kernel/iommu_groups/42/devices/0000:1b:00.1", "");
  put("sys/kernel/iommu_groups/42/devices/rubbish", "");
  const auto gpu = device("0000:1b:00.0");
  EXPECT_EQ(gpu.iommu_group.value_or(0), 42U);
  EXPECT_EQ(gpu.numa_node.value_or(-1), 1);
  ASSERT_EQ(gpu.group_siblings.size(), 1U);
  EXPECT_EQ(gpu.group_siblings[0].str(), "0000:1b:00.1");
}

TEST_F(SysfsTest, SaysThatALinkIsDownWhenTheCardFellOffTheBus) {
  put_h100("0000:1b:00.0");
  put("sys/bus/pci/devices/0000:1b:00.0/current_link_width", "63\n");
  EXPECT_EQ(device("0000:1b:00.0").link_now.why, "the link is down");
  put("sys/bus/pci/devices/0000:1b:00.0/current_link_speed", "Unknown\n");
  EXPECT_EQ(device("0000:1b:00.0").link_now.why, "the kernel says 'Unknown'");
}

TEST_F(SysfsTest, ReadsVirtualFunctionsAndTheirParent) {
  put_h100("0000:1b:00.0");
  put("sys/bus/pci/devices/0000:1b:00.0/sriov_totalvfs", "20\n");
  put_h100("0000:1b:00.4");
  link("sys/bus/pci/devices/0000:1b:00.0/virtfn0", "../0000:1b:00.4");
  link("sys/bus/pci/devices/0000:1b:00.0/virtfn1", "../0000:1b:00.5");
  link("sys/bus/pci/devices/0000:1b:00.4/physfn", "../0000:1b:00.0");
  EXPECT_EQ(device("0000:1b:00.0").vfs_total.value_or(0), 20U);
  EXPECT_EQ(device("0000:1b:00.0").vfs_now.value_or(0), 2U);
  const auto vf = device("0000:1b:00.4");
  ASSERT_TRUE(vf.physical_function);
  EXPECT_EQ(vf.physical_function->str(), "0000:1b:00.0");
}

TEST_F(SysfsTest, BelievesNoGarbage) {
  put_h100("0000:1b:00.0");
  const std::string at = "sys/bus/pci/devices/0000:1b:00.0/";
  put(at + "vendor", "0x110de\n");  // does not fit 16 bits
  put(at + "numa_node", "99999999999999999999\n");
  put(at + "sriov_totalvfs", "many\n");
  put(at + "resource", "0x10 0x05 0x0\nnot three\n0x0 0xffffffffffffffffff 0x1\n\x01\x02\n");
  put(at + "local_cpulist", std::string(100000, '7'));
  const auto gpu = device("0000:1b:00.0");
  EXPECT_EQ(gpu.vendor, 0);
  EXPECT_FALSE(gpu.numa_node);
  EXPECT_THAT(gpu.numa_node.why, HasSubstr("99999999999999999999"));
  EXPECT_FALSE(gpu.vfs_total);
  EXPECT_TRUE(gpu.bars.empty());
  EXPECT_LE(gpu.local_cpus.size(), 300U);
}

TEST_F(SysfsTest, ListsTheBusInOrderAndSkipsWhatIsNoAddress) {
  put_h100("0000:c1:00.0");
  put_h100("0000:1b:00.0");
  put("sys/bus/pci/devices/0000:05:00.0/vendor", "0x10de\n");
  put("sys/bus/pci/devices/0000:05:00.0/class", "0x068000\n");
  put("sys/bus/pci/devices/hello/vendor", "0x10de\n");
  const auto heads = pci_heads(root_);
  ASSERT_TRUE(heads.ok());
  ASSERT_EQ(heads->size(), 3U);
  EXPECT_TRUE((*heads)[0].is_nvswitch());
  EXPECT_FALSE((*heads)[0].is_display());
  EXPECT_EQ((*heads)[1].address.str(), "0000:1b:00.0");
  EXPECT_TRUE((*heads)[2].is_display());
}

TEST_F(SysfsTest, ReadsTheHostFromItsFiles) {
  put("proc/sys/kernel/hostname", "dgx-01\n");
  put("proc/sys/kernel/osrelease", "5.15.0-1047-nvidia\n");
  put("proc/sys/kernel/random/boot_id", "5f1c7f0e-2b7a-4a55-9d0f-0c6f2a1b3c4d\n");
  put("etc/os-release",
      "NAME=\"Ubuntu\"\nID=ubuntu\nVERSION_ID='22.04'\nPRETTY_NAME=\"Ubuntu 22.04.4 LTS\"\n");
  put("sys/class/dmi/id/sys_vendor", "NVIDIA\n");
  put("sys/class/dmi/id/product_name", "DGXH100\n");
  put("proc/cpuinfo", "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Platinum 8480C\n");
  put("proc/meminfo", "MemTotal:       2113559392 kB\nMemFree: 1 kB\n");
  put("proc/cmdline", "BOOT_IMAGE=/vmlinuz intel_iommu=on\n");
  put("sys/devices/system/cpu/online", "0-223\n");
  put("sys/devices/system/node/node1/cpulist", "56-111\n");
  put("sys/devices/system/node/node0/cpulist", "0-55\n");
  put("sys/devices/system/node/node0/meminfo", "Node 0 MemTotal:       1024 kB\n");
  put("proc/driver/nvidia/version",
      "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root@x)\n"
      "GCC version:  gcc version 11.4.0\n");
  inventory::Host host;
  read_host(root_, host);
  EXPECT_EQ(host.hostname, "dgx-01");
  EXPECT_EQ(host.os.value_or(""), "Ubuntu 22.04.4 LTS");
  EXPECT_EQ(host.os_id.value_or(""), "ubuntu");
  EXPECT_EQ(host.kernel.value_or(""), "5.15.0-1047-nvidia");
  EXPECT_EQ(host.machine.value_or(""), "NVIDIA DGXH100");
  EXPECT_EQ(host.cpu_model.value_or(""), "Intel(R) Xeon(R) Platinum 8480C");
  EXPECT_EQ(host.cpus_online, 224U);
  EXPECT_EQ(host.memory.count, 2113559392ULL * 1024);
  ASSERT_EQ(host.numa.size(), 2U);
  EXPECT_EQ(host.numa[0].memory.count, 1024U * 1024);
  EXPECT_EQ(host.numa[1].cpus, "56-111");
  EXPECT_EQ(host.driver_version.value_or(""), "580.159.04");
  EXPECT_THAT(host.cpu_governor.why, HasSubstr("cpufreq"));
  EXPECT_THAT(host.notes, ElementsAre());
}

TEST_F(SysfsTest, CountsTheLargePagesOfEachNode) {
  put("sys/devices/system/node/node0/cpulist", "0-3\n");
  const std::string pages = "sys/devices/system/node/node0/hugepages/";
  put(pages + "hugepages-1048576kB/nr_hugepages", "4\n");
  put(pages + "hugepages-1048576kB/free_hugepages", "3\n");
  put(pages + "hugepages-2048kB/nr_hugepages", "0\n");
  put(pages + "hugepages-2048kB/free_hugepages", "0\n");
  put(pages + "hugepages-0kB/nr_hugepages", "1\n");
  put(pages + "hugepages-99999999999999999999kB/nr_hugepages", "1\n");
  put(pages + "something", "1\n");
  inventory::Host host;
  read_host(root_, host);
  ASSERT_EQ(host.numa.size(), 1U);
  ASSERT_EQ(host.numa[0].hugepages.size(), 2U);
  EXPECT_EQ(host.numa[0].hugepages[0].size.count, 2U << 20U);
  EXPECT_EQ(host.numa[0].hugepages[1].free, 3U);
}

TEST_F(SysfsTest, TakesAnAcceleratorsFilesWithoutBelievingThem) {
  const std::string at = "sys/bus/pci/devices/0000:41:00.0/";
  put(at + "vendor", "0x1002\n");
  put(at + "class", "0x120000\n");
  put(at + "product_name", "MI\x1b[2J\n");
  put(at + "mem_info_vram_total", "many\n");
  put(at + "current_compute_partition", "SPX\n");
  put(at + "available_compute_partition", "NOT_SUPPORTED, SPX,, " + std::string(1000, 'A') + ", CPX\n");
  put(at + "sriov_admin/vf1/profile/sched_priority", "low normal]\n");
  put(at + "sriov_admin/vf999999/profile/sched_priority", "low\n");
  put(at + "sriov_admin/.bulk_profile/sched_priority", "low\n");
  const auto one = accelerator(root_, device("0000:41:00.0"));
  EXPECT_EQ(one.maker, "AMD");
  EXPECT_EQ(one.model.value_or("").find('\x1b'), std::string::npos);
  EXPECT_FALSE(one.memory);
  EXPECT_THAT(one.compute_partitions, ElementsAre("SPX", "CPX"));
  ASSERT_EQ(one.shares.size(), 1U);
  EXPECT_EQ(one.shares[0].priority.value_or(""), "low normal]");
  EXPECT_FALSE(one.shares[0].memory);
  // Without a driver there is nothing but the bus.
  put("sys/bus/pci/devices/0000:42:00.0/vendor", "0x8086\n");
  const auto bare = accelerator(root_, device("0000:42:00.0"));
  EXPECT_EQ(bare.maker, "Intel");
  EXPECT_FALSE(bare.shares_set);
  EXPECT_EQ(bare.model.why, "no driver is bound");
}

TEST_F(SysfsTest, AnEmptyRootIsAHostOfReasons) {
  inventory::Host host;
  read_host(root_, host);
  EXPECT_FALSE(host.kernel);
  EXPECT_FALSE(host.kernel.why.empty());
  EXPECT_FALSE(host.os);
  EXPECT_FALSE(host.boot_id);
  EXPECT_EQ(host.cpus_online, 0U);
  EXPECT_EQ(host.notes.size(), 2U);
  EXPECT_FALSE(pci_heads(root_).ok());
}

TEST_F(SysfsTest, WritesAGovernorAndReadsItBack) {
  const std::string at = "sys/devices/system/cpu/cpufreq/";
  put(at + "policy0/scaling_governor", "powersave\n");
  put(at + "policy0/scaling_available_governors", "performance powersave\n");
  put(at + "policy10/scaling_governor", "powersave\n");
  put(at + "policy2/scaling_governor", "performance\n");
  put(at + "boost", "1\n");
  const auto all = governors(root_);
  ASSERT_TRUE(all.ok());
  ASSERT_EQ(all->size(), 3U);
  EXPECT_EQ((*all)[1].policy, "policy2");
  EXPECT_THAT((*all)[2].offered, ElementsAre("performance", "powersave"));
  inventory::Host host;
  read_host(root_, host);
  EXPECT_EQ(host.cpu_governor.value_or(""), "mixed");
  ASSERT_TRUE(set_governor(root_, "policy0", "performance").ok());
  EXPECT_EQ((*governors(root_))[0].now, "performance");
  EXPECT_EQ(set_governor(root_, "policy7", "performance").error().code(), Errc::not_found);
  EXPECT_EQ(set_governor(root_, "../policy0", "performance").error().code(), Errc::invalid);
  EXPECT_EQ(set_governor(root_, "policy0", "a b\n").error().code(), Errc::invalid);
}

}  // namespace
}  // namespace bulkhead::sysfs
