// The page of `bulkhead top` on a terminal, with keys. Internal to cli.
#pragma once

#include <cstdint>

#include "cli/cli.hpp"
#include "cli/top_look.hpp"

namespace bulkhead::cli::top {

// Until q or a signal; the terminal is as before afterwards. An exit code.
int watch(const Context& context, Look& look, std::uint64_t interval_ns);
// Whether the locale's characters are UTF-8; sets the locale up first.
bool utf8_locale();

}  // namespace bulkhead::cli::top
