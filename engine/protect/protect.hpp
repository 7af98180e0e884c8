// Protection as it runs: readings and leases in, once a second; alarms out; and what is wanted done on a
// thread of its own, through the journalled executor. core/protect decides. In `mode: observe` (the default)
// nothing is touched, and what would have been done is said.
//
// What is in force is never remembered here: a limit or a lock is in the journal (runs of the verb
// "protect"), a held GPU is a cordon in the book by this module's name, and a paused share is in a file that
// was durable before its ceiling was set. A killed daemon reads the three when it starts, and lifts them like
// its own.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.hpp"
#include "base/json.hpp"
#include "base/result.hpp"
#include "core/protect/protect.hpp"
#include "engine/control/control.hpp"
#include "engine/observe/observe.hpp"
#include "engine/sample/sample.hpp"

namespace bulkhead::protect {

class Guardian {
 public:
  struct Settings {
    observe::Access access = {};       // for the executor; state_dir is the journal's
    std::filesystem::path state = {};  // what cooling was like, which shares are paused
    std::filesystem::path node_file = {};
    Pace pace = {};
  };
  // Reads the node file and what a predecessor left. A mistake in the node file: the defaults hold, and the
  // page says so.
  Guardian(control::Control& control, Settings settings);
  ~Guardian();
  Guardian(const Guardian&) = delete;
  Guardian& operator=(const Guardian&) = delete;

  // Once a second; waits for nothing.
  void step(const sample::Snapshot& gpus, const control::Snapshot& leases, WallTime wall,
            std::uint64_t monotonic_ns);
  void reload();  // the node file again

  enum class Doing : std::uint8_t { nothing, would, under_way, done, failed };
  struct Measure {  // of one GPU: what is wanted, and how far it is
    Wanted wanted = {};
    Doing doing = Doing::nothing;
    std::string what = {};   // "power limit at 85 % of what it was"
    std::string words = {};  // of failed: why
    std::optional<std::uint64_t> limit_mw = {}, limit_before_mw = {};
    std::optional<unsigned> clocks_mhz = {};
  };
  struct View {
    spec::Protect settings = {};
    std::string trouble = {};                   // of the node file, the journal
    std::vector<Alarm> open = {}, recent = {};  // recent: closed, newest first
    std::vector<Measure> measures = {};         // of GPUs of which something is wanted or still lowered
    std::uint64_t opened = 0, closed = 0, actions = 0, failures = 0;
    double ramp_wait_s = 0;
    std::map<std::string, Guard::Outlook> outlook = {};  // by UUID
  };
  View view() const;
  std::string metrics() const;  // Prometheus

 private:
  struct Lowered {  // of one GPU, as the journal has it
    std::optional<Milliwatts> limit_before = {}, limit_set = {};
    bool clocks = false;
    std::optional<spec::ClockLock> clocks_before = {}, clocks_set = {};
    bool nothing() const { return !limit_before && !clocks; }
  };
  struct Paused {
    std::string gpu = {};
    std::optional<unsigned> ceiling = {};
  };

  void read_settings();
  Status read_journal();
  void read_files();
  void tell(const Decision& decision);
  void say_wanted(const std::vector<Wanted>& wanted);
  void work();
  void hold(const Wanted& wanted, const control::Snapshot& now);
  void lower(const Wanted& wanted);
  void pause(const std::vector<Wanted>& wanted);
  void end_leases(const Wanted& wanted, const control::Snapshot& now);
  Status set_limits(const Wanted& wanted);
  void put_doing(const Uuid& gpu, Doing doing, std::string words = {});
  std::chrono::milliseconds starts_in(const lease::Lease& lease);

  control::Control& control_;
  const Settings settings_;

  mutable std::mutex mutex_ = {};
  std::condition_variable wake_ = {};
  Guard guard_;
  Ramp ramp_ = {};
  View view_ = {};
  std::map<std::string, std::pair<double, double>> draws_ = {};  // by UUID: W now, W at most
  std::map<std::int64_t, double> turns_ = {};                    // when a lease may begin, monotonic seconds
  std::vector<Wanted> wanted_ = {}, said_ = {};
  bool first_ = true, ending_ = false, reload_ = false, work_ = false;
  std::string boot_ = {};
  double kept_at_ = 0;

  // Of the working thread.
  std::map<std::string, Lowered> lowered_ = {};
  std::map<std::string, Paused> paused_ = {};  // by the share's name
  std::map<std::string, double> again_at_ = {};
  std::set<std::int64_t> evicted_ = {};
  std::thread thread_ = {};
};

Json to_json(const Guardian::View& view);
std::string_view name_of(Guardian::Doing doing);

}  // namespace bulkhead::protect
