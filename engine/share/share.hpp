// Software slices: tenants that share one GPU's time and memory, with programs that know nothing of it.
//
// There is no daemon. Each tenant has a launcher (`bulkhead share run`, waits for the program) and an arbiter
// (a process of its own that holds the tenant: engine/hold). The arbiters of a host know each other through
// one directory, the registry; each computes the same plan (core/sharing) from it and carries out its own
// tenant's line, so none can take another down. An arbiter that dies is started again by its launcher; a
// launcher that dies leaves the arbiter holding; when both are gone the cap still holds (the kernel refuses
// what nobody answers) and any other arbiter puts the tenant's groups back on the GPU.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/json.hpp"
#include "base/result.hpp"
#include "base/units.hpp"
#include "core/sharing/sharing.hpp"

namespace bulkhead::share {

// Where things are. A twin differs in these values alone.
struct Place {
  std::filesystem::path root = "/";
  std::string nvml_library = {};
  std::filesystem::path run_dir() const { return root / "run/bulkhead/share"; }
};

enum class OnEscape { report, pause, end };  // what the audit does about device memory beyond the cap

// What a tenant asked for: ID.json in the registry; `share set` rewrites it.
struct Asked {
  std::uint64_t id = 0;  // pid of the launcher, while that lives
  std::string name = {};
  sharing::Class cls = sharing::Class::batch;
  unsigned weight = 100;
  std::optional<unsigned> ceiling = {};          // percent
  std::optional<std::uint64_t> latency_us = {};  // interactive
  std::optional<Bytes> memory = {};              // cap on each GPU; none: no cap
  std::string gpu = {};                          // uuid, as given to the program in CUDA_VISIBLE_DEVICES
  OnEscape on_escape = OnEscape::report;
  bool mps = false;  // a client of the GPU's MPS server: one fault domain, no time held
  bool held = true;  // false: no listener; the guard caps memory and gates launches
  std::vector<std::string> command = {};
};

// One of the tenant's compute channel groups, as others need it to put it back on the GPU.
struct GroupNow {
  int pid = 0;
  std::uint64_t start_time = 0;
  std::uint32_t gpu = 0;  // RM device instance
  std::uint32_t client = 0, subdevice = 0, handle = 0;
  std::vector<std::uint32_t> channels = {};
  int fd = -1;  // the process's descriptor of its driver file
  std::uint64_t slice_us = 0;
  bool on = true;
};

// What is so now: ID.now.json, written by the arbiter when it changes and once a second.
struct Now {
  int arbiter = 0;
  int program = 0;  // its first process
  std::vector<int> processes = {};
  std::vector<GroupNow> groups = {};
  std::optional<double> busy = {};  // share of the GPU's time over the last seconds (NVML), 0..1
  Bytes used = {}, managed = {};
  std::uint64_t refused = 0, escapes = 0, self_set = 0, reasserted = 0;
  std::optional<Bytes> beyond = {};  // device memory beyond what the ledger knows, by the last audit
  std::uint64_t off_cost_us = 0, on_cost_us = 0;  // of the last turn
  std::uint64_t in_force_us = 0;  // from the first compute group's birth to its slice being read back
  std::vector<std::string> troubles = {};  // what the arbiter could not do
};

struct Tenant {
  Asked asked;
  std::optional<Now> now = {};
  bool alive = true;        // its launcher or arbiter holds the lock
  sharing::Line line = {};  // what the plan gives it, when it has groups
};

// The table of a host's tenants, with each GPU's plan worked out. Dead tenants' files are left out.
Result<std::vector<Tenant>> list(const Place& place);
// Changes a live tenant, named by name or id. Refused with reasons when the new plan would refuse it.
Result<Asked> set(const Place& place, std::string_view who, const std::function<Status(Asked&)>& change);

Json to_json(const Tenant& tenant);

// The GPU a tenant goes to, as its UUID: `wanted` is an index, a UUID, or empty for the one with the fewest
// tenants. Read from the driver's /proc files: quick, and NVML must not be opened before a fork.
Result<std::string> choose_gpu(const Place& place, std::string_view wanted);
// libbulkhead-guard.so beside this program or in ../lib/bulkhead.
Result<std::string> find_guard();

struct Run {
  Asked asked;
  std::string user = {};  // run the program as this user; empty: as the caller
  bool guard =
      false;  // no listener: preload the guard (cooperative cap), time held all the same where possible
  std::string guard_library = {};
};
// Runs the program as a tenant and waits. The program's exit code, 128 + signal when it was killed.
Result<int> run(const Place& place, Run request);

// Does this driver obey? Runs two spinning programs as tenants for a few seconds.
struct SelfTest {
  bool slices = false, pauses = false, memory = false;
  double asked = 0, received = 0;       // share of the first of two
  double paused_rate = 0;               // of a paused program, against running free
  std::uint64_t off_us = 0, on_us = 0;  // medians
  std::uint64_t in_force_us = 0;
  std::vector<std::string> notes = {};
};
Result<SelfTest> selftest(const Place& place, const std::string& gpu,
                          const std::function<void(std::string_view)>& say);

// What `selftest` found last on this boot and driver; nullopt: never run.
std::optional<sharing::Costs> remembered_costs(const Place& place);

// The spinning program of the self-test: millisecond kernels until the board says stop; or, with `allocate`,
// one allocation. Exit code: 0 done, 2 could not (says why on stderr), 3 the allocation was refused as out of
// memory.
int spin(std::uint64_t allocate, const std::filesystem::path& board);

}  // namespace bulkhead::share
