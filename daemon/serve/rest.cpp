#include "daemon/serve/rest.hpp"

#include <sys/prctl.h>

#include <algorithm>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/text.hpp"

namespace bulkhead::serve {

namespace {
constexpr std::uint64_t second_ns = 1'000'000'000;
}  // namespace

Rest::Rest(LetGo let_go, control::Control& control, Log& log)
    : let_go_(std::move(let_go)), control_(control), log_(log), thread_([this] { serve(); }) {}

void Rest::end() {
  {
    const std::lock_guard hold(mutex_);
    ending_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

Status Rest::hold(const std::string& name, std::chrono::seconds time, Then then) {
  {
    const std::lock_guard hold(mutex_);
    if (ending_) return Error(Errc::unavailable, "the daemon is ending");
    if (held_.size() >= most && !held_.contains(name))
      return Error(Errc::no_capacity, fmt::format("{} rests are held already", most));
    auto& its = held_[name];
    its.until = std::max(its.until, monotonic_ns() + static_cast<std::uint64_t>(time.count()) * second_ns);
    // Who asks again and again without waiting for the answer keeps the last questions alone.
    if (its.asked.size() >= most) its.asked.erase(its.asked.begin());
    its.asked.push_back(std::move(then));
  }
  wake_.notify_all();
  return ok_status();
}

bool Rest::release(const std::string& name) {
  bool was = false;
  std::vector<Then> late;
  {
    const std::lock_guard hold(mutex_);
    if (const auto at = held_.find(name); at != held_.end()) {
      late.swap(at->second.asked);
      held_.erase(at);
      was = true;
    }
  }
  for (const auto& then : late) then(Error(Errc::conflict, "the rest was ended before it began"));
  wake_.notify_all();
  return was;
}

std::size_t Rest::held() const {
  const std::lock_guard hold(mutex_);
  return held_.size();
}

bool Rest::fresh(const std::string& name) const {
  const std::lock_guard hold(mutex_);
  return !held_.contains(name);
}

std::uint64_t Rest::forget() {
  const std::uint64_t now = monotonic_ns();
  std::uint64_t last = 0;
  for (auto one = held_.begin(); one != held_.end();) {
    last = std::max(last, one->second.until);
    if (one->second.until > now) {
      ++one;
      continue;
    }
    log_.say(Log::Level::warning,
             fmt::format("telemetry rest {}: its time is over, nobody ended it", value(one->first, 64)));
    // Exchanges that nobody answers time out by themselves; here they would be answered under the lock.
    one = held_.erase(one);
  }
  return last;
}

void Rest::serve() {
  ::prctl(PR_SET_NAME, "bh-rest");
  while (true) {
    {
      std::unique_lock hold(mutex_);
      wake_.wait(hold, [this] { return ending_ || !held_.empty(); });
      if (ending_) return;
    }
    // Nobody of the daemon looks at the driver or changes it meanwhile; what is under way ends first.
    control_.alone([this] { rest(); });
  }
}

void Rest::rest() {
  {
    std::unique_lock hold(mutex_);
    (void)forget();  // while it waited for its turn
    if (ending_ || held_.empty()) return;
  }
  const bool gone = let_go_(true);
  log_.say(Log::Level::notice,
           fmt::format("telemetry rests{}", gone ? "" : ": the sampler did not let go of the driver"));
  while (true) {
    std::vector<Then> asked;
    {
      std::unique_lock hold(mutex_);
      const std::uint64_t last = forget();
      if (ending_ || held_.empty()) break;
      for (auto& [name, its] : held_)
        for (auto& then : its.asked) asked.push_back(std::move(then));
      for (auto& [name, its] : held_) its.asked.clear();
      if (asked.empty()) {
        const std::uint64_t now = monotonic_ns();
        (void)wake_.wait_for(hold, std::chrono::nanoseconds(last > now ? last - now : 0));
        continue;
      }
    }
    for (const auto& then : asked)
      then(gone ? ok_status()
                : Status(Error(Errc::in_use, "the sampler did not let go of the driver",
                               "it hangs in the kernel: bulkhead dmon says in which call")));
  }
  (void)let_go_(false);
  log_.say(Log::Level::notice, "telemetry goes on");
}

}  // namespace bulkhead::serve
