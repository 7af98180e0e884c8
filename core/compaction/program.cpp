#include "core/compaction/program.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>

#include "core/compaction/simplex.hpp"

namespace bulkhead::compaction {

namespace {

constexpr double whole = 1e-6;                  // an amount this close to a whole number is one
constexpr std::size_t most_branched_sets = 64;  // beyond, branching starts only after most things were fixed
constexpr std::int64_t few_units = 48;
constexpr std::uint64_t most_pivots = 200'000;
constexpr std::size_t sampled_above = 1000, sample = 400;  // sets

std::int64_t rounded_up(double bound, std::int64_t step) {
  if (!(bound > -9e17)) return std::numeric_limits<std::int64_t>::min();
  const auto whole_bound = static_cast<std::int64_t>(std::ceil(bound));
  if (step <= 1) return whole_bound;
  const auto over = (whole_bound % step + step) % step;
  return over == 0 ? whole_bound : whole_bound + step - over;
}

template <class Sets>
std::int64_t step_of(const Sets& sets) {
  std::int64_t step = 0;
  for (const auto& set : sets) step = std::gcd(step, set->cost_step());
  return step;
}

using Among = std::shared_ptr<const std::vector<Handle>>;

struct NodeSet {
  unsigned origin = 0;
  std::int64_t count = 1;
  Among among = {};  // null: all
  Handle key = 0;
};
struct Node {
  std::vector<NodeSet> sets = {};
  std::int64_t bound = std::numeric_limits<std::int64_t>::min();
};

bool feasible(std::span<const std::int64_t> bounds, std::span<const std::shared_ptr<const Listed>> listed,
              const std::vector<std::vector<Taken>>& taken, std::int64_t& cost) {
  std::vector<std::int64_t> sums(bounds.size(), 0);
  cost = 0;
  for (std::size_t s = 0; s < taken.size(); ++s) {
    for (const auto& [handle, count] : taken[s]) {
      const auto choice = listed[s]->choice(handle);
      cost += choice.cost * count;
      for (const auto& entry : choice.entries) sums[entry.row] += entry.value * count;
    }
  }
  for (std::size_t r = 0; r < bounds.size(); ++r) {
    if (sums[r] < bounds[r]) return false;
  }
  return true;
}

void tidy(std::vector<Taken>& taken) {
  std::sort(taken.begin(), taken.end());
  std::vector<Taken> merged;
  for (const auto& entry : taken) {
    if (entry.count == 0) continue;
    if (!merged.empty() && merged.back().handle == entry.handle) {
      merged.back().count += entry.count;
    } else {
      merged.push_back(entry);
    }
  }
  taken = std::move(merged);
}

// Branch and bound over sets whose choices are written out. Dives to the child that holds most of the relaxation, then
// takes the open node with the lowest bound.
class Branch {
 public:
  Branch(std::span<const std::int64_t> bounds, std::span<const std::shared_ptr<const Listed>> listed,
         std::span<const std::int64_t> counts)
      : bounds_(bounds), listed_(listed), step_(step_of(listed)) {
    Node root;
    for (std::size_t s = 0; s < listed.size(); ++s) {
      if (counts[s] > 0) root.sets.push_back({static_cast<unsigned>(s), counts[s], {}, 0});
    }
    has_keys_ = false;
    next_ = std::move(root);
  }

  // A cost known to be reached elsewhere; only better solutions are of interest.
  void beat(std::int64_t cost) { limit_ = cost; }
  void stop_at(std::int64_t cost) { enough_ = cost; }

  Solution run(std::uint64_t& nodes) {
    bool dropped = false;
    std::int64_t dropped_bound = std::numeric_limits<std::int64_t>::max();
    while (next_ || !open_.empty()) {
      if (best_.found && best_.cost <= enough_) break;
      if (!next_) {
        auto lowest = open_.begin();
        for (auto at = open_.begin(); at != open_.end(); ++at) {
          if (at->bound <= lowest->bound) lowest = at;
        }
        next_ = std::move(*lowest);
        open_.erase(lowest);
      }
      if (next_->bound >= limit_) {
        next_.reset();
        continue;
      }
      if (nodes == 0) break;
      --nodes;
      Node node = *std::exchange(next_, std::nullopt);
      const auto relaxed = solve(node);
      if (relaxed.state == LpSolution::State::infeasible) continue;
      node.bound = std::max(node.bound, rounded_up(relaxed.bound, step_));
      if (node.bound >= limit_) continue;
      if (relaxed.parts.empty() || !split(std::move(node), relaxed)) {
        // The arithmetic gave out here; what lies below is not excluded.
        dropped = true;
        dropped_bound = std::min(dropped_bound, node.bound);
      }
    }
    std::int64_t bound = best_.found ? best_.cost : std::numeric_limits<std::int64_t>::max();
    bound = std::min(bound, limit_);
    if (dropped) bound = std::min(bound, dropped_bound);
    if (next_) bound = std::min(bound, next_->bound);
    for (const auto& node : open_) bound = std::min(bound, node.bound);
    if (best_.found && best_.cost <= enough_) bound = std::max(bound, enough_);
    best_.bound = bound;
    best_.proven = best_.found && bound >= best_.cost;
    best_.infeasible =
        !best_.found && !dropped && !next_ && open_.empty() && limit_ == std::numeric_limits<std::int64_t>::max();
    return std::move(best_);
  }

 private:
  LpSolution solve(const Node& node) const {
    std::vector<LpSet> sets;
    std::vector<Handle> keys;
    for (const auto& set : node.sets) {
      const auto* listed = listed_[set.origin].get();
      sets.push_back(
          {listed, listed, set.among ? std::span<const Handle>(*set.among) : std::span<const Handle>(), set.count});
      keys.push_back(set.key);
    }
    return relax(bounds_, sets, has_keys_ ? std::span<const Handle>(keys) : std::span<const Handle>(), 0, most_pivots);
  }

  static std::vector<Handle> members(const Listed& listed, const NodeSet& set) {
    if (set.among) return *set.among;
    std::vector<Handle> all(listed.size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<Handle>(i);
    return all;
  }
  static Handle key_in(const std::vector<Handle>& among, Handle wanted) {
    return std::binary_search(among.begin(), among.end(), wanted) ? wanted : among.front();
  }

  // False: the relaxation looked whole and was not a solution.
  bool split(Node node, const LpSolution& relaxed) {
    std::vector<std::vector<Part>> parts(node.sets.size());
    for (const auto& part : relaxed.parts) parts[part.set].push_back(part);
    // Of all ways to cut the relaxation off, the most even.
    std::size_t at = node.sets.size(), column = 0;
    double most_low = 0;
    double evenness = -1;
    const Part* amount = nullptr;
    for (std::size_t s = 0; s < node.sets.size(); ++s) {
      const auto& set = node.sets[s];
      const auto& listed = *listed_[set.origin];
      auto& own = parts[s];
      if (!own.empty()) {
        const auto largest = std::max_element(own.begin(), own.end(), [](const Part& a, const Part& b) {
          return a.amount != b.amount ? a.amount < b.amount : a.handle > b.handle;
        });
        node.sets[s].key = largest->handle;
      }
      if (set.count > 1) {
        for (const auto& part : own) {
          const double fraction = part.amount - std::floor(part.amount);
          const double even = std::min(fraction, 1 - fraction);
          if (even > whole && even > evenness + 1e-9) {
            evenness = even;
            at = s;
            amount = &part;
          }
        }
      } else if (own.size() > 1) {
        if (std::any_of(own.begin(), own.end(), [](const Part& part) { return part.amount > 1 - whole; })) continue;
        for (std::size_t c = 0; c < listed.rows().size(); ++c) {
          std::sort(own.begin(), own.end(), [&](const Part& a, const Part& b) {
            const auto x = listed.value(a.handle, c), y = listed.value(b.handle, c);
            return x != y ? x < y : a.handle < b.handle;
          });
          double low = 0;
          for (std::size_t i = 0; i + 1 < own.size(); ++i) {
            low += own[i].amount;
            const auto value = listed.value(own[i].handle, c);
            if (value == listed.value(own[i + 1].handle, c)) continue;
            const double even = std::min(low, 1 - low);
            if (even > evenness + 1e-9) {
              evenness = even;
              at = s;
              column = c;
              most_low = value;
              amount = nullptr;
            }
          }
        }
      }
    }
    if (at == node.sets.size()) return accept(node, parts);
    has_keys_ = true;
    const auto& listed = *listed_[node.sets[at].origin];
    const auto all = members(listed, node.sets[at]);
    Node low = node, high = std::move(node);
    bool dive_low = false;
    if (amount == nullptr) {
      auto below = std::make_shared<std::vector<Handle>>(), above = std::make_shared<std::vector<Handle>>();
      for (const auto handle : all) (listed.value(handle, column) <= most_low ? *below : *above).push_back(handle);
      double weight = 0;
      for (const auto& part : parts[at]) weight += listed.value(part.handle, column) <= most_low ? part.amount : 0;
      dive_low = weight > 0.5;
      low.sets[at].key = key_in(*below, low.sets[at].key);
      high.sets[at].key = key_in(*above, high.sets[at].key);
      low.sets[at].among = std::move(below);
      high.sets[at].among = std::move(above);
    } else {
      const auto handle = amount->handle;
      const auto floor = static_cast<std::int64_t>(std::floor(amount->amount));
      dive_low = amount->amount - std::floor(amount->amount) < 0.5;
      auto rest = std::make_shared<std::vector<Handle>>();
      for (const auto other : all) {
        if (other != handle) rest->push_back(other);
      }
      const auto count = low.sets[at].count;
      low.sets[at].count = count - floor;
      low.sets[at].key = key_in(*rest, low.sets[at].key);
      const Among before = high.sets[at].among;
      low.sets[at].among = std::move(rest);
      const auto origin = high.sets[at].origin;
      if (floor > 0) low.sets.push_back({origin, floor, before, handle});
      high.sets[at].count = count - floor - 1;
      high.sets.push_back({origin, floor + 1, std::make_shared<std::vector<Handle>>(1, handle), handle});
      if (high.sets[at].count == 0) high.sets.erase(high.sets.begin() + static_cast<std::ptrdiff_t>(at));
    }
    next_ = dive_low ? low : high;
    open_.push_back(dive_low ? std::move(high) : std::move(low));
    return true;
  }

  bool accept(const Node& node, const std::vector<std::vector<Part>>& parts) {
    std::vector<std::vector<Taken>> taken(listed_.size());
    for (std::size_t s = 0; s < node.sets.size(); ++s) {
      std::int64_t left = node.sets[s].count;
      for (const auto& part : parts[s]) {
        const auto count = std::min(left, static_cast<std::int64_t>(std::llround(part.amount)));
        if (count == 0) continue;
        taken[node.sets[s].origin].push_back({part.handle, count});
        left -= count;
      }
      if (left != 0) return false;
    }
    for (auto& entry : taken) tidy(entry);
    std::int64_t cost = 0;
    if (!feasible(bounds_, listed_, taken, cost)) return false;
    if (cost < limit_) {
      limit_ = cost;
      best_.found = true;
      best_.cost = cost;
      best_.taken = std::move(taken);
    }
    // A whole optimum of the relaxation is the best below this node, unless rounding blurred the bound.
    return cost <= node.bound;
  }

  std::span<const std::int64_t> bounds_;
  std::span<const std::shared_ptr<const Listed>> listed_;
  std::int64_t step_;
  bool has_keys_ = false;
  std::optional<Node> next_;
  std::vector<Node> open_;
  std::int64_t limit_ = std::numeric_limits<std::int64_t>::max();
  std::int64_t enough_ = std::numeric_limits<std::int64_t>::min();
  Solution best_;
};

std::shared_ptr<const Listed> write_out(const std::shared_ptr<const Choices>& choices) {
  if (auto listed = std::dynamic_pointer_cast<const Listed>(choices)) return listed;
  std::vector<Choice> list;
  std::vector<Handle> handles;
  choices->list(list, handles);
  return std::make_shared<const Listed>(std::move(list), std::move(handles));
}

// A set that came written out is answered in its own handles.
Handle translate(const Set& set, const Listed& listed, Handle handle) {
  return set.choices.get() == &listed ? handle : listed.original(handle);
}

// Solves a large program: what the relaxation leaves whole is fixed, the rest and some more is branched on.
class Large {
 public:
  explicit Large(const Program& program) : program_(program), listed_(program.sets.size()) {}

  Solution run(std::uint64_t& nodes) {
    Solution out;
    std::vector<LpSet> sets;
    std::int64_t step = 0;
    for (const auto& set : program_.sets) {
      step = std::gcd(step, set.choices->cost_step());
      sets.push_back({set.choices.get(), dynamic_cast<const Listed*>(set.choices.get()), {}, set.count});
    }
    if (nodes == 0) return out;
    --nodes;
    double penalty = 0;
    const auto keys = first_keys(sets, penalty);
    const auto relaxed = relax(program_.bounds, sets, keys, penalty, most_pivots);
    if (relaxed.state == LpSolution::State::infeasible) {
      out.infeasible = true;
      return out;
    }
    out.bound = rounded_up(relaxed.bound, step);
    if (relaxed.parts.empty()) return out;
    std::vector<std::vector<Taken>> fixed(program_.sets.size());
    std::vector<std::int64_t> loose(program_.sets.size());
    for (std::size_t s = 0; s < loose.size(); ++s) loose[s] = program_.sets[s].count;
    for (const auto& part : relaxed.parts) {
      const auto count = std::min(loose[part.set], static_cast<std::int64_t>(std::floor(part.amount + whole)));
      if (count <= 0) continue;
      fixed[part.set].push_back({part.handle, count});
      loose[part.set] -= count;
    }
    // Which fixed things to set loose first: those that the relaxation moved, then the rest, one of each set a round.
    std::vector<std::pair<unsigned, std::size_t>> order;  // (set, index into fixed)
    for (const bool active : {true, false}) {
      for (std::size_t s = 0; s < fixed.size(); ++s) {
        for (std::size_t f = 0; f < fixed[s].size(); ++f) {
          const auto choice = program_.sets[s].choices->choice(fixed[s][f].handle);
          if ((choice.cost > 0 || !choice.entries.empty()) == active) order.emplace_back(s, f);
        }
      }
    }
    for (const std::int64_t extra : {0, 8, 24, 64}) {
      if (out.found && out.cost <= out.bound) break;
      if (nodes == 0) break;
      auto kept = fixed;
      auto free = loose;
      std::int64_t left = extra;
      const std::int64_t each =
          std::max<std::int64_t>(1, extra / std::max<std::int64_t>(1, static_cast<std::int64_t>(order.size())));
      for (const auto& [s, f] : order) {
        if (left == 0) break;
        const auto count = std::min({left, kept[s][f].count, each});
        kept[s][f].count -= count;
        free[s] += count;
        left -= count;
      }
      std::uint64_t share =
          extra == 64 ? nodes : std::min<std::uint64_t>(nodes, std::max<std::uint64_t>(50, nodes / 4));
      nodes -= share;
      attempt(kept, free, share, out);
      nodes += share;
      if (extra > 0 && left == extra) break;  // everything was loose already
    }
    out.proven = out.found && out.cost <= out.bound;
    return out;
  }

 private:
  // Where there are very many sets, the prices of a thinned-out program tell almost every set its choice; the whole
  // program starts from there. Empty: start from the cheapest.
  std::vector<Handle> first_keys(std::span<const LpSet> sets, double& penalty) const {
    if (sets.size() <= sampled_above) return {};
    const auto every = static_cast<std::int64_t>(sets.size() / sample);
    std::vector<LpSet> thin;
    std::int64_t units = 0;
    for (const auto& set : sets) {
      const auto count = (units + set.count) / every - units / every;
      units += set.count;
      if (count == 0) continue;
      thin.push_back(set);
      thin.back().count = count;
    }
    std::vector<std::int64_t> bounds;
    // A little looser than to scale, so that chance in what was taken does not make it impossible.
    for (const auto bound : program_.bounds) {
      const double scaled = static_cast<double>(bound) / static_cast<double>(every);
      bounds.push_back(static_cast<std::int64_t>(std::floor(scaled - std::fabs(scaled) / 50)) - 2);
    }
    const auto relaxed = relax(bounds, thin, {}, 0, most_pivots);
    if (relaxed.state == LpSolution::State::infeasible || relaxed.prices.empty()) return {};
    for (const double price : relaxed.prices) penalty = std::max(penalty, 4 * price + 1);
    std::vector<Handle> keys;
    for (const auto& set : sets) keys.push_back(set.choices->best(relaxed.prices, 1).handle);
    return keys;
  }

  void attempt(const std::vector<std::vector<Taken>>& kept, const std::vector<std::int64_t>& free, std::uint64_t& nodes,
               Solution& out) {
    auto bounds = program_.bounds;
    std::int64_t paid = 0;
    for (std::size_t s = 0; s < kept.size(); ++s) {
      for (const auto& [handle, count] : kept[s]) {
        if (count == 0) continue;
        const auto choice = program_.sets[s].choices->choice(handle);
        paid += choice.cost * count;
        for (const auto& entry : choice.entries) bounds[entry.row] -= entry.value * count;
      }
    }
    std::vector<std::shared_ptr<const Listed>> listed;
    std::vector<std::int64_t> counts;
    std::vector<std::size_t> origin;
    for (std::size_t s = 0; s < free.size(); ++s) {
      if (free[s] == 0) continue;
      if (!listed_[s]) listed_[s] = write_out(program_.sets[s].choices);
      listed.push_back(listed_[s]);
      counts.push_back(free[s]);
      origin.push_back(s);
    }
    Branch branch(bounds, listed, counts);
    if (out.found) branch.beat(out.cost - paid);
    branch.stop_at(out.bound - paid);
    auto found = branch.run(nodes);
    if (!found.found) return;
    out.found = true;
    out.cost = paid + found.cost;
    out.taken = kept;
    for (std::size_t i = 0; i < origin.size(); ++i) {
      for (const auto& [handle, count] : found.taken[i])
        out.taken[origin[i]].push_back({translate(program_.sets[origin[i]], *listed[i], handle), count});
    }
    for (auto& taken : out.taken) tidy(taken);
  }

  const Program& program_;
  std::vector<std::shared_ptr<const Listed>> listed_;
};

}  // namespace

Listed::Listed(std::vector<Choice> choices, std::vector<Handle> handles)
    : choices_(std::move(choices)), handles_(std::move(handles)) {
  for (const auto& choice : choices_) {
    cost_step_ = std::gcd(cost_step_, choice.cost);
    for (const auto& entry : choice.entries) rows_.push_back(entry.row);
  }
  std::sort(rows_.begin(), rows_.end());
  rows_.erase(std::unique(rows_.begin(), rows_.end()), rows_.end());
  values_.assign(choices_.size() * rows_.size(), 0);
  for (std::size_t i = 0; i < choices_.size(); ++i) {
    for (const auto& entry : choices_[i].entries) {
      const auto at = std::lower_bound(rows_.begin(), rows_.end(), entry.row) - rows_.begin();
      values_[i * rows_.size() + static_cast<std::size_t>(at)] += static_cast<double>(entry.value);
    }
  }
}

Listed::Listed(std::vector<Choice> choices) : Listed(std::move(choices), {}) {
  for (std::size_t i = 0; i < choices_.size(); ++i) handles_.push_back(static_cast<Handle>(i));
}

double Listed::reduced(Handle handle, std::span<const double> local, double weight) const {
  double value = weight * static_cast<double>(choices_[handle].cost);
  const auto* own = values_.data() + handle * rows_.size();
  for (std::size_t c = 0; c < local.size(); ++c) value -= local[c] * own[c];
  return value;
}

Choices::Best Listed::best_of(std::span<const Handle> among, std::span<const double> prices, double weight) const {
  std::vector<double> local;
  local.reserve(rows_.size());
  for (const auto row : rows_) local.push_back(prices[row]);
  Best best{0, std::numeric_limits<double>::infinity()};
  for (const auto handle : among) {
    if (const double value = reduced(handle, local, weight); value < best.value) best = {handle, value};
  }
  return best;
}

Choices::Best Listed::best(std::span<const double> prices, double weight) const {
  std::vector<double> local;
  local.reserve(rows_.size());
  for (const auto row : rows_) local.push_back(prices[row]);
  Best best{0, std::numeric_limits<double>::infinity()};
  for (std::size_t i = 0; i < choices_.size(); ++i) {
    if (const double value = reduced(static_cast<Handle>(i), local, weight); value < best.value)
      best = {static_cast<Handle>(i), value};
  }
  return best;
}

void Listed::list(std::vector<Choice>& choices, std::vector<Handle>& handles) const {
  choices = choices_;
  handles = handles_;
}

Solution minimise(const Program& program, std::uint64_t& nodes) {
  std::int64_t units = 0;
  for (const auto& set : program.sets) units += set.count;
  const bool branchable = program.sets.size() <= most_branched_sets;
  Solution out;
  if (units > few_units || !branchable) {
    out = Large(program).run(nodes);
    if (out.infeasible || out.proven || !branchable) return out;
  }
  std::vector<std::shared_ptr<const Listed>> listed;
  std::vector<std::int64_t> counts;
  for (const auto& set : program.sets) {
    listed.push_back(write_out(set.choices));
    counts.push_back(set.count);
  }
  Branch branch(program.bounds, listed, counts);
  if (out.found) branch.beat(out.cost);
  auto better = branch.run(nodes);
  if (!better.found && out.found) {
    out.bound = std::max(out.bound, std::min(better.bound, out.cost));
    out.proven = out.bound >= out.cost;
    return out;
  }
  if (better.found) {
    for (std::size_t s = 0; s < better.taken.size(); ++s) {
      for (auto& entry : better.taken[s]) entry.handle = translate(program.sets[s], *listed[s], entry.handle);
      tidy(better.taken[s]);
    }
  }
  better.bound = std::max(better.bound, out.bound);
  return better;
}

}  // namespace bulkhead::compaction
