#include "core/replay/replay.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <tuple>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/prng.hpp"
#include "base/text.hpp"
#include "core/replay/cluster.hpp"
#include "core/replay/go_random.hpp"
#include "core/replay/policy.hpp"

namespace bulkhead::replay {
namespace {

// The test program runs at the root of the source or somewhere below it.
std::string openb(std::string_view file) {
  auto folder = std::filesystem::current_path();
  for (int up = 0; up < 6; ++up, folder = folder.parent_path())
    if (const auto path = folder / "examples/traces/openb" / file; std::filesystem::exists(path))
      return read_file(path, std::size_t{1} << 24U).value_or("");
  ADD_FAILURE() << "no examples/traces/openb/" << file << " above " << std::filesystem::current_path();
  return "";
}

struct Trace {
  NodeList nodes;
  PodList pods;
};
Trace default_trace() {
  auto nodes = parse_nodes(openb("openb_node_list_gpu_node.csv"));
  auto pods = parse_pods(openb("openb_pod_list_default.csv"));
  if (!nodes.ok() || !pods.ok()) {
    ADD_FAILURE() << "the lists of openb cannot be read";
    return {};
  }
  return {std::move(*nodes), std::move(*pods)};
}

// A small fleet and workload with all that openb's have: models, shares, sets, pods without a GPU.
Trace small(std::uint64_t seed, std::size_t nodes, std::size_t pods) {
  Prng random(seed);
  std::string text = "sn,cpu_milli,memory_mib,gpu,model\n";
  const char* models[] = {"A", "B", "C"};
  const unsigned gpus[] = {0, 1, 2, 4, 8};
  for (std::size_t i = 0; i < nodes; ++i)
    text += fmt::format("n{},{},{},{},{}\n", i, 8000 * (1 + random.below(12)), 65536 * (1 + random.below(3)),
                        gpus[random.below(5)], models[random.below(3)]);
  Trace trace{*parse_nodes(text), {}};
  text = "cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,creation_time,deletion_time\n";
  for (std::size_t i = 0; i < pods; ++i) {
    const char* specs[] = {"", "", "", "A", "A|C", "X"};
    const auto created = random.below(1000);
    const unsigned num = random.below(4) == 0 ? 0 : random.below(3) == 0 ? 1U << random.below(4) : 1;
    const auto milli = num > 1 || random.below(3) == 0 ? 1000 : 100 * (1 + random.below(9));
    text += fmt::format("{},{},{},{},{},{},{}\n", 1000 * random.below(16), 1024 * random.below(32), num,
                        milli, specs[random.below(6)], created, created + random.below(300));
  }
  trace.pods = *parse_pods(text);
  return trace;
}

double mean(const Trace& trace, Policy policy, std::uint64_t seeds) {
  double sum = 0;
  for (std::uint64_t seed = 42; seed < 42 + seeds; ++seed) {
    const auto outcome =
        sample(trace.nodes, trace.pods, policy, {.seed = seed, .arrived_percent = 130, .points = 0});
    EXPECT_TRUE(outcome.ok()) << outcome.error().message();
    if (outcome.ok()) sum += outcome->allocated_percent;
  }
  return sum / static_cast<double>(seeds);
}

TEST(TheOriginalsGenerator, DrawsWhatGoDraws) {
  // What Go's programs with rand.Seed(1) and rand.Seed(42) have printed for years.
  GoRandom one(1);
  for (const std::uint32_t drawn : {81U, 87U, 47U, 59U, 81U, 18U, 25U, 40U, 56U, 0U})
    EXPECT_EQ(one.below(100), drawn);
  GoRandom other(42);
  for (const std::uint32_t drawn : {5U, 87U, 68U}) EXPECT_EQ(other.below(100), drawn);
  auto order = GoRandom(7).permutation(50);
  std::sort(order.begin(), order.end());
  for (std::uint32_t i = 0; i < 50; ++i) EXPECT_EQ(order[i], i);
}

// All traces, policies and seeds: replay_bench.cpp.
TEST(FgdsExperiment, GivesThePublishedFiguresOfTheDefaultTrace) {
  const Trace trace = default_trace();
  ASSERT_EQ(trace.nodes.gpus(), 6212U);
  ASSERT_EQ(trace.pods.pods.size(), 8152U);
  EXPECT_NEAR(mean(trace, Policy::best_fit, 1), 93.08, 0.3);
  const double fgd = mean(trace, Policy::fgd, 1);
  EXPECT_NEAR(fgd, 95.39, 0.3);
  EXPECT_NEAR(mean(trace, Policy::random, 1), 87.47, 0.9);
  EXPECT_GT(mean(trace, Policy::ours, 1), fgd);
}

TEST(FgdsExperiment, IsTheSameAgainForASeedAndAnotherForAnother) {
  const Trace trace = small(1, 40, 300);
  for (const Policy policy : kPolicies) {
    const auto first = sample(trace.nodes, trace.pods, policy, {.seed = 5});
    const auto again = sample(trace.nodes, trace.pods, policy, {.seed = 5});
    const auto other = sample(trace.nodes, trace.pods, policy, {.seed = 6});
    ASSERT_TRUE(first.ok()) << first.error().message();
    EXPECT_EQ(first->allocated_percent, again->allocated_percent);
    EXPECT_EQ(first->failed, again->failed);
    EXPECT_EQ(first->curve.size(), again->curve.size());
    EXPECT_NE(first->gpu_milli_arrived + first->arrivals * 1'000'000,
              other->gpu_milli_arrived + other->arrivals * 1'000'000);
  }
}

TEST(FgdsExperiment, LetsEveryPodArriveOnceBeforeItDraws) {
  // 2 GPUs; the pods ask for 900 milli, so a run of 90 % has each once and one of 89 % leaves one out.
  const auto nodes = parse_nodes("sn,cpu_milli,memory_mib,gpu\na,9000,9000,1\nb,9000,9000,1\n");
  const auto pods =
      parse_pods("cpu_milli,memory_mib,num_gpu,gpu_milli\n1,1,1,900\n1,1,1,600\n1,1,1,300\n1,1,0,0\n");
  const auto arrived = [&](double percent) {
    return sample(*nodes, *pods, Policy::best_fit, {.seed = 42, .arrived_percent = percent})
        ->gpu_milli_arrived;
  };
  EXPECT_EQ(arrived(90), 1800U);
  EXPECT_LT(arrived(89), 1780U);
  for (const double percent : {10.0, 50.0, 150.0, 1000.0})
    EXPECT_LE(static_cast<double>(arrived(percent)), 20 * percent);
  EXPECT_GT(arrived(1000), 19'000U);
}

TEST(FgdsExperiment, GrowsWithTheFleet) {
  const Trace trace = small(2, 40, 300);
  const NodeList twice = *enlarge(trace.nodes, 80);
  const auto once = sample(trace.nodes, trace.pods, Policy::fgd, {});
  const auto two = sample(twice, trace.pods, Policy::fgd, {});
  EXPECT_EQ(two->gpu_milli_total, 2 * once->gpu_milli_total);
  EXPECT_NEAR(static_cast<double>(two->gpu_milli_arrived), 2.6 * static_cast<double>(once->gpu_milli_total),
              16'000);
}

TEST(Curves, GoFromNothingToTheEnd) {
  const Trace trace = small(3, 40, 300);
  for (const Policy policy : kPolicies) {
    const auto outcome =
        sample(trace.nodes, trace.pods, policy, {.seed = 42, .arrived_percent = 130, .points = 50});
    ASSERT_TRUE(outcome.ok());
    const auto& curve = outcome->curve;
    ASSERT_GT(curve.size(), 30U);
    ASSERT_LE(curve.size(), 51U);
    EXPECT_EQ(curve.front().arrived_percent, 0);
    EXPECT_EQ(curve.front().allocated_percent, 0);
    EXPECT_EQ(curve.back().allocated_percent, outcome->allocated_percent);
    EXPECT_EQ(curve.back().fragmentation_percent, outcome->fragmentation_percent);
    for (std::size_t i = 1; i < curve.size(); ++i) {
      EXPECT_GE(curve[i].arrived_percent, curve[i - 1].arrived_percent);
      EXPECT_GE(curve[i].allocated_percent, curve[i - 1].allocated_percent);
      EXPECT_LE(curve[i].allocated_percent, curve[i].arrived_percent + 1e-9);
      EXPECT_GE(curve[i].fragmentation_percent, 0);
      EXPECT_LE(curve[i].fragmentation_percent, 100);
    }
  }
}

TEST(Runs, EndWhenTheCallerSaysSo) {
  const Trace trace = small(4, 200, 2000);
  std::uint64_t calls = 0, last = 0, all = 0;
  const auto whole =
      sample(trace.nodes, trace.pods, Policy::best_fit, {}, [&](std::uint64_t done, std::uint64_t total) {
        EXPECT_GE(done, last);
        EXPECT_LE(done, total);
        last = done;
        all = total;
        return ++calls < 1'000'000;
      });
  EXPECT_FALSE(whole->cancelled);
  EXPECT_EQ(last, all);
  EXPECT_GT(calls, 3U);
  const auto some = sample(trace.nodes, trace.pods, Policy::best_fit, {},
                           [&](std::uint64_t done, std::uint64_t total) { return done * 2 < total; });
  EXPECT_TRUE(some->cancelled);
  EXPECT_LT(some->arrivals, whole->arrivals);
  EXPECT_GT(some->arrivals, 0U);
  EXPECT_TRUE(
      replay_times(trace.nodes, trace.pods, Policy::fgd, {}, [](auto, auto) { return false; })->cancelled);
}

TEST(Runs, RefuseWhatTheyCannotDo) {
  const auto nodes = parse_nodes("sn,cpu_milli,memory_mib,gpu\na,9000,9000,1\n");
  const auto none = parse_nodes("sn,cpu_milli,memory_mib,gpu\na,9000,9000,0\n");
  const auto pods = parse_pods("cpu_milli,memory_mib,num_gpu,gpu_milli\n1,1,1,900\n");
  const auto plain = parse_pods("cpu_milli,memory_mib,num_gpu,gpu_milli\n1,1,0,0\n");
  const auto message = [](const Result<Outcome>& outcome) {
    return outcome.ok() ? "" : outcome.error().message();
  };
  for (const double percent : {0.0, -1.0, 10'001.0, std::nan("")})
    EXPECT_NE(message(sample(*nodes, *pods, Policy::fgd, {.seed = 1, .arrived_percent = percent})), "");
  EXPECT_NE(message(sample(*nodes, *pods, Policy::fgd, {.seed = 1, .arrived_percent = 1, .points = 10'001})),
            "");
  EXPECT_EQ(message(sample(*none, *pods, Policy::fgd, {})), "the list of nodes has no GPU");
  EXPECT_EQ(message(sample(*nodes, *plain, Policy::fgd, {})), "no pod of the list asks for a GPU");
  EXPECT_EQ(message(sample(*nodes, PodList{}, Policy::fgd, {})), "no pod of the list asks for a GPU");
  EXPECT_EQ(message(replay_times(*nodes, *pods, Policy::fgd, {})),
            "the list of pods has no creation_time and deletion_time");
  // One milli a pod, in a fleet of 3.2 million GPUs.
  NodeList vast{std::vector<Node>(kMostNodes, Node{"n", 1, 1, 16, 0}), {""}};
  const auto tiny = parse_pods("cpu_milli,memory_mib,num_gpu,gpu_milli\n0,0,1,1\n");
  EXPECT_NE(message(sample(vast, *tiny, Policy::fgd, {})).find("arrivals; at most"), std::string::npos);
}

TEST(Runs, DropPodsThatNothingCanHold) {
  const auto nodes = parse_nodes("sn,cpu_milli,memory_mib,gpu,model\na,9000,9000,2,T4\nb,9000,9000,2,\n");
  const auto pods = parse_pods(
      "cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\n"
      "1,1,1,900,A100\n1,1,3,1000,\n1,1,17,1000,\n9001,1,1,100,\n1,9001,1,100,\n1,1,0,0,\n1,1,1,400,T4\n1,"
      "1,1,400,A100|T4\n");
  for (const Policy policy : kPolicies) {
    const auto outcome = sample(*nodes, *pods, policy, {.seed = 1, .arrived_percent = 10'000});
    ASSERT_TRUE(outcome.ok()) << outcome.error().message();
    EXPECT_GT(outcome->failed, 0U);
    EXPECT_LE(outcome->allocated_percent, 40) << "only the node with a model can be used";
  }
}

TEST(TheTracesOwnTimes, FreeWhatLeavesBeforeItPlacesWhatComes) {
  const auto nodes = parse_nodes("sn,cpu_milli,memory_mib,gpu\na,9000,9000,1\n");
  const auto pods = parse_pods(
      "cpu_milli,memory_mib,num_gpu,gpu_milli,creation_time,deletion_time\n"
      "1,1,1,1000,10,20\n"   // runs
      "1,1,1,1000,15,30\n"   // no place
      "1,1,1,500,20,\n"      // runs from when the first leaves, for ever
      "1,1,1,500,25,25\n"    // lives no time
      "1,1,1,500,25,35\n"    // so there is place for this one
      "1,1,1,100,30,50\n");  // no place
  for (const Policy policy : kPolicies) {
    const auto outcome =
        replay_times(*nodes, *pods, policy, {.seed = 1, .arrived_percent = 130, .points = 4});
    ASSERT_TRUE(outcome.ok()) << outcome.error().message();
    EXPECT_EQ(outcome->arrivals, 6U);
    EXPECT_EQ(outcome->failed, 2U);
    EXPECT_EQ(outcome->gpu_milli_failed, 1100U);
    EXPECT_DOUBLE_EQ(outcome->allocated_percent, (10 * 100 + 5 * 50 + 5 * 100) / 20.0);
    ASSERT_EQ(outcome->curve.size(), 5U);
    const double times[] = {0, 5, 10, 15, 20}, allocated[] = {100, 100, 50, 100, 100};
    for (std::size_t i = 0; i < 5; ++i) {
      EXPECT_DOUBLE_EQ(outcome->curve[i].time, times[i]);
      EXPECT_DOUBLE_EQ(outcome->curve[i].allocated_percent, allocated[i]) << i;
    }
  }
}

TEST(TheTracesOwnTimes, EndWithNothingLostAndNothingFound) {
  const Trace trace = small(5, 30, 600);
  for (const Policy policy : kPolicies) {
    const auto outcome = replay_times(trace.nodes, trace.pods, policy, {});
    ASSERT_TRUE(outcome.ok());
    EXPECT_EQ(outcome->arrivals, 600U);
    EXPECT_GT(outcome->allocated_percent, 0);
    EXPECT_LE(outcome->allocated_percent, 100);
  }
}

// ---- the policies against their definitions

// FGD's typical pods, by the book: the most frequent that make up 95 %.
std::vector<std::pair<Shape, std::uint64_t>> typical_pods(const Workload& workload, const PodList& pods) {
  using Key = std::tuple<std::int32_t, std::int16_t, std::uint16_t, std::string>;
  std::map<Key, std::pair<Shape, std::uint64_t>> kinds;
  std::uint64_t all = 0, sum = 0;
  for (const Shape& shape : workload.shapes) {
    auto& kind = kinds[{shape.cpu, shape.gpu_milli, shape.num_gpu, pods.specs[shape.spec]}];
    kind.first = shape;
    kind.second += shape.count;
    all += shape.count;
  }
  std::vector<std::pair<std::uint64_t, Key>> order;
  for (const auto& [key, kind] : kinds) order.emplace_back(kind.second, key);
  std::sort(order.rbegin(), order.rend());
  std::vector<std::pair<Shape, std::uint64_t>> typical;
  for (const auto& [count, key] : order) {
    if (sum * 100 >= all * 95) break;
    sum += count;
    typical.push_back(kinds[key]);
  }
  return typical;
}

double fragments_by_the_book(const State& state,
                             const std::vector<std::pair<Shape, std::uint64_t>>& typical) {
  double sum = 0, weight = 0;
  for (const auto& [pod, count] : typical) {
    std::uint64_t lost = 0;
    const bool accessible = (pod.models >> state.model & 1U) != 0;
    if (pod.num_gpu == 0 || !accessible || state.cpu < pod.cpu || state.with(pod.gpu_milli) < pod.num_gpu)
      lost = state.milli();
    else
      for (unsigned g = 0; g < state.gpus; ++g)
        lost += state.left[g] < pod.gpu_milli ? static_cast<std::uint64_t>(state.left[g]) : 0;
    sum += static_cast<double>(lost) * static_cast<double>(count);
    weight += static_cast<double>(count);
  }
  return sum / weight;
}

TEST(Fragments, AreWhatTypicalPodsCannotUse) {
  const Trace trace = small(6, 60, 400);
  const Workload workload = workload_of(trace.pods, trace.nodes);
  const Fragments fragments(workload, trace.pods);
  const auto typical = typical_pods(workload, trace.pods);
  std::uint64_t weight = 0;
  for (const auto& [shape, count] : typical) weight += count;
  EXPECT_EQ(fragments.weight(), weight);
  Prng random(1);
  for (int i = 0; i < 3000; ++i) {
    State state;
    state.cpu = static_cast<std::int32_t>(1000 * random.below(20));
    state.gpus = static_cast<std::uint8_t>(random.below(9));
    state.model = static_cast<std::uint8_t>(random.below(trace.nodes.models.size()));
    for (unsigned g = 0; g < state.gpus; ++g)
      state.left[g] = static_cast<std::int16_t>(50 * random.below(21));
    state.sorted = state.left;
    std::sort(state.sorted.begin(), state.sorted.begin() + state.gpus);
    const double lost = static_cast<double>(state.milli()) - static_cast<double>(fragments.usable(state)) /
                                                                 static_cast<double>(fragments.weight());
    ASSERT_NEAR(lost, fragments_by_the_book(state, typical), 1e-6);
  }
}

// The score of a node by the book; less than any: it does not fit.
double score_by_the_book(Policy policy, const State& state, const Shape& shape,
                         const std::vector<std::pair<Shape, std::uint64_t>>& typical) {
  if (state.cpu < shape.cpu || state.memory < shape.memory) return -1e9;
  if (shape.num_gpu > 0 &&
      ((shape.models >> state.model & 1U) == 0 || state.with(shape.gpu_milli) < shape.num_gpu))
    return -1e9;
  const double cpu = state.cpu, gpu = static_cast<double>(state.milli()),
               asked = static_cast<double>(shape.milli());
  if (policy == Policy::best_fit)
    return std::trunc((1 - ((cpu - shape.cpu) / 128000 * 0.5 + (gpu - asked) / 8000 * 0.5)) * 100);
  if (policy == Policy::dot_product)
    return std::trunc(100 * (1 - (cpu / 128000 * (shape.cpu / 128000.0) + gpu / 8000 * (asked / 8000)) / 2));
  if (policy != Policy::fgd) return 0;
  const double before = fragments_by_the_book(state, typical);
  double best = -1;
  for (unsigned g = 0; g < std::max<unsigned>(state.gpus, 1); ++g) {
    State after = state;
    after.cpu -= shape.cpu;
    if (shape.shares()) {
      if (state.left[g] < shape.gpu_milli) continue;
      after.left[g] = static_cast<std::int16_t>(after.left[g] - shape.gpu_milli);
    } else {
      unsigned wanted = shape.num_gpu;
      for (unsigned h = 0; h < state.gpus && wanted > 0; ++h)
        if (after.left[h] == kWholeGpu) after.left[h] = 0, --wanted;
    }
    const double shrunk = before - fragments_by_the_book(after, typical);
    // The sums here are of doubles; what is nothing must be nothing.
    best = std::max(best, std::trunc(100 / (1 + std::exp(-(std::abs(shrunk) < 1e-6 ? 0 : shrunk) / 1000))));
  }
  return best;
}

TEST(Policies, ChooseTheFirstOfTheBestNodesWhateverHappened) {
  for (const std::uint64_t seed : {7U, 8U}) {
    const Trace trace = small(seed, 50, 250);
    const Workload workload = workload_of(trace.pods, trace.nodes);
    const Fragments fragments(workload, trace.pods);
    const auto typical = typical_pods(workload, trace.pods);
    std::vector<std::uint32_t> order(trace.nodes.nodes.size());
    for (std::uint32_t i = 0; i < order.size(); ++i) order[i] = i;
    for (const Policy policy : kPolicies) {
      Cluster cluster(trace.nodes, order);
      const auto placer = policy == Policy::ours
                              ? std::move(*ours(cluster, workload))
                              : baseline(policy, cluster, workload, fragments, GoRandom(seed));
      std::vector<std::pair<std::uint32_t, Spot>> placed;
      Prng random(seed);
      for (int i = 0; i < 350; ++i) {
        if (!placed.empty() && random.below(i < 200 ? 8 : 2) == 0) {
          std::swap(placed[random.below(placed.size())], placed.back());
          cluster.remove(workload.shapes[placed.back().first], placed.back().second);
          placer->removed(placed.back().first, placed.back().second);
          placed.pop_back();
        }
        const std::uint32_t index = workload.shape_of[random.below(workload.shape_of.size())];
        const Shape& shape = workload.shapes[index];
        if (shape.models == 0) continue;
        double best = -1e8;
        std::uint32_t first = cluster.none();
        for (std::uint32_t n = 0; n < cluster.size(); ++n) {
          const double score = score_by_the_book(policy, cluster[n], shape, typical);
          if (score > best) best = score, first = n;
        }
        const auto spot = placer->choose(index);
        ASSERT_EQ(spot.has_value(), first != cluster.none()) << name_of(policy) << ' ' << i;
        if (!spot) continue;
        if (policy == Policy::best_fit || policy == Policy::dot_product || policy == Policy::fgd) {
          ASSERT_EQ(spot->node, first) << name_of(policy) << ' ' << i;
        }
        ASSERT_TRUE(cluster.place(shape, *spot)) << name_of(policy) << ' ' << i;
        placer->placed(index, *spot);
        placed.emplace_back(index, *spot);
      }
    }
  }
}

}  // namespace
}  // namespace bulkhead::replay
