// What a stream of MIG jobs gets from a fleet: jobs arrive at random, each asks for one instance of a
// profile, holds it for a random time and leaves; a job that finds no place is lost (a loss system).
// `simulate` plays one policy against one mix of jobs and says how much of what was asked for was given.
// `fluid_capacity` is the load a fleet could carry at the very best, which loads are measured against;
// `solve` is the exact optimal online policy of a small fleet, which rules are measured against. Pure and
// deterministic: the same setup and seed give the same figures on every machine.
//
// A slice is a memory slice: a job weighs `size` of its profile (on H100: 1g 1, 1g of double memory and 2g 2,
// 3g and 4g 4, 7g 8). The figure of a run is the slices of the accepted jobs over the slices of all jobs, in
// percent.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.hpp"
#include "core/mig/mig.hpp"

namespace bulkhead::churn {

// GPUs of one model. A fleet is a list of pools; GPU numbers run through the pools in order.
struct Pool {
  mig::Geometry geometry = {};
  unsigned gpus = 0;
};

// Of all jobs, the share that asks for a profile. Weights count jobs, not slices, and need not sum to 1.
struct Share {
  std::string profile = {};
  double weight = 0;
};
struct Mix {
  std::string name = {};
  std::vector<Share> shares = {};
};

// The published mixes. Columns: an eighth of a GPU (1g), a quarter with less compute (1g of double memory), a
// quarter (2g), a half with less compute (3g), a half (4g), a whole GPU (7g). On another grid a profile goes
// to the column of the nearest power of two; columns that a geometry lacks drop out, profiles that share a
// column share its weight, and profiles with a suffix (+me, +gfx, -me) are left out. A row's `why` is one
// sentence for the reader of a table.
struct MixRow {
  std::string_view name;
  double weights[6];
  std::string_view why;
};
std::span<const MixRow> mixes();
Result<Mix> named_mix(std::string_view name, const mig::Geometry& geometry);
// "1g.10gb=3,3g.40gb=1"; a name from mixes() is taken too.
Result<Mix> parse_mix(std::string_view text, const mig::Geometry& geometry);

enum class Rule {
  first_fit,  // the lowest GPU, its lowest start
  best_fit,   // the GPU with fewest free memory slices (then the lowest), its lowest start
  mfi,  // least growth of a fragmentation score, after arXiv 2511.18906 (then the lowest GPU, then the lowest
        // start)
  ours,    // core/grid: least growth of F, empty GPUs last; with `moves`, at most so many moves to make room
           // for a job
  repack,  // no online rule but a bound: a job is lost only if the fleet could not hold all jobs even moved
           // at will
};
struct Policy {
  Rule rule = Rule::ours;
  unsigned moves = 0;  // for `ours` only: at most so many to make room for one job, at most 3
  // For `ours` with moves: a budget. Each accepted job earns a hundredth of this many moves; what is not
  // spent is kept, up to twenty times this many. A job may spend as many moves as it has slices, times the
  // part of the purse that is full: when moves are scarce they go to the jobs that gain most by each. 0: no
  // budget.
  double moves_per_100 = 0;
};
struct PolicyRow {
  std::string_view name;  // first-fit, best-fit, mfi, ours, ours+1, ours+3, ours+3@5, repack
  Policy policy;
  std::string_view why;
};
std::span<const PolicyRow> policies();
Result<Policy> named_policy(std::string_view name);  // also ours+2 and ours+N@M, N moves a job and M for 100

// How long jobs stay; the mean is 1 for all, so that load means the same. Time is in mean holding times
// everywhere.
enum class Holding {
  exponential,
  fixed,
  heavy,  // nine in ten are short (mean 1/3), one is long (mean 7): squared coefficient of variation 9
};

struct Setup {
  std::vector<Pool> pools = {};
  Mix mix = {};
  Policy policy = {};
  Holding holding = Holding::exponential;
  double load = 0.95;           // offered jobs over what fluid_capacity says, (0, 4]
  std::uint64_t jobs = 200000;  // arrivals that count, after the warm-up
  double warmup = 10;     // mean holding times before the first arrival that counts; the fleet starts empty
  unsigned batches = 20;  // the counted arrivals in this many equal runs, 2 to 1000, for the interval
  std::uint64_t seed = 1;
};

struct KindFigures {
  std::string profile = {};
  unsigned slices = 0;  // weight of one job
  std::uint64_t offered = 0, accepted = 0;
};
struct Outcome {
  double accepted_percent = 0;  // slices accepted of slices offered
  double half_width = 0;        // of its 95 % confidence interval, by batch means and Student's t
  double jobs_percent = 0;      // jobs accepted of jobs offered
  double busy_percent = 0;      // slices held, mean over time, of all slices of the fleet
  std::uint64_t offered = 0, accepted = 0, moves = 0;  // counted after the warm-up
  double moves_per_100 = 0;                            // moves for 100 accepted jobs
  std::uint64_t events = 0;                            // arrivals and departures played, warm-up included
  std::uint64_t arrived = 0, admitted = 0, departed = 0,
                present = 0;  // whole run: admitted = departed + present
  double fluid_jobs = 0;      // what load 1 would hold at once
  std::uint64_t undecided =
      0;  // repack: jobs taken because the exact test ran out of budget; 0 on the 8-slice grid
  std::vector<double> batches = {};  // the figure of each batch in turn, for a plot
  std::vector<KindFigures> kinds = {};
};

// Called about a hundred times a run with (done, total); false cancels (Errc::timeout).
using Progress = std::function<bool(std::uint64_t done, std::uint64_t total)>;

// All policies see the same arrivals and holding times for one seed, so that differences between them are
// paired. With several pools a job may go to any pool that offers its profile by name; ours compares the
// pools' best places by its own order, then by pool. Errors: a setup out of bounds or a mix that no pool
// offers (invalid), repack where two pools offer a profile of the mix (unsupported), cancelled (timeout).
Result<Outcome> simulate(const Setup& setup, const Progress& progress = {});

// The most jobs of this mix that the fleet can hold at once if jobs were divisible in time: the largest theta
// such that GPUs can spend their time in instance sets so that on average theta * share of each profile is
// present. A linear program over maximal instance sets, solved by simplex with the duality gap checked; exact
// to 1e-9.
struct Fluid {
  double jobs = 0;
  double slices = 0;  // the same in memory slices
  std::vector<double> price =
      {};  // dual: what a job of each share takes of the fleet, relative: the mix's mean is 1
  std::size_t columns = 0, pivots = 0;  // size of the program
};
Result<Fluid> fluid_capacity(std::span<const Pool> pools, const Mix& mix);

// The same loss system of a few equal GPUs with exponential holding times as a Markov decision process:
// states are the multisets of GPU states, GPU states with the same future collapsed. Solved for the long-run
// share of slices accepted.
struct Small {
  mig::Geometry geometry = {};
  unsigned gpus = 3;
  Mix mix = {};
  double load = 0.95;
  double tolerance = 1e-3;                 // in points: the width of the bounds around each figure
  std::uint64_t most_states = 20'000'000;  // refused with no_capacity beyond
  unsigned most_sweeps = 20'000;
};
// A figure with the bounds value iteration proves for it, in percent of offered slices.
struct Bounds {
  double low = 0, high = 0;
  double middle() const { return (low + high) / 2; }
};
struct SmallOutcome {
  Bounds percent = {};
  std::uint64_t states = 0;
  unsigned gpu_states = 0;  // of one GPU after collapsing
  unsigned sweeps = 0;
};
// The best any online policy without moves can do, if it must accept what fits (may_refuse false) or may also
// turn away a job that fits to keep room for a better one.
Result<SmallOutcome> solve(const Small& small, bool may_refuse, const Progress& progress = {});
// What a rule (not repack, no moves) does on the same chain, exactly. Where the rule's order ties GPU states
// that have a different future, ties are taken at their worst for it (`kindly` false) or at their best.
Result<SmallOutcome> evaluate(const Small& small, Rule rule, bool kindly = false,
                              const Progress& progress = {});

}  // namespace bulkhead::churn
