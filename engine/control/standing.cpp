// Where a lease stands in the queue, in words that name no other tenant.
#include <fmt/format.h>

#include "base/text.hpp"
#include "engine/control/inside.hpp"

namespace bulkhead::control {

namespace {

std::string why_of(const fairness::Waiting& waiting) {
  using fairness::Why;
  switch (waiting.why) {
    case Why::goes_next:
      return "it goes next";
    case Why::behind_others:
      return "other tenants, which hold less for their weight or came first, go before it";
    case Why::behind_own:
      return "others of its own tenant go before it";
    case Why::limit:
      return "its tenant holds as much as it may";
    case Why::capacity:
      return "not enough of what it asks for is free";
    case Why::reserved:
      return "what is free is kept for one that has waited long";
    case Why::borrowing:
      return "its tenant has its part already, and what is free is for tenants that have less than theirs";
    case Why::held:
      return waiting.held == "no room" || waiting.held.empty() ? "nothing that is free fits it"
                                                               : waiting.held;
  }
  return {};
}

}  // namespace

void Control::Inside::standing(Turn& turn, const Caller& caller, std::int64_t id,
                               const Then<Standing>& then) {
  const auto answer = [&](Answer<Standing> what) {
    turn.after.push_back([then, what = std::move(what)] { then(what); });
  };
  std::shared_ptr<const lease::Lease> lease;
  if (auto no = find_lease(caller, access::Verb::read, id, std::nullopt, lease))
    return answer(std::move(*no));
  Standing out{.state = lease->state};
  const auto waiting = fair->waits(static_cast<std::uint64_t>(id), turn.now.time_since_epoch().count());
  if (lease->state == lease::State::queued && waiting.ok()) {
    out.ahead = waiting->ahead;
    out.own = waiting->own;
    out.tenants_ahead = waiting->tenants_ahead;
    out.waiting = waiting->pending;
    out.why = live.draining           ? "the host is draining: nothing new is granted"
              : !host_seen            ? "the host cannot be looked at now"
              : !live.trouble.empty() ? trouble_for(caller)
                                      : why_of(*waiting);
  }
  answer(std::move(out));
}

}  // namespace bulkhead::control
