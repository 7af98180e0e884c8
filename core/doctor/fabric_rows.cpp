// NVSwitch hosts: Fabric Manager, its port and log, the fabric's state in the driver, and one model of GPU.
#include <algorithm>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/doctor/rows.hpp"

namespace bulkhead::doctor {

namespace {

constexpr const char* unit_name = "nvidia-fabricmanager.service";
constexpr const char* log_file = "/var/log/fabricmanager.log";
constexpr const char* config_files[] = {"/usr/share/nvidia/nvswitch/fabricmanager.cfg",
                                        "/etc/nvidia-fabricmanager/fabricmanager.cfg"};
constexpr std::uint16_t default_command_port = 6666;  // FM_CMD_PORT_NUMBER in the shipped fabricmanager.cfg

bool has_fabric(const Evidence& e) { return !e.host.nvswitches.empty(); }
Judgement no_fabric() { return ok("no NVSwitch on this host: not needed"); }

const inventory::SystemdUnit* manager(const Evidence& e) {
  for (const auto& unit : e.host.units) {
    if (unit.name.starts_with("nvidia-fabricmanager")) return &unit;
  }
  return nullptr;
}

Source words_of(const inventory::SystemdUnit& unit) {
  return {"systemd: " + unit.name, fmt::format("{}, {} ({}), {}", unit.load_state, unit.active_state,
                                               unit.sub_state, unit.file_state)};
}

Judgement unit(const Evidence& e) {
  if (!has_fabric(e)) return no_fabric();
  const auto* found = manager(e);
  if (found == nullptr) {
    std::string words = "no answer";
    for (const std::string& note : e.host.notes) {
      if (note.starts_with("systemd")) words = note;
    }
    return unknown("systemd could not be asked about Fabric Manager", {{"systemd", words}},
                   {"systemctl status nvidia-fabricmanager"});
  }
  if (found->load_state == "not-found") {
    const auto driver = e.host.driver_version ? Version::parse(*e.host.driver_version) : std::nullopt;
    const std::string branch = driver ? fmt::format("-{}", driver->major_part()) : "";
    return fail("Fabric Manager is not installed", {words_of(*found)},
                install(e, "nvidia-fabricmanager" + branch, "nvidia-fabric-manager", "nvidia-fabricmanager") +
                    std::vector<std::string>{sudo(e, "systemctl enable --now nvidia-fabricmanager")});
  }
  if (found->active_state != "active") {
    return fail("Fabric Manager is not running", {words_of(*found)},
                {sudo(e, "systemctl enable --now nvidia-fabricmanager"),
                 "systemctl status nvidia-fabricmanager --no-pager",
                 sudo(e, fmt::format("tail -n 30 {}", log_file))});
  }
  if (found->file_state == "disabled") {
    return warn("Fabric Manager runs now and will not after a reboot", {words_of(*found)},
                {sudo(e, "systemctl enable nvidia-fabricmanager")});
  }
  return ok("Fabric Manager runs and is enabled", {words_of(*found)});
}

// The part of the log that belongs to the newest start of Fabric Manager.
std::string_view newest_run(std::string_view log) {
  const std::size_t start = log.rfind("Fabric Manager version");
  return start == std::string_view::npos ? log : log.substr(start);
}

Judgement version(const Evidence& e) {
  if (!has_fabric(e)) return no_fabric();
  const auto& log = e.text(log_file);
  if (!log) return unknown("Fabric Manager's log cannot be read", {quote(e, log_file)}, as_root(e, log));
  const auto line = line_with(newest_run(*log), "Fabric Manager version");
  const auto found = line ? first_version(*line) : std::nullopt;
  if (!found)
    return unknown("Fabric Manager's log does not state its version",
                   {{log_file, "no \"Fabric Manager version\""}});
  if (!e.host.driver_version) return waits("driver.loaded", "no driver version to compare with");
  if (*found == *e.host.driver_version)
    return ok(fmt::format("Fabric Manager {} and the driver are one version", *found), {{log_file, *line}});
  return fail(fmt::format("Fabric Manager {} and driver {} differ", *found, *e.host.driver_version),
              {{log_file, *line}},
              install(e, fmt::format("'nvidia-fabricmanager-*={}*'", *e.host.driver_version),
                      fmt::format("nvidia-fabric-manager-{}", *e.host.driver_version),
                      fmt::format("nvidia-fabricmanager={}", *e.host.driver_version)) +
                  std::vector<std::string>{sudo(e, "systemctl restart nvidia-fabricmanager")});
}

Judgement port(const Evidence& e) {
  if (!has_fabric(e)) return no_fabric();
  if (const auto* found = manager(e); found != nullptr && found->active_state != "active")
    return waits("fabric.unit", "Fabric Manager is not running");
  for (const char* path : config_files) {
    if (const auto& text = e.text(path)) {
      if (const auto socket = value_of(*text, "FM_CMD_UNIX_SOCKET_PATH", '='); socket && !socket->empty()) {
        return ok("Fabric Manager takes commands on a Unix socket",
                  {{path, "FM_CMD_UNIX_SOCKET_PATH=" + *socket}});
      }
    }
  }
  std::vector<Source> closed, open, unasked;
  for (const std::uint16_t number : fabric_ports(e)) {
    const auto probe = e.ports.find(number);
    const std::string where = fmt::format("TCP port {}", number);
    if (probe == e.ports.end())
      unasked.push_back({where, "(not probed)"});
    else if (!probe->second)
      unasked.push_back({where, fmt::format("({})", probe->second.why)});
    else if (*probe->second)
      open.push_back({where, "listening"});
    else
      closed.push_back({where, "nobody listens"});
  }
  if (!closed.empty()) {
    for (const char* path : config_files) {
      if (e.text(path))
        closed.push_back(
            {path, fmt::format("FM_CMD_PORT_NUMBER={}",
                               value_of(*e.text(path), "FM_CMD_PORT_NUMBER", '=').value_or("(default)"))});
    }
    return warn("nobody listens on Fabric Manager's command port", closed,
                {sudo(e, fmt::format("grep -n PORT_NUMBER {}", config_files[0])),
                 sudo(e, "ss -ltnp | grep nv-fabric"), sudo(e, "systemctl restart nvidia-fabricmanager")});
  }
  if (!unasked.empty()) return unknown("Fabric Manager's port could not be probed", unasked);
  return ok("Fabric Manager's command port answers", open);
}

Judgement log(const Evidence& e) {
  if (!has_fabric(e)) return no_fabric();
  const auto& text = e.text(log_file);
  if (!text) return unknown("Fabric Manager's log cannot be read", {quote(e, log_file)}, as_root(e, text));
  const auto recent = newest_run(*text);
  struct Rule {
    const char* words;
    const char* says;
  };
  // The first two are Fabric Manager's own words (leptonai/gpud's matcher); the third is the guide's, kept as
  // an alias.
  constexpr Rule rules[] = {
      {"detected number of NVSwitches don't match", "Fabric Manager does not find the NVSwitches it expects"},
      {"detected NVSwitch fatal error", "an NVSwitch reported a fatal error"},
      {"Mismatched GPU types detected", "Fabric Manager found GPUs of different models"}};
  for (const Rule& rule : rules) {
    if (const auto line = line_with(recent, rule.words)) {
      return fail(rule.says, {{log_file, *line}},
                  {"lspci -nn -d 10de: | grep -i bridge   # count the NVSwitches",
                   sudo(e, "systemctl restart nvidia-fabricmanager"),
                   sudo(e, fmt::format("tail -n 50 {}", log_file))});
    }
  }
  for (const char* mark : {"[FATAL]", "[ERROR]"}) {
    if (const auto line = line_with(recent, mark)) {
      return warn("Fabric Manager logged an error since it started", {{log_file, *line}},
                  {sudo(e, fmt::format("grep -nE 'ERROR|FATAL' {} | tail -20", log_file))});
    }
  }
  return ok("no error since Fabric Manager started", {{log_file, "no [ERROR], no [FATAL]"}});
}

Judgement state(const Evidence& e) {
  if (!has_fabric(e)) return no_fabric();
  std::vector<Source> bad;
  std::size_t known = 0;
  for (const auto& gpu : e.host.gpus) {
    const auto& fabric = gpu.nvlink.fabric_state;
    if (!fabric || *fabric == "not supported") continue;
    ++known;
    const std::string status = gpu.nvlink.fabric_status.value_or("");
    const bool good = lower(*fabric) == "completed" && (status.empty() || lower(status) == "success");
    if (!good)
      bad.push_back({"NVML", fmt::format("{}: fabric {}{}{}", name_of(gpu), *fabric,
                                         status.empty() ? "" : ", ", status)});
  }
  if (known == 0) return unknown("the driver does not tell the fabric's state (before Hopper it cannot)");
  if (bad.empty()) return ok(fmt::format("{} GPUs are registered with the fabric", known));
  if (const auto* found = manager(e); found != nullptr && found->active_state != "active")
    return waits("fabric.unit", "GPUs register once Fabric Manager runs");
  return fail("a GPU is not registered with the fabric: CUDA starts with error 802 on it", bad,
              {sudo(e, "systemctl restart nvidia-fabricmanager"), "nvidia-smi -q | grep -A3 Fabric"});
}

Judgement same_model(const Evidence& e) {
  if (!has_fabric(e)) return no_fabric();
  std::vector<Source> models;
  std::vector<std::string> seen;
  for (const auto& gpu : e.host.gpus) {
    if (std::find(seen.begin(), seen.end(), gpu.model) != seen.end()) continue;
    seen.push_back(gpu.model);
    models.push_back({"NVML", fmt::format("{}: {}", name_of(gpu), gpu.model)});
  }
  if (seen.size() <= 1) return ok("one model of GPU on the fabric", models);
  return fail(fmt::format("{} models of GPU on one NVSwitch fabric", seen.size()), models,
              {"nvidia-smi --query-gpu=index,name,pci.bus_id --format=csv",
               "# all GPUs of one NVSwitch fabric must be of one model: exchange the odd one"});
}

Judgement links(const Evidence& e) {
  std::vector<Source> down;
  std::size_t judged = 0;
  for (const auto& gpu : e.host.gpus) {
    if (gpu.nvlink.links == 0 || gpu.mig_now || !has_fabric(e)) continue;
    ++judged;
    if (gpu.nvlink.active < gpu.nvlink.links) {
      down.push_back({"NVML", fmt::format("{}: {} of {} NVLinks active", name_of(gpu), gpu.nvlink.active,
                                          gpu.nvlink.links)});
    }
  }
  if (!has_fabric(e)) return no_fabric();
  if (judged == 0) return unknown("no GPU outside MIG mode shows its NVLinks");
  if (down.empty()) return ok(fmt::format("all NVLinks of {} GPUs are up", judged));
  if (const auto* found = manager(e); found != nullptr && found->active_state != "active")
    return waits("fabric.unit", "links train once Fabric Manager runs");
  return warn("an NVLink is down", down,
              {"nvidia-smi nvlink -s", sudo(e, "dmesg") + " | grep -i nvlink | tail -20"});
}

std::vector<Look> with_configs(std::vector<Look> looks) {
  for (const char* path : config_files) looks.push_back({How::text, path});
  return looks;
}

}  // namespace

std::vector<std::uint16_t> fabric_ports(const Evidence& e) {
  for (const char* path : config_files) {
    if (const auto& text = e.text(path)) {
      if (const auto word = value_of(*text, "FM_CMD_PORT_NUMBER", '=')) {
        if (const auto number = parse_u64(*word); number && *number > 0 && *number < 65536)
          return {static_cast<std::uint16_t>(*number)};
      }
    }
  }
  return {default_command_port};
}

std::vector<Check> fabric_rows() {
  return {
      {.id = "fabric.unit",
       .title = "Fabric Manager runs",
       .requirements = {"R4", "R17"},
       .purposes = for_driver,
       .reads = {},
       .why = "On an NVSwitch host no new CUDA program starts without it (error 802); traffic does not fall "
              "back to PCIe.",
       .judge = unit},
      {.id = "fabric.version",
       .title = "Fabric Manager and driver are one version",
       .requirements = {"R4", "R17", "R20"},
       .purposes = for_driver,
       .reads = {{How::tail, log_file}},
       .why = "Fabric Manager refuses a driver of another version and exits.",
       .judge = version},
      {.id = "fabric.port",
       .title = "Fabric Manager listens",
       .requirements = {"R4"},
       .purposes = for_driver,
       .reads = with_configs({}),
       .why = "Partitions are switched through this port. It is configurable: 6666 as shipped, 5555 only if "
              "you set it.",
       .judge = port},
      {.id = "fabric.log",
       .title = "Fabric Manager's log is clean",
       .requirements = {"R24"},
       .purposes = for_driver,
       .reads = {{How::tail, log_file}},
       .why = "A missing NVSwitch or a wrong topology is reported here first.",
       .judge = log},
      {.id = "fabric.state",
       .title = "GPUs are registered with the fabric",
       .requirements = {"R4", "R17"},
       .purposes = for_driver,
       .reads = {},
       .why = "The unit can be active while a GPU never joined: the driver's own state is the truth.",
       .judge = state},
      {.id = "fabric.same-model",
       .title = "One model of GPU on the fabric",
       .requirements = {"R24"},
       .purposes = for_driver,
       .reads = {},
       .why = "An NVSwitch fabric supports one model only.",
       .judge = same_model},
      {.id = "fabric.links",
       .title = "NVLinks are up",
       .requirements = {"R17", "R24"},
       .purposes = for_driver,
       .reads = {},
       .why = "A fabric with a link down is slower for everybody who shares it.",
       .judge = links},
  };
}

}  // namespace bulkhead::doctor
