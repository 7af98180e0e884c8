#include "engine/examine/examine.hpp"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/openat2.h>
#include <netinet/in.h>
#include <poll.h>
#include <pwd.h>
#include <sys/klog.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <set>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/limits.hpp"
#include "base/text.hpp"

namespace bulkhead::examine {

namespace {

constexpr std::size_t text_bytes = 4U << 20U;    // one file
constexpr std::size_t tail_bytes = 256U << 10U;  // of a log
constexpr std::size_t all_bytes = 128U << 20U;   // everything together
constexpr std::size_t paths_per_look = 8192;     // that one pattern may match
constexpr int probe_ms = 300;

// Opens below a root without ever leaving it.
class Root {
 public:
  explicit Root(const std::filesystem::path& root)
      : fd_(::open(root.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC)) {}

  UniqueFd open(const std::string& path, int flags) const {
    open_how how{};
    how.flags = static_cast<std::uint64_t>(flags | O_CLOEXEC);
    how.resolve = RESOLVE_IN_ROOT;
    const std::string relative = path == "/" ? "." : path.substr(1);
    const long fd = ::syscall(SYS_openat2, fd_.get(), relative.c_str(), &how, sizeof how);
    if (fd < 0 && (errno == ENOSYS || errno == EPERM)) {
      // Kernel before 5.6, or a sandbox that does not know the call.
      return UniqueFd(::openat(fd_.get(), relative.c_str(), flags | O_CLOEXEC));
    }
    return UniqueFd(static_cast<int>(fd));
  }

 private:
  UniqueFd fd_;
};

template <class T>
Reading<T> because(int err) {
  if (err == ENOENT || err == ENOTDIR) return Reading<T>::missing("no such file");
  return Reading<T>::missing(errno_error("read", err).message().substr(6));
}

Reading<std::string> read_text(const Root& root, const std::string& path, bool tail, std::size_t& left) {
  const UniqueFd fd = root.open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY);
  if (!fd) return because<std::string>(errno);
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) return because<std::string>(errno);
  if (!S_ISREG(status.st_mode)) return Reading<std::string>::missing("not a regular file");
  const std::size_t limit = std::min(tail ? tail_bytes : text_bytes, left);
  if (tail && status.st_size > static_cast<off_t>(limit))
    ::lseek(fd.get(), -static_cast<off_t>(limit), SEEK_END);
  std::string text;
  char block[16384];
  while (text.size() < limit) {
    const ssize_t got = ::read(fd.get(), block, std::min(sizeof block, limit - text.size()));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return because<std::string>(errno);
    if (got == 0) break;
    text.append(block, static_cast<std::size_t>(got));
  }
  left -= text.size();
  return text;
}

Reading<std::vector<std::string>> read_names(const Root& root, const std::string& path) {
  UniqueFd fd = root.open(path, O_RDONLY | O_DIRECTORY);
  if (!fd) return because<std::vector<std::string>>(errno);
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(::fdopendir(fd.get()), ::closedir);
  if (!directory) return because<std::vector<std::string>>(errno);
  static_cast<void>(fd.release());
  std::vector<std::string> names;
  while (const dirent* entry = ::readdir(directory.get())) {
    const std::string_view name = entry->d_name;
    if (name == "." || name == "..") continue;
    names.emplace_back(name);
    if (names.size() >= limits::directory_entries) break;
  }
  std::sort(names.begin(), names.end());
  return names;
}

Reading<std::string> read_link(const Root& root, const std::string& path) {
  const UniqueFd fd = root.open(path, O_PATH | O_NOFOLLOW);
  if (!fd) return because<std::string>(errno);
  char target[4096];
  const ssize_t length = ::readlinkat(fd.get(), "", target, sizeof target);
  if (length < 0) return because<std::string>(errno);
  return std::string(target, static_cast<std::size_t>(length));
}

Reading<doctor::Node> read_node(const Root& root, const std::string& path) {
  const UniqueFd fd = root.open(path, O_PATH);
  if (!fd) return because<doctor::Node>(errno);
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) return because<doctor::Node>(errno);
  if (S_ISDIR(status.st_mode)) return Reading<doctor::Node>::missing("a directory");
  return doctor::Node{.mode = status.st_mode & 07777U,
                      .uid = status.st_uid,
                      .gid = status.st_gid,
                      .device = S_ISCHR(status.st_mode)};
}

// The paths that a pattern names now. A pattern without '*' names itself, there or not.
std::vector<std::string> expand(const Root& root, std::string_view pattern) {
  std::vector<std::string> paths{""};
  for (const auto component : split(pattern.substr(1), '/')) {
    std::vector<std::string> next;
    for (const std::string& path : paths) {
      if (component.find('*') == std::string_view::npos) {
        next.push_back(path + "/" + std::string(component));
        continue;
      }
      const auto names = read_names(root, path.empty() ? "/" : path);
      if (!names) continue;
      for (const std::string& name : *names) {
        if (next.size() < paths_per_look && doctor::path_matches(component, name))
          next.push_back(path + "/" + name);
      }
    }
    paths = std::move(next);
  }
  return paths;
}

// Everything in the kernel's ring buffer. Below another root: the files where that host keeps it.
Reading<doctor::KernelLog> kernel_log(const Root& root, bool this_machine, std::size_t& left) {
  std::string why = "no kernel log file";
  if (this_machine) {
    const int size = ::klogctl(10, nullptr, 0);  // SYSLOG_ACTION_SIZE_BUFFER
    if (size > 0) {
      std::string text(static_cast<std::size_t>(std::min(size, 16 << 20)), '\0');
      const int got = ::klogctl(3, text.data(), static_cast<int>(text.size()));  // SYSLOG_ACTION_READ_ALL
      if (got >= 0) {
        text.resize(static_cast<std::size_t>(got));
        return doctor::KernelLog{.source = "kernel log", .text = std::move(text)};
      }
    }
    why = errno_error("ring buffer", errno).message();
  }
  for (const char* path : {"/var/log/kern.log", "/var/log/messages", "/var/log/dmesg"}) {
    auto text = read_text(root, path, true, left);
    if (text) return doctor::KernelLog{.source = path, .text = std::move(*text.value)};
    if (text.why != "no such file") why = fmt::format("{}: {}", path, text.why);
  }
  return Reading<doctor::KernelLog>::missing(why);
}

doctor::Caller caller() {
  doctor::Caller who;
  who.uid = ::geteuid();
  if (const passwd* entry = ::getpwuid(::geteuid())) who.name = entry->pw_name;
  std::vector<gid_t> gids(static_cast<std::size_t>(std::max(0, ::getgroups(0, nullptr))));
  if (!gids.empty())
    gids.resize(
        static_cast<std::size_t>(std::max(0, ::getgroups(static_cast<int>(gids.size()), gids.data()))));
  gids.push_back(::getegid());
  for (const gid_t gid : gids) {
    if (std::find(who.gids.begin(), who.gids.end(), gid) != who.gids.end()) continue;
    who.gids.push_back(gid);
    if (const group* entry = ::getgrgid(gid)) who.groups.emplace_back(entry->gr_name);
  }
  return who;
}

// Does anybody accept a connection on this host's loopback?
Reading<bool> probe(std::uint16_t port) {
  const UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) return because<bool>(errno);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return true;
  if (errno == ECONNREFUSED) return false;
  if (errno != EINPROGRESS) return because<bool>(errno);
  pollfd wait{.fd = fd.get(), .events = POLLOUT, .revents = 0};
  if (::poll(&wait, 1, probe_ms) <= 0) return Reading<bool>::missing("no answer in time");
  int err = 0;
  socklen_t size = sizeof err;
  ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &err, &size);
  if (err == 0) return true;
  if (err == ECONNREFUSED) return false;
  return because<bool>(err);
}

// A host below a directory cannot be connected to; its table of sockets shows who listens (state 0A).
Reading<bool> listens(const Root& root, std::uint16_t port, std::size_t& left) {
  bool read = false;
  for (const char* path : {"/proc/net/tcp", "/proc/net/tcp6"}) {
    const auto table = read_text(root, path, false, left);
    if (!table) continue;
    read = true;
    const std::string wanted = fmt::format(":{:04X}", port);
    for (const auto line : split_lines(*table)) {
      std::vector<std::string_view> words;
      for (const auto word : split(line, ' ')) {
        if (!word.empty()) words.push_back(word);
      }
      if (words.size() > 3 && words[1].ends_with(wanted) && words[3] == "0A") return true;
    }
  }
  if (!read) return Reading<bool>::missing("a host below a directory shows no sockets");
  return false;
}

}  // namespace

doctor::Evidence look(const std::filesystem::path& path, inventory::Host host) {
  doctor::Evidence evidence;
  evidence.host = std::move(host);
  evidence.caller = caller();
  const Root root(path);
  const bool this_machine = path == "/";
  std::size_t left = all_bytes;
  std::set<std::pair<doctor::How, std::string_view>> done;
  for (const doctor::Check& check : doctor::checks()) {
    for (const doctor::Look& wanted : check.reads) {
      if (!done.emplace(wanted.how, wanted.path).second) continue;
      for (const std::string& found : expand(root, wanted.path)) {
        switch (wanted.how) {
          case doctor::How::text:
            evidence.texts.try_emplace(found, read_text(root, found, false, left));
            break;
          case doctor::How::tail:
            evidence.texts.try_emplace(found, read_text(root, found, true, left));
            break;
          case doctor::How::names:
            evidence.names.try_emplace(found, read_names(root, found));
            break;
          case doctor::How::link:
            evidence.links.try_emplace(found, read_link(root, found));
            break;
          case doctor::How::node:
            evidence.nodes.try_emplace(found, read_node(root, found));
            break;
        }
      }
    }
  }
  evidence.kernel_log = kernel_log(root, this_machine, left);
  for (const std::uint16_t port : doctor::fabric_ports(evidence)) {
    evidence.ports[port] = this_machine ? probe(port) : listens(root, port, left);
  }
  return evidence;
}

Result<doctor::Evidence> evidence(const observe::Access& access) {
  BH_TRY(inventory::Host host, observe::host(access));
  return look(access.root, std::move(host));
}

}  // namespace bulkhead::examine
