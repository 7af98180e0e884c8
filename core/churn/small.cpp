// A few equal GPUs as a Markov decision process.
//
// One GPU's states are collapsed first: two instance sets are the same when every profile leads from them to
// the same collapsed states and their departures leave the same ones (the coarsest such partition, by
// refinement from one block). It finds by itself that 3g and 4g at the same place, quarters that mirror each
// other, or one and two slices at the end of the grid where nothing else starts have the same future: 723
// sets of an H100 become 100. The fleet's state is a multiset of those. For a rule's own value the partition
// starts from what the rule prefers instead, so that nothing is collapsed that the rule tells apart.
//
// With departures at rate 1 each, arrivals at rates lambda_k and any h, the drift
//     d(s) = sum_k lambda_k * max(slices_k + h(after) - h(s)) + sum over departures (h(after) - h(s))
// satisfies min d <= best gain <= max d: bounds that hold whatever was done to find h. h is found by modified
// policy iteration: one improving sweep, which gives the bounds, and then steps of the chain under the
// choices it made.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include <fmt/format.h>

#include "core/churn/fleet.hpp"
#include "core/grid/grid.hpp"

namespace bulkhead::churn {

namespace {

constexpr unsigned most_gpus = 8;

// What a rule makes of each (state, kind): the lower key wins, and the GPU becomes `to`. An empty list: it
// has no place.
struct Option {
  std::int64_t key = 0;
  std::uint32_t to = 0;
  friend auto operator<=>(const Option&, const Option&) = default;
};

struct Block {
  std::vector<std::vector<Option>> places = {};  // by kind; keys equal when there is no rule
  std::vector<std::pair<std::uint32_t, std::uint32_t>> departures = {};  // to, how many
};

using Options = std::vector<std::vector<std::vector<Option>>>;  // state, kind

Options any_option(const Graph& graph) {
  Options options(graph.states.size());
  for (std::size_t s = 0; s < graph.states.size(); ++s) {
    for (const auto& moves : graph.states[s].places) {
      auto& list = options[s].emplace_back();
      for (const auto& move : moves) list.push_back({0, move.to});
    }
  }
  return options;
}

Result<Options> rule_options(const Graph& graph, Rule rule) {
  Options options(graph.states.size());
  if (rule == Rule::ours) {
    BH_TRY(const auto tables, grid::Tables::make(graph.geometry));
    for (std::size_t s = 0; s < graph.states.size(); ++s) {
      std::uint64_t bits = 0;
      const auto index_of = [&](std::size_t kind) {
        return static_cast<unsigned>(graph.kinds[kind] - graph.geometry.profiles.data());
      };
      for (const auto& instance : graph.states[s].instances) {
        bits |= std::uint64_t{1} << tables.place_of(index_of(instance.kind), instance.start).value_or(0);
      }
      const auto set = tables.find(bits);
      for (std::size_t kind = 0; kind < graph.kinds.size(); ++kind) {
        auto& list = options[s].emplace_back();
        if (!set) continue;
        const auto rank = tables.rank_of(index_of(kind), *set);
        if (rank == grid::Tables::no_rank) continue;
        const auto& best = tables.ranked(index_of(kind))[rank];
        for (const auto& move : graph.states[s].places[kind]) {
          if (move.start != tables.places()[best.place].start) continue;
          // Empty GPUs last, then growth, then the fuller GPU; what grid.hpp says beyond that are ties.
          const std::int64_t key =
              (std::int64_t{s == 0} << 40) + (std::int64_t{best.growth} << 8) + tables.free_units(*set);
          list.push_back({key, move.to});
        }
      }
    }
    return options;
  }
  const auto scores = mfi_scores(graph);
  for (std::size_t s = 0; s < graph.states.size(); ++s) {
    for (const auto& moves : graph.states[s].places) {
      auto& list = options[s].emplace_back();
      for (const auto& move : moves) {
        const std::int64_t key = rule == Rule::mfi ? std::int64_t{scores[move.to]} - scores[s]
                                 : rule == Rule::best_fit
                                     ? std::int64_t{graph.geometry.memory_slices} - graph.states[s].taken
                                     : 0;
        if (list.empty() || key < list.front().key) list.assign(1, {key, move.to});
      }
    }
  }
  return options;
}

std::vector<Block> collapse(const Graph& graph, const Options& options) {
  const std::size_t count = graph.states.size();
  std::vector<std::uint32_t> block(count, 0);
  std::uint32_t blocks = 1;
  for (;;) {
    std::map<std::vector<std::int64_t>, std::uint32_t> ids;
    std::vector<std::uint32_t> next(count);
    for (std::size_t s = 0; s < count; ++s) {
      std::vector<std::int64_t> signature{block[s]};
      for (const auto& list : options[s]) {
        std::set<std::pair<std::int64_t, std::int64_t>> places;
        for (const auto& option : list) places.emplace(option.key, block[option.to]);
        signature.push_back(-1);
        for (const auto& [key, to] : places) signature.push_back(key), signature.push_back(to);
      }
      std::vector<std::int64_t> left;
      for (const auto to : graph.states[s].without) left.push_back(block[to]);
      std::sort(left.begin(), left.end());
      signature.push_back(-2);
      signature.insert(signature.end(), left.begin(), left.end());
      next[s] = ids.try_emplace(std::move(signature), static_cast<std::uint32_t>(ids.size())).first->second;
    }
    block = std::move(next);
    if (ids.size() == blocks) break;
    blocks = static_cast<std::uint32_t>(ids.size());
  }
  // Blocks are numbered by their first state, so that the empty GPU is block 0.
  std::vector<Block> made;
  std::vector<std::uint32_t> number(blocks, no_state);
  std::vector<std::size_t> first;
  for (std::size_t s = 0; s < count; ++s) {
    if (number[block[s]] != no_state) continue;
    number[block[s]] = static_cast<std::uint32_t>(first.size());
    first.push_back(s);
  }
  for (const auto s : first) {
    Block& here = made.emplace_back();
    for (const auto& list : options[s]) {
      auto& places = here.places.emplace_back();
      for (const auto& option : list) places.push_back({option.key, number[block[option.to]]});
      std::sort(places.begin(), places.end());
      places.erase(std::unique(places.begin(), places.end()), places.end());
    }
    std::map<std::uint32_t, std::uint32_t> left;
    for (const auto to : graph.states[s].without) ++left[number[block[to]]];
    here.departures.assign(left.begin(), left.end());
  }
  return made;
}

using Fleet = std::array<std::uint16_t, most_gpus>;

// Numbers fleets without gaps: multisets of blocks, or tuples where the order of the GPUs matters to the
// rule.
class Numbering {
 public:
  Numbering(std::size_t blocks, unsigned gpus, bool ordered)
      : gpus_(gpus), ordered_(ordered), blocks_(blocks) {
    // choose_[i][b] = C(b + i, i + 1), saturated.
    choose_.assign(gpus, std::vector<std::uint64_t>(blocks + 1, 0));
    for (unsigned i = 0; i < gpus; ++i) {
      for (std::size_t b = 1; b <= blocks; ++b) {
        const std::uint64_t add = i == 0 ? 1 : choose_[i - 1][b];
        choose_[i][b] = std::min<std::uint64_t>(choose_[i][b - 1] + add, std::uint64_t{1} << 60);
      }
    }
  }
  std::uint64_t count() const {
    if (!ordered_) return choose_[gpus_ - 1][blocks_];
    std::uint64_t all = 1;
    for (unsigned i = 0; i < gpus_; ++i) all = std::min<std::uint64_t>(all * blocks_, std::uint64_t{1} << 48);
    return all;
  }
  std::uint64_t number(const Fleet& fleet) const {
    std::uint64_t at = 0;
    if (ordered_) {
      for (unsigned i = 0; i < gpus_; ++i) at = at * blocks_ + fleet[i];
    } else {
      for (unsigned i = 0; i < gpus_; ++i) at += choose_[i][fleet[i]];
    }
    return at;
  }
  // GPU i becomes `block`; keeps the order of a multiset.
  Fleet with(Fleet fleet, unsigned i, std::uint32_t block) const {
    const auto value = static_cast<std::uint16_t>(block);
    if (!ordered_) {
      while (i > 0 && fleet[i - 1] > value) fleet[i] = fleet[i - 1], --i;
      while (i + 1 < gpus_ && fleet[i + 1] < value) fleet[i] = fleet[i + 1], ++i;
    }
    fleet[i] = value;
    return fleet;
  }

 private:
  unsigned gpus_;
  bool ordered_;
  std::size_t blocks_;
  std::vector<std::vector<std::uint64_t>> choose_;
};

class Chain {
 public:
  Chain(std::vector<Block> blocks, const Small& small, const Jobs& jobs, std::vector<double> rates,
        bool ordered)
      : blocks_(std::move(blocks)),
        gpus_(small.gpus),
        kinds_(jobs.profiles.size()),
        slices_(jobs.slices),
        rates_(std::move(rates)),
        ordered_(ordered),
        numbering_(blocks_.size(), small.gpus, ordered) {
    for (std::size_t k = 0; k < kinds_; ++k) offered_ += rates_[k] * slices_[k];
  }

  Status explore(std::uint64_t most, const Progress& progress) {
    const auto all = numbering_.count();
    const auto refuse = [&](std::uint64_t states) {
      return Error(Errc::no_capacity,
                   fmt::format("{} GPUs of {} states each make {} states or more, past {}", gpus_,
                               blocks_.size(), states, most),
                   "fewer GPUs or a mix of fewer profiles");
    };
    if (all > most * 64 || blocks_.size() > UINT16_MAX || all > UINT32_MAX) return refuse(all);
    index_.assign(all, no_state);
    add(Fleet{});
    for (std::size_t s = 0; s < fleets_.size(); ++s) {
      if (fleets_.size() > most) return refuse(fleets_.size());
      if (s % 65536 == 0 && progress && !progress(0, 1000)) return Error(Errc::timeout, "cancelled");
      const Fleet here = fleets_[s];
      for (std::size_t k = 0; k < kinds_; ++k) each_option(here, k, [&](const Fleet& to) { add(to); });
      for (unsigned i = 0; i < gpus_; ++i) {
        if (!ordered_ && i > 0 && here[i] == here[i - 1]) continue;
        for (const auto& [to, times] : blocks_[here[i]].departures) add(numbering_.with(here, i, to));
      }
    }
    const std::size_t count = fleets_.size();
    picks_.assign(count * kinds_, 0);
    begin_.reserve(count + 1);
    for (std::size_t s = 0; s < count; ++s) {
      begin_.push_back(left_.size());
      const Fleet& here = fleets_[s];
      for (unsigned i = 0; i < gpus_;) {
        unsigned same = 1;
        while (!ordered_ && i + same < gpus_ && here[i + same] == here[i]) ++same;
        for (const auto& [to, times] : blocks_[here[i]].departures) {
          left_.push_back(index_[numbering_.number(numbering_.with(here, i, to))]);
          times_.push_back(static_cast<float>(times * same));
        }
        i += same;
      }
    }
    begin_.push_back(left_.size());
    for (std::size_t s = 0; s < count; ++s) {
      double rate = 0;
      for (std::size_t i = begin_[s]; i < begin_[s + 1]; ++i) rate += static_cast<double>(times_[i]);
      fastest_ = std::max(fastest_, rate);
    }
    for (const double rate : rates_) fastest_ += rate;
    // A state is never left with certainty, or the discrete chain might swing.
    fastest_ *= 1.02;
    return ok_status();
  }

  // refuse: may turn away what fits. sign: +1 takes the best of the options, -1 the worst.
  Result<SmallOutcome> solve(const Small& small, bool refuse, double sign, const Progress& progress) {
    const std::size_t count = fleets_.size();
    SmallOutcome out;
    out.states = count;
    out.gpu_states = static_cast<unsigned>(blocks_.size());
    std::vector<double> h(count, 0), next(count, 0);
    double first_width = 0;
    unsigned rounds = 10;
    out.percent = {0, 100};
    while (out.sweeps < small.most_sweeps) {
      const auto [low, high] = improve(h, refuse, sign);
      ++out.sweeps;
      // Bounds of different sweeps are all true.
      out.percent.low = std::max(out.percent.low, 100 * low / offered_);
      out.percent.high = std::min(out.percent.high, 100 * high / offered_);
      const double width = out.percent.high - out.percent.low;
      if (first_width == 0) first_width = std::max(width, small.tolerance);
      if (progress) {
        const double range = std::log(first_width / small.tolerance) + 1e-9;
        const double gone =
            std::clamp(std::log(first_width / std::max(width, small.tolerance)) / range, 0.0, 1.0);
        if (!progress(static_cast<std::uint64_t>(gone * 1000), 1000))
          return Error(Errc::timeout, "cancelled");
      }
      if (width <= small.tolerance) break;
      for (unsigned round = 0; round < rounds && out.sweeps < small.most_sweeps; ++round, ++out.sweeps) {
        step(h, next);
        h.swap(next);
      }
      const double level = h[0];
      for (auto& each : h) each -= level;
      rounds = std::min(rounds + 5, 50U);
    }
    return out;
  }

 private:
  void add(const Fleet& fleet) {
    auto& index = index_[numbering_.number(fleet)];
    if (index != no_state) return;
    index = static_cast<std::uint32_t>(fleets_.size());
    fleets_.push_back(fleet);
  }

  // The outcomes among which a job of kind k may end: of the lowest key, on the lowest GPU where order
  // matters.
  template <class Visit>
  bool each_option(const Fleet& here, std::size_t k, const Visit& visit) const {
    std::int64_t best = INT64_MAX;
    for (unsigned i = 0; i < gpus_; ++i) {
      const auto& places = blocks_[here[i]].places[k];
      if (!places.empty()) best = std::min(best, places.front().key);
    }
    if (best == INT64_MAX) return false;
    for (unsigned i = 0; i < gpus_; ++i) {
      if (!ordered_ && i > 0 && here[i] == here[i - 1]) continue;
      const auto& places = blocks_[here[i]].places[k];
      for (const auto& option : places) {
        if (option.key != best) break;
        visit(numbering_.with(here, i, option.to));
        if (ordered_) return true;
      }
    }
    return true;
  }

  std::pair<double, double> improve(std::vector<double>& h, bool refuse, double sign) {
    double low = 1e300, high = -1e300;
    for (std::size_t s = 0; s < fleets_.size(); ++s) {
      double drift = 0;
      for (std::size_t k = 0; k < kinds_; ++k) {
        double best = -1e300;
        std::uint32_t pick = static_cast<std::uint32_t>(s);
        each_option(fleets_[s], k, [&](const Fleet& to) {
          const auto index = index_[numbering_.number(to)];
          const double value = sign * h[index];
          if (value > best) best = value, pick = index;
        });
        double won = pick == s ? 0 : slices_[k] + h[pick] - h[s];
        if (refuse && won < 0) won = 0, pick = static_cast<std::uint32_t>(s);
        picks_[s * kinds_ + k] = pick;
        drift += rates_[k] * won;
      }
      for (std::size_t i = begin_[s]; i < begin_[s + 1]; ++i)
        drift += static_cast<double>(times_[i]) * (h[left_[i]] - h[s]);
      low = std::min(low, drift);
      high = std::max(high, drift);
    }
    return {low, high};
  }

  // One step of the chain made discrete, under the choices of the last improve(). (Gauss-Seidel sweeps need
  // the gain, and with one that is a little off they need not settle: tried on one GPU and the bimodal mix.)
  void step(const std::vector<double>& h, std::vector<double>& next) const {
    for (std::size_t s = 0; s < fleets_.size(); ++s) {
      const double own = h[s];
      double drift = 0;
      for (std::size_t k = 0; k < kinds_; ++k) {
        const auto pick = picks_[s * kinds_ + k];
        if (pick != s) drift += rates_[k] * (slices_[k] + h[pick] - own);
      }
      for (std::size_t i = begin_[s]; i < begin_[s + 1]; ++i)
        drift += static_cast<double>(times_[i]) * (h[left_[i]] - own);
      next[s] = own + drift / fastest_;
    }
  }

  std::vector<Block> blocks_;
  unsigned gpus_;
  std::size_t kinds_;
  std::vector<unsigned> slices_;
  std::vector<double> rates_;
  double offered_ = 0, fastest_ = 0;  // slices a time; the rate of leaving the busiest state, bounded
  bool ordered_;
  Numbering numbering_;
  std::vector<Fleet> fleets_;
  std::vector<std::uint32_t> index_, picks_, left_;
  std::vector<float> times_;
  std::vector<std::size_t> begin_;
};

struct Opened {
  Jobs jobs;
  std::vector<Graph> graphs;
  std::vector<double> rates;
};

Result<Opened> open(const Small& small) {
  if (small.gpus == 0 || small.gpus > most_gpus)
    return Error(Errc::invalid,
                 fmt::format("{} GPUs: the exact policy is for 1 to {}", small.gpus, most_gpus));
  if (!(small.load > 0 && small.load <= 4))
    return Error(Errc::invalid, fmt::format("load {}: above 0, at most 4", small.load));
  if (!(small.tolerance > 0)) return Error(Errc::invalid, "the tolerance must be above 0");
  const std::vector<Pool> pools{{small.geometry, small.gpus}};
  Opened opened;
  BH_TRY(opened.jobs, jobs_of(small.mix, pools));
  BH_TRY(opened.graphs, graphs_of(pools, opened.jobs));
  BH_TRY(const auto fluid, fluid_of(pools, opened.graphs, opened.jobs));
  for (const double part : opened.jobs.part) opened.rates.push_back(small.load * fluid.jobs * part);
  return opened;
}

}  // namespace

Result<SmallOutcome> solve(const Small& small, bool may_refuse, const Progress& progress) {
  BH_TRY(const auto opened, open(small));
  Chain chain(collapse(opened.graphs[0], any_option(opened.graphs[0])), small, opened.jobs, opened.rates,
              false);
  BH_CHECK(chain.explore(small.most_states, progress));
  return chain.solve(small, may_refuse, 1, progress);
}

Result<SmallOutcome> evaluate(const Small& small, Rule rule, bool kindly, const Progress& progress) {
  if (rule == Rule::repack)
    return Error(Errc::unsupported, "free repacking is a bound and not a rule of this chain");
  BH_TRY(const auto opened, open(small));
  BH_TRY(const auto options, rule_options(opened.graphs[0], rule));
  Chain chain(collapse(opened.graphs[0], options), small, opened.jobs, opened.rates, rule == Rule::first_fit);
  BH_CHECK(chain.explore(small.most_states, progress));
  return chain.solve(small, false, kindly ? 1 : -1, progress);
}

}  // namespace bulkhead::churn
