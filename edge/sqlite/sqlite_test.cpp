#include "edge/sqlite/sqlite.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

#include "edge/sqlite/disk_for_tests.hpp"

namespace bulkhead::sqlite {
int syncs = 0;
int failing_syncs = 0;
}  // namespace bulkhead::sqlite

// SQLite is linked statically, so its fsync is this one: counted, and failed on demand as a dying disk would.
extern "C" int fdatasync(int fd) {
  ++bulkhead::sqlite::syncs;
  if (bulkhead::sqlite::failing_syncs > 0) {
    --bulkhead::sqlite::failing_syncs;
    errno = EIO;
    return -1;
  }
  return static_cast<int>(::syscall(SYS_fdatasync, fd));
}

namespace bulkhead::sqlite {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

constexpr const char* migrations[] = {"CREATE TABLE note (id INTEGER PRIMARY KEY) STRICT"};
constexpr Kind kind{.application_id = 7,
                    .migrations = migrations,
                    .noun = "notebook",
                    .missing = "nothing was noted",
                    .migrate_by = "note something",
                    .out_of_it = [](const fs::path&) { return std::string("begin another"); }};

class SqliteTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-sqlite-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    dir = pattern;
  }
  void TearDown() override {
    failing_syncs = 0;
    std::error_code ignored;
    fs::remove_all(dir, ignored);
  }
  static Status note(Database& database, int id) {
    return database.transaction("note", [&] {
      return database.exec("note", ("INSERT INTO note VALUES (" + std::to_string(id) + ")").c_str());
    });
  }
  static std::int64_t notes(Database& database) {
    return database.number("count", "SELECT count(*) FROM note").value();
  }
  // What a kill at this moment leaves, opened.
  std::int64_t notes_after_a_kill() {
    const fs::path left = dir / "left";
    fs::remove_all(left);
    fs::create_directory(left);
    for (const char* name : {"notes.db", "notes.db-wal"}) {
      if (fs::exists(dir / name)) fs::copy_file(dir / name, left / name);
    }
    auto database = Database::open(kind, left / "notes.db", true);
    return database.ok() ? notes(**database) : -1;
  }
  fs::path dir;
};

TEST_F(SqliteTest, ATransactionWhoseSyncFailedDoesNotComeBackAfterAKill) {
  auto database = Database::open(kind, dir / "notes.db", true).value();
  for (int id = 1; id < 4; ++id) {  // the first writes the WAL's header too
    failing_syncs = 1;
    const Status status = note(*database, id);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().code(), Errc::io);
    EXPECT_EQ(notes(*database), id - 1);
    EXPECT_EQ(notes_after_a_kill(), id - 1);
    ASSERT_TRUE(note(*database, id).ok());
    EXPECT_EQ(notes_after_a_kill(), id);
  }
}

TEST_F(SqliteTest, WhereNothingCanBeSyncedTheErrorSaysThatItIsInDoubtAndNothingIsWrittenBehindIt) {
  auto database = Database::open(kind, dir / "notes.db", true).value();
  ASSERT_TRUE(note(*database, 1).ok());
  failing_syncs = 4;
  const Status status = note(*database, 2);
  ASSERT_FALSE(status.ok());
  EXPECT_THAT(status.error().message(), HasSubstr("killed now"));
  failing_syncs = 1;
  EXPECT_FALSE(note(*database, 3).ok());  // the disk is still bad
  failing_syncs = 0;
  ASSERT_TRUE(note(*database, 4).ok());
  EXPECT_EQ(notes_after_a_kill(), 2);  // 1 and 4
}

TEST_F(SqliteTest, ABodyThatFailsLeavesNothingAndNoDoubt) {
  auto database = Database::open(kind, dir / "notes.db", true).value();
  const Status status = database->transaction("note twice", [&]() -> Status {
    BH_CHECK(database->exec("note", "INSERT INTO note VALUES (1)"));
    return database->exec("note", "INSERT INTO note VALUES (1)");
  });
  ASSERT_FALSE(status.ok());
  EXPECT_THAT(status.error().message(), HasSubstr("notebook"));
  EXPECT_EQ(notes(*database), 0);
  EXPECT_EQ(notes_after_a_kill(), 0);
}

}  // namespace
}  // namespace bulkhead::sqlite
