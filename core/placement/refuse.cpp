// Why not: every GPU is counted at the first thing that excludes it, and what comes nearest is named with its
// figures.
#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/placement/state.hpp"

namespace bulkhead::placement {

std::string_view name_of(Why why) {
  switch (why) {
    case Why::pool:
      return "pool";
    case Why::model:
      return "model";
    case Why::profile:
      return "profile";
    case Why::drained:
      return "drained";
    case Why::label:
      return "label";
    case Why::taint:
      return "taint";
    case Why::band:
      return "band";
    case Why::anti_affinity:
      return "anti-affinity";
    case Why::host_room:
      return "host room";
    case Why::busy:
      return "busy";
    case Why::room:
      return "room";
    case Why::none:
      return "none";
  }
  return "?";
}

std::string_view name_of(WayKind kind) {
  switch (kind) {
    case WayKind::moves:
      return "moves";
    case WayKind::ends:
      return "ends";
    case WayKind::smaller:
      return "smaller";
    case WayKind::other_class:
      return "other class";
    case WayKind::without:
      return "without";
    case WayKind::evict:
      return "evict";
  }
  return "?";
}

std::string Refusal::str() const {
  std::string out;
  for (const Reason& reason : reasons) out += fmt::format("{}\n", reason.text);
  for (const Way& way : ways) out += fmt::format("  {}\n", way.text);
  return out;
}

namespace {

constexpr std::size_t names_shown = 16;

struct Most {  // the best of something, and where: the first of equals
  std::int64_t has = -1;
  GpuNo gpu = 0;
  void see(std::int64_t its, GpuNo where) {
    if (its <= has) return;
    has = its;
    gpu = where;
  }
};

std::string thing(const Request& r) {
  const char* plural = r.count == 1 ? "" : "s";
  switch (r.cls) {
    case Class::mig:
      return fmt::format("{} instance{} {}", r.count, plural, r.profile);
    case Class::share:
      return fmt::format("{} share{} of {} milli and {} MiB", r.count, plural, r.milli, r.memory_mib);
    case Class::exclusive:
      return fmt::format("{} whole GPU{}", r.count, plural);
    case Class::passthrough:
      return fmt::format("{} GPU{} to pass through", r.count, plural);
  }
  return {};
}

}  // namespace

void Engine::State::count_reasons(const Request& r, Refusal& out) const {
  std::vector<std::optional<Ask>> asks(models.size());
  std::vector<char> listed(models.size(), 0);
  const Ask base = read(r);
  for (const ModelNo model : models_for(r)) {
    listed[model] = 1;
    asks[model] = base;
    aim(*asks[model], model);
  }
  Ask nowhere = {};
  nowhere.request = &r;
  nowhere.model = static_cast<ModelNo>(models.size());  // of no GPU
  Most milli, memory, units, cpu, host_memory, on_gpu, on_numa, on_host;
  std::vector<std::int64_t> in_all(models.size(), 0);
  std::size_t domains = 0;
  for (HostNo host = 0; host < hosts.size(); ++host) {
    bool domain = false;
    std::vector<std::pair<std::pair<ModelNo, unsigned>, std::int64_t>> by_numa;
    std::vector<std::pair<ModelNo, std::int64_t>> by_model;
    const auto add = [](auto& list, const auto& name, std::int64_t count) -> std::int64_t {
      for (auto& [known, sum] : list) {
        if (known == name) return sum += count;
      }
      list.emplace_back(name, count);
      return count;
    };
    for (std::uint32_t at = 0; at < hosts[host].gpus; ++at) {
      const auto no = static_cast<GpuNo>(hosts[host].first + at);
      const GpuState& gpu = gpus[no];
      Why why = static_why(listed[gpu.model] != 0 ? *asks[gpu.model] : nowhere, no);
      if (why == Why::none) {
        const Ask& ask = *asks[gpu.model];
        domain = true;
        if (r.topology == Topology::spread_gpus) ++domains;
        const std::int64_t by_host = parts_by_host(ask, host), its = parts_on(ask, no);
        cpu.see(hosts[host].cpu, no);
        host_memory.see(hosts[host].memory, no);
        const Use wanted = r.cls == Class::mig ? Use::mig : r.cls == Class::share ? Use::share : Use::whole;
        const bool busy = gpu.use != Use::none && gpu.use != wanted;
        if (by_host == 0) {
          why = Why::host_room;
        } else if (busy) {
          why = Why::busy;
        } else if (its == 0) {
          why = Why::room;
        }
        if (!busy && r.cls == Class::share) {
          milli.see(gpu.free_milli, no);
          memory.see(gpu.free_memory, no);
        }
        if (!busy && r.cls == Class::mig && gpu.pool == Pool::dynamic)
          units.see(models[gpu.model].tables->free_units(gpu.held), no);
        if (why == Why::none) {
          on_gpu.see(std::min(its, by_host), no);
          on_numa.see(std::min(add(by_numa, std::pair(gpu.model, unsigned{gpu.numa}), its), by_host), no);
          on_host.see(std::min(add(by_model, gpu.model, its), by_host), no);
        }
      }
      ++out.gpus[static_cast<std::size_t>(why)];
    }
    if (domain && r.topology == Topology::spread_hosts) ++domains;
    for (const auto& [model, sum] : by_model)
      in_all[model] += std::min(sum, parts_by_host(*asks[model], host));
  }

  const auto count = [&](Why why) { return out.gpus[static_cast<std::size_t>(why)]; };
  const auto where = [&](GpuNo gpu) { return fmt::format("host {}", hosts[gpus[gpu].host].given.name); };
  const auto where_gpu = [&](GpuNo gpu) { return fmt::format("{}, GPU {}", where(gpu), gpus[gpu].index); };
  const auto say = [&](Why why, std::string text, std::int64_t needs, std::int64_t has) {
    out.reasons.push_back({why, std::move(text), needs, has});
  };
  if (gpus.empty()) {
    say(Why::none, "there is no GPU at all", r.count, 0);
    return;
  }
  if (count(Why::none) > 0) {
    const std::int64_t all = in_all.empty() ? 0 : *std::max_element(in_all.begin(), in_all.end());
    switch (r.topology) {
      case Topology::any:
        say(Why::none, fmt::format("needs {}: there is room for {} in all", thing(r), all), r.count, all);
        break;
      case Topology::same_gpu:
        say(Why::none,
            fmt::format("needs {} on one GPU: the most that one can take is {} ({})", thing(r), on_gpu.has,
                        where_gpu(on_gpu.gpu)),
            r.count, on_gpu.has);
        break;
      case Topology::same_numa:
        say(Why::none,
            fmt::format("needs {} on one NUMA node: the most that one can take is {} ({}, node {})", thing(r),
                        on_numa.has, where(on_numa.gpu), gpus[on_numa.gpu].numa),
            r.count, on_numa.has);
        break;
      case Topology::same_node:
        say(Why::none,
            fmt::format("needs {} on one host: the most that one can take is {} ({})", thing(r), on_host.has,
                        where(on_host.gpu)),
            r.count, on_host.has);
        break;
      case Topology::spread_gpus:
      case Topology::spread_hosts:
        say(Why::none,
            fmt::format("needs {} spread over {} with at most {} more on one than on another: {} of them are "
                        "allowed, and "
                        "there is room for {} in all",
                        thing(r), r.topology == Topology::spread_hosts ? "hosts" : "GPUs", r.max_skew,
                        domains, all),
            r.count, all);
        break;
    }
  }
  // The nearest to yes first.
  const std::size_t all = gpus.size();
  for (std::size_t at = why_count - 1; at-- > 0;) {
    const auto why = static_cast<Why>(at);
    const std::uint64_t its = count(why);
    if (its == 0) continue;
    const auto of = [&](std::string_view what) { return fmt::format("{} of {} GPUs: {}", its, all, what); };
    switch (why) {
      case Why::room:
        switch (r.cls) {
          case Class::mig:
            if (units.has < 0) {
              say(why, of(fmt::format("no idle instance {}", r.profile)), 1, 0);
            } else {
              const ModelNo model = gpus[units.gpu].model;
              const auto size =
                  models[model].given.geometry.profiles[static_cast<std::size_t>(asks[model]->profile)].size;
              say(why,
                  of(fmt::format("no place for {}, which takes {} memory slices at one of its starts; the "
                                 "most free on one "
                                 "is {} ({})",
                                 r.profile, size, units.has, where_gpu(units.gpu))),
                  size, units.has);
            }
            break;
          case Class::share: {
            const bool weight = milli.has < r.milli;
            say(why,
                of(fmt::format(
                    "needs {} milli and {} MiB on one; the most free is {} milli ({}) and {} MiB ({})",
                    r.milli, r.memory_mib, milli.has, where_gpu(milli.gpu), memory.has,
                    where_gpu(memory.gpu))),
                weight ? r.milli : r.memory_mib, weight ? milli.has : memory.has);
            break;
          }
          case Class::exclusive:
          case Class::passthrough:
            say(why, of("taken whole"), r.count, 0);
            break;
        }
        break;
      case Why::busy:
        say(why, of("cut on demand, and serving another class now"), 0, 0);
        break;
      case Why::host_room: {
        const bool by_cpu = cpu.has < r.cpu_milli;
        say(why,
            of(fmt::format("the host lacks room: needs {} milli of CPU and {} MiB; the most free is {} milli "
                           "({}) and {} MiB "
                           "({})",
                           r.cpu_milli, r.host_memory_mib, cpu.has, where(cpu.gpu), host_memory.has,
                           where(host_memory.gpu))),
            by_cpu ? r.cpu_milli : r.host_memory_mib, by_cpu ? cpu.has : host_memory.has);
        break;
      }
      case Why::anti_affinity:
        say(why, of("a tenant there is to be kept apart from this one"), 0, 0);
        break;
      case Why::band:
        say(why, of(fmt::format("hotter than {}, the most for this request", name_of(base.most))), 0, 0);
        break;
      case Why::taint:
        say(why, of("the host has a taint that the request does not tolerate"), 0, 0);
        break;
      case Why::label:
        say(why, of(fmt::format("the host lacks a label of {}", fmt::join(r.labels, ", "))), 0, 0);
        break;
      case Why::drained:
        say(why, of("drained"), 0, 0);
        break;
      case Why::profile: {
        std::vector<std::string_view> names;
        for (const ModelState& model : models) {
          for (const std::string_view name : model.given.geometry.names()) {
            if (names.size() < names_shown && std::find(names.begin(), names.end(), name) == names.end())
              names.push_back(name);
          }
        }
        say(why, of(fmt::format("no {} there; profiles are {}", r.profile, fmt::join(names, ", "))), 0, 0);
        break;
      }
      case Why::model:
        say(why, of(fmt::format("of a model other than {}", fmt::join(r.models, ", "))), 0, 0);
        break;
      case Why::pool:
        say(why, of(fmt::format("not kept for {}", name_of(r.cls))), 0, 0);
        break;
      case Why::none:
        break;
    }
  }
}

Refusal Engine::State::explain(const Request& request, const Effort& effort) {
  Refusal out;
  if (const Status fine = check(request); !fine.ok()) {
    out.reasons.push_back({Why::none, fine.error().message(), 0, 0});
    return out;
  }
  count_reasons(request, out);
  if (effort.ways) find_ways(request, effort, out);
  return out;
}

Refusal Engine::explain(const Request& request, const Effort& effort) {
  return state_->explain(request, effort);
}

Result<std::variant<Choice, Refusal>> Engine::decide(const Request& request, const Effort& effort) {
  BH_CHECK(state_->check(request));
  if (auto choice = state_->find(request)) return std::variant<Choice, Refusal>(std::move(*choice));
  return std::variant<Choice, Refusal>(state_->explain(request, effort));
}

}  // namespace bulkhead::placement
