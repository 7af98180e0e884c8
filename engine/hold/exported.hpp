// Whether any descriptor can still hold memory that somebody exported. Exported memory lives as long as the file it
// was exported to, which is in nobody's bytes; a descriptor of that file may be open in any process of a tenant, or on
// its way between two.
#pragma once

#include <filesystem>
#include <optional>

#include "base/fd.hpp"
#include "edge/rm/rm.hpp"
#include "engine/hold/processes.hpp"

namespace bulkhead::hold {

class Exported {
 public:
  Exported(std::filesystem::path root, Processes& processes)
      : root_(std::move(root)), processes_(processes) {}
  // False: none does. True also where it cannot be told. Looks at all processes under a seccomp filter, since a
  // process that made no call of the driver yet is known to nobody, and other tenants may be handed a descriptor.
  bool held();

 private:
  bool look();
  bool in_process(int pid);
  bool in_task(int pid, int tid);
  bool holds(int pid, int tid, int fd);
  bool on_its_way(int pid, int tid, int fd);  // descriptors in a socket
  bool carries(int pid, int tid, int fd);     // a driver file to which something was exported
  bool ask_driver(const UniqueFd& file);

  std::filesystem::path root_;
  Processes& processes_;
  struct {
    int pid = 0, tid = 0, fd = -1;
  } last_;  // where one was found: looked at first
  struct Kernel {
    bool counts = false, counts_at_listeners = false;  // descriptors on their way, in fdinfo
  };
  static Kernel try_kernel();
  std::optional<Kernel> kernel_;
  std::optional<rm::DriverFile> driver_;  // during a look
  std::uint32_t client_ = 0;
};

}  // namespace bulkhead::hold
