#include "cli/what_if.hpp"

#include <algorithm>
#include <map>
#include <optional>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/fields.hpp"
#include "base/text.hpp"
#include "cli/plan_page.hpp"
#include "core/compaction/compaction.hpp"
#include "core/inventory/inventory.hpp"

namespace bulkhead::cli {

namespace {

constexpr std::size_t kInventoryBytes = 16U << 20U;  // a host of 16 GPUs with all its slices prints 200 KiB
constexpr std::size_t kMostHosts = 10'000;
constexpr std::uint64_t kMostWanted = 1'000'000;

struct SeenInstance {
  unsigned gpu_instance = 0;
  std::string name = {};
  bool ours = false, busy = false;
  std::vector<std::string> holders = {};  // "pid 4711 (python3)"
  std::uint64_t memory_mib = 0;           // that the holders have, or the instance's where that was not read
};
struct SeenGpu {
  std::string host = {};
  unsigned index = 0;
  std::string model = {};
  std::vector<SeenInstance> instances = {};
};
// The fleet as the planner takes it, and beside each GPU and instance what to call it.
struct Seen {
  compaction::Fleet fleet = {};
  std::vector<std::string> pool_models = {};
  std::vector<SeenGpu> gpus = {};                                           // as Fleet::gpus
  std::map<std::uint64_t, std::pair<std::size_t, std::size_t>> by_id = {};  // instance id -> gpu, instance
  std::vector<std::string> hosts = {};
  std::vector<SeenGpu> mig_off = {};  // idle GPUs that could do MIG and have it off; not in the fleet
  std::vector<unsigned> mig_off_pools = {};
  std::size_t instances = 0;
};

mig::Placement placement_of(Fields& parent, const std::string& path, std::vector<std::string>& mistakes) {
  mig::Placement out;
  if (const Json* place = parent.object("placement")) {
    Fields fields(*place, path + ".placement", mistakes);
    out.start = static_cast<unsigned>(fields.whole("start", 0, 31).value_or(0));
    out.size = static_cast<unsigned>(fields.whole("size", 1, 32).value_or(1));
  } else {
    parent.mistake("placement", "is missing");
  }
  return out;
}

mig::Geometry geometry_of(Fields& mig, const std::string& path, std::vector<std::string>& mistakes) {
  mig::Geometry out;
  out.memory_slices = static_cast<unsigned>(mig.whole("memory_slices", 0, 32).value_or(0));
  const Json* profiles = mig.array("profiles", 64);
  if (profiles == nullptr) return out;
  for (std::size_t i = 0; i < profiles->size(); ++i) {
    const std::string at = fmt::format("{}.profiles[{}]", path, i);
    if (!(*profiles)[i].is_object()) {
      mistakes.push_back(at + ": must be an object");
      continue;
    }
    Fields fields((*profiles)[i], at, mistakes);
    const auto count = [&](std::string_view key, std::uint64_t most) {
      return static_cast<unsigned>(fields.whole(key, 0, most).value_or(0));
    };
    mig::Profile profile{.id = count("id", 65535),
                         .name = fields.text("name", 64).value_or(""),
                         .compute_slices = count("compute_slices", 32),
                         .max_instances = count("max_instances", 64),
                         .memory = Bytes(fields.whole("memory_bytes", 0, 1ULL << 50U).value_or(0)),
                         .multiprocessors = count("multiprocessors", 65535),
                         .copy_engines = count("copy_engines", 1024),
                         .decoders = count("decoders", 1024),
                         .encoders = count("encoders", 1024),
                         .jpeg_engines = count("jpeg_engines", 1024),
                         .optical_flow = count("optical_flow", 1024),
                         .size = count("memory_slices", 32)};
    if (const Json* starts = fields.array("starts", 64)) {
      for (const auto& start : *starts) {
        if (!start.is_number_unsigned() || start.get<std::uint64_t>() >= 32) {
          fields.mistake("starts", "must be whole numbers below 32");
          break;
        }
        profile.starts.push_back(start.get<unsigned>());
      }
    }
    out.profiles.push_back(std::move(profile));
  }
  return out;
}

SeenInstance instance_of(Fields& fields, const mig::Profile* profile, const std::string& path,
                         std::vector<std::string>& mistakes) {
  SeenInstance out{.gpu_instance = static_cast<unsigned>(fields.whole("id", 0, 65535).value_or(0)),
                   .name = fields.text("profile", 64).value_or(""),
                   .ours = fields.flag("ours").value_or(false),
                   .busy = fields.flag("busy").value_or(true)};
  std::uint64_t held = 0;
  bool all_read = true;
  if (const Json* compute = fields.array("compute_instances", 64)) {
    for (std::size_t c = 0; c < compute->size(); ++c) {
      if (!(*compute)[c].is_object()) continue;
      Fields ci((*compute)[c], fmt::format("{}.compute_instances[{}]", path, c), mistakes);
      const Json* holders = ci.array("holders", 65536);
      if (holders == nullptr) continue;
      for (std::size_t h = 0; h < holders->size(); ++h) {
        if (!(*holders)[h].is_object()) continue;
        Fields holder((*holders)[h], fmt::format("{}.holders[{}]", ci.path_of("holders"), h), mistakes);
        out.holders.push_back(fmt::format("pid {} ({})", holder.whole("pid", 0, 1ULL << 31U).value_or(0),
                                          printable(holder.text("name", 256).value_or("?"), 64)));
        const Json& one = (*holders)[h];
        if (const auto memory = one.find("memory_bytes"); memory != one.end() && memory->is_number_unsigned())
          held += memory->get<std::uint64_t>() >> 20U;
        else
          all_read = false;
      }
    }
  }
  const std::uint64_t whole = profile == nullptr ? 0 : to_mebibytes(profile->memory);
  out.memory_mib = all_read && held > 0 ? std::min<std::uint64_t>(held, 1U << 24U) : whole;
  return out;
}

// Adds what one `bulkhead inventory --json` shows.
Status add_host(Seen& seen, const Json& document, std::string_view from, const WhatIfOptions& options) {
  std::vector<std::string> mistakes;
  if (!document.is_object() || document.value("kind", Json()) != "Inventory")
    return Error(Errc::invalid, fmt::format("{}: is no inventory", from),
                 "write one on its host: bulkhead inventory --json > HOST.json");
  Fields top(document, "", mistakes);
  std::string host = fmt::format("host {}", seen.hosts.size() + 1);
  if (const Json* about = top.object("host")) {
    Fields fields(*about, "host", mistakes);
    const auto name = fields.text("hostname", 256);
    if (name && !name->empty()) host = printable(*name, 64);
  }
  if (std::find(seen.hosts.begin(), seen.hosts.end(), host) != seen.hosts.end())
    return Error(Errc::invalid, fmt::format("{}: {} is there already", from, host),
                 "name each host's inventory once");
  seen.hosts.push_back(host);
  const Json* gpus = top.array("gpus", 64);
  for (std::size_t g = 0; gpus != nullptr && g < gpus->size(); ++g) {
    const std::string path = fmt::format("gpus[{}]", g);
    if (!(*gpus)[g].is_object()) {
      mistakes.push_back(path + ": must be an object");
      continue;
    }
    Fields gpu((*gpus)[g], path, mistakes);
    const auto index = static_cast<unsigned>(gpu.whole("index", 0, 65535).value_or(0));
    const std::string model = printable(gpu.text("model", 256).value_or("?"), 64);
    const bool busy = gpu.flag("busy").value_or(true);
    const Json* about = gpu.object("mig");
    if (about == nullptr) continue;
    Fields mig(*about, path + ".mig", mistakes);
    if (!mig.flag("capable").value_or(false)) continue;
    const bool enabled = mig.flag("enabled").value_or(false);
    if (!enabled && busy) continue;
    mig::Geometry geometry = geometry_of(mig, path + ".mig", mistakes);
    if (!mistakes.empty()) break;
    auto& pools = seen.fleet.pools;
    const auto known = std::find(pools.begin(), pools.end(), geometry);
    const auto pool = static_cast<unsigned>(known - pools.begin());
    if (known == pools.end()) {
      pools.push_back(geometry);
      seen.pool_models.push_back(model);
    }
    compaction::Gpu into{.pool = pool};
    SeenGpu names{.host = host, .index = index, .model = model};
    if (!enabled) {
      seen.mig_off.push_back(std::move(names));
      seen.mig_off_pools.push_back(pool);
      continue;
    }
    const Json* instances = mig.array("instances", 64);
    for (std::size_t i = 0; instances != nullptr && i < instances->size(); ++i) {
      const std::string at = fmt::format("{}.mig.instances[{}]", path, i);
      if (!(*instances)[i].is_object()) {
        mistakes.push_back(at + ": must be an object");
        continue;
      }
      Fields fields((*instances)[i], at, mistakes);
      const auto profile = static_cast<unsigned>(fields.whole("profile_id", 0, 65535).value_or(0));
      const mig::Placement place = placement_of(fields, at, mistakes);
      SeenInstance one = instance_of(fields, geometry.by_id(profile), at, mistakes);
      const std::uint64_t id = ++seen.instances;
      seen.by_id[id] = {seen.gpus.size(), names.instances.size()};
      into.instances.push_back({.id = id,
                                .profile = profile,
                                .start = place.start,
                                .movable = (one.ours || options.adopt) && (!one.busy || options.evict),
                                .price = one.busy ? one.memory_mib : 0,
                                .visible = one.busy});
      names.instances.push_back(std::move(one));
    }
    seen.fleet.gpus.push_back(std::move(into));
    seen.gpus.push_back(std::move(names));
  }
  return no_mistakes(from, mistakes);
}

Result<Seen> look(const Context& context, const WhatIfOptions& options) {
  Seen seen;
  if (options.inventories.empty()) {
    auto access = access_of(context);
    access.detail = observe::Detail::plan;
    BH_TRY(const auto host, observe::host(access));
    BH_CHECK(add_host(seen, inventory::to_json(host), "this host", options));
    return seen;
  }
  if (options.inventories.size() > kMostHosts)
    return Error(Errc::invalid, fmt::format("--inventory: at most {} hosts", kMostHosts));
  for (const auto& path : options.inventories) {
    auto text = read_file(path, kInventoryBytes);
    if (!text.ok()) return std::move(text).error().in("--inventory");
    auto document = parse_json(*text);
    if (!document.ok()) return std::move(document).error().in(printable(path)).in("--inventory");
    BH_CHECK(add_host(seen, *document, printable(path), options));
  }
  return seen;
}

// "12 x 3g.40gb", "12x3g.40gb", "12 3g.40gb", "3g.40gb".
Result<compaction::Wanted> parse_wanted(std::string_view text, const Seen& seen) {
  const std::string_view whole = trim(text);
  std::string_view rest = whole;
  std::uint64_t count = 1;
  const auto digits = rest.find_first_not_of("0123456789");
  // "3g.40gb" begins with a digit too: a count is followed by a space or an x.
  if (digits != 0 && digits != std::string_view::npos &&
      (rest[digits] == ' ' || rest[digits] == 'x' || rest[digits] == 'X' || rest[digits] == '*')) {
    const auto parsed = parse_u64(rest.substr(0, digits));
    count = parsed.value_or(0);
    rest = trim(rest.substr(digits));
    if (!rest.empty() && (rest[0] == 'x' || rest[0] == 'X' || rest[0] == '*')) rest = trim(rest.substr(1));
  }
  const std::string shown = printable(whole, 64);
  if (count == 0 || count > kMostWanted)
    return Error(Errc::invalid,
                 fmt::format("--what-if '{}': how many is not in 1 to {}", shown, kMostWanted));
  std::vector<std::string_view> known;
  for (const auto& pool : seen.fleet.pools) {
    if (pool.by_name(rest) != nullptr)
      return compaction::Wanted{.profile = std::string(rest), .count = count};
    for (const auto name : pool.names()) {
      if (std::find(known.begin(), known.end(), name) == known.end()) known.push_back(name);
    }
  }
  const auto meant = closest(rest, known);
  std::string list;
  for (const auto name : known) list += (list.empty() ? "" : ", ") + std::string(name);
  return Error(Errc::invalid, fmt::format("--what-if '{}': no GPU here has a profile of this name", shown),
               meant.empty() ? fmt::format("there are: {}\nlike: bulkhead plan --what-if '12 x {}'", list,
                                           known.empty() ? "3g.40gb" : known.front())
                             : fmt::format("did you mean: bulkhead plan --what-if '{} x {}'", count, meant));
}

std::string profile_name(const Seen& seen, std::size_t gpu, unsigned profile) {
  const auto* found = seen.fleet.pools[seen.fleet.gpus[gpu].pool].by_id(profile);
  return found == nullptr ? fmt::format("profile {}", profile) : found->name;
}
std::string gpu_name(const Seen& seen, const SeenGpu& one) {
  return seen.hosts.size() == 1 ? fmt::format("GPU {}", one.index)
                                : fmt::format("{} GPU {}", one.host, one.index);
}
std::string gpu_name(const Seen& seen, std::size_t gpu) { return gpu_name(seen, seen.gpus[gpu]); }
const SeenInstance& instance(const Seen& seen, std::uint64_t id) {
  const auto& [gpu, at] = seen.by_id.at(id);
  return seen.gpus[gpu].instances[at];
}
std::string instance_name(const Seen& seen, std::uint64_t id) {
  const auto& one = instance(seen, id);
  return fmt::format("{} (gi{} of {})", one.name, one.gpu_instance, gpu_name(seen, seen.by_id.at(id).first));
}
std::string loses(const SeenInstance& one) {
  if (!one.busy) return "nobody uses it; it gets a new UUID";
  return fmt::format("{} would be ended, {} MiB to load again",
                     one.holders.empty() ? "its processes" : join(one.holders, ", "), one.memory_mib);
}
std::string shortened(const std::vector<std::string>& names) {
  if (names.size() <= 8) return join(names, ", ");
  return fmt::format("{}, {} ... {} ({} GPUs)", names[0], names[1], names.back(), names.size());
}
// Why it may not move, and what would let it.
std::string stays(const SeenInstance& one) {
  if (!one.ours) return fmt::format("made by others{}: --adopt", one.busy ? " and in use: --evict" : "");
  return fmt::format("in use{}: --evict", one.holders.empty() ? "" : " by " + join(one.holders, ", "));
}

std::string_view name_of(compaction::Fit fit) {
  switch (fit) {
    case compaction::Fit::now:
      return "now";
    case compaction::Fit::with_moves:
      return "with-moves";
    case compaction::Fit::partly:
      return "partly";
    case compaction::Fit::no:
      return "no";
  }
  return "no";
}

// The same question with MIG turned on where it is off and nobody works: which of those GPUs it takes, and
// how many moves.
struct TurnOn {
  std::vector<std::size_t> gpus = {};  // of Seen::mig_off
  std::size_t moves = 0;
};
std::optional<TurnOn> with_mig_on(const Seen& seen, const std::vector<compaction::Wanted>& wanted,
                                  const compaction::Limits& limits) {
  if (seen.mig_off.empty()) return std::nullopt;
  const auto fits = [](const auto& answer) {
    return answer.ok() && (answer->fit == compaction::Fit::now || answer->fit == compaction::Fit::with_moves);
  };
  std::vector<std::size_t> able;
  for (std::size_t i = 0; i < seen.mig_off.size(); ++i) {
    const auto& pool = seen.fleet.pools[seen.mig_off_pools[i]];
    if (std::any_of(wanted.begin(), wanted.end(),
                    [&](const auto& one) { return pool.by_name(one.profile) != nullptr; }))
      able.push_back(i);
  }
  // As few of them, in their order, as will do: found by halving, since one more never hurts.
  compaction::Fleet fleet = seen.fleet;
  const std::size_t first = fleet.gpus.size();
  const auto ask = [&](std::size_t count) {
    fleet.gpus.resize(first);
    for (std::size_t i = 0; i < count; ++i) fleet.gpus.push_back({.pool = seen.mig_off_pools[able[i]]});
    return compaction::what_if(fleet, wanted, limits);
  };
  std::size_t low = 0, high = able.size();
  auto answer = ask(high);
  if (!fits(answer)) return std::nullopt;
  while (low + 1 < high) {
    const std::size_t middle = (low + high) / 2;
    auto one = ask(middle);
    if (fits(one)) {
      high = middle;
      answer = std::move(one);
    } else {
      low = middle;
    }
  }
  TurnOn out{.moves = answer->moves.list.size()};
  std::vector<bool> used(high, false);
  const auto use = [&](std::size_t gpu) {
    if (gpu >= first) used[gpu - first] = true;
  };
  for (const auto& place : answer->places) use(place.at.gpu);
  for (const auto& move : answer->moves.list) use(move.to.gpu);
  for (std::size_t i = 0; i < high; ++i) {
    if (used[i]) out.gpus.push_back(able[i]);
  }
  return out;
}

Json to_json(const Seen& seen, std::size_t gpu, unsigned start) {
  return {{"host", seen.gpus[gpu].host}, {"gpu", seen.gpus[gpu].index}, {"start", start}};
}

Json to_json(const Seen& seen, const compaction::Moves& moves) {
  Json out = Json::array();
  for (const auto& move : moves.list) {
    const auto& one = instance(seen, move.instance);
    out.push_back({{"profile", one.name},
                   {"gpuInstance", one.gpu_instance},
                   {"from", to_json(seen, move.from.gpu, move.from.start)},
                   {"to", to_json(seen, move.to.gpu, move.to.start)},
                   {"loses", move.detour ? "a stop on the way of a later move" : loses(one)},
                   {"priceMiB", move.price},
                   {"noticed", move.visible},
                   {"detour", move.detour},
                   {"empties", move.empties}});
  }
  return out;
}

Json to_json(const Seen& seen, const std::vector<compaction::Wanted>& wanted,
             const compaction::WhatIf& answer, const std::optional<TurnOn>& turn_on) {
  Json asked = Json::array();
  for (std::size_t i = 0; i < wanted.size(); ++i)
    asked.push_back({{"profile", wanted[i].profile},
                     {"count", wanted[i].count},
                     {"fits", i < answer.fits.size() ? answer.fits[i] : 0},
                     {"fitsNowAlone", i < answer.fits_now.size() ? answer.fits_now[i] : 0},
                     {"freeSlices", i < answer.free_slices.size() ? answer.free_slices[i] : 0}});
  Json places = Json::array();
  for (const auto& place : answer.places) {
    Json one = to_json(seen, place.at.gpu, place.at.start);
    one["profile"] = profile_name(seen, place.at.gpu, place.profile);
    places.push_back(std::move(one));
  }
  Json more = Json::array();
  for (const auto& one : answer.more_gpus)
    more.push_back({{"model", seen.pool_models[one.pool]}, {"count", one.count}});
  Json blocking = Json::array();
  for (const auto id : answer.blocking) {
    const auto& [gpu, at] = seen.by_id.at(id);
    const auto& one = seen.gpus[gpu].instances[at];
    blocking.push_back({{"host", seen.gpus[gpu].host},
                        {"gpu", seen.gpus[gpu].index},
                        {"gpuInstance", one.gpu_instance},
                        {"profile", one.name},
                        {"why", stays(one)}});
  }
  Json out = {{"apiVersion", "bulkhead/v1"},
              {"kind", "WhatIf"},
              {"answer", name_of(answer.fit)},
              {"why", answer.why},
              {"proven", answer.proven},
              {"wanted", std::move(asked)},
              {"moves", to_json(seen, answer.moves)},
              {"priceMiB", answer.moves.price},
              {"noticedMoves", answer.moves.visible},
              {"places", std::move(places)},
              {"moreGpus", std::move(more)},
              {"blocking", std::move(blocking)},
              {"hosts", seen.hosts},
              {"gpus", seen.gpus.size()},
              {"instances", seen.instances},
              {"idleWithMigOff", seen.mig_off.size()}};
  if (turn_on) {
    Json gpus = Json::array();
    for (const auto i : turn_on->gpus)
      gpus.push_back({{"host", seen.mig_off[i].host}, {"gpu", seen.mig_off[i].index}});
    out["turnMigOn"] = {{"gpus", std::move(gpus)}, {"moves", turn_on->moves}};
  }
  if (answer.without_limits) out["movesWithoutLimit"] = to_json(seen, *answer.without_limits);
  return out;
}

std::string plural(std::uint64_t n, std::string_view one) {
  return fmt::format("{} {}{}", n, one, n == 1 ? "" : "s");
}

std::string page(const Context& context, const Seen& seen, const std::vector<compaction::Wanted>& wanted,
                 const compaction::WhatIf& answer, const std::optional<TurnOn>& turn_on,
                 const WhatIfOptions& options) {
  std::string asked;
  std::uint64_t all = 0, fits = 0;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    asked += fmt::format("{}{} x {}",
                         i == 0                   ? ""
                         : i + 1 == wanted.size() ? " and "
                                                  : ", ",
                         wanted[i].count, printable(wanted[i].profile, 64));
    all += wanted[i].count;
    if (i < answer.fits.size()) fits += answer.fits[i];
  }
  const std::string where = fmt::format(
      "{}, {} with MIG on, {}", seen.hosts.size() == 1 ? seen.hosts[0] : plural(seen.hosts.size(), "host"),
      plural(seen.gpus.size(), "GPU"), plural(seen.instances, "instance"));
  std::string out;
  switch (answer.fit) {
    case compaction::Fit::now:
      out = paint(context, Tone::good, fmt::format("{} fit now; nothing has to move.", asked));
      break;
    case compaction::Fit::with_moves:
      out = paint(context, Tone::good,
                  fmt::format("{} fit after {}", asked, plural(answer.moves.list.size(), "move"))) +
            fmt::format("; {}.", answer.moves.visible == 0
                                     ? "nobody would notice"
                                     : paint(context, Tone::bad,
                                             fmt::format("{} would be noticed, {} MiB to load again",
                                                         answer.moves.visible, answer.moves.price)));
      break;
    case compaction::Fit::partly:
      out =
          paint(context, Tone::bad, fmt::format("{} do not fit: {} of {} would", asked, fits, all)) +
          (answer.moves.list.empty() ? "."
                                     : fmt::format(", after {}.", plural(answer.moves.list.size(), "move")));
      break;
    case compaction::Fit::no:
      out = paint(context, Tone::bad, fmt::format("{} do not fit.", asked));
      break;
  }
  out += "\n" + paint(context, Tone::dim, where) + "\n";
  const bool fits_all = answer.fit == compaction::Fit::now || answer.fit == compaction::Fit::with_moves;
  if (!fits_all && !answer.why.empty()) out += "\n  " + answer.why + "\n";
  const auto list_moves = [&](const compaction::Moves& moves) {
    Table table({"", "MOVE", "FROM", "TO", "PRICE", "WHAT IS LOST"});
    std::size_t number = 0;
    for (const auto& move : moves.list) {
      const auto& one = instance(seen, move.instance);
      table.row({std::to_string(++number), fmt::format("{} gi{}", one.name, one.gpu_instance),
                 fmt::format("{} at {}", gpu_name(seen, move.from.gpu), move.from.start),
                 fmt::format("{} at {}", gpu_name(seen, move.to.gpu), move.to.start),
                 fmt::format("{} MiB", move.price),
                 (move.detour ? std::string("a stop on the way of a later move") : loses(one)) +
                     (move.empties ? "; leaves the GPU empty" : "")},
                {Tone::dim, Tone::plain, Tone::plain, Tone::plain, Tone::plain,
                 move.visible ? Tone::bad : Tone::plain});
    }
    return table.str(context);
  };
  if (!answer.moves.list.empty()) out += "\n" + list_moves(answer.moves);
  if (!answer.places.empty()) {
    out += fmt::format("\n{}\n", answer.moves.list.empty() ? "Places:" : "Then they go to:");
    // "GPU 3  3g.40gb at 0, 4": GPUs that get the same are one line.
    std::map<std::size_t, std::map<std::string, std::vector<unsigned>>> per_gpu;
    for (const auto& place : answer.places)
      per_gpu[place.at.gpu][profile_name(seen, place.at.gpu, place.profile)].push_back(place.at.start);
    std::vector<std::pair<std::string, std::vector<std::size_t>>> lines;
    for (const auto& [gpu, profiles] : per_gpu) {
      std::string text;
      for (const auto& [name, starts] : profiles)
        text += fmt::format("{}{} at {}", text.empty() ? "" : "; ", name, fmt::join(starts, ", "));
      const auto same =
          std::find_if(lines.begin(), lines.end(), [&](const auto& line) { return line.first == text; });
      if (same == lines.end())
        lines.push_back({text, {gpu}});
      else
        same->second.push_back(gpu);
    }
    for (const auto& [text, on] : lines) {
      std::vector<std::string> names;
      for (const auto gpu : on) names.push_back(gpu_name(seen, gpu));
      out += fmt::format("  {}: {}\n", shortened(names), text);
    }
  }
  if (!fits_all) {
    out += "\n";
    const auto way = [&](const std::string& text) {
      out += fmt::format("  {} {}\n", paint(context, Tone::dim, "way out:"), text);
    };
    if (turn_on) {
      std::vector<std::string> names;
      for (const auto i : turn_on->gpus) names.push_back(gpu_name(seen, seen.mig_off[i]));
      way(fmt::format("turn MIG on on {}, which nobody uses (a node file: docs/node-file.md): then all fit{}",
                      shortened(names),
                      turn_on->moves == 0 ? "" : " after " + plural(turn_on->moves, "move")));
    }
    if (answer.without_limits)
      way(fmt::format("{} would make room for all: --moves {}",
                      plural(answer.without_limits->list.size(), "move"),
                      answer.without_limits->list.size()));
    if (!answer.blocking.empty()) {
      way(fmt::format("all would fit if {} could move:", plural(answer.blocking.size(), "instance")));
      for (const auto id : answer.blocking)
        out += fmt::format("             {}, {}\n", instance_name(seen, id), stays(instance(seen, id)));
    }
    for (const auto& more : answer.more_gpus) {
      if (more.count > 0)
        way(fmt::format("{} more {} with MIG on and empty", more.count, seen.pool_models[more.pool]));
    }
  }
  if (!answer.proven)
    out += paint(context, Tone::dim, "\nThe search was cut short: more may fit, or with fewer moves.") + "\n";
  out += fmt::format("\nNothing was changed.{}\n",
                     options.inventories.empty() ? "" : " The inventories are as old as their files.");
  return out;
}

}  // namespace

int what_if(const Context& context, const WhatIfOptions& options) {
  const auto refuse = [&](Error error) { return fail(context, std::move(error).in("plan")); };
  auto seen = look(context, options);
  if (!seen.ok()) return refuse(std::move(seen).error());
  if (seen->fleet.pools.empty())
    return refuse(Error(Errc::unsupported,
                        "--what-if: no GPU here can do MIG, or those that could are in use without it",
                        "what there is: bulkhead inventory"));
  std::vector<compaction::Wanted> wanted;
  for (const auto& given : options.wanted) {
    for (const auto one : split(given, ',')) {
      if (trim(one).empty()) continue;
      auto parsed = parse_wanted(one, *seen);
      if (!parsed.ok()) return refuse(std::move(parsed).error());
      wanted.push_back(std::move(*parsed));
    }
  }
  if (wanted.empty())
    return refuse(Error(Errc::invalid, "--what-if: what should fit is missing",
                        "like: bulkhead plan --what-if '12 x 3g.40gb'"));
  compaction::Limits limits;
  if (options.limited) limits.moves = options.moves;
  const auto answer = compaction::what_if(seen->fleet, wanted, limits);
  if (!answer.ok()) return refuse(Error(answer.error()).in("--what-if"));
  const bool fits = answer->fit == compaction::Fit::now || answer->fit == compaction::Fit::with_moves;
  const auto turn_on = fits ? std::nullopt : with_mig_on(*seen, wanted, limits);
  const int printed = print(options.json ? dump(to_json(*seen, wanted, *answer, turn_on)) + "\n"
                                         : page(context, *seen, wanted, *answer, turn_on, options));
  return printed != exit_ok ? printed : fits ? exit_ok : exit_findings;
}

}  // namespace bulkhead::cli
