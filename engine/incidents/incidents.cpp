#include "engine/incidents/incidents.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <set>
#include <tuple>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"
#include "core/logs/logs.hpp"
#include "edge/sysfs/sysfs.hpp"

namespace bulkhead::incidents {

namespace {

constexpr std::string_view kernel_log = "/dev/kmsg";
constexpr std::size_t most_closed = 1'000, most_why = 400, most_text = 256, most_line = 8'192;
constexpr std::size_t file_bytes = 64U << 20U;
constexpr std::uint64_t second_ns = 1'000'000'000;
// Two events that begin one incident may come in either order.
constexpr std::int64_t together_ms = 5'000;
// With more events than these the file is written once in so long.
constexpr std::size_t many = 1'000;
constexpr std::uint64_t seldom_ns = 5 * second_ns;

std::int64_t ms_of(WallTime at) { return at.time_since_epoch().count(); }
WallTime at_ms(std::int64_t ms) { return WallTime(std::chrono::milliseconds(ms)); }
std::string compact(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::string text_of(const Json& row, const char* key, std::size_t most) {
  const auto at = row.find(key);
  if (at == row.end() || !at->is_string()) return {};
  return at->get_ref<const std::string&>().substr(0, most);
}
std::int64_t number_of(const Json& row, const char* key) {
  const auto at = row.find(key);
  return at != row.end() && at->is_number_integer() ? at->get<std::int64_t>() : 0;
}
std::optional<unsigned> unsigned_of(const Json& row, const char* key) {
  const auto at = row.find(key);
  if (at == row.end() || !at->is_number_unsigned() || at->get<std::uint64_t>() > 99'999) return std::nullopt;
  return at->get<unsigned>();
}

// A line is kept as it was read, and read again: the file has nothing to say that a log could not.
std::string written(const std::vector<diagnose::Evidence>& evidence) {
  std::string out = "[";
  for (const auto& one : evidence) {
    Json row = Json::object();
    row["at"] = one.wall_ms.value_or(0);
    if (!one.tenant.empty()) row["tenant"] = one.tenant;
    if (one.source == diagnose::Source::log) {
      row["number"] = one.number;
      row["line"] = one.line;
      if (one.file != kernel_log) row["file"] = one.file;
    } else {
      if (!one.at || !one.xid) continue;
      row["gpu"] = one.at->str();
      row["xid"] = *one.xid;
      if (one.gpu_instance) row["instance"] = *one.gpu_instance;
    }
    out += out.size() > 1 ? ",\n" : "\n";
    out += compact(row);
  }
  return out + "]";
}

std::vector<diagnose::Evidence> read(const Json& rows, const logs::Matcher& matcher, std::size_t most) {
  std::vector<diagnose::Evidence> out;
  if (!rows.is_array()) return out;
  for (const auto& row : rows) {
    if (!row.is_object() || out.size() >= most) continue;
    const auto wall = number_of(row, "at");
    if (const auto line = text_of(row, "line", most_line); !line.empty()) {
      auto found = matcher.match(line, at_ms(wall), 1);
      if (found.hits.empty()) continue;
      found.hits.front().number =
          static_cast<std::uint64_t>(std::max<std::int64_t>(number_of(row, "number"), 0));
      const auto file = text_of(row, "file", most_text);
      out.push_back(diagnose::from(std::move(found.hits.front()), file.empty() ? kernel_log : file));
      // Of others than the kernel only what could be vouched for was kept.
      if (!file.empty()) out.back().vouched = true;
    } else {
      const auto gpu = PciAddress::parse(text_of(row, "gpu", 64));
      const auto xid = unsigned_of(row, "xid");
      if (!gpu.ok() || !xid) continue;
      out.push_back(diagnose::event(diagnose::Source::nvml, *gpu, *xid, unsigned_of(row, "instance"), wall));
    }
    out.back().wall_ms = wall;
    out.back().tenant = text_of(row, "tenant", most_text);
  }
  return out;
}

std::string base_of(const std::string& id) { return id.substr(0, id.rfind('#')); }

}  // namespace

Watcher::Watcher(Settings settings) : settings_(std::move(settings)) {
  read_file();
  thread_ = std::thread([this] { work(); });
}

void Watcher::end() {
  ending_ = true;
  if (thread_.joinable()) thread_.join();
  const std::lock_guard hold(ear_mutex_);
  ++rests_;
  ear_.reset();
}

void Watcher::work() {
  static const logs::Matcher matcher;
  diagnose::Live live{.root = settings_.root,
                      .nvml_library = settings_.nvml_library,
                      .name = settings_.name,
                      .look =
                          [this] {
                            const std::lock_guard writing(file_mutex_);
                            if (dirty_ && monotonic_ns() - wrote_ns_ > seldom_ns) (void)keep();
                          },
                      .look_ns = settings_.look_ns,
                      .watch = nullptr,
                      .start_watch = false,
                      .ear = [this] { return ear(); },
                      .before = read(loaded_, matcher, settings_.most),
                      .after = sequence_,
                      .heard = heard_,
                      .fabric_unit = settings_.fabric_unit,
                      .most = settings_.most,
                      .keep_ms = settings_.keep_s * 1000};
  loaded_ = Json();
  const auto done = diagnose::follow(
      live, matcher, [this] { return ending_.load(); }, [this](const diagnose::Followed& now) { take(now); });
  {
    const std::lock_guard writing(file_mutex_);
    if (dirty_) (void)keep();
  }
  if (done.ok()) return;
  const std::lock_guard hold(mutex_);
  told_.kernel = told_.driver = false;
  told_.diagnosis.notes.push_back(done.error().message());
}

// The driver's events break off when the driver is unloaded, when it must have no clients, when its library
// crashes; whoever follows them is started again.
Ear Watcher::ear() {
  const std::lock_guard hold(ear_mutex_);
  if (rests_ > 0 || settings_.program.empty()) return nullptr;
  const auto now = monotonic_ns();
  if (ear_ && ear_->fd() < 0) {
    ear_.reset();
    next_try_ns_ = now + wait_ns_;
  }
  if (ear_ && ear_->gpus() > 0) wait_ns_ = second_ns;
  if (!ear_ && now >= next_try_ns_) {
    wait_ns_ = std::clamp<std::uint64_t>(wait_ns_ * 2, second_ns, 60 * second_ns);
    next_try_ns_ = now + wait_ns_;
    if (auto started = events::Watch::spawn(settings_.program, "follow-faults", settings_.nvml_library);
        started.ok())
      ear_ = std::make_shared<events::Watch>(std::move(*started));
  }
  return ear_;
}

bool Watcher::rest(unsigned ms) {
  std::weak_ptr<events::Watch> gone;
  {
    const std::lock_guard hold(ear_mutex_);
    ++rests_;
    gone = ear_;
    ear_.reset();  // ends its process, unless its batch is being read
  }
  const auto until = monotonic_ns() + std::uint64_t{ms} * 1'000'000;
  while (!gone.expired()) {
    if (monotonic_ns() > until) return false;
    ::usleep(5'000);
  }
  return true;
}

void Watcher::resume() {
  const std::lock_guard hold(ear_mutex_);
  if (rests_ == 0 || --rests_ > 0) return;
  next_try_ns_ = wait_ns_ = 0;
}

void Watcher::read_file() {
  if (const auto boot = sysfs::boot_id(settings_.root); boot.ok()) boot_ = *boot;
  const auto path = settings_.state / "incidents.json";
  const auto text = bulkhead::read_file(path, file_bytes);
  if (!text.ok()) {
    std::error_code failed;
    if (std::filesystem::exists(path, failed)) trouble_ = text.error().message();
    return;
  }
  auto json = parse_json(*text);
  if (!json.ok() || !json->is_object() || number_of(*json, "version") != 1) {
    trouble_ = fmt::format("{} is damaged, or of another version: what the kernel's log has is read anew",
                           path.string());
    return;
  }
  if (const auto rows = json->find("closed"); rows != json->end() && rows->is_object())
    for (const auto& [id, row] : rows->items())
      if (row.is_object() && closed_.size() < most_closed && id.size() <= most_text)
        closed_[id] = {number_of(row, "at"),
                       static_cast<std::uint64_t>(std::max<std::int64_t>(number_of(row, "count"), 0)),
                       printable(text_of(row, "why", most_why), most_why)};
  if (const auto rows = json->find("names"); rows != json->end() && rows->is_object())
    for (const auto& [id, row] : rows->items())
      if (row.is_object() && known_.size() < settings_.most && id.size() <= most_text)
        known_[id] = {base_of(id), text_of(row, "who", most_why), number_of(row, "first"),
                      number_of(row, "last")};
  booted_ms_ = number_of(*json, "booted");
  if (const auto rows = json->find("events"); rows != json->end() && rows->is_array())
    loaded_ = std::move(*rows);
  // The log's place stays over a boot: what was said while nobody was here yet is still to be heard.
  if (const auto log = json->find("fabricLog");
      log != json->end() && log->is_array() && log->size() == 3 &&
      std::ranges::all_of(*log, [](const Json& one) { return one.is_number_unsigned(); }))
    heard_.log = {(*log)[0].get<std::uint64_t>(), (*log)[1].get<std::uint64_t>(),
                  (*log)[2].get<std::uint64_t>()};
  if (text_of(*json, "boot", most_text) == boot_) {
    heard_.cursor = text_of(*json, "journal", most_line);
    if (const auto at = json->find("sequence"); at != json->end() && at->is_number_unsigned())
      sequence_ = at->get<std::uint64_t>();
  } else if (loaded_.is_array()) {
    for (const auto& row : loaded_)
      if (row.is_object()) booted_ms_ = std::max(booted_ms_, number_of(row, "at"));
  }
  kept_ = loaded_.is_array() ? compact(loaded_) : "[]";
}

// A disk may take its time: only those who change the file wait for it, never those who read what is known.
bool Watcher::keep() {
  Json head = Json::object(), closed = Json::object(), names = Json::object();
  {
    const std::lock_guard hold(mutex_);
    for (const auto& [id, one] : closed_)
      closed[id] = Json{{"at", one.at_ms}, {"count", one.count}, {"why", one.why}};
  }
  for (const auto& [id, one] : known_)
    names[id] = Json{{"who", one.who}, {"first", one.first_ms}, {"last", one.last_ms}};
  head["version"] = 1;
  head["boot"] = boot_;
  if (sequence_) head["sequence"] = *sequence_;
  if (!heard_.cursor.empty()) head["journal"] = heard_.cursor;
  if (heard_.log.inode != 0)
    head["fabricLog"] = Json::array({heard_.log.device, heard_.log.inode, heard_.log.offset});
  head["booted"] = booted_ms_;
  head["closed"] = std::move(closed);
  head["names"] = std::move(names);
  std::string text = compact(head);
  text.pop_back();
  text += ",\n\"events\":" + kept_ + "}\n";
  wrote_ns_ = monotonic_ns();
  const auto done = write_file_atomic(settings_.state / "incidents.json", text, 0600);
  dirty_ = !done.ok();
  const std::lock_guard hold(mutex_);
  trouble_ = done.ok() ? "" : "not durable: " + done.error().message();
  return done.ok();
}

void Watcher::take(const diagnose::Followed& now) {
  const std::lock_guard writing(file_mutex_);
  kept_ = now.evidence != nullptr ? written(*now.evidence) : "[]";
  const std::size_t events = now.evidence != nullptr ? now.evidence->size() : 0;
  std::int64_t loaded = 0;
  if (now.evidence != nullptr)
    for (const auto& one : *now.evidence)
      if (one.rule != nullptr && one.rule->id == "context.driver" && !one.forged && one.wall_ms)
        loaded = std::max(loaded, *one.wall_ms);
  auto seen = now.diagnosis.incidents;
  give_names(seen);
  sequence_ = now.sequence;
  heard_ = now.heard;
  dirty_ = true;
  // Durable first: what is acted upon is known by the same name after kill -9.
  if (events <= many || monotonic_ns() - wrote_ns_ > seldom_ns) (void)keep();
  auto told = now;
  told.diagnosis.incidents.clear();
  told.evidence = nullptr;
  const std::lock_guard hold(mutex_);
  seen_ = std::move(seen);
  told_ = std::move(told);
  loaded_ms_ = loaded;
  std::erase_if(closed_, [&](const auto& one) { return !known_.contains(one.first); });
}

// What core calls "#1" is the first of what is kept now. A name that is told outside stays with its incident,
// also when older ones are forgotten: it is the time of its first event.
void Watcher::give_names(std::vector<diagnose::Incident>& seen) {
  std::map<std::string, Known> names;
  std::set<std::string> taken;
  const auto known_as = [&](const diagnose::Incident& one, bool exactly) -> std::string {
    const auto base = base_of(one.id), who = join(one.tenants, ", ");
    const auto place = one.at ? "@" + one.at->str() : std::string();
    std::optional<std::tuple<bool, std::int64_t>> best;
    std::string out;
    for (const auto& [id, its] : known_) {
      if (taken.contains(id) || !one.first_ms || !one.last_ms) continue;
      const auto apart = std::abs(its.first_ms - *one.first_ms);
      if (exactly ? its.base != base
                  : apart > together_ms || place.empty() || its.base.find(place) == std::string::npos)
        continue;
      if (*one.first_ms > its.last_ms + together_ms || *one.last_ms < its.first_ms - together_ms) continue;
      if (const std::tuple<bool, std::int64_t> match{its.who != who, apart}; !best || match < *best) {
        best = match;
        out = id;
      }
    }
    return out;
  };
  std::vector<bool> named(seen.size(), false);
  for (const bool exactly : {true, false})
    for (std::size_t i = 0; i < seen.size(); ++i) {
      auto& one = seen[i];
      if (named[i]) continue;
      std::string id = known_as(one, exactly);
      if (id.empty() && exactly) continue;
      if (id.empty()) {
        std::string stamp = one.first_ms ? rfc3339(at_ms(*one.first_ms)) : "0";
        std::erase_if(stamp, [](char c) { return c == '-' || c == ':'; });
        const std::string first = base_of(one.id) + "#" + stamp;
        id = first;
        for (unsigned n = 2; taken.contains(id) || known_.contains(id); ++n)
          id = fmt::format("{}-{}", first, n);
      }
      const auto before = known_.find(id);
      Known its{base_of(one.id), join(one.tenants, ", ").substr(0, most_why), one.first_ms.value_or(0),
                one.last_ms.value_or(0)};
      if (before != known_.end()) its.first_ms = std::min(its.first_ms, before->second.first_ms);
      taken.insert(id);
      names[id] = std::move(its);
      one.id = std::move(id);
      named[i] = true;
    }
  known_ = std::move(names);
}

std::optional<Watcher::Closed> Watcher::closed_as(const diagnose::Incident& incident,
                                                  std::int64_t now_ms) const {
  const auto last = incident.last_ms.value_or(now_ms);
  if (incident.closed)
    return Closed{last, incident.count,
                  incident.rule.starts_with("fm.") ? "the Fabric Manager was started after it"
                                                   : "by the driver's own word"};
  if (const auto at = closed_.find(incident.id); at != closed_.end() && last <= at->second.at_ms)
    return at->second;
  // What must be replaced is not mended by being started again.
  const auto remedy = incident.remedy;
  if (last <= booted_ms_ && remedy != heal::Act::quarantine)
    return Closed{last, incident.count, "the host was booted after it"};
  if (last < loaded_ms_ && remedy <= heal::Act::reset_gpu)
    return Closed{loaded_ms_, incident.count, "the driver was loaded anew after it"};
  if (remedy == heal::Act::quarantine || remedy == heal::Act::reboot) return std::nullopt;
  const bool small = incident.blast <= diagnose::Blast::process && remedy <= heal::Act::end_process;
  const auto quiet = small ? settings_.quiet_process_s : settings_.quiet_s;
  if (now_ms - last > quiet * 1000)
    return Closed{last + quiet * 1000, incident.count, fmt::format("nothing of it for {} min", quiet / 60)};
  return std::nullopt;
}

std::shared_ptr<const std::vector<diagnose::Incident>> Watcher::open(WallTime now) const {
  auto out = std::make_shared<std::vector<diagnose::Incident>>();
  const std::lock_guard hold(mutex_);
  for (const auto& one : seen_)
    if (!closed_as(one, ms_of(now))) out->push_back(one);
  return out;
}

bool Watcher::close(const std::string& id, const std::string& why, WallTime now) {
  const std::lock_guard writing(file_mutex_);
  std::unique_lock hold(mutex_);
  const auto at = std::find_if(seen_.begin(), seen_.end(), [&](const auto& one) { return one.id == id; });
  if (at == seen_.end() || closed_as(*at, ms_of(now))) return false;
  if (closed_.size() >= most_closed) {
    const auto oldest = std::min_element(closed_.begin(), closed_.end(), [](const auto& a, const auto& b) {
      return a.second.at_ms < b.second.at_ms;
    });
    closed_.erase(oldest);
  }
  closed_[id] = {ms_of(now), at->count, printable(why, most_why)};
  hold.unlock();
  return keep();
}

Watcher::View Watcher::view(WallTime now) const {
  View out;
  const std::lock_guard hold(mutex_);
  for (const auto& one : seen_) {
    Incident row{.what = one};
    if (auto closed = closed_as(one, ms_of(now))) {
      row.open = false;
      row.closed_why = std::move(closed->why);
      row.closed_ms = closed->at_ms;
    }
    out.incidents.push_back(std::move(row));
  }
  // Open ones first; gravest first among each, as they came.
  std::stable_sort(out.incidents.begin(), out.incidents.end(),
                   [](const Incident& a, const Incident& b) { return a.open && !b.open; });
  out.notes = told_.diagnosis.notes;
  if (!trouble_.empty()) out.notes.push_back(trouble_);
  out.kernel_events = told_.kernel_events;
  out.driver_events = told_.driver_events;
  out.lost = told_.lost;
  out.kernel = told_.kernel;
  out.driver = told_.driver;
  return out;
}

std::string Watcher::metrics(WallTime now) const {
  std::map<std::string, std::uint64_t> by;
  const auto seen = view(now);
  for (const auto& one : seen.incidents)
    if (one.open) ++by[std::string(xid::name_of(one.what.severity))];
  std::string out =
      "# HELP bulkhead_incidents_open Incidents of the kernel's log and the driver's events that are open.\n"
      "# TYPE bulkhead_incidents_open gauge\n";
  for (const auto& severity :
       {xid::Severity::info, xid::Severity::warn, xid::Severity::critical, xid::Severity::unknown})
    out += fmt::format("bulkhead_incidents_open{{severity=\"{}\"}} {}\n", xid::name_of(severity),
                       by[std::string(xid::name_of(severity))]);
  out += fmt::format(
      "# HELP bulkhead_fault_events_total Xids that were told, by who told them; the same one is told by "
      "both.\n"
      "# TYPE bulkhead_fault_events_total counter\n"
      "bulkhead_fault_events_total{{source=\"kernel\"}} {}\nbulkhead_fault_events_total{{source=\"driver\"}} "
      "{}\n"
      "# HELP bulkhead_kernel_log_lost_total Records of the kernel's log overwritten before they were read.\n"
      "# TYPE bulkhead_kernel_log_lost_total counter\nbulkhead_kernel_log_lost_total {}\n"
      "# HELP bulkhead_fault_source_up Whether that source can be read.\n"
      "# TYPE bulkhead_fault_source_up gauge\n"
      "bulkhead_fault_source_up{{source=\"kernel\"}} {}\nbulkhead_fault_source_up{{source=\"driver\"}} {}\n",
      seen.kernel_events, seen.driver_events, seen.lost, seen.kernel ? 1 : 0, seen.driver ? 1 : 0);
  return out;
}

Json to_json(const Incident& incident) {
  const auto& in = incident.what;
  const auto when = [](const std::optional<std::int64_t>& ms) {
    return ms ? Json(rfc3339(at_ms(*ms))) : Json(nullptr);
  };
  const auto number = [](const std::optional<unsigned>& it) { return it ? Json(*it) : Json(nullptr); };
  const auto words = [](const std::vector<std::string>& all) {
    Json out = Json::array();
    for (const auto& one : all) out.push_back(printable(one, 1'000));
    return out;
  };
  Json out{{"id", in.id},
           {"title", in.title},
           {"cause", in.cause},
           {"severity", xid::name_of(in.severity)},
           {"open", incident.open},
           {"at", in.at ? Json(in.at->str()) : Json(nullptr)},
           {"gpuInstance", number(in.gpu_instance)},
           {"xid", number(in.xid)},
           {"sxid", number(in.sxid)},
           {"rule", in.rule},
           {"blast", diagnose::name_of(in.blast)},
           {"blastWhy", in.blast_why},
           {"blame", diagnose::name_of(in.blame)},
           {"blameWhy", in.blame_why},
           {"charged", in.charged},
           {"tenants", words(in.tenants)},
           {"processes", words(in.processes)},
           {"confidence", diagnose::name_of(in.confidence)},
           {"confidenceWhy", in.confidence_why},
           {"remedy", heal::name_of(in.remedy)},
           {"advice", in.advice},
           {"commands", words(in.commands)},
           {"count", in.count},
           {"first", when(in.first_ms)},
           {"last", when(in.last_ms)},
           {"notes", words(in.notes)},
           {"evidenceLines", in.evidence_lines}};
  Json evidence = Json::array();
  for (const auto& one : in.evidence)
    evidence.push_back(Json{{"source", diagnose::name_of(one.source)}, {"text", printable(one.line, 2'000)}});
  out["evidence"] = std::move(evidence);
  if (!incident.open) {
    out["closedWhy"] = incident.closed_why;
    out["closedAt"] = when(incident.closed_ms);
  }
  return out;
}

Json to_json(const Watcher::View& view) {
  Json items = Json::array(), notes = Json::array();
  for (const auto& one : view.incidents) items.push_back(to_json(one));
  for (const auto& note : view.notes) notes.push_back(printable(note, 400));
  return Json{{"items", std::move(items)},
              {"notes", std::move(notes)},
              {"kernel", view.kernel},
              {"driver", view.driver},
              {"kernelEvents", view.kernel_events},
              {"driverEvents", view.driver_events},
              {"kernelRecordsLost", view.lost}};
}

}  // namespace bulkhead::incidents
