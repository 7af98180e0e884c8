// Does a demand fit: a closed form for the grid of 8 memory and 7 compute slices, a bounded exact search for
// others.
//
// The closed form. When no limit beside the places binds (`recognise` looks at every set to be sure), a GPU
// of that grid is cut into parts that know nothing of each other:
//   - a lower half, units 0-3: takes 3g or 4g; or is two whole quarters
//   - an upper half, units 4-7: takes 3g; or is one whole quarter (4-5) and one lame quarter (6-7)
//   - a whole quarter takes a 2g, or a 1g of double memory ("double"), or two 1g
//   - the lame quarter takes a double or one 1g (at 6: nothing of one unit starts at 7)
// and a 7g takes both halves of an empty GPU. So what is there matters only through six numbers: empty GPUs
// E, further free lower halves and upper halves, free quarters of broken halves (whole, lame), and single
// units where a 1g may start. Demand: a 1g, b doubles, c 2g, d 3g, f 4g, g 7g.
//   1. 7g have no choice: g <= E. The other E - g GPUs are a lower and an upper half each; now there are L
//   lower and U
//      upper halves.
//   2. 4g have no choice: f lower halves. A 3g takes either half. A lower half can do whatever an upper one
//   can
//      (a whole quarter does what a lame one does), so in any packing with a 3g below and an upper half
//      without one the two swap contents: with x = min(d, U) above and d - x below nothing is lost. f + d - x
//      <= L.
//   3. Left are W = 2 (L - f - (d - x)) + (U - x) + (whole quarters) and M = (U - x) + (lame quarters).
//      2g have no choice: whole quarters. A double takes either; in a whole quarter it costs two 1g, in a
//      lame one one, and a whole quarter can do whatever a lame one can, so by the same swap lame quarters go
//      first: y = min(b, M). c + b - y <= W.
//   4. 1g take the rest: a <= 2 (W - c - (b - y)) + (M - y) + (single units).
// Each step loses nothing, so the conditions are enough and necessary.
#include <algorithm>
#include <bit>
#include <functional>
#include <map>
#include <unordered_set>

#include "core/grid/grid.hpp"

namespace bulkhead::grid {

namespace {

enum Role : std::size_t { one, twin, two, three, four, seven };

struct Shape {
  unsigned size;
  std::vector<unsigned> starts;
};

const std::array<Shape, 6>& shapes() {
  static const std::array<Shape, 6> all = {
      {{1, {0, 1, 2, 3, 4, 5, 6}}, {2, {0, 2, 4, 6}}, {2, {0, 2, 4}}, {4, {0, 4}}, {4, {0}}, {8, {0}}}};
  return all;
}

// More GPUs than any fleet has, few enough that no sum below overflows.
constexpr std::uint64_t many = std::uint64_t{1} << 40U;

using Vector = std::vector<std::uint32_t>;

bool within(const Vector& small, const Vector& large) {
  for (std::size_t i = 0; i < small.size(); ++i) {
    if (small[i] > large[i]) return false;
  }
  return true;
}

// Drops what is part of another.
void keep_largest(std::vector<Vector>& vectors) {
  std::sort(vectors.begin(), vectors.end(), std::greater<>());
  vectors.erase(std::unique(vectors.begin(), vectors.end()), vectors.end());
  // What contains a vector is above it in this order.
  std::vector<Vector> kept;
  for (auto& vector : vectors) {
    if (std::none_of(kept.begin(), kept.end(), [&](const Vector& k) { return within(vector, k); }))
      kept.push_back(std::move(vector));
  }
  vectors = std::move(kept);
}

struct Search {
  struct Kind {  // GPUs that can take the same
    std::uint64_t gpus = 0;
    std::vector<Vector> offers = {};
  };
  std::vector<Kind> kinds = {};
  std::vector<std::uint64_t> sizes = {};  // of the demanded profiles
  std::uint64_t budget = 0;

  // bounds[kind][offer][b]: the most that one GPU gives by bound b with the offers from here on.
  std::vector<std::vector<std::vector<std::uint64_t>>> bounds = {};
  std::vector<std::vector<std::uint64_t>> later = {};  // per kind: by all GPUs of the kinds behind it
  std::vector<std::vector<std::uint64_t>> measures = {};

  struct Hash {
    std::size_t operator()(const std::vector<std::uint64_t>& key) const {
      std::uint64_t hash = 0;
      for (const auto word : key) hash = (std::rotl(hash, 7) ^ word) * 0x9e3779b97f4a7c15;
      return hash;
    }
  };
  std::unordered_set<std::vector<std::uint64_t>, Hash> failed = {};
  bool out = false;

  // Bounds are the demand of some of the profiles together, counted and in units.
  void prepare() {
    const std::size_t profiles = sizes.size();
    const std::uint32_t subsets = profiles <= 6 ? (1U << profiles) - 1 : 0;
    for (std::uint32_t subset = 1; subset <= subsets; ++subset) {
      std::vector<std::uint64_t> counted(profiles, 0), weighed(profiles, 0);
      for (std::size_t p = 0; p < profiles; ++p) {
        if ((subset >> p & 1U) == 0) continue;
        counted[p] = 1;
        weighed[p] = sizes[p];
      }
      measures.push_back(std::move(counted));
      measures.push_back(std::move(weighed));
    }
    if (subsets == 0) {
      measures.push_back(sizes);
      for (std::size_t p = 0; p < profiles; ++p) {
        measures.emplace_back(profiles, 0);
        measures.back()[p] = 1;
      }
    }
    bounds.resize(kinds.size());
    later.assign(kinds.size() + 1, std::vector<std::uint64_t>(measures.size(), 0));
    for (std::size_t k = kinds.size(); k-- > 0;) {
      const Kind& kind = kinds[k];
      bounds[k].assign(kind.offers.size() + 1, std::vector<std::uint64_t>(measures.size(), 0));
      for (std::size_t o = kind.offers.size(); o-- > 0;) {
        for (std::size_t b = 0; b < measures.size(); ++b)
          bounds[k][o][b] = std::max(bounds[k][o + 1][b], measure(b, kind.offers[o]));
      }
      for (std::size_t b = 0; b < measures.size(); ++b)
        later[k][b] = later[k + 1][b] + kind.gpus * bounds[k][0][b];
    }
  }
  template <class Counts>
  std::uint64_t measure(std::size_t bound, const Counts& counts) const {
    std::uint64_t sum = 0;
    for (std::size_t p = 0; p < sizes.size(); ++p) sum += measures[bound][p] * counts[p];
    return sum;
  }

  // Whether `rest` fits on `left` GPUs of kind k with its offers from o on, and on the kinds behind.
  bool fits(std::size_t k, std::size_t o, std::uint64_t left, const std::vector<std::uint64_t>& rest) {
    if (std::all_of(rest.begin(), rest.end(), [](std::uint64_t r) { return r == 0; })) return true;
    if (k == kinds.size()) return false;
    if (left == 0 || o == kinds[k].offers.size())
      return fits(k + 1, 0, k + 1 < kinds.size() ? kinds[k + 1].gpus : 0, rest);
    if (budget == 0) {
      out = true;
      return false;
    }
    --budget;
    for (std::size_t b = 0; b < measures.size(); ++b) {
      if (measure(b, rest) > left * bounds[k][o][b] + later[k + 1][b]) return false;
    }
    std::vector<std::uint64_t> key = rest;
    key.insert(key.end(), {k, o, left});
    if (failed.contains(key)) return false;
    const Vector& offer = kinds[k].offers[o];
    std::uint64_t most = 0;  // more of this offer would serve nobody
    for (std::size_t p = 0; p < rest.size(); ++p) {
      if (offer[p] > 0) most = std::max(most, (rest[p] + offer[p] - 1) / offer[p]);
    }
    most = std::min(most, left);
    std::vector<std::uint64_t> less(rest.size());
    for (std::uint64_t gpus = most + 1; gpus-- > 0;) {
      for (std::size_t p = 0; p < rest.size(); ++p) less[p] = rest[p] - std::min(rest[p], gpus * offer[p]);
      if (fits(k, o + 1, left - gpus, less)) return true;
      if (out) return false;
    }
    failed.insert(std::move(key));
    return false;
  }
};

// Each profile in turn to the best state there is. Largest first; or before those the profiles of which a GPU
// takes fewer than their size lets it (1g+me), which want a GPU each.
enum class Order { largest, scarcest };
bool greedy_fits(const Tables& tables, std::span<const Group> gpus, std::span<const std::uint64_t> demand,
                 Order by) {
  std::vector<std::uint64_t> counts(tables.set_count(), 0);
  for (const auto& group : gpus) counts[group.set] += group.gpus;
  std::vector<unsigned> order;
  for (unsigned p = 0; p < demand.size(); ++p) order.push_back(p);
  const auto key = [&](unsigned p) {
    const bool scarce = by == Order::scarcest && 2 * tables.maxpack(0, p) * tables.size(p) < tables.units();
    return std::pair(!scarce, tables.units() - tables.size(p));
  };
  std::stable_sort(order.begin(), order.end(), [&](unsigned a, unsigned b) { return key(a) < key(b); });
  for (const unsigned p : order) {
    std::uint64_t left = demand[p];
    const auto ranked = tables.ranked(p);
    // What a placement leads to may rank before where the walk is: start over until nothing moves.
    for (std::size_t r = 0; r < ranked.size() && left > 0;) {
      const std::uint64_t take = std::min(left, counts[ranked[r].set]);
      if (take == 0) {
        ++r;
        continue;
      }
      counts[ranked[r].set] -= take;
      counts[ranked[r].after] += take;
      left -= take;
      const auto rank = tables.rank_of(p, ranked[r].after);
      if (rank != Tables::no_rank) r = std::min<std::size_t>(r, rank);
    }
    if (left > 0) return false;
  }
  return true;
}

}  // namespace

void Tables::recognise() {
  if (units() != 8) return;
  SevenOfEight found;
  std::uint64_t theirs = 0;  // places
  for (std::size_t role = 0; role < shapes().size(); ++role) {
    for (unsigned p = 0; p < profile_count(); ++p) {
      const auto& profile = geometry_.profiles[p];
      if (profile.size != shapes()[role].size || profile.starts != shapes()[role].starts) continue;
      // 1g and 1g+me look alike: the plain one is that of which more fit.
      auto& its = found.role[role];
      if (its < 0 || maxpack(0, p) > maxpack(0, static_cast<unsigned>(its)))
        its = static_cast<std::int16_t>(p);
    }
    if (found.role[role] < 0) continue;
    const auto p = static_cast<unsigned>(found.role[role]);
    for (unsigned place = first_place_[p]; place < first_place_[p + 1]; ++place)
      theirs |= std::uint64_t{1} << place;
  }
  if (theirs == 0) return;
  for (const auto& profile : geometry_.profiles) {
    std::int16_t stands_for = -1;
    for (std::size_t role = 0; role < shapes().size(); ++role) {
      if (profile.size == shapes()[role].size && profile.starts == shapes()[role].starts)
        stands_for = found.role[role];
    }
    found.stands_for.push_back(stands_for);
  }
  // Beside every set, whatever of these places is free may be taken: then no limit but the places binds.
  for (std::size_t s = 0; s < bits_.size(); ++s) {
    for (unsigned place = 0; place < places_.size(); ++place) {
      if ((theirs >> place & 1U) != 0 && (masks_[s] & places_[place].mask) == 0 &&
          next(static_cast<SetId>(s), place) == no_set)
        return;
    }
  }
  seven_of_eight_ = found;
}

std::vector<std::vector<std::uint32_t>> Tables::offers(SetId set) const {
  std::vector<Vector> vectors;
  std::vector<bool> seen(bits_.size(), false);
  std::vector<SetId> open = {set};
  seen[set] = true;
  while (!open.empty()) {
    const SetId at = open.back();
    open.pop_back();
    bool full = true;
    for (unsigned place = 0; place < places_.size(); ++place) {
      const SetId more = next(at, place);
      if (more == no_set) continue;
      full = false;
      if (!seen[more]) {
        seen[more] = true;
        open.push_back(more);
      }
    }
    if (!full) continue;
    Vector counts(profile_count(), 0);
    for (std::uint64_t bits = bits_[at] & ~bits_[set]; bits != 0; bits &= bits - 1)
      ++counts[places_[static_cast<unsigned>(std::countr_zero(bits))].profile];
    vectors.push_back(std::move(counts));
  }
  keep_largest(vectors);
  return vectors;
}

std::optional<bool> seven_of_eight_holds(const Tables& tables, std::span<const Group> gpus,
                                         std::span<const std::uint64_t> demand) {
  const auto& grid = tables.seven_of_eight();
  if (!grid) return std::nullopt;
  std::array<std::uint64_t, 6> wanted{};
  for (unsigned p = 0; p < demand.size(); ++p) {
    if (demand[p] == 0) continue;
    const auto at = std::find(grid->role.begin(), grid->role.end(), static_cast<std::int16_t>(p));
    if (at == grid->role.end()) return std::nullopt;
    if (demand[p] > many) return false;
    wanted[static_cast<std::size_t>(at - grid->role.begin())] = demand[p];
  }
  std::uint64_t empty = 0, lower = 0, upper = 0, whole = 0, lame = 0, single = 0;
  for (const auto& group : gpus) {
    const std::uint32_t free = ~tables.mask(group.set) & 0xffU;
    if (free == 0xff) {
      empty += group.gpus;
      continue;
    }
    const auto quarters = [&](std::uint32_t from) {  // 0 or 4
      for (std::uint32_t at = from; at < from + 4; at += 2) {
        const std::uint32_t pair = free >> at & 3U;
        if (pair == 3) (at == 6 ? lame : whole) += group.gpus;
        if (pair == 1 || (pair == 2 && at != 6)) single += group.gpus;
      }
    };
    if ((free & 0x0fU) == 0x0f) {
      lower += group.gpus;
    } else {
      quarters(0);
    }
    if ((free & 0xf0U) == 0xf0) {
      upper += group.gpus;
    } else {
      quarters(4);
    }
  }
  if (wanted[seven] > empty) return false;
  lower += empty - wanted[seven];
  upper += empty - wanted[seven];
  const std::uint64_t above = std::min(wanted[three], upper), below = wanted[three] - above;
  if (wanted[four] + below > lower) return false;
  whole += 2 * (lower - wanted[four] - below) + (upper - above);
  lame += upper - above;
  const std::uint64_t in_lame = std::min(wanted[twin], lame), in_whole = wanted[twin] - in_lame;
  if (wanted[two] + in_whole > whole) return false;
  return wanted[one] <= 2 * (whole - wanted[two] - in_whole) + (lame - in_lame) + single;
}

Verdict can_hold(const Tables& tables, std::span<const Group> gpus, std::span<const std::uint64_t> demand,
                 std::uint64_t budget) {
  if (const auto closed = seven_of_eight_holds(tables, gpus, demand))
    return *closed ? Verdict::yes : Verdict::no;
  std::vector<unsigned> asked;
  std::uint64_t units = 0, free = 0;
  for (unsigned p = 0; p < demand.size(); ++p) {
    if (demand[p] == 0) continue;
    if (p >= tables.profile_count() || demand[p] > many) return Verdict::no;
    asked.push_back(p);
    units += demand[p] * tables.size(p);
    std::uint64_t alone = 0;
    for (const auto& group : gpus) alone += group.gpus * tables.maxpack(group.set, p);
    if (alone < demand[p]) return Verdict::no;
  }
  for (const auto& group : gpus) free += group.gpus * tables.free_units(group.set);
  if (units > free) return Verdict::no;
  // On the 7-of-8 grid a 1g+me wants at least what a 1g wants.
  if (const auto& grid = tables.seven_of_eight()) {
    std::vector<std::uint64_t> least(tables.profile_count(), 0);
    for (const unsigned p : asked) {
      if (grid->stands_for[p] >= 0) least[static_cast<unsigned>(grid->stands_for[p])] += demand[p];
    }
    if (seven_of_eight_holds(tables, gpus, least) == false) return Verdict::no;
  }
  const auto known = demand.first(std::min<std::size_t>(demand.size(), tables.profile_count()));
  if (greedy_fits(tables, gpus, known, Order::largest) || greedy_fits(tables, gpus, known, Order::scarcest))
    return Verdict::yes;

  // Of what each state offers, only the demanded profiles matter; states that offer the same are one kind.
  Search search;
  search.budget = budget;
  std::map<SetId, std::uint64_t> sets;
  for (const auto& group : gpus) sets[group.set] += group.gpus;
  std::map<std::vector<Vector>, std::uint64_t> kinds;
  std::size_t choices = 0;
  constexpr std::size_t choice_limit = 2048;
  for (const auto& [set, count] : sets) {
    if (count == 0) continue;
    auto offers = tables.offers(set);
    for (auto& offer : offers) {
      Vector its;
      for (const unsigned p : asked) its.push_back(offer[p]);
      offer = std::move(its);
    }
    keep_largest(offers);
    if (offers.empty() ||
        std::all_of(offers[0].begin(), offers[0].end(), [](std::uint32_t n) { return n == 0; }))
      continue;
    kinds[std::move(offers)] += count;
  }
  for (const auto& [offers, count] : kinds) choices += offers.size();
  if (choices > choice_limit) return Verdict::undecided;
  std::vector<std::uint64_t> rest;
  for (const unsigned p : asked) {
    search.sizes.push_back(tables.size(p));
    rest.push_back(demand[p]);
  }
  for (auto& [offers, count] : kinds) search.kinds.push_back({count, offers});
  // Fewest choices first: what they cannot give the others must.
  std::stable_sort(search.kinds.begin(), search.kinds.end(),
                   [](const auto& a, const auto& b) { return a.offers.size() < b.offers.size(); });
  search.prepare();
  const bool found = !search.kinds.empty() && search.fits(0, 0, search.kinds[0].gpus, rest);
  return found ? Verdict::yes : search.out ? Verdict::undecided : Verdict::no;
}

}  // namespace bulkhead::grid
