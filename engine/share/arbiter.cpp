#include "engine/share/arbiter.hpp"

#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/inotify.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <map>
#include <set>

#include "base/clock.hpp"
#include "edge/process/process.hpp"
#include "edge/rm/rm.hpp"
#include "engine/share/auditor.hpp"

namespace bulkhead::share {

namespace {

constexpr std::uint64_t us = 1000, ms = 1'000'000, second = 1'000'000'000;  // in ns
constexpr std::uint64_t driver_default_slice_us = 2048;  // read back in running processes (H100)
constexpr std::uint64_t audit_every = 100 * ms, stats_every = second, busy_every = second / 2;
constexpr std::uint64_t assert_every = second;
constexpr std::uint64_t idle_after = 2500 * ms;
// The driver forgets a slice that is set before the channels are scheduled, and does not say when they are: a
// new group's slice is set and read back at these delays after it was seen, then every second.
constexpr std::uint64_t early_checks[] = {1 * ms,  2 * ms,  4 * ms,   8 * ms,  16 * ms,
                                          32 * ms, 64 * ms, 128 * ms, 500 * ms};
constexpr std::uint64_t unmeasured_after = 5 * second;
constexpr std::uint64_t reload_apart = 10 * ms;  // others' changes; a tenant may make any number of them
constexpr std::uint64_t beyond_tolerance =
    4ULL << 20U;  // two driver granules: NVML and ledger are read at different moments

using GroupKey = std::pair<std::uint32_t, std::uint32_t>;  // client, handle: unique on the host

struct GroupState {
  std::uint64_t wanted_us = 0;  // 0: leave the driver's own
  std::uint64_t seen_ns = 0, next_check_ns = 0;
  std::size_t checks = 0;
  bool settled = false;                 // read back as wanted since it was last changed
  bool on = true;                       // our own count of disables is 0 or 1
  std::vector<std::uint32_t> off = {};  // the channels disabled, while it is not on
  std::uint64_t born_ns = 0;
};

class Arbiter {
 public:
  explicit Arbiter(Duty duty) : duty_(std::move(duty)), place_(duty_.place), asked_(duty_.asked) {}

  Status run() {
    // The kernel rounds sleeps up by 50 us by default: turns are handed over by the clock.
    ::prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
    (void)::setpriority(PRIO_PROCESS, 0, -10);
    if (duty_.listener) {
      BH_TRY(hold_, hold::Hold::make(std::move(duty_.listener), *duty_.page,
                                     {.root = place_.root, .memory = true, .inflight = duty_.inflight}));
      for (const auto& group : hold_->groups())
        (void)hold_->force_on(group);  // a predecessor may have died in mid-turn
    }
    watch_.reset(::inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
    // A user's instances are few (128) and others use them too: without one, changes are seen each second.
    if (!watch_ || ::inotify_add_watch(watch_.get(), place_.run_dir().c_str(), IN_MOVED_TO | IN_DELETE) < 0)
      trouble(errno_error(fmt::format("watch {}", place_.run_dir().string()), errno).message());
    if (const auto remembered = remembered_costs(place_)) costs_ = *remembered;
    groups_changed(monotonic_ns());
    for (;;) {
      BH_TRY(const bool more, turn());
      if (!more) break;
    }
    if (!hold_) open_gate(true);  // children that are left
    duty_.entry.leave();
    return ok_status();
  }

 private:
  // ---- one round of the loop. False: the tenant is gone.
  Result<bool> turn() {
    pollfd wait[5] = {};
    nfds_t count = 0;
    const auto add = [&](int fd) { wait[count++] = {.fd = fd, .events = POLLIN, .revents = 0}; };
    add(watch_.get());
    if (hold_) {
      add(hold_->listener());
      add(hold_->processes_fd());
    } else {
      add(duty_.program_gone.get());
    }
    if (auditor_) add(auditor_->fd());
    std::uint64_t now = monotonic_ns();
    const std::uint64_t until = next_deadline();
    timespec timeout{};
    if (until > now) {
      timeout.tv_sec = static_cast<time_t>((until - now) / second);
      timeout.tv_nsec = static_cast<long>((until - now) % second);
    }
    if (::ppoll(wait, count, &timeout, nullptr) < 0 && errno != EINTR)
      return errno_error("arbiter: poll", errno);

    if (hold_) {
      if (auto pumped = hold_->pump(); !pumped.ok()) {
        if (pumped.error().code() == Errc::gone) return false;
        trouble(pumped.error().message());
        ::usleep(1000);  // what failed may be readable for ever
      }
      now = monotonic_ns();
      if (hold_->generation() != generation_) groups_changed(now);
    } else {
      if ((wait[1].revents & (POLLIN | POLLHUP)) != 0) return false;
      now = monotonic_ns();
      look_at_slots(now);
    }
    if ((wait[0].revents & POLLIN) != 0) {
      char events[4096];
      while (::read(watch_.get(), events, sizeof events) > 0) {
      }
      reload_due_ = std::min(reload_due_, std::max(now, reloaded_ns_ + reload_apart));
    }
    if (auditor_) audited(now);
    due(now);
    return true;
  }

  std::uint64_t next_deadline() const {
    std::uint64_t first = std::min(stats_due_, reload_due_);
    if (!groups_.empty() || !hold_) first = std::min(first, audit_due_);
    first = std::min(first, next_moment_ns_);
    for (const auto& [key, state] : groups_) first = std::min(first, state.next_check_ns);
    if (!hold_) first = std::min({first, gate_beat_due_, slots_due_});
    return first;
  }

  void due(std::uint64_t now) {
    if (now >= next_moment_ns_) apply_moments(now);
    check_slices(now);
    if (!hold_ && now >= gate_beat_due_) {
      duty_.page->arbiter_beat.store(now, std::memory_order_relaxed);
      gate_beat_due_ = now + 200 * ms;
    }
    if (now >= audit_due_) {
      audit_due_ = now + audit_every;
      if (!groups_.empty() || !hold_) {
        if (!auditor_) auditor_ = std::make_unique<Auditor>(place_.nvml_library);
        const bool busy = now >= busy_due_;
        if (busy) busy_due_ = now + busy_every;
        auditor_->look(busy);
      }
    }
    if (now >= reload_due_) reload(now);
    if (now >= stats_due_) {
      stats_due_ = now + stats_every;
      // Who cannot be measured is not taken at its word for ever.
      if (asked_.cls == sharing::Class::interactive && first_born_ns_ != 0 && busy_ != 1.0 &&
          now > std::max(first_born_ns_, busy_known_ns_) + unmeasured_after) {
        busy_ = 1.0;
        trouble("NVML does not say how busy this tenant is: shared like batch");
      }
      publish();
    }
  }

  // ---- what the tenant has
  void groups_changed(std::uint64_t now) {
    generation_ = hold_ ? hold_->generation() : 0;
    if (hold_) {
      std::set<GroupKey> present;
      for (const auto& group : hold_->groups()) {
        const GroupKey key{group.client, group.handle};
        present.insert(key);
        auto& state = groups_[key];
        if (state.seen_ns != 0 && state.born_ns == group.born_ns) continue;
        state = {};  // also one of the same name in the place of another
        state.born_ns = group.born_ns;
        state.seen_ns = now;
        state.next_check_ns = now;
        if (first_born_ns_ == 0) first_born_ns_ = now;
      }
      std::erase_if(groups_, [&](const auto& one) { return !present.contains(one.first); });
    }
    publish();                                          // others, and our own plan, read it from the registry
    stats_due_ = std::min(stats_due_, now + 200 * ms);  // what the new context took
    reload(now);
  }

  // A tenant of the guard has no listener: a slot with bytes in it says that it uses a GPU.
  void look_at_slots(std::uint64_t now) {
    if (now < slots_due_) return;
    slots_due_ = now + 20 * ms;
    std::set<std::uint32_t> gpus;
    std::uint64_t used = 0;
    std::map<std::uint32_t, std::optional<std::uint32_t>> looked;  // many slots may name one pid
    const auto gone = guard::release_dead(*duty_.page, [&](std::uint32_t pid, std::uint32_t start) {
      if (pid == 0 || pid > INT32_MAX) return false;
      const auto [entry, fresh] = looked.try_emplace(pid);
      if (fresh)
        if (const auto identity = process::look("/", static_cast<int>(pid)); identity.ok())
          entry->second = static_cast<std::uint32_t>(identity->start_time);
      return entry->second && (start == 0 || *entry->second == start);
    });
    dead_refused_ += gone.refused;
    dead_self_set_ += gone.self_set;
    for (const auto& slot : duty_.page->slots) {
      if (slot.owner.load(std::memory_order_relaxed) == 0) continue;
      for (std::uint32_t gpu = 0; gpu < guard::max_gpus; ++gpu) {
        const auto bytes = slot.used[gpu].load(std::memory_order_relaxed);
        used += bytes;
        if (bytes > 0) gpus.insert(gpu);
      }
    }
    slots_used_ = used;
    if (gpus == gated_gpus_) return;
    gated_gpus_ = std::move(gpus);
    publish();
    reload(now);
  }

  // ---- what the host wants
  void reload(std::uint64_t now) {
    reloaded_ns_ = now;
    reload_due_ = now + second;  // a tenant that was killed with its arbiter sends no event
    const auto all = read_all(place_, asked_.id);
    for (const auto& tenant : all) {
      if (tenant.asked.id == asked_.id) {
        asked_ = tenant.asked;
        for (auto& cap : duty_.page->cap)
          cap.store(asked_.memory ? asked_.memory->count : guard::no_cap, std::memory_order_relaxed);
      } else if (!tenant.alive) {
        set_free(tenant);
        forget(place_, tenant.asked.id);
      }
    }
    plans_.clear();
    std::set<std::uint32_t> gpus;
    if (hold_)
      for (const auto& group : hold_->groups()) gpus.insert(group.gpu);
    else
      gpus = gated_gpus_;
    for (const auto gpu : gpus) plans_[gpu] = plan_of(all, gpu, costs_).plan;
    if (hold_) {
      const auto busy = busy_groups();
      for (const auto& group : hold_->groups()) {
        auto& state = groups_[{group.client, group.handle}];
        const auto* line = line_on(group.gpu);
        const auto parts =
            line != nullptr ? sharing::group_line(*line, busy.at(group.gpu), costs_) : sharing::GroupLine{};
        const std::uint64_t wanted = costs_.slices_obeyed ? parts.slice_us : 0;
        if (wanted == state.wanted_us) continue;
        state.wanted_us = wanted;
        state.settled = false;
        state.checks = 0;
        state.next_check_ns = now;
      }
    }
    apply_moments(now);
    check_slices(now);
  }

  const sharing::Line* line_on(std::uint32_t gpu) const {
    const auto plan = plans_.find(gpu);
    if (plan == plans_.end()) return nullptr;
    for (const auto& line : plan->second.lines)
      if (line.id == asked_.id) return &line;
    return nullptr;
  }

  // The GPU's scheduler gives each group a slice, whoever owns it: a tenant's busy groups divide the
  // tenant's. NVML tells by process who had work lately; until it has said anything, every group counts.
  bool idle(const hold::Group& group) const {
    const auto known = process_busy_.find(group.pid);
    return known != process_busy_.end() && known->second.share < sharing::idle_below;
  }
  std::map<std::uint32_t, unsigned> busy_groups() const {  // by GPU, at least 1
    std::map<std::uint32_t, unsigned> counts;
    for (const auto& group : hold_->groups()) {
      auto& count = counts[group.gpu];
      if (!idle(group)) ++count;
    }
    for (auto& [gpu, count] : counts) count = std::max(count, 1U);
    return counts;
  }

  // ---- turns and duty
  void apply_moments(std::uint64_t now) {
    next_moment_ns_ = UINT64_MAX;
    if (!hold_) {
      bool open = !paused_;  // one gate for all of its GPUs: open where it is on everywhere
      for (const auto& [gpu, plan] : plans_) {
        const auto moment = sharing::at(plan, asked_.id, now);
        open = open && moment.on;
        next_moment_ns_ = std::min(next_moment_ns_, moment.until_ns);
      }
      open_gate(open);
      return;
    }
    std::map<std::uint32_t, unsigned> counted;
    const auto busy_here = busy_groups();
    for (const auto& group : hold_->groups()) {
      auto& state = groups_[{group.client, group.handle}];
      bool want_on = !paused_;
      if (const auto* line = line_on(group.gpu); line != nullptr && !paused_) {
        const auto& plan = plans_.find(group.gpu)->second;
        const unsigned busy = busy_here.at(group.gpu);
        const auto parts = sharing::group_line(*line, busy, costs_);
        // An idle group is on whenever its tenant is, and takes nothing.
        const auto moment = parts.one_at_a_time && !idle(group)
                                ? sharing::group_at(plan, asked_.id, parts, counted[group.gpu]++, busy, now)
                                : sharing::at(plan, asked_.id, now);
        want_on = moment.on;
        next_moment_ns_ = std::min(next_moment_ns_, moment.until_ns);
      }
      if (want_on && state.on) continue;
      // Off once each: a channel that the tenant made since its group went off is not off yet.
      hold::Group subject = group;
      if (!want_on && !state.off.empty())
        std::erase_if(subject.channels, [&](std::uint32_t channel) {
          return std::find(state.off.begin(), state.off.end(), channel) != state.off.end();
        });
      if (!want_on && !state.on && subject.channels.empty()) continue;
      const auto before = monotonic_ns();
      if (auto done = hold_->set_on(subject, want_on); !done.ok()) {
        if (done.error().code() != Errc::gone) trouble(done.error().message());
        continue;
      }
      state.on = want_on;
      state.off = want_on ? std::vector<std::uint32_t>{} : group.channels;
      (want_on ? on_cost_ns_ : off_cost_ns_) = monotonic_ns() - before;
    }
  }

  void open_gate(bool open) {
    const std::uint32_t gate = open ? 0 : 1;
    if (duty_.page->gate.exchange(gate, std::memory_order_release) != gate && open)
      ::syscall(SYS_futex, &duty_.page->gate, 1 /* FUTEX_WAKE, shared */, INT32_MAX, nullptr, nullptr, 0);
  }

  // ---- slices
  void check_slices(std::uint64_t now) {
    if (!hold_) return;
    for (const auto& group : hold_->groups()) {
      auto& state = groups_[{group.client, group.handle}];
      if (now < state.next_check_ns) continue;
      state.next_check_ns = state.checks < std::size(early_checks)
                                ? state.seen_ns + early_checks[state.checks]
                                : now + assert_every;
      if (state.next_check_ns <= now) state.next_check_ns = now + ms;
      ++state.checks;
      if (state.wanted_us == 0) {
        state.next_check_ns = now + assert_every;
        continue;
      }
      const auto is = hold_->slice_us(group);
      if (!is.ok()) {
        if (is.error().code() != Errc::gone) trouble(is.error().message());
        continue;
      }
      if (*is == state.wanted_us) {
        if (!state.settled) {
          state.settled = true;
          if (in_force_us_ == 0) in_force_us_ = (monotonic_ns() - first_born_ns_) / us;
          dirty_ = true;
        }
        continue;
      }
      // libcuda sets a slice of its own once, while it makes the group; later it was the tenant, or somebody
      // beside us.
      if (state.settled && now - state.seen_ns > 2 * second) ++reasserted_;
      if (auto set = hold_->set_slice_us(group, state.wanted_us);
          !set.ok() && set.error().code() != Errc::gone)
        trouble(set.error().message());
    }
    if (dirty_) publish();
  }

  // ---- audit
  void audited(std::uint64_t now) {
    const auto seen = auditor_->take();
    if (!seen) return;
    // One GPU that does not answer is no reason to leave the others alone.
    if (!seen->trouble.empty()) trouble("audit: " + seen->trouble);
    std::set<int> ours;
    if (hold_) hold_->reconcile();
    if (hold_)
      for (const auto& process : hold_->processes()) ours.insert(process.pid);
    else
      for (const auto& slot : duty_.page->slots)
        if (const auto owner = slot.owner.load(std::memory_order_relaxed))
          ours.insert(static_cast<int>(owner >> 32U));
    std::uint64_t beyond = 0;
    for (const auto& [gpu, pids] : seen->bytes) {
      std::uint64_t held = 0;
      for (const auto& [pid, bytes] : pids)
        if (ours.contains(pid)) held += bytes;
      std::uint64_t known = 0;
      if (hold_) {
        known = hold_->used(gpu) - std::min(hold_->used(gpu), hold_->managed(gpu));
      } else if (gpu < guard::max_gpus) {
        for (const auto& slot : duty_.page->slots)
          if (slot.owner.load(std::memory_order_relaxed) != 0)
            known += slot.used[gpu].load(std::memory_order_relaxed);
      }
      const std::uint64_t more = held > known + beyond_tolerance ? held - known : 0;
      // Twice in a row: an allocation between the two readings is no escape.
      const std::uint64_t steady = std::min(more, last_beyond_[gpu]);
      last_beyond_[gpu] = more;
      beyond += steady;
      if (hold_)
        hold_->charge_beyond(gpu, steady);
      else if (gpu < guard::max_gpus)
        duty_.page->outside[gpu].store(steady, std::memory_order_relaxed);
      if (asked_.memory && steady > 0 && known + steady > asked_.memory->count) act_on_escape(known + steady);
    }
    if (beyond_ != beyond) dirty_ = true;
    beyond_ = beyond;
    if (seen->with_busy) {
      busy_known_ns_ = now;
      // About a second of memory: long enough not to call one burst busy, short enough to end a takeover. A
      // process that NVML has no sample of did nothing.
      constexpr double weight = 0.35;
      std::erase_if(process_busy_, [&](const auto& one) { return !ours.contains(one.first); });
      double sum = 0;
      for (const int pid : ours) {
        const auto sample = seen->busy.find(pid);
        const double now_busy = sample != seen->busy.end() ? std::min(sample->second, 1.0) : 0;
        const auto [entry, fresh] = process_busy_.try_emplace(pid, Busy{now_busy, now});
        auto& known = entry->second;
        if (!fresh) known.share += weight * (now_busy - known.share);
        if (now_busy > 0) known.worked_ns = now;
        // Nothing for longer than a round of turns can last: idle. Until then it counts as having work,
        // however little.
        if (now - known.worked_ns > idle_after)
          known.share = 0;
        else
          known.share = std::max(known.share, 2 * sharing::idle_below);
        sum += known.share;
      }
      const double busy = std::min(sum, 1.0);
      if (!busy_ || std::abs(busy - *busy_) > 0.005) dirty_ = true;
      busy_ = busy;
    }
    if (dirty_) {
      publish();
      reload(now);
    }
  }

  void act_on_escape(std::uint64_t bytes) {
    if (escape_acted_) return;
    escape_acted_ = true;
    const auto what = fmt::format("{} MiB of device memory against a cap of {} MiB", bytes >> 20U,
                                  to_mebibytes(*asked_.memory));
    switch (asked_.on_escape) {
      case OnEscape::report:
        trouble(what + ": reported only (--on-escape)");
        return;
      case OnEscape::pause:
        paused_ = true;
        trouble(what + ": paused (--on-escape pause)");
        apply_moments(monotonic_ns());
        return;
      case OnEscape::end:
        trouble(what + ": ended (--on-escape end)");
        publish();
        if (!hold_) {
          (void)::syscall(SYS_pidfd_send_signal, duty_.program_gone.get(), SIGKILL, nullptr, 0);
          return;
        }
        for (const auto& process : hold_->processes()) {
          inventory::Holder holder{};
          holder.pid = process.pid;
          holder.start_time = process.start_time;
          (void)process::terminate(place_.root, holder, 0);
        }
        return;
    }
  }

  // ---- telling
  void trouble(std::string what) {
    if (std::find(troubles_.begin(), troubles_.end(), what) != troubles_.end()) return;
    if (troubles_.size() >= 16) troubles_.erase(troubles_.begin());
    troubles_.push_back(std::move(what));
    dirty_ = true;
  }

  void publish() {
    dirty_ = false;
    Now now;
    now.arbiter = ::getpid();
    now.program = duty_.program;
    now.busy = busy_;
    if (hold_) {
      for (const auto& process : hold_->processes())
        if (now.processes.size() < most_processes) now.processes.push_back(process.pid);
      // As many as the others read; of each GPU one, or the tenant would be in nobody's plan there.
      std::set<std::uint32_t> gpus;
      std::size_t channels = 0;
      for (const auto& group : hold_->groups()) {
        const bool first = gpus.insert(group.gpu).second;
        if (!first && (now.groups.size() + guard::max_gpus >= most_groups || channels >= most_channels))
          continue;
        channels += group.channels.size();
        const auto known = groups_.find({group.client, group.handle});
        const auto& state = known != groups_.end() ? known->second : GroupState{};
        now.groups.push_back({.pid = group.pid,
                              .start_time = group.start_time,
                              .gpu = group.gpu,
                              .client = group.client,
                              .subdevice = group.subdevice,
                              .handle = group.handle,
                              .channels = group.channels,
                              .fd = group.fd,
                              .slice_us = state.settled ? state.wanted_us : 0,
                              .on = state.on});
      }
      for (std::uint32_t gpu = 0; gpu < guard::max_gpus; ++gpu) {
        now.used = now.used + Bytes(hold_->used(gpu));
        now.managed = now.managed + Bytes(hold_->managed(gpu));
      }
      now.refused = hold_->refused();
      now.escapes = hold_->escapes();
      now.self_set = hold_->self_set();
    } else {
      for (const auto& slot : duty_.page->slots) {
        if (const auto owner = slot.owner.load(std::memory_order_relaxed)) {
          if (owner >> 32U <= INT32_MAX) now.processes.push_back(static_cast<int>(owner >> 32U));
          now.refused += slot.refused.load(std::memory_order_relaxed);
          now.self_set += slot.self_set.load(std::memory_order_relaxed);
        }
      }
      now.refused += dead_refused_;
      now.self_set += dead_self_set_;
      now.used = Bytes(slots_used_);
      for (const auto gpu : gated_gpus_)
        now.groups.push_back({.pid = duty_.program, .gpu = gpu, .on = duty_.page->gate.load() == 0});
    }
    now.reasserted = reasserted_;
    now.in_force_us = in_force_us_;
    now.beyond = Bytes(beyond_);
    now.off_cost_us = off_cost_ns_ / us;
    now.on_cost_us = on_cost_ns_ / us;
    now.troubles = troubles_;
    auto text = to_json(now).dump(-1, ' ', false, Json::error_handler_t::replace);
    if (text == published_) return;
    if (auto wrote = duty_.entry.write(now); wrote.ok()) published_ = std::move(text);
  }

  Duty duty_;
  Place place_;
  Asked asked_;
  std::unique_ptr<hold::Hold> hold_;
  std::unique_ptr<Auditor> auditor_;
  UniqueFd watch_;
  sharing::Costs costs_;
  std::map<std::uint32_t, sharing::Plan> plans_;
  struct Busy {
    double share = 0;  // smoothed, of the GPU's time
    std::uint64_t worked_ns = 0;
  };
  std::map<int, Busy> process_busy_;  // by pid
  std::map<GroupKey, GroupState> groups_;
  std::map<std::uint32_t, std::uint64_t> last_beyond_;
  std::uint64_t generation_ = UINT64_MAX, first_born_ns_ = 0, in_force_us_ = 0, reasserted_ = 0, beyond_ = 0;
  std::uint64_t busy_known_ns_ = 0, reloaded_ns_ = 0, reload_due_ = 0, audit_due_ = 0, stats_due_ = 0,
                busy_due_ = 0, gate_beat_due_ = 0;
  std::uint64_t next_moment_ns_ = UINT64_MAX, slots_due_ = 0, dead_refused_ = 0, dead_self_set_ = 0;
  std::uint64_t off_cost_ns_ = 0, on_cost_ns_ = 0, slots_used_ = 0;
  std::optional<double> busy_;
  std::vector<std::string> troubles_;
  std::string published_;
  bool dirty_ = false, paused_ = false, escape_acted_ = false;
  std::set<std::uint32_t> gated_gpus_;  // where a tenant of the guard holds memory
};

}  // namespace

Status arbitrate(Duty duty) { return Arbiter(std::move(duty)).run(); }

void set_free(const Tenant& dead) {
  if (!dead.now) return;
  for (const auto& group : dead.now->groups) {
    if (group.fd < 0 || group.pid <= 0) continue;
    UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, group.pid, 0)));
    if (!pidfd) continue;
    const auto identity = process::look("/", group.pid);  // after the pidfd: it pins the process
    if (!identity.ok() || identity->start_time != group.start_time) continue;
    const auto file = rm::DriverFile::borrow(pidfd.get(), group.fd);
    if (!file.ok()) continue;
    constexpr int most_nested = 8;  // enabling a group that runs does nothing; disables nest
    for (int i = 0; i < most_nested; ++i)
      (void)file->set_channels(group.client, group.subdevice, group.channels, true);
    (void)file->set_timeslice_us(group.client, group.handle, driver_default_slice_us);
  }
}

}  // namespace bulkhead::share
