// The bus, the groups and what the host does with each function, from a directory tree as the kernel makes
// it.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "base/fd.hpp"
#include "edge/vfio/patient.hpp"
#include "edge/vfio/vfio.hpp"

namespace bulkhead::vfio {
namespace {

namespace fs = std::filesystem;
using passthrough::Binding;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class VfioTest : public testing::Test {
 protected:
  VfioTest() {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-vfio-XXXXXX").string();
    root_ = ::mkdtemp(pattern.data());
    fs::create_directories(root_ / "sys/bus/pci/devices");
  }
  ~VfioTest() override { fs::remove_all(root_); }

  void put(const std::string& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path, std::ios::binary) << text;
  }
  std::string text(const std::string& path) {
    std::ifstream file(root_ / path);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void link(const std::string& path, const std::string& target) {
    fs::create_directories((root_ / path).parent_path());
    fs::remove(root_ / path);
    fs::create_symlink(target, root_ / path);
  }
  // A function below root bus 0, with its entry in /sys/bus.
  void function(const std::string& address, const std::string& class_code, const std::string& driver,
                const std::string& group) {
    const std::string at = "sys/devices/pci0000:00/" + address + "/";
    put(at + "vendor", "0x10de\n");
    put(at + "device", "0x2330\n");
    put(at + "class", class_code + "\n");
    put(at + "driver_override", "(null)\n");
    put(at + "numa_node", "1\n");
    put(at + "local_cpulist", "8-15\n");
    link("sys/bus/pci/devices/" + address, "../../../devices/pci0000:00/" + address);
    if (!driver.empty()) bound(address, driver);
    if (!group.empty()) {
      link(at + "iommu_group", "../../../kernel/iommu_groups/" + group);
      put("sys/kernel/iommu_groups/" + group + "/type", "DMA-FQ\n");
    }
  }
  void bound(const std::string& address, const std::string& driver) {
    link("sys/devices/pci0000:00/" + address + "/driver", "../../../bus/pci/drivers/" + driver);
    put("sys/bus/pci/drivers/" + driver + "/unbind", "");
  }
  passthrough::Tree tree() {
    auto read_now = read(root_);
    EXPECT_TRUE(read_now.ok()) << (read_now.ok() ? "" : read_now.error().message());
    return read_now.ok() ? std::move(read_now).value() : passthrough::Tree{};
  }
  static PciAddress at(const std::string& text) { return *PciAddress::parse(text); }

  fs::path root_;
};

TEST_F(VfioTest, ReadsFunctionsInAddressOrderWithDriverGroupAndNode) {
  function("0000:00:05.0", "0x030200", "nvidia", "7");
  function("0000:00:04.1", "0x040300", "", "7");
  put("sys/bus/pci/devices/no-address/vendor", "0x1\n");
  const auto seen = tree();
  ASSERT_EQ(seen.functions.size(), 2U);
  EXPECT_EQ(seen.functions[0].address, at("0000:00:04.1"));
  EXPECT_EQ(seen.functions[0].driver, "");
  const auto& gpu = seen.functions[1];
  EXPECT_EQ(gpu.driver, "nvidia");
  EXPECT_EQ(gpu.driver_override, "");  // "(null)" is none
  EXPECT_EQ(gpu.group, 7U);
  EXPECT_EQ(gpu.numa_node, 1U);
  EXPECT_EQ(gpu.local_cpus, "8-15");
  ASSERT_EQ(seen.groups.size(), 1U);
  EXPECT_EQ(seen.groups[0].type, "DMA-FQ");
  EXPECT_FALSE(seen.groups[0].noiommu);
  EXPECT_THAT(seen.modules_missing, ElementsAre("vfio_pci", "vfio_iommu_type1"));
  EXPECT_FALSE(seen.firmware_table);
}

TEST_F(VfioTest, ABusThatIsNotThereIsAnErrorAndNotAnEmptyHost) {
  fs::remove_all(root_ / "sys/bus");
  EXPECT_FALSE(read(root_).ok());
}

TEST_F(VfioTest, TakesNothingFromFilesThatSayNonsense) {
  function("0000:00:05.0", "0x030200", "", "");
  const std::string device = "sys/devices/pci0000:00/0000:00:05.0/";
  put(device + "vendor", "0xfffffffff\n");
  put(device + "numa_node", "-1\n");
  put(device + "local_cpulist", "a-b\n");
  put(device + "sriov_totalvfs", "70000\n");
  link(device + "iommu_group", "../../../kernel/iommu_groups/x7");
  put("sys/kernel/iommu_groups/99999999999/type", "DMA\n");
  const auto gpu = tree().functions.at(0);
  EXPECT_EQ(gpu.vendor, 0);
  EXPECT_FALSE(gpu.numa_node);
  EXPECT_EQ(gpu.local_cpus, "");
  EXPECT_FALSE(gpu.vfs_total);
  EXPECT_FALSE(gpu.group);
  EXPECT_THAT(tree().groups, IsEmpty());
}

TEST_F(VfioTest, KnowsVirtualFunctionsByTheirLinks) {
  function("0000:00:06.0", "0x020000", "igb", "8");
  function("0000:00:07.0", "0x020000", "vfio-pci", "9");
  const std::string pf = "sys/devices/pci0000:00/0000:00:06.0/";
  put(pf + "sriov_totalvfs", "7\n");
  put(pf + "sriov_numvfs", "2\n");
  put(pf + "sriov_drivers_autoprobe", "0\n");
  link(pf + "virtfn0", "../0000:00:07.0");
  link(pf + "virtfn2", "../0000:00:08.0");
  link("sys/devices/pci0000:00/0000:00:07.0/physfn", "../0000:00:06.0");
  const auto seen = tree();
  const auto& card = *seen.find(at("0000:00:06.0"));
  EXPECT_EQ(card.vfs_total, 7U);
  // The second has no link: the list ends where the kernel's does. sriov_numvfs is not asked.
  EXPECT_EQ(card.vfs_now, 1U);
  EXPECT_FALSE(card.autoprobe);
  EXPECT_THAT(card.virtual_functions, ElementsAre(at("0000:00:07.0")));
  EXPECT_EQ(seen.find(at("0000:00:07.0"))->physical, at("0000:00:06.0"));
  EXPECT_EQ(*virtual_function(root_, at("0000:00:06.0"), 0), at("0000:00:07.0"));
  EXPECT_EQ(*virtual_function(root_, at("0000:00:06.0"), 1), std::nullopt);
  const auto count = virtual_functions(root_, at("0000:00:06.0"));
  ASSERT_TRUE(count.ok());
  EXPECT_EQ(count->total, 7U);
}

TEST_F(VfioTest, ABarWithTypeBitsAndNoAddressHasNoRoom) {
  function("0000:00:05.0", "0x030200", "", "7");
  const std::string device = "sys/devices/pci0000:00/0000:00:05.0/";
  std::string config(64, '\0');
  config[0x10] = 0x0c;  // 64-bit, prefetchable, no address: without room
  config[0x18] = 0x0c;
  config[0x1c] = 0x10;  // this one has an address
  put(device + "config", config);
  put(device + "resource",
      "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
      "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
      "0x0000001000000000 0x00000010ffffffff 0x000000000014220c\n"
      "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
      "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
      "0x0000000000000000 0x0000000000000000 0x0000000000000000\n");
  EXPECT_THAT(tree().functions.at(0).bars_without_room, ElementsAre(0U));
}

TEST_F(VfioTest, ADeviceWhoseConfigSpaceIsAllOnesIsDeadAndAVirtualFunctionIsNot) {
  function("0000:00:05.0", "0x030200", "vfio-pci", "7");
  function("0000:00:06.0", "0x020000", "igbvf", "8");
  put("sys/devices/pci0000:00/0000:00:05.0/config", std::string(64, '\xff'));
  std::string virtual_one(64, '\0');
  virtual_one.replace(0, 4, 4, '\xff');  // a virtual function has no ids of its own
  put("sys/devices/pci0000:00/0000:00:06.0/config", virtual_one);
  const auto all = tree();
  EXPECT_TRUE(all.functions.at(0).dead);
  EXPECT_FALSE(all.functions.at(1).dead);
  EXPECT_FALSE(all.functions.at(0).stuck);
  const auto proof = prove(root_, at("0000:00:05.0"));
  ASSERT_FALSE(proof.ok());
  EXPECT_EQ(proof.error().code(), Errc::gone);
  EXPECT_THAT(proof.error().message(), HasSubstr("0000:00:05.0: its config space reads all ones"));
  EXPECT_THAT(proof.error().hint(), HasSubstr("power-cycle"));
}

TEST_F(VfioTest, SaysWhatTheHostItselfDoesWithADevice) {
  function("0000:00:08.0", "0x010802", "nvme", "10");
  function("0000:00:09.0", "0x020000", "e1000", "11");
  const std::string disk = "sys/devices/pci0000:00/0000:00:08.0/nvme/nvme0/nvme0n1";
  put(disk + "/dev", "259:0\n");
  put(disk + "/nvme0n1p1/dev", "259:1\n");
  link("sys/class/block/nvme0n1", "../../../" + disk);
  link("sys/class/block/nvme0n1p1", "../../../" + disk + "/nvme0n1p1");
  // Device mapper on the partition, mounted; swap on the disk.
  fs::create_directories(root_ / (disk + "/nvme0n1p1/holders/dm-0"));
  put("sys/devices/virtual/block/dm-0/dev", "254:0\n");
  link("sys/class/block/dm-0", "../../devices/virtual/block/dm-0");
  put("proc/self/mountinfo", "36 35 254:0 / / rw,noatime - ext4 /dev/mapper/root rw\n");
  put("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme0n1 partition 1 0 -2\n");
  // The default route goes through a bond of the card.
  fs::create_directories(root_ / "sys/devices/virtual/net/bond0/lower_eth0");
  link("sys/class/net/bond0", "../../devices/virtual/net/bond0");
  fs::create_directories(root_ / "sys/devices/pci0000:00/0000:00:09.0/net/eth0");
  link("sys/class/net/eth0", "../../devices/pci0000:00/0000:00:09.0/net/eth0");
  put("proc/net/route",
      "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
      "bond0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n");
  const auto seen = tree();
  const auto& uses = seen.find(at("0000:00:08.0"))->uses;
  EXPECT_THAT(uses, Contains(HasSubstr("is mounted on /")));
  EXPECT_THAT(uses, Contains("swap on /dev/nvme0n1"));
  EXPECT_THAT(seen.find(at("0000:00:09.0"))->uses, ElementsAre("default route through eth0"));
}

TEST_F(VfioTest, NamesTheFilesThroughWhichADeviceIsHeld) {
  function("0000:00:05.0", "0x030200", "vfio-pci", "7");
  function("0000:00:0a.0", "0x030200", "nvidia", "12");
  function("0000:00:0b.0", "0x030200", "vfio-pci", "13");
  put("sys/kernel/iommu_groups/13/name", "vfio-noiommu\n");
  put("sys/devices/pci0000:00/0000:00:05.0/vfio-dev/vfio3/dev", "511:3\n");
  put("proc/driver/nvidia/gpus/0000:00:0a.0/information", "Model: \t x\nDevice Minor: \t 4\n");
  const auto seen = tree();
  EXPECT_THAT(seen.find(at("0000:00:05.0"))->nodes, ElementsAre("/dev/vfio/7", "/dev/vfio/devices/vfio3"));
  EXPECT_THAT(seen.find(at("0000:00:0a.0"))->nodes, ElementsAre("/dev/nvidia4"));
  EXPECT_THAT(seen.find(at("0000:00:0b.0"))->nodes, ElementsAre("/dev/vfio/noiommu-13"));
  for (const auto& group : seen.groups) EXPECT_EQ(group.noiommu, group.number == 13) << group.number;
  EXPECT_EQ(group_node(root_, at("0000:00:0b.0")).value(), "/dev/vfio/noiommu-13");
}

TEST_F(VfioTest, ABindingIsTheDriverAndTheOverrideAsTheKernelSpellsThem) {
  function("0000:00:05.0", "0x030200", "nvidia", "7");
  put("sys/devices/pci0000:00/0000:00:05.0/driver_override", "vfio-pci\n");
  const auto now = binding(root_, at("0000:00:05.0"));
  ASSERT_TRUE(now.ok());
  EXPECT_EQ(now->driver, "nvidia");
  EXPECT_EQ(now->driver_override, "vfio-pci");
  const auto gone = binding(root_, at("0000:00:1f.0"));
  ASSERT_FALSE(gone.ok());
  EXPECT_EQ(gone.error().code(), Errc::gone);
  EXPECT_FALSE(is_there(root_, at("0000:00:1f.0")));
}

TEST_F(VfioTest, WhatIsBoundAsWantedIsNotWrittenTo) {
  function("0000:00:05.0", "0x030200", "nvidia", "7");
  const fs::path override_file = root_ / "sys/devices/pci0000:00/0000:00:05.0/driver_override";
  fs::permissions(override_file, fs::perms::owner_read);
  const auto before = fs::last_write_time(override_file);
  EXPECT_TRUE(set_binding(root_, at("0000:00:05.0"), {.driver = "nvidia"}).ok());
  EXPECT_TRUE(set_binding(root_, at("0000:00:05.0"), {.driver = "*"}).ok());
  EXPECT_EQ(fs::last_write_time(override_file), before);
}

// Files obey nobody: what a kernel would do to the driver's link does not happen, which is what a kernel that
// says yes and does nothing looks like.
TEST_F(VfioTest, AProbeThatSaysYesAndBindsNothingIsAnError) {
  function("0000:00:05.0", "0x030200", "", "7");
  put("sys/bus/pci/drivers_probe", "");
  const auto bound_now =
      set_binding(root_, at("0000:00:05.0"), {.driver = "vfio-pci", .driver_override = "vfio-pci"});
  ASSERT_FALSE(bound_now.ok());
  EXPECT_THAT(bound_now.error().message(), HasSubstr("0000:00:05.0: drivers_probe"));
  EXPECT_THAT(bound_now.error().message(), HasSubstr("no driver took it"));
  EXPECT_EQ(text("sys/bus/pci/drivers_probe"), "0000:00:05.0");
  EXPECT_EQ(text("sys/devices/pci0000:00/0000:00:05.0/driver_override"), "vfio-pci");
}

TEST_F(VfioTest, AnUnbindThatChangesNothingIsAnError) {
  function("0000:00:05.0", "0x030200", "nouveau", "7");
  put("sys/bus/pci/drivers_probe", "");
  const auto changed =
      set_binding(root_, at("0000:00:05.0"), {.driver = "vfio-pci", .driver_override = "vfio-pci"});
  ASSERT_FALSE(changed.ok());
  EXPECT_EQ(changed.error().code(), Errc::conflict);
  EXPECT_THAT(changed.error().message(), HasSubstr("nouveau has it, vfio-pci was asked for"));
  EXPECT_EQ(text("sys/bus/pci/drivers/nouveau/unbind"), "0000:00:05.0");
}

TEST_F(VfioTest, AnOverrideIsTakenAwayWithALineEnd) {
  function("0000:00:05.0", "0x030200", "nvidia", "7");
  const std::string file = "sys/devices/pci0000:00/0000:00:05.0/driver_override";
  put(file, "vfio-pci\n");
  // The file keeps what is written: the line end, which is what a kernel reads as none.
  (void)set_binding(root_, at("0000:00:05.0"), {.driver = "nvidia"});
  EXPECT_EQ(text(file).substr(0, 1), "\n");
}

TEST_F(VfioTest, TheNumberOfVirtualFunctionsChangesThroughZero) {
  function("0000:00:06.0", "0x020000", "igb", "8");
  const std::string pf = "sys/devices/pci0000:00/0000:00:06.0/";
  put(pf + "sriov_totalvfs", "7\n");
  put(pf + "sriov_numvfs", "0");
  put(pf + "sriov_drivers_autoprobe", "1");
  EXPECT_TRUE(set_virtual_functions(root_, at("0000:00:06.0"), 4, false).ok());
  EXPECT_EQ(text(pf + "sriov_numvfs"), "4");
  EXPECT_EQ(text(pf + "sriov_drivers_autoprobe"), "0");
  EXPECT_TRUE(set_virtual_functions(root_, at("0000:00:06.0"), 4, false).ok());
  // A kernel that makes fewer than asked says yes all the same: here a file that cannot be written twice.
  put(pf + "sriov_totalvfs", "none\n");
  const auto corrupt = set_virtual_functions(root_, at("0000:00:06.0"), 2, false);
  ASSERT_FALSE(corrupt.ok());
  EXPECT_THAT(corrupt.error().message(), HasSubstr("sriov_totalvfs says 'none'"));
}

TEST_F(VfioTest, ADeviceInNoGroupHasNoFileToOpen) {
  function("0000:00:05.0", "0x030200", "", "");
  const auto none = group_node(root_, at("0000:00:05.0"));
  ASSERT_FALSE(none.ok());
  EXPECT_EQ(none.error().code(), Errc::not_found);
  EXPECT_FALSE(prove(root_, at("0000:00:05.0")).ok());
  EXPECT_EQ(device_node(root_, at("0000:00:05.0")), "");
}

// Does to the tree what the kernel does when the files are written: a function leaves, and comes back without
// override.
class Bus {
 public:
  Bus(fs::path root, std::string address, bool comes_back)
      : root_(std::move(root)), address_(std::move(address)), comes_back_(comes_back) {
    thread_ = std::thread([this] { run(); });
  }
  ~Bus() {
    stop_ = true;
    thread_.join();
  }
  Bus(const Bus&) = delete;
  Bus& operator=(const Bus&) = delete;

 private:
  static bool written(const fs::path& file) {
    std::error_code failed;
    return fs::file_size(file, failed) > 0 && !failed;
  }
  void run() {
    const fs::path entry = root_ / "sys/bus/pci/devices" / address_,
                   device = root_ / "sys/devices/pci0000:00" / address_;
    while (!stop_) {
      if (fs::is_symlink(entry) && written(device / "remove")) {
        std::ofstream(device / "driver_override") << "(null)\n";
        std::ofstream(device / "remove", std::ios::trunc).close();
        fs::remove(entry);
      }
      if (!fs::is_symlink(entry) && comes_back_ && written(root_ / "sys/bus/pci/rescan"))
        fs::create_symlink("../../../devices/pci0000:00/" + address_, entry);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  const fs::path root_;
  const std::string address_;
  const bool comes_back_;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

TEST_F(VfioTest, AReplugTakesItOffTheBusAndFindsItAnewWithoutItsOverride) {
  function("0000:00:05.0", "0x030200", "", "7");
  put("sys/devices/pci0000:00/0000:00:05.0/driver_override", "(null)\n");
  put("sys/devices/pci0000:00/0000:00:05.0/remove", "");
  put("sys/bus/pci/rescan", "");
  const Bus bus(root_, "0000:00:05.0", true);
  const auto done = replug(root_, at("0000:00:05.0"));
  EXPECT_TRUE(done.ok()) << (done.ok() ? "" : done.error().message());
  EXPECT_EQ(text("sys/bus/pci/rescan"), "1");
  EXPECT_EQ(binding(root_, at("0000:00:05.0"))->driver_override, "");
}

TEST_F(VfioTest, AReplugThatWasInterruptedGoesOnWithTheScan) {
  function("0000:00:05.0", "0x030200", "", "7");
  fs::remove(root_ / "sys/bus/pci/devices/0000:00:05.0");
  put("sys/bus/pci/rescan", "");
  const Bus bus(root_, "0000:00:05.0", true);
  EXPECT_TRUE(replug(root_, at("0000:00:05.0")).ok());
  EXPECT_TRUE(is_there(root_, at("0000:00:05.0")));
}

TEST_F(VfioTest, AFileThatDoesNotAnswerIsLeftBehindAndTheOthersAreRead) {
  put("one", "nvidia\n");
  put("three", "(null)\n");
  // A pipe that nobody writes to is opened for as long as that: like a file that waits for a device's lock.
  const fs::path waits = root_ / "two";
  ASSERT_EQ(::mkfifo(waits.c_str(), 0600), 0);
  const auto all = read_patiently({root_ / "one", waits, root_ / "three", root_ / "four"}, 1000);
  ASSERT_EQ(all.size(), 4U);
  EXPECT_EQ(all[0].text, "nvidia\n");
  EXPECT_TRUE(all[1].waits);
  EXPECT_EQ(all[2].text, "(null)\n");
  EXPECT_FALSE(all[2].waits);
  EXPECT_FALSE(all[3].text);
  EXPECT_FALSE(all[3].waits);
  const UniqueFd released(::open(waits.c_str(), O_RDWR | O_NONBLOCK));  // and the reader ends
}

TEST_F(VfioTest, APhysicalFunctionWithVirtualOnesIsNotReplugged) {
  function("0000:00:06.0", "0x020000", "igb", "8");
  put("sys/devices/pci0000:00/0000:00:06.0/sriov_totalvfs", "7\n");
  put("sys/devices/pci0000:00/0000:00:06.0/sriov_numvfs", "2\n");
  const auto refused = replug(root_, at("0000:00:06.0"));
  ASSERT_FALSE(refused.ok());
  EXPECT_THAT(refused.error().message(), HasSubstr("it has 2 virtual functions"));
}

}  // namespace
}  // namespace bulkhead::vfio
