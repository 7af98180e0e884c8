// The life of leases: asked for, granted, renewed, ended.
#include <algorithm>
#include <iterator>
#include <utility>

#include <fmt/format.h>

#include "base/text.hpp"
#include "engine/control/inside.hpp"

namespace bulkhead::control {

namespace {

using access::Resource;
using access::Verb;
using lease::State;

constexpr std::size_t reason_bytes = 1000, most_ways = 8;
constexpr std::size_t most_victims = 256, most_looked_at = 1000;
constexpr std::chrono::seconds look_again{5}, try_again{1};
constexpr unsigned most_tries = 5;
constexpr std::size_t reclaims_in_turn = 4;
constexpr std::size_t most_in_sweep = 512;
constexpr std::chrono::nanoseconds most_rest = std::chrono::milliseconds(20);

std::int64_t ms_of(WallTime time) { return time.time_since_epoch().count(); }

// The parts that say what a lease is on; those of a refused preparation say nothing.
std::string short_text(std::string text) {
  if (text.size() > reason_bytes) text.resize(reason_bytes);
  return printable(text, reason_bytes);
}

std::string list_of(const std::vector<std::int64_t>& ids) {
  std::string out = ids.size() == 1 ? "lease " : "leases ";
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (i > 0) out += i + 1 == ids.size() ? " and " : ", ";
    out += std::to_string(ids[i]);
  }
  return out;
}

}  // namespace

std::string short_time(WallTime time) {
  const std::string full = rfc3339(time);
  return full.size() > 20 ? full.substr(0, 19) + "Z" : full;
}
std::string lease_name(std::int64_t id) { return fmt::format("lease/{}", id); }

// ---- bookkeeping
void Control::Inside::apply_entry(std::int64_t id, std::optional<Entry> next) {
  const auto moments = [&](const Entry& entry, auto&& each) {
    const auto& lease = *entry.lease;
    if (lease.state == State::active && lease.expires) each(*lease.expires);
    if (lease.state == State::active && lease.notice) each(*lease.notice);
    if ((lease.state == State::queued || lease.state == State::preparing) && lease.ask.deadline)
      each(*lease.ask.deadline);
    if (entry.again) each(*entry.again);
  };
  const auto on = [&](const Entry& entry, auto&& each) {
    if (entry.placement == placement::no_placement) return;
    for (const auto& part : entry.lease->parts)
      if (const auto number = engine.find_gpu(part.gpu.text)) each(*number);
  };
  const auto old = entries.find(id);
  const std::string tenant = old != entries.end() ? old->second.lease->tenant
                             : next               ? next->lease->tenant
                                                  : std::string();
  if (tenant.empty()) return;
  const auto index = [&](const Entry& entry, bool in) {
    const auto put = [&](std::set<std::int64_t>& set, bool belongs) {
      if (in && belongs)
        set.insert(id);
      else
        set.erase(id);
    };
    put(preemptors, entry.preempts && entry.pending);
    put(noticed, entry.preempts_for != 0);
    put(preemptible, entry.lease->state == State::active && entry.lease->ask.preemptible);
    put(of_tenant[tenant], true);
  };
  used[tenant] = settled(tenant, at_now);
  auto& holding = live.held[tenant];
  if (old != entries.end()) {
    moments(old->second, [&](WallTime at) { alarms.erase({at, id}); });
    on(old->second, [&](placement::GpuNo number) { leases_on[number].erase(id), dirty.insert(number); });
    if (old->second.placement != placement::no_placement) lease_of.erase(old->second.placement);
    holding = holding - old->second.amount;
    index(old->second, false);
  }
  if (next) {
    moments(*next, [&](WallTime at) { alarms.emplace(at, id); });
    on(*next, [&](placement::GpuNo number) { leases_on[number].insert(id), dirty.insert(number); });
    if (next->placement != placement::no_placement) lease_of[next->placement] = id;
    holding = holding + next->amount;
    index(*next, true);
    entries[id] = std::move(*next);
  } else if (old != entries.end()) {
    entries.erase(old);
  }
  if (holding == tenant::Amount{}) live.held.erase(tenant);
  if (of_tenant[tenant].empty()) of_tenant.erase(tenant);
}

void Control::Inside::set_entry(Turn& turn, std::int64_t id, std::optional<Entry> next) {
  const auto old = entries.find(id);
  std::optional<Entry> was;
  if (old != entries.end()) was = old->second;
  const std::string tenant = was ? was->lease->tenant : next ? next->lease->tenant : "";
  const auto milli = [](const std::optional<Entry>& entry) { return entry ? entry->amount.gpu_milli : 0; };
  const bool metered = milli(was) != milli(next);
  turn.undo.push_back([this, id, was = std::move(was)] { apply_entry(id, was); });
  apply_entry(id, std::move(next));
  if (metered) write_use(turn, tenant);
}

void Control::Inside::show(Turn& turn, std::int64_t id, std::shared_ptr<const lease::Lease> lease) {
  const auto old = live.leases.find(id);
  turn.undo.push_back([this, id, was = old == live.leases.end() ? nullptr : old->second] {
    if (was)
      live.leases.put(id, was);
    else
      live.leases.erase(id);
  });
  live.leases.put(id, std::move(lease));
}

void Control::Inside::write(Turn& turn, const Caller& who, const std::string& verb, std::int64_t id,
                            Entry next) {
  const auto lease = next.lease;
  Json body = lease::to_json(*lease);
  // The last word of a batch on a lease is the one that counts.
  std::erase_if(turn.batch.leases, [&](const book::Record& record) { return record.id == id; });
  if (!verb.empty()) note(turn, who, verb, lease_name(id), lease->tenant, "done", body);
  turn.batch.leases.push_back({.id = id, .body = std::move(body)});
  show(turn, id, lease);
  if (lease::over(lease->state)) {
    set_entry(turn, id, std::nullopt);
    turn.after.push_back([this, id] {
      over.push_back(id);
      while (over.size() > most_over) {
        live.leases.erase(over.front());
        over.pop_front();
      }
    });
  } else {
    set_entry(turn, id, std::move(next));
  }
}

// What it holds of the host and of its tenant's turns goes back.
void Control::Inside::let_go(Turn& turn, std::int64_t id, Entry& entry) {
  const auto now = ms_of(turn.now);
  if (entry.placement != placement::no_placement) {
    // A look that began before this saw the lease's own processes.
    for (const auto& part : entry.lease->parts)
      if (auto* facts = facts_of(part.gpu)) ++facts->epoch;
    (void)engine.release(entry.placement);
    entry.placement = placement::no_placement;
    retry_queue = true;
  }
  if (entry.running) (void)fair->finish(static_cast<std::uint64_t>(id), now);
  if (entry.pending) (void)fair->withdraw(static_cast<std::uint64_t>(id), now);
  entry.running = entry.pending = false;
  entry.amount = {};
}

void Control::Inside::step(Turn& turn, const Caller& who, std::int64_t id, lease::Event event,
                           std::string reason) {
  Entry entry = entries.at(id);
  lease::Lease lease = *entry.lease;
  const auto to = lease::next(lease.state, event);
  if (!to) return;  // it means nothing any more
  const bool held = lease::holds(lease.state);
  lease.state = *to;
  ++lease.version;
  if (!reason.empty() || event == lease::Event::ready) lease.reason = short_text(std::move(reason));
  if (*to != State::queued) lease.ways.clear();
  if (*to == State::active) {
    lease.active_since = turn.now;
    lease.expires = turn.now + lease.ask.ttl;
  }
  if (*to != State::active) lease.notice.reset();
  if (*to == State::releasing || lease::over(*to)) {
    if (!lease.ended) lease.ended = turn.now;
    entry.again.reset();
    if (entry.preempts) withdraw_notices(turn, id);
    entry.preempts = false;
  }
  if (*to == State::queued) {
    lease.parts.clear();
    if (held) let_go(turn, id, entry);
    entry.amount = {.leases = 1};
  }
  if (lease::over(*to)) let_go(turn, id, entry);
  entry.lease = std::make_shared<const lease::Lease>(std::move(lease));
  write(turn, who, std::string(name_of(event)), id, std::move(entry));
}

// ---- asking
std::optional<Refusal> Control::Inside::find_lease(const Caller& caller, Verb verb, std::int64_t id,
                                                   std::optional<std::int64_t> version,
                                                   std::shared_ptr<const lease::Lease>& found) const {
  const auto at = live.leases.find(id);
  const bool there = at != live.leases.end();
  const std::string what = fmt::format("lease {}", id);
  // One that is not there looks as one of another tenant does.
  if (auto no = denied(caller, {verb, Resource::leases}, there ? at->second->tenant : "", what)) return no;
  if (!there) return Refusal{.why = Denied::not_found, .what = fmt::format("there is no {}", what)};
  if (version && *version != at->second->version)
    return Refusal{.why = Denied::conflict,
                   .what = fmt::format("{} has version {}, not {}: it was changed meanwhile", what,
                                       at->second->version, *version)};
  found = at->second;
  return std::nullopt;
}

std::optional<Refusal> Control::Inside::beyond_quota(const std::string& tenant, const tenant::Amount& held,
                                                     const tenant::Amount& more, WallTime now) const {
  const auto record = live.tenants.find(tenant);
  if (record == live.tenants.end()) return std::nullopt;
  auto reasons = tenant::beyond(record->second->quota, held, more, gpu_seconds(tenant, now));
  if (reasons.empty()) return std::nullopt;
  Refusal refusal{.why = Denied::quota,
                  .what = fmt::format("it is beyond the quota of tenant {}", tenant),
                  .reasons = std::move(reasons)};
  // What of its own would have to end first.
  const lease::Lease* first = nullptr;
  if (const auto its = of_tenant.find(tenant); its != of_tenant.end()) {
    std::size_t seen = 0;
    for (const auto id : its->second) {
      if (++seen > most_looked_at) break;
      const auto& lease = *entries.at(id).lease;
      if (lease.state != State::active || !lease.expires) continue;
      if (first == nullptr || *lease.expires < *first->expires) first = &lease;
    }
  }
  if (first != nullptr)
    refusal.ways.push_back(
        fmt::format("its lease {} ends at {}; or release one", first->id, short_time(*first->expires)));
  refusal.ways.push_back(fmt::format("an operator may raise the quota: bulkhead quota set {}", tenant));
  return refusal;
}

std::optional<Refusal> Control::Inside::may_create(const Turn& turn, const Caller& caller,
                                                   const lease::Ask& ask) const {
  const auto record = live.tenants.find(caller.tenant);
  if (record == live.tenants.end())
    return Refusal{.why = Denied::forbidden,
                   .what = fmt::format("there is no tenant {} any more", printable(caller.tenant, 80))};
  if (record->second->suspended)
    return Refusal{.why = Denied::forbidden,
                   .what = fmt::format("tenant {} is suspended: it keeps what it has and gets nothing new",
                                       caller.tenant)};
  if (live.draining)
    return Refusal{.why = Denied::unavailable,
                   .what = "the host is draining: nothing new is granted",
                   .ways = {"try again when an operator has ended the drain"}};
  if (!host_seen)
    return Refusal{.why = Denied::unavailable, .what = trouble_for(caller), .ways = {"bulkhead doctor"}};
  if (ask.priority > 0 && caller.role == access::Role::tenant)
    return Refusal{.why = Denied::forbidden, .what = "priority: above 0 only an operator may ask"};
  if (ask.count < 1 || ask.count > lease::most_parts || ask.ttl < lease::shortest || ask.ttl > lease::longest)
    return Refusal{.why = Denied::invalid, .what = "count or ttlSeconds is out of bounds"};
  if (ask.deadline && *ask.deadline <= turn.now)
    return Refusal{.why = Denied::invalid,
                   .what = fmt::format("deadline: {} is over already", short_time(*ask.deadline))};
  if (entries.size() >= settings.most_leases)
    return Refusal{.why = Denied::too_many,
                   .what = fmt::format("there are {} leases, the most of this host", entries.size())};
  return std::nullopt;
}

std::vector<std::string> Control::Inside::ways_of(const placement::Refusal& refusal) {
  std::vector<std::string> out;
  for (const auto& way : refusal.ways) {
    if (out.size() == most_ways) break;
    std::vector<std::int64_t> ids;
    bool known = true;
    for (const auto id : way.gone) {
      const auto its = lease_of.find(id);
      known = known && its != lease_of.end();
      if (known) ids.push_back(its->second);
    }
    std::sort(ids.begin(), ids.end());
    switch (way.kind) {
      case placement::WayKind::ends:
        if (!known || ids.empty() || !way.at) break;
        out.push_back(fmt::format("fits after {} {} at {}", list_of(ids), ids.size() == 1 ? "ends" : "end",
                                  short_time(WallTime(std::chrono::milliseconds(*way.at)))));
        break;
      case placement::WayKind::evict:
      case placement::WayKind::moves:
        break;  // preempt_for tries what may be preempted; leases are not moved
      case placement::WayKind::smaller:
      case placement::WayKind::other_class:
      case placement::WayKind::without: {
        // The engine knows less than we do: a GPU cut on demand serves class mig alone.
        if (!way.instead) break;
        auto instead = *way.instead;
        if (instead.models.empty()) instead.models = models_for(instead.cls, {});
        if (engine.find(instead)) out.push_back(printable(way.text, reason_bytes));
        break;
      }
    }
  }
  return out;
}

Refusal Control::Inside::no_room(const lease::Ask& ask, const std::string& tenant, WallTime now) {
  Refusal refusal{.why = Denied::no_room, .what = "there is no room for it now"};
  if (nothing_serves(ask)) {
    refusal.what = "this host cannot serve it";
    refusal.reasons.push_back(
        ask.models.empty()
            ? fmt::format("no GPU of this host is in a pool for class {}", lease::name_of(ask.cls))
            : fmt::format("no GPU of this host for class {} is named like {}", lease::name_of(ask.cls),
                          join(ask.models, " or ")));
    return refusal;
  }
  const auto request = request_of(ask, tenant);
  auto decided = engine.decide(request);
  if (!decided.ok()) {
    refusal.why = Denied::invalid;
    refusal.what = decided.error().message();
    return refusal;
  }
  if (const auto* why = std::get_if<placement::Refusal>(&*decided)) {
    for (const auto& reason : why->reasons) {
      if (refusal.reasons.size() == most_ways) break;
      // The engine shuts GPUs cut on demand out of the other classes by their model.
      if (reason.why == placement::Why::model && ask.models.empty())
        refusal.reasons.push_back(fmt::format("{} of {} GPUs: cut on demand, for class mig alone",
                                              why->gpus[static_cast<std::size_t>(placement::Why::model)],
                                              gpus.size()));
      else
        refusal.reasons.push_back(printable(reason.text, reason_bytes));
    }
    refusal.ways = ways_of(*why);
    for (const auto& gpu : gpus)
      if (!gpu.why.empty() && refusal.reasons.size() < most_ways)
        refusal.reasons.push_back(fmt::format("gpu {}: {}", gpu.index, gpu.why));
    lease::Lease would{.tenant = tenant, .ask = ask, .created = now};
    if (const auto victims = victims_for(would); !victims.empty())
      refusal.ways.push_back(fmt::format("fits when {} {} preempted: ask with wait", list_of(victims),
                                         victims.size() == 1 ? "is" : "are"));
  } else {
    refusal.what = "there is room, but others who wait come first";
    refusal.reasons.push_back(
        fmt::format("{} request{} wait for what is free", fair->pending(), fair->pending() == 1 ? "" : "s"));
  }
  if (!ask.wait) refusal.ways.push_back("ask with wait to be queued");
  return refusal;
}

void Control::Inside::create(Turn& turn, const Caller& caller, const lease::Ask& ask, const Once& once,
                             const Then<lease::Lease>& then) {
  const auto refuse = [&](Refusal refusal) {
    note_refusal(turn, caller, "create", "lease", refusal, caller.tenant);
    turn.after.push_back([then, refusal = std::move(refusal)] { then(refusal); });
  };
  if (caller.tenant.empty())
    return refuse({.why = Denied::invalid, .what = "tenant: is missing: a lease belongs to a tenant"});
  if (auto no = denied(caller, {Verb::create, Resource::leases}, caller.tenant, "lease"))
    return refuse(std::move(*no));

  book::Key key;
  if (auto before = said_before(turn, caller, once, key)) {
    if (auto* no = std::get_if<Refusal>(&*before)) return refuse(std::move(*no));
    auto lease = lease::parse(std::get<Json>(*before));
    if (!lease.ok()) return refuse({.why = Denied::unavailable, .what = lease.error().message()});
    turn.after.push_back([then, lease = std::move(*lease)] { then(lease); });
    return;
  }

  if (auto no = may_create(turn, caller, ask)) return refuse(std::move(*no));
  if (nothing_serves(ask)) return refuse(no_room(ask, caller.tenant, turn.now));
  const auto request = request_of(ask, caller.tenant);
  if (const auto bad = engine.check(request); !bad.ok())
    return refuse({.why = Denied::invalid, .what = bad.error().message()});
  // A rough amount; the exact one is known with the place.
  const tenant::Amount one{.leases = 1};
  const auto likely = likely_amount(ask);
  if (!likely) return refuse(no_room(ask, caller.tenant, turn.now));
  const auto holding = live.held.find(caller.tenant);
  const auto held = holding == live.held.end() ? tenant::Amount{} : holding->second;
  if (auto no = beyond_quota(caller.tenant, held, ask.wait ? one : *likely, turn.now))
    return refuse(std::move(*no));

  const std::int64_t id = ++last_lease;
  turn.undo.push_back([this, id] { last_lease = id - 1; });
  Entry entry{.amount = one, .pending = true};
  entry.lease = std::make_shared<const lease::Lease>(lease::Lease{.id = id,
                                                                  .tenant = caller.tenant,
                                                                  .user = caller.user.substr(0, 128),
                                                                  .ask = ask,
                                                                  .created = turn.now});
  const auto now = ms_of(turn.now);
  if (const auto in = fair->submit({.id = static_cast<std::uint64_t>(id),
                                    .tenant = fair_tenants.at(caller.tenant),
                                    .demand = demand_of(ask),
                                    .enqueued_ms = now,
                                    .length_ms = ask.ttl.count() * 1000,
                                    .priority = ask.priority},
                                   now);
      !in.ok()) {
    --last_lease;
    turn.undo.pop_back();
    Refusal refusal = no_room(ask, caller.tenant, turn.now);
    if (refusal.reasons.empty()) refusal.reasons.push_back(in.error().message());
    return refuse(std::move(refusal));
  }
  set_entry(turn, id, entry);
  turn.creating = id;
  serve_queue(turn);
  turn.creating = 0;

  entry = entries.at(id);
  if (entry.lease->state == State::requested) {
    Refusal refusal = no_room(ask, caller.tenant, turn.now);
    if (auto no = beyond_quota(caller.tenant, held, *likely, turn.now)) refusal = std::move(*no);
    if (!ask.wait) {
      turned_away = monotonic_ns();
      (void)fair->withdraw(static_cast<std::uint64_t>(id), now);
      set_entry(turn, id, std::nullopt);
      --last_lease;
      turn.undo.push_back([this, id] { last_lease = id; });
      return refuse(std::move(refusal));
    }
    lease::Lease lease = *entry.lease;
    lease.state = *lease::next(lease.state, lease::Event::wait);
    lease.reason = short_text(refusal.reasons.empty() ? refusal.what : refusal.reasons.front());
    lease.ways = std::move(refusal.ways);
    entry.lease = std::make_shared<const lease::Lease>(std::move(lease));
  }
  write(turn, caller, "create", id, entry);
  if (entry.lease->state == State::queued) preempt_for(turn, id);
  const auto lease = entries.at(id).lease;
  keep_answer(turn, std::move(key), lease::to_json(*lease));
  turn.after.push_back([then, lease] { then(*lease); });
}

// ---- granting
void Control::Inside::serve_queue(Turn& turn) {
  if (live.draining || !host_seen || fair->pending() == 0) return;
  const auto now = ms_of(turn.now);
  // Who others were given notice for comes first: what they leave is for it.
  const std::vector<std::int64_t> insisting(preemptors.begin(), preemptors.end());
  std::string why;
  for (const auto id : insisting) (void)grant(turn, id, true, why);
  for (std::size_t granted = 0; granted < most_in_turn;) {
    const auto next = fair->next(now);
    if (!next) break;
    if (grant(turn, static_cast<std::int64_t>(next->request), false, why)) {
      ++granted;
    } else if (!fair->hold(next->request, why, now).ok()) {
      break;
    }
  }
}

bool Control::Inside::grant(Turn& turn, std::int64_t id, bool insist, std::string& why) {
  Entry entry = entries.at(id);
  const auto record = live.tenants.find(entry.lease->tenant);
  if (record == live.tenants.end() || record->second->suspended) {
    why = "its tenant is suspended";
    return false;
  }
  if (entry.again && !insist && *entry.again > turn.now && entry.lease->ask.priority <= 0) {
    why = "its last preparation failed";
    return false;
  }
  const auto request = request_of(*entry.lease);
  const auto choice = engine.find(request);
  if (!choice) {
    why = "no room";
    return false;
  }
  const auto& facts = gpus[choice->parts.front().gpu];
  auto amount = amount_of(entry.lease->ask, engine.model(choice->model), facts.watts);
  const auto held = live.held[entry.lease->tenant] - entry.amount;
  if (const auto no = beyond_quota(entry.lease->tenant, held, amount, turn.now)) {
    why = no->reasons.front();
    return false;
  }
  const auto placed = engine.commit(request, *choice);
  if (!placed.ok()) {
    why = placed.error().message();
    return false;
  }
  if (const auto in = fair->admit(static_cast<std::uint64_t>(id), ms_of(turn.now)); !in.ok()) {
    (void)engine.release(*placed);
    why = in.error().message();
    return false;
  }
  lease::Lease lease = *entry.lease;
  lease.parts.clear();
  slice::Change change;
  for (const auto& its : choice->steps) {
    const auto& on = gpus[its.gpu];
    if (its.kind == placement::StepKind::destroy_instance)
      change.destroy.push_back(
          {.gpu = on.uuid, .profile = on.geometry.by_id(its.profile)->name, .start = its.start});
  }
  bool there = change.destroy.empty();
  for (std::size_t i = 0; i < choice->parts.size(); ++i) {
    lease.parts.push_back(part_of(lease, i, choice->parts[i]));
    const auto& part = lease.parts.back();
    if (lease.ask.cls != lease::Class::mig) continue;
    change.create.push_back({.gpu = part.gpu, .profile = part.profile, .start = *part.start});
    there = there && !part.device.text.empty();
  }
  const bool from_queue = lease.state == State::queued;
  lease.state = *lease::next(lease.state, lease::Event::place);
  there = there && starts_in(lease).count() == 0;
  if (there) {
    lease.state = *lease::next(lease.state, lease::Event::ready);
    lease.active_since = turn.now;
    lease.expires = turn.now + lease.ask.ttl;
  }
  lease.reason.clear();
  lease.ways.clear();
  if (from_queue) ++lease.version;
  entry.amount = std::move(amount);
  entry.placement = *placed;
  entry.pending = false;
  entry.running = true;
  entry.again.reset();
  entry.lease = std::make_shared<const lease::Lease>(std::move(lease));
  if (entry.preempts) withdraw_notices(turn, id);
  entry.preempts = false;
  if (turn.creating == id)
    set_entry(turn, id, entry);
  else
    write(turn, daemon_caller(), there ? "ready" : "place", id, entry);
  if (there) {
    changed_terms.insert(id);
    tell_runtimes(turn, entry.lease);
  } else {
    prepare(turn, id, std::move(change));
  }
  return true;
}

// The CDI file comes just after the answer: it is for container runtimes, and made anew at every start.
void Control::Inside::tell_runtimes(Turn& turn, const std::shared_ptr<const lease::Lease>& lease) {
  turn.beside.push_back([this, lease] {
    files->put([this, lease] {
      if (const auto written = slice::write_cdi(hands, *lease); !written.ok())
        later({.run =
                   [this, id = lease->id, why = written.error().message()](Turn& later_turn) {
                     note(later_turn, daemon_caller(), "cdi", lease_name(id),
                          entries.contains(id) ? entries.at(id).lease->tenant : "", "failed",
                          Json{{"why", short_text(why)}});
                   },
               .ours = true,
               .idle = true});
    });
  });
}

void Control::Inside::prepare(Turn& turn, std::int64_t id, slice::Change wanted) {
  Entry entry = entries.at(id);
  entry.at_work = true;
  set_entry(turn, id, entry);
  // The record says `preparing` before the hardware is touched: whoever finds it after a kill knows.
  turn.after.push_back([this, id, wanted = std::move(wanted)] {
    change(wanted, [this, id](Turn& later_turn, const Result<std::vector<slice::Device>>& made) {
      prepared(later_turn, id, made);
    });
  });
}

// In the lane of changes, one after another; `then` runs in a turn of its own until it is durable.
void Control::Inside::change(const slice::Change& wanted,
                             std::function<void(Turn&, const Result<std::vector<slice::Device>>&)> then) {
  std::set<std::string> touched;
  for (const auto& place : wanted.destroy) touched.insert(place.gpu.text);
  for (const auto& place : wanted.create) touched.insert(place.gpu.text);
  for (const auto& name : touched) {
    if (auto* facts = facts_of(Uuid{name})) ++facts->changes, ++facts->epoch;
  }
  for (const auto& place : wanted.destroy) devices.erase({place.gpu.text, place.profile, place.start});
  bool mode = !wanted.mig_off.empty();
  for (const auto& place : wanted.create) {
    const auto* facts = facts_of(place.gpu);
    mode = mode || (facts != nullptr && !facts->mig_on);
  }
  changes->put([this, wanted, touched, mode, then = std::move(then)] {
    const bool ask = mode && settings.let_go;
    if (ask) (void)settings.let_go(true);
    auto made = gate.alone([&] { return slice::change(hands, wanted); });
    if (ask) (void)settings.let_go(false);
    auto shared = std::make_shared<const Result<std::vector<slice::Device>>>(std::move(made));
    later({.before =
               [this, touched, shared] {
                 for (const auto& name : touched)
                   if (auto* facts = facts_of(Uuid{name})) --facts->changes, ++facts->epoch;
                 if (shared->ok())
                   for (const auto& device : **shared)
                     devices[{device.place.gpu.text, device.place.profile, device.place.start}] = device;
                 else
                   next_look = 0;  // what is there now is anybody's guess
               },
           .run = [then, shared](Turn& turn) { then(turn, *shared); },
           .ours = true});
  });
}

void Control::Inside::prepared(Turn& turn, std::int64_t id, const Result<std::vector<slice::Device>>& made,
                               bool looked) {
  const auto at = entries.find(id);
  if (at == entries.end()) return;
  Entry entry = at->second;
  entry.at_work = false;
  lease::Lease lease = *entry.lease;
  if (made.ok() && lease.ask.cls == lease::Class::mig) {
    for (auto& part : lease.parts)
      for (const auto& device : *made)
        if (device.place == slice::Place{part.gpu, part.profile, part.start.value_or(0)}) {
          part.device = device.device;
          part.gpu_instance = device.gpu_instance;
          part.compute_instance = device.compute_instance;
          part.generation = device.generation;
          part.memory = device.memory;
          part.device_nodes = device.device_nodes;
        }
  }
  entry.lease = std::make_shared<const lease::Lease>(std::move(lease));
  set_entry(turn, id, entry);
  if (entry.lease->state == State::releasing) return scrub(turn, id);
  if (entry.lease->state != State::preparing) return;
  if (made.ok()) {
    const auto time = starts_in(*entry.lease);
    if (time.count() > 0 || (entry.waited && !looked)) return wait_turn(turn, id, time, made);
    step(turn, daemon_caller(), id, lease::Event::ready, "");
    changed_terms.insert(id);
    tell_runtimes(turn, entries.at(id).lease);
    return;
  }
  const auto& error = made.error();
  const std::string why = fmt::format("its slices could not be made: {}", error.message());
  // What a killed run or another bulkhead left is not what was known when the place was chosen; by the next
  // try the host has been looked at again. An acknowledged lease is not given up for it.
  const auto code = error.code();
  const bool may_pass = code == Errc::no_capacity || code == Errc::in_use || code == Errc::conflict ||
                        code == Errc::unavailable;
  if (may_pass && entry.tries < most_tries) {
    ++entry.tries;
    entry.again = turn.now + try_again;
    return set_entry(turn, id, std::move(entry));
  }
  if (!entry.lease->ask.wait) return step(turn, daemon_caller(), id, lease::Event::cannot, why);
  // It waits on, and not at the head of the line for the same place at once.
  step(turn, daemon_caller(), id, lease::Event::wait, why);
  entry = entries.at(id);
  entry.again = turn.now + look_again;
  const auto now = ms_of(turn.now);
  entry.pending = fair->submit({.id = static_cast<std::uint64_t>(id),
                                .tenant = fair_tenants.at(entry.lease->tenant),
                                .demand = demand_of(entry.lease->ask),
                                .enqueued_ms = ms_of(entry.lease->created),
                                .length_ms = entry.lease->ask.ttl.count() * 1000,
                                .priority = entry.lease->ask.priority},
                               now)
                      .ok();
  set_entry(turn, id, entry);
}

// ---- changing
void Control::Inside::renew(Turn& turn, const Caller& caller, std::int64_t id, std::chrono::seconds ttl,
                            std::optional<std::int64_t> version, const Then<lease::Lease>& then) {
  const auto refuse = [&](Refusal refusal) {
    note_refusal(turn, caller, "renew", lease_name(id), refusal, caller.tenant);
    turn.after.push_back([then, refusal = std::move(refusal)] { then(refusal); });
  };
  std::shared_ptr<const lease::Lease> lease;
  if (auto no = find_lease(caller, Verb::change, id, version, lease)) return refuse(std::move(*no));
  if (lease->state != State::active)
    return refuse(
        {.why = Denied::conflict,
         .what = fmt::format("lease {} is {}: only an active one is renewed", id, name_of(lease->state))});
  const auto tenant = live.tenants.find(lease->tenant);
  if (tenant != live.tenants.end() && tenant->second->suspended)
    return refuse({.why = Denied::forbidden, .what = fmt::format("tenant {} is suspended", lease->tenant)});
  Entry entry = entries.at(id);
  if (auto no = beyond_quota(lease->tenant, {}, {.gpu_milli = entry.amount.gpu_milli}, turn.now))
    return refuse(std::move(*no));
  const auto until = lease::renewed(*lease, ttl, turn.now);
  if (!until.ok()) return refuse({.why = Denied::invalid, .what = until.error().message()});
  lease::Lease next = *lease;
  next.expires = *until;
  ++next.version;
  entry.lease = std::make_shared<const lease::Lease>(std::move(next));
  changed_terms.insert(id);
  turn.after.push_back([then, renewed = entry.lease] { then(*renewed); });
  write(turn, caller, "renew", id, std::move(entry));
}

void Control::Inside::release(Turn& turn, const Caller& caller, std::int64_t id,
                              std::optional<std::int64_t> version, const Then<lease::Lease>& then) {
  std::shared_ptr<const lease::Lease> lease;
  if (auto no = find_lease(caller, Verb::end, id, version, lease)) {
    note_refusal(turn, caller, "release", lease_name(id), *no, caller.tenant);
    turn.after.push_back([then, no = std::move(*no)] { then(no); });
    return;
  }
  switch (lease->state) {
    case State::requested:
    case State::queued:
      step(turn, caller, id, lease::Event::withdraw, "given up while it waited");
      break;
    case State::preparing:
      end_holding(turn, caller, id, lease::Event::withdraw, "given up while it was prepared");
      break;
    case State::active:
      end_holding(turn, caller, id, lease::Event::release, "released");
      break;
    case State::releasing:
    case State::ended:
    case State::failed:
      break;  // what was asked for is so
  }
  const auto now = live.leases.find(id);
  turn.after.push_back([then, lease = now == live.leases.end() ? lease : now->second] { then(*lease); });
}

void Control::Inside::old_lease(Turn& turn, const Caller& caller, std::int64_t id,
                                const Then<lease::Lease>& then) {
  const auto answer = [&](Answer<lease::Lease> what) {
    turn.after.push_back([then, what = std::move(what)] { then(what); });
  };
  std::shared_ptr<const lease::Lease> lease;
  if (live.leases.find(id) == live.leases.end()) {
    auto record = book->lease(id);
    if (!record.ok()) return answer(Refusal{.why = Denied::unavailable, .what = record.error().message()});
    if (*record) {
      auto parsed = lease::parse((*record)->body);
      if (!parsed.ok()) return answer(Refusal{.why = Denied::unavailable, .what = parsed.error().message()});
      lease = std::make_shared<const lease::Lease>(std::move(*parsed));
    }
    if (auto no = denied(caller, {Verb::read, Resource::leases}, lease ? lease->tenant : "",
                         fmt::format("lease {}", id)))
      return answer(std::move(*no));
    if (!lease)
      return answer(Refusal{.why = Denied::not_found, .what = fmt::format("there is no lease {}", id)});
    return answer(*lease);
  }
  if (auto no = find_lease(caller, Verb::read, id, std::nullopt, lease)) return answer(std::move(*no));
  answer(*lease);
}

// ---- ending
void Control::Inside::end_holding(Turn& turn, const Caller& who, std::int64_t id, lease::Event event,
                                  std::string reason) {
  step(turn, who, id, event, std::move(reason));
  const auto at = entries.find(id);
  // One that is being prepared is scrubbed when the lane is done with it.
  if (at != entries.end() && at->second.lease->state == State::releasing && !at->second.at_work)
    scrub(turn, id);
}

void Control::Inside::scrub(Turn& turn, std::int64_t id) {
  Entry entry = entries.at(id);
  entry.at_work = true;
  entry.again.reset();
  const auto lease = entry.lease;
  // Where the device is gone nothing is left to scrub.
  std::vector<lease::Part> parts;
  for (const auto& part : lease->parts) {
    const auto* facts = facts_of(part.gpu);
    if (facts == nullptr || facts->lost || part.device.text.empty()) continue;
    if (part.start && !devices.contains({part.gpu.text, part.profile, *part.start})) continue;
    parts.push_back(part);
  }
  set_entry(turn, id, std::move(entry));
  turn.beside.push_back([this, id] { files->put([this, id] { (void)slice::remove_cdi(hands, id); }); });
  turn.beside.push_back([this, one = Leaving{id, lease, std::move(parts)}] {
    {
      const std::lock_guard hold(leaving_mutex);
      leaving.push_back(one);
    }
    sweeps->put([this] { sweep(); });
  });
}

// Most tenants leave nothing, and to see that for all who go at a time costs no more than for one: reading
// the whole of /proc, and asking the driver. Those of whom something is left are looked at one by one.
void Control::Inside::sweep() {
  std::vector<Leaving> all;
  {
    const std::lock_guard hold(leaving_mutex);
    const auto end = leaving.begin() + static_cast<std::ptrdiff_t>(std::min(leaving.size(), most_in_sweep));
    all.assign(std::make_move_iterator(leaving.begin()), std::make_move_iterator(end));
    leaving.erase(leaving.begin(), end);
  }
  if (all.empty()) return;  // the sweep before took it along
  const auto began = monotonic_ns();
  std::vector<slice::Held> held;
  for (const auto& one : all)
    for (const auto& part : one.parts) held.push_back({*one.lease, part});
  const auto clean = gate.shared([&] { return slice::clean(hands, held); });
  std::vector<Command> done;
  std::size_t at = 0;
  for (auto& one : all) {
    bool nothing_left = true;
    for (std::size_t i = 0; i < one.parts.size(); ++i, ++at)
      nothing_left = nothing_left && clean.ok() && (*clean)[at];
    if (nothing_left) {
      done.push_back(scrubbed_later(one.id, {}));
      continue;
    }
    // A share is scrubbed by its name, of which all parts have the same: one lane for it, however many there
    // are.
    if (one.lease->ask.cls == lease::Class::share) one.parts.resize(1);
    const auto closer = std::make_shared<Closer>(std::move(one));
    for (std::size_t i = 0; i < closer->one.parts.size(); ++i)
      rounds->put([this, closer, i] { scrub_closer(*closer, i); });
  }
  later(std::move(done));
  // Half of the time is enough for this: who asks meanwhile has the processor, and the next sweep more to do.
  if (!somebody_waits)
    std::this_thread::sleep_for(std::min(std::chrono::nanoseconds(monotonic_ns() - began), most_rest));
}

void Control::Inside::scrub_closer(Closer& closer, std::size_t part) {
  const auto& one = closer.one;
  // A tenant whose programs ignore SIGTERM keeps nobody else waiting: a grace passes outside the gate and
  // without a turn, so changes go on and many wait beside each other. A turn is taken inside the gate and
  // never kept over it: a change that waits at the gate waits for nobody who waits for a turn outside.
  slice::Settings with = hands;
  with.waits = [this](bool waiting) {
    if (waiting) {
      closer_turns.release();
      gate.step_out();
    } else {
      gate.step_in();
      closer_turns.acquire();
    }
  };
  const auto done = gate.shared([&] {
    closer_turns.acquire();
    auto scrubbed = slice::scrub(with, *one.lease, one.parts[part]);
    closer_turns.release();
    return scrubbed;
  });
  {
    const std::lock_guard hold(closer.mutex);
    if (!done.ok())
      closer.left.push_back(done.error().message());
    else
      closer.left.insert(closer.left.end(), done->left.begin(), done->left.end());
    if (--closer.open > 0) return;
  }
  // A program of one part may have gone over to another that was seen clean before.
  if (closer.left.empty() && one.parts.size() > 1) {
    std::vector<slice::Held> held;
    for (const auto& its : one.parts) held.push_back({*one.lease, its});
    const auto clean = gate.shared([&] { return slice::clean(hands, held); });
    if (!clean.ok())
      closer.left.push_back(clean.error().message());
    else if (std::find(clean->begin(), clean->end(), false) != clean->end())
      closer.left.emplace_back("something came to one of its parts while the others were scrubbed");
  }
  later(scrubbed_later(one.id, std::move(closer.left)));
}

Command Control::Inside::scrubbed_later(std::int64_t id, std::vector<std::string> left) {
  return {.run = [this, id, left = std::move(left)](Turn& turn) { scrubbed(turn, id, left); },
          .ours = true,
          .idle = !somebody_waits};
}

void Control::Inside::scrubbed(Turn& turn, std::int64_t id, const std::vector<std::string>& left) {
  const auto at = entries.find(id);
  if (at == entries.end()) return;
  Entry entry = at->second;
  entry.at_work = false;
  if (left.empty()) {
    set_entry(turn, id, entry);
    return step(turn, daemon_caller(), id, lease::Event::scrubbed, "");
  }
  entry.again = turn.now + settings.scrub_again;
  const std::string why =
      short_text(fmt::format("it could not be scrubbed and stays taken: {}", join(left, "; ")));
  if (entry.lease->reason == why) return set_entry(turn, id, std::move(entry));
  lease::Lease lease = *entry.lease;
  lease.reason = why;
  ++lease.version;
  entry.lease = std::make_shared<const lease::Lease>(std::move(lease));
  write(turn, daemon_caller(), "stuck", id, std::move(entry));
}

// Whatever of this lease is due.
void Control::Inside::alarm(Turn& turn, std::int64_t id) {
  const auto at = entries.find(id);
  if (at == entries.end()) return;
  const auto lease = at->second.lease;
  const auto due = [&](const std::optional<WallTime>& time) { return time && *time <= turn.now; };
  const Caller& who = daemon_caller();
  if (lease->state == State::active) {
    if (due(lease->expires)) return end_holding(turn, who, id, lease::Event::expire, "its time is over");
    if (due(lease->notice))
      return end_holding(turn, who, id, lease::Event::preempt, "preempted for a lease of higher priority");
  }
  if (lease->state == State::queued && due(lease->ask.deadline))
    return step(turn, who, id, lease::Event::deadline, "not granted by its deadline: " + lease->reason);
  if (lease->state == State::preparing && due(lease->ask.deadline))
    return end_holding(turn, who, id, lease::Event::deadline, "not granted by its deadline");
  if (!due(at->second.again)) return;
  Entry entry = at->second;
  entry.again.reset();
  set_entry(turn, id, entry);
  if (lease->state == State::releasing && !entry.at_work) scrub(turn, id);
  if (lease->state == State::preparing && !entry.at_work) prepare_again(turn, id);
  if (lease->state == State::queued) {
    retry_queue = true;
    preempt_for(turn, id);
  }
}

// ---- preemption
// The active leases that would have to end for it, fewest that a greedy look finds: lowest priority first,
// the youngest first. Empty: none would help. Tries it in the engine and takes it back.
std::vector<std::int64_t> Control::Inside::victims_for(const lease::Lease& lease) {
  struct Candidate {
    std::int64_t id = 0;
    int priority = 0;
    WallTime since = {};
    placement::PlacementId placement = 0;
  };
  std::vector<Candidate> candidates;
  for (const auto id : preemptible) {
    const auto& entry = entries.at(id);
    const auto& its = *entry.lease;
    if (its.ask.priority >= lease.ask.priority) continue;
    // Tenants order their own; only what an operator put above 0 goes before others'.
    if (lease.ask.priority <= 0 && its.tenant != lease.tenant) continue;
    if (its.notice && entry.preempts_for != lease.id) continue;
    candidates.push_back({id, its.ask.priority, its.active_since.value_or(WallTime{}), entry.placement});
  }
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return std::tuple(a.priority, b.since, b.id) < std::tuple(b.priority, a.since, a.id);
  });
  if (candidates.size() > most_victims) candidates.resize(most_victims);
  const auto request = request_of(lease);
  std::vector<std::pair<Candidate, placement::Placement>> gone;
  bool fits = false;
  engine.mark();
  for (const auto& candidate : candidates) {
    auto was = engine.release(candidate.placement);
    if (!was.ok()) continue;
    gone.emplace_back(candidate, std::move(*was));
    fits = engine.find(request).has_value();
    if (fits) break;
  }
  std::vector<std::int64_t> victims;
  if (fits) {
    // Back with those that need not go, the dearest first.
    for (auto it = gone.rbegin(); it != gone.rend(); ++it) {
      engine.mark();
      if (engine.adopt(it->second).ok() && engine.find(request)) {
        engine.keep();
        continue;
      }
      engine.rollback();
      victims.push_back(it->first.id);
    }
  }
  engine.rollback();
  std::sort(victims.begin(), victims.end());
  return victims;
}

void Control::Inside::preempt_for(Turn& turn, std::int64_t id) {
  Entry entry = entries.at(id);
  if (entry.lease->state != State::queued) return;
  const bool waits_for_others = std::any_of(
      noticed.begin(), noticed.end(), [&](const auto one) { return entries.at(one).preempts_for == id; });
  if (!waits_for_others) {
    for (const auto victim : victims_for(*entry.lease)) {
      Entry its = entries.at(victim);
      lease::Lease lease = *its.lease;
      lease.notice = turn.now + settings.notice;
      lease.reason =
          fmt::format("will be preempted at {} for a lease of higher priority", short_time(*lease.notice));
      ++lease.version;
      its.lease = std::make_shared<const lease::Lease>(std::move(lease));
      its.preempts_for = id;
      entry.preempts = true;
      write(turn, daemon_caller(), "notice", victim, std::move(its));
    }
  }
  // Priorities of others may change what can be had; it is looked at again.
  if (entry.lease->ask.priority > 0) entry.again = turn.now + look_again;
  set_entry(turn, id, std::move(entry));
}

// It has what it wanted, or wants it no more: who was to go may stay.
void Control::Inside::withdraw_notices(Turn& turn, std::int64_t preemptor) {
  std::vector<std::int64_t> ids;
  for (const auto id : noticed)
    if (entries.at(id).preempts_for == preemptor && entries.at(id).lease->state == State::active)
      ids.push_back(id);
  for (const auto id : ids) {
    Entry entry = entries.at(id);
    lease::Lease lease = *entry.lease;
    lease.notice.reset();
    lease.reason.clear();
    ++lease.version;
    entry.preempts_for = 0;
    entry.lease = std::make_shared<const lease::Lease>(std::move(lease));
    write(turn, daemon_caller(), "stay", id, std::move(entry));
  }
}

// ---- instances nobody has
void Control::Inside::reclaim_idle(Turn& turn) {
  std::map<DeviceKey, WallTime> idle;
  for (placement::GpuNo number = 0; number < gpus.size(); ++number) {
    const auto& facts = gpus[number];
    if (facts.pool != placement::Pool::dynamic || facts.lost) continue;
    std::set<DeviceKey> held;
    for (const auto& id : engine.placements_on(number))
      for (const auto& part : engine.placement(id)->parts)
        if (part.gpu == number && facts.geometry.by_id(part.profile) != nullptr)
          held.insert({facts.uuid.text, facts.geometry.by_id(part.profile)->name, part.start});
    for (const auto& instance : engine.gpu(number).instances) {
      const DeviceKey key{facts.uuid.text, facts.geometry.by_id(instance.profile)->name, instance.start};
      if (held.contains(key)) continue;
      const auto since = idle_since.find(key);
      idle[key] = since == idle_since.end() ? turn.now : since->second;
    }
  }
  idle_since = std::move(idle);
  std::size_t count = 0;
  for (const auto& [key, since] : idle_since) {
    if (turn.now - since < settings.idle_keep) continue;
    if (++count > reclaims_in_turn) break;
    // After the batch: the engine's marks allow no change of what there is.
    turn.after.push_back([this, key = key] {
      auto* facts = facts_of(Uuid{key.gpu});
      const auto number = engine.find_gpu(key.gpu);
      if (facts == nullptr || !number) return;
      auto present = engine.gpu(*number).instances;
      std::erase_if(present, [&](const placement::Instance& one) {
        const auto* profile = facts->geometry.by_id(one.profile);
        return profile != nullptr && profile->name == key.profile && one.start == key.start;
      });
      if (!engine.set_instances(*number, std::move(present), facts->mig_on).ok()) return;
      dirty.insert(*number);
      change({.destroy = {{.gpu = facts->uuid, .profile = key.profile, .start = key.start}}},
             [](Turn&, const Result<std::vector<slice::Device>>&) {});
    });
  }
}

}  // namespace bulkhead::control
