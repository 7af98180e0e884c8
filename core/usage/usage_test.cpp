#include "core/usage/usage.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/prng.hpp"

namespace bulkhead::usage {
namespace {

using testing::HasSubstr;

constexpr PowerModel h100{.idle = 70, .sm = 300, .tensor = 200, .dram = 100, .error = 0.05};

Held tenant(std::int64_t lease, unsigned units, std::optional<Activity> activity) {
  return {.lease = lease,
          .tenant = "t",
          .units = units,
          .memory = mebibytes(10240 * units),
          .activity = activity};
}
Interval second(std::vector<Held> held, std::optional<Millijoules> energy) {
  return {.gpu = {"GPU-1"}, .us = 1'000'000, .units = 7, .energy = energy, .held = std::move(held)};
}

TEST(Usage, IdleEnergyOfWhatNobodyHoldsIsTheOperators) {
  const auto interval = second({tenant(1, 3, Activity{}), tenant(2, 2, Activity{})}, Millijoules(70'000));
  const auto out = split(interval, h100).value();
  EXPECT_EQ(out.holders[0].idle_mj, 30'000U);
  EXPECT_EQ(out.holders[1].idle_mj, 20'000U);
  EXPECT_EQ(out.unallocated.idle_mj, 20'000U);
  EXPECT_EQ(out.holders[0].dynamic_mj, 0U);
  EXPECT_TRUE(adds_up(interval, out).ok());
}

TEST(Usage, WhoWorksPaysAndTheNeighbourWhoRestsDoesNot) {
  const auto interval = second({tenant(1, 3, Activity{.sm = 1, .tensor = 0.5}), tenant(2, 4, Activity{})},
                               Millijoules(270'000));
  const auto out = split(interval, h100).value();
  EXPECT_EQ(out.holders[0].dynamic_mj, 200'000U);
  EXPECT_EQ(out.holders[1].dynamic_mj, 0U);
  EXPECT_EQ(out.holders[0].error_mj, 0U);  // one had all of it: measured, not modelled
  EXPECT_EQ(out.holders[0].used_unit_us, 3'000'000U);
  EXPECT_EQ(out.holders[1].used_unit_us, 0U);
  EXPECT_EQ(out.holders[0].sm_us, 3'000'000U / 7);
}

TEST(Usage, TwoWhoWorkShareByUnitsTimesWorkAndTheErrorIsStated) {
  const auto interval = second({tenant(1, 4, Activity{.sm = 0.5}), tenant(2, 2, Activity{.sm = 1})},
                               Millijoules(70'000 + 100'000));
  const auto out = split(interval, h100).value();
  EXPECT_EQ(out.holders[0].dynamic_mj, 50'000U);
  EXPECT_EQ(out.holders[1].dynamic_mj, 50'000U);
  EXPECT_EQ(out.holders[0].error_mj, 2'500U);
}

TEST(Usage, WhereActivityIsUnknownTheHolderCountsAsBusyAndItSaysSo) {
  const auto interval =
      second({tenant(1, 1, std::nullopt), tenant(2, 1, Activity{.sm = 1})}, Millijoules(170'000));
  const auto out = split(interval, h100).value();
  EXPECT_EQ(out.holders[0].dynamic_mj, out.holders[1].dynamic_mj);
  EXPECT_EQ(out.holders[0].blind_us, 1'000'000U);
  EXPECT_EQ(out.holders[1].blind_us, 0U);
}

TEST(Usage, EnergyOfAnEmptyGpuAndOfOneThatRestsLosesNothing) {
  auto interval = second({}, Millijoules(100'001));
  EXPECT_TRUE(adds_up(interval, split(interval, h100).value()).ok());
  EXPECT_EQ(split(interval, h100).value().unallocated.dynamic_mj, 30'001U);
  interval = second({tenant(1, 2, Activity{})}, Millijoules(100'001));
  EXPECT_EQ(split(interval, h100).value().holders[0].dynamic_mj, 30'001U);
  interval.out_of_service = 5;
  EXPECT_EQ(split(interval, h100).value().out_of_service.idle_mj, 50'000U);
}

TEST(Usage, AnUnmeteredIntervalHasTimeAndNoJoules) {
  const auto interval = second({tenant(1, 7, Activity{.sm = 1})}, std::nullopt);
  const auto out = split(interval, h100).value();
  EXPECT_EQ(out.holders[0].idle_mj + out.holders[0].dynamic_mj, 0U);
  EXPECT_EQ(out.holders[0].unmetered_us, 1'000'000U);
  EXPECT_TRUE(adds_up(interval, out).ok());
}

TEST(Usage, AnySplitAddsUpToTheLastMillijoule) {
  Prng random(7);
  for (int round = 0; round < 20'000; ++round) {
    Interval interval{.gpu = {"GPU-1"},
                      .us = 1 + random.below(most_us),
                      .units = static_cast<unsigned>(1 + random.below(most_units)),
                      .held = {}};
    unsigned left = interval.units;
    interval.out_of_service = static_cast<unsigned>(random.below(left + 1)) / 3;
    left -= interval.out_of_service;
    while (left > 0 && interval.held.size() < 9) {
      const auto units = static_cast<unsigned>(random.below(left + 1));
      left -= units;
      std::optional<Activity> activity;
      if (random.below(4) != 0)
        activity = Activity{.sm = random.unit(), .tensor = random.unit(), .dram = random.unit()};
      interval.held.push_back(tenant(round, units, activity));
      if (random.below(3) == 0) break;
    }
    if (random.below(10) != 0) interval.energy = Millijoules(random.below(std::uint64_t{1} << 40U));
    const PowerModel model{.idle = random.unit() * 100,
                           .sm = random.unit() * 300,
                           .tensor = random.below(2) == 0 ? 0.0 : random.unit(),
                           .dram = 0};
    const auto out = split(interval, model);
    ASSERT_TRUE(out.ok()) << out.error().message();
    const Status sums = adds_up(interval, *out);
    ASSERT_TRUE(sums.ok()) << sums.error().message();
  }
}

TEST(Usage, AccountsThatDoNotAddUpAreNamed) {
  const auto interval = second({tenant(1, 3, Activity{.sm = 1})}, Millijoules(100'000));
  auto out = split(interval, h100).value();
  out.unallocated.idle_mj += 1;
  EXPECT_THAT(adds_up(interval, out).error().message(), HasSubstr("energy in all (mJ) is 100001"));
  out = split(interval, h100).value();
  out.holders[0].used_unit_us = out.holders[0].unit_us + 1;
  EXPECT_THAT(adds_up(interval, out).error().message(), HasSubstr("used time"));
}

TEST(Usage, MoreThanThereIsCannotBeSplit) {
  EXPECT_THAT(split(second({tenant(1, 5, {}), tenant(2, 3, {})}, {}), h100).error().message(),
              HasSubstr("8 units of a GPU that has 7"));
  EXPECT_FALSE(split(second({tenant(1, 1, Activity{.sm = 1.5})}, {}), h100).ok());
  auto turns = second({tenant(1, 1, Activity{.sm = 1.5}), tenant(2, 2, Activity{.sm = 0.75})}, {});
  turns.held[0].turns = turns.held[1].turns = true;
  const auto of_both = split(turns, h100);
  ASSERT_TRUE(of_both.ok());  // a seventh that had what others left it
  EXPECT_EQ(of_both->holders[0].used_unit_us, of_both->holders[0].unit_us);
  EXPECT_EQ(of_both->holders[0].sm_us, of_both->holders[1].sm_us);
  turns.held[0].activity->sm = 7.5;
  EXPECT_FALSE(split(turns, h100).ok());  // more than the GPU
  auto interval = second({}, {});
  interval.us = most_us + 1;
  EXPECT_FALSE(split(interval, h100).ok());
}

TEST(Usage, ACounterThatBeganAnewMeasuresNothing) {
  const Counter then{.boot_id = "a", .driver_epoch = 1, .value = Millijoules(1000)};
  EXPECT_EQ(passed(then, {"a", 1, Millijoules(1500)}), Millijoules(500));
  EXPECT_FALSE(passed(then, {"b", 1, Millijoules(1500)}));
  EXPECT_FALSE(passed(then, {"a", 2, Millijoules(1500)}));
  EXPECT_FALSE(passed(then, {"a", 1, Millijoules(999)}));
}

TEST(Usage, AFitFindsTheWattsThatMadeTheSamples) {
  Prng random(3);
  std::vector<Sample> samples;
  for (int i = 0; i < 200; ++i) {
    const Activity a{.sm = random.unit(), .tensor = random.unit(), .dram = random.unit()};
    const double noise = (random.unit() - 0.5) * 10;
    samples.push_back({a, 70 + 300 * a.sm + 200 * a.tensor + 100 * a.dram + noise});
  }
  const auto model = fit(samples).value();
  EXPECT_NEAR(model.idle, 70, 3);
  EXPECT_NEAR(model.sm, 300, 3);
  EXPECT_NEAR(model.tensor, 200, 3);
  EXPECT_NEAR(model.dram, 100, 3);
  EXPECT_LT(model.error, 0.02);
}

TEST(Usage, ATermThatWouldBeNegativeIsNothing) {
  std::vector<Sample> samples;
  Prng random(5);
  for (int i = 0; i < 50; ++i) {
    const Activity a{.sm = random.unit(), .tensor = 0, .dram = random.unit()};
    samples.push_back({a, 100 + 300 * a.sm - 20 * a.dram});
  }
  const auto model = fit(samples).value();
  EXPECT_EQ(model.dram, 0);
  EXPECT_EQ(model.tensor, 0);
  EXPECT_NEAR(model.sm, 300, 10);
}

TEST(Usage, PowerThatDoesNotMoveCannotBeFitted) {
  const std::vector<Sample> still(20, Sample{{.sm = 0.5, .tensor = 0, .dram = 0}, 100});
  EXPECT_FALSE(fit(std::vector<Sample>(3, still[0])).ok());
  const std::vector<Sample> idle(20, Sample{{}, 100});
  EXPECT_THAT(fit(idle).error().message(), HasSubstr("did not move"));
}

TEST(Usage, EnergyBetweenTwoReadingsGoesToBeforeAndAfterByWhatWasDrawn) {
  Prng random(9);
  for (int i = 0; i < 300; ++i) {
    std::vector<Interval> pieces;
    for (std::uint64_t n = 1 + random.below(6); n > 0; --n) {
      auto one =
          second({tenant(1, 3, Activity{.sm = random.unit()}), tenant(2, 2, std::nullopt)}, std::nullopt);
      one.us = 1 + random.below(1'000'000);
      if (random.below(2) == 0) one.held.clear();
      pieces.push_back(one);
    }
    const PowerModel model = random.below(3) == 0 ? PowerModel{.idle = 0, .sm = 0} : h100;
    const Millijoules energy(random.below(2'000'000));
    ASSERT_TRUE(portion(pieces, energy, model).ok());
    std::uint64_t sum = 0;
    for (const auto& one : pieces) {
      sum += one.energy->count;
      EXPECT_TRUE(adds_up(one, split(one, model).value()).ok());
    }
    EXPECT_EQ(sum, energy.count);
  }
  // One who worked for a second, then nobody for a second: 370 W and 70 W.
  std::vector<Interval> two{second({tenant(1, 7, Activity{.sm = 1})}, std::nullopt),
                            second({}, std::nullopt)};
  ASSERT_TRUE(portion(two, Millijoules(440'000), h100).ok());
  EXPECT_EQ(two[0].energy, Millijoules(370'000));
  EXPECT_EQ(two[1].energy, Millijoules(70'000));
  EXPECT_EQ(split(two[0], h100).value().holders[0].error_mj, 15'000U);  // alone, but by the model
}

}  // namespace
}  // namespace bulkhead::usage
