#include "guard/wire/wire.hpp"

#include <gtest/gtest.h>

#include <memory>

namespace bulkhead::guard {
namespace {

std::unique_ptr<Page> page_with(std::initializer_list<std::uint32_t> pids) {
  auto page = std::make_unique<Page>();
  std::size_t i = 0;
  for (const auto pid : pids) {
    page->slots[i].owner = static_cast<std::uint64_t>(pid) << 32 | 1;
    page->slots[i].used[0] = 100;
    ++i;
    page->high_water = static_cast<std::uint32_t>(i);
  }
  return page;
}

TEST(Wire, OnlyTheSlotsOfTheDeadGoBackAndWithAllTheirBytes) {
  auto page = page_with({10, 11, 12});
  page->slots[1].refused = 7;
  page->outside[0] = 5;
  const auto released = release_dead(*page, [](std::uint32_t pid, std::uint32_t) { return pid != 11; });
  EXPECT_EQ(released.slots, 1U);
  EXPECT_EQ(released.refused, 7U);
  EXPECT_EQ(charged(*page, 0), 205U);
  EXPECT_EQ(page->slots[1].owner.load(), 0U);
  EXPECT_EQ(page->slots[0].used[0].load(), 100U);
}

TEST(Wire, APidUsedAgainIsSomebodyElse) {
  auto page = page_with({10});
  release_dead(*page, [](std::uint32_t pid, std::uint32_t start) { return pid == 10 && start == 2; });
  EXPECT_EQ(charged(*page, 0), 0U);
}

TEST(Wire, WhatADeadProcessExportedStaysChargedWhileSomebodyImports) {
  auto page = page_with({10, 11});
  page->slots[0].exported[0] = 60;
  page->slots[1].imports = 1;
  const auto eleven_lives = [](std::uint32_t pid, std::uint32_t) { return pid == 11; };
  release_dead(*page, eleven_lives);
  EXPECT_EQ(charged(*page, 0), 160U);
  release_dead(*page, eleven_lives);
  EXPECT_EQ(charged(*page, 0), 160U) << "a second look adds nothing";
  page->slots[1].imports = 0;
  release_dead(*page, eleven_lives);
  EXPECT_EQ(charged(*page, 0), 100U);
}

TEST(Wire, APageOfGarbageLooksFull) {
  auto page = std::make_unique<Page>();
  page->high_water = 0xffffffff;
  for (auto& slot : page->slots) slot.used[0] = ~0ULL - 3;
  EXPECT_EQ(slots_in_use(*page), max_slots);
  EXPECT_EQ(charged(*page, 0), ~0ULL);
  for (auto& slot : page->slots) slot.owner = ~0ULL;
  for (auto& slot : page->slots) slot.exported[0] = ~0ULL;
  EXPECT_EQ(release_dead(*page, [](std::uint32_t, std::uint32_t) { return false; }).slots, max_slots);
}

}  // namespace
}  // namespace bulkhead::guard
