// Looks at a host once and returns it as a value. Reading only. What cannot be read says why; only a host of which
// nothing at all can be read is an Error.
#pragma once

#include <filesystem>
#include <string>

#include "base/result.hpp"
#include "core/inventory/inventory.hpp"

namespace bulkhead::observe {

// Where to look. The same three values everywhere: production, twin, a support bundle of another machine.
struct Access {
  std::filesystem::path root = "/";
  std::string nvml_library = {};          // empty: libnvidia-ml.so.1 by the loader's rules
  std::filesystem::path state_dir = {};   // the journal: which instances are ours
};

Result<inventory::Host> host(const Access& access);

}  // namespace bulkhead::observe
