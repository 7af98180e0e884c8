// The platform's half of isolation: is there an IOMMU, is it in force, and whom does each GPU share it with?
#include <fmt/format.h>

#include "base/text.hpp"
#include "core/doctor/rows.hpp"

namespace bulkhead::doctor {

namespace {

constexpr const char* acpi = "/sys/firmware/acpi/tables";
constexpr const char* iommu_class = "/sys/class/iommu";
constexpr const char* groups = "/sys/kernel/iommu_groups";

bool any_iommu(const Evidence& e) {
  const auto& units = e.list(iommu_class);
  return units && !units->empty();
}

std::optional<std::string> acpi_table(const Evidence& e) {
  if (const auto& tables = e.list(acpi)) {
    for (const std::string& name : *tables) {
      if (name == "DMAR" || name == "IVRS" || name == "IORT") return name;
    }
  }
  return std::nullopt;
}

std::vector<std::string> firmware_hint(const Evidence& e) {
  switch (cpu_maker(e)) {
    case CpuMaker::intel:
      return {"# firmware setup: enable \"Intel VT for Directed I/O (VT-d)\""};
    case CpuMaker::amd:
      return {"# firmware setup: enable \"IOMMU\" (AMD CBS > NBIO) and \"SVM mode\""};
    case CpuMaker::other:
      break;
  }
  return {"# firmware setup: enable the IOMMU (VT-d, AMD-Vi, SMMU)"};
}

std::string wanted_arguments(const Evidence& e) {
  // amd_iommu=on is no option of the kernel (drivers/iommu/amd/init.c): AMD's is on unless amd_iommu=off.
  return cpu_maker(e) == CpuMaker::amd ? "iommu=pt" : "intel_iommu=on iommu=pt";
}

Judgement firmware(const Evidence& e) {
  if (const auto table = acpi_table(e))
    return ok(fmt::format("the firmware describes an IOMMU (ACPI table {})", *table), {quote(e, acpi)});
  if (any_iommu(e)) return ok("the kernel runs an IOMMU", {quote(e, iommu_class)});
  if (virtual_machine(e)) return ask_the_host(e, "no ACPI table describes an IOMMU");
  if (!e.list(acpi)) return unknown("the firmware's ACPI tables cannot be listed", {quote(e, acpi)});
  return fail("the firmware offers no IOMMU: neither a DMAR nor an IVRS table", {quote(e, acpi)},
              firmware_hint(e));
}

Judgement kernel(const Evidence& e) {
  if (any_iommu(e))
    return ok(fmt::format("in force: {}", listed(*e.list(iommu_class))), {quote(e, iommu_class)});
  std::vector<Source> evidence{quote(e, iommu_class)};
  const auto& cmdline = e.text("/proc/cmdline");
  const bool asked = cmdline && (has_word(*cmdline, "intel_iommu=on") || has_word(*cmdline, "iommu=pt"));
  if (cmdline) evidence.push_back(quote(e, "/proc/cmdline"));
  if (!acpi_table(e)) {
    if (virtual_machine(e)) return ask_the_host(e, "no IOMMU is in force");
    return waits("iommu.firmware", "the kernel has no IOMMU to run until the firmware offers one");
  }
  for (const char* off : {"intel_iommu=off", "amd_iommu=off", "iommu=off"}) {
    if (cmdline && has_word(*cmdline, off)) {
      return fail(fmt::format("the firmware offers an IOMMU and the command line turns it off ({})", off),
                  evidence, without_kernel_argument(e, off));
    }
  }
  return fail(asked ? "the command line asks for the IOMMU, and none is in force: asking is not having"
                    : "the firmware offers an IOMMU and the kernel does not use it",
              evidence, kernel_arguments(e, wanted_arguments(e)));
}

Judgement translation_mode(const Evidence& e) {
  if (!any_iommu(e))
    return virtual_machine(e) ? ask_the_host(e, "no IOMMU is in force")
                              : waits("iommu.kernel", "no IOMMU is in force");
  std::vector<Source> translated;
  std::size_t seen = 0;
  for (const auto* device : all_gpus(e)) {
    if (!device->iommu_group || on_vfio(*device)) continue;  // VFIO always translates, and must
    const std::string path = fmt::format("{}/{}/type", groups, *device->iommu_group);
    if (!e.text(path)) continue;
    ++seen;
    if (trim(*e.text(path)) != "identity") translated.push_back(quote(e, path));
  }
  if (seen == 0) return unknown("no GPU of this host has a readable IOMMU group type", {quote(e, groups)});
  if (translated.empty()) return ok("the host's own DMA passes untranslated (identity), as iommu=pt asks");
  return warn(
      fmt::format("{} of {} GPUs pay for address translation of the host's own DMA", translated.size(), seen),
      translated, kernel_arguments(e, "iommu=pt"));
}

Judgement boot_arguments(const Evidence& e) {
  const auto& cmdline = e.text("/proc/cmdline");
  if (!cmdline)
    return unknown("the running kernel's command line cannot be read", {quote(e, "/proc/cmdline")});
  std::vector<Source> owed;
  std::vector<std::string> missing;
  const auto look = [&](const std::string& path, std::string_view text) {
    for (const auto raw : split_lines(text)) {
      const auto line = trim(raw);
      const bool grub = path.find("grub") != std::string::npos;
      if (line.starts_with('#') || (grub && !line.starts_with("GRUB_CMDLINE_LINUX"))) continue;
      std::string words(line);
      for (char& c : words) {
        if (c == '"' || c == '\'') c = ' ';
      }
      for (const char* argument : {"intel_iommu=on", "iommu=pt", "intel_iommu=off", "amd_iommu=off"}) {
        if (has_word(words, argument) && !has_word(*cmdline, argument)) {
          owed.push_back({path, std::string(line)});
          missing.emplace_back(argument);
        }
      }
    }
  };
  for (const char* pattern : {"/etc/default/grub", "/etc/default/grub.d/*", "/etc/kernel/cmdline"}) {
    for (const auto& [path, text] : e.matching(pattern)) look(path, text);
  }
  if (owed.empty())
    return ok("the kernel runs with the IOMMU arguments that the boot configuration names",
              {quote(e, "/proc/cmdline")});
  owed.push_back(quote(e, "/proc/cmdline"));
  return warn(
      fmt::format("configured but not in force until the boot files are made anew and the host restarts: {}",
                  listed(missing)),
      owed,
      family(e) == Family::debian ? std::vector{sudo(e, "update-grub"), sudo(e, "reboot")}
      : family(e) == Family::rhel
          ? std::vector{sudo(e, fmt::format("grubby --update-kernel=ALL --args='{}'", join(missing, " "))),
                        sudo(e, "reboot")}
      : family(e) == Family::suse ? std::vector{sudo(e, "update-bootloader --config"), sudo(e, "reboot")}
                                  : std::vector{sudo(e, "reboot")});
}

Judgement gpu_groups(const Evidence& e) {
  const auto gpus = all_gpus(e);
  if (gpus.empty()) return unknown("no GPU is on the PCI bus");
  if (!any_iommu(e))
    return virtual_machine(e) ? ask_the_host(e, "GPUs have no IOMMU group here")
                              : waits("iommu.kernel", "no IOMMU is in force");
  std::vector<std::string> without;
  for (const auto* device : gpus) {
    if (!device->iommu_group) without.push_back(device->address.str());
  }
  if (without.empty())
    return ok(fmt::format("each of {} GPUs is in an IOMMU group", gpus.size()), {quote(e, groups)});
  return fail(
      fmt::format("no IOMMU group: {}", listed(without)),
      {quote(e, sysfs(*gpus.front(), "iommu_group")), quote(e, groups)},
      {"# the IOMMU covers other devices but not these: look for a DMAR/IVRS entry that leaves their bus out",
       sudo(e, "dmesg") + " | grep -iE 'dmar|amd-vi|iommu'"});
}

// PCI class codes, base and sub class.
struct ClassName {
  unsigned code;
  const char* name;
};
constexpr ClassName critical_classes[] = {{0x0100, "SCSI"},     {0x0101, "IDE"},        {0x0104, "RAID"},
                                          {0x0106, "SATA"},     {0x0107, "SAS"},        {0x0108, "NVMe"},
                                          {0x0200, "Ethernet"}, {0x0207, "InfiniBand"}, {0x0c03, "USB"}};

Judgement isolation(const Evidence& e) {
  if (!any_iommu(e))
    return virtual_machine(e) ? ask_the_host(e, "IOMMU groups are not visible")
                              : waits("iommu.kernel", "no IOMMU is in force");
  std::vector<Source> critical, shared;
  std::vector<std::string> who;
  const auto gpus = all_gpus(e);
  for (const auto* device : gpus) {
    for (const PciAddress& sibling : device->group_siblings) {
      if (sibling == device->address) continue;
      PciAddress same = sibling;
      same.function = device->address.function;
      if (same == device->address) continue;  // the GPU's own audio, USB-C or VF functions travel with it
      const std::string path = fmt::format("/sys/bus/pci/devices/{}/class", sibling.str());
      const auto& text = e.text(path);
      std::string_view digits = text ? trim(*text) : std::string_view();
      if (digits.starts_with("0x")) digits.remove_prefix(2);
      const unsigned code = static_cast<unsigned>(parse_u64(digits, 16).value_or(0)) >> 8U;
      if (code == 0x0604) continue;  // bridges in a group are the kernel's business and need no unbinding
      const ClassName* kind = nullptr;
      for (const auto& row : critical_classes) {
        if (row.code == code) kind = &row;
      }
      if (kind != nullptr) {
        critical.push_back({path, fmt::format("{} ({}), in group {} with the GPU {}", digits, kind->name,
                                              *device->iommu_group, device->address.str())});
        who.push_back(fmt::format("{} {}", kind->name, sibling.str()));
      } else {
        shared.push_back({path, fmt::format("{} in group {} with the GPU {}", digits.empty() ? "?" : digits,
                                            *device->iommu_group, device->address.str())});
      }
    }
  }
  const std::vector<std::string> move{
      "# move the GPU to a slot below another root port, or enable ACS in the firmware setup",
      "find /sys/kernel/iommu_groups/ -type l | sort -V"};
  if (!critical.empty())
    return fail(fmt::format("a GPU cannot be handed out without {}", listed(who)), critical, move);
  if (!shared.empty())
    return warn("a GPU shares its IOMMU group: everything in it goes to one tenant", shared, move);
  return ok("no GPU shares its IOMMU group with a foreign device");
}

Judgement noiommu(const Evidence& e) {
  std::vector<Source> evidence;
  for (const auto& [path, text] : e.matching("/sys/kernel/iommu_groups/*/name")) {
    if (text.find("vfio-noiommu") != std::string::npos) evidence.push_back({path, text});
  }
  for (const auto& [path, node] : e.nodes) {
    if (path.starts_with("/dev/vfio/noiommu-")) evidence.push_back(quote(e, path));
  }
  const std::string parameter = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";
  if (e.text(parameter) && trim(*e.text(parameter)) == "Y") evidence.push_back(quote(e, parameter));
  if (evidence.empty()) return ok("no VFIO group without an IOMMU");
  return fail(
      "VFIO is allowed to work without an IOMMU: such a group isolates nothing", evidence,
      {sudo(e, "sh -c 'echo N > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode'"),
       sudo(e, "grep -rl enable_unsafe_noiommu_mode /etc/modprobe.d/") + "   # and remove the option there"});
}

// ecap bit 3 of a VT-d unit: interrupt remapping supported (VT-d specification, Extended Capability
// Register).
std::optional<bool> vtd_remaps(const Evidence& e) {
  std::optional<bool> all;
  for (const auto& [path, text] : e.matching("/sys/class/iommu/*/intel-iommu/ecap")) {
    if (const auto bits = parse_u64(trim(text), 16)) all = all.value_or(true) && (*bits & 8U) != 0;
  }
  return all;
}

Judgement interrupt_remapping(const Evidence& e) {
  const std::string unsafe = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
  if (e.text(unsafe) && trim(*e.text(unsafe)) == "Y") {
    return fail(
        "a guest may forge interrupts: allow_unsafe_interrupts is on", {quote(e, unsafe)},
        {sudo(e, "grep -rl allow_unsafe_interrupts /etc/modprobe.d/") + "   # remove the option, then:",
         sudo(e, "reboot")});
  }
  const std::string interrupts = "/proc/interrupts";
  if (const auto& text = e.text(interrupts)) {
    if (const auto line = line_with(*text, "IR-"))
      return ok("interrupts are remapped", {{interrupts, *line}});
  }
  if (!any_iommu(e))
    return virtual_machine(e) ? ask_the_host(e, "no interrupt is remapped")
                              : waits("iommu.kernel", "no IOMMU is in force");
  if (!e.text(interrupts)) return unknown("the interrupt table cannot be read", {quote(e, interrupts)});
  const auto capable = vtd_remaps(e);
  std::vector<Source> evidence{{interrupts, "no line with \"IR-\""}};
  for (const auto& [path, text] : e.matching("/sys/class/iommu/*/intel-iommu/ecap"))
    evidence.push_back({path, text});
  if (capable && !*capable) {
    return fail("this IOMMU cannot remap interrupts: VFIO binds and then refuses the container with EPERM",
                evidence,
                {"# firmware setup: enable interrupt remapping (x2APIC); a platform without it cannot pass "
                 "devices through safely"});
  }
  return fail("interrupts are not remapped: VFIO binds and then refuses the container with EPERM", evidence,
              std::vector<std::string>{"# firmware setup: enable interrupt remapping / x2APIC"} +
                  without_kernel_argument(e, "intremap=off"));
}

}  // namespace

std::vector<Check> iommu_rows() {
  return {
      {.id = "iommu.firmware",
       .title = "Firmware offers an IOMMU",
       .requirements = {"R1", "R15"},
       .purposes = for_passthrough,
       .reads = {{How::names, acpi},
                 {How::names, iommu_class},
                 {How::text, "/proc/cpuinfo"},
                 {How::text, "/sys/firmware/dmi/tables/DMI"},
                 {How::text, "/sys/class/dmi/id/sys_vendor"},
                 {How::text, "/sys/class/dmi/id/product_name"},
                 {How::text, "/etc/os-release"}},
       .why = "Without an IOMMU a device handed to a tenant can read and write all of the host's memory.",
       .judge = firmware},
      {.id = "iommu.kernel",
       .title = "The IOMMU is in force",
       .requirements = {"R1", "R8", "R15"},
       .purposes = for_passthrough,
       .reads = {{How::names, iommu_class}, {How::names, acpi}, {How::text, "/proc/cmdline"}},
       .why = "The kernel prints \"IOMMU enabled\" for the argument alone. Only a registered IOMMU "
              "translates and isolates.",
       .judge = kernel},
      {.id = "iommu.host-dma",
       .title = "The host's own DMA is not translated",
       .requirements = {"R8"},
       .purposes = for_passthrough,
       .reads = {{How::text, "/sys/kernel/iommu_groups/*/type"}, {How::names, groups}},
       .why = "With iommu=pt only devices given away pay for translation; others keep full speed. It adds no "
              "isolation.",
       .judge = translation_mode},
      {.id = "kernel.boot-arguments",
       .title = "Boot configuration and running kernel agree",
       .requirements = {"R8", "R15"},
       .purposes = for_passthrough,
       .reads = {{How::text, "/proc/cmdline"},
                 {How::text, "/etc/default/grub"},
                 {How::text, "/etc/default/grub.d/*"},
                 {How::text, "/etc/kernel/cmdline"}},
       .why = "An argument written to the boot configuration does nothing until the boot files are made anew "
              "and the host restarts.",
       .judge = boot_arguments},
      {.id = "iommu.gpu-groups",
       .title = "Each GPU is in an IOMMU group",
       .requirements = {"R1", "R16"},
       .purposes = for_passthrough,
       .reads = {{How::names, groups}, {How::link, "/sys/bus/pci/devices/*/iommu_group"}},
       .why = "A device without a group cannot be given to a guest by VFIO.",
       .judge = gpu_groups},
      {.id = "iommu.isolation",
       .title = "GPUs share no group with the host's devices",
       .requirements = {"R16"},
       .purposes = for_passthrough,
       .reads = {{How::text, "/sys/bus/pci/devices/*/class"}},
       .why = "A group is handed out whole: a disk, network or USB controller in it would leave the host "
              "with the GPU.",
       .judge = isolation},
      {.id = "iommu.noiommu",
       .title = "VFIO never works without the IOMMU",
       .requirements = {"R1", "R16"},
       .purposes = for_passthrough,
       .reads = {{How::text, "/sys/kernel/iommu_groups/*/name"},
                 {How::node, "/dev/vfio/*"},
                 {How::text, "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"}},
       .why = "A no-IOMMU group looks like a group and isolates nothing: its guest can read and write all "
              "memory.",
       .judge = noiommu},
      {.id = "iommu.interrupt-remapping",
       .title = "Interrupts are remapped",
       .requirements = {"R1", "R23"},
       .purposes = for_passthrough,
       .reads = {{How::text, "/proc/interrupts"},
                 {How::text, "/sys/class/iommu/*/intel-iommu/ecap"},
                 {How::text, "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"}},
       .why = "Without remapping a guest's device can forge interrupts of the host; VFIO refuses to start "
              "(VFIO_SET_IOMMU: EPERM).",
       .judge = interrupt_remapping},
  };
}

}  // namespace bulkhead::doctor
