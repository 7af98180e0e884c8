// The one loop that owns who has what. Every change is a command for its thread: it decides (core), takes the
// whole batch of decisions to the book in one durable transaction, and only then answers. Reads need no turn:
// they see the snapshot after the last batch. What takes long (making and scrubbing slices) happens in the
// executor's worker beside it, and comes back as a command. kill -9 anywhere: on start the book and the
// hardware are read, and every lease that holds something is made true again or ended.
// docs/design/leases.md has the life of a lease, the batches, and what each kill point leaves.
//
// Pools. What the node file says of a GPU: `mode: mig` hands out the instances that are there, with
// `layout: dynamic` they are cut on demand; `share`, `exclusive` and `passthrough` as they are called. A GPU
// that the node file does not name is taken as it is: MIG on: its instances; else exclusive. A GPU that
// somebody without a lease uses gets nothing until it is idle.
//
// A lease belongs to Caller::tenant. An operator asks for a tenant by naming it there; a Caller without a
// tenant cannot hold a lease.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
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
// Called exactly once, on the loop's thread, when the answer is durable; a command that finds the queue full
// or the control ending is answered (too_many, unavailable) on the caller's own thread. Must not block.
template <class T>
using Then = std::function<void(Answer<T>)>;

// An idempotency key of the caller (user and tenant). The first grant is written with the change itself; the
// same key again gets that answer, the lease or the tenant as it was then. A refusal changed nothing and is
// not kept: the same key may try again. Kept for Settings::key_keep.
struct Once {
  std::string key = {};  // at most 128 printable bytes; empty: none
  // SHA-256 of method, path and body, hex: the same key with another request is a conflict
  std::string request = {};
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

// Somebody's word that a GPU gets no new leases. It stays until somebody takes it back: over restarts and
// reboots, and whatever the GPU says of itself meanwhile. Leases that are there go on.
struct Cordon {
  std::string why = {}, by = {};
  WallTime since = {};
};

// A GPU as the pools have it.
struct PoolGpu {
  Uuid gpu = {};
  unsigned index = 0;
  std::string name = {}, pool = {};  // "mig", "share", "exclusive", "passthrough", "none"
  std::string why = {};              // of "none": drained, lost, not in the node file
  unsigned numa_node = 0;
  std::vector<std::int64_t> leases = {};
  double free = 0;  // part of it that may be had, 0..1
  std::optional<Cordon> cordon = {};
};

// Leases by id, as a std::map of them reads; copies share all but what differs.
class Leases {
 public:
  using Value = std::pair<std::int64_t, std::shared_ptr<const lease::Lease>>;
  class Iterator;
  Iterator begin() const;
  Iterator end() const;
  Iterator find(std::int64_t id) const;         // end(): none
  Iterator lower_bound(std::int64_t id) const;  // the first that is not below id
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  void put(std::int64_t id, std::shared_ptr<const lease::Lease> lease);
  void erase(std::int64_t id);

 private:
  using Chunk = std::vector<Value>;  // of 64 ids in a row, rising; never empty
  using Chunks = std::map<std::int64_t, std::shared_ptr<const Chunk>>;
  Chunks chunks_ = {};
  std::size_t size_ = 0;
};
class Leases::Iterator {
 public:
  using iterator_category = std::bidirectional_iterator_tag;
  using value_type = Value;
  using difference_type = std::ptrdiff_t;
  using pointer = const Value*;
  using reference = const Value&;
  Iterator() = default;
  Iterator(Chunks::const_iterator chunk, std::size_t at) : chunk_(chunk), at_(at) {}
  reference operator*() const { return (*chunk_->second)[at_]; }
  pointer operator->() const { return &(*chunk_->second)[at_]; }
  Iterator& operator++() {
    if (++at_ == chunk_->second->size()) ++chunk_, at_ = 0;
    return *this;
  }
  Iterator operator++(int) {
    Iterator was = *this;
    ++*this;
    return was;
  }
  Iterator& operator--() {
    if (at_ == 0) --chunk_, at_ = chunk_->second->size();
    --at_;
    return *this;
  }
  Iterator operator--(int) {
    Iterator was = *this;
    --*this;
    return was;
  }
  friend bool operator==(const Iterator& a, const Iterator& b) {
    return a.chunk_ == b.chunk_ && a.at_ == b.at_;
  }

 private:
  Chunks::const_iterator chunk_ = {};
  std::size_t at_ = 0;
};

inline constexpr std::size_t most_why = 500;  // bytes of a cordon's or an eviction's reason

// Everything that can be read, as of one batch. Immutable: readers share it.
struct Snapshot {
  std::int64_t batch = 0, last_event = 0;
  WallTime at = {};
  std::map<std::string, std::shared_ptr<const tenant::Tenant>> tenants = {};
  Leases leases = {};                               // those not over, and the last 1000 that ended
  std::map<std::string, tenant::Amount> held = {};  // by tenant
  std::map<std::string, std::uint64_t> gpu_seconds_month = {};  // by tenant; as of the last tick
  std::vector<PoolGpu> gpus = {};
  bool draining = false;
  std::string trouble = {};  // why the host cannot be changed now; empty: it can
};

// What happened and what was refused, in order: each is a line of the audit log, so id counts without a gap
// over restarts. Watch streams are made of those whose outcome is "done".
struct Event {
  std::int64_t id = 0;
  WallTime at = {};
  std::string kind = {};    // "lease", "tenant", "token", "gpu", "host", "access"
  std::string tenant = {};  // whose thing it is: who else may see it is the reader's to ask
  std::string what = {};    // "lease/17"
  std::string verb = {};    // "create", "ready", "expire"
  Json body = {};           // of a lease: its record after it
  std::string user = {}, role = {}, from = {};  // who; user "bulkhead" without a role: the daemon itself
  std::string outcome = {};                     // "done", "refused: quota"
  std::array<std::uint8_t, 32> hash = {};       // of its line in the chain
};

// Where a lease stands. What follows the state is said of one that waits; `why` names no other tenant.
struct Standing {
  lease::State state = lease::State::requested;
  std::uint64_t ahead = 0;          // of its own tenant's; at most fairness::kMostCounted are counted
  std::uint64_t own = 0;            // of its own tenant's that wait, with itself
  std::uint64_t tenants_ahead = 0;  // other tenants that go before it, by what they hold and held
  std::uint64_t waiting = 0;        // in all
  std::string why = {};
};

struct Settings {
  observe::Access access = {};
  std::filesystem::path state = {};              // the book lives here; BULKHEAD_STATE
  std::filesystem::path node_file = {};          // pools and fixed layouts; empty: every GPU as it is now
  std::size_t most_waiting = 10'000;             // commands in the queue; beyond it Denied::too_many
  std::size_t most_leases = 100'000;             // not over
  std::chrono::milliseconds tick{200};           // expiries and the queue are looked at this often
  std::chrono::milliseconds look_every{5'000};   // at the host, for what was lost or changed by others
  std::chrono::milliseconds idle_keep{600'000};  // an instance cut on demand and used no more, before it goes
  std::chrono::milliseconds notice{60'000};      // to a lease that is preempted
  std::chrono::milliseconds scrub_again{30'000};  // after a part that could not be scrubbed clean
  std::chrono::hours key_keep{24};                // idempotency keys
  std::chrono::milliseconds grace{10'000};        // between SIGTERM and SIGKILL of what a lease left running
  std::chrono::milliseconds lock_wait{30'000};    // for another bulkhead that changes the host
  std::filesystem::path cdi = "/run/cdi";         // below access.root
  std::function<WallTime()> clock = {};           // empty: wall_now; asked on the loop's thread
  // Before a GPU's MIG mode changes (true) and after it (false): whoever else of this program is in the
  // driver lets go of it, as the driver demands, and comes back. On a worker; may take seconds. False: not
  // all have; it is tried all the same, and the driver decides.
  std::function<bool(bool)> let_go = {};
};

class Control {
 public:
  // Opens the book, reads the host, settles what a killed daemon left. An Error says what stands in the way.
  static Result<std::unique_ptr<Control>> start(Settings settings);
  ~Control();  // finishes the batch at hand; leases stay as they are
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  // ---- any thread, no waiting
  // Hold what it returns while walking through it: `for (... : control.now()->leases)` would not.
  std::shared_ptr<const Snapshot> now() const;
  // Of a bearer token ("bh_...") or a client certificate's SHA-256; nullopt: unknown, expired or revoked.
  // Constant time in the secret.
  std::optional<Caller> authenticate(std::string_view bearer, std::string_view certificate) const;
  // From the audit log, oldest first, after `id`; at most `most`.
  Result<std::vector<Event>> events_after(std::int64_t id, std::size_t most) const;
  // Newest first, before `id`.
  Result<std::vector<Event>> events_before(std::int64_t id, std::size_t most) const;
  // On the loop's thread after each batch that made events; must not block. Before the first command only.
  void on_events(std::function<void(const std::vector<Event>&)> tell);

  // ---- commands: the caller's right is checked here, once more than in the daemon
  void create_lease(Caller caller, lease::Ask ask, Once once, Then<lease::Lease> then);
  void renew_lease(Caller caller, std::int64_t id, std::chrono::seconds ttl,
                   std::optional<std::int64_t> version, Then<lease::Lease> then);
  void release_lease(Caller caller, std::int64_t id, std::optional<std::int64_t> version,
                     Then<lease::Lease> then);
  void put_tenant(Caller caller, tenant::Tenant tenant, std::optional<std::int64_t> version,
                  Then<tenant::Tenant> then, Once once = {});  // version 0: must be new
  void end_tenant(Caller caller, std::string name,
                  Then<tenant::Tenant> then);  // refused while it holds leases
  void create_token(Caller caller, AskToken ask, Then<NewToken> then);
  void revoke_token(Caller caller, std::string id, Then<User> then);
  void list_tokens(Caller caller, Then<std::vector<User>> then);
  void old_lease(Caller caller, std::int64_t id,
                 Then<lease::Lease> then);  // one that the snapshot no longer has
  void standing(Caller caller, std::int64_t id, Then<Standing> then);
  void drain(Caller caller, bool on, Then<bool> then);  // nothing new is granted
  // One GPU gets no new leases (the why is at most most_why bytes, and needed), or gets them again. Twice is
  // no mistake: the first word stays.
  void cordon(Caller caller, Uuid gpu, std::string why, Then<PoolGpu> then);
  void uncordon(Caller caller, Uuid gpu, Then<PoolGpu> then);
  // Ends somebody's lease, whatever it is doing, and tells them why: the reason of the lease.
  void evict(Caller caller, std::int64_t id, std::string why, Then<lease::Lease> then);
  // Reads the node file again; the pools follow at the next look at the host. A file with a mistake is
  // refused whole and the old one stays in force. Leases stay where they are.
  void reload(Caller caller, Then<bool> then);
  // A right that was refused before it came to a command (401, 403), for the audit log; rate-limited inside.
  void refused(Caller caller, std::string verb, std::string what, std::string why);

  // ---- for others of this process
  // A line of the audit log, and an event: what was decided beside the loop. Not more than a few a second.
  void note(Caller caller, std::string verb, std::string what, std::string tenant, Json body);
  // Runs `work` on the caller's thread while nobody of this process is in the driver, as whoever forks must
  // (execute::alter). Not from the loop's thread.
  void alone(const std::function<void()>& work);
  // Asked on the loop's thread before a lease becomes active, again when the time is over, with the same
  // lease: how long it has to wait still. Must not block. An empty one: nobody waits.
  void on_start(std::function<std::chrono::milliseconds(const lease::Lease&)> ask);

  struct Inside;  // of the module's own

 private:
  Control();
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
