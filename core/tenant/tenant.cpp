#include "core/tenant/tenant.hpp"

#include <algorithm>
#include <limits>

#include <fmt/format.h>

#include "base/fields.hpp"
#include "base/text.hpp"

namespace bulkhead::tenant {

namespace {

constexpr std::uint64_t most = 1'000'000, most_bytes = 1ULL << 60U, most_seconds = 1'000'000'000'000;
constexpr std::size_t most_profiles = 64, profile_bytes = 32, note_bytes = 200;

std::uint64_t plus(std::uint64_t a, std::uint64_t b) {
  return a > std::numeric_limits<std::uint64_t>::max() - b ? std::numeric_limits<std::uint64_t>::max()
                                                           : a + b;
}
std::uint64_t less(std::uint64_t a, std::uint64_t b) { return a > b ? a - b : 0; }

template <class Op>
Amount each(const Amount& a, const Amount& b, Op op) {
  Amount out{.leases = op(a.leases, b.leases),
             .gpus = op(a.gpus, b.gpus),
             .slices = op(a.slices, b.slices),
             .shares = op(a.shares, b.shares),
             .profiles = a.profiles,
             .memory = Bytes(op(a.memory.count, b.memory.count)),
             .watts = op(a.watts, b.watts),
             .gpu_milli = op(a.gpu_milli, b.gpu_milli)};
  for (const auto& [name, count] : b.profiles) {
    const auto had = a.profiles.find(name);
    out.profiles[name] = op(had == a.profiles.end() ? 0 : had->second, count);
  }
  std::erase_if(out.profiles, [](const auto& one) { return one.second == 0; });
  return out;
}

void put(Json& out, std::string_view key, const std::optional<std::uint64_t>& value) {
  if (value) out[std::string(key)] = *value;
}

Quota read_quota(const Json& json, const std::string& path, std::vector<std::string>& mistakes) {
  Fields fields(json, path, mistakes);
  Quota quota;
  quota.leases = fields.whole("leases", 0, most);
  quota.gpus = fields.whole("gpus", 0, most);
  quota.slices = fields.whole("slices", 0, most);
  quota.shares = fields.whole("shares", 0, most);
  if (const auto bytes = fields.whole("memory", 0, most_bytes)) quota.memory = Bytes(*bytes);
  quota.watts = fields.whole("watts", 0, 1'000'000'000);
  quota.gpu_seconds_month = fields.whole("gpuSecondsMonth", 0, most_seconds);
  if (const Json* profiles = fields.object("profiles")) {
    if (profiles->size() > most_profiles) {
      fields.mistake("profiles", fmt::format("at most {} profiles", most_profiles));
    } else {
      Fields inner(*profiles, fields.path_of("profiles"), mistakes);
      for (const auto& [name, value] : profiles->items()) {
        if (name.empty() || name.size() > profile_bytes)
          inner.mistake(name, fmt::format("no name of a profile (1 to {} bytes)", profile_bytes));
        else if (const auto count = inner.whole(name, 0, most))
          quota.profiles[name] = *count;
      }
    }
  }
  fields.no_others();
  return quota;
}

}  // namespace

Result<std::string> parse_name(std::string_view text) {
  const auto letter = [](char c) { return c >= 'a' && c <= 'z'; };
  const auto good = [&](char c) { return letter(c) || (c >= '0' && c <= '9') || c == '-'; };
  if (text.empty() || text.size() > 63 || !letter(text.front()) || text.back() == '-' ||
      !std::all_of(text.begin(), text.end(), good))
    return Error(
        Errc::invalid,
        fmt::format(
            "'{}' is no name: 1 to 63 lower-case letters, digits and hyphens, a letter first, no hyphen last",
            printable(text, 80)));
  return std::string(text);
}

Amount operator+(const Amount& a, const Amount& b) { return each(a, b, plus); }
Amount operator-(const Amount& a, const Amount& b) { return each(a, b, less); }

std::vector<std::string> beyond(const Quota& quota, const Amount& held, const Amount& more,
                                std::uint64_t used_gpu_seconds) {
  std::vector<std::string> out;
  const auto check = [&](const std::optional<std::uint64_t>& limit, std::uint64_t has, std::uint64_t asks,
                         std::string_view what) {
    if (limit && asks > 0 && plus(has, asks) > *limit)
      out.push_back(fmt::format("holds {} of {} {} and asks for {}", has, *limit, what, asks));
  };
  check(quota.leases, held.leases, more.leases, "leases");
  check(quota.gpus, held.gpus, more.gpus, "whole GPUs");
  check(quota.slices, held.slices, more.slices, "MIG slices");
  for (const auto& [name, asks] : more.profiles) {
    const auto limit = quota.profiles.find(name);
    if (limit == quota.profiles.end()) continue;
    const auto has = held.profiles.find(name);
    check(limit->second, has == held.profiles.end() ? 0 : has->second, asks, fmt::format("{} slices", name));
  }
  check(quota.shares, held.shares, more.shares, "software shares");
  if (quota.memory && more.memory.count > 0 &&
      plus(held.memory.count, more.memory.count) > quota.memory->count)
    out.push_back(fmt::format("holds {} of {} of GPU memory and asks for {}", human(held.memory),
                              human(*quota.memory), human(more.memory)));
  check(quota.watts, held.watts, more.watts, "watts");
  if (quota.gpu_seconds_month && more.gpu_milli > 0 && used_gpu_seconds >= *quota.gpu_seconds_month)
    out.push_back(fmt::format("has used {:.1f} of {:.1f} GPU-hours of this month",
                              static_cast<double>(used_gpu_seconds) / 3600,
                              static_cast<double>(*quota.gpu_seconds_month) / 3600));
  return out;
}

Json to_json(const Quota& quota) {
  Json out = Json::object();
  put(out, "leases", quota.leases);
  put(out, "gpus", quota.gpus);
  put(out, "slices", quota.slices);
  if (!quota.profiles.empty()) {
    Json profiles = Json::object();
    for (const auto& [name, count] : quota.profiles) profiles[name] = count;
    out["profiles"] = std::move(profiles);
  }
  put(out, "shares", quota.shares);
  if (quota.memory) out["memory"] = quota.memory->count;
  put(out, "watts", quota.watts);
  put(out, "gpuSecondsMonth", quota.gpu_seconds_month);
  return out;
}

Result<Quota> parse_quota(const Json& json) {
  std::vector<std::string> mistakes;
  Quota quota = read_quota(json, "", mistakes);
  BH_CHECK(no_mistakes("quota", mistakes));
  return quota;
}

Json to_json(const Tenant& tenant) {
  return {{"name", tenant.name},
          {"weight", tenant.weight},
          {"quota", to_json(tenant.quota)},
          {"suspended", tenant.suspended},
          {"note", tenant.note},
          {"created", tenant.created.time_since_epoch().count()},
          {"version", tenant.version}};
}

Result<Tenant> parse_tenant(const Json& json) {
  std::vector<std::string> mistakes;
  Fields fields(json, "", mistakes);
  Tenant tenant;
  const auto name = fields.text("name", 63);
  if (!name) {
    if (!fields.has("name")) fields.mistake("name", "is missing");
  } else if (auto parsed = parse_name(*name); parsed.ok()) {
    tenant.name = *parsed;
  } else {
    fields.mistake("name", parsed.error().message());
  }
  tenant.weight =
      static_cast<std::uint32_t>(fields.whole("weight", min_weight, max_weight).value_or(tenant.weight));
  if (const Json* quota = fields.object("quota")) tenant.quota = read_quota(*quota, "quota", mistakes);
  tenant.suspended = fields.flag("suspended").value_or(false);
  tenant.note = fields.text("note", note_bytes).value_or("");
  tenant.created =
      WallTime(std::chrono::milliseconds(fields.number("created", 0, INT64_MAX / 2).value_or(0)));
  tenant.version = fields.number("version", 0, INT64_MAX).value_or(1);
  fields.no_others();
  BH_CHECK(no_mistakes("tenant", mistakes));
  return tenant;
}

}  // namespace bulkhead::tenant
