#include "daemon/serve/documents.hpp"

#include <algorithm>

#include <fmt/format.h>

#include "base/fields.hpp"
#include "base/text.hpp"
#include "daemon/serve/rest.hpp"

namespace bulkhead::serve {

namespace {

constexpr std::string_view digits = "0123456789abcdef";

void put_time(Json& out, const char* key, const std::optional<WallTime>& time) {
  if (time) out[key] = rfc3339(*time);
}

void put(Json& out, const char* key, const std::string& text) {
  if (!text.empty()) out[key] = text;
}

std::string hex(const auto& bytes) {
  std::string out;
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    out += digits[byte >> 4U];
    out += digits[byte & 15U];
  }
  return out;
}

std::optional<int> number(std::string_view text, std::size_t at, std::size_t size) {
  if (text.size() < at + size) return std::nullopt;
  int value = 0;
  for (const char c : text.substr(at, size)) {
    if (c < '0' || c > '9') return std::nullopt;
    value = value * 10 + (c - '0');
  }
  return value;
}

// One Error of what core found and what we did.
Status all_mistakes(std::string_view what, const Status& before, const std::vector<std::string>& mistakes) {
  if (before.ok()) return no_mistakes(what, mistakes);
  if (mistakes.empty()) return before;
  return Error(Errc::invalid, fmt::format("{}; {}", before.error().message(), join(mistakes, "; ")));
}

}  // namespace

Json document(const lease::Lease& lease) {
  Json out{{"id", lease.id}, {"tenant", lease.tenant}, {"user", lease.user}};
  const Json ask = lease::to_json(lease.ask);
  for (const auto& [key, value] : ask.items())
    if (key != "deadline") out[key] = value;
  put_time(out, "deadline", lease.ask.deadline);
  out["state"] = lease::name_of(lease.state);
  if (!lease.reason.empty()) out["reason"] = lease.reason;
  if (!lease.ways.empty()) out["ways"] = lease.ways;
  out["created"] = rfc3339(lease.created);
  put_time(out, "activeSince", lease.active_since);
  put_time(out, "expires", lease.expires);
  put_time(out, "ended", lease.ended);
  put_time(out, "notice", lease.notice);
  Json devices = Json::array();
  for (const auto& part : lease.parts) {
    Json device{{"gpu", part.gpu.text}, {"gpuName", part.gpu_name}};
    put(device, "pci", part.pci);
    device["device"] = part.device.text;
    put(device, "profile", part.profile);
    if (part.start) device["start"] = *part.start;
    device["generation"] = part.generation;
    device["memory"] = part.memory.count;
    if (part.weight != 0) device["weight"] = part.weight;
    if (part.numa_node >= 0) device["numaNode"] = part.numa_node;
    put(device, "cpus", part.cpus);
    device["deviceNodes"] = part.device_nodes;
    put(device, "cdi", part.cdi);
    devices.push_back(std::move(device));
  }
  out["devices"] = std::move(devices);
  Json environment = Json::object();
  for (const auto& [name, value] : lease::environment(lease)) environment[name] = value;
  out["environment"] = std::move(environment);
  out["guarantees"] = lease::guarantees(lease.ask.cls);
  out["version"] = lease.version;
  return out;
}

Json document(const tenant::Tenant& tenant, const control::Snapshot& now) {
  Json out{{"name", tenant.name},
           {"weight", tenant.weight},
           {"quota", tenant::to_json(tenant.quota)},
           {"suspended", tenant.suspended}};
  put(out, "note", tenant.note);
  out["created"] = rfc3339(tenant.created);
  out["version"] = tenant.version;
  tenant::Amount held;
  if (const auto at = now.held.find(tenant.name); at != now.held.end()) held = at->second;
  std::uint64_t seconds = 0;
  if (const auto at = now.gpu_seconds_month.find(tenant.name); at != now.gpu_seconds_month.end())
    seconds = at->second;
  Json profiles = Json::object();
  for (const auto& [name, count] : held.profiles)
    if (count > 0) profiles[name] = count;
  out["held"] = Json{{"leases", held.leases}, {"gpus", held.gpus},         {"slices", held.slices},
                     {"profiles", profiles},  {"shares", held.shares},     {"memory", held.memory.count},
                     {"watts", held.watts},   {"gpuSecondsMonth", seconds}};
  return out;
}

Json document(const control::User& user) {
  Json out{{"id", user.id}, {"user", user.user}, {"role", access::name_of(user.role)}};
  if (!user.tenant.empty()) out["tenant"] = user.tenant;
  if (!user.note.empty()) out["note"] = user.note;
  out["created"] = rfc3339(user.created);
  put_time(out, "expires", user.expires);
  put_time(out, "revoked", user.revoked);
  out["certificate"] = user.certificate;
  return out;
}

Json document(std::int64_t lease, const control::Standing& standing) {
  Json out{{"lease", lease}, {"state", lease::name_of(standing.state)}};
  if (standing.own == 0) return out;
  out["place"] = standing.ahead + 1;
  out["own"] = standing.own;
  out["tenantsAhead"] = standing.tenants_ahead;
  out["waiting"] = standing.waiting;
  put(out, "why", standing.why);
  return out;
}

Json document(const control::PoolGpu& gpu) {
  Json out{{"gpu", gpu.gpu.text}, {"index", gpu.index}, {"name", gpu.name}, {"pool", gpu.pool}};
  if (!gpu.why.empty()) out["why"] = gpu.why;
  out["numaNode"] = gpu.numa_node;
  out["free"] = gpu.free;
  out["leases"] = gpu.leases;
  if (gpu.cordon)
    out["cordon"] =
        Json{{"why", gpu.cordon->why}, {"by", gpu.cordon->by}, {"since", rfc3339(gpu.cordon->since)}};
  return out;
}

Json document(const control::Snapshot& now) {
  Json gpus = Json::array();
  for (const auto& gpu : now.gpus) gpus.push_back(document(gpu));
  Json out{{"draining", now.draining}};
  if (!now.trouble.empty()) out["trouble"] = now.trouble;
  out["gpus"] = std::move(gpus);
  return out;
}

Json audit_document(const control::Event& event) {
  Json out{{"id", event.id}, {"at", rfc3339(event.at)}, {"user", event.user}};
  if (!event.role.empty()) out["role"] = event.role;
  if (!event.tenant.empty()) out["tenant"] = event.tenant;
  if (!event.from.empty()) out["from"] = event.from;
  out["verb"] = event.verb;
  out["what"] = event.what;
  out["outcome"] = event.outcome;
  if (!event.body.is_null()) out["detail"] = event.body;
  out["hash"] = hex(event.hash);
  return out;
}

Json event_document(const control::Event& event) {
  Json out{{"id", event.id}, {"at", rfc3339(event.at)}, {"kind", event.kind}};
  if (!event.tenant.empty()) out["tenant"] = event.tenant;
  out["what"] = event.what;
  out["verb"] = event.verb;
  if (event.kind == "lease") {
    if (const auto lease = lease::parse(event.body); lease.ok()) out["lease"] = document(*lease);
  }
  return out;
}

Result<LeaseRequest> parse_lease_request(const Json& json) {
  LeaseRequest out;
  if (!json.is_object()) {
    BH_TRY(out.ask, lease::parse_ask(json));
    return out;
  }
  std::vector<std::string> mistakes;
  Json ask = json;
  if (const auto at = ask.find("tenant"); at != ask.end()) {
    const auto name = at->is_string() ? tenant::parse_name(at->get_ref<const std::string&>())
                                      : Result<std::string>(Error(Errc::invalid, "must be a text"));
    if (name.ok())
      out.tenant = *name;
    else if (!at->is_null())
      mistakes.push_back("tenant: " + name.error().message());
    ask.erase("tenant");
  }
  if (const auto at = ask.find("deadline"); at != ask.end() && !at->is_null()) {
    const auto moment =
        at->is_string() ? parse_rfc3339(at->get_ref<const std::string&>()) : std::optional<WallTime>();
    if (moment && moment->time_since_epoch().count() >= 0) {
      *at = moment->time_since_epoch().count();
    } else {
      mistakes.emplace_back("deadline: must be a moment like 2026-11-22T14:05:00Z");
      ask.erase("deadline");
    }
  }
  auto parsed = lease::parse_ask(ask);
  BH_CHECK(all_mistakes("lease", parsed.ok() ? ok_status() : Status(Error(parsed.error())), mistakes));
  out.ask = std::move(*parsed);
  return out;
}

Result<TenantRequest> parse_tenant_request(const Json& json) {
  TenantRequest out;
  std::vector<std::string> mistakes;
  const auto given = [&](const char* key) {
    return json.is_object() && json.contains(key) && !json[key].is_null();
  };
  for (const char* key : {"created", "version"})
    if (given(key)) mistakes.push_back(fmt::format("{}: is ours to say", key));
  auto parsed = tenant::parse_tenant(json);
  BH_CHECK(all_mistakes("tenant", parsed.ok() ? ok_status() : Status(Error(parsed.error())), mistakes));
  out.tenant = std::move(*parsed);
  out.weight = given("weight");
  out.quota = given("quota");
  out.suspended = given("suspended");
  out.note = given("note");
  return out;
}

Result<control::AskToken> parse_token_request(const Json& json) {
  std::vector<std::string> mistakes;
  control::AskToken out;
  Fields fields(json, "", mistakes);
  const auto user = fields.text("user", 100);
  if (!user ? !fields.has("user") : user->empty()) fields.mistake("user", "is missing: whose token it is");
  out.user = user.value_or("");
  if (const auto name = fields.text("role", 32)) {
    if (const auto role = access::parse_role(*name); role.ok())
      out.role = *role;
    else
      fields.mistake("role", "must be one of admin, operator, tenant, auditor");
  } else if (!fields.has("role")) {
    fields.mistake("role", "is missing: one of admin, operator, tenant, auditor");
  }
  if (const auto name = fields.text("tenant", 63)) {
    if (const auto parsed = tenant::parse_name(*name); parsed.ok())
      out.tenant = *parsed;
    else
      fields.mistake("tenant", parsed.error().message());
  }
  if (const auto seconds = fields.whole("ttlSeconds", 60, 315'360'000))
    out.ttl = std::chrono::seconds(*seconds);
  if (const auto hash = fields.text("certificate", 64)) {
    if (hash->size() == 64 && hash->find_first_not_of(digits) == std::string::npos)
      out.certificate = *hash;
    else
      fields.mistake("certificate", "must be its SHA-256: 64 hex digits in lower case");
  }
  out.note = fields.text("note", 200).value_or("");
  fields.no_others();
  BH_CHECK(no_mistakes("token", mistakes));
  return out;
}

Result<std::chrono::seconds> parse_renew_request(const Json& json) {
  std::vector<std::string> mistakes;
  Fields fields(json, "", mistakes);
  const auto seconds = fields.whole("ttlSeconds", static_cast<std::uint64_t>(lease::shortest.count()),
                                    static_cast<std::uint64_t>(lease::longest.count()));
  if (!fields.has("ttlSeconds")) fields.mistake("ttlSeconds", "is missing");
  fields.no_others();
  BH_CHECK(no_mistakes("renewal", mistakes));
  return std::chrono::seconds(seconds.value_or(0));
}

Result<std::string> parse_reason_request(const Json& json) {
  std::vector<std::string> mistakes;
  Fields fields(json, "", mistakes);
  const auto why = fields.text("why", control::most_why);
  if (!fields.has("why")) fields.mistake("why", "is missing: one line for those whom it touches");
  if (why && why->empty()) fields.mistake("why", "is empty");
  fields.no_others();
  BH_CHECK(no_mistakes("reason", mistakes));
  return why.value_or("");
}

Result<bool> parse_drain_request(const Json& json) {
  std::vector<std::string> mistakes;
  Fields fields(json, "", mistakes);
  const auto on = fields.flag("draining");
  if (!fields.has("draining")) fields.mistake("draining", "is missing: true or false");
  fields.no_others();
  BH_CHECK(no_mistakes("drain", mistakes));
  return on.value_or(false);
}

Result<std::chrono::seconds> parse_rest_request(const Json& json) {
  std::vector<std::string> mistakes;
  Fields fields(json, "", mistakes);
  const auto seconds = fields.whole("seconds", 1, static_cast<std::uint64_t>(Rest::longest.count()));
  if (!fields.has("seconds")) fields.mistake("seconds", "is missing: until it has to be asked for again");
  fields.no_others();
  BH_CHECK(no_mistakes("rest", mistakes));
  return std::chrono::seconds(seconds.value_or(0));
}

std::optional<WallTime> parse_rfc3339(std::string_view text) {
  const auto year = number(text, 0, 4), month = number(text, 5, 2), day = number(text, 8, 2);
  const auto hour = number(text, 11, 2), minute = number(text, 14, 2), second = number(text, 17, 2);
  if (!year || !month || !day || !hour || !minute || !second || text[4] != '-' || text[7] != '-' ||
      (text[10] != 'T' && text[10] != 't') || text[13] != ':' || text[16] != ':')
    return std::nullopt;
  const std::chrono::year_month_day date(std::chrono::year(*year),
                                         std::chrono::month(static_cast<unsigned>(*month)),
                                         std::chrono::day(static_cast<unsigned>(*day)));
  if (!date.ok() || *hour > 23 || *minute > 59 || *second > 60) return std::nullopt;
  std::size_t at = 19;
  std::int64_t ms = 0;
  if (at < text.size() && text[at] == '.') {
    const std::size_t first = ++at;
    for (std::int64_t scale = 100; at < text.size() && text[at] >= '0' && text[at] <= '9'; ++at, scale /= 10)
      ms += (text[at] - '0') * scale;
    if (at == first || at - first > 9) return std::nullopt;
  }
  std::int64_t offset = 0;  // minutes
  if (const auto zone = text.substr(at); zone != "Z" && zone != "z") {
    const auto hours = number(zone, 1, 2), minutes = number(zone, 4, 2);
    if (zone.size() != 6 || (zone[0] != '+' && zone[0] != '-') || zone[3] != ':' || !hours || !minutes ||
        *hours > 23 || *minutes > 59)
      return std::nullopt;
    offset = (*hours * 60 + *minutes) * (zone[0] == '-' ? -1 : 1);
  }
  return WallTime(std::chrono::sys_days(date)) + std::chrono::hours(*hour) +
         std::chrono::minutes(*minute - offset) + std::chrono::seconds(*second) +
         std::chrono::milliseconds(ms);
}

std::string compact(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::string cursor(std::string_view kind, std::string_view last) {
  return hex(fmt::format("{}:{}", kind, last));
}

std::optional<std::string> read_cursor(std::string_view kind, std::string_view text) {
  if (text.empty() || text.size() > 200 || text.size() % 2 != 0) return std::nullopt;
  std::string out;
  for (std::size_t i = 0; i < text.size(); i += 2) {
    const auto high = digits.find(text[i]), low = digits.find(text[i + 1]);
    if (high == std::string_view::npos || low == std::string_view::npos) return std::nullopt;
    out += static_cast<char>(high * 16 + low);
  }
  if (!out.starts_with(kind) || out.size() <= kind.size() || out[kind.size()] != ':') return std::nullopt;
  return out.substr(kind.size() + 1);
}

std::optional<Tags> parse_tags(std::string_view header) {
  Tags out;
  if (trim(header) == "*") {
    out.any = true;
    return out;
  }
  for (auto piece : split(header, ',')) {
    piece = trim(piece);
    const bool weak = piece.starts_with("W/");
    if (weak) piece.remove_prefix(2);
    if (piece.size() < 2 || piece.front() != '"' || piece.back() != '"' ||
        out.strong.size() + out.weak.size() >= 64)
      return std::nullopt;
    (weak ? out.weak : out.strong).emplace_back(piece.substr(1, piece.size() - 2));
  }
  return out;
}

}  // namespace bulkhead::serve
