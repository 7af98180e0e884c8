// What simulate, fluid_capacity and solve share: a mix made regular and the graphs of the models.
#pragma once

#include <string>
#include <vector>

#include "core/churn/churn.hpp"
#include "core/churn/graph.hpp"

namespace bulkhead::churn {

struct Jobs {
  std::vector<std::string> profiles = {};  // kinds: weight above 0, each once
  std::vector<double> part = {};           // of all jobs; sums to 1
  std::vector<unsigned> slices = {};       // of one job: its size on the first pool that offers it
  std::vector<std::size_t> shares = {};    // index into Mix::shares
};

inline constexpr unsigned max_gpus = 1'000'000, max_pools = 64, max_kinds = 32;

Result<Jobs> jobs_of(const Mix& mix, std::span<const Pool> pools);
// One graph a pool.
Result<std::vector<Graph>> graphs_of(std::span<const Pool> pools, const Jobs& jobs);
Result<Fluid> fluid_of(std::span<const Pool> pools, const std::vector<Graph>& graphs, const Jobs& jobs);

}  // namespace bulkhead::churn
