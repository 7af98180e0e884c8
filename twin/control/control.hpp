// Life of a twin: make it, change its world, run programs in it, take it away. A twin is a directory D with
// D/state.bin, D/rm.bin (the driver's objects and what GPUs run: twin/rm), D/root (the host's files), D/lib (the
// driver's libraries) and D/profile.yaml; nothing else is remembered.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.hpp"
#include "base/result.hpp"
#include "twin/ask/ask.hpp"
#include "twin/profile/profile.hpp"
#include "twin/state/state.hpp"

namespace bulkhead::twin {

struct UpOptions {
  std::string profile = {};                 // a name of profiles(), or
  std::filesystem::path profile_file = {};  // a file of one's own
  std::filesystem::path directory = {};     // empty: default_directory(profile)
  std::filesystem::path library =
      {};                            // empty: libnvidia-ml.so.1 beside the program or in ../lib/bulkhead/twin
  std::uint64_t seed = 1;            // decides UUIDs and serial numbers
  bool realtime = true;              // false: time moves by step() only
  bool init = true;                  // start the pretend systemd
  unsigned fabric_manager_port = 0;  // TCP port on which the pretend Fabric Manager listens; 0: none
};

// $XDG_RUNTIME_DIR, else /run where it may be written, else /tmp; then bulkhead/twin/NAME.
std::filesystem::path default_directory(std::string_view name);

Result<std::filesystem::path> up(const UpOptions& options);
// Refuses a directory that is no twin. Everything below it goes.
Status down(const std::filesystem::path& directory);

struct Running {
  std::string name = {}, profile = {};
  std::filesystem::path directory = {};
  int init_pid = 0;
};
// Twins in the default place.
std::vector<Running> running();

// Opens a twin's state; the error's hint says how to start one.
Result<std::unique_ptr<StateFile>> open_twin(const std::filesystem::path& directory);

// Everything a person may want to see of a twin.
Result<Json> status(const std::filesystem::path& directory);

// ---- the world
Status step(const std::filesystem::path& directory, std::uint64_t nanoseconds);
// A new boot id, time from zero, the kernel arguments of boot/grub/grub.cfg; MIG instances, processes, clock
// locks, limits and the cpufreq governor are gone, and the MIG mode of Hopper and later; enabled units run.
// Module options of etc/modprobe.d have no effect on the twin's driver. What was broken stays broken.
Status reboot(const std::filesystem::path& directory);

struct Load {
  std::optional<double> watts = {};  // what the board draws, whatever runs on it; limits still hold
  std::optional<double> busy = {};   // 0..1 beyond what attached processes ask
  std::optional<double> inlet = {};  // C, of the air that cools the board; stays until set again
};
// Nothing set: the load ends.
Status load(const std::filesystem::path& directory, std::uint32_t gpu, const Load& wanted);

struct Attach {
  std::uint32_t gpu = 0, gpu_instance = none, compute_instance = none;
  std::optional<std::uint32_t> pid = {};  // a real process; empty: a simulated one with a number of its own
  std::string name = {};                  // empty: the real process's, or "python3"
  std::uint64_t memory_bytes = 0;
  double busy = 0;
  bool graphics = false;
};
Result<std::uint32_t> attach(const std::filesystem::path& directory, const Attach& wanted);  // the pid
// Ends a process's hold on every GPU; `pid` empty: all of them.
Status detach(const std::filesystem::path& directory, std::optional<std::uint32_t> pid);

// An XID: an event for NVML's event sets and a line in the kernel log.
Status xid(const std::filesystem::path& directory, std::uint32_t gpu, std::uint32_t code,
           std::optional<std::uint32_t> pid);

// ---- faults
struct FaultRequest {
  std::string name = {};       // of fault_names()
  std::uint32_t gpu = none;    // none: every GPU
  std::string function = {};   // for the *-call and kill-* faults: an NVML function
  std::int32_t code = 999;     // for fail-call: the nvmlReturn_t to answer
  std::uint64_t delay_ms = 0;  // for hang-call and slow-destroy
  std::uint32_t times = none;  // how often; none: until mended
  std::uint64_t count = 1;     // for ecc: how many errors
};
struct FaultName {
  std::string_view name, summary;
};
const std::vector<FaultName>& fault_names();
Status break_it(const std::filesystem::path& directory, const FaultRequest& request);
// Empty name: everything is mended. A lost GPU comes back as after a reset.
Status mend(const std::filesystem::path& directory, const std::string& name, std::uint32_t gpu);

// What nvidia-smi --gpu-reset does on a board: refused while a process is on it; then instances go, volatile
// counters start anew and a pending row remapping is done. A GPU that fell off the bus stays off.
Status reset(const std::filesystem::path& directory, std::uint32_t gpu);

// ---- programs
// Runs a
// program in the twin and returns its exit code (128 + signal when killed). As root in a mount namespace of
// its own, where the twin's /sys, /proc entries, /dev/nvidia* and systemd socket lie over the real ones, so
// that every program sees them, also those that make raw system calls; otherwise by library path alone.
Result<int> run(const std::filesystem::path& directory, const std::vector<std::string>& command);

// The environment that `run` adds, as NAME=value.
std::vector<std::string> environment(const std::filesystem::path& directory);

// ---- truth
struct CompareOptions {
  std::string profile = {};
  std::filesystem::path real = "libnvidia-ml.so.1";  // by the loader's rules, or a path
  std::filesystem::path recording = {};              // instead of a real library: a recorded answer (JSON)
  std::filesystem::path library = {};                // the twin's, as for up()
  unsigned gpu = 0;                                  // of the real machine; the twin's is always its first
};
struct Comparison {
  std::size_t asked = 0;
  std::vector<Difference> differences = {};
};
// Asks the real library and a fresh twin the same read-only questions.
Result<Comparison> compare_with_real(const CompareOptions& options);

}  // namespace bulkhead::twin
