// The linear relaxation of a Program, or of a part of it with choices ruled out: see program.hpp.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/compaction/program.hpp"

namespace bulkhead::compaction {

struct LpSet {
  const Choices* choices = nullptr;
  const Listed* listed = nullptr;      // the same, when written out
  std::span<const Handle> among = {};  // of a listed set: only these; empty: all
  std::int64_t count = 1;
};
struct Part {
  unsigned set = 0;
  Handle handle = 0;
  double amount = 0;
};
struct LpSolution {
  enum class State { optimal, infeasible, stopped } state = State::stopped;
  double value = 0;
  // A lower bound of the value that holds whatever the arithmetic did: the Lagrangian at the prices, less its rounding.
  double bound = 0;
  std::vector<double> prices = {};
  std::vector<Part> parts = {};  // every choice with an amount above zero, set by set
};

// `keys`: a choice for each set to start from, or empty. `penalty`: what a unit short in a row is worth paying at the
// start, somewhat above what it will be worth in the end; 0: not known.
LpSolution relax(std::span<const std::int64_t> bounds, std::span<const LpSet> sets, std::span<const Handle> keys,
                 double penalty, std::uint64_t most_pivots);

}  // namespace bulkhead::compaction
