// A SQLite database that must not be lost: made whole or not at all, checked before it is believed, WAL and
// synchronous=FULL. A thin wrapper of the library, and the one edge that other edges use. A file that is
// damaged, foreign or newer is refused and left as it is.
#pragma once

#include <sqlite3.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "base/result.hpp"

namespace bulkhead::sqlite {

// What a file is, and how errors speak of it.
struct Kind {
  std::int64_t application_id = 0;
  // One entry a schema version: migrations[n] turns version n into n + 1. Never edit an entry that was
  // released.
  std::span<const char* const> migrations = {};
  std::string_view noun = {};        // "journal"
  std::string_view missing = {};     // "bulkhead has changed nothing here"
  std::string_view migrate_by = {};  // "a verb that writes migrates it: ..."
  std::string (*out_of_it)(const std::filesystem::path& file) = nullptr;  // the way on when it is damaged
};

// A prepared statement: bind left to right, then step. reset() to use it again.
class Statement {
 public:
  Statement(const Statement&) = delete;
  Statement& operator=(const Statement&) = delete;
  Statement(sqlite3* database, const char* sql, bool keep = false) {
    code_ = sqlite3_prepare_v3(database, sql, -1, keep ? SQLITE_PREPARE_PERSISTENT : 0, &handle_, nullptr);
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
  Statement& bind_bytes(std::span<const std::uint8_t> bytes) {
    return check(sqlite3_bind_blob64(handle_, ++at_, bytes.data(), bytes.size(), SQLITE_TRANSIENT));
  }
  // SQLITE_ROW, SQLITE_DONE or the error.
  int step() { return code_ != SQLITE_OK ? code_ : sqlite3_step(handle_); }
  Statement& reset() {
    sqlite3_reset(handle_);
    at_ = 0;
    if (handle_ != nullptr) code_ = SQLITE_OK;
    return *this;
  }

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
  std::span<const std::uint8_t> bytes(int column) const {  // until the next step or reset
    const auto* data = static_cast<const std::uint8_t*>(sqlite3_column_blob(handle_, column));
    return {data, data == nullptr ? 0 : static_cast<std::size_t>(sqlite3_column_bytes(handle_, column))};
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

class Database {
 public:
  // `write`: creates and migrates. Reading a missing database is Errc::not_found.
  static Result<std::unique_ptr<Database>> open(const Kind& kind, const std::filesystem::path& file,
                                                bool write);
  ~Database() { sqlite3_close_v2(handle_); }
  Database(const Database&) = delete;
  Database& operator=(const Database&) = delete;

  sqlite3* handle() const { return handle_; }
  const std::filesystem::path& file() const { return file_; }

  Error error(std::string_view what, int code) const;
  Status exec(const char* what, const char* sql) const;
  Result<std::int64_t> number(const char* what, const char* sql) const;
  // BEGIN IMMEDIATE, the body, COMMIT; or ROLLBACK. Durable when it returns. After a failed fsync of the
  // COMMIT the kernel may yet bring to disk what was taken back: it is wiped out of the WAL at once, or else
  // before the next transaction; killed between, it may be found done after all (the message says so).
  Status transaction(const char* what, const std::function<Status()>& body);

 private:
  Database(const Kind& kind, std::filesystem::path file) : kind_(kind), file_(std::move(file)) {}
  static Status create(const Kind& kind, const std::filesystem::path& file);
  Status migrate(std::int64_t from);
  Status settle();
  Kind kind_;
  std::filesystem::path file_;
  sqlite3* handle_ = nullptr;
  bool doubtful_ = false;  // the WAL ends with a transaction that was taken back
};

}  // namespace bulkhead::sqlite
