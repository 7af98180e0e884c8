#include "core/access/access.hpp"

#include <algorithm>
#include <array>
#include <utility>

#include <fmt/format.h>

namespace bulkhead::access {

namespace {

constexpr std::array all_roles{Role::admin, Role::operate, Role::tenant, Role::audit};
constexpr std::array all_verbs{Verb::read, Verb::create, Verb::change, Verb::end};
constexpr std::array all_resources{Resource::tenants,  Resource::quotas, Resource::tokens, Resource::leases,
                                   Resource::gpus,     Resource::events, Resource::audit,  Resource::metrics,
                                   Resource::settings, Resource::alarms};

constexpr unsigned bit(Verb verb) { return 1U << static_cast<unsigned>(verb); }
constexpr unsigned r = bit(Verb::read), c = bit(Verb::create), h = bit(Verb::change), e = bit(Verb::end);

// Own things, then those of others. `gpus`, `metrics`, `audit` and `settings` belong to no tenant: their
// rights stand under others. Tokens: an operator sees and revokes nobody's, so that no operator becomes an
// admin by way of a token.
struct Entry {
  Role role;
  Resource resource;
  unsigned own, others;
};
constexpr std::array entries{
    Entry{Role::admin, Resource::tenants, r | c | h | e, r | c | h | e},
    Entry{Role::admin, Resource::quotas, r | h, r | h},
    Entry{Role::admin, Resource::tokens, r | c | e, r | c | e},
    Entry{Role::admin, Resource::leases, r | c | h | e, r | c | h | e},
    Entry{Role::admin, Resource::gpus, r | h, r | h},
    Entry{Role::admin, Resource::events, r, r},
    Entry{Role::admin, Resource::audit, r, r},
    Entry{Role::admin, Resource::metrics, r, r},
    Entry{Role::admin, Resource::settings, r | h, r | h},
    Entry{Role::admin, Resource::alarms, r, r},

    Entry{Role::operate, Resource::tenants, r | h, r | h},
    Entry{Role::operate, Resource::quotas, r | h, r | h},
    Entry{Role::operate, Resource::leases, r | c | h | e, r | c | h | e},
    Entry{Role::operate, Resource::gpus, r | h, r | h},
    Entry{Role::operate, Resource::events, r, r},
    Entry{Role::operate, Resource::metrics, r, r},
    Entry{Role::operate, Resource::settings, r | h, r | h},
    Entry{Role::operate, Resource::alarms, r, r},

    Entry{Role::tenant, Resource::tenants, r, 0},
    Entry{Role::tenant, Resource::quotas, r, 0},
    Entry{Role::tenant, Resource::leases, r | c | h | e, 0},
    Entry{Role::tenant, Resource::events, r, 0},
    Entry{Role::tenant, Resource::metrics, r, 0},
    Entry{Role::tenant, Resource::alarms, r, 0},

    Entry{Role::audit, Resource::tenants, r, r},
    Entry{Role::audit, Resource::quotas, r, r},
    Entry{Role::audit, Resource::tokens, r, r},
    Entry{Role::audit, Resource::leases, r, r},
    Entry{Role::audit, Resource::gpus, r, r},
    Entry{Role::audit, Resource::events, r, r},
    Entry{Role::audit, Resource::audit, r, r},
    Entry{Role::audit, Resource::metrics, r, r},
    Entry{Role::audit, Resource::settings, r, r},
    Entry{Role::audit, Resource::alarms, r, r},
};

constexpr bool each_once() {
  for (std::size_t i = 0; i < entries.size(); ++i)
    for (std::size_t j = i + 1; j < entries.size(); ++j)
      if (entries[i].role == entries[j].role && entries[i].resource == entries[j].resource) return false;
  return true;
}
static_assert(each_once(), "a role has one row a resource");

std::vector<Verb> verbs_of(unsigned set) {
  std::vector<Verb> out;
  for (const Verb verb : all_verbs)
    if ((set & bit(verb)) != 0) out.push_back(verb);
  return out;
}

}  // namespace

std::string_view name_of(Role role) {
  switch (role) {
    case Role::admin:
      return "admin";
    case Role::operate:
      return "operator";
    case Role::tenant:
      return "tenant";
    case Role::audit:
      return "auditor";
  }
  return "?";
}

std::string_view name_of(Verb verb) {
  switch (verb) {
    case Verb::read:
      return "read";
    case Verb::create:
      return "create";
    case Verb::change:
      return "change";
    case Verb::end:
      return "end";
  }
  return "?";
}

std::string_view name_of(Resource resource) {
  switch (resource) {
    case Resource::tenants:
      return "tenants";
    case Resource::quotas:
      return "quotas";
    case Resource::tokens:
      return "tokens";
    case Resource::leases:
      return "leases";
    case Resource::gpus:
      return "gpus";
    case Resource::events:
      return "events";
    case Resource::audit:
      return "audit";
    case Resource::metrics:
      return "metrics";
    case Resource::settings:
      return "settings";
    case Resource::alarms:
      return "alarms";
  }
  return "?";
}

Result<Role> parse_role(std::string_view text) {
  for (const Role role : all_roles)
    if (name_of(role) == text) return role;
  return Error(Errc::invalid, fmt::format("no role '{}'", text.substr(0, 40)),
               "roles: admin, operator, tenant, auditor");
}

std::span<const Role> roles() { return all_roles; }
std::span<const Resource> resources() { return all_resources; }
std::span<const Verb> verbs() { return all_verbs; }

bool may(Role role, Verb verb, Resource resource, Whose whose) {
  const auto entry = std::find_if(entries.begin(), entries.end(), [&](const Entry& one) {
    return one.role == role && one.resource == resource;
  });
  return entry != entries.end() && ((whose == Whose::own ? entry->own : entry->others) & bit(verb)) != 0;
}

std::vector<Row> table() {
  std::vector<Row> out;
  for (const Entry& entry : entries)
    out.push_back({entry.role, entry.resource, verbs_of(entry.own), verbs_of(entry.others)});
  return out;
}

}  // namespace bulkhead::access
