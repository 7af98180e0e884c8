// A virtual machine for libvirt that has the devices. managed='no': bulkhead binds and gives back, libvirt
// must not.
#include <fmt/format.h>

#include "base/text.hpp"
#include "core/passthrough/passthrough.hpp"

namespace bulkhead::passthrough {

namespace {

std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : printable(text, 256)) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '\'':
        out += "&apos;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

}  // namespace

std::string host_device_xml(const PciAddress& address, std::string_view indent) {
  return fmt::format(
      "{0}<hostdev mode='subsystem' type='pci' managed='no'>\n"
      "{0}  <source>\n"
      "{0}    <address domain='0x{1:04x}' bus='0x{2:02x}' slot='0x{3:02x}' function='0x{4:x}'/>\n"
      "{0}  </source>\n"
      "{0}</hostdev>\n",
      indent, address.domain, address.bus, address.device, address.function);
}

std::string domain_xml(const Machine& machine) {
  std::string out = fmt::format("<domain type='kvm'>\n  <name>{}</name>\n  <memory unit='MiB'>{}</memory>\n",
                                escaped(machine.name), to_mebibytes(machine.memory));
  // A device writes into the guest's memory by itself, so none of it may be swapped or moved.
  out += machine.hugepages ? "  <memoryBacking>\n    <hugepages/>\n    <locked/>\n  </memoryBacking>\n"
                           : "  <memoryBacking>\n    <locked/>\n  </memoryBacking>\n";
  if (!machine.cpus.empty()) {
    out += fmt::format("  <vcpu placement='static' cpuset='{}'>{}</vcpu>\n", escaped(machine.cpus),
                       machine.vcpus);
  } else {
    out += fmt::format("  <vcpu placement='static'>{}</vcpu>\n", machine.vcpus);
  }
  if (machine.node) {
    out +=
        fmt::format("  <numatune>\n    <memory mode='strict' nodeset='{}'/>\n  </numatune>\n", *machine.node);
  }
  out +=
      "  <os>\n    <type arch='x86_64' machine='q35'>hvm</type>\n  </os>\n"
      "  <features>\n    <acpi/>\n    <apic/>\n  </features>\n"
      "  <cpu mode='host-passthrough'/>\n  <devices>\n";
  for (const auto& address : machine.devices) out += host_device_xml(address, "    ");
  return out + "  </devices>\n</domain>\n";
}

}  // namespace bulkhead::passthrough
