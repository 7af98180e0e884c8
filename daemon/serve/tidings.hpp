// Which incidents opened and closed, said on the streams of those whom they concern.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>

#include "engine/incidents/incidents.hpp"

namespace bulkhead::serve {

class Tidings {
 public:
  explicit Tidings(control::Control& control) : control_(control) {}

  // Once a second, with all that are open. A line "incident/ID" of the log of decisions for each tenant whom
  // one concerns, and one of no tenant (operators see all) where it concerns none: verbs open and close. What
  // was open when the first call came is not told of: it was then, or is in GET /incidents.
  void step(std::span<const diagnose::Incident> open, const control::Snapshot& leases);

 private:
  using Tenants = std::set<std::string>;
  void say(const char* verb, const std::string& id, const Tenants& tenants, const Json& body);

  control::Control& control_;
  std::optional<std::map<std::string, Tenants>> before_ = {};  // by id
};

}  // namespace bulkhead::serve
