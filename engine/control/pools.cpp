// From the host to the placement engine: which GPU is in which pool, what of it is there, who has it.
#include <fnmatch.h>

#include <algorithm>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/plan/plan.hpp"
#include "engine/control/inside.hpp"

namespace bulkhead::control {

namespace {

using placement::Pool;

constexpr unsigned most_missed = 2;  // looks in a row; one alone may be the driver's
constexpr int never_evicted = 1'000'000;
constexpr std::string_view nobody = "bulkhead";  // the tenant of what is not ours to give
// Fairness counts each class by itself, compute and memory, in thousandths of a GPU: what one class asks for
// is set aside in its own pools alone. A pool that serves several classes counts in each.
constexpr std::size_t classes = 4, dimensions = 2;

placement::Class class_of(lease::Class cls) { return static_cast<placement::Class>(cls); }
static_assert(static_cast<int>(placement::Class::mig) == static_cast<int>(lease::Class::mig) &&
              static_cast<int>(placement::Class::share) == static_cast<int>(lease::Class::share) &&
              static_cast<int>(placement::Class::exclusive) == static_cast<int>(lease::Class::exclusive) &&
              static_cast<int>(placement::Class::passthrough) == static_cast<int>(lease::Class::passthrough));

placement::Topology topology_of(lease::Topology topology) {
  switch (topology) {
    case lease::Topology::any:
      return placement::Topology::any;
    case lease::Topology::same_gpu:
      return placement::Topology::same_gpu;
    case lease::Topology::same_numa:
      return placement::Topology::same_numa;
    case lease::Topology::same_node:
      return placement::Topology::same_node;
    case lease::Topology::spread:
      return placement::Topology::spread_gpus;
  }
  return placement::Topology::any;
}

bool serves(Pool pool, placement::Class cls) {
  switch (cls) {
    case placement::Class::mig:
      return pool == Pool::mig || pool == Pool::dynamic;
    case placement::Class::share:
      return pool == Pool::share;
    case placement::Class::exclusive:
      return pool == Pool::exclusive;
    case placement::Class::passthrough:
      return pool == Pool::passthrough;
  }
  return false;
}

std::int64_t mebibytes_up(Bytes bytes) {
  return static_cast<std::int64_t>((bytes.count + (1U << 20U) - 1) >> 20U);
}

// Thousandths of a GPU that a profile is, in compute and in memory.
struct Part {
  std::int64_t compute = 0, memory = 0;
};
Part part_of_gpu(const mig::Geometry& geometry, const mig::Profile& profile) {
  unsigned most = 1;
  for (const auto& one : geometry.profiles) most = std::max(most, one.compute_slices);
  return {.compute = 1000 * profile.compute_slices / most,
          .memory = 1000 * profile.size / std::max(1U, geometry.memory_slices)};
}

std::string who_holds(const std::vector<inventory::Holder>& holders) {
  std::vector<std::string> who;
  for (const auto& holder : holders) {
    if (who.size() == 3) {
      who.push_back(fmt::format("{} more", holders.size() - 3));
      break;
    }
    who.push_back(fmt::format("pid {} ({})", holder.pid, printable(holder.name, 40)));
  }
  return join(who, ", ");
}

std::string passthrough_name(const PciAddress& address) { return "PCI-" + address.str(); }

}  // namespace

// ---- looking at the host
// The known are instances whose devices the loop knows already.
Control::Inside::Sight Control::Inside::sight(bool full, std::set<DeviceKey> known) const {
  Sight out;
  observe::Access access = hands.access;
  access.detail = full ? observe::Detail::plan : observe::Detail::brief;
  auto host = observe::host(access);
  if (!host.ok()) {
    out.trouble = fmt::format("the host cannot be looked at: {}", host.error().message());
    return out;
  }
  for (const auto& gpu : host->gpus) {
    std::vector<slice::Place> places;
    for (const auto& instance : gpu.instances) {
      if (instance.compute.size() != 1) continue;
      if (known.contains({gpu.uuid.text, instance.name, instance.place.start})) continue;
      places.push_back({.gpu = gpu.uuid, .profile = instance.name, .start = instance.place.start});
    }
    if (places.empty()) continue;
    auto all = slice::look(hands, places);
    if (all.ok()) {
      std::move(all->begin(), all->end(), std::back_inserter(out.devices));
      continue;
    }
    for (const auto& place : places)  // one of them is not whole
      if (auto one = slice::look(hands, std::span(&place, 1)); one.ok())
        std::move(one->begin(), one->end(), std::back_inserter(out.devices));
  }
  out.host = std::move(*host);
  return out;
}

void Control::Inside::look() {
  looking = true;
  std::set<DeviceKey> known;
  for (const auto& [key, device] : devices) known.insert(key);
  std::map<std::string, std::uint64_t> epochs;
  for (const auto& facts : gpus) epochs[facts.uuid.text] = facts.epoch;
  const bool full = !host_seen || reload;
  rounds->put([this, known = std::move(known), epochs = std::move(epochs), full] {
    auto seen = gate.shared([&] { return sight(full, known); });
    // A GPU that is new needs its geometry.
    if (!full && seen.host &&
        std::any_of(seen.host->gpus.begin(), seen.host->gpus.end(),
                    [&](const auto& gpu) { return !epochs.contains(gpu.uuid.text); }))
      seen = gate.shared([&] { return sight(true, known); });
    seen.epochs = epochs;
    auto casualties = std::make_shared<std::vector<Casualty>>();
    auto shared = std::make_shared<const Sight>(std::move(seen));
    later({.before =
               [this, shared, casualties] {
                 looking = false;
                 *casualties = refresh(*shared);
               },
           .run =
               [this, casualties](Turn& turn) {
                 for (const auto& one : *casualties) lose(turn, one);
               },
           .ours = true});
  });
}

// ---- the engine, made anew
std::vector<Control::Inside::Casualty> Control::Inside::rebuild(const inventory::Host& host) {
  std::vector<Casualty> casualties;
  const auto old = std::exchange(gpus, {});
  engine = placement::Engine();
  foreign.clear();
  leases_on.clear();
  lease_of.clear();
  live.gpus.clear();
  dirty.clear();

  std::vector<plan::PoolOf> pools;
  if (node) pools = plan::pools(*node, host);
  for (const auto& gpu : host.gpus) {
    GpuFacts facts{.uuid = gpu.uuid,
                   .index = gpu.index,
                   .name = gpu.model,
                   .pci = gpu.pci.address.str(),
                   .cpus = gpu.pci.local_cpus,
                   .numa = gpu.pci.numa_node.value_or(-1),
                   .memory = gpu.memory,
                   .watts = gpu.power.limit ? gpu.power.limit->count / 1000 : 0,
                   .geometry = gpu.geometry,
                   .mig_on = gpu.mig_now};
    if (gpu.minor) facts.minor = *gpu.minor;
    for (const auto& was : old) {
      if (was.uuid != gpu.uuid) continue;
      facts.changes = was.changes;
      facts.epoch = was.epoch + 1;
      if (facts.geometry.profiles.empty()) facts.geometry = was.geometry;
      if (facts.watts == 0) facts.watts = was.watts;
    }
    const auto its =
        std::find_if(pools.begin(), pools.end(), [&](const auto& one) { return one.gpu == gpu.uuid; });
    if (gpu.pool == inventory::Pool::broken) {
      facts.why = "the driver calls it broken";
    } else if (its == pools.end() || its->rules.empty()) {
      facts.pool = gpu.mig_now ? Pool::mig : Pool::exclusive;
    } else if (!its->mode) {
      facts.why = its->why;
    } else if (*its->mode == spec::Mode::mig) {
      facts.pool = its->dynamic ? Pool::dynamic : Pool::mig;
      if (!gpu.mig_capable) facts.pool = Pool::closed, facts.why = "it has no MIG, the node file says mig";
    } else if (gpu.mig_now) {
      facts.why =
          fmt::format("it is in MIG mode, the node file says {}: bulkhead apply", spec::name_of(*its->mode));
    } else if (*its->mode == spec::Mode::passthrough) {
      facts.pool = Pool::closed;
      facts.why = "it is for passthrough, and the host's driver has it, not vfio-pci";
    } else {
      facts.pool = *its->mode == spec::Mode::share ? Pool::share : Pool::exclusive;
    }
    gpus.push_back(std::move(facts));
  }
  // What vfio-pci has is on the bus alone.
  for (const auto& lost : host.lost) {
    if (!node || !lost.pci.driver || *lost.pci.driver != "vfio-pci" || !lost.pci.iommu_group) continue;
    const bool named = std::any_of(node->gpus.begin(), node->gpus.end(), [&](const spec::GpuRule& rule) {
      return rule.mode == spec::Mode::passthrough && std::find(rule.select.pci.begin(), rule.select.pci.end(),
                                                               lost.pci.address) != rule.select.pci.end();
    });
    if (!named) continue;
    gpus.push_back({.uuid = {passthrough_name(lost.pci.address)},
                    .index = static_cast<unsigned>(gpus.size()),
                    .name = fmt::format("{:04x}:{:04x}", lost.pci.vendor, lost.pci.device),
                    .pci = lost.pci.address.str(),
                    .cpus = lost.pci.local_cpus,
                    .numa = lost.pci.numa_node.value_or(-1),
                    .minor = *lost.pci.iommu_group,
                    .pool = Pool::passthrough});
  }

  // Models of the engine are told apart by all that decides, and by being cut on demand.
  std::map<std::string, placement::ModelNo> models;
  std::vector<std::pair<std::string, placement::Model>> made;
  std::vector<placement::Gpu> listed;
  for (auto& facts : gpus) {
    for (unsigned variant = 0;; ++variant) {
      facts.model = fmt::format("{}{}{}", facts.name, facts.pool == Pool::dynamic ? " cut on demand" : "",
                                variant == 0 ? "" : fmt::format(" #{}", variant));
      placement::Model model{.name = facts.model,
                             .geometry = facts.geometry,
                             .memory_mib = static_cast<std::int64_t>(to_mebibytes(facts.memory))};
      const auto same =
          std::find_if(made.begin(), made.end(), [&](const auto& one) { return one.first == facts.model; });
      if (same == made.end()) {
        auto number = engine.add_model(model);
        if (!number.ok()) {  // a geometry the packer cannot hold: without MIG it can be given all the same
          model.geometry = {};
          number = engine.add_model(model);
        }
        if (!number.ok()) {
          facts.why = number.error().message();
          break;
        }
        models[facts.model] = *number;
        made.emplace_back(facts.model, std::move(model));
      } else if (!(same->second.geometry == facts.geometry) || same->second.memory_mib != model.memory_mib) {
        continue;
      }
      break;
    }
    listed.push_back({.uuid = facts.uuid.text,
                      .model = models.contains(facts.model) ? models.at(facts.model) : placement::ModelNo{0},
                      .pool = models.contains(facts.model) ? facts.pool : Pool::closed,
                      .numa = facts.numa < 0 ? 0U : static_cast<unsigned>(facts.numa),
                      .mig_on = facts.mig_on && !facts.geometry.profiles.empty()});
  }
  for (std::size_t first = 0; first < listed.size(); first += placement::most_gpus_of_host) {
    const auto last = std::min(listed.size(), first + placement::most_gpus_of_host);
    placement::Host part{.name = host.hostname.empty() ? "host" : host.hostname};
    if (first > 0) part.name += fmt::format("#{}", first);
    part.gpus.assign(listed.begin() + static_cast<std::ptrdiff_t>(first),
                     listed.begin() + static_cast<std::ptrdiff_t>(last));
    if (const auto added = engine.add_host(std::move(part)); !added.ok()) {
      gpus.resize(first);
      driver_trouble =
          fmt::format("the host's GPUs cannot be taken into the pools: {}", added.error().message());
      break;
    }
  }
  leases_on.resize(gpus.size());
  live.gpus.resize(gpus.size());
  for (placement::GpuNo number = 0; number < gpus.size(); ++number) dirty.insert(number);

  // Who has what. Instances of leases join the GPUs with them.
  for (auto& [id, entry] : std::map<std::int64_t, Entry>(entries)) {
    Entry next = entry;
    next.placement = placement::no_placement;
    if (lease::holds(entry.lease->state)) {
      auto placed = adopt(entry);
      if (placed.ok())
        next.placement = *placed;
      else
        casualties.push_back({id, placed.error().message()});
    }
    apply_entry(id, std::move(next));
  }
  for (placement::GpuNo number = 0; number < gpus.size(); ++number)
    for (const auto& gpu : host.gpus)
      if (gpu.uuid == gpus[number].uuid) settle_gpu(number, gpu, casualties);
  for (placement::GpuNo number = 0; number < gpus.size(); ++number) set_door(number);  // vfio-pci's as well
  set_capacities();
  return casualties;
}

Result<placement::PlacementId> Control::Inside::adopt(const Entry& entry) {
  placement::Placement out{.request = request_of(*entry.lease)};
  out.request.models.clear();
  for (const auto& part : entry.lease->parts) {
    const auto number = engine.find_gpu(part.gpu.text);
    if (!number) return Error(Errc::gone, fmt::format("the driver shows no {}", part.gpu.text));
    const auto& facts = gpus[*number];
    placement::Part its{.host = engine.host_of(*number), .gpu = *number, .numa = engine.gpu(*number).numa};
    if (entry.lease->ask.cls == lease::Class::mig) {
      const auto* profile = facts.geometry.by_name(part.profile);
      if (profile == nullptr || !part.start)
        return Error(Errc::gone, fmt::format("gpu {} has no profile {} any more", facts.index, part.profile));
      its.profile = profile->id;
      its.start = *part.start;
      its.size = profile->size;
    } else if (entry.lease->ask.cls == lease::Class::share) {
      its.milli = static_cast<std::int32_t>(part.weight);
      its.memory_mib = mebibytes_up(part.memory);
    } else {
      its.milli = placement::whole_gpu;
    }
    out.model = engine.gpu(*number).model;
    out.parts.push_back(its);
  }
  return engine.adopt(std::move(out));
}

// One GPU against what the driver says of it now.
void Control::Inside::settle_gpu(placement::GpuNo number, const inventory::Gpu& gpu,
                                 std::vector<Casualty>& casualties) {
  auto& facts = gpus[number];
  facts.missed = 0;
  facts.mig_on = gpu.mig_now;
  if (facts.lost) {
    facts.lost = false;
    facts.why.clear();
  }
  dirty.insert(number);
  const bool sliced = facts.pool == Pool::mig || facts.pool == Pool::dynamic;
  const auto key_of = [&](const inventory::GpuInstance& instance) {
    return DeviceKey{facts.uuid.text, instance.name, instance.place.start};
  };
  // Devices that are gone, or are others by now.
  for (auto it = devices.begin(); it != devices.end();) {
    const auto here = std::find_if(gpu.instances.begin(), gpu.instances.end(), [&](const auto& instance) {
      return key_of(instance) == it->first && instance.compute.size() == 1 && instance.compute.front().uuid &&
             *instance.compute.front().uuid == it->second.device && instance.id == it->second.gpu_instance;
    });
    const bool stays = it->first.gpu != facts.uuid.text || here != gpu.instances.end();
    it = stays ? std::next(it) : devices.erase(it);
  }
  std::set<DeviceKey> held;
  for (const auto id : leases_on[number]) {
    const auto& lease = *entries.at(id).lease;
    for (const auto& part : lease.parts) {
      if (part.gpu != facts.uuid || !part.start) continue;
      const DeviceKey key{facts.uuid.text, part.profile, *part.start};
      held.insert(key);
      if (part.device.text.empty()) continue;  // being made
      const auto device = devices.find(key);
      if (device == devices.end() || device->second.device != part.device ||
          (part.generation != 0 && device->second.generation != 0 &&
           device->second.generation != part.generation))
        casualties.push_back({id, fmt::format("its instance {} at {} of gpu {} is gone", part.profile,
                                              *part.start, facts.index)});
    }
    if (!sliced && gpu.mig_now && lease.ask.cls != lease::Class::passthrough)
      casualties.push_back({id, fmt::format("gpu {} was put into MIG mode", facts.index)});
  }
  std::vector<placement::Instance> present;
  std::vector<const inventory::GpuInstance*> apart;
  if (sliced) {
    for (const auto& instance : gpu.instances) {
      const auto key = key_of(instance);
      const bool whole =
          devices.contains(key) && !instance.busy() && (facts.pool == Pool::mig || instance.ours);
      // What is in the way of an instance that is being made goes first: it is decided already.
      if (!held.contains(key) && std::any_of(held.begin(), held.end(), [&](const DeviceKey& other) {
            const auto* profile = facts.geometry.by_name(other.profile);
            return profile != nullptr && instance.place.overlaps({other.start, profile->size});
          }))
        continue;
      if (!held.contains(key) && !whole) {
        apart.push_back(&instance);
        // On a fixed GPU nothing is made, so it need not be known.
        if (facts.pool == Pool::mig) continue;
      }
      present.push_back({instance.profile, instance.place.start});
    }
  }
  for (auto it = foreign.begin(); it != foreign.end();) {
    if (it->first.gpu != facts.uuid.text) {
      ++it;
      continue;
    }
    (void)engine.release(it->second);
    it = foreign.erase(it);
  }
  if (sliced) {
    // What a lease is still being made for stays in the engine as decided.
    for (const auto& key : held) {
      const auto* profile = facts.geometry.by_name(key.profile);
      if (profile == nullptr) continue;
      const placement::Instance one{profile->id, key.start};
      if (std::find(present.begin(), present.end(), one) == present.end()) present.push_back(one);
    }
    (void)engine.set_instances(number, present, facts.mig_on);
    if (facts.pool == Pool::dynamic) {
      for (const auto* instance : apart) {
        placement::Placement its{.request = {.tenant = std::string(nobody),
                                             .cls = placement::Class::mig,
                                             .profile = instance->name,
                                             .priority = never_evicted},
                                 .model = engine.gpu(number).model};
        its.parts.push_back({.host = engine.host_of(number),
                             .gpu = number,
                             .numa = engine.gpu(number).numa,
                             .profile = instance->profile,
                             .start = instance->place.start,
                             .size = instance->place.size});
        if (const auto id = engine.adopt(std::move(its)); id.ok()) foreign[key_of(*instance)] = *id;
      }
    }
  }
  // Somebody without a lease uses the whole GPU: whoever got it now would not have it alone.
  if (!sliced && facts.pool != Pool::closed && leases_on[number].empty()) {
    const bool busy = !gpu.holders.empty();
    if (busy != facts.shut) retry_queue = true;
    facts.shut = busy;
    facts.why = busy ? fmt::format("in use by {}, without a lease", who_holds(gpu.holders)) : "";
  } else if (facts.pool == Pool::mig && !gpu.mig_now) {
    facts.why = "MIG mode is off: bulkhead apply";
  } else if (sliced) {
    std::vector<inventory::Holder> strangers;
    for (const auto* instance : apart)
      for (const auto& holder : instance->holders()) strangers.push_back(holder);
    facts.why =
        strangers.empty() ? "" : fmt::format("instances in use by {}, without a lease", who_holds(strangers));
  }
  set_door(number);
}

void Control::Inside::set_door(placement::GpuNo number) {
  const auto& facts = gpus[number];
  (void)engine.drain_gpu(number, facts.lost || facts.shut || cordons.contains(facts.uuid.text));
  dirty.insert(number);
}

std::vector<Control::Inside::Casualty> Control::Inside::refresh(const Sight& sight) {
  std::vector<Casualty> casualties;
  const auto trouble = [&](std::string what) {
    driver_trouble = std::move(what);
    host_seen = false;
    return casualties;
  };
  if (!sight.host) return trouble(sight.trouble);
  const auto& host = *sight.host;
  const bool held = std::any_of(entries.begin(), entries.end(),
                                [](const auto& one) { return lease::holds(one.second.lease->state); });
  // No driver is not the same as no GPU: its leases wait for it to come back.
  if (host.gpus.empty() && (held || !gpus.empty()))
    return trouble(fmt::format("the driver shows no GPU{}{}", host.lost.empty() ? "" : ": ",
                               host.lost.empty() ? "" : host.lost.front().why));
  for (const auto& device : sight.devices) {
    const DeviceKey key{device.place.gpu.text, device.place.profile, device.place.start};
    const auto* facts = facts_of(device.place.gpu);
    const auto epoch = sight.epochs.find(device.place.gpu.text);
    if (facts != nullptr && epoch != sight.epochs.end() &&
        (facts->changes > 0 || facts->epoch != epoch->second))
      continue;
    devices[key] = device;
  }
  const bool recovered = !host_seen;
  driver_trouble.clear();
  host_seen = true;
  const bool anew = reload || gpus.empty() ||
                    std::any_of(host.gpus.begin(), host.gpus.end(),
                                [&](const auto& gpu) { return facts_of(gpu.uuid) == nullptr; });
  if (anew && std::any_of(gpus.begin(), gpus.end(), [&](const GpuFacts& facts) {
        const auto epoch = sight.epochs.find(facts.uuid.text);
        return facts.changes > 0 || (epoch != sight.epochs.end() && epoch->second != facts.epoch);
      })) {
    next_look = 0;  // this look is of before: what was made since would pass for gone
    return casualties;
  }
  if (anew) {
    reload = false;
    casualties = rebuild(host);
    submit_all();
    retry_queue = true;
    return casualties;
  }
  for (placement::GpuNo number = 0; number < gpus.size(); ++number) {
    auto& facts = gpus[number];
    const auto epoch = sight.epochs.find(facts.uuid.text);
    if (facts.changes > 0 || (epoch != sight.epochs.end() && epoch->second != facts.epoch)) continue;
    const auto seen = std::find_if(host.gpus.begin(), host.gpus.end(),
                                   [&](const auto& gpu) { return gpu.uuid == facts.uuid; });
    if (seen != host.gpus.end()) {
      if (facts.lost) retry_queue = true;
      settle_gpu(number, *seen, casualties);
      continue;
    }
    if (facts.pool == Pool::passthrough) continue;  // vfio-pci has it
    if (facts.lost || ++facts.missed < most_missed) continue;
    facts.lost = true;
    facts.why = "the driver does not show it any more";
    for (const auto& lost : host.lost)
      if (lost.pci.address.str() == facts.pci) facts.why = lost.why;
    set_door(number);
    for (const auto id : leases_on[number])
      casualties.push_back({id, fmt::format("gpu {} was lost: {}", facts.index, facts.why)});
  }
  if (recovered) retry_queue = true;
  set_capacities();
  return casualties;
}

void Control::Inside::lose(Turn& turn, const Casualty& casualty) {
  const auto at = entries.find(casualty.lease);
  if (at == entries.end()) return;
  switch (at->second.lease->state) {
    case lease::State::active:
      return end_holding(turn, daemon_caller(), casualty.lease, lease::Event::lost, casualty.why);
    case lease::State::preparing:
      if (at->second.at_work) return;  // the lane will say how it went
      return step(turn, daemon_caller(), casualty.lease, lease::Event::lost, casualty.why);
    case lease::State::releasing:
      // What is left of it is scrubbed on the way.
      if (!at->second.at_work) scrub(turn, casualty.lease);
      return;
    default:
      return;
  }
}

GpuFacts* Control::Inside::facts_of(const Uuid& gpu) {
  for (auto& facts : gpus)
    if (facts.uuid == gpu) return &facts;
  return nullptr;
}

PoolGpu Control::Inside::pool_gpu(placement::GpuNo number) const {
  const auto& facts = gpus[number];
  const bool none = facts.pool == Pool::closed || facts.lost;
  PoolGpu out{.gpu = facts.uuid,
              .index = facts.index,
              .name = facts.name,
              .pool = none ? "none"
                      : facts.pool == Pool::mig || facts.pool == Pool::dynamic
                          ? "mig"
                          : std::string(name_of(facts.pool)),
              .why = facts.why,
              .numa_node = facts.numa < 0 ? 0U : static_cast<unsigned>(facts.numa)};
  out.leases.assign(leases_on[number].begin(), leases_on[number].end());
  for (const auto id : leases_on[number]) {
    const auto& lease = *entries.at(id).lease;
    if (out.why.empty() && lease.state == lease::State::releasing && entries.at(id).again)
      out.why = lease.reason;
  }
  if (const auto word = cordons.find(facts.uuid.text); word != cordons.end()) {
    out.cordon = word->second;
    if (out.why.empty())
      out.why = fmt::format("cordoned by {}: {}", printable(word->second.by, 64), word->second.why);
  }
  const auto free = engine.free_on(number);
  if (none || facts.shut || out.cordon)
    out.free = 0;
  else if (facts.pool == Pool::mig || facts.pool == Pool::dynamic)
    out.free = facts.geometry.memory_slices == 0
                   ? 0
                   : static_cast<double>(free.units) / facts.geometry.memory_slices;
  else
    out.free = static_cast<double>(free.milli) / placement::whole_gpu;
  return out;
}

// ---- what a lease is, in the engine's terms and in the tenant's
std::vector<std::string> Control::Inside::models_for(placement::Class cls,
                                                     const std::vector<std::string>& patterns) const {
  std::vector<std::string> out;
  bool all = true;
  for (const auto& facts : gpus) {
    const bool named =
        patterns.empty() || std::any_of(patterns.begin(), patterns.end(), [&](const auto& pattern) {
          return ::fnmatch(pattern.c_str(), facts.name.c_str(), FNM_NOESCAPE) == 0;
        });
    // What does not serve the class anyway need not be shut out by its name.
    const bool left_out = !named || (facts.pool == Pool::dynamic && cls != placement::Class::mig);
    all = all && !left_out;
    if (left_out || !serves(facts.pool, cls)) continue;
    if (std::find(out.begin(), out.end(), facts.model) == out.end()) out.push_back(facts.model);
  }
  if (all) out.clear();
  return out;
}

bool Control::Inside::nothing_serves(const lease::Ask& ask) const {
  return std::none_of(gpus.begin(), gpus.end(), [&](const GpuFacts& facts) {
    return serves(facts.pool, class_of(ask.cls)) &&
           (ask.models.empty() || std::any_of(ask.models.begin(), ask.models.end(), [&](const auto& pattern) {
              return ::fnmatch(pattern.c_str(), facts.name.c_str(), FNM_NOESCAPE) == 0;
            }));
  });
}

placement::Request Control::Inside::request_of(const lease::Ask& ask, const std::string& tenant) const {
  placement::Request out{.tenant = tenant,
                         .cls = class_of(ask.cls),
                         .count = ask.count,
                         .profile = ask.profile,
                         .topology = topology_of(ask.topology),
                         .models = models_for(class_of(ask.cls), ask.models),
                         .priority = ask.preemptible ? ask.priority : never_evicted};
  if (ask.cls == lease::Class::share) {
    out.milli = static_cast<std::int32_t>(std::min(ask.weight, 1001U));
    out.memory_mib = ask.memory ? mebibytes_up(*ask.memory) : 0;
  }
  return out;
}
placement::Request Control::Inside::request_of(const lease::Lease& lease) const {
  auto out = request_of(lease.ask, lease.tenant);
  if (lease.expires) out.ends = lease.expires->time_since_epoch().count();
  return out;
}

tenant::Amount Control::Inside::amount_of(const lease::Ask& ask, const placement::Model& model,
                                          std::uint64_t watts) const {
  tenant::Amount out{.leases = 1};
  std::uint64_t milli = 1000;
  std::uint64_t memory = static_cast<std::uint64_t>(model.memory_mib) << 20U;
  switch (ask.cls) {
    case lease::Class::mig: {
      const auto* profile = model.geometry.by_name(ask.profile);
      if (profile == nullptr) return out;
      const auto part = part_of_gpu(model.geometry, *profile);
      milli = static_cast<std::uint64_t>(std::max(part.compute, part.memory));
      memory = profile->memory.count;
      out.slices = ask.count;
      out.profiles[profile->name] = ask.count;
      break;
    }
    case lease::Class::share:
      milli = ask.weight;
      memory = ask.memory ? ask.memory->count : 0;
      out.shares = ask.count;
      break;
    case lease::Class::exclusive:
    case lease::Class::passthrough:
      out.gpus = ask.count;
      break;
  }
  out.gpu_milli = milli * ask.count;
  out.memory = Bytes(memory * ask.count);
  out.watts = watts * milli * ask.count / 1000;
  return out;
}

// By the first GPU that serves it; nullopt: none has the profile.
std::optional<tenant::Amount> Control::Inside::likely_amount(const lease::Ask& ask) const {
  for (const auto& facts : gpus) {
    if (!serves(facts.pool, class_of(ask.cls))) continue;
    const auto number = engine.find_gpu(facts.uuid.text);
    if (!number) continue;
    if (ask.cls == lease::Class::mig && facts.geometry.by_name(ask.profile) == nullptr) continue;
    return amount_of(ask, engine.model(engine.gpu(*number).model), facts.watts);
  }
  return std::nullopt;
}

fairness::Amounts Control::Inside::demand_of(const lease::Ask& ask) const {
  fairness::Amounts out = {};
  Part part{.compute = 1000, .memory = 1000};
  for (const auto& facts : gpus) {
    if (!serves(facts.pool, class_of(ask.cls))) continue;
    if (ask.cls == lease::Class::mig) {
      const auto* profile = facts.geometry.by_name(ask.profile);
      if (profile == nullptr) continue;
      part = part_of_gpu(facts.geometry, *profile);
    } else if (ask.cls == lease::Class::share) {
      part = {.compute = ask.weight,
              .memory = facts.memory.count == 0 || !ask.memory
                            ? 0
                            : static_cast<std::int64_t>(static_cast<double>(ask.memory->count) /
                                                        static_cast<double>(facts.memory.count) * 1000)};
    }
    break;
  }
  const auto at = static_cast<std::size_t>(ask.cls) * dimensions;
  out[at] = part.compute * ask.count;
  out[at + 1] = part.memory * ask.count;
  return out;
}

lease::Part Control::Inside::part_of(const lease::Lease& lease, std::size_t number,
                                     const placement::Part& part) const {
  const auto& facts = gpus[part.gpu];
  lease::Part out{.gpu = facts.uuid,
                  .pci = facts.pci,
                  .gpu_name = facts.name,
                  .numa_node = facts.numa,
                  .cpus = facts.cpus,
                  .memory = facts.memory,
                  .cdi = fmt::format("bulkhead.dev/slice=l{}-{}", lease.id, number)};
  switch (lease.ask.cls) {
    case lease::Class::mig: {
      const auto* profile = facts.geometry.by_id(part.profile);
      out.profile = profile->name;
      out.start = part.start;
      out.memory = profile->memory;
      out.made = part.cut;
      const auto device = devices.find({facts.uuid.text, profile->name, part.start});
      if (device == devices.end() || part.cut) break;
      out.device = device->second.device;
      out.gpu_instance = device->second.gpu_instance;
      out.compute_instance = device->second.compute_instance;
      out.generation = device->second.generation;
      out.memory = device->second.memory;
      out.device_nodes = device->second.device_nodes;
      break;
    }
    case lease::Class::passthrough:
      out.device = facts.uuid;
      out.device_nodes = {"/dev/vfio/vfio", fmt::format("/dev/vfio/{}", facts.minor.value_or(0))};
      break;
    case lease::Class::share:
      out.weight = lease.ask.weight;
      out.memory = lease.ask.memory.value_or(Bytes{});
      [[fallthrough]];
    case lease::Class::exclusive:
      out.device = facts.uuid;
      out.device_nodes = {fmt::format("/dev/nvidia{}", facts.minor.value_or(facts.index)), "/dev/nvidiactl",
                          "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"};
      break;
  }
  return out;
}

// ---- turns
void Control::Inside::set_capacities() {
  if (!fair) return;
  std::array<std::int64_t, classes> count{};
  for (const auto& facts : gpus)
    for (std::size_t cls = 0; cls < classes; ++cls)
      if (!facts.lost && serves(facts.pool, static_cast<placement::Class>(cls))) ++count[cls];
  if (count == class_gpus) return;
  class_gpus = count;
  const auto now = now_wall().time_since_epoch().count();
  for (std::size_t cls = 0; cls < classes; ++cls)
    for (std::size_t i = 0; i < dimensions; ++i)
      (void)fair->set_capacity(cls * dimensions + i, count[cls] * 1000, now);
  set_nominals();
}

// What is a tenant's before it borrows: its weight's part of every pool.
void Control::Inside::set_nominals() {
  if (!fair) return;
  const auto now = now_wall().time_since_epoch().count();
  std::uint64_t sum = 0;
  for (const auto& [name, tenant] : live.tenants) sum += tenant->weight;
  for (const auto& [name, tenant] : live.tenants) {
    fairness::Tenant its{.name = name, .weight = tenant->weight};
    for (std::size_t cls = 0; cls < classes; ++cls)
      for (std::size_t i = 0; i < dimensions; ++i)
        its.nominal[cls * dimensions + i] = static_cast<std::int64_t>(
            static_cast<std::uint64_t>(class_gpus[cls]) * 1000 * tenant->weight / sum);
    const auto at = fair_tenants.find(name);
    if (at != fair_tenants.end()) {
      (void)fair->change_tenant(at->second, its, now);
    } else if (const auto id = fair->add_tenant(its, now); id.ok()) {
      fair_tenants[name] = *id;
    }
  }
}

void Control::Inside::submit_all() {
  static constexpr std::array<std::string_view, classes> names{"mig", "share", "exclusive", "passthrough"};
  fairness::Config config;
  for (std::size_t cls = 0; cls < classes; ++cls) {
    config.resources.push_back({fmt::format("{} compute", names[cls]), 0});
    config.resources.push_back({fmt::format("{} memory", names[cls]), 0});
  }
  auto made = fairness::Book::make(config);
  BH_ASSERT(made.ok());
  const auto now = now_wall().time_since_epoch().count();
  // What the book before this one knew of the past; at start, what was kept.
  for (const auto& [name, id] : fair_tenants) {
    if (!fair) break;
    used[name].past = fair->past(id, now);
    used[name].past_at = WallTime(std::chrono::milliseconds(now));
  }
  fair.emplace(std::move(*made));
  fair_tenants.clear();
  class_gpus = {-1, -1, -1, -1};
  set_capacities();
  for (auto& [id, entry] : entries) {
    const auto tenant = fair_tenants.find(entry.lease->tenant);
    if (tenant == fair_tenants.end()) continue;
    const fairness::Request request{.id = static_cast<std::uint64_t>(id),
                                    .tenant = tenant->second,
                                    .demand = demand_of(entry.lease->ask),
                                    .enqueued_ms = entry.lease->created.time_since_epoch().count(),
                                    .length_ms = entry.lease->ask.ttl.count() * 1000,
                                    .priority = entry.lease->ask.priority};
    entry.running = lease::holds(entry.lease->state) && fair->adopt(request, now).ok();
    entry.pending = !lease::holds(entry.lease->state) && fair->submit(request, now).ok();
  }
  // Last: what is held now was held since.
  for (const auto& [name, id] : fair_tenants)
    if (const auto use = used.find(name); use != used.end() && use->second.past > 0)
      (void)fair->set_past(id, use->second.past, use->second.past_at.time_since_epoch().count(), now);
}

}  // namespace bulkhead::control
