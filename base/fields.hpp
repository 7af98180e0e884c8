// Reads the keys of one JSON object from outside and gathers every mistake, each with its key: "quota.leases:
// must be a whole number from 0 to 1000000". A key that nobody read is a mistake too.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.hpp"
#include "base/result.hpp"

namespace bulkhead {

class Fields {
 public:
  // `path`: what stands before the keys in a mistake, empty at the top. Mistakes of children go to the same
  // list.
  Fields(const Json& object, std::string path, std::vector<std::string>& mistakes);
  Fields(const Fields&) = delete;
  Fields& operator=(const Fields&) = delete;

  bool has(std::string_view key);  // there, and not null
  std::optional<std::uint64_t> whole(std::string_view key, std::uint64_t least, std::uint64_t most);
  std::optional<std::int64_t> number(std::string_view key, std::int64_t least, std::int64_t most);
  std::optional<bool> flag(std::string_view key);
  // Valid UTF-8 of at most `most` bytes without control characters.
  std::optional<std::string> text(std::string_view key, std::size_t most);
  std::vector<std::string> texts(std::string_view key, std::size_t most_items, std::size_t most_bytes);
  const Json* object(std::string_view key);
  const Json* array(std::string_view key, std::size_t most_items);

  void mistake(std::string_view key, std::string_view what);
  std::string path_of(std::string_view key) const;
  // Reports the keys that were not asked for, with the nearest that was. Last.
  void no_others();

 private:
  const Json* find(std::string_view key);
  const Json& object_;
  std::string path_;
  std::vector<std::string>& mistakes_;
  std::set<std::string, std::less<>> known_;
};

// One Error of all of them, at most twenty told.
Status no_mistakes(std::string_view what, const std::vector<std::string>& mistakes);

}  // namespace bulkhead
