#include <CLI/App.hpp>

#include "cli/cli.hpp"
#include "core/spec/spec.hpp"

namespace bulkhead::cli {

std::function<int(const Context&)> bind_schema(CLI::App&) {
  return [](const Context&) { return print(dump(spec::schema()) + "\n"); };
}

}  // namespace bulkhead::cli
