// `twin compare`: the same questions to a real library, or to its recorded answers, and to a twin.
#include <cstdlib>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "twin/control/control.hpp"

namespace bulkhead::twin {

Result<Comparison> compare_with_real(const CompareOptions& options) {
  Json real;
  if (!options.recording.empty()) {
    BH_TRY(const auto text, read_file(options.recording));
    BH_TRY(real, parse_json(text));
  } else {
    auto answers = ask_nvml(options.real, {}, options.gpu);
    if (!answers.ok()) {
      return std::move(answers)
          .error()
          .in("ask the real library")
          .with_hint("compare with a recording instead: --recording FILE");
    }
    real = *std::move(answers);
  }
  std::string pattern = (std::filesystem::temp_directory_path() / "bulkhead-compare-XXXXXX").string();
  if (::mkdtemp(pattern.data()) == nullptr) return errno_error("make a temporary directory", errno);
  const std::filesystem::path directory = pattern;
  auto made =
      up({.profile = options.profile, .directory = directory, .library = options.library, .init = false});
  if (!made.ok()) {
    std::error_code ignored;
    std::filesystem::remove_all(directory, ignored);
    return std::move(made).error();
  }
  auto answers = ask_nvml(directory / "lib/libnvidia-ml.so.1", directory, 0);
  BH_CHECK(down(directory));
  if (!answers.ok()) return std::move(answers).error().in("ask the twin");
  Comparison out;
  out.asked = count_questions(*answers);
  out.differences = compare(real, *answers);
  return out;
}

}  // namespace bulkhead::twin
