#include <algorithm>
#include <cmath>
#include <set>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/protect/protect.hpp"

namespace bulkhead::protect {

namespace {

constexpr double hour_s = 3600, rate_over_s = 10, horizon_s = 60;
constexpr double counter_stale_s = 120;  // counts are asked seldom where asking is dear
constexpr double gone_after_s = 600;     // a GPU that is not named any more
constexpr std::size_t most_evidence = 12;
constexpr double smooth_s = 180;         // longer than a die, shorter than a hall
constexpr double rail_tolerance = 0.05;  // ATX and server supplies promise +-5 %

bool fresh(const Seen& seen, double now, double stale) {
  return seen && std::isfinite(seen->number) && now - seen->at_s <= stale && now - seen->at_s > -1;
}

double watts_of(Milliwatts power) { return static_cast<double>(power.count) / 1000; }

void put_blast(Alarm& alarm, const std::vector<Holder>& blast) {
  std::set<std::int64_t> leases;
  std::set<std::string> tenants;
  for (const auto& holder : blast) {
    leases.insert(holder.lease);
    tenants.insert(holder.tenant);
  }
  alarm.leases.assign(leases.begin(), leases.end());
  alarm.tenants.assign(tenants.begin(), tenants.end());
}

std::string shown(double number) {
  return number != 0 && std::abs(number) < 0.01 ? fmt::format("{:.2g}", number)
                                                : fmt::format("{:.4g}", number);
}

}  // namespace

// ---- what a GPU says
std::optional<double> Guard::Window::add(const Seen& seen, double over_s) {
  if (seen && std::isfinite(seen->number)) {
    if (!points.empty() && seen->number < points.back().number) points.clear();  // driver loaded anew
    if (points.empty() || seen->at_s > points.back().at_s) points.push_back(*seen);
    // One that is older than the window stays: a count that is seldom asked still has a rate.
    while (points.size() > 2 && points[1].at_s <= points.back().at_s - over_s) points.erase(points.begin());
  }
  if (points.size() < 2) return std::nullopt;
  return (points.back().number - points.front().number) / (points.back().at_s - points.front().at_s);
}

// Without the temperature of the air that comes in, a base and a resistance cannot be told apart later: a
// model that goes on learning takes a failing fan for a warmer hall (tried: core/thermal's resistance()
// wanders by a factor of two under a load that never rests). So what was seen at each power while the part
// was well stands, and what is judged is how much hotter it is now at the same power.
void Guard::cooled(Part& part, double celsius, double watts, const std::optional<double>& inlet, double dt) {
  auto& s = part.smooth;
  const double above = celsius - inlet.value_or(0);
  part.outlook.beyond.reset();
  if (dt > 30 || s.seen_s == 0 || part.reference.with_inlet != inlet.has_value()) {
    if (part.reference.with_inlet != inlet.has_value()) part.reference = {.with_inlet = inlet.has_value()};
    s = {.seen_s = 1e-9, .celsius = above, .watts = watts};
    return;
  }
  const double keep = std::exp(-dt / smooth_s);
  s.celsius = above + (s.celsius - above) * keep;
  s.watts = watts + (s.watts - watts) * keep;
  s.seen_s += dt;
  if (s.seen_s < 3 * smooth_s) return;
  const auto number = static_cast<unsigned>(std::clamp(s.watts / level_watts, 0.0, most_levels - 1.0));
  auto& level = part.reference.levels[number];
  if (level.seconds < pace_.reference_after_s) {
    level.celsius = (level.celsius * level.seconds + s.celsius * dt) / (level.seconds + dt);
    level.seconds += dt;
  } else {
    part.outlook.beyond = s.celsius - level.celsius;
  }
}

void Guard::of_gpu(const Reading& reading, const GpuReading& gpu, std::vector<Measured>& out) {
  const double now = reading.at_s;
  Part& part = parts_[gpu.gpu.text];
  part.index = gpu.index;
  part.judged = false;
  const std::string subject = fmt::format("gpu {}", gpu.index);
  const auto add = [&](Kind kind, double measure, double at, std::string what,
                       std::vector<std::string> evidence) -> Measured& {
    Measured m;
    m.kind = kind;
    m.id = fmt::format("{}.gpu{}", row_of(kind).name, gpu.index);
    m.subject = subject;
    m.gpu = gpu.gpu;
    m.measure = measure;
    m.at_s = at;
    m.what = std::move(what);
    m.evidence = std::move(evidence);
    m.blast = gpu.leases;
    out.push_back(std::move(m));
    return out.back();
  };

  double latest = -1;
  for (const Seen* seen : {&gpu.celsius, &gpu.margin, &gpu.watts})
    if (*seen) latest = std::max(latest, (*seen)->at_s);
  if (latest >= 0) {
    if (gpu.rests && now - latest <= pace_.longest_rest_s) part.rested_at = now;
    const double age = std::max(0.0, now - std::max(latest, part.rested_at));
    add(Kind::silent, age, now,
        fmt::format("gpu {} has not been read for {:.0f} s{}", gpu.index, std::max(0.0, now - latest),
                    gpu.why.empty() ? "" : ": " + printable(gpu.why, 200)),
        {fmt::format("last reading {:.1f} s ago{}", std::max(0.0, now - latest),
                     gpu.answers ? "" : ", the driver does not answer for it")});
  }

  const bool hot_known = fresh(gpu.celsius, now, pace_.stale_s);
  const bool margin_known = fresh(gpu.margin, now, pace_.stale_s);
  part.outlook.room.reset();
  part.outlook.ahead.reset();
  part.outlook.room_ahead.reset();
  std::vector<std::string> heat_lines;
  double at = now;
  if (hot_known) {
    part.outlook.room = settings_.ceiling - gpu.celsius->number;
    heat_lines.push_back(fmt::format("{:.0f} C, ceiling {} C", gpu.celsius->number, settings_.ceiling));
    at = gpu.celsius->at_s;
  }
  if (margin_known) {
    const double room = gpu.margin->number - settings_.guard;
    part.outlook.room = std::min(part.outlook.room.value_or(room), room);
    heat_lines.push_back(fmt::format("margin {:.0f} K, guard {} K", gpu.margin->number, settings_.guard));
    at = hot_known ? std::max(at, gpu.margin->at_s) : gpu.margin->at_s;
  }
  if (fresh(gpu.watts, now, pace_.stale_s)) {
    heat_lines.push_back(fmt::format("{:.0f} W{}", gpu.watts->number,
                                     gpu.limit ? fmt::format(" of {:.0f} W", gpu.limit->number) : ""));
  }
  if (part.outlook.room) {
    part.judged = true;
    add(Kind::heat, -*part.outlook.room, at,
        fmt::format("gpu {} is {:.0f} K {} where it is to stay below", gpu.index,
                    std::abs(*part.outlook.room), *part.outlook.room <= 0 ? "beyond" : "short of"),
        heat_lines);
  }

  // ---- the model: power since the reading before, by the energy counter where it moved
  if (hot_known && fresh(gpu.watts, now, pace_.stale_s)) {
    double mean = gpu.watts->number;
    if (gpu.joules && part.last_joules && gpu.joules->at_s - part.last_joules->at_s >= 0.5 &&
        gpu.joules->number >= part.last_joules->number)
      mean = (gpu.joules->number - part.last_joules->number) / (gpu.joules->at_s - part.last_joules->at_s);
    if (gpu.joules && (!part.last_joules || gpu.joules->at_s > part.last_joules->at_s))
      part.last_joules = gpu.joules;
    const thermal::Reading said{
        .at_s = gpu.celsius->at_s,
        .celsius = gpu.celsius->number,
        .watts = std::max(0.0, mean),
        .inlet = fresh(reading.inlet, now, 60) ? std::optional(reading.inlet->number) : std::nullopt};
    const double dt = part.last_watts ? said.at_s - part.last_watts->at_s : 0;
    part.model.add(said);
    if (dt > 0) cooled(part, said.celsius, said.watts, said.inlet, dt);
    if (dt != 0 || !part.last_watts) part.last_watts = Stamped{said.watts, said.at_s};
    part.outlook.ahead = part.model.forecast(horizon_s, said.watts);
    if (part.outlook.ahead && part.outlook.ahead->trusted && part.outlook.room) {
      part.outlook.room_ahead = *part.outlook.room - (part.outlook.ahead->celsius - gpu.celsius->number);
      auto lines = heat_lines;
      lines.push_back(fmt::format("forecast {:.1f} C in {:.0f} s, error {:.1f} K",
                                  part.outlook.ahead->celsius, horizon_s, part.outlook.ahead->error));
      add(Kind::heat_ahead, -*part.outlook.room_ahead, at,
          fmt::format("gpu {} will have no room left in {:.0f} s", gpu.index, horizon_s), std::move(lines))
          .predicted = true;
    }
    if (part.outlook.beyond) {
      const bool inlet = part.reference.with_inlet;
      add(Kind::cooling, *part.outlook.beyond, at,
          fmt::format("gpu {} is {:.0f} K hotter than it was at this power: {}", gpu.index,
                      *part.outlook.beyond, inlet ? "it is cooled worse" : "worse cooling, or warmer air"),
          {fmt::format("{:.1f} {} at {:.0f} W over the last minutes, {:.1f} when it was well",
                       part.smooth.celsius, inlet ? "K above the inlet" : "C", part.smooth.watts,
                       part.smooth.celsius - *part.outlook.beyond)})
          .predicted = true;
    }
  }

  // ---- what the part counts
  const auto counted = [&](Kind kind, Window& window, const Seen& seen, std::string_view words) {
    const auto rate = window.add(seen, rate_over_s);
    if (!rate || !fresh(seen, now, counter_stale_s)) return;
    const double of_time = std::clamp(*rate / 1e9, 0.0, 1.0);
    add(kind, of_time, seen->at_s,
        fmt::format("gpu {} {} {:.1f} % of the time", gpu.index, words, of_time * 100),
        {fmt::format("counter at {:.3f} s in all, {:.1f} % of the last {:.0f} s", seen->number / 1e9,
                     of_time * 100, window.points.back().at_s - window.points.front().at_s)});
  };
  counted(Kind::hw_thermal, part.hot, gpu.hw_thermal_ns, "slowed itself down for heat");
  counted(Kind::power_brake, part.brake, gpu.power_brake_ns, "was held down by the rack or its supply");

  if (fresh(gpu.ecc_uncorrected, now, counter_stale_s)) {
    const double count = gpu.ecc_uncorrected->number;
    if (part.errors_before && count > part.errors_before->number && part.errors.size() < 1000)
      part.errors.push_back({count - part.errors_before->number, now});
    part.errors_before = gpu.ecc_uncorrected;
    std::erase_if(part.errors, [&](const Stamped& e) { return now - e.at_s > hour_s; });
    double sum = 0;
    for (const auto& error : part.errors) sum += error.number;
    add(Kind::memory_errors, sum, gpu.ecc_uncorrected->at_s,
        fmt::format("gpu {} had {:.0f} uncorrectable memory error{} in the last hour", gpu.index, sum,
                    sum == 1 ? "" : "s"),
        {fmt::format("{:.0f} since the driver was loaded", count)});
  }
  if (fresh(gpu.remap_pending, now, counter_stale_s))
    add(Kind::memory_pending, gpu.remap_pending->number, gpu.remap_pending->at_s,
        fmt::format("gpu {} needs a reset: a memory row waits to be remapped", gpu.index),
        {fmt::format("remapping pending: {}", gpu.remap_pending->number > 0 ? "yes" : "no")});
  if (fresh(gpu.remap_failed, now, counter_stale_s))
    add(Kind::memory_failed, gpu.remap_failed->number, gpu.remap_failed->at_s,
        fmt::format("gpu {} is to be replaced: a memory row could not be remapped", gpu.index),
        {fmt::format("remapping failed: {}", gpu.remap_failed->number > 0 ? "yes" : "no")});
  if (fresh(gpu.link_errors, now, counter_stale_s))
    add(Kind::link_errors, gpu.link_errors->number, gpu.link_errors->at_s,
        fmt::format("NVLink of gpu {} damages {:.3g} % of what it carries", gpu.index,
                    gpu.link_errors->number * 100),
        {fmt::format("{:.3g} % damaged, alarm above 0.01 %", gpu.link_errors->number * 100)});
}

// ---- what the machine around them says
void Guard::of_host(const Reading& reading, std::vector<Measured>& out) {
  const double now = reading.at_s;
  std::vector<Holder> everybody;
  for (const auto& gpu : reading.gpus)
    everybody.insert(everybody.end(), gpu.leases.begin(), gpu.leases.end());
  const auto add = [&](Kind kind, std::string suffix, double measure, double at, std::string what,
                       std::vector<std::string> evidence) {
    Measured m;
    m.kind = kind;
    m.id = fmt::format("{}.{}", row_of(kind).name, suffix);
    m.subject = std::move(suffix);
    m.measure = measure;
    m.at_s = at;
    m.what = std::move(what);
    m.evidence = std::move(evidence);
    m.blast = everybody;
    out.push_back(std::move(m));
  };

  double drawn = watts_of(settings_.rest_power), limits = watts_of(settings_.rest_power);
  bool all_known = true, limits_known = !reading.gpus.empty();
  for (const auto& gpu : reading.gpus) {
    // One that does not answer may draw whatever it may.
    if (fresh(gpu.watts, now, pace_.stale_s)) {
      drawn += gpu.watts->number;
    } else {
      all_known = false;
      drawn += gpu.limit ? gpu.limit->number : 0;
    }
    if (gpu.limit)
      limits += gpu.limit->number;
    else
      limits_known = false;
  }
  const bool measured = fresh(reading.node_watts, now, 60);
  const double power = measured ? reading.node_watts->number : drawn;
  const std::string source = measured ? "by the BMC"
                                      : fmt::format("{} GPUs and {:.0f} W for the rest", reading.gpus.size(),
                                                    watts_of(settings_.rest_power));
  const bool power_known = !reading.gpus.empty() || measured;
  if (settings_.node_power && power_known) {
    const double budget = watts_of(*settings_.node_power);
    add(Kind::node_power, "host", power / budget, now,
        fmt::format("the node draws {:.0f} W of the {:.0f} W it may", power, budget),
        {fmt::format("{:.0f} W: {}", power, source)});
  }
  if (settings_.rack && limits_known) {
    const double budget = watts_of(settings_.rack->power) / settings_.rack->nodes;
    add(Kind::rack_power, "host", limits / budget, now,
        fmt::format("power limits add up to {:.0f} W, the node's part of the rack is {:.0f} W", limits,
                    budget),
        {fmt::format("{} GPUs and {:.0f} W for the rest; rack {:.0f} W for {} nodes", reading.gpus.size(),
                     watts_of(settings_.rest_power), watts_of(settings_.rack->power),
                     settings_.rack->nodes)});
  }
  if (settings_.cooling && power_known) {
    const double capacity = watts_of(*settings_.cooling);
    std::vector<std::string> lines = {fmt::format("{:.0f} W of heat: {}", power, source)};
    if (limits_known && limits > capacity)
      lines.push_back(
          fmt::format("power limits add up to {:.0f} W: at full load more than is taken away", limits));
    add(Kind::cooling_capacity, "host", power / capacity, now,
        fmt::format("the node makes {:.0f} W of heat, the cooling takes {:.0f} W away", power, capacity),
        std::move(lines));
  }
  // The GPUs alone: a BMC's reading is too slow for ramps.
  if (all_known && !reading.gpus.empty()) {
    const double of_gpus = drawn;
    while (!power_.empty() && now - power_.front().at_s > 10) power_.erase(power_.begin());
    const auto before =
        std::find_if(power_.rbegin(), power_.rend(), [&](const Stamped& s) { return now - s.at_s >= 0.9; });
    if (settings_.ramp && before != power_.rend()) {
      const double slope = (of_gpus - before->number) / (now - before->at_s);
      const double budget = watts_of(settings_.ramp->per_second);
      add(Kind::ramp, "host", std::abs(slope) / budget, now,
          fmt::format("the node's power {} by {:.0f} W/s, it may change by {:.0f} W/s",
                      slope < 0 ? "fell" : "rose", std::abs(slope), budget),
          {fmt::format("{:.0f} W, {:.0f} W {:.1f} s before", of_gpus, before->number, now - before->at_s)});
    }
    if (power_.size() < 1000) power_.push_back({of_gpus, now});
  } else {
    power_.clear();
  }

  for (const auto& fan : reading.fans) {
    if (now - fan.at_s > 60) continue;
    add(Kind::fan, printable(fan.name, 40), fan.failed ? 1 : 0, fan.at_s,
        fmt::format("fan {} has failed", printable(fan.name, 40)), {fmt::format("{:.0f} RPM", fan.rpm)});
  }
  for (const auto& rail : reading.rails) {
    if (now - rail.at_s > 60 || rail.nominal <= 0) continue;
    const double lowest = rail.lowest > 0 ? rail.lowest : rail.nominal * (1 - rail_tolerance);
    add(Kind::rail, printable(rail.name, 40), (lowest - rail.volts) / rail.nominal, rail.at_s,
        fmt::format("rail {} is at {:.2f} V, its lowest is {:.2f} V", printable(rail.name, 40), rail.volts,
                    lowest),
        {fmt::format("{:.3f} V, {:.0f} W drawn", rail.volts, power)});
  }
  for (const auto& port : reading.ports) {
    if (!fresh(port.errors, now, counter_stale_s)) continue;
    add(Kind::link_errors, printable(port.name, 40), port.errors->number, port.errors->at_s,
        fmt::format("port {} damages {:.3g} % of what it carries", printable(port.name, 40),
                    port.errors->number * 100),
        {fmt::format("{:.3g} % damaged, alarm above 0.01 %", port.errors->number * 100)});
  }
}

// ---- alarms
void Guard::judge(const Measured& m, const Reading& reading, Decision& decision) {
  const Row& row = row_of(m.kind);
  Watch& watch = watches_[m.id];
  Alarm& alarm = watch.alarm;
  const double now = reading.at_s;
  // A hole in the readings is no evidence of anything.
  if (watch.last_at >= 0 && m.at_s - watch.last_at > std::max(counter_stale_s, row.close_after_s))
    watch.above_since = watch.below_since = -1;
  const bool above = m.measure >= row.opens, below = m.measure <= row.closes;
  if (!above) watch.above_since = -1;
  if (!below) watch.below_since = -1;
  if (above && watch.above_since < 0) watch.above_since = now;
  if (below && watch.below_since < 0) watch.below_since = now;
  watch.last_at = m.at_s;
  alarm.kind = m.kind;
  alarm.gpu = m.gpu;

  if (!watch.open) {
    if (!above || now - watch.above_since < row.open_after_s) return;
    watch.open = true;
    alarm = Alarm{};
    alarm.id = m.id;
    alarm.kind = m.kind;
    alarm.severity = row.severity;
    alarm.gpu = m.gpu;
    alarm.subject = m.subject;
    alarm.since = reading.wall;
    alarm.predicted = m.predicted;
    alarm.worst = m.measure;
    alarm.what = m.what;
    alarm.evidence = m.evidence;
    if (alarm.evidence.size() > most_evidence) alarm.evidence.resize(most_evidence);
    watch.at_last_step = m.measure;
    if (row.critical && m.measure >= *row.critical) alarm.severity = Severity::critical;
    alarm.measure = m.measure;
    put_blast(alarm, m.blast);
    decision.opened.push_back(alarm);
    return;
  }
  alarm.measure = m.measure;
  put_blast(alarm, m.blast);
  if (m.measure > alarm.worst) {
    alarm.worst = m.measure;
    alarm.what = m.what;
    alarm.evidence = m.evidence;
    if (row.critical && m.measure >= *row.critical) alarm.severity = Severity::critical;
  }
  if (!below || now - watch.below_since < row.close_after_s) return;
  watch.open = false;
  watch.above_since = -1;
  alarm.closed = reading.wall;
  for (const auto& line : m.evidence) alarm.evidence.push_back("closed: " + line);
  alarm.evidence.push_back(fmt::format("closed: {} {} for {:.0f} s, it closes at {}", shown(m.measure),
                                       row.unit, now - watch.below_since, shown(row.closes)));
  decision.closed.push_back(alarm);
}

// ---- the ladder
void Guard::climb(const Reading& reading, Decision& decision) {
  const double now = reading.at_s;
  const unsigned highest = highest_rung(settings_.harshest);
  for (auto& [uuid, part] : parts_) {
    unsigned demanded = 0, open_demand = 0;
    bool pressing = false, critical = false;
    std::vector<Watch*> pressers;
    Wanted wanted{.gpu = {uuid}, .index = part.index};
    std::vector<std::string> words;
    for (auto& [id, watch] : watches_) {
      const Row& row = row_of(watch.alarm.kind);
      if (watch.alarm.kind == Kind::end) continue;
      const bool mine = watch.alarm.gpu ? watch.alarm.gpu->text == uuid : !row.of_gpu;
      if (!mine) continue;
      const unsigned up_to = std::min(highest, highest_rung(row.most));
      if (watch.open) {
        demanded = std::max(demanded, up_to);
        open_demand = std::max(open_demand, up_to);
        if (up_to > 0) {
          words.push_back(watch.alarm.what);
          wanted.alarms.push_back(id);
        }
        // Only what is bad by now, not what waits to be closed, asks for more.
        if (watch.above_since >= 0 && up_to > part.rung && now - watch.last_at <= counter_stale_s) {
          pressers.push_back(&watch);
          pressing = true;
          critical = critical || watch.alarm.severity == Severity::critical;
        }
      } else if (watch.last_at >= 0 && watch.below_since < 0 && part.rung > 0) {
        demanded = std::max(demanded, up_to);  // not well enough to lift anything for
      }
    }
    std::erase_if(part.steps_up, [&](double at) { return now - at > hour_s; });
    part.bounded = false;
    if (pressing) {
      part.calm_since = -1;
      const double patience = critical ? pace_.critical_patience_s : pace_.patience_s;
      if (part.rung == 0 || now - part.stepped_at >= patience) {
        // What gets better by itself, or by the last step, gets another patience.
        const bool worse =
            part.rung == 0 || std::any_of(pressers.begin(), pressers.end(), [&](const Watch* watch) {
              const double better = row_of(watch->alarm.kind).better * patience / pace_.patience_s;
              return watch->alarm.measure > watch->at_last_step - better;
            });
        for (auto* watch : pressers) watch->at_last_step = watch->alarm.measure;
        if (worse && part.steps_up.size() >= pace_.most_steps) {
          part.bounded = true;
        } else if (worse) {
          if (part.rung == 0) {
            const bool again = now - part.lifted_at < pace_.again_s;
            part.cool_down =
                again ? std::min(part.cool_down * 2, pace_.longest_cool_down_s) : pace_.cool_down_s;
          }
          ++part.rung;
          part.stepped_at = now;
          part.steps_up.push_back(now);
        } else {
          part.stepped_at = now;
        }
      }
    } else if (part.rung > std::min(demanded, highest) && part.judged) {
      if (part.cool_down == 0) part.cool_down = pace_.cool_down_s;
      if (part.calm_since < 0) part.calm_since = now;
      if (now - std::max(part.calm_since, part.lifted_at) >= part.cool_down) {
        --part.rung;
        part.lifted_at = now;
      }
    } else {
      part.calm_since = -1;
    }
    part.outlook.rung = part.rung;
    wanted.rung = part.rung;
    wanted.bounded = part.bounded;
    for (unsigned i = 1; i <= part.rung && i < ladder().size(); ++i) {
      const Rung& rung = ladder()[i];
      switch (rung.action) {
        case Action::none:
          break;
        case Action::hold:
          wanted.hold = true;
          break;
        case Action::power:
          wanted.power = rung.part;
          break;
        case Action::clocks:
          wanted.clocks = rung.part;
          break;
        case Action::pause:
          wanted.pause = true;
          break;
        case Action::drain:
          wanted.drain = true;
          break;
        case Action::fence:
          wanted.fence = true;
          break;
      }
    }
    if (wanted.rung > 0)
      wanted.why = words.empty() ? "what was wrong is over; taken back step by step" : join(words, "; ");
    decision.wanted.push_back(std::move(wanted));
  }
}

Decision Guard::step(const Reading& reading) {
  Decision decision;
  std::vector<Measured> measured;
  std::set<std::string> named;
  for (auto& [uuid, part] : parts_) part.judged = false;
  for (const auto& gpu : reading.gpus) {
    if (gpu.gpu.text.empty() || named.size() >= 256 || !named.insert(gpu.gpu.text).second) continue;
    of_gpu(reading, gpu, measured);
  }
  of_host(reading, measured);
  // Two sensors of one name: the worse one speaks.
  std::stable_sort(measured.begin(), measured.end(),
                   [](const Measured& a, const Measured& b) { return a.measure > b.measure; });
  std::set<std::string> seen;
  for (const auto& m : measured) {
    if (watches_.size() >= 4096 && !watches_.contains(m.id)) continue;
    if (!seen.insert(m.id).second) continue;
    judge(m, reading, decision);
  }
  for (auto at = watches_.begin(); at != watches_.end();) {
    Watch& watch = at->second;
    if (seen.contains(at->first)) {
      ++at;
      continue;
    }
    watch.below_since = watch.above_since = -1;
    const bool forgotten = reading.at_s - watch.last_at > gone_after_s;
    // Its budget or ceiling is no longer in the node file, or the part was taken out.
    if (forgotten && watch.open) {
      watch.alarm.closed = reading.wall;
      watch.alarm.evidence.push_back(fmt::format(
          "closed: {} has not been read for {:.0f} s: it is not there any more, or no longer asked for",
          watch.alarm.subject, reading.at_s - watch.last_at));
      decision.closed.push_back(watch.alarm);
    }
    at = forgotten ? watches_.erase(at) : std::next(at);
  }
  climb(reading, decision);
  for (const auto& [id, watch] : watches_)
    if (watch.open) decision.open.push_back(watch.alarm);
  return decision;
}

void Guard::carry(const Uuid& gpu, unsigned rung) {
  Part& part = parts_[gpu.text];
  part.rung = std::max(part.rung, std::min<unsigned>(rung, static_cast<unsigned>(ladder().size() - 1)));
}

void Guard::carry_reference(const Uuid& gpu, const Reference& reference) {
  Reference sane{.with_inlet = reference.with_inlet};
  for (const auto& [number, level] : reference.levels)
    if (number < most_levels && level.seconds >= 0 && std::abs(level.celsius) < 150)
      sane.levels[number] = level;
  parts_[gpu.text].reference = std::move(sane);
}

std::map<std::string, Reference> Guard::references() const {
  std::map<std::string, Reference> out;
  for (const auto& [uuid, part] : parts_)
    if (!part.reference.levels.empty()) out[uuid] = part.reference;
  return out;
}

std::optional<Guard::Outlook> Guard::outlook(const Uuid& gpu) const {
  const auto at = parts_.find(gpu.text);
  return at == parts_.end() ? std::nullopt : std::optional(at->second.outlook);
}

// ---- ramps
double Ramp::wait(double now_s) const {
  if (!limits()) return 0;
  return std::max(0.0, free_at_ - burst_ / rate_ - now_s);
}

double Ramp::ask(double watts, double now_s) {
  if (!limits()) return 0;
  const double size = std::abs(watts);
  // An account that is empty: so much must have been refilled that this one fits, as far as anything can.
  const double fits = std::min(size, burst_) / rate_;
  const double begins = std::max(free_at_, now_s);
  const double waits = std::max(0.0, begins + fits - burst_ / rate_ - now_s);
  free_at_ = begins + size / rate_;
  if (announced_.size() < 4096) announced_.push_back({watts, now_s + waits});
  return waits;
}

void Ramp::seen(double watts, double now_s) {
  if (!limits()) return;
  // What was announced has come within half a minute, or does not come.
  std::erase_if(announced_,
                [&](const Announced& a) { return now_s - a.from_s > 30 || std::abs(a.watts) < 1; });
  if (last_ && now_s > last_->at_s) {
    double change = watts - last_->number;
    for (auto& a : announced_) {
      if (a.from_s > now_s + 1 || (change > 0) != (a.watts > 0) || change == 0) continue;
      const double part = change > 0 ? std::min(change, a.watts) : std::max(change, a.watts);
      a.watts -= part;
      change -= part;
    }
    // Noise is not a ramp.
    if (std::abs(change) > rate_ * 0.02 * (now_s - last_->at_s))
      free_at_ = std::min(std::max(free_at_, now_s) + std::abs(change) / rate_, now_s + 600);
  }
  last_ = Stamped{watts, now_s};
}

}  // namespace bulkhead::protect
