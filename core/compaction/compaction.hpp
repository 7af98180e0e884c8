// Background defragmentation of MIG fleets: which instances to move, in what order, so that the fleet uses fewest GPUs
// (`compact`) or has room for more (`what_if`: "would 12 more 3g.40gb fit, and with how many moves?"). Both are one
// integer program: each GPU keeps a subset of its instances and takes a multiset beside them, and what leaves one GPU
// must be taken by another. It is solved by linear programming over GPUs of equal content with branch and bound, so a
// small fleet is solved to the optimum and a large one to a stated bound. Pure and deterministic; no clock: work is
// bounded by nodes.
//
// A move makes the instance at its destination while it still runs at its source, then ends the source: a destination
// must be free, beside everything else on that GPU, when its turn comes. Moves are listed in an order that keeps this.
// Where moves block each other in a circle, one instance goes through a free place first (`Move::detour`).
//
// Ties. GPUs of equal content (pool, open, instances with profile, start, movable, price, visible) are interchangeable
// and are taken by rising index; instances of one profile that leave their GPUs are taken in the order of (GPU, start);
// destinations likewise. The same input gives the same answer on every machine with IEEE doubles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "core/grid/grid.hpp"
#include "core/mig/mig.hpp"

namespace bulkhead::compaction {

// Refused beyond (Errc::invalid).
inline constexpr std::size_t most_gpus = 200'000, most_pools = 64;
inline constexpr std::uint64_t most_price = 1'000'000'000;

struct Instance {
  std::uint64_t id = 0;  // the caller's name for it; unique in the fleet
  unsigned profile = 0;  // profile id in the geometry of its pool
  unsigned start = 0;    // in memory slices
  bool movable = true;
  // What one move costs, in one unit of the caller's choice for the whole fleet (milliseconds of interruption, MiB to
  // copy).
  std::uint64_t price = 1;
  bool visible = true;  // the tenant notices; false: idle
  friend bool operator==(const Instance&, const Instance&) = default;
};

struct Gpu {
  unsigned pool = 0;  // index into Fleet::pools
  bool open = true;   // may take instances (false: cordoned, tainted, too hot); what is on it may leave either way
  std::vector<Instance> instances = {};
};

// GPUs among which instances may move: one geometry, and whatever else the caller keeps apart (a node's taint, a
// class). Instances never leave their pool.
struct Fleet {
  std::vector<mig::Geometry> pools = {};
  std::vector<Gpu> gpus = {};
  // Tables of the pools' geometries where the caller has them, one a pool; missing or null ones are made (10 to 50 ms
  // each).
  std::vector<std::shared_ptr<const grid::Tables>> tables = {};
};

struct Limits {
  std::optional<std::uint64_t> moves = {};    // at most so many, detours counted
  std::optional<std::uint64_t> price = {};    // at most so much in total
  std::optional<std::uint64_t> visible = {};  // at most so many moves that a tenant notices
  std::uint64_t nodes =
      2'000;  // linear programs solved at most per question; then the best found is returned, not `proven`
};

struct Place {
  std::size_t gpu = 0;  // index into Fleet::gpus
  unsigned start = 0;
  friend auto operator<=>(const Place&, const Place&) = default;
};

struct Move {
  std::uint64_t instance = 0;
  unsigned profile = 0;
  Place from = {}, to = {};
  std::uint64_t price = 0;
  bool visible = true;
  bool detour = false;   // a stop on the way, to open a circle; the instance moves again later
  bool empties = false;  // nothing is left on from.gpu after it
  friend bool operator==(const Move&, const Move&) = default;
};

struct Moves {
  std::vector<Move> list = {};  // executable in this order
  std::uint64_t price = 0;
  std::uint64_t visible = 0;
};

// Answers of `compact`. GPUs in use: those that hold an instance.
struct Plan {
  Moves moves = {};
  std::size_t before = 0, after = 0;    // GPUs in use
  std::vector<std::size_t> freed = {};  // in use before, empty after; rising
  // The fewest GPUs that can hold the instances while the unmovable stay where they are, whatever the moves cost: no
  // plan can do better. Proven: `fewest` is reached by some target; otherwise it is a lower bound.
  std::size_t fewest = 0;
  bool fewest_proven = false;
  // `after` is the least under the limits, and the moves are the cheapest way there: fewest GPUs, then the lowest sum
  // of (price + 1) over the moves. Detours are outside this promise (a limit is kept all the same).
  bool proven = false;
  std::uint64_t cheapest = 0;  // lower bound of that sum for `after` GPUs
  std::vector<std::string> remains =
      {};  // why not fewer, for a reader: limits that bind, unmovable instances that hold GPUs
};
// Fewest GPUs in use, then the cheapest moves.
Result<Plan> compact(const Fleet& fleet, const Limits& limits = {});

struct Wanted {
  std::string profile = {};  // "3g.40gb", as mig::Geometry::by_name takes it
  std::uint64_t count = 1;
  std::optional<unsigned> pool = {};  // only there; empty: any pool that has the profile
};
struct New {
  std::size_t wanted = 0;  // index of the Wanted it serves
  unsigned profile = 0;
  Place at = {};
  friend auto operator<=>(const New&, const New&) = default;
};
enum class Fit {
  now,         // without any move
  with_moves,  // after `moves`
  partly,      // `fits` of it, after `moves`
  no,          // nothing of it
};
struct WhatIf {
  Fit fit = Fit::no;
  std::vector<New> places = {};          // free once `moves` are done; sorted
  Moves moves = {};                      // lowest sum of (price + 1) for the greatest `fits`
  std::vector<std::uint64_t> fits = {};  // for each Wanted, how many fit under the limits: most memory slices in total
  bool proven = false;                   // `fits` is the most, and `moves` the cheapest (detours aside)
  // The nearest way to yes; filled when not all fits.
  struct MoreGpus {
    unsigned pool = 0;
    std::uint64_t count = 0;
  };
  std::vector<MoreGpus> more_gpus =
      {};  // empty GPUs which, added to the fleet, make all fit under the limits: fewest in total
  std::optional<Moves> without_limits = {};     // all fits with these moves if Limits allowed them
  std::vector<std::uint64_t> blocking = {};     // unmovable instances, fewest, without which all would fit
  std::vector<std::uint64_t> free_slices = {};  // for each Wanted: free memory slices on open GPUs of its pools
  std::vector<std::uint64_t> fits_now = {};     // for each Wanted alone: how many fit without a move
  std::string why =
      {};  // one or two sentences for a reader: what is missing and the nearest way to yes; "" for Fit::now
};
// Would these fit beside what runs?
Result<WhatIf> what_if(const Fleet& fleet, std::span<const Wanted> wanted, const Limits& limits = {});

// Plays moves step by step: the fleet after them, or the first move that is not legal in its turn. The judge of what
// the planner says, with no arithmetic of its own beyond mig::legal.
Result<Fleet> play(const Fleet& fleet, std::span<const Move> moves);

}  // namespace bulkhead::compaction
