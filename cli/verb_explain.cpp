// bulkhead explain: one code or one line of a log in words.
#include <memory>

#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/text.hpp"
#include "cli/cli.hpp"
#include "core/diagnose/diagnose.hpp"

namespace bulkhead::cli {

std::function<int(const Context&)> bind_explain(CLI::App& app) {
  struct Options {
    std::vector<std::string> words = {};
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  // Without the second call CLI11 reads an argument that begins with '[' and ends with ']' as a list: a line
  // of dmesg about a memory range.
  app.add_option("what", options->words, "xid N, sxid N, or a line of a log")
      ->required()
      ->expected(1, 4096)
      ->allow_extra_args(false);
  app.add_flag("--json", options->json, "For programs");
  return [options](const Context& context) {
    const auto text = join(options->words, " ");
    const auto first = lower(options->words.front());
    diagnose::Explanation out;
    if ((first == "xid" || first == "sxid") && options->words.size() == 2) {
      const auto code = parse_u64(options->words[1]);
      if (!code || *code > 99'999)
        return fail(context,
                    Error(Errc::invalid,
                          "explain: '" + printable(options->words[1], 64) + "' is no number of an " + first)
                        .with_hint("bulkhead explain " + first + (first == "xid" ? " 31" : " 20034")));
      out = first == "xid" ? diagnose::explain_xid(static_cast<unsigned>(*code))
                           : diagnose::explain_sxid(static_cast<unsigned>(*code));
    } else {
      out = diagnose::explain_line(logs::Matcher(), text, wall_now());
    }
    std::string page;
    if (options->json) {
      Json facts = Json::array();
      for (const auto& [name, value] : out.facts) facts.push_back({{"name", name}, {"value", value}});
      page = dump({{"title", out.title}, {"known", out.known}, {"facts", facts}}) + "\n";
    } else {
      page = paint(context, Tone::bold, out.title) + "\n";
      for (const auto& [name, value] : out.facts)
        page += fmt::format("  {:<19}{}\n", name, printable(value, 4096));
    }
    const int printed = print(page);
    return printed != exit_ok ? printed : out.known || !out.facts.empty() ? exit_ok : exit_findings;
  };
}

}  // namespace bulkhead::cli
