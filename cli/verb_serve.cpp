// bulkhead serve: the daemon of tenants and leases. What it does is in daemon/serve.
#include <sys/stat.h>

#include <memory>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"
#include "cli/cli.hpp"
#include "daemon/serve/serve.hpp"

namespace bulkhead::cli {

namespace {

struct Options {
  std::string config = {}, listen = {}, socket = {}, node_file = {};
  bool check = false;
};

// What the file says, then what the command line says. An int: an exit code, all is said.
std::variant<serve::Config, int> config_of(const Context& context, const Options& options) {
  serve::Config config;
  std::filesystem::path file = options.config;
  const bool asked = !file.empty();
  if (!asked) file = context.root / "etc/bulkhead/serve.yaml";
  std::error_code failed;
  if (asked || std::filesystem::exists(file, failed)) {
    auto text = read_file(file, 1U << 20U);
    if (!text.ok())
      return fail(context,
                  Error(text.error()).in("serve").with_hint("bulkhead serve --help; examples/serve.yaml"));
    auto parsed = serve::parse(*text);
    if (const auto* mistakes = std::get_if<std::vector<serve::Mistake>>(&parsed)) {
      const auto said = serve::render(*mistakes, file.string());
      (void)std::fwrite(said.data(), 1, said.size(), stderr);
      return fail(context,
                  Error(Errc::invalid,
                        fmt::format("serve: {} mistake{} in {}", mistakes->size(),
                                    mistakes->size() == 1 ? "" : "s", printable(file.string(), 4096)),
                        fmt::format("mend and look again: bulkhead serve --check --config {}",
                                    shell_word(file.string()))));
    }
    config = std::move(std::get<serve::Config>(parsed));
    config.file = file;
  }
  if (!options.listen.empty()) {
    config.listen = options.listen == "none" ? "" : options.listen;
    if (!config.listen.empty())
      if (const auto listen = serve::parse_listen(config.listen); !listen.ok())
        return fail(context, Error(listen.error()).in("serve: --listen"));
  }
  if (!options.socket.empty()) config.socket = options.socket == "none" ? "" : options.socket;
  if (!options.node_file.empty()) config.node_file = options.node_file;
  if (config.listen.empty() && config.socket.empty())
    return fail(context, Error(Errc::invalid, "serve: neither --listen nor --socket is left to listen on"));
  if (config.state.empty()) config.state = context.state_dir;
  return config;
}

}  // namespace

std::function<int(const Context&)> bind_serve(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_option("--config", options->config,
                 "Its file (default: ROOT/etc/bulkhead/serve.yaml, where there is one)")
      ->type_name("FILE");
  app.add_option("--listen", options->listen, "Address and port of HTTPS, or none (default 0.0.0.0:443)")
      ->type_name("ADDR:PORT");
  app.add_option("--socket", options->socket, "Unix socket, or none (default /run/bulkhead/api.sock)")
      ->type_name("FILE");
  app.add_option("-f,--file", options->node_file, "The node file: which GPU serves which class")
      ->type_name("FILE");
  app.add_flag("--check", options->check, "Read the files, say every mistake, and end");
  return [options](const Context& context) {
    auto read = config_of(context, *options);
    if (const int* code = std::get_if<int>(&read)) return *code;
    const auto& config = std::get<serve::Config>(read);
    if (options->check) {
      return print(fmt::format("{}: good; listens on {}{}{}, state in {}\n",
                               config.file.empty() ? "no file" : config.file.string(),
                               config.listen.empty() ? "" : config.listen,
                               config.listen.empty() || config.socket.empty() ? "" : " and ", config.socket,
                               config.state.string()));
    }
    // Files of a daemon are nobody else's unless they say so themselves.
    ::umask(0077);
    const control::Settings settings{.access = {.root = context.root,
                                                .nvml_library = context.nvml_library,
                                                .state_dir = context.state_dir,
                                                .driver_timeout_ms = context.driver_timeout_ms},
                                     .state = config.state};
    const auto done = serve::run(config, settings);
    return done.ok() ? exit_ok : fail(context, Error(done.error()).in("serve"));
  };
}

}  // namespace bulkhead::cli
