// Any bytes: a record parses or is refused, and every raw reading converts or does not; a BMC that answers
// with them ends the walk.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "edge/bmc/bmc.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace bulkhead;
  const bmc::Octets bytes(data, data + size);
  if (const auto sensors = bmc::parse_record(bytes); sensors.ok()) {
    for (const auto& s : *sensors) {
      for (unsigned raw = 0; raw < 256; ++raw) {
        const auto value = bmc::convert(s.conversion, static_cast<std::uint8_t>(raw));
        if (value && !std::isfinite(*value)) std::abort();
      }
    }
  }
  std::size_t at = 0, asked = 0;
  const bmc::Ask ask = [&](const bmc::Request&, std::uint64_t) -> Result<bmc::Octets> {
    if (++asked > 4'000'000) std::abort();  // it never ends
    if (at >= size) return Error(Errc::timeout, "no answer");
    const std::size_t length = data[at++] % 48U;
    bmc::Octets answer;
    while (answer.size() < length && at < size) answer.push_back(data[at++]);
    return answer;
  };
  if (const auto known = bmc::repository(ask, ~0ULL); known.ok()) (void)bmc::readings(ask, *known, ~0ULL);
  return 0;
}
