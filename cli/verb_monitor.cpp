// bulkhead monitor: for the daemon alone, which starts it. engine/monitor/monitor.hpp says why.
#include <unistd.h>

#include <memory>

#include "cli/cli.hpp"
#include "engine/monitor/monitor.hpp"

namespace bulkhead::cli {

std::function<int(const Context&)> bind_monitor(CLI::App& app) {
  app.group("");  // not in the list of verbs
  auto fd = std::make_shared<int>(-1);
  app.add_option("--fd", *fd, "The socket of the daemon that started it")
      ->required()
      ->check(CLI::Range(3, 1023));
  return [fd](const Context& context) -> int {
    const auto done = monitor::serve(*fd);
    const int code = done.ok() ? exit_ok : fail(context, Error(done.error()).in("monitor"));
    // A thread that hangs in the driver must not be waited for, nor find its things destroyed.
    std::fflush(stderr);
    ::_exit(code);
  };
}

}  // namespace bulkhead::cli
