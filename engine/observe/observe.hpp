// Looks at a host once and returns it as a value. Reading only. What cannot be read says why; only a host of
// which nothing at all can be read is an Error.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/ids.hpp"
#include "base/result.hpp"
#include "core/inventory/inventory.hpp"

namespace bulkhead::observe {

// How much to ask the driver. On an H100 each of clocks, thresholds and MIG profiles costs it milliseconds.
enum class Detail {
  full,   // all that inventory::Host has
  plan,   // what a plan is made from: not the clocks of the moment, thresholds and VBIOS
  brief,  // what a page of the host shows; the rest says "not asked". MIG geometry only where MIG is on or
          // pending
};

// Where to look. The same three values everywhere: production, twin, a support bundle of another machine.
struct Access {
  std::filesystem::path root = "/";
  std::string nvml_library = {};         // empty: libnvidia-ml.so.1 by the loader's rules
  std::filesystem::path state_dir = {};  // the journal: which instances are ours
  Detail detail = Detail::full;
  // The GPUs to look at; empty: all. The others are left out of the value, as if the host had none of them.
  // Of those named, the memory in use is read for each MIG device too.
  std::vector<Uuid> only = {};
  // A single driver call may take this long; then the looking is given up with Errc::timeout.
  unsigned driver_timeout_ms = 20'000;
};

// What the looking cost, for those who want it kept low. The kernel and systemd are asked while the driver
// works.
struct Cost {
  struct Call {
    std::string function = {};
    std::uint64_t calls = 0, nanoseconds = 0;
  };
  std::vector<Call> driver = {};     // by NVML function, dearest first
  std::uint64_t driver_open_ns = 0;  // loading and initialising the library
  std::uint64_t kernel_ns = 0;       // /proc and /sys
  std::uint64_t units_ns = 0;        // systemd
  std::uint64_t total_ns = 0;
};

// `cost`, when given, is filled. Errc::timeout names the driver call that hangs; it cannot be interrupted, so
// a thread stays behind in it, and the process, when it exits, does so without running destructors.
Result<inventory::Host> host(const Access& access, Cost* cost = nullptr);

// What the kernel alone says of the machine: CPUs, memory, NUMA. No driver and no bus is asked.
inventory::Host of_the_kernel(const std::filesystem::path& root);

}  // namespace bulkhead::observe
