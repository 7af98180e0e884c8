// bulkhead incidents: what the kernel's log and the driver told of, joined, with whose it was.
#include <algorithm>
#include <chrono>
#include <set>
#include <thread>
#include <vector>

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
  return severity == "critical" ? Tone::bad : severity == "warn" ? Tone::warn : Tone::plain;
}

// A process in the line of a fault is not whose fault it is: many are shown for what they lost by it, or for
// having asked the driver when it noticed.
std::string whose_of(const Json& row) {
  const auto charged = api::text(row, "charged"), blame = api::text(row, "blame");
  if (!charged.empty()) return charged;
  if (blame == "hardware") return "hardware";
  if (blame == "nobody") return "the machine";
  if (blame == "application") return "a program, no tenant's";
  if (blame != "innocent") return "not known";
  if (!row.contains("processes")) return "not yours";  // a tenant is told of nobody else
  std::vector<std::string> hit;
  for (const auto& one : row["processes"])
    if (one.is_string()) hit.push_back(printable(one.get<std::string>(), 100));
  if (hit.empty()) return "nobody named";
  return fmt::format("nobody; hit {}{}", hit.front(),
                     hit.size() > 1 ? fmt::format(" and {} more", hit.size() - 1) : "");
}

// Every page of them, in one document: the first page's, with the items of all.
Result<Json> all_of(api::Client& client) {
  constexpr std::size_t most_pages = 100;  // of a thousand: the daemon keeps fewer
  BH_TRY(Json document, api::get(client, "/api/v1/incidents"));
  auto next = api::text(document, "next");
  document.erase("next");
  if (!document.contains("items") || !document["items"].is_array())
    return Error(Errc::corrupt, "the server's page has no items");
  std::set<std::string> seen;  // one that closes between two pages has moved
  for (const auto& row : document["items"]) seen.insert(api::text(row, "id"));
  for (std::size_t pages = 1; !next.empty() && pages < most_pages; ++pages) {
    BH_TRY(const Json page, api::get(client, "/api/v1/incidents?after=" + client::segment(next)));
    const auto items = page.find("items");
    if (items == page.end() || !items->is_array())
      return Error(Errc::corrupt, "the server's page has no items");
    for (const auto& row : *items)
      if (seen.insert(api::text(row, "id")).second) document["items"].push_back(row);
    next = items->empty() ? std::string() : api::text(page, "next");
  }
  return document;
}

std::string page(const Context& context, const Json& document, bool all) {
  std::string out;
  const auto items = document.value("items", Json::array());
  Table table({"INCIDENT", "SEVERITY", "REACH", "WHOSE", "WHAT"});
  std::size_t shown = 0, closed = 0;
  for (const auto& row : items) {
    const bool open = row.value("open", true);
    if (!open) ++closed;
    if (!open && !all) continue;
    ++shown;
    const auto severity = api::text(row, "severity");
    std::string what = api::text(row, "title");
    if (const auto remedy = api::text(row, "remedy"); !remedy.empty() && remedy != "none")
      what += "; remedy: " + remedy;
    // The first of what it says; all the check found is in --json and in `bulkhead heal`.
    if (!open) {
      const std::string why = api::text(row, "closedWhy");
      what += "; closed: " + why.substr(0, why.find("; "));
    }
    table.row({api::text(row, "id"), severity, api::text(row, "blast"), whose_of(row), what},
              {open ? Tone::bold : Tone::dim, open ? tone_of(severity) : Tone::dim, Tone::plain, Tone::plain,
               Tone::plain});
  }
  out += shown == 0 ? "no incident is open\n" : table.str(context);
  if (!all && closed > 0) out += fmt::format("{} are closed: bulkhead incidents --all\n", closed);
  const auto notes = document.value("notes", Json::array());
  for (const auto& note : notes)
    if (note.is_string()) out += printable(note.get<std::string>(), 400) + "\n";
  if (shown > 0) out += "each with its evidence: bulkhead incidents --json; what to do: bulkhead heal\n";
  return out;
}

int incidents(const Context& context, const Options& o) {
  auto client = api::connect(o.url);
  if (!client.ok()) return fail(context, Error(client.error()).in("incidents"));
  std::string before;
  while (true) {
    const auto document = all_of(**client);
    if (!document.ok()) return fail(context, Error(document.error()).in("incidents"));
    const std::string text =
        o.json ? (o.watch ? document->dump() : dump(*document)) + "\n" : page(context, *document, o.all);
    if (!o.watch) {
      if (const int code = print(text); code != 0) return code;
      const auto items = document->value("items", Json::array());
      return std::any_of(items.begin(), items.end(), [](const Json& row) { return row.value("open", false); })
                 ? 1
                 : 0;
    }
    if (text != before) {
      if (const int code = print((before.empty() || o.json ? "" : "\n") + text); code != 0) return code;
      before = text;
    }
    std::this_thread::sleep_for(std::chrono::seconds(1));
  }
}

}  // namespace

std::function<int(const Context&)> bind_incidents(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  app.add_flag("--json", o->json, "For programs, with the evidence");
  app.add_flag("--watch", o->watch, "Stay, and print again when something changes");
  app.add_flag("--all", o->all, "Closed ones too");
  api::add_url(app, o->url);
  return [o](const Context& context) { return incidents(context, *o); };
}

}  // namespace bulkhead::cli
