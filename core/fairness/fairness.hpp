// Who goes next when more is asked for than there is: weighted dominant-resource fairness over slice-seconds,
// nominal quotas first. A tenant's dominant share is the largest part it holds of any one resource (DRF,
// NSDI'11); what orders tenants is that share now mixed with its exponentially decayed past, over the
// tenant's weight: the `level`. A share taken counts at once, so a burst of requests gains nothing. Estimated
// lengths and priorities never move one tenant before another: nobody gains by stating them wrongly.
//
// The rule of next(), to the letter:
//  1. A request is *within* when its tenant's usage and it stay at or below the nominal quota of every
//  resource it asks
//     for; else it *borrows*. Beyond the tenant's hard limit it waits, whatever is free.
//  2. In a tenant: higher priority, then earlier enqueued, then lower id. Of the first kReach of these, the
//  first that is
//     within and the first that borrows are the tenant's candidates (those the caller holds are passed over).
//     A request that waited `patience` is *owed*; when a tenant's first is owed, nothing behind it is a
//     candidate.
//  3. Among tenants: owed candidates first (earlier enqueued, then lower id), then the lowest level, then
//  earlier enqueued,
//     then lower id. Levels within 2^-44 of each other are equal.
//  4. The first candidate within that fits what is free goes. An owed one that does not fit keeps what it
//  needs: the others
//     may take only what is left beside it (one reservation at a time, as in EASY backfilling).
//  5. Only when no candidate within fits do borrowers go, in the same order. What other tenants' waiting
//  requests within
//     their quotas ask for (their *claims*) is set aside first: of a resource that a request would take
//     beyond its tenant's nominal quota it gets only what is free beside those claims. So nobody borrows what
//     somebody within quota is waiting for, and what nobody waits for is not left idle.
// Nothing running is ever taken back here. Pure and deterministic; `now` never goes back (an earlier one
// counts as the last).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/result.hpp"

namespace bulkhead::fairness {

inline constexpr std::size_t kMostResources = 16;
inline constexpr std::size_t kMostTenants = 65'536;
inline constexpr std::size_t kMostRequests = 1'000'000;  // pending and running
inline constexpr std::int64_t kMostAmount = 100'000'000'000'000;
inline constexpr std::uint32_t kMostWeight = 1'000'000;
inline constexpr std::size_t kReach = 32;  // requests of one tenant looked at

// How much of each resource, in the order of Config::resources; the rest stays 0.
using Amounts = std::array<std::int64_t, kMostResources>;
Amounts unlimited();

using TenantId = std::uint32_t;  // in order of add_tenant, from 0

struct Resource {
  std::string name = {};  // "1g.10gb slices", "GPUs", "watts"
  std::int64_t capacity = 0;
};

struct Config {
  std::vector<Resource> resources = {};
  std::int64_t half_life_ms = 24LL * 3600 * 1000;  // of the past
  double past = 0.5;  // how much the past weighs in a level, 0 (the share now alone: plain DRF) to 1
  std::int64_t sample_ms =
      60'000;  // levels and who is owed are as of the last multiple of it, or the tenant's last change
  std::int64_t patience_ms = 3'600'000;  // 0: nobody is ever owed
};

struct Tenant {
  std::string name = {};
  std::uint32_t weight = 1;
  Amounts nominal = {};
  Amounts limit = unlimited();  // at least the nominal quota
};

struct Request {
  std::uint64_t id = 0;  // the caller's, once
  TenantId tenant = 0;
  Amounts demand = {};
  std::int64_t enqueued_ms = 0;
  std::int64_t length_ms = 0;  // estimated; 0: unknown. Reported, never used to order
  std::int32_t priority = 0;   // among the tenant's own
};

struct Turn {
  std::uint64_t request = 0;
  TenantId tenant = 0;
  bool borrows = false;
  bool owed = false;
  friend bool operator==(const Turn&, const Turn&) = default;
};

enum class Why { goes_next, behind_others, behind_own, limit, capacity, reserved, borrowing, held };
struct Reason {
  Why why = Why::goes_next;
  std::string text = {};     // one sentence with the numbers
  std::uint64_t behind = 0;  // candidates of other tenants that come first
};

// Where one that waits stands, in numbers alone: nobody else is named.
inline constexpr std::uint64_t kMostCounted = 1000;
struct Waiting {
  Why why = Why::goes_next;
  std::string held = {};            // Why::held: what the caller said
  std::uint64_t ahead = 0;          // of its own tenant, in its order; kMostCounted: as many or more
  std::uint64_t own = 0;            // of its own tenant, with itself
  std::uint64_t tenants_ahead = 0;  // other tenants whose first goes before it
  std::uint64_t pending = 0;        // in all
};

// Finish-time fairness (Themis, NSDI'20): rho = the time from enqueued to finished, over what it would have
// been alone on the tenant's part (weight over the sum of weights) of the cluster. There the tenant's
// requests are served one after another, in the order they finished in, at the speed of the whole part; none
// faster than it ran, and one larger than the part in as many rounds as it needs. 1: as good as a cluster of
// one's own; below: sharing paid.
struct TenantFigures {
  TenantId tenant = 0;
  std::string name = {};
  std::uint32_t weight = 1;
  std::string dominant = {};  // the resource of which it holds the largest part; empty: holds nothing
  double share = 0, past = 0, level = 0;
  double share_seconds = 0;  // integral of its dominant share since it was added
  std::uint64_t pending = 0, running = 0, finished = 0;
  double mean_rho = 0, worst_rho = 0;  // of the finished; 0: none
  std::uint64_t worst_request = 0;
  double waiting_rho =
      0;  // the largest of those that wait, had they started now and lasted as estimated; 0: no estimates
};
struct Report {
  std::vector<TenantFigures> tenants = {};
  std::optional<TenantId> worst = {};  // by worst_rho; ties: the lower id
  double worst_rho = 0, mean_rho = 0;
};

class Book {
 public:
  ~Book();
  Book(Book&&) noexcept;
  Book& operator=(Book&&) noexcept;

  // Errors name the figure that is out of bounds.
  static Result<Book> make(Config config);
  Result<TenantId> add_tenant(Tenant tenant, std::int64_t now_ms);
  Status change_tenant(TenantId id, Tenant tenant, std::int64_t now_ms);  // what it holds stays
  Status set_capacity(std::size_t resource, std::int64_t capacity, std::int64_t now_ms);

  // Errors: an id that is there already, no such tenant, an amount out of bounds, nothing asked for, more
  // than the capacity or the tenant's limit will ever allow (no_capacity), too many requests.
  Status submit(const Request& request, std::int64_t now_ms);
  // A request that already runs (at start); charged without asking whether it fits.
  Status adopt(const Request& request, std::int64_t now_ms);
  Status withdraw(std::uint64_t id, std::int64_t now_ms);  // a pending one
  // No place was found for it although there is enough: passed over until retry(). It keeps its claims.
  Status hold(std::uint64_t id, std::string why, std::int64_t now_ms);
  void retry(std::int64_t now_ms);

  std::optional<Turn> next(std::int64_t now_ms);
  // Takes a pending request's amounts. Not only next()'s: the caller may insist, but never beyond limit or
  // capacity.
  Status admit(std::uint64_t id, std::int64_t now_ms);
  Status finish(std::uint64_t id, std::int64_t now_ms);

  // The turns that would follow one another if each were admitted now, at most `most`.
  std::vector<Turn> order(std::int64_t now_ms, std::size_t most) const;
  Result<Reason> explain(std::uint64_t id, std::int64_t now_ms) const;
  Result<Waiting> waits(std::uint64_t id, std::int64_t now_ms);  // cheap: may be asked often
  Report report(std::int64_t now_ms) const;

  // A tenant's decayed past, for whoever makes the book anew to keep and to put back. `past` was true at
  // `at_ms`; what the tenant holds now counts as held since. An Error: it is no past that can be.
  double past(TenantId tenant, std::int64_t now_ms) const;
  Status set_past(TenantId tenant, double past, std::int64_t at_ms, std::int64_t now_ms);

  std::size_t pending() const;
  std::size_t running() const;
  std::int64_t free(std::size_t resource) const;  // below 0 when capacity was lost
  std::int64_t usage(TenantId tenant, std::size_t resource) const;

 private:
  struct State;
  explicit Book(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace bulkhead::fairness
