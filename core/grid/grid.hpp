// Where a MIG instance goes, at the scale of a fleet. `Tables` is everything there is to know of one GPU
// model, worked out once from the geometry its driver reports (any grid: 4, 8 or 12 memory units): every
// instance set a GPU can be in, what each placement leads to and what it spoils. `Fleet` holds GPUs in
// buckets of equal (class, set), so that a decision looks at sets and not at GPUs: its cost is the same at
// 10,000 and at 100,000 GPUs. `can_hold` says whether a demand fits at all.
//
// The rule. For a set s of instances with free(s) free memory units, and maxpack(s, p) more instances of
// profile p that fit beside it,
//     F(s) = sum over profiles p of weight_p * (free(s) - size_p * maxpack(s, p)),
// the free memory that each profile cannot use. A request goes where F grows least.
//
// The whole order, for a request of profile p (no tie is left open):
//   1. a GPU with an instance before an empty one;
//   2. least growth of F;
//   3. fewest free memory units before the placement (the fuller GPU);
//   4. lowest start;
//   5. lowest set id (sets are numbered by instance count, then by their places; see Tables::set_count);
//   6. lowest class id;
//   7. of the GPUs of one class and set: the one that came into this state last (added, placed on, removed
//   from,
//      adopted, reclassed or undrained most recently).
// Ids of GPUs decide nothing: permuting equal GPUs changes names and no figure.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/result.hpp"
#include "core/mig/mig.hpp"

namespace bulkhead::grid {

// ---- one GPU model ---------------------------------------------------------------------------------------

using SetId = std::uint16_t;  // one instance set of one model; 0 is the empty GPU
inline constexpr SetId no_set = 0xffff;
inline constexpr std::size_t max_sets = 65535, max_places = 64, max_units = 32;
inline constexpr unsigned max_weight = 65535, max_moves = 3;

// A profile at one of its starts. Profiles are named by their index in Geometry::profiles.
struct Place {
  std::uint8_t profile = 0;
  std::uint8_t start = 0;
  std::uint8_t size = 0;
  std::uint32_t mask = 0;  // the memory units it covers
  friend bool operator==(const Place&, const Place&) = default;
};

// The best start of a profile on a GPU in state `set`.
struct Ranked {
  SetId set = 0;
  SetId after = 0;  // the state it leads to
  std::uint8_t place = 0;
  std::int32_t growth = 0;
};

// Instances whose departure lets a profile in: the smallest such sets of at most max_moves instances (no
// part of one would do).
struct Eviction {
  SetId set = 0;
  SetId after = 0;            // evicted gone, the request placed
  std::uint8_t place = 0;     // of the request
  std::uint64_t evicted = 0;  // places, a bit each
  std::int32_t growth = 0;    // F(after) - F(set)
};
// Evictions of one multiset of profiles, in the order: least growth, fewest free units, lowest set, lowest
// evicted bits.
struct Evictions {
  std::array<std::uint8_t, max_moves> profiles = {};  // largest first
  unsigned count = 0;                                 // of them
  std::vector<Eviction> ways = {};
  std::vector<std::uint64_t> sets = {};  // a bit per set that is in ways
};

class Tables {
 public:
  // weights: one per profile, at most max_weight; empty: each profile's size, but 0 for one that lies in just
  // the places of another with more instances (1g.10gb+me beside 1g.10gb). Legal is what mig::legal says
  // (places, max_instances, compute slices, engines). Errors: no profile or no start, a start beyond the
  // grid, more than max_units units, max_places places or max_sets sets.
  static Result<Tables> make(const mig::Geometry& geometry, std::span<const unsigned> weights = {});

  const mig::Geometry& geometry() const { return geometry_; }
  unsigned units() const { return geometry_.memory_slices; }
  unsigned profile_count() const { return static_cast<unsigned>(geometry_.profiles.size()); }
  unsigned size(unsigned profile) const { return geometry_.profiles[profile].size; }
  unsigned weight(unsigned profile) const { return weights_[profile]; }
  std::optional<unsigned> profile_of_id(unsigned profile_id) const;  // index of the driver's id

  // Places are numbered by profile, then by start.
  std::span<const Place> places() const { return places_; }
  std::optional<unsigned> place_of(unsigned profile, unsigned start) const;
  std::span<const Place> places_of(unsigned profile) const {
    return std::span(places_).subspan(first_place_[profile],
                                      first_place_[profile + 1] - first_place_[profile]);
  }
  unsigned first_place(unsigned profile) const { return first_place_[profile]; }

  // Every set that can be reached by creating and destroying instances, by rising count of instances, then by
  // rising value of its place bits.
  std::size_t set_count() const { return bits_.size(); }
  std::uint64_t bits(SetId set) const { return bits_[set]; }  // a bit per place
  std::optional<SetId> find(std::uint64_t bits) const;
  std::uint32_t mask(SetId set) const { return masks_[set]; }  // occupied memory units
  unsigned free_units(SetId set) const { return free_[set]; }
  unsigned instances(SetId set) const;
  // no_set when the move is not legal.
  SetId next(SetId set, unsigned place) const { return next_[set * places_.size() + place]; }
  SetId without(SetId set, unsigned place) const { return without_[set * places_.size() + place]; }
  unsigned maxpack(SetId set, unsigned profile) const { return maxpack_[set * profile_count() + profile]; }
  std::int32_t waste(SetId set) const { return waste_[set]; }  // F
  // Only when next(set, place) is a set.
  std::int32_t growth(SetId set, unsigned place) const { return waste_[next(set, place)] - waste_[set]; }

  // One entry per set that holds the profile, at its best start, in the order 1 to 5 above. (A set's other
  // starts come later in the order and would never be chosen.)
  std::span<const Ranked> ranked(unsigned profile) const { return ranked_[profile]; }
  static constexpr std::uint16_t no_rank = 0xffff;
  std::uint16_t rank_of(unsigned profile, SetId set) const {
    return rank_of_[set * profile_count() + profile];
  }

  // For repair: by count of evicted, then by their units, then by profile indices. Complete up to
  // eviction_limit() instances: max_moves, or less for a model with so many sets that the lists were cut.
  std::span<const Evictions> evictions(unsigned profile) const { return evictions_[profile]; }
  unsigned eviction_limit() const { return eviction_limit_; }

  // All the count vectors (one entry per profile) that can be added to a set and are not part of another.
  std::vector<std::vector<std::uint32_t>> offers(SetId set) const;

  // Profiles by their role in the grid of 8 memory and 7 compute slices, when this model is one and no limit
  // beside the places binds; see can_hold.
  struct SevenOfEight {
    std::array<std::int16_t, 6> role = {-1, -1, -1, -1, -1, -1};  // 1g, 1g double, 2g, 3g, 4g, 7g; -1: none
    // Per profile: the one with a role that wants no more than it (itself; the 1g for a 1g+me), or -1.
    std::vector<std::int16_t> stands_for = {};
  };
  const std::optional<SevenOfEight>& seven_of_eight() const { return seven_of_eight_; }

 private:
  Tables() = default;
  Status enumerate();
  void pack_and_rank();
  void list_evictions();
  void recognise();

  mig::Geometry geometry_;
  std::vector<std::uint32_t> weights_;
  std::vector<Place> places_;
  std::vector<unsigned> first_place_;
  std::vector<std::uint64_t> bits_;
  std::vector<std::pair<std::uint64_t, SetId>> by_bits_;  // sorted
  std::vector<std::uint32_t> masks_;
  std::vector<std::uint8_t> free_;
  std::vector<SetId> next_, without_;
  std::vector<std::uint8_t> maxpack_;
  std::vector<std::int32_t> waste_;
  std::vector<std::vector<Ranked>> ranked_;
  std::vector<std::uint16_t> rank_of_;
  std::vector<std::vector<Evictions>> evictions_;
  unsigned eviction_limit_ = 0;
  std::optional<SevenOfEight> seven_of_eight_;
};

// ---- a fleet ---------------------------------------------------------------------------------------------

using GpuId = std::uint32_t;
using ModelId = std::uint16_t;
using ClassId = std::uint16_t;
inline constexpr GpuId no_gpu = 0xffffffff;
inline constexpr std::size_t max_gpus = std::size_t{1} << 24U, max_classes = 4096, max_models = 256;

// A bit per class id; empty: all classes. Words beyond its end are zero.
using ClassSet = std::span<const std::uint64_t>;

struct Choice {
  GpuId gpu = no_gpu;
  unsigned profile = 0;
  unsigned start = 0;
  std::int32_t growth = 0;
};

struct Instance {
  GpuId gpu = no_gpu;
  unsigned profile = 0;
  unsigned start = 0;
  friend auto operator<=>(const Instance&, const Instance&) = default;
};

// A callable by reference, for the length of one call; nothing is allocated.
template <class Signature>
class Ref;
template <class Out, class... In>
class Ref<Out(In...)> {
 public:
  Ref() = default;
  template <class Callable>
  requires(!std::is_same_v<std::remove_cvref_t<Callable>, Ref> &&
           std::is_invocable_r_v<Out, Callable&, In...>)
      Ref(Callable&& callable)  // NOLINT(google-explicit-constructor)
      : object_(const_cast<void*>(static_cast<const void*>(&callable))),
        call_([](void* object, In... in) -> Out {
          return (*static_cast<std::remove_reference_t<Callable>*>(object))(in...);
        }) {}
  explicit operator bool() const { return call_ != nullptr; }
  Out operator()(In... in) const { return call_(object_, in...); }

 private:
  void* object_ = nullptr;
  Out (*call_)(void*, In...) = nullptr;
};
using Filter = Ref<bool(GpuId)>;

struct Request {
  ModelId model = 0;
  unsigned profile = 0;  // index in the model's geometry
  ClassSet classes = {};
  Filter filter = {};      // false: not on this GPU; empty: on any
  std::size_t scan = 256;  // most GPUs shown to the filter
};

// What a moved instance costs beyond its size, and whether it may move at all.
struct RepairRules {
  unsigned moves = max_moves;  // 1..max_moves
  // The price of a move is base[profile] + extra(instance). base empty: the profile's size in memory units.
  // extra empty: 0 for all. nullopt: this instance may not move.
  std::span<const std::uint32_t> base = {};
  Ref<std::optional<std::uint32_t>(const Instance&)> extra = {};
  // Where a moved instance may go: classes, and GPUs. Empty: anywhere in its model.
  ClassSet classes = {};
  Ref<bool(const Instance& moved, GpuId to)> may_go = {};
  // Bounds: GPUs looked at in one bucket for one that may give, ways tried for one multiset of evicted
  // profiles, and ways tried in the whole search.
  std::size_t scan = 16, ways = 2, budget = 256;
};

struct Move {
  Instance from = {};
  GpuId to = no_gpu;
  unsigned start = 0;
  friend bool operator==(const Move&, const Move&) = default;
};

// Moves in an order in which each destination is free when its turn comes (a move within one GPU leaves its
// old place first), then the request's place.
struct Repair {
  std::array<Move, max_moves> moves = {};
  unsigned count = 0;
  Choice choice = {};
  std::uint64_t price = 0;
  std::int64_t growth = 0;  // of F, over all GPUs, moves and request together
};

class Fleet {
 public:
  // The tables are borrowed and must outlive the fleet. Errors: limits above.
  Result<ModelId> add_model(const Tables& tables);
  Result<ClassId> add_class(ModelId model);
  // Not for the hot path: these may allocate. GPU ids count up from 0 and are never used again.
  Result<GpuId> add_gpu(ClassId cls, SetId set = 0);
  void remove_gpu(GpuId gpu);             // with all it holds
  void drain(GpuId gpu, bool on = true);  // no new instance comes; those there stay and may go
  bool reclass(GpuId gpu, ClassId cls);   // to a class of the same model; false: of another
  void reserve(std::size_t gpus);

  // The best GPU and start; nothing: no GPU of the classes fits, or none among the first `scan` passed the
  // filter (then *cut is set true). Allocates nothing; nor do place and remove.
  std::optional<Choice> choose(const Request& request, bool* cut = nullptr) const;
  // False, and nothing done, when the place is not legal there (drained GPUs take none, see adopt).
  bool place(GpuId gpu, unsigned profile, unsigned start);
  bool place(const Choice& choice) { return place(choice.gpu, choice.profile, choice.start); }
  // False when there is no such instance.
  bool remove(GpuId gpu, unsigned profile, unsigned start);
  // The state becomes `set`, whatever it was: what a host reports.
  void adopt(GpuId gpu, SetId set);

  // When choose finds nothing: the moves after which the request fits, at most rules.moves of them. Least
  // moves first, then least price, then least growth, among the ways looked at: the search is bounded by
  // `rules` and follows, for each instance that has to go, the best free place (order above) before any that
  // needs further moves. With no callable, and one move, it is exact up to `ways`. Nothing: no such moves
  // were found. The fleet is as before.
  std::optional<Repair> repair(const Request& request, const RepairRules& rules);

  // Carries out a repair; undo brings back every set and the order within every bucket, when nothing else
  // happened in between. False, and nothing done, when a step is not legal any more.
  struct Undo {
    struct Step {
      GpuId gpu = no_gpu, prev = no_gpu;
      SetId set = 0;
    };
    std::array<Step, 2 * max_moves + 1> steps = {};
    unsigned count = 0;
  };
  bool apply(const Repair& repair, Undo* undo = nullptr);
  void undo(const Undo& undo);

  std::size_t gpu_count() const { return live_; }         // present, drained ones included
  std::size_t gpu_bound() const { return gpus_.size(); }  // ids are below
  bool present(GpuId gpu) const { return gpu < gpus_.size() && gpus_[gpu].state != State::gone; }
  bool drained(GpuId gpu) const { return gpus_[gpu].state == State::drained; }
  SetId set_of(GpuId gpu) const { return gpus_[gpu].set; }
  ClassId class_of(GpuId gpu) const { return gpus_[gpu].cls; }
  ModelId model_of(GpuId gpu) const { return class_model_[gpus_[gpu].cls]; }
  ModelId model_of_class(ClassId cls) const { return class_model_[cls]; }
  const Tables& tables(ModelId model) const { return *models_[model].tables; }
  const Tables& tables_of(GpuId gpu) const { return tables(model_of(gpu)); }
  std::size_t model_count() const { return models_.size(); }
  std::size_t class_count() const { return class_model_.size(); }
  // GPUs that take instances, in one state.
  std::size_t count(ClassId cls, SetId set) const;
  // Those GPUs in the order in which choose takes them: for (g = first(c, s); g != no_gpu; g = after(g)).
  GpuId first(ClassId cls, SetId set) const;
  GpuId after(GpuId gpu) const { return gpus_[gpu].next; }
  std::size_t empty_gpus(ModelId model) const;
  // Over GPUs that are present; drained ones count as used only.
  std::uint64_t used_units(ModelId model) const { return models_[model].used_units; }
  std::uint64_t total_units(ModelId model) const { return models_[model].total_units; }

 private:
  enum class State : std::uint8_t { open, drained, gone };
  struct Gpu {
    GpuId prev = no_gpu, next = no_gpu;
    SetId set = 0;
    ClassId cls = 0;
    State state = State::open;
  };
  struct Bucket {
    GpuId head = no_gpu;
    std::uint32_t count = 0;
  };
  struct Model {
    const Tables* tables = nullptr;
    std::vector<ClassId> classes = {};
    std::vector<std::vector<std::uint64_t>> ranks =
        {};                                  // per profile: a bit per rank, set when a GPU is there
    std::vector<std::uint64_t> filled = {};  // per set, class_words_ words: classes with a GPU in it
    std::vector<std::uint32_t> counts = {};  // per set: GPUs over all classes
    std::uint64_t used_units = 0, total_units = 0;
    std::vector<std::uint64_t> present = {};          // a bit per set with a GPU in it
    std::uint64_t open = 0;                           // GPUs that take instances
    std::array<std::uint64_t, max_places> held = {};  // their instances, per profile
  };
  struct Search;

  Bucket& bucket(ClassId cls, SetId set) { return buckets_[bucket_at_[cls] + set]; }
  const Bucket& bucket(ClassId cls, SetId set) const { return buckets_[bucket_at_[cls] + set]; }
  void link(GpuId gpu, GpuId prev);  // behind prev, or first
  void unlink(GpuId gpu);
  void shift(GpuId gpu, SetId set);
  void arrive(Model& model, ClassId cls, SetId set);
  void leave(Model& model, ClassId cls, SetId set);
  void step_back(const Undo::Step& step);
  void change(GpuId gpu, SetId set);
  void join(GpuId gpu);
  void withdraw(GpuId gpu);
  bool hopeless(const Model& model, unsigned profile) const;

  std::vector<Gpu> gpus_;
  std::vector<Model> models_;
  std::vector<ModelId> class_model_;
  std::vector<std::size_t> bucket_at_;  // per class
  std::vector<Bucket> buckets_;
  std::size_t class_words_ = 1;
  std::size_t live_ = 0;
};

// ---- can it hold this at all -----------------------------------------------------------------------------

struct Group {
  SetId set = 0;  // what is there and stays
  std::uint64_t gpus = 0;
};
enum class Verdict { yes, no, undecided };

// Whether `demand` (a count per profile) fits on the GPUs beside what is there, nothing moving. On the 7-of-8
// grid a closed form answers (seven_of_eight_holds); elsewhere, in this order: bounds say no, a greedy
// packing says yes, an exact search over at most `budget` states decides. Past the budget the answer is
// `undecided`, never a guess.
Verdict can_hold(const Tables& tables, std::span<const Group> gpus, std::span<const std::uint64_t> demand,
                 std::uint64_t budget = 200'000);
// The closed form alone (derived in pack.cpp). nullopt: the model is not of that grid, or the demand names a
// profile that is not one of its six shapes (1g+me).
std::optional<bool> seven_of_eight_holds(const Tables& tables, std::span<const Group> gpus,
                                         std::span<const std::uint64_t> demand);

}  // namespace bulkhead::grid
