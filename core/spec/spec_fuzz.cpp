// Any bytes: parse answers, never throws; what it accepts is written and parses to the same text again.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "core/spec/spec.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace bulkhead::spec;
  const auto parsed = parse({reinterpret_cast<const char*>(data), size});
  if (const auto* mistakes = std::get_if<std::vector<Mistake>>(&parsed)) {
    if (mistakes->empty() || mistakes->size() > 101 || render(*mistakes, "f").empty()) std::abort();
    return 0;
  }
  const std::string written = to_yaml(std::get<NodeFile>(parsed));
  const auto again = parse(written);
  if (!std::holds_alternative<NodeFile>(again) || to_yaml(std::get<NodeFile>(again)) != written) std::abort();
  return 0;
}
