// Placements come, move and go; the journal takes it back to the order within every index.
#include <algorithm>
#include <bit>
#include <limits>

#include <fmt/format.h>

#include "core/placement/state.hpp"

namespace bulkhead::placement {

namespace {

constexpr std::size_t slot_limit = std::size_t{1} << 24U;
constexpr std::size_t not_listed = std::numeric_limits<std::size_t>::max();
constexpr unsigned slot_bits = 32;

Use use_of(Class cls) {
  switch (cls) {
    case Class::mig:
      return Use::mig;
    case Class::share:
      return Use::share;
    case Class::exclusive:
    case Class::passthrough:
      return Use::whole;
  }
  return Use::none;
}

bool pool_serves(Pool pool, Class cls) {
  switch (cls) {
    case Class::mig:
      return pool == Pool::mig || pool == Pool::dynamic;
    case Class::share:
      return pool == Pool::share || pool == Pool::dynamic;
    case Class::exclusive:
      return pool == Pool::exclusive || pool == Pool::dynamic;
    case Class::passthrough:
      return pool == Pool::passthrough || pool == Pool::dynamic;
  }
  return false;
}

}  // namespace

// ---- journal
// -------------------------------------------------------------------------------------------------

void Engine::State::begin(Undone::Kind kind, std::uint32_t slot) {
  writing = nullptr;
  if (marks.empty() || taking_back) return;
  journal.emplace_back();
  writing = &journal.back();
  writing->kind = kind;
  writing->slot = slot;
  writing->slot_at = not_listed;
}

void Engine::State::save(GpuNo no) {
  if (writing == nullptr) return;
  for (const auto& saved : writing->gpus) {
    if (saved.gpu == no) return;
  }
  const GpuState& gpu = gpus[no];
  writing->gpus.push_back({no, gpu.mig_on, gpu.present, gpu.parts});
}

void Engine::State::touch(HostNo host) {
  if (taking_back) return;
  if (writing != nullptr) writing->stamps.emplace_back(host, hosts[host].stamp);
  hosts[host].stamp = ++stamp;
}

grid::Fleet::Undo::Step Engine::State::grid_position(GpuNo no) const {
  const grid::GpuId id = gpus[no].grid;
  grid::Fleet::Undo::Step step{id, grid::no_gpu, grid.set_of(id)};
  if (grid.drained(id)) return step;
  for (grid::GpuId at = grid.first(grid.class_of(id), step.set); at != id && at != grid::no_gpu;
       at = grid.after(at))
    step.prev = at;
  return step;
}

void Engine::State::grid_place(GpuNo no, unsigned place) {
  if (taking_back) return;
  const grid::GpuId id = gpus[no].grid;
  const grid::Tables& tables = grid.tables_of(id);
  const grid::Place& its = tables.places()[place];
  if (grid.drained(id)) {
    if (writing != nullptr) writing->grid.push_back({grid_position(no), true});
    grid.adopt(id, tables.next(grid.set_of(id), place));
  } else if (writing != nullptr) {
    grid::Repair alone;
    alone.choice = {id, its.profile, its.start, 0};
    grid::Fleet::Undo undo;
    const bool done = grid.apply(alone, &undo);
    BH_ASSERT(done && undo.count == 1);
    writing->grid.push_back({undo.steps[0], false});
  } else {
    const bool done = grid.place(id, its.profile, its.start);
    BH_ASSERT(done);
  }
}

void Engine::State::grid_remove(GpuNo no, unsigned place) {
  if (taking_back) return;
  const grid::GpuId id = gpus[no].grid;
  if (writing != nullptr) writing->grid.push_back({grid_position(no), grid.drained(id)});
  const grid::Place& its = grid.tables_of(id).places()[place];
  const bool done = grid.remove(id, its.profile, its.start);
  BH_ASSERT(done);
}

void Engine::State::grid_drain(GpuNo no, bool on) {
  const grid::GpuId id = gpus[no].grid;
  if (taking_back || grid.drained(id) == on) return;
  if (writing != nullptr) writing->grid.push_back({grid_position(no), !on});
  grid.drain(id, on);
}

void Engine::State::rollback() {
  BH_ASSERT(!marks.empty());
  taking_back = true;
  writing = nullptr;
  for (; journal.size() > marks.back(); journal.pop_back()) {
    Undone& entry = journal.back();
    Record& record = records[entry.slot];
    const auto parts = [&] { return static_cast<std::uint32_t>(record.it.parts.size()); };
    switch (entry.kind) {
      case Undone::Kind::committed:
        count_terms(entry.slot, -1);
        for (std::uint32_t p = parts(); p-- > 0;) take_part(entry.slot, p);
        break;
      case Undone::Kind::released:
        record.it = std::move(entry.was);
        record.live = true;
        read_terms(record);
        for (std::uint32_t p = 0; p < parts(); ++p) put_part(entry.slot, p);
        count_terms(entry.slot, 1);
        break;
      case Undone::Kind::moved:
        count_terms(entry.slot, -1);
        for (std::uint32_t p = 0; p < parts(); ++p) {
          if (record.it.parts[p] == entry.was.parts[p]) continue;
          take_part(entry.slot, p);
          record.it.parts[p] = entry.was.parts[p];
          put_part(entry.slot, p);
        }
        count_terms(entry.slot, 1);
        break;
    }
    for (std::size_t at = entry.grid.size(); at-- > 0;) {
      const GridStep& step = entry.grid[at];
      grid.drain(step.before.gpu, step.drained);
      grid::Fleet::Undo one;
      one.steps[0] = step.before;
      one.count = 1;
      grid.undo(one);
    }
    for (auto& saved : entry.gpus) {
      GpuState& gpu = gpus[saved.gpu];
      const bool listed = gpu.listed;
      list_idle(saved.gpu, false);
      gpu.mig_on = saved.mig_on;
      gpu.present = std::move(saved.present);
      gpu.parts = std::move(saved.parts);
      list_idle(saved.gpu, listed);
    }
    for (std::size_t at = entry.stamps.size(); at-- > 0;)
      hosts[entry.stamps[at].first].stamp = entry.stamps[at].second;
    if (entry.kind == Undone::Kind::committed) {
      record.live = false;
      record.it = {};
      record.generation = entry.generation;
      record.next_generation = entry.next_generation;
      if (entry.slot_at == not_listed) {
        records.pop_back();  // it was new, and what came later is gone
        terms.resize(records.size());
      } else {
        free_slots.insert(free_slots.begin() + static_cast<std::ptrdiff_t>(entry.slot_at), entry.slot);
      }
      --live;
    } else if (entry.kind == Undone::Kind::released) {
      BH_ASSERT(!free_slots.empty() && free_slots.back() == entry.slot);
      free_slots.pop_back();
      ++live;
    }
  }
  marks.pop_back();
  taking_back = false;
}

// ---- parts
// -----------------------------------------------------------------------------------------------------

void Engine::State::host_resources(HostNo host, std::int64_t cpu, std::int64_t memory, bool take) {
  if (cpu == 0 && memory == 0) return;
  HostState& its = hosts[host];
  its.cpu += take ? -cpu : cpu;
  its.memory += take ? -memory : memory;
  fraction::Task task;
  task.cpu_milli = cpu;
  task.memory_mib = memory;
  for (const auto& node : its.nodes) {
    auto& fleet = shares[node.dynamic ? 1 : 0];
    const bool done = take ? fleet.place(task, {node.node, 0}) : fleet.remove(task, {node.node, 0});
    BH_ASSERT(done);
  }
}

void Engine::State::block(GpuNo no) {
  GpuState& gpu = gpus[no];
  if (gpu.blocked != 0 || gpu.free_milli == 0) return;
  fraction::Task task;
  task.num_gpu = 1;
  task.gpu_milli = gpu.free_milli;
  const bool done = shares[gpu.pool == Pool::dynamic ? 1 : 0].place(task, {gpu.node, 1U << gpu.bit});
  BH_ASSERT(done);
  gpu.blocked = gpu.free_milli;
}

void Engine::State::unblock(GpuNo no) {
  GpuState& gpu = gpus[no];
  if (gpu.blocked == 0) return;
  fraction::Task task;
  task.num_gpu = 1;
  task.gpu_milli = gpu.blocked;
  const bool done = shares[gpu.pool == Pool::dynamic ? 1 : 0].remove(task, {gpu.node, 1U << gpu.bit});
  BH_ASSERT(done);
  gpu.blocked = 0;
}

void Engine::State::used(GpuNo no, Use use) {
  GpuState& gpu = gpus[no];
  if (gpu.use == use) return;
  gpu.use = use;
  if (gpu.pool == Pool::mig || gpu.pool == Pool::share) return;
  sync(no);
  sync_units(gpu.host);
}

void Engine::State::prepare(const GpuState& gpu, Class cls, Part& part, std::uint32_t slot,
                            std::vector<Present>& present, bool& mig_on, std::vector<Step>* steps) const {
  const auto no = static_cast<GpuNo>(hosts[gpu.host].first + gpu.index);
  const auto say = [&](StepKind kind, unsigned profile, unsigned start) {
    if (steps != nullptr) steps->push_back({kind, no, profile, start});
  };
  part.cut = false;
  if (cls != Class::mig) {
    const auto& profiles_of = models[gpu.model].given.geometry.profiles;
    for (const Present& it : present) say(StepKind::destroy_instance, profiles_of[it.profile].id, it.start);
    present.clear();
    if (mig_on) say(StepKind::disable_mig, 0, 0);
    mig_on = false;
    return;
  }
  const grid::Tables& tables = *models[gpu.model].tables;
  if (!mig_on) say(StepKind::enable_mig, 0, 0);
  mig_on = true;
  const unsigned profile = *tables.profile_of_id(part.profile);
  const Present wanted{static_cast<std::uint8_t>(profile), static_cast<std::uint8_t>(part.start), slot};
  for (Present& it : present) {
    if (it.profile == wanted.profile && it.start == wanted.start && it.slot == no_slot) {
      it.slot = slot;
      return;
    }
  }
  part.cut = true;
  const unsigned place = *tables.place_of(profile, part.start);
  const auto gone = [&](std::size_t at) {
    say(StepKind::destroy_instance, tables.geometry().profiles[present[at].profile].id, present[at].start);
    present.erase(present.begin() + static_cast<std::ptrdiff_t>(at));
  };
  // What lies where it goes, then, one by one, what takes engines or slices that it needs.
  for (std::size_t at = present.size(); at-- > 0;) {
    const unsigned other = *tables.place_of(present[at].profile, present[at].start);
    if (present[at].slot == no_slot && (tables.places()[other].mask & tables.places()[place].mask) != 0)
      gone(at);
  }
  while (true) {
    std::uint64_t bits = std::uint64_t{1} << place;
    for (const Present& it : present) bits |= std::uint64_t{1} << *tables.place_of(it.profile, it.start);
    if (tables.find(bits)) break;
    const auto next =
        std::find_if(present.begin(), present.end(), [](const Present& it) { return it.slot == no_slot; });
    if (next == present.end()) break;
    gone(static_cast<std::size_t>(next - present.begin()));
  }
  say(StepKind::create_instance, part.profile, part.start);
  present.insert(std::lower_bound(present.begin(), present.end(), wanted), wanted);
}

std::vector<Step> Engine::State::steps_for(Class cls, std::span<Part> parts) const {
  std::vector<Step> steps;
  if (parts.size() == 1) {
    const GpuState& gpu = gpus[parts[0].gpu];
    if (gpu.pool == Pool::mig) {
      parts[0].cut = false;
      return steps;
    }
    // Nothing idle in the way, the usual case: no need to play it through.
    if (cls == Class::mig && std::none_of(gpu.present.begin(), gpu.present.end(),
                                          [](const Present& it) { return it.slot == no_slot; })) {
      parts[0].cut = true;
      steps.reserve(gpu.mig_on ? 1 : 2);
      if (!gpu.mig_on) steps.push_back({StepKind::enable_mig, parts[0].gpu, 0, 0});
      steps.push_back({StepKind::create_instance, parts[0].gpu, parts[0].profile, parts[0].start});
      return steps;
    }
    if (cls != Class::mig && gpu.present.empty() && !gpu.mig_on) return steps;
    std::vector<Present> present = gpu.present;
    bool mig_on = gpu.mig_on;
    prepare(gpu, cls, parts[0], 0, present, mig_on, &steps);
    return steps;
  }
  for (std::size_t first = 0; first < parts.size(); ++first) {
    const GpuNo no = parts[first].gpu;
    if (std::any_of(parts.begin(), parts.begin() + static_cast<std::ptrdiff_t>(first),
                    [&](const Part& p) { return p.gpu == no; }))
      continue;
    std::vector<Present> present = gpus[no].present;
    bool mig_on = gpus[no].mig_on;
    for (std::size_t at = first; at < parts.size(); ++at) {
      if (parts[at].gpu == no) prepare(gpus[no], cls, parts[at], 0, present, mig_on, &steps);
    }
  }
  return steps;
}

void Engine::State::put_part(std::uint32_t slot, std::uint32_t at) {
  const Record& record = records[slot];
  Part part = record.it.parts[at];
  const Request& request = record.it.request;
  GpuState& gpu = gpus[part.gpu];
  save(part.gpu);
  gpu.parts.push_back({slot, at});
  host_resources(gpu.host, request.cpu_milli, request.host_memory_mib, true);
  if (request.cls != Class::mig && (gpu.mig_on || !gpu.present.empty())) {
    prepare(gpu, request.cls, part, slot, gpu.present, gpu.mig_on, nullptr);
  }
  switch (request.cls) {
    case Class::mig: {
      const grid::Tables& tables = *models[gpu.model].tables;
      const unsigned profile = *tables.profile_of_id(part.profile);
      const unsigned place = *tables.place_of(profile, part.start);
      if (gpu.listed) idle[gpu.model][profile].erase({part.gpu, static_cast<std::uint8_t>(part.start)});
      prepare(gpu, request.cls, part, slot, gpu.present, gpu.mig_on, nullptr);
      if (gpu.grid != grid::no_gpu) grid_place(part.gpu, place);
      gpu.held = tables.next(gpu.held, place);
      break;
    }
    case Class::share: {
      unblock(part.gpu);
      fraction::Task task;
      task.num_gpu = 1;
      task.gpu_milli = part.milli;
      task.gpu_memory_mib = part.memory_mib;
      const bool done = shares[gpu.pool == Pool::dynamic ? 1 : 0].place(task, {gpu.node, 1U << gpu.bit});
      BH_ASSERT(done);
      gpu.free_milli -= part.milli;
      gpu.free_memory -= part.memory_mib;
      if (!open(gpu)) block(part.gpu);
      break;
    }
    case Class::exclusive:
    case Class::passthrough:
      break;
  }
  used(part.gpu, use_of(request.cls));
}

void Engine::State::take_part(std::uint32_t slot, std::uint32_t at) {
  const Record& record = records[slot];
  const Part& part = record.it.parts[at];
  const Request& request = record.it.request;
  GpuState& gpu = gpus[part.gpu];
  save(part.gpu);
  const auto ref = std::find(gpu.parts.begin(), gpu.parts.end(), PartRef{slot, at});
  BH_ASSERT(ref != gpu.parts.end());
  gpu.parts.erase(ref);
  host_resources(gpu.host, request.cpu_milli, request.host_memory_mib, false);
  switch (request.cls) {
    case Class::mig: {
      const grid::Tables& tables = *models[gpu.model].tables;
      const unsigned profile = *tables.profile_of_id(part.profile);
      const unsigned place = *tables.place_of(profile, part.start);
      for (Present& it : gpu.present) {
        if (it.slot == slot && it.profile == profile && it.start == part.start) it.slot = no_slot;
      }
      if (gpu.listed) idle[gpu.model][profile].emplace(part.gpu, static_cast<std::uint8_t>(part.start));
      if (gpu.grid != grid::no_gpu) grid_remove(part.gpu, place);
      gpu.held = tables.without(gpu.held, place);
      break;
    }
    case Class::share: {
      unblock(part.gpu);
      fraction::Task task;
      task.num_gpu = 1;
      task.gpu_milli = part.milli;
      task.gpu_memory_mib = part.memory_mib;
      const bool done = shares[gpu.pool == Pool::dynamic ? 1 : 0].remove(task, {gpu.node, 1U << gpu.bit});
      BH_ASSERT(done);
      gpu.free_milli += part.milli;
      gpu.free_memory += part.memory_mib;
      if (!open(gpu)) block(part.gpu);
      break;
    }
    case Class::exclusive:
    case Class::passthrough:
      break;
  }
  if (gpu.parts.empty()) used(part.gpu, Use::none);
}

// ---- placements
// --------------------------------------------------------------------------------------------------

std::optional<std::string> Engine::State::misfit(const Request& request, ModelNo model,
                                                 std::span<const Part> parts, bool adopt) const {
  struct Over {
    GpuNo gpu = 0;
    grid::SetId held = 0;
    std::uint64_t taken = 0;  // fixed layout: places
    std::int32_t milli = 0;
    std::int64_t memory = 0;
    bool whole = false;
  };
  if (parts.empty() || parts.size() > most_count) return fmt::format("{} parts", parts.size());
  if (model >= models.size()) return fmt::format("there is no model {}", model);
  std::vector<Over> over;
  over.reserve(parts.size());
  std::vector<std::pair<HostNo, std::int64_t>> on_host;
  const bool room = request.cpu_milli != 0 || request.host_memory_mib != 0;
  for (const Part& part : parts) {
    if (part.gpu >= gpus.size()) return fmt::format("there is no GPU {}", part.gpu);
    const GpuState& gpu = gpus[part.gpu];
    const auto no = [&](std::string_view what) {
      return fmt::format("host {}, GPU {}: {}", hosts[gpu.host].given.name, gpu.index, what);
    };
    if (part.host != gpu.host || gpu.model != model) return no("is of another host or model than said");
    if (!pool_serves(gpu.pool, request.cls)) return no("is not kept for this class");
    if (gpu.use != Use::none && gpu.use != use_of(request.cls)) return no("serves another class now");
    auto at = std::find_if(over.begin(), over.end(), [&](const Over& o) { return o.gpu == part.gpu; });
    if (at == over.end())
      at = over.insert(over.end(),
                       {part.gpu, gpu.held, 0, gpu.free_milli, gpu.free_memory, gpu.use == Use::none});
    switch (request.cls) {
      case Class::mig: {
        const auto& tables = models[model].tables;
        const auto profile = tables ? tables->profile_of_id(part.profile) : std::nullopt;
        const auto place = profile ? tables->place_of(*profile, part.start) : std::nullopt;
        if (!place) return no("has no such place for an instance");
        if (gpu.pool == Pool::mig) {
          const auto its = std::find_if(gpu.present.begin(), gpu.present.end(), [&](const Present& it) {
            return it.profile == *profile && it.start == part.start && it.slot == no_slot;
          });
          if ((at->taken >> *place & 1U) != 0) return no("the instance is asked for twice");
          if (its == gpu.present.end()) {
            std::uint64_t bits = at->taken | std::uint64_t{1} << *place;
            for (const Present& it : gpu.present)
              bits |= std::uint64_t{1} << *tables->place_of(it.profile, it.start);
            if (!adopt || tables->next(at->held, *place) == grid::no_set || !tables->find(bits))
              return no("the instance is not there or not idle");
          }
          at->taken |= std::uint64_t{1} << *place;
        }
        const grid::SetId next = tables->next(at->held, *place);
        if (next == grid::no_set) return no("the instance does not fit beside those of tenants");
        at->held = next;
        break;
      }
      case Class::share:
        if (part.milli < 1 || part.milli > whole_gpu || part.memory_mib < 0 ||
            part.memory_mib > fraction::kMostAmount)
          return no("a share out of bounds");
        if (at->milli < part.milli) return no("too little weight is free");
        if (models[model].given.memory_mib != 0 && at->memory < part.memory_mib)
          return no("too little GPU memory is free");
        at->milli -= part.milli;
        at->memory -= part.memory_mib;
        break;
      case Class::exclusive:
      case Class::passthrough:
        if (!at->whole) return no("is not free");
        at->whole = false;
        break;
    }
    if (!room) continue;
    auto host =
        std::find_if(on_host.begin(), on_host.end(), [&](const auto& h) { return h.first == gpu.host; });
    if (host == on_host.end()) host = on_host.insert(on_host.end(), {gpu.host, 0});
    ++host->second;
    if (host->second * request.cpu_milli > hosts[gpu.host].cpu ||
        host->second * request.host_memory_mib > hosts[gpu.host].memory)
      return fmt::format("host {}: too little CPU or memory is free", hosts[gpu.host].given.name);
  }
  return std::nullopt;
}

void Engine::State::read_terms(Record& record) {
  const Request& request = record.it.request;
  record.tenant = tenant(request.tenant);
  record.avoid_gpu.clear();
  record.avoid_host.clear();
  for (const auto& name : request.avoid_on_gpu) record.avoid_gpu.push_back(tenant(name));
  for (const auto& name : request.avoid_on_host) record.avoid_host.push_back(tenant(name));
  record.guards = request.alone != Alone::no || !record.avoid_gpu.empty() || !record.avoid_host.empty();
}

void Engine::State::count_terms(std::uint32_t slot, int sign) {
  const Record& record = records[slot];
  const Request& request = record.it.request;
  terms.resize(records.size());
  terms[slot] = {request.ends.value_or(0),
                 request.price * record.it.parts.size(),
                 record.it.parts.front().host,
                 request.priority,
                 sign > 0,
                 request.movable,
                 request.ends.has_value(),
                 record.it.parts.size() > 1};
  const auto add = [&](auto& count, std::size_t by) {
    if (sign > 0) {
      count = static_cast<std::remove_reference_t<decltype(count)>>(count + by);
    } else {
      count = static_cast<std::remove_reference_t<decltype(count)>>(count - by);
    }
  };
  if (request.movable) add(movables, 1);
  if (request.ends) add(enders, 1);
  if (!record.guards) return;
  add(guards, record.it.parts.size());
  for (const Part& part : record.it.parts) add(hosts[part.host].guards, 1);
}

std::optional<std::uint32_t> Engine::State::slot_of(PlacementId id) const {
  const std::uint64_t slot = (id & 0xffffffffU) - 1;
  if (id == no_placement || slot >= records.size()) return std::nullopt;
  const Record& record = records[slot];
  if (!record.live || record.generation != id >> slot_bits) return std::nullopt;
  return static_cast<std::uint32_t>(slot);
}

Result<PlacementId> Engine::State::enter(Placement placement, bool adopt) {
  // Whatever can fail does so before the first change.
  if (auto wrong = misfit(placement.request, placement.model, placement.parts, adopt))
    return Error(Errc::conflict, std::move(*wrong));
  for (Part& part : placement.parts) {
    const GpuState& gpu = gpus[part.gpu];
    part.numa = gpu.numa;
    switch (placement.request.cls) {
      case Class::mig:
        part.size = models[gpu.model].given.geometry.by_id(part.profile)->size;
        break;
      case Class::share:
        break;
      case Class::exclusive:
      case Class::passthrough:
        part.milli = whole_gpu;
        break;
    }
  }
  std::uint32_t slot = no_slot;
  std::size_t listed = not_listed;
  std::uint32_t generation = 0;
  if (placement.id != no_placement) {
    const std::uint64_t its = (placement.id & 0xffffffffU) - 1;
    generation = static_cast<std::uint32_t>(placement.id >> slot_bits);
    if (its >= records.size() || generation == 0 || generation >= records[its].next_generation)
      return Error(Errc::invalid, fmt::format("placement {} never was", placement.id));
    if (records[its].live)
      return Error(Errc::conflict, fmt::format("the id of placement {} is in use", placement.id));
    slot = static_cast<std::uint32_t>(its);
    const auto at = std::find(free_slots.begin(), free_slots.end(), slot);
    BH_ASSERT(at != free_slots.end());
    listed = static_cast<std::size_t>(at - free_slots.begin());
  } else if (!free_slots.empty()) {
    slot = free_slots.back();
    listed = free_slots.size() - 1;
  } else {
    if (records.size() >= slot_limit)
      return Error(Errc::no_capacity, fmt::format("more than {} placements", slot_limit));
    slot = static_cast<std::uint32_t>(records.size());
    records.emplace_back();
  }
  begin(Undone::Kind::committed, slot);
  Record& record = records[slot];
  if (writing != nullptr) {
    writing->generation = record.generation;
    writing->next_generation = record.next_generation;
    writing->slot_at = listed;
  }
  if (listed != not_listed) free_slots.erase(free_slots.begin() + static_cast<std::ptrdiff_t>(listed));
  record.it = std::move(placement);
  record.generation = generation != 0 ? generation : record.next_generation++;
  record.it.id = id_of(slot);
  record.live = true;
  ++live;
  read_terms(record);
  for (std::uint32_t at = 0; at < record.it.parts.size(); ++at) {
    touch(record.it.parts[at].host);
    put_part(slot, at);
  }
  count_terms(slot, 1);
  writing = nullptr;
  return record.it.id;
}

Result<Placement> Engine::State::release(PlacementId id) {
  const auto slot = slot_of(id);
  if (!slot) return Error(Errc::not_found, fmt::format("there is no placement {}", id));
  Record& record = records[*slot];
  begin(Undone::Kind::released, *slot);
  if (writing != nullptr) writing->was = record.it;
  count_terms(*slot, -1);
  for (auto at = static_cast<std::uint32_t>(record.it.parts.size()); at-- > 0;) {
    touch(record.it.parts[at].host);
    take_part(*slot, at);
  }
  record.live = false;
  --live;
  free_slots.push_back(*slot);
  writing = nullptr;
  Placement out = std::move(record.it);
  record.it = {};
  return out;
}

Status Engine::State::move(const Move& move) {
  const auto slot = slot_of(move.placement);
  if (!slot) return Error(Errc::not_found, fmt::format("there is no placement {}", move.placement));
  Record& record = records[*slot];
  if (move.part >= record.it.parts.size())
    return Error(Errc::not_found, fmt::format("placement {} has no part {}", move.placement, move.part));
  const auto part = static_cast<std::uint32_t>(move.part);
  marks.push_back(journal.size());
  begin(Undone::Kind::moved, *slot);
  writing->was = record.it;
  touch(record.it.parts[part].host);
  count_terms(*slot, -1);
  take_part(*slot, part);
  Part to = move.to;
  const Part from = record.it.parts[part];
  if (record.it.request.cls == Class::mig) {
    to.profile = from.profile;
    to.size = from.size;
  } else {
    to.milli = from.milli;
    to.memory_mib = from.memory_mib;
  }
  auto wrong = misfit(record.it.request, record.it.model, std::span(&to, 1), false);
  if (!wrong) {
    to.numa = gpus[to.gpu].numa;
    record.it.parts[part] = to;
    touch(to.host);
  }
  put_part(*slot, part);
  count_terms(*slot, 1);
  writing = nullptr;
  if (wrong) {
    // Rolling back sees a part that is where it was: it only puts the order right.
    rollback();
    return Error(Errc::conflict, std::move(*wrong));
  }
  marks.pop_back();
  if (marks.empty()) journal.clear();
  return ok_status();
}

Status Engine::State::set_terms(PlacementId id, bool movable, std::uint64_t price, int priority,
                                std::optional<std::int64_t> ends) {
  const auto slot = slot_of(id);
  if (!slot) return Error(Errc::not_found, fmt::format("there is no placement {}", id));
  Record& record = records[*slot];
  count_terms(*slot, -1);
  Request& request = record.it.request;
  request.movable = movable;
  request.price = price;
  request.priority = priority;
  request.ends = ends;
  count_terms(*slot, 1);
  return ok_status();
}

// ---- the engine's own
// ----------------------------------------------------------------------------------------------

Result<PlacementId> Engine::commit(const Request& request, const Choice& choice) {
  if (choice.seen.size() != choice.parts.size())
    return Error(Errc::invalid, "a choice that find did not make");
  for (std::size_t at = 0; at < choice.parts.size(); ++at) {
    const HostNo host = choice.parts[at].host;
    if (host >= state_->hosts.size()) return Error(Errc::invalid, fmt::format("there is no host {}", host));
    if (state_->hosts[host].stamp != choice.seen[at])
      return Error(Errc::conflict,
                   fmt::format("host {} changed since this was chosen", state_->hosts[host].given.name),
                   "choose again");
  }
  return state_->enter({no_placement, request, choice.model, choice.parts}, false);
}
Result<PlacementId> Engine::adopt(Placement placement) { return state_->enter(std::move(placement), true); }
Result<Placement> Engine::release(PlacementId id) { return state_->release(id); }
Status Engine::move(const Move& move) { return state_->move(move); }
Status Engine::set_terms(PlacementId id, bool movable, std::uint64_t price, int priority,
                         std::optional<std::int64_t> ends) {
  return state_->set_terms(id, movable, price, priority, ends);
}
void Engine::mark() { state_->marks.push_back(state_->journal.size()); }
void Engine::rollback() {
  if (!state_->marks.empty()) state_->rollback();
}
void Engine::keep() {
  if (state_->marks.empty()) return;
  state_->marks.pop_back();
  if (state_->marks.empty()) state_->journal.clear();
}

}  // namespace bulkhead::placement
