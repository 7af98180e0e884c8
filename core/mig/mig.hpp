// MIG geometry and the packing of instances: which profiles a GPU offers, where they may lie, and how to get
// from the instances there are to the instances wanted while touching as few as possible. The geometry comes
// from the driver at run time (any grid: 8, 4 or 12 memory units); nothing here knows a chip by name.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/units.hpp"

namespace bulkhead::mig {

// Where an instance lies, in memory slices of its GPU (nvmlGpuInstancePlacement_t).
struct Placement {
  unsigned start = 0;
  unsigned size = 0;
  unsigned end() const { return start + size; }
  bool overlaps(const Placement& other) const { return start < other.end() && other.start < end(); }
  friend auto operator<=>(const Placement&, const Placement&) = default;
};

// One GPU instance profile as the driver describes it.
struct Profile {
  unsigned id = 0;         // what `nvidia-smi mig -cgi` takes (19, 14, 9 ...), not the NVML enum
  unsigned nvml_enum = 0;  // NVML_GPU_INSTANCE_PROFILE_*
  std::string name = {};   // "3g.40gb", "1g.10gb+me"
  unsigned compute_slices = 0;
  unsigned max_instances = 0;  // of this profile alone
  Bytes memory = {};
  unsigned multiprocessors = 0;
  unsigned copy_engines = 0, decoders = 0, encoders = 0, jpeg_engines = 0, optical_flow = 0;
  std::vector<unsigned> starts = {};  // legal starts, in memory slices
  unsigned size = 0;                  // length, in memory slices
  friend bool operator==(const Profile&, const Profile&) = default;
};

struct Geometry {
  unsigned memory_slices = 0;  // length of the grid: the largest end of any placement
  std::vector<Profile> profiles = {};

  const Profile* by_id(unsigned id) const;
  // Accepts the exact name, any case, with or without the "MIG " prefix; and a name whose gigabytes differ
  // by a twentieth at most (or by one) when slices and suffix fit one profile alone: drivers have renamed
  // 3g.39gb to 3g.40gb (mig-parted issue 31).
  const Profile* by_name(std::string_view name) const;
  std::vector<std::string_view> names() const;
  friend bool operator==(const Geometry&, const Geometry&) = default;
};

// An instance on the GPU now.
struct Present {
  unsigned gpu_instance = 0;  // its id on this GPU
  unsigned profile = 0;       // profile id
  Placement place = {};
  bool movable = true;  // may be destroyed to make room: ours, and idle or to be evicted
  bool counts = true;   // may stand for a wanted instance (false: foreign, to be left alone)
  unsigned variant =
      0;  // stands only for a wanted instance of the same variant (its compute instances differ)
};

// A wanted instance; `at` pins its start.
struct Wanted {
  unsigned profile = 0;
  std::optional<unsigned> at = {};
  unsigned variant = 0;
};

struct NewInstance {
  unsigned profile = 0;
  Placement place = {};
  unsigned variant = 0;
  friend auto operator<=>(const NewInstance&, const NewInstance&) = default;
};

// From Present to Wanted: `keep` and `destroy` index the present instances and name each once; `create` is in
// creation order and holds each new instance's explicit place. After it the counting instances are exactly
// the wanted.
struct Recut {
  std::vector<std::size_t> keep = {};
  std::vector<std::size_t> destroy = {};
  std::vector<NewInstance> create = {};
};

// Why it cannot be done, and the nearest way to yes.
struct NoFit {
  std::string why = {};
  std::vector<std::size_t> blocking = {};  // the smallest set of unmovable instances that stand in the way
  std::optional<Recut> way_out = {};  // the recut if those were movable; empty: not even an empty GPU fits it
};

// The recut that destroys fewest instances (then fewest memory slices destroyed, then lowest placements, the
// largest instance first). Instances that need not go are kept where they are; a counting instance that is
// not wanted goes. Exact: NoFit means that no placement exists, or that an unmovable instance is not wanted.
// Pure.
std::variant<Recut, NoFit> recut(const Geometry& geometry, std::span<const Present> present,
                                 std::span<const Wanted> wanted);

// True when the instances are in their profiles' starts, do not overlap, respect max_instances and do not use
// more compute slices, decoders, encoders, JPEG or optical-flow engines than the fullest profile has (1g+me
// and 2g+me of an A30 exclude each other although both find a place; so do the .me.all profiles of an RTX PRO
// 6000).
bool legal(const Geometry& geometry, std::span<const NewInstance> instances);

// Most instances of one GPU that fit at once beside `taken` (for refusals and what-if).
unsigned capacity(const Geometry& geometry, std::span<const NewInstance> taken, unsigned profile);

}  // namespace bulkhead::mig
