#include "core/fraction/fraction.hpp"
#include "core/replay/policy.hpp"

namespace bulkhead::replay {

namespace {

static_assert(kMostModels <= fraction::kModels && kMostGpusPerNode <= fraction::kMostGpus &&
              kMostNodes <= fraction::kMostNodes && kMostAmount <= fraction::kMostAmount);

class Ours final : public Placer {
 public:
  explicit Ours(std::vector<fraction::Task> tasks) : tasks_(std::move(tasks)) {}
  Status fill(const Cluster& cluster, const Workload& workload) {
    for (std::size_t n = 0; n < cluster.size(); ++n) {
      fraction::Node node;
      node.cpu_milli = cluster[n].cpu;
      node.memory_mib = cluster[n].memory;
      node.gpus = cluster[n].gpus;
      node.model = cluster[n].model;
      BH_CHECK(fleet_.add_node(node));
    }
    fraction::Mix mix;
    for (std::size_t s = 0; s < tasks_.size(); ++s)
      if (workload.shapes[s].models != 0 && tasks_[s].num_gpu <= fraction::kMostGpus)
        mix.push_back({tasks_[s], static_cast<double>(workload.shapes[s].count)});
    return fleet_.set_mix(mix);
  }

  std::optional<Spot> choose(std::uint32_t shape) override {
    const auto choice = fleet_.choose(tasks_[shape]);
    if (!choice) return std::nullopt;
    return Spot{choice->node, choice->gpus};
  }
  void placed(std::uint32_t shape, Spot spot) override {
    const bool done = fleet_.place(tasks_[shape], {spot.node, spot.gpus});
    BH_ASSERT(done);
  }
  void removed(std::uint32_t shape, Spot spot) override {
    const bool done = fleet_.remove(tasks_[shape], {spot.node, spot.gpus});
    BH_ASSERT(done);
  }

 private:
  std::vector<fraction::Task> tasks_;  // by shape
  fraction::Fleet fleet_;
};

}  // namespace

Result<std::unique_ptr<Placer>> ours(const Cluster& cluster, const Workload& workload) {
  std::vector<fraction::Task> tasks;
  for (const Shape& shape : workload.shapes) {
    fraction::Task task;
    task.cpu_milli = shape.cpu;
    task.memory_mib = shape.memory;
    task.num_gpu = shape.num_gpu;
    task.gpu_milli = shape.gpu_milli;
    task.models = shape.spec == 0 ? 0 : shape.models;
    tasks.push_back(task);
  }
  auto placer = std::make_unique<Ours>(std::move(tasks));
  BH_CHECK(placer->fill(cluster, workload));
  return std::unique_ptr<Placer>(std::move(placer));
}

}  // namespace bulkhead::replay
