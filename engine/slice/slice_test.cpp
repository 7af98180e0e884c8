// Instances cut for leases, on a twin: made, taken away, in use, cut off, hung.
#include "engine/slice/slice.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>

#include "engine/execute/execute.hpp"
#include "twin/control/control.hpp"

namespace bulkhead::slice {
namespace {

namespace fs = std::filesystem;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;

class SliceTest : public testing::Test {
 protected:
  SliceTest() {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-slice-XXXXXX").string();
    directory_ = ::mkdtemp(pattern.data());
    const auto made =
        twin::up({.profile = "dgx-h100", .directory = twin(), .realtime = false, .init = false});
    EXPECT_TRUE(made.ok()) << made.error().message();
    const auto seen = observe();
    for (const auto& gpu : seen.gpus) gpus_.push_back(gpu.uuid);
    EXPECT_EQ(gpus_.size(), 8U);
  }
  ~SliceTest() override { fs::remove_all(directory_); }

  fs::path twin() const { return directory_ / "twin"; }
  Settings settings() const {
    return {.access = {.root = twin() / "root",
                       .nvml_library = (twin() / "lib/libnvidia-ml.so.1").string(),
                       .state_dir = twin() / "root/var/lib/bulkhead"},
            .grace = std::chrono::milliseconds(300),
            .lock_wait = std::chrono::milliseconds(200)};
  }
  inventory::Host observe() const {
    auto seen = observe::host(settings().access);
    EXPECT_TRUE(seen.ok()) << (seen.ok() ? "" : seen.error().message());
    return seen.ok() ? std::move(seen).value() : inventory::Host{};
  }
  // "0: 3g.40gb@0 1g.10gb@4", one for each GPU in MIG mode.
  std::vector<std::string> layout() const {
    std::vector<std::string> out;
    for (const auto& gpu : observe().gpus) {
      if (!gpu.mig_now) continue;
      std::vector<std::string> words;
      for (const auto& instance : gpu.instances)
        words.push_back(" " + instance.name + "@" + std::to_string(instance.place.start));
      std::sort(words.begin(), words.end());
      std::string line = std::to_string(gpu.index) + ":";
      for (const auto& word : words) line += word;
      out.push_back(line);
    }
    return out;
  }
  std::vector<Device> create(std::vector<Place> places) const {
    auto made = change(settings(), {.create = std::move(places)});
    EXPECT_TRUE(made.ok()) << (made.ok() ? "" : made.error().message());
    return made.ok() ? std::move(made).value() : std::vector<Device>{};
  }
  void broken(const std::string& name, const std::string& function, std::uint64_t delay_ms = 0) const {
    twin::FaultRequest fault{.name = name, .function = function};
    fault.delay_ms = delay_ms;
    fault.times = 1;
    ASSERT_TRUE(twin::break_it(twin(), fault).ok());
  }

  fs::path directory_;
  std::vector<Uuid> gpus_;
};

TEST_F(SliceTest, TheFirstInstanceOfAGpuTurnsMigModeOnAndTouchesNoOtherGpu) {
  const auto made = create({{gpus_[2], "3g.40gb", 4}, {gpus_[2], "1g.10gb", 0}});
  ASSERT_EQ(made.size(), 2U);
  EXPECT_THAT(layout(), ElementsAre("2: 1g.10gb@0 3g.40gb@4"));
  EXPECT_TRUE(made[0].device.text.starts_with("MIG-"));
  EXPECT_GT(made[0].generation, 0);
  EXPECT_NE(made[0].generation, made[1].generation);
  EXPECT_GT(made[0].memory.count, 35'000'000'000U);
  ASSERT_EQ(made[0].device_nodes.size(), 6U);
  EXPECT_EQ(made[0].device_nodes[0], "/dev/nvidia2");
  for (const auto& node : made[0].device_nodes)
    EXPECT_TRUE(fs::exists(twin() / "root" / fs::path(node).relative_path())) << node;
}

TEST_F(SliceTest, InstancesOfOtherLeasesStayAndAUuidThatComesBackHasAnotherGeneration) {
  const auto first = create({{gpus_[0], "2g.20gb", 0}});
  const auto second = create({{gpus_[0], "2g.20gb", 2}, {gpus_[1], "7g.80gb", 0}});
  ASSERT_EQ(first.size() + second.size(), 3U);
  EXPECT_THAT(layout(), ElementsAre("0: 2g.20gb@0 2g.20gb@2", "1: 7g.80gb@0"));
  const auto gone = change(settings(), {.destroy = {first[0].place}});
  ASSERT_TRUE(gone.ok()) << gone.error().message();
  EXPECT_THAT(layout(), ElementsAre("0: 2g.20gb@2", "1: 7g.80gb@0"));
  const auto again = create({first[0].place});
  ASSERT_EQ(again.size(), 1U);
  EXPECT_EQ(again[0].device, first[0].device);
  EXPECT_GT(again[0].generation, second[1].generation);
}

TEST_F(SliceTest, OneChangeDestroysBeforeItCreates) {
  create({{gpus_[0], "3g.40gb", 0}, {gpus_[0], "3g.40gb", 4}});
  const auto made = change(settings(), {.destroy = {{gpus_[0], "3g.40gb", 0}},
                                        .create = {{gpus_[0], "1g.10gb", 1}, {gpus_[0], "1g.10gb", 0}}});
  ASSERT_TRUE(made.ok()) << made.error().message();
  EXPECT_EQ((*made)[0].place.start, 1U);
  EXPECT_THAT(layout(), ElementsAre("0: 1g.10gb@0 1g.10gb@1 3g.40gb@4"));
  const auto history = execute::history(settings().access, std::nullopt);
  ASSERT_TRUE(history.ok());
  EXPECT_EQ(history->size(), 2U);
  EXPECT_EQ(history->front().run.verb, "lease");
}

TEST_F(SliceTest, AskedTwiceItIsDoneOnce) {
  const Place place{gpus_[0], "1g.10gb", 3};
  const auto first = create({place});
  const auto second = create({place});
  ASSERT_EQ(first.size() + second.size(), 2U);
  EXPECT_EQ(first[0].generation, second[0].generation);
  ASSERT_TRUE(change(settings(), {.destroy = {place}}).ok());
  EXPECT_TRUE(change(settings(), {.destroy = {place}}).ok());
}

TEST_F(SliceTest, WhatIsInUseIsNotDestroyedAndTheAnswerSaysByWhom) {
  const auto made = create({{gpus_[0], "1g.10gb", 0}, {gpus_[0], "1g.10gb", 1}});
  ASSERT_EQ(made.size(), 2U);
  const auto pid = twin::attach(twin(), {.gpu = 0,
                                         .gpu_instance = made[0].gpu_instance,
                                         .compute_instance = made[0].compute_instance,
                                         .name = "train"});
  ASSERT_TRUE(pid.ok());
  const auto gone = change(settings(), {.destroy = {made[1].place, made[0].place}});
  ASSERT_FALSE(gone.ok());
  EXPECT_EQ(gone.error().code(), Errc::in_use);
  EXPECT_THAT(gone.error().message(), HasSubstr("train"));
  EXPECT_THAT(layout(), ElementsAre("0: 1g.10gb@0 1g.10gb@1"));
}

TEST_F(SliceTest, AGpuWithAProcessDoesNotGoIntoMigMode) {
  ASSERT_TRUE(twin::attach(twin(), {.gpu = 5, .name = "train"}).ok());
  const auto made = change(settings(), {.create = {{gpus_[5], "1g.10gb", 0}}});
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.error().code(), Errc::in_use);
  EXPECT_TRUE(layout().empty());
}

TEST_F(SliceTest, WhatDoesNotFitOrDoesNotExistIsSaid) {
  create({{gpus_[0], "3g.40gb", 0}});
  const auto code = [&](Change asked) {
    const auto made = change(settings(), asked);
    EXPECT_FALSE(made.ok());
    return made.ok() ? Errc::io : made.error().code();
  };
  EXPECT_EQ(code({.create = {{gpus_[0], "1g.10gb", 2}}}), Errc::no_capacity);
  EXPECT_EQ(code({.create = {{gpus_[0], "5g.60gb", 4}}}), Errc::not_found);
  EXPECT_EQ(code({.create = {{gpus_[0], "3g.40gb", 2}}}), Errc::not_found);
  EXPECT_EQ(code({.create = {{{"GPU-none"}, "3g.40gb", 4}}}), Errc::not_found);
  EXPECT_EQ(code({.create = {{gpus_[0], "1g.10gb", 4}, {gpus_[0], "1g.10gb", 4}}}), Errc::no_capacity);
  EXPECT_THAT(layout(), ElementsAre("0: 3g.40gb@0"));
}

TEST_F(SliceTest, AFailureHalfWayLeavesTheHostAsItWas) {
  create({{gpus_[0], "3g.40gb", 0}});
  broken("fail-call", "nvmlGpuInstanceCreateComputeInstance");
  const auto made = change(settings(), {.destroy = {{gpus_[0], "3g.40gb", 0}},
                                        .create = {{gpus_[0], "1g.10gb", 0}, {gpus_[1], "1g.10gb", 0}}});
  EXPECT_FALSE(made.ok());
  EXPECT_THAT(layout(), ElementsAre("0: 3g.40gb@0"));
}

TEST_F(SliceTest, LookFindsWhatIsThereAndNamesWhatIsNot) {
  const auto made = create({{gpus_[0], "3g.40gb", 0}, {gpus_[3], "1g.10gb", 6}});
  ASSERT_EQ(made.size(), 2U);
  const std::vector<Place> both = {made[1].place, made[0].place};
  const auto seen = look(settings(), both);
  ASSERT_TRUE(seen.ok()) << seen.error().message();
  EXPECT_EQ((*seen)[0].device, made[1].device);
  EXPECT_EQ((*seen)[1].generation, made[0].generation);
  const std::vector<Place> absent = {made[0].place, {gpus_[3], "1g.10gb", 5}};
  const auto none = look(settings(), absent);
  ASSERT_FALSE(none.ok());
  EXPECT_EQ(none.error().code(), Errc::not_found);
  EXPECT_THAT(none.error().message(), HasSubstr("1g.10gb at 5"));
}

TEST_F(SliceTest, ARollbackIsNotForLeasesAndDoesNotTakeTheModeFromBelowThem) {
  spec::NodeFile node;
  node.gpus.push_back({.mode = spec::Mode::mig});
  node.gpus.back().select.uuid = {gpus_[0]};
  const execute::Options options{.access = settings().access};
  ASSERT_TRUE(execute::apply(options, node, spec::to_yaml(node)).ok());
  const auto made = create({{gpus_[0], "3g.40gb", 0}, {gpus_[1], "1g.10gb", 0}});
  ASSERT_EQ(made.size(), 2U);
  const auto refused = execute::rollback(options);
  ASSERT_TRUE(refused.ok()) << refused.error().message();
  EXPECT_EQ(refused->verdict, execute::Verdict::refused);
  EXPECT_THAT(layout(), ElementsAre("0: 3g.40gb@0", "1: 1g.10gb@0"));
  ASSERT_TRUE(change(settings(), {.destroy = {made[0].place}}).ok());
  const auto back = execute::rollback(options);
  ASSERT_TRUE(back.ok()) << back.error().message();
  EXPECT_EQ(back->verdict, execute::Verdict::rolled_back);
  EXPECT_THAT(layout(), ElementsAre("1: 1g.10gb@0"));
}

TEST_F(SliceTest, AChangeDoesNotLetGoOfALockOnTheClocks) {
  spec::NodeFile node;
  node.gpus.push_back(
      {.mode = spec::Mode::exclusive, .clocks = spec::ClockLock{Megahertz(1200), Megahertz(1500)}});
  node.gpus.back().select.uuid = {gpus_[0]};
  ASSERT_TRUE(execute::apply({.access = settings().access}, node, spec::to_yaml(node)).ok());
  create({{gpus_[0], "1g.10gb", 0}});
  const auto history = execute::history(settings().access, std::nullopt);
  ASSERT_TRUE(history.ok());
  for (const auto& step : history->front().steps) EXPECT_NE(step.kind, "lock-clocks");
}

TEST_F(SliceTest, WhileAnotherBulkheadChangesTheHostItIsUnavailable) {
  create({{gpus_[0], "1g.10gb", 0}});
  const auto lock = store::Lock::take(settings().access.state_dir, "apply");
  ASSERT_TRUE(lock.ok());
  const auto made = change(settings(), {.create = {{gpus_[0], "1g.10gb", 1}}});
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.error().code(), Errc::unavailable);
}

TEST_F(SliceTest, AfterAKillTheSameChangeMayBeAskedAgain) {
  create({{gpus_[1], "1g.10gb", 0}});
  const Change asked{.destroy = {{gpus_[1], "1g.10gb", 0}},
                     .create = {{gpus_[0], "3g.40gb", 0}, {gpus_[0], "3g.40gb", 4}}};
  for (useconds_t after = 0; after < 200'000; after += 23'000) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      (void)change(settings(), asked);
      ::_exit(0);
    }
    ::usleep(after);
    ::kill(child, SIGKILL);
    ASSERT_EQ(::waitpid(child, nullptr, 0), child);
    const auto made = change(settings(), asked);
    ASSERT_TRUE(made.ok()) << made.error().message();
    EXPECT_THAT(layout(), ElementsAre("0: 3g.40gb@0 3g.40gb@4", "1:"));
    const Change back{.destroy = asked.create, .create = asked.destroy};
    ASSERT_TRUE(change(settings(), back).ok());
    EXPECT_THAT(layout(), ElementsAre("0:", "1: 1g.10gb@0"));
  }
}

}  // namespace
}  // namespace bulkhead::slice
