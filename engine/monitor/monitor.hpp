// The Sampler in a process of its own, for programs that must not have the driver in theirs: a daemon that
// forks (a lock that a sampling thread holds inside the driver would stay locked in the child), and that must
// live when the driver crashes. The process is this program again, started by a hidden verb that calls
// serve(); requests and answers are frames on a socket pair. When it dies it is started again, later
// each time, and the snapshot says so. The history is kept here, and fetched every five seconds: that much is
// lost with it. It ends when this process does, however that ends.
//
// Whatever the other side sends is bounded and checked: a process with a broken driver in it may say
// anything.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.hpp"
#include "engine/sample/sample.hpp"

namespace bulkhead::monitor {

struct Program {  // that calls serve(3)
  std::filesystem::path file = "/proc/self/exe";
  std::vector<std::string> arguments = {"bulkhead", "monitor", "--fd", "3"};
  unsigned answer_ms = 1'000;    // for an answer; then the last one is told again
  unsigned deaf_ms = 15'000;     // without any answer: the process is killed and started again
  unsigned first_wait_ms = 250;  // before it is started again; doubles with each death
  unsigned longest_wait_ms = 30'000;
};

class Monitor {
 public:
  // Starts at once and waits for nothing.
  explicit Monitor(const sample::Settings& settings, const Program& program = {});
  ~Monitor();  // waits at most two seconds for the process to end
  Monitor(const Monitor&) = delete;
  Monitor& operator=(const Monitor&) = delete;

  // As Sampler's, from any thread. Waits for the process at most answer_ms, for a driver call never. While
  // there is no process, the GPUs are those last seen with their old values, state `lost`, and `why` says
  // what happened.
  sample::Snapshot snapshot() const;
  bool wait_ready(unsigned milliseconds) const;
  void hurry(unsigned gpu, sample::Tier tier);
  // Where a GPU hangs and does not let go in time, the process is killed: then the kernel lets go for it.
  // False: even that took longer than another second. Rests are counted: the last resume() ends them.
  bool rest(unsigned milliseconds);
  void resume();
  std::vector<history::Point> history(unsigned gpu, std::optional<unsigned> gpu_instance,
                                      sample::Signal signal, std::uint64_t from_s, std::uint64_t to_s,
                                      history::History::Grain grain) const;
  std::size_t history_bytes() const;

  int pid() const;                 // 0: there is none now
  std::uint64_t restarts() const;  // how often it had to be started again

 private:
  struct Inside;
  std::shared_ptr<Inside> inside_;
};

// The other side: answers on `fd` until it closes. Threads may hang in the driver even then, so the caller
// ends with _exit().
Status serve(int fd);

// What the frames carry. Errc::corrupt: cut short, too long, or out of bounds.
std::string encode(const sample::Snapshot& snapshot);
Result<sample::Snapshot> decode_snapshot(std::string_view bytes);

}  // namespace bulkhead::monitor
