// Processes that hold a GPU: who they are, and ending them. A process is (pid, start time): a pid alone may
// be somebody else by the time it is used.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "base/clock.hpp"
#include "base/result.hpp"
#include "core/inventory/inventory.hpp"

namespace bulkhead::process {

struct Identity {
  int pid = 0;
  std::uint64_t start_time = 0;  // clock ticks since boot, field 22 of /proc/PID/stat
  int parent = 0;                // field 4
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

// As terminate, of many at once: one grace for all. One answer each, in order.
std::vector<Status> terminate_all(const std::filesystem::path& root,
                                  std::span<const inventory::Holder> holders, unsigned grace_ms);

// Who has a file open or mapped.
struct Opener {
  Identity who = {};
  unsigned uid = 0;                     // effective
  bool here = false;                    // in the pid namespace of the caller: not in a container of its own
  bool same_program = false;            // runs the caller's own program file
  std::vector<std::size_t> files = {};  // of those asked for, by place
};
// Every process of this machine that has one of `files` open, through any thread (each may have a table of
// its own), or mapped: a mapping outlives its closed descriptor. A device node counts by its device number,
// so a container's own node is seen; another file by its inode. Files that are not there are nobody's. Not
// seen: a descriptor under way in a Unix socket. The caller itself is left out, and kernel threads are.
// Errc::permission: some process may not be looked into (it takes CAP_SYS_PTRACE, and CAP_SYS_ADMIN for
// mappings).
struct Openers {
  std::vector<Opener> who = {};
  // Every process and thread there was at one moment has been looked into. False: they came up faster than
  // they could be, and one that hands a descriptor on to child after child may have slipped through.
  bool all = false;
};
Result<Openers> openers(std::span<const std::filesystem::path> files);

// Stops them (SIGSTOP), so that they make no more of themselves; those that have ended meanwhile are fine.
void freeze(std::span<const inventory::Holder> holders);

// Stops (or continues) every process of a user at once: kill(-1) leaves no gap in which one could hand on to
// a child. Not for root.
Status freeze_user(unsigned uid, bool stop);

// When it was started, by the wall clock.
Result<WallTime> started(const Identity& who);

}  // namespace bulkhead::process
