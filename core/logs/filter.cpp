// Four rare bytes of each word, looked for at every place at once: the buckets a byte may belong to are read
// from two tables of sixteen entries by its nibbles (the shuffle of Teddy, from Hyperscan), and what survives
// all four places is compared in full. Unrelated text costs a few instructions for each 32 bytes.
#include <algorithm>
#include <bit>
#include <cstring>

#include "base/check.hpp"
#include "core/logs/logs.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bulkhead::logs {

namespace {

// How common a byte is in logs, roughly, in thousandths: measured on a kernel's ring buffer and syslog.
unsigned commonness(unsigned char c) {
  if (c == ' ' || c == '0') return 90;
  if (c >= '1' && c <= '9') return 25;
  if (c == 'e' || c == 'i' || c == 't' || c == 'r' || c == 'n' || c == 's' || c == 'o' || c == 'a') return 40;
  if (c >= 'a' && c <= 'z') return 18;
  if (c == ':' || c == '.' || c == '[' || c == ']' || c == '-' || c == '=') return 20;
  if (c >= 'A' && c <= 'Z') return 4;
  return 3;
}

std::uint64_t score(std::string_view four) {
  std::uint64_t out = 1;
  for (const char c : four) out *= commonness(static_cast<unsigned char>(c));
  return out;
}

}  // namespace

Filter::Filter(std::span<const std::string_view> needles) {
  struct Nibbles {
    std::array<std::uint16_t, 4> low = {};
    std::array<std::uint16_t, 4> high = {};
  };
  std::array<Nibbles, 8> sets = {};
  // How often unrelated text passes: the product over the four places of the bytes that their nibbles let in.
  const auto cost = [](const Nibbles& set) {
    double out = 1;
    for (std::size_t i = 0; i < 4; ++i) {
      unsigned sum = 0;
      for (unsigned c = 9; c < 127; ++c)
        if ((set.low.at(i) >> (c & 15U) & 1U) != 0 && (set.high.at(i) >> (c >> 4U) & 1U) != 0)
          sum += commonness(static_cast<unsigned char>(c));
      out *= sum;
    }
    return out;
  };
  for (std::size_t number = 0; number < needles.size(); ++number) {
    const auto needle = needles[number];
    BH_ASSERT(needle.size() >= 4);
    Word word{std::string(needle), 0, number};
    for (std::size_t at = 1; at + 4 <= needle.size(); ++at)
      if (score(needle.substr(at, 4)) < score(needle.substr(word.offset, 4))) word.offset = at;
    reach_ = std::max(reach_, word.offset);
    std::size_t best = 0;
    double least = 1e300;
    for (std::size_t b = 0; b < buckets_.size(); ++b) {
      auto with = sets.at(b);
      for (std::size_t i = 0; i < 4; ++i) {
        const auto c = static_cast<unsigned char>(needle[word.offset + i]);
        with.low.at(i) = static_cast<std::uint16_t>(with.low.at(i) | (1U << (c & 15U)));
        with.high.at(i) = static_cast<std::uint16_t>(with.high.at(i) | (1U << (c >> 4U)));
      }
      const auto more = cost(with) - (buckets_.at(b).empty() ? 0 : cost(sets.at(b)));
      if (more < least) {
        least = more;
        best = b;
      }
    }
    for (std::size_t i = 0; i < 4; ++i) {
      const auto c = static_cast<unsigned char>(needle[word.offset + i]);
      auto& set = sets.at(best);
      set.low.at(i) = static_cast<std::uint16_t>(set.low.at(i) | (1U << (c & 15U)));
      set.high.at(i) = static_cast<std::uint16_t>(set.high.at(i) | (1U << (c >> 4U)));
      const auto bit = static_cast<std::uint8_t>(1U << best);
      low_.at(i).at(c & 15U) |= bit;
      high_.at(i).at(c >> 4U) |= bit;
      whole_.at(i).at(c) |= bit;
    }
    buckets_.at(best).push_back(std::move(word));
  }
}

template <class Candidates>
void Filter::run(std::string_view text, const std::function<void(std::size_t, std::size_t)>& found,
                 Candidates&& candidates) const {
  candidates(text, [&](std::size_t at, unsigned which) {
    for (; which != 0; which &= which - 1) {
      for (const auto& word : buckets_.at(static_cast<std::size_t>(std::countr_zero(which)))) {
        if (at < word.offset) continue;
        const auto begin = at - word.offset;
        if (std::memcmp(text.data() + at, word.text.data() + word.offset, 4) == 0 &&
            text.size() - begin >= word.text.size() &&
            std::memcmp(text.data() + begin, word.text.data(), word.text.size()) == 0)
          found(word.number, begin);
      }
    }
  });
}

namespace {

using Table = std::array<std::array<std::uint8_t, 16>, 4>;
using Whole = std::array<std::array<std::uint8_t, 256>, 4>;

template <class Each>
void plainly(const Whole& whole, std::string_view text, std::size_t from, Each&& each) {
  if (text.size() < 4) return;
  const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
  for (std::size_t at = from; at + 4 <= text.size(); ++at) {
    const unsigned which =
        whole[0][bytes[at]] & whole[1][bytes[at + 1]] & whole[2][bytes[at + 2]] & whole[3][bytes[at + 3]];
    if (which != 0) each(at, which);
  }
}

#if defined(__x86_64__)
// The next place from `at` on where a word may stand, in steps of 32; `rest`: the places of this step that
// were not looked at yet. Nibbles let in bytes of no word, so each place is looked up whole before it is
// reported.
struct Step {
  std::size_t at = 0;
  std::uint32_t rest = 0;
};
__attribute__((target("avx2,bmi"))) bool widely(const Table& low, const Table& high, const Whole& whole,
                                                std::string_view text, Step& step, std::size_t& place,
                                                unsigned& buckets) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
  const __m256i mask = _mm256_set1_epi8(0x0f);
  const __m256i none = _mm256_setzero_si256();
  __m256i lows[4];
  __m256i highs[4];
  for (std::size_t i = 0; i < 4; ++i) {
    lows[i] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(low[i].data())));
    highs[i] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(high[i].data())));
  }
  for (;;) {
    while (step.rest != 0) {
      const auto at = step.at - 32 + static_cast<std::size_t>(__builtin_ctz(step.rest));
      step.rest &= step.rest - 1;
      buckets = static_cast<unsigned>(whole[0][bytes[at]] & whole[1][bytes[at + 1]] &
                                      whole[2][bytes[at + 2]] & whole[3][bytes[at + 3]]);
      if (buckets != 0) {
        place = at;
        return true;
      }
    }
    if (step.at + 35 > text.size()) return false;
    __m256i all = _mm256_set1_epi8(-1);
    for (std::size_t i = 0; i < 4; ++i) {
      const __m256i chunk = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + step.at + i));
      const __m256i l = _mm256_shuffle_epi8(lows[i], _mm256_and_si256(chunk, mask));
      const __m256i h = _mm256_shuffle_epi8(highs[i], _mm256_and_si256(_mm256_srli_epi16(chunk, 4), mask));
      all = _mm256_and_si256(all, _mm256_and_si256(l, h));
    }
    step.rest = ~static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(all, none)));
    step.at += 32;
  }
}
#endif

}  // namespace

void Filter::scan_plainly(std::string_view text,
                          const std::function<void(std::size_t, std::size_t)>& found) const {
  run(text, found, [this](std::string_view all, auto&& each) { plainly(whole_, all, 0, each); });
}

void Filter::scan(std::string_view text, const std::function<void(std::size_t, std::size_t)>& found) const {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    run(text, found, [this](std::string_view all, auto&& each) {
      Step step;
      std::size_t place = 0;
      unsigned buckets = 0;
      while (widely(low_, high_, whole_, all, step, place, buckets)) each(place, buckets);
      plainly(whole_, all, step.at, each);
    });
    return;
  }
#endif
  scan_plainly(text, found);
}

}  // namespace bulkhead::logs
