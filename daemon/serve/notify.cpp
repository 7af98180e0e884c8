#include "daemon/serve/notify.hpp"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"

namespace bulkhead::serve {

namespace {
constexpr int first_fd = 3;  // SD_LISTEN_FDS_START
constexpr std::uint64_t most_fds = 16;

std::string_view variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string_view() : value;
}
bool ours(const char* pid_variable) {
  const auto pid = variable(pid_variable);
  return pid.empty() || parse_u64(pid) == static_cast<std::uint64_t>(::getpid());
}
}  // namespace

void notify(std::string_view state) {
  const auto path = variable("NOTIFY_SOCKET");
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  if (path.size() < 2 || path.size() >= sizeof to.sun_path || (path[0] != '/' && path[0] != '@')) return;
  std::memcpy(to.sun_path, path.data(), path.size());
  if (path[0] == '@') to.sun_path[0] = '\0';
  const UniqueFd fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return;
  (void)::sendto(fd.get(), state.data(), state.size(), MSG_NOSIGNAL, reinterpret_cast<const sockaddr*>(&to),
                 static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size()));
}

std::optional<std::chrono::microseconds> watchdog() {
  const auto period = parse_u64(variable("WATCHDOG_USEC"));
  if (!period || *period == 0 || *period > 86'400'000'000ULL || !ours("WATCHDOG_PID")) return std::nullopt;
  return std::chrono::microseconds(*period);
}

Result<std::vector<int>> listen_fds() {
  std::vector<int> out;
  const auto text = variable("LISTEN_FDS");
  if (text.empty() || variable("LISTEN_PID").empty() || !ours("LISTEN_PID")) return out;
  const auto count = parse_u64(text);
  if (!count || *count > most_fds)
    return Error(Errc::invalid, fmt::format("LISTEN_FDS={}: from 0 to {}", printable(text, 32), most_fds));
  for (int fd = first_fd; fd < first_fd + static_cast<int>(*count); ++fd) {
    if (::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0)
      return errno_error(fmt::format("descriptor {} of LISTEN_FDS", fd), errno);
    out.push_back(fd);
  }
  ::unsetenv("LISTEN_FDS");
  ::unsetenv("LISTEN_PID");
  ::unsetenv("LISTEN_FDNAMES");
  return out;
}

}  // namespace bulkhead::serve
