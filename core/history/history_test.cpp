#include "core/history/history.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

#include "base/prng.hpp"

namespace bulkhead::history {
namespace {

TEST(History, ASecondIsTheMeanOfWhatCameInItAndAMinuteKeepsItsWorst) {
  History history;
  const auto series = history.open({.step = 0.5});
  ASSERT_TRUE(series);
  for (unsigned tenth = 0; tenth < 1300; ++tenth)
    history.add(*series, tenth / 10.0, tenth == 305 ? 900 : 100);
  const auto seconds = history.query(*series, 0, 1000, History::Grain::second);
  ASSERT_EQ(seconds.size(), 129U);  // the one under way is not among them
  EXPECT_EQ(seconds[29].mean, 100);
  EXPECT_EQ(seconds[30].mean, 180);
  const auto minutes = history.query(*series, 0, 1000, History::Grain::minute);
  ASSERT_EQ(minutes.size(), 2U);
  EXPECT_NEAR(minutes[0].mean, 100 + 80.0 / 60, 0.5);
  EXPECT_EQ(minutes[0].worst, 900);
  EXPECT_EQ(minutes[1].worst, 100);
}

TEST(History, OfASeriesWhereLowIsBadTheLowestIsKept) {
  History history;
  const auto series = history.open({.step = 1, .worst = Worst::low});
  for (unsigned s = 0; s < 120; ++s) history.add(*series, s, s == 7 ? 2 : 40);
  const auto minutes = history.query(*series, 0, 120, History::Grain::minute);
  ASSERT_GE(minutes.size(), 1U);
  EXPECT_EQ(minutes[0].worst, 2);
}

TEST(History, WhatWasNotHeardIsAGap) {
  History history;
  const auto series = history.open({});
  for (unsigned s = 0; s < 1000; ++s) {
    if (s < 100 || s >= 700) history.add(*series, s, 5);
  }
  const auto seconds = history.query(*series, 0, 999, History::Grain::second);
  EXPECT_EQ(seconds.size(), 100U + 299U);
  for (const Point& point : seconds) EXPECT_TRUE(point.at_s < 100 || point.at_s >= 700);
  EXPECT_TRUE(history.query(*series, 200, 600, History::Grain::second).empty());
}

TEST(History, NonsenseAndThePastCountForNothing) {
  History history;
  const auto series = history.open({});
  history.add(*series, 10, 1);
  history.add(*series, 11, 2);
  history.add(*series, 5, 100);
  history.add(*series, -1, 100);
  history.add(*series, 12, std::nan(""));
  history.add(*series, std::numeric_limits<double>::infinity(), 3);
  history.add(99, 12, 3);
  history.add(*series, 12, 3);
  const auto seconds = history.query(*series, 0, 100, History::Grain::second);
  ASSERT_EQ(seconds.size(), 2U);
  EXPECT_EQ(seconds[0].mean, 1);
  EXPECT_EQ(seconds[1].mean, 2);
  EXPECT_TRUE(history.query(*series, 100, 0, History::Grain::second).empty());
  EXPECT_TRUE(history.query(77, 0, 100, History::Grain::second).empty());
  EXPECT_FALSE(history.open({.step = 0}));
}

// Whatever comes, each second comes back to half a step, or not at all once it is too old.
TEST(History, WhatGoesInComesOut) {
  Prng prng(7);
  for (unsigned round = 0; round < 40; ++round) {
    History history;
    const double step = round % 2 == 0 ? 1 : 0.1;
    const auto series = history.open({.step = step});
    std::map<std::uint64_t, double> sent;
    std::uint64_t at = prng.below(100000);
    double level = 0;
    for (unsigned i = 0; i < 3000; ++i) {
      at += 1 + (prng.below(20) == 0 ? prng.below(200) : 0);
      switch (round % 4) {
        case 0:
          level += static_cast<double>(prng.below(7)) - 3;
          break;
        case 1:
          level = static_cast<double>(prng.below(1000)) / 10;
          break;
        case 2:
          if (prng.below(50) == 0) level = static_cast<double>(prng.below(1000000000)) - 5e8;
          break;
        default:
          level = prng.below(30) == 0 ? 2e8 : static_cast<double>(prng.below(3));
          break;
      }
      history.add(*series, static_cast<double>(at), level);
      sent[at] = level;
    }
    const std::uint64_t newest = at;
    const auto seconds = history.query(*series, 0, newest + 1, History::Grain::second);
    std::map<std::uint64_t, double> came;
    for (const Point& point : seconds) came[point.at_s] = point.mean;
    for (const auto& [second, value] : sent) {
      if (second == newest || second + 3600 < newest) continue;
      ASSERT_TRUE(came.contains(second)) << "round " << round << " second " << second;
      ASSERT_NEAR(came[second], value, step * 0.5001) << "round " << round << " second " << second;
    }
    for (const auto& [second, value] : came) ASSERT_TRUE(sent.contains(second));
    for (std::size_t i = 1; i < seconds.size(); ++i) ASSERT_LT(seconds[i - 1].at_s, seconds[i].at_s);
  }
}

TEST(History, ASeriesThatStandsStillTakesNextToNothing) {
  History history;
  const auto series = history.open({});
  const std::size_t empty = history.bytes();
  for (unsigned s = 0; s < 3 * 86400; s += 10) history.add(*series, s, 42);
  EXPECT_LT(history.bytes() - empty, std::size_t{16} << 10U);
}

TEST(History, TheBoundHoldsAgainstNoiseAndTheNewestIsKept) {
  History history({.most_bytes = 400'000});
  std::vector<std::size_t> series;
  for (unsigned i = 0; i < 20; ++i) series.push_back(*history.open({}));
  Prng prng(3);
  std::uint64_t most = 0;
  const std::uint64_t days = 4;
  for (std::uint64_t s = 0; s < days * 86400; s += 20) {
    for (const std::size_t one : series)
      history.add(one, static_cast<double>(s), static_cast<double>(prng.below(1000000000)));
    most = std::max<std::uint64_t>(most, history.bytes());
  }
  EXPECT_LE(most, 400'000U);
  ASSERT_TRUE(history.oldest_s());
  EXPECT_GT(*history.oldest_s(), 86400U);  // it let go
  for (const std::size_t one : series) {
    EXPECT_GT(history.query(one, (days - 1) * 86400 + 43200, days * 86400, History::Grain::minute).size(),
              100U);
  }
}

TEST(History, AClosedSeriesGivesItsMemoryBack) {
  History history;
  const auto first = history.open({.step = 0.01});
  const std::size_t before = history.bytes();
  Prng prng(1);
  for (unsigned s = 0; s < 4000; ++s) history.add(*first, s, static_cast<double>(prng.below(100)));
  EXPECT_GT(history.bytes(), before);
  history.close(*first);
  EXPECT_EQ(history.bytes(), before);
  const auto second = history.open({});
  EXPECT_EQ(*second, *first);
  EXPECT_TRUE(history.query(*second, 0, 4000, History::Grain::second).empty());
}

TEST(History, ThereIsARoofOverTheSeries) {
  History history({.most_series = 2});
  EXPECT_TRUE(history.open({}));
  EXPECT_TRUE(history.open({}));
  EXPECT_FALSE(history.open({}));
}

}  // namespace
}  // namespace bulkhead::history
