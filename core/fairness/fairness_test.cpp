#include "core/fairness/fairness.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>

#include <gtest/gtest.h>

#include "base/prng.hpp"

namespace bulkhead::fairness {
namespace {

constexpr std::int64_t kHour = 3600 * 1000;

Amounts amounts(std::initializer_list<std::int64_t> list) {
  Amounts out = {};
  std::copy(list.begin(), list.end(), out.begin());
  return out;
}

Book book(std::initializer_list<std::int64_t> capacity, Config config = {}) {
  static const char* names[] = {"GPUs", "GiB", "watts", "cores"};
  config.resources.clear();
  for (const auto amount : capacity) config.resources.push_back({names[config.resources.size()], amount});
  auto made = Book::make(config);
  EXPECT_TRUE(made.ok());
  return std::move(made).value();
}

TenantId tenant(Book& b, Amounts nominal, std::uint32_t weight = 1, Amounts limit = unlimited(),
                std::int64_t now = 0) {
  Tenant t{.name = "t", .weight = weight, .nominal = nominal, .limit = limit};
  auto id = b.add_tenant(t, now);
  EXPECT_TRUE(id.ok()) << (id.ok() ? "" : id.error().message());
  return id.value_or(0);
}

void submit(Book& b, std::uint64_t id, TenantId who, Amounts demand, std::int64_t at = 0,
            std::int32_t priority = 0) {
  const auto done =
      b.submit({.id = id, .tenant = who, .demand = demand, .enqueued_ms = at, .priority = priority}, at);
  EXPECT_TRUE(done.ok()) << (done.ok() ? "" : done.error().message());
}

// Admits until nothing goes; how many each tenant got.
std::map<TenantId, int> fill(Book& b, std::int64_t now = 0) {
  std::map<TenantId, int> got;
  while (const auto turn = b.next(now)) {
    EXPECT_TRUE(b.admit(turn->request, now).ok());
    ++got[turn->tenant];
  }
  return got;
}

std::uint64_t next(Book& b, std::int64_t now = 0) {
  const auto turn = b.next(now);
  return turn ? turn->request : 0;
}

// DRF's progressive filling, as the paper's algorithm 1 writes it, with exact fractions: whoever has the
// smallest weighted dominant share gets one more task; who does not fit any more is out (shares only grow).
std::vector<int> progressive_filling(const std::vector<std::int64_t>& capacity,
                                     const std::vector<std::vector<std::int64_t>>& demand,
                                     const std::vector<std::int64_t>& weight) {
  std::vector<int> tasks(demand.size(), 0);
  std::vector<bool> out(demand.size(), false);
  std::vector<std::int64_t> used(capacity.size(), 0);
  for (;;) {
    std::size_t best = demand.size();
    std::int64_t best_top = 0, best_bottom = 1;
    for (std::size_t i = 0; i < demand.size(); ++i) {
      if (out[i]) continue;
      std::int64_t top = 0, bottom = 1;
      for (std::size_t r = 0; r < capacity.size(); ++r) {
        const std::int64_t t = static_cast<std::int64_t>(tasks[i]) * demand[i][r];
        const std::int64_t u = static_cast<std::int64_t>(capacity[r]) * weight[i];
        if (t * bottom > top * u) top = t, bottom = u;
      }
      if (best == demand.size() || top * best_bottom < best_top * bottom)
        best = i, best_top = top, best_bottom = bottom;
    }
    if (best == demand.size()) return tasks;
    bool fits = true;
    for (std::size_t r = 0; r < capacity.size(); ++r) fits = fits && used[r] + demand[best][r] <= capacity[r];
    if (!fits) {
      out[best] = true;
      continue;
    }
    ++tasks[best];
    for (std::size_t r = 0; r < capacity.size(); ++r) used[r] += demand[best][r];
  }
}

struct Case {
  std::vector<std::int64_t> capacity;
  std::vector<std::vector<std::int64_t>> demand;
  std::vector<std::int64_t> weight;
};
Case random_case(Prng& random) {
  Case out;
  const auto resources = 1 + random.below(3);
  const auto tenants = 2 + random.below(3);
  for (std::uint64_t r = 0; r < resources; ++r)
    out.capacity.push_back(static_cast<std::int64_t>(6 + random.below(30)));
  for (std::uint64_t i = 0; i < tenants; ++i) {
    std::vector<std::int64_t> d;
    for (std::uint64_t r = 0; r < resources; ++r) d.push_back(static_cast<std::int64_t>(random.below(5)));
    if (std::all_of(d.begin(), d.end(), [](auto x) { return x == 0; })) d[0] = 1;
    out.demand.push_back(d);
    out.weight.push_back(static_cast<std::int64_t>(1 + random.below(3)));
  }
  return out;
}

enum class Quota { all, part };  // nominal: the whole capacity, or the tenant's part of it

std::vector<int> run(const Case& c, Quota quota) {
  Config config;
  config.past = 0;
  for (const auto amount : c.capacity) config.resources.push_back({"r", amount});
  auto made = Book::make(config);
  EXPECT_TRUE(made.ok());
  Book b = std::move(made).value();
  std::int64_t weights = 0;
  for (const auto w : c.weight) weights += w;
  std::uint64_t id = 1;
  for (std::size_t i = 0; i < c.demand.size(); ++i) {
    Amounts nominal = {};
    for (std::size_t r = 0; r < c.capacity.size(); ++r)
      nominal[r] = quota == Quota::all ? c.capacity[r] : c.capacity[r] * c.weight[i] / weights;
    const auto who = tenant(b, nominal, static_cast<std::uint32_t>(c.weight[i]));
    Amounts demand = {};
    std::copy(c.demand[i].begin(), c.demand[i].end(), demand.begin());
    std::int64_t most = 40;
    for (std::size_t r = 0; r < c.capacity.size(); ++r) {
      if (demand[r] > 0) most = std::min(most, c.capacity[r] / demand[r]);
    }
    for (std::int64_t k = 0; k < most; ++k) submit(b, id++, who, demand);
  }
  const auto got = fill(b);
  std::vector<int> out(c.demand.size(), 0);
  for (const auto& [who, n] : got) out[who] = n;
  return out;
}

TEST(Fairness, WithoutQuotasAndPastItIsDrfsProgressiveFilling) {
  Prng random(1);
  for (int round = 0; round < 400; ++round) {
    const Case c = random_case(random);
    EXPECT_EQ(run(c, Quota::all), progressive_filling(c.capacity, c.demand, c.weight)) << "round " << round;
  }
}

TEST(Fairness, ThePapersExampleGetsThreeAndTwo) {
  // 9 CPUs, 18 GB; A asks for (1, 4), B for (3, 1).
  EXPECT_EQ(run({{9, 18}, {{1, 4}, {3, 1}}, {1, 1}}, Quota::all), (std::vector<int>{3, 2}));
}

TEST(Fairness, NobodyGetsLessThanFromAPartOfTheClusterOfItsOwn) {
  Prng random(2);
  for (int round = 0; round < 400; ++round) {
    const Case c = random_case(random);
    std::int64_t weights = 0;
    for (const auto w : c.weight) weights += w;
    const auto got = run(c, Quota::part);
    for (std::size_t i = 0; i < c.demand.size(); ++i) {
      std::int64_t alone = std::numeric_limits<std::int64_t>::max();
      for (std::size_t r = 0; r < c.capacity.size(); ++r) {
        if (c.demand[i][r] > 0)
          alone = std::min(alone, c.capacity[r] * c.weight[i] / weights / c.demand[i][r]);
      }
      EXPECT_GE(got[i], alone) << "round " << round << " tenant " << i;
    }
  }
}

TEST(Fairness, AskingForMoreThanNeededNeverGainsMoreThanTheLastTask) {
  // Whole tasks: which of two tenants gets the last one may turn on a lie, nothing more (DRF, section 6.2).
  Prng random(3);
  for (int round = 0; round < 60; ++round) {
    Case c = random_case(random);
    const auto honest = run(c, Quota::all);
    const auto truth = c.demand[0];
    for (std::size_t r = 0; r < c.capacity.size(); ++r) {
      for (std::int64_t more = 1; more <= 3; ++more) {
        c.demand[0] = truth;
        c.demand[0][r] = std::min(c.capacity[r], truth[r] + more);
        EXPECT_LE(run(c, Quota::all)[0], honest[0] + 1) << "round " << round;
      }
    }
  }
}

TEST(Fairness, SplittingARequestInHalvesGainsNothing) {
  auto b = book({16}, {.past = 0});
  const auto whole = tenant(b, amounts({16}));
  const auto halves = tenant(b, amounts({16}));
  for (std::uint64_t i = 0; i < 4; ++i) submit(b, 100 + i, whole, amounts({4}));
  for (std::uint64_t i = 0; i < 8; ++i) submit(b, 200 + i, halves, amounts({2}));
  fill(b);
  EXPECT_EQ(b.usage(whole, 0), 8);
  EXPECT_EQ(b.usage(halves, 0), 8);
}

TEST(Fairness, WeightsDivideInTheirProportion) {
  auto b = book({60}, {.past = 0});
  const auto one = tenant(b, amounts({60}), 1);
  const auto three = tenant(b, amounts({60}), 3);
  const auto two = tenant(b, amounts({60}), 2);
  std::uint64_t id = 1;
  for (int i = 0; i < 60; ++i) {
    for (const auto who : {one, three, two}) submit(b, id++, who, amounts({1}));
  }
  const auto got = fill(b);
  EXPECT_EQ(got.at(one), 10);
  EXPECT_EQ(got.at(three), 30);
  EXPECT_EQ(got.at(two), 20);
}

TEST(Fairness, QuotaComesBeforeALowerLevel) {
  auto b = book({16});
  const auto poor = tenant(b, amounts({0}));
  const auto rich = tenant(b, amounts({12}));
  submit(b, 1, rich, amounts({8}));
  ASSERT_TRUE(b.admit(1, 0).ok());
  submit(b, 2, poor, amounts({2}), 1);
  submit(b, 3, rich, amounts({4}), 2);
  EXPECT_EQ(b.next(2), (Turn{.request = 3, .tenant = rich}));
  ASSERT_TRUE(b.admit(3, 2).ok());
  EXPECT_EQ(b.next(2), (Turn{.request = 2, .tenant = poor, .borrows = true}));
}

TEST(Fairness, NobodyBorrowsWhatSomebodyWithinQuotaWaitsFor) {
  auto b = book({8, 100});
  const auto owner = tenant(b, amounts({8, 0}));
  const auto guest = tenant(b, amounts({0, 100}));
  submit(b, 1, owner, amounts({6}));
  ASSERT_TRUE(b.hold(1, "no six in a row", 0).ok());  // waits, although six are free
  submit(b, 2, guest, amounts({3}));
  EXPECT_EQ(next(b), 0U);
  EXPECT_EQ(b.explain(2, 0)->why, Why::borrowing);
  submit(b, 3, guest, amounts({2}));  // behind 2 in its own tenant, and 2 does not fit
  EXPECT_EQ(next(b), 0U);
  ASSERT_TRUE(b.withdraw(2, 0).ok());
  EXPECT_EQ(next(b), 3U);  // two of the eight nobody waits for
  ASSERT_TRUE(b.admit(3, 0).ok());
  submit(b, 4, guest, amounts({0, 50}));  // its own quota is not borrowed
  EXPECT_EQ(next(b), 4U);
}

TEST(Fairness, WhatNobodyWaitsForIsLent) {
  auto b = book({8});
  tenant(b, amounts({8}));
  const auto guest = tenant(b, amounts({0}));
  for (std::uint64_t id = 1; id <= 8; ++id) submit(b, id, guest, amounts({1}));
  EXPECT_EQ(fill(b).at(guest), 8);
}

TEST(Fairness, TheLimitHoldsWhateverIsFree) {
  auto b = book({8});
  const auto who = tenant(b, amounts({1}), 1, amounts({3, 0}));
  for (std::uint64_t id = 1; id <= 5; ++id) submit(b, id, who, amounts({1}));
  EXPECT_EQ(fill(b).at(who), 3);
  EXPECT_EQ(b.explain(4, 0)->why, Why::limit);
  EXPECT_EQ(b.admit(4, 0).error().code(), Errc::no_capacity);
  EXPECT_EQ(b.submit({.id = 9, .tenant = who, .demand = amounts({4})}, 0).error().code(), Errc::no_capacity);
}

TEST(Fairness, ThePastFadesByHalfInAHalfLife) {
  auto b = book({10}, {.half_life_ms = kHour, .past = 1, .sample_ms = 1000});
  const auto who = tenant(b, amounts({10}));
  submit(b, 1, who, amounts({10}));
  ASSERT_TRUE(b.admit(1, 0).ok());
  EXPECT_NEAR(b.report(kHour).tenants[0].past, 0.5, 1e-9);
  ASSERT_TRUE(b.finish(1, 2 * kHour).ok());
  EXPECT_NEAR(b.report(2 * kHour).tenants[0].past, 0.75, 1e-9);
  EXPECT_NEAR(b.report(3 * kHour).tenants[0].past, 0.375, 1e-9);
  EXPECT_NEAR(b.report(2 * kHour + kHour / 3).tenants[0].past, 0.75 * std::exp2(-1.0 / 3), 1e-9);
  EXPECT_NEAR(b.report(3 * kHour).tenants[0].share_seconds, 7200, 1e-6);
  EXPECT_EQ(b.report(5000 * kHour).tenants[0].past, 0);
}

TEST(Fairness, WhoUsedLessLatelyGoesFirst) {
  auto b = book({10}, {.half_life_ms = kHour});
  const auto busy = tenant(b, amounts({10}));
  const auto quiet = tenant(b, amounts({10}));
  submit(b, 1, busy, amounts({10}));
  ASSERT_TRUE(b.admit(1, 0).ok());
  ASSERT_TRUE(b.finish(1, kHour).ok());
  submit(b, 2, busy, amounts({1}), kHour);
  submit(b, 3, quiet, amounts({1}), kHour + 1);
  EXPECT_EQ(next(b, kHour + 1), 3U);
  const auto reason = b.explain(2, kHour + 1);
  EXPECT_EQ(reason->why, Why::behind_others);
  EXPECT_EQ(reason->behind, 1U);
}

TEST(Fairness, OrderInATenantIsPriorityThenTimeThenId) {
  auto b = book({10});
  const auto who = tenant(b, amounts({10}));
  submit(b, 5, who, amounts({1}), 0);
  submit(b, 4, who, amounts({1}), 0);
  submit(b, 3, who, amounts({1}), 1, 7);
  submit(b, 2, who, amounts({1}), 2, -1);
  std::vector<std::uint64_t> ids;
  for (const auto& turn : b.order(2, 10)) ids.push_back(turn.request);
  EXPECT_EQ(ids, (std::vector<std::uint64_t>{3, 4, 5, 2}));
  EXPECT_EQ(b.pending(), 4U);  // order() only looked
}

TEST(Fairness, PriorityDoesNotMoveATenantBeforeAnother) {
  auto b = book({10});
  const auto a = tenant(b, amounts({10}));
  const auto c = tenant(b, amounts({10}));
  submit(b, 1, a, amounts({1}), 0);
  submit(b, 2, c, amounts({1}), 1, 1000);
  EXPECT_EQ(next(b, 1), 1U);
}

TEST(Fairness, ALargeRequestIsNotStarvedBySmallOnes) {
  auto b = book({8}, {.sample_ms = 1000, .patience_ms = 10'000});
  const auto large = tenant(b, amounts({8}));
  const auto small = tenant(b, amounts({8}));
  std::uint64_t id = 100;
  std::vector<std::pair<std::int64_t, std::uint64_t>> running;
  std::int64_t started = -1;
  for (std::int64_t now = 0; now < 60'000 && started < 0; now += 500) {
    for (auto it = running.begin(); it != running.end();) {
      if (it->first <= now) {
        ASSERT_TRUE(b.finish(it->second, now).ok());
        it = running.erase(it);
      } else {
        ++it;
      }
    }
    if (now == 1000) submit(b, 1, large, amounts({8}), now);
    for (int k = 0; k < 3; ++k) submit(b, id++, small, amounts({1}), now);
    while (const auto turn = b.next(now)) {
      if (turn->request == 1) started = now;
      ASSERT_TRUE(b.admit(turn->request, now).ok());
      running.emplace_back(now + 4000, turn->request);
    }
    if (now == 12'500) {
      EXPECT_EQ(b.explain(id - 1, now)->why, Why::behind_own);
    }
  }
  EXPECT_GE(started, 11'000);
  EXPECT_LE(started, 16'000);
}

TEST(Fairness, AnOwedRequestThatIsHeldKeepsItsAmounts) {
  auto b = book({8}, {.sample_ms = 1000, .patience_ms = 5000});
  const auto a = tenant(b, amounts({8}));
  const auto c = tenant(b, amounts({8}));
  submit(b, 1, a, amounts({6}), 0);
  ASSERT_TRUE(b.hold(1, "in pieces", 0).ok());
  for (std::uint64_t id = 2; id < 7; ++id) submit(b, id, c, amounts({1}), 0);
  EXPECT_EQ(next(b, 1000), 2U);
  ASSERT_TRUE(b.admit(2, 6000).ok());
  ASSERT_TRUE(b.admit(3, 6000).ok());
  EXPECT_EQ(next(b, 6000), 0U);
  EXPECT_EQ(b.explain(4, 6000)->why, Why::reserved);
  b.retry(6000);
  EXPECT_EQ(next(b, 6000), 1U);
}

TEST(Fairness, BorrowersDoNotStarveOneAnotherEither) {
  auto b = book({8}, {.sample_ms = 1000, .patience_ms = 5000});
  const auto a = tenant(b, amounts({0}));
  const auto c = tenant(b, amounts({0}));
  for (std::uint64_t id = 2; id < 6; ++id) submit(b, id, c, amounts({1}), 0);
  fill(b);
  submit(b, 1, a, amounts({6}), 0);
  submit(b, 7, c, amounts({1}), 0);
  EXPECT_EQ(next(b, 0), 7U);
  EXPECT_EQ(next(b, 6000), 0U);  // four are free and kept
  EXPECT_EQ(b.explain(7, 6000)->why, Why::reserved);
  ASSERT_TRUE(b.finish(2, 6000).ok());
  ASSERT_TRUE(b.finish(3, 6000).ok());
  EXPECT_EQ(next(b, 6000), 1U);
}

TEST(Fairness, AnotherBookGoesOnWithThePastOfTheFirstAndInItsOrder) {
  const auto filled = [](Book& b) {
    const auto a = tenant(b, amounts({4})), c = tenant(b, amounts({4}));
    return std::pair(a, c);
  };
  Config config;
  config.half_life_ms = kHour;
  Book first = book({8}, config);
  const auto [a, c] = filled(first);
  // One held half of it for two hours, the other nothing; then nobody does, and both ask for all there is.
  submit(first, 1, a, amounts({4}));
  ASSERT_TRUE(first.admit(1, 0).ok());
  ASSERT_TRUE(first.finish(1, 2 * kHour).ok());
  const double kept = first.past(a, 2 * kHour);
  EXPECT_NEAR(kept, 0.5 * 0.75, 1e-9);
  const std::int64_t later = 3 * kHour;
  EXPECT_NEAR(first.past(a, later), kept / 2, 1e-9);
  const auto ask = [&](Book& b) {
    submit(b, 2, a, amounts({4}), later);
    submit(b, 3, c, amounts({4}), later + 1);
    return next(b, later + 1);
  };
  Book forgetful = book({8}, config);
  filled(forgetful);
  EXPECT_EQ(ask(forgetful), 2U) << "who came first, where nobody remembers";
  Book second = book({8}, config);
  filled(second);
  ASSERT_TRUE(second.set_past(a, kept, 2 * kHour, later).ok());
  EXPECT_NEAR(second.past(a, later), first.past(a, later), 1e-9);
  EXPECT_EQ(ask(second), 3U);
  EXPECT_EQ(ask(first), 3U);

  // What is held still counts as held since.
  Book third = book({8}, config);
  filled(third);
  ASSERT_TRUE(third.adopt({.id = 9, .tenant = a, .demand = amounts({8})}, later).ok());
  ASSERT_TRUE(third.set_past(a, 0, 2 * kHour, later).ok());
  EXPECT_NEAR(third.past(a, later), 0.5, 1e-9);
  // A clock that was set back: what was true later is true now.
  ASSERT_TRUE(third.set_past(a, 0.25, 99 * kHour, later).ok());
  EXPECT_NEAR(third.past(a, later), 0.25, 1e-9);
  for (const double bad : {-0.1, 1e17, std::nan(""), std::numeric_limits<double>::infinity()})
    EXPECT_FALSE(third.set_past(a, bad, 0, later).ok()) << bad;
  EXPECT_FALSE(third.set_past(77, 0.5, 0, later).ok());
}

TEST(Fairness, WhoWaitsIsToldItsPlaceInNumbersAlone) {
  Book b = book({4});
  const auto a = tenant(b, amounts({2})), c = tenant(b, amounts({2}));
  submit(b, 1, a, amounts({4}));
  ASSERT_TRUE(b.admit(1, 0).ok());
  submit(b, 2, a, amounts({1}), 1);
  submit(b, 3, a, amounts({1}), 2);
  submit(b, 4, c, amounts({1}), 3);
  const auto says = [&](std::uint64_t id) { return b.waits(id, 4).value(); };
  EXPECT_EQ(says(2).ahead, 0U);
  EXPECT_EQ(says(3).ahead, 1U);
  EXPECT_EQ(says(3).own, 2U);
  EXPECT_EQ(says(3).pending, 3U);
  EXPECT_EQ(says(3).why, Why::behind_own);
  EXPECT_EQ(says(2).tenants_ahead, 1U) << "it would borrow, the other stays within its part";
  EXPECT_EQ(says(4).tenants_ahead, 0U);
  EXPECT_EQ(says(4).why, Why::capacity);
  ASSERT_TRUE(b.hold(4, "no room", 4).ok());
  EXPECT_EQ(says(4).why, Why::held);
  EXPECT_EQ(says(4).held, "no room");
  EXPECT_EQ(says(2).tenants_ahead, 1U) << "held or not, it goes first";
  EXPECT_FALSE(b.waits(1, 4).ok()) << "it runs";
  EXPECT_FALSE(b.waits(77, 4).ok());
  for (std::uint64_t id = 100; id < 100 + 2 * kMostCounted; ++id) submit(b, id, a, amounts({1}), 5);
  EXPECT_EQ(b.waits(100 + 2 * kMostCounted - 1, 5)->ahead, kMostCounted);
}

TEST(Fairness, FinishTimeIsMeasuredAgainstAPartOfTheClusterOfItsOwn) {
  auto b = book({8});
  const auto a = tenant(b, amounts({8}));
  const auto c = tenant(b, amounts({8}));
  // Half of the cluster is 4 GPUs: 8 GPUs for 100 s would have taken 200 s there.
  submit(b, 1, a, amounts({8}), 0);
  ASSERT_TRUE(b.admit(1, 0).ok());
  submit(b, 2, c, amounts({4}), 0);
  ASSERT_TRUE(b.finish(1, 100'000).ok());
  ASSERT_TRUE(b.admit(2, 100'000).ok());
  ASSERT_TRUE(b.finish(2, 200'000).ok());  // 100 s, waited 100 s
  const auto report = b.report(200'000);
  EXPECT_DOUBLE_EQ(report.tenants[a].worst_rho, 0.5);
  EXPECT_DOUBLE_EQ(report.tenants[c].worst_rho, 2.0);
  EXPECT_EQ(report.worst, std::optional<TenantId>(c));
  EXPECT_EQ(report.tenants[c].worst_request, 2U);
  EXPECT_DOUBLE_EQ(report.mean_rho, 1.25);
}

TEST(Fairness, AReportNamesTheDominantResourceAndWhoWaits) {
  auto b = book({10, 100});
  const auto who = tenant(b, amounts({10, 100}));
  submit(b, 1, who, amounts({2, 90}));
  ASSERT_TRUE(b.admit(1, 0).ok());
  ASSERT_TRUE(b.submit({.id = 2, .tenant = who, .demand = amounts({1, 20}), .length_ms = 1000}, 0).ok());
  const auto figures = b.report(4000).tenants[who];
  EXPECT_EQ(figures.dominant, "GiB");
  EXPECT_DOUBLE_EQ(figures.share, 0.9);
  EXPECT_DOUBLE_EQ(figures.waiting_rho, 5);
  EXPECT_EQ(figures.pending, 1U);
  EXPECT_EQ(figures.running, 1U);
  EXPECT_EQ(b.explain(2, 0)->text, "asks for 20 GiB; 10 of 100 are free, and it is the first to get them");
}

TEST(Fairness, EveryFigureOutOfBoundsIsRefusedByName) {
  EXPECT_FALSE(Book::make({}).ok());
  EXPECT_FALSE(Book::make({.resources = {{"GPUs", -1}}}).ok());
  EXPECT_FALSE(Book::make({.resources = {{"GPUs", kMostAmount + 1}}}).ok());
  EXPECT_FALSE(Book::make({.resources = {{"GPUs", 1}}, .half_life_ms = 0}).ok());
  EXPECT_FALSE(Book::make({.resources = {{"GPUs", 1}}, .past = std::nan("")}).ok());
  EXPECT_FALSE(Book::make({.resources = {{"GPUs", 1}}, .sample_ms = 0}).ok());
  EXPECT_FALSE(Book::make({.resources = {{"GPUs", 1}}, .patience_ms = -1}).ok());
  EXPECT_FALSE(Book::make({.resources = std::vector<Resource>(kMostResources + 1)}).ok());
  auto b = book({8});
  EXPECT_FALSE(b.add_tenant({.name = "a", .weight = 0}, 0).ok());
  EXPECT_FALSE(b.add_tenant({.name = "a", .weight = kMostWeight + 1}, 0).ok());
  EXPECT_FALSE(b.add_tenant({.name = "a", .nominal = amounts({-1})}, 0).ok());
  EXPECT_FALSE(b.add_tenant({.name = "a", .nominal = amounts({0, 1})}, 0).ok());
  EXPECT_FALSE(b.add_tenant({.name = "a", .nominal = amounts({4}), .limit = amounts({3})}, 0).ok());
  const auto who = tenant(b, amounts({8}));
  EXPECT_FALSE(b.submit({.id = 1, .tenant = who}, 0).ok());
  EXPECT_FALSE(b.submit({.id = 1, .tenant = 7, .demand = amounts({1})}, 0).ok());
  EXPECT_FALSE(b.submit({.id = 1, .tenant = who, .demand = amounts({-1})}, 0).ok());
  EXPECT_FALSE(b.submit({.id = 1, .tenant = who, .demand = amounts({1, 1})}, 0).ok());
  EXPECT_FALSE(b.submit({.id = 1, .tenant = who, .demand = amounts({9})}, 0).ok());
  EXPECT_FALSE(b.submit({.id = 1, .tenant = who, .demand = amounts({1}), .enqueued_ms = -1}, 0).ok());
  submit(b, 1, who, amounts({1}));
  EXPECT_FALSE(b.submit({.id = 1, .tenant = who, .demand = amounts({1})}, 0).ok());
  EXPECT_FALSE(b.finish(1, 0).ok());
  EXPECT_FALSE(b.admit(2, 0).ok());
  EXPECT_FALSE(b.withdraw(2, 0).ok());
  EXPECT_FALSE(b.explain(2, 0).ok());
  EXPECT_FALSE(b.change_tenant(3, {}, 0).ok());
  EXPECT_FALSE(b.set_capacity(1, 3, 0).ok());
}

TEST(Fairness, TheLargestAmountsDoNotOverflow) {
  Config config;
  config.resources = {{"bytes", kMostAmount}};
  auto made = Book::make(config);
  ASSERT_TRUE(made.ok());
  Book b = std::move(made).value();
  for (int i = 0; i < 100; ++i) tenant(b, amounts({kMostAmount}), kMostWeight);
  for (std::uint64_t id = 0; id < 100; ++id)
    submit(b, id, static_cast<TenantId>(id), amounts({kMostAmount}), 0);
  EXPECT_EQ(fill(b, std::numeric_limits<std::int64_t>::max()).size(), 1U);
  EXPECT_EQ(b.pending(), 99U);
  EXPECT_EQ(b.free(0), 0);
}

TEST(Fairness, CapacityThatGoesAwayStopsAdmissionAndNothingElse) {
  auto b = book({8});
  const auto who = tenant(b, amounts({8}));
  submit(b, 1, who, amounts({6}));
  fill(b);
  submit(b, 2, who, amounts({2}));
  ASSERT_TRUE(b.set_capacity(0, 0, 10).ok());
  EXPECT_EQ(b.free(0), -6);
  EXPECT_EQ(next(b, 10), 0U);
  EXPECT_EQ(b.explain(2, 10)->why, Why::capacity);
  EXPECT_EQ(b.report(10).tenants[who].share, 1);
  ASSERT_TRUE(b.finish(1, 20).ok());
  ASSERT_TRUE(b.set_capacity(0, 8, 20).ok());
  EXPECT_EQ(next(b, 20), 2U);
}

TEST(Fairness, ARequestThatCanNoLongerFitKeepsNothing) {
  auto b = book({8}, {.sample_ms = 1000, .patience_ms = 1000});
  const auto a = tenant(b, amounts({8}));
  const auto c = tenant(b, amounts({8}));
  submit(b, 1, a, amounts({8}), 0);
  ASSERT_TRUE(b.set_capacity(0, 6, 0).ok());
  submit(b, 2, c, amounts({1}), 5000);
  EXPECT_EQ(next(b, 5000), 2U);
}

// The rule again, as the header words it, without trees, heaps or sums kept up to date.
struct Naive {
  struct Item {
    Request request;
    bool held = false;
  };
  Config config;
  std::vector<Tenant> tenants;
  std::vector<Amounts> usage;
  std::vector<double> level;
  std::vector<Item> pending;
  std::int64_t sampled = 0;

  bool inside(std::size_t t, const Amounts& taken, const Amounts& d) const {
    for (std::size_t r = 0; r < config.resources.size(); ++r)
      if (d[r] > 0 && taken[r] + d[r] > tenants[t].nominal[r]) return false;
    return true;
  }
  std::optional<std::uint64_t> next() const {
    const std::size_t count = config.resources.size();
    Amounts rest = {}, beside = {}, claims = {};
    for (std::size_t r = 0; r < count; ++r) {
      rest[r] = config.resources[r].capacity;
      for (const auto& u : usage) rest[r] -= u[r];
    }
    struct C {
      bool any = false;
      Request q;
      bool owed = false;
      std::uint64_t rank = 0;
    };
    std::vector<C> in(tenants.size()), out(tenants.size()), waits(tenants.size());
    std::vector<Amounts> claim(tenants.size(), Amounts{});
    for (std::size_t t = 0; t < tenants.size(); ++t) {
      std::vector<Item> mine;
      for (const auto& item : pending)
        if (item.request.tenant == t) mine.push_back(item);
      std::sort(mine.begin(), mine.end(), [](const Item& a, const Item& b) {
        return std::tuple(-a.request.priority, a.request.enqueued_ms, a.request.id) <
               std::tuple(-b.request.priority, b.request.enqueued_ms, b.request.id);
      });
      if (mine.size() > kReach) mine.resize(kReach);
      Amounts taken = usage[t];
      bool first = true, closed = false;
      for (const auto& item : mine) {
        const auto& d = item.request.demand;
        bool can = true;
        for (std::size_t r = 0; r < count; ++r)
          can = can && (d[r] == 0 || usage[t][r] + d[r] <= tenants[t].limit[r]);
        if (!can) continue;
        const bool within = inside(t, usage[t], d);
        if (within && inside(t, taken, d)) {
          for (std::size_t r = 0; r < count; ++r) taken[r] += d[r], claim[t][r] += d[r];
        }
        const bool owed = config.patience_ms > 0 && sampled - item.request.enqueued_ms >= config.patience_ms;
        if (closed) continue;
        C candidate{true, item.request, owed,
                    owed ? 0 : static_cast<std::uint64_t>(level[t] * 0x1.0p44 + 0.5)};
        if (item.held) {
          if (!waits[t].any && owed && within) waits[t] = candidate;
          continue;
        }
        auto& into = within ? in[t] : out[t];
        if (!into.any) into = candidate;
        closed = first && owed;
        first = false;
      }
      for (std::size_t r = 0; r < count; ++r) claims[r] += claim[t][r];
    }
    const auto before = [](const C& a, const C& b) {
      return std::tuple(!a.owed, a.rank, a.q.enqueued_ms, a.q.id) <
             std::tuple(!b.owed, b.rank, b.q.enqueued_ms, b.q.id);
    };
    for (std::size_t r = 0; r < count; ++r) beside[r] = rest[r] - claims[r];
    for (const bool borrowing : {false, true}) {
      const auto& list = borrowing ? out : in;
      const auto fits = [&](const C& c) {
        for (std::size_t r = 0; r < count; ++r) {
          const auto d = c.q.demand[r];
          if (d == 0) continue;
          if (d > rest[r]) return false;
          const auto& t = tenants[c.q.tenant];
          if (borrowing && usage[c.q.tenant][r] + d > t.nominal[r] && d > beside[r] + claim[c.q.tenant][r])
            return false;
        }
        return true;
      };
      const C* keeper = nullptr;
      for (const auto& c : list)
        if (c.any && c.owed && (keeper == nullptr || before(c, *keeper))) keeper = &c;
      if (keeper != nullptr && fits(*keeper)) keeper = nullptr;
      if (!borrowing)
        for (const auto& c : waits)
          if (c.any && (keeper == nullptr || before(c, *keeper))) keeper = &c;
      if (keeper != nullptr) {
        for (std::size_t r = 0; r < count; ++r) {
          if (keeper->q.demand[r] == 0) continue;
          rest[r] = std::max<std::int64_t>(0, rest[r] - keeper->q.demand[r]);
          if (borrowing) beside[r] -= keeper->q.demand[r];
        }
      }
      const C* best = nullptr;
      for (const auto& c : list)
        if (c.any && fits(c) && (best == nullptr || before(c, *best))) best = &c;
      if (best != nullptr) return best->q.id;
    }
    return std::nullopt;
  }
};

TEST(Fairness, AgreesWithTheRuleWrittenPlainlyOnRandomHistories) {
  for (std::uint64_t seed = 1; seed <= 12; ++seed) {
    Prng random(seed);
    Naive naive;
    naive.config = {.resources = {{"a", 24}, {"b", 40}},
                    .half_life_ms = 20'000,
                    .past = static_cast<double>(seed % 3) / 2,
                    .sample_ms = 1000,
                    .patience_ms = seed % 2 == 0 ? 15'000 : 0};
    auto made = Book::make(naive.config);
    ASSERT_TRUE(made.ok());
    Book b = std::move(made).value();
    for (int i = 0; i < 5; ++i) {
      Tenant t{.name = "t", .weight = static_cast<std::uint32_t>(1 + random.below(3))};
      for (std::size_t r = 0; r < 2; ++r) {
        t.nominal[r] = static_cast<std::int64_t>(random.below(16));
        t.limit[r] = t.nominal[r] + static_cast<std::int64_t>(random.below(30));
      }
      ASSERT_TRUE(b.add_tenant(t, 0).ok());
      naive.tenants.push_back(t);
      naive.usage.push_back({});
    }
    std::vector<Request> running;
    std::int64_t now = 0;
    std::uint64_t id = 1;
    for (int step = 0; step < 300; ++step) {
      now += static_cast<std::int64_t>(random.below(800));
      const auto what = random.below(10);
      if (what < 5) {
        Request q{.id = id++,
                  .tenant = static_cast<TenantId>(random.below(5)),
                  .demand = amounts({static_cast<std::int64_t>(random.below(7)),
                                     static_cast<std::int64_t>(random.below(9))}),
                  .enqueued_ms = now,
                  .priority = static_cast<std::int32_t>(random.below(2))};
        if (b.submit(q, now).ok()) naive.pending.push_back({q});
      } else if (what < 7 && !running.empty()) {
        const auto i = random.below(running.size());
        ASSERT_TRUE(b.finish(running[i].id, now).ok());
        for (std::size_t r = 0; r < 2; ++r) naive.usage[running[i].tenant][r] -= running[i].demand[r];
        running.erase(running.begin() + static_cast<std::ptrdiff_t>(i));
      } else if (what == 7 && !naive.pending.empty()) {
        auto& item = naive.pending[random.below(naive.pending.size())];
        ASSERT_TRUE(b.hold(item.request.id, "", now).ok());
        item.held = true;
      } else if (what == 8) {
        b.retry(now);
        for (auto& item : naive.pending) item.held = false;
      } else if (!naive.pending.empty()) {
        const auto i = random.below(naive.pending.size());
        ASSERT_TRUE(b.withdraw(naive.pending[i].request.id, now).ok());
        naive.pending.erase(naive.pending.begin() + static_cast<std::ptrdiff_t>(i));
      }
      for (int k = 0; k < 2; ++k) {
        const auto turn = b.next(now);
        naive.sampled = now / 1000 * 1000;
        naive.level.clear();
        // Levels are the book's own (their past is tested above): this is about the order.
        for (const auto& t : b.report(0).tenants) naive.level.push_back(t.level);
        ASSERT_EQ(turn ? std::optional(turn->request) : std::nullopt, naive.next())
            << "seed " << seed << " step " << step;
        if (!turn || random.below(3) == 0) break;
        ASSERT_EQ(b.order(now, 1).at(0), *turn);
        ASSERT_TRUE(b.admit(turn->request, now).ok());
        const auto found = std::find_if(naive.pending.begin(), naive.pending.end(),
                                        [&](const auto& item) { return item.request.id == turn->request; });
        ASSERT_NE(found, naive.pending.end());
        running.push_back(found->request);
        for (std::size_t r = 0; r < 2; ++r) naive.usage[turn->tenant][r] += found->request.demand[r];
        naive.pending.erase(found);
      }
      if (step % 25 != 0) continue;
      for (const auto& item : naive.pending) {
        const auto reason = b.explain(item.request.id, now);
        ASSERT_TRUE(reason.ok());
        ASSERT_FALSE(reason->text.empty());
      }
    }
  }
}

}  // namespace
}  // namespace bulkhead::fairness
