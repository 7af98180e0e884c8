// Against the twin's libnvidia-ml.so.1: the real ABI, a pretend driver.
#include "edge/nvml/nvml.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "twin/control/control.hpp"

namespace bulkhead::nvml {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

class NvmlTest : public testing::Test {
 protected:
  NvmlTest() {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-nvml-XXXXXX").string();
    directory_ = ::mkdtemp(pattern.data());
  }
  ~NvmlTest() override { fs::remove_all(directory_); }

  std::unique_ptr<Nvml> open(const std::string& profile) {
    const auto made =
        twin::up({.profile = profile, .directory = directory_ / "twin", .realtime = false, .init = false});
    EXPECT_TRUE(made.ok()) << (made.ok() ? "" : made.error().message());
    return again();
  }
  std::unique_ptr<Nvml> again() {
    auto opened = Nvml::open((directory_ / "twin/lib/libnvidia-ml.so.1").string());
    EXPECT_TRUE(opened.ok()) << (opened.ok() ? "" : opened.error().message());
    return opened.ok() ? std::move(opened).value() : nullptr;
  }
  fs::path twin() const { return directory_ / "twin"; }

  fs::path directory_;
};

TEST_F(NvmlTest, AMissingLibraryIsNamedWithAHint) {
  const auto missing = Nvml::open((directory_ / "libnvidia-ml.so.1").string());
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.error().code(), Errc::unavailable);
  EXPECT_THAT(missing.error().message(), HasSubstr("no NVIDIA driver library"));
  EXPECT_FALSE(missing.error().hint().empty());
}

TEST_F(NvmlTest, AnotherLibraryIsNotMistakenForNvml) {
  const auto other = Nvml::open("libm.so.6");
  ASSERT_FALSE(other.ok());
  EXPECT_THAT(other.error().message(), HasSubstr("nvmlInit_v2"));
}

TEST_F(NvmlTest, AFileThatIsNoLibraryIsNotCalledMissing) {
  const fs::path file = directory_ / "libnvidia-ml.so.1";
  std::ofstream(file) << "hello";
  const auto text = Nvml::open(file.string());
  ASSERT_FALSE(text.ok());
  EXPECT_THAT(text.error().message(), HasSubstr("cannot load"));
}

TEST_F(NvmlTest, TheGeometryOfAnH100IsWhatARealOneAnsweredWithMigOff) {
  const auto nvml = open("h100-vm");
  ASSERT_NE(nvml, nullptr);
  const auto gpu = nvml->device(0U);
  ASSERT_TRUE(gpu.ok());
  const auto geometry = nvml->geometry(*gpu);
  ASSERT_TRUE(geometry.ok());
  // hosts/h100-sxm-80gb.json, gpu_instance_profiles
  EXPECT_EQ(geometry->memory_slices, 8U);
  ASSERT_EQ(geometry->profiles.size(), 7U);
  const auto find = [&](std::string_view name) {
    for (const auto& profile : geometry->profiles) {
      if (profile.name == name) return profile;
    }
    ADD_FAILURE() << "no profile " << name;
    return mig::Profile{};
  };
  EXPECT_EQ(find("3g.40gb").id, 9U);
  EXPECT_EQ(find("3g.40gb").starts, (std::vector<unsigned>{0, 4}));
  EXPECT_EQ(find("3g.40gb").size, 4U);
  EXPECT_EQ(find("3g.40gb").multiprocessors, 60U);
  EXPECT_EQ(find("1g.10gb").max_instances, 7U);
  EXPECT_EQ(find("1g.10gb+me").nvml_enum, 7U);
  EXPECT_EQ(find("1g.20gb").starts, (std::vector<unsigned>{0, 2, 4, 6}));
  EXPECT_EQ(find("7g.80gb").size, 8U);
}

TEST_F(NvmlTest, AChipWithoutMigSaysUnsupportedInTheDriversWords) {
  const auto nvml = open("l40s-4");
  ASSERT_NE(nvml, nullptr);
  const auto gpu = nvml->device(0U);
  ASSERT_TRUE(gpu.ok());
  const auto mode = nvml->mig_mode(*gpu);
  ASSERT_FALSE(mode.ok());
  EXPECT_EQ(mode.error().code(), Errc::unsupported);
  EXPECT_EQ(mode.error().native(), 3);
  EXPECT_THAT(mode.error().message(), HasSubstr("nvmlDeviceGetMigMode"));
}

TEST_F(NvmlTest, InstancesLiveFromCreationToDestruction) {
  const auto nvml = open("dgx-h100");
  ASSERT_NE(nvml, nullptr);
  const auto gpu = nvml->device(2U);
  ASSERT_TRUE(gpu.ok());
  const auto on = nvml->set_mig_mode(*gpu, true);
  ASSERT_TRUE(on.ok()) << (on.ok() ? "" : on.error().message());
  EXPECT_TRUE(on->in_force) << on->why;  // Hopper needs no reset
  EXPECT_TRUE(nvml->mig_mode(*gpu)->now);

  const auto made = nvml->create_instance(*gpu, 9, {4, 4});
  ASSERT_TRUE(made.ok()) << made.error().message();
  EXPECT_EQ(made->profile_id, 9U);
  EXPECT_EQ(made->place, (mig::Placement{4, 4}));
  const auto full = nvml->create_instance(*gpu, 9, {4, 4});
  ASSERT_FALSE(full.ok());
  EXPECT_EQ(full.error().code(), Errc::no_capacity);
  EXPECT_EQ(full.error().native(), 23);

  const auto compute = nvml->create_compute(*gpu, made->id, 0);
  ASSERT_TRUE(compute.ok()) << compute.error().message();
  EXPECT_EQ(compute->place.size, 3U);
  const auto small = nvml->create_instance(*gpu, 19, {0, 1});
  ASSERT_TRUE(small.ok());
  auto present = nvml->instances(*gpu);
  ASSERT_TRUE(present.ok());
  ASSERT_EQ(present->size(), 2U);
  std::size_t computes = 0;
  for (const auto& instance : *present) computes += instance.compute.size();
  EXPECT_EQ(computes, 1U);
  const auto devices = nvml->mig_devices(*gpu, computes);
  ASSERT_TRUE(devices.ok());
  ASSERT_EQ(devices->size(), 1U);
  EXPECT_EQ((*devices)[0].gpu_instance, made->id);
  EXPECT_THAT((*devices)[0].uuid.text, testing::StartsWith("MIG-"));

  // Another process sees the same.
  const auto other = again();
  const auto same = other->instances(*other->device(2U));
  ASSERT_TRUE(same.ok());
  EXPECT_EQ(same->size(), 2U);

  EXPECT_EQ(nvml->destroy_instance(*gpu, made->id).error().code(),
            Errc::in_use);  // its compute instance first
  ASSERT_TRUE(nvml->destroy_compute(*gpu, made->id, compute->id).ok());
  ASSERT_TRUE(nvml->destroy_instance(*gpu, made->id).ok());
  const auto gone = nvml->destroy_instance(*gpu, made->id);
  ASSERT_FALSE(gone.ok());
  EXPECT_EQ(gone.error().code(), Errc::not_found);
  EXPECT_THAT(gone.error().message(), HasSubstr("GPU instance"));
}

TEST_F(NvmlTest, AComputeInstanceOfNoSuchSizeIsRefusedBeforeTheDriverIsAsked) {
  const auto nvml = open("h100-vm");
  ASSERT_NE(nvml, nullptr);
  const auto gpu = nvml->device(0U);
  ASSERT_TRUE(nvml->set_mig_mode(*gpu, true).ok());
  if (!nvml->mig_mode(*gpu)->now) GTEST_SKIP() << "this machine owes a reset first";
  const auto made = nvml->create_instance(*gpu, 14, {0, 2});
  ASSERT_TRUE(made.ok()) << made.error().message();
  EXPECT_EQ(nvml->create_compute(*gpu, made->id, 5).error().code(), Errc::invalid);
  const auto one = nvml->create_compute(*gpu, made->id, 1);
  ASSERT_TRUE(one.ok());
  EXPECT_EQ(one->place.size, 1U);
}

TEST_F(NvmlTest, ProcessesAreListedWithTheirInstance) {
  const auto nvml = open("dgx-h100");
  ASSERT_NE(nvml, nullptr);
  const auto whole = twin::attach(twin(), {.gpu = 1, .name = "trainer", .memory_bytes = 1ULL << 30U});
  ASSERT_TRUE(whole.ok()) << whole.error().message();
  const auto found = nvml->processes(*nvml->device(1U));
  ASSERT_TRUE(found.ok());
  ASSERT_EQ(found->size(), 1U);
  EXPECT_EQ((*found)[0].pid, static_cast<int>(*whole));
  EXPECT_EQ((*found)[0].memory.value_or(Bytes(0)).count, 1ULL << 30U);
  EXPECT_FALSE((*found)[0].gpu_instance);
  EXPECT_THAT(*nvml->process_name(static_cast<int>(*whole)), HasSubstr("trainer"));
  EXPECT_TRUE(nvml->processes(*nvml->device(0U))->empty());
}

TEST_F(NvmlTest, ManyProcessesDoNotFitTheFirstBufferAndAreAllListed) {
  const auto nvml = open("dgx-h100");
  ASSERT_NE(nvml, nullptr);
  for (int i = 0; i < 150; ++i) ASSERT_TRUE(twin::attach(twin(), {.gpu = 0, .name = "p"}).ok());
  const auto found = nvml->processes(*nvml->device(0U));
  ASSERT_TRUE(found.ok()) << found.error().message();
  EXPECT_EQ(found->size(), 150U);
}

TEST_F(NvmlTest, SettingsAreWrittenAndReadBack) {
  const auto nvml = open("h100-vm");
  ASSERT_NE(nvml, nullptr);
  const auto gpu = *nvml->device(0U);
  ASSERT_TRUE(nvml->set_power_limit(gpu, watts(500)).ok());
  EXPECT_EQ(nvml->power_limit(gpu)->count, 500000U);
  EXPECT_EQ(nvml->sensors(gpu)->limit.value_or(Milliwatts(0)).count, 500000U);
  EXPECT_EQ(nvml->set_power_limit(gpu, watts(5)).error().code(), Errc::invalid);
  ASSERT_TRUE(nvml->set_persistence(gpu, false).ok());
  EXPECT_FALSE(*nvml->persistence(gpu));
  ASSERT_TRUE(nvml->lock_clocks(gpu, Megahertz(1200), Megahertz(1500)).ok());
  ASSERT_TRUE(nvml->unlock_clocks(gpu).ok());
}

TEST_F(NvmlTest, ALostGpuIsGoneAndTheOthersStillAnswer) {
  const auto nvml = open("dgx-h100");
  ASSERT_NE(nvml, nullptr);
  twin::FaultRequest fault;
  fault.name = "fail-call";
  fault.gpu = 3;
  fault.function = "nvmlDeviceGetTemperature";
  fault.code = 15;
  ASSERT_TRUE(twin::break_it(twin(), fault).ok());
  const auto hurt = nvml->temperature(*nvml->device(3U));
  ASSERT_FALSE(hurt.ok());
  EXPECT_EQ(hurt.error().code(), Errc::gone);
  EXPECT_EQ(hurt.error().native(), 15);
  EXPECT_FALSE(hurt.error().hint().empty());
  EXPECT_TRUE(nvml->temperature(*nvml->device(4U)).ok());
}

TEST_F(NvmlTest, TheSensorsOfAnH100ComeInOneCall) {
  const auto nvml = open("h100-vm");
  ASSERT_NE(nvml, nullptr);
  const auto gpu = *nvml->device(0U);
  const auto before = nvml->calls();
  const auto sensors = nvml->sensors(gpu);
  EXPECT_EQ(nvml->calls(), before + 1);
  ASSERT_TRUE(sensors.ok());
  EXPECT_EQ(sensors->limit_default.value_or(Milliwatts(0)).count, 700000U);
  EXPECT_EQ(sensors->limit_min.value_or(Milliwatts(0)).count, 200000U);
  EXPECT_EQ(sensors->ecc_uncorrected.value_or(1), 0U);
  EXPECT_TRUE(sensors->power_average);
}

TEST_F(NvmlTest, MigGeometryIsAskedOnceUntilTheModeChanges) {
  const auto nvml = open("dgx-h100");
  ASSERT_NE(nvml, nullptr);
  const auto gpu = *nvml->device(0U);
  ASSERT_TRUE(nvml->geometry(gpu).ok());
  const auto before = nvml->calls();
  ASSERT_TRUE(nvml->geometry(gpu).ok());
  EXPECT_EQ(nvml->calls(), before);
  ASSERT_TRUE(nvml->set_mig_mode(gpu, true).ok());
  ASSERT_TRUE(nvml->geometry(gpu).ok());
  EXPECT_GT(nvml->calls(), before + 10);
}

}  // namespace
}  // namespace bulkhead::nvml
