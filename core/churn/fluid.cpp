// The linear program of the fluid capacity. Columns: the count vectors of maximal instance sets, a pool each.
// Variables: how many GPUs spend their time in each. maximise theta, theta * part_k <= sum over columns of
// count_k * x, sum of x in a pool <= its GPUs. Small and dense: rows are profiles and pools. A tableau with
// Bland's rule cannot cycle; what it ends with is proved by its own dual, from the columns as they were at
// the start.
#include <algorithm>
#include <cmath>
#include <set>

#include <fmt/format.h>

#include "core/churn/fleet.hpp"

namespace bulkhead::churn {

namespace {

struct Column {
  std::size_t pool = 0;
  std::vector<unsigned> counts = {};
};

std::vector<Column> columns_of(const std::vector<Graph>& graphs) {
  std::vector<Column> columns;
  for (std::size_t pool = 0; pool < graphs.size(); ++pool) {
    std::set<std::vector<unsigned>> vectors;
    for (const auto& state : graphs[pool].states) {
      if (std::any_of(state.places.begin(), state.places.end(),
                      [](const auto& moves) { return !moves.empty(); }))
        continue;
      std::vector<unsigned> counts(graphs[pool].kinds.size(), 0);
      for (const auto& instance : state.instances) ++counts[instance.kind];
      vectors.insert(std::move(counts));
    }
    for (const auto& counts : vectors) {
      // A maximal set may hold less of everything than another (1g on both sides of a 2g start); only speed
      // is at stake.
      const bool beaten =
          vectors.size() <= 2000 && std::any_of(vectors.begin(), vectors.end(), [&](const auto& other) {
            return &other != &counts &&
                   std::equal(counts.begin(), counts.end(), other.begin(), std::less_equal<>{});
          });
      if (!beaten) columns.push_back({pool, counts});
    }
  }
  return columns;
}

}  // namespace

Result<Jobs> jobs_of(const Mix& mix, std::span<const Pool> pools) {
  if (pools.empty() || pools.size() > max_pools)
    return Error(Errc::invalid,
                 fmt::format("{} pools of GPUs: 1 to {} are understood", pools.size(), max_pools));
  std::uint64_t gpus = 0;
  for (const auto& pool : pools) gpus += pool.gpus;
  if (gpus == 0 || gpus > max_gpus)
    return Error(Errc::invalid, fmt::format("{} GPUs: 1 to {} are understood", gpus, max_gpus));
  Jobs jobs;
  double sum = 0;
  for (std::size_t i = 0; i < mix.shares.size(); ++i) {
    const auto& share = mix.shares[i];
    if (!std::isfinite(share.weight) || share.weight < 0 || share.weight > 1e12)
      return Error(Errc::invalid,
                   fmt::format("mix '{}': weight {} of {}", mix.name, share.weight, share.profile));
    if (share.weight == 0) continue;
    if (std::find(jobs.profiles.begin(), jobs.profiles.end(), share.profile) != jobs.profiles.end())
      return Error(Errc::invalid, fmt::format("mix '{}' names {} twice", mix.name, share.profile));
    const mig::Profile* offered = nullptr;
    for (const auto& pool : pools)
      if (offered == nullptr && pool.gpus != 0) offered = pool.geometry.by_name(share.profile);
    if (offered == nullptr || offered->starts.empty()) {
      return Error(Errc::invalid,
                   fmt::format("mix '{}' asks for {}, which no pool offers", mix.name, share.profile),
                   fmt::format("the first pool offers {}", fmt::join(pools.front().geometry.names(), ", ")));
    }
    jobs.profiles.push_back(share.profile);
    jobs.part.push_back(share.weight);
    jobs.slices.push_back(offered->size);
    jobs.shares.push_back(i);
    sum += share.weight;
  }
  if (jobs.profiles.empty() || jobs.profiles.size() > max_kinds) {
    return Error(Errc::invalid,
                 fmt::format("mix '{}' has {} profiles with a weight above 0: 1 to {} are understood",
                             mix.name, jobs.profiles.size(), max_kinds));
  }
  for (auto& part : jobs.part) part /= sum;
  return jobs;
}

Result<std::vector<Graph>> graphs_of(std::span<const Pool> pools, const Jobs& jobs) {
  std::vector<Graph> graphs;
  for (std::size_t i = 0; i < pools.size(); ++i) {
    auto graph = graph_of(pools[i].geometry, jobs.profiles);
    if (!graph) return std::move(graph).error().in(fmt::format("pool {}", i));
    graphs.push_back(std::move(*graph));
  }
  return graphs;
}

Result<Fluid> fluid_of(std::span<const Pool> pools, const std::vector<Graph>& graphs, const Jobs& jobs) {
  const auto columns = columns_of(graphs);
  const std::size_t kinds = jobs.profiles.size(), rows = kinds + pools.size(), theta = columns.size();
  const std::size_t width = columns.size() + 1 + rows + 1, right = width - 1;
  std::vector<std::vector<double>> table(rows + 1, std::vector<double>(width, 0));
  for (std::size_t j = 0; j < columns.size(); ++j) {
    for (std::size_t k = 0; k < kinds; ++k) table[k][j] = -static_cast<double>(columns[j].counts[k]);
    table[kinds + columns[j].pool][j] = 1;
  }
  std::vector<std::size_t> basis(rows);
  for (std::size_t i = 0; i < rows; ++i) {
    if (i < kinds) table[i][theta] = jobs.part[i];
    table[i][theta + 1 + i] = 1;
    basis[i] = theta + 1 + i;
    if (i >= kinds) table[i][right] = static_cast<double>(pools[i - kinds].gpus);
  }
  auto& costs = table[rows];
  costs[theta] = -1;
  constexpr double tiny = 1e-11;
  Fluid fluid;
  fluid.columns = columns.size();
  constexpr std::size_t most_pivots = 200'000;
  for (;;) {
    std::size_t enter = width;
    for (std::size_t j = 0; j < right && enter == width; ++j)
      if (costs[j] < -1e-10) enter = j;
    if (enter == width) break;
    std::size_t leave = rows;
    for (std::size_t i = 0; i < rows; ++i) {
      if (table[i][enter] <= tiny) continue;
      if (leave == rows) {
        leave = i;
        continue;
      }
      const double mine = table[i][right] / table[i][enter], best = table[leave][right] / table[leave][enter];
      if (mine < best - tiny || (mine <= best + tiny && basis[i] < basis[leave])) leave = i;
    }
    if (leave == rows || ++fluid.pivots > most_pivots)
      return Error(Errc::no_capacity, "the fluid capacity of this mix cannot be worked out",
                   "a simpler mix or fewer pools");
    const double pivot = table[leave][enter];
    for (auto& cell : table[leave]) cell /= pivot;
    for (std::size_t i = 0; i <= rows; ++i) {
      const double factor = i == leave ? 0.0 : table[i][enter];
      if (factor == 0.0) continue;
      for (std::size_t j = 0; j < width; ++j) table[i][j] -= factor * table[leave][j];
    }
    basis[leave] = enter;
  }
  fluid.jobs = costs[right];
  for (std::size_t k = 0; k < kinds; ++k) fluid.slices += fluid.jobs * jobs.part[k] * jobs.slices[k];

  // The dual as a proof: prices of jobs whose mean is 1, under which no set of a pool is worth more than its
  // GPU costs; then no fleet time can be worth more than the GPUs together.
  std::vector<double> price(kinds), rent(pools.size(), 0);
  double mean = 0;
  for (std::size_t k = 0; k < kinds; ++k)
    price[k] = std::max(0.0, costs[theta + 1 + k]), mean += price[k] * jobs.part[k];
  for (const auto& column : columns) {
    double worth = 0;
    for (std::size_t k = 0; k < kinds; ++k) worth += price[k] * column.counts[k];
    rent[column.pool] = std::max(rent[column.pool], worth);
  }
  double bound = 0;
  for (std::size_t p = 0; p < pools.size(); ++p) bound += rent[p] * pools[p].gpus;
  if (mean <= 0 || fluid.jobs <= 0 || std::abs(bound / mean - fluid.jobs) > 1e-9 * fluid.jobs)
    return Error(Errc::no_capacity, "the fluid capacity of this mix could not be proved",
                 "a simpler mix or fewer pools");
  for (auto& each : price) each /= mean;
  fluid.price = std::move(price);
  return fluid;
}

Result<Fluid> fluid_capacity(std::span<const Pool> pools, const Mix& mix) {
  BH_TRY(const auto jobs, jobs_of(mix, pools));
  BH_TRY(const auto graphs, graphs_of(pools, jobs));
  BH_TRY(auto fluid, fluid_of(pools, graphs, jobs));
  std::vector<double> by_share(mix.shares.size(), 0);
  for (std::size_t k = 0; k < jobs.shares.size(); ++k) by_share[jobs.shares[k]] = fluid.price[k];
  fluid.price = std::move(by_share);
  return fluid;
}

}  // namespace bulkhead::churn
