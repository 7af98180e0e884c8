// Against the twin's libnvidia-ml.so.1, with what drivers do wrong.
#include "engine/sample/sample.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <thread>

#include "base/clock.hpp"
#include "edge/nvml/nvml.hpp"
#include "twin/control/control.hpp"

namespace bulkhead::sample {
namespace {

namespace fs = std::filesystem;

TEST(SamplePeriods, FollowTheCostUntilTheBudgetIsKept) {
  EXPECT_EQ(period_ms(100, 20, 0.001, 100), 100);       // 20 us in 100 ms: well inside
  EXPECT_EQ(period_ms(1000, 4000, 0.001, 100), 4000);   // 4 ms at a thousandth of a core
  EXPECT_EQ(period_ms(1000, 4010, 0.001, 100), 4100);   // on the grid
  EXPECT_EQ(period_ms(1000, 1e9, 0.001, 100), 60'000);  // at least once a minute, whatever it costs
  EXPECT_EQ(period_ms(0, 0, 0, 100), 100);
  EXPECT_EQ(period_ms(100, 11'000, 0.001, 100, 2000), 2000);  // what is watched is never older
  EXPECT_EQ(period_ms(5000, 1, 0.001, 100, 2000), 5000);      // nor asked more often than wished
}

TEST(SamplePeriods, OneRoundThatCostHundredTimesAsMuchStretchesThemLittle) {
  const double cost = smoothed_cost(20, 11'000);
  EXPECT_LT(period_ms(100, cost, 0.001, 100), 200);
  double lasting = 20;
  for (int i = 0; i < 20; ++i) lasting = smoothed_cost(lasting, 11'000);
  EXPECT_GT(lasting, 9'000);  // one that stays is believed soon
}

class SampleTest : public testing::Test {
 protected:
  SampleTest() {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-sample-XXXXXX").string();
    directory_ = ::mkdtemp(pattern.data());
  }
  ~SampleTest() override { fs::remove_all(directory_); }

  void up(const std::string& profile) {
    const auto made =
        twin::up({.profile = profile, .directory = directory_ / "twin", .realtime = true, .init = false});
    ASSERT_TRUE(made.ok()) << made.error().message();
  }
  Settings settings() const {
    return {.library = (directory_ / "twin/lib/libnvidia-ml.so.1").string(),
            .tick_ms = 20,
            .gpm_ms = 100,
            .deadline_ms = 200};
  }
  fs::path twin() const { return directory_ / "twin"; }

  static bool until(const std::function<bool()>& holds) {
    for (unsigned i = 0; i < 1000; ++i) {
      if (holds()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }

  fs::path directory_;
};

TEST_F(SampleTest, EveryGpuTellsWhatItsChipCanAndAges) {
  up("dgx-h100");
  ASSERT_TRUE(twin::load(twin(), 2, {.watts = 500, .busy = 0.5}).ok());
  const Sampler sampler(settings());
  ASSERT_TRUE(sampler.wait_ready(20'000));
  ASSERT_TRUE(until([&] { return sampler.snapshot().gpus[2][Signal::power].number > 450; }));
  const Snapshot seen = sampler.snapshot();
  ASSERT_EQ(seen.gpus.size(), 8U);
  for (const Gpu& gpu : seen.gpus) {
    EXPECT_EQ(gpu.state, State::sampling);
    EXPECT_TRUE(gpu.gpm.value_or(false));
    EXPECT_FALSE(gpu.uuid.text.empty());
    for (const Signal signal :
         {Signal::power, Signal::temperature, Signal::margin, Signal::energy, Signal::clock_sm,
          Signal::memory_used, Signal::power_brake_ns, Signal::ecc_corrected}) {
      EXPECT_TRUE(gpu[signal].known()) << rows()[static_cast<std::size_t>(signal)].name;
      EXPECT_LE(gpu[signal].at_ns, seen.at_ns);
    }
  }
  EXPECT_TRUE(until([&] { return sampler.snapshot().gpus[2][Signal::sm].number > 30; }));
  EXPECT_LT(sampler.snapshot().gpus[3][Signal::sm].number, 5);
}

TEST_F(SampleTest, AChipWithoutGpmSaysSo) {
  up("dgx-a100");
  const Sampler sampler(settings());
  ASSERT_TRUE(sampler.wait_ready(20'000));
  const Snapshot seen = sampler.snapshot();
  ASSERT_FALSE(seen.gpus.empty());
  EXPECT_EQ(seen.gpus[0].gpm, std::optional(false));
  EXPECT_FALSE(seen.gpus[0][Signal::sm].known());
  EXPECT_EQ(seen.gpus[0][Signal::sm].refused, std::optional(Errc::unsupported));
  EXPECT_TRUE(seen.gpus[0][Signal::power_average].known());
}

TEST_F(SampleTest, AHungCallCostsItsGpuAlone) {
  up("dgx-h100");
  auto sampler = std::make_unique<Sampler>(settings());
  ASSERT_TRUE(sampler->wait_ready(20'000));
  ASSERT_TRUE(
      twin::break_it(
          twin(), {.name = "hang-call", .gpu = 3, .function = "nvmlDeviceGetTemperature", .delay_ms = 3'000})
          .ok());
  ASSERT_TRUE(until([&] { return sampler->snapshot().gpus[3].state == State::hung; }));
  const Snapshot first = sampler->snapshot();
  EXPECT_EQ(first.gpus[3].call, "nvmlDeviceGetTemperature");
  ASSERT_TRUE(until([&] { return sampler->snapshot().gpus[0][Signal::temperature].at_ns > first.at_ns; }));
  const Snapshot second = sampler->snapshot();
  for (const Gpu& gpu : second.gpus) {
    if (gpu.index == 3) {
      EXPECT_EQ(gpu[Signal::temperature].at_ns,
                first.gpus[3][Signal::temperature].at_ns);  // old, and says so
    } else {
      EXPECT_EQ(gpu.state, State::sampling) << gpu.index;
    }
  }
  // It comes back by itself.
  ASSERT_TRUE(twin::mend(twin(), "hang-call", 3).ok());
  EXPECT_TRUE(until([&] {
    const Snapshot now = sampler->snapshot();
    return now.gpus[3].state == State::sampling && now.gpus[3][Signal::temperature].at_ns > second.at_ns;
  }));
}

TEST_F(SampleTest, ADriverThatHangsForEverDoesNotHoldTheProgram) {
  up("h100-vm");
  ASSERT_TRUE(twin::break_it(twin(), {.name = "hang-call",
                                      .gpu = 0,
                                      .function = "nvmlDeviceGetFieldValues",
                                      .delay_ms = 4'000,
                                      .times = 1})
                  .ok());
  const std::uint64_t start = monotonic_ns();
  {
    const Sampler sampler(settings());
    EXPECT_FALSE(sampler.wait_ready(300));
    EXPECT_TRUE(until([&] {
      const Snapshot now = sampler.snapshot();
      return !now.gpus.empty() && now.gpus[0].state == State::hung;
    }));
  }
  EXPECT_LT(monotonic_ns() - start, 3'900'000'000U);
  std::this_thread::sleep_for(std::chrono::milliseconds(4'500));  // it ends behind us, in its own time
}

TEST_F(SampleTest, NoDriverIsSaidNotWaitedFor) {
  const Sampler sampler({.library = (directory_ / "nothing.so").string()});
  EXPECT_TRUE(sampler.wait_ready(20'000));
  const Snapshot seen = sampler.snapshot();
  EXPECT_TRUE(seen.gpus.empty());
  EXPECT_THAT(seen.why, testing::HasSubstr("no NVIDIA driver library"));
}

TEST_F(SampleTest, ALostGpuKeepsItsLastValuesAndSaysThatItIsLost) {
  up("dgx-h100");
  const Sampler sampler(settings());
  ASSERT_TRUE(sampler.wait_ready(20'000));
  ASSERT_TRUE(twin::break_it(twin(), {.name = "off-the-bus", .gpu = 5}).ok());
  ASSERT_TRUE(until([&] { return sampler.snapshot().gpus[5].state == State::lost; }));
  const Snapshot seen = sampler.snapshot();
  EXPECT_FALSE(seen.gpus[5].why.empty());
  EXPECT_TRUE(seen.gpus[5][Signal::power].known());
  EXPECT_EQ(seen.gpus[4].state, State::sampling);
}

TEST_F(SampleTest, AFailedCallIsAskedAgainSoon) {
  up("h100-vm");
  const Sampler sampler(settings());
  ASSERT_TRUE(sampler.wait_ready(20'000));
  ASSERT_TRUE(
      twin::break_it(
          twin(),
          {.name = "fail-call", .gpu = 0, .function = "nvmlDeviceGetFieldValues", .code = 999, .times = 3})
          .ok());
  const std::uint64_t broken = monotonic_ns();
  EXPECT_TRUE(until([&] { return sampler.snapshot().gpus[0][Signal::power].at_ns > broken + 100'000'000; }));
}

TEST_F(SampleTest, SlicesAreSampledEachByItselfAndAnotherOneOfTheSameNumberBeginsAnew) {
  up("dgx-h100");
  const auto driver = nvml::Nvml::open(settings().library);
  ASSERT_TRUE(driver.ok());
  const auto gpu = (*driver)->device(0U);
  ASSERT_TRUE(gpu.ok() && (*driver)->set_mig_mode(*gpu, true).ok());
  std::vector<unsigned> ids;
  for (unsigned i = 0; i < 2; ++i) {
    const auto made = (*driver)->create_instance(*gpu, 9, {4 * i, 4});  // 3g
    ASSERT_TRUE(made.ok()) << made.error().message();
    ASSERT_TRUE((*driver)->create_compute(*gpu, made->id, 0).ok());
    ids.push_back(made->id);
  }
  ASSERT_TRUE(
      twin::attach(
          twin(),
          {.gpu = 0, .gpu_instance = ids[0], .compute_instance = 0, .memory_bytes = 5ULL << 30U, .busy = 0.9})
          .ok());
  Sampler sampler(settings());
  ASSERT_TRUE(sampler.wait_ready(20'000));
  const auto slice = [&](unsigned id) {
    const Snapshot now = sampler.snapshot();
    for (const Slice& one : now.gpus[0].slices) {
      if (one.gpu_instance == id) return one;
    }
    return Slice{};
  };
  const auto of = [](const Slice& one, Signal signal) {
    return one.values[static_cast<std::size_t>(signal)];
  };
  ASSERT_TRUE(until([&] { return of(slice(ids[0]), Signal::sm).number > 50; }));
  EXPECT_TRUE(until([&] { return of(slice(ids[1]), Signal::sm).known(); }));
  EXPECT_LT(of(slice(ids[1]), Signal::sm).number, 5);
  EXPECT_TRUE(until(
      [&] { return of(slice(ids[0]), Signal::memory_used).number >= static_cast<double>(5ULL << 30U); }));
  EXPECT_FALSE(slice(ids[0]).uuid.text.empty());
  // The second goes and another takes its number.
  ASSERT_TRUE((*driver)->destroy_compute(*gpu, ids[1], 0).ok());
  ASSERT_TRUE((*driver)->destroy_instance(*gpu, ids[1]).ok());
  EXPECT_TRUE(until([&] { return sampler.snapshot().gpus[0].slices.size() == 1; }));
  ASSERT_TRUE((*driver)->create_instance(*gpu, 9, {4, 4}).ok());
  ASSERT_TRUE((*driver)->create_compute(*gpu, ids[1], 0).ok());
  sampler.hurry(0, Tier::layout);
  EXPECT_TRUE(until([&] { return sampler.snapshot().gpus[0].slices.size() == 2; }));
  EXPECT_LT(of(slice(ids[1]), Signal::sm).number, 5);
}

TEST_F(SampleTest, EverybodyLetsGoOfTheDriverToRestAndComesBack) {
  up("dgx-h100");
  Sampler sampler(settings());
  ASSERT_TRUE(sampler.wait_ready(20'000));
  EXPECT_TRUE(sampler.rest(10'000));
  const Snapshot resting = sampler.snapshot();
  for (const Gpu& gpu : resting.gpus) EXPECT_EQ(gpu.state, State::resting);
  sampler.resume();
  EXPECT_TRUE(until([&] { return sampler.snapshot().gpus[7][Signal::power].at_ns > resting.at_ns; }));
}

TEST_F(SampleTest, ThePastIsKept) {
  up("h100-vm");
  const Sampler sampler(settings());
  ASSERT_TRUE(sampler.wait_ready(20'000));
  const auto past = [&] {
    return sampler.history(0, std::nullopt, Signal::power, 0, ~std::uint64_t{0} / 2,
                           history::History::Grain::second);
  };
  ASSERT_TRUE(until([&] { return past().size() >= 2; }));
  EXPECT_NEAR(past()[0].mean, sampler.snapshot().gpus[0][Signal::power].number, 30);
  EXPECT_GT(sampler.history_bytes(), 0U);
  EXPECT_TRUE(
      sampler.history(9, std::nullopt, Signal::power, 0, 10, history::History::Grain::second).empty());
  EXPECT_TRUE(sampler.history(0, 3, Signal::power, 0, 10, history::History::Grain::second).empty());
}

}  // namespace
}  // namespace bulkhead::sample
