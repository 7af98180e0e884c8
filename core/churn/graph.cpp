#include "core/churn/graph.hpp"

#include <algorithm>
#include <bit>

#include <fmt/format.h>

namespace bulkhead::churn {

namespace {

std::uint32_t cover(unsigned start, unsigned size) {
  return static_cast<std::uint32_t>(((std::uint64_t{1} << size) - 1) << start);
}

}  // namespace

bool plain(const mig::Profile& profile) { return profile.name.find_first_of("+-") == std::string::npos; }

Result<Graph> graph_of(const mig::Geometry& geometry, std::span<const std::string> profiles) {
  if (geometry.memory_slices == 0 || geometry.memory_slices > max_units) {
    return Error(Errc::invalid, fmt::format("a GPU of {} memory slices: 1 to {} are understood",
                                            geometry.memory_slices, max_units));
  }
  Graph graph;
  graph.geometry = geometry;
  for (const auto& profile : graph.geometry.profiles) {
    for (const unsigned start : profile.starts) {
      if (profile.size == 0 || start + profile.size > geometry.memory_slices || start > max_units) {
        return Error(Errc::invalid,
                     fmt::format("profile {}: start {} and size {} leave the grid of {} memory slices",
                                 profile.name, start, profile.size, geometry.memory_slices));
      }
    }
  }
  for (const auto& name : profiles) graph.kinds.push_back(graph.geometry.by_name(name));
  std::map<std::vector<Instance>, std::uint32_t> ids{{{}, 0}};
  graph.states.emplace_back();
  std::vector<mig::NewInstance> whole;
  for (std::uint32_t at = 0; at < graph.states.size(); ++at) {
    graph.states[at].places.resize(graph.kinds.size());
    for (std::size_t kind = 0; kind < graph.kinds.size(); ++kind) {
      const auto* profile = graph.kinds[kind];
      if (profile == nullptr) continue;
      auto starts = profile->starts;
      std::sort(starts.begin(), starts.end());
      starts.erase(std::unique(starts.begin(), starts.end()), starts.end());
      for (const unsigned start : starts) {
        const auto& here = graph.states[at];
        if ((here.mask & cover(start, profile->size)) != 0) continue;
        auto instances = here.instances;
        const Instance added{static_cast<std::uint16_t>(kind), static_cast<std::uint16_t>(start)};
        instances.insert(std::upper_bound(instances.begin(), instances.end(), added), added);
        auto known = ids.find(instances);
        if (known == ids.end()) {
          whole.clear();
          for (const auto& instance : instances) {
            const auto* each = graph.kinds[instance.kind];
            whole.push_back({each->id, {instance.start, each->size}, 0});
          }
          if (!mig::legal(graph.geometry, whole)) continue;
          if (graph.states.size() >= max_states) {
            return Error(Errc::no_capacity,
                         fmt::format("a GPU with more than {} sets of instances of this mix", max_states),
                         "a mix of fewer profiles makes fewer sets");
          }
          known = ids.emplace(instances, static_cast<std::uint32_t>(graph.states.size())).first;
          State made;
          made.instances = std::move(instances);
          made.mask = here.mask | cover(start, profile->size);
          made.taken = static_cast<unsigned>(std::popcount(made.mask));
          graph.states.push_back(std::move(made));
        }
        graph.states[at].places[kind].push_back({static_cast<std::uint16_t>(start), known->second});
      }
    }
  }
  for (auto& state : graph.states) {
    for (std::size_t gone = 0; gone < state.instances.size(); ++gone) {
      auto left = state.instances;
      left.erase(left.begin() + static_cast<std::ptrdiff_t>(gone));
      state.without.push_back(ids.at(left));
    }
  }
  return graph;
}

std::vector<unsigned> mfi_scores(const Graph& graph) {
  std::vector<unsigned> scores;
  scores.reserve(graph.states.size());
  for (const auto& state : graph.states) {
    unsigned score = 0;
    for (const auto& profile : graph.geometry.profiles) {
      if (!plain(profile) || profile.size > graph.geometry.memory_slices - state.taken) continue;
      for (const unsigned start : profile.starts) {
        if ((state.mask & cover(start, profile.size)) != 0) score += profile.size;
      }
    }
    scores.push_back(score);
  }
  return scores;
}

}  // namespace bulkhead::churn
