// Replays openb-style traces: what share of a fleet's GPUs does a placement policy fill? Parses lists of
// nodes and pods, draws arrivals from them as the experiment of FGD (ATC'23) does, or takes the trace's own
// arrivals and departures, and runs them through one of the published policies or ours (core/fraction). Pure:
// the same lists, options and seed give the same outcome.
//
// Method and policies' names: github hkust-adsl/kubernetes-scheduler-simulator (Apache-2.0), read, not
// copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.hpp"

namespace bulkhead::replay {

// ---- lists

inline constexpr std::size_t kMostText = std::size_t{1} << 30U;  // bytes of one list
inline constexpr std::size_t kMostNodes = 200'000;               // also after enlarge()
inline constexpr std::size_t kMostPods = 10'000'000;
inline constexpr unsigned kMostGpusPerNode = 16;
inline constexpr unsigned kMostGpusPerPod = 1024;  // more than a node has: the pod fits nowhere
inline constexpr std::size_t kMostModels = 64;     // GPU models of nodes, "" is one of them
inline constexpr std::size_t kMostSpecs = 4096;    // sets of models that pods ask for
inline constexpr std::size_t kMostName = 253;      // bytes of a node's name, a model, a set of models
inline constexpr std::int64_t kMostAmount = 1'000'000'000;  // CPU milli, MiB, seconds
inline constexpr std::size_t kMostMistakes = 20;            // that one Error tells of; it counts the rest

struct Node {
  std::string name;
  std::int64_t cpu_milli = 0;
  std::int64_t memory_mib = 0;
  unsigned gpus = 0;
  unsigned model = 0;  // in NodeList::models
};

struct NodeList {
  std::vector<Node> nodes;          // as in the text
  std::vector<std::string> models;  // of GPUs, in order of appearance; models[0] is "": a node without one
  std::uint64_t gpus() const;
};

struct Pod {
  std::int64_t cpu_milli = 0;
  std::int64_t memory_mib = 0;
  unsigned num_gpu = 0;
  unsigned gpu_milli = 0;               // of each GPU: 1000 with several GPUs, 0 with none
  unsigned spec = 0;                    // in PodList::specs; 0 with no GPU
  std::int64_t created = 0;             // seconds; 0 where the list has no times
  std::optional<std::int64_t> deleted;  // not before created; nothing: it stays
};

struct PodList {
  std::vector<Pod> pods;
  // Sets of GPU models that will do, "V100M16|V100M32" each, in order of appearance; specs[0] is "": any.
  std::vector<std::string> specs;
  bool timed = false;  // the list has both creation_time and deletion_time
  // Indices of pods by their names (ties: as listed); empty where that is the list's own order. Draws count
  // from it.
  std::vector<std::uint32_t> by_name;
};

// A comma-separated list: one heading, then one row a line, each with as many fields as the heading. Columns
// are found by name, in any order, and others are ignored; LF or CRLF; "quoted, ""fields""" within a line;
// blanks around a field, empty lines and a byte order mark are skipped. A number is a whole one from 0, "8"
// or "8.0".
//   nodes: sn (or name), cpu_milli, memory_mib, gpu, and model (may lack or be empty)
//   pods:  cpu_milli, memory_mib, num_gpu, gpu_milli, and (may lack) name, gpu_spec, creation_time,
//   deletion_time.
//          Without a GPU, gpu_milli and gpu_spec say nothing. Empty: gpu_spec, any model; deletion_time, it
//          stays.
// Errc::invalid tells every mistake with its line, 'line 7: gpu: "x" is not a whole number', one to a line of
// the message, up to kMostMistakes, then how many more. Two nodes of one name are a mistake, two pods are
// not.
Result<NodeList> parse_nodes(std::string_view text);
Result<PodList> parse_pods(std::string_view text);

// The list repeated until it has `nodes` nodes (the last round may be cut short: rounds are whole if nodes is
// a multiple); fewer than it has: its first ones. Copy k > 0 of "n" is called "n~k". Errc::invalid above
// kMostNodes.
Result<NodeList> enlarge(const NodeList& list, std::size_t nodes);
// The least number of nodes with which enlarge() gives at least `gpus` GPUs. Errc::invalid: the list has
// none, or it would take more than kMostNodes.
Result<std::size_t> nodes_for_gpus(const NodeList& list, std::uint64_t gpus);

// ---- policies

enum class Policy { random, dot_product, gpu_clustering, gpu_packing, best_fit, fgd, ours };
inline constexpr Policy kPolicies[] = {Policy::random,      Policy::dot_product, Policy::gpu_clustering,
                                       Policy::gpu_packing, Policy::best_fit,    Policy::fgd,
                                       Policy::ours};
std::string_view name_of(Policy policy);  // as published: "01-Random" ... "06-FGD"; "bulkhead" for ours
// That name, its part after the number, or "ours"; capitals, "-" and "_" make no difference ("fgd",
// "best-fit").
std::optional<Policy> policy_named(std::string_view name);

// ---- experiments

struct Point {
  double time = 0;               // seconds since the first arrival; 0 in sample()
  double arrived_percent = 0;    // GPU milli that have arrived, of the fleet's
  double allocated_percent = 0;  // GPU milli in use, of the fleet's
  double fragmentation_percent =
      0;  // idle GPU milli that a typical pod expects not to be able to use, of the idle
};

struct Outcome {
  double allocated_percent = 0;      // the published figure: at the end; in replay_times() the mean over time
  double fragmentation_percent = 0;  // at the end
  std::uint64_t arrivals = 0;        // pods
  std::uint64_t failed = 0;          // pods that found no place and were dropped
  std::uint64_t gpu_milli_arrived = 0;
  std::uint64_t gpu_milli_failed = 0;
  std::uint64_t gpu_milli_total = 0;  // the fleet's
  std::vector<Point> curve;           // at most Options::points + 1, the last at the end
  bool cancelled = false;             // the figures are those of the part that ran
};

// Called now and then, at least every 1024 arrivals, and once at the end of a run that was not cancelled;
// false ends the run. The unit of `total` is the experiment's own.
using Progress = std::function<bool(std::uint64_t done, std::uint64_t total)>;

struct Options {
  std::uint64_t seed = 42;       // of the nodes' order, the pods' order, the draws and the random policy
  double arrived_percent = 130;  // that have arrived when sample() ends, (0, 10'000]
  std::size_t points = 200;      // of the curve, at most 10'000; 0: none
};

// At most so many arrivals of one run; an experiment that would take more is Errc::invalid.
inline constexpr std::uint64_t kMostArrivals = 50'000'000;

// FGD's experiment. The pods arrive once each, shuffled; then pods drawn with replacement follow, until the
// next would bring the arrivals' GPU milli above arrived_percent of the fleet's (the original counts one GPU
// of a pod of several there). If the pods ask for more than that from the start, random ones are left out
// until they do not. Each arrival is placed or dropped; nobody leaves. Nodes are shuffled too: where a policy
// has no opinion, the first that fits in that order is taken. All policies see the same arrivals and nodes of
// a seed, and they are the original's of that seed: its generator is used (seeds count modulo 2^31 - 1). The
// original's random policy draws from a list in an order that its threads make; here it is that of names, so
// that policy alone comes out near the original's figure of a seed, not on it. The mix of typical pods that
// FGD and ours are told is counted over the whole list.
// Errc::invalid: options out of bounds, no GPU in the fleet, no pod with a GPU.
Result<Outcome> sample(const NodeList& nodes, const PodList& pods, Policy policy, const Options& options,
                       const Progress& progress = {});

// The trace's own life: each pod arrives at its creation and leaves at its deletion (departures first at
// equal times, arrivals in the list's order); a pod that finds no place is dropped. The mean over time is
// from the first arrival to the last. arrived_percent is not used. Errc::invalid as above, and for a list
// without times.
Result<Outcome> replay_times(const NodeList& nodes, const PodList& pods, Policy policy,
                             const Options& options, const Progress& progress = {});

}  // namespace bulkhead::replay
