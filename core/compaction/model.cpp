#include "core/compaction/model.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <numeric>
#include <unordered_set>

#include <fmt/format.h>

namespace bulkhead::compaction {

Result<Model> read(const Fleet& fleet, bool loosen) {
  if (fleet.gpus.size() > most_gpus)
    return Error(Errc::invalid, fmt::format("{} GPUs: one question takes at most {}", fleet.gpus.size(), most_gpus),
                 "ask for one pool at a time");
  if (fleet.pools.size() > most_pools)
    return Error(Errc::invalid, fmt::format("{} pools: one question takes at most {}", fleet.pools.size(), most_pools),
                 "ask for fewer pools at a time");
  Model model;
  model.fleet = &fleet;
  for (std::size_t p = 0; p < fleet.pools.size(); ++p) {
    for (std::size_t q = 0; q < p && model.tables.size() == p; ++q) {
      if (fleet.pools[q] == fleet.pools[p]) model.tables.push_back(model.tables[q]);
    }
    if (p < fleet.tables.size() && fleet.tables[p] != nullptr && fleet.tables[p]->geometry() == fleet.pools[p]) {
      model.tables.resize(p);
      model.tables.push_back(fleet.tables[p]);
    }
    if (model.tables.size() > p) continue;
    auto tables = grid::Tables::make(fleet.pools[p]);
    if (!tables) return std::move(tables).error().in(fmt::format("pool {}", p));
    model.tables.push_back(std::make_shared<const grid::Tables>(*std::move(tables)));
  }
  std::unordered_set<std::uint64_t> ids;
  std::map<std::vector<std::uint64_t>, Kind> kinds;
  for (std::size_t g = 0; g < fleet.gpus.size(); ++g) {
    const auto& gpu = fleet.gpus[g];
    if (gpu.pool >= fleet.pools.size())
      return Error(Errc::invalid, fmt::format("gpu {}: there is no pool {}", g, gpu.pool));
    const auto& tables = *model.tables[gpu.pool];
    Kind kind;
    kind.pool = gpu.pool;
    kind.open = gpu.open;
    std::uint64_t bits = 0, fixed = 0;
    for (const auto& instance : gpu.instances) {
      if (!ids.insert(instance.id).second)
        return Error(Errc::invalid, fmt::format("gpu {}: instance {} is in the fleet twice", g, instance.id));
      const auto profile = tables.profile_of_id(instance.profile);
      if (!profile)
        return Error(Errc::invalid,
                     fmt::format("gpu {}: instance {}: its pool has no profile {}", g, instance.id, instance.profile));
      const auto place = tables.place_of(*profile, instance.start);
      if (!place || (bits >> *place & 1U) != 0)
        return Error(Errc::invalid, fmt::format("gpu {}: instance {}: {} cannot start at {} here", g, instance.id,
                                                tables.geometry().profiles[*profile].name, instance.start));
      if (instance.price > most_price)
        return Error(
            Errc::invalid,
            fmt::format("gpu {}: instance {}: a price of {} is above {}", g, instance.id, instance.price, most_price),
            "give prices in a coarser unit");
      bits |= std::uint64_t{1} << *place;
      if (instance.movable || loosen) {
        kind.items.push_back({*profile, instance.start, *place, instance.price, instance.visible, !instance.movable});
      } else {
        fixed |= std::uint64_t{1} << *place;
      }
    }
    std::sort(kind.items.begin(), kind.items.end(), [](const Item& a, const Item& b) { return a.place < b.place; });
    // The planner weighs at most so many on one GPU; real ones hold 7.
    while (kind.items.size() > most_movable) {
      fixed |= std::uint64_t{1} << kind.items.back().place;
      kind.items.pop_back();
      model.cut = true;
    }
    std::vector<std::uint64_t> key = {gpu.pool, gpu.open ? 0U : 1U, bits, fixed};
    for (const auto& item : kind.items)
      key.push_back(item.price << 2U | (item.visible ? 2U : 0U) | (item.pinned ? 1U : 0U));
    const auto [at, fresh] = kinds.try_emplace(std::move(key));
    if (fresh) {
      const auto all = tables.find(bits), base = tables.find(fixed);
      if (!all || !base)
        return Error(Errc::invalid, fmt::format("gpu {}: its instances cannot lie there together", g),
                     "look at the places of its instances");
      kind.all = *all;
      kind.fixed = *base;
      at->second = std::move(kind);
    }
    at->second.gpus.push_back(g);
  }
  for (auto& [key, kind] : kinds) {
    const auto& tables = *model.tables[kind.pool];
    const std::size_t n = kind.items.size();
    const std::uint32_t full = static_cast<std::uint32_t>((std::uint64_t{1} << n) - 1);
    const bool every = n <= all_subsets_below;
    if (!every) model.cut = true;
    for (std::uint32_t leave = 0; leave <= full; ++leave) {
      if (!every && leave != full && static_cast<std::size_t>(std::popcount(leave)) > few_leave) continue;
      grid::SetId set = kind.all;
      if (every && leave != 0) {
        set = tables.without(kind.left[leave & (leave - 1)],
                             kind.items[static_cast<std::size_t>(std::countr_zero(leave))].place);
      } else {
        for (std::uint32_t rest = leave; rest != 0; rest &= rest - 1)
          set = tables.without(set, kind.items[static_cast<std::size_t>(std::countr_zero(rest))].place);
      }
      kind.leave.push_back(leave);
      kind.left.push_back(set);
    }
    model.kinds.push_back(std::move(kind));
  }
  return model;
}

Offers::Offers(std::shared_ptr<const grid::Tables> tables, std::vector<int> rows)
    : tables_(std::move(tables)), rows_(std::move(rows)), offers_(tables_->set_count()), best_(tables_->set_count()) {}

const std::vector<Offers::Offer>& Offers::of(grid::SetId set) const {
  auto& slot = offers_[set];
  if (slot) return *slot;
  std::vector<std::vector<std::uint32_t>> counts = tables_->offers(set);
  for (auto& vector : counts) {
    for (std::size_t p = 0; p < vector.size(); ++p) {
      if (rows_[p] < 0) vector[p] = 0;
    }
  }
  std::sort(counts.begin(), counts.end(), std::greater<>());
  counts.erase(std::unique(counts.begin(), counts.end()), counts.end());
  slot = std::make_unique<std::vector<Offer>>();
  for (std::size_t i = 0; i < counts.size() && slot->size() < 500; ++i) {
    bool inside = std::all_of(counts[i].begin(), counts[i].end(), [](std::uint32_t n) { return n == 0; });
    for (std::size_t j = 0; j < counts.size() && !inside; ++j) {
      inside = i != j && std::equal(counts[i].begin(), counts[i].end(), counts[j].begin(), std::less_equal<>());
    }
    if (inside) continue;
    Offer offer;
    for (unsigned p = 0; p < counts[i].size(); ++p) {
      if (counts[i][p] == 0) continue;
      offer.counts.emplace_back(p, static_cast<std::int32_t>(counts[i][p]));
      offer.entries.push_back({static_cast<unsigned>(rows_[p]), static_cast<std::int32_t>(counts[i][p])});
    }
    slot->push_back(std::move(offer));
  }
  return *slot;
}

const Offers::Best& Offers::best(grid::SetId set, std::span<const double> prices) const {
  // One comparison a call tells whether the prices are still those of the stored values.
  if (version_ == 0 || !std::equal(prices.begin(), prices.end(), prices_.begin(), prices_.end())) {
    prices_.assign(prices.begin(), prices.end());
    ++version_;
  }
  auto& [version, best] = best_[set];
  if (version == version_) return best;
  version = version_;
  best = {};
  const auto& offers = of(set);
  for (unsigned i = 0; i < offers.size(); ++i) {
    double value = 0;
    for (const auto& entry : offers[i].entries)
      value += std::max(prices[entry.row], 0.0) * static_cast<double>(entry.value);
    if (value > best.value) best = {value, i + 1};
  }
  return best;
}

bool Offers::covers(grid::SetId set, std::span<const std::uint32_t> counts) const {
  if (std::all_of(counts.begin(), counts.end(), [](std::uint32_t n) { return n == 0; })) return true;
  const auto& offers = of(set);
  return std::any_of(offers.begin(), offers.end(), [&](const Offer& offer) {
    std::size_t at = 0;
    for (unsigned p = 0; p < counts.size(); ++p) {
      if (counts[p] == 0) continue;
      while (at < offer.counts.size() && offer.counts[at].first < p) ++at;
      if (at == offer.counts.size() || offer.counts[at].first != p ||
          static_cast<std::uint32_t>(offer.counts[at].second) < counts[p])
        return false;
    }
    return true;
  });
}

GpuChoices::GpuChoices(const Kind& kind, const Rows& rows, std::shared_ptr<const Offers> offers, Costs costs)
    : kind_(kind), rows_(rows), offers_(std::move(offers)), costs_(costs), sums_(kind.leave.size()) {}

std::int64_t GpuChoices::cost_of(std::uint32_t leave) const {
  std::int64_t cost = 0;
  for (; leave != 0; leave &= leave - 1) {
    const auto& item = kind_.items[static_cast<std::size_t>(std::countr_zero(leave))];
    if (costs_.moves) cost += static_cast<std::int64_t>(item.price) + 1;
    if (item.pinned) cost += costs_.pinned;
  }
  return cost;
}

std::int64_t GpuChoices::cost_step() const {
  std::int64_t step = costs_.used;
  for (std::uint32_t i = 0; i < kind_.items.size() && !costs_.frozen; ++i) step = std::gcd(step, cost_of(1U << i));
  return step;
}

const Offers::Offer* GpuChoices::taken(Handle handle) const {
  const auto offer = handle & 511U;
  if (offer == 0 || !kind_.open) return nullptr;
  return &offers_->of(kind_.left[handle >> 9U])[offer - 1];
}

Choices::Best GpuChoices::best(std::span<const double> prices, double weight) const {
  const auto at = [&](int row) { return row < 0 ? 0.0 : std::max(prices[static_cast<std::size_t>(row)], 0.0); };
  std::array<double, most_movable> leaving{};
  for (std::size_t i = 0; i < kind_.items.size(); ++i) {
    const auto& item = kind_.items[i];
    leaving[i] = at(rows_.of[kind_.pool][item.profile]) + at(rows_.moves) +
                 at(rows_.price) * static_cast<double>(item.price) + (item.visible ? at(rows_.visible) : 0);
    if (costs_.moves) leaving[i] += weight * static_cast<double>(item.price + 1);
    if (item.pinned) leaving[i] += weight * static_cast<double>(costs_.pinned);
  }
  const double in_use = weight * static_cast<double>(costs_.used) + at(rows_.used);
  const bool every = kind_.leave.size() == std::size_t{1} << kind_.items.size();
  Best best{0, std::numeric_limits<double>::infinity()};
  for (std::size_t s = 0; s < subsets(); ++s) {
    const auto leave = kind_.leave[s];
    double value = 0;
    if (every && leave != 0) {
      value = sums_[leave & (leave - 1)] + leaving[static_cast<std::size_t>(std::countr_zero(leave))];
    } else {
      for (std::uint32_t rest = leave; rest != 0; rest &= rest - 1)
        value += leaving[static_cast<std::size_t>(std::countr_zero(rest))];
    }
    sums_[s] = value;
    const bool holds = kind_.left[s] != 0;
    if (holds) value += in_use;
    if (value < best.value) best = {handle(s, 0), value};
    if (!kind_.open) continue;
    const auto& offer = offers_->best(kind_.left[s], prices);
    if (offer.offer == 0) continue;
    if (!holds) value += in_use;
    value -= offer.value;
    if (value < best.value) best = {handle(s, offer.offer), value};
  }
  return best;
}

Choice GpuChoices::choice(Handle handle) const {
  const auto subset = handle >> 9U;
  const auto leave = kind_.leave[subset];
  Choice out;
  out.cost = cost_of(leave);
  std::map<unsigned, std::int64_t> values;
  const auto* offer = taken(handle);
  if (offer != nullptr) {
    for (const auto& entry : offer->entries) values[entry.row] += entry.value;
  }
  for (std::uint32_t rest = leave; rest != 0; rest &= rest - 1) {
    const auto& item = kind_.items[static_cast<std::size_t>(std::countr_zero(rest))];
    if (const int row = rows_.of[kind_.pool][item.profile]; row >= 0) --values[static_cast<unsigned>(row)];
    if (rows_.moves >= 0) --values[static_cast<unsigned>(rows_.moves)];
    if (rows_.price >= 0) values[static_cast<unsigned>(rows_.price)] -= static_cast<std::int64_t>(item.price);
    if (rows_.visible >= 0 && item.visible) --values[static_cast<unsigned>(rows_.visible)];
  }
  if (used(subset, offer != nullptr)) {
    out.cost += costs_.used;
    if (rows_.used >= 0) --values[static_cast<unsigned>(rows_.used)];
  }
  for (const auto& [row, value] : values) {
    if (value != 0) out.entries.push_back({row, value});
  }
  return out;
}

void GpuChoices::list(std::vector<Choice>& choices, std::vector<Handle>& handles) const {
  // Packed values, a byte a row, so that "at least as much in every row" is a few machine operations.
  constexpr std::uint64_t high = 0x8080808080808080;
  struct Candidate {
    Handle handle = 0;
    std::int64_t cost = 0, used = 0, moves = 0, price = 0, visible = 0, sum = 0;
    std::vector<std::uint64_t> gains = {};
  };
  const auto& rows = rows_.of[kind_.pool];
  const std::size_t words = (rows.size() + 7) / 8;
  const bool counts_used = costs_.used != 0 || rows_.used >= 0;
  std::vector<Candidate> candidates;
  for (std::size_t s = 0; s < subsets(); ++s) {
    const auto leave = kind_.leave[s];
    std::vector<std::int32_t> gains(rows.size(), 0);
    Candidate base;
    base.cost = cost_of(leave);
    for (std::uint32_t rest = leave; rest != 0; rest &= rest - 1) {
      const auto& item = kind_.items[static_cast<std::size_t>(std::countr_zero(rest))];
      --gains[item.profile];
      if (rows_.moves >= 0) ++base.moves;
      if (rows_.price >= 0) base.price += static_cast<std::int64_t>(item.price);
      if (rows_.visible >= 0 && item.visible) ++base.visible;
    }
    const auto add = [&](Handle handle, const Offers::Offer* offer) {
      auto candidate = base;
      candidate.handle = handle;
      auto own = gains;
      if (offer != nullptr) {
        for (const auto& [profile, count] : offer->counts) own[profile] += count;
      }
      candidate.gains.assign(words, 0);
      for (std::size_t p = 0; p < own.size(); ++p) {
        candidate.gains[p / 8] |= static_cast<std::uint64_t>(own[p] + 64) << (p % 8 * 8);
        candidate.sum += own[p];
      }
      if (counts_used && used(s, offer != nullptr)) {
        candidate.used = 1;
        candidate.cost += costs_.used;
      }
      candidates.push_back(std::move(candidate));
    };
    const auto* offers = kind_.open ? &offers_->of(kind_.left[s]) : nullptr;
    if (offers == nullptr || offers->empty() || (counts_used && kind_.left[s] == 0)) add(handle(s, 0), nullptr);
    for (std::size_t o = 0; offers != nullptr && o < offers->size(); ++o) add(handle(s, o + 1), &(*offers)[o]);
  }
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    if (a.cost != b.cost) return a.cost < b.cost;
    if (a.used != b.used) return a.used < b.used;
    if (a.sum != b.sum) return a.sum > b.sum;
    return a.handle < b.handle;
  });
  std::vector<const Candidate*> kept;
  for (const auto& candidate : candidates) {
    const bool dominated = std::any_of(kept.begin(), kept.end(), [&](const Candidate* other) {
      if (other->used > candidate.used || other->moves > candidate.moves || other->price > candidate.price ||
          other->visible > candidate.visible)
        return false;
      for (std::size_t w = 0; w < words; ++w) {
        if ((((other->gains[w] | high) - candidate.gains[w]) & high) != high) return false;
      }
      return true;
    });
    if (!dominated) kept.push_back(&candidate);
  }
  for (const auto* candidate : kept) {
    choices.push_back(choice(candidate->handle));
    handles.push_back(candidate->handle);
  }
}

}  // namespace bulkhead::compaction
