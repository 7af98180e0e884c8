// The wire: documents of /api/v1 as values, and back. A promise to clients: fields are added, never changed
// or taken away. Knows nothing of core, so that a refactoring there cannot change it. The OpenAPI 3.1
// document (openapi()) is made from the same tables.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.hpp"
#include "base/result.hpp"

namespace bulkhead::api::v1 {

inline constexpr std::string_view prefix = "/api/v1";

// RFC 9457, application/problem+json. `type` is "https://bulkhead.dev/problems/<code>".
struct Problem {
  int status = 500;
  std::string code = {};  // "quota", "no-room", "not-found", "forbidden", "invalid", "conflict" ...
  std::string title = {};
  std::string detail = {};  // one sentence
  std::vector<std::string> reasons = {}, ways = {};
  std::string hint = {};  // what to type or send next
};
Json to_json(const Problem& problem);
Result<Problem> parse_problem(const Json& json);
std::string_view title_of(int status);

// What may stand behind the path of a route: ?gpu=3
struct Query {
  std::string_view name = {}, what = {};
  std::string_view type = "string";  // "string", "integer", or words to choose from: "second|minute"
  bool required = false;
};
inline constexpr std::size_t query_bytes = 200;  // of one value, at most

// One route of the API. Both the daemon's dispatch and the OpenAPI document are made from this table; a test
// walks it.
struct Route {
  std::string_view method = {}, path = {};  // "/leases/{lease}"
  std::string_view operation = {};          // "getLease"
  // Of the table of access: "read", "leases". Both empty: needs no token. Verb "self": any valid token.
  std::string_view verb = {}, resource = {};
  std::string_view summary = {};
  std::string_view request = {}, response = {};  // names of schemas; empty: none
  int success = 200;
  bool idempotent_key = false;  // takes Idempotency-Key
  bool pages = false;           // ?limit=&after=
  bool stream = false;          // text/event-stream
  bool match = false;           // takes If-Match
  std::vector<Query> query = {};
};
const std::vector<Route>& routes();
// The route of a method and path below the prefix, with the values of its {names}; nullptr: none;
// `other_methods`: those the path has.
struct Match {
  const Route* route = nullptr;
  std::map<std::string, std::string> values = {};
  std::vector<std::string> other_methods = {};
};
Match match(std::string_view method, std::string_view path);

Json openapi();  // OpenAPI 3.1, complete
// JSON Schema of one document: "Lease", "LeaseRequest", "Tenant", "Quota" ...; null: none.
const Json& schema(std::string_view name);

// Pages: {"items": [...], "next": "opaque cursor or absent"}.
Json page(Json items, const std::optional<std::string>& next);

}  // namespace bulkhead::api::v1
