#include "twin/ask/ask.hpp"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <functional>

#include "base/fd.hpp"
#include "twin/profile/profile.hpp"
#include "twin/state/state.hpp"

namespace bulkhead::twin {
namespace {

class AskedTwin : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/bulkhead-ask-XXXXXX";
    ASSERT_NE(::mkdtemp(name), nullptr);
    directory = name;
  }
  void TearDown() override { std::filesystem::remove_all(directory); }
  void up(const char* profile, const std::function<void(State&)>& change = {}) {
    auto machine = load_profile(profile, 1);
    ASSERT_TRUE(machine.ok()) << machine.error().message();
    machine->state->realtime = 0;
    if (change) change(*machine->state);
    ASSERT_TRUE(StateFile::create(directory / "state.bin", *machine->state).ok());
  }
  Result<Json> ask() { return ask_nvml(BULKHEAD_TWIN_LIBRARY, directory); }
  static Json recorded(const char* name) {
    const auto text = read_file(std::filesystem::path(BULKHEAD_SOURCE_DIR) / "tests/recorded" / name);
    return text.ok() ? parse_json(*text).value_or(Json()) : Json();
  }
  std::filesystem::path directory;
};

TEST_F(AskedTwin, of_the_recorded_h100_answers_every_question_as_it_did) {
  up("h100-vm");
  const auto answers = ask();
  ASSERT_TRUE(answers.ok()) << answers.error().message();
  const Json real = recorded("h100-sxm-80gb.json");
  ASSERT_FALSE(real.is_null());
  EXPECT_GT(count_questions(*answers), 590U);
  for (const Difference& d : compare(real, *answers)) {
    EXPECT_NE(d.kind, DifferenceKind::differs)
        << d.question << ": the board said " << d.real << ", the twin says " << d.twin;
  }
}

TEST_F(AskedTwin, that_lies_is_found_out) {
  up("h100-vm", [](State& state) { state.chips[0].memory_bus_bits = 4096; });
  const auto answers = ask();
  ASSERT_TRUE(answers.ok()) << answers.error().message();
  std::vector<std::string> differing;
  for (const Difference& d : compare(recorded("h100-sxm-80gb.json"), *answers)) {
    if (d.kind == DifferenceKind::differs) differing.push_back(d.question);
  }
  EXPECT_EQ(differing, (std::vector<std::string>{"nvmlDeviceGetMemoryBusWidth",
                                                 "nvmlDeviceGetRowRemapperHistogram.max"}));
}

TEST_F(AskedTwin, whose_driver_is_not_loaded_says_so) {
  up("h100-vm", [](State& state) { state.driver_loaded = 0; });
  const auto answers = ask();
  ASSERT_TRUE(answers.ok());
  EXPECT_EQ((*answers)["init"]["code"], 9);
}

TEST_F(AskedTwin, that_hangs_is_given_up_in_time) {
  up("h100-vm", [](State& state) {
    state.faults[0].kind = FaultKind::hang_call;
    state.faults[0].gpu = none;
    state.faults[0].remaining = none;
    state.faults[0].function.set("nvmlDeviceGetName");
  });
  const auto answers = ask_nvml(BULKHEAD_TWIN_LIBRARY, directory, 0, std::chrono::milliseconds(700));
  ASSERT_FALSE(answers.ok());
  EXPECT_EQ(answers.error().code(), Errc::timeout);
}

TEST_F(AskedTwin, whose_library_is_missing_is_an_error_with_a_hint) {
  const auto answers = ask_nvml(directory / "nowhere.so", directory);
  ASSERT_FALSE(answers.ok());
  EXPECT_EQ(answers.error().code(), Errc::unavailable);
  EXPECT_FALSE(answers.error().hint().empty());
}

TEST(Compare, sorts_differences_into_live_identity_and_the_rest) {
  const Json real = {{"nvmlDeviceGetPowerUsage", 70000},
                     {"nvmlDeviceGetUUID", "GPU-1"},
                     {"nvmlDeviceGetBrand", 14},
                     {"fields", {{"82", {0, 1, 30}}, {"91", {0, 1, 18}}}},
                     {"lat_us", 1}};
  const Json twin = {{"nvmlDeviceGetPowerUsage", 71000},
                     {"nvmlDeviceGetUUID", "GPU-2"},
                     {"nvmlDeviceGetBrand", 13},
                     {"fields", {{"82", {0, 1, 31}}, {"91", {3, 1, 18}}}}};
  std::vector<std::pair<std::string, DifferenceKind>> found;
  for (const Difference& d : compare(real, twin)) found.emplace_back(d.question, d.kind);
  EXPECT_EQ(found, (std::vector<std::pair<std::string, DifferenceKind>>{
                       {"nvmlDeviceGetPowerUsage", DifferenceKind::live},
                       {"nvmlDeviceGetUUID", DifferenceKind::identity},
                       {"nvmlDeviceGetBrand", DifferenceKind::differs},
                       {"fields.82[2]", DifferenceKind::live},
                       {"fields.91[0]", DifferenceKind::differs}}));
}

}  // namespace
}  // namespace bulkhead::twin
