// The page that Prometheus reads, made of snapshots.
#include "daemon/serve/metrics_gpus.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "base/text.hpp"

namespace bulkhead::serve {
namespace {

using sample::Signal;
using testing::HasSubstr;
using testing::Not;

constexpr std::uint64_t second = 1'000'000'000, now = 1000 * second;

sample::Value at(double number, std::uint64_t when) { return {.number = number, .at_ns = when}; }
sample::Value& of(sample::Values& values, Signal signal) { return values[static_cast<std::size_t>(signal)]; }

struct World {
  sample::Snapshot seen = {.at_ns = now};
  control::Snapshot leases = {};
  World() {
    for (unsigned i = 0; i < 2; ++i) {
      sample::Gpu gpu{.index = i, .uuid = {i == 0 ? "GPU-a" : "GPU-b"}, .name = "H100"};
      gpu.state = sample::State::sampling;
      of(gpu.values, Signal::power) = at(350.5, now - second);
      of(gpu.values, Signal::energy) = at(12.25, now - second);
      of(gpu.values, Signal::reasons) = at(4, now - second);
      seen.gpus.push_back(gpu);
      leases.gpus.push_back({.gpu = gpu.uuid, .index = i});
    }
    sample::Slice slice{.gpu_instance = 9, .uuid = {"MIG-1"}};
    of(slice.values, Signal::sm) = at(50, now - second);
    seen.gpus[0].slices.push_back(slice);
    slice.gpu_instance = 11;
    seen.gpus[0].slices.push_back(slice);
  }
  void lease(std::int64_t id, const std::string& tenant, lease::Class cls, unsigned gpu,
             std::optional<unsigned> instance) {
    auto one = std::make_shared<lease::Lease>();
    one->id = id;
    one->tenant = tenant;
    one->ask.cls = cls;
    one->state = lease::State::active;
    one->parts.push_back({.gpu = seen.gpus[gpu].uuid, .profile = "3g.40gb", .gpu_instance = instance});
    leases.leases.put(id, one);
    leases.gpus[gpu].leases.push_back(id);
  }
  std::string page(bool dcgm = false) const {
    Page out;
    gpu_metrics(out, seen, leases, dcgm, now);
    return std::move(out).text();
  }
};

TEST(GpuMetrics, a_value_has_the_labels_of_who_has_its_gpu_or_slice) {
  World world;
  world.lease(7, "blue", lease::Class::mig, 0, 9);
  world.lease(8, "red", lease::Class::exclusive, 1, {});
  const auto page = world.page();
  EXPECT_THAT(page, HasSubstr("bulkhead_gpu_power_watts{gpu=\"0\",uuid=\"GPU-a\"} 350.5\n"));
  EXPECT_THAT(
      page,
      HasSubstr("bulkhead_gpu_power_watts{gpu=\"1\",uuid=\"GPU-b\",tenant=\"red\",lease=\"8\"} 350.5\n"));
  EXPECT_THAT(page,
              HasSubstr("bulkhead_slice_sm_active_ratio{gpu=\"0\",uuid=\"GPU-a\",slice=\"9\",tenant=\"blue\","
                        "lease=\"7\"} 0.5\n"));
  EXPECT_THAT(page, HasSubstr("bulkhead_slice_sm_active_ratio{gpu=\"0\",uuid=\"GPU-a\",slice=\"11\"} 0.5\n"));
  EXPECT_THAT(
      page,
      HasSubstr(
          "bulkhead_gpu_clock_event_reason{gpu=\"0\",uuid=\"GPU-a\",reason=\"software_power_cap\"} 1\n"));
  EXPECT_THAT(page,
              HasSubstr("bulkhead_gpu_clock_event_reason{gpu=\"0\",uuid=\"GPU-a\",reason=\"idle\"} 0\n"));
}

TEST(GpuMetrics, shares_of_a_gpu_do_not_make_its_values_somebodys) {
  World world;
  world.lease(7, "blue", lease::Class::share, 1, {});
  const auto page = world.page();
  EXPECT_THAT(page, HasSubstr("bulkhead_gpu_power_watts{gpu=\"1\",uuid=\"GPU-b\"} 350.5\n"));
  EXPECT_THAT(page, HasSubstr("bulkhead_lease_info{lease=\"7\",tenant=\"blue\",class=\"share\""));
}

TEST(GpuMetrics, an_old_value_is_left_out_and_its_age_is_told) {
  World world;
  of(world.seen.gpus[0].values, Signal::power).at_ns = now - 60 * second;
  world.seen.gpus[0].state = sample::State::hung;
  world.seen.gpus[0].since_ns = now - 58 * second;
  // Energy is asked every half minute on this one: a minute is not old yet.
  of(world.seen.gpus[1].values, Signal::energy).at_ns = now - 60 * second;
  world.seen.gpus[1].tier[static_cast<std::size_t>(sample::Tier::energy)].period_ms = 30'000;
  const auto page = world.page();
  EXPECT_THAT(page, Not(HasSubstr("bulkhead_gpu_power_watts{gpu=\"0\"")));
  EXPECT_THAT(page, HasSubstr("bulkhead_gpu_power_watts{gpu=\"1\""));
  EXPECT_THAT(page, HasSubstr("bulkhead_gpu_energy_joules_total{gpu=\"1\",uuid=\"GPU-b\"} 12.25\n"));
  EXPECT_THAT(page, HasSubstr("bulkhead_gpu_hung_seconds{gpu=\"0\",uuid=\"GPU-a\"} 58\n"));
  EXPECT_THAT(page, HasSubstr("state=\"hung\"} 1\n"));
}

TEST(GpuMetrics, no_series_is_told_twice_and_every_family_once) {
  World world;
  world.lease(7, "blue", lease::Class::mig, 0, 9);
  world.seen.host.at_ns = now;
  for (const double value : {8000.0, 0.0, 5000.0})  // a BMC with three fans of one name
    world.seen.host.sensors.push_back(
        {.source = "bmc", .name = "FAN", .kind = "fan", .value = value, .low = 500.0});
  const auto page = world.page(true);
  std::set<std::string> series, families;
  for (const auto line : split_lines(page)) {
    if (line.starts_with("# TYPE")) {
      EXPECT_TRUE(families.insert(std::string(line)).second) << line;
    } else if (!line.starts_with('#')) {
      EXPECT_TRUE(series.insert(std::string(line.substr(0, line.rfind(' ')))).second) << line;
    }
  }
  EXPECT_THAT(
      page,
      HasSubstr(
          "bulkhead_sensor_out_of_bounds{source=\"bmc\",sensor=\"FAN\",number=\"1\",kind=\"fan\"} 1\n"));
}

TEST(GpuMetrics, what_a_driver_or_a_bmc_calls_itself_cannot_break_a_line) {
  World world;
  world.seen.gpus[0].name = "H\"1\\0\n0\x80";
  EXPECT_THAT(world.page(), HasSubstr("name=\"H\\\"1\\\\0\\n0.\""));
}

TEST(GpuMetrics, dcgm_names_are_there_when_asked_for_in_their_units) {
  World world;
  world.lease(7, "blue", lease::Class::mig, 0, 9);
  EXPECT_THAT(world.page(false), Not(HasSubstr("DCGM_FI_")));
  const auto page = world.page(true);
  EXPECT_THAT(page, HasSubstr("# TYPE DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION counter\n"));
  EXPECT_THAT(page, testing::ContainsRegex(
                        "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION\\{gpu=\"0\",UUID=\"GPU-a\",[^}]*\\} 12250\n"));
  EXPECT_THAT(page, testing::ContainsRegex("DCGM_FI_PROF_SM_ACTIVE\\{[^}]*GPU_I_PROFILE=\"3g.40gb\",GPU_I_ID="
                                           "\"9\",tenant=\"blue\",lease=\"7\"\\} 0.5\n"));
}

TEST(GpuMetrics, links_say_when_more_than_a_hundredth_of_a_percent_is_lost) {
  World world;
  world.seen.host = {
      .at_ns = now,
      .ports = {
          {.device = "mlx5_0", .port = 1, .state = "ACTIVE", .packets = 9, .loss = 2e-4, .alarm = true}}};
  of(world.seen.gpus[0].values, Signal::nvlink_error_ratio) = at(5e-4, now - second);
  of(world.seen.gpus[1].values, Signal::nvlink_error_ratio) = at(5e-5, now - second);
  const auto page = world.page();
  EXPECT_THAT(page, HasSubstr("bulkhead_infiniband_loss_alarm{device=\"mlx5_0\",port=\"1\"} 1\n"));
  EXPECT_THAT(page, HasSubstr("bulkhead_gpu_nvlink_error_alarm{gpu=\"0\",uuid=\"GPU-a\"} 1\n"));
  EXPECT_THAT(page, HasSubstr("bulkhead_gpu_nvlink_error_alarm{gpu=\"1\",uuid=\"GPU-b\"} 0\n"));
}

}  // namespace
}  // namespace bulkhead::serve
