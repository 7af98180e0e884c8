// Journals made by systemd's own systemd-journal-remote, from records as `journalctl -o export` writes them.
#include "edge/journal/journal.hpp"

#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

namespace bulkhead::journal {
namespace {

namespace fs = std::filesystem;

constexpr const char* maker = "/lib/systemd/systemd-journal-remote";
constexpr const char* unit = "nvidia-fabricmanager.service";
constexpr const char* boot = "0123abcd-0000-4000-8000-000000000001";
constexpr const char* boot_field = "0123abcd000040008000000000000001";

struct Made {
  std::string message = {};
  std::vector<std::string> fields = {};
  std::string boot = boot_field;
};

class Journal : public ::testing::Test {
 protected:
  void SetUp() override {
    if (::access(maker, X_OK) != 0) GTEST_SKIP() << "systemd-journal-remote is not installed";
    std::string name = fs::temp_directory_path() / "journal-XXXXXX";
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    root_ = name;
    fs::create_directories(root_ / "var/log/journal");
  }
  void TearDown() override {
    if (!root_.empty()) fs::remove_all(root_);
  }
  void add(const std::string& file, const std::vector<Made>& records) {
    const auto from = root_ / "export";
    std::ofstream out(from);
    for (const auto& one : records) {
      clock_ += 1'000;
      out << fmt::format("__REALTIME_TIMESTAMP={}\n__MONOTONIC_TIMESTAMP={}\n_BOOT_ID={}\nMESSAGE={}\n",
                         1'790'000'000'000'000 + clock_, clock_, one.boot, one.message);
      for (const auto& field : one.fields) out << field << '\n';
      out << '\n';
    }
    out.close();
    const auto command = fmt::format("{} --split-mode=none --output={} {} 2>/dev/null", maker,
                                     (root_ / "var/log/journal" / file).string(), from.string());
    ASSERT_EQ(std::system(command.c_str()), 0) << command;
  }
  static std::vector<std::string> said(Reader& reader) {
    std::vector<std::string> out;
    const auto records = reader.read();
    if (!records.ok()) return {records.error().message()};
    for (const auto& one : *records) out.push_back(one.program + ": " + one.message);
    return out;
  }

  fs::path root_ = {};
  long clock_ = 0;
};

const std::vector<std::string> by_systemd = {"_PID=1", "_COMM=systemd", std::string("UNIT=") + unit};
const std::vector<std::string> by_itself = {"_PID=77", "_COMM=nv-fabricmanage",
                                            std::string("_SYSTEMD_UNIT=") + unit};
using Words = std::vector<std::string>;

TEST_F(Journal, WhatTheUnitAndSystemdSayAndNobodyElse) {
  add("a.journal", {{"started", by_systemd},
                    {"configured", by_itself},
                    // What `logger` and any program may set: names without an underscore.
                    {"forged",
                     {"_PID=99", "_COMM=logger", std::string("UNIT=") + unit, "SYSLOG_IDENTIFIER=systemd",
                      "_SYSTEMD_UNIT=user@1000.service"}},
                    {"of another", {"_PID=1", "_COMM=systemd", "UNIT=cron.service"}},
                    {"of the boot before", by_systemd, "ffffabcd000040008000000000000001"}});
  auto reader = Reader::open(root_, unit, boot, "");
  ASSERT_TRUE(reader.ok()) << reader.error().message();
  EXPECT_EQ(said(**reader), (Words{"systemd: started", "nv-fabricmanage: configured"}));
  EXPECT_EQ(said(**reader), Words{});
}

TEST_F(Journal, FollowsFilesThatComeAndGoesOnBehindACursor) {
  add("a.journal", {{"one", by_systemd}});
  auto reader = Reader::open(root_, unit, boot, "");
  ASSERT_TRUE(reader.ok()) << reader.error().message();
  EXPECT_EQ(said(**reader), Words{"systemd: one"});
  add("b.journal", {{"two", by_systemd}});
  EXPECT_EQ(said(**reader), Words{"systemd: two"});
  const auto cursor = (*reader)->cursor();
  add("c.journal", {{"three", by_itself}});
  auto next = Reader::open(root_, unit, boot, cursor);
  ASSERT_TRUE(next.ok());
  EXPECT_EQ(said(**next), Words{"nv-fabricmanage: three"});
  auto lost = Reader::open(root_, unit, boot, "no cursor at all");
  ASSERT_TRUE(lost.ok());
  EXPECT_EQ(said(**lost).size(), 3U) << "all of this boot, rather than nothing";
}

TEST_F(Journal, LongAndManyAreBounded) {
  std::vector<Made> many(most_records + 5, {"x", by_itself});
  many[0].message = std::string(100'000, 'y');
  add("a.journal", many);
  auto reader = Reader::open(root_, unit, boot, "");
  ASSERT_TRUE(reader.ok());
  const auto first = (*reader)->read();
  ASSERT_TRUE(first.ok());
  ASSERT_EQ(first->size(), most_records);
  EXPECT_LE((*first)[0].message.size(), most_message);
  EXPECT_EQ((*reader)->read()->size(), 5U);
}

TEST_F(Journal, ADamagedFileIsNoEnd) {
  add("a.journal", {{"one", by_systemd}, {"two", by_systemd}});
  fs::copy_file(root_ / "var/log/journal/a.journal", root_ / "var/log/journal/b.journal");
  fs::resize_file(root_ / "var/log/journal/b.journal", 4096);
  std::ofstream(root_ / "var/log/journal/c.journal") << "LPKSHHRH and nothing of it";
  auto reader = Reader::open(root_, unit, boot, "");
  ASSERT_TRUE(reader.ok()) << reader.error().message();
  EXPECT_EQ(said(**reader), (Words{"systemd: one", "systemd: two"}));
}

TEST_F(Journal, WhereThereIsNoneItSaysSo) {
  fs::remove_all(root_ / "var");
  const auto reader = Reader::open(root_, unit, boot, "");
  ASSERT_FALSE(reader.ok());
  EXPECT_EQ(reader.error().code(), Errc::not_found);
}

}  // namespace
}  // namespace bulkhead::journal
