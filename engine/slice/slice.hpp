// What leases need done to the hardware: instances cut and taken away through the journalled executor, and
// proof that nothing of one tenant is left before the next comes. Everything here blocks, for seconds at
// times: the control calls it from its worker, never from the loop.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
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
  std::chrono::milliseconds grace{10'000};  // between SIGTERM and SIGKILL of what a tenant left running
  // True: the caller waits for a grace and touches neither the driver nor what it knows of it, until false
  // has returned. Empty: nobody wants to know.
  std::function<void(bool)> waits = {};
  std::chrono::milliseconds lock_wait{30'000};  // for another bulkhead that changes the host
  // Units of the host that may keep a GPU open, as cgroups; what is below them, too.
  std::vector<std::string> spare = {"/system.slice/nvidia-persistenced.service",
                                    "/system.slice/nvidia-fabricmanager.service",
                                    "/system.slice/nvidia-dcgm.service", "/system.slice/dcgm.service",
                                    "/system.slice/dcgm-exporter.service"};
  std::filesystem::path cdi = "/run/cdi";  // below access.root; where CDI files of leases go
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
  // GPUs whose MIG mode goes off, after `destroy`: nothing else may be left on them (Errc::in_use, or
  // conflict when bulkhead did not make it).
  std::vector<Uuid> mig_off = {};
};
Result<std::vector<Device>> change(const Settings& settings, const Change& change);

// Those that are in the hardware now, in order. Errc::not_found names the first that is not.
Result<std::vector<Device>> look(const Settings& settings, std::span<const Place> places);

// Between two tenants: ends every process that computes on the part (the driver says who) or has files open
// that are the part's alone (/proc says who: the capability nodes of a MIG device, /dev/nvidiaN of a whole
// GPU, the IOMMU group of one passed through; open in any thread, mapped, in any container). SIGTERM to all,
// one grace, then SIGKILL, with what they made of themselves meanwhile; each by (pid, start time). Then it
// checks that no process and no memory is left. The instance stays. Spared is who looks after the machine and
// does not compute: Settings::spare; bulkhead itself; root's own processes outside containers that were there
// before the lease and have not opened /dev/nvidia-uvm. `left` says in words what could not be ended or is
// still charged; empty: clean. What no file of /proc shows is a descriptor under way in a Unix socket: only
// destroying the instance (Errc::in_use) proves that there is none. Class share: ends the processes of the
// share `share_name` in the registry, and none else. A process without a context that only hands its
// descriptor on to child after child may slip through as well. Takes root with CAP_SYS_PTRACE, CAP_KILL and
// CAP_SYS_ADMIN; Errc::permission without. Asking again is fine.
struct Scrubbed {
  unsigned ended = 0;  // processes
  std::vector<std::string> left = {};
};
// A program of a lease of class share runs under this name: bulkhead share run --name.
std::string share_name(std::int64_t lease);
Result<Scrubbed> scrub(const Settings& settings, const lease::Lease& lease, const lease::Part& part);

// The same question for many parts at once, without a hand laid on anybody: one look at the driver and one at
// /proc answer for all of them. True: scrub would end nobody and find nothing left. What this look cannot be
// sure of (processes that come up faster than they can be looked into) is looked at three times, as scrub
// does. False: to be scrubbed. One answer each, in order.
struct Held {
  const lease::Lease& lease;
  const lease::Part& part;
};
Result<std::vector<bool>> clean(const Settings& settings, std::span<const Held> parts);

// The CDI file of a lease, replaced as a whole, and its end. One device a part, named by lease::Part::cdi,
// and where there are several, "bulkhead.dev/slice=lID" for all of them. It gives a container the device
// files and the environment; the driver's libraries are the image's or the runtime's business. Classes mig
// and exclusive; Errc::unsupported for the others, whose device files would give away more than the lease
// has.
Status write_cdi(const Settings& settings, const lease::Lease& lease);
Status remove_cdi(const Settings& settings, std::int64_t lease);

}  // namespace bulkhead::slice
