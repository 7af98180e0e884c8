// What the benches of durable things share: the floor, and times.
#pragma once

#include <sqlite3.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

namespace bulkhead::bench {

// The floor: one row, one transaction, one fsync.
class Bare {
 public:
  explicit Bare(const std::filesystem::path& file) {
    if (sqlite3_open(file.c_str(), &db_) != SQLITE_OK ||
        sqlite3_exec(db_,
                     "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 4096;"
                     "CREATE TABLE t (id INTEGER PRIMARY KEY, body TEXT NOT NULL) STRICT",
                     nullptr, nullptr, nullptr) != SQLITE_OK ||
        sqlite3_prepare_v2(db_, "INSERT INTO t (body) VALUES (?)", -1, &insert_, nullptr) != SQLITE_OK)
      stop();
  }
  ~Bare() {
    sqlite3_finalize(insert_);
    sqlite3_close(db_);
  }
  Bare(const Bare&) = delete;
  Bare& operator=(const Bare&) = delete;
  void put(const std::string& body) {
    sqlite3_bind_text(insert_, 1, body.data(), static_cast<int>(body.size()), SQLITE_STATIC);
    if (sqlite3_step(insert_) != SQLITE_DONE) stop();
    sqlite3_reset(insert_);
  }

 private:
  [[noreturn]] void stop() const {
    std::fprintf(stderr, "the bare transaction: %s\n", sqlite3_errmsg(db_));
    std::exit(2);
  }
  sqlite3* db_ = nullptr;
  sqlite3_stmt* insert_ = nullptr;
};

struct Times {
  std::vector<double> us = {};
  double at(double part) {
    std::sort(us.begin(), us.end());
    return us[std::min(us.size() - 1, static_cast<std::size_t>(part * static_cast<double>(us.size())))];
  }
  double sum() const {
    double all = 0;
    for (const double one : us) all += one;
    return all;
  }
};

}  // namespace bulkhead::bench
