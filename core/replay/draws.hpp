// What chance decides in an experiment, drawn as the original draws it. Private to core/replay.
#pragma once

#include <cstdint>
#include <vector>

#include "core/replay/go_random.hpp"
#include "core/replay/replay.hpp"

namespace bulkhead::replay {

struct Draws {
  std::vector<std::uint32_t> arrivals;  // pods
  std::vector<std::uint32_t> named;     // nodes in the order of their names
  std::vector<std::uint32_t> shuffled;  // nodes in the order in which policies break ties
  GoRandom random;                      // after all of those
};
// All pods shuffled, then left out or drawn until `target` GPU milli; see sample(). `target` is no whole
// number because the original compares with none. Errc::invalid: more than kMostArrivals.
Result<Draws> sampled(const NodeList& nodes, const PodList& pods, double target, std::uint64_t seed);
// Without arrivals.
Draws of_nodes(const NodeList& nodes, std::uint64_t seed);

}  // namespace bulkhead::replay
