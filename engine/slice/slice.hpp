// What leases need done to the hardware: instances cut and taken away through the journalled executor, and
// proof that nothing of one tenant is left before the next comes. Everything here blocks, for seconds at
// times: the control calls it from its worker, never from the loop.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "base/ids.hpp"
#include "base/result.hpp"
#include "base/units.hpp"
#include "core/lease/lease.hpp"
#include "engine/observe/observe.hpp"

namespace bulkhead::slice {

struct Settings {
  observe::Access access = {};
  std::chrono::milliseconds grace{10'000};      // between SIGTERM and SIGKILL of what a tenant left running
  std::chrono::milliseconds lock_wait{30'000};  // for another bulkhead that changes the host
  std::filesystem::path cdi = "/run/cdi";       // below access.root; where CDI files of leases go
};

// A GPU instance with one compute instance that fills it.
struct Place {
  Uuid gpu = {};
  std::string profile = {};  // "3g.40gb"
  unsigned start = 0;        // memory slice
  friend bool operator==(const Place&, const Place&) = default;
};
struct Device {
  Place place = {};
  Uuid device = {};  // MIG UUID
  unsigned gpu_instance = 0, compute_instance = 0;
  std::int64_t generation = 0;  // of the instance, from the journal: MIG UUIDs come back, this does not
  Bytes memory = {};
  std::vector<std::string> device_nodes = {};  // "/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-caps/..."
};

// All or none: destroys first, then creates, in one run of the journal (a kill -9 is settled by the next).
// MIG mode is turned on where the first instance needs it. Everything else on those GPUs stays, and no other
// GPU is looked at. It converges: what is gone already is destroyed, and what stands there already, made by
// bulkhead and idle, is created; so after a kill the same change may be asked again. Returns the created, in
// order. With an Error the host is as it was, unless its text says what could not be taken back:
// - in_use: somebody uses what would be destroyed, or the place to be made again, or the GPU whose MIG mode
//   would change; names who
// - no_capacity: something else lies across the place
// - conflict: the instance to be destroyed is there and bulkhead did not make it; or the host reads back
//   otherwise than asked
// - not_found: no such GPU, or it has no such profile; unsupported: the GPU has no MIG
// - unavailable: another bulkhead (apply, rollback) has changed the host for `lock_wait` now
// - timeout: the driver hangs; the call was given up with its process
struct Change {
  std::vector<Place> destroy = {}, create = {};
};
Result<std::vector<Device>> change(const Settings& settings, const Change& change);

// Those that are in the hardware now, in order. Errc::not_found names the first that is not.
Result<std::vector<Device>> look(const Settings& settings, std::span<const Place> places);

// Between two tenants: ends every process that has the part's device open or computes on it (SIGTERM, grace,
// SIGKILL; found by NVML and by /proc, identified by (pid, start time)), then checks that no process and no
// memory is left. The instance stays. `left` says in words what could not be ended or is still charged;
// empty: clean. Class share: only processes of the lease's share (by its name in the registry) are ended.
struct Scrubbed {
  unsigned ended = 0;  // processes
  std::vector<std::string> left = {};
};
Result<Scrubbed> scrub(const Settings& settings, const lease::Lease& lease, const lease::Part& part);

// The CDI file of a lease (one device a part), replaced as a whole, and its end. Names: lease::Part::cdi.
Status write_cdi(const Settings& settings, const lease::Lease& lease);
Status remove_cdi(const Settings& settings, std::int64_t lease);

}  // namespace bulkhead::slice
