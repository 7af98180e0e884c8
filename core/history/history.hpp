// What a GPU's sensors said, kept small: each second of the last hour and each minute of thirty days, within
// a hard bound of memory. A second is the mean of what came in it; a minute keeps the mean of its seconds and
// the worst of them. What was not heard is a gap, never a zero. Pure: time is an argument, in seconds that
// only rise (since boot), so that a clock that is set does not tear the past.
//
// Values are rounded to each series' step and coded in blocks of 60: the difference to the value before, or
// to the block's middle, whichever is shorter, in Rice codes whose parameter is chosen block by block. Noise
// of s steps takes about log2(s) + 2 bits, a value that stands still takes none. When noise wins, the oldest
// minutes of all series go first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace bulkhead::history {

inline constexpr unsigned block_points = 60;
inline constexpr std::size_t page_bytes = 1024;

struct Settings {
  std::size_t most_bytes = 64U << 20U;  // of everything that is kept
  std::uint64_t seconds_kept = 3600;    // whole blocks: a minute more
  std::uint64_t minutes_kept = 30 * 1440;
  std::size_t most_series = 4096;
};

enum class Worst : std::uint8_t { high, low };  // which end of a minute is kept beside its mean

struct Kind {
  double step = 1;  // values are kept to half of it; beyond two thousand million steps they are cut
  Worst worst = Worst::high;
};

struct Point {
  std::uint64_t at_s = 0;  // when its second or minute began
  double mean = 0, worst = 0;
};

// What came in an open second: mean and count, so that ten samples weigh like one.
struct Pending {
  std::uint64_t bucket = 0;
  double sum = 0, worst = 0;
  unsigned count = 0;
};

// Points of one kind, one after the other: an open block, and pages of coded ones.
class Stream {
 public:
  // At bucket `at`, which must be after the last one; others are dropped.
  void add(std::uint64_t at, std::int32_t value);
  // Calls put(bucket, value) for every point in [from, to).
  template <class Put>
  void each(std::uint64_t from, std::uint64_t to, Put put) const;
  void forget_before(std::uint64_t at);         // whole pages only
  std::optional<std::uint64_t> oldest() const;  // bucket; of pages, not of the open block
  std::size_t drop_oldest_page();               // bytes it gave back
  std::size_t bytes() const { return pages_.size() * (sizeof(Page) + sizeof(void*)); }

 private:
  struct Page {
    std::uint64_t first = 0, last = 0;  // block numbers
    std::uint32_t used = 0;
    std::uint8_t data[page_bytes] = {};
  };
  void close();
  std::deque<std::unique_ptr<Page>> pages_ = {};
  std::uint64_t block_ = 0;  // number of the open one: bucket / block_points
  std::uint64_t present_ = 0;
  std::int32_t open_[block_points] = {};
  std::optional<std::uint64_t> last_ = {};
};

class History {
 public:
  explicit History(Settings settings = {}) : settings_(settings) {}

  // A new series; empty: there are `most_series` already.
  std::optional<std::size_t> open(Kind kind);
  // Ends a series and gives its memory back: a slice that is no more. Its number is used again.
  void close(std::size_t series);

  // A sample of `series` at `now_s` seconds. Not a number, or older than what is there: counts for nothing.
  void add(std::size_t series, double now_s, double value);

  enum class Grain { second, minute };
  // Points that began in [from_s, to_s), oldest first. The second, or minute, under way is not among them.
  std::vector<Point> query(std::size_t series, std::uint64_t from_s, std::uint64_t to_s, Grain grain) const;

  std::size_t bytes() const;  // what is held, pages and open blocks
  // The oldest minute that is still there, over all series.
  std::optional<std::uint64_t> oldest_s() const;

 private:
  struct Series {
    Kind kind = {};
    bool used = false;
    Pending second = {}, minute = {};
    Stream seconds = {}, means = {}, worsts = {};
  };
  void settle(Series& series, std::uint64_t second);
  void make_room();
  Settings settings_;
  std::vector<std::unique_ptr<Series>> all_ = {};
  std::uint64_t room_checked_s_ = 0;
};

}  // namespace bulkhead::history
