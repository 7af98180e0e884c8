// Any bytes: what is asked and what is recorded parse or are refused with a reason, never throw; what was
// accepted is written and read back the same.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "core/lease/lease.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace bulkhead;
  const auto json = parse_json({reinterpret_cast<const char*>(data), size});
  if (!json.ok()) return 0;
  if (const auto ask = lease::parse_ask(*json); ask.ok()) {
    const auto again = lease::parse_ask(lease::to_json(*ask));
    if (!again.ok() || !(*again == *ask)) std::abort();
    if (ask->count < 1 || ask->count > lease::most_parts || ask->ttl < lease::shortest ||
        ask->ttl > lease::longest)
      std::abort();
  } else if (ask.error().message().empty() || ask.error().message().size() > 64 << 10) {
    std::abort();
  }
  if (const auto record = lease::parse(*json); record.ok()) {
    const Json written = lease::to_json(*record);
    const auto again = lease::parse(written);
    if (!again.ok() || lease::to_json(*again) != written || again->parts != record->parts) std::abort();
    // What a program of the lease would get in its environment has no byte that ends a string early.
    for (const auto& [name, value] : lease::environment(*record))
      if (name.empty() || value.find('\0') != std::string::npos) std::abort();
    for (const auto ttl : {lease::shortest, lease::longest})
      if (!lease::renewed(*record, ttl, record->created).ok()) std::abort();
  }
  return 0;
}
