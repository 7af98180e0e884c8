#include "engine/meter/meter.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <map>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "base/limits.hpp"
#include "base/text.hpp"
#include "core/lease/lease.hpp"
#include "core/models/models.hpp"
#include "core/usage/usage.hpp"
#include "edge/accounts/accounts.hpp"
#include "edge/sysfs/sysfs.hpp"
#include "engine/share/share.hpp"
#include "engine/slice/slice.hpp"

namespace bulkhead::meter {

namespace fs = std::filesystem;
using accounts::Holder;
using sample::Signal;
using usage::Activity;
using usage::Amounts;

namespace {

__extension__ using Wide = __int128;
using Us = std::int64_t;  // since 1970
using Ns = std::int64_t;  // of the monotonic clock; below nothing before the boot

constexpr Us quarter_us = accounts::quarter_s * 1'000'000;
constexpr Us longest_gap_us = 31LL * 86'400 * 1'000'000;  // a wall clock that was wrong by years bills nobody
constexpr Ns quiet_ns = 60'000'000'000;                   // without a reading: closed unmetered
constexpr Ns fit_every_ns = 60'000'000'000;
constexpr Ns first_fits_ns = 5'000'000'000;
constexpr Ns forget_every_ns = 3'600'000'000'000;
constexpr std::uint64_t most_mj_per_us = 10;  // 10 kW: beyond it no counter of one GPU is believed
constexpr std::size_t most_waiting = 4096;    // steps within the lag
constexpr std::size_t most_kept = 50'000;     // rows that could not be written
constexpr std::size_t samples_of_bin = 4;

// A clock that moved by more than this beside the monotonic one was set; less is the slewing of NTP.
Us tolerance(Us passed) { return 250'000 + passed / 1000; }

Us us_of(WallTime time) { return Us{time.time_since_epoch().count()} * 1000; }

// The compute slices of a whole GPU; chips are planned for in sevenths where nobody knows better.
unsigned slices_of(std::string_view name) {
  unsigned slices = 7;
  std::size_t best = 0;
  const std::string wanted = lower(name);
  for (const auto& model : models::all()) {
    if (model.title.size() <= best || !wanted.starts_with(lower(model.title))) continue;
    best = model.title.size();
    slices = 0;
    for (const auto& profile : models::geometry(model).profiles)
      slices = std::max(slices, profile.compute_slices);
  }
  return std::clamp(slices, 1U, 100U);
}

// "3g.40gb", "1c.3g.40gb" -> 3.
unsigned slices_in(std::string_view profile) {
  for (const auto piece : split(profile, '.')) {
    const auto g = piece.find('g');
    if (g == std::string_view::npos || g == 0) continue;
    if (const auto slices = parse_u64(piece.substr(0, g)); slices && *slices <= 100)
      return static_cast<unsigned>(*slices);
  }
  return 0;
}

std::string bounded(std::string text) {
  if (text.size() > accounts::text_bytes) text.resize(accounts::text_bytes);
  return text;
}

// What a GPU said at one step.
struct Seen {
  bool out = false;                                                       // of service
  std::optional<Activity> whole = {};                                     // of the GPU
  std::vector<std::pair<unsigned, std::optional<Activity>>> slices = {};  // by GPU instance
  std::map<std::int64_t, double> shares = {};                             // of its time, by lease
};
struct Step {
  Us wall = 0;
  Ns mono = 0;
  unsigned era = 0;
  std::map<std::string, Seen> gpus = {};
};

// In which era of the wall clock a lease's times were written; it is set from one to the next.
struct Eras {
  std::optional<unsigned> active = {}, ended = {};
};

struct Reading {
  Ns at = 0;
  std::uint64_t mj = 0;
  std::int64_t epoch = 0;
};

// One who held something through a piece.
struct Stay {
  Holder holder = {};
  Bytes memory = {};
  bool seen = false, guessed = false;  // activity was read; it is the GPU's, shared out
  bool turns = false;                  // on the whole GPU
  std::array<double, 3> worked = {};   // activity x us
  bool same(const Stay& other) const {
    return std::tie(holder, memory.count, seen, guessed, turns) ==
           std::tie(other.holder, other.memory.count, other.seen, other.guessed, other.turns);
  }
};
// In which nothing changed hands.
struct Piece {
  Us end = 0, us = 0;
  Ns from = 0, to = 0;
  unsigned out = 0;  // units
  std::vector<Stay> stays = {};
  bool whole_seen = false;
  std::array<double, 3> whole = {};  // activity of the GPU x us
  Us quarter() const { return (end - 1) / quarter_us; }
  bool joins(const Piece& next) const {
    return to == next.from && quarter() == next.quarter() && out == next.out &&
           whole_seen == next.whole_seen &&
           std::equal(stays.begin(), stays.end(), next.stays.begin(), next.stays.end(),
                      [](const Stay& a, const Stay& b) { return a.same(b); });
  }
};

std::array<double, 3> times(const Activity& activity, Us us) {
  const auto length = static_cast<double>(us);
  return {activity.sm * length, activity.tensor * length, activity.dram * length};
}
void add(std::array<double, 3>& sum, const std::array<double, 3>& more, double part = 1) {
  for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += more[i] * part;
}
Activity mean(const std::array<double, 3>& worked, Us us, double most = 1) {
  const auto of = [&](double value) { return std::clamp(value / static_cast<double>(us), 0.0, most); };
  return {.sm = of(worked[0]), .tensor = of(worked[1]), .dram = of(worked[2])};
}

using Place = std::pair<std::int64_t, unsigned>;  // a lease and which of its parts

struct Account {
  Uuid gpu = {};
  std::string name = {};
  std::optional<unsigned> index = {};
  unsigned slices = 7;
  Us wall = 0;  // pieces are made up to here
  Ns mono = 0;
  bool booted = false;  // the host was, between the mark and now
  bool fresh = false;   // nothing was seen yet by this meter: leases are judged by their times alone
  std::set<Place> holding = {}, done = {};
  std::vector<Piece> open = {};
  Us closed_wall = 0;
  Ns closed_mono = 0;
  std::optional<Reading> counter = {};  // the reading that the open window begins with
  bool late = false;                  // the window begins after it: what passed between was closed without it
  std::deque<Reading> readings = {};  // that lie ahead of what is made
  Ns quiet_since = 0;
  std::int64_t epoch = 0;
  bool moved = true;                                       // the mark is to be written
  std::vector<std::pair<Place, lease::State>> hands = {};  // as of the last step
  Ns named = 0;                                            // when somebody last knew of it
};

struct Model {
  usage::PowerModel power = {.idle = 0, .sm = 1, .tensor = 0, .dram = 0, .error = 1};
  bool fitted = false, changed = false;
  std::map<unsigned, std::deque<usage::Sample>> bins = {};
};

unsigned bin_of(const Activity& a) {
  const auto step = [](double part, unsigned steps) {
    return std::min(steps - 1, static_cast<unsigned>(part * steps));
  };
  return (step(a.sm, 8) * 4 + step(a.tensor, 4)) * 4 + step(a.dram, 4);
}

}  // namespace

struct Meter::Inside {
  fs::path state = {};
  Settings settings = {};
  std::unique_ptr<accounts::Accounts> file = {};
  std::map<std::string, Account> all = {};
  std::map<std::string, accounts::Mark> marks = {};  // of GPUs not seen yet
  std::map<std::string, Model> models = {};
  std::deque<Step> waiting = {};
  unsigned era = 0;
  Us last_wall = 0;
  std::map<std::int64_t, Eras> eras = {};  // of leases in the last snapshot
  std::vector<accounts::Epoch> epochs_new = {};
  accounts::Epoch epoch = {};
  std::map<std::int64_t, std::string> boot_of = {};  // epochs in the file
  Ns last_mono = INT64_MIN, written = INT64_MIN, fitted_at = INT64_MIN, forgot = INT64_MIN;
  // To be written.
  std::map<std::tuple<Us, std::string, std::int64_t, Holder>, Amounts> rows = {};
  std::map<std::tuple<Us, std::string, std::int64_t>, accounts::Passed> passed = {};
  std::string trouble = {}, told = {};  // of this step; of the last

  Status load();
  void complain(std::string what) {
    if (trouble.empty()) trouble = std::move(what);
  }
  void look_at_epoch(WallTime now);
  std::int64_t next_epoch(std::int64_t after, WallTime now);
  Account& account(const Uuid& gpu, Us wall, Ns mono);
  void hear(const sample::Gpu& gpu, WallTime now, Us wall, Ns mono);
  void look_at_clock(const control::Snapshot& has, Us wall, Ns since);
  Step look(const sample::Snapshot& said, const control::Snapshot& has, const Shares& shares, Us wall,
            Ns mono);
  void hurry(const control::Snapshot& has);
  void make(Account& account, const Step& step,
            const std::vector<std::pair<const lease::Lease*, unsigned>>& claims);
  void put(Account& account, Piece piece);
  void close(Account& account);
  std::vector<Piece> take(Account& account, Ns to);
  void settle(Account& account, std::vector<Piece> pieces, std::optional<std::uint64_t> mj,
              std::int64_t epoch);
  void to_operator(const Account& account, std::uint64_t mj, std::int64_t epoch);
  void learn(const Account& account, const std::vector<Piece>& pieces, std::uint64_t mj);
  void fit();
  Model& model(const std::string& name);
  Status write();
};

// ---- what is in the file
Status Meter::Inside::load() {
  all.clear();
  marks.clear();
  waiting.clear();
  rows.clear();
  passed.clear();
  epochs_new.clear();
  boot_of.clear();
  epoch = {};
  BH_TRY(auto written_marks, file->marks());
  for (auto& mark : written_marks) {
    const std::string uuid = mark.gpu.text;
    marks[uuid] = std::move(mark);
  }
  BH_TRY(auto known, file->epochs());
  for (const auto& one : known) boot_of[one.id] = one.boot_id;
  if (!known.empty()) epoch = known.back();
  return ok_status();
}

// The inode of a module's directory in sysfs is drawn anew each time the module is loaded.
void Meter::Inside::look_at_epoch(WallTime now) {
  const auto boot = sysfs::boot_id(settings.root);
  struct stat status {};
  std::string driver = "none";
  if (::stat((settings.root / "sys/module/nvidia").c_str(), &status) == 0)
    driver = fmt::format("module {}", status.st_ino);
  std::string boot_id = bounded(boot.ok() ? *boot : std::string());
  if (epoch.id != 0 && epoch.boot_id == boot_id && epoch.driver == driver) return;
  epoch = {.id = epoch.id + 1, .boot_id = std::move(boot_id), .driver = std::move(driver), .since = now};
  boot_of[epoch.id] = epoch.boot_id;
  epochs_new.push_back(epoch);
}

// One that is not `after`: for a counter that began anew though nothing else says so, as after a GPU's reset.
std::int64_t Meter::Inside::next_epoch(std::int64_t after, WallTime now) {
  if (epoch.id <= after) {
    epoch.id = after + 1;
    epoch.since = now;
    boot_of[epoch.id] = epoch.boot_id;
    epochs_new.push_back(epoch);
  }
  return epoch.id;
}

Account& Meter::Inside::account(const Uuid& gpu, Us wall, Ns mono) {
  const auto found = all.find(gpu.text);
  if (found != all.end()) return found->second;
  Account fresh{.gpu = gpu, .wall = wall, .mono = mono, .fresh = true, .epoch = epoch.id, .named = mono};
  if (const auto mark = marks.find(gpu.text); mark != marks.end()) {
    const auto& was = mark->second;
    const auto boot = boot_of.find(was.epoch);
    const Ns then = static_cast<Ns>(std::min<std::uint64_t>(was.monotonic_ns, INT64_MAX));
    fresh.name = was.name;
    fresh.wall = was.until_us;
    fresh.booted = boot == boot_of.end() || boot->second != epoch.boot_id || then > mono;
    // Of another boot this clock says nothing.
    fresh.mono = fresh.booted ? mono - std::clamp<Us>(wall - fresh.wall, 0, longest_gap_us) * 1000 : then;
    if (was.counter_mj) {
      const Ns at = fresh.booted ? fresh.mono : std::min(fresh.mono, static_cast<Ns>(was.counter_ns));
      fresh.counter = Reading{.at = at, .mj = *was.counter_mj, .epoch = was.epoch};
      fresh.late = at < fresh.mono;
    }
    fresh.epoch = was.epoch;
  }
  fresh.closed_wall = fresh.wall;
  fresh.closed_mono = fresh.mono;
  fresh.quiet_since = mono;
  fresh.slices = slices_of(fresh.name);
  written = INT64_MIN;  // at once: who is killed now knows that it was there
  return all.emplace(gpu.text, std::move(fresh)).first->second;
}

// ---- what is shown
// Steps are counted after the lag, when the wall clock may have been set: a time says nothing without its
// era.
void Meter::Inside::look_at_clock(const control::Snapshot& has, Us wall, Ns since) {
  const Us due = since / 1000;
  const bool set = last_mono != INT64_MIN && std::abs(wall - last_wall - due) > tolerance(due);
  if (set) ++era;
  std::map<std::int64_t, Eras> now;
  for (const auto& [id, one] : has.leases) {
    if (!one->active_since) continue;
    Eras its;
    if (const auto known = eras.find(id); known != eras.end()) its = known->second;
    const auto first_seen = [&](const std::optional<WallTime>& time, std::optional<unsigned>& in) {
      if (!time || in) return;
      const bool by_this_clock = us_of(*time) <= wall && us_of(*time) >= wall - due - tolerance(due);
      in = set && !by_this_clock ? era - 1 : era;
    };
    first_seen(one->active_since, its.active);
    first_seen(one->ended, its.ended);
    now.emplace_hint(now.end(), id, its);
  }
  eras = std::move(now);
  last_wall = wall;
}

void Meter::Inside::hear(const sample::Gpu& gpu, WallTime now, Us wall, Ns mono) {
  Account& mine = account(gpu.uuid, wall, mono);
  mine.named = mono;
  mine.index = gpu.index;
  if (!gpu.name.empty() && mine.name != gpu.name) {
    mine.name = bounded(printable(gpu.name, accounts::text_bytes));
    mine.slices = slices_of(mine.name);
  }
  const auto& energy = gpu[Signal::energy];
  if (!energy.known() || !(energy.number >= 0 && energy.number < 1e12)) return;
  Reading reading{.at = static_cast<Ns>(std::min<std::uint64_t>(energy.at_ns, INT64_MAX)),
                  .mj = static_cast<std::uint64_t>(std::llround(energy.number * 1000)),
                  .epoch = epoch.id};
  const std::optional<Reading> last =
      mine.readings.empty() ? mine.counter : std::optional(mine.readings.back());
  if (last && !mine.booted && reading.at <= last->at) return;
  if (reading.at > mono) return;  // a time to come: nothing that this clock showed
  if (last && last->epoch == reading.epoch && reading.mj < last->mj)
    reading.epoch = next_epoch(last->epoch, now);
  if (mine.readings.size() < most_waiting) mine.readings.push_back(reading);
}

Step Meter::Inside::look(const sample::Snapshot& said, const control::Snapshot& has, const Shares& shares,
                         Us wall, Ns mono) {
  Step step{.wall = wall, .mono = mono, .era = era};
  for (const auto& gpu : said.gpus) {
    if (gpu.uuid.text.empty() || all.find(gpu.uuid.text) == all.end()) continue;
    Seen& seen = step.gpus[gpu.uuid.text];
    seen.out = gpu.state == sample::State::hung || gpu.state == sample::State::lost;
    const auto of = [&](const sample::Values& values, sample::Tier tier) -> std::optional<Activity> {
      const double period = gpu.tier[static_cast<std::size_t>(tier)].period_ms;
      const auto oldest = static_cast<Ns>(std::clamp(period * 2.5, 3'000.0, 150'000.0) * 1e6);
      std::array<double, 3> parts{};
      std::size_t i = 0;
      for (const auto signal : {Signal::sm, Signal::tensor, Signal::dram}) {
        const auto& value = values[static_cast<std::size_t>(signal)];
        if (!value.known() || mono - static_cast<Ns>(value.at_ns) > oldest || !std::isfinite(value.number)) {
          if (signal == Signal::sm) return std::nullopt;
          ++i;  // a chip without tensor pipes: nothing
          continue;
        }
        parts[i++] = std::clamp(value.number / 100, 0.0, 1.0);
      }
      return Activity{.sm = parts[0], .tensor = parts[1], .dram = parts[2]};
    };
    if (seen.out) continue;
    seen.whole = of(gpu.values, sample::Tier::gpm);
    for (const auto& slice : gpu.slices)
      seen.slices.emplace_back(slice.gpu_instance, of(slice.values, sample::Tier::slices));
  }
  for (const auto& [whose, part] : shares)
    if (all.find(whose.first) != all.end() && std::isfinite(part))
      step.gpus[whose.first].shares[whose.second] = std::clamp(part, 0.0, 1.0);
  for (const auto& gpu : has.gpus) {
    if (all.find(gpu.gpu.text) == all.end()) continue;
    Seen& seen = step.gpus[gpu.gpu.text];
    seen.out = seen.out || has.draining || gpu.cordon.has_value() || gpu.pool == "none";
  }
  // Known from before, and named by nobody now.
  for (const auto& [uuid, mine] : all)
    if (step.gpus.find(uuid) == step.gpus.end()) step.gpus[uuid].out = true;
  return step;
}

void Meter::Inside::hurry(const control::Snapshot& has) {
  std::map<std::string, std::vector<std::pair<Place, lease::State>>> now;
  for (const auto& [id, one] : has.leases) {
    if (!lease::holds(one->state)) continue;
    for (unsigned i = 0; i < one->parts.size(); ++i)
      now[one->parts[i].gpu.text].emplace_back(Place{id, i}, one->state);
  }
  for (auto& [uuid, mine] : all) {
    auto& hands = now[uuid];
    if (hands == mine.hands) continue;
    mine.hands = std::move(hands);
    if (mine.index && settings.hurry) settings.hurry(*mine.index);
  }
}

// ---- pieces
void Meter::Inside::make(Account& mine, const Step& step,
                         const std::vector<std::pair<const lease::Lease*, unsigned>>& claims) {
  if (step.mono <= mine.mono) return;
  const Us wall_passed = step.wall - mine.wall;
  const Us mono_passed = (step.mono - mine.mono) / 1000;
  const bool set = !mine.booted && std::abs(wall_passed - mono_passed) > tolerance(mono_passed);
  const Us length =
      std::clamp<Us>(mine.booted ? wall_passed : (set ? mono_passed : wall_passed), 0, longest_gap_us);
  const Us b = step.wall, a = b - length;
  const Us then = mine.wall;
  const Ns from = mine.mono;
  const bool fresh = std::exchange(mine.fresh, false), booted = std::exchange(mine.booted, false);
  mine.wall = b;
  mine.mono = step.mono;
  if (length == 0) {  // within a millisecond: what follows begins where the last piece ended
    if (!mine.open.empty()) mine.open.back().to = mine.mono;
    return;
  }

  static const Eras unknown;
  // Where a time that was written by the wall clock lies in a..b.
  const auto where = [&](WallTime time, const std::optional<unsigned>& in) {
    const Us at = us_of(time);
    if (in.value_or(step.era) > step.era) return b;      // not yet
    if (in.value_or(step.era) + 1 < step.era) return a;  // long ago
    if (in.value_or(step.era) < step.era) return set ? std::clamp(a + (at - then), a, b) : a;
    if (!set || (at >= b - mono_passed && at <= b)) return std::clamp(at, a, b);
    return std::clamp(a + (at - then), a, b);  // by the clock as it was before it was set
  };
  struct Span {
    Us from = 0, to = 0;
    const lease::Lease* lease = nullptr;
    unsigned part = 0;
    bool held = true;  // else being prepared or scrubbed
  };
  std::vector<Span> spans;
  std::set<Place> holding, done;
  for (const auto& [lease, part] : claims) {
    const Place place{lease->id, part};
    if (mine.done.contains(place)) {
      done.insert(place);
      if (lease->state == lease::State::releasing) spans.push_back({a, b, lease, part, false});
      continue;
    }
    const bool known = !fresh && mine.holding.contains(place);
    const bool over = lease->state == lease::State::releasing || lease::over(lease->state);
    if (lease->state == lease::State::preparing || !lease->active_since) {
      if (lease::holds(lease->state)) spans.push_back({a, b, lease, part, false});
      continue;
    }
    const auto its = eras.find(lease->id);
    const Eras& when = its == eras.end() ? unknown : its->second;
    const Us begins = known ? a : where(*lease->active_since, when.active);
    const Us ends = over && lease->ended ? std::max(begins, where(*lease->ended, when.ended)) : b;
    if (begins < ends) spans.push_back({begins, ends, lease, part, true});
    if (over && ends < b) {
      done.insert(place);
      if (lease->state == lease::State::releasing) spans.push_back({ends, b, lease, part, false});
    } else if (begins < b) {
      holding.insert(place);
    }
  }
  mine.holding = std::move(holding);
  mine.done = std::move(done);
  std::sort(spans.begin(), spans.end(), [](const Span& x, const Span& y) {
    return std::tuple(x.from, x.lease->id, x.part) < std::tuple(y.from, y.lease->id, y.part);
  });

  std::set<Us> cuts{b};
  for (Us at = (a / quarter_us + 1) * quarter_us; at < b; at += quarter_us) cuts.insert(at);
  for (const auto& span : spans)
    for (const Us at : {span.from, span.to})
      if (at > a && at < b) cuts.insert(at);

  static const Seen nothing;
  const auto found = step.gpus.find(mine.gpu.text);
  const Seen& seen = found == step.gpus.end() ? nothing : found->second;
  // A reading speaks of the seconds before it, not of the hours that nobody looked.
  const bool looked = length <= (fresh ? 3'000'000 : 30'000'000);
  const auto mono_at = [&](Us at) {
    return from + static_cast<Ns>(Wide{step.mono - from} * (at - a) / length);
  };
  Us begin = a;
  for (const Us end : cuts) {
    Piece piece{.end = end, .us = end - begin, .from = mono_at(begin), .to = mono_at(end)};
    unsigned free = usage::whole_gpu, wanted_out = 0;
    double worked = 0;  // of the whole GPU's SMs, by those who hold
    std::set<unsigned> instances;
    std::vector<std::size_t> shares;
    for (const auto& span : spans) {
      if (span.from >= end || span.to <= begin) continue;
      const auto& part = span.lease->parts[span.part];
      if (part.gpu_instance) instances.insert(*part.gpu_instance);
      unsigned units = usage::whole_gpu;
      if (span.lease->ask.cls == lease::Class::mig)
        units = std::min(usage::whole_gpu, usage::whole_gpu / mine.slices * slices_in(part.profile));
      if (span.lease->ask.cls == lease::Class::share)
        units = std::clamp(part.weight, 1U, 1000U) * (usage::whole_gpu / 1000);
      if (!span.held || booted) {
        wanted_out += units;
        continue;
      }
      if (units > free) {
        complain(fmt::format("gpu {}: lease {} and those before it hold more than there is", mine.gpu.text,
                             span.lease->id));
        units = free;
      }
      free -= units;
      Stay stay{.holder = {.kind = accounts::Kind::lease,
                           .lease = span.lease->id,
                           .part = span.part,
                           .tenant = bounded(span.lease->tenant),
                           .user = bounded(span.lease->user),
                           .cls = std::string(lease::name_of(span.lease->ask.cls)),
                           .profile = bounded(part.profile),
                           .label = bounded(span.lease->ask.label),
                           .units = units,
                           .generation = part.generation},
                .memory = part.memory};
      std::optional<Activity> activity;
      switch (span.lease->ask.cls) {
        case lease::Class::mig:
          for (const auto& [id, its] : seen.slices)
            if (part.gpu_instance == id) activity = its;
          break;
        case lease::Class::exclusive:
          activity = seen.whole;
          break;
        case lease::Class::share:
          shares.push_back(piece.stays.size());
          break;
        case lease::Class::passthrough:
          break;  // the guest's driver has it
      }
      if (activity && looked) {
        stay.seen = true;
        stay.worked = times(*activity, piece.us);
        worked += activity->sm * units;
      }
      piece.stays.push_back(std::move(stay));
    }
    if (!shares.empty() && seen.whole && looked) {
      // One who shares with nobody did all of it. Of more than one, each did the part of it that the driver
      // says its processes had of the GPU's time. Where somebody's is not known the time slices are what is:
      // each counts by its slice, and as not read.
      unsigned units = 0;
      double sum = 0;
      bool known = true;
      for (const auto i : shares) {
        units += piece.stays[i].holder.units;
        const auto at = seen.shares.find(piece.stays[i].holder.lease);
        known = known && at != seen.shares.end();
        if (at != seen.shares.end()) sum += at->second;
      }
      for (const auto i : shares) {
        Stay& stay = piece.stays[i];
        double part = static_cast<double>(stay.holder.units) / std::max(1U, units);
        if (shares.size() > 1 && known && sum > 0.001) part = seen.shares.at(stay.holder.lease) / sum;
        // Of the whole GPU's work, as a part of what is its own: more than all of it where others leave it
        // some.
        const double up = part * usage::whole_gpu / std::max(1U, stay.holder.units);
        const Activity own{
            .sm = seen.whole->sm * up, .tensor = seen.whole->tensor * up, .dram = seen.whole->dram * up};
        stay.seen = true;
        stay.guessed = shares.size() > 1 && !known;
        stay.turns = true;
        stay.worked = times(own, piece.us);
        worked += own.sm * stay.holder.units;
      }
    }
    piece.out = seen.out || booted ? free : std::min(wanted_out, free);
    free -= piece.out;
    // An instance that nobody leased and that works, or might: the operator's, so that no tenant pays for it.
    bool foreign = false, foreign_read = true;
    for (const auto& [id, its] : seen.slices) {
      if (instances.contains(id)) continue;
      foreign = foreign || !its || its->sm > 0.005;
      foreign_read = foreign_read && its.has_value();
    }
    if (foreign && free > 0) {
      Stay stay{.holder = {.units = free}};
      if (seen.whole && foreign_read && looked) {
        const double rest = (seen.whole->sm * usage::whole_gpu - worked) / free;
        Activity left = *seen.whole;
        left.sm = std::clamp(rest, 0.0, 1.0);
        stay.seen = stay.guessed = true;
        stay.worked = times(left, piece.us);
      }
      piece.stays.push_back(std::move(stay));
    }
    if (seen.whole && looked) {
      piece.whole_seen = true;
      piece.whole = times(*seen.whole, piece.us);
    }
    put(mine, std::move(piece));
    begin = end;
  }
}

void Meter::Inside::put(Account& mine, Piece piece) {
  if (mine.open.empty() || !mine.open.back().joins(piece)) return mine.open.push_back(std::move(piece));
  Piece& last = mine.open.back();
  last.end = piece.end;
  last.us += piece.us;
  last.to = piece.to;
  add(last.whole, piece.whole);
  for (std::size_t i = 0; i < last.stays.size(); ++i) add(last.stays[i].worked, piece.stays[i].worked);
}

// Off the open pieces what lies before a moment.
std::vector<Piece> Meter::Inside::take(Account& mine, Ns to) {
  std::vector<Piece> out;
  std::size_t whole = 0;
  while (whole < mine.open.size() && mine.open[whole].to <= to) ++whole;
  std::move(mine.open.begin(), mine.open.begin() + static_cast<std::ptrdiff_t>(whole),
            std::back_inserter(out));
  mine.open.erase(mine.open.begin(), mine.open.begin() + static_cast<std::ptrdiff_t>(whole));
  if (!mine.open.empty() && mine.open.front().from < to) {
    Piece& rest = mine.open.front();
    const Us us = static_cast<Us>(Wide{rest.us} * (to - rest.from) / (rest.to - rest.from));
    if (us > 0 && us < rest.us) {
      Piece first = rest;
      const double part = static_cast<double>(us) / static_cast<double>(rest.us);
      const auto divide = [&](std::array<double, 3>& one, std::array<double, 3>& other) {
        for (std::size_t i = 0; i < one.size(); ++i) one[i] *= part, other[i] *= 1 - part;
      };
      first.us = us;
      first.to = to;
      first.end = rest.end - (rest.us - us);
      rest.us -= us;
      rest.from = to;
      divide(first.whole, rest.whole);
      for (std::size_t i = 0; i < first.stays.size(); ++i)
        divide(first.stays[i].worked, rest.stays[i].worked);
      out.push_back(std::move(first));
    }
  }
  if (!out.empty()) {
    mine.closed_wall = out.back().end;
    mine.moved = true;
  }
  return out;
}

// ---- windows: from reading to reading
void Meter::Inside::close(Account& mine) {
  while (!mine.readings.empty() && mine.readings.front().at <= mine.mono) {
    const Reading reading = mine.readings.front();
    mine.readings.pop_front();
    auto pieces = take(mine, reading.at);
    std::optional<std::uint64_t> mj;
    const bool goes_on =
        mine.counter && mine.counter->epoch == reading.epoch && reading.mj >= mine.counter->mj;
    if (goes_on) {
      mj = reading.mj - mine.counter->mj;
      const auto us = static_cast<std::uint64_t>(std::max<Ns>(0, reading.at - mine.counter->at)) / 1000;
      if (*mj > (us + 1'000'000) * most_mj_per_us) {
        complain(fmt::format("gpu {}: its energy counter says {} J passed in {} s: not believed",
                             mine.gpu.text, *mj / 1000, us / 1'000'000));
        mj.reset();
      }
    }
    if (mj && mine.late) {
      // Part of it passed in what was closed without it: who that was is not judged twice.
      const Ns all_of_it = reading.at - mine.counter->at;
      const Ns ours = std::clamp<Ns>(reading.at - mine.closed_mono, 0, all_of_it);
      const auto part =
          pieces.empty() || all_of_it <= 0 ? 0 : static_cast<std::uint64_t>(Wide{*mj} * ours / all_of_it);
      to_operator(mine, *mj - part, reading.epoch);
      mj = part;
    } else if (mj && pieces.empty()) {
      to_operator(mine, *mj, reading.epoch);
    } else if (mj) {
      learn(mine, pieces, *mj);
    }
    settle(mine, std::move(pieces), mj, reading.epoch);
    mine.closed_mono = std::max(mine.closed_mono, reading.at);
    mine.counter = reading;
    mine.late = false;
    mine.quiet_since = reading.at;
    mine.epoch = reading.epoch;
    mine.moved = true;
  }
  if (mine.mono - mine.quiet_since > quiet_ns && !mine.open.empty()) {
    settle(mine, take(mine, mine.mono), std::nullopt, mine.epoch);
    mine.closed_mono = mine.mono;
    mine.late = true;
  }
}

void Meter::Inside::settle(Account& mine, std::vector<Piece> pieces, std::optional<std::uint64_t> mj,
                           std::int64_t in_epoch) {
  std::vector<usage::Interval> intervals;
  for (const auto& piece : pieces) {
    usage::Interval one{
        .gpu = mine.gpu, .us = static_cast<std::uint64_t>(piece.us), .out_of_service = piece.out};
    for (const auto& stay : piece.stays) {
      one.held.push_back({.lease = stay.holder.lease,
                          .tenant = stay.holder.tenant,
                          .units = stay.holder.units,
                          .memory = stay.memory,
                          .guessed = stay.guessed});
      one.held.back().turns = stay.turns;
      if (stay.seen)
        one.held.back().activity =
            mean(stay.worked, piece.us,
                 stay.turns ? static_cast<double>(usage::whole_gpu) / std::max(1U, stay.holder.units) : 1);
    }
    intervals.push_back(std::move(one));
  }
  const auto& power = model(mine.name).power;
  if (mj && !intervals.empty()) {
    if (const auto given = usage::portion(intervals, Millijoules(*mj), power); !given.ok())
      complain(given.error().message());
  }
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    auto& interval = intervals[i];
    auto made = usage::split(interval, power);
    if (made.ok())
      if (const auto sums = usage::adds_up(interval, *made); !sums.ok()) made = sums.error();
    if (!made.ok()) {
      // Our mistake: the time is nobody's rather than wrong.
      complain(made.error().message());
      interval.held.clear();
      interval.out_of_service = 0;
      made = usage::split(interval, power);
      if (!made.ok()) continue;
    }
    const Us quarter = pieces[i].quarter();
    const auto book = [&](const Holder& holder, const Amounts& amounts) {
      if (amounts == Amounts{}) return;
      auto& row = rows[{quarter, mine.gpu.text, in_epoch, holder}];
      row = row + amounts;
    };
    Amounts nobody = made->unallocated;
    for (std::size_t j = 0; j < made->holders.size(); ++j) {
      const Holder& holder = pieces[i].stays[j].holder;
      if (holder.kind == accounts::Kind::lease)
        book(holder, made->holders[j]);
      else
        nobody = nobody + made->holders[j];
    }
    if (nobody.unit_us + nobody.idle_mj + nobody.dynamic_mj > 0) {
      nobody.unmetered_us = nobody.unit_us > 0 && !interval.energy ? interval.us : 0;
      book({}, nobody);
    }
    book({.kind = accounts::Kind::out_of_service}, made->out_of_service);
    auto& sum = passed[{quarter, mine.gpu.text, in_epoch}];
    sum.us += interval.us;
    if (interval.energy) sum.energy_mj += interval.energy->count;
    if (!interval.energy) sum.unmetered_us += interval.us;
  }
}

void Meter::Inside::to_operator(const Account& mine, std::uint64_t mj, std::int64_t in_epoch) {
  if (mj == 0) return;
  const Us quarter = (std::max<Us>(1, mine.closed_wall) - 1) / quarter_us;
  auto& row = rows[{quarter, mine.gpu.text, in_epoch, Holder{}}];
  row.dynamic_mj += mj;
  passed[{quarter, mine.gpu.text, in_epoch}].energy_mj += mj;
}

// ---- the power model
Model& Meter::Inside::model(const std::string& name) { return models[name]; }

void Meter::Inside::learn(const Account& mine, const std::vector<Piece>& pieces, std::uint64_t mj) {
  Us us = 0;
  std::array<double, 3> worked{};
  for (const auto& piece : pieces) {
    if (!piece.whole_seen) return;
    us += piece.us;
    add(worked, piece.whole);
  }
  if (us < 1'000'000 || us > 120'000'000) return;
  Model& its = model(mine.name);
  const usage::Sample one{.activity = mean(worked, us),
                          .watts = static_cast<double>(mj) * 1000 / static_cast<double>(us)};
  auto& bin = its.bins[bin_of(one.activity)];
  bin.push_back(one);
  if (bin.size() > samples_of_bin) bin.pop_front();
  its.changed = true;
}

void Meter::Inside::fit() {
  for (auto& [name, its] : models) {
    if (!its.changed) continue;
    std::vector<usage::Sample> samples;
    for (const auto& [number, bin] : its.bins) samples.insert(samples.end(), bin.begin(), bin.end());
    if (auto power = usage::fit(samples); power.ok()) {
      its.power = *power;
      its.fitted = true;
      continue;
    }
    // Until activity has moved: what it drew while nothing worked.
    its.power = {.idle = 0, .sm = 1, .tensor = 0, .dram = 0, .error = 1};
    for (const auto& one : samples)
      if (one.activity.sm < 0.02 && (its.power.idle == 0 || one.watts < its.power.idle))
        its.power.idle = one.watts;
  }
}

// ---- the file
Status Meter::Inside::write() {
  accounts::Batch batch;
  for (const auto& [key, amounts] : rows)
    batch.rows.push_back({.quarter = std::get<0>(key),
                          .gpu = {std::get<1>(key)},
                          .epoch = std::get<2>(key),
                          .holder = std::get<3>(key),
                          .amounts = amounts});
  for (const auto& [key, sum] : passed)
    batch.passed.push_back({.quarter = std::get<0>(key),
                            .gpu = {std::get<1>(key)},
                            .epoch = std::get<2>(key),
                            .us = sum.us,
                            .energy_mj = sum.energy_mj,
                            .unmetered_us = sum.unmetered_us});
  for (const auto& [uuid, mine] : all) {
    if (!mine.moved) continue;
    accounts::Mark mark{.gpu = mine.gpu,
                        .name = mine.name,
                        .until_us = mine.closed_wall,
                        .monotonic_ns = static_cast<std::uint64_t>(std::max<Ns>(0, mine.closed_mono)),
                        .epoch = mine.epoch};
    if (mine.counter) {
      mark.counter_mj = mine.counter->mj;
      mark.counter_ns = static_cast<std::uint64_t>(std::max<Ns>(0, mine.counter->at));
    }
    batch.marks.push_back(std::move(mark));
  }
  batch.epochs = epochs_new;
  for (auto& [name, its] : models) {
    if (!its.changed) continue;
    accounts::Fit fit{.model = name, .power = its.power, .fitted = its.fitted};
    for (const auto& [number, bin] : its.bins) fit.samples.insert(fit.samples.end(), bin.begin(), bin.end());
    batch.fits.push_back(std::move(fit));
  }
  if (batch.empty()) return ok_status();
  if (auto done = file->commit(batch); !done.ok()) {
    // The disk is full, most often. What waits is bounded: beyond it, it is as if the daemon had been killed,
    // and the marks in the file say where to go on.
    if (rows.size() > most_kept) {
      if (auto again = load(); !again.ok()) return again;
    }
    return done;
  }
  rows.clear();
  passed.clear();
  epochs_new.clear();
  for (auto& [uuid, mine] : all) mine.moved = false;
  for (auto& [name, its] : models) its.changed = false;
  return ok_status();
}

Meter::Meter() : inside_(std::make_unique<Inside>()) {}
Meter::~Meter() { (void)inside_->write(); }

Result<std::unique_ptr<Meter>> Meter::open(const fs::path& state, Settings settings) {
  std::unique_ptr<Meter> meter(new Meter());
  Inside& inside = *meter->inside_;
  inside.state = state;
  inside.settings = std::move(settings);
  BH_TRY(inside.file, accounts::Accounts::open(state, accounts::Accounts::Access::read_write));
  BH_CHECK(inside.load());
  BH_TRY(const auto fits, inside.file->fits());
  for (const auto& fit : fits) {
    Model& its = inside.models[fit.model];
    its.power = fit.power;
    its.fitted = fit.fitted;
    for (const auto& one : fit.samples) {
      const Activity& a = one.activity;
      if (!(a.sm <= 1 && a.tensor <= 1 && a.dram <= 1)) continue;
      auto& bin = its.bins[bin_of(a)];
      if (bin.size() < samples_of_bin) bin.push_back(one);
    }
  }
  return meter;
}

Status Meter::write() { return inside_->write(); }

Shares shares_now(const std::filesystem::path& root, const control::Snapshot& has) {
  Shares out;
  std::map<std::string, std::pair<std::int64_t, const lease::Lease*>> names;
  for (const auto& [id, one] : has.leases)
    if (one->ask.cls == lease::Class::share && one->state == lease::State::active)
      names[slice::share_name(id)] = {id, one.get()};
  if (names.empty()) return out;
  const auto tenants = share::list({.root = root});
  if (!tenants.ok()) return out;
  for (const auto& [name, lease] : names)
    for (const auto& part : lease.second->parts)
      out[{part.gpu.text, lease.first}] = 0;  // no program: no work
  for (const auto& tenant : *tenants) {
    const auto lease = names.find(tenant.asked.name);
    if (lease == names.end() || !tenant.alive) continue;
    const auto at = out.find({tenant.asked.gpu, lease->second.first});
    if (at == out.end()) continue;  // its lease is of another GPU
    if (tenant.now && tenant.now->busy)
      at->second += *tenant.now->busy;
    else
      out.erase(at);
  }
  return out;
}

Status Meter::step(const sample::Snapshot& said, const control::Snapshot& has, WallTime now,
                   std::uint64_t monotonic_ns, const Shares& shares) {
  Inside& inside = *inside_;
  const Us wall = us_of(now);
  const Ns mono = static_cast<Ns>(std::min<std::uint64_t>(monotonic_ns, INT64_MAX / 2));
  if (mono <= inside.last_mono) return ok_status();
  inside.look_at_clock(has, wall, inside.last_mono == INT64_MIN ? 0 : mono - inside.last_mono);
  inside.last_mono = mono;
  inside.trouble.clear();
  inside.look_at_epoch(now);
  for (const auto& gpu : said.gpus)
    if (!gpu.uuid.text.empty() && gpu.uuid.text.size() <= accounts::text_bytes &&
        (inside.all.size() < limits::gpus || inside.all.contains(gpu.uuid.text)))
      inside.hear(gpu, now, wall, mono);
  for (const auto& gpu : has.gpus) {
    if (gpu.gpu.text.empty() || gpu.gpu.text.size() > accounts::text_bytes) continue;
    if (inside.all.size() >= limits::gpus && !inside.all.contains(gpu.gpu.text)) continue;
    Account& mine = inside.account(gpu.gpu, wall, mono);
    mine.named = mono;
    if (!mine.index) mine.index = gpu.index;
    if (mine.name.empty()) {
      mine.name = bounded(printable(gpu.name, accounts::text_bytes));
      mine.slices = slices_of(mine.name);
    }
  }
  // A GPU that the file knows and nobody names is out of service, until it is taken for gone.
  for (const auto& [uuid, mark] : inside.marks) {
    if (wall - mark.until_us > longest_gap_us || inside.all.size() >= limits::gpus) continue;
    (void)inside.account(mark.gpu, wall, mono);
  }
  inside.marks.clear();
  std::erase_if(inside.all, [&](const auto& one) {
    return (mono - one.second.named) / 1000 > longest_gap_us && !one.second.moved;
  });

  inside.waiting.push_back(inside.look(said, has, shares, wall, mono));
  inside.hurry(has);
  const Ns lag = std::chrono::nanoseconds(inside.settings.lag).count();
  while (!inside.waiting.empty() &&
         (inside.waiting.front().mono + lag <= mono || inside.waiting.size() > most_waiting)) {
    const Step step = std::move(inside.waiting.front());
    inside.waiting.pop_front();
    std::map<std::string, std::vector<std::pair<const lease::Lease*, unsigned>>> claims;
    for (const auto& [id, one] : has.leases) {
      if (!lease::holds(one->state) && !(lease::over(one->state) && one->active_since)) continue;
      for (unsigned i = 0; i < one->parts.size(); ++i)
        claims[one->parts[i].gpu.text].emplace_back(one.get(), i);
    }
    for (auto& [uuid, mine] : inside.all) inside.make(mine, step, claims[uuid]);
  }
  for (auto& [uuid, mine] : inside.all) inside.close(mine);

  // What idle draws is known after seconds; until it is, all that a GPU draws would go by work.
  const bool young = std::any_of(inside.models.begin(), inside.models.end(),
                                 [](const auto& one) { return one.second.changed && !one.second.fitted; });
  if (inside.fitted_at == INT64_MIN ||
      mono - inside.fitted_at >= (young ? std::min<Ns>(fit_every_ns, first_fits_ns) : fit_every_ns)) {
    inside.fitted_at = mono;
    inside.fit();
  }
  const Ns every = std::chrono::nanoseconds(inside.settings.write_every).count();
  if (inside.written == INT64_MIN || mono - inside.written >= every) {
    inside.written = mono;
    if (const auto done = inside.write(); !done.ok()) inside.complain(done.error().message());
  }
  if (inside.forgot == INT64_MIN || mono - inside.forgot >= forget_every_ns) {
    inside.forgot = mono;
    const Us keep = std::chrono::microseconds(inside.settings.keep).count();
    if (const auto done = inside.file->forget((wall - keep) / quarter_us); !done.ok())
      inside.complain(done.error().message());
    else if (!*done)
      inside.forgot = mono - forget_every_ns + 10'000'000'000;  // there is more
  }
  if (inside.trouble == inside.told) return ok_status();
  inside.told = inside.trouble;
  if (inside.trouble.empty()) return ok_status();
  return Error(Errc::io, inside.trouble);
}

}  // namespace bulkhead::meter
