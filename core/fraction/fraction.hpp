// Fractional GPUs: nodes with CPU, memory and GPUs of 1000 milli each, and the rule that says where a task
// goes so that the GPU milli left over stay usable. Tasks take CPU, memory and either a share of one GPU or a
// set of whole GPUs. The rule looks at a mix of typical tasks (given, or learnt from arrivals); it never
// refuses a task that fits. Deterministic: the same calls give the same answers, and every tie is specified
// below.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/result.hpp"

namespace bulkhead::fraction {

inline constexpr unsigned kMostGpus = 16;     // of one node
inline constexpr std::int32_t kWhole = 1000;  // milli of one GPU
inline constexpr unsigned kModels = 64;       // GPU models a fleet can tell apart
inline constexpr std::size_t kMostNodes = 200'000;
inline constexpr std::int64_t kMostAmount = 1'000'000'000;  // of CPU milli or MiB, per node or task

using NodeId = std::uint32_t;  // in order of add_node, from 0

struct Node {
  std::int64_t cpu_milli = 0;
  std::int64_t memory_mib = 0;
  unsigned gpus = 0;
  unsigned model = 0;                             // below kModels; the caller's numbering
  std::int64_t gpu_memory_mib = 0;                // of each GPU; 0: unknown, never a reason to refuse
  std::array<std::uint8_t, kMostGpus> numa = {};  // NUMA node of each GPU
  std::uint32_t class_id = 0;                     // the caller's: taints, bands, domains; see Filter
};

struct Task {
  std::int64_t cpu_milli = 0;
  std::int64_t memory_mib = 0;
  unsigned num_gpu = 0;
  std::int32_t gpu_milli = 0;       // of each GPU; below kWhole only when num_gpu is 1; ignored when it is 0
  std::uint64_t models = 0;         // bit m: model m will do; 0: any
  std::int64_t gpu_memory_mib = 0;  // on each of its GPUs
  bool one_numa = false;            // all its GPUs on one NUMA node, or not at all
  friend bool operator==(const Task&, const Task&) = default;
};

// What the rule expects to be asked for: shapes and how often (any positive scale). At most kMostTypical are
// used, the heaviest first (ties: the earlier). Tasks without a GPU may be in it.
struct Typical {
  Task task = {};
  double weight = 0;
};
using Mix = std::vector<Typical>;
inline constexpr std::size_t kMostTypical = 256;

// Counts arrivals in a table of bounded size; the mix of what came lately. A shape that finds the table full
// takes the place of the rarest (ties: the one that came first), and inherits nothing. All counts are halved
// every `window` arrivals.
class Learner {
 public:
  explicit Learner(std::size_t shapes = kMostTypical, std::size_t window = 100'000);
  void saw(const Task& task);
  Mix mix() const;  // heaviest first, ties: the shape that came first

 private:
  struct Seen {
    Task task = {};
    double count = 0;
  };
  std::vector<Seen> table_;
  std::size_t shapes_;
  std::size_t window_;
  std::size_t since_ = 0;
};

struct Choice {
  NodeId node = 0;
  std::uint32_t gpus = 0;  // bit g: GPU g of the node
  friend bool operator==(const Choice&, const Choice&) = default;
};

// Which nodes may be chosen. Both may be null (all may). `allows_class` is asked with Node::class_id,
// `allows` with the node; asked in no promised order or number, so they must be pure.
struct Filter {
  bool (*allows_class)(const void* context, std::uint32_t class_id) = nullptr;
  bool (*allows)(const void* context, NodeId node) = nullptr;
  const void* context = nullptr;
};

// What is free on a node now.
struct Free {
  std::int64_t cpu_milli = 0;
  std::int64_t memory_mib = 0;
  std::array<std::int32_t, kMostGpus> gpu_milli = {};
  std::array<std::int64_t, kMostGpus> gpu_memory_mib = {};
};

class Fleet {
 public:
  Fleet();
  ~Fleet();
  Fleet(Fleet&&) noexcept;
  Fleet& operator=(Fleet&&) noexcept;

  // Errc::invalid (amounts out of bounds, too many GPUs, model, nodes) says which figure.
  Result<NodeId> add_node(const Node& node);
  // A drained node keeps its tasks and gets no new ones.
  void drain(NodeId node, bool drained);
  // Replaces the mix. Placements stand. Costs about what as many choices as there are nodes cost.
  Status set_mix(std::span<const Typical> mix);

  // Where the rule would put it, or nothing: then no node that the filter allows can hold it. Ties go to the
  // node on which the task's GPUs span the fewest NUMA nodes, then to the lowest node id. On the node: a
  // share goes to the GPU the rule prefers (ties: least free milli, then lowest index); whole GPUs come from
  // the NUMA node with the fewest free that holds them all, else from the fullest first (ties: the NUMA node
  // of the lowest GPU), lowest index first. A task that breaks the bounds above fits nowhere.
  std::optional<Choice> choose(const Task& task, const Filter& filter = {});
  // False, and nothing done, when it does not fit there as chosen (drained nodes accept: the caller insists).
  [[nodiscard]] bool place(const Task& task, const Choice& choice);
  // Gives back what place took. False, and nothing done, when that is more than the node has in use.
  [[nodiscard]] bool remove(const Task& task, const Choice& choice);

  bool fits(const Task& task, NodeId node) const;
  std::size_t size() const;
  const Node& node(NodeId node) const;
  Free free(NodeId node) const;
  bool drained(NodeId node) const;
  std::int64_t gpu_milli_total() const;  // drained nodes included
  std::int64_t gpu_milli_used() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace bulkhead::fraction
