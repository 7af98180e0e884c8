// bulkhead alarms: what is wrong now, what was, and what is done about it.
#include <chrono>
#include <thread>

#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/text.hpp"
#include "cli/api.hpp"

namespace bulkhead::cli {

namespace {

struct Options {
  std::string url = {};
  bool json = false, watch = false, all = false;
};

Tone tone_of(std::string_view severity) {
  return severity == "critical" ? Tone::bad : severity == "warning" ? Tone::warn : Tone::plain;
}

std::string page(const Context& context, const Json& document, bool all) {
  const auto mode = api::text(document, "mode");
  const auto open = document.value("open", Json::array());
  const auto recent = document.value("recent", Json::array());
  const auto measures = document.value("measures", Json::array());
  std::string out;
  if (const auto trouble = api::text(document, "trouble"); !trouble.empty())
    out += paint(context, Tone::bad, trouble) + "\n";
  if (open.empty()) {
    out += "no alarm is open\n";
  } else {
    Table table({"ALARM", "SEVERITY", "SINCE", "WHAT"});
    for (const auto& alarm : open) {
      const auto severity = api::text(alarm, "severity");
      table.row(
          {api::text(alarm, "id"), severity, api::when(api::text(alarm, "since")), api::text(alarm, "what")},
          {Tone::bold, tone_of(severity), Tone::dim, Tone::plain});
    }
    out += table.str(context);
    if (all)
      for (const auto& alarm : open) {
        out += fmt::format("\n{}\n", api::text(alarm, "id"));
        const auto lines = alarm.value("evidence", Json::array());
        for (const auto& line : lines)
          if (line.is_string()) out += "  " + printable(line.get<std::string>(), 300) + "\n";
      }
  }
  if (!measures.empty()) {
    Table table({"GPU", "MEASURE", "STATE", "WHY"});
    for (const auto& measure : measures) {
      const auto doing = api::text(measure, "doing");
      const auto words = api::text(measure, "words");
      table.row({std::to_string(api::number(measure, "index")), api::text(measure, "what"),
                 words.empty() ? doing : doing + ": " + words, api::text(measure, "why")},
                {Tone::bold, Tone::plain, doing == "failed" ? Tone::bad : Tone::plain, Tone::dim});
    }
    out += "\n" + table.str(context);
  }
  if (mode == "observe" && !measures.empty())
    out += "nothing of this was done: the node file says protect: {mode: observe}, or nothing\n";
  if (!recent.empty()) {
    Table table({"CLOSED", "SINCE", "UNTIL", "ON"});
    std::size_t shown = 0;
    for (const auto& alarm : recent) {
      if (!all && ++shown > 5) break;
      const auto lines = alarm.value("evidence", Json::array());
      table.row(
          {api::text(alarm, "id"), api::when(api::text(alarm, "since")),
           api::when(api::text(alarm, "closed")),
           !lines.empty() && lines.back().is_string() ? printable(lines.back().get<std::string>(), 200) : ""},
          {Tone::dim, Tone::dim, Tone::dim, Tone::dim});
    }
    out += "\n" + table.str(context);
  }
  return out;
}

int alarms(const Context& context, const Options& o) {
  auto client = api::connect(o.url);
  if (!client.ok()) return fail(context, Error(client.error()).in("alarms"));
  std::string before;
  while (true) {
    const auto document = api::get(**client, "/api/v1/alarms");
    if (!document.ok()) return fail(context, Error(document.error()).in("alarms"));
    const auto open = document->value("open", Json::array());
    const std::string text =
        o.json ? (o.watch ? document->dump() : dump(*document)) + "\n" : page(context, *document, o.all);
    if (!o.watch) {
      if (const int code = print(text); code != 0) return code;
      return open.empty() ? 0 : 1;
    }
    if (text != before) {
      if (const int code = print((before.empty() || o.json ? "" : "\n") + text); code != 0) return code;
      before = text;
    }
    std::this_thread::sleep_for(std::chrono::seconds(1));
  }
}

}  // namespace

std::function<int(const Context&)> bind_alarms(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  app.add_flag("--json", o->json, "For programs");
  app.add_flag("--watch", o->watch, "Stay, and print again when something changes");
  app.add_flag("--all", o->all, "With the evidence of each, and all that are remembered");
  api::add_url(app, o->url);
  return [o](const Context& context) { return alarms(context, *o); };
}

}  // namespace bulkhead::cli
