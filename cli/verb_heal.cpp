// bulkhead heal: what would be done about faults, what was done, and what waits for a person.
#include <chrono>
#include <optional>
#include <thread>

#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/text.hpp"
#include "cli/api.hpp"
#include "cli/plan_page.hpp"
#include "engine/heal/heal.hpp"

namespace bulkhead::cli {

namespace {

struct Options {
  std::string url = {};
  bool json = false, watch = false, all = false;
  std::string gpu = {}, incident = {};  // of plan
};

std::vector<std::string> words_of(const Json& row, const char* key) {
  std::vector<std::string> out;
  if (!row.contains(key) || !row[key].is_array()) return out;
  for (const auto& one : row[key])
    if (one.is_string()) out.push_back(printable(one.get<std::string>(), 400));
  return out;
}

Tone tone_of(std::string_view doing) {
  return doing == "helped" ? Tone::good : doing == "under-way" ? Tone::warn : Tone::bad;
}

std::string word_of(std::string_view step, std::string_view act) {
  if (step == "cordon") return "no new leases where it acts";
  if (step == "evict") return "the leases below end, with the reason";
  if (step == "let-go") return "the daemon's own sampler lets go of the driver";
  if (step == "act") return std::string(act);
  if (step == "gate") return "the hardware is checked: health, memory, kernels with known results";
  if (step == "uncordon") return "leases again, only if the check was passed";
  return std::string(step);
}

// What would be done, in what order, and what each tenant loses by it.
std::string plan_page(const Context& context, const Json& rows) {
  std::string out;
  for (const auto& row : rows) {
    const auto act = api::text(row, "act");
    out += fmt::format("{}  {}\n", paint(context, Tone::bold, api::text(row, "incident")), act);
    out += "  why    " + api::text(row, "why") + "\n";
    unsigned number = 0;
    for (const auto& step : words_of(row, "steps"))
      out += fmt::format("  {}. {:<8} {}\n", ++number, step, word_of(step, act));
    const auto victims = row.value("victims", Json::array());
    if (victims.empty()) out += "  costs  no tenant a lease\n";
    for (const auto& victim : victims)
      out += fmt::format("  costs  {}: {}\n", api::text(victim, "tenant"), api::text(victim, "loses"));
    for (const auto& other : words_of(row, "disturbed")) out += "  beside " + other + "\n";
    for (const auto& held : words_of(row, "held")) out += "  held   " + held + "\n";
    for (const auto& line : words_of(row, "commands")) out += "  by hand: " + line + "\n";
    if (const auto next = api::text(row, "next"); !next.empty() && next != "none")
      out += "  then   " + next + ", if it does not help\n";
  }
  return out;
}

std::string page(const Context& context, const Json& document, bool all) {
  std::string out;
  if (const auto trouble = api::text(document, "trouble"); !trouble.empty())
    out += paint(context, Tone::bad, trouble) + "\n";
  const auto open = document.value("open", Json::array());
  const auto acts = document.value("acts", Json::array());
  if (open.empty()) out += "no fault waits for an act\n";
  for (const auto& row : open) {
    const auto act = api::text(row, "act");
    const bool now = row.contains("now") && row["now"].is_boolean() && row["now"].get<bool>();
    out += fmt::format("{}  {}{}\n", paint(context, Tone::bold, api::text(row, "incident")),
                       paint(context, now ? Tone::warn : Tone::bad, act), now ? ": its turn comes" : "");
    out += "  why    " + api::text(row, "why") + "\n";
    for (const auto& held : words_of(row, "held")) out += "  held   " + held + "\n";
    const auto victims = row.value("victims", Json::array());
    for (const auto& victim : victims)
      out += fmt::format("  costs  {}: {}\n", api::text(victim, "tenant"), api::text(victim, "loses"));
    for (const auto& other : words_of(row, "disturbed")) out += "  beside " + other + "\n";
    for (const auto& line : words_of(row, "commands")) out += "  by hand: " + line + "\n";
    if (const auto next = api::text(row, "next"); !next.empty() && next != "none")
      out += "  then   " + next + ", if it does not help\n";
  }
  if (!acts.empty()) {
    Table table({"BEGAN", "GPU", "ACT", "OUTCOME", "WHAT HAPPENED"});
    std::size_t shown = 0;
    for (const auto& row : acts) {
      if (!all && ++shown > 8) break;
      const auto doing = api::text(row, "doing");
      const auto step = api::text(row, "step");
      table.row({api::when(api::text(row, "began")), std::to_string(api::number(row, "index")),
                 api::text(row, "act"), step.empty() ? doing : doing + ": " + step,
                 api::text(row, "cause") + ": " + join(words_of(row, "said"), "; ")},
                {Tone::dim, Tone::bold, Tone::plain, tone_of(doing), Tone::plain});
    }
    out += "\n" + table.str(context);
  }
  if (api::text(document, "mode") != "act" && !open.empty())
    out +=
        fmt::format("nothing of this is done by itself: the node file says heal: {{mode: {}}}, or nothing\n",
                    api::text(document, "mode"));
  return out;
}

int heal(const Context& context, const Options& o) {
  auto client = api::connect(o.url);
  if (!client.ok()) return fail(context, Error(client.error()).in("heal"));
  std::string before;
  while (true) {
    const auto document = api::get(**client, "/api/v1/healing");
    if (!document.ok()) return fail(context, Error(document.error()).in("heal"));
    const std::string text =
        o.json ? (o.watch ? document->dump() : dump(*document)) + "\n" : page(context, *document, o.all);
    if (!o.watch) {
      if (const int code = print(text); code != 0) return code;
      return document->value("open", Json::array()).empty() ? 0 : 1;
    }
    if (text != before) {
      if (const int code = print((before.empty() || o.json ? "" : "\n") + text); code != 0) return code;
      before = text;
    }
    std::this_thread::sleep_for(std::chrono::seconds(1));
  }
}

int plan(const Context& context, const Options& o) {
  auto client = api::connect(o.url);
  if (!client.ok()) return fail(context, Error(client.error()).in("heal plan"));
  const auto document = api::get(**client, "/api/v1/healing");
  if (!document.ok()) return fail(context, Error(document.error()).in("heal plan"));
  std::optional<std::int64_t> index;
  if (!o.gpu.empty()) {
    const auto host = api::get(**client, "/api/v1/host");
    if (!host.ok()) return fail(context, Error(host.error()).in("heal plan"));
    for (const auto& gpu : host->value("gpus", Json::array()))
      if (api::text(gpu, "gpu") == o.gpu || std::to_string(api::number(gpu, "index")) == o.gpu)
        index = api::number(gpu, "index");
    if (!index)
      return fail(context, Error(Errc::not_found, fmt::format("heal plan: there is no GPU {}", o.gpu),
                                 "bulkhead gpus lists them"));
  }
  Json rows = Json::array();
  for (const auto& row : document->value("open", Json::array())) {
    if (!o.incident.empty() && api::text(row, "incident") != o.incident) continue;
    if (index && (!row.contains("index") || !row["index"].is_number() || api::number(row, "index") != *index))
      continue;
    rows.push_back(row);
  }
  if (!o.incident.empty() && rows.empty())
    return fail(context, Error(Errc::not_found,
                               fmt::format("heal plan: no act is planned for {}", printable(o.incident, 200)),
                               "bulkhead heal has those that wait, bulkhead incidents what is open"));
  const std::string trouble = api::text(*document, "trouble");
  std::string text = o.json         ? dump(Json{{"plans", rows}, {"trouble", trouble}}) + "\n"
                     : rows.empty() ? std::string("nothing would be done\n")
                                    : plan_page(context, rows);
  if (!o.json && !trouble.empty()) text = paint(context, Tone::bad, trouble) + "\n" + text;
  if (const int code = print(text); code != 0) return code;
  return rows.empty() ? exit_ok : exit_findings;
}

}  // namespace

std::function<int(const Context&)> bind_heal(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  auto* sub = app.add_subcommand(
      "plan", "What would be done about the open faults, in what order, and what each tenant loses");
  sub->footer(
      help_footer("bulkhead heal plan\nbulkhead heal plan 3\n"
                  "bulkhead heal plan --incident 'xid-48@0000:1b:00.0#20261123T164250.977Z'",
                  "0 nothing would be done; 1 something would; 2 the daemon could not be asked"));
  sub->add_option("gpu", o->gpu, "Its index or UUID; without: all");
  sub->add_option("--incident", o->incident, "Of this incident alone, as bulkhead incidents names it");
  sub->add_flag("--json", o->json, "For programs");
  api::add_url(*sub, o->url);
  app.add_flag("--json", o->json, "For programs");
  app.add_flag("--watch", o->watch, "Stay, and print again when something changes");
  app.add_flag("--all", o->all, "Every act that is remembered");
  api::add_url(app, o->url);
  return [o, sub](const Context& context) { return sub->parsed() ? plan(context, *o) : heal(context, *o); };
}

// The check before a GPU's next tenant, in a process of its own; the daemon starts it.
std::function<int(const Context&)> bind_check_gpu(CLI::App& app) {
  app.group("");  // not in the list of verbs
  struct Which {
    std::string gpu = {}, device = {}, cuda = "libcuda.so.1";
  };
  const auto which = std::make_shared<Which>();
  const auto gpu = app.add_option("--gpu", which->gpu, "What the driver says of the GPU with this UUID");
  app.add_option("--device", which->device, "Compute on the GPU or MIG device with this UUID")->excludes(gpu);
  app.add_option("--cuda", which->cuda, "The CUDA library")->type_name("FILE");
  return [which](const Context& context) -> int {
    if (which->gpu.empty() == which->device.empty())
      return fail(context,
                  Error(Errc::invalid, "check-gpu: --gpu or --device", "bulkhead inventory lists them"));
    const Json out = which->device.empty() ? heal::check_health(access_of(context), Uuid{which->gpu})
                                           : heal::check_device(which->cuda, which->device);
    if (const int code = print(out.dump() + "\n"); code != 0) return code;
    std::fflush(stdout);
    // A driver that is broken need not be left in good order.
    ::_exit(out["ok"].get<bool>() ? exit_ok : exit_findings);
  };
}

}  // namespace bulkhead::cli
