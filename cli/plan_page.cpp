#include "cli/plan_page.hpp"

#include <signal.h>
#include <unistd.h>

#include <cstdio>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/limits.hpp"
#include "base/text.hpp"

namespace bulkhead::cli {

namespace {

std::string plural(std::size_t n, std::string_view one) {
  return fmt::format("{} {}{}", n, one, n == 1 ? "" : "s");
}

std::string seconds(std::uint64_t ms) { return fmt::format("{:.2f} s", static_cast<double>(ms) / 1000); }

// "pid 4711 (python3), cgroup /tenant-a"
std::string who(const inventory::Holder& holder) {
  std::string text = fmt::format("pid {} ({})", holder.pid, holder.name);
  if (!holder.cgroup.empty()) text += ", cgroup " + holder.cgroup;
  return text;
}

volatile sig_atomic_t stopped = 0;  // the one thing a signal handler may write
void on_signal(int) { stopped = 1; }

}  // namespace

observe::Access access_of(const Context& context) {
  return {.root = context.root,
          .nvml_library = context.nvml_library,
          .state_dir = context.state_dir,
          .driver_timeout_ms = context.driver_timeout_ms};
}

std::variant<NodeText, int> load_node_file(const Context& context, const std::string& path) {
  auto text = read_file(path, limits::node_file_bytes);
  if (!text.ok()) {
    auto error = std::move(text).error().in("node file");
    if (error.hint().empty()) error = std::move(error).with_hint("what may stand in one: bulkhead schema");
    return fail(context, error);
  }
  auto parsed = spec::parse(*text);
  if (const auto* mistakes = std::get_if<std::vector<spec::Mistake>>(&parsed)) {
    std::fputs(spec::render(*mistakes, printable(path)).c_str(), stderr);
    return fail(context, Error(Errc::invalid,
                               fmt::format("{} has {}; nothing was done", printable(path),
                                           plural(mistakes->size(), "mistake")),
                               "what may stand in it: bulkhead schema"));
  }
  return NodeText{.node = std::move(std::get<spec::NodeFile>(parsed)), .text = std::move(*text)};
}

std::string render(const Context& context, const plan::Plan& plan, const inventory::Host& host) {
  std::string out;
  const std::string name = host.hostname.empty() ? "this host" : host.hostname;
  if (plan.empty()) {
    out +=
        paint(context, Tone::good, fmt::format("{} is as the node file says: nothing to do.", name)) + "\n";
  } else {
    std::size_t losses = 0;
    for (const auto& step : plan.steps) losses += step.losses.size();
    out += paint(context, Tone::bold, fmt::format("{} for {}", plural(plan.steps.size(), "step"), name));
    out += losses == 0 ? "; nobody loses anything"
                       : "; " + paint(context, Tone::bad,
                                      fmt::format("{} {}", losses, losses == 1 ? "loss" : "losses"));
    if (plan.reboot_owed()) out += "; " + paint(context, Tone::warn, "a reboot is owed afterwards");
    out += "\n\n";
    std::size_t number = 0;
    for (const auto& step : plan.steps) {
      out += fmt::format("{:>4}  {}\n", ++number,
                         paint(context, Tone::bold, plan::describe(step.action, &host)));
      out += fmt::format("      why    {}\n", step.why);
      for (const auto& loss : step.losses)
        out +=
            fmt::format("      {}  {} loses {}\n", paint(context, Tone::bad, "costs"), loss.who, loss.what);
      for (const auto& holder : step.evicts)
        out += fmt::format("      {}   {}: SIGTERM, then SIGKILL\n", paint(context, Tone::bad, "ends"),
                           who(holder));
      if (step.reboot_owed)
        out += fmt::format("      {}  takes effect at the next boot or GPU reset\n",
                           paint(context, Tone::warn, "owes "));
      out += paint(context, Tone::dim,
                   fmt::format("      undo   {}", plan::describe(plan::undo_of(step.action), &host))) +
             "\n";
    }
  }
  if (!plan.notes.empty()) {
    out += "\n";
    for (const auto& note : plan.notes) out += fmt::format("note: {}\n", note);
  }
  return out;
}

std::string render(const Context& context, const plan::Refusal& refusal) {
  std::string out =
      paint(context, Tone::bad,
            fmt::format("Refused, for {}. Nothing was changed.", plural(refusal.reasons.size(), "reason"))) +
      "\n";
  for (const auto& reason : refusal.reasons) {
    out += fmt::format("\n  {}: {}\n", paint(context, Tone::bold, reason.subject), reason.why);
    for (const auto& holder : reason.holders) out += fmt::format("    held by {}\n", who(holder));
    for (const auto line : split_lines(reason.way_out))
      out += fmt::format("    {} {}\n", paint(context, Tone::dim, "way out:"), line);
  }
  return out;
}

Json to_json(const execute::Proposal& proposal) {
  Json out = Json::object();
  if (const auto* plan = proposal.plan()) {
    out["answer"] = plan->empty() ? "nothing-to-do" : "plan";
    out["plan"] = plan::to_json(*plan, proposal.host);
  } else {
    out["answer"] = "refused";
    out["refusal"] = plan::to_json(*proposal.refusal());
  }
  if (proposal.unsettled) out["unsettled_run"] = *proposal.unsettled;
  return out;
}

std::function<void(const execute::Event&)> teller(const Context& context, bool quiet) {
  if (quiet) return {};
  return [context](const execute::Event& event) {
    using Kind = execute::Event::Kind;
    const std::string count = event.total > 0 ? fmt::format("[{:>{}}/{}] ", event.number,
                                                            std::to_string(event.total).size(), event.total)
                                              : "";
    std::string line;
    switch (event.kind) {
      case Kind::settled:
        line = fmt::format("settled: {}\n", event.text);
        break;
      case Kind::adopted:
        line = fmt::format("adopted: {}\n", event.text);
        break;
      case Kind::evicting:
        line = fmt::format("ending {} ... ", event.text);
        break;
      case Kind::doing:
        line = fmt::format("{}{} ... ", count, event.text);
        break;
      case Kind::undoing:
        line = fmt::format("{}{} {} ... ", count, paint(context, Tone::warn, "undo"), event.text);
        break;
      case Kind::done:
      case Kind::undone:
        line = fmt::format("{} {}\n{}", paint(context, Tone::good, "done"),
                           paint(context, Tone::dim, seconds(event.elapsed_ms)),
                           event.note.empty() ? "" : fmt::format("      note: {}\n", event.note));
        break;
      case Kind::failed:
      case Kind::undo_failed:
        line = fmt::format("{} {}\n", paint(context, Tone::bad, "failed"),
                           paint(context, Tone::dim, seconds(event.elapsed_ms)));
        break;
      case Kind::checking:
        return;
    }
    std::fputs(line.c_str(), stdout);
    std::fflush(stdout);
  };
}

bool stdin_is_terminal() { return ::isatty(STDIN_FILENO) == 1; }

bool ask(const std::string& question) {
  std::fputs((question + " [y/N] ").c_str(), stdout);
  std::fflush(stdout);
  std::string line;
  char c = 0;
  while (line.size() < 64) {
    const ssize_t got = ::read(STDIN_FILENO, &c, 1);
    if (got <= 0) return false;  // end of file, or Ctrl-C
    if (c == '\n') break;
    line += c;
  }
  const std::string answer = lower(trim(line));
  return answer == "y" || answer == "yes";
}

std::function<bool()> stop_on_signal() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = static_cast<int>(SA_RESETHAND);  // no SA_RESTART: a question at the terminal is let go
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
  return [] { return stopped != 0; };
}

std::string_view name_of(execute::Verdict verdict) {
  switch (verdict) {
    case execute::Verdict::nothing_to_do:
      return "nothing-to-do";
    case execute::Verdict::applied:
      return "applied";
    case execute::Verdict::differs:
      return "differs";
    case execute::Verdict::refused:
      return "refused";
    case execute::Verdict::declined:
      return "declined";
    case execute::Verdict::undone:
      return "undone";
    case execute::Verdict::stuck:
      return "stuck";
    case execute::Verdict::rolled_back:
      return "rolled-back";
  }
  return "unknown";
}

Json to_json(const execute::Outcome& outcome) {
  Json out = {{"verdict", name_of(outcome.verdict)}};
  if (outcome.run) out["run"] = *outcome.run;
  if (outcome.proposal) out.update(to_json(*outcome.proposal));
  out["steps_done"] = outcome.steps_done;
  out["steps_undone"] = outcome.steps_undone;
  out["settled"] = outcome.settled;
  if (!outcome.refused.empty()) out["refusal"] = plan::to_json(plan::Refusal{outcome.refused});
  if (!outcome.failure.empty()) out["failure"] = outcome.failure;
  if (!outcome.hint.empty()) out["hint"] = outcome.hint;
  out["left"] = outcome.left;
  out["remaining"] = outcome.remaining;
  out["reboot_owed"] = outcome.reboot_owed;
  out["elapsed_ms"] = outcome.elapsed_ms;
  out["driver_calls"] = outcome.driver_calls;
  return out;
}

namespace {
int exit_of(execute::Verdict verdict) {
  switch (verdict) {
    case execute::Verdict::nothing_to_do:
    case execute::Verdict::applied:
    case execute::Verdict::rolled_back:
      return exit_ok;
    case execute::Verdict::differs:
    case execute::Verdict::refused:
    case execute::Verdict::declined:
      return exit_findings;
    case execute::Verdict::undone:
    case execute::Verdict::stuck:
      return exit_could_not;
  }
  return exit_could_not;
}
}  // namespace

int report(const Context& context, const execute::Outcome& outcome, bool json) {
  const int code = exit_of(outcome.verdict);
  if (json) {
    const int printed = print(dump(to_json(outcome)) + "\n");
    return printed == exit_ok ? code : printed;
  }
  std::string out;
  const std::string run = outcome.run ? fmt::format(" (run {})", *outcome.run) : "";
  switch (outcome.verdict) {
    case execute::Verdict::nothing_to_do:
      if (outcome.proposal && outcome.proposal->plan() != nullptr) {
        out = render(context, *outcome.proposal->plan(), outcome.proposal->host);
      } else {
        out = "Nothing to take back.\n";
      }
      break;
    case execute::Verdict::applied:
      out = paint(context, Tone::good,
                  fmt::format("Applied: {} in {}; a second plan is empty{}.",
                              plural(outcome.steps_done, "step"), seconds(outcome.elapsed_ms), run)) +
            "\n";
      if (outcome.reboot_owed)
        out += paint(context, Tone::warn, "A reboot is owed: some of it takes effect then.") + "\n";
      break;
    case execute::Verdict::differs:
      out = paint(context, Tone::bad, fmt::format("Carried out, but the host still differs{}:", run)) + "\n";
      for (const auto& step : outcome.remaining) out += "  " + step + "\n";
      if (!outcome.failure.empty()) out += "  " + outcome.failure + "\n";
      out += "To take it back: bulkhead rollback\n";
      break;
    case execute::Verdict::refused:
      out = render(context, outcome.proposal && outcome.proposal->refusal() != nullptr
                                ? *outcome.proposal->refusal()
                                : plan::Refusal{outcome.refused});
      break;
    case execute::Verdict::declined:
      out = "Nothing was changed.\n";
      break;
    case execute::Verdict::rolled_back:
      out = paint(context, Tone::good,
                  fmt::format("Taken back: {} in {}{}.", plural(outcome.steps_undone, "step"),
                              seconds(outcome.elapsed_ms), run)) +
            "\n";
      break;
    case execute::Verdict::undone:
    case execute::Verdict::stuck: {
      std::string message = outcome.failure;
      if (outcome.verdict == execute::Verdict::undone) {
        message += outcome.steps_undone == 0
                       ? fmt::format("\nNothing else had been done: the host is as before{}.", run)
                       : fmt::format("\nTaken back: {}. The host is as before{}.",
                                     plural(outcome.steps_undone, "step"), run);
      } else {
        message += fmt::format("\nNot everything could be taken back{}; left:", run);
        for (const auto& one : outcome.left) message += "\n  " + one;
      }
      const std::string hint = !outcome.hint.empty()                        ? outcome.hint
                               : outcome.verdict == execute::Verdict::stuck ? "try again: bulkhead rollback"
                               : outcome.run ? fmt::format("step by step: bulkhead history {}", *outcome.run)
                                             : "";
      return fail(context, Error(Errc::io, message, hint));
    }
  }
  const int printed = print(out);
  return printed == exit_ok ? code : printed;
}

}  // namespace bulkhead::cli
