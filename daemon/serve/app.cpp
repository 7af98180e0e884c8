#include "daemon/serve/app.hpp"

#include <grp.h>
#include <openssl/sha.h>
#include <pwd.h>

#include <algorithm>
#include <charconv>
#include <limits>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/text.hpp"
#include "daemon/serve/documents.hpp"
#include "daemon/serve/notify.hpp"

namespace bulkhead::serve {

namespace {

using access::Resource;
using access::Verb;
using access::Whose;
using control::Answer;
using control::Refusal;
using Values = std::map<std::string, std::string>;

constexpr std::size_t json_depth = 32, key_bytes = 128, kept_documents = 4096;
constexpr std::size_t jobs_waiting = 256, verdicts_waiting = 64, kept_uids = 4096;
constexpr std::uint64_t second_ns = 1'000'000'000, uid_kept_ns = 60 * second_ns;
constexpr std::uint64_t most_still_ns = 30 * second_ns;   // of the loop, before it is called stuck
constexpr double bursts = 4;                              // of a second's requests
constexpr double failures_a_second = 20, failures = 200;  // bad tokens of one address
constexpr double refusals_a_second = 20, refusals = 100;  // lines of the audit log by strangers
constexpr unsigned quota_tries = 8;

// A watchdog that bites sooner wants to know sooner.
std::uint64_t patience() {
  const auto dog = watchdog();
  return dog ? std::min(most_still_ns, static_cast<std::uint64_t>(dog->count()) * 1000 / 2) : most_still_ns;
}

std::string hash_of(const http::Request& request) {
  const std::string text = fmt::format("{}\n{}\n{}", request.method, request.path, request.body);
  std::array<unsigned char, SHA256_DIGEST_LENGTH> hash{};
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), hash.data());
  std::string out;
  for (const auto byte : hash) out += fmt::format("{:02x}", byte);
  return out;
}

// "7", not "07", "+7" or "7.0": one thing has one name.
std::optional<std::int64_t> parse_id(std::string_view text) {
  std::int64_t id = 0;
  if (text.empty() || text.size() > 18 || text.front() < '1' || text.front() > '9') return std::nullopt;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), id);
  return error == std::errc() && end == text.data() + text.size() ? std::optional<std::int64_t>(id)
                                                                  : std::nullopt;
}

http::Response said(const api::v1::Problem& what) {
  http::Response out{.status = what.status, .type = "application/problem+json"};
  out.body = compact(api::v1::to_json(what));
  out.headers.emplace_back("Cache-Control", "no-store");
  return out;
}

http::Response too_many(std::string detail, unsigned seconds) {
  auto out = problem(429, "too-many", std::move(detail));
  out.headers.emplace_back("Retry-After", std::to_string(seconds));
  return out;
}

http::Response unauthorized(std::string detail, std::string hint, bool bad) {
  auto out = problem(401, "unauthorized", std::move(detail), std::move(hint));
  out.headers.emplace_back("WWW-Authenticate", bad ? R"(Bearer realm="bulkhead", error="invalid_token")"
                                                   : R"(Bearer realm="bulkhead")");
  return out;
}

http::Response ok(const Json& body, int status = 200) {
  http::Response out{.status = status, .body = compact(body)};
  out.headers.emplace_back("Cache-Control", "no-store");
  return out;
}
// 304 where the client has it already. `tag` without quotes.
http::Response tagged(const http::Request& request, std::string body, const std::string& tag,
                      int status = 200) {
  http::Response out{.status = status};
  out.headers.emplace_back("ETag", fmt::format("\"{}\"", tag));
  out.headers.emplace_back("Cache-Control", "private, no-cache");
  if (const auto header = request.header("if-none-match"); !header.empty() && status == 200) {
    const auto tags = parse_tags(header);
    const auto has = [&](const std::vector<std::string>& some) {
      return std::find(some.begin(), some.end(), tag) != some.end();
    };
    if (tags && (tags->any || has(tags->strong) || has(tags->weak))) {
      out.status = 304;
      return out;
    }
  }
  out.body = std::move(body);
  return out;
}
// Its version, and what changes without one: what it holds.
std::string tag_of(const tenant::Tenant& tenant, std::string_view body) {
  return fmt::format("{}.{:x}", tenant.version, std::hash<std::string_view>()(body));
}

Json rest_document(const std::string& name, WallTime until, int process) {
  return Json{{"name", name}, {"until", rfc3339(until)}, {"sampler", process}};
}

bool good_name(std::string_view name) {
  return !name.empty() && name.size() <= Rest::most_name && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
           c == '_' || c == '.';
  });
}

Result<Json> body_of(const http::Request& request) {
  const auto type = lower(trim(split(request.header("content-type"), ';').front()));
  if (!type.empty() && type != "application/json" &&
      !(type.starts_with("application/") && type.ends_with("+json")))
    return Error(Errc::invalid, fmt::format("the body is {}, not application/json", printable(type, 80)),
                 "send Content-Type: application/json");
  if (request.body.empty()) return Error(Errc::invalid, "the body is missing: a JSON object");
  auto json = parse_json(request.body, json_depth);
  if (!json.ok()) return std::move(json).error().in("body");
  if (!json->is_object()) return Error(Errc::invalid, "the body must be a JSON object");
  return json;
}

struct Page {
  std::size_t limit = 100;
  std::string after = {};
};
Result<Page> page_of(const http::Request& request, std::string_view kind) {
  Page out;
  if (const auto text = request.asked("limit")) {
    const auto limit = parse_u64(*text);
    if (!limit || *limit < 1 || *limit > 1000)
      return Error(Errc::invalid, "limit: must be a whole number from 1 to 1000");
    out.limit = *limit;
  }
  if (const auto text = request.asked("after")) {
    auto last = read_cursor(kind, *text);
    if (!last) return Error(Errc::invalid, "after: is no `next` of a page of these", "begin without it");
    out.after = std::move(*last);
  }
  return out;
}

http::Response invalid(const Error& error) { return problem(400, "invalid", error.message(), error.hint()); }

}  // namespace

http::Response problem(int status, std::string_view code, std::string detail, std::string hint) {
  return said(
      {.status = status, .code = std::string(code), .detail = std::move(detail), .hint = std::move(hint)});
}

http::Response problem(const Refusal& refusal) {
  using control::Denied;
  api::v1::Problem out{.code = std::string(name_of(refusal.why)),
                       .detail = refusal.what,
                       .reasons = refusal.reasons,
                       .ways = refusal.ways};
  switch (refusal.why) {
    case Denied::invalid:
      out.status = 400;
      break;
    case Denied::forbidden:
      out.status = 403;
      break;
    case Denied::not_found:
      out.status = 404;
      break;
    case Denied::conflict:
    case Denied::quota:
    case Denied::no_room:
      out.status = 409;
      break;
    case Denied::too_many:
      out.status = 429;
      break;
    case Denied::unavailable:
      out.status = 503;
      break;
  }
  auto response = said(out);
  if (out.status == 429) response.headers.emplace_back("Retry-After", "1");
  if (out.status == 503) response.headers.emplace_back("Retry-After", "5");
  return response;
}

// ---- counting
void Tally::count(std::string_view operation, int status, std::uint64_t ns) {
  const double seconds = static_cast<double>(ns) * 1e-9;
  const auto slot =
      static_cast<std::size_t>(std::lower_bound(bounds.begin(), bounds.end(), seconds) - bounds.begin());
  const std::lock_guard hold(mutex_);
  ++requests_[{operation, status}];
  ++times_[slot];
  seconds_ += seconds;
}
void Tally::limit(std::string_view why) {
  const std::lock_guard hold(mutex_);
  ++limited_[why];
}

std::string Tally::text() const {
  const std::lock_guard hold(mutex_);
  std::string out =
      "# HELP bulkhead_requests_total Requests answered, by operation of the API and status.\n"
      "# TYPE bulkhead_requests_total counter\n";
  for (const auto& [key, count] : requests_)
    out += fmt::format("bulkhead_requests_total{{operation=\"{}\",status=\"{}\"}} {}\n", key.first,
                       key.second, count);
  out +=
      "# HELP bulkhead_request_seconds Time from a whole request to its answer.\n"
      "# TYPE bulkhead_request_seconds histogram\n";
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < bounds.size(); ++i) {
    sum += times_[i];
    out += fmt::format("bulkhead_request_seconds_bucket{{le=\"{}\"}} {}\n", bounds[i], sum);
  }
  sum += times_.back();
  out += fmt::format(
      "bulkhead_request_seconds_bucket{{le=\"+Inf\"}} {}\nbulkhead_request_seconds_sum {}\n"
      "bulkhead_request_seconds_count {}\n",
      sum, seconds_, sum);
  out +=
      "# HELP bulkhead_limited_total Requests refused for their number, by limit.\n"
      "# TYPE bulkhead_limited_total counter\n";
  for (const auto* why : {"requests", "failures", "streams", "waiting"}) {
    const auto at = limited_.find(why);
    out += fmt::format("bulkhead_limited_total{{limit=\"{}\"}} {}\n", why,
                       at == limited_.end() ? 0 : at->second);
  }
  return out;
}

// ---- one request
Exchange::Exchange(http::Request asked, std::shared_ptr<http::Reply> reply, Log& log, Tally& tally,
                   bool access_log)
    : request(std::move(asked)),
      reply_(std::move(reply)),
      log_(log),
      tally_(tally),
      access_log_(access_log),
      began_(monotonic_ns()) {}

void Exchange::account(int status, std::size_t bytes) {
  const std::uint64_t took = monotonic_ns() - began_;
  tally_.count(operation, status, took);
  if (!access_log_) return;
  log_.often([&] {
    std::string line = fmt::format("access method={} path={} status={} ms={:.2f} bytes={} from={}",
                                   value(request.method, 20), value(request.path), status,
                                   static_cast<double>(took) * 1e-6, bytes, value(request.peer.from, 80));
    if (!caller.user.empty())
      line += fmt::format(" user={} role={}", value(caller.user, 100), access::name_of(caller.role));
    if (!caller.tenant.empty()) line += fmt::format(" tenant={}", value(caller.tenant, 63));
    return line;
  });
}

void Exchange::answer(http::Response response) {
  if (answered_.exchange(true)) return;
  account(response.status, response.body.size());
  std::string().swap(request.body);  // read by now; the exchange may lie in a queue for a while
  std::exchange(reply_, nullptr)->answer(std::move(response));
}

std::shared_ptr<http::Stream> Exchange::stream() {
  if (answered_.exchange(true)) return nullptr;
  account(200, 0);
  return std::exchange(reply_, nullptr)->stream();
}

// ---- the application
App::App(const Config& config, control::Control& control, std::filesystem::path state, Log& log,
         Telemetry* telemetry)
    : config_(config),
      control_(control),
      state_(std::move(state)),
      log_(log),
      telemetry_(telemetry),
      openapi_(compact(api::v1::openapi())),
      began_(monotonic_ns()),
      callers_(config.requests_per_second, config.requests_per_second * bursts),
      strangers_(config.requests_per_second, config.requests_per_second * bursts),
      failures_(failures_a_second, failures),
      told_(refusals_a_second, refusals),
      last_turn_(monotonic_ns()),
      still_turns_ns_(patience()),
      hub_(
          control.now()->last_event,
          [&control](std::int64_t after, std::size_t most) { return control.events_after(after, most); },
          [&control](const Watcher& watcher) {
            if (watcher.bearer.empty() && watcher.certificate.empty()) return true;  // the kernel's word
            return control.authenticate(watcher.bearer, watcher.certificate).has_value();
          }),
      lists_(jobs_waiting),
      reads_(jobs_waiting),
      verifier_(1) {
  using Run = decltype(Rule::run);
  static constexpr std::pair<std::string_view, Run> runs[] = {
      {"getUsage", &App::get_usage},
      {"getOpenapi", &App::get_openapi},
      {"whoami", &App::whoami},
      {"listLeases", &App::list_leases},
      {"createLease", &App::create_lease},
      {"getLease", &App::get_lease},
      {"getLeasePlace", &App::get_lease_place},
      {"renewLease", &App::renew_lease},
      {"releaseLease", &App::release_lease},
      {"watchEvents", &App::watch},
      {"listTenants", &App::list_tenants},
      {"createTenant", &App::create_tenant},
      {"getTenant", &App::get_tenant},
      {"putTenant", &App::put_tenant},
      {"endTenant", &App::end_tenant},
      {"getQuota", &App::get_quota},
      {"putQuota", &App::put_quota},
      {"listTokens", &App::list_tokens},
      {"createToken", &App::create_token},
      {"revokeToken", &App::revoke_token},
      {"getHost", &App::get_host},
      {"drain", &App::drain},
      {"getTelemetry", &App::get_telemetry},
      {"getTelemetryHistory", &App::get_telemetry_history},
      {"putRest", &App::put_rest},
      {"endRest", &App::end_rest},
      {"listAudit", &App::list_audit},
      {"verifyAudit", &App::verify_audit},
      {"cordonGpu", &App::cordon},
      {"uncordonGpu", &App::uncordon},
      {"evictLease", &App::evict},
      {"listAlarms", &App::list_alarms},
      {"getHealing", &App::get_healing},
      {"listIncidents", &App::list_incidents},
  };
  for (const auto& route : api::v1::routes()) {
    Rule rule{.route = &route};
    for (const Verb verb : access::verbs())
      if (access::name_of(verb) == route.verb) rule.verb = verb;
    for (const Resource resource : access::resources())
      if (access::name_of(resource) == route.resource) rule.resource = resource;
    for (const auto& [operation, run] : runs)
      if (operation == route.operation) rule.run = run;
    BH_ASSERT(rule.run != nullptr);  // a route that nobody serves
    rules_[route.operation] = rule;
  }
  control_.on_events([this](const std::vector<control::Event>& events) { hub_.tell(events); });
}

App::~App() { end(); }

void App::end() {
  hub_.end();
  lists_.end();
  reads_.end();
  verifier_.end();
  for (auto& [until, asked] : waiting_)
    asked->answer(
        problem(503, "unavailable", "the daemon is ending; whether it was done the next one knows"));
  waiting_.clear();
}

void App::draining() { draining_ = true; }

void App::reload(const Config& config) {
  config_.local = config.local;
  config_.requests_per_second = config.requests_per_second;
  config_.streams = config.streams;
  config_.access_log = config.access_log;
  callers_.change(config.requests_per_second, config.requests_per_second * bursts);
  strangers_.change(config.requests_per_second, config.requests_per_second * bursts);
  uids_.clear();
}

void App::turn() {
  const std::uint64_t now = monotonic_ns();
  const auto batch = control_.now()->batch;
  if (batch != last_batch_) {
    last_batch_ = batch;
    last_turn_ = now;
  }
  turning_ = now - last_turn_ < still_turns_ns_;
  while (!waiting_.empty() && (waiting_.front().second->answered() || waiting_.front().first <= now)) {
    if (!waiting_.front().second->answered()) {
      tally_.limit("waiting");
      auto late = problem(503, "unavailable",
                          "no answer in time; it may still be done: look before it is sent again, or send it "
                          "again with the same Idempotency-Key");
      late.headers.emplace_back("Retry-After", "5");
      waiting_.front().second->answer(std::move(late));
    }
    waiting_.pop_front();
  }
  hub_.turn();
}

// ---- who asks
std::optional<App::Who> App::local(std::uint32_t uid) {
  const std::uint64_t now = monotonic_ns();
  if (const auto at = uids_.find(uid); at != uids_.end() && at->second.until > now) return at->second.who;
  std::optional<Who> out;
  std::array<char, 16384> room{};
  passwd entry{};
  passwd* found = nullptr;
  const bool named = ::getpwuid_r(uid, &entry, room.data(), room.size(), &found) == 0 && found != nullptr;
  const std::string name = named ? std::string(entry.pw_name) : fmt::format("uid-{}", uid);
  if (uid == 0) {
    out = Who{.caller = {.user = name, .role = access::Role::admin}, .root = true};
  } else {
    std::vector<gid_t> groups(256);
    int count = static_cast<int>(groups.size());
    if (!named || ::getgrouplist(name.c_str(), entry.pw_gid, groups.data(), &count) < 0)
      count = std::min(count, named ? static_cast<int>(groups.size()) : 0);
    groups.resize(static_cast<std::size_t>(std::max(count, 0)));
    const auto in_group = [&](const std::string& group) {
      std::array<char, 65536> more{};
      ::group line{};
      ::group* there = nullptr;
      if (::getgrnam_r(group.c_str(), &line, more.data(), more.size(), &there) != 0 || there == nullptr)
        return false;
      return std::find(groups.begin(), groups.end(), line.gr_gid) != groups.end();
    };
    for (const auto& one : config_.local) {
      if (one.user.empty() ? !in_group(one.group) : one.user != name && one.user != std::to_string(uid))
        continue;
      out = Who{.caller = {.user = name, .tenant = one.tenant, .role = one.role}};
      break;
    }
  }
  if (uids_.size() >= kept_uids) uids_.clear();
  uids_[uid] = {out, now + uid_kept_ns};
  return out;
}

std::variant<App::Who, http::Response> App::who(const http::Request& request) {
  const std::uint64_t now = monotonic_ns();
  const auto& peer = request.peer;
  const auto failed = [&](std::string_view what) -> http::Response {
    if (const unsigned seconds = failures_.take(peer.address, now); seconds > 0) {
      tally_.limit("failures");
      return too_many("too many requests with bad credentials from this address", seconds);
    }
    if (told_.take("", now) == 0)
      control_.refused({.role = access::Role::tenant, .from = peer.from}, request.method, request.path,
                       std::string(what));
    return unauthorized(std::string(what), "a new token: bulkhead token create", true);
  };
  const auto header = request.header("authorization");
  const bool given = std::any_of(request.headers.begin(), request.headers.end(),
                                 [](const auto& one) { return one.first == "authorization"; });
  std::optional<Who> out;
  if (given) {
    // A bad token beside a good certificate is refused, not passed over.
    constexpr std::string_view scheme = "bearer ";
    const bool bearer = header.size() > scheme.size() && lower(header.substr(0, scheme.size())) == scheme;
    const auto token = bearer ? trim(header.substr(scheme.size())) : std::string_view();
    auto caller = token.empty() ? std::nullopt : control_.authenticate(token, {});
    if (!caller) return failed("the token is unknown, expired or revoked");
    out = Who{.caller = std::move(*caller), .bearer = std::string(token)};
  } else if (!peer.certificate.empty()) {
    auto caller = control_.authenticate({}, peer.certificate);
    if (!caller) return failed("nobody is registered with this certificate");
    out = Who{.caller = std::move(*caller), .certificate = peer.certificate};
  } else if (peer.uid) {
    out = local(*peer.uid);
    if (!out)
      return unauthorized(fmt::format("uid {} is nobody here, and no token was sent", *peer.uid),
                          "send a token, or name the user under `local` in serve.yaml", false);
  } else {
    return unauthorized("no token was sent", "send Authorization: Bearer TOKEN", false);
  }
  out->caller.from = peer.from;
  return std::move(*out);
}

bool App::admit(const Asked& asked, Who& out) {
  const std::uint64_t now = monotonic_ns();
  auto answer = who(asked->request);
  if (auto* response = std::get_if<http::Response>(&answer)) {
    if (const unsigned seconds = strangers_.take(asked->request.peer.address, now);
        seconds > 0 && response->status != 429) {
      tally_.limit("requests");
      *response = too_many("too many requests from this address", seconds);
    }
    asked->answer(std::move(*response));
    return false;
  }
  out = std::move(std::get<Who>(answer));
  asked->caller = out.caller;
  if (out.root) return true;
  const std::string key =
      fmt::format("{}\n{}\n{}", out.caller.user, out.caller.tenant, access::name_of(out.caller.role));
  if (const unsigned seconds = callers_.take(key, now); seconds > 0) {
    tally_.limit("requests");
    asked->answer(
        too_many(fmt::format("more than {:.0f} requests a second", config_.requests_per_second), seconds));
    return false;
  }
  return true;
}

// ---- which route
void App::handle(http::Request request, std::shared_ptr<http::Reply> reply) {
  const auto asked =
      std::make_shared<Exchange>(std::move(request), std::move(reply), log_, tally_, config_.access_log);
  route(asked);
}

void App::route(const Asked& asked) {
  const auto& request = asked->request;
  const std::string_view method = request.method == "HEAD" ? std::string_view("GET") : request.method;
  const auto allow = [&](std::vector<std::string> methods) {
    std::vector<std::string> all;
    for (auto& one : methods) {
      if (one == "GET") all.emplace_back("HEAD");
      all.push_back(std::move(one));
    }
    all.emplace_back("OPTIONS");
    std::sort(all.begin(), all.end());
    http::Response out{.status = 204};
    if (method != "OPTIONS")
      out = problem(405, "method", fmt::format("{} is not for this path", printable(request.method, 20)));
    out.headers.emplace_back("Allow", join(all, ", "));
    asked->answer(std::move(out));
  };

  const bool own = request.path == "/healthz" || request.path == "/readyz" || request.path == "/metrics";
  if (own && method != "GET") return allow({"GET"});
  if (request.path == "/healthz") return health(asked, false);
  if (request.path == "/readyz") return health(asked, true);
  if (own) {
    asked->operation = "metrics";
    Who caller;
    if (!admit(asked, caller)) return;
    if (!access::may(caller.caller.role, Verb::read, Resource::metrics, Whose::others))
      return refuse(asked, "read",
                    fmt::format("the role {} may not read metrics", access::name_of(caller.caller.role)));
    return metrics(asked);
  }

  const std::string_view path = request.path;
  const bool ours = path.starts_with(api::v1::prefix) &&
                    (path.size() == api::v1::prefix.size() || path[api::v1::prefix.size()] == '/');
  api::v1::Match match;
  if (ours) match = api::v1::match(method, path.substr(api::v1::prefix.size()));
  if (match.route == nullptr) {
    if (!match.other_methods.empty()) return allow(std::move(match.other_methods));
    if (strangers_.take(request.peer.address, monotonic_ns()) > 0)
      return asked->answer(too_many("too many requests from this address", 1));
    return asked->answer(problem(404, "not-found", "there is nothing at this path",
                                 fmt::format("{}/openapi.json lists what there is", api::v1::prefix)));
  }
  const Rule& rule = rules_.at(match.route->operation);
  asked->operation = rule.route->operation;
  if (rule.route->verb.empty()) {
    if (const unsigned seconds = strangers_.take(request.peer.address, monotonic_ns()); seconds > 0)
      return asked->answer(too_many("too many requests from this address", seconds));
    return (this->*rule.run)(asked, rule, match.values);
  }
  Who caller;
  if (!admit(asked, caller)) return;
  for (auto one = request.query.begin(); one != request.query.end(); ++one)
    if (std::any_of(request.query.begin(), one, [&](const auto& other) { return other.first == one->first; }))
      return asked->answer(problem(400, "invalid",
                                   fmt::format("{}: is given more than once", printable(one->first, 40)),
                                   "which of them is meant is not guessed"));
  for (const auto& [name, text] : request.query)
    if (text.size() > api::v1::query_bytes &&
        std::any_of(rule.route->query.begin(), rule.route->query.end(),
                    [&](const api::v1::Query& known) { return known.name == name; }))
      return asked->answer(
          problem(400, "invalid", fmt::format("{}: more than {} bytes", name, api::v1::query_bytes)));
  if (rule.route->verb != "self") {
    // Who may do this to nothing at all learns nothing of what there is.
    const auto role = asked->caller.role;
    if (!access::may(role, rule.verb, rule.resource, Whose::own) &&
        !access::may(role, rule.verb, rule.resource, Whose::others))
      return refuse(asked, access::name_of(rule.verb),
                    fmt::format("the role {} may not {} {}", access::name_of(role),
                                access::name_of(rule.verb), access::name_of(rule.resource)));
  }
  if (rule.run == &App::watch)
    match.values = {{"bearer", caller.bearer}, {"certificate", caller.certificate}};
  (this->*rule.run)(asked, rule, match.values);
}

void App::refuse(const Asked& asked, std::string_view verb, const std::string& why) {
  if (told_.take("", monotonic_ns()) == 0)
    control_.refused(asked->caller, std::string(verb), asked->request.path, why);
  asked->answer(problem(403, "forbidden", why));
}

// nullopt: may do it to things of `owner`. What one may not see is not there.
std::optional<http::Response> App::denied(const Exchange& asked, const Rule& rule, const std::string& owner,
                                          const std::string& what) const {
  const auto whose = !owner.empty() && owner == asked.caller.tenant ? Whose::own : Whose::others;
  if (access::may(asked.caller.role, rule.verb, rule.resource, whose)) return std::nullopt;
  if (access::may(asked.caller.role, Verb::read, rule.resource, whose))
    return problem(403, "forbidden",
                   fmt::format("the role {} may not {} {}", access::name_of(asked.caller.role),
                               access::name_of(rule.verb), access::name_of(rule.resource)));
  return problem(404, "not-found", fmt::format("there is no {}", what));
}

bool App::later(const Asked& asked, Worker& worker, std::function<void()> job) {
  wait_for(asked);
  if (worker.put(std::move(job))) return true;
  auto busy = problem(503, "unavailable", "too many long answers are being made; try again");
  busy.headers.emplace_back("Retry-After", "1");
  asked->answer(std::move(busy));
  return false;
}

void App::wait_for(const Asked& asked) {
  waiting_.emplace_back(monotonic_ns() + static_cast<std::uint64_t>(config_.answer_time.count()) * 1'000'000,
                        asked);
}

template <class T, class F>
control::Then<T> App::then(const Asked& asked, F render) {
  wait_for(asked);
  return [asked, render](Answer<T> answer) {
    if (const auto* refusal = std::get_if<Refusal>(&answer))
      asked->answer(problem(*refusal));
    else
      asked->answer(render(std::get<T>(answer)));
  };
}

bool App::matches(const Asked& asked, std::int64_t present, std::optional<std::int64_t>& version) {
  const auto header = asked->request.header("if-match");
  if (header.empty()) return true;
  const auto tags = parse_tags(header);
  if (!tags) {
    asked->answer(problem(400, "invalid", "If-Match: must be an ETag in quotes, or *"));
    return false;
  }
  if (tags->any) return true;
  for (const auto& tag : tags->strong) {
    if (tag.substr(0, tag.find('.')) != std::to_string(present)) continue;
    version = present;
    return true;
  }
  asked->answer(problem(412, "stale", "it was changed meanwhile: If-Match names another version",
                        "get it again, and decide anew"));
  return false;
}

// ---- health and metrics
void App::health(const Asked& asked, bool ready) {
  asked->operation = ready ? "readyz" : "healthz";
  const char* why = nullptr;
  if (!turning_) why = "the control loop does not turn";
  if (ready && draining_) why = "the daemon is ending";
  // What troubles the host is said to those who may see the host.
  if (ready && why == nullptr && !control_.now()->trouble.empty()) why = "the host cannot be changed now";
  if (why == nullptr) return asked->answer(ok(Json{{"status", "ok"}}));
  auto out = problem(503, "unavailable", why, ready ? "bulkhead lease list; the journal of the daemon" : "");
  out.headers.emplace_back("Retry-After", "5");
  asked->answer(std::move(out));
}

void App::metrics(const Asked& asked) {
  later(asked, lists_, [this, asked] {
    http::Response out{.type = "text/plain; version=0.0.4; charset=utf-8", .body = metrics_text()};
    out.headers.emplace_back("Cache-Control", "no-store");
    asked->answer(std::move(out));
  });
}

// ---- routes
void App::get_openapi(const Asked& asked, const Rule&, Values&) {
  asked->answer(tagged(asked->request, openapi_, fmt::format("{:x}", std::hash<std::string>()(openapi_))));
}

void App::whoami(const Asked& asked, const Rule&, Values&) {
  const auto& caller = asked->caller;
  Json out{{"user", caller.user}, {"role", access::name_of(caller.role)}};
  if (!caller.tenant.empty()) out["tenant"] = caller.tenant;
  out["from"] = caller.from;
  asked->answer(ok(out));
}

void App::list_leases(const Asked& asked, const Rule& rule, Values&) {
  const auto page = page_of(asked->request, "leases");
  if (!page.ok()) return asked->answer(invalid(page.error()));
  std::optional<std::int64_t> before;
  if (!page->after.empty()) {
    before = parse_id(page->after);
    if (!before) return asked->answer(problem(400, "invalid", "after: is no `next` of a page of leases"));
  }
  const bool all = access::may(asked->caller.role, rule.verb, rule.resource, Whose::others);
  later(asked, lists_, [this, asked, all, before, limit = page->limit] {
    const auto now = control_.now();
    Json items = Json::array();
    std::optional<std::string> next;
    auto at = before ? now->leases.lower_bound(*before) : now->leases.end();
    std::int64_t last = 0;
    while (at != now->leases.begin()) {
      --at;
      const auto& lease = *at->second;
      if (!all && lease.tenant != asked->caller.tenant) continue;
      if (items.size() == limit) {
        next = cursor("leases", std::to_string(last));
        break;
      }
      items.push_back(document(lease));
      last = lease.id;
    }
    asked->answer(ok(api::v1::page(std::move(items), next)));
  });
}

void App::answer_lease(const Asked& asked, const lease::Lease& lease, int status) {
  auto out = tagged(asked->request, compact(document(lease)), std::to_string(lease.version), status);
  if (status == 201)
    out.headers.emplace_back("Location", fmt::format("{}/leases/{}", api::v1::prefix, lease.id));
  asked->answer(std::move(out));
}

// `version`: what If-Match asked for; a conflict over it is 412.
control::Then<lease::Lease> App::lease_then(const Asked& asked, int status,
                                            std::optional<std::int64_t> version) {
  wait_for(asked);
  return [this, asked, status, version](const Answer<lease::Lease>& answer) {
    if (const auto* lease = std::get_if<lease::Lease>(&answer)) return answer_lease(asked, *lease, status);
    const auto& refusal = std::get<Refusal>(answer);
    auto out = problem(refusal);
    if (version && refusal.why == control::Denied::conflict) {
      const auto now = control_.now();
      const auto id =
          parse_id(split(std::string_view(asked->request.path).substr(api::v1::prefix.size() + 1), '/')[1]);
      const auto at = now->leases.find(id.value_or(0));
      if (at != now->leases.end() && at->second->version != *version)
        out = problem(412, "stale", refusal.what, "get it again, and decide anew");
    }
    asked->answer(std::move(out));
  };
}

bool App::once_of(const Asked& asked, control::Once& once) {
  for (const auto& [name, text] : asked->request.headers) {
    if (name != "idempotency-key") continue;
    once = {.key = text, .request = hash_of(asked->request)};
    if (!text.empty() && text.size() <= key_bytes &&
        std::all_of(text.begin(), text.end(), [](char c) { return c > 0x20 && c < 0x7f; }))
      continue;
    asked->answer(
        problem(400, "invalid", fmt::format("Idempotency-Key: 1 to {} printable characters", key_bytes)));
    return false;
  }
  return true;
}

void App::create_lease(const Asked& asked, const Rule& rule, Values&) {
  auto body = body_of(asked->request);
  if (!body.ok()) return asked->answer(invalid(body.error()));
  auto wanted = parse_lease_request(*body);
  if (!wanted.ok()) return asked->answer(invalid(wanted.error()));
  control::Caller caller = asked->caller;
  if (!wanted->tenant.empty()) caller.tenant = wanted->tenant;
  const auto whose = caller.tenant == asked->caller.tenant ? Whose::own : Whose::others;
  if (caller.tenant.empty())
    return asked->answer(
        problem(400, "invalid", "tenant: is missing: your token is of none, so say whose lease it is"));
  if (!access::may(caller.role, rule.verb, rule.resource, whose))
    return refuse(
        asked, "create",
        fmt::format("the role {} may not create leases of other tenants", access::name_of(caller.role)));
  control::Once once;
  if (!once_of(asked, once)) return;
  control_.create_lease(std::move(caller), std::move(wanted->ask), std::move(once), lease_then(asked, 201));
}

void App::get_lease_place(const Asked& asked, const Rule&, Values& values) {
  const auto id = parse_id(values["lease"]);
  if (!id)
    return asked->answer(
        problem(404, "not-found", fmt::format("there is no lease {}", printable(values["lease"], 40))));
  control_.standing(asked->caller, *id,
                    then<control::Standing>(
                        asked, [id = *id](const control::Standing& now) { return ok(document(id, now)); }));
}

void App::get_lease(const Asked& asked, const Rule& rule, Values& values) {
  const auto& name = values["lease"];
  const auto id = parse_id(name);
  const std::string what = fmt::format("lease {}", printable(name, 40));
  if (!id) return asked->answer(problem(404, "not-found", fmt::format("there is no {}", what)));
  const auto now = control_.now();
  const auto at = now->leases.find(*id);
  if (at == now->leases.end()) {
    control_.old_lease(asked->caller, *id, lease_then(asked, 200));
    return;
  }
  if (auto no = denied(*asked, rule, at->second->tenant, what)) return asked->answer(std::move(*no));
  // The bytes of a lease that did not change are made once.
  auto& kept = rendered_[*id];
  if (kept.lease != at->second) {
    kept = {.lease = at->second,
            .body = compact(document(*at->second)),
            .tag = std::to_string(at->second->version)};
    if (rendered_.size() > kept_documents) {
      auto one = std::move(kept);
      rendered_.clear();
      return asked->answer(tagged(asked->request, one.body, one.tag));
    }
  }
  asked->answer(tagged(asked->request, kept.body, kept.tag));
}

void App::renew_lease(const Asked& asked, const Rule& rule, Values& values) {
  const auto id = parse_id(values["lease"]);
  const std::string what = fmt::format("lease {}", printable(values["lease"], 40));
  if (!id) return asked->answer(problem(404, "not-found", fmt::format("there is no {}", what)));
  const auto now = control_.now();
  const auto at = now->leases.find(*id);
  if (at != now->leases.end())
    if (auto no = denied(*asked, rule, at->second->tenant, what)) return asked->answer(std::move(*no));
  auto body = body_of(asked->request);
  if (!body.ok()) return asked->answer(invalid(body.error()));
  const auto ttl = parse_renew_request(*body);
  if (!ttl.ok()) return asked->answer(invalid(ttl.error()));
  std::optional<std::int64_t> version;
  if (at != now->leases.end() && !matches(asked, at->second->version, version)) return;
  control_.renew_lease(asked->caller, *id, *ttl, version, lease_then(asked, 200, version));
}

void App::release_lease(const Asked& asked, const Rule& rule, Values& values) {
  const auto id = parse_id(values["lease"]);
  const std::string what = fmt::format("lease {}", printable(values["lease"], 40));
  if (!id) return asked->answer(problem(404, "not-found", fmt::format("there is no {}", what)));
  const auto now = control_.now();
  const auto at = now->leases.find(*id);
  std::optional<std::int64_t> version;
  if (at != now->leases.end()) {
    if (auto no = denied(*asked, rule, at->second->tenant, what)) return asked->answer(std::move(*no));
    if (!matches(asked, at->second->version, version)) return;
  }
  control_.release_lease(asked->caller, *id, version, lease_then(asked, 200, version));
}

void App::watch(const Asked& asked, const Rule& rule, Values& values) {
  const auto& caller = asked->caller;
  auto watcher = std::make_shared<Watcher>();
  watcher->sight = {.all = access::may(caller.role, rule.verb, rule.resource, Whose::others),
                    .tokens = access::may(caller.role, Verb::read, Resource::tokens, Whose::others),
                    .tenant = caller.tenant};
  watcher->caller = fmt::format("{}\n{}\n{}", caller.user, caller.tenant, access::name_of(caller.role));
  watcher->bearer = values["bearer"];
  watcher->certificate = values["certificate"];
  if (const auto text = asked->request.asked("lease")) {
    const auto id = parse_id(*text);
    if (!id) return asked->answer(problem(400, "invalid", "lease: must be the number of a lease"));
    watcher->sight.lease = *id;
  }
  std::optional<std::int64_t> last;
  if (const auto text = asked->request.header("last-event-id"); !text.empty()) {
    const auto id = parse_i64(text);
    if (!id || *id < 0)
      return asked->answer(problem(400, "invalid", "Last-Event-ID: must be the id of an event"));
    last = *id;
  }
  if (asked->request.method == "HEAD") return asked->answer({.type = "text/event-stream"});
  if (!hub_.room(watcher->caller, config_.streams)) {
    tally_.limit("streams");
    return asked->answer(too_many(fmt::format("{} streams are open already", config_.streams), 10));
  }
  watcher->stream = asked->stream();
  if (!watcher->stream) return;
  if (!hub_.open(watcher, last)) watcher->stream->close();  // it comes back
}

void App::list_tenants(const Asked& asked, const Rule& rule, Values&) {
  const auto page = page_of(asked->request, "tenants");
  if (!page.ok()) return asked->answer(invalid(page.error()));
  const bool all = access::may(asked->caller.role, rule.verb, rule.resource, Whose::others);
  later(asked, lists_, [this, asked, all, page = *page] {
    const auto now = control_.now();
    Json items = Json::array();
    std::optional<std::string> next;
    std::string last;
    for (auto at = now->tenants.upper_bound(page.after); at != now->tenants.end(); ++at) {
      if (!all && at->first != asked->caller.tenant) continue;
      if (items.size() == page.limit) {
        next = cursor("tenants", last);
        break;
      }
      items.push_back(document(*at->second, *now));
      last = at->first;
    }
    asked->answer(ok(api::v1::page(std::move(items), next)));
  });
}

namespace {
http::Response tenant_answer(const http::Request& request, const tenant::Tenant& tenant,
                             const control::Snapshot& now, int status) {
  auto body = compact(document(tenant, now));
  const auto tag = tag_of(tenant, body);
  auto out = tagged(request, std::move(body), tag, status);
  if (status == 201)
    out.headers.emplace_back("Location", fmt::format("{}/tenants/{}", api::v1::prefix, tenant.name));
  return out;
}
}  // namespace

void App::create_tenant(const Asked& asked, const Rule&, Values&) {
  auto body = body_of(asked->request);
  if (!body.ok()) return asked->answer(invalid(body.error()));
  auto wanted = parse_tenant_request(*body);
  if (!wanted.ok()) return asked->answer(invalid(wanted.error()));
  control::Once once;
  if (!once_of(asked, once)) return;
  control_.put_tenant(
      asked->caller, std::move(wanted->tenant), 0,
      [this, asked,
       done = then<tenant::Tenant>(asked, [](const tenant::Tenant&) { return http::Response{}; })](
          Answer<tenant::Tenant> answer) {
        const auto* made = std::get_if<tenant::Tenant>(&answer);
        if (made == nullptr) return done(std::move(answer));
        asked->answer(tenant_answer(asked->request, *made, *control_.now(), 201));
      },
      std::move(once));
}

void App::get_tenant(const Asked& asked, const Rule& rule, Values& values) {
  const auto& name = values["tenant"];
  const std::string what = fmt::format("tenant {}", printable(name, 80));
  if (auto no = denied(*asked, rule, name, what)) return asked->answer(std::move(*no));
  const auto now = control_.now();
  const auto at = now->tenants.find(name);
  if (at == now->tenants.end())
    return asked->answer(problem(404, "not-found", fmt::format("there is no {}", what)));
  asked->answer(tenant_answer(asked->request, *at->second, *now, 200));
}

void App::change_tenant(const Asked& asked, const Rule& rule, const std::string& name,
                        std::function<void(tenant::Tenant&)> change, unsigned tries) {
  const std::string what = fmt::format("tenant {}", printable(name, 80));
  const auto now = control_.now();
  const auto at = now->tenants.find(name);
  if (at == now->tenants.end())
    return asked->answer(problem(404, "not-found", fmt::format("there is no {}", what)));
  std::optional<std::int64_t> version;
  if (!matches(asked, at->second->version, version)) return;
  tenant::Tenant next = *at->second;
  change(next);
  const bool bound = version.has_value();
  // What is kept as it was must be what is there when it is written.
  control_.put_tenant(asked->caller, std::move(next), at->second->version,
                      [this, asked, name, change, tries, bound, &rule,
                       present = at->second->version](Answer<tenant::Tenant> answer) {
                        const auto latest = control_.now();
                        if (const auto* done = std::get_if<tenant::Tenant>(&answer))
                          return asked->answer(tenant_answer(asked->request, *done, *latest, 200));
                        const auto& refusal = std::get<Refusal>(answer);
                        const auto there = latest->tenants.find(name);
                        const bool moved = refusal.why == control::Denied::conflict &&
                                           there != latest->tenants.end() &&
                                           there->second->version != present;
                        if (!moved) return asked->answer(problem(refusal));
                        if (bound) return asked->answer(problem(412, "stale", refusal.what));
                        if (tries == 0) return asked->answer(problem(refusal));
                        change_tenant(asked, rule, name, change, tries - 1);
                      });
}

void App::put_tenant(const Asked& asked, const Rule& rule, Values& values) {
  const auto& name = values["tenant"];
  if (auto no = denied(*asked, rule, name, fmt::format("tenant {}", printable(name, 80))))
    return asked->answer(std::move(*no));
  auto body = body_of(asked->request);
  if (!body.ok()) return asked->answer(invalid(body.error()));
  auto wanted = parse_tenant_request(*body);
  if (!wanted.ok()) return asked->answer(invalid(wanted.error()));
  if (wanted->tenant.name != name)
    return asked->answer(problem(400, "invalid", "name: must be that of the path: a tenant keeps its name"));
  wait_for(asked);
  change_tenant(
      asked, rule, name,
      [wanted = std::move(*wanted)](tenant::Tenant& tenant) {
        if (wanted.weight) tenant.weight = wanted.tenant.weight;
        if (wanted.quota) tenant.quota = wanted.tenant.quota;
        if (wanted.suspended) tenant.suspended = wanted.tenant.suspended;
        if (wanted.note) tenant.note = wanted.tenant.note;
      },
      quota_tries);
}

void App::end_tenant(const Asked& asked, const Rule& rule, Values& values) {
  const auto& name = values["tenant"];
  if (auto no = denied(*asked, rule, name, fmt::format("tenant {}", printable(name, 80))))
    return asked->answer(std::move(*no));
  control_.end_tenant(asked->caller, name, then<tenant::Tenant>(asked, [this](const tenant::Tenant& gone) {
                        return ok(document(gone, *control_.now()));
                      }));
}

void App::get_quota(const Asked& asked, const Rule& rule, Values& values) {
  const auto& name = values["tenant"];
  const std::string what = fmt::format("tenant {}", printable(name, 80));
  if (auto no = denied(*asked, rule, name, what)) return asked->answer(std::move(*no));
  const auto now = control_.now();
  const auto at = now->tenants.find(name);
  if (at == now->tenants.end())
    return asked->answer(problem(404, "not-found", fmt::format("there is no {}", what)));
  asked->answer(tagged(asked->request, compact(tenant::to_json(at->second->quota)),
                       std::to_string(at->second->version)));
}

void App::put_quota(const Asked& asked, const Rule& rule, Values& values) {
  const auto& name = values["tenant"];
  if (auto no = denied(*asked, rule, name, fmt::format("tenant {}", printable(name, 80))))
    return asked->answer(std::move(*no));
  auto body = body_of(asked->request);
  if (!body.ok()) return asked->answer(invalid(body.error()));
  auto quota = tenant::parse_quota(*body);
  if (!quota.ok()) return asked->answer(invalid(quota.error()));
  wait_for(asked);
  change_tenant(
      asked, rule, name, [quota = std::move(*quota)](tenant::Tenant& tenant) { tenant.quota = quota; },
      quota_tries);
}

void App::list_tokens(const Asked& asked, const Rule&, Values&) {
  const auto page = page_of(asked->request, "tokens");
  if (!page.ok()) return asked->answer(invalid(page.error()));
  wait_for(asked);
  control_.list_tokens(asked->caller, [this, asked, page = *page](Answer<std::vector<control::User>> answer) {
    if (const auto* refusal = std::get_if<Refusal>(&answer)) return asked->answer(problem(*refusal));
    auto all = std::make_shared<std::vector<control::User>>(std::move(std::get<0>(answer)));
    const bool taken = lists_.put([asked, page, all] {
      std::sort(all->begin(), all->end(), [](const auto& a, const auto& b) { return a.id < b.id; });
      Json items = Json::array();
      std::optional<std::string> next;
      std::string last;
      for (const auto& one : *all) {
        if (one.id <= page.after) continue;
        if (items.size() == page.limit) {
          next = cursor("tokens", last);
          break;
        }
        items.push_back(document(one));
        last = one.id;
      }
      asked->answer(ok(api::v1::page(std::move(items), next)));
    });
    if (!taken)
      asked->answer(problem(
          Refusal{.why = control::Denied::unavailable, .what = "too much is asked at once; try again"}));
  });
}

void App::create_token(const Asked& asked, const Rule&, Values&) {
  auto body = body_of(asked->request);
  if (!body.ok()) return asked->answer(invalid(body.error()));
  auto wanted = parse_token_request(*body);
  if (!wanted.ok()) return asked->answer(invalid(wanted.error()));
  control_.create_token(
      asked->caller, std::move(*wanted), then<control::NewToken>(asked, [](const control::NewToken& made) {
        Json out = document(made.user);
        if (!made.secret.empty()) out["secret"] = made.secret;
        auto response = ok(out, 201);
        response.headers.emplace_back("Location", fmt::format("{}/tokens/{}", api::v1::prefix, made.user.id));
        return response;
      }));
}

void App::revoke_token(const Asked& asked, const Rule&, Values& values) {
  control_.revoke_token(
      asked->caller, values["token"],
      then<control::User>(asked, [](const control::User& gone) { return ok(document(gone)); }));
}

void App::get_host(const Asked& asked, const Rule&, Values&) { asked->answer(ok(document(*control_.now()))); }

void App::drain(const Asked& asked, const Rule&, Values&) {
  auto body = body_of(asked->request);
  if (!body.ok()) return asked->answer(invalid(body.error()));
  const auto on = parse_drain_request(*body);
  if (!on.ok()) return asked->answer(invalid(on.error()));
  control_.drain(asked->caller, *on,
                 then<bool>(asked, [this](bool) { return ok(document(*control_.now())); }));
}

// A rest of the sampler: daemon/serve/rest.hpp.
void App::put_rest(const Asked& asked, const Rule&, std::map<std::string, std::string>& values) {
  if (telemetry_ == nullptr || rest_ == nullptr)
    return asked->answer(problem(503, "unavailable", "nothing is sampled: serve.yaml says telemetry: off"));
  const std::string name = values["rest"];
  if (!good_name(name))
    return asked->answer(problem(
        400, "invalid",
        fmt::format("the name of a rest is 1 to {} letters, digits, '.', '_' or '-'", Rest::most_name)));
  const auto body = body_of(asked->request);
  if (!body.ok()) return asked->answer(invalid(body.error()));
  const auto seconds = parse_rest_request(*body);
  if (!seconds.ok()) return asked->answer(invalid(seconds.error()));
  if (rest_->fresh(name))
    control_.note(asked->caller, "rest", "telemetry/" + name, "", Json{{"seconds", seconds->count()}});
  wait_for(asked);
  const auto until = wall_now() + *seconds;
  const auto done = rest_->hold(name, *seconds, [this, asked, name, until](const Status& gone) {
    if (gone.ok())
      return asked->answer(
          http::Response{.type = "application/json",
                         .body = compact(rest_document(name, until, telemetry_->monitor().pid()))});
    asked->answer(problem(409, "conflict", gone.error().message(), gone.error().hint()));
  });
  if (!done.ok()) asked->answer(problem(503, "unavailable", done.error().message()));
}

void App::end_rest(const Asked& asked, const Rule&, std::map<std::string, std::string>& values) {
  if (telemetry_ == nullptr || rest_ == nullptr)
    return asked->answer(problem(503, "unavailable", "nothing is sampled: serve.yaml says telemetry: off"));
  const std::string name = printable(values["rest"], Rest::most_name);
  if (rest_->release(name)) control_.note(asked->caller, "resume", "telemetry/" + name, "", Json::object());
  asked->answer(
      http::Response{.type = "application/json", .body = compact(rest_document(name, wall_now(), 0))});
}

void App::cordon(const Asked& asked, const Rule&, Values& values) {
  auto body = body_of(asked->request);
  if (!body.ok()) return asked->answer(invalid(body.error()));
  auto why = parse_reason_request(*body);
  if (!why.ok()) return asked->answer(invalid(why.error()));
  control_.cordon(
      asked->caller, Uuid{values["gpu"]}, std::move(*why),
      then<control::PoolGpu>(asked, [](const control::PoolGpu& gpu) { return ok(document(gpu)); }));
}

void App::uncordon(const Asked& asked, const Rule&, Values& values) {
  control_.uncordon(
      asked->caller, Uuid{values["gpu"]},
      then<control::PoolGpu>(asked, [](const control::PoolGpu& gpu) { return ok(document(gpu)); }));
}

void App::evict(const Asked& asked, const Rule&, Values& values) {
  const auto id = parse_id(values["lease"]);
  if (!id)
    return asked->answer(
        problem(404, "not-found", fmt::format("there is no lease {}", printable(values["lease"], 40))));
  auto body = body_of(asked->request);
  if (!body.ok()) return asked->answer(invalid(body.error()));
  auto why = parse_reason_request(*body);
  if (!why.ok()) return asked->answer(invalid(why.error()));
  control_.evict(asked->caller, *id, std::move(*why), lease_then(asked, 200, std::nullopt));
}

void App::list_audit(const Asked& asked, const Rule&, Values&) {
  const auto order = asked->request.asked("order");
  if (order && *order != "oldest" && *order != "newest")
    return asked->answer(problem(400, "invalid", "order: must be oldest or newest"));
  const bool back = order && *order == "newest";
  const std::string_view kind = back ? "audit-newest" : "audit";
  const auto page = page_of(asked->request, kind);
  if (!page.ok()) return asked->answer(invalid(page.error()));
  std::int64_t after = back ? std::numeric_limits<std::int64_t>::max() : 0;
  if (!page->after.empty()) {
    const auto id = parse_id(page->after);
    if (!id) return asked->answer(problem(400, "invalid", "after: is no `next` of a page of the audit log"));
    after = *id;
  }
  later(asked, reads_, [this, asked, after, back, kind, limit = page->limit] {
    const auto lines =
        back ? control_.events_before(after, limit + 1) : control_.events_after(after, limit + 1);
    if (!lines.ok())
      return asked->answer(
          problem(Refusal{.why = control::Denied::unavailable, .what = "the audit log cannot be read now"}));
    Json items = Json::array();
    std::optional<std::string> next;
    for (const auto& line : *lines) {
      if (items.size() == limit) {
        next = cursor(kind, items.back()["id"].dump());
        break;
      }
      items.push_back(audit_document(line));
    }
    asked->answer(ok(api::v1::page(std::move(items), next)));
  });
}

// One walk at a time; who asks while one is under way shares the next.
void App::verify_audit(const Asked& asked, const Rule&, Values&) {
  {
    const std::lock_guard hold(verdict_mutex_);
    if (verdicts_.size() >= verdicts_waiting)
      return asked->answer(problem(
          Refusal{.why = control::Denied::unavailable, .what = "too many ask for this at once; try again"}));
    verdicts_.push_back(asked);
    if (std::exchange(verifying_, true)) return wait_for(asked);
  }
  wait_for(asked);
  (void)verifier_.put([this] {
    while (true) {
      std::vector<Asked> some;
      {
        const std::lock_guard hold(verdict_mutex_);
        some.swap(verdicts_);
        if (some.empty()) {
          verifying_ = false;
          return;
        }
      }
      const auto report = control::verify_audit(state_);
      for (const auto& one : some) {
        if (!report.ok()) {
          one->answer(problem(
              Refusal{.why = control::Denied::unavailable, .what = "the audit log cannot be read now"}));
          continue;
        }
        Json out{{"lines", report->lines}, {"whole", report->broken.empty()}};
        if (!report->broken.empty()) out["broken"] = report->broken;
        one->answer(ok(out));
      }
    }
  });
}

}  // namespace bulkhead::serve
