#include "core/replay/go_random.hpp"

namespace bulkhead::replay {

namespace {

constexpr std::uint64_t kLow63 = ~std::uint64_t{0} >> 1U;

// x -> 48271 x mod 2^31 - 1
std::uint64_t step(std::uint64_t x) { return 48271 * x % 0x7fffffff; }

// Fills a register from a seed, each word from three steps, `shift` bits apart.
template <class Register>
void fill(Register& state, std::uint64_t seed, unsigned shift) {
  std::uint64_t x = seed % 0x7fffffff;
  if (x == 0) x = 89482311;
  for (int i = 0; i < 20; ++i) x = step(x);
  for (std::uint64_t& word : state) {
    word = (x = step(x)) << (2 * shift);
    word ^= (x = step(x)) << shift;
    word ^= x = step(x);
  }
}

}  // namespace

// Go keeps a table of the register seeded with 1 (10 bits apart) after 7.8e12 steps. Instead of the table:
// the jump. With y[-607] .. y[-1] the register in the order of its steps, y[n] is a fixed sum of them, whose
// coefficients are those of z^(n + 607) modulo z^607 - z^334 - 1, and that power takes 43 squarings.
const GoRandom::Register& GoRandom::warm() {
  static const Register table = [] {
    using Power = std::vector<std::uint64_t>;  // coefficients, modulo 2^64
    const auto reduce = [](Power& p) {
      for (std::size_t i = p.size() - 1; i >= kLong; --i) {
        p[i - kLong] += p[i];
        p[i - kShort] += p[i];
      }
      p.resize(kLong);
    };
    constexpr std::uint64_t jump = 7'800'000'000'000;
    Power power(kLong, 0);
    power[0] = 1;
    for (int bit = 43; bit >= 0; --bit) {
      Power square(2 * kLong, 0);
      const std::size_t odd = jump >> static_cast<unsigned>(bit) & 1U;
      for (std::size_t i = 0; i < kLong; ++i)
        for (std::size_t j = 0; j < kLong; ++j) square[i + j + odd] += power[i] * power[j];
      reduce(square);
      power = std::move(square);
    }
    // Step n writes word (333 - n) mod 607.
    const auto word_of = [](std::size_t step_from_first) {
      return (kLong - kShort - 1 + kLong - step_from_first % kLong) % kLong;
    };
    Register start{}, out{};
    fill(start, 1, 10);
    std::vector<std::uint64_t> y(2 * kLong);  // y[i] is of step i - 607
    for (std::size_t i = 0; i < kLong; ++i) y[i] = start[word_of(i)];
    for (std::size_t i = kLong; i < y.size(); ++i) y[i] = y[i - kLong] + y[i - kShort];
    for (std::size_t k = 0; k < kLong; ++k) {
      std::uint64_t sum = 0;
      for (std::size_t j = 0; j < kLong; ++j) sum += power[j] * y[j + k];
      out[word_of((jump + k) % kLong)] = sum;
    }
    return out;
  }();
  return table;
}

GoRandom::GoRandom(std::uint64_t seed) {
  fill(state_, seed, 20);
  const Register& table = warm();
  for (std::size_t i = 0; i < kLong; ++i) state_[i] ^= table[i];
}

std::uint64_t GoRandom::int63() {
  tap_ = (tap_ == 0 ? kLong : tap_) - 1;
  feed_ = (feed_ == 0 ? kLong : feed_) - 1;
  return (state_[feed_] += state_[tap_]) & kLow63;
}

std::uint32_t GoRandom::below(std::uint32_t n) {
  if ((n & (n - 1)) == 0) return static_cast<std::uint32_t>(int63() >> 32U) & (n - 1);
  const std::uint32_t most = 0x7fffffff - 0x80000000U % n;
  auto drawn = static_cast<std::uint32_t>(int63() >> 32U);
  while (drawn > most) drawn = static_cast<std::uint32_t>(int63() >> 32U);
  return drawn % n;
}

std::uint32_t GoRandom::below_scaled(std::uint32_t n) {
  std::uint64_t product = (int63() >> 31U) * n;
  if (static_cast<std::uint32_t>(product) < n) {
    const std::uint32_t least = (0U - n) % n;
    while (static_cast<std::uint32_t>(product) < least) product = (int63() >> 31U) * n;
  }
  return static_cast<std::uint32_t>(product >> 32U);
}

std::vector<std::uint32_t> GoRandom::permutation(std::uint32_t size) {
  std::vector<std::uint32_t> out(size);
  for (std::uint32_t i = 0; i < size; ++i) {
    const std::uint32_t j = below(i + 1);
    out[i] = out[j];
    out[j] = i;
  }
  return out;
}

}  // namespace bulkhead::replay
