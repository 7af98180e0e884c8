#include "core/churn/churn.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <memory>
#include <optional>
#include <queue>
#include <tuple>

#include <fmt/format.h>

#include "base/prng.hpp"
#include "core/churn/fleet.hpp"
#include "core/grid/grid.hpp"

namespace bulkhead::churn {

namespace {

using Lease = std::uint32_t;

struct Place {
  std::uint32_t gpu = 0;
  std::uint16_t start = 0;
};

// A policy at work: takes a job or does not, and lets it go.
class Placer {
 public:
  Placer() = default;
  Placer(const Placer&) = delete;
  Placer& operator=(const Placer&) = delete;
  virtual ~Placer() = default;
  // False: lost. `moves` grows by what was moved for it.
  virtual bool admit(std::size_t kind, Lease lease, std::uint64_t& moves) = 0;
  virtual void release(std::size_t kind, Lease lease) = 0;
  virtual std::uint64_t undecided() const { return 0; }
};

// A set of small numbers that knows its lowest: bits, and above every 64 words a word of which are not empty.
class LowestSet {
 public:
  void insert(std::uint32_t value, std::uint32_t bound) {
    if (levels_.empty()) {
      for (std::size_t words = (bound + 63) / 64;; words = (words + 63) / 64) {
        levels_.emplace_back(words, 0);
        if (words == 1) break;
      }
    }
    for (auto& level : levels_) {
      auto& word = level[value / 64];
      const bool was_empty = word == 0;
      word |= std::uint64_t{1} << (value % 64);
      if (!was_empty) return;
      value /= 64;
    }
  }
  void erase(std::uint32_t value) {
    for (auto& level : levels_) {
      auto& word = level[value / 64];
      word &= ~(std::uint64_t{1} << (value % 64));
      if (word != 0) return;
      value /= 64;
    }
  }
  std::optional<std::uint32_t> lowest() const {
    if (levels_.empty() || levels_.back()[0] == 0) return std::nullopt;
    std::uint32_t at = 0;
    for (auto level = levels_.rbegin(); level != levels_.rend(); ++level)
      at = at * 64 + static_cast<std::uint32_t>(std::countr_zero((*level)[at]));
    return at;
  }

 private:
  std::vector<std::vector<std::uint64_t>> levels_;
};

// The baselines: each is a key for (state of a GPU, place), lowest first, ties to the lowest GPU, then the
// lowest start. GPUs of equal key for a profile are kept in one set, so that a decision does not look at
// every GPU.
class Keyed : public Placer {
 public:
  Keyed(std::span<const Pool> pools, const std::vector<Graph>& graphs, std::size_t kinds, Rule rule)
      : graphs_(graphs), best_(graphs.size()), groups_(kinds) {
    std::vector<std::vector<std::int64_t>> keys(kinds);
    for (std::size_t pool = 0; pool < graphs.size(); ++pool) {
      const auto scores = mfi_scores(graphs[pool]);
      auto& best = best_[pool];
      best.resize(graphs[pool].states.size() * kinds);
      for (std::size_t s = 0; s < graphs[pool].states.size(); ++s) {
        const State& state = graphs[pool].states[s];
        for (std::size_t k = 0; k < kinds; ++k) {
          Best& found = best[s * kinds + k];
          for (const auto& move : state.places[k]) {
            const std::int64_t key =
                rule == Rule::mfi ? std::int64_t{scores[move.to]} - std::int64_t{scores[s]}
                : rule == Rule::best_fit
                    ? std::int64_t{graphs[pool].geometry.memory_slices} - std::int64_t{state.taken}
                    : 0;
            if (!found.fits || key < found.key) found = {true, key, move, 0};
          }
          if (found.fits) keys[k].push_back(found.key);
        }
      }
    }
    for (std::size_t k = 0; k < kinds; ++k) {
      std::sort(keys[k].begin(), keys[k].end());
      keys[k].erase(std::unique(keys[k].begin(), keys[k].end()), keys[k].end());
      groups_[k].resize(keys[k].size());
      for (auto& best : best_) {
        for (std::size_t i = k; i < best.size(); i += kinds) {
          best[i].group = static_cast<std::size_t>(
              std::lower_bound(keys[k].begin(), keys[k].end(), best[i].key) - keys[k].begin());
        }
      }
    }
    for (std::size_t pool = 0; pool < pools.size(); ++pool)
      pool_of_.insert(pool_of_.end(), pools[pool].gpus, static_cast<std::uint8_t>(pool));
    state_.assign(pool_of_.size(), 0);
    for (std::uint32_t gpu = 0; gpu < state_.size(); ++gpu) list(gpu, true);
  }

  bool admit(std::size_t kind, Lease lease, std::uint64_t&) override {
    for (auto& group : groups_[kind]) {
      const auto gpu = group.lowest();
      if (!gpu) continue;
      const Best& best = best_[pool_of_[*gpu]][state_[*gpu] * groups_.size() + kind];
      if (lease >= places_.size()) places_.resize(lease + 1);
      places_[lease] = {*gpu, best.move.start};
      shift(*gpu, best.move.to);
      return true;
    }
    return false;
  }
  void release(std::size_t kind, Lease lease) override {
    const auto [gpu, start] = places_[lease];
    const State& state = graphs_[pool_of_[gpu]].states[state_[gpu]];
    const Instance gone{static_cast<std::uint16_t>(kind), start};
    const auto at =
        std::lower_bound(state.instances.begin(), state.instances.end(), gone) - state.instances.begin();
    shift(gpu, state.without[static_cast<std::size_t>(at)]);
  }

 private:
  struct Best {
    bool fits = false;
    std::int64_t key = 0;
    Move move = {};
    std::size_t group = 0;
  };
  void list(std::uint32_t gpu, bool in) {
    const Best* best = &best_[pool_of_[gpu]][state_[gpu] * groups_.size()];
    for (std::size_t k = 0; k < groups_.size(); ++k) {
      if (!best[k].fits) continue;
      if (in)
        groups_[k][best[k].group].insert(gpu, static_cast<std::uint32_t>(state_.size()));
      else
        groups_[k][best[k].group].erase(gpu);
    }
  }
  void shift(std::uint32_t gpu, std::uint32_t to) {
    list(gpu, false);
    state_[gpu] = to;
    list(gpu, true);
  }

  const std::vector<Graph>& graphs_;
  std::vector<std::vector<Best>> best_;         // by pool, then state and kind
  std::vector<std::vector<LowestSet>> groups_;  // by kind, then rising key
  std::vector<std::uint8_t> pool_of_;
  std::vector<std::uint32_t> state_;
  std::vector<Place> places_;
};

// core/grid at work, one model a pool.
class Ours : public Placer {
 public:
  static Result<std::unique_ptr<Placer>> make(std::span<const Pool> pools, const Jobs& jobs,
                                              const Policy& policy) {
    auto made = std::make_unique<Ours>();
    made->moves_ = policy.moves;
    made->budget_ = policy.moves_per_100;
    made->offers_.resize(jobs.profiles.size());
    made->tables_.reserve(pools.size());  // the fleet borrows them
    std::size_t gpus = 0;
    for (std::size_t pool = 0; pool < pools.size(); ++pool) {
      auto tables = grid::Tables::make(pools[pool].geometry);
      if (!tables) return std::move(tables).error().in(fmt::format("pool {}", pool));
      made->tables_.push_back(std::move(*tables));
      made->units_ = std::max(made->units_, pools[pool].geometry.memory_slices);
      gpus += pools[pool].gpus;
    }
    made->fleet_.reserve(gpus);
    for (std::size_t pool = 0; pool < pools.size(); ++pool) {
      const auto& geometry = made->tables_[pool].geometry();
      BH_TRY(const auto model, made->fleet_.add_model(made->tables_[pool]));
      BH_TRY(const auto cls, made->fleet_.add_class(model));
      for (unsigned i = 0; i < pools[pool].gpus; ++i) BH_CHECK(made->fleet_.add_gpu(cls));
      for (std::size_t k = 0; k < jobs.profiles.size(); ++k) {
        if (const auto* profile = geometry.by_name(jobs.profiles[k]);
            profile != nullptr && pools[pool].gpus != 0)
          made->offers_[k].push_back({model, static_cast<unsigned>(profile - geometry.profiles.data())});
      }
    }
    made->lease_at_.assign(gpus * made->units_, 0);
    return std::unique_ptr<Placer>(std::move(made));
  }

  bool admit(std::size_t kind, Lease lease, std::uint64_t& moves) override {
    if (lease >= places_.size()) places_.resize(lease + 1);
    std::optional<grid::Choice> best;
    std::tuple<bool, std::int32_t, unsigned> best_key;
    for (const auto& offer : offers_[kind]) {
      const auto choice = fleet_.choose({.model = offer.model, .profile = offer.profile});
      if (!choice) continue;
      if (offers_[kind].size() == 1) {
        best = choice;
        break;
      }
      const auto set = fleet_.set_of(choice->gpu);
      const std::tuple key{set == 0, choice->growth, fleet_.tables(offer.model).free_units(set)};
      if (!best || key < best_key) best = choice, best_key = key;
    }
    if (best) {
      fleet_.place(*best);
      settle(lease, *best);
      earn();
      return true;
    }
    std::optional<grid::Repair> repair;
    for (const auto& offer : offers_[kind]) {
      const unsigned most = affordable(offer);
      if (most == 0) continue;
      const auto found =
          fleet_.repair({.model = offer.model, .profile = offer.profile}, grid::RepairRules{.moves = most});
      if (!found) continue;
      const auto key = [](const grid::Repair& each) {
        return std::tuple(each.count, each.price, each.growth);
      };
      if (!repair || key(*found) < key(*repair)) repair = found;
    }
    if (!repair || !fleet_.apply(*repair)) return false;
    // Every destination is free when its turn comes, so leases can follow one move after the other.
    for (unsigned i = 0; i < repair->count; ++i) {
      const auto& move = repair->moves[i];
      const Lease moved = lease_at_[cell(move.from.gpu, move.from.start)];
      places_[moved].gpu = move.to;
      places_[moved].start = static_cast<std::uint16_t>(move.start);
      lease_at_[cell(move.to, move.start)] = moved;
    }
    moves += repair->count;
    if (budget_ > 0) purse_ -= repair->count;
    earn();
    settle(lease, repair->choice);
    return true;
  }
  void release(std::size_t, Lease lease) override {
    const auto& at = places_[lease];
    fleet_.remove(at.gpu, at.profile, at.start);
  }

 private:
  struct Offer {
    grid::ModelId model = 0;
    unsigned profile = 0;
  };
  struct Held {
    std::uint32_t gpu = 0;
    std::uint16_t start = 0, profile = 0;
  };
  static constexpr double purse_fills = 20;  // times the budget
  void earn() { purse_ = std::min(purse_ + budget_ / 100, purse_fills * budget_); }
  unsigned affordable(const Offer& offer) const {
    if (budget_ <= 0) return moves_;
    const double full = purse_ / (purse_fills * budget_);
    const double most = std::min(purse_, full * fleet_.tables(offer.model).size(offer.profile));
    return std::min(moves_, static_cast<unsigned>(most));
  }
  std::size_t cell(std::uint32_t gpu, unsigned start) const { return std::size_t{gpu} * units_ + start; }
  void settle(Lease lease, const grid::Choice& choice) {
    places_[lease] = {choice.gpu, static_cast<std::uint16_t>(choice.start),
                      static_cast<std::uint16_t>(choice.profile)};
    lease_at_[cell(choice.gpu, choice.start)] = lease;
  }

  unsigned moves_ = 0, units_ = 0;
  double budget_ = 0, purse_ = 0;
  std::vector<grid::Tables> tables_;
  grid::Fleet fleet_;
  std::vector<std::vector<Offer>> offers_;  // by kind
  std::vector<Held> places_;                // by lease
  std::vector<Lease> lease_at_;             // by GPU and start
};

// No places at all: how many of each profile are held, and whether one more could be.
class Repack : public Placer {
 public:
  static Result<std::unique_ptr<Placer>> make(std::span<const Pool> pools, const Jobs& jobs) {
    auto made = std::make_unique<Repack>();
    made->tables_.reserve(pools.size());
    made->homes_.assign(jobs.profiles.size(), {pools.size(), 0});
    for (std::size_t pool = 0; pool < pools.size(); ++pool) {
      auto tables = grid::Tables::make(pools[pool].geometry);
      if (!tables) return std::move(tables).error().in(fmt::format("pool {}", pool));
      made->tables_.push_back(std::move(*tables));
      made->gpus_.push_back({0, pools[pool].gpus});
      made->held_.emplace_back(pools[pool].geometry.profiles.size(), 0);
      const auto& geometry = made->tables_.back().geometry();
      for (std::size_t k = 0; k < jobs.profiles.size(); ++k) {
        const auto* profile = geometry.by_name(jobs.profiles[k]);
        if (profile == nullptr || pools[pool].gpus == 0) continue;
        if (made->homes_[k].first != pools.size()) {
          return Error(Errc::unsupported,
                       fmt::format("free repacking of a fleet where pools {} and {} both offer {}",
                                   made->homes_[k].first, pool, jobs.profiles[k]),
                       "simulate the pools apart");
        }
        made->homes_[k] = {pool, static_cast<std::size_t>(profile - geometry.profiles.data())};
      }
    }
    return std::unique_ptr<Placer>(std::move(made));
  }
  bool admit(std::size_t kind, Lease, std::uint64_t&) override {
    const auto [pool, profile] = homes_[kind];
    ++held_[pool][profile];
    const auto verdict = grid::can_hold(tables_[pool], {&gpus_[pool], 1}, held_[pool]);
    if (verdict == grid::Verdict::undecided) ++undecided_;  // for a bound, the high side is the safe one
    if (verdict != grid::Verdict::no) return true;
    --held_[pool][profile];
    return false;
  }
  void release(std::size_t kind, Lease) override { --held_[homes_[kind].first][homes_[kind].second]; }
  std::uint64_t undecided() const override { return undecided_; }

 private:
  std::vector<grid::Tables> tables_;
  std::vector<grid::Group> gpus_;
  std::vector<std::vector<std::uint64_t>> held_;            // by pool and profile
  std::vector<std::pair<std::size_t, std::size_t>> homes_;  // by kind: pool and profile
  std::uint64_t undecided_ = 0;
};

struct Departure {
  double at = 0;
  Lease lease = 0;
  bool operator<(const Departure& other) const {
    return std::tie(at, lease) > std::tie(other.at, other.lease);
  }
};

double holding_time(Holding law, Prng& prng) {
  // Two draws each, so that all laws and policies stay in step.
  const double pick = prng.unit(), time = prng.exponential(1);
  switch (law) {
    case Holding::exponential:
      return time;
    case Holding::fixed:
      return 1;
    case Holding::heavy:
      return pick < 0.9 ? time / 3 : time * 7;
  }
  return time;
}

// The 97.5 % point of Student's t. Exact to three decimals: a table, then Cornish and Fisher's expansion.
double student_t(unsigned degrees) {
  constexpr std::array<double, 8> table{12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306};
  if (degrees >= 1 && degrees <= table.size()) return table[degrees - 1];
  const double z = 1.959964, n = degrees;
  const double z3 = z * z * z, z5 = z3 * z * z, z7 = z5 * z * z;
  return z + (z3 + z) / (4 * n) + (5 * z5 + 16 * z3 + 3 * z) / (96 * n * n) +
         (3 * z7 + 19 * z5 + 17 * z3 - 15 * z) / (384 * n * n * n);
}

Status check(const Setup& setup) {
  if (!(setup.load > 0 && setup.load <= 4))
    return Error(Errc::invalid, fmt::format("load {}: above 0 and at most 4 is understood", setup.load));
  if (setup.batches < 2 || setup.batches > 1000)
    return Error(Errc::invalid, fmt::format("{} batches: 2 to 1000 are understood", setup.batches));
  if (setup.jobs < setup.batches || setup.jobs > 100'000'000'000)
    return Error(Errc::invalid,
                 fmt::format("{} jobs: one for each batch at least, 1e11 at most", setup.jobs));
  if (!(setup.warmup >= 0 && setup.warmup <= 10'000))
    return Error(Errc::invalid,
                 fmt::format("a warm-up of {} mean holding times: 0 to 10000 are understood", setup.warmup));
  if (setup.policy.moves > grid::max_moves)
    return Error(Errc::invalid,
                 fmt::format("{} moves for a job: {} at most", setup.policy.moves, grid::max_moves));
  if (!(setup.policy.moves_per_100 >= 0 && setup.policy.moves_per_100 <= 300))
    return Error(Errc::invalid,
                 fmt::format("{} moves for 100 jobs: 0 to 300 are understood", setup.policy.moves_per_100));
  if (setup.policy.moves != 0 && setup.policy.rule != Rule::ours)
    return Error(Errc::invalid, "only the rule `ours` moves jobs");
  return ok_status();
}

}  // namespace

Result<Outcome> simulate(const Setup& setup, const Progress& progress) {
  BH_CHECK(check(setup));
  BH_TRY(const auto jobs, jobs_of(setup.mix, setup.pools));
  BH_TRY(const auto graphs, graphs_of(setup.pools, jobs));
  BH_TRY(const auto fluid, fluid_of(setup.pools, graphs, jobs));
  const std::size_t kinds = jobs.profiles.size();
  std::unique_ptr<Placer> placer;
  if (setup.policy.rule == Rule::ours) {
    BH_TRY(placer, Ours::make(setup.pools, jobs, setup.policy));
  } else if (setup.policy.rule == Rule::repack) {
    BH_TRY(placer, Repack::make(setup.pools, jobs));
  } else {
    placer = std::make_unique<Keyed>(setup.pools, graphs, kinds, setup.policy.rule);
  }

  Outcome out;
  out.fluid_jobs = fluid.jobs;
  for (std::size_t k = 0; k < kinds; ++k) out.kinds.push_back({jobs.profiles[k], jobs.slices[k], 0, 0});
  std::vector<double> until(kinds);
  double sum = 0;
  for (std::size_t k = 0; k < kinds; ++k) until[k] = sum += jobs.part[k];
  const double rate = setup.load * fluid.jobs;
  const auto whole = static_cast<std::uint64_t>(rate * setup.warmup) + setup.jobs;
  const std::uint64_t tick = std::max<std::uint64_t>(1, whole / 100);

  // Streams apart: what one policy does with a job does not change the next job.
  Prng arrivals(setup.seed), choices(setup.seed ^ 0x6a6f6273), times(setup.seed ^ 0x74696d6573);
  std::priority_queue<Departure> departures;
  std::vector<std::uint8_t> kind_of;  // by lease
  std::vector<Lease> spare;
  double now = 0, last = 0, held_time = 0;
  std::uint64_t held = 0, slices_offered = 0, slices_accepted = 0, counted_from = 0, moves = 0;
  std::uint64_t batch_offered = 0, batch_accepted = 0;
  double batch_sum = 0, batch_squares = 0;
  const auto pass = [&](double to) {
    if (to > setup.warmup) held_time += static_cast<double>(held) * (to - std::max(last, setup.warmup));
    last = to;
  };

  while (out.offered < setup.jobs) {
    now += arrivals.exponential(1 / rate);
    while (!departures.empty() && departures.top().at <= now) {
      const auto gone = departures.top();
      departures.pop();
      pass(gone.at);
      placer->release(kind_of[gone.lease], gone.lease);
      held -= jobs.slices[kind_of[gone.lease]];
      spare.push_back(gone.lease);
      ++out.departed;
    }
    pass(now);
    const double draw = choices.unit() * sum;
    const auto found = std::upper_bound(until.begin(), until.end() - 1, draw);
    const auto kind = static_cast<std::size_t>(found - until.begin());
    const double stay = holding_time(setup.holding, times);
    const bool counts = now >= setup.warmup;
    if (counts && counted_from == 0)
      counted_from = moves + 1;  // moves before the first job that counts do not

    if (spare.empty()) {
      spare.push_back(static_cast<Lease>(kind_of.size()));
      kind_of.push_back(0);
    }
    const Lease lease = spare.back();
    const bool taken = placer->admit(kind, lease, moves);
    ++out.arrived;
    if (taken) {
      spare.pop_back();
      kind_of[lease] = static_cast<std::uint8_t>(kind);
      departures.push({now + stay, lease});
      held += jobs.slices[kind];
      ++out.admitted;
    }
    if (counts) {
      ++out.offered;
      ++out.kinds[kind].offered;
      batch_offered += jobs.slices[kind];
      if (taken) {
        ++out.accepted;
        ++out.kinds[kind].accepted;
        batch_accepted += jobs.slices[kind];
      }
      // Batch b ends with counted job floor((b + 1) * jobs / batches).
      if (out.offered * setup.batches / setup.jobs != (out.offered - 1) * setup.batches / setup.jobs) {
        const double percent = 100 * static_cast<double>(batch_accepted) / static_cast<double>(batch_offered);
        out.batches.push_back(percent);
        batch_sum += percent;
        batch_squares += percent * percent;
        slices_offered += batch_offered;
        slices_accepted += batch_accepted;
        batch_offered = batch_accepted = 0;
      }
    }
    if (progress && out.arrived % tick == 0 && !progress(std::min(out.arrived, whole), whole))
      return Error(Errc::timeout, "the simulation was cancelled");
  }
  if (progress && !progress(whole, whole)) return Error(Errc::timeout, "the simulation was cancelled");

  const double n = setup.batches, mean = batch_sum / n;
  const double variance = std::max(0.0, (batch_squares - n * mean * mean) / (n - 1));
  out.accepted_percent = 100 * static_cast<double>(slices_accepted) / static_cast<double>(slices_offered);
  out.half_width = student_t(setup.batches - 1) * std::sqrt(variance / n);
  out.jobs_percent = 100 * static_cast<double>(out.accepted) / static_cast<double>(out.offered);
  double capacity = 0;
  for (const auto& pool : setup.pools)
    capacity += static_cast<double>(pool.geometry.memory_slices) * pool.gpus;
  if (now > setup.warmup) out.busy_percent = 100 * held_time / ((now - setup.warmup) * capacity);
  out.moves = moves + 1 - counted_from;
  out.moves_per_100 =
      out.accepted == 0 ? 0 : 100 * static_cast<double>(out.moves) / static_cast<double>(out.accepted);
  out.events = out.arrived + out.departed;
  out.present = out.admitted - out.departed;
  out.undecided = placer->undecided();
  return out;
}

}  // namespace bulkhead::churn
