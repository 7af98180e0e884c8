// The files of twin/profiles as the build embedded them (cmake/embed_profiles.cmake).
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace bulkhead::twin {

struct EmbeddedFile {
  std::string_view name;  // "dgx-h100.yaml", "chips/h100-sxm-80gb.yaml"
  std::string content;
};
const std::vector<EmbeddedFile>& embedded_files();

}  // namespace bulkhead::twin
