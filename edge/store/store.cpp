#include "edge/store/store.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sqlite3.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <functional>

#include <fmt/format.h>

#include "base/text.hpp"

namespace bulkhead::store {

namespace fs = std::filesystem;

namespace {

constexpr std::int64_t application_id = 0x42484a31;  // "BHJ1"
constexpr std::uint64_t room_bytes = 4U << 20U;      // far more than the records of one run
constexpr int busy_ms = 10'000;
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
};
constexpr std::int64_t newest_version = std::size(migrations);

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

// ---- SQLite
struct Store::Database {
  fs::path file = {};
  sqlite3* handle = nullptr;

  ~Database() { sqlite3_close_v2(handle); }

  Error error(std::string_view what, int code) const {
    const int primary = code & 0xff;
    const std::string text = handle != nullptr ? sqlite3_errmsg(handle) : sqlite3_errstr(code);
    const int system = handle != nullptr ? sqlite3_system_errno(handle) : 0;
    const std::string name = file.string();
    const std::string directory = file.parent_path().string();
    switch (primary) {
      case SQLITE_NOTADB:
      case SQLITE_CORRUPT:
        return Error(Errc::corrupt, fmt::format("{}: journal {} is damaged: {}", what, name, text),
                     out_of_it(file), code);
      case SQLITE_FULL:
        return Error(
            Errc::no_capacity, fmt::format("{}: no space left for the journal in {}", what, directory),
            fmt::format("make room: df -h {}\nor keep the journal elsewhere: --state-dir DIR", directory),
            code);
      case SQLITE_READONLY:
      case SQLITE_PERM:
      case SQLITE_AUTH:
        return Error(Errc::permission, fmt::format("{}: journal {} cannot be written: {}", what, name, text),
                     "run as root, or keep the journal elsewhere: --state-dir DIR", code);
      case SQLITE_BUSY:
      case SQLITE_LOCKED:
        return Error(Errc::in_use,
                     fmt::format("{}: journal {} is held by another process: {}", what, name, text),
                     "try again", code);
      case SQLITE_CANTOPEN:
        return Error(system == EACCES || system == EROFS || system == EPERM ? Errc::permission : Errc::io,
                     fmt::format("{}: journal {} cannot be opened: {}", what, name,
                                 system != 0 ? std::strerror(system) : text),
                     "run as root, or keep the journal elsewhere: --state-dir DIR", code);
      default:
        break;
    }
    if (primary == SQLITE_IOERR && (system == ENOSPC || system == EDQUOT)) {
      return Error(
          Errc::no_capacity, fmt::format("{}: no space left for the journal in {}", what, directory),
          fmt::format("make room: df -h {}\nor keep the journal elsewhere: --state-dir DIR", directory),
          code);
    }
    return Error(Errc::io,
                 fmt::format("{}: journal {}: {}", what, name, system != 0 ? std::strerror(system) : text),
                 {}, code);
  }

  Status exec(const char* what, const char* sql) const {
    const int code = sqlite3_exec(handle, sql, nullptr, nullptr, nullptr);
    if (code != SQLITE_OK) return error(what, code);
    return ok_status();
  }

  Result<std::int64_t> number(const char* what, const char* sql) const;
  Status transaction(const char* what, const std::function<Status()>& body) const;
};

namespace {

// A prepared statement: bind left to right, then step.
class Statement {
 public:
  Statement(const Statement&) = delete;
  Statement& operator=(const Statement&) = delete;
  Statement(sqlite3* database, const char* sql) {
    code_ = sqlite3_prepare_v2(database, sql, -1, &handle_, nullptr);
  }
  ~Statement() { sqlite3_finalize(handle_); }

  Statement& bind(std::int64_t value) { return check(sqlite3_bind_int64(handle_, ++at_, value)); }
  Statement& bind(std::string_view text) {
    return check(sqlite3_bind_text64(handle_, ++at_, text.data() == nullptr ? "" : text.data(), text.size(),
                                     SQLITE_TRANSIENT, SQLITE_UTF8));
  }
  Statement& bind(const std::optional<std::int64_t>& value) {
    return value ? bind(*value) : check(sqlite3_bind_null(handle_, ++at_));
  }
  // SQLITE_ROW, SQLITE_DONE or the error.
  int step() { return code_ != SQLITE_OK ? code_ : sqlite3_step(handle_); }

  std::int64_t integer(int column) const { return sqlite3_column_int64(handle_, column); }
  unsigned small(int column) const { return static_cast<unsigned>(sqlite3_column_int64(handle_, column)); }
  std::optional<std::int64_t> maybe(int column) const {
    if (sqlite3_column_type(handle_, column) == SQLITE_NULL) return std::nullopt;
    return integer(column);
  }
  std::string text(int column) const {
    const auto* bytes = sqlite3_column_text(handle_, column);
    if (bytes == nullptr) return {};
    return std::string(reinterpret_cast<const char*>(bytes),
                       static_cast<std::size_t>(sqlite3_column_bytes(handle_, column)));
  }

 private:
  Statement& check(int code) {
    if (code_ == SQLITE_OK) code_ = code;
    return *this;
  }
  sqlite3_stmt* handle_ = nullptr;
  int at_ = 0;
  int code_ = SQLITE_OK;
};

}  // namespace

Result<std::int64_t> Store::Database::number(const char* what, const char* sql) const {
  Statement statement(handle, sql);
  const int code = statement.step();
  if (code != SQLITE_ROW) return error(what, code);
  return statement.integer(0);
}

Status Store::Database::transaction(const char* what, const std::function<Status()>& body) const {
  BH_CHECK(exec(what, "BEGIN IMMEDIATE"));
  Status status = body();
  if (status.ok()) status = exec(what, "COMMIT");
  if (!status.ok() && sqlite3_get_autocommit(handle) == 0)
    sqlite3_exec(handle, "ROLLBACK", nullptr, nullptr, nullptr);
  return status;
}

namespace {
// Opens, without creating and without judging.
int open_handle(const fs::path& file, int flags, bool immutable, sqlite3** handle) {
  // A URI, so that immutable=1 can be said; the path's special characters are escaped.
  std::string uri = "file:";
  for (const char c : fs::absolute(file).string()) {
    if (c == '%' || c == '?' || c == '#') {
      uri += fmt::format("%{:02x}", static_cast<unsigned char>(c));
    } else {
      uri += c;
    }
  }
  if (immutable) uri += "?immutable=1";
  const int code = sqlite3_open_v2(
      uri.c_str(), handle, flags | SQLITE_OPEN_URI | SQLITE_OPEN_NOFOLLOW | SQLITE_OPEN_EXRESCODE, nullptr);
  if (code == SQLITE_OK) sqlite3_busy_timeout(*handle, busy_ms);
  return code;
}
}  // namespace

Store::Store() : database_(std::make_unique<Database>()) {}
Store::~Store() = default;

namespace {

template <class D>
Status migrate(D& database, std::int64_t from) {
  for (std::int64_t version = from; version < newest_version; ++version) {
    Status moved = database.transaction("migrate", [&]() -> Status {
      BH_CHECK(database.exec("migrate", migrations[version]));
      return database.exec("migrate", fmt::format("PRAGMA user_version = {}", version + 1).c_str());
    });
    if (!moved.ok()) return moved;
  }
  return ok_status();
}

// A new database appears whole or not at all: made under another name, closed, synced, then renamed. So an
// empty journal.db is damage, never a beginning.
template <class D>
Status create(const fs::path& file) {
  const fs::path fresh = fmt::format("{}.{}.new", file.string(), ::getpid());
  const auto remove_fresh = [&] {
    for (const char* tail : {"", "-wal", "-shm", "-journal"}) ::unlink((fresh.string() + tail).c_str());
  };
  remove_fresh();
  {
    D database;
    database.file = fresh;
    const auto build = [&]() -> Status {
      const int code =
          open_handle(fresh, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, false, &database.handle);
      if (code != SQLITE_OK) return database.error("create", code);
      BH_CHECK(database.exec("create", fmt::format("PRAGMA application_id = {}", application_id).c_str()));
      BH_CHECK(database.exec("create", "PRAGMA synchronous = FULL"));
      BH_CHECK(migrate(database, 0));
      return database.exec("create", "PRAGMA journal_mode = WAL");
    };
    if (Status status = build(); !status.ok()) {
      remove_fresh();
      return status;
    }
  }
  // link, not rename: two first runs at once must not replace each other's journal.
  ::chmod(fresh.c_str(), 0600);
  const int linked = ::link(fresh.c_str(), file.c_str()) == 0 ? 0 : errno;
  remove_fresh();
  if (linked != 0 && linked != EEXIST) return errno_error("create " + file.string(), linked);
  const UniqueFd directory(::open(file.parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory) ::fsync(directory.get());
  return ok_status();
}

// What a killed creation left behind. Names carry the pid; one that lives is left alone.
void sweep(const fs::path& file) {
  const auto names = list_directory(file.parent_path());
  if (!names.ok()) return;
  const std::string stem = file.filename().string() + ".";
  for (const auto& name : *names) {
    if (!name.starts_with(stem)) continue;
    const auto tail = std::string_view(name).substr(stem.size());
    const auto dot = tail.find(".new");
    if (dot == std::string_view::npos) continue;
    const auto pid = parse_u64(tail.substr(0, dot));
    if (!pid || *pid == 0 || *pid > 1U << 30U || (::kill(static_cast<pid_t>(*pid), 0) == 0 || errno != ESRCH))
      continue;
    ::unlink((file.parent_path() / name).c_str());
  }
}

}  // namespace

Result<std::unique_ptr<Store>> Store::open(const fs::path& directory, Access access) {
  const bool write = access == Access::read_write;
  const fs::path file = file_in(directory);
  const std::string hint = "run as root, or keep the journal elsewhere: --state-dir DIR";
  if (write) {
    std::error_code failed;
    fs::create_directories(directory, failed);
    if (failed)
      return errno_error(fmt::format("create {}", directory.string()), failed.value()).with_hint(hint);
    if (::access(directory.c_str(), W_OK) != 0)
      return errno_error(fmt::format("write to {}", directory.string()), errno).with_hint(hint);
  }
  struct stat info {};
  std::error_code no_wal;
  const bool wal = fs::file_size(file.string() + "-wal", no_wal) > 0 && !no_wal;
  if (::stat(file.c_str(), &info) != 0) {
    if (errno != ENOENT) return errno_error("open journal " + file.string(), errno).with_hint(hint);
    if (!write)
      return Error(Errc::not_found,
                   fmt::format("no journal in {}: bulkhead has changed nothing here", directory.string()));
    sweep(file);
    BH_CHECK(create<Database>(file));
  } else if (!S_ISREG(info.st_mode)) {
    return Error(Errc::corrupt, fmt::format("open: journal {} is no regular file", file.string()),
                 out_of_it(file));
  } else if (info.st_size == 0) {
    return Error(Errc::corrupt, fmt::format("open: journal {} is empty: it was cut off", file.string()),
                 out_of_it(file));
  }

  std::unique_ptr<Store> store(new Store());
  Database& database = *store->database_;
  database.file = file;
  int code = open_handle(file, write ? SQLITE_OPEN_READWRITE : SQLITE_OPEN_READONLY, false, &database.handle);
  // Until it has proved sound, closing must not fold the WAL into it nor remove the WAL.
  if (code == SQLITE_OK) sqlite3_db_config(database.handle, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, nullptr);
  auto id = code == SQLITE_OK ? database.number("open", "PRAGMA application_id")
                              : Result<std::int64_t>(database.error("open", code));
  const bool no_shm =
      !id.ok() && !write &&
      ((id.error().native() & 0xff) == SQLITE_CANTOPEN || (id.error().native() & 0xff) == SQLITE_READONLY);
  if (no_shm && !fs::exists(file.string() + "-wal")) {
    // A reader who may not write the directory cannot make the -shm file; with no WAL the file alone is the
    // truth.
    sqlite3_close_v2(database.handle);
    database.handle = nullptr;
    code = open_handle(file, SQLITE_OPEN_READONLY, true, &database.handle);
    id = code == SQLITE_OK ? database.number("open", "PRAGMA application_id")
                           : Result<std::int64_t>(database.error("open", code));
  }
  BH_TRY(const std::int64_t application, std::move(id));
  BH_TRY(const std::int64_t version, database.number("open", "PRAGMA user_version"));
  if (application != application_id) {
    return Error(Errc::corrupt, fmt::format("open: {} is a database of another program", file.string()),
                 out_of_it(file));
  }
  if (version > newest_version || version < 0) {
    return Error(
        Errc::unsupported,
        fmt::format("open: journal {} was written by a newer bulkhead: its schema is {}, this one knows {}",
                    file.string(), version, newest_version),
        "use the newer bulkhead; the journal is left as it is");
  }
  // SQLite reads a last page that was cut off as if zeros followed, and quick_check sees no harm in it. With
  // a WAL the file may lag behind, and SQLite knows better. The file is asked for by name only: to open and
  // close it here would drop the POSIX locks that another connection of this process holds
  // (sqlite.org/howtocorrupt.html, 2.2).
  if (info.st_size > 0 && !wal) {
    BH_TRY(const std::int64_t pages, database.number("open", "PRAGMA page_count"));
    BH_TRY(const std::int64_t page, database.number("open", "PRAGMA page_size"));
    if (info.st_size % page != 0 || info.st_size < pages * page) {
      return Error(Errc::corrupt,
                   fmt::format("open: journal {} is damaged: {} bytes instead of {}", file.string(),
                               info.st_size, pages * page),
                   out_of_it(file));
    }
  }
  {
    Statement check(database.handle, "PRAGMA quick_check(1)");
    const int row = check.step();
    if (row != SQLITE_ROW) return database.error("open", row);
    if (const std::string said = check.text(0); said != "ok") {
      return Error(Errc::corrupt,
                   fmt::format("open: journal {} is damaged: {}", file.string(), printable(said)),
                   out_of_it(file));
    }
  }
  if (write) {
    BH_CHECK(database.exec("open", "PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON"));
    BH_CHECK(migrate(database, version));
    Statement mode(database.handle, "PRAGMA journal_mode = WAL");
    if (const int row = mode.step(); row != SQLITE_ROW) return database.error("open", row);
    sqlite3_db_config(database.handle, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0, nullptr);
  } else if (version < newest_version) {
    return Error(Errc::unsupported,
                 fmt::format("open: journal {} has the older schema {}", file.string(), version),
                 "a verb that writes migrates it: bulkhead apply -f FILE");
  }
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
