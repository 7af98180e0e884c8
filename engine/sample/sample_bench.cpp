// What sampling costs: CPU of this process and values that came, beside `nvidia-smi dmon` in the same run.
//   bench_sample [--nvml LIBRARY] [--seconds N] [--gpm-ms N] [--tick-ms N] [--smi nvidia-smi] [--rounds N]
// dmon's cost is that of its later seconds: a short run's CPU is taken from a long one's.
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "base/text.hpp"
#include "engine/sample/sample.hpp"

namespace {

using namespace bulkhead;  // NOLINT(google-build-using-namespace): a program of one file

double cpu_seconds() {
  timespec now{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) / 1e9;
}

struct Run {
  double cpu = 0, values = 0;
};

// CPU of a program, and how many numbers it printed in lines that begin with one.
Run dmon(const std::string& program, unsigned count) {
  int ends[2];
  if (::pipe(ends) != 0) return {};
  const pid_t child = ::fork();
  if (child == 0) {
    ::dup2(ends[1], 1);
    ::close(ends[0]);
    ::close(ends[1]);
    const std::string samples = std::to_string(count);
    ::execlp(program.c_str(), program.c_str(), "dmon", "-d", "1", "-c", samples.c_str(), "-s", "pucvmet",
             static_cast<char*>(nullptr));
    ::_exit(127);
  }
  ::close(ends[1]);
  std::string said;
  char buffer[4096];
  for (ssize_t n = 0; (n = ::read(ends[0], buffer, sizeof buffer)) > 0;)
    said.append(buffer, static_cast<std::size_t>(n));
  ::close(ends[0]);
  int status = 0;
  rusage used{};
  ::wait4(child, &status, 0, &used);
  Run run;
  run.cpu = static_cast<double>(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
            static_cast<double>(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
  for (const auto line : split_lines(said)) {
    if (line.starts_with('#')) continue;
    bool first = true;
    for (const auto word : split(line, ' ')) {
      if (trim(word).empty() || !parse_u64(trim(word))) continue;
      if (!first) run.values += 1;  // the first is the GPU's index
      first = false;
    }
  }
  return run;
}

}  // namespace

int main(int argc, char** argv) {
  sample::Settings settings;
  unsigned seconds = 20, rounds = 1;
  std::string smi;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    const auto number = static_cast<unsigned>(std::atoi(argv[i + 1]));
    if (option == "--nvml") settings.library = argv[i + 1];
    if (option == "--seconds") seconds = number;
    if (option == "--gpm-ms") settings.gpm_ms = number;
    if (option == "--tick-ms") settings.tick_ms = number;
    if (option == "--smi") smi = argv[i + 1];
    if (option == "--rounds") rounds = number;
  }
  std::vector<double> ratios;
  for (unsigned round = 0; round < rounds; ++round) {
    Run ours;
    {
      const sample::Sampler sampler(settings);
      if (!sampler.wait_ready(30'000)) std::puts("not every GPU answered");
      std::this_thread::sleep_for(std::chrono::seconds(2));  // periods settle
      const auto fresh = [](const sample::Snapshot& seen) {
        std::uint64_t sum = 0;
        for (const auto& gpu : seen.gpus) sum += gpu.fresh;
        return sum;
      };
      const auto before = sampler.snapshot();
      const double start = cpu_seconds();
      std::this_thread::sleep_for(std::chrono::seconds(seconds));
      ours.cpu = cpu_seconds() - start;
      const auto after = sampler.snapshot();
      ours.values = static_cast<double>(fresh(after) - fresh(before));
      if (after.gpus.empty()) {
        std::printf("no GPU: %s\n", after.why.c_str());
        return 2;
      }
      std::size_t slices = 0;
      double in_calls = 0;
      for (std::size_t g = 0; g < after.gpus.size(); ++g) {
        slices += after.gpus[g].slices.size();
        for (std::size_t t = 0; t < sample::tiers; ++t)
          in_calls +=
              static_cast<double>(after.gpus[g].tier[t].nanoseconds - before.gpus[g].tier[t].nanoseconds) /
              1e9;
      }
      const auto reads = std::chrono::steady_clock::now();
      for (unsigned i = 0; i < 1000; ++i) static_cast<void>(sampler.snapshot());
      const double snapshot_us =
          std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - reads).count() / 1000;
      std::printf(
          "%zu GPUs, %zu slices, tick %u ms: %.3f %% of a core (%.3f %% in rounds, driver calls with them), "
          "%.0f values/s, "
          "%.2f us of CPU a value; a snapshot %.1f us\n",
          after.gpus.size(), slices, settings.tick_ms, ours.cpu / seconds * 100, in_calls / seconds * 100,
          ours.values / seconds, ours.cpu * 1e6 / ours.values, snapshot_us);
      if (round == 0) {
        for (std::size_t t = 0; t < sample::tiers; ++t) {
          const auto& tier = after.gpus[0].tier[t];
          std::printf("  %-7s a round %8.1f us, every %6.0f ms, %6llu rounds\n",
                      sample::name_of(static_cast<sample::Tier>(t)).data(), tier.cost_us, tier.period_ms,
                      static_cast<unsigned long long>(tier.rounds));
        }
        for (std::size_t s = 0; s < sample::signals; ++s) {
          const auto& value = after.gpus[0].values[s];
          std::printf("  %-18s %14.2f %-5s %s\n", sample::rows()[s].name.data(), value.number,
                      sample::rows()[s].unit.data(), value.refused ? name_of(*value.refused).data() : "");
        }
      }
    }
    if (smi.empty()) continue;
    const Run brief = dmon(smi, 2), full = dmon(smi, 2 + seconds);
    const Run theirs{full.cpu - brief.cpu, full.values - brief.values};
    if (theirs.values <= 0) continue;
    const double ratio = ours.cpu / ours.values / (theirs.cpu / theirs.values);
    ratios.push_back(ratio);
    std::printf(
        "nvidia-smi dmon -d 1 -s pucvmet: %.3f %% of a core, %.0f values/s, %.2f us a value; ours a value: "
        "%.3f of it\n",
        theirs.cpu / seconds * 100, theirs.values / seconds, theirs.cpu * 1e6 / theirs.values, ratio);
  }
  if (!ratios.empty()) {
    std::sort(ratios.begin(), ratios.end());
    std::printf("CPU a value against dmon's, median of %zu: %.3f (wanted: at most 0.1)\n", ratios.size(),
                ratios[ratios.size() / 2]);
  }
  return 0;
}
