// GET /api/v1/incidents, and what the streams say of them.
#include <algorithm>
#include <chrono>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/xid/xid.hpp"
#include "daemon/serve/app.hpp"
#include "daemon/serve/documents.hpp"
#include "daemon/serve/tidings.hpp"
#include "engine/incidents/incidents.hpp"

namespace bulkhead::serve {

using access::Whose;

namespace {

constexpr std::size_t most = 1'000;
constexpr std::size_t most_told = 64;  // in one beat; the others in the next

Json when(const std::optional<std::int64_t>& ms) {
  return ms ? Json(rfc3339(WallTime(std::chrono::milliseconds(*ms)))) : Json(nullptr);
}

// What a tenant may know: what it is and whether it is its own doing; nothing of others, no line of the log.
Json for_tenant(const incidents::Incident& one, const std::string& tenant,
                const std::vector<std::int64_t>& leases) {
  const auto& in = one.what;
  const bool charged = in.charged.starts_with(fmt::format("tenant {}, lease ", tenant));
  const bool others = !charged && !in.charged.empty();
  return Json{{"id", in.id},
              {"title", in.xid    ? fmt::format("Xid {}", *in.xid)
                        : in.sxid ? fmt::format("SXid {}", *in.sxid)
                                  : in.rule},
              {"cause", in.cause},
              {"severity", xid::name_of(in.severity)},
              {"xid", in.xid ? Json(*in.xid) : Json(nullptr)},
              {"blast", diagnose::name_of(in.blast)},
              {"blame", others ? diagnose::name_of(diagnose::Blame::innocent) : diagnose::name_of(in.blame)},
              {"charged", charged ? tenant : ""},
              {"open", one.open},
              {"leases", leases},
              {"count", in.tenants.size() > 1 ? Json(nullptr) : Json(in.count)},
              {"first", when(in.first_ms)},
              {"last", when(in.last_ms)}};
}

}  // namespace

void App::list_incidents(const Asked& asked, const Rule& rule, std::map<std::string, std::string>&) {
  const auto answer = [&](const Json& body) {
    asked->answer(http::Response{.type = "application/json", .body = compact(body)});
  };
  if (incidents_ == nullptr)
    return answer(Json{{"items", Json::array()},
                       {"notes", {"telemetry is off: nobody follows the kernel's log"}},
                       {"kernel", false},
                       {"driver", false}});
  std::size_t limit = most;
  if (const auto text = asked->request.asked("limit")) {
    const auto given = parse_u64(*text);
    if (!given || *given < 1 || *given > most)
      return asked->answer(problem(400, "invalid", "limit: must be a whole number from 1 to 1000"));
    limit = *given;
  }
  auto view = incidents_->view(wall_now());
  auto& all = view.incidents;
  const bool every = access::may(asked->caller.role, rule.verb, rule.resource, Whose::others);
  const auto& tenant = asked->caller.tenant;
  const auto now = control_.now();
  std::map<std::string, std::vector<std::int64_t>> concerned;  // leases of the tenant's own, by incident
  if (!every) {
    for (const auto& [id, lease] : now->leases) {
      if (tenant.empty() || lease->tenant != tenant) continue;
      for (const auto& one : all)
        if (incidents::concerns(one.what, *lease)) concerned[one.what.id].push_back(id);
    }
    std::erase_if(all, [&](const auto& one) { return !concerned.contains(one.what.id); });
  }
  auto from = all.begin();
  if (const auto text = asked->request.asked("after")) {
    const auto last = read_cursor("incidents", *text);
    from = last ? std::find_if(all.begin(), all.end(), [&](const auto& one) { return one.what.id == *last; })
                : all.end();
    if (from == all.end())
      return asked->answer(
          problem(400, "invalid", "after: is no `next` of a page of these", "begin without it"));
    ++from;
  }
  all.erase(all.begin(), from);
  const bool more = all.size() > limit;
  if (more) all.erase(all.begin() + static_cast<std::ptrdiff_t>(limit), all.end());
  Json body;
  if (every) {
    body = incidents::to_json(view);
  } else {
    Json items = Json::array();
    for (const auto& one : all) items.push_back(for_tenant(one, tenant, concerned[one.what.id]));
    body = Json{{"items", std::move(items)},
                {"notes", Json::array()},
                {"kernel", view.kernel},
                {"driver", view.driver}};
  }
  if (more) body["next"] = cursor("incidents", all.back().what.id);
  answer(body);
}

void Tidings::step(std::span<const diagnose::Incident> open, const control::Snapshot& leases) {
  const bool first = !before_;
  std::map<std::string, Tenants> now;
  std::size_t told = 0;
  for (const auto& one : open) {
    if (before_) {
      if (const auto known = before_->extract(one.id)) {
        now.emplace(one.id, known.mapped());
        continue;
      }
      if (told == most_told) continue;  // as if it opened a second later
    }
    Tenants tenants;
    for (const auto& [id, lease] : leases.leases)
      if (incidents::concerns(one, *lease)) tenants.insert(lease->tenant);
    if (!first) {
      say("open", one.id, tenants,
          Json{{"severity", xid::name_of(one.severity)}, {"title", printable(one.title, 200)}});
      ++told;
    }
    now.emplace(one.id, std::move(tenants));
  }
  if (before_)
    for (const auto& [id, tenants] : *before_) say("close", id, tenants, Json::object());
  before_ = std::move(now);
}

void Tidings::say(const char* verb, const std::string& id, const Tenants& tenants, const Json& body) {
  static const control::Caller daemon{
      .user = "bulkhead", .tenant = {}, .role = access::Role::admin, .from = "diagnosis"};
  if (tenants.empty()) return control_.note(daemon, verb, "incident/" + id, "", body);
  for (const auto& tenant : tenants) control_.note(daemon, verb, "incident/" + id, tenant, body);
}

}  // namespace bulkhead::serve
