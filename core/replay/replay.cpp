#include "core/replay/replay.hpp"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/replay/cluster.hpp"
#include "core/replay/draws.hpp"
#include "core/replay/policy.hpp"

namespace bulkhead::replay {

namespace {

constexpr std::uint64_t kStep = 256;  // arrivals between two calls of the progress

std::string plain(std::string_view name) {
  std::string out;
  for (const char c : lower(name))
    if (c != '-' && c != '_') out += c;
  return out;
}

Status checked(const NodeList& nodes, const PodList& pods, const Options& options) {
  if (!(options.arrived_percent > 0 && options.arrived_percent <= 10'000))
    return Error(Errc::invalid, fmt::format("arrivals of {} % of the GPUs; wanted more than 0, at most 10000",
                                            options.arrived_percent));
  if (options.points > 10'000)
    return Error(Errc::invalid, fmt::format("a curve of {} points; at most 10000", options.points));
  if (nodes.nodes.size() > kMostNodes || pods.pods.size() > kMostPods || nodes.models.size() > kMostModels)
    return Error(Errc::invalid,
                 fmt::format("{} nodes, {} pods, {} models; at most {}, {} and {}", nodes.nodes.size(),
                             pods.pods.size(), nodes.models.size(), kMostNodes, kMostPods, kMostModels));
  if (nodes.gpus() == 0) return Error(Errc::invalid, "the list of nodes has no GPU");
  if (std::none_of(pods.pods.begin(), pods.pods.end(), [](const Pod& pod) { return pod.num_gpu > 0; }))
    return Error(Errc::invalid, "no pod of the list asks for a GPU");
  return ok_status();
}

// One run: a cluster, a policy, and the figures so far.
class Run {
 public:
  static Result<std::unique_ptr<Run>> make(const NodeList& nodes, const PodList& pods, Policy policy,
                                           const Draws& draws) {
    auto run =
        std::unique_ptr<Run>(new Run(nodes, pods, policy == Policy::random ? draws.named : draws.shuffled));
    if (policy == Policy::ours) {
      BH_TRY(run->placer_, ours(run->cluster_, run->workload_));
    } else {
      run->placer_ = baseline(policy, run->cluster_, run->workload_, run->fragments_, draws.random);
    }
    run->outcome_.gpu_milli_total = run->cluster_.milli_total();
    return run;
  }

  std::uint64_t total() const { return outcome_.gpu_milli_total; }
  std::uint64_t arrived() const { return outcome_.gpu_milli_arrived; }
  std::uint64_t used() const { return cluster_.milli_used(); }
  std::optional<Spot> arrive(std::uint32_t pod) {
    const std::uint32_t index = workload_.shape_of[pod];
    const Shape& shape = workload_.shapes[index];
    ++outcome_.arrivals;
    outcome_.gpu_milli_arrived += shape.milli();
    // A model that no node has is a set without members, which the policies would read as any.
    auto spot = shape.models == 0 ? std::nullopt : placer_->choose(index);
    if (spot) {
      const bool placed = cluster_.place(shape, *spot);
      BH_ASSERT(placed);
      placer_->placed(index, *spot);
    } else {
      ++outcome_.failed;
      outcome_.gpu_milli_failed += shape.milli();
    }
    return spot;
  }
  void leave(std::uint32_t pod, Spot spot) {
    const std::uint32_t index = workload_.shape_of[pod];
    cluster_.remove(workload_.shapes[index], spot);
    placer_->removed(index, spot);
  }

  void point(double time) {
    outcome_.curve.push_back({time, percent(arrived()), percent(used()), fragmentation()});
  }
  double percent(std::uint64_t milli) const {
    return 100 * static_cast<double>(milli) / static_cast<double>(total());
  }

  // True: the caller wants no more. `count` is of anything that happens.
  bool stopped(std::uint64_t count, const Progress& progress, std::uint64_t done, std::uint64_t total) {
    if (count % kStep != 0 || !progress || progress(done, total)) return false;
    return outcome_.cancelled = true;
  }
  Outcome finish(double time, const Options& options, const Progress& progress, std::uint64_t total) && {
    if (options.points > 0) point(time);
    outcome_.allocated_percent = percent(used());
    outcome_.fragmentation_percent = fragmentation();
    // Too late to end the run, so the answer does not matter.
    if (progress && !outcome_.cancelled) (void)progress(total, total);
    return std::move(outcome_);
  }

 private:
  Run(const NodeList& nodes, const PodList& pods, const std::vector<std::uint32_t>& order)
      : cluster_(nodes, order),
        workload_(workload_of(pods, nodes)),
        fragments_(workload_, pods),
        usable_(cluster_.size()) {}

  // Of all nodes; looks only at those that changed since it was last asked.
  double fragmentation() {
    const auto look = [&](std::uint32_t n) {
      sum_ -= usable_[n];
      sum_ += usable_[n] = fragments_.usable(cluster_[n]);
    };
    if (!looked_) {
      for (std::uint32_t n = 0; n < cluster_.size(); ++n) look(n);
      looked_ = true;
    } else {
      for (auto n = cluster_.latest(); n != cluster_.none() && cluster_.changed(n) > seen_;
           n = cluster_.older(n))
        look(n);
    }
    seen_ = cluster_.now();
    const std::uint64_t idle = total_idle();
    if (idle == 0) return 0;
    return 100 * (1 - static_cast<double>(sum_) / static_cast<double>(fragments_.weight()) /
                          static_cast<double>(idle));
  }
  std::uint64_t total_idle() const { return cluster_.milli_total() - cluster_.milli_used(); }

  Cluster cluster_;
  Workload workload_;
  Fragments fragments_;
  std::unique_ptr<Placer> placer_;
  Outcome outcome_;
  std::vector<std::uint64_t> usable_;  // by node, when last looked at
  std::uint64_t sum_ = 0;
  std::uint64_t seen_ = 0;
  bool looked_ = false;
};

}  // namespace

std::string_view name_of(Policy policy) {
  switch (policy) {
    case Policy::random:
      return "01-Random";
    case Policy::dot_product:
      return "02-DotProd";
    case Policy::gpu_clustering:
      return "03-GpuClustering";
    case Policy::gpu_packing:
      return "04-GpuPacking";
    case Policy::best_fit:
      return "05-BestFit";
    case Policy::fgd:
      return "06-FGD";
    case Policy::ours:
      break;
  }
  return "bulkhead";
}

std::optional<Policy> policy_named(std::string_view name) {
  const std::string wanted = plain(name);
  if (wanted == "ours") return Policy::ours;
  for (const Policy policy : kPolicies) {
    const std::string known = plain(name_of(policy));
    if (wanted == known || (policy != Policy::ours && wanted == known.substr(2))) return policy;
  }
  return std::nullopt;
}

Result<Outcome> sample(const NodeList& nodes, const PodList& pods, Policy policy, const Options& options,
                       const Progress& progress) {
  BH_CHECK(checked(nodes, pods, options));
  const double target = options.arrived_percent / 100 * static_cast<double>(nodes.gpus() * kWholeGpu);
  BH_TRY(const auto draws, sampled(nodes, pods, target, options.seed));
  BH_TRY(auto run, Run::make(nodes, pods, policy, draws));
  const std::uint64_t total = draws.arrivals.size();
  std::size_t points = 0;  // of the curve so far; point k is at the first arrival beyond k steps
  for (std::uint64_t i = 0; i < total; ++i) {
    if (run->stopped(i, progress, i, total)) break;
    if (points < options.points) {
      const double steps = static_cast<double>(run->arrived()) / target * static_cast<double>(options.points);
      if (steps >= static_cast<double>(points)) {
        run->point(0);
        points = static_cast<std::size_t>(steps) + 1;
      }
    }
    run->arrive(draws.arrivals[i]);
  }
  return std::move(*run).finish(0, options, progress, total);
}

Result<Outcome> replay_times(const NodeList& nodes, const PodList& pods, Policy policy,
                             const Options& options, const Progress& progress) {
  if (!pods.timed)
    return Error(Errc::invalid, "the list of pods has no creation_time and deletion_time",
                 "sampled arrivals need no times");
  BH_CHECK(checked(nodes, pods, options));
  BH_TRY(auto run, Run::make(nodes, pods, policy, of_nodes(nodes, options.seed)));
  std::vector<std::uint32_t> coming(pods.pods.size()), going;
  for (std::uint32_t i = 0; i < coming.size(); ++i) {
    coming[i] = i;
    if (pods.pods[i].deleted) going.push_back(i);
  }
  std::stable_sort(coming.begin(), coming.end(),
                   [&](auto a, auto b) { return pods.pods[a].created < pods.pods[b].created; });
  std::stable_sort(going.begin(), going.end(),
                   [&](auto a, auto b) { return *pods.pods[a].deleted < *pods.pods[b].deleted; });
  std::vector<std::optional<Spot>> spots(pods.pods.size());

  const std::int64_t first = pods.pods[coming.front()].created, last = pods.pods[coming.back()].created;
  const double span = static_cast<double>(last - first);
  const double step = options.points > 0 ? span / static_cast<double>(options.points) : 0;
  double area = 0;  // GPU milli seconds in use
  std::int64_t now = first;
  std::uint64_t points = 0;
  // What holds from now to `time`.
  const auto pass = [&](std::int64_t time) {
    for (; points < options.points && step * static_cast<double>(points) < static_cast<double>(time - first);
         ++points)
      run->point(step * static_cast<double>(points));
    area += static_cast<double>(run->used()) * static_cast<double>(time - now);
    now = time;
  };
  std::size_t gone = 0;
  for (std::size_t i = 0; i < coming.size(); ++i) {
    if (run->stopped(i, progress, i, coming.size())) break;
    const Pod& pod = pods.pods[coming[i]];
    for (; gone < going.size() && *pods.pods[going[gone]].deleted <= pod.created; ++gone) {
      const std::uint32_t leaver = going[gone];
      // One that lives no time at all left on the spot.
      if (!spots[leaver]) continue;
      pass(*pods.pods[leaver].deleted);
      run->leave(leaver, *spots[leaver]);
    }
    pass(pod.created);
    const auto spot = run->arrive(coming[i]);
    if (!spot) continue;
    if (pod.deleted == pod.created)
      run->leave(coming[i], *spot);
    else
      spots[coming[i]] = spot;
  }
  Outcome outcome =
      std::move(*run).finish(static_cast<double>(now - first), options, progress, coming.size());
  if (now > first)
    outcome.allocated_percent =
        100 * area / static_cast<double>(outcome.gpu_milli_total) / static_cast<double>(now - first);
  return outcome;
}

}  // namespace bulkhead::replay
