#include "core/placement/placement.hpp"

#include <algorithm>
#include <bit>
#include <functional>
#include <map>
#include <set>
#include <tuple>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/prng.hpp"
#include "core/mig/models_for_tests.hpp"
#include "core/placement/sets.hpp"

namespace bulkhead::placement {
namespace {

using mig::plain_profile;

mig::Geometry eight() { return mig::six_shapes(); }
mig::Geometry four() {
  return {4,
          {plain_profile("1g.6gb", 14, 1, 4, {0, 1, 2, 3}, 1), plain_profile("2g.12gb", 5, 2, 2, {0, 2}, 2),
           plain_profile("4g.24gb", 0, 4, 1, {0}, 4)}};
}
// Starts that overlap: a badly placed instance costs two of its kind.
mig::Geometry crooked() {
  return {
      6,
      {plain_profile("1g.1gb", 1, 1, 6, {0, 1, 2, 3, 4, 5}, 1),
       plain_profile("2g.2gb", 2, 2, 3, {0, 1, 2, 3, 4}, 2), plain_profile("3g.3gb", 3, 3, 2, {0, 1, 3}, 3)}};
}

Gpu gpu_of(std::string uuid, ModelNo model, Pool pool, unsigned numa = 0) {
  Gpu gpu;
  gpu.uuid = std::move(uuid);
  gpu.model = model;
  gpu.pool = pool;
  gpu.numa = numa;
  return gpu;
}

// `hosts` hosts with eight GPUs each, four to a NUMA node, NVLink all to all.
Engine fleet(unsigned hosts, Pool pool, unsigned gpus = 8, std::int64_t memory = 80'000) {
  Engine engine;
  EXPECT_TRUE(engine.add_model({"H100", eight(), memory}).ok());
  for (unsigned h = 0; h < hosts; ++h) {
    Host host;
    host.name = fmt::format("host{}", h);
    host.cpu_milli = 96'000;
    host.memory_mib = 1'000'000;
    for (unsigned g = 0; g < gpus; ++g)
      host.gpus.push_back(gpu_of(fmt::format("GPU-{}-{}", h, g), 0, pool, g / ((gpus + 1) / 2)));
    host.nvlink.assign(std::size_t{gpus} * gpus, 18);
    EXPECT_TRUE(engine.add_host(host).ok());
  }
  return engine;
}

Request mig_request(std::string profile, unsigned count = 1) {
  Request r;
  r.tenant = "a";
  r.cls = Class::mig;
  r.profile = std::move(profile);
  r.count = count;
  return r;
}
Request share_request(std::int32_t milli, std::int64_t memory, unsigned count = 1) {
  Request r;
  r.tenant = "a";
  r.cls = Class::share;
  r.milli = milli;
  r.memory_mib = memory;
  r.count = count;
  return r;
}
Request whole_request(unsigned count, Class cls = Class::exclusive) {
  Request r;
  r.tenant = "a";
  r.cls = cls;
  r.count = count;
  return r;
}

PlacementId must(Engine& engine, const Request& request) {
  const auto choice = engine.find(request);
  EXPECT_TRUE(choice.has_value());
  if (!choice) return no_placement;
  const auto id = engine.commit(request, *choice);
  EXPECT_TRUE(id.ok());
  return id.ok() ? *id : no_placement;
}

// ---- a placer that tries everything, with arithmetic of its own
// -----------------------------------------------

struct Held {
  PlacementId id = 0;
  Request request = {};
  std::vector<Part> parts = {};
};

struct World {
  std::vector<Model> models = {};
  std::vector<Host> hosts = {};
  struct G {
    HostNo host = 0;
    Gpu gpu = {};
  };
  std::vector<G> gpus = {};
  std::vector<Held> held = {};
  Rules rules = {};

  const mig::Profile* profile(ModelNo model, const Request& r) const {
    return models[model].geometry.by_name(r.profile);
  }

  bool apart(const Request& a, const Request& b,
             bool same_gpu) const {  // must these two tenants be kept apart here?
    if (a.tenant == b.tenant) return false;
    const auto wants = [&](const Request& x, const Request& y) {
      if (x.alone == Alone::host || (x.alone == Alone::gpu && same_gpu)) return true;
      const auto in = [&](const std::vector<std::string>& list) {
        return std::find(list.begin(), list.end(), y.tenant) != list.end();
      };
      return in(x.avoid_on_host) || (same_gpu && in(x.avoid_on_gpu));
    };
    return wants(a, b) || wants(b, a);
  }

  // Everything but room.
  bool allowed(const Request& r, ModelNo model, GpuNo no) const {
    const Gpu& gpu = gpus[no].gpu;
    const Host& host = hosts[gpus[no].host];
    const Pool own = r.cls == Class::mig         ? Pool::mig
                     : r.cls == Class::share     ? Pool::share
                     : r.cls == Class::exclusive ? Pool::exclusive
                                                 : Pool::passthrough;
    if (gpu.model != model || (gpu.pool != own && gpu.pool != Pool::dynamic)) return false;
    if (r.cls == Class::mig) {
      const auto* its = profile(model, r);
      if (its == nullptr) return false;
      if (gpu.pool == Pool::mig && std::none_of(gpu.instances.begin(), gpu.instances.end(),
                                                [&](const Instance& i) { return i.profile == its->id; }))
        return false;
    }
    if (gpu.drained || host.drained) return false;
    for (const auto& label : r.labels) {
      if (std::find(host.labels.begin(), host.labels.end(), label) == host.labels.end()) return false;
    }
    for (const auto& taint : host.taints) {
      if (std::none_of(r.tolerates.begin(), r.tolerates.end(),
                       [&](const auto& t) { return t == "*" || t == taint; }))
        return false;
    }
    Band most = r.latency == Latency::interactive ? rules.interactive : rules.batch;
    if (r.most_band) most = *r.most_band;
    if (gpu.band == Band::hot || gpu.band > most) return false;
    for (const Held& h : held) {
      for (const Part& p : h.parts) {
        if (p.host == gpus[no].host && apart(r, h.request, p.gpu == no)) return false;
      }
    }
    return true;
  }

  bool room(const Request& r, ModelNo model, const std::vector<Part>& parts) const {
    std::map<HostNo, std::int64_t> extra;
    for (const Part& p : parts) ++extra[p.host];
    for (const auto& [host, count] : extra) {
      std::int64_t cpu = count * r.cpu_milli, memory = count * r.host_memory_mib;
      for (const Held& h : held) {
        for (const Part& p : h.parts) {
          if (p.host != host) continue;
          cpu += h.request.cpu_milli;
          memory += h.request.host_memory_mib;
        }
      }
      if ((r.cpu_milli > 0 && cpu > hosts[host].cpu_milli) ||
          (r.host_memory_mib > 0 && memory > hosts[host].memory_mib))
        return false;
    }
    std::set<GpuNo> touched;
    for (const Part& p : parts) touched.insert(p.gpu);
    for (const GpuNo no : touched) {
      std::vector<mig::NewInstance> instances;
      std::set<std::pair<unsigned, unsigned>> places;
      std::int64_t milli = 0, memory = 0, whole = 0;
      const auto add = [&](const Part& p, Class cls) {
        if (cls == Class::mig) {
          instances.push_back({p.profile, {p.start, p.size}, 0});
          if (!places.emplace(p.profile, p.start).second) whole = 2;
        } else if (cls == Class::share) {
          milli += p.milli;
          memory += p.memory_mib;
        } else {
          ++whole;
        }
      };
      for (const Held& h : held) {
        for (const Part& p : h.parts) {
          if (p.gpu == no) add(p, h.request.cls);
        }
      }
      for (const Part& p : parts) {
        if (p.gpu == no) add(p, r.cls);
      }
      if (whole > 1 || (instances.empty() ? 0 : 1) + (milli > 0 ? 1 : 0) + whole > 1) return false;
      if (milli > 1000 || memory > models[model].memory_mib) return false;
      if (!instances.empty() && gpus[no].gpu.pool == Pool::dynamic &&
          !mig::legal(models[model].geometry, instances))
        return false;
    }
    return true;
  }

  bool topology(const Request& r, ModelNo model, const std::vector<Part>& parts) const {
    const auto same = [&](auto of) {
      return std::all_of(parts.begin(), parts.end(),
                         [&](const Part& p) { return of(p) == of(parts.front()); });
    };
    switch (r.topology) {
      case Topology::any:
        return true;
      case Topology::same_gpu:
        return same([](const Part& p) { return p.gpu; });
      case Topology::same_numa:
        return same([](const Part& p) { return std::pair(p.host, p.numa); });
      case Topology::same_node:
        return same([](const Part& p) { return p.host; });
      case Topology::spread_gpus:
      case Topology::spread_hosts: {
        const bool hosts_too = r.topology == Topology::spread_hosts;
        if (!hosts_too && r.cls != Class::mig && r.cls != Class::share) return true;
        std::map<std::uint32_t, unsigned> counts;
        for (GpuNo no = 0; no < gpus.size(); ++no) {
          if (allowed(r, model, no)) counts[hosts_too ? gpus[no].host : no] = 0;
        }
        for (const Part& p : parts) ++counts[hosts_too ? p.host : p.gpu];
        unsigned least = 1000, most = 0;
        for (const auto& [name, count] : counts) {
          least = std::min(least, count);
          most = std::max(most, count);
        }
        return most - least <= r.max_skew;
      }
    }
    return false;
  }

  // Where one part could go if nothing but itself were asked for.
  std::vector<Part> places(const Request& r, ModelNo model) const {
    std::vector<Part> out;
    for (GpuNo no = 0; no < gpus.size(); ++no) {
      if (!allowed(r, model, no)) continue;
      Part part;
      part.host = gpus[no].host;
      part.gpu = no;
      part.numa = gpus[no].gpu.numa;
      if (r.cls == Class::mig) {
        const auto* its = profile(model, r);
        part.profile = its->id;
        part.size = its->size;
        for (const unsigned start : its->starts) {
          part.start = start;
          const Gpu& gpu = gpus[no].gpu;
          if (gpu.pool == Pool::mig && std::find(gpu.instances.begin(), gpu.instances.end(),
                                                 Instance{its->id, start}) == gpu.instances.end())
            continue;
          if (room(r, model, {part})) out.push_back(part);
        }
        continue;
      }
      part.milli = r.cls == Class::share ? r.milli : 1000;
      part.memory_mib = r.cls == Class::share ? r.memory_mib : 0;
      if (room(r, model, {part})) out.push_back(part);
    }
    return out;
  }

  std::vector<ModelNo> order(const Request& r) const {
    std::vector<ModelNo> out;
    if (r.models.empty()) {
      for (std::size_t m = 0; m < models.size(); ++m) out.push_back(static_cast<ModelNo>(m));
    }
    for (const auto& name : r.models) {
      for (std::size_t m = 0; m < models.size(); ++m) {
        if (models[m].name == name) out.push_back(static_cast<ModelNo>(m));
      }
    }
    return out;
  }

  bool fits_on(const Request& r, ModelNo model) const {
    const auto all = places(r, model);
    std::vector<Part> parts;
    const std::function<bool(std::size_t)> extend = [&](std::size_t from) {
      if (parts.size() == r.count) return topology(r, model, parts);
      for (std::size_t at = from; at < all.size(); ++at) {
        parts.push_back(all[at]);
        // Equal shares may lie side by side on one GPU.
        if (room(r, model, parts) && extend(r.cls == Class::share ? at : at + 1)) return true;
        parts.pop_back();
      }
      return false;
    };
    return extend(0);
  }
  std::optional<ModelNo> fits(const Request& r) const {
    for (const ModelNo model : order(r)) {
      if (fits_on(r, model)) return model;
    }
    return std::nullopt;
  }
};

const std::vector<std::string> tenant_names = {"a", "b", "c", "d"};

World random_world(Prng& prng, unsigned most_hosts, unsigned most_gpus) {
  World world;
  world.models = {{"H100", eight(), 80'000}, {"A30", four(), 24'000}, {"odd", crooked(), 6'000}};
  const auto hosts = 1 + prng.below(most_hosts);
  const bool plain = prng.below(3) == 0;
  for (unsigned h = 0; h < hosts; ++h) {
    Host host;
    host.name = fmt::format("h{}", h);
    host.cpu_milli = static_cast<std::int64_t>(2000 + prng.below(8) * 1000);
    host.memory_mib = static_cast<std::int64_t>(4000 + prng.below(8) * 1000);
    if (!plain && prng.below(4) == 0) host.taints = {"maintenance"};
    if (!plain && prng.below(8) == 0) host.taints.push_back("preview");
    if (prng.below(2) == 0) host.labels = {"zone=a"};
    host.drained = !plain && prng.below(12) == 0;
    const auto count = 1 + prng.below(most_gpus);
    const auto pool = static_cast<Pool>(1 + prng.below(5));
    const auto model = static_cast<ModelNo>(prng.below(3));
    for (unsigned g = 0; g < count; ++g) {
      const bool mixed = prng.below(3) == 0;
      Gpu gpu = gpu_of(fmt::format("GPU-{}-{}", h, g), mixed ? static_cast<ModelNo>(prng.below(3)) : model,
                       mixed ? static_cast<Pool>(prng.below(6)) : pool, static_cast<unsigned>(prng.below(2)));
      if (!plain && prng.below(5) == 0) gpu.band = prng.below(3) == 0 ? Band::hot : Band::warm;
      gpu.drained = !plain && prng.below(10) == 0;
      const auto& geometry = world.models[gpu.model].geometry;
      if (gpu.pool == Pool::mig || (gpu.pool == Pool::dynamic && prng.below(3) == 0)) {
        std::vector<mig::NewInstance> there;
        for (unsigned tries = 0; tries < 6; ++tries) {
          const auto& p = geometry.profiles[prng.below(geometry.profiles.size())];
          const unsigned start = p.starts[prng.below(p.starts.size())];
          there.push_back({p.id, {start, p.size}, 0});
          if (mig::legal(geometry, there)) {
            gpu.instances.push_back({p.id, start});
          } else {
            there.pop_back();
          }
        }
      }
      host.gpus.push_back(gpu);
    }
    host.nvlink.assign(count * count, 0);
    for (std::size_t a = 0; a < count; ++a) {
      for (std::size_t b = 0; b < a; ++b)
        host.nvlink[a * count + b] = host.nvlink[b * count + a] = static_cast<std::uint8_t>(prng.below(3));
    }
    for (const Gpu& gpu : host.gpus) world.gpus.push_back({h, gpu});
    world.hosts.push_back(host);
  }
  return world;
}

Engine engine_of(const World& world) {
  Engine engine(world.rules);
  for (const Model& model : world.models) EXPECT_TRUE(engine.add_model(model).ok());
  for (const Host& host : world.hosts) {
    const auto added = engine.add_host(host);
    EXPECT_TRUE(added.ok()) << (added.ok() ? "" : added.error().message());
  }
  return engine;
}

Request random_request(Prng& prng, const World& world) {
  Request r;
  r.tenant = tenant_names[prng.below(tenant_names.size())];
  r.cls = static_cast<Class>(prng.below(4));
  r.count = static_cast<unsigned>(prng.below(2) == 0 ? 1 : 1 + prng.below(4));
  const auto& profiles = world.models[prng.below(world.models.size())].geometry.profiles;
  if (r.cls == Class::mig) r.profile = profiles[prng.below(profiles.size())].name;
  if (r.cls == Class::share) {
    r.milli = static_cast<std::int32_t>(100 + prng.below(9) * 100);
    r.memory_mib = static_cast<std::int64_t>(prng.below(6) * 1500);
  }
  if (prng.below(3) == 0) r.cpu_milli = static_cast<std::int64_t>(prng.below(4) * 700);
  if (prng.below(4) == 0) r.host_memory_mib = static_cast<std::int64_t>(prng.below(4) * 900);
  if (prng.below(2) == 0) r.topology = static_cast<Topology>(prng.below(6));
  r.max_skew = static_cast<unsigned>(1 + prng.below(2));
  if (prng.below(6) == 0) r.models = {prng.below(2) == 0 ? "H100" : "A30", "odd"};
  if (prng.below(3) == 0) r.tolerates = {prng.below(3) == 0 ? "*" : "maintenance"};
  if (prng.below(8) == 0) r.labels = {"zone=a"};
  if (prng.below(3) == 0) r.latency = Latency::interactive;
  if (prng.below(8) == 0) r.most_band = prng.below(2) == 0 ? Band::cool : Band::warm;
  if (prng.below(6) == 0) r.avoid_on_gpu = {tenant_names[prng.below(4)]};
  if (prng.below(8) == 0) r.avoid_on_host = {tenant_names[prng.below(4)]};
  if (prng.below(12) == 0) r.alone = prng.below(2) == 0 ? Alone::gpu : Alone::host;
  r.priority = static_cast<int>(prng.below(3));
  r.movable = prng.below(2) == 0;
  r.price = 1 + prng.below(5);
  if (prng.below(2) == 0) r.ends = static_cast<std::int64_t>(prng.below(100));
  return r;
}

std::string words(const Request& r) {
  return fmt::format("{} {} {} x{} m{}/{} cpu {}/{} {} skew {} alone {}", r.tenant, name_of(r.cls), r.profile,
                     r.count, r.milli, r.memory_mib, r.cpu_milli, r.host_memory_mib, name_of(r.topology),
                     r.max_skew, static_cast<int>(r.alone));
}

// Everything that shows of an engine, and what it would choose next.
std::string fingerprint(Engine& engine, std::span<const Request> probes) {
  std::string out;
  for (HostNo h = 0; h < engine.host_count(); ++h)
    out += fmt::format("{}:{}/{} g{} ", h, engine.free(h).cpu_milli, engine.free(h).memory_mib,
                       engine.generation(h));
  for (GpuNo g = 0; g < engine.gpu_count(); ++g) {
    const auto free = engine.free_on(g);
    const Gpu gpu = engine.gpu(g);
    out +=
        fmt::format("{}:{}/{}/{}/{}/{} ", g, free.milli, free.memory_mib, free.units, free.idle, gpu.mig_on);
    for (const auto& i : gpu.instances) out += fmt::format("{}@{},", i.profile, i.start);
    for (const PlacementId id : engine.placements_on(g)) out += fmt::format("#{}", id);
  }
  for (const Request& probe : probes) {
    const auto choice = engine.find(probe);
    out += "\n" + words(probe) + ": ";
    if (!choice) continue;
    for (const Part& p : choice->parts) out += fmt::format("{}@{}/{} ", p.gpu, p.start, p.growth);
    for (const Step& s : choice->steps)
      out += fmt::format("{} {} {} {};", name_of(s.kind), s.gpu, s.profile, s.start);
  }
  return out;
}

void take_away(World& world, PlacementId id) {
  std::erase_if(world.held, [&](const Held& h) { return h.id == id; });
}

// F of the rule in grid.hpp, by counting what mig itself says fits.
std::int64_t waste(const mig::Geometry& geometry, const std::vector<mig::NewInstance>& there) {
  std::int64_t free = geometry.memory_slices, sum = 0;
  for (const auto& i : there) free -= i.place.size;
  for (const auto& p : geometry.profiles)
    sum += std::int64_t{p.size} * (free - std::int64_t{p.size} * mig::capacity(geometry, there, p.id));
  return sum;
}

void expect_order(const World& world, const Request& r, const Choice& choice) {
  const Part& got = choice.parts.front();
  if (r.count != 1) return;
  if (r.cls == Class::mig) {
    const auto all = world.places(r, choice.model);
    const auto fixed = std::find_if(all.begin(), all.end(),
                                    [&](const Part& p) { return world.gpus[p.gpu].gpu.pool == Pool::mig; });
    if (fixed != all.end()) {
      unsigned lowest = 1000;
      for (const Part& p : all) {
        if (p.gpu == fixed->gpu) lowest = std::min(lowest, p.start);
      }
      EXPECT_EQ(std::pair(got.gpu, got.start), std::pair(fixed->gpu, lowest));
      return;
    }
    const auto& geometry = world.models[choice.model].geometry;
    const auto rank = [&](const Part& p) {
      std::vector<mig::NewInstance> there;
      std::int64_t free = geometry.memory_slices;
      for (const Held& h : world.held) {
        for (const Part& other : h.parts) {
          if (other.gpu != p.gpu) continue;
          there.push_back({other.profile, {other.start, other.size}, 0});
          free -= other.size;
        }
      }
      const std::int64_t before = waste(geometry, there);
      const bool empty = there.empty();
      there.push_back({p.profile, {p.start, p.size}, 0});
      return std::tuple(empty, waste(geometry, there) - before, free, p.start);
    };
    auto best = rank(all.front());
    for (const Part& p : all) best = std::min(best, rank(p));
    EXPECT_EQ(rank(got), best) << words(r);
    EXPECT_EQ(got.growth, std::get<1>(best));
  } else if (r.cls == Class::share) {
    const auto all = world.places(r, choice.model);
    const bool own = std::any_of(all.begin(), all.end(),
                                 [&](const Part& p) { return world.gpus[p.gpu].gpu.pool == Pool::share; });
    EXPECT_EQ(world.gpus[got.gpu].gpu.pool == Pool::share, own);
  }
}

// ---- tests
// -------------------------------------------------------------------------------------------------------

TEST(Placement, AgreesWithAPlacerThatTriesEverything) {
  unsigned yes = 0, no = 0;
  for (std::uint64_t seed = 1; seed <= 80; ++seed) {
    Prng prng(seed);
    World world = random_world(prng, 3, 4);
    Engine engine = engine_of(world);
    for (unsigned step = 0; step < 25; ++step) {
      if (!world.held.empty() && prng.below(3) == 0) {
        const PlacementId id = world.held[prng.below(world.held.size())].id;
        ASSERT_TRUE(engine.release(id).ok());
        take_away(world, id);
        continue;
      }
      const Request r = random_request(prng, world);
      const auto choice = engine.find(r);
      const auto expected = world.fits(r);
      ASSERT_EQ(choice.has_value(), expected.has_value())
          << "seed " << seed << " step " << step << ": " << words(r);
      (choice ? yes : no) += 1;
      if (!choice) continue;
      ASSERT_EQ(choice->model, *expected) << "seed " << seed << " step " << step << ": " << words(r);
      ASSERT_EQ(choice->parts.size(), r.count);
      ASSERT_TRUE(world.room(r, choice->model, choice->parts))
          << "seed " << seed << " step " << step << ": " << words(r);
      ASSERT_TRUE(world.topology(r, choice->model, choice->parts)) << "seed " << seed << ": " << words(r);
      for (const Part& part : choice->parts)
        ASSERT_TRUE(world.allowed(r, choice->model, part.gpu)) << "seed " << seed << ": " << words(r);
      expect_order(world, r, *choice);
      const auto id = engine.commit(r, *choice);
      ASSERT_TRUE(id.ok()) << id.error().message();
      world.held.push_back({*id, r, choice->parts});
    }
  }
  EXPECT_GT(yes, 300U);
  EXPECT_GT(no, 300U);
}

TEST(Placement, EveryWayToYesIsOne) {
  std::array<unsigned, 6> seen = {};
  for (std::uint64_t seed = 1000; seed < 1048; ++seed) {
    Prng prng(seed);
    World world = random_world(prng, 3, 4);
    Engine engine = engine_of(world);
    const bool plain = seed % 2 == 0;
    if (plain) {  // few constraints and many comings and goings: what moves can mend
      world = {};
      world.models = {{"H100", eight(), 80'000}, {"A30", four(), 24'000}, {"odd", crooked(), 6'000}};
      engine = fleet(2, seed % 4 == 0 ? Pool::dynamic : Pool::share, 3, 9'000);
    }
    for (unsigned step = 0; step < 40; ++step) {
      const auto ids = engine.placements();
      if (!ids.empty() && prng.below(4) == 0) {
        ASSERT_TRUE(engine.release(ids[prng.below(ids.size())]).ok());
      }
      Request r = random_request(prng, world);
      if (plain) {
        const Request bare = r;
        r = share_request(static_cast<std::int32_t>(100 * (1 + prng.below(9))), 100);
        if (seed % 4 == 0)
          r = prng.below(6) == 0 ? whole_request(1) : mig_request(eight().profiles[prng.below(6)].name);
        r.tenant = bare.tenant;
        r.movable = bare.movable;
        r.price = bare.price;
        if (prng.below(4) == 0) r.topology = bare.topology;
        if (prng.below(4) == 0) r.count = bare.count;
      }
      std::vector<Request> probes;
      for (unsigned p = 0; p < 3; ++p) probes.push_back(random_request(prng, world));
      const std::string before = fingerprint(engine, probes);
      auto answer = engine.decide(r);
      ASSERT_TRUE(answer.ok());
      ASSERT_EQ(fingerprint(engine, probes), before)
          << "deciding left a trace, seed " << seed << ": " << words(r);
      if (const auto* choice = std::get_if<Choice>(&*answer)) {
        ASSERT_TRUE(engine.commit(r, *choice).ok());
        continue;
      }
      const Refusal& refusal = std::get<Refusal>(*answer);
      ASSERT_FALSE(refusal.reasons.empty());
      std::uint64_t counted = 0;
      for (const auto count : refusal.gpus) counted += count;
      ASSERT_EQ(counted, engine.gpu_count());
      for (const Way& way : refusal.ways) {
        ++seen[static_cast<std::size_t>(way.kind)];
        engine.mark();
        for (const Move& move : way.moves) {
          const Placement* its = engine.placement(move.placement);
          ASSERT_NE(its, nullptr);
          ASSERT_TRUE(its->request.movable);
          ASSERT_TRUE(engine.move(move).ok()) << way.text;
        }
        for (const PlacementId id : way.gone) {
          const Placement* its = engine.placement(id);
          ASSERT_NE(its, nullptr);
          if (way.kind == WayKind::ends) {
            ASSERT_LE(*its->request.ends, *way.at);
          }
          if (way.kind == WayKind::evict) {
            ASSERT_LT(its->request.priority, r.priority);
          }
          ASSERT_TRUE(engine.release(id).ok());
        }
        const Request& now = way.instead ? *way.instead : r;
        const auto choice = engine.find(now);
        ASSERT_TRUE(choice.has_value()) << "seed " << seed << ": " << words(r) << ": " << way.text;
        ASSERT_TRUE(engine.commit(now, *choice).ok());
        engine.rollback();
        ASSERT_EQ(fingerprint(engine, probes), before);
      }
    }
  }
  for (std::size_t kind = 0; kind < seen.size(); ++kind)
    EXPECT_GT(seen[kind], 2U) << name_of(static_cast<WayKind>(kind)) << " was never tried";
}

TEST(Placement, RollbackRestoresEveryIndexToItsOrder) {
  for (std::uint64_t seed = 2000; seed < 2020; ++seed) {
    Prng prng(seed);
    World world = random_world(prng, 4, 6);
    Engine engine = engine_of(world);
    std::vector<Request> probes;
    for (unsigned p = 0; p < 12; ++p) probes.push_back(random_request(prng, world));
    const auto churn = [&](unsigned steps, bool marks) {
      unsigned depth = 0;
      for (unsigned step = 0; step < steps; ++step) {
        const auto ids = engine.placements();
        const auto what = prng.below(marks ? 7 : 5);
        if (what < 3) {
          const Request r = random_request(prng, world);
          if (const auto choice = engine.find(r)) {
            ASSERT_TRUE(engine.commit(r, *choice).ok());
          }
        } else if (what == 3 && !ids.empty()) {
          auto was = engine.release(ids[prng.below(ids.size())]);
          ASSERT_TRUE(was.ok());
          if (prng.below(2) == 0) {
            ASSERT_TRUE(engine.adopt(*was).ok());
          }
        } else if (what == 4 && !ids.empty()) {
          const PlacementId id = ids[prng.below(ids.size())];
          Part to = engine.placement(id)->parts.front();
          to.gpu = static_cast<GpuNo>(prng.below(engine.gpu_count()));
          to.host = engine.host_of(to.gpu);
          const std::string before = fingerprint(engine, probes);
          if (!engine.move({id, 0, to}).ok()) {
            ASSERT_EQ(fingerprint(engine, probes), before);
          }
        } else if (what == 5) {
          engine.mark();
          ++depth;
        } else if (what == 6 && depth > 0) {
          prng.below(2) == 0 ? engine.rollback() : engine.keep();
          --depth;
        }
      }
      for (; depth > 0; --depth) engine.keep();
    };
    churn(30, false);
    for (unsigned round = 0; round < 6; ++round) {
      const std::string before = fingerprint(engine, probes);
      engine.mark();
      churn(20, true);
      engine.rollback();
      ASSERT_EQ(fingerprint(engine, probes), before) << "seed " << seed;
      churn(4, false);
    }
    for (const PlacementId id : engine.placements()) ASSERT_TRUE(engine.release(id).ok());
    for (GpuNo g = 0; g < engine.gpu_count(); ++g) EXPECT_TRUE(engine.free_on(g).idle);
    for (HostNo h = 0; h < engine.host_count(); ++h)
      EXPECT_EQ(engine.free(h).cpu_milli, world.hosts[h].cpu_milli);
  }
}

TEST(Placement, PermutingEqualHostsAndGpusChangesOnlyNames) {
  for (std::uint64_t seed = 3000; seed < 3008; ++seed) {
    Prng prng(seed);
    constexpr unsigned hosts = 4, gpus = 4;
    for (const Pool pool : {Pool::dynamic, Pool::share, Pool::exclusive}) {
      Engine one = fleet(hosts, pool, gpus), other = fleet(hosts, pool, gpus);
      // The same things lie on other GPUs: hosts and the GPUs of a NUMA node change places.
      std::vector<HostNo> host_of = {0, 1, 2, 3};
      prng.shuffle(std::span(host_of));
      std::vector<GpuNo> to(hosts * gpus);
      for (HostNo h = 0; h < hosts; ++h) {
        std::array<GpuNo, gpus> inside = {0, 1, 2, 3};
        prng.shuffle(std::span(inside).first(2));
        prng.shuffle(std::span(inside).last(2));
        for (GpuNo g = 0; g < gpus; ++g) to[h * gpus + g] = host_of[h] * gpus + inside[g];
      }
      std::vector<Request> asked;
      for (unsigned step = 0; step < 24; ++step) {
        Request r = pool == Pool::share
                        ? share_request(static_cast<std::int32_t>(100 * (1 + prng.below(9))), 5000)
                    : pool == Pool::exclusive ? whole_request(static_cast<unsigned>(1 + prng.below(3)))
                                              : mig_request(eight().profiles[prng.below(6)].name);
        const auto a = one.find(r), b = other.find(r);
        ASSERT_EQ(a.has_value(), b.has_value());
        if (!a) continue;
        for (std::size_t p = 0; p < a->parts.size(); ++p) {
          const auto left = one.free_on(a->parts[p].gpu), right = other.free_on(b->parts[p].gpu);
          EXPECT_EQ(a->parts[p].start, b->parts[p].start);
          EXPECT_EQ(a->parts[p].growth, b->parts[p].growth);
          if (pool == Pool::share) continue;  // ties of its rule go to the lowest node
          EXPECT_EQ(left.units, right.units);
          EXPECT_EQ(left.idle, right.idle);
        }
        Placement mirrored{no_placement, r, b->model, a->parts};
        for (Part& part : mirrored.parts) {
          part.gpu = to[part.gpu];
          part.host = other.host_of(part.gpu);
        }
        ASSERT_TRUE(one.commit(r, *a).ok());
        ASSERT_TRUE(other.adopt(mirrored).ok());
      }
    }
  }
}

TEST(Placement, AStaleChoiceIsRefusedAndNothingIsDone) {
  Engine engine = fleet(2, Pool::dynamic);
  const Request r = mig_request("3g.40gb");
  const auto first = engine.find(r), second = engine.find(r);
  ASSERT_TRUE(first && second);
  ASSERT_TRUE(engine.commit(r, *first).ok());
  const std::string before = fingerprint(engine, std::span(&r, 1));
  const auto stale = engine.commit(r, *second);
  ASSERT_FALSE(stale.ok());
  EXPECT_EQ(stale.error().code(), Errc::conflict);
  EXPECT_EQ(fingerprint(engine, std::span(&r, 1)), before);
  // A change on another host makes nothing stale.
  const auto third = engine.find(r);
  ASSERT_TRUE(engine.drain_gpu(engine.first_gpu(1 - third->parts[0].host), true).ok());
  EXPECT_TRUE(engine.commit(r, *third).ok());
}

TEST(Placement, AllPartsComeOrNone) {
  Engine engine = fleet(1, Pool::dynamic, 2);
  EXPECT_EQ(engine.find(mig_request("3g.40gb", 4))->parts.size(), 4U);
  EXPECT_FALSE(engine.find(mig_request("3g.40gb", 5)));
  Choice broken = *engine.find(mig_request("3g.40gb", 2));
  broken.parts[1] = broken.parts[0];
  EXPECT_FALSE(engine.commit(mig_request("3g.40gb", 2), broken).ok());
  EXPECT_TRUE(engine.free_on(0).idle && engine.free_on(1).idle);
}

TEST(Placement, ReleasedPlacementsComeBackByTheirId) {
  Engine engine = fleet(1, Pool::dynamic, 2);
  const PlacementId id = must(engine, mig_request("2g.20gb"));
  const auto was = engine.release(id);
  ASSERT_TRUE(was.ok());
  EXPECT_FALSE(engine.release(id).ok());
  ASSERT_TRUE(engine.adopt(*was).ok());
  EXPECT_EQ(engine.placement(id)->parts, was->parts);
  EXPECT_EQ(engine.adopt(*was).error().code(), Errc::conflict);
  Placement unknown = *was;
  unknown.id = 77ULL << 32U | 9;
  unknown.parts[0].start = was->parts[0].start == 4 ? 0 : 4;
  EXPECT_EQ(engine.adopt(unknown).error().code(), Errc::invalid);
}

TEST(Placement, AFixedLayoutHandsOutWhatIsThere) {
  Engine engine;
  ASSERT_TRUE(engine.add_model({"H100", eight(), 80'000}).ok());
  Host host;
  host.name = "a";
  host.gpus = {gpu_of("g", 0, Pool::mig)};
  host.gpus[0].instances = {{9, 4}, {19, 0}, {19, 1}};
  ASSERT_TRUE(engine.add_host(host).ok());
  const auto small = engine.find(mig_request("1g.10gb"));
  ASSERT_TRUE(small);
  EXPECT_EQ(small->parts[0].start, 0U);
  EXPECT_FALSE(small->parts[0].cut);
  EXPECT_TRUE(small->steps.empty());
  EXPECT_FALSE(engine.find(mig_request("2g.20gb")));
  EXPECT_FALSE(engine.find(mig_request("1g.10gb", 3)));
  EXPECT_TRUE(engine.find(mig_request("1g.10gb", 2)));
}

TEST(Placement, StepsSayWhatHasToBeCut) {
  Engine engine;
  ASSERT_TRUE(engine.add_model({"H100", eight(), 80'000}).ok());
  Host host;
  host.name = "a";
  host.gpus = {gpu_of("g", 0, Pool::dynamic)};
  ASSERT_TRUE(engine.add_host(host).ok());
  const PlacementId id = must(engine, mig_request("1g.10gb"));
  const unsigned start = engine.placement(id)->parts[0].start;
  EXPECT_TRUE(engine.gpu(0).mig_on);
  ASSERT_TRUE(engine.release(id).ok());
  // It is still there, and idle: the same again needs nothing.
  const auto again = engine.find(mig_request("1g.10gb"));
  EXPECT_TRUE(again->steps.empty());
  EXPECT_FALSE(again->parts[0].cut);
  EXPECT_EQ(again->parts[0].start, start);
  const auto large = engine.find(mig_request("7g.80gb"));
  EXPECT_EQ(large->steps, (std::vector<Step>{{StepKind::destroy_instance, 0, 19, start},
                                             {StepKind::create_instance, 0, 0, 0}}));
  const auto whole = engine.find(whole_request(1));
  EXPECT_EQ(whole->steps, (std::vector<Step>{{StepKind::destroy_instance, 0, 19, start},
                                             {StepKind::disable_mig, 0, 0, 0}}));
  ASSERT_TRUE(engine.commit(whole_request(1), *whole).ok());
  EXPECT_FALSE(engine.gpu(0).mig_on);
  EXPECT_FALSE(engine.find(mig_request("1g.10gb")));
}

TEST(Placement, TenantsThatMustNotMeetDoNotInEitherDirection) {
  Engine engine = fleet(2, Pool::share, 1);
  Request shy = share_request(100, 0);
  shy.tenant = "shy";
  shy.avoid_on_gpu = {"loud"};
  const PlacementId first = must(engine, shy);
  Request loud = share_request(100, 0);
  loud.tenant = "loud";
  const auto other = engine.find(loud);
  ASSERT_TRUE(other);
  EXPECT_NE(other->parts[0].gpu, engine.placement(first)->parts[0].gpu);
  Request alone = share_request(100, 0);
  alone.tenant = "alone";
  alone.alone = Alone::host;
  must(engine, alone);
  EXPECT_FALSE(engine.find(loud));
  const Refusal why = engine.explain(loud);
  EXPECT_EQ(why.gpus[static_cast<std::size_t>(Why::anti_affinity)], 2U);
  alone.count = 3;
  EXPECT_TRUE(engine.find(alone)) << "with itself it may be";
}

TEST(Placement, TaintsBandsLabelsAndDrainsKeepWorkAway) {
  Engine engine = fleet(2, Pool::dynamic, 2);
  for (const Class cls : {Class::mig, Class::share, Class::exclusive}) {
    Request r = cls == Class::mig     ? mig_request("1g.10gb")
                : cls == Class::share ? share_request(100, 10)
                                      : whole_request(1);
    ASSERT_TRUE(engine.set_taints(0, {"x"}).ok());
    EXPECT_EQ(engine.find(r)->parts[0].host, 1U);
    r.tolerates = {"x"};
    r.labels = {"zone=a"};
    EXPECT_FALSE(engine.find(r));
    ASSERT_TRUE(engine.set_labels(0, {"zone=a"}).ok());
    EXPECT_EQ(engine.find(r)->parts[0].host, 0U);
    r.latency = Latency::interactive;
    ASSERT_TRUE(engine.set_band(0, Band::warm).ok());
    EXPECT_EQ(engine.find(r)->parts[0].gpu, 1U);
    ASSERT_TRUE(engine.set_band(1, Band::warm).ok());
    EXPECT_FALSE(engine.find(r));
    const Refusal why = engine.explain(r);
    ASSERT_FALSE(why.ways.empty());
    EXPECT_TRUE(std::any_of(why.ways.begin(), why.ways.end(), [](const Way& w) {
      return w.kind == WayKind::without && w.text == "fits without the limit of the band";
    })) << why.str();
    r.most_band = Band::warm;
    EXPECT_TRUE(engine.find(r));
    ASSERT_TRUE(engine.set_band(0, Band::hot).ok());
    EXPECT_EQ(engine.find(r)->parts[0].gpu, 1U);
    ASSERT_TRUE(engine.drain_gpu(1, true).ok());
    EXPECT_FALSE(engine.find(r));
    ASSERT_TRUE(engine.drain_gpu(1, false).ok());
    ASSERT_TRUE(engine.drain_host(0, true).ok());
    EXPECT_FALSE(engine.find(r));
    ASSERT_TRUE(engine.drain_host(0, false).ok());
    ASSERT_TRUE(engine.set_band(0, Band::cool).ok());
    ASSERT_TRUE(engine.set_band(1, Band::cool).ok());
    ASSERT_TRUE(engine.set_labels(0, {}).ok());
    ASSERT_TRUE(engine.set_taints(0, {}).ok());
  }
}

TEST(Placement, WhatLeavesAHotGpuLeavesNoRoomOnIt) {
  Engine engine = fleet(1, Pool::share, 1);
  const PlacementId id = must(engine, share_request(600, 10));
  ASSERT_TRUE(engine.set_band(0, Band::hot).ok());
  ASSERT_TRUE(engine.release(id).ok());
  EXPECT_FALSE(engine.find(share_request(100, 0)));
  Placement there{no_placement, share_request(300, 5), 0, {}};
  Part part;
  part.milli = 300;
  part.memory_mib = 5;
  there.parts = {part};
  EXPECT_TRUE(engine.adopt(there).ok()) << "what runs already is taken as it is";
  ASSERT_TRUE(engine.set_band(0, Band::warm).ok());
  EXPECT_TRUE(engine.find(share_request(700, 0)));
  EXPECT_FALSE(engine.find(share_request(701, 0)));
}

TEST(Placement, SpreadKeepsTheSkew) {
  Engine engine = fleet(4, Pool::dynamic, 2);
  for (const Class cls : {Class::mig, Class::share, Class::exclusive}) {
    Request r = cls == Class::mig     ? mig_request("1g.10gb")
                : cls == Class::share ? share_request(100, 10)
                                      : whole_request(1);
    r.count = 4;
    r.topology = Topology::spread_hosts;
    auto choice = engine.find(r);
    ASSERT_TRUE(choice);
    std::set<HostNo> hosts;
    for (const Part& p : choice->parts) hosts.insert(p.host);
    EXPECT_EQ(hosts.size(), 4U);
    // A host that takes nothing more, and is not excluded, holds the others back.
    ASSERT_TRUE(engine.set_taints(3, {"x"}).ok());
    r.count = 6;
    EXPECT_TRUE(engine.find(r));
    ASSERT_TRUE(engine.set_taints(3, {}).ok());
    EXPECT_TRUE(engine.find(r));
    Request full = whole_request(2);
    full.tenant = "b";
    engine.mark();
    const auto filled = engine.find(full);
    ASSERT_TRUE(engine.commit(full, *filled).ok());
    EXPECT_FALSE(engine.find(r));
    r.max_skew = 2;
    EXPECT_TRUE(engine.find(r));
    engine.rollback();
  }
}

TEST(Placement, SetsOfWholeGpusComeFromOneHostAndTheBestLinks) {
  Engine engine;
  ASSERT_TRUE(engine.add_model({"PCIe", {}, 80'000}).ok());
  Host host;
  host.name = "bridged";
  for (unsigned g = 0; g < 4; ++g)
    host.gpus.push_back(gpu_of(fmt::format("g{}", g), 0, Pool::exclusive, g / 2));
  // 0-2 and 1-3 are bridged, across NUMA nodes.
  host.nvlink.assign(16, 0);
  for (const auto& [a, b] : {std::pair(0U, 2U), std::pair(1U, 3U)})
    host.nvlink[a * 4 + b] = host.nvlink[b * 4 + a] = 4;
  ASSERT_TRUE(engine.add_host(host).ok());
  const auto two = engine.find(whole_request(2));
  EXPECT_EQ(two->parts[0].gpu, 0U);
  EXPECT_EQ(two->parts[1].gpu, 2U);
  Request together = whole_request(2);
  together.topology = Topology::same_numa;
  EXPECT_EQ(engine.find(together)->parts[1].gpu, 1U);
  must(engine, whole_request(1));  // 0
  EXPECT_EQ(engine.find(whole_request(1))->parts[0].gpu, 2U) << "the one whose partner is taken";
  together.count = 3;
  const auto answer = engine.decide(together);
  ASSERT_TRUE(answer.ok());
  const auto& refusal = std::get<Refusal>(*answer);
  EXPECT_EQ(refusal.reasons[0].text,
            "needs 3 whole GPUs on one NUMA node: the most that one can take is 2 (host bridged, node 1)");
  EXPECT_EQ(refusal.reasons[0].has, 2);
  EXPECT_TRUE(std::any_of(refusal.ways.begin(), refusal.ways.end(), [](const Way& w) {
    return w.text == "fits without the topology same-numa";
  })) << refusal.str();
}

TEST(Placement, ALargeSetTakesTheEmptiestHosts) {
  Engine engine = fleet(3, Pool::exclusive, 8);
  must(engine, whole_request(3));
  const auto many = engine.find(whole_request(10));
  ASSERT_TRUE(many);
  std::map<HostNo, unsigned> on;
  for (const Part& p : many->parts) ++on[p.host];
  EXPECT_EQ(on, (std::map<HostNo, unsigned>{{0, 2}, {1, 8}}));
  Request one = whole_request(10);
  one.topology = Topology::same_node;
  EXPECT_FALSE(engine.find(one));
}

TEST(Placement, TheBestSetIsWhatTryingAllSetsFinds) {
  Prng prng(7);
  for (unsigned round = 0; round < 40; ++round) {
    const unsigned gpus = round < 36 ? 8 : 10;
    Shape shape{gpus, {}, {}, static_cast<std::uint32_t>(prng.below(256))};
    shape.links.assign(std::size_t{gpus} * gpus, 0);
    for (unsigned a = 0; a < gpus; ++a) {
      shape.numa.push_back(static_cast<std::uint8_t>(prng.below(2)));
      for (unsigned b = 0; b < a; ++b)
        shape.links[a * gpus + b] = shape.links[b * gpus + a] =
            static_cast<std::uint8_t>(prng.below(5) * prng.below(3));
    }
    const SetTable table(shape);
    const auto judged = [&](std::uint32_t set, std::uint32_t free) {
      std::int64_t weakest = 255, links = 0, left_links = 0;
      std::map<unsigned, unsigned> numa, left_numa;
      for (unsigned a = 0; a < gpus; ++a) {
        if ((set >> a & 1U) != 0) ++numa[shape.numa[a]];
        if (((free & ~set) >> a & 1U) != 0) ++left_numa[shape.numa[a]];
        for (unsigned b = 0; b < a; ++b) {
          const std::uint32_t both = 1U << a | 1U << b;
          const std::int64_t its = shape.links[a * gpus + b];
          if ((set & both) == both) {
            weakest = std::min(weakest, its);
            links += its;
          }
          if ((free & ~set & both) == both) left_links += its;
        }
      }
      std::int64_t block = 0;
      for (const auto& [node, count] : left_numa) block = std::max<std::int64_t>(block, count);
      return std::tuple(-weakest, -links, numa.size(), std::popcount(set & shape.dynamic), -left_links,
                        -block, set);
    };
    for (unsigned trial = 0; trial < 60; ++trial) {
      const auto free = static_cast<std::uint32_t>(1 + prng.below((1U << gpus) - 1));
      const auto k = static_cast<unsigned>(1 + prng.below(gpus));
      const auto& best = table.best(free, k);
      std::optional<std::uint32_t> expected;
      for (std::uint32_t set = 1; set < 1U << gpus; ++set) {
        if ((set & ~free) != 0 || static_cast<unsigned>(std::popcount(set)) != k) continue;
        if (!expected || judged(set, free) < judged(*expected, free)) expected = set;
      }
      ASSERT_EQ(best.gpus, expected.value_or(0)) << "free " << free << " k " << k;
    }
  }
}

TEST(Placement, ARefusalCountsEveryGpuOnceAndSaysWhatIsMissing) {
  Engine engine = fleet(2, Pool::share, 2);
  ASSERT_TRUE(engine.drain_gpu(0, true).ok());
  Request first = share_request(700, 60'000);
  first.ends = 50;
  must(engine, first);
  first.ends = 20;
  must(engine, first);
  must(engine, share_request(900, 100));
  Request r = share_request(500, 30'000);
  const auto answer = engine.decide(r);
  const auto& refusal = std::get<Refusal>(*answer);
  EXPECT_EQ(refusal.gpus[static_cast<std::size_t>(Why::drained)], 1U);
  EXPECT_EQ(refusal.gpus[static_cast<std::size_t>(Why::room)], 3U);
  EXPECT_EQ(refusal.reasons[0].why, Why::room);
  EXPECT_EQ(refusal.reasons[0].needs, 500);
  EXPECT_EQ(refusal.reasons[0].has, 300);
  ASSERT_FALSE(refusal.ways.empty());
  EXPECT_EQ(refusal.ways[0].kind, WayKind::ends);
  EXPECT_EQ(refusal.ways[0].at, 20);
  const auto less = std::find_if(refusal.ways.begin(), refusal.ways.end(),
                                 [](const Way& w) { return w.kind == WayKind::smaller; });
  ASSERT_NE(less, refusal.ways.end());
  EXPECT_LE(less->instead->milli, 300);
}

TEST(Placement, AMoveOfAMovableInstanceMakesRoom) {
  Engine engine = fleet(1, Pool::dynamic, 2);
  Request small = mig_request("1g.10gb");
  small.tenant = "b";
  small.movable = true;
  for (const auto& [gpu, start] : {std::pair(0U, 0U), std::pair(1U, 4U)}) {
    Placement p{no_placement, small, 0, {}};
    Part part;
    part.gpu = gpu;
    part.profile = 19;
    part.start = start;
    p.parts = {part};
    ASSERT_TRUE(engine.adopt(p).ok());
  }
  const auto answer = engine.decide(mig_request("7g.80gb"));
  ASSERT_TRUE(answer.ok());
  const auto& refusal = std::get<Refusal>(*answer);
  ASSERT_FALSE(refusal.ways.empty());
  EXPECT_EQ(refusal.ways[0].kind, WayKind::moves) << refusal.str();
  EXPECT_EQ(refusal.ways[0].moves.size(), 1U);
}

TEST(Placement, WrongFiguresAreErrorsThatSayWhich) {
  Engine engine;
  EXPECT_FALSE(engine.add_model({"", {}, 0}).ok());
  ASSERT_TRUE(engine.add_model({"H100", eight(), 80'000}).ok());
  Host host;
  host.name = "a";
  host.gpus.assign(17, gpu_of("g", 0, Pool::share));
  EXPECT_EQ(engine.add_host(host).error().message(), "host a: 17 GPUs, more than 16");
  host.gpus = {gpu_of("g", 0, Pool::mig), gpu_of("g", 0, Pool::mig)};
  EXPECT_FALSE(engine.add_host(host).ok()) << "two of one UUID";
  host.gpus = {gpu_of("g", 0, Pool::mig)};
  host.gpus[0].instances = {{9, 0}, {5, 0}};
  EXPECT_FALSE(engine.add_host(host).ok()) << "instances that overlap";
  host.gpus[0].instances = {{9, 0}};
  host.nvlink = {1, 2};
  EXPECT_FALSE(engine.add_host(host).ok());
  EXPECT_EQ(engine.host_count(), 0U);
  EXPECT_EQ(engine.gpu_count(), 0U);
  host.nvlink.clear();
  EXPECT_TRUE(engine.add_host(host).ok());
  Request r = share_request(0, 0);
  EXPECT_EQ(engine.decide(r).error().message(), "weight: 0 milli, not 1 to 1000");
  r = mig_request("1g.10gb", 5000);
  EXPECT_FALSE(engine.check(r).ok());
  EXPECT_FALSE(engine.find(r));
  EXPECT_FALSE(engine.drain_gpu(9, true).ok());
  EXPECT_FALSE(engine.release(3).ok());
}

TEST(Placement, SeveralPartsFitEvenWhereTheBestPlaceOfOneCostsTwo) {
  // Alone, "a" goes to 3, the one place that leaves both "b" and "c" theirs; four of it need 0, 2, 4 and 6.
  const mig::Geometry geometry{
      8,
      {plain_profile("a", 1, 1, 4, {0, 1, 2, 3, 4, 5, 6}, 2), plain_profile("b", 2, 1, 1, {0}, 3),
       plain_profile("c", 3, 1, 1, {5}, 3), plain_profile("full", 4, 8, 1, {0}, 8)}};
  Engine engine;
  ASSERT_TRUE(engine.add_model({"odd", geometry, 0}).ok());
  Host host;
  host.name = "h";
  host.gpus = {gpu_of("g", 0, Pool::dynamic), gpu_of("k", 0, Pool::dynamic)};
  ASSERT_TRUE(engine.add_host(host).ok());
  EXPECT_EQ(engine.find(mig_request("a"))->parts[0].start, 3U);
  for (const Topology topology : {Topology::any, Topology::same_node, Topology::spread_gpus}) {
    Request r = mig_request("a", 8);
    r.topology = topology;
    const auto choice = engine.find(r);
    ASSERT_TRUE(choice) << name_of(topology);
    EXPECT_TRUE(engine.commit(r, *choice).ok());
    EXPECT_FALSE(engine.find(mig_request("a")));
    ASSERT_TRUE(engine.release(engine.placements().front()).ok());
  }
  Request r = mig_request("a", 4);
  r.topology = Topology::same_gpu;
  EXPECT_TRUE(engine.find(r));
}

TEST(Placement, AnUnknownProfileIsRefusedWithThoseThereAre) {
  Engine engine = fleet(1, Pool::dynamic, 1);
  const Refusal why = engine.explain(mig_request("9g.90gb"));
  EXPECT_EQ(why.gpus[static_cast<std::size_t>(Why::profile)], 1U);
  EXPECT_EQ(
      why.reasons.at(0).text,
      "1 of 1 GPUs: no 9g.90gb there; profiles are 1g.10gb, 1g.20gb, 2g.20gb, 3g.40gb, 4g.40gb, 7g.80gb");
}

TEST(Placement, AnEmptyEngineRefuses) {
  Engine engine;
  const auto answer = engine.decide(whole_request(1));
  ASSERT_TRUE(answer.ok());
  EXPECT_EQ(std::get<Refusal>(*answer).reasons.at(0).text, "there is no GPU at all");
}

}  // namespace
}  // namespace bulkhead::placement
