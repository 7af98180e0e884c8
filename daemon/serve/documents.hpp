// Nouns of core as documents of /api/v1, and requests of /api/v1 as nouns of core.
#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "api/v1/v1.hpp"
#include "base/json.hpp"
#include "base/result.hpp"
#include "core/lease/lease.hpp"
#include "core/tenant/tenant.hpp"
#include "engine/control/control.hpp"

namespace bulkhead::serve {

Json document(const lease::Lease& lease);
Json document(const tenant::Tenant& tenant, const control::Snapshot& now);  // with what it holds
Json document(const control::User& token);
Json document(std::int64_t lease, const control::Standing& standing);
Json document(const control::PoolGpu& gpu);
Json document(const control::Snapshot& now);  // the host
Json audit_document(const control::Event& line);
Json event_document(const control::Event& event);  // of one whose outcome is "done"

struct LeaseRequest {
  lease::Ask ask = {};
  std::string tenant = {};  // empty: the caller's
};
// Each with every mistake in one Error.
Result<LeaseRequest> parse_lease_request(const Json& json);
struct TenantRequest {
  tenant::Tenant tenant = {};
  bool weight = false, quota = false, suspended = false, note = false;  // given; a change keeps the rest
};
Result<TenantRequest> parse_tenant_request(const Json& json);
Result<control::AskToken> parse_token_request(const Json& json);
Result<std::chrono::seconds> parse_renew_request(const Json& json);
Result<bool> parse_drain_request(const Json& json);
Result<std::chrono::seconds> parse_rest_request(const Json& json);
Result<std::string> parse_reason_request(const Json& json);

// "2026-11-22T14:05:09.123Z", "2026-11-22t14:05:09+01:00"; nullopt: no moment.
std::optional<WallTime> parse_rfc3339(std::string_view text);

// On the wire, without white space; bytes that are no UTF-8 are replaced.
std::string compact(const Json& value);

// Where a page of `kind` ended. Opaque to clients; nullopt: not one of ours.
std::string cursor(std::string_view kind, std::string_view last);
std::optional<std::string> read_cursor(std::string_view kind, std::string_view text);

// The tags of an If-Match or If-None-Match, without quotes; nullopt: nonsense.
struct Tags {
  bool any = false;  // "*"
  std::vector<std::string> strong = {}, weak = {};
};
std::optional<Tags> parse_tags(std::string_view header);

}  // namespace bulkhead::serve
