// The accounts as a document: what the API answers and the command prints are one thing.
#include <algorithm>
#include <cstdlib>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/usage/usage.hpp"
#include "edge/accounts/accounts.hpp"
#include "engine/meter/meter.hpp"

namespace bulkhead::meter {

using namespace std::chrono;

namespace {

constexpr seconds longest_ask{400LL * 86'400};

std::string_view account_of(accounts::Kind kind) {
  switch (kind) {
    case accounts::Kind::lease:
      return "lease";
    case accounts::Kind::unallocated:
      return "unallocated";
    case accounts::Kind::out_of_service:
      return "out-of-service";
  }
  return "?";
}

void put(Json& out, const usage::Amounts& a, unsigned units) {
  // Of a slice, however large; nobody's has no size, so it is told in whole GPUs alone.
  if (units > 0) out["sliceMicroseconds"] = a.unit_us / units;
  out["unitMicroseconds"] = a.unit_us;
  out["usedUnitMicroseconds"] = a.used_unit_us;
  out["mebibyteMicroseconds"] = a.mib_us;
  out["smMicroseconds"] = a.sm_us;
  out["tensorMicroseconds"] = a.tensor_us;
  out["dramMicroseconds"] = a.dram_us;
  out["idleMillijoules"] = a.idle_mj;
  out["dynamicMillijoules"] = a.dynamic_mj;
  out["errorMillijoules"] = a.error_mj;
  out["blindMicroseconds"] = a.blind_us;
  out["unmeteredMicroseconds"] = a.unmetered_us;
}

WallTime at_second(std::int64_t second) { return WallTime(seconds(second)); }

Error no_moment(std::string_view text) {
  return Error(Errc::invalid, fmt::format("'{}' is no time", printable(text, 40)),
               "a date, or RFC 3339: 2026-11-01, 2026-11-01T00:00:00Z, 2026-11-01T00:00:00+01:00");
}

// Two or four digits.
std::optional<int> digits(std::string_view text, std::size_t at, std::size_t count) {
  if (at + count > text.size()) return std::nullopt;
  for (const char c : text.substr(at, count))
    if (c < '0' || c > '9') return std::nullopt;
  return static_cast<int>(*parse_u64(text.substr(at, count)));
}

}  // namespace

Result<Moment> parse_moment(std::string_view given) {
  const std::string_view text = trim(given);
  const auto y = digits(text, 0, 4), m = digits(text, 5, 2), d = digits(text, 8, 2);
  if (!y || !m || !d || text[4] != '-' || text[7] != '-') return no_moment(text);
  const year_month_day date{year(*y), month(static_cast<unsigned>(*m)), day(static_cast<unsigned>(*d))};
  if (!date.ok() || *y < 1970 || *y > 9000) return no_moment(text);
  Moment out{.at = time_point_cast<milliseconds>(sys_days(date))};
  std::string_view rest = text.substr(10);
  if (!rest.empty() && (rest[0] == 'T' || rest[0] == 't' || rest[0] == ' ')) {
    const auto hour = digits(rest, 1, 2), minute = digits(rest, 4, 2);
    if (!hour || !minute || rest[3] != ':' || *hour > 23 || *minute > 59) return no_moment(text);
    out.at += hours(*hour) + minutes(*minute);
    rest = rest.substr(6);
    if (!rest.empty() && rest[0] == ':') {
      const auto second = digits(rest, 1, 2);
      if (!second || *second > 59) return no_moment(text);
      out.at += seconds(*second);
      rest = rest.substr(3);
      if (!rest.empty() && rest[0] == '.') {
        const auto end = rest.find_first_not_of("0123456789", 1);
        if (end == 1 || rest.size() == 1) return no_moment(text);
        rest = end == std::string_view::npos ? std::string_view() : rest.substr(end);
      }
    }
    if (rest.empty()) return no_moment(text);  // a time of day that says not where
  }
  if (rest.empty() || rest == "Z" || rest == "z") return out;
  const auto hour = digits(rest, 1, 2), minute = digits(rest, 4, 2);
  if ((rest[0] != '+' && rest[0] != '-') || !hour || !minute || rest[3] != ':' || rest.size() != 6 ||
      *hour > 14 || *minute > 59)
    return no_moment(text);
  out.offset = (hours(*hour) + minutes(*minute)) * (rest[0] == '-' ? -1 : 1);
  out.at -= out.offset;
  return out;
}

Status parse_by(std::string_view text, Ask& ask) {
  if (text.empty()) return ok_status();
  for (const auto word : split(text, ',')) {
    const auto by = trim(word);
    if (by == "day")
      ask.by_day = true;
    else if (by == "lease")
      ask.by_lease = true;
    else if (by == "gpu")
      ask.by_gpu = true;
    else if (by != "tenant")
      return Error(Errc::invalid,
                   fmt::format("by: '{}' is none of day, lease, gpu, tenant", printable(by, 40)));
  }
  return ok_status();
}

Result<Json> report(const std::filesystem::path& state, const Ask& ask) {
  const auto begin = floor<seconds>(ask.from).time_since_epoch().count();
  const auto end = ceil<seconds>(ask.to).time_since_epoch().count();
  if (begin < 0 || end <= begin) return Error(Errc::invalid, "the time asked for ends before it begins");
  if (seconds(end - begin) > longest_ask)
    return Error(Errc::invalid, "more than 400 days are asked for: accounts are not kept longer");
  const auto quarter = accounts::quarter_s;
  accounts::Query query{.from = begin / quarter,
                        .to = (end + quarter - 1) / quarter,
                        .tenant = ask.tenant,
                        .by_day = ask.by_day,
                        .by_lease = ask.by_lease,
                        .by_gpu = ask.by_gpu,
                        // Whole quarters, so that a quarter is of one day.
                        .day_offset_s = seconds(ask.offset).count() / quarter * quarter};
  BH_TRY(auto file, accounts::Accounts::open(state, accounts::Accounts::Access::read_only));
  BH_TRY(const auto answer, file->ask(query));

  Json out{{"from", rfc3339(at_second(query.from * quarter))},
           {"to", rfc3339(at_second(query.to * quarter))}};
  if (ask.tenant) out["tenant"] = *ask.tenant;
  Json by = Json::array();
  if (ask.by_day) by.push_back("day");
  if (ask.by_lease) by.push_back("lease");
  if (ask.by_gpu) by.push_back("gpu");
  by.push_back("tenant");
  out["by"] = std::move(by);
  out["unitsOfGpu"] = usage::whole_gpu;
  if (answer.first_us) out["begins"] = rfc3339(at_second(*answer.first_us / 1'000'000));
  if (answer.written_us) out["writtenUntil"] = rfc3339(at_second(*answer.written_us / 1'000'000));

  usage::Amounts sum;
  Json items = Json::array();
  for (const auto& one : answer.sums) {
    Json item = Json::object();
    if (one.day) item["day"] = rfc3339(at_second(*one.day + query.day_offset_s)).substr(0, 10);
    if (ask.by_gpu) item["gpu"] = one.gpu.text;
    item["account"] = account_of(one.holder.kind);
    if (one.holder.kind == accounts::Kind::lease) {
      item["tenant"] = one.holder.tenant;
      if (ask.by_lease) {
        item["lease"] = one.holder.lease;
        item["part"] = one.holder.part;
        item["user"] = one.holder.user;
        if (!one.holder.label.empty()) item["label"] = one.holder.label;
        if (one.holder.generation != 0) item["generation"] = one.holder.generation;
      }
      item["class"] = one.holder.cls;
      if (!one.holder.profile.empty()) item["profile"] = one.holder.profile;
      item["units"] = one.holder.units;
    }
    put(item, one.amounts, one.holder.units);
    items.push_back(std::move(item));
    sum = sum + one.amounts;
  }
  out["items"] = std::move(items);
  Json total = Json::object();
  put(total, sum, 0);
  out["sum"] = std::move(total);
  if (ask.tenant) return out;

  // The other side of the account, kept apart from the lines: the GPUs' time and what their counters said.
  std::uint64_t us = 0, mj = 0;
  Json gpus = Json::array();
  for (const auto& gpu : answer.gpus) {
    us += gpu.us;
    mj += gpu.energy_mj;
    gpus.push_back({{"gpu", gpu.gpu.text},
                    {"name", gpu.name},
                    {"microseconds", gpu.us},
                    {"counterMillijoules", gpu.energy_mj},
                    {"unmeteredMicroseconds", gpu.unmetered_us}});
  }
  out["gpus"] = std::move(gpus);
  out["addsUp"] = sum.unit_us == us * usage::whole_gpu && sum.idle_mj + sum.dynamic_mj == mj;
  Json epochs = Json::array();
  for (const auto& one : answer.epochs)
    epochs.push_back(
        {{"epoch", one.id}, {"bootId", one.boot_id}, {"driver", one.driver}, {"since", rfc3339(one.since)}});
  out["epochs"] = std::move(epochs);
  return out;
}

}  // namespace bulkhead::meter
