// NVIDIA's resource manager through a tenant's own open driver file: RM checks the file a call comes through,
// not the caller, so a file borrowed with pidfd_getfd speaks for the tenant (H100, driver 580.159.04:
// measured; docs/design/sharing.md). Thin calls, no choices.
#pragma once

#include <cstdint>
#include <span>

#include "base/fd.hpp"
#include "base/result.hpp"

namespace bulkhead::rm {

class DriverFile {
 public:
  // The file behind descriptor `fd` of the process that `pidfd` names. Needs PTRACE_MODE_ATTACH rights on it:
  // root, CAP_SYS_PTRACE, or a child of one's own. Errc::permission says so. Errc::gone: no such process.
  static Result<DriverFile> borrow(int pidfd, int fd);
  explicit DriverFile(UniqueFd file) : file_(std::move(file)) {}

  // An ioctl as the tenant would make it. 0 or -errno; RM's own status is inside `argument`.
  int perform(unsigned long request, void* argument) const;
  // NV_ESC_RM_CONTROL. `params` is read and written. Error's native() is RM's status.
  Status control(std::uint32_t client, std::uint32_t object, std::uint32_t command,
                 std::span<std::byte> params) const;

  // Microseconds of a channel group's slice. Takes effect at once once its channels were scheduled; set
  // before that the driver accepts it and forgets it.
  Result<std::uint64_t> timeslice_us(std::uint32_t client, std::uint32_t group) const;
  Status set_timeslice_us(std::uint32_t client, std::uint32_t group, std::uint64_t us) const;
  // Takes the channels off the GPU, or lets them on again. Disables nest. Any number of channels (64 a call).
  Status set_channels(std::uint32_t client, std::uint32_t subdevice, std::span<const std::uint32_t> channels,
                      bool on) const;
  int fd() const { return file_.get(); }

 private:
  UniqueFd file_;
};

}  // namespace bulkhead::rm
