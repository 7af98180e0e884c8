#include "core/mig/mig.hpp"

#include <algorithm>
#include <array>
#include <map>

#include <fmt/format.h>

#include "base/text.hpp"

namespace bulkhead::mig {

namespace {

using Mask = std::uint64_t;

// Real grids have 4, 8 or 12 slices and at most 8 instances. A driver that says more than these is not
// believed: they keep the exact search exact and short.
constexpr unsigned grid_limit = 64;
constexpr std::size_t instance_limit = 16;

std::optional<Mask> mask_of(const Placement& place) {
  if (place.size == 0 || place.size > grid_limit || place.start > grid_limit - place.size)
    return std::nullopt;
  const Mask ones = place.size == 64 ? ~Mask{0} : (Mask{1} << place.size) - 1;
  return ones << place.start;
}

// What instances share beside memory slices: compute slices and media engines.
constexpr std::size_t engine_kinds = 5;
using Engines = std::array<unsigned, engine_kinds>;

Engines engines_of(const Profile& profile) {
  return {profile.compute_slices, profile.decoders, profile.encoders, profile.jpeg_engines,
          profile.optical_flow};
}

// The whole GPU's engines: what its fullest profile gets. A kind is enforced only where the driver's own
// max_instances agree with that total; where they do not, the numbers are shared and say nothing.
Engines budget_of(const Geometry& geometry) {
  Engines budget{};
  for (const auto& profile : geometry.profiles) {
    const Engines engines = engines_of(profile);
    for (std::size_t k = 0; k < engine_kinds; ++k) budget[k] = std::max(budget[k], engines[k]);
  }
  for (const auto& profile : geometry.profiles) {
    const Engines engines = engines_of(profile);
    for (std::size_t k = 0; k < engine_kinds; ++k) {
      if (std::uint64_t{engines[k]} * profile.max_instances > budget[k]) budget[k] = ~0U;
    }
  }
  return budget;
}

// Occupation of a GPU while the search tries things.
struct Board {
  explicit Board(const Geometry& g) : geometry(g), budget(budget_of(g)), counts(g.profiles.size(), 0) {}

  const Geometry& geometry;
  Engines budget;
  Mask taken = 0;
  Engines used{};
  std::vector<unsigned> counts;

  std::size_t index(const Profile& profile) const {
    return static_cast<std::size_t>(&profile - geometry.profiles.data());
  }

  bool engines_left(const Profile& profile) const {
    const Engines engines = engines_of(profile);
    for (std::size_t k = 0; k < engine_kinds; ++k) {
      if (engines[k] > 0 && engines[k] > budget[k] - std::min(budget[k], used[k])) return false;
    }
    return true;
  }
  bool fits(const Profile& profile, Mask mask) const {
    return (taken & mask) == 0 && counts[index(profile)] < profile.max_instances && engines_left(profile);
  }
  void put(const Profile& profile, Mask mask) {
    taken |= mask;
    ++counts[index(profile)];
    const Engines engines = engines_of(profile);
    for (std::size_t k = 0; k < engine_kinds; ++k) used[k] += engines[k];
  }
  void take(const Profile& profile, Mask mask) {
    taken &= ~mask;
    --counts[index(profile)];
    const Engines engines = engines_of(profile);
    for (std::size_t k = 0; k < engine_kinds; ++k) used[k] -= engines[k];
  }
};

struct Piece {
  const Profile* profile = nullptr;
  std::optional<unsigned> at = {};
  unsigned variant = 0;
};

// Places pieces[i..] on the board, lowest starts first; equal pieces in rising order. Leaves the places in
// `out`.
bool pack(Board& board, std::span<const Piece> pieces, std::size_t i, std::vector<NewInstance>& out) {
  if (i == pieces.size()) return true;
  const Piece& piece = pieces[i];
  const Profile& profile = *piece.profile;
  unsigned from = 0;
  if (i > 0 && !piece.at && !pieces[i - 1].at && pieces[i - 1].profile == piece.profile)
    from = out.back().place.end();
  for (const unsigned start : profile.starts) {
    if (start < from || (piece.at && *piece.at != start)) continue;
    const Placement place{start, profile.size};
    const auto mask = mask_of(place);
    if (!mask || place.end() > board.geometry.memory_slices || !board.fits(profile, *mask)) continue;
    board.put(profile, *mask);
    out.push_back({profile.id, place, piece.variant});
    if (pack(board, pieces, i + 1, out)) return true;
    out.pop_back();
    board.take(profile, *mask);
  }
  return false;
}

// Largest first finds dead ends early; pins first among equals.
void order(std::vector<Piece>& pieces) {
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
    if (a.profile->size != b.profile->size) return a.profile->size > b.profile->size;
    if (a.at.has_value() != b.at.has_value()) return a.at.has_value();
    if (a.profile->id != b.profile->id) return a.profile->id < b.profile->id;
    return a.variant < b.variant;
  });
}

// The pieces still to be made when the kept instances stand for wanted ones; nullopt when one of them stands
// for none. Exact: an instance at a pinned start can serve that pin alone, for nothing else could be created
// there.
std::optional<std::vector<Piece>> missing(std::span<const Present> present, const std::vector<bool>& kept,
                                          const std::vector<Piece>& wanted) {
  std::vector<bool> served(wanted.size(), false);
  for (std::size_t i = 0; i < present.size(); ++i) {
    if (!kept[i] || !present[i].counts) continue;
    std::optional<std::size_t> serves;
    for (std::size_t w = 0; w < wanted.size(); ++w) {
      if (served[w] || wanted[w].profile->id != present[i].profile || wanted[w].variant != present[i].variant)
        continue;
      if (wanted[w].at) {
        if (*wanted[w].at != present[i].place.start) continue;
        serves = w;
        break;
      }
      if (!serves) serves = w;
    }
    if (!serves) return std::nullopt;
    served[*serves] = true;
  }
  std::vector<Piece> rest;
  for (std::size_t w = 0; w < wanted.size(); ++w) {
    if (!served[w]) rest.push_back(wanted[w]);
  }
  return rest;
}

// Calls visit(indices) for each way to choose `count` of `from`, fewest slices first; stops when it returns
// true.
template <class Visit>
bool choose(std::span<const Present> present, const std::vector<std::size_t>& from, std::size_t count,
            const Visit& visit) {
  std::vector<std::pair<unsigned, std::vector<std::size_t>>> choices;
  std::vector<std::size_t> at(count);
  for (std::size_t i = 0; i < count; ++i) at[i] = i;
  if (count > from.size()) return false;
  while (true) {
    std::vector<std::size_t> chosen;
    unsigned slices = 0;
    for (const auto i : at) {
      chosen.push_back(from[i]);
      slices += present[from[i]].place.size;
    }
    choices.emplace_back(slices, std::move(chosen));
    std::size_t i = count;
    while (i > 0 && at[i - 1] == from.size() - count + i - 1) --i;
    if (i == 0) break;
    ++at[i - 1];
    for (std::size_t j = i; j < count; ++j) at[j] = at[j - 1] + 1;
  }
  std::stable_sort(choices.begin(), choices.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  return std::any_of(choices.begin(), choices.end(),
                     [&](const auto& choice) { return visit(choice.second); });
}

std::optional<Recut> solve(const Geometry& geometry, std::span<const Present> present,
                           const std::vector<Piece>& wanted) {
  // Counting instances beyond the wanted number of their kind have to go; how many such there are bounds the
  // search from below.
  std::vector<std::size_t> movable;
  std::size_t counting = 0;
  for (std::size_t i = 0; i < present.size(); ++i) {
    if (present[i].movable) movable.push_back(i);
    if (present[i].counts) ++counting;
  }
  const std::size_t least = counting > wanted.size() ? counting - wanted.size() : 0;
  std::optional<Recut> found;
  for (std::size_t count = least; count <= movable.size() && !found; ++count) {
    choose(present, movable, count, [&](const std::vector<std::size_t>& destroyed) {
      std::vector<bool> kept(present.size(), true);
      for (const auto i : destroyed) kept[i] = false;
      auto pieces = missing(present, kept, wanted);
      if (!pieces) return false;
      order(*pieces);
      Board board(geometry);
      for (std::size_t i = 0; i < present.size(); ++i) {
        if (!kept[i]) continue;
        const auto mask = mask_of(present[i].place);
        if (const Profile* profile = geometry.by_id(present[i].profile); profile != nullptr) {
          board.put(*profile, mask.value_or(~Mask{0}));
        } else {
          board.taken |= mask.value_or(~Mask{0});
        }
      }
      std::vector<NewInstance> places;
      if (!pack(board, *pieces, 0, places)) return false;
      Recut recut;
      for (std::size_t i = 0; i < present.size(); ++i) (kept[i] ? recut.keep : recut.destroy).push_back(i);
      recut.create = std::move(places);
      found = std::move(recut);
      return true;
    });
  }
  return found;
}

std::string counted(const std::vector<Piece>& pieces) {
  std::map<std::string, unsigned> counts;
  std::vector<std::string> in_order;
  for (const auto& piece : pieces) {
    std::string name = piece.profile->name;
    if (piece.at) name += fmt::format(" at {}", *piece.at);
    if (counts[name]++ == 0) in_order.push_back(name);
  }
  std::vector<std::string> words;
  for (const auto& name : in_order)
    words.push_back(counts[name] > 1 ? fmt::format("{}x {}", counts[name], name) : name);
  return join(words, ", ");
}

// Why an empty GPU does not hold the pieces: the first bound that they break.
std::string why_never(const Geometry& geometry, const std::vector<Piece>& pieces) {
  const Engines budget = budget_of(geometry);
  std::map<const Profile*, unsigned> counts;
  unsigned slices = 0;
  Engines used{};
  for (const auto& piece : pieces) {
    ++counts[piece.profile];
    slices += piece.profile->size;
    const Engines engines = engines_of(*piece.profile);
    for (std::size_t k = 0; k < engine_kinds; ++k) used[k] += engines[k];
    if (piece.at && std::find(piece.profile->starts.begin(), piece.profile->starts.end(), *piece.at) ==
                        piece.profile->starts.end()) {
      return fmt::format("{} cannot start at {}: it starts at {}", piece.profile->name, *piece.at,
                         format_ranges(piece.profile->starts));
    }
  }
  for (const auto& [profile, count] : counts) {
    if (count > profile->max_instances) {
      return fmt::format("{}x {}: a GPU holds at most {}", count, profile->name, profile->max_instances);
    }
  }
  if (slices > geometry.memory_slices) {
    return fmt::format("{} need {} memory slices, the GPU has {}", counted(pieces), slices,
                       geometry.memory_slices);
  }
  static constexpr std::array<const char*, engine_kinds> names = {"compute slices", "decoders", "encoders",
                                                                  "JPEG engines", "optical-flow engines"};
  for (std::size_t k = 0; k < engine_kinds; ++k) {
    if (used[k] > budget[k]) {
      return fmt::format("{} need {} {}, the GPU has {}", counted(pieces), used[k], names[k], budget[k]);
    }
  }
  return fmt::format("{} find no placement together, even on an empty GPU", counted(pieces));
}

// "3g.40gb+me" -> 3, 40, "+me".
struct NameParts {
  std::uint64_t slices = 0, gigabytes = 0;
  std::string_view suffix = {};
};
std::optional<NameParts> parts_of(std::string_view name) {
  const auto g = name.find("g.");
  if (g == std::string_view::npos) return std::nullopt;
  const auto gb = name.find("gb", g + 2);
  if (gb == std::string_view::npos) return std::nullopt;
  const auto slices = parse_u64(name.substr(0, g));
  const auto gigabytes = parse_u64(name.substr(g + 2, gb - g - 2));
  if (!slices || !gigabytes || *gigabytes > 1U << 20U) return std::nullopt;
  return NameParts{*slices, *gigabytes, name.substr(gb + 2)};
}

}  // namespace

const Profile* Geometry::by_id(unsigned id) const {
  const auto at =
      std::find_if(profiles.begin(), profiles.end(), [&](const Profile& p) { return p.id == id; });
  return at == profiles.end() ? nullptr : &*at;
}

const Profile* Geometry::by_name(std::string_view name) const {
  std::string wanted = lower(trim(name));
  if (wanted.starts_with("mig ")) wanted.erase(0, 4);
  for (const auto& profile : profiles) {
    if (lower(profile.name) == wanted) return &profile;
  }
  const auto parts = parts_of(wanted);
  if (!parts) return nullptr;
  const Profile* found = nullptr;
  for (const auto& profile : profiles) {
    const std::string own = lower(profile.name);
    const auto theirs = parts_of(own);
    if (!theirs || theirs->slices != parts->slices || theirs->suffix != parts->suffix) continue;
    const auto apart =
        std::max(theirs->gigabytes, parts->gigabytes) - std::min(theirs->gigabytes, parts->gigabytes);
    if (apart > std::max<std::uint64_t>(1, theirs->gigabytes / 20)) continue;
    if (found != nullptr) return nullptr;
    found = &profile;
  }
  return found;
}

std::vector<std::string_view> Geometry::names() const {
  std::vector<std::string_view> out;
  for (const auto& profile : profiles) out.push_back(profile.name);
  return out;
}

std::variant<Recut, NoFit> recut(const Geometry& geometry, std::span<const Present> present,
                                 std::span<const Wanted> wanted) {
  if (geometry.memory_slices == 0 || geometry.memory_slices > grid_limit || present.size() > instance_limit) {
    return NoFit{fmt::format("a grid of {} memory slices with {} instances is beyond what is planned here",
                             geometry.memory_slices, present.size())};
  }
  std::vector<Piece> pieces;
  for (const auto& want : wanted) {
    const Profile* profile = geometry.by_id(want.profile);
    if (profile == nullptr) return NoFit{fmt::format("the GPU has no profile with id {}", want.profile)};
    pieces.push_back({profile, want.at, want.variant});
  }
  // An empty GPU first: it bounds the number of pieces, and what does not fit there fits nowhere.
  {
    auto all = pieces;
    order(all);
    Board empty(geometry);
    std::vector<NewInstance> places;
    if (all.size() > geometry.memory_slices || !pack(empty, all, 0, places))
      return NoFit{why_never(geometry, pieces)};
  }
  if (auto recut = solve(geometry, present, pieces)) return *std::move(recut);

  // Which unmovable ones are in the way: the smallest set whose freedom makes it fit.
  std::vector<std::size_t> fixed;
  for (std::size_t i = 0; i < present.size(); ++i) {
    if (!present[i].movable) fixed.push_back(i);
  }
  NoFit no;
  for (std::size_t count = 1; count <= fixed.size() && !no.way_out; ++count) {
    choose(present, fixed, count, [&](const std::vector<std::size_t>& freed) {
      std::vector<Present> then(present.begin(), present.end());
      for (const auto i : freed) then[i].movable = true;
      no.way_out = solve(geometry, then, pieces);
      if (no.way_out) no.blocking = freed;
      return no.way_out.has_value();
    });
  }
  std::vector<std::string> in_the_way;
  for (const auto i : no.blocking) {
    const Profile* profile = geometry.by_id(present[i].profile);
    in_the_way.push_back(
        fmt::format("{} (gi {}) at {}-{}", profile != nullptr ? profile->name : "an unknown profile",
                    present[i].gpu_instance, present[i].place.start, present[i].place.end() - 1));
  }
  no.why = pieces.empty()
               ? fmt::format("no instance is wanted, and {} may not be destroyed", join(in_the_way, ", "))
               : fmt::format("{} cannot be had while {} stay{}", counted(pieces), join(in_the_way, ", "),
                             in_the_way.size() == 1 ? "s" : "");
  return no;
}

bool legal(const Geometry& geometry, std::span<const NewInstance> instances) {
  Board board(geometry);
  for (const auto& instance : instances) {
    const Profile* profile = geometry.by_id(instance.profile);
    const auto mask = mask_of(instance.place);
    if (profile == nullptr || !mask || instance.place.size != profile->size ||
        instance.place.end() > geometry.memory_slices)
      return false;
    if (std::find(profile->starts.begin(), profile->starts.end(), instance.place.start) ==
        profile->starts.end())
      return false;
    if (!board.fits(*profile, *mask)) return false;
    board.put(*profile, *mask);
  }
  return true;
}

unsigned capacity(const Geometry& geometry, std::span<const NewInstance> taken, unsigned profile_id) {
  const Profile* profile = geometry.by_id(profile_id);
  if (profile == nullptr) return 0;
  Board board(geometry);
  for (const auto& instance : taken) {
    const auto mask = mask_of(instance.place);
    if (const Profile* its = geometry.by_id(instance.profile); its != nullptr) {
      board.put(*its, mask.value_or(~Mask{0}));
    } else {
      board.taken |= mask.value_or(~Mask{0});
    }
  }
  // Intervals of one length: taking the lowest free start each time is optimal.
  auto starts = profile->starts;
  std::sort(starts.begin(), starts.end());
  unsigned count = 0;
  for (const unsigned start : starts) {
    const auto mask = mask_of({start, profile->size});
    if (!mask || start + profile->size > geometry.memory_slices || !board.fits(*profile, *mask)) continue;
    board.put(*profile, *mask);
    ++count;
  }
  return count;
}

}  // namespace bulkhead::mig
