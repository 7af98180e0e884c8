// Scores and choices of the published policies. A score is kept by (shape, node) and computed again only for
// nodes that changed since the shape was last asked for; the best of 64 nodes at a time is kept too.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "core/replay/policy.hpp"

namespace bulkhead::replay {

namespace {

using Score = std::int16_t;
constexpr Score kNoFit = std::numeric_limits<Score>::min();
constexpr std::size_t kBlock = 64;
constexpr std::size_t kMostScores = std::size_t{1} << 27U;  // kept; shapes beyond are scored anew each time

// The greatest node of the original, for which scores are made to lie within 0 and 100.
constexpr double kGreatCpu = 128'000;
constexpr double kGreatGpu = 8'000;

Score clamped(double score) { return static_cast<Score>(std::clamp(std::trunc(score), -32'000.0, 32'000.0)); }

class Baseline final : public Placer {
 public:
  Baseline(Policy policy, const Cluster& cluster, const Workload& workload, const Fragments& fragments,
           const GoRandom& random)
      : policy_(policy),
        cluster_(cluster),
        shapes_(workload.shapes),
        fragments_(fragments),
        blocks_((cluster.size() + kBlock - 1) / kBlock),
        random_(random),
        tables_(workload.shapes.size()),
        of_class_(cluster.classes()) {
    if (policy == Policy::gpu_clustering) kinds_.resize(cluster.size());
    if (policy == Policy::fgd) {
      usable_.resize(cluster.size());
      usable_at_.resize(cluster.size(), ~std::uint64_t{0});
    }
  }

  std::optional<Spot> choose(std::uint32_t shape) override {
    const Table& table = fresh(shape);
    const auto node = policy_ == Policy::random ? any(table) : best(table);
    if (!node) return std::nullopt;
    return Spot{*node, gpus_of(*node, shapes_[shape])};
  }
  void placed(std::uint32_t shape, Spot spot) override {
    if (!kinds_.empty() && shapes_[shape].num_gpu > 0) ++kinds_[spot.node][kind_of(shapes_[shape])];
  }
  void removed(std::uint32_t shape, Spot spot) override {
    if (!kinds_.empty() && shapes_[shape].num_gpu > 0) --kinds_[spot.node][kind_of(shapes_[shape])];
  }

 private:
  struct Table {
    std::vector<Score> scores;         // by node, kNoFit beyond the last
    std::vector<Score> tops;           // by block
    std::vector<std::uint8_t> counts;  // by block: nodes that fit; of the random policy only
    std::uint64_t fitting = 0;         // the sum of those
    std::uint64_t seen = 0;            // the cluster's clock
  };

  // ---- tables

  const Table& fresh(std::uint32_t shape) {
    const bool keeps = !tables_[shape].scores.empty() || kept_ + cluster_.size() <= kMostScores;
    Table& table = keeps ? tables_[shape] : spare_;
    if (table.scores.empty() || !keeps) {
      fill(table, shapes_[shape]);
      if (keeps) kept_ += cluster_.size();
    } else {
      for (auto n = cluster_.latest(); n != cluster_.none() && cluster_.changed(n) > table.seen;
           n = cluster_.older(n))
        renew(table, n, score(n, shapes_[shape]));
    }
    table.seen = cluster_.now();
    return table;
  }

  void fill(Table& table, const Shape& shape) {
    table.scores.assign(blocks_ * kBlock, kNoFit);
    table.tops.assign(blocks_, kNoFit);
    table.counts.assign(policy_ == Policy::random ? blocks_ : 0, 0);
    table.fitting = 0;
    std::fill(of_class_.begin(), of_class_.end(), std::nullopt);
    for (std::uint32_t n = 0; n < cluster_.size(); ++n) {
      if (cluster_.changed(n) != 0) {
        renew(table, n, score(n, shape));
        continue;
      }
      std::optional<Score>& same = of_class_[cluster_.class_of(n)];
      if (!same) same = score(n, shape);
      renew(table, n, *same);
    }
  }

  void renew(Table& table, std::uint32_t node, Score now) const {
    const std::size_t block = node / kBlock;
    const Score old = std::exchange(table.scores[node], now);
    if (policy_ == Policy::random) {
      const int more = (now != kNoFit ? 1 : 0) - (old != kNoFit ? 1 : 0);
      table.counts[block] = static_cast<std::uint8_t>(table.counts[block] + more);
      table.fitting += static_cast<std::uint64_t>(more);
    } else if (now >= table.tops[block]) {
      table.tops[block] = now;
    } else if (old == table.tops[block]) {
      const auto first = table.scores.begin() + static_cast<std::ptrdiff_t>(block * kBlock);
      table.tops[block] = *std::max_element(first, first + kBlock);
    }
  }

  std::optional<std::uint32_t> best(const Table& table) const {
    Score top = kNoFit;
    for (const Score one : table.tops) top = std::max(top, one);
    if (top == kNoFit) return std::nullopt;
    const auto block =
        static_cast<std::size_t>(std::find(table.tops.begin(), table.tops.end(), top) - table.tops.begin());
    const Score* scores = table.scores.data() + block * kBlock;
    return static_cast<std::uint32_t>(
        block * kBlock + static_cast<std::size_t>(std::find(scores, scores + kBlock, top) - scores));
  }

  std::optional<std::uint32_t> any(const Table& table) {
    if (table.fitting == 0) return std::nullopt;
    // The original draws for a choice of one GPU, but not for a choice of one node.
    std::uint64_t skip = table.fitting == 1 ? 0 : random_.below(static_cast<std::uint32_t>(table.fitting));
    std::size_t block = 0;
    for (; skip >= table.counts[block]; ++block) skip -= table.counts[block];
    std::size_t node = block * kBlock;
    for (;; ++node) {
      if (table.scores[node] == kNoFit) continue;
      if (skip == 0) break;
      --skip;
    }
    return static_cast<std::uint32_t>(node);
  }

  // ---- scores: greater is better; the first node in order wins

  Score score(std::uint32_t node, const Shape& shape) {
    const State& state = cluster_[node];
    if (!state.fits(shape)) return kNoFit;
    switch (policy_) {
      case Policy::dot_product:
        return dot_product(state, shape);
      case Policy::gpu_clustering:
        return clustering(node, shape);
      case Policy::gpu_packing:
        return packing(state, shape);
      case Policy::best_fit:
        return best_fit(state, shape);
      case Policy::fgd:
        return least_fragments(node, shape).first;
      case Policy::random:
      case Policy::ours:
        break;
    }
    return 0;
  }

  // What is left and what is asked for should not point the same way.
  static Score dot_product(const State& state, const Shape& shape) {
    const double cpu = state.cpu / kGreatCpu * (shape.cpu / kGreatCpu);
    const double gpu =
        static_cast<double>(state.milli()) / kGreatGpu * (static_cast<double>(shape.milli()) / kGreatGpu);
    return clamped(100 * (1 - (cpu + gpu) / 2));
  }

  static Score best_fit(const State& state, const Shape& shape) {
    const double cpu = (state.cpu - shape.cpu) / kGreatCpu * 0.5;
    const double gpu = static_cast<double>(state.milli() - shape.milli()) / kGreatGpu * 0.5;
    return clamped((1 - (cpu + gpu)) * 100);
  }

  // Shared GPUs first, then free GPUs of a node in use, then a free node.
  static Score packing(const State& state, const Shape& shape) {
    if (shape.num_gpu == 0) return 0;
    const int free = static_cast<int>(state.with(kWholeGpu));
    if (free == state.gpus) return static_cast<Score>(std::max(33 - free, free));
    int opened = 0, percent_left = 0;
    const unsigned first = state.gpus - state.with(shape.gpu_milli);
    for (unsigned i = first; i < first + shape.num_gpu; ++i) {
      opened += state.sorted[i] == kWholeGpu ? 1 : 0;
      percent_left += state.sorted[i] * 100 / kWholeGpu;
    }
    if (opened > 0) return static_cast<Score>(std::max(50 - opened, 33));
    return static_cast<Score>(std::max(100 - percent_left / 10, 50));
  }

  // 0: a share; n: n whole GPUs.
  static std::size_t kind_of(const Shape& shape) { return shape.shares() ? 0 : shape.num_gpu; }

  // Pods of one kind together; then free nodes; within, the fuller node.
  Score clustering(std::uint32_t node, const Shape& shape) const {
    if (shape.num_gpu == 0) return 0;
    const auto& kinds = kinds_[node];
    const auto different =
        std::count_if(kinds.begin(), kinds.end(), [](std::uint32_t pods) { return pods > 0; });
    const bool same = kinds[kind_of(shape)] > 0;
    const auto left = static_cast<std::int64_t>(cluster_[node].milli());
    const int fuller = static_cast<int>(25 * (8000 - left) / 8000);
    if (same) return static_cast<Score>(fuller + (different == 1 ? 75 : 50));
    return static_cast<Score>(fuller + (different == 0 ? 25 : 0));
  }

  // Least growth of fragments, in steps of the original's int(100 * sigmoid(delta / 1000)), and the GPU for a
  // share.
  std::pair<Score, unsigned> least_fragments(std::uint32_t node, const Shape& shape) {
    const State& state = cluster_[node];
    if (usable_at_[node] != cluster_.changed(node)) {
      usable_[node] = fragments_.usable(state);
      usable_at_[node] = cluster_.changed(node);
    }
    const auto before = static_cast<std::int64_t>(usable_[node]);
    const auto weight = static_cast<std::int64_t>(fragments_.weight());
    const auto asked = weight * static_cast<std::int64_t>(shape.milli());
    fragments_.wanted(state.model, state.cpu - shape.cpu, weights_);
    const auto scored = [&](const std::int16_t* sorted) {
      const auto after =
          static_cast<std::int64_t>(fragments_.usable(state.model, weights_, sorted, state.gpus));
      // Fragments are the idle milli less the usable, so they shrink by what is taken and grow by what is
      // lost.
      const double shrunk = static_cast<double>(asked - (before - after)) / static_cast<double>(weight);
      return static_cast<Score>(100.0 / (1.0 + std::exp(-shrunk / 1000)));
    };
    std::array<std::int16_t, kMostGpusPerNode> sorted = state.sorted;
    if (!shape.shares()) {
      std::fill_n(sorted.begin() + (state.gpus - shape.num_gpu), shape.num_gpu, std::int16_t{0});
      std::rotate(sorted.begin(), sorted.begin() + (state.gpus - shape.num_gpu), sorted.begin() + state.gpus);
      return {scored(sorted.data()), 0};
    }
    std::pair<Score, unsigned> best{kNoFit, 0};
    for (unsigned g = 0; g < state.gpus; ++g) {
      if (state.left[g] < shape.gpu_milli) continue;
      const auto twin = std::find(state.left.begin(), state.left.begin() + g, state.left[g]);
      if (twin != state.left.begin() + g) continue;  // scored already, and the first of them wins
      const auto rest = static_cast<std::int16_t>(state.left[g] - shape.gpu_milli);
      auto at = static_cast<std::size_t>(
          std::find(state.sorted.begin(), state.sorted.begin() + state.gpus, state.left[g]) -
          state.sorted.begin());
      sorted = state.sorted;
      for (; at > 0 && sorted[at - 1] > rest; --at) sorted[at] = sorted[at - 1];
      sorted[at] = rest;
      const Score one = scored(sorted.data());
      if (one > best.first) best = {one, g};
    }
    return best;
  }

  // ---- the GPUs on the node

  std::uint32_t gpus_of(std::uint32_t node, const Shape& shape) {
    const State& state = cluster_[node];
    if (shape.num_gpu == 0) return 0;
    if (!shape.shares()) {
      std::uint32_t mask = 0;
      unsigned wanted = shape.num_gpu;
      for (unsigned g = 0; g < state.gpus && wanted > 0; ++g) {
        if (state.left[g] != kWholeGpu) continue;
        mask |= 1U << g;
        --wanted;
      }
      return mask;
    }
    if (policy_ == Policy::fgd) return 1U << least_fragments(node, shape).second;
    unsigned chosen = kMostGpusPerNode;
    std::uint32_t fitting = 0;
    for (unsigned g = 0; g < state.gpus; ++g) {
      if (state.left[g] < shape.gpu_milli) continue;
      if (policy_ == Policy::random ? random_.below(++fitting) == 0
                                    : chosen == kMostGpusPerNode || state.left[g] < state.left[chosen])
        chosen = g;
    }
    return 1U << chosen;
  }

  Policy policy_;
  const Cluster& cluster_;
  const std::vector<Shape>& shapes_;
  const Fragments& fragments_;
  std::size_t blocks_;
  GoRandom random_;
  std::vector<Table> tables_;
  Table spare_;
  std::size_t kept_ = 0;
  std::vector<std::optional<Score>> of_class_;
  std::vector<std::array<std::uint32_t, kMostGpusPerNode + 1>>
      kinds_;                                      // pods by kind_of(), of clustering only
  std::vector<std::uint64_t> usable_, usable_at_;  // of FGD only: at the node's latest change
  std::vector<std::uint64_t> weights_;
};

}  // namespace

std::unique_ptr<Placer> baseline(Policy policy, const Cluster& cluster, const Workload& workload,
                                 const Fragments& fragments, const GoRandom& random) {
  return std::make_unique<Baseline>(policy, cluster, workload, fragments, random);
}

}  // namespace bulkhead::replay
