// Processes that hold a GPU: who they are, and ending them. A process is (pid, start time): a pid alone may
// be somebody else by the time it is used.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "base/result.hpp"
#include "core/inventory/inventory.hpp"

namespace bulkhead::process {

struct Identity {
  int pid = 0;
  std::uint64_t start_time = 0;  // clock ticks since boot, field 22 of /proc/PID/stat
  std::string name = {};         // comm, made printable
  std::string cgroup = {};       // v2 path; empty when the host has none
};

// Reads ROOT/proc/PID. Errc::not_found: no such process there.
Result<Identity> look(const std::filesystem::path& root, int pid);

// Ends the holder: SIGTERM, up to `grace_ms`, then SIGKILL, up to a second more. A pidfd pins the process and
// its start time is compared after it was opened, so a reused pid is never hit. A process that is gone
// already is success. Errc::conflict: the pid belongs to another process now. Errc::unsupported: below a root
// that is not this machine's, the pid is nobody here.
Status terminate(const std::filesystem::path& root, const inventory::Holder& holder, unsigned grace_ms);

}  // namespace bulkhead::process
