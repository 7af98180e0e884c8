// The rule written plainly, for tests and benchmarks: every node is looked at, nothing is kept between two
// calls.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "core/fraction/fraction.hpp"
#include "core/fraction/value.hpp"

namespace bulkhead::fraction {

class Plain {
 public:
  Plain(std::vector<Node> nodes, const Mix& mix) : nodes_(std::move(nodes)), drained_(nodes_.size(), false) {
    for (const auto& node : nodes_) {
      Free free;
      free.cpu_milli = node.cpu_milli;
      free.memory_mib = node.memory_mib;
      for (unsigned g = 0; g < node.gpus; ++g) {
        free.gpu_milli[g] = kWhole;
        free.gpu_memory_mib[g] = node.gpu_memory_mib;
      }
      frees_.push_back(free);
      const Kind kind{.gpus = node.gpus, .model = node.model, .gpu_memory_mib = node.gpu_memory_mib};
      std::size_t k = 0;
      while (k < kinds_.size() && !(kinds_[k] == kind)) ++k;
      if (k == kinds_.size()) {
        kinds_.push_back(kind);
        worths_.emplace_back(kind, mix);
      }
      kind_of_.push_back(k);
    }
  }

  void drain(NodeId node, bool drained) { drained_[node] = drained; }
  const Free& free(NodeId node) const { return frees_[node]; }

  // The batches filled in without any of the shortcuts: every draw, on the GPU with the least that is enough.
  std::int32_t worth(NodeId id, const Free& free) const {
    const auto& node = nodes_[id];
    std::int32_t sold = 0;
    for (unsigned b = 0; b < kBatches; ++b) {
      auto cpu = free.cpu_milli;
      auto memory = free.memory_mib;
      std::vector<std::int64_t> gpus;
      for (unsigned g = 0; g < node.gpus; ++g) {
        auto left = std::int64_t{free.gpu_milli[g]};
        if (node.gpu_memory_mib != 0)
          left = std::min(left, free.gpu_memory_mib[g] * kWhole / node.gpu_memory_mib);
        gpus.push_back(left);
      }
      for (const auto& draw : worths_[kind_of_[id]].batch(b)) {
        if (cpu < draw.cpu || memory < draw.memory) continue;
        std::sort(gpus.begin(), gpus.end());
        const auto first = std::lower_bound(gpus.begin(), gpus.end(), draw.size);
        if (gpus.end() - first < draw.num) continue;
        for (auto g = first; g != first + draw.num; ++g) *g -= draw.size;
        cpu -= draw.cpu;
        memory -= draw.memory;
        sold += draw.milli * draw.num;
      }
    }
    return sold;
  }

  std::optional<Choice> choose(const Task& task, const Filter& filter = {}) const {
    using Rank =
        std::tuple<std::int32_t, int, NodeId, std::int32_t, unsigned>;  // the contract's ties, in its order
    std::optional<Rank> best;
    Choice choice;
    for (NodeId id = 0; id < nodes_.size(); ++id) {
      const auto& node = nodes_[id];
      if (drained_[id] || frees_[id].cpu_milli < task.cpu_milli || frees_[id].memory_mib < task.memory_mib)
        continue;
      if (filter.allows_class != nullptr && !filter.allows_class(filter.context, node.class_id)) continue;
      if (filter.allows != nullptr && !filter.allows(filter.context, id)) continue;
      const auto consider = [&](std::uint32_t gpus) {
        const auto loss = worth(id, frees_[id]) - worth(id, after(task, id, gpus));
        const auto g = gpus == 0 ? 0U : static_cast<unsigned>(std::countr_zero(gpus));
        const bool share = task.num_gpu == 1 && task.gpu_milli < kWhole;
        const Rank rank{loss, spans(node, gpus), id, share ? frees_[id].gpu_milli[g] : 0, g};
        if (!best || rank < *best) {
          best = rank;
          choice = {id, gpus};
        }
      };
      if (task.num_gpu == 0) {
        consider(0);
        continue;
      }
      if (task.models != 0 && ((task.models >> node.model) & 1U) == 0) continue;
      std::vector<unsigned> able;
      for (unsigned g = 0; g < node.gpus; ++g) {
        const bool memory = node.gpu_memory_mib == 0 || frees_[id].gpu_memory_mib[g] >= task.gpu_memory_mib;
        if (memory && frees_[id].gpu_milli[g] >= task.gpu_milli) able.push_back(g);
      }
      if (able.size() < task.num_gpu) continue;
      if (task.num_gpu == 1 && task.gpu_milli < kWhole) {
        for (const auto g : able) consider(1U << g);
      } else if (const auto gpus = set(task, node, able); gpus != 0) {
        consider(gpus);
      }
    }
    return best ? std::optional(choice) : std::nullopt;
  }

  void place(const Task& task, const Choice& choice) {
    frees_[choice.node] = after(task, choice.node, choice.gpus);
  }
  void remove(Task task, const Choice& choice) {
    task.cpu_milli = -task.cpu_milli;
    task.memory_mib = -task.memory_mib;
    task.gpu_milli = -task.gpu_milli;
    task.gpu_memory_mib = -task.gpu_memory_mib;
    place(task, choice);
  }

 private:
  Free after(const Task& task, NodeId id, std::uint32_t gpus) const {
    auto free = frees_[id];
    free.cpu_milli -= task.cpu_milli;
    free.memory_mib -= task.memory_mib;
    for (unsigned g = 0; g < kMostGpus; ++g) {
      if (((gpus >> g) & 1U) == 0) continue;
      free.gpu_milli[g] -= task.gpu_milli;
      if (nodes_[id].gpu_memory_mib != 0) free.gpu_memory_mib[g] -= task.gpu_memory_mib;
    }
    return free;
  }

  static int spans(const Node& node, std::uint32_t gpus) {
    std::vector<unsigned> seen;
    for (unsigned g = 0; g < kMostGpus; ++g) {
      if (((gpus >> g) & 1U) != 0) seen.push_back(node.numa[g]);
    }
    std::sort(seen.begin(), seen.end());
    return static_cast<int>(std::unique(seen.begin(), seen.end()) - seen.begin());
  }

  static std::uint32_t set(const Task& task, const Node& node, const std::vector<unsigned>& able) {
    std::map<unsigned, std::vector<unsigned>> by_numa;
    for (const auto g : able) by_numa[node.numa[g]].push_back(g);
    std::vector<std::vector<unsigned>> groups;
    for (auto& [numa, gpus] : by_numa) groups.push_back(gpus);
    std::sort(groups.begin(), groups.end());  // by lowest GPU
    std::uint32_t chosen = 0;
    std::size_t left = task.num_gpu;
    while (left > 0) {
      const std::vector<unsigned>* next = nullptr;
      for (const auto& group : groups) {  // the smallest that is enough
        if (group.size() >= left && (next == nullptr || group.size() < next->size())) next = &group;
      }
      if (next == nullptr) {
        if (task.one_numa) return 0;
        for (const auto& group : groups) {
          if (next == nullptr || group.size() > next->size()) next = &group;
        }
      }
      if (next == nullptr || next->empty()) return 0;
      for (const auto g : *next) {
        if (left == 0) break;
        chosen |= 1U << g;
        --left;
      }
      groups.erase(std::find(groups.begin(), groups.end(), *next));
    }
    return chosen;
  }

  std::vector<Node> nodes_;
  std::vector<bool> drained_;
  std::vector<Free> frees_;
  std::vector<Kind> kinds_;
  std::vector<Worth> worths_;
  std::vector<std::size_t> kind_of_;
};

}  // namespace bulkhead::fraction
