#include "api/v1/v1.hpp"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "api/v1/schemas.hpp"
#include "base/check.hpp"
#include "base/fields.hpp"
#include "base/text.hpp"

namespace bulkhead::api::v1 {

namespace {

const Json& all_schemas() {
  static const Json schemas = [] {
    auto parsed = parse_json(schemas_text);
    BH_ASSERT(parsed.ok());
    return std::move(parsed).value();
  }();
  return schemas;
}

const std::vector<std::pair<int, std::string_view>>& titles() {
  static const std::vector<std::pair<int, std::string_view>> out{{400, "The request makes no sense"},
                                                                 {401, "No valid token"},
                                                                 {403, "Not allowed"},
                                                                 {404, "Not found"},
                                                                 {405, "Not on this path"},
                                                                 {409, "In the way of what is"},
                                                                 {412, "Changed meanwhile"},
                                                                 {413, "Too large"},
                                                                 {429, "Too many requests"},
                                                                 {500, "Our mistake"},
                                                                 {503, "Not now"}};
  return out;
}

Json reference(std::string_view name) { return {{"$ref", fmt::format("#/components/schemas/{}", name)}}; }

std::vector<std::string_view> pieces(std::string_view path) {
  std::vector<std::string_view> out;
  for (const auto piece : split(path, '/'))
    if (!piece.empty()) out.push_back(piece);
  return out;
}
bool is_name(std::string_view piece) {
  return piece.size() > 2 && piece.front() == '{' && piece.back() == '}';
}

Json parameter(std::string_view name, std::string_view in, Json schema, bool required,
               std::string_view what) {
  return {{"name", name},
          {"in", in},
          {"required", required},
          {"description", what},
          {"schema", std::move(schema)}};
}

Json problem_response(std::string_view what) {
  return {{"description", what},
          {"content", {{"application/problem+json", {{"schema", reference("Problem")}}}}}};
}

Json operation(const Route& route) {
  Json out{{"operationId", route.operation}, {"summary", route.summary}};
  if (route.verb.empty()) {
    out["security"] = Json::array();
  } else {
    out["description"] = fmt::format("Needs the right to {} {}.", route.verb, route.resource);
  }
  Json parameters = Json::array();
  for (const auto piece : pieces(route.path)) {
    if (!is_name(piece)) continue;
    const auto name = piece.substr(1, piece.size() - 2);
    const Json schema = name == "lease" ? Json{{"type", "integer"}, {"minimum", 1}}
                                        : Json{{"type", "string"}, {"maxLength", 100}};
    parameters.push_back(parameter(name, "path", schema, true, fmt::format("The {}.", name)));
  }
  if (route.pages) {
    parameters.push_back(parameter("limit", "query",
                                   {{"type", "integer"}, {"minimum", 1}, {"maximum", 1000}, {"default", 100}},
                                   false, "Items of a page."));
    parameters.push_back(parameter("after", "query", {{"type", "string"}, {"maxLength", 200}}, false,
                                   "The `next` of the page before."));
  }
  for (const Query& asked : route.query) {
    Json schema{{"type", asked.type}};
    if (asked.type.find('|') != std::string_view::npos) {
      schema = {{"type", "string"}};
      for (const auto word : split(asked.type, '|')) schema["enum"].push_back(word);
    } else if (asked.type == "string") {
      schema["maxLength"] = query_bytes;
    }
    parameters.push_back(parameter(asked.name, "query", std::move(schema), asked.required, asked.what));
  }
  if (route.stream) {
    parameters.push_back(parameter("Last-Event-ID", "header", {{"type", "integer"}, {"minimum", 0}}, false,
                                   "Resume after this event."));
    parameters.push_back(
        parameter("lease", "query", {{"type", "integer"}, {"minimum", 1}}, false, "Of this lease alone."));
  }
  if (route.idempotent_key)
    parameters.push_back(parameter("Idempotency-Key", "header", {{"type", "string"}, {"maxLength", 128}},
                                   false, "The same key again gets the first answer; kept a day."));
  if (route.match)
    parameters.push_back(parameter("If-Match", "header", {{"type", "string"}}, false,
                                   "The ETag that this change is for: 412 when it is another by now."));
  if (!parameters.empty()) out["parameters"] = std::move(parameters);
  if (!route.request.empty())
    out["requestBody"] = {{"required", true},
                          {"content", {{"application/json", {{"schema", reference(route.request)}}}}}};
  Json success{{"description", "Done."}};
  if (route.stream) {
    success["description"] = "Events as they happen, `data` is an Event.";
    success["content"] = {{"text/event-stream", {{"schema", {{"type", "string"}}}}}};
  } else if (route.pages) {
    success["content"]["application/json"]["schema"] = {
        {"allOf",
         {reference("Page"),
          {{"properties", {{"items", {{"type", "array"}, {"items", reference(route.response)}}}}}}}}};
  } else if (!route.response.empty()) {
    success["content"]["application/json"]["schema"] = reference(route.response);
  }
  out["responses"][std::to_string(route.success)] = std::move(success);
  const auto problems = [&](int status, std::string_view what) {
    out["responses"][std::to_string(status)] = problem_response(what);
  };
  problems(400, "The request makes no sense; `detail` names every mistake.");
  if (!route.verb.empty()) {
    problems(401, "No token, or none that is valid.");
    problems(403, "The token's role may not.");
  }
  if (route.path.find('{') != std::string_view::npos || !route.query.empty())
    problems(404, "There is none, or none that you may know of.");
  if (route.method != "GET") {
    problems(409, "In the way of what is: quota, no room, a state that does not allow it.");
    if (route.match) problems(412, "If-Match names another version.");
    problems(413, "More than 1 MiB.");
  }
  problems(429, "Too many requests; Retry-After says when.");
  problems(503, "Draining, disk full or driver gone; try again.");
  return out;
}

}  // namespace

const std::vector<Route>& routes() {
  static const std::vector<Route> out{
      {.method = "GET", .path = "/openapi.json", .operation = "getOpenapi", .summary = "This document."},
      {.method = "GET",
       .path = "/whoami",
       .operation = "whoami",
       .verb = "self",
       .summary = "Who the token says you are.",
       .response = "Whoami"},
      {.method = "GET",
       .path = "/leases",
       .operation = "listLeases",
       .verb = "read",
       .resource = "leases",
       .summary = "Leases, newest first.",
       .response = "Lease",
       .pages = true},
      {.method = "POST",
       .path = "/leases",
       .operation = "createLease",
       .verb = "create",
       .resource = "leases",
       .summary = "Ask for a slice.",
       .request = "LeaseRequest",
       .response = "Lease",
       .success = 201,
       .idempotent_key = true},
      {.method = "GET",
       .path = "/leases/{lease}",
       .operation = "getLease",
       .verb = "read",
       .resource = "leases",
       .summary = "One lease.",
       .response = "Lease"},
      {.method = "GET",
       .path = "/leases/{lease}/place",
       .operation = "getLeasePlace",
       .verb = "read",
       .resource = "leases",
       .summary = "Where it stands in the queue, and why it waits.",
       .response = "LeasePlace"},
      {.method = "POST",
       .path = "/leases/{lease}/renew",
       .operation = "renewLease",
       .verb = "change",
       .resource = "leases",
       .summary = "Keep it longer.",
       .request = "RenewRequest",
       .response = "Lease",
       .match = true},
      {.method = "DELETE",
       .path = "/leases/{lease}",
       .operation = "releaseLease",
       .verb = "end",
       .resource = "leases",
       .summary = "Give it back.",
       .response = "Lease",
       .match = true},
      {.method = "POST",
       .path = "/leases/{lease}/evict",
       .operation = "evictLease",
       .verb = "change",
       .resource = "gpus",
       .summary = "End somebody's lease, with a reason that its tenant reads.",
       .request = "ReasonRequest",
       .response = "Lease"},
      {.method = "GET",
       .path = "/events",
       .operation = "watchEvents",
       .verb = "read",
       .resource = "events",
       .summary = "What happens, as it happens.",
       .response = "Event",
       .stream = true},
      {.method = "GET",
       .path = "/tenants",
       .operation = "listTenants",
       .verb = "read",
       .resource = "tenants",
       .summary = "Tenants, by name.",
       .response = "Tenant",
       .pages = true},
      {.method = "POST",
       .path = "/tenants",
       .operation = "createTenant",
       .verb = "create",
       .resource = "tenants",
       .summary = "A new tenant.",
       .request = "TenantRequest",
       .response = "Tenant",
       .success = 201,
       .idempotent_key = true},
      {.method = "GET",
       .path = "/tenants/{tenant}",
       .operation = "getTenant",
       .verb = "read",
       .resource = "tenants",
       .summary = "One tenant and what it holds.",
       .response = "Tenant"},
      {.method = "PUT",
       .path = "/tenants/{tenant}",
       .operation = "putTenant",
       .verb = "change",
       .resource = "tenants",
       .summary = "Change a tenant.",
       .request = "TenantRequest",
       .response = "Tenant",
       .match = true},
      {.method = "DELETE",
       .path = "/tenants/{tenant}",
       .operation = "endTenant",
       .verb = "end",
       .resource = "tenants",
       .summary = "End a tenant that holds nothing.",
       .response = "Tenant"},
      {.method = "GET",
       .path = "/tenants/{tenant}/quota",
       .operation = "getQuota",
       .verb = "read",
       .resource = "quotas",
       .summary = "What it may hold at most.",
       .response = "Quota"},
      {.method = "PUT",
       .path = "/tenants/{tenant}/quota",
       .operation = "putQuota",
       .verb = "change",
       .resource = "quotas",
       .summary = "Set what it may hold at most.",
       .request = "Quota",
       .response = "Tenant",
       .match = true},
      {.method = "GET",
       .path = "/tokens",
       .operation = "listTokens",
       .verb = "read",
       .resource = "tokens",
       .summary = "Tokens, without their secrets.",
       .response = "Token",
       .pages = true},
      {.method = "POST",
       .path = "/tokens",
       .operation = "createToken",
       .verb = "create",
       .resource = "tokens",
       .summary = "A new token; its secret is in this answer alone.",
       .request = "TokenRequest",
       .response = "Token",
       .success = 201},
      {.method = "DELETE",
       .path = "/tokens/{token}",
       .operation = "revokeToken",
       .verb = "end",
       .resource = "tokens",
       .summary = "Revoke a token, at once.",
       .response = "Token"},
      {.method = "GET",
       .path = "/host",
       .operation = "getHost",
       .verb = "read",
       .resource = "gpus",
       .summary = "The GPUs and who has them.",
       .response = "Host"},
      {.method = "PUT",
       .path = "/host/drain",
       .operation = "drain",
       .verb = "change",
       .resource = "gpus",
       .summary = "Grant nothing new, or again.",
       .request = "DrainRequest",
       .response = "Host"},
      {.method = "PUT",
       .path = "/gpus/{gpu}/cordon",
       .operation = "cordonGpu",
       .verb = "change",
       .resource = "gpus",
       .summary = "A GPU gets no new leases until it is uncordoned; those that are there go on.",
       .request = "ReasonRequest",
       .response = "Gpu"},
      {.method = "DELETE",
       .path = "/gpus/{gpu}/cordon",
       .operation = "uncordonGpu",
       .verb = "change",
       .resource = "gpus",
       .summary = "It may be leased again.",
       .response = "Gpu"},
      {.method = "GET",
       .path = "/telemetry",
       .operation = "getTelemetry",
       .verb = "read",
       .resource = "metrics",
       .summary = "What GPUs and slices are doing; a tenant's own alone, for tenants.",
       .response = "Telemetry"},
      {.method = "GET",
       .path = "/telemetry/history",
       .operation = "getTelemetryHistory",
       .verb = "read",
       .resource = "metrics",
       .summary = "What one signal of a GPU or slice was: seconds of an hour, minutes of thirty days.",
       .response = "TelemetryHistory",
       .query = {{.name = "gpu", .what = "Its UUID, or its index.", .required = true},
                 {.name = "slice", .what = "The number of its GPU instance.", .type = "integer"},
                 {.name = "signal", .what = "As the values are named: power, sm.", .required = true},
                 {.name = "from", .what = "RFC 3339; an hour before `to` as it comes."},
                 {.name = "to", .what = "RFC 3339; now as it comes."},
                 {.name = "grain",
                  .what = "As it comes: second up to an hour, else minute.",
                  .type = "second|minute"}}},
      {.method = "PUT",
       .path = "/telemetry/rests/{rest}",
       .operation = "putRest",
       .verb = "change",
       .resource = "gpus",
       .summary =
           "The sampler lets go of the driver, for so long at most, as a change of MIG mode by another "
           "process needs it; answered when it has. Again: renewed.",
       .request = "RestRequest",
       .response = "Rest"},
      {.method = "DELETE",
       .path = "/telemetry/rests/{rest}",
       .operation = "endRest",
       .verb = "change",
       .resource = "gpus",
       .summary = "The GPUs are sampled again, unless another rest is held.",
       .response = "Rest"},
      {.method = "GET",
       .path = "/incidents",
       .operation = "listIncidents",
       .verb = "read",
       .resource = "alarms",
       .summary =
           "What the kernel's log and the driver told of, joined; open ones first. A tenant sees those that "
           "its own programs are in or that reach its leases, without the evidence.",
       .response = "Incidents",
       .query = {{.name = "limit", .what = "At most so many, 1 to 1000."},
                 {.name = "after", .what = "`next` of the page before."}}},
      {.method = "GET",
       .path = "/healing",
       .operation = "getHealing",
       .verb = "read",
       .resource = "gpus",
       .summary = "What would be done about faults, what was done, and what waits for a person and why.",
       .response = "Healing"},
      {.method = "GET",
       .path = "/alarms",
       .operation = "listAlarms",
       .verb = "read",
       .resource = "alarms",
       .summary =
           "What is wrong now, what was, and what is done about it. A tenant sees what touches its leases.",
       .response = "Alarms"},
      {.method = "GET",
       .path = "/usage",
       .operation = "getUsage",
       .verb = "read",
       .resource = "leases",
       .summary =
           "Who used what, in sums that add up: slice-seconds, GiB-hours, joules. A tenant reads of its own.",
       .response = "Usage",
       .query = {{.name = "from", .what = "A date or RFC 3339; the begin of this month, UTC, as it comes."},
                 {.name = "to", .what = "The same; now as it comes."},
                 {.name = "by", .what = "day, lease, gpu, with commas; tenant is always told."},
                 {.name = "tenant", .what = "Of this one alone."}}},
      {.method = "GET",
       .path = "/audit",
       .operation = "listAudit",
       .verb = "read",
       .resource = "audit",
       .summary = "The audit log, oldest first unless asked otherwise.",
       .response = "AuditLine",
       .pages = true,
       .query = {{.name = "order",
                  .what = "oldest as it comes. `after` of one order is none of the other.",
                  .type = "oldest|newest"}}},
      {.method = "GET",
       .path = "/audit/verdict",
       .operation = "verifyAudit",
       .verb = "read",
       .resource = "audit",
       .summary = "Whether the chain of the audit log is whole.",
       .response = "AuditVerdict"},
  };
  return out;
}

Match match(std::string_view method, std::string_view path) {
  Match out;
  const auto given = pieces(path);
  for (const Route& route : routes()) {
    const auto wanted = pieces(route.path);
    if (wanted.size() != given.size()) continue;
    std::map<std::string, std::string> values;
    bool same = true;
    for (std::size_t i = 0; same && i < given.size(); ++i) {
      if (is_name(wanted[i]))
        values[std::string(wanted[i].substr(1, wanted[i].size() - 2))] = std::string(given[i]);
      else
        same = wanted[i] == given[i];
    }
    if (!same) continue;
    if (route.method == method) {
      // A fixed word stands before a name: /audit/verdict is no entry of /audit/{id}.
      if (out.route == nullptr || values.size() < out.values.size())
        out.route = &route, out.values = std::move(values);
    } else {
      out.other_methods.emplace_back(route.method);
    }
  }
  if (out.route != nullptr) out.other_methods.clear();
  return out;
}

Json to_json(const Problem& problem) {
  Json out{{"type", fmt::format("https://bulkhead.dev/problems/{}", problem.code)},
           {"title", problem.title.empty() ? std::string(title_of(problem.status)) : problem.title},
           {"status", problem.status},
           {"code", problem.code},
           {"detail", problem.detail}};
  if (!problem.reasons.empty()) out["reasons"] = problem.reasons;
  if (!problem.ways.empty()) out["ways"] = problem.ways;
  if (!problem.hint.empty()) out["hint"] = problem.hint;
  return out;
}

Result<Problem> parse_problem(const Json& json) {
  std::vector<std::string> mistakes;
  Fields fields(json, "", mistakes);
  Problem problem;
  problem.status = static_cast<int>(fields.whole("status", 400, 599).value_or(0));
  problem.code = fields.text("code", 64).value_or("");
  problem.title = fields.text("title", 256).value_or("");
  problem.detail = fields.text("detail", 16384).value_or("");
  problem.reasons = fields.texts("reasons", 256, 16384);
  problem.ways = fields.texts("ways", 256, 16384);
  problem.hint = fields.text("hint", 4096).value_or("");
  if (problem.status == 0) fields.mistake("status", "is missing");
  BH_CHECK(no_mistakes("problem document", mistakes));  // keys that a newer daemon adds are no mistake
  return problem;
}

std::string_view title_of(int status) {
  for (const auto& [code, title] : titles())
    if (code == status) return title;
  return "Refused";
}

const Json& schema(std::string_view name) {
  static const Json none;
  const auto found = all_schemas().find(name);
  return found == all_schemas().end() ? none : *found;
}

Json openapi() {
  Json out{{"openapi", "3.1.0"},
           {"info",
            {{"title", "bulkhead"},
             {"version", "1"},
             {"summary", "Tenants, leases and slices of one GPU host."},
             {"license", {{"name", "Apache-2.0"}, {"identifier", "Apache-2.0"}}}}},
           {"servers", {{{"url", prefix}}}},
           {"security", {{{"bearer", Json::array()}}, {{"certificate", Json::array()}}}}};
  for (const Route& route : routes())
    out["paths"][std::string(route.path)][lower(route.method)] = operation(route);
  out["components"]["securitySchemes"] = {{"bearer", {{"type", "http"}, {"scheme", "bearer"}}},
                                          {"certificate", {{"type", "mutualTLS"}}}};
  out["components"]["schemas"] = all_schemas();
  return out;
}

Json page(Json items, const std::optional<std::string>& next) {
  Json out{{"items", std::move(items)}};
  if (next) out["next"] = *next;
  return out;
}

}  // namespace bulkhead::api::v1
