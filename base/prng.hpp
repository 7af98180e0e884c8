// A seeded generator for simulations: the same seed gives the same numbers on every machine, which the
// distributions of <random> do not promise. xoshiro256** by Blackman and Vigna, seeded through splitmix64.
// Not for secrets.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <span>
#include <utility>

namespace bulkhead {

class Prng {
 public:
  using result_type = std::uint64_t;
  explicit Prng(std::uint64_t seed) {
    for (auto& word : state_) {
      seed += 0x9e3779b97f4a7c15;
      std::uint64_t z = seed;
      z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9;
      z = (z ^ (z >> 27U)) * 0x94d049bb133111eb;
      word = z ^ (z >> 31U);
    }
  }

  static constexpr std::uint64_t min() { return 0; }
  static constexpr std::uint64_t max() { return UINT64_MAX; }
  std::uint64_t operator()() {
    const std::uint64_t out = std::rotl(state_[1] * 5, 7) * 9;
    const std::uint64_t shifted = state_[1] << 17U;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= shifted;
    state_[3] = std::rotl(state_[3], 45);
    return out;
  }

  // Even over [0, n); n > 0. Rejection, so no bias.
  std::uint64_t below(std::uint64_t n) {
    const std::uint64_t past = UINT64_MAX - UINT64_MAX % n;  // a multiple of n
    std::uint64_t drawn = (*this)();
    while (drawn >= past) drawn = (*this)();
    return drawn % n;
  }
  // [0, 1) in steps of 2^-53.
  double unit() { return static_cast<double>((*this)() >> 11U) * 0x1.0p-53; }
  double exponential(double mean) { return -mean * std::log1p(-unit()); }

  template <class T>
  void shuffle(std::span<T> items) {
    for (std::size_t left = items.size(); left > 1; --left) {
      using std::swap;
      swap(items[left - 1], items[below(left)]);
    }
  }

 private:
  std::array<std::uint64_t, 4> state_{};
};

}  // namespace bulkhead
