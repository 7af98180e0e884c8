#include "core/fraction/fraction.hpp"

#include <algorithm>
#include <bit>
#include <string>
#include <string_view>
#include <utility>

namespace bulkhead::fraction {
namespace {

bool well_formed(const Task& task) {
  if (task.cpu_milli < 0 || task.cpu_milli > kMostAmount) return false;
  if (task.memory_mib < 0 || task.memory_mib > kMostAmount) return false;
  if (task.gpu_memory_mib < 0 || task.gpu_memory_mib > kMostAmount) return false;
  if (task.num_gpu > kMostGpus) return false;
  if (task.num_gpu == 0) return true;
  return task.gpu_milli > 0 && task.gpu_milli <= kWhole && (task.num_gpu == 1 || task.gpu_milli == kWhole);
}

}  // namespace

Learner::Learner(std::size_t shapes, std::size_t window)
    : shapes_(std::clamp<std::size_t>(shapes, 1, 4096)), window_(std::max<std::size_t>(window, 1)) {
  table_.reserve(shapes_);
}

void Learner::saw(const Task& task) {
  if (!well_formed(task)) return;
  if (++since_ >= window_) {
    since_ = 0;
    for (auto& seen : table_) seen.count /= 2;
  }
  const auto known = std::find_if(table_.begin(), table_.end(), [&](const Seen& s) { return s.task == task; });
  if (known != table_.end()) {
    known->count += 1;
  } else if (table_.size() < shapes_) {
    table_.push_back({task, 1});
  } else {
    const auto rarest = std::min_element(table_.begin(), table_.end(),
                                         [](const Seen& a, const Seen& b) { return a.count < b.count; });
    table_.erase(rarest);  // order is age
    table_.push_back({task, 1});
  }
}

Mix Learner::mix() const {
  Mix mix;
  for (const auto& seen : table_) mix.push_back({seen.task, seen.count});
  std::stable_sort(mix.begin(), mix.end(), [](const Typical& a, const Typical& b) { return a.weight > b.weight; });
  return mix;
}

struct Fleet::State {
  struct Held {
    Node node;
    Free free;
    bool drained = false;
  };
  std::vector<Held> nodes;
  Mix mix;
  std::int64_t total = 0;
  std::int64_t used = 0;
};

namespace {

bool model_allowed(const Task& task, const Node& node) {
  return task.num_gpu == 0 || task.models == 0 || ((task.models >> node.model) & 1U) != 0;
}

// Which GPUs could serve the task, each by itself.
std::uint32_t able(const Task& task, const Node& node, const Free& free) {
  std::uint32_t mask = 0;
  for (unsigned g = 0; g < node.gpus; ++g) {
    if (free.gpu_milli[g] < task.gpu_milli) continue;
    if (node.gpu_memory_mib != 0 && free.gpu_memory_mib[g] < task.gpu_memory_mib) continue;
    mask |= 1U << g;
  }
  return mask;
}

// The set of whole GPUs from `mask`, or 0.
std::uint32_t pick_set(const Task& task, const Node& node, std::uint32_t mask) {
  struct Group {
    std::uint32_t gpus = 0;
    unsigned numa = 0;
  };
  std::array<Group, kMostGpus> groups{};
  unsigned count = 0;
  for (unsigned g = 0; g < node.gpus; ++g) {
    if (((mask >> g) & 1U) == 0) continue;
    unsigned at = 0;
    while (at < count && groups[at].numa != node.numa[g]) ++at;
    if (at == count) groups[count++].numa = node.numa[g];
    groups[at].gpus |= 1U << g;
  }
  const auto size = [](const Group& group) { return static_cast<unsigned>(std::popcount(group.gpus)); };
  // One NUMA node that holds all: the tightest. Otherwise the largest first, so that few are touched.
  const Group* best = nullptr;
  for (unsigned at = 0; at < count; ++at) {
    if (size(groups[at]) >= task.num_gpu && (best == nullptr || size(groups[at]) < size(*best))) {
      best = &groups[at];
    }
  }
  std::uint32_t chosen = 0;
  unsigned left = task.num_gpu;
  const auto take = [&](std::uint32_t from) {
    for (; from != 0 && left > 0; from &= from - 1, --left) chosen |= from & (~from + 1);
  };
  if (best != nullptr) {
    take(best->gpus);
    return chosen;
  }
  if (task.one_numa) return 0;
  while (left > 0) {
    Group* next = nullptr;
    for (unsigned at = 0; at < count; ++at) {
      if (groups[at].gpus == 0) continue;
      const bool fills = size(groups[at]) >= left;
      if (next == nullptr) {
        next = &groups[at];
      } else if (const bool next_fills = size(*next) >= left; fills != next_fills) {
        if (fills) next = &groups[at];
      } else if (fills ? size(groups[at]) < size(*next) : size(groups[at]) > size(*next)) {
        next = &groups[at];
      }
    }
    if (next == nullptr) return 0;
    take(std::exchange(next->gpus, 0));
  }
  return chosen;
}

// GPU milli on the node that a task drawn from the mix could not use, in expectation.
double fragment(const Mix& mix, const Node& node, const Free& free) {
  double sum = 0;
  std::int64_t total = 0;
  for (unsigned g = 0; g < node.gpus; ++g) total += free.gpu_milli[g];
  for (const auto& typical : mix) {
    const auto& task = typical.task;
    std::int64_t usable = 0;
    unsigned gpus = 0;
    if (free.cpu_milli >= task.cpu_milli && model_allowed(task, node)) {
      for (unsigned g = 0; g < node.gpus; ++g) {
        if (free.gpu_milli[g] >= task.gpu_milli) {
          usable += free.gpu_milli[g];
          ++gpus;
        }
      }
      if (gpus < task.num_gpu) usable = 0;
    }
    sum += typical.weight * static_cast<double>(total - usable);
  }
  return sum;
}

void take(const Task& task, std::uint32_t gpus, Free& free, int sign) {
  free.cpu_milli -= sign * task.cpu_milli;
  free.memory_mib -= sign * task.memory_mib;
  for (; gpus != 0; gpus &= gpus - 1) {
    const auto g = static_cast<unsigned>(std::countr_zero(gpus));
    free.gpu_milli[g] -= sign * task.gpu_milli;
    free.gpu_memory_mib[g] -= sign * task.gpu_memory_mib;
  }
}

}  // namespace

Fleet::Fleet() : state_(std::make_unique<State>()) {}
Fleet::~Fleet() = default;
Fleet::Fleet(Fleet&&) noexcept = default;
Fleet& Fleet::operator=(Fleet&&) noexcept = default;

Result<NodeId> Fleet::add_node(const Node& node) {
  const auto wrong = [&](std::string_view what) {
    return Error(Errc::invalid, "node " + std::to_string(state_->nodes.size()) + ": " + std::string(what));
  };
  if (state_->nodes.size() >= kMostNodes) return wrong("a fleet has at most 200000 nodes");
  if (node.cpu_milli < 0 || node.cpu_milli > kMostAmount) return wrong("cpu_milli is not within 0..1000000000");
  if (node.memory_mib < 0 || node.memory_mib > kMostAmount) return wrong("memory_mib is not within 0..1000000000");
  if (node.gpu_memory_mib < 0 || node.gpu_memory_mib > kMostAmount) {
    return wrong("gpu_memory_mib is not within 0..1000000000");
  }
  if (node.gpus > kMostGpus) return wrong("a node has at most 16 GPUs");
  if (node.model >= kModels) return wrong("the GPU model is not below 64");
  State::Held held{.node = node, .free = {}, .drained = false};
  held.free.cpu_milli = node.cpu_milli;
  held.free.memory_mib = node.memory_mib;
  for (unsigned g = 0; g < node.gpus; ++g) {
    held.free.gpu_milli[g] = kWhole;
    held.free.gpu_memory_mib[g] = node.gpu_memory_mib;
  }
  state_->total += static_cast<std::int64_t>(node.gpus) * kWhole;
  state_->nodes.push_back(held);
  return static_cast<NodeId>(state_->nodes.size() - 1);
}

void Fleet::drain(NodeId node, bool drained) { state_->nodes.at(node).drained = drained; }

Status Fleet::set_mix(std::span<const Typical> mix) {
  Mix kept;
  double sum = 0;
  for (const auto& typical : mix) {
    if (!well_formed(typical.task)) return Error(Errc::invalid, "mix: a task is out of bounds");
    if (!(typical.weight >= 0) || typical.weight > 1e15) return Error(Errc::invalid, "mix: a weight is out of bounds");
    if (typical.task.num_gpu == 0) continue;
    kept.push_back(typical);
  }
  std::stable_sort(kept.begin(), kept.end(), [](const Typical& a, const Typical& b) { return a.weight > b.weight; });
  if (kept.size() > kMostTypical) kept.resize(kMostTypical);
  for (const auto& typical : kept) sum += typical.weight;
  for (auto& typical : kept) typical.weight /= sum > 0 ? sum : 1;
  state_->mix = std::move(kept);
  return ok_status();
}

bool Fleet::fits(const Task& task, NodeId node) const {
  const auto& held = state_->nodes.at(node);
  if (!well_formed(task)) return false;
  if (held.free.cpu_milli < task.cpu_milli || held.free.memory_mib < task.memory_mib) return false;
  if (task.num_gpu == 0) return true;
  if (!model_allowed(task, held.node)) return false;
  const auto mask = able(task, held.node, held.free);
  return pick_set(task, held.node, mask) != 0;
}

std::optional<Choice> Fleet::choose(const Task& task, const Filter& filter) {
  std::optional<Choice> best;
  double best_score = 0;
  for (NodeId id = 0; id < state_->nodes.size(); ++id) {
    const auto& held = state_->nodes[id];
    if (held.drained || !fits(task, id)) continue;
    if (filter.allows_class != nullptr && !filter.allows_class(filter.context, held.node.class_id)) continue;
    if (filter.allows != nullptr && !filter.allows(filter.context, id)) continue;
    const auto mask = task.num_gpu == 0 ? 0U : able(task, held.node, held.free);
    const double before = fragment(state_->mix, held.node, held.free);
    const auto consider = [&](std::uint32_t gpus) {
      Free after = held.free;
      take(task, gpus, after, 1);
      const double score = fragment(state_->mix, held.node, after) - before;
      if (!best || score < best_score) {
        best = Choice{id, gpus};
        best_score = score;
      }
    };
    if (task.num_gpu == 1 && task.gpu_milli < kWhole) {
      for (auto left = mask; left != 0; left &= left - 1) consider(left & (~left + 1));
    } else {
      consider(task.num_gpu == 0 ? 0U : pick_set(task, held.node, mask));
    }
  }
  return best;
}

bool Fleet::place(const Task& task, const Choice& choice) {
  if (!well_formed(task) || choice.node >= state_->nodes.size()) return false;
  auto& held = state_->nodes[choice.node];
  if (held.free.cpu_milli < task.cpu_milli || held.free.memory_mib < task.memory_mib) return false;
  if (static_cast<unsigned>(std::popcount(choice.gpus)) != task.num_gpu) return false;
  if (task.num_gpu != 0) {
    if (!model_allowed(task, held.node) || (choice.gpus & ~able(task, held.node, held.free)) != 0) return false;
  }
  take(task, choice.gpus, held.free, 1);
  if (task.num_gpu != 0) state_->used += static_cast<std::int64_t>(task.num_gpu) * task.gpu_milli;
  return true;
}

bool Fleet::remove(const Task& task, const Choice& choice) {
  if (!well_formed(task) || choice.node >= state_->nodes.size()) return false;
  auto& held = state_->nodes[choice.node];
  if (held.node.cpu_milli - held.free.cpu_milli < task.cpu_milli) return false;
  if (held.node.memory_mib - held.free.memory_mib < task.memory_mib) return false;
  if (static_cast<unsigned>(std::popcount(choice.gpus)) != task.num_gpu) return false;
  if (task.num_gpu != 0 && (choice.gpus >> held.node.gpus) != 0) return false;
  for (auto left = choice.gpus; left != 0; left &= left - 1) {
    const auto g = static_cast<unsigned>(std::countr_zero(left));
    if (kWhole - held.free.gpu_milli[g] < task.gpu_milli) return false;
    if (held.node.gpu_memory_mib != 0 && held.node.gpu_memory_mib - held.free.gpu_memory_mib[g] < task.gpu_memory_mib) {
      return false;
    }
  }
  take(task, choice.gpus, held.free, -1);
  if (task.num_gpu != 0) state_->used -= static_cast<std::int64_t>(task.num_gpu) * task.gpu_milli;
  return true;
}

std::size_t Fleet::size() const { return state_->nodes.size(); }
const Node& Fleet::node(NodeId node) const { return state_->nodes.at(node).node; }
Free Fleet::free(NodeId node) const { return state_->nodes.at(node).free; }
bool Fleet::drained(NodeId node) const { return state_->nodes.at(node).drained; }
std::int64_t Fleet::gpu_milli_total() const { return state_->total; }
std::int64_t Fleet::gpu_milli_used() const { return state_->used; }

}  // namespace bulkhead::fraction
