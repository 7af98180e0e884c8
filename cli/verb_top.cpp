// bulkhead top: GPUs, slices and tenants as they are now, on one screen. Changes nothing.
#include <unistd.h>

#include <cstdio>

#include <fmt/format.h>

#include "base/json.hpp"
#include "cli/api.hpp"
#include "cli/cli.hpp"
#include "cli/top_look.hpp"
#include "cli/top_page.hpp"
#include "cli/top_screen.hpp"

namespace bulkhead::cli {

namespace {

struct Options {
  std::string url = {}, interval = "1s";
  bool once = false, json = false;
};

int run(const Context& context, const Options& options) {
  const auto interval = parse_duration(options.interval);
  if (!interval.ok()) return fail(context, Error(interval.error()).in("top: --interval"));
  if (*interval < 100'000'000)
    return fail(context, Error(Errc::invalid, "top: --interval: the driver's sensors move every 100 ms",
                               "try: --interval 100ms"));
  const bool page = options.once || options.json;
  if (!page && (::isatty(STDOUT_FILENO) == 0 || ::isatty(STDIN_FILENO) == 0))
    return fail(context, Error(Errc::invalid, "top: this is no terminal",
                               "try: bulkhead top --once, or bulkhead dmon for a line a second"));
  int code = exit_ok;
  bool ended = false;
  {
    top::Look look(context, options.url, page);
    if (page) {
      look.wait_ready(8000);
      const top::View view = look.view();
      if (view.gpus.empty()) {
        code = fail(context, Error(Errc::unavailable,
                                   "top: " + (view.why.empty() || view.why == "starting"
                                                  ? std::string("the driver has not answered yet")
                                                  : view.why),
                                   "try: bulkhead doctor"));
      } else if (options.json) {
        code = print(dump(to_json(view)) + "\n");
      } else {
        top::Looking looking{
            .width = context.width, .height = 0, .blocks = top::utf8_locale(), .keys = false};
        code = print(plain(context, draw(view, looking)));
      }
    } else {
      code = watch(context, look, *interval);
    }
    ended = look.end();
  }
  if (!ended) {
    // A thread sits in the driver: destructors would pull the ground from under it.
    std::fflush(nullptr);
    ::_exit(code);
  }
  return code;
}

}  // namespace

std::function<int(const Context&)> bind_top(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_flag("--once", options->once, "One page, without keys: for scripts, and for where no terminal is");
  app.add_flag("--json", options->json, "One document: every value with its age, slices, processes, alarms");
  app.add_option("-d,--interval", options->interval, "Between two pages: 1s, 500ms");
  api::add_url(app, options->url);
  return [options](const Context& context) { return run(context, *options); };
}

}  // namespace bulkhead::cli
