#include "core/usage/usage.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include <fmt/format.h>

#include "core/nnls/nnls.hpp"

namespace bulkhead::usage {

namespace {

constexpr double ppm = 1e6;  // activity is kept in millionths: sums of integers do not drift

std::uint64_t millionths(double part) { return static_cast<std::uint64_t>(std::llround(part * ppm)); }

// `whole` in parts proportional to `weights`, whose sum is exactly `whole`: largest remainder, ties to the
// first. All weights nothing: all parts nothing, and `whole` is lost; callers see to it.
std::vector<std::uint64_t> in_proportion(std::uint64_t whole, const std::vector<std::uint64_t>& weights) {
  __extension__ using Wide = unsigned __int128;
  const Wide sum = std::accumulate(weights.begin(), weights.end(), Wide{0});
  std::vector<std::uint64_t> parts(weights.size(), 0);
  if (sum == 0) return parts;
  std::vector<Wide> rest(weights.size());
  std::uint64_t given = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const Wide exact = Wide{whole} * weights[i];
    parts[i] = static_cast<std::uint64_t>(exact / sum);
    rest[i] = exact % sum;
    given += parts[i];
  }
  std::vector<std::size_t> order(weights.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return rest[a] > rest[b]; });
  for (std::size_t i = 0; given < whole; ++i, ++given) ++parts[order[i]];
  return parts;
}

Status in_bounds(const Interval& interval) {
  const auto no = [](std::string what) { return Error(Errc::invalid, std::move(what)); };
  if (interval.us == 0 || interval.us > most_us)
    return no(fmt::format("an interval of {} us: 1 to {} can be split", interval.us, most_us));
  if (interval.units == 0 || interval.units > most_units)
    return no(fmt::format("a GPU of {} units: 1 to {} are known", interval.units, most_units));
  if (interval.held.size() > most_holders)
    return no(fmt::format("{} holders of one GPU: at most {}", interval.held.size(), most_holders));
  std::uint64_t held = interval.out_of_service;
  for (const auto& one : interval.held) {
    held += one.units;
    if (!one.activity) continue;
    const double most =
        one.turns && one.units > 0 ? std::max(1.0, static_cast<double>(interval.units) / one.units) : 1;
    for (const double part : {one.activity->sm, one.activity->tensor, one.activity->dram}) {
      if (!(part >= 0 && part <= most * (1 + 1e-9)))
        return no(fmt::format("lease {} has an activity of {}: 0 to {} is possible", one.lease, part, most));
    }
  }
  if (held > interval.units)
    return no(fmt::format("{} units of a GPU that has {} are held or out of service", held, interval.units));
  // A day's energy of any GPU is far below this; beyond it a driver lies.
  if (interval.energy && interval.energy->count > std::uint64_t{1} << 50U)
    return no(fmt::format("{} mJ in {} us cannot be", interval.energy->count, interval.us));
  return ok_status();
}

// Dynamic weight in integers: units x millionths of the model's full dynamic watts.
std::uint64_t weight_of(const Held& held, const PowerModel& model) {
  const double full = model.sm + model.tensor + model.dram;
  if (full <= 0) return held.units;
  const Activity activity = held.activity.value_or(Activity{.sm = 1});
  const double watts = model.sm * activity.sm + model.tensor * activity.tensor + model.dram * activity.dram;
  return held.units * millionths(std::clamp(watts / full, 0.0, held.turns ? most_units * 1.0 : 1.0));
}

}  // namespace

Amounts operator+(const Amounts& a, const Amounts& b) {
  return {.unit_us = a.unit_us + b.unit_us,
          .used_unit_us = a.used_unit_us + b.used_unit_us,
          .mib_us = a.mib_us + b.mib_us,
          .sm_us = a.sm_us + b.sm_us,
          .tensor_us = a.tensor_us + b.tensor_us,
          .dram_us = a.dram_us + b.dram_us,
          .idle_mj = a.idle_mj + b.idle_mj,
          .dynamic_mj = a.dynamic_mj + b.dynamic_mj,
          .error_mj = a.error_mj + b.error_mj,
          .blind_us = a.blind_us + b.blind_us,
          .unmetered_us = a.unmetered_us + b.unmetered_us};
}

Result<Split> split(const Interval& interval, const PowerModel& model) {
  BH_CHECK(in_bounds(interval));
  const std::size_t n = interval.held.size();
  const std::uint64_t us = interval.us;
  Split out;
  out.holders.resize(n);
  unsigned free = interval.units - interval.out_of_service;
  std::vector<std::uint64_t> units, weights;
  for (std::size_t i = 0; i < n; ++i) {
    const Held& held = interval.held[i];
    Amounts& amounts = out.holders[i];
    free -= held.units;
    amounts.unit_us = held.units * us;
    amounts.mib_us = to_mebibytes(held.memory) * us;
    if (held.activity) {
      const auto busy = [&](double part) {
        return held.units * us / interval.units * millionths(part) / static_cast<std::uint64_t>(ppm);
      };
      amounts.used_unit_us = std::min(
          amounts.unit_us,
          held.units * (us * millionths(std::min(1.0, held.activity->sm)) / static_cast<std::uint64_t>(ppm)));
      amounts.sm_us = busy(held.activity->sm);
      amounts.tensor_us = busy(held.activity->tensor);
      amounts.dram_us = busy(held.activity->dram);
    }
    if (!held.activity || held.guessed) amounts.blind_us = us;
    units.push_back(held.units);
    weights.push_back(weight_of(held, model));
  }
  out.unallocated.unit_us = free * us;
  out.out_of_service.unit_us = interval.out_of_service * us;

  if (!interval.energy) {
    for (auto& amounts : out.holders) amounts.unmetered_us = us;
    out.unallocated.unmetered_us = us;
    return out;
  }
  const std::uint64_t energy = interval.energy->count;
  // W x us = uJ.
  const double idle_mj = std::max(0.0, model.idle) * static_cast<double>(us) / 1000.0;
  const std::uint64_t idle =
      idle_mj >= static_cast<double>(energy) ? energy : static_cast<std::uint64_t>(idle_mj);
  const std::uint64_t dynamic = energy - idle;

  auto by_units = units;
  by_units.push_back(free);
  by_units.push_back(interval.out_of_service);
  const auto idle_parts = in_proportion(idle, by_units);
  const bool nothing_worked = std::all_of(weights.begin(), weights.end(), [](auto w) { return w == 0; });
  if (nothing_worked) weights = units;
  weights.push_back(std::all_of(weights.begin(), weights.end(), [](auto w) { return w == 0; }) ? 1 : 0);
  const auto dynamic_parts = in_proportion(dynamic, weights);
  for (std::size_t i = 0; i < n; ++i) {
    Amounts& amounts = out.holders[i];
    amounts.idle_mj = idle_parts[i];
    amounts.dynamic_mj = dynamic_parts[i];
    // All of it went to one: nothing was modelled.
    if (dynamic_parts[i] != dynamic || interval.portioned)
      amounts.error_mj = static_cast<std::uint64_t>(
          std::ceil(static_cast<double>(dynamic_parts[i]) * std::clamp(model.error, 0.0, 1.0)));
  }
  out.unallocated.idle_mj = idle_parts[n];
  out.out_of_service.idle_mj = idle_parts[n + 1];
  out.unallocated.dynamic_mj = dynamic_parts[n];
  return out;
}

Status portion(std::span<Interval> intervals, Millijoules energy, const PowerModel& model) {
  std::vector<std::uint64_t> weights, lengths;
  for (const auto& one : intervals) {
    BH_CHECK(in_bounds(one));
    double watts = std::max(0.0, model.idle);
    for (const auto& held : one.held) {
      const Activity activity = held.activity.value_or(Activity{.sm = 1});
      watts += static_cast<double>(held.units) / one.units *
               (model.sm * activity.sm + model.tensor * activity.tensor + model.dram * activity.dram);
    }
    // In mW x us: beyond 100 kW no model is believed, so that a day fits.
    weights.push_back(static_cast<std::uint64_t>(std::clamp(watts, 0.0, 1e5) * 1000) * one.us);
    lengths.push_back(one.us);
  }
  const bool flat = std::all_of(weights.begin(), weights.end(), [](auto w) { return w == 0; });
  const auto parts = in_proportion(energy.count, flat ? lengths : weights);
  for (std::size_t i = 0; i < intervals.size(); ++i) {
    intervals[i].energy = Millijoules(parts[i]);
    intervals[i].portioned = intervals.size() > 1;
  }
  return ok_status();
}

Status adds_up(const Interval& interval, const Split& split) {
  const auto no = [&](std::string_view what, std::uint64_t sum, std::uint64_t due) {
    return Error(Errc::corrupt, fmt::format("the accounts of {} do not add up: {} is {}, it must be {}",
                                            interval.gpu.text, what, sum, due));
  };
  if (split.holders.size() != interval.held.size())
    return no("the number of holders", split.holders.size(), interval.held.size());
  Amounts sum = split.unallocated + split.out_of_service;
  for (std::size_t i = 0; i < split.holders.size(); ++i) {
    const Amounts& amounts = split.holders[i];
    if (amounts.unit_us != interval.held[i].units * interval.us)
      return no("the time of a holder", amounts.unit_us, interval.held[i].units * interval.us);
    if (amounts.used_unit_us > amounts.unit_us)
      return no("the used time of a holder", amounts.used_unit_us, amounts.unit_us);
    sum = sum + amounts;
  }
  if (sum.unit_us != interval.units * interval.us)
    return no("slice time in all", sum.unit_us, interval.units * interval.us);
  if (interval.energy && sum.idle_mj + sum.dynamic_mj != interval.energy->count)
    return no("energy in all (mJ)", sum.idle_mj + sum.dynamic_mj, interval.energy->count);
  if (!interval.energy && sum.idle_mj + sum.dynamic_mj != 0)
    return no("energy that was not measured (mJ)", sum.idle_mj + sum.dynamic_mj, 0);
  return ok_status();
}

std::optional<Millijoules> passed(const Counter& before, const Counter& after) {
  if (before.boot_id != after.boot_id || before.driver_epoch != after.driver_epoch) return std::nullopt;
  if (after.value < before.value) return std::nullopt;  // a reset of the GPU that nobody told us of
  return after.value - before.value;
}

Result<PowerModel> fit(std::span<const Sample> samples) {
  constexpr std::size_t terms = 4;
  using Row = std::array<double, terms>;
  if (samples.size() < 8)
    return Error(Errc::invalid,
                 fmt::format("{} samples of power: at least 8 tell the terms apart", samples.size()));
  std::array<Row, terms> normal{};
  Row right{};
  double watts = 0;
  const auto row_of = [](const Sample& s) {
    return Row{1, s.activity.sm, s.activity.tensor, s.activity.dram};
  };
  for (const auto& sample : samples) {
    const Row row = row_of(sample);
    const bool sane = std::isfinite(sample.watts) && sample.watts >= 0 &&
                      std::all_of(row.begin(), row.end(), [](double v) { return v >= 0 && v <= 1; });
    if (!sane)
      return Error(Errc::invalid, "a sample of power is out of bounds: activities are 0..1, watts >= 0");
    for (std::size_t i = 0; i < terms; ++i) {
      for (std::size_t j = 0; j < terms; ++j) normal[i][j] += row[i] * row[j];
      right[i] += row[i] * sample.watts;
    }
    watts += sample.watts;
  }
  const auto count = static_cast<double>(samples.size());

  const auto best = nnls::solve(normal, right, 1e-9 * count);
  if (!best || (*best)[1] + (*best)[2] + (*best)[3] <= 0) {
    return Error(Errc::invalid, "power did not move with activity in these samples: nothing can be fitted",
                 "take samples of an idle GPU and of programs that load SMs, tensor cores and memory");
  }
  PowerModel model{.idle = (*best)[0], .sm = (*best)[1], .tensor = (*best)[2], .dram = (*best)[3]};
  double missed = 0;
  for (const auto& sample : samples) {
    const Row row = row_of(sample);
    const double off = std::inner_product(row.begin(), row.end(), best->begin(), -sample.watts);
    missed += off * off;
  }
  const double dynamic = watts / count - model.idle;
  model.error = dynamic > 0 ? std::min(1.0, std::sqrt(missed / count) / dynamic) : 1.0;
  return model;
}

}  // namespace bulkhead::usage
