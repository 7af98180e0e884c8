// A fleet as the planner sees it: GPUs of equal content taken together, what each could give up and take, and the rows
// that tie them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "core/compaction/compaction.hpp"
#include "core/compaction/program.hpp"
#include "core/grid/grid.hpp"

namespace bulkhead::compaction {

struct Item {
  unsigned profile = 0;  // index in the geometry
  unsigned start = 0;
  unsigned place = 0;  // of the tables
  std::uint64_t price = 0;
  bool visible = true;
  bool pinned = false;  // unmovable in truth; movable only in the question which unmovable ones are in the way
};

// Above so many movable instances on one GPU only the subsets of at most `few_leave` that leave, and all, are looked
// at.
inline constexpr std::size_t all_subsets_below = 12, few_leave = 3;
inline constexpr std::size_t most_movable = 20;  // of one GPU; the rest stays

struct Kind {
  unsigned pool = 0;
  bool open = true;
  grid::SetId all = 0, fixed = 0;
  std::vector<Item> items = {};           // movable, by profile and start
  std::vector<std::size_t> gpus = {};     // rising
  std::vector<std::uint32_t> leave = {};  // subsets of items that may leave, rising; the first is none
  std::vector<grid::SetId> left = {};     // the set after each
};

struct Model {
  const Fleet* fleet = nullptr;
  std::vector<std::shared_ptr<const grid::Tables>> tables = {};  // per pool
  std::vector<Kind> kinds = {};  // in an order that the numbering of GPUs does not change
  bool cut = false;              // some subsets are left out: nothing is proven
};
// `loosen`: unmovable instances are movable and pinned.
Result<Model> read(const Fleet& fleet, bool loosen);

// Where the rows of a program are. A row of the pool's profile says that what is taken covers what leaves.
struct Rows {
  std::vector<std::vector<int>> of = {};  // [pool][profile index], -1: none
  int used = -1, moves = -1, price = -1, visible = -1, unmet = -1;
  std::size_t count = 0;
};

// What can be taken beside a set, as vectors over the rows of its pool: the maximal ones.
class Offers {
 public:
  Offers(std::shared_ptr<const grid::Tables> tables, std::vector<int> rows);
  struct Offer {
    std::vector<std::pair<unsigned, std::int32_t>> counts = {};  // (profile index, count), rising
    std::vector<Entry> entries = {};
  };
  const std::vector<Offer>& of(grid::SetId set) const;
  struct Best {
    double value = 0;  // 0 at least: nothing taken
    unsigned offer = 0;
  };
  const Best& best(grid::SetId set, std::span<const double> prices) const;
  const grid::Tables& tables() const { return *tables_; }
  bool covers(grid::SetId set, std::span<const std::uint32_t> counts) const;  // counts: per profile index

 private:
  std::shared_ptr<const grid::Tables> tables_;
  std::vector<int> rows_;
  mutable std::vector<std::unique_ptr<std::vector<Offer>>> offers_;
  mutable std::vector<double> prices_;
  mutable std::vector<std::pair<std::uint64_t, Best>> best_;  // (version of the prices, best)
  mutable std::uint64_t version_ = 0;
};

// What the choices of a GPU cost.
struct Costs {
  std::int64_t used = 0;    // a GPU that holds something
  bool moves = false;       // price + 1 of each instance that leaves
  std::int64_t pinned = 0;  // a pinned instance that leaves
  bool frozen = false;      // nothing leaves
};

// The choices of the GPUs of a kind: a subset leaves, an offer is taken. Handles: subset index, then offer (0:
// nothing).
class GpuChoices : public Choices {
 public:
  GpuChoices(const Kind& kind, const Rows& rows, std::shared_ptr<const Offers> offers, Costs costs);
  Best best(std::span<const double> prices, double weight) const override;
  Choice choice(Handle handle) const override;
  std::int64_t cost_step() const override;
  void list(std::vector<Choice>& choices, std::vector<Handle>& handles) const override;

  static Handle handle(std::size_t subset, std::size_t offer) { return static_cast<Handle>(subset << 9U | offer); }
  std::uint32_t leaves(Handle handle) const { return kind_.leave[handle >> 9U]; }
  // Counts taken, or null.
  const Offers::Offer* taken(Handle handle) const;

 private:
  std::size_t subsets() const { return costs_.frozen ? 1 : kind_.leave.size(); }
  std::int64_t cost_of(std::uint32_t leave) const;
  bool used(std::size_t subset, bool takes) const { return takes || kind_.left[subset] != 0; }

  const Kind& kind_;
  const Rows& rows_;
  std::shared_ptr<const Offers> offers_;
  Costs costs_;
  mutable std::vector<double> sums_;
};

// What one GPU is to become.
struct Target {
  std::size_t gpu = 0;
  std::vector<Item> leave = {};
  std::vector<std::uint32_t> take = {};  // per profile index
};

// Orders the moves that lead to the targets (of one pool; every GPU of it that may serve as a stop on the way is among
// them) and gives `wanted` (per profile index) its places. Takes more than needed are dropped. What cannot be ordered
// is left out and counted in `stuck`.
struct Ordered {
  Moves moves = {};
  std::vector<New> places = {};  // `wanted` is the profile index here
  std::size_t stuck = 0, detours = 0;
};
Ordered order(const Fleet& fleet, const Offers& offers, std::vector<Target> targets,
              std::span<const std::uint64_t> wanted);

}  // namespace bulkhead::compaction
