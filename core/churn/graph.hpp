// One GPU of a model as a graph: every set of instances of the mix's profiles that may lie on it, what each
// arrival can make of it and what each departure leaves.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/result.hpp"
#include "core/mig/mig.hpp"

namespace bulkhead::churn {

inline constexpr unsigned max_units = 32;           // of a grid
inline constexpr std::uint32_t max_states = 20000;  // instance sets of one model
inline constexpr std::uint32_t no_state = UINT32_MAX;

struct Instance {
  std::uint16_t kind = 0;  // index into Graph::kinds
  std::uint16_t start = 0;
  friend auto operator<=>(const Instance&, const Instance&) = default;
};

struct Move {  // an arrival placed
  std::uint16_t start = 0;
  std::uint32_t to = 0;
};

struct State {
  std::vector<Instance> instances = {};        // sorted
  std::uint32_t mask = 0;                      // memory slices taken
  unsigned taken = 0;                          // their number
  std::vector<std::vector<Move>> places = {};  // by kind, by start
  std::vector<std::uint32_t> without = {};     // the state left when instance i goes
};

struct Graph {
  mig::Geometry geometry = {};
  std::vector<const mig::Profile*> kinds = {};  // into `geometry`; null: this model does not offer the kind
  std::vector<State> states = {};               // state 0 is the empty GPU
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  Graph(Graph&&) =
      default;  // moving a vector leaves its elements where they are, and so the pointers in `kinds`
  Graph& operator=(Graph&&) = default;
};

Result<Graph> graph_of(const mig::Geometry& geometry, std::span<const std::string> profiles);

// Profiles without a suffix: "1g.10gb" but not "1g.10gb+me".
bool plain(const mig::Profile& profile);

// A fragmentation score after MFI (arXiv 2511.18906; written from its summary, its own formula may differ)
// for each state of the graph: for every plain profile that is no larger than the free memory slices, its
// size for each of its starts that something taken overlaps.
std::vector<unsigned> mfi_scores(const Graph& graph);

}  // namespace bulkhead::churn
