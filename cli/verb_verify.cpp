// bulkhead verify: whether the host still is what the node file says. Reading only; for cron and monitoring.
#include <memory>

#include <fmt/format.h>

#include "cli/plan_page.hpp"

namespace bulkhead::cli {

std::function<int(const Context&)> bind_verify(CLI::App& app) {
  struct Options {
    std::string file = {};
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  app.add_option("-f,--file", options->file, "The node file")->required();
  app.add_flag("--json", options->json, "For programs");
  return [options](const Context& context) {
    auto loaded = load_node_file(context, options->file);
    if (const int* code = std::get_if<int>(&loaded)) return *code;
    const auto& node = std::get<NodeText>(loaded);
    const auto proposal = execute::propose(access_of(context), node.node, node.text, {});
    if (!proposal.ok()) return fail(context, Error(proposal.error()).in("verify"));
    std::vector<std::string> differences;
    if (const auto* plan = proposal->plan()) {
      for (const auto& step : plan->steps)
        differences.push_back(fmt::format("{} ({})", plan::describe(step.action, &proposal->host), step.why));
    } else {
      for (const auto& reason : proposal->refusal()->reasons)
        differences.push_back(fmt::format("{}: {}", reason.subject, reason.why));
    }
    if (proposal->unsettled)
      differences.push_back(fmt::format("run {} was cut off and is not settled yet", *proposal->unsettled));
    std::string out;
    if (options->json) {
      out = dump(Json{{"as_written", differences.empty()}, {"differences", differences}}) + "\n";
    } else if (differences.empty()) {
      out = paint(context, Tone::good,
                  fmt::format("{} is as {} says.",
                              proposal->host.hostname.empty() ? "This host" : proposal->host.hostname,
                              options->file)) +
            "\n";
    } else {
      out = paint(context, Tone::bad,
                  fmt::format("{} difference{}; it would take:", differences.size(),
                              differences.size() == 1 ? "" : "s")) +
            "\n";
      for (const auto& one : differences) out += "  " + one + "\n";
      out += fmt::format("To see the whole plan: bulkhead plan -f {}\n", options->file);
    }
    const int printed = print(out);
    return printed != exit_ok ? printed : differences.empty() ? exit_ok : exit_findings;
  };
}

}  // namespace bulkhead::cli
