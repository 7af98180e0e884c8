// Read-only questions to an NVML library, the real one or the twin's: one table of them, answers as JSON in
// the shape of the recordings that the profiles were made from. Asked in a child process, since two NVML
// libraries do not live well in one, and a hung driver must not hang us.
#pragma once

#include <chrono>
#include <filesystem>
#include <string>
#include <vector>

#include "base/json.hpp"
#include "base/result.hpp"

namespace bulkhead::twin {

// An NVML error is an answer: {"error": "Not Supported", "code": 3}; a function the library lacks has
// code 13. `twin`: the directory of the twin that the library belongs to; empty for a real one.
Result<Json> ask_nvml(const std::filesystem::path& library, const std::filesystem::path& twin,
                      unsigned gpu = 0, std::chrono::milliseconds limit = std::chrono::seconds(30));

// How two answers differ: `live` moves by itself (power, temperature, counters), `identity` belongs to one
// board (UUID, serial, bus), `differs` wants an explanation.
enum class DifferenceKind { live, identity, differs };

struct Difference {
  std::string question = {};  // "nvmlDeviceGetName", "fields.193", "gpu_instance_profiles[2].memorySizeMB"
  std::string real = {}, twin = {};  // as JSON; empty where one side was not asked
  DifferenceKind kind = DifferenceKind::differs;
};

// Compares what both were asked. Questions that only the recording has (latencies, files) are left out.
std::vector<Difference> compare(const Json& real, const Json& twin);

// How many questions `answers` holds, an entry of fields, gpm and the like counting as one.
std::size_t count_questions(const Json& answers);

}  // namespace bulkhead::twin
