// The loop: commands in, one durable batch, answers out.
#include "engine/control/control.hpp"

#include <sys/prctl.h>

#include <algorithm>
#include <future>
#include <utility>

#include <fmt/format.h>

#include "base/text.hpp"
#include "engine/control/inside.hpp"

namespace bulkhead::control {

namespace {

constexpr std::uint64_t ns_of_ms = 1'000'000;
constexpr std::uint64_t idle_ns = 50 * ns_of_ms;
constexpr std::uint64_t comes_back_ns = 100 * ns_of_ms;  // who was turned away

std::uint64_t ns(std::chrono::milliseconds time) {
  return static_cast<std::uint64_t>(std::max<std::int64_t>(time.count(), 1)) * ns_of_ms;
}

Refusal full() {
  return {.why = Denied::too_many,
          .what = "too many requests are waiting for the control loop",
          .ways = {"try again in a second"}};
}
Refusal ending() { return {.why = Denied::unavailable, .what = "the daemon is ending"}; }

}  // namespace

std::string_view name_of(Denied why) {
  switch (why) {
    case Denied::invalid:
      return "invalid";
    case Denied::forbidden:
      return "forbidden";
    case Denied::not_found:
      return "not-found";
    case Denied::conflict:
      return "conflict";
    case Denied::quota:
      return "quota";
    case Denied::no_room:
      return "no-room";
    case Denied::too_many:
      return "too-many";
    case Denied::unavailable:
      return "unavailable";
  }
  return "?";
}

// ---- lanes
Lane::Lane(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) threads_.emplace_back([this] { serve(); });
}
Lane::~Lane() {
  {
    const std::lock_guard hold(mutex_);
    ending_ = true;
    jobs_.clear();
  }
  ready_.notify_all();
  for (auto& thread : threads_) thread.join();
}
void Lane::put(std::function<void()> job) {
  {
    const std::lock_guard hold(mutex_);
    if (ending_) return;
    jobs_.push_back(std::move(job));
  }
  ready_.notify_one();
}
void Lane::serve() {
  while (true) {
    std::function<void()> job;
    {
      std::unique_lock hold(mutex_);
      ready_.wait(hold, [this] { return ending_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job();
  }
}

// ---- the loop
Control::Inside::Inside(Settings given) : settings(std::move(given)) {}

Control::Inside::~Inside() {
  {
    const std::lock_guard hold(mutex);
    ending = true;
  }
  ready.notify_all();
  if (thread.joinable()) thread.join();
  // The lanes may wait for the driver; what they still had to do is done again at the next start.
  changes.reset();
  sweeps.reset();  // it gives work to the rounds
  rounds.reset();
  files.reset();
}

bool Control::Inside::submit(Command command) {
  {
    const std::lock_guard hold(mutex);
    if (ending || queue.size() >= settings.most_waiting) return false;
    queue.push_back(std::move(command));
  }
  ready.notify_one();
  return true;
}

void Control::Inside::later(Command command) {
  std::vector<Command> one;
  one.push_back(std::move(command));
  later(std::move(one));
}

void Control::Inside::later(std::vector<Command> commands) {
  {
    const std::lock_guard hold(mutex);
    for (auto& command : commands) {
      // An fsync of its own would be in the way of whoever asks next.
      if (command.idle && idle_until == 0) idle_until = monotonic_ns() + idle_ns;
      urgent = urgent || !command.idle;
      results.push_back(std::move(command));
    }
  }
  ready.notify_one();
}

void Control::Inside::loop() {
  ::prctl(PR_SET_NAME, "control loop");  // top -H
  while (true) {
    std::deque<Command> commands;
    {
      std::unique_lock hold(mutex);
      while (!ending && queue.empty() && !urgent) {
        const std::uint64_t now = monotonic_ns();
        const std::uint64_t until = idle_until == 0 ? next_tick : std::min(next_tick, idle_until);
        if (now >= until) break;
        ready.wait_for(hold, std::chrono::nanoseconds(until - now));
      }
      if (ending && queue.empty()) return;
      while (!results.empty() && commands.size() < most_in_turn) {
        commands.push_back(std::move(results.front()));
        results.pop_front();
      }
      if (results.empty()) urgent = false, idle_until = 0;
      while (!queue.empty() && commands.size() < most_in_turn) {
        commands.push_back(std::move(queue.front()));
        queue.pop_front();
      }
    }
    for (auto& command : commands) {
      if (command.before) command.before();
      command.before = {};
    }
    for (const auto id : std::exchange(changed_terms, {})) {
      const auto entry = entries.find(id);
      if (entry == entries.end() || entry->second.placement == placement::no_placement) continue;
      const auto wanted = request_of(*entry->second.lease);
      (void)engine.set_terms(entry->second.placement, false, 1, wanted.priority, wanted.ends);
    }
    run_batch(commands);
  }
}

void Control::Inside::run_batch(std::deque<Command>& commands) {
  const bool due = monotonic_ns() >= next_tick;
  if (due) next_tick = monotonic_ns() + ns(settings.tick);
  if (commands.empty() && !due) return;
  std::vector<Command> all;
  if (due) all = std::exchange(postponed, {});
  std::move(commands.begin(), commands.end(), std::back_inserter(all));
  (void)attempt(all, due);
}

// True: durable, and everybody was told.
bool Control::Inside::attempt(std::span<Command> commands, bool tick_due) {
  Turn turn{.now = now_wall()};
  at_now = turn.now;
  engine.mark();
  for (const auto& command : commands)
    if (command.run) command.run(turn);
  if (tick_due) tick(turn);
  if (!turn.batch.empty()) {
    if (auto done = book->commit(turn.batch); !done.ok()) {
      roll_back(turn);
      // One entry beyond the bounds of the book must not take the others down.
      if (done.error().code() == Errc::invalid && commands.size() + (tick_due ? 1U : 0U) > 1) {
        for (auto& command : commands) (void)attempt(std::span(&command, 1), false);
        if (tick_due) (void)attempt({}, true);
        return false;
      }
      disk_trouble =
          fmt::format("nothing can be changed, for it could not be kept: {}", done.error().message());
      live.trouble = disk_trouble;
      publish(Turn{.now = turn.now});
      const Refusal refusal{.why = Denied::unavailable,
                            .what = disk_trouble,
                            .ways = {"make room on the disk of the state directory; it goes on by itself"}};
      for (auto& command : commands) {
        if (command.ours)
          postponed.push_back(std::move(command));
        else if (command.failed)
          command.failed(refusal);
      }
      return false;
    }
    disk_trouble.clear();
  }
  engine.keep();
  publish(turn);
  for (const auto& then : turn.after) then();
  if (tell && !turn.batch.audit.empty()) {
    std::vector<Event> events;
    for (const auto& line : turn.batch.audit) events.push_back(event_of(line));
    tell(events);
  }
  for (const auto& then : turn.beside) then();
  return true;
}

void Control::Inside::roll_back(Turn& turn) {
  for (auto undo = turn.undo.rbegin(); undo != turn.undo.rend(); ++undo) (*undo)();
  engine.rollback();
  // The fairness book cannot go back: it is made anew from what is held and what waits.
  submit_all();
  retry_queue = true;
}

void Control::Inside::publish(const Turn& turn) {
  for (const auto number : dirty) live.gpus[number] = pool_gpu(number);
  dirty.clear();
  ++live.batch;
  live.at = turn.now;
  if (!turn.batch.audit.empty()) live.last_event = turn.batch.audit.back().id;
  live.trouble = !disk_trouble.empty() ? disk_trouble : driver_trouble;
  snapshot.store(std::make_shared<const Snapshot>(live));
  somebody_waits = (fair && fair->pending() > 0) || monotonic_ns() < turned_away + comes_back_ns;
}

void Control::Inside::tick(Turn& turn) {
  const std::uint64_t now = monotonic_ns();
  // Each due moment once a turn; a lease handles whatever of its own is due.
  std::vector<std::int64_t> due;
  for (const auto& [at, id] : alarms) {
    if (at > turn.now || due.size() >= most_in_turn) break;
    due.push_back(id);
  }
  for (const auto id : due) alarm(turn, id);
  if (retry_queue) fair->retry(turn.now.time_since_epoch().count());
  retry_queue = false;
  serve_queue(turn);
  reclaim_idle(turn);
  for (const auto& [name, amount] : live.held) live.gpu_seconds_month[name] = gpu_seconds(name, turn.now);
  if (now >= next_look && !looking) {
    next_look = now + ns(settings.look_every);
    look();
  }
  if (now >= next_forget) {
    next_forget = now + ns(std::chrono::minutes(1));
    turn.after.push_back([this, before = turn.now - settings.key_keep] { (void)book->forget_keys(before); });
  }
}

Event Control::Inside::event_of(const book::Audit& line) {
  Event event{.id = line.id,
              .at = line.at,
              .kind = line.what.substr(0, line.what.find('/')),
              .tenant = line.tenant,
              .what = line.what,
              .verb = line.verb,
              .body = line.detail,
              .user = line.user,
              .role = line.role,
              .from = line.from,
              .outcome = line.outcome,
              .hash = line.hash};
  return event;
}

// ---- metering
namespace {
std::int64_t month_of(WallTime at) {
  const std::chrono::year_month_day day(std::chrono::floor<std::chrono::days>(at));
  return static_cast<int>(day.year()) * 12LL + static_cast<unsigned>(day.month()) - 1;
}
WallTime start_of(std::int64_t month) {
  const auto year = std::chrono::year(static_cast<int>(month / 12));
  const auto its = std::chrono::month(static_cast<unsigned>(month % 12) + 1);
  return std::chrono::sys_days(year / its / std::chrono::day(1));
}
}  // namespace

// What is on the clock of this month if it were read now.
Used Control::Inside::settled(const std::string& tenant, WallTime now) const {
  const auto at = used.find(tenant);
  Used use = at == used.end() ? Used{.month = month_of(now), .at = now} : at->second;
  const auto holding = live.held.find(tenant);
  const std::uint64_t milli = holding == live.held.end() ? 0 : holding->second.gpu_milli;
  const auto month = month_of(now);
  if (month != use.month && now > use.at) use.month = month, use.milli_ms = 0, use.at = start_of(month);
  if (now > use.at) {
    use.milli_ms += static_cast<std::uint64_t>((now - use.at).count()) * milli;
    use.at = now;
  }
  return use;
}
std::uint64_t Control::Inside::gpu_seconds(const std::string& tenant, WallTime now) const {
  return settled(tenant, now).milli_ms / 1'000'000;
}
void Control::Inside::write_use(Turn& turn, const std::string& tenant) {
  auto use = settled(tenant, turn.now);
  if (const auto its = fair_tenants.find(tenant); fair && its != fair_tenants.end()) {
    use.past = fair->past(its->second, turn.now.time_since_epoch().count());
    use.past_at = turn.now;
  }
  used[tenant] = use;
  const Json value{{"month", use.month},
                   {"milliMs", use.milli_ms},
                   {"at", use.at.time_since_epoch().count()},
                   {"past", use.past},
                   {"pastAt", use.past_at.time_since_epoch().count()}};
  const std::string name = "use/" + tenant;
  for (auto& [key, old] : turn.batch.settings) {
    if (key != name) continue;
    old = value;
    return;
  }
  turn.batch.settings.emplace_back(name, value);
}

// ---- the front
Control::Control() = default;
Control::~Control() = default;

Result<std::unique_ptr<Control>> Control::start(Settings settings) {
  std::unique_ptr<Control> control(new Control());
  control->inside_ = std::make_unique<Inside>(std::move(settings));
  Inside& inside = *control->inside_;
  BH_CHECK(inside.open());
  BH_CHECK(inside.load());
  BH_CHECK(inside.first_look());
  inside.resume();
  inside.thread = std::thread([&inside] { inside.loop(); });
  return control;
}

std::shared_ptr<const Snapshot> Control::now() const { return inside_->snapshot.load(); }

namespace {
Result<std::vector<Event>> events(Control::Inside& inside, std::int64_t id, std::size_t most,
                                  Result<std::vector<book::Audit>> (book::Book::*read)(std::int64_t,
                                                                                       std::size_t)) {
  const std::lock_guard hold(inside.reader_mutex);
  if (!inside.reader) {
    BH_TRY(inside.reader, book::Book::open(inside.settings.state, book::Book::Access::read_only));
  }
  BH_TRY(const auto lines, ((*inside.reader).*read)(id, most));
  std::vector<Event> out;
  out.reserve(lines.size());
  for (const auto& line : lines) out.push_back(Control::Inside::event_of(line));
  return out;
}
}  // namespace

Result<std::vector<Event>> Control::events_after(std::int64_t id, std::size_t most) const {
  return events(*inside_, id, most, &book::Book::audit_after);
}
Result<std::vector<Event>> Control::events_before(std::int64_t id, std::size_t most) const {
  return events(*inside_, id, most, &book::Book::audit_before);
}

void Control::on_events(std::function<void(const std::vector<Event>&)> tell) {
  inside_->submit({.before = [this, tell = std::move(tell)] { inside_->tell = tell; }});
}

namespace {
// Every command answers its caller once, whatever becomes of its batch.
template <class T, class Run>
void command(Control::Inside& inside, const Then<T>& then, Run run) {
  Command command{.run = std::move(run), .failed = [then](const Refusal& refusal) { then(refusal); }};
  if (!inside.submit(std::move(command))) {
    bool over = false;
    {
      const std::lock_guard hold(inside.mutex);
      over = inside.ending;
    }
    then(over ? ending() : full());
  }
}
}  // namespace

void Control::create_lease(Caller caller, lease::Ask ask, Once once, Then<lease::Lease> then) {
  auto& inside = *inside_;
  command<lease::Lease>(inside, then,
                        [&inside, caller = std::move(caller), ask = std::move(ask), once = std::move(once),
                         then](Turn& turn) { inside.create(turn, caller, ask, once, then); });
}
void Control::renew_lease(Caller caller, std::int64_t id, std::chrono::seconds ttl,
                          std::optional<std::int64_t> version, Then<lease::Lease> then) {
  auto& inside = *inside_;
  command<lease::Lease>(inside, then,
                        [&inside, caller = std::move(caller), id, ttl, version, then](Turn& turn) {
                          inside.renew(turn, caller, id, ttl, version, then);
                        });
}
void Control::release_lease(Caller caller, std::int64_t id, std::optional<std::int64_t> version,
                            Then<lease::Lease> then) {
  auto& inside = *inside_;
  command<lease::Lease>(inside, then, [&inside, caller = std::move(caller), id, version, then](Turn& turn) {
    inside.release(turn, caller, id, version, then);
  });
}
void Control::put_tenant(Caller caller, tenant::Tenant tenant, std::optional<std::int64_t> version,
                         Then<tenant::Tenant> then, Once once) {
  auto& inside = *inside_;
  command<tenant::Tenant>(
      inside, then,
      [&inside, caller = std::move(caller), tenant = std::move(tenant), version, once = std::move(once),
       then](Turn& turn) { inside.put_tenant(turn, caller, tenant, version, once, then); });
}
void Control::end_tenant(Caller caller, std::string name, Then<tenant::Tenant> then) {
  auto& inside = *inside_;
  command<tenant::Tenant>(inside, then,
                          [&inside, caller = std::move(caller), name = std::move(name), then](Turn& turn) {
                            inside.end_tenant(turn, caller, name, then);
                          });
}
void Control::create_token(Caller caller, AskToken ask, Then<NewToken> then) {
  auto& inside = *inside_;
  command<NewToken>(inside, then,
                    [&inside, caller = std::move(caller), ask = std::move(ask), then](Turn& turn) {
                      inside.create_token(turn, caller, ask, then);
                    });
}
void Control::revoke_token(Caller caller, std::string id, Then<User> then) {
  auto& inside = *inside_;
  command<User>(inside, then, [&inside, caller = std::move(caller), id = std::move(id), then](Turn& turn) {
    inside.revoke_token(turn, caller, id, then);
  });
}
void Control::list_tokens(Caller caller, Then<std::vector<User>> then) {
  auto& inside = *inside_;
  command<std::vector<User>>(inside, then, [&inside, caller = std::move(caller), then](Turn& turn) {
    inside.list_tokens(turn, caller, then);
  });
}
void Control::old_lease(Caller caller, std::int64_t id, Then<lease::Lease> then) {
  auto& inside = *inside_;
  command<lease::Lease>(inside, then, [&inside, caller = std::move(caller), id, then](Turn& turn) {
    inside.old_lease(turn, caller, id, then);
  });
}
void Control::standing(Caller caller, std::int64_t id, Then<Standing> then) {
  auto& inside = *inside_;
  command<Standing>(inside, then, [&inside, caller = std::move(caller), id, then](Turn& turn) {
    inside.standing(turn, caller, id, then);
  });
}
void Control::drain(Caller caller, bool on, Then<bool> then) {
  auto& inside = *inside_;
  command<bool>(inside, then, [&inside, caller = std::move(caller), on, then](Turn& turn) {
    inside.drain(turn, caller, on, then);
  });
}
void Control::cordon(Caller caller, Uuid gpu, std::string why, Then<PoolGpu> then) {
  auto& inside = *inside_;
  command<PoolGpu>(
      inside, then,
      [&inside, caller = std::move(caller), gpu = std::move(gpu), why = std::optional(std::move(why)),
       then](Turn& turn) { inside.cordon(turn, caller, gpu, why, then); });
}
void Control::uncordon(Caller caller, Uuid gpu, Then<PoolGpu> then) {
  auto& inside = *inside_;
  command<PoolGpu>(inside, then,
                   [&inside, caller = std::move(caller), gpu = std::move(gpu), then](Turn& turn) {
                     inside.cordon(turn, caller, gpu, std::nullopt, then);
                   });
}
void Control::evict(Caller caller, std::int64_t id, std::string why, Then<lease::Lease> then) {
  auto& inside = *inside_;
  command<lease::Lease>(inside, then,
                        [&inside, caller = std::move(caller), id, why = std::move(why), then](Turn& turn) {
                          inside.evict(turn, caller, id, why, then);
                        });
}
void Control::reload(Caller caller, Then<bool> then) {
  auto& inside = *inside_;
  command<bool>(inside, then, [&inside, caller = std::move(caller), then](Turn& turn) {
    inside.reread(turn, caller, then);
  });
}
void Control::refused(Caller caller, std::string verb, std::string what, std::string why) {
  auto& inside = *inside_;
  (void)inside.submit(
      {.run = [&inside, caller = std::move(caller), verb = std::move(verb), what = std::move(what),
               why = std::move(why)](Turn& turn) { inside.refused(turn, caller, verb, what, why); }});
}

Result<AuditReport> verify_audit(const std::filesystem::path& state) {
  BH_TRY(auto book, book::Book::open(state, book::Book::Access::read_only));
  auto lines = book->verify();
  if (lines.ok()) return AuditReport{.lines = *lines};
  if (lines.error().code() != Errc::corrupt) return std::move(lines).error();
  BH_TRY(const auto last, book->last_audit_id());
  return AuditReport{.lines = last, .broken = lines.error().message()};
}

Result<std::optional<std::string>> first_token(Control& control) {
  const Caller root{.user = "bulkhead", .role = access::Role::admin, .from = "first start"};
  std::promise<Answer<std::vector<User>>> listed;
  control.list_tokens(root, [&](Answer<std::vector<User>> answer) { listed.set_value(std::move(answer)); });
  const auto all = listed.get_future().get();
  if (const auto* refusal = std::get_if<Refusal>(&all)) return Error(Errc::unavailable, refusal->what);
  if (!std::get<0>(all).empty()) return std::optional<std::string>();
  std::promise<Answer<NewToken>> made;
  control.create_token(root,
                       {.user = "admin", .note = "made at the first start", .role = access::Role::admin},
                       [&](Answer<NewToken> answer) { made.set_value(std::move(answer)); });
  auto token = made.get_future().get();
  if (const auto* refusal = std::get_if<Refusal>(&token)) return Error(Errc::unavailable, refusal->what);
  return std::optional<std::string>(std::get<0>(token).secret);
}

}  // namespace bulkhead::control
