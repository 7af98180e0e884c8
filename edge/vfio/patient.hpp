// Reading files of sysfs that wait for a device's lock: driver_override does, and while an unbind of the
// device hangs, so would we, and could not be killed.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.hpp"

namespace bulkhead::vfio {

struct Patient {
  std::optional<std::string> text = {};  // its first 255 bytes; missing: it cannot be read
  bool waits = false;                    // it did not answer in time
};
// Each file, in order, read by a process that is left behind where one does not answer within `wait_ms`.
std::vector<Patient> read_patiently(const std::vector<std::string>& files, unsigned wait_ms);

// Whether a device answers, as its config space says. All ones once may be a reset at that moment; twice is
// dead.
enum class Answers { yes, all_ones, waits };
Answers answers(const std::filesystem::path& root, const PciAddress& address, unsigned wait_ms);
bool all_ones(std::string_view config);

}  // namespace bulkhead::vfio
