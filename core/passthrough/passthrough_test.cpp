#include "core/passthrough/passthrough.hpp"

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include <gtest/gtest.h>

#include <fmt/format.h>

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

TEST(Order, NamesTheFunctionsOfItsSlotThatAreLeftBehindInGroupsOfTheirOwn) {
  Tree tree = host();
  tree.functions[1].group = 17;
  tree.groups.push_back({17, "DMA-FQ", false});
  const auto alone = order(tree, give(gpu_at));
  EXPECT_EQ(std::get<Order>(alone).deeds.size(), 2U);
  const auto notes = join(std::get<Order>(alone).notes, " ");
  EXPECT_TRUE(has(notes, "0000:01:00.1 (audio device, driver snd_hda_intel) of its slot is in another"))
      << notes;
  Wishes both = give(gpu_at);
  both.devices.push_back({at(1, 0, 1), Purpose::virtual_machine, {}, {}});
  const auto together = order(tree, both);
  EXPECT_TRUE(std::get<Order>(together).notes.empty());
  EXPECT_TRUE(std::get<Order>(order(host(), give(gpu_at))).notes.empty());
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

Tree given_away_gpu() {
  Tree tree = host();
  for (auto& f : tree.functions)
    if (f.group == 7U) f.driver = f.driver_override = std::string(vfio_driver);
  return tree;
}

TEST(Order, WithRescanWhatGoesBackIsRepluggedAndItsOverrideIsSpokenOf) {
  Tree tree = given_away_gpu();
  Wishes wishes = take(gpu_at);
  wishes.rescan = true;
  wishes.originals = {{{gpu_at, {}}, {.driver = "nvidia", .driver_override = "nvidia"}}};
  const auto answer = order(tree, wishes);
  const auto* made = std::get_if<Order>(&answer);
  ASSERT_NE(made, nullptr);
  std::size_t replugged = 0;
  for (const auto& one : made->deeds)
    if (const auto* driver = std::get_if<SetDriver>(&one.deed)) replugged += driver->replug ? 1U : 0U;
  EXPECT_EQ(replugged, 2U);  // and its audio function
  const auto notes = join(made->notes, "\n");
  EXPECT_TRUE(has(notes, "nvidia is written again once it is back")) << notes;
  EXPECT_TRUE(has(notes, "so nothing is lost")) << notes;
  wishes.rescan = false;
  const auto without = order(tree, wishes);
  for (const auto& one : std::get<Order>(without).deeds) {
    const auto* driver = std::get_if<SetDriver>(&one.deed);
    EXPECT_TRUE(driver == nullptr || !driver->replug);
  }
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

TEST(Obstacles, OfAServiceThatHoldsTheDeviceSayHowItIsStopped) {
  const struct {
    std::string name, way;
  } rows[] = {{"nvidia-persiste", "systemctl stop nvidia-persistenced"},
              {"nv-hostengine", "systemctl stop nvidia-dcgm"},
              {"dcgm-exporter", "stop its container"},
              {"nv-fabricmanage", "systemctl stop nvidia-fabricmanager"},
              {"Xorg", "systemctl isolate multi-user.target"}};
  for (const auto& row : rows) {
    Tree tree = host();
    tree.functions[0].holders = {{.pid = 41, .start_time = 1, .name = row.name}};
    const auto held = stopped(tree, give(gpu_at), Hindrance::held);
    EXPECT_TRUE(has(held.why, fmt::format("held by pid 41 ({})", row.name)));
    EXPECT_TRUE(has(held.way_out, row.way)) << held.way_out;
    EXPECT_FALSE(has(held.way_out, "--evict")) << "systemd would start it again";
    tree.functions[0].holders.push_back({.pid = 42, .start_time = 1, .name = "python3"});
    const auto both = stopped(tree, give(gpu_at), Hindrance::held);
    EXPECT_TRUE(has(both.way_out, row.way) && has(both.way_out, "the others")) << both.way_out;
  }
  Tree tree = host();
  tree.functions[0].holders = {{.pid = 42, .start_time = 1, .name = "python3"}};
  EXPECT_EQ(stopped(tree, give(gpu_at), Hindrance::held).way_out,
            "stop them, or take it from them with --evict");
}

TEST(Obstacles, OfAGroupNameEachStrangerByWhatItIs) {
  const std::pair<std::uint32_t, const char*> kinds[] = {{0x010601, "SATA controller"},
                                                         {0x0c0330, "USB controller"},
                                                         {0x020000, "network card"},
                                                         {0x010802, "NVMe controller"},
                                                         {0x060100, "ISA bridge"}};
  for (const auto& [code, words] : kinds) {
    Tree tree = host();
    tree.functions.push_back(function(at(0, 0x1f, 2), code, "some", 7));
    EXPECT_TRUE(has(stopped(tree, give(gpu_at), Hindrance::stranger).why,
                    fmt::format("0000:00:1f.2 ({}, driver some)", words)));
  }
}

TEST(Obstacles, OfTheChipsetAreStrangersInTheirOwnSlotToo) {
  Tree tree = host();
  const auto isa_at = at(1, 0, 2);  // beside the device, as an ISA bridge is beside a SATA controller
  for (const std::uint32_t code : {0x060100U, 0x0c0500U}) {
    tree.functions.push_back(function(isa_at, code, "", 7));
    EXPECT_TRUE(has(stopped(tree, give(gpu_at), Hindrance::stranger).why, "0000:01:00.2 (")) << code;
    Wishes both = give(gpu_at);  // somebody may know better
    both.devices.push_back({isa_at, Purpose::virtual_machine, {}, {}});
    EXPECT_TRUE(std::holds_alternative<Order>(order(tree, both))) << code;
    tree.functions.pop_back();
  }
}

TEST(Obstacles, NameAVirtualMachineOnceForAllFunctionsOfItsGroupAndEvictionEndsItOnce) {
  Tree tree = given_away_gpu();
  for (auto& f : tree.functions)
    if (f.group == 7U) f.holders = {{.pid = 77, .start_time = 3, .name = "qemu"}};
  const auto answer = order(tree, take(gpu_at));
  EXPECT_EQ(std::get<std::vector<Obstacle>>(answer).size(), 1U);
  Wishes wishes = take(gpu_at);
  wishes.evict = true;
  const auto evicting = order(tree, wishes);
  std::vector<std::size_t> evicts;
  for (const auto& one : std::get<Order>(evicting).deeds)
    if (std::holds_alternative<SetDriver>(one.deed)) evicts.push_back(one.evicts.size());
  EXPECT_EQ(evicts, (std::vector<std::size_t>{1, 0}));  // before the first function goes
}

TEST(Obstacles, OfADeviceWithoutADriverThatAGuestHasOpenIsTheGuest) {  // an unbind of it waits
  Tree tree = host();
  tree.functions[0].driver.clear();
  EXPECT_EQ(lines(tree, take(gpu_at)), Lines{});
  tree.functions[0].holders = {{.pid = 77, .start_time = 3, .name = "qemu"}};
  EXPECT_TRUE(has(stopped(tree, take(gpu_at), Hindrance::held).why, "held by pid 77 (qemu)"));
}

TEST(Obstacles, OfADeviceWhoseUnbindHangsIsThatAlone) {
  Tree tree = host();
  tree.functions[1].stuck = true;  // the audio function of the GPU
  EXPECT_TRUE(has(stopped(tree, give(gpu_at), Hindrance::stuck).why, "0000:01:00.1 hangs in the kernel"));
  EXPECT_TRUE(has(stopped(tree, take(gpu_at), Hindrance::stuck).way_out, "ps -eo"));
  EXPECT_EQ(lines(tree, give(card_at, 1)).size(), 3U);  // others are not its business
  tree = with_two_given_away();
  tree.functions[5].stuck = true;
  EXPECT_TRUE(has(stopped(tree, take(card_at), Hindrance::stuck).why, "0000:03:10.2 hangs"));
}

TEST(Obstacles, OfADeviceThatAnswersNothingIsThatAndItMayGoBackToTheHost) {
  Tree tree = host();
  tree.functions[1].dead = true;  // the audio function goes with the GPU
  EXPECT_TRUE(has(stopped(tree, give(gpu_at), Hindrance::dead).why, "0000:01:00.1: its config space"));
  EXPECT_TRUE(has(stopped(tree, give(gpu_at), Hindrance::dead).way_out, "power-cycle"));
  EXPECT_EQ(lines(tree, give(card_at, 1)).size(), 3U);
  tree = with_two_given_away();
  tree.functions[5].dead = true;
  EXPECT_TRUE(has(stopped(tree, give(card_at, 2), Hindrance::dead).why, "0000:03:10.2: its config space"));
  tree = given_away_gpu();
  tree.functions[0].dead = true;  // given away and proved once: a guest would not start all the same
  Wishes wishes = give(gpu_at);
  wishes.proved = {{gpu_at, {}}};
  EXPECT_TRUE(has(stopped(tree, wishes, Hindrance::dead).why, "without power"));
  const auto back = order(tree, take(gpu_at));
  EXPECT_EQ(std::get<Order>(back).deeds.size(), 2U);
  EXPECT_TRUE(has(join(std::get<Order>(back).notes, " "), "bulkhead reclaim 0000:01:00.0 --rescan"));
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

// ---- a reset of the slot
TEST(SlotReset, MayBeWhenEveryFunctionThereIsWithVfioAndInTheGroupThatIsOpen) {
  const TakenAlong own[] = {{gpu_at, 7, "vfio-pci"}, {at(1, 0, 1), 7, "vfio-pci"}};
  EXPECT_TRUE(slot_reset(own, 7).may);
  EXPECT_EQ(slot_reset(own, 7).why, "");
  const TakenAlong variant[] = {{gpu_at, 7, "vfio-pci"}, {at(1, 0, 1), 7, "vfio_pci_of_a_vendor"}};
  EXPECT_TRUE(slot_reset(variant, 7).may);
  EXPECT_FALSE(slot_reset(own, 8).may);  // another group is open
}

TEST(SlotReset, TakesNobodyAlongWhoWasLeftBehindAndNamesThem) {
  const TakenAlong one[] = {{gpu_at, 7, "vfio-pci"}, {at(1, 0, 1), 7, "snd_hda_intel"}};
  EXPECT_FALSE(slot_reset(one, 7).may);
  EXPECT_EQ(slot_reset(one, 7).why,
            "a reset of its slot would take 0000:01:00.1 (snd_hda_intel) along, which is left behind");
  // Without a driver it is VFIO's neither: the kernel would refuse, and a driver may come at any time.
  const TakenAlong two[] = {{gpu_at, 7, "vfio-pci"}, {at(1, 0, 1), 7, ""}, {at(1, 0, 2), 8, "xhci_hcd"}};
  EXPECT_EQ(slot_reset(two, 7).why,
            "a reset of its slot would take 0000:01:00.1 (no driver), 0000:01:00.2 (xhci_hcd) along, which "
            "are left behind");
  const TakenAlong stub[] = {{gpu_at, 7, "vfio-pci"}, {at(1, 0, 1), 7, "pci-stub"}};
  EXPECT_FALSE(slot_reset(stub, 7).may);
}

TEST(SlotReset, LeavesAFunctionInAnotherGroupToItsOwnGuest) {
  const TakenAlong ports[] = {{gpu_at, 7, "vfio-pci"}, {at(1, 0, 1), 8, "vfio-pci"}};
  for (const unsigned group : {7U, 8U}) {
    EXPECT_FALSE(slot_reset(ports, group).may);
    EXPECT_TRUE(has(slot_reset(ports, group).why, "nobody has any of its functions open"));
  }
}

TEST(SlotReset, IsNotDoneForAnAnswerThatNamesNobody) {
  EXPECT_FALSE(slot_reset({}, 7).may);
  EXPECT_FALSE(slot_reset({}, 7).why.empty());
}

TEST(SlotReset, EachErrnoOfItHasWordsAndAMend) {
  const struct {
    File file;
    int err;
    Errc code;
    std::string_view words;
  } rows[] = {
      {File::slot_reset_info, ENODEV, Errc::not_found, "neither its slot nor its bus can be reset"},
      {File::slot_reset_info, ENOSPC, Errc::no_capacity, "more functions than there is room to name"},
      {File::slot_reset_info, EAGAIN, Errc::io, "a function came while they were counted"},
      {File::slot_reset_info, EPERM, Errc::permission, "in no IOMMU group"},
      {File::slot_reset, EINVAL, Errc::io, "not with VFIO, or in a group that is not ours"},
      {File::slot_reset, EBUSY, Errc::in_use, "works on a function of its slot"},
      {File::slot_reset, EAGAIN, Errc::io, "works on its slot at this moment"},
      {File::slot_reset, ENODEV, Errc::not_found, "neither its slot nor its bus can be reset"},
      {File::slot_reset, ENOTTY, Errc::io, "the port above has no way"},
  };
  for (const auto& row : rows) {
    const Error error = refused(row.file, row.err, "0000:01:00.0");
    EXPECT_TRUE(has(error.message(), row.words)) << error.message();
    EXPECT_TRUE(has(error.message(), fmt::format("{}: {}", name_of(row.file), errno_name(row.err))));
    EXPECT_EQ(error.code(), row.code) << error.message();
    EXPECT_NE(error.hint(), "dmesg") << error.message();
  }
  // One that no row has keeps its name and says where to look.
  EXPECT_TRUE(has(refused(File::slot_reset, EIO, "d").message(), "VFIO_DEVICE_PCI_HOT_RESET: EIO"));
  EXPECT_EQ(refused(File::slot_reset, EIO, "d").hint(), "dmesg");
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

std::string text_of(const std::filesystem::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(Causes, AreEachSeenInAScenarioThatNamesTheErrnoOrReadInANamedFunctionOfTheKernel) {
  const std::filesystem::path scenarios = BULKHEAD_SOURCE_DIR "/tests/lab/scenarios";
  for (const auto& row : causes()) {
    const auto& [scenario, source] = row.evidence;
    const std::string name = std::string(name_of(row.file)) + " " + errno_name(row.err);
    EXPECT_NE(scenario.empty(), source.empty()) << name;
    if (scenario.empty()) {
      EXPECT_TRUE(has(std::string(source), ".c: ")) << name;
      continue;
    }
    const auto text = text_of(scenarios / (std::string(scenario) + ".sh"));
    ASSERT_FALSE(text.empty()) << name << ": there is no scenario " << scenario;
    // A wait has no errno until a deadline gives it one, nor has an answer that is yes; a group that is not
    // viable is a flag.
    if (row.err != 0 && row.err != ETIMEDOUT && row.file != File::group_status) {
      EXPECT_TRUE(has(text, errno_name(row.err))) << name << ": not in " << scenario;
    }
  }
}

TEST(Causes, StandInTheDocumentAsTheyAreHere) {
  const auto page = text_of(BULKHEAD_SOURCE_DIR "/docs/design/passthrough.md");
  EXPECT_TRUE(has(page, causes_as_markdown())) << causes_as_markdown();
}

// ---- libvirt
Tree given_away() {
  Tree tree = host();
  for (auto& f : tree.functions) {
    if (f.group == tree.find(gpu_at)->group && !f.is_bridge()) f.driver = std::string(vfio_driver);
    f.numa_node = 1;
    f.local_cpus = "8-15";
  }
  return tree;
}

TEST(Libvirt, AGuestGetsTheWholeGroupAndThePlaceItIsNear) {
  const Tree tree = given_away();
  const PciAddress asked[] = {gpu_at, gpu_at};
  const auto got = handed(tree, asked);
  ASSERT_TRUE(got.ok()) << got.error().message();
  std::vector<PciAddress> members;
  for (const auto* member : tree.members(*tree.find(gpu_at)->group))
    if (!member->is_bridge()) members.push_back(member->address);
  EXPECT_GT(members.size(), 1U);
  EXPECT_EQ(got->devices, members);
  EXPECT_EQ(got->node, 1U);
  EXPECT_EQ(got->cpus, "8-15");
}

TEST(Libvirt, AMemberThatTheHostHasIsRefusedByName) {
  Tree tree = given_away();
  const PciAddress asked[] = {gpu_at};
  for (auto& f : tree.functions)
    if (f.group == tree.find(gpu_at)->group && f.address != gpu_at && !f.is_bridge())
      f.driver = "snd_hda_intel";
  const auto got = handed(tree, asked);
  ASSERT_FALSE(got.ok());
  EXPECT_EQ(got.error().code(), Errc::conflict);
  EXPECT_TRUE(has(got.error().message(), "which shares IOMMU group"));
  EXPECT_TRUE(has(got.error().message(), "snd_hda_intel"));
  const PciAddress nothing[] = {at(0x77, 0, 0)};
  EXPECT_EQ(handed(tree, nothing).error().code(), Errc::not_found);
}

TEST(Libvirt, DevicesOfTwoNodesOrOfAnUnknownOnePinNothing) {
  Tree tree = given_away();
  for (auto& f : tree.functions)
    if (f.address == card_at) f.driver = std::string(vfio_driver), f.numa_node = 0, f.local_cpus = "0-7";
  const PciAddress both[] = {gpu_at, card_at};
  auto got = handed(tree, both);
  ASSERT_TRUE(got.ok()) << got.error().message();
  EXPECT_TRUE(got->nodes_differ);
  EXPECT_FALSE(got->node);
  EXPECT_EQ(got->cpus, "");
  for (auto& f : tree.functions)
    if (f.address == card_at) f.numa_node.reset();
  got = handed(tree, both);
  ASSERT_TRUE(got.ok());
  EXPECT_FALSE(got->nodes_differ);
  EXPECT_FALSE(got->node);
}

TEST(Libvirt, TextOfADomainIsEscapedAndItsPagesAreNamed) {
  Machine machine{.name = "a<b'&\"c",
                  .memory = mebibytes(2048),
                  .vcpus = 4,
                  .cpus = "8-15",
                  .node = 1,
                  .hugepage = mebibytes(1024),
                  .devices = {gpu_at}};
  const auto whole = domain_xml(machine);
  EXPECT_TRUE(has(whole, "<name>a&lt;b&#39;&amp;&quot;c</name>"));
  EXPECT_TRUE(has(whole, "<page size='1048576' unit='KiB'/>"));
  EXPECT_TRUE(has(whole, "<vcpu placement='static' cpuset='8-15'>4</vcpu>"));
  EXPECT_TRUE(has(whole, "<memory mode='strict' nodeset='1'/>"));
  EXPECT_TRUE(has(whole, "managed='no'"));
  EXPECT_FALSE(has(whole, "<locked/>"));
  machine.hugepage.reset();
  machine.node.reset();
  machine.cpus.clear();
  const auto bare = snippet_xml(machine);
  EXPECT_FALSE(has(bare, "hugepages"));
  EXPECT_FALSE(has(bare, "numatune"));
  EXPECT_FALSE(has(bare, "cpuset"));
  EXPECT_FALSE(has(bare, "<domain "));
}

}  // namespace
}  // namespace bulkhead::passthrough
