// The journal: one SQLite database (WAL, synchronous=FULL, STRICT tables) in the state directory. It holds runs,
// their steps and what bulkhead owns. What is in the hardware is always read, never remembered here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/ids.hpp"
#include "base/json.hpp"
#include "base/result.hpp"

namespace bulkhead::store {

// A GPU instance that bulkhead made and has not destroyed. Valid for one boot.
struct OwnedInstance {
  Uuid gpu = {};
  unsigned gpu_instance = 0, profile_id = 0, start = 0;
  std::int64_t generation = 0;   // counts up for ever: MIG UUIDs come back, this does not
};

class Store {
 public:
  enum class Access { read_only, read_write };
  // Creates and migrates when read_write. A read-only open of a missing database is Errc::not_found.
  static Result<std::unique_ptr<Store>> open(const std::filesystem::path& directory, Access access);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  Result<std::vector<OwnedInstance>> owned(const std::string& boot_id);

 private:
  Store();
  struct Database;
  std::unique_ptr<Database> database_;
};

}  // namespace bulkhead::store
