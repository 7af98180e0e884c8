#include <algorithm>
#include <limits>
#include <set>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/compaction/question.hpp"

namespace bulkhead::compaction {

namespace {

constexpr std::uint64_t most_wanted = 1'000'000;
constexpr std::size_t most_asks = 64;

Result<std::vector<Ask>> find_profiles(const Model& model, const Fleet& fleet, std::span<const Wanted> wanted) {
  if (wanted.size() > most_asks)
    return Error(Errc::invalid,
                 fmt::format("{} profiles are asked for: one question takes at most {}", wanted.size(), most_asks));
  std::vector<Ask> asks;
  for (const auto& want : wanted) {
    if (want.count == 0 || want.count > most_wanted)
      return Error(Errc::invalid,
                   fmt::format("{} of {}: a count is from 1 to {}", want.count, want.profile, most_wanted));
    if (want.pool && *want.pool >= fleet.pools.size())
      return Error(Errc::invalid, fmt::format("{}: there is no pool {}", want.profile, *want.pool));
    Ask ask;
    ask.count = want.count;
    ask.profile.assign(fleet.pools.size(), -1);
    bool known = false;
    std::vector<std::string> names;
    for (unsigned pool = 0; pool < fleet.pools.size(); ++pool) {
      if (want.pool && *want.pool != pool) continue;
      for (const auto name : fleet.pools[pool].names()) names.emplace_back(name);
      const auto* profile = fleet.pools[pool].by_name(want.profile);
      if (profile == nullptr) continue;
      ask.profile[pool] = static_cast<int>(*model.tables[pool]->profile_of_id(profile->id));
      if (!known) ask.weight = static_cast<std::int64_t>(profile->size);
      known = true;
    }
    if (!known) {
      std::sort(names.begin(), names.end());
      names.erase(std::unique(names.begin(), names.end()), names.end());
      return Error(Errc::not_found, fmt::format("{}: no GPU of this fleet has such a profile", want.profile),
                   fmt::format("profiles: {}", join(names, ", ")));
    }
    asks.push_back(std::move(ask));
  }
  return asks;
}

std::string counted(std::uint64_t n, const char* one, const char* many) {
  return fmt::format("{} {}", n, n == 1 ? one : many);
}

std::string cost_of(const Moves& moves) {
  return fmt::format("{} (price {}, {} noticed by tenants)", counted(moves.list.size(), "move", "moves"), moves.price,
                     moves.visible);
}

class Asker {
 public:
  Asker(const Fleet& fleet, const Model& model, std::vector<Ask> asks, const Limits& limits)
      : fleet_(fleet), model_(model), limits_(limits) {
    base_.asks = std::move(asks);
    for (unsigned pool = 0; pool < fleet.pools.size(); ++pool) {
      const bool offers =
          std::any_of(base_.asks.begin(), base_.asks.end(), [&](const Ask& a) { return a.profile[pool] >= 0; });
      if (offers) base_.pools.push_back(pool);
    }
    left_ = std::max<std::uint64_t>(limits.nodes, 1);
  }

  Question question() const { return base_; }

  Answer put(const Model& model, const Question& question) {
    // Each of the few parts of a what-if may spend half of what is left, and always some.
    std::uint64_t share = std::max<std::uint64_t>(left_ / 2, 100);
    const auto before = share;
    auto answer = ask(model, question, share);
    left_ -= std::min(left_, before - share);
    if (model.cut) answer.solution.proven = false;
    return answer;
  }

  bool within(const Moves& moves) const {
    return (!limits_.moves || moves.list.size() <= *limits_.moves) &&
           (!limits_.price || moves.price <= *limits_.price) && (!limits_.visible || moves.visible <= *limits_.visible);
  }

  // The cheapest moves that leave at most `unmet` slices of the demand out; nothing found: `found` is false. Detours
  // may break a limit that the program kept: then it is asked again with less.
  struct Room {
    bool found = false, proven = false, impossible = false;
    std::size_t stuck = 0;
    Ordered ordered = {};
    std::vector<std::uint64_t> fits = {};
  };
  Room room(std::optional<std::int64_t> unmet, const Limits& limits, bool frozen) {
    Room out;
    Limits tight = limits;
    bool first = true;
    for (int tries = 0; tries < 3; ++tries) {
      auto question = base_;
      question.limits = tight;
      question.costs.moves = true;
      question.costs.frozen = frozen;
      question.may_fail = unmet.has_value();
      question.most_unmet = unmet;
      auto answer = put(model_, question);
      if (!answer.solution.found) {
        out.impossible = first && answer.solution.infeasible && !model_.cut;
        return out;
      }
      auto ordered = carry_out(model_, question, answer);
      const bool kept = (!limits.moves || ordered.moves.list.size() <= *limits.moves) &&
                        (!limits.price || ordered.moves.price <= *limits.price) &&
                        (!limits.visible || ordered.moves.visible <= *limits.visible);
      if (kept && ordered.stuck == 0) {
        out.found = true;
        out.proven = answer.solution.proven && first;
        out.fits.assign(base_.asks.size(), 0);
        for (const auto& place : ordered.places) ++out.fits[place.wanted];
        out.ordered = std::move(ordered);
        return out;
      }
      out.stuck = ordered.stuck;
      if (ordered.stuck > 0) return out;
      const auto less = [](std::optional<std::uint64_t>& tightened, const std::optional<std::uint64_t>& limit,
                           std::uint64_t spent) {
        if (limit && spent > *limit) tightened = *tightened - std::min(*tightened, spent - *limit);
      };
      less(tight.moves, limits.moves, ordered.moves.list.size());
      less(tight.price, limits.price, ordered.moves.price);
      less(tight.visible, limits.visible, ordered.moves.visible);
      first = false;
    }
    return out;
  }

  // The least weight of the demand that stays out.
  Answer least_unmet(const Limits& limits, bool frozen) {
    auto question = base_;
    question.limits = limits;
    question.costs.frozen = frozen;
    question.may_fail = true;
    question.unmet_costs = true;
    return put(model_, question);
  }

  const Fleet& fleet_;
  const Model& model_;
  const Limits& limits_;
  Question base_;
  std::uint64_t left_ = 0;
};

void fill(WhatIf& out, Asker::Room&& room) {
  out.moves = std::move(room.ordered.moves);
  out.places = std::move(room.ordered.places);
  out.fits = std::move(room.fits);
}

std::string missing_words(std::span<const Wanted> wanted, const WhatIf& out) {
  std::vector<std::string> words;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    words.push_back(fmt::format("{} of {} {} fit{} ({} without a move; {} free memory slices there)", out.fits[i],
                                wanted[i].count, wanted[i].profile, out.fits[i] == 1 ? "s" : "", out.fits_now[i],
                                out.free_slices[i]));
  }
  return join(words, ", ");
}

}  // namespace

Result<WhatIf> what_if(const Fleet& fleet, std::span<const Wanted> wanted, const Limits& limits) {
  BH_TRY(const Model model, read(fleet, false));
  BH_TRY(auto asks, find_profiles(model, fleet, wanted));
  WhatIf out;
  out.fits.assign(wanted.size(), 0);
  for (const auto& ask : asks) {
    std::uint64_t slices = 0, now = 0;
    for (const auto& kind : model.kinds) {
      if (!kind.open || ask.profile[kind.pool] < 0) continue;
      const auto& tables = *model.tables[kind.pool];
      slices += std::uint64_t{tables.free_units(kind.all)} * kind.gpus.size();
      now += std::uint64_t{tables.maxpack(kind.all, static_cast<unsigned>(ask.profile[kind.pool]))} * kind.gpus.size();
    }
    out.free_slices.push_back(slices);
    out.fits_now.push_back(now);
  }
  if (wanted.empty()) {
    out.fit = Fit::now;
    out.proven = true;
    return out;
  }
  Asker asker(fleet, model, std::move(asks), limits);

  // Without a move, if each alone could.
  bool alone = true;
  for (std::size_t i = 0; i < wanted.size(); ++i) alone = alone && out.fits_now[i] >= wanted[i].count;
  if (alone) {
    auto now = asker.room({}, {}, true);
    if (now.found) {
      fill(out, std::move(now));
      out.fit = Fit::now;
      out.proven = true;
      return out;
    }
  }
  const bool limited = limits.moves || limits.price || limits.visible;
  auto all = asker.room({}, limits, false);
  if (all.found) {
    out.proven = all.proven;
    fill(out, std::move(all));
    out.fit = out.moves.list.empty() ? Fit::now : Fit::with_moves;
    if (out.fit == Fit::with_moves) out.why = fmt::format("all fit after {}", cost_of(out.moves));
    return out;
  }

  // As much as can be.
  const auto least = asker.least_unmet(limits, false);
  if (least.solution.found) {
    auto some = asker.room(least.solution.cost, limits, false);
    all.stuck = std::max(all.stuck, some.stuck);
    out.proven = all.impossible && least.solution.proven && some.found && some.proven;
    // Where the moves block each other with no free place to step aside, less is asked for; in the end, no move.
    std::int64_t step = std::numeric_limits<std::int64_t>::max();
    for (const auto& ask : asker.question().asks) step = std::min(step, ask.weight);
    for (int tries = 0; tries < 5 && !some.found; ++tries, step *= 2)
      some = asker.room(least.solution.cost + step, limits, false);
    if (!some.found) some = asker.room(asker.least_unmet({}, true).solution.cost, {}, true);
    if (some.found) fill(out, std::move(some));
  }
  const bool any = std::any_of(out.fits.begin(), out.fits.end(), [](std::uint64_t n) { return n > 0; });
  out.fit = any ? Fit::partly : Fit::no;
  out.why = missing_words(wanted, out);
  if (!out.moves.list.empty()) out.why += fmt::format(", after {}", cost_of(out.moves));

  if (all.stuck > 0)
    out.why += fmt::format(
        "; more would with moves, but {} cannot be ordered: places wait for each other and none is free to step aside",
        counted(all.stuck, "move", "moves"));

  // The nearest ways to all of it.
  std::vector<std::string> ways;
  bool moves_do = false;
  if (limited) {
    auto free = asker.room({}, {}, false);
    if (free.found) {
      moves_do = true;
      ways.push_back(fmt::format("with {}", cost_of(free.ordered.moves)));
      out.without_limits = std::move(free.ordered.moves);
    }
  }
  {
    auto question = asker.question();
    question.limits = limits;
    question.extra = true;
    auto more = asker.put(model, question);
    if (more.solution.found) {
      std::vector<std::string> words;
      for (unsigned pool = 0; pool < more.extra.size(); ++pool) {
        if (more.extra[pool] == 0) continue;
        out.more_gpus.push_back({pool, more.extra[pool]});
        words.push_back(fleet.pools.size() == 1
                            ? fmt::format("{} more {}", more.extra[pool], more.extra[pool] == 1 ? "GPU" : "GPUs")
                            : fmt::format("{} more in pool {}", more.extra[pool], pool));
      }
      if (!words.empty()) ways.push_back(fmt::format("with {}", join(words, " and ")));
    }
  }
  if (!moves_do) {
    BH_TRY(const Model loose, read(fleet, true));
    auto question = asker.question();
    question.costs.pinned = 1;
    const auto freed = asker.put(loose, question);
    if (freed.solution.found) {
      for (const auto& targets : freed.targets) {
        for (const auto& target : targets) {
          for (const auto& item : target.leave) {
            if (!item.pinned) continue;
            const auto& tables = *loose.tables[fleet.gpus[target.gpu].pool];
            for (const auto& instance : fleet.gpus[target.gpu].instances) {
              if (instance.start == item.start && instance.profile == tables.geometry().profiles[item.profile].id)
                out.blocking.push_back(instance.id);
            }
          }
        }
      }
      std::sort(out.blocking.begin(), out.blocking.end());
      if (!out.blocking.empty())
        ways.push_back(
            fmt::format("if {} that may not move could", counted(out.blocking.size(), "instance", "instances")));
    }
  }
  if (!ways.empty()) out.why += fmt::format("; all would {}", join(ways, ", or "));
  return out;
}

}  // namespace bulkhead::compaction
