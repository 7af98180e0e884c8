// GPU models as their drivers describe them, for tests and benchmarks: those of production come from the
// driver.
#pragma once

#include <utility>
#include <vector>

#include "core/mig/mig.hpp"

namespace bulkhead::mig {

struct ProfileRow {
  const char* name;
  unsigned id, compute, most, decoders, encoders, jpeg, optical_flow;
  std::vector<unsigned> starts;
  unsigned size;
};

inline Geometry geometry_of(unsigned slices, const std::vector<ProfileRow>& rows) {
  Geometry geometry;
  geometry.memory_slices = slices;
  for (const auto& row : rows) {
    Profile profile;
    profile.id = row.id;
    profile.name = row.name;
    profile.compute_slices = row.compute;
    profile.max_instances = row.most;
    profile.decoders = row.decoders;
    profile.encoders = row.encoders;
    profile.jpeg_engines = row.jpeg;
    profile.optical_flow = row.optical_flow;
    profile.starts = row.starts;
    profile.size = row.size;
    geometry.profiles.push_back(profile);
  }
  return geometry;
}

// Without engines, for grids that no chip has.
inline Profile plain_profile(const char* name, unsigned id, unsigned compute, unsigned most,
                             std::vector<unsigned> starts, unsigned size) {
  Profile profile;
  profile.id = id;
  profile.name = name;
  profile.compute_slices = compute;
  profile.max_instances = most;
  profile.starts = std::move(starts);
  profile.size = size;
  return profile;
}

// Read on a real H100 SXM 80GB; an H200 has the same places.
inline Geometry h100() {
  return geometry_of(8, {{"1g.10gb", 19, 1, 7, 1, 0, 1, 0, {0, 1, 2, 3, 4, 5, 6}, 1},
                         {"1g.10gb+me", 20, 1, 1, 1, 0, 1, 1, {0, 1, 2, 3, 4, 5, 6}, 1},
                         {"1g.20gb", 15, 1, 4, 1, 0, 1, 0, {0, 2, 4, 6}, 2},
                         {"2g.20gb", 14, 2, 3, 2, 0, 2, 0, {0, 2, 4}, 2},
                         {"3g.40gb", 9, 3, 2, 3, 0, 3, 0, {0, 4}, 4},
                         {"4g.40gb", 5, 4, 1, 4, 0, 4, 0, {0}, 4},
                         {"7g.80gb", 0, 7, 1, 7, 0, 7, 1, {0}, 8}});
}
// The six shapes of it: without the media extensions, as published studies count.
inline Geometry six_shapes() {
  auto geometry = h100();
  geometry.profiles.erase(geometry.profiles.begin() + 1);
  return geometry;
}
inline Geometry a100() {
  return geometry_of(8, {{"1g.10gb", 19, 1, 7, 0, 0, 0, 0, {0, 1, 2, 3, 4, 5, 6}, 1},
                         {"1g.10gb+me", 20, 1, 1, 1, 0, 1, 1, {0, 1, 2, 3, 4, 5, 6}, 1},
                         {"1g.20gb", 15, 1, 4, 1, 0, 0, 0, {0, 2, 4, 6}, 2},
                         {"2g.20gb", 14, 2, 3, 1, 0, 0, 0, {0, 2, 4}, 2},
                         {"3g.40gb", 9, 3, 2, 2, 0, 0, 0, {0, 4}, 4},
                         {"4g.40gb", 5, 4, 1, 2, 0, 0, 0, {0}, 4},
                         {"7g.80gb", 0, 7, 1, 5, 0, 1, 1, {0}, 8}});
}
inline Geometry a30() {
  return geometry_of(4, {{"1g.6gb", 14, 1, 4, 1, 0, 0, 0, {0, 1, 2, 3}, 1},
                         {"1g.6gb+me", 21, 1, 1, 1, 0, 1, 1, {0, 1, 2, 3}, 1},
                         {"2g.12gb", 5, 2, 2, 2, 0, 0, 0, {0, 2}, 2},
                         {"2g.12gb+me", 6, 2, 1, 2, 0, 1, 1, {0, 2}, 2},
                         {"4g.24gb", 0, 4, 1, 4, 0, 1, 1, {0}, 4}});
}
inline Geometry rtx_pro_6000() {
  return geometry_of(12, {{"1g.24gb", 14, 1, 4, 1, 1, 1, 0, {0, 3, 6, 9}, 3},
                          {"1g.24gb+me", 21, 1, 1, 1, 1, 1, 1, {0, 3, 6, 9}, 3},
                          {"1g.24gb+gfx", 47, 1, 4, 1, 1, 1, 0, {0, 3, 6, 9}, 3},
                          {"1g.24gb+me.all", 65, 1, 1, 4, 4, 4, 1, {0, 3, 6, 9}, 3},
                          {"1g.24gb-me", 67, 1, 4, 0, 0, 0, 0, {0, 3, 6, 9}, 3},
                          {"2g.48gb", 5, 2, 2, 2, 2, 2, 0, {0, 6}, 6},
                          {"2g.48gb+gfx", 35, 2, 2, 2, 2, 2, 0, {0, 6}, 6},
                          {"2g.48gb+me.all", 64, 2, 1, 4, 4, 4, 1, {0, 6}, 6},
                          {"2g.48gb-me", 66, 2, 2, 0, 0, 0, 0, {0, 6}, 6},
                          {"4g.96gb", 0, 4, 1, 4, 4, 4, 1, {0}, 12},
                          {"4g.96gb+gfx", 32, 4, 1, 4, 4, 4, 1, {0}, 12}});
}

}  // namespace bulkhead::mig
