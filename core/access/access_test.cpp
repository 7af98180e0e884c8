#include "core/access/access.hpp"

#include <algorithm>

#include <gtest/gtest.h>

namespace bulkhead::access {
namespace {

TEST(Access, a_tenant_touches_nothing_of_others) {
  for (const Resource resource : resources())
    for (const Verb verb : verbs())
      EXPECT_FALSE(may(Role::tenant, verb, resource, Whose::others)) << name_of(resource);
}

TEST(Access, an_auditor_reads_everything_and_changes_nothing) {
  for (const Resource resource : resources())
    for (const Whose whose : {Whose::own, Whose::others})
      for (const Verb verb : verbs())
        EXPECT_EQ(may(Role::audit, verb, resource, whose), verb == Verb::read)
            << name_of(resource) << ' ' << name_of(verb);
}

TEST(Access, nobody_but_an_admin_makes_or_ends_tokens_and_tenants) {
  for (const Role role : roles()) {
    for (const Verb verb : {Verb::create, Verb::end})
      for (const Resource resource : {Resource::tokens, Resource::tenants})
        EXPECT_EQ(may(role, verb, resource, Whose::others), role == Role::admin) << name_of(role);
  }
}

TEST(Access, what_a_role_may_do_to_others_it_may_do_to_its_own) {
  for (const Role role : roles())
    for (const Resource resource : resources())
      for (const Verb verb : verbs())
        EXPECT_TRUE(!may(role, verb, resource, Whose::others) || may(role, verb, resource, Whose::own));
}

TEST(Access, the_audit_log_is_for_admins_and_auditors) {
  for (const Role role : roles())
    EXPECT_EQ(may(role, Verb::read, Resource::audit, Whose::others),
              role == Role::admin || role == Role::audit);
  for (const Verb verb : {Verb::create, Verb::change, Verb::end})
    for (const Role role : roles()) EXPECT_FALSE(may(role, verb, Resource::audit, Whose::others));
}

TEST(Access, names_parse_back_and_others_are_refused_with_the_list) {
  for (const Role role : roles()) {
    const auto parsed = parse_role(name_of(role));
    ASSERT_TRUE(parsed.ok());
    EXPECT_EQ(*parsed, role);
  }
  const auto bad = parse_role("root");
  ASSERT_FALSE(bad.ok());
  EXPECT_NE(bad.error().hint().find("auditor"), std::string::npos);
}

TEST(Access, the_table_says_what_may_says) {
  for (const Row& row : table())
    for (const Verb verb : verbs()) {
      EXPECT_EQ(may(row.role, verb, row.resource, Whose::own),
                std::find(row.own.begin(), row.own.end(), verb) != row.own.end());
      EXPECT_EQ(may(row.role, verb, row.resource, Whose::others),
                std::find(row.others.begin(), row.others.end(), verb) != row.others.end());
    }
}

}  // namespace
}  // namespace bulkhead::access
