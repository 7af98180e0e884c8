// Least squares whose terms must not be negative, for a handful of terms: watts, thermal resistances. Exact
// and the same everywhere: the best solution has some set of terms at nothing and solves the normal equations
// of the rest, so every set is tried.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <optional>
#include <utility>

namespace bulkhead::nnls {

// Minimises x'Ax - 2b'x for A = sum of x x' (symmetric, positive semidefinite) and b = sum of x y. Bit i of
// `any_sign`: term i may be negative and is always there. A set of terms that A cannot tell apart (a pivot
// below `least_pivot`) is passed over; equal within rounding, the set that came first wins. nullopt: no set
// is left.
template <std::size_t N>
std::optional<std::array<double, N>> solve(const std::array<std::array<double, N>, N>& a,
                                           const std::array<double, N>& b, double least_pivot,
                                           unsigned any_sign = 0) {
  static_assert(N <= 8, "every one of 2^N sets is tried");
  std::optional<std::array<double, N>> best;
  double best_cost = 0;
  for (unsigned set = 0; set < (1U << N); ++set) {
    if ((set & any_sign) != any_sign) continue;
    const auto in = [set](std::size_t i) { return (set >> i & 1U) != 0; };
    std::array<std::array<double, N + 1>, N> m{};
    for (std::size_t i = 0; i < N; ++i) {
      for (std::size_t j = 0; j < N; ++j) m[i][j] = in(i) && in(j) ? a[i][j] : 0;
      if (!in(i)) m[i][i] = 1;
      m[i][N] = in(i) ? b[i] : 0;
    }
    bool singular = false;
    for (std::size_t k = 0; k < N && !singular; ++k) {
      if (!in(k)) continue;
      std::size_t pivot = k;
      for (std::size_t i = k + 1; i < N; ++i)
        if (in(i) && std::abs(m[i][k]) > std::abs(m[pivot][k])) pivot = i;
      std::swap(m[k], m[pivot]);
      singular = !(std::abs(m[k][k]) >= least_pivot);
      for (std::size_t i = 0; i < N && !singular; ++i) {
        if (i == k || m[i][k] == 0) continue;
        const double factor = m[i][k] / m[k][k];
        for (std::size_t j = k; j <= N; ++j) m[i][j] -= factor * m[k][j];
      }
    }
    if (singular) continue;
    std::array<double, N> x{};
    bool allowed = true;
    for (std::size_t i = 0; i < N; ++i) {
      x[i] = m[i][N] / m[i][i];
      allowed = allowed && std::isfinite(x[i]) && (x[i] >= 0 || (any_sign >> i & 1U) != 0);
    }
    if (!allowed) continue;
    double cost = 0;
    for (std::size_t i = 0; i < N; ++i) {
      cost -= 2 * b[i] * x[i];
      for (std::size_t j = 0; j < N; ++j) cost += x[i] * a[i][j] * x[j];
    }
    if (!best || cost < best_cost - 1e-12 * std::abs(best_cost)) {
      best = x;
      best_cost = cost;
    }
  }
  return best;
}

}  // namespace bulkhead::nnls
