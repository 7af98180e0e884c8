#include "daemon/http/listen.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include <fmt/format.h>

#include "base/text.hpp"

namespace bulkhead::http {
namespace {

namespace fs = std::filesystem;

constexpr int backlog = 1024;
constexpr std::size_t processes_looked_at = 65536;

// Connections inherit these from their listener: no system call for each.
void set_options(int fd, const Limits& limits) {
  const int one = 1;
  const int idle = 60, interval = 10, probes = 6;
  const auto unacknowledged = static_cast<unsigned>(limits.write_time.count());
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  ::setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
  ::setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unacknowledged, sizeof unacknowledged);
}

struct Address {
  sockaddr_storage storage = {};
  socklen_t size = 0;
};

Result<Address> parse_address(const Listen& listen) {
  Address out;
  std::string text = listen.address == "localhost" ? "127.0.0.1" : listen.address;
  if (text.size() > 2 && text.front() == '[' && text.back() == ']') text = text.substr(1, text.size() - 2);
  auto* v4 = reinterpret_cast<sockaddr_in*>(&out.storage);
  auto* v6 = reinterpret_cast<sockaddr_in6*>(&out.storage);
  if (::inet_pton(AF_INET, text.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(listen.port);
    out.size = sizeof(sockaddr_in);
    return out;
  }
  if (::inet_pton(AF_INET6, text.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(listen.port);
    out.size = sizeof(sockaddr_in6);
    return out;
  }
  return Error(Errc::invalid, fmt::format("listen on '{}': not an IP address", printable(listen.address, 64)),
               "write an address of this host, 0.0.0.0 for all IPv4 or :: for all");
}

bool is_loopback(const sockaddr_storage& address) {
  if (address.ss_family == AF_INET) {
    return (ntohl(reinterpret_cast<const sockaddr_in&>(address).sin_addr.s_addr) >> 24) == 127;
  }
  if (address.ss_family != AF_INET6) return false;
  const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address).sin6_addr;
  if (IN6_IS_ADDR_V4MAPPED(&v6)) return v6.s6_addr[12] == 127;
  return IN6_IS_ADDR_LOOPBACK(&v6);
}

// "pid 4711 (nginx)", as far as /proc tells us; empty when the socket's process is not ours to see.
std::string holder_of(std::uint16_t port) {
  std::vector<std::string> sockets;
  for (const char* table : {"/proc/net/tcp", "/proc/net/tcp6"}) {
    const auto text = read_file(table, 16 << 20);
    if (!text.ok()) continue;
    for (const auto line : split_lines(text.value())) {
      std::vector<std::string_view> fields;
      for (const auto field : split(line, ' ')) {
        if (!field.empty()) fields.push_back(field);
      }
      // sl local_address rem_address st ... inode: the tenth; 0A is LISTEN.
      if (fields.size() < 10 || fields[3] != "0A") continue;
      const auto colon = fields[1].rfind(':');
      if (colon == std::string_view::npos || parse_u64(fields[1].substr(colon + 1), 16) != port) continue;
      sockets.push_back(fmt::format("socket:[{}]", fields[9]));
    }
  }
  if (sockets.empty()) return {};
  std::error_code failed;
  std::size_t seen = 0;
  for (fs::directory_iterator at("/proc", failed), end; !failed && at != end && seen < processes_looked_at;
       at.increment(failed), ++seen) {
    const std::string pid = at->path().filename().string();
    if (!parse_u64(pid)) continue;
    std::error_code hidden;
    for (fs::directory_iterator fd(at->path() / "fd", hidden), last; !hidden && fd != last;
         fd.increment(hidden)) {
      std::error_code gone;
      const std::string link = fs::read_symlink(fd->path(), gone).string();
      if (gone) continue;
      for (const auto& socket : sockets) {
        if (link != socket) continue;
        const auto name = read_trimmed(at->path() / "comm");
        return name.ok() ? fmt::format("pid {} ({})", pid, printable(name.value(), 32))
                         : fmt::format("pid {}", pid);
      }
    }
  }
  return {};
}

Error bind_error(const Listen& listen, int err) {
  const std::string what = fmt::format("listen on {} port {}", listen.address, listen.port);
  if (err == EACCES || err == EPERM) {
    return errno_error(what, err).with_hint(
        "ports below 1024 need a right: type `--listen :8443`, or give it with "
        "AmbientCapabilities=CAP_NET_BIND_SERVICE in the systemd unit "
        "(or `setcap cap_net_bind_service=+ep $(command -v bulkhead)`)");
  }
  if (err == EADDRINUSE) {
    const std::string holder = holder_of(listen.port);
    return Error(Errc::in_use, fmt::format("{}: in use{}", what, holder.empty() ? "" : " by " + holder),
                 holder.empty()
                     ? fmt::format("`ss -ltnp 'sport = :{}'` as root says by whom; or choose another: "
                                   "`--listen :8443`",
                                   listen.port)
                     : "stop it, or choose another port: `--listen :8443`",
                 err);
  }
  if (err == EADDRNOTAVAIL) {
    return errno_error(what, err).with_hint("`ip -brief address` lists the addresses of this host");
  }
  return errno_error(what, err);
}

}  // namespace

Result<Listener> listen_tcp(const Listen& listen, const Limits& limits) {
  BH_TRY(const auto address, parse_address(listen));
  Listener out;
  out.fd.reset(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!out.fd) return errno_error("open a TCP socket", errno);
  const int one = 1;
  ::setsockopt(out.fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  set_options(out.fd.get(), limits);
  if (::bind(out.fd.get(), reinterpret_cast<const sockaddr*>(&address.storage), address.size) != 0 ||
      ::listen(out.fd.get(), backlog) != 0) {
    return bind_error(listen, errno);
  }
  out.loopback = is_loopback(address.storage);
  return out;
}

Result<Listener> listen_local(const std::string& path, std::uint32_t mode) {
  // Made beside its place and renamed into it: never there with other rights than these, and a socket that a
  // killed daemon left behind is replaced.
  const std::string fresh = path + ".new";
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  const std::string what = "listen on " + path;
  if (path.empty() || path.front() != '/' || fresh.size() >= sizeof address.sun_path) {
    return Error(Errc::invalid, what + ": not an absolute path of at most 103 bytes");
  }
  Listener out;
  out.local = true;
  out.path = path;
  struct stat there = {};
  if (::lstat(path.c_str(), &there) == 0) {
    if (!S_ISSOCK(there.st_mode)) return Error(Errc::in_use, what + ": a file that is no socket is there");
    UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    if (probe && (::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ||
                  errno == EAGAIN)) {
      ucred holder = {};
      socklen_t size = sizeof holder;
      const bool known =
          ::getsockopt(probe.get(), SOL_SOCKET, SO_PEERCRED, &holder, &size) == 0 && holder.pid > 0;
      return Error(Errc::in_use,
                   fmt::format("{}: in use{}", what, known ? fmt::format(" by pid {}", holder.pid) : ""),
                   "another daemon runs: `bulkhead status` asks it; stop it, or choose another `--socket`");
    }
  }
  std::memset(address.sun_path, 0, sizeof address.sun_path);
  std::memcpy(address.sun_path, fresh.c_str(), fresh.size() + 1);
  out.fd.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!out.fd) return errno_error("open a Unix socket", errno);
  ::unlink(fresh.c_str());
  // Nobody but us until the mode is set.
  ::fchmod(out.fd.get(), 0600);
  if (::bind(out.fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    return errno_error(what, errno);
  }
  struct stat made = {};
  if (::chmod(fresh.c_str(), mode) != 0 || ::listen(out.fd.get(), backlog) != 0 ||
      ::lstat(fresh.c_str(), &made) != 0 || ::rename(fresh.c_str(), path.c_str()) != 0) {
    const int err = errno;
    ::unlink(fresh.c_str());
    return errno_error(what, err);
  }
  out.device = made.st_dev;
  out.inode = made.st_ino;
  return out;
}

Result<Listener> adopt(int fd, const Limits& limits) {
  Listener out;
  out.fd.reset(fd);
  int listening = 0;
  socklen_t size = sizeof listening;
  sockaddr_storage address = {};
  socklen_t address_size = sizeof address;
  if (::getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) != 0 || listening == 0 ||
      ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &address_size) != 0) {
    return Error(Errc::invalid, fmt::format("inherited descriptor {}: no listening socket", fd),
                 "the socket unit needs ListenStream= and Accept=no");
  }
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0 || ::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) {
    return errno_error(fmt::format("inherited descriptor {}", fd), errno);
  }
  out.local = address.ss_family == AF_UNIX;
  if (!out.local && address.ss_family != AF_INET && address.ss_family != AF_INET6) {
    return Error(Errc::invalid, fmt::format("inherited descriptor {}: neither TCP nor a Unix socket", fd));
  }
  out.loopback = is_loopback(address);
  if (!out.local) set_options(fd, limits);
  return out;
}

void remove_socket(const Listener& listener) {
  struct stat there = {};
  if (listener.path.empty() || ::lstat(listener.path.c_str(), &there) != 0) return;
  if (there.st_dev == listener.device && there.st_ino == listener.inode) ::unlink(listener.path.c_str());
}

Result<std::uint16_t> port_of(int fd) {
  sockaddr_storage address = {};
  socklen_t size = sizeof address;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0)
    return errno_error("getsockname", errno);
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6&>(address).sin6_port
                                             : reinterpret_cast<const sockaddr_in&>(address).sin_port);
}

Caller name_caller(const sockaddr_storage& from) {
  char text[INET6_ADDRSTRLEN] = "";
  if (from.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(from);
    ::inet_ntop(AF_INET, &v4.sin_addr, text, sizeof text);
    return {fmt::format("{}:{}", text, ntohs(v4.sin_port)), text};
  }
  if (from.ss_family != AF_INET6) return {"unknown", "unknown"};
  const auto& v6 = reinterpret_cast<const sockaddr_in6&>(from);
  if (IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) {
    ::inet_ntop(AF_INET, &v6.sin6_addr.s6_addr[12], text, sizeof text);
    return {fmt::format("{}:{}", text, ntohs(v6.sin6_port)), text};
  }
  ::inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof text);
  Caller out{fmt::format("[{}]:{}", text, ntohs(v6.sin6_port)), {}};
  // Whoever has one IPv6 address has the 2^64 beside it.
  in6_addr network = v6.sin6_addr;
  std::memset(&network.s6_addr[8], 0, 8);
  ::inet_ntop(AF_INET6, &network, text, sizeof text);
  out.address = IN6_IS_ADDR_LOOPBACK(&v6.sin6_addr) ? "::1" : std::string(text) + "/64";
  return out;
}

}  // namespace bulkhead::http
