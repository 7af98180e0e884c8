// bulkhead audit, gpus: what was done, and what there is.
#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/text.hpp"
#include "cli/api.hpp"
#include "engine/control/control.hpp"

namespace bulkhead::cli {

namespace {

struct Options {
  std::string url = {}, state = {};
  std::size_t most = 100;
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
  auto all = api::all(**client, "/api/v1/audit", o.most);
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

int gpus(const Context& context, const Options& o) {
  auto client = api::connect(o.url);
  if (!client.ok()) return fail(context, Error(client.error()).in("gpus"));
  const auto host = api::get(**client, "/api/v1/host");
  if (!host.ok()) return fail(context, Error(host.error()).in("gpus"));
  if (o.json) return print(dump(*host) + "\n");
  std::string out;
  if (host->value("draining", Json(false)) == true)
    out += paint(context, Tone::warn, "draining: nothing new is granted") + "\n";
  if (const auto trouble = api::text(*host, "trouble"); !trouble.empty())
    out += paint(context, Tone::bad, trouble) + "\n";
  Table table({"GPU", "NAME", "POOL", "FREE", "NUMA", "LEASES"});
  const auto gpus_of = host->value("gpus", Json::array());
  for (const auto& gpu : gpus_of) {
    const auto free = gpu.find("free");
    const double part = free != gpu.end() && free->is_number() ? free->get<double>() : 0;
    std::string leases;
    const auto held = gpu.value("leases", Json::array());
    for (const auto& id : held) leases += (leases.empty() ? "" : ", ") + id.dump();
    const auto why = api::text(gpu, "why");
    table.row({std::to_string(api::number(gpu, "index")), api::text(gpu, "name"), api::text(gpu, "pool"),
               fmt::format("{:.0f} %", part * 100), std::to_string(api::number(gpu, "numaNode")),
               !why.empty()     ? why
               : leases.empty() ? "-"
                                : leases},
              {Tone::bold, Tone::plain, Tone::plain, part > 0 ? Tone::good : Tone::dim, Tone::dim,
               why.empty() ? Tone::plain : Tone::warn});
  }
  return print(out + table.str(context));
}

}  // namespace

std::function<int(const Context&)> bind_audit(CLI::App& app) {
  Subverbs<Options> verbs(app);
  const auto o = verbs.options;
  verbs.add(
      "list", "Who did what, oldest first", "bulkhead audit list --most 20\nbulkhead audit list --json",
      [&](CLI::App& sub) {
        sub.add_option("--most", o->most, "Lines (100)")->check([](const std::string& text) {
          const auto n = parse_u64(text);
          return n && *n >= 1 && *n <= 100'000 ? "" : "from 1 to 100000";
        });
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

std::function<int(const Context&)> bind_gpus(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_flag("--json", options->json, "For programs");
  api::add_url(app, options->url);
  return [options](const Context& context) { return gpus(context, *options); };
}

}  // namespace bulkhead::cli
