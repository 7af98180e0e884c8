// Which GPUs of a host make the best set of k: a table over the free masks of its NVLink matrix.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace bulkhead::placement {

// A set of GPUs as bits, judged among the `free` ones. Compared in the order of the fields: less is better.
struct SetScore {
  std::uint32_t weakest = 0;     // 255 - links of the weakest pair (255 - 255 for a single GPU)
  std::uint32_t links = 0;       // 255 * 120 - links in sum
  std::uint32_t numa = 0;        // NUMA nodes it touches
  std::uint32_t dynamic = 0;     // GPUs of the dynamic pool in it
  std::uint32_t left = 0;        // free GPUs left
  std::uint32_t left_links = 0;  // 255 * 120 - links in sum among those left
  std::uint32_t left_block = 0;  // 16 - most left on one NUMA node
  friend auto operator<=>(const SetScore&, const SetScore&) = default;
};

// What decides a set on one host; hosts of equal shape share a table.
struct Shape {
  unsigned gpus = 0;                     // at most 16
  std::vector<std::uint8_t> links = {};  // gpus * gpus, symmetric; empty: none
  std::vector<std::uint8_t> numa = {};   // per GPU
  std::uint32_t dynamic = 0;             // bits
  friend auto operator<=>(const Shape&, const Shape&) = default;
};

class SetTable {
 public:
  explicit SetTable(Shape shape);
  struct Best {
    std::uint64_t key = 0;   // orders as its score does; also between shapes
    std::uint32_t gpus = 0;  // 0: there is none
  };
  // The best k of the free ones (ties: the lowest value of the bits). Up to 8 GPUs a look-up; above, worked
  // out once a mask.
  const Best& best(std::uint32_t free, unsigned k) const;
  SetScore score(std::uint32_t set, std::uint32_t free) const;
  const Shape& shape() const { return shape_; }

 private:
  Best work_out(std::uint32_t free, unsigned k) const;
  Shape shape_;
  std::vector<Best> table_;                               // [free * 9 + k], up to 8 GPUs
  mutable std::unordered_map<std::uint32_t, Best> seen_;  // above; bounded
};

}  // namespace bulkhead::placement
