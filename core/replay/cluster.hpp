// What the experiments and the policies share: pods by shape, nodes with what is left on them, and FGD's
// measure of fragments. Private to core/replay.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "core/replay/replay.hpp"

namespace bulkhead::replay {

inline constexpr std::int16_t kWholeGpu = 1000;

// Pods that ask for the same.
struct Shape {
  std::int32_t cpu = 0;
  std::int32_t memory = 0;
  std::uint16_t num_gpu = 0;
  std::int16_t gpu_milli = 0;
  unsigned spec = 0;
  std::uint64_t models = ~std::uint64_t{0};  // bit m: model m of the nodes will do
  std::uint64_t count = 0;                   // pods of the list

  bool shares() const { return num_gpu == 1 && gpu_milli < kWholeGpu; }
  std::uint64_t milli() const { return std::uint64_t{num_gpu} * static_cast<std::uint64_t>(gpu_milli); }
};

struct Workload {
  std::vector<Shape> shapes;
  std::vector<std::uint32_t> shape_of;  // each pod, in the list's order
  std::uint64_t milli = 0;              // that all pods ask for
};
Workload workload_of(const PodList& pods, const NodeList& nodes);

struct Spot {
  std::uint32_t node = 0;
  std::uint32_t gpus = 0;  // bit g: GPU g
};

// What is left on a node.
struct State {
  std::int32_t cpu = 0;
  std::int32_t memory = 0;
  std::uint8_t gpus = 0;
  std::uint8_t model = 0;
  std::array<std::int16_t, kMostGpusPerNode> left = {};    // by GPU
  std::array<std::int16_t, kMostGpusPerNode> sorted = {};  // the same, least first

  std::uint64_t milli() const;
  unsigned with(std::int16_t milli) const;  // GPUs with at least so much left
  bool fits(const Shape& shape) const;
};

class Cluster {
 public:
  // Nodes in the given order: order[i] is the list's index of node i.
  Cluster(const NodeList& list, const std::vector<std::uint32_t>& order);
  std::size_t size() const { return states_.size(); }
  const State& operator[](std::size_t node) const { return states_[node]; }
  // False, and nothing done, when it does not fit there.
  [[nodiscard]] bool place(const Shape& shape, Spot spot);
  void remove(const Shape& shape, Spot spot);  // what place() took
  std::uint64_t milli_total() const { return total_; }
  std::uint64_t milli_used() const { return used_; }

  // Nodes that nothing ever changed and that have the same figures are of one class.
  std::uint32_t class_of(std::size_t node) const { return class_[node]; }
  std::size_t classes() const { return classes_; }

  // Nodes by their latest change, latest first: for (n = latest(); n != none() && changed(n) > seen; n =
  // older(n)).
  std::uint32_t none() const { return static_cast<std::uint32_t>(size()); }
  std::uint32_t latest() const { return next_[size()]; }
  std::uint32_t older(std::uint32_t node) const { return next_[node]; }
  std::uint64_t changed(std::uint32_t node) const { return changed_[node]; }  // 0: never
  std::uint64_t now() const { return clock_; }                                // changes so far

 private:
  void touch(std::uint32_t node);

  std::vector<State> states_;
  std::vector<std::uint32_t> class_;
  std::size_t classes_ = 0;
  std::vector<std::uint32_t> next_, before_;  // a ring through all nodes and one end, size()
  std::vector<std::uint64_t> changed_;
  std::uint64_t clock_ = 0;
  std::uint64_t total_ = 0;
  std::uint64_t used_ = 0;
};

// FGD's fragments: the idle GPU milli of a node that a pod drawn from the typical ones expects not to be able
// to use: all of them if it cannot run there, else those of GPUs with too little left. Whole numbers: weights
// are counts.
class Fragments {
 public:
  // Typical are the most frequent (CPU, GPU milli, GPUs, spec) that together make up 95 % of the pods, those
  // without a GPU too; ties: the greater in that order.
  Fragments(const Workload& workload, const PodList& pods);
  std::uint64_t weight() const { return weight_; }  // of all typical pods

  // The typical pods that a model admits, by what they want of GPUs; for how many there is CPU enough.
  void wanted(unsigned model, std::int32_t cpu, std::vector<std::uint64_t>& weights) const;
  // Weighted milli that can be used on a node with those GPUs, least first; `weights` from wanted().
  std::uint64_t usable(unsigned model, const std::vector<std::uint64_t>& weights, const std::int16_t* sorted,
                       unsigned gpus) const;
  std::uint64_t usable(const State& state) const;

 private:
  struct Group {
    std::int16_t milli = 0;
    std::uint16_t num = 0;
    std::size_t begin = 0, end = 0;  // in cpu_ and upto_
  };
  std::array<std::vector<Group>, kMostModels> groups_;  // by model; least milli first
  std::vector<std::int32_t> cpu_;                       // of a group's pods, least first
  std::vector<std::uint64_t> upto_;                     // weight of the group's pods up to this one
  std::uint64_t weight_ = 0;
  mutable std::vector<std::uint64_t> scratch_;
};

}  // namespace bulkhead::replay
