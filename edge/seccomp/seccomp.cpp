#include "edge/seccomp/seccomp.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif

namespace bulkhead::seccomp {

namespace {

#if defined(__x86_64__)
constexpr std::uint32_t native = AUDIT_ARCH_X86_64, other = AUDIT_ARCH_I386;
constexpr std::uint32_t x32_bit = 0x40000000;
#elif defined(__aarch64__)
constexpr std::uint32_t native = AUDIT_ARCH_AARCH64, other = AUDIT_ARCH_ARM;
constexpr std::uint32_t x32_bit = 0x80000000;  // no such ABI: no number has it
#else
#error "no filter for this architecture"
#endif
// Of the 32-bit ABI; the same on i386 and arm. The old mmap takes a pointer, which a filter cannot follow; no
// libc of this century calls it.
constexpr std::uint32_t other_ioctl = 54, other_old_mmap = 90, other_mmap2 = 192;

constexpr std::uint32_t map_shared_bit = 0x01,
                        map_anonymous = 0x20;  // MAP_SHARED_VALIDATE is 3: has the bit as well

// _IOC_NR and _IOC_SIZE of a request: all that the driver looks at.
constexpr std::uint32_t key_mask = 0x3fff00ff;
constexpr std::uint32_t key(std::uint32_t number, std::uint32_t size) { return size << 16 | number; }
constexpr std::uint32_t keys[] = {
    key(0x2b, 48),
    key(0x2b, 32),   // RM_ALLOC, RM_ALLOC in its older form
    key(0x29, 16),   // RM_FREE
    key(0x2a, 32),   // RM_CONTROL
    key(0x34, 28),   // RM_DUP_OBJECT
    key(0x27, 56),   // RM_ALLOC_MEMORY
    key(0x4a, 184),  // RM_VID_HEAP_CONTROL
    key(0xd3, 16),   // any of these, behind a pointer
    key(0xd9, 2608),
    key(0xd9, 2600),  // memory as a dma-buf, which outlives its handle; now and before mapping types
};
constexpr std::size_t key_count = sizeof keys / sizeof *keys;

constexpr sock_filter statement(int code, std::uint32_t k) {
  return {static_cast<std::uint16_t>(code), 0, 0, k};
}
constexpr sock_filter jump(int code, std::uint32_t k, std::size_t yes, std::size_t no) {
  return {static_cast<std::uint16_t>(code), static_cast<std::uint8_t>(yes), static_cast<std::uint8_t>(no), k};
}

struct Program {
  sock_filter lines[80] = {};
  unsigned short length = 0;
};

// Little endian: the low half of an argument comes first. The driver's and the kernel's own look at no more.
constexpr std::uint32_t argument(std::uint32_t number) {
  return static_cast<std::uint32_t>(offsetof(seccomp_data, args)) + 8 * number;
}

constexpr Program make_program() {
  Program out;
  const auto add = [&out](sock_filter line) { out.lines[out.length++] = line; };
  constexpr int load = BPF_LD | BPF_W | BPF_ABS, equal = BPF_JMP | BPF_JEQ | BPF_K,
                set = BPF_JMP | BPF_JSET | BPF_K;
  constexpr int bits = BPF_ALU | BPF_AND | BPF_K, give = BPF_RET | BPF_K;
  constexpr std::uint32_t allow = SECCOMP_RET_ALLOW, ask = SECCOMP_RET_USER_NOTIF,
                          no = SECCOMP_RET_ERRNO | ENOSYS;
  constexpr auto number_at = static_cast<std::uint32_t>(offsetof(seccomp_data, nr));
  constexpr auto arch_at = static_cast<std::uint32_t>(offsetof(seccomp_data, arch));

  // `yes` when argument 1 is one of the driver's requests, else allow.
  const auto requests = [&](std::uint32_t yes) {
    add(statement(load, argument(1)));
    add(statement(bits, key_mask));
    for (std::size_t i = 0; i < key_count; ++i) add(jump(equal, keys[i], key_count - i, 0));
    add(statement(give, allow));
    add(statement(give, yes));
  };
  constexpr std::size_t requests_length = key_count + 4;
  // `yes` when argument 3 maps a file shared, else allow.
  const auto mappings = [&](std::uint32_t yes) {
    add(statement(load, argument(3)));
    add(statement(bits, map_shared_bit | map_anonymous));
    add(jump(equal, map_shared_bit, 1, 0));
    add(statement(give, allow));
    add(statement(give, yes));
  };
  constexpr std::size_t mappings_length = 5;

  add(statement(load, arch_at));
  constexpr std::size_t native_length = 1 + 2 + 3 + requests_length + mappings_length;
  add(jump(equal, native, 0, native_length));
  add(statement(load, number_at));
  add(jump(set, x32_bit, 0, 1));
  add(statement(give, no));
  add(jump(equal, SYS_ioctl, 2, 0));
  add(jump(equal, SYS_mmap, 1 + requests_length, 0));
  add(statement(give, allow));
  requests(ask);
  mappings(ask);

  add(jump(equal, other, 1, 0));
  add(statement(give, no));  // an architecture of which nothing is known here
  add(statement(load, number_at));
  add(jump(equal, other_ioctl, 4, 0));
  add(jump(equal, other_mmap2, 3 + requests_length, 0));
  add(jump(equal, other_old_mmap, 1, 0));
  add(statement(give, allow));
  add(statement(give, no));
  requests(no);
  mappings(no);
  return out;
}
constexpr Program program = make_program();
static_assert(program.length <= 80);

long seccomp(unsigned flags, const sock_fprog* filter) {
  return ::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, filter);
}

Error call_error(const char* what, int err) {
  // ENOENT: the notification is no more; ENOTCONN and a hangup: nobody is left.
  if (err == ENOENT) return Error(Errc::gone, fmt::format("{}: the caller is gone", what), {}, err);
  return errno_error(what, err);
}

}  // namespace

Installed install() noexcept {
  Installed out;
  sock_fprog filter{program.length, const_cast<sock_filter*>(program.lines)};
  // Once a call was received only a fatal signal may wake its thread: else a timer's signal would have it
  // made twice (the supervisor performs it, the kernel restarts it). Linux 5.19.
  unsigned flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
  for (;;) {
    const long fd = seccomp(flags, &filter);
    if (fd >= 0) {
      out.listener = static_cast<int>(fd);
      out.error = 0;
      return out;
    }
    out.error = errno;
    if (out.error == EACCES && !out.no_new_privileges && ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0) {
      out.no_new_privileges = true;
    } else if (out.error == EINVAL && (flags & SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV) != 0) {
      flags = SECCOMP_FILTER_FLAG_NEW_LISTENER;
    } else {
      return out;
    }
  }
}

int send_fd(int socket, int fd) noexcept {
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) char space[CMSG_SPACE(sizeof fd)] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = space;
  message.msg_controllen = sizeof space;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof fd);
  std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  for (;;) {
    if (::sendmsg(socket, &message, MSG_NOSIGNAL) >= 0) return 0;
    if (errno != EINTR) return -errno;
  }
}

int recv_fd(int socket) noexcept {
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) char space[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = space;
  message.msg_controllen = sizeof space;
  for (;;) {
    const ssize_t got = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -errno;
    if (got == 0) return -ECONNRESET;  // the other side is gone
    break;
  }
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  if (header == nullptr || header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS ||
      header->cmsg_len != CMSG_LEN(sizeof(int)))
    return -EBADMSG;
  int fd = -1;
  std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
  return fd;
}

#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (1UL << 0)
#endif

Listener::Listener(UniqueFd fd) : fd_(std::move(fd)) {
  // The caller sleeps when its supervisor wakes, so both may have one CPU: half the latency. Linux 6.6; else
  // without.
  ::ioctl(fd_.get(), SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
}

static_assert(sizeof(Call) == sizeof(seccomp_notif) && offsetof(Call, tid) == offsetof(seccomp_notif, pid) &&
              offsetof(Call, number) == offsetof(seccomp_notif, data.nr) &&
              offsetof(Call, arch) == offsetof(seccomp_notif, data.arch) &&
              offsetof(Call, args) == offsetof(seccomp_notif, data.args));

Status Listener::receive(Call& into) const {
  pollfd waiting{fd_.get(), POLLIN, 0};
  while (::poll(&waiting, 1, 0) < 0 && errno == EINTR) {
  }
  if ((waiting.revents & POLLIN) == 0) {
    if ((waiting.revents & (POLLHUP | POLLERR | POLLNVAL)) != 0)
      return Error(Errc::gone, "nobody is under the filter any more");
    return Error(Errc::not_found, "no call waits");
  }
  while (::ioctl(fd_.get(), SECCOMP_IOCTL_NOTIF_RECV, &into) != 0) {
    if (errno == ENOENT) return Error(Errc::not_found, "the caller is gone", {}, ENOENT);
    if (errno != EINTR) return errno_error("receive a system call", errno);
  }
  return ok_status();
}

Result<Call> Listener::receive() const {
  Call call;
  BH_CHECK(receive(call));
  return call;
}

bool Listener::alive(std::uint64_t id) const {
  return ::ioctl(fd_.get(), SECCOMP_IOCTL_NOTIF_ID_VALID, &id) == 0;
}

Status Listener::send(std::uint64_t id, std::int64_t value, int error, std::uint32_t flags) const {
  seccomp_notif_resp response{};
  response.id = id;
  response.val = value;
  response.error = -error;
  response.flags = flags;
  while (::ioctl(fd_.get(), SECCOMP_IOCTL_NOTIF_SEND, &response) != 0) {
    if (errno != EINTR) return call_error("answer a system call", errno);
  }
  return ok_status();
}

Status Listener::let_through(std::uint64_t id) const {
  return send(id, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE);
}
Status Listener::answer(std::uint64_t id, std::int64_t value) const { return send(id, value, 0, 0); }
Status Listener::refuse(std::uint64_t id, int error) const { return send(id, 0, error, 0); }

namespace {
Status moved(const char* what, ssize_t done, std::size_t wanted) {
  if (done == static_cast<ssize_t>(wanted)) return ok_status();
  if (done >= 0) return Error(Errc::io, fmt::format("{}: no such address", what), {}, EFAULT);
  if (errno == ESRCH) return Error(Errc::gone, fmt::format("{}: the process is gone", what), {}, ESRCH);
  return errno_error(what, errno);
}
}  // namespace

Status read_memory(int tid, std::uint64_t address, std::span<std::byte> into) {
  if (into.empty()) return ok_status();
  const iovec ours{into.data(), into.size()};
  const iovec theirs{reinterpret_cast<void*>(address), into.size()};  // NOLINT(performance-no-int-to-ptr)
  return moved("read a tenant's memory", ::process_vm_readv(tid, &ours, 1, &theirs, 1, 0), into.size());
}

Status write_memory(int tid, std::uint64_t address, std::span<const std::byte> from) {
  if (from.empty()) return ok_status();
  const iovec ours{const_cast<std::byte*>(from.data()), from.size()};
  const iovec theirs{reinterpret_cast<void*>(address), from.size()};  // NOLINT(performance-no-int-to-ptr)
  return moved("write a tenant's memory", ::process_vm_writev(tid, &ours, 1, &theirs, 1, 0), from.size());
}

}  // namespace bulkhead::seccomp
