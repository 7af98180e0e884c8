// The one loop that owns who has what. Every change is a command for its thread: it decides (core), takes the
// whole batch of decisions to the book in one durable transaction, and only then answers. Reads need no turn:
// they see the snapshot after the last batch. What takes long (making and scrubbing slices) happens in the
// executor's worker beside it, and comes back as a command. kill -9 anywhere: on start the book and the
// hardware are read, and every lease that holds something is made true again or ended.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/clock.hpp"
#include "base/json.hpp"
#include "base/result.hpp"
#include "core/access/access.hpp"
#include "core/inventory/inventory.hpp"
#include "core/lease/lease.hpp"
#include "core/tenant/tenant.hpp"
#include "engine/observe/observe.hpp"

namespace bulkhead::control {

// Who asks, as the daemon made sure of it.
struct Caller {
  std::string user = {}, tenant = {};  // tenant empty: of none
  access::Role role = access::Role::tenant;
  std::string from = {};  // "192.0.2.7:40112", "uid 1000"
};

enum class Denied {
  invalid,      // the request makes no sense
  forbidden,    // the table of access says no
  not_found,    // there is none, or none that the caller may know of
  conflict,     // the version given is not the present one; the name is taken; the state does not allow it
  quota,        // the tenant's limits
  no_room,      // the host cannot, now
  too_many,     // commands waiting, leases of the host
  unavailable,  // draining, disk full, driver gone: try again
};
std::string_view name_of(Denied why);
struct Refusal {
  Denied why = Denied::invalid;
  std::string what = {};  // one sentence
  std::vector<std::string> reasons = {};
  std::vector<std::string> ways = {};  // the nearest ways to yes
};
template <class T>
using Answer = std::variant<T, Refusal>;
// Called exactly once, on the loop's thread, when the answer is durable.
template <class T>
using Then = std::function<void(Answer<T>)>;

// An idempotency key. The first answer is written with the change itself; the same key again gets that
// answer.
struct Once {
  std::string key = {};  // at most 128 printable bytes; empty: none
  std::string request =
      {};  // SHA-256 of method, path and body, hex: the same key with another request is a conflict
};

struct User {  // a token as others see it: never its secret
  std::string id = {}, user = {}, tenant = {}, note = {};
  access::Role role = access::Role::tenant;
  WallTime created = {};
  std::optional<WallTime> expires = {}, revoked = {};
  bool certificate = false;
};
struct NewToken {
  User user = {};
  std::string secret = {};  // "bh_<id>_<64 hex digits>": shown once
};
struct AskToken {
  std::string user = {}, tenant = {}, note = {};
  access::Role role = access::Role::tenant;
  std::optional<std::chrono::seconds> ttl = {};
  std::string certificate = {};  // SHA-256 of a client certificate, hex: no secret is made
};

// A GPU as the pools have it.
struct PoolGpu {
  Uuid gpu = {};
  unsigned index = 0;
  std::string name = {}, pool = {};  // "mig", "share", "exclusive", "passthrough", "none"
  std::string why = {};              // of "none": drained, lost, not in the node file
  unsigned numa_node = 0;
  std::vector<std::int64_t> leases = {};
  double free = 0;  // part of it nobody has, 0..1
};

// Everything that can be read, as of one batch. Immutable: readers share it.
struct Snapshot {
  std::int64_t batch = 0, last_event = 0;
  WallTime at = {};
  std::map<std::string, std::shared_ptr<const tenant::Tenant>> tenants = {};
  std::map<std::int64_t, std::shared_ptr<const lease::Lease>> leases =
      {};                                           // those not over, and the last 1000 that are
  std::map<std::string, tenant::Amount> held = {};  // by tenant
  std::map<std::string, std::uint64_t> gpu_seconds_month = {};
  std::vector<PoolGpu> gpus = {};
  bool draining = false;
  std::string trouble = {};  // why the host cannot be changed now; empty: it can
};

// What happened, in order; id counts without a gap over restarts. Watch streams are made of these.
struct Event {
  std::int64_t id = 0;
  WallTime at = {};
  std::string kind = {};    // "lease", "tenant", "token", "gpu"
  std::string tenant = {};  // whose: who else may see it is the reader's to ask
  std::string what = {};    // "lease/17"
  std::string verb = {};    // "create", "ready", "expire"
  Json body = {};           // of a lease: its record after it
};

struct Settings {
  observe::Access access = {};
  std::filesystem::path state = {};      // the book lives here; BULKHEAD_STATE
  std::filesystem::path node_file = {};  // pools and fixed layouts; empty: every GPU as it is now
  std::size_t most_waiting = 10'000;     // commands in the queue; beyond it Denied::too_many
  std::size_t most_leases = 100'000;     // not over
  std::chrono::milliseconds tick{200};   // expiries and the queue are looked at this often
};

class Control {
 public:
  // Opens the book, reads the host, settles what a killed daemon left. An Error says what stands in the way.
  static Result<std::unique_ptr<Control>> start(Settings settings);
  ~Control();  // finishes the batch at hand; leases stay as they are
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  // ---- any thread, no waiting
  std::shared_ptr<const Snapshot> now() const;
  // Of a bearer token ("bh_...") or a client certificate's SHA-256; nullopt: unknown, expired or revoked.
  // Constant time in the secret.
  std::optional<Caller> authenticate(std::string_view bearer, std::string_view certificate) const;
  // From the audit log, oldest first, after `id`; at most `most`.
  Result<std::vector<Event>> events_after(std::int64_t id, std::size_t most) const;
  // On the loop's thread after each batch that made events; must not block. Before the first command only.
  void on_events(std::function<void(const std::vector<Event>&)> tell);

  // ---- commands: the caller's right is checked here, once more than in the daemon
  void create_lease(Caller caller, lease::Ask ask, Once once, Then<lease::Lease> then);
  void renew_lease(Caller caller, std::int64_t id, std::chrono::seconds ttl,
                   std::optional<std::int64_t> version, Then<lease::Lease> then);
  void release_lease(Caller caller, std::int64_t id, std::optional<std::int64_t> version,
                     Then<lease::Lease> then);
  void put_tenant(Caller caller, tenant::Tenant tenant, std::optional<std::int64_t> version,
                  Then<tenant::Tenant> then);  // version 0: must be new
  void end_tenant(Caller caller, std::string name,
                  Then<tenant::Tenant> then);  // refused while it holds leases
  void create_token(Caller caller, AskToken ask, Then<NewToken> then);
  void revoke_token(Caller caller, std::string id, Then<User> then);
  void list_tokens(Caller caller, Then<std::vector<User>> then);
  void old_lease(Caller caller, std::int64_t id,
                 Then<lease::Lease> then);              // one that the snapshot no longer has
  void drain(Caller caller, bool on, Then<bool> then);  // nothing new is granted
  // A right that was refused before it came to a command (401, 403), for the audit log; rate-limited inside.
  void refused(Caller caller, std::string verb, std::string what, std::string why);

 private:
  Control();
  struct Inside;
  std::unique_ptr<Inside> inside_;
};

// Reads the audit chain of a state directory, daemon running or not.
struct AuditReport {
  std::int64_t lines = 0;
  std::string broken = {};  // empty: whole
};
Result<AuditReport> verify_audit(const std::filesystem::path& state);
// The first admin token, made once when the book has no token at all; for `bulkhead serve` to write to a file
// only root can read.
Result<std::optional<std::string>> first_token(Control& control);

}  // namespace bulkhead::control
