// What is wanted, done: on a thread of its own, because the executor and the driver take their time.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"
#include "core/plan/plan.hpp"
#include "edge/sysfs/sysfs.hpp"
#include "engine/execute/execute.hpp"
#include "engine/protect/protect.hpp"
#include "engine/share/share.hpp"

namespace bulkhead::protect {

namespace {

constexpr std::string_view verb = "protect";
constexpr std::string_view cordon_mark = "protection: ";
constexpr double again_after_s = 15;    // what failed is tried again
constexpr unsigned paused_percent = 1;  // never nothing: a program that gets no time at all seems to hang
// NVML takes a range; its lower end only has to be one that every part reaches when it idles.
constexpr std::uint32_t lowest_mhz = 210;

double now_s() { return static_cast<double>(monotonic_ns()) / 1e9; }

control::Caller caller() {
  return {.user = "bulkhead", .tenant = {}, .role = access::Role::admin, .from = "protection"};
}

bool is_ours(const std::optional<control::Cordon>& cordon) {
  return cordon && cordon->by == "bulkhead" && cordon->why.starts_with(cordon_mark);
}

std::string one_line(std::string text, std::size_t most) {
  text = printable(text, most);
  if (text.size() > most) text.resize(most);
  return text;
}

}  // namespace

// The journal is the memory: what stands there as done, or as begun, by this verb and this boot, and was not
// set back. A step that was cut off is settled by the next change before anything else.
Status Guardian::read_journal() {
  BH_TRY(boot_, sysfs::boot_id(settings_.access.root));
  auto entries = execute::history(settings_.access, std::nullopt);
  if (!entries.ok()) {
    if (entries.error().code() == Errc::not_found) return ok_status();
    return std::move(entries).error();
  }
  lowered_.clear();
  for (auto entry = entries->rbegin(); entry != entries->rend(); ++entry) {
    if (entry->run.verb != verb || entry->run.boot_id != boot_) continue;
    for (const auto& step : entry->steps) {
      const bool counts = step.state == store::StepState::done || step.state == store::StepState::intended;
      if (!counts || step.undoes) continue;
      const auto action = plan::action_from_json(step.action);
      if (!action.ok()) continue;
      if (const auto* limit = std::get_if<plan::SetPowerLimit>(&*action)) {
        auto& its = lowered_[limit->gpu.text];
        if (!its.limit_before) its.limit_before = limit->before;
        its.limit_set = limit->after;
        // Cut off on its way back, it may be back or not: then it is looked at once more.
        if (*its.limit_before == limit->after && step.state == store::StepState::done)
          its.limit_before.reset(), its.limit_set.reset();
      } else if (const auto* lock = std::get_if<plan::LockClocks>(&*action)) {
        auto& its = lowered_[lock->gpu.text];
        if (!its.clocks) its.clocks_before = lock->before;
        its.clocks = !(its.clocks_before == lock->after && step.state == store::StepState::done);
        its.clocks_set = lock->after;
      }
    }
  }
  std::erase_if(lowered_, [](const auto& its) { return its.second.nothing(); });
  for (const auto& [gpu, its] : lowered_) {
    unsigned rung = highest_rung(Action::hold) + 1;
    if (its.limit_before && its.limit_set && its.limit_before->count > 0) {
      const double part =
          static_cast<double>(its.limit_set->count) / static_cast<double>(its.limit_before->count);
      for (unsigned i = rung; i <= highest_rung(Action::power); ++i)
        if (part <= ladder()[i].part + 0.02) rung = i;
    }
    if (its.clocks) rung = highest_rung(Action::clocks);
    guard_.carry({gpu}, rung);
  }
  return ok_status();
}

void Guardian::put_doing(const Uuid& gpu, Doing doing, std::string words) {
  const std::lock_guard hold(mutex_);
  for (auto& measure : view_.measures) {
    if (measure.wanted.gpu != gpu) continue;
    measure.doing = doing;
    measure.words = std::move(words);
    if (const auto at = lowered_.find(gpu.text); at != lowered_.end()) {
      const auto& its = at->second;
      measure.limit_mw = its.limit_set ? std::optional(its.limit_set->count) : std::nullopt;
      measure.limit_before_mw = its.limit_before ? std::optional(its.limit_before->count) : std::nullopt;
      measure.clocks_mhz = its.clocks_set ? std::optional(its.clocks_set->high.count) : std::nullopt;
    } else {
      measure.limit_mw.reset();
      measure.limit_before_mw.reset();
      measure.clocks_mhz.reset();
    }
  }
  if (doing == Doing::failed) ++view_.failures;
  if (doing == Doing::done) ++view_.actions;
}

// ---- new leases
void Guardian::hold(const Wanted& wanted, const control::Snapshot& now) {
  for (const auto& gpu : now.gpus) {
    if (gpu.gpu != wanted.gpu) continue;
    if (wanted.hold && !gpu.cordon) {
      // Two lines of the log at most are lost when it is refused: it is asked again in a second.
      control_.cordon(caller(), gpu.gpu, one_line(std::string(cordon_mark) + wanted.why, control::most_why),
                      [](const auto&) {});
    } else if (!wanted.hold && is_ours(gpu.cordon)) {
      control_.uncordon(caller(), gpu.gpu, [](const auto&) {});
    }
  }
}

// ---- power limit and clocks
Status Guardian::set_limits(const Wanted& wanted) {
  Lowered next;
  if (const auto at = lowered_.find(wanted.gpu.text); at != lowered_.end()) next = at->second;
  std::vector<std::string> remarks;
  execute::Options options{.access = settings_.access, .verb = std::string(verb), .lock_wait_ms = 10'000};
  options.access.only = {wanted.gpu};
  const execute::Make make = [&](const inventory::Host& host,
                                 const plan::Remembered& remembered) -> Result<execute::Wanted> {
    const auto at = std::find_if(host.gpus.begin(), host.gpus.end(),
                                 [&](const inventory::Gpu& gpu) { return gpu.uuid == wanted.gpu; });
    if (at == host.gpus.end())
      return Error(Errc::gone,
                   fmt::format("the driver does not show {} any more", printable(wanted.gpu.text, 64)));
    if (at->mig_capable && at->mig_now != at->mig_pending)
      return Error(Errc::conflict, "a change of its MIG mode waits for a reset");
    // Nothing but limits: with a dynamic layout nobody's instances are touched, and a lock that the node file
    // wanted stays.
    spec::GpuRule rule;
    rule.select.uuid = {wanted.gpu};
    rule.mode = at->mig_now ? spec::Mode::mig : spec::Mode::exclusive;
    rule.dynamic = at->mig_now;
    std::optional<spec::ClockLock> locked;
    for (const auto& lock : remembered.clock_locks)
      if (lock.gpu == wanted.gpu) locked = lock.range;
    rule.clocks = locked;

    if (wanted.power || next.limit_before) {
      if (!at->power.limit)
        return Error(Errc::unavailable, "its power limit cannot be read: " + at->power.limit.why);
      const Milliwatts limit = *at->power.limit;
      // Somebody else's word since: that is what will be gone back to, or left alone.
      const bool theirs = next.limit_before && limit != *next.limit_set && limit != *next.limit_before;
      if (wanted.power) {
        const Milliwatts before = next.limit_before && !theirs ? *next.limit_before : limit;
        const double part = static_cast<double>(before.count) * *wanted.power;
        Milliwatts target(static_cast<std::uint64_t>(std::llround(part / 1000)) * 1000);
        if (at->power.limit_min) target = std::max(target, *at->power.limit_min);
        target = std::min(target, before);
        rule.power_limit = target;
        next.limit_before = before;
        next.limit_set = target;
      } else {
        if (theirs)
          remarks.push_back(
              fmt::format("somebody set its power limit to {} W meanwhile: left so", limit.count / 1000));
        else
          rule.power_limit = next.limit_before;
        next.limit_before.reset();
        next.limit_set.reset();
      }
    }
    if (wanted.clocks || next.clocks) {
      const bool theirs = next.clocks && locked != next.clocks_set && locked != next.clocks_before;
      if (wanted.clocks) {
        if (!at->clocks_max || at->clocks_max->graphics.count == 0)
          return Error(Errc::unavailable, "its highest clock cannot be read");
        if (!next.clocks || theirs) next.clocks_before = locked;
        const auto high = static_cast<std::uint32_t>(at->clocks_max->graphics.count * *wanted.clocks);
        const spec::ClockLock lock{Megahertz(std::min(lowest_mhz, high)), Megahertz(high)};
        const bool already = next.clocks_before && next.clocks_before->high <= lock.high;
        rule.clocks = already ? next.clocks_before : std::optional(lock);
        next.clocks_set = rule.clocks;
        next.clocks = true;
      } else {
        if (theirs)
          remarks.push_back("somebody locked its clocks otherwise meanwhile: left so");
        else
          rule.clocks = next.clocks_before;
        next.clocks = false;
        next.clocks_before.reset();
        next.clocks_set.reset();
      }
    }
    execute::Wanted out;
    out.node.gpus.push_back(rule);
    out.text = fmt::format("# bulkhead protection: {}\n# {}\n{}",
                           wanted.rung == 0 ? "all taken back" : std::string(ladder()[wanted.rung].what),
                           one_line(wanted.why, 400), spec::to_yaml(out.node));
    return out;
  };
  std::optional<Result<execute::Outcome>> done;
  control_.alone([&] { done.emplace(execute::alter(options, make)); });
  if (!done->ok()) return std::move(*done).error();
  const auto& outcome = **done;
  switch (outcome.verdict) {
    case execute::Verdict::nothing_to_do:
    case execute::Verdict::applied:
      break;
    case execute::Verdict::refused: {
      std::vector<std::string> whys;
      for (const auto& reason : outcome.proposal->refusal()->reasons)
        whys.push_back(fmt::format("{}: {}", reason.subject, reason.why));
      return Error(Errc::conflict, join(whys, "; "));
    }
    default:
      return Error(outcome.code.value_or(Errc::conflict),
                   outcome.failure.empty() ? "it reads back otherwise: " + join(outcome.remaining, "; ")
                                           : outcome.failure,
                   outcome.hint);
  }
  if (next.nothing())
    lowered_.erase(wanted.gpu.text);
  else
    lowered_[wanted.gpu.text] = next;
  Json body{{"rung", wanted.rung}, {"why", one_line(wanted.why, 400)}};
  if (outcome.run) body["run"] = *outcome.run;
  if (next.limit_set) body["powerLimitMilliwatts"] = next.limit_set->count;
  if (next.clocks_set) body["clocksMhz"] = next.clocks_set->high.count;
  for (const auto& remark : remarks) body["remarks"].push_back(remark);
  if (outcome.run || !remarks.empty())
    control_.note(caller(), wanted.power || wanted.clocks ? "limited" : "unlimited", "gpu/" + wanted.gpu.text,
                  "", std::move(body));
  return ok_status();
}

void Guardian::lower(const Wanted& wanted) {
  const bool something = wanted.power || wanted.clocks || lowered_.contains(wanted.gpu.text);
  if (!something) return;
  auto& again = again_at_[wanted.gpu.text];
  if (now_s() < again) return;
  put_doing(wanted.gpu, Doing::under_way);
  if (const auto done = set_limits(wanted); !done.ok()) {
    again = now_s() + again_after_s;
    put_doing(wanted.gpu, Doing::failed, done.error().message());
    return;
  }
  again = 0;
  put_doing(wanted.gpu, Doing::done);
}

// ---- background shares
void Guardian::pause(const std::vector<Wanted>& wanted) {
  std::set<std::string> where;
  for (const auto& one : wanted)
    if (one.pause) where.insert(one.gpu.text);
  if (where.empty() && paused_.empty()) return;
  const share::Place place{.root = settings_.access.root, .nvml_library = settings_.access.nvml_library};
  const auto tenants = share::list(place);
  if (!tenants.ok()) return;
  auto next = paused_;
  struct Change {
    std::string name = {};
    std::optional<unsigned> ceiling = {};
  };
  std::vector<Change> changes;
  for (const auto& tenant : *tenants) {
    const auto& asked = tenant.asked;
    const auto known = next.find(asked.name);
    if (tenant.alive && asked.cls == sharing::Class::background && where.contains(asked.gpu)) {
      if (known != next.end()) continue;
      next[asked.name] = {.gpu = asked.gpu, .ceiling = asked.ceiling};
      changes.push_back({asked.name, paused_percent});
    } else if (known != next.end() && !where.contains(known->second.gpu)) {
      // Somebody who set it since has the last word.
      if (asked.ceiling == std::optional(paused_percent))
        changes.push_back({asked.name, known->second.ceiling});
    }
  }
  std::erase_if(next, [&](const auto& one) { return !where.contains(one.second.gpu); });
  const auto keep = [&](const std::map<std::string, Paused>& what) {
    Json out = Json::object();
    for (const auto& [name, one] : what)
      out[name] = Json{{"gpu", one.gpu}, {"ceiling", one.ceiling ? Json(*one.ceiling) : Json(nullptr)}};
    return write_file_atomic(settings_.state / "protect-paused.json", dump(out) + "\n", 0600).ok();
  };
  // What was is written down before it is changed; what is over is forgotten after.
  auto both = paused_;
  both.insert(next.begin(), next.end());
  if (changes.empty() && both.size() == next.size()) return;
  if (!keep(both)) return;
  for (const auto& change : changes) {
    const auto set = share::set(place, change.name, [&](share::Asked& asked) {
      asked.ceiling = change.ceiling;
      return ok_status();
    });
    const bool down = change.ceiling == std::optional(paused_percent);
    control_.note(caller(), down ? "pause" : "resume", "share/" + printable(change.name, 100), "",
                  set.ok() ? Json::object() : Json{{"failed", set.error().message()}});
  }
  paused_ = next;
  (void)keep(paused_);
}

// ---- leases that have to go
void Guardian::end_leases(const Wanted& wanted, const control::Snapshot& now) {
  if (!wanted.drain && !wanted.fence) return;
  for (const auto& [id, lease] : now.leases) {
    if (lease->state != lease::State::active && lease->state != lease::State::preparing) continue;
    const bool here = std::any_of(lease->parts.begin(), lease->parts.end(),
                                  [&](const lease::Part& part) { return part.gpu == wanted.gpu; });
    if (!here || evicted_.contains(id) || !(wanted.fence || lease->ask.preemptible)) continue;
    if (evicted_.size() > 10'000) evicted_.clear();
    evicted_.insert(id);
    double wait = 0;
    {
      const std::lock_guard hold(mutex_);
      const auto draw = draws_.find(wanted.gpu.text);
      wait = draw == draws_.end() ? 0 : ramp_.ask(-draw->second.first, now_s());
    }
    {
      std::unique_lock hold(mutex_);
      wake_.wait_for(hold, std::chrono::duration<double>(std::min(wait, 10.0)), [this] { return ending_; });
      if (ending_) return;
    }
    control_.evict(caller(), id, one_line(std::string(cordon_mark) + wanted.why, control::most_why),
                   [](const auto&) {});
  }
}

void Guardian::work() {
  // By GPU: what was last made so, so that nothing is asked of the driver while nothing changes.
  std::map<std::string, std::pair<std::optional<double>, std::optional<double>>> made;
  while (true) {
    std::vector<Wanted> wanted;
    bool act = false, read = false;
    {
      std::unique_lock hold(mutex_);
      wake_.wait_for(hold, std::chrono::seconds(1), [this] { return ending_ || work_; });
      if (ending_) break;
      work_ = false;
      wanted = wanted_;
      act = guard_.settings().mode == spec::Protect::Mode::act;
      std::swap(read, reload_);
    }
    if (read) read_settings();
    if (wanted.empty()) continue;
    if (!act) {
      // Nothing is wanted; what was in force when the mode was changed, or by a predecessor, is taken back.
      for (auto& one : wanted) one = Wanted{.gpu = one.gpu, .index = one.index, .why = "mode: observe"};
    }
    const auto now = control_.now();
    for (const auto& one : wanted) {
      hold(one, *now);
      const auto state = std::pair(one.power, one.clocks);
      const auto was = made.find(one.gpu.text);
      const bool known = was != made.end() && was->second == state;
      if (!known) {
        lower(one);
        const auto again = again_at_.find(one.gpu.text);
        if (again == again_at_.end() || again->second == 0) made[one.gpu.text] = state;
      }
      if (act && one.rung > 0 && known) {
        const std::lock_guard locked(mutex_);
        for (auto& measure : view_.measures)
          if (measure.wanted.gpu == one.gpu && measure.doing == Doing::nothing) measure.doing = Doing::done;
      }
      end_leases(one, *now);
    }
    pause(wanted);
    std::map<std::string, Reference> references;
    {
      const std::lock_guard locked(mutex_);
      if (now_s() - kept_at_ > 600) {
        references = guard_.references();
        kept_at_ = now_s();
      }
    }
    if (!references.empty()) {
      Json out = Json::object();
      for (const auto& [gpu, reference] : references) {
        Json levels = Json::array();
        for (const auto& [number, level] : reference.levels)
          levels.push_back({{"level", number}, {"seconds", level.seconds}, {"celsius", level.celsius}});
        out[gpu] = Json{{"inlet", reference.with_inlet}, {"levels", levels}};
      }
      (void)write_file_atomic(settings_.state / "protect-cooling.json", dump(out) + "\n", 0600);
    }
  }
}

}  // namespace bulkhead::protect
