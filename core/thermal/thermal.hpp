// How hot a GPU will be: its temperature as the sum of a base and of what its power leaves in five heat
// stores with fixed time constants, the resistances fitted online (R40). A die on a heatsink is two such
// stores; which two differs by part and cooling, so five stand ready and the fit takes what it needs. Power
// is measured finely and temperature in whole degrees, so the noise is where least squares wants it: in what
// is predicted, not in what predicts. Pure: readings come with their time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>

namespace bulkhead::thermal {

inline constexpr std::size_t stores = 5;
inline constexpr std::array<double, stores> time_constants_s = {2, 8, 32, 128, 512};

struct Settings {
  double memory_s = 3600;     // readings count less with their age: 1/e after so long
  double horizon_s = 60;      // of the forecasts that are scored against what came
  double longest_gap_s = 30;  // between two readings; beyond it the stores are unknown and begin anew
};

struct Reading {
  double at_s = 0;  // monotonic
  double celsius = 0;
  double watts = 0;                  // mean since the reading before, from the energy counter
  std::optional<double> inlet = {};  // air or water that comes in, from the BMC; the base when it is there
};

struct Forecast {
  double celsius = 0;
  double error = 0;      // K: root mean square of the forecasts that were scored; 0: none yet
  bool trusted = false;  // enough was seen, and the model did better than "it stays as it is"
};

class Model {
 public:
  explicit Model(Settings settings = {}) : settings_(settings) {}

  // False: the reading is no reading (not finite, out of bounds, time does not rise) and counts for nothing.
  bool add(const Reading& reading);

  // `ahead_s` from the last reading, if the GPU draws `watts` from now on. What the model misses at this
  // moment (a neighbour's heat, the hall) is carried along: it changes slowly. nullopt: too little was seen
  // (less than a minute, or power that never moved).
  std::optional<Forecast> forecast(double ahead_s, double watts) const;
  // Kelvin a watt, all the way to what cools it: rises with dust, dry paste, a failed fan. nullopt as above.
  std::optional<double> resistance() const;

  // Forecasts over the horizon against what came: ours, and "it stays as it is". Root mean squares, K.
  struct Score {
    std::uint64_t count = 0;
    double ours = 0, persistence = 0;
  };
  Score score() const;

 private:
  using Row = std::array<double, stores + 1>;  // the base first
  void fit();
  Settings settings_;
  std::array<double, stores> heat_ = {};  // W, each store's smoothed power
  std::array<Row, stores + 1> normal_ = {};
  Row right_ = {};
  std::optional<Row> terms_ = {};
  std::optional<double> miss_ = {};  // K, smoothed: temperature is read in whole degrees
  std::optional<Reading> last_ = {};
  double seen_s_ = 0, fitted_at_s_ = 0;
  double least_watts_ = 0, most_watts_ = 0;
  // What was said, to be scored when its time has come. The power that came is known by then, so the stores
  // of a forecast go on with it: what is scored is the model, not the guess of the load.
  struct Said {
    double at_s = 0;
    Row terms = {};
    std::array<double, stores> heat = {};
    double miss = 0, celsius_then = 0;
  };
  std::deque<Said> said_ = {};
  std::uint64_t scored_ = 0;
  double ours_ = 0, persistence_ = 0;  // sums of squares
};

// Cooling that fails shows as a resistance that rises while the load stays what it was.
enum class Cooling { unknown, good, worse, failing };
Cooling judge(std::optional<double> reference, std::optional<double> now);
inline constexpr double worse_by = 1.15, failing_by = 1.4;  // times the reference

}  // namespace bulkhead::thermal
