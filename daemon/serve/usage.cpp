// GET /api/v1/usage: who used what. A tenant reads of its own; who may read everybody's leases, of all.
#include "base/clock.hpp"
#include "daemon/serve/app.hpp"
#include "daemon/serve/documents.hpp"
#include "engine/meter/meter.hpp"

namespace bulkhead::serve {

using access::Whose;

namespace {

// The first moment of this month, in UTC.
WallTime month_of(WallTime now) {
  const std::chrono::year_month_day date{std::chrono::floor<std::chrono::days>(now)};
  return std::chrono::time_point_cast<std::chrono::milliseconds>(
      std::chrono::sys_days(date.year() / date.month() / 1));
}

}  // namespace

void App::get_usage(const Asked& asked, const Rule& rule, std::map<std::string, std::string>&) {
  const auto& request = asked->request;
  const auto no = [&](const Error& error) {
    asked->answer(problem(400, "invalid", error.message(), error.hint()));
  };
  meter::Ask ask{.from = month_of(wall_now()), .to = wall_now()};
  if (const auto text = request.asked("from")) {
    const auto moment = meter::parse_moment(*text);
    if (!moment.ok()) return no(Error(moment.error()).in("from"));
    ask.from = moment->at;
    ask.offset = moment->offset;
  }
  if (const auto text = request.asked("to")) {
    const auto moment = meter::parse_moment(*text);
    if (!moment.ok()) return no(Error(moment.error()).in("to"));
    ask.to = moment->at;
  }
  if (const auto text = request.asked("by")) {
    if (const auto good = meter::parse_by(*text, ask); !good.ok()) return no(good.error());
  }
  if (const auto text = request.asked("tenant"); text && !text->empty()) ask.tenant = std::string(*text);
  if (!access::may(asked->caller.role, rule.verb, rule.resource, Whose::others)) {
    // Its own is all there is, as far as it may know.
    const auto& own = asked->caller.tenant;
    if (ask.tenant && *ask.tenant != own)
      return asked->answer(
          problem(404, "not-found", "there is no such tenant, or none that you may know of"));
    ask.tenant = own;
    ask.by_gpu = false;  // who is beside it on which GPU is not its to know
  }
  later(asked, reads_, [this, asked, ask] {
    const auto report = meter::report(state_, ask);
    if (report.ok()) {
      http::Response out{.status = 200, .type = "application/json", .body = compact(*report)};
      out.headers.emplace_back("Cache-Control", "no-store");
      return asked->answer(std::move(out));
    }
    const auto& error = report.error();
    switch (error.code()) {
      case Errc::invalid:
      case Errc::no_capacity:
        return asked->answer(problem(400, "invalid", error.message(), error.hint()));
      case Errc::not_found:
        return asked->answer(
            problem(503, "unavailable", "nothing has been counted yet", "try again in a moment"));
      default:
        log_.say(Log::Level::warning, "usage: " + error.message());
        return asked->answer(problem(503, "unavailable", "the accounts cannot be read now"));
    }
  });
}

}  // namespace bulkhead::serve
