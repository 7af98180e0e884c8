#include "core/replay/draws.hpp"

#include <algorithm>

#include <fmt/format.h>

namespace bulkhead::replay {

namespace {

std::uint64_t milli_of(const Pod& pod) { return std::uint64_t{pod.num_gpu} * pod.gpu_milli; }

// Takes random ones out of a list, each in logarithmic time: a tree of how many are left in each part.
class Thinning {
 public:
  explicit Thinning(std::size_t size) : tree_(size + 1), left_(size) {
    for (std::size_t i = 1; i <= size; ++i) {
      tree_[i] += 1;
      if (const std::size_t above = i + (i & (0 - i)); above <= size) tree_[above] += tree_[i];
    }
  }
  std::size_t left() const { return left_; }
  // Takes out the rank-th of those left, from 0; its index.
  std::size_t take(std::size_t rank) {
    std::size_t at = 0, step = 1;
    while (step * 2 < tree_.size()) step *= 2;
    for (; step > 0; step /= 2) {
      if (at + step >= tree_.size() || tree_[at + step] > rank) continue;
      at += step;
      rank -= tree_[at];
    }
    for (std::size_t i = at + 1; i < tree_.size(); i += i & (0 - i)) --tree_[i];
    --left_;
    return at;
  }

 private:
  std::vector<std::uint32_t> tree_;
  std::size_t left_;
};

// Between the arrivals and the nodes the original starts its scheduler, whose client draws a timeout for each
// of ten kinds of objects that it watches. With ten, and with no other number up to 26, all policies that
// depend on the order come out as published.
constexpr int kTimeouts = 10;

// The original names each node by its place in a permutation, and the lesser name wins.
void order_nodes(const NodeList& nodes, Draws& draws) {
  draws.named.resize(nodes.nodes.size());
  for (std::uint32_t i = 0; i < draws.named.size(); ++i) draws.named[i] = i;
  std::stable_sort(draws.named.begin(), draws.named.end(), [&](std::uint32_t a, std::uint32_t b) {
    return nodes.nodes[a].name < nodes.nodes[b].name;
  });
  for (int i = 0; i < kTimeouts; ++i) (void)draws.random.int63();
  const std::vector<std::uint32_t> place =
      draws.random.permutation(static_cast<std::uint32_t>(draws.named.size()));
  draws.shuffled.resize(place.size());
  for (std::size_t i = 0; i < place.size(); ++i) draws.shuffled[place[i]] = draws.named[i];
}

Draws started(std::uint64_t seed) {
  Draws draws{{}, {}, {}, GoRandom(seed)};
  (void)draws.random.int63();  // the original prints one
  return draws;
}

}  // namespace

Result<Draws> sampled(const NodeList& nodes, const PodList& pods, double target, std::uint64_t seed) {
  const auto count = static_cast<std::uint32_t>(pods.pods.size());
  std::vector<std::uint32_t> named = pods.by_name;
  if (named.empty()) {
    named.resize(count);
    for (std::uint32_t i = 0; i < count; ++i) named[i] = i;
  }
  std::uint64_t asked = 0;
  for (const Pod& pod : pods.pods) asked += milli_of(pod);

  Draws draws = started(seed);
  GoRandom& random = draws.random;
  draws.arrivals = named;
  random.shuffle(draws.arrivals);
  if (static_cast<double>(asked) > target) {
    Thinning thinning(count);
    std::vector<bool> out(count);
    while (static_cast<double>(asked) > target) {
      const std::size_t one = thinning.take(random.below(static_cast<std::uint32_t>(thinning.left())));
      out[one] = true;
      asked -= milli_of(pods.pods[draws.arrivals[one]]);
    }
    std::size_t kept = 0;
    for (std::size_t i = 0; i < count; ++i)
      if (!out[i]) draws.arrivals[kept++] = draws.arrivals[i];
    draws.arrivals.resize(kept);
  } else if (static_cast<double>(asked) < target) {
    const auto expected = static_cast<std::uint64_t>(target / static_cast<double>(asked) * count);
    const Error too_many(Errc::invalid,
                         fmt::format("it would take some {} arrivals; at most {}", expected, kMostArrivals),
                         "a smaller fleet, or fewer percent of it");
    if (expected > kMostArrivals) return too_many;
    for (;;) {
      const std::uint32_t pod = named[random.below(count)];
      if (static_cast<double>(asked + pods.pods[pod].gpu_milli) > target) break;
      if (draws.arrivals.size() == kMostArrivals) return too_many;
      asked += milli_of(pods.pods[pod]);
      draws.arrivals.push_back(pod);
    }
  }
  order_nodes(nodes, draws);
  return draws;
}

Draws of_nodes(const NodeList& nodes, std::uint64_t seed) {
  Draws draws = started(seed);
  order_nodes(nodes, draws);
  return draws;
}

}  // namespace bulkhead::replay
