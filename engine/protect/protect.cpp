#include "engine/protect/protect.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/limits.hpp"
#include "base/text.hpp"

namespace bulkhead::protect {

namespace {

constexpr std::size_t most_recent = 256, most_turns = 4096, most_told = 16;
constexpr double smallest_part = 0.1;  // of a GPU's power: what the least share may draw, taken high

double watts_of(Milliwatts power) { return static_cast<double>(power.count) / 1000; }
double now_s() { return static_cast<double>(monotonic_ns()) / 1e9; }

control::Caller caller() {
  return {.user = "bulkhead", .tenant = {}, .role = access::Role::admin, .from = "protection"};
}

Seen seen_of(const sample::Gpu& gpu, sample::Signal signal) {
  const auto& value = gpu[signal];
  if (!value.known()) return std::nullopt;
  return Stamped{value.number, static_cast<double>(value.at_ns) / 1e9};
}

// What of a GPU's power a lease's part may draw at most.
double share_of(const lease::Lease& lease, const lease::Part& part) {
  switch (lease.ask.cls) {
    case lease::Class::mig: {
      const auto slices =
          parse_u64(part.profile.substr(0, std::min(part.profile.find('g'), part.profile.size())));
      return slices ? std::clamp(static_cast<double>(*slices) / 7, smallest_part, 1.0) : 1;
    }
    case lease::Class::share:
      return std::clamp(part.weight / 1000.0, smallest_part, 1.0);
    case lease::Class::exclusive:
    case lease::Class::passthrough:
      break;
  }
  return 1;
}

bool is_twelve(std::string_view name) {
  const std::string small = lower(name);
  return small.find("12v") != std::string::npos || small.find("12 v") != std::string::npos;
}

// What the kernel and the BMC tell of the machine around the GPUs.
void put_host(const sample::Host& host, Reading& reading) {
  if (host.at_ns == 0) return;
  const double at = static_cast<double>(host.at_ns) / 1e9;
  for (const auto& sensor : host.sensors) {
    const std::string small = lower(sensor.name);
    if (sensor.kind == "fan") {
      // A slot without a fan reads zero and has no lower bound.
      reading.fans.push_back({.name = sensor.name,
                              .rpm = sensor.value,
                              .at_s = at,
                              .failed = sensor.low && *sensor.low > 0 && sensor.value <= *sensor.low});
    } else if (sensor.kind == "voltage" && is_twelve(sensor.name)) {
      reading.rails.push_back({.name = sensor.name,
                               .volts = sensor.value,
                               .lowest = sensor.low.value_or(0),
                               .at_s = at,
                               .nominal = 12});
    } else if (sensor.kind == "temperature" &&
               (small.find("inlet") != std::string::npos || small.find("ambient") != std::string::npos)) {
      if (!reading.inlet || sensor.value > reading.inlet->number) reading.inlet = Stamped{sensor.value, at};
    } else if (sensor.kind == "power" && small.find("total") != std::string::npos) {
      reading.node_watts = Stamped{sensor.value, at};
    }
  }
  for (const auto& port : host.ports)
    reading.ports.push_back({.name = fmt::format("{}/{}", port.device, port.port),
                             .errors = port.loss ? Seen(Stamped{*port.loss, at}) : Seen()});
}

std::string label(std::string_view text) {
  std::string out;
  for (const char c : printable(text, 120)) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out;
}

}  // namespace

std::string_view name_of(Guardian::Doing doing) {
  static constexpr std::array<std::string_view, 5> names = {"nothing", "would", "under-way", "done",
                                                            "failed"};
  return names[static_cast<std::size_t>(doing)];
}

Guardian::Guardian(control::Control& control, Settings settings)
    : control_(control), settings_(std::move(settings)), guard_(spec::Protect{}, settings_.pace) {
  read_settings();
  if (const auto read = read_journal(); !read.ok())
    view_.trouble = "what is in force is not known: " + read.error().message();
  read_files();
  control_.on_start([this](const lease::Lease& lease) { return starts_in(lease); });
  thread_ = std::thread([this] { work(); });
}

Guardian::~Guardian() {
  control_.on_start({});
  {
    const std::lock_guard hold(mutex_);
    ending_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void Guardian::read_settings() {
  spec::Protect wanted;
  std::string trouble;
  if (!settings_.node_file.empty()) {
    const auto text = read_file(settings_.node_file, limits::node_file_bytes);
    if (!text.ok()) {
      trouble = text.error().message();
    } else {
      const auto parsed = spec::parse(*text);
      if (const auto* node = std::get_if<spec::NodeFile>(&parsed))
        wanted = node->protect.value_or(spec::Protect{});
      else
        trouble = fmt::format("{} has mistakes: bulkhead plan -f {}", settings_.node_file.string(),
                              settings_.node_file.string());
    }
  }
  const std::lock_guard hold(mutex_);
  view_.trouble = trouble;
  // A file with a mistake is refused whole: what was in force stays (at the start: what is in force by itself).
  if (trouble.empty()) guard_.configure(wanted);
  view_.settings = guard_.settings();
  const auto& ramp = guard_.settings().ramp;
  const double rate = ramp ? watts_of(ramp->per_second) : 0;
  ramp_.configure(rate, ramp && ramp->burst ? watts_of(*ramp->burst) : rate);
}

void Guardian::reload() {
  {
    const std::lock_guard hold(mutex_);
    reload_ = work_ = true;
  }
  wake_.notify_all();
}

void Guardian::read_files() {
  if (const auto text = read_file(settings_.state / "protect-cooling.json"); text.ok()) {
    const auto json = parse_json(*text);
    if (json.ok() && json->is_object() && json->size() <= limits::gpus) {
      for (const auto& [gpu, one] : json->items()) {
        if (!one.is_object() || !one.contains("levels") || !one["levels"].is_array()) continue;
        Reference reference{
            .levels = {},
            .with_inlet = one.contains("inlet") && one["inlet"].is_boolean() && one["inlet"].get<bool>()};
        for (const auto& level : one["levels"]) {
          const bool good = level.is_object() && level.contains("level") &&
                            level["level"].is_number_unsigned() && level.contains("seconds") &&
                            level["seconds"].is_number() && level.contains("celsius") &&
                            level["celsius"].is_number();
          if (!good || level["level"].get<std::uint64_t>() >= most_levels) continue;
          reference.levels[level["level"].get<unsigned>()] = {level["seconds"].get<double>(),
                                                              level["celsius"].get<double>()};
        }
        guard_.carry_reference({gpu}, reference);
      }
    }
  }
  if (const auto text = read_file(settings_.state / "protect-paused.json"); text.ok()) {
    const auto json = parse_json(*text);
    if (json.ok() && json->is_object() && json->size() <= 1024) {
      for (const auto& [name, one] : json->items()) {
        if (!one.is_object() || !one.contains("gpu") || !one["gpu"].is_string()) continue;
        Paused paused{.gpu = one["gpu"].get<std::string>()};
        if (one.contains("ceiling") && one["ceiling"].is_number_unsigned() &&
            one["ceiling"].get<std::uint64_t>() < 100)
          paused.ceiling = one["ceiling"].get<unsigned>();
        guard_.carry({paused.gpu}, highest_rung(Action::pause));
        paused_[name] = paused;
      }
    }
  }
}

// ---- starts
std::chrono::milliseconds Guardian::starts_in(const lease::Lease& lease) {
  const std::lock_guard hold(mutex_);
  if (!ramp_.limits()) return std::chrono::milliseconds(0);
  const double now = now_s();
  auto turn = turns_.find(lease.id);
  if (turn == turns_.end()) {
    if (turns_.size() >= most_turns) std::erase_if(turns_, [&](const auto& one) { return one.second < now; });
    double watts = 0;
    for (const auto& part : lease.parts) {
      const auto draw = draws_.find(part.gpu.text);
      if (draw == draws_.end()) continue;
      watts += std::max(0.0, draw->second.second - draw->second.first) * share_of(lease, part);
    }
    // Observing, the account is kept and the wait told, but nobody waits.
    const double wait = ramp_.ask(watts, now);
    view_.ramp_wait_s += wait;
    if (guard_.settings().mode == spec::Protect::Mode::observe) {
      if (wait >= 0.001)
        control_.note(caller(), "would-stagger", fmt::format("lease/{}", lease.id), lease.tenant,
                      Json{{"milliseconds", std::llround(wait * 1000)}, {"watts", std::llround(watts)}});
      return std::chrono::milliseconds(0);
    }
    if (wait >= 0.001)
      control_.note(caller(), "stagger", fmt::format("lease/{}", lease.id), lease.tenant,
                    Json{{"milliseconds", std::llround(wait * 1000)}, {"watts", std::llround(watts)}});
    turn = turns_.emplace(lease.id, now + wait).first;
  }
  const double left = turn->second - now;
  if (left < 0.001) return std::chrono::milliseconds(0);
  return std::chrono::milliseconds(static_cast<std::int64_t>(std::ceil(left * 1000)));
}

// ---- a beat
void Guardian::step(const sample::Snapshot& gpus, const control::Snapshot& leases, WallTime wall,
                    std::uint64_t monotonic) {
  using sample::Signal;
  Reading reading;
  reading.at_s = static_cast<double>(monotonic) / 1e9;
  reading.wall = wall;
  std::map<std::string_view, std::vector<Holder>> holders;
  for (const auto& gpu : leases.gpus) {
    auto& of = holders[gpu.gpu.text];
    for (const auto id : gpu.leases) {
      const auto at = leases.leases.find(id);
      if (at != leases.leases.end()) of.push_back({id, at->second->tenant});
    }
  }
  double power = 0;
  bool all = !gpus.gpus.empty();
  for (const auto& gpu : gpus.gpus) {
    GpuReading one{.gpu = gpu.uuid, .index = gpu.index};
    one.answers = gpu.state != sample::State::hung && gpu.state != sample::State::lost;
    one.rests = gpu.state == sample::State::resting;
    if (gpu.state == sample::State::hung)
      one.why = "the driver hangs in " + printable(gpu.call, 80);
    else if (one.rests)
      one.why = "nobody looks while somebody changes the host";
    else
      one.why = gpu.why;
    one.celsius = seen_of(gpu, Signal::temperature);
    one.margin = seen_of(gpu, Signal::margin);
    one.watts = seen_of(gpu, Signal::power);
    if (!one.watts) one.watts = seen_of(gpu, Signal::power_average);
    one.limit = seen_of(gpu, Signal::power_limit);
    one.joules = seen_of(gpu, Signal::energy);
    one.hw_thermal_ns = seen_of(gpu, Signal::hw_thermal_ns);
    one.power_brake_ns = seen_of(gpu, Signal::power_brake_ns);
    one.ecc_uncorrected = seen_of(gpu, Signal::ecc_uncorrected);
    one.remap_pending = seen_of(gpu, Signal::remap_pending);
    one.remap_failed = seen_of(gpu, Signal::remap_failed);
    one.link_errors = seen_of(gpu, Signal::nvlink_error_ratio);
    if (const auto at = holders.find(gpu.uuid.text); at != holders.end()) one.leases = at->second;
    const bool fresh = one.watts && reading.at_s - one.watts->at_s < settings_.pace.stale_s;
    if (fresh)
      power += one.watts->number;
    else
      all = false;
    reading.gpus.push_back(std::move(one));
  }
  put_host(gpus.host, reading);

  Decision decision;
  {
    const std::lock_guard hold(mutex_);
    if (first_)
      for (const auto& gpu : leases.gpus)
        if (gpu.cordon && gpu.cordon->by == "bulkhead" && gpu.cordon->why.starts_with("protection: "))
          guard_.carry(gpu.gpu, highest_rung(Action::hold));
    first_ = false;
    draws_.clear();
    for (const auto& gpu : reading.gpus)
      if (gpu.watts && gpu.limit) draws_[gpu.gpu.text] = {gpu.watts->number, gpu.limit->number};
    if (all) ramp_.seen(power, reading.at_s);
    decision = guard_.step(reading);
    const bool act = guard_.settings().mode == spec::Protect::Mode::act;
    view_.open = decision.open;
    view_.opened += decision.opened.size();
    view_.closed += decision.closed.size();
    for (const auto& alarm : decision.closed) view_.recent.insert(view_.recent.begin(), alarm);
    if (view_.recent.size() > most_recent) view_.recent.resize(most_recent);
    view_.outlook.clear();
    for (const auto& wanted : decision.wanted)
      if (const auto outlook = guard_.outlook(wanted.gpu)) view_.outlook[wanted.gpu.text] = *outlook;
    std::vector<Measure> measures;
    for (const auto& wanted : decision.wanted) {
      const auto before =
          std::find_if(view_.measures.begin(), view_.measures.end(),
                       [&](const Measure& measure) { return measure.wanted.gpu == wanted.gpu; });
      Measure measure = before == view_.measures.end() ? Measure{} : *before;
      const bool changed = before == view_.measures.end() || before->wanted.rung != wanted.rung;
      measure.wanted = wanted;
      measure.what = wanted.rung < ladder().size() ? std::string(ladder()[wanted.rung].what) : "";
      if (!act)
        measure.doing = wanted.rung > 0 ? Doing::would : Doing::nothing;
      else if (changed)
        measure.doing = Doing::nothing;
      if (wanted.rung > 0 || measure.limit_mw || measure.clocks_mhz || measure.doing == Doing::failed ||
          measure.doing == Doing::under_way)
        measures.push_back(std::move(measure));
    }
    view_.measures = std::move(measures);
    if (wanted_ != decision.wanted) work_ = true;
    wanted_ = decision.wanted;
  }
  wake_.notify_all();
  tell(decision);
  say_wanted(decision.wanted);
}

// Lines of the log: whoever may read all sees one line an alarm; each tenant that it touches one of its own.
void Guardian::tell(const Decision& decision) {
  const auto line = [&](const Alarm& alarm, std::string_view verb) {
    Json body = to_json(alarm);
    const bool one = alarm.tenants.size() == 1;
    control_.note(caller(), std::string(verb), "alarm/" + alarm.id, one ? alarm.tenants.front() : "", body);
    if (one) return;
    body.erase("tenants");
    body.erase("leases");
    for (std::size_t i = 0; i < alarm.tenants.size() && i < most_told; ++i)
      control_.note(caller(), std::string(verb), "alarm/" + alarm.id, alarm.tenants[i], body);
  };
  for (const auto& alarm : decision.opened) line(alarm, "open");
  for (const auto& alarm : decision.closed) line(alarm, "close");
}

void Guardian::say_wanted(const std::vector<Wanted>& wanted) {
  const bool act = view().settings.mode == spec::Protect::Mode::act;
  for (const auto& one : wanted) {
    const auto was =
        std::find_if(said_.begin(), said_.end(), [&](const Wanted& w) { return w.gpu == one.gpu; });
    const unsigned before = was == said_.end() ? 0 : was->rung;
    if (one.rung == before) continue;
    const bool down = one.rung < before;
    Json body{{"rung", one.rung},
              {"what", ladder()[one.rung].what},
              {"why", printable(one.why, 400)},
              {"alarms", one.alarms}};
    control_.note(caller(), fmt::format("{}{}", act ? "" : "would-", down ? "lift" : "step"),
                  "gpu/" + one.gpu.text, "", std::move(body));
  }
  said_ = wanted;
}

Guardian::View Guardian::view() const {
  const std::lock_guard hold(mutex_);
  return view_;
}

std::string Guardian::metrics() const {
  const View now = view();
  std::string out;
  const auto head = [&](std::string_view name, std::string_view type, std::string_view help) {
    out += fmt::format("# HELP {0} {2}\n# TYPE {0} {1}\n", name, type, help);
  };
  head("bulkhead_alarm", "gauge", "1: this alarm is open.");
  for (const auto& alarm : now.open)
    out += fmt::format(
        "bulkhead_alarm{{alarm=\"{}\",kind=\"{}\",severity=\"{}\",gpu=\"{}\",predicted=\"{}\"}} 1\n",
        label(alarm.id), row_of(alarm.kind).name, name_of(alarm.severity),
        alarm.gpu ? label(alarm.gpu->text) : "", alarm.predicted);
  head("bulkhead_alarms_opened_total", "counter", "Alarms opened since the daemon started.");
  out += fmt::format("bulkhead_alarms_opened_total {}\n", now.opened);
  head("bulkhead_alarms_closed_total", "counter", "Alarms that closed themselves since the daemon started.");
  out += fmt::format("bulkhead_alarms_closed_total {}\n", now.closed);
  head("bulkhead_protect_acting", "gauge", "1: protect.mode is act; 0: observe.");
  out += fmt::format("bulkhead_protect_acting {}\n", now.settings.mode == spec::Protect::Mode::act ? 1 : 0);
  head("bulkhead_protect_actions_total", "counter", "Changes of limits and clocks made by protection.");
  out += fmt::format("bulkhead_protect_actions_total {}\n", now.actions);
  head("bulkhead_protect_failures_total", "counter", "Changes that failed and are tried again.");
  out += fmt::format("bulkhead_protect_failures_total {}\n", now.failures);
  head("bulkhead_protect_stagger_seconds_total", "counter",
       "Time by which starts of leases were, or would have been, delayed.");
  out += fmt::format("bulkhead_protect_stagger_seconds_total {:.3f}\n", now.ramp_wait_s);
  head("bulkhead_gpu_protect_rung", "gauge", "Rung of the ladder that is wanted of a GPU; 0: nothing.");
  for (const auto& [gpu, outlook] : now.outlook)
    out += fmt::format("bulkhead_gpu_protect_rung{{gpu=\"{}\"}} {}\n", label(gpu), outlook.rung);
  head("bulkhead_gpu_room_kelvin", "gauge", "min(ceiling - temperature, margin - guard).");
  for (const auto& [gpu, outlook] : now.outlook)
    if (outlook.room)
      out += fmt::format("bulkhead_gpu_room_kelvin{{gpu=\"{}\"}} {:.1f}\n", label(gpu), *outlook.room);
  head("bulkhead_gpu_forecast_celsius", "gauge", "Temperature in 60 s at the present power.");
  for (const auto& [gpu, outlook] : now.outlook)
    if (outlook.ahead)
      out += fmt::format("bulkhead_gpu_forecast_celsius{{gpu=\"{}\"}} {:.1f}\n", label(gpu),
                         outlook.ahead->celsius);
  return out;
}

Json to_json(const Guardian::View& view) {
  Json out{{"mode", spec::name_of(view.settings.mode)}, {"trouble", view.trouble}};
  out["open"] = Json::array();
  for (const auto& alarm : view.open) out["open"].push_back(to_json(alarm));
  out["recent"] = Json::array();
  for (const auto& alarm : view.recent) out["recent"].push_back(to_json(alarm));
  out["measures"] = Json::array();
  for (const auto& measure : view.measures) {
    const auto& wanted = measure.wanted;
    out["measures"].push_back(
        {{"gpu", wanted.gpu.text},
         {"index", wanted.index},
         {"rung", wanted.rung},
         {"what", measure.what},
         {"doing", name_of(measure.doing)},
         {"words", measure.words},
         {"why", wanted.why},
         {"alarms", wanted.alarms},
         {"bounded", wanted.bounded},
         {"powerLimitWatts",
          measure.limit_mw ? Json(static_cast<double>(*measure.limit_mw) / 1000) : Json(nullptr)},
         {"powerLimitBeforeWatts", measure.limit_before_mw
                                       ? Json(static_cast<double>(*measure.limit_before_mw) / 1000)
                                       : Json(nullptr)},
         {"clocksMhz", measure.clocks_mhz ? Json(*measure.clocks_mhz) : Json(nullptr)}});
  }
  return out;
}

}  // namespace bulkhead::protect
