// Any method, path and problem document: match() finds a route of the table whose path, filled with the
// values it took, is the path given; problems are read or refused, never thrown about.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "api/v1/v1.hpp"

namespace {

std::string filled(std::string_view path, const std::map<std::string, std::string>& values) {
  std::string out;
  while (!path.empty()) {
    const auto open = path.find('{');
    out += path.substr(0, open);
    if (open == std::string_view::npos) break;
    const auto close = path.find('}', open);
    out += values.at(std::string(path.substr(open + 1, close - open - 1)));
    path.remove_prefix(close + 1);
  }
  return out;
}

std::string without_empty_pieces(std::string_view path) {
  std::string out;
  for (const char c : path)
    if (c != '/' || out.empty() || out.back() != '/') out += c;
  if (out.size() > 1 && out.back() == '/') out.pop_back();
  if (out.empty() || out.front() != '/') out.insert(out.begin(), '/');
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace bulkhead::api::v1;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto space = text.find(' ');
  if (space != std::string_view::npos && space < 16) {
    const auto method = text.substr(0, space), path = text.substr(space + 1);
    const Match found = match(method, path);
    if (found.route != nullptr) {
      if (found.route->method != method || !found.other_methods.empty()) std::abort();
      if (filled(found.route->path, found.values) != without_empty_pieces(path)) std::abort();
      for (const auto& [name, value] : found.values)
        if (value.empty() || value.find('/') != std::string::npos) std::abort();
    } else if (std::find(found.other_methods.begin(), found.other_methods.end(), method) !=
               found.other_methods.end()) {
      std::abort();
    }
  }
  const auto json = bulkhead::parse_json(text);
  if (!json.ok()) return 0;
  if (const auto problem = parse_problem(*json); problem.ok()) {
    const auto again = parse_problem(to_json(*problem));
    if (!again.ok() || again->status != problem->status || again->detail != problem->detail ||
        again->reasons != problem->reasons || again->ways != problem->ways || again->hint != problem->hint)
      std::abort();
  }
  return 0;
}
