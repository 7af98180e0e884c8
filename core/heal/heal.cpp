#include "core/heal/heal.hpp"

#include <algorithm>
#include <array>

#include <fmt/format.h>

namespace bulkhead::heal {

namespace {

constexpr std::int64_t hour_s = 3600;

// The table. `next` never points back: a chain of acts that do not help ends with a person.
constexpr std::array<Row, acts> table{{
    {Act::none, Reach::process, false, Act::none, ""},
    {Act::end_process, Reach::process, false, Act::drain_slice, "its process is ended"},
    {Act::drain_slice, Reach::slice, true, Act::recreate_slice, "its lease is ended"},
    {Act::recreate_slice, Reach::slice, true, Act::reset_gpu, "its slice is made anew"},
    {Act::reset_gpu, Reach::gpu, true, Act::rescan, "its GPU is reset"},
    {Act::rescan, Reach::gpu, true, Act::quarantine, "its GPU is taken off the bus and found again"},
    {Act::restart_fabric_manager, Reach::fabric, false, Act::reboot, "the NVLink fabric is set up anew"},
    {Act::quarantine, Reach::gpu, false, Act::reboot, "its GPU is taken out of service"},
    {Act::reboot, Reach::node, false, Act::none, "the node is booted"},
}};
constexpr bool rows_in_order() {
  for (std::size_t i = 0; i < table.size(); ++i)
    if (table[i].act != static_cast<Act>(i)) return false;
  return true;
}
static_assert(rows_in_order());

constexpr std::array<std::string_view, acts> names{"none",
                                                   "end-process",
                                                   "drain-slice",
                                                   "recreate-slice",
                                                   "reset-gpu",
                                                   "rescan",
                                                   "restart-fabric-manager",
                                                   "quarantine",
                                                   "reboot"};
constexpr std::array<std::string_view, 3> modes{"observe", "suggest", "act"};

bool same_place(const Done& done, const Fault& fault, Reach reach) {
  if (reach == Reach::fabric || reach == Reach::node) return true;
  if (done.gpu != fault.gpu) return false;
  return reach != Reach::slice || done.gpu_instance == fault.gpu_instance;
}

// Without MIG there is no slice to make anew: the GPU is the slice.
Act fitting(Act act, const Gpu* gpu, const Fault& fault) {
  const bool slice = gpu != nullptr && gpu->mig && fault.gpu_instance;
  if (act == Act::recreate_slice && !slice) return Act::reset_gpu;
  return act;
}

void add_commands(Decision& out, const Fault& fault, const Gpu* gpu) {
  const auto say = [&](std::string line) { out.commands.push_back(std::move(line)); };
  const auto number = gpu != nullptr ? std::to_string(gpu->index) : fault.gpu.text;
  const auto shut = [&] {
    say(fmt::format("bulkhead gpus cordon {} --why '{}'", number, "for repair"));
    for (const auto& victim : out.victims)
      say(fmt::format("bulkhead lease evict {} --why '{}'", victim.lease, "its GPU goes for repair"));
  };
  switch (out.act) {
    case Act::none:
      return;
    case Act::end_process:
      if (fault.pid > 1) say(fmt::format("kill {}", fault.pid));
      return;
    case Act::drain_slice:
    case Act::recreate_slice:
      for (const auto& victim : out.victims)
        say(fmt::format("bulkhead lease evict {} --why 'its slice goes for repair'", victim.lease));
      if (out.act == Act::recreate_slice && fault.gpu_instance) {
        say(fmt::format("nvidia-smi mig -dci -i {} -gi {}", number, *fault.gpu_instance));
        say(fmt::format("nvidia-smi mig -dgi -i {} -gi {}", number, *fault.gpu_instance));
        say("bulkhead apply -f NODE-FILE");
      }
      return;
    case Act::reset_gpu:
      shut();
      say(fmt::format("nvidia-smi --gpu-reset -i {}", number));
      say(fmt::format("bulkhead gpus uncordon {}", number));
      return;
    case Act::rescan:
      shut();
      say("bulkhead reclaim ADDRESS --rescan");
      say(fmt::format("bulkhead gpus uncordon {}", number));
      return;
    case Act::restart_fabric_manager:
      say("systemctl restart nvidia-fabricmanager");
      return;
    case Act::quarantine:
      shut();
      return;
    case Act::reboot:
      say("bulkhead gpus cordon all --why 'reboot'");
      say("systemctl reboot");
      return;
  }
}

}  // namespace

std::string_view name_of(Act act) { return names[static_cast<std::size_t>(act)]; }
std::optional<Act> parse_act(std::string_view text) {
  for (std::size_t i = 0; i < names.size(); ++i)
    if (names[i] == text) return static_cast<Act>(i);
  return std::nullopt;
}
const Row& row_of(Act act) { return table[static_cast<std::size_t>(act)]; }
std::string_view name_of(Mode mode) { return modes[static_cast<std::size_t>(mode)]; }
std::optional<Mode> parse_mode(std::string_view text) {
  for (std::size_t i = 0; i < modes.size(); ++i)
    if (modes[i] == text) return static_cast<Mode>(i);
  return std::nullopt;
}
std::string_view name_of(Step step) {
  static constexpr std::array<std::string_view, 6> words{"cordon", "evict", "let-go",
                                                         "act",    "gate",  "uncordon"};
  return words[static_cast<std::size_t>(step)];
}

Decision decide(const Fault& fault, const Host& host, std::span<const Done> before, const Settings& settings,
                std::int64_t now_s) {
  Decision out;
  const auto found =
      std::find_if(host.gpus.begin(), host.gpus.end(), [&](const Gpu& gpu) { return gpu.uuid == fault.gpu; });
  const Gpu* gpu = found == host.gpus.end() ? nullptr : &*found;
  Act act = fitting(fault.remedy, gpu, fault);
  if (act == Act::none) {
    out.why = fmt::format("{}: nothing to mend", fault.cause);
    return out;
  }
  const bool of_gpu = row_of(act).reach <= Reach::gpu;
  if (of_gpu && gpu == nullptr) {
    out.why = fmt::format("{}: the host has no GPU {}", fault.cause, fault.gpu.text);
    out.held.push_back("there is nothing to act on");
    return out;
  }

  // The mildest act that was not tried here in vain: each that was is left behind.
  std::vector<std::string> tried;
  const bool own = fault.own && act == Act::end_process;
  for (std::size_t i = 0; i < acts && act != Act::none && !own; ++i) {
    const auto in_vain = std::find_if(before.begin(), before.end(), [&](const Done& done) {
      return done.act == act && now_s - done.at_s < settings.relapse_s && now_s >= done.at_s &&
             same_place(done, fault, row_of(act).reach);
    });
    if (in_vain == before.end()) break;
    const Act next = fitting(row_of(act).next, gpu, fault);
    if (next == Act::none) break;
    tried.push_back(
        fmt::format("{} {}", name_of(act), in_vain->helped ? "helped, but not for long" : "did not help"));
    act = next;
  }
  out.act = act;
  const Row& row = row_of(act);
  out.next = own ? Act::none : fitting(row.next, gpu, fault);
  out.why = fault.cause;
  for (const auto& one : tried) out.why += "; " + one;

  // Who loses what.
  for (const auto& other : host.gpus) {
    const bool here = gpu != nullptr && other.uuid == gpu->uuid;
    for (const auto& lease : other.leases) {
      bool hit = false;
      switch (row.reach) {
        case Reach::process:
          break;  // the program's end is not the lease's
        case Reach::slice:
          hit = here && (!fault.gpu_instance || lease.gpu_instance == fault.gpu_instance);
          break;
        case Reach::gpu:
          hit = here;
          break;
        case Reach::fabric:
          hit = other.on_fabric;
          break;
        case Reach::node:
          hit = true;
          break;
      }
      if (hit)
        out.victims.push_back(
            {.lease = lease.id,
             .tenant = lease.tenant,
             .loses = fmt::format("lease {} on gpu {}: {}", lease.id, other.index, row.does)});
    }
    if (here && row.reach >= Reach::gpu)
      for (const auto& holder : other.holders) out.disturbed.push_back(holder);
    if (!here && gpu != nullptr && gpu->on_fabric && other.on_fabric &&
        (act == Act::reset_gpu || act == Act::rescan))
      out.disturbed.push_back(fmt::format("gpu {}: its NVLink peer is away meanwhile", other.index));
  }

  // What holds it back.
  if (settings.mode == Mode::observe) out.held.push_back("heal: observe says what would be done");
  if (settings.mode == Mode::suggest) out.held.push_back("heal: suggest leaves it to a person");
  if (act == Act::reboot) out.held.push_back("a reboot is a person's to do");
  if (!fault.sure && (!out.victims.empty() || act == Act::end_process))
    out.held.push_back("the cause is a guess, and on a guess nobody loses anything");
  // What shuts a broken GPU protects the others: the breaker does not hold it back.
  const auto lately = std::count_if(before.begin(), before.end(), [&](const Done& done) {
    return now_s - done.at_s < hour_s && now_s >= done.at_s && done.act != Act::quarantine &&
           done.act != Act::end_process;
  });
  // Nor does it hold back what touches one program: a tenant could use it up for all others.
  if (act != Act::quarantine && act != Act::end_process && static_cast<std::uint64_t>(lately) >= settings.most_an_hour)
    out.held.push_back(fmt::format("{} acts in the last hour: at most {} are taken without a person", lately,
                                   settings.most_an_hour));
  if (gpu != nullptr && gpu->serves && row.reach >= Reach::gpu) {
    const auto left = std::count_if(host.gpus.begin(), host.gpus.end(), [&](const Gpu& other) {
      return other.serves && other.uuid != gpu->uuid;
    });
    if (static_cast<std::uint64_t>(left) < settings.keep_healthy)
      out.held.push_back(left == 0 ? "it is the last GPU that serves"
                                   : fmt::format("only {} GPUs would still serve", left));
  }
  out.now = out.held.empty();

  switch (row.reach) {
    case Reach::process:
      out.steps = {Step::act};
      break;
    case Reach::slice:
      out.steps = {Step::cordon, Step::evict, Step::act, Step::gate, Step::uncordon};
      break;
    case Reach::gpu:
      out.steps = act == Act::quarantine ? std::vector{Step::cordon, Step::evict}
                                         : std::vector{Step::cordon, Step::evict, Step::let_go,
                                                       Step::act,    Step::gate,  Step::uncordon};
      break;
    case Reach::fabric:
      out.steps = {Step::cordon, Step::evict, Step::act, Step::uncordon};
      break;
    case Reach::node:
      break;
  }
  add_commands(out, fault, gpu);
  return out;
}

Json to_json(const Decision& decision) {
  Json victims = Json::array();
  for (const auto& one : decision.victims)
    victims.push_back(Json{{"lease", one.lease}, {"tenant", one.tenant}, {"loses", one.loses}});
  Json steps = Json::array();
  for (const auto step : decision.steps) steps.push_back(name_of(step));
  return Json{
      {"act", name_of(decision.act)},    {"now", decision.now},           {"why", decision.why},
      {"held", decision.held},           {"steps", std::move(steps)},     {"victims", std::move(victims)},
      {"disturbed", decision.disturbed}, {"commands", decision.commands}, {"next", name_of(decision.next)}};
}

}  // namespace bulkhead::heal
