#pragma once

#include <string_view>

namespace bulkhead::spec {

// "3g.40gb", "1g.10gb+me", "1g.24gb-me", any case, with or without "MIG ".
bool is_profile_name(std::string_view text);

}  // namespace bulkhead::spec
