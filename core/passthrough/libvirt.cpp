// A virtual machine for libvirt that has the devices. managed='no': bulkhead binds and gives back, libvirt
// must not.
#include <algorithm>

#include <fmt/format.h>

#include "base/markup.hpp"
#include "base/text.hpp"
#include "core/passthrough/passthrough.hpp"

namespace bulkhead::passthrough {

namespace {

// Memory and processors. What VFIO maps is pinned as it is, and libvirt raises the limit by itself: <locked/>
// would take the limit of the monitor's own memory away, which a hostile guest can make grow. Pages shared
// with other guests (KSM) could be told by their timing.
std::string resources(const Machine& machine, std::string_view indent) {
  std::string out = fmt::format("{}<memoryBacking>\n", indent);
  if (machine.hugepage && machine.hugepage->count > 0) {
    out += fmt::format("{0}  <hugepages>\n{0}    <page size='{1}' unit='KiB'/>\n{0}  </hugepages>\n", indent,
                       machine.hugepage->count / 1024);
  } else if (machine.hugepage) {
    out += fmt::format("{}  <hugepages/>\n", indent);
  }
  out += fmt::format("{0}  <nosharepages/>\n{0}</memoryBacking>\n", indent);
  out += fmt::format(
      "{}<vcpu placement='static'{}>{}</vcpu>\n", indent,
      machine.cpus.empty() ? "" : fmt::format(" cpuset='{}'", markup(printable(machine.cpus, 256))),
      machine.vcpus);
  if (machine.node) {
    out += fmt::format("{0}<numatune>\n{0}  <memory mode='strict' nodeset='{1}'/>\n{0}</numatune>\n", indent,
                       *machine.node);
  }
  return out;
}

}  // namespace

Result<Handed> handed(const Tree& tree, std::span<const PciAddress> asked) {
  Handed out;
  bool unknown_node = asked.empty();
  for (const auto& address : asked) {
    const auto* function = tree.find(address);
    if (function == nullptr)
      return Error(Errc::not_found, fmt::format("{} is no device of this host", address.str()),
                   "see those there are: bulkhead inventory");
    if (!function->group)
      return Error(Errc::conflict, fmt::format("{} is in no IOMMU group", address.str()),
                   "see why: bulkhead doctor --for passthrough");
    for (const auto* member : tree.members(*function->group)) {
      // A bridge stays the kernel's; pci-stub keeps a function from everybody.
      if (member != function && (member->is_bridge() || member->driver == "pci-stub")) continue;
      if (member->driver != vfio_driver) {
        const std::string has = member->driver.empty() ? "no driver" : "driver " + member->driver;
        const std::string what = member == function
                                     ? address.str()
                                     : fmt::format("{}, which shares IOMMU group {} with {},",
                                                   member->address.str(), *function->group, address.str());
        return Error(Errc::conflict, fmt::format("{} has {}: a virtual machine would not start", what, has),
                     "give it away first, with mode: passthrough in the node file: bulkhead apply -f FILE");
      }
      if (std::find(out.devices.begin(), out.devices.end(), member->address) == out.devices.end())
        out.devices.push_back(member->address);
    }
    // Devices of two nodes, or of an unknown one: pinning to either would be a guess.
    if (!function->numa_node) {
      unknown_node = true;
    } else if (!out.node || *out.node == *function->numa_node) {
      out.node = function->numa_node;
      out.cpus = function->local_cpus;
    } else {
      out.nodes_differ = true;
    }
  }
  if (unknown_node || out.nodes_differ) {
    out.node.reset();
    out.cpus.clear();
  }
  return out;
}

std::string host_device_xml(const PciAddress& address, std::string_view indent) {
  return fmt::format(
      "{0}<hostdev mode='subsystem' type='pci' managed='no'>\n"
      "{0}  <driver name='vfio'/>\n"
      "{0}  <source>\n"
      "{0}    <address domain='0x{1:04x}' bus='0x{2:02x}' slot='0x{3:02x}' function='0x{4:x}'/>\n"
      "{0}  </source>\n"
      "{0}</hostdev>\n",
      indent, address.domain, address.bus, address.device, address.function);
}

std::string domain_xml(const Machine& machine) {
  std::string out = fmt::format("<domain type='kvm'>\n  <name>{}</name>\n  <memory unit='MiB'>{}</memory>\n",
                                markup(printable(machine.name, 256)), to_mebibytes(machine.memory));
  out += resources(machine, "  ");
  // The guest must see as many address bits as the host has, or the window of a large GPU does not fit.
  out += fmt::format(
      "  <os{}>\n    <type arch='x86_64' machine='q35'>hvm</type>\n  </os>\n"
      "  <features>\n    <acpi/>\n    <apic/>\n  </features>\n"
      "  <cpu mode='host-passthrough'>\n    <maxphysaddr mode='passthrough'/>\n  </cpu>\n  <devices>\n",
      machine.uefi ? " firmware='efi'" : "");
  for (const auto& address : machine.devices) out += host_device_xml(address, "    ");
  return out + "  </devices>\n</domain>\n";
}

std::string snippet_xml(const Machine& machine) {
  std::string out = "<!-- into <domain>, in place of what is there -->\n" + resources(machine, "");
  out += "<!-- into <devices> -->\n";
  for (const auto& address : machine.devices) out += host_device_xml(address, "");
  return out;
}

}  // namespace bulkhead::passthrough
