#include "twin/profile/profile.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <set>
#include <string>

#include "base/fd.hpp"

namespace bulkhead::twin {
namespace {

namespace fs = std::filesystem;

// A profile file of one's own; chips and devices come from the embedded ones.
class OwnProfile : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-profile-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
    const auto machine = load_profile("mixed", 1);
    ASSERT_TRUE(machine.ok()) << machine.error().message();
    text_ = machine->yaml;
  }
  void TearDown() override { fs::remove_all(directory_); }
  Result<Machine> with(const std::string& from, const std::string& to) {
    std::string text = text_;
    const auto at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
    std::ofstream(directory_ / "own.yaml") << text;
    return load_profile_file(directory_ / "own.yaml", 1);
  }
  fs::path directory_;
  std::string text_;
};

TEST(TwinProfile, EveryProfileLoadsAndSaysWhatItIs) {
  std::set<std::string> names;
  for (const auto& profile : profiles()) {
    names.insert(profile.name);
    EXPECT_FALSE(profile.summary.empty()) << profile.name;
    const auto machine = load_profile(profile.name, 1);
    ASSERT_TRUE(machine.ok()) << machine.error().message();
    EXPECT_GT(machine->state->gpu_count, 0U);
    std::set<std::string> uuids;
    for (std::uint32_t g = 0; g < machine->state->gpu_count; ++g)
      uuids.insert(std::string(machine->state->gpus[g].uuid.view()));
    EXPECT_EQ(uuids.size(), machine->state->gpu_count) << "two GPUs of one name in " << profile.name;
  }
  EXPECT_EQ(names, (std::set<std::string>{"dgx-a100", "dgx-h100", "h100-vm", "hgx-h200", "l40s-4", "makers", "mixed"}));
}

TEST(TwinProfile, DgxH100IsEightGpusFourSwitchesTwoNodes) {
  const auto machine = load_profile("dgx-h100", 1);
  ASSERT_TRUE(machine.ok());
  const State& s = *machine->state;
  EXPECT_EQ(s.gpu_count, 8U);
  EXPECT_EQ(s.nvswitch_count, 4U);
  EXPECT_EQ(machine->host.numa_memory_kib.size(), 2U);
  EXPECT_EQ(s.gpus[0].numa_node, 0U);
  EXPECT_EQ(s.gpus[7].numa_node, 1U);
}

TEST(TwinProfile, TheH100SaysWhatARealOneSaid) {
  const auto machine = load_profile("h100-vm", 1);
  ASSERT_TRUE(machine.ok());
  const State& s = *machine->state;
  const Chip& chip = s.chips[0];
  // nvmlDeviceGetMemoryInfo, ...BAR1MemoryInfo, ...PciInfo, thresholds, power limits of
  // hosts/h100-sxm-80gb.json.
  EXPECT_EQ(chip.model.view(), "NVIDIA H100 80GB HBM3");
  EXPECT_EQ(chip.memory_bytes, 85520809984U);
  EXPECT_EQ(chip.bar1_bytes, 137438953472U);
  EXPECT_EQ(chip.pci_device, 590352606U);
  EXPECT_EQ(chip.pci_subsystem, 381751518U);
  EXPECT_EQ(chip.threshold_shutdown, 95);
  EXPECT_EQ(chip.threshold_slowdown, 89);
  EXPECT_EQ(chip.power_max_mw, 700000U);
  EXPECT_EQ(chip.profile_count, 7U);
  EXPECT_EQ(chip.field_count, 289U);
  EXPECT_EQ(s.virtualization, 1U);
  EXPECT_EQ(s.gpus[0].pci_device, 6U);
  // Fields 193 and 194 are signed margins of -8 and -2.
  for (std::uint32_t i = 0; i < chip.field_count; ++i) {
    if (chip.fields[i].id == 193) {
      EXPECT_EQ(static_cast<std::int32_t>(chip.fields[i].bits), -8);
    }
    if (chip.fields[i].id == 194) {
      EXPECT_EQ(static_cast<std::int32_t>(chip.fields[i].bits), -2);
    }
    if (chip.fields[i].id == 7) {
      EXPECT_EQ(chip.fields[i].nvml_return, 3U);
    }
  }
}

TEST(TwinProfile, TheSameSeedIsTheSameMachineAndAnotherIsNot) {
  const auto a = load_profile("mixed", 7), b = load_profile("mixed", 7), c = load_profile("mixed", 8);
  ASSERT_TRUE(a.ok() && b.ok() && c.ok());
  EXPECT_EQ(std::memcmp(a->state.get(), b->state.get(), sizeof(State)), 0);
  EXPECT_NE(a->state->gpus[0].uuid.view(), c->state->gpus[0].uuid.view());
  EXPECT_NE(a->state->boot_id.view(), c->state->boot_id.view());
}

TEST(TwinProfile, EveryPlacementLiesOnItsChipAndTheFullProfileFillsIt) {
  for (const auto& profile : profiles()) {
    const auto machine = load_profile(profile.name, 1);
    ASSERT_TRUE(machine.ok());
    for (std::uint32_t c = 0; c < machine->state->chip_count; ++c) {
      const Chip& chip = machine->state->chips[c];
      bool full = chip.mig == MigActivation::unsupported;
      for (std::uint32_t p = 0; p < chip.profile_count; ++p) {
        const MigProfile& mig = chip.profiles[p];
        EXPECT_GE(mig.start_count, mig.max_instances) << chip.model.view() << " " << mig.name.view();
        for (std::uint32_t i = 0; i < mig.start_count; ++i)
          EXPECT_LE(mig.starts[i] + mig.size, chip.memory_slices);
        full = full || mig.size == chip.memory_slices;
      }
      EXPECT_TRUE(full) << chip.model.view();
    }
  }
}

TEST(TwinProfile, AnUnknownNameIsAnsweredWithTheClosestOne) {
  const auto machine = load_profile("dgx-h10", 1);
  ASSERT_FALSE(machine.ok());
  EXPECT_EQ(machine.error().code(), Errc::not_found);
  EXPECT_NE(machine.error().hint().find("dgx-h100"), std::string::npos);
}

TEST_F(OwnProfile, AFileOfOnesOwnLoads) {
  const auto machine = with("hostname: mixed", "hostname: mine");
  ASSERT_TRUE(machine.ok()) << machine.error().message();
  EXPECT_EQ(machine->host.hostname, "mine");
}

TEST_F(OwnProfile, AMisspeltKeyIsReportedWithItsLineAndTheRightWord) {
  const auto machine = with("inlet_c:", "inletc:");
  ASSERT_FALSE(machine.ok());
  EXPECT_NE(machine.error().message().find("own.yaml:"), std::string::npos) << machine.error().message();
  const auto extra = with("inlet_c: 28", "inlet_c: 28\nvirtualisation: none");
  ASSERT_FALSE(extra.ok());
  EXPECT_NE(extra.error().message().find("did you mean virtualization"), std::string::npos)
      << extra.error().message();
}

TEST_F(OwnProfile, MistakesOfPlaceAreNamed) {
  const struct {
    const char *from, *to, *says;
  } cases[] = {
      {"chip: a100-sxm4-80gb", "chip: a100-sxm4-81gb", "chips/a100-sxm4-81gb.yaml"},
      {"behind: \"0000:16:01.0\"", "behind: \"0000:99:01.0\"", "no such bridge"},
      {"at: \"0000:31:00.0\"", "at: \"0000:17:00.0\"", "is there twice"},
      {"at: \"0000:31:00.0\"", "at: \"31 00 0\"", "31 00 0"},
      {"numa: 0, group: 11", "numa: 9, group: 11", "no such NUMA node"},
      {"is: aspeed-vga", "is: aspeed", "no such row in devices.yaml"},
      {"caps_major: 236", "caps_major: many", "no number that fits"},
      {"sockets: 2", "sockets: 4000", "1 to 1024 CPUs"},
  };
  for (const auto& c : cases) {
    const auto machine = with(c.from, c.to);
    ASSERT_FALSE(machine.ok()) << c.to;
    EXPECT_NE(machine.error().message().find(c.says), std::string::npos)
        << c.to << " -> " << machine.error().message();
  }
}

TEST_F(OwnProfile, ABrokenYamlAndAnEmptyFileAreErrorsNotCrashes) {
  for (const char* text : {"", "[", "a: [1, 2", "- x", "42", "profile: \xff\xfe"}) {
    std::ofstream(directory_ / "own.yaml") << text;
    EXPECT_FALSE(load_profile_file(directory_ / "own.yaml", 1).ok()) << text;
  }
}

}  // namespace
}  // namespace bulkhead::twin
