// What systemd says to a service and hears from it: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3),
// without its library.
#pragma once

#include <chrono>
#include <optional>
#include <string_view>
#include <vector>

#include "base/result.hpp"

namespace bulkhead::serve {

// "READY=1\nSTATUS=serving". Nothing without NOTIFY_SOCKET; never blocks.
void notify(std::string_view state);
// WATCHDOG_USEC, when it is for this process.
std::optional<std::chrono::microseconds> watchdog();
// LISTEN_FDS, when they are for this process; close-on-exec from here on. The variables are taken out of the
// environment.
Result<std::vector<int>> listen_fds();

}  // namespace bulkhead::serve
