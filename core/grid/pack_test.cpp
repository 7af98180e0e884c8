#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <set>

#include "base/prng.hpp"
#include "core/grid/grid.hpp"
#include "core/mig/models_for_tests.hpp"

namespace bulkhead::grid {
namespace {

using mig::a100;
using mig::a30;
using mig::h100;
using mig::rtx_pro_6000;
using mig::six_shapes;

Tables tables_of(const mig::Geometry& geometry) { return Tables::make(geometry).value(); }

// ---- the brute force, written apart: what one GPU can take beside `there`, as counts, by trying every set
// of places with mig::legal; then sums over GPUs.
using Counts = std::vector<unsigned>;

void grow(const mig::Geometry& geometry, std::vector<mig::NewInstance>& instances, Counts& counts,
          unsigned from, std::set<Counts>& all) {
  all.insert(counts);
  unsigned at = 0;
  for (unsigned p = 0; p < geometry.profiles.size(); ++p) {
    const auto& profile = geometry.profiles[p];
    for (const unsigned start : profile.starts) {
      if (at++ < from) continue;
      instances.push_back({profile.id, {start, profile.size}});
      ++counts[p];
      if (mig::legal(geometry, instances)) grow(geometry, instances, counts, at, all);
      --counts[p];
      instances.pop_back();
    }
  }
}

std::set<Counts> of_one(const mig::Geometry& geometry, const Tables& tables, SetId set) {
  std::vector<mig::NewInstance> instances;
  for (auto bits = tables.bits(set); bits != 0; bits &= bits - 1) {
    const Place& place = tables.places()[static_cast<unsigned>(std::countr_zero(bits))];
    instances.push_back({geometry.profiles[place.profile].id, {place.start, place.size}});
  }
  std::set<Counts> all;
  Counts counts(geometry.profiles.size(), 0);
  grow(geometry, instances, counts, 0, all);
  return all;
}

std::vector<std::uint64_t> wide(const Counts& counts) { return {counts.begin(), counts.end()}; }

// Not part of another.
std::vector<Counts> tops(const std::set<Counts>& all) {
  std::vector<Counts> out;
  for (const auto& counts : all) {
    bool top = true;
    for (std::size_t p = 0; p < counts.size() && top; ++p) {
      Counts more = counts;
      ++more[p];
      top = !all.contains(more);
    }
    if (top) out.push_back(counts);
  }
  return out;
}

std::set<Counts> sums(const std::set<Counts>& some, const std::vector<Counts>& more) {
  std::set<Counts> out;
  for (const auto& a : some) {
    for (const auto& b : more) {
      Counts sum = a;
      for (std::size_t p = 0; p < sum.size(); ++p) sum[p] += b[p];
      out.insert(std::move(sum));
    }
  }
  return out;
}

// Every vector of a box, marked when it is part of one that can be had.
struct Box {
  Counts most;
  std::vector<std::uint8_t> fits;

  Box(Counts limits, const std::set<Counts>& reachable) : most(std::move(limits)) {
    std::size_t cells = 1;
    for (const unsigned m : most) cells *= m + 1;
    fits.assign(cells, 0);
    for (const auto& counts : reachable) fits[cell(counts)] = 1;
    std::size_t stride = 1;
    for (const unsigned m : most) {
      for (std::size_t at = cells; at-- > 0;) {
        if (at / stride % (m + 1) < m && fits[at + stride] != 0) fits[at] = 1;
      }
      stride *= m + 1;
    }
  }
  std::size_t cell(const Counts& counts) const {
    std::size_t at = 0, stride = 1;
    for (std::size_t p = 0; p < most.size(); ++p) {
      at += counts[p] * stride;
      stride *= most[p] + 1;
    }
    return at;
  }
  template <class Visit>
  void each(const Visit& visit) const {
    Counts counts(most.size(), 0);
    for (std::size_t at = 0; at < fits.size(); ++at) {
      visit(counts, fits[at] != 0);
      for (std::size_t p = 0; p < most.size(); ++p) {
        if (++counts[p] <= most[p]) break;
        counts[p] = 0;
      }
    }
  }
};

TEST(GridPack, the_closed_form_is_what_every_packing_of_one_to_three_gpus_shows) {
  const auto geometry = six_shapes();
  const Tables tables = tables_of(geometry);
  ASSERT_TRUE(tables.seven_of_eight());
  const auto one = tops(of_one(geometry, tables, 0));
  std::set<Counts> reachable = {Counts(6, 0)};
  std::size_t checked = 0;
  for (unsigned gpus = 1; gpus <= 3; ++gpus) {
    reachable = sums(reachable, one);
    // One past what fits of each alone, so that each refusal is met too.
    Box box({7 * gpus + 1, 4 * gpus + 1, 3 * gpus + 1, 2 * gpus + 1, gpus + 1, gpus + 1}, reachable);
    const std::array<Group, 1> groups = {{{0, gpus}}};
    std::size_t wrong = 0;
    box.each([&](const Counts& counts, bool fits) {
      const std::array<std::uint64_t, 6> demand = {counts[0], counts[1], counts[2],
                                                   counts[3], counts[4], counts[5]};
      wrong += seven_of_eight_holds(tables, groups, demand) != fits ? 1 : 0;
      ++checked;
    });
    EXPECT_EQ(wrong, 0U) << gpus << " GPUs";
  }
  EXPECT_EQ(checked, 9U * 6 * 5 * 4 * 3 * 3 + 16U * 10 * 8 * 6 * 4 * 4 + 23U * 14 * 11 * 8 * 5 * 5);
}

TEST(GridPack, beside_every_single_state_it_says_what_trying_everything_says) {
  for (const auto& geometry : {six_shapes(), h100(), a30(), rtx_pro_6000()}) {
    const Tables tables = tables_of(geometry);
    Prng random(3);
    const std::size_t step = tables.set_count() / 40 + 1;
    for (std::size_t s = 0; s < tables.set_count(); s += 1 + random.below(step)) {
      const auto set = static_cast<SetId>(s);
      const auto all = of_one(geometry, tables, set);
      const std::array<Group, 1> groups = {{{set, 1}}};
      for (const auto& counts : all) {
        ASSERT_EQ(can_hold(tables, groups, wide(counts)), Verdict::yes);
        for (std::size_t p = 0; p < counts.size(); ++p) {
          Counts more = counts;
          ++more[p];
          ASSERT_EQ(can_hold(tables, groups, wide(more)), all.contains(more) ? Verdict::yes : Verdict::no);
        }
      }
    }
  }
}

TEST(GridPack, beside_what_is_there_on_two_or_three_gpus_it_says_what_trying_everything_says) {
  std::array<unsigned, 2> answers{};
  for (const auto& geometry : {six_shapes(), h100(), a30(), a100(), rtx_pro_6000()}) {
    const Tables tables = tables_of(geometry);
    for (std::uint64_t seed = 0; seed < 12; ++seed) {
      Prng random(seed);
      std::vector<Group> groups;
      std::set<Counts> reachable = {Counts(geometry.profiles.size(), 0)};
      for (unsigned g = 0; g < 2 + seed % 2; ++g) {
        // Mostly thin sets: they leave room.
        const std::uint64_t bound = random.below(2) == 0 ? tables.set_count() : tables.places().size() + 1;
        const auto set = static_cast<SetId>(random.below(bound));
        groups.push_back({set, 1});
        reachable = sums(reachable, tops(of_one(geometry, tables, set)));
        if (reachable.size() > 20'000) break;
      }
      const std::vector<Counts> list(reachable.begin(), reachable.end());
      for (int i = 0; i < 60; ++i) {
        Counts wanted = list[random.below(list.size())];
        for (auto& count : wanted) count = static_cast<unsigned>(random.below(count + 1));
        const auto bump = random.below(wanted.size() + 2);
        if (bump < wanted.size()) wanted[bump] += 1 + static_cast<unsigned>(random.below(2));
        const bool fits = std::any_of(list.begin(), list.end(), [&](const Counts& top) {
          return std::equal(wanted.begin(), wanted.end(), top.begin(),
                            [](unsigned a, unsigned b) { return a <= b; });
        });
        ASSERT_EQ(can_hold(tables, groups, wide(wanted)), fits ? Verdict::yes : Verdict::no);
        ++answers[fits ? 1 : 0];
      }
    }
  }
  EXPECT_GT(answers[0], 300U);
  EXPECT_GT(answers[1], 300U);
}

TEST(GridPack, the_closed_form_is_taken_only_where_no_limit_but_the_places_binds) {
  EXPECT_TRUE(tables_of(six_shapes()).seven_of_eight());
  EXPECT_TRUE(tables_of(h100()).seven_of_eight());
  EXPECT_TRUE(tables_of(a100()).seven_of_eight());
  EXPECT_FALSE(tables_of(a30()).seven_of_eight());
  EXPECT_FALSE(tables_of(rtx_pro_6000()).seven_of_eight());
  auto limited = six_shapes();
  limited.profiles[1].max_instances = 2;
  EXPECT_FALSE(tables_of(limited).seven_of_eight());
  // The profile with media extensions is not the 1g, and is not answered by the form.
  const Tables tables = tables_of(h100());
  EXPECT_EQ(tables.seven_of_eight()->role[0], 0);
  const std::array<Group, 1> groups = {{{0, 4}}};
  const std::array<std::uint64_t, 7> extensions = {0, 4, 0, 0, 0, 0, 0}, too_many = {0, 5, 0, 0, 0, 0, 0};
  EXPECT_FALSE(seven_of_eight_holds(tables, groups, extensions));
  EXPECT_EQ(can_hold(tables, groups, extensions), Verdict::yes);
  EXPECT_EQ(can_hold(tables, groups, too_many), Verdict::no);
}

TEST(GridPack, demands_of_any_size_are_answered_and_what_is_too_hard_is_not_guessed) {
  const Tables tables = tables_of(h100());
  const std::array<Group, 1> fleet = {{{0, 100'000}}};
  const std::array<std::uint64_t, 7> seven = {0, 0, 0, 0, 0, 0, 100'000}, more = {1, 0, 0, 0, 0, 0, 100'000};
  EXPECT_EQ(can_hold(tables, fleet, seven), Verdict::yes);
  EXPECT_EQ(can_hold(tables, fleet, more), Verdict::no);
  const std::array<std::uint64_t, 7> absurd = {~0ULL, ~0ULL, ~0ULL, ~0ULL, ~0ULL, ~0ULL, ~0ULL};
  EXPECT_EQ(can_hold(tables, fleet, absurd), Verdict::no);
  const std::array<std::uint64_t, 9> unknown = {0, 0, 0, 0, 0, 0, 0, 0, 1};
  EXPECT_EQ(can_hold(tables, fleet, unknown), Verdict::no);
  EXPECT_EQ(can_hold(tables, {}, {}), Verdict::yes);
  // A search that may look at nothing decides nothing, unless a bound or a greedy packing did.
  const Tables rtx = tables_of(rtx_pro_6000());
  const std::array<Group, 1> three = {{{0, 3}}};
  unsigned undecided = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    Prng random(seed);
    std::array<std::uint64_t, 11> demand{};
    for (auto& count : demand) count = random.below(3);
    const auto quick = can_hold(rtx, three, demand, 0), exact = can_hold(rtx, three, demand);
    EXPECT_NE(exact, Verdict::undecided);
    if (quick == Verdict::undecided) {
      ++undecided;
    } else {
      EXPECT_EQ(quick, exact);
    }
  }
  RecordProperty("undecided_without_search", static_cast<int>(undecided));
}

}  // namespace
}  // namespace bulkhead::grid
