// bulkhead gpus: what serves what, and what serves nobody for now.
#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/text.hpp"
#include "cli/api.hpp"

namespace bulkhead::cli {

namespace {

struct Options {
  std::string url = {}, why = {};
  std::vector<std::string> gpus = {};
  bool json = false;
};

int list(const Context& context, const Options& o) {
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

// The UUIDs of what was named: an index, a UUID, or "all".
Result<std::vector<std::string>> uuids_of(const Json& host, const std::vector<std::string>& named) {
  std::vector<std::string> out;
  const auto all = host.value("gpus", Json::array());
  for (const auto& name : named) {
    const auto before = out.size();
    for (const auto& gpu : all) {
      const auto uuid = api::text(gpu, "gpu");
      if (name == "all" || name == uuid || name == std::to_string(api::number(gpu, "index")))
        out.push_back(uuid);
    }
    // One that is gone for good is not listed: its cordon can be lifted by its UUID all the same.
    if (out.size() == before && name.starts_with("GPU-")) out.push_back(name);
    if (out.size() == before)
      return Error(Errc::not_found, fmt::format("there is no GPU {}", printable(name, 64)),
                   "bulkhead gpus lists them");
  }
  return out;
}

int cordon(const Context& context, const Options& o, bool on) {
  const std::string_view verb = on ? "gpus cordon" : "gpus uncordon";
  auto client = api::connect(o.url);
  if (!client.ok()) return fail(context, Error(client.error()).in(verb));
  const auto host = api::get(**client, "/api/v1/host");
  if (!host.ok()) return fail(context, Error(host.error()).in(verb));
  const auto uuids = uuids_of(*host, o.gpus);
  if (!uuids.ok()) return fail(context, Error(uuids.error()).in(verb));
  Json done = Json::array();
  std::string said;
  for (const auto& uuid : *uuids) {
    const auto path = fmt::format("/api/v1/gpus/{}/cordon", client::segment(uuid));
    const auto gpu = api::document(**client, on ? (*client)->call("PUT", path, Json{{"why", o.why}})
                                                : (*client)->call("DELETE", path, {}));
    if (!gpu.ok()) {
      if (!said.empty()) (void)print(said);  // what was done before it
      return fail(context, Error(gpu.error()).in(verb));
    }
    const auto leases = gpu->value("leases", Json::array());
    said += fmt::format("gpu {} {}", api::number(*gpu, "index"),
                        on ? "gets no new leases" : "may be leased again");
    if (on && !leases.empty()) {
      said += ";";
      for (const auto& id : leases) said += fmt::format(" {}", id.dump());
      said += leases.size() == 1 ? " goes on" : " go on";
    }
    said += "\n";
    done.push_back(*gpu);
  }
  return print(o.json ? dump(Json{{"gpus", std::move(done)}}) + "\n" : said);
}

void which(CLI::App& sub, const std::shared_ptr<Options>& o) {
  sub.add_option("gpu", o->gpus, "Its index or UUID; all: every one")->required()->expected(1, 64);
  sub.add_flag("--json", o->json, "For programs");
  api::add_url(sub, o->url);
}

}  // namespace

std::function<int(const Context&)> bind_gpus(CLI::App& app) {
  Subverbs<Options> verbs(app);
  const auto o = verbs.options;
  app.require_subcommand(0, 1);
  app.add_flag("--json", o->json, "For programs");
  api::add_url(app, o->url);
  verbs.add(
      "cordon", "No new leases for a GPU until it is uncordoned; those that are there go on",
      "bulkhead gpus cordon 3 --why 'fan replaced on Tuesday'\n"
      "bulkhead gpus cordon all --why 'kernel update'",
      [&](CLI::App& sub) {
        which(sub, o);
        sub.add_option("--why", o->why, "What others are to know of it")->required()->type_name("TEXT");
      },
      [](const Context& context, const Options& options) { return cordon(context, options, true); });
  verbs.add(
      "uncordon", "It may be leased again", "bulkhead gpus uncordon 3", [&](CLI::App& sub) { which(sub, o); },
      [](const Context& context, const Options& options) { return cordon(context, options, false); });
  return [o, run = verbs.run(), &app](const Context& context) {
    return app.get_subcommands().empty() ? list(context, *o) : run(context);
  };
}

}  // namespace bulkhead::cli
