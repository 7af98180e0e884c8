// What a request line asks for, decoded once and in one canonical form, so that no two spellings of a path
// can reach different rules.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace bulkhead::http {

struct Target {
  std::string path = {};  // "/api/v1/leases/7": no empty or "." segment, no slash at its end
  std::vector<std::pair<std::string, std::string>> query = {};
};

// Origin form, absolute form, or "*". Nothing when it is not exact: raw or encoded control bytes, NUL, an
// encoded slash or backslash, a ".." segment, a fragment, bad percent-encoding, invalid UTF-8.
std::optional<Target> parse_target(std::string_view sent);

bool valid_utf8(std::string_view text);

}  // namespace bulkhead::http
