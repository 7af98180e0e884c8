#include "cli/cli.hpp"

namespace bulkhead::cli {

// Each row: name, summary, examples, and bind_NAME from verb_NAME.cpp.


const std::vector<Verb>& verbs() {
  static const std::vector<Verb> table = {
  };
  return table;
}

}  // namespace bulkhead::cli
