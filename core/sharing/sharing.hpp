// Who gets how much of a GPU's time, and how: a pure function from tenants to time slices, turns and duty
// cycles. Every arbiter of a host computes it from the same table and carries out its own tenant's line:
// there is no arbiter of arbiters to lose. The cost model behind the numbers: docs/design/sharing.md.
//
// Three tools (measured on an H100, docs/design/sharing.md):
// - slice: the GPU's own scheduler runs busy groups in a round, each for its slice; a switch costs ~0.2 ms
// - turn: only the group whose turn it is is on, the others' channels are disabled (0.4 ms off, 0.25 ms on)
// - duty: a group is on for part of each period: a hard ceiling, also on an idle GPU
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"

namespace bulkhead::sharing {

enum class Class {
  interactive,  // mostly idle, wants the GPU at once when it has work
  batch,        // busy; wants its share
  background,   // what nobody else wants, but never nothing
};
std::string_view name_of(Class c);
Result<Class> parse_class(std::string_view text);  // error lists the names

inline constexpr unsigned min_weight = 1, max_weight = 1000;

struct Tenant {
  std::uint64_t id = 0;
  Class cls = Class::batch;
  unsigned weight = 100;
  // Percent of the GPU's time, 1..99, not to be exceeded even on an idle GPU.
  std::optional<unsigned> ceiling = {};
  std::optional<std::uint64_t> latency_us = {};  // interactive: the longest wait for others that it accepts
  bool running = false;                          // has a compute channel group now
  // Measured share of the GPU's time, 0..1, smoothed by the caller over a second or two. nullopt: not known
  // yet, and the tenant is taken at its word; a caller that cannot measure passes 1.0 for interactive tenants
  // once that time is over.
  std::optional<double> busy = {};
};

// An interactive tenant that uses more than this part of what its weight entitles it to is shared like batch.
// Below one, so that a tenant which shares by weight and is busy still measures above it: the rule needs no
// memory and does not flap.
inline constexpr double busy_part = 0.9;
// A tenant in turns that uses less of the GPU than this is idle: its turn shrinks to `idle_turn` of the
// round, more than twice this, so that it is seen when it has work again.
inline constexpr double idle_below = 0.008, idle_turn = 0.02;
// The weight of a background tenant counts one part of this many.
inline constexpr unsigned background_part = 20;

// What switching costs on this GPU. Defaults: H100, driver 580 (measured). `share selftest` measures anew.
struct Costs {
  std::uint64_t switch_us = 200;
  std::uint64_t off_us = 400, on_us = 250;  // disabling and enabling a group's channels
  bool slices_obeyed = true;                // the driver's answer to the self-test
  bool pauses_obeyed = true;
};

// What one tenant is held to. Slices in microseconds.
struct Line {
  std::uint64_t id = 0;
  std::uint64_t slice_us = 0;    // never below what makes progress: see plan_problems()
  bool in_turns = false;         // on only in its turn
  std::uint64_t turn_us = 0;     // length of its turn in the round of turns
  std::uint64_t duty_on_us = 0;  // ceiling: on for this much of each period; 0: none
  std::uint64_t duty_period_us = 0;
  std::uint64_t offset_us = 0;  // where in the round of turns, or in its duty period, it comes on
  bool demoted = false;         // interactive, but too busy for it: shares by weight
  bool alone = false;           // nobody to share with: its groups need not divide anything
  double expected = 0;          // share of the GPU's time it gets when every running tenant is busy, 0..1
  std::string why = {};         // one sentence for `share list`
};

struct Plan {
  std::vector<Line> lines;  // one a tenant, in the order given
  // The turns, one after another; 0: nobody takes turns. Longer than their sum only where ceilings leave a
  // part to nobody.
  std::uint64_t round_us = 0;
  // How long a tenant treated as interactive can wait for the GPU; 0: there is none.
  std::uint64_t longest_wait_us = 0;
  // What was asked and cannot be: weights that leave too little, bounds too tight. The lines are what comes
  // nearest and is safe.
  std::vector<std::string> refused;
};

// Deterministic; independent of the order of tenants except for the order of lines.
Plan decide(std::span<const Tenant> tenants, const Costs& costs);

// The measured loss model: part of the GPU's time that goes into switching when busy groups take slices of
// this length.
double switching_loss(double slice_us, const Costs& costs);

// Whether `id` may be on the GPU at `monotonic_ns`, and until when that stays so (absolute ns; UINT64_MAX:
// for ever). Turns and duty periods are counted from the monotonic clock's zero, so that arbiters agree
// without talking.
struct Moment {
  bool on = true;
  std::uint64_t until_ns = UINT64_MAX;
};
Moment at(const Plan& plan, std::uint64_t id, std::uint64_t monotonic_ns);

// The driver's scheduler knows groups, not tenants: each group of a tenant takes a slice of its own. So a
// tenant's groups divide its slice while each part still makes progress; beyond that they are on one at a
// time, each in a tenant's whole turn or period. `busy_groups`: those that had work lately; the idle ones
// stay on and take nothing.
struct GroupLine {
  std::uint64_t slice_us = 0;  // of each group
  bool one_at_a_time = false;  // then group_at() says which
};
GroupLine group_line(const Line& line, unsigned busy_groups, const Costs& costs);
// Like at(), for the busy group number `index` of its tenant, counted in an order that stays.
Moment group_at(const Plan& plan, std::uint64_t id, const GroupLine& line, unsigned index,
                unsigned busy_groups, std::uint64_t monotonic_ns);

// What would starve somebody; empty for every plan decide() makes. The property tests' judge.
std::vector<std::string> plan_problems(std::span<const Tenant> tenants, const Costs& costs, const Plan& plan);

}  // namespace bulkhead::sharing
