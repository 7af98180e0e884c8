// Compressed files and tar archives, in memory and bounded: support bundles and NVIDIA's bug reports. zlib
// does the compression; tar is the plain POSIX form.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.hpp"
#include "base/result.hpp"

namespace bulkhead::archive {

struct Member {
  std::string name = {};
  std::string content = {};
};

bool is_gzip(std::string_view bytes);
bool is_tar(std::string_view bytes);

// The content of one or several gzip members after each other; refused beyond `limit` bytes.
Result<std::string> gunzip(std::string_view bytes, std::size_t limit);
Result<std::string> gzip(std::string_view bytes);

// Regular files only; at most 10,000, names shorter than 512 bytes. A cut archive gives what is whole.
Result<std::vector<Member>> untar(std::string_view bytes);
Result<std::string> tar(const std::vector<Member>& members, WallTime when);

}  // namespace bulkhead::archive
