// bulkhead drain, undrain: the host gives nothing new, and gives again. Whoever has a lease keeps it.
#include <poll.h>

#include <algorithm>
#include <chrono>
#include <optional>

#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/text.hpp"
#include "cli/api.hpp"

namespace bulkhead::cli {

namespace {

using Clock = std::chrono::steady_clock;
using api::Asked;

constexpr std::size_t most_rows = 50;

struct Options {
  std::string url = {};
  std::string wait = {};  // empty: not; "true": without end; else how long
  bool json = false, dry = false;
};

struct Found {
  bool draining = false;
  Json goes_on = Json::array(), waits = Json::array();
};

// Who is here, oldest lease first.
Result<Found> look(api::Client& client) {
  Found out;
  BH_TRY(const Json host, api::get(client, "/api/v1/host"));
  out.draining = host.value("draining", Json(false)) == true;
  BH_TRY(Json leases, api::all(client, "/api/v1/leases"));
  for (auto at = leases.rbegin(); at != leases.rend(); ++at) {
    const auto state = api::text(*at, "state");
    if (api::over(state)) continue;
    (state == "queued" || state == "requested" ? out.waits : out.goes_on).push_back(std::move(*at));
  }
  return out;
}

Result<bool> put(api::Client& client, bool on) {
  BH_TRY(const Json host,
         api::document(client, client.call("PUT", "/api/v1/host/drain", Json{{"draining", on}})));
  return host.value("draining", Json(!on)) == on;
}

std::string leases_of(std::size_t count, std::string_view one, std::string_view many) {
  return count == 1 ? fmt::format("1 lease {}", one) : fmt::format("{} leases {}", count, many);
}

std::string table_of(const Context& context, const Json& leases) {
  Table table({"ID", "TENANT", "USER", "CLASS", "STATE", "UNTIL"});
  for (std::size_t i = 0; i < leases.size() && i < most_rows; ++i) {
    const auto& one = leases[i];
    auto cls = api::text(one, "class");
    if (const auto profile = api::text(one, "profile"); !profile.empty()) cls += " " + profile;
    table.row({api::id_of_lease(one), api::text(one, "tenant"), api::text(one, "user"), cls,
               api::text(one, "state"), one.contains("expires") ? api::when(api::text(one, "expires")) : "-"},
              {Tone::bold, Tone::plain, Tone::plain, Tone::plain, Tone::plain, Tone::plain});
  }
  auto out = table.str(context);
  if (leases.size() > most_rows)
    out += fmt::format("and {} more: bulkhead lease list\n", leases.size() - most_rows);
  return out;
}

// "the last ends in 2h": by its present term; a renewal makes it later.
std::string last_end(const Json& leases) {
  std::string last;
  for (const auto& one : leases) last = std::max(last, api::text(one, "expires"));
  return last.empty() ? "" : fmt::format("; the last ends {}, unless renewed", api::when(last));
}

std::string page(const Context& context, const Found& found, bool dry) {
  std::string out;
  if (dry)
    out = found.draining ? "the host is drained already; it gives nothing new\n"
                         : "the host would give nothing new; nothing was changed\n";
  else
    out = paint(context, Tone::warn, "the host gives nothing new until: bulkhead undrain") + "\n";
  if (!found.waits.empty())
    out += fmt::format("{} in the queue {}\n", leases_of(found.waits.size(), "waits", "wait"),
                       dry ? "would wait on until it is undrained" : "until then");
  if (found.goes_on.empty()) return out + "nobody has a lease: the host is free\n";
  out += leases_of(found.goes_on.size(), "goes on", "go on") + last_end(found.goes_on) + "\n" +
         table_of(context, found.goes_on);
  return out + (dry ? "" : "end one now, and say why: bulkhead lease evict ID --why TEXT\n");
}

int told(const Context& context, const Options& o, const Found& found, bool dry) {
  if (!o.json) return print(page(context, found, dry));
  return print(dump(Json{{"draining", found.draining},
                         {"changed", !dry},
                         {"goesOn", found.goes_on},
                         {"waits", found.waits}}) +
               "\n");
}

// Until nobody has a lease. False: the time is over, or a signal came.
Result<bool> wait_for_all(api::Client& client, Found& found, std::optional<Clock::time_point> until) {
  std::size_t said = found.goes_on.size();
  unsigned failures = 0;
  while (!found.goes_on.empty()) {
    if (Asked::to_stop != 0 || (until && Clock::now() >= *until)) return false;
    auto pause = std::chrono::milliseconds(1000);
    if (until)
      pause = std::clamp(std::chrono::duration_cast<std::chrono::milliseconds>(*until - Clock::now()),
                         std::chrono::milliseconds(1), pause);
    ::poll(nullptr, 0, static_cast<int>(pause.count()));
    auto now = look(client);
    if (!now.ok()) {
      const auto why = now.error().code();
      if ((why != Errc::unavailable && why != Errc::timeout && why != Errc::in_use) || ++failures > 60)
        return now.error();
      continue;
    }
    failures = 0;
    found = std::move(*now);
    if (!found.draining)
      return Error(Errc::conflict, "somebody undrained the host meanwhile: it gives leases again",
                   "bulkhead audit list --newest 20   says who");
    if (found.goes_on.size() == said) continue;
    said = found.goes_on.size();
    std::fputs((leases_of(said, "goes on", "go on") + "\n").c_str(), stderr);
  }
  return true;
}

int drain(const Context& context, const Options& o) {
  const auto failed = [&](const Error& error) { return fail(context, Error(error).in("drain")); };
  std::optional<Clock::time_point> until;
  const bool wait = !o.wait.empty() && o.wait != "false";
  if (wait && o.wait != "true") {
    const auto seconds = api::seconds_of(o.wait);
    if (!seconds.ok()) return failed(seconds.error());
    until = Clock::now() + std::chrono::seconds(*seconds);
  }
  auto client = api::connect(o.url);
  if (!client.ok()) return failed(client.error());
  const Asked signals;
  if (!o.dry) {
    const auto done = put(**client, true);
    if (!done.ok()) return failed(done.error());
  }
  auto found = look(**client);
  if (!found.ok()) return failed(found.error());
  if (!wait || o.dry || !o.json)
    if (const int code = told(context, o, *found, o.dry); code != exit_ok || !wait || o.dry) return code;
  if (found->goes_on.empty()) return o.json ? told(context, o, *found, false) : exit_ok;
  const auto all = wait_for_all(**client, *found, until);
  if (!all.ok()) return failed(all.error());
  if (o.json)
    if (const int code = told(context, o, *found, false); code != exit_ok) return code;
  if (*all) return o.json ? exit_ok : print("nobody has a lease: the host is free\n");
  std::fputs(fmt::format("bulkhead: drain: {}: {}\n  the host stays drained: wait again with bulkhead drain "
                         "--wait, or take it back with bulkhead undrain\n",
                         Asked::to_stop != 0 ? "stopped waiting" : "the time is over",
                         leases_of(found->goes_on.size(), "goes on", "go on"))
                 .c_str(),
             stderr);
  return exit_findings;
}

int undrain(const Context& context, const Options& o) {
  auto client = api::connect(o.url);
  if (!client.ok()) return fail(context, Error(client.error()).in("undrain"));
  const auto done = put(**client, false);
  if (!done.ok()) return fail(context, Error(done.error()).in("undrain"));
  const auto found = look(**client);
  if (!found.ok()) return fail(context, Error(found.error()).in("undrain"));
  if (o.json) return told(context, o, *found, false);
  std::string out = "the host gives leases again\n";
  if (!found->waits.empty())
    out += fmt::format("{} in the queue for room\n", leases_of(found->waits.size(), "waits", "wait"));
  return print(out);
}

}  // namespace

std::function<int(const Context&)> bind_drain(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  app.add_flag("--dry-run", o->dry, "Only say what it would do, and to whom");
  app.add_flag("--wait", o->wait, "Come back when nobody has a lease, or after --wait=TIME, like 30m or 2h");
  app.add_flag("--json", o->json, "For programs");
  api::add_url(app, o->url);
  return [o](const Context& context) { return drain(context, *o); };
}

std::function<int(const Context&)> bind_undrain(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  app.add_flag("--json", o->json, "For programs");
  api::add_url(app, o->url);
  return [o](const Context& context) { return undrain(context, *o); };
}

}  // namespace bulkhead::cli
