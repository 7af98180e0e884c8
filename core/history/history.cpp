#include "core/history/history.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace bulkhead::history {

namespace {

// A quotient of so many ones is followed by the whole word: one wild value costs 60 bits, not thousands.
constexpr unsigned escape = 24;
constexpr unsigned word_bits = 33;  // a difference of two 32 bit values, zigzagged
constexpr unsigned most_rice = 30;
// What a block can take at worst: 60 escapes of 57 bits, and its head.
constexpr std::size_t head_bytes = 24;
constexpr std::size_t worst_block = head_bytes + (block_points * (escape + word_bits) + 7) / 8;
static_assert(worst_block <= page_bytes);

std::uint64_t zigzag(std::int64_t value) {
  return (static_cast<std::uint64_t>(value) << 1U) ^ static_cast<std::uint64_t>(value >> 63U);
}
std::int64_t unzigzag(std::uint64_t code) {
  return static_cast<std::int64_t>(code >> 1U) ^ -static_cast<std::int64_t>(code & 1U);
}

class BitWriter {
 public:
  explicit BitWriter(std::uint8_t* out) : out_(out) {}
  void put(std::uint64_t bits, unsigned count) {  // count <= 33
    held_ |= bits << filled_;
    filled_ += count;
    while (filled_ >= 8) {
      *out_++ = static_cast<std::uint8_t>(held_);
      held_ >>= 8U;
      filled_ -= 8;
    }
  }
  std::uint8_t* finish() {
    if (filled_ > 0) *out_++ = static_cast<std::uint8_t>(held_);
    return out_;
  }

 private:
  std::uint8_t* out_;
  std::uint64_t held_ = 0;
  unsigned filled_ = 0;
};

// Reads nothing past `end`: what is missing there is zeros.
class BitReader {
 public:
  BitReader(const std::uint8_t* in, const std::uint8_t* end) : in_(in), end_(end) {}
  std::uint64_t take(unsigned count) {
    fill(count);
    const std::uint64_t bits = held_ & ((std::uint64_t{1} << count) - 1);
    drop(count);
    return bits;
  }
  unsigned ones() {  // before the next zero, which goes too; at most `escape`, and then no zero follows
    fill(escape + 1);
    const unsigned run = static_cast<unsigned>(std::countr_one(held_));
    if (run >= escape) {
      drop(escape);
      return escape;
    }
    drop(run + 1);
    return run;
  }

 private:
  void fill(unsigned count) {
    while (filled_ < count) {
      held_ |= static_cast<std::uint64_t>(in_ < end_ ? *in_++ : 0) << filled_;
      filled_ += 8;
    }
  }
  void drop(unsigned count) {
    held_ >>= count;
    filled_ -= count;
  }
  const std::uint8_t* in_;
  const std::uint8_t* end_;
  std::uint64_t held_ = 0;
  unsigned filled_ = 0;
};

std::size_t cost(const std::uint64_t* codes, unsigned count, unsigned rice) {
  std::size_t bits = 0;
  for (unsigned i = 0; i < count; ++i) {
    const std::uint64_t quotient = codes[i] >> rice;
    bits += quotient >= escape ? escape + word_bits : static_cast<std::size_t>(quotient) + 1 + rice;
  }
  return bits;
}

struct Head {  // of a block, as it lies in a page
  std::uint64_t present = 0;
  std::uint64_t number = 0;
  std::int32_t base = 0;
  std::uint16_t length = 0;  // of the bits that follow, bytes
  std::uint8_t rice = 0;     // 255: every value is `base`
  std::uint8_t from_base = 0;
};
static_assert(sizeof(Head) == head_bytes);
constexpr std::uint8_t all_alike = 255;

std::size_t encode(std::uint64_t number, std::uint64_t present, const std::int32_t* values,
                   std::uint8_t* out) {
  std::int32_t kept[block_points];
  unsigned count = 0;
  for (unsigned i = 0; i < block_points; ++i) {
    if ((present >> i & 1U) != 0) kept[count++] = values[i];
  }
  Head head{.present = present, .number = number, .base = kept[0]};
  if (std::all_of(kept, kept + count, [&](std::int32_t v) { return v == kept[0]; })) {
    head.rice = all_alike;
    std::memcpy(out, &head, sizeof head);
    return sizeof head;
  }
  std::int32_t sorted[block_points];
  std::copy(kept, kept + count, sorted);
  std::nth_element(sorted, sorted + count / 2, sorted + count);
  const std::int32_t middle = sorted[count / 2];
  std::uint64_t steps[block_points], away[block_points];
  std::int64_t before = kept[0];
  for (unsigned i = 0; i < count; ++i) {
    steps[i] = zigzag(kept[i] - before);
    away[i] = zigzag(static_cast<std::int64_t>(kept[i]) - middle);
    before = kept[i];
  }
  std::size_t least = std::numeric_limits<std::size_t>::max();
  for (const std::uint64_t* codes : {steps, away}) {
    // The best parameter is within one of the mean's size; wild values pull the mean up, so one more below.
    std::uint64_t sum = 0;
    for (unsigned i = 0; i < count; ++i) sum += codes[i];
    const unsigned middle_rice = static_cast<unsigned>(std::bit_width(sum / count));
    for (unsigned rice = middle_rice > 3 ? middle_rice - 3 : 0; rice <= std::min(middle_rice + 1, most_rice);
         ++rice) {
      const std::size_t bits = cost(codes, count, rice);
      if (bits >= least) continue;
      least = bits;
      head.rice = static_cast<std::uint8_t>(rice);
      head.from_base = codes == away ? 1 : 0;
    }
  }
  if (head.from_base != 0) head.base = middle;
  const std::uint64_t* codes = head.from_base != 0 ? away : steps;
  BitWriter bits(out + sizeof head);
  for (unsigned i = 0; i < count; ++i) {
    const std::uint64_t quotient = codes[i] >> head.rice;
    if (quotient >= escape) {
      bits.put((1U << escape) - 1, escape);
      bits.put(codes[i], word_bits);
    } else {
      bits.put((std::uint64_t{1} << quotient) - 1, static_cast<unsigned>(quotient) + 1);
      bits.put(codes[i] & ((std::uint64_t{1} << head.rice) - 1), head.rice);
    }
  }
  const std::uint8_t* end = bits.finish();
  head.length = static_cast<std::uint16_t>(end - out - static_cast<std::ptrdiff_t>(sizeof head));
  std::memcpy(out, &head, sizeof head);
  return static_cast<std::size_t>(end - out);
}

void decode(const Head& head, const std::uint8_t* data, std::int32_t* values) {
  BitReader bits(data, data + head.length);
  std::int64_t before = head.base;
  for (unsigned i = 0; i < block_points; ++i) {
    if ((head.present >> i & 1U) == 0) continue;
    if (head.rice == all_alike) {
      values[i] = head.base;
      continue;
    }
    const unsigned quotient = bits.ones();
    const std::uint64_t code =
        quotient == escape ? bits.take(word_bits)
                           : (static_cast<std::uint64_t>(quotient) << head.rice) | bits.take(head.rice);
    const std::int64_t value = (head.from_base != 0 ? head.base : before) + unzigzag(code);
    values[i] = static_cast<std::int32_t>(value);
    before = value;
  }
}

std::int32_t steps_of(double value, double step) {
  constexpr double most = std::numeric_limits<std::int32_t>::max();
  return static_cast<std::int32_t>(std::lround(std::clamp(value / step, -most, most)));
}

}  // namespace

void Stream::add(std::uint64_t at, std::int32_t value) {
  if (last_ && at <= *last_) return;
  last_ = at;
  const std::uint64_t number = at / block_points;
  if (present_ != 0 && number != block_) close();
  block_ = number;
  open_[at % block_points] = value;
  present_ |= std::uint64_t{1} << (at % block_points);
}

void Stream::close() {
  std::uint8_t coded[worst_block];
  const std::size_t length = encode(block_, present_, open_, coded);
  if (pages_.empty() || pages_.back()->used + length > page_bytes) {
    pages_.push_back(std::make_unique<Page>());
    pages_.back()->first = block_;
  }
  Page& page = *pages_.back();
  std::memcpy(page.data + page.used, coded, length);
  page.used += static_cast<std::uint32_t>(length);
  page.last = block_;
  present_ = 0;
}

template <class Put>
void Stream::each(std::uint64_t from, std::uint64_t to, Put put) const {
  const auto give = [&](std::uint64_t number, std::uint64_t present, const std::int32_t* values) {
    for (unsigned i = 0; i < block_points; ++i) {
      const std::uint64_t at = number * block_points + i;
      if ((present >> i & 1U) != 0 && at >= from && at < to) put(at, values[i]);
    }
  };
  for (const auto& page : pages_) {
    if ((page->last + 1) * block_points <= from) continue;
    if (page->first * block_points >= to) break;
    for (std::uint32_t offset = 0; offset < page->used;) {
      Head head;
      std::memcpy(&head, page->data + offset, sizeof head);
      if ((head.number + 1) * block_points > from && head.number * block_points < to) {
        std::int32_t values[block_points] = {};
        decode(head, page->data + offset + sizeof head, values);
        give(head.number, head.present, values);
      }
      offset += static_cast<std::uint32_t>(sizeof head) + head.length;
    }
  }
  if (present_ != 0) give(block_, present_, open_);
}

void Stream::forget_before(std::uint64_t at) {
  while (!pages_.empty() && (pages_.front()->last + 1) * block_points <= at) pages_.pop_front();
}

std::optional<std::uint64_t> Stream::oldest() const {
  if (pages_.empty()) return std::nullopt;
  return pages_.front()->first * block_points;
}

std::size_t Stream::drop_oldest_page() {
  if (pages_.empty()) return 0;
  pages_.pop_front();
  return sizeof(Page) + sizeof(void*);
}

std::optional<std::size_t> History::open(Kind kind) {
  if (!(kind.step > 0)) return std::nullopt;
  const auto free = std::find_if(all_.begin(), all_.end(), [](const auto& s) { return !s->used; });
  if (free == all_.end() && all_.size() >= settings_.most_series) return std::nullopt;
  auto series = std::make_unique<Series>();
  series->kind = kind;
  series->used = true;
  if (free != all_.end()) {
    *free = std::move(series);
    return static_cast<std::size_t>(free - all_.begin());
  }
  all_.push_back(std::move(series));
  return all_.size() - 1;
}

void History::close(std::size_t series) {
  if (series < all_.size()) *all_[series] = Series{};
}

// Brings what was pending before `second` into the streams.
void History::settle(Series& series, std::uint64_t second) {
  Pending& now = series.second;
  if (now.count == 0 || now.bucket == second) return;
  const double mean = now.sum / now.count;
  series.seconds.add(now.bucket, steps_of(mean, series.kind.step));
  Pending& minute = series.minute;
  const auto flush = [&] {
    if (minute.count == 0) return;
    series.means.add(minute.bucket, steps_of(minute.sum / minute.count, series.kind.step));
    series.worsts.add(minute.bucket, steps_of(minute.worst, series.kind.step));
    minute = {};
  };
  if (minute.count != 0 && minute.bucket != now.bucket / 60) flush();
  const bool high = series.kind.worst == Worst::high;
  minute.worst = minute.count == 0
                     ? now.worst
                     : (high ? std::max(minute.worst, now.worst) : std::min(minute.worst, now.worst));
  minute.bucket = now.bucket / 60;
  minute.sum += mean;
  ++minute.count;
  if (second / 60 != minute.bucket) flush();
  now = {};
}

void History::add(std::size_t number, double now_s, double value) {
  if (number >= all_.size() || !all_[number]->used) return;
  if (!std::isfinite(value) || !(now_s >= 0) || now_s > 1e12) return;
  Series& series = *all_[number];
  const auto second = static_cast<std::uint64_t>(now_s);
  if (series.second.count != 0 && second < series.second.bucket) return;
  settle(series, second);
  Pending& now = series.second;
  const bool high = series.kind.worst == Worst::high;
  now.worst = now.count == 0 ? value : (high ? std::max(now.worst, value) : std::min(now.worst, value));
  now.bucket = second;
  now.sum += value;
  ++now.count;
  if (second >= room_checked_s_ + 60 || second < room_checked_s_) {
    room_checked_s_ = second;
    for (auto& one : all_) {
      if (second > settings_.seconds_kept) one->seconds.forget_before(second - settings_.seconds_kept);
      const std::uint64_t minute = second / 60;
      if (minute > settings_.minutes_kept) {
        one->means.forget_before(minute - settings_.minutes_kept);
        one->worsts.forget_before(minute - settings_.minutes_kept);
      }
    }
    make_room();
  }
}

void History::make_room() {
  std::size_t held = bytes();
  // Between two checks every stream may begin a page, all in the same minute: the bound has to hold then too.
  const std::size_t margin =
      std::min(all_.size() * 3 * (sizeof(std::uint64_t) * 4 + page_bytes), settings_.most_bytes / 4);
  const std::size_t goal = settings_.most_bytes - margin;
  while (held > goal) {
    Stream* eldest = nullptr;
    std::uint64_t at = std::numeric_limits<std::uint64_t>::max();
    for (auto& one : all_) {
      for (Stream* stream : {&one->means, &one->worsts}) {
        if (const auto oldest = stream->oldest(); oldest && *oldest < at) {
          at = *oldest;
          eldest = stream;
        }
      }
    }
    if (eldest == nullptr) {  // nothing but seconds is left
      for (auto& one : all_) {
        if (const auto oldest = one->seconds.oldest(); oldest && *oldest < at) {
          at = *oldest;
          eldest = &one->seconds;
        }
      }
    }
    if (eldest == nullptr) return;
    held -= eldest->drop_oldest_page();
  }
}

std::vector<Point> History::query(std::size_t number, std::uint64_t from_s, std::uint64_t to_s,
                                  Grain grain) const {
  std::vector<Point> points;
  if (number >= all_.size() || !all_[number]->used || from_s >= to_s) return points;
  const Series& series = *all_[number];
  const double step = series.kind.step;
  if (grain == Grain::second) {
    series.seconds.each(from_s, to_s, [&](std::uint64_t at, std::int32_t value) {
      points.push_back({at, value * step, value * step});
    });
    return points;
  }
  const std::uint64_t from = from_s / 60 + (from_s % 60 != 0 ? 1 : 0),
                      to = to_s / 60 + (to_s % 60 != 0 ? 1 : 0);
  series.means.each(from, to, [&](std::uint64_t at, std::int32_t value) {
    points.push_back({at * 60, value * step, value * step});
  });
  std::size_t next = 0;
  series.worsts.each(from, to, [&](std::uint64_t at, std::int32_t value) {
    while (next < points.size() && points[next].at_s < at * 60) ++next;
    if (next < points.size() && points[next].at_s == at * 60) points[next].worst = value * step;
  });
  return points;
}

std::size_t History::bytes() const {
  std::size_t sum = sizeof(*this) + all_.capacity() * sizeof(all_[0]) + all_.size() * sizeof(Series);
  for (const auto& one : all_) sum += one->seconds.bytes() + one->means.bytes() + one->worsts.bytes();
  return sum;
}

std::optional<std::uint64_t> History::oldest_s() const {
  std::optional<std::uint64_t> oldest;
  for (const auto& one : all_) {
    if (const auto at = one->means.oldest(); at && (!oldest || *at * 60 < *oldest)) oldest = *at * 60;
  }
  return oldest;
}

}  // namespace bulkhead::history
