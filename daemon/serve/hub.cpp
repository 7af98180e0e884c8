#include "daemon/serve/hub.hpp"

#include <algorithm>
#include <map>
#include <span>

#include <fmt/format.h>

#include "daemon/serve/documents.hpp"

namespace bulkhead::serve {

namespace {
constexpr std::size_t batches_waiting = 4096, catching_up = 4096;
constexpr std::size_t lines_a_read = 1000, reads_a_turn = 8;
constexpr std::size_t frame_bytes = 16 << 10;  // about, of several events in one
constexpr std::size_t bytes_a_turn = 1 << 20;
constexpr std::size_t events_a_frame = 32;

void add(std::string& out, const control::Event& event) {
  out += fmt::format("id: {}\ndata: ", event.id);
  out += compact(event_document(event));
  out += "\n\n";
}

std::string key_of(const Sight& sight) {
  return fmt::format("{}{}{} {}", sight.all ? 'a' : '-', sight.tokens ? 't' : '-', sight.lease,
                     sight.all ? std::string_view() : std::string_view(sight.tenant));
}
}  // namespace

bool sees(const Sight& sight, const control::Event& event) {
  if (event.outcome != "done" || event.kind == "access") return false;
  if (!sight.all && (sight.tenant.empty() || event.tenant != sight.tenant)) return false;
  if (!sight.tokens && event.kind == "token") return false;
  return sight.lease == 0 || event.what == fmt::format("lease/{}", sight.lease);
}

Hub::Hub(std::int64_t last_event,
         std::function<Result<std::vector<control::Event>>(std::int64_t, std::size_t)> read,
         std::function<bool(const Watcher&)> valid)
    : read_(std::move(read)),
      valid_(std::move(valid)),
      last_(last_event),
      fan_(batches_waiting),
      reader_(catching_up) {}

Hub::~Hub() { end(); }

void Hub::end() {
  reader_.end();
  fan_.end();
  const std::lock_guard hold(mutex_);
  for (const auto& [caller, watchers] : of_)
    for (const auto& watcher : watchers) watcher->stream->close();
  of_.clear();
  live_.clear();
  resting_.clear();
  count_ = 0;
}

void Hub::tell(const std::vector<control::Event>& events) {
  if (events.empty()) return;
  {
    const std::lock_guard hold(mutex_);
    last_ = events.back().id;
    told_ += events.size();
    if (live_.empty()) return;
  }
  if (!fan_.put([this, events] { fan(events); })) {
    const std::lock_guard hold(mutex_);
    lost_ = true;
  }
}

void Hub::fan(const std::vector<control::Event>& events) {
  Watchers watchers;
  bool lost = false;
  {
    const std::lock_guard hold(mutex_);
    watchers = live_;
    lost = std::exchange(lost_, false);
  }
  if (lost) {  // they come back with the last id they have
    for (const auto& watcher : watchers) watcher->stream->close();
    return forget(watchers);
  }
  if (std::any_of(events.begin(), events.end(), [](const auto& event) { return event.kind == "token"; })) {
    recheck();
    const std::lock_guard hold(mutex_);
    watchers = live_;
  }
  Watchers gone;
  for (std::size_t from = 0; from < events.size(); from += events_a_frame) {
    const auto some = std::span(events).subspan(from, std::min(events_a_frame, events.size() - from));
    std::map<std::string, std::shared_ptr<const std::string>> frames;
    std::map<std::int64_t, std::string> encoded;  // each event once, whoever sees it
    for (const auto& watcher : watchers) {
      if (watcher->after >= some.back().id) continue;
      const auto text = [&] {
        std::string out;
        for (const auto& event : some) {
          if (event.id <= watcher->after || !sees(watcher->sight, event)) continue;
          auto& one = encoded[event.id];
          if (one.empty()) add(one, event);
          out += one;
        }
        return out;
      };
      std::shared_ptr<const std::string> frame;
      if (watcher->after >= some.front().id) {  // joined in the middle of this batch
        frame = std::make_shared<const std::string>(text());
      } else {
        auto& shared = frames[key_of(watcher->sight)];
        if (!shared) shared = std::make_shared<const std::string>(text());
        frame = shared;
      }
      watcher->after = some.back().id;
      if (!frame->empty() && !watcher->stream->send(frame)) gone.push_back(watcher);
    }
  }
  if (!gone.empty()) forget(gone);
}

void Hub::recheck() {
  Watchers watchers;
  {
    const std::lock_guard hold(mutex_);
    for (const auto& [caller, some] : of_) watchers.insert(watchers.end(), some.begin(), some.end());
  }
  Watchers gone;
  for (const auto& watcher : watchers) {
    if (valid_(*watcher)) continue;
    watcher->stream->close();
    gone.push_back(watcher);
  }
  if (!gone.empty()) forget(gone);
}

void Hub::forget(const Watchers& gone) {
  const std::lock_guard hold(mutex_);
  for (const auto& watcher : gone) {
    const auto drop = [&](Watchers& from) {
      const auto at = std::find(from.begin(), from.end(), watcher);
      if (at == from.end()) return false;
      *at = from.back();
      from.pop_back();
      return true;
    };
    drop(live_);
    const auto of = of_.find(watcher->caller);
    if (of == of_.end()) continue;
    if (drop(of->second)) --count_;
    if (of->second.empty()) of_.erase(of);
  }
}

bool Hub::room(const std::string& caller, std::size_t most) {
  Watchers mine;
  {
    const std::lock_guard hold(mutex_);
    const auto at = of_.find(caller);
    if (at == of_.end() || at->second.size() < most) return most > 0;
    mine = at->second;
  }
  const auto probe = std::make_shared<const std::string>(":\n\n");
  Watchers gone;
  for (const auto& watcher : mine)
    if (!watcher->stream->send(probe)) gone.push_back(watcher);
  forget(gone);
  return mine.size() - gone.size() < most;
}

bool Hub::open(std::shared_ptr<Watcher> watcher, std::optional<std::int64_t> last_id) {
  std::int64_t at = 0;
  {
    const std::lock_guard hold(mutex_);
    of_[watcher->caller].push_back(watcher);
    ++count_;
    at = std::min(last_id.value_or(last_), last_);
    if (at == last_) {
      watcher->after = at;
      live_.push_back(std::move(watcher));
      return true;
    }
  }
  if (reader_.put([this, watcher, at] { catch_up(watcher, at); })) return true;
  forget({watcher});
  return false;
}

void Hub::catch_up(const std::shared_ptr<Watcher>& watcher, std::int64_t at) {
  const auto over = [&] {
    watcher->stream->close();
    forget({watcher});
  };
  std::size_t bytes = 0;
  std::string frame;
  for (std::size_t reads = 0; reads < reads_a_turn && bytes < bytes_a_turn; ++reads) {
    {
      const std::lock_guard hold(mutex_);
      if (at >= last_) {
        watcher->after = at;
        live_.push_back(watcher);
        return;
      }
    }
    const auto events = read_(at, lines_a_read);
    if (!events.ok() || events->empty()) return over();
    if (!valid_(*watcher)) return over();
    for (const auto& event : *events) {
      if (sees(watcher->sight, event)) add(frame, event);
      if (frame.size() < frame_bytes && &event != &events->back()) continue;
      bytes += frame.size();
      if (!frame.empty() && !watcher->stream->send(std::make_shared<const std::string>(std::move(frame))))
        return over();
      frame.clear();
    }
    at = events->back().id;
  }
  // The next who waits; and the reader at the other end has time to take what it got.
  const std::lock_guard hold(mutex_);
  resting_.emplace_back(watcher, at);
}

void Hub::turn() {
  std::vector<std::pair<std::shared_ptr<Watcher>, std::int64_t>> rested;
  bool any = false;
  {
    const std::lock_guard hold(mutex_);
    rested.swap(resting_);
    any = count_ > 0;
  }
  for (auto& [watcher, at] : rested) {
    if (reader_.put([this, one = watcher, from = at] { catch_up(one, from); })) continue;
    watcher->stream->close();
    forget({watcher});
  }
  if (any) (void)fan_.put([this] { recheck(); });
}

std::size_t Hub::open() const {
  const std::lock_guard hold(mutex_);
  return count_;
}
std::uint64_t Hub::told() const {
  const std::lock_guard hold(mutex_);
  return told_;
}

}  // namespace bulkhead::serve
