// bulkhead history: what was done to this host, by the journal.
#include <memory>

#include <fmt/format.h>

#include "base/text.hpp"
#include "cli/plan_page.hpp"

namespace bulkhead::cli {

namespace {

std::string words_of(const store::Step& step) {
  if (auto shown = step.detail.value("what", ""); !shown.empty()) return printable(shown);
  const auto action = plan::action_from_json(step.action);
  return action.ok() ? plan::describe(*action) : step.kind;
}

Json to_json(const execute::HistoryEntry& entry) {
  const auto& run = entry.run;
  Json out = {{"run", run.id},
              {"verb", run.verb},
              {"state", store::name_of(run.state)},
              {"started", rfc3339(run.started)}};
  out["ended"] = run.ended ? Json(rfc3339(*run.ended)) : Json(nullptr);
  out["cut_off"] = entry.cut_off;
  out["boot_id"] = run.boot_id;
  if (run.continues) out["continues"] = *run.continues;
  if (run.rolls_back) out["rolls_back"] = *run.rolls_back;
  if (!run.message.empty()) out["message"] = run.message;
  out["steps"] = Json::array();
  for (const auto& step : entry.steps) {
    Json one = {{"step", step.id},
                {"kind", step.kind},
                {"what", words_of(step)},
                {"why", step.why},
                {"state", store::name_of(step.state)}};
    if (step.undoes) one["undoes"] = *step.undoes;
    one["action"] = step.action;
    one["started"] = rfc3339(step.started);
    if (step.ended) one["ended"] = rfc3339(*step.ended);
    if (!step.message.empty()) one["message"] = step.message;
    out["steps"].push_back(std::move(one));
  }
  return out;
}

Tone tone_of(store::RunState state) {
  switch (state) {
    case store::RunState::done:
      return Tone::good;
    case store::RunState::failed:
    case store::RunState::interrupted:
      return Tone::bad;
    case store::RunState::running:
      return Tone::warn;
    case store::RunState::rolled_back:
      return Tone::dim;
  }
  return Tone::plain;
}

std::string state_of(const execute::HistoryEntry& entry) {
  return entry.cut_off ? "cut off" : std::string(store::name_of(entry.run.state));
}

std::string note_of(const execute::HistoryEntry& entry) {
  const auto& run = entry.run;
  std::string note;
  if (entry.cut_off) note += "the next apply or rollback settles it; ";
  if (run.continues) note += fmt::format("continues {}; ", *run.continues);
  if (run.rolls_back) note += fmt::format("takes back {}; ", *run.rolls_back);
  note += printable(run.message, 400);
  if (note.ends_with("; ")) note.resize(note.size() - 2);
  return note;
}

std::string page(const Context& context, const execute::HistoryEntry& entry) {
  const auto& run = entry.run;
  std::string out =
      fmt::format("{} {}: {}, {}", paint(context, Tone::bold, fmt::format("run {}", run.id)), run.verb,
                  paint(context, tone_of(run.state), state_of(entry)), rfc3339(run.started));
  if (run.ended) out += " to " + rfc3339(*run.ended);
  if (const auto note = note_of(entry); !note.empty()) out += "\n  " + note;
  out += "\n\n";
  Table table({"STEP", "STATE", "TOOK", "WHAT"});
  for (const auto& step : entry.steps) {
    const std::string took = step.ended ? fmt::format("{} ms", (*step.ended - step.started).count()) : "-";
    std::string what = step.undoes ? fmt::format("undo of {}: ", *step.undoes) : "";
    what += words_of(step);
    if (step.state == store::StepState::not_done && !step.message.empty())
      what += ": " + printable(step.message, 2000);
    table.row({std::to_string(step.id), std::string(store::name_of(step.state)), took, what});
  }
  return out + table.str(context);
}

}  // namespace

std::function<int(const Context&)> bind_history(CLI::App& app) {
  struct Options {
    std::int64_t run = 0;
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  app.add_option("run", options->run, "One run, with its steps")->check([](const std::string& text) {
    const auto number = parse_u64(text);
    return number && *number > 0 ? std::string() : "'" + text + "' is no number of a run";
  });
  app.add_flag("--json", options->json, "Every run with every step, for programs");
  return [options](const Context& context) {
    const std::optional<std::int64_t> wanted =
        options->run > 0 ? std::optional<std::int64_t>(options->run) : std::nullopt;
    auto entries = execute::history(access_of(context), wanted);
    if (!entries.ok()) {
      if (!wanted && entries.error().code() == Errc::not_found)
        return print(options->json ? "[]\n" : "Nothing was ever changed here by bulkhead.\n");
      return fail(context, std::move(entries).error().in("history"));
    }
    std::string out;
    if (options->json) {
      Json all = Json::array();
      for (const auto& entry : *entries) all.push_back(to_json(entry));
      out = dump(wanted ? all.at(0) : all) + "\n";
    } else if (wanted) {
      out = page(context, entries->front());
    } else {
      Table table({"RUN", "VERB", "STATE", "STARTED", "STEPS", "NOTE"});
      for (const auto& entry : *entries) {
        table.row({std::to_string(entry.run.id), entry.run.verb, state_of(entry), rfc3339(entry.run.started),
                   std::to_string(entry.steps.size()), note_of(entry)},
                  {Tone::bold, Tone::plain, tone_of(entry.run.state)});
      }
      out = table.str(context);
    }
    return print(out);
  };
}

}  // namespace bulkhead::cli
