#include "edge/book/book.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sqlite3.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <random>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "edge/sqlite/disk_for_tests.hpp"

namespace bulkhead::book {
namespace {

namespace fs = std::filesystem;
using sqlite::failing_syncs;
using sqlite::syncs;
using testing::HasSubstr;

class BookTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-book-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    dir = pattern;
  }
  void TearDown() override { fs::remove_all(dir); }

  std::unique_ptr<Book> open(Book::Access access = Book::Access::read_write) { return open_at(dir, access); }
  static std::unique_ptr<Book> open_at(const fs::path& where,
                                       Book::Access access = Book::Access::read_write) {
    auto book = Book::open(where, access);
    EXPECT_TRUE(book.ok()) << (book.ok() ? "" : book.error().message());
    return book.ok() ? std::move(*book) : nullptr;
  }
  // Runs SQL on the file behind the book's back.
  void sql(const std::string& text) const {
    sqlite3* db = nullptr;
    ASSERT_EQ(sqlite3_open(Book::file_in(dir).c_str(), &db), SQLITE_OK);
    char* why = nullptr;
    EXPECT_EQ(sqlite3_exec(db, text.c_str(), nullptr, nullptr, &why), SQLITE_OK) << (why ? why : "");
    sqlite3_free(why);
    sqlite3_close(db);
  }
  // What a kill at this moment would leave to the next process.
  fs::path as_killed_now(const std::string& name) const {
    const fs::path copy = dir / name;
    fs::create_directory(copy);
    for (const char* tail : {"", "-wal"}) {
      const fs::path from = Book::file_in(dir).string() + tail;
      if (fs::exists(from)) fs::copy_file(from, Book::file_in(copy).string() + tail);
    }
    return copy;
  }

  fs::path dir;
};

WallTime at(std::int64_t ms) { return WallTime(std::chrono::milliseconds(ms)); }

Audit a_line(const std::string& what) {
  return {.at = at(1'790'000'000'123),
          .user = "ada",
          .role = "tenant",
          .tenant = "vision",
          .from = "10.0.0.7",
          .verb = "create",
          .what = what,
          .outcome = "done",
          .detail = Json{{"profile", "3g.40gb"}}};
}

Record a_lease(std::int64_t id, const std::string& state = "active") {
  return {.id = id, .body = Json{{"id", id}, {"state", state}}};
}

Batch a_batch(std::int64_t id) {
  Batch batch;
  batch.leases = {a_lease(id)};
  batch.audit = {a_line(fmt::format("lease/{}", id))};
  return batch;
}

// Lines 1 to `count`, each in a batch of its own.
void write_lines(Book& book, int count) {
  for (int id = 1; id <= count; ++id) {
    Batch batch = a_batch(id);
    ASSERT_TRUE(book.commit(batch).ok());
  }
}

std::string verdict(Book& book) {
  const auto lines = book.verify();
  return lines.ok() ? fmt::format("{} whole", *lines) : lines.error().message();
}

// ---- round trips
TEST_F(BookTest, EverythingIsReadBackByTheNextProcessThatOpensIt) {
  Hash secret{};
  secret[0] = 7;
  secret[31] = 255;
  const std::string odd("a\0b\xff'\"", 6);
  {
    auto book = open();
    Batch batch;
    batch.tenants = {{.name = "vision", .body = Json{{"weight", 3}}},
                     {.name = "old", .body = Json::object()}};
    batch.tenants_gone = {"old"};
    batch.leases = {a_lease(1), a_lease(2, "ended"), a_lease(3, "failed"), a_lease(5, "queued")};
    batch.tokens = {{.id = "00112233aabbccdd",
                     .secret = secret,
                     .user = "ada",
                     .role = "tenant",
                     .tenant = "vision",
                     .created = at(1000),
                     .expires = at(2000),
                     .note = odd},
                    {.id = "f0", .user = "bob", .role = "admin", .certificate = "abcd", .created = at(5)}};
    batch.keys = {{.user = "ada", .key = "k-1", .request = secret, .status = 201, .body = odd, .at = at(9)}};
    batch.audit = {a_line("lease/1"), a_line(odd)};
    batch.settings = {{"month", Json{{"of", "2026-11"}, {"hours", 2.5}}}};
    ASSERT_TRUE(book->commit(batch).ok());
    EXPECT_EQ(batch.audit[0].id, 1);
    EXPECT_EQ(batch.audit[1].id, 2);
    EXPECT_NE(batch.audit[1].hash, Hash{});
  }
  for (const auto access : {Book::Access::read_write, Book::Access::read_only}) {
    auto book = open(access);
    const auto tenants = book->tenants().value();
    ASSERT_EQ(tenants.size(), 1U);
    EXPECT_EQ(tenants[0].name, "vision");
    EXPECT_EQ(tenants[0].body.at("weight"), 3);
    EXPECT_EQ(book->leases(true).value().size(), 4U);
    const auto alive = book->leases(false).value();
    ASSERT_EQ(alive.size(), 2U);
    EXPECT_EQ(alive[1].id, 5);
    EXPECT_EQ(book->lease(2).value()->body.at("state"), "ended");
    EXPECT_FALSE(book->lease(4).value().has_value());
    EXPECT_EQ(book->last_lease_id().value(), 5);
    const auto tokens = book->tokens().value();
    ASSERT_EQ(tokens.size(), 2U);
    EXPECT_EQ(tokens[0].secret, secret);
    EXPECT_EQ(tokens[0].note, odd);
    EXPECT_EQ(tokens[0].expires, at(2000));
    EXPECT_FALSE(tokens[0].revoked.has_value());
    EXPECT_EQ(tokens[1].certificate, "abcd");
    const auto key = book->key("ada", "k-1").value();
    ASSERT_TRUE(key.has_value());
    EXPECT_EQ(key->request, secret);
    EXPECT_EQ(key->status, 201);
    EXPECT_EQ(key->body, odd);
    EXPECT_FALSE(book->key("bob", "k-1").value().has_value());
    EXPECT_EQ(book->setting("month").value().at("hours"), 2.5);
    EXPECT_TRUE(book->setting("none").value().is_null());
    const auto lines = book->audit_after(0, 100).value();
    ASSERT_EQ(lines.size(), 2U);
    EXPECT_EQ(lines[1].what, odd);
    EXPECT_EQ(lines[0].detail.at("profile"), "3g.40gb");
    EXPECT_EQ(lines[0].at, a_line("").at);
    EXPECT_EQ(verdict(*book), "2 whole");
  }
}

TEST_F(BookTest, ARecordReplacesTheOneOfItsName) {
  auto book = open();
  Batch batch = a_batch(1);
  batch.tokens = {{.id = "t", .user = "ada", .note = "first"}};
  ASSERT_TRUE(book->commit(batch).ok());
  batch.leases[0] = a_lease(1, "ended");
  batch.tokens[0].revoked = at(77);
  ASSERT_TRUE(book->commit(batch).ok());
  EXPECT_TRUE(book->leases(false).value().empty());
  EXPECT_EQ(book->leases(true).value().size(), 1U);
  ASSERT_EQ(book->tokens().value().size(), 1U);
  EXPECT_EQ(book->tokens().value()[0].revoked, at(77));
  EXPECT_EQ(book->last_audit_id().value(), 2);
}

TEST_F(BookTest, PagesOfLeasesGoDownAndPagesOfTheLogGoUp) {
  auto book = open();
  write_lines(*book, 7);
  auto page = book->leases_page(std::numeric_limits<std::int64_t>::max(), 3).value();
  ASSERT_EQ(page.size(), 3U);
  EXPECT_EQ(page[0].id, 7);
  page = book->leases_page(page.back().id, 100).value();
  ASSERT_EQ(page.size(), 4U);
  EXPECT_EQ(page.back().id, 1);
  EXPECT_TRUE(book->leases_page(1, 3).value().empty());
  auto lines = book->audit_after(0, 5).value();
  ASSERT_EQ(lines.size(), 5U);
  lines = book->audit_after(lines.back().id, 5).value();
  ASSERT_EQ(lines.size(), 2U);
  EXPECT_EQ(lines.back().id, 7);
  EXPECT_TRUE(book->audit_after(7, std::numeric_limits<std::size_t>::max()).value().empty());
  lines = book->audit_before(std::numeric_limits<std::int64_t>::max(), 5).value();
  ASSERT_EQ(lines.size(), 5U);
  EXPECT_EQ(lines.front().id, 7);
  lines = book->audit_before(lines.back().id, 5).value();
  ASSERT_EQ(lines.size(), 2U);
  EXPECT_EQ(lines.back().id, 1);
  EXPECT_TRUE(book->audit_before(1, std::numeric_limits<std::size_t>::max()).value().empty());
}

TEST_F(BookTest, KeysOlderThanAMomentAreForgottenHoweverManyThereAre) {
  auto book = open();
  Batch batch;
  for (int i = 0; i < 9'000; ++i)
    batch.keys.push_back({.user = "ada", .key = std::to_string(i), .status = 200, .at = at(i)});
  ASSERT_TRUE(book->commit(batch).ok());
  ASSERT_TRUE(book->forget_keys(at(8'999)).ok());
  EXPECT_FALSE(book->key("ada", "8998").value().has_value());
  EXPECT_TRUE(book->key("ada", "8999").value().has_value());
}

TEST_F(BookTest, ABatchCostsOneSync) {
  auto book = open();
  write_lines(*book, 1);  // the first one also makes the WAL's header durable
  syncs = 0;
  Batch batch = a_batch(2);
  for (int i = 3; i < 60; ++i) batch.leases.push_back(a_lease(i));
  ASSERT_TRUE(book->commit(batch).ok());
  EXPECT_EQ(syncs, 1);
  Batch empty;
  ASSERT_TRUE(book->commit(empty).ok());
  EXPECT_EQ(syncs, 1);
}

TEST_F(BookTest, WhatIsBeyondABoundIsRefusedWholeAndNamed) {
  auto book = open();
  const auto refused = [&](const char* words, auto change) {
    Batch batch = a_batch(1);
    change(batch);
    const auto fit = fits(batch);
    ASSERT_FALSE(fit.ok()) << words;
    EXPECT_EQ(fit.error().code(), Errc::invalid);
    EXPECT_THAT(fit.error().message(), HasSubstr(words));
    const auto status = book->commit(batch);
    ASSERT_FALSE(status.ok()) << words;
    EXPECT_EQ(status.error().message(), fit.error().message());
    EXPECT_EQ(batch.audit[0].id, 0);
  };
  Json deep;
  for (unsigned i = 0; i < 200'000; ++i) deep = Json{{"a", std::move(deep)}};
  refused("a lease is nested deeper", [&](Batch& b) { b.leases[0].body = std::move(deep); });
  refused("a lease has", [](Batch& b) { b.leases[0].body = std::string(body_bytes, 'x'); });
  refused("the id 0", [](Batch& b) { b.leases[0].id = 0; });
  refused("name of a tenant", [](Batch& b) { b.tenants = {{.name = std::string(257, 'x')}}; });
  refused("without a name", [](Batch& b) { b.tenants = {Record{}}; });
  refused("verb of an audit", [](Batch& b) { b.audit[0].verb = std::string(257, 'x'); });
  refused("object of an audit", [](Batch& b) { b.audit[0].what = std::string(4097, 'x'); });
  refused("detail of an audit", [](Batch& b) { b.audit[0].detail = std::string(65'536, 'x'); });
  refused("idempotency key", [](Batch& b) { b.keys = {{.key = std::string(257, 'x')}}; });
  refused("user of a token", [](Batch& b) { b.tokens = {{.id = "1", .user = std::string(257, 'x')}}; });
  refused("a setting has", [](Batch& b) { b.settings = {{"a", std::string(body_bytes, 'x')}}; });
  refused("entries", [](Batch& b) { b.leases.resize(most_in_batch, a_lease(1)); });
  EXPECT_TRUE(book->leases(true).value().empty());
  EXPECT_EQ(verdict(*book), "0 whole");
}

// ---- the chain
TEST_F(BookTest, TheHashOfALineIsTheOneThatTheHeaderDocuments) {
  // Computed by the script in book.hpp.
  auto book = open();
  write_lines(*book, 2);
  const auto lines = book->audit_after(0, 2).value();
  EXPECT_EQ(hex(lines[0].hash), "7c9da12b7856ea71254ab9c2c15849aeedfd3301f05770ff7cfdb2d71f30ab0d");
  EXPECT_EQ(hex(lines[1].hash), "390b99ecbe334122b2b3c8a8ea865b94fd462363c0c5f5d0c9e42ab24853b612");
  EXPECT_EQ(hex(sha256("abc")), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST_F(BookTest, EveryFieldOfALineThatIsChangedIsFound) {
  write_lines(*open(), 5);
  const auto whole = read_file(Book::file_in(dir)).value();
  for (const char* change :
       {"at_ms = at_ms + 1", "user = 'eve'", "role = 'admin'", "tenant = ''", "origin = '10.0.0.8'",
        "verb = 'delete'", "what = 'lease/30'", "outcome = 'refused'",
        "detail = '{\"profile\": \"3g.40gb\"}'", "user = 'adat', role = 'enant'", "hash = zeroblob(32)"}) {
    ASSERT_TRUE(write_file_atomic(Book::file_in(dir), whole).ok());
    sql(fmt::format("UPDATE audit SET {} WHERE id = 3", change));
    EXPECT_THAT(verdict(*open()), HasSubstr("audit line 3 does not fit")) << change;
  }
}

TEST_F(BookTest, LinesDroppedPutInMovedOrCutOffAreFoundAndTheFirstIsNamed) {
  write_lines(*open(), 6);
  const auto whole = read_file(Book::file_in(dir)).value();
  const std::string copy =
      "INSERT INTO audit SELECT {}, at_ms, user, role, tenant, origin, verb, what, outcome, detail, hash "
      "FROM audit WHERE id = {};";
  const std::string up =
      "UPDATE audit SET id = -id - 1 WHERE id > 3; UPDATE audit SET id = -id WHERE id < 0;";
  const std::string down =
      "UPDATE audit SET id = -id + 1 WHERE id > 3; UPDATE audit SET id = -id WHERE id < 0;";
  const std::pair<std::string, const char*> tampers[] = {
      {"DELETE FROM audit WHERE id = 3", "audit line 3 is missing: it was dropped, 4 follows 2"},
      {"DELETE FROM audit WHERE id = 1", "audit line 1 is missing"},
      {"DELETE FROM audit WHERE id = 3;" + down, "audit line 3 does not fit"},
      {up + fmt::format(fmt::runtime(copy), 4, 2), "audit line 4 does not fit"},
      {fmt::format(fmt::runtime(copy), 0, 2), "audit line 0 was put in"},
      {fmt::format(fmt::runtime(copy), -9, 2), "audit line -9 was put in"},
      {fmt::format(fmt::runtime(copy), 7, 6), "audit line 7 was put in: the log ends at line 6"},
      {fmt::format(fmt::runtime(copy), 9, 6), "audit line 9 was put in: the log ends at line 6"},
      {"UPDATE audit SET id = 0 WHERE id = 2; UPDATE audit SET id = 2 WHERE id = 3;"
       "UPDATE audit SET id = 3 WHERE id = 0",
       "audit line 2 does not fit"},
      {"DELETE FROM audit WHERE id > 4", "audit line 5 is missing: the end was cut off"},
      {"DELETE FROM audit", "audit line 1 is missing: the end was cut off"},
      {"UPDATE audit_head SET id = 5", "audit line 6 was put in"},
      {"UPDATE audit_head SET hash = zeroblob(32)", "audit line 6 does not fit"},
      {"DELETE FROM audit_head", "where the audit log ends is missing"},
  };
  for (const auto& [tamper, words] : tampers) {
    ASSERT_TRUE(write_file_atomic(Book::file_in(dir), whole).ok());
    sql(tamper);
    auto book = open();
    const auto walked = book->verify();
    ASSERT_FALSE(walked.ok()) << tamper;
    EXPECT_EQ(walked.error().code(), Errc::corrupt);
    EXPECT_THAT(walked.error().message(), HasSubstr(words)) << tamper;
    // Work that goes on does not cover it up.
    Batch batch = a_batch(7);
    const bool went_on = book->commit(batch).ok();
    EXPECT_FALSE(book->verify().ok()) << tamper << went_on;
  }
  ASSERT_TRUE(write_file_atomic(Book::file_in(dir), whole).ok());
  EXPECT_EQ(verdict(*open()), "6 whole");
}

TEST_F(BookTest, TheWalkIsOfOneMomentWhileAnotherBookGoesOnWriting) {
  auto writer = open();
  write_lines(*writer, 3);
  auto reader = open(Book::Access::read_only);
  EXPECT_EQ(verdict(*reader), "3 whole");
  Batch batch = a_batch(4);
  ASSERT_TRUE(writer->commit(batch).ok());
  EXPECT_EQ(verdict(*reader), "4 whole");
  EXPECT_FALSE(reader->commit(batch).ok());
}

// ---- all or nothing
TEST_F(BookTest, ABatchThatCannotBeWrittenToItsEndLeavesNothing) {
  auto book = open();
  write_lines(*book, 2);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    auto own = Book::open(dir, Book::Access::read_write);
    if (!own.ok()) ::_exit(10);
    const auto size = fs::file_size(Book::file_in(dir).string() + "-wal");
    const rlimit small{size + 20'000, RLIM_INFINITY}, none{RLIM_INFINITY, RLIM_INFINITY};
    ::setrlimit(RLIMIT_FSIZE, &small);
    Batch large = a_batch(3);
    large.leases[0].body["pad"] = std::string(100'000, 'x');
    const auto refused = (*own)->commit(large);
    if (refused.ok()) ::_exit(11);
    if ((*own)->leases(true).value().size() != 2 || large.audit[0].id != 0) ::_exit(12);
    ::setrlimit(RLIMIT_FSIZE, &none);
    if (!(*own)->commit(large).ok()) ::_exit(13);
    ::_exit((*own)->verify().value_or(0) == 3 ? 0 : 14);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(WIFEXITED(status) ? WEXITSTATUS(status) : -1, 0);
}

ssize_t (*true_pwrite)(int, const void*, size_t, off_t) = nullptr;
int write_that_fails = 0;
ssize_t full_disk(int fd, const void* data, size_t size, off_t offset) {
  if (write_that_fails > 0 && --write_that_fails == 0) {
    write_that_fails = 1;  // and stays full
    errno = ENOSPC;
    return -1;
  }
  return true_pwrite(fd, data, size, offset);
}

TEST_F(BookTest, ADiskThatFillsUpAtAnyWriteLeavesTheBatchOutWholeAndTheNextOneGoesIn) {
  sqlite3_initialize();
  sqlite3_vfs* vfs = sqlite3_vfs_find(nullptr);
  const char* call = vfs->xGetSystemCall(vfs, "pwrite64") != nullptr ? "pwrite64" : "pwrite";
  true_pwrite =
      reinterpret_cast<ssize_t (*)(int, const void*, size_t, off_t)>(vfs->xGetSystemCall(vfs, call));
  ASSERT_NE(true_pwrite, nullptr);
  vfs->xSetSystemCall(vfs, call, reinterpret_cast<sqlite3_syscall_ptr>(full_disk));
  auto book = open();
  std::int64_t id = 0;
  bool failed = true;
  int refused = 0;
  for (int n = 1; failed; ++n) {
    ASSERT_LT(n, 100);
    Batch batch = a_batch(id + 1);
    write_that_fails = n;
    const auto status = book->commit(batch);
    write_that_fails = 0;
    failed = !status.ok();
    if (failed) {
      ++refused;
      EXPECT_EQ(status.error().code(), Errc::no_capacity) << status.error().message();
    } else {
      ++id;
    }
    EXPECT_EQ(book->last_lease_id().value(), id) << n;
    const auto copy = as_killed_now(fmt::format("full-{}", n));
    auto left = open_at(copy);
    EXPECT_EQ(left->last_lease_id().value(), id) << n;
    EXPECT_EQ(verdict(*left), fmt::format("{} whole", id)) << n;
    if (failed) {
      Batch again = a_batch(++id);
      const auto went_in = book->commit(again);
      ASSERT_TRUE(went_in.ok()) << n << ": " << went_in.error().message();
    }
  }
  vfs->xSetSystemCall(vfs, call, nullptr);
  EXPECT_GT(refused, 3);
  EXPECT_EQ(verdict(*book), fmt::format("{} whole", id));
}

TEST_F(BookTest, ABatchWhoseSyncFailedDoesNotComeBackAfterAKill) {
  auto book = open();
  for (std::int64_t id = 1; id < 4; ++id) {  // the first writes the WAL's header too
    Batch batch = a_batch(id);
    failing_syncs = 1;
    const auto status = book->commit(batch);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().code(), Errc::io);
    EXPECT_EQ(book->last_lease_id().value(), id - 1);
    auto left = open_at(as_killed_now(fmt::format("sync-{}", id)));
    EXPECT_EQ(left->last_lease_id().value(), id - 1);
    EXPECT_EQ(verdict(*left), fmt::format("{} whole", id - 1));
    ASSERT_TRUE(book->commit(batch).ok());
  }
}

// ---- killed
// Commits batches of three leases and two lines for ever, and tells `told` the last lease of each that is
// durable. Ends only by being killed.
[[noreturn]] void commit_for_ever(const fs::path& where, int told) {
  auto book = Book::open(where, Book::Access::read_write);
  if (!book.ok()) ::_exit(10);
  std::int64_t id = (*book)->last_lease_id().value_or(0);
  for (;;) {
    Batch batch;
    for (int i = 0; i < 3; ++i) batch.leases.push_back(a_lease(++id));
    batch.audit = {a_line(std::to_string(id)), a_line("twice")};
    batch.settings = {{"last", id}};
    if (!(*book)->commit(batch).ok()) ::_exit(11);
    if (::write(told, &id, sizeof id) != sizeof id) ::_exit(12);
  }
}

std::int64_t last_told(int fd) {
  std::int64_t last = 0, id = 0;
  while (::read(fd, &id, sizeof id) == sizeof id) last = id;
  return last;
}

void expect_whole(Book& book, std::int64_t told, const std::string& when) {
  const auto last = book.last_lease_id().value();
  EXPECT_GE(last, told) << when;      // nothing that was told is missing
  EXPECT_LE(last, told + 3) << when;  // and at most the batch in flight is more
  EXPECT_EQ(last % 3, 0) << when;
  EXPECT_EQ(verdict(book), fmt::format("{} whole", last / 3 * 2)) << when;
  if (last > 0) {
    EXPECT_EQ(book.setting("last").value(), last) << when;
  }
}

TEST_F(BookTest, KilledAtRandomNothingThatWasToldDurableIsMissingAndNoBatchIsHalfThere) {
  std::minstd_rand random(5);
  std::int64_t told = 0;
  for (int kill = 0; kill < 50; ++kill) {
    int ends[2] = {-1, -1};
    ASSERT_EQ(::pipe(ends), 0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::close(ends[0]);
      commit_for_ever(dir, ends[1]);
    }
    ::close(ends[1]);
    const UniqueFd from(ends[0]);
    ::usleep(static_cast<useconds_t>(random() % 12'000));
    ::kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << status;
    told = std::max(told, last_told(from.get()));
    auto book = open();
    ASSERT_NE(book, nullptr);
    expect_whole(*book, told, fmt::format("kill {}", kill));
    if (HasFailure()) return;
    told = book->last_lease_id().value();
  }
  EXPECT_GT(told, 0);
}

TEST_F(BookTest, KilledAtEverySystemCallFromTheFirstOpenOnTheSame) {
  // 300 databases: in memory where that can be had, for what SIGKILL leaves does not depend on the disk.
  std::string memory = "/dev/shm/bulkhead-book-XXXXXX";
  if (::mkdtemp(memory.data()) != nullptr) {
    fs::remove_all(dir);
    dir = memory;
  }
#ifdef __SANITIZE_ADDRESS__
  constexpr int step = 22;  // a fork costs 40 ms there: a sample
#else
  constexpr int step = 2;  // a call stops twice: before and after
#endif
  for (int n = 1;; n += step) {
    const fs::path where = dir / std::to_string(n);
    fs::create_directory(where);
    int ends[2] = {-1, -1};
    ASSERT_EQ(::pipe(ends), 0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::close(ends[0]);
      if (::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) ::_exit(13);
      ::raise(SIGSTOP);
      commit_for_ever(where, ends[1]);
    }
    ::close(ends[1]);
    const UniqueFd from(ends[0]);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    if (WIFEXITED(status)) GTEST_SKIP() << "tracing is not allowed here";
    for (int stop = 0; stop < n; ++stop) {
      ASSERT_EQ(::ptrace(PTRACE_SYSCALL, child, nullptr, nullptr), 0);
      ASSERT_EQ(::waitpid(child, &status, 0), child);
      ASSERT_TRUE(WIFSTOPPED(status)) << n << ": " << status;
    }
    ::kill(child, SIGKILL);
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    const auto told = last_told(from.get());
    {
      auto book = open_at(where);
      ASSERT_NE(book, nullptr) << n;
      expect_whole(*book, told, fmt::format("system call {}", n));
    }
    fs::remove_all(where);
    if (HasFailure() || told >= 6) return;  // two batches were through
  }
}

// ---- what is refused
TEST_F(BookTest, ADatabaseOfAnotherProgramIsRefusedAndLeft) {
  sql("CREATE TABLE mine (x)");
  const auto bytes = read_file(Book::file_in(dir)).value();
  const auto book = Book::open(dir, Book::Access::read_write);
  ASSERT_FALSE(book.ok());
  EXPECT_EQ(book.error().code(), Errc::corrupt);
  EXPECT_THAT(book.error().message(), HasSubstr("another program"));
  EXPECT_EQ(read_file(Book::file_in(dir)).value(), bytes);
}

TEST_F(BookTest, ABookOfANewerBulkheadIsRefusedAndLeft) {
  open();
  sql("PRAGMA user_version = 99");
  const auto bytes = read_file(Book::file_in(dir)).value();
  const auto book = Book::open(dir, Book::Access::read_write);
  ASSERT_FALSE(book.ok());
  EXPECT_EQ(book.error().code(), Errc::unsupported);
  EXPECT_EQ(read_file(Book::file_in(dir)).value(), bytes);
}

TEST_F(BookTest, ABookCutOffAnywhereIsRefusedAndLeft) {
  write_lines(*open(), 40);
  const std::string whole = read_file(Book::file_in(dir)).value();
  for (std::size_t length = 0; length < whole.size(); length += length < 120 ? 17 : 1531) {
    ASSERT_TRUE(write_file_atomic(Book::file_in(dir), std::string_view(whole).substr(0, length)).ok());
    const auto book = Book::open(dir, Book::Access::read_write);
    ASSERT_FALSE(book.ok()) << length;
    EXPECT_EQ(book.error().code(), Errc::corrupt) << length << ": " << book.error().message();
    EXPECT_THAT(book.error().hint(), HasSubstr(".aside"));
    ASSERT_EQ(read_file(Book::file_in(dir)).value(), whole.substr(0, length)) << length;
  }
}

TEST_F(BookTest, AReaderOfNoBookIsToldSoAndMakesNone) {
  const auto book = Book::open(dir / "none", Book::Access::read_only);
  ASSERT_FALSE(book.ok());
  EXPECT_EQ(book.error().code(), Errc::not_found);
  EXPECT_FALSE(fs::exists(dir / "none"));
}

TEST_F(BookTest, ARecordThatIsNoJsonOrTooLongInTheFileIsNamedNotBelieved) {
  write_lines(*open(), 2);
  sql("UPDATE leases SET body = '{' WHERE id = 2");
  auto book = open();
  const auto leases = book->leases(true);
  ASSERT_FALSE(leases.ok());
  EXPECT_EQ(leases.error().code(), Errc::corrupt);
  EXPECT_THAT(leases.error().message(), HasSubstr("lease 2"));
  EXPECT_TRUE(book->lease(1).ok());
  book.reset();
  sql("UPDATE leases SET body = '\"' || hex(zeroblob(5000000)) || '\"' WHERE id = 2");
  book = open();
  EXPECT_FALSE(book->leases(true).ok());
  EXPECT_TRUE(book->lease(1).ok());
}

}  // namespace
}  // namespace bulkhead::book
