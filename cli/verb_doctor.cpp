// bulkhead doctor: what keeps this host from slicing its GPUs, and the commands that mend it.
#include <algorithm>
#include <array>
#include <memory>

#include <fmt/format.h>

#include "base/json.hpp"
#include "base/text.hpp"
#include "cli/cli.hpp"
#include "core/doctor/doctor.hpp"
#include "engine/examine/examine.hpp"
#include "engine/observe/observe.hpp"

namespace bulkhead::cli {

namespace {

using doctor::Finding;
using doctor::Purposes;
using doctor::Verdict;

struct Options {
  bool json = false, all = false, list = false;
  std::vector<std::string> purposes = {};
};

constexpr std::size_t sources_shown = 3;  // of one finding; --all and --json show them all
constexpr std::size_t indent = 6;

Purposes chosen(const std::vector<std::string>& names) {
  if (names.empty()) return {};
  Purposes purposes{.mig = false, .passthrough = false, .share = false};
  for (const std::string& name : names) {
    if (name == "mig") purposes.mig = true;
    if (name == "passthrough") purposes.passthrough = true;
    if (name == "share") purposes.share = true;
  }
  return purposes;
}

std::vector<std::string> names_of(const Purposes& purposes) {
  std::vector<std::string> names;
  if (purposes.mig) names.emplace_back("mig");
  if (purposes.passthrough) names.emplace_back("passthrough");
  if (purposes.share) names.emplace_back("share");
  return names;
}

// Lines of at most `width` columns, continued below `hang` spaces. Words longer than a line stay whole.
std::string wrapped(std::string_view lead, std::string_view text, std::size_t width) {
  std::string out(indent, ' ');
  out += lead;
  std::size_t column = indent + lead.size();
  const std::size_t hang = column;
  bool first = true;
  for (const auto word : split(text, ' ')) {
    if (word.empty()) continue;
    if (!first && column + 1 + word.size() > width) {
      out += '\n';
      out.append(hang, ' ');
      column = hang;
      first = true;
    }
    if (!first) {
      out += ' ';
      ++column;
    }
    out += word;
    column += word.size();
    first = false;
  }
  return out + '\n';
}

Tone tone_of(Verdict verdict) {
  switch (verdict) {
    case Verdict::ok:
      return Tone::good;
    case Verdict::unknown:
      return Tone::dim;
    case Verdict::warn:
      return Tone::warn;
    case Verdict::fail:
      return Tone::bad;
  }
  return Tone::plain;
}

std::string heading(const Context& context, const Finding& finding) {
  const std::string word = finding.verdict == Verdict::fail ? "FAIL" : std::string(name_of(finding.verdict));
  const std::string tag = fmt::format("[{}]", finding.id);
  std::string line = paint(context, tone_of(finding.verdict),
                           fmt::format("{:<{}}", word, indent > word.size() ? indent : word.size() + 1));
  if (finding.verdict == Verdict::unknown) line = paint(context, Tone::dim, "?     ");
  line += paint(context, finding.verdict >= Verdict::warn ? Tone::bold : Tone::plain, finding.title);
  line += "  " + paint(context, Tone::dim, tag);
  return line + '\n';
}

std::string whole(const Context& context, const Finding& finding, bool every_source) {
  std::string out = heading(context, finding);
  out += wrapped("", finding.says, context.width);
  std::size_t shown = 0;
  for (const doctor::Source& source : finding.evidence) {
    if (!every_source && shown == sources_shown) {
      out += wrapped("read: ", fmt::format("and {} more; --all shows them", finding.evidence.size() - shown),
                     context.width);
      break;
    }
    out += wrapped("read: ", fmt::format("{}: {}", source.where, source.words), context.width);
    ++shown;
  }
  out +=
      wrapped("why:  ", fmt::format("{} ({})", finding.why, join(finding.requirements, ", ")), context.width);
  if (!finding.mend.empty()) {
    // Never wrapped: these lines are for pasting.
    out += std::string(indent, ' ') + "mend:\n";
    for (const std::string& line : finding.mend) {
      out += std::string(indent + 2, ' ') +
             paint(context, line.starts_with('#') ? Tone::plain : Tone::bold, line) + '\n';
    }
  }
  return out + '\n';
}

std::string brief(const Context& context, const Finding& finding) {
  std::string out = heading(context, finding) + wrapped("", finding.says, context.width);
  if (!finding.waits_on.empty())
    out += wrapped("", fmt::format("mend {} first", finding.waits_on), context.width);
  if (finding.verdict == Verdict::unknown) {
    for (const std::string& line : finding.mend) out += std::string(indent + 2, ' ') + line + '\n';
  }
  return out;
}

// Checks that are unknown for one and the same reason, in one paragraph.
std::string together(const Context& context, std::string_view what, const std::vector<std::string>& ids) {
  if (ids.empty()) return {};
  return paint(context, Tone::dim, "?     ") + std::string(what) + "\n" +
         wrapped("", join(ids, ", "), context.width);
}

std::string unknowns(const Context& context, const std::vector<Finding>& findings) {
  std::string out;
  std::vector<std::string> of_host;
  std::vector<std::pair<std::string, std::vector<std::string>>> waiting;
  for (const Finding& finding : findings) {
    if (finding.verdict != Verdict::unknown) continue;
    if (finding.ask_host) {
      of_host.push_back(finding.id);
    } else if (!finding.waits_on.empty()) {
      const auto same = std::find_if(waiting.begin(), waiting.end(),
                                     [&](const auto& group) { return group.first == finding.waits_on; });
      if (same != waiting.end()) {
        same->second.push_back(finding.id);
      } else {
        waiting.push_back({finding.waits_on, {finding.id}});
      }
    } else {
      out += brief(context, finding);
    }
  }
  for (const auto& [first, ids] : waiting)
    out += together(context, fmt::format("Not known before {} is mended:", first), ids);
  return out + together(context, "Not to be seen from inside a virtual machine; ask its host:", of_host);
}

std::array<std::size_t, 4> counts_of(const std::vector<Finding>& findings) {
  std::array<std::size_t, 4> counts{};
  for (const Finding& finding : findings) ++counts[static_cast<std::size_t>(finding.verdict)];
  return counts;
}

std::string report(const Context& context, const doctor::Evidence& evidence,
                   const std::vector<Finding>& findings, const Options& options, const Purposes& purposes) {
  const auto counts = counts_of(findings);
  const auto count = [&](Verdict verdict) { return counts[static_cast<std::size_t>(verdict)]; };
  const inventory::Host& host = evidence.host;
  std::string out = fmt::format(
      "{}: {}, {}\n",
      paint(context, Tone::bold, host.hostname.empty() ? "this host" : printable(host.hostname, 64)),
      printable(host.os.value_or("unknown system"), 64),
      printable("kernel " + host.kernel.value_or("unknown"), 64));
  if (const auto machine = virtual_machine(evidence)) {
    out += fmt::format("a virtual machine ({}): firmware and slots belong to its host\n",
                       printable(machine->where, 64));
  }
  out += fmt::format("{} checks for {}: {} failed, {} warned, {} unknown, {} ok\n\n", findings.size(),
                     join(names_of(purposes), ", "), count(Verdict::fail), count(Verdict::warn),
                     count(Verdict::unknown), count(Verdict::ok));
  for (const Finding& finding : findings) {
    if (finding.verdict >= Verdict::warn) {
      out += whole(context, finding, options.all);
    } else if (options.all) {
      out += brief(context, finding);
    }
  }
  if (!options.all) out += unknowns(context, findings);
  if (!options.all && count(Verdict::ok) > 0) {
    out += fmt::format("{}{} checks are ok: --all shows them\n", count(Verdict::unknown) > 0 ? "\n" : "",
                       count(Verdict::ok));
  }
  return out;
}

int list(const Context& context, const Options& options) {
  const Purposes wanted = chosen(options.purposes);
  Json document = Json::array();
  Table table({"CHECK", "ROWS", "FOR", "WHAT MUST BE SO"});
  for (const doctor::Check& check : doctor::checks()) {
    if (!check.purposes.meets(wanted)) continue;
    const std::vector<std::string> rows(check.requirements.begin(), check.requirements.end());
    const auto purposes = names_of(check.purposes);
    document.push_back(Json{{"id", check.id},
                            {"title", check.title},
                            {"requirements", rows},
                            {"purposes", purposes},
                            {"why", check.why}});
    table.row({std::string(check.id), join(rows, " "), purposes.size() == 3 ? "all" : join(purposes, " "),
               std::string(check.title)});
  }
  return print(options.json ? dump(document) + "\n" : table.str(context));
}

int run(const Context& context, const Options& options) {
  if (options.list) return list(context, options);
  const auto evidence = examine::evidence({.root = context.root,
                                           .nvml_library = context.nvml_library,
                                           .state_dir = context.state_dir,
                                           .driver_timeout_ms = context.driver_timeout_ms});
  if (!evidence.ok()) return fail(context, Error(evidence.error()).in("doctor"));
  const Purposes purposes = chosen(options.purposes);
  auto findings = doctor::examine(*evidence, purposes);
  doctor::sort_worst_first(findings);
  const auto counts = counts_of(findings);
  int status = exit_ok;
  if (options.json) {
    Json list = Json::array();
    for (const Finding& finding : findings) list.push_back(to_json(finding));
    const auto machine = virtual_machine(*evidence);
    Json summary;
    for (const Verdict verdict : {Verdict::fail, Verdict::warn, Verdict::unknown, Verdict::ok}) {
      summary[std::string(name_of(verdict))] = counts[static_cast<std::size_t>(verdict)];
    }
    status = print(
        dump(Json{{"host", evidence->host.hostname},
                  {"virtual_machine",
                   machine ? Json{{"where", machine->where}, {"words", machine->words}} : Json(nullptr)},
                  {"purposes", names_of(purposes)},
                  {"summary", summary},
                  {"findings", list}}) +
        "\n");
  } else {
    status = print(report(context, *evidence, findings, options, purposes));
  }
  if (status != exit_ok) return status;
  const std::size_t bad =
      counts[static_cast<std::size_t>(Verdict::warn)] + counts[static_cast<std::size_t>(Verdict::fail)];
  if (bad > 0) return exit_findings;
  return counts[static_cast<std::size_t>(Verdict::ok)] == 0 ? exit_could_not : exit_ok;
}

}  // namespace

std::function<int(const Context&)> bind_doctor(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_flag("--json", options->json, "Print the findings as JSON");
  app.add_option("--for", options->purposes, "Only what this use needs: mig, passthrough, share")
      ->delimiter(',')
      ->check(CLI::IsMember({"mig", "passthrough", "share"}));
  app.add_flag("--all", options->all, "Show what is ok too, and all evidence");
  app.add_flag("--list", options->list, "Show the checks, and do not look at the host");
  return [options](const Context& context) { return run(context, *options); };
}

}  // namespace bulkhead::cli
