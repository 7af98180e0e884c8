#include "core/compaction/compaction.hpp"

#include <algorithm>
#include <map>

#include <fmt/format.h>

#include "core/compaction/question.hpp"

namespace bulkhead::compaction {

namespace {

constexpr std::uint64_t slack_tries = 3;  // GPU counts above the fewest that are tried when a search ran out of nodes

bool within(const Limits& limits, std::uint64_t moves, std::uint64_t price, std::uint64_t visible) {
  return (!limits.moves || moves <= *limits.moves) && (!limits.price || price <= *limits.price) &&
         (!limits.visible || visible <= *limits.visible);
}
bool within(const Limits& limits, const Moves& moves) {
  return within(limits, moves.list.size(), moves.price, moves.visible);
}

// Counts GPUs in use while moves are played.
class Tally {
 public:
  explicit Tally(const Fleet& fleet) : held_(fleet.gpus.size()) {
    for (std::size_t g = 0; g < held_.size(); ++g) {
      held_[g] = fleet.gpus[g].instances.size();
      used_ += held_[g] > 0 ? 1 : 0;
    }
  }
  void play(const Move& move) {
    used_ += held_[move.to.gpu]++ == 0 ? 1 : 0;
    used_ -= --held_[move.from.gpu] == 0 ? 1 : 0;
  }
  std::size_t used() const { return used_; }
  bool holds(std::size_t gpu) const { return held_[gpu] > 0; }

 private:
  std::vector<std::size_t> held_;
  std::size_t used_ = 0;
};

// The shortest beginning of the moves that keeps the limits and leaves fewest GPUs in use.
bool shorten(const Fleet& fleet, const Limits& limits, Moves& moves) {
  Tally tally(fleet);
  std::size_t best = tally.used(), length = 0;
  std::uint64_t price = 0, visible = 0;
  Moves kept;
  for (std::size_t i = 0; i < moves.list.size(); ++i) {
    price += moves.list[i].price;
    visible += moves.list[i].visible ? 1 : 0;
    if (!within(limits, i + 1, price, visible)) break;
    tally.play(moves.list[i]);
    if (tally.used() < best) {
      best = tally.used();
      length = i + 1;
      kept.price = price;
      kept.visible = visible;
    }
  }
  const bool shorter = length < moves.list.size();
  moves.list.resize(length);
  moves.price = kept.price;
  moves.visible = kept.visible;
  return shorter;
}

struct Found {
  Ordered ordered = {};
  std::int64_t bound = 0;
  bool proven = true;
};

void append(Found& all, Found&& part) {
  auto& list = all.ordered.moves.list;
  list.insert(list.end(), part.ordered.moves.list.begin(), part.ordered.moves.list.end());
  all.ordered.moves.price += part.ordered.moves.price;
  all.ordered.moves.visible += part.ordered.moves.visible;
  all.ordered.stuck += part.ordered.stuck;
  all.ordered.detours += part.ordered.detours;
  all.bound += part.bound;
  all.proven = all.proven && part.proven;
}

// The cheapest way to at most `target` GPUs of a pool, or to few more when the search finds none in time.
Found reach(const Model& model, unsigned pool, std::int64_t target, std::uint64_t& nodes) {
  Found out;
  Question question;
  question.pools = {pool};
  question.costs.moves = true;
  const auto most = static_cast<std::int64_t>(in_use(model, pool));
  std::int64_t above = 0;
  for (std::uint64_t tries = 0; target + above < most; ++tries) {
    question.most_used = target + above;
    std::uint64_t share = tries == 0 ? std::max<std::uint64_t>(nodes, 50) : std::max<std::uint64_t>(nodes / 2, 50);
    const auto before = share;
    auto answer = ask(model, question, share);
    nodes -= std::min(nodes, before - share);
    if (answer.solution.found) {
      out.bound = answer.solution.bound;
      out.proven = answer.solution.proven && above == 0;
      out.ordered = carry_out(model, question, answer);
      return out;
    }
    above = tries < slack_tries ? above + 1 : above * 2;
  }
  out.proven = above == 0;
  return out;
}

// The best under limits that bind, over all pools together.
Found spend(const Model& model, const std::vector<unsigned>& pools, const Limits& limits, std::uint64_t& nodes) {
  Found out;
  Question question;
  question.pools = pools;
  question.limits = limits;
  question.costs.used = 1;
  std::uint64_t half = nodes / 2 + 1;
  const auto before = half;
  auto least = ask(model, question, half);
  nodes -= std::min(nodes, before - half);
  if (!least.solution.found) {
    out.proven = false;
    return out;
  }
  question.costs.used = 0;
  question.costs.moves = true;
  question.most_used = least.solution.cost;
  nodes = std::max<std::uint64_t>(nodes, 50);
  auto cheapest = ask(model, question, nodes);
  auto& answer = cheapest.solution.found ? cheapest : least;
  out.proven = least.solution.proven && cheapest.solution.found && cheapest.solution.proven;
  out.bound = std::max<std::int64_t>(0, cheapest.solution.bound);
  out.ordered = carry_out(model, question, answer);
  return out;
}

std::string counted(std::uint64_t n, const char* one, const char* many) {
  return fmt::format("{} {}", n, n == 1 ? one : many);
}

}  // namespace

Result<Plan> compact(const Fleet& fleet, const Limits& limits) {
  BH_TRY(const Model model, read(fleet, false));
  Plan plan;
  plan.fewest_proven = !model.cut;
  plan.proven = !model.cut;
  std::uint64_t nodes = std::max<std::uint64_t>(limits.nodes, 1);
  std::vector<unsigned> pools;
  std::vector<std::int64_t> targets(fleet.pools.size());
  std::size_t pinned = 0;
  for (unsigned pool = 0; pool < fleet.pools.size(); ++pool) {
    const auto used = in_use(model, pool);
    plan.before += used;
    if (used == 0) continue;
    std::uint64_t share = std::max<std::uint64_t>(nodes / 2, 50);
    const auto start = share;
    const auto least = fewest(model, pool, share);
    nodes -= std::min(nodes, start - share);
    const auto bound = static_cast<std::size_t>(std::max<std::int64_t>(least.bound, 0));
    plan.fewest += std::min(bound, used);
    targets[pool] =
        least.found ? std::min(least.cost, static_cast<std::int64_t>(used)) : static_cast<std::int64_t>(used);
    if (static_cast<std::size_t>(targets[pool]) != std::min(bound, used)) plan.fewest_proven = false;
    if (targets[pool] < static_cast<std::int64_t>(used)) pools.push_back(pool);
    for (const auto& kind : model.kinds) {
      if (kind.pool == pool && kind.fixed != 0) pinned += kind.gpus.size();
    }
  }
  if (!plan.fewest_proven) plan.proven = false;

  Found found;
  for (const auto pool : pools) append(found, reach(model, pool, targets[pool], nodes));
  bool binds = false;
  if (!within(limits, found.ordered.moves)) {
    binds = true;
    // Detours are seen only once the moves are ordered: the limits leave room for them in the next try.
    Limits tight = limits;
    for (int tries = 0; tries < 3; ++tries) {
      found = spend(model, pools, tight, nodes);
      if (within(limits, found.ordered.moves)) break;
      const auto less = [](std::optional<std::uint64_t>& tightened, const std::optional<std::uint64_t>& limit,
                           std::uint64_t spent) {
        if (limit && spent > *limit) tightened = *tightened - std::min(*tightened, spent - *limit);
      };
      less(tight.moves, limits.moves, found.ordered.moves.list.size());
      less(tight.price, limits.price, found.ordered.moves.price);
      less(tight.visible, limits.visible, found.ordered.moves.visible);
      found.proven = false;
      plan.proven = false;
    }
  }
  plan.moves = std::move(found.ordered.moves);
  plan.proven = plan.proven && found.proven && found.ordered.stuck == 0;
  plan.cheapest = static_cast<std::uint64_t>(std::max<std::int64_t>(0, found.bound));
  if (!within(limits, plan.moves) || found.ordered.stuck > 0) {
    if (shorten(fleet, limits, plan.moves)) {
      plan.proven = false;
      plan.cheapest = 0;
    }
  }
  Tally tally(fleet);
  for (const auto& move : plan.moves.list) tally.play(move);
  plan.after = tally.used();
  for (std::size_t g = 0; g < fleet.gpus.size(); ++g) {
    if (!fleet.gpus[g].instances.empty() && !tally.holds(g)) plan.freed.push_back(g);
  }

  if (binds && plan.after > plan.fewest) {
    std::vector<std::string> which;
    if (limits.moves) which.push_back(counted(*limits.moves, "move", "moves"));
    if (limits.price) which.push_back(fmt::format("a price of {}", *limits.price));
    if (limits.visible)
      which.push_back(fmt::format("{} that tenants notice", counted(*limits.visible, "move", "moves")));
    plan.remains.push_back(fmt::format("the limits ({}) end it at {}; without them {}", fmt::join(which, ", "),
                                       counted(plan.after, "GPU", "GPUs"),
                                       plan.fewest_proven ? fmt::format("{} would do", plan.fewest)
                                                          : fmt::format("{} or more would do", plan.fewest)));
  }
  if (found.ordered.stuck > 0)
    plan.remains.push_back(
        fmt::format("{} wait for each other's places and no place is free to step aside: one empty GPU would do",
                    counted(found.ordered.stuck, "more move", "more moves")));
  if (pinned > 0)
    plan.remains.push_back(fmt::format("{} {} instances that may not move", counted(pinned, "GPU", "GPUs"),
                                       pinned == 1 ? "holds" : "hold"));
  if (!binds && found.ordered.stuck == 0 && plan.after > plan.fewest)
    plan.remains.push_back(
        fmt::format("no way to fewer than {} was found within {} nodes; fewer than {} are impossible",
                    counted(plan.after, "GPU", "GPUs"), limits.nodes, plan.fewest));
  return plan;
}

Result<Fleet> play(const Fleet& fleet, std::span<const Move> moves) {
  Fleet out = fleet;
  for (std::size_t i = 0; i < moves.size(); ++i) {
    const auto& move = moves[i];
    const auto refuse = [&](std::string why) {
      return Error(Errc::conflict, fmt::format("move {}: instance {}: {}", i + 1, move.instance, why));
    };
    if (move.from.gpu >= out.gpus.size() || move.to.gpu >= out.gpus.size()) return refuse("there is no such GPU");
    auto& from = out.gpus[move.from.gpu];
    auto& to = out.gpus[move.to.gpu];
    const auto at = std::find_if(from.instances.begin(), from.instances.end(), [&](const Instance& instance) {
      return instance.id == move.instance && instance.profile == move.profile && instance.start == move.from.start;
    });
    if (at == from.instances.end()) return refuse("it is not where it should leave from");
    if (!at->movable) return refuse("it may not move");
    if (from.pool != to.pool) return refuse("it may not leave its pool");
    if (!to.open) return refuse("its destination takes no instances");
    if (at->price != move.price || at->visible != move.visible) return refuse("its price is another");
    const auto& geometry = out.pools[to.pool];
    std::vector<mig::NewInstance> there;
    const auto add = [&](unsigned profile, unsigned start) {
      const auto* known = geometry.by_id(profile);
      there.push_back({profile, {start, known != nullptr ? known->size : 0}, 0});
    };
    for (const auto& instance : to.instances) add(instance.profile, instance.start);
    add(move.profile, move.to.start);
    if (!mig::legal(geometry, there)) return refuse("its destination is not free");
    Instance moved = *at;
    moved.start = move.to.start;
    from.instances.erase(at);
    to.instances.push_back(moved);
  }
  return out;
}

}  // namespace bulkhead::compaction
