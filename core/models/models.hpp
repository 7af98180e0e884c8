// MIG geometries of known chips, for planning without hardware: simulations and what-ifs on a machine that
// has no GPU. On a host with a driver nothing here is asked; there the driver's answer is the geometry. Each
// row names where it was read.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/mig/mig.hpp"

namespace bulkhead::models {

struct Model {
  std::string_view name;    // "h100-80gb"
  std::string_view title;   // "NVIDIA H100 80GB"
  std::string_view source;  // where profiles and places were read; what is assumed is said
  // Other names that are taken: "h100".
  std::span<const std::string_view> aliases;
};

std::span<const Model> all();
// By name or alias, any case; nullptr: none.
const Model* find(std::string_view name);
std::vector<std::string_view> names();
mig::Geometry geometry(const Model& model);

}  // namespace bulkhead::models
