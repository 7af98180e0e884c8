// Heat and power: how far from slowing down, whether it slows already, and whether the rack can carry it.
#include <algorithm>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/doctor/rows.hpp"

namespace bulkhead::doctor {

namespace {

constexpr int ceiling = 85;  // the guide's ceiling, degrees Celsius
constexpr int guard =
    3;  // degrees kept from the chip's own limit: the slowdown point lies 2 below it on H100, H200 and L40S
constexpr int near_enough = 5;  // fewer degrees of headroom than this is worth a word
constexpr const char* rack_file = "/etc/bulkhead/rack_watts";

Judgement headroom(const Evidence& e) {
  std::vector<Source> over, close;
  std::size_t judged = 0;
  int least = 1000;
  for (const auto& gpu : e.host.gpus) {
    if (!gpu.temperature) continue;
    ++judged;
    int room = ceiling - gpu.temperature->count;
    std::string words =
        fmt::format("{}: {} C, {} below {} C", name_of(gpu), gpu.temperature->count, room, ceiling);
    if (gpu.margin) {
      room = std::min(room, gpu.margin->count - guard);
      words += fmt::format("; {} C to the chip's own limit", gpu.margin->count);
    } else if (gpu.slowdown_at) {
      room = std::min(room, gpu.slowdown_at->count - gpu.temperature->count - guard);
      words += fmt::format("; slows at {} C", gpu.slowdown_at->count);
    }
    least = std::min(least, room);
    if (room < 0)
      over.push_back({"NVML", words});
    else if (room < near_enough)
      close.push_back({"NVML", words});
  }
  if (judged == 0) return unknown("no GPU tells its temperature");
  const std::vector<std::string> mend{
      "nvidia-smi -q -d TEMPERATURE,PERFORMANCE",
      "# raise the airflow or lower the inlet temperature; until then lower the power limit:",
      sudo(e, "nvidia-smi -pl WATTS   # within the range of nvidia-smi -q -d POWER")};
  if (!over.empty()) return fail(fmt::format("{} GPUs are past the ceiling", over.size()), over, mend);
  if (!close.empty())
    return warn(fmt::format("{} GPUs are within {} C of the ceiling", close.size(), near_enough), close,
                mend);
  return ok(fmt::format("at least {} C of headroom on {} GPUs", least, judged));
}

struct Reason {
  std::uint64_t bit;
  const char* words;
};

// nvmlClocksEventReason bits.
Judgement reasons(const Evidence& e, std::initializer_list<Reason> rows, std::string_view good,
                  std::string_view bad, std::vector<std::string> mend) {
  std::vector<Source> active;
  std::size_t judged = 0;
  for (const auto& gpu : e.host.gpus) {
    if (!gpu.clock_event_reasons) continue;
    ++judged;
    for (const Reason& row : rows) {
      if ((*gpu.clock_event_reasons & row.bit) != 0)
        active.push_back(
            {"NVML", fmt::format("{}: clocks event reason {:#x} ({})", name_of(gpu), row.bit, row.words)});
    }
  }
  if (judged == 0) return unknown("no GPU tells why it slows");
  if (active.empty()) return ok(std::string(good));
  return fail(std::string(bad), active, std::move(mend));
}

Judgement slowdown(const Evidence& e) {
  return reasons(e, {{0x20, "software thermal slowdown"}, {0x40, "hardware thermal slowdown"}},
                 "no GPU slows for heat", "a GPU slows for heat at this moment",
                 {"nvidia-smi -q -d TEMPERATURE,PERFORMANCE",
                  "# check fans, filters and inlet temperature; compare the cooling with the sum of power "
                  "limits (check power.rack)"});
}

Judgement brake(const Evidence& e) {
  return reasons(e, {{0x80, "hardware power brake"}}, "no power brake is pulled",
                 "the power brake is pulled: the rack or a power supply asks for less",
                 {"# not the tenants' doing: look at power supplies and the rack's feed",
                  sudo(e, "ipmitool sel list") + " | tail -20", sudo(e, "ipmitool sdr type 'Power Supply'")});
}

Judgement rack(const Evidence& e) {
  std::uint64_t sum = 0;
  std::size_t known = 0;
  for (const auto& gpu : e.host.gpus) {
    if (!gpu.power.limit) continue;
    sum += gpu.power.limit->count;
    ++known;
  }
  if (known == 0) return unknown("no GPU tells its power limit");
  const Source limits{"NVML", fmt::format("{} W: sum of the power limits of {} GPUs", sum / 1000, known)};
  const auto& text = e.text(rack_file);
  const auto budget = text ? parse_u64(trim(*text)) : std::nullopt;
  if (!text) {
    return unknown("nobody said what the rack can cool and feed", {limits, quote(e, rack_file)},
                   {"# watts that cooling and supply can carry for this host's GPUs:",
                    "echo WATTS | " + sudo(e, "install -D -m 644 /dev/stdin /etc/bulkhead/rack_watts")});
  }
  if (!budget)
    return warn("the rack's budget is no number of watts", {quote(e, rack_file)},
                {"echo WATTS | " + sudo(e, "tee /etc/bulkhead/rack_watts")});
  if (sum > *budget * 1000) {
    return fail(fmt::format("the GPUs may draw {} W and the rack carries {} W", sum / 1000, *budget),
                {limits, quote(e, rack_file)},
                {sudo(e, fmt::format("nvidia-smi -pl {}   # the budget shared out evenly", *budget / known)),
                 "# for good: power_limit_w in the node file"});
  }
  return ok(fmt::format("the rack carries {} W, the GPUs may draw {} W", *budget, sum / 1000),
            {limits, quote(e, rack_file)});
}

Judgement bmc(const Evidence& e) {
  for (const char* path : {"/dev/ipmi0", "/dev/ipmi/0", "/dev/ipmidev/0"}) {
    if (e.node(path)) return ok("a BMC can be asked", {quote(e, path)});
  }
  if (virtual_machine(e)) return ask_the_host(e, "no BMC is visible");
  return warn(
      "no way to the BMC: fans, inlet temperature and supply voltages stay unseen", {quote(e, "/dev/ipmi0")},
      {sudo(e, "modprobe -a ipmi_si ipmi_devintf"),
       "printf 'ipmi_si\\nipmi_devintf\\n' | " + sudo(e, "tee /etc/modules-load.d/bulkhead-ipmi.conf")});
}

}  // namespace

std::vector<Check> heat_rows() {
  return {
      {.id = "thermal.headroom",
       .title = "GPUs are below the thermal ceiling",
       .requirements = {"R6", "R40"},
       .purposes = for_all,
       .reads = {},
       .why = "Some chips slow down below 85 C, and bound by another sensor: the smaller of 85 C - T and "
              "margin - 3 C counts.",
       .judge = headroom},
      {.id = "thermal.slowdown",
       .title = "No GPU slows for heat",
       .requirements = {"R40"},
       .purposes = for_all,
       .reads = {},
       .why = "A GPU that throttles breaks what its tenants were promised, and says so only when asked.",
       .judge = slowdown},
      {.id = "power.brake",
       .title = "The power brake is not pulled",
       .requirements = {"R40"},
       .purposes = for_all,
       .reads = {},
       .why = "The board was told from outside to draw less: a fault of rack or supply, not of a tenant.",
       .judge = brake},
      {.id = "power.rack",
       .title = "Rack carries the sum of power limits",
       .requirements = {"R40"},
       .purposes = for_all,
       .reads = {{How::text, rack_file}},
       .why = "Cooling and supply must match all tenants at full load at once.",
       .judge = rack},
      {.id = "bmc.present",
       .title = "The BMC can be asked",
       .requirements = {"R6", "R40"},
       .purposes = for_all,
       .reads = {{How::node, "/dev/ipmi0"}, {How::node, "/dev/ipmi/0"}, {How::node, "/dev/ipmidev/0"}},
       .why = "GPU sensors do not show fans, inlet air or the 12 V rails.",
       .judge = bmc},
  };
}

}  // namespace bulkhead::doctor
