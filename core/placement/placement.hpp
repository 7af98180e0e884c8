// The one engine in front of placement, for one host or a whole fleet: a request for MIG instances, software
// shares or whole GPUs becomes a Choice (all parts or none) or a Refusal, which counts what is in the way and
// names changes that were tried and do help. It decides over grid::Fleet (MIG), fraction::Fleet (shares) and
// an index of whole-GPU sets of its own, and asks a filter only when a constraint needs one. Pure and
// deterministic: the same calls in the same order give the same answers, and finding, refusing and what-if
// leave no trace.
//
// Models. All parts of an answer are on one GPU model: the first that can hold them all, in the order of
// Request::models, or in order of add_model when that is empty.
//
// Order of choice within a model, ties included:
//   mig         an idle instance of a GPU with a fixed layout (Pool::mig): lowest GPU, then lowest start.
//   Then GPUs cut on
//               demand (Pool::dynamic) in the order of grid::Fleet.
//   share       GPUs of Pool::share, then of Pool::dynamic, each by the rule of fraction::Fleet. When a
//   constraint forbids
//               the GPU which that rule prefers: of the same node, the allowed GPU with the least free milli,
//               then the lowest number.
//   exclusive,  one host for the whole set if any can, by: most NVLink links of the weakest pair, most links
//   in sum, passthrough fewest NUMA nodes, fewest dynamic GPUs, fewest free GPUs left, most links in sum
//   among those left, most left
//               on one NUMA node, lowest host, lowest GPU numbers. When no host can and the topology allows
//               several: of the hosts with most free GPUs all of them, and so on (ties: lowest host), the
//               last by the order above.
//   with same_gpu, same_numa, same_node: the GPU that comes first by the order above, among those whose GPU,
//   NUMA node or
//               host has room for all, says which. There, part by part, the place where least is spoilt (mig:
//               fixed before dynamic, an instance there before none, least growth, fewest free units, lowest
//               start, lowest number; share: Pool::share before dynamic, least free milli, lowest number),
//               none that leaves too little for the rest.
//   with spread_gpus, spread_hosts: level by level: nobody gets a second part while one without could take
//   it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/result.hpp"
#include "core/fraction/fraction.hpp"
#include "core/grid/grid.hpp"
#include "core/mig/mig.hpp"

namespace bulkhead::placement {

using HostNo = std::uint32_t;   // in order of add_host, from 0
using GpuNo = std::uint32_t;    // over all hosts, in order of add_host
using ModelNo = std::uint16_t;  // in order of add_model
using PlacementId = std::uint64_t;
inline constexpr PlacementId no_placement = 0;
inline constexpr std::int32_t whole_gpu = 1000;  // milli
inline constexpr unsigned most_gpus_of_host = 16, most_models = 64, most_count = 1024, most_terms = 64,
                          most_text = 253;
inline constexpr std::size_t most_hosts = 200'000;

enum class Class : std::uint8_t { mig, share, exclusive, passthrough };
// What a GPU is kept for. `mig`: a fixed layout, its present instances are handed out. `dynamic`: serves any
// class, one at a time, and MIG instances are cut on demand; idle ones are reclaimed. `closed`: nothing goes
// there.
enum class Pool : std::uint8_t { closed, mig, share, exclusive, passthrough, dynamic };
// Heat or power, as the caller sees it. Nothing new goes to `hot`.
enum class Band : std::uint8_t { cool, warm, hot };
enum class Latency : std::uint8_t { batch, interactive };
enum class Topology : std::uint8_t { any, same_gpu, same_numa, same_node, spread_gpus, spread_hosts };
enum class Alone : std::uint8_t { no, gpu, host };  // where no other tenant may be
std::string_view name_of(Class cls);
std::string_view name_of(Pool pool);
std::string_view name_of(Band band);
std::string_view name_of(Topology topology);

// ---- what there is ---------------------------------------------------------------------------------------

struct Model {
  std::string name = {};
  mig::Geometry geometry = {};  // empty: no MIG
  std::int64_t memory_mib = 0;  // of one GPU; 0: unknown, never a reason to refuse
};

struct Instance {        // in the hardware now
  unsigned profile = 0;  // profile id
  unsigned start = 0;
  friend auto operator<=>(const Instance&, const Instance&) = default;
};

struct Gpu {
  std::string uuid = {};
  ModelNo model = 0;
  Pool pool = Pool::exclusive;
  unsigned numa = 0;
  Band band = Band::cool;
  bool drained = false;
  bool mig_on = false;
  std::vector<Instance> instances = {};  // nobody's yet; what somebody has comes through adopt
};

struct Host {
  std::string name = {};
  std::int64_t cpu_milli = 0;
  std::int64_t memory_mib = 0;
  std::vector<std::string> taints = {};
  std::vector<std::string> labels = {};  // "zone=a"
  bool drained = false;
  std::vector<Gpu> gpus = {};
  std::vector<std::uint8_t> nvlink = {};  // links between GPU i and j at [i * gpus + j]; empty: none
};

// ---- what is wanted --------------------------------------------------------------------------------------

struct Request {
  std::string tenant = {};
  Class cls = Class::mig;
  unsigned count = 1;           // instances, shares or GPUs
  std::string profile = {};     // mig: a name, as mig::Geometry::by_name takes it
  std::int32_t milli = 0;       // share: weight of each, 1..1000
  std::int64_t memory_mib = 0;  // share: GPU memory of each
  std::int64_t cpu_milli = 0;   // of the host, for each part
  std::int64_t host_memory_mib = 0;
  Topology topology = Topology::any;
  // spread: no GPU (host) gets more parts than the one with fewest plus this; that one may be full, but no
  // other constraint excludes it. At least 1. Whole GPUs: spread_gpus asks nothing.
  unsigned max_skew = 1;
  std::vector<std::string> models = {};     // names in order of preference; empty: any
  std::vector<std::string> tolerates = {};  // taints; "*": all
  std::vector<std::string> labels = {};     // the host has all of these
  Latency latency = Latency::batch;
  std::optional<Band> most_band = {};  // hottest that will do; empty: by latency, see Rules
  std::vector<std::string> avoid_on_gpu = {},
                           avoid_on_host = {};  // tenants; holds in both directions while it stays
  Alone alone = Alone::no;                      // likewise
  int priority = 0;         // higher may ask lower to go; see WayKind::evict. Nobody is preempted here
  bool movable = false;     // may be moved once placed
  std::uint64_t price = 1;  // of one move of one part, in the caller's unit
  std::optional<std::int64_t> ends = {};  // when it will be gone, in the caller's clock
};

// The hottest band new work may go to, by latency; at most warm.
struct Rules {
  Band batch = Band::warm;
  Band interactive = Band::cool;
};

// ---- answers ---------------------------------------------------------------------------------------------

struct Part {
  HostNo host = 0;
  GpuNo gpu = 0;
  unsigned numa = 0;
  unsigned profile = 0;          // mig: profile id
  unsigned start = 0, size = 0;  // mig: in memory slices
  std::int32_t milli = 0;        // share: weight; exclusive, passthrough: whole_gpu
  std::int64_t memory_mib = 0;   // share
  std::int32_t growth = 0;       // mig, cut on demand: growth of F, see grid
  bool cut = false;              // mig: an instance has to be made (see Step); false: it is there
  friend bool operator==(const Part&, const Part&) = default;
};

enum class StepKind : std::uint8_t { destroy_instance, disable_mig, enable_mig, create_instance };
std::string_view name_of(StepKind kind);
struct Step {
  StepKind kind = StepKind::create_instance;
  GpuNo gpu = 0;
  unsigned profile = 0, start = 0;
  friend bool operator==(const Step&, const Step&) = default;
};

struct Choice {
  std::vector<Part> parts = {};
  std::vector<Step> steps = {};  // in the order to take them
  ModelNo model = 0;
  std::vector<std::uint64_t> seen = {};  // generation of each part's host when this was chosen
};

// Why a GPU cannot take a part, in the order in which it is asked: each GPU is counted once, at the first
// that holds.
enum class Why : std::uint8_t {
  pool,
  model,
  profile,
  drained,
  label,
  taint,
  band,
  anti_affinity,
  host_room,
  busy,
  room,
  none,
};
inline constexpr std::size_t why_count = static_cast<std::size_t>(Why::none) + 1;
std::string_view name_of(Why why);

struct Reason {
  Why why = Why::none;  // none: a topology or a set, not a GPU, is what fails
  std::string text = {};
  std::int64_t needs = 0, has = 0;  // of the thing that the text names
};

// One placement's part goes elsewhere.
struct Move {
  PlacementId placement = no_placement;
  std::size_t part = 0;  // index in Placement::parts
  Part to = {};
};

enum class WayKind : std::uint8_t { moves, ends, smaller, other_class, without, evict };
std::string_view name_of(WayKind kind);
struct Way {
  WayKind kind = WayKind::moves;
  std::string text = {};
  std::vector<Move> moves = {};         // moves: to be made in this order
  std::vector<PlacementId> gone = {};   // ends, evict: without these it fits
  std::optional<std::int64_t> at = {};  // ends: when
  std::optional<Request> instead = {};  // smaller, other_class, without: this fits now
  std::uint64_t price = 0;              // of the moves
};

struct Refusal {
  std::vector<Reason> reasons = {};                // what decides it first
  std::array<std::uint64_t, why_count> gpus = {};  // how many GPUs each Why excludes; none: could take a part
  std::vector<Way> ways = {};  // nearest first: moves, ends, smaller, other class, without, evict
  std::string str() const;     // one line a reason and a way
};

struct Placement {
  PlacementId id = no_placement;
  Request request = {};
  ModelNo model = 0;
  std::vector<Part> parts = {};
};

// What a refusal may spend on ways to yes. Ways that are named were tried; that there are no others is not
// promised.
struct Effort {
  unsigned moves = 3;       // most moves of one way
  std::size_t trials = 64;  // times something is tried, for each kind of way
  bool ways = true;
};

// ---- the engine ------------------------------------------------------------------------------------------

class Engine {
 public:
  explicit Engine(Rules rules = {});
  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  Result<ModelNo> add_model(Model model);
  Result<HostNo> add_host(Host host);
  // What typical shares look like, for the rule of fraction::Fleet. Until then: an eighth, a quarter, a half
  // and a whole GPU, as often as each other.
  Status expect(std::span<const fraction::Typical> mix);

  // Changes of what there is. Placements stand. not_found: no such thing.
  Status drain_gpu(GpuNo gpu, bool drained);
  Status drain_host(HostNo host, bool drained);
  Status set_band(GpuNo gpu, Band band);
  Status set_taints(HostNo host, std::vector<std::string> taints);
  Status set_labels(HostNo host, std::vector<std::string> labels);
  // What the hardware has now, those of tenants included. conflict: one that a tenant holds is missing.
  Status set_instances(GpuNo gpu, std::vector<Instance> instances, bool mig_on);
  // Only those fields of a placement's request that decide nothing about where it is.
  Status set_terms(PlacementId id, bool movable, std::uint64_t price, int priority,
                   std::optional<std::int64_t> ends);

  // Errc::invalid: a figure out of bounds; says which. Nothing else is an error.
  Status check(const Request& request) const;
  // Where it goes, or nothing. What a hot path calls: no words are made. An invalid request goes nowhere.
  std::optional<Choice> find(const Request& request);
  // The same with the reasons.
  Result<std::variant<Choice, Refusal>> decide(const Request& request, const Effort& effort = {});
  Refusal explain(const Request& request, const Effort& effort = {});

  // Takes what was chosen for this request. conflict: one of its hosts changed since, or it does not fit;
  // nothing is done.
  Result<PlacementId> commit(const Request& request, const Choice& choice);
  // What is there already (after a restart, or somebody else's instance): no constraint is asked, only room;
  // drained and hot GPUs accept. A mig part's GPU gets the instance when it is not known to have it. With an
  // id that was released: the placement is back as it was. conflict: it does not fit, or the id is in use.
  Result<PlacementId> adopt(Placement placement);
  Result<Placement> release(PlacementId id);
  // One part elsewhere. conflict: no room there; nothing is done.
  Status move(const Move& move);

  // Everything committed, adopted, released or moved since a mark is undone, to the order within every index.
  // Marks nest; rollback and keep end the last one. Between mark and its end only those four, find, decide
  // and explain are allowed.
  void mark();
  void rollback();
  void keep();

  // ---- looking ----
  std::size_t host_count() const;
  std::size_t gpu_count() const;
  const Host& host(HostNo host) const;  // with later changes, and without its GPUs
  Gpu gpu(GpuNo gpu) const;             // with later changes; all instances in the hardware
  HostNo host_of(GpuNo gpu) const;
  GpuNo first_gpu(HostNo host) const;
  const Model& model(ModelNo model) const;
  std::optional<HostNo> find_host(std::string_view name) const;
  std::optional<GpuNo> find_gpu(std::string_view uuid) const;
  const Placement* placement(PlacementId id) const;
  std::vector<PlacementId> placements() const;              // rising
  std::vector<PlacementId> placements_on(GpuNo gpu) const;  // rising
  std::uint64_t generation(HostNo host) const;
  struct FreeOnHost {
    std::int64_t cpu_milli = 0, memory_mib = 0;
  };
  FreeOnHost free(HostNo host) const;
  struct FreeOnGpu {
    std::int32_t milli = 0;       // share: unsold weight; else 1000 or 0
    std::int64_t memory_mib = 0;  // share: unsold
    unsigned units = 0;           // mig: free memory units
    bool idle = true;             // nobody has anything of it
  };
  FreeOnGpu free_on(GpuNo gpu) const;

  struct State;  // the engine's inside

 private:
  std::unique_ptr<State> state_;
};

}  // namespace bulkhead::placement
