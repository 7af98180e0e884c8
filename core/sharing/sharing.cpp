#include "core/sharing/sharing.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include <fmt/format.h>

namespace bulkhead::sharing {

namespace {

constexpr std::array<std::pair<Class, std::string_view>, 3> classes{
    {{Class::interactive, "interactive"}, {Class::batch, "batch"}, {Class::background, "background"}}};

// Lengths in microseconds. Measured on an H100 (docs/design/sharing.md); longer slices than 100 ms were never
// tried.
constexpr double interactive_slice = 100'000, best_effort_slice = 50, longest_slice = 100'000;
constexpr double longest_round_of_slices = 400'000, longest_round_of_turns = 2'000'000;
constexpr double default_latency = 10'000;  // what interactive tenants grant each other
constexpr double mean_turn = 250'000;       // a handover touches 1.1 ms: under half a percent of requests
constexpr double duty_period = 50'000, duty_period_in_round = 1'000'000, longest_duty_period = 1'000'000;
constexpr double refuse_beyond = 0.002;  // error of a share, of the whole GPU

// A self-test on a loaded host may measure nonsense; the policy stays inside what was thought through.
struct Tools {
  double change, off, on, both;  // us: a switch between slices, a group off, on, off and on
  double slip;                   // how much longer than told a group can stay on
  double least_slice, wanted_slice, mean_slice, least_turn;
  bool slices, pauses;
};
Tools tools_of(const Costs& costs) {
  const auto within = [](std::uint64_t value, std::uint64_t least, std::uint64_t most) {
    return static_cast<double>(std::clamp(value, least, most));
  };
  Tools t{};
  t.change = within(costs.switch_us, 20, 2000);
  t.off = within(costs.off_us, 50, 2000);
  t.on = within(costs.on_us, 50, 2000);
  t.both = t.off + t.on;
  t.slip = std::max(0.0, t.off - t.on);
  t.least_slice = std::max(1000.0, 5 * t.change);
  t.wanted_slice = 2 * t.least_slice;
  t.mean_slice = 50 * t.change;  // loss 1 / 51
  t.least_turn = 8 * t.both;
  t.slices = costs.slices_obeyed;
  t.pauses = costs.pauses_obeyed;
  return t;
}

template <class Number>
double as_double(Number value) {
  return static_cast<double>(value);
}
std::uint64_t whole(double us) { return us <= 0 ? 0 : static_cast<std::uint64_t>(us); }
double ms(double us) { return us / 1000; }
double ms(std::uint64_t us) { return as_double(us) / 1000; }

// A tenant that takes part, with what the policy thinks of it.
struct Seat {
  std::size_t index;  // into tenants and lines
  const Tenant* tenant;
  double weight;   // counted: background ones a twentieth
  double ceiling;  // part of the GPU's time; 1: none
  double entitled = 0;
  bool demoted = false;
};
using Seats = std::vector<Seat>;

double counted_weight(const Tenant& tenant) {
  const unsigned weight = std::clamp(tenant.weight, min_weight, max_weight);
  return as_double(weight) * (tenant.cls == Class::background ? 1.0 : background_part);
}

double sum_of(std::span<const double> values) { return std::accumulate(values.begin(), values.end(), 0.0); }

// Parts proportional to weights, none above its cap; what a cap leaves goes to the others by weight.
std::vector<double> fill(std::span<const double> weights, std::span<const double> caps) {
  std::vector<double> parts(weights.size(), 0);
  std::vector<bool> full(weights.size(), false);
  for (bool changed = true; changed;) {
    changed = false;
    double rest = 1, weight = 0;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (full[i]) {
        rest -= caps[i];
      } else {
        weight += weights[i];
      }
    }
    rest = std::max(rest, 0.0);
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (full[i]) continue;
      parts[i] = rest * weights[i] / weight;
      if (caps[i] < 1 && parts[i] >= caps[i]) {
        parts[i] = caps[i];
        full[i] = changed = true;
      }
    }
  }
  return parts;
}

// Lengths proportional to weights: as short as the mean and the wanted least allow, inside what is bounded.
// Every bound enters as a factor of the weights, so that more weight never makes a smaller part.
struct Bounds {
  double mean, wanted, least, most, sum;
};
std::vector<std::uint64_t> lengths(std::span<const double> weights, const Bounds& bounds) {
  const double all = sum_of(weights);
  const auto [small, large] = std::minmax_element(weights.begin(), weights.end());
  const double count = as_double(weights.size());
  double factor = std::min(std::max(bounds.mean * count / all, bounds.wanted / *small), bounds.most / *large);
  // What is raised to the least comes out of the others', so that the sum holds.
  for (bool lower = true; lower;) {
    std::size_t raised = 0;
    double rest = 0;
    for (const double weight : weights) {
      if (factor * weight < bounds.least) {
        ++raised;
      } else {
        rest += weight;
      }
    }
    const double most = rest > 0 ? (bounds.sum - bounds.least * as_double(raised)) / rest : factor;
    lower = most < factor;
    factor = std::min(factor, most);
  }
  std::vector<std::uint64_t> out;
  for (const double weight : weights) {
    out.push_back(whole(std::round(std::clamp(factor * weight, bounds.least, bounds.most))));
  }
  return out;
}

std::string cap_words(const Seat& seat) {
  return seat.ceiling < 1 ? fmt::format("; never above {:.0f} % of the GPU's time", 100 * seat.ceiling)
                          : std::string{};
}
std::string rank_words(const Seat& seat) {
  if (seat.demoted) {
    return fmt::format(
        "interactive, but busy {:.0f} % of the time where its weight gives {:.0f} %: shares by weight "
        "until it is below {:.0f} %; ",
        100 * seat.tenant->busy.value_or(0), 100 * seat.entitled, 100 * busy_part * seat.entitled);
  }
  return fmt::format("{}, weight {}{}: ", name_of(seat.tenant->cls),
                     std::clamp(seat.tenant->weight, min_weight, max_weight),
                     seat.tenant->cls == Class::background ? " counted a twentieth" : "");
}

// Where the lengths had to leave the weights: says whose least was raised, and which weight would do.
void refuse_raised(const Seats& seats, std::span<const double> weights, std::span<const std::uint64_t> given,
                   std::uint64_t least, std::string_view tool, Plan& plan) {
  const double all = sum_of(weights);
  double total = 0, worst = 0;
  for (const auto length : given) total += as_double(length);
  for (std::size_t i = 0; i < given.size(); ++i) {
    worst = std::max(worst, std::abs(as_double(given[i]) / total - weights[i] / all));
  }
  if (worst <= refuse_beyond) return;
  const std::size_t top =
      static_cast<std::size_t>(std::max_element(weights.begin(), weights.end()) - weights.begin());
  for (std::size_t i = 0; i < given.size(); ++i) {
    if (given[i] > least) continue;
    const double part = as_double(given[i]) / total;
    const double counts = seats[i].tenant->cls == Class::background ? 1.0 : background_part;
    // The weight that stands to the heaviest as the least length stands to the heaviest's.
    const double enough = std::ceil(weights[top] * as_double(least) / as_double(given[top]) / counts);
    plan.refused.push_back(
        fmt::format("tenant {}: weight {} asks for {:.2f} % of the GPU's time, and beside these tenants {} "
                    "give no less than {:.2f} %: "
                    "{}",
                    seats[i].tenant->id, seats[i].tenant->weight, 100 * weights[i] / all, tool, 100 * part,
                    enough <= max_weight && enough > seats[i].tenant->weight
                        ? fmt::format("raise its weight to {:.0f}, or lower the heaviest", enough)
                        : "lower the heaviest weights, or run fewer tenants at once"));
  }
}

// A ceiling for a group that is not in turns: on for part of each period.
void set_duty(const Seat& seat, double period, const Tools& tools, double& start, Line& line) {
  const double wanted = std::max({period, 20 * tools.both, (tools.slip + 2 * tools.both) / seat.ceiling});
  line.duty_period_us = whole(std::min(wanted, longest_duty_period));
  line.duty_on_us = whole(seat.ceiling * as_double(line.duty_period_us) - tools.slip);
  line.offset_us = whole((start - std::floor(start)) * as_double(line.duty_period_us)) % line.duty_period_us;
  start += seat.ceiling;
}

double duty_part(const Line& line) {
  return line.duty_period_us == 0 ? 1 : as_double(line.duty_on_us) / as_double(line.duty_period_us);
}

// What busy tenants with these slices receive when some are on for a window of each period only. Windows
// start at `offset`; between two of their edges the slices share what is on.
class Windows {
 public:
  Windows(const Seats& seats, const Plan& plan) : count_(seats.size()) {
    std::vector<double> edges{0, 1};
    std::vector<std::pair<double, double>> windows;
    for (const Seat& seat : seats) {
      const Line& line = plan.lines[seat.index];
      const double from =
          line.duty_period_us == 0 ? 0 : as_double(line.offset_us) / as_double(line.duty_period_us);
      windows.emplace_back(from, duty_part(line));
      edges.push_back(from);
      edges.push_back(from + windows.back().second - (from + windows.back().second >= 1 ? 1 : 0));
    }
    std::sort(edges.begin(), edges.end());
    for (std::size_t e = 0; e + 1 < edges.size(); ++e) {
      const double length = edges[e + 1] - edges[e], middle = (edges[e] + edges[e + 1]) / 2;
      if (length <= 0) continue;
      std::vector<std::size_t> on;
      for (std::size_t i = 0; i < windows.size(); ++i) {
        const double since = middle - windows[i].first + (middle < windows[i].first ? 1 : 0);
        if (since < windows[i].second) on.push_back(i);
      }
      if (!on.empty()) stretches_.emplace_back(length, std::move(on));
    }
  }
  std::vector<double> received(std::span<const double> slices) const {
    std::vector<double> got(count_, 0);
    for (const auto& [length, on] : stretches_) {
      double all = 0;
      for (const auto i : on) all += slices[i];
      for (const auto i : on) got[i] += length * slices[i] / all;
    }
    return got;
  }

 private:
  std::size_t count_;
  std::vector<std::pair<double, std::vector<std::size_t>>> stretches_;
};

// Slices for tenants that are off for part of the time: a tenant that may be on for a fifth of the time and
// is owed a tenth needs half of the GPU while it is on. Found by repeated correction; what a window cannot
// give stays short of it.
std::vector<double> slices_for(const Windows& windows, std::span<const double> owed,
                               std::span<const double> parts, std::span<const double> weights) {
  constexpr double most_of_others =
      9;  // nine tenths of a window, not all of it: the others' round goes on beneath
  std::vector<double> slices(weights.begin(), weights.end());
  double free_weight = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) free_weight += parts[i] == 1 ? weights[i] : 0;
  const double base = free_weight > 0 ? free_weight : sum_of(weights);
  for (std::size_t i = 0; i < weights.size(); ++i)
    slices[i] = std::min(weights[i] / parts[i], most_of_others * base);
  for (int turn = 0; turn < 24; ++turn) {
    const auto got = windows.received(slices);
    double free_now = 0;
    for (std::size_t i = 0; i < slices.size(); ++i) {
      if (got[i] > 0) slices[i] *= std::clamp(owed[i] / got[i], 0.5, 2.0);
      if (parts[i] == 1) free_now += slices[i];
    }
    const double back = free_weight > 0 ? free_weight / free_now : base / sum_of(slices);
    for (auto& slice : slices) slice = std::min(slice * back, most_of_others * base);
  }
  return slices;
}

// Part of a window that a tenant receives which must first wait for its place in the others' round: a window
// shorter than that round may pass by. Averaged over where in the round the window opens.
double part_of_window(double window, double slice, double others) {
  // Shorter than the round: reached only if the place comes up in time, and then with half of the window
  // left.
  if (window < others) return window / (2 * others) * std::min(1.0, slice / window);
  constexpr int places = 16;
  double got = 0;
  for (int place = 0; place < places; ++place) {
    const double left = std::max(0.0, window - others * (place + 0.5) / places);
    const double rounds = std::floor(left / (slice + others));
    got += rounds * slice + std::min(slice, left - rounds * (slice + others));
  }
  return got / places / window;
}

// Busy tenants share by the hardware's round of slices.
void share_by_slices(const Seats& seats, const Tools& tools, double& start, Plan& plan) {
  std::vector<double> weights, caps;
  bool ceilings = false;
  for (const Seat& seat : seats) {
    weights.push_back(seat.weight);
    caps.push_back(seat.ceiling);
    if (seat.ceiling == 1) continue;
    ceilings = true;
    set_duty(seat, seats.size() == 1 ? duty_period : duty_period_in_round, tools, start,
             plan.lines[seat.index]);
  }
  if (seats.size() == 1) {
    Line& line = plan.lines[seats[0].index];
    line.alone = true;
    line.expected = duty_part(line);
    line.why = fmt::format("{}alone on the GPU{}", rank_words(seats[0]), cap_words(seats[0]));
    return;
  }
  const Bounds bounds{tools.mean_slice, tools.wanted_slice, tools.least_slice, longest_slice,
                      longest_round_of_slices};
  std::vector<std::uint64_t> given;
  std::vector<double> expected;
  if (!ceilings) {
    given = lengths(weights, bounds);
    const double round = as_double(std::accumulate(given.begin(), given.end(), std::uint64_t{0}));
    for (const auto slice : given) expected.push_back(as_double(slice) / round);
    refuse_raised(seats, weights, given, whole(tools.least_slice),
                  fmt::format("slices of {:.0f} to {:.0f} ms", ms(tools.least_slice), ms(longest_slice)),
                  plan);
  } else {
    std::vector<double> parts;
    for (std::size_t i = 0; i < seats.size(); ++i) {
      parts.push_back(duty_part(plan.lines[seats[i].index]));
      caps[i] = std::min(caps[i], parts[i]);
    }
    const Windows windows(seats, plan);
    const auto wanted = slices_for(windows, fill(weights, caps), parts, weights);
    // A capped tenant's long slice makes the round long and the others' slices short: these are what is lost
    // in switching while it is off.
    Bounds longer = bounds;
    longer.wanted = tools.mean_slice / 2;
    // But a round much longer than a capped tenant's window would pass it by, unless the weights need it so
    // long.
    double window = longest_round_of_slices;
    for (const Seat& seat : seats) {
      const Line& line = plan.lines[seat.index];
      if (line.duty_period_us > 0) window = std::min(window, as_double(line.duty_on_us));
    }
    longer.sum = std::min(bounds.sum, std::max({2 * window, tools.mean_slice / 2 * as_double(seats.size()),
                                                tools.least_slice * sum_of(wanted) /
                                                    *std::min_element(wanted.begin(), wanted.end())}));
    given = lengths(wanted, longer);
    expected = windows.received(std::vector<double>(given.begin(), given.end()));
    for (std::size_t i = 0; i < seats.size(); ++i) {
      if (parts[i] == 1) continue;
      double others = 0;
      for (std::size_t j = 0; j < seats.size(); ++j) others += j == i ? 0 : parts[j] * as_double(given[j]);
      const double open = as_double(plan.lines[seats[i].index].duty_on_us);
      expected[i] = std::min(expected[i], parts[i] * part_of_window(open, as_double(given[i]), others));
    }
  }
  const std::uint64_t round = std::accumulate(given.begin(), given.end(), std::uint64_t{0});
  for (std::size_t i = 0; i < seats.size(); ++i) {
    Line& line = plan.lines[seats[i].index];
    line.slice_us = given[i];
    line.expected = expected[i];
    line.why = fmt::format("{}{:.1f} ms of each round of {:.1f} ms{}{}", rank_words(seats[i]), ms(given[i]),
                           ms(round), cap_words(seats[i]),
                           seats[i].ceiling < 1
                               ? fmt::format(", about {:.1f} % when all are busy", 100 * expected[i])
                               : std::string{});
  }
}

// One after another, the others disabled. `part`: of the GPU's time that the turns have to themselves.
void take_turns(const Seats& seats, double mean, const Tools& tools, double part, Plan& plan) {
  std::vector<bool> idle;
  for (const Seat& seat : seats) idle.push_back(seat.tenant->busy && *seat.tenant->busy < idle_below);
  if (std::all_of(idle.begin(), idle.end(), [](bool i) { return i; })) idle.assign(idle.size(), false);

  std::vector<double> busy_weights, caps;
  Seats busy_seats;
  bool ceilings = false;
  for (std::size_t i = 0; i < seats.size(); ++i) {
    caps.push_back(seats[i].ceiling);
    ceilings = ceilings || seats[i].ceiling < 1;
    if (idle[i]) continue;
    busy_weights.push_back(seats[i].weight);
    busy_seats.push_back(seats[i]);
  }
  const double idlers = as_double(seats.size() - busy_seats.size());
  const double least = tools.least_turn;
  const double limit = std::max((longest_round_of_turns - idlers * least) / (1 + idle_turn * idlers),
                                least * as_double(busy_seats.size()));
  const auto busy = lengths(busy_weights, {mean, 2 * least, least, limit, limit});
  if (!ceilings) {
    refuse_raised(busy_seats, busy_weights, busy, whole(least),
                  fmt::format("turns of {:.1f} ms or more within {:.1f} s", ms(least),
                              ms(longest_round_of_turns) / 1000),
                  plan);
  }
  const double busy_round = as_double(std::accumulate(busy.begin(), busy.end(), std::uint64_t{0}));
  std::vector<double> turns;
  for (std::size_t i = 0, b = 0; i < seats.size(); ++i) {
    if (!idle[i]) {
      turns.push_back(as_double(busy[b++]));
      continue;
    }
    // No more than its weight gives it, and always enough to be noticed.
    const double by_weight = busy_round * seats[i].weight / sum_of(busy_weights);
    turns.push_back(std::max(least, std::min(idle_turn * busy_round, std::floor(by_weight))));
  }
  double round = sum_of(turns);
  if (ceilings) {
    double needed = round;
    for (const Seat& seat : seats) {
      if (seat.ceiling < 1) needed = std::max(needed, (least + tools.slip) / seat.ceiling);
    }
    const double larger = std::max(round, std::min(needed, longest_round_of_turns));
    const auto parts = fill(turns, caps);
    for (std::size_t i = 0; i < turns.size(); ++i) {
      const double most = caps[i] < 1 ? caps[i] * larger - tools.slip : larger;
      turns[i] = std::floor(std::min(most, std::max(least, parts[i] * larger)));
    }
    round = std::max(larger, sum_of(turns));
  }
  plan.round_us = whole(std::ceil(round));
  std::uint64_t start = 0;
  for (std::size_t i = 0; i < seats.size(); ++i) {
    Line& line = plan.lines[seats[i].index];
    line.in_turns = true;
    line.turn_us = whole(turns[i]);
    line.offset_us = start;
    start += line.turn_us;
    // An idle tenant's share when all are busy is what its weight gives, a plan later.
    if (idlers == 0) line.expected = part * turns[i] / as_double(plan.round_us);
    line.why =
        fmt::format("{}{:.0f} ms of every {:.0f} ms{}{}", rank_words(seats[i]), turns[i] / 1000,
                    ms(plan.round_us), idle[i] ? ", little because it is idle" : "", cap_words(seats[i]));
  }
}

void check_asked(const Tenant& tenant, Plan& plan) {
  if (tenant.weight < min_weight || tenant.weight > max_weight) {
    plan.refused.push_back(fmt::format("tenant {}: weight {} asked, {} to {} are possible: taken as {}",
                                       tenant.id, tenant.weight, min_weight, max_weight,
                                       std::clamp(tenant.weight, min_weight, max_weight)));
  }
  if (tenant.ceiling && (*tenant.ceiling < 1 || *tenant.ceiling > 99)) {
    plan.refused.push_back(fmt::format(
        "tenant {}: a ceiling of {} % asked, 1 to 99 are possible: taken as {}; leave it out for none",
        tenant.id, *tenant.ceiling, *tenant.ceiling < 1 ? "1 %" : "none"));
  }
}

void check_latency(const Tenant& tenant, std::uint64_t wait, std::string_view why, Plan& plan) {
  plan.longest_wait_us = std::max(plan.longest_wait_us, wait);
  if (!tenant.latency_us || *tenant.latency_us >= wait) return;
  plan.refused.push_back(
      fmt::format("tenant {}: asked to wait at most {} us for others, {} us is possible {}: ask for that "
                  "much, or run fewer tenants",
                  tenant.id, *tenant.latency_us, wait, why));
}

}  // namespace

std::string_view name_of(Class c) {
  for (const auto& [cls, name] : classes) {
    if (cls == c) return name;
  }
  return "batch";
}

Result<Class> parse_class(std::string_view text) {
  for (const auto& [cls, name] : classes) {
    if (name == text) return cls;
  }
  return Error(Errc::invalid,
               fmt::format("no class '{}': interactive, batch or background", text.substr(0, 40)));
}

double switching_loss(double slice_us, const Costs& costs) {
  const double change = as_double(costs.switch_us);
  return slice_us <= 0 ? 1 : change / (slice_us + change);
}

Plan decide(std::span<const Tenant> tenants, const Costs& costs) {
  const Tools tools = tools_of(costs);
  Plan plan;
  Seats all;
  std::vector<std::size_t> order(tenants.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return std::pair(tenants[a].id, a) < std::pair(tenants[b].id, b);
  });
  plan.lines.resize(tenants.size());
  for (const std::size_t index : order) {
    const Tenant& tenant = tenants[index];
    Line& line = plan.lines[index];
    line.id = tenant.id;
    line.slice_us = whole(tools.wanted_slice);  // safe in any company until the plan is made anew
    line.why = "has nothing on the GPU now";
    check_asked(tenant, plan);
    if (!tenant.running) continue;
    const unsigned percent = std::max(1U, tenant.ceiling.value_or(100));
    all.push_back({index, &tenant, counted_weight(tenant), percent >= 100 ? 1.0 : percent / 100.0});
  }
  if (all.empty()) return plan;

  std::vector<double> weights, caps;
  for (const Seat& seat : all) {
    weights.push_back(seat.weight);
    caps.push_back(seat.ceiling);
  }
  const auto parts = fill(weights, caps);
  double start = 0;  // duty windows: each begins where the one before ended
  Seats interactive, sharing;
  double interactive_part = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    Seat& seat = all[i];
    seat.entitled = seat.weight / sum_of(weights);
    Line& line = plan.lines[seat.index];
    line.expected = parts[i];
    seat.demoted = line.demoted = seat.tenant->cls == Class::interactive && all.size() > 1 &&
                                  seat.tenant->busy.value_or(0) > busy_part * seat.entitled;
    if (seat.tenant->cls == Class::interactive && !seat.demoted) {
      interactive.push_back(seat);
      interactive_part += parts[i];
    } else {
      sharing.push_back(seat);
    }
  }

  if (!tools.slices && all.size() > 1) {
    // Only turns are left. Shorter ones where somebody waits for them, at a loss of 3 % in handovers instead
    // of 1 %.
    take_turns(all, (interactive.empty() ? 100 : 30) * tools.both, tools, 1, plan);
    for (const Seat& seat : all) {
      plan.lines[seat.index].why +=
          tools.pauses ? "; strict turns: this driver does not obey slices"
                       : "; launches are held back in turns, which the program must allow: this "
                         "driver obeys neither slices nor pauses";
    }
    for (const Seat& seat : interactive) {
      const auto wait = plan.round_us - plan.lines[seat.index].turn_us + whole(tools.both);
      check_latency(*seat.tenant, wait, "in turns, which is all that this driver obeys", plan);
    }
    return plan;
  }

  if (interactive.empty()) {
    share_by_slices(sharing, tools, start, plan);
  } else {
    const bool turns = sharing.size() > 1;
    // Without pauses the turns are kept by holding launches back, which a program may escape: then the slice
    // itself must be safe for several at once.
    const double short_slice = turns && !tools.pauses ? tools.least_slice : best_effort_slice;
    // At a handover two of them may be met.
    const double beside = sharing.empty() ? 0 : (short_slice + tools.change) * (turns ? 2 : 1);
    double slice = interactive_slice;
    if (interactive.size() > 1) {
      double tightest = default_latency;
      bool asked = false;
      for (const Seat& seat : interactive) {
        if (!seat.tenant->latency_us) continue;
        const double latency = as_double(*seat.tenant->latency_us);
        tightest = asked ? std::min(tightest, latency) : latency;
        asked = true;
      }
      const double others = as_double(interactive.size() - 1);
      slice = std::clamp((tightest - beside) / others - tools.change, tools.least_slice, interactive_slice);
    }
    for (const Seat& seat : interactive) {
      Line& line = plan.lines[seat.index];
      line.slice_us = whole(slice);
      line.alone = all.size() == 1;
      double off = 0;
      if (seat.ceiling < 1) {
        set_duty(seat, 0, tools, start, line);
        off = as_double(line.duty_period_us - line.duty_on_us) + tools.on;
        line.expected = std::min(line.expected, duty_part(line));
      }
      line.why = fmt::format(
          "{}on the GPU as soon as it has work{}{}", rank_words(seat),
          interactive.size() > 1
              ? fmt::format(", up to {:.1f} ms at a time beside other interactive ones", ms(slice))
              : std::string{},
          cap_words(seat));
      const double others = as_double(interactive.size() - 1) * (std::floor(slice) + tools.change);
      check_latency(*seat.tenant, whole(std::ceil(others + beside + off)),
                    off > 0 ? "with its ceiling" : "beside these tenants", plan);
    }
    if (turns) {
      take_turns(sharing, mean_turn, tools, 1 - interactive_part, plan);
    } else if (!sharing.empty()) {
      Line& line = plan.lines[sharing[0].index];
      if (sharing[0].ceiling < 1) {
        set_duty(sharing[0], duty_period, tools, start, line);
        line.expected = std::min(line.expected, duty_part(line));
      }
      line.why = fmt::format("{}runs whenever the interactive tenants have nothing to do{}",
                             rank_words(sharing[0]), cap_words(sharing[0]));
    }
    for (const Seat& seat : sharing) plan.lines[seat.index].slice_us = whole(short_slice);
  }
  if (!tools.pauses) {
    for (auto& line : plan.lines) {
      if (!line.in_turns && line.duty_period_us == 0) continue;
      line.why +=
          "; by holding launches back, which the program must allow: this driver does not obey pauses";
    }
  }
  return plan;
}

namespace {

// On from `start` for `length` of each `period`, all in ns.
Moment window(std::uint64_t now, std::uint64_t start, std::uint64_t length, std::uint64_t period) {
  if (length >= period) return {};
  // Moduli first: their sum cannot wrap.
  const std::uint64_t phase = (now % period + (period - start % period)) % period;
  const bool on = phase < length;
  const std::uint64_t left = (on ? length : period) - phase;
  return {on, now > UINT64_MAX - left ? UINT64_MAX : now + left};
}

}  // namespace

Moment at(const Plan& plan, std::uint64_t id, std::uint64_t monotonic_ns) {
  const auto line =
      std::find_if(plan.lines.begin(), plan.lines.end(), [&](const Line& l) { return l.id == id; });
  if (line == plan.lines.end()) return {};
  constexpr std::uint64_t ns = 1000;  // in a microsecond
  Moment turn, duty;
  if (line->in_turns && plan.round_us > 0) {
    turn = window(monotonic_ns, line->offset_us * ns, line->turn_us * ns, plan.round_us * ns);
  }
  if (line->duty_period_us > 0) {
    duty = window(monotonic_ns, line->offset_us * ns, line->duty_on_us * ns, line->duty_period_us * ns);
  }
  if (turn.on && duty.on) return {true, std::min(turn.until_ns, duty.until_ns)};
  if (turn.on != duty.on) return turn.on ? duty : turn;
  return {false, std::max(turn.until_ns, duty.until_ns)};
}

GroupLine group_line(const Line& line, unsigned busy_groups, const Costs& costs) {
  if (busy_groups <= 1 || line.alone) return {line.slice_us, false};
  const std::uint64_t part = line.slice_us / busy_groups;
  if (as_double(part) >= tools_of(costs).least_slice) return {part, false};
  return {line.slice_us, true};
}

Moment group_at(const Plan& plan, std::uint64_t id, const GroupLine& line, unsigned index,
                unsigned busy_groups, std::uint64_t monotonic_ns) {
  const Moment tenant = at(plan, id, monotonic_ns);
  if (!line.one_at_a_time || busy_groups <= 1) return tenant;
  const auto own =
      std::find_if(plan.lines.begin(), plan.lines.end(), [&](const Line& l) { return l.id == id; });
  // Beside nobody's turn or period: as long as a turn usually is.
  std::uint64_t length = whole(mean_turn), offset = 0;
  if (own != plan.lines.end()) {
    if (own->in_turns && plan.round_us > 0) length = plan.round_us;
    if (own->duty_period_us > 0) length = own->duty_period_us;
    offset = own->offset_us;
  }
  constexpr std::uint64_t ns = 1000;
  // From the beginning of the tenant's own time, so that no group's time is cut in two.
  const std::uint64_t start = (offset + length * (index % busy_groups)) * ns;
  const Moment group = window(monotonic_ns, start, length * ns, length * busy_groups * ns);
  if (tenant.on && group.on) return {true, std::min(tenant.until_ns, group.until_ns)};
  if (tenant.on != group.on) return tenant.on ? group : tenant;
  return {false, std::max(tenant.until_ns, group.until_ns)};
}

}  // namespace bulkhead::sharing
