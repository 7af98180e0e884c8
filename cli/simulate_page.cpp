#include "cli/simulate_page.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <thread>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "cli/plan_page.hpp"

namespace bulkhead::cli {

namespace {

constexpr std::size_t kMostSeeds = 10'000;

std::string bar(double part, unsigned cells) {
  const auto full = static_cast<unsigned>(std::clamp(part, 0.0, 1.0) * cells);
  return std::string(full, '#') + std::string(cells - full, '.');
}

std::string about(double seconds) {
  if (seconds < 90) return fmt::format("{:.0f} s", seconds);
  if (seconds < 5400) return fmt::format("{:.0f} min", seconds / 60);
  return fmt::format("{:.1f} h", seconds / 3600);
}

}  // namespace

std::vector<std::string> names_of(const std::vector<std::string>& given) {
  std::vector<std::string> out;
  for (const auto& list : given) {
    for (const auto one : split(list, ',')) {
      const std::string name(trim(one));
      if (!name.empty() && std::find(out.begin(), out.end(), name) == out.end()) out.push_back(name);
    }
  }
  return out;
}

Result<std::vector<std::uint64_t>> parse_seeds(std::string_view text) {
  std::vector<std::uint64_t> out;
  const auto bad = [&](std::string why) {
    return Error(Errc::invalid, fmt::format("--seeds {}: {}", printable(text, 64), std::move(why)),
                 "like --seeds 42..51 or --seeds 1,2,7");
  };
  for (const auto part : split(text, ',')) {
    const auto dots = part.find("..");
    const auto first = parse_u64(trim(part.substr(0, dots)));
    const auto last = dots == std::string_view::npos ? first : parse_u64(trim(part.substr(dots + 2)));
    if (!first || !last)
      return bad(fmt::format("'{}' is no number and no range of numbers", printable(part, 64)));
    if (*last < *first) return bad(fmt::format("{} comes after {}", *first, *last));
    if (*last - *first >= kMostSeeds || out.size() + (*last - *first) >= kMostSeeds)
      return bad(fmt::format("more than {} seeds", kMostSeeds));
    for (std::uint64_t seed = *first; seed - *first <= *last - *first; ++seed) {
      if (std::find(out.begin(), out.end(), seed) != out.end())
        return bad(fmt::format("{} is there twice", seed));
      out.push_back(seed);
      if (seed == UINT64_MAX) break;
    }
  }
  return out;
}

Crew carry_out(const Context& context, const std::vector<Run>& runs, unsigned threads, bool quiet) {
  Crew crew;
  crew.ns.assign(runs.size(), 0);
  if (runs.empty()) return crew;
  const unsigned cores = std::max(1U, std::thread::hardware_concurrency());
  threads = threads == 0 ? cores : std::min(threads, cores);
  threads = static_cast<unsigned>(std::min<std::size_t>(threads, runs.size()));
  const auto stop = stop_on_signal();
  std::atomic<bool> stopping{false};
  std::atomic<std::size_t> taken{0}, ended{0};
  std::vector<std::atomic<std::uint32_t>> parts(runs.size());  // done of each, in thousandths
  std::vector<std::jthread> workers;
  for (unsigned t = 0; t < threads; ++t) {
    workers.emplace_back([&] {
      for (;;) {
        const std::size_t i = taken.fetch_add(1);
        if (i >= runs.size() || stopping) break;
        const auto start = monotonic_ns();
        runs[i].work([&, i](std::uint64_t done, std::uint64_t total) {
          const double part = total == 0 ? 0 : static_cast<double>(done) / static_cast<double>(total);
          parts[i] = static_cast<std::uint32_t>(1000 * std::clamp(part, 0.0, 1.0));
          return !stopping.load();
        });
        crew.ns[i] = std::max<std::uint64_t>(1, monotonic_ns() - start);
        parts[i] = 1000;
        ++ended;
      }
    });
  }
  const bool shown = !quiet && ::isatty(STDERR_FILENO) == 1;
  const auto begun = monotonic_ns();
  std::uint64_t drawn = 0;
  while (ended < runs.size()) {
    std::this_thread::sleep_for(
        std::chrono::milliseconds(ended == 0 && monotonic_ns() - begun < 100'000'000 ? 2 : 20));
    if (!stopping && stop()) stopping = true;
    if (stopping) break;  // those begun end soon; they are joined below
    if (!shown || monotonic_ns() - drawn < 100'000'000) continue;
    drawn = monotonic_ns();
    std::uint64_t sum = 0;
    for (const auto& part : parts) sum += part;
    const double part = static_cast<double>(sum) / (1000.0 * static_cast<double>(runs.size()));
    const double elapsed = static_cast<double>(drawn - begun) / 1e9;
    const std::size_t at = std::clamp<std::size_t>(taken.load(), 1, runs.size()) - 1;
    const std::string left =
        part > 0.01 && elapsed > 1 ? ", about " + about(elapsed * (1 - part) / part) + " left" : "";
    std::string line = fmt::format("[{}] {:3.0f} %  {} of {} runs, {}{}", bar(part, 24), part * 100,
                                   ended.load(), runs.size(), runs[at].name, left);
    line.resize(std::min<std::size_t>(line.size(), context.width > 1 ? context.width - 1 : 1));
    std::fputs(("\r\x1b[K" + line).c_str(), stderr);
    std::fflush(stderr);
  }
  workers.clear();  // joins
  if (shown && drawn != 0) {
    std::fputs("\r\x1b[K", stderr);
    std::fflush(stderr);
  }
  crew.stopped = stopping;
  return crew;
}

Spread spread(const std::vector<double>& values) {
  Spread out;
  if (values.empty()) return out;
  for (const double value : values) out.mean += value;
  out.mean /= static_cast<double>(values.size());
  for (const double value : values) out.sd += (value - out.mean) * (value - out.mean);
  out.sd = values.size() < 2 ? 0 : std::sqrt(out.sd / static_cast<double>(values.size() - 1));
  return out;
}

Status write_plot(const std::string& path, const std::string& svg) {
  auto written = write_file_atomic(path, svg);
  if (!written.ok()) return std::move(written).error().in("--plot");
  return ok_status();
}

int print_figures(const Context& context, const std::string& page, const Crew& crew, std::size_t done) {
  if (const int printed = print(page); printed != exit_ok || !crew.stopped) return printed;
  const std::size_t all = crew.ns.size();
  std::fputs(
      paint(Context{.colour = context.colour && ::isatty(STDERR_FILENO) == 1}, Tone::warn,
            done == 0 ? fmt::format("Stopped: 0 of {} runs were done; there are no figures.\n", all)
                      : fmt::format("Stopped: {} of {} runs were done; the figures are theirs.\n", done, all))
          .c_str(),
      stderr);
  return exit_findings;
}

}  // namespace bulkhead::cli
