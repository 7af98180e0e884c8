#include "core/heal/heal.hpp"

#include <gtest/gtest.h>

#include <fmt/format.h>

namespace bulkhead::heal {
namespace {

constexpr std::int64_t now = 1'000'000;

Host eight(bool mig = true) {
  Host out;
  for (unsigned i = 0; i < 8; ++i) {
    Gpu gpu{.uuid = {fmt::format("GPU-{}", i)}, .index = i, .mig = mig, .on_fabric = true};
    for (unsigned slice = 1; slice <= 2; ++slice)
      gpu.leases.push_back(
          {.id = i * 10 + slice, .tenant = slice == 1 ? "vision" : "speech", .gpu_instance = slice});
    gpu.holders = {"pid 77 (dcgm)"};
    out.gpus.push_back(std::move(gpu));
  }
  return out;
}
Fault fault(Act remedy, unsigned gpu = 3) {
  return {.id = "i1",
          .cause = "XID 95: uncontained ECC error",
          .remedy = remedy,
          .gpu = {fmt::format("GPU-{}", gpu)},
          .gpu_instance = 1,
          .pid = 4711};
}
constexpr Settings acting{.mode = Mode::act};
std::vector<std::int64_t> leases(const Decision& decision) {
  std::vector<std::int64_t> out;
  for (const auto& one : decision.victims) out.push_back(one.lease);
  return out;
}

TEST(Heal, AnActTouchesThoseWithinItsReachAndNobodyElse) {
  EXPECT_TRUE(decide(fault(Act::end_process), eight(), {}, acting, now).victims.empty());
  EXPECT_EQ(leases(decide(fault(Act::drain_slice), eight(), {}, acting, now)), std::vector<std::int64_t>{31});
  EXPECT_EQ(leases(decide(fault(Act::recreate_slice), eight(), {}, acting, now)),
            std::vector<std::int64_t>{31});
  const auto reset = decide(fault(Act::reset_gpu), eight(), {}, acting, now);
  EXPECT_EQ(leases(reset), (std::vector<std::int64_t>{31, 32}));
  EXPECT_TRUE(reset.now);
  EXPECT_EQ(reset.disturbed.size(), 1U + 7U) << "its holder, and seven peers on the fabric";
  EXPECT_EQ(decide(fault(Act::restart_fabric_manager), eight(), {}, acting, now).victims.size(), 16U);
}

TEST(Heal, WithoutMigTheGpuIsTheSlice) {
  EXPECT_EQ(decide(fault(Act::recreate_slice), eight(false), {}, acting, now).act, Act::reset_gpu);
}

TEST(Heal, WhatDidNotHelpIsLeftBehind) {
  const auto host = eight();
  std::vector<Done> before;
  std::vector<Act> taken;
  for (int i = 0; i < 6; ++i) {
    const auto next = decide(fault(Act::drain_slice), host, before, acting, now + i);
    taken.push_back(next.act);
    before.push_back(
        {.at_s = now + i, .act = next.act, .gpu = {"GPU-3"}, .gpu_instance = 1, .helped = i == 0});
  }
  EXPECT_EQ(taken, (std::vector{Act::drain_slice, Act::recreate_slice, Act::reset_gpu, Act::rescan,
                                Act::quarantine, Act::reboot}));
  const auto after_one = decide(fault(Act::drain_slice), host, std::span(before).first(1), acting, now + 9);
  EXPECT_NE(after_one.why.find("drain-slice helped, but not for long"), std::string::npos) << after_one.why;
  // Of another place, or long ago: it counts for nothing.
  EXPECT_EQ(decide(fault(Act::drain_slice, 4), host, before, acting, now + 9).act, Act::drain_slice);
  EXPECT_EQ(decide(fault(Act::drain_slice), host, before, acting, now + 9 + acting.relapse_s).act,
            Act::drain_slice);
}

TEST(Heal, AProgramThatFailsByItselfIsEndedEachTimeAndCostsNobodyElseAnything) {
  auto own = fault(Act::end_process);
  own.own = true;
  std::vector<Done> before;
  for (int i = 0; i < 50; ++i) {
    const auto next = decide(own, eight(), before, acting, now + i);
    EXPECT_EQ(next.act, Act::end_process);
    EXPECT_TRUE(next.now);
    EXPECT_TRUE(next.victims.empty());
    EXPECT_EQ(next.next, Act::none);
    before.push_back({.at_s = now + i, .act = next.act, .gpu = {"GPU-3"}, .gpu_instance = 1, .helped = true});
  }
  EXPECT_TRUE(decide(fault(Act::reset_gpu, 5), eight(), before, acting, now + 50).now) << "the breaker is closed";
}

TEST(Heal, NobodyIsHurtOnAGuess) {
  auto guess = fault(Act::reset_gpu);
  guess.sure = false;
  EXPECT_FALSE(decide(guess, eight(), {}, acting, now).now);
  auto empty = eight();
  for (auto& gpu : empty.gpus) gpu.leases.clear();
  EXPECT_TRUE(decide(guess, empty, {}, acting, now).now) << "nobody is there to lose anything";
  guess.remedy = Act::end_process;
  EXPECT_FALSE(decide(guess, empty, {}, acting, now).now);
}

TEST(Heal, TheBreakerOpensAfterSoManyActsAnHour) {
  std::vector<Done> before;
  for (unsigned i = 0; i < acting.most_an_hour; ++i)
    before.push_back({.at_s = now - 60, .act = Act::reset_gpu, .gpu = {fmt::format("GPU-{}", i + 4)}});
  const auto held = decide(fault(Act::reset_gpu), eight(), before, acting, now);
  EXPECT_FALSE(held.now);
  ASSERT_FALSE(held.held.empty());
  EXPECT_TRUE(decide(fault(Act::quarantine), eight(), before, acting, now).now)
      << "shutting a broken GPU is no experiment";
  EXPECT_TRUE(decide(fault(Act::reset_gpu), eight(), before, acting, now + 3600).now);
}

TEST(Heal, TheLastGpuThatServesIsLeftToAPerson) {
  auto host = eight();
  for (auto& gpu : host.gpus) gpu.serves = gpu.index == 3;
  for (const Act act : {Act::reset_gpu, Act::rescan, Act::quarantine}) {
    const auto held = decide(fault(act), host, {}, acting, now);
    EXPECT_FALSE(held.now) << name_of(act);
  }
  EXPECT_TRUE(decide(fault(Act::recreate_slice), host, {}, acting, now).now);
}

TEST(Heal, ObserveAndSuggestDoNothingAndSayTheSame) {
  for (const Mode mode : {Mode::observe, Mode::suggest}) {
    const auto said = decide(fault(Act::reset_gpu), eight(), {}, {.mode = mode}, now);
    EXPECT_FALSE(said.now);
    EXPECT_EQ(said.victims.size(), 2U);
    EXPECT_FALSE(said.commands.empty());
  }
  EXPECT_FALSE(decide(fault(Act::reboot), eight(), {}, acting, now).now) << "a reboot is a person's";
}

TEST(Heal, AGpuThatIsNotThereIsSaid) {
  auto gone = fault(Act::reset_gpu);
  gone.gpu = {"GPU-99"};
  const auto said = decide(gone, eight(), {}, acting, now);
  EXPECT_EQ(said.act, Act::none);
  EXPECT_FALSE(said.now);
}

TEST(Heal, WhatIsActedOnIsShutFirstAndCheckedBeforeItOpens) {
  for (std::size_t i = 1; i < acts; ++i) {
    const auto act = static_cast<Act>(i);
    const auto steps = decide(fault(act), eight(), {}, acting, now).steps;
    const auto at = [&](Step step) { return std::find(steps.begin(), steps.end(), step) - steps.begin(); };
    if (row_of(act).reach == Reach::process || row_of(act).reach == Reach::node) continue;
    EXPECT_LT(at(Step::cordon), at(Step::evict)) << name_of(act);
    if (act == Act::quarantine) {
      EXPECT_EQ(std::count(steps.begin(), steps.end(), Step::uncordon), 0);
      continue;
    }
    EXPECT_LT(at(Step::evict), at(Step::act)) << name_of(act);
    EXPECT_LT(at(Step::act), at(Step::uncordon)) << name_of(act);
    if (row_of(act).gate) {
      EXPECT_LT(at(Step::gate), at(Step::uncordon)) << name_of(act);
    }
  }
}

TEST(Heal, NamesComeBack) {
  for (std::size_t i = 0; i < acts; ++i)
    EXPECT_EQ(parse_act(name_of(static_cast<Act>(i))), static_cast<Act>(i));
  EXPECT_FALSE(parse_act("pray"));
  EXPECT_EQ(parse_mode("act"), Mode::act);
}

}  // namespace
}  // namespace bulkhead::heal
