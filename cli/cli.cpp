#include "cli/cli.hpp"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <fmt/format.h>

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

// "--help" of a verb: CLI11's text, then the examples.
std::string footer(const Verb& verb) {
  std::string text = "\nExamples:\n";
  for (const auto line : split_lines(verb.examples)) text += fmt::format("  {}\n", line);
  return text;
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

}  // namespace

std::string paint(const Context& context, Tone tone, std::string_view text) {
  if (!context.colour || tone == Tone::plain) return std::string(text);
  const char* code = "";
  switch (tone) {
    case Tone::plain: break;
    case Tone::good: code = "32"; break;
    case Tone::warn: code = "33"; break;
    case Tone::bad: code = "31"; break;
    case Tone::dim: code = "2"; break;
    case Tone::bold: code = "1"; break;
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

int fail(const Context& context, const Error& error) {
  std::fputs(fmt::format("bulkhead: {}\n", error.message()).c_str(), stderr);
  for (const auto line : split_lines(error.hint())) {
    std::fputs(fmt::format("  {}\n", paint(Context{.colour = context.colour && ::isatty(STDERR_FILENO) == 1}, Tone::bold, line)).c_str(), stderr);
  }
  return exit_could_not;
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
  context.colour = ::isatty(STDOUT_FILENO) == 1 && std::getenv("NO_COLOR") == nullptr;
  context.width = terminal_width();

  CLI::App app("bulkhead: watertight compartments for the accelerators of a Linux host", "bulkhead");
  app.set_version_flag("--version", "bulkhead " BULKHEAD_VERSION);
  app.add_option("--root", context.root, "Read the host below this directory (default /; BULKHEAD_ROOT)");
  app.add_option("--nvml", context.nvml_library, "NVML library to load (default libnvidia-ml.so.1; BULKHEAD_NVML)");
  app.add_option("--state-dir", context.state_dir, "Journal directory (default ROOT/var/lib/bulkhead; BULKHEAD_STATE)");
  app.require_subcommand(0, 1);
  app.fallthrough();
  app.get_formatter()->column_width(34);
  app.footer("\nEvery verb has --help with examples. Start with: bulkhead doctor");

  std::vector<std::function<int(const Context&)>> runs;
  std::vector<CLI::App*> subcommands;
  for (const Verb& verb : verbs()) {
    CLI::App* sub = app.add_subcommand(std::string(verb.name), std::string(verb.summary));
    sub->footer(footer(verb));
    subcommands.push_back(sub);
    runs.push_back(verb.bind(*sub));
  }

  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    std::vector<std::string_view> names;
    for (const Verb& verb : verbs()) names.push_back(verb.name);
    std::string hint = "try: bulkhead --help";
    for (int i = 1; i < argc; ++i) {
      if (argv[i][0] == '-') continue;
      if (std::find(names.begin(), names.end(), argv[i]) != names.end()) {
        hint = fmt::format("try: bulkhead {} --help", argv[i]);
      } else if (const auto meant = closest(argv[i], names); !meant.empty()) {
        hint = fmt::format("did you mean: bulkhead {}", meant);
      }
      break;
    }
    return fail(context, Error(Errc::invalid, printable(e.what()), hint));
  }
  if (context.state_dir.empty()) context.state_dir = context.root / "var/lib/bulkhead";
  for (std::size_t i = 0; i < subcommands.size(); ++i) {
    if (subcommands[i]->parsed()) return runs[i](context);
  }
  return print(app.help());
}

}  // namespace bulkhead::cli
