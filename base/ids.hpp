// Names of things, parsed at the boundary and trusted afterwards.
#pragma once

#include <compare>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/result.hpp"

namespace bulkhead {

// A PCI function, "domain:bus:device.function". Prints as sysfs does: 0000:1b:00.0.
struct PciAddress {
  std::uint32_t domain = 0;
  std::uint8_t bus = 0;
  std::uint8_t device = 0;
  std::uint8_t function = 0;

  // Accepts 0000:1b:00.0, 00000000:1B:00.0 (NVML) and 1b:00.0.
  static Result<PciAddress> parse(std::string_view text);
  std::string str() const;
  friend auto operator<=>(const PciAddress&, const PciAddress&) = default;
};

// A GPU's or MIG device's UUID as the driver prints it: "GPU-..." or "MIG-...". Compared byte by byte.
struct Uuid {
  std::string text = {};
  friend auto operator<=>(const Uuid&, const Uuid&) = default;
};

}  // namespace bulkhead
