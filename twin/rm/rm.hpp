// The simulated driver's resource manager and the GPU's scheduler below it, for every process of a twin at once: one
// mapped file, TWIN/rm.bin, that holds open driver files, clients, objects, memory, channel groups and what each GPU
// runs. Speaks abi/rm, as /dev/nvidiactl does.
//
// Whoever calls in does the work: frees what dead processes left, and moves each GPU's time up to now. Every change is
// written to an undo journal first, under a lock that the kernel releases with its holder, so that a process killed at
// any instruction leaves the state before or after one small step.
//
// An open driver file is an open file description of TWIN/root/dev/nvidiactl: its number is its file offset, and it
// lives as long as the lock it holds on the byte of that number. Both follow dup, fork and pidfd_getfd, so that a
// borrowed descriptor speaks for whoever opened it, as with the real driver.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>

#include "base/result.hpp"

namespace bulkhead::twin::rm {

// How an H100 switches (measured: two tenants of back-to-back products get within a tenth of what this model gives
// them, at slices of 200 us to 20 ms; three at 50 us get nothing, as here). A group that ran out of work costs no
// switch.
inline constexpr std::uint64_t switch_ns = 200'000;    // from one busy group to another
inline constexpr std::uint64_t take_off_ns = 400'000;  // preempting a running group that is disabled
// A slice shorter than a switch loses what it is short of one: 100 us and less among several busy groups run nothing.
constexpr std::uint64_t useful_ns(std::uint64_t slice_ns) {
  if (slice_ns >= switch_ns) return slice_ns;
  return slice_ns * 2 > switch_ns ? slice_ns * 2 - switch_ns : 0;
}
inline constexpr std::uint64_t slice_at_creation_us = 1024, slice_when_scheduled_us = 2048;
inline constexpr std::uint64_t memory_granularity = 2ULL << 20;  // of device memory

inline constexpr std::size_t queue_depth = 1024;  // jobs of one group that have not finished, as of a real channel

// What abi/rm leaves out, being of no use outside the twin: ctrl0000unix.h of the open kernel modules.
struct ImportObjects {  // of abi::cmd_import_objects_from_fd
  std::int32_t fd;
  std::uint32_t parent;        // the device
  std::uint32_t objects[128];  // handles to give; 0: RM chooses and says which
  std::uint8_t types[128];     // out; 1: device memory
  std::uint16_t count, index;  // how many of the exported ones, from which on
};
static_assert(sizeof(ImportObjects) == 652);
inline constexpr std::uint32_t cmd_get_export_info = 0x3d08;
struct ExportInfo {
  std::int32_t fd;
  std::uint32_t device;
  std::uint16_t max_objects;
  std::uint8_t metadata[64];
  std::uint16_t pad;
  std::uint32_t gpu_instance;
};
static_assert(sizeof(ExportInfo) == 80);

// A channel group by the handles that RM_ALLOC gave: unique on the host through the client.
struct GroupName {
  std::uint32_t client = 0, group = 0;
};

// How far a group is. Times are the GPU's: CLOCK_MONOTONIC of the host, or the twin's stepped clock (State::now_ns).
struct Progress {
  std::uint64_t now_ns = 0;
  std::uint64_t submitted = 0, completed = 0;  // jobs ever; ticket t has finished when completed >= t
  std::uint64_t busy_ns = 0;                   // GPU time ever spent on its jobs
  std::uint64_t last_done_ns = 0;              // when the job of ticket `completed` finished
  bool on = false;                             // scheduled and not disabled
  bool stepped = false;                        // time moves by `twin step` only: sleeping brings nothing nearer
};

class Driver {
 public:
  // `twin` is the twin's directory. Makes rm.bin when there is none.
  static Result<std::unique_ptr<Driver>> open(const std::filesystem::path& twin);
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // What ioctl(2) on /dev/nvidiactl answers: 0 or -errno; RM's own status is inside `arg`. `fd` must be an open
  // TWIN/root/dev/nvidiactl of any process. -ENOTTY: not a request of abi/rm.
  int ioctl_on(int fd, unsigned long request, void* arg);

  // ---- for libcuda: what channels and their doorbells are to the real one. No RM call, nothing a filter sees.
  // Puts a job of `duration_ns` of GPU time behind the group's others; the ticket counts from 1 in each group.
  // Errc::in_use: queue_depth jobs wait already. Errc::not_found: no such group any more.
  Result<std::uint64_t> submit(GroupName name, std::uint64_t duration_ns);
  Result<Progress> progress(GroupName name);
  // When a job finished; for the last queue_depth finished jobs. Errc::in_use: it has not. Errc::gone: too long ago.
  Result<std::uint64_t> finished_at_ns(GroupName name, std::uint64_t ticket);
  // The least GPU time from now until `ticket` can have finished, 0 when it has: how long a caller may sleep before it
  // looks again (others may make it later, nothing makes it earlier but others leaving the GPU).
  Result<std::uint64_t> at_least_ns(GroupName name, std::uint64_t ticket);

  // Brings everything up to now: frees what dead processes held, moves the GPUs' time, writes each process's bytes and
  // share of the GPU into the twin's state. For whoever only looks (NVML, `twin step`).
  Status follow();

 private:
  Driver() = default;
  struct Open;
  std::unique_ptr<Open> open_;
};

}  // namespace bulkhead::twin::rm
