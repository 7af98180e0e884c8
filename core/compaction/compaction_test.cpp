#include "core/compaction/compaction.hpp"

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/prng.hpp"
#include "core/grid/grid.hpp"
#include "core/models/models.hpp"

namespace bulkhead::compaction {
namespace {

mig::Geometry h100() { return models::geometry(*models::find("h100-80gb")); }
mig::Geometry a30() { return models::geometry(*models::find("a30")); }
mig::Geometry twelve() { return models::geometry(*models::find("rtx-pro-6000")); }

std::vector<mig::NewInstance> places_of(const mig::Geometry& geometry, const std::vector<Instance>& instances) {
  std::vector<mig::NewInstance> out;
  for (const auto& i : instances) out.push_back({i.profile, {i.start, geometry.by_id(i.profile)->size}, 0});
  return out;
}
bool fits(const mig::Geometry& geometry, const std::vector<Instance>& instances) {
  return mig::legal(geometry, places_of(geometry, instances));
}

// Tables are made once a geometry: under sanitizers they take long.
std::shared_ptr<const grid::Tables> tables_of(const mig::Geometry& geometry) {
  static std::vector<std::shared_ptr<const grid::Tables>> made;
  for (const auto& tables : made) {
    if (tables->geometry() == geometry) return tables;
  }
  return made.emplace_back(std::make_shared<const grid::Tables>(grid::Tables::make(geometry).value()));
}

struct Shape {
  double stays = 0.6, unmovable = 0, closed = 0, invisible = 0;
  std::uint64_t prices = 1;
  unsigned tries = 12;
};
// GPUs filled at random, of which a share has left since.
Fleet random_fleet(Prng& random, std::vector<mig::Geometry> pools, std::size_t gpus, const Shape& shape) {
  Fleet fleet;
  fleet.pools = std::move(pools);
  for (const auto& pool : fleet.pools) fleet.tables.push_back(tables_of(pool));
  std::uint64_t id = 100;
  for (std::size_t g = 0; g < gpus; ++g) {
    Gpu gpu;
    gpu.pool = static_cast<unsigned>(random.below(fleet.pools.size()));
    gpu.open = random.unit() >= shape.closed;
    const auto& geometry = fleet.pools[gpu.pool];
    for (unsigned k = 0; k < shape.tries; ++k) {
      const auto& p = geometry.profiles[random.below(geometry.profiles.size())];
      gpu.instances.push_back({id++, p.id, p.starts[random.below(p.starts.size())], random.unit() >= shape.unmovable,
                               random.below(shape.prices) + (shape.prices == 1 ? 1 : 0),
                               random.unit() >= shape.invisible});
      if (!fits(geometry, gpu.instances)) gpu.instances.pop_back();
    }
    std::erase_if(gpu.instances, [&](const Instance&) { return random.unit() >= shape.stays; });
    fleet.gpus.push_back(std::move(gpu));
  }
  return fleet;
}

std::size_t in_use(const Fleet& fleet) {
  return static_cast<std::size_t>(
      std::count_if(fleet.gpus.begin(), fleet.gpus.end(), [](const Gpu& gpu) { return !gpu.instances.empty(); }));
}
std::multiset<std::pair<std::uint64_t, unsigned>> census(const Fleet& fleet) {
  std::multiset<std::pair<std::uint64_t, unsigned>> out;
  for (const auto& gpu : fleet.gpus) {
    for (const auto& instance : gpu.instances) out.emplace(instance.id, instance.profile);
  }
  return out;
}
// (price + 1) over the instances that are elsewhere in the end, each once.
std::uint64_t paid(const Moves& moves) {
  std::map<std::uint64_t, std::uint64_t> moved;
  for (const auto& move : moves.list) moved[move.instance] = move.price + 1;
  std::uint64_t sum = 0;
  for (const auto& [id, price] : moved) sum += price;
  return sum;
}

// Every way to lay the instances out, by trying: fewest GPUs then least paid, or, with a profile asked for, most of
// it then least paid.
class Brute {
 public:
  explicit Brute(const Fleet& fleet, std::optional<unsigned> asked = {}, std::uint64_t enough = 0)
      : fleet_(fleet), asked_(asked), enough_(enough), now_(fleet) {
    for (std::size_t g = 0; g < fleet.gpus.size(); ++g) {
      std::erase_if(now_.gpus[g].instances, [](const Instance& i) { return i.movable; });
      for (const auto& instance : fleet.gpus[g].instances) {
        if (instance.movable) todo_.emplace_back(g, instance);
      }
    }
    std::stable_sort(todo_.begin(), todo_.end(), [&](const auto& a, const auto& b) {
      return size_of(a.second, fleet_.gpus[a.first].pool) > size_of(b.second, fleet_.gpus[b.first].pool);
    });
    go(0, 0);
  }
  std::pair<std::uint64_t, std::uint64_t> best() const { return best_; }  // (GPUs, paid) or (unmet, paid)

 private:
  unsigned size_of(const Instance& i, unsigned pool) const { return fleet_.pools[pool].by_id(i.profile)->size; }
  std::uint64_t score() const {
    if (!asked_) return in_use(now_);
    std::uint64_t room = 0;
    for (const auto& gpu : now_.gpus) {
      if (gpu.open)
        room += mig::capacity(fleet_.pools[gpu.pool], places_of(fleet_.pools[gpu.pool], gpu.instances), *asked_);
    }
    return room >= enough_ ? 0 : enough_ - room;
  }
  void go(std::size_t i, std::uint64_t cost) {
    // Instances only use more GPUs and leave less room as more are laid out.
    if (std::pair(score(), cost) >= best_) return;
    if (i == todo_.size()) {
      best_ = {score(), cost};
      return;
    }
    const auto& [home, instance] = todo_[i];
    const auto pool = fleet_.gpus[home].pool;
    const auto lay = [&](std::size_t g, unsigned start, std::uint64_t more) {
      auto& there = now_.gpus[g].instances;
      there.push_back(instance);
      there.back().start = start;
      if (fits(fleet_.pools[pool], there)) go(i + 1, cost + more);
      there.pop_back();
    };
    lay(home, instance.start, 0);
    for (std::size_t g = 0; g < now_.gpus.size(); ++g) {
      if (fleet_.gpus[g].pool != pool || !fleet_.gpus[g].open) continue;
      for (const auto start : fleet_.pools[pool].by_id(instance.profile)->starts) {
        if (g != home || start != instance.start) lay(g, start, instance.price + 1);
      }
    }
  }

  const Fleet& fleet_;
  std::optional<unsigned> asked_;
  std::uint64_t enough_;
  Fleet now_;
  std::vector<std::pair<std::size_t, Instance>> todo_;
  std::pair<std::uint64_t, std::uint64_t> best_ = {~std::uint64_t{0}, 0};
};

// Carries the moves out on the tables of core/grid: each destination is free in its turn, beside the instance itself.
void expect_executable(const Fleet& fleet, const Moves& moves) {
  std::vector<std::shared_ptr<const grid::Tables>> tables;
  for (const auto& pool : fleet.pools) tables.push_back(tables_of(pool));
  std::vector<grid::SetId> sets;
  std::map<std::uint64_t, Instance> known;
  for (const auto& gpu : fleet.gpus) {
    const auto& t = *tables[gpu.pool];
    grid::SetId set = 0;
    for (const auto& i : gpu.instances) {
      set = t.next(set, *t.place_of(*t.profile_of_id(i.profile), i.start));
      known[i.id] = i;
    }
    sets.push_back(set);
  }
  std::uint64_t price = 0, visible = 0;
  for (const auto& move : moves.list) {
    const auto pool = fleet.gpus[move.from.gpu].pool;
    ASSERT_EQ(pool, fleet.gpus[move.to.gpu].pool);
    ASSERT_TRUE(fleet.gpus[move.to.gpu].open);
    const auto& t = *tables[pool];
    const auto& instance = known.at(move.instance);
    ASSERT_TRUE(instance.movable);
    ASSERT_EQ(instance.price, move.price);
    const auto index = *t.profile_of_id(move.profile);
    const auto to = t.place_of(index, move.to.start), from = t.place_of(index, move.from.start);
    ASSERT_TRUE(to && from);
    sets[move.to.gpu] = t.next(sets[move.to.gpu], *to);
    ASSERT_NE(sets[move.to.gpu], grid::no_set) << "the destination is taken";
    ASSERT_EQ(t.bits(sets[move.from.gpu]) >> *from & 1U, 1U);
    sets[move.from.gpu] = t.without(sets[move.from.gpu], *from);
    ASSERT_EQ(move.empties, sets[move.from.gpu] == 0);
    price += move.price;
    visible += instance.visible ? 1 : 0;
  }
  EXPECT_EQ(moves.price, price);
  EXPECT_EQ(moves.visible, visible);
  const auto after = play(fleet, moves.list);
  ASSERT_TRUE(after.ok()) << after.error().message();
  EXPECT_EQ(census(*after), census(fleet)) << "an instance was lost or added";
  for (std::size_t g = 0; g < fleet.gpus.size(); ++g) {
    grid::SetId set = 0;
    const auto& t = *tables[fleet.gpus[g].pool];
    for (const auto& i : after->gpus[g].instances) set = t.next(set, *t.place_of(*t.profile_of_id(i.profile), i.start));
    EXPECT_EQ(set, sets[g]);
  }
}
void expect_sound(const Fleet& fleet, const Plan& plan) {
  expect_executable(fleet, plan.moves);
  const auto after = play(fleet, plan.moves.list);
  ASSERT_TRUE(after.ok());
  EXPECT_EQ(plan.before, in_use(fleet));
  EXPECT_EQ(plan.after, in_use(*after));
  EXPECT_LE(plan.after, plan.before);
  EXPECT_LE(plan.fewest, plan.after);
  EXPECT_LE(plan.cheapest, paid(plan.moves));
  for (const auto g : plan.freed) EXPECT_TRUE(after->gpus[g].instances.empty() && !fleet.gpus[g].instances.empty());
}
void expect_sound(const Fleet& fleet, std::span<const Wanted> wanted, const WhatIf& answer) {
  expect_executable(fleet, answer.moves);
  auto after = play(fleet, answer.moves.list);
  ASSERT_TRUE(after.ok());
  std::vector<std::uint64_t> placed(wanted.size(), 0);
  for (const auto& place : answer.places) {
    auto& gpu = after->gpus[place.at.gpu];
    ASSERT_TRUE(gpu.open);
    const auto& geometry = fleet.pools[gpu.pool];
    ASSERT_EQ(geometry.by_name(wanted[place.wanted].profile), geometry.by_id(place.profile));
    gpu.instances.push_back({~std::uint64_t{0}, place.profile, place.at.start, true, 1, true});
    ASSERT_TRUE(fits(geometry, gpu.instances)) << "a place that is promised is not free";
    ++placed[place.wanted];
  }
  EXPECT_EQ(placed, answer.fits);
}
// The same fleet with one more pool's worth of empty GPUs.
Fleet with_more(Fleet fleet, std::span<const WhatIf::MoreGpus> more) {
  for (const auto& [pool, count] : more) {
    for (std::uint64_t i = 0; i < count; ++i) fleet.gpus.push_back({pool, true, {}});
  }
  return fleet;
}

void agrees_with_brute_force(const mig::Geometry& geometry, std::size_t most_gpus_here, const Shape& shape,
                             unsigned rounds, std::size_t most_instances) {
  Prng random(7);
  for (unsigned round = 0; round < rounds;) {
    const auto fleet = random_fleet(random, {geometry}, 1 + random.below(most_gpus_here), shape);
    if (census(fleet).size() > most_instances) continue;
    ++round;
    SCOPED_TRACE(round);
    const auto plan = compact(fleet);
    ASSERT_TRUE(plan.ok()) << plan.error().message();
    expect_sound(fleet, *plan);
    const auto [gpus, cost] = Brute(fleet).best();
    EXPECT_EQ(plan->fewest, gpus);
    EXPECT_TRUE(plan->fewest_proven);
    if (plan->after == gpus) {
      EXPECT_EQ(paid(plan->moves), cost);
      EXPECT_EQ(plan->cheapest, cost);
    } else {
      // Only a circle without a free place may end it earlier.
      EXPECT_FALSE(plan->remains.empty());
      EXPECT_FALSE(plan->proven);
    }
  }
}

TEST(Compact, AgreesWithBruteForceOnAnH100) { agrees_with_brute_force(h100(), 3, {.stays = 0.5}, 60, 7); }
TEST(Compact, AgreesWithBruteForceOnAnA30) { agrees_with_brute_force(a30(), 3, {.stays = 0.7}, 60, 8); }
TEST(Compact, AgreesWithBruteForceOnAGridOfTwelve) { agrees_with_brute_force(twelve(), 3, {.stays = 0.6}, 60, 7); }
TEST(Compact, AgreesWithBruteForceWhereMovesCostDifferently) {
  agrees_with_brute_force(h100(), 3, {.stays = 0.5, .prices = 50}, 60, 7);
}
TEST(Compact, AgreesWithBruteForceWhereSomeMayNotMove) {
  agrees_with_brute_force(h100(), 3, {.stays = 0.6, .unmovable = 0.4, .prices = 5}, 60, 8);
}
TEST(Compact, AgreesWithBruteForceWhereSomeGpusTakeNothing) {
  agrees_with_brute_force(h100(), 3, {.stays = 0.5, .closed = 0.4, .prices = 5}, 60, 7);
}

TEST(Compact, NeverLosesAnInstanceNorMovesAnUnmovableOne) {
  Prng random(11);
  for (unsigned round = 0; round < 25; ++round) {
    SCOPED_TRACE(round);
    const auto fleet = random_fleet(
        random, {h100(), a30(), twelve()}, 20 + random.below(60),
        {.stays = 0.2 + 0.7 * random.unit(), .unmovable = 0.2, .closed = 0.1, .invisible = 0.5, .prices = 3});
    const auto plan = compact(fleet);
    ASSERT_TRUE(plan.ok()) << plan.error().message();
    expect_sound(fleet, *plan);
    EXPECT_TRUE(plan->fewest_proven);
  }
}

TEST(Compact, KeepsEveryLimit) {
  Prng random(12);
  for (unsigned round = 0; round < 5; ++round) {
    SCOPED_TRACE(round);
    const auto fleet = random_fleet(random, {h100()}, 12, {.stays = 0.5, .invisible = 0.5, .prices = 20});
    const auto free = compact(fleet).value();
    std::size_t last = free.before;
    for (const std::uint64_t moves : {0U, 1U, 2U, 4U, 8U, 100U}) {
      const auto plan = compact(fleet, {.moves = moves}).value();
      expect_sound(fleet, plan);
      EXPECT_LE(plan.moves.list.size(), moves);
      EXPECT_LE(plan.after, last) << "more moves must not end at more GPUs";
      last = plan.after;
    }
    EXPECT_EQ(last, free.after);
    const auto cheap = compact(fleet, {.price = 25, .visible = 2}).value();
    expect_sound(fleet, cheap);
    EXPECT_LE(cheap.moves.price, 25U);
    EXPECT_LE(cheap.moves.visible, 2U);
    if (cheap.after > cheap.fewest) {
      EXPECT_FALSE(cheap.remains.empty());
    }
  }
}

TEST(Compact, FindsTheMostThatAFewMovesCanFree) {
  // By brute force: the fewest GPUs over all ways to choose at most two instances that move.
  Prng random(13);
  for (unsigned round = 0; round < 40; ++round) {
    SCOPED_TRACE(round);
    const auto fleet = random_fleet(random, {a30()}, 3, {.stays = 0.6});
    const auto plan = compact(fleet, {.moves = 2}).value();
    expect_sound(fleet, plan);
    std::size_t best = in_use(fleet);
    std::vector<std::uint64_t> ids;
    for (const auto& [id, p] : census(fleet)) ids.push_back(id);
    for (const auto a : ids) {
      for (const auto b : ids) {
        auto held = fleet;
        for (auto& gpu : held.gpus) {
          for (auto& i : gpu.instances) i.movable = i.id == a || i.id == b;
        }
        best = std::min<std::size_t>(best, Brute(held).best().first);
      }
    }
    EXPECT_EQ(plan.after, best);
  }
}

TEST(Compact, StepsAsideWhereMovesBlockEachOther) {
  // Room for a 7g is there once the 1g.20gb and the 2g + 1g of the first GPU have changed sides, and no place is free
  // for the one before the other has gone: the 1g waits on the GPU between them.
  auto geometry = h100();
  std::erase_if(geometry.profiles, [](const mig::Profile& p) { return p.name == "1g.10gb+me"; });
  const Fleet fleet{{geometry},
                    {{0, true, {{1, 5, 0}, {2, 14, 4}, {3, 19, 6}}},
                     {0, true, {{6, 19, 4}}},
                     {0, true, {{7, 14, 2, false}, {8, 9, 4, false}, {9, 15, 0}}}}};
  const std::vector<Wanted> wanted = {{"7g.80gb", 1, {}}};
  const auto answer = what_if(fleet, wanted).value();
  expect_sound(fleet, wanted, answer);
  EXPECT_EQ(answer.fit, Fit::with_moves);
  EXPECT_EQ(std::count_if(answer.moves.list.begin(), answer.moves.list.end(), [](const Move& m) { return m.detour; }),
            1);
  EXPECT_EQ(paid(answer.moves), 6U);
}

TEST(Compact, SaysSoWhereNoPlaceIsFreeToStepAside) {
  // A GPU holds at most one 1g with the media engines, so it cannot be made a second time beside itself.
  const Fleet fleet{{h100()}, {{0, true, {{1, 20, 3}}}}};
  const std::vector<Wanted> wanted = {{"2g.20gb", 3, {}}};
  const auto answer = what_if(fleet, wanted).value();
  expect_sound(fleet, wanted, answer);
  EXPECT_EQ(answer.fits, std::vector<std::uint64_t>{2});
  EXPECT_FALSE(answer.proven);
  EXPECT_NE(answer.why.find("1 move cannot be ordered"), std::string::npos) << answer.why;
}

TEST(Compact, GivesTheSamePlanAgainAndToRenumberedFleetsTheSameFigures) {
  Prng random(15);
  const auto fleet = random_fleet(random, {h100()}, 60, {.stays = 0.5, .unmovable = 0.1, .prices = 4});
  const auto one = compact(fleet).value(), two = compact(fleet).value();
  EXPECT_EQ(one.moves.list, two.moves.list);
  auto other = fleet;
  random.shuffle(std::span(other.gpus));
  const auto moved = compact(other).value();
  EXPECT_EQ(moved.after, one.after);
  EXPECT_EQ(paid(moved.moves), paid(one.moves));
}

TEST(Compact, LeavesAFleetAloneThatIsPackedAlready) {
  Fleet fleet{{h100()}, {{0, true, {{1, 9, 0}, {2, 9, 4}}}, {0, true, {{3, 0, 0}}}, {0, true, {}}}};
  const auto plan = compact(fleet).value();
  EXPECT_TRUE(plan.moves.list.empty());
  EXPECT_EQ(plan.after, 2U);
  EXPECT_TRUE(plan.proven);
  EXPECT_TRUE(plan.remains.empty());
}

TEST(Compact, SaysWhatIsWrongWithAFleet) {
  const auto why = [](Fleet fleet) { return compact(fleet).error().message(); };
  EXPECT_EQ(why({{h100()}, {{3, true, {}}}}), "gpu 0: there is no pool 3");
  EXPECT_EQ(why({{h100()}, {{0, true, {{1, 77, 0}}}}}), "gpu 0: instance 1: its pool has no profile 77");
  EXPECT_EQ(why({{h100()}, {{0, true, {{1, 9, 2}}}}}), "gpu 0: instance 1: 3g.40gb cannot start at 2 here");
  EXPECT_EQ(why({{h100()}, {{0, true, {{1, 9, 0}, {2, 5, 0}}}}}), "gpu 0: its instances cannot lie there together");
  EXPECT_EQ(why({{h100()}, {{0, true, {{1, 9, 0}}}, {0, true, {{1, 9, 0}}}}}),
            "gpu 1: instance 1 is in the fleet twice");
  EXPECT_EQ(why({{h100()}, {{0, true, {{1, 9, 0, true, most_price + 1}}}}}),
            "gpu 0: instance 1: a price of 1000000001 is above 1000000000");
}

TEST(WhatIf, AgreesWithBruteForceOnWhatFitsAndOnTheMoves) {
  Prng random(21);
  unsigned unordered = 0;  // the brute force lays instances out anew and asks for no order of moves
  for (unsigned round = 0; round < 100;) {
    const auto fleet =
        random_fleet(random, {h100()}, 1 + random.below(3), {.stays = 0.5, .unmovable = 0.2, .prices = 3});
    if (census(fleet).size() > 7) continue;
    ++round;
    SCOPED_TRACE(round);
    const auto& p = fleet.pools[0].profiles[random.below(fleet.pools[0].profiles.size())];
    const std::vector<Wanted> wanted = {{p.name, 1 + random.below(6), {}}};
    const auto answer = what_if(fleet, wanted);
    ASSERT_TRUE(answer.ok()) << answer.error().message();
    expect_sound(fleet, wanted, *answer);
    const auto [unmet, cost] = Brute(fleet, p.id, wanted[0].count).best();
    if (answer->proven) {
      EXPECT_EQ(wanted[0].count - answer->fits[0], unmet);
      EXPECT_EQ(paid(answer->moves), cost);
    }
    EXPECT_GE(wanted[0].count - answer->fits[0], unmet);
    if (!answer->proven) {
      ++unordered;
      continue;
    }
    EXPECT_EQ(answer->fit, unmet == wanted[0].count ? Fit::no
                           : unmet > 0              ? Fit::partly
                           : cost > 0               ? Fit::with_moves
                                                    : Fit::now);
    if (unmet == 0) continue;
    // The nearest ways to yes are ways to yes, and no shorter one exists.
    ASSERT_EQ(answer->more_gpus.size(), 1U);
    auto larger = with_more(fleet, answer->more_gpus);
    EXPECT_EQ(what_if(larger, wanted)->fits[0], wanted[0].count);
    larger.gpus.pop_back();
    EXPECT_LT(what_if(larger, wanted)->fits[0], wanted[0].count);
    if (!answer->blocking.empty()) {
      auto freed = fleet;
      for (auto& gpu : freed.gpus) {
        for (auto& i : gpu.instances)
          i.movable = i.movable || std::count(answer->blocking.begin(), answer->blocking.end(), i.id) > 0;
      }
      EXPECT_EQ(Brute(freed, p.id, wanted[0].count).best().first, 0U);
    }
    EXPECT_FALSE(answer->why.empty());
  }
  EXPECT_LE(unordered, 5U);
}

TEST(WhatIf, KeepsLimitsAndSaysWhatWouldDoWithoutThem) {
  // Four GPUs, each with a 1g in the way of a 7g: each 7g takes one move.
  Fleet fleet{{h100()}, {}};
  for (std::uint64_t g = 0; g < 4; ++g) fleet.gpus.push_back({0, true, {{g + 1, 19, 0}}});
  const std::vector<Wanted> three = {{"7g.80gb", 3, {}}};
  const auto free = what_if(fleet, three).value();
  EXPECT_EQ(free.fit, Fit::with_moves);
  EXPECT_EQ(free.moves.list.size(), 3U);
  const auto two = what_if(fleet, three, {.moves = 2}).value();
  expect_sound(fleet, three, two);
  EXPECT_EQ(two.fit, Fit::partly);
  EXPECT_EQ(two.fits, std::vector<std::uint64_t>{2});
  EXPECT_EQ(two.moves.list.size(), 2U);
  ASSERT_TRUE(two.without_limits.has_value());
  EXPECT_EQ(two.without_limits->list.size(), 3U);
  ASSERT_EQ(two.more_gpus.size(), 1U);
  EXPECT_EQ(two.more_gpus[0].count, 1U);
  EXPECT_EQ(two.why,
            "2 of 3 7g.80gb fit (0 without a move; 28 free memory slices there), after 2 moves (price 2, 2 noticed by "
            "tenants); all would with 3 moves (price 3, 3 noticed by tenants), or with 1 more GPU");
}

TEST(WhatIf, NamesTheFewestUnmovableInstancesInTheWay) {
  Fleet fleet{{h100()},
              {{0, true, {{1, 19, 0, false}, {2, 19, 4, false}}}, {0, true, {{3, 19, 1, false}, {4, 14, 4}}}}};
  const std::vector<Wanted> wanted = {{"7g.80gb", 1, {}}};
  const auto answer = what_if(fleet, wanted).value();
  EXPECT_EQ(answer.fit, Fit::no);
  EXPECT_EQ(answer.blocking, std::vector<std::uint64_t>{3});
  EXPECT_TRUE(answer.proven);
}

TEST(WhatIf, SharesAMixedDemandOutOverPools) {
  Fleet fleet{{h100(), a30()}, {{0, true, {}}, {1, true, {{1, 14, 0}}}, {1, true, {{2, 14, 3}}}}};
  const std::vector<Wanted> wanted = {{"7g.80gb", 1, {}}, {"4g.24gb", 1, {}}, {"2g.12gb", 1, {}}};
  const auto answer = what_if(fleet, wanted).value();
  expect_sound(fleet, wanted, answer);
  EXPECT_EQ(answer.fit, Fit::with_moves);
  EXPECT_EQ(answer.moves.list.size(), 1U);
  EXPECT_EQ(what_if(fleet, std::vector<Wanted>{{"7g.80gb", 1, 1U}}).error().code(), Errc::not_found);
  EXPECT_EQ(what_if(fleet, std::vector<Wanted>{{"9g", 1, {}}}).error().message(),
            "9g: no GPU of this fleet has such a profile");
}

TEST(WhatIf, RandomMixedDemandsKeepTheirPromises) {
  Prng random(22);
  for (unsigned round = 0; round < 15; ++round) {
    SCOPED_TRACE(round);
    const auto fleet = random_fleet(random, {h100(), a30()}, 30,
                                    {.stays = 0.8, .unmovable = 0.3, .closed = 0.1, .invisible = 0.3, .prices = 9});
    std::vector<Wanted> wanted;
    for (unsigned i = 0; i < 3; ++i)
      wanted.push_back({fleet.pools[i % 2].profiles[random.below(5)].name, 1 + random.below(12), {}});
    Limits limits;
    if (round % 2 == 1) limits = {.moves = random.below(6), .price = random.below(30)};
    const auto answer = what_if(fleet, wanted, limits).value();
    expect_sound(fleet, wanted, answer);
    if (limits.moves) {
      EXPECT_LE(answer.moves.list.size(), *limits.moves);
    }
    if (limits.price) {
      EXPECT_LE(answer.moves.price, *limits.price);
    }
    if (answer.without_limits) expect_executable(fleet, *answer.without_limits);
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      EXPECT_EQ(answer.fit == Fit::now || answer.fit == Fit::with_moves ? answer.fits[i] : wanted[i].count,
                wanted[i].count);
    }
    if (!answer.more_gpus.empty()) {
      EXPECT_TRUE(what_if(with_more(fleet, answer.more_gpus), wanted, limits)->fits ==
                  std::vector<std::uint64_t>({wanted[0].count, wanted[1].count, wanted[2].count}));
    }
  }
}

TEST(Play, RefusesTheFirstMoveThatIsNotLegalInItsTurn) {
  Fleet fleet{{h100()}, {{0, true, {{1, 9, 0}, {2, 14, 4, false}}}, {0, true, {{3, 5, 0}}}, {0, false, {}}}};
  const auto why = [&](Move move) { return play(fleet, std::vector<Move>{move}).error().message(); };
  EXPECT_EQ(why({1, 9, {0, 0}, {1, 0}, 1}), "move 1: instance 1: its destination is not free");
  EXPECT_EQ(why({1, 9, {0, 4}, {1, 4}, 1}), "move 1: instance 1: it is not where it should leave from");
  EXPECT_EQ(why({2, 14, {0, 4}, {1, 4}, 1}), "move 1: instance 2: it may not move");
  EXPECT_EQ(why({1, 9, {0, 0}, {2, 0}, 1}), "move 1: instance 1: its destination takes no instances");
  EXPECT_EQ(why({1, 9, {0, 0}, {9, 0}, 1}), "move 1: instance 1: there is no such GPU");
  EXPECT_TRUE(play(fleet, std::vector<Move>{{1, 9, {0, 0}, {1, 4}, 1}}).ok());
}

}  // namespace
}  // namespace bulkhead::compaction
