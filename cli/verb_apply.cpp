// bulkhead apply: makes the host what the node file says, or leaves it as it was.
#include <algorithm>
#include <memory>
#include <optional>
#include <variant>

#include <fmt/format.h>

#include "cli/daemon_rest.hpp"
#include "cli/plan_page.hpp"

namespace bulkhead::cli {

namespace {
// The driver changes a MIG mode only while nobody has the GPU open.
bool needs_idle_driver(const plan::Plan& plan) {
  return std::any_of(plan.steps.begin(), plan.steps.end(), [](const plan::Step& step) {
    return std::holds_alternative<plan::SetMigMode>(step.action);
  });
}
}  // namespace

std::function<int(const Context&)> bind_apply(CLI::App& app) {
  struct Options {
    std::string file = {};
    bool json = false, evict = false, adopt = false, yes = false, dry = false;
    unsigned grace = 10;
    double step_timeout = 0;
  };
  auto options = std::make_shared<Options>();
  app.add_option("-f,--file", options->file, "The node file (bulkhead schema, docs/node-file.md)")
      ->type_name("FILE")
      ->required();
  app.add_flag("-y,--yes", options->yes, "Do not ask");
  app.add_flag("--dry-run", options->dry, "Show the plan and stop: the same as bulkhead plan");
  app.add_flag("--evict", options->evict, "End the processes that hold what must go");
  app.add_option("--grace", options->grace, "Seconds between SIGTERM and SIGKILL, at most 3600")
      ->check(CLI::Range(0U, 3600U))
      ->capture_default_str();
  app.add_flag("--adopt", options->adopt, "Take over MIG instances made by others");
  app.add_option("--step-timeout", options->step_timeout,
                 "Seconds a step may take (default: a minute; more for MIG mode, units, grub)")
      ->check(CLI::Range(0.1, 86400.0));
  app.add_flag("--json", options->json, "For programs; does not ask, so it needs --yes");
  return [options](const Context& context) {
    auto loaded = load_node_file(context, options->file);
    if (const int* code = std::get_if<int>(&loaded)) return *code;
    const auto& node = std::get<NodeText>(loaded);
    const plan::Options how = {.evict = options->evict, .adopt = options->adopt};
    if (options->dry) {
      const auto proposal = execute::propose(access_of(context), node.node, node.text, how);
      if (!proposal.ok()) return fail(context, Error(proposal.error()).in("apply"));
      std::string out;
      if (options->json) {
        out = dump(to_json(*proposal)) + "\n";
      } else if (const auto* plan = proposal->plan()) {
        out = render(context, *plan, proposal->host) + "\nDry run: nothing was changed.\n";
      } else {
        out = render(context, *proposal->refusal());
      }
      const int printed = print(out);
      return printed != exit_ok ? printed : proposal->refusal() != nullptr ? exit_findings : exit_ok;
    }
    if (!options->yes && (options->json || !stdin_is_terminal())) {
      return fail(
          context,
          Error(Errc::invalid, "apply: nobody can be asked: standard input is no terminal; nothing was done",
                fmt::format("look first:  bulkhead plan -f {0}\nthen:        bulkhead apply -f {0} --yes",
                            shell_word(options->file))));
    }
    execute::Options run{.access = access_of(context), .plan = how, .grace_ms = options->grace * 1000};
    if (options->step_timeout > 0) run.step_deadline_ms = static_cast<unsigned>(options->step_timeout * 1000);
    run.tell = teller(context, options->json);
    std::unique_ptr<DaemonRest> rest;
    std::optional<Error> no_rest;
    const auto let_go = [&] {
      auto begun = DaemonRest::begin(context);
      if (begun.ok())
        rest = std::move(*begun);
      else
        no_rest = std::move(begun).error();
      return !no_rest;
    };
    // The daemon's files are in the way of the plan itself where a device changes its driver.
    if (!node.node.devices.empty() && !let_go()) return fail(context, Error(*no_rest).in("apply"));
    const auto agree = [&](const execute::Proposal& proposal) {
      if (!options->yes) {
        print(render(context, *proposal.plan(), proposal.host) + "\n");
        if (!ask("Carry it out?")) return false;
      }
      return rest || !needs_idle_driver(*proposal.plan()) || let_go();
    };
    if (!options->yes || DaemonRest::somebody(context)) run.agree = agree;
    run.stop = stop_on_signal();
    const auto outcome = execute::apply(run, node.node, node.text);
    rest.reset();
    if (no_rest) return fail(context, Error(*no_rest).in("apply").in("nothing was done"));
    if (!outcome.ok()) return fail(context, Error(outcome.error()).in("apply"));
    return report(context, *outcome, options->json);
  };
}

}  // namespace bulkhead::cli
