// GPUs as PCI devices: windows, links, virtual functions, interrupts, the firmware's own description.
#include <algorithm>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/doctor/rows.hpp"

namespace bulkhead::doctor {

namespace {

constexpr std::uint64_t four_gib = 1ULL << 32U;

struct Window {
  std::uint64_t start = 0, end = 0, flags = 0;
  bool assigned() const { return end != 0; }
  std::uint64_t size() const { return assigned() ? end - start + 1 : 0; }
};

// Lines 0 to 5 of a sysfs `resource` file: the BARs.
std::vector<Window> bars_of(const Evidence& e, const inventory::PciDevice& device) {
  std::vector<Window> windows;
  if (const auto& text = e.text(sysfs(device, "resource"))) {
    for (const auto line : split_lines(*text)) {
      if (windows.size() == 6) break;
      Window window;
      std::uint64_t* fields[] = {&window.start, &window.end, &window.flags};
      std::size_t i = 0;
      for (auto word : split(trim(line), ' ')) {
        if (word.starts_with("0x")) word.remove_prefix(2);
        if (i < 3) *fields[i++] = parse_u64(word, 16).value_or(0);
      }
      windows.push_back(window);
    }
    return windows;
  }
  windows.resize(6);
  for (const auto& bar : device.bars) {
    if (bar.index < 6 && bar.size > 0) windows[bar.index] = {bar.start, bar.start + bar.size - 1, bar.flags};
  }
  return windows;
}

std::vector<std::string> bar_mend() {
  return {
      "# firmware setup: enable \"Above 4G Decoding\" and enlarge \"MMIO High Size\" (at least 256 GB a "
      "GPU), then restart",
      "# inside a virtual machine: enlarge the 64-bit MMIO window (OVMF: -fw_cfg "
      "name=opt/ovmf/X-PciMmio64Mb,string=262144)"};
}

Judgement bar_assigned(const Evidence& e) {
  const auto gpus = all_gpus(e);
  if (gpus.empty()) return unknown("no GPU is on the PCI bus");
  std::vector<Source> broken;
  std::size_t judged = 0;
  for (const auto* device : gpus) {
    const auto windows = bars_of(e, *device);
    const bool any =
        std::any_of(windows.begin(), windows.end(), [](const Window& w) { return w.assigned(); });
    const auto& config = e.text(sysfs(*device, "config"));
    if (!config && !any && !e.text(sysfs(*device, "resource"))) continue;
    if (config && config->starts_with("\xff\xff\xff\xff"))
      continue;  // off the bus: reads all ones (check gpu.lost)
    ++judged;
    if (config && config->size() >= 64) {
      // An unassigned BAR has an all-zero resource line while its register keeps the type bits.
      for (std::size_t i = 0; i < windows.size(); ++i) {
        const auto low = static_cast<unsigned char>((*config)[0x10 + 4 * i]);
        if ((low & 0x0fU) != 0 && !windows[i].assigned()) {
          broken.push_back(
              {sysfs(*device, "resource"),
               fmt::format("line {} is zero, while configuration register {:#x} has type bits {:#x}", i,
                           0x10 + 4 * i, low & 0x0fU)});
        }
        if ((low & 0x06U) == 0x04U) ++i;  // a 64-bit BAR takes two registers
      }
    }
    if (!any) broken.push_back({sysfs(*device, "resource"), "no BAR has a window"});
  }
  if (broken.empty()) {
    if (judged == 0)
      return unknown("the GPUs' windows cannot be read", {quote(e, sysfs(*gpus.front(), "resource"))});
    return ok(fmt::format("every BAR of {} GPUs has a window", judged),
              {quote(e, sysfs(*gpus.front(), "resource"))});
  }
  // The kernel's words have changed between releases: they support the finding, they never make it.
  if (e.kernel_log) {
    for (const char* words : {"can't assign; no space", "no space for", "failed to assign",
                              "This PCI I/O region assigned to your NVIDIA device is invalid"}) {
      if (const auto line = line_with(e.kernel_log->text, words))
        broken.push_back({e.kernel_log->source, *line});
    }
  }
  return fail("a GPU has a BAR without a window: its driver cannot start", broken, bar_mend());
}

// Lines 7 to 12 of `resource` are the windows of all virtual functions of a device together.
Judgement vf_windows(const Evidence& e) {
  std::vector<Source> none;
  std::size_t judged = 0;
  for (const auto* device : all_gpus(e)) {
    if (!device->vfs_total || *device->vfs_total == 0) continue;
    const std::string path = sysfs(*device, "resource");
    const auto& text = e.text(path);
    if (!text) continue;
    const auto lines = split_lines(*text);
    if (lines.size() < 13) continue;  // a kernel without SR-IOV
    ++judged;
    const bool any = std::any_of(lines.begin() + 7, lines.begin() + 13, [](std::string_view line) {
      const auto words = split(trim(line), ' ');
      return words.size() == 3 && words[1].find_first_not_of("0x") != std::string_view::npos;
    });
    if (!any)
      none.push_back(
          {path, fmt::format("lines 7 to 12 are zero, sriov_totalvfs says {}", *device->vfs_total)});
  }
  if (judged == 0) {
    if (virtual_machine(e)) return ask_the_host(e, "no GPU shows windows of virtual functions");
    return ok("no GPU here has virtual functions to make room for");
  }
  if (none.empty()) return ok(fmt::format("{} GPUs have room for their virtual functions", judged));
  return warn(
      fmt::format("{} of {} GPUs have no room for virtual functions: making one answers ENOMEM", none.size(),
                  judged),
      none,
      std::vector<std::string>{"# firmware setup: enable \"SR-IOV Support\" and \"Above 4G Decoding\", "
                               "enlarge \"MMIO High Size\""} +
          kernel_arguments(e, "pci=realloc"));
}

Judgement above_4g(const Evidence& e) {
  const auto gpus = all_gpus(e);
  for (const auto* device : gpus) {
    for (const Window& window : bars_of(e, *device)) {
      if (window.start >= four_gib) {
        return ok("GPU windows lie above 4 GiB",
                  {{sysfs(*device, "resource"), fmt::format("{:#x}-{:#x}", window.start, window.end)}});
      }
    }
  }
  const std::string iomem = "/proc/iomem";
  const auto& text = e.text(iomem);
  if (!text)
    return unknown("neither a GPU window nor /proc/iomem shows where windows may lie", {quote(e, iomem)});
  bool zeros = true;
  std::optional<std::string> high, low;
  for (const auto line : split_lines(*text)) {
    const auto range = trim(line.substr(0, line.find(':')));
    const std::size_t dash = range.find('-');
    if (dash == std::string_view::npos) continue;
    const auto start = parse_u64(range.substr(0, dash), 16), end = parse_u64(range.substr(dash + 1), 16);
    if (end && *end != 0) zeros = false;
    if (line.find("PCI Bus") == std::string_view::npos) continue;
    (start && *start >= four_gib ? high : low) = std::string(trim(line));
  }
  if (high) return ok("the firmware opened a PCI window above 4 GiB", {{iomem, *high}});
  if (zeros)
    return unknown("the kernel shows zeros to users without privilege", {{iomem, "00000000-00000000 ..."}},
                   as_root(e));
  if (gpus.empty()) return unknown("no GPU is on the PCI bus");
  return fail("no PCI window lies above 4 GiB: Above 4G Decoding is off",
              {{iomem, low.value_or("no line \"PCI Bus\" at 100000000 or higher")}}, bar_mend());
}

Judgement bar_covers_memory(const Evidence& e) {
  std::vector<Source> small;
  std::size_t judged = 0;
  for (const auto& gpu : e.host.gpus) {
    std::uint64_t largest = 0;
    for (const Window& window : bars_of(e, gpu.pci)) largest = std::max(largest, window.size());
    if (largest == 0 || gpu.memory.count == 0) continue;
    ++judged;
    if (largest < gpu.memory.count) {
      small.push_back({sysfs(gpu.pci, "resource"), fmt::format("largest window {}, memory {}",
                                                               human(Bytes(largest)), human(gpu.memory))});
    }
  }
  if (judged == 0) return unknown("no GPU shows both its windows and its memory");
  if (small.empty()) return ok("each GPU's window covers its memory");
  return warn("a GPU's window is smaller than its memory", small, bar_mend());
}

Judgement address_width(const Evidence& e) {
  const auto& cpus = e.text("/proc/cpuinfo");
  if (!cpus) return unknown("the CPU cannot be identified", {quote(e, "/proc/cpuinfo")});
  const auto flags = line_with(*cpus, "flags");
  const auto sizes = value_of(*cpus, "address sizes", ':');
  if (!sizes)
    return unknown("the CPU does not state its address width",
                   {{"/proc/cpuinfo", "no line \"address sizes\""}});
  const auto bits = parse_u64(sizes->substr(0, sizes->find(' ')));
  const Source source{"/proc/cpuinfo", "address sizes : " + *sizes};
  if (!bits) return unknown("the CPU's address width cannot be understood", {source});
  std::uint64_t top = 0;
  for (const auto* device : all_gpus(e)) {
    for (const Window& window : bars_of(e, *device)) top = std::max(top, window.end);
  }
  const bool long_mode = !flags || has_word(*flags, "lm");
  if (!long_mode || *bits <= 36 || (*bits < 64 && (top >> *bits) != 0)) {
    return fail(fmt::format("{} physical address bits cannot hold the GPUs' windows", *bits), {source},
                {"# firmware setup: lift the limit on physical address width (\"Limit CPU PA to 46 bits\" "
                 "and the like); in a VM: -cpu host,host-phys-bits=on"});
  }
  return ok(fmt::format("{} physical address bits", *bits), {source});
}

Judgement link(const Evidence& e) {
  std::vector<Source> bad;
  std::size_t judged = 0;
  for (const auto& gpu : e.host.gpus) {
    if (!gpu.pci.link_max || !gpu.pci.link_now) continue;
    ++judged;
    const auto& most = *gpu.pci.link_max;
    const auto& now = *gpu.pci.link_now;
    if (now.width != 0 && now.width < most.width) {
      bad.push_back(
          {sysfs(gpu.pci, "current_link_width"), fmt::format("{} of {} lanes", now.width, most.width)});
    }
    if (most.speed_gts < 16.0)
      bad.push_back(
          {sysfs(gpu.pci, "max_link_speed"), fmt::format("{} GT/s: below PCIe 4.0", most.speed_gts)});
    // An idle GPU lowers its link to 2.5 GT/s and raises it under load: slow counts only when there is load.
    if (gpu.busy() && now.speed_gts > 0 && now.speed_gts < most.speed_gts) {
      bad.push_back({sysfs(gpu.pci, "current_link_speed"),
                     fmt::format("{} of {} GT/s with a process at work", now.speed_gts, most.speed_gts)});
    }
  }
  if (judged == 0) return unknown("no GPU shows its PCIe link");
  if (bad.empty()) return ok(fmt::format("{} links at full width; a low speed while idle is normal", judged));
  return warn("a GPU's PCIe link gives less than it could", bad,
              {"# reseat the GPU or its riser, and look for link errors:",
               fmt::format("cat {}", bad.front().where.substr(0, bad.front().where.rfind('/')) +
                                         "/aer_dev_correctable")});
}

Judgement virtual_functions(const Evidence& e) {
  if (e.host.gpus.empty()) return unknown("no GPU answers");
  std::vector<Source> without;
  std::optional<Source> with;
  for (const auto& gpu : e.host.gpus) {
    if (gpu.pci.vfs_total && *gpu.pci.vfs_total > 0) {
      with = Source{sysfs(gpu.pci, "sriov_totalvfs"), fmt::format("{}", *gpu.pci.vfs_total)};
    } else {
      without.push_back({sysfs(gpu.pci, "sriov_totalvfs"),
                         gpu.pci.vfs_total ? "0" : fmt::format("({})", gpu.pci.vfs_total.why)});
    }
  }
  if (without.empty() && with) return ok("every GPU has the SR-IOV capability", {*with});
  if (virtual_machine(e)) return ask_the_host(e, "a passed-through GPU shows no SR-IOV capability");
  return warn(fmt::format("{} of {} GPUs offer no virtual functions: whole-GPU passthrough and MIG remain",
                          without.size(), e.host.gpus.size()),
              without,
              {"# firmware setup: enable \"SR-IOV Support\"; a chip without the capability cannot gain it"});
}

Judgement smbios(const Evidence& e) {
  const std::string path = "/sys/firmware/dmi/tables/DMI";
  const auto& table = e.text(path);
  if (!table) {
    if (virtual_machine(e)) return ask_the_host(e, "there is no readable SMBIOS table");
    return unknown("the SMBIOS table cannot be read", {quote(e, path)}, as_root(e));
  }
  // Walk the structures: type, length, handle; the formatted part; strings up to two zero bytes
  // (DSP0134 6.1).
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>((*table)[i]); };
  std::optional<bool> uefi;
  unsigned structures = 0, sockets = 0, slots = 0;
  std::vector<std::string> firmware, board;
  for (std::size_t at = 0; at + 4 <= table->size() && structures < 4096;) {
    const unsigned type = byte(at), length = byte(at + 1);
    if (length < 4 || at + length > table->size()) break;
    std::size_t end = at + length;
    while (end + 1 < table->size() && (byte(end) != 0 || byte(end + 1) != 0)) ++end;
    // The n-th string after the formatted part; 0 and numbers beyond the last are no string.
    const auto string_at = [&](std::size_t field, std::vector<std::string>& into) {
      if (field >= length) return;
      unsigned number = byte(at + field);
      for (std::size_t from = at + length; number > 0 && from < end;) {
        const std::size_t zero = std::min(table->find('\0', from), end);
        if (--number == 0)
          into.push_back(printable(trim(std::string_view(*table).substr(from, zero - from)), 64));
        from = zero + 1;
      }
    };
    if (type == 0) {
      if (length >= 0x14) uefi = (byte(at + 0x13) & 0x08U) != 0;  // type 0, extension byte 2, bit 3
      for (const std::size_t field : {0x04U, 0x05U, 0x08U}) string_at(field, firmware);
    }
    if (type == 2 && board.empty())
      for (const std::size_t field : {0x04U, 0x05U, 0x06U}) string_at(field, board);
    if (type == 4) ++sockets;
    if (type == 9) ++slots;
    ++structures;
    at = end + 2;
    if (type == 127) break;
  }
  std::string words =
      fmt::format("{} structures, {} processor sockets, {} slots, UEFI {}", structures, sockets, slots,
                  !uefi   ? "not stated"
                  : *uefi ? "yes"
                          : "no");
  if (!firmware.empty()) words += ", firmware " + join(firmware, " ");
  if (!board.empty()) words += ", board " + join(board, " ");
  const Source source{path, words};
  if (structures == 0 || !uefi)
    return warn("the firmware's SMBIOS table is unusable as a baseline", {source},
                {sudo(e, "dmidecode -t 0,1,4")});
  if (!*uefi && !virtual_machine(e)) {
    return warn("the firmware booted in legacy mode: large windows and SR-IOV usually need UEFI", {source},
                {"# firmware setup: boot mode UEFI, CSM off"});
  }
  return ok(
      "the firmware describes itself; SMBIOS has no bit for SR-IOV, VT-d, ACS or Above 4G: those are read "
      "from "
      "PCI, ACPI and /proc/iomem",
      {source});
}

Judgement message_interrupts(const Evidence& e) {
  const std::string interrupts = "/proc/interrupts", params = "/proc/driver/nvidia/params";
  if (const auto& text = e.text(params)) {
    if (value_of(*text, "EnableMSI", ':') == "0") {
      return fail("the NVIDIA driver is told not to use message-signalled interrupts",
                  {{params, "EnableMSI: 0"}},
                  {sudo(e, "grep -rl NVreg_EnableMSI /etc/modprobe.d/") + "   # remove the option, then:",
                   sudo(e, "reboot")});
    }
  }
  const auto& text = e.text(interrupts);
  if (!text) return unknown("the interrupt table cannot be read", {quote(e, interrupts)});
  std::vector<Source> wired;
  std::optional<Source> messages;
  for (const auto line : split_lines(*text)) {
    if (line.find("nvidia") == std::string_view::npos && line.find("vfio") == std::string_view::npos)
      continue;
    if (line.find("MSI") != std::string_view::npos)
      messages = Source{interrupts, std::string(trim(line))};
    else if (line.find("IO-APIC") != std::string_view::npos)
      wired.push_back({interrupts, std::string(trim(line))});
  }
  if (!wired.empty()) {
    return fail("a GPU uses a wired interrupt: MSI and MSI-X are off for it", wired,
                {"grep . /sys/bus/pci/devices/*/msi_bus   # 0 on a bridge turns MSI off below it",
                 "grep -o pci=nomsi /proc/cmdline"});
  }
  if (!messages)
    return unknown("no interrupt of a GPU is registered at the moment",
                   {{interrupts, "no line of nvidia or vfio"}});
  return ok("GPU interrupts are message-signalled", {*messages});
}

Judgement numa(const Evidence& e) {
  if (e.host.numa.size() < 2) {
    if (virtual_machine(e))
      return unknown("the virtual machine shows one NUMA node; the real one is known to its host");
    return ok("one NUMA node: every CPU is equally near");
  }
  std::vector<Source> lost;
  // Those of virtual machines and those without a driver too: their guests are pinned by the same number.
  const auto gpus = all_gpus(e);
  for (const auto* device : gpus) {
    if (!device->numa_node) lost.push_back({sysfs(*device, "numa_node"), "-1"});
  }
  if (gpus.empty()) return unknown("no GPU is on the PCI bus");
  if (lost.empty()) return ok(fmt::format("each GPU names its NUMA node ({} nodes)", e.host.numa.size()));
  return warn("the firmware does not say which NUMA node a GPU is near", lost,
              {"# firmware setup: NUMA on (AMD: NPS1), newest firmware; tenants on these GPUs are pinned by "
               "hand until then"});
}

}  // namespace

std::vector<Check> pci_rows() {
  return {
      {.id = "pci.bar-assigned",
       .title = "Every GPU window has addresses",
       .requirements = {"R21"},
       .purposes = for_all,
       .reads = {{How::text, "/sys/bus/pci/devices/*/resource"},
                 {How::text, "/sys/bus/pci/devices/*/config"}},
       .why = "A BAR without addresses is the \"BAR allocation error\": neither the NVIDIA driver nor "
              "vfio-pci can use the GPU.",
       .judge = bar_assigned},
      {.id = "pci.vf-windows",
       .title = "Virtual functions have room",
       .requirements = {"R2", "R21"},
       .purposes = for_passthrough,
       .reads = {{How::text, "/sys/bus/pci/devices/*/resource"}},
       .why = "The capability says how many there could be; without windows behind the bridge there is none.",
       .judge = vf_windows},
      {.id = "pci.above-4g",
       .title = "Windows above 4 GiB are allowed",
       .requirements = {"R1", "R15", "R21"},
       .purposes = for_all,
       .reads = {{How::text, "/proc/iomem"}, {How::text, "/sys/bus/pci/devices/*/resource"}},
       .why = "A GPU of 80 GB needs a window of 128 GiB; below 4 GiB there is no room for one.",
       .judge = above_4g},
      {.id = "pci.bar-covers-memory",
       .title = "The GPU's window covers its memory",
       .requirements = {"R21"},
       .purposes = for_all,
       .reads = {{How::text, "/sys/bus/pci/devices/*/resource"}},
       .why = "Peer-to-peer and GPUDirect RDMA reach only what the window shows.",
       .judge = bar_covers_memory},
      {.id = "cpu.address-width",
       .title = "Physical addresses are wide enough",
       .requirements = {"R1"},
       .purposes = for_all,
       .reads = {{How::text, "/proc/cpuinfo"}},
       .why = "GPU windows lie in the 64-bit address space; a CPU or VM with few address bits cannot reach "
              "them.",
       .judge = address_width},
      {.id = "pci.link",
       .title = "PCIe links run at full width",
       .requirements = {"R1"},
       .purposes = for_all,
       .reads = {},
       .why = "A GPU with half its lanes moves half the data, and nothing else reports it.",
       .judge = link},
      {.id = "pci.sriov",
       .title = "GPUs offer virtual functions",
       .requirements = {"R2", "R10", "R15"},
       .purposes = for_passthrough,
       .reads = {{How::text, "/sys/bus/pci/devices/*/sriov_totalvfs"}},
       .why = "The PCI capability is the only proof of SR-IOV: dmidecode has no bit for it.",
       .judge = virtual_functions},
      {.id = "firmware.smbios",
       .title = "SMBIOS baseline is readable",
       .requirements = {"R10"},
       .purposes = for_all,
       .reads = {{How::text, "/sys/firmware/dmi/tables/DMI"}},
       .why = "The baseline identifies board and firmware when machines of a fleet behave differently.",
       .judge = smbios},
      {.id = "pci.message-interrupts",
       .title = "GPUs use message-signalled interrupts",
       .requirements = {"R23"},
       .purposes = for_all,
       .reads = {{How::text, "/proc/interrupts"}, {How::text, "/proc/driver/nvidia/params"}},
       .why =
           "Wired interrupts are shared between devices; VFIO needs MSI or MSI-X to hand a GPU to a guest.",
       .judge = message_interrupts},
      {.id = "pci.numa",
       .title = "GPUs name their NUMA node",
       .requirements = {"R30"},
       .purposes = for_all,
       .reads = {{How::text, "/sys/bus/pci/devices/*/numa_node"}},
       .why = "Pinning a tenant's CPUs near its GPU needs to know where near is.",
       .judge = numa},
  };
}

}  // namespace bulkhead::doctor
