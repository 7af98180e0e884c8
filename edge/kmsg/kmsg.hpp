// The kernel's ring buffer: /dev/kmsg, record by record, with what was overwritten before it could be read.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "base/fd.hpp"

namespace bulkhead::kmsg {

class Reader {
 public:
  // `from_start`: what is in the buffer already; otherwise what comes from now on.
  static Result<Reader> open(const std::filesystem::path& path, bool from_start);

  struct Batch {
    std::string text = {};   // records, a line each: "3,1234,5678,-;message"
    std::uint64_t lost = 0;  // overwritten, by the sequence numbers
  };
  // What is there now, at most 4 MiB; never waits.
  Result<Batch> read();
  int fd() const { return fd_.get(); }
  // Of the newest record that was read.
  std::optional<std::uint64_t> sequence() const { return last_; }
  // Before the first read: records up to this one were read by an earlier reader of the same boot. They are
  // left out, and what is missing behind them counts as lost.
  void after(std::uint64_t sequence) { after_ = last_ = sequence; }

 private:
  UniqueFd fd_;
  bool device_ = true;  // a regular file (a pretend host's) is read as text
  std::string rest_;    // of a line that is not whole yet
  std::optional<std::uint64_t> last_, after_;
};

}  // namespace bulkhead::kmsg
