// bulkhead audit: what was done.
#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/text.hpp"
#include "cli/api.hpp"
#include "engine/control/control.hpp"

namespace bulkhead::cli {

namespace {

struct Options {
  std::string url = {}, state = {};
  std::size_t most = 100, newest = 0;  // newest 0: oldest first
  bool json = false, remote = false;
};

int verdict(const Context& context, const Options& o, std::int64_t lines, const std::string& broken) {
  if (o.json) {
    Json out{{"lines", lines}, {"whole", broken.empty()}};
    if (!broken.empty()) out["broken"] = broken;
    const int code = print(dump(out) + "\n");
    return code != exit_ok ? code : broken.empty() ? exit_ok : exit_findings;
  }
  if (broken.empty())
    return print(fmt::format("{} {} lines; each fits the one before it\n",
                             paint(context, Tone::good, "whole"), lines));
  const int code = print(
      fmt::format("{} {}\nkeep the database as it is: lines before that one are proved, none behind it\n",
                  paint(context, Tone::bad, "BROKEN"), printable(broken, 1024)));
  return code != exit_ok ? code : exit_findings;
}

int audit_verify(const Context& context, const Options& o) {
  if (o.remote || !o.url.empty()) {
    auto client = api::connect(o.url);
    if (!client.ok()) return fail(context, Error(client.error()).in("audit verify"));
    const auto said = api::get(**client, "/api/v1/audit/verdict");
    if (!said.ok()) return fail(context, Error(said.error()).in("audit verify"));
    const bool whole = said->value("whole", Json(false)) == true;
    auto broken = api::text(*said, "broken");
    if (!whole && broken.empty()) broken = "the chain does not fit";
    return verdict(context, o, api::number(*said, "lines"), whole ? "" : broken);
  }
  const auto state = o.state.empty() ? context.state_dir : std::filesystem::path(o.state);
  const auto report = control::verify_audit(state);
  if (!report.ok()) {
    auto error = Error(report.error()).in("audit verify");
    if (error.hint().empty())
      error = std::move(error).with_hint(
          "where the daemon keeps its state: bulkhead audit verify --state DIR\n"
          "or ask it: bulkhead audit verify --remote");
    return fail(context, error);
  }
  return verdict(context, o, report->lines, report->broken);
}

int audit_list(const Context& context, const Options& o) {
  auto client = api::connect(o.url);
  if (!client.ok()) return fail(context, Error(client.error()).in("audit list"));
  auto all = o.newest != 0 ? api::all(**client, "/api/v1/audit?order=newest", o.newest)
                           : api::all(**client, "/api/v1/audit", o.most);
  if (!all.ok()) return fail(context, Error(all.error()).in("audit list"));
  if (o.json) return print(dump(Json{{"lines", *all}}) + "\n");
  Table table({"ID", "AT", "WHO", "FROM", "DID", "TO", "OUTCOME"});
  for (const auto& one : *all) {
    const auto outcome = api::text(one, "outcome");
    auto who = api::text(one, "user");
    if (const auto tenant = api::text(one, "tenant"); !tenant.empty()) who += " (" + tenant + ")";
    table.row({std::to_string(api::number(one, "id")), api::text(one, "at"), who, api::text(one, "from"),
               api::text(one, "verb"), api::text(one, "what"), outcome},
              {Tone::bold, Tone::dim, Tone::plain, Tone::dim, Tone::plain, Tone::plain,
               outcome == "done" ? Tone::good : Tone::warn});
  }
  return print(table.str(context));
}

}  // namespace

std::function<int(const Context&)> bind_audit(CLI::App& app) {
  Subverbs<Options> verbs(app);
  const auto o = verbs.options;
  verbs.add(
      "list", "Who did what, oldest first",
      "bulkhead audit list --newest 20    the last 20, newest first\nbulkhead audit list --json",
      [&](CLI::App& sub) {
        const auto bounded = [](const std::string& text) {
          const auto n = parse_u64(text);
          return n && *n >= 1 && *n <= 100'000 ? "" : "from 1 to 100000";
        };
        auto* most = sub.add_option("--most", o->most, "Lines (100)")->check(bounded);
        sub.add_option("--newest", o->newest, "So many of the end of the log, newest first")
            ->check(bounded)
            ->type_name("N")
            ->excludes(most);
        sub.add_flag("--json", o->json, "For programs");
        api::add_url(sub, o->url);
      },
      audit_list);
  verbs.add(
      "verify", "Say whether the log is as it was written: each line's hash covers the one before it",
      "bulkhead audit verify                the daemon need not run\n"
      "bulkhead audit verify --state DIR    another state directory, a copy of one\n"
      "bulkhead audit verify --remote       ask the daemon",
      [&](CLI::App& sub) {
        sub.add_option("--state", o->state, "Where the daemon keeps its state (default: --state-dir)")
            ->type_name("DIR");
        sub.add_flag("--remote", o->remote, "Ask the daemon instead of reading the file");
        sub.add_flag("--json", o->json, "For programs");
        api::add_url(sub, o->url);
      },
      audit_verify);
  return verbs.run();
}

}  // namespace bulkhead::cli
