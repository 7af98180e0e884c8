// The simulated host's systemd: a process that answers for org.freedesktop.systemd1 on
// D/root/run/systemd/private, backed by State::units. bulkhead talks to it as it talks to a real one, and so
// does the real `systemctl` where D/root/run/systemd is mounted over /run/systemd. Jobs end at once.
#pragma once

#include <filesystem>

#include "base/result.hpp"

namespace bulkhead::twin::init {

struct Options {
  // While a unit with "fabricmanager" in its name is active, TCP on this loopback port accepts connections,
  // as the real Fabric Manager's command port does. 0: none. A port that is taken makes the unit fail.
  unsigned fabric_manager_port = 0;
};

// Starts the process, detached; returns when the socket answers. Starting it twice is no error. The process
// ends with stop(), and by itself within a second of D/state.bin being removed.
Status start(const std::filesystem::path& directory, const Options& options = {});

// Ends it. No error when none runs.
Status stop(const std::filesystem::path& directory);

// Whether it runs: a pid, or 0.
int running(const std::filesystem::path& directory);

}  // namespace bulkhead::twin::init
