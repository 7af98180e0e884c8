// The policies, all behind one face. Private to core/replay.
#pragma once

#include <memory>
#include <optional>

#include "core/replay/cluster.hpp"
#include "core/replay/go_random.hpp"

namespace bulkhead::replay {

class Placer {
 public:
  virtual ~Placer() = default;
  // Where a pod of this shape should go, or nothing: then it fits nowhere.
  virtual std::optional<Spot> choose(std::uint32_t shape) = 0;
  // What the cluster did since.
  virtual void placed(std::uint32_t shape, Spot spot) = 0;
  virtual void removed(std::uint32_t shape, Spot spot) = 0;
};

// The published policies; `random` is for the random one. All references must outlive the placer.
std::unique_ptr<Placer> baseline(Policy policy, const Cluster& cluster, const Workload& workload,
                                 const Fragments& fragments, const GoRandom& random);
// Ours, told the mix of all shapes.
Result<std::unique_ptr<Placer>> ours(const Cluster& cluster, const Workload& workload);

}  // namespace bulkhead::replay
