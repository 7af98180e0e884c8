#include "core/thermal/thermal.hpp"

#include <algorithm>
#include <cmath>

#include "core/nnls/nnls.hpp"

namespace bulkhead::thermal {

namespace {

constexpr double coldest = -50, hottest = 200, most_watts = 5000;
constexpr double least_seen_s = 60;
constexpr double least_swing_w = 20;  // power that never moved tells nothing of resistance
constexpr double fit_every_s = 5;
constexpr std::size_t most_said = 64;
constexpr std::uint64_t least_scored = 10;

// What is believed before anything was seen, K/W, and how many seconds of readings at 100 W it is worth:
// enough to choose among stores that the load so far cannot tell apart, too little to hold against readings
// that can.
constexpr std::array<double, stores> usual = {0.008, 0.008, 0.012, 0.008, 0.004};
constexpr double belief = 2 * 100 * 100;

constexpr double miss_time_constant_s = 10;

double explained(const std::array<double, stores + 1>& terms, const std::array<double, stores>& heat) {
  double sum = terms[0];
  for (std::size_t i = 0; i < stores; ++i) sum += terms[i + 1] * heat[i];
  return sum;
}

// A store after `dt` seconds at constant power.
double after(double heat, double watts, double dt, double time_constant) {
  return watts + (heat - watts) * std::exp(-dt / time_constant);
}

}  // namespace

bool Model::add(const Reading& reading) {
  const bool sane = std::isfinite(reading.at_s) && reading.celsius >= coldest && reading.celsius <= hottest &&
                    reading.watts >= 0 && reading.watts <= most_watts &&
                    (!reading.inlet || (*reading.inlet >= coldest && *reading.inlet <= hottest));
  if (!sane || (last_ && reading.at_s <= last_->at_s)) return false;
  const bool anew = !last_ || reading.at_s - last_->at_s > settings_.longest_gap_s ||
                    reading.inlet.has_value() != last_->inlet.has_value();
  if (anew) {
    // Nobody knows how long it drew this; the slow stores are off until they forget.
    heat_.fill(reading.watts);
    said_.clear();
    if (!last_ || reading.inlet.has_value() != last_->inlet.has_value()) {
      normal_ = {};
      right_ = {};
      terms_.reset();
      miss_.reset();
      seen_s_ = 0;
      least_watts_ = most_watts_ = reading.watts;
    }
    last_ = reading;
    return true;
  }
  const double dt = reading.at_s - last_->at_s;
  for (std::size_t i = 0; i < stores; ++i) heat_[i] = after(heat_[i], reading.watts, dt, time_constants_s[i]);
  for (auto& said : said_) {
    for (std::size_t i = 0; i < stores; ++i)
      said.heat[i] = after(said.heat[i], reading.watts, dt, time_constants_s[i]);
  }
  const double base = reading.inlet.value_or(0);
  Row row;
  row[0] = 1;
  std::copy(heat_.begin(), heat_.end(), row.begin() + 1);
  const double fade = std::exp(-dt / settings_.memory_s);
  for (std::size_t i = 0; i < row.size(); ++i) {
    for (std::size_t j = 0; j < row.size(); ++j) normal_[i][j] = normal_[i][j] * fade + dt * row[i] * row[j];
    right_[i] = right_[i] * fade + dt * row[i] * (reading.celsius - base);
  }
  seen_s_ += dt;
  least_watts_ = std::min(least_watts_, reading.watts);
  most_watts_ = std::max(most_watts_, reading.watts);
  last_ = reading;

  while (!said_.empty() && reading.at_s >= said_.front().at_s + settings_.horizon_s) {
    const Said& said = said_.front();
    const double celsius = base + said.miss + explained(said.terms, said.heat);
    ours_ += (celsius - reading.celsius) * (celsius - reading.celsius);
    persistence_ += (said.celsius_then - reading.celsius) * (said.celsius_then - reading.celsius);
    ++scored_;
    said_.pop_front();
  }
  if (reading.at_s - fitted_at_s_ >= fit_every_s || !terms_) {
    fitted_at_s_ = reading.at_s;
    fit();
  }
  if (terms_) {
    const double miss = reading.celsius - base - explained(*terms_, heat_);
    miss_ = miss_ ? after(*miss_, miss, dt, miss_time_constant_s) : miss;
  }
  if (terms_ && said_.size() < most_said &&
      (said_.empty() || reading.at_s - said_.back().at_s >= settings_.horizon_s / most_said))
    said_.push_back({.at_s = reading.at_s,
                     .terms = *terms_,
                     .heat = heat_,
                     .miss = *miss_,
                     .celsius_then = reading.celsius});
  return true;
}

void Model::fit() {
  if (seen_s_ < least_seen_s || most_watts_ - least_watts_ < least_swing_w) return;
  auto a = normal_;
  auto b = right_;
  for (std::size_t i = 0; i < stores; ++i) {
    a[i + 1][i + 1] += belief;
    b[i + 1] += belief * usual[i];
  }
  if (const auto found = nnls::solve(a, b, 1e-9, 1U)) terms_ = *found;
}

std::optional<Forecast> Model::forecast(double ahead_s, double watts) const {
  if (!terms_ || !last_ || !(ahead_s >= 0) || !(watts >= 0)) return std::nullopt;
  auto heat = heat_;
  for (std::size_t i = 0; i < stores; ++i) heat[i] = after(heat[i], watts, ahead_s, time_constants_s[i]);
  const Score so_far = score();
  return Forecast{.celsius = last_->inlet.value_or(0) + *miss_ + explained(*terms_, heat),
                  .error = so_far.ours,
                  .trusted = so_far.count >= least_scored && so_far.ours < so_far.persistence};
}

std::optional<double> Model::resistance() const {
  if (!terms_) return std::nullopt;
  double sum = 0;
  for (std::size_t i = 0; i < stores; ++i) sum += (*terms_)[i + 1];
  return sum;
}

Model::Score Model::score() const {
  if (scored_ == 0) return {};
  const auto count = static_cast<double>(scored_);
  return {.count = scored_, .ours = std::sqrt(ours_ / count), .persistence = std::sqrt(persistence_ / count)};
}

Cooling judge(std::optional<double> reference, std::optional<double> now) {
  if (!reference || !now || *reference <= 0) return Cooling::unknown;
  const double ratio = *now / *reference;
  return ratio >= failing_by ? Cooling::failing : ratio >= worse_by ? Cooling::worse : Cooling::good;
}

}  // namespace bulkhead::thermal
