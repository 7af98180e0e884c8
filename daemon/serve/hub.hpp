// Watch streams. The loop hands its events over and goes on; a thread of the hub encodes each once and gives
// the same bytes to all who see the same. Who comes back with a last id is first read forward through the
// audit log, by another thread, and joins the others where it has caught up.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "daemon/http/http.hpp"
#include "daemon/serve/threads.hpp"
#include "engine/control/control.hpp"

namespace bulkhead::serve {

// What somebody may see of what happens.
struct Sight {
  bool all = false;     // things of everybody; else of `tenant` alone
  bool tokens = false;  // tokens too
  std::string tenant = {};
  std::int64_t lease = 0;  // of this lease alone; 0: of all
};
bool sees(const Sight& sight, const control::Event& event);

struct Watcher {
  std::shared_ptr<http::Stream> stream = {};
  Sight sight = {};
  std::string caller = {};                    // whom limits count by
  std::string bearer = {}, certificate = {};  // asked again when tokens change
  std::int64_t after = 0;                     // the last event it has
};

class Hub {
 public:
  // `valid`: whether who opened the stream still is who they were. Both are called on the hub's threads.
  Hub(std::int64_t last_event,
      std::function<Result<std::vector<control::Event>>(std::int64_t after, std::size_t most)> read,
      std::function<bool(const Watcher&)> valid);
  ~Hub();  // closes what is open
  Hub(const Hub&) = delete;
  Hub& operator=(const Hub&) = delete;

  void tell(const std::vector<control::Event>& events);  // on the loop's thread: does not block
  // Whether the caller may open another; ends of which nobody has heard are found first.
  bool room(const std::string& caller, std::size_t most);
  // False: too many are catching up.
  bool open(std::shared_ptr<Watcher> watcher, std::optional<std::int64_t> last_id);
  // Now and then: asks again who is still valid, and goes on with those that catch up.
  void turn();
  std::size_t open() const;
  std::uint64_t told() const;  // events
  void end();

 private:
  using Watchers = std::vector<std::shared_ptr<Watcher>>;
  void fan(const std::vector<control::Event>& events);
  void catch_up(const std::shared_ptr<Watcher>& watcher, std::int64_t at);
  void recheck();
  void forget(const Watchers& gone);

  const std::function<Result<std::vector<control::Event>>(std::int64_t, std::size_t)> read_;
  const std::function<bool(const Watcher&)> valid_;
  mutable std::mutex mutex_ = {};
  Watchers live_ = {};
  std::unordered_map<std::string, Watchers> of_ = {};  // by caller, those that catch up as well
  std::vector<std::pair<std::shared_ptr<Watcher>, std::int64_t>> resting_ = {};
  std::int64_t last_ = 0;  // told
  std::uint64_t told_ = 0;
  std::size_t count_ = 0;
  bool lost_ = false;  // events that the hub had no room for
  Worker fan_, reader_;
};

}  // namespace bulkhead::serve
