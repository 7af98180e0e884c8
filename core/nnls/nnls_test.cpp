#include "core/nnls/nnls.hpp"

#include <gtest/gtest.h>

#include "base/prng.hpp"

namespace bulkhead::nnls {
namespace {

template <std::size_t N>
using Square = std::array<std::array<double, N>, N>;

TEST(Nnls, FindsTheTermsThatMadeTheData) {
  Square<2> a{};
  std::array<double, 2> b{};
  for (const auto& [x0, x1] : {std::pair{1.0, 0.0}, {1.0, 1.0}, {1.0, 2.0}}) {
    const std::array<double, 2> x{x0, x1};
    const double y = 3 * x0 + 5 * x1;
    for (std::size_t i = 0; i < 2; ++i) {
      for (std::size_t j = 0; j < 2; ++j) a[i][j] += x[i] * x[j];
      b[i] += x[i] * y;
    }
  }
  const auto x = solve(a, b, 1e-9).value();
  EXPECT_NEAR(x[0], 3, 1e-9);
  EXPECT_NEAR(x[1], 5, 1e-9);
}

TEST(Nnls, ATermThatMayBeNegativeIsAndOneThatMayNotIsNothing) {
  const Square<2> a{{{2, 1}, {1, 2}}};
  const std::array<double, 2> b{-1, 1};  // without bounds: (-1, 1)
  const auto bounded = solve(a, b, 1e-9).value();
  EXPECT_EQ(bounded[0], 0);
  EXPECT_NEAR(bounded[1], 0.5, 1e-12);
  const auto free = solve(a, b, 1e-9, 1U).value();
  EXPECT_NEAR(free[0], -1, 1e-12);
  EXPECT_NEAR(free[1], 1, 1e-12);
}

TEST(Nnls, NoPointNearbyIsBetter) {
  Prng random(11);
  for (int round = 0; round < 500; ++round) {
    Square<4> a{};
    std::array<double, 4> b{};
    for (int row = 0; row < 12; ++row) {
      std::array<double, 4> x{};
      for (auto& v : x) v = random.unit() * 2 - 1;
      const double y = random.unit() * 2 - 1;
      for (std::size_t i = 0; i < 4; ++i) {
        for (std::size_t j = 0; j < 4; ++j) a[i][j] += x[i] * x[j];
        b[i] += x[i] * y;
      }
    }
    const auto cost = [&](const std::array<double, 4>& x) {
      double sum = 0;
      for (std::size_t i = 0; i < 4; ++i) {
        sum -= 2 * b[i] * x[i];
        for (std::size_t j = 0; j < 4; ++j) sum += x[i] * a[i][j] * x[j];
      }
      return sum;
    };
    const auto found = solve(a, b, 1e-9);
    ASSERT_TRUE(found);
    for (int step = 0; step < 50; ++step) {
      auto near = *found;
      for (auto& v : near) v = std::max(0.0, v + (random.unit() - 0.5) * 0.01);
      ASSERT_GE(cost(near), cost(*found) - 1e-12);
    }
  }
}

TEST(Nnls, TermsThatCannotBeToldApartLeaveOneOfThem) {
  const Square<2> a{{{1, 1}, {1, 1}}};
  const auto x = solve(a, {2, 2}, 1e-9).value();
  EXPECT_NEAR(x[0] + x[1], 2, 1e-12);
  EXPECT_EQ(solve(Square<2>{}, {0, 0}, 1e-9).value(), (std::array<double, 2>{0, 0}));
  EXPECT_FALSE(solve(Square<2>{}, {0, 0}, 1e-9, 1U));  // nothing says what the first is
}

}  // namespace
}  // namespace bulkhead::nnls
