#include <algorithm>
#include <bit>

#include <fmt/format.h>

#include "core/grid/grid.hpp"

namespace bulkhead::grid {

namespace {

// Lists of evictions past this are cut back: a geometry nobody sells would fill the memory otherwise.
constexpr std::size_t eviction_entries = 4U << 20U;

template <class Visit>
void each_bit(std::uint64_t bits, const Visit& visit) {
  for (; bits != 0; bits &= bits - 1) visit(static_cast<unsigned>(std::countr_zero(bits)));
}

}  // namespace

namespace {
// Whether another profile lies in just the same places and is there more often (1g.10gb beside 1g.10gb+me):
// what one cannot use the other cannot either, and counting it twice would make small holes look dearer than
// they are.
bool shadowed(const mig::Geometry& geometry, std::size_t p) {
  const mig::Profile& profile = geometry.profiles[p];
  for (std::size_t q = 0; q < geometry.profiles.size(); ++q) {
    const mig::Profile& other = geometry.profiles[q];
    if (q == p || other.size != profile.size || other.starts != profile.starts) continue;
    if (other.max_instances > profile.max_instances ||
        (other.max_instances == profile.max_instances && q < p))
      return true;
  }
  return false;
}
}  // namespace

Result<Tables> Tables::make(const mig::Geometry& geometry, std::span<const unsigned> weights) {
  const auto refuse = [](std::string why) {
    return Error(Errc::invalid, "MIG geometry: " + why, "compare with: nvidia-smi mig -lgipp");
  };
  if (geometry.profiles.empty()) return refuse("the driver names no profile");
  if (geometry.memory_slices == 0 || geometry.memory_slices > max_units)
    return refuse(
        fmt::format("a grid of {} memory slices, wanted 1 to {}", geometry.memory_slices, max_units));
  if (!weights.empty() && weights.size() != geometry.profiles.size())
    return refuse(fmt::format("{} weights for {} profiles", weights.size(), geometry.profiles.size()));
  Tables tables;
  tables.geometry_ = geometry;
  for (std::size_t p = 0; p < geometry.profiles.size(); ++p) {
    auto& profile = tables.geometry_.profiles[p];
    for (std::size_t q = 0; q < p; ++q) {
      if (geometry.profiles[q].id == profile.id)
        return refuse(fmt::format("two profiles have id {}", profile.id));
    }
    std::sort(profile.starts.begin(), profile.starts.end());
    profile.starts.erase(std::unique(profile.starts.begin(), profile.starts.end()), profile.starts.end());
    if (profile.starts.empty()) return refuse(fmt::format("{} has no placement", profile.name));
    if (profile.size == 0 || profile.size > geometry.memory_slices ||
        profile.starts.back() > geometry.memory_slices - profile.size)
      return refuse(fmt::format("{} of {} slices starts at {}, beyond the grid of {}", profile.name,
                                profile.size, profile.starts.back(), geometry.memory_slices));
    if (tables.places_.size() + profile.starts.size() > max_places)
      return refuse(fmt::format("more than {} placements", max_places));
    tables.first_place_.push_back(static_cast<unsigned>(tables.places_.size()));
    const std::uint32_t ones = profile.size == 32 ? ~0U : (1U << profile.size) - 1;
    for (const unsigned start : profile.starts)
      tables.places_.push_back({static_cast<std::uint8_t>(p), static_cast<std::uint8_t>(start),
                                static_cast<std::uint8_t>(profile.size), ones << start});
    const unsigned weight = weights.empty() ? (shadowed(geometry, p) ? 0 : profile.size) : weights[p];
    if (weight > max_weight)
      return refuse(fmt::format("weight {} of {}, wanted at most {}", weight, profile.name, max_weight));
    tables.weights_.push_back(weight);
  }
  tables.first_place_.push_back(static_cast<unsigned>(tables.places_.size()));
  BH_CHECK(tables.enumerate());
  tables.pack_and_rank();
  tables.list_evictions();
  tables.recognise();
  return tables;
}

// A part of a legal set is legal (mig::legal only adds up), so every legal set is reached by adding one place
// after the other, and growing the sets of n instances gives all those of n + 1.
Status Tables::enumerate() {
  bits_.push_back(0);
  masks_.push_back(0);
  std::vector<mig::NewInstance> instances;
  for (std::size_t level = 0; level < bits_.size();) {
    const std::size_t level_end = bits_.size();
    std::vector<std::uint64_t> grown;
    for (std::size_t s = level; s < level_end; ++s) {
      instances.clear();
      each_bit(bits_[s], [&](unsigned place) {
        instances.push_back(
            {geometry_.profiles[places_[place].profile].id, {places_[place].start, places_[place].size}});
      });
      // Only places above the highest there: each set is made once.
      const auto from = static_cast<std::size_t>(std::bit_width(bits_[s]));
      for (std::size_t place = from; place < places_.size(); ++place) {
        const Place& at = places_[place];
        if ((masks_[s] & at.mask) != 0) continue;
        instances.push_back({geometry_.profiles[at.profile].id, {at.start, at.size}});
        if (mig::legal(geometry_, instances)) grown.push_back(bits_[s] | (std::uint64_t{1} << place));
        instances.pop_back();
        if (grown.size() + bits_.size() > max_sets) {
          return Error(
              Errc::unsupported,
              fmt::format(
                  "MIG geometry: more than {} instance sets: too many placements ({}) to be planned for",
                  max_sets, places_.size()),
              "name fewer profiles");
        }
      }
    }
    std::sort(grown.begin(), grown.end());
    for (const auto bits : grown) {
      std::uint32_t mask = 0;
      each_bit(bits, [&](unsigned place) { mask |= places_[place].mask; });
      bits_.push_back(bits);
      masks_.push_back(mask);
    }
    level = level_end;
  }
  for (std::size_t s = 0; s < bits_.size(); ++s) by_bits_.emplace_back(bits_[s], static_cast<SetId>(s));
  std::sort(by_bits_.begin(), by_bits_.end());
  next_.assign(bits_.size() * places_.size(), no_set);
  without_.assign(bits_.size() * places_.size(), no_set);
  for (std::size_t s = 0; s < bits_.size(); ++s) {
    free_.push_back(static_cast<std::uint8_t>(units() - static_cast<unsigned>(std::popcount(masks_[s]))));
    each_bit(bits_[s], [&](unsigned place) {
      const SetId less = *find(bits_[s] & ~(std::uint64_t{1} << place));
      without_[s * places_.size() + place] = less;
      next_[less * places_.size() + place] = static_cast<SetId>(s);
    });
  }
  return ok_status();
}

void Tables::pack_and_rank() {
  const std::size_t profiles = profile_count();
  maxpack_.assign(bits_.size() * profiles, 0);
  waste_.assign(bits_.size(), 0);
  rank_of_.assign(bits_.size() * profiles, no_rank);
  ranked_.resize(profiles);
  // Sets are in rising count of instances: what a placement leads to has been counted already.
  for (std::size_t s = bits_.size(); s-- > 0;) {
    for (unsigned p = 0; p < profiles; ++p) {
      unsigned most = 0;
      for (unsigned place = first_place_[p]; place < first_place_[p + 1]; ++place) {
        const SetId more = next(static_cast<SetId>(s), place);
        if (more != no_set) most = std::max(most, 1 + maxpack(more, p));
      }
      maxpack_[s * profiles + p] = static_cast<std::uint8_t>(most);
      waste_[s] += static_cast<std::int32_t>(weights_[p] * (free_[s] - size(p) * most));
    }
  }
  for (unsigned p = 0; p < profiles; ++p) {
    auto& ranked = ranked_[p];
    for (std::size_t s = 0; s < bits_.size(); ++s) {
      const auto set = static_cast<SetId>(s);
      std::optional<Ranked> best;
      for (unsigned place = first_place_[p]; place < first_place_[p + 1]; ++place) {
        const SetId after = next(set, place);
        if (after != no_set && (!best || growth(set, place) < best->growth))
          best = Ranked{set, after, static_cast<std::uint8_t>(place), growth(set, place)};
      }
      if (best) ranked.push_back(*best);
    }
    std::sort(ranked.begin(), ranked.end(), [this](const Ranked& a, const Ranked& b) {
      if ((a.set == 0) != (b.set == 0)) return b.set == 0;
      if (a.growth != b.growth) return a.growth < b.growth;
      if (free_[a.set] != free_[b.set]) return free_[a.set] < free_[b.set];
      if (places_[a.place].start != places_[b.place].start)
        return places_[a.place].start < places_[b.place].start;
      return a.set < b.set;
    });
    for (std::size_t r = 0; r < ranked.size(); ++r)
      rank_of_[ranked[r].set * profiles + p] = static_cast<std::uint16_t>(r);
  }
}

std::optional<unsigned> Tables::profile_of_id(unsigned profile_id) const {
  for (unsigned p = 0; p < profile_count(); ++p) {
    if (geometry_.profiles[p].id == profile_id) return p;
  }
  return std::nullopt;
}

std::optional<unsigned> Tables::place_of(unsigned profile, unsigned start) const {
  if (profile >= profile_count()) return std::nullopt;
  for (unsigned place = first_place_[profile]; place < first_place_[profile + 1]; ++place) {
    if (places_[place].start == start) return place;
  }
  return std::nullopt;
}

std::optional<SetId> Tables::find(std::uint64_t bits) const {
  const auto at = std::lower_bound(by_bits_.begin(), by_bits_.end(), std::pair(bits, SetId{0}));
  if (at == by_bits_.end() || at->first != bits) return std::nullopt;
  return at->second;
}

unsigned Tables::instances(SetId set) const { return static_cast<unsigned>(std::popcount(bits_[set])); }

}  // namespace bulkhead::grid
