// The driver's events of errors (XIDs), followed by a process of its own: a driver that hangs or crashes
// takes that process, never the one that asks.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "base/ids.hpp"
#include "base/result.hpp"

namespace bulkhead::events {

struct ErrorEvent {
  PciAddress gpu = {};
  std::uint64_t xid = 0;
  std::optional<unsigned> gpu_instance = {}, compute_instance = {};
  std::int64_t wall_ms = 0;  // when the driver handed it over
};

class Watch {
 public:
  // Forks the follower; call it before there are threads. Whether the driver has events is said by read().
  static Result<Watch> start(const std::string& library);
  // The same by a program that is started anew, which a process with threads may do at any time: PROGRAM
  // VERB --fd 3 --library LIBRARY must call follow(3, LIBRARY).
  static Result<Watch> spawn(const std::string& program, const std::string& verb, const std::string& library);
  ~Watch();
  Watch(Watch&& other) noexcept;
  Watch& operator=(Watch&&) = delete;

  struct Batch {
    std::vector<ErrorEvent> events = {};
    std::vector<std::string> said = {};  // troubles of the driver's, in words
    bool ready = false;                  // in this batch: GPUs are registered from here on
  };
  // What has come; never waits. A follower that ended or is silent for ten seconds is said once.
  Batch read();
  int fd() const { return pipe_.get(); }
  unsigned gpus() const { return gpus_; }  // whose events come

 private:
  Watch() = default;
  UniqueFd pipe_;
  int child_ = -1;
  unsigned gpus_ = 0;
  std::uint64_t heard_ns_ = 0;
  bool silent_ = false;
};

// What the follower does until nobody reads any more; its exit code.
int follow(int out, const std::string& library);

}  // namespace bulkhead::events
