// The engine's inside, shared by its own files: what a GPU, a host and a placement are here, the indexes over
// them and the journal that takes changes back.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/fraction/fraction.hpp"
#include "core/grid/grid.hpp"
#include "core/placement/placement.hpp"
#include "core/placement/sets.hpp"

namespace bulkhead::placement {

using TenantNo = std::uint32_t;
inline constexpr TenantNo no_tenant = 0xffffffff;
inline constexpr std::uint32_t no_slot = 0xffffffff;

struct ModelState {
  Model given = {};
  std::unique_ptr<grid::Tables> tables = {};  // null: no MIG
  grid::ModelId grid = 0;
  std::vector<bool> wasteful = {};  // per profile: its best place can cost more than one further of its kind
};

// An instance in the hardware.
struct Present {
  std::uint8_t profile = 0;  // index in the geometry
  std::uint8_t start = 0;
  std::uint32_t slot = no_slot;  // who has it
  friend auto operator<=>(const Present&, const Present&) = default;
};

struct PartRef {
  std::uint32_t slot = 0;
  std::uint32_t part = 0;
  friend auto operator<=>(const PartRef&, const PartRef&) = default;
};

enum class Use : std::uint8_t { none, mig, share, whole };

struct GpuState {
  HostNo host = 0;
  std::uint8_t index = 0;  // on its host
  std::uint8_t numa = 0;
  ModelNo model = 0;
  Pool pool = Pool::closed;
  Band band = Band::cool;
  Use use = Use::none;
  bool drained = false;
  bool mig_on = false;
  bool listed = false;   // mig pool: its idle instances are in the index
  std::uint8_t bit = 0;  // in its fraction node
  std::int32_t free_milli = whole_gpu;
  std::int32_t blocked = 0;  // milli that the index holds back because the GPU takes no shares now
  std::int64_t free_memory = 0;
  fraction::NodeId node = 0;
  grid::GpuId grid = grid::no_gpu;
  grid::SetId held = 0;               // what tenants hold of it, as a set of its model's tables
  std::vector<Present> present = {};  // sorted
  std::vector<PartRef> parts = {};    // on it, in order of arrival
  std::string uuid = {};
};

struct Unit {  // GPUs of one model on one host that may be taken whole; per class, then per band level
  ModelNo model = 0;
  std::array<std::array<std::uint16_t, 2>, 2> free = {};
};

struct HostState {
  Host given = {};  // without its GPUs
  GpuNo first = 0;
  std::uint32_t gpus = 0;
  std::int64_t cpu = 0, memory = 0;  // free
  std::uint32_t taints = 0;          // index of the taint set
  std::vector<std::uint32_t> labels = {};
  std::uint32_t shape = 0;
  std::uint32_t guards = 0;  // parts on it whose tenants want somebody away
  std::uint64_t stamp = 0;
  struct Node {
    bool dynamic = false;
    fraction::NodeId node = 0;
    ModelNo model = 0;
  };
  std::vector<Node> nodes = {};
  std::vector<Unit> units = {};
};

struct Record {
  Placement it = {};
  TenantNo tenant = no_tenant;
  std::vector<TenantNo> avoid_gpu = {}, avoid_host = {};
  bool guards = false;
  bool live = false;
  std::uint32_t generation = 0, next_generation = 1;
};

// What a search over all placements reads of each, close together.
struct Terms {
  std::int64_t ends = 0;
  std::uint64_t price = 0;  // of moving all its parts
  HostNo host = 0;          // of its first part
  int priority = 0;
  bool live = false, movable = false, has_end = false, several = false;
};

// A request, read once against the engine.
struct Ask {
  const Request* request = nullptr;
  ModelNo model = 0;
  int profile = -1;  // index in the geometry of `model`
  Band most = Band::warm;
  TenantNo tenant = no_tenant;
  bool any_taint = false;
  std::vector<char> tolerated = {};  // per taint set; empty: there is none to tolerate
  std::vector<std::uint32_t> labels = {};
  bool label_unknown = false;
  std::vector<TenantNo> avoid_gpu = {}, avoid_host = {};
  bool terms = false;                       // labels, avoid or alone: more than classes to ask of a GPU
  bool room = false;                        // asks for host CPU or memory
  std::vector<std::uint64_t> classes = {};  // of grid; empty: all
  const std::vector<std::uint32_t>* without =
      nullptr;  // slots: as if these placements were gone; no index knows of it
  bool gone(std::uint32_t slot) const {
    return without != nullptr && std::find(without->begin(), without->end(), slot) != without->end();
  }
};

// Parts placed in the indexes while a choice is worked out; gone again when it ends.
class Draft;

struct Engine::State {
  Rules rules = {};
  std::vector<ModelState> models = {};
  std::vector<GpuState> gpus = {};
  std::vector<HostState> hosts = {};
  std::unordered_map<std::string, HostNo> host_names = {};
  std::unordered_map<std::string, GpuNo> gpu_names = {};
  std::unordered_map<std::string, TenantNo> tenants = {};
  std::unordered_map<std::string, std::uint32_t> labels = {};
  std::vector<std::vector<std::string>> taint_sets = {{}};
  std::map<std::vector<std::string>, std::uint32_t> taint_set_ids = {{{}, 0}};
  std::size_t tainted_hosts = 0, warm_gpus = 0;
  std::uint64_t guards = 0;                // parts of placements that want somebody away
  std::uint64_t movables = 0, enders = 0;  // placements
  std::uint64_t stamp = 0;

  grid::Fleet grid = {};
  std::vector<GpuNo> of_grid = {};
  struct GridClass {
    ModelNo model = 0;
    std::uint32_t taints = 0;
    Band band = Band::cool;
    friend auto operator<=>(const GridClass&, const GridClass&) = default;
  };
  std::vector<GridClass> classes = {};
  std::map<GridClass, grid::ClassId> class_ids = {};
  std::array<fraction::Fleet, 2> shares = {};  // Pool::share, Pool::dynamic
  struct NodeOf {
    HostNo host = 0;
    ModelNo model = 0;
    std::array<GpuNo, fraction::kMostGpus> gpus = {};
    unsigned count = 0;
  };
  std::array<std::vector<NodeOf>, 2> nodes = {};
  // Idle instances of fixed layouts on open GPUs: per model, per profile.
  std::vector<std::vector<std::set<std::pair<GpuNo, std::uint8_t>>>> idle = {};
  // Hosts by what is free whole on them: per class (exclusive, passthrough), band level, model; by (shape,
  // mask).
  using Masks = std::map<std::uint64_t, std::set<HostNo>>;
  std::array<std::array<std::vector<Masks>, 2>, 2> wholes = {};
  std::vector<SetTable> shapes = {};
  std::map<Shape, std::uint32_t> shape_ids = {};

  std::vector<Record> records = {};
  std::vector<Terms> terms = {};  // per record
  std::vector<std::uint32_t> free_slots = {};
  std::size_t live = 0;
  mutable std::map<std::string, std::vector<int>, std::less<>> profiles =
      {};  // name -> index per model, -1: none

  // ---- journal: what rollback needs, newest last
  struct SavedGpu {
    GpuNo gpu = 0;
    bool mig_on = false;
    std::vector<Present> present = {};
    std::vector<PartRef> parts = {};
  };
  struct GridStep {
    grid::Fleet::Undo::Step before = {};
    bool drained = false;
  };
  struct Undone {
    enum class Kind : std::uint8_t { committed, released, moved } kind = Kind::committed;
    std::uint32_t slot = 0;
    std::uint32_t generation = 0, next_generation = 0;  // before
    std::size_t slot_at = 0;                            // released or taken: place in free_slots
    Placement was = {};                                 // released; moved: before
    std::vector<GridStep> grid = {};                    // its changes, in order
    std::vector<SavedGpu> gpus = {};
    std::vector<std::pair<HostNo, std::uint64_t>> stamps = {};
  };
  std::vector<Undone> journal = {};
  std::vector<std::size_t> marks = {};
  Undone* writing = nullptr;  // the entry of the change under way; null: no mark is set
  bool taking_back = false;   // the grid goes back by its own steps

  // build.cpp
  Result<ModelNo> add_model(Model model);
  Result<HostNo> add_host(Host host);
  Result<grid::ClassId> class_for(ModelNo model, std::uint32_t taints, Band band);
  std::uint32_t taint_set(std::vector<std::string> taints);
  std::uint32_t label(const std::string& text);
  TenantNo tenant(const std::string& name);
  bool open(const GpuState& gpu) const;
  void sync(GpuNo gpu);          // indexes follow the GPU's state
  void sync_units(HostNo host);  // whole-GPU index
  void list_idle(GpuNo gpu, bool on);

  // change.cpp
  // Is there room for these parts, as things are? Says what is wrong.
  std::optional<std::string> misfit(const Request& request, ModelNo model, std::span<const Part> parts,
                                    bool adopt) const;
  void put_part(std::uint32_t slot, std::uint32_t part);  // into the indexes; there is room
  void take_part(std::uint32_t slot, std::uint32_t part);
  void host_resources(HostNo host, std::int64_t cpu, std::int64_t memory, bool take);
  void used(GpuNo gpu, Use use);
  void block(GpuNo gpu);
  void unblock(GpuNo gpu);
  void save(GpuNo gpu);
  void grid_place(GpuNo gpu, unsigned place);
  void grid_remove(GpuNo gpu, unsigned place);
  void grid_drain(GpuNo gpu, bool on);
  grid::Fleet::Undo::Step grid_position(GpuNo gpu) const;
  void touch(HostNo host);
  void begin(Undone::Kind kind, std::uint32_t slot);
  Result<PlacementId> enter(Placement placement, bool adopt);
  Status set_terms(PlacementId id, bool movable, std::uint64_t price, int priority,
                   std::optional<std::int64_t> ends);
  void read_terms(Record& record);
  Result<Placement> release(PlacementId id);
  Status move(const Move& move);
  void rollback();
  std::optional<std::uint32_t> slot_of(PlacementId id) const;
  PlacementId id_of(std::uint32_t slot) const {
    return static_cast<PlacementId>(records[slot].generation) << 32U | (slot + 1);
  }
  void count_terms(std::uint32_t slot, int sign);
  // What has to be done to the GPU before it can serve the part, and what it has then. Sets part.cut.
  void prepare(const GpuState& gpu, Class cls, Part& part, std::uint32_t slot, std::vector<Present>& present,
               bool& mig_on, std::vector<Step>* steps) const;
  std::vector<Step> steps_for(Class cls, std::span<Part> parts) const;

  // find.cpp
  Status check(const Request& request) const;
  const std::vector<int>& profile_row(const std::string& name) const;
  Ask read(const Request& request) const;
  std::vector<ModelNo> models_for(const Request& request) const;
  bool aim(Ask& ask, ModelNo model) const;  // false: the model does not serve it
  std::optional<Choice> find(const Request& request);
  std::optional<Choice> find_aimed(const Ask& ask);
  Why host_why(const Ask& ask, HostNo host) const;
  Why static_why(const Ask& ask, GpuNo gpu) const;     // pool to anti_affinity, else none
  unsigned parts_on(const Ask& ask, GpuNo gpu) const;  // by the GPU's own room
  std::int64_t parts_by_host(const Ask& ask, HostNo host) const;
  std::int64_t capacity(const Ask& ask, std::span<const GpuNo> gpus) const;  // of GPUs of one host
  std::vector<GpuNo> gpus_of(HostNo host, std::optional<unsigned> numa = {}) const;
  std::optional<Part> pick(const Ask& ask, const Draft& draft, const grid::Ref<bool(GpuNo)>& also);
  bool fill(const Ask& ask, std::span<const GpuNo> gpus, unsigned count, std::vector<Part>& out) const;
  bool parts_any(const Ask& ask, std::vector<Part>& out);
  bool parts_together(const Ask& ask, std::vector<Part>& out);
  bool parts_spread(const Ask& ask, std::vector<Part>& out);
  bool by_quota(const Ask& ask, std::vector<Part>& out);
  bool whole_sets(const Ask& ask, std::vector<Part>& out);
  struct WholeHost {
    HostNo host = 0;
    std::uint32_t gpus = 0;
    std::uint64_t key = 0;
  };
  std::uint32_t whole_mask(const Ask& ask, HostNo host) const;
  std::optional<WholeHost> best_host(const Ask& ask, unsigned k,
                                     const grid::Ref<bool(HostNo, std::uint32_t)>& also);
  Part part_at(const Ask& ask, GpuNo gpu) const;

  // refuse.cpp, ways.cpp
  Refusal explain(const Request& request, const Effort& effort);
  void count_reasons(const Request& request, Refusal& out) const;
  void find_ways(const Request& request, const Effort& effort, Refusal& out);
};

class Draft {
 public:
  explicit Draft(Engine::State& state) : state_(state) {}
  Draft(const Draft&) = delete;
  Draft& operator=(const Draft&) = delete;
  ~Draft();
  void add(const Ask& ask, const Part& part);
  bool has(GpuNo gpu, unsigned start) const;  // a fixed instance already taken
  unsigned on_host(HostNo host) const;
  unsigned on_gpu(GpuNo gpu) const;
  const std::vector<Part>& parts() const { return parts_; }

 private:
  struct Taken {
    grid::Fleet::Undo undo = {};
    bool grid = false;
  };
  Engine::State& state_;
  std::vector<Part> parts_;
  std::vector<Taken> taken_;
};

}  // namespace bulkhead::placement
