// The bus, the groups, and what the host does with each function.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <set>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"
#include "edge/vfio/patient.hpp"
#include "edge/vfio/vfio.hpp"

namespace bulkhead::vfio {

namespace fs = std::filesystem;
using passthrough::Function;
using passthrough::Tree;

namespace {

constexpr std::size_t functions_limit = 65536;
constexpr std::size_t holders_depth = 8;  // device mapper on device mapper on ...
// A driver that probes or lets go holds the device's lock meanwhile; one that takes longer than this hangs.
constexpr unsigned lock_wait_ms = 3'000;

std::optional<std::string> link_name(const fs::path& path) {
  std::error_code failed;
  const auto target = fs::read_symlink(path, failed);
  return failed ? std::nullopt : std::optional(printable(target.filename().string(), 64));
}

std::optional<std::uint64_t> number(const fs::path& path, int base = 10) {
  const auto text = read_trimmed(path);
  return text.ok() ? parse_u64(*text, base) : std::nullopt;
}

template <class Int>
Int number_or_zero(const fs::path& path, int base) {
  const auto value = number(path, base);
  return value && *value <= std::uint64_t{static_cast<Int>(-1)} ? static_cast<Int>(*value) : Int{0};
}

// Lines 0 to 5 of `resource`. A BAR without an address reads all zero, and so does one that is not there: the
// config space tells them apart, because its type bits stay (Linux 6.1, 6.12).
std::vector<unsigned> without_room(const fs::path& device, std::string_view config) {
  std::vector<unsigned> out;
  const auto resource = read_file(device / "resource", 65536);
  if (!resource.ok() || config.size() < 0x28) return out;
  if ((static_cast<unsigned char>(config[0x0e]) & 0x7fU) != 0) return out;  // a bridge
  const auto lines = split_lines(*resource);
  const auto bar_at = [&](unsigned index) {
    std::uint32_t value = 0;
    for (unsigned i = 0; i < 4; ++i)
      value |= std::uint32_t{static_cast<unsigned char>(config[0x10 + index * 4 + i])} << (8 * i);
    return value;
  };
  for (unsigned i = 0; i < 6 && i < lines.size(); ++i) {
    const auto value = bar_at(i);
    const bool wide = (value & 7U) == 4;
    const bool high = wide && i < 5 && bar_at(i + 1) != 0;
    const auto columns = split(trim(lines[i]), ' ');
    const bool empty =
        columns.size() == 3 && parse_u64(columns[0], 16) == 0U && parse_u64(columns[1], 16) == 0U;
    // A lone 0 cannot be told from a BAR that is not there; type bits can.
    if (empty && (value & 0xeU) != 0 && (value & ~0xfU) == 0 && !high) out.push_back(i);
    if (wide) ++i;
  }
  return out;
}

Function read_function(const fs::path& devices, const PciAddress& address) {
  const fs::path device = devices / address.str();
  Function out;
  out.address = address;
  out.vendor = number_or_zero<std::uint16_t>(device / "vendor", 16);
  out.device = number_or_zero<std::uint16_t>(device / "device", 16);
  out.class_code = number_or_zero<std::uint32_t>(device / "class", 16);
  out.driver = link_name(device / "driver").value_or("");
  if (const auto group = link_name(device / "iommu_group")) {
    if (const auto n = parse_u64(*group); n && *n <= 0xffffffffU) out.group = static_cast<unsigned>(*n);
  }
  if (const auto physical = link_name(device / "physfn")) {
    if (const auto parent = PciAddress::parse(*physical); parent.ok()) out.physical = *parent;
  }
  if (const auto total = number(device / "sriov_totalvfs"); total && *total <= 0xffff) {
    out.vfs_total = static_cast<unsigned>(*total);
    out.autoprobe = number(device / "sriov_drivers_autoprobe").value_or(1) != 0;
    // Counted by the links: sriov_numvfs waits for the device's lock.
    for (unsigned i = 0; i < *out.vfs_total; ++i) {
      const auto name = link_name(device / fmt::format("virtfn{}", i));
      const auto vf = name ? PciAddress::parse(*name) : Result<PciAddress>(Error(Errc::not_found, ""));
      if (!vf.ok()) break;
      out.virtual_functions.push_back(*vf);
    }
    out.vfs_now = static_cast<unsigned>(out.virtual_functions.size());
  }
  if (const auto node = number(device / "numa_node"); node && *node <= 4096)  // -1 is none
    out.numa_node = static_cast<unsigned>(*node);
  if (const auto cpus = read_trimmed(device / "local_cpulist"); cpus.ok() && parse_ranges(*cpus))
    out.local_cpus = *cpus;
  out.boot_vga = number(device / "boot_vga").value_or(0) == 1;
  return out;
}

void overrides(const fs::path& devices, Tree& tree) {
  std::vector<std::string> files;
  for (const auto& function : tree.functions)
    files.push_back((devices / function.address.str() / "driver_override").string());
  const auto said = read_patiently(files, lock_wait_ms);
  for (std::size_t i = 0; i < said.size(); ++i) {
    tree.functions[i].stuck = said[i].waits;
    const std::string_view text = said[i].text ? trim(*said[i].text) : std::string_view();
    if (text != "(null)") tree.functions[i].driver_override = printable(text, 64);
  }
}

// A reset locks the config space until the device answers again: up to a minute of one that does not.
void config_spaces(const fs::path& root, Tree& tree) {
  const fs::path devices = root / "sys/bus/pci/devices";
  std::vector<std::size_t> at;
  std::vector<std::string> files;
  for (std::size_t i = 0; i < tree.functions.size(); ++i) {
    if (tree.functions[i].stuck) continue;
    at.push_back(i);
    files.push_back((devices / tree.functions[i].address.str() / "config").string());
  }
  const auto said = read_patiently(files, lock_wait_ms);
  for (std::size_t i = 0; i < said.size(); ++i) {
    Function& function = tree.functions[at[i]];
    function.stuck = said[i].waits;
    const std::string_view config = said[i].text ? std::string_view(*said[i].text) : std::string_view();
    if (all_ones(config)) {
      const Answers again = answers(root, function.address, lock_wait_ms);
      function.dead = again == Answers::all_ones;
      function.stuck = again == Answers::waits;
      continue;
    }
    function.bars_without_room = without_room(devices / function.address.str(), config);
  }
}

// ---- what the host does with it

// "/sys/devices/pci0000:00/0000:00:04.1/0000:02:00.0/nvme/nvme0" -> the innermost function it is part of.
std::optional<PciAddress> function_of(const fs::path& path) {
  std::optional<PciAddress> last;
  for (const auto& part : path) {
    const auto text = part.string();
    if (text.size() < 12 || text.find('.') == std::string::npos) continue;
    if (const auto address = PciAddress::parse(text); address.ok()) last = *address;
  }
  return last;
}

struct Block {
  std::string number = {};  // "259:0"
  std::string name = {};    // "nvme0n1p1"
};

// What lies on a block device, through device mapper and md.
void stacked(const fs::path& root, const fs::path& block, std::set<std::string>& numbers,
             std::set<std::string>& names, std::size_t depth) {
  const auto number = read_trimmed(block / "dev");
  if (number.ok() && !numbers.insert(*number).second) return;
  names.insert(block.filename().string());
  if (depth == 0) return;
  const auto above = list_directory(block / "holders");
  for (const auto& name : above.value_or({}))
    stacked(root, root / "sys/class/block" / name, numbers, names, depth - 1);
}

void file_systems(const fs::path& root, Tree& tree, const std::map<PciAddress, std::size_t>& places) {
  const fs::path blocks = root / "sys/class/block";
  const auto names = list_directory(blocks);
  if (!names.ok()) return;
  const auto mounts = read_file(root / "proc/self/mountinfo");
  const auto swaps = read_file(root / "proc/swaps", 65536);
  for (const auto& name : *names) {
    std::error_code failed;
    const fs::path real = fs::canonical(blocks / name, failed);
    if (failed) continue;
    const auto owner = function_of(real);
    const auto at = owner ? places.find(*owner) : places.end();
    if (at == places.end()) continue;
    Function& function = tree.functions[at->second];
    std::set<std::string> numbers, on_it;
    stacked(root, blocks / name, numbers, on_it, holders_depth);
    const auto use = [&](std::string text) {
      if (std::find(function.uses.begin(), function.uses.end(), text) == function.uses.end())
        function.uses.push_back(std::move(text));
    };
    for (const auto line : split_lines(mounts.ok() ? std::string_view(*mounts) : std::string_view())) {
      // 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw: proc_pid_mountinfo(5)
      const auto words = split(line, ' ');
      if (words.size() < 7) continue;
      const auto dash = std::find(words.begin(), words.end(), "-");
      const std::string_view source = words.end() - dash > 2 ? *(dash + 2) : std::string_view();
      const bool same =
          numbers.contains(std::string(words[2])) ||
          (source.starts_with("/dev/") && on_it.contains(std::string(source.substr(source.rfind('/') + 1))));
      if (same) use(fmt::format("{} is mounted on {}", printable(name, 40), printable(words[4], 100)));
    }
    for (const auto line : split_lines(swaps.ok() ? std::string_view(*swaps) : std::string_view())) {
      const auto device = line.substr(0, line.find_first_of(" \t"));
      if (device.starts_with("/dev/") && on_it.contains(std::string(device.substr(device.rfind('/') + 1))))
        use(fmt::format("swap on {}", printable(device, 60)));
    }
  }
}

void network(const fs::path& root, Tree& tree, const std::map<PciAddress, std::size_t>& places) {
  std::vector<std::string> through;
  if (const auto routes = read_file(root / "proc/net/route", 1U << 20U); routes.ok()) {
    for (const auto line : split_lines(*routes)) {  // Iface Destination Gateway ... Mask
      const auto words = split(line, '\t');
      if (words.size() > 7 && trim(words[1]) == "00000000" && trim(words[7]) == "00000000")
        through.emplace_back(trim(words[0]));
    }
  }
  if (const auto routes = read_file(root / "proc/net/ipv6_route", 1U << 20U); routes.ok()) {
    for (const auto line : split_lines(*routes)) {
      const auto words = split(line, ' ');
      if (words.size() < 10 || words[0].find_first_not_of('0') != std::string_view::npos || words[1] != "00")
        continue;
      const auto name = trim(words.back());
      if (name != "lo") through.emplace_back(name);
    }
  }
  // A bond's or bridge's default route goes through its members.
  for (std::size_t i = 0; i < through.size() && i < 256; ++i) {
    const fs::path interface = root / "sys/class/net" / through[i];
    if (const auto entries = list_directory(interface); entries.ok()) {
      for (const auto& entry : *entries) {
        if (entry.starts_with("lower_") &&
            std::find(through.begin(), through.end(), entry.substr(6)) == through.end())
          through.push_back(entry.substr(6));
      }
    }
    std::error_code failed;
    const fs::path real = fs::canonical(interface, failed);
    const auto owner = failed ? std::nullopt : function_of(real);
    const auto at = owner ? places.find(*owner) : places.end();
    if (at == places.end()) continue;
    auto& uses = tree.functions[at->second].uses;
    const std::string text = fmt::format("default route through {}", printable(through[i], 40));
    if (std::find(uses.begin(), uses.end(), text) == uses.end()) uses.push_back(text);
  }
}

// NVIDIA's files hang on no device of sysfs.
void nvidia_file(const fs::path& root, const PciAddress& address, std::vector<std::string>& nodes) {
  const auto said = read_file(root / "proc/driver/nvidia/gpus" / address.str() / "information", 65536);
  for (const auto line : split_lines(said.ok() ? std::string_view(*said) : std::string_view())) {
    if (!line.starts_with("Device Minor:")) continue;
    if (const auto minor = parse_u64(trim(line.substr(13))))
      nodes.push_back(fmt::format("/dev/nvidia{}", *minor));
  }
}

void device_files(const fs::path& root, Tree& tree, const std::map<PciAddress, std::size_t>& places) {
  for (const char* kind : {"char", "block"}) {
    const fs::path folder = root / "sys/dev" / kind;
    const auto numbers = list_directory(folder);
    for (const auto& number : numbers.value_or({})) {
      std::error_code failed;
      const fs::path real = fs::canonical(folder / number, failed);
      const auto owner = failed ? std::nullopt : function_of(real);
      const auto at = owner ? places.find(*owner) : places.end();
      if (at == places.end()) continue;
      const auto event = read_file(real / "uevent", 65536);
      for (const auto line : split_lines(event.ok() ? std::string_view(*event) : std::string_view())) {
        if (line.starts_with("DEVNAME=") && line.find("..") == std::string_view::npos)
          tree.functions[at->second].nodes.push_back(fmt::format("/dev/{}", trim(line.substr(8))));
      }
    }
  }
  for (auto& function : tree.functions) {
    if (function.driver == "nvidia") nvidia_file(root, function.address, function.nodes);
    // While an unbind from VFIO waits for a guest, the function shows no driver, and the guest has the file
    // open.
    const bool may_be_open = function.with_vfio() || function.driver.empty();
    if (may_be_open && function.group) {
      const auto group =
          std::find_if(tree.groups.begin(), tree.groups.end(),
                       [&](const passthrough::Group& g) { return g.number == *function.group; });
      const bool without = group != tree.groups.end() && group->noiommu;
      function.nodes.push_back(fmt::format("/dev/vfio/{}{}", without ? "noiommu-" : "", *function.group));
      if (auto own = device_node(root, function.address); !own.empty())
        function.nodes.push_back(std::move(own));
      if (!function.with_vfio()) continue;
      if (auto now = permission(root, function.address); now.ok()) {
        function.permission = std::move(*now);
        struct stat info {};
        const auto node =
            fs::path("dev/vfio") / fmt::format("{}{}", without ? "noiommu-" : "", *function.group);
        if (::stat((root / node).c_str(), &info) == 0) function.owner_id = std::to_string(info.st_uid);
      }
    }
  }
}

}  // namespace

Result<Tree> read(const fs::path& root) {
  Tree tree;
  const fs::path devices = root / "sys/bus/pci/devices";
  BH_TRY(const auto names, list_directory(devices));
  if (names.size() > functions_limit) return Error(Errc::corrupt, "more PCI functions than can be");
  std::map<PciAddress, std::size_t> places;
  for (const auto& name : names) {
    const auto address = PciAddress::parse(name);
    if (address.ok()) tree.functions.push_back(read_function(devices, *address));
  }
  std::sort(tree.functions.begin(), tree.functions.end(),
            [](const Function& a, const Function& b) { return a.address < b.address; });
  for (std::size_t i = 0; i < tree.functions.size(); ++i) places[tree.functions[i].address] = i;
  overrides(devices, tree);
  config_spaces(root, tree);

  const fs::path groups = root / "sys/kernel/iommu_groups";
  const auto numbers = list_directory(groups);
  for (const auto& name : numbers.value_or({})) {
    const auto n = parse_u64(name);
    if (!n || *n > 0xffffffffU) continue;
    passthrough::Group group{.number = static_cast<unsigned>(*n)};
    if (const auto type = read_trimmed(groups / name / "type"); type.ok()) group.type = printable(*type, 32);
    if (const auto word = read_trimmed(groups / name / "name"); word.ok())
      group.noiommu = *word == "vfio-noiommu";
    tree.groups.push_back(std::move(group));
  }
  for (const auto module : passthrough::vfio_modules) {
    if (!module_is_loaded(root, module)) tree.modules_missing.emplace_back(module);
  }
  const fs::path tables = root / "sys/firmware/acpi/tables";
  tree.firmware_table =
      ::access((tables / "DMAR").c_str(), F_OK) == 0 || ::access((tables / "IVRS").c_str(), F_OK) == 0;
  if (const auto text = read_file(root / "usr/share/nvidia/nvswitch/fabricmanager.cfg", 1U << 20U);
      text.ok()) {
    for (const auto line : split_lines(*text)) {
      const auto at = trim(line).find('=');
      if (at == std::string_view::npos || trim(trim(line).substr(0, at)) != "FABRIC_MODE") continue;
      if (const auto mode = parse_u64(trim(trim(line).substr(at + 1))); mode && *mode < 16)
        tree.fabric_mode = static_cast<unsigned>(*mode);
    }
  }
  file_systems(root, tree, places);
  network(root, tree, places);
  device_files(root, tree, places);
  return tree;
}

std::vector<std::string> device_nodes(const fs::path& root, const PciAddress& address) {
  Tree alone;
  alone.functions.push_back({.address = address});
  device_files(root, alone, {{address, 0}});
  auto nodes = std::move(alone.functions.front().nodes);
  nvidia_file(root, address, nodes);
  if (auto group = group_node(root, address); group.ok()) nodes.push_back(std::move(*group));
  return nodes;
}

bool module_is_loaded(const fs::path& root, std::string_view module) {
  return ::access((root / "sys/module" / module).c_str(), F_OK) == 0;
}

}  // namespace bulkhead::vfio
