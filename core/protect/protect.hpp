// When a machine is in trouble, and what to do about it, mildest first: one table from alarm to action, and a
// guard that walks it. Pure: readings come with their time, what comes out is the alarms that are open and
// the state that is wanted of each GPU. Wanted is a state, not a command: whoever carries it out may die and
// begin anew, and ends up in the same place. docs/design/protection.md has the table with its reasons.
//
// An alarm opens when its measure stays at or above a threshold, and closes by itself when fresh readings
// stay at or below a lower one. A reading that does not come is no evidence: it neither opens nor closes.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.hpp"
#include "base/ids.hpp"
#include "base/json.hpp"
#include "core/spec/spec.hpp"
#include "core/thermal/thermal.hpp"

namespace bulkhead::protect {

enum class Kind : std::uint8_t {
  heat,              // no room below the ceiling or the part's own margin
  heat_ahead,        // there will be none in a minute
  cooling,           // hotter than its power explains: resistance rises
  hw_thermal,        // the part slows itself down
  power_brake,       // the rack or a supply told the part to slow down
  silent,            // its readings do not come any more
  memory_errors,     // uncorrectable ones
  memory_pending,    // a row waits to be remapped
  memory_failed,     // no row left to remap to
  link_errors,       // NVLink of a GPU, or an InfiniBand port
  node_power,        // what the node draws, against what it may
  rack_power,        // the sum of limits, against the node's part of the rack
  cooling_capacity,  // heat, against what the operator says the cooling takes away
  ramp,              // power that changes faster than it may, up or down
  fan,               // the BMC says so
  rail,              // a supply voltage is out of bounds
  end
};
inline constexpr std::size_t kinds = static_cast<std::size_t>(Kind::end);

enum class Severity : std::uint8_t { notice, warning, critical };
std::string_view name_of(Severity severity);

using Action = spec::Protect::Action;  // none, hold, power, clocks, pause, drain, fence: mildest first

// ---- the table. A measure grows with the trouble.
struct Row {
  Kind kind = Kind::end;
  std::string_view name = {};     // of the API and the metrics; never renamed
  std::string_view measure = {};  // what is compared, in words
  std::string_view unit = {};
  bool of_gpu = true;  // else of the host: its actions are for every GPU
  Severity severity = Severity::warning;
  double opens = 0, closes = 0;                // at or above; at or below
  double open_after_s = 0, close_after_s = 0;  // for so long
  std::optional<double> critical = {};         // at or above
  Action most = Action::hold;                  // the harshest that this alarm may want
  double better = 0;          // what the measure must fall by between two steps, for no harsher step to come
  std::string_view why = {};  // one sentence
};
std::span<const Row> rows();
const Row& row_of(Kind kind);

// ---- the ladder of one GPU: rung 0 is nothing
struct Rung {
  Action action = Action::none;
  double part = 1;  // power: of the limit that was; clocks: of the highest clock
  std::string_view what = {};
};
std::span<const Rung> ladder();
unsigned highest_rung(Action action);  // the last one of that action

// ---- what is read
struct Stamped {
  double number = 0;
  double at_s = 0;  // monotonic
};
using Seen = std::optional<Stamped>;

struct Holder {
  std::int64_t lease = 0;
  std::string tenant = {};
};
struct GpuReading {
  Uuid gpu = {};
  unsigned index = 0;
  bool answers = true;  // false: hung or lost, in the sampler's words
  bool rests = false;   // not read because somebody who changes the host asked for it
  std::string why = {};
  Seen celsius = {}, margin = {}, watts = {}, limit = {}, joules = {};
  Seen hw_thermal_ns = {}, power_brake_ns = {};  // in all
  Seen ecc_uncorrected = {}, remap_pending = {}, remap_failed = {};
  Seen link_errors = {};  // damaged, as a part of what was carried
  std::vector<Holder> leases = {};
};
struct Fan {
  std::string name = {};
  double rpm = 0, at_s = 0;
  bool failed = false;  // as the BMC judges by its own thresholds
};
struct Rail {
  std::string name = {};
  double volts = 0, lowest = 0, at_s = 0;  // lowest: 0: the BMC does not say; then 5 % below the nominal
  double nominal = 12;
};
struct Port {  // InfiniBand
  std::string name = {};
  Seen errors = {};
};
struct Reading {
  double at_s = 0;  // monotonic
  WallTime wall = {};
  std::vector<GpuReading> gpus = {};
  std::vector<Fan> fans = {};
  std::vector<Rail> rails = {};
  std::vector<Port> ports = {};
  Seen inlet = {};       // C
  Seen node_watts = {};  // of the whole node, from the BMC; else GPUs and `rest_power` are added up
};

// ---- what comes out
struct Alarm {
  std::string id = {};  // "heat.gpu3": one is open of each at a time
  Kind kind = Kind::end;
  Severity severity = Severity::warning;
  std::optional<Uuid> gpu = {};
  std::string subject = {};  // "gpu 3", "host", "fan SYS_FAN2"
  std::string what = {};     // one sentence
  WallTime since = {};
  std::optional<WallTime> closed = {};
  double measure = 0, worst = 0;
  std::vector<std::string> evidence = {};  // lines; the last ones say why it closed
  bool predicted = false;                  // it has not happened yet
  std::vector<std::int64_t> leases = {};   // whom it may touch
  std::vector<std::string> tenants = {};
};
Json to_json(const Alarm& alarm);

struct Wanted {  // of one GPU
  Uuid gpu = {};
  unsigned index = 0;
  unsigned rung = 0;
  bool hold = false;
  std::optional<double> power = {}, clocks = {};  // parts, see Rung
  bool pause = false, drain = false, fence = false;
  std::string why = {};                  // the alarms, in words
  std::vector<std::string> alarms = {};  // ids
  bool bounded = false;                  // harsher would be due, but the steps of this hour are used up
  friend bool operator==(const Wanted&, const Wanted&) = default;
};

struct Decision {
  std::vector<Alarm> open = {};                 // all
  std::vector<Alarm> opened = {}, closed = {};  // by this step
  std::vector<Wanted> wanted = {};              // of every GPU that was read or is still lowered
};

struct Pace {              // how fast the ladder is walked
  double patience_s = 15;  // between two steps up
  double critical_patience_s = 5;
  double cool_down_s = 30;  // between two steps down; doubled when an alarm comes back within `again_s`
  double again_s = 600;
  double longest_cool_down_s = 900;
  unsigned most_steps = 16;        // up, of one GPU within an hour
  double stale_s = 10;             // a reading older than this is none
  double longest_rest_s = 120;     // as a MIG mode change with a reset takes; after it a rest is silence, too
  double reference_after_s = 300;  // at one power, before it counts as how hot the part is when it is well
};

// How hot a part was at each power while it was believed well, both smoothed over minutes. Where the BMC
// tells the air that comes in, above that.
struct Reference {
  struct Level {
    double seconds = 0;  // learned so far
    double celsius = 0;  // or K above the inlet
    friend bool operator==(const Level&, const Level&) = default;
  };
  std::map<unsigned, Level> levels = {};  // by watts / level_watts
  bool with_inlet = false;
  friend bool operator==(const Reference&, const Reference&) = default;
};
inline constexpr unsigned level_watts = 50, most_levels = 100;

class Guard {
 public:
  explicit Guard(spec::Protect settings, Pace pace = {}) : settings_(std::move(settings)), pace_(pace) {}
  // Alarms and rungs stay.
  void configure(spec::Protect settings) { settings_ = std::move(settings); }
  const spec::Protect& settings() const { return settings_; }

  // What a predecessor left in force: it is lifted like one's own, when readings say that all is well.
  void carry(const Uuid& gpu, unsigned rung);
  // How this part was cooled when it was well, as an earlier run learned it.
  void carry_reference(const Uuid& gpu, const Reference& reference);
  std::map<std::string, Reference> references() const;  // by UUID

  Decision step(const Reading& reading);

  struct Outlook {                                // of one GPU, for those who look
    std::optional<double> room = {};              // K: min(ceiling - T, margin - guard)
    std::optional<thermal::Forecast> ahead = {};  // 60 s
    std::optional<double> room_ahead = {};
    std::optional<double> beyond = {};  // K hotter than at this power when it was well
    unsigned rung = 0;
  };
  std::optional<Outlook> outlook(const Uuid& gpu) const;

 private:
  struct Watch {  // of one alarm, open or not
    Alarm alarm = {};
    bool open = false;
    double above_since = -1, below_since = -1, last_at = -1;
    double at_last_step = 0;  // its measure when the ladder was last climbed for it
  };
  struct Window {  // of a count that only rises: its rate over the last seconds
    std::vector<Stamped> points = {};
    std::optional<double> add(const Seen& seen, double over_s);
  };
  struct Part {  // of a GPU
    unsigned index = 0;
    std::optional<Stamped> last_joules = {}, last_watts = {};
    thermal::Model model = thermal::Model();
    struct Smooth {  // as a heat sink feels them
      double seen_s = 0, celsius = 0, watts = 0;
    } smooth = {};
    Reference reference = {};
    Window hot = {}, brake = {};
    std::vector<Stamped> errors = {};  // memory errors that came while we looked
    Seen errors_before = {};
    unsigned rung = 0;
    double stepped_at = -1e18, lifted_at = -1e18, calm_since = -1;
    double cool_down = 0;
    std::vector<double> steps_up = {};
    bool bounded = false, judged = false;
    double rested_at = -1;  // a rest that was no silence
    Outlook outlook = {};
  };
  struct Measured {
    Kind kind = Kind::end;
    std::string id = {}, subject = {}, what = {};
    std::vector<std::string> evidence = {};
    std::optional<Uuid> gpu = {};
    double measure = 0, at_s = 0;
    bool predicted = false;
    std::vector<Holder> blast = {};
    // Left out: the row's.
    std::optional<double> opens = {}, closes = {};
  };

  void of_gpu(const Reading& reading, const GpuReading& gpu, std::vector<Measured>& out);
  void cooled(Part& part, double celsius, double watts, const std::optional<double>& inlet, double dt);
  void of_host(const Reading& reading, std::vector<Measured>& out);
  void judge(const Measured& measured, const Reading& reading, Decision& decision);
  void climb(const Reading& reading, Decision& decision);

  spec::Protect settings_;
  Pace pace_;
  std::map<std::string, Part> parts_ = {};     // by UUID
  std::map<std::string, Watch> watches_ = {};  // by alarm id
  std::vector<Stamped> power_ = {};            // of the node, the last ten seconds
};

// ---- ramps. An account of watts that may change a second: starts take from it, and so does what is seen to
// change, in either direction: a synchronous stop is a ramp as well. Pure.
class Ramp {
 public:
  Ramp() = default;
  Ramp(double watts_per_s, double burst_watts) : rate_(watts_per_s), burst_(burst_watts) {}
  bool limits() const { return rate_ > 0; }
  void configure(double watts_per_s, double burst_watts) { rate_ = watts_per_s, burst_ = burst_watts; }
  // Somebody is about to draw `watts` more (or less: a stop). How long to wait, in seconds; the turn is
  // taken.
  double ask(double watts, double now_s);
  // How long it would be, taking no turn.
  double wait(double now_s) const;
  // What the node draws now. Changes that were not asked for are booked; those that were are not booked
  // twice.
  void seen(double watts, double now_s);

 private:
  double rate_ = 0, burst_ = 0;
  double free_at_ = 0;  // when the account is empty again
  struct Announced {
    double watts = 0, from_s = 0;
  };
  std::vector<Announced> announced_ = {};
  std::optional<Stamped> last_ = {};
};

}  // namespace bulkhead::protect
