// What /metrics says of GPUs, slices and leases.
#include "daemon/serve/metrics_gpus.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>

#include <fmt/format.h>

#include "base/clock.hpp"

namespace bulkhead::serve {

namespace {

using sample::Signal;
using sample::Tier;

constexpr std::size_t most_leases = 4096;  // with series of their own
// Older ones are left out, so that a graph shows a gap and not a line that stands still; their age goes on.
constexpr double stale_periods = 3, stale_least_s = 15;

struct Row {
  Signal signal;
  std::string_view name, type;
  double scale;
  std::string_view help;
};
constexpr std::string_view gauge = "gauge", counter = "counter";
constexpr double mega = 1e6, mebi = 1024.0 * 1024.0;
constexpr std::array rows = {
    Row{Signal::power, "power_watts", gauge, 1, "Power drawn now."},
    Row{Signal::power_average, "power_average_watts", gauge, 1, "Power drawn, over the last second."},
    Row{Signal::power_limit, "power_limit_watts", gauge, 1, "Power limit in force."},
    Row{Signal::energy, "energy_joules_total", counter, 1, "Energy since the driver was loaded."},
    Row{Signal::temperature, "temperature_celsius", gauge, 1, "Temperature of the die."},
    Row{Signal::memory_temperature, "memory_temperature_celsius", gauge, 1, "Temperature of the memory."},
    Row{Signal::margin, "temperature_margin_celsius", gauge, 1, "Degrees left until it slows itself down."},
    Row{Signal::power_capped_ns, "power_capped_seconds_total", counter, 1e-9,
        "Time with clocks held down by the power limit."},
    Row{Signal::sw_thermal_ns, "software_thermal_slowdown_seconds_total", counter, 1e-9,
        "Time with clocks held down by the driver, for heat."},
    Row{Signal::hw_thermal_ns, "hardware_thermal_slowdown_seconds_total", counter, 1e-9,
        "Time with clocks held down by the chip, for heat."},
    Row{Signal::power_brake_ns, "power_brake_seconds_total", counter, 1e-9,
        "Time with clocks held down by the power supply or the rack."},
    Row{Signal::clock_sm, "sm_clock_hertz", gauge, mega, "Clock of the SMs."},
    Row{Signal::clock_memory, "memory_clock_hertz", gauge, mega, "Clock of the memory."},
    Row{Signal::busy, "busy_ratio", gauge, 0.01, "Part of the time with a kernel on it; none with MIG on."},
    Row{Signal::memory_busy, "memory_busy_ratio", gauge, 0.01,
        "Part of the time in which memory was read or written; none with MIG on."},
    Row{Signal::memory_used, "memory_used_bytes", gauge, 1, "Memory in use, with what the driver keeps."},
    Row{Signal::memory_total, "memory_size_bytes", gauge, 1, "Memory there is."},
    Row{Signal::graphics, "engine_active_ratio", gauge, 0.01,
        "Part of the time with the compute or graphics engine busy."},
    Row{Signal::sm, "sm_active_ratio", gauge, 0.01, "SMs with a warp, over SMs and time."},
    Row{Signal::occupancy, "sm_occupancy_ratio", gauge, 0.01, "Warps there were, over warps there could be."},
    Row{Signal::tensor, "tensor_active_ratio", gauge, 0.01, "Part of the time with tensor pipes busy."},
    Row{Signal::dram, "dram_active_ratio", gauge, 0.01, "Part of the memory's bandwidth in use."},
    Row{Signal::pcie_tx, "pcie_transmit_bytes_per_second", gauge, mebi, "Sent to the host."},
    Row{Signal::pcie_rx, "pcie_receive_bytes_per_second", gauge, mebi, "Received from the host."},
    Row{Signal::nvlink_tx, "nvlink_transmit_bytes_per_second", gauge, mebi, "Sent over all NVLinks."},
    Row{Signal::nvlink_rx, "nvlink_receive_bytes_per_second", gauge, mebi, "Received over all NVLinks."},
    Row{Signal::pcie_replays, "pcie_replays_total", counter, 1, "Packets sent again over PCIe."},
    Row{Signal::ecc_corrected, "ecc_corrected_errors_total", counter, 1,
        "Memory errors corrected since the driver was loaded."},
    Row{Signal::ecc_uncorrected, "ecc_uncorrected_errors_total", counter, 1,
        "Memory errors not corrected since the driver was loaded."},
    Row{Signal::remapped_rows, "remapped_rows_total", counter, 1,
        "Memory rows replaced for uncorrectable errors, in the part's life."},
    Row{Signal::nvlink_crc, "nvlink_crc_errors_total", counter, 1,
        "Flits with a bad checksum, over all links."},
    Row{Signal::nvlink_data_crc, "nvlink_data_crc_errors_total", counter, 1,
        "Data flits with a bad checksum, over all links."},
    Row{Signal::nvlink_replays, "nvlink_replays_total", counter, 1,
        "Damaged packets sent again, over all links."},
    Row{Signal::nvlink_recoveries, "nvlink_recoveries_total", counter, 1, "Links trained anew."},
    Row{Signal::nvlink_error_ratio, "nvlink_error_ratio", gauge, 1,
        "Bad flits of those received, between two looks."},
    Row{Signal::remap_pending, "row_remap_pending", gauge, 1, "1: rows wait for a reset to be replaced."},
    Row{Signal::remap_failed, "row_remap_failed", gauge, 1,
        "1: there are no rows left to replace with: replace the part."},
};
constexpr std::array of_slices = {Signal::memory_used, Signal::memory_total, Signal::graphics,
                                  Signal::sm,          Signal::occupancy,    Signal::tensor,
                                  Signal::dram,        Signal::pcie_tx,      Signal::pcie_rx};

// nvml.h, nvmlClocksEventReason*.
struct Reason {
  unsigned bit;
  std::string_view name;
};
constexpr std::array reasons = {
    Reason{0, "idle"},
    Reason{1, "application_clocks"},
    Reason{2, "software_power_cap"},
    Reason{3, "hardware_slowdown"},
    Reason{4, "sync_boost"},
    Reason{5, "software_thermal"},
    Reason{6, "hardware_thermal"},
    Reason{7, "power_brake"},
    Reason{8, "display_clocks"},
};

constexpr std::array states = {sample::State::starting, sample::State::sampling, sample::State::hung,
                               sample::State::lost, sample::State::resting};

// The names of dcgm-exporter's default list and their units; `scale` from ours.
constexpr std::array dcgm_rows = {
    Row{Signal::clock_sm, "DEV_SM_CLOCK", gauge, 1, "SM clock frequency (in MHz)."},
    Row{Signal::clock_memory, "DEV_MEM_CLOCK", gauge, 1, "Memory clock frequency (in MHz)."},
    Row{Signal::memory_temperature, "DEV_MEMORY_TEMP", gauge, 1, "Memory temperature (in C)."},
    Row{Signal::temperature, "DEV_GPU_TEMP", gauge, 1, "GPU temperature (in C)."},
    Row{Signal::power, "DEV_POWER_USAGE", gauge, 1, "Power draw (in W)."},
    Row{Signal::energy, "DEV_TOTAL_ENERGY_CONSUMPTION", counter, 1000,
        "Total energy consumption since the driver was loaded (in mJ)."},
    Row{Signal::pcie_replays, "DEV_PCIE_REPLAY_COUNTER", counter, 1, "Total number of PCIe retries."},
    Row{Signal::busy, "DEV_GPU_UTIL", gauge, 1, "GPU utilization (in %)."},
    Row{Signal::memory_busy, "DEV_MEM_COPY_UTIL", gauge, 1, "Memory utilization (in %)."},
    Row{Signal::memory_used, "DEV_FB_USED", gauge, 1 / mebi, "Framebuffer memory used (in MiB)."},
    Row{Signal::ecc_corrected, "DEV_ECC_SBE_VOL_TOTAL", counter, 1,
        "Total number of single-bit volatile ECC errors."},
    Row{Signal::ecc_uncorrected, "DEV_ECC_DBE_VOL_TOTAL", counter, 1,
        "Total number of double-bit volatile ECC errors."},
    Row{Signal::remapped_rows, "DEV_UNCORRECTABLE_REMAPPED_ROWS", counter, 1,
        "Number of remapped rows for uncorrectable errors"},
    Row{Signal::remap_failed, "DEV_ROW_REMAP_FAILURE", gauge, 1, "Whether remapping of rows has failed"},
    Row{Signal::power_limit, "DEV_POWER_MGMT_LIMIT", gauge, 1, "Power limit in force (in W)."},
    Row{Signal::reasons, "DEV_CLOCK_THROTTLE_REASONS", gauge, 1, "Clock event reasons, as bits."},
    Row{Signal::power_capped_ns, "DEV_POWER_VIOLATION", counter, 1e-3,
        "Throttling duration due to power constraints (in us)."},
    Row{Signal::sw_thermal_ns, "DEV_THERMAL_VIOLATION", counter, 1e-3,
        "Throttling duration due to thermal constraints (in us)."},
    Row{Signal::graphics, "PROF_GR_ENGINE_ACTIVE", gauge, 0.01,
        "Ratio of time the graphics engine is active."},
    Row{Signal::sm, "PROF_SM_ACTIVE", gauge, 0.01, "The ratio of cycles an SM has at least 1 warp assigned."},
    Row{Signal::occupancy, "PROF_SM_OCCUPANCY", gauge, 0.01,
        "The ratio of number of warps resident on an SM."},
    Row{Signal::tensor, "PROF_PIPE_TENSOR_ACTIVE", gauge, 0.01,
        "Ratio of cycles the tensor (HMMA) pipe is active."},
    Row{Signal::dram, "PROF_DRAM_ACTIVE", gauge, 0.01,
        "Ratio of cycles the device memory interface is active sending or receiving data."},
    Row{Signal::pcie_tx, "PROF_PCIE_TX_BYTES", gauge, mebi,
        "The rate of data transmitted over the PCIe bus, in bytes per second."},
    Row{Signal::pcie_rx, "PROF_PCIE_RX_BYTES", gauge, mebi,
        "The rate of data received over the PCIe bus, in bytes per second."},
    Row{Signal::nvlink_tx, "PROF_NVLINK_TX_BYTES", gauge, mebi,
        "The rate of data transmitted over NVLink, in bytes per second."},
    Row{Signal::nvlink_rx, "PROF_NVLINK_RX_BYTES", gauge, mebi,
        "The rate of data received over NVLink, in bytes per second."},
};

std::size_t at(Signal signal) { return static_cast<std::size_t>(signal); }
std::size_t at(Tier tier) { return static_cast<std::size_t>(tier); }

double seconds(std::uint64_t from_ns, std::uint64_t to_ns) {
  return from_ns < to_ns ? static_cast<double>(to_ns - from_ns) / 1e9 : 0.0;
}

// How old a tier's values may be; by the GPU's own pace.
std::array<double, sample::tiers> patience(const sample::Gpu& gpu) {
  std::array<double, sample::tiers> out{};
  for (std::size_t i = 0; i < out.size(); ++i)
    out[i] = std::max(stale_least_s, stale_periods * gpu.tier[i].period_ms / 1000);
  return out;
}

// Where a slice's value comes from: its memory is asked in a tier of its own.
Tier tier_of(Signal signal, bool slice) {
  const Tier tier = sample::rows()[at(signal)].tier;
  return slice && tier == Tier::second ? Tier::slices : tier;
}

// Everything lines are made of, once a page.
struct OneSlice {
  const sample::Slice* slice = nullptr;
  std::string labels = {}, dcgm = {};
  const Holder* holder = nullptr;
};
struct OneGpu {
  const sample::Gpu* gpu = nullptr;
  std::string id = {};      // gpu and uuid
  std::string labels = {};  // and who has it
  std::string dcgm = {};
  std::array<double, sample::tiers> patience{};
  std::vector<OneSlice> slices = {};
};

std::string with_holder(std::string labels, const Holder* holder) {
  if (holder != nullptr)
    labels += fmt::format(",tenant=\"{}\",lease=\"{}\"", label(holder->tenant), holder->lease);
  return labels;
}

std::string host_name() {
  char name[256] = {};
  return ::gethostname(name, sizeof name - 1) == 0 ? label(name) : std::string();
}

std::vector<OneGpu> gather(const sample::Snapshot& seen, const Holders& holders, bool dcgm) {
  const std::string host = dcgm ? host_name() : "";
  std::vector<OneGpu> out;
  out.reserve(seen.gpus.size());
  for (const auto& gpu : seen.gpus) {
    OneGpu one{.gpu = &gpu, .patience = patience(gpu)};
    one.id = fmt::format("gpu=\"{}\",uuid=\"{}\"", gpu.index, label(gpu.uuid.text));
    const Holder* whole = holders.of_gpu(gpu.uuid);
    one.labels = with_holder(one.id, whole);
    std::string board;
    if (dcgm) {
      board = fmt::format(
          "gpu=\"{}\",UUID=\"{}\",pci_bus_id=\"{:08X}:{:02X}:{:02X}.{}\",device=\"nvidia{}\","
          "modelName=\"{}\",Hostname=\"{}\"",
          gpu.index, label(gpu.uuid.text), gpu.pci.domain, gpu.pci.bus, gpu.pci.device, gpu.pci.function,
          gpu.index, label(gpu.name), host);
      one.dcgm = with_holder(board, whole);
    }
    for (const auto& slice : gpu.slices) {
      OneSlice part{.slice = &slice, .holder = holders.of_slice(gpu.uuid, slice.gpu_instance)};
      part.labels = with_holder(fmt::format("{},slice=\"{}\"", one.id, slice.gpu_instance), part.holder);
      if (dcgm)
        part.dcgm = with_holder(
            fmt::format("{},GPU_I_PROFILE=\"{}\",GPU_I_ID=\"{}\"", board,
                        part.holder != nullptr ? label(part.holder->profile) : "", slice.gpu_instance),
            part.holder);
      one.slices.push_back(std::move(part));
    }
    out.push_back(std::move(one));
  }
  return out;
}

// The value of a signal if it is fresh.
const sample::Value* fresh(const sample::Values& values, Signal signal, bool slice, const OneGpu& of,
                           std::uint64_t now) {
  const sample::Value& value = values[at(signal)];
  if (!value.known() || seconds(value.at_ns, now) > of.patience[at(tier_of(signal, slice))]) return nullptr;
  return &value;
}

void values(Page& page, const std::vector<OneGpu>& gpus, std::uint64_t now) {
  for (const Row& row : rows) {
    page.family(fmt::format("gpu_{}", row.name), row.type, row.help);
    for (const auto& one : gpus)
      if (const auto* value = fresh(one.gpu->values, row.signal, false, one, now))
        page.value(one.labels, value->number * row.scale);
  }
  for (const Row& row : rows) {
    if (std::find(of_slices.begin(), of_slices.end(), row.signal) == of_slices.end()) continue;
    page.family(fmt::format("slice_{}", row.name), row.type, row.help);
    for (const auto& one : gpus)
      for (const auto& part : one.slices)
        if (const auto* value = fresh(part.slice->values, row.signal, true, one, now))
          page.value(part.labels, value->number * row.scale);
  }
  page.family("gpu_clock_event_reason", gauge, "1: this holds the clocks down now.");
  for (const auto& one : gpus)
    if (const auto* value = fresh(one.gpu->values, Signal::reasons, false, one, now)) {
      const auto bits = static_cast<std::uint64_t>(value->number);
      for (const auto& reason : reasons)
        page.value(one.id, "reason", reason.name, (bits >> reason.bit & 1U) != 0);
    }
}

void dcgm_values(Page& out, const std::vector<OneGpu>& gpus, std::uint64_t now) {
  Page page("DCGM_FI_");
  for (const Row& row : dcgm_rows) {
    page.family(row.name, row.type, row.help);
    const bool sliced = std::find(of_slices.begin(), of_slices.end(), row.signal) != of_slices.end();
    for (const auto& one : gpus) {
      if (const auto* value = fresh(one.gpu->values, row.signal, false, one, now))
        page.value(one.dcgm, value->number * row.scale);
      if (!sliced) continue;
      for (const auto& part : one.slices)
        if (const auto* value = fresh(part.slice->values, row.signal, true, one, now))
          page.value(part.dcgm, value->number * row.scale);
    }
  }
  page.family("DEV_FB_FREE", gauge, "Framebuffer memory free (in MiB).");
  const auto free = [&](const sample::Values& values, bool slice, const OneGpu& one,
                        const std::string& labels) {
    const auto* used = fresh(values, Signal::memory_used, slice, one, now);
    const auto* total = fresh(values, Signal::memory_total, slice, one, now);
    if (used != nullptr && total != nullptr)
      page.value(labels, std::max(0.0, total->number - used->number) / mebi);
  };
  for (const auto& one : gpus) {
    free(one.gpu->values, false, one, one.dcgm);
    for (const auto& part : one.slices) free(part.slice->values, true, one, part.dcgm);
  }
  out.append(std::move(page).text());
}

// What is not the driver's.
void host(Page& page, const sample::Host& host, const std::vector<OneGpu>& gpus, std::uint64_t now) {
  page.family("gpu_nvlink_error_alarm", gauge,
              "1: more than 0.01 % of the flits are bad: look at the links.");
  for (const auto& one : gpus)
    if (const auto* value = fresh(one.gpu->values, Signal::nvlink_error_ratio, false, one, now))
      page.value(one.id, value->number > sample::most_loss);
  if (host.at_ns == 0) return;
  page.one("host_value_age_seconds", gauge, "Age of what the kernel says of links, PCIe and sensors.",
           seconds(host.at_ns, now));
  std::vector<std::string> labels;
  for (const auto& port : host.ports)
    labels.push_back(fmt::format("device=\"{}\",port=\"{}\"", label(port.device), port.port));
  const auto of_ports = [&](std::string_view name, std::string_view type, std::string_view help,
                            auto number) {
    page.family(name, type, help);
    for (std::size_t i = 0; i < host.ports.size(); ++i) page.value(labels[i], number(host.ports[i]));
  };
  using sample::Port;
  of_ports("infiniband_port_active", gauge, "1: the port's state is ACTIVE.",
           [](const Port& port) { return port.state == "ACTIVE"; });
  of_ports("infiniband_packets_total", counter, "Packets received and sent.",
           [](const Port& port) { return port.packets; });
  of_ports("infiniband_lost_packets_total", counter,
           "Packets received damaged, or discarded before they were sent.",
           [](const Port& port) { return port.lost; });
  of_ports("infiniband_symbol_errors_total", counter, "Symbols received damaged.",
           [](const Port& port) { return port.symbol_errors; });
  of_ports("infiniband_recoveries_total", counter, "Links that came back by themselves.",
           [](const Port& port) { return port.recoveries; });
  of_ports("infiniband_downed_total", counter, "Links that went down.",
           [](const Port& port) { return port.downed; });
  page.family("infiniband_loss_ratio", gauge,
              "Lost packets of all, over the last minute; none of too few packets.");
  for (std::size_t i = 0; i < host.ports.size(); ++i)
    if (host.ports[i].loss) page.value(labels[i], *host.ports[i].loss);
  of_ports("infiniband_loss_alarm", gauge, "1: more than 0.01 % is lost: look at cables and optics.",
           [](const Port& port) { return port.alarm; });
  page.family("pcie_errors_total", counter,
              "Errors that the kernel counted on a PCI function (advanced error reporting).");
  for (const auto& pcie : host.pcie) {
    const std::string address = pcie.address.str();
    page.value(fmt::format("pci=\"{}\",severity=\"correctable\"", address), pcie.correctable);
    page.value(fmt::format("pci=\"{}\",severity=\"nonfatal\"", address), pcie.nonfatal);
    page.value(fmt::format("pci=\"{}\",severity=\"fatal\"", address), pcie.fatal);
  }
  struct Kind {
    std::string_view kind, name, help;
  };
  static constexpr Kind kinds[] = {
      {"temperature", "sensor_temperature_celsius", "Temperatures of the host."},
      {"fan", "sensor_fan_rpm", "Fans, in turns a minute."},
      {"voltage", "sensor_volts", "Rails."},
      {"current", "sensor_amperes", "Currents."},
      {"power", "sensor_power_watts", "Power of supplies and rails."},
      {"supply", "sensor_supply_state", "Power supplies: bits of the BMC; 1: there, and nothing is wrong."}};
  std::vector<std::string> names;
  for (std::size_t i = 0; i < host.sensors.size(); ++i) {
    const auto& sensor = host.sensors[i];
    names.push_back(fmt::format("source=\"{}\",sensor=\"{}\"", label(sensor.source), label(sensor.name)));
    // Two of one name, as BMCs have them, would be one series told twice, which a scraper refuses whole.
    for (std::size_t j = 0; j < i; ++j)
      if (names[j] == names[i] && host.sensors[j].kind == sensor.kind) {
        names[i] += fmt::format(",number=\"{}\"", i);
        break;
      }
  }
  for (const auto& kind : kinds) {
    page.family(kind.name, gauge, kind.help);
    for (std::size_t i = 0; i < host.sensors.size(); ++i)
      if (host.sensors[i].kind == kind.kind) page.value(names[i], host.sensors[i].value);
  }
  page.family("sensor_out_of_bounds", gauge, "1: beyond the sensor's own critical bounds.");
  for (std::size_t i = 0; i < host.sensors.size(); ++i) {
    const auto& sensor = host.sensors[i];
    if (!sensor.low && !sensor.high) continue;
    page.value(fmt::format("{},kind=\"{}\"", names[i], label(sensor.kind)),
               (sensor.low && sensor.value < *sensor.low) || (sensor.high && sensor.value > *sensor.high));
  }
}

// How it is with the asking itself.
void health(Page& page, const std::vector<OneGpu>& gpus, std::uint64_t now) {
  page.family("gpu_state", gauge, "1 in the state the GPU's sampling is in.");
  for (const auto& one : gpus)
    for (const auto state : states)
      page.value(one.id, "state", sample::name_of(state), one.gpu->state == state);
  page.family("gpu_hung_seconds", gauge, "How long a driver call has not answered; 0: none hangs.");
  for (const auto& one : gpus)
    page.value(one.id, one.gpu->state == sample::State::hung ? seconds(one.gpu->since_ns, now) : 0.0);
  page.family("gpu_value_age_seconds", gauge, "Age of the newest value of a group that is asked together.");
  for (const auto& one : gpus) {
    std::array<std::uint64_t, sample::tiers> newest{};
    for (const auto& row : sample::rows()) {
      const auto& value = one.gpu->values[at(row.signal)];
      if (value.known()) newest[at(row.tier)] = std::max(newest[at(row.tier)], value.at_ns);
    }
    for (std::size_t i = 0; i < newest.size(); ++i)
      if (newest[i] != 0)
        page.value(one.id, "group", sample::name_of(static_cast<Tier>(i)), seconds(newest[i], now));
  }
  page.family("gpu_sampling_seconds_total", counter, "Time in driver calls that ask a group of values.");
  for (const auto& one : gpus)
    for (std::size_t i = 0; i < sample::tiers; ++i)
      if (one.gpu->tier[i].rounds != 0)
        page.value(one.id, "group", sample::name_of(static_cast<Tier>(i)),
                   static_cast<double>(one.gpu->tier[i].nanoseconds) * 1e-9);
}

void who_has_what(Page& page, const std::vector<OneGpu>& gpus, const control::Snapshot& leases) {
  page.family("gpu_info", gauge, "1; what the GPU is.");
  for (const auto& one : gpus)
    page.value(fmt::format("{},pci=\"{}\",name=\"{}\",mig=\"{}\"", one.id, one.gpu->pci.str(),
                           label(one.gpu->name), one.gpu->mig ? "on" : "off"),
               1);
  page.family("slice_info", gauge, "1; what the slice is, and who has it.");
  for (const auto& one : gpus)
    for (const auto& part : one.slices)
      page.value(fmt::format("{},device=\"{}\",profile=\"{}\"", part.labels, label(part.slice->uuid.text),
                             part.holder != nullptr ? label(part.holder->profile) : ""),
                 1);
  // Not over, on GPUs: the pools know which; those that wait have none.
  std::vector<const lease::Lease*> placed;
  for (const auto& gpu : leases.gpus)
    for (const std::int64_t id : gpu.leases) {
      const auto found = leases.leases.find(id);
      if (found != leases.leases.end()) placed.push_back(found->second.get());
    }
  std::sort(placed.begin(), placed.end(), [](const auto* a, const auto* b) { return a->id < b->id; });
  placed.erase(std::unique(placed.begin(), placed.end()), placed.end());
  if (placed.size() > most_leases) placed.resize(most_leases);
  page.family("lease_info", gauge, "1 for each part of a lease; where it is and in which state.");
  for (const auto* lease : placed) {
    const std::string head =
        fmt::format("lease=\"{}\",tenant=\"{}\",class=\"{}\",state=\"{}\"", lease->id, label(lease->tenant),
                    lease::name_of(lease->ask.cls), lease::name_of(lease->state));
    for (std::size_t i = 0; i < lease->parts.size(); ++i) {
      const auto& part = lease->parts[i];
      page.value(
          fmt::format("{},part=\"{}\",uuid=\"{}\",slice=\"{}\",profile=\"{}\"", head, i, label(part.gpu.text),
                      part.gpu_instance ? fmt::format("{}", *part.gpu_instance) : "", label(part.profile)),
          1);
    }
  }
  page.family("lease_expires_timestamp_seconds", gauge, "When a lease that is not renewed ends.");
  for (const auto* lease : placed)
    if (lease->expires)
      page.value(fmt::format("lease=\"{}\",tenant=\"{}\"", lease->id, label(lease->tenant)),
                 static_cast<double>(lease->expires->time_since_epoch().count()) / 1000);
}

}  // namespace

void gpu_metrics(Page& page, const sample::Snapshot& seen, const control::Snapshot& leases, bool dcgm_names,
                 std::uint64_t now) {
  const Holders holders(leases);
  const auto gpus = gather(seen, holders, dcgm_names);
  page.one("sampling_up", gauge, "1: GPUs are sampled; 0: the driver or the sampler is not there.",
           seen.why.empty());
  values(page, gpus, now);
  health(page, gpus, now);
  who_has_what(page, gpus, leases);
  host(page, seen.host, gpus, now);
  if (dcgm_names) dcgm_values(page, gpus, now);
}

}  // namespace bulkhead::serve
