#include "twin/physics/physics.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>

namespace bulkhead::twin::physics {

namespace {

constexpr std::uint64_t tick_ns = 100'000'000;
// The slowest time constant of any chip file is 40 s: after fifteen of them nothing moves any more.
constexpr std::uint64_t settled_after_ns = 600'000'000'000;
constexpr double busy_inertia_s = 0.2;    // how fast utilisation follows what is asked
constexpr double power_inertia_s = 0.05;  // voltage regulators and sensor
constexpr double average_s = 1.0;         // nvmlDeviceGetPowerUsage: a one-second average (nvml.h)
// Dynamic power over clock: voltage falls with frequency, so power falls faster than linearly. Between f^2
// and f^3.
constexpr double clock_exponent = 2.4;

// nvmlClocksEventReason bits, nvml.h.
constexpr std::uint64_t reason_idle = 0x1, reason_app_clocks = 0x2, reason_power_cap = 0x4,
                        reason_hw_slowdown = 0x8, reason_sw_thermal = 0x20, reason_hw_thermal = 0x40,
                        reason_power_brake = 0x80;
// A board among others whose fan stands still still gets the draught of theirs.
constexpr double still_air = 2.2;  // times the resistance between sink and air

double toward(double from, double to, double dt, double inertia) {
  return to + (from - to) * std::exp(-dt / inertia);
}

// The share of the GPU's compute that a process can keep busy: all of it, or its slice's.
double slice_share(const State& state, const Process& process) {
  const Gpu& gpu = state.gpus[process.gpu];
  const Chip& chip = state.chips[gpu.chip];
  if (process.gpu_instance == none || chip.compute_slices == 0) return 1;
  for (const auto& gi : gpu.instances) {
    if (gi.used == 0 || gi.id != process.gpu_instance) continue;
    for (const auto& ci : gi.compute) {
      if (ci.used != 0 && ci.id == process.compute_instance)
        return static_cast<double>(ci.size) / chip.compute_slices;
    }
    for (std::uint32_t p = 0; p < chip.profile_count; ++p) {
      if (chip.profiles[p].id == gi.profile_id)
        return static_cast<double>(chip.profiles[p].slices) / chip.compute_slices;
    }
  }
  return 0;  // its slice is gone
}

bool has_fault(const State& state, std::uint32_t index, FaultKind kind) {
  return std::any_of(std::begin(state.faults), std::end(state.faults), [&](const Fault& fault) {
    return fault.kind == kind && (fault.gpu == none || fault.gpu == index);
  });
}

// Counted on the first link, as long as the board is there.
void damage_flits(State& state, std::uint32_t index, std::uint64_t dt_ns) {
  const auto damaged = damaged_flits(state, index);
  if (!damaged || state.gpus[index].on_pci == 0) return;
  state.gpus[index].nvlink_crc_errors[0] += static_cast<std::uint64_t>(
      faulty_link_flits * static_cast<double>(dt_ns) / 1e9 * static_cast<double>(*damaged) / 1e6);
}

double asked_busy(const State& state, std::uint32_t index) {
  double asked = state.gpus[index].asked_busy;
  for (const auto& process : state.processes) {
    if (process.used != 0 && process.gpu == index) asked += process.busy * slice_share(state, process);
  }
  return std::clamp(asked, 0.0, 1.0);
}

void remember_shutdown(State& state, std::uint32_t index) {
  state.gpus[index].on_pci = 0;
  Event& event = state.events[state.next_event % max_events];
  event = Event{};
  event.sequence = state.next_event++;
  event.time_ns = state.now_ns;
  event.gpu = index;
  event.xid = 79;  // "GPU has fallen off the bus": what a board that protects itself looks like to the host
  event.gpu_instance = event.compute_instance = none;
}

// One board, `dt` seconds with `asked` of its compute wanted.
void step_board(State& state, std::uint32_t index, double asked, double dt, std::uint64_t dt_ns) {
  Gpu& gpu = state.gpus[index];
  const Chip& chip = state.chips[gpu.chip];
  const bool powered = gpu.on_pci != 0;

  gpu.busy = toward(gpu.busy, powered ? asked : 0, dt, busy_inertia_s);
  const double idle_w = chip.power_idle_mw / 1000.0;
  const double full_w = chip.power_max_mw / 1000.0;
  // What the load would draw at the highest clock.
  const double wanted_w =
      gpu.asked_watts >= 0 ? std::max(gpu.asked_watts, idle_w) : idle_w + gpu.busy * (full_w - idle_w);
  const bool working = gpu.busy > 0.005 || wanted_w > idle_w * 1.05;

  // ---- clock: what is asked, then what the limits leave of it
  const double highest = chip.clock_graphics_max;
  const double lowest = chip.clock_graphics_min;
  std::uint64_t reasons = working ? 0 : reason_idle;
  double clock = working ? highest : chip.clock_graphics_idle;
  if (working && gpu.app_clock_graphics != 0 && gpu.app_clock_graphics < clock) {
    clock = gpu.app_clock_graphics;
    reasons |= reason_app_clocks;
  }
  if (gpu.clock_lock_high != 0)
    clock =
        std::clamp(clock, static_cast<double>(gpu.clock_lock_low), static_cast<double>(gpu.clock_lock_high));
  const double dynamic_w = wanted_w - idle_w;
  const double limit_w = gpu.power_limit_mw / 1000.0;
  if (dynamic_w > 0 && dynamic_w * std::pow(clock / highest, clock_exponent) > limit_w - idle_w) {
    const double room = std::max(limit_w - idle_w, 0.0) / dynamic_w;
    clock = std::max(lowest, highest * std::pow(room, 1 / clock_exponent));
    reasons |= reason_power_cap;
  }
  if (chip.threshold_gpu_max > 0 && gpu.temperature > chip.threshold_gpu_max) {
    // Between the highest operating temperature and the slowdown point the driver gives clock away in
    // proportion.
    const double band = std::max(1, chip.threshold_slowdown - chip.threshold_gpu_max);
    const double over = std::clamp((gpu.temperature - chip.threshold_gpu_max) / band, 0.0, 1.0);
    const double allowed = highest - over * (highest - lowest);
    if (allowed < clock) {
      clock = std::max(lowest, allowed);
      reasons |= reason_sw_thermal;
    }
  }
  if (chip.threshold_slowdown > 0 && gpu.temperature >= chip.threshold_slowdown) {
    // The board's own protection: half the clock at once, whatever the driver thinks.
    clock = std::max(lowest, std::min(clock, highest / 2));
    reasons |= reason_hw_slowdown | reason_hw_thermal;
  }
  if (powered && has_fault(state, index, FaultKind::power_brake)) {
    // The brake pin works as the board's own protection does.
    clock = std::max(lowest, std::min(clock, highest / 2));
    reasons |= reason_hw_slowdown | reason_power_brake;
  }
  // Boards know only whole steps; round down, never over a limit.
  gpu.clock_graphics =
      lowest + std::floor((clock - lowest) / chip.clock_graphics_step + 1e-9) * chip.clock_graphics_step;
  double memory_clock = chip.clock_memory[0];
  if (gpu.memory_lock_high != 0) {
    for (std::uint32_t i = 0; i < chip.clock_memory_count; ++i) {
      memory_clock = chip.clock_memory[i];
      if (chip.clock_memory[i] <= gpu.memory_lock_high) break;
    }
  }
  gpu.clock_memory = memory_clock;
  gpu.clock_reasons = powered ? reasons : 0;
  if (powered) {
    if ((reasons & reason_power_cap) != 0) gpu.ns_power_cap += dt_ns;
    if ((reasons & reason_sw_thermal) != 0) gpu.ns_sw_thermal += dt_ns;
    if ((reasons & reason_hw_thermal) != 0) gpu.ns_hw_thermal += dt_ns;
    if ((reasons & reason_power_brake) != 0) gpu.ns_power_brake += dt_ns;
  }

  // ---- power, energy, heat
  const double target_w =
      powered ? idle_w + dynamic_w * std::pow(gpu.clock_graphics / highest, clock_exponent) : 0;
  gpu.watts = toward(gpu.watts, target_w, dt, power_inertia_s);
  gpu.watts_average = toward(gpu.watts_average, gpu.watts, dt, average_s);
  gpu.energy_mj += gpu.watts * dt * 1000;
  const double flow = (gpu.temperature - gpu.sink_temperature) / chip.r_die_sink;
  const double away = (gpu.sink_temperature - gpu.inlet) /
                      (chip.r_sink_air * (has_fault(state, index, FaultKind::failed_fan) ? still_air : 1));
  gpu.temperature += (gpu.watts - flow) / chip.c_die * dt;
  gpu.sink_temperature += (flow - away) / chip.c_sink * dt;
  if (powered && chip.threshold_shutdown > 0 && gpu.temperature >= chip.threshold_shutdown)
    remember_shutdown(state, index);
}

void tick(State& state, std::uint64_t dt_ns, const double* asked) {
  state.now_ns += dt_ns;
  const double dt = static_cast<double>(dt_ns) / 1e9;
  for (std::uint32_t g = 0; g < state.gpu_count; ++g) {
    step_board(state, g, asked[g], dt, dt_ns);
    damage_flits(state, g, dt_ns);
  }
}

}  // namespace

void step(State& state, std::uint64_t dt_ns) {
  double asked[max_gpus] = {};
  for (std::uint32_t g = 0; g < state.gpu_count; ++g) asked[g] = asked_busy(state, g);
  std::uint64_t done = 0;
  while (done < dt_ns && done < settled_after_ns) {
    const std::uint64_t now = std::min(tick_ns, dt_ns - done);
    tick(state, now, asked);
    done += now;
  }
  if (done >= dt_ns) return;
  // Nothing changes any more but what accumulates.
  const std::uint64_t rest = dt_ns - done;
  state.now_ns += rest;
  for (std::uint32_t g = 0; g < state.gpu_count; ++g) {
    Gpu& gpu = state.gpus[g];
    gpu.energy_mj += gpu.watts * static_cast<double>(rest) / 1e6;
    if ((gpu.clock_reasons & reason_power_cap) != 0) gpu.ns_power_cap += rest;
    if ((gpu.clock_reasons & reason_sw_thermal) != 0) gpu.ns_sw_thermal += rest;
    if ((gpu.clock_reasons & reason_hw_thermal) != 0) gpu.ns_hw_thermal += rest;
    if ((gpu.clock_reasons & reason_power_brake) != 0) gpu.ns_power_brake += rest;
    damage_flits(state, g, rest);
  }
}

std::optional<unsigned> damaged_flits(const State& state, std::uint32_t gpu) {
  for (const Fault& fault : state.faults)
    if (fault.kind == FaultKind::link_errors && (fault.gpu == none || fault.gpu == gpu))
      return static_cast<unsigned>(std::clamp(fault.code, 0, 1'000'000));
  return std::nullopt;
}

bool follow(State& state, std::uint64_t host_monotonic_ns) {
  if (state.realtime == 0) return false;
  if (host_monotonic_ns < state.last_step_host_ns) {  // another boot of the real host
    state.last_step_host_ns = host_monotonic_ns;
    return true;
  }
  if (host_monotonic_ns - state.last_step_host_ns < tick_ns) return false;
  step(state, host_monotonic_ns - state.last_step_host_ns);
  state.last_step_host_ns = host_monotonic_ns;
  return true;
}

std::uint64_t memory_used(const State& state, std::uint32_t gpu, std::uint32_t gpu_instance) {
  std::uint64_t bytes = 0;
  for (const auto& process : state.processes) {
    if (process.used == 0 || process.gpu != gpu ||
        (gpu_instance != none && process.gpu_instance != gpu_instance))
      continue;
    bytes += process.memory_bytes;
  }
  return bytes;
}

}  // namespace bulkhead::twin::physics
