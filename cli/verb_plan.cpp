// bulkhead plan: what apply would do, and nothing else.
#include <memory>

#include <fmt/format.h>

#include "cli/plan_page.hpp"

namespace bulkhead::cli {

std::function<int(const Context&)> bind_plan(CLI::App& app) {
  struct Options {
    std::string file = {};
    bool json = false, evict = false, adopt = false;
  };
  auto options = std::make_shared<Options>();
  app.add_option("-f,--file", options->file, "The node file (bulkhead schema, docs/node-file.md)")
      ->type_name("FILE")
      ->required();
  app.add_flag("--json", options->json, "The plan, or the refusal, for programs");
  app.add_flag("--evict", options->evict, "Plan as if holders of instances that must go may be ended");
  app.add_flag("--adopt", options->adopt, "Plan as if instances made by others were ours");
  return [options](const Context& context) {
    auto loaded = load_node_file(context, options->file);
    if (const int* code = std::get_if<int>(&loaded)) return *code;
    const auto& node = std::get<NodeText>(loaded);
    const auto proposal = execute::propose(access_of(context), node.node, node.text,
                                           {.evict = options->evict, .adopt = options->adopt});
    if (!proposal.ok()) return fail(context, Error(proposal.error()).in("plan"));
    const int code = proposal->refusal() != nullptr ? exit_findings : exit_ok;
    std::string out;
    if (options->json) {
      out = dump(to_json(*proposal)) + "\n";
    } else {
      if (proposal->unsettled) {
        out += paint(context, Tone::warn,
                     fmt::format("Run {} was cut off; the next apply or rollback settles it first, which may "
                                 "change this plan.",
                                 *proposal->unsettled)) +
               "\n";
      }
      if (const auto* plan = proposal->plan()) {
        out += render(context, *plan, proposal->host);
        if (!plan->empty())
          out += fmt::format("\nNothing was changed. To carry it out: bulkhead apply -f {}{}{}\n",
                             shell_word(options->file), options->evict ? " --evict" : "",
                             options->adopt ? " --adopt" : "");
      } else {
        out += render(context, *proposal->refusal());
      }
    }
    const int printed = print(out);
    return printed == exit_ok ? code : printed;
  };
}

}  // namespace bulkhead::cli
