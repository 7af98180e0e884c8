#include "core/plan/plan.hpp"

#include <algorithm>
#include <map>
#include <set>

#include <fmt/format.h>

#include "base/text.hpp"

namespace bulkhead::plan {

namespace {

using inventory::Gpu;
using inventory::GpuInstance;
using inventory::Holder;
using inventory::Host;

constexpr std::string_view header = "# Written by bulkhead from the node file; the next apply replaces it.\n";
constexpr std::string_view grub_path = "/etc/default/grub.d/bulkhead.cfg";
constexpr std::string_view grubby_path = "/etc/bulkhead/kernel-args";
constexpr std::string_view udev_path = "/etc/udev/rules.d/10-bulkhead-vfio.rules";

// How a distribution keeps kernel arguments and its initramfs.
enum class Family { debian, redhat, unknown };
Family family_of(const Host& host) {
  const std::string id = host.os_id ? lower(*host.os_id) : "";
  for (const auto name : {"debian", "ubuntu"}) {
    if (id == name) return Family::debian;
  }
  for (const auto name : {"rhel", "rocky", "fedora", "almalinux", "centos"}) {
    if (id == name) return Family::redhat;
  }
  return Family::unknown;
}

std::string modprobe_path(const spec::ModprobeFile& file) { return "/etc/modprobe.d/" + file.name; }

std::string who_is(const Holder& holder) {
  std::string text = fmt::format("pid {} ({})", holder.pid, printable(holder.name, 40));
  if (!holder.cgroup.empty()) text += fmt::format(", cgroup {}", printable(holder.cgroup, 120));
  return text;
}

std::string who_are(const std::vector<Holder>& holders) {
  std::vector<std::string> words;
  for (const auto& holder : holders) {
    if (words.size() == 4) {
      words.push_back(fmt::format("{} more", holders.size() - 4));
      break;
    }
    words.push_back(fmt::format("pid {} ({})", holder.pid, printable(holder.name, 40)));
  }
  return join(words, ", ");
}

std::vector<Holder> all_holders(const Gpu& gpu) {
  std::vector<Holder> all = gpu.holders;
  for (const auto& instance : gpu.instances) {
    for (auto& holder : instance.holders()) {
      const bool known = std::any_of(all.begin(), all.end(), [&](const Holder& h) {
        return h.pid == holder.pid && h.start_time == holder.start_time;
      });
      if (!known) all.push_back(std::move(holder));
    }
  }
  return all;
}

// '*' and '?', any case. Linear: a star remembers one place to come back to.
bool glob(std::string_view pattern, std::string_view text) {
  std::size_t p = 0, t = 0, star = std::string_view::npos, back = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      back = t;
    } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == text[t])) {
      ++p;
      ++t;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      t = ++back;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == std::string_view::npos;
}

template <class Items, class Match>
bool none_or(const Items& items, const Match& match) {
  return items.empty() || std::any_of(items.begin(), items.end(), match);
}

unsigned compute_slices_of(unsigned nvml_profile) {  // NVML_COMPUTE_INSTANCE_PROFILE_*, nvml.h
  static constexpr unsigned slices[] = {1, 2, 3, 4, 7, 8, 6, 1};
  return nvml_profile < std::size(slices) ? slices[nvml_profile] : 0;
}

// Compute instances in slices, largest first; empty: one that fills the GPU instance.
using Compute = std::vector<unsigned>;
Compute normal(Compute compute, const mig::Profile& profile) {
  std::sort(compute.begin(), compute.end(), std::greater<>());
  if (compute.size() == 1 && compute[0] == profile.compute_slices) compute.clear();
  return compute;
}

class Maker {
 public:
  Maker(const spec::NodeFile& node, const Host& host, const Remembered& remembered, const Options& options)
      : node_(node), host_(host), remembered_(remembered), options_(options) {}

  std::variant<Plan, Refusal> make() {
    const auto rules = match();
    host_steps();
    for (const auto& gpu : host_.gpus) {
      if (const auto at = rules.find(gpu.index); at != rules.end()) gpu_steps(gpu, *at->second);
    }
    if (!without_nvlink_.empty()) {
      note(fmt::format("gpu {}: under MIG {} no NVLink and no peer-to-peer", format_ranges(without_nvlink_),
                       without_nvlink_.size() == 1 ? "it has" : "they have"));
    }
    devices(rules);
    if (!refusal_.reasons.empty()) return std::move(refusal_);
    return std::move(plan_);
  }

 private:
  void refuse(std::string subject, std::string why, std::string way_out, std::vector<Holder> holders = {}) {
    refusal_.reasons.push_back({std::move(subject), std::move(why), std::move(holders), std::move(way_out)});
  }
  static std::string subject_of(const Gpu& gpu) {
    return fmt::format("gpu {} ({})", gpu.index, printable(gpu.uuid.text, 64));
  }
  Step& step(Action action, std::string why) {
    plan_.steps.push_back({std::move(action), std::move(why), {}, false, {}});
    return plan_.steps.back();
  }
  void note(std::string text) { plan_.notes.push_back(std::move(text)); }

  // ---- which rule is for which GPU
  std::map<unsigned, const spec::GpuRule*> match() {
    std::map<unsigned, const spec::GpuRule*> rules;
    std::vector<unsigned> unselected;
    std::set<Uuid> seen;
    const auto in = pools(node_, host_);
    for (std::size_t i = 0; i < in.size(); ++i) {
      const Gpu& gpu = host_.gpus[i];
      // Steps name GPUs by UUID: two of one name cannot be told apart.
      if (!seen.insert(gpu.uuid).second) {
        refuse(subject_of(gpu), "the driver gives two GPUs this UUID",
               "reload the driver, then look: bulkhead inventory");
      }
      if (in[i].rules.size() > 1) {
        refuse(subject_of(gpu), in[i].why, "change one select so that each GPU has one rule");
      } else if (in[i].rules.empty()) {
        unselected.push_back(gpu.index);
      } else {
        rules.emplace(gpu.index, &node_.gpus[in[i].rules.front()]);
      }
    }
    if (!unselected.empty()) {
      note(fmt::format("gpu {}: no rule selects {}; left as {}", format_ranges(unselected),
                       unselected.size() == 1 ? "it" : "them",
                       unselected.size() == 1 ? "it is" : "they are"));
    }
    for (const auto& rule : node_.gpus) missing(rule);
    for (const auto& lost : host_.lost) {
      note(fmt::format("GPU at {} is on the PCI bus but not in NVML ({}); left as it is",
                       lost.pci.address.str(), printable(lost.why, 200)));
    }
    return rules;
  }

  // ---- devices for virtual machines
  void devices(const std::map<unsigned, const spec::GpuRule*>& rules) {
    passthrough::Wishes wishes{.permission = {},
                               .proved = remembered_.proved,
                               .originals = remembered_.originals,
                               .evict = options_.evict,
                               .rescan = options_.rescan};
    std::set<PciAddress> of_gpus;
    for (const auto& gpu : host_.gpus) {
      const auto at = rules.find(gpu.index);
      if (at == rules.end() || at->second->mode != spec::Mode::passthrough) continue;
      of_gpus.insert(gpu.pci.address);
      wishes.devices.push_back(
          {gpu.pci.address, passthrough::Purpose::virtual_machine, {}, fmt::format("gpu {}", gpu.index)});
    }
    for (const auto& lost : host_.lost) {
      const bool wanted = std::any_of(node_.gpus.begin(), node_.gpus.end(), [&](const spec::GpuRule& rule) {
        return rule.mode == spec::Mode::passthrough && selects_lost(rule.select, lost.pci);
      });
      if (wanted && of_gpus.insert(lost.pci.address).second)
        wishes.devices.push_back({lost.pci.address, passthrough::Purpose::virtual_machine, {}, "GPU"});
    }
    for (const auto& rule : node_.devices) {
      for (const auto& address : rule.pci) {
        if (of_gpus.contains(address)) {
          refuse(address.str(), "is under gpus with mode: passthrough, and under devices",
                 "keep one of the two");
          continue;
        }
        const auto purpose = rule.purpose == spec::DevicePurpose::passthrough
                                 ? passthrough::Purpose::virtual_machine
                             : rule.purpose == spec::DevicePurpose::host ? passthrough::Purpose::host
                                                                         : passthrough::Purpose::leave;
        wishes.devices.push_back({address, purpose, rule.vfs, {}});
      }
    }
    if (wishes.devices.empty()) return;
    if (!remembered_.tree) {
      std::vector<std::string> names;
      for (const auto& wanted : wishes.devices)
        names.push_back(wanted.label.empty() || wanted.label == "GPU" ? wanted.address.str() : wanted.label);
      note(fmt::format(
          "{}: for passthrough; drivers are changed only where bulkhead looks at this machine itself, "
          "not at a tree below another root",
          join(names, ", ")));
      return;
    }
    if (node_.host.vfio)
      wishes.permission = passthrough::Permission{node_.host.vfio->owner, node_.host.vfio->mode};
    passthrough::Tree tree = *remembered_.tree;
    for (const auto& gpu : host_.gpus) {  // what the driver says of its processes, beside the open files
      if (!of_gpus.contains(gpu.pci.address)) continue;
      for (auto& function : tree.functions) {
        if (function.address != gpu.pci.address) continue;
        for (auto& holder : all_holders(gpu)) {
          const bool known = std::any_of(function.holders.begin(), function.holders.end(),
                                         [&](const Holder& h) { return h.pid == holder.pid; });
          if (!known) function.holders.push_back(std::move(holder));
        }
      }
    }
    auto answer = passthrough::order(tree, wishes);
    if (auto* obstacles = std::get_if<std::vector<passthrough::Obstacle>>(&answer)) {
      for (auto& one : *obstacles)
        refuse(std::move(one.subject), std::move(one.why), std::move(one.way_out), std::move(one.holders));
      return;
    }
    auto& order = std::get<passthrough::Order>(answer);
    for (auto& text : order.notes) note(std::move(text));
    // The driver of the host lets go of a GPU only when nothing holds it: persistence mode does.
    for (const auto& gpu : host_.gpus) {
      if (of_gpus.contains(gpu.pci.address) && gpu.persistence && *gpu.persistence)
        step(SetPersistence{gpu.uuid, true, false},
             "with persistence mode on its driver would not let it go");
    }
    // Written after what it repeats at each boot, and removed before: whenever the power goes, the next boot
    // finds what the journal can take back or finish.
    auto rule = udev_rule(wishes, tree);
    const auto write_rule = [&] {
      const bool gone = !rule->after;
      step(std::move(*rule), gone ? "nothing is given away any more"
                                  : "bindings and permissions would be gone at the next boot");
      rule.reset();
    };
    if (rule && !adds_lines(*rule)) write_rule();
    for (auto& one : order.deeds) {
      Action action = std::visit([](auto& deed) -> Action { return std::move(deed); }, one.deed);
      auto& made = step(std::move(action), std::move(one.why));
      add_losses(made, one.evicts, "its device");
    }
    if (rule) write_rule();
  }

  static bool adds_lines(const SetFile& file) {
    const auto lines = [](const std::optional<std::string>& text) {
      return split_lines(text ? std::string_view(*text) : std::string_view());
    };
    const auto before = lines(file.before);
    const auto after = lines(file.after);
    return std::any_of(after.begin(), after.end(), [&](std::string_view line) {
      return std::find(before.begin(), before.end(), line) == before.end();
    });
  }

  // Which device files are whose, and which functions VFIO gets before a driver of the host can, at each
  // boot. Lines of devices that the node file does not name stay.
  std::optional<SetFile> udev_rule(const passthrough::Wishes& wishes, const passthrough::Tree& tree) {
    const auto before = content_of(std::string(udev_path));
    if (before && !before->starts_with(header)) {
      refuse("host", fmt::format("{} exists and was not written by bulkhead", udev_path),
             "give the file another name");
      return std::nullopt;
    }
    const bool permits = wishes.permission && *wishes.permission != passthrough::Permission{};
    std::vector<std::string> permission_lines, device_lines, wanted_lines;
    std::vector<PciAddress> named;
    for (const auto& wanted : wishes.devices) {
      const auto* function = tree.find(wanted.address);
      if (function == nullptr || wanted.vfs.value_or(0) > 0) continue;
      const auto members = function->group ? tree.members(*function->group) : std::vector{function};
      for (const auto* member : members) {
        const auto& a = member->address;
        const auto& b = wanted.address;
        if (member->is_bridge() || a.domain != b.domain || a.bus != b.bus || a.device != b.device) continue;
        named.push_back(a);
        if (wanted.purpose == passthrough::Purpose::virtual_machine) wanted_lines.push_back(boot_line(a));
      }
    }
    for (const auto line : split_lines(before ? std::string_view(*before) : std::string_view())) {
      if (line.starts_with('#') || line.empty()) continue;
      const bool of_device = line.starts_with("ACTION==");
      const bool replaced =
          std::any_of(named.begin(), named.end(), [&](const PciAddress& a) { return line == boot_line(a); });
      if (of_device && !replaced) device_lines.emplace_back(line);
      if (!of_device && !wishes.permission) permission_lines.emplace_back(line);
    }
    if (permits) {
      for (const auto* subsystem : {"vfio", "vfio-dev"}) {
        permission_lines.push_back(
            fmt::format("SUBSYSTEM==\"{}\", KERNEL!=\"vfio\", OWNER=\"{}\", MODE=\"{:04o}\"", subsystem,
                        wishes.permission->owner, wishes.permission->mode));
      }
    }
    device_lines.insert(device_lines.end(), wanted_lines.begin(), wanted_lines.end());
    std::sort(device_lines.begin(), device_lines.end());
    device_lines.erase(std::unique(device_lines.begin(), device_lines.end()), device_lines.end());
    // Who may open what is nobody's any more is no rule.
    const bool still_given =
        !device_lines.empty() ||
        std::any_of(tree.functions.begin(), tree.functions.end(), [&](const auto& f) {
          const auto stays = [&](const PciAddress& a) {
            return std::find(named.begin(), named.end(), a) == named.end();
          };
          return f.with_vfio() && stays(f.address) && (!f.physical || stays(*f.physical));
        });
    if (!permits && !still_given) permission_lines.clear();
    std::string text(header);
    for (const auto* lines : {&permission_lines, &device_lines}) {
      for (const auto& line : *lines) text += line + "\n";
    }
    const bool any = !permission_lines.empty() || !device_lines.empty();
    const auto after = any ? std::optional(text) : std::nullopt;
    if (before == after) return std::nullopt;
    return SetFile{std::string(udev_path), before, after, {}, {}};
  }
  static std::string boot_line(const PciAddress& address) {
    return fmt::format(
        "ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"{}\", ATTR{{driver_override}}=\"{}\", "
        "RUN{{builtin}}+=\"kmod load vfio-pci\"",
        address.str(), passthrough::vfio_driver);
  }

  static bool selects_lost(const spec::Select& select, const inventory::PciDevice& pci) {
    if (!select.index.empty() || !select.uuid.empty() || !select.model.empty()) return false;
    if (select.pci.empty() && select.pci_id.empty()) return false;
    return none_or(select.pci, [&](const PciAddress& a) { return a == pci.address; }) &&
           none_or(select.pci_id,
                   [&](const spec::PciId& id) { return id.vendor == pci.vendor && id.device == pci.device; });
  }

  std::size_t absent_uuids(const spec::GpuRule& rule) const {
    return static_cast<std::size_t>(
        std::count_if(rule.select.uuid.begin(), rule.select.uuid.end(), [&](const Uuid& uuid) {
          return std::none_of(host_.gpus.begin(), host_.gpus.end(),
                              [&](const Gpu& g) { return g.uuid == uuid; });
        }));
  }

  // GPUs that a rule names and the host does not show.
  void missing(const spec::GpuRule& rule) {
    const std::size_t before = refusal_.reasons.size();
    const std::string subject = fmt::format("rule in line {}", rule.line);
    std::vector<unsigned> indices;
    for (const auto& gpu : host_.gpus) indices.push_back(gpu.index);
    const std::string lost = host_.lost.empty()
                                 ? ""
                                 : fmt::format("; {} more on the PCI bus {} lost to NVML: bulkhead doctor",
                                               host_.lost.size(), host_.lost.size() == 1 ? "is" : "are");
    const bool blind = host_.gpus.empty() && host_.lost.empty() && !host_.driver_version;
    std::vector<unsigned> absent;
    for (const auto index : rule.select.index) {
      if (std::find(indices.begin(), indices.end(), index) == indices.end()) absent.push_back(index);
    }
    // A GPU that was given away has no index and no UUID any more.
    const auto given_away = static_cast<std::size_t>(
        rule.mode != spec::Mode::passthrough
            ? 0
            : std::count_if(host_.lost.begin(), host_.lost.end(), [](const inventory::LostGpu& gone) {
                return gone.pci.driver && gone.pci.driver->starts_with("vfio");
              }));
    const std::size_t named_by_driver = absent.size() + absent_uuids(rule);
    if (named_by_driver > 0 && named_by_driver <= given_away) {
      note(fmt::format(
          "{} names GPUs by index or UUID, which those with vfio-pci no longer have; pci: names them "
          "for good",
          subject));
      return;
    }
    if (!absent.empty()) {
      refuse(subject,
             fmt::format("names gpu {}, and the host shows {}{}{}", format_ranges(absent),
                         indices.empty() ? "none" : format_ranges(indices), lost,
                         blind ? fmt::format(": {}", printable(host_.driver_version.why, 200)) : ""),
             blind ? "bulkhead doctor --for mig says what the driver lacks"
                   : "bulkhead inventory lists the GPUs");
    }
    for (const auto& uuid : rule.select.uuid) {
      if (std::none_of(host_.gpus.begin(), host_.gpus.end(), [&](const Gpu& g) { return g.uuid == uuid; })) {
        refuse(subject,
               fmt::format("names {}, which the host does not show{}", printable(uuid.text, 96), lost),
               "bulkhead inventory lists the GPUs");
      }
    }
    bool found = false;
    for (const auto& address : rule.select.pci) {
      if (std::any_of(host_.gpus.begin(), host_.gpus.end(),
                      [&](const Gpu& g) { return g.pci.address == address; }))
        continue;
      const auto at = std::find_if(host_.lost.begin(), host_.lost.end(),
                                   [&](const inventory::LostGpu& l) { return l.pci.address == address; });
      if (at != host_.lost.end() && rule.mode == spec::Mode::passthrough && at->pci.driver &&
          at->pci.driver->starts_with("vfio")) {
        note(fmt::format("GPU at {} is with {} already", address.str(), printable(*at->pci.driver, 40)));
        found = true;
      } else if (at != host_.lost.end() && rule.mode == spec::Mode::passthrough) {
        found = true;  // nothing of it is asked of the host's driver
      } else if (at != host_.lost.end()) {
        refuse(subject,
               fmt::format("names {}, which is on the PCI bus but not in NVML: {}", address.str(),
                           printable(at->why, 200)),
               "bulkhead doctor says how to bring it back");
      } else {
        refuse(subject, fmt::format("names {}, where the host has no GPU", address.str()),
               "bulkhead inventory lists the GPUs");
      }
    }
    const bool matches = std::any_of(host_.gpus.begin(), host_.gpus.end(),
                                     [&](const Gpu& g) { return selects(rule.select, g); });
    if (matches || found || refusal_.reasons.size() != before) return;
    const bool named = !rule.select.index.empty() || !rule.select.uuid.empty() || !rule.select.pci.empty();
    if (named) {
      refuse(subject, "selects no GPU: those it names do not match its other keys",
             "bulkhead inventory lists the GPUs");
    } else {
      note(fmt::format("{} selects no GPU of this host", subject));  // a file for several kinds of machine
    }
  }

  // ---- the host
  std::optional<std::string> content_of(const std::string& path) const {
    for (const auto& file : remembered_.files) {
      if (file.path == path) return file.content;
    }
    return std::nullopt;
  }

  void host_steps() {
    kernel_args();
    for (const auto& file : node_.host.modprobe) modprobe(file);
    governor();
    if (const auto& manager = node_.host.fabric_manager) {
      unit({manager->unit, true, true}, manager->port,
           "the NVSwitch fabric needs its manager before CUDA can start");
    }
    for (const auto& wanted : node_.host.units) unit(wanted, std::nullopt, "the node file wants it so");
  }

  void kernel_args() {
    const auto& wanted = node_.host.kernel_args;
    if (wanted.empty()) return;
    std::set<std::string_view> running;
    if (host_.kernel_cmdline) {
      for (const auto word : split(*host_.kernel_cmdline, ' ')) running.insert(trim(word));
    }
    std::vector<std::string> absent;
    for (const auto& arg : wanted) {
      if (!running.contains(arg)) absent.push_back(arg);
    }
    const Family family = family_of(host_);
    if (family == Family::unknown) {
      if (absent.empty()) return;
      refuse("host",
             fmt::format("kernel arguments {} are wanted, and how {} keeps them is not known here",
                         join(absent, " "), host_.os ? printable(*host_.os, 80) : "this distribution"),
             "set them by hand, then apply again: what the running kernel has needs no step");
      return;
    }
    const std::string path(family == Family::debian ? grub_path : grubby_path);
    const auto before = content_of(path);
    const auto ours = before ? args_in(*before, family) : std::vector<std::string>{};
    // An argument that somebody else sets already is not set twice; one of ours stays ours after the reboot.
    std::vector<std::string> args;
    for (const auto& arg : wanted) {
      if (!running.contains(arg) || std::find(ours.begin(), ours.end(), arg) != ours.end())
        args.push_back(arg);
    }
    const auto after = args.empty() ? std::nullopt : std::optional(text_of(args, family));
    if (before == after) {
      if (!absent.empty())
        note(fmt::format("host: a reboot is owed: the running kernel lacks {}", join(absent, " ")));
      return;
    }
    SetFile file{path, before, after, {}, {}};
    if (family == Family::debian) {
      file.then = file.then_undo = {"update-grub"};
    } else {
      file.then = grubby(args, ours);
      file.then_undo = grubby(ours, args);
    }
    auto& made =
        step(std::move(file), absent.empty() ? std::string("the file no longer says what the node file wants")
                                             : fmt::format("the running kernel lacks {}", join(absent, " ")));
    made.reboot_owed = !absent.empty();
  }

  static std::vector<std::string> grubby(const std::vector<std::string>& add,
                                         const std::vector<std::string>& had) {
    std::vector<std::string> gone;
    for (const auto& arg : had) {
      if (std::find(add.begin(), add.end(), arg) == add.end()) gone.push_back(arg);
    }
    std::vector<std::string> command = {"grubby", "--update-kernel=ALL"};
    if (!add.empty()) command.push_back("--args=" + join(add, " "));
    if (!gone.empty()) command.push_back("--remove-args=" + join(gone, " "));
    return command;
  }
  static std::string text_of(const std::vector<std::string>& args, Family family) {
    if (family == Family::debian) {
      return fmt::format("{}GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT {}\"\n", header,
                         join(args, " "));
    }
    return fmt::format("{}{}\n", header, join(args, "\n"));
  }
  static std::vector<std::string> args_in(std::string_view text, Family family) {
    std::vector<std::string> args;
    for (auto line : split_lines(text)) {
      line = trim(line);
      if (family == Family::debian) {
        constexpr std::string_view lead = "GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT ";
        if (!line.starts_with(lead) || !line.ends_with('"')) continue;
        for (const auto word : split(line.substr(lead.size(), line.size() - lead.size() - 1), ' '))
          args.emplace_back(word);
      } else if (!line.empty() && !line.starts_with('#')) {
        args.emplace_back(line);
      }
    }
    return args;
  }

  void modprobe(const spec::ModprobeFile& wanted) {
    const std::string path = modprobe_path(wanted);
    const auto before = content_of(path);
    const std::string after = fmt::format("{}{}\n", header, join(wanted.lines, "\n"));
    if (before == after) return;
    if (before && !before->starts_with(header) && !options_.adopt) {
      refuse("host", fmt::format("{} exists and was not written by bulkhead", path),
             "give the file another name, or let bulkhead have it with --adopt");
      return;
    }
    SetFile file{path, before, after, {}, {}};
    const Family family = family_of(host_);
    if (family == Family::debian) file.then = file.then_undo = {"update-initramfs", "-u"};
    if (family == Family::redhat) file.then = file.then_undo = {"dracut", "-f"};
    step(std::move(file), before ? "its lines differ from the node file's" : "the file is absent")
        .reboot_owed = true;
  }

  void governor() {
    const auto& wanted = node_.host.cpu_governor;
    if (!wanted) return;
    if (!host_.cpu_governor) {
      refuse("host",
             fmt::format("the cpu governor cannot be set to {}: {}", *wanted,
                         printable(host_.cpu_governor.why, 200)),
             "remove cpu_governor from the node file; in a virtual machine the host decides");
      return;
    }
    if (*host_.cpu_governor == *wanted) return;
    step(SetGovernor{*host_.cpu_governor, *wanted},
         fmt::format("it is {}", printable(*host_.cpu_governor, 40)));
    if (*host_.cpu_governor == "mixed")
      note("host: the cpu governors differ from CPU to CPU; an undo cannot bring back the mixture");
  }

  void unit(const spec::Unit& wanted, std::optional<unsigned> port, std::string_view reason) {
    const auto at = std::find_if(host_.units.begin(), host_.units.end(),
                                 [&](const inventory::SystemdUnit& u) { return u.name == wanted.name; });
    const std::string subject = fmt::format("unit {}", printable(wanted.name, 120));
    if (at == host_.units.end()) {
      refuse(subject, "its state could not be read", "bulkhead doctor says whether systemd answers");
      return;
    }
    if (at->load_state == "not-found") {
      if (!wanted.enabled && !wanted.active) return;
      refuse(subject, "is not installed", "install its package, or remove it from the node file");
      return;
    }
    if (at->load_state == "masked" && (wanted.enabled || wanted.active)) {
      refuse(subject, "is masked", fmt::format("systemctl unmask {}", wanted.name));
      return;
    }
    const auto& file = at->file_state;
    // A static or generated unit has nothing to enable: it runs when something wants it.
    const bool fixed = file == "static" || file == "generated" || file == "alias" || file == "indirect" ||
                       file == "transient";
    const bool enabled = fixed ? wanted.enabled : file.starts_with("enabled");
    const bool active =
        at->active_state == "active" || at->active_state == "reloading" || at->active_state == "activating";
    if (enabled == wanted.enabled && active == wanted.active) return;
    step(SetUnit{wanted.name, enabled, wanted.enabled, active, wanted.active,
                 wanted.active ? port : std::nullopt},
         fmt::format("it is {} and {}: {}", printable(at->active_state, 40),
                     enabled ? "enabled" : "not enabled", reason));
  }

  // ---- one GPU
  void gpu_steps(const Gpu& gpu, const spec::GpuRule& rule) {
    if (rule.persistence) persistence(gpu, *rule.persistence);
    mig(gpu, rule);
    if (rule.power_limit) power(gpu, *rule.power_limit);
    clocks(gpu, rule.clocks);
  }

  void persistence(const Gpu& gpu, bool wanted) {
    if (!gpu.persistence) {
      refuse(subject_of(gpu),
             fmt::format("persistence mode cannot be read: {}", printable(gpu.persistence.why, 200)),
             "bulkhead doctor");
    } else if (*gpu.persistence != wanted) {
      step(SetPersistence{gpu.uuid, *gpu.persistence, wanted},
           wanted ? "without it the driver unloads the GPU's state when the last client leaves"
                  : "the node file wants it off");
    }
  }

  void power(const Gpu& gpu, Milliwatts wanted) {
    const auto& p = gpu.power;
    const auto shown = [](Milliwatts m) { return fmt::format("{} W", static_cast<double>(m.count) / 1000); };
    if (!p.limit) {
      refuse(subject_of(gpu), fmt::format("the power limit cannot be read: {}", printable(p.limit.why, 200)),
             "remove power_limit_w for this GPU");
      return;
    }
    if ((p.limit_min && wanted < *p.limit_min) || (p.limit_max && wanted > *p.limit_max)) {
      refuse(subject_of(gpu),
             fmt::format("power limit {} is outside what the board allows: {} to {}", shown(wanted),
                         p.limit_min ? shown(*p.limit_min) : "?", p.limit_max ? shown(*p.limit_max) : "?"),
             "choose a limit in that range");
      return;
    }
    if (*p.limit != wanted)
      step(SetPowerLimit{gpu.uuid, *p.limit, wanted}, fmt::format("the limit is {}", shown(*p.limit)));
  }

  void clocks(const Gpu& gpu, const std::optional<spec::ClockLock>& wanted) {
    std::optional<spec::ClockLock> before;
    for (const auto& lock : remembered_.clock_locks) {
      if (lock.gpu == gpu.uuid) before = lock.range;
    }
    if (wanted && gpu.clocks_max && gpu.clocks_max->graphics.count > 0 &&
        wanted->high > gpu.clocks_max->graphics) {
      refuse(subject_of(gpu),
             fmt::format("clock lock up to {} MHz is above the GPU's {} MHz", wanted->high.count,
                         gpu.clocks_max->graphics.count),
             "choose clocks the GPU has: nvidia-smi -q -d SUPPORTED_CLOCKS");
      return;
    }
    if (before == wanted) return;
    step(LockClocks{gpu.uuid, before, wanted},
         wanted ? (before ? "bulkhead locked another range"
                          : "no lock of ours is on record, and NVML cannot read one")
                : "bulkhead locked them, and the node file no longer does");
  }

  bool ours(const GpuInstance& instance) const { return instance.ours || options_.adopt; }

  static std::string name_of(const Gpu& gpu, const GpuInstance& instance) {
    if (!instance.name.empty()) return printable(instance.name, 40);
    const auto* profile = gpu.geometry.by_id(instance.profile);
    return profile != nullptr ? profile->name : fmt::format("profile {}", instance.profile);
  }

  void add_losses(Step& to, const std::vector<Holder>& holders, const std::string& what) {
    for (const auto& holder : holders) {
      to.losses.push_back({who_is(holder), what});
      to.evicts.push_back(holder);
    }
  }

  void destroy(const Gpu& gpu, const GpuInstance& instance, std::string why) {
    DestroyInstance action{gpu.uuid,         instance.id,    name_of(gpu, instance),
                           instance.profile, instance.place, {}};
    for (const auto& compute : instance.compute) action.compute_profiles.push_back(compute.profile);
    const std::string what = fmt::format("its MIG device {} (gi {})", action.profile, instance.id);
    add_losses(step(std::move(action), std::move(why)), instance.holders(), what);
  }

  void mig(const Gpu& gpu, const spec::GpuRule& rule) {
    const bool wanted = rule.mode == spec::Mode::mig;
    if (!gpu.mig_capable) {
      if (wanted) no_mig(gpu);
      return;
    }
    // Instances that cannot be listed are not none.
    if (!gpu.mig_why.empty()) {
      refuse(subject_of(gpu), fmt::format("its MIG state cannot be read: {}", printable(gpu.mig_why, 200)),
             "bulkhead doctor --for mig");
      return;
    }
    const std::size_t refused = refusal_.reasons.size();
    std::vector<mig::Wanted> layout;
    std::map<Compute, unsigned> variants = {{{}, 0U}};
    if (wanted && !resolve(gpu, rule, layout, variants)) return;

    if (gpu.mig_now != wanted || gpu.mig_pending != wanted) {
      if (!change_mode(gpu, wanted)) return;
    }
    if (!wanted || refusal_.reasons.size() != refused) return;
    if (rule.dynamic) {
      of_leases(gpu);
    } else {
      lay_out(gpu, rule, layout, variants);
    }
  }

  // Only leases make and destroy instances there.
  void of_leases(const Gpu& gpu) {
    std::vector<std::string> there;
    for (const auto& instance : gpu.instances) {
      there.push_back(fmt::format("{} at {}{}", name_of(gpu, instance), instance.place.start,
                                  ours(instance) ? "" : " (not made by bulkhead)"));
    }
    note(fmt::format("gpu {}: its layout is dynamic: instances belong to leases; {}", gpu.index,
                     there.empty() ? "it has none now" : "left as they are: " + join(there, ", ")));
  }

  void no_mig(const Gpu& gpu) {
    std::string has = "mode: share (software slices) and mode: exclusive";
    if (gpu.pci.vfs_total && *gpu.pci.vfs_total > 0)
      has += fmt::format(", and SR-IOV with {} virtual functions", *gpu.pci.vfs_total);
    refuse(subject_of(gpu),
           fmt::format("{} has no MIG{}; what it has: {}", printable(gpu.model, 80),
                       gpu.mig_why.empty() ? "" : fmt::format(" ({})", printable(gpu.mig_why, 120)), has),
           "write mode: share or mode: exclusive for it");
  }

  // Names to profiles of this GPU. False when something was refused.
  bool resolve(const Gpu& gpu, const spec::GpuRule& rule, std::vector<mig::Wanted>& layout,
               std::map<Compute, unsigned>& variants) {
    bool good = true;
    std::set<std::string> told;
    for (const auto& slice : rule.layout) {
      const auto* profile = gpu.geometry.by_name(slice.profile);
      if (profile == nullptr) {
        good = false;
        if (!told.insert(slice.profile).second) continue;
        std::vector<std::string> names;
        for (const auto name : gpu.geometry.names()) names.emplace_back(name);
        const auto nearest = closest(slice.profile, gpu.geometry.names());
        refuse(subject_of(gpu),
               fmt::format("has no MIG profile {} (line {}); it has {}", printable(slice.profile, 40),
                           slice.line, names.empty() ? "none that could be read" : join(names, ", ")),
               nearest.empty() ? "choose one of those" : fmt::format("did you mean {}?", nearest));
        continue;
      }
      Compute compute;
      unsigned sum = 0;
      for (const auto& word : slice.compute) {
        compute.push_back(static_cast<unsigned>(
            parse_u64(std::string_view(word).substr(0, word.find('c'))).value_or(0) & 0xffU));
        sum += compute.back();
      }
      if (sum > profile->compute_slices) {
        good = false;
        refuse(subject_of(gpu),
               fmt::format("{} (line {}) has {} compute slices, its compute instances need {}", profile->name,
                           slice.line, profile->compute_slices, sum),
               "write fewer or smaller compute instances");
        continue;
      }
      const auto next = static_cast<unsigned>(variants.size());
      layout.push_back({profile->id, slice.at,
                        variants.emplace(normal(std::move(compute), *profile), next).first->second});
    }
    return good;
  }

  // Plans the change of mode with what must go before it. False when nothing more can be planned for this
  // GPU.
  bool change_mode(const Gpu& gpu, bool wanted) {
    const bool ampere = gpu.compute_capability && gpu.compute_capability->starts_with("8.");
    const bool in_vm = gpu.virtualization && lower(*gpu.virtualization).starts_with("pass");
    if (gpu.mig_pending == wanted && ampere && in_vm) {
      note(fmt::format("gpu {}: MIG mode {} is pending until this virtual machine reboots; then apply again",
                       gpu.index, wanted ? "on" : "off"));
      return false;
    }
    const std::size_t refused = refusal_.reasons.size();
    std::vector<std::string> foreign;
    for (const auto& instance : gpu.instances) {
      if (!ours(instance)) foreign.push_back(fmt::format("{} (gi {})", name_of(gpu, instance), instance.id));
    }
    if (!foreign.empty() && gpu.mig_now && !wanted) {
      refuse(subject_of(gpu),
             fmt::format("MIG mode cannot go off: bulkhead did not make {}", join(foreign, ", ")),
             "remove them, or let bulkhead have them with --adopt");
    }
    const auto holders = all_holders(gpu);
    if (!holders.empty() && gpu.mig_now != wanted && !options_.evict) {
      refuse(subject_of(gpu),
             fmt::format("MIG mode can change only on an idle GPU, and {} hold{} it", who_are(holders),
                         holders.size() == 1 ? "s" : ""),
             "stop them, or take the GPU from them with --evict", holders);
    }
    if (refusal_.reasons.size() != refused) return false;
    if (!wanted) {
      for (const auto& instance : gpu.instances) destroy(gpu, instance, "MIG mode goes off");
    }
    std::string why = fmt::format("MIG mode is {}", gpu.mig_now ? "on" : "off");
    if (gpu.mig_now == wanted) why += fmt::format(", but {} is pending", wanted ? "off" : "on");
    if (ampere) why += "; the driver resets the GPU for it";
    // The mode in force is what an undo returns to. A change that was only pending is not brought back: in
    // force it would take the instances with it.
    auto& made = step(SetMigMode{gpu.uuid, gpu.mig_now, wanted}, std::move(why));
    if (gpu.mig_now != wanted) add_losses(made, gpu.holders, fmt::format("gpu {}", gpu.index));
    if (ampere && in_vm) {
      made.reboot_owed = true;
      note(fmt::format("gpu {}: in a virtual machine the mode changes at its next reboot; then apply again",
                       gpu.index));
      return false;
    }
    if (wanted && gpu.nvlink.links > 0) without_nvlink_.push_back(gpu.index);
    return true;
  }

  void lay_out(const Gpu& gpu, const spec::GpuRule& rule, const std::vector<mig::Wanted>& layout,
               const std::map<Compute, unsigned>& variants) {
    std::vector<mig::Present> present;
    std::size_t kept_foreign = 0;
    if (gpu.mig_now) {
      for (const auto& instance : gpu.instances) {
        mig::Present p{instance.id,    instance.profile,
                       instance.place, ours(instance) && (!instance.busy() || options_.evict),
                       ours(instance), 0};
        const auto* profile = gpu.geometry.by_id(instance.profile);
        if (profile != nullptr && !instance.compute.empty()) {
          Compute compute;
          for (const auto& c : instance.compute) compute.push_back(compute_slices_of(c.profile));
          const auto at = variants.find(normal(std::move(compute), *profile));
          p.variant = at != variants.end() ? at->second : ~0U;
        }
        present.push_back(p);
        if (!ours(instance)) ++kept_foreign;
      }
    }
    const auto answer = mig::recut(gpu.geometry, present, layout);
    if (const auto* no = std::get_if<mig::NoFit>(&answer)) {
      does_not_fit(gpu, rule, *no, present);
      return;
    }
    const auto& recut = std::get<mig::Recut>(answer);
    for (const auto i : recut.destroy) {
      destroy(gpu, gpu.instances[i], fmt::format("the layout in line {} has no place for it", rule.line));
    }
    for (const auto i : recut.keep) {
      const auto& instance = gpu.instances[i];
      if (!ours(instance)) {
        note(fmt::format("gpu {}: {} (gi {}) was not made by bulkhead; left alone{}", gpu.index,
                         name_of(gpu, instance), instance.id,
                         instance.compute.empty()
                             ? ". It has no compute instance, so it shows 0 MB: --adopt mends it"
                             : ""));
        continue;
      }
      if (instance.compute.empty()) {
        step(CreateCompute{gpu.uuid, instance.id, name_of(gpu, instance), instance.place, false},
             "a GPU instance without a compute instance shows 0 MB and no CUDA device");
      }
    }
    if (recut.keep.size() > kept_foreign && !(recut.destroy.empty() && recut.create.empty())) {
      note(fmt::format("gpu {}: {} instance{} stay{} untouched", gpu.index, recut.keep.size() - kept_foreign,
                       recut.keep.size() - kept_foreign == 1 ? "" : "s",
                       recut.keep.size() - kept_foreign == 1 ? "s" : ""));
    }
    for (const auto& instance : recut.create) {
      CreateInstance action{
          gpu.uuid, gpu.geometry.by_id(instance.profile)->name, instance.profile, instance.place, {}};
      for (const auto& [compute, variant] : variants) {
        if (variant == instance.variant) action.compute_slices = compute;
      }
      step(std::move(action), fmt::format("the layout in line {} wants it", rule.line));
    }
  }

  void does_not_fit(const Gpu& gpu, const spec::GpuRule& rule, const mig::NoFit& no,
                    const std::vector<mig::Present>& present) {
    std::vector<Holder> holders;
    bool busy = false, foreign = false;
    for (const auto i : no.blocking) {
      const auto& instance = gpu.instances[i];
      (present[i].counts ? busy : foreign) = true;
      for (auto& holder : instance.holders()) holders.push_back(std::move(holder));
      if (!present[i].counts && instance.busy()) busy = true;
    }
    std::string why = fmt::format("the layout in line {} does not fit: {}", rule.line, no.why);
    if (!holders.empty()) why += fmt::format("; held by {}", who_are(holders));
    if (foreign) why += "; what bulkhead did not make is left alone";
    std::string way_out;
    if (!no.way_out) {
      way_out = fmt::format("make the layout smaller; profiles and how many fit: bulkhead inventory --gpu {}",
                            gpu.index);
    } else {
      std::vector<std::string> flags;
      if (busy) flags.emplace_back("--evict");
      if (foreign) flags.emplace_back("--adopt");
      std::vector<std::string> moves;
      for (const auto i : no.way_out->destroy) {
        moves.push_back(fmt::format("destroy {} (gi {}) at {}", name_of(gpu, gpu.instances[i]),
                                    gpu.instances[i].id, gpu.instances[i].place.start));
      }
      for (const auto& create : no.way_out->create)
        moves.push_back(
            fmt::format("create {} at {}", gpu.geometry.by_id(create.profile)->name, create.place.start));
      way_out = fmt::format("{}or add {}; that would {}",
                            holders.empty() ? "remove them yourself, " : "stop the holders, ",
                            join(flags, " "), join(moves, ", "));
    }
    refuse(subject_of(gpu), std::move(why), std::move(way_out), std::move(holders));
  }

  const spec::NodeFile& node_;
  const Host& host_;
  const Remembered& remembered_;
  const Options& options_;
  Plan plan_ = {};
  Refusal refusal_ = {};
  std::vector<unsigned> without_nvlink_ = {};  // GPUs that this plan takes it from
};

Json json_of(const Holder& holder) {
  return Json{{"pid", holder.pid},
              {"start_time", holder.start_time},
              {"name", holder.name},
              {"cgroup", holder.cgroup}};
}

}  // namespace

bool Plan::reboot_owed() const {
  return std::any_of(steps.begin(), steps.end(), [](const Step& step) { return step.reboot_owed; });
}

std::variant<Plan, Refusal> make(const spec::NodeFile& node, const inventory::Host& host,
                                 const Remembered& remembered, const Options& options) {
  return Maker(node, host, remembered, options).make();
}

std::vector<PoolOf> pools(const spec::NodeFile& node, const inventory::Host& host) {
  std::vector<PoolOf> out;
  for (const auto& gpu : host.gpus) {
    PoolOf pool{.gpu = gpu.uuid, .index = gpu.index};
    std::vector<std::string> lines;
    for (std::size_t i = 0; i < node.gpus.size(); ++i) {
      if (!selects(node.gpus[i].select, gpu)) continue;
      pool.rules.push_back(i);
      lines.push_back(std::to_string(node.gpus[i].line));
    }
    if (pool.rules.size() == 1) {
      const auto& rule = node.gpus[pool.rules.front()];
      pool.mode = rule.mode;
      pool.dynamic = rule.dynamic;
    } else if (pool.rules.empty()) {
      pool.why = "no rule of the node file selects it";
    } else {
      pool.why = fmt::format("is selected by the rules in lines {} of the node file", join(lines, " and "));
    }
    out.push_back(std::move(pool));
  }
  return out;
}

bool selects(const spec::Select& select, const Gpu& gpu) {
  if (select.all) return true;
  return none_or(select.index, [&](unsigned i) { return i == gpu.index; }) &&
         none_or(select.uuid, [&](const Uuid& u) { return u == gpu.uuid; }) &&
         none_or(select.pci, [&](const PciAddress& a) { return a == gpu.pci.address; }) &&
         none_or(select.model, [&](const std::string& m) { return glob(lower(m), lower(gpu.model)); }) &&
         none_or(select.pci_id, [&](const spec::PciId& id) {
           return id.vendor == gpu.pci.vendor && id.device == gpu.pci.device;
         });
}

bool needs_tree(const spec::NodeFile& node) {
  return !node.devices.empty() ||
         std::any_of(node.gpus.begin(), node.gpus.end(),
                     [](const spec::GpuRule& rule) { return rule.mode == spec::Mode::passthrough; });
}

std::vector<std::string> files_of_interest(const spec::NodeFile& node, const inventory::Host& host) {
  std::vector<std::string> paths;
  if (needs_tree(node)) paths.emplace_back(udev_path);
  if (!node.host.kernel_args.empty()) {
    const Family family = family_of(host);
    if (family == Family::debian) paths.emplace_back(grub_path);
    if (family == Family::redhat) paths.emplace_back(grubby_path);
  }
  for (const auto& file : node.host.modprobe) paths.push_back(modprobe_path(file));
  return paths;
}

std::vector<std::string> units_of_interest(const spec::NodeFile& node) {
  std::vector<std::string> names;
  if (node.host.fabric_manager) names.push_back(node.host.fabric_manager->unit);
  for (const auto& unit : node.host.units) names.push_back(unit.name);
  return names;
}

Json to_json(const Plan& plan, const inventory::Host& host) {
  Json steps = Json::array();
  for (const auto& step : plan.steps) {
    Json losses = Json::array();
    for (const auto& loss : step.losses) losses.push_back(Json{{"who", loss.who}, {"what", loss.what}});
    Json evicts = Json::array();
    for (const auto& holder : step.evicts) evicts.push_back(json_of(holder));
    const Action undo = undo_of(step.action);
    steps.push_back(Json{{"step", describe(step.action, &host)},
                         {"why", step.why},
                         {"losses", std::move(losses)},
                         {"evicts", std::move(evicts)},
                         {"reboot_owed", step.reboot_owed},
                         {"action", to_json(step.action)},
                         {"undo", Json{{"step", describe(undo, &host)}, {"action", to_json(undo)}}}});
  }
  return Json{{"verdict", plan.empty() ? "nothing to do" : "steps"},
              {"steps", std::move(steps)},
              {"notes", plan.notes},
              {"reboot_owed", plan.reboot_owed()}};
}

Json to_json(const Refusal& refusal) {
  Json reasons = Json::array();
  for (const auto& reason : refusal.reasons) {
    Json holders = Json::array();
    for (const auto& holder : reason.holders) holders.push_back(json_of(holder));
    reasons.push_back(Json{{"subject", reason.subject},
                           {"why", reason.why},
                           {"holders", std::move(holders)},
                           {"way_out", reason.way_out}});
  }
  return Json{{"verdict", "refused"}, {"reasons", std::move(reasons)}};
}

}  // namespace bulkhead::plan
