// What a start finds: the book, the host, and what a daemon that was killed left between the two.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <algorithm>

#include <fmt/format.h>

#include "base/text.hpp"
#include "engine/control/inside.hpp"

namespace bulkhead::control {

namespace {

// Scrubs wait for their graces beside each other, however few of them work at a time (closer_turns).
constexpr unsigned change_lanes = 1, round_lanes = 64;

Error record_error(Error error, std::string_view what) {
  return std::move(error).in(what).with_hint("stop the daemon and bring the last good copy of book.db back");
}

}  // namespace

Status Control::Inside::open() {
  if (settings.state.empty()) return Error(Errc::invalid, "no state directory", "set BULKHEAD_STATE");
  std::error_code failed;
  std::filesystem::create_directories(settings.state, failed);
  if (failed) return errno_error("make " + settings.state.string(), failed.value());
  const auto file = settings.state / "serve.lock";
  lock = UniqueFd(::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!lock) return errno_error("open " + file.string(), errno);
  // Two loops on one book would grant the same slice twice.
  if (::flock(lock.get(), LOCK_EX | LOCK_NB) != 0)
    return Error(Errc::in_use, fmt::format("another bulkhead serve has {}", settings.state.string()),
                 "stop it first: systemctl stop bulkhead");
  BH_TRY(book, book::Book::open(settings.state, book::Book::Access::read_write));
  hands = {.access = settings.access,
           .grace = settings.grace,
           .lock_wait = settings.lock_wait,
           .cdi = settings.cdi};
  if (hands.access.state_dir.empty()) hands.access.state_dir = settings.state;
  if (!settings.node_file.empty()) {
    BH_CHECK(read_node_file());
  }
  changes = std::make_unique<Lane>(change_lanes);
  rounds = std::make_unique<Lane>(round_lanes);
  sweeps = std::make_unique<Lane>(change_lanes);
  files = std::make_unique<Lane>(change_lanes);
  return ok_status();
}

Status Control::Inside::read_node_file() {
  BH_TRY(const auto text, read_file(settings.node_file, limits::node_file_bytes));
  auto parsed = spec::parse(text);
  if (const auto* mistakes = std::get_if<std::vector<spec::Mistake>>(&parsed))
    return Error(Errc::invalid, spec::render(*mistakes, settings.node_file.string()));
  node = std::move(std::get<spec::NodeFile>(parsed));
  return ok_status();
}

Status Control::Inside::load() {
  at_now = now_wall();
  BH_TRY(const auto tenants, book->tenants());
  for (const auto& record : tenants) {
    auto tenant = tenant::parse_tenant(record.body);
    if (!tenant.ok()) return record_error(std::move(tenant).error(), "tenant " + record.name);
    live.tenants[record.name] = std::make_shared<const tenant::Tenant>(std::move(*tenant));
    BH_TRY(const Json use, book->setting("use/" + record.name));
    if (use.is_object()) {
      used[record.name] = {.month = use.value("month", std::int64_t{0}),
                           .milli_ms = use.value("milliMs", std::uint64_t{0}),
                           .at = WallTime(std::chrono::milliseconds(use.value("at", std::int64_t{0})))};
      // Of an older daemon it is not there: then there was no past.
      const auto past = use.find("past"), at = use.find("pastAt");
      if (past != use.end() && past->is_number() && at != use.end() && at->is_number_integer()) {
        used[record.name].past = past->get<double>();
        used[record.name].past_at = WallTime(std::chrono::milliseconds(at->get<std::int64_t>()));
      }
    }
  }
  BH_TRY(const auto kept, book->tokens());
  for (const auto& token : kept) {
    tokens.by_id[token.id] = token;
    if (!token.certificate.empty() && !token.revoked) tokens.by_certificate[token.certificate] = token.id;
  }
  publish_tokens();
  BH_TRY(const Json draining, book->setting("draining"));
  live.draining = draining.is_boolean() && draining.get<bool>();
  BH_TRY(const Json kept_cordons, book->setting("cordons"));
  if (kept_cordons.is_object())
    for (const auto& [uuid, one] : kept_cordons.items())
      if (one.is_object())
        cordons[uuid] = {.why = one.value("why", std::string()),
                         .by = one.value("by", std::string()),
                         .since = WallTime(std::chrono::milliseconds(one.value("since", std::int64_t{0})))};
  BH_TRY(last_lease, book->last_lease_id());
  BH_TRY(live.last_event, book->last_audit_id());

  BH_TRY(const auto records, book->leases(false));
  for (const auto& record : records) {
    auto lease = lease::parse(record.body);
    if (!lease.ok()) return record_error(std::move(lease).error(), lease_name(record.id));
    const auto shared = std::make_shared<const lease::Lease>(std::move(*lease));
    live.leases.put(record.id, shared);
    entries[record.id] = Entry{.lease = shared, .amount = {.leases = 1}};
  }
  BH_TRY(const auto page, book->leases_page(std::numeric_limits<std::int64_t>::max(), most_over));
  for (const auto& record : page) {
    auto lease = lease::parse(record.body);
    if (!lease.ok()) return record_error(std::move(lease).error(), lease_name(record.id));
    if (!lease::over(lease->state)) continue;
    live.leases.put(record.id, std::make_shared<const lease::Lease>(std::move(*lease)));
    over.push_front(record.id);
  }
  return ok_status();
}

Status Control::Inside::first_look() {
  auto seen = sight(true, {});
  // The entries as loaded have no index yet: put in one by one, as they would come.
  auto loaded = std::exchange(entries, {});
  host_seen = false;
  reload = true;
  for (auto& [id, entry] : loaded) {
    if (lease::holds(entry.lease->state)) {
      for (const auto& gpu : seen.host ? seen.host->gpus : std::vector<inventory::Gpu>{}) {
        if (entry.lease->parts.empty() || gpu.uuid != entry.lease->parts.front().gpu) continue;
        entry.amount = amount_of(
            entry.lease->ask,
            {.geometry = gpu.geometry, .memory_mib = static_cast<std::int64_t>(to_mebibytes(gpu.memory))},
            gpu.power.limit ? gpu.power.limit->count / 1000 : 0);
      }
    }
    // What was on the clock since the last line was held all the while.
    const auto use = used.find(entry.lease->tenant);
    at_now = use == used.end() ? at_now : use->second.at;
    apply_entry(id, std::move(entry));
    at_now = now_wall();
  }
  first_casualties = refresh(seen);
  if (!fair) submit_all();
  return ok_status();
}

// Instances of nobody that lie across the place of a part.
void Control::Inside::in_the_way(const lease::Part& part, std::vector<slice::Place>& out) {
  const auto* facts = facts_of(part.gpu);
  const auto* profile = facts == nullptr ? nullptr : facts->geometry.by_name(part.profile);
  if (profile == nullptr || facts->pool != placement::Pool::dynamic) return;
  const mig::Placement place{*part.start, profile->size};
  for (const auto& [key, device] : devices) {
    const auto* its = key.gpu == part.gpu.text ? facts->geometry.by_name(key.profile) : nullptr;
    if (its == nullptr || (key.profile == part.profile && key.start == *part.start)) continue;
    if (!place.overlaps({key.start, its->size}) || foreign.contains(key)) continue;
    if (std::find(out.begin(), out.end(), device.place) == out.end()) out.push_back(device.place);
  }
}

// The same places again: what stands there already is taken for made. A kill, or a change by others, may have
// left instances across them.
void Control::Inside::prepare_again(Turn& turn, std::int64_t id) {
  slice::Change change;
  for (const auto& part : entries.at(id).lease->parts) {
    if (!part.start) continue;
    change.create.push_back({.gpu = part.gpu, .profile = part.profile, .start = *part.start});
    in_the_way(part, change.destroy);
  }
  std::erase_if(change.destroy, [&](const slice::Place& place) {
    return std::find(change.create.begin(), change.create.end(), place) != change.create.end();
  });
  prepare(turn, id, std::move(change));
}

// In the loop's first batch.
void Control::Inside::resume() {
  later({.run =
             [this](Turn& turn) {
               for (const auto& one : first_casualties) lose(turn, one);
               std::vector<std::int64_t> ids;
               for (const auto& [id, entry] : entries) ids.push_back(id);
               for (const auto id : ids) {
                 const auto at = entries.find(id);
                 if (at == entries.end() || at->second.at_work) continue;
                 const auto lease = at->second.lease;
                 if (lease->state == lease::State::active) tell_runtimes(turn, lease);
                 if (lease->state == lease::State::releasing) scrub(turn, id);
                 if (lease->state != lease::State::preparing) continue;
                 prepare_again(turn, id);
               }
             },
         .ours = true});
  publish(Turn{.now = now_wall()});
}

}  // namespace bulkhead::control
