// The disposable process that does what Hands can. A call of the driver cannot be interrupted, and a thread
// that hangs in one cannot be ended; a process can be killed, and when even that fails (it sleeps in the
// kernel) it is left behind still holding the lock, so that nobody works beside it.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>

#include "base/fd.hpp"
#include "base/json.hpp"
#include "base/result.hpp"
#include "core/plan/plan.hpp"
#include "edge/store/store.hpp"
#include "engine/execute/hands.hpp"

namespace bulkhead::execute {

class Worker {
 public:
  // `lock_fd` stays open in the worker: a hung one keeps the lock. Nothing is started before the first call.
  Worker(observe::Access access, const store::Lock& lock) : access_(std::move(access)), lock_(lock) {}
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  Result<Json> prepare(const plan::Action& action, unsigned deadline_ms);
  // Acts and reads back. `failed` is the act's error; the sight is read in any case, by a new worker when the
  // first hung or died.
  struct Done {
    std::optional<Error> failed = {};
    std::optional<Sight> sight = {};
    std::string blind = {};  // why there is no sight
  };
  Done act(const plan::Action& action, const Json& detail, unsigned deadline_ms);
  Result<Sight> inspect(const plan::Action& action, const Json& detail, unsigned deadline_ms);
  Status evict(const inventory::Holder& holder, unsigned grace_ms);

  std::uint64_t driver_calls() const { return calls_ + calls_now_; }

 private:
  Status start();
  void end();
  // A worker that answers within the deadline; Errc::timeout names what hangs.
  Result<Json> ask(const Json& request, const std::string& what, unsigned deadline_ms);

  observe::Access access_;
  const store::Lock& lock_;
  pid_t pid_ = 0;
  pid_t abandoned_ = 0;  // sleeps in the kernel and cannot be killed
  UniqueFd socket_;
  std::uint64_t calls_ = 0, calls_now_ = 0;
};

}  // namespace bulkhead::execute
