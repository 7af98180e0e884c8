#include "engine/heal/gate.hpp"

#include <algorithm>

#include <gtest/gtest.h>

namespace bulkhead::heal::gate {
namespace {

std::uint32_t digest(const std::vector<std::uint32_t>& words) {
  std::uint32_t out = 0;
  for (const auto word : words) out = out * 31 + word;
  return out;
}

// An H100 answered these, on each of its 132 multiprocessors (driver 580.159.04; bench/RESULTS.md).
TEST(Gate, ExpectsWhatAnH100Computes) {
  const auto numbers = expected_arithmetic(arithmetic.rounds), products = expected_tensor(tensor.rounds);
  ASSERT_EQ(numbers.size(), threads);
  ASSERT_EQ(products.size(), threads);
  EXPECT_EQ(numbers.front(), 0x552796cfU);
  EXPECT_EQ(digest(numbers), 0x9ff4a19dU);
  EXPECT_EQ(products.front(), 0x6d12c18dU);
  EXPECT_EQ(digest(products), 0x2767fddbU);
}

TEST(Gate, ThreadsDoNotAgree) {  // or a GPU that runs one of them everywhere would pass
  for (auto words : {expected_arithmetic(64), expected_tensor(8)}) {
    std::sort(words.begin(), words.end());
    EXPECT_EQ(std::adjacent_find(words.begin(), words.end()), words.end());
  }
}

}  // namespace
}  // namespace bulkhead::heal::gate
