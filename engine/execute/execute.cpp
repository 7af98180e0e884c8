#include "engine/execute/execute.hpp"

#include <unistd.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "edge/process/process.hpp"
#include "edge/store/store.hpp"
#include "edge/systemd/systemd.hpp"
#include "edge/vfio/vfio.hpp"
#include "engine/execute/worker.hpp"

namespace bulkhead::execute {

namespace fs = std::filesystem;
using store::StepState;

namespace {

constexpr int cleanup_tries = 30;
constexpr useconds_t cleanup_pause_usec = 100'000;
constexpr useconds_t lock_pause_usec = 20'000;
constexpr std::size_t remembered_runs = 1000;  // newest: older ones say nothing of what is bound now

unsigned deadline_of(const plan::Action& action, const Options& options) {
  if (options.step_deadline_ms) return *options.step_deadline_ms;
  if (std::holds_alternative<plan::SetFile>(action)) return 300'000;     // update-grub asks every disk
  if (std::holds_alternative<plan::SetUnit>(action)) return 120'000;     // systemd's 90 s and the probe
  if (std::holds_alternative<plan::SetMigMode>(action)) return 120'000;  // may reset the GPU
  // Of a device that does not come back from a reset the kernel takes a minute to say so: at the open, when
  // it is asked for, and at the close.
  if (std::holds_alternative<plan::Prove>(action)) return 240'000;
  return 60'000;
}

std::string sentence(const plan::Action& action, const inventory::Host* host) {
  return plan::describe(action, host);
}

// A file of the host as it is, for the plan; what cannot be read must not be written over.
Result<std::optional<std::string>> file_now(const fs::path& path) {
  auto text = read_file(path);
  if (text.ok()) return std::optional<std::string>(std::move(*text));
  if (text.error().native() == ENOENT || text.error().native() == ENOTDIR)
    return std::optional<std::string>();
  return std::move(text).error();
}

// What another boot may have changed since the journal saw it: a boot gives devices to whom udev's rule says.
bool changes_at_boot(const plan::Action& action) {
  return std::holds_alternative<plan::SetDriver>(action) ||
         std::holds_alternative<plan::SetVirtualFunctions>(action) ||
         std::holds_alternative<plan::SetPermission>(action);
}

// What a step's detail means to its undo. A journal that somebody touched may hold anything.
Json kept(Json detail) {
  if (!detail.is_object()) return Json::object();
  detail.erase("devices");
  return detail;
}

constexpr std::string_view apply_verb = "apply";
// A run that apply does not continue and rollback does not take back.
bool is_aside(const store::Run& run) { return run.verb != apply_verb && run.verb != "rollback"; }

// What to type where some of the devices could not be taken back: a group in pieces is nobody's.
std::string whole_again(const std::vector<store::Step>& steps) {
  std::vector<std::string> slots;
  for (const auto& step : steps) {
    const auto action = plan::action_from_json(step.action);
    const auto* driver = action.ok() ? std::get_if<plan::SetDriver>(&*action) : nullptr;
    if (driver == nullptr) continue;
    auto address = driver->target.function.str();
    if (std::find(slots.begin(), slots.end(), address) == slots.end()) slots.push_back(std::move(address));
  }
  return fmt::format(
      "mend what failed, then: bulkhead rollback\nor give the devices to the host: bulkhead reclaim {}\nor "
      "to "
      "guests: bulkhead apply -f FILE",
      join(slots, " "));
}

// One run's work on one open journal.
class Session {
 public:
  Session(const Options& options, std::unique_ptr<store::Store> journal, store::Lock lock)
      : options_(options),
        journal_(std::move(journal)),
        lock_(std::move(lock)),
        worker_(options.access, lock_) {}

  static Result<std::unique_ptr<Session>> begin(const Options& options, std::string_view verb) {
    BH_TRY(auto journal, store::Store::open(options.access.state_dir, store::Store::Access::read_write));
    const std::uint64_t deadline = monotonic_ns() + std::uint64_t{options.lock_wait_ms} * 1'000'000;
    auto taken = store::Lock::take(options.access.state_dir, verb);
    while (!taken.ok() && taken.error().code() == Errc::in_use && monotonic_ns() < deadline) {
      ::usleep(lock_pause_usec);
      taken = store::Lock::take(options.access.state_dir, verb);
    }
    BH_TRY(auto lock, std::move(taken));
    BH_CHECK(journal->room());
    return std::make_unique<Session>(options, std::move(journal), std::move(lock));
  }

  Result<Outcome> apply(const Make& make);
  Result<Outcome> rollback();

 private:
  struct Taken {
    bool ok = false;
    std::string why = {}, hint = {};
    std::optional<Errc> code = {};
    bool in_doubt = false;  // it may have left something: the step stays `intended`
    std::string note = {};
  };

  void tell(Event::Kind kind, std::string text, std::size_t number = 0, std::size_t total = 0,
            std::uint64_t elapsed_ms = 0, std::string note = {}) const {
    if (options_.tell)
      options_.tell({.kind = kind,
                     .number = number,
                     .total = total,
                     .text = std::move(text),
                     .elapsed_ms = elapsed_ms,
                     .note = std::move(note)});
  }

  Result<std::string> boot_id() const {
    auto text = read_trimmed(options_.access.root / "proc/sys/kernel/random/boot_id");
    if (!text.ok()) return std::move(text).error().in("which boot this is");
    return printable(*text, 64);
  }

  Status settle(Outcome& outcome);
  Result<bool> settle_step(const store::Step& step, Outcome& outcome);
  Result<store::Effects> effects(const plan::Action& action, const Json& detail,
                                 const std::optional<Sight>& sight) const;
  Result<Json> detail_for(const plan::Action& action, const std::string& boot);
  std::string openers_of(const plan::Action& action) const;
  // Intent, act, read back, outcome.
  Result<Taken> take(std::int64_t run, const plan::Action& action, const std::string& why, Json detail,
                     const std::vector<inventory::Holder>& evicts, std::optional<std::int64_t> undoes);
  // Takes back the done steps given, last first. Stops at the first that cannot be.
  Status undo(std::int64_t run, const std::vector<store::Step>& steps, const inventory::Host* host,
              const std::string& boot, Outcome& outcome,
              const std::function<std::vector<inventory::Holder>(const plan::Action&)>& holders);
  Result<std::vector<store::Step>> done_steps(std::int64_t run) const;
  // What has to be taken back of a run: its done steps and, where another boot lies behind it, all that it
  // meant to do to devices; the latter have no id.
  Result<std::vector<store::Step>> to_take_back(const store::Run& run, const std::string& boot);
  Result<std::optional<std::int64_t>> open_run() const;
  // The run that was cut off, when it meant the same and the host shows all of it.
  Status close_open_run(const std::string& node_file) const;

  const Options& options_;
  std::unique_ptr<store::Store> journal_;
  store::Lock lock_;
  Worker worker_;
  Json devices_ = {};  // what the run at hand means to do to devices: recorded with its first step
  const inventory::Host* host_ = nullptr;  // as last observed: gives GPUs their index in what people read
};

// ---- settling what a killed run left
Status Session::settle(Outcome& outcome) {
  BH_TRY(const auto flying, journal_->in_flight());
  for (const auto& step : flying) {
    // A run that failed and could not take its last step back was cut off as well: it is what a rollback
    // means.
    BH_TRY(const auto run, journal_->run(step.run));
    if (run && run->state == store::RunState::failed)
      BH_CHECK(journal_->end_run(run->id, store::RunState::interrupted, run->message));
    BH_TRY(const bool settled, settle_step(step, outcome));
    if (!settled) {
      return Error(Errc::conflict, outcome.settled.back(),
                   fmt::format("look at what the host says: bulkhead inventory\nand at the run: bulkhead "
                               "history {}\nthen try again",
                               step.run));
    }
  }
  BH_TRY(const auto runs, journal_->runs());
  for (const auto& run : runs) {
    if (run.state == store::RunState::running)
      BH_CHECK(journal_->end_run(run.id, store::RunState::interrupted, "killed; settled by the next run"));
  }
  return ok_status();
}

Result<bool> Session::settle_step(const store::Step& step, Outcome& outcome) {
  const auto say = [&](std::string text) {
    tell(Event::Kind::settled, text);
    outcome.settled.push_back(std::move(text));
  };
  auto parsed = plan::action_from_json(step.action);
  if (!parsed.ok()) return std::move(parsed).error().in(fmt::format("run {}, step {}", step.run, step.id));
  const plan::Action& action = *parsed;
  const unsigned deadline = deadline_of(action, options_);
  const std::string name = fmt::format("run {} was cut off in '{}'", step.run, sentence(action, nullptr));
  Json again = kept(step.detail);
  again["again"] = true;

  BH_TRY(Sight sight, worker_.inspect(action, again, deadline));
  // A clock lock cannot be read, and a file does not tell whether its command ran: only doing it again makes
  // sure.
  const auto* file = std::get_if<plan::SetFile>(&action);
  const bool redo = sight.seen == Seen::unknown || sight.seen == Seen::half ||
                    (sight.seen == Seen::after && file != nullptr && !file->then.empty());
  std::string trouble;
  if (sight.seen == Seen::before && file != nullptr && !file->then.empty()) {
    // The file is as it was; what its command makes of it may not be.
    const auto back = worker_.act(plan::undo_of(action), again, deadline);
    if (back.failed) trouble = back.failed->message();
  }
  if (redo) {
    const auto done = worker_.act(action, again, deadline);
    if (done.failed) trouble = done.failed->message();
    // Off the bus, and no scan finds it: it is nobody's, and whenever it comes back it is the host's. It must
    // not stand in the way of everything else until then.
    if (const auto* driver = std::get_if<plan::SetDriver>(&action);
        driver != nullptr && driver->replug && done.failed && done.failed->code() == Errc::gone) {
      BH_CHECK(journal_->settle(step.id, StepState::not_done, "settled after a kill: " + trouble, {}));
      say(fmt::format("{}: the device is gone: {}", name, trouble));
      return true;
    }
    if (done.sight) sight = *done.sight;
    if (!done.sight) trouble = done.blind;
    if (!done.failed && sight.seen == Seen::unknown) sight.seen = Seen::after;
    if (sight.seen == Seen::half || (done.failed && sight.seen == Seen::after)) {
      // Not forward, so back: the undo converges from half as well.
      const auto back = worker_.act(plan::undo_of(action), again, deadline);
      if (back.failed) trouble += "; " + back.failed->message();
      BH_TRY(sight, worker_.inspect(action, again, deadline));
    }
  }
  switch (sight.seen) {
    case Seen::after: {
      BH_TRY(const auto changed, effects(action, step.detail, sight));
      BH_CHECK(journal_->settle(step.id, StepState::done, "settled after a kill: " + sight.words, changed));
      say(fmt::format("{}: it is done ({})", name, sight.words));
      return true;
    }
    case Seen::before:
      BH_CHECK(journal_->settle(step.id, StepState::not_done, "settled after a kill: " + sight.words, {}));
      say(fmt::format("{}: it is not done ({}){}{}", name, sight.words, trouble.empty() ? "" : "; ",
                      trouble));
      return true;
    case Seen::neither:
      BH_CHECK(journal_->settle(step.id, StepState::not_done,
                                "settled after a kill: somebody else changed it: " + sight.words, {}));
      say(fmt::format("{}: somebody else has changed it since, it is left alone ({})", name, sight.words));
      return true;
    case Seen::half:
    case Seen::unknown:
      break;
  }
  say(fmt::format("{}: it is half done and can be neither finished nor taken back: {}{}{}", name, sight.words,
                  trouble.empty() ? "" : ": ", trouble));
  return false;
}

Result<std::optional<std::int64_t>> Session::open_run() const {
  if (options_.verb != apply_verb) return std::optional<std::int64_t>();
  BH_TRY(auto runs, journal_->runs());
  std::erase_if(runs, is_aside);
  if (runs.empty()) return std::optional<std::int64_t>();
  const auto& last = runs.front();
  if (last.verb == "rollback") {
    // A rollback that ended well closes its run; one that was cut off leaves the rest of it open.
    return last.state == store::RunState::done ? std::optional<std::int64_t>() : last.rolls_back;
  }
  if (last.state == store::RunState::interrupted) return std::optional<std::int64_t>(last.id);
  if (last.state == store::RunState::failed) {
    BH_TRY(const auto left, done_steps(last.id));
    if (!left.empty()) return std::optional<std::int64_t>(last.id);
    return last.continues;  // a failed continuation, undone, leaves open what it continued
  }
  return std::optional<std::int64_t>();
}

// Left open, the next run would continue it whatever that one is for, and a rollback of it take back both: a
// reclaim that a boot has finished would be undone with the apply after it.
Status Session::close_open_run(const std::string& node_file) const {
  BH_TRY(const auto open, open_run());
  if (!open) return ok_status();
  BH_TRY(const auto run, journal_->run(*open));
  if (!run || run->state != store::RunState::interrupted || run->node_file != node_file) return ok_status();
  BH_TRY(const auto done, done_steps(run->id));
  return journal_->end_run(run->id, done.empty() ? store::RunState::failed : store::RunState::done,
                           "cut off; all that it wanted was found so later");
}

// Steps that are done and not taken back, in order.
Result<std::vector<store::Step>> Session::done_steps(std::int64_t run) const {
  BH_TRY(auto steps, journal_->steps(run));
  std::erase_if(steps, [](const store::Step& step) {
    return step.state != StepState::done || step.undoes.has_value();
  });
  return steps;
}

// A boot between a run and its rollback gives devices to the host, or to guests, whatever the steps came to.
// To undo only what was done would leave an IOMMU group in pieces, so all that the run meant to do to them is
// taken back: every device ends as it was before the run.
Result<std::vector<store::Step>> Session::to_take_back(const store::Run& run, const std::string& boot) {
  BH_TRY(auto back, done_steps(run.id));
  if (run.boot_id == boot || (back.empty() && run.state != store::RunState::interrupted)) return back;
  BH_TRY(const auto steps, journal_->steps(run.id));
  const auto recorded = std::find_if(steps.begin(), steps.end(), [](const store::Step& step) {
    return !step.undoes && step.detail.contains("devices") && step.detail["devices"].is_array();
  });
  if (recorded == steps.end()) return back;
  const auto done = back.size();
  for (const auto& planned : recorded->detail["devices"]) {
    const auto end = back.begin() + static_cast<std::ptrdiff_t>(done);
    if (std::any_of(back.begin(), end, [&](const store::Step& step) { return step.action == planned; }))
      continue;
    auto action = plan::action_from_json(planned);
    if (!action.ok()) return std::move(action).error().in(fmt::format("run {}: what it planned", run.id));
    if (!changes_at_boot(*action))
      return Error(Errc::corrupt,
                   fmt::format("run {}: what it planned for devices is something else", run.id),
                   fmt::format("look at it: bulkhead history {}", run.id));
    Json again = Json::object();
    again["again"] = true;
    // As the boot left it, it may be what is wanted.
    const auto sight = worker_.inspect(plan::undo_of(*action), again, deadline_of(*action, options_));
    if (sight.ok() && sight->seen == Seen::after) continue;
    back.push_back({.run = run.id,
                    .boot_id = run.boot_id,
                    .kind = std::string(plan::kind_of(*action)),
                    .action = planned,
                    .detail = std::move(again)});
  }
  return back;
}

// ---- one step
Result<store::Effects> Session::effects(const plan::Action& action, const Json& detail,
                                        const std::optional<Sight>& sight) const {
  store::Effects out;
  if (const auto* made = std::get_if<plan::CreateInstance>(&action)) {
    // The undo of a destroyed foreign instance gives it back to whom it belonged.
    if (detail.value("ours", true)) {
      out.gained =
          store::OwnedInstance{.gpu = made->gpu,
                               .gpu_instance = sight && sight->gpu_instance ? *sight->gpu_instance : 0,
                               .profile_id = made->profile_id,
                               .start = made->place.start};
    }
  } else if (const auto* gone = std::get_if<plan::DestroyInstance>(&action)) {
    out.lost = store::OwnedInstance{.gpu = gone->gpu,
                                    .gpu_instance = gone->gpu_instance,
                                    .profile_id = gone->profile_id,
                                    .start = gone->place.start};
  } else if (const auto* lock = std::get_if<plan::LockClocks>(&action)) {
    if (lock->after) {
      out.locked = store::ClockLock{.gpu = lock->gpu, .low = lock->after->low, .high = lock->after->high};
    } else {
      out.unlocked = lock->gpu;
    }
  }
  return out;
}

Result<Json> Session::detail_for(const plan::Action& action, const std::string& boot) {
  BH_TRY(Json detail, worker_.prepare(action, deadline_of(action, options_)));
  if (const auto* gone = std::get_if<plan::DestroyInstance>(&action)) {
    BH_TRY(const auto mine, journal_->owned(boot));
    detail["ours"] = std::any_of(mine.begin(), mine.end(), [&](const store::OwnedInstance& own) {
      return own.gpu == gone->gpu && own.profile_id == gone->profile_id && own.start == gone->place.start;
    });
  }
  return detail;
}

// "pid 77 (qemu-system-x86)": of the functions whose driver or number the action changes.
std::string Session::openers_of(const plan::Action& action) const {
  std::vector<PciAddress> functions;
  if (const auto* driver = std::get_if<plan::SetDriver>(&action)) {
    auto address = Result<std::optional<PciAddress>>(std::optional(driver->target.function));
    if (driver->target.vf)
      address = vfio::virtual_function(options_.access.root, driver->target.function, *driver->target.vf);
    if (address.ok() && *address) functions.push_back(**address);
  } else if (const auto* made = std::get_if<plan::SetVirtualFunctions>(&action)) {
    for (unsigned i = 0; i < std::max(made->before, made->after); ++i) {
      const auto address = vfio::virtual_function(options_.access.root, made->physical, i);
      if (address.ok() && *address) functions.push_back(**address);
    }
  }
  std::vector<fs::path> files;
  for (const auto& function : functions) {
    for (const auto& node : vfio::device_nodes(options_.access.root, function))
      files.push_back(options_.access.root / fs::path(node).relative_path());
  }
  if (files.empty()) return {};
  const auto found = process::openers(files);
  std::vector<std::string> words;
  if (found.ok()) {
    for (const auto& opener : found->who)
      words.push_back(fmt::format("pid {} ({})", opener.who.pid, opener.who.name));
  }
  return join(words, ", ");
}

Result<Session::Taken> Session::take(std::int64_t run, const plan::Action& action, const std::string& why,
                                     Json detail, const std::vector<inventory::Holder>& evicts,
                                     std::optional<std::int64_t> undoes) {
  const unsigned deadline = deadline_of(action, options_);
  detail["what"] = sentence(action, host_);
  Json recorded = detail;
  if (!devices_.empty()) recorded["devices"] = std::exchange(devices_, Json());
  BH_TRY(const std::int64_t id, journal_->intend({.run = run,
                                                  .kind = std::string(plan::kind_of(action)),
                                                  .action = plan::to_json(action),
                                                  .detail = std::move(recorded),
                                                  .why = why,
                                                  .undoes = undoes}));
  const auto not_done = [&](const Error& error) -> Result<Taken> {
    BH_CHECK(journal_->settle(id, StepState::not_done, error.message(), {}));
    return Taken{.ok = false, .why = error.message(), .hint = error.hint(), .code = error.code()};
  };
  for (const auto& holder : evicts) {
    tell(Event::Kind::evicting, fmt::format("pid {} ({})", holder.pid, holder.name));
    if (const Status ended = worker_.evict(holder, options_.grace_ms); !ended.ok())
      return not_done(ended.error());
  }
  auto done = worker_.act(action, detail, deadline);
  // A process that has ended may hold its GPU a moment longer, until the driver has cleaned up after it.
  for (int tries = 0;
       !evicts.empty() && done.failed && done.failed->code() == Errc::in_use && tries < cleanup_tries;
       ++tries) {
    ::usleep(cleanup_pause_usec);
    Json again = detail;
    again["again"] = true;
    done = worker_.act(action, again, deadline);
  }
  const bool seen_after =
      done.sight && (done.sight->seen == Seen::after || done.sight->seen == Seen::unknown);
  if (!done.failed && seen_after) {
    BH_TRY(const auto changed, effects(action, detail, done.sight));
    BH_CHECK(journal_->settle(id, StepState::done, done.sight->words, changed));
    return Taken{.ok = true, .note = done.sight->note};
  }
  Taken failed;
  if (done.failed) {
    failed.why = done.failed->message();
    failed.hint = done.failed->hint();
    failed.code = done.failed->code();
    if (failed.code == Errc::timeout) {
      // What an unbind waits for is whoever has the device open.
      if (const auto who = openers_of(action); !who.empty()) {
        failed.why += fmt::format("; {} has the device open", who);
        failed.hint = fmt::format("end it: the step then goes on by itself\n{}", failed.hint);
      }
    }
  } else {
    failed.why = done.sight
                     ? fmt::format("the driver said yes, but it reads back otherwise: {}", done.sight->words)
                     : fmt::format("the driver said yes, but it cannot be read back: {}", done.blind);
  }
  // Whatever the failed act left is taken back at once; the undo converges from half as well.
  std::optional<Sight> sight = done.sight;
  // A command that failed half-way may have left its product (grub.cfg) ahead of the file: it runs again over
  // the old one.
  const auto* file = std::get_if<plan::SetFile>(&action);
  const bool product = file != nullptr && !file->then.empty();
  if (product || !sight || (sight->seen != Seen::before && sight->seen != Seen::neither)) {
    Json again = detail;
    again["again"] = true;
    const auto back = worker_.act(plan::undo_of(action), again, deadline);
    sight.reset();
    std::string trouble = back.failed ? back.failed->message() : "";
    if (auto now = worker_.inspect(action, again, deadline); now.ok()) {
      sight = *now;
    } else {
      trouble = now.error().message();
    }
    const bool clean = sight &&
                       (sight->seen == Seen::before || (sight->seen == Seen::unknown && !back.failed)) &&
                       !(product && back.failed);
    if (!clean) {
      // Stays `intended`: the next run settles it from what it reads then.
      failed.in_doubt = true;
      failed.why +=
          fmt::format("; and it cannot be taken back: {}", trouble.empty() && sight ? sight->words : trouble);
      return failed;
    }
  }
  BH_CHECK(journal_->settle(id, StepState::not_done, failed.why, {}));
  return failed;
}

Status Session::undo(std::int64_t run, const std::vector<store::Step>& steps, const inventory::Host* host,
                     const std::string& boot, Outcome& outcome,
                     const std::function<std::vector<inventory::Holder>(const plan::Action&)>& holders) {
  std::size_t number = 0;
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    ++number;
    auto parsed = plan::action_from_json(step->action);
    if (!parsed.ok())
      return std::move(parsed).error().in(fmt::format("run {}, step {}", step->run, step->id));
    const plan::Action back = plan::undo_of(*parsed);
    const std::string text = sentence(back, host);
    const std::uint64_t started = monotonic_ns();
    tell(Event::Kind::undoing, text, number, steps.size());
    // An instance that is no longer in the journal as ours (another boot, or gone and made again by somebody
    // else) is not ours to destroy.
    if (const auto* made = std::get_if<plan::CreateInstance>(&*parsed)) {
      BH_TRY(const auto mine, journal_->owned(boot));
      const bool ours = std::any_of(mine.begin(), mine.end(), [&](const store::OwnedInstance& own) {
        return own.gpu == made->gpu && own.profile_id == made->profile_id && own.start == made->place.start;
      });
      if (!ours) {
        BH_CHECK(journal_->mark_undone(step->id, "the instance was gone already", {}));
        ++outcome.steps_undone;
        tell(Event::Kind::undone, text + ": it was gone already", number, steps.size());
        continue;
      }
    }
    Json detail = kept(step->detail);
    if (detail.contains("policies")) {
      detail["restore"] = detail["policies"];
      detail.erase("policies");
    }
    detail["again"] = true;
    BH_TRY(const Taken taken,
           take(run, back,
                step->id != 0 ? fmt::format("undoes step {} of run {}", step->id, step->run)
                              : fmt::format("another boot changed what run {} had found", step->run),
                detail, holders ? holders(back) : std::vector<inventory::Holder>{},
                step->id != 0 ? std::optional(step->id) : std::nullopt));
    const std::uint64_t elapsed = (monotonic_ns() - started) / 1'000'000;
    if (!taken.ok) {
      tell(Event::Kind::undo_failed, text + ": " + taken.why, number, steps.size(), elapsed);
      outcome.left.push_back(fmt::format("{}: {}", text, taken.why));
      for (auto rest = std::next(step); rest != steps.rend(); ++rest) {
        if (auto other = plan::action_from_json(rest->action); other.ok())
          outcome.left.push_back(sentence(plan::undo_of(*other), host));
      }
      return ok_status();
    }
    ++outcome.steps_undone;
    tell(Event::Kind::undone, text, number, steps.size(), elapsed);
  }
  return ok_status();
}

// ---- apply

Make as_written(const spec::NodeFile& node, const std::string& text) {
  return [&](const inventory::Host&, const plan::Remembered&) -> Result<Wanted> {
    return Wanted{.node = node, .text = text};
  };
}

// What was given away, and proved since: read from the steps, oldest first.
Status remember_devices(store::Store& journal, const std::string& boot, plan::Remembered& remembered) {
  BH_TRY(auto runs, journal.runs());
  if (runs.size() > remembered_runs) runs.resize(remembered_runs);
  auto& proved = remembered.proved;
  auto& originals = remembered.originals;
  for (auto run = runs.rbegin(); run != runs.rend(); ++run) {
    const bool this_boot = run->boot_id == boot;
    BH_TRY(const auto steps, journal.steps(run->id));
    for (const auto& step : steps) {
      if (step.kind != "set-driver" && step.kind != "prove" && step.kind != "set-virtual-functions") continue;
      if (step.state == StepState::not_done) continue;
      const auto action = plan::action_from_json(step.action);
      if (!action.ok()) continue;  // a newer bulkhead's; the bus itself is read below
      if (const auto* driver = std::get_if<plan::SetDriver>(&*action)) {
        std::erase(proved, driver->target);
        if (step.state != StepState::done || driver->after.driver != passthrough::vfio_driver ||
            driver->before.driver.starts_with("vfio"))
          continue;
        std::erase_if(originals, [&](const auto& one) { return one.target == driver->target; });
        // An override that udev wrote at boot, too late for a driver of the initramfs, is not the host's.
        auto before = driver->before;
        if (before.driver_override == passthrough::vfio_driver) before.driver_override.clear();
        originals.push_back({driver->target, std::move(before)});
      } else if (const auto* proof = std::get_if<plan::Prove>(&*action)) {
        std::erase(proved, proof->target);
        if (this_boot && step.state == StepState::done && !proof->forget) proved.push_back(proof->target);
      } else if (const auto* made = std::get_if<plan::SetVirtualFunctions>(&*action)) {
        std::erase_if(proved,
                      [&](const auto& target) { return target.vf && target.function == made->physical; });
      }
    }
  }
  return ok_status();
}

// Who has a device file of the functions open, so that a refusal can name them.
void name_holders(const fs::path& root, passthrough::Tree& tree) {
  std::vector<fs::path> files;
  std::vector<std::size_t> owners;
  for (std::size_t i = 0; i < tree.functions.size(); ++i) {
    for (const auto& node : tree.functions[i].nodes) {
      files.push_back(root / fs::path(node).relative_path());
      owners.push_back(i);
    }
  }
  if (files.empty()) return;
  const auto openers = process::openers(files);
  if (!openers.ok()) return;  // not root: the writes are refused for the same reason
  for (const auto& opener : openers->who) {
    for (const auto file : opener.files) {
      if (file >= owners.size()) continue;
      auto& holders = tree.functions[owners[file]].holders;
      const bool known = std::any_of(holders.begin(), holders.end(),
                                     [&](const inventory::Holder& h) { return h.pid == opener.who.pid; });
      if (!known)
        holders.push_back({.pid = opener.who.pid,
                           .start_time = opener.who.start_time,
                           .name = opener.who.name,
                           .cgroup = opener.who.cgroup});
    }
  }
}

// A proposal whose node file is made from the host it is held against.
Result<Proposal> propose_made(const observe::Access& access, const Make& make, const plan::Options& options) {
  Proposal proposal;
  observe::Access deciding = access;
  if (deciding.detail == observe::Detail::full) deciding.detail = observe::Detail::plan;
  BH_TRY(proposal.host, observe::host(deciding));
  plan::Remembered remembered;
  auto journal = store::Store::open(access.state_dir, store::Store::Access::read_only);
  if (!journal.ok() && journal.error().code() != Errc::not_found) return std::move(journal).error();
  if (journal.ok()) {
    if (proposal.host.boot_id) {
      BH_TRY(const auto locks, (*journal)->clock_locks(*proposal.host.boot_id));
      for (const auto& lock : locks)
        remembered.clock_locks.push_back({.gpu = lock.gpu, .range = {.low = lock.low, .high = lock.high}});
    }
    BH_TRY(const auto runs, (*journal)->runs());
    BH_TRY(const auto flying, (*journal)->in_flight());
    for (const auto& run : runs) {
      if (run.state == store::RunState::running) proposal.unsettled = run.id;
    }
    if (!flying.empty()) proposal.unsettled = flying.front().run;
  }
  BH_TRY(Wanted wanted, make(proposal.host, remembered));
  proposal.node = std::move(wanted.node);
  proposal.text = std::move(wanted.text);
  const spec::NodeFile& node = proposal.node;
  for (const auto& path : plan::files_of_interest(node, proposal.host)) {
    BH_TRY(auto content, file_now(access.root / fs::path(path).relative_path()));
    remembered.files.push_back({.path = path, .content = std::move(content)});
  }
  // Drivers are bound by this machine's kernel alone, not by a tree that looks like one.
  if (plan::needs_tree(node) && access.root == "/") {
    BH_TRY(remembered.tree, devices(access));
    if (journal.ok() && proposal.host.boot_id)
      BH_CHECK(remember_devices(**journal, *proposal.host.boot_id, remembered));
  }
  // Units that the node file names and the inventory does not look at.
  std::unique_ptr<systemd::Systemd> manager;
  for (const auto& name : plan::units_of_interest(node)) {
    auto& units = proposal.host.units;
    if (std::any_of(units.begin(), units.end(), [&](const auto& unit) { return unit.name == name; }))
      continue;
    if (!manager) {
      auto connected = systemd::Systemd::connect(access.root);
      if (!connected.ok()) break;  // the plan says that it knows no state of the unit
      manager = std::move(*connected);
    }
    if (auto unit = manager->unit(name); unit.ok()) units.push_back(std::move(*unit));
  }
  proposal.answer = plan::make(node, proposal.host, remembered, options);
  return proposal;
}

// What a plan means, without what moves by itself.
std::string fingerprint(const Proposal& proposal) {
  if (const auto* refusal = proposal.refusal()) return "refusal" + dump(plan::to_json(*refusal));
  std::string text;
  for (const auto& step : proposal.plan()->steps) {
    text += dump(plan::to_json(step.action));
    for (const auto& holder : step.evicts) text += fmt::format(" {}@{}", holder.pid, holder.start_time);
  }
  return text;
}

std::vector<store::OwnedInstance> present_in(const inventory::Host& host,
                                             const std::vector<store::OwnedInstance>& mine) {
  std::vector<store::OwnedInstance> present;
  for (const auto& gpu : host.gpus) {
    for (const auto& instance : gpu.instances) {
      present.push_back({.gpu = gpu.uuid,
                         .gpu_instance = instance.id,
                         .profile_id = instance.profile,
                         .start = instance.place.start});
    }
  }
  // Of a GPU that cannot be seen now, or whose MIG state cannot be read, nothing is known.
  for (const auto& own : mine) {
    const bool seen = std::any_of(host.gpus.begin(), host.gpus.end(), [&](const inventory::Gpu& gpu) {
      return gpu.uuid == own.gpu && gpu.mig_why.empty();
    });
    if (!seen) present.push_back(own);
  }
  return present;
}

// What --adopt takes over: foreign instances of GPUs in MIG mode that the plan keeps.
std::vector<store::OwnedInstance> to_adopt(const Proposal& proposal) {
  std::vector<store::OwnedInstance> all;
  for (const auto& gpu : proposal.host.gpus) {
    const bool managed =
        std::any_of(proposal.node.gpus.begin(), proposal.node.gpus.end(), [&](const spec::GpuRule& rule) {
          return rule.mode == spec::Mode::mig && plan::selects(rule.select, gpu);
        });
    if (!managed) continue;
    for (const auto& instance : gpu.instances) {
      if (instance.ours) continue;
      const bool goes =
          proposal.plan() != nullptr &&
          std::any_of(
              proposal.plan()->steps.begin(), proposal.plan()->steps.end(), [&](const plan::Step& step) {
                const auto* destroy = std::get_if<plan::DestroyInstance>(&step.action);
                return destroy != nullptr && destroy->gpu == gpu.uuid && destroy->gpu_instance == instance.id;
              });
      if (!goes)
        all.push_back({.gpu = gpu.uuid,
                       .gpu_instance = instance.id,
                       .profile_id = instance.profile,
                       .start = instance.place.start});
    }
  }
  return all;
}

Result<Outcome> Session::apply(const Make& make) {
  const std::uint64_t started = monotonic_ns();
  Outcome outcome;
  const auto finish = [&](Verdict verdict) {
    outcome.verdict = verdict;
    outcome.elapsed_ms = (monotonic_ns() - started) / 1'000'000;
    outcome.driver_calls = worker_.driver_calls();
    return std::move(outcome);
  };
  BH_TRY(const std::string boot, boot_id());
  BH_CHECK(settle(outcome));
  BH_TRY(Proposal proposal, propose_made(options_.access, make, options_.plan));
  const spec::NodeFile node = proposal.node;
  const std::string text = proposal.text;
  BH_TRY(outcome.owned, journal_->owned(boot));
  BH_CHECK(journal_->forget_missing(boot, present_in(proposal.host, outcome.owned)));
  const auto adopted = options_.plan.adopt && proposal.plan() != nullptr
                           ? to_adopt(proposal)
                           : std::vector<store::OwnedInstance>{};
  if (proposal.refusal() != nullptr) {
    outcome.proposal = std::move(proposal);
    return finish(Verdict::refused);
  }
  if (proposal.plan()->empty() && adopted.empty()) {
    BH_CHECK(close_open_run(text));
    outcome.after = proposal.host;
    outcome.proposal = std::move(proposal);
    return finish(Verdict::nothing_to_do);
  }
  if (options_.agree) {
    const bool yes = options_.agree(proposal);
    if (!yes) {
      outcome.proposal = std::move(proposal);
      return finish(Verdict::declined);
    }
    // Time has passed: what was agreed to must still be what would be done.
    BH_TRY(Proposal now, propose(options_.access, node, text, options_.plan));
    if (fingerprint(now) != fingerprint(proposal)) {
      return Error(Errc::conflict, "the host changed since the plan was shown; nothing was done",
                   "look at the new plan: bulkhead plan -f FILE");
    }
    proposal = std::move(now);
  }

  const plan::Plan plan = *proposal.plan();
  const inventory::Host host = proposal.host;
  host_ = &host;
  outcome.proposal = std::move(proposal);
  BH_TRY(const auto continues, open_run());
  BH_TRY(const std::int64_t run, journal_->begin_run({.verb = options_.verb,
                                                      .boot_id = boot,
                                                      .pid = ::getpid(),
                                                      .node_file = text,
                                                      .continues = continues}));
  outcome.run = run;
  if (!adopted.empty()) {
    BH_CHECK(journal_->adopt(run, boot, adopted));
    tell(Event::Kind::adopted,
         fmt::format("{} instance{} of somebody else {} ours now", adopted.size(),
                     adopted.size() == 1 ? "" : "s", adopted.size() == 1 ? "is" : "are"));
  }

  devices_ = Json::array();
  for (const auto& step : plan.steps) {
    if (changes_at_boot(step.action)) devices_.push_back(plan::to_json(step.action));
  }
  std::size_t number = 0;
  for (const auto& step : plan.steps) {
    ++number;
    const std::string what = sentence(step.action, &host);
    const std::uint64_t step_started = monotonic_ns();
    Taken taken;
    if (options_.stop && options_.stop()) {
      taken.why = "stopped by a signal before it began";
    } else {
      tell(Event::Kind::doing, what, number, plan.steps.size());
      auto detail = detail_for(step.action, boot);
      if (detail.ok()) {
        if (step.reboot_owed) (*detail)["reset_owed"] = true;
        BH_TRY(taken, take(run, step.action, step.why, std::move(*detail), step.evicts, std::nullopt));
      } else {
        taken.why = detail.error().message();
        taken.hint = detail.error().hint();
        taken.code = detail.error().code();
      }
    }
    const std::uint64_t elapsed = (monotonic_ns() - step_started) / 1'000'000;
    if (taken.ok) {
      ++outcome.steps_done;
      outcome.reboot_owed = outcome.reboot_owed || step.reboot_owed;
      tell(Event::Kind::done, what, number, plan.steps.size(), elapsed, taken.note);
      continue;
    }
    tell(Event::Kind::failed, what + ": " + taken.why, number, plan.steps.size(), elapsed);
    outcome.failure = fmt::format("{}: {}", what, taken.why);
    outcome.hint = taken.hint;
    outcome.code = taken.code;
    if (taken.in_doubt) outcome.left.push_back(outcome.failure);
    BH_TRY(const auto done, done_steps(run));
    BH_CHECK(undo(run, done, &host, boot, outcome, {}));
    if (outcome.left.empty()) BH_CHECK(journal_->give_back_adopted(run));
    BH_CHECK(journal_->end_run(run, store::RunState::failed, outcome.failure));
    outcome.reboot_owed = false;
    return finish(outcome.left.empty() ? Verdict::undone : Verdict::stuck);
  }

  tell(Event::Kind::checking, "a second plan must be empty");
  auto second = propose(options_.access, node, text, options_.plan);
  if (!second.ok()) {
    outcome.failure = second.error().message();
    outcome.hint = second.error().hint();
  } else if (const auto* refusal = second->refusal()) {
    for (const auto& reason : refusal->reasons)
      outcome.remaining.push_back(fmt::format("{}: {}", reason.subject, reason.why));
  } else {
    for (const auto& step : second->plan()->steps)
      outcome.remaining.push_back(sentence(step.action, &second->host));
  }
  if (second.ok()) outcome.after = std::move(second->host);
  BH_TRY(outcome.owned, journal_->owned(boot));
  const bool good = outcome.remaining.empty() && outcome.failure.empty();
  BH_CHECK(journal_->end_run(run, store::RunState::done,
                             good ? "" : "carried out, but a second plan is not empty"));
  return finish(good ? Verdict::applied : Verdict::differs);
}

// ---- rollback
Result<Outcome> Session::rollback() {
  const std::uint64_t started = monotonic_ns();
  Outcome outcome;
  const auto finish = [&](Verdict verdict) {
    outcome.verdict = verdict;
    outcome.elapsed_ms = (monotonic_ns() - started) / 1'000'000;
    outcome.driver_calls = worker_.driver_calls();
    return std::move(outcome);
  };
  BH_TRY(const std::string boot, boot_id());
  BH_CHECK(settle(outcome));

  // The newest run that still holds something, and what it continued.
  BH_TRY(auto runs, journal_->runs());
  std::erase_if(runs, is_aside);
  std::optional<store::Run> target;
  // A rollback that was cut off is finished first, even when only its last record is missing.
  if (!runs.empty() && runs.front().verb == "rollback" && runs.front().rolls_back &&
      runs.front().state == store::RunState::interrupted) {
    BH_TRY(target, journal_->run(*runs.front().rolls_back));
  }
  for (const auto& run : runs) {
    if (target) break;
    if (run.verb != "apply" || run.state == store::RunState::rolled_back) continue;
    BH_TRY(const auto done, done_steps(run.id));
    BH_TRY(const auto mine, journal_->owned(boot));
    const bool adopted = std::any_of(mine.begin(), mine.end(),
                                     [&](const auto& own) { return own.adopted && own.run == run.id; });
    // One that was cut off is what the caller means, even when nothing of it was done.
    const bool cut_off = run.state == store::RunState::interrupted;
    if (done.empty() && !adopted && !run.continues && !cut_off) continue;
    if (done.empty() && !adopted && run.state == store::RunState::failed) continue;
    target = run;
    break;
  }
  if (!target) return finish(Verdict::nothing_to_do);
  std::vector<std::int64_t> chain = {target->id};
  for (auto at = target->continues; at && chain.size() < 10'000;) {
    BH_TRY(const auto before, journal_->run(*at));
    if (!before) break;
    chain.push_back(before->id);
    at = before->continues;
  }
  std::vector<store::Step> steps;  // oldest first
  for (auto id = chain.rbegin(); id != chain.rend(); ++id) {
    BH_TRY(const auto run, journal_->run(*id));
    if (!run) continue;
    BH_TRY(const auto back, to_take_back(*run, boot));
    steps.insert(steps.end(), back.begin(), back.end());
  }

  auto observed = observe::host(options_.access);
  const inventory::Host* host = observed.ok() ? &*observed : nullptr;
  host_ = host;
  const bool binds = std::any_of(steps.begin(), steps.end(), [](const store::Step& step) {
    return step.kind == plan::kind_of(plan::Action(plan::SetDriver{}));
  });
  passthrough::Tree tree;
  if (binds && options_.access.root == "/") {
    BH_TRY(tree, devices(options_.access));
  }
  // The device that an undo takes from a driver; null: it stays where it is.
  const auto taken_from = [&](const plan::Action& action) -> const passthrough::Function* {
    const auto* driver = std::get_if<plan::SetDriver>(&action);
    if (driver == nullptr) return nullptr;
    const auto address = passthrough::resolve(tree, driver->target);
    const auto* function = address ? tree.find(*address) : nullptr;
    const bool to_vfio = driver->after.driver == passthrough::vfio_driver;
    return function != nullptr && !function->driver.empty() && function->with_vfio() != to_vfio ? function
                                                                                                : nullptr;
  };
  // Whoever holds an instance, or a device, that has to go.
  const auto holders = [&](const plan::Action& action) {
    std::vector<inventory::Holder> found;
    if (const auto* function = taken_from(action)) return function->holders;
    const auto* gone = std::get_if<plan::DestroyInstance>(&action);
    if (gone == nullptr || host == nullptr) return found;
    for (const auto& gpu : host->gpus) {
      if (gpu.uuid != gone->gpu) continue;
      for (const auto& instance : gpu.instances) {
        if (instance.profile == gone->profile_id && instance.place.start == gone->place.start)
          found = instance.holders();
      }
    }
    return found;
  };
  std::vector<std::string> undos;
  std::vector<std::tuple<Uuid, unsigned, unsigned>> going;  // instances that the undos before destroy
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    auto action = plan::action_from_json(step->action);
    if (!action.ok())
      return std::move(action).error().in(fmt::format("run {}, step {}", step->run, step->id));
    const plan::Action back = plan::undo_of(*action);
    undos.push_back(sentence(back, host));
    // Somebody, or a lease, made instances there since: the mode cannot go off below them.
    if (const auto* mode = std::get_if<plan::SetMigMode>(&back); mode != nullptr && !mode->after && host) {
      for (const auto& gpu : host->gpus) {
        if (gpu.uuid != mode->gpu) continue;
        const auto stays = [&](const inventory::GpuInstance& instance) {
          return std::find(going.begin(), going.end(),
                           std::tuple(gpu.uuid, instance.profile, instance.place.start)) == going.end();
        };
        const auto theirs =
            std::count_if(gpu.instances.begin(), gpu.instances.end(),
                          // One that stands where ours stood before a reboot is theirs all the same.
                          [](const auto& instance) { return !instance.ours; });
        const auto of_leases =
            std::count_if(gpu.instances.begin(), gpu.instances.end(),
                          [&](const auto& instance) { return instance.ours && stays(instance); });
        if (theirs > 0)
          outcome.refused.push_back({.subject = undos.back(),
                                     .why = fmt::format("{} instance{} of somebody else {} on it", theirs,
                                                        theirs == 1 ? "" : "s", theirs == 1 ? "is" : "are"),
                                     .way_out = "remove them: nvidia-smi mig -dci; nvidia-smi mig -dgi"});
        if (of_leases > 0)
          outcome.refused.push_back(
              {.subject = undos.back(),
               .why = fmt::format("{} instance{} made since {} on it, for leases", of_leases,
                                  of_leases == 1 ? "" : "s", of_leases == 1 ? "is" : "are"),
               .way_out = "end the leases: bulkhead lease list; bulkhead lease release ID"});
      }
    }
    if (const auto* gone = std::get_if<plan::DestroyInstance>(&back))
      going.emplace_back(gone->gpu, gone->profile_id, gone->place.start);
    if (const auto* function = taken_from(back); function != nullptr && !function->uses.empty())
      outcome.refused.push_back({.subject = undos.back(),
                                 .why = fmt::format("the host uses it since: {}", function->uses.front()),
                                 .way_out = "stop that use first, then: bulkhead rollback"});
    if (const auto busy = holders(back); !busy.empty() && !options_.plan.evict) {
      outcome.refused.push_back(
          {.subject = undos.back(),
           .why = fmt::format("in use by {} process{}", busy.size(), busy.size() == 1 ? "" : "es"),
           .holders = busy,
           .way_out = "end them, or: bulkhead rollback --evict"});
    }
  }
  if (!outcome.refused.empty()) return finish(Verdict::refused);
  if (options_.agree_to_undo && !options_.agree_to_undo(undos)) return finish(Verdict::declined);

  BH_TRY(const std::int64_t run,
         journal_->begin_run(
             {.verb = "rollback", .boot_id = boot, .pid = ::getpid(), .rolls_back = target->id}));
  outcome.run = run;
  BH_CHECK(undo(run, steps, host, boot, outcome, [&](const plan::Action& action) {
    return options_.plan.evict ? holders(action) : std::vector<inventory::Holder>{};
  }));
  if (!outcome.left.empty()) {
    outcome.failure = outcome.left.front();
    if (binds) outcome.hint = whole_again(steps);
    BH_CHECK(journal_->end_run(run, store::RunState::failed, outcome.failure));
    return finish(Verdict::stuck);
  }
  for (const auto id : chain) {
    BH_CHECK(journal_->give_back_adopted(id));
    BH_CHECK(journal_->end_run(id, store::RunState::rolled_back, fmt::format("taken back by run {}", run)));
  }
  BH_CHECK(journal_->end_run(run, store::RunState::done, ""));
  return finish(Verdict::rolled_back);
}

}  // namespace

// ---- the front
Result<Proposal> propose(const observe::Access& access, const spec::NodeFile& node, const std::string& text,
                         const plan::Options& options) {
  return propose_made(access, as_written(node, text), options);
}

Result<Outcome> apply(const Options& options, const spec::NodeFile& node, const std::string& text) {
  return alter(options, as_written(node, text));
}

Result<Outcome> alter(const Options& options, const Make& make) {
  BH_TRY(const auto session, Session::begin(options, options.verb));
  return session->apply(make);
}

Result<Outcome> rollback(const Options& options) {
  BH_TRY(const auto session, Session::begin(options, "rollback"));
  return session->rollback();
}

Result<passthrough::Tree> devices(const observe::Access& access) {
  BH_TRY(auto tree, vfio::read(access.root));
  if (access.root == "/") name_holders(access.root, tree);
  return tree;
}

Result<std::vector<HistoryEntry>> history(const observe::Access& access, std::optional<std::int64_t> run) {
  BH_TRY(const auto journal, store::Store::open(access.state_dir, store::Store::Access::read_only));
  std::vector<HistoryEntry> entries;
  const bool somebody_runs = store::Lock::held(access.state_dir);
  const auto add = [&](store::Run one, std::vector<store::Step> steps) {
    const bool cut_off = one.state == store::RunState::running && !somebody_runs;
    entries.push_back({.run = std::move(one), .steps = std::move(steps), .cut_off = cut_off});
  };
  if (!run) {
    BH_TRY(auto runs, journal->runs());
    for (auto& one : runs) {
      BH_TRY(auto steps, journal->steps(one.id));
      add(std::move(one), std::move(steps));
    }
    return entries;
  }
  BH_TRY(auto one, journal->run(*run));
  if (!one)
    return Error(Errc::not_found, fmt::format("there is no run {}", *run), "list them: bulkhead history");
  BH_TRY(auto steps, journal->steps(*run));
  add(std::move(*one), std::move(steps));
  return entries;
}

}  // namespace bulkhead::execute
