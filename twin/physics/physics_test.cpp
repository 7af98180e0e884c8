#include "twin/physics/physics.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>

namespace bulkhead::twin::physics {
namespace {

constexpr std::uint64_t second = 1'000'000'000;

// Numbers of chips/h100-sxm-80gb.yaml.
std::unique_ptr<State> h100(double inlet = 28) {
  auto s = std::make_unique<State>();
  std::memset(static_cast<void*>(s.get()), 0, sizeof(State));
  s->version = state_version;
  s->gpu_count = 2;
  s->chip_count = 1;
  s->next_event = 1;
  s->realtime = 1;
  Chip& c = s->chips[0];
  c.power_idle_mw = 70389;
  c.power_default_mw = c.power_max_mw = 700000;
  c.power_min_mw = 200000;
  c.threshold_shutdown = 95;
  c.threshold_slowdown = 89;
  c.threshold_gpu_max = 87;
  c.r_die_sink = 0.012;
  c.r_sink_air = 0.02;
  c.c_die = 250;
  c.c_sink = 2000;
  c.clock_graphics_max = 1980;
  c.clock_graphics_min = c.clock_graphics_idle = 345;
  c.clock_graphics_step = 15;
  c.clock_memory[0] = 2619;
  c.clock_memory[1] = 1593;
  c.clock_memory_count = 2;
  c.compute_slices = 7;
  for (std::uint32_t g = 0; g < 2; ++g) {
    Gpu& gpu = s->gpus[g];
    gpu.on_pci = gpu.in_nvml = 1;
    gpu.power_limit_mw = 700000;
    gpu.asked_watts = -1;
    gpu.inlet = inlet;
    gpu.watts = gpu.watts_average = 70.389;
    gpu.sink_temperature = inlet + 70.389 * 0.02;
    gpu.temperature = gpu.sink_temperature + 70.389 * 0.012;
  }
  return s;
}

TEST(TwinPhysics, AnIdleBoardStaysWhereItIs) {
  auto s = h100();
  const double before = s->gpus[0].temperature;
  step(*s, 60 * second);
  EXPECT_NEAR(s->gpus[0].temperature, before, 0.01);
  EXPECT_NEAR(s->gpus[0].watts, 70.389, 0.01);
  EXPECT_EQ(s->gpus[0].clock_reasons, 1U);
  EXPECT_EQ(s->gpus[0].clock_graphics, 345);
  EXPECT_NEAR(s->gpus[0].energy_mj, 70.389 * 60 * 1000, 10);
  EXPECT_EQ(s->now_ns, 60 * second);
}

TEST(TwinPhysics, SixHundredWattsWarmTheDieInSecondsAndTheSinkInTensOfSeconds) {
  auto s = h100();
  s->gpus[0].asked_watts = 629;
  step(*s, 10 * second);
  const double die10 = s->gpus[0].temperature, sink10 = s->gpus[0].sink_temperature;
  EXPECT_GT(die10, 36);
  EXPECT_LT(sink10, 33.5);
  step(*s, 290 * second);
  // Steady: inlet + P (R1 + R2), the slope that two captures of real H100s show: 18 C for 559 W.
  EXPECT_NEAR(s->gpus[0].temperature, 28 + 629 * 0.032, 0.5);
  EXPECT_NEAR(s->gpus[0].temperature - 30.25, 18, 0.7);
  EXPECT_NEAR(s->gpus[1].temperature, 30.25, 0.05) << "its neighbour does not notice";
}

TEST(TwinPhysics, PowerFollowsWithInertiaAndTheAverageMoreSlowly) {
  auto s = h100();
  s->gpus[0].asked_watts = 600;
  step(*s, second / 2);
  EXPECT_GT(s->gpus[0].watts, 590);
  EXPECT_LT(s->gpus[0].watts_average, 400);
  step(*s, 5 * second);
  EXPECT_NEAR(s->gpus[0].watts_average, s->gpus[0].watts, 5);
}

TEST(TwinPhysics, ThePowerCapTakesClockAndCountsItsNanoseconds) {
  auto s = h100();
  s->gpus[0].asked_watts = 650;
  s->gpus[0].power_limit_mw = 400000;
  step(*s, 20 * second);
  const Gpu& gpu = s->gpus[0];
  EXPECT_LE(gpu.watts, 400.5);
  EXPECT_GT(gpu.watts, 380);
  EXPECT_LT(gpu.clock_graphics, 1980);
  EXPECT_EQ(gpu.clock_reasons & 0x4U, 0x4U);
  EXPECT_EQ(gpu.ns_power_cap, 20 * second);
  EXPECT_EQ(gpu.ns_hw_thermal, 0U);
  EXPECT_EQ((static_cast<unsigned>(gpu.clock_graphics) - 345U) % 15U, 0U)
      << "a clock the board does not have";
}

TEST(TwinPhysics, FullUtilisationDrawsTheBoardsMaximumAndNoMore) {
  auto s = h100();
  s->gpus[0].asked_busy = 1;
  step(*s, 10 * second);
  EXPECT_NEAR(s->gpus[0].watts, 700, 1);
  EXPECT_NEAR(s->gpus[0].busy, 1, 0.001);
}

TEST(TwinPhysics, HotAirMakesTheDriverThrottleBetweenItsTwoTemperatures) {
  auto s = h100(75);
  s->gpus[0].asked_watts = 650;
  step(*s, 600 * second);
  const Gpu& gpu = s->gpus[0];
  EXPECT_GT(gpu.temperature, 87);
  EXPECT_LT(gpu.temperature, 89.2);
  EXPECT_EQ(gpu.clock_reasons & 0x20U, 0x20U);
  EXPECT_GT(gpu.ns_sw_thermal, 300 * second);
  EXPECT_LT(gpu.clock_graphics, 1980);
}

TEST(TwinPhysics, ABoardTooHotSlowsDownByItselfThenShutsDownAndIsLost) {
  auto s = h100(88);
  s->gpus[0].asked_watts = 700;
  step(*s, 300 * second);
  EXPECT_GT(s->gpus[0].ns_hw_thermal, 0U);
  s->gpus[0].inlet = 110;
  step(*s, 300 * second);
  EXPECT_EQ(s->gpus[0].on_pci, 0U);
  EXPECT_EQ(s->events[1 % max_events].xid, 79U);
  EXPECT_EQ(s->next_event, 2U) << "once";
  EXPECT_LT(s->gpus[0].watts, 0.01);
}

TEST(TwinPhysics, ALockedClockHoldsUnderLoadAndMakesTheBoardDrawLess) {
  auto s = h100();
  s->gpus[0].asked_busy = 1;
  s->gpus[0].clock_lock_low = 1200;
  s->gpus[0].clock_lock_high = 1500;
  step(*s, 10 * second);
  EXPECT_EQ(s->gpus[0].clock_graphics, 1500);
  EXPECT_LT(s->gpus[0].watts, 450);
  s->gpus[0].asked_busy = 0;
  step(*s, 10 * second);
  EXPECT_EQ(s->gpus[0].clock_graphics, 1200) << "not below the lock, even idle";
}

TEST(TwinPhysics, AProcessKeepsOnlyItsSliceBusy) {
  auto s = h100();
  Process& p = s->processes[0];
  p.used = 1;
  p.gpu = 0;
  p.busy = 1;
  p.memory_bytes = 5ULL << 30U;
  p.gpu_instance = p.compute_instance = none;
  step(*s, 10 * second);
  EXPECT_NEAR(s->gpus[0].busy, 1, 0.01);
  s->gpus[0].mig_current = 1;
  GpuInstance& gi = s->gpus[0].instances[0];
  gi.used = 1;
  gi.id = 2;
  gi.compute[0].used = 1;
  gi.compute[0].size = 3;
  p.gpu_instance = 2;
  p.compute_instance = 0;
  step(*s, 10 * second);
  EXPECT_NEAR(s->gpus[0].busy, 3.0 / 7, 0.01);
  EXPECT_EQ(memory_used(*s, 0), 5ULL << 30U);
  EXPECT_EQ(memory_used(*s, 0, 2), 5ULL << 30U);
  EXPECT_EQ(memory_used(*s, 0, 1), 0U);
  EXPECT_EQ(memory_used(*s, 1), 0U);
}

TEST(TwinPhysics, TenSecondsAtOnceAreTenTimesOneSecond) {
  auto once = h100(), often = h100();
  once->gpus[0].asked_busy = often->gpus[0].asked_busy = 0.7;
  step(*once, 10 * second);
  for (int i = 0; i < 10; ++i) step(*often, second);
  EXPECT_EQ(std::memcmp(once.get(), often.get(), sizeof(State)), 0);
}

TEST(TwinPhysics, AYearIsCutShortButItsEnergyIsCounted) {
  auto s = h100();
  s->gpus[0].asked_watts = 500;
  step(*s, 31'536'000 * second);
  EXPECT_NEAR(s->gpus[0].energy_mj / 1e9, 500e-6 * 31'536'000, 1);
  EXPECT_EQ(s->now_ns, 31'536'000 * second);
}

TEST(TwinPhysics, RealTimeIsFollowedInWholeTicksAndOnlyWhenAskedTo) {
  auto s = h100();
  s->last_step_host_ns = 5 * second;
  EXPECT_FALSE(follow(*s, 5 * second + 50'000'000));
  EXPECT_TRUE(follow(*s, 7 * second));
  EXPECT_EQ(s->now_ns, 2 * second);
  EXPECT_TRUE(follow(*s, second)) << "another boot of the real host";
  EXPECT_EQ(s->now_ns, 2 * second);
  s->realtime = 0;
  EXPECT_FALSE(follow(*s, 100 * second));
}

}  // namespace
}  // namespace bulkhead::twin::physics
