#include "engine/hold/exported.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/kcmp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <string_view>

#include "abi/rm/rm.hpp"
#include "base/text.hpp"

namespace bulkhead::hold {

namespace {

// A descriptor that is handed on while processes are looked at one after the other can be missed once.
constexpr int looks = 3;
constexpr std::size_t fdinfo_bytes = 16384;
constexpr std::uint32_t cmd_get_export_info = 0x3d08;
constexpr std::uint32_t err_invalid_parameter = 0x3b;  // the driver: nothing was exported to this file
struct ExportInfo {  // NV0000_CTRL_OS_UNIX_GET_EXPORT_OBJECT_INFO_PARAMS
  std::int32_t fd;
  std::byte answer[76];
};

std::string link_of(int tid, int fd) {
  char target[64] = {};
  const auto size = ::readlink(fmt::format("/proc/{}/fd/{}", tid, fd).c_str(), target, sizeof target - 1);
  return size > 0 ? std::string(target, static_cast<std::size_t>(size)) : std::string();
}

// The number of descriptors that wait in a socket; nothing: the kernel does not say, or it is no unix socket.
std::optional<std::uint64_t> waiting_in(int tid, int fd) {
  const auto info = read_file(fmt::format("/proc/{}/fdinfo/{}", tid, fd), fdinfo_bytes);
  if (!info.ok()) return std::nullopt;
  for (const auto line : split_lines(*info))
    if (line.starts_with("scm_fds:")) return parse_u64(trim(line.substr(8)));
  return std::nullopt;
}

// A copy of a task's descriptor. Invalid, with errno: EBADF where it is closed by now.
UniqueFd copy_of(int pid, int tid, int fd) {
  const auto task = open_pidfd(tid, tid != pid);
  if (!task) return {};
  return UniqueFd(static_cast<int>(::syscall(SYS_pidfd_getfd, task.get(), fd, 0)));
}

bool gone(int tid, int fd) { return link_of(tid, fd).empty(); }

}  // namespace

bool Exported::held() {
  if (last_.pid != 0) {
    // Not by number alone: the process must still be one of a tenant's.
    const bool still = Processes::filtered(last_.pid) && holds(last_.pid, last_.tid, last_.fd);
    driver_.reset();
    if (still) return true;
    last_ = {};
  }
  bool found = false;
  for (int i = 0; i < looks && !found; ++i) found = look();
  driver_.reset();
  return found;
}

bool Exported::look() {
  return any_number("/proc", [this](int pid) { return pid != ::getpid() && in_process(pid); });
}

bool Exported::in_process(int pid) {
  if (!Processes::filtered(pid)) return false;
  if (in_task(pid, pid)) return true;
  // Threads may have descriptors of their own, also after the first one ended.
  return any_number(fmt::format("/proc/{}/task", pid), [this, pid](int tid) {
    return tid != pid && ::syscall(SYS_kcmp, pid, tid, KCMP_FILES, 0, 0) != 0 && in_task(pid, tid);
  });
}

bool Exported::in_task(int pid, int tid) {
  return any_number(fmt::format("/proc/{}/fd", tid), [this, pid, tid](int fd) {
    if (!holds(pid, tid, fd)) return false;
    last_ = {pid, tid, fd};
    return true;
  });
}

bool Exported::holds(int pid, int tid, int fd) {
  const std::string target = link_of(tid, fd);
  if (target.empty()) return false;
  if (target.starts_with("socket:")) return on_its_way(pid, tid, fd);
  // Whatever is registered with a ring, and whatever was made a DMA buffer.
  if (target == "anon_inode:[io_uring]" || target.starts_with("/dmabuf:")) return true;
  return processes_.kind_of(tid, fd) == FileKind::control && carries(pid, tid, fd);
}

bool Exported::on_its_way(int pid, int tid, int fd) {
  if (!kernel_) kernel_ = try_kernel();
  const auto waiting = waiting_in(tid, fd);
  if (waiting && *waiting != 0) return true;
  if (waiting ? kernel_->counts_at_listeners : kernel_->counts) return false;
  const auto socket = copy_of(pid, tid, fd);
  if (!socket) return !gone(tid, fd);
  int value = 0;
  socklen_t size = sizeof value;
  if (::getsockopt(socket.get(), SOL_SOCKET, SO_DOMAIN, &value, &size) != 0) return true;
  if (value != AF_UNIX) return false;
  if (!kernel_->counts) return true;
  return ::getsockopt(socket.get(), SOL_SOCKET, SO_ACCEPTCONN, &value, &size) != 0 || value != 0;
}

// Kernels before 5.6 do not count at all, those before 6.3 not what waits in a connection nobody accepted yet.
Exported::Kernel Exported::try_kernel() {
  Kernel kernel;
  const UniqueFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const UniqueFd peer(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!listener || !peer) return kernel;
  kernel.counts = waiting_in(::getpid(), peer.get()).has_value();
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  socklen_t size = sizeof name.sun_family;  // the kernel chooses one
  if (::bind(listener.get(), reinterpret_cast<sockaddr*>(&name), size) != 0 || ::listen(listener.get(), 1) != 0)
    return kernel;
  size = sizeof name;
  if (::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&name), &size) != 0 ||
      ::connect(peer.get(), reinterpret_cast<sockaddr*>(&name), size) != 0)
    return kernel;
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) char space[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = space;
  message.msg_controllen = sizeof space;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  const int sent = peer.get();
  std::memcpy(CMSG_DATA(header), &sent, sizeof sent);
  if (::sendmsg(peer.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL) != 1) return kernel;
  kernel.counts_at_listeners = waiting_in(::getpid(), listener.get()).value_or(0) == 1;
  return kernel;
}

bool Exported::carries(int pid, int tid, int fd) {
  const auto file = copy_of(pid, tid, fd);
  if (!file) return !gone(tid, fd);
  struct ::stat what {};
  if (::fstat(file.get(), &what) != 0) return true;
  return processes_.kind_of(what) == FileKind::control && ask_driver(file);
}

// Through a file of our own, so that none of the tenant's objects is touched.
bool Exported::ask_driver(const UniqueFd& file) {
  if (!driver_) {
    UniqueFd own(::open((root_ / "dev/nvidiactl").c_str(), O_RDWR | O_CLOEXEC));
    if (!own) return true;
    rm::DriverFile opened(std::move(own));
    abi::Alloc client{};
    client.cls = abi::class_client;
    if (opened.perform(abi::request(abi::esc_alloc, sizeof client), &client) < 0 || client.status != abi::ok)
      return true;
    client_ = client.handle;
    driver_ = std::move(opened);
  }
  ExportInfo info{};
  info.fd = file.get();
  abi::Control control{};
  control.client = control.object = client_;
  control.command = cmd_get_export_info;
  control.params = reinterpret_cast<std::uint64_t>(&info);
  control.params_size = sizeof info;
  return driver_->perform(abi::request(abi::esc_control, sizeof control), &control) < 0 ||
         control.status != err_invalid_parameter;
}

}  // namespace bulkhead::hold
