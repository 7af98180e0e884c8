// GET /telemetry and /telemetry/history. A tenant sees what it has and nothing else: a GPU's power tells of
// everybody on it, and the past of a slice tells of who had it before.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/text.hpp"
#include "daemon/serve/app.hpp"
#include "daemon/serve/documents.hpp"

namespace bulkhead::serve {

namespace {

using sample::Signal;

constexpr std::chrono::hours seconds_kept{1};
constexpr std::chrono::hours minutes_kept{30 * 24};

http::Response json(const Json& body) {
  http::Response out{.status = 200, .type = "application/json", .body = compact(body)};
  out.headers.emplace_back("Cache-Control", "no-store");
  return out;
}

Json values_document(const sample::Values& values, std::uint64_t now_ns) {
  Json out = Json::object();
  for (const auto& row : sample::rows()) {
    const auto& value = values[static_cast<std::size_t>(row.signal)];
    if (!value.known() && !value.refused) continue;
    Json one{{"unit", row.unit}};
    if (value.known()) {
      one["value"] = value.number;
      one["ageMs"] = std::round(static_cast<double>(now_ns - std::min(now_ns, value.at_ns)) / 1e5) / 10;
    }
    if (value.refused) one["unavailable"] = name_of(*value.refused);
    out[std::string(row.name)] = std::move(one);
  }
  return out;
}

void add_holder(Json& out, const Holder* holder) {
  if (holder == nullptr) return;
  out["tenant"] = holder->tenant;
  out["lease"] = holder->lease;
}

const sample::Gpu* find_gpu(const sample::Snapshot& seen, std::string_view text) {
  const auto index = parse_u64(text);
  for (const auto& gpu : seen.gpus)
    if (gpu.uuid.text == text || (index && *index == gpu.index)) return &gpu;
  return nullptr;
}

}  // namespace

void App::get_telemetry(const Asked& asked, const Rule& rule, std::map<std::string, std::string>&) {
  if (telemetry_ == nullptr)
    return asked->answer(problem(503, "unavailable", "nothing is sampled: serve.yaml says telemetry: off"));
  const bool all = access::may(asked->caller.role, rule.verb, rule.resource, access::Whose::others);
  later(asked, lists_, [this, asked, all] {
    const auto seen = telemetry_->seen();
    const auto now = control_.now();
    const Holders holders(*now);
    const std::uint64_t now_ns = monotonic_ns();
    const std::string& tenant = asked->caller.tenant;
    const auto mine = [&](const Holder* holder) {
      return all || (holder != nullptr && !tenant.empty() && holder->tenant == tenant);
    };
    Json gpus = Json::array();
    for (const auto& gpu : seen->gpus) {
      const Holder* whole = holders.of_gpu(gpu.uuid);
      Json slices = Json::array();
      for (const auto& slice : gpu.slices) {
        const Holder* holder = holders.of_slice(gpu.uuid, slice.gpu_instance);
        if (!mine(holder)) continue;
        Json one{{"gpuInstance", slice.gpu_instance}, {"device", slice.uuid.text}};
        if (holder != nullptr) one["profile"] = holder->profile;
        add_holder(one, holder);
        one["values"] = values_document(slice.values, now_ns);
        slices.push_back(std::move(one));
      }
      if (!mine(whole) && slices.empty()) continue;
      Json one{
          {"gpu", gpu.uuid.text}, {"index", gpu.index}, {"name", gpu.name}, {"state", name_of(gpu.state)}};
      if (mine(whole)) {
        one["pci"] = gpu.pci.str();
        if (gpu.state == sample::State::hung) {
          one["call"] = gpu.call;
          one["hungMs"] = static_cast<double>(now_ns - std::min(now_ns, gpu.since_ns)) / 1e6;
        }
        if (!gpu.why.empty()) one["why"] = gpu.why;
        add_holder(one, whole);
        one["values"] = values_document(gpu.values, now_ns);
      }
      one["slices"] = std::move(slices);
      gpus.push_back(std::move(one));
    }
    Json out{{"at", rfc3339(wall_now())}};
    if (!seen->why.empty()) out["why"] = all ? seen->why : "the GPUs cannot be asked now";
    out["gpus"] = std::move(gpus);
    asked->answer(json(out));
  });
}

void App::get_telemetry_history(const Asked& asked, const Rule& rule, std::map<std::string, std::string>&) {
  using Grain = history::History::Grain;
  if (telemetry_ == nullptr)
    return asked->answer(problem(503, "unavailable", "nothing is sampled: serve.yaml says telemetry: off"));
  const auto& request = asked->request;
  std::vector<std::string> mistakes;
  const auto gpu_text = request.asked("gpu");
  if (!gpu_text) mistakes.emplace_back("gpu: is missing; a UUID or an index");
  std::optional<unsigned> slice;
  if (const auto text = request.asked("slice")) {
    const auto number = parse_u64(*text);
    if (number && *number < 1024)
      slice = static_cast<unsigned>(*number);
    else
      mistakes.emplace_back("slice: must be the number of a GPU instance");
  }
  const sample::Row* row = nullptr;
  const auto signal = request.asked("signal");
  std::vector<std::string_view> kept;
  for (const auto& one : sample::rows()) {
    if (one.step <= 0) continue;  // of this moment alone
    kept.push_back(one.name);
    if (signal && one.name == *signal) row = &one;
  }
  if (row == nullptr) mistakes.push_back(fmt::format("signal: is one of {}", fmt::join(kept, ", ")));
  const WallTime now = wall_now();
  WallTime to = now;
  if (const auto text = request.asked("to")) {
    if (const auto time = parse_rfc3339(*text))
      to = std::min(*time, now);
    else
      mistakes.emplace_back("to: is no RFC 3339 time");
  }
  WallTime from = to - seconds_kept;
  if (const auto text = request.asked("from")) {
    if (const auto time = parse_rfc3339(*text))
      from = *time;
    else
      mistakes.emplace_back("from: is no RFC 3339 time");
  }
  from = std::clamp(from, now - minutes_kept - std::chrono::hours(1), std::max(to, now - minutes_kept));
  Grain grain = to - from > seconds_kept || now - from > seconds_kept + std::chrono::minutes(1)
                    ? Grain::minute
                    : Grain::second;
  if (const auto text = request.asked("grain")) {
    if (*text == "second" || *text == "minute")
      grain = *text == "minute" ? Grain::minute : Grain::second;
    else
      mistakes.emplace_back("grain: is second or minute");
  }
  if (!mistakes.empty())
    return asked->answer(problem(400, "invalid", fmt::format("{}", fmt::join(mistakes, "; "))));

  const bool all = access::may(asked->caller.role, rule.verb, rule.resource, access::Whose::others);
  later(asked, lists_, [=, this] {
    const auto none = [&] {
      return asked->answer(problem(
          404, "not-found",
          fmt::format("there is no GPU {}{}", printable(*gpu_text, 80), slice ? " with such a slice" : "")));
    };
    const auto seen = telemetry_->seen();
    const sample::Gpu* gpu = find_gpu(*seen, *gpu_text);
    if (gpu == nullptr) return none();
    WallTime begins = from;
    if (!all) {
      const auto leases = control_.now();
      const Holders holders(*leases);
      const Holder* holder = slice ? holders.of_slice(gpu->uuid, *slice) : holders.of_gpu(gpu->uuid);
      if (holder == nullptr || asked->caller.tenant.empty() || holder->tenant != asked->caller.tenant)
        return none();
      const auto lease = leases->leases.find(holder->lease);
      // Not of the time before it had it: what began in a minute or second that it shares is left out.
      if (lease == leases->leases.end() || !lease->second->active_since) return none();
      const WallTime since = *lease->second->active_since;
      begins =
          std::max<WallTime>(begins, grain == Grain::minute ? std::chrono::ceil<std::chrono::minutes>(since)
                                                            : std::chrono::ceil<std::chrono::seconds>(since));
    }
    // The past is kept by the clock that is never set; ages are the same by both.
    const std::uint64_t now_s = monotonic_ns() / 1'000'000'000;
    const auto to_monotonic = [&](WallTime time) -> std::uint64_t {
      const auto age = std::chrono::floor<std::chrono::seconds>(now - time).count();
      return age <= 0                                   ? now_s + 1
             : static_cast<std::uint64_t>(age) >= now_s ? 0
                                                        : now_s - static_cast<std::uint64_t>(age);
    };
    const auto epoch = std::chrono::duration_cast<std::chrono::seconds>(now.time_since_epoch()).count();
    const auto past = begins < to
                          ? telemetry_->monitor().history(gpu->index, slice, row->signal,
                                                          to_monotonic(begins), to_monotonic(to), grain)
                          : std::vector<history::Point>{};
    Json points = Json::array();
    for (const auto& point : past)
      points.push_back(
          Json::array({epoch - static_cast<std::int64_t>(now_s) + static_cast<std::int64_t>(point.at_s),
                       point.mean, point.worst}));
    Json out{{"gpu", gpu->uuid.text}};
    if (slice) out["slice"] = *slice;
    out["signal"] = row->name;
    out["unit"] = row->per_second > 0 ? std::string(row->unit == "J" ? "W" : "%") : std::string(row->unit);
    out["grain"] = grain == Grain::minute ? "minute" : "second";
    out["from"] = rfc3339(begins);
    out["to"] = rfc3339(to);
    out["points"] = std::move(points);
    asked->answer(json(out));
  });
}

}  // namespace bulkhead::serve
