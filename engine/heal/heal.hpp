// Healing as it runs: open incidents in, once a second; what core/heal decides is shown, and in `heal: act`
// done, one act at a time, on a thread of its own. Every act goes through the same stages: no new leases,
// those it touches end with the reason, everybody lets go, the act, a check of the hardware, and the door is
// open again. A GPU whose check fails stays shut until a person opens it.
//
// Each stage is durable in `healing.json` before it begins, and may be begun again: a daemon that was killed
// goes on where it was. What is shut is a cordon in the book, so it survives reboots.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.hpp"
#include "base/json.hpp"
#include "base/result.hpp"
#include "core/diagnose/diagnose.hpp"
#include "core/heal/heal.hpp"
#include "core/spec/spec.hpp"
#include "edge/process/process.hpp"
#include "engine/control/control.hpp"
#include "engine/observe/observe.hpp"
#include "engine/sample/sample.hpp"
#include "engine/slice/slice.hpp"

namespace bulkhead::heal {

enum class Doing : std::uint8_t { under_way, helped, failed, quarantined };
std::string_view name_of(Doing doing);

struct Task {  // an act that was begun
  std::int64_t id = 0;
  std::string incident = {}, cause = {};
  Act act = Act::none;
  Uuid gpu = {};
  PciAddress pci = {};
  unsigned index = 0;
  std::optional<unsigned> gpu_instance = {};
  int pid = 0;
  std::uint64_t start_time = 0;
  std::uint64_t count = 0;  // events of the incident when it was decided
  std::vector<Step> steps = {};
  std::size_t stage = 0;  // of steps: the one at hand
  bool ours = false;      // the cordon is
  std::string boot = {};
  std::int64_t at_s = 0, ended_s = 0;
  std::int64_t ended_ms = 0;  // what comes later is another event
  Doing doing = Doing::under_way;
  std::vector<std::int64_t> leases = {};     // that were ended
  std::vector<slice::Place> destroyed = {};  // instances taken away, of recreate-slice
  std::vector<slice::Place> again = {};      // of those, to be made anew
  std::vector<std::string> said = {};        // what happened, in words
};
Json to_json(const Task& task);
Result<Task> task_from_json(const Json& json);  // of the file

class Healer {
 public:
  struct Place {
    observe::Access access = {};
    std::filesystem::path state = {};
    std::filesystem::path node_file = {};
    // Whoever of this daemon is in the driver lets go of it (true), and comes back (false). May be empty.
    std::function<bool(bool)> let_go = {};
    std::filesystem::path program = "/proc/self/exe";  // whose verb `check-gpu` is the check
    unsigned grace_ms = 10'000;
    unsigned check_ms = 120'000;  // the longest a check or a reset may take
  };
  // Told when an incident is mended, with what did it. On the healer's thread; must not wait for it.
  using Mended = std::function<void(const std::string& incident, const std::string& why)>;
  Healer(control::Control& control, Place place, Mended mended);
  ~Healer();
  Healer(const Healer&) = delete;
  Healer& operator=(const Healer&) = delete;

  // Once a second; waits for nothing.
  void step(std::span<const diagnose::Incident> open, const sample::Snapshot& gpus,
            const control::Snapshot& leases, WallTime wall);
  void reload();  // the node file again

  struct Open {
    std::string incident = {};
    std::optional<unsigned> index = {};  // of the GPU
    Decision decision = {};
  };
  struct View {
    spec::Heal settings = {};
    std::string trouble = {};
    std::vector<Open> open = {};
    std::vector<Task> tasks = {};  // newest first
  };
  View view() const;
  std::string metrics() const;  // Prometheus

 private:
  void read_settings();
  void read_file();
  void look();
  // Who has device nodes of the GPUs open beside this program: one answer each, in order. Walks /proc: on the
  // healer's thread alone.
  Result<std::vector<std::vector<process::Opener>>> openers(
      std::span<const std::filesystem::path> nodes) const;
  void look_for_holders();
  bool keep();
  bool settled(const diagnose::Incident& incident) const;
  void work();
  void run(Task task);
  bool put(const Task& task);  // false: it could not be made durable
  Status shut(Task& task);
  Status evict(Task& task);
  Status act(Task& task);
  Status nobody_has(Task& task);
  Status check(Task& task);
  Status open(const Task& task);
  void away(bool out);
  bool ending() const;
  void pause(unsigned ms);

  control::Control& control_;
  const Place place_;
  const Mended mended_;
  mutable std::mutex mutex_ = {};
  std::condition_variable wake_ = {};
  View view_ = {};
  std::vector<Task> tasks_ = {};  // oldest first, at most most_tasks
  std::optional<Task> next_ = {};
  std::int64_t last_id_ = 0;
  bool ending_ = false, reload_ = false, away_ = false, holders_wanted_ = false, at_work_ = false;
  std::string boot_ = {};
  std::set<std::string> fabric_ = {};                             // GPUs that an NVSwitch joins, by UUID
  std::map<std::string, std::filesystem::path> nodes_ = {};       // /dev/nvidiaN by UUID
  std::map<std::string, std::vector<std::string>> holders_ = {};  // who has it open, of GPUs an act may reset
  std::int64_t holders_at_ = 0;                                   // seconds, when that was asked for
  std::string partitions_ = {};  // why a restart of the Fabric Manager would lose partitions
  bool looked_ = false;          // for those; nothing is done before
  std::string damaged_ = {};     // why it is not known what was done before: nothing is done
  std::thread thread_ = {};
};
Json to_json(const Healer::View& view);

// "pid 4711 (dcgm) in /system.slice/nvidia-dcgm.service has it open, to end it: systemctl stop
// nvidia-dcgm.service"
std::string words_of(const process::Opener& holder);

// ---- the check (bulkhead check-gpu), in a process of its own: a broken GPU takes that alone
// What the driver says of the GPU, and with `device` (a GPU's or MIG device's UUID) whether memory holds what
// is written, and copies arrive: {"ok": true, "said": [...], "devices": [...]}.
Json check_health(const observe::Access& access, const Uuid& gpu);
Json check_device(const std::string& cuda_library, const std::string& device);

// The Fabric Manager's unit: as in the node file, or as shipped.
std::string fabric_unit(const std::filesystem::path& node_file);

}  // namespace bulkhead::heal
