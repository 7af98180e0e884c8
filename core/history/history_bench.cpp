// Thirty days of 8 GPUs with 7 slices each: bytes held, and a day read back, of one series and of all.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string_view>
#include <vector>

#include "base/prng.hpp"
#include "core/history/history.hpp"

namespace {

using namespace bulkhead;  // NOLINT(google-build-using-namespace): a program of one file

double ms_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

// jobs: runs of hours at a level, with noise of the sensor's size and dips of a few seconds, as training has.
// noise: every sample uniformly random over the whole range: no coder can do much.
void run(std::string_view name, bool noise) {
  constexpr unsigned gpus = 8, of_gpu = 22, of_slice = 7, slices = 7;
  history::History history;
  std::vector<std::size_t> series;
  std::vector<double> level;
  for (unsigned i = 0; i < gpus * (of_gpu + of_slice * slices); ++i) {
    series.push_back(*history.open({.step = 0.1}));
    level.push_back(0);
  }
  Prng prng(11);
  constexpr std::uint64_t end = 30 * 86400;
  double adds = 0;
  const auto start = std::chrono::steady_clock::now();
  // Every 10 s, which a minute's mean does not tell from every second; the last hour second by second.
  for (std::uint64_t s = 0; s < end; s += s + 3660 < end ? 10 : 1) {
    for (std::size_t i = 0; i < series.size(); ++i) {
      double value = 0;
      if (noise) {
        value = prng.unit() * 100;
      } else {
        if (prng.below(1080) == 0) level[i] = prng.below(3) == 0 ? 0 : prng.unit() * 100;  // about every 3 h
        value =
            level[i] == 0 ? 0 : level[i] + (prng.unit() - 0.5) * 4 - (prng.below(60) == 0 ? level[i] / 2 : 0);
      }
      history.add(series[i], static_cast<double>(s), value);
      adds += 1;
    }
  }
  const double fed = ms_since(start);
  std::vector<double> one;
  std::size_t points = 0;
  const auto all_start = std::chrono::steady_clock::now();
  for (const std::size_t i : series) {
    const auto query = std::chrono::steady_clock::now();
    points += history.query(i, end - 2 * 86400, end - 86400, history::History::Grain::minute).size();
    one.push_back(ms_since(query));
  }
  const double all = ms_since(all_start);
  std::sort(one.begin(), one.end());
  std::printf("%-6s %zu series: %.1f MiB held (bound 64), %.1f days back; a sample costs %.0f ns to add\n",
              name.data(), series.size(), static_cast<double>(history.bytes()) / (1 << 20),
              static_cast<double>(end - history.oldest_s().value_or(end)) / 86400, fed * 1e6 / adds);
  std::printf("       a day of one series: median %.3f ms; of all: %.1f ms (%zu points)\n",
              one[one.size() / 2], all, points);
}

}  // namespace

int main() {
  run("jobs", false);
  run("noise", true);
  return 0;
}
