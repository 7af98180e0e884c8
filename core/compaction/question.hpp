// One question to the integer program, and its answer read back as targets.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "core/compaction/model.hpp"

namespace bulkhead::compaction {

// A Wanted with its profile found in each pool.
struct Ask {
  std::uint64_t count = 0;
  std::int64_t weight = 1;        // memory slices of one
  std::vector<int> profile = {};  // per pool: profile index, -1: not there
};

struct Question {
  std::vector<unsigned> pools = {};
  Costs costs = {};
  Limits limits = {};  // nodes is not read
  std::optional<std::int64_t> most_used = {};
  std::vector<Ask> asks = {};
  bool may_fail = false;                        // an ask may stay unmet
  bool unmet_costs = false;                     // its weight
  std::optional<std::int64_t> most_unmet = {};  // weight
  bool extra = false;                           // empty GPUs may be added, each at a cost of 1
};

struct Answer {
  Solution solution = {};
  std::vector<std::vector<Target>> targets = {};           // per pool of the model: every GPU of it
  std::vector<std::vector<std::uint64_t>> given = {};      // [ask][pool]
  std::vector<std::uint64_t> extra = {};                   // per pool
  std::vector<std::shared_ptr<const Offers>> offers = {};  // per pool; null: not asked
};

Answer ask(const Model& model, const Question& question, std::uint64_t& nodes);

// The fewest GPUs of a pool that hold what is there, unmovable instances staying: cost and bound of the solution.
Solution fewest(const Model& model, unsigned pool, std::uint64_t& nodes);

// GPUs of a pool in use.
std::size_t in_use(const Model& model, unsigned pool);

// The moves of all pools of an answer, and where the asked go: New::wanted is the ask's index.
Ordered carry_out(const Model& model, const Question& question, Answer& answer);

}  // namespace bulkhead::compaction
