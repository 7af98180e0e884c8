// The systemd journal, followed for one unit: what the unit's own processes say and what systemd says of it.
// Which records those are is told by fields that journald fills itself (names with an underscore,
// systemd.journal-fields(7)): a user's `logger -t nvidia-fabricmanager` is not among them. libsystemd is
// dlopen'ed, so a host without it is `unavailable`, not a crash.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/result.hpp"

namespace bulkhead::journal {

inline constexpr std::size_t most_records = 1'000, most_message = 8'192;

struct Record {
  std::string message = {};      // one line, as it was said
  std::string program = {};      // "systemd", or the name of the unit's process
  std::int64_t realtime_us = 0;  // since 1970, when journald took it
};

// Of one thread; not to be used after fork().
class Reader {
 public:
  // The records of this boot, `boot` as in /proc/sys/kernel/random/boot_id. Those behind `cursor`, or all
  // where it is empty or no longer there. With `root` "/" the journal of the system, else the files below
  // ROOT/var/log/journal or ROOT/run/log/journal. `not_found`: there is no journal there.
  static Result<std::unique_ptr<Reader>> open(const std::filesystem::path& root, const std::string& unit,
                                              const std::string& boot, const std::string& cursor);
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // What is there now, `most_records` at most; never waits. Costs a system call while nothing is written.
  Result<std::vector<Record>> read();
  const std::string& cursor() const { return cursor_; }  // of the newest record that was read

 private:
  struct Library;
  Reader();
  Error error(const char* what, int code) const;

  std::unique_ptr<Library> library_;
  std::string cursor_ = {};
  std::uint64_t looked_ns_ = 0;
  bool more_ = true;
};

}  // namespace bulkhead::journal
