// Who may do what: one table of role x verb x resource, for own things and for those of others. Everything
// that is not in the table is forbidden. The API asks here and nowhere else; a test walks every route with
// every role.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.hpp"

namespace bulkhead::access {

enum class Role {
  admin,    // everything, tenants and tokens included
  operate,  // the host: leases of anybody, drains, configuration; no tokens of admins
  tenant,   // its own leases
  audit,    // reads everything, changes nothing
};
enum class Verb { read, create, change, end };
enum class Resource { tenants, quotas, tokens, leases, gpus, events, audit, metrics, settings, alarms };
enum class Whose {
  own,
  others
};  // of the caller's tenant; things of no tenant (gpus, settings) are `others`

std::string_view name_of(Role role);  // "admin", "operator", "tenant", "auditor"
std::string_view name_of(Verb verb);
std::string_view name_of(Resource resource);
Result<Role> parse_role(std::string_view text);  // the error lists the names
std::span<const Role> roles();
std::span<const Resource> resources();
std::span<const Verb> verbs();

bool may(Role role, Verb verb, Resource resource, Whose whose);

// One row of the table as people read it (docs and `bulkhead token create --help` are made from it).
struct Row {
  Role role;
  Resource resource;
  std::vector<Verb> own, others;
};
std::vector<Row> table();

}  // namespace bulkhead::access
