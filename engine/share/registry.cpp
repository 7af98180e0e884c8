#include "engine/share/registry.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>

#include "base/limits.hpp"
#include "base/text.hpp"

namespace bulkhead::share {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t file_bytes = 1U << 20U;
constexpr std::size_t most_words = 64;

std::string_view name_of(OnEscape what) {
  switch (what) {
    case OnEscape::report:
      return "report";
    case OnEscape::pause:
      return "pause";
    case OnEscape::end:
      return "end";
  }
  return "report";
}

Error bad(std::string_view field) {
  return Error(Errc::corrupt, fmt::format("registry: field {} is not what it should be", field));
}

// Unsigned numbers from a document that anything may have written.
std::optional<std::uint64_t> number(const Json& json, const char* key) {
  const auto at = json.find(key);
  if (at == json.end() || !at->is_number_unsigned()) return std::nullopt;
  return at->get<std::uint64_t>();
}

std::optional<double> fraction(const Json& json, const char* key) {
  const auto at = json.find(key);
  if (at == json.end() || !at->is_number()) return std::nullopt;
  const double value = at->get<double>();
  if (!std::isfinite(value) || value < 0 || value > 16) return std::nullopt;
  return value;
}

std::string text(const Json& json, const char* key) {
  const auto at = json.find(key);
  return at != json.end() && at->is_string() ? printable(at->get<std::string>(), 256) : std::string();
}

fs::path file(const Place& place, std::uint64_t id, const char* kind) {
  return place.run_dir() / fmt::format("{}{}", id, kind);
}

bool lives(const Place& place, std::uint64_t id) {
  UniqueFd fd(::open(file(place, id, ".lock").c_str(), O_RDWR | O_CLOEXEC));
  // Not root: the launcher's pid has to do.
  if (!fd && errno == EACCES) return ::kill(static_cast<pid_t>(id), 0) == 0 || errno == EPERM;
  if (!fd) return false;
  if (::flock(fd.get(), LOCK_SH | LOCK_NB) == 0) return false;  // released when fd closes
  return errno == EWOULDBLOCK;
}

// What to do about a directory that cannot be written.
Error with_advice(Error error) {
  switch (error.native()) {
    case EACCES:
    case EPERM:
      return std::move(error).with_hint("run as root");
    case EROFS:
      return std::move(error).with_hint(
          "tenants meet in /run/bulkhead: make it writable (mount -t tmpfs tmpfs "
          "/run/bulkhead; in a container --tmpfs /run/bulkhead)");
    case ENOSPC:
      return std::move(error).with_hint("make room: df -h /run; df -i /run");
    default:
      return error;
  }
}

}  // namespace

Result<UniqueFd> lock_table(const Place& place, bool wait) {
  // A file of its own that only root can open: who can open a directory can lock it, and keep it locked.
  const auto path = fs::path(place.run_dir().string() + ".lock");
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) return with_advice(errno_error(fmt::format("open {}", path.string()), errno));
  while (::flock(fd.get(), LOCK_EX | (wait ? 0 : LOCK_NB)) != 0)
    if (errno != EINTR) return errno_error(fmt::format("lock {}", path.string()), errno);
  return fd;
}

Json to_json(const Asked& asked) {
  Json out{{"id", asked.id},
           {"name", asked.name},
           {"class", sharing::name_of(asked.cls)},
           {"weight", asked.weight}};
  if (asked.ceiling) out["ceilingPercent"] = *asked.ceiling;
  if (asked.latency_us) out["latencyMicroseconds"] = *asked.latency_us;
  if (asked.memory) out["memoryBytes"] = asked.memory->count;
  out["gpu"] = asked.gpu;
  out["onEscape"] = name_of(asked.on_escape);
  out["held"] = asked.held;
  out["mps"] = asked.mps;
  // The program alone: its arguments may hold secrets, and anybody may read the table.
  out["program"] = asked.command.empty() ? std::string() : printable(asked.command.front(), 256);
  return out;
}

Result<Asked> asked_from(const Json& json) {
  if (!json.is_object()) return bad("(document)");
  Asked out;
  const auto id = number(json, "id");
  if (!id || *id == 0) return bad("id");
  out.id = *id;
  out.name = text(json, "name");
  BH_TRY(out.cls, sharing::parse_class(text(json, "class")));
  const auto weight = number(json, "weight");
  if (!weight || *weight < sharing::min_weight || *weight > sharing::max_weight) return bad("weight");
  out.weight = static_cast<unsigned>(*weight);
  if (const auto ceiling = number(json, "ceilingPercent")) {
    if (*ceiling < 1 || *ceiling > 99) return bad("ceilingPercent");
    out.ceiling = static_cast<unsigned>(*ceiling);
  }
  out.latency_us = number(json, "latencyMicroseconds");
  if (const auto memory = number(json, "memoryBytes")) out.memory = Bytes(*memory);
  out.gpu = text(json, "gpu");
  const auto escape = text(json, "onEscape");
  for (const auto what : {OnEscape::report, OnEscape::pause, OnEscape::end})
    if (escape == name_of(what)) out.on_escape = what;
  if (const auto at = json.find("held"); at != json.end() && at->is_boolean()) out.held = at->get<bool>();
  if (const auto at = json.find("mps"); at != json.end() && at->is_boolean()) out.mps = at->get<bool>();
  if (auto program = text(json, "program"); !program.empty()) out.command = {std::move(program)};
  return out;
}

Json to_json(const Now& now) {
  Json groups = Json::array();
  for (const auto& group : now.groups)
    groups.push_back({{"pid", group.pid},
                      {"startTime", group.start_time},
                      {"gpu", group.gpu},
                      {"client", group.client},
                      {"subdevice", group.subdevice},
                      {"handle", group.handle},
                      {"channels", group.channels},
                      {"fd", group.fd},
                      {"sliceMicroseconds", group.slice_us},
                      {"on", group.on}});
  Json out{{"arbiter", now.arbiter},
           {"program", now.program},
           {"processes", now.processes},
           {"groups", std::move(groups)},
           {"usedBytes", now.used.count},
           {"managedBytes", now.managed.count},
           {"refused", now.refused},
           {"escapes", now.escapes},
           {"selfSet", now.self_set},
           {"reasserted", now.reasserted},
           {"inForceMicroseconds", now.in_force_us}};
  if (now.busy) out["busy"] = *now.busy;
  out["offMicroseconds"] = now.off_cost_us;
  out["onMicroseconds"] = now.on_cost_us;
  if (now.beyond) out["beyondBytes"] = now.beyond->count;
  out["troubles"] = now.troubles;
  return out;
}

Result<Now> now_from(const Json& json) {
  if (!json.is_object()) return bad("(document)");
  Now out;
  const auto pid = [&](const Json& from, const char* key) {
    const auto value = number(from, key).value_or(0);
    return value <= 0x7fffffff ? static_cast<int>(value) : 0;
  };
  out.arbiter = pid(json, "arbiter");
  out.program = pid(json, "program");
  if (const auto at = json.find("processes"); at != json.end() && at->is_array())
    for (const auto& one : *at)
      if (one.is_number_unsigned() && one.get<std::uint64_t>() <= 0x7fffffff &&
          out.processes.size() < most_processes)
        out.processes.push_back(one.get<int>());
  if (const auto at = json.find("groups"); at != json.end() && at->is_array()) {
    for (const auto& one : *at) {
      if (!one.is_object()) return bad("groups");
      if (out.groups.size() >= most_groups) break;
      GroupNow group;
      group.pid = pid(one, "pid");
      group.start_time = number(one, "startTime").value_or(0);
      const auto small = [&](const char* key) {
        return static_cast<std::uint32_t>(number(one, key).value_or(0));
      };
      group.gpu = small("gpu");
      group.client = small("client");
      group.subdevice = small("subdevice");
      group.handle = small("handle");
      if (const auto channels = one.find("channels"); channels != one.end() && channels->is_array())
        for (const auto& channel : *channels)
          if (channel.is_number_unsigned() && group.channels.size() < most_channels)
            group.channels.push_back(channel.get<std::uint32_t>());
      if (const auto fd = one.find("fd"); fd != one.end() && fd->is_number_integer())
        group.fd = fd->get<int>();
      group.slice_us = number(one, "sliceMicroseconds").value_or(0);
      if (const auto on = one.find("on"); on != one.end() && on->is_boolean()) group.on = on->get<bool>();
      out.groups.push_back(std::move(group));
    }
  }
  out.busy = fraction(json, "busy");
  out.off_cost_us = number(json, "offMicroseconds").value_or(0);
  out.on_cost_us = number(json, "onMicroseconds").value_or(0);
  out.used = Bytes(number(json, "usedBytes").value_or(0));
  out.managed = Bytes(number(json, "managedBytes").value_or(0));
  out.refused = number(json, "refused").value_or(0);
  out.escapes = number(json, "escapes").value_or(0);
  out.self_set = number(json, "selfSet").value_or(0);
  out.reasserted = number(json, "reasserted").value_or(0);
  out.in_force_us = number(json, "inForceMicroseconds").value_or(0);
  if (const auto beyond = number(json, "beyondBytes")) out.beyond = Bytes(*beyond);
  if (const auto at = json.find("troubles"); at != json.end() && at->is_array())
    for (const auto& one : *at)
      if (one.is_string() && out.troubles.size() < most_words)
        out.troubles.push_back(printable(one.get<std::string>(), 512));
  return out;
}

Result<Entry> Entry::enter(const Place& place, const Asked& asked) {
  const auto dir = place.run_dir();
  std::error_code failed;
  const auto mask = ::umask(022);  // everybody may look, nobody else may write, whatever the caller's is
  fs::create_directories(dir, failed);
  ::umask(mask);
  if (failed)
    return with_advice(errno_error(fmt::format("make the registry {}", dir.string()), failed.value()));
  // Names are unique among the living. Two launchers with one name at the same moment: the lock decides.
  BH_TRY(const auto all, lock_table(place));
  std::size_t living = 0;
  for (const auto& other : read_all(place)) {
    if (!other.alive) continue;
    ++living;
    if (other.asked.name == asked.name)
      return Error(Errc::in_use,
                   fmt::format("a tenant named {} is running (id {})", asked.name, other.asked.id),
                   "give another --name, or see `bulkhead share list`");
  }
  if (living >= most_tenants)
    return Error(Errc::no_capacity, fmt::format("{} tenants run already", living),
                 "end some: `bulkhead share list`");
  const auto lock_path = file(place, asked.id, ".lock");
  UniqueFd lock(::open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!lock) return with_advice(errno_error(fmt::format("open {}", lock_path.string()), errno));
  if (::flock(lock.get(), LOCK_EX | LOCK_NB) != 0)
    return Error(
        Errc::in_use,
        fmt::format("a tenant of number {} lives on without the launcher that had this pid", asked.id),
        "run it again: it gets another number");
  ::unlink(file(place, asked.id, ".now.json").c_str());  // of a namesake that is gone
  if (auto wrote = write_asked(place, asked); !wrote.ok()) {
    ::unlink(lock_path.c_str());
    return with_advice(wrote.error());
  }
  return Entry(dir, asked.id, std::move(lock));
}

Status Entry::write(const Now& now) const {
  return write_file_quick(dir_ / fmt::format("{}.now.json", id_),
                          to_json(now).dump(-1, ' ', false, Json::error_handler_t::replace));
}

void Entry::leave() {
  for (const char* kind : {".json", ".now.json", ".lock"})
    ::unlink((dir_ / fmt::format("{}{}", id_, kind)).c_str());
}

Status write_asked(const Place& place, const Asked& asked) {
  return write_file_quick(file(place, asked.id, ".json"), dump(to_json(asked)) + "\n");
}

void forget(const Place& place, std::uint64_t id) {
  const auto lock = lock_table(place, false);
  if (!lock.ok() || lives(place, id)) return;  // its number may have come round
  for (const char* kind : {".json", ".now.json", ".lock"}) ::unlink(file(place, id, kind).c_str());
}

// The registry is on a tmpfs and need not outlive a crash of the machine: no fsync, but never half a file.
Status write_file_quick(const fs::path& path, std::string_view content) {
  const auto temporary = path.string() + fmt::format(".{}.tmp", ::getpid());
  UniqueFd fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644));
  if (!fd) return errno_error(fmt::format("write {}", path.string()), errno);
  std::string_view left = content;
  while (!left.empty()) {
    const auto wrote = ::write(fd.get(), left.data(), left.size());
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) {
      const int err = errno;
      ::unlink(temporary.c_str());
      return errno_error(fmt::format("write {}", path.string()), err);
    }
    left.remove_prefix(static_cast<std::size_t>(wrote));
  }
  if (::rename(temporary.c_str(), path.c_str()) != 0) {
    const int err = errno;
    ::unlink(temporary.c_str());
    return errno_error(fmt::format("replace {}", path.string()), err);
  }
  return ok_status();
}

std::vector<Tenant> read_all(const Place& place, std::uint64_t own) {
  std::vector<Tenant> all;
  const auto names = list_directory(place.run_dir());
  if (!names.ok()) return all;  // no tenant ever ran here
  for (const auto& name : *names) {
    if (!name.ends_with(".json") || name.ends_with(".now.json") || all.size() >= 2 * most_tenants) continue;
    const auto id = parse_u64(name.substr(0, name.size() - 5));
    if (!id) continue;
    const auto content = read_file(place.run_dir() / name, file_bytes);
    if (!content.ok()) continue;  // left meanwhile
    const auto json = parse_json(*content);
    if (!json.ok()) continue;
    auto asked = asked_from(*json);
    if (!asked.ok() || asked->id != *id) continue;
    Tenant tenant{.asked = std::move(*asked)};
    tenant.alive = *id == own || lives(place, *id);
    if (const auto state = read_file(file(place, *id, ".now.json"), file_bytes); state.ok())
      if (const auto parsed = parse_json(*state); parsed.ok())
        if (auto now = now_from(*parsed); now.ok()) tenant.now = std::move(*now);
    all.push_back(std::move(tenant));
  }
  std::sort(all.begin(), all.end(), [](const Tenant& a, const Tenant& b) { return a.asked.id < b.asked.id; });
  return all;
}

GpuPlan plan_of(const std::vector<Tenant>& all, std::uint32_t gpu, const sharing::Costs& costs) {
  GpuPlan out;
  sharing::Costs here = costs;
  std::vector<const Tenant*> present;
  bool turns_possible = !costs.slices_obeyed;
  for (const auto& tenant : all) {
    if (!tenant.alive || !tenant.now) continue;
    const bool running = std::any_of(tenant.now->groups.begin(), tenant.now->groups.end(),
                                     [&](const GroupNow& group) { return group.gpu == gpu; });
    if (!running) continue;
    // A tenant that is only gated knows no slices: with it on the GPU everybody takes turns, each with its
    // own tool.
    if (!tenant.asked.held) turns_possible = true, here.slices_obeyed = false;
    if (tenant.asked.cls == sharing::Class::interactive) turns_possible = true;
    present.push_back(&tenant);
  }
  for (const auto* tenant : present) {
    // Slices cost an idle tenant's neighbours nothing; a turn would be nobody's. So where there may be turns,
    // who had no work for seconds is left out: always on, with a slice that is safe in any company, until
    // NVML sees it work again.
    const bool idle =
        turns_possible && tenant->asked.cls != sharing::Class::interactive && tenant->now->busy == 0.0;
    out.tenants.push_back({.id = tenant->asked.id,
                           .cls = tenant->asked.cls,
                           .weight = tenant->asked.weight,
                           .ceiling = tenant->asked.ceiling,
                           .latency_us = tenant->asked.latency_us,
                           .running = !idle,
                           .busy = tenant->now->busy});
  }
  out.plan = sharing::decide(out.tenants, here);
  return out;
}

}  // namespace bulkhead::share
