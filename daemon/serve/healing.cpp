// GET /api/v1/healing: what would be done about faults, what was, and what waits for a person.
#include "daemon/serve/app.hpp"
#include "daemon/serve/documents.hpp"

namespace bulkhead::serve {

void App::get_healing(const Asked& asked, const Rule&, std::map<std::string, std::string>&) {
  Json body{{"mode", "off"},
            {"trouble", "telemetry is off: nobody looks for faults"},
            {"open", Json::array()},
            {"acts", Json::array()}};
  if (healer_ != nullptr) body = heal::to_json(healer_->view());
  asked->answer(http::Response{.type = "application/json", .body = compact(body)});
}

}  // namespace bulkhead::serve
