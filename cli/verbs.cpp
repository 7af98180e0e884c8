#include "cli/cli.hpp"

namespace bulkhead::cli {

// Each row: name, summary, examples, and bind_NAME from verb_NAME.cpp.
std::function<int(const Context&)> bind_inventory(CLI::App& app);

const std::vector<Verb>& verbs() {
  static const std::vector<Verb> table = {
      {"inventory", "Show the host, its GPUs, MIG instances and who uses them",
       "bulkhead inventory            one page\n"
       "bulkhead inventory --gpu 3    one GPU in full\n"
       "bulkhead inventory --json     everything, for programs",
       bind_inventory},
  };
  return table;
}

}  // namespace bulkhead::cli
