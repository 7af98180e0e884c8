// The one place that reads a clock. Core takes `now` as an argument instead.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace bulkhead {

using WallTime = std::chrono::sys_time<std::chrono::milliseconds>;

WallTime wall_now();
std::string rfc3339(WallTime time);  // 2026-11-22T14:05:09.123Z

std::uint64_t monotonic_ns();

}  // namespace bulkhead
