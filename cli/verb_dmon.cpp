// bulkhead dmon: a line a GPU and a slice every second, for scripts. It samples by itself; nothing is
// changed.
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>

#include <chrono>
#include <thread>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/json.hpp"
#include "cli/cli.hpp"
#include "engine/sample/sample.hpp"

namespace bulkhead::cli {

namespace {

struct Options {
  unsigned count = 0;  // 0: until stopped
  std::string interval = "1s";
  int gpu = -1;
  bool json = false;
};

volatile std::sig_atomic_t stopped = 0;
void on_signal(int) { stopped = 1; }

using sample::Signal;

std::string cell(const sample::Values& values, Signal signal, double scale, int digits, std::uint64_t now) {
  const sample::Value& value = values[static_cast<std::size_t>(signal)];
  // What is over a minute old is no answer to "now"; the age column says how old the youngest is.
  if (!value.known() || now > value.at_ns + 70'000'000'000) return "-";
  return fmt::format("{:.{}f}", value.number * scale, digits);
}

constexpr std::string_view header =
    "#time                     gpu  gi  state       W    C margin   sm%  ten% dram%  occ%  MiB used   MHz "
    "reasons    age ms\n";

std::string line(const std::string& when, const sample::Gpu& gpu, const sample::Slice* slice,
                 std::uint64_t now) {
  const sample::Values& values = slice != nullptr ? slice->values : gpu.values;
  std::uint64_t youngest = 0;
  for (const auto& value : values) youngest = std::max(youngest, value.at_ns);
  const auto of = [&](Signal signal, double scale = 1, int digits = 0) {
    return cell(values, signal, scale, digits, now);
  };
  const auto& reasons = values[static_cast<std::size_t>(Signal::reasons)];
  return fmt::format(
      "{} {:>3} {:>3} {:>8} {:>5} {:>4} {:>6} {:>5} {:>5} {:>5} {:>5} {:>9} {:>5} {:>7} {:>9}\n", when,
      gpu.index, slice != nullptr ? std::to_string(slice->gpu_instance) : "-", name_of(gpu.state),
      of(Signal::power), of(Signal::temperature), of(Signal::margin), of(Signal::sm, 1, 1),
      of(Signal::tensor, 1, 1), of(Signal::dram, 1, 1), of(Signal::occupancy, 1, 1),
      of(Signal::memory_used, 1.0 / (1 << 20)), of(Signal::clock_sm),
      reasons.known() ? fmt::format("0x{:x}", static_cast<std::uint64_t>(reasons.number)) : "-",
      youngest == 0 ? "-" : fmt::format("{:.0f}", static_cast<double>(now - std::min(now, youngest)) / 1e6));
}

// Rates need two looks at the driver: the first lines wait for the second one, for a moment.
void wait_for_rates(const sample::Sampler& sampler) {
  for (unsigned i = 0; i < 20 && stopped == 0; ++i) {
    const sample::Snapshot seen = sampler.snapshot();
    const auto done = [](const sample::Value& value) { return value.known() || value.refused; };
    const bool all = std::all_of(seen.gpus.begin(), seen.gpus.end(), [&](const sample::Gpu& gpu) {
      return gpu.state != sample::State::sampling || !gpu.gpm.value_or(false) ||
             (done(gpu[Signal::sm]) &&
              std::all_of(gpu.slices.begin(), gpu.slices.end(), [&](const sample::Slice& slice) {
                return done(slice.values[static_cast<std::size_t>(Signal::sm)]);
              }));
    });
    if (all) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(25));
  }
}

int lines(const Context& context, const Options& options, std::uint64_t interval,
          const sample::Sampler& sampler) {
  auto next = std::chrono::steady_clock::now();
  for (unsigned printed = 0; stopped == 0 && (options.count == 0 || printed < options.count); ++printed) {
    next += std::chrono::nanoseconds(interval);
    while (stopped == 0 && std::chrono::steady_clock::now() < next) {
      const auto left = next - std::chrono::steady_clock::now();
      std::this_thread::sleep_for(
          std::min<std::chrono::steady_clock::duration>(left, std::chrono::milliseconds(200)));
    }
    if (printed == 0) wait_for_rates(sampler);
    if (stopped != 0) break;
    sample::Snapshot seen = sampler.snapshot();
    if (seen.gpus.empty())
      return fail(context,
                  Error(Errc::unavailable,
                        "dmon: " + (seen.why == "starting" ? "the driver has not answered since the start"
                                                           : seen.why),
                        "try: bulkhead doctor"));
    if (options.gpu >= 0) {
      std::erase_if(seen.gpus,
                    [&](const auto& gpu) { return gpu.index != static_cast<unsigned>(options.gpu); });
      if (seen.gpus.empty())
        return fail(context,
                    Error(Errc::not_found, fmt::format("dmon: the driver shows no GPU {}", options.gpu),
                          "try: bulkhead inventory"));
    }
    const std::string when = rfc3339(wall_now());
    std::string out;
    if (options.json) {
      Json document = Json{{"time", when}};
      document.update(to_json(seen));
      out = document.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
    } else {
      if (printed % 40 == 0) out += header;
      for (const auto& gpu : seen.gpus) {
        out += line(when, gpu, nullptr, seen.at_ns);
        for (const auto& slice : gpu.slices) out += line(when, gpu, &slice, seen.at_ns);
      }
    }
    if (const int code = print(out); code != exit_ok) return code;
    std::fflush(stdout);
  }
  return exit_ok;
}

int run(const Context& context, const Options& options) {
  const auto interval = parse_duration(options.interval);
  if (!interval.ok()) return fail(context, Error(interval.error()).in("dmon: --interval"));
  if (*interval < 100'000'000)
    return fail(context, Error(Errc::invalid, "dmon: --interval: the driver's sensors move every 100 ms",
                               "try: --interval 100ms"));
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  sample::Settings settings;
  settings.library = context.nvml_library;
  settings.gpm_ms = static_cast<unsigned>(std::min<std::uint64_t>(*interval / 1'000'000, 1000));
  settings.deadline_ms = std::min(context.driver_timeout_ms, 2000U);
  settings.history.most_bytes = 1U << 20U;  // nobody asks this process for the past
  const sample::Sampler sampler(settings);
  // A GPU that hangs does not hold up the lines of the others.
  static_cast<void>(sampler.wait_ready(settings.deadline_ms + 500));
  int code = lines(context, options, *interval, sampler);
  const auto seen = sampler.snapshot();
  const bool hung = (seen.gpus.empty() && seen.why == "starting") ||
                    std::any_of(seen.gpus.begin(), seen.gpus.end(), [](const sample::Gpu& gpu) {
                      return gpu.state == sample::State::hung || gpu.state == sample::State::starting;
                    });
  if (hung) {
    // A thread sits in the driver: destructors would pull the ground from under it.
    std::fflush(nullptr);
    ::_exit(code);
  }
  return code;
}
}  // namespace

std::function<int(const Context&)> bind_dmon(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_option("-c,--count", options->count, "So many times, then end (default: until stopped)");
  app.add_option("-d,--interval", options->interval, "Between two lines of one GPU: 1s, 500ms");
  app.add_option("--gpu", options->gpu, "One GPU alone, by its index")->check(CLI::Range(0, 63));
  app.add_flag("--json", options->json,
               "A JSON document a line: every value with its age, or why there is none");
  return [options](const Context& context) { return run(context, *options); };
}

}  // namespace bulkhead::cli
