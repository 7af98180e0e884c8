#include "cli/cli.hpp"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include <fmt/format.h>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "base/text.hpp"

#ifndef BULKHEAD_VERSION
#define BULKHEAD_VERSION "0.0.0"
#endif

namespace bulkhead::cli {

namespace {

std::string env_or(const char* name, std::string otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? std::string(value) : std::move(otherwise);
}

unsigned terminal_width() {
  if (const auto columns = parse_u64(env_or("COLUMNS", "")); columns && *columns >= 40 && *columns <= 1000) {
    return static_cast<unsigned>(*columns);
  }
  winsize size{};
  if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col >= 40) return size.ws_col;
  return 100;
}

// Columns a UTF-8 string takes on a terminal; wide characters do not occur in what we print.
std::size_t width_of(std::string_view text) {
  std::size_t n = 0;
  for (const char c : text) n += (static_cast<unsigned char>(c) & 0xc0U) != 0x80 ? 1U : 0U;
  return n;
}

std::vector<std::string> wrap(std::string_view text, std::size_t width) {
  std::vector<std::string> lines;
  for (const auto paragraph : split(text, '\n')) {
    std::string line;
    for (const auto word : split(paragraph, ' ')) {
      if (!line.empty() && width_of(line) + 1 + width_of(word) > width) {
        lines.push_back(std::move(line));
        line.clear();
      }
      if (!line.empty()) line += ' ';
      line += word;
    }
    lines.push_back(std::move(line));
  }
  return lines;
}

// "--help": who asks at night reads what it does, how to type it, what each option means, examples, exit
// codes.
class HelpPage : public CLI::Formatter {
 public:
  explicit HelpPage(unsigned width) : width_(std::min(width, 110U)) {}

  std::string make_help(const CLI::App* app, std::string name, CLI::AppFormatMode) const override {
    if (app->get_parent() != nullptr) name = path_of(*app);
    std::string out = app->get_description() + "\n\nUsage: " + name;
    std::vector<Line> positionals, options, verbs;
    for (const CLI::Option* option : app->get_options()) {
      if (option->get_positional()) {
        const std::string label =
            upper(option->get_name(true)) + (option->get_items_expected_max() > 1 ? "..." : "");
        out += option->get_required() ? " " + label : " [" + label + "]";
        positionals.push_back({label, option->get_description()});
      } else {
        std::string label = option->get_name(false, true);  // "-f,--file"
        if (const auto comma = label.find(','); comma != std::string::npos) label.insert(comma + 1, " ");
        const bool takes_value = option->get_items_expected_max() > 0;
        if (takes_value) label += " " + value_of(*option);
        if (takes_value && option->get_required())
          out += fmt::format(" {} {}", shortest(*option), value_of(*option));
        std::string text = option->get_description();
        if (!option->get_default_str().empty())
          text += fmt::format(" (default {})", option->get_default_str());
        options.push_back({std::move(label), std::move(text)});
      }
    }
    for (const CLI::App* sub : app->get_subcommands(nullptr))
      if (!sub->get_group().empty())  // a verb without a group is for programs
        verbs.push_back({sub->get_name(), sub->get_description()});
    out += options.size() > 1 ? " [OPTION...]" : "";
    out += verbs.empty() ? "\n" : " VERB ...\n";
    std::size_t widest = 0;
    for (const auto* lines : {&positionals, &options, &verbs}) {
      for (const auto& line : *lines) widest = std::max(widest, width_of(line.label));
    }
    section(out, "", positionals, widest);
    section(out, "Verbs:", verbs, widest);
    section(out, "Options:", options, widest);
    return out + app->get_footer();
  }

 private:
  struct Line {
    std::string label = {}, text = {};
  };

  static std::string path_of(const CLI::App& app) {
    return app.get_parent() == nullptr ? app.get_name() : path_of(*app.get_parent()) + " " + app.get_name();
  }
  static std::string upper(std::string text) {
    for (char& c : text) c = static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c);
    return text;
  }
  static std::string value_of(const CLI::Option& option) {
    std::string type = option.get_type_name();
    type.resize(
        std::min(type.find(':'), type.size()));  // without the checks: the description names the range
    return type == "UINT" || type == "INT" ? "N" : type == "FLOAT" ? "X" : type;
  }
  static std::string shortest(const CLI::Option& option) {
    return option.get_snames().empty() ? "--" + option.get_lnames().front()
                                       : "-" + option.get_snames().front();
  }
  void section(std::string& out, std::string_view title, const std::vector<Line>& lines,
               std::size_t widest) const {
    if (lines.empty()) return;
    out += "\n";
    if (!title.empty()) out += fmt::format("{}\n", title);
    const std::size_t indent = widest + 4;
    for (const auto& line : lines) {
      out += "  " + line.label;
      out.append(indent - 2 - width_of(line.label), ' ');
      const auto wrapped = wrap(line.text, width_ > indent + 24 ? width_ - indent : 24);
      for (std::size_t i = 0; i < wrapped.size(); ++i) {
        if (i > 0) out.append(indent, ' ');
        out += wrapped[i] + "\n";
      }
    }
  }

  unsigned width_;
};

// What is wrong with the words that were typed, and what to type instead.
Error mistyped(const CLI::App& app, const CLI::ParseError& error) {
  const CLI::App* at = &app;  // the innermost verb that was understood
  std::string path = app.get_name();
  for (auto inner = at->get_subcommands(); !inner.empty(); inner = at->get_subcommands()) {
    at = inner.front();
    path += " " + at->get_name();
  }
  const std::string help = fmt::format("try: {} --help", path);
  const std::string where = at == &app ? "" : path.substr(app.get_name().size() + 1) + ": ";
  auto left = app.remaining(true);
  left.erase(std::remove(left.begin(), left.end(), "--"), left.end());
  if (left.empty()) {
    return Error(Errc::invalid, printable(where + error.what()), help);
  }
  const std::string& word = left.front();
  std::vector<std::string> names;
  if (word.starts_with('-')) {
    for (const CLI::App* owner = at; owner != nullptr; owner = owner->get_parent()) {
      for (const CLI::Option* option : owner->get_options()) {
        for (const auto& name : option->get_lnames()) names.push_back("--" + name);
      }
    }
  } else {
    for (const CLI::App* sub : at->get_subcommands(nullptr)) names.push_back(sub->get_name());
  }
  const std::vector<std::string_view> known(names.begin(), names.end());
  const auto meant = closest(word, known);
  const std::string_view wrong = word.starts_with('-') ? "no option"
                                 : names.empty()       ? "not expected:"
                                                       : "no verb";
  return Error(Errc::invalid, fmt::format("{}{} '{}'", where, wrong, printable(word, 80)),
               meant.empty() ? help : fmt::format("did you mean: {} {}", path, meant));
}

}  // namespace

std::string paint(const Context& context, Tone tone, std::string_view text) {
  if (!context.colour || tone == Tone::plain) return std::string(text);
  const char* code = "";
  switch (tone) {
    case Tone::plain:
      break;
    case Tone::good:
      code = "32";
      break;
    case Tone::warn:
      code = "33";
      break;
    case Tone::bad:
      code = "31";
      break;
    case Tone::dim:
      code = "2";
      break;
    case Tone::bold:
      code = "1";
      break;
  }
  return fmt::format("\x1b[{}m{}\x1b[0m", code, text);
}

void Table::row(std::vector<std::string> cells) { row(std::move(cells), {}); }

void Table::row(std::vector<std::string> cells, std::vector<Tone> tones) {
  rows_.push_back(std::move(cells));
  tones_.push_back(std::move(tones));
}

std::string Table::str(const Context& context) const {
  const std::size_t columns = header_.size();
  std::vector<std::size_t> widths(columns, 0);
  for (std::size_t c = 0; c < columns; ++c) {
    widths[c] = width_of(header_[c]);
    for (const auto& row : rows_) {
      if (c < row.size()) widths[c] = std::max(widths[c], width_of(row[c]));
    }
  }
  std::size_t before_last = 0;
  for (std::size_t c = 0; c + 1 < columns; ++c) before_last += widths[c] + 2;
  const std::size_t last = context.width > before_last + 24 ? context.width - before_last : 24;

  std::string out;
  const auto line = [&](const std::vector<std::string>& cells, const std::vector<Tone>& tones) {
    std::string text;
    for (std::size_t c = 0; c + 1 < columns; ++c) {
      const std::string cell = c < cells.size() ? cells[c] : "";
      text += paint(context, c < tones.size() ? tones[c] : Tone::plain, cell);
      text.append(widths[c] - width_of(cell) + 2, ' ');
    }
    const auto wrapped = wrap(columns <= cells.size() ? cells[columns - 1] : "", last);
    const Tone tone = columns <= tones.size() ? tones[columns - 1] : Tone::plain;
    for (std::size_t i = 0; i < wrapped.size(); ++i) {
      if (i > 0) text.append(before_last, ' ');
      text += paint(context, tone, wrapped[i]);
      while (text.ends_with(' ')) text.pop_back();
      text += '\n';
    }
    out += text;
  };
  line(header_, std::vector<Tone>(columns, Tone::dim));
  for (std::size_t r = 0; r < rows_.size(); ++r) line(rows_[r], tones_[r]);
  return out;
}

std::string help_footer(std::string_view examples, std::string_view exits) {
  std::string text = "\nExamples:\n";
  for (const auto line : split_lines(examples)) text += fmt::format("  {}\n", line);
  if (!exits.empty()) {
    text += "\nExit codes:\n";
    for (const auto one : split(exits, ';')) text += fmt::format("  {}\n", trim(one));
  }
  return text;
}

std::string shell_word(std::string_view text) {
  const bool plain = !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return std::isalnum(c) != 0 || std::strchr("/._-+:@%,=", c) != nullptr;
  });
  if (plain) return std::string(text);
  std::string quoted = "'";
  for (const char c : text) {
    if (c == '\'') {
      quoted += "'\\''";
    } else {
      quoted += c;
    }
  }
  return printable(quoted + "'", 4096);
}

int fail(const Context& context, const Error& error) {
  std::fputs(fmt::format("bulkhead: {}\n", error.message()).c_str(), stderr);
  for (const auto line : split_lines(error.hint())) {
    std::fputs(fmt::format("  {}\n", paint(Context{.colour = context.colour && ::isatty(STDERR_FILENO) == 1},
                                           Tone::bold, line))
                   .c_str(),
               stderr);
  }
  return exit_could_not;
}

// "10s", "500ms", "2m", "1h": nanoseconds.
Result<std::uint64_t> parse_duration(std::string_view text) {
  static constexpr std::pair<std::string_view, double> units[] = {{"ms", 1e6}, {"us", 1e3}, {"ns", 1},
                                                                  {"s", 1e9},  {"m", 60e9}, {"h", 3600e9}};
  for (const auto& [unit, factor] : units) {
    if (!text.ends_with(unit)) continue;
    const std::string number(text.substr(0, text.size() - unit.size()));
    char* end = nullptr;
    const double value = std::strtod(number.c_str(), &end);
    if (!number.empty() && *end == '\0' && std::isfinite(value) && value >= 0 &&
        value * factor <= 31 * 86400e9) {
      return static_cast<std::uint64_t>(value * factor);
    }
    break;
  }
  return Error(Errc::invalid, fmt::format("{} is no time of at most a month", printable(text)),
               "like 500ms, 10s, 2m or 1h");
}

// "512MiB", "20GiB", "1048576".
Result<std::uint64_t> parse_memory(std::string_view text) {
  if (text.empty()) return std::uint64_t{0};
  static constexpr std::pair<std::string_view, unsigned> units[] = {
      {"KiB", 10}, {"MiB", 20}, {"GiB", 30}, {"K", 10}, {"M", 20}, {"G", 30}, {"", 0}};
  for (const auto& [unit, shift] : units) {
    if (!text.ends_with(unit)) continue;
    const auto value = parse_u64(text.substr(0, text.size() - unit.size()));
    // A bare number is bytes, and nobody means so few: "20" was to be 20GiB.
    if (value && shift == 0 && *value > 0 && *value < 1U << 20U)
      return Error(Errc::invalid, fmt::format("{} would be {} bytes", printable(text), *value),
                   "say the unit: 512MiB or 20GiB");
    if (value && *value <= (1ULL << 44U >> shift)) return *value << shift;
    break;
  }
  return Error(Errc::invalid, fmt::format("{} is no amount of memory", printable(text)),
               "like 512MiB or 20GiB");
}

int print(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    std::fputs(fmt::format("bulkhead: write to standard output: {}\n", std::strerror(errno)).c_str(), stderr);
    return exit_could_not;
  }
  return exit_ok;
}

int main(int argc, char** argv) {
  Context context;
  context.root = env_or("BULKHEAD_ROOT", "/");
  context.nvml_library = env_or("BULKHEAD_NVML", "");
  context.state_dir = env_or("BULKHEAD_STATE", "");
  if (const auto seconds = parse_u64(env_or("BULKHEAD_DRIVER_TIMEOUT", ""));
      seconds && *seconds >= 1 && *seconds <= 86'400)
    context.driver_timeout_ms = static_cast<unsigned>(*seconds) * 1000;
  context.colour = ::isatty(STDOUT_FILENO) == 1 && std::getenv("NO_COLOR") == nullptr;
  context.width = terminal_width();

  CLI::App app("bulkhead: watertight compartments for the accelerators of a Linux host", "bulkhead");
  app.formatter(std::make_shared<HelpPage>(context.width));
  app.set_help_flag("-h,--help", "This page; every verb has its own");
  app.set_version_flag("--version", "bulkhead " BULKHEAD_VERSION, "Print the version");
  app.add_option("--root", context.root,
                 "Read and change the host below this directory (default /, or BULKHEAD_ROOT)")
      ->type_name("DIR");
  app.add_option("--nvml", context.nvml_library,
                 "NVML library to load (default: libnvidia-ml.so.1 by the loader's rules, or BULKHEAD_NVML)")
      ->type_name("FILE");
  app.add_option("--state-dir", context.state_dir,
                 "Where the journal is (default: ROOT/var/lib/bulkhead, or BULKHEAD_STATE)")
      ->type_name("DIR");
  app.require_subcommand(0, 1);
  app.fallthrough();
  app.footer(
      "\nThese options may follow any verb, and every verb has --help with examples.\n"
      "Exit codes: 0 done; 1 an answer you may not like (findings, differences,\n"
      "  a refusal, your own no); 2 it could not be done.\n"
      "Start with: bulkhead doctor\n");

  std::vector<std::function<int(const Context&)>> runs;
  std::vector<CLI::App*> subcommands;
  for (const Verb& verb : verbs()) {
    CLI::App* sub = app.add_subcommand(std::string(verb.name), std::string(verb.summary));
    sub->set_help_flag("-h,--help", "This page");
    sub->footer(help_footer(verb.examples, verb.exits));
    subcommands.push_back(sub);
    runs.push_back(verb.bind(*sub));
  }

  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    const CLI::App* at = &app;
    for (auto inner = at->get_subcommands(); !inner.empty(); inner = at->get_subcommands())
      at = inner.front();
    return print(at->help());
  } catch (const CLI::Success& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    return fail(context, mistyped(app, e));
  }
  if (context.state_dir.empty()) context.state_dir = context.root / "var/lib/bulkhead";
  for (std::size_t i = 0; i < subcommands.size(); ++i) {
    if (subcommands[i]->parsed()) return runs[i](context);
  }
  return print(app.help());
}

}  // namespace bulkhead::cli
