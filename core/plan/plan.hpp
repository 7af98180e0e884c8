// A plan is a value: the ordered steps from the host as observed to the node file as written, each with its
// reason, what it costs whom, and its undo. Made by a pure function; printed, compared, stored and tested
// before anything is touched. Success of an apply is that the next plan is empty.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/ids.hpp"
#include "base/json.hpp"
#include "base/units.hpp"
#include "core/inventory/inventory.hpp"
#include "core/mig/mig.hpp"
#include "core/passthrough/passthrough.hpp"
#include "core/spec/spec.hpp"

namespace bulkhead::plan {

// ---- the steps: one struct a kind, holding the state before and after, so that undo is a swap
struct SetPersistence {
  Uuid gpu = {};
  bool before = false, after = false;
};
struct SetMigMode {
  Uuid gpu = {};
  bool before = false, after = false;
};
struct DestroyInstance {  // with its compute instances, which go first; undo creates it again at the same
                          // place
  Uuid gpu = {};
  unsigned gpu_instance = 0;
  std::string profile = {};
  unsigned profile_id = 0;
  mig::Placement place = {};                    // names the instance in an undo: the driver chose its id
  std::vector<unsigned> compute_profiles = {};  // NVML_COMPUTE_INSTANCE_PROFILE_* of those destroyed with it
};
struct CreateInstance {  // GPU instance and its compute instances
  Uuid gpu = {};
  std::string profile = {};
  unsigned profile_id = 0;
  mig::Placement place = {};
  std::vector<unsigned> compute_slices = {};  // one compute instance each; empty: one that fills it
};
struct CreateCompute {  // mends a GPU instance that has none (R37): one compute instance that fills it
  Uuid gpu = {};
  unsigned gpu_instance = 0;
  std::string profile = {};
  mig::Placement place = {};
  bool remove = false;  // true in the undo: destroy the compute instance again
};
struct SetPowerLimit {
  Uuid gpu = {};
  Milliwatts before = {}, after = {};
};
struct LockClocks {  // empty `after` unlocks; NVML cannot read a lock back, so `before` is what the journal
                     // knows
  Uuid gpu = {};
  std::optional<spec::ClockLock> before = {}, after = {};
};
struct SetGovernor {
  std::string before = {}, after = {};
};
struct SetUnit {
  std::string unit = {};
  bool enabled_before = false, enabled_after = false;
  bool active_before = false, active_after = false;
  std::optional<unsigned> probe_port = {};  // TCP on loopback that must answer afterwards
};
struct SetFile {          // a whole file of ours: kernel arguments drop-in, modprobe.d
  std::string path = {};  // absolute on the host
  std::optional<std::string> before = {}, after = {};  // contents; empty: the file is absent
  std::vector<std::string> then = {};       // command to run afterwards: {"update-grub"}; may be empty
  std::vector<std::string> then_undo = {};  // what the undo runs afterwards; undo_of swaps the two
};

// Of PCI devices; core/passthrough decides on them.
using passthrough::LoadModules;
using passthrough::Prove;
using passthrough::SetDriver;
using passthrough::SetPermission;
using passthrough::SetVirtualFunctions;

using Action = std::variant<SetPersistence, SetMigMode, DestroyInstance, CreateInstance, CreateCompute,
                            SetPowerLimit, LockClocks, SetGovernor, SetUnit, SetFile, LoadModules,
                            SetVirtualFunctions, SetDriver, SetPermission, Prove>;

// "set-mig-mode": the stable name of a step kind in JSON, the journal and docs.
std::string_view kind_of(const Action& action);
// The action that takes it back.
Action undo_of(const Action& action);
// One line for people: "gpu 3: create 3g.40gb at 0-3".
std::string describe(const Action& action, const inventory::Host* host = nullptr);
Json to_json(const Action& action);
Result<Action> action_from_json(const Json& json);  // of the journal; outside data by then

// Somebody loses something.
struct Loss {
  std::string who = {};   // "pid 4711 (python3), cgroup /tenant-a"
  std::string what = {};  // "its MIG device 3g.40gb (gi 1)"
};

struct Step {
  Action action = {};
  std::string why = {};
  std::vector<Loss> losses = {};
  bool reboot_owed = false;
  std::vector<inventory::Holder> evicts = {};  // with Options::evict: who must be ended before the action
};

struct Plan {
  std::vector<Step> steps = {};
  std::vector<std::string> notes = {};  // foreign instances left alone, what is already as wanted
  bool empty() const { return steps.empty(); }
  bool reboot_owed() const;
};

// A refusal is an answer. Every reason names the thing, the cause and the way out.
struct Reason {
  std::string subject = {};  // "gpu 3 (GPU-...)", "host"
  std::string why = {};
  std::vector<inventory::Holder> holders = {};
  std::string way_out = {};  // in words and commands
};
struct Refusal {
  std::vector<Reason> reasons = {};  // all of them at once
};

// What the journal knows and the hardware cannot say.
struct Remembered {
  struct Lock {
    Uuid gpu = {};
    spec::ClockLock range = {};
  };
  std::vector<Lock> clock_locks = {};  // set by us, this boot
  struct File {
    std::string path = {};
    std::optional<std::string> content = {};  // read now, not remembered; nullopt: absent
  };
  std::vector<File> files = {};  // the files the node file may touch, as they are
  // The bus, read now, where the node file has a part for it and the tree below the root is this machine's.
  std::optional<passthrough::Tree> tree = {};
  std::vector<passthrough::Target> proved = {};       // this boot, and bound ever since
  std::vector<passthrough::Original> originals = {};  // what functions had before they were given away
};

struct Options {
  bool evict = false;  // busy instances and GPUs may be taken from their holders
  bool adopt = false;  // foreign instances count as ours
  // Devices that go back to the host are removed from the bus and found anew on the way.
  bool rescan = false;
};

std::variant<Plan, Refusal> make(const spec::NodeFile& node, const inventory::Host& host,
                                 const Remembered& remembered, const Options& options);

// Which pool each GPU of the host is in by the node file, in the host's order: the one place where rules meet
// GPUs. A GPU that no rule selects, or more than one, is in none, and `why` says so.
struct PoolOf {
  Uuid gpu = {};
  unsigned index = 0;
  std::optional<spec::Mode> mode = {};  // empty: none
  bool dynamic = false;                 // Mode::mig: its instances belong to leases
  std::string why = {};                 // of an empty mode: "no rule of the node file selects it"
  std::vector<std::size_t> rules = {};  // those that select it, by their place in NodeFile::gpus
};
std::vector<PoolOf> pools(const spec::NodeFile& node, const inventory::Host& host);

// Whether a rule is for this GPU.
bool selects(const spec::Select& select, const inventory::Gpu& gpu);

// Whether `make` wants Remembered::tree.
bool needs_tree(const spec::NodeFile& node);

// The files whose content `make` wants to see in Remembered.
std::vector<std::string> files_of_interest(const spec::NodeFile& node, const inventory::Host& host);

// The units whose state `make` wants to see in Host::units, by full name ("nvidia-fabricmanager.service").
std::vector<std::string> units_of_interest(const spec::NodeFile& node);

Json to_json(const Plan& plan, const inventory::Host& host);
Json to_json(const Refusal& refusal);

}  // namespace bulkhead::plan
