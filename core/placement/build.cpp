// Models, hosts and GPUs as they are added and changed; which index knows what of a GPU.
#include <algorithm>
#include <bit>

#include <fmt/format.h>

#include "core/placement/state.hpp"

namespace bulkhead::placement {

namespace {

constexpr std::size_t taint_set_limit = 4096;
constexpr std::size_t shape_limit = 4096;  // 40 kB each

Error invalid(std::string what) { return Error(Errc::invalid, std::move(what)); }

Status check_texts(std::string_view what, const std::vector<std::string>& texts) {
  if (texts.size() > most_terms) return invalid(fmt::format("{}: more than {}", what, most_terms));
  for (const auto& text : texts) {
    if (text.empty() || text.size() > most_text)
      return invalid(fmt::format("{}: a text of {} bytes, not 1 to {}", what, text.size(), most_text));
  }
  return ok_status();
}

bool serves_whole(Pool pool, std::size_t cls) {
  return pool == Pool::dynamic || pool == (cls == 0 ? Pool::exclusive : Pool::passthrough);
}

}  // namespace

bool Engine::State::open(const GpuState& gpu) const {
  return !gpu.drained && !hosts[gpu.host].given.drained && gpu.band != Band::hot && gpu.pool != Pool::closed;
}

Result<ModelNo> Engine::State::add_model(Model model) {
  if (model.name.empty() || model.name.size() > most_text)
    return invalid(fmt::format("a model's name of {} bytes, not 1 to {}", model.name.size(), most_text));
  if (model.memory_mib < 0 || model.memory_mib > fraction::kMostAmount)
    return invalid(fmt::format("model {}: {} MiB of memory", model.name, model.memory_mib));
  for (std::size_t at = 0; at < models.size(); ++at) {
    const Model& known = models[at].given;
    if (known.name == model.name && known.geometry == model.geometry && known.memory_mib == model.memory_mib)
      return static_cast<ModelNo>(at);
  }
  if (models.size() >= most_models)
    return Error(Errc::no_capacity, fmt::format("model {}: more than {} models", model.name, most_models));
  ModelState state;
  if (!model.geometry.profiles.empty()) {
    auto tables = grid::Tables::make(model.geometry);
    if (!tables.ok()) return std::move(tables).error().in(fmt::format("model {}", model.name));
    state.tables = std::make_unique<grid::Tables>(std::move(tables).value());
    BH_TRY(state.grid, grid.add_model(*state.tables));
    const grid::Tables& its = *state.tables;
    for (unsigned p = 0; p < its.profile_count(); ++p) {
      const auto ranked = its.ranked(p);
      state.wasteful.push_back(std::any_of(ranked.begin(), ranked.end(), [&](const grid::Ranked& r) {
        return its.maxpack(r.after, p) + 1 < its.maxpack(r.set, p);
      }));
    }
  }
  idle.emplace_back(state.tables ? state.tables->profile_count() : 0);
  for (auto& of_class : wholes) {
    for (auto& of_level : of_class) of_level.emplace_back();
  }
  state.given = std::move(model);
  models.push_back(std::move(state));
  profiles.clear();
  return static_cast<ModelNo>(models.size() - 1);
}

TenantNo Engine::State::tenant(const std::string& name) {
  return tenants.try_emplace(name, static_cast<TenantNo>(tenants.size())).first->second;
}
std::uint32_t Engine::State::label(const std::string& text) {
  return labels.try_emplace(text, static_cast<std::uint32_t>(labels.size())).first->second;
}

std::uint32_t Engine::State::taint_set(std::vector<std::string> taints) {
  std::sort(taints.begin(), taints.end());
  taints.erase(std::unique(taints.begin(), taints.end()), taints.end());
  const auto [at, fresh] = taint_set_ids.try_emplace(taints, static_cast<std::uint32_t>(taint_sets.size()));
  if (fresh) taint_sets.push_back(std::move(taints));
  return at->second;
}

Result<grid::ClassId> Engine::State::class_for(ModelNo model, std::uint32_t taints, Band band) {
  const GridClass wanted{model, taints, band == Band::warm ? Band::warm : Band::cool};
  if (const auto known = class_ids.find(wanted); known != class_ids.end()) return known->second;
  BH_TRY(const grid::ClassId id, grid.add_class(models[model].grid));
  class_ids.emplace(wanted, id);
  classes.push_back(wanted);
  return id;
}

Result<HostNo> Engine::State::add_host(Host host) {
  const auto in = [&](Error error) { return std::move(error).in(fmt::format("host {}", host.name)); };
  if (host.name.empty() || host.name.size() > most_text)
    return invalid(fmt::format("a host's name of {} bytes, not 1 to {}", host.name.size(), most_text));
  if (host_names.contains(host.name)) return in(invalid("there is one of this name"));
  if (hosts.size() >= most_hosts)
    return in(Error(Errc::no_capacity, fmt::format("more than {} hosts", most_hosts)));
  if (host.cpu_milli < 0 || host.cpu_milli > fraction::kMostAmount)
    return in(invalid(fmt::format("{} milli of CPU", host.cpu_milli)));
  if (host.memory_mib < 0 || host.memory_mib > fraction::kMostAmount)
    return in(invalid(fmt::format("{} MiB of memory", host.memory_mib)));
  if (auto texts = check_texts("taints", host.taints); !texts.ok()) return in(texts.error());
  if (auto texts = check_texts("labels", host.labels); !texts.ok()) return in(texts.error());
  const std::size_t count = host.gpus.size();
  if (count > most_gpus_of_host)
    return in(invalid(fmt::format("{} GPUs, more than {}", count, most_gpus_of_host)));
  if (!host.nvlink.empty()) {
    if (host.nvlink.size() != count * count)
      return in(
          invalid(fmt::format("an NVLink matrix of {} entries for {} GPUs", host.nvlink.size(), count)));
    for (std::size_t a = 0; a < count; ++a) {
      for (std::size_t b = 0; b < a; ++b) {
        if (host.nvlink[a * count + b] != host.nvlink[b * count + a])
          return in(invalid(fmt::format("NVLink of GPU {} and {} differs by direction", b, a)));
      }
    }
  }
  std::vector<std::vector<Present>> present(count);
  for (std::size_t at = 0; at < count; ++at) {
    const Gpu& gpu = host.gpus[at];
    const auto wrong = [&](std::string what) { return in(invalid(fmt::format("gpu {}: {}", at, what))); };
    if (gpu.uuid.empty() || gpu.uuid.size() > most_text || gpu_names.contains(gpu.uuid))
      return wrong("its UUID is empty, too long or known already");
    for (std::size_t other = 0; other < at; ++other) {
      if (host.gpus[other].uuid == gpu.uuid) return wrong("its UUID is that of another");
    }
    if (gpu.model >= models.size()) return wrong(fmt::format("model {} of {}", gpu.model, models.size()));
    if (gpu.numa > 255) return wrong(fmt::format("NUMA node {}", gpu.numa));
    const auto& tables = models[gpu.model].tables;
    if (gpu.pool == Pool::mig && !tables) return wrong("kept for MIG, and its model has none");
    if (!gpu.instances.empty() && !tables) return wrong("has instances, and its model has no MIG");
    std::uint64_t bits = 0;
    for (const Instance& instance : gpu.instances) {
      const auto profile = tables->profile_of_id(instance.profile);
      const auto place = profile ? tables->place_of(*profile, instance.start) : std::nullopt;
      if (!place || (bits >> *place & 1U) != 0)
        return wrong(fmt::format("an instance of profile {} at {}", instance.profile, instance.start));
      bits |= std::uint64_t{1} << *place;
      present[at].push_back(
          {static_cast<std::uint8_t>(*profile), static_cast<std::uint8_t>(instance.start), no_slot});
    }
    if (bits != 0 && !tables->find(bits)) return wrong("its instances cannot lie side by side");
    std::sort(present[at].begin(), present[at].end());
  }
  if (taint_sets.size() >= taint_set_limit)
    return in(
        Error(Errc::no_capacity, fmt::format("more than {} different sets of taints", taint_set_limit)));
  HostState state;
  state.taints = taint_set(host.taints);
  // Everything that may still say no comes before the first change that shows.
  std::size_t new_nodes = 0;
  for (std::size_t at = 0; at < count; ++at) {
    const Gpu& gpu = host.gpus[at];
    if (gpu.pool == Pool::dynamic && models[gpu.model].tables) {
      if (auto id = class_for(gpu.model, state.taints, gpu.band); !id.ok()) return in(std::move(id).error());
    }
    ++new_nodes;
  }
  for (const auto& fleet : shares) {
    if (fleet.size() + new_nodes > fraction::kMostNodes)
      return in(
          Error(Errc::no_capacity, fmt::format("more than {} nodes with shares", fraction::kMostNodes)));
  }
  Shape shape{static_cast<unsigned>(count), host.nvlink, {}, 0};
  for (std::size_t at = 0; at < count; ++at) {
    const Gpu& gpu = host.gpus[at];
    shape.numa.push_back(static_cast<std::uint8_t>(gpu.numa));
    if (gpu.pool == Pool::dynamic) shape.dynamic |= 1U << at;
    if (gpu.pool != Pool::exclusive && gpu.pool != Pool::passthrough && gpu.pool != Pool::dynamic) continue;
    if (std::none_of(state.units.begin(), state.units.end(),
                     [&](const Unit& u) { return u.model == gpu.model; }))
      state.units.push_back({gpu.model, {}});
  }
  if (!state.units.empty()) {
    // An all-zero matrix says what none says.
    if (std::all_of(shape.links.begin(), shape.links.end(), [](std::uint8_t links) { return links == 0; }))
      shape.links.clear();
    if (shapes.size() >= shape_limit && !shape_ids.contains(shape))
      return in(
          Error(Errc::no_capacity,
                fmt::format("more than {} different arrangements of NVLink and NUMA nodes", shape_limit)));
    const auto [known, fresh] = shape_ids.try_emplace(shape, static_cast<std::uint32_t>(shapes.size()));
    if (fresh) shapes.emplace_back(shape);
    state.shape = known->second;
  }

  const auto number = static_cast<HostNo>(hosts.size());
  state.first = static_cast<GpuNo>(gpus.size());
  state.gpus = static_cast<std::uint32_t>(count);
  state.cpu = host.cpu_milli;
  state.memory = host.memory_mib;
  for (const auto& text : host.labels) state.labels.push_back(label(text));
  std::sort(state.labels.begin(), state.labels.end());
  if (!host.taints.empty()) ++tainted_hosts;
  state.stamp = ++stamp;
  host_names.emplace(host.name, number);
  std::vector<Gpu> given = std::move(host.gpus);
  state.given = std::move(host);
  state.given.gpus.clear();
  hosts.push_back(std::move(state));
  HostState& its = hosts.back();

  for (std::size_t at = 0; at < count; ++at) {
    Gpu& gpu = given[at];
    GpuState g;
    g.host = number;
    g.index = static_cast<std::uint8_t>(at);
    g.numa = static_cast<std::uint8_t>(gpu.numa);
    g.model = gpu.model;
    g.pool = gpu.pool;
    g.band = gpu.band;
    g.drained = gpu.drained;
    g.mig_on = gpu.mig_on || !gpu.instances.empty() || gpu.pool == Pool::mig;
    g.free_memory = models[gpu.model].given.memory_mib;
    g.present = std::move(present[at]);
    g.uuid = std::move(gpu.uuid);
    if (g.band == Band::warm) ++warm_gpus;
    gpu_names.emplace(g.uuid, static_cast<GpuNo>(gpus.size()));
    gpus.push_back(std::move(g));
  }
  // Nodes of shares: the host's GPUs of one model and pool. Each carries the host's whole CPU and memory;
  // what is taken on the host is taken on all of them.
  for (std::size_t which = 0; which < shares.size(); ++which) {
    const Pool pool = which == 0 ? Pool::share : Pool::dynamic;
    for (std::size_t at = 0; at < count; ++at) {
      GpuState& gpu = gpus[its.first + at];
      if (gpu.pool != pool) continue;
      if (std::any_of(its.nodes.begin(), its.nodes.end(), [&](const HostState::Node& n) {
            return n.dynamic == (which == 1) && n.model == gpu.model;
          }))
        continue;
      fraction::Node node;
      NodeOf of;
      of.host = number;
      of.model = gpu.model;
      for (std::size_t other = at; other < count; ++other) {
        GpuState& too = gpus[its.first + other];
        if (too.pool != pool || too.model != gpu.model) continue;
        too.bit = static_cast<std::uint8_t>(of.count);
        too.node = static_cast<fraction::NodeId>(shares[which].size());
        node.numa[of.count] = too.numa;
        of.gpus[of.count++] = static_cast<GpuNo>(its.first + other);
      }
      node.cpu_milli = its.cpu;
      node.memory_mib = its.memory;
      node.gpus = of.count;
      node.model = gpu.model;
      node.gpu_memory_mib = models[gpu.model].given.memory_mib;
      node.class_id = its.taints;
      BH_TRY(const fraction::NodeId id, shares[which].add_node(node));
      its.nodes.push_back({which == 1, id, gpu.model});
      nodes[which].push_back(of);
    }
  }
  for (std::size_t at = 0; at < count; ++at) {
    const auto no = static_cast<GpuNo>(its.first + at);
    GpuState& gpu = gpus[no];
    if (gpu.pool == Pool::dynamic && models[gpu.model].tables) {
      BH_TRY(const grid::ClassId cls, class_for(gpu.model, its.taints, gpu.band));
      BH_TRY(gpu.grid, grid.add_gpu(cls));
      of_grid.push_back(no);
    }
    sync(no);
  }
  sync_units(number);
  return number;
}

void Engine::State::list_idle(GpuNo no, bool on) {
  GpuState& gpu = gpus[no];
  if (gpu.listed == on) return;
  gpu.listed = on;
  for (const Present& it : gpu.present) {
    if (it.slot != no_slot) continue;
    auto& list = idle[gpu.model][it.profile];
    if (on) {
      list.emplace(no, it.start);
    } else {
      list.erase({no, it.start});
    }
  }
}

void Engine::State::sync(GpuNo no) {
  GpuState& gpu = gpus[no];
  const bool open_now = open(gpu);
  if (gpu.grid != grid::no_gpu) grid_drain(no, !open_now || (gpu.use != Use::none && gpu.use != Use::mig));
  if (gpu.pool == Pool::share || gpu.pool == Pool::dynamic) {
    if (open_now && (gpu.use == Use::none || gpu.use == Use::share)) {
      unblock(no);
    } else {
      block(no);
    }
  }
  if (gpu.pool == Pool::mig) list_idle(no, open_now);
}

void Engine::State::sync_units(HostNo host) {
  HostState& its = hosts[host];
  for (Unit& unit : its.units) {
    for (std::size_t cls = 0; cls < 2; ++cls) {
      std::array<std::uint16_t, 2> free = {};
      for (std::uint32_t at = 0; at < its.gpus; ++at) {
        const GpuState& gpu = gpus[its.first + at];
        if (gpu.model != unit.model || gpu.use != Use::none || !serves_whole(gpu.pool, cls) || !open(gpu))
          continue;
        const auto bit = static_cast<std::uint16_t>(1U << at);
        free[1] = static_cast<std::uint16_t>(free[1] | bit);
        if (gpu.band == Band::cool) free[0] = static_cast<std::uint16_t>(free[0] | bit);
      }
      for (std::size_t level = 0; level < 2; ++level) {
        if (unit.free[cls][level] == free[level]) continue;
        Masks& masks = wholes[cls][level][unit.model];
        const auto name = [&](std::uint16_t mask) { return std::uint64_t{its.shape} << 16U | mask; };
        if (unit.free[cls][level] != 0) {
          const auto old = masks.find(name(unit.free[cls][level]));
          old->second.erase(host);
          if (old->second.empty()) masks.erase(old);
        }
        if (free[level] != 0) masks[name(free[level])].insert(host);
        unit.free[cls][level] = free[level];
      }
    }
  }
}

// ---- the engine's own
// ----------------------------------------------------------------------------------------

std::string_view name_of(Class cls) {
  switch (cls) {
    case Class::mig:
      return "mig";
    case Class::share:
      return "share";
    case Class::exclusive:
      return "exclusive";
    case Class::passthrough:
      return "passthrough";
  }
  return "?";
}
std::string_view name_of(Pool pool) {
  switch (pool) {
    case Pool::closed:
      return "closed";
    case Pool::mig:
      return "mig";
    case Pool::share:
      return "share";
    case Pool::exclusive:
      return "exclusive";
    case Pool::passthrough:
      return "passthrough";
    case Pool::dynamic:
      return "dynamic";
  }
  return "?";
}
std::string_view name_of(Band band) {
  switch (band) {
    case Band::cool:
      return "cool";
    case Band::warm:
      return "warm";
    case Band::hot:
      return "hot";
  }
  return "?";
}
std::string_view name_of(Topology topology) {
  switch (topology) {
    case Topology::any:
      return "any";
    case Topology::same_gpu:
      return "same-gpu";
    case Topology::same_numa:
      return "same-numa";
    case Topology::same_node:
      return "same-node";
    case Topology::spread_gpus:
      return "spread-gpus";
    case Topology::spread_hosts:
      return "spread-hosts";
  }
  return "?";
}
std::string_view name_of(StepKind kind) {
  switch (kind) {
    case StepKind::destroy_instance:
      return "destroy instance";
    case StepKind::disable_mig:
      return "disable MIG";
    case StepKind::enable_mig:
      return "enable MIG";
    case StepKind::create_instance:
      return "create instance";
  }
  return "?";
}

Engine::Engine(Rules rules) : state_(std::make_unique<State>()) {
  state_->rules = {std::min(rules.batch, Band::warm), std::min(rules.interactive, Band::warm)};
  // Until somebody says what is typical: an eighth, a quarter, a half and a whole, as often as each other.
  fraction::Mix mix;
  for (const std::int32_t milli : {125, 250, 500, whole_gpu}) {
    fraction::Typical typical;
    typical.task.num_gpu = 1;
    typical.task.gpu_milli = milli;
    typical.weight = 1;
    mix.push_back(typical);
  }
  for (auto& fleet : state_->shares) {
    const Status set = fleet.set_mix(mix);
    BH_ASSERT(set.ok());
  }
}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

Result<ModelNo> Engine::add_model(Model model) { return state_->add_model(std::move(model)); }
Result<HostNo> Engine::add_host(Host host) { return state_->add_host(std::move(host)); }
Status Engine::expect(std::span<const fraction::Typical> mix) {
  for (auto& fleet : state_->shares) BH_CHECK(fleet.set_mix(mix));
  return ok_status();
}

namespace {
Error no_gpu_of(GpuNo gpu) { return Error(Errc::not_found, fmt::format("there is no GPU {}", gpu)); }
Error no_host_of(HostNo host) { return Error(Errc::not_found, fmt::format("there is no host {}", host)); }
}  // namespace

Status Engine::drain_gpu(GpuNo gpu, bool drained) {
  if (gpu >= state_->gpus.size()) return no_gpu_of(gpu);
  GpuState& its = state_->gpus[gpu];
  if (its.drained == drained) return ok_status();
  its.drained = drained;
  state_->sync(gpu);
  state_->sync_units(its.host);
  state_->touch(its.host);
  return ok_status();
}

Status Engine::drain_host(HostNo host, bool drained) {
  if (host >= state_->hosts.size()) return no_host_of(host);
  HostState& its = state_->hosts[host];
  if (its.given.drained == drained) return ok_status();
  its.given.drained = drained;
  for (std::uint32_t at = 0; at < its.gpus; ++at) state_->sync(its.first + at);
  state_->sync_units(host);
  state_->touch(host);
  return ok_status();
}

Status Engine::set_band(GpuNo gpu, Band band) {
  if (gpu >= state_->gpus.size()) return no_gpu_of(gpu);
  GpuState& its = state_->gpus[gpu];
  if (its.band == band) return ok_status();
  if (its.grid != grid::no_gpu) {
    BH_TRY(const grid::ClassId cls, state_->class_for(its.model, state_->hosts[its.host].taints, band));
    state_->grid.reclass(its.grid, cls);
  }
  if (its.band == Band::warm) --state_->warm_gpus;
  if (band == Band::warm) ++state_->warm_gpus;
  its.band = band;
  state_->sync(gpu);
  state_->sync_units(its.host);
  state_->touch(its.host);
  return ok_status();
}

Status Engine::set_taints(HostNo host, std::vector<std::string> taints) {
  if (host >= state_->hosts.size()) return no_host_of(host);
  BH_CHECK(check_texts("taints", taints));
  if (state_->taint_sets.size() >= taint_set_limit)
    return Error(Errc::no_capacity, fmt::format("more than {} different sets of taints", taint_set_limit));
  HostState& its = state_->hosts[host];
  const std::uint32_t wanted = state_->taint_set(taints);
  const auto cut = [&](const GpuState& gpu) { return gpu.grid != grid::no_gpu; };
  for (std::uint32_t at = 0; at < its.gpus; ++at) {
    const GpuState& gpu = state_->gpus[its.first + at];
    if (!cut(gpu)) continue;
    if (auto cls = state_->class_for(gpu.model, wanted, gpu.band); !cls.ok()) return std::move(cls).error();
  }
  if (!its.given.taints.empty()) --state_->tainted_hosts;
  if (!taints.empty()) ++state_->tainted_hosts;
  its.taints = wanted;
  its.given.taints = std::move(taints);
  for (std::uint32_t at = 0; at < its.gpus; ++at) {
    const GpuState& gpu = state_->gpus[its.first + at];
    if (!cut(gpu)) continue;
    BH_TRY(const grid::ClassId cls, state_->class_for(gpu.model, wanted, gpu.band));
    state_->grid.reclass(gpu.grid, cls);
  }
  state_->touch(host);
  return ok_status();
}

Status Engine::set_labels(HostNo host, std::vector<std::string> labels) {
  if (host >= state_->hosts.size()) return no_host_of(host);
  BH_CHECK(check_texts("labels", labels));
  HostState& its = state_->hosts[host];
  its.labels.clear();
  for (const auto& text : labels) its.labels.push_back(state_->label(text));
  std::sort(its.labels.begin(), its.labels.end());
  its.given.labels = std::move(labels);
  state_->touch(host);
  return ok_status();
}

Status Engine::set_instances(GpuNo gpu, std::vector<Instance> instances, bool mig_on) {
  if (gpu >= state_->gpus.size()) return no_gpu_of(gpu);
  GpuState& its = state_->gpus[gpu];
  const auto& tables = state_->models[its.model].tables;
  const auto in = [&](Errc code, std::string what) {
    return Error(code, fmt::format("gpu {}: {}", its.uuid, what));
  };
  if (!tables && (!instances.empty() || mig_on)) return in(Errc::invalid, "its model has no MIG");
  std::vector<Present> present;
  std::uint64_t bits = 0;
  for (const Instance& instance : instances) {
    const auto profile = tables->profile_of_id(instance.profile);
    const auto place = profile ? tables->place_of(*profile, instance.start) : std::nullopt;
    if (!place || (bits >> *place & 1U) != 0)
      return in(Errc::invalid,
                fmt::format("an instance of profile {} at {}", instance.profile, instance.start));
    bits |= std::uint64_t{1} << *place;
    present.push_back(
        {static_cast<std::uint8_t>(*profile), static_cast<std::uint8_t>(instance.start), no_slot});
  }
  if (bits != 0 && !tables->find(bits)) return in(Errc::invalid, "its instances cannot lie side by side");
  for (const Present& old : its.present) {
    if (old.slot == no_slot) continue;
    const auto same = std::find_if(present.begin(), present.end(), [&](const Present& it) {
      return it.profile == old.profile && it.start == old.start;
    });
    if (same == present.end())
      return in(Errc::conflict, fmt::format("the instance of profile {} at {} is gone, and a tenant has it",
                                            tables->geometry().profiles[old.profile].name, old.start));
    same->slot = old.slot;
  }
  std::sort(present.begin(), present.end());
  const bool listed = its.listed;
  state_->list_idle(gpu, false);
  its.present = std::move(present);
  its.mig_on = mig_on || !its.present.empty();
  state_->list_idle(gpu, listed);
  state_->touch(its.host);
  return ok_status();
}

std::size_t Engine::host_count() const { return state_->hosts.size(); }
std::size_t Engine::gpu_count() const { return state_->gpus.size(); }
const Host& Engine::host(HostNo host) const { return state_->hosts.at(host).given; }
Gpu Engine::gpu(GpuNo gpu) const {
  const GpuState& its = state_->gpus.at(gpu);
  Gpu out{its.uuid, its.model, its.pool, its.numa, its.band, its.drained, its.mig_on, {}};
  for (const Present& it : its.present)
    out.instances.push_back({state_->models[its.model].given.geometry.profiles[it.profile].id, it.start});
  return out;
}
HostNo Engine::host_of(GpuNo gpu) const { return state_->gpus.at(gpu).host; }
GpuNo Engine::first_gpu(HostNo host) const { return state_->hosts.at(host).first; }
const Model& Engine::model(ModelNo model) const { return state_->models.at(model).given; }
std::optional<HostNo> Engine::find_host(std::string_view name) const {
  const auto at = state_->host_names.find(std::string(name));
  return at == state_->host_names.end() ? std::nullopt : std::optional(at->second);
}
std::optional<GpuNo> Engine::find_gpu(std::string_view uuid) const {
  const auto at = state_->gpu_names.find(std::string(uuid));
  return at == state_->gpu_names.end() ? std::nullopt : std::optional(at->second);
}
const Placement* Engine::placement(PlacementId id) const {
  const auto slot = state_->slot_of(id);
  return slot ? &state_->records[*slot].it : nullptr;
}
std::vector<PlacementId> Engine::placements() const {
  std::vector<PlacementId> out;
  for (const Record& record : state_->records) {
    if (record.live) out.push_back(record.it.id);
  }
  std::sort(out.begin(), out.end());
  return out;
}
std::vector<PlacementId> Engine::placements_on(GpuNo gpu) const {
  std::vector<PlacementId> out;
  for (const PartRef& ref : state_->gpus.at(gpu).parts) out.push_back(state_->records[ref.slot].it.id);
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
  return out;
}
std::uint64_t Engine::generation(HostNo host) const { return state_->hosts.at(host).stamp; }
Engine::FreeOnHost Engine::free(HostNo host) const {
  const HostState& its = state_->hosts.at(host);
  return {its.cpu, its.memory};
}
Engine::FreeOnGpu Engine::free_on(GpuNo gpu) const {
  const GpuState& its = state_->gpus.at(gpu);
  FreeOnGpu out;
  const bool whole = its.use == Use::whole || its.use == Use::mig;
  out.milli = whole ? 0 : its.free_milli;
  out.memory_mib = whole ? 0 : its.free_memory;
  if (const auto& tables = state_->models[its.model].tables)
    out.units = its.use == Use::share || its.use == Use::whole ? 0 : tables->free_units(its.held);
  out.idle = its.use == Use::none;
  return out;
}

}  // namespace bulkhead::placement
