// The daemon's ear: the kernel's log, the driver's events and the Fabric Manager's words followed on a thread
// of its own, joined into incidents with the tenant's name, and kept open until something closes them: an act
// that mended it, the driver's own word, a driver loaded anew, a boot, or a time without another event.
//
// Durable in `incidents.json`, before anybody is told: the events themselves, as they were read and with
// whose they were found to be, how far the logs are read, the incidents' names, and what was closed
// and why. A daemon that starts again goes on behind the last record, so it neither repeats an incident nor
// loses one that the log still has. Events of the driver that no line of the log tells of are lost while
// nobody follows them. All is bounded: events by number and by age, of storms some go.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock.hpp"
#include "base/json.hpp"
#include "base/result.hpp"
#include "core/diagnose/diagnose.hpp"
#include "edge/events/events.hpp"
#include "engine/control/control.hpp"
#include "engine/diagnose/diagnose.hpp"

namespace bulkhead::incidents {

// The driver's events, followed by a process of its own.
using Ear = std::shared_ptr<events::Watch>;

struct Incident {
  diagnose::Incident what = {};
  bool open = true;
  std::string closed_why = {};  // of one that is not open
  std::optional<std::int64_t> closed_ms = {};
};

class Watcher {
 public:
  struct Settings {
    std::filesystem::path root = "/";
    std::filesystem::path state = {};
    std::string nvml_library = {};
    std::function<void(diagnose::Evidence&)> name = {};  // puts a tenant to it; on the watcher's thread
    // `PROGRAM follow-faults --fd 3 --library LIBRARY` follows the driver's events; empty: nobody does.
    std::string program = "/proc/self/exe";
    std::string fabric_unit = "nvidia-fabricmanager.service";  // the Fabric Manager's, of the node file
    std::int64_t quiet_s = 86'400;                             // without another event: closed by itself
    std::int64_t quiet_process_s = 3'600;   // the same of what reached no further than a process
    std::int64_t keep_s = 7 * 86'400;       // events, and incidents with them
    std::size_t most = 8'192;               // events
    std::uint64_t look_ns = 5'000'000'000;  // processes are looked at this often
  };
  explicit Watcher(Settings settings);
  ~Watcher() { end(); }
  Watcher(const Watcher&) = delete;
  Watcher& operator=(const Watcher&) = delete;

  void end();  // follows no more: before what `name` asks goes; what is known may be read on

  // ---- any thread
  // Gravest first. Never nullptr. Those open now.
  std::shared_ptr<const std::vector<diagnose::Incident>> open(WallTime now) const;
  // Open as it stands; another event opens it again. False: there is no such incident open.
  bool close(const std::string& id, const std::string& why, WallTime now);
  // Lets go of the driver, whose MIG mode or reset wants no clients; the kernel's log is followed meanwhile.
  // False: not within `ms`. Rests are counted: the last resume() ends them.
  bool rest(unsigned ms);
  void resume();

  struct View {
    std::vector<Incident> incidents = {};
    std::vector<std::string> notes = {};  // sources that cannot be read, losses
    std::uint64_t kernel_events = 0, driver_events = 0, lost = 0;
    bool kernel = false, driver = false;
  };
  View view(WallTime now) const;
  std::string metrics(WallTime now) const;  // Prometheus

 private:
  struct Closed {
    std::int64_t at_ms = 0;
    std::uint64_t count = 0;  // events it had
    std::string why = {};
  };
  struct Known {  // an incident that has its name
    std::string base = {}, who = {};
    std::int64_t first_ms = 0, last_ms = 0;
  };
  void read_file();
  void work();
  void take(const diagnose::Followed& now);
  void give_names(std::vector<diagnose::Incident>& seen);
  bool keep();  // under the file's lock alone
  Ear ear();
  // Why it is not open, or nothing. Under the lock.
  std::optional<Closed> closed_as(const diagnose::Incident& incident, std::int64_t now_ms) const;

  const Settings settings_;
  mutable std::mutex mutex_ = {};              // taken after the file's
  std::map<std::string, Closed> closed_ = {};  // by id
  std::vector<diagnose::Incident> seen_ = {};
  diagnose::Followed told_ = {};  // without its incidents
  std::string trouble_ = {};
  std::int64_t booted_ms_ = 0,
               loaded_ms_ = 0;  // events until then are of before the boot, or the driver's load

  std::mutex file_mutex_ = {};                  // what follows is of who holds it
  std::map<std::string, Known> known_ = {};     // by id
  std::string boot_ = {}, kept_ = "[]";         // the events, as they are in the file
  std::optional<std::uint64_t> sequence_ = {};  // of the kernel's log, read
  diagnose::Heard heard_ = {};                  // of the Fabric Manager's words
  std::uint64_t wrote_ns_ = 0;
  bool dirty_ = false;
  Json loaded_ = {};  // the events of the file, until the thread has read them

  std::mutex ear_mutex_ = {};
  Ear ear_ = {};
  std::uint64_t next_try_ns_ = 0, wait_ns_ = 0;
  unsigned rests_ = 0;

  std::atomic<bool> ending_{false};
  std::thread thread_ = {};
};
Json to_json(const Watcher::View& view);
Json to_json(const Incident& incident);

// Whose an event is: the lease that had the place at that time, or the share that the process was in. Told
// by the leases' own times, so that a line that is read late is not charged to who came after.
class Owners {
 public:
  // Once a second: the processes of shares, remembered ten minutes after they are gone.
  void look(const std::filesystem::path& root, const control::Snapshot& leases, std::uint64_t monotonic_ns);
  // "tenant vision, lease 7"; where no lease is found, what was there stays (a cgroup). One thread.
  // A process that no look has seen is asked for at once, with its ancestors: programs that fault often do so
  // in children that live for milliseconds. A share's arbiter has a hand in its tenant's objects, and the
  // driver names it for what others did (seen on an H100): its lines are nobody's.
  void name(diagnose::Evidence& evidence, const control::Snapshot& leases);

 private:
  struct Stay {
    std::int64_t from_ms = 0, to_ms = 0;
    std::string name = {};
  };
  struct Member {
    std::string lease = {};                     // empty: an arbiter, whom nobody is charged for
    std::uint64_t seen_ns = 0, start_time = 0;  // 0: it was gone before it could be looked at
  };
  static constexpr std::size_t most_processes = 65'536;
  std::optional<std::string> of_process(std::uint32_t pid) const;  // nothing: of no lease

  std::int64_t batch_ = -1;                                             // of the snapshot that `stays_` is of
  std::map<std::pair<PciAddress, int>, std::vector<Stay>> stays_ = {};  // by place, -1: the whole GPU
  mutable std::mutex mutex_ = {};
  std::map<std::uint32_t, Member> processes_ = {};
  std::filesystem::path root_ = "/";
  std::uint64_t looked_ns_ = 0;
};

// Whether somebody with this lease may be told: it is in the lines, or it lost something by it.
bool concerns(const diagnose::Incident& incident, const lease::Lease& lease);

}  // namespace bulkhead::incidents
