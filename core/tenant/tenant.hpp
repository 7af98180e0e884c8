// A tenant: who pays, what it may hold at most, and what it holds. Pure.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.hpp"
#include "base/json.hpp"
#include "base/result.hpp"
#include "base/units.hpp"

namespace bulkhead::tenant {

// Lower-case letters, digits and hyphens, 1 to 63, a letter first: fits a DNS label, a metric's label, a file
// name.
Result<std::string> parse_name(std::string_view text);

inline constexpr std::uint32_t min_weight = 1, max_weight = 1'000'000;

// At most this much at a time; nullopt: no limit of its own. Every limit counts leases that hold something
// (preparing, active, releasing) and, for `leases`, those that wait as well.
struct Quota {
  std::optional<std::uint64_t> leases = {};            // at once, waiting ones included
  std::optional<std::uint64_t> gpus = {};              // whole ones: exclusive and passthrough
  std::optional<std::uint64_t> slices = {};            // MIG instances of any profile
  std::map<std::string, std::uint64_t> profiles = {};  // MIG instances by profile name: {"1g.10gb": 4}
  std::optional<std::uint64_t> shares = {};            // software shares
  std::optional<Bytes> memory = {};                    // GPU memory of everything it holds
  std::optional<std::uint64_t> watts = {};  // parts of the GPUs' power limits that its leases stand for
  std::optional<std::uint64_t> gpu_seconds_month =
      {};  // GPU-hours of a calendar month (UTC), as GPU-seconds; a slice counts its part
  friend bool operator==(const Quota&, const Quota&) = default;
};

// What a lease takes, or what a tenant holds: the same units as Quota.
struct Amount {
  std::uint64_t leases = 0, gpus = 0, slices = 0, shares = 0;
  std::map<std::string, std::uint64_t> profiles = {};
  Bytes memory = {};
  std::uint64_t watts = 0;
  std::uint64_t gpu_milli = 0;  // parts of whole GPUs it stands for, in thousandths: what runs up gpu_seconds
  friend bool operator==(const Amount&, const Amount&) = default;
};
Amount operator+(const Amount& a, const Amount& b);  // saturating
Amount operator-(const Amount& a, const Amount& b);  // never below 0

struct Tenant {
  std::string name = {};
  std::uint32_t weight = 100;  // in the queue (core/fairness)
  Quota quota = {};            // hard: never exceeded
  bool suspended = false;      // holds what it has, gets nothing new
  std::string note = {};       // free text of the operator, at most 200 bytes
  WallTime created = {};
  std::int64_t version = 1;  // counts changes; the API's ETag
};

// Every limit that `more` on top of `held` would break, each a sentence with both numbers: "holds 3 of 4
// leases and asks for 2". Empty: within quota. `used_gpu_seconds`: this month so far; a limit of GPU-hours
// refuses only when it is spent.
std::vector<std::string> beyond(const Quota& quota, const Amount& held, const Amount& more,
                                std::uint64_t used_gpu_seconds);

// JSON of the record and of the API: names as above in camelCase, absent keys for nullopt; memory in bytes.
// Parsing names every mistake in one Error ("quota.leases: must be a whole number up to 1000000").
Json to_json(const Quota& quota);
Result<Quota> parse_quota(const Json& json);
Json to_json(const Tenant& tenant);
Result<Tenant> parse_tenant(const Json& json);

}  // namespace bulkhead::tenant
