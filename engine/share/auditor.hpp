// Asks NVML, on a thread of its own, what the ledger cannot know: a driver call that hangs must not hold up a
// tenant.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

namespace bulkhead::share {

class Auditor {
 public:
  explicit Auditor(std::string nvml_library);
  ~Auditor();

  struct Seen {
    std::map<std::uint32_t, std::map<int, std::uint64_t>> bytes;  // GPU index -> pid -> device memory
    bool with_busy = false;  // `busy` was asked for, and the driver can say
    std::map<int, double>
        busy;             // pid -> mean share of a GPU's time over the samples since the last look, 0..1
    std::string trouble;  // why there is nothing
  };
  // Wakes the thread, at most one look at a time. Results are signalled on fd().
  void look(bool with_busy);
  int fd() const;
  std::optional<Seen> take();

 private:
  // Shared with the thread, which may be inside a driver call that never returns when the auditor goes.
  struct Inside;
  static void work(const std::shared_ptr<Inside>& inside);
  std::shared_ptr<Inside> inside_;
};

}  // namespace bulkhead::share
