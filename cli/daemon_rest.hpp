// While a verb does what the driver allows only on a GPU that nobody has open, the daemon of this host is
// asked to keep its hands off. A process of its own asks again and again as long as this one lives, so that a
// verb that was killed leaves nothing behind, and no thread is there when the executor forks.
#pragma once

#include <memory>

#include <sys/types.h>

#include "base/fd.hpp"
#include "base/result.hpp"
#include "cli/cli.hpp"

namespace bulkhead::cli {

class DaemonRest {
 public:
  static bool somebody(const Context& context);  // a socket is where the daemon's would be
  // When it returns the daemon has let go. nullptr: no daemon serves this host, or it samples nothing. An
  // Error: there is one, and it did not; nothing is to be touched then.
  static Result<std::unique_ptr<DaemonRest>> begin(const Context& context);
  ~DaemonRest();  // the daemon goes on; waits at most two seconds for it to know
  DaemonRest(const DaemonRest&) = delete;
  DaemonRest& operator=(const DaemonRest&) = delete;

 private:
  DaemonRest(pid_t child, UniqueFd alive) : child_(child), alive_(std::move(alive)) {}
  pid_t child_;
  UniqueFd alive_;  // closed by the kernel when this process ends, however that is
};

}  // namespace bulkhead::cli
