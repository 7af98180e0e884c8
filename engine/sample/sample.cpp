#include "engine/sample/sample.hpp"

#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include <fmt/format.h>

#include "base/check.hpp"
#include "base/clock.hpp"
#include "base/limits.hpp"
#include "edge/nvml/nvml.hpp"
#include "engine/sample/host.hpp"

namespace bulkhead::sample {

namespace {

using Lock = std::unique_lock<std::mutex>;
using history::Worst;

constexpr std::uint64_t ms_ns = 1'000'000;
// Workers take turns, one right after the other: spread over the whole tick each of them found the processor
// asleep and its caches cold, which cost more than the calls.
constexpr std::uint64_t turn_ns = 300'000;
constexpr double longest_ms = 60'000;
constexpr double watched_ms = 2'000;  // of what protection watches: an old value costs more than a late one
// What the driver said it cannot is asked again so much later: after a MIG change it may be able to.
constexpr std::uint64_t unsupported_ns = 60'000 * ms_ns;
constexpr std::uint64_t failed_ns = 1'000 * ms_ns;  // of a tier of which nothing came
constexpr std::uint64_t retry_ns = 10'000 * ms_ns;  // of a GPU that is lost
constexpr std::size_t most_slices = 64;

constexpr double giga = 1e9, huge = 1e18;

constexpr std::array<Row, signals> table = {{
    {Signal::power, Tier::quick, "power", "W", 0, 20'000, 0.1},
    {Signal::power_average, Tier::quick, "power_average", "W", 0, 20'000, 0.1},
    {Signal::memory_temperature, Tier::quick, "memory_temperature", "C", -60, 200, 1},
    {Signal::power_capped_ns, Tier::quick, "power_capped", "ns", 0, huge, 0.1, Worst::high, 1e-7},
    {Signal::sw_thermal_ns, Tier::quick, "sw_thermal", "ns", 0, huge, 0.1, Worst::high, 1e-7},
    {Signal::temperature, Tier::second, "temperature", "C", -60, 200, 1},
    {Signal::reasons, Tier::second, "reasons", "bits", 0, huge, 0},
    {Signal::clock_sm, Tier::second, "clock_sm", "MHz", 0, 20'000, 15, Worst::low},
    {Signal::clock_memory, Tier::second, "clock_memory", "MHz", 0, 50'000, 25, Worst::low},
    {Signal::busy, Tier::second, "busy", "%", 0, 100, 1},
    {Signal::memory_busy, Tier::second, "memory_busy", "%", 0, 100, 1},
    {Signal::memory_used, Tier::second, "memory_used", "B", 0, huge, 16.0 * 1024 * 1024},
    {Signal::memory_total, Tier::second, "memory_total", "B", 0, huge, 0},
    {Signal::power_limit, Tier::second, "power_limit", "W", 0, 20'000, 1, Worst::low},
    {Signal::margin, Tier::margin, "margin", "K", -100, 200, 1, Worst::low},
    {Signal::energy, Tier::energy, "energy", "J", 0, huge, 0.1, Worst::high, 1},
    {Signal::hw_thermal_ns, Tier::slow, "hw_thermal", "ns", 0, huge, 0.1, Worst::high, 1e-7},
    {Signal::power_brake_ns, Tier::slow, "power_brake", "ns", 0, huge, 0.1, Worst::high, 1e-7},
    {Signal::pcie_replays, Tier::slow, "pcie_replays", "count", 0, huge, 0},
    {Signal::ecc_corrected, Tier::slow, "ecc_corrected", "count", 0, huge, 0},
    {Signal::ecc_uncorrected, Tier::slow, "ecc_uncorrected", "count", 0, huge, 0},
    {Signal::remapped_rows, Tier::slow, "remapped_rows", "count", 0, huge, 0},
    {Signal::remap_pending, Tier::slow, "remap_pending", "flag", 0, huge, 0},
    {Signal::remap_failed, Tier::slow, "remap_failed", "flag", 0, huge, 0},
    {Signal::nvlink_crc, Tier::slow, "nvlink_crc", "count", 0, huge, 0},
    {Signal::nvlink_data_crc, Tier::slow, "nvlink_data_crc", "count", 0, huge, 0},
    {Signal::nvlink_replays, Tier::slow, "nvlink_replays", "count", 0, huge, 0},
    {Signal::nvlink_recoveries, Tier::slow, "nvlink_recoveries", "count", 0, huge, 0},
    {Signal::nvlink_error_ratio, Tier::slow, "nvlink_error_ratio", "ratio", 0, 1, 0},
    // GPM goes a little over the whole now and then: its two samples are not of one instant.
    {Signal::graphics, Tier::gpm, "graphics", "%", 0, 110, 0},
    {Signal::sm, Tier::gpm, "sm", "%", 0, 110, 0.2},
    {Signal::occupancy, Tier::gpm, "occupancy", "%", 0, 110, 0.2},
    {Signal::tensor, Tier::gpm, "tensor", "%", 0, 110, 0.2},
    {Signal::dram, Tier::gpm, "dram", "%", 0, 110, 0.2},
    {Signal::pcie_tx, Tier::gpm, "pcie_tx", "MiB/s", 0, giga, 10},
    {Signal::pcie_rx, Tier::gpm, "pcie_rx", "MiB/s", 0, giga, 10},
    {Signal::nvlink_rx, Tier::gpm, "nvlink_rx", "MiB/s", 0, giga, 10},
    {Signal::nvlink_tx, Tier::gpm, "nvlink_tx", "MiB/s", 0, giga, 10},
}};

// Which signals a slice has of its own.
constexpr std::array of_slices = {Signal::memory_used, Signal::sm,      Signal::occupancy, Signal::tensor,
                                  Signal::dram,        Signal::pcie_tx, Signal::pcie_rx};

struct Ask {  // a field of nvmlDeviceGetFieldValues and what becomes of it
  Signal signal;
  unsigned id;
  double scale;
};
constexpr std::array quick_fields = {
    Ask{Signal::power, 186, 1e-3},          Ask{Signal::power_average, 185, 1e-3},
    Ask{Signal::memory_temperature, 82, 1}, Ask{Signal::power_capped_ns, 74, 1},
    Ask{Signal::sw_thermal_ns, 269, 1},
};
constexpr std::array second_fields = {Ask{Signal::power_limit, 190, 1e-3}};
constexpr std::array energy_fields = {Ask{Signal::energy, 83, 1e-3}};
constexpr std::array slow_fields = {
    Ask{Signal::hw_thermal_ns, 270, 1}, Ask{Signal::power_brake_ns, 271, 1},
    Ask{Signal::pcie_replays, 94, 1},   Ask{Signal::ecc_corrected, 3, 1},
    Ask{Signal::ecc_uncorrected, 4, 1}, Ask{Signal::remapped_rows, 143, 1},
    Ask{Signal::remap_pending, 144, 1}, Ask{Signal::remap_failed, 145, 1},
    Ask{Signal::nvlink_crc, 38, 1},     Ask{Signal::nvlink_data_crc, 45, 1},
    Ask{Signal::nvlink_replays, 52, 1}, Ask{Signal::nvlink_recoveries, 59, 1},
};

struct AskMetric {
  Signal signal;
  unsigned id;  // NVML_GPM_METRIC_*
};
constexpr std::array metrics_asked = {
    AskMetric{Signal::graphics, 1}, AskMetric{Signal::sm, 2},         AskMetric{Signal::occupancy, 3},
    AskMetric{Signal::tensor, 5},   AskMetric{Signal::dram, 10},      AskMetric{Signal::pcie_tx, 20},
    AskMetric{Signal::pcie_rx, 21}, AskMetric{Signal::nvlink_rx, 60}, AskMetric{Signal::nvlink_tx, 61},
};
constexpr std::size_t metrics_of_slice = 7;  // the first ones: NVLink is the whole GPU's

struct Plan {  // of a tier
  Tier tier;
  std::string_view name;
  double wanted_ms;  // 0: the tick's; < 0: GPM's
  double part;       // of the budget
  double longest_ms = sample::longest_ms;
};
constexpr std::array<Plan, tiers> plans = {{
    {Tier::quick, "quick", 0, 0.25, watched_ms},
    {Tier::second, "second", 1000, 0.05, watched_ms},
    {Tier::margin, "margin", 1000, 0.2, 2 * watched_ms},
    {Tier::energy, "energy", 1000, 0.2},
    {Tier::slow, "slow", 10'000, 0.05},
    {Tier::gpm, "gpm", -1, 0.2},
    {Tier::slices, "slices", 1000, 0.025},
    {Tier::layout, "layout", 10'000, 0.025},
}};

// CPU time of the calling thread.
std::uint64_t thread_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
}

constexpr std::size_t index_of(Signal signal) { return static_cast<std::size_t>(signal); }
constexpr std::size_t index_of(Tier tier) { return static_cast<std::size_t>(tier); }

// The table is in the order of its enums: an index is a row.
constexpr bool in_order() {
  for (std::size_t i = 0; i < signals; ++i) {
    if (index_of(table[i].signal) != i) return false;
  }
  for (std::size_t i = 0; i < tiers; ++i) {
    if (index_of(plans[i].tier) != i) return false;
  }
  return true;
}
static_assert(in_order());

}  // namespace

double smoothed_cost(double before, double now) {
  return before + (std::min(now, 4 * before + 20) - before) * 0.2;
}

const std::array<Row, signals>& rows() { return table; }
std::string_view name_of(Tier tier) { return plans[index_of(tier)].name; }
std::string_view name_of(State state) {
  switch (state) {
    case State::starting:
      return "starting";
    case State::sampling:
      return "sampling";
    case State::hung:
      return "hung";
    case State::lost:
      return "lost";
    case State::resting:
      return "resting";
  }
  return "unknown";
}

double period_ms(double wanted_ms, double cost_us, double share_of_core, double tick_ms, double most_ms) {
  double period = wanted_ms;
  if (share_of_core > 0) period = std::max(period, cost_us / 1000 / share_of_core);
  period = std::ceil(std::min(period, std::max(most_ms, wanted_ms)) / tick_ms - 1e-6) * tick_ms;
  return std::max(period, tick_ms);
}

// ---- what one GPU's worker and its readers share
namespace {

struct Shared {
  Settings settings;
  unsigned index = 0, of = 1;

  // Held for copies alone, never over a driver call.
  mutable std::mutex mutex;
  std::condition_variable wake;
  Gpu gpu;
  nvml::Nvml* driver = nullptr;     // whose call in flight is looked at; its worker owns it
  std::uint64_t opening_since = 0;  // the driver is being opened: no object to look at yet
  bool asked_once = false, done = false;
  bool stop = false, rest = false;
  std::array<bool, tiers> hurried = {};

  // Another one, because coding and reading the past take longer than a copy.
  mutable std::mutex past_mutex;
  history::History past;
  static constexpr std::size_t no_series = ~std::size_t{0};
  struct Series {  // of the GPU, or of a slice
    std::array<std::size_t, signals> at;
    std::array<std::uint64_t, signals> told{};  // to whom news() tells: before this second
    Series() { at.fill(no_series); }
  };
  std::map<unsigned, Series> series;  // by slice + 1; 0: the GPU
  std::uint64_t layouts = 0;

  Shared(const Settings& all, unsigned at, unsigned count, history::Settings kept)
      : settings(all), index(at), of(count), past(kept) {
    gpu.index = at;
  }
};

class Worker {
 public:
  explicit Worker(std::shared_ptr<Shared> shared) : s_(std::move(shared)) {}

  void run() {
    ::prctl(PR_SET_NAME, fmt::format("bh-sample-{}", s_->index).c_str());
    // A millisecond's slack lets the kernel wake several workers at once; sensors move every 100 ms.
    ::prctl(PR_SET_TIMERSLACK, ms_ns, 0, 0, 0);
    while (!stopped()) {
      if (wants_rest()) {
        let_go(State::resting);
        Lock lock(s_->mutex);
        s_->wake.wait(lock, [&] { return s_->stop || !s_->rest; });
        continue;
      }
      if (!nvml_ && !open()) {
        wait_until(monotonic_ns() + retry_ns);
        continue;
      }
      round();
      if (lost_) {
        // Handles may be of a driver that is no more, so all is opened anew. Values keep their age.
        let_go(State::lost, "the driver says that the GPU is lost, or is gone itself");
        wait_until(monotonic_ns() + retry_ns);
      } else {
        wait_until(next());
      }
    }
    let_go(State::resting);
    const Lock lock(s_->mutex);
    s_->done = true;
    s_->wake.notify_all();
  }

 private:
  struct Due {
    std::uint64_t at = 0;
    double cost_us = 0;
    std::uint64_t rounds = 0, nanoseconds = 0;
    bool refused = false;  // all of it, as unsupported
  };
  struct Gpm {
    nvml::GpmSample before, after;
    std::uint64_t before_ns = 0;  // 0: nothing is in it
  };
  struct OfSlice {
    unsigned id = 0;
    nvml::Device mig_device = {};
    Gpm gpm = {};
  };

  bool stopped() const {
    const Lock lock(s_->mutex);
    return s_->stop;
  }
  bool wants_rest() const {
    const Lock lock(s_->mutex);
    return s_->rest && !s_->stop;
  }

  void wait_until(std::uint64_t at) {
    Lock lock(s_->mutex);
    const auto urgent = [&] {
      return s_->stop || s_->rest ||
             std::find(s_->hurried.begin(), s_->hurried.end(), true) != s_->hurried.end();
    };
    while (!urgent()) {
      const std::uint64_t now = monotonic_ns();
      if (now >= at) break;
      s_->wake.wait_for(lock, std::chrono::nanoseconds(at - now));
    }
    for (std::size_t i = 0; i < tiers; ++i) {
      if (s_->hurried[i]) due_[i].at = 0;
      s_->hurried[i] = false;
    }
  }

  bool open() {
    {
      const Lock lock(s_->mutex);
      s_->opening_since = monotonic_ns();
    }
    auto opened = nvml::Nvml::open(s_->settings.library);
    if (!opened.ok()) return give_up(opened.error());
    nvml_ = std::move(opened).value();
    {
      const Lock lock(s_->mutex);
      s_->driver = nvml_.get();
      s_->opening_since = 0;
    }
    // By UUID once it is known: indices move up when a GPU before it is lost.
    auto found = uuid_.text.empty() ? nvml_->device(s_->index) : nvml_->device(uuid_);
    if (!found.ok()) return give_up(found.error());
    device_ = *found;
    auto uuid = nvml_->uuid(device_);
    if (!uuid.ok()) return give_up(uuid.error());
    uuid_ = *uuid;
    const auto address = nvml_->pci_address(device_);
    const auto name = nvml_->name(device_);
    const auto gpm = nvml_->gpm_supported(device_);
    gpm_ = gpm.ok() && *gpm;
    due_ = {};
    const std::uint64_t now = monotonic_ns();
    // Workers take turns within a tick: one driver lock serves them all.
    phase_ = std::min(s_->settings.tick_ms * ms_ns / s_->of, turn_ns) * s_->index;
    due_[index_of(Tier::layout)].at = 0;
    // The dear ones begin one after the other, not all in the first tick.
    for (std::size_t i = 0; i < tiers; ++i) due_[i].at = i == index_of(Tier::layout) ? 0 : now;
    const Lock lock(s_->mutex);
    s_->gpu.uuid = uuid_;
    if (address.ok()) s_->gpu.pci = *address;
    if (name.ok()) s_->gpu.name = *name;
    s_->gpu.gpm = gpm_;
    s_->gpu.state = State::sampling;
    s_->gpu.why.clear();
    return true;
  }

  bool give_up(const Error& error) {
    const std::string why = error.message();
    let_go(State::lost, why);
    return false;
  }

  void let_go(State state, const std::string& why = {}) {
    whole_ = {};
    slices_.clear();
    {
      // Readers look at its call in flight under this lock: nobody does after it.
      const Lock lock(s_->mutex);
      s_->driver = nullptr;
      s_->opening_since = 0;
    }
    nvml_.reset();  // the last of the process shuts the library down: a driver call, outside the lock
    const Lock lock(s_->mutex);
    s_->gpu.state = state;
    s_->gpu.why = why;
    s_->gpu.since_ns = monotonic_ns();
    s_->asked_once = true;
    s_->wake.notify_all();
  }

  std::uint64_t next() const {
    std::uint64_t at = ~std::uint64_t{0};
    for (const Due& due : due_) at = std::min(at, due.at);
    return at;
  }

  void round() {
    lost_ = false;
    for (std::size_t i :
         {index_of(Tier::layout), index_of(Tier::quick), index_of(Tier::second), index_of(Tier::slices),
          index_of(Tier::gpm), index_of(Tier::margin), index_of(Tier::slow), index_of(Tier::energy)}) {
      if (due_[i].at > monotonic_ns()) continue;
      ask(static_cast<Tier>(i));
      if (lost_) break;
    }
  }

  void ask(Tier tier) {
    Due& due = due_[index_of(tier)];
    // This thread's own clock costs a system call each time: of the quick rounds every eighth is measured.
    const bool measured = tier != Tier::quick || due.rounds < 8 || due.rounds % 8 == 0;
    const std::uint64_t start = monotonic_ns(), spent = measured ? thread_ns() : 0;
    came_ = refused_ = 0;
    only_unsupported_ = true;
    switch (tier) {
      case Tier::quick:
        batch(quick_fields);  // one call, ten times a second
        break;
      case Tier::second:
        second();
        break;
      case Tier::margin:
        single(Signal::margin, nvml_->margin(device_), [](Celsius c) { return c.count; });
        break;
      case Tier::energy:
        batch(energy_fields);
        break;
      case Tier::slow:
        batch(slow_fields);
        nvlink_ratio();
        break;
      case Tier::gpm:
        ask_gpm();
        break;
      case Tier::slices:
        for (std::size_t i = 0; i < slices_.size(); ++i) {
          if (slices_[i].mig_device.handle == nullptr) continue;
          const auto memory = nvml_->memory(slices_[i].mig_device);
          const Errc why = memory.ok() ? Errc::io : memory.error().code();
          put(mine_[i].values, Signal::memory_used,
              memory.ok() ? std::optional(static_cast<double>(memory->used.count)) : std::nullopt, why,
              i + 1);
          put(mine_[i].values, Signal::memory_total,
              memory.ok() ? std::optional(static_cast<double>(memory->total.count)) : std::nullopt, why,
              i + 1);
        }
        break;
      case Tier::layout:
        look_at_layout();
        break;
      case Tier::end:
        break;
    }
    const std::uint64_t end = monotonic_ns();
    // Not the wall's: one round during which the machine was busy with others stretched the period to ten
    // seconds and more.
    const double cost = measured ? static_cast<double>(thread_ns() - spent) / 1000 : due.cost_us;
    // The first round of all pays for what the driver sets up (a field's first reading took 3.3 ms on an
    // H100, the next ones 20 us), so the second is where the cost begins to be known.
    if (due.rounds == 1) due.cost_us = cost;
    if (due.rounds > 1) due.cost_us = smoothed_cost(due.cost_us, cost);
    ++due.rounds;
    due.nanoseconds += static_cast<std::uint64_t>(cost * 1000);
    const bool nothing = came_ == 0 && refused_ > 0;
    due.refused = nothing && only_unsupported_;
    const double period = period_of(tier);
    const auto tick = s_->settings.tick_ms * ms_ns;
    const auto step = static_cast<std::uint64_t>(period * static_cast<double>(ms_ns));
    // On the grid, so that what is due together is asked in one waking.
    due.at = (start + step - phase_ + tick / 2) / tick * tick + phase_;
    if (due.refused) due.at = std::max(due.at, end + unsupported_ns);
    if (nothing && !due.refused) due.at = std::max(due.at, end + failed_ns);
    publish(tier, end, period);
  }

  double period_of(Tier tier) const {
    const Plan& plan = plans[index_of(tier)];
    const double wanted = plan.wanted_ms < 0    ? s_->settings.gpm_ms
                          : plan.wanted_ms == 0 ? s_->settings.tick_ms
                                                : plan.wanted_ms;
    return period_ms(wanted, due_[index_of(tier)].cost_us, s_->settings.budget * plan.part,
                     s_->settings.tick_ms, plan.longest_ms);
  }

  // ---- what comes
  void note(Errc why) {
    only_unsupported_ = only_unsupported_ && why == Errc::unsupported;
    lost_ = lost_ || why == Errc::gone || why == Errc::unavailable;
  }

  void put(Values& values, Signal signal, std::optional<double> number, Errc why, std::size_t slice = 0) {
    const Row& row = table[index_of(signal)];
    Value& value = values[index_of(signal)];
    if (number && (!std::isfinite(*number) || *number < row.least || *number > row.most)) {
      number.reset();
      why = Errc::corrupt;
    }
    if (!number) {
      ++refused_;
      value.refused = why;
      note(why);
      return;
    }
    const std::uint64_t now = monotonic_ns();
    ++came_;
    if (row.step > 0) {
      if (row.per_second == 0) {
        remember(slice, signal, now, *number);
      } else if (value.known() && *number >= value.number && now > value.at_ns) {
        const double seconds = static_cast<double>(now - value.at_ns) / 1e9;
        remember(slice, signal, now, (*number - value.number) * row.per_second / seconds);
      }
    }
    value = {.number = *number, .at_ns = now};
  }

  template <class T, class Number>
  void single(Signal signal, const Result<T>& result, Number number) {
    put(values_, signal, result.ok() ? std::optional<double>(number(*result)) : std::nullopt,
        result.ok() ? Errc::io : result.error().code());
  }

  template <std::size_t N>
  void batch(const std::array<Ask, N>& asks) {
    std::array<nvml::Field, N> fields;
    for (std::size_t i = 0; i < N; ++i) fields[i] = {.id = asks[i].id};
    const Status status = nvml_->fields(device_, fields);
    for (std::size_t i = 0; i < N; ++i) {
      const Errc why = !status.ok() ? status.error().code() : fields[i].refused.value_or(Errc::io);
      put(values_, asks[i].signal,
          status.ok() && fields[i].number ? std::optional(*fields[i].number * asks[i].scale) : std::nullopt,
          why);
    }
  }

  // NVLink sends damaged flits again, so nothing is lost; how many there are says how it is with the link.
  void nvlink_ratio() {
    const Value& bad = values_[index_of(Signal::nvlink_crc)];
    const Value& data = values_[index_of(Signal::nvlink_data_crc)];
    const Value& traffic = values_[index_of(Signal::nvlink_rx)];
    if (!bad.known() || !traffic.known()) return;
    const double errors = bad.number + (data.known() ? data.number : 0);
    const std::uint64_t before_ns = std::exchange(nvlink_ns_, bad.at_ns);
    const double before = std::exchange(nvlink_errors_, errors);
    if (before_ns == 0 || bad.at_ns <= before_ns || errors < before) return;
    constexpr double flit_bytes = 16;
    const double flits =
        traffic.number * 1024 * 1024 / flit_bytes * static_cast<double>(bad.at_ns - before_ns) / 1e9;
    if (flits < static_cast<double>(least_packets)) return;
    put(values_, Signal::nvlink_error_ratio, std::min(1.0, (errors - before) / flits), Errc::io);
  }

  void second() {
    batch(second_fields);
    single(Signal::temperature, nvml_->temperature(device_), [](Celsius c) { return c.count; });
    single(Signal::reasons, nvml_->clock_event_reasons(device_),
           [](std::uint64_t bits) { return static_cast<double>(bits); });
    const auto clocks = nvml_->clocks(device_);
    single(Signal::clock_sm, clocks, [](const nvml::Clocks& c) { return c.sm.count; });
    single(Signal::clock_memory, clocks, [](const nvml::Clocks& c) { return c.memory.count; });
    // No such thing with MIG on, and an error costs a string.
    if (!mig_) {
      const auto busy = nvml_->utilization(device_);
      single(Signal::busy, busy, [](const nvml::Utilization& u) { return u.gpu; });
      single(Signal::memory_busy, busy, [](const nvml::Utilization& u) { return u.memory; });
    }
    const auto memory = nvml_->memory(device_);
    single(Signal::memory_used, memory,
           [](const nvml::Memory& m) { return static_cast<double>(m.used.count); });
    single(Signal::memory_total, memory,
           [](const nvml::Memory& m) { return static_cast<double>(m.total.count); });
  }

  // Takes a sample and reads what passed since the one before; the driver wants 100 ms between them.
  bool gpm_of(Gpm& gpm, std::optional<unsigned> instance, Values& values, std::size_t count,
              std::size_t slice) {
    const auto make = [&](nvml::GpmSample& sample) -> Status {
      if (sample) return ok_status();
      BH_TRY(sample, nvml_->gpm_sample());
      return ok_status();
    };
    Status status = make(gpm.before);
    if (status.ok()) status = make(gpm.after);
    const std::uint64_t now = monotonic_ns();
    if (status.ok() && gpm.before_ns != 0 && now < gpm.before_ns + 101 * ms_ns) return true;
    if (status.ok()) status = nvml_->gpm_take(device_, instance, gpm.after);
    if (!status.ok()) {
      gpm.before_ns = 0;
      for (std::size_t i = 0; i < count; ++i)
        put(values, metrics_asked[i].signal, std::nullopt, status.error().code(), slice);
      return false;
    }
    std::array<nvml::Metric, metrics_asked.size()> metrics;
    for (std::size_t i = 0; i < count; ++i) metrics[i] = {.id = metrics_asked[i].id};
    if (gpm.before_ns != 0) {
      status = nvml_->gpm_metrics(gpm.before, gpm.after, std::span(metrics).first(count));
      for (std::size_t i = 0; i < count; ++i) {
        put(values, metrics_asked[i].signal, status.ok() ? metrics[i].value : std::nullopt,
            status.ok() ? Errc::unsupported : status.error().code(), slice);
      }
    } else {
      ++came_;  // the first of two
    }
    std::swap(gpm.before, gpm.after);
    gpm.before_ns = now;
    return true;
  }

  void ask_gpm() {
    if (!gpm_) {
      for (const AskMetric& metric : metrics_asked)
        put(values_, metric.signal, std::nullopt, Errc::unsupported);
      return;
    }
    gpm_of(whole_, std::nullopt, values_, metrics_asked.size(), 0);
    bool all_there = true;
    for (std::size_t i = 0; i < slices_.size(); ++i) {
      all_there &= gpm_of(slices_[i].gpm, slices_[i].id, mine_[i].values, metrics_of_slice, i + 1);
    }
    if (!all_there) due_[index_of(Tier::layout)].at = 0;  // a slice went: look which are there
  }

  void look_at_layout() {
    const auto mode = nvml_->mig_mode(device_);
    mig_ = mode.ok() && mode->now;
    if (mode.ok()) {
      ++came_;
    } else {
      ++refused_;
      note(mode.error().code());
    }
    std::vector<Slice> found;
    std::vector<nvml::Device> handles;
    if (mig_) {
      auto instances = nvml_->instances(device_);
      if (!instances.ok()) return;  // as it was: asked again when next due
      std::size_t devices = 0;
      for (const auto& instance : *instances) devices += instance.compute.size();
      const auto list = nvml_->mig_devices(device_, devices);
      for (const auto& instance : *instances) {
        if (found.size() == most_slices) break;
        found.push_back({.gpu_instance = instance.id});
        handles.push_back({});
        if (!list.ok()) continue;
        for (const auto& one : *list) {
          if (one.gpu_instance != instance.id) continue;
          found.back().uuid = one.uuid;
          handles.back() = {one.handle, device_.index};
          break;
        }
      }
    }
    const auto same = [](const Slice& a, const Slice& b) {
      return a.gpu_instance == b.gpu_instance && a.uuid == b.uuid;
    };
    if (std::equal(found.begin(), found.end(), mine_.begin(), mine_.end(), same)) {
      // After a rest they are the same, and what was held in the driver for them is not.
      if (slices_.size() != found.size()) {
        slices_.clear();
        for (const Slice& slice : mine_) slices_.push_back({slice.gpu_instance, {}, {}});
      }
      for (std::size_t i = 0; i < found.size(); ++i) slices_[i].mig_device = handles[i];
      return;
    }
    // A slice that went takes its past along. One made anew in the same place between two looks has the same
    // number and UUID and is not told apart: who changes the layout hurries this tier in between.
    forget_slices();
    mine_ = std::move(found);
    for (std::size_t i = 0; i < mine_.size(); ++i) slices_.push_back({mine_[i].gpu_instance, handles[i], {}});
  }

  void forget_slices() {
    slices_.clear();
    mine_.clear();
    const Lock lock(s_->past_mutex);
    if (s_->series.upper_bound(0) != s_->series.end()) ++s_->layouts;
    for (auto it = s_->series.upper_bound(0); it != s_->series.end(); it = s_->series.erase(it)) {
      for (const std::size_t one : it->second.at)
        if (one != Shared::no_series) s_->past.close(one);
    }
  }

  void remember(std::size_t slice, Signal signal, std::uint64_t now, double number) {
    if (slice != 0 && std::find(of_slices.begin(), of_slices.end(), signal) == of_slices.end()) return;
    const Lock lock(s_->past_mutex);
    std::size_t& series =
        s_->series[slice == 0 ? 0U : mine_[slice - 1].gpu_instance + 1].at[index_of(signal)];
    if (series == Shared::no_series) {
      const Row& row = table[index_of(signal)];
      const auto opened = s_->past.open({.step = row.step, .worst = row.worst});
      if (!opened) return;
      series = *opened;
    }
    s_->past.add(series, static_cast<double>(now) / 1e9, number);
  }

  void publish(Tier tier, std::uint64_t now, double period) {
    const Due& due = due_[index_of(tier)];
    const Lock lock(s_->mutex);
    Gpu& gpu = s_->gpu;
    gpu.values = values_;
    if (tier == Tier::gpm || tier == Tier::slices || tier == Tier::layout) {
      gpu.slices = mine_;
      gpu.mig = mig_;
    }
    gpu.state = lost_ ? State::lost : State::sampling;
    if (!lost_ && !gpu.why.empty()) gpu.why.clear();
    gpu.since_ns = now;
    gpu.fresh += came_;
    gpu.tier[index_of(tier)] = {due.cost_us, due.refused ? 0 : period, due.rounds, due.nanoseconds};
    if (tier == Tier::energy || lost_) {  // the last of the first round
      s_->asked_once = true;
      s_->wake.notify_all();
    }
  }

  std::shared_ptr<Shared> s_;
  std::unique_ptr<nvml::Nvml> nvml_;
  nvml::Device device_ = {};
  Uuid uuid_ = {};
  bool gpm_ = false, mig_ = false, lost_ = false, only_unsupported_ = true;
  std::uint64_t phase_ = 0;
  std::array<Due, tiers> due_ = {};
  Values values_ = {};
  std::vector<Slice> mine_ = {};
  Gpm whole_ = {};
  std::vector<OfSlice> slices_ = {};
  std::uint64_t came_ = 0, refused_ = 0;
  std::uint64_t nvlink_ns_ = 0;
  double nvlink_errors_ = 0;
};

}  // namespace

struct Sampler::Inside {
  Settings settings;
  mutable std::mutex mutex;
  mutable std::condition_variable wake;
  std::vector<std::shared_ptr<Shared>> gpus;
  std::vector<std::thread> threads;
  std::string why = "starting";
  std::shared_ptr<HostLook> host;
  bool counted = false, stop = false, resting = false;
};

Sampler::Sampler(const Settings& settings) : inside_(std::make_shared<Inside>()) {
  Settings& s = inside_->settings;
  s = settings;
  s.tick_ms = std::clamp(s.tick_ms, 10U, 60'000U);
  s.gpm_ms = std::max(s.gpm_ms, 100U);
  if (!s.root.empty()) inside_->host = HostLook::start(s.root);
  // How many GPUs there are is asked on a thread of its own, because that can hang as well.
  std::thread([inside = inside_] {
    const auto count = [&]() -> Result<unsigned> {
      BH_TRY(const auto driver, nvml::Nvml::open(inside->settings.library));
      BH_TRY(const unsigned number, driver->device_count());
      return number;
    };
    for (;;) {
      const auto counted = count();
      Lock lock(inside->mutex);
      if (inside->stop) return;
      if (!counted.ok()) {
        inside->why = counted.error().message();
        inside->counted = true;
        inside->wake.notify_all();
        inside->wake.wait_for(lock, std::chrono::nanoseconds(retry_ns), [&] { return inside->stop; });
        if (inside->stop) return;
        continue;
      }
      inside->why = *counted == 0 ? "the driver shows no GPU" : "";
      history::Settings kept = inside->settings.history;
      kept.most_bytes /= std::max(1U, *counted);
      for (unsigned i = 0; i < *counted; ++i) {
        auto shared = std::make_shared<Shared>(inside->settings, i, *counted, kept);
        shared->rest = inside->resting;
        inside->gpus.push_back(shared);
        inside->threads.emplace_back([shared] { Worker(shared).run(); });
      }
      inside->counted = true;
      inside->wake.notify_all();
      return;
    }
  }).detach();
}

Sampler::~Sampler() {
  std::vector<std::shared_ptr<Shared>> gpus;
  std::vector<std::thread> threads;
  {
    const Lock lock(inside_->mutex);
    inside_->stop = true;
    inside_->wake.notify_all();
    if (inside_->host) inside_->host->stop();
    gpus = inside_->gpus;
    threads = std::move(inside_->threads);
  }
  for (const auto& gpu : gpus) {
    const Lock lock(gpu->mutex);
    gpu->stop = true;
    gpu->wake.notify_all();
  }
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(500);
  for (std::size_t i = 0; i < gpus.size(); ++i) {
    Lock lock(gpus[i]->mutex);
    const bool done = gpus[i]->wake.wait_until(lock, until, [&] { return gpus[i]->done; });
    lock.unlock();
    if (done) {
      threads[i].join();
    } else {
      threads[i].detach();
    }
  }
}

Snapshot Sampler::snapshot() const {
  Snapshot all;
  std::vector<std::shared_ptr<Shared>> gpus;
  {
    const Lock lock(inside_->mutex);
    all.why = inside_->why;
    if (inside_->host) all.host = inside_->host->seen();
    gpus = inside_->gpus;
  }
  all.at_ns = monotonic_ns();
  const std::uint64_t deadline = inside_->settings.deadline_ms * ms_ns;
  for (const auto& shared : gpus) {
    const Lock lock(shared->mutex);
    all.gpus.push_back(shared->gpu);
    Gpu& gpu = all.gpus.back();
    std::optional<nvml::CallInFlight> call;
    if (shared->driver != nullptr) call = shared->driver->in_flight();
    if (!call && shared->opening_since != 0)
      call = nvml::CallInFlight{.function = "nvmlInit_v2", .since_ns = shared->opening_since};
    if (call && all.at_ns > call->since_ns + deadline) {
      gpu.state = State::hung;
      gpu.call = call->function;
      gpu.since_ns = call->since_ns;
    }
  }
  return all;
}

bool Sampler::wait_ready(unsigned milliseconds) const {
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(milliseconds);
  std::vector<std::shared_ptr<Shared>> gpus;
  {
    Lock lock(inside_->mutex);
    if (!inside_->wake.wait_until(lock, until, [&] { return inside_->counted; })) return false;
    gpus = inside_->gpus;
  }
  bool all = true;
  for (const auto& gpu : gpus) {
    Lock lock(gpu->mutex);
    all &= gpu->wake.wait_until(lock, until, [&] { return gpu->asked_once; });
  }
  return all;
}

void Sampler::hurry(unsigned gpu, Tier tier) {
  std::shared_ptr<Shared> shared;
  {
    const Lock lock(inside_->mutex);
    if (gpu >= inside_->gpus.size() || tier >= Tier::end) return;
    shared = inside_->gpus[gpu];
  }
  const Lock lock(shared->mutex);
  shared->hurried[index_of(tier)] = true;
  shared->wake.notify_all();
}

bool Sampler::rest(unsigned milliseconds) {
  std::vector<std::shared_ptr<Shared>> gpus;
  {
    const Lock lock(inside_->mutex);
    inside_->resting = true;
    gpus = inside_->gpus;
  }
  for (const auto& gpu : gpus) {
    const Lock lock(gpu->mutex);
    gpu->rest = true;
    gpu->wake.notify_all();
  }
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(milliseconds);
  bool all = true;
  for (const auto& gpu : gpus) {
    Lock lock(gpu->mutex);
    all &= gpu->wake.wait_until(lock, until,
                                [&] { return gpu->driver == nullptr && gpu->gpu.state == State::resting; });
  }
  return all;
}

void Sampler::resume() {
  const Lock lock(inside_->mutex);
  inside_->resting = false;
  for (const auto& gpu : inside_->gpus) {
    const Lock one(gpu->mutex);
    gpu->rest = false;
    gpu->wake.notify_all();
  }
}

std::vector<history::Point> Sampler::history(unsigned gpu, std::optional<unsigned> gpu_instance,
                                             Signal signal, std::uint64_t from_s, std::uint64_t to_s,
                                             history::History::Grain grain) const {
  std::shared_ptr<Shared> shared;
  {
    const Lock lock(inside_->mutex);
    if (gpu >= inside_->gpus.size() || signal >= Signal::end) return {};
    shared = inside_->gpus[gpu];
  }
  const Lock lock(shared->past_mutex);
  const auto found = shared->series.find(gpu_instance ? *gpu_instance + 1 : 0U);
  if (found == shared->series.end()) return {};
  const std::size_t series = found->second.at[index_of(signal)];
  if (series == Shared::no_series) return {};
  return shared->past.query(series, from_s, to_s, grain);
}

std::vector<Sampler::GpuPast> Sampler::news() {
  std::vector<std::shared_ptr<Shared>> gpus;
  {
    const Lock lock(inside_->mutex);
    gpus = inside_->gpus;
  }
  std::vector<GpuPast> out;
  for (const auto& shared : gpus) {
    GpuPast& gpu = out.emplace_back();
    gpu.index = shared->index;
    {
      const Lock lock(shared->mutex);
      gpu.uuid = shared->gpu.uuid;
    }
    const Lock lock(shared->past_mutex);
    gpu.layouts = shared->layouts;
    for (auto& [slice, series] : shared->series)
      for (std::size_t i = 0; i < signals; ++i) {
        if (series.at[i] == Shared::no_series) continue;
        Past past{.slice = slice, .signal = static_cast<Signal>(i)};
        past.points = shared->past.query(series.at[i], series.told[i], ~std::uint64_t{0} / 2,
                                         history::History::Grain::second);
        if (past.points.empty()) continue;
        series.told[i] = past.points.back().at_s + 1;
        gpu.series.push_back(std::move(past));
      }
  }
  return out;
}

std::size_t Sampler::history_bytes() const {
  const Lock lock(inside_->mutex);
  std::size_t sum = 0;
  for (const auto& gpu : inside_->gpus) {
    const Lock one(gpu->past_mutex);
    sum += gpu->past.bytes();
  }
  return sum;
}

// ---- as a document
namespace {

Json values_json(const Values& values, std::uint64_t now) {
  Json all = Json::object();
  for (std::size_t i = 0; i < signals; ++i) {
    const Value& value = values[i];
    if (!value.known() && !value.refused) continue;
    Json one = Json::object();
    if (value.known()) {
      one["value"] = value.number;
      one["age_ms"] = static_cast<double>(now - std::min(now, value.at_ns)) / 1e6;
    }
    one["unit"] = table[i].unit;
    if (value.refused) one["unavailable"] = name_of(*value.refused);
    all[std::string(table[i].name)] = std::move(one);
  }
  return all;
}

}  // namespace

Json to_json(const Snapshot& snapshot) {
  Json gpus = Json::array();
  for (const Gpu& gpu : snapshot.gpus) {
    Json one = {{"gpu", gpu.index},
                {"uuid", gpu.uuid.text},
                {"pci", gpu.pci.str()},
                {"name", gpu.name},
                {"state", name_of(gpu.state)}};
    if (gpu.state == State::hung) {
      one["call"] = gpu.call;
      one["since_ms"] = static_cast<double>(snapshot.at_ns - std::min(snapshot.at_ns, gpu.since_ns)) / 1e6;
    }
    if (!gpu.why.empty()) one["why"] = gpu.why;
    one["gpm"] = gpu.gpm ? Json(*gpu.gpm) : Json(nullptr);
    one["mig"] = gpu.mig;
    one["values"] = values_json(gpu.values, snapshot.at_ns);
    Json slices = Json::array();
    for (const Slice& slice : gpu.slices) {
      slices.push_back({{"gpu_instance", slice.gpu_instance},
                        {"uuid", slice.uuid.text},
                        {"values", values_json(slice.values, snapshot.at_ns)}});
    }
    one["slices"] = std::move(slices);
    Json cost = Json::object();
    for (std::size_t i = 0; i < tiers; ++i) {
      const TierState& tier = gpu.tier[i];
      if (tier.rounds == 0) continue;
      cost[std::string(plans[i].name)] = {
          {"us", tier.cost_us}, {"period_ms", tier.period_ms}, {"rounds", tier.rounds}};
    }
    one["cost"] = std::move(cost);
    gpus.push_back(std::move(one));
  }
  Json document = {{"gpus", std::move(gpus)}};
  if (!snapshot.why.empty()) document["why"] = snapshot.why;
  return document;
}

}  // namespace bulkhead::sample
