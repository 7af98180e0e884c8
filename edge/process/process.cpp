#include "edge/process/process.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <compare>
#include <csignal>
#include <map>
#include <optional>
#include <set>

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
  const auto start = parse_u64(fields[19]), parent = parse_u64(fields[1]);
  if (!start || !parent || *parent > INT32_MAX) return bad();
  return Identity{.pid = pid,
                  .start_time = *start,
                  .parent = static_cast<int>(*parent),
                  .name = printable(text.substr(open + 1, close - open - 1), 64)};
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

namespace {

std::string words(const inventory::Holder& holder) {
  return fmt::format("pid {} ({})", holder.pid, holder.name);
}

// A holder pinned: from here on the pidfd names one process, whatever becomes of the number. No descriptor
// and no error: it has ended.
Result<UniqueFd> pin(const fs::path& root, const inventory::Holder& holder) {
  static constexpr const char* elsewhere =
      "end it where it runs; one that the twin simulates: bulkhead twin detach --all";
  const std::string who = words(holder);
  if (holder.pid <= 1) return Error(Errc::invalid, fmt::format("{} is not to be ended", who));
  UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, holder.pid, 0U)));
  const bool here = root == "/";
  if (!pidfd) {
    if (errno == ESRCH) {
      if (here) return UniqueFd();
      // Below another root the pid may be one that only that host, or its simulation, knows.
      return Error(Errc::unsupported, fmt::format("{} is no process of this machine", who), elsewhere);
    }
    return errno_error("pidfd_open " + who, errno);
  }
  const auto real = stat_of("/", holder.pid);
  if (!real.ok() && real.error().code() == Errc::not_found) return UniqueFd();
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
  return pidfd;
}

constexpr unsigned kill_wait_ms = 1000;

}  // namespace

std::vector<Status> terminate_all(const fs::path& root, std::span<const inventory::Holder> holders,
                                  unsigned grace_ms) {
  std::vector<Status> answers;
  std::vector<UniqueFd> pinned;
  for (const auto& holder : holders) {
    auto pidfd = pin(root, holder);
    answers.push_back(pidfd.ok() ? ok_status() : Status(pidfd.error()));
    pinned.push_back(pidfd.ok() ? std::move(*pidfd) : UniqueFd());
  }
  for (const int signal : {SIGTERM, SIGKILL}) {
    if (signal == SIGTERM && grace_ms == 0) continue;
    for (std::size_t i = 0; i < pinned.size(); ++i) {
      if (!pinned[i]) continue;
      if (::syscall(SYS_pidfd_send_signal, pinned[i].get(), signal, nullptr, 0U) != 0) {
        if (errno != ESRCH) answers[i] = errno_error("signal " + words(holders[i]), errno);
        pinned[i].reset();
      }
    }
    const std::uint64_t deadline =
        monotonic_ns() + std::uint64_t{signal == SIGTERM ? grace_ms : kill_wait_ms} * 1'000'000;
    for (auto& pidfd : pinned) {
      if (!pidfd) continue;
      const std::uint64_t now = monotonic_ns();
      const auto left = now >= deadline ? 0U : static_cast<unsigned>((deadline - now) / 1'000'000 + 1);
      if (ended_within(pidfd.get(), left)) pidfd.reset();
    }
  }
  for (std::size_t i = 0; i < pinned.size(); ++i) {
    if (!pinned[i]) continue;
    answers[i] = Error(Errc::timeout, fmt::format("{} does not end, even by SIGKILL", words(holders[i])),
                       "it hangs in the kernel: look at /proc/" + std::to_string(holders[i].pid) + "/wchan");
  }
  return answers;
}

Status terminate(const fs::path& root, const inventory::Holder& holder, unsigned grace_ms) {
  // A grace of nothing is still a request first.
  return std::move(terminate_all(root, {&holder, 1}, std::max(grace_ms, 1U)).front());
}

void freeze(std::span<const inventory::Holder> holders) {
  for (const auto& holder : holders) {
    if (const auto pidfd = pin("/", holder); pidfd.ok() && *pidfd)
      ::syscall(SYS_pidfd_send_signal, pidfd->get(), SIGSTOP, nullptr, 0U);
  }
}

Status freeze_user(unsigned uid, bool stop) {
  if (uid == 0 || uid == ~0U)
    return Error(Errc::invalid, "root's processes are not to be stopped all at once");
  const pid_t child = ::fork();
  if (child < 0) return errno_error("fork", errno);
  if (child == 0) {
    // From root, setresuid gives up every right to signal others. System calls alone: the parent has threads.
    const bool gone = ::syscall(SYS_setresuid, uid, uid, uid) == 0;
    const bool sent = gone && (::syscall(SYS_kill, -1, stop ? SIGSTOP : SIGCONT) == 0 || errno == ESRCH);
    ::_exit(sent ? 0 : 1);
  }
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return ok_status();
  return Error(Errc::permission, fmt::format("the processes of user {} cannot be stopped", uid),
               "it takes CAP_SETUID");
}

Result<WallTime> started(const Identity& who) {
  BH_TRY(const std::string text, read_file("/proc/stat", 1U << 22U));
  for (const auto line : split_lines(text)) {
    if (!line.starts_with("btime ")) continue;
    const auto boot = parse_u64(trim(line.substr(6)));
    const long ticks = ::sysconf(_SC_CLK_TCK);
    if (!boot || ticks <= 0) break;
    const std::uint64_t ms = *boot * 1000 + who.start_time * 1000 / static_cast<std::uint64_t>(ticks);
    return WallTime(std::chrono::milliseconds(ms));
  }
  return Error(Errc::corrupt, "/proc/stat does not tell when this machine was booted");
}

// ---- who has a file open

namespace {

constexpr std::size_t most_mappings_bytes = 64U << 20U;
constexpr int look_rounds = 6;                  // for what came up while it was looked
constexpr int same_rounds = 4;                  // for one number that goes from process to process
constexpr unsigned kernel_thread = 0x00200000;  // PF_KTHREAD, include/linux/sched.h
constexpr int kernel_threads_parent = 2;        // kthreadd

// What two descriptors of one file have in common.
struct Key {
  bool device = false;
  dev_t first = 0;
  ino_t second = 0;
  friend auto operator<=>(const Key&, const Key&) = default;
};
Key key_of(const struct stat& info) {
  if (S_ISCHR(info.st_mode)) return {true, info.st_rdev, 0};
  return {false, info.st_dev, info.st_ino};
}

std::vector<int> numbers_in(DIR* open) {
  std::vector<int> out;
  if (open == nullptr) return out;
  while (const dirent* entry = ::readdir(open)) {
    if (const auto number = parse_u64(entry->d_name); number && *number <= 0x7fffffff)
      out.push_back(static_cast<int>(*number));
  }
  ::closedir(open);
  return out;
}
std::vector<int> numbers_in(const std::string& directory) { return numbers_in(::opendir(directory.c_str())); }

bool refused(int error) { return error == EACCES || error == EPERM; }

class Search {
 public:
  explicit Search(std::span<const fs::path> files) {
    for (std::size_t i = 0; i < files.size(); ++i) {
      struct stat info {};
      if (::stat(files[i].c_str(), &info) == 0) keys_[key_of(info)].push_back(i);
    }
  }
  bool hopeless() const { return keys_.empty(); }

  // Errc::permission: this process may not be looked into. The threads are put into `looked`.
  Result<std::vector<std::size_t>> of(int pid, std::set<int>& looked) const {
    std::set<std::size_t> found;
    const std::string at = fmt::format("/proc/{}", pid);
    std::vector<int> tables;  // threads, one for each table of descriptors
    for (const int thread : numbers_in(at + "/task")) {
      looked.insert(thread);
      // kcmp(2): 0 says that both use one table. Where it is not to be had, every thread is looked at.
      if (!tables.empty() && ::syscall(SYS_kcmp, tables.front(), thread, KCMP_FILES, 0UL, 0UL) == 0) continue;
      tables.push_back(thread);
      DIR* directory = ::opendir(fmt::format("{}/task/{}/fd", at, thread).c_str());
      if (directory == nullptr && refused(errno)) return denied(pid);
      if (directory == nullptr) continue;
      const bool seen = descriptors(directory, found);
      ::closedir(directory);
      if (!seen) return denied(pid);
    }
    if (!mappings(at, found)) return denied(pid);
    return std::vector<std::size_t>(found.begin(), found.end());
  }

 private:
  static Error denied(int pid) {
    return Error(Errc::permission, fmt::format("what pid {} has open may not be read", pid),
                 "it takes root, with CAP_SYS_PTRACE and CAP_SYS_ADMIN");
  }
  void match(const struct stat& info, std::set<std::size_t>& found) const {
    const auto its = keys_.find(key_of(info));
    if (its != keys_.end()) found.insert(its->second.begin(), its->second.end());
  }
  // False: they may be counted, and not looked at.
  bool descriptors(DIR* directory, std::set<std::size_t>& found) const {
    while (const dirent* entry = ::readdir(directory)) {
      if (entry->d_name[0] == '.') continue;
      struct stat info {};
      if (::fstatat(::dirfd(directory), entry->d_name, &info, 0) == 0)
        match(info, found);
      else if (refused(errno))
        return false;
    }
    return true;
  }
  // "7f..-7f.. rw-s 00000000 00:05 1234 /dev/nvidia0": only shared mappings of files, each file once.
  // False: some may not be looked at.
  bool mappings(const std::string& at, std::set<std::size_t>& found) const {
    const auto text = read_file(at + "/maps", most_mappings_bytes);
    if (!text.ok()) return !refused(text.error().native());
    std::set<std::string_view> seen;
    for (std::string_view rest = *text; !rest.empty();) {
      const auto end = rest.find('\n');
      const auto line = rest.substr(0, end);
      rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
      const auto rights = line.find(' ') + 1;  // of most lines this is all that is read
      if (rights == 0 || rights + 4 >= line.size() || line[rights + 3] != 's') continue;
      const auto words = split(line, ' ');
      if (words.size() < 5 || words[4] == "0") continue;
      const auto file = line.substr(static_cast<std::size_t>(words[3].data() - line.data()),
                                    words[3].size() + 1 + words[4].size());
      if (!seen.insert(file).second) continue;
      struct stat info {};
      // map_files writes the addresses without leading zeros, as maps does not always.
      const auto ends = split(words[0], '-');
      const auto low = parse_u64(ends.front(), 16), high = parse_u64(ends.back(), 16);
      if (!low || !high) continue;
      if (::stat(fmt::format("{}/map_files/{:x}-{:x}", at, *low, *high).c_str(), &info) == 0)
        match(info, found);
      else if (errno == EPERM || errno == EACCES)
        return false;
    }
    return true;
  }

  std::map<Key, std::vector<std::size_t>> keys_;
};

// The kernel's own threads have no program: on a large machine they are most of what /proc lists.
bool of_the_kernel(int pid) {
  char text[1024];
  const UniqueFd fd(::open(fmt::format("/proc/{}/stat", pid).c_str(), O_RDONLY | O_CLOEXEC));
  const ssize_t got = fd ? ::read(fd.get(), text, sizeof text) : -1;
  if (got <= 0) return false;
  const std::string_view all(text, static_cast<std::size_t>(got));
  const auto close = all.rfind(')');
  if (close == std::string_view::npos) return false;
  const auto fields = split(trim(all.substr(close + 1)), ' ');  // field 3 is fields[0]
  if (fields.size() < 7) return false;
  const auto parent = parse_u64(fields[1]), flags = parse_u64(fields[6]);
  return parent && flags && (*flags & kernel_thread) != 0 &&
         (*parent == kernel_threads_parent || pid == kernel_threads_parent);
}

// The number that the last process or thread got: while it stays, none has come up.
std::optional<std::string> last_born() {
  const auto text = read_file("/proc/loadavg", 4096);
  if (!text.ok()) return std::nullopt;
  const auto words = split(trim(*text), ' ');
  if (words.size() != 5) return std::nullopt;
  return std::string(words[4]);
}

// The owner of /proc/PID would be root for every process that has made itself undumpable. Of the real and the
// effective user the one that is not root.
unsigned user_of(const fs::path& at) {
  const auto text = read_file(at / "status", 65536);
  if (!text.ok()) return ~0U;
  for (const auto line : split_lines(*text)) {
    if (!line.starts_with("Uid:")) continue;
    const auto words = split(trim(line.substr(4)), '\t');
    const auto real = parse_u64(words[0]), effective = parse_u64(words.size() > 1 ? words[1] : "");
    if (!real || !effective) return ~0U;
    return static_cast<unsigned>(*real != 0 ? *real : *effective);
  }
  return ~0U;
}

bool same_file(const fs::path& a, const fs::path& b) {
  struct stat one {
  }, two{};
  return ::stat(a.c_str(), &one) == 0 && ::stat(b.c_str(), &two) == 0 && one.st_dev == two.st_dev &&
         one.st_ino == two.st_ino;
}

// Nobody: none of the files. What was found belongs to the process that is named: its start time is the same
// before and after.
Result<std::optional<Opener>> search_one(const Search& search, int pid, std::set<int>& looked) {
  BH_TRY(auto found, search.of(pid, looked));
  for (int tries = 0; !found.empty() && tries < same_rounds; ++tries) {
    auto who = look("/", pid);
    BH_TRY(found, search.of(pid, looked));
    if (!who.ok() || found.empty()) continue;
    Opener opener{.who = std::move(*who), .files = found};
    const fs::path at = fmt::format("/proc/{}", pid);
    opener.uid = user_of(at);
    opener.here = same_file(at / "ns/pid", "/proc/self/ns/pid");
    opener.same_program = same_file(at / "exe", "/proc/self/exe");
    const auto now = stat_of("/", pid);
    if (now.ok() && now->start_time == opener.who.start_time) return std::optional(std::move(opener));
  }
  return std::optional<Opener>();
}

}  // namespace

Result<Openers> openers(std::span<const fs::path> files) {
  Openers out;
  const Search search(files);
  if (search.hopeless()) {
    out.all = true;
    return out;
  }
  std::set<int> looked;  // threads; a number does not come again before all others were had
  std::map<int, std::size_t> named;
  const int self = ::getpid();
  for (int round = 0; round < look_rounds && !out.all; ++round) {
    const auto born = last_born();
    const auto pids = numbers_in("/proc");
    if (pids.empty()) return Error(Errc::io, "/proc lists no process");
    for (const int pid : pids) {
      if (pid == self) continue;
      if (round > 0) {
        const auto threads = numbers_in(fmt::format("/proc/{}/task", pid));
        if (std::all_of(threads.begin(), threads.end(), [&](int one) { return looked.contains(one); }))
          continue;
      } else if (of_the_kernel(pid)) {
        looked.insert(pid);
        continue;
      }
      auto opener = search_one(search, pid, looked);
      // In a container pid 1 may belong to those outside of it, who may look into us and not the other way
      // round. It was here before all others: it is the machine's, nobody's program.
      if (!opener.ok() && pid == 1) continue;
      BH_TRY(auto found, std::move(opener));
      if (!found) continue;
      const auto [at, first] = named.emplace(pid, out.who.size());
      if (first)
        out.who.push_back(std::move(*found));
      else
        out.who[at->second] = std::move(*found);
    }
    // All that there was when the list was made has been looked into; and has nothing come up since?
    out.all = born && last_born() == born;
  }
  return out;
}

}  // namespace bulkhead::process
