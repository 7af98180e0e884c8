#include "daemon/serve/serve.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "api/v1/v1.hpp"
#include "daemon/serve/bucket.hpp"
#include "daemon/serve/documents.hpp"
#include "daemon/serve/hub.hpp"
#include "daemon/serve/log.hpp"

namespace bulkhead::serve {
namespace {

using testing::HasSubstr;
using testing::Not;

std::string mistakes_of(std::string_view text) {
  const auto parsed = parse(text);
  const auto* mistakes = std::get_if<std::vector<Mistake>>(&parsed);
  return mistakes == nullptr ? "" : render(*mistakes, "serve.yaml");
}

TEST(ServeConfig, an_empty_file_is_everything_as_it_comes) {
  const auto parsed = parse("");
  ASSERT_TRUE(std::holds_alternative<Config>(parsed));
  EXPECT_EQ(std::get<Config>(parsed).listen, "0.0.0.0:443");
}

TEST(ServeConfig, every_key_is_read) {
  const auto parsed = parse(
      "listen: \"[::1]:8443\"\nsocket: /tmp/s\nstate: /tmp/state\nnode_file: /tmp/n\ncertificate: /c\nkey: "
      "/k\n"
      "names: [a.example]\nclient_ca: /ca\nlocal:\n  - {user: ada, tenant: blue}\n  - {group: ops, role: "
      "operator}\n"
      "requests_per_second: 7\nstreams: 3\nconnections: 99\nconnections_of_one: 9\nbody: 2MiB\nanswer_time: "
      "5s\n"
      "grace: 1m\naccess_log: false\ntelemetry: off\nsample_every: 200ms\ndcgm_names: true\n");
  ASSERT_TRUE(std::holds_alternative<Config>(parsed)) << render(std::get<1>(parsed), "x");
  const auto& config = std::get<Config>(parsed);
  EXPECT_EQ(config.listen, "[::1]:8443");
  EXPECT_EQ(config.local.size(), 2U);
  EXPECT_EQ(config.local[1].role, access::Role::operate);
  EXPECT_EQ(config.body, 2U << 20U);
  EXPECT_EQ(config.connections_of_one, 9U);
  EXPECT_EQ(config.grace, std::chrono::minutes(1));
  EXPECT_FALSE(config.access_log);
  EXPECT_FALSE(config.telemetry);
  EXPECT_EQ(config.sample_every, std::chrono::milliseconds(200));
  EXPECT_TRUE(config.dcgm_names);
}

TEST(ServeConfig, every_mistake_is_named_at_once_with_its_place_and_a_way_out) {
  const auto text = mistakes_of(
      "lisen: 1\nsocket: relative\ncertificate: /c\nbody: many\nlocal:\n  - {user: a, role: admim}\n  - "
      "{role: auditor}\n");
  EXPECT_THAT(text, HasSubstr("serve.yaml:1:1: unknown key 'lisen'; did you mean 'listen'?"));
  EXPECT_THAT(text, HasSubstr("serve.yaml:2:9: socket: 'relative' is no absolute path"));
  EXPECT_THAT(text, HasSubstr("certificate and key go together"));
  EXPECT_THAT(text, HasSubstr("write it like 1MiB"));
  EXPECT_THAT(text, HasSubstr("did you mean 'admin'?"));
  EXPECT_THAT(text, HasSubstr("local[1]"));
}

TEST(ServeConfig, an_address_is_exact) {
  EXPECT_EQ(parse_listen(":8443")->first, "0.0.0.0");
  EXPECT_EQ(parse_listen("[::]:443")->first, "::");
  for (const auto* bad : {"", "x", "1.2.3:1", "[::1:443", "1.2.3.4:65536", "example.org:443", "1.2.3.4:-1"})
    EXPECT_FALSE(parse_listen(bad).ok()) << bad;
}

TEST(ServePages, a_cursor_is_of_its_own_kind_alone) {
  EXPECT_EQ(read_cursor("leases", cursor("leases", "17")), "17");
  EXPECT_FALSE(read_cursor("audit", cursor("leases", "17")));
  for (const auto* bad : {"", "zzz", "0", "zz", "00"}) EXPECT_FALSE(read_cursor("leases", bad)) << bad;
}

TEST(ServeTags, lists_stars_and_weak_ones_are_told_apart) {
  EXPECT_TRUE(parse_tags("*")->any);
  EXPECT_EQ(parse_tags("\"3\", W/\"4\"")->strong, std::vector<std::string>{"3"});
  EXPECT_EQ(parse_tags("\"3\", W/\"4\"")->weak, std::vector<std::string>{"4"});
  EXPECT_FALSE(parse_tags("3"));
}

TEST(ServeTimes, a_moment_is_read_with_its_zone_and_nonsense_is_none) {
  EXPECT_EQ(rfc3339(*parse_rfc3339("2026-11-22T15:05:09.5+01:00")), "2026-11-22T14:05:09.500Z");
  for (const auto* bad : {"", "2026-11-22", "2026-02-30T00:00:00Z", "2026-11-22T24:00:00Z",
                          "2026-11-22T14:05:09", "2026-11-22T14:05:09.Z", "2026-11-22T14:05:09Zx"})
    EXPECT_FALSE(parse_rfc3339(bad)) << bad;
}

TEST(ServeBuckets, a_burst_is_granted_then_the_rate_and_the_table_is_bounded) {
  Buckets buckets(10, 3, 64);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(buckets.take("a", 0), 0U);
  EXPECT_GE(buckets.take("a", 0), 1U);
  EXPECT_EQ(buckets.take("b", 0), 0U);
  EXPECT_EQ(buckets.take("a", 100'000'000), 0U);
  for (int i = 0; i < 1000; ++i) (void)buckets.take(std::to_string(i), 200'000'000);
  EXPECT_LE(buckets.size(), 64U);
}

TEST(ServeLog, a_token_never_reaches_a_line) {
  EXPECT_THAT(value("/x/bh_0123456789abcdef_00ff00ff"), Not(HasSubstr("00ff00ff")));
  EXPECT_EQ(value("a b"), "\"a b\"");
}

TEST(ServeStreams, a_tenant_sees_its_own_and_no_tokens_and_no_refusals) {
  const Sight ada{.tenant = "blue"}, admin{.all = true, .tokens = true};
  control::Event event{.id = 1, .kind = "lease", .tenant = "blue", .what = "lease/7", .outcome = "done"};
  EXPECT_TRUE(sees(ada, event));
  EXPECT_FALSE(sees({.tenant = "red"}, event));
  EXPECT_FALSE(sees({}, event));
  EXPECT_TRUE(sees({.tenant = "blue", .lease = 7}, event));
  EXPECT_FALSE(sees({.tenant = "blue", .lease = 8}, event));
  event.kind = "token";
  EXPECT_FALSE(sees(ada, event));
  EXPECT_TRUE(sees(admin, event));
  event.outcome = "refused: quota";
  EXPECT_FALSE(sees(admin, event));
}

TEST(ServeRequests, every_mistake_of_a_lease_request_is_in_one_answer) {
  const auto parsed = parse_lease_request(
      Json{{"class", "mg"}, {"tenant", "RED"}, {"deadline", "soon"}, {"ttlSeconds", 1}, {"colour", "red"}});
  ASSERT_FALSE(parsed.ok());
  for (const auto* word : {"class", "tenant", "deadline", "ttlSeconds", "colour"})
    EXPECT_THAT(parsed.error().message(), HasSubstr(word));
}

TEST(ServeRequests, the_bounds_of_a_lease_in_the_document_are_those_that_hold) {
  const auto said = [](const std::string& key, const std::string& edge) {
    return api::v1::openapi()["components"]["schemas"]["LeaseRequest"]["properties"][key][edge]
        .get<std::int64_t>();
  };
  EXPECT_EQ(said("memory", "minimum"), static_cast<std::int64_t>(lease::smallest_share.count));
  const Json good{{"class", "share"}, {"memory", said("memory", "minimum")}};
  ASSERT_TRUE(parse_lease_request(good).ok());
  for (const std::string key : {"memory", "weight", "count", "ttlSeconds", "priority"}) {
    for (const auto& [edge, beyond] : {std::pair{"minimum", -1}, std::pair{"maximum", 1}}) {
      Json ask = good;
      ask[key] = said(key, edge);
      EXPECT_TRUE(parse_lease_request(ask).ok()) << key << ' ' << edge;
      ask[key] = said(key, edge) + beyond;
      const auto no = parse_lease_request(ask);
      ASSERT_FALSE(no.ok()) << key << ' ' << edge;
      EXPECT_THAT(no.error().message(), HasSubstr(key + ": "));
    }
  }
}

TEST(ServeRequests, a_deadline_is_a_moment_of_years_of_four_digits) {
  for (const auto* bad : {"1969-12-31T23:59:59Z", "9999-12-31T23:59:59-01:00", "10000-01-01T00:00:00Z"}) {
    const auto no = parse_lease_request(Json{{"class", "exclusive"}, {"deadline", bad}});
    ASSERT_FALSE(no.ok()) << bad;
    EXPECT_THAT(no.error().message(), HasSubstr("deadline: "));
  }
  EXPECT_TRUE(parse_lease_request(Json{{"class", "exclusive"}, {"deadline", "9999-12-31T23:59:59Z"}}).ok());
}

}  // namespace
}  // namespace bulkhead::serve
