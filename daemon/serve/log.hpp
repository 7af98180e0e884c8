// Lines for people and journals on stderr: logfmt, printable, bounded, never a secret. A thread writes them,
// so that a journal that hangs holds nobody.
#pragma once

#include <functional>
#include <mutex>
#include <string>
#include <string_view>

#include "daemon/serve/bucket.hpp"
#include "daemon/serve/threads.hpp"

namespace bulkhead::serve {

class Log {
 public:
  Log();
  ~Log();                                                             // writes what waits, for a second
  enum class Level { error = 3, warning = 4, notice = 5, info = 6 };  // of syslog(3)
  void say(Level level, std::string line);
  // One of many: at most a hundred a second are made and written, the rest counted and the count said.
  void often(const std::function<std::string()>& line);

 private:
  bool journal_ = false;
  std::mutex mutex_ = {};
  Buckets buckets_;
  std::uint64_t left_out_ = 0;
  Worker worker_;
};

// A value of logfmt: in quotes where it must be, at most `most` bytes; a bearer token becomes bh_...
std::string value(std::string_view text, std::size_t most = 200);

}  // namespace bulkhead::serve
