#include "engine/heal/heal.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <variant>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/limits.hpp"
#include "base/text.hpp"
#include "edge/sysfs/sysfs.hpp"

namespace bulkhead::heal {

namespace {

constexpr std::size_t most_tasks = 200, most_open = 256, most_said = 32, most_words = 400;
// What is older when it is first seen is not acted on: a person may have mended it since.
constexpr std::int64_t stale_s = 900;
constexpr std::size_t file_bytes = 4U << 20U;
constexpr std::size_t most_holders = 16;  // of a GPU
constexpr std::int64_t holders_every_s = 10;
constexpr std::array<std::string_view, 4> doings{"under-way", "helped", "failed", "quarantined"};

Json places_json(const std::vector<slice::Place>& places) {
  Json out = Json::array();
  for (const auto& place : places) out.push_back(Json{{"profile", place.profile}, {"start", place.start}});
  return out;
}

std::int64_t seconds(WallTime at) {
  return std::chrono::duration_cast<std::chrono::seconds>(at.time_since_epoch()).count();
}

std::string label(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out;
}

}  // namespace

std::string_view name_of(Doing doing) { return doings[static_cast<std::size_t>(doing)]; }

Json to_json(const Task& task) {
  Json steps = Json::array(), said = Json::array();
  for (const auto step : task.steps) steps.push_back(name_of(step));
  for (const auto& one : task.said) said.push_back(one);
  return Json{{"id", task.id},
              {"incident", task.incident},
              {"cause", task.cause},
              {"act", name_of(task.act)},
              {"gpu", task.gpu.text},
              {"pci", task.pci.str()},
              {"index", task.index},
              {"gpuInstance", task.gpu_instance ? Json(*task.gpu_instance) : Json(nullptr)},
              {"pid", task.pid},
              {"startTime", task.start_time},
              {"count", task.count},
              {"steps", std::move(steps)},
              {"stage", task.stage},
              {"ours", task.ours},
              {"boot", task.boot},
              {"began", task.at_s},
              {"ended", task.ended_s},
              {"endedMs", task.ended_ms},
              {"doing", name_of(task.doing)},
              {"leases", task.leases},
              {"destroyed", places_json(task.destroyed)},
              {"again", places_json(task.again)},
              {"said", std::move(said)}};
}

Result<Task> task_from_json(const Json& json) {
  const auto bad = [](std::string_view key) {
    return Error(Errc::corrupt, fmt::format("an act's {} cannot be read", key));
  };
  if (!json.is_object()) return bad("record");
  Task out;
  try {  // the library's only way to say that a type is another
    out.id = json.at("id").get<std::int64_t>();
    out.incident = json.at("incident").get<std::string>();
    out.cause = json.at("cause").get<std::string>();
    const auto act = parse_act(json.at("act").get<std::string>());
    if (!act) return bad("act");
    out.act = *act;
    out.gpu.text = json.at("gpu").get<std::string>();
    const auto pci = PciAddress::parse(json.at("pci").get<std::string>());
    if (pci.ok()) out.pci = *pci;
    out.index = json.at("index").get<unsigned>();
    if (!json.at("gpuInstance").is_null()) out.gpu_instance = json.at("gpuInstance").get<unsigned>();
    out.pid = json.at("pid").get<int>();
    out.start_time = json.at("startTime").get<std::uint64_t>();
    out.count = json.at("count").get<std::uint64_t>();
    if (!json.at("steps").is_array()) return bad("steps");
    for (const auto& word : json.at("steps")) {
      bool known = false;
      for (unsigned i = 0; i <= static_cast<unsigned>(Step::uncordon); ++i) {
        if (word.get<std::string>() != name_of(static_cast<Step>(i))) continue;
        out.steps.push_back(static_cast<Step>(i));
        known = true;
      }
      if (!known) return bad("step");
    }
    out.stage = json.at("stage").get<std::size_t>();
    out.ours = json.at("ours").get<bool>();
    out.boot = json.at("boot").get<std::string>();
    out.at_s = json.at("began").get<std::int64_t>();
    out.ended_s = json.at("ended").get<std::int64_t>();
    out.ended_ms = json.at("endedMs").get<std::int64_t>();
    const auto doing = std::find(doings.begin(), doings.end(), json.at("doing").get<std::string>());
    if (doing == doings.end()) return bad("state");
    out.doing = static_cast<Doing>(doing - doings.begin());
    out.leases = json.at("leases").get<std::vector<std::int64_t>>();
    for (const auto& [key, list] : {std::pair("destroyed", &out.destroyed), std::pair("again", &out.again)})
      for (const auto& place : json.at(key))
        list->push_back({.gpu = out.gpu,
                         .profile = place.at("profile").get<std::string>(),
                         .start = place.at("start").get<unsigned>()});
    for (const auto& word : json.at("said")) out.said.push_back(word.get<std::string>());
  } catch (const Json::exception&) {
    return bad("record");
  }
  return out;
}

Healer::Healer(control::Control& control, Place place, Mended mended)
    : control_(control), place_(std::move(place)), mended_(std::move(mended)) {
  const auto boot = sysfs::boot_id(place_.access.root);
  if (boot.ok()) boot_ = *boot;
  read_settings();
  read_file();
  thread_ = std::thread([this] { work(); });
}

Healer::~Healer() {
  {
    const std::lock_guard hold(mutex_);
    ending_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

bool Healer::ending() const {
  const std::lock_guard hold(mutex_);
  return ending_;
}

void Healer::pause(unsigned ms) {
  std::unique_lock hold(mutex_);
  wake_.wait_for(hold, std::chrono::milliseconds(ms), [this] { return ending_; });
}

void Healer::read_settings() {
  spec::Heal wanted;
  std::string trouble;
  if (!place_.node_file.empty()) {
    const auto text = bulkhead::read_file(place_.node_file, limits::node_file_bytes);
    if (!text.ok()) {
      trouble = text.error().message();
    } else {
      const auto parsed = spec::parse(*text);
      if (const auto* node = std::get_if<spec::NodeFile>(&parsed))
        wanted = node->heal.value_or(spec::Heal{});
      else
        trouble = fmt::format("{} has mistakes: bulkhead plan -f {}", place_.node_file.string(),
                              place_.node_file.string());
    }
  }
  const std::lock_guard hold(mutex_);
  view_.trouble = trouble;
  // A file with a mistake is refused whole: what was in force stays.
  if (trouble.empty()) view_.settings = wanted;
}

void Healer::reload() {
  {
    const std::lock_guard hold(mutex_);
    reload_ = true;
  }
  wake_.notify_all();
}

void Healer::read_file() {
  const auto text = bulkhead::read_file(place_.state / "healing.json", file_bytes);
  if (!text.ok()) {
    if (text.error().code() != Errc::not_found) damaged_ = text.error().message();
    return;
  }
  const auto json = parse_json(*text);
  if (!json.ok() || !json->is_array()) {
    damaged_ = "what was done before cannot be read: healing.json in the state directory is damaged";
    return;
  }
  for (const auto& one : *json) {
    auto task = task_from_json(one);
    if (!task.ok()) {
      damaged_ = "what was done before cannot be read: healing.json: " + task.error().message();
      continue;
    }
    last_id_ = std::max(last_id_, task->id);
    tasks_.push_back(std::move(*task));
  }
  view_.tasks.assign(tasks_.rbegin(), tasks_.rend());
}

// Which GPUs a fabric joins: what resets one disturbs the others. On the healer's thread, before any act.
void Healer::look() {
  std::optional<Result<inventory::Host>> host;
  control_.alone([&] { host.emplace(observe::host(place_.access)); });
  const std::lock_guard hold(mutex_);
  looked_ = true;
  if (!host->ok()) return;
  for (const auto& gpu : (*host)->gpus)
    if (gpu.minor) nodes_[gpu.uuid.text] = place_.access.root / fmt::format("dev/nvidia{}", *gpu.minor);
  for (const auto& gpu : (*host)->gpus)
    if (gpu.nvlink.fabric_state && *gpu.nvlink.fabric_state != "not supported") fabric_.insert(gpu.uuid.text);
  // NVIDIA Fabric Manager user guide: 0 is bare metal, where a restart sets up the whole fabric by itself. In
  // 1 and 2 (shared NVSwitch, vGPU) who activated partitions must replay them in time, and that is not us.
  const auto text =
      bulkhead::read_file(place_.access.root / "usr/share/nvidia/nvswitch/fabricmanager.cfg", 1U << 20U);
  if (!text.ok()) return;
  for (const auto line : split_lines(*text))
    if (const auto set = trim(line); set.starts_with("FABRIC_MODE=") && trim(set.substr(12)) != "0")
      partitions_ = fmt::format(
          "Fabric Manager shares its switches ({}): who activated its partitions must replay them after a "
          "restart, which bulkhead does not",
          printable(set, 40));
}

// Under the lock.
bool Healer::keep() {
  if (!damaged_.empty()) return false;  // a damaged file is a person's to read, not ours to overwrite
  // Programs that were ended go first: a tenant's must not push out what was tried on the hardware.
  while (tasks_.size() > most_tasks) {
    const auto small = std::find_if(tasks_.begin(), tasks_.end() - 1,
                                    [](const Task& task) { return task.act == Act::end_process; });
    tasks_.erase(small == tasks_.end() - 1 ? tasks_.begin() : small);
  }
  Json out = Json::array();
  for (const auto& task : tasks_) out.push_back(to_json(task));
  view_.tasks.assign(tasks_.rbegin(), tasks_.rend());
  const auto kept = write_file_atomic(place_.state / "healing.json", dump(out) + "\n", 0600);
  if (!kept.ok()) view_.trouble = "nothing is done: " + kept.error().message();
  return kept.ok();
}

bool Healer::put(const Task& task) {
  const std::lock_guard hold(mutex_);
  auto at = std::find_if(tasks_.begin(), tasks_.end(), [&](const Task& one) { return one.id == task.id; });
  if (at == tasks_.end())
    at = tasks_.insert(at, task);
  else
    *at = task;
  auto& said = at->said;
  if (said.size() > most_said) said.erase(said.begin(), said.end() - most_said);
  for (auto& one : said) one = printable(one, most_words);
  return keep();
}

// Whether what was done about it stands: nothing new came since, and it did help, or it is shut for good.
bool Healer::settled(const diagnose::Incident& incident) const {
  for (auto task = tasks_.rbegin(); task != tasks_.rend(); ++task) {
    if (task->incident != incident.id) continue;
    if (task->doing == Doing::under_way) return true;
    if (task->doing == Doing::failed) return false;  // the next act's turn
    if (incident.last_ms) return *incident.last_ms <= task->ended_ms;
    return incident.count <= task->count;
  }
  return false;
}

void Healer::step(std::span<const diagnose::Incident> open, const sample::Snapshot& gpus,
                  const control::Snapshot& leases, WallTime wall) {
  const std::int64_t now = seconds(wall);
  const std::lock_guard hold(mutex_);
  Host host;
  for (const auto& gpu : leases.gpus) {
    Gpu out{.uuid = gpu.gpu,
            .index = gpu.index,
            .serves = !gpu.cordon && gpu.pool != "none",
            .mig = false,
            .on_fabric = fabric_.contains(gpu.gpu.text),
            .leases = {},
            .holders = {}};
    if (const auto at = holders_.find(gpu.gpu.text); at != holders_.end()) out.holders = at->second;
    for (const auto& seen : gpus.gpus)
      if (seen.uuid == gpu.gpu) out.mig = seen.mig;
    for (const auto id : gpu.leases) {
      const auto at = leases.leases.find(id);
      if (at == leases.leases.end() || lease::over((*at).second->state)) continue;
      for (const auto& part : (*at).second->parts)
        if (part.gpu == gpu.gpu)
          out.leases.push_back({.id = id, .tenant = (*at).second->tenant, .gpu_instance = part.gpu_instance});
    }
    host.gpus.push_back(std::move(out));
  }
  const auto& set = view_.settings;
  const Settings settings{.mode = static_cast<Mode>(set.mode),
                          .most_an_hour = set.most_an_hour,
                          .keep_healthy = set.keep_healthy,
                          .relapse_s = std::int64_t{set.relapse_hours} * 3600};
  std::vector<Done> before;
  bool busy = next_.has_value() || at_work_;
  for (const auto& task : tasks_) {
    if (task.doing == Doing::under_way) {
      busy = true;
      continue;
    }
    before.push_back({.at_s = task.ended_s,
                      .act = task.act,
                      .gpu = task.gpu,
                      .gpu_instance = task.gpu_instance,
                      .helped = task.doing == Doing::helped});
  }
  view_.open.clear();
  for (const auto& incident : open) {
    if (incident.remedy == Act::none || incident.closed || settled(incident)) continue;
    if (view_.open.size() >= most_open) break;
    Fault fault{.id = incident.id,
                .cause = incident.title,
                .remedy = incident.remedy,
                .gpu = {},
                .gpu_instance = incident.gpu_instance,
                .pid = 0,
                .start_time = 0,
                .own = incident.blame == diagnose::Blame::application,
                .sure = incident.confidence != diagnose::Confidence::low};
    Open shown{.incident = incident.id, .index = {}, .decision = {}};
    for (const auto& gpu : gpus.gpus) {
      if (!incident.at || gpu.pci != *incident.at) continue;
      fault.gpu = gpu.uuid;
      shown.index = gpu.index;
    }
    // What ended every program of a slice, and is nobody's doing, is mended at the slice: no one process is
    // meant.
    if (incident.remedy == Act::end_process && incident.blast == diagnose::Blast::slice &&
        incident.gpu_instance && incident.charged.empty())
      fault.remedy = Act::drain_slice;
    if (incident.remedy == Act::end_process) {
      for (const auto& evidence : incident.evidence)
        if (evidence.pid && !evidence.forged) fault.pid = static_cast<int>(*evidence.pid);
    }
    shown.decision = decide(fault, host, before, settings, now);
    auto& decision = shown.decision;
    if (incident.last_ms && now - *incident.last_ms / 1000 > stale_s)
      decision.held.push_back(fmt::format("it is {} minutes old: a person may have mended it since",
                                          (now - *incident.last_ms / 1000) / 60));
    if (decision.act == Act::end_process && incident.charged.empty())
      decision.held.push_back("no tenant is charged for it: its process may be innocent");
    if (decision.act == Act::restart_fabric_manager && !partitions_.empty())
      decision.held.push_back(partitions_);
    if (!damaged_.empty()) decision.held.push_back(damaged_);
    decision.now = looked_ && decision.now && decision.held.empty() && decision.act != Act::none;
    if (decision.now && !busy) {
      Task task{.id = ++last_id_,
                .incident = incident.id,
                .cause = printable(incident.title, most_words),
                .act = decision.act,
                .gpu = fault.gpu,
                .pci = incident.at.value_or(PciAddress{}),
                .index = shown.index.value_or(0),
                .gpu_instance = fault.gpu_instance,
                .pid = fault.pid};
      task.count = incident.count;
      task.steps = decision.steps;
      task.boot = boot_;
      task.at_s = now;
      next_ = std::move(task);
      busy = true;
      wake_.notify_all();
    }
    view_.open.push_back(std::move(shown));
  }
  const bool may_reset = std::any_of(view_.open.begin(), view_.open.end(), [](const Open& one) {
    return one.decision.act == Act::reset_gpu || one.decision.act == Act::rescan;
  });
  if (may_reset && looked_ && now - holders_at_ >= holders_every_s) {
    holders_at_ = now;
    holders_wanted_ = true;
    wake_.notify_all();
  }
}

Healer::View Healer::view() const {
  const std::lock_guard hold(mutex_);
  View out = view_;
  if (!damaged_.empty()) out.trouble = damaged_;
  return out;
}

std::string Healer::metrics() const {
  const std::lock_guard hold(mutex_);
  std::array<std::array<std::uint64_t, 4>, acts> counts{};
  for (const auto& task : tasks_)
    ++counts[static_cast<std::size_t>(task.act)][static_cast<std::size_t>(task.doing)];
  std::string out =
      "# HELP bulkhead_heal_acts Acts of healing that are remembered (the last 200), by how they ended.\n"
      "# TYPE bulkhead_heal_acts gauge\n";
  for (std::size_t act = 0; act < acts; ++act)
    for (std::size_t doing = 0; doing < doings.size(); ++doing)
      if (counts[act][doing] > 0)
        out += fmt::format("bulkhead_heal_acts{{act=\"{}\",outcome=\"{}\"}} {}\n",
                           name_of(static_cast<Act>(act)), doings[doing], counts[act][doing]);
  out += fmt::format(
      "# HELP bulkhead_heal_waiting Open incidents with a remedy that waits for a person or its turn.\n"
      "# TYPE bulkhead_heal_waiting gauge\nbulkhead_heal_waiting {}\n"
      "# HELP bulkhead_heal_mode What is done about faults: 1 for the mode in force.\n"
      "# TYPE bulkhead_heal_mode gauge\nbulkhead_heal_mode{{mode=\"{}\"}} 1\n",
      view_.open.size(), label(spec::name_of(view_.settings.mode)));
  return out;
}

Json to_json(const Healer::View& view) {
  Json open = Json::array(), tasks = Json::array();
  for (const auto& one : view.open) {
    Json row = to_json(one.decision);
    row["incident"] = one.incident;
    row["index"] = one.index ? Json(*one.index) : Json(nullptr);
    open.push_back(std::move(row));
  }
  for (const auto& task : view.tasks) {
    Json row = to_json(task);
    for (const char* inner : {"boot", "ours", "stage", "count", "startTime", "endedMs"}) row.erase(inner);
    const auto when = [](std::int64_t at) {
      return at == 0 ? Json(nullptr) : Json(rfc3339(WallTime(std::chrono::seconds(at))));
    };
    row["began"] = when(task.at_s);
    row["ended"] = when(task.ended_s);
    if (task.doing == Doing::under_way && task.stage < task.steps.size())
      row["step"] = name_of(task.steps[task.stage]);
    tasks.push_back(std::move(row));
  }
  return Json{{"mode", spec::name_of(view.settings.mode)},
              {"mostAnHour", view.settings.most_an_hour},
              {"keepHealthy", view.settings.keep_healthy},
              {"relapseHours", view.settings.relapse_hours},
              {"trouble", view.trouble},
              {"open", std::move(open)},
              {"acts", std::move(tasks)}};
}

// ---- the thread
Result<std::vector<std::vector<process::Opener>>> Healer::openers(
    std::span<const std::filesystem::path> nodes) const {
  BH_TRY(const auto all, process::openers(nodes));
  std::vector<std::vector<process::Opener>> out(nodes.size());
  for (const auto& one : all.who) {
    if (one.same_program) continue;  // the sampler and the arbiters of shares let go when they are asked to
    for (const auto file : one.files)
      if (file < out.size() && out[file].size() < most_holders) out[file].push_back(one);
  }
  return out;
}

std::string words_of(const process::Opener& holder) {
  const std::string_view cgroup = holder.who.cgroup;
  // A unit of the system alone is stopped by its name, and only a name that a shell takes as it is. A user's
  // own units, and what a container makes below its cgroup, are called as their owner likes.
  constexpr std::string_view system = "/system.slice/";
  std::string end = fmt::format("kill {}", holder.who.pid);
  if (cgroup.starts_with(system) && cgroup.ends_with(".service")) {
    const auto unit = cgroup.substr(system.size());
    const bool plain =
        unit.front() != '-' && unit.size() <= 120 && std::all_of(unit.begin(), unit.end(), [](char c) {
          return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
                 c == '_' || c == '.' || c == '@' || c == ':';
        });
    if (plain) end = fmt::format("systemctl stop {}", unit);
  }
  return fmt::format("pid {} ({}){} has it open, to end it: {}", holder.who.pid,
                     printable(holder.who.name, 32),
                     cgroup.empty() || cgroup == "/" ? "" : " in " + printable(holder.who.cgroup, 120), end);
}

void Healer::look_for_holders() {
  std::vector<std::string> uuids;
  std::vector<std::filesystem::path> files;
  {
    const std::lock_guard hold(mutex_);
    for (const auto& [uuid, file] : nodes_) {
      uuids.push_back(uuid);
      files.push_back(file);
    }
  }
  const auto found = openers(files);
  std::map<std::string, std::vector<std::string>> holders;
  for (std::size_t i = 0; i < uuids.size(); ++i) {
    if (!found.ok()) {  // which is not nobody
      holders[uuids[i]] = {"who has it open is not known: " + printable(found.error().message(), 200)};
      continue;
    }
    for (const auto& one : (*found)[i]) holders[uuids[i]].push_back(words_of(one));
  }
  const std::lock_guard hold(mutex_);
  holders_ = std::move(holders);
}

void Healer::work() {
  look();
  while (true) {
    std::optional<Task> task;
    bool read = false, holders = false;
    {
      std::unique_lock hold(mutex_);
      const auto begun = [&] {
        return std::find_if(tasks_.begin(), tasks_.end(),
                            [](const Task& one) { return one.doing == Doing::under_way; });
      };
      wake_.wait(hold,
                 [&] { return ending_ || reload_ || holders_wanted_ || next_ || begun() != tasks_.end(); });
      if (ending_) return;
      std::swap(read, reload_);
      std::swap(holders, holders_wanted_);
      // What a killed daemon had begun goes first, whatever the mode is by now: half an act helps nobody.
      if (const auto at = begun(); at != tasks_.end())
        task = *at;
      else
        task = std::exchange(next_, std::nullopt);
      at_work_ = task.has_value();  // it is in no list until it is written down: nothing else is decided
    }
    if (read) read_settings();
    if (holders) look_for_holders();
    if (!task) continue;
    run(std::move(*task));
    const std::lock_guard hold(mutex_);
    at_work_ = false;
  }
}

void Healer::run(Task task) {
  const auto end = [&](Doing doing) {
    task.doing = doing;
    task.ended_ms = wall_now().time_since_epoch().count();
    task.ended_s = task.ended_ms / 1000;
    away(false);
    (void)put(task);
    control_.note({.user = "bulkhead", .tenant = {}, .role = access::Role::admin, .from = "healing"},
                  std::string(name_of(doing)), "gpu/" + task.gpu.text, "",
                  Json{{"act", name_of(task.act)}, {"incident", task.incident}, {"said", task.said}});
  };
  // It was not durable: not begun. It is decided again in a second.
  if (!put(task)) return pause(5'000);
  while (task.stage < task.steps.size()) {
    if (ending()) return away(false);
    Status done = ok_status();
    switch (task.steps[task.stage]) {
      case Step::cordon:
        done = shut(task);
        break;
      case Step::evict:
        done = evict(task);
        break;
      case Step::let_go:
        away(true);
        break;
      case Step::act:
        done = act(task);
        break;
      case Step::gate:
        away(false);
        done = check(task);
        break;
      case Step::uncordon:
        done = open(task);
        break;
    }
    if (ending()) return away(false);  // the next daemon does this stage again
    if (!done.ok()) {
      task.said.push_back(fmt::format("{}: {}", name_of(task.steps[task.stage]), done.error().message()));
      return end(Doing::failed);
    }
    ++task.stage;
    if (!put(task)) {
      // What follows may be begun again without harm, but not be done unseen.
      while (!ending() && !put(task)) pause(5'000);
    }
  }
  const bool shut_for_good = task.act == Act::quarantine;
  end(shut_for_good ? Doing::quarantined : Doing::helped);
  if (!shut_for_good && mended_)
    mended_(task.incident, fmt::format("{} helped: {}", name_of(task.act), join(task.said, "; ")));
}

}  // namespace bulkhead::heal
