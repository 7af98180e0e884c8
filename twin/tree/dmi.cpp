// SMBIOS: /sys/class/dmi/id, and the tables themselves (/sys/firmware/dmi/tables) with an entry point, for
// dmidecode and for readers of slots. Types 0, 1, 2, 3, 4, 9, 16, 17, 19 and 127 of SMBIOS 3.3.
#include <fmt/format.h>

#include "twin/tree/writer.hpp"

namespace bulkhead::twin {

namespace {

class Table {
 public:
  // `body` follows the four bytes of the header; strings are numbered from 1.
  void add(unsigned type, const std::string& body, const std::vector<std::string>& strings) {
    const unsigned handle = next_++;
    bytes_ += static_cast<char>(type);
    bytes_ += static_cast<char>(4 + body.size());
    bytes_ += static_cast<char>(handle & 0xffU);
    bytes_ += static_cast<char>(handle >> 8U);
    bytes_ += body;
    for (const auto& text : strings) bytes_ += (text.empty() ? std::string("Not Specified") : text) + '\0';
    if (strings.empty()) bytes_ += '\0';
    bytes_ += '\0';
    ++count_;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_ = {};
  unsigned next_ = 1, count_ = 0;
};

std::string number(std::uint64_t value, std::size_t n) {
  std::string out;
  for (std::size_t i = 0; i < n; ++i) out += static_cast<char>((value >> (8 * i)) & 0xffU);
  return out;
}

}  // namespace

void write_dmi(Writer& out, const Host& host, const State& state) {
  const auto id = [&](const char* key, const std::string& value, unsigned mode = 0444) {
    if (!value.empty()) out.attribute(std::string("sys/devices/virtual/dmi/id/") + key, value, mode);
  };
  if (host.product_name.empty() && host.virtual_machine) return;  // not read: no DMI at all
  const std::string serial = fmt::format("{:010}", state.seed % 10000000000U);
  id("bios_vendor", host.bios_vendor);
  id("bios_version", host.bios_version);
  id("bios_date", host.bios_date);
  id("sys_vendor", host.system_vendor);
  id("product_name", host.product_name);
  id("product_version", host.product_version);
  id("product_serial", serial, 0400);
  id("product_uuid", std::string(state.boot_id.view()), 0400);
  id("board_vendor", host.board_vendor);
  id("board_name", host.board_name);
  id("board_serial", serial, 0400);
  id("chassis_vendor", host.system_vendor);
  id("chassis_type", fmt::format("{}", host.chassis_type));
  id("chassis_serial", serial, 0400);
  id("modalias", fmt::format("dmi:bvn{}:bvr{}:bd{}:svn{}:pn{}:", host.bios_vendor, host.bios_version,
                             host.bios_date, host.system_vendor, host.product_name));
  out.link("sys/class/dmi/id", "sys/devices/virtual/dmi/id");

  Table t;
  // Type 0: characteristics bit 7 PCI; extension byte 2 bit 3 UEFI, bit 4 virtual machine.
  t.add(0,
        number(1, 1) + number(2, 1) + number(0xf000, 2) + number(3, 1) + number(0xff, 1) + number(0x80, 8) +
            number(0x03, 1) + number(0x0c | (host.virtual_machine ? 0x10U : 0U), 1) + number(5, 1) +
            number(32, 1) + number(255, 1) + number(255, 1) + number(32, 2),
        {host.bios_vendor, host.bios_version, host.bios_date});
  t.add(1,
        number(1, 1) + number(2, 1) + number(3, 1) + number(4, 1) + std::string(16, '\x11') + number(6, 1) +
            number(0, 1) + number(0, 1),
        {host.system_vendor, host.product_name, host.product_version, serial});
  t.add(2,
        number(1, 1) + number(2, 1) + number(0, 1) + number(3, 1) + number(0, 1) + number(9, 1) +
            number(0, 1) + number(3, 2) + number(10, 1) + number(0, 1),
        {host.board_vendor, host.board_name, serial});
  t.add(3,
        number(1, 1) + number(host.chassis_type, 1) + number(0, 1) + number(2, 1) + number(0, 1) +
            number(3, 1) + number(3, 1) + number(3, 1) + number(3, 1) + number(0, 4) + number(0, 1) +
            number(1, 1) + number(0, 1) + number(0, 1),
        {host.system_vendor, serial});
  for (unsigned socket = 0; socket < host.cpu.sockets; ++socket) {
    const unsigned threads = host.cpu.cores_per_socket * host.cpu.threads_per_core;
    t.add(4,
          number(1, 1) + number(3, 1) + number(0xb3, 1) + number(2, 1) + number(0, 8) + number(3, 1) +
              number(0x80, 1) + number(100, 2) + number(host.cpu.mhz_max, 2) + number(host.cpu.mhz_base, 2) +
              number(0x41, 1) + number(1, 1) + number(0xffff, 2) + number(0xffff, 2) + number(0xffff, 2) +
              number(0, 1) + number(0, 1) + number(0, 1) +
              number(std::min(host.cpu.cores_per_socket, 255U), 1) +
              number(std::min(host.cpu.cores_per_socket, 255U), 1) + number(std::min(threads, 255U), 1) +
              number(0x04, 2) + number(0xb3, 2) + number(host.cpu.cores_per_socket, 2) +
              number(host.cpu.cores_per_socket, 2) + number(threads, 2),
          {fmt::format("CPU{}", socket), host.cpu.vendor, host.cpu.model});
  }
  for (const auto& f : host.pci) {
    if (f.slot == 0) continue;
    // Slot type: PCI Express Gen 4 (0xb8) or 5 (0xbe) x16 as SMBIOS 3.3 numbers them; usage 4: in use; x16
    // width 0x0d.
    t.add(9,
          number(1, 1) + number(f.link_generation >= 5 ? 0xbe : 0xb8, 1) + number(0x0d, 1) + number(4, 1) +
              number(4, 1) + number(f.slot, 2) + number(0x04, 1) + number(0x01, 1) + number(f.domain, 2) +
              number(f.bus, 1) + number((f.device << 3U) | f.function, 1),
          {fmt::format("GPU{}", f.slot)});
  }
  std::uint64_t kib = 0;
  for (const auto node : host.numa_memory_kib) kib += node;
  const std::uint64_t modules = std::max<std::uint64_t>(1, kib >> 26U);  // of 64 GiB
  t.add(16,
        number(3, 1) + number(3, 1) + number(6, 1) + number(0x80000000U, 4) + number(0xfffe, 2) +
            number(modules, 2) + number(kib << 10U, 8),
        {});
  for (std::uint64_t m = 0; m < modules; ++m) {
    t.add(17,
          number(0, 2) + number(0xfffe, 2) + number(80, 2) + number(64, 2) + number(0x7fff, 2) +
              number(9, 1) + number(0, 1) + number(1, 1) + number(0, 1) + number(0x22, 1) +
              number(0x2080, 2) + number(4800, 2) + number(0, 1) + number(0, 1) + number(0, 1) +
              number(0, 1) + number(2, 1) + number((kib / modules) >> 10U, 4) + number(4800, 2),
          {fmt::format("DIMM{}", m)});
  }
  t.add(127, "", {});
  out.file("sys/firmware/dmi/tables/DMI", t.bytes(), 0400);
  std::string entry = "_SM3_" + number(0, 1) + number(24, 1) + number(3, 1) + number(3, 1) + number(0, 1) +
                      number(1, 1) + number(0, 1) + number(t.bytes().size(), 4) + number(0x7d000000, 8);
  unsigned sum = 0;
  for (const char c : entry) sum += static_cast<unsigned char>(c);
  entry[5] = static_cast<char>((256 - sum % 256) % 256);
  out.file("sys/firmware/dmi/tables/smbios_entry_point", entry, 0400);
}

}  // namespace bulkhead::twin
