#include "core/fairness/fairness.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <unordered_map>
#include <utility>

#include <fmt/format.h>

#include "base/text.hpp"

namespace bulkhead::fairness {

namespace {

constexpr double kLevelUnit = 0x1.0p44;  // levels are compared in these steps
constexpr std::int64_t kMostTime =
    1'000'000'000'000'000;  // ms; 30 thousand years, so that sums stay far from overflow
constexpr std::uint32_t kNobody = UINT32_MAX;
constexpr double kMostPast = 1e16;  // no share is larger

// 2^-(dt/half), by multiplying table entries: the C library's exp2 may differ in the last bit from machine to
// machine.
double decay(std::int64_t dt, std::int64_t half) {
  if (dt <= 0) return 1;
  const std::int64_t whole = dt / half;
  if (whole > 1000) return 0;
  static constexpr std::array<double, 20> roots = {
      0.7071067811865476, 0.8408964152537145, 0.9170040432046712, 0.9576032806985737, 0.9785720620877001,
      0.9892280131939755, 0.9945994234836332, 0.9972960560854701, 0.9986471128909702, 0.9993233275026507,
      0.9996616064962437, 0.9998307889319291, 0.9999153908866135, 0.9999576945484311, 0.9999788470504919,
      0.9999894234693144, 0.9999947117206743, 0.9999973558568414, 0.9999986779275467, 0.9999993389635549};
  double factor = std::ldexp(1.0, -static_cast<int>(whole));
  double rest = static_cast<double>(dt % half) / static_cast<double>(half);
  for (const double root : roots) {
    rest *= 2;
    if (rest >= 1) {
      rest -= 1;
      factor *= root;
    }
  }
  // What is left is below 2^-20 of a half-life: a straight line is exact to 1e-13.
  return factor * (1 - rest * 0x1.0p-20 * 0.6931471805599453);
}

enum class Phase : std::uint8_t { pending, held, running };

struct Entry {
  Request request = {};
  Phase phase = Phase::pending;
  std::int64_t started_ms = 0;
  std::string held_why = {};
};

// The order inside a tenant.
struct Place {
  std::int32_t priority = 0;
  std::int64_t enqueued_ms = 0;
  std::uint64_t id = 0;
  Entry* entry = nullptr;  // in State::requests, whose nodes stay where they are
  bool operator<(const Place& other) const {
    if (priority != other.priority) return priority > other.priority;
    if (enqueued_ms != other.enqueued_ms) return enqueued_ms < other.enqueued_ms;
    return id < other.id;
  }
};

// The order among tenants.
struct Rank {
  bool owed = false;
  std::uint64_t level = 0;  // 0 when owed
  std::int64_t enqueued_ms = 0;
  std::uint64_t id = 0;
  bool operator<(const Rank& other) const {
    if (owed != other.owed) return owed;
    if (level != other.level) return level < other.level;
    if (enqueued_ms != other.enqueued_ms) return enqueued_ms < other.enqueued_ms;
    return id < other.id;
  }
};

struct Candidate {
  bool any = false;
  Rank rank = {};
  Amounts demand = {};
};

struct Account {
  Tenant tenant = {};
  Amounts usage = {};
  Amounts claim = {};
  std::set<Place> queue = {};
  std::size_t running = 0;
  double share = 0, past = 0, share_seconds = 0;
  std::size_t dominant = kMostResources;
  std::int64_t settled_ms = 0;
  double alone_until_ms = 0;  // when its part of the cluster, alone, would have served what finished
  std::uint64_t finished = 0, worst_request = 0;
  double rho_sum = 0, worst_rho = 0;
  Candidate within = {}, borrows = {};
  // The first owed request within quota that the caller holds: it keeps what it needs, though it is no
  // candidate.
  Candidate waits = {};
};

// A tournament of the tenants' candidates, a heap in an array: each node holds the tenant of the least rank
// below it and, per resource, the least amounts asked for, so that a search leaves out what cannot fit.
struct Tree {
  std::vector<std::uint32_t> first = {};
  std::vector<std::int64_t> demand = {};
  std::vector<std::int64_t> beyond =
      {};  // borrowers: least demand beyond nominal less the tenant's own claim
};
constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kAlways = std::numeric_limits<std::int64_t>::min();

std::string amount_list(const Config& config, const Amounts& amounts) {
  std::string out;
  for (std::size_t r = 0; r < config.resources.size(); ++r) {
    if (amounts[r] == 0) continue;
    out += fmt::format("{}{} {}", out.empty() ? "" : ", ", amounts[r], config.resources[r].name);
  }
  return out;
}

std::string times(std::uint64_t n, std::string_view one) {
  return fmt::format("{} {}{}", n, one, n == 1 ? "" : "s");
}

}  // namespace

Amounts unlimited() {
  Amounts out;
  out.fill(kMostAmount);
  return out;
}

struct Book::State {
  Config config = {};
  std::size_t count = 0;  // of resources
  std::vector<Account> accounts = {};
  std::unordered_map<std::uint64_t, Entry> requests = {};
  std::size_t pending = 0;
  std::set<std::uint64_t> held = {};
  Amounts used = {};
  Amounts claims = {};  // the tenants' summed
  std::uint64_t weights = 0;
  std::int64_t now = 0;
  std::int64_t tick = 0;
  std::size_t leaves = 0;  // of each tree, a power of two
  Tree within_tree = {}, borrow_tree = {};
  std::set<std::pair<Rank, TenantId>> waiting = {};  // Account::waits of all tenants, oldest first

  State() = default;
  State(const State& other) { *this = other; }
  State& operator=(const State& other) {
    if (this == &other) return *this;
    config = other.config, count = other.count, accounts = other.accounts, requests = other.requests;
    pending = other.pending, held = other.held, used = other.used, claims = other.claims,
    weights = other.weights;
    now = other.now, tick = other.tick, leaves = other.leaves, within_tree = other.within_tree;
    borrow_tree = other.borrow_tree, waiting = other.waiting;
    for (auto& account : accounts) {  // their entries are in this table now
      std::set<Place> queue;
      for (Place place : account.queue) {
        place.entry = &requests.at(place.id);
        queue.insert(queue.end(), place);
      }
      account.queue = std::move(queue);
    }
    return *this;
  }

  // ---- time
  // Levels move with time, so their order is taken anew at each multiple of the sample, all at once.
  void advance(std::int64_t to) {
    now = std::clamp(to, now, kMostTime);
    if (now / config.sample_ms == tick) return;
    tick = now / config.sample_ms;
    const std::int64_t at = tick * config.sample_ms;
    for (auto& account : accounts) {
      if (account.settled_ms < at) settle(account, at);
    }
    for (TenantId id = 0; id < accounts.size(); ++id) look(id);
    rebuild();
  }

  // Brings the past up to `at`: the share was the same since settled_ms.
  void settle(Account& account, std::int64_t at) const {
    const std::int64_t dt = at - account.settled_ms;
    if (dt <= 0) return;
    const double factor = decay(dt, config.half_life_ms);
    account.past = account.share + (account.past - account.share) * factor;
    account.share_seconds += account.share * static_cast<double>(dt) / 1000;
    account.settled_ms = at;
  }

  double level_of(const Account& account) const {
    return ((1 - config.past) * account.share + config.past * account.past) /
           static_cast<double>(account.tenant.weight);
  }

  void find_share(Account& account) const {
    account.share = 0;
    account.dominant = kMostResources;
    for (std::size_t r = 0; r < count; ++r) {
      if (account.usage[r] == 0) continue;
      const std::int64_t capacity = config.resources[r].capacity;
      // Capacity that went away while it was in use: all of it.
      const double share =
          capacity == 0 ? 1.0 : static_cast<double>(account.usage[r]) / static_cast<double>(capacity);
      if (share > account.share) {
        account.share = share;
        account.dominant = r;
      }
    }
  }

  void charge(Account& account, const Amounts& demand, std::int64_t sign) {
    settle(account, now);
    for (std::size_t r = 0; r < count; ++r) {
      account.usage[r] += sign * demand[r];
      used[r] += sign * demand[r];
    }
    find_share(account);
  }

  // ---- who is a candidate
  bool within(const Account& account, const Amounts& taken, const Amounts& demand) const {
    for (std::size_t r = 0; r < count; ++r) {
      if (demand[r] > 0 && taken[r] + demand[r] > account.tenant.nominal[r]) return false;
    }
    return true;
  }
  bool under_limit(const Account& account, const Amounts& demand) const {
    for (std::size_t r = 0; r < count; ++r) {
      if (demand[r] > 0 && account.usage[r] + demand[r] > account.tenant.limit[r]) return false;
    }
    return true;
  }
  // Not now perhaps, but without anything but its own tenant's requests ending.
  bool possible(const Account& account, const Amounts& demand) const {
    for (std::size_t r = 0; r < count; ++r) {
      if (demand[r] > config.resources[r].capacity) return false;
    }
    return under_limit(account, demand);
  }
  bool owed(const Request& request) const {
    // As of the last sample, so that the answer depends on no other call.
    return config.patience_ms > 0 && tick * config.sample_ms - request.enqueued_ms >= config.patience_ms;
  }
  Rank rank_of(const Account& account, const Request& request) const {
    const double level = level_of(account) * kLevelUnit;
    const bool is_owed = owed(request);
    return {.owed = is_owed,
            .level = is_owed ? 0 : static_cast<std::uint64_t>(std::min(level + 0.5, 0x1.0p63)),
            .enqueued_ms = request.enqueued_ms,
            .id = request.id};
  }

  // Finds the tenant's candidates and claims again.
  void look(TenantId id) {
    Account& account = accounts[id];
    for (std::size_t r = 0; r < count; ++r) claims[r] -= account.claim[r];
    if (account.waits.any) waiting.erase({account.waits.rank, id});
    account.claim = {};
    account.within.any = account.borrows.any = account.waits.any = false;
    Amounts taken = account.usage;
    std::size_t seen = 0;
    bool first = true, closed = false;  // closed: nothing further is a candidate; claims go on
    for (const Place& place : account.queue) {
      if (seen++ == kReach) break;
      const Request& request = place.entry->request;
      const bool is_held = place.entry->phase == Phase::held;
      if (!possible(account, request.demand)) continue;
      const bool inside = within(account, account.usage, request.demand);
      if (inside && within(account, taken, request.demand)) {
        for (std::size_t r = 0; r < count; ++r) {
          taken[r] += request.demand[r];
          account.claim[r] += request.demand[r];
        }
      }
      if (closed) continue;
      Candidate& into = is_held ? account.waits : inside ? account.within : account.borrows;
      const bool is_owed = owed(request);
      if (!into.any && (!is_held || (is_owed && inside))) {
        into = {true, rank_of(account, request), request.demand};
      }
      if (!is_held) {
        closed = first && is_owed;
        first = false;
      }
    }
    for (std::size_t r = 0; r < count; ++r) claims[r] += account.claim[r];
    if (account.waits.any) waiting.insert({account.waits.rank, id});
  }

  // ---- the trees
  void pull(Tree& tree, bool borrowing, std::size_t node) const {
    const std::size_t left = 2 * node, right = left + 1;
    const std::uint32_t a = tree.first[left], b = tree.first[right];
    tree.first[node] = a == kNobody ? b : b == kNobody ? a : rank(b, borrowing) < rank(a, borrowing) ? b : a;
    for (std::size_t r = 0; r < count; ++r) {
      tree.demand[node * count + r] = std::min(tree.demand[left * count + r], tree.demand[right * count + r]);
      if (borrowing)
        tree.beyond[node * count + r] =
            std::min(tree.beyond[left * count + r], tree.beyond[right * count + r]);
    }
  }
  const Candidate& candidate(TenantId id, bool borrowing) const {
    return borrowing ? accounts[id].borrows : accounts[id].within;
  }
  const Rank& rank(TenantId id, bool borrowing) const { return candidate(id, borrowing).rank; }

  void set_leaf(Tree& tree, bool borrowing, TenantId id) const {
    const std::size_t node = leaves + id;
    const bool any = id < accounts.size() && candidate(id, borrowing).any;
    tree.first[node] = any ? id : kNobody;
    for (std::size_t r = 0; r < count; ++r) {
      tree.demand[node * count + r] = any ? candidate(id, borrowing).demand[r] : kNever;
      if (!borrowing) continue;
      tree.beyond[node * count + r] = any ? beyond(accounts[id], accounts[id].borrows.demand, r) : kNever;
    }
  }
  // What must be free beside all claims for this resource; kAlways where the tenant stays in its quota.
  std::int64_t beyond(const Account& account, const Amounts& demand, std::size_t r) const {
    if (demand[r] == 0 || account.usage[r] + demand[r] <= account.tenant.nominal[r]) return kAlways;
    return demand[r] - account.claim[r];
  }

  void update(TenantId id) {
    look(id);
    for (const bool borrowing : {false, true}) {
      Tree& tree = borrowing ? borrow_tree : within_tree;
      set_leaf(tree, borrowing, id);
      for (std::size_t node = (leaves + id) / 2; node > 0; node /= 2) pull(tree, borrowing, node);
    }
  }
  void rebuild() {
    leaves = 1;
    while (leaves < accounts.size()) leaves *= 2;
    for (const bool borrowing : {false, true}) {
      Tree& tree = borrowing ? borrow_tree : within_tree;
      tree.first.assign(2 * leaves, kNobody);
      tree.demand.assign(2 * leaves * count, kNever);
      if (borrowing) tree.beyond.assign(2 * leaves * count, kNever);
      for (std::size_t id = 0; id < leaves; ++id) set_leaf(tree, borrowing, static_cast<TenantId>(id));
      for (std::size_t node = leaves - 1; node > 0; --node) pull(tree, borrowing, node);
    }
  }

  Amounts available() const {
    Amounts out = {};
    for (std::size_t r = 0; r < count; ++r) out[r] = config.resources[r].capacity - used[r];
    return out;
  }
  bool fits(const Amounts& demand, const Amounts& room) const {
    for (std::size_t r = 0; r < count; ++r) {
      if (demand[r] > 0 && demand[r] > room[r]) return false;
    }
    return true;
  }

  // What candidates may take. `beside` is for what would be borrowed: free beside the tenants' claims.
  struct Room {
    Amounts rest = {};
    Amounts beside = {};
    std::optional<TenantId> keeper = {};  // whose owed request keeps what it needs
    Candidate kept = {};
  };
  bool borrower_fits(const Account& account, const Amounts& demand, const Room& room) const {
    for (std::size_t r = 0; r < count; ++r) {
      if (beyond(account, demand, r) > room.beside[r]) return false;
    }
    return fits(demand, room.rest);
  }
  // The oldest owed candidate, when it does not fit, or the oldest owed request within quota that is held,
  // keeps what it needs.
  void reserve(Room& room, bool borrowing) const {
    const Tree& tree = borrowing ? borrow_tree : within_tree;
    const TenantId first = tree.first[1];
    if (first != kNobody && candidate(first, borrowing).rank.owed) {
      room.keeper = first;
      room.kept = candidate(first, borrowing);
      const bool goes = borrowing ? borrower_fits(accounts[first], room.kept.demand, room)
                                  : fits(room.kept.demand, room.rest);
      if (goes) room.keeper.reset();
    }
    if (!borrowing && !waiting.empty()) {
      const auto& [oldest, id] = *waiting.begin();
      if (!room.keeper || oldest < room.kept.rank) {
        room.keeper = id;
        room.kept = accounts[id].waits;
      }
    }
    if (!room.keeper) return;
    for (std::size_t r = 0; r < count; ++r) {
      if (room.kept.demand[r] == 0) continue;
      room.rest[r] = std::max<std::int64_t>(0, room.rest[r] - room.kept.demand[r]);
      // What is kept within quota is among the claims already.
      if (borrowing) room.beside[r] -= room.kept.demand[r];
    }
  }
  struct Rooms {
    Amounts all = {};
    Room within = {}, borrow = {};
  };
  Rooms rooms() const {
    Rooms out{.all = available()};
    out.within.rest = out.all;
    reserve(out.within, false);
    out.borrow.rest = out.within.rest;
    for (std::size_t r = 0; r < count; ++r) out.borrow.beside[r] = out.all[r] - claims[r];
    reserve(out.borrow, true);
    return out;
  }

  // The candidate of the least rank that fits in the room.
  void search(const Tree& tree, bool borrowing, std::size_t node, const Room& room,
              std::uint32_t& best) const {
    const std::uint32_t first = tree.first[node];
    if (first == kNobody) return;
    if (best != kNobody && !(rank(first, borrowing) < rank(best, borrowing))) return;
    for (std::size_t r = 0; r < count; ++r) {
      const std::int64_t least = tree.demand[node * count + r];
      if (least > 0 && least > room.rest[r]) return;
      if (borrowing && tree.beyond[node * count + r] > room.beside[r]) return;
    }
    if (node >= leaves) {
      best = first;
      return;
    }
    const bool right_first = tree.first[2 * node + 1] == first;
    search(tree, borrowing, 2 * node + (right_first ? 1 : 0), room, best);
    search(tree, borrowing, 2 * node + (right_first ? 0 : 1), room, best);
  }

  std::optional<Turn> next() const {
    if (leaves == 0) return std::nullopt;
    const auto turn = [this](TenantId id, bool borrowing) {
      const Rank& r = rank(id, borrowing);
      return Turn{.request = r.id, .tenant = id, .borrows = borrowing, .owed = r.owed};
    };
    std::uint32_t best = kNobody;
    const Rooms here = rooms();
    search(within_tree, false, 1, here.within, best);
    if (best != kNobody) return turn(best, false);
    search(borrow_tree, true, 1, here.borrow, best);
    if (best != kNobody) return turn(best, true);
    return std::nullopt;
  }

  void take(Entry& entry) {
    Account& account = accounts[entry.request.tenant];
    if (entry.phase == Phase::held) held.erase(entry.request.id);
    account.queue.erase(place_of(entry));
    --pending;
    entry.phase = Phase::running;
    entry.held_why.clear();
    entry.started_ms = now;
    ++account.running;
    charge(account, entry.request.demand, 1);
    update(entry.request.tenant);
  }

  // Why a request that waits is not admitted now.
  Reason explain(const Entry& entry) const {
    const Request& request = entry.request;
    const std::uint64_t id = request.id;
    const Account& account = accounts[request.tenant];
    const std::string tenant = printable(account.tenant.name);
    Reason out;
    const bool borrows = !within(account, account.usage, request.demand);
    const Rank rank = rank_of(account, request);
    const TenantId* first_other = nullptr;
    TenantId other = 0;
    for (TenantId t = 0; t < accounts.size(); ++t) {
      if (t == request.tenant) continue;
      const Account& a = accounts[t];
      const bool before = borrows ? a.within.any || (a.borrows.any && a.borrows.rank < rank)
                                  : a.within.any && a.within.rank < rank;
      if (!before) continue;
      ++out.behind;
      if (first_other == nullptr) {
        other = t;
        first_other = &other;
      } else {
        const auto better = [&](TenantId x) {
          const Account& candidate = accounts[x];
          return candidate.within.any ? std::pair(0, candidate.within.rank)
                                      : std::pair(1, candidate.borrows.rank);
        };
        if (better(t) < better(other)) other = t;
      }
    }
    const auto turn = next();
    const auto says = [&](Why why, std::string text) {
      out.why = why;
      out.text = std::move(text);
      return out;
    };
    if (turn && turn->request == id)
      return says(Why::goes_next,
                  fmt::format("goes next: tenant {} is at level {:.4f}, the lowest that fits{}", tenant,
                              level_of(account), rank.owed ? ", and it waited long enough to be owed" : ""));
    for (std::size_t r = 0; r < count; ++r) {
      if (request.demand[r] > 0 && account.usage[r] + request.demand[r] > account.tenant.limit[r])
        return says(Why::limit,
                    fmt::format("tenant {} holds {} {} and may hold {}; {} more would pass its limit", tenant,
                                account.usage[r], config.resources[r].name, account.tenant.limit[r],
                                request.demand[r]));
    }
    if (entry.phase == Phase::held)
      return says(Why::held, fmt::format("no place for {}: {}", amount_list(config, request.demand),
                                         entry.held_why.empty() ? "held by the caller" : entry.held_why));
    for (std::size_t r = 0; r < count; ++r) {
      if (request.demand[r] > config.resources[r].capacity)
        return says(Why::capacity,
                    fmt::format("asks for {} {}; there are only {} in all now", request.demand[r],
                                config.resources[r].name, config.resources[r].capacity));
    }
    const Candidate& own = borrows ? account.borrows : account.within;
    if (!own.any || own.rank.id != id) {
      std::uint64_t ahead = 0;
      for (const Place& place : account.queue) {
        if (place.id == id || ahead == kMostCounted) break;
        ++ahead;
      }
      return says(Why::behind_own, fmt::format("{}{} of tenant {} itself {} first: {}",
                                               ahead == kMostCounted ? "at least " : "",
                                               times(ahead, "request"), tenant, ahead == 1 ? "goes" : "go",
                                               own.any ? fmt::format("the next is request {}", own.rank.id)
                                                       : "an older one has waited long enough to be owed"));
    }
    const auto here = rooms();
    const Amounts& all = here.all;
    for (std::size_t r = 0; r < count; ++r) {
      if (request.demand[r] > 0 && request.demand[r] > all[r])
        return says(
            Why::capacity,
            fmt::format("asks for {} {}; {} of {} are free{}", request.demand[r], config.resources[r].name,
                        std::max<std::int64_t>(0, all[r]), config.resources[r].capacity,
                        out.behind == 0 ? ", and it is the first to get them"
                                        : fmt::format(", and candidates of {} go first",
                                                      times(out.behind, "other tenant"))));
    }
    const auto keeps = [&](const State::Room& room) {
      return fmt::format("request {} of tenant {} has waited since {} s ago and keeps {} until it fits",
                         room.kept.rank.id, printable(accounts[*room.keeper].tenant.name),
                         (now - room.kept.rank.enqueued_ms) / 1000, amount_list(config, room.kept.demand));
    };
    if (!fits(request.demand, here.within.rest)) return says(Why::reserved, keeps(here.within));
    if (borrows) {
      if (!fits(request.demand, here.borrow.rest)) return says(Why::reserved, keeps(here.borrow));
      for (std::size_t r = 0; r < count; ++r) {
        if (beyond(account, request.demand, r) <= here.borrow.beside[r]) continue;
        return says(
            Why::borrowing,
            fmt::format(
                "tenant {} holds {} {} of a nominal {}, so {} more would borrow; {} are free and tenants "
                "within their quotas wait for {} of them",
                tenant, account.usage[r], config.resources[r].name, account.tenant.nominal[r],
                request.demand[r], all[r], claims[r] - account.claim[r]));
      }
    }
    if (first_other == nullptr) return says(Why::behind_others, "goes as soon as next() is asked");
    const Account& ahead = accounts[other];
    const Candidate& theirs = ahead.within.any ? ahead.within : ahead.borrows;
    const std::string why =
        theirs.rank.owed && !rank.owed   ? "it has waited long enough to be owed"
        : borrows && ahead.within.any    ? "it stays within its quota, and this one would borrow"
        : theirs.rank.level < rank.level ? fmt::format("it is at level {:.4f} and tenant {} at {:.4f}",
                                                       level_of(ahead), tenant, level_of(account))
                                         : "it came first";
    return says(
        Why::behind_others,
        fmt::format("candidates of {} go first; the next is request {} of tenant {}: {}",
                    times(out.behind, "other tenant"), theirs.rank.id, printable(ahead.tenant.name), why));
  }

  static Place place_of(Entry& entry) {
    return {entry.request.priority, entry.request.enqueued_ms, entry.request.id, &entry};
  }

  // How many of the tenant's parts of the cluster a request would fill.
  double parts(const Account& account, const Amounts& demand) const {
    double most = 0;
    for (std::size_t r = 0; r < count; ++r) {
      const std::int64_t capacity = config.resources[r].capacity;
      if (demand[r] == 0 || capacity == 0) continue;
      most = std::max(most, static_cast<double>(demand[r]) / static_cast<double>(capacity));
    }
    return most * static_cast<double>(weights) / static_cast<double>(account.tenant.weight);
  }

  Status check(const Tenant& tenant) const {
    if (tenant.weight < 1 || tenant.weight > kMostWeight)
      return Error(Errc::invalid, fmt::format("tenant {}: weight {} is not in 1 to {}",
                                              printable(tenant.name), tenant.weight, kMostWeight));
    for (std::size_t r = 0; r < kMostResources; ++r) {
      const std::string what =
          r < count ? printable(config.resources[r].name) : fmt::format("resource {}, which is not there", r);
      if (tenant.nominal[r] < 0 || tenant.nominal[r] > (r < count ? kMostAmount : 0))
        return Error(Errc::invalid, fmt::format("tenant {}: nominal quota {} of {} is not in 0 to {}",
                                                printable(tenant.name), tenant.nominal[r], what,
                                                r < count ? kMostAmount : 0));
      if (tenant.limit[r] < tenant.nominal[r])
        return Error(Errc::invalid,
                     fmt::format("tenant {}: limit {} of {} is below its nominal quota {}",
                                 printable(tenant.name), tenant.limit[r], what, tenant.nominal[r]));
      if (tenant.limit[r] > kMostAmount)
        return Error(Errc::invalid, fmt::format("tenant {}: limit {} of {} is above {}",
                                                printable(tenant.name), tenant.limit[r], what, kMostAmount));
    }
    return ok_status();
  }

  Status check(const Request& request) const {
    const auto bad = [&](std::string why) {
      return Error(Errc::invalid, fmt::format("request {}: {}", request.id, std::move(why)));
    };
    if (request.tenant >= accounts.size()) return bad(fmt::format("there is no tenant {}", request.tenant));
    if (requests.contains(request.id)) return bad("there is one with this id already");
    if (requests.size() >= kMostRequests) return bad(fmt::format("{} are there already", kMostRequests));
    if (request.enqueued_ms < 0 || request.enqueued_ms > kMostTime)
      return bad(fmt::format("enqueued at {} ms is not in 0 to {}", request.enqueued_ms, kMostTime));
    if (request.length_ms < 0 || request.length_ms > kMostTime)
      return bad(fmt::format("a length of {} ms is not in 0 to {}", request.length_ms, kMostTime));
    bool any = false;
    for (std::size_t r = 0; r < kMostResources; ++r) {
      const std::int64_t most = r < count ? kMostAmount : 0;
      if (request.demand[r] < 0 || request.demand[r] > most)
        return bad(
            fmt::format("asks for {} of resource {}, which is not in 0 to {}", request.demand[r], r, most));
      any = any || request.demand[r] > 0;
    }
    if (!any) return bad("asks for nothing");
    return ok_status();
  }
};

Book::Book(std::unique_ptr<State> state) : state_(std::move(state)) {}
Book::~Book() = default;
Book::Book(Book&&) noexcept = default;
Book& Book::operator=(Book&&) noexcept = default;

Result<Book> Book::make(Config config) {
  if (config.resources.empty() || config.resources.size() > kMostResources)
    return Error(Errc::invalid,
                 fmt::format("{} resources; there must be 1 to {}", config.resources.size(), kMostResources));
  for (const auto& resource : config.resources) {
    if (resource.capacity < 0 || resource.capacity > kMostAmount)
      return Error(Errc::invalid, fmt::format("{}: capacity {} is not in 0 to {}", printable(resource.name),
                                              resource.capacity, kMostAmount));
  }
  if (config.half_life_ms < 1 || config.half_life_ms > kMostTime)
    return Error(Errc::invalid,
                 fmt::format("a half-life of {} ms is not in 1 to {}", config.half_life_ms, kMostTime));
  if (config.sample_ms < 1 || config.sample_ms > kMostTime)
    return Error(Errc::invalid,
                 fmt::format("a sample of {} ms is not in 1 to {}", config.sample_ms, kMostTime));
  if (config.patience_ms < 0 || config.patience_ms > kMostTime)
    return Error(Errc::invalid,
                 fmt::format("a patience of {} ms is not in 0 to {}", config.patience_ms, kMostTime));
  if (!(config.past >= 0 && config.past <= 1))
    return Error(Errc::invalid, fmt::format("the weight {} of the past is not in 0 to 1", config.past));
  auto state = std::make_unique<State>();
  state->config = std::move(config);
  state->count = state->config.resources.size();
  return Book(std::move(state));
}

Result<TenantId> Book::add_tenant(Tenant tenant, std::int64_t now_ms) {
  State& s = *state_;
  if (s.accounts.size() >= kMostTenants)
    return Error(Errc::invalid, fmt::format("{} tenants are there already", kMostTenants));
  BH_CHECK(s.check(tenant));
  s.advance(now_ms);
  Account account;
  account.tenant = std::move(tenant);
  account.settled_ms = s.now;
  account.alone_until_ms = static_cast<double>(s.now);
  s.weights += account.tenant.weight;
  s.accounts.push_back(std::move(account));
  const auto id = static_cast<TenantId>(s.accounts.size() - 1);
  if (s.accounts.size() > s.leaves) {
    s.rebuild();
  } else {
    s.update(id);
  }
  return id;
}

Status Book::change_tenant(TenantId id, Tenant tenant, std::int64_t now_ms) {
  State& s = *state_;
  if (id >= s.accounts.size()) return Error(Errc::not_found, fmt::format("there is no tenant {}", id));
  BH_CHECK(s.check(tenant));
  s.advance(now_ms);
  Account& account = s.accounts[id];
  s.settle(account, s.now);
  s.weights = s.weights - account.tenant.weight + tenant.weight;
  account.tenant = std::move(tenant);
  s.update(id);
  return ok_status();
}

Status Book::set_capacity(std::size_t resource, std::int64_t capacity, std::int64_t now_ms) {
  State& s = *state_;
  if (resource >= s.count) return Error(Errc::not_found, fmt::format("there is no resource {}", resource));
  if (capacity < 0 || capacity > kMostAmount)
    return Error(Errc::invalid,
                 fmt::format("{}: capacity {} is not in 0 to {}",
                             printable(s.config.resources[resource].name), capacity, kMostAmount));
  s.advance(now_ms);
  for (auto& account : s.accounts) s.settle(account, s.now);
  s.config.resources[resource].capacity = capacity;
  for (TenantId id = 0; id < s.accounts.size(); ++id) {
    s.find_share(s.accounts[id]);
    s.look(id);
  }
  s.rebuild();
  return ok_status();
}

Status Book::submit(const Request& request, std::int64_t now_ms) {
  State& s = *state_;
  BH_CHECK(s.check(request));
  Account& account = s.accounts[request.tenant];
  for (std::size_t r = 0; r < s.count; ++r) {
    const auto& resource = s.config.resources[r];
    if (request.demand[r] > resource.capacity)
      return Error(Errc::no_capacity,
                   fmt::format("request {}: asks for {} {}; there are {} in all", request.id,
                               request.demand[r], resource.name, resource.capacity));
    if (request.demand[r] > account.tenant.limit[r])
      return Error(Errc::no_capacity, fmt::format("request {}: asks for {} {}; the limit of tenant {} is {}",
                                                  request.id, request.demand[r], resource.name,
                                                  printable(account.tenant.name), account.tenant.limit[r]));
  }
  s.advance(now_ms);
  Entry& entry = s.requests[request.id];
  entry.request = request;
  account.queue.insert(State::place_of(entry));
  ++s.pending;
  s.update(request.tenant);
  return ok_status();
}

Status Book::adopt(const Request& request, std::int64_t now_ms) {
  State& s = *state_;
  BH_CHECK(s.check(request));
  Account& account = s.accounts[request.tenant];
  for (std::size_t r = 0; r < s.count; ++r) {  // keeps sums far from overflow
    if (s.used[r] + request.demand[r] > 16 * kMostAmount)
      return Error(Errc::invalid, fmt::format("request {}: {} {} would be in use", request.id,
                                              s.used[r] + request.demand[r], s.config.resources[r].name));
  }
  s.advance(now_ms);
  Entry& entry = s.requests[request.id];
  entry.request = request;
  entry.phase = Phase::running;
  entry.started_ms = s.now;
  ++account.running;
  s.charge(account, request.demand, 1);
  s.update(request.tenant);
  return ok_status();
}

namespace {
Error no_such(std::uint64_t id, std::string_view what) {
  return Error(Errc::not_found, fmt::format("request {}: no {} request has this id", id, what));
}
}  // namespace

Status Book::withdraw(std::uint64_t id, std::int64_t now_ms) {
  State& s = *state_;
  const auto found = s.requests.find(id);
  if (found == s.requests.end() || found->second.phase == Phase::running) return no_such(id, "pending");
  s.advance(now_ms);
  Entry& entry = found->second;
  const TenantId tenant = entry.request.tenant;
  s.accounts[tenant].queue.erase(State::place_of(entry));
  s.held.erase(id);
  s.requests.erase(found);
  --s.pending;
  s.update(tenant);
  return ok_status();
}

Status Book::hold(std::uint64_t id, std::string why, std::int64_t now_ms) {
  State& s = *state_;
  const auto found = s.requests.find(id);
  if (found == s.requests.end() || found->second.phase == Phase::running) return no_such(id, "pending");
  s.advance(now_ms);
  found->second.phase = Phase::held;
  found->second.held_why = std::move(why);
  s.held.insert(id);
  s.update(found->second.request.tenant);
  return ok_status();
}

void Book::retry(std::int64_t now_ms) {
  State& s = *state_;
  s.advance(now_ms);
  std::set<TenantId> touched;
  for (const auto id : s.held) {
    Entry& entry = s.requests.at(id);
    entry.phase = Phase::pending;
    entry.held_why.clear();
    touched.insert(entry.request.tenant);
  }
  s.held.clear();
  for (const auto id : touched) s.update(id);
}

std::optional<Turn> Book::next(std::int64_t now_ms) {
  state_->advance(now_ms);
  return state_->next();
}

Status Book::admit(std::uint64_t id, std::int64_t now_ms) {
  State& s = *state_;
  const auto found = s.requests.find(id);
  if (found == s.requests.end() || found->second.phase == Phase::running) return no_such(id, "pending");
  s.advance(now_ms);
  Entry& entry = found->second;
  const Account& account = s.accounts[entry.request.tenant];
  const Amounts room = s.available();
  for (std::size_t r = 0; r < s.count; ++r) {
    const std::int64_t asks = entry.request.demand[r];
    if (asks == 0) continue;
    if (asks > room[r])
      return Error(Errc::no_capacity,
                   fmt::format("request {}: asks for {} {}; {} are free", id, asks,
                               s.config.resources[r].name, std::max<std::int64_t>(0, room[r])));
    if (account.usage[r] + asks > account.tenant.limit[r])
      return Error(Errc::no_capacity,
                   fmt::format("request {}: asks for {} {}; tenant {} holds {} of at most {}", id, asks,
                               s.config.resources[r].name, printable(account.tenant.name), account.usage[r],
                               account.tenant.limit[r]));
  }
  s.take(entry);
  return ok_status();
}

Status Book::finish(std::uint64_t id, std::int64_t now_ms) {
  State& s = *state_;
  const auto found = s.requests.find(id);
  if (found == s.requests.end() || found->second.phase != Phase::running) return no_such(id, "running");
  s.advance(now_ms);
  const Entry& entry = found->second;
  const TenantId tenant = entry.request.tenant;
  Account& account = s.accounts[tenant];
  const auto length = static_cast<double>(s.now - entry.started_ms);
  const double parts = s.parts(account, entry.request.demand);
  const auto enqueued = static_cast<double>(entry.request.enqueued_ms);
  account.alone_until_ms = std::max(account.alone_until_ms, enqueued) + length * parts;
  const double alone = std::max(account.alone_until_ms - enqueued, length * std::max(1.0, parts));
  const double shared = static_cast<double>(std::max<std::int64_t>(0, s.now - entry.request.enqueued_ms));
  const double rho = alone > 0 ? shared / alone : 1;
  ++account.finished;
  account.rho_sum += rho;
  if (rho > account.worst_rho) {
    account.worst_rho = rho;
    account.worst_request = id;
  }
  --account.running;
  s.charge(account, entry.request.demand, -1);
  s.requests.erase(found);
  s.update(tenant);
  return ok_status();
}

std::vector<Turn> Book::order(std::int64_t now_ms, std::size_t most) const {
  State copy = *state_;
  copy.advance(now_ms);
  std::vector<Turn> out;
  while (out.size() < most) {
    const auto turn = copy.next();
    if (!turn) break;
    out.push_back(*turn);
    copy.take(copy.requests.at(turn->request));
  }
  return out;
}

Result<Reason> Book::explain(std::uint64_t id, std::int64_t now_ms) const {
  const auto known = state_->requests.find(id);
  if (known == state_->requests.end() || known->second.phase == Phase::running) return no_such(id, "pending");
  State s = *state_;
  s.advance(now_ms);
  return s.explain(s.requests.at(id));
}

Result<Waiting> Book::waits(std::uint64_t id, std::int64_t now_ms) {
  State& s = *state_;
  const auto known = s.requests.find(id);
  if (known == s.requests.end() || known->second.phase == Phase::running) return no_such(id, "pending");
  s.advance(now_ms);
  const Entry& entry = known->second;
  const Account& account = s.accounts[entry.request.tenant];
  Waiting out{
      .why = s.explain(entry).why, .held = entry.held_why, .own = account.queue.size(), .pending = s.pending};
  for (const Place& place : account.queue) {
    if (place.id == id || out.ahead == kMostCounted) break;
    ++out.ahead;
  }
  const bool within = s.within(account, account.usage, entry.request.demand);
  const Rank rank = s.rank_of(account, entry.request);
  for (TenantId t = 0; t < s.accounts.size(); ++t) {
    const Account& other = s.accounts[t];
    if (t == entry.request.tenant || other.queue.empty()) continue;
    const Request& first = other.queue.begin()->entry->request;
    const bool inside = s.within(other, other.usage, first.demand);
    if (inside != within ? inside : s.rank_of(other, first) < rank) ++out.tenants_ahead;
  }
  return out;
}

double Book::past(TenantId tenant, std::int64_t now_ms) const {
  if (tenant >= state_->accounts.size()) return 0;
  const Account& account = state_->accounts[tenant];
  const std::int64_t dt = std::clamp(now_ms, state_->now, kMostTime) - account.settled_ms;
  return account.share + (account.past - account.share) * decay(dt, state_->config.half_life_ms);
}

Status Book::set_past(TenantId tenant, double past, std::int64_t at_ms, std::int64_t now_ms) {
  State& s = *state_;
  if (tenant >= s.accounts.size())
    return Error(Errc::not_found, fmt::format("there is no tenant {}", tenant));
  if (!(past >= 0 && past <= kMostPast))
    return Error(Errc::invalid, fmt::format("a past of {} is not in 0 to {}", past, kMostPast));
  s.advance(now_ms);
  Account& account = s.accounts[tenant];
  s.settle(account, s.now);
  account.past =
      account.share + (past - account.share) *
                          decay(s.now - std::clamp<std::int64_t>(at_ms, 0, s.now), s.config.half_life_ms);
  s.update(tenant);
  return ok_status();
}

Report Book::report(std::int64_t now_ms) const {
  const State& s = *state_;
  const std::int64_t now = std::clamp(now_ms, s.now, kMostTime);
  Report out;
  std::vector<double> waiting(s.accounts.size(), 0);
  std::vector<std::uint64_t> pending(s.accounts.size(), 0);
  for (std::size_t id = 0; id < s.accounts.size(); ++id) {
    const Account& account = s.accounts[id];
    pending[id] = account.queue.size();
    for (const Place& place : account.queue) {
      const Request& request = place.entry->request;
      if (request.length_ms == 0) continue;
      const auto length = static_cast<double>(request.length_ms);
      const double alone = length * std::max(1.0, s.parts(account, request.demand));
      const double waited = static_cast<double>(std::max<std::int64_t>(0, now - request.enqueued_ms));
      waiting[id] = std::max(waiting[id], (waited + length) / alone);
    }
  }
  double sum = 0;
  std::uint64_t finished = 0;
  for (std::size_t id = 0; id < s.accounts.size(); ++id) {
    Account account = s.accounts[id];
    const double level = s.level_of(account);  // the one that orders: as of the last sample or change
    s.settle(account, now);
    TenantFigures figures{.tenant = static_cast<TenantId>(id),
                          .name = account.tenant.name,
                          .weight = account.tenant.weight,
                          .share = account.share,
                          .past = account.past,
                          .level = level,
                          .share_seconds = account.share_seconds,
                          .pending = pending[id],
                          .running = account.running,
                          .finished = account.finished,
                          .worst_rho = account.worst_rho,
                          .worst_request = account.worst_request,
                          .waiting_rho = waiting[id]};
    if (account.dominant < s.count) figures.dominant = s.config.resources[account.dominant].name;
    if (account.finished > 0) figures.mean_rho = account.rho_sum / static_cast<double>(account.finished);
    sum += account.rho_sum;
    finished += account.finished;
    if (account.finished > 0 && (!out.worst || account.worst_rho > out.worst_rho)) {
      out.worst = figures.tenant;
      out.worst_rho = account.worst_rho;
    }
    out.tenants.push_back(std::move(figures));
  }
  if (finished > 0) out.mean_rho = sum / static_cast<double>(finished);
  return out;
}

std::size_t Book::pending() const { return state_->pending; }
std::size_t Book::running() const { return state_->requests.size() - state_->pending; }
std::int64_t Book::free(std::size_t resource) const {
  return resource < state_->count ? state_->available()[resource] : 0;
}
std::int64_t Book::usage(TenantId tenant, std::size_t resource) const {
  return tenant < state_->accounts.size() && resource < kMostResources
             ? state_->accounts[tenant].usage[resource]
             : 0;
}

}  // namespace bulkhead::fairness
