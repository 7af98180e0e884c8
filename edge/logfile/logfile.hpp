// A log file of the host's, followed over rotation and truncation. Only a file that root alone (or whoever
// runs this) may write is read: what it says is acted upon.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "base/fd.hpp"
#include "base/result.hpp"

namespace bulkhead::logfile {

struct Place {  // how far a file is read
  std::uint64_t device = 0, inode = 0, offset = 0;
  bool operator==(const Place&) const = default;
};

class Tail {
 public:
  // Goes on behind `place` where that is still the file, at its beginning where another took its name
  // meanwhile, at its end where `place` is empty: what is older was nobody's to hear. A file that is not
  // there yet is read from its beginning when it comes.
  Tail(std::filesystem::path path, const Place& place);

  // Whole lines that are there now, 1 MiB at most; never waits. `not_found`: no such file now.
  // `permission`: others than root may write it. A line that has no end within 1 MiB is left out.
  Result<std::string> read();
  const Place& place() const { return place_; }

 private:
  Status open();

  std::filesystem::path path_;
  UniqueFd fd_ = {};
  Place place_ = {};
  bool from_end_ = false;
  bool skipping_ = false;  // the rest of a line that is too long
};

}  // namespace bulkhead::logfile
