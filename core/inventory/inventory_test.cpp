#include "core/inventory/inventory.hpp"

#include <gtest/gtest.h>

namespace bulkhead::inventory {
namespace {

Host small_host() {
  Host host;
  host.hostname = "dgx-01";
  host.kernel = std::string("5.15.0");
  host.machine = Reading<std::string>::missing("DMI names no product");
  host.cpus_online = 4;
  host.numa = {{.id = 0, .cpus = "0-3", .memory = mebibytes(1)}};
  host.units = {{.name = "nvidia-fabricmanager.service", .load_state = "loaded"}};
  host.lost = {{.pci = {.address = {0, 0x43, 0, 0}, .vendor = 0x10de}, .why = "no driver is bound to it"}};
  host.nvswitches = {PciDevice{.address = {0, 5, 0, 0}, .class_code = 0x068000}};
  host.virtual_functions = {PciDevice{.physical_function = PciAddress{0, 5, 0, 0}}};
  Gpu gpu;
  gpu.index = 3;
  gpu.uuid = {"GPU-1"};
  gpu.model = "NVIDIA H100 80GB HBM3";
  gpu.pci.address = {0, 0x1b, 0, 0};
  gpu.pci.group_siblings = {PciAddress{0, 0x1b, 0, 1}};
  gpu.pci.bars = {{.index = 2, .start = 0x100000000000, .size = 128ULL << 30U, .flags = 0x14220c}};
  gpu.temperature = Celsius(34);
  gpu.margin = Reading<Celsius>::missing("Not Supported (nvmlDeviceGetMarginTemperature)");
  gpu.clocks = Clocks{Megahertz(1980), Megahertz(1980), Megahertz(2619)};
  gpu.ecc = EccCounts{1, 0};
  gpu.mig_capable = gpu.mig_now = true;
  gpu.pool = Pool::mig;
  gpu.geometry = {.memory_slices = 8,
                  .profiles = {{.id = 9, .name = "3g.40gb", .starts = {0, 4}, .size = 4}}};
  GpuInstance busy{.id = 2, .profile = 9, .name = "3g.40gb", .place = {4, 4}};
  busy.compute = {
      {.id = 0, .uuid = Uuid{"MIG-1"}, .holders = {{.pid = 4711, .name = "python3", .gpu_instance = 2U}}}};
  gpu.instances = {{.id = 1, .profile = 9, .name = "3g.40gb", .place = {0, 4}, .ours = true}, busy};
  host.gpus = {gpu};
  return host;
}

TEST(InventoryTest, AGpuIsBusyWhenAnyOfItsSlicesIs) {
  Host host = small_host();
  Gpu& gpu = host.gpus[0];
  EXPECT_TRUE(gpu.busy());
  EXPECT_FALSE(gpu.instances[0].busy());
  ASSERT_NE(gpu.instance(2), nullptr);
  EXPECT_EQ(gpu.instance(2)->holders().size(), 1U);
  EXPECT_EQ(gpu.instance(7), nullptr);
  gpu.instances[1].compute[0].holders.clear();
  EXPECT_FALSE(gpu.busy());
  gpu.holders.push_back({.pid = 1});
  EXPECT_TRUE(gpu.busy());
}

TEST(InventoryTest, EveryPoolHasAName) {
  for (const auto pool : {Pool::exclusive, Pool::mig, Pool::share, Pool::passthrough, Pool::broken}) {
    EXPECT_NE(name_of(pool), "unknown");
  }
}

TEST(InventoryTest, JsonTellsValuesAndReasonsApart) {
  const Json json = to_json(small_host());
  EXPECT_EQ(json["apiVersion"], "bulkhead/v1");
  EXPECT_EQ(json["host"]["kernel"], "5.15.0");
  EXPECT_EQ(json["host"]["machine"]["unavailable"], "DMI names no product");
  const Json& gpu = json["gpus"][0];
  EXPECT_EQ(gpu["index"], 3);
  EXPECT_EQ(gpu["pool"], "mig");
  EXPECT_EQ(gpu["temperature"]["gpu_c"], 34);
  EXPECT_EQ(gpu["temperature"]["margin_c"]["unavailable"], "Not Supported (nvmlDeviceGetMarginTemperature)");
  EXPECT_EQ(gpu["clocks"]["memory_mhz"], 2619);
  EXPECT_EQ(gpu["ecc"]["corrected"], 1);
  EXPECT_EQ(gpu["pci"]["address"], "0000:1b:00.0");
  EXPECT_EQ(gpu["pci"]["iommu_group_siblings"][0], "0000:1b:00.1");
  EXPECT_EQ(gpu["pci"]["bars"][0]["size_bytes"], 137438953472ULL);
  EXPECT_EQ(gpu["mig"]["profiles"][0]["starts"], Json::array({0, 4}));
  EXPECT_EQ(gpu["mig"]["instances"][0]["ours"], true);
  EXPECT_EQ(gpu["mig"]["instances"][0]["busy"], false);
  EXPECT_EQ(gpu["mig"]["instances"][1]["compute_instances"][0]["uuid"], "MIG-1");
  EXPECT_EQ(gpu["mig"]["instances"][1]["compute_instances"][0]["holders"][0]["pid"], 4711);
  EXPECT_EQ(json["lost_gpus"][0]["why"], "no driver is bound to it");
  EXPECT_EQ(json["nvswitches"][0]["class"], "068000");
  EXPECT_EQ(json["virtual_functions"][0]["physical_function"], "0000:05:00.0");
  EXPECT_EQ(json["units"][0]["name"], "nvidia-fabricmanager.service");
  EXPECT_EQ(json["host"]["numa_nodes"][0]["cpus"], "0-3");
}

TEST(InventoryTest, AGpuWithoutMigSaysWhyAndShowsNoProfiles) {
  Host host;
  Gpu gpu;
  gpu.mig_why = "Not Supported (nvmlDeviceGetMigMode)";
  host.gpus = {gpu};
  const Json mig = to_json(host)["gpus"][0]["mig"];
  EXPECT_EQ(mig["capable"], false);
  EXPECT_EQ(mig["why"], gpu.mig_why);
  EXPECT_FALSE(mig.contains("profiles"));
}

}  // namespace
}  // namespace bulkhead::inventory
