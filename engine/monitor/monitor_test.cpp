// The sampler's process, against the twin's driver: what it says, and what becomes of it.
#include "engine/monitor/monitor.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <random>
#include <thread>

#include "base/clock.hpp"
#include "twin/control/control.hpp"

namespace bulkhead::monitor {

using namespace sample;
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

bool until(const std::function<bool()>& holds) {
  for (unsigned i = 0; i < 1500; ++i) {
    if (holds()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return false;
}

bool alive(int pid) { return ::kill(pid, 0) == 0; }

class MonitorTest : public testing::Test {
 protected:
  MonitorTest() {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-monitor-XXXXXX").string();
    directory_ = ::mkdtemp(pattern.data());
  }
  ~MonitorTest() override { fs::remove_all(directory_); }
  void up(const std::string& profile) {
    const auto made =
        twin::up({.profile = profile, .directory = directory_ / "twin", .realtime = true, .init = false});
    ASSERT_TRUE(made.ok()) << made.error().message();
  }
  fs::path twin() const { return directory_ / "twin"; }
  Settings settings() const {
    return {.library = (directory_ / "twin/lib/libnvidia-ml.so.1").string(),
            .tick_ms = 20,
            .gpm_ms = 100,
            .deadline_ms = 200};
  }
  Program quick() const {
    Program program;
    program.first_wait_ms = 20;
    return program;
  }
  fs::path directory_;
};

TEST_F(MonitorTest, TellsWhatASamplerInItsProcessTells) {
  up("dgx-h100");
  Monitor monitor(settings(), quick());
  ASSERT_TRUE(monitor.wait_ready(20'000));
  const Snapshot seen = monitor.snapshot();
  ASSERT_EQ(seen.gpus.size(), 8U);
  EXPECT_EQ(seen.gpus[2].state, State::sampling);
  EXPECT_FALSE(seen.gpus[2].uuid.text.empty());
  EXPECT_TRUE(seen.gpus[2][Signal::power].known());
  EXPECT_LE(seen.gpus[2][Signal::power].at_ns, monotonic_ns());
  EXPECT_NE(monitor.pid(), 0);
  ASSERT_TRUE(until([&] {
    return monitor
               .history(0, std::nullopt, Signal::power, 0, ~std::uint64_t{0} / 2,
                        history::History::Grain::second)
               .size() >= 2;
  }));
  EXPECT_GT(monitor.history_bytes(), 0U);
  EXPECT_TRUE(monitor.history(0, 3, Signal::power, 0, 10, history::History::Grain::minute).empty());
  const auto before = monitor.snapshot().gpus[1].tier[static_cast<std::size_t>(Tier::layout)].rounds;
  monitor.hurry(1, Tier::layout);
  monitor.hurry(77, Tier::layout);  // nobody
  EXPECT_TRUE(until([&] {
    return monitor.snapshot().gpus[1].tier[static_cast<std::size_t>(Tier::layout)].rounds > before;
  }));
}

TEST_F(MonitorTest, AProcessThatDiesIsStartedAgainAndTheSnapshotSaysSoMeanwhile) {
  up("h100-vm");
  Program program = quick();
  program.first_wait_ms = 500;
  Monitor monitor(settings(), program);
  ASSERT_TRUE(monitor.wait_ready(20'000));
  const Snapshot before = monitor.snapshot();
  ASSERT_EQ(before.gpus.size(), 1U);
  const int first = monitor.pid();
  const auto past = [&] {
    return monitor.history(0, std::nullopt, Signal::power, 0, ~std::uint64_t{0} / 2,
                           history::History::Grain::second);
  };
  ASSERT_TRUE(until([&] { return past().size() >= 2; }));
  const auto seen = past();
  ASSERT_EQ(::kill(first, SIGKILL), 0);
  ASSERT_TRUE(until([&] { return monitor.restarts() == 1; }));
  const Snapshot between = monitor.snapshot();
  EXPECT_THAT(between.why, HasSubstr("signal 9"));
  ASSERT_EQ(between.gpus.size(), 1U);
  EXPECT_EQ(between.gpus[0].state, State::lost);
  EXPECT_EQ(between.gpus[0].uuid, before.gpus[0].uuid);
  EXPECT_TRUE(between.gpus[0][Signal::power].known());  // old, as its time says
  ASSERT_TRUE(until([&] {
    const Snapshot now = monitor.snapshot();
    return now.gpus[0].state == State::sampling && now.gpus[0][Signal::power].at_ns > between.at_ns;
  }));
  EXPECT_NE(monitor.pid(), first);
  EXPECT_EQ(monitor.snapshot().why, "");
  // What it had seen is still known, and goes on.
  ASSERT_TRUE(until([&] { return past().size() > seen.size(); }));
  EXPECT_EQ(past().front().at_s, seen.front().at_s);
  EXPECT_EQ(past().front().mean, seen.front().mean);
}

TEST_F(MonitorTest, RestsAreCounted) {
  up("h100-vm");
  Monitor monitor(settings(), quick());
  ASSERT_TRUE(monitor.wait_ready(20'000));
  const auto state = [&] { return monitor.snapshot().gpus.at(0).state; };
  ASSERT_TRUE(monitor.rest(5'000));
  ASSERT_TRUE(monitor.rest(5'000));
  EXPECT_EQ(state(), State::resting);
  monitor.resume();
  EXPECT_EQ(state(), State::resting);
  monitor.resume();
  EXPECT_TRUE(until([&] { return state() == State::sampling; }));
  monitor.resume();  // once too often: nothing
  ASSERT_TRUE(monitor.rest(5'000));
  EXPECT_EQ(state(), State::resting);
}

TEST_F(MonitorTest, EndsWithTheProcessThatAsked) {
  up("h100-vm");
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const pid_t parent = ::fork();
  if (parent == 0) {
    Monitor monitor(settings(), quick());
    (void)monitor.wait_ready(20'000);
    const int pid = monitor.pid();
    (void)!::write(ends[1], &pid, sizeof pid);
    ::pause();
    ::_exit(0);
  }
  int pid = 0;
  ASSERT_EQ(::read(ends[0], &pid, sizeof pid), static_cast<ssize_t>(sizeof pid));
  ASSERT_GT(pid, 0);
  EXPECT_TRUE(alive(pid));
  ASSERT_EQ(::kill(parent, SIGKILL), 0);
  ASSERT_EQ(::waitpid(parent, nullptr, 0), parent);
  EXPECT_TRUE(until([&] { return !alive(pid); }));
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST_F(MonitorTest, EndsWithTheMonitor) {
  up("h100-vm");
  int pid = 0;
  {
    Monitor monitor(settings(), quick());
    ASSERT_TRUE(monitor.wait_ready(20'000));
    pid = monitor.pid();
  }
  EXPECT_FALSE(alive(pid));
}

TEST_F(MonitorTest, RestsAndComesBack) {
  up("dgx-h100");
  Monitor monitor(settings(), quick());
  ASSERT_TRUE(monitor.wait_ready(20'000));
  const int pid = monitor.pid();
  EXPECT_TRUE(monitor.rest(10'000));
  const Snapshot resting = monitor.snapshot();
  for (const Gpu& gpu : resting.gpus) EXPECT_EQ(gpu.state, State::resting);
  EXPECT_EQ(monitor.pid(), pid);
  monitor.resume();
  EXPECT_TRUE(until([&] { return monitor.snapshot().gpus[7][Signal::power].at_ns > resting.at_ns; }));
}

TEST_F(MonitorTest, WhoHangsIsKilledSoThatTheDriverIsLetGo) {
  up("h100-vm");
  Monitor monitor(settings(), quick());
  ASSERT_TRUE(monitor.wait_ready(20'000));
  const int pid = monitor.pid();
  ASSERT_TRUE(
      twin::break_it(
          twin(), {.name = "hang-call", .gpu = 0, .function = "nvmlDeviceGetTemperature", .delay_ms = 60'000})
          .ok());
  ASSERT_TRUE(until([&] { return monitor.snapshot().gpus[0].state == State::hung; }));
  EXPECT_TRUE(monitor.rest(200));
  EXPECT_FALSE(alive(pid));
  EXPECT_EQ(monitor.pid(), 0);
  EXPECT_EQ(monitor.snapshot().gpus.at(0).state, State::resting);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_EQ(monitor.pid(), 0);  // nobody starts it while others need the driver
  ASSERT_TRUE(twin::mend(twin(), "hang-call", 0).ok());
  monitor.resume();
  EXPECT_TRUE(until([&] { return monitor.snapshot().gpus[0].state == State::sampling; }));
}

TEST_F(MonitorTest, WhoDoesNotAnswerIsKilledAndStartedAgain) {
  up("h100-vm");
  Program program = quick();
  program.answer_ms = 50;
  program.deaf_ms = 300;
  Monitor monitor(settings(), program);
  ASSERT_TRUE(monitor.wait_ready(20'000));
  ASSERT_EQ(monitor.snapshot().gpus.size(), 1U);
  const int pid = monitor.pid();
  ASSERT_EQ(::kill(pid, SIGSTOP), 0);
  EXPECT_TRUE(until([&] {
    (void)monitor.snapshot();
    return monitor.pid() != 0 && monitor.pid() != pid;
  }));
  EXPECT_TRUE(until([&] { return monitor.snapshot().gpus.at(0).state == State::sampling; }));
}

TEST_F(MonitorTest, AProgramThatIsNoneIsSaidAndTriedAgainLaterEachTime) {
  Program program = quick();
  program.file = "/nothing/here";
  Monitor monitor({}, program);
  EXPECT_TRUE(until([&] { return monitor.restarts() >= 3; }));
  EXPECT_THAT(monitor.snapshot().why, HasSubstr("exit code 127"));
  EXPECT_FALSE(monitor.wait_ready(50));
  EXPECT_TRUE(monitor.snapshot().gpus.empty());
}

TEST_F(MonitorTest, AProgramThatTalksNonsenseIsNotBelieved) {
  Program program = quick();
  program.file = "/bin/sh";
  program.arguments = {"sh", "-c", "cat /proc/self/maps >&3; sleep 60"};
  Monitor monitor({}, program);
  EXPECT_TRUE(until([&] { return monitor.restarts() >= 1; }));
  EXPECT_THAT(monitor.snapshot().why, HasSubstr("no frame"));
}

Snapshot example() {
  Snapshot out{.at_ns = 99, .why = "because"};
  for (unsigned i = 0; i < 2; ++i) {
    Gpu gpu{
        .index = i, .uuid = {"GPU-1"}, .name = "H100", .state = State::hung, .call = "nvmlX", .since_ns = 7};
    gpu.values[0] = {.number = 312.5, .at_ns = 88};
    gpu.values[1].refused = Errc::unsupported;
    gpu.gpm = true;
    gpu.mig = true;
    gpu.slices.push_back({.gpu_instance = 9, .uuid = {"MIG-1"}});
    gpu.slices[0].values[11] = {.number = 1e9, .at_ns = 87};
    gpu.tier[2] = {.cost_us = 3, .period_ms = 100, .rounds = 4, .nanoseconds = 5};
    gpu.fresh = 12;
    out.gpus.push_back(gpu);
  }
  out.host = {.at_ns = 5,
              .ports = {{.device = "mlx5_0", .port = 1, .packets = 9, .lost = 2, .loss = 0.5, .alarm = true}},
              .pcie = {{.address = {0, 0x1b, 0, 0}, .correctable = 3}},
              .sensors = {{.source = "bmc", .name = "FAN1", .kind = "fan", .value = 8000, .low = 500.0}},
              .bmc = "why"};
  return out;
}

TEST(MonitorFrames, CarryEverything) {
  const auto decoded = decode_snapshot(encode(example()));
  ASSERT_TRUE(decoded.ok());
  EXPECT_EQ(to_json(*decoded), to_json(example()));
  EXPECT_EQ(decoded->gpus[1].fresh, 12U);
  EXPECT_EQ(decoded->gpus[1].tier[2].nanoseconds, 5U);
  EXPECT_EQ(decoded->host.ports.at(0).loss, std::optional(0.5));
  EXPECT_EQ(decoded->host.pcie.at(0).address, (PciAddress{0, 0x1b, 0, 0}));
  EXPECT_EQ(decoded->host.sensors.at(0).low, std::optional(500.0));
}

TEST(MonitorFrames, CutShortOrTwistedAreRefusedOrStayInBounds) {
  const std::string good = encode(example());
  for (std::size_t size = 0; size < good.size(); ++size)
    EXPECT_FALSE(decode_snapshot(std::string_view(good).substr(0, size)).ok()) << size;
  EXPECT_FALSE(decode_snapshot(good + "x").ok());
  std::mt19937 random(7);
  for (unsigned i = 0; i < 20'000; ++i) {
    std::string bad = good;
    for (unsigned n = 0; n < 1 + i % 3; ++n) bad[random() % bad.size()] = static_cast<char>(random());
    const auto decoded = decode_snapshot(bad);
    if (!decoded.ok()) continue;
    EXPECT_LE(decoded->gpus.size(), 64U);
    for (const Gpu& gpu : decoded->gpus)
      for (std::size_t at = 0; at < signals; ++at)
        if (gpu.values[at].known()) {
          EXPECT_GE(gpu.values[at].number, rows()[at].least);
          EXPECT_LE(gpu.values[at].number, rows()[at].most);
        }
  }
}

}  // namespace
}  // namespace bulkhead::monitor
