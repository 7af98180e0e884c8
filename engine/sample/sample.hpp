// What the GPUs say, several times a second. One worker a GPU asks the driver, in tiers by what asking costs;
// everybody else reads a snapshot, which waits for no driver call. A call that hangs costs its own GPU's
// freshness alone: values carry the time they were true, and a GPU says what it hangs in and since when.
//
// Periods follow measured cost: each tier has a period that it would like and a part of the budget; where its
// calls take longer than that part allows, it is asked less often (docs/design/telemetry.md has the figures
// of an H100, where fields differ by a factor of a thousand).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.hpp"
#include "base/json.hpp"
#include "base/result.hpp"
#include "core/history/history.hpp"

namespace bulkhead::sample {

enum class Signal : std::uint8_t {
  // quick
  power,               // W, of this moment (the driver's sensor moves every 100 ms)
  power_average,       // W, one second
  memory_temperature,  // C
  power_capped_ns,     // ns in all: software power cap; d/dt misses nothing, unlike the bits
  sw_thermal_ns,       // ns in all
  // second
  temperature,   // C, of the die: a whole number that moves by 3 K a second at most
  reasons,       // bits, nvml.h nvmlClocksEventReason*: what holds the clocks down now
  clock_sm,      // MHz
  clock_memory,  // MHz
  busy,          // percent; the driver's utilisation, none with MIG on
  memory_busy,   // percent
  memory_used,   // bytes; of slices too
  memory_total,  // bytes; of slices too
  power_limit,   // W, enforced now
  // margin
  margin,  // K left to slowdown (T.Limit)
  // energy
  energy,  // J since the driver was loaded
  // slow
  hw_thermal_ns,       // ns in all
  power_brake_ns,      // ns in all: rack or supply, never the tenant
  pcie_replays,        // in all
  ecc_corrected,       // since the driver was loaded
  ecc_uncorrected,     // the same
  remapped_rows,       // of the memory, for uncorrectable errors, in the part's life
  remap_pending,       // 1: a reset is needed
  remap_failed,        // 1: the part is to be replaced
  nvlink_crc,          // flits with a bad checksum, over all links, in all
  nvlink_data_crc,     // the same, of data
  nvlink_replays,      // in all; what was damaged is sent again
  nvlink_recoveries,   // links trained anew, in all
  nvlink_error_ratio,  // bad flits of those received since the last look; none without traffic
  // gpm, Hopper and later, of slices too
  graphics,   // percent, the compute engine had work at all
  sm,         // percent, SMs with a warp
  occupancy,  // percent
  tensor,     // percent, any tensor pipe
  dram,       // percent of bandwidth
  pcie_tx,
  pcie_rx,
  nvlink_rx,
  nvlink_tx,  // MiB/s
  end
};
inline constexpr std::size_t signals = static_cast<std::size_t>(Signal::end);

enum class Tier : std::uint8_t { quick, second, margin, energy, slow, gpm, slices, layout, end };
inline constexpr std::size_t tiers = static_cast<std::size_t>(Tier::end);

struct Row {  // of the table of signals
  Signal signal = Signal::end;
  Tier tier = Tier::quick;
  std::string_view name = {}, unit = {};
  double least = 0, most = 0;  // beyond these the driver is not believed
  double step = 0;             // in the history; 0: not kept there
  history::Worst worst = history::Worst::high;
  double per_second = 0;  // a count: the history has its rate times this
};
const std::array<Row, signals>& rows();
std::string_view name_of(Tier tier);

struct Value {
  double number = 0;
  std::uint64_t at_ns = 0;           // monotonic; 0: never came
  std::optional<Errc> refused = {};  // why it did not come the last time
  bool known() const { return at_ns != 0; }
};
using Values = std::array<Value, signals>;

struct Slice {
  unsigned gpu_instance = 0;
  Uuid uuid = {};  // of its first MIG device; empty: it has none
  Values values = {};
};

struct TierState {
  double cost_us = 0;    // of a round, smoothed
  double period_ms = 0;  // as the budget has it now
  std::uint64_t rounds = 0, nanoseconds = 0;
};

enum class State : std::uint8_t {
  starting,
  sampling,
  hung,    // its driver call is past the deadline
  lost,    // the driver lost the GPU, or has none for us; asked again every now and then
  resting  // lets go of the driver, see rest()
};
std::string_view name_of(State state);

struct Gpu {
  unsigned index = 0;
  Uuid uuid = {};
  PciAddress pci = {};
  std::string name = {};
  State state = State::starting;
  std::string call = {};       // hung: the driver function
  std::uint64_t since_ns = 0;  // hung: since when; else when its last round ended
  std::string why = {};        // lost, starting: the driver's words
  Values values = {};
  std::optional<bool> gpm = {};  // empty: not asked yet; false: the chip or driver has none
  bool mig = false;
  std::vector<Slice> slices = {};
  std::array<TierState, tiers> tier = {};
  std::uint64_t fresh = 0;  // values that came, in all, slices' as well

  const Value& operator[](Signal signal) const { return values[static_cast<std::size_t>(signal)]; }
};

// ---- what is not the driver's: the kernel and the BMC are asked, every ten seconds and every minute

inline constexpr double most_loss = 1e-4;  // 0.01 % of packets: cables and optics are to be looked at
inline constexpr std::uint64_t least_packets = 10'000;  // of a window; of fewer nothing is said

struct Port {  // of InfiniBand or RoCE
  std::string device = {};
  unsigned port = 0;
  std::string state = {}, rate = {};  // "ACTIVE", "400 Gb/sec (4X NDR)"
  std::uint64_t packets = 0;          // received and sent
  std::uint64_t lost = 0;             // received damaged, or discarded before sending
  std::uint64_t symbol_errors = 0, recoveries = 0, downed = 0;
  std::optional<double> loss = {};  // of the packets of the last minute
  bool alarm = false;               // more than most_loss
};
struct Pcie {  // advanced error reporting of a GPU, a network card, or the port above one
  PciAddress address = {};
  std::uint64_t correctable = 0, nonfatal = 0, fatal = 0;
};
struct Sensor {
  std::string source = {};  // "hwmon nct6798", "bmc"
  std::string name = {};
  std::string kind =
      {};  // "temperature" (C), "fan" (RPM), "voltage" (V), "current" (A), "power" (W), "supply" (states)
  double value = 0;
  std::optional<double> low = {}, high = {};  // critical
};
struct Host {
  std::uint64_t at_ns = 0;  // 0: not looked at yet
  std::vector<Port> ports = {};
  std::vector<Pcie> pcie = {};
  std::vector<Sensor> sensors = {};
  std::string bmc = {};  // why the BMC tells nothing; empty: it does, or was not asked yet
};

struct Snapshot {
  std::uint64_t at_ns = 0;
  std::string why = {};  // why there are no GPUs: "starting", or the driver's words
  std::vector<Gpu> gpus = {};
  Host host = {};
};

struct Settings {
  std::string library = {};        // empty: libnvidia-ml.so.1 by the loader's rules
  unsigned tick_ms = 100;          // of the quick tier, and the grid on which all others lie; at least 10
  unsigned gpm_ms = 1000;          // wanted period of GPM; at least 100, which the driver demands
  double budget = 0.004;           // of a core, for each GPU: what the dearer tiers may take together
  unsigned deadline_ms = 2000;     // of one driver call; later its GPU counts as hung
  history::Settings history = {};  // for all GPUs together
  std::string root = {};           // where /sys and /dev/ipmi0 are; empty: the host is not looked at
};

// How often a tier is asked: as it would like, or as its part of the budget allows; on the tick's grid, and
// at least every `most_ms`.
double period_ms(double wanted_ms, double cost_us, double share_of_core, double tick_ms,
                 double most_ms = 60'000);
// The smoothed cost of a tier after a round that cost `now`. One that cost many times as much as the others
// says little about the next: it counts as four of them.
double smoothed_cost(double before, double now);

class Sampler {
 public:
  // Starts at once and waits for nothing.
  explicit Sampler(const Settings& settings);
  // Waits at most half a second for the workers; those that hang stay behind, and end when their call does.
  ~Sampler();
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;

  // Never waits for the driver. Callable from any thread.
  Snapshot snapshot() const;
  // Waits until every GPU was asked once. False: the time is over, as when one hangs.
  bool wait_ready(unsigned milliseconds) const;

  // Asks for a tier now instead of when it is due; the answer shows in a later snapshot (energy at the start
  // and end of a lease; the layout after a MIG change). An index that is not there: nothing.
  void hurry(unsigned gpu, Tier tier);

  // Everybody lets go of the driver, as resets and MIG mode changes need it. True: all have. resume() undoes
  // it.
  bool rest(unsigned milliseconds);
  void resume();

  // Monotonic seconds. Of a slice when `gpu_instance` is given. Waits for no driver call.
  std::vector<history::Point> history(unsigned gpu, std::optional<unsigned> gpu_instance, Signal signal,
                                      std::uint64_t from_s, std::uint64_t to_s,
                                      history::History::Grain grain) const;
  std::size_t history_bytes() const;
  // The seconds that ended since this was last asked, of everything that the history keeps: for one reader,
  // who keeps it longer than this process lives.
  struct Past {
    unsigned slice = 0;  // its GPU instance + 1; 0: the GPU
    Signal signal = Signal::end;
    std::vector<history::Point> points = {};
  };
  struct GpuPast {
    unsigned index = 0;
    Uuid uuid = {};
    std::uint64_t layouts = 0;  // how often the slices that there were ended
    std::vector<Past> series = {};
  };
  std::vector<GpuPast> news();

 private:
  struct Inside;
  std::shared_ptr<Inside> inside_;
};

// With ages in milliseconds; what is unknown says why.
Json to_json(const Snapshot& snapshot);

}  // namespace bulkhead::sample
