// The registry: one directory, three files a tenant. ID.lock is held (flock) by the launcher and its arbiter
// and tells who lives; ID.json is what was asked; ID.now.json is what is so. Each of the two has one writer
// at a time and is replaced whole. Everything read back is checked: the directory is root's, but an older
// version may have written it.
#pragma once

#include "base/fd.hpp"
#include "engine/share/share.hpp"

namespace bulkhead::share {

inline constexpr std::size_t most_tenants = 256;

class Entry {  // one's own
 public:
  // Makes the directory and the files. Errc::permission: not root. Errc::in_use: that name is taken by a live
  // tenant.
  static Result<Entry> enter(const Place& place, const Asked& asked);
  static Entry adopt(std::filesystem::path dir, std::uint64_t id, UniqueFd lock) {
    return Entry(std::move(dir), id, std::move(lock));
  }
  Status write(const Now& now) const;
  void leave();  // removes the files; the lock goes with its last descriptor
  std::uint64_t id() const { return id_; }
  int lock() const { return lock_.get(); }

 private:
  Entry(std::filesystem::path dir, std::uint64_t id, UniqueFd lock)
      : dir_(std::move(dir)), id_(id), lock_(std::move(lock)) {}
  std::filesystem::path dir_;
  std::uint64_t id_;
  UniqueFd lock_;
};

// Everybody, dead ones included (alive == false). `own`: taken for alive without asking (its lock is ours).
std::vector<Tenant> read_all(const Place& place, std::uint64_t own = 0);
// Replaces a file of the registry: readers see the old or the new one. Not durable: /run is a tmpfs.
Status write_file_quick(const std::filesystem::path& path, std::string_view content);
Status write_asked(const Place& place, const Asked& asked);
// Removes a dead tenant's files; nothing when it lives after all, or somebody is changing the table.
void forget(const Place& place, std::uint64_t id);
// Held while tenants enter, change or are forgotten.
Result<UniqueFd> lock_table(const Place& place, bool wait = true);
// What of a tenant goes into its file, at most: what is longer would not be read back, and whoever is not
// read is in nobody's plan.
inline constexpr std::size_t most_groups = 1024, most_channels = 8192, most_processes = 4096;

// The plan of one GPU (RM device instance) from the table: tenants with groups there.
struct GpuPlan {
  std::vector<sharing::Tenant> tenants;
  sharing::Plan plan;
};
GpuPlan plan_of(const std::vector<Tenant>& all, std::uint32_t gpu, const sharing::Costs& costs);

Result<Asked> asked_from(const Json& json);
Json to_json(const Asked& asked);
Result<Now> now_from(const Json& json);
Json to_json(const Now& now);

}  // namespace bulkhead::share
