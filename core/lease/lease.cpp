#include "core/lease/lease.hpp"

#include <algorithm>
#include <array>
#include <utility>

#include <fmt/format.h>

#include "base/fields.hpp"
#include "base/text.hpp"

namespace bulkhead::lease {

namespace {

constexpr std::array<std::pair<Class, std::string_view>, 4> classes{{{Class::mig, "mig"},
                                                                     {Class::share, "share"},
                                                                     {Class::exclusive, "exclusive"},
                                                                     {Class::passthrough, "passthrough"}}};
constexpr std::array<std::pair<Topology, std::string_view>, 5> topologies{{{Topology::any, "any"},
                                                                           {Topology::same_gpu, "same-gpu"},
                                                                           {Topology::same_numa, "same-numa"},
                                                                           {Topology::same_node, "same-node"},
                                                                           {Topology::spread, "spread"}}};
constexpr std::array<std::pair<State, std::string_view>, 7> states{{{State::requested, "requested"},
                                                                    {State::queued, "queued"},
                                                                    {State::preparing, "preparing"},
                                                                    {State::active, "active"},
                                                                    {State::releasing, "releasing"},
                                                                    {State::ended, "ended"},
                                                                    {State::failed, "failed"}}};
constexpr std::array<std::pair<Event, std::string_view>, 11> events{{{Event::wait, "wait"},
                                                                     {Event::place, "place"},
                                                                     {Event::ready, "ready"},
                                                                     {Event::cannot, "cannot"},
                                                                     {Event::withdraw, "withdraw"},
                                                                     {Event::release, "release"},
                                                                     {Event::expire, "expire"},
                                                                     {Event::deadline, "deadline"},
                                                                     {Event::preempt, "preempt"},
                                                                     {Event::lost, "lost"},
                                                                     {Event::scrubbed, "scrubbed"}}};

// While instances are being made for it a lease can be given up: what was made is taken back on the way
// through releasing. A device that is lost while it is being scrubbed has nothing left to scrub.
constexpr std::array life{
    Transition{State::requested, Event::wait, State::queued, "no room or not its turn: it waits"},
    Transition{State::requested, Event::place, State::preparing,
               "its place is taken, its slices are being made"},
    Transition{State::requested, Event::cannot, State::failed, "refused"},
    Transition{State::requested, Event::withdraw, State::ended, "given up before it was looked at"},
    Transition{State::requested, Event::deadline, State::failed, "not granted in time"},
    Transition{State::queued, Event::place, State::preparing, "its turn came and its place is taken"},
    Transition{State::queued, Event::cannot, State::failed, "it can never be granted any more"},
    Transition{State::queued, Event::withdraw, State::ended, "given up while it waited"},
    Transition{State::queued, Event::deadline, State::failed, "not granted in time"},
    Transition{State::preparing, Event::ready, State::active, "its slices are there and were read back"},
    Transition{State::preparing, Event::cannot, State::failed,
               "its slices could not be made; what was made is taken back"},
    Transition{State::preparing, Event::wait, State::queued, "its place was lost meanwhile: it waits again"},
    Transition{State::preparing, Event::withdraw, State::releasing, "given up while it was being prepared"},
    Transition{State::preparing, Event::deadline, State::releasing, "not granted in time"},
    Transition{State::preparing, Event::lost, State::failed, "its device was lost"},
    Transition{State::active, Event::release, State::releasing, "given back"},
    Transition{State::active, Event::expire, State::releasing, "its time is over"},
    Transition{State::active, Event::preempt, State::releasing, "ended for a lease of higher priority"},
    Transition{State::active, Event::lost, State::releasing, "its device was lost"},
    Transition{State::releasing, Event::scrubbed, State::ended, "nothing of the tenant is left on it"},
    Transition{State::releasing, Event::lost, State::ended, "its device was lost: nothing is left to scrub"},
};

template <class Table, class Value>
std::string_view name_in(const Table& table, Value value) {
  for (const auto& [one, name] : table)
    if (one == value) return name;
  return "?";
}
template <class Table>
auto value_in(const Table& table, std::string_view name)
    -> std::optional<std::decay_t<decltype(table[0].first)>> {
  for (const auto& [value, one] : table)
    if (one == name) return value;
  return std::nullopt;
}
template <class Table>
std::string names_in(const Table& table) {
  std::string out;
  for (const auto& [value, name] : table) out += (out.empty() ? "" : ", ") + std::string(name);
  return out;
}

constexpr std::uint64_t most_bytes = 1ULL << 50U;
constexpr std::int64_t latest = 253'402'300'799'999;  // the end of the year 9999

WallTime wall(std::int64_t ms) { return WallTime(std::chrono::milliseconds(ms)); }
std::int64_t number(WallTime time) { return time.time_since_epoch().count(); }

// What was granted once is read back as it is; what is asked for now keeps to what can work.
enum class From { request, record };

Ask read_ask(Fields& fields, From from) {
  Ask ask;
  bool known_class = false;
  if (const auto text = fields.text("class", 16)) {
    if (const auto found = value_in(classes, *text))
      ask.cls = *found, known_class = true;
    else
      fields.mistake("class", fmt::format("must be one of {}", names_in(classes)));
  } else if (!fields.has("class")) {
    fields.mistake("class", fmt::format("is missing: one of {}", names_in(classes)));
  }
  const bool mig = known_class && ask.cls == Class::mig, share = known_class && ask.cls == Class::share;
  ask.profile = fields.text("profile", 32).value_or("");
  if (mig && ask.profile.empty())
    fields.mistake("profile", "is missing: a lease of class mig names one, like 1g.10gb");
  if (known_class && !mig && !ask.profile.empty()) fields.mistake("profile", "is for class mig alone");
  if (const auto bytes = fields.whole("memory", 1, most_bytes)) ask.memory = Bytes(*bytes);
  ask.weight = static_cast<unsigned>(fields.whole("weight", 1, 1000).value_or(0));
  if (share && !ask.memory && !fields.has("memory"))
    fields.mistake("memory", "is missing: a lease of class share names its cap in bytes");
  if (share && ask.weight == 0 && !fields.has("weight")) ask.weight = 100;
  if (share && from == From::request && ask.memory && *ask.memory < smallest_share)
    fields.mistake("memory",
                   fmt::format("is {} bytes, and the smallest share is 64 MiB, {} bytes: no program "
                               "comes up in less",
                               ask.memory->count, smallest_share.count));
  if (known_class && !share && (ask.memory || ask.weight != 0))
    fields.mistake(ask.memory ? "memory" : "weight", "is for class share alone");
  ask.count = static_cast<unsigned>(fields.whole("count", 1, most_parts).value_or(1));
  if (const auto text = fields.text("topology", 16)) {
    if (const auto found = value_in(topologies, *text))
      ask.topology = *found;
    else
      fields.mistake("topology", fmt::format("must be one of {}", names_in(topologies)));
  }
  if (known_class && (ask.cls == Class::exclusive || ask.cls == Class::passthrough) &&
      ask.topology == Topology::same_gpu && ask.count > 1)
    fields.mistake("topology", "same-gpu cannot hold several whole GPUs");
  ask.ttl = std::chrono::seconds(fields
                                     .whole("ttlSeconds", static_cast<std::uint64_t>(shortest.count()),
                                            static_cast<std::uint64_t>(longest.count()))
                                     .value_or(3600));
  if (const auto ms = fields.number("deadline", 0, latest)) ask.deadline = wall(*ms);
  ask.wait = fields.flag("wait").value_or(false);
  ask.priority = static_cast<int>(fields.number("priority", -100, 100).value_or(0));
  ask.preemptible = fields.flag("preemptible").value_or(false);
  ask.models = fields.texts("models", 16, 100);
  ask.label = fields.text("label", 100).value_or("");
  return ask;
}

Json part_json(const Part& part) {
  Json out{{"gpu", part.gpu.text},       {"pci", part.pci},   {"gpuName", part.gpu_name},
           {"numaNode", part.numa_node}, {"cpus", part.cpus}, {"device", part.device.text}};
  if (!part.profile.empty()) out["profile"] = part.profile;
  if (part.start) out["start"] = *part.start;
  if (part.gpu_instance) out["gpuInstance"] = *part.gpu_instance;
  if (part.compute_instance) out["computeInstance"] = *part.compute_instance;
  out["generation"] = part.generation;
  out["memory"] = part.memory.count;
  if (part.weight != 0) out["weight"] = part.weight;
  out["deviceNodes"] = part.device_nodes;
  out["cdi"] = part.cdi;
  out["made"] = part.made;
  return out;
}

Part read_part(const Json& json, const std::string& path, std::vector<std::string>& mistakes) {
  Fields fields(json, path, mistakes);
  Part part;
  part.gpu.text = fields.text("gpu", 96).value_or("");
  part.pci = fields.text("pci", 32).value_or("");
  part.gpu_name = fields.text("gpuName", 96).value_or("");
  part.numa_node = static_cast<int>(fields.number("numaNode", -1, 4095).value_or(-1));
  part.cpus = fields.text("cpus", 4096).value_or("");
  part.device.text = fields.text("device", 96).value_or("");
  part.profile = fields.text("profile", 32).value_or("");
  const auto small = [&](std::string_view key) -> std::optional<unsigned> {
    const auto value = fields.whole(key, 0, 4095);
    return value ? std::optional<unsigned>(static_cast<unsigned>(*value)) : std::nullopt;
  };
  part.start = small("start");
  part.gpu_instance = small("gpuInstance");
  part.compute_instance = small("computeInstance");
  part.generation = fields.number("generation", 0, INT64_MAX).value_or(0);
  part.memory = Bytes(fields.whole("memory", 0, most_bytes).value_or(0));
  part.weight = static_cast<unsigned>(fields.whole("weight", 0, 1000).value_or(0));
  part.device_nodes = fields.texts("deviceNodes", 64, 256);
  part.cdi = fields.text("cdi", 128).value_or("");
  part.made = fields.flag("made").value_or(false);
  fields.no_others();
  return part;
}

}  // namespace

std::string_view name_of(Class cls) { return name_in(classes, cls); }
std::string_view name_of(Topology topology) { return name_in(topologies, topology); }
std::string_view name_of(State state) { return name_in(states, state); }
std::string_view name_of(Event event) { return name_in(events, event); }

Result<Ask> parse_ask(const Json& json) {
  std::vector<std::string> mistakes;
  Fields fields(json, "", mistakes);
  Ask ask = read_ask(fields, From::request);
  fields.no_others();
  BH_CHECK(no_mistakes("lease", mistakes));
  return ask;
}

Json to_json(const Ask& ask) {
  Json out{{"class", name_of(ask.cls)}};
  if (!ask.profile.empty()) out["profile"] = ask.profile;
  if (ask.memory) out["memory"] = ask.memory->count;
  if (ask.weight != 0) out["weight"] = ask.weight;
  out["count"] = ask.count;
  out["topology"] = name_of(ask.topology);
  out["ttlSeconds"] = ask.ttl.count();
  if (ask.deadline) out["deadline"] = number(*ask.deadline);
  out["wait"] = ask.wait;
  out["priority"] = ask.priority;
  out["preemptible"] = ask.preemptible;
  if (!ask.models.empty()) out["models"] = ask.models;
  if (!ask.label.empty()) out["label"] = ask.label;
  return out;
}

std::span<const Transition> transitions() { return life; }

std::optional<State> next(State from, Event event) {
  const auto found = std::find_if(life.begin(), life.end(), [&](const Transition& one) {
    return one.from == from && one.event == event;
  });
  return found == life.end() ? std::nullopt : std::optional<State>(found->to);
}

bool holds(State state) {
  return state == State::preparing || state == State::active || state == State::releasing;
}
bool over(State state) { return state == State::ended || state == State::failed; }

Json to_json(const Lease& lease) {
  Json parts = Json::array();
  for (const Part& part : lease.parts) parts.push_back(part_json(part));
  Json out{{"id", lease.id},
           {"tenant", lease.tenant},
           {"user", lease.user},
           {"ask", to_json(lease.ask)},
           {"state", name_of(lease.state)},
           {"parts", std::move(parts)},
           {"created", number(lease.created)}};
  const auto put = [&](const char* key, const std::optional<WallTime>& time) {
    if (time) out[key] = number(*time);
  };
  put("activeSince", lease.active_since);
  put("expires", lease.expires);
  put("ended", lease.ended);
  put("notice", lease.notice);
  out["reason"] = lease.reason;
  out["ways"] = lease.ways;
  out["version"] = lease.version;
  return out;
}

Result<Lease> parse(const Json& json) {
  std::vector<std::string> mistakes;
  Fields fields(json, "", mistakes);
  Lease lease;
  lease.id = fields.number("id", 0, INT64_MAX).value_or(0);
  lease.tenant = fields.text("tenant", 63).value_or("");
  lease.user = fields.text("user", 256).value_or("");
  if (const Json* ask = fields.object("ask")) {
    Fields inner(*ask, "ask", mistakes);
    lease.ask = read_ask(inner, From::record);
    inner.no_others();
  } else {
    fields.mistake("ask", "is missing");
  }
  const auto state = value_in(states, fields.text("state", 16).value_or(""));
  if (state)
    lease.state = *state;
  else
    fields.mistake("state", fmt::format("must be one of {}", names_in(states)));
  if (const Json* parts = fields.array("parts", most_parts))
    for (std::size_t i = 0; i < parts->size(); ++i)
      lease.parts.push_back(read_part((*parts)[i], fmt::format("parts[{}]", i), mistakes));
  const auto time = [&](std::string_view key) -> std::optional<WallTime> {
    const auto ms = fields.number(key, 0, latest);
    return ms ? std::optional<WallTime>(wall(*ms)) : std::nullopt;
  };
  lease.created = time("created").value_or(WallTime{});
  lease.active_since = time("activeSince");
  lease.expires = time("expires");
  lease.ended = time("ended");
  lease.notice = time("notice");
  lease.reason = fields.text("reason", 4096).value_or("");
  lease.ways = fields.texts("ways", 16, 4096);
  lease.version = fields.number("version", 0, INT64_MAX).value_or(1);
  fields.no_others();
  BH_CHECK(no_mistakes("lease record", mistakes));
  return lease;
}

// Sources: NVIDIA MIG User Guide (isolation of memory, cache, copy engines; no isolation of power, clocks and
// the PCIe link); docs/design/sharing.md (measured on an H100); Linux VFIO documentation.
std::vector<std::string> guarantees(Class cls) {
  switch (cls) {
    case Class::mig:
      return {"memory: its own, in hardware: no other tenant can read or fill it",
              "memory bandwidth and cache: its own slices, in hardware",
              "time: its own multiprocessors; nobody takes turns with it",
              "faults: an error in its programs ends its programs alone; a reset of the whole GPU ends all "
              "of its GPU's slices",
              "not isolated: power and clocks of the GPU, the PCIe link, the driver"};
    case Class::share:
      return {
          "memory: a cap that the driver's own allocation calls cannot pass; contents are apart by the GPU's "
          "page tables",
          "time: its weight, held by the GPU's scheduler, within a point where all tenants are busy; unused "
          "time goes to others",
          "faults: an error in its programs ends its programs alone; a hardware fault or a reset takes all "
          "tenants of the GPU",
          "not isolated: memory bandwidth, cache, power, clocks, the PCIe link, the driver"};
    case Class::exclusive:
      return {"memory, bandwidth, cache and time: the whole GPU, nobody else on it",
              "faults: its GPU alone, where no NVLink partition is shared",
              "not isolated: the PCIe switch, the host's driver and power"};
    case Class::passthrough:
      return {
          "memory, bandwidth, cache and time: the whole device, handed to a virtual machine through the "
          "IOMMU",
          "faults: the device and its IOMMU group; the host's driver is not involved",
          "not isolated: the PCIe switch and power; the guest can write what the device itself lets it "
          "(firmware settings)"};
  }
  return {};
}

std::vector<std::pair<std::string, std::string>> environment(const Lease& lease) {
  std::string devices, memory;
  for (const Part& part : lease.parts) {
    if (part.device.text.empty() || lease.ask.cls == Class::passthrough) continue;
    devices += (devices.empty() ? "" : ",") + part.device.text;
  }
  std::vector<std::pair<std::string, std::string>> out;
  // Empty, not absent: a program of a lease without devices must see none, not all.
  out.emplace_back("CUDA_VISIBLE_DEVICES", devices);
  out.emplace_back("NVIDIA_VISIBLE_DEVICES", devices.empty() ? "void" : devices);
  out.emplace_back("BULKHEAD_LEASE", std::to_string(lease.id));
  out.emplace_back("BULKHEAD_CLASS", std::string(name_of(lease.ask.cls)));
  if (lease.expires) out.emplace_back("BULKHEAD_EXPIRES", rfc3339(*lease.expires));
  return out;
}

Result<WallTime> renewed(const Lease& lease, std::chrono::seconds ttl, WallTime now) {
  if (ttl < shortest || ttl > longest)
    return Error(Errc::invalid,
                 fmt::format("ttlSeconds: must be from {} to {}", shortest.count(), longest.count()));
  const WallTime until = now + ttl;
  return lease.expires && *lease.expires > until ? *lease.expires : until;
}

}  // namespace bulkhead::lease
