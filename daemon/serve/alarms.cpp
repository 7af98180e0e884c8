// GET /api/v1/alarms: what is wrong, what was, what is done about it.
#include <algorithm>

#include "daemon/serve/app.hpp"
#include "daemon/serve/documents.hpp"

namespace bulkhead::serve {

using access::Whose;

void App::list_alarms(const Asked& asked, const Rule& rule, std::map<std::string, std::string>&) {
  const auto answer = [&](const Json& body) {
    asked->answer(http::Response{.type = "application/json", .body = compact(body)});
  };
  if (guardian_ == nullptr)
    return answer(Json{{"mode", "off"},
                       {"trouble", "telemetry is off: nothing is watched"},
                       {"open", Json::array()},
                       {"recent", Json::array()},
                       {"measures", Json::array()}});
  auto view = guardian_->view();
  if (access::may(asked->caller.role, rule.verb, rule.resource, Whose::others))
    return answer(protect::to_json(view));
  // A tenant: what touches its leases, without a word of others'.
  const auto& tenant = asked->caller.tenant;
  const auto now = control_.now();
  for (auto* alarms : {&view.open, &view.recent}) {
    std::erase_if(*alarms, [&](const protect::Alarm& alarm) {
      return tenant.empty() ||
             std::find(alarm.tenants.begin(), alarm.tenants.end(), tenant) == alarm.tenants.end();
    });
    for (auto& alarm : *alarms) {
      alarm.tenants = {tenant};
      std::erase_if(alarm.leases, [&](std::int64_t id) {
        const auto at = now->leases.find(id);
        return at == now->leases.end() || at->second->tenant != tenant;
      });
    }
  }
  view.measures.clear();
  view.trouble.clear();
  answer(protect::to_json(view));
}

}  // namespace bulkhead::serve
