// bulkhead tenant, quota, token: whom the host serves, and how much of it.
#include <algorithm>
#include <chrono>

#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/text.hpp"
#include "cli/api.hpp"
#include "core/access/access.hpp"

namespace bulkhead::cli {

namespace {

struct Options {
  std::string url = {}, name = {}, note = {}, user = {}, role = {}, tenant = {}, ttl = {}, certificate = {};
  std::optional<unsigned> weight = {};
  std::vector<std::string> limits = {};
  bool json = false, suspend = false, resume = false, quiet = false, has_note = false;
};

std::string tenant_path(const std::string& name) { return "/api/v1/tenants/" + client::segment(name); }

// ---- quotas: NAME=N words of the command line, and back
struct Limit {
  const char* word;  // on the command line
  const char* key;   // of the API
  enum { count, bytes, hours } unit;
};
constexpr Limit limits[] = {
    {"leases", "leases", Limit::count},
    {"gpus", "gpus", Limit::count},
    {"slices", "slices", Limit::count},
    {"shares", "shares", Limit::count},
    {"memory", "memory", Limit::bytes},
    {"watts", "watts", Limit::count},
    {"gpu-hours", "gpuSecondsMonth", Limit::hours},
};

std::string amount(const Limit& limit, std::int64_t value) {
  switch (limit.unit) {
    case Limit::bytes:
      return human(Bytes(static_cast<std::uint64_t>(std::max<std::int64_t>(value, 0))));
    case Limit::hours:
      return fmt::format("{:.4g}", static_cast<double>(value) / 3600);
    case Limit::count:
      break;
  }
  return std::to_string(value);
}

// Onto a quota: "leases=4", "memory=80GiB", "gpu-hours=100", "1g.10gb=3", "gpus=none".
Status put_limit(std::string_view word, Json& quota) {
  const auto equals = word.find('=');
  const auto wrong = [&](std::string_view why) {
    return Error(Errc::invalid, fmt::format("'{}': {}", printable(word, 80), why),
                 "like leases=4 gpus=2 slices=7 1g.10gb=3 shares=8 memory=80GiB watts=2000 gpu-hours=500, or "
                 "gpus=none");
  };
  if (equals == std::string_view::npos || equals == 0) return wrong("a limit is NAME=VALUE");
  const auto name = word.substr(0, equals), value = word.substr(equals + 1);
  const auto limit =
      std::find_if(std::begin(limits), std::end(limits), [&](const auto& one) { return one.word == name; });
  const bool profile = limit == std::end(limits);
  if (profile && (std::isdigit(static_cast<unsigned char>(name.front())) == 0 ||
                  name.find('g') == std::string_view::npos))
    return wrong("no such limit");
  if (value == "none") {
    if (!profile)
      quota.erase(limit->key);
    else if (quota.contains("profiles"))
      quota["profiles"].erase(std::string(name));
    return ok_status();
  }
  if (!profile && limit->unit == Limit::bytes) {
    const auto bytes = value.empty() ? Result<std::uint64_t>(Error(Errc::invalid, "")) : parse_memory(value);
    if (!bytes.ok()) return wrong("no amount of memory with its unit");
    quota[limit->key] = *bytes;
    return ok_status();
  }
  const auto count = parse_u64(value);
  if (!count || *count > 1'000'000'000) return wrong("no whole number");
  if (profile)
    quota["profiles"][std::string(name)] = *count;
  else
    quota[limit->key] = limit->unit == Limit::hours ? *count * 3600 : *count;
  return ok_status();
}

// What is held of what may be held: a line a limit.
std::string held_table(const Context& context, const Json& tenant) {
  Table table({"", "HELD", "AT MOST"});
  const auto quota = tenant.value("quota", Json::object()), held = tenant.value("held", Json::object());
  for (const auto& limit : limits) {
    const auto most = quota.find(limit.key);
    const auto now = api::number(held, limit.key);
    const bool full = most != quota.end() && most->is_number_integer() && now >= most->get<std::int64_t>();
    table.row({limit.word == std::string_view("gpu-hours") ? "gpu-hours this month" : limit.word,
               amount(limit, now),
               most == quota.end() || !most->is_number_integer() ? "no limit"
                                                                 : amount(limit, most->get<std::int64_t>())},
              {Tone::bold, Tone::plain, full ? Tone::warn : Tone::plain});
  }
  const auto most_of = quota.value("profiles", Json::object()),
             held_of = held.value("profiles", Json::object());
  std::vector<std::string> names;
  for (const auto* one : {&most_of, &held_of})
    for (const auto& [name, value] : one->items()) names.push_back(name);
  std::sort(names.begin(), names.end());
  names.erase(std::unique(names.begin(), names.end()), names.end());
  for (const auto& name : names)
    table.row({printable(name, 40), std::to_string(api::number(held_of, name.c_str())),
               most_of.contains(name) ? std::to_string(api::number(most_of, name.c_str())) : "no limit"},
              {Tone::bold, Tone::plain, Tone::plain});
  return table.str(context);
}

using Act = Result<int> (*)(const Context&, const Options&, api::Client&);

Subverbs<Options>::Act speaking(const char* verb, Act act) {
  return [verb, act](const Context& context, const Options& options) {
    auto client = api::connect(options.url);
    if (!client.ok()) return fail(context, Error(client.error()).in(verb));
    auto code = act(context, options, **client);
    return code.ok() ? *code : api::refused(context, verb, code.error());
  };
}

Result<int> tenant_list(const Context& context, const Options& o, api::Client& client) {
  BH_TRY(const Json all, api::all(client, "/api/v1/tenants"));
  if (o.json) return print(dump(Json{{"tenants", all}}) + "\n");
  if (all.empty()) return print("no tenants\ntry: bulkhead tenant put NAME\n");
  Table table({"NAME", "WEIGHT", "LEASES", "GPUS", "SLICES", "SHARES", "MEMORY", "GPU-HOURS", "STATE"});
  for (const auto& one : all) {
    const auto quota = one.value("quota", Json::object()), held = one.value("held", Json::object());
    const auto cell = [&](const Limit& limit) {
      std::string out = amount(limit, api::number(held, limit.key));
      if (quota.contains(limit.key)) out += " / " + amount(limit, api::number(quota, limit.key));
      return out;
    };
    const bool suspended = one.value("suspended", Json(false)) == true;
    table.row({api::text(one, "name"), std::to_string(api::number(one, "weight")), cell(limits[0]),
               cell(limits[1]), cell(limits[2]), cell(limits[3]), cell(limits[4]), cell(limits[6]),
               suspended ? "suspended: nothing new" : api::text(one, "note")},
              {Tone::bold, Tone::plain, Tone::plain, Tone::plain, Tone::plain, Tone::plain, Tone::plain,
               Tone::plain, suspended ? Tone::warn : Tone::dim});
  }
  return print(table.str(context));
}

int show_tenant(const Context& context, const Options& o, const Json& tenant) {
  if (o.json) return print(dump(tenant) + "\n");
  std::string out =
      fmt::format("{}   weight {}{}\n", paint(context, Tone::bold, api::text(tenant, "name")),
                  api::number(tenant, "weight"),
                  tenant.value("suspended", Json(false)) == true
                      ? paint(context, Tone::warn, "   suspended: keeps what it has, gets nothing new")
                      : "");
  if (const auto note = api::text(tenant, "note"); !note.empty()) out += note + "\n";
  return print(out + held_table(context, tenant));
}

Result<int> tenant_show(const Context& context, const Options& o, api::Client& client) {
  BH_TRY(const Json tenant, api::get(client, tenant_path(o.name)));
  return show_tenant(context, o, tenant);
}

Result<int> tenant_put(const Context& context, const Options& o, api::Client& client) {
  Json body{{"name", o.name}};
  if (o.weight) body["weight"] = *o.weight;
  if (o.suspend || o.resume) body["suspended"] = o.suspend;
  if (!o.note.empty()) body["note"] = o.note == "none" ? "" : o.note;
  BH_TRY(const auto present, client.call("GET", tenant_path(o.name), std::nullopt));
  const bool there = present.status == 200;
  if (!there && present.status != 404) return api::document(client, present).error();
  if (!o.limits.empty()) {
    Json quota = there ? present.body.value("quota", Json::object()) : Json::object();
    for (const auto& word : o.limits) BH_CHECK(put_limit(word, quota));
    body["quota"] = quota;
  }
  if (there && body.size() == 1)
    return Error(Errc::invalid,
                 fmt::format("tenant {} is there already, and nothing to change was said", o.name),
                 "bulkhead tenant put --help");
  std::vector<std::pair<std::string, std::string>> headers;
  if (there && !present.etag.empty()) headers.emplace_back("If-Match", present.etag);
  if (!there) headers.emplace_back("Idempotency-Key", api::fresh_key());
  BH_TRY(const Json tenant,
         api::document(client, there ? client.call("PUT", tenant_path(o.name), body, headers)
                                     : client.call("POST", "/api/v1/tenants", body, headers)));
  return show_tenant(context, o, tenant);
}

Result<int> tenant_end(const Context&, const Options& o, api::Client& client) {
  BH_TRY(const Json gone, api::document(client, client.call("DELETE", tenant_path(o.name), std::nullopt)));
  return print(o.json ? dump(gone) + "\n" : fmt::format("tenant {} is ended\n", printable(o.name, 80)));
}

Result<int> quota_show(const Context& context, const Options& o, api::Client& client) {
  std::string name = o.name;
  if (name.empty()) {
    BH_TRY(const Json who, api::get(client, "/api/v1/whoami"));
    name = api::text(who, "tenant");
    if (name.empty())
      return Error(Errc::invalid, fmt::format("{} is of no tenant", api::text(who, "user")),
                   "name one: bulkhead quota show TENANT");
  }
  BH_TRY(const Json tenant, api::get(client, tenant_path(name)));
  if (o.json)
    return print(dump(Json{{"tenant", name},
                           {"quota", tenant.value("quota", Json::object())},
                           {"held", tenant.value("held", Json::object())}}) +
                 "\n");
  return print(held_table(context, tenant));
}

Result<int> quota_set(const Context& context, const Options& o, api::Client& client) {
  const auto path = tenant_path(o.name) + "/quota";
  BH_TRY(const auto present, client.call("GET", path, std::nullopt));
  BH_TRY(Json quota, api::document(client, present));
  for (const auto& word : o.limits) BH_CHECK(put_limit(word, quota));
  std::vector<std::pair<std::string, std::string>> headers;
  if (!present.etag.empty()) headers.emplace_back("If-Match", present.etag);
  BH_TRY(const Json tenant, api::document(client, client.call("PUT", path, quota, headers)));
  return o.json ? print(dump(tenant) + "\n") : print(held_table(context, tenant));
}

Result<int> token_create(const Context&, const Options& o, api::Client& client) {
  Json body{{"user", o.user}, {"role", o.role}};
  if (!o.tenant.empty()) body["tenant"] = o.tenant;
  if (!o.note.empty()) body["note"] = o.note;
  if (!o.certificate.empty()) {
    BH_TRY(body["certificate"], client::parse_fingerprint(o.certificate));
  }
  if (!o.ttl.empty()) {
    const std::string_view text = o.ttl;
    if (text.ends_with('d')) {  // a token may live longer than a lease
      const auto days = parse_u64(text.substr(0, text.size() - 1));
      if (!days || *days > 3'650)
        return Error(Errc::invalid, fmt::format("{} is no number of days", printable(text, 40)),
                     "like 8h, 30d or 365d");
      body["ttlSeconds"] = *days * 86'400;
    } else {
      BH_TRY(body["ttlSeconds"], api::seconds_of(o.ttl));
    }
  }
  BH_TRY(const Json made, api::document(client, client.call("POST", "/api/v1/tokens", body)));
  if (o.json) return print(dump(made) + "\n");
  const auto secret = api::text(made, "secret");
  if (o.quiet) return print(secret + "\n");
  std::string out =
      fmt::format("token {} of {}, {}{}{}\n", api::text(made, "id"), api::text(made, "user"),
                  api::text(made, "role"), made.contains("tenant") ? " of " + api::text(made, "tenant") : "",
                  made.contains("expires") ? ", until " + api::text(made, "expires") : ", no end");
  if (!secret.empty()) out += fmt::format("\n{}\n\nthis is the only time it is shown\n", secret);
  return print(out);
}

Result<int> token_list(const Context& context, const Options& o, api::Client& client) {
  BH_TRY(const Json all, api::all(client, "/api/v1/tokens"));
  if (o.json) return print(dump(Json{{"tokens", all}}) + "\n");
  if (all.empty()) return print("no tokens\n");
  Table table({"ID", "USER", "ROLE", "TENANT", "CREATED", "STATE", "NOTE"});
  for (const auto& one : all) {
    const bool revoked = one.contains("revoked"), ends = one.contains("expires");
    const auto expires = ends ? api::when(api::text(one, "expires")) : "";
    const bool over = expires.ends_with("ago");
    table.row({api::text(one, "id"), api::text(one, "user"), api::text(one, "role"),
               one.contains("tenant") ? api::text(one, "tenant") : "-", api::when(api::text(one, "created")),
               revoked ? "revoked " + api::when(api::text(one, "revoked"))
               : over  ? "expired " + expires
               : ends  ? "ends " + expires
                       : "good",
               api::text(one, "note")},
              {Tone::bold, Tone::plain, Tone::plain, Tone::plain, Tone::plain,
               revoked || over ? Tone::dim : Tone::good, Tone::dim});
  }
  return print(table.str(context));
}

Result<int> token_revoke(const Context&, const Options& o, api::Client& client) {
  BH_TRY(const Json gone,
         api::document(client,
                       client.call("DELETE", "/api/v1/tokens/" + client::segment(o.name), std::nullopt)));
  return print(
      o.json ? dump(gone) + "\n"
             : fmt::format("token {} of {} is revoked\n", api::text(gone, "id"), api::text(gone, "user")));
}

void common(CLI::App& sub, const std::shared_ptr<Options>& o) {
  sub.add_flag("--json", o->json, "For programs");
  api::add_url(sub, o->url);
}

constexpr const char* limit_words =
    "leases=4 gpus=2 slices=7 1g.10gb=3 shares=8 memory=80GiB watts=2000 gpu-hours=500 (of a month); "
    "NAME=none: no "
    "limit";

}  // namespace

std::function<int(const Context&)> bind_tenant(CLI::App& app) {
  Subverbs<Options> verbs(app);
  const auto o = verbs.options;
  verbs.add(
      "list", "Tenants, and what they hold of what they may",
      "bulkhead tenant list\nbulkhead tenant list --json", [&](CLI::App& sub) { common(sub, o); },
      speaking("tenant list", tenant_list));
  verbs.add(
      "show", "One tenant", "bulkhead tenant show vision",
      [&](CLI::App& sub) {
        sub.add_option("name", o->name, "Tenant")->required();
        common(sub, o);
      },
      speaking("tenant show", tenant_show));
  verbs.add(
      "put", "Make a tenant, or change one: what is not said stays",
      "bulkhead tenant put vision --weight 200 leases=8 gpus=2\n"
      "bulkhead tenant put vision --suspend       keeps what it has, gets nothing new\n"
      "bulkhead tenant put vision gpus=none       no limit of that kind",
      [&](CLI::App& sub) {
        sub.add_option("name", o->name, "Lower-case letters, digits and hyphens")->required();
        sub.add_option("limits", o->limits, limit_words)->expected(0, 64);
        sub.add_option("--weight", o->weight, "Its part in the queue, against the others' (100)");
        sub.add_flag("--suspend", o->suspend, "Nothing new is granted");
        sub.add_flag("--resume", o->resume, "Again as before");
        sub.add_option("--note", o->note, "Your own words, or none")->type_name("TEXT");
        common(sub, o);
      },
      speaking("tenant put", tenant_put));
  verbs.add(
      "end", "End a tenant that holds nothing", "bulkhead tenant end vision",
      [&](CLI::App& sub) {
        sub.add_option("name", o->name, "Tenant")->required();
        common(sub, o);
      },
      speaking("tenant end", tenant_end));
  return verbs.run();
}

std::function<int(const Context&)> bind_quota(CLI::App& app) {
  Subverbs<Options> verbs(app);
  const auto o = verbs.options;
  verbs.add(
      "show", "What a tenant holds, and may hold at most",
      "bulkhead quota show           your own\nbulkhead quota show vision --json",
      [&](CLI::App& sub) {
        sub.add_option("tenant", o->name, "Tenant (default: your own)");
        common(sub, o);
      },
      speaking("quota show", quota_show));
  verbs.add(
      "set", "Set limits; what is not said stays",
      "bulkhead quota set vision leases=8 gpus=2 memory=320GiB\nbulkhead quota set vision gpu-hours=500    "
      "of a calendar month, UTC\n"
      "bulkhead quota set vision watts=none",
      [&](CLI::App& sub) {
        sub.add_option("tenant", o->name, "Tenant")->required();
        sub.add_option("limits", o->limits, limit_words)->required()->expected(1, 64);
        common(sub, o);
      },
      speaking("quota set", quota_set));
  return verbs.run();
}

std::function<int(const Context&)> bind_token(CLI::App& app) {
  Subverbs<Options> verbs(app);
  const auto o = verbs.options;
  std::vector<std::string> names;
  for (const auto role : access::roles()) names.emplace_back(access::name_of(role));
  const std::string roles = "Role: " + join(names, ", ");
  verbs.add(
      "create", "Make a token; its secret is shown once",
      "bulkhead token create --user alice --role tenant --tenant vision --ttl 30d\n"
      "bulkhead token create --user ops --role operator --quiet > token    the secret alone\n"
      "bulkhead token create --user ci --role tenant --tenant vision --certificate SHA256",
      [&](CLI::App& sub) {
        sub.add_option("--user", o->user, "Who it is for; named in the audit log")
            ->required()
            ->type_name("NAME");
        sub.add_option("--role", o->role, roles)->required()->type_name("ROLE");
        sub.add_option("--tenant", o->tenant, "Of which tenant")->type_name("TENANT");
        sub.add_option("--ttl", o->ttl, "Good for so long, like 12h or 30d (default: no end)")
            ->type_name("TIME");
        sub.add_option("--certificate", o->certificate, "SHA-256 of a client certificate; no secret is made")
            ->type_name("SHA256");
        sub.add_option("--note", o->note, "Your own words")->type_name("TEXT");
        sub.add_flag("-q,--quiet", o->quiet, "The secret alone");
        common(sub, o);
      },
      speaking("token create", token_create));
  verbs.add(
      "list", "Tokens, without their secrets", "bulkhead token list", [&](CLI::App& sub) { common(sub, o); },
      speaking("token list", token_list));
  verbs.add(
      "revoke", "End a token, at once", "bulkhead token revoke 0123456789abcdef",
      [&](CLI::App& sub) {
        sub.add_option("id", o->name, "Of token list")->required();
        common(sub, o);
      },
      speaking("token revoke", token_revoke));
  return verbs.run();
}

}  // namespace bulkhead::cli
