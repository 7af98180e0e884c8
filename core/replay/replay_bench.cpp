// The published figures again, and ours beside them: every list of pods in a folder of traces (first
// argument, or BULKHEAD_TRACES, or examples/traces/openb), seeds 42 to 51 (second argument: how many). Then
// what runs cost: parsing, and the default trace on fleets of 10,000 and 100,000 GPUs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "core/replay/replay.hpp"

namespace {

using namespace bulkhead;
using replay::Policy;

constexpr std::size_t kLimit = std::size_t{1} << 30U;

double seconds_since(std::int64_t start) { return static_cast<double>(monotonic_ns() - start) / 1e9; }

struct Figure {
  double mean = 0, deviation = 0, seconds = 0;
};

Figure figure(const replay::NodeList& nodes, const replay::PodList& pods, Policy policy,
              std::uint64_t seeds) {
  std::vector<double> all;
  const auto start = monotonic_ns();
  for (std::uint64_t seed = 42; seed < 42 + seeds; ++seed) {
    const auto outcome =
        replay::sample(nodes, pods, policy, {.seed = seed, .arrived_percent = 130, .points = 0});
    if (!outcome.ok()) {
      fmt::print(stderr, "{}\n", outcome.error().message());
      std::exit(2);
    }
    all.push_back(outcome->allocated_percent);
  }
  Figure out;
  const auto count = static_cast<double>(seeds);
  out.seconds = seconds_since(start) / count;
  for (const double one : all) out.mean += one / count;
  for (const double one : all) out.deviation += (one - out.mean) * (one - out.mean);
  out.deviation = seeds > 1 ? std::sqrt(out.deviation / (count - 1)) : 0;
  return out;
}

// "trace,policy" -> mean
std::map<std::string, double> published(const std::filesystem::path& path) {
  std::map<std::string, double> out;
  const std::string text = read_file(path, kLimit).value_or("");
  for (const auto line : split_lines(text))
    if (const auto fields = split(line, ','); fields.size() >= 4)
      out[fmt::format("{},{}", fields[0], fields[1])] = std::atof(std::string(fields[3]).c_str());
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  const char* named = std::getenv("BULKHEAD_TRACES");
  const std::filesystem::path folder = argc > 1           ? argv[1]
                                       : named != nullptr ? named
                                                          : "examples/traces/openb";
  const std::uint64_t seeds = argc > 2 ? std::max(1, std::atoi(argv[2])) : 10;
  const auto node_text = read_file(folder / "openb_node_list_gpu_node.csv", kLimit);
  if (!node_text.ok()) {
    fmt::print(stderr, "{}\n", node_text.error().message());
    return 2;
  }
  const auto nodes = replay::parse_nodes(*node_text);
  if (!nodes.ok()) {
    fmt::print(stderr, "{}\n", nodes.error().message());
    return 2;
  }
  const auto known = published(folder / "published_allocation.csv");
  const std::string start_of_name = "openb_pod_list_";
  std::vector<std::string> traces;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.path().extension() == ".csv" && entry.path().stem().string().starts_with(start_of_name))
      traces.push_back(entry.path().stem().string().substr(start_of_name.size()));
  std::sort(traces.begin(), traces.end());

  bool good = !traces.empty();
  const auto say = [&good](bool met) {
    good = good && met;
    return met ? "PASS" : "MISSED";
  };
  replay::PodList first;
  std::map<std::string, double> ahead;  // ours before FGD, by trace
  double ours_on_default = 0;
  fmt::print("GPU allocation in % when pods asking for 130 % of the GPUs have arrived, mean of {} seeds\n",
             seeds);
  fmt::print("{:<14}{:<18}{:>8}{:>7}{:>11}{:>12}{:>9}\n", "trace", "policy", "here", "sd", "published",
             "difference", "s/run");
  for (const std::string& trace : traces) {
    const auto text = read_file(folder / (start_of_name + trace + ".csv"), kLimit);
    const auto pods = replay::parse_pods(text.ok() ? std::string_view(*text) : std::string_view());
    if (!pods.ok()) {
      fmt::print(stderr, "{}: {}\n", trace, pods.error().message());
      return 2;
    }
    if (trace == "default" || first.pods.empty()) first = *pods;
    double fgd = 0;
    for (const Policy policy : replay::kPolicies) {
      const Figure here = figure(*nodes, *pods, policy, seeds);
      fmt::print("{:<14}{:<18}{:>8.2f}{:>7.2f}", trace, replay::name_of(policy), here.mean, here.deviation);
      if (policy == Policy::fgd) fgd = here.mean;
      if (policy == Policy::ours) {
        ahead[trace] = here.mean - fgd;
        if (trace == "default") ours_on_default = here.mean;
        fmt::print("{:>11}{:>+12.2f}{:>9.3f}  {} (before FGD, wanted from -0.05)\n", "", here.mean - fgd,
                   here.seconds, say(here.mean - fgd >= -0.05));
        continue;
      }
      const auto found = known.find(fmt::format("{},{}", trace, replay::name_of(policy)));
      if (found == known.end()) {
        fmt::print("{:>11}{:>12}{:>9.3f}\n", "", "", here.seconds);
        continue;
      }
      const double off = here.mean - found->second;
      const bool promised = policy == Policy::random || policy == Policy::best_fit || policy == Policy::fgd;
      fmt::print("{:>11.2f}{:>+12.2f}{:>9.3f}  {}\n", found->second, off, here.seconds,
                 promised ? say(std::abs(off) <= 0.3) : "");
    }
  }
  double mean_ahead = 0;
  for (const auto& [trace, by] : ahead) mean_ahead += by / static_cast<double>(ahead.size());
  fmt::print("ours before FGD, mean of {} traces: {:+.2f}, wanted +0.25: {}\n", ahead.size(), mean_ahead,
             say(mean_ahead >= 0.25));
  if (ours_on_default > 0)
    fmt::print("ours on the default trace: {:.2f}, wanted 95.60: {}\n", ours_on_default,
               say(ours_on_default >= 95.6));

  std::string rows =
      "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,"
      "scheduled_time\n";
  for (unsigned i = 0; rows.size() < 100'000'000; ++i)
    rows += fmt::format("openb-pod-{:07},{},{},1,{},V100M16|V100M32,LS,Running,{},{},{}\n", i,
                        1000 + i % 64000, 1 + i % 262144, 1 + i % 1000, i, i + 1000, i);
  std::uint64_t sum = 0;
  auto start = monotonic_ns();
  for (const char c : rows) sum += c == '\n' ? 1 : 0;
  const double pass = seconds_since(start);
  start = monotonic_ns();
  const auto parsed = replay::parse_pods(rows);
  const double took = seconds_since(start);
  fmt::print(
      "parsing {} rows, 100 MB: {:.2f} s ({:.0f} times one look at every byte), wanted below 3 s: {}\n",
      sum - 1, took, took / pass, say(parsed.ok() && took < 3));

  for (const std::uint64_t gpus : {10'000U, 100'000U}) {
    const auto count = replay::nodes_for_gpus(*nodes, gpus);
    const auto fleet = replay::enlarge(*nodes, count.value_or(0));
    for (const Policy policy : {Policy::random, Policy::best_fit, Policy::fgd, Policy::ours}) {
      start = monotonic_ns();
      const auto outcome =
          replay::sample(*fleet, first, policy, {.seed = 42, .arrived_percent = 130, .points = 100});
      const double run = seconds_since(start);
      fmt::print("{:>7} GPUs, {:<10} {:>7} arrivals, curve of 100: {:.2f} % in {:.2f} s, {:.0f} arrivals/s\n",
                 gpus, replay::name_of(policy), outcome->arrivals, outcome->allocated_percent, run,
                 static_cast<double>(outcome->arrivals) / run);
    }
  }
  return good ? 0 : 1;
}
