#include "core/replay/cluster.hpp"

#include <algorithm>
#include <map>
#include <tuple>

#include "base/text.hpp"

namespace bulkhead::replay {

Workload workload_of(const PodList& pods, const NodeList& nodes) {
  Workload out;
  const auto key = [&](std::uint32_t pod) {
    const Pod& p = pods.pods[pod];
    return std::tuple(p.cpu_milli, p.memory_mib, p.num_gpu, p.gpu_milli, p.spec);
  };
  std::vector<std::uint32_t> order(pods.pods.size());
  for (std::uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) { return key(a) < key(b); });
  out.shape_of.resize(order.size());
  std::vector<std::uint64_t> masks;
  for (const std::string& spec : pods.specs) {
    std::uint64_t mask = spec.empty() ? ~std::uint64_t{0} : 0;
    for (const std::string_view model : split(spec, '|'))
      for (std::size_t m = 1; m < nodes.models.size(); ++m)
        if (nodes.models[m] == model) mask |= std::uint64_t{1} << m;
    masks.push_back(mask);
  }
  for (std::size_t i = 0; i < order.size(); ++i) {
    if (i == 0 || key(order[i]) != key(order[i - 1])) {
      const Pod& pod = pods.pods[order[i]];
      Shape shape;
      shape.cpu = static_cast<std::int32_t>(pod.cpu_milli);
      shape.memory = static_cast<std::int32_t>(pod.memory_mib);
      shape.num_gpu = static_cast<std::uint16_t>(pod.num_gpu);
      shape.gpu_milli = static_cast<std::int16_t>(pod.num_gpu == 0 ? 0 : pod.gpu_milli);
      shape.spec = pod.num_gpu == 0 ? 0 : pod.spec;
      shape.models = masks[shape.spec];
      out.shapes.push_back(shape);
    }
    Shape& shape = out.shapes.back();
    ++shape.count;
    out.milli += shape.milli();
    out.shape_of[order[i]] = static_cast<std::uint32_t>(out.shapes.size() - 1);
  }
  return out;
}

std::uint64_t State::milli() const {
  std::uint64_t sum = 0;
  for (unsigned g = 0; g < gpus; ++g) sum += static_cast<std::uint64_t>(left[g]);
  return sum;
}

unsigned State::with(std::int16_t milli) const {
  unsigned count = 0;
  for (unsigned g = 0; g < gpus; ++g) count += left[g] >= milli ? 1 : 0;
  return count;
}

bool State::fits(const Shape& shape) const {
  if (cpu < shape.cpu || memory < shape.memory) return false;
  if (shape.num_gpu == 0) return true;
  return shape.num_gpu <= gpus && (shape.models >> model & 1U) != 0 &&
         sorted[gpus - shape.num_gpu] >= shape.gpu_milli;
}

Cluster::Cluster(const NodeList& list, const std::vector<std::uint32_t>& order) {
  std::map<std::tuple<std::int64_t, std::int64_t, unsigned, unsigned>, std::uint32_t> classes;
  for (const std::uint32_t index : order) {
    const Node& node = list.nodes[index];
    State state;
    state.cpu = static_cast<std::int32_t>(node.cpu_milli);
    state.memory = static_cast<std::int32_t>(node.memory_mib);
    state.gpus = static_cast<std::uint8_t>(node.gpus);
    state.model = static_cast<std::uint8_t>(node.model);
    for (unsigned g = 0; g < node.gpus; ++g) state.left[g] = state.sorted[g] = kWholeGpu;
    states_.push_back(state);
    total_ += state.milli();
    const auto known = classes.try_emplace({node.cpu_milli, node.memory_mib, node.gpus, node.model},
                                           static_cast<std::uint32_t>(classes.size()));
    class_.push_back(known.first->second);
  }
  classes_ = classes.size();
  changed_.resize(size());
  next_.resize(size() + 1);
  before_.resize(size() + 1);
  for (std::uint32_t i = 0; i <= size(); ++i) {
    next_[i] = i == size() ? 0 : i + 1;
    before_[i] = i == 0 ? none() : i - 1;
  }
}

void Cluster::touch(std::uint32_t node) {
  State& state = states_[node];
  std::copy_n(state.left.begin(), state.gpus, state.sorted.begin());
  std::sort(state.sorted.begin(), state.sorted.begin() + state.gpus);
  changed_[node] = ++clock_;
  next_[before_[node]] = next_[node];
  before_[next_[node]] = before_[node];
  next_[node] = next_[none()];
  before_[node] = none();
  before_[next_[node]] = node;
  next_[none()] = node;
}

bool Cluster::place(const Shape& shape, Spot spot) {
  if (spot.node >= size()) return false;
  State& state = states_[spot.node];
  if (state.cpu < shape.cpu || state.memory < shape.memory || (spot.gpus >> state.gpus) != 0) return false;
  if (shape.num_gpu > 0 && (shape.models >> state.model & 1U) == 0) return false;
  unsigned taken = 0;
  for (unsigned g = 0; g < state.gpus; ++g) {
    if ((spot.gpus >> g & 1U) == 0) continue;
    if (state.left[g] < shape.gpu_milli) return false;
    ++taken;
  }
  if (taken != shape.num_gpu) return false;
  state.cpu -= shape.cpu;
  state.memory -= shape.memory;
  for (unsigned g = 0; g < state.gpus; ++g)
    if ((spot.gpus >> g & 1U) != 0)
      state.left[g] = static_cast<std::int16_t>(state.left[g] - shape.gpu_milli);
  used_ += shape.milli();
  touch(spot.node);
  return true;
}

void Cluster::remove(const Shape& shape, Spot spot) {
  State& state = states_[spot.node];
  state.cpu += shape.cpu;
  state.memory += shape.memory;
  for (unsigned g = 0; g < state.gpus; ++g)
    if ((spot.gpus >> g & 1U) != 0)
      state.left[g] = static_cast<std::int16_t>(state.left[g] + shape.gpu_milli);
  used_ -= shape.milli();
  touch(spot.node);
}

Fragments::Fragments(const Workload& workload, const PodList& pods) {
  struct Typical {
    Shape shape;
    std::uint64_t count = 0;
  };
  // Memory makes no difference here, and shapes are sorted by CPU first, so equal ones are not always
  // neighbours.
  std::vector<Typical> typical;
  for (const Shape& shape : workload.shapes) typical.push_back({shape, shape.count});
  const auto key = [](const Shape& s) { return std::tuple(s.cpu, s.gpu_milli, s.num_gpu, s.spec); };
  std::sort(typical.begin(), typical.end(),
            [&](const Typical& a, const Typical& b) { return key(a.shape) < key(b.shape); });
  std::size_t kinds = 0;
  std::uint64_t pods_in_all = 0;
  for (const Typical& one : typical) {
    pods_in_all += one.count;
    if (kinds > 0 && key(typical[kinds - 1].shape) == key(one.shape))
      typical[kinds - 1].count += one.count;
    else
      typical[kinds++] = one;
  }
  typical.resize(kinds);
  std::sort(typical.begin(), typical.end(), [&](const Typical& a, const Typical& b) {
    if (a.count != b.count) return a.count > b.count;
    return std::tuple(a.shape.cpu, a.shape.gpu_milli, a.shape.num_gpu,
                      std::string_view(pods.specs[a.shape.spec])) >
           std::tuple(b.shape.cpu, b.shape.gpu_milli, b.shape.num_gpu,
                      std::string_view(pods.specs[b.shape.spec]));
  });
  kinds = 0;
  while (kinds < typical.size() && weight_ * 100 < pods_in_all * 95) weight_ += typical[kinds++].count;
  typical.resize(kinds);

  std::sort(typical.begin(), typical.end(), [](const Typical& a, const Typical& b) {
    return std::tuple(a.shape.gpu_milli, a.shape.num_gpu, a.shape.models, a.shape.cpu) <
           std::tuple(b.shape.gpu_milli, b.shape.num_gpu, b.shape.models, b.shape.cpu);
  });
  for (std::size_t i = 0; i < typical.size();) {
    const Shape& first = typical[i].shape;
    Group group{first.gpu_milli, first.num_gpu, cpu_.size(), 0};
    std::uint64_t upto = 0;
    for (; i < typical.size() && typical[i].shape.gpu_milli == first.gpu_milli &&
           typical[i].shape.num_gpu == first.num_gpu && typical[i].shape.models == first.models;
         ++i) {
      cpu_.push_back(typical[i].shape.cpu);
      upto_.push_back(upto += typical[i].count);
    }
    group.end = cpu_.size();
    // A pod without a GPU can use none of them, and one of more GPUs than a node can have neither.
    if (first.num_gpu == 0 || first.num_gpu > kMostGpusPerNode) continue;
    for (std::size_t m = 0; m < kMostModels; ++m)
      if ((first.models >> m & 1U) != 0) groups_[m].push_back(group);
  }
}

void Fragments::wanted(unsigned model, std::int32_t cpu, std::vector<std::uint64_t>& weights) const {
  weights.clear();
  for (const Group& group : groups_[model]) {
    const auto begin = cpu_.begin() + static_cast<std::ptrdiff_t>(group.begin);
    const auto enough = std::upper_bound(begin, cpu_.begin() + static_cast<std::ptrdiff_t>(group.end), cpu);
    weights.push_back(enough == begin ? 0 : upto_[static_cast<std::size_t>(enough - cpu_.begin()) - 1]);
  }
}

std::uint64_t Fragments::usable(unsigned model, const std::vector<std::uint64_t>& weights,
                                const std::int16_t* sorted, unsigned gpus) const {
  std::uint64_t rest = 0;
  for (unsigned g = 0; g < gpus; ++g) rest += static_cast<std::uint64_t>(sorted[g]);
  std::uint64_t sum = 0;
  unsigned small = 0;  // GPUs with too little left
  const std::vector<Group>& groups = groups_[model];
  for (std::size_t i = 0; i < groups.size(); ++i) {
    while (small < gpus && sorted[small] < groups[i].milli)
      rest -= static_cast<std::uint64_t>(sorted[small++]);
    if (gpus - small >= groups[i].num) sum += weights[i] * rest;
  }
  return sum;
}

std::uint64_t Fragments::usable(const State& state) const {
  wanted(state.model, state.cpu, scratch_);
  return usable(state.model, scratch_, state.sorted.data(), state.gpus);
}

}  // namespace bulkhead::replay
