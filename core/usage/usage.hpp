// Who used what of a GPU (R41). An interval in which nothing changed hands is split among those who held the
// GPU, in integers, so that it adds up to the letter: slices' time to the GPU's, joules to the energy
// counter's.
//
// The rule for joules, as the bill states it:
//  1. dE is what the energy counter says passed. Of it, idle = min(dE, fitted idle watts x time); the rest is
//     dynamic.
//  2. Idle energy goes by units (slices, thousandths): who holds 3 of 7 slices pays 3/7 of it. What nobody
//     holds, and what is out of service, is the operator's, never a neighbour's.
//  3. Dynamic energy goes by weight: units x (a SM + b tensor + c DRAM activity), with a, b, c fitted for the
//     GPU model. Where activity could not be read, a holder counts as if its SMs were busy all the time;
//     where every weight is nothing, it goes by units; where nobody holds anything, to the operator.
//  4. The counter is read at times of its own. Where hands changed between two readings, the energy between
//     them goes to before and after by what the model says was drawn.
//  5. Millijoules that do not divide go by largest remainder, so that the sum is dE exactly.
// With two tenants on a GPU the split is a model; the sum is a measurement. `error_mj` says how far a split
// may be off: the dynamic energy times the fit's relative error; nothing when one holder had all of it.
// Source of the method: NVML's counter is exact to 100 ms, power readings miss three quarters of the time on
// A100 and H100 (arXiv 2312.02741), so watts are never integrated.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/ids.hpp"
#include "base/result.hpp"
#include "base/units.hpp"

namespace bulkhead::usage {

inline constexpr std::uint64_t most_us = 86'400ULL * 1'000'000;  // of one interval: a day
// What a GPU is divided in, so that sums over modes mean something: a compute slice of seven is 1000 units,
// one of four 1750, a thousandth of a shared GPU 7.
inline constexpr unsigned whole_gpu = 7000;
inline constexpr unsigned most_units = whole_gpu;
inline constexpr std::size_t most_holders = 1024;

// Parts of the holder's own slice that worked, 0..1, mean over the interval (GPM).
struct Activity {
  double sm = 0, tensor = 0, dram = 0;
};

struct Held {
  std::int64_t lease = 0;  // 0: held by the operator or by nobody we know (a foreign instance)
  std::string tenant = {};
  unsigned units = 0;
  Bytes memory = {};  // that it has, used or not
  std::optional<Activity> activity = {};
  bool guessed = false;  // the activity is the GPU's, shared out among its holders: counts as not read
  // Takes turns on the whole GPU: what others leave it may make its activity more than 1, up to all of the
  // GPU.
  bool turns = false;
};

struct Interval {
  Uuid gpu = {};
  std::uint64_t us = 0;                    // its length, 1..most_us
  unsigned units = whole_gpu;              // of the whole GPU
  unsigned out_of_service = 0;             // units: drained, lost, being reset
  std::optional<Millijoules> energy = {};  // what passed; empty: the counter began anew, or could not be read
  bool portioned = false;                  // `energy` is the model's part of a longer measured interval
  std::vector<Held> held = {};
};

// What one holder had and used. Sums of these are sums of every member.
struct Amounts {
  std::uint64_t unit_us = 0;                            // units x time
  std::uint64_t used_unit_us = 0;                       // of it with busy SMs; at most unit_us
  std::uint64_t mib_us = 0;                             // memory x time
  std::uint64_t sm_us = 0, tensor_us = 0, dram_us = 0;  // of the whole GPU's: half of 1/7 busy is 1/14
  std::uint64_t idle_mj = 0, dynamic_mj = 0, error_mj = 0;
  std::uint64_t blind_us = 0;      // time without a reading of the holder's own activity
  std::uint64_t unmetered_us = 0;  // time without a reading of energy
  friend bool operator==(const Amounts&, const Amounts&) = default;
};
Amounts operator+(const Amounts& a, const Amounts& b);

struct Split {
  std::vector<Amounts> holders = {};  // in the order of Interval::held
  Amounts unallocated = {};           // nobody's: the operator's account
  Amounts out_of_service = {};
};

// Watts of one GPU model: idle + sm x SM + tensor x tensor + dram x DRAM activity of the whole GPU.
struct PowerModel {
  double idle = 0, sm = 1, tensor = 0, dram = 0;  // W, none negative
  double error = 1;  // root mean square of what it missed, as a part of the mean dynamic power; 1: not fitted
};

// Errc::invalid: a length, units or activity out of bounds, or more held than there is; says which.
Result<Split> split(const Interval& interval, const PowerModel& model);
// A stretch between two readings of the counter, as the intervals of one GPU in which nothing changed hands:
// gives each its `energy`, by what the model says was drawn in it, so that the sum is exactly `energy`. With
// more than one they are `portioned`: what they say then has the model's error, also for one holder alone.
Status portion(std::span<Interval> intervals, Millijoules energy, const PowerModel& model);
// Whether a split adds up; an Error names what does not, and by how much. The accounts are checked with this
// before they are written.
Status adds_up(const Interval& interval, const Split& split);

// A reading of the energy counter, with what tells a counter that began anew from one that went on.
struct Counter {
  std::string boot_id = {};
  std::uint64_t driver_epoch = 0;  // counts loads of the driver, as far as we saw
  Millijoules value = {};
};
std::optional<Millijoules> passed(const Counter& before, const Counter& after);

struct Sample {  // of a whole GPU that one program had
  Activity activity = {};
  double watts = 0;  // from the counter over at least a second
};
// Least squares with no negative watts. At least 8 samples;
// Errc::invalid when they do not tell the terms apart at all.
Result<PowerModel> fit(std::span<const Sample> samples);

}  // namespace bulkhead::usage
