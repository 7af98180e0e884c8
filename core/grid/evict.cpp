// What has to go to let a profile in: for each set that does not hold it, the smallest groups of its
// instances.
#include <algorithm>
#include <bit>
#include <map>

#include "core/grid/grid.hpp"

namespace bulkhead::grid {

namespace {

// Lists of more ways than this are cut back to fewer instances: a geometry nobody sells would fill the
// memory.
constexpr std::size_t way_limit = std::size_t{1} << 21U;

}  // namespace

void Tables::list_evictions() {
  // Of one profile, the best start on a set that holds it.
  const auto best_place = [this](SetId set, unsigned profile) -> const Ranked* {
    const auto rank = rank_of(profile, set);
    return rank == no_rank ? nullptr : &ranked_[profile][rank];
  };
  using Key = std::array<std::uint8_t, max_moves>;
  std::size_t ways = 0;
  eviction_limit_ = max_moves;
  evictions_.resize(profile_count());
  for (unsigned count = 1; count <= max_moves; ++count) {
    for (unsigned p = 0; p < profile_count(); ++p) {
      std::map<Key, std::vector<Eviction>> found;
      // Chooses `count` places of the set in rising order; none of the parts may be enough already.
      const auto visit = [&](const auto& self, SetId whole, SetId left, unsigned from, unsigned chosen,
                             std::uint64_t evicted) -> void {
        if (chosen == count) {
          const Ranked* fits = best_place(left, p);
          if (fits == nullptr) return;
          // Minimal: putting any one back leaves no room.
          for (std::uint64_t bits = evicted; bits != 0; bits &= bits - 1) {
            const SetId back = next(left, static_cast<unsigned>(std::countr_zero(bits)));
            if (best_place(back, p) != nullptr) return;
          }
          Key key;
          key.fill(0xff);
          unsigned at = 0;
          for (std::uint64_t bits = evicted; bits != 0; bits &= bits - 1)
            key[at++] = places_[static_cast<unsigned>(std::countr_zero(bits))].profile;
          std::sort(key.begin(), key.begin() + count, [this](std::uint8_t a, std::uint8_t b) {
            return size(a) != size(b) ? size(a) > size(b) : a < b;
          });
          ++ways;
          if (ways <= way_limit)
            found[key].push_back(
                {whole, fits->after, fits->place, evicted, waste(fits->after) - waste(whole)});
          return;
        }
        for (std::uint64_t bits = bits_[left]; bits != 0; bits &= bits - 1) {
          const auto place = static_cast<unsigned>(std::countr_zero(bits));
          if (place < from) continue;
          self(self, whole, without(left, place), place + 1, chosen + 1,
               evicted | (std::uint64_t{1} << place));
        }
      };
      for (std::size_t s = 0; s < bits_.size() && ways <= way_limit; ++s) {
        const auto set = static_cast<SetId>(s);
        if (best_place(set, p) == nullptr && instances(set) >= count) visit(visit, set, set, 0, 0, 0);
      }
      for (auto& [key, list] : found) {
        std::sort(list.begin(), list.end(), [this](const Eviction& a, const Eviction& b) {
          if (a.growth != b.growth) return a.growth < b.growth;
          if (free_[a.set] != free_[b.set]) return free_[a.set] < free_[b.set];
          if (a.set != b.set) return a.set < b.set;
          return a.evicted < b.evicted;
        });
        std::vector<std::uint64_t> sets(bits_.size() / 64 + 1, 0);
        for (const auto& way : list) sets[way.set / 64U] |= std::uint64_t{1} << (way.set % 64U);
        evictions_[p].push_back({key, count, std::move(list), std::move(sets)});
      }
    }
    if (ways > way_limit) {
      for (auto& lists : evictions_)
        std::erase_if(lists, [count](const Evictions& e) { return e.count >= count; });
      eviction_limit_ = count - 1;
      break;
    }
  }
  for (auto& lists : evictions_) {
    const auto units_of = [this](const Evictions& e) {
      unsigned sum = 0;
      for (unsigned i = 0; i < e.count; ++i) sum += size(e.profiles[i]);
      return sum;
    };
    std::sort(lists.begin(), lists.end(), [&](const Evictions& a, const Evictions& b) {
      if (a.count != b.count) return a.count < b.count;
      if (units_of(a) != units_of(b)) return units_of(a) < units_of(b);
      return a.profiles < b.profiles;
    });
  }
}

}  // namespace bulkhead::grid
