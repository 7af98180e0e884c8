#include "edge/accounts/accounts.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sqlite3.h>

#include <cstdlib>

#include <fmt/format.h>

#include "edge/sqlite/disk_for_tests.hpp"

namespace bulkhead::accounts {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

class AccountsTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-accounts-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    dir = pattern;
  }
  void TearDown() override { fs::remove_all(dir); }
  std::unique_ptr<Accounts> open(Accounts::Access access = Accounts::Access::read_write) {
    auto opened = Accounts::open(dir, access);
    EXPECT_TRUE(opened.ok()) << (opened.ok() ? "" : opened.error().message());
    return opened.ok() ? std::move(opened).value() : nullptr;
  }
  fs::path dir;
};

Holder lease(std::int64_t id, std::string tenant, unsigned units = 1000) {
  return {.kind = Kind::lease,
          .lease = id,
          .tenant = std::move(tenant),
          .user = "u",
          .cls = "mig",
          .profile = "1g.10gb",
          .units = units,
          .generation = id};
}
Row row(std::int64_t quarter, std::string gpu, Holder holder, std::uint64_t unit_us, std::uint64_t mj = 0) {
  return {.quarter = quarter,
          .gpu = {std::move(gpu)},
          .epoch = 1,
          .holder = std::move(holder),
          .amounts = {.unit_us = unit_us, .dynamic_mj = mj}};
}

TEST_F(AccountsTest, RowsOfOneQuarterAndHolderAreAddedUp) {
  auto accounts = open();
  for (int i = 0; i < 3; ++i)
    ASSERT_TRUE(accounts->commit({.rows = {row(10, "GPU-1", lease(1, "a"), 5, 7)}}).ok());
  const auto all = accounts->ask({.from = 0, .to = 100, .by_lease = true}).value();
  ASSERT_EQ(all.sums.size(), 1U);
  EXPECT_EQ(all.sums[0].amounts.unit_us, 15U);
  EXPECT_EQ(all.sums[0].amounts.dynamic_mj, 21U);
  EXPECT_EQ(all.sums[0].holder, lease(1, "a"));
}

TEST_F(AccountsTest, MarksAndRowsAreOfOneTransaction) {
  auto accounts = open();
  ASSERT_TRUE(accounts
                  ->commit({.rows = {row(10, "GPU-1", lease(1, "a"), 5)},
                            .marks = {{.gpu = {"GPU-1"}, .name = "H", .until_us = 5, .counter_mj = 9}}})
                  .ok());
  sqlite::failing_syncs = 1;
  EXPECT_FALSE(accounts
                   ->commit({.rows = {row(10, "GPU-2", lease(2, "a"), 5)},
                             .marks = {{.gpu = {"GPU-2"}, .until_us = 10}}})
                   .ok());
  sqlite::failing_syncs = 0;
  accounts.reset();
  accounts = open();
  const auto marks = accounts->marks().value();
  ASSERT_EQ(marks.size(), 1U);
  EXPECT_EQ(marks[0].until_us, 5);
  EXPECT_EQ(marks[0].name, "H");
  EXPECT_EQ(marks[0].counter_mj, 9U);
  EXPECT_EQ(accounts->ask({.from = 0, .to = 100}).value().sums.size(), 1U);
  // What was taken back leaves no row number behind in memory.
  ASSERT_TRUE(accounts->commit({.rows = {row(10, "GPU-2", lease(2, "a"), 5)}}).ok());
  EXPECT_EQ(accounts->ask({.from = 0, .to = 100, .by_gpu = true}).value().sums.size(), 2U);
}

TEST_F(AccountsTest, ATenantIsToldItsOwnAndNothingOfAGpu) {
  auto accounts = open();
  ASSERT_TRUE(
      accounts
          ->commit({.rows = {row(1, "GPU-1", lease(1, "a"), 5), row(1, "GPU-1", lease(2, "b"), 6),
                             row(1, "GPU-1", {}, 7)},
                    .passed = {{.quarter = 1, .gpu = {"GPU-1"}, .epoch = 1, .us = 3, .energy_mj = 4}}})
          .ok());
  const auto own = accounts->ask({.from = 0, .to = 2, .tenant = "a", .by_lease = true}).value();
  ASSERT_EQ(own.sums.size(), 1U);
  EXPECT_EQ(own.sums[0].amounts.unit_us, 5U);
  EXPECT_TRUE(own.gpus.empty());
  EXPECT_TRUE(own.epochs.empty());
  EXPECT_TRUE(accounts->ask({.from = 0, .to = 2, .tenant = ""}).value().sums.empty());
  const auto all = accounts->ask({.from = 0, .to = 2}).value();
  EXPECT_EQ(all.sums.size(), 3U);
  ASSERT_EQ(all.gpus.size(), 1U);
  EXPECT_EQ(all.gpus[0].energy_mj, 4U);
}

TEST_F(AccountsTest, ADayBeginsWhereTheAskerLives) {
  auto accounts = open();
  const std::int64_t midnight = 20'000 * 96;  // in UTC, in quarters
  ASSERT_TRUE(accounts
                  ->commit({.rows = {row(midnight - 1, "GPU-1", lease(1, "a"), 1),
                                     row(midnight, "GPU-1", lease(1, "a"), 2)}})
                  .ok());
  const auto utc = accounts->ask({.from = 0, .to = midnight + 96, .by_day = true}).value();
  ASSERT_EQ(utc.sums.size(), 2U);
  EXPECT_EQ(utc.sums[1].day, midnight * quarter_s);
  // Kathmandu, 5:45 before UTC: both are of one day.
  const auto east =
      accounts->ask({.from = 0, .to = midnight + 96, .by_day = true, .day_offset_s = 20'700}).value();
  ASSERT_EQ(east.sums.size(), 1U);
  EXPECT_EQ(east.sums[0].day, midnight * quarter_s - 20'700);
}

TEST_F(AccountsTest, OldQuartersGoAndTheirHoldersToo) {
  auto accounts = open();
  for (std::int64_t quarter = 0; quarter < 200; ++quarter)
    ASSERT_TRUE(accounts->commit({.rows = {row(quarter, "GPU-1", lease(1 + quarter, "a"), 1)}}).ok());
  EXPECT_FALSE(accounts->forget(150).value());
  EXPECT_TRUE(accounts->forget(150).value());
  EXPECT_TRUE(accounts->forget(150).value());
  const auto left = accounts->ask({.from = 0, .to = 1000, .by_lease = true}).value();
  ASSERT_EQ(left.sums.size(), 50U);
  EXPECT_EQ(left.sums[0].holder.lease, 151);
}

TEST_F(AccountsTest, SumsBeyondWhatFitsAreRefusedAndNothingChanges) {
  auto accounts = open();
  const auto most = static_cast<std::uint64_t>(INT64_MAX);
  EXPECT_FALSE(accounts->commit({.rows = {row(1, "GPU-1", lease(1, "a"), most + 1)}}).ok());
  EXPECT_FALSE(accounts->commit({.rows = {row(1, "GPU-1", {.kind = Kind::lease}, 1)}}).ok());
  EXPECT_FALSE(accounts->commit({.rows = {row(1, "GPU-1", lease(1, std::string(300, 'x')), 1)}}).ok());
  ASSERT_TRUE(accounts->commit({.rows = {row(1, "GPU-1", lease(1, "a"), most)}}).ok());
  EXPECT_FALSE(accounts->commit({.rows = {row(1, "GPU-1", lease(1, "a"), 1)}}).ok());
  EXPECT_EQ(accounts->ask({.from = 0, .to = 2}).value().sums[0].amounts.unit_us, most);
}

TEST_F(AccountsTest, AFitComesBackAndNonsenseInItsPlaceIsDropped) {
  auto accounts = open();
  const Fit fit{.model = "H",
                .power = {.idle = 70, .sm = 300, .tensor = 200, .dram = 100, .error = 0.05},
                .fitted = true,
                .samples = {{{.sm = 0.5, .tensor = 0.25, .dram = 0.125}, 200}}};
  ASSERT_TRUE(accounts->commit({.fits = {fit}}).ok());
  const auto back = accounts->fits().value();
  ASSERT_EQ(back.size(), 1U);
  EXPECT_EQ(back[0].power.sm, 300);
  ASSERT_EQ(back[0].samples.size(), 1U);
  EXPECT_EQ(back[0].samples[0].activity.dram, 0.125);
  sqlite3* raw = nullptr;
  ASSERT_EQ(sqlite3_open(Accounts::file_in(dir).c_str(), &raw), SQLITE_OK);
  for (const char* nonsense : {"{}", "[", "{\"idle\":-1}", "{\"idle\":1e999}"}) {
    EXPECT_EQ(sqlite3_exec(raw, fmt::format("UPDATE fits SET body = '{}'", nonsense).c_str(), nullptr,
                           nullptr, nullptr),
              SQLITE_OK);
    EXPECT_TRUE(accounts->fits().value().empty()) << nonsense;
  }
  sqlite3_close(raw);
}

TEST_F(AccountsTest, AnotherProgramsOrANewerFileIsRefusedAndLeftAlone) {
  open();
  sqlite3* raw = nullptr;
  ASSERT_EQ(sqlite3_open(Accounts::file_in(dir).c_str(), &raw), SQLITE_OK);
  ASSERT_EQ(sqlite3_exec(raw, "PRAGMA user_version = 99", nullptr, nullptr, nullptr), SQLITE_OK);
  sqlite3_close(raw);
  EXPECT_FALSE(Accounts::open(dir, Accounts::Access::read_write).ok());
  EXPECT_FALSE(Accounts::open(dir / "none", Accounts::Access::read_only).ok());
}

TEST_F(AccountsTest, AMonthOfEightGpusInSevenSlicesIsBelow50Megabytes) {
  auto accounts = open();
  // A day, each quarter written as a busy month would have it; the size of a month follows from it.
  for (std::int64_t quarter = 0; quarter < 96; ++quarter) {
    Batch batch;
    for (int gpu = 0; gpu < 8; ++gpu) {
      const auto uuid = fmt::format("GPU-{:08x}-0000-0000-0000-000000000000", gpu);
      for (int slice = 0; slice < 9; ++slice) {
        Row one =
            row(quarter, uuid, slice < 7 ? lease(1 + gpu * 7 + slice, "tenant") : Holder{}, 900'000'000'000);
        if (slice == 8) one.holder.kind = Kind::out_of_service;
        one.amounts.used_unit_us = 812'345'678'901, one.amounts.mib_us = 9'123'456'789'012;
        one.amounts.sm_us = one.amounts.tensor_us = one.amounts.dram_us = 112'345'678;
        one.amounts.idle_mj = one.amounts.dynamic_mj = 61'234'567, one.amounts.error_mj = 1'234'567;
        batch.rows.push_back(one);
      }
      batch.passed.push_back(
          {.quarter = quarter, .gpu = {uuid}, .epoch = 1, .us = 900'000'000, .energy_mj = 512'345'678});
    }
    ASSERT_TRUE(accounts->commit(batch).ok());
  }
  accounts.reset();
  EXPECT_LT(fs::file_size(Accounts::file_in(dir)) * 30, 50'000'000U);
}

}  // namespace
}  // namespace bulkhead::accounts
