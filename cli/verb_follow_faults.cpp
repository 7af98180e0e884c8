// bulkhead follow-faults: for the daemon alone, which starts it. edge/events/events.hpp says why.
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <string>

#include "cli/cli.hpp"
#include "edge/events/events.hpp"

namespace bulkhead::cli {

std::function<int(const Context&)> bind_follow_faults(CLI::App& app) {
  app.group("");  // not in the list of verbs
  const auto fd = std::make_shared<int>(-1);
  const auto library = std::make_shared<std::string>();
  app.add_option("--fd", *fd, "The pipe of the daemon that started it")
      ->required()
      ->check(CLI::Range(3, 1023));
  app.add_option("--library", *library, "The driver's");
  return [fd, library](const Context&) -> int {
    const int code = events::follow(*fd, *library);
    // The driver's threads must not be waited for.
    std::fflush(stderr);
    ::_exit(code);
  };
}

}  // namespace bulkhead::cli
