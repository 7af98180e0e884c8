// The generator of Go's math/rand (BSD licence, The Go Authors; algorithm by D. P. Mitchell and J. A. Reeds):
// an additive lagged Fibonacci generator, x[n] = x[n - 607] + x[n - 273]. The experiment's original draws
// with it, so the published seeds stand for the same arrivals here. Private to core/replay.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace bulkhead::replay {

class GoRandom {
 public:
  explicit GoRandom(std::uint64_t seed);
  std::uint64_t int63();
  std::uint32_t below(std::uint32_t n);  // Intn(n); n from 1 to 2^31 - 1

  // Shuffle()
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (std::size_t i = items.size(); i > 1; --i)
      std::swap(items[i - 1], items[below_scaled(static_cast<std::uint32_t>(i))]);
  }
  std::vector<std::uint32_t> permutation(std::uint32_t size);  // Perm()

 private:
  static constexpr std::size_t kLong = 607, kShort = 273;
  using Register = std::array<std::uint64_t, kLong>;
  static const Register& warm();
  std::uint32_t below_scaled(std::uint32_t n);  // what Shuffle() uses instead of Intn()

  Register state_{};
  std::size_t tap_ = 0, feed_ = kLong - kShort;
};

}  // namespace bulkhead::replay
