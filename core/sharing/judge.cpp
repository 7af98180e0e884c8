// The judge: what must never be in a plan, read off the plan alone. It shares no arithmetic with decide(), so
// that one wrong thought is not made twice.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "core/sharing/sharing.hpp"

namespace bulkhead::sharing {

namespace {

struct Pair {
  const Tenant* tenant;
  const Line* line;
  bool first;  // treated as interactive
};

double as_double(std::uint64_t value) { return static_cast<double>(value); }
double weight_of(const Tenant& t) {
  const double weight = std::clamp(t.weight, 1U, 1000U);
  return t.cls == Class::background ? weight / 20 : weight;
}
bool capped(const Tenant& t) { return t.ceiling && *t.ceiling < 100; }

}  // namespace

std::vector<std::string> plan_problems(std::span<const Tenant> tenants, const Costs& costs,
                                       const Plan& plan) {
  std::vector<std::string> out;
  const auto say = [&]<class... Args>(fmt::format_string<Args...> format, Args&&... args) {
    if (out.size() < 32) out.push_back(fmt::format(format, std::forward<Args>(args)...));
  };
  if (plan.lines.size() != tenants.size()) {
    say("{} lines for {} tenants", plan.lines.size(), tenants.size());
    return out;
  }
  const double change = as_double(std::clamp<std::uint64_t>(costs.switch_us, 20, 2000));
  const double off = as_double(std::clamp<std::uint64_t>(costs.off_us, 50, 2000));
  const double on = as_double(std::clamp<std::uint64_t>(costs.on_us, 50, 2000));
  const double late = off > on ? off - on : 0;

  std::vector<Pair> running;
  double weights = 0, expected = 0;
  bool any_ceiling = false;
  for (std::size_t i = 0; i < tenants.size(); ++i) {
    const Line& line = plan.lines[i];
    if (line.id != tenants[i].id) say("line {} is not tenant {}'s", line.id, tenants[i].id);
    if (!tenants[i].running) {
      if (line.in_turns || line.expected > 0)
        say("tenant {} has nothing on the GPU and a part of it", line.id);
      if (as_double(line.slice_us) <= 2 * change)
        say("tenant {} would begin with a slice of {} us", line.id, line.slice_us);
      continue;
    }
    running.push_back({&tenants[i], &line, false});
    weights += weight_of(tenants[i]);
    expected += line.expected;
    any_ceiling = any_ceiling || capped(tenants[i]);
  }
  if (expected > 1.000001) say("{:.4f} of the GPU is given away", expected);
  std::size_t interactive = 0;
  for (Pair& p : running) {
    const double share = weight_of(*p.tenant) / weights;
    const bool too_busy = running.size() > 1 && p.tenant->busy.value_or(0) > 0.9 * share;
    p.first = p.tenant->cls == Class::interactive && !too_busy;
    interactive += p.first ? 1 : 0;
    if (p.line->demoted != (p.tenant->cls == Class::interactive && too_busy)) {
      say("tenant {}: busy and weight do not agree with how it is treated", p.line->id);
    }
    if (p.line->expected <= 0) say("tenant {} gets nothing", p.line->id);
  }
  const bool strict = !costs.slices_obeyed && running.size() > 1;

  // Slices: who is on together with whom.
  std::size_t together = 0, in_turns = 0;
  double slices = 0;
  for (const Pair& p : running) {
    in_turns += p.line->in_turns ? 1 : 0;
    together += !p.first && !p.line->in_turns ? 1 : 0;
    if (!p.line->in_turns) slices += as_double(p.line->slice_us);
  }
  for (const Pair& p : running) {
    const double slice = as_double(p.line->slice_us);
    const bool company = !p.line->in_turns && (together > 1 || in_turns > 0);
    if (!strict && !p.first && company && slice < 4 * change) {
      say("tenant {}: a slice of {} us among several busy ones is lost in switching", p.line->id,
          p.line->slice_us);
    }
    if (!strict && !p.first && interactive > 0 && slice > std::max(1000.0, 5 * change)) {
      say("tenant {}: a slice of {} us starves an interactive tenant", p.line->id, p.line->slice_us);
    }
    if (!strict && !costs.pauses_obeyed && p.line->in_turns && slice < 4 * change) {
      say("tenant {}: turns may not hold here, and its slice of {} us is lost in switching", p.line->id,
          p.line->slice_us);
    }
    if (p.first && interactive > 1 && slice < 4 * change)
      say("tenant {}: waits to no end for others", p.line->id);
    if (p.line->slice_us == 0 || slice > 100'000)
      say("tenant {}: a slice of {} us", p.line->id, p.line->slice_us);
    if (p.line->demoted && !p.line->in_turns && running.size() > 1 && !strict) {
      const double fair = weight_of(*p.tenant) / weights + 0.01,
                   most = any_ceiling ? std::max(0.991, fair) : fair;
      if (plan.refused.empty() && slice / slices > most)
        say("tenant {}: busy, and starves the others", p.line->id);
    }
    if (strict && !p.line->in_turns)
      say("tenant {}: this driver obeys no slices and it has no turn", p.line->id);
  }
  if (in_turns > 0 && together > 0) say("one best-effort tenant is always on beside the turns");

  // Turns: one at a time, each long enough, nobody waiting for long.
  if (in_turns > 0) {
    std::vector<std::pair<std::uint64_t, std::uint64_t>> turns;
    for (const Pair& p : running) {
      if (!p.line->in_turns) continue;
      turns.emplace_back(p.line->offset_us, p.line->turn_us);
      if (as_double(p.line->turn_us) < 2 * (off + on))
        say("tenant {}: a turn of {} us", p.line->id, p.line->turn_us);
      if (p.first && !strict) say("tenant {}: interactive, and has to wait for its turn", p.line->id);
    }
    std::sort(turns.begin(), turns.end());
    std::uint64_t end = 0;
    for (const auto& [from, length] : turns) {
      if (from < end) say("two turns at once at {} us", from);
      if (from > end) say("nobody's turn at {} us", end);
      end = from + length;
    }
    if (end > plan.round_us) say("the turns outlast their round");
    if (end + turns.size() < plan.round_us && !any_ceiling) say("the round is nobody's after {} us", end);
    // Ceilings make small turns that may not be shortened further.
    const double longest = any_ceiling ? 2'400'000 : 2'000'100;
    if (as_double(plan.round_us) > std::max(longest, 16 * (off + on) * static_cast<double>(turns.size()))) {
      say("a round of {} us: somebody waits too long", plan.round_us);
    }
  }

  // Ceilings hold on an idle GPU, where nobody else holds them.
  for (const Pair& p : running) {
    if (!capped(*p.tenant)) continue;
    const double most = std::max(1U, *p.tenant->ceiling) / 100.0 + 1e-9;
    double part = 1;
    if (p.line->in_turns) part = (as_double(p.line->turn_us) + late) / as_double(plan.round_us);
    if (p.line->duty_period_us > 0)
      part = (as_double(p.line->duty_on_us) + late) / as_double(p.line->duty_period_us);
    if (part > most) say("tenant {}: {:.4f} of the time, above its ceiling", p.line->id, part);
    if (p.line->expected > most) say("tenant {}: promised more than its ceiling", p.line->id);
    if (p.line->duty_period_us > 0 && (p.line->duty_on_us == 0 || p.line->duty_period_us > 1'000'000)) {
      say("tenant {}: on for {} of {} us", p.line->id, p.line->duty_on_us, p.line->duty_period_us);
    }
  }

  // Shares, where nothing but weights decides.
  if (plan.refused.empty() && !any_ceiling) {
    const auto check = [&](auto among, auto length) {
      double all = 0, weight = 0;
      for (const Pair& p : running) {
        if (!among(p)) continue;
        all += as_double(length(p));
        weight += weight_of(*p.tenant);
      }
      for (const Pair& p : running) {
        if (!among(p)) continue;
        const double got = as_double(length(p)) / all, asked = weight_of(*p.tenant) / weight;
        if (std::abs(got - asked) > 0.01)
          say("tenant {}: {:.4f} asked, {:.4f} given", p.line->id, asked, got);
      }
    };
    if (interactive == 0 && !strict) {
      check([](const Pair&) { return true; }, [](const Pair& p) { return p.line->slice_us; });
    }
    // Idle ones left theirs to the others.
    const bool nobody_busy = std::all_of(running.begin(), running.end(), [](const Pair& p) {
      return !p.line->in_turns || p.tenant->busy.value_or(1) < 0.008;
    });
    check(
        [&](const Pair& p) {
          return p.line->in_turns && (nobody_busy || p.tenant->busy.value_or(1) >= 0.008);
        },
        [](const Pair& p) { return p.line->turn_us; });
  }

  // The wait that the plan admits to is the wait that its slices make.
  if (!strict) {
    for (const Pair& p : running) {
      if (!p.first) continue;
      double wait = 0, widest = 0;
      for (const Pair& other : running) {
        if (&other == &p) continue;
        const double one = as_double(other.line->slice_us) + change;
        if (other.line->in_turns) {
          widest = std::max(widest, one);
        } else {
          wait += one;
        }
      }
      wait += 2 * widest + as_double(p.line->duty_period_us - p.line->duty_on_us);
      if (wait > as_double(plan.longest_wait_us) + 1) {
        say("tenant {}: can wait {:.0f} us where the plan says {}", p.line->id, wait, plan.longest_wait_us);
      }
    }
  }
  return out;
}

}  // namespace bulkhead::sharing
