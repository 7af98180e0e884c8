#include "edge/sqlite/sqlite.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"

namespace bulkhead::sqlite {

namespace fs = std::filesystem;

namespace {

constexpr int busy_ms = 10'000;

std::string elsewhere(const Kind& kind) {
  return fmt::format("run as root, or keep the {} elsewhere: --state-dir DIR", kind.noun);
}

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

Error Database::error(std::string_view what, int code) const {
  const int primary = code & 0xff;
  const std::string text = handle_ != nullptr ? sqlite3_errmsg(handle_) : sqlite3_errstr(code);
  const int system = handle_ != nullptr ? sqlite3_system_errno(handle_) : 0;
  const std::string name = file_.string();
  const std::string directory = file_.parent_path().string();
  switch (primary) {
    case SQLITE_NOTADB:
    case SQLITE_CORRUPT:
      return Error(Errc::corrupt, fmt::format("{}: {} {} is damaged: {}", what, kind_.noun, name, text),
                   kind_.out_of_it(file_), code);
    case SQLITE_FULL:
      return Error(Errc::no_capacity,
                   fmt::format("{}: no space left for the {} in {}", what, kind_.noun, directory),
                   fmt::format("make room: df -h {}\nor keep the {} elsewhere: --state-dir DIR", directory,
                               kind_.noun),
                   code);
    case SQLITE_READONLY:
    case SQLITE_PERM:
    case SQLITE_AUTH:
      return Error(Errc::permission,
                   fmt::format("{}: {} {} cannot be written: {}", what, kind_.noun, name, text),
                   elsewhere(kind_), code);
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
      return Error(Errc::in_use,
                   fmt::format("{}: {} {} is held by another process: {}", what, kind_.noun, name, text),
                   "try again", code);
    case SQLITE_CANTOPEN:
      return Error(system == EACCES || system == EROFS || system == EPERM ? Errc::permission : Errc::io,
                   fmt::format("{}: {} {} cannot be opened: {}", what, kind_.noun, name,
                               system != 0 ? std::strerror(system) : text),
                   elsewhere(kind_), code);
    default:
      break;
  }
  if (primary == SQLITE_IOERR && (system == ENOSPC || system == EDQUOT)) {
    return Error(
        Errc::no_capacity, fmt::format("{}: no space left for the {} in {}", what, kind_.noun, directory),
        fmt::format("make room: df -h {}\nor keep the {} elsewhere: --state-dir DIR", directory, kind_.noun),
        code);
  }
  return Error(
      Errc::io,
      fmt::format("{}: {} {}: {}", what, kind_.noun, name, system != 0 ? std::strerror(system) : text), {},
      code);
}

Status Database::exec(const char* what, const char* sql) const {
  const int code = sqlite3_exec(handle_, sql, nullptr, nullptr, nullptr);
  if (code != SQLITE_OK) return error(what, code);
  return ok_status();
}

Result<std::int64_t> Database::number(const char* what, const char* sql) const {
  Statement statement(handle_, sql);
  const int code = statement.step();
  if (code != SQLITE_ROW) return error(what, code);
  return statement.integer(0);
}

// A COMMIT that failed at its fsync has left a whole transaction in the WAL, which a recovery would take for
// a commit. Only what came before it is brought into the file, and the WAL is emptied.
Status Database::settle() {
  const int code = sqlite3_wal_checkpoint_v2(handle_, nullptr, SQLITE_CHECKPOINT_TRUNCATE, nullptr, nullptr);
  if (code != SQLITE_OK) return error("take back what could not be committed", code);
  doubtful_ = false;
  return ok_status();
}

Status Database::transaction(const char* what, const std::function<Status()>& body) {
  if (doubtful_) BH_CHECK(settle());
  BH_CHECK(exec(what, "BEGIN IMMEDIATE"));
  Status status = body();
  const bool written = status.ok();
  if (written) status = exec(what, "COMMIT");
  if (status.ok()) return status;
  if (sqlite3_get_autocommit(handle_) == 0) sqlite3_exec(handle_, "ROLLBACK", nullptr, nullptr, nullptr);
  if (!written) return status;
  doubtful_ = true;
  if (const Status settled = settle(); !settled.ok()) {
    const Error& why = status.error();
    return Error(why.code(),
                 fmt::format("{}; and it could not be taken back yet ({}): killed now, it may be found done",
                             why.message(), settled.error().message()),
                 why.hint(), why.native());
  }
  return status;
}

Status Database::migrate(std::int64_t from) {
  for (auto version = static_cast<std::size_t>(from); version < kind_.migrations.size(); ++version) {
    BH_CHECK(transaction("migrate", [&]() -> Status {
      BH_CHECK(exec("migrate", kind_.migrations[version]));
      return exec("migrate", fmt::format("PRAGMA user_version = {}", version + 1).c_str());
    }));
  }
  return ok_status();
}

// A new database appears whole or not at all: made under another name, closed, synced, then renamed. So an
// empty file is damage, never a beginning.
Status Database::create(const Kind& kind, const fs::path& file) {
  const fs::path fresh = fmt::format("{}.{}.new", file.string(), ::getpid());
  const auto remove_fresh = [&] {
    for (const char* tail : {"", "-wal", "-shm", "-journal"}) ::unlink((fresh.string() + tail).c_str());
  };
  remove_fresh();
  {
    Database database(kind, fresh);
    const auto build = [&]() -> Status {
      const int code =
          open_handle(fresh, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, false, &database.handle_);
      if (code != SQLITE_OK) return database.error("create", code);
      BH_CHECK(
          database.exec("create", fmt::format("PRAGMA application_id = {}", kind.application_id).c_str()));
      BH_CHECK(database.exec("create", "PRAGMA synchronous = FULL"));
      BH_CHECK(database.migrate(0));
      return database.exec("create", "PRAGMA journal_mode = WAL");
    };
    if (Status status = build(); !status.ok()) {
      remove_fresh();
      return status;
    }
  }
  // link, not rename: two first runs at once must not replace each other's.
  ::chmod(fresh.c_str(), 0600);
  const int linked = ::link(fresh.c_str(), file.c_str()) == 0 ? 0 : errno;
  remove_fresh();
  if (linked != 0 && linked != EEXIST) return errno_error("create " + file.string(), linked);
  const UniqueFd directory(::open(file.parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory) ::fsync(directory.get());
  return ok_status();
}

Result<std::unique_ptr<Database>> Database::open(const Kind& kind, const fs::path& file, bool write) {
  const fs::path directory = file.parent_path();
  const auto newest = static_cast<std::int64_t>(kind.migrations.size());
  const std::string hint = elsewhere(kind);
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
    if (errno != ENOENT)
      return errno_error(fmt::format("open {} {}", kind.noun, file.string()), errno).with_hint(hint);
    if (!write)
      return Error(Errc::not_found,
                   fmt::format("no {} in {}: {}", kind.noun, directory.string(), kind.missing));
    sweep(file);
    BH_CHECK(create(kind, file));
  } else if (!S_ISREG(info.st_mode)) {
    return Error(Errc::corrupt, fmt::format("open: {} {} is no regular file", kind.noun, file.string()),
                 kind.out_of_it(file));
  } else if (info.st_size == 0) {
    return Error(Errc::corrupt, fmt::format("open: {} {} is empty: it was cut off", kind.noun, file.string()),
                 kind.out_of_it(file));
  }

  std::unique_ptr<Database> opened(new Database(kind, file));
  Database& database = *opened;
  int code =
      open_handle(file, write ? SQLITE_OPEN_READWRITE : SQLITE_OPEN_READONLY, false, &database.handle_);
  // Until it has proved sound, closing must not fold the WAL into it nor remove the WAL.
  if (code == SQLITE_OK) sqlite3_db_config(database.handle_, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, nullptr);
  auto id = code == SQLITE_OK ? database.number("open", "PRAGMA application_id")
                              : Result<std::int64_t>(database.error("open", code));
  const bool no_shm =
      !id.ok() && !write &&
      ((id.error().native() & 0xff) == SQLITE_CANTOPEN || (id.error().native() & 0xff) == SQLITE_READONLY);
  if (no_shm && !fs::exists(file.string() + "-wal")) {
    // A reader who may not write the directory cannot make the -shm file; with no WAL the file alone is the
    // truth.
    sqlite3_close_v2(database.handle_);
    database.handle_ = nullptr;
    code = open_handle(file, SQLITE_OPEN_READONLY, true, &database.handle_);
    id = code == SQLITE_OK ? database.number("open", "PRAGMA application_id")
                           : Result<std::int64_t>(database.error("open", code));
  }
  BH_TRY(const std::int64_t application, std::move(id));
  BH_TRY(const std::int64_t version, database.number("open", "PRAGMA user_version"));
  if (application != kind.application_id) {
    return Error(Errc::corrupt, fmt::format("open: {} is a database of another program", file.string()),
                 kind.out_of_it(file));
  }
  if (version > newest || version < 0) {
    return Error(
        Errc::unsupported,
        fmt::format("open: {} {} was written by a newer bulkhead: its schema is {}, this one knows {}",
                    kind.noun, file.string(), version, newest),
        fmt::format("use the newer bulkhead; the {} is left as it is", kind.noun));
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
                   fmt::format("open: {} {} is damaged: {} bytes instead of {}", kind.noun, file.string(),
                               info.st_size, pages * page),
                   kind.out_of_it(file));
    }
  }
  {
    Statement check(database.handle_, "PRAGMA quick_check(1)");
    const int row = check.step();
    if (row != SQLITE_ROW) return database.error("open", row);
    if (const std::string said = check.text(0); said != "ok") {
      return Error(Errc::corrupt,
                   fmt::format("open: {} {} is damaged: {}", kind.noun, file.string(), printable(said)),
                   kind.out_of_it(file));
    }
  }
  if (write) {
    BH_CHECK(database.exec("open", "PRAGMA synchronous = FULL; PRAGMA foreign_keys = OFF"));
    // References are held only afterwards: a migration may drop a table that others refer to and make it
    // anew.
    BH_CHECK(database.migrate(version));
    BH_CHECK(database.exec("open", "PRAGMA foreign_keys = ON"));
    Statement mode(database.handle_, "PRAGMA journal_mode = WAL");
    if (const int row = mode.step(); row != SQLITE_ROW) return database.error("open", row);
    sqlite3_db_config(database.handle_, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0, nullptr);
  } else if (version < newest) {
    return Error(Errc::unsupported,
                 fmt::format("open: {} {} has the older schema {}", kind.noun, file.string(), version),
                 std::string(kind.migrate_by));
  }
  return opened;
}

}  // namespace bulkhead::sqlite
