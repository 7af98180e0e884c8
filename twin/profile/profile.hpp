// A profile is a pretend machine written down: which chips on which PCI addresses, which host around them.
// YAML in twin/profiles, every number with its source; embedded in the binary, so an installed one needs no
// files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.hpp"
#include "twin/state/state.hpp"
#include "twin/tree/tree.hpp"

namespace bulkhead::twin {

struct Machine {
  std::unique_ptr<State> state;  // on the heap: it is large
  Host host = {};
  std::string yaml = {};  // the profile's own text
};

struct ProfileName {
  std::string name = {}, summary = {};
};
std::vector<ProfileName> profiles();

// Builds a machine. `seed` decides UUIDs, serial numbers and the boot id: the same seed gives the same
// machine.
Result<Machine> load_profile(std::string_view name, std::uint64_t seed);
// As load_profile, from a file; the chips and devices it names may lie in chips/ and devices.yaml beside it.
Result<Machine> load_profile_file(const std::filesystem::path& path, std::uint64_t seed);

}  // namespace bulkhead::twin
