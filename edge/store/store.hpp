// The journal: one SQLite database (WAL, synchronous=FULL, STRICT tables) in the state directory. It holds
// runs, their steps and what bulkhead owns. What is in the hardware is always read, never remembered here. A
// database that is damaged, foreign or newer is refused and left as it is: nothing here deletes one.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/ids.hpp"
#include "base/json.hpp"
#include "base/result.hpp"
#include "base/units.hpp"

namespace bulkhead::store {

// A GPU instance that bulkhead made and has not destroyed. Valid for one boot.
struct OwnedInstance {
  Uuid gpu = {};
  unsigned gpu_instance = 0, profile_id = 0, start = 0;
  std::int64_t generation = 0;  // counts up for ever: MIG UUIDs come back, this does not
  std::int64_t run = 0;         // that made or adopted it
  bool adopted = false;  // somebody else made it; a rollback of `run` gives it back, it does not destroy it
};

// A clock lock that bulkhead set. NVML cannot read one back. Valid for one boot.
struct ClockLock {
  Uuid gpu = {};
  Megahertz low = {}, high = {};
};

enum class RunState {
  running,      // or killed while it ran: nobody holds the lock
  done,         // as asked
  failed,       // a step failed; what was done is undone unless a step still says `done`
  interrupted,  // killed, and settled by a later run
  rolled_back,  // all its steps are undone
};
enum class StepState {
  intended,  // it may have happened: the hardware knows
  done,      // read back as asked
  not_done,  // read back as before
  undone,    // a later step took it back
};
std::string_view name_of(RunState state);
std::string_view name_of(StepState state);

struct Run {
  std::int64_t id = 0;
  std::string verb = {};  // "apply", "rollback", "lease"
  RunState state = RunState::running;
  WallTime started = {};
  std::optional<WallTime> ended = {};
  std::string boot_id = {};
  int pid = 0;
  std::string node_file = {};                   // the text applied; empty for a rollback
  std::optional<std::int64_t> continues = {};   // the interrupted run before it: a rollback undoes both
  std::optional<std::int64_t> rolls_back = {};  // the run a rollback takes back
  std::string message = {};                     // why it failed
};

struct Step {
  std::int64_t id = 0;  // over all runs, in the order of intents
  std::int64_t run = 0;
  std::string boot_id = {};  // of its run
  std::string kind = {};     // "create-instance"
  Json action = {};          // core/plan's
  Json detail = {};          // what undo needs and the action does not hold
  std::string why = {};
  StepState state = StepState::intended;
  std::optional<std::int64_t> undoes = {};  // a step's id: this one takes that one back
  WallTime started = {};
  std::optional<WallTime> ended = {};
  std::string message = {};  // of a failure, or what settled it
};

// What a step's end changes in what bulkhead owns: written in one transaction with it.
struct Effects {
  std::optional<OwnedInstance> gained = {};  // generation and run are given by the store
  std::optional<OwnedInstance> lost = {};    // by gpu, profile_id and start
  std::optional<ClockLock> locked = {};
  std::optional<Uuid> unlocked = {};
};

// Held while a verb changes the host; the kernel releases it with the last process that holds it, worker
// included.
class Lock {
 public:
  // Errc::in_use names the holder. The directory must exist.
  static Result<Lock> take(const std::filesystem::path& directory, std::string_view verb);
  // Whether somebody holds it now. Looks (at /proc/locks) without taking it, so nobody is turned away
  // meanwhile.
  static bool held(const std::filesystem::path& directory);
  // Adds the worker's pid to what a refused second is told.
  Status name_worker(int pid) const;
  int fd() const { return fd_.get(); }

 private:
  Lock(UniqueFd fd, std::string text) : fd_(std::move(fd)), text_(std::move(text)) {}
  UniqueFd fd_;
  std::string text_;
};

class Store {
 public:
  enum class Access { read_only, read_write };
  // Creates and migrates when read_write. A read-only open of a missing database is Errc::not_found.
  static Result<std::unique_ptr<Store>> open(const std::filesystem::path& directory, Access access);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  static std::filesystem::path file_in(const std::filesystem::path& directory) {
    return directory / "journal.db";
  }

  // Fails when the file system has less room than a run's records may take: asked before anything is touched.
  Status room() const;

  Result<std::vector<OwnedInstance>> owned(const std::string& boot_id);
  Result<std::vector<ClockLock>> clock_locks(const std::string& boot_id);

  // `id`, `state`, `started` are given by the store.
  Result<std::int64_t> begin_run(const Run& run);
  Status end_run(std::int64_t run, RunState state, std::string_view message);
  // The intent, durable when this returns. `id`, `state`, `started` are given by the store.
  Result<std::int64_t> intend(const Step& step);
  // The outcome. When `done` and the step undoes another, that one becomes undone in the same transaction.
  Status settle(std::int64_t step, StepState state, std::string_view message, const Effects& effects);
  // Nothing had to be done to take `step` back.
  Status mark_undone(std::int64_t step, std::string_view message, const Effects& effects);

  Status adopt(std::int64_t run, const std::string& boot_id, const std::vector<OwnedInstance>& instances);
  Status give_back_adopted(std::int64_t run);
  // Drops what is no longer in the hardware: `present` is what is there now.
  Status forget_missing(const std::string& boot_id, const std::vector<OwnedInstance>& present);

  Result<std::vector<Run>> runs();  // newest first, at most 10000
  Result<std::optional<Run>> run(std::int64_t id);
  Result<std::vector<Step>> steps(std::int64_t run);  // in order
  Result<std::vector<Step>> in_flight();              // intended, of any run, in order

 private:
  Store();
  struct Database;
  std::unique_ptr<Database> database_;
};

}  // namespace bulkhead::store
