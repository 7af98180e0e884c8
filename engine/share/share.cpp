#include "engine/share/share.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "base/fd.hpp"
#include "base/text.hpp"
#include "engine/share/registry.hpp"

namespace bulkhead::share {

Result<std::vector<Tenant>> list(const Place& place) {
  auto all = read_all(place);
  std::erase_if(all, [](const Tenant& tenant) { return !tenant.alive; });
  const auto costs = remembered_costs(place).value_or(sharing::Costs{});
  std::set<std::uint32_t> gpus;
  for (const auto& tenant : all)
    if (tenant.now)
      for (const auto& group : tenant.now->groups) gpus.insert(group.gpu);
  for (const auto gpu : gpus) {
    const auto here = plan_of(all, gpu, costs);
    for (auto& tenant : all)
      for (const auto& line : here.plan.lines)
        if (line.id == tenant.asked.id) tenant.line = line;
  }
  return all;
}

Result<Asked> set(const Place& place, std::string_view who, const std::function<Status(Asked&)>& change) {
  const auto lock = lock_table(place);  // two at once must not lose one
  if (!lock.ok() && lock.error().code() != Errc::not_found) return lock.error();
  auto all = read_all(place);
  Tenant* found = nullptr;
  for (auto& tenant : all)
    if (tenant.alive && (tenant.asked.name == who || std::to_string(tenant.asked.id) == who)) found = &tenant;
  if (found == nullptr)
    return Error(Errc::not_found, fmt::format("no tenant {} is running", printable(who, 64)),
                 "bulkhead share list");
  BH_CHECK(change(found->asked));
  const auto costs = remembered_costs(place).value_or(sharing::Costs{});
  if (found->now) {
    std::set<std::uint32_t> gpus;
    for (const auto& group : found->now->groups) gpus.insert(group.gpu);
    for (const auto gpu : gpus) {
      const auto here = plan_of(all, gpu, costs);
      if (!here.plan.refused.empty())
        return Error(Errc::invalid, here.plan.refused.front(),
                     "nothing was changed; `bulkhead share list` shows who runs");
    }
  }
  BH_CHECK(write_asked(place, found->asked));
  return found->asked;
}

Result<std::string> choose_gpu(const Place& place, std::string_view wanted) {
  const auto dir = place.root / "proc/driver/nvidia/gpus";
  const auto addresses = list_directory(dir);  // sorted by PCI address, as NVML's indices are
  if (!addresses.ok() || addresses->empty())
    return Error(
        Errc::unavailable, fmt::format("no GPU in {}", dir.string()),
        "load the NVIDIA driver, or try it on a twin: bulkhead twin run dgx-h100 -- bulkhead share selftest");
  std::vector<std::string> uuids;
  for (const auto& address : *addresses) {
    BH_TRY(const auto text, read_file(dir / address / "information", 65536));
    for (const auto line : split_lines(text))
      if (line.starts_with("GPU UUID:")) uuids.emplace_back(trim(line.substr(9)));
  }
  if (!wanted.empty()) {
    if (const auto index = parse_u64(wanted)) {
      if (*index < uuids.size()) return uuids[*index];
    } else if (std::find(uuids.begin(), uuids.end(), wanted) != uuids.end()) {
      return std::string(wanted);
    }
    return Error(Errc::not_found,
                 fmt::format("no GPU {}: this host has {}", printable(wanted, 64), uuids.size()),
                 "bulkhead inventory");
  }
  if (uuids.empty()) return Error(Errc::corrupt, fmt::format("{}: no GPU UUID there", dir.string()));
  const auto tenants = read_all(place);
  const auto on = [&](const std::string& uuid) {
    return std::count_if(tenants.begin(), tenants.end(),
                         [&](const Tenant& t) { return t.alive && t.asked.gpu == uuid; });
  };
  return *std::min_element(uuids.begin(), uuids.end(),
                           [&](const auto& a, const auto& b) { return on(a) < on(b); });
}

Result<std::string> find_guard() {
  std::error_code failed;
  const auto self = std::filesystem::read_symlink("/proc/self/exe", failed);
  if (failed) return errno_error("read /proc/self/exe", failed.value());
  for (const auto& path : {self.parent_path() / "libbulkhead-guard.so",
                           self.parent_path() / "../lib/bulkhead/libbulkhead-guard.so"})
    if (std::filesystem::exists(path, failed)) return std::filesystem::weakly_canonical(path).string();
  return Error(Errc::not_found, fmt::format("no libbulkhead-guard.so beside {}", self.string()),
               "name it: --guard-library FILE");
}

Json to_json(const Tenant& tenant) {
  Json out = to_json(tenant.asked);
  Json line{{"sliceMicroseconds", tenant.line.slice_us}, {"expected", tenant.line.expected}};
  if (tenant.line.in_turns) line["turnMicroseconds"] = tenant.line.turn_us;
  if (tenant.line.duty_on_us != 0)
    line["duty"] = {{"onMicroseconds", tenant.line.duty_on_us},
                    {"periodMicroseconds", tenant.line.duty_period_us}};
  line["why"] = tenant.line.why;
  out["plan"] = std::move(line);
  out["now"] = tenant.now ? to_json(*tenant.now) : Json();
  return out;
}

}  // namespace bulkhead::share
