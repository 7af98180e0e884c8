#include "cli/top_look.hpp"

#include <gtest/gtest.h>

namespace bulkhead::cli::top {
namespace {

using sample::Signal;
constexpr std::uint64_t second = 1'000'000'000, now = 1'000 * second;

sample::Snapshot two_gpus() {
  sample::Snapshot out{.at_ns = now, .why = {}, .gpus = {}};
  for (unsigned i = 0; i < 2; ++i) {
    sample::Gpu gpu;
    gpu.index = i;
    gpu.uuid = {"GPU-" + std::to_string(i)};
    gpu.name = "NVIDIA H100 80GB HBM3";
    gpu.state = i == 0 ? sample::State::sampling : sample::State::hung;
    gpu.call = i == 0 ? "" : "nvmlDeviceGetPowerUsage";
    gpu.since_ns = now - 7 * second;
    gpu.gpm = true;
    gpu.values[static_cast<std::size_t>(Signal::power)] = {.number = 321, .at_ns = now - 2 * second};
    gpu.slices.push_back({.gpu_instance = 5, .uuid = {"MIG-5"}});
    out.gpus.push_back(gpu);
  }
  return out;
}

TEST(TopLook, ADaemonsTelemetryIsASnapshotWithItsAges) {
  const auto document = parse_json(R"({"at": "2026-11-23T10:00:00Z", "gpus": [
    {"gpu": "GPU-0", "index": 0, "name": "NVIDIA H100 80GB HBM3", "pci": "0000:1b:00.0", "state": "sampling",
     "values": {"power": {"value": 321, "unit": "W", "ageMs": 2000}, "margin": {"unit": "K", "unavailable": "unsupported"}},
     "slices": [{"gpuInstance": 5, "device": "MIG-5", "values": {"sm": {"value": 40, "unit": "%", "ageMs": 100}}}]},
    {"gpu": "GPU-1", "index": 1, "name": "x", "state": "hung", "call": "nvmlDeviceGetPowerUsage", "hungMs": 7000, "slices": []}]})");
  ASSERT_TRUE(document.ok());
  const sample::Snapshot seen = snapshot_of(*document, now);
  ASSERT_EQ(seen.gpus.size(), 2U);
  EXPECT_EQ(seen.gpus[0].uuid.text, "GPU-0");
  EXPECT_EQ(seen.gpus[0].pci.str(), "0000:1b:00.0");
  EXPECT_EQ(seen.gpus[0][Signal::power].number, 321);
  EXPECT_EQ(seen.gpus[0][Signal::power].at_ns, now - 2 * second);
  EXPECT_TRUE(seen.gpus[0][Signal::margin].refused.has_value());
  EXPECT_FALSE(seen.gpus[0][Signal::sm].known());
  ASSERT_EQ(seen.gpus[0].slices.size(), 1U);
  EXPECT_EQ(seen.gpus[0].slices[0].gpu_instance, 5U);
  EXPECT_EQ(seen.gpus[0].slices[0].uuid.text, "MIG-5");
  EXPECT_EQ(seen.gpus[1].index, 1U);
  EXPECT_EQ(seen.gpus[1].state, sample::State::hung);
  EXPECT_EQ(seen.gpus[1].call, "nvmlDeviceGetPowerUsage");
  EXPECT_EQ(seen.gpus[1].since_ns, now - 7 * second);
}

TEST(TopLook, WhatMakesNoSenseInADocumentIsLeftOut) {
  for (const char* text :
       {"{}", R"({"gpus": 7})", R"({"gpus": [7, {"values": []}, {"index": -4, "slices": {}, "name": 3}]})",
        R"({"gpus": [{"index": 1e300, "hungMs": -5, "values": {"power": {"value": 1e99, "ageMs": -1}}}]})"}) {
    const auto document = parse_json(text);
    ASSERT_TRUE(document.ok()) << text;
    const auto snapshot = snapshot_of(*document, now);
    for (const auto& gpu : snapshot.gpus) EXPECT_FALSE(gpu[Signal::power].known()) << text;
  }
}

TEST(TopLook, LeasesStandAtTheSlicesThatTheyHave) {
  View view{.now_ns = now};
  for (auto& gpu : two_gpus().gpus) {
    Gpu one;
    one.seen = gpu;
    view.gpus.push_back(one);
  }
  Sources sources;
  sources.leases =
      Json::array({{{"id", 3},
                    {"tenant", "vision"},
                    {"class", "mig"},
                    {"state", "active"},
                    {"devices", {{{"gpu", "GPU-0"}, {"device", "MIG-5"}, {"profile", "1g.10gb"}}}}},
                   {{"id", 4},
                    {"tenant", "nlp"},
                    {"class", "mig"},
                    {"state", "preparing"},
                    {"devices", {{{"gpu", "GPU-1"}, {"device", ""}, {"profile", "3g.40gb"}, {"start", 0}}}}},
                   {{"id", 5},
                    {"tenant", "gone"},
                    {"class", "mig"},
                    {"state", "ended"},
                    {"devices", {{{"gpu", "GPU-1"}, {"device", "MIG-5"}}}}}});
  join(view, sources);
  ASSERT_EQ(view.parts.size(), 3U);
  EXPECT_EQ(view.parts[0].tenant, "vision");
  EXPECT_EQ(view.parts[0].instance, 5U);
  EXPECT_EQ(view.parts[1].tenant, "");  // the second GPU's slice: its lease has ended
  EXPECT_EQ(view.parts[2].tenant, "nlp");
  EXPECT_EQ(view.parts[2].state, "preparing");
}

TEST(TopLook, ProcessesAreJoinedToTheirSliceAndTenantsOfSharesToTheirGpu) {
  View view{.now_ns = now};
  Gpu whole;
  whole.seen = two_gpus().gpus[0];
  whole.seen.slices.clear();
  view.gpus.push_back(whole);
  inventory::Host host;
  inventory::Gpu gpu;
  gpu.uuid = {"GPU-0"};
  gpu.memory = Bytes(80ULL << 30U);
  for (const int pid : {10, 11}) gpu.holders.push_back({.pid = pid, .name = "job" + std::to_string(pid)});
  host.gpus.push_back(gpu);
  share::Tenant tenant;
  tenant.asked.name = "cheap";
  tenant.asked.weight = 25;
  tenant.asked.gpu = "GPU-0";
  tenant.now = share::Now{.processes = {11}, .busy = 0.2, .used = Bytes(1 << 30)};
  const std::vector<share::Tenant> shares = {tenant};
  Sources sources;
  sources.host = &host;
  sources.shares = &shares;
  join(view, sources);
  ASSERT_EQ(view.parts.size(), 2U);
  EXPECT_EQ(view.parts[0].tenant, "cheap");
  ASSERT_EQ(view.parts[0].processes.size(), 1U);
  EXPECT_EQ(view.parts[0].processes[0].name, "job11");
  ASSERT_EQ(view.parts[1].processes.size(), 1U);
  EXPECT_EQ(view.parts[1].processes[0].pid, 10);
}

}  // namespace
}  // namespace bulkhead::cli::top
