#include "twin/nvml/library.hpp"

namespace bulkhead::twin::nvml {

int check_unsupported(const char* function, std::string_view shape, void* const* arguments);

int check_unsupported(const char* function, std::string_view shape, void* const* arguments) {
  bool ok = true;
  for (std::size_t i = 0; i < shape.size() && i < 6; ++i)
    ok = ok && (shape[i] != 'p' || arguments[i] != nullptr);
  const auto no = [](const Device&) { return NVML_ERROR_NOT_SUPPORTED; };
  if (shape.starts_with('d')) return ask(function, static_cast<nvmlDevice_t>(arguments[0]), ok, no);
  if (shape.starts_with('i')) return ask_instance(function, arguments[0], ok, no);
  return ask_host(function, ok, [](const State&) { return NVML_ERROR_NOT_SUPPORTED; });
}

}  // namespace bulkhead::twin::nvml
