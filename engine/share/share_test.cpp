#include "engine/share/share.hpp"

#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

#include <fstream>

#include "engine/share/registry.hpp"

namespace bulkhead::share {
namespace {

namespace fs = std::filesystem;

class Registry : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/bulkhead-share-XXXXXX";
    ASSERT_NE(::mkdtemp(name), nullptr);
    place_.root = name;
  }
  void TearDown() override { fs::remove_all(place_.root); }
  static Asked tenant(std::uint64_t id, std::string name) {
    Asked asked;
    asked.id = id;
    asked.name = std::move(name);
    asked.command = {"sleep", "1"};
    return asked;
  }
  static Now with_group(std::uint32_t gpu) {
    Now now;
    now.groups.push_back({.pid = 1,
                          .start_time = 2,
                          .gpu = gpu,
                          .client = 3,
                          .subdevice = 4,
                          .handle = 5,
                          .channels = {6, 7},
                          .fd = 8});
    return now;
  }
  Place place_;
};

TEST_F(Registry, what_was_asked_reads_back_as_it_was_written) {
  auto asked = tenant(4711, "train");
  asked.cls = sharing::Class::interactive;
  asked.weight = 30;
  asked.ceiling = 25;
  asked.latency_us = 5000;
  asked.memory = Bytes(20ULL << 30U);
  asked.on_escape = OnEscape::pause;
  asked.gpu = "GPU-1";
  const auto entry = Entry::enter(place_, asked);
  ASSERT_TRUE(entry.ok()) << entry.error().message();
  auto now = with_group(3);
  now.busy = 0.5;
  now.troubles = {"a \"quoted\" trouble"};
  ASSERT_TRUE(entry->write(now).ok());
  const auto all = read_all(place_, 4711);
  ASSERT_EQ(all.size(), 1U);
  EXPECT_EQ(to_json(all[0].asked), to_json(asked));
  ASSERT_TRUE(all[0].now);
  EXPECT_EQ(to_json(*all[0].now), to_json(now));
}

TEST_F(Registry, a_tenant_lives_as_long_as_somebody_holds_its_lock) {
  {
    const auto entry = Entry::enter(place_, tenant(1, "a"));
    ASSERT_TRUE(entry.ok());
    const UniqueFd second(::dup(entry->lock()));  // the arbiter's
    ASSERT_EQ(read_all(place_).size(), 1U);
    EXPECT_TRUE(read_all(place_)[0].alive);
    EXPECT_EQ(list(place_)->size(), 1U);
  }
  ASSERT_EQ(read_all(place_).size(), 1U);
  EXPECT_FALSE(read_all(place_)[0].alive);
  EXPECT_TRUE(list(place_)->empty());
}

TEST_F(Registry, names_are_unique_among_the_living) {
  auto first = Entry::enter(place_, tenant(1, "a"));
  ASSERT_TRUE(first.ok());
  const auto second = Entry::enter(place_, tenant(2, "a"));
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.error().code(), Errc::in_use);
  first->leave();
  EXPECT_TRUE(Entry::enter(place_, tenant(2, "a")).ok());
}

TEST_F(Registry, garbage_in_the_directory_is_nobody) {
  fs::create_directories(place_.run_dir());
  for (const char* name : {"1.json", "x.json", "2.now.json", "99999999999999999999.json"})
    std::ofstream(place_.run_dir() / name) << "{]";
  std::ofstream(place_.run_dir() / "3.json")
      << R"({"id": 4, "class": "batch", "weight": 1})";  // not its own id
  std::ofstream(place_.run_dir() / "5.json")
      << R"({"id": 5, "class": "batch", "weight": 1e99})";  // no number of ours
  std::ofstream(place_.run_dir() / "6.json") << R"({"id": 6, "class": "royal", "weight": 10})";
  EXPECT_TRUE(read_all(place_).empty());
}

TEST_F(Registry, set_changes_a_live_tenant_and_nobody_else) {
  const auto entry = Entry::enter(place_, tenant(1, "a"));
  ASSERT_TRUE(entry.ok());
  EXPECT_EQ(set(place_, "b", [](Asked&) { return ok_status(); }).error().code(), Errc::not_found);
  const auto changed = set(place_, "a", [](Asked& asked) { return asked.weight = 7, ok_status(); });
  ASSERT_TRUE(changed.ok());
  EXPECT_EQ(read_all(place_)[0].asked.weight, 7U);
  const auto refused = set(place_, "1", [](Asked&) -> Status { return Error(Errc::invalid, "no"); });
  EXPECT_FALSE(refused.ok());
  EXPECT_EQ(read_all(place_)[0].asked.weight, 7U);
}

TEST_F(Registry, only_tenants_with_groups_on_a_gpu_are_in_its_plan) {
  std::vector<Tenant> all(3);
  for (std::uint64_t i = 0; i < 3; ++i) all[i].asked = tenant(i + 1, "t");
  all[0].now = with_group(0);
  all[1].now = with_group(1);
  all[2].now = Now{};
  const auto here = plan_of(all, 0, {});
  ASSERT_EQ(here.plan.lines.size(), 1U);
  EXPECT_EQ(here.plan.lines[0].id, 1U);
  all[0].alive = false;
  EXPECT_TRUE(plan_of(all, 0, {}).plan.lines.empty());
}

}  // namespace
}  // namespace bulkhead::share
