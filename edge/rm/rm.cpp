#include "edge/rm/rm.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "abi/rm/rm.hpp"

namespace bulkhead::rm {

namespace {

Error status_error(std::uint32_t command, std::uint32_t status) {
  Errc code = Errc::io;
  switch (status) {
    case abi::err_insufficient_permissions:
      code = Errc::permission;
      break;
    case abi::err_not_supported:
      code = Errc::unsupported;
      break;
    case abi::err_object_not_found:
    case abi::err_invalid_object_handle:
    case abi::err_invalid_client:
      code = Errc::gone;
      break;
    default:
      break;
  }
  return Error(code, fmt::format("driver control {:#x}: RM status {:#x}", command, status), {},
               static_cast<int>(status));
}

}  // namespace

Result<DriverFile> DriverFile::borrow(int pidfd, int fd) {
  const long got = ::syscall(SYS_pidfd_getfd, pidfd, fd, 0);
  if (got >= 0) return DriverFile(UniqueFd(static_cast<int>(got)));
  const int err = errno;
  if (err == ESRCH || err == EBADF)
    return Error(Errc::gone, fmt::format("borrow driver file {}: the process or its file is gone", fd), {},
                 err);
  auto error = errno_error(fmt::format("borrow driver file {}", fd), err);
  if (err == EPERM) return std::move(error).with_hint("run as root, or with CAP_SYS_PTRACE");
  return error;
}

int DriverFile::perform(unsigned long request, void* argument) const {
  for (;;) {
    if (const int rc = ::ioctl(file_.get(), request, argument); rc >= 0) return rc;
    if (errno != EINTR && errno != EAGAIN) return -errno;
  }
}

Status DriverFile::control(std::uint32_t client, std::uint32_t object, std::uint32_t command,
                           std::span<std::byte> params) const {
  abi::Control call{};
  call.client = client;
  call.object = object;
  call.command = command;
  call.params = reinterpret_cast<std::uint64_t>(params.data());
  call.params_size = static_cast<std::uint32_t>(params.size());
  if (const int rc = perform(abi::request(abi::esc_control, sizeof call), &call); rc < 0)
    return errno_error(fmt::format("driver control {:#x}", command), -rc);
  if (call.status != abi::ok) return status_error(command, call.status);
  return ok_status();
}

Result<std::uint64_t> DriverFile::timeslice_us(std::uint32_t client, std::uint32_t group) const {
  std::uint64_t us = 0;
  BH_CHECK(control(client, group, abi::cmd_group_get_timeslice, std::as_writable_bytes(std::span(&us, 1))));
  return us;
}

Status DriverFile::set_timeslice_us(std::uint32_t client, std::uint32_t group, std::uint64_t us) const {
  return control(client, group, abi::cmd_group_set_timeslice, std::as_writable_bytes(std::span(&us, 1)));
}

Status DriverFile::set_channels(std::uint32_t client, std::uint32_t subdevice,
                                std::span<const std::uint32_t> channels, bool on) const {
  constexpr std::size_t most = std::size(abi::DisableChannels{}.channels);
  while (!channels.empty()) {
    abi::DisableChannels call{};
    const auto now = channels.first(std::min(most, channels.size()));
    call.disable = on ? 0 : 1;
    call.count = static_cast<std::uint32_t>(now.size());
    std::fill_n(call.clients, now.size(), client);
    std::copy(now.begin(), now.end(), call.channels);
    BH_CHECK(
        control(client, subdevice, abi::cmd_disable_channels, std::as_writable_bytes(std::span(&call, 1))));
    channels = channels.subspan(now.size());
  }
  return ok_status();
}

}  // namespace bulkhead::rm
