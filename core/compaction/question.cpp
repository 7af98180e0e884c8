#include "core/compaction/question.hpp"

#include <algorithm>
#include <bit>
#include <map>

namespace bulkhead::compaction {

namespace {

// Rows for the profiles that may move in a pool, and for those asked for there.
std::vector<int> profile_rows(const Model& model, unsigned pool, std::span<const Ask> asks, std::size_t& count) {
  const auto& tables = *model.tables[pool];
  std::vector<bool> wanted(tables.profile_count(), false);
  for (const auto& kind : model.kinds) {
    if (kind.pool != pool) continue;
    for (const auto& item : kind.items) wanted[item.profile] = true;
  }
  for (const auto& one : asks) {
    if (one.profile[pool] >= 0) wanted[static_cast<std::size_t>(one.profile[pool])] = true;
  }
  std::vector<int> rows(tables.profile_count(), -1);
  for (std::size_t p = 0; p < rows.size(); ++p) {
    if (wanted[p]) rows[p] = static_cast<int>(count++);
  }
  return rows;
}

std::int64_t signed_of(std::uint64_t value) {
  return static_cast<std::int64_t>(std::min<std::uint64_t>(value, 1'000'000'000'000'000));
}

}  // namespace

Answer ask(const Model& model, const Question& question, std::uint64_t& nodes) {
  Answer answer;
  const std::size_t pools = model.tables.size();
  Rows rows;
  rows.of.resize(pools);
  answer.offers.resize(pools);
  answer.targets.resize(pools);
  answer.extra.assign(pools, 0);
  answer.given.assign(question.asks.size(), std::vector<std::uint64_t>(pools, 0));
  for (const auto pool : question.pools) {
    rows.of[pool] = profile_rows(model, pool, question.asks, rows.count);
    answer.offers[pool] = std::make_shared<const Offers>(model.tables[pool], rows.of[pool]);
  }
  Program program;
  program.bounds.assign(rows.count, 0);
  const auto at_most = [&](int& row, std::uint64_t limit) {
    row = static_cast<int>(rows.count++);
    program.bounds.push_back(-signed_of(limit));
  };
  if (question.most_used)
    at_most(rows.used, static_cast<std::uint64_t>(std::max<std::int64_t>(0, *question.most_used)));
  if (!question.costs.frozen) {
    if (question.limits.moves) at_most(rows.moves, *question.limits.moves);
    if (question.limits.price) at_most(rows.price, *question.limits.price);
    if (question.limits.visible) at_most(rows.visible, *question.limits.visible);
  }
  if (question.most_unmet)
    at_most(rows.unmet, static_cast<std::uint64_t>(std::max<std::int64_t>(0, *question.most_unmet)));

  std::vector<const Kind*> kinds;
  std::vector<const GpuChoices*> choices;
  for (const auto& kind : model.kinds) {
    if (!answer.offers[kind.pool]) continue;
    auto own = std::make_shared<const GpuChoices>(kind, rows, answer.offers[kind.pool], question.costs);
    kinds.push_back(&kind);
    choices.push_back(own.get());
    program.sets.push_back({std::move(own), static_cast<std::int64_t>(kind.gpus.size())});
  }
  const std::size_t first_ask = program.sets.size();
  constexpr Handle unmet = 0xffff;
  for (const auto& one : question.asks) {
    std::vector<Choice> list;
    std::vector<Handle> handles;
    for (const auto pool : question.pools) {
      if (one.profile[pool] < 0) continue;
      const int row = rows.of[pool][static_cast<std::size_t>(one.profile[pool])];
      list.push_back({0, {{static_cast<unsigned>(row), -1}}});
      handles.push_back(pool);
    }
    if (question.may_fail || list.empty()) {
      Choice fails;
      fails.cost = question.unmet_costs ? one.weight : 0;
      if (rows.unmet >= 0) fails.entries.push_back({static_cast<unsigned>(rows.unmet), -one.weight});
      list.push_back(std::move(fails));
      handles.push_back(unmet);
    }
    program.sets.push_back({std::make_shared<const Listed>(std::move(list), std::move(handles)), signed_of(one.count)});
  }
  const std::size_t first_extra = program.sets.size();
  std::vector<unsigned> extra_pools;
  if (question.extra) {
    std::int64_t most = 0;
    for (const auto& one : question.asks) most += signed_of(one.count);
    for (const auto pool : question.pools) {
      std::vector<Choice> list(1);
      for (const auto& offer : answer.offers[pool]->of(0)) list.push_back({1, offer.entries});
      program.sets.push_back({std::make_shared<const Listed>(std::move(list)), most});
      extra_pools.push_back(pool);
    }
  }

  answer.solution = minimise(program, nodes);
  if (!answer.solution.found) return answer;
  const auto& taken = answer.solution.taken;
  for (std::size_t s = 0; s < first_ask; ++s) {
    const auto& kind = *kinds[s];
    std::size_t next = 0;
    for (const auto& [handle, count] : taken[s]) {
      for (std::int64_t i = 0; i < count; ++i) {
        Target target;
        target.gpu = kind.gpus[next++];
        for (auto rest = choices[s]->leaves(handle); rest != 0; rest &= rest - 1)
          target.leave.push_back(kind.items[static_cast<std::size_t>(std::countr_zero(rest))]);
        if (const auto* offer = choices[s]->taken(handle)) {
          target.take.assign(model.tables[kind.pool]->profile_count(), 0);
          for (const auto& [profile, n] : offer->counts) target.take[profile] = static_cast<std::uint32_t>(n);
        }
        answer.targets[kind.pool].push_back(std::move(target));
      }
    }
  }
  for (std::size_t s = first_ask; s < first_extra; ++s) {
    const auto& listed = dynamic_cast<const Listed&>(*program.sets[s].choices);
    for (const auto& [handle, count] : taken[s]) {
      const auto pool = listed.original(handle);
      if (pool != unmet) answer.given[s - first_ask][pool] += static_cast<std::uint64_t>(count);
    }
  }
  for (std::size_t s = first_extra; s < taken.size(); ++s) {
    for (const auto& [handle, count] : taken[s]) {
      if (handle != 0) answer.extra[extra_pools[s - first_extra]] += static_cast<std::uint64_t>(count);
    }
  }
  return answer;
}

Solution fewest(const Model& model, unsigned pool, std::uint64_t& nodes) {
  Rows rows;
  rows.of.resize(model.tables.size());
  rows.of[pool] = profile_rows(model, pool, {}, rows.count);
  const auto offers = std::make_shared<const Offers>(model.tables[pool], rows.of[pool]);
  Program program;
  program.bounds.assign(rows.count, 0);
  // Open GPUs with the same room beside what stays are alike, whatever else they hold now.
  std::map<std::vector<std::vector<std::pair<unsigned, std::int64_t>>>, std::int64_t> rooms[2];
  for (const auto& kind : model.kinds) {
    if (kind.pool != pool) continue;
    const auto gpus = static_cast<std::int64_t>(kind.gpus.size());
    if (!kind.open) {
      Costs costs;
      costs.used = 1;
      program.sets.push_back({std::make_shared<const GpuChoices>(kind, rows, offers, costs), gpus});
      continue;
    }
    for (const auto& item : kind.items) program.bounds[static_cast<std::size_t>(rows.of[pool][item.profile])] += gpus;
    std::vector<std::vector<std::pair<unsigned, std::int64_t>>> room;
    for (const auto& offer : offers->of(kind.fixed)) {
      auto& one = room.emplace_back();
      for (const auto& entry : offer.entries) one.emplace_back(entry.row, entry.value);
    }
    rooms[kind.fixed != 0 ? 1 : 0][std::move(room)] += gpus;
  }
  for (const int holds : {0, 1}) {
    for (const auto& [room, gpus] : rooms[holds]) {
      std::vector<Choice> list;
      list.push_back({holds, {}});
      for (const auto& one : room) {
        auto& choice = list.emplace_back();
        choice.cost = 1;
        for (const auto& [row, value] : one) choice.entries.push_back({row, value});
      }
      if (holds == 1 && list.size() > 1) list.erase(list.begin());
      program.sets.push_back({std::make_shared<const Listed>(std::move(list)), gpus});
    }
  }
  // What leaves a closed GPU is counted against its row by its choice; what is on open ones is the bound itself.
  return minimise(program, nodes);
}

std::size_t in_use(const Model& model, unsigned pool) {
  std::size_t count = 0;
  for (const auto& kind : model.kinds) {
    if (kind.pool == pool && kind.all != 0) count += kind.gpus.size();
  }
  return count;
}

Ordered carry_out(const Model& model, const Question& question, Answer& answer) {
  Ordered out;
  for (const auto pool : question.pools) {
    std::vector<std::uint64_t> wanted(model.tables[pool]->profile_count(), 0);
    for (std::size_t i = 0; i < question.asks.size(); ++i) {
      if (question.asks[i].profile[pool] >= 0)
        wanted[static_cast<std::size_t>(question.asks[i].profile[pool])] += answer.given[i][pool];
    }
    auto part = order(*model.fleet, *answer.offers[pool], std::move(answer.targets[pool]), wanted);
    out.moves.list.insert(out.moves.list.end(), part.moves.list.begin(), part.moves.list.end());
    out.moves.price += part.moves.price;
    out.moves.visible += part.moves.visible;
    out.stuck += part.stuck;
    out.detours += part.detours;
    // Places of one profile go to the asks in their order.
    std::vector<std::uint64_t> given(question.asks.size());
    for (std::size_t i = 0; i < given.size(); ++i) given[i] = answer.given[i][pool];
    std::sort(part.places.begin(), part.places.end(), [](const New& a, const New& b) { return a.at < b.at; });
    for (auto place : part.places) {
      for (std::size_t i = 0; i < given.size(); ++i) {
        if (given[i] == 0 || question.asks[i].profile[pool] != static_cast<int>(place.wanted)) continue;
        --given[i];
        place.wanted = i;
        out.places.push_back(place);
        break;
      }
    }
  }
  std::sort(out.places.begin(), out.places.end());
  return out;
}

}  // namespace bulkhead::compaction
