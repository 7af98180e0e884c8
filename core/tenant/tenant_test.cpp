#include "core/tenant/tenant.hpp"

#include <limits>

#include <gtest/gtest.h>

namespace bulkhead::tenant {
namespace {

TEST(Tenant, names_fit_a_dns_label) {
  for (const char* good : {"a", "team-7", "x1"}) EXPECT_TRUE(parse_name(good).ok()) << good;
  for (const std::string& bad :
       {std::string(""), std::string("7up"), std::string("Team"), std::string("a_b"), std::string("a-"),
        std::string(64, 'a'), std::string("../etc"), std::string("a\nb")})
    EXPECT_FALSE(parse_name(bad).ok()) << bad;
}

TEST(Tenant, no_limit_refuses_nothing) {
  EXPECT_TRUE(beyond({}, {.leases = 900}, {.leases = 900, .gpus = 4}, 1U << 30U).empty());
}

TEST(Tenant, every_limit_that_would_break_is_told_with_its_numbers) {
  Quota quota{.leases = 4,
              .gpus = 1,
              .slices = 3,
              .profiles = {{"1g.10gb", 2}},
              .shares = 0,
              .memory = mebibytes(40 << 10),
              .watts = 700,
              .gpu_seconds_month = 3600};
  const Amount held{.leases = 3,
                    .gpus = 1,
                    .slices = 2,
                    .profiles = {{"1g.10gb", 2}},
                    .memory = mebibytes(30 << 10),
                    .watts = 600};
  const Amount more{.leases = 2,
                    .gpus = 1,
                    .slices = 2,
                    .shares = 1,
                    .profiles = {{"1g.10gb", 1}},
                    .memory = mebibytes(20 << 10),
                    .watts = 200,
                    .gpu_milli = 1000};
  const auto told = beyond(quota, held, more, 3600);
  ASSERT_EQ(told.size(), 8U);
  EXPECT_EQ(told[0], "holds 3 of 4 leases and asks for 2");
  EXPECT_EQ(told[3], "holds 2 of 2 1g.10gb slices and asks for 1");
  EXPECT_EQ(told[5], "holds 30 GiB of 40 GiB of GPU memory and asks for 20 GiB");
  EXPECT_EQ(told[7], "has used 1.0 of 1.0 GPU-hours of this month");
}

TEST(Tenant, a_limit_that_is_full_refuses_only_what_takes_of_it) {
  const Quota quota{.leases = 10, .gpus = 0};
  EXPECT_TRUE(beyond(quota, {}, {.leases = 1, .slices = 1}, 0).empty());
  EXPECT_EQ(beyond(quota, {}, {.leases = 1, .gpus = 1}, 0).size(), 1U);
}

TEST(Tenant, up_to_the_limit_is_within_it) {
  EXPECT_TRUE(beyond({.leases = 4}, {.leases = 3}, {.leases = 1}, 0).empty());
  EXPECT_EQ(beyond({.leases = 4}, {.leases = 4}, {.leases = 1}, 0).size(), 1U);
}

TEST(Tenant, sums_do_not_wrap_around) {
  const Amount huge{.leases = std::numeric_limits<std::uint64_t>::max()};
  EXPECT_EQ((huge + Amount{.leases = 5}).leases, std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ((Amount{.leases = 1} - Amount{.leases = 5}).leases, 0U);
  EXPECT_FALSE(beyond({.leases = 7}, huge, {.leases = 5}, 0).empty());
}

TEST(Tenant, what_is_given_back_leaves_nothing) {
  const Amount a{.leases = 1, .slices = 2, .profiles = {{"1g.10gb", 2}}};
  EXPECT_EQ(a + a - a, a);
  EXPECT_EQ(a - a, Amount{});
}

TEST(Tenant, a_record_comes_back_exactly) {
  // Member by member: g++ 12 with sanitizers takes the nested initialisers for uninitialised.
  Tenant tenant;
  tenant.name = "blue";
  tenant.weight = 7;
  tenant.quota.leases = 3;
  tenant.quota.profiles["2g.20gb"] = 1;
  tenant.quota.memory = Bytes(77);
  tenant.quota.gpu_seconds_month = 9;
  tenant.suspended = true;
  tenant.note = "pays";
  tenant.created = WallTime(std::chrono::milliseconds(1'700'000'000'123));
  tenant.version = 12;
  const auto again = parse_tenant(to_json(tenant));
  ASSERT_TRUE(again.ok()) << again.error().message();
  EXPECT_EQ(to_json(*again), to_json(tenant));
  EXPECT_EQ(again->quota, tenant.quota);
}

TEST(Tenant, every_mistake_is_told_at_once) {
  const auto bad = parse_tenant(*parse_json(
      R"({"name":"No","weight":0,"quota":{"leases":-1,"gpus":1.5,"slises":3,"profiles":{"1g.10gb":"two"}},"note":"a\u0007b"})"));
  ASSERT_FALSE(bad.ok());
  for (const char* word :
       {"name:", "weight:", "quota.leases:", "quota.gpus:",
        "quota.slises: no such key; did you mean 'slices'", "quota.profiles.1g.10gb:", "note:"})
    EXPECT_NE(bad.error().message().find(word), std::string::npos) << word << "\n" << bad.error().message();
}

}  // namespace
}  // namespace bulkhead::tenant
