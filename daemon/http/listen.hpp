// Listening sockets: bound here or inherited from systemd, with errors that say who is in the way.
#pragma once

#include <sys/socket.h>

#include <string>
#include <vector>

#include "base/fd.hpp"
#include "daemon/http/http.hpp"

namespace bulkhead::http {

struct Listener {
  UniqueFd fd = {};
  bool local = false;                   // a Unix socket
  bool loopback = false;                // bound to 127/8 or ::1
  std::string path = {};                // of a Unix socket that we made
  std::uint64_t device = 0, inode = 0;  // of that file, so that nobody else's is removed at the end
};

Result<Listener> listen_tcp(const Listen& listen, const Limits& limits);
Result<Listener> listen_local(const std::string& path, std::uint32_t mode);
Result<Listener> adopt(int fd, const Limits& limits);
void remove_socket(const Listener& listener);
Result<std::uint16_t> port_of(int fd);

struct Caller {
  std::string from = {}, address = {};
};
Caller name_caller(const sockaddr_storage& from);

}  // namespace bulkhead::http
