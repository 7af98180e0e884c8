// Decisions a second on fleets of 10,000 and 100,000 GPUs with CPU, memory and NUMA: filling up from empty,
// and in steady state with arrivals and departures; and what a million events take. Beside it, in the same
// run, on the same state: the same rule as a scan over all nodes, and the floor of any scan, asking each node
// whether it fits. Time is the processor's, so that neighbours on the machine count little.
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <vector>

#include "base/prng.hpp"
#include "core/fraction/fraction.hpp"
#include "core/fraction/plain.hpp"

namespace {

using namespace bulkhead;
using namespace bulkhead::fraction;

double seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

std::vector<Node> nodes_of(unsigned gpus, Prng& random) {
  struct Row {
    std::int64_t cpu, memory;
    unsigned gpus, model;
    std::int64_t gpu_memory;
  };
  const Row rows[] = {{96'000, 393'216, 8, 0, 40'960},  {128'000, 786'432, 8, 1, 81'920},
                      {104'000, 524'288, 2, 2, 16'384}, {48'000, 376'832, 4, 3, 32'768},
                      {16'000, 122'880, 2, 4, 16'384},  {96'000, 393'216, 8, 0, 40'960}};
  std::vector<Node> nodes;
  for (unsigned have = 0; have < gpus;) {
    const auto& row = rows[random.below(std::size(rows))];
    Node node{.cpu_milli = row.cpu,
              .memory_mib = row.memory,
              .gpus = row.gpus,
              .model = row.model,
              .gpu_memory_mib = row.gpu_memory};
    for (unsigned g = 0; g < row.gpus; ++g) node.numa[g] = static_cast<std::uint8_t>(2 * g / row.gpus);
    have += row.gpus;
    nodes.push_back(node);
  }
  return nodes;
}

// 120 shapes, the frequency of the n-th about 1/n: half shares, a third single GPUs, some sets, some without
// GPU.
Mix mix_of(Prng& random) {
  Mix mix;
  for (int i = 0; i < 120; ++i) {
    Task task;
    const auto kind = random.below(100);
    if (kind < 50) {
      task = {.cpu_milli = static_cast<std::int64_t>(1000 * (2 + random.below(11))),
              .num_gpu = 1,
              .gpu_milli = static_cast<std::int32_t>(10 * (15 + random.below(70))),
              .gpu_memory_mib = static_cast<std::int64_t>(1024 * (1 + random.below(12)))};
    } else if (kind < 82) {
      task = {.cpu_milli = static_cast<std::int64_t>(1000 * (3 + random.below(14))),
              .num_gpu = 1,
              .gpu_milli = kWhole};
    } else if (kind < 88) {
      task = {.num_gpu = 2U << random.below(3), .gpu_milli = kWhole};
      task.cpu_milli = task.num_gpu * static_cast<std::int64_t>(1000 * (4 + random.below(7)));
    } else {
      task = {.cpu_milli = static_cast<std::int64_t>(1000 * (1 + random.below(32)))};
    }
    task.memory_mib = task.cpu_milli / 1000 * static_cast<std::int64_t>(1024 + 256 * random.below(12));
    if (task.num_gpu != 0 && random.below(8) == 0) task.models = 1U << random.below(5);
    mix.push_back({task, 1000.0 / (i + 1)});
  }
  return mix;
}

struct Draw {
  std::vector<double> upto;
  const Mix* mix;
  explicit Draw(const Mix& of) : mix(&of) {
    double sum = 0;
    for (const auto& typical : of) upto.push_back(sum += typical.weight);
  }
  const Task& operator()(Prng& random) const {
    const auto at = std::lower_bound(upto.begin(), upto.end(), random.unit() * upto.back()) - upto.begin();
    return (*mix)[std::min(static_cast<std::size_t>(at), mix->size() - 1)].task;
  }
};

bool run(unsigned gpus, double wanted) {
  Prng random(gpus);
  const auto nodes = nodes_of(gpus, random);
  const auto mix = mix_of(random);
  const Draw draw(mix);
  Fleet fleet;
  for (const auto& node : nodes) {
    if (!fleet.add_node(node).ok()) return false;
  }
  if (!fleet.set_mix(mix).ok()) return false;
  std::vector<std::pair<Task, Choice>> placed;
  Plain plain(nodes, mix);
  const auto capacity = fleet.gpu_milli_total();

  std::int64_t asked = 0;
  std::size_t decisions = 0;
  auto start = seconds();
  while (asked < capacity + capacity / 10 * 3) {
    const auto& task = draw(random);
    asked += static_cast<std::int64_t>(task.num_gpu) * task.gpu_milli;
    ++decisions;
    if (const auto choice = fleet.choose(task)) {
      if (!fleet.place(task, *choice)) return false;
      placed.emplace_back(task, *choice);
    }
  }
  const double filling = static_cast<double>(decisions) / (seconds() - start);
  std::printf(
      "%6u GPUs on %5zu nodes: filling  %7.0f decisions/s, %.2f %% of the GPUs sold at 130 %% asked\n", gpus,
      fleet.size(), filling,
      100.0 * static_cast<double>(fleet.gpu_milli_used()) / static_cast<double>(capacity));

  // Steady state: for each that is placed above 97 of 100 tasks of the full fleet, one at random leaves.
  const auto most = placed.size() / 100 * 97;
  std::vector<double> rates;
  std::size_t events = 0;
  const double begin = seconds();
  while (events < 1'000'000) {
    start = seconds();
    std::size_t chosen = 0;
    for (; chosen < 5000; ++chosen) {
      const auto& task = draw(random);
      ++events;
      if (const auto choice = fleet.choose(task)) {
        if (!fleet.place(task, *choice)) return false;
        placed.emplace_back(task, *choice);
      }
      while (placed.size() > most) {
        const auto at = random.below(placed.size());
        if (!fleet.remove(placed[at].first, placed[at].second)) return false;
        placed[at] = placed.back();
        placed.pop_back();
        ++events;
      }
    }
    rates.push_back(static_cast<double>(chosen) / (seconds() - start));
  }
  const double million = (seconds() - begin) * 1e6 / static_cast<double>(events);
  std::nth_element(rates.begin(), rates.begin() + static_cast<std::ptrdiff_t>(rates.size() / 2), rates.end());
  const double steady = rates[rates.size() / 2];

  for (const auto& [task, choice] : placed) plain.place(task, choice);
  const unsigned scans = gpus > 20'000 ? 8 : 40;
  start = seconds();
  unsigned differ = 0;
  for (unsigned i = 0; i < scans; ++i) {
    const auto& task = draw(random);
    const auto choice = plain.choose(task);
    differ += choice == fleet.choose(task) ? 0 : 1;
  }
  const double scanned = scans / (seconds() - start);
  start = seconds();
  std::size_t fitting = 0;
  for (unsigned i = 0; i < scans; ++i) {
    const auto& task = draw(random);
    for (NodeId id = 0; id < fleet.size(); ++id) fitting += fleet.fits(task, id) ? 1 : 0;
  }
  const double floor = scans / (seconds() - start);
  std::printf(
      "                              steady   %7.0f decisions/s (median of 5000s); a million events: %.2f "
      "s\n",
      steady, million);
  std::printf(
      "                              the rule by a plain scan %.0f/s (x%.0f slower, %u of %u answers "
      "differ); "
      "a scan that only asks whether it fits %.0f/s (x%.0f; %zu did)\n",
      scanned, steady / scanned, differ, scans, floor, steady / floor, fitting);
  std::printf("                              wanted: %.0f decisions/s%s\n", wanted,
              gpus == 10'000 ? ", a million events within 5 s" : "");
  return differ == 0 && filling >= wanted && steady >= wanted && (gpus != 10'000 || million <= 5);
}

}  // namespace

int main() {
  const bool small = run(10'000, 200'000);
  const bool large = run(100'000, 100'000);
  return small && large ? 0 : 1;
}
