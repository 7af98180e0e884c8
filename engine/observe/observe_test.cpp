// One look at a twin, whole and broken.
#include "engine/observe/observe.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

#include "edge/nvml/nvml.hpp"
#include "twin/control/control.hpp"

namespace bulkhead::observe {
namespace {

namespace fs = std::filesystem;
using testing::Contains;
using testing::HasSubstr;

class ObserveTest : public testing::Test {
 protected:
  ObserveTest() {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-observe-XXXXXX").string();
    directory_ = ::mkdtemp(pattern.data());
  }
  ~ObserveTest() override { fs::remove_all(directory_); }

  void up(const std::string& profile) {
    const auto made = twin::up({.profile = profile, .directory = twin(), .realtime = false, .init = false});
    ASSERT_TRUE(made.ok()) << made.error().message();
  }
  fs::path twin() const { return directory_ / "twin"; }
  Access access() const {
    return {.root = twin() / "root",
            .nvml_library = (twin() / "lib/libnvidia-ml.so.1").string(),
            .state_dir = twin() / "root/var/lib/bulkhead"};
  }
  inventory::Host look() {
    auto seen = host(access());
    EXPECT_TRUE(seen.ok()) << (seen.ok() ? "" : seen.error().message());
    return seen.ok() ? std::move(seen).value() : inventory::Host{};
  }

  fs::path directory_;
};

TEST_F(ObserveTest, ShowsAcceleratorsOfOtherMakersWithWhatTheyCanDo) {
  up("makers");
  const auto seen = look();
  ASSERT_EQ(seen.gpus.size(), 1U);
  EXPECT_TRUE(seen.lost.empty());
  ASSERT_EQ(seen.accelerators.size(), 3U);  // and not the BMC's display
  const auto& intel = seen.accelerators[0];
  EXPECT_EQ(intel.maker, "Intel");
  EXPECT_TRUE(intel.shares_set);
  ASSERT_EQ(intel.shares.size(), 3U);
  EXPECT_EQ(intel.shares[0].number, 0U);
  EXPECT_FALSE(intel.shares[0].memory);
  EXPECT_EQ(intel.shares[1].quantum_ms.value_or(0), 20U);
  EXPECT_EQ(intel.shares[1].priority.value_or(""), "normal");
  EXPECT_EQ(intel.shares[1].memory.value_or(Bytes(0)).count, 8589934592U);
  EXPECT_THAT(inventory::abilities(intel), Contains("virtual functions: 0 of 2 made"));
  const auto& amd = seen.accelerators[1];
  EXPECT_EQ(amd.maker, "AMD");
  EXPECT_EQ(amd.model.value_or(""), "AMD Instinct MI300X OAM");
  EXPECT_EQ(amd.memory.value_or(Bytes(0)).count, 206141652992U);
  EXPECT_EQ(amd.pci.numa_node.value_or(-1), 1);
  EXPECT_THAT(inventory::abilities(amd), Contains("compute partitions: SPX now, can be SPX, DPX, QPX, CPX"));
  EXPECT_THAT(inventory::abilities(amd), Contains("memory partitions: NPS1 now, can be NPS1, NPS4"));
  const auto json = to_json(seen);
  EXPECT_EQ(json["accelerators"][1]["compute_partition"]["now"], "SPX");
  EXPECT_EQ(json["accelerators"][0]["function_shares"][1]["priority"], "normal");
}

TEST_F(ObserveTest, JoinsWhatTheBusAndTheDriverSayOfEachGpu) {
  up("dgx-h100");
  const auto seen = look();
  ASSERT_EQ(seen.gpus.size(), 8U);
  EXPECT_TRUE(seen.lost.empty());
  EXPECT_EQ(seen.nvswitches.size(), 4U);
  for (const auto& gpu : seen.gpus) {
    EXPECT_EQ(gpu.pci.vendor, 0x10de) << gpu.index;
    EXPECT_EQ(gpu.pci.driver.value_or(""), "nvidia");
    EXPECT_TRUE(gpu.pci.numa_node);
    EXPECT_EQ(gpu.nvlink.links, 18U);
    EXPECT_EQ(gpu.nvlink.fabric_state.value_or(""), "completed");
    EXPECT_EQ(gpu.geometry.memory_slices, 8U);
    EXPECT_EQ(gpu.pool, inventory::Pool::exclusive);
    EXPECT_TRUE(gpu.temperature);
    EXPECT_FALSE(gpu.busy());
  }
}

TEST_F(ObserveTest, AGpuThatOnlyTheBusShowsIsLostWithAReason) {
  up("dgx-h100");
  twin::FaultRequest fault;
  fault.name = "lost-from-nvml";
  fault.gpu = 3;
  const auto broken = twin::break_it(twin(), fault);
  ASSERT_TRUE(broken.ok()) << broken.error().message();
  const auto seen = look();
  EXPECT_EQ(seen.gpus.size(), 7U);
  ASSERT_EQ(seen.lost.size(), 1U);
  EXPECT_FALSE(seen.lost[0].why.empty());
  for (const auto& gpu : seen.gpus) EXPECT_NE(gpu.pci.address, seen.lost[0].pci.address);
}

TEST_F(ObserveTest, AGpuOfVfioIsSetApartAndOneWithoutADriverSaysSo) {
  up("l40s-4");
  Access blind = access();
  blind.nvml_library = (directory_ / "none.so").string();
  auto all = host(blind);
  ASSERT_TRUE(all.ok());
  ASSERT_EQ(all->lost.size(), 4U);
  EXPECT_THAT(all->lost[0].why, HasSubstr("no NVIDIA driver library"));
  EXPECT_THAT(all->notes, Contains(HasSubstr("no NVIDIA driver library")));
  EXPECT_TRUE(all->kernel);

  const fs::path devices = twin() / "root/sys/bus/pci/devices";
  fs::remove(devices / all->lost[0].pci.address.str() / "driver");
  fs::remove(devices / all->lost[1].pci.address.str() / "driver");
  fs::create_symlink("../../../bus/pci/drivers/vfio-pci",
                     devices / all->lost[1].pci.address.str() / "driver");
  all = host(blind);
  ASSERT_TRUE(all.ok());
  EXPECT_EQ(all->lost[0].why, "no driver is bound to it");
  EXPECT_THAT(all->lost[1].why, HasSubstr("vfio-pci"));
}

TEST_F(ObserveTest, InstancesCarryTheirHoldersAndAreForeignWithoutAJournal) {
  up("dgx-h100");
  {
    auto driver = nvml::Nvml::open(access().nvml_library);
    ASSERT_TRUE(driver.ok());
    const auto gpu = *(*driver)->device(5U);
    ASSERT_TRUE((*driver)->set_mig_mode(gpu, true).ok());
    const auto made = (*driver)->create_instance(gpu, 14, {2, 2});
    ASSERT_TRUE(made.ok());
    const auto compute = (*driver)->create_compute(gpu, made->id, 0);
    ASSERT_TRUE(compute.ok());
    const auto pid = twin::attach(
        twin(), {.gpu = 5, .gpu_instance = made->id, .compute_instance = compute->id, .name = "infer"});
    ASSERT_TRUE(pid.ok()) << pid.error().message();
  }
  const auto seen = look();
  ASSERT_EQ(seen.gpus.size(), 8U);
  const auto& gpu = seen.gpus[5];
  EXPECT_EQ(gpu.pool, inventory::Pool::mig);
  ASSERT_EQ(gpu.instances.size(), 1U);
  EXPECT_EQ(gpu.instances[0].name, "2g.20gb");
  EXPECT_FALSE(gpu.instances[0].ours);
  EXPECT_TRUE(gpu.instances[0].busy());
  EXPECT_TRUE(gpu.holders.empty());
  ASSERT_EQ(gpu.instances[0].compute.size(), 1U);
  ASSERT_TRUE(gpu.instances[0].compute[0].uuid);
  ASSERT_EQ(gpu.instances[0].compute[0].holders.size(), 1U);
  EXPECT_THAT(gpu.instances[0].compute[0].holders[0].name, HasSubstr("infer"));
  EXPECT_EQ(seen.gpus[4].pool, inventory::Pool::exclusive);
}

TEST_F(ObserveTest, ABriefLookAsksLessAndSaysSo) {
  up("dgx-h100");
  Access brief = access();
  brief.detail = Detail::brief;
  Cost full_cost, brief_cost;
  ASSERT_TRUE(host(access(), &full_cost).ok());
  const auto seen = host(brief, &brief_cost);
  ASSERT_TRUE(seen.ok());
  const auto calls = [](const Cost& cost) {
    std::uint64_t sum = 0;
    for (const auto& call : cost.driver) sum += call.calls;
    return sum;
  };
  EXPECT_LT(calls(brief_cost), calls(full_cost));
  // The dear ones on an H100 are not asked at all; the others, MIG profiles too, of one board for all eight.
  for (const auto& call : brief_cost.driver) {
    for (const char* dear :
         {"nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetTemperatureThreshold",
          "nvmlDeviceGetVbiosVersion", "nvmlDeviceGetGpuInstanceProfileInfoV", "nvmlDeviceGetNvLinkState"})
      EXPECT_NE(call.function, dear);
  }
  EXPECT_LT(calls(full_cost),
            300U);  // 588 when each board was asked for its profiles and each link for its state
  EXPECT_EQ(seen->gpus[0].clocks.why, "not asked");
  EXPECT_TRUE(seen->gpus[0].temperature);
  // Never the calls that block: energy takes 4 ms on an H100, PCIe throughput 20 ms.
  for (const auto& call : full_cost.driver) {
    EXPECT_NE(call.function, "nvmlDeviceGetTotalEnergyConsumption");
    EXPECT_NE(call.function, "nvmlDeviceGetPcieThroughput");
  }
}

TEST_F(ObserveTest, ARootWithNothingInItIsAnError) {
  fs::create_directories(directory_ / "empty");
  const auto nothing =
      host({.root = directory_ / "empty", .nvml_library = (directory_ / "none.so").string()});
  ASSERT_FALSE(nothing.ok());
  EXPECT_EQ(nothing.error().code(), Errc::not_found);
}

}  // namespace
}  // namespace bulkhead::observe
