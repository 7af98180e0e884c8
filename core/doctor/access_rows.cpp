// Who may open what: device nodes, mandatory access control, container runtimes.
#include <algorithm>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/doctor/rows.hpp"

namespace bulkhead::doctor {

namespace {

std::string numbered_group(const Evidence& e, unsigned gid) {
  if (const auto& groups = e.text("/etc/group")) {
    for (const auto line : split_lines(*groups)) {
      const auto fields = split(line, ':');
      if (fields.size() >= 3 && parse_u64(fields[2]) == gid) return std::string(fields[0]);
    }
  }
  return fmt::format("#{}", gid);
}

bool may_read_and_write(const Caller& caller, const Node& node) {
  if (caller.uid == 0) return true;
  if (caller.uid == node.uid) return (node.mode & 0600U) == 0600U;
  if (std::find(caller.gids.begin(), caller.gids.end(), node.gid) != caller.gids.end())
    return (node.mode & 0060U) == 0060U;
  return (node.mode & 0006U) == 0006U;
}

std::string user_of(const Evidence& e) {
  return e.caller.name.empty() ? fmt::format("user {}", e.caller.uid) : e.caller.name;
}

// What would let the caller in: the group when the group may, the mode otherwise.
std::string way_in(const Evidence& e, const std::string& path, const Node& node) {
  if ((node.mode & 0060U) == 0060U)
    return sudo(
        e, fmt::format("usermod -aG {} {}   # then log in again", numbered_group(e, node.gid), user_of(e)));
  return fmt::format("# {} is {:04o}, owner {}: run as root, or give it a group in a udev rule", path,
                     node.mode, node.uid);
}

Judgement nvidia_nodes(const Evidence& e) {
  if (e.host.gpus.empty()) return waits("driver.loaded", "no GPU answers");
  std::vector<std::string> wanted{"/dev/nvidiactl"};
  for (const auto& gpu : e.host.gpus) {
    if (gpu.minor) wanted.push_back(fmt::format("/dev/nvidia{}", *gpu.minor));
  }
  std::vector<Source> missing, closed;
  std::vector<std::string> mend;
  for (const std::string& path : wanted) {
    const auto& node = e.node(path);
    if (!node) {
      missing.push_back(quote(e, path));
    } else if (!may_read_and_write(e.caller, *node)) {
      closed.push_back(quote(e, path));
      const std::string line = way_in(e, path, *node);
      if (std::find(mend.begin(), mend.end(), line) == mend.end()) mend.push_back(line);
    }
  }
  if (!missing.empty())
    return fail(fmt::format("{} of {} device nodes are missing", missing.size(), wanted.size()), missing,
                {sudo(e, "nvidia-modprobe -c 0 -u"), "ls -l /dev/nvidia*"});
  if (!closed.empty())
    return fail(
        fmt::format("{} may not open {} of {} device nodes", user_of(e), closed.size(), wanted.size()),
        closed, mend);
  return ok(fmt::format("{} may open /dev/nvidia*", user_of(e)), {quote(e, wanted.front())});
}

bool is_group_node(const std::string& path) {
  if (!path.starts_with("/dev/vfio/")) return false;
  const std::string name = path.substr(10);
  return name.starts_with("devices/") || (!name.empty() && name[0] >= '0' && name[0] <= '9') ||
         name.starts_with("noiommu-");
}

Judgement vfio_access(const Evidence& e) {
  std::vector<Source> closed;
  std::vector<std::string> mend;
  std::size_t judged = 0;
  for (const auto& [path, node] : e.nodes) {
    if (!path.starts_with("/dev/vfio/") || !node || !node->device) continue;
    ++judged;
    if (may_read_and_write(e.caller, *node)) continue;
    closed.push_back(quote(e, path));
    mend.push_back(way_in(e, path, *node));
  }
  if (!closed.empty())
    return warn(fmt::format("{} may not open VFIO nodes: binding and passing through need root", user_of(e)),
                closed, mend);
  if (judged == 0) return ok("no VFIO node yet: they appear when a device is bound");
  return ok(fmt::format("{} may open {} VFIO nodes", user_of(e), judged));
}

Judgement vfio_modes(const Evidence& e) {
  std::vector<Source> open;
  std::vector<std::string> mend;
  bool world = false;
  for (const auto& [path, node] : e.nodes) {
    if (!is_group_node(path) || !node || (node->mode & 0077U) == 0) continue;
    open.push_back(quote(e, path));
    world = world || (node->mode & 0007U) != 0;
    mend.push_back(sudo(e, fmt::format("chmod 600 {}", path)));
  }
  if (open.empty())
    return ok("VFIO group nodes are closed to all but their owner (/dev/vfio/vfio itself is harmless)");
  mend.push_back("echo 'SUBSYSTEM==\"vfio\", MODE=\"0600\"' | " +
                 sudo(e, "tee /etc/udev/rules.d/60-bulkhead-vfio.rules"));
  mend.push_back(sudo(e, "udevadm control --reload"));
  if (world) return fail("any user of this host may drive a device of a tenant", open, mend);
  return warn("a whole group of users may drive a device of a tenant", open, mend);
}

Judgement vfio_module(const Evidence& e) {
  if (e.list("/sys/bus/pci/drivers/vfio-pci"))
    return ok("vfio-pci is loaded", {{"/sys/bus/pci/drivers/vfio-pci", "exists"}});
  const std::string release = e.host.kernel.value_or("?");
  bool listed_somewhere = false;
  for (const char* name : {"modules.dep", "modules.builtin"}) {
    const std::string path = fmt::format("/lib/modules/{}/{}", release, name);
    if (const auto& text = e.text(path)) {
      listed_somewhere = true;
      if (const auto line = line_with(*text, "vfio-pci.ko"))
        return ok("vfio-pci can be loaded", {{path, line->substr(0, line->find(':'))}});
    }
  }
  if (virtual_machine(e)) return ask_the_host(e, "this kernel has no vfio-pci");
  const Source source{fmt::format("/lib/modules/{}/modules.dep", release),
                      listed_somewhere ? "no vfio-pci.ko"
                                       : quote(e, fmt::format("/lib/modules/{}/modules.dep", release)).words};
  if (!listed_somewhere)
    return unknown("the kernel's list of modules cannot be read", {source}, {sudo(e, "modprobe vfio-pci")});
  return fail("this kernel has no vfio-pci module", {source},
              install(e, "linux-image-amd64", "kernel-modules", "kernel-default"));
}

Judgement privilege(const Evidence& e) {
  if (e.caller.uid == 0) return ok("asked by root");
  for (const char* group : {"sudo", "wheel", "admin"}) {
    if (std::find(e.caller.groups.begin(), e.caller.groups.end(), group) != e.caller.groups.end()) {
      return ok(fmt::format("{} is in group {}", user_of(e), group), {{"/etc/group", group}});
    }
  }
  return warn(fmt::format("{} is neither root nor in an administrators' group", user_of(e)),
              {{"caller", fmt::format("uid {}, groups {}", e.caller.uid, join(e.caller.groups, " "))}},
              {fmt::format("su -c 'usermod -aG {} {}'   # then log in again",
                           family(e) == Family::debian ? "sudo" : "wheel", user_of(e))});
}

// A line that holds all of the words.
std::optional<std::string> line_with_all(std::string_view text,
                                         std::initializer_list<std::string_view> words) {
  std::optional<std::string> found;
  for (const auto line : split_lines(text)) {
    if (std::all_of(words.begin(), words.end(),
                    [&](std::string_view word) { return line.find(word) != std::string_view::npos; }))
      found = std::string(trim(line));
  }
  return found;
}

// The newest denial of a VFIO or NVIDIA node in the audit log or the kernel log.
std::optional<Source> denial(const Evidence& e, std::string_view mark) {
  const auto search = [&](const std::string& where, std::string_view text) -> std::optional<Source> {
    for (const std::string_view what : {"vfio", "/dev/nvidia"}) {
      if (const auto line = line_with_all(text, {mark, what})) return Source{where, *line};
    }
    return std::nullopt;
  };
  if (const auto& audit = e.text("/var/log/audit/audit.log")) {
    if (auto found = search("/var/log/audit/audit.log", *audit)) return found;
  }
  if (e.kernel_log) return search(e.kernel_log->source, e.kernel_log->text);
  return std::nullopt;
}

bool logs_readable(const Evidence& e) {
  return e.kernel_log.value.has_value() || e.text("/var/log/audit/audit.log").value.has_value();
}

// The value of key="value" or key=value in a line of the audit log; never anything that a shell would read.
std::string audit_field(std::string_view line, std::string_view key) {
  for (std::size_t at = line.find(key); at != std::string_view::npos; at = line.find(key, at + 1)) {
    const std::size_t value = at + key.size();
    if ((at > 0 && line[at - 1] != ' ') || value >= line.size() || line[value] != '=') continue;
    auto rest = line.substr(value + 1);
    rest = rest.starts_with('"') ? rest.substr(1, rest.find('"', 1) - 1) : rest.substr(0, rest.find(' '));
    const bool tame = std::all_of(rest.begin(), rest.end(), [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
             std::string_view("/._-:+@,").find(c) != std::string_view::npos;
    });
    return tame && rest.size() <= 256 ? std::string(rest) : std::string();
  }
  return {};
}

// The rule that allows exactly what the line says was denied, and the file that the profile reads for it.
std::vector<std::string> apparmor_mend(const Evidence& e, std::string_view line) {
  std::string name = audit_field(line, "name"), profile = audit_field(line, "profile");
  const std::string mask = audit_field(line, "denied_mask");
  if (!name.starts_with("/dev/")) name = "/dev/vfio/*";
  // Groups are numbered anew when slots change, and a guest has one of them: the rule names them all.
  if (name.starts_with("/dev/vfio/") && name.find_first_of("0123456789") != std::string::npos)
    name = name.starts_with("/dev/vfio/devices/") ? "/dev/vfio/devices/vfio[0-9]*" : "/dev/vfio/[0-9]*";
  const bool only_reads = mask == "r";
  const std::string rule = fmt::format("{} {},", name, only_reads ? "r" : "rw");
  // libvirt makes a profile for each guest from one abstraction, which includes the local file.
  std::string file = "/etc/apparmor.d/local/abstractions/libvirt-qemu";
  if (!profile.empty() && !profile.starts_with("libvirt-")) {
    std::string base = profile.starts_with('/') ? profile.substr(1) : profile;
    std::replace(base.begin(), base.end(), '/', '.');
    if (const auto child = base.find("//"); child != std::string::npos) base.resize(child);
    file = "/etc/apparmor.d/local/" + base;
  }
  return {fmt::format("echo '  {}' | {}", rule, sudo(e, "tee -a " + file)),
          sudo(e, "systemctl reload apparmor"),
          "# a guest that runs keeps its old profile: stop and start it"};
}

std::vector<std::string> selinux_mend(const Evidence& e, std::string_view line) {
  const auto type_of = [](const std::string& context) {  // user:role:type:level
    const auto fields = split(context, ':');
    return fields.size() >= 3 ? std::string(fields[2]) : std::string();
  };
  const auto source = type_of(audit_field(line, "scontext")), target = type_of(audit_field(line, "tcontext"));
  const auto object = audit_field(line, "tclass");
  const auto open = line.find('{'), close = line.find('}');
  std::string rights;
  if (open != std::string_view::npos && close != std::string_view::npos && open < close)
    rights = printable(trim(line.substr(open + 1, close - open - 1)), 128);
  const bool tame =
      !rights.empty() && rights.find_first_not_of("abcdefghijklmnopqrstuvwxyz_ ") == std::string::npos;
  std::vector<std::string> mend{sudo(e, "restorecon -Rv /dev/vfio /dev/nvidia*") +
                                "   # the node's own label first; is it still denied, then:"};
  if (source.starts_with("container")) mend.push_back(sudo(e, "setsebool -P container_use_devices 1"));
  if (!source.empty() && !target.empty() && !object.empty() && tame) {
    mend.push_back(
        fmt::format("echo '(allow {} {} ({} ({})))' > bulkhead-gpu.cil", source, target, object, rights));
    mend.push_back(sudo(e, "semodule -i bulkhead-gpu.cil"));
  } else {
    mend.push_back(sudo(e, "ausearch -m avc -ts boot --raw") +
                   " | audit2allow -M bulkhead-gpu   # review the .te file, then");
    mend.push_back(sudo(e, "semodule -i bulkhead-gpu.pp"));
  }
  return mend;
}

Judgement apparmor(const Evidence& e) {
  const std::string enabled = "/sys/module/apparmor/parameters/enabled";
  if (const auto found = denial(e, "apparmor=\"DENIED\""))
    return fail("AppArmor kept a program from a GPU's device node", {*found}, apparmor_mend(e, found->words));
  if (!e.text(enabled) || !trim(*e.text(enabled)).starts_with('Y'))
    return ok("AppArmor is not active", {quote(e, enabled)});
  if (!logs_readable(e))
    return unknown("AppArmor is active and neither audit log nor kernel log can be read",
                   {quote(e, "/var/log/audit/audit.log")}, as_root(e));
  return ok("AppArmor is active and denied no GPU device node", {quote(e, enabled)});
}

Judgement selinux(const Evidence& e) {
  const std::string enforce = "/sys/fs/selinux/enforce";
  if (const auto found = denial(e, "avc:  denied")) {
    return fail("SELinux kept a program from a GPU's device node", {*found}, selinux_mend(e, found->words));
  }
  if (!e.text(enforce) || trim(*e.text(enforce)) != "1")
    return ok("SELinux does not enforce", {quote(e, enforce)});
  if (!logs_readable(e))
    return unknown("SELinux enforces and neither audit log nor kernel log can be read",
                   {quote(e, "/var/log/audit/audit.log")}, as_root(e));
  return ok("SELinux enforces and denied no GPU device node", {quote(e, enforce)});
}

struct LogRule {
  const char* words;
  const char* also;  // must be on the line too; empty: nothing more
  const char* says;
  const char* mend;
};
// The kernel's words where not said otherwise.
constexpr LogRule vfio_rules[] = {
    {"No interrupt remapping", "", "VFIO found no interrupt remapping",
     "# firmware setup: enable interrupt remapping (x2APIC, VT-d)"},
    {"IRQs not enabled, cannot bind device", "", "a log says that interrupts could not be set up",
     "# see the checks iommu.interrupt-remapping and pci.message-interrupts"},  // the guide's words, in no
                                                                                // source: an alias
    {"can't reserve", "vfio", "another driver holds a window of the device",
     "grep -iE 'efifb|simplefb|simpledrm' /proc/iomem"},
    {"giving up", "not ready", "a device did not come back from a reset",
     "# power-cycle the node before the next tenant gets this device"},
    {"Unable to change power state from D3cold to D0", "", "a device sleeps and cannot be woken",
     "echo 'options vfio-pci disable_idle_d3=1' | sudo tee /etc/modprobe.d/bulkhead-vfio-power.conf"},
    {"with non-zero usage count", "Attempting to remove device",
     "an unbind waits for a process that holds the GPU", "sudo fuser -v /dev/nvidia*"},
    {"Aborting probe for VF", "", "the driver refused a virtual function because there is no IOMMU",
     "# see the check iommu.kernel"},
};

Judgement vfio_log(const Evidence& e) {
  if (!e.kernel_log)
    return unknown("the kernel log cannot be read", {{"kernel log", e.kernel_log.why}}, as_root(e));
  for (const LogRule& rule : vfio_rules) {
    if (const auto line = line_with_all(e.kernel_log->text, {rule.words, rule.also})) {
      return fail(rule.says, {{e.kernel_log->source, *line}},
                  {rule.mend, sudo(e, "dmesg") + " | grep -i vfio"});
    }
  }
  return ok("no VFIO error in the kernel log", {{e.kernel_log->source, "no known VFIO error"}});
}

constexpr const char* docker_config = "/etc/docker/daemon.json";
constexpr const char* runtime_config = "/etc/nvidia-container-runtime/config.toml";

bool docker_installed(const Evidence& e) {
  return e.text(docker_config).value.has_value() || e.node("/usr/bin/dockerd").value.has_value() ||
         e.node("/run/docker.sock").value.has_value();
}

Judgement user_namespaces(const Evidence& e) {
  const std::string most = "/proc/sys/user/max_user_namespaces";
  if (const auto& text = e.text(most); text && trim(*text) == "0") {
    return fail(
        "the kernel forbids user namespaces", {quote(e, most)},
        {"echo 'user.max_user_namespaces = 65536' | " + sudo(e, "tee /etc/sysctl.d/90-bulkhead-userns.conf"),
         sudo(e, "sysctl --system")});
  }
  if (!docker_installed(e))
    return ok("no rootful Docker here; user namespaces are allowed", {quote(e, most)});
  const auto& config = e.text(docker_config);
  if (config) {
    const auto json = parse_json(*config);
    if (!json.ok())
      return warn("Docker's configuration is no JSON", {{docker_config, json.error().message()}},
                  {fmt::format("python3 -m json.tool {}", docker_config)});
    if (json->is_object() && json->contains("userns-remap") && (*json)["userns-remap"].is_string() &&
        !(*json)["userns-remap"].get_ref<const std::string&>().empty()) {
      return ok("Docker maps container root to an ordinary user",
                {{docker_config, "userns-remap: " + (*json)["userns-remap"].get<std::string>()}});
    }
  }
  return warn(
      "root inside a Docker container is root of this host",
      {{docker_config, config ? "no \"userns-remap\"" : quote(e, docker_config).words}},
      {fmt::format("# add to {}:  \"userns-remap\": \"default\"   (images are fetched anew)", docker_config),
       sudo(e, "systemctl restart docker")});
}

Judgement container_devices(const Evidence& e) {
  const auto& text = e.text(runtime_config);
  if (!text) return ok("no NVIDIA container runtime is configured", {quote(e, runtime_config)});
  const auto setting = [&](std::string_view key) { return value_of(*text, key, '=').value_or(""); };
  if (setting("no-cgroups") == "true" && e.caller.uid == 0) {
    return fail("containers get every GPU: the runtime leaves device cgroups alone",
                {{runtime_config, "no-cgroups = true"}},
                {sudo(e, "nvidia-ctk config --in-place --set nvidia-container-cli.no-cgroups=false")});
  }
  if (setting("no-cgroups") == "true") {
    return warn("the runtime leaves device cgroups alone: right for rootless engines only",
                {{runtime_config, "no-cgroups = true"}},
                {sudo(e, "nvidia-ctk config --in-place --set nvidia-container-cli.no-cgroups=false")});
  }
  // The shipped default is true, written as a comment.
  if (setting("accept-nvidia-visible-devices-envvar-when-unprivileged") != "false") {
    return warn(
        "any container may pick any GPU by an environment variable",
        {{runtime_config, "accept-nvidia-visible-devices-envvar-when-unprivileged is not false"}},
        {sudo(e,
              "nvidia-ctk config --in-place --set "
              "accept-nvidia-visible-devices-envvar-when-unprivileged=false"),
         sudo(e, "nvidia-ctk config --in-place --set accept-nvidia-visible-devices-as-volume-mounts=true")});
  }
  return ok("containers get the GPUs they are given and no others",
            {{runtime_config, "accept-nvidia-visible-devices-envvar-when-unprivileged = false"}});
}

}  // namespace

std::vector<Check> access_rows() {
  const std::vector<Look> logs{{How::tail, "/var/log/audit/audit.log"}};
  return {
      {.id = "access.nvidia",
       .title = "The caller may open the GPUs",
       .requirements = {"R9"},
       .purposes = for_driver,
       .reads = {{How::node, "/dev/nvidia*"}, {How::text, "/etc/group"}},
       .why = "A missing node or a missing group looks like a missing GPU.",
       .judge = nvidia_nodes},
      {.id = "access.vfio",
       .title = "The caller may open VFIO nodes",
       .requirements = {"R9"},
       .purposes = for_passthrough,
       .reads = {{How::node, "/dev/vfio/*"}, {How::node, "/dev/vfio/devices/*"}, {How::text, "/etc/group"}},
       .why = "A virtual machine monitor run by this user could not start with the device.",
       .judge = vfio_access},
      {.id = "access.administrator",
       .title = "The caller may change the host",
       .requirements = {"R9"},
       .purposes = for_all,
       .reads = {{How::text, "/etc/group"}},
       .why = "Applying a node file needs root, through sudo or directly.",
       .judge = privilege},
      {.id = "vfio.module",
       .title = "vfio-pci is at hand",
       .requirements = {"R9", "R15"},
       .purposes = for_passthrough,
       .reads = {{How::names, "/sys/bus/pci/drivers/vfio-pci"},
                 {How::text, "/lib/modules/*/modules.dep"},
                 {How::text, "/lib/modules/*/modules.builtin"}},
       .why = "It is the driver that hands a device to a guest.",
       .judge = vfio_module},
      {.id = "vfio.node-modes",
       .title = "VFIO nodes are closed to others",
       .requirements = {"R31"},
       .purposes = for_passthrough,
       .reads = {{How::node, "/dev/vfio/*"}, {How::node, "/dev/vfio/devices/*"}},
       .why = "Who opens the node drives the device. The kernel makes nodes anew at each bind, so a chmod "
              "alone is forgotten.",
       .judge = vfio_modes},
      {.id = "vfio.log",
       .title = "No VFIO error in the kernel log",
       .requirements = {"R23"},
       .purposes = for_passthrough,
       .reads = {},
       .why = "VFIO tells only the kernel log why a device could not be handed out.",
       .judge = vfio_log},
      {.id = "apparmor.gpu",
       .title = "AppArmor lets virtual machines reach their devices",
       .requirements = {"R22"},
       .purposes = for_all,
       .reads = {{How::tail, "/var/log/audit/audit.log"},
                 {How::text, "/sys/module/apparmor/parameters/enabled"}},
       .why =
           "A denied open is \"Permission denied\" even for root, and only the audit log names the profile.",
       .judge = apparmor},
      {.id = "selinux.gpu",
       .title = "SELinux lets virtual machines reach their devices",
       .requirements = {"R22"},
       .purposes = for_all,
       .reads = {{How::tail, "/var/log/audit/audit.log"}, {How::text, "/sys/fs/selinux/enforce"}},
       .why = "A denied open is \"Permission denied\" even for root, and only the audit log names the rule.",
       .judge = selinux},
      {.id = "container.user-namespaces",
       .title = "Container root is not host root",
       .requirements = {"R32"},
       .purposes = for_driver,
       .reads = {{How::text, docker_config},
                 {How::text, "/proc/sys/user/max_user_namespaces"},
                 {How::node, "/usr/bin/dockerd"},
                 {How::node, "/run/docker.sock"}},
       .why = "User namespaces are a setting of the container engine, not of NVIDIA's runtime.",
       .judge = user_namespaces},
      {.id = "container.devices",
       .title = "Containers get only the GPUs they are given",
       .requirements = {"R32"},
       .purposes = for_driver,
       .reads = {{How::text, runtime_config}},
       .why = "A tenant that can choose its GPU by itself can choose its neighbour's.",
       .judge = container_devices},
  };
}

}  // namespace bulkhead::doctor
