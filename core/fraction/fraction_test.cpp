#include "core/fraction/fraction.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "base/prng.hpp"
#include "core/fraction/plain.hpp"
#include "core/fraction/value.hpp"

namespace bulkhead::fraction {
namespace {

Task share(std::int64_t cpu, std::int32_t milli) {
  return {.cpu_milli = cpu, .memory_mib = 1024, .num_gpu = 1, .gpu_milli = milli};
}
Task whole(std::int64_t cpu, unsigned gpus) {
  return {.cpu_milli = cpu, .memory_mib = 4096, .num_gpu = gpus, .gpu_milli = kWhole};
}
Task plain_cpu(std::int64_t cpu) { return {.cpu_milli = cpu, .memory_mib = 2048}; }

Node box(std::int64_t cpu, unsigned gpus, unsigned model = 0) {
  Node node{.cpu_milli = cpu, .memory_mib = 262'144, .gpus = gpus, .model = model};
  for (unsigned g = 0; g < gpus; ++g) node.numa[g] = static_cast<std::uint8_t>(2 * g / gpus);
  return node;
}

Mix some_mix() {
  return {{share(3000, 810), 13}, {whole(11'000, 1), 30}, {share(11'900, 470), 10}, {share(4000, 320), 5},
          {plain_cpu(12'500), 8}, {whole(80'000, 8), 1},  {whole(20'000, 2), 2}};
}

// Shapes with every field in use now and then.
Task random_task(Prng& random) {
  Task task{.cpu_milli = static_cast<std::int64_t>(500 * random.below(30)),
            .memory_mib = static_cast<std::int64_t>(1000 * random.below(40))};
  switch (random.below(4)) {
    case 0:
      break;
    case 1:
    case 2:
      task.num_gpu = 1;
      task.gpu_milli = static_cast<std::int32_t>(50 * (1 + random.below(20)));
      break;
    default:
      task.num_gpu = static_cast<unsigned>(1 + random.below(8));
      task.gpu_milli = kWhole;
      task.one_numa = task.num_gpu > 1 && random.below(2) == 0;
  }
  if (task.num_gpu != 0 && random.below(3) == 0) task.models = 1 + random.below(7);
  if (task.num_gpu != 0 && random.below(3) == 0)
    task.gpu_memory_mib = static_cast<std::int64_t>(4000 * random.below(15));
  return task;
}

Node random_node(Prng& random) {
  Node node{.cpu_milli = static_cast<std::int64_t>(4000 * (1 + random.below(24))),
            .memory_mib = static_cast<std::int64_t>(32'768 * (1 + random.below(8))),
            .gpus = static_cast<unsigned>(random.below(9)),
            .model = static_cast<unsigned>(random.below(3)),
            .gpu_memory_mib = random.below(2) == 0 ? 0 : 40'000,
            .class_id = static_cast<std::uint32_t>(random.below(3))};
  for (auto& numa : node.numa) numa = static_cast<std::uint8_t>(random.below(3));
  return node;
}

Fleet fleet_of(const std::vector<Node>& nodes, const Mix& mix) {
  Fleet fleet;
  for (const auto& node : nodes) EXPECT_TRUE(fleet.add_node(node).ok());
  EXPECT_TRUE(fleet.set_mix(mix).ok());
  return fleet;
}

bool same(const Free& a, const Free& b) {
  return a.cpu_milli == b.cpu_milli && a.memory_mib == b.memory_mib && a.gpu_milli == b.gpu_milli &&
         a.gpu_memory_mib == b.gpu_memory_mib;
}

TEST(Fraction, ChoosesWhatAPlainScanChoosesOnRandomFleets) {
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    Prng random(seed);
    std::vector<Node> nodes;
    for (std::uint64_t i = 0, n = 3 + random.below(70); i < n; ++i) nodes.push_back(random_node(random));
    std::vector<Task> shapes;
    for (int i = 0; i < 24; ++i) shapes.push_back(random_task(random));
    Mix mix;
    for (std::size_t i = 0; i < 16; ++i)
      mix.push_back({shapes[i], static_cast<double>(40 - i)});  // heaviest first
    auto fleet = fleet_of(nodes, mix);
    Plain plain(nodes, mix);
    std::vector<std::pair<Task, Choice>> placed;
    const Filter some{.allows_class = [](const void*, std::uint32_t id) { return id != 1; },
                      .allows = [](const void*, NodeId id) { return id % 5 != 2; }};
    for (int event = 0; event < 200; ++event) {
      if (const auto kind = random.below(40); kind == 0) {
        const auto node = static_cast<NodeId>(random.below(nodes.size()));
        const bool drained = !fleet.drained(node);
        fleet.drain(node, drained);
        plain.drain(node, drained);
      } else if (kind < 14 && !placed.empty()) {
        const auto at = random.below(placed.size());
        ASSERT_TRUE(fleet.remove(placed[at].first, placed[at].second));
        plain.remove(placed[at].first, placed[at].second);
        ASSERT_TRUE(same(fleet.free(placed[at].second.node), plain.free(placed[at].second.node)));
        placed[at] = placed.back();
        placed.pop_back();
      } else {
        const auto task = shapes[random.below(shapes.size())];
        const auto& filter = random.below(4) == 0 ? some : Filter{};
        const auto choice = fleet.choose(task, filter);
        ASSERT_EQ(choice, plain.choose(task, filter)) << "seed " << seed << " event " << event;
        if (!choice) continue;
        ASSERT_TRUE(fleet.place(task, *choice));
        plain.place(task, *choice);
        ASSERT_TRUE(same(fleet.free(choice->node), plain.free(choice->node)));
        placed.emplace_back(task, *choice);
      }
    }
  }
}

TEST(Fraction, MoreShapesThanTheTableHoldsAreStillAnsweredExactly) {
  Prng random(5);
  std::vector<Node> nodes;
  for (int i = 0; i < 4; ++i) nodes.push_back(random_node(random));
  auto fleet = fleet_of(nodes, some_mix());
  Mix heaviest_first = some_mix();
  std::stable_sort(heaviest_first.begin(), heaviest_first.end(),
                   [](const Typical& a, const Typical& b) { return a.weight > b.weight; });
  const Plain plain(nodes, heaviest_first);
  for (int i = 0; i < 1200; ++i) {
    const auto task = share(static_cast<std::int64_t>(random.below(1500)), 300);
    ASSERT_EQ(fleet.choose(task), plain.choose(task));
  }
}

TEST(Fraction, NeverRefusesWhatFits) {
  Prng random(3);
  std::vector<Node> nodes;
  for (int i = 0; i < 30; ++i) nodes.push_back(random_node(random));
  auto fleet = fleet_of(nodes, some_mix());
  int refused = 0;
  for (int i = 0; i < 1500; ++i) {
    const auto task = random_task(random);
    bool fits = false;
    for (NodeId id = 0; id < fleet.size(); ++id) fits = fits || fleet.fits(task, id);
    const auto choice = fleet.choose(task);
    ASSERT_EQ(choice.has_value(), fits);
    if (choice) {
      ASSERT_TRUE(fleet.place(task, *choice));
    }
    refused += choice ? 0 : 1;
  }
  EXPECT_GT(refused, 100);
}

TEST(Fraction, WhatIsPlacedAndRemovedLeavesNoTrace) {
  Prng random(4);
  std::vector<Node> nodes;
  for (int i = 0; i < 10; ++i) nodes.push_back(random_node(random));
  auto fleet = fleet_of(nodes, some_mix());
  std::vector<std::pair<Task, Choice>> placed;
  for (int i = 0; i < 200; ++i) {
    const auto task = random_task(random);
    if (const auto choice = fleet.choose(task)) {
      ASSERT_TRUE(fleet.place(task, *choice));
      placed.emplace_back(task, *choice);
    }
  }
  EXPECT_GT(fleet.gpu_milli_used(), 0);
  random.shuffle(std::span(placed));
  for (const auto& [task, choice] : placed) ASSERT_TRUE(fleet.remove(task, choice));
  EXPECT_EQ(fleet.gpu_milli_used(), 0);
  auto untouched = fleet_of(nodes, some_mix());
  for (NodeId id = 0; id < nodes.size(); ++id) EXPECT_TRUE(same(fleet.free(id), untouched.free(id)));
  for (int i = 0; i < 50; ++i) {
    const auto task = random_task(random);
    EXPECT_EQ(fleet.choose(task), untouched.choose(task));
  }
}

TEST(Fraction, PermutingIdenticalGpusChangesNoFigure) {
  const auto mix = some_mix();
  const auto run = [&](std::uint64_t seed) {
    Prng shuffles(seed);
    Prng random(6);
    auto node = box(96'000, 8);
    node.numa = {};
    auto fleet = fleet_of(std::vector<Node>(20, node), mix);
    for (NodeId id = 0; id < fleet.size(); ++id) {  // the same loads on each node, on GPUs in another order
      std::array<unsigned, 8> gpus = {0, 1, 2, 3, 4, 5, 6, 7};
      shuffles.shuffle(std::span<unsigned>(gpus));
      for (unsigned i = 0; i < 6; ++i) {
        const auto task = share(1000, static_cast<std::int32_t>(100 + random.below(900)));
        EXPECT_TRUE(fleet.place(task, {.node = id, .gpus = 1U << gpus[i]}));
      }
    }
    std::vector<std::int64_t> used;
    for (int i = 0; i < 300; ++i) {
      const auto& task = mix[random.below(mix.size())].task;
      if (const auto choice = fleet.choose(task)) {
        EXPECT_TRUE(fleet.place(task, *choice));
      }
      used.push_back(fleet.gpu_milli_used());
    }
    return used;
  };
  EXPECT_EQ(run(1), run(2));
}

TEST(Fraction, AModelIsObeyed) {
  auto fleet = fleet_of({box(64'000, 4, 0), box(64'000, 4, 1), box(64'000, 4, 2)}, some_mix());
  auto task = share(1000, 500);
  task.models = 1U << 2U;
  for (int i = 0; i < 8; ++i) {
    const auto choice = fleet.choose(task);
    ASSERT_TRUE(choice);
    EXPECT_EQ(choice->node, 2U);
    ASSERT_TRUE(fleet.place(task, *choice));
  }
  EXPECT_FALSE(fleet.choose(task));
  task.models = 1U << 5U;
  EXPECT_FALSE(fleet.choose(task));
  EXPECT_FALSE(fleet.place(task, {.node = 0, .gpus = 1}));
}

TEST(Fraction, ASetPrefersOneNumaNodeAndMayInsist) {
  auto node = box(64'000, 4);
  node.numa = {0, 1, 0, 1};
  auto fleet = fleet_of({node}, some_mix());
  ASSERT_EQ(fleet.choose(whole(1000, 2))->gpus, 0b0101U);
  ASSERT_TRUE(fleet.place(whole(1000, 1), {.node = 0, .gpus = 0b0001}));
  EXPECT_EQ(fleet.choose(whole(1000, 2))->gpus, 0b1010U);
  EXPECT_EQ(fleet.choose(whole(1000, 1))->gpus, 0b0100U) << "the NUMA node with fewer free";
  EXPECT_EQ(fleet.choose(whole(1000, 3))->gpus, 0b1110U);
  auto strict = whole(1000, 3);
  strict.one_numa = true;
  EXPECT_FALSE(fleet.choose(strict));
  EXPECT_FALSE(fleet.place(strict, {.node = 0, .gpus = 0b1110}));
}

TEST(Fraction, ADrainedNodeKeepsItsTasksAndGetsNoNewOnes) {
  auto fleet = fleet_of({box(64'000, 2)}, some_mix());
  const auto choice = fleet.choose(share(1000, 500));
  ASSERT_TRUE(choice);
  ASSERT_TRUE(fleet.place(share(1000, 500), *choice));
  fleet.drain(0, true);
  EXPECT_FALSE(fleet.choose(share(1000, 100)));
  EXPECT_EQ(fleet.gpu_milli_used(), 500);
  ASSERT_TRUE(fleet.remove(share(1000, 500), *choice));
  fleet.drain(0, false);
  EXPECT_TRUE(fleet.choose(share(1000, 100)));
}

TEST(Fraction, ANodeThatJoinsLaterIsUsed) {
  auto fleet = fleet_of({box(64'000, 1)}, some_mix());
  ASSERT_TRUE(fleet.place(whole(1000, 1), *fleet.choose(whole(1000, 1))));
  ASSERT_FALSE(fleet.choose(whole(1000, 1)));
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(fleet.add_node(box(64'000, 1)).ok());
  for (int i = 0; i < 100; ++i) {
    const auto choice = fleet.choose(whole(1000, 1));
    ASSERT_TRUE(choice);
    ASSERT_TRUE(fleet.place(whole(1000, 1), *choice));
  }
  EXPECT_FALSE(fleet.choose(whole(1000, 1)));
}

TEST(Fraction, WhatDoesNotFitIsNotPlacedAndWhatIsNotThereIsNotRemoved) {
  auto fleet = fleet_of({box(4000, 2)}, some_mix());
  EXPECT_FALSE(fleet.place(share(5000, 100), {.node = 0, .gpus = 1}));
  EXPECT_FALSE(fleet.place(share(1000, 100), {.node = 1, .gpus = 1}));
  EXPECT_FALSE(fleet.place(share(1000, 100), {.node = 0, .gpus = 3}));
  EXPECT_FALSE(fleet.place(share(1000, 100), {.node = 0, .gpus = 4}));
  EXPECT_FALSE(fleet.place(share(1000, 1001), {.node = 0, .gpus = 1}));
  EXPECT_FALSE(fleet.place({.num_gpu = 2, .gpu_milli = 500}, {.node = 0, .gpus = 3}))
      << "a set is of whole GPUs";
  EXPECT_FALSE(fleet.place(share(-1, 100), {.node = 0, .gpus = 1}));
  EXPECT_FALSE(fleet.remove(share(0, 100), {.node = 0, .gpus = 1}));
  EXPECT_FALSE(fleet.choose({.num_gpu = 17, .gpu_milli = kWhole}));
  EXPECT_FALSE(fleet.choose({.cpu_milli = INT64_MAX}));
  EXPECT_EQ(fleet.gpu_milli_used(), 0);
  EXPECT_FALSE(Fleet().choose(share(0, 1)));
}

TEST(Fraction, AbsurdNodesAndMixesAreErrors) {
  Fleet fleet;
  EXPECT_FALSE(fleet.add_node({.cpu_milli = -1}).ok());
  EXPECT_FALSE(fleet.add_node({.memory_mib = kMostAmount + 1}).ok());
  EXPECT_FALSE(fleet.add_node({.gpus = kMostGpus + 1}).ok());
  EXPECT_FALSE(fleet.add_node({.model = kModels}).ok());
  EXPECT_EQ(fleet.add_node({.model = kModels}).error().message(), "node 0: the GPU model is not below 64");
  EXPECT_FALSE(fleet.set_mix(Mix{{share(0, 2000), 1}}).ok());
  EXPECT_FALSE(fleet.set_mix(Mix{{share(0, 500), -1}}).ok());
  EXPECT_FALSE(fleet.set_mix(Mix{{share(0, 500), std::numeric_limits<double>::quiet_NaN()}}).ok());
  EXPECT_TRUE(fleet.set_mix({}).ok());
}

TEST(Fraction, AHungryTaskGoesWhereCpuIsPlenty) {
  // 12 CPUs a GPU against 52: the mix cannot sell the eight GPUs of the first node without its CPUs.
  auto fleet = fleet_of({box(96'000, 8), box(104'000, 2)}, some_mix());
  EXPECT_EQ(fleet.choose(plain_cpu(32'000))->node, 1U);
}

TEST(Fraction, AShareFillsAHoleItFitsBeforeItOpensAGpu) {
  auto fleet = fleet_of({box(96'000, 2), box(96'000, 2)}, some_mix());
  ASSERT_TRUE(fleet.place(share(4000, 320), {.node = 1, .gpus = 2}));
  const auto choice = fleet.choose(share(11'900, 470));
  ASSERT_TRUE(choice);
  EXPECT_EQ(choice->gpus, 2U);
  EXPECT_EQ(choice->node, 1U);
}

TEST(FractionWorth, LevelsAndLimitsChangeNoWorth) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Prng random(seed);
    Mix mix;
    for (int i = 0; i < 20; ++i) mix.push_back({random_task(random), 1 + random.unit()});
    const auto node = random_node(random);
    const Worth worth({.gpus = node.gpus, .model = node.model, .gpu_memory_mib = node.gpu_memory_mib}, mix);
    const Plain plain({node}, mix);
    for (int i = 0; i < 50; ++i) {
      Free free;
      free.cpu_milli = static_cast<std::int64_t>(random.below(400'000));
      free.memory_mib = static_cast<std::int64_t>(random.below(2'000'000));
      Left left;
      for (unsigned g = 0; g < node.gpus; ++g) {
        free.gpu_milli[g] = random.below(3) == 0 ? kWhole : static_cast<std::int32_t>(random.below(kWhole));
        free.gpu_memory_mib[g] = free.gpu_milli[g] * 40;
        left.gpus[g] = worth.level(free.gpu_milli[g]);
      }
      std::sort(left.gpus.begin(), left.gpus.begin() + node.gpus);
      left.cpu = std::min(static_cast<std::int32_t>(free.cpu_milli), worth.most_cpu());
      left.memory = std::min(static_cast<std::int32_t>(free.memory_mib), worth.most_memory());
      EXPECT_EQ(worth.of(left), plain.worth(0, free));
    }
  }
}

TEST(FractionWorth, BoundsAreNeverBelowTheWorthAndStoppingEarlySaysNoMoreThanThat) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Prng random(seed);
    Mix mix;
    for (int i = 0; i < 20; ++i) mix.push_back({random_task(random), 1 + random.unit()});
    const auto node = random_node(random);
    const Worth worth({.gpus = node.gpus, .model = node.model, .gpu_memory_mib = node.gpu_memory_mib}, mix);
    int early = 0;
    for (int i = 0; i < 200; ++i) {
      Left left;
      left.cpu = std::min(static_cast<std::int32_t>(random.below(100'000)), worth.most_cpu());
      left.memory = std::min(static_cast<std::int32_t>(random.below(300'000)), worth.most_memory());
      unsigned whole = 0;
      Worth::Caps sold = {};
      for (unsigned g = 0; g < node.gpus; ++g) {
        left.gpus[g] =
            worth.level(random.below(3) == 0 ? kWhole : static_cast<std::int32_t>(random.below(kWhole)));
        whole += left.gpus[g] == kWhole ? 1 : 0;
        for (unsigned b = 0; b < kBatches; ++b)
          sold[b] = static_cast<std::int16_t>(sold[b] + worth.alone(left.gpus[g])[b]);
      }
      std::sort(left.gpus.begin(), left.gpus.begin() + node.gpus);
      const auto top = node.gpus == 0 ? std::int16_t{0} : left.gpus[node.gpus - 1];
      const auto exact = worth.of(left);
      EXPECT_GE(worth.at_most(worth.rows(left.cpu, left.memory), sold, top, whole), exact);
      for (const auto enough : {exact - 100, exact, exact + 1, exact + 100, exact + 3000}) {
        const auto told = worth.of(left, enough);
        if (enough <= exact) {
          EXPECT_EQ(told, exact);
        } else {
          EXPECT_GE(told, exact);
          EXPECT_LT(told, enough);
        }
        early += told == exact ? 0 : 1;
      }
    }
    if (node.gpus > 1) {
      EXPECT_GT(early, 0);
    }
  }
}

TEST(FractionLearner, KeepsTheHeaviestAndForgets) {
  Learner learner(3, 1000);
  for (int i = 0; i < 5; ++i) learner.saw(share(1, 100));
  for (int i = 0; i < 3; ++i) learner.saw(share(2, 100));
  learner.saw(share(3, 100));
  learner.saw(share(4, 100));  // takes the place of the rarest
  const auto mix = learner.mix();
  ASSERT_EQ(mix.size(), 3U);
  EXPECT_EQ(mix[0].task, share(1, 100));
  EXPECT_EQ(mix[0].weight, 5);
  EXPECT_EQ(mix[1].task, share(2, 100));
  EXPECT_EQ(mix[2].task, share(4, 100));
  for (int i = 0; i < 1000; ++i) learner.saw(share(2, 100));
  EXPECT_EQ(learner.mix()[0].task, share(2, 100));
  EXPECT_LT(learner.mix()[1].weight, 5);
}

}  // namespace
}  // namespace bulkhead::fraction
