#include "core/churn/churn.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "core/churn/graph.hpp"
#include "core/grid/grid.hpp"
#include "core/mig/models_for_tests.hpp"

namespace bulkhead::churn {
namespace {

using mig::plain_profile;

mig::Geometry h100() { return mig::six_shapes(); }
mig::Geometry a30() {
  return {4,
          {plain_profile("1g.6gb", 14, 1, 4, {0, 1, 2, 3}, 1),
           plain_profile("1g.6gb+me", 21, 1, 1, {0, 1, 2, 3}, 1),
           plain_profile("2g.12gb", 5, 2, 2, {0, 2}, 2), plain_profile("4g.24gb", 0, 4, 1, {0}, 4)}};
}

double erlang_b(unsigned servers, double offered) {
  double blocked = 1;
  for (unsigned n = 1; n <= servers; ++n) blocked = offered * blocked / (n + offered * blocked);
  return blocked;
}

Setup setup_of(unsigned gpus, const char* mix, std::string_view policy, std::uint64_t jobs) {
  Setup setup;
  setup.pools = {{h100(), gpus}};
  setup.mix = *parse_mix(mix, h100());
  setup.policy = *named_policy(policy);
  setup.jobs = jobs;
  return setup;
}

double fluid_jobs(const mig::Geometry& geometry, const char* mix) {
  const std::vector<Pool> pools{{geometry, 1}};
  return fluid_capacity(pools, *parse_mix(mix, geometry))->jobs;
}

TEST(ChurnFluid, OneProfileAloneIsWhatFitsOnAGpu) {
  EXPECT_NEAR(fluid_jobs(h100(), "1g.10gb=1"), 7, 1e-9);
  EXPECT_NEAR(fluid_jobs(h100(), "1g.20gb=1"), 4, 1e-9);
  EXPECT_NEAR(fluid_jobs(h100(), "2g.20gb=1"), 3, 1e-9);
  EXPECT_NEAR(fluid_jobs(h100(), "3g.40gb=1"), 2, 1e-9);
  EXPECT_NEAR(fluid_jobs(h100(), "4g.40gb=1"), 1, 1e-9);
  EXPECT_NEAR(fluid_jobs(h100(), "7g.80gb=1"), 1, 1e-9);
}

TEST(ChurnFluid, MixesAreSharedOutToTheLastSlice) {
  EXPECT_NEAR(fluid_jobs(h100(), "3g.40gb=1,4g.40gb=1"), 2, 1e-9);
  // Two 3g on a GPU or one 4g beside one 3g: three 4g want three GPUs, which leave room for three 3g.
  EXPECT_NEAR(fluid_jobs(h100(), "3g.40gb=1,4g.40gb=3"), 4.0 / 3, 1e-9);
  EXPECT_NEAR(fluid_jobs(h100(), "uniform"), 16.0 / 7, 1e-9);  // 21 slices in six jobs, none wasted
  EXPECT_NEAR(fluid_jobs(a30(), "1g.6gb=2,2g.12gb=1"), 3, 1e-9);
}

TEST(ChurnFluid, PoolsAddUpAndPricesHaveTheirMeanAtOne) {
  const std::vector<Pool> pools{{h100(), 3}, {h100(), 2}};
  const auto mix = *named_mix("small", h100());
  const auto fluid = *fluid_capacity(pools, mix);
  EXPECT_NEAR(fluid.jobs, 5 * fluid_jobs(h100(), "small"), 1e-6);
  double sum = 0, mean = 0;
  for (std::size_t i = 0; i < mix.shares.size(); ++i)
    sum += mix.shares[i].weight, mean += mix.shares[i].weight * fluid.price[i];
  EXPECT_NEAR(mean / sum, 1, 1e-9);
}

TEST(ChurnMixes, FollowTheGridAndLeaveMediaProfilesOut) {
  const auto mix = *named_mix("uniform", a30());
  ASSERT_EQ(mix.shares.size(), 3U);
  for (const auto& share : mix.shares) EXPECT_EQ(share.profile.find('+'), std::string::npos);
  const auto bimodal = *named_mix("bimodal", h100());
  ASSERT_EQ(bimodal.shares.size(), 6U);
  EXPECT_EQ(bimodal.shares.back().profile, "7g.80gb");
  EXPECT_EQ(bimodal.shares.back().weight, 35);
}

TEST(ChurnMixes, SayWhatIsWrongWithAText) {
  EXPECT_EQ(named_mix("huge", h100()).error().code(), Errc::not_found);
  for (const char* text : {"1g.10gb=", "1g.10gb=-1", "9g.90gb=1", "1g.10gb=1,1g.10gb=2", "1g.10gb=0",
                           "1g.10gb=1,3g.40gb", "1g.10gb=nan", "=1"}) {
    EXPECT_FALSE(parse_mix(text, h100()).ok()) << text;
  }
  EXPECT_FALSE(named_policy("ours+4").ok());
  EXPECT_FALSE(named_policy("ours+3@0").ok());
  EXPECT_EQ(named_policy("ours+2@7.5")->moves, 2U);
}

TEST(ChurnGraph, KnowsTheSameSetsAsTheGrid) {
  std::vector<std::string> all;
  for (const auto& profile : h100().profiles) all.push_back(profile.name);
  const auto graph = *graph_of(h100(), all);
  EXPECT_EQ(graph.states.size(), grid::Tables::make(h100())->set_count());
  EXPECT_EQ(graph.states.size(), 723U);
}

TEST(ChurnGraph, FragmentsAreCountedAsThePaperDoes) {
  const auto graph = *graph_of(h100(), std::vector<std::string>{"7g.80gb", "1g.10gb"});
  const auto scores = mfi_scores(graph);
  EXPECT_EQ(scores[0], 0U);
  for (std::size_t s = 0; s < graph.states.size(); ++s) {
    if (graph.states[s].mask == 0xff) {
      EXPECT_EQ(scores[s], 0U);
    }  // no profile is as small as nothing
    // 1g at 0: itself 1, 1g of double memory and 2g 2 each, 3g and 4g 4 each; 7g is larger than what is free.
    if (graph.states[s].mask == 1) {
      EXPECT_EQ(scores[s], 13U);
    }
  }
}

TEST(ChurnSimulate, WholeGpusAloneBlockAsErlangSays) {
  for (const auto law : {Holding::exponential, Holding::fixed, Holding::heavy}) {
    auto setup = setup_of(20, "7g.80gb=1", "ours", 60000);
    setup.holding = law;
    const auto out = *simulate(setup);
    EXPECT_NEAR(out.accepted_percent, 100 * (1 - erlang_b(20, 19)), 1.5 * out.half_width);
    EXPECT_LT(out.half_width, 2);
  }
}

TEST(ChurnSimulate, WhereNothingCanFragmentAllPoliciesAreOne) {
  std::uint64_t accepted = 0;
  for (const auto& policy : policies()) {
    const auto out = *simulate(setup_of(3, "1g.10gb=1", policy.name, 20000));
    if (accepted == 0) accepted = out.accepted;
    EXPECT_EQ(out.accepted, accepted) << policy.name;
    EXPECT_NEAR(out.accepted_percent, 100 * (1 - erlang_b(21, 0.95 * 21)), 2 * out.half_width) << policy.name;
    EXPECT_EQ(out.moves, 0U);
  }
}

TEST(ChurnSimulate, EveryJobIsAccountedFor) {
  for (const auto& policy : policies()) {
    const auto out = *simulate(setup_of(10, "uniform", policy.name, 5000));
    EXPECT_EQ(out.admitted, out.departed + out.present) << policy.name;
    EXPECT_EQ(out.events, out.arrived + out.departed);
    EXPECT_EQ(out.offered, 5000U);
    std::uint64_t offered = 0, accepted = 0, slices = 0, taken = 0;
    for (const auto& kind : out.kinds) {
      offered += kind.offered, accepted += kind.accepted;
      slices += kind.offered * kind.slices, taken += kind.accepted * kind.slices;
    }
    EXPECT_EQ(offered, out.offered);
    EXPECT_EQ(accepted, out.accepted);
    EXPECT_NEAR(out.accepted_percent, 100.0 * static_cast<double>(taken) / static_cast<double>(slices), 1e-9);
    EXPECT_EQ(out.batches.size(), 20U);
    EXPECT_EQ(out.undecided, 0U);
    EXPECT_GT(out.busy_percent, 30);
    EXPECT_LT(out.busy_percent, 100);
  }
}

TEST(ChurnSimulate, TheSameSeedTellsTheSameStory) {
  const auto setup = setup_of(10, "mid", "ours+3", 5000);
  const auto one = *simulate(setup), two = *simulate(setup);
  EXPECT_EQ(one.batches, two.batches);
  EXPECT_EQ(one.moves, two.moves);
  auto other = setup;
  other.seed = 2;
  EXPECT_NE(simulate(other)->batches, one.batches);
}

TEST(ChurnSimulate, MovesHelpAndFreeRepackingHelpsMost) {
  const auto percent = [](const char* policy) {
    return simulate(setup_of(30, "uniform", policy, 20000))->accepted_percent;
  };
  const double none = percent("ours"), one = percent("ours+1"), three = percent("ours+3"),
               free = percent("repack");
  EXPECT_GT(one, none);
  EXPECT_GT(three, one);
  EXPECT_GT(free, three);
}

TEST(ChurnSimulate, ABudgetOfMovesIsKept) {
  const auto out = *simulate(setup_of(50, "large", "ours+3@2", 40000));
  EXPECT_GT(out.moves, 0U);
  EXPECT_LE(out.moves_per_100, 2.0 + 100.0 * 40 / static_cast<double>(out.accepted));  // and a full purse
}

TEST(ChurnSimulate, PoolsOfTwoModelsServeTheirOwnProfiles) {
  for (const char* policy : {"first-fit", "best-fit", "mfi", "ours", "ours+3", "repack"}) {
    auto setup = setup_of(6, "uniform", policy, 5000);
    setup.pools.push_back({a30(), 9});
    setup.mix.shares.push_back({"2g.12gb", 3});
    const auto out = *simulate(setup);
    EXPECT_EQ(out.kinds.size(), 7U);
    for (const auto& kind : out.kinds) EXPECT_GT(kind.accepted, 0U) << policy << kind.profile;
  }
}

TEST(ChurnSimulate, TwoPoolsOfOneModelAreOneFleet) {
  for (const char* policy : {"first-fit", "best-fit", "mfi", "ours"}) {
    auto apart = setup_of(4, "uniform", policy, 5000);
    apart.pools.push_back({h100(), 6});
    const auto together = setup_of(10, "uniform", policy, 5000);
    EXPECT_NEAR(simulate(apart)->accepted_percent, simulate(together)->accepted_percent, 1) << policy;
  }
  auto repack = setup_of(4, "uniform", "repack", 100);
  repack.pools.push_back({h100(), 6});
  EXPECT_EQ(simulate(repack).error().code(), Errc::unsupported);
}

TEST(ChurnSimulate, RefusesWhatMakesNoSenseAndStopsWhenTold) {
  const auto code = [](const auto& change) {
    auto setup = setup_of(4, "uniform", "ours", 1000);
    change(setup);
    return simulate(setup).error().code();
  };
  EXPECT_EQ(code([](auto& s) { s.load = 0; }), Errc::invalid);
  EXPECT_EQ(code([](auto& s) { s.load = std::nan(""); }), Errc::invalid);
  EXPECT_EQ(code([](auto& s) { s.batches = 1; }), Errc::invalid);
  EXPECT_EQ(code([](auto& s) { s.jobs = 3; }), Errc::invalid);
  EXPECT_EQ(code([](auto& s) { s.warmup = -1; }), Errc::invalid);
  EXPECT_EQ(code([](auto& s) { s.pools.clear(); }), Errc::invalid);
  EXPECT_EQ(code([](auto& s) { s.pools[0].gpus = 0; }), Errc::invalid);
  EXPECT_EQ(code([](auto& s) { s.pools[0].gpus = 2'000'000'000; }), Errc::invalid);
  EXPECT_EQ(code([](auto& s) { s.mix.shares[0].profile = "9g.90gb"; }), Errc::invalid);
  EXPECT_EQ(code([](auto& s) { s.policy = {Rule::best_fit, 1}; }), Errc::invalid);
  EXPECT_EQ(code([](auto& s) { s.pools[0].geometry.profiles[0].starts = {40}; }), Errc::invalid);
  unsigned calls = 0;
  const auto stopped =
      simulate(setup_of(4, "uniform", "ours", 100000), [&](std::uint64_t done, std::uint64_t total) {
        EXPECT_LE(done, total);
        return ++calls < 3;
      });
  EXPECT_EQ(stopped.error().code(), Errc::timeout);
  EXPECT_EQ(calls, 3U);
}

Small small_of(unsigned gpus, const char* mix) {
  Small small;
  small.geometry = h100();
  small.gpus = gpus;
  small.mix = *parse_mix(mix, h100());
  small.tolerance = 0.01;
  return small;
}

TEST(ChurnExact, OneProfileAloneIsErlangsFormulaWhateverTheRule) {
  for (unsigned gpus = 1; gpus <= 3; ++gpus) {
    const double whole = 100 * (1 - erlang_b(gpus, 0.95 * gpus)),
                 small = 100 * (1 - erlang_b(7 * gpus, 0.95 * 7 * gpus));
    for (const bool refuse : {false, true}) {
      EXPECT_NEAR(solve(small_of(gpus, "7g.80gb=1"), refuse)->percent.middle(), whole, 0.01);
      EXPECT_NEAR(solve(small_of(gpus, "1g.10gb=1"), refuse)->percent.middle(), small, 0.01);
    }
    for (const auto rule : {Rule::first_fit, Rule::best_fit, Rule::mfi, Rule::ours})
      EXPECT_NEAR(evaluate(small_of(gpus, "7g.80gb=1"), rule)->percent.middle(), whole, 0.01);
  }
}

TEST(ChurnExact, StatesWithTheSameFutureAreOne) {
  const auto out = *solve(small_of(1, "uniform"), false);
  EXPECT_EQ(out.gpu_states, 100U);  // of 723 sets
  EXPECT_EQ(solve(small_of(2, "uniform"), false)->states, 5050U);
}

TEST(ChurnExact, NoRuleBeatsTheOptimumAndTiesMakeBounds) {
  for (const char* mix : {"1g.10gb=4,2g.20gb=2,4g.40gb=1", "1g.10gb=3,3g.40gb=2,7g.80gb=1"}) {
    const auto small = small_of(2, mix);
    const auto best = solve(small, false)->percent, free = solve(small, true)->percent;
    EXPECT_LE(best.high - best.low, 0.01);
    EXPECT_GE(free.high, best.low);
    for (const auto rule : {Rule::best_fit, Rule::mfi, Rule::ours}) {
      const auto worst = evaluate(small, rule, false)->percent, kind = evaluate(small, rule, true)->percent;
      EXPECT_LE(worst.low, kind.high);
      EXPECT_LE(kind.low, best.high);
    }
  }
}

TEST(ChurnExact, AgreesWithSimulation) {
  for (const unsigned gpus : {1U, 2U}) {
    for (const char* policy : {"best-fit", "mfi", "ours"}) {
      const auto rule = named_policy(policy)->rule;
      const char* mix = gpus == 1 ? "uniform" : "1g.10gb=3,2g.20gb=2,3g.40gb=2,7g.80gb=1";
      const auto small = small_of(gpus, mix);
      const auto worst = evaluate(small, rule, false)->percent, kind = evaluate(small, rule, true)->percent;
      const auto played = *simulate(setup_of(gpus, mix, policy, 40000));
      EXPECT_GE(played.accepted_percent, worst.low - 1.5 * played.half_width) << policy << gpus;
      EXPECT_LE(played.accepted_percent, kind.high + 1.5 * played.half_width) << policy << gpus;
    }
  }
  const auto first = evaluate(small_of(2, "packed"), Rule::first_fit)->percent;
  const auto played = *simulate(setup_of(2, "packed", "first-fit", 40000));
  EXPECT_NEAR(first.middle(), played.accepted_percent, 1.5 * played.half_width);
}

TEST(ChurnExact, RefusesWhatIsTooLargeAndStopsWhenTold) {
  auto small = small_of(8, "uniform");
  EXPECT_EQ(solve(small, false).error().code(), Errc::no_capacity);
  small.gpus = 9;
  EXPECT_EQ(solve(small, false).error().code(), Errc::invalid);
  EXPECT_EQ(evaluate(small_of(2, "uniform"), Rule::repack).error().code(), Errc::unsupported);
  EXPECT_EQ(
      solve(small_of(2, "uniform"), false, [](std::uint64_t, std::uint64_t) { return false; }).error().code(),
      Errc::timeout);
}

}  // namespace
}  // namespace bulkhead::churn
