#include "edge/logfile/logfile.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>

namespace bulkhead::logfile {
namespace {

namespace fs = std::filesystem;

class LogFile : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = fs::temp_directory_path() / "logfile-XXXXXX";
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    folder_ = name;
    path_ = folder_ / "log";
  }
  void TearDown() override { fs::remove_all(folder_); }
  void add(const std::string& text) const {
    std::ofstream(path_, std::ios::app) << text;
    fs::permissions(path_, fs::perms::owner_read | fs::perms::owner_write);
  }

  fs::path folder_ = {}, path_ = {};
};

TEST_F(LogFile, FollowsWhatIsAddedInWholeLines) {
  add("old\n");
  Tail tail(path_, {});
  EXPECT_EQ(tail.read().value(), "") << "what was there before was nobody's to hear";
  add("one\ntwo\nhal");
  EXPECT_EQ(tail.read().value(), "one\ntwo\n");
  EXPECT_EQ(tail.read().value(), "");
  add("f\n");
  EXPECT_EQ(tail.read().value(), "half\n");
}

TEST_F(LogFile, GoesOnWhereAnEarlierOneWas) {
  add("old\n");
  Tail first(path_, {});
  (void)first.read();
  add("while nobody was here\n");
  EXPECT_EQ(Tail(path_, first.place()).read().value(), "while nobody was here\n");
}

TEST_F(LogFile, AFileThatComesLaterIsReadFromItsBeginning) {
  Tail tail(path_, {});
  EXPECT_EQ(tail.read().error().code(), Errc::not_found);
  add("first\n");
  EXPECT_EQ(tail.read().value(), "first\n");
}

TEST_F(LogFile, FollowsRotationAndTruncation) {
  add("old\n");
  Tail tail(path_, {});
  (void)tail.read();
  add("before\n");
  fs::rename(path_, folder_ / "log.1");
  add("after\n");
  EXPECT_EQ(tail.read().value(), "before\n");
  EXPECT_EQ(tail.read().value(), "") << "the old one ends";
  EXPECT_EQ(tail.read().value(), "after\n");
  fs::resize_file(path_, 0);
  add("new\n");
  EXPECT_EQ(tail.read().value(), "new\n");
}

TEST_F(LogFile, ALineWithoutAnEndIsLeftOut) {
  add("old\n");
  Tail tail(path_, {});
  (void)tail.read();
  add(std::string(1U << 20U, 'x'));
  EXPECT_EQ(tail.read().value(), "");
  add("rest of it\nnext\n");
  EXPECT_EQ(tail.read().value(), "next\n");
}

TEST_F(LogFile, WhatOthersMayWriteIsNotBelieved) {
  add("");
  ASSERT_EQ(::chmod(path_.c_str(), 0666), 0);
  Tail tail(path_, {});
  EXPECT_EQ(tail.read().error().code(), Errc::permission);
  fs::remove(path_);
  add("");
  fs::rename(path_, folder_ / "elsewhere");
  fs::create_symlink(folder_ / "elsewhere", path_);
  EXPECT_FALSE(tail.read().ok()) << "a link leads where its maker wants";
  fs::remove(path_);
  ASSERT_EQ(::mkfifo(path_.c_str(), 0600), 0);
  EXPECT_FALSE(tail.read().ok());
}

}  // namespace
}  // namespace bulkhead::logfile
