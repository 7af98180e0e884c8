#include "edge/store/store.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sqlite3.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

#include <fmt/format.h>

namespace bulkhead::store {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

class StoreTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-store-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    dir = pattern;
  }
  void TearDown() override { fs::remove_all(dir); }

  std::unique_ptr<Store> open() {
    auto store = Store::open(dir, Store::Access::read_write);
    EXPECT_TRUE(store.ok()) << (store.ok() ? "" : store.error().message());
    return store.ok() ? std::move(*store) : nullptr;
  }
  // Runs SQL on the file behind the store's back.
  void sql(const fs::path& file, const char* text) const {
    sqlite3* db = nullptr;
    ASSERT_EQ(sqlite3_open(file.c_str(), &db), SQLITE_OK);
    char* why = nullptr;
    EXPECT_EQ(sqlite3_exec(db, text, nullptr, nullptr, &why), SQLITE_OK) << (why != nullptr ? why : "");
    sqlite3_close(db);
  }

  fs::path dir;
};

Step a_step(std::int64_t run) {
  return {.run = run,
          .kind = "set-governor",
          .action = Json{{"kind", "set-governor"}},
          .detail = Json::object(),
          .why = "asked"};
}

TEST_F(StoreTest, AnIntentIsReadBackByTheNextProcessThatOpensTheJournal) {
  std::int64_t run = 0;
  std::int64_t step = 0;
  {
    auto store = open();
    run =
        store->begin_run({.verb = "apply", .boot_id = "b1", .pid = 42, .node_file = "kind: Node\n"}).value();
    step = store->intend(a_step(run)).value();
  }
  auto store = open();
  const auto flying = store->in_flight().value();
  ASSERT_EQ(flying.size(), 1U);
  EXPECT_EQ(flying[0].id, step);
  EXPECT_EQ(flying[0].boot_id, "b1");
  EXPECT_EQ(flying[0].action.at("kind"), "set-governor");
  ASSERT_TRUE(store->settle(step, StepState::done, "", {}).ok());
  EXPECT_TRUE(store->in_flight().value().empty());
  const auto again = store->run(run).value();
  ASSERT_TRUE(again.has_value());
  EXPECT_EQ(again->state, RunState::running);
  EXPECT_EQ(again->node_file, "kind: Node\n");
}

TEST_F(StoreTest, AnUndoThatIsDoneMakesTheStepItUndoesUndone) {
  auto store = open();
  const auto run = store->begin_run({.verb = "apply", .boot_id = "b1"}).value();
  const auto first = store->intend(a_step(run)).value();
  ASSERT_TRUE(store->settle(first, StepState::done, "", {}).ok());
  Step undo = a_step(run);
  undo.undoes = first;
  const auto second = store->intend(undo).value();
  EXPECT_EQ(store->steps(run).value()[0].state, StepState::done);
  ASSERT_TRUE(store->settle(second, StepState::done, "", {}).ok());
  EXPECT_EQ(store->steps(run).value()[0].state, StepState::undone);
}

TEST_F(StoreTest, OwnershipFollowsItsStepAndEndsWithTheBoot) {
  auto store = open();
  const auto run = store->begin_run({.verb = "apply", .boot_id = "b1"}).value();
  const OwnedInstance made{.gpu = {"GPU-1"}, .gpu_instance = 3, .profile_id = 14, .start = 2};
  const auto step = store->intend(a_step(run)).value();
  ASSERT_TRUE(store->settle(step, StepState::done, "", {.gained = made}).ok());
  ASSERT_EQ(store->owned("b1").value().size(), 1U);
  const auto first_generation = store->owned("b1").value()[0].generation;
  EXPECT_TRUE(store->owned("b2").value().empty());

  const auto gone = store->intend(a_step(run)).value();
  ASSERT_TRUE(store->settle(gone, StepState::done, "", {.lost = made}).ok());
  EXPECT_TRUE(store->owned("b1").value().empty());
  const auto back = store->intend(a_step(run)).value();
  ASSERT_TRUE(store->settle(back, StepState::done, "", {.gained = made}).ok());
  EXPECT_GT(store->owned("b1").value()[0].generation, first_generation);

  ASSERT_TRUE(store->forget_missing("b1", {}).ok());
  EXPECT_TRUE(store->owned("b1").value().empty());
}

TEST_F(StoreTest, AdoptedInstancesGoBackWithTheRunThatAdoptedThem) {
  auto store = open();
  const auto run = store->begin_run({.verb = "apply", .boot_id = "b1"}).value();
  ASSERT_TRUE(
      store->adopt(run, "b1", {{.gpu = {"GPU-1"}, .gpu_instance = 1, .profile_id = 9, .start = 0}}).ok());
  EXPECT_TRUE(store->owned("b1").value()[0].adopted);
  ASSERT_TRUE(store->give_back_adopted(run).ok());
  EXPECT_TRUE(store->owned("b1").value().empty());
}

TEST_F(StoreTest, AJournalCutOffAnywhereIsRefusedAndLeftAsItIs) {
  {
    auto store = open();
    const auto run = store->begin_run({.verb = "apply", .boot_id = "b1"}).value();
    for (int i = 0; i < 40; ++i)
      ASSERT_TRUE(
          store->settle(store->intend(a_step(run)).value(), StepState::done, std::string(200, 'x'), {}).ok());
  }
  const fs::path file = Store::file_in(dir);
  const std::string whole = read_file(file).value();
  ASSERT_GT(whole.size(), 8192U);
  for (std::size_t length = 0; length < whole.size(); length += length < 120 ? 1 : 509) {
    ASSERT_TRUE(write_file_atomic(file, std::string_view(whole).substr(0, length)).ok());
    for (const auto access : {Store::Access::read_only, Store::Access::read_write}) {
      const auto store = Store::open(dir, access);
      ASSERT_FALSE(store.ok()) << length;
      EXPECT_EQ(store.error().code(), Errc::corrupt) << length << ": " << store.error().message();
      EXPECT_THAT(store.error().hint(), HasSubstr(".aside")) << length;
      ASSERT_EQ(read_file(file).value(), whole.substr(0, length)) << length;
    }
  }
  ASSERT_TRUE(write_file_atomic(file, whole).ok());
  EXPECT_EQ(open()->steps(1).value().size(), 40U);
}

TEST_F(StoreTest, GarbageIsRefused) {
  ASSERT_TRUE(write_file_atomic(Store::file_in(dir), std::string(5000, 'G')).ok());
  const auto store = Store::open(dir, Store::Access::read_write);
  ASSERT_FALSE(store.ok());
  EXPECT_EQ(store.error().code(), Errc::corrupt);
  EXPECT_EQ(read_file(Store::file_in(dir)).value(), std::string(5000, 'G'));
}

TEST_F(StoreTest, ADatabaseOfAnotherProgramIsRefused) {
  sql(Store::file_in(dir), "CREATE TABLE mine (x)");
  const auto store = Store::open(dir, Store::Access::read_write);
  ASSERT_FALSE(store.ok());
  EXPECT_THAT(store.error().message(), HasSubstr("another program"));
}

TEST_F(StoreTest, AJournalOfANewerBulkheadIsRefused) {
  open();
  sql(Store::file_in(dir), "PRAGMA user_version = 99");
  const auto store = Store::open(dir, Store::Access::read_write);
  ASSERT_FALSE(store.ok());
  EXPECT_EQ(store.error().code(), Errc::unsupported);
  EXPECT_THAT(store.error().message(), HasSubstr("newer bulkhead"));
}

TEST_F(StoreTest, AJournalFromBeforeLeasesKeepsItsRunsAndTakesLeases) {
  std::int64_t run = 0, step = 0;
  {
    auto store = open();
    run = store->begin_run({.verb = "apply", .boot_id = "b", .node_file = "kind: Node\n"}).value();
    step = store->intend(a_step(run)).value();
  }
  sql(Store::file_in(dir), R"sql(
CREATE TABLE first_runs (id INTEGER PRIMARY KEY AUTOINCREMENT,
  verb TEXT NOT NULL CHECK (verb IN ('apply', 'rollback')),
  state TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'interrupted', 'rolled-back')),
  started_ms INTEGER NOT NULL, ended_ms INTEGER, boot_id TEXT NOT NULL, pid INTEGER NOT NULL, node_file TEXT NOT NULL,
  continues INTEGER REFERENCES runs (id), rolls_back INTEGER REFERENCES runs (id), message TEXT NOT NULL DEFAULT '') STRICT;
INSERT INTO first_runs SELECT * FROM runs;
DROP TABLE runs;
ALTER TABLE first_runs RENAME TO runs;
PRAGMA user_version = 1;
)sql");
  auto store = open();
  ASSERT_NE(store, nullptr);
  EXPECT_EQ(store->run(run).value()->node_file, "kind: Node\n");
  EXPECT_EQ(store->in_flight().value().at(0).id, step);
  const auto lease = store->begin_run({.verb = "lease", .boot_id = "b"});
  ASSERT_TRUE(lease.ok()) << lease.error().message();
  EXPECT_EQ(*lease, run + 1);
  EXPECT_TRUE(store->intend(a_step(*lease)).ok());
  EXPECT_FALSE(store->intend(a_step(*lease + 1)).ok());  // of a run that is not there
}

TEST_F(StoreTest, VersionZeroIsMigrated) {
  sql(Store::file_in(dir), "PRAGMA application_id = 1112033841; CREATE TABLE x (y); DROP TABLE x");
  auto store = open();
  ASSERT_NE(store, nullptr);
  EXPECT_TRUE(store->begin_run({.verb = "apply", .boot_id = "b"}).ok());
}

TEST_F(StoreTest, AReaderOfNoJournalIsToldSoAndMakesNone) {
  const auto store = Store::open(dir / "none", Store::Access::read_only);
  ASSERT_FALSE(store.ok());
  EXPECT_EQ(store.error().code(), Errc::not_found);
  EXPECT_FALSE(fs::exists(dir / "none"));
}

TEST_F(StoreTest, ADirectoryThatCannotBeMadeIsNamed) {
  ASSERT_TRUE(write_file_atomic(dir / "file", "x").ok());
  const auto store = Store::open(dir / "file/below", Store::Access::read_write);
  ASSERT_FALSE(store.ok());
  EXPECT_THAT(store.error().message(), HasSubstr("file/below"));
  EXPECT_THAT(store.error().hint(), HasSubstr("--state-dir"));
}

TEST_F(StoreTest, TheSecondToTakeTheLockIsToldWhoHoldsIt) {
  auto lock = Lock::take(dir, "apply");
  ASSERT_TRUE(lock.ok());
  const auto second = Lock::take(dir, "rollback");
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.error().code(), Errc::in_use);
  EXPECT_THAT(second.error().message(), HasSubstr(fmt::format("pid {} (bulkhead apply)", ::getpid())));
}

TEST_F(StoreTest, AWorkerThatOutlivesItsRunKeepsTheLockAndIsNamed) {
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    // The run: takes the lock, forks the worker, names it, dies. The worker hangs.
    auto lock = Lock::take(dir, "apply");
    const pid_t worker = ::fork();
    if (worker == 0) {
      ::alarm(30);
      ::pause();
      ::_exit(0);
    }
    (void)lock->name_worker(worker).ok();
    (void)!::write(ready[1], &worker, sizeof worker);
    ::_exit(0);
  }
  pid_t worker = 0;
  ASSERT_EQ(::read(ready[0], &worker, sizeof worker), static_cast<ssize_t>(sizeof worker));
  ::waitpid(child, nullptr, 0);
  const auto second = Lock::take(dir, "apply");
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(second.error().message(), HasSubstr(fmt::format("pid {}, the worker of", worker)));
  ::kill(worker, SIGKILL);
  for (int i = 0; i < 200 && !Lock::take(dir, "apply").ok(); ++i) ::usleep(10'000);
  EXPECT_TRUE(Lock::take(dir, "apply").ok());
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST_F(StoreTest, AKilledCreationLeavesNothingInTheWay) {
  // A pid that is certainly dead: our own child's.
  const pid_t child = ::fork();
  if (child == 0) ::_exit(0);
  ::waitpid(child, nullptr, 0);
  ASSERT_TRUE(write_file_atomic(dir / fmt::format("journal.db.{}.new", child), "half").ok());
  ASSERT_NE(open(), nullptr);
  const auto left = list_directory(dir).value();
  for (const auto& entry : left) EXPECT_EQ(entry.find(".new"), std::string::npos) << entry;
}

}  // namespace
}  // namespace bulkhead::store
