// The kernel's seccomp listener: a filter that stops a program at the few system calls that take the driver's
// objects and memory, until a supervisor answers. Thin: it installs, receives and answers; it never chooses.
//
// What stops: the driver's allocations, frees, controls and duplicates (by number and size, whatever the rest
// of the request says: the driver looks at nothing else), its indirect call that could hide one of them, and
// shared mappings of files (managed memory is one). What is refused at once: the same calls in the ABI of
// another architecture (i386, x32), which the driver would take just as well. Everything else runs at full
// speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/fd.hpp"
#include "base/result.hpp"

namespace bulkhead::seccomp {

// ---- in the child, between fork and exec: async-signal-safe, no allocation

struct Installed {
  int listener = -1;  // close-on-exec
  int error =
      0;  // errno when listener < 0. ENOSYS, EINVAL: no such kernel; EBUSY: a supervisor is there already
  bool no_new_privileges =
      false;  // had to be set, for want of CAP_SYS_ADMIN: set-user-id programs gain nothing then
};
// Filters the calling thread and all its children, for good.
Installed install() noexcept;
// One descriptor over a Unix socket. 0 or -errno; the descriptor (close-on-exec) or -errno.
int send_fd(int socket, int fd) noexcept;
int recv_fd(int socket) noexcept;

// ---- in the supervisor

struct Call {             // seccomp_notif, so that the kernel writes right into it
  std::uint64_t id = 0;   // of the notification
  std::uint32_t tid = 0;  // of the thread that waits; 0: it is in no pid namespace of ours
  std::uint32_t flags = 0;
  std::int32_t number = 0;  // of the system call: compare with SYS_ioctl, SYS_mmap
  std::uint32_t arch = 0;   // never 0 in a call that was received
  std::uint64_t ip = 0;
  std::uint64_t args[6] = {};
};
static_assert(sizeof(Call) == 80);

class Listener {
 public:
  explicit Listener(UniqueFd fd);
  int fd() const { return fd_.get(); }  // readable when a call waits

  // Errc::gone: nobody is under the filter any more. Errc::not_found: the caller was killed meanwhile, or
  // nothing waits. `into` must be all zeroes. In memory that outlives this process it makes the call outlive
  // it as well: the kernel writes it there before it can notice a kill.
  Status receive(Call& into) const;
  Result<Call> receive() const;
  bool alive(std::uint64_t id) const;  // the call still waits: what was read of its thread since was its own
  // Each answers a call once. Errc::gone: its thread is no more.
  Status let_through(std::uint64_t id) const;
  Status answer(std::uint64_t id, std::int64_t value) const;
  Status refuse(std::uint64_t id, int error) const;  // errno, positive

 private:
  Status send(std::uint64_t id, std::int64_t value, int error, std::uint32_t flags) const;
  UniqueFd fd_;
};

// Memory of another process, whole or not at all. Errc::gone: no such process. Errc::io: no such address
// (EFAULT).
Status read_memory(int tid, std::uint64_t address, std::span<std::byte> into);
Status write_memory(int tid, std::uint64_t address, std::span<const std::byte> from);

}  // namespace bulkhead::seccomp
