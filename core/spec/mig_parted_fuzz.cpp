// Any bytes: the import answers, never throws; each node file it makes parses to itself.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "core/spec/spec.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace bulkhead::spec;
  const auto answer = import_mig_parted({reinterpret_cast<const char*>(data), size});
  if (const auto* mistakes = std::get_if<std::vector<Mistake>>(&answer)) {
    if (mistakes->empty() || render(*mistakes, "f").empty()) std::abort();
    return 0;
  }
  for (const auto& imported : std::get<std::vector<Imported>>(answer)) {
    const std::string written = to_yaml(imported.node);
    const auto again = parse(written);
    if (!std::holds_alternative<NodeFile>(again) || to_yaml(std::get<NodeFile>(again)) != written)
      std::abort();
  }
  return 0;
}
