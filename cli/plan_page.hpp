// What the verbs about a node file share: reading it, and printing plans, refusals and outcomes.
#pragma once

#include <string>
#include <variant>

#include "base/json.hpp"
#include "cli/cli.hpp"
#include "core/plan/plan.hpp"
#include "core/spec/spec.hpp"
#include "engine/execute/execute.hpp"
#include "engine/observe/observe.hpp"

namespace bulkhead::cli {

struct NodeText {
  spec::NodeFile node = {};
  std::string text = {};
};
// Reads and parses; on failure everything wrong is printed to stderr and the exit code is in the second.
std::variant<NodeText, int> load_node_file(const Context& context, const std::string& path);

observe::Access access_of(const Context& context);

// The page an engineer reads before saying yes.
std::string render(const Context& context, const plan::Plan& plan, const inventory::Host& host);
std::string render(const Context& context, const plan::Refusal& refusal);
Json to_json(const execute::Proposal& proposal);

// One line a step, as they happen.
std::function<void(const execute::Event&)> teller(const Context& context, bool quiet);

// "Do it? [y/N]": reads one line from the terminal; anything but y or yes is no.
bool ask(const std::string& question);
bool stdin_is_terminal();

// After the first SIGINT or SIGTERM it answers true; the second ends the program at once.
std::function<bool()> stop_on_signal();

std::string_view name_of(execute::Verdict verdict);
Json to_json(const execute::Outcome& outcome);
// Prints how it ended and returns the exit code.
int report(const Context& context, const execute::Outcome& outcome, bool json);

}  // namespace bulkhead::cli
