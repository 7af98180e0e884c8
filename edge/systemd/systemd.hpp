// systemd over D-Bus. libsystemd is dlopen'ed, so a host without it is `unavailable`, not a crash. As root
// the manager's own socket ROOT/run/systemd/private is used (no bus daemon in between); otherwise the system
// bus.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "base/result.hpp"
#include "core/inventory/inventory.hpp"

namespace bulkhead::systemd {

class Systemd {
 public:
  static Result<std::unique_ptr<Systemd>> connect(const std::filesystem::path& root);
  ~Systemd();
  Systemd(const Systemd&) = delete;
  Systemd& operator=(const Systemd&) = delete;

  // A unit that systemd does not know has load_state "not-found".
  Result<inventory::SystemdUnit> unit(const std::string& name);
  // Wait for the job; `deadline_ms` bounds it.
  Status start(const std::string& name, unsigned deadline_ms);
  Status stop(const std::string& name, unsigned deadline_ms);
  Status enable(const std::string& name);
  Status disable(const std::string& name);

 private:
  Systemd();
  struct Bus;
  std::unique_ptr<Bus> bus_;
};

}  // namespace bulkhead::systemd
