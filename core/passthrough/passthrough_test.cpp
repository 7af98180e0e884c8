#include "core/passthrough/passthrough.hpp"

#include <cerrno>
#include <set>

#include <gtest/gtest.h>

#include "base/text.hpp"

namespace bulkhead::passthrough {
namespace {

using Lines = std::vector<std::string>;

PciAddress at(std::uint8_t bus, std::uint8_t device, std::uint8_t function) {
  return {0, bus, device, function};
}

Function function(PciAddress address, std::uint32_t class_code, std::string driver, unsigned group) {
  Function out;
  out.address = address;
  out.vendor = 0x10de;
  out.class_code = class_code;
  out.driver = std::move(driver);
  out.group = group;
  return out;
}

constexpr std::uint32_t gpu_class = 0x030200, audio_class = 0x040300, sata_class = 0x010601,
                        bridge_class = 0x060400;

// A GPU with its audio function in group 7, a disk controller in 8, an SR-IOV card with room for 4 in 9.
Tree host() {
  Tree tree;
  tree.functions = {function(at(1, 0, 0), gpu_class, "nvidia", 7),
                    function(at(1, 0, 1), audio_class, "snd_hda_intel", 7),
                    function(at(2, 0, 0), sata_class, "ahci", 8), function(at(3, 0, 0), 0x020000, "igb", 9)};
  tree.functions[3].vfs_total = 4;
  tree.groups = {{7, "DMA-FQ", false}, {8, "DMA-FQ", false}, {9, "DMA-FQ", false}};
  tree.firmware_table = true;
  return tree;
}

const PciAddress gpu_at = at(1, 0, 0), disk_at = at(2, 0, 0), card_at = at(3, 0, 0);

Wishes give(PciAddress address, std::optional<unsigned> vfs = {}) {
  return {.devices = {{address, Purpose::virtual_machine, vfs, {}}}, .permission = {}};
}
Wishes take(PciAddress address) { return {.devices = {{address, Purpose::host, {}, {}}}, .permission = {}}; }

std::string line(const Deed& deed) {
  if (const auto* load = std::get_if<LoadModules>(&deed)) return "load " + join(load->modules, " ");
  if (const auto* vfs = std::get_if<SetVirtualFunctions>(&deed))
    return vfs->physical.str() + " vfs " + std::to_string(vfs->before) + "->" + std::to_string(vfs->after);
  if (const auto* driver = std::get_if<SetDriver>(&deed))
    return str(driver->target) + " " + driver->before.driver + "/" + driver->before.driver_override + "->" +
           driver->after.driver + "/" + driver->after.driver_override;
  if (const auto* permission = std::get_if<SetPermission>(&deed))
    return str(permission->target) + " for " + permission->after.owner;
  return "prove " + str(std::get<Prove>(deed).target);
}
Lines lines(const Tree& tree, const Wishes& wishes) {
  const auto answer = order(tree, wishes);
  Lines out;
  if (const auto* obstacles = std::get_if<std::vector<Obstacle>>(&answer)) {
    for (const auto& one : *obstacles) out.push_back("refused: " + one.why);
  } else {
    for (const auto& one : std::get<Order>(answer).deeds) out.push_back(line(one.deed));
  }
  return out;
}
// The one obstacle; fails when there is none or another.
Obstacle stopped(const Tree& tree, const Wishes& wishes, Hindrance kind) {
  const auto answer = order(tree, wishes);
  const auto* obstacles = std::get_if<std::vector<Obstacle>>(&answer);
  if (obstacles == nullptr) {
    ADD_FAILURE() << "nothing stood in the way";
    return {};
  }
  for (const auto& one : *obstacles) {
    EXPECT_FALSE(one.why.empty());
    EXPECT_FALSE(one.way_out.empty()) << one.why;
    if (one.hindrance == kind) return one;
  }
  ADD_FAILURE() << "another obstacle: " << obstacles->front().why;
  return {};
}
bool has(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

TEST(Order, OfAWholeGroupLoadsBindsEachFunctionAndProvesOnce) {
  Tree tree = host();
  tree.modules_missing = {"vfio_pci"};
  EXPECT_EQ(lines(tree, give(gpu_at)),
            (Lines{"load vfio_pci", "0000:01:00.0 nvidia/->vfio-pci/vfio-pci",
                   "0000:01:00.1 snd_hda_intel/->vfio-pci/vfio-pci", "prove 0000:01:00.0"}));
}

TEST(Order, OfWhatIsBoundAndProvedIsEmptyAndOfWhatIsBoundOnlyIsAProof) {
  Tree tree = host();
  for (auto* f : {&tree.functions[0], &tree.functions[1]}) f->driver = f->driver_override = "vfio-pci";
  Wishes wishes = give(gpu_at);
  EXPECT_EQ(lines(tree, wishes), Lines{"prove 0000:01:00.0"});
  wishes.proved = {{gpu_at, {}}};
  EXPECT_EQ(lines(tree, wishes), Lines{});
  // A rescan loses the override: what is bound so today is not tomorrow.
  tree.functions[1].driver_override.clear();
  EXPECT_EQ(lines(tree, wishes), (Lines{"0000:01:00.1 vfio-pci/->vfio-pci/vfio-pci", "prove 0000:01:00.0"}));
}

TEST(Order, BindsASiblingWithoutADriverToo) {  // its module may load later and make the group not viable
  Tree tree = host();
  tree.functions[1].driver.clear();
  EXPECT_EQ(lines(tree, give(gpu_at))[1], "0000:01:00.1 /->vfio-pci/vfio-pci");
}

TEST(Order, GivesTheDeviceFileAwayBeforeTheProof) {
  Wishes wishes = give(gpu_at);
  wishes.permission = Permission{"libvirt-qemu", 0600};
  const auto all = lines(host(), wishes);
  ASSERT_EQ(all.size(), 4U);
  EXPECT_EQ(all[2], "0000:01:00.0 for libvirt-qemu");
  EXPECT_EQ(all[3], "prove 0000:01:00.0");
}

TEST(Order, OfVirtualFunctionsMakesThenBindsThenProves) {
  EXPECT_EQ(
      lines(host(), give(card_at, 2)),
      (Lines{"0000:03:00.0 vfs 0->2", "0000:03:00.0 VF 0 /->vfio-pci/vfio-pci", "prove 0000:03:00.0 VF 0",
             "0000:03:00.0 VF 1 /->vfio-pci/vfio-pci", "prove 0000:03:00.0 VF 1"}));
  // Left to the host, they are made with its drivers.
  Wishes wishes = give(card_at, 2);
  wishes.devices[0].purpose = Purpose::leave;
  const auto answer = order(host(), wishes);
  const auto& deeds = std::get<Order>(answer).deeds;
  ASSERT_EQ(deeds.size(), 1U);
  EXPECT_TRUE(std::get<SetVirtualFunctions>(deeds[0].deed).autoprobe_after);
}

Tree with_two_given_away() {
  Tree tree = host();
  tree.functions[3].vfs_now = 2;
  tree.functions[3].autoprobe = false;
  for (std::uint8_t i = 0; i < 2; ++i) {
    Function vf = function(at(3, 16, static_cast<std::uint8_t>(2 * i)), 0x020000, "vfio-pci", 10U + i);
    vf.driver_override = "vfio-pci";
    vf.physical = card_at;
    tree.functions.push_back(vf);
    tree.functions[3].virtual_functions.push_back(vf.address);
  }
  return tree;
}

TEST(Order, ReleasesVirtualFunctionsBeforeTheyAreRemovedOrTheirNumberChanges) {
  EXPECT_EQ(lines(with_two_given_away(), take(card_at)),
            (Lines{"0000:03:00.0 VF 0 vfio-pci/vfio-pci->/", "0000:03:00.0 VF 1 vfio-pci/vfio-pci->/",
                   "0000:03:00.0 vfs 2->0"}));
  const auto other = lines(with_two_given_away(), give(card_at, 3));
  ASSERT_GT(other.size(), 3U);
  EXPECT_EQ(other[2], "0000:03:00.0 vfs 2->3");
}

TEST(Order, BackToTheHostIsTheDriverItHadAndTheLastBoundFirst) {
  Tree tree = host();
  for (auto* f : {&tree.functions[0], &tree.functions[1]}) f->driver = f->driver_override = "vfio-pci";
  Wishes wishes = take(gpu_at);
  wishes.originals = {{{gpu_at, {}}, {"nouveau", ""}}};
  EXPECT_EQ(lines(tree, wishes),
            (Lines{"0000:01:00.1 vfio-pci/vfio-pci->*/", "0000:01:00.0 vfio-pci/vfio-pci->nouveau/"}));
  EXPECT_EQ(lines(host(), take(gpu_at)), Lines{});
}

TEST(Obstacles, NameTheDeviceTheCauseAndAWayOut) {
  EXPECT_TRUE(has(stopped(host(), give(at(9, 0, 0)), Hindrance::no_such_function).why, "not on the PCI bus"));

  Tree tree = host();
  tree.functions[0].group.reset();
  EXPECT_TRUE(has(stopped(tree, give(gpu_at), Hindrance::no_group).why, "the kernel leaves it off"));
  tree.firmware_table = false;
  EXPECT_TRUE(has(stopped(tree, give(gpu_at), Hindrance::no_group).why, "the firmware offers no IOMMU"));

  tree = host();
  tree.groups[0].noiommu = true;
  EXPECT_TRUE(has(stopped(tree, give(gpu_at), Hindrance::no_isolation).why, "vfio-noiommu"));

  tree = host();
  tree.functions[2].group = 7;
  EXPECT_TRUE(has(stopped(tree, give(gpu_at), Hindrance::stranger).why,
                  "0000:02:00.0 (SATA controller, driver ahci)"));
  // Given away together they are no strangers.
  Wishes both = give(gpu_at);
  both.devices.push_back({disk_at, Purpose::virtual_machine, {}, {}});
  EXPECT_EQ(lines(tree, both).size(), 5U);

  tree = host();
  tree.functions.push_back(function(at(0, 1, 0), bridge_class, "pcieport", 7));
  EXPECT_EQ(lines(tree, give(gpu_at)).size(), 3U);  // the kernel lets it be, and it stays
  tree.functions.back().driver = "shpchp";
  EXPECT_TRUE(has(stopped(tree, give(gpu_at), Hindrance::bridge).why, "0000:00:01.0"));

  tree = host();
  tree.functions[0].boot_vga = true;
  EXPECT_TRUE(has(stopped(tree, give(gpu_at), Hindrance::boot_display).why, "display"));

  tree = host();
  for (const auto* use : {"sda1 is mounted on /", "swap on /dev/sda2", "default route through eth0"}) {
    tree.functions[2].uses = {use};
    EXPECT_TRUE(has(stopped(tree, give(disk_at), Hindrance::host_uses).why, use));
  }

  tree = with_two_given_away();
  EXPECT_TRUE(has(stopped(tree, give(card_at), Hindrance::live_functions).why, "2 virtual functions"));

  EXPECT_TRUE(has(stopped(host(), give(gpu_at, 2), Hindrance::no_sriov).why, "no SR-IOV"));
  EXPECT_TRUE(has(stopped(host(), give(card_at, 5), Hindrance::too_many).why, "4 virtual functions at most"));
  tree = host();
  tree.functions[3].driver = "vfio-pci";
  EXPECT_TRUE(has(stopped(tree, give(card_at, 2), Hindrance::no_host_driver).way_out,
                  "bulkhead reclaim 0000:03:00.0"));

  tree = host();
  tree.functions[0].bars_without_room = {1, 3};
  EXPECT_TRUE(has(stopped(tree, give(gpu_at), Hindrance::no_room).why, "BAR 1,3 has no address"));

  Wishes twice = give(gpu_at);
  twice.devices.push_back(twice.devices.front());
  stopped(host(), twice, Hindrance::asked_twice);
}

TEST(Obstacles, NameEveryHolderAndEvictionTakesThemAlong) {
  Tree tree = host();
  tree.functions[0].holders = {{.pid = 41, .start_time = 1, .name = "nvidia-persiste"},
                               {.pid = 42, .start_time = 2, .name = "dcgm"}};
  const auto held = stopped(tree, give(gpu_at), Hindrance::held);
  EXPECT_EQ(held.holders.size(), 2U);
  EXPECT_TRUE(has(held.why, "pid 41 (nvidia-persiste), pid 42 (dcgm)"));
  Wishes wishes = give(gpu_at);
  wishes.evict = true;
  const auto answer = order(tree, wishes);
  EXPECT_EQ(std::get<Order>(answer).deeds[0].evicts.size(), 2U);
  // What a guest has open is not taken back, and its virtual function is not removed under it.
  tree = with_two_given_away();
  tree.functions[4].holders = {{.pid = 77, .start_time = 3, .name = "qemu"}};
  EXPECT_TRUE(
      has(stopped(tree, take(card_at), Hindrance::held).why, "VF 0 (0000:03:10.0) is held by pid 77 (qemu)"));
  // Held by its guest, a device that is with VFIO already is what is wanted.
  EXPECT_EQ(lines(tree, give(card_at, 2)).size(), 2U);
}

TEST(Obstacles, OfAnNvswitchSystemDependOnItsFabricMode) {
  Tree tree = host();
  tree.functions.push_back(function(at(5, 0, 0), 0x068000, "nvidia-nvswitch", 12));
  tree.fabric_mode = 0;
  EXPECT_TRUE(has(stopped(tree, give(gpu_at), Hindrance::fabric).way_out, "FABRIC_MODE=1"));
  tree.fabric_mode = 1;
  EXPECT_EQ(lines(tree, give(gpu_at)).size(), 3U);
  tree.fabric_mode = 0;  // all of them in one guest need nothing of the host's
  Wishes all = give(gpu_at);
  all.devices.push_back({at(5, 0, 0), Purpose::virtual_machine, {}, {}});
  EXPECT_EQ(lines(tree, all).size(), 5U);
}

TEST(Causes, HaveEachACauseAMendAndNoTwin) {
  std::set<std::pair<File, int>> seen;
  for (const auto& row : causes()) {
    EXPECT_TRUE(seen.emplace(row.file, row.err).second) << name_of(row.file) << " " << errno_name(row.err);
    EXPECT_FALSE(row.cause.empty());
    EXPECT_FALSE(row.mend.empty());
    EXPECT_NE(name_of(row.file), "?");
    const Error error = refused(row.file, row.err, "0000:01:00.0");
    EXPECT_TRUE(has(error.message(), row.cause));
    EXPECT_EQ(error.hint(), row.mend);
    EXPECT_EQ(error.native(), row.err);
  }
  EXPECT_EQ(refused(File::set_iommu, EPERM, "d").code(), Errc::permission);
  EXPECT_TRUE(has(refused(File::set_iommu, EPERM, "d").message(),
                  "VFIO_SET_IOMMU: EPERM: interrupts are not remapped"));
  EXPECT_TRUE(
      has(refused(File::unbind, EXDEV, "d").message(), "EXDEV"));  // not in the table: its name is kept
  EXPECT_TRUE(has(causes_as_markdown(), "| `sriov_numvfs` | ERANGE |"));
}

}  // namespace
}  // namespace bulkhead::passthrough
