// The integer program behind the planner: sets of equal things, each of which takes exactly one of its choices, under a
// few rows "sum of values >= bound" that tie the sets together; least cost. Solved by the simplex method with
// generalised upper bounds (the basis is as large as the rows, however many sets there are, and so at most as many sets
// as rows come out fractional), by branch and bound where the program is small, and by fixing what came out whole where
// it is large.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace bulkhead::compaction {

using Handle = std::uint32_t;  // names a choice within its set

struct Entry {
  unsigned row = 0;
  std::int64_t value = 0;
};
struct Choice {
  std::int64_t cost = 0;
  std::vector<Entry> entries = {};
};

// The choices of a set. `best` minimises weight * cost - prices . values over all of them; prices are never negative.
// Ties go to the lowest handle.
class Choices {
 public:
  struct Best {
    Handle handle = 0;
    double value = 0;
  };
  virtual ~Choices() = default;
  virtual Best best(std::span<const double> prices, double weight) const = 0;
  virtual Choice choice(Handle handle) const = 0;
  // Every cost is a multiple of it; 0 when all are 0. Bounds are rounded up to it.
  virtual std::int64_t cost_step() const = 0;
  // The same set with its choices written out, dominated ones left out; `handles` translates back.
  virtual void list(std::vector<Choice>& choices, std::vector<Handle>& handles) const = 0;
};

// Choices written out.
class Listed : public Choices {
 public:
  Listed(std::vector<Choice> choices, std::vector<Handle> handles);
  explicit Listed(std::vector<Choice> choices);
  Best best(std::span<const double> prices, double weight) const override;
  Choice choice(Handle handle) const override { return choices_[handle]; }
  std::int64_t cost_step() const override { return cost_step_; }
  void list(std::vector<Choice>& choices, std::vector<Handle>& handles) const override;

  Best best_of(std::span<const Handle> among, std::span<const double> prices, double weight) const;
  double value(Handle handle, std::size_t column) const { return values_[handle * rows_.size() + column]; }
  std::span<const unsigned> rows() const { return rows_; }
  std::size_t size() const { return choices_.size(); }
  Handle original(Handle handle) const { return handles_[handle]; }

 private:
  double reduced(Handle handle, std::span<const double> local, double weight) const;
  std::vector<Choice> choices_;
  std::vector<Handle> handles_;
  std::int64_t cost_step_ = 0;
  std::vector<unsigned> rows_;  // the rows these choices touch
  std::vector<double> values_;  // choice by row, dense; whole numbers
};

struct Set {
  std::shared_ptr<const Choices> choices = {};
  std::int64_t count = 1;
};
struct Program {
  std::vector<std::int64_t> bounds = {};  // one per row
  std::vector<Set> sets = {};
};

struct Taken {
  Handle handle = 0;
  std::int64_t count = 0;
  friend auto operator<=>(const Taken&, const Taken&) = default;
};
struct Solution {
  bool found = false;
  bool infeasible = false;  // proven: there is none
  bool proven = false;      // cost is the least
  std::int64_t cost = 0;
  std::int64_t bound = 0;                      // no solution costs less
  std::vector<std::vector<Taken>> taken = {};  // per set, by rising handle; counts sum to its count
};

// `nodes`: linear programs left to spend, counted down.
Solution minimise(const Program& program, std::uint64_t& nodes);

}  // namespace bulkhead::compaction
