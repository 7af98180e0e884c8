// bulkhead reclaim: devices of virtual machines go back to the host.
#include <memory>

#include <fmt/format.h>

#include "base/text.hpp"
#include "cli/daemon_rest.hpp"
#include "cli/plan_page.hpp"

namespace bulkhead::cli {

std::function<int(const Context&)> bind_reclaim(CLI::App& app) {
  struct Options {
    std::vector<std::string> devices = {};
    bool json = false, evict = false, yes = false, dry_run = false, rescan = false;
    unsigned grace = 10;
    double step_timeout = 0;
  };
  auto options = std::make_shared<Options>();
  app.add_option("devices", options->devices,
                 "PCI addresses: a device with its companions, or one whose virtual functions go")
      ->required()
      ->type_name("ADDRESS");
  app.add_flag("-y,--yes", options->yes, "Do not ask");
  app.add_flag("--dry-run", options->dry_run, "Show what it would do");
  app.add_flag("--evict", options->evict, "End the virtual machines that have them open");
  app.add_flag(
      "--rescan", options->rescan,
      "Remove each function from the bus on the way and find it anew: for a device that the host's driver "
      "does not start");
  app.add_option("--grace", options->grace, "Seconds between SIGTERM and SIGKILL, at most 3600")
      ->check(CLI::Range(0U, 3600U))
      ->capture_default_str();
  app.add_option("--step-timeout", options->step_timeout, "Seconds a step may take")
      ->check(CLI::Range(0.1, 86400.0));
  app.add_flag("--json", options->json, "For programs; does not ask, so it needs --yes or --dry-run");
  return [options](const Context& context) {
    spec::NodeFile node;
    spec::DeviceRule rule{.pci = {}, .purpose = spec::DevicePurpose::host, .vfs = {}, .line = 1};
    for (const auto& word : options->devices) {
      const auto address = PciAddress::parse(word);
      if (!address.ok())
        return fail(context, Error(Errc::invalid,
                                   fmt::format("reclaim: '{}' is not a PCI address", printable(word, 40)),
                                   "like: bulkhead reclaim 0000:1b:00.0; bulkhead inventory lists them"));
      rule.pci.push_back(*address);
    }
    node.devices.push_back(std::move(rule));
    const std::string text = spec::to_yaml(node);
    const plan::Options how{.evict = options->evict, .rescan = options->rescan};
    if (options->dry_run) {
      const auto proposal = execute::propose(access_of(context), node, text, how);
      if (!proposal.ok()) return fail(context, Error(proposal.error()).in("reclaim"));
      const std::string out = options->json ? dump(to_json(*proposal)) + "\n"
                              : proposal->plan() != nullptr
                                  ? render(context, *proposal->plan(), proposal->host)
                                  : render(context, *proposal->refusal());
      const int printed = print(out);
      return printed != exit_ok ? printed : proposal->refusal() != nullptr ? exit_findings : exit_ok;
    }
    if (!options->yes && (options->json || !stdin_is_terminal())) {
      return fail(context,
                  Error(Errc::invalid,
                        "reclaim: nobody can be asked: standard input is no terminal; nothing was done",
                        "look first: bulkhead reclaim ADDRESS --dry-run\nthen:       bulkhead reclaim "
                        "ADDRESS --yes"));
    }
    // An apply in the journal: a rollback gives the devices away again.
    execute::Options run{.access = access_of(context), .plan = how, .grace_ms = options->grace * 1000};
    if (options->step_timeout > 0) run.step_deadline_ms = static_cast<unsigned>(options->step_timeout * 1000);
    run.tell = teller(context, options->json);
    if (!options->yes) {
      run.agree = [&](const execute::Proposal& proposal) {
        print(render(context, *proposal.plan(), proposal.host) + "\n");
        return ask("Carry it out?");
      };
    }
    run.stop = stop_on_signal();
    // What the daemon has open of it would be in the way of the plan itself.
    auto rest = DaemonRest::begin(context);
    if (!rest.ok()) return fail(context, Error(rest.error()).in("reclaim"));
    const auto outcome = execute::apply(run, node, text);
    rest->reset();
    if (!outcome.ok()) return fail(context, Error(outcome.error()).in("reclaim"));
    return report(context, *outcome, options->json);
  };
}

}  // namespace bulkhead::cli
