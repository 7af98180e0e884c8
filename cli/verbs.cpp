#include "cli/cli.hpp"

namespace bulkhead::cli {

// Each row: name, summary, examples, and bind_NAME from verb_NAME.cpp.
std::function<int(const Context&)> bind_doctor(CLI::App& app);
std::function<int(const Context&)> bind_inventory(CLI::App& app);

const std::vector<Verb>& verbs() {
  static const std::vector<Verb> table = {
      {"doctor", "Say what keeps this host from slicing its GPUs, and how to mend it",
       "bulkhead doctor                    every check, findings first\n"
       "bulkhead doctor --for passthrough  only what passthrough needs\n"
       "bulkhead doctor --json             findings for programs\n"
       "bulkhead doctor --list             the checks, without looking",
       bind_doctor},
      {"inventory", "Show the host, its GPUs, MIG instances and who uses them",
       "bulkhead inventory            one page\n"
       "bulkhead inventory --gpu 3    one GPU in full\n"
       "bulkhead inventory --json     everything, for programs",
       bind_inventory},
  };
  return table;
}

}  // namespace bulkhead::cli
