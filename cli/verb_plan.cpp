// bulkhead plan: what apply would do, or whether more would fit, and nothing else.
#include <memory>

#include <fmt/format.h>

#include "cli/plan_page.hpp"
#include "cli/what_if.hpp"

namespace bulkhead::cli {

std::function<int(const Context&)> bind_plan(CLI::App& app) {
  struct Options {
    std::string file = {};
    bool json = false, evict = false, adopt = false;
    WhatIfOptions what_if = {};
  };
  auto options = std::make_shared<Options>();
  app.add_option("-f,--file", options->file, "The node file (bulkhead schema, docs/node-file.md)")
      ->type_name("FILE");
  app.add_flag("--json", options->json, "The plan, or the refusal, for programs");
  app.add_flag("--evict", options->evict, "Plan as if holders of instances that must go may be ended");
  app.add_flag("--adopt", options->adopt, "Plan as if instances made by others were ours");
  app.add_option(
         "--what-if", options->what_if.wanted,
         "Without a node file: would these MIG instances fit, and after which moves? Like '12 x 3g.40gb'; "
         "comma-separated, or several times")
      ->type_name("WANTED");
  app.add_option("--inventory", options->what_if.inventories,
                 "For --what-if: the hosts in these files, written by inventory --json, instead of this one")
      ->type_name("FILE");
  CLI::Option* moves = app.add_option("--moves", options->what_if.moves,
                                      "For --what-if: at most so many moves (default: no limit)");
  return [options, moves](const Context& context) {
    const auto refuse = [&](const char* what, const char* hint) {
      return fail(context, Error(Errc::invalid, std::string("plan: ") + what, hint));
    };
    if (!options->what_if.wanted.empty()) {
      if (!options->file.empty())
        return refuse("-f and --what-if are two questions",
                      "what a node file would change: bulkhead plan -f FILE\n"
                      "whether more would fit:        bulkhead plan --what-if '12 x 3g.40gb'");
      WhatIfOptions asked = options->what_if;
      asked.limited = moves->count() > 0;
      asked.evict = options->evict;
      asked.adopt = options->adopt;
      asked.json = options->json;
      return what_if(context, asked);
    }
    if (!options->what_if.inventories.empty() || moves->count() > 0)
      return refuse("--inventory and --moves belong to --what-if",
                    "like: bulkhead plan --what-if '12 x 3g.40gb' --inventory a.json b.json");
    if (options->file.empty())
      return refuse("which node file?",
                    "what it would change:  bulkhead plan -f node.yaml\n"
                    "would more fit:        bulkhead plan --what-if '12 x 3g.40gb'");
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
