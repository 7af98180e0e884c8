// What the front costs over the index behind it: the same random jobs come and go through the engine and
// through the bare grid::Fleet or fraction::Fleet in the same run, at 10,000 and 100,000 GPUs. Whole-GPU sets
// beside a scan of all hosts; refusals, without and with ways to yes.
#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/prng.hpp"
#include "core/mig/models_for_tests.hpp"
#include "core/placement/placement.hpp"
#include "core/placement/sets.hpp"

namespace {

using namespace bulkhead;

mig::Geometry h100() { return mig::six_shapes(); }

placement::Engine fleet(unsigned gpus, placement::Pool pool) {
  placement::Engine engine;
  (void)engine.add_model({"H100", h100(), 80'000});
  for (unsigned h = 0; h < gpus / 8; ++h) {
    placement::Host host;
    host.name = fmt::format("host{}", h);
    host.cpu_milli = 192'000;
    host.memory_mib = 2'000'000;
    for (unsigned g = 0; g < 8; ++g) {
      placement::Gpu gpu;
      gpu.uuid = fmt::format("GPU-{}-{}", h, g);
      gpu.pool = pool;
      gpu.numa = g / 4;
      host.gpus.push_back(std::move(gpu));
    }
    host.nvlink.assign(64, 18);
    (void)engine.add_host(std::move(host));
  }
  return engine;
}

struct Times {
  std::vector<double> ns = {};
  double at(double part) {
    const auto nth = static_cast<std::ptrdiff_t>(part * static_cast<double>(ns.size() - 1));
    std::nth_element(ns.begin(), ns.begin() + nth, ns.end());
    return ns[static_cast<std::size_t>(nth)];
  }
  double rate() const {
    double sum = 0;
    for (const double each : ns) sum += each;
    return 1e9 * static_cast<double>(ns.size()) / sum;
  }
};
template <class Work>
auto timed(Times& times, const Work& work) {
  const auto start = monotonic_ns();
  auto out = work();
  times.ns.push_back(static_cast<double>(monotonic_ns() - start));
  return out;
}

bool good = true;
void expect(bool fine, const char* what) {
  if (fine) return;
  std::printf("MISSED: %s\n", what);
  good = false;
}

void report(const char* what, unsigned gpus, Times& front, Times& change, Times& bare) {
  std::printf(
      "%-6s %6u GPUs: find %9.0f/s (p50 %7.2f us, p99 %7.2f us); commit and release p50 %5.2f us; bare index "
      "%9.0f/s "
      "(p50 %7.2f us); front over index %.2f at p50\n",
      what, gpus, front.rate(), front.at(0.5) / 1e3, front.at(0.99) / 1e3, change.at(0.5) / 1e3, bare.rate(),
      bare.at(0.5) / 1e3, front.at(0.5) / bare.at(0.5));
}

void mig_jobs(unsigned gpus, unsigned rounds) {
  auto engine = fleet(gpus, placement::Pool::dynamic);
  const auto tables = grid::Tables::make(h100());
  grid::Fleet bare;
  const auto model = bare.add_model(*tables).value();
  const auto cls = bare.add_class(model).value();
  for (unsigned g = 0; g < gpus; ++g) (void)bare.add_gpu(cls);
  Prng prng(1);
  std::vector<std::pair<placement::PlacementId, grid::Choice>> live;
  Times front, change, index;
  const std::vector<std::string> names = {"1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb"};
  placement::Request request;
  request.tenant = "tenant";
  unsigned refused = 0;
  const auto arrive = [&](bool measure) {
    const auto profile = static_cast<unsigned>(prng.below(names.size()));
    request.profile = names[profile];
    Times scrap;
    const auto choice = timed(measure ? front : scrap, [&] { return engine.find(request); });
    const auto peer = timed(measure ? index : scrap, [&] { return bare.choose({model, profile}); });
    if (choice.has_value() != peer.has_value()) expect(false, "the front and the bare index agree");
    if (!choice || !peer) {
      ++refused;
      return false;
    }
    expect(choice->parts[0].start == peer->start && choice->parts[0].growth == peer->growth,
           "the same choice");
    const auto id = timed(measure ? change : scrap, [&] { return engine.commit(request, *choice); });
    (void)bare.place(*peer);
    live.emplace_back(*id, *peer);
    return true;
  };
  while (bare.used_units(model) * 20 < bare.total_units(model) * 17 && arrive(false)) {
  }
  for (unsigned r = 0; r < rounds; ++r) {
    std::swap(live[prng.below(live.size())], live.back());
    (void)timed(change, [&] { return engine.release(live.back().first).ok(); });
    (void)bare.remove(live.back().second.gpu, live.back().second.profile, live.back().second.start);
    live.pop_back();
    arrive(true);
  }
  report("mig", gpus, front, change, index);
  expect(front.at(0.5) < 5000, "a decision for MIG through the front within 5 us at the median");
}

void share_jobs(unsigned gpus, unsigned rounds) {
  auto engine = fleet(gpus, placement::Pool::share);
  fraction::Fleet bare;
  for (unsigned h = 0; h < gpus / 8; ++h) {
    fraction::Node node;
    node.cpu_milli = 192'000;
    node.memory_mib = 2'000'000;
    node.gpus = 8;
    node.gpu_memory_mib = 80'000;
    for (unsigned g = 0; g < 8; ++g) node.numa[g] = static_cast<std::uint8_t>(g / 4);
    (void)bare.add_node(node);
  }
  fraction::Mix mix;
  for (const int milli : {100, 200, 300, 500, 700}) {
    fraction::Typical typical;
    typical.task.num_gpu = 1;
    typical.task.gpu_milli = milli;
    typical.task.cpu_milli = milli * 10;
    typical.weight = 1;
    mix.push_back(typical);
  }
  (void)bare.set_mix(mix);
  (void)engine.expect(mix);
  Prng prng(2);
  placement::Request request;
  request.tenant = "tenant";
  request.cls = placement::Class::share;
  const auto draw = [&] {
    request.milli = mix[prng.below(mix.size())].task.gpu_milli;
    request.cpu_milli = request.milli * 10;
    request.memory_mib = request.milli * 60;
    fraction::Task task;
    task.num_gpu = 1;
    task.gpu_milli = request.milli;
    task.cpu_milli = request.cpu_milli;
    task.gpu_memory_mib = request.memory_mib;
    return task;
  };
  struct Job {
    placement::PlacementId id;
    fraction::Task task;
    fraction::Choice choice;
  };
  std::vector<Job> live;
  const auto enter = [&](const fraction::Task& task, const fraction::Choice& where) {
    placement::Part part;
    part.gpu =
        static_cast<placement::GpuNo>(where.node * 8 + static_cast<unsigned>(std::countr_zero(where.gpus)));
    part.host = where.node;
    part.milli = request.milli;
    part.memory_mib = request.memory_mib;
    placement::Placement it;
    it.request = request;
    it.parts = {part};
    const auto id = engine.adopt(it);
    const bool placed = bare.place(task, where);
    expect(id.ok() == placed, "the front and the bare index agree about room");
    if (placed && id.ok()) live.push_back({*id, task, where});
  };
  // Filled without asking for the best place: only the state counts here.
  for (unsigned g = 0; g < gpus; ++g) {
    for (unsigned k = 0; k < 2; ++k) {
      const auto task = draw();
      const fraction::Choice where{g / 8, 1U << (g % 8)};
      const auto free = bare.free(where.node);
      if (free.gpu_milli[g % 8] >= task.gpu_milli && free.gpu_memory_mib[g % 8] >= task.gpu_memory_mib)
        enter(task, where);
    }
  }
  Times front, change, index;
  for (unsigned r = 0; r < rounds; ++r) {
    std::swap(live[prng.below(live.size())], live.back());
    (void)timed(change, [&] { return engine.release(live.back().id).ok(); });
    (void)bare.remove(live.back().task, live.back().choice);
    live.pop_back();
    const auto task = draw();
    const auto choice = timed(front, [&] { return engine.find(request); });
    const auto peer = timed(index, [&] { return bare.choose(task); });
    expect(choice.has_value() == peer.has_value(), "the front and the bare index agree");
    if (!choice || !peer) continue;
    expect(choice->parts[0].gpu == peer->node * 8 + static_cast<unsigned>(std::countr_zero(peer->gpus)),
           "the same choice");
    const auto id = timed(change, [&] { return engine.commit(request, *choice); });
    (void)bare.place(task, *peer);
    live.push_back({*id, task, *peer});
  }
  report("share", gpus, front, change, index);
}

void whole_sets(unsigned hosts, unsigned rounds) {
  auto engine = fleet(hosts * 8, placement::Pool::exclusive);
  placement::Shape shape{8, std::vector<std::uint8_t>(64, 18), {0, 0, 0, 0, 1, 1, 1, 1}, 0};
  const placement::SetTable table(shape);
  std::vector<std::uint32_t> masks(hosts, 0xff);
  Prng prng(3);
  placement::Request request;
  request.tenant = "tenant";
  request.cls = placement::Class::exclusive;
  request.topology = placement::Topology::same_node;
  struct Job {
    placement::PlacementId id;
    unsigned host;
    std::uint32_t set;
  };
  std::vector<Job> live;
  Times front, change, scan;
  const auto arrive = [&](bool measure) {
    request.count = 1U << prng.below(4);
    Times scrap;
    const auto choice = timed(measure ? front : scrap, [&] { return engine.find(request); });
    const auto peer = timed(measure ? scan : scrap, [&] {
      unsigned best = hosts;
      std::uint64_t key = ~std::uint64_t{0};
      for (unsigned h = 0; h < hosts; ++h) {
        const auto& its = table.best(masks[h], request.count);
        if (its.gpus == 0 || its.key >= key) continue;
        key = its.key;
        best = h;
      }
      return best;
    });
    expect(choice.has_value() == (peer < hosts), "the front and a scan agree");
    if (!choice || peer >= hosts) return false;
    const std::uint32_t set = table.best(masks[peer], request.count).gpus;
    expect(choice->parts[0].host == peer &&
               choice->parts[0].gpu % 8 == static_cast<unsigned>(std::countr_zero(set)),
           "the same choice");
    const auto id = timed(measure ? change : scrap, [&] { return engine.commit(request, *choice); });
    masks[peer] &= ~set;
    live.push_back({*id, peer, set});
    return true;
  };
  while (live.size() < hosts * 2 && arrive(false)) {
  }
  for (unsigned r = 0; r < rounds; ++r) {
    std::swap(live[prng.below(live.size())], live.back());
    (void)timed(change, [&] { return engine.release(live.back().id).ok(); });
    masks[live.back().host] |= live.back().set;
    live.pop_back();
    arrive(true);
  }
  std::printf(
      "sets   %6u hosts: find %9.0f/s (p50 %7.2f us, p99 %7.2f us); commit and release p50 %5.2f us; scan of "
      "all hosts "
      "p50 %.2f us, %.1f times the front\n",
      hosts, front.rate(), front.at(0.5) / 1e3, front.at(0.99) / 1e3, change.at(0.5) / 1e3,
      scan.at(0.5) / 1e3, scan.at(0.5) / front.at(0.5));
}

void refusals(unsigned gpus) {
  auto engine = fleet(gpus, placement::Pool::dynamic);
  placement::Request fill;
  fill.tenant = "tenant";
  fill.profile = "2g.20gb";
  fill.movable = true;
  Prng prng(4);
  while (const auto choice = engine.find(fill)) {
    fill.movable = prng.below(2) == 0;
    fill.ends = static_cast<std::int64_t>(prng.below(100'000));
    (void)engine.commit(fill, *choice);
  }
  placement::Request request;
  request.tenant = "other";
  request.profile = "3g.40gb";
  Times no, counted, ways, floor;
  std::size_t found = 0;
  for (unsigned r = 0; r < 20; ++r) {
    expect(!timed(no, [&] { return engine.find(request); }).has_value(), "the fleet is full");
    (void)timed(counted, [&] {
      placement::Effort effort;
      effort.ways = false;
      return engine.explain(request, effort);
    });
    found = timed(ways, [&] { return engine.explain(request); }).ways.size();
    (void)timed(floor, [&] {
      std::uint64_t sum = 0;
      for (placement::GpuNo g = 0; g < engine.gpu_count(); ++g) sum += engine.free_on(g).units;
      return sum;
    });
  }
  std::printf(
      "refuse %6u GPUs: \"no\" p50 %.2f us; with reasons %.0f us; with %zu ways to yes %.0f us; one look at "
      "every GPU %.0f us, "
      "reasons %.1f and ways %.1f of it\n",
      gpus, no.at(0.5) / 1e3, counted.at(0.5) / 1e3, found, ways.at(0.5) / 1e3, floor.at(0.5) / 1e3,
      counted.at(0.5) / floor.at(0.5), ways.at(0.5) / floor.at(0.5));
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned rounds = argc > 1 ? static_cast<unsigned>(std::strtoul(argv[1], nullptr, 10)) : 20'000;
  for (const unsigned gpus : {10'000U, 100'000U}) mig_jobs(gpus, rounds);
  for (const unsigned gpus : {10'000U, 100'000U}) share_jobs(gpus, rounds);
  whole_sets(1000, rounds);
  for (const unsigned gpus : {10'000U, 100'000U}) refusals(gpus);
  return good ? 0 : 1;
}
