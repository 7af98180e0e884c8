#include "edge/sysfs/sysfs.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <optional>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"

namespace bulkhead::sysfs {

namespace fs = std::filesystem;

namespace {

// A directory held open: its attributes are read without walking the path again, which is half the cost of a
// read.
class Directory {
 public:
  explicit Directory(const fs::path& path)
      : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    error_ = fd_ ? 0 : errno;
  }
  bool ok() const { return error_ == 0; }
  Error error() const { return errno_error("read " + path_.string(), error_); }

  // An attribute without trailing white space. sysfs gives at most a page; more is cut, not believed.
  Result<std::string> read(const char* name) const {
    const UniqueFd file(::openat(fd_.get(), name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
    if (!file) return errno_error(fmt::format("read {}", (path_ / name).string()), errno);
    // One read: the kernel answers a sysfs attribute whole, and hundreds of them are read.
    std::array<char, 4096> page;
    ssize_t got = 0;
    do {
      got = ::read(file.get(), page.data(), page.size());
    } while (got < 0 && errno == EINTR);
    if (got < 0) return errno_error(fmt::format("read {}", (path_ / name).string()), errno);
    const auto size = static_cast<std::size_t>(got);
    return std::string(trim(std::string_view(page.data(), size)));
  }

  // The last component of a link's target: a driver's or group's name.
  std::optional<std::string> link(const char* name) const {
    std::array<char, 1024> target;
    const ssize_t got = ::readlinkat(fd_.get(), name, target.data(), target.size());
    if (got <= 0 || static_cast<std::size_t>(got) >= target.size()) return std::nullopt;
    const std::string_view text(target.data(), static_cast<std::size_t>(got));
    return std::string(text.substr(text.rfind('/') + 1));
  }

  bool has(const char* name) const { return ::faccessat(fd_.get(), name, F_OK, 0) == 0; }

  Result<std::uint64_t> number(const char* name, int base = 10) const {
    BH_TRY(const std::string text, read(name));
    const auto value = parse_u64(text, base);
    if (!value) {
      return Error(Errc::corrupt,
                   fmt::format("{} says '{}', no number", (path_ / name).string(), printable(text, 40)));
    }
    return *value;
  }

 private:
  fs::path path_;
  UniqueFd fd_;
  int error_ = 0;
};

template <class Int>
Int number_or_zero(const Directory& directory, const char* name, int base) {
  const auto value = directory.number(name, base);
  return value.ok() && *value <= std::uint64_t{static_cast<Int>(-1)} ? static_cast<Int>(*value) : Int{0};
}

template <class T>
Reading<T> missing(std::string why) {
  return Reading<T>::missing(std::move(why));
}

Reading<inventory::PciLink> link_of(const Directory& device, const char* speed_name, const char* width_name) {
  using inventory::PciLink;
  const auto speed = device.read(speed_name);
  if (!speed.ok()) return missing<PciLink>("the kernel gives no link (not PCI Express, or emulated)");
  // "32.0 GT/s PCIe", "2.5 GT/s", "Unknown speed"; width 0 or 255 when the function is off the bus.
  const auto width = device.number(width_name);
  const std::string_view text(*speed);
  const auto digits = text.substr(0, text.find(' '));
  const auto parts = split(digits, '.');
  const auto whole = parse_u64(parts.front());
  const auto tenth = parts.size() == 2 ? parse_u64(parts[1]) : std::optional<std::uint64_t>(0);
  if (!whole || !tenth || *whole > 1024 || *tenth > 9 || parts.size() > 2) {
    return missing<PciLink>(fmt::format("the kernel says '{}'", printable(text, 40)));
  }
  if (!width.ok() || *width == 0 || *width > 32) return missing<PciLink>("the link is down");
  return PciLink{static_cast<double>(*whole) + static_cast<double>(*tenth) / 10,
                 static_cast<unsigned>(*width)};
}

std::vector<inventory::Bar> bars_of(const Directory& device) {
  std::vector<inventory::Bar> bars;
  const auto text = device.read("resource");
  if (!text.ok()) return bars;
  unsigned index = 0;
  for (const auto line : split_lines(*text)) {
    if (index > 6) break;  // 7 and on: VF BARs and bridge windows
    const auto words = split(trim(line), ' ');
    const unsigned at = index++;
    if (words.size() != 3) continue;
    const auto start = parse_u64(words[0], 16), end = parse_u64(words[1], 16),
               flags = parse_u64(words[2], 16);
    if (!start || !end || !flags || *end < *start) continue;
    if (*start == 0 && *end == 0 && *flags == 0) continue;
    bars.push_back(
        {.index = at, .start = *start, .size = *end == 0 ? 0 : *end - *start + 1, .flags = *flags});
  }
  return bars;
}

// KEY=value lines of os-release, the value with or without quotes.
Reading<std::string> os_release_value(const Result<std::string>& text, std::string_view key) {
  if (!text.ok()) return missing<std::string>(text.error().message());
  for (const auto line : split_lines(*text)) {
    if (!line.starts_with(key) || line.size() <= key.size() || line[key.size()] != '=') continue;
    auto value = trim(line.substr(key.size() + 1));
    if (value.size() >= 2 && (value.front() == '"' || value.front() == '\'') &&
        value.back() == value.front()) {
      value = value.substr(1, value.size() - 2);
    }
    return printable(value, 256);
  }
  return missing<std::string>(fmt::format("os-release has no {}", key));
}

// "Node 0 MemTotal:  1056 kB" and "MemTotal: 1056 kB" alike.
std::optional<Bytes> mem_total(std::string_view text) {
  const auto at = text.find("MemTotal:");
  if (at == std::string_view::npos) return std::nullopt;
  auto rest = text.substr(at + 9);
  rest = trim(rest.substr(0, rest.find('\n')));
  const auto value = parse_u64(rest.substr(0, rest.find(' ')));
  if (!value || *value > (1ULL << 53U)) return std::nullopt;
  return Bytes(*value * 1024);
}

Reading<std::string> short_text(const fs::path& path) {
  auto text = read_trimmed(path);
  if (!text.ok()) return missing<std::string>(text.error().message());
  if (text->empty()) return missing<std::string>(path.string() + " is empty");
  return printable(*text, 4096);
}

// hugepages-2048kB/{nr,free}_hugepages
void read_hugepages(const fs::path& folder, inventory::NumaNode& node) {
  const auto names = list_directory(folder);
  for (const auto& name : names.value_or({})) {
    constexpr std::string_view before = "hugepages-", after = "kB";
    if (!name.starts_with(before) || !name.ends_with(after)) continue;
    const std::string_view digits =
        std::string_view(name).substr(before.size(), name.size() - before.size() - after.size());
    const auto kib = parse_u64(digits);
    if (!kib || *kib == 0 || *kib > (1ULL << 40U)) continue;
    const Directory pages(folder / name);
    if (!pages.ok()) continue;
    const auto total = pages.number("nr_hugepages"), free = pages.number("free_hugepages");
    if (total.ok() && free.ok())
      node.hugepages.push_back({.size = Bytes(*kib * 1024), .total = *total, .free = *free});
  }
  std::sort(node.hugepages.begin(), node.hugepages.end(),
            [](const auto& a, const auto& b) { return a.size.count < b.size.count; });
}

void read_numa(const fs::path& root, inventory::Host& host) {
  const fs::path nodes = root / "sys/devices/system/node";
  const auto names = list_directory(nodes);
  if (!names.ok()) return;  // a kernel without NUMA has one node and no directory
  for (const auto& name : *names) {
    if (!name.starts_with("node")) continue;
    const auto id = parse_u64(std::string_view(name).substr(4));
    if (!id || *id > 4096) continue;
    const Directory node(nodes / name);
    if (!node.ok()) continue;
    inventory::NumaNode entry{.id = static_cast<unsigned>(*id)};
    if (const auto cpus = node.read("cpulist"); cpus.ok()) entry.cpus = printable(*cpus, 256);
    if (const auto meminfo = node.read("meminfo"); meminfo.ok())
      entry.memory = mem_total(*meminfo).value_or(Bytes(0));
    read_hugepages(nodes / name / "hugepages", entry);
    host.numa.push_back(std::move(entry));
  }
  std::sort(host.numa.begin(), host.numa.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
}

Reading<std::string> cpu_model(const fs::path& root) {
  // The first CPU says it; the whole file takes milliseconds on a large host, as the kernel asks each CPU its
  // clock.
  const Directory proc(root / "proc");
  if (!proc.ok()) return missing<std::string>(proc.error().message());
  const auto text = proc.read("cpuinfo");
  if (!text.ok()) return missing<std::string>(text.error().message());
  for (const auto line : split_lines(*text)) {
    const auto colon = line.find(':');
    if (colon == std::string_view::npos) continue;
    const auto key = trim(line.substr(0, colon));
    if (key == "model name" || key == "Model") return printable(trim(line.substr(colon + 1)), 128);
  }
  return missing<std::string>("/proc/cpuinfo names no model");
}

// "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (...)"
Reading<std::string> module_version(const fs::path& root) {
  const auto text = read_file(root / "proc/driver/nvidia/version", 65536);
  if (!text.ok())
    return missing<std::string>("no NVIDIA kernel module is loaded (/proc/driver/nvidia is missing)");
  for (const auto word :
       split(split_lines(*text).empty() ? std::string_view() : split_lines(*text).front(), ' ')) {
    const auto parts = split(word, '.');
    if (parts.size() < 2 || parts.size() > 3) continue;
    if (std::all_of(parts.begin(), parts.end(), [](auto part) { return parse_u64(part).has_value(); }))
      return std::string(word);
  }
  return missing<std::string>("/proc/driver/nvidia/version names no version");
}

}  // namespace

Result<std::vector<PciHead>> pci_heads(const fs::path& root) {
  const fs::path devices = root / "sys/bus/pci/devices";
  BH_TRY(const auto names, list_directory(devices));
  const Directory bus(devices);
  if (!bus.ok()) return bus.error();
  std::vector<PciHead> heads;
  for (const auto& name : names) {
    const auto address = PciAddress::parse(name);
    if (!address.ok()) continue;
    heads.push_back({.address = *address,
                     .vendor = number_or_zero<std::uint16_t>(bus, (name + "/vendor").c_str(), 16),
                     .class_code = number_or_zero<std::uint32_t>(bus, (name + "/class").c_str(), 16)});
  }
  std::sort(heads.begin(), heads.end(), [](const auto& a, const auto& b) { return a.address < b.address; });
  return heads;
}

Result<inventory::PciDevice> pci_device(const fs::path& root, const PciAddress& address, PciDetail detail) {
  const fs::path path = root / "sys/bus/pci/devices" / address.str();
  const Directory device(path);
  if (!device.ok()) return device.error();
  inventory::PciDevice out;
  out.address = address;
  out.vendor = number_or_zero<std::uint16_t>(device, "vendor", 16);
  out.device = number_or_zero<std::uint16_t>(device, "device", 16);
  out.class_code = number_or_zero<std::uint32_t>(device, "class", 16);

  if (const auto text = device.read("numa_node"); text.ok()) {
    const auto node = parse_i64(*text);
    if (node && *node >= 0 && *node <= 4096) {
      out.numa_node = static_cast<int>(*node);
    } else if (node && *node == -1) {
      out.numa_node = missing<int>("the firmware names no NUMA node (the kernel says -1)");
    } else {
      out.numa_node = missing<int>(fmt::format("the kernel says '{}'", printable(*text, 40)));
    }
  } else {
    out.numa_node = missing<int>(text.error().message());
  }
  if (auto driver = device.link("driver")) {
    out.driver = printable(*driver, 64);
  } else {
    out.driver = missing<std::string>("no driver is bound");
  }
  if (const auto physical = device.link("physfn")) {
    if (const auto parent = PciAddress::parse(*physical); parent.ok()) out.physical_function = *parent;
  }
  if (detail == PciDetail::brief) {
    const std::string why = "not asked";
    out.iommu_group = out.vfs_total = out.vfs_now = missing<unsigned>(why);
    out.link_now = out.link_max = missing<inventory::PciLink>(why);
    return out;
  }
  out.subsystem_vendor = number_or_zero<std::uint16_t>(device, "subsystem_vendor", 16);
  out.subsystem_device = number_or_zero<std::uint16_t>(device, "subsystem_device", 16);

  if (const auto group = device.link("iommu_group")) {
    const auto number = parse_u64(*group);
    if (number && *number <= 0xffffffffU) {
      out.iommu_group = static_cast<unsigned>(*number);
      // From /sys/kernel: the link in the device's folder leads there, but by a path that may leave the root.
      const auto members = list_directory(root / "sys/kernel/iommu_groups" / *group / "devices");
      for (const auto& name : members.value_or({})) {
        const auto member = PciAddress::parse(name);
        if (member.ok() && *member != address) out.group_siblings.push_back(*member);
      }
    } else {
      out.iommu_group = missing<unsigned>(fmt::format("the kernel says group '{}'", printable(*group, 40)));
    }
  } else {
    out.iommu_group = missing<unsigned>("in no IOMMU group: the IOMMU is off, or hidden from this machine");
  }

  if (const auto cpus = device.read("local_cpulist"); cpus.ok()) out.local_cpus = printable(*cpus, 256);

  out.link_now = link_of(device, "current_link_speed", "current_link_width");
  out.link_max = link_of(device, "max_link_speed", "max_link_width");
  out.bars = bars_of(device);
  if (const auto vga = device.number("boot_vga"); vga.ok()) out.boot_vga = *vga == 1;

  if (const auto total = device.number("sriov_totalvfs"); total.ok() && *total <= 0xffff) {
    out.vfs_total = static_cast<unsigned>(*total);
    // Counted by their links: sriov_numvfs waits for the device's lock, and while an unbind of it hangs, so
    // would we.
    unsigned now = 0;
    while (now < *total && device.link(fmt::format("virtfn{}", now).c_str())) ++now;
    out.vfs_now = now;
  } else {
    out.vfs_total = out.vfs_now = missing<unsigned>("no SR-IOV capability");
  }
  return out;
}

inventory::Accelerator accelerator(const fs::path& root, inventory::PciDevice pci) {
  inventory::Accelerator out;
  const fs::path path = root / "sys/bus/pci/devices" / pci.address.str();
  const Directory device(path);
  out.maker = pci.vendor == vendor_amd     ? "AMD"
              : pci.vendor == vendor_intel ? "Intel"
                                           : fmt::format("{:04x}", pci.vendor);
  const std::string driver = pci.driver.value_or("");
  const std::string unsaid = driver.empty() ? "no driver is bound" : "its driver does not say";
  const auto text = [&](const char* name) {
    const auto said = device.read(name);
    return said.ok() && !said->empty() ? Reading<std::string>(printable(*said, 128))
                                       : missing<std::string>(unsaid);
  };
  const auto bytes = [&](const char* name) {
    const auto said = device.number(name);
    return said.ok() ? Reading<Bytes>(Bytes(*said)) : missing<Bytes>(unsaid);
  };
  const auto words = [&](const char* name) {  // "SPX, DPX, QPX, CPX"; "NOT_SUPPORTED" where it cannot
    std::vector<std::string> all;
    const auto said = device.read(name);
    for (const auto word : split(said.ok() ? std::string_view(*said) : std::string_view(), ',')) {
      const auto trimmed = trim(word);
      if (!trimmed.empty() && trimmed.size() <= 16 && trimmed != "NOT_SUPPORTED" && all.size() < 16)
        all.push_back(printable(trimmed, 16));
    }
    return all;
  };
  out.model = text("product_name");
  out.memory = bytes("mem_info_vram_total");
  out.memory_used = bytes("mem_info_vram_used");
  out.compute_partition = text("current_compute_partition");
  out.memory_partition = text("current_memory_partition");
  out.compute_partitions = words("available_compute_partition");
  out.memory_partitions = words("available_memory_partition");
  const auto functions = list_directory(path / "sriov_admin");
  out.shares_set = functions.ok();
  for (const auto& name : functions.value_or({})) {
    const auto number = name == "pf"             ? std::optional<std::uint64_t>(0)
                        : name.starts_with("vf") ? parse_u64(std::string_view(name).substr(2))
                                                 : std::nullopt;
    if (!number || *number > 0xffff) continue;
    const Directory profile(path / "sriov_admin" / name / "profile");
    if (!profile.ok()) continue;
    const auto value = [&](const char* key) {
      const auto said = profile.number(key);
      return said.ok() ? Reading<std::uint64_t>(*said) : missing<std::uint64_t>(said.error().message());
    };
    inventory::VirtualShare share{.number = static_cast<unsigned>(*number),
                                  .quantum_ms = value("exec_quantum_ms"),
                                  .preempt_us = value("preempt_timeout_us")};
    share.priority = missing<std::string>("this kernel does not say");
    share.memory = missing<Bytes>("this kernel does not say");
    if (const auto said = profile.read("sched_priority"); said.ok()) {
      // "low [normal] high": the one in brackets is in force.
      const auto open = said->find('['), close = said->find(']');
      share.priority = open != std::string::npos && close != std::string::npos && open < close
                           ? printable(said->substr(open + 1, close - open - 1), 32)
                           : printable(*said, 32);
    }
    if (const auto quota = profile.number("vram_quota"); quota.ok()) share.memory = Bytes(*quota);
    out.shares.push_back(std::move(share));
  }
  std::sort(out.shares.begin(), out.shares.end(),
            [](const auto& a, const auto& b) { return a.number < b.number; });
  out.pci = std::move(pci);
  return out;
}

void read_host(const fs::path& root, inventory::Host& host) {
  host.hostname = short_text(root / "proc/sys/kernel/hostname").value_or("");
  if (host.hostname.empty()) host.hostname = short_text(root / "etc/hostname").value_or("");

  auto os_release = read_file(root / "etc/os-release", 65536);
  if (!os_release.ok()) os_release = read_file(root / "usr/lib/os-release", 65536);
  host.os = os_release_value(os_release, "PRETTY_NAME");
  host.os_id = os_release_value(os_release, "ID");

  host.kernel = short_text(root / "proc/sys/kernel/osrelease");
  const auto vendor = read_trimmed(root / "sys/class/dmi/id/sys_vendor");
  const auto product = read_trimmed(root / "sys/class/dmi/id/product_name");
  if (product.ok() && !product->empty()) {
    const bool said = !vendor.ok() || vendor->empty() || product->starts_with(*vendor);
    host.machine = printable(said ? *product : *vendor + " " + *product, 128);
  } else {
    host.machine = missing<std::string>(product.ok() ? "DMI names no product" : product.error().message());
  }
  host.cpu_model = cpu_model(root);
  if (const auto online = read_trimmed(root / "sys/devices/system/cpu/online"); online.ok()) {
    if (const auto cpus = parse_ranges(*online)) host.cpus_online = static_cast<unsigned>(cpus->size());
  }
  if (host.cpus_online == 0)
    host.notes.push_back("the number of CPUs cannot be read (/sys/devices/system/cpu/online)");

  if (const auto all = governors(root); all.ok()) {
    const bool one =
        std::all_of(all->begin(), all->end(), [&](const auto& g) { return g.now == all->front().now; });
    host.cpu_governor = one ? all->front().now : std::string("mixed");
  } else {
    host.cpu_governor = missing<std::string>(all.error().message());
  }
  read_numa(root, host);
  if (const auto meminfo = read_file(root / "proc/meminfo", 65536); meminfo.ok()) {
    host.memory = mem_total(*meminfo).value_or(Bytes(0));
  } else {
    host.notes.push_back("memory: " + meminfo.error().message());
  }
  host.kernel_cmdline = short_text(root / "proc/cmdline");
  host.boot_id = boot_id(root);
  host.driver_version = module_version(root);
}

Result<std::string> boot_id(const fs::path& root) {
  BH_TRY(const std::string text, read_trimmed(root / "proc/sys/kernel/random/boot_id"));
  if (text.size() != 36)
    return Error(Errc::corrupt, fmt::format("the boot id '{}' is no UUID", printable(text, 64)));
  return printable(text, 64);
}

Result<unsigned> mig_capability(const fs::path& root, unsigned gpu, unsigned gpu_instance,
                                std::optional<unsigned> compute_instance) {
  std::string name = fmt::format("gpu{}/mig/gi{}", gpu, gpu_instance);
  if (compute_instance) name += fmt::format("/ci{}", *compute_instance);
  BH_TRY(const std::string text, read_file(root / "proc/driver/nvidia/capabilities" / name / "access", 4096));
  for (const auto line : split_lines(text)) {
    constexpr std::string_view key = "DeviceFileMinor:";
    if (!line.starts_with(key)) continue;
    if (const auto minor = parse_u64(trim(line.substr(key.size()))); minor && *minor <= 0xfffff)
      return static_cast<unsigned>(*minor);
  }
  return Error(Errc::corrupt, fmt::format("the driver's capability file {} names no device minor", name));
}

Result<std::vector<Governor>> governors(const fs::path& root) {
  const fs::path path = root / "sys/devices/system/cpu/cpufreq";
  const auto names = list_directory(path);
  const Directory policies(path);  // hundreds of policies: read relative to this one descriptor
  std::vector<Governor> all;
  for (const auto& name : names.value_or({})) {
    if (!name.starts_with("policy") || !parse_u64(std::string_view(name).substr(6))) continue;
    const auto now = policies.read((name + "/scaling_governor").c_str());
    if (!now.ok()) continue;
    Governor governor{.policy = name, .now = printable(*now, 64)};
    // Every policy of a host offers the same: the first one is asked.
    if (all.empty()) {
      const std::string offered = policies.read((name + "/scaling_available_governors").c_str()).value_or("");
      for (const auto word : split(offered, ' ')) {
        if (!word.empty()) governor.offered.push_back(printable(word, 64));
      }
    } else {
      governor.offered = all.front().offered;
    }
    all.push_back(std::move(governor));
  }
  if (all.empty()) {
    return Error(Errc::unsupported,
                 "the kernel drives no CPU frequency here (no cpufreq policy), as in most virtual machines");
  }
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
    return parse_u64(std::string_view(a.policy).substr(6)) < parse_u64(std::string_view(b.policy).substr(6));
  });
  return all;
}

Status set_governor(const fs::path& root, std::string_view policy, std::string_view governor) {
  if (!policy.starts_with("policy") || !parse_u64(policy.substr(6))) {
    return Error(Errc::invalid, fmt::format("'{}' is no cpufreq policy", printable(policy, 64)));
  }
  if (governor.empty() || governor.size() > 15 || !std::all_of(governor.begin(), governor.end(), [](char c) {
        return (c >= 'a' && c <= 'z') || c == '_';
      })) {
    return Error(Errc::invalid, fmt::format("'{}' is no governor's name", printable(governor, 64)));
  }
  const fs::path file = root / "sys/devices/system/cpu/cpufreq" / policy / "scaling_governor";
  BH_CHECK(write_attribute(file, governor));
  BH_TRY(const std::string now, read_trimmed(file));
  if (now != governor) {
    return Error(Errc::io, fmt::format("{} reads back '{}' after writing '{}'", file.string(),
                                       printable(now, 64), governor));
  }
  return ok_status();
}

}  // namespace bulkhead::sysfs
