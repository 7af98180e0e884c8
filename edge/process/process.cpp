#include "edge/process/process.hpp"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <optional>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"

namespace bulkhead::process {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t stat_bytes = 4096;
constexpr std::size_t cgroup_bytes = 65536;

// "PID (comm) S ppid ...": comm may hold spaces and parentheses, so the last ')' ends it.
Result<Identity> parse_stat(std::string_view text, int pid) {
  const auto bad = [&] {
    return Error(Errc::corrupt, fmt::format("/proc/{}/stat is not what proc(5) says", pid));
  };
  const auto open = text.find('(');
  const auto close = text.rfind(')');
  if (open == std::string_view::npos || close == std::string_view::npos || close < open) return bad();
  const auto fields = split(trim(text.substr(close + 1)), ' ');  // field 3 is fields[0]
  if (fields.size() < 20) return bad();
  const auto start = parse_u64(fields[19]);
  if (!start) return bad();
  return Identity{
      .pid = pid, .start_time = *start, .name = printable(text.substr(open + 1, close - open - 1), 64)};
}

Result<Identity> stat_of(const fs::path& root, int pid) {
  auto text = read_file(root / "proc" / std::to_string(pid) / "stat", stat_bytes);
  if (!text.ok()) {
    // ESRCH: it ended between open and read.
    if (text.error().native() == ENOENT || text.error().native() == ESRCH) {
      return Error(Errc::not_found, fmt::format("no process {}", pid));
    }
    return std::move(text).error();
  }
  return parse_stat(*text, pid);
}

// Waits for the process's end: the pidfd becomes readable.
bool ended_within(int pidfd, unsigned milliseconds) {
  const std::uint64_t deadline = monotonic_ns() + std::uint64_t{milliseconds} * 1000000;
  while (true) {
    const std::uint64_t now = monotonic_ns();
    const auto left = now >= deadline ? 0 : static_cast<int>((deadline - now) / 1000000 + 1);
    pollfd wait{.fd = pidfd, .events = POLLIN, .revents = 0};
    const int ready = ::poll(&wait, 1, left);
    if (ready > 0) return true;
    if (ready == 0) return false;
    if (errno != EINTR) return false;
  }
}

}  // namespace

Result<Identity> look(const fs::path& root, int pid) {
  if (pid <= 0) return Error(Errc::invalid, fmt::format("{} is no process id", pid));
  BH_TRY(Identity identity, stat_of(root, pid));
  if (const auto text = read_file(root / "proc" / std::to_string(pid) / "cgroup", cgroup_bytes); text.ok()) {
    for (const auto line : split_lines(*text)) {
      if (line.starts_with("0::")) identity.cgroup = printable(line.substr(3), 512);
    }
  }
  return identity;
}

Status terminate(const fs::path& root, const inventory::Holder& holder, unsigned grace_ms) {
  static constexpr const char* elsewhere =
      "end it where it runs; one that the twin simulates: bulkhead twin detach --all";
  const std::string who = fmt::format("pid {} ({})", holder.pid, holder.name);
  if (holder.pid <= 1) return Error(Errc::invalid, fmt::format("{} is not to be ended", who));
  const UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, holder.pid, 0U)));
  const bool here = root == "/";
  if (!pidfd) {
    if (errno == ESRCH) {
      if (here) return ok_status();
      // Below another root the pid may be one that only that host, or its simulation, knows.
      return Error(Errc::unsupported, fmt::format("{} is no process of this machine", who), elsewhere);
    }
    return errno_error("pidfd_open " + who, errno);
  }
  // From here on the pidfd names one process, whatever becomes of the number.
  const auto real = stat_of("/", holder.pid);
  if (!real.ok() && real.error().code() == Errc::not_found) return ok_status();
  if (!real.ok()) return real.error();
  if (holder.start_time == 0) {
    return Error(
        Errc::conflict,
        fmt::format("{}: its start time was not read, so it cannot be told from a later process", who));
  }
  if (real->start_time != holder.start_time) {
    if (here)
      return Error(Errc::conflict,
                   fmt::format("{} has ended; the number belongs to {} now", who, real->name));
    return Error(Errc::unsupported, fmt::format("{} is no process of this machine", who), elsewhere);
  }
  for (const int signal : {SIGTERM, SIGKILL}) {
    if (::syscall(SYS_pidfd_send_signal, pidfd.get(), signal, nullptr, 0U) != 0) {
      if (errno == ESRCH) return ok_status();
      return errno_error("signal " + who, errno);
    }
    if (ended_within(pidfd.get(), signal == SIGTERM ? grace_ms : 1000)) return ok_status();
  }
  return Error(Errc::timeout, fmt::format("{} does not end, even by SIGKILL", who),
               "it hangs in the kernel: look at /proc/" + std::to_string(holder.pid) + "/wchan");
}

}  // namespace bulkhead::process
