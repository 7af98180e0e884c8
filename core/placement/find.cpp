// Where a request goes. One model at a time; within it the indexes name the first place in the order, and
// constraints that no index knows are asked of that place alone, and of others only when it fails.
#include <algorithm>
#include <bit>
#include <limits>

#include <fmt/format.h>

#include "core/placement/state.hpp"

namespace bulkhead::placement {

namespace {

constexpr unsigned word_bits = 64;
constexpr std::size_t profile_names = 1024;
constexpr std::int64_t unlimited = std::numeric_limits<std::int64_t>::max();

bool whole_class(Class cls) { return cls == Class::exclusive || cls == Class::passthrough; }

bool serves(Pool pool, Class cls) {
  if (pool == Pool::dynamic) return true;
  switch (cls) {
    case Class::mig:
      return pool == Pool::mig;
    case Class::share:
      return pool == Pool::share;
    case Class::exclusive:
      return pool == Pool::exclusive;
    case Class::passthrough:
      return pool == Pool::passthrough;
  }
  return false;
}

}  // namespace

// ---- draft
// -------------------------------------------------------------------------------------------------------

Draft::~Draft() {
  for (std::size_t at = parts_.size(); at-- > 0;) {
    if (taken_[at].grid) {
      state_.grid.undo(taken_[at].undo);
      continue;
    }
    const Part& part = parts_[at];
    if (part.milli == 0) continue;
    const GpuState& gpu = state_.gpus[part.gpu];
    fraction::Task task;
    task.num_gpu = 1;
    task.gpu_milli = part.milli;
    task.gpu_memory_mib = part.memory_mib;
    const bool done =
        state_.shares[gpu.pool == Pool::dynamic ? 1 : 0].remove(task, {gpu.node, 1U << gpu.bit});
    BH_ASSERT(done);
  }
}

void Draft::add(const Ask& ask, const Part& part) {
  const GpuState& gpu = state_.gpus[part.gpu];
  Taken taken;
  if (gpu.pool == Pool::dynamic && part.milli == 0) {
    grid::Repair alone;
    alone.choice = {gpu.grid, static_cast<unsigned>(ask.profile), part.start, 0};
    taken.grid = state_.grid.apply(alone, &taken.undo);
    BH_ASSERT(taken.grid);
  } else if (part.milli != 0) {
    fraction::Task task;
    task.num_gpu = 1;
    task.gpu_milli = part.milli;
    task.gpu_memory_mib = part.memory_mib;
    const bool done = state_.shares[gpu.pool == Pool::dynamic ? 1 : 0].place(task, {gpu.node, 1U << gpu.bit});
    BH_ASSERT(done);
  }
  parts_.push_back(part);
  taken_.push_back(taken);
}

bool Draft::has(GpuNo gpu, unsigned start) const {
  return std::any_of(parts_.begin(), parts_.end(),
                     [&](const Part& p) { return p.gpu == gpu && p.start == start; });
}
unsigned Draft::on_host(HostNo host) const {
  return static_cast<unsigned>(
      std::count_if(parts_.begin(), parts_.end(), [&](const Part& p) { return p.host == host; }));
}
unsigned Draft::on_gpu(GpuNo gpu) const {
  return static_cast<unsigned>(
      std::count_if(parts_.begin(), parts_.end(), [&](const Part& p) { return p.gpu == gpu; }));
}

// ---- reading a request
// ---------------------------------------------------------------------------------------------

Status Engine::State::check(const Request& r) const {
  const auto wrong = [](std::string what) { return Error(Errc::invalid, std::move(what)); };
  const auto texts = [&](std::string_view what, const std::vector<std::string>& list) -> Status {
    if (list.size() > most_terms)
      return wrong(fmt::format("{}: {} entries, more than {}", what, list.size(), most_terms));
    for (const auto& text : list) {
      if (text.empty() || text.size() > most_text)
        return wrong(fmt::format("{}: a text of {} bytes, not 1 to {}", what, text.size(), most_text));
    }
    return ok_status();
  };
  if (r.tenant.empty() || r.tenant.size() > most_text)
    return wrong(fmt::format("tenant: a name of {} bytes, not 1 to {}", r.tenant.size(), most_text));
  if (r.count < 1 || r.count > most_count)
    return wrong(fmt::format("count: {}, not 1 to {}", r.count, most_count));
  if (r.max_skew < 1) return wrong("max skew: 0, at least 1");
  if (r.cpu_milli < 0 || r.cpu_milli > fraction::kMostAmount)
    return wrong(fmt::format("CPU: {} milli", r.cpu_milli));
  if (r.host_memory_mib < 0 || r.host_memory_mib > fraction::kMostAmount)
    return wrong(fmt::format("host memory: {} MiB", r.host_memory_mib));
  if (r.cls == Class::mig && (r.profile.empty() || r.profile.size() > most_text))
    return wrong(fmt::format("profile: a name of {} bytes, not 1 to {}", r.profile.size(), most_text));
  if (r.cls == Class::share) {
    if (r.milli < 1 || r.milli > whole_gpu)
      return wrong(fmt::format("weight: {} milli, not 1 to {}", r.milli, whole_gpu));
    if (r.memory_mib < 0 || r.memory_mib > fraction::kMostAmount)
      return wrong(fmt::format("GPU memory: {} MiB", r.memory_mib));
  }
  BH_CHECK(texts("models", r.models));
  BH_CHECK(texts("tolerates", r.tolerates));
  BH_CHECK(texts("labels", r.labels));
  BH_CHECK(texts("avoid on GPU", r.avoid_on_gpu));
  BH_CHECK(texts("avoid on host", r.avoid_on_host));
  return ok_status();
}

const std::vector<int>& Engine::State::profile_row(const std::string& name) const {
  if (const auto known = profiles.find(name); known != profiles.end()) return known->second;
  if (profiles.size() >= profile_names) profiles.clear();
  std::vector<int> row;
  for (const ModelState& model : models) {
    const mig::Profile* its = model.tables ? model.given.geometry.by_name(name) : nullptr;
    row.push_back(its == nullptr ? -1 : static_cast<int>(its - model.given.geometry.profiles.data()));
  }
  return profiles.emplace(name, std::move(row)).first->second;
}

std::vector<ModelNo> Engine::State::models_for(const Request& request) const {
  std::vector<ModelNo> out;
  if (request.models.empty()) {
    for (std::size_t at = 0; at < models.size(); ++at) out.push_back(static_cast<ModelNo>(at));
    return out;
  }
  for (const auto& name : request.models) {
    for (std::size_t at = 0; at < models.size(); ++at) {
      const auto no = static_cast<ModelNo>(at);
      if (models[at].given.name == name && std::find(out.begin(), out.end(), no) == out.end())
        out.push_back(no);
    }
  }
  return out;
}

Ask Engine::State::read(const Request& r) const {
  Ask ask;
  ask.request = &r;
  ask.most = std::min(
      Band::warm, r.most_band.value_or(r.latency == Latency::interactive ? rules.interactive : rules.batch));
  if (const auto its = tenants.find(r.tenant); its != tenants.end()) ask.tenant = its->second;
  ask.any_taint = std::find(r.tolerates.begin(), r.tolerates.end(), "*") != r.tolerates.end();
  if (taint_sets.size() > 1 && !ask.any_taint) {
    ask.tolerated.reserve(taint_sets.size());
    for (const auto& set : taint_sets) {
      ask.tolerated.push_back(std::all_of(set.begin(), set.end(), [&](const std::string& taint) {
        return std::find(r.tolerates.begin(), r.tolerates.end(), taint) != r.tolerates.end();
      }));
    }
  }
  for (const auto& text : r.labels) {
    if (const auto its = labels.find(text); its != labels.end()) {
      ask.labels.push_back(its->second);
    } else {
      ask.label_unknown = true;
    }
  }
  const auto known = [&](const std::vector<std::string>& names, std::vector<TenantNo>& out) {
    for (const auto& name : names) {
      if (const auto its = tenants.find(name); its != tenants.end()) out.push_back(its->second);
    }
  };
  known(r.avoid_on_gpu, ask.avoid_gpu);
  known(r.avoid_on_host, ask.avoid_host);
  ask.terms = !r.labels.empty() || !ask.avoid_gpu.empty() || !ask.avoid_host.empty() || r.alone != Alone::no;
  ask.room = r.cpu_milli != 0 || r.host_memory_mib != 0;
  return ask;
}

bool Engine::State::aim(Ask& ask, ModelNo model) const {
  ask.model = model;
  ask.profile = -1;
  ask.classes.clear();
  if (ask.request->cls != Class::mig) return true;
  ask.profile = profile_row(ask.request->profile)[model];
  if (ask.profile < 0) return false;
  if (ask.tolerated.empty() && (ask.most >= Band::warm || warm_gpus == 0)) return true;
  ask.classes.assign(classes.size() / word_bits + 1, 0);
  for (std::size_t at = 0; at < classes.size(); ++at) {
    const GridClass& its = classes[at];
    if (its.model != model || its.band > ask.most) continue;
    if (!ask.tolerated.empty() && ask.tolerated[its.taints] == 0) continue;
    ask.classes[at / word_bits] |= std::uint64_t{1} << (at % word_bits);
  }
  return true;
}

// ---- what is asked of a GPU
// --------------------------------------------------------------------------------------

Why Engine::State::host_why(const Ask& ask, HostNo host) const {
  const HostState& its = hosts[host];
  const Request& r = *ask.request;
  if (ask.label_unknown) return Why::label;
  for (const std::uint32_t label : ask.labels) {
    if (!std::binary_search(its.labels.begin(), its.labels.end(), label)) return Why::label;
  }
  if (!ask.tolerated.empty() && ask.tolerated[its.taints] == 0) return Why::taint;
  if (ask.avoid_host.empty() && r.alone != Alone::host && its.guards == 0) return Why::none;
  for (std::uint32_t at = 0; at < its.gpus; ++at) {
    for (const PartRef& ref : gpus[its.first + at].parts) {
      const Record& other = records[ref.slot];
      if (other.tenant == ask.tenant || ask.gone(ref.slot)) continue;
      if (r.alone == Alone::host || other.it.request.alone == Alone::host) return Why::anti_affinity;
      if (std::find(ask.avoid_host.begin(), ask.avoid_host.end(), other.tenant) != ask.avoid_host.end())
        return Why::anti_affinity;
      if (std::find(other.avoid_host.begin(), other.avoid_host.end(), ask.tenant) != other.avoid_host.end())
        return Why::anti_affinity;
    }
  }
  return Why::none;
}

Why Engine::State::static_why(const Ask& ask, GpuNo no) const {
  const GpuState& gpu = gpus[no];
  const Request& r = *ask.request;
  if (!serves(gpu.pool, r.cls)) return Why::pool;
  if (gpu.model != ask.model) return Why::model;
  if (r.cls == Class::mig) {
    if (ask.profile < 0) return Why::profile;
    if (gpu.pool == Pool::mig && std::none_of(gpu.present.begin(), gpu.present.end(),
                                              [&](const Present& it) { return it.profile == ask.profile; }))
      return Why::profile;
  }
  if (gpu.drained || hosts[gpu.host].given.drained) return Why::drained;
  const Why host = host_why(ask, gpu.host);
  if (host == Why::label || host == Why::taint) return host;
  if (gpu.band == Band::hot || gpu.band > ask.most) return Why::band;
  if (host != Why::none) return host;
  if (ask.avoid_gpu.empty() && r.alone == Alone::no && hosts[gpu.host].guards == 0) return Why::none;
  for (const PartRef& ref : gpu.parts) {
    const Record& other = records[ref.slot];
    if (other.tenant == ask.tenant || ask.gone(ref.slot)) continue;
    if (r.alone != Alone::no || other.it.request.alone != Alone::no) return Why::anti_affinity;
    if (std::find(ask.avoid_gpu.begin(), ask.avoid_gpu.end(), other.tenant) != ask.avoid_gpu.end())
      return Why::anti_affinity;
    if (std::find(other.avoid_gpu.begin(), other.avoid_gpu.end(), ask.tenant) != other.avoid_gpu.end())
      return Why::anti_affinity;
  }
  return Why::none;
}

unsigned Engine::State::parts_on(const Ask& ask, GpuNo no) const {
  const GpuState& gpu = gpus[no];
  const Request& r = *ask.request;
  Use use = gpu.use;
  grid::SetId held = gpu.held;
  std::int32_t milli = gpu.free_milli;
  std::int64_t memory = gpu.free_memory;
  if (ask.without != nullptr) {
    std::size_t stay = 0;
    for (const PartRef& ref : gpu.parts) {
      if (!ask.gone(ref.slot)) {
        ++stay;
        continue;
      }
      const Part& part = records[ref.slot].it.parts[ref.part];
      if (use == Use::share) {
        milli += part.milli;
        memory += part.memory_mib;
      } else if (use == Use::mig) {
        const grid::Tables& tables = *models[gpu.model].tables;
        held = tables.without(held, *tables.place_of(*tables.profile_of_id(part.profile), part.start));
      }
    }
    if (stay == 0) use = Use::none;
  }
  switch (r.cls) {
    case Class::mig:
      if (gpu.pool == Pool::mig)
        return static_cast<unsigned>(
            std::count_if(gpu.present.begin(), gpu.present.end(), [&](const Present& it) {
              return (it.slot == no_slot || ask.gone(it.slot)) && it.profile == ask.profile;
            }));
      if (use != Use::none && use != Use::mig) return 0;
      return models[gpu.model].tables->maxpack(held, static_cast<unsigned>(ask.profile));
    case Class::share: {
      if (use != Use::none && use != Use::share) return 0;
      std::int64_t most = milli / r.milli;
      if (r.memory_mib > 0 && models[gpu.model].given.memory_mib != 0)
        most = std::min(most, memory / r.memory_mib);
      return static_cast<unsigned>(most);
    }
    case Class::exclusive:
    case Class::passthrough:
      return use == Use::none ? 1 : 0;
  }
  return 0;
}

std::int64_t Engine::State::parts_by_host(const Ask& ask, HostNo host) const {
  const Request& r = *ask.request;
  if (!ask.room) return unlimited;
  std::int64_t cpu = hosts[host].cpu, memory = hosts[host].memory, most = unlimited;
  if (ask.without != nullptr) {
    for (const std::uint32_t slot : *ask.without) {
      const Placement& gone = records[slot].it;
      for (const Part& part : gone.parts) {
        if (part.host != host) continue;
        cpu += gone.request.cpu_milli;
        memory += gone.request.host_memory_mib;
      }
    }
  }
  if (r.cpu_milli > 0) most = cpu / r.cpu_milli;
  if (r.host_memory_mib > 0) most = std::min(most, memory / r.host_memory_mib);
  return most;
}

std::int64_t Engine::State::capacity(const Ask& ask, std::span<const GpuNo> those) const {
  std::int64_t sum = 0;
  for (const GpuNo gpu : those) {
    if (const unsigned its = parts_on(ask, gpu); its > 0 && static_why(ask, gpu) == Why::none) sum += its;
  }
  return those.empty() ? 0 : std::min(sum, parts_by_host(ask, gpus[those.front()].host));
}

std::vector<GpuNo> Engine::State::gpus_of(HostNo host, std::optional<unsigned> numa) const {
  std::vector<GpuNo> out;
  for (std::uint32_t at = 0; at < hosts[host].gpus; ++at) {
    const auto gpu = static_cast<GpuNo>(hosts[host].first + at);
    if (!numa || gpus[gpu].numa == *numa) out.push_back(gpu);
  }
  return out;
}

Part Engine::State::part_at(const Ask& ask, GpuNo no) const {
  const GpuState& gpu = gpus[no];
  Part part;
  part.host = gpu.host;
  part.gpu = no;
  part.numa = gpu.numa;
  switch (ask.request->cls) {
    case Class::mig: {
      const mig::Profile& its =
          models[gpu.model].given.geometry.profiles[static_cast<std::size_t>(ask.profile)];
      part.profile = its.id;
      part.size = its.size;
      break;
    }
    case Class::share:
      part.milli = ask.request->milli;
      part.memory_mib = ask.request->memory_mib;
      break;
    case Class::exclusive:
    case Class::passthrough:
      part.milli = whole_gpu;
      break;
  }
  return part;
}

// ---- one part
// ------------------------------------------------------------------------------------------------------

std::optional<Part> Engine::State::pick(const Ask& ask, const Draft& draft,
                                        const grid::Ref<bool(GpuNo)>& also) {
  const Request& r = *ask.request;
  const bool drafted = !draft.parts().empty();
  const auto host_has = [&](HostNo host) {
    return !ask.room || parts_by_host(ask, host) > (drafted ? draft.on_host(host) : 0);
  };
  const bool apart = ask.terms || guards != 0;
  if (r.cls == Class::mig) {
    const auto profile = static_cast<unsigned>(ask.profile);
    for (const auto& [gpu, start] : idle[ask.model][profile]) {
      if (drafted && draft.has(gpu, start)) continue;
      if (!host_has(gpus[gpu].host) || static_why(ask, gpu) != Why::none || (also && !also(gpu))) continue;
      Part part = part_at(ask, gpu);
      part.start = start;
      return part;
    }
    const auto fine = [&](grid::GpuId id) {
      const GpuNo gpu = of_grid[id];
      return host_has(gpus[gpu].host) && (!apart || static_why(ask, gpu) == Why::none) &&
             (!also || also(gpu));
    };
    grid::Request wanted;
    wanted.model = models[ask.model].grid;
    wanted.profile = profile;
    wanted.classes = ask.classes;
    auto choice = grid.choose(wanted);
    if (choice && (apart || ask.room || also) && !fine(choice->gpu)) {
      wanted.filter = fine;
      wanted.scan = std::numeric_limits<std::size_t>::max();
      choice = grid.choose(wanted);
    }
    if (!choice) return std::nullopt;
    Part part = part_at(ask, of_grid[choice->gpu]);
    part.start = choice->start;
    part.growth = choice->growth;
    return part;
  }
  fraction::Task task;
  task.cpu_milli = r.cpu_milli;
  task.memory_mib = r.host_memory_mib;
  task.num_gpu = 1;
  task.gpu_milli = r.milli;
  task.models = models.size() > 1 ? std::uint64_t{1} << ask.model : 0;
  task.gpu_memory_mib = r.memory_mib;
  const bool asks = apart || also || (drafted && ask.room) || !ask.tolerated.empty() ||
                    (warm_gpus != 0 && ask.most < Band::warm);
  const auto fine = [&](GpuNo gpu) {
    return host_has(gpus[gpu].host) && static_why(ask, gpu) == Why::none && (!also || also(gpu));
  };
  for (std::size_t which = 0; which < shares.size(); ++which) {
    if (nodes[which].empty()) continue;
    const auto chosen_gpu = [&](const fraction::Choice& c) {
      return nodes[which][c.node].gpus[static_cast<unsigned>(std::countr_zero(c.gpus))];
    };
    auto choice = shares[which].choose(task);
    if (!choice) continue;
    if (!asks || fine(chosen_gpu(*choice))) return part_at(ask, chosen_gpu(*choice));
    // The draft's parts are in the index and not in the GPU's own figures.
    const auto room_on = [&](const fraction::Free& free, unsigned bit) {
      return free.gpu_milli[bit] >= r.milli &&
             (models[ask.model].given.memory_mib == 0 || free.gpu_memory_mib[bit] >= r.memory_mib);
    };
    const auto allowed = [&](fraction::NodeId node) {
      const NodeOf& its = nodes[which][node];
      if (its.model != ask.model) return false;
      const fraction::Free free = shares[which].free(node);
      for (unsigned bit = 0; bit < its.count; ++bit) {
        if (room_on(free, bit) && fine(its.gpus[bit])) return true;
      }
      return false;
    };
    fraction::Filter filter;
    filter.context = &allowed;
    filter.allows = [](const void* context, fraction::NodeId node) {
      return (*static_cast<const decltype(allowed)*>(context))(node);
    };
    choice = shares[which].choose(task, filter);
    if (!choice) continue;
    if (fine(chosen_gpu(*choice))) return part_at(ask, chosen_gpu(*choice));
    const NodeOf& its = nodes[which][choice->node];
    const fraction::Free free = shares[which].free(choice->node);
    std::optional<unsigned> best;
    for (unsigned bit = 0; bit < its.count; ++bit) {
      if (!room_on(free, bit) || !fine(its.gpus[bit])) continue;
      if (!best || free.gpu_milli[bit] < free.gpu_milli[*best]) best = bit;
    }
    if (best) return part_at(ask, its.gpus[*best]);
  }
  return std::nullopt;
}

// ---- several parts
// ---------------------------------------------------------------------------------------------------

// On GPUs of one host whose capacity was found to be enough, each step leaving enough for the rest.
bool Engine::State::fill(const Ask& ask, std::span<const GpuNo> those, unsigned count,
                         std::vector<Part>& out) const {
  struct Here {
    GpuNo gpu = 0;
    bool dynamic = false;
    unsigned room = 0;
    grid::SetId held = 0;
    std::int32_t milli = 0;
    std::vector<std::uint8_t> idle = {};  // starts of a fixed layout
  };
  std::vector<Here> here;
  std::int64_t room = 0;
  for (const GpuNo no : those) {
    const unsigned its = parts_on(ask, no);
    if (its == 0 || static_why(ask, no) != Why::none) continue;
    const GpuState& gpu = gpus[no];
    Here h{no, gpu.pool == Pool::dynamic, its, gpu.held, gpu.free_milli, {}};
    if (ask.request->cls == Class::mig && !h.dynamic) {
      for (const Present& it : gpu.present) {
        if (it.slot == no_slot && it.profile == ask.profile) h.idle.push_back(it.start);
      }
    }
    here.push_back(std::move(h));
    room += its;
  }
  for (unsigned left = count; left > 0; --left) {
    Here* best = nullptr;
    Part part;
    if (ask.request->cls == Class::mig) {
      const auto fixed =
          std::find_if(here.begin(), here.end(), [](const Here& h) { return !h.idle.empty(); });
      if (fixed != here.end()) {
        best = &*fixed;
        part = part_at(ask, best->gpu);
        part.start = best->idle.front();
        best->idle.erase(best->idle.begin());
        --best->room;
        --room;
      } else {
        const grid::Tables& tables = *models[ask.model].tables;
        const auto profile = static_cast<unsigned>(ask.profile);
        std::array<std::int64_t, 4> rank = {};
        unsigned place = 0;
        for (Here& h : here) {
          if (!h.dynamic || h.room == 0) continue;
          for (unsigned at = tables.first_place(profile);
               at < tables.first_place(profile) + tables.places_of(profile).size(); ++at) {
            const grid::SetId next = tables.next(h.held, at);
            if (next == grid::no_set || room - h.room + tables.maxpack(next, profile) + 1 < left) continue;
            const std::array<std::int64_t, 4> its = {h.held == 0 ? 1 : 0, tables.growth(h.held, at),
                                                     static_cast<std::int64_t>(tables.free_units(h.held)),
                                                     tables.places()[at].start};
            if (best != nullptr && rank <= its) continue;
            best = &h;
            rank = its;
            place = at;
          }
        }
        if (best == nullptr) return false;
        part = part_at(ask, best->gpu);
        part.start = tables.places()[place].start;
        part.growth = static_cast<std::int32_t>(rank[1]);
        best->held = tables.next(best->held, place);
        const unsigned now = tables.maxpack(best->held, profile);
        room -= best->room - now;
        best->room = now;
      }
    } else {
      for (Here& h : here) {
        if (h.room == 0) continue;
        if (best == nullptr || std::pair(h.dynamic, h.milli) < std::pair(best->dynamic, best->milli))
          best = &h;
      }
      if (best == nullptr) return false;
      part = part_at(ask, best->gpu);
      best->milli -= part.milli;
      --best->room;
      --room;
    }
    out.push_back(part);
  }
  return true;
}

bool Engine::State::parts_any(const Ask& ask, std::vector<Part>& out) {
  const unsigned count = ask.request->count;
  {
    Draft draft(*this);
    while (draft.parts().size() < count) {
      const auto part = pick(ask, draft, {});
      if (!part) break;
      draft.add(ask, *part);
    }
    if (draft.parts().size() == count) {
      out = draft.parts();
      return true;
    }
  }
  // Part by part it did not go. Only where a place can cost two of the kind can there be another way.
  if (count == 1 || ask.request->cls != Class::mig ||
      !models[ask.model].wasteful[static_cast<unsigned>(ask.profile)])
    return false;
  std::int64_t left = count;
  for (HostNo host = 0; host < hosts.size() && left > 0; ++host) {
    const auto those = gpus_of(host);
    const std::int64_t take = std::min(left, capacity(ask, those));
    if (take > 0 && !fill(ask, those, static_cast<unsigned>(take), out)) return false;
    left -= take;
  }
  return left == 0;
}

bool Engine::State::parts_together(const Ask& ask, std::vector<Part>& out) {
  const Request& r = *ask.request;
  const auto around = [&](GpuNo gpu) {
    if (r.topology == Topology::same_gpu) return std::vector<GpuNo>{gpu};
    return gpus_of(gpus[gpu].host, r.topology == Topology::same_numa ? std::optional<unsigned>(gpus[gpu].numa)
                                                                     : std::nullopt);
  };
  const auto enough = [&](GpuNo gpu) { return capacity(ask, around(gpu)) >= r.count; };
  const Draft draft(*this);
  const auto first = pick(ask, draft, enough);
  return first && fill(ask, around(first->gpu), r.count, out);
}

bool Engine::State::parts_spread(const Ask& ask, std::vector<Part>& out) {
  const Request& r = *ask.request;
  const bool by_host = r.topology == Topology::spread_hosts;
  // With more domains than parts somebody gets none, so nobody gets more than the skew.
  std::size_t domains = 0;
  for (HostNo host = 0; host < hosts.size() && domains <= r.count; ++host) {
    bool any = false;
    for (std::uint32_t at = 0; at < hosts[host].gpus && domains <= r.count; ++at) {
      if (static_why(ask, hosts[host].first + at) != Why::none) continue;
      if (by_host) {
        any = true;
        break;
      }
      ++domains;
    }
    if (any) ++domains;
  }
  if (domains > r.count) {
    Draft draft(*this);
    for (unsigned level = 1; level <= r.max_skew && draft.parts().size() < r.count; ++level) {
      const auto below = [&](GpuNo gpu) {
        return (by_host ? draft.on_host(gpus[gpu].host) : draft.on_gpu(gpu)) < level;
      };
      const std::size_t before = draft.parts().size();
      while (draft.parts().size() < r.count) {
        const auto part = pick(ask, draft, below);
        if (!part) break;
        draft.add(ask, *part);
      }
      if (draft.parts().size() == before) break;
    }
    if (draft.parts().size() == r.count) {
      out = draft.parts();
      return true;
    }
    if (r.cls != Class::mig || !models[ask.model].wasteful[static_cast<unsigned>(ask.profile)]) return false;
  }
  return by_quota(ask, out);
}

// A share for every domain first, then each takes what it may: exact, and looks at all of them.
bool Engine::State::by_quota(const Ask& ask, std::vector<Part>& out) {
  const Request& r = *ask.request;
  struct Domain {
    std::vector<GpuNo> gpus = {};
    std::int64_t room = 0, quota = 0;
  };
  std::vector<Domain> domains;
  for (HostNo host = 0; host < hosts.size(); ++host) {
    auto those = gpus_of(host);
    std::erase_if(those, [&](GpuNo gpu) { return static_why(ask, gpu) != Why::none; });
    if (those.empty()) continue;
    if (r.topology == Topology::spread_hosts) {
      const std::int64_t room = capacity(ask, those);
      domains.push_back({std::move(those), room, 0});
    } else {
      for (const GpuNo gpu : those) domains.push_back({{gpu}, capacity(ask, std::span(&gpu, 1)), 0});
    }
  }
  if (domains.empty()) return false;
  const auto count = static_cast<std::int64_t>(r.count), number = static_cast<std::int64_t>(domains.size());
  const auto skew = static_cast<std::int64_t>(r.max_skew);
  std::int64_t least = unlimited;
  for (const Domain& d : domains) least = std::min(least, d.room);
  // GPUs of one host share its CPU and memory: what one takes another lacks. Those are told apart by trying.
  const bool shared = r.topology == Topology::spread_gpus && ask.room;
  for (std::int64_t level = std::min(count / number, least); level >= 0; --level) {
    std::vector<std::pair<HostNo, std::int64_t>> on_host;
    const auto may = [&](const Domain& d, bool take) {
      if (!shared) return true;
      const HostNo host = gpus[d.gpus.front()].host;
      auto at =
          std::find_if(on_host.rbegin(), on_host.rend(), [&](const auto& h) { return h.first == host; });
      if (at == on_host.rend()) {
        on_host.emplace_back(host, 0);
        at = on_host.rbegin();
      }
      if (at->second >= parts_by_host(ask, host)) return false;
      at->second += take ? 1 : 0;
      return true;
    };
    std::int64_t left = count;
    bool fits = true;
    for (Domain& d : domains) d.quota = 0;
    for (std::int64_t round = 0; round < level + skew && left > 0 && fits; ++round) {
      const std::int64_t before = left;
      for (Domain& d : domains) {
        if (left == 0) break;
        if (d.quota < d.room && d.quota == round && may(d, true)) {
          ++d.quota;
          --left;
        } else if (round < level) {
          fits = false;
        }
      }
      if (left == before) break;
    }
    if (!fits || left > 0) continue;
    out.clear();
    for (const Domain& d : domains) {
      if (d.quota > 0 && !fill(ask, d.gpus, static_cast<unsigned>(d.quota), out)) return false;
    }
    return true;
  }
  return false;
}

// ---- whole GPUs
// ------------------------------------------------------------------------------------------------------

std::uint32_t Engine::State::whole_mask(const Ask& ask, HostNo host) const {
  const std::size_t cls = ask.request->cls == Class::exclusive ? 0 : 1,
                    level = ask.most == Band::cool ? 0 : 1;
  for (const Unit& unit : hosts[host].units) {
    if (unit.model == ask.model) return unit.free[cls][level];
  }
  return 0;
}

std::optional<Engine::State::WholeHost> Engine::State::best_host(
    const Ask& ask, unsigned k, const grid::Ref<bool(HostNo, std::uint32_t)>& also) {
  const std::size_t cls = ask.request->cls == Class::exclusive ? 0 : 1,
                    level = ask.most == Band::cool ? 0 : 1;
  const bool one_numa = ask.request->topology == Topology::same_numa;
  const bool asks = ask.terms || guards != 0 || !ask.tolerated.empty();
  std::optional<WholeHost> best;
  for (const auto& [name, here] : wholes[cls][level][ask.model]) {
    const SetTable& table = shapes[name >> 16U];
    const auto mask = static_cast<std::uint32_t>(name & 0xffffU);
    if (static_cast<unsigned>(std::popcount(mask)) < k) continue;
    std::uint64_t key = 0;
    std::uint32_t set = 0;
    if (one_numa) {
      std::uint32_t rest = mask;
      while (rest != 0) {
        const std::uint8_t numa = table.shape().numa[static_cast<unsigned>(std::countr_zero(rest))];
        std::uint32_t node = 0;
        for (std::uint32_t bits = rest; bits != 0; bits &= bits - 1) {
          if (table.shape().numa[static_cast<unsigned>(std::countr_zero(bits))] == numa)
            node |= bits & (~bits + 1);
        }
        rest &= ~node;
        const auto& its = table.best(node, k);
        if (its.gpus != 0 && (set == 0 || its.key < key)) {
          key = its.key;
          set = its.gpus;
        }
      }
    } else {
      const auto& its = table.best(mask, k);
      key = its.key;
      set = its.gpus;
    }
    if (set == 0 || (best && key > best->key)) continue;
    for (const HostNo host : here) {
      if (best && key == best->key && host > best->host) break;
      if (asks && host_why(ask, host) != Why::none) continue;
      if (ask.room && parts_by_host(ask, host) < k) continue;
      if (also && !also(host, mask)) continue;
      best = {host, set, key};
      break;
    }
  }
  return best;
}

bool Engine::State::whole_sets(const Ask& ask, std::vector<Part>& out) {
  const Request& r = *ask.request;
  const auto take = [&](HostNo host, std::uint32_t set) {
    for (; set != 0; set &= set - 1)
      out.push_back(part_at(ask, hosts[host].first + static_cast<GpuNo>(std::countr_zero(set))));
  };
  if (r.topology == Topology::same_gpu && r.count != 1) return false;
  if (r.topology == Topology::spread_hosts && r.count > 1) {
    std::size_t domains = 0;
    for (HostNo host = 0; host < hosts.size() && domains <= r.count; ++host) {
      for (std::uint32_t at = 0; at < hosts[host].gpus; ++at) {
        if (static_why(ask, hosts[host].first + at) != Why::none) continue;
        ++domains;
        break;
      }
    }
    if (domains == 0) return false;
    std::map<HostNo, unsigned> quota;
    const auto on = [&](HostNo host) {
      const auto at = quota.find(host);
      return at == quota.end() ? 0U : at->second;
    };
    if (domains > r.count) {
      unsigned left = r.count;
      for (unsigned level = 1; level <= r.max_skew && left > 0; ++level) {
        const unsigned before = left;
        while (left > 0) {
          const auto below = [&](HostNo host, std::uint32_t mask) {
            const unsigned its = on(host);
            return its < level && its < static_cast<unsigned>(std::popcount(mask)) &&
                   parts_by_host(ask, host) > its;
          };
          const auto host = best_host(ask, 1, below);
          if (!host) break;
          ++quota[host->host];
          --left;
        }
        if (left == before) break;
      }
      if (left > 0) return false;
    } else {
      std::vector<Part> parts;
      if (!by_quota(ask, parts)) return false;
      for (const Part& part : parts) ++quota[part.host];
    }
    for (const auto& [host, count] : quota)
      take(host, shapes[hosts[host].shape].best(whole_mask(ask, host), count).gpus);
    return true;
  }
  if (r.count <= most_gpus_of_host) {
    if (const auto host = best_host(ask, r.count, {})) {
      take(host->host, host->gpus);
      return true;
    }
  }
  if (r.topology == Topology::same_node || r.topology == Topology::same_numa || r.count == 1) return false;
  // Over several hosts: the emptiest give all they can.
  struct Has {
    unsigned count = 0;
    HostNo host = 0;
  };
  std::vector<Has> has;
  for (HostNo host = 0; host < hosts.size(); ++host) {
    const auto free = static_cast<std::int64_t>(std::popcount(whole_mask(ask, host)));
    const std::int64_t count = std::min(free, parts_by_host(ask, host));
    if (count > 0 && host_why(ask, host) == Why::none) has.push_back({static_cast<unsigned>(count), host});
  }
  std::stable_sort(has.begin(), has.end(), [](const Has& a, const Has& b) { return a.count > b.count; });
  std::vector<char> taken(hosts.size(), 0);
  unsigned left = r.count;
  for (const Has& it : has) {
    if (left == 0) break;
    if (it.count < left) {
      take(it.host, shapes[hosts[it.host].shape].best(whole_mask(ask, it.host), it.count).gpus);
      taken[it.host] = 1;
      left -= it.count;
      continue;
    }
    const auto fresh = [&](HostNo host, std::uint32_t) { return taken[host] == 0; };
    const auto last = best_host(ask, left, fresh);
    if (!last) break;
    take(last->host, last->gpus);
    left = 0;
  }
  return left == 0;
}

// ---- all of it
// ---------------------------------------------------------------------------------------------------------

std::optional<Choice> Engine::State::find_aimed(const Ask& ask) {
  const Request& r = *ask.request;
  Choice choice;
  bool fits = false;
  if (whole_class(r.cls)) {
    fits = whole_sets(ask, choice.parts);
  } else if (r.count == 1) {
    const Draft draft(*this);
    if (const auto part = pick(ask, draft, {})) {
      choice.parts.push_back(*part);
      fits = true;
    }
  } else {
    switch (r.topology) {
      case Topology::any:
        fits = parts_any(ask, choice.parts);
        break;
      case Topology::same_gpu:
      case Topology::same_numa:
      case Topology::same_node:
        fits = parts_together(ask, choice.parts);
        break;
      case Topology::spread_gpus:
      case Topology::spread_hosts:
        fits = parts_spread(ask, choice.parts);
        break;
    }
  }
  if (!fits) return std::nullopt;
  choice.model = ask.model;
  choice.seen.reserve(choice.parts.size());
  for (const Part& part : choice.parts) choice.seen.push_back(hosts[part.host].stamp);
  choice.steps = steps_for(r.cls, choice.parts);
  return choice;
}

std::optional<Choice> Engine::State::find(const Request& request) {
  if (!check(request).ok()) return std::nullopt;
  Ask ask = read(request);
  const auto try_model = [&](ModelNo model) { return aim(ask, model) ? find_aimed(ask) : std::nullopt; };
  if (request.models.empty()) {
    for (std::size_t at = 0; at < models.size(); ++at) {
      if (auto choice = try_model(static_cast<ModelNo>(at))) return choice;
    }
    return std::nullopt;
  }
  for (const ModelNo model : models_for(request)) {
    if (auto choice = try_model(model)) return choice;
  }
  return std::nullopt;
}

Status Engine::check(const Request& request) const { return state_->check(request); }
std::optional<Choice> Engine::find(const Request& request) { return state_->find(request); }

}  // namespace bulkhead::placement
