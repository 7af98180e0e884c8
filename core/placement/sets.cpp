#include "core/placement/sets.hpp"

#include <algorithm>
#include <bit>
#include <utility>

namespace bulkhead::placement {

namespace {

constexpr unsigned table_limit = 8;
constexpr unsigned most_left = 16;
constexpr std::uint32_t most_links = 255;             // of one pair
constexpr std::uint32_t most_sum = most_links * 120;  // of the pairs of 16
constexpr std::size_t seen_limit = std::size_t{1} << 16U;

std::uint64_t pack(const SetScore& s) {
  std::uint64_t key = s.weakest;
  key = key << 15U | s.links;
  key = key << 5U | s.numa;
  key = key << 5U | s.dynamic;
  key = key << 5U | s.left;
  key = key << 15U | s.left_links;
  return key << 5U | s.left_block;
}

}  // namespace

SetTable::SetTable(Shape shape) : shape_(std::move(shape)) {
  if (shape_.gpus > table_limit) return;
  const std::uint32_t masks = 1U << shape_.gpus;
  table_.resize(masks * (table_limit + 1));
  // Every subset of every mask, rising, so that the lowest bits win a tie.
  for (std::uint32_t free = 1; free < masks; ++free) {
    for (std::uint32_t set = free & (~free + 1);; set = (set - free) & free) {
      const std::uint64_t key = pack(score(set, free));
      Best& best = table_[free * (table_limit + 1) + static_cast<unsigned>(std::popcount(set))];
      if (best.gpus == 0 || key < best.key) best = {key, set};
      if (set == free) break;
    }
  }
}

SetScore SetTable::score(std::uint32_t set, std::uint32_t free) const {
  const auto between = [&](unsigned a, unsigned b) -> std::uint32_t {
    return shape_.links.empty() ? 0 : shape_.links[a * shape_.gpus + b];
  };
  const auto sum = [&](std::uint32_t gpus, std::uint32_t& weakest) {
    std::uint32_t links = 0;
    for (std::uint32_t a = gpus; a != 0; a &= a - 1) {
      for (std::uint32_t b = a & (a - 1); b != 0; b &= b - 1) {
        const std::uint32_t its =
            between(static_cast<unsigned>(std::countr_zero(a)), static_cast<unsigned>(std::countr_zero(b)));
        links += its;
        weakest = std::min(weakest, its);
      }
    }
    return links;
  };
  const auto numa_of = [&](unsigned gpu) -> unsigned { return shape_.numa.empty() ? 0 : shape_.numa[gpu]; };
  SetScore s;
  std::uint32_t weakest = most_links, unused = most_links;
  s.links = most_sum - sum(set, weakest);
  s.weakest = most_links - weakest;
  for (std::uint32_t rest = set; rest != 0; ++s.numa) {
    const unsigned node = numa_of(static_cast<unsigned>(std::countr_zero(rest)));
    for (std::uint32_t bits = rest; bits != 0; bits &= bits - 1) {
      const auto gpu = static_cast<unsigned>(std::countr_zero(bits));
      if (numa_of(gpu) == node) rest &= ~(1U << gpu);
    }
  }
  s.dynamic = static_cast<std::uint32_t>(std::popcount(set & shape_.dynamic));
  const std::uint32_t left = free & ~set;
  s.left = static_cast<std::uint32_t>(std::popcount(left));
  s.left_links = most_sum - sum(left, unused);
  std::uint32_t block = 0;
  for (std::uint32_t bits = left; bits != 0; bits &= bits - 1) {
    std::uint32_t same = 0;
    for (std::uint32_t other = left; other != 0; other &= other - 1)
      same += numa_of(static_cast<unsigned>(std::countr_zero(other))) ==
                      numa_of(static_cast<unsigned>(std::countr_zero(bits)))
                  ? 1
                  : 0;
    block = std::max(block, same);
  }
  s.left_block = most_left - block;
  return s;
}

SetTable::Best SetTable::work_out(std::uint32_t free, unsigned k) const {
  Best best;
  const auto count = static_cast<unsigned>(std::popcount(free));
  if (k == 0 || k > count) return best;
  std::array<unsigned, 16> at = {};
  for (unsigned i = 0; std::uint32_t bits = i < count ? free : 0; ++i) {
    for (unsigned skip = 0; skip < i; ++skip) bits &= bits - 1;
    at[i] = static_cast<unsigned>(std::countr_zero(bits));
  }
  // Every k of `count` in rising value (Gosper), spread over the free bits.
  for (std::uint32_t pick = (1U << k) - 1; pick < 1U << count;) {
    std::uint32_t set = 0;
    for (std::uint32_t bits = pick; bits != 0; bits &= bits - 1)
      set |= 1U << at[static_cast<unsigned>(std::countr_zero(bits))];
    const std::uint64_t key = pack(score(set, free));
    if (best.gpus == 0 || key < best.key) best = {key, set};
    const std::uint32_t low = pick & (~pick + 1), carry = pick + low;
    pick = carry | (((pick ^ carry) >> 2U) / low);
  }
  return best;
}

const SetTable::Best& SetTable::best(std::uint32_t free, unsigned k) const {
  static const Best none = {};
  free &= shape_.gpus >= 32 ? ~0U : (1U << shape_.gpus) - 1;
  if (k == 0 || k > static_cast<unsigned>(std::popcount(free))) return none;
  if (shape_.gpus <= table_limit) return table_[free * (table_limit + 1) + k];
  const std::uint32_t name = free << 5U | k;
  const auto known = seen_.find(name);
  if (known != seen_.end()) return known->second;
  if (seen_.size() >= seen_limit) seen_.clear();
  return seen_.emplace(name, work_out(free, k)).first->second;
}

}  // namespace bulkhead::placement
