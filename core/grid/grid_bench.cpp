// What a decision costs, at 10,000 and at 100,000 GPUs, beside a scan of every GPU in the same run: jobs
// arrive at random on H100s, hold an instance for a random time and leave. Then repair, and a million events
// from first to last.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <queue>
#include <string>
#include <tuple>
#include <vector>

#include "base/clock.hpp"
#include "base/prng.hpp"
#include "core/grid/grid.hpp"
#include "core/mig/models_for_tests.hpp"

namespace {

using namespace bulkhead;

struct Percentiles {
  std::vector<std::uint32_t> ns = {};
  void add(std::uint64_t from) { ns.push_back(static_cast<std::uint32_t>(monotonic_ns() - from)); }
  double at(double part) {
    if (ns.empty()) return 0;
    const auto nth = static_cast<std::size_t>(part * static_cast<double>(ns.size() - 1));
    std::nth_element(ns.begin(), ns.begin() + static_cast<std::ptrdiff_t>(nth), ns.end());
    return ns[nth];
  }
  double mean() const {
    double sum = 0;
    for (const auto n : ns) sum += n;
    return ns.empty() ? 0 : sum / static_cast<double>(ns.size());
  }
};

// Jobs of all profiles alike (1g+me: none), so many that they ask for `load` of the memory units.
class Churn {
 public:
  Churn(const grid::Tables& tables, unsigned gpus, unsigned classes, double load, std::uint64_t seed)
      : tables_(tables), random_(seed) {
    model_ = fleet.add_model(tables).value();
    std::vector<grid::ClassId> ids;
    for (unsigned i = 0; i < classes; ++i) ids.push_back(fleet.add_class(model_).value());
    fleet.reserve(gpus);
    for (unsigned i = 0; i < gpus; ++i) (void)fleet.add_gpu(ids[i % classes]);
    owner_.resize(std::size_t{gpus} * tables.units());
    double mean_size = 0;
    for (const unsigned p : asked_) mean_size += tables.size(p) / static_cast<double>(asked_.size());
    gap_ = mean_size / (load * gpus * tables.units());
  }

  // One arrival, and the departures before it.
  template <class Timed>
  void step(const Timed& timed) {
    now_ += random_.exponential(gap_);
    while (!leaving_.empty() && leaving_.top().first <= now_) {
      const auto job = leaving_.top().second;
      leaving_.pop();
      const grid::Instance gone = jobs_[job];
      timed.leave(fleet, gone);
      free_jobs_.push_back(job);
      ++events;
    }
    const unsigned profile = asked_[random_.below(asked_.size())];
    const double hold = random_.exponential(1);
    ++events;
    if (const auto at = timed.arrive(*this, grid::Request{model_, profile})) {
      std::size_t job = jobs_.size();
      if (free_jobs_.empty()) {
        jobs_.emplace_back();
      } else {
        job = free_jobs_.back();
        free_jobs_.pop_back();
      }
      jobs_[job] = {at->gpu, at->profile, at->start};
      owner(at->gpu, at->start) = job;
      leaving_.emplace(now_ + hold, job);
    }
  }
  void moved(const grid::Repair& repair) {
    for (unsigned i = 0; i < repair.count; ++i) {
      const grid::Move& move = repair.moves[i];
      const std::size_t job = owner(move.from.gpu, move.from.start);
      jobs_[job] = {move.to, move.from.profile, move.start};
      owner(move.to, move.start) = job;
    }
  }

  grid::Fleet fleet;
  std::uint64_t events = 0;

 private:
  std::size_t& owner(grid::GpuId gpu, unsigned start) {
    return owner_[std::size_t{gpu} * tables_.units() + start];
  }

  const grid::Tables& tables_;
  Prng random_;
  grid::ModelId model_ = 0;
  std::vector<unsigned> asked_ = {0, 2, 3, 4, 5, 6};
  double gap_ = 1, now_ = 0;
  std::vector<grid::Instance> jobs_;
  std::vector<std::size_t> free_jobs_, owner_;
  std::priority_queue<std::pair<double, std::size_t>, std::vector<std::pair<double, std::size_t>>,
                      std::greater<>>
      leaving_;
};

struct Plain {
  void leave(grid::Fleet& fleet, const grid::Instance& gone) const {
    fleet.remove(gone.gpu, gone.profile, gone.start);
  }
  std::optional<grid::Choice> arrive(Churn& churn, const grid::Request& request) const {
    const auto choice = churn.fleet.choose(request);
    if (choice) churn.fleet.place(*choice);
    return choice;
  }
};
struct Timed {
  Percentiles &decide, &depart;
  void leave(grid::Fleet& fleet, const grid::Instance& gone) const {
    const auto from = monotonic_ns();
    fleet.remove(gone.gpu, gone.profile, gone.start);
    depart.add(from);
  }
  std::optional<grid::Choice> arrive(Churn& churn, const grid::Request& request) const {
    const auto from = monotonic_ns();
    const auto choice = churn.fleet.choose(request);
    if (choice) churn.fleet.place(*choice);
    decide.add(from);
    return choice;
  }
};
struct Repairing {
  Percentiles& search;
  unsigned moves;
  std::uint64_t& found;
  void leave(grid::Fleet& fleet, const grid::Instance& gone) const {
    fleet.remove(gone.gpu, gone.profile, gone.start);
  }
  std::optional<grid::Choice> arrive(Churn& churn, const grid::Request& request) const {
    if (const auto choice = churn.fleet.choose(request)) {
      churn.fleet.place(*choice);
      return choice;
    }
    const auto from = monotonic_ns();
    const auto repair = churn.fleet.repair(request, {.moves = moves});
    search.add(from);
    if (!repair) return std::nullopt;
    ++found;
    churn.fleet.apply(*repair);
    churn.moved(*repair);
    return repair->choice;
  }
};

// The same rule by looking at every GPU.
grid::GpuId scan(const grid::Fleet& fleet, const grid::Tables& tables, unsigned profile) {
  using Key = std::tuple<bool, std::int32_t, unsigned, unsigned, grid::SetId, grid::ClassId>;
  std::optional<Key> best;
  grid::GpuId found = grid::no_gpu;
  for (grid::GpuId gpu = 0; gpu < fleet.gpu_bound(); ++gpu) {
    const auto set = fleet.set_of(gpu);
    for (unsigned place = tables.first_place(profile); place < tables.first_place(profile + 1); ++place) {
      if (tables.next(set, place) == grid::no_set) continue;
      const Key key{set == 0, tables.growth(set, place), tables.free_units(set), tables.places()[place].start,
                    set,      fleet.class_of(gpu)};
      if (!best || key < *best) {
        best = key;
        found = gpu;
      }
    }
  }
  return found;
}

double clock_cost() {
  Percentiles clock;
  for (int i = 0; i < 100'000; ++i) clock.add(monotonic_ns());
  return clock.at(0.5);
}

}  // namespace

int main() {
  const auto made = grid::Tables::make(mig::h100());
  if (!made.ok()) return 1;
  const grid::Tables& tables = *made;
  bool good = true;
  std::printf("H100, 7 profiles, %zu instance sets; reading the clock costs %.0f ns, in every figure below\n",
              tables.set_count(), clock_cost());
  for (const unsigned classes : {1U, 64U}) {
    double p50[2] = {}, p99[2] = {}, leave50[2] = {}, leave99[2] = {}, scanned[2] = {};
    int column = 0;
    for (const unsigned gpus : {10'000U, 100'000U}) {
      Churn churn(tables, gpus, classes, 0.95, 1);
      for (unsigned i = 0; i < gpus * 7; ++i) churn.step(Plain{});
      Percentiles decide, depart;
      for (unsigned i = 0; i < 200'000; ++i) churn.step(Timed{decide, depart});
      p50[column] = decide.at(0.5);
      p99[column] = decide.at(0.99);
      leave50[column] = depart.at(0.5);
      leave99[column] = depart.at(0.99);
      Percentiles naive;
      std::uint64_t same = 0, asked = 0;
      for (unsigned i = 0; i < 60; ++i) {
        churn.step(Plain{});
        const unsigned profile = i % tables.profile_count();
        const auto from = monotonic_ns();
        const auto gpu = scan(churn.fleet, tables, profile);
        naive.add(from);
        const auto ours = churn.fleet.choose({0, profile});
        ++asked;
        same += (gpu == grid::no_gpu) == !ours &&
                        (!ours || (churn.fleet.set_of(gpu) == churn.fleet.set_of(ours->gpu) &&
                                   churn.fleet.class_of(gpu) == churn.fleet.class_of(ours->gpu)))
                    ? 1
                    : 0;
      }
      scanned[column] = naive.at(0.5);
      good = good && same == asked && p50[column] <= 1000 && p99[column] <= 5000;
      std::printf(
          "%6u GPUs, %2u classes: choose and place p50 %4.0f ns p99 %4.0f ns; remove p50 %4.0f ns p99 %4.0f "
          "ns; a scan of all "
          "%8.0f ns = %.0f times; %llu of %llu decisions equal\n",
          gpus, classes, p50[column], p99[column], leave50[column], leave99[column], scanned[column],
          scanned[column] / p50[column], static_cast<unsigned long long>(same),
          static_cast<unsigned long long>(asked));
      ++column;
    }
    std::printf("100,000 over 10,000 GPUs: p50 %.2f, p99 %.2f, remove p50 %.2f, scan %.1f\n", p50[1] / p50[0],
                p99[1] / p99[0], leave50[1] / leave50[0], scanned[1] / scanned[0]);
  }
  for (const unsigned gpus : {100U, 10'000U}) {
    for (const unsigned moves : {1U, 3U}) {
      Churn churn(tables, gpus, 1, gpus == 100 ? 0.95 : 1.05, 2);
      Percentiles search;
      std::uint64_t found = 0;
      const unsigned warm = gpus * 10, arrivals = gpus == 100 ? 100'000 : 60'000;
      for (unsigned i = 0; i < warm; ++i) churn.step(Plain{});
      for (unsigned i = 0; i < arrivals; ++i) churn.step(Repairing{search, moves, found});
      std::printf(
          "repair, %5u GPUs, at most %u moves: mean %6.0f ns p50 %6.0f ns p99 %7.0f ns; %llu of %zu blocked "
          "let in\n",
          gpus, moves, search.mean(), search.at(0.5), search.at(0.99), static_cast<unsigned long long>(found),
          search.ns.size());
    }
  }
  const auto from = monotonic_ns();
  Churn churn(tables, 10'000, 1, 0.95, 3);
  while (churn.events < 1'000'000) churn.step(Plain{});
  const double seconds = static_cast<double>(monotonic_ns() - from) / 1e9;
  std::printf("1,000,000 events at 10,000 GPUs: %.2f s, the queue of departures included; wanted below 5 s\n",
              seconds);
  return good && seconds < 5 ? 0 : 1;
}
