#include "edge/seccomp/seccomp.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <functional>
#include <optional>

namespace bulkhead::seccomp {
namespace {

constexpr unsigned long alloc = 0xc030462bUL;

// A child under the filter that runs `what` and whose exit code is what that returns.
struct Child {
  explicit Child(const std::function<int()>& what) {
    int pair[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    pid = ::fork();
    if (pid == 0) {
      ::close(pair[0]);
      const Installed done = install();
      if (done.listener < 0) ::_exit(200);
      if (send_fd(pair[1], done.listener) != 0) ::_exit(201);
      ::close(done.listener);
      ::close(pair[1]);
      ::_exit(what());
    }
    ::close(pair[1]);
    const int fd = recv_fd(pair[0]);
    ::close(pair[0]);
    EXPECT_GE(fd, 0);
    listener.emplace(UniqueFd(fd));
  }
  ~Child() {
    if (pid > 0) exit_code();
  }
  std::optional<Call> next() const {
    pollfd waiting{listener->fd(), POLLIN, 0};
    ::poll(&waiting, 1, 10'000);
    auto call = listener->receive();
    if (!call.ok()) return std::nullopt;
    return *call;
  }
  int exit_code() {
    int status = 0;
    ::waitpid(pid, &status, 0);
    pid = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  pid_t pid = 0;
  std::optional<Listener> listener;
};

TEST(Seccomp, a_driver_call_stops_and_gets_the_answer_it_is_given) {
  Child child([] { return static_cast<int>(::syscall(SYS_ioctl, 0, alloc, nullptr)); });
  const auto call = child.next();
  ASSERT_TRUE(call);
  EXPECT_EQ(call->number, SYS_ioctl);
  EXPECT_EQ(static_cast<int>(call->tid), child.pid);
  EXPECT_EQ(call->args[1], alloc);
  EXPECT_TRUE(child.listener->alive(call->id));
  EXPECT_TRUE(child.listener->answer(call->id, 42).ok());
  EXPECT_EQ(child.exit_code(), 42);
  EXPECT_FALSE(child.listener->alive(call->id));
}

TEST(Seccomp, the_letter_of_the_request_is_no_way_around_for_the_driver_does_not_read_it) {
  for (const unsigned long request :
       {0xc030462bUL, 0xc030002bUL, 0x0030582bUL, 0xffffffff4030462bUL, 0xc020462bUL}) {
    Child child([request] { return ::syscall(SYS_ioctl, 0, request, nullptr) == -1 ? errno : 0; });
    const auto call = child.next();
    ASSERT_TRUE(call) << std::hex << request;
    EXPECT_TRUE(child.listener->refuse(call->id, ENOMEM).ok());
    EXPECT_EQ(child.exit_code(), ENOMEM) << std::hex << request;
  }
}

TEST(Seccomp, the_kernel_answers_what_is_let_through_or_does_not_concern_the_driver) {
  Child child([] {
    if (::syscall(SYS_ioctl, -1, 0xc0104629UL, nullptr) != -1 || errno != EBADF) return 1;
    return ::syscall(SYS_ioctl, -1, 0x5401UL, nullptr) == -1 && errno == EBADF ? 0 : 2;
  });
  const auto call = child.next();
  ASSERT_TRUE(call);
  EXPECT_TRUE(child.listener->let_through(call->id).ok());
  EXPECT_EQ(child.exit_code(), 0);
}

TEST(Seccomp, shared_mappings_of_files_stop_and_private_and_anonymous_ones_do_not) {
  const int file = ::memfd_create("shared", MFD_CLOEXEC);
  ASSERT_EQ(::ftruncate(file, 8192), 0);
  Child child([file] {
    if (::mmap(nullptr, 4096, PROT_READ, MAP_PRIVATE, file, 0) == MAP_FAILED) return 1;
    if (::mmap(nullptr, 4096, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0) == MAP_FAILED) return 2;
    if (::mmap(nullptr, 8192, PROT_READ, MAP_SHARED_VALIDATE, file, 0) != MAP_FAILED || errno != ENOMEM)
      return 3;
    return ::mmap(nullptr, 4096, PROT_READ, MAP_SHARED, file, 0) == MAP_FAILED ? 4 : 0;
  });
  auto call = child.next();
  ASSERT_TRUE(call);
  EXPECT_EQ(call->number, SYS_mmap);
  EXPECT_EQ(call->args[1], 8192U);
  EXPECT_TRUE(child.listener->refuse(call->id, ENOMEM).ok());
  call = child.next();
  ASSERT_TRUE(call);
  EXPECT_EQ(call->args[1], 4096U);
  EXPECT_TRUE(child.listener->let_through(call->id).ok());
  EXPECT_EQ(child.exit_code(), 0);
  ::close(file);
}

TEST(Seccomp, the_filter_follows_forks_and_execs) {
  Child child([] {
    if (::fork() == 0) ::_exit(static_cast<int>(::syscall(SYS_ioctl, 0, alloc, nullptr)));
    int status = 0;
    ::wait(&status);
    return WEXITSTATUS(status);
  });
  const auto call = child.next();
  ASSERT_TRUE(call);
  EXPECT_NE(static_cast<int>(call->tid), child.pid);
  EXPECT_TRUE(child.listener->answer(call->id, 7).ok());
  EXPECT_EQ(child.exit_code(), 7);
}

TEST(Seccomp, with_no_supervisor_left_the_kernel_refuses) {
  int gate[2];
  ASSERT_EQ(::pipe(gate), 0);
  Child child([&gate] {
    char byte = 0;
    ::close(gate[1]);
    if (::read(gate[0], &byte, 1) != 0) return 1;
    return ::syscall(SYS_ioctl, 0, alloc, nullptr) == -1 ? errno : 0;
  });
  child.listener.reset();
  ::close(gate[0]);
  ::close(gate[1]);
  EXPECT_EQ(child.exit_code(), ENOSYS);
}

TEST(Seccomp, the_listener_says_when_everybody_is_gone) {
  Child child([] { return 0; });
  EXPECT_EQ(child.exit_code(), 0);
  pollfd waiting{child.listener->fd(), POLLIN, 0};
  ::poll(&waiting, 1, 10'000);
  const auto call = child.listener->receive();
  ASSERT_FALSE(call.ok());
  EXPECT_EQ(call.error().code(), Errc::gone);
}

TEST(Seccomp, a_caller_killed_while_it_waits_is_gone_and_not_an_error) {
  Child child([] { return static_cast<int>(::syscall(SYS_ioctl, 0, alloc, nullptr)); });
  const auto call = child.next();
  ASSERT_TRUE(call);
  ::kill(child.pid, SIGKILL);
  EXPECT_EQ(child.exit_code(), 128 + SIGKILL);
  EXPECT_FALSE(child.listener->alive(call->id));
  const auto answered = child.listener->answer(call->id, 0);
  ASSERT_FALSE(answered.ok());
  EXPECT_EQ(answered.error().code(), Errc::gone);
}

TEST(Seccomp, memory_moves_whole_or_not_at_all) {
  std::uint64_t word = 5;
  Child child([&word] { return ::syscall(SYS_ioctl, 0, alloc, &word) == 0 ? static_cast<int>(word) : 100; });
  const auto call = child.next();
  ASSERT_TRUE(call);
  std::uint64_t seen = 0;
  EXPECT_TRUE(
      read_memory(static_cast<int>(call->tid), call->args[2], std::as_writable_bytes(std::span(&seen, 1)))
          .ok());
  EXPECT_EQ(seen, 5U);
  seen = 9;
  EXPECT_TRUE(
      write_memory(static_cast<int>(call->tid), call->args[2], std::as_bytes(std::span(&seen, 1))).ok());
  const auto nowhere =
      read_memory(static_cast<int>(call->tid), 8, std::as_writable_bytes(std::span(&seen, 1)));
  ASSERT_FALSE(nowhere.ok());
  EXPECT_EQ(nowhere.error().native(), EFAULT);
  EXPECT_TRUE(child.listener->answer(call->id, 0).ok());
  EXPECT_EQ(child.exit_code(), 9);
}

#if defined(__x86_64__)
long other_call(long number, long a, long b, long c, long d) {
  long result = 0;
  // The 32-bit gate takes addresses below 4 GiB only; none is needed here.
  asm volatile("int $0x80"
               : "=a"(result)
               : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d)
               : "memory", "r8", "r9", "r10", "r11");
  return result;
}

TEST(Seccomp, the_32_bit_gate_and_x32_are_no_way_around) {
  if (other_call(20, 0, 0, 0, 0) <= 0) GTEST_SKIP() << "this kernel has no 32-bit calls";
  Child child([] {
    if (other_call(54, -1, static_cast<long>(alloc & 0xffffffffUL), 0, 0) != -ENOSYS) return 1;
    if (other_call(192, 0, 4096, PROT_READ, MAP_SHARED) != -ENOSYS) return 2;
    if (other_call(90, 0, 0, 0, 0) != -ENOSYS) return 3;
    if (other_call(54, -1, 0x5401, 0, 0) != -EBADF) return 4;
    if (::syscall(0x40000000 | 514, -1, alloc, nullptr) != -1 || errno != ENOSYS) return 5;
    return 0;
  });
  EXPECT_EQ(child.exit_code(), 0);
}
#endif

}  // namespace
}  // namespace bulkhead::seccomp
