// Somebody outside changes a GPU in a way that the driver allows only while nobody has it open (a MIG mode, a
// driver's binding): the sampler, and everything else of this daemon that asks the driver, rests meanwhile.
// NVML lets go of all GPUs or of none, so all of them rest; values stay, with their age.
//
// A rest has a name and a deadline, and is renewed by asking again. Who asked and died is forgotten at the
// deadline: nobody can leave the GPUs unwatched for good by being killed.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/result.hpp"
#include "daemon/serve/log.hpp"
#include "engine/control/control.hpp"

namespace bulkhead::serve {

class Rest {
 public:
  static constexpr std::chrono::seconds longest{120};  // until it has to be renewed
  static constexpr std::size_t most = 16, most_name = 64;

  // `let_go`: everybody here who is in the driver leaves it (true), or comes back; false: not all have left.
  using LetGo = std::function<bool(bool away)>;
  Rest(LetGo let_go, control::Control& control, Log& log);
  ~Rest() { end(); }
  Rest(const Rest&) = delete;
  Rest& operator=(const Rest&) = delete;
  void end();  // of all rests; before the control ends

  // Begins it, or renews it. `then` is called on this module's thread as soon as nobody here is in the
  // driver; with an Error where somebody does not let go, or the time was over before. Errc::no_capacity: too
  // many.
  using Then = std::function<void(const Status&)>;
  Status hold(const std::string& name, std::chrono::seconds time, Then then);
  bool release(const std::string& name);  // false: there is none
  std::size_t held() const;
  bool fresh(const std::string& name) const;  // there is none of that name yet

 private:
  void serve();
  void rest();
  std::uint64_t forget();  // those whose time is over; when the last one's is. Under the lock.

  const LetGo let_go_;
  control::Control& control_;
  Log& log_;
  mutable std::mutex mutex_ = {};
  std::condition_variable wake_ = {};
  struct Held {
    std::uint64_t until = 0;  // monotonic
    std::vector<Then> asked = {};
  };
  std::map<std::string, Held> held_ = {};
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace bulkhead::serve
