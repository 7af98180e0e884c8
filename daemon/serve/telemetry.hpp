// What the GPUs say, joined with who has them, once a second: the one thread that looks at both, and hands
// them to whoever lives by that beat (the ledger, protection). /metrics and the API read its last look, and
// wait for no driver.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock.hpp"
#include "daemon/serve/log.hpp"
#include "engine/control/control.hpp"
#include "engine/monitor/monitor.hpp"
#include "engine/sample/sample.hpp"

namespace bulkhead::serve {

class Telemetry {
 public:
  // The same beat's values, leases and times. On the telemetry thread; what it throws ends the daemon, what
  // it waits for holds the others.
  using Step = std::function<void(const sample::Snapshot&, const control::Snapshot&, WallTime,
                                  std::uint64_t monotonic_ns)>;

  Telemetry(monitor::Monitor& monitor, const control::Control& control, Log& log);
  ~Telemetry() { end(); }
  Telemetry(const Telemetry&) = delete;
  Telemetry& operator=(const Telemetry&) = delete;

  void add(std::string name, Step step);  // before begin()
  void begin();
  void end();

  // ---- any thread
  std::shared_ptr<const sample::Snapshot> seen() const;  // of the last beat; never nullptr
  monitor::Monitor& monitor() const { return monitor_; }
  struct Cost {
    std::string name = {};
    std::uint64_t steps = 0, nanoseconds = 0;
  };
  std::vector<Cost> costs() const;
  std::size_t history_bytes() const;

 private:
  void serve();
  void look();
  void hurry(const sample::Snapshot& gpus, const control::Snapshot& leases);

  monitor::Monitor& monitor_;
  const control::Control& control_;
  Log& log_;
  std::vector<std::pair<std::string, Step>> steps_ = {};
  mutable std::mutex mutex_ = {};
  std::condition_variable wake_ = {};
  std::shared_ptr<const sample::Snapshot> seen_;
  std::vector<Cost> costs_ = {};
  std::size_t history_bytes_ = 0;
  bool ending_ = false;
  // Of the thread.
  std::map<std::string, std::vector<std::int64_t>> had_ = {};  // leases by GPU, as of the beat before
  std::string trouble_ = {};
  std::uint64_t beats_ = 0;
  std::thread thread_ = {};
};

// Who has a slice, or a whole GPU, now.
struct Holder {
  std::int64_t lease = 0;
  std::string tenant = {}, profile = {};
};
class Holders {
 public:
  explicit Holders(const control::Snapshot& now);
  // nullptr: nobody. Of a GPU: who has it whole; shares of it have no one.
  const Holder* of_gpu(const Uuid& gpu) const;
  const Holder* of_slice(const Uuid& gpu, unsigned gpu_instance) const;

 private:
  std::map<std::pair<std::string_view, unsigned>, Holder> all_ = {};  // views into the snapshot given
};

}  // namespace bulkhead::serve
