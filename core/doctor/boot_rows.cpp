// What the next boot will be like: the command line that the boot loader holds, and who gets the devices
// first.
#include <algorithm>
#include <set>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/doctor/rows.hpp"

namespace bulkhead::doctor {

namespace {

constexpr const char* udev_rules = "/etc/udev/rules.d/10-bulkhead-vfio.rules";

struct Entry {
  std::string where = {}, words = {};  // the file, the arguments
};

// What boot loaders read, not what makes it: the first entry of each grub.cfg that is no rescue, and each
// entry of the Boot Loader Specification. Which of those is the default is written in places that only root
// and the loader read, so all must be as they should.
std::vector<Entry> next_boot(const Evidence& e) {
  std::vector<Entry> out;
  for (const char* path : {"/boot/grub/grub.cfg", "/boot/grub2/grub.cfg"}) {
    const auto& text = e.text(path);
    if (!text) continue;
    for (const auto raw : split_lines(*text)) {
      std::string line(trim(raw));
      std::replace(line.begin(), line.end(), '\t', ' ');
      const auto word = line.substr(0, line.find(' '));
      if (word != "linux" && word != "linuxefi" && word != "linux16") continue;
      if (has_word(line, "single") || has_word(line, "recovery") || has_word(line, "nomodeset")) continue;
      const auto image = trim(std::string_view(line).substr(word.size()));
      out.push_back({path, std::string(trim(image.substr(std::min(image.size(), image.find(' ')))))});
      break;
    }
  }
  for (const char* pattern :
       {"/boot/loader/entries/*", "/boot/efi/loader/entries/*", "/efi/loader/entries/*"}) {
    for (const auto& [path, text] : e.matching(pattern)) {
      if (!path.ends_with(".conf") || path.find("rescue") != std::string::npos) continue;
      std::string words;
      for (const auto raw : split_lines(text)) {
        const auto line = trim(raw);
        if (line.starts_with("options ") || line.starts_with("options\t"))
          words += (words.empty() ? "" : " ") + std::string(trim(line.substr(8)));
      }
      // "$kernelopts" stands for what grubenv holds: nothing that can be judged here.
      if (!words.empty() && words.find('$') == std::string::npos) out.push_back({path, words});
    }
  }
  return out;
}

Judgement next_arguments(const Evidence& e) {
  const auto entries = next_boot(e);
  if (entries.empty()) {
    return unknown("what the boot loader will hand to the kernel cannot be read",
                   {quote(e, "/boot/grub/grub.cfg")}, as_root(e, e.text("/boot/grub/grub.cfg")));
  }
  const auto& now = e.text("/proc/cmdline");
  std::vector<Source> off, gone;
  std::set<std::string> off_words, gone_words;
  for (const Entry& entry : entries) {
    for (const char* word : {"intel_iommu=off", "amd_iommu=off", "iommu=off", "intremap=off"}) {
      if (!has_word(entry.words, word) || (now && has_word(*now, word))) continue;
      off.push_back({entry.where, entry.words});
      off_words.insert(word);
    }
    for (const char* word : {"intel_iommu=on", "iommu=pt", "pci=realloc"}) {
      if (!now || !has_word(*now, word) || has_word(entry.words, word)) continue;
      gone.push_back({entry.where, entry.words});
      gone_words.insert(word);
    }
  }
  if (!off.empty()) {
    const std::vector<std::string> words(off_words.begin(), off_words.end());
    std::vector<std::string> mend;
    for (const auto& word : words) mend = mend + without_kernel_argument(e, word);
    return fail(fmt::format("the next boot turns off what works now: {}", listed(words)), off, mend);
  }
  if (!gone.empty()) {
    gone.push_back(quote(e, "/proc/cmdline"));
    const std::vector<std::string> words(gone_words.begin(), gone_words.end());
    return warn(fmt::format("in force now and gone after the next boot: {}", listed(words)), gone,
                kernel_arguments(e, join(words, " ")));
  }
  return ok("the next boot keeps the IOMMU arguments of this one",
            {{entries.front().where, entries.front().words}});
}

// A driver of the host that would take a device of this kind, as modules are named.
struct Rival {
  std::uint16_t vendor = 0;  // 0: any
  unsigned class_code = 0, class_mask = 0;
  const char* modules[2] = {};
};
constexpr Rival rivals[] = {
    {0x10de, 0x030000, 0xff0000, {"nvidia", "nouveau"}}, {0x1002, 0x030000, 0xff0000, {"amdgpu", "radeon"}},
    {0x8086, 0x030000, 0xff0000, {"xe", "i915"}},        {0x1002, 0x120000, 0xff0000, {"amdgpu", nullptr}},
    {0, 0x040300, 0xffff00, {"snd_hda_intel", nullptr}}, {0, 0x0c0330, 0xffffff, {"xhci_pci", nullptr}},
    {0, 0x010802, 0xffffff, {"nvme", nullptr}},
};

std::string underscored(std::string_view text) {
  std::string out(text);
  std::replace(out.begin(), out.end(), '-', '_');
  return out;
}

struct Given {  // a function that is set apart now, or will be at the next boot
  std::string address = {};
  std::uint16_t vendor = 0, device = 0;
  unsigned class_code = 0;
  bool bound = false, by_rule = false;
};

std::vector<Given> given_away(const Evidence& e) {
  std::vector<Given> out;
  const auto add = [&](const inventory::PciDevice& device) {
    // A virtual function is made anew after each boot, by whoever makes them: no rule could name it.
    if (!on_vfio(device) || device.physical_function) return;
    out.push_back({device.address.str(), device.vendor, device.device, device.class_code, true, false});
  };
  for (const auto* device : all_gpus(e)) add(*device);
  for (const auto& device : e.host.nvswitches) add(device);
  if (const auto& text = e.text(udev_rules)) {
    for (const auto line : split_lines(*text)) {
      if (!line.starts_with("ACTION==\"add\"") || line.find("\"vfio-pci\"") == std::string_view::npos)
        continue;
      constexpr std::string_view key = "KERNEL==\"";
      const auto at = line.find(key);
      if (at == std::string_view::npos) continue;
      const auto rest = line.substr(at + key.size());
      const std::string address(rest.substr(0, rest.find('"')));
      const auto known =
          std::find_if(out.begin(), out.end(), [&](const Given& g) { return g.address == address; });
      if (known != out.end()) {
        known->by_rule = true;
        continue;
      }
      const auto number = [&](const char* file) {
        const auto& said = e.text(fmt::format("/sys/bus/pci/devices/{}/{}", address, file));
        auto digits = said ? trim(*said) : std::string_view();
        if (digits.starts_with("0x")) digits.remove_prefix(2);
        return parse_u64(digits, 16).value_or(0);
      };
      out.push_back({address, static_cast<std::uint16_t>(number("vendor")),
                     static_cast<std::uint16_t>(number("device")), static_cast<unsigned>(number("class")),
                     false, true});
    }
  }
  return out;
}

Judgement vfio_at_boot(const Evidence& e) {
  const auto devices = given_away(e);
  if (devices.empty()) return ok("no device is set apart for virtual machines across a boot");
  std::string ids;  // of modprobe.d and the command line
  std::vector<Source> softdeps, early;
  const auto& cmdline = e.text("/proc/cmdline");
  std::vector<std::pair<std::string, std::string>> modprobe = e.matching("/etc/modprobe.d/*");
  for (const auto& [path, text] : modprobe) {
    for (const auto raw : split_lines(text)) {
      const auto line = trim(raw);
      if (line.starts_with('#')) continue;
      if (line.starts_with("options vfio-pci ") || line.starts_with("options vfio_pci "))
        ids += std::string(line) + " ";
      if (line.starts_with("softdep ") && underscored(line).find("vfio_pci") != std::string::npos)
        softdeps.push_back({path, std::string(line)});
    }
  }
  if (cmdline) ids += *cmdline;
  // What the initramfs was told to hold: a driver in there starts before the rules of the root file system.
  const auto told = [&](const char* pattern) {
    for (const auto& [path, text] : e.matching(pattern)) {
      for (const auto raw : split_lines(text)) {
        const auto line = trim(raw);
        if (line.empty() || line.starts_with('#')) continue;
        const bool dracut = std::string_view(pattern).find("dracut") != std::string_view::npos;
        if (dracut && line.find("drivers") == std::string_view::npos) continue;
        early.push_back({path, std::string(line)});
      }
    }
  };
  told("/etc/initramfs-tools/modules");
  told("/etc/dracut.conf.d/*");
  const auto names = [](const Source& source, std::string_view module) {
    std::string words = underscored(source.words);
    for (char& c : words)
      if (c == '"' || c == '=' || c == '+' || c == ',') c = ' ';
    return has_word(words, underscored(module));
  };
  const auto builtin = e.text(fmt::format("/lib/modules/{}/modules.builtin", e.host.kernel.value_or("?")));

  std::vector<Source> forgotten, late;
  std::set<std::string> late_modules;
  std::vector<std::string> mend;
  for (const Given& device : devices) {
    const std::string id = fmt::format("{:04x}:{:04x}", device.vendor, device.device);
    if (!device.by_rule && lower(ids).find(id) == std::string::npos) {
      forgotten.push_back({udev_rules, fmt::format("no line for {}", device.address)});
      continue;
    }
    for (const Rival& rival : rivals) {
      if ((rival.vendor != 0 && rival.vendor != device.vendor) ||
          (device.class_code & rival.class_mask) != rival.class_code)
        continue;
      for (const char* module : rival.modules) {
        if (module == nullptr) continue;
        if (builtin && underscored(*builtin).find(fmt::format("/{}.ko", module)) != std::string::npos) {
          late.push_back({"modules.builtin", fmt::format("{} is part of the kernel and takes {} first",
                                                         module, device.address)});
          late_modules.insert(module);
        }
        const bool ordered =
            std::any_of(softdeps.begin(), softdeps.end(), [&](const Source& s) { return names(s, module); });
        for (const Source& source : early) {
          if (!names(source, module) || ordered) continue;
          late.push_back(source);
          late_modules.insert(module);
        }
      }
    }
  }
  if (!forgotten.empty()) {
    return warn(
        fmt::format("{} of {} devices that virtual machines have now go back to the host's drivers at the "
                    "next boot",
                    forgotten.size(), devices.size()),
        forgotten,
        {"# name them in the node file with mode: passthrough, then:", sudo(e, "bulkhead apply -f FILE")});
  }
  if (!late.empty()) {
    for (const auto& module : late_modules) {
      mend.push_back(fmt::format("echo 'softdep {} pre: vfio-pci' | {}", module,
                                 sudo(e, "tee -a /etc/modprobe.d/bulkhead-vfio.conf")));
    }
    switch (family(e)) {
      case Family::debian:
        mend.push_back("echo vfio-pci | " + sudo(e, "tee -a /etc/initramfs-tools/modules"));
        mend.push_back(sudo(e, "update-initramfs -u"));
        break;
      case Family::rhel:
      case Family::suse:
        mend.push_back("echo 'force_drivers+=\" vfio-pci \"' | " +
                       sudo(e, "tee /etc/dracut.conf.d/bulkhead-vfio.conf"));
        mend.push_back(sudo(e, "dracut -f"));
        break;
      case Family::other:
        mend.push_back("# put vfio-pci into the initramfs, before that driver");
    }
    mend.push_back("# or bring the devices back after each boot: bulkhead apply -f FILE");
    return warn(fmt::format("at the next boot {} may take a device before vfio-pci",
                            listed({late_modules.begin(), late_modules.end()})),
                late, mend);
  }
  return ok(
      fmt::format("{} devices go to vfio-pci at the next boot, before their own drivers", devices.size()),
      {e.text(udev_rules) ? quote(e, udev_rules) : Source{"/etc/modprobe.d", "options vfio-pci"}});
}

}  // namespace

std::vector<Check> boot_rows() {
  return {
      {.id = "kernel.next-boot",
       .title = "The next boot keeps the IOMMU",
       .requirements = {"R1", "R8", "R15"},
       .purposes = for_passthrough,
       .reads = {{How::text, "/boot/grub/grub.cfg"},
                 {How::text, "/boot/grub2/grub.cfg"},
                 {How::text, "/boot/loader/entries/*"},
                 {How::text, "/boot/efi/loader/entries/*"},
                 {How::text, "/efi/loader/entries/*"},
                 {How::text, "/proc/cmdline"}},
       .why = "The file that is edited is not the file that is booted: what counts is what the boot loader "
              "holds.",
       .judge = next_arguments},
      {.id = "vfio.boot",
       .title = "vfio-pci gets its devices first",
       .requirements = {"R19"},
       .purposes = for_passthrough,
       .reads = {{How::text, udev_rules},
                 {How::text, "/etc/modprobe.d/*"},
                 {How::text, "/etc/initramfs-tools/modules"},
                 {How::text, "/etc/dracut.conf.d/*"},
                 {How::text, "/lib/modules/*/modules.builtin"},
                 {How::text, "/proc/cmdline"},
                 {How::text, "/sys/bus/pci/devices/*/vendor"},
                 {How::text, "/sys/bus/pci/devices/*/device"},
                 {How::text, "/sys/bus/pci/devices/*/class"}},
       .why =
           "A binding lasts until the next boot. A driver in the initramfs or in the kernel itself is there "
           "before any rule of the root file system.",
       .judge = vfio_at_boot},
  };
}

}  // namespace bulkhead::doctor
