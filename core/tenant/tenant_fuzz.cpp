// Any bytes: tenants, quotas, names and roles parse or are refused with a reason, never throw; what was
// accepted is written and read back the same, and no amount overflows against a quota.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string_view>

#include "core/tenant/tenant.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace bulkhead;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  if (const auto name = tenant::parse_name(text); name.ok()) {
    if (name->size() > 63 ||
        name->find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-") != std::string::npos)
      std::abort();
  } else if (name.error().message().size() > 1024) {
    std::abort();
  }
  const auto json = parse_json(text);
  if (!json.ok()) return 0;
  if (const auto quota = tenant::parse_quota(*json); quota.ok()) {
    const auto again = tenant::parse_quota(tenant::to_json(*quota));
    if (!again.ok() || !(*again == *quota)) std::abort();
    const auto most = std::numeric_limits<std::uint64_t>::max();
    tenant::Amount much{.leases = most,
                        .gpus = most,
                        .slices = most,
                        .shares = most,
                        .profiles = {},
                        .memory = Bytes(most),
                        .watts = most,
                        .gpu_milli = most};
    tenant::Amount one{.leases = 1,
                       .gpus = 1,
                       .slices = 1,
                       .shares = 1,
                       .profiles = {},
                       .memory = Bytes(1),
                       .watts = 1,
                       .gpu_milli = 1};
    for (const auto& [profile, count] : quota->profiles)
      much.profiles[profile] = most, one.profiles[profile] = 1;
    // Who holds the most a number can say is beyond every limit that there is.
    const bool limited = quota->leases || quota->gpus || quota->slices || quota->shares || quota->memory ||
                         quota->watts || quota->gpu_seconds_month || !quota->profiles.empty();
    if (tenant::beyond(*quota, much, one, most).empty() == limited) std::abort();
    if (!(much + one == much) || !(one - much == tenant::Amount{})) std::abort();
  }
  if (const auto one = tenant::parse_tenant(*json); one.ok()) {
    const Json written = tenant::to_json(*one);
    const auto again = tenant::parse_tenant(written);
    if (!again.ok() || tenant::to_json(*again) != written) std::abort();
  }
  return 0;
}
