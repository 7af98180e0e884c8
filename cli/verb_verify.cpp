// bulkhead verify: whether the host still is what the node file says. Reading only; for cron and monitoring.
#include <memory>

#include <fmt/format.h>

#include "base/text.hpp"
#include "cli/plan_page.hpp"

namespace bulkhead::cli {

std::function<int(const Context&)> bind_verify(CLI::App& app) {
  struct Options {
    std::string file = {};
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  app.add_option("-f,--file", options->file, "The node file (bulkhead schema, docs/node-file.md)")
      ->type_name("FILE")
      ->required();
  app.add_flag("--json", options->json, "The differences, for programs");
  return [options](const Context& context) {
    auto loaded = load_node_file(context, options->file);
    if (const int* code = std::get_if<int>(&loaded)) return *code;
    const auto& node = std::get<NodeText>(loaded);
    const auto proposal = execute::propose(access_of(context), node.node, node.text, {});
    if (!proposal.ok()) return fail(context, Error(proposal.error()).in("verify"));
    std::vector<std::string> differences;
    const plan::Refusal* refusal = proposal->refusal();
    if (const auto* plan = proposal->plan()) {
      for (const auto& step : plan->steps)
        differences.push_back(fmt::format("{} ({})", plan::describe(step.action, &proposal->host), step.why));
    } else {
      for (const auto& reason : refusal->reasons)
        differences.push_back(fmt::format("{}: {}", reason.subject, reason.why));
    }
    if (proposal->unsettled)
      differences.push_back(fmt::format("run {} was cut off and is not settled yet", *proposal->unsettled));
    std::vector<std::string> notes;
    if (const auto* plan = proposal->plan()) notes = plan->notes;  // a reboot that is owed is among them
    std::string out;
    if (options->json) {
      Json answer{{"as_written", differences.empty()}, {"differences", differences}, {"notes", notes}};
      if (refusal != nullptr) answer["refusal"] = plan::to_json(*refusal);
      if (proposal->unsettled) answer["unsettled_run"] = *proposal->unsettled;
      out = dump(answer) + "\n";
    } else if (differences.empty()) {
      out = paint(context, Tone::good,
                  fmt::format(
                      "{} is as {} says.",
                      proposal->host.hostname.empty() ? "This host" : printable(proposal->host.hostname, 64),
                      printable(options->file, 4096))) +
            "\n";
    } else {
      const std::string name =
          proposal->host.hostname.empty() ? "This host" : printable(proposal->host.hostname, 64);
      out = paint(context, Tone::bad,
                  refusal != nullptr ? fmt::format("{} is not as {} says, and apply would refuse:", name,
                                                   printable(options->file, 4096))
                                     : fmt::format("{} is not as {} says; {} step{} away:", name,
                                                   printable(options->file, 4096), differences.size(),
                                                   differences.size() == 1 ? "" : "s")) +
            "\n";
      for (const auto& one : differences) out += "  " + one + "\n";
      out += fmt::format("{}: bulkhead plan -f {}\n",
                         refusal != nullptr ? "Who is in the way, and the way out" : "To see the whole plan",
                         shell_word(options->file));
    }
    if (!options->json) {
      for (const auto& note : notes) out += fmt::format("note: {}\n", note);
    }
    const int printed = print(out);
    return printed != exit_ok ? printed : differences.empty() ? exit_ok : exit_findings;
  };
}

}  // namespace bulkhead::cli
