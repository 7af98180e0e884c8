#include "core/doctor/rows.hpp"

#include <algorithm>
#include <cctype>

#include <fmt/format.h>

#include "base/text.hpp"

namespace bulkhead::doctor {

Judgement ok(std::string says, std::vector<Source> evidence) {
  return {.verdict = Verdict::ok, .says = std::move(says), .evidence = std::move(evidence)};
}

Judgement unknown(std::string says, std::vector<Source> evidence, std::vector<std::string> mend) {
  return {.verdict = Verdict::unknown,
          .says = std::move(says),
          .evidence = std::move(evidence),
          .mend = std::move(mend)};
}

Judgement warn(std::string says, std::vector<Source> evidence, std::vector<std::string> mend) {
  return {.verdict = Verdict::warn,
          .says = std::move(says),
          .evidence = std::move(evidence),
          .mend = std::move(mend)};
}

Judgement fail(std::string says, std::vector<Source> evidence, std::vector<std::string> mend) {
  return {.verdict = Verdict::fail,
          .says = std::move(says),
          .evidence = std::move(evidence),
          .mend = std::move(mend)};
}

Judgement waits(std::string_view check, std::string says) {
  Judgement judgement = unknown(std::move(says));
  judgement.waits_on = std::string(check);
  return judgement;
}

Judgement ask_the_host(const Evidence& e, std::string says) {
  const auto machine = virtual_machine(e);
  Judgement judgement = unknown(fmt::format("{}; this is a virtual machine: ask the host that runs it", says),
                                machine ? std::vector<Source>{*machine} : std::vector<Source>{});
  judgement.ask_host = true;
  return judgement;
}

Source quote(const Evidence& e, const std::string& path) {
  if (const auto found = e.texts.find(path); found != e.texts.end()) {
    return {path, found->second ? std::string(trim(*found->second)) : fmt::format("({})", found->second.why)};
  }
  if (const auto found = e.names.find(path); found != e.names.end()) {
    if (!found->second) return {path, fmt::format("({})", found->second.why)};
    return {path, found->second->empty() ? "(empty)" : listed(*found->second)};
  }
  if (const auto found = e.links.find(path); found != e.links.end()) {
    return {path, found->second ? "-> " + *found->second : fmt::format("({})", found->second.why)};
  }
  if (const auto found = e.nodes.find(path); found != e.nodes.end()) {
    if (!found->second) return {path, fmt::format("({})", found->second.why)};
    return {path, fmt::format("mode {:04o}, owner {}:{}", found->second->mode, found->second->uid,
                              found->second->gid)};
  }
  return {path, "(no such file)"};
}

std::optional<std::string> line_with(std::string_view text, std::string_view needle) {
  const std::size_t at = text.find(needle);
  if (at == std::string_view::npos) return std::nullopt;
  const std::size_t before = text.rfind('\n', at);
  const std::size_t start = before == std::string_view::npos ? 0 : before + 1;
  const std::size_t end = text.find('\n', at);
  return std::string(trim(text.substr(start, end == std::string_view::npos ? end : end - start)));
}

std::optional<std::string> value_of(std::string_view text, std::string_view key, char separator) {
  std::optional<std::string> found;
  for (const auto line : split_lines(text)) {
    const std::size_t at = line.find(separator);
    if (at == std::string_view::npos || trim(line.substr(0, at)) != key) continue;
    found = std::string(trim(line.substr(at + 1)));
  }
  return found;
}

bool has_word(std::string_view text, std::string_view word) {
  std::size_t at = 0;
  const auto edge = [&](std::size_t i) {
    return i >= text.size() || std::isspace(static_cast<unsigned char>(text[i])) != 0;
  };
  while ((at = text.find(word, at)) != std::string_view::npos) {
    if ((at == 0 || edge(at - 1)) && edge(at + word.size())) return true;
    ++at;
  }
  return false;
}

bool path_matches(std::string_view pattern, std::string_view path) {
  // Greedy with one backtrack point: '*' swallows anything but '/'.
  std::size_t p = 0, s = 0, star = std::string_view::npos, resume = 0;
  while (s < path.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = s;
    } else if (p < pattern.size() && pattern[p] == path[s]) {
      ++p;
      ++s;
    } else if (star != std::string_view::npos && path[resume] != '/') {
      p = star + 1;
      s = ++resume;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

std::optional<Version> Version::parse(std::string_view text) {
  Version version;
  std::size_t i = 0;
  while (i < text.size() && std::isdigit(static_cast<unsigned char>(text[i])) != 0) {
    std::size_t end = i;
    while (end < text.size() && std::isdigit(static_cast<unsigned char>(text[end])) != 0) ++end;
    const auto part = parse_u64(text.substr(i, end - i));
    if (!part || *part > 0xffffffffU) return std::nullopt;
    version.parts.push_back(static_cast<unsigned>(*part));
    if (end >= text.size() || text[end] != '.') break;
    i = end + 1;
  }
  if (version.parts.empty()) return std::nullopt;
  return version;
}

std::optional<std::string> first_version(std::string_view text) {
  const auto digit = [&](std::size_t i) {
    return i < text.size() && std::isdigit(static_cast<unsigned char>(text[i])) != 0;
  };
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (!digit(i) ||
        (i > 0 && (std::isalnum(static_cast<unsigned char>(text[i - 1])) != 0 || text[i - 1] == '.')))
      continue;
    std::size_t end = i;
    bool dot = false;
    while (digit(end) || (end < text.size() && text[end] == '.' && digit(end + 1))) {
      dot = dot || text[end] == '.';
      ++end;
    }
    if (dot) return std::string(text.substr(i, end - i));
    i = end;
  }
  return std::nullopt;
}

CpuMaker cpu_maker(const Evidence& e) {
  const auto& cpus = e.text("/proc/cpuinfo");
  if (!cpus) return CpuMaker::other;
  if (cpus->find("GenuineIntel") != std::string::npos) return CpuMaker::intel;
  if (cpus->find("AuthenticAMD") != std::string::npos) return CpuMaker::amd;
  return CpuMaker::other;
}

std::string name_of(const inventory::Gpu& gpu) {
  return fmt::format("GPU {} ({})", gpu.index, gpu.pci.address.str());
}

std::string sysfs(const inventory::PciDevice& device, std::string_view attribute) {
  return fmt::format("/sys/bus/pci/devices/{}/{}", device.address.str(), attribute);
}

std::vector<const inventory::PciDevice*> all_gpus(const Evidence& e) {
  std::vector<const inventory::PciDevice*> devices;
  for (const inventory::Gpu& gpu : e.host.gpus) devices.push_back(&gpu.pci);
  for (const inventory::LostGpu& gpu : e.host.lost) devices.push_back(&gpu.pci);
  for (const inventory::Accelerator& one : e.host.accelerators) devices.push_back(&one.pci);
  return devices;
}

bool on_vfio(const inventory::PciDevice& device) {
  return device.driver && device.driver->find("vfio") != std::string::npos;
}

std::string listed(const std::vector<std::string>& names) {
  constexpr std::size_t shown = 4;
  std::string text;
  for (std::size_t i = 0; i < names.size() && i < shown; ++i) {
    if (i > 0) text += i + 1 == names.size() ? " and " : ", ";
    text += names[i];
  }
  if (names.size() > shown) text += fmt::format(" and {} more", names.size() - shown);
  return text;
}

Family family(const Evidence& e) {
  std::string ids = e.host.os_id.value_or("");
  if (const auto& release = e.text("/etc/os-release")) {
    for (const char* key : {"ID", "ID_LIKE"}) ids += ' ' + value_of(*release, key, '=').value_or("");
  }
  std::replace(ids.begin(), ids.end(), '"', ' ');
  ids = lower(ids);
  for (const char* id : {"debian", "ubuntu"}) {
    if (has_word(ids, id)) return Family::debian;
  }
  for (const char* id : {"rhel", "fedora", "centos", "rocky", "almalinux"}) {
    if (has_word(ids, id)) return Family::rhel;
  }
  for (const char* id : {"suse", "sles", "opensuse"}) {
    if (has_word(ids, id)) return Family::suse;
  }
  return Family::other;
}

std::string sudo(const Evidence& e, std::string command) {
  return e.caller.uid == 0 ? command : "sudo " + command;
}

std::vector<std::string> kernel_arguments(const Evidence& e, std::string_view arguments) {
  std::vector<std::string> lines;
  switch (family(e)) {
    case Family::debian:
      // A drop-in of its own: the file the administrator edits stays as it is, and twice is the same as once.
      lines.push_back(fmt::format("echo 'GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT {}\"' | {}",
                                  arguments, sudo(e, "tee /etc/default/grub.d/90-bulkhead-doctor.cfg")));
      lines.push_back(sudo(e, "update-grub"));
      break;
    case Family::rhel:
      lines.push_back(sudo(e, fmt::format("grubby --update-kernel=ALL --args='{}'", arguments)));
      break;
    case Family::suse:
      for (const auto argument : split(arguments, ' ')) {
        lines.push_back(sudo(e, fmt::format("update-bootloader --add-option '{}'", argument)));
      }
      lines.push_back(sudo(e, "update-bootloader --config"));
      break;
    case Family::other:
      lines.push_back(fmt::format("# add to the kernel's command line in your boot loader: {}", arguments));
      break;
  }
  lines.push_back(sudo(e, "reboot"));
  return lines;
}

std::vector<std::string> without_kernel_argument(const Evidence& e, std::string_view argument) {
  std::vector<std::string> lines;
  switch (family(e)) {
    case Family::debian:
      lines.push_back(sudo(
          e, fmt::format("sed -i 's/ *\\b{}\\b//' /etc/default/grub /etc/default/grub.d/*.cfg", argument)));
      lines.push_back(sudo(e, "update-grub"));
      break;
    case Family::rhel:
      lines.push_back(sudo(e, fmt::format("grubby --update-kernel=ALL --remove-args='{}'", argument)));
      break;
    case Family::suse:
      lines.push_back(sudo(e, fmt::format("update-bootloader --del-option '{}'", argument)));
      lines.push_back(sudo(e, "update-bootloader --config"));
      break;
    case Family::other:
      lines.push_back(
          fmt::format("# remove from the kernel's command line in your boot loader: {}", argument));
      break;
  }
  lines.push_back(sudo(e, "reboot"));
  return lines;
}

std::vector<std::string> install(const Evidence& e, std::string_view debian, std::string_view rhel,
                                 std::string_view suse) {
  switch (family(e)) {
    case Family::debian:
      return {sudo(e, fmt::format("apt-get install {}", debian))};
    case Family::rhel:
      return {sudo(e, fmt::format("dnf install {}", rhel))};
    case Family::suse:
      return {sudo(e, fmt::format("zypper install {}", suse))};
    case Family::other:
      break;
  }
  return {fmt::format("# install {} with your package manager", debian)};
}

std::vector<std::string> operator+(std::vector<std::string> a, const std::vector<std::string>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

}  // namespace bulkhead::doctor
