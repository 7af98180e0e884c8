// The JSON type of every printed document. Ordered: keys come out as they were put in.
#pragma once

#include <nlohmann/json.hpp>

#include "base/reading.hpp"
#include "base/result.hpp"

namespace bulkhead {

using Json = nlohmann::ordered_json;

// Parses text from outside; at most `depth` nested containers.
Result<Json> parse_json(std::string_view text, std::size_t depth = 64);

// Dumps with two spaces of indentation; bytes that are no UTF-8 are replaced, never thrown about.
std::string dump(const Json& value);

// {"value": v} or {"why": "..."}: how a Reading of a plain value prints.
template <class T>
Json to_json(const Reading<T>& reading) {
  if (reading) return Json(*reading);
  return Json{{"unavailable", reading.why}};
}

}  // namespace bulkhead
