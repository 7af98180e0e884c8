// Quantities with their unit in the type. Arithmetic that keeps the unit is allowed, mixing units is not.
#pragma once

#include <compare>
#include <cstdint>

namespace bulkhead {

template <class Tag, class Rep>
struct Quantity {
  Rep count = 0;
  constexpr Quantity() = default;
  constexpr explicit Quantity(Rep c) : count(c) {}
  friend constexpr auto operator<=>(Quantity, Quantity) = default;
  friend constexpr Quantity operator+(Quantity a, Quantity b) { return Quantity(a.count + b.count); }
  friend constexpr Quantity operator-(Quantity a, Quantity b) { return Quantity(a.count - b.count); }
};

using Bytes = Quantity<struct BytesTag, std::uint64_t>;
using Milliwatts = Quantity<struct MilliwattsTag, std::uint64_t>;
using Millijoules = Quantity<struct MillijoulesTag, std::uint64_t>;
using Celsius = Quantity<struct CelsiusTag, std::int32_t>;
using Megahertz = Quantity<struct MegahertzTag, std::uint32_t>;
using Percent = Quantity<struct PercentTag, std::uint32_t>;

constexpr Bytes mebibytes(std::uint64_t n) { return Bytes(n << 20U); }
constexpr std::uint64_t to_mebibytes(Bytes b) { return b.count >> 20U; }
constexpr Milliwatts watts(std::uint64_t n) { return Milliwatts(n * 1000U); }

}  // namespace bulkhead
