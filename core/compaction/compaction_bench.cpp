// How good the planner of moves is and what it costs. Peer: CBC, an integer programming solver, on a program of its
// own: a variable for each instance that stays and for each place that something could move to, memory slice by memory
// slice; no instance sets, no columns, nothing taken from the planner. Without cbc (Debian: coinor-cbc) only the times
// are shown, and the planner's own bounds.
//   bench_compaction [seeds]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include <unistd.h>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/prng.hpp"
#include "core/compaction/compaction.hpp"
#include "core/models/models.hpp"

namespace {

using namespace bulkhead;
using namespace bulkhead::compaction;

struct Shape {
  const char* name;
  double load, unmovable;
  std::uint64_t prices;
};
// Jobs of mixed sizes come at random and go: each is placed on the first GPU that has room until `load` of the slices
// is in use, then half leave and come again, four times over. What first-fit and time leave behind.
Fleet churned(Prng& random, const mig::Geometry& geometry, const std::shared_ptr<const grid::Tables>& tables,
              std::size_t gpus, const Shape& shape) {
  std::vector<grid::SetId> sets(gpus, 0);
  std::vector<std::pair<std::size_t, unsigned>> there;  // (gpu, place)
  double used = 0;
  const double all = 8.0 * static_cast<double>(gpus);
  std::vector<std::size_t> first(tables->profile_count(), 0);  // GPUs before have no room for the profile
  for (int wave = 0; wave < 4; ++wave) {
    for (unsigned failed = 0; used < shape.load * all && failed < 50;) {
      const auto p = static_cast<unsigned>(random.below(tables->profile_count()));
      bool placed = false;
      for (std::size_t g = first[p]; g < gpus && !placed; ++g) {
        for (const auto& place : tables->places_of(p)) {
          const auto index = *tables->place_of(p, place.start);
          const auto next = tables->next(sets[g], index);
          if (next == grid::no_set) continue;
          sets[g] = next;
          there.emplace_back(g, index);
          used += place.size;
          placed = true;
          break;
        }
        if (!placed && first[p] == g) ++first[p];
      }
      if (!placed) ++failed;
    }
    std::vector<std::pair<std::size_t, unsigned>> stay;
    for (const auto& [g, place] : there) {
      if (random.below(2) == 0) {
        stay.emplace_back(g, place);
      } else {
        sets[g] = tables->without(sets[g], place);
        used -= tables->places()[place].size;
      }
    }
    there = std::move(stay);
    std::fill(first.begin(), first.end(), 0);
  }
  Fleet fleet;
  fleet.pools = {geometry};
  fleet.tables = {tables};
  fleet.gpus.resize(gpus);
  std::uint64_t id = 1;
  for (const auto& [g, place] : there) {
    const auto& p = tables->places()[place];
    fleet.gpus[g].instances.push_back({id++, geometry.profiles[p.profile].id, p.start, random.unit() >= shape.unmovable,
                                       1 + random.below(shape.prices), true});
  }
  return fleet;
}

// ---- the peer
struct CbcAnswer {
  bool optimal = false;
  double value = 0, bound = 0;
};
class Cbc {
 public:
  Cbc() {
    char name[] = "/tmp/bulkhead-cbc-XXXXXX";
    if (mkdtemp(name) != nullptr) folder_ = name;
    there_ = !folder_.empty() && std::system("command -v cbc >/dev/null 2>&1") == 0;
  }
  ~Cbc() {
    if (folder_.empty()) return;
    for (const char* file : {"/m.lp", "/out", "/log"}) std::remove((folder_ + file).c_str());
    rmdir(folder_.c_str());
  }
  bool there() const { return there_; }
  CbcAnswer solve(const std::string& lp, unsigned seconds) const {
    std::ofstream(folder_ + "/m.lp") << lp;
    const auto command =
        fmt::format("cbc {0}/m.lp sec {1} ratio 0 allow 0 solve solu {0}/out >{0}/log 2>&1", folder_, seconds);
    CbcAnswer answer;
    if (std::system(command.c_str()) != 0) return answer;
    std::ifstream out(folder_ + "/out");
    std::string line;
    std::getline(out, line);
    answer.optimal = line.starts_with("Optimal");
    if (const auto at = line.find("objective value"); at != std::string::npos)
      answer.value = std::strtod(line.c_str() + at + 15, nullptr);
    answer.bound = answer.optimal ? answer.value : 0;
    std::ifstream log(folder_ + "/log");
    while (std::getline(log, line)) {
      if (line.starts_with("Lower bound:")) answer.bound = std::strtod(line.c_str() + 12, nullptr);
    }
    return answer;
  }

 private:
  std::string folder_;
  bool there_ = false;
};

long held(const Fleet& fleet) {
  return std::count_if(fleet.gpus.begin(), fleet.gpus.end(), [](const Gpu& gpu) {
    return std::any_of(gpu.instances.begin(), gpu.instances.end(), [](const Instance& i) { return !i.movable; });
  });
}
// The fewest GPUs (most_used < 0), or the least sum of (price + 1) with at most so many; those that an unmovable
// instance holds are not counted. (A row of one variable would be read as a bound, which "Binaries" then forgets.)
std::string program(const Fleet& fleet, long most_used) {
  const auto& geometry = fleet.pools[0];
  std::ostringstream objective, rows, names;
  std::map<unsigned, std::string> balance;  // per profile: arrivals - departures
  std::map<unsigned, long> leaving;
  std::string used;
  for (std::size_t g = 0; g < fleet.gpus.size(); ++g) {
    std::vector<std::string> slice(geometry.memory_slices);
    std::vector<bool> fixed(geometry.memory_slices, false);
    std::string compute;
    unsigned fixed_compute = 0;
    std::map<unsigned, std::string> of_profile;
    std::map<unsigned, unsigned> fixed_of;
    const auto covers = [&](const mig::Profile& p, unsigned start, const std::string& name) {
      for (unsigned s = start; s < start + p.size; ++s) slice[s] += " + " + name;
      compute += fmt::format(" + {} {}", p.compute_slices, name);
      of_profile[p.id] += " + " + name;
    };
    bool holds = false;
    for (const auto& i : fleet.gpus[g].instances) {
      const auto& p = *geometry.by_id(i.profile);
      if (!i.movable) {
        for (unsigned s = i.start; s < i.start + p.size; ++s) fixed[s] = true;
        fixed_compute += p.compute_slices;
        ++fixed_of[p.id];
        holds = true;
        continue;
      }
      const auto name = fmt::format("k{}", i.id);
      names << " " << name << "\n";
      covers(p, i.start, name);
      // Leaving costs: price + 1 less what staying saves.
      if (most_used >= 0) objective << fmt::format(" - {} {}", i.price + 1, name);
      balance[p.id] += " + " + name;
      ++leaving[p.id];
    }
    for (const auto& p : geometry.profiles) {
      for (const auto start : p.starts) {
        const auto name = fmt::format("n{}_{}_{}", g, p.id, start);
        names << " " << name << "\n";
        covers(p, start, name);
        balance[p.id] += " + " + name;
      }
    }
    const auto u = fmt::format("u{}", g);
    if (!holds) {
      names << " " << u << "\n";
      used += " + " + u;
      if (most_used < 0) objective << " + " << u;
    }
    for (unsigned s = 0; s < slice.size(); ++s) {
      if (!slice[s].empty())
        rows << (holds ? fmt::format("{} <= {}\n", slice[s], fixed[s] ? 0 : 1)
                       : fmt::format("{} - {} <= 0\n", slice[s], u));
    }
    rows << fmt::format("{} <= {}\n", compute, 7 - fixed_compute);
    for (const auto& [id, terms] : of_profile)
      rows << fmt::format("{} <= {}\n", terms, geometry.by_id(id)->max_instances - fixed_of[id]);
  }
  for (const auto& [id, terms] : balance) rows << fmt::format("{} >= {}\n", terms, leaving[id]);
  if (most_used >= 0 && !used.empty()) rows << used << " <= " << most_used << "\n";
  std::string body;
  std::istringstream lines(rows.str());
  unsigned n = 0;
  for (std::string line; std::getline(lines, line);) body += fmt::format("r{}:{}\n", n++, line);
  auto terms = objective.str();
  if (terms.empty()) terms = " 0 n0_0_0";
  return fmt::format("Minimize\nobj:{}\nSubject To\n{}Binaries\n{}End\n", terms, body, names.str());
}

double percentile(std::vector<double> values, double p) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, static_cast<std::size_t>(p * static_cast<double>(values.size())))];
}
// What the plan pays, detours and all.
double paid(const Plan& plan) { return static_cast<double>(plan.moves.price + plan.moves.list.size()); }

}  // namespace

int main(int argc, char** argv) {
  const unsigned seeds = argc > 1 ? static_cast<unsigned>(std::strtoul(argv[1], nullptr, 10)) : 10;
  auto geometry = models::geometry(*models::find("h100-80gb"));
  std::erase_if(geometry.profiles, [](const mig::Profile& p) { return p.name.find('+') != std::string::npos; });
  const auto start = monotonic_ns();
  auto made = grid::Tables::make(geometry);
  if (!made) return 1;
  const auto tables = std::make_shared<const grid::Tables>(std::move(*made));
  std::printf("tables of one model: %.1f ms, once\n", static_cast<double>(monotonic_ns() - start) / 1e6);
  const Cbc cbc;
  bool good = true;

  const Shape shapes[] = {{"every move costs the same", 0.9, 0, 1},
                          {"prices 1 to 1000", 0.9, 0, 1000},
                          {"every fifth may not move", 0.9, 0.2, 1000}};
  if (!cbc.there()) std::printf("cbc is not installed (apt-get install coinor-cbc): no comparison with a solver\n");
  for (const std::size_t gpus : {std::size_t{4}, std::size_t{8}, std::size_t{12}}) {
    if (!cbc.there()) break;
    for (const auto& shape : shapes) {
      unsigned same_count = 0, counted = 0, timed_out = 0;
      std::vector<double> ratios;
      double saved = 0, ours = 0, peer = 0;
      for (unsigned seed = 0; seed < seeds; ++seed) {
        Prng random(1000 * gpus + seed);
        const auto fleet = churned(random, geometry, tables, gpus, shape);
        auto at = monotonic_ns();
        const auto plan = compact(fleet);
        ours += static_cast<double>(monotonic_ns() - at) / 1e6;
        if (!plan || !play(fleet, plan->moves.list)) return 1;
        at = monotonic_ns();
        const auto least = cbc.solve(program(fleet, -1), 60);
        if (!least.optimal) {
          ++timed_out;
          continue;
        }
        ++counted;
        if (static_cast<long>(plan->after) == std::lround(least.value) + held(fleet)) ++same_count;
        saved += static_cast<double>(plan->before - plan->after);
        const auto cheapest = cbc.solve(program(fleet, std::lround(least.value)), 60);
        peer += static_cast<double>(monotonic_ns() - at) / 1e6;
        if (!cheapest.optimal) {
          ++timed_out;
          continue;
        }
        double movable = 0;
        for (const auto& gpu : fleet.gpus) {
          for (const auto& i : gpu.instances) movable += i.movable ? static_cast<double>(i.price + 1) : 0;
        }
        const double least_paid = std::round(movable + cheapest.value);
        ratios.push_back(least_paid > 0 ? paid(*plan) / least_paid : paid(*plan) > 0 ? 99 : 1);
      }
      std::printf(
          "%2zu GPUs, %-25s: GPU count equals CBC's in %u of %u (%.1f GPUs freed each), moves against the minimum "
          "median "
          "%.3f worst %.3f of %zu (wanted 1.1); %.2f ms, CBC %.0f ms%s\n",
          gpus, shape.name, same_count, counted, saved / std::max(1U, counted), percentile(ratios, 0.5),
          percentile(ratios, 1), ratios.size(), ours / seeds, peer / std::max(1U, counted),
          timed_out > 0 ? fmt::format(", {} not solved by CBC in 60 s", timed_out).c_str() : "");
      std::fflush(stdout);
      good = good && same_count == counted && percentile(ratios, 1) <= 1.1;
    }
  }
  for (const std::size_t gpus : {std::size_t{12}, std::size_t{100}, std::size_t{1000}, std::size_t{10000}}) {
    const unsigned rounds = gpus == 10000 ? 3 : 5;
    for (const auto& shape : shapes) {
      std::vector<double> all, budget, what, gaps, over;
      unsigned unproven = 0;
      double freed = 0, moves = 0;
      for (unsigned seed = 0; seed < rounds; ++seed) {
        Prng random(77 * gpus + seed);
        const auto fleet = churned(random, geometry, tables, gpus, shape);
        auto at = monotonic_ns();
        const auto plan = compact(fleet);
        all.push_back(static_cast<double>(monotonic_ns() - at) / 1e6);
        if (!plan || !play(fleet, plan->moves.list)) return 1;
        freed += static_cast<double>(plan->before - plan->after) / rounds;
        moves += static_cast<double>(plan->moves.list.size()) / rounds;
        gaps.push_back(static_cast<double>(plan->after) - static_cast<double>(plan->fewest));
        over.push_back(plan->cheapest > 0 ? paid(*plan) / static_cast<double>(plan->cheapest) : 1);
        unproven += plan->proven ? 0 : 1;
        at = monotonic_ns();
        const auto few = compact(fleet, {.moves = gpus / 10});
        budget.push_back(static_cast<double>(monotonic_ns() - at) / 1e6);
        if (!few || few->moves.list.size() > gpus / 10) return 1;
        at = monotonic_ns();
        const std::vector<Wanted> wanted = {{"3g.40gb", std::max<std::uint64_t>(12, gpus / 4), {}}};
        const auto answer = what_if(fleet, wanted);
        what.push_back(static_cast<double>(monotonic_ns() - at) / 1e6);
        if (!answer) return 1;
      }
      std::printf(
          "%5zu GPUs, %-25s: %.0f freed by %.0f moves, GPUs above the proven bound %.0f, paid over the proven bound "
          "median %.4f worst %.4f; compact %.1f ms (worst %.1f), at most %zu moves %.1f ms (%.1f), what-if %.1f ms "
          "(%.1f)\n",
          gpus, shape.name, freed, moves, percentile(gaps, 1), percentile(over, 0.5), percentile(over, 1),
          percentile(all, 0.5), percentile(all, 1), gpus / 10, percentile(budget, 0.5), percentile(budget, 1),
          percentile(what, 0.5), percentile(what, 1));
      std::fflush(stdout);
      // GPUs of equal content are one to the planner; where every instance has a price of its own, no two are equal.
      if (gpus == 10000)
        good = good && (shape.prices > 1 || percentile(all, 0.5) < 1000) && percentile(what, 0.5) < 1000;
    }
  }
  return good ? 0 : 1;
}
