#include "edge/archive/archive.hpp"

#include <gtest/gtest.h>

namespace bulkhead::archive {
namespace {

TEST(Archive, ComesBackAsItWas) {
  const std::vector<Member> members = {{"bundle/dmesg.txt", std::string(1000, 'a')}, {"bundle/empty", ""}};
  const auto packed = tar(members, WallTime{});
  ASSERT_TRUE(packed.ok());
  EXPECT_TRUE(is_tar(*packed));
  const auto small = gzip(*packed);
  ASSERT_TRUE(small.ok());
  EXPECT_TRUE(is_gzip(*small));
  const auto large = gunzip(*small, 1U << 20U);
  ASSERT_TRUE(large.ok());
  const auto back = untar(*large);
  ASSERT_TRUE(back.ok());
  ASSERT_EQ(back->size(), 2U);
  EXPECT_EQ((*back)[0].name, "bundle/dmesg.txt");
  EXPECT_EQ((*back)[0].content, members[0].content);
}

TEST(Archive, ABombIsRefused) {
  const auto small = gzip(std::string(8U << 20U, '\0'));
  ASSERT_TRUE(small.ok());
  EXPECT_FALSE(gunzip(*small, 1U << 20U).ok());
}

TEST(Archive, WhatIsCutGivesItsBeginning) {
  const auto small = gzip(std::string(100'000, 'x') + std::to_string(1) + std::string(100'000, 'y'));
  ASSERT_TRUE(small.ok());
  const auto part = gunzip(std::string_view(*small).substr(0, small->size() - 20), 1U << 20U);
  EXPECT_TRUE(part.ok());
  EXPECT_FALSE(gunzip("\x1f\x8b\x08garbage", 1U << 20U).ok());
}

}  // namespace
}  // namespace bulkhead::archive
