// Carries a plan out so that a kill -9 anywhere is safe, and takes it back. docs/design/journal.md has the
// protocol: each step is intent (durable) -> act -> read back -> done (durable). Two processes share the
// work: the parent writes the journal and touches nothing else; a disposable worker touches the host and
// never the journal, so that a driver call that hangs can be given up with the worker that made it.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "base/result.hpp"
#include "core/inventory/inventory.hpp"
#include "core/plan/plan.hpp"
#include "core/spec/spec.hpp"
#include "edge/store/store.hpp"
#include "engine/observe/observe.hpp"

namespace bulkhead::execute {

// A node file held against the host as it is now.
struct Proposal {
  spec::NodeFile node = {};
  std::string text = {};  // the node file as written
  inventory::Host host = {};
  std::variant<plan::Plan, plan::Refusal> answer = {};
  std::optional<std::int64_t> unsettled =
      {};  // a run that was killed; the next apply or rollback settles it first

  const plan::Plan* plan() const { return std::get_if<plan::Plan>(&answer); }
  const plan::Refusal* refusal() const { return std::get_if<plan::Refusal>(&answer); }
};

// Reading only: observes the host, adds what the journal remembers, asks core.
Result<Proposal> propose(const observe::Access& access, const spec::NodeFile& node, const std::string& text,
                         const plan::Options& options);

// What happens, as it happens; `number` of `total` steps, 0 when it is not about one.
struct Event {
  enum class Kind { settled, adopted, evicting, doing, done, failed, undoing, undone, undo_failed, checking };
  Kind kind = Kind::doing;
  std::size_t number = 0, total = 0;
  std::string text = {};
  std::uint64_t elapsed_ms = 0;  // of the step that ended
  std::string note = {};         // of a step that is done: what people should know all the same
};

struct Options {
  observe::Access access = {};
  plan::Options plan = {};
  // The run's name in the history. Runs of another verb than "apply" are nobody's to roll back: what a lease
  // needed is taken back with the lease.
  std::string verb = "apply";
  unsigned lock_wait_ms = 0;                      // for another verb at work, before Errc::in_use
  unsigned grace_ms = 10'000;                     // between SIGTERM and SIGKILL of a holder
  std::optional<unsigned> step_deadline_ms = {};  // empty: by kind, a minute for most
  std::function<void(const Event&)> tell = {};
  // Asked once, before anything is touched; empty: yes. After it the host is observed again.
  std::function<bool(const Proposal&)> agree = {};
  std::function<bool(const std::vector<std::string>&)> agree_to_undo = {};  // rollback: the undos in order
  std::function<bool()> stop = {};  // true: after the step at hand, undo and end
};

enum class Verdict {
  nothing_to_do,
  applied,   // and a second plan is empty
  differs,   // applied, but a second plan is not empty
  refused,   // nothing was touched
  declined,  // by `agree`
  undone,    // a step failed; all that was done is undone
  stuck,     // a step failed and not everything could be undone: `left` says what
  rolled_back,
};

struct Outcome {
  Verdict verdict = Verdict::nothing_to_do;
  std::optional<std::int64_t> run = {};
  std::optional<Proposal> proposal = {};   // of apply
  std::vector<std::string> settled = {};   // what an interrupted run had left, and what became of it
  std::vector<plan::Reason> refused = {};  // of rollback: holders in the way
  std::size_t steps_done = 0, steps_undone = 0;
  std::string failure = {}, hint = {};
  std::optional<Errc> code = {};  // of the failure, where it was an Error
  std::vector<std::string> left = {};
  std::vector<std::string> remaining = {};  // steps of the second plan
  bool reboot_owed = false;
  std::uint64_t elapsed_ms = 0;
  std::uint64_t driver_calls = 0;  // made by the worker: acts and read-backs
  // Of applied, differs and nothing_to_do: the host as read back, and what is ours on it.
  std::optional<inventory::Host> after = {};
  std::vector<store::OwnedInstance> owned = {};
};

// An Error means that it could not begin, or that the journal could not be written: the next run settles it.
Result<Outcome> apply(const Options& options, const spec::NodeFile& node, const std::string& text);

// As apply, where what is wanted depends on what is there: `make` is asked under the lock, with the host as
// observed then. Its Error is the answer; nothing was touched. Access::only may name the GPUs concerned.
struct Wanted {
  spec::NodeFile node = {};
  std::string text = {};  // for the journal
};
using Make = std::function<Result<Wanted>(const inventory::Host&, const plan::Remembered&)>;
Result<Outcome> alter(const Options& options, const Make& make);

// Takes back the newest run that is not taken back yet, with the interrupted ones it continued.
Result<Outcome> rollback(const Options& options);

// The PCI bus and its IOMMU groups, with the processes that hold a device. Reading only.
Result<passthrough::Tree> devices(const observe::Access& access);

struct HistoryEntry {
  store::Run run = {};
  std::vector<store::Step> steps = {};
  bool cut_off = false;  // says "running", and nobody runs: the next apply or rollback settles it
};
// Newest first; one run alone when `run` is given. Errc::not_found: no such run.
Result<std::vector<HistoryEntry>> history(const observe::Access& access, std::optional<std::int64_t> run);

}  // namespace bulkhead::execute
