#include "edge/store/store.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <functional>

#include <fmt/format.h>

#include "base/text.hpp"
#include "edge/sqlite/sqlite.hpp"

namespace bulkhead::store {

namespace fs = std::filesystem;

namespace {

using sqlite::Statement;

constexpr std::int64_t application_id = 0x42484a31;  // "BHJ1"
constexpr std::uint64_t room_bytes = 4U << 20U;      // far more than the records of one run
constexpr int dying_tries = 100;
constexpr useconds_t dying_pause_usec = 20'000;

// One entry a schema version: migrations[n] turns version n into n + 1. Never edit an entry that was
// released.
constexpr const char* migrations[] = {
    R"sql(
CREATE TABLE runs (
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  verb        TEXT    NOT NULL CHECK (verb IN ('apply', 'rollback')),
  state       TEXT    NOT NULL CHECK (state IN ('running', 'done', 'failed', 'interrupted', 'rolled-back')),
  started_ms  INTEGER NOT NULL,
  ended_ms    INTEGER,
  boot_id     TEXT    NOT NULL,
  pid         INTEGER NOT NULL,
  node_file   TEXT    NOT NULL,
  continues   INTEGER REFERENCES runs (id),
  rolls_back  INTEGER REFERENCES runs (id),
  message     TEXT    NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE steps (
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  run         INTEGER NOT NULL REFERENCES runs (id),
  kind        TEXT    NOT NULL,
  action      TEXT    NOT NULL,
  detail      TEXT    NOT NULL,
  why         TEXT    NOT NULL,
  state       TEXT    NOT NULL CHECK (state IN ('intended', 'done', 'not-done', 'undone')),
  undoes      INTEGER REFERENCES steps (id),
  started_ms  INTEGER NOT NULL,
  ended_ms    INTEGER,
  message     TEXT    NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX steps_of_run ON steps (run);
CREATE INDEX steps_in_flight ON steps (state) WHERE state = 'intended';
CREATE TABLE owned_instances (
  generation   INTEGER PRIMARY KEY AUTOINCREMENT,
  boot_id      TEXT    NOT NULL,
  gpu          TEXT    NOT NULL,
  gpu_instance INTEGER NOT NULL,
  profile_id   INTEGER NOT NULL,
  start        INTEGER NOT NULL,
  run          INTEGER NOT NULL REFERENCES runs (id),
  adopted      INTEGER NOT NULL,
  UNIQUE (boot_id, gpu, profile_id, start)
) STRICT;
CREATE TABLE clock_locks (
  boot_id TEXT    NOT NULL,
  gpu     TEXT    NOT NULL,
  low     INTEGER NOT NULL,
  high    INTEGER NOT NULL,
  PRIMARY KEY (boot_id, gpu)
) STRICT;
)sql",
    // Runs for leases. SQLite cannot change a CHECK: the table is made anew.
    R"sql(
CREATE TABLE new_runs (
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  verb        TEXT    NOT NULL CHECK (verb IN ('apply', 'rollback', 'lease')),
  state       TEXT    NOT NULL CHECK (state IN ('running', 'done', 'failed', 'interrupted', 'rolled-back')),
  started_ms  INTEGER NOT NULL,
  ended_ms    INTEGER,
  boot_id     TEXT    NOT NULL,
  pid         INTEGER NOT NULL,
  node_file   TEXT    NOT NULL,
  continues   INTEGER REFERENCES runs (id),
  rolls_back  INTEGER REFERENCES runs (id),
  message     TEXT    NOT NULL DEFAULT ''
) STRICT;
INSERT INTO new_runs SELECT id, verb, state, started_ms, ended_ms, boot_id, pid, node_file, continues, rolls_back, message
  FROM runs;
DROP TABLE runs;
ALTER TABLE new_runs RENAME TO runs;
)sql",
    // Runs of the daemon's own: protection, and whatever comes. The table of verbs is the code's.
    R"sql(
CREATE TABLE new_runs (
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  verb        TEXT    NOT NULL CHECK (length(verb) BETWEEN 1 AND 32),
  state       TEXT    NOT NULL CHECK (state IN ('running', 'done', 'failed', 'interrupted', 'rolled-back')),
  started_ms  INTEGER NOT NULL,
  ended_ms    INTEGER,
  boot_id     TEXT    NOT NULL,
  pid         INTEGER NOT NULL,
  node_file   TEXT    NOT NULL,
  continues   INTEGER REFERENCES runs (id),
  rolls_back  INTEGER REFERENCES runs (id),
  message     TEXT    NOT NULL DEFAULT ''
) STRICT;
INSERT INTO new_runs SELECT id, verb, state, started_ms, ended_ms, boot_id, pid, node_file, continues, rolls_back, message
  FROM runs;
DROP TABLE runs;
ALTER TABLE new_runs RENAME TO runs;
)sql",
};

constexpr std::pair<RunState, std::string_view> run_states[] = {{RunState::running, "running"},
                                                                {RunState::done, "done"},
                                                                {RunState::failed, "failed"},
                                                                {RunState::interrupted, "interrupted"},
                                                                {RunState::rolled_back, "rolled-back"}};
constexpr std::pair<StepState, std::string_view> step_states[] = {{StepState::intended, "intended"},
                                                                  {StepState::done, "done"},
                                                                  {StepState::not_done, "not-done"},
                                                                  {StepState::undone, "undone"}};

std::int64_t ms_of(WallTime time) { return time.time_since_epoch().count(); }
WallTime time_of(std::int64_t ms) { return WallTime(std::chrono::milliseconds(ms)); }

std::string out_of_it(const fs::path& file) {
  return fmt::format(
      "it is left as it is; to start a new journal: mv {0} {0}.aside\nthen: bulkhead apply -f FILE --adopt  "
      "(without its "
      "journal bulkhead sees the instances it made as somebody else's)",
      file.string());
}

}  // namespace

std::string_view name_of(RunState state) {
  for (const auto& [value, name] : run_states) {
    if (value == state) return name;
  }
  return "unknown";
}

std::string_view name_of(StepState state) {
  for (const auto& [value, name] : step_states) {
    if (value == state) return name;
  }
  return "unknown";
}

// ---- the lock
bool Lock::held(const fs::path& directory) {
  struct stat lock {};
  if (::stat((directory / "lock").c_str(), &lock) != 0) return false;
  const auto locks = read_file("/proc/locks");
  if (!locks.ok()) return false;
  // "1: FLOCK  ADVISORY  WRITE 4711 fe:00:1234 0 EOF". The device is not compared: overlays print another one
  // than stat.
  const std::string inode = fmt::format(":{} ", lock.st_ino);
  for (const auto line : split_lines(*locks)) {
    if (line.find(" FLOCK ") != std::string_view::npos && line.find(inode) != std::string_view::npos)
      return true;
  }
  return false;
}

Result<Lock> Lock::take(const fs::path& directory, std::string_view verb) {
  const fs::path path = directory / "lock";
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) return errno_error("open " + path.string(), errno);
  for (int tries = 0; ::flock(fd.get(), LOCK_EX | LOCK_NB) != 0; ++tries) {
    if (errno == EINTR) continue;
    if (errno != EWOULDBLOCK) return errno_error("lock " + path.string(), errno);
    // "PID VERB SINCE [WORKER]": written by the holder; may be half written, then nobody is named.
    std::string holder = "another bulkhead";
    bool run_lives = false;
    if (const auto text = read_file(path, 4096); text.ok()) {
      const auto words = split(trim(*text), ' ');
      const auto alive = [](std::string_view pid) {
        const auto n = parse_u64(pid);
        return n && *n > 0 && *n < 1U << 30U && (::kill(static_cast<pid_t>(*n), 0) == 0 || errno == EPERM);
      };
      if (words.size() >= 3 && alive(words[0])) {
        run_lives = true;
        holder = fmt::format("pid {} (bulkhead {}), since {}", printable(words[0]), printable(words[1]),
                             printable(words[2]));
      } else if (words.size() >= 4 && alive(words[3])) {
        holder = fmt::format(
            "pid {}, the worker of a `bulkhead {}` that has ended: its driver call has not returned since {}",
            printable(words[3]), printable(words[1]), printable(words[2]));
      }
    }
    // The worker of a run that was killed just now dies with it, but not in the same instant.
    if (!run_lives && tries < dying_tries) {
      ::usleep(dying_pause_usec);
      continue;
    }
    return Error(Errc::in_use, fmt::format("another run is changing this host: {}", holder),
                 "wait for it to end and try again; to see it: bulkhead history");
  }
  std::string text = fmt::format("{} {} {}", ::getpid(), verb, rfc3339(wall_now()));
  Lock lock(std::move(fd), std::move(text));
  BH_CHECK(lock.name_worker(0));
  return lock;
}

Status Lock::name_worker(int pid) const {
  // In place, padded: a reader sees the old line or the new one, or a mix that names a dead pid, never an
  // empty file.
  std::string line = pid > 0 ? fmt::format("{} {}", text_, pid) : text_;
  line.resize(std::max<std::size_t>(line.size() + 1, 96), ' ');
  line.back() = '\n';
  const ssize_t put = ::pwrite(fd_.get(), line.data(), line.size(), 0);
  if (put < 0) return errno_error("write the lock file", errno);
  if (static_cast<std::size_t>(put) != line.size()) return errno_error("write the lock file", ENOSPC);
  return ok_status();
}

// ---- the database
struct Store::Database {
  std::unique_ptr<sqlite::Database> sql = {};
  sqlite3* handle = nullptr;  // sql's
  fs::path file = {};

  Error error(std::string_view what, int code) const { return sql->error(what, code); }
  Status exec(const char* what, const char* text) const { return sql->exec(what, text); }
  Result<std::int64_t> number(const char* what, const char* text) const { return sql->number(what, text); }
  Status transaction(const char* what, const std::function<Status()>& body) const {
    return sql->transaction(what, body);
  }
};

Store::Store() : database_(std::make_unique<Database>()) {}
Store::~Store() = default;

Result<std::unique_ptr<Store>> Store::open(const fs::path& directory, Access access) {
  static constexpr sqlite::Kind kind{.application_id = application_id,
                                     .migrations = migrations,
                                     .noun = "journal",
                                     .missing = "bulkhead has changed nothing here",
                                     .migrate_by = "a verb that writes migrates it: bulkhead apply -f FILE",
                                     .out_of_it = out_of_it};
  std::unique_ptr<Store> store(new Store());
  BH_TRY(store->database_->sql,
         sqlite::Database::open(kind, file_in(directory), access == Access::read_write));
  store->database_->handle = store->database_->sql->handle();
  store->database_->file = file_in(directory);
  return store;
}

Status Store::room() const {
  const fs::path directory = database_->file.parent_path();
  struct statvfs info {};
  if (::statvfs(directory.c_str(), &info) != 0) return errno_error("statvfs " + directory.string(), errno);
  const std::uint64_t free = static_cast<std::uint64_t>(info.f_bavail) * info.f_frsize;
  if (free >= room_bytes) return ok_status();
  return Error(Errc::no_capacity,
               fmt::format("{} has {} left, a run's journal needs {}", directory.string(), human(Bytes(free)),
                           human(Bytes(room_bytes))),
               fmt::format("make room: df -h {0}\nor keep the journal elsewhere: --state-dir DIR",
                           directory.string()));
}

// ---- what is owned
Result<std::vector<OwnedInstance>> Store::owned(const std::string& boot_id) {
  Statement statement(database_->handle,
                      "SELECT gpu, gpu_instance, profile_id, start, generation, run, adopted FROM "
                      "owned_instances WHERE boot_id = ? ORDER BY generation");
  statement.bind(boot_id);
  std::vector<OwnedInstance> all;
  int code = 0;
  while ((code = statement.step()) == SQLITE_ROW) {
    all.push_back({.gpu = {statement.text(0)},
                   .gpu_instance = statement.small(1),
                   .profile_id = statement.small(2),
                   .start = statement.small(3),
                   .generation = statement.integer(4),
                   .run = statement.integer(5),
                   .adopted = statement.integer(6) != 0});
  }
  if (code != SQLITE_DONE) return database_->error("read what is owned", code);
  return all;
}

Result<std::vector<ClockLock>> Store::clock_locks(const std::string& boot_id) {
  Statement statement(database_->handle,
                      "SELECT gpu, low, high FROM clock_locks WHERE boot_id = ? ORDER BY gpu");
  statement.bind(boot_id);
  std::vector<ClockLock> all;
  int code = 0;
  while ((code = statement.step()) == SQLITE_ROW) {
    all.push_back({.gpu = {statement.text(0)},
                   .low = Megahertz(statement.small(1)),
                   .high = Megahertz(statement.small(2))});
  }
  if (code != SQLITE_DONE) return database_->error("read the clock locks", code);
  return all;
}

namespace {

template <class D>
Status own(const D& database, std::int64_t run, const std::string& boot_id, const OwnedInstance& instance) {
  Statement statement(
      database.handle,
      "INSERT OR REPLACE INTO owned_instances (boot_id, gpu, gpu_instance, profile_id, start, run, adopted) "
      "VALUES (?, ?, ?, ?, ?, ?, ?)");
  statement.bind(boot_id)
      .bind(instance.gpu.text)
      .bind(std::int64_t{instance.gpu_instance})
      .bind(std::int64_t{instance.profile_id});
  statement.bind(std::int64_t{instance.start}).bind(run).bind(std::int64_t{instance.adopted ? 1 : 0});
  if (const int code = statement.step(); code != SQLITE_DONE)
    return database.error("record an instance", code);
  return ok_status();
}

template <class D>
Status disown(const D& database, const std::string& boot_id, const OwnedInstance& instance) {
  Statement statement(
      database.handle,
      "DELETE FROM owned_instances WHERE boot_id = ? AND gpu = ? AND profile_id = ? AND start = ?");
  statement.bind(boot_id)
      .bind(instance.gpu.text)
      .bind(std::int64_t{instance.profile_id})
      .bind(std::int64_t{instance.start});
  if (const int code = statement.step(); code != SQLITE_DONE)
    return database.error("forget an instance", code);
  return ok_status();
}

// Effects belong to the boot on which the step was carried out, which is its run's.
template <class D>
Status record(const D& database, std::int64_t run, const std::string& boot_id, const Effects& effects) {
  if (effects.lost) BH_CHECK(disown(database, boot_id, *effects.lost));
  if (effects.gained) BH_CHECK(own(database, run, boot_id, *effects.gained));
  if (effects.locked) {
    Statement statement(database.handle,
                        "INSERT OR REPLACE INTO clock_locks (boot_id, gpu, low, high) VALUES (?, ?, ?, ?)");
    statement.bind(boot_id).bind(effects.locked->gpu.text).bind(std::int64_t{effects.locked->low.count});
    statement.bind(std::int64_t{effects.locked->high.count});
    if (const int code = statement.step(); code != SQLITE_DONE)
      return database.error("record a clock lock", code);
  }
  if (effects.unlocked) {
    Statement statement(database.handle, "DELETE FROM clock_locks WHERE boot_id = ? AND gpu = ?");
    statement.bind(boot_id).bind(effects.unlocked->text);
    if (const int code = statement.step(); code != SQLITE_DONE)
      return database.error("forget a clock lock", code);
  }
  return ok_status();
}

}  // namespace

// ---- runs and steps
Result<std::int64_t> Store::begin_run(const Run& run) {
  std::int64_t id = 0;
  BH_CHECK(database_->transaction("begin a run", [&]() -> Status {
    Statement statement(
        database_->handle,
        "INSERT INTO runs (verb, state, started_ms, boot_id, pid, node_file, continues, rolls_back) "
        "VALUES (?, 'running', ?, ?, ?, ?, ?, ?)");
    statement.bind(run.verb)
        .bind(ms_of(wall_now()))
        .bind(run.boot_id)
        .bind(std::int64_t{run.pid})
        .bind(run.node_file);
    statement.bind(run.continues).bind(run.rolls_back);
    if (const int code = statement.step(); code != SQLITE_DONE) return database_->error("begin a run", code);
    id = sqlite3_last_insert_rowid(database_->handle);
    return ok_status();
  }));
  return id;
}

Status Store::end_run(std::int64_t run, RunState state, std::string_view message) {
  return database_->transaction("end a run", [&]() -> Status {
    Statement statement(
        database_->handle,
        "UPDATE runs SET state = ?, message = ?, ended_ms = coalesce(ended_ms, ?) WHERE id = ?");
    statement.bind(name_of(state)).bind(message).bind(ms_of(wall_now())).bind(run);
    if (const int code = statement.step(); code != SQLITE_DONE) return database_->error("end a run", code);
    return ok_status();
  });
}

Result<std::int64_t> Store::intend(const Step& step) {
  std::int64_t id = 0;
  BH_CHECK(database_->transaction("write an intent", [&]() -> Status {
    Statement statement(database_->handle,
                        "INSERT INTO steps (run, kind, action, detail, why, state, undoes, started_ms) "
                        "VALUES (?, ?, ?, ?, ?, 'intended', ?, ?)");
    statement.bind(step.run).bind(step.kind).bind(
        step.action.dump(-1, ' ', false, Json::error_handler_t::replace));
    statement.bind(step.detail.dump(-1, ' ', false, Json::error_handler_t::replace))
        .bind(step.why)
        .bind(step.undoes);
    statement.bind(ms_of(wall_now()));
    if (const int code = statement.step(); code != SQLITE_DONE)
      return database_->error("write an intent", code);
    id = sqlite3_last_insert_rowid(database_->handle);
    return ok_status();
  }));
  return id;
}

Status Store::settle(std::int64_t step, StepState state, std::string_view message, const Effects& effects) {
  return database_->transaction("write an outcome", [&]() -> Status {
    Statement look(
        database_->handle,
        "SELECT s.run, r.boot_id, s.undoes FROM steps s JOIN runs r ON r.id = s.run WHERE s.id = ?");
    look.bind(step);
    if (const int code = look.step(); code != SQLITE_ROW) return database_->error("write an outcome", code);
    const std::int64_t run = look.integer(0);
    const std::string boot_id = look.text(1);
    const auto undoes = look.maybe(2);
    Statement statement(database_->handle,
                        "UPDATE steps SET state = ?, message = ?, ended_ms = ? WHERE id = ?");
    statement.bind(name_of(state)).bind(message).bind(ms_of(wall_now())).bind(step);
    if (const int code = statement.step(); code != SQLITE_DONE)
      return database_->error("write an outcome", code);
    if (state == StepState::done && undoes) {
      Statement undone(database_->handle, "UPDATE steps SET state = 'undone' WHERE id = ?");
      undone.bind(*undoes);
      if (const int code = undone.step(); code != SQLITE_DONE)
        return database_->error("write an outcome", code);
    }
    return record(*database_, run, boot_id, effects);
  });
}

Status Store::mark_undone(std::int64_t step, std::string_view message, const Effects& effects) {
  return settle(step, StepState::undone, message, effects);
}

Status Store::adopt(std::int64_t run, const std::string& boot_id,
                    const std::vector<OwnedInstance>& instances) {
  return database_->transaction("adopt instances", [&]() -> Status {
    for (OwnedInstance instance : instances) {
      instance.adopted = true;
      BH_CHECK(own(*database_, run, boot_id, instance));
    }
    return ok_status();
  });
}

Status Store::give_back_adopted(std::int64_t run) {
  return database_->transaction("give back adopted instances", [&]() -> Status {
    Statement statement(database_->handle, "DELETE FROM owned_instances WHERE run = ? AND adopted = 1");
    statement.bind(run);
    if (const int code = statement.step(); code != SQLITE_DONE)
      return database_->error("give back adopted instances", code);
    return ok_status();
  });
}

Status Store::forget_missing(const std::string& boot_id, const std::vector<OwnedInstance>& present) {
  BH_TRY(const auto all, owned(boot_id));
  std::vector<OwnedInstance> missing;
  for (const auto& mine : all) {
    const bool there = std::any_of(present.begin(), present.end(), [&](const OwnedInstance& other) {
      return other.gpu == mine.gpu && other.gpu_instance == mine.gpu_instance &&
             other.profile_id == mine.profile_id && other.start == mine.start;
    });
    if (!there) missing.push_back(mine);
  }
  if (missing.empty()) return ok_status();
  return database_->transaction("forget instances", [&]() -> Status {
    for (const auto& instance : missing) BH_CHECK(disown(*database_, boot_id, instance));
    return ok_status();
  });
}

namespace {
constexpr const char* run_columns =
    "SELECT id, verb, state, started_ms, ended_ms, boot_id, pid, node_file, continues, rolls_back, message "
    "FROM runs ";
constexpr const char* step_columns =
    "SELECT s.id, s.run, r.boot_id, s.kind, s.action, s.detail, s.why, s.state, s.undoes, s.started_ms, "
    "s.ended_ms, s.message "
    "FROM steps s JOIN runs r ON r.id = s.run ";

Run run_of(const Statement& row) {
  Run run{.id = row.integer(0),
          .verb = row.text(1),
          .started = time_of(row.integer(3)),
          .boot_id = row.text(5),
          .pid = static_cast<int>(row.integer(6)),
          .node_file = row.text(7),
          .continues = row.maybe(8),
          .rolls_back = row.maybe(9),
          .message = row.text(10)};
  for (const auto& [value, name] : run_states) {
    if (name == row.text(2)) run.state = value;
  }
  if (const auto ended = row.maybe(4)) run.ended = time_of(*ended);
  return run;
}

Result<Step> step_of(const Statement& row) {
  Step step{.id = row.integer(0),
            .run = row.integer(1),
            .boot_id = row.text(2),
            .kind = row.text(3),
            .why = row.text(6),
            .undoes = row.maybe(8),
            .started = time_of(row.integer(9)),
            .message = row.text(11)};
  for (const auto& [value, name] : step_states) {
    if (name == row.text(7)) step.state = value;
  }
  if (const auto ended = row.maybe(10)) step.ended = time_of(*ended);
  auto action = parse_json(row.text(4));
  auto detail = parse_json(row.text(5));
  if (!action.ok() || !detail.ok())
    return Error(Errc::corrupt, fmt::format("journal: step {} holds no valid JSON", step.id));
  step.action = std::move(*action);
  step.detail = std::move(*detail);
  return step;
}
}  // namespace

Result<std::vector<Run>> Store::runs() {
  Statement statement(database_->handle, (std::string(run_columns) + "ORDER BY id DESC LIMIT 10000").c_str());
  std::vector<Run> all;
  int code = 0;
  while ((code = statement.step()) == SQLITE_ROW) all.push_back(run_of(statement));
  if (code != SQLITE_DONE) return database_->error("read the runs", code);
  return all;
}

Result<std::optional<Run>> Store::run(std::int64_t id) {
  Statement statement(database_->handle, (std::string(run_columns) + "WHERE id = ?").c_str());
  statement.bind(id);
  const int code = statement.step();
  if (code == SQLITE_DONE) return std::optional<Run>();
  if (code != SQLITE_ROW) return database_->error("read a run", code);
  return std::optional<Run>(run_of(statement));
}

Result<std::vector<Step>> Store::steps(std::int64_t run) {
  Statement statement(database_->handle,
                      (std::string(step_columns) + "WHERE s.run = ? ORDER BY s.id").c_str());
  statement.bind(run);
  std::vector<Step> all;
  int code = 0;
  while ((code = statement.step()) == SQLITE_ROW) {
    BH_TRY(Step step, step_of(statement));
    all.push_back(std::move(step));
  }
  if (code != SQLITE_DONE) return database_->error("read the steps", code);
  return all;
}

Result<std::vector<Step>> Store::in_flight() {
  Statement statement(database_->handle,
                      (std::string(step_columns) + "WHERE s.state = 'intended' ORDER BY s.id").c_str());
  std::vector<Step> all;
  int code = 0;
  while ((code = statement.step()) == SQLITE_ROW) {
    BH_TRY(Step step, step_of(statement));
    all.push_back(std::move(step));
  }
  if (code != SQLITE_DONE) return database_->error("read the steps in flight", code);
  return all;
}

}  // namespace bulkhead::store
