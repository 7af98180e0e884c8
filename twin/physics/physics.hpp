// How boards warm up, draw power and throttle. Pure: the same state and the same time give the same state.
// Two thermal nodes a GPU (die and heat sink), power that follows the load with inertia, clocks that give way
// to the power cap and to heat, and the driver's nanosecond counters of how long they did.
#pragma once

#include <cstdint>
#include <optional>

#include "twin/state/state.hpp"

namespace bulkhead::twin::physics {

// What NVLink carries into a board under the fault `link_errors`: flits of 16 bytes a second.
inline constexpr double faulty_link_flits = 1e9;
inline constexpr double flit_bytes = 16;
// Of a million flits into this board, how many are damaged; nullopt: there is no such fault.
std::optional<unsigned> damaged_flits(const State& state, std::uint32_t gpu);

// Moves the whole machine by `dt_ns` of simulated time: inside, in steps of at most 100 ms (the time
// constants are seconds); a very long time is cut short once every board has settled.
void step(State& state, std::uint64_t dt_ns);

// With realtime on, brings the clock up to `host_monotonic_ns`; otherwise nothing. True when something moved.
bool follow(State& state, std::uint64_t host_monotonic_ns);

// Device memory in use on a GPU, or on one of its instances: what its processes hold. Bytes.
std::uint64_t memory_used(const State& state, std::uint32_t gpu, std::uint32_t gpu_instance = none);

}  // namespace bulkhead::twin::physics
