// What others of this process ask of the loop: lines in its log, the driver for themselves, starts that wait.
#include <algorithm>
#include <thread>

#include "base/clock.hpp"
#include "engine/control/inside.hpp"

namespace bulkhead::control {

namespace {
constexpr std::chrono::milliseconds looks_up{20};      // whether the control ends, while it sleeps
constexpr std::chrono::milliseconds longest{600'000};  // nobody waits longer for a turn
}  // namespace

void Control::note(Caller caller, std::string verb, std::string what, std::string tenant, Json body) {
  auto& inside = *inside_;
  (void)inside.submit(
      {.run = [&inside, caller = std::move(caller), verb = std::move(verb), what = std::move(what),
               tenant = std::move(tenant), body = std::move(body)](
                  Turn& turn) { inside.note(turn, caller, verb, what, tenant, "done", body); },
       .failed = [](const Refusal&) {},
       .idle = true});
}

void Control::alone(const std::function<void()>& work) {
  inside_->gate.alone([&] {
    work();
    return 0;
  });
}

void Control::on_start(std::function<std::chrono::milliseconds(const lease::Lease&)> ask) {
  const std::lock_guard hold(inside_->starts_mutex);
  if (ask && !inside_->turns) inside_->turns = std::make_unique<Lane>(1);
  inside_->starts = std::move(ask);
}

std::chrono::milliseconds Control::Inside::starts_in(const lease::Lease& lease) const {
  const std::lock_guard hold(starts_mutex);
  return starts ? std::clamp(starts(lease), std::chrono::milliseconds(0), longest)
                : std::chrono::milliseconds(0);
}

// Turns come in the order in which they were given, so one thread sleeps for all of them.
void Control::Inside::wait_turn(Turn& turn, std::int64_t id, std::chrono::milliseconds time,
                                const Result<std::vector<slice::Device>>& made) {
  Entry entry = entries.at(id);
  entry.at_work = true;  // nobody prepares it again meanwhile
  entry.waited = true;
  const auto lease = entry.lease;
  set_entry(turn, id, std::move(entry));
  const std::uint64_t until = monotonic_ns() + static_cast<std::uint64_t>(time.count()) * 1'000'000;
  turn.after.push_back([this, id, until, made, lease] {
    turns->put([this, id, until, made, lease] {
      while (monotonic_ns() < until) {
        {
          const std::lock_guard hold(mutex);
          if (ending) return;  // it is `preparing` in the book: the next start goes on with it
        }
        std::this_thread::sleep_for(std::min<std::chrono::nanoseconds>(
            looks_up, std::chrono::nanoseconds(until - std::min(until, monotonic_ns()))));
      }
      // Nobody had it when it was chosen; somebody of the host may have come to it since.
      std::vector<slice::Held> held;
      for (const auto& part : lease->parts) held.push_back({*lease, part});
      const auto clean = gate.shared([&] { return slice::clean(hands, held); });
      Result<std::vector<slice::Device>> result = made;
      if (!clean.ok())
        result = clean.error();
      else if (std::find(clean->begin(), clean->end(), false) != clean->end())
        result = Error(Errc::in_use, "somebody came to it while it waited for its turn to start");
      later({.run = [this, id, result](Turn& later_turn) { prepared(later_turn, id, result, true); },
             .ours = true});
    });
  });
}

}  // namespace bulkhead::control
