// `plan --what-if`: would these MIG instances fit beside what runs, and with how many moves? Reads; changes
// nothing.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/cli.hpp"

namespace bulkhead::cli {

struct WhatIfOptions {
  std::vector<std::string> wanted =
      {};  // "12 x 3g.40gb", "3g.40gb"; several may stand in one, comma-separated
  std::vector<std::string> inventories = {};  // files of `bulkhead inventory --json`; empty: this host
  std::uint64_t moves = 0;                    // at most, when `limited`
  bool limited = false;
  bool evict = false, adopt = false, json = false;
};

int what_if(const Context& context, const WhatIfOptions& options);

}  // namespace bulkhead::cli
