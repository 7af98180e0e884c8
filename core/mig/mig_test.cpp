#include "core/mig/mig.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <random>
#include <set>

#include "core/mig/models_for_tests.hpp"

namespace bulkhead::mig {
namespace {

// ---- the brute force: every legal state of a GPU, found by adding one place after the other
using State = std::vector<NewInstance>;  // sorted

struct BruteForce {
  explicit BruteForce(const Geometry& g) : geometry(g) {
    for (const auto& profile : g.profiles) {
      for (const unsigned start : profile.starts) places.push_back({profile.id, {start, profile.size}});
    }
    std::sort(places.begin(), places.end());
    grow({}, 0);
    for (std::size_t i = 0; i < states.size(); ++i) by_profiles[profiles_of(states[i])].push_back(i);
  }

  // Written apart from the code under test: sums over the set as a whole.
  bool allowed(const State& state) const {
    unsigned dec = 0, enc = 0, jpg = 0, ofa = 0;
    const Profile* full = nullptr;
    for (const auto& p : geometry.profiles) {
      if (p.size == geometry.memory_slices) full = &p;
    }
    for (const auto& a : state) {
      unsigned same = 0;
      for (const auto& b : state) {
        if (b.profile == a.profile) ++same;
        if (&a != &b && a.place.overlaps(b.place)) return false;
      }
      const Profile& profile = *geometry.by_id(a.profile);
      if (same > profile.max_instances) return false;
      dec += profile.decoders;
      enc += profile.encoders;
      jpg += profile.jpeg_engines;
      ofa += profile.optical_flow;
    }
    return dec <= full->decoders && enc <= full->encoders && jpg <= full->jpeg_engines &&
           ofa <= full->optical_flow;
  }
  void grow(State state, std::size_t from) {
    states.push_back(state);
    for (std::size_t i = from; i < places.size(); ++i) {
      state.push_back(places[i]);
      if (allowed(state)) grow(state, i + 1);
      state.pop_back();
    }
  }
  static std::vector<unsigned> profiles_of(const State& state) {
    std::vector<unsigned> out;
    for (const auto& instance : state) out.push_back(instance.profile);
    std::sort(out.begin(), out.end());
    return out;
  }

  // The least (destroyed, slices destroyed) to reach the wanted, or nothing.
  std::optional<std::pair<unsigned, unsigned>> best(const std::vector<Present>& present,
                                                    const std::vector<Wanted>& wanted) const {
    std::vector<unsigned> profiles;
    State foreign;
    for (const auto& w : wanted) profiles.push_back(w.profile);
    for (const auto& p : present) {
      if (p.counts) continue;
      profiles.push_back(p.profile);
      foreign.push_back({p.profile, p.place});
    }
    std::sort(profiles.begin(), profiles.end());
    const auto at = by_profiles.find(profiles);
    if (at == by_profiles.end()) return std::nullopt;
    std::optional<std::pair<unsigned, unsigned>> least;
    for (const auto s : at->second) {
      State own = states[s];
      bool good = true;
      for (const auto& f : foreign) {
        const auto it = std::find(own.begin(), own.end(), f);
        if (it == own.end())
          good = false;
        else
          own.erase(it);
      }
      for (const auto& w : wanted) {
        good = good && (!w.at || std::any_of(own.begin(), own.end(), [&](const NewInstance& n) {
                 return n.profile == w.profile && n.place.start == *w.at;
               }));
      }
      std::pair<unsigned, unsigned> cost{0, 0};
      for (const auto& p : present) {
        if (!p.counts || std::find(own.begin(), own.end(), NewInstance{p.profile, p.place}) != own.end())
          continue;
        good = good && p.movable;
        cost.first += 1;
        cost.second += p.place.size;
      }
      if (good && (!least || cost < *least)) least = cost;
    }
    return least;
  }

  const Geometry& geometry;
  State places;
  std::vector<State> states;
  std::map<std::vector<unsigned>, std::vector<std::size_t>> by_profiles;
};

// What every answer must hold, whatever the question. Returns the cost.
std::pair<unsigned, unsigned> check_recut(const Geometry& geometry, const std::vector<Present>& present,
                                          const std::vector<Wanted>& wanted, const Recut& recut) {
  std::set<std::size_t> once(recut.keep.begin(), recut.keep.end());
  once.insert(recut.destroy.begin(), recut.destroy.end());
  EXPECT_EQ(once.size(), present.size());
  EXPECT_EQ(recut.keep.size() + recut.destroy.size(), present.size());
  State after;
  std::vector<unsigned> counted, want;
  std::pair<unsigned, unsigned> cost{0, 0};
  for (const auto i : recut.keep) {
    after.push_back({present[i].profile, present[i].place});
    if (present[i].counts) counted.push_back(present[i].profile);
  }
  for (const auto i : recut.destroy) {
    EXPECT_TRUE(present[i].movable);
    cost.first += 1;
    cost.second += present[i].place.size;
  }
  for (const auto& c : recut.create) {
    after.push_back(c);
    counted.push_back(c.profile);
  }
  EXPECT_TRUE(legal(geometry, after));
  for (const auto& w : wanted) {
    want.push_back(w.profile);
    if (w.at) {
      EXPECT_TRUE(std::any_of(after.begin(), after.end(), [&](const NewInstance& n) {
        return n.profile == w.profile && n.place.start == *w.at;
      }));
    }
  }
  std::sort(counted.begin(), counted.end());
  std::sort(want.begin(), want.end());
  EXPECT_EQ(counted, want);
  return cost;
}

void check(const BruteForce& brute, const std::vector<Present>& present, const std::vector<Wanted>& wanted) {
  const auto answer = recut(brute.geometry, present, wanted);
  const auto best = brute.best(present, wanted);
  if (const auto* yes = std::get_if<Recut>(&answer)) {
    const auto cost = check_recut(brute.geometry, present, wanted, *yes);
    ASSERT_TRUE(best.has_value());
    ASSERT_EQ(cost, *best);
    return;
  }
  const auto& no = std::get<NoFit>(answer);
  ASSERT_FALSE(best.has_value()) << no.why;
  ASSERT_FALSE(no.why.empty());
  auto freed = present;
  for (auto& p : freed) p.movable = p.counts = true;
  ASSERT_EQ(no.way_out.has_value(), brute.best(freed, wanted).has_value() && !no.blocking.empty());
  if (!no.way_out) {
    ASSERT_FALSE(brute.by_profiles.contains([&] {
      std::vector<unsigned> ids;
      for (const auto& w : wanted) ids.push_back(w.profile);
      std::sort(ids.begin(), ids.end());
      return ids;
    }()) && std::none_of(wanted.begin(), wanted.end(), [](const Wanted& w) { return w.at.has_value(); }));
    return;
  }
  auto then = present;
  for (const auto i : no.blocking) {
    ASSERT_FALSE(present[i].movable);
    then[i].movable = true;
  }
  check_recut(brute.geometry, then, wanted, *no.way_out);
  // Smallest: no one of the blockers alone can be left out.
  for (const auto i : no.blocking) {
    auto less = then;
    less[i].movable = false;
    ASSERT_TRUE(std::holds_alternative<NoFit>(recut(brute.geometry, less, wanted)));
  }
}

std::vector<Present> present_of(const State& state) {
  std::vector<Present> present;
  unsigned id = 1;
  for (const auto& instance : state) present.push_back({id++, instance.profile, instance.place});
  return present;
}
std::vector<Wanted> wanted_of(const std::vector<unsigned>& profiles) {
  std::vector<Wanted> wanted;
  for (const auto p : profiles) wanted.push_back({p});
  return wanted;
}

// From every legal state to a sample of layouts, nothing in the way; and from sampled states to every layout.
void every_state(const Geometry& geometry, std::size_t questions) {
  const BruteForce brute(geometry);
  std::vector<std::vector<unsigned>> layouts;
  for (const auto& [profiles, states] : brute.by_profiles) layouts.push_back(profiles);
  testing::Test::RecordProperty("states", static_cast<int>(brute.states.size()));
  const std::size_t pairs = brute.states.size() * layouts.size();
  const std::size_t step = std::max<std::size_t>(1, pairs / questions) | 1U;
  for (std::size_t i = 0; i < pairs; i += step) {
    check(brute, present_of(brute.states[i % brute.states.size()]),
          wanted_of(layouts[i / brute.states.size()]));
    if (testing::Test::HasFatalFailure()) return;
  }
}

// Random states with busy and foreign instances, random layouts with pins, possible and impossible.
void with_obstacles(const Geometry& geometry, unsigned questions) {
  const BruteForce brute(geometry);
  std::mt19937 random(20261122);
  for (unsigned q = 0; q < questions; ++q) {
    auto present = present_of(brute.states[random() % brute.states.size()]);
    for (auto& p : present) {
      const auto luck = random() % 4;
      p.movable = luck >= 2;
      p.counts = luck != 0;
    }
    std::vector<Wanted> wanted;
    for (const auto& instance : brute.states[random() % brute.states.size()]) {
      if (random() % 8 == 0) continue;
      wanted.push_back(
          {instance.profile, random() % 5 == 0 ? std::optional(instance.place.start) : std::nullopt});
    }
    if (random() % 6 == 0) wanted.push_back({geometry.profiles[random() % geometry.profiles.size()].id});
    std::shuffle(wanted.begin(), wanted.end(), random);
    check(brute, present, wanted);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(Recut, AgreesWithBruteForceFromEveryStateOfAnH100) { every_state(h100(), 12000); }
TEST(Recut, AgreesWithBruteForceFromEveryStateOfAnA100) { every_state(a100(), 6000); }
TEST(Recut, AgreesWithBruteForceFromEveryStateOfAnA30ToEveryLayout) { every_state(a30(), 1000000); }
TEST(Recut, AgreesWithBruteForceFromEveryStateOnAGridOfTwelve) { every_state(rtx_pro_6000(), 12000); }
TEST(Recut, IsExactAroundBusyAndForeignInstancesOfAnH100) { with_obstacles(h100(), 3000); }
TEST(Recut, IsExactAroundBusyAndForeignInstancesOfAnA100) { with_obstacles(a100(), 1500); }
TEST(Recut, IsExactAroundBusyAndForeignInstancesOfAnA30) { with_obstacles(a30(), 3000); }
TEST(Recut, IsExactAroundBusyAndForeignInstancesOnAGridOfTwelve) { with_obstacles(rtx_pro_6000(), 3000); }

TEST(Recut, LeavesInstancesThatStayWhereTheyAre) {
  const auto geometry = h100();
  const std::vector<Present> present = {{1, 9, {4, 4}, false}, {7, 19, {0, 1}}, {8, 19, {1, 1}}};
  const auto answer = recut(geometry, present, wanted_of({9, 14, 14}));
  const auto& yes = std::get<Recut>(answer);
  EXPECT_EQ(yes.keep, (std::vector<std::size_t>{0}));
  EXPECT_EQ(yes.destroy, (std::vector<std::size_t>{1, 2}));
  EXPECT_EQ(yes.create, (State{{14, {0, 2}}, {14, {2, 2}}}));
}

TEST(Recut, NamesTheBlockersAndTheWayOut) {
  const auto geometry = h100();
  const std::vector<Present> present = {{7, 19, {0, 1}, false}, {11, 19, {4, 1}, false, false}};
  const auto answer = recut(geometry, present, wanted_of({9, 19}));
  const auto& no = std::get<NoFit>(answer);
  EXPECT_EQ(no.blocking.size(), 1U);
  ASSERT_TRUE(no.way_out);
  EXPECT_EQ(no.way_out->destroy.size(), 1U);
  EXPECT_NE(no.why.find("3g.40gb, 1g.10gb cannot be had while 1g.10gb (gi 7) at 0-0 stays"),
            std::string::npos)
      << no.why;
}

TEST(Recut, SaysWhichBoundAnImpossibleLayoutBreaks) {
  const auto why = [](const Geometry& geometry, const std::vector<Wanted>& wanted) {
    const auto answer = recut(geometry, {}, wanted);
    const auto* no = std::get_if<NoFit>(&answer);
    return no != nullptr && !no->way_out ? no->why : std::string("it fits");
  };
  EXPECT_EQ(why(h100(), wanted_of({9, 9, 9})), "3x 3g.40gb: a GPU holds at most 2");
  EXPECT_EQ(why(h100(), wanted_of({9, 9, 19})), "2x 3g.40gb, 1g.10gb need 9 memory slices, the GPU has 8");
  EXPECT_EQ(why(h100(), {{5, 4}}), "4g.40gb cannot start at 4: it starts at 0");
  EXPECT_EQ(why(a30(), wanted_of({21, 6})), "1g.6gb+me, 2g.12gb+me need 2 JPEG engines, the GPU has 1");
  EXPECT_EQ(why(h100(), {{14, 0}, {9, 0}}),
            "2g.20gb at 0, 3g.40gb at 0 find no placement together, even on an empty GPU");
  EXPECT_EQ(why(h100(), wanted_of({99})), "the GPU has no profile with id 99");
  EXPECT_EQ(why(Geometry{}, {}), "a grid of 0 memory slices with 0 instances is beyond what is planned here");
}

TEST(Recut, KeepsVariantsApart) {
  const auto geometry = h100();
  const std::vector<Present> present = {{1, 9, {0, 4}, true, true, 1}};
  const std::vector<Wanted> same = {{9, {}, 1}}, other = {{9, {}, 2}};
  EXPECT_TRUE(std::get<Recut>(recut(geometry, present, same)).destroy.empty());
  const auto answer = recut(geometry, present, other);
  const auto& yes = std::get<Recut>(answer);
  EXPECT_EQ(yes.destroy.size(), 1U);
  ASSERT_EQ(yes.create.size(), 1U);
  EXPECT_EQ(yes.create[0].variant, 2U);
}

TEST(Recut, TreatsAnUnknownProfileAsAnObstacle) {
  const auto geometry = h100();
  const std::vector<Present> present = {{3, 77, {0, 2}, false, false}};
  EXPECT_TRUE(std::holds_alternative<NoFit>(recut(geometry, present, wanted_of({0}))));
  EXPECT_TRUE(std::holds_alternative<Recut>(recut(geometry, present, wanted_of({9}))));
  EXPECT_EQ(capacity(geometry, State{{77, {0, 2}}}, 14), 2U);
}

TEST(Recut, TakesMicroseconds) {
  const auto geometry = h100();
  const std::vector<Present> present = {
      {1, 9, {4, 4}, false}, {7, 19, {0, 1}}, {8, 19, {1, 1}}, {9, 14, {2, 2}}};
  const auto wanted = wanted_of({9, 14, 14});
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(std::holds_alternative<Recut>(recut(geometry, present, wanted)));
  const auto each = (std::chrono::steady_clock::now() - start) / 100;
  EXPECT_LT(each, std::chrono::milliseconds(
                      2));  // unoptimised and under sanitizers; bench/plan has the real number
}

TEST(Capacity, IsTheProfilesMaximumOnAnEmptyGpu) {
  for (const auto& geometry : {h100(), a100(), a30(), rtx_pro_6000()}) {
    for (const auto& profile : geometry.profiles)
      EXPECT_EQ(capacity(geometry, {}, profile.id), profile.max_instances) << profile.name;
  }
  EXPECT_EQ(capacity(h100(), {}, 99), 0U);
}

TEST(Capacity, CountsWhatIsTaken) {
  EXPECT_EQ(capacity(h100(), State{{9, {0, 4}}}, 9), 1U);
  EXPECT_EQ(capacity(h100(), State{{19, {1, 1}}}, 14), 2U);
  EXPECT_EQ(capacity(a30(), State{{21, {0, 1}}}, 6), 0U);
}

TEST(Legal, RefusesWhatTheDriverRefuses) {
  const auto geometry = h100();
  EXPECT_TRUE(legal(geometry, State{{9, {0, 4}}, {9, {4, 4}}}));
  EXPECT_FALSE(legal(geometry, State{{9, {0, 4}}, {19, {3, 1}}}));   // overlap
  EXPECT_FALSE(legal(geometry, State{{9, {2, 4}}}));                 // no such start
  EXPECT_FALSE(legal(geometry, State{{9, {0, 3}}}));                 // not its size
  EXPECT_FALSE(legal(geometry, State{{20, {0, 1}}, {20, {1, 1}}}));  // one at most
  EXPECT_FALSE(legal(geometry, State{{99, {0, 1}}}));
  EXPECT_FALSE(legal(geometry, State{{9, {~0U, 4}}}));
}

TEST(Geometry, FindsAProfileByEveryNameInUse) {
  const auto geometry = h100();
  EXPECT_EQ(geometry.by_name("3g.40gb")->id, 9U);
  EXPECT_EQ(geometry.by_name("MIG 3G.40GB")->id, 9U);
  EXPECT_EQ(geometry.by_name("3g.39gb")->id, 9U);  // mig-parted issue 31
  EXPECT_EQ(geometry.by_name("1g.10gb+me")->id, 20U);
  EXPECT_EQ(geometry.by_name("3g.20gb"), nullptr);  // an A100-40GB's: half the memory is not a renaming
  EXPECT_EQ(geometry.by_name("3g.40gb+me"), nullptr);
  EXPECT_EQ(geometry.by_name("nonsense"), nullptr);
  EXPECT_EQ(geometry.by_name("3g.99999999999999999999gb"), nullptr);
  auto twins = h100();
  twins.profiles[5].compute_slices = 3;
  twins.profiles[5].name = "3g.43gb";
  EXPECT_EQ(twins.by_name("3g.39gb")->id, 9U);
  twins.profiles[5].name = "3g.38gb";
  EXPECT_EQ(twins.by_name("3g.39gb"), nullptr);  // two could be meant
  EXPECT_EQ(geometry.names().size(), 7U);
}

}  // namespace
}  // namespace bulkhead::mig
