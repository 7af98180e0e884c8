#include "core/bill/bill.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/prng.hpp"

namespace bulkhead::bill {
namespace {

using testing::HasSubstr;

constexpr std::uint64_t hour = 3'600'000'000;

Line mig(std::string profile, unsigned units, std::uint64_t us) {
  return {.account = "lease",
          .tenant = "a",
          .cls = "mig",
          .profile = std::move(profile),
          .units = units,
          .amounts = {.unit_us = units * us}};
}
Prices prices(std::string_view text) {
  auto parsed = parse_prices(text);
  if (auto* mistakes = std::get_if<std::vector<yaml::Mistake>>(&parsed)) {
    ADD_FAILURE() << yaml::render(*mistakes, "prices.yaml");
    return {};
  }
  return std::get<Prices>(parsed);
}

TEST(Bill, ASliceHourCostsItsProfilesPrice) {
  Statement statement{.lines = {mig("1g.10gb", 1000, 10 * hour), mig("3g.40gb", 3000, hour)}};
  ASSERT_TRUE(price(statement, prices("currency: EUR\nslice-hour:\n  1g.10gb: 0.45\n  mig: 1.2\n")).ok());
  EXPECT_EQ(statement.lines[0].cents, 450);
  EXPECT_EQ(statement.lines[1].cents, 120);
  EXPECT_EQ(statement.currency, "EUR");
}

TEST(Bill, ATenthOfAGpuCostsATenth) {
  Line line{.account = "lease", .cls = "share", .units = 700, .amounts = {.unit_us = 700 * hour}};
  Line whole{.account = "lease", .cls = "exclusive", .units = 7000, .amounts = {.unit_us = 7000 * hour}};
  Statement statement{.lines = {line, whole}};
  ASSERT_TRUE(price(statement, prices("currency: EUR\nslice-hour: {share: 3, exclusive: 3.10}\n")).ok());
  EXPECT_EQ(statement.lines[0].cents, 30);
  EXPECT_EQ(statement.lines[1].cents, 310);
}

TEST(Bill, EnergyAndMemoryHavePricesOfTheirOwn) {
  Line line{.account = "lease",
            .cls = "mig",
            .profile = "1g.10gb",
            .units = 1000,
            .amounts = {.mib_us = 10'240 * hour, .idle_mj = 1'800'000'000, .dynamic_mj = 1'800'000'000}};
  Statement statement{.lines = {line}};
  ASSERT_TRUE(price(statement, prices("currency: EUR\nkwh: 0.28\ngib-hour: 0.002\n")).ok());
  EXPECT_EQ(statement.lines[0].cents, 30);
}

TEST(Bill, AProfileWithoutAPriceIsSaidNotGivenAway) {
  Statement statement{.lines = {mig("2g.20gb", 2000, hour)}};
  const auto done = price(statement, prices("currency: EUR\nslice-hour: {1g.10gb: 1}\n"));
  ASSERT_FALSE(done.ok());
  EXPECT_THAT(done.error().message(), HasSubstr("2g.20gb"));
}

TEST(Bill, EachLineIsRoundedOnceHalfUp) {
  Statement statement{.lines = {mig("a", 1000, hour / 2), mig("a", 1000, hour / 2 - 1000)}};
  ASSERT_TRUE(price(statement, prices("currency: EUR\nslice-hour: {a: 0.01}\n")).ok());
  EXPECT_EQ(statement.lines[0].cents, 1);
  EXPECT_EQ(statement.lines[1].cents, 0);
  EXPECT_EQ(money(5), "0.05");
  EXPECT_EQ(money(123'405), "1234.05");
}

TEST(Bill, EveryMistakeInThePricesIsToldWithItsPlace) {
  const auto parsed = parse_prices("slice-hour: {a: -1, b: 1e3, c: 0.0000000001}\nkwh: dear\nprice: 1\n");
  const auto* mistakes = std::get_if<std::vector<yaml::Mistake>>(&parsed);
  ASSERT_NE(mistakes, nullptr);
  EXPECT_EQ(mistakes->size(), 6U) << yaml::render(*mistakes, "p");
}

TEST(Bill, ADocumentThatDoesNotAddUpIsFoundOut) {
  Json document{{"from", "a"},
                {"to", "b"},
                {"addsUp", true},
                {"items", {{{"account", "unallocated"}, {"unitMicroseconds", 7000}, {"idleMillijoules", 5}}}},
                {"gpus", {{{"gpu", "GPU-1"}, {"microseconds", 1}, {"counterMillijoules", 5}}}}};
  EXPECT_EQ(parse(document)->adds_up, true);
  document["gpus"][0]["counterMillijoules"] = 6;
  EXPECT_EQ(parse(document)->adds_up, false);
  EXPECT_FALSE(parse(Json::array()).ok());
  EXPECT_FALSE(parse(Json{{"items", 1}}).ok());
}

TEST(Bill, HugeAmountsDoNotOverflow) {
  Statement statement{.lines = {mig("a", 7000, 400 * 24 * hour * 8)}};
  ASSERT_TRUE(price(statement, prices("currency: EUR\nslice-hour: {a: 1000000}\n")).ok());
  EXPECT_EQ(statement.lines[0].cents, 400LL * 24 * 8 * 1'000'000 * 100);
}

}  // namespace
}  // namespace bulkhead::bill
