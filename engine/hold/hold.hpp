// Holds one tenant from outside: every call of its processes that takes driver objects, device memory or
// managed memory stops at a seccomp listener, is counted against the cap, and is then made on the tenant's
// behalf, let through, or answered as the driver would answer when memory is out. Unmodified, static and
// forked programs alike; launches make no such calls and cost nothing. The same calls name the tenant's
// channel groups, so that time is held without guessing handles. What a hostile tenant can still do, and what
// catches it: docs/design/sharing.md.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/fd.hpp"
#include "base/result.hpp"
#include "guard/wire/wire.hpp"

namespace bulkhead::rm {
class DriverFile;
}

namespace bulkhead::hold {

struct Group {  // a compute channel group (engine 1) of the tenant
  int pid = 0;
  std::uint64_t start_time = 0;  // with pid: the process
  std::uint32_t gpu = 0;         // RM device instance
  std::uint32_t client = 0, subdevice = 0, handle = 0;
  std::vector<std::uint32_t> channels = {};
  std::uint64_t born_ns = 0;  // monotonic
  int fd = -1;                // the process's own descriptor of the driver file, for whoever must take over
};

struct Process {
  int pid = 0;
  std::uint64_t start_time = 0;
};

// What an arbiter leaves to the one after it: the ledger, and the call it was in the middle of. A sealed
// memfd, mapped shared; whoever outlives the arbiter keeps the descriptor beside the listener's. One for each
// tenant, used by one arbiter at a time. Sparse: a tenant with a few thousand objects uses some hundred KiB.
Result<UniqueFd> make_inflight();
Result<void*> map_inflight(int fd);

struct Settings {
  std::filesystem::path root = "/";  // where /dev/nvidiactl is: a twin's root, or /
  bool memory = true;                // false: count, but refuse nothing
  void* inflight = nullptr;          // of map_inflight; null: nothing outlives this process
};

class Hold {
 public:
  // `listener`: the seccomp listener of the tenant's first process (edge/seccomp). `page`: outlives the hold;
  // caps are read from it, `outside` is written to it. A listener inherited from an arbiter that died is
  // fine: what it left half-done is finished first.
  static Result<std::unique_ptr<Hold>> make(UniqueFd listener, guard::Page& page, Settings settings);
  ~Hold();

  // Poll for input on these; pump() never blocks.
  int listener() const;
  int processes_fd() const;  // readable when a process of the tenant ended
  // Handles everything pending. Errc::gone once the tenant has no process left.
  Status pump();

  std::span<const Group> groups() const;
  std::uint64_t generation() const;  // counts changes of groups()
  std::span<const Process> processes() const;
  std::uint64_t used(std::uint32_t gpu) const;  // bytes charged, managed ones included
  std::uint64_t managed(std::uint32_t gpu) const;
  std::uint64_t refused() const;   // calls that met the cap
  std::uint64_t escapes() const;   // things seen that should not be: a legacy call, an unknown object's bytes
  std::uint64_t self_set() const;  // times the tenant tried to set its own slice, or to leave its turn

  // Through the tenant's own driver file. Errc::gone: the group or its process is no more.
  Result<std::uint64_t> slice_us(const Group& group);
  Status set_slice_us(const Group& group, std::uint64_t us);
  // Disables nest in the driver: callers pair them; force_on undoes any number.
  Status set_on(const Group& group, bool on);
  Status force_on(const Group& group);
  // Bytes the audit found beyond the ledger (imports from other tenants, say): they count against the cap.
  void charge_beyond(std::uint32_t gpu, std::uint64_t bytes);
  // Looks again at what no call announces: unmapped managed memory, driver files that were closed, descriptors
  // that held what an ended process exported. pump() does it before it refuses anything and when a process ends; call it with each audit.
  void reconcile();

 private:
  struct Inside;
  rm::DriverFile* file_of(const Group& group);
  explicit Hold(std::unique_ptr<Inside> inside);
  std::unique_ptr<Inside> inside_;
};

}  // namespace bulkhead::hold
