// What the two experiments of `simulate` share: runs on several threads under one progress bar, and figures
// over seeds.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/json.hpp"
#include "base/result.hpp"
#include "cli/cli.hpp"

namespace bulkhead::cli {

struct SimulateOptions {
  std::string trace = {}, nodes_file = {}, published = {};
  std::string mig = {};
  std::vector<std::string> policies = {}, mixes = {};
  std::string seeds = {};
  std::uint64_t nodes = 0, gpus = 0;
  double arrivals = 130;
  bool times = false;
  double load = 0.95;
  std::uint64_t jobs = 200'000;
  std::string holding = "exponential";
  std::string plot = {};
  unsigned threads = 0;
  bool json = false, quiet = false, list = false;
};

int simulate_trace(const Context& context, const SimulateOptions& options);
int simulate_mig(const Context& context, const SimulateOptions& options);

// "ours,fgd" and several options alike: one list, without repeats, in the order given.
std::vector<std::string> names_of(const std::vector<std::string>& given);
// "42..51", "1,2,7", "42..45,50".
Result<std::vector<std::uint64_t>> parse_seeds(std::string_view text);

// One run of several: `work` is called on some thread with a function that takes done and total and answers
// whether to go on.
struct Run {
  std::string name = {};
  std::function<void(const std::function<bool(std::uint64_t, std::uint64_t)>& tick)> work = {};
};
struct Crew {
  bool stopped = false;                // by a signal, before all were done
  std::vector<std::uint64_t> ns = {};  // each run took; 0: never begun
};
// Carries them out in order on at most `threads` threads (0: as many as there are cores). After the first
// SIGINT or SIGTERM those begun are asked to end and no other begins; the second ends the program at once.
Crew carry_out(const Context& context, const std::vector<Run>& runs, unsigned threads, bool quiet);

struct Spread {
  double mean = 0;
  double sd = 0;  // of the sample; 0 for one value
};
Spread spread(const std::vector<double>& values);

Status write_plot(const std::string& path, const std::string& svg);
// Prints the page and, when the crew was stopped, how many runs its figures are of. The exit code.
int print_figures(const Context& context, const std::string& page, const Crew& crew, std::size_t done);

}  // namespace bulkhead::cli
