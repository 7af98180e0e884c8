// bulkhead rollback: takes the newest run back, step by step, last first.
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "cli/daemon_rest.hpp"
#include "cli/plan_page.hpp"

namespace bulkhead::cli {

std::function<int(const Context&)> bind_rollback(CLI::App& app) {
  struct Options {
    bool json = false, evict = false, yes = false;
    unsigned grace = 10;
    double step_timeout = 0;
  };
  auto options = std::make_shared<Options>();
  app.add_flag("-y,--yes", options->yes, "Do not ask");
  app.add_flag("--evict", options->evict, "End the processes that hold what must go");
  app.add_option("--grace", options->grace, "Seconds between SIGTERM and SIGKILL, at most 3600")
      ->check(CLI::Range(0U, 3600U))
      ->capture_default_str();
  app.add_option("--step-timeout", options->step_timeout, "Seconds a step may take")
      ->check(CLI::Range(0.1, 86400.0));
  app.add_flag("--json", options->json, "For programs; does not ask, so it needs --yes");
  return [options](const Context& context) {
    if (!options->yes && (options->json || !stdin_is_terminal())) {
      return fail(context,
                  Error(Errc::invalid,
                        "rollback: nobody can be asked: standard input is no terminal; nothing was done",
                        "see what it would take back: bulkhead history\nthen: bulkhead rollback --yes"));
    }
    execute::Options run{
        .access = access_of(context), .plan = {.evict = options->evict}, .grace_ms = options->grace * 1000};
    if (options->step_timeout > 0) run.step_deadline_ms = static_cast<unsigned>(options->step_timeout * 1000);
    run.tell = teller(context, options->json);
    std::unique_ptr<DaemonRest> rest;
    std::optional<Error> no_rest;
    const auto agree = [&](const std::vector<std::string>& undos) {
      if (!options->yes) {
        std::string out;
        std::size_t number = 0;
        for (const auto& one : undos) out += fmt::format("{:>4}  {}\n", ++number, one);
        print(out);
        if (!ask("Carry it out?")) return false;
      }
      // Whether a MIG mode is among them or not: it is a second without readings.
      auto begun = DaemonRest::begin(context);
      if (begun.ok())
        rest = std::move(*begun);
      else
        no_rest = std::move(begun).error();
      return !no_rest;
    };
    if (!options->yes || DaemonRest::somebody(context)) run.agree_to_undo = agree;
    const auto outcome = execute::rollback(run);
    rest.reset();
    if (no_rest) return fail(context, Error(*no_rest).in("rollback"));
    if (!outcome.ok()) return fail(context, Error(outcome.error()).in("rollback"));
    return report(context, *outcome, options->json);
  };
}

}  // namespace bulkhead::cli
