// Policies against mixes: 100 H100s at load 0.95, every policy on the same arrivals; against the goals (no
// moves: never below the best baseline; at most 3 moves: within a point of free repacking for 5 moves in 100
// jobs). Then a few GPUs against the exact optimal online policy, and how fast events are played at 10,000
// GPUs.
//
//     bench_churn [GPUs of the exact part, default 3; 0: none] [counted jobs, default 400000]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "base/clock.hpp"
#include "core/churn/churn.hpp"
#include "core/mig/models_for_tests.hpp"

namespace {

using namespace bulkhead;

mig::Geometry h100() { return mig::six_shapes(); }

const char* verdict(bool good) { return good ? "PASS" : "MISSED"; }

// The published mixes, and an even one of five profiles: without double memory, as most reports have it.
std::vector<churn::Mix> all_mixes() {
  std::vector<churn::Mix> all;
  for (const auto& row : churn::mixes()) all.push_back(*churn::named_mix(row.name, h100()));
  all.push_back(*churn::parse_mix("1g.10gb=1,2g.20gb=1,3g.40gb=1,4g.40gb=1,7g.80gb=1", h100()));
  all.back().name = "uniform5";
  return all;
}

unsigned missed = 0;
const char* goal(bool good) {
  missed += good ? 0 : 1;
  return verdict(good);
}

void fleet_part(std::uint64_t jobs) {
  std::printf(
      "100 H100, load 0.95, %llu jobs: %% of offered slices accepted (moves for 100 accepted jobs)\n%-9s",
      static_cast<unsigned long long>(jobs), "mix");
  for (const auto& policy : churn::policies()) std::printf(" %12s", std::string(policy.name).c_str());
  std::printf("  +-95%%\n");
  for (const auto& mix : all_mixes()) {
    std::printf("%-9s", mix.name.c_str());
    std::map<std::string, churn::Outcome> by;
    for (const auto& policy : churn::policies()) {
      churn::Setup setup;
      setup.pools = {{h100(), 100}};
      setup.mix = mix;
      setup.policy = policy.policy;
      setup.jobs = jobs;
      const auto out = *churn::simulate(setup);
      std::printf(" %6.2f (%3.1f)", out.accepted_percent, out.moves_per_100);
      by.emplace(policy.name, out);
    }
    const double baseline = std::max(
        {by["first-fit"].accepted_percent, by["best-fit"].accepted_percent, by["mfi"].accepted_percent});
    const double none = by["ours"].accepted_percent - baseline;
    const auto& spent = by["ours+3@5"];
    const double below = by["repack"].accepted_percent - spent.accepted_percent;
    std::printf(
        "  %.2f\n%-9s no moves %+.2f over the best baseline %s; ours+3@5 %.2f below free, %.2f moves %s\n",
        by["ours"].half_width, "", none, goal(none >= 0), below, spent.moves_per_100,
        goal(below <= 1 && spent.moves_per_100 <= 5 && spent.accepted_percent >= baseline));
    std::fflush(stdout);
  }
}

void exact_part(unsigned gpus) {
  std::printf(
      "\n%u H100, load 0.95, exact: points below the best online policy that accepts what fits (worst and "
      "best "
      "order of ties), and what refusing would add\n",
      gpus);
  for (const auto& mix : all_mixes()) {
    churn::Small small;
    small.geometry = h100();
    small.gpus = gpus;
    small.mix = mix;
    small.tolerance = 0.02;
    const auto start = monotonic_ns();
    const auto best = churn::solve(small, false);
    if (!best.ok()) {
      std::printf("%-9s %s\n", mix.name.c_str(), best.error().message().c_str());
      continue;
    }
    const double top = best->percent.middle();
    const auto below = [&](churn::Rule rule, bool kindly) {
      const auto figure = churn::evaluate(small, rule, kindly);
      return figure.ok() ? top - figure->percent.middle() : -1.0;
    };
    const double worst = below(churn::Rule::ours, false), kind = below(churn::Rule::ours, true);
    std::printf("%-9s optimum %.2f (%llu states), refusing %+.2f; ours %.2f to %.2f %s; mfi %.2f to %.2f",
                mix.name.c_str(), top, static_cast<unsigned long long>(best->states),
                churn::solve(small, true)->percent.middle() - top, worst, kind, goal(worst <= 0.2),
                below(churn::Rule::mfi, false), below(churn::Rule::mfi, true));
    if (gpus <= 2) {
      std::printf("; best-fit %.2f to %.2f", below(churn::Rule::best_fit, false),
                  below(churn::Rule::best_fit, true));
    }
    std::printf("  [%.1f s]\n", static_cast<double>(monotonic_ns() - start) / 1e9);
    std::fflush(stdout);
  }
}

void speed_part() {
  std::printf("\n10,000 H100, uniform, load 0.95: 1 M events\n");
  for (const auto& policy : churn::policies()) {
    churn::Setup setup;
    setup.pools = {{h100(), 10'000}};
    setup.mix = *churn::named_mix("uniform", h100());
    setup.policy = policy.policy;
    setup.warmup = 10;
    setup.jobs = 300'000;
    const auto start = monotonic_ns();
    const auto out = *churn::simulate(setup);
    const double seconds = static_cast<double>(monotonic_ns() - start) / 1e9;
    const double million = seconds * 1e6 / static_cast<double>(out.events);
    std::printf("%-9s %.2f s a million events (%.2f M events/s, %.2f %% accepted) %s\n",
                std::string(policy.name).c_str(), million, static_cast<double>(out.events) / seconds / 1e6,
                out.accepted_percent, goal(million <= 5));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const auto exact = argc > 1 ? static_cast<unsigned>(std::strtoul(argv[1], nullptr, 10)) : 3U;
  const auto jobs = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 400'000ULL;
  fleet_part(std::max(jobs, 1000ULL));
  if (exact != 0) exact_part(std::min(exact, 4U));
  speed_part();
  std::printf("\n%u goals missed\n", missed);
  return 0;
}
