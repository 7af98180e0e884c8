// The command line. A verb is a row in the table of verbs.cpp; each lives in verb_NAME.cpp. Exit codes of
// every verb: 0 done or nothing to find, 1 an answer you may not like (findings, differences, a refusal), 2
// could not.
#pragma once

#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/App.hpp>

#include "base/result.hpp"

namespace bulkhead::cli {

inline constexpr int exit_ok = 0;
inline constexpr int exit_findings = 1;
inline constexpr int exit_could_not = 2;

// Where the host is. Production and twin differ in these values alone.
struct Context {
  std::filesystem::path root = "/";  // --root, BULKHEAD_ROOT: /proc, /sys, /etc are read below it
  std::string nvml_library = {};     // --nvml, BULKHEAD_NVML: empty = libnvidia-ml.so.1 by the loader's rules
  std::filesystem::path state_dir = {};  // --state-dir, BULKHEAD_STATE: default ROOT/var/lib/bulkhead
  unsigned driver_timeout_ms = 20'000;   // BULKHEAD_DRIVER_TIMEOUT, in seconds: one driver call, when looking
  bool colour = false;                   // stdout is a terminal and NO_COLOR is not set
  unsigned width = 100;                  // columns of the terminal
};

struct Verb {
  std::string_view name;
  std::string_view summary;
  std::string_view examples;  // lines, each an example and what it does
  std::string_view exits;     // what 0, 1 and 2 mean here
  // Declares the verb's options on `app` and returns what to run once they are parsed.
  std::function<int(const Context&)> (*bind)(CLI::App& app);
};

const std::vector<Verb>& verbs();

int main(int argc, char** argv);

// What follows the options in "--help".
std::string help_footer(std::string_view examples, std::string_view exits);

// ---- printing
enum class Tone { plain, good, warn, bad, dim, bold };
std::string paint(const Context& context, Tone tone, std::string_view text);

// Columns padded to the widest cell; the last column wraps at the terminal's width.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : header_(std::move(header)) {}
  void row(std::vector<std::string> cells);
  void row(std::vector<std::string> cells, std::vector<Tone> tones);
  std::string str(const Context& context) const;

 private:
  std::vector<std::string> header_;
  std::vector<std::vector<std::string>> rows_;
  std::vector<std::vector<Tone>> tones_;
};

// The verbs of a verb: `share run`, `twin up`. Their options are one struct, read once they are parsed.
template <class Options>
class Subverbs {
 public:
  using Act = std::function<int(const Context&, const Options&)>;
  explicit Subverbs(CLI::App& app) : app_(app) {
    app.require_subcommand(1);
    app.fallthrough();
  }
  void add(const char* name, const char* summary, const char* examples,
           const std::function<void(CLI::App&)>& declare, Act act) {
    CLI::App* sub = app_.add_subcommand(name, summary);
    sub->set_help_flag("-h,--help", "This page");
    sub->footer(help_footer(examples, {}));
    declare(*sub);
    sub->callback([options = options, chosen = chosen_, act = std::move(act)] {
      *chosen = [options, act](const Context& context) { return act(context, *options); };
    });
  }
  std::function<int(const Context&)> run() const {
    return [chosen = chosen_](const Context& context) { return (*chosen)(context); };
  }
  const std::shared_ptr<Options> options =
      std::make_shared<Options>();  // CLI11 writes into it while it parses

 private:
  CLI::App& app_;
  std::shared_ptr<std::function<int(const Context&)>> chosen_ =
      std::make_shared<std::function<int(const Context&)>>();
};

// Prints "bulkhead: apply: gpu 3: ...", then the hint as "  try: ..."; returns exit_could_not.
int fail(const Context& context, const Error& error);

// "10s", "500ms", "2m", "1h": nanoseconds, at most a month.
Result<std::uint64_t> parse_duration(std::string_view text);
// "512MiB", "20GiB", "1048576": bytes; empty: 0.
Result<std::uint64_t> parse_memory(std::string_view text);

// A word to paste into a shell: quoted where it must be, and harmless to print.
std::string shell_word(std::string_view text);

// Writes to stdout; a closed pipe or a full disk becomes exit_could_not, never silence.
int print(std::string_view text);

}  // namespace bulkhead::cli
