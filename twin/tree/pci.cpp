// /sys/bus/pci, /sys/devices/pci*, /sys/kernel/iommu_groups, /sys/class/iommu. Attributes as on the H100 host
// read in facts hosts/h100-sxm-80gb.json; what bare metal adds to them (IOMMU, AER, SR-IOV) as facts
// passthrough.md says.
#include <algorithm>
#include <cstring>
#include <map>
#include <set>

#include <fmt/format.h>

#include "base/text.hpp"
#include "twin/tree/writer.hpp"

namespace bulkhead::twin {

namespace {

struct Window {
  std::uint64_t first = ~0ULL, last = 0;
  bool used() const { return first <= last; }
  void add(std::uint64_t start, std::uint64_t size) {
    first = std::min(first, start);
    last = std::max(last, start + size - 1);
  }
  void add(const Window& other) {
    if (!other.used()) return;
    first = std::min(first, other.first);
    last = std::max(last, other.last);
  }
};

// Addresses given out in the order of the buses; a bridge forwards what lies behind it.
struct Addresses {
  std::uint64_t next32 = 0x80000000ULL;
  std::uint64_t next64 = 0x20000000000ULL;  // 2 TiB: above the memory of any profile
  std::uint64_t take(std::uint64_t size, bool wide) {
    std::uint64_t& next = wide ? next64 : next32;
    next = (next + size - 1) / size * size;
    const auto start = next;
    next += size;
    return start;
  }
  void align() {  // bridge windows have a granularity of 1 MiB
    next32 = (next32 + 0xfffff) & ~0xfffffULL;
    next64 = (next64 + 0xfffff) & ~0xfffffULL;
  }
};

struct Placed {
  std::vector<BarSpec> bars;  // 0..5 and 7..12 (virtual functions' together)
  Window window32, window64;  // of a bridge
};

bool is_wide(std::uint64_t flags) { return (flags & 0x100000U) != 0; }  // IORESOURCE_MEM_64

void place(const Host& host, const State& state, std::size_t index, Addresses& free,
           std::vector<Placed>& placed) {
  const PciFunction& f = host.pci[index];
  Placed& out = placed[index];
  std::vector<BarSpec> bars = f.bars;
  if (f.vfs_total > 0 && f.gpu != none) {
    // No GPU's VF BARs were read. Derived: registers of 256 KiB, and the BAR1 window shared out evenly.
    const Chip& chip = state.chips[state.gpus[f.gpu].chip];
    bars.push_back({.index = 7, .size = f.vfs_total * 0x40000ULL, .flags = 0x14220c});
    bars.push_back(
        {.index = 8, .size = std::max<std::uint64_t>(chip.bar1_bytes, 1U << 20U), .flags = 0x14220c});
  }
  std::stable_sort(bars.begin(), bars.end(),
                   [](const BarSpec& a, const BarSpec& b) { return a.size > b.size; });
  for (auto& bar : bars) {
    if (bar.start == 0) {
      std::uint64_t round = 1;  // VF BARs of all functions together need not be a power of two
      while (round < bar.size) round <<= 1U;
      bar.start = free.take(round, is_wide(bar.flags));
    }
    out.bars.push_back(bar);
  }
  if (f.is_bridge) free.align();
  for (std::size_t child = 0; child < host.pci.size(); ++child) {
    if (host.pci[child].parent != static_cast<int>(index)) continue;
    place(host, state, child, free, placed);
    for (const auto& bar : placed[child].bars)
      (is_wide(bar.flags) ? out.window64 : out.window32).add(bar.start, bar.size);
    out.window32.add(placed[child].window32);
    out.window64.add(placed[child].window64);
  }
  if (f.is_bridge) free.align();
}

void buses_behind(const Host& host, std::size_t index, unsigned& low, unsigned& high) {
  for (std::size_t child = 0; child < host.pci.size(); ++child) {
    if (host.pci[child].parent != static_cast<int>(index)) continue;
    low = std::min(low, host.pci[child].bus);
    high = std::max(high, host.pci[child].bus);
    buses_behind(host, child, low, high);
  }
}

// Configuration space: header, power management, MSI, PCI Express; AER, ACS, ARI and SR-IOV in the extended
// part.
class Config {
 public:
  explicit Config(std::size_t size) : bytes_(size, '\0') {}
  void u8(std::size_t at, std::uint64_t value) { put(at, value, 1); }
  void u16(std::size_t at, std::uint64_t value) { put(at, value, 2); }
  void u32(std::size_t at, std::uint64_t value) { put(at, value, 4); }
  const std::string& bytes() const { return bytes_; }

 private:
  void put(std::size_t at, std::uint64_t value, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) bytes_[at + i] = static_cast<char>((value >> (8 * i)) & 0xffU);
  }
  std::string bytes_;
};

std::string config_space(const Host& host, std::size_t index, const Placed& placed) {
  const PciFunction& f = host.pci[index];
  const bool express = f.link_generation > 0;
  Config c(express ? 4096 : 256);
  c.u16(0x00, f.vendor);
  c.u16(0x02, f.device_id);
  c.u16(0x04, f.driver.empty() ? 0x0002 : 0x0406);  // memory, bus master, INTx off
  c.u16(0x06, express ? 0x0010 : 0x0000);           // capability list
  c.u8(0x08, f.revision);
  c.u8(0x09, f.class_code & 0xffU);
  c.u16(0x0a, f.class_code >> 8U);
  c.u8(0x0c, 0x10);
  c.u8(0x0e, f.is_bridge ? 0x01 : 0x00);
  for (const auto& bar : placed.bars) {
    if (bar.index > 5) continue;
    const std::uint64_t type = is_wide(bar.flags) ? 0xcU : 0x0U;
    c.u32(0x10 + 4 * bar.index, (bar.start & 0xfffffff0U) | type);
    if (is_wide(bar.flags) && bar.index < 5) c.u32(0x14 + 4 * bar.index, bar.start >> 32U);
  }
  if (f.is_bridge) {
    unsigned low = 255, high = f.bus;
    buses_behind(host, index, low, high);
    c.u8(0x18, f.bus);
    c.u8(0x19, low == 255 ? f.bus : low);
    c.u8(0x1a, high);
    const auto closed = [](const Window& w) { return w.used() ? w : Window{.first = 0xfff00000, .last = 0}; };
    const Window w32 = closed(placed.window32), w64 = closed(placed.window64);
    c.u16(0x20, (w32.first >> 16U) & 0xfff0U);
    c.u16(0x22, (w32.last >> 16U) & 0xfff0U);
    c.u16(0x24, ((w64.first >> 16U) & 0xfff0U) | 1U);
    c.u16(0x26, ((w64.last >> 16U) & 0xfff0U) | 1U);
    c.u32(0x28, placed.window64.used() ? w64.first >> 32U : 0);
    c.u32(0x2c, placed.window64.used() ? w64.last >> 32U : 0);
  } else {
    c.u16(0x2c, f.subsystem_vendor);
    c.u16(0x2e, f.subsystem_device);
    c.u8(0x3d, 1);
  }
  c.u8(0x3c, f.irq & 0xffU);
  if (!express) return c.bytes();
  c.u8(0x34, 0x60);
  c.u16(0x60, 0x6801);  // power management, next 0x68
  c.u16(0x62, 0x4803);
  c.u16(0x68, 0x7805);  // MSI, next 0x78
  c.u16(0x6a, 0x0081);
  c.u16(0x78, 0x0010);  // PCI Express, last
  const bool on_root = f.parent < 0;
  const unsigned port_type = !f.is_bridge                                              ? 0U
                             : on_root                                                 ? 4U
                             : host.pci[static_cast<std::size_t>(f.parent)].parent < 0 ? 5U
                                                                                       : 6U;
  c.u16(0x7a, 0x0002U | (port_type << 4U));
  c.u32(0x7c, (f.reset_method.find("flr") != std::string::npos ? 1U << 28U : 0U) | 0x8fe1U);
  c.u32(0x84, f.link_generation | (f.link_width << 4U));
  c.u16(0x8a, f.link_generation_now | (f.link_width_now << 4U));
  if (f.slot > 0) c.u32(0x8c, f.slot << 19U);
  c.u32(0xa4, ((1U << f.link_generation) - 1U) << 1U);
  std::size_t at = 0x100;
  std::size_t link_at = 0;  // where the previous header's `next` lies
  const auto capability = [&](unsigned id, unsigned version, std::size_t size) {
    if (link_at != 0) {
      const auto previous = static_cast<unsigned char>(c.bytes()[link_at + 2]);
      c.u16(link_at + 2, (previous & 0xfU) | (at << 4U));
    }
    c.u32(at, id | (version << 16U));
    link_at = at;
    const auto here = at;
    at += size;
    return here;
  };
  if (!host.virtual_machine) {
    capability(0x0001, 2, 0x48);  // AER
    if (f.is_bridge) {
      const auto acs = capability(0x000d, 1, 0x8);
      c.u16(acs + 4,
            0x005f);  // can: source validation, blocking, redirects, upstream forwarding, direct translated
      c.u16(acs + 6, host.iommu.empty() ? 0x0000 : 0x001d);  // on: what the kernel switches on with an IOMMU
    }
    if (f.vfs_total > 0) {
      capability(0x000e, 1, 0x8);  // ARI
      const auto sriov = capability(0x0010, 1, 0x40);
      c.u16(sriov + 0x0c, f.vfs_total);
      c.u16(sriov + 0x0e, f.vfs_total);
      c.u16(sriov + 0x14,
            4);  // first VF offset: NVIDIA's virtual functions start at function 4 (vGPU user guide)
      c.u16(sriov + 0x16, 1);
      c.u16(sriov + 0x1a, f.device_id);
      c.u32(sriov + 0x1c, 0x553);
      c.u32(sriov + 0x20, 1);
    }
  }
  return c.bytes();
}

std::string_view speed_of(unsigned generation) {
  switch (generation) {
    case 1:
      return "2.5 GT/s PCIe";
    case 2:
      return "5.0 GT/s PCIe";
    case 3:
      return "8.0 GT/s PCIe";
    case 4:
      return "16.0 GT/s PCIe";
    case 5:
      return "32.0 GT/s PCIe";
    case 6:
      return "64.0 GT/s PCIe";
    default:
      return "Unknown";
  }
}

void write_function(Writer& out, const Host& host, std::size_t index, const Placed& placed) {
  const PciFunction& f = host.pci[index];
  const std::string path = device_path(host, index);
  const std::string name = address_of(f);
  const auto set = [&](const char* key, std::string_view value, unsigned mode = 0444) {
    out.attribute(path + "/" + key, value, mode);
  };
  set("vendor", fmt::format("0x{:04x}", f.vendor));
  set("device", fmt::format("0x{:04x}", f.device_id));
  set("subsystem_vendor", fmt::format("0x{:04x}", f.subsystem_vendor));
  set("subsystem_device", fmt::format("0x{:04x}", f.subsystem_device));
  set("class", fmt::format("0x{:06x}", f.class_code));
  set("revision", fmt::format("0x{:02x}", f.revision));
  set("modalias", fmt::format("pci:v{:08X}d{:08X}sv{:08X}sd{:08X}bc{:02x}sc{:02x}i{:02x}", f.vendor,
                              f.device_id, f.subsystem_vendor, f.subsystem_device, f.class_code >> 16U,
                              (f.class_code >> 8U) & 0xffU, f.class_code & 0xffU));
  set("numa_node", fmt::format("{}", f.numa), 0644);
  const auto cpus = cpus_of_node(host, f.numa);
  set("local_cpus", cpu_mask(cpus, cpu_total(host)));
  set("local_cpulist", format_ranges(cpus));
  set("irq", fmt::format("{}", f.irq));
  set("enable", f.driver.empty() ? "0" : "1", 0644);
  set("power_state", "D0");
  set("broken_parity_status", "0", 0644);
  set("d3cold_allowed", "1", 0644);
  set("driver_override", "(null)", 0644);
  set("msi_bus", "1", 0644);
  set("ari_enabled", "0");
  set("dma_mask_bits", f.gpu != none ? "52" : "64");
  set("consistent_dma_mask_bits", f.gpu != none ? "52" : "64");
  if ((f.class_code >> 8U) == 0x0300) {  // the firmware started on one of them
    const auto first = std::find_if(host.pci.begin(), host.pci.end(), [](const PciFunction& other) {
      return (other.class_code >> 8U) == 0x0300;
    });
    set("boot_vga", &*first == &f ? "1" : "0");
  }
  if (f.link_generation > 0) {
    set("max_link_speed", speed_of(f.link_generation));
    set("max_link_width", fmt::format("{}", f.link_width));
    set("current_link_speed", speed_of(f.link_generation_now));
    set("current_link_width", fmt::format("{}", f.link_width_now));
  }
  if (!f.reset_method.empty()) {
    set("reset_method", f.reset_method, 0644);
    out.file(path + "/reset", "", 0200);
  }
  out.file(path + "/remove", "", 0200);
  out.file(path + "/rescan", "", 0200);
  if (f.vfs_total > 0) {
    set("sriov_totalvfs", fmt::format("{}", f.vfs_total));
    set("sriov_numvfs", "0", 0644);
    set("sriov_offset", "4");
    set("sriov_stride", "1");
    set("sriov_vf_device", fmt::format("{:x}", f.device_id));
    set("sriov_drivers_autoprobe", "1", 0644);
  }
  for (const auto& [attribute, value] : f.attributes) out.attribute(path + "/" + attribute, value, 0644);
  if (!host.virtual_machine && f.link_generation > 0) {
    out.file(path + "/aer_dev_correctable",
             "RxErr 0\nBadTLP 0\nBadDLLP 0\nRollover 0\nTimeout 0\nNonFatalErr 0\nCorrIntErr 0\nHeaderOF "
             "0\nTOTAL_ERR_COR 0\n",
             0444);
    for (const char* kind : {"nonfatal", "fatal"}) {
      out.file(fmt::format("{}/aer_dev_{}", path, kind),
               fmt::format(
                   "Undefined 0\nDLP 0\nSDES 0\nTLP 0\nFCP 0\nCmpltTO 0\nCmpltAbrt 0\nUnxCmplt 0\nRxOF "
                   "0\nMalfTLP 0\nECRC 0\n"
                   "UnsupReq 0\nACSViol 0\nUncorrIntErr 0\nBlockedTLP 0\nAtomicOpBlocked 0\nTLPBlockedErr 0\n"
                   "PoisonTLPBlocked 0\nTOTAL_ERR_{} 0\n",
                   std::string_view(kind) == "fatal" ? "FATAL" : "NONFATAL"),
               0444);
    }
  }
  // Lines 0..6 are the BARs and the ROM; kernels with SR-IOV add six for virtual functions, bridges four
  // windows.
  const std::size_t lines = (host.virtual_machine ? 7U : 13U) + (f.is_bridge ? 4U : 0U);
  std::vector<std::string> resource(lines, "0x0000000000000000 0x0000000000000000 0x0000000000000000");
  for (const auto& bar : placed.bars) {
    if (bar.index < lines)
      resource[bar.index] =
          fmt::format("0x{:016x} 0x{:016x} 0x{:016x}", bar.start, bar.start + bar.size - 1, bar.flags);
  }
  if (f.is_bridge) {
    const std::size_t windows = lines - 4;
    if (placed.window32.used()) {
      resource[windows + 1] = fmt::format("0x{:016x} 0x{:016x} 0x{:016x}", placed.window32.first,
                                          placed.window32.last | 0xfffffU, 0x200);
    }
    if (placed.window64.used()) {
      resource[windows + 2] = fmt::format("0x{:016x} 0x{:016x} 0x{:016x}", placed.window64.first,
                                          placed.window64.last | 0xfffffU, 0x102201);
    }
  }
  std::string text;
  for (const auto& line : resource) text += line + "\n";
  out.file(path + "/resource", text, 0444);
  out.file(path + "/config", config_space(host, index, placed), 0644);
  std::string uevent = f.driver.empty() ? "" : "DRIVER=" + f.driver + "\n";
  uevent +=
      fmt::format("PCI_CLASS={:X}\nPCI_ID={:04X}:{:04X}\nPCI_SUBSYS_ID={:04X}:{:04X}\nPCI_SLOT_NAME={}\n",
                  f.class_code, f.vendor, f.device_id, f.subsystem_vendor, f.subsystem_device, name);
  out.file(path + "/uevent", uevent);
  out.link(path + "/subsystem", "sys/bus/pci");
  out.link("sys/bus/pci/devices/" + name, path);
  if (!f.driver.empty()) {
    const std::string driver = "sys/bus/pci/drivers/" + f.driver;
    out.link(path + "/driver", driver);
    out.link(driver + "/" + name, path);
    for (const char* action : {"bind", "unbind", "new_id", "remove_id"})
      out.file(driver + "/" + action, "", 0200);
  }
  if (f.iommu_group >= 0 && !host.iommu.empty()) {
    const std::string group = fmt::format("sys/kernel/iommu_groups/{}", f.iommu_group);
    out.link(path + "/iommu_group", group);
    out.link(group + "/devices/" + name, path);
    out.attribute(group + "/type", host.iommu_type, 0644);
    out.attribute(group + "/reserved_regions", "0x00000000fee00000 0x00000000feefffff msi");
    const std::string iommu = host.iommu == "amd" ? fmt::format("ivhd{}", std::max(f.numa, 0))
                                                  : fmt::format("dmar{}", std::max(f.numa, 0));
    out.link(path + "/iommu", "sys/devices/virtual/iommu/" + iommu);
    out.link("sys/devices/virtual/iommu/" + iommu + "/devices/" + name, path);
  }
}

}  // namespace

void write_pci(Writer& out, const Host& host, const State& state, std::string* iomem) {
  std::vector<Placed> placed(host.pci.size());
  Addresses free;
  std::vector<std::size_t> order;  // by bus, as the kernel walks them
  for (std::size_t i = 0; i < host.pci.size(); ++i) {
    if (host.pci[i].parent < 0) order.push_back(i);
  }
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return std::tuple(host.pci[a].domain, host.pci[a].bus, host.pci[a].device) <
           std::tuple(host.pci[b].domain, host.pci[b].bus, host.pci[b].device);
  });
  for (const auto i : order) place(host, state, i, free, placed);
  out.directory("sys/bus/pci/devices");
  out.directory("sys/bus/pci/slots");
  out.attribute("sys/bus/pci/drivers_autoprobe", "1", 0644);
  out.file("sys/bus/pci/rescan", "", 0200);
  out.directory("sys/kernel/iommu_groups");
  out.directory("sys/class/iommu");
  for (std::size_t i = 0; i < host.pci.size(); ++i) write_function(out, host, i, placed[i]);
  for (const auto i : order) {
    const std::string root = fmt::format("sys/devices/pci{:04x}:{:02x}", host.pci[i].domain, host.pci[i].bus);
    out.file(root + "/uevent", "");
  }
  if (!host.iommu.empty()) {
    // ecap bit 3 is interrupt remapping; values as seen on real kernels (facts passthrough.md).
    std::set<int> nodes;
    for (const auto& f : host.pci) nodes.insert(std::max(f.numa, 0));
    for (const int node : nodes) {
      const bool amd = host.iommu == "amd";
      const std::string unit = fmt::format("{}{}", amd ? "ivhd" : "dmar", node);
      const std::string path = "sys/devices/virtual/iommu/" + unit;
      out.link("sys/class/iommu/" + unit, path);
      if (amd) {
        out.attribute(path + "/amd-iommu/cap", "40f");
        out.attribute(path + "/amd-iommu/features",
                      host.interrupt_remapping ? "58f77ef22294a5a" : "58f77ef22294a52");
      } else {
        out.attribute(path + "/intel-iommu/version", "6:0");
        out.attribute(path + "/intel-iommu/address",
                      fmt::format("{:x}", 0xd5ffc000U + static_cast<unsigned>(node) * 0x10000U));
        out.attribute(path + "/intel-iommu/cap", "19ed008c40780c66");
        out.attribute(path + "/intel-iommu/ecap",
                      host.interrupt_remapping ? "3ef9a6f86f0ff" : "3ef9a6f86f0f7");
        out.attribute(path + "/intel-iommu/domains_supported", "65536");
        out.attribute(path + "/intel-iommu/domains_used", "16");
      }
    }
    out.file(host.iommu == "amd" ? "sys/firmware/acpi/tables/IVRS" : "sys/firmware/acpi/tables/DMAR",
             // Header only: signature, length, revision; DMAR flags bit 0 says interrupt remapping.
             host.iommu == "amd"
                 ? std::string("IVRS\x30\0\0\0\x02", 9) + std::string(39, '\0')
                 : std::string("DMAR\x30\0\0\0\x01", 9) + std::string(27, '\0') + std::string("\x2d", 1) +
                       std::string(host.interrupt_remapping ? "\x01" : "\x00", 1) + std::string(10, '\0'),
             0400);
  }
  for (const auto i : order) {
    const PciFunction& f = host.pci[i];
    std::vector<std::pair<const char*, Window>> windows;
    Window all32 = placed[i].window32, all64 = placed[i].window64;
    for (const auto& bar : placed[i].bars) (is_wide(bar.flags) ? all64 : all32).add(bar.start, bar.size);
    for (const auto& window : {all32, all64}) {
      if (window.used()) {
        *iomem += fmt::format("{:08x}-{:08x} : PCI Bus {:04x}:{:02x}\n", window.first, window.last | 0xfffffU,
                              f.domain, f.bus);
      }
    }
  }
}

}  // namespace bulkhead::twin
