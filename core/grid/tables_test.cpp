#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <map>
#include <set>
#include <tuple>

#include "core/grid/grid.hpp"
#include "core/mig/models_for_tests.hpp"

namespace bulkhead::grid {
namespace {

using mig::a100;
using mig::a30;
using mig::geometry_of;
using mig::h100;
using mig::rtx_pro_6000;
using mig::six_shapes;

struct Named {
  const char* name;
  mig::Geometry geometry;
};
std::vector<Named> models() {
  return {{"H100", h100()},
          {"six shapes", six_shapes()},
          {"A100", a100()},
          {"A30", a30()},
          {"RTX PRO 6000", rtx_pro_6000()}};
}
Tables tables_of(const mig::Geometry& geometry, std::span<const unsigned> weights = {}) {
  return Tables::make(geometry, weights).value();
}

std::size_t moves_of(const Tables& tables) {
  std::size_t moves = 0;
  for (std::size_t s = 0; s < tables.set_count(); ++s) {
    for (unsigned place = 0; place < tables.places().size(); ++place)
      moves += tables.next(static_cast<SetId>(s), place) != no_set ? 1 : 0;
  }
  return moves;
}
std::size_t masks_of(const Tables& tables) {
  std::set<std::uint32_t> masks;
  for (std::size_t s = 0; s < tables.set_count(); ++s) masks.insert(tables.mask(static_cast<SetId>(s)));
  return masks.size();
}
std::size_t maximal_of(const Tables& tables) {
  std::size_t maximal = 0;
  for (std::size_t s = 0; s < tables.set_count(); ++s) {
    bool full = true;
    for (unsigned place = 0; place < tables.places().size(); ++place)
      full = full && tables.next(static_cast<SetId>(s), place) == no_set;
    maximal += full ? 1 : 0;
  }
  return maximal;
}

// ---- written apart from the code under test: sets as lists, limits as sums over the whole list
using List = std::vector<std::pair<unsigned, unsigned>>;  // (profile index, start), sorted

bool allowed(const mig::Geometry& geometry, const List& list) {
  unsigned compute = 0, decoders = 0, encoders = 0, jpeg = 0, flow = 0;
  std::vector<unsigned> used(geometry.memory_slices, 0), same(geometry.profiles.size(), 0);
  mig::Profile most;
  for (const auto& profile : geometry.profiles) {
    most.compute_slices = std::max(most.compute_slices, profile.compute_slices);
    most.decoders = std::max(most.decoders, profile.decoders);
    most.encoders = std::max(most.encoders, profile.encoders);
    most.jpeg_engines = std::max(most.jpeg_engines, profile.jpeg_engines);
    most.optical_flow = std::max(most.optical_flow, profile.optical_flow);
  }
  for (const auto& [p, start] : list) {
    const auto& profile = geometry.profiles[p];
    if (++same[p] > profile.max_instances) return false;
    for (unsigned unit = start; unit < start + profile.size; ++unit) {
      if (++used[unit] > 1) return false;
    }
    compute += profile.compute_slices;
    decoders += profile.decoders;
    encoders += profile.encoders;
    jpeg += profile.jpeg_engines;
    flow += profile.optical_flow;
  }
  return compute <= most.compute_slices && decoders <= most.decoders && encoders <= most.encoders &&
         jpeg <= most.jpeg_engines && flow <= most.optical_flow;
}

void grow(const mig::Geometry& geometry, const List& list, std::set<List>& all) {
  if (!all.insert(list).second) return;
  for (unsigned p = 0; p < geometry.profiles.size(); ++p) {
    for (const unsigned start : geometry.profiles[p].starts) {
      List more = list;
      more.emplace_back(p, start);
      std::sort(more.begin(), more.end());
      if (std::adjacent_find(more.begin(), more.end()) == more.end() && allowed(geometry, more))
        grow(geometry, more, all);
    }
  }
}

List list_of(const Tables& tables, SetId set) {
  List list;
  for (auto bits = tables.bits(set); bits != 0; bits &= bits - 1) {
    const Place& place = tables.places()[static_cast<unsigned>(std::countr_zero(bits))];
    list.emplace_back(place.profile, place.start);
  }
  std::sort(list.begin(), list.end());
  return list;
}

// Tries every subset of starts.
unsigned most_that_fit(const mig::Geometry& geometry, const List& list, unsigned profile) {
  const auto& starts = geometry.profiles[profile].starts;
  unsigned most = 0;
  for (std::uint32_t subset = 0; subset < 1U << starts.size(); ++subset) {
    const auto count = static_cast<unsigned>(std::popcount(subset));
    if (count <= most) continue;
    List more = list;
    for (std::size_t i = 0; i < starts.size(); ++i) {
      if ((subset >> i & 1U) != 0) more.emplace_back(profile, starts[i]);
    }
    if (allowed(geometry, more)) most = count;
  }
  return most;
}

TEST(GridTables, the_six_shapes_of_an_h100_have_723_sets_192_masks_78_maximal_states_and_2585_moves) {
  const Tables tables = tables_of(six_shapes());
  EXPECT_EQ(tables.set_count(), 723U);
  EXPECT_EQ(masks_of(tables), 192U);
  EXPECT_EQ(maximal_of(tables), 78U);
  EXPECT_EQ(moves_of(tables), 2585U);
}

TEST(GridTables, the_seven_profiles_that_the_driver_names_have_2319_sets_and_9129_moves) {
  const Tables tables = tables_of(h100());
  EXPECT_EQ(tables.set_count(), 2319U);
  EXPECT_EQ(masks_of(tables), 192U);
  EXPECT_EQ(maximal_of(tables), 239U);
  EXPECT_EQ(moves_of(tables), 9129U);
}

TEST(GridTables, every_legal_set_is_there_once_and_no_other) {
  for (const auto& model : models()) {
    std::set<List> all;
    grow(model.geometry, {}, all);
    const Tables tables = tables_of(model.geometry);
    std::set<List> ours;
    for (std::size_t s = 0; s < tables.set_count(); ++s) {
      ours.insert(list_of(tables, static_cast<SetId>(s)));
      ASSERT_EQ(tables.find(tables.bits(static_cast<SetId>(s))), static_cast<SetId>(s));
    }
    EXPECT_EQ(ours.size(), tables.set_count()) << model.name;
    EXPECT_EQ(ours, all) << model.name;
  }
}

TEST(GridTables, sets_are_numbered_by_instances_then_by_places) {
  const Tables tables = tables_of(h100());
  EXPECT_EQ(tables.bits(0), 0U);
  for (std::size_t s = 1; s < tables.set_count(); ++s) {
    const auto before = static_cast<SetId>(s - 1), here = static_cast<SetId>(s);
    ASSERT_LT(std::pair(tables.instances(before), tables.bits(before)),
              std::pair(tables.instances(here), tables.bits(here)));
  }
}

TEST(GridTables, every_move_from_every_state_is_legal_exactly_when_mig_says_so_and_is_undone) {
  for (const auto& model : models()) {
    const Tables tables = tables_of(model.geometry);
    for (std::size_t s = 0; s < tables.set_count(); ++s) {
      const auto set = static_cast<SetId>(s);
      std::vector<mig::NewInstance> there;
      for (const auto& [p, start] : list_of(tables, set))
        there.push_back({model.geometry.profiles[p].id, {start, model.geometry.profiles[p].size}});
      ASSERT_TRUE(mig::legal(model.geometry, there));
      for (unsigned place = 0; place < tables.places().size(); ++place) {
        const Place& at = tables.places()[place];
        const SetId more = tables.next(set, place);
        const bool held = (tables.bits(set) >> place & 1U) != 0;
        there.push_back({model.geometry.profiles[at.profile].id, {at.start, at.size}});
        ASSERT_EQ(more != no_set, mig::legal(model.geometry, there))
            << model.name << " set " << s << " place " << place;
        there.pop_back();
        if (more != no_set) {
          ASSERT_EQ(tables.without(more, place), set);
          ASSERT_EQ(tables.bits(more), tables.bits(set) | std::uint64_t{1} << place);
          ASSERT_EQ(tables.free_units(more) + at.size, tables.free_units(set));
          ASSERT_EQ(tables.growth(set, place), tables.waste(more) - tables.waste(set));
        }
        ASSERT_EQ(tables.without(set, place) != no_set, held);
      }
    }
  }
}

TEST(GridTables, packing_and_waste_are_what_trying_everything_finds_in_every_state) {
  for (const auto& model : models()) {
    const Tables tables = tables_of(model.geometry);
    for (std::size_t s = 0; s < tables.set_count(); ++s) {
      const auto set = static_cast<SetId>(s);
      const List list = list_of(tables, set);
      std::int32_t waste = 0;
      for (unsigned p = 0; p < tables.profile_count(); ++p) {
        const unsigned most = most_that_fit(model.geometry, list, p);
        ASSERT_EQ(tables.maxpack(set, p), most) << model.name << " set " << s << " profile " << p;
        const auto size = static_cast<std::int32_t>(tables.size(p));
        waste += static_cast<std::int32_t>(tables.weight(p)) *
                 (static_cast<std::int32_t>(tables.free_units(set)) - size * static_cast<std::int32_t>(most));
      }
      ASSERT_EQ(tables.waste(set), waste);
    }
  }
}

TEST(GridTables, an_a30_holds_one_instance_with_media_extensions) {
  const Tables tables = tables_of(a30());
  const SetId one = tables.next(0, *tables.place_of(1, 0));
  ASSERT_NE(one, no_set);
  EXPECT_EQ(tables.maxpack(one, 1), 0U);
  EXPECT_EQ(tables.maxpack(one, 3), 0U);
  EXPECT_EQ(tables.maxpack(one, 0), 3U);
}

TEST(GridTables, a_ranked_list_is_in_its_order_and_names_each_set_that_fits_at_its_best_start) {
  for (const auto& model : models()) {
    const Tables tables = tables_of(model.geometry);
    for (unsigned p = 0; p < tables.profile_count(); ++p) {
      const auto key = [&](const Ranked& r) {
        return std::tuple(r.set == 0, r.growth, tables.free_units(r.set),
                          unsigned{tables.places()[r.place].start}, r.set);
      };
      const auto ranked = tables.ranked(p);
      std::size_t fit = 0;
      for (std::size_t s = 0; s < tables.set_count(); ++s)
        fit += tables.maxpack(static_cast<SetId>(s), p) > 0 ? 1 : 0;
      ASSERT_EQ(ranked.size(), fit);
      for (std::size_t r = 0; r < ranked.size(); ++r) {
        ASSERT_TRUE(r == 0 || key(ranked[r - 1]) < key(ranked[r]));
        ASSERT_EQ(tables.rank_of(p, ranked[r].set), r);
        ASSERT_EQ(tables.next(ranked[r].set, ranked[r].place), ranked[r].after);
        for (unsigned place = tables.first_place(p); place < tables.first_place(p + 1); ++place) {
          if (tables.next(ranked[r].set, place) == no_set) continue;
          const auto growth = tables.growth(ranked[r].set, place);
          ASSERT_TRUE(growth > ranked[r].growth || (growth == ranked[r].growth && place >= ranked[r].place));
        }
      }
    }
  }
}

TEST(GridTables, evictions_are_all_the_smallest_groups_that_make_room) {
  for (const auto& model : models()) {
    const Tables tables = tables_of(model.geometry);
    ASSERT_EQ(tables.eviction_limit(), max_moves);
    for (unsigned p = 0; p < tables.profile_count(); ++p) {
      std::set<std::pair<SetId, std::uint64_t>> listed;
      for (const auto& group : tables.evictions(p)) {
        for (const auto& way : group.ways) ASSERT_TRUE(listed.emplace(way.set, way.evicted).second);
      }
      std::set<std::pair<SetId, std::uint64_t>> expected;
      for (std::size_t s = 0; s < tables.set_count(); ++s) {
        const auto set = static_cast<SetId>(s);
        if (tables.maxpack(set, p) > 0) continue;
        const std::uint64_t all = tables.bits(set);
        const auto enough = [&](std::uint64_t evicted) {
          return tables.maxpack(*tables.find(all & ~evicted), p) > 0;
        };
        for (std::uint64_t part = all; part != 0; part = (part - 1) & all) {
          if (std::popcount(part) > static_cast<int>(max_moves) || !enough(part)) continue;
          bool least = true;
          for (std::uint64_t sub = (part - 1) & part; sub != 0 && least; sub = (sub - 1) & part)
            least = !enough(sub);
          if (least) expected.emplace(set, part);
        }
      }
      ASSERT_EQ(listed, expected) << model.name << " profile " << p;
    }
  }
}

TEST(GridTables, weights_other_than_the_sizes_are_taken) {
  const std::vector<unsigned> weights = {0, 0, 0, 0, 1, 0};
  const Tables tables = tables_of(six_shapes(), weights);
  EXPECT_EQ(tables.waste(0), 4);  // of 8 units 4g can use 4
  EXPECT_EQ(tables.growth(0, *tables.place_of(0, 4)), -1);
  EXPECT_EQ(tables.growth(0, *tables.place_of(0, 0)), 3);
  EXPECT_EQ(tables.ranked(0).back().set, 0);
  EXPECT_EQ(tables.places()[tables.ranked(0).back().place].start, 4);
}

TEST(GridTables, a_profile_in_the_places_of_another_counts_once) {
  const mig::Geometry geometry = h100();
  const Tables tables = tables_of(geometry);
  for (unsigned p = 0; p < tables.profile_count(); ++p) {
    const bool shadow = geometry.profiles[p].name == "1g.10gb+me";
    EXPECT_EQ(tables.weight(p), shadow ? 0 : geometry.profiles[p].size) << geometry.profiles[p].name;
  }
}

TEST(GridTables, a_geometry_that_cannot_be_is_refused_with_the_reason) {
  const auto why = [](const mig::Geometry& geometry, std::span<const unsigned> weights = {}) {
    const auto made = Tables::make(geometry, weights);
    return made.ok() ? std::string("accepted") : made.error().message();
  };
  EXPECT_NE(why({}).find("no profile"), std::string::npos);
  auto geometry = six_shapes();
  geometry.memory_slices = 4096;
  EXPECT_NE(why(geometry).find("4096"), std::string::npos);
  geometry = six_shapes();
  geometry.profiles[2].starts.push_back(7);
  EXPECT_NE(why(geometry).find("beyond the grid"), std::string::npos);
  geometry = six_shapes();
  geometry.profiles[2].starts.push_back(0xfffffff0U);
  EXPECT_NE(why(geometry).find("beyond the grid"), std::string::npos);
  geometry = six_shapes();
  geometry.profiles[0].size = 0;
  EXPECT_NE(why(geometry).find("beyond the grid"), std::string::npos);
  geometry = six_shapes();
  geometry.profiles[3].starts.clear();
  EXPECT_NE(why(geometry).find("no placement"), std::string::npos);
  geometry = six_shapes();
  geometry.profiles[1].id = geometry.profiles[0].id;
  EXPECT_NE(why(geometry).find("two profiles"), std::string::npos);
  const std::vector<unsigned> few = {1, 2}, heavy = {1, 1, 1, 1, 1, 1U << 20U};
  EXPECT_NE(why(six_shapes(), few).find("2 weights for 6"), std::string::npos);
  EXPECT_NE(why(six_shapes(), heavy).find("weight"), std::string::npos);
  EXPECT_EQ(why(six_shapes()), "accepted");
}

TEST(GridTables, a_geometry_with_too_many_sets_is_refused_and_soon) {
  std::vector<mig::ProfileRow> rows;
  std::vector<unsigned> starts;
  for (unsigned i = 0; i < 20; ++i) starts.push_back(i);
  for (unsigned p = 0; p < 3; ++p) rows.push_back({"1g", p, 0, 20, 0, 0, 0, 0, starts, 1});
  const auto made = Tables::make(geometry_of(20, rows));
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.error().code(), Errc::unsupported);
  EXPECT_NE(made.error().message().find("65535"), std::string::npos);
}

}  // namespace
}  // namespace bulkhead::grid
