#include "core/protect/protect.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>

#include <fmt/format.h>

namespace bulkhead::protect {
namespace {

constexpr const char* uuid = "GPU-0";
using Mode = spec::Protect::Mode;

// A board of two heat stores, warmed by what its limit lets it draw.
struct Board {
  double die = 40, sink = 35, inlet = 28, wanted = 650, limit = 700, joules = 0;
  double r_die = 0.02, r_sink = 0.045, c_die = 400, c_sink = 3000;
  double watts = 70;
  void second() {
    for (int i = 0; i < 10; ++i) {
      watts = std::min(wanted, limit);
      const double flow = (die - sink) / r_die, away = (sink - inlet) / r_sink;
      die += (watts - flow) / c_die * 0.1;
      sink += (flow - away) / c_sink * 0.1;
      joules += watts * 0.1;
    }
  }
};

struct World {
  spec::Protect settings = {};
  Pace pace = {};
  Guard guard = Guard(settings, pace);
  Reading reading = {};
  double now = 1000;
  std::vector<std::string> said = {};
  Decision last = {};

  explicit World(spec::Protect with = {}, Pace at = {}) : settings(with), pace(at), guard(with, at) {
    reading.gpus.push_back({.gpu = {uuid}, .index = 0});
    reading.gpus[0].leases = {{7, "vision"}};
  }
  GpuReading& gpu() { return reading.gpus[0]; }
  void temperature(double celsius) { gpu().celsius = Stamped{celsius, now}; }
  const Decision& step(double seconds = 1) {
    now += seconds;
    reading.at_s = now;
    reading.wall = WallTime(std::chrono::milliseconds(static_cast<std::int64_t>(now * 1000)));
    for (auto* seen : {&gpu().celsius, &gpu().margin, &gpu().watts, &gpu().limit, &gpu().hw_thermal_ns,
                       &gpu().power_brake_ns, &gpu().ecc_uncorrected, &gpu().remap_pending,
                       &gpu().remap_failed, &gpu().link_errors})
      if (*seen && fresh) (*seen)->at_s = now;
    for (auto& fan : reading.fans) fan.at_s = now;
    for (auto& rail : reading.rails) rail.at_s = now;
    last = guard.step(reading);
    for (const auto& alarm : last.opened) said.push_back("open " + alarm.id);
    for (const auto& alarm : last.closed) said.push_back("close " + alarm.id);
    return last;
  }
  void seconds(int count, const std::function<void()>& each = {}) {
    for (int i = 0; i < count; ++i) {
      if (each) each();
      step();
    }
  }
  const Wanted& wanted() const { return last.wanted.at(0); }
  bool open(const std::string& id) const {
    return std::any_of(last.open.begin(), last.open.end(), [&](const Alarm& a) { return a.id == id; });
  }
  bool fresh = true;
};

TEST(Alarms, OfHeatActOnWhicheverRoomIsSmaller) {
  World world;
  world.temperature(70);
  world.gpu().margin = Stamped{20, world.now};
  world.seconds(10);
  EXPECT_TRUE(world.last.open.empty());
  EXPECT_EQ(*world.guard.outlook({uuid})->room, 15);
  world.gpu().margin->number = 4;  // 70 C, and yet the part is about to slow down
  world.seconds(4);
  ASSERT_TRUE(world.open("heat.gpu0"));
  EXPECT_EQ(world.last.open[0].leases, std::vector<std::int64_t>{7});
  EXPECT_EQ(world.last.open[0].tenants, std::vector<std::string>{"vision"});
  EXPECT_TRUE(world.wanted().hold);
  EXPECT_FALSE(world.wanted().power);
}

TEST(Alarms, CloseThemselvesWithEvidenceAndNotOnTheEdge) {
  World world;
  world.temperature(86);
  world.seconds(5);
  ASSERT_TRUE(world.open("heat.gpu0"));
  world.temperature(84);  // below the ceiling, but not by enough
  world.seconds(60);
  EXPECT_TRUE(world.open("heat.gpu0"));
  world.temperature(80);
  world.seconds(19);
  EXPECT_TRUE(world.open("heat.gpu0"));
  world.seconds(5);
  EXPECT_FALSE(world.open("heat.gpu0"));
  EXPECT_EQ(world.said, (std::vector<std::string>{"open heat.gpu0", "close heat.gpu0"}));
}

TEST(Alarms, SayWhatTheyWereClosedOn) {
  World world;
  world.temperature(90);
  world.seconds(5);
  world.temperature(70);
  std::vector<Alarm> closed;
  world.seconds(30, [&] { closed.insert(closed.end(), world.last.closed.begin(), world.last.closed.end()); });
  ASSERT_EQ(closed.size(), 1U);
  ASSERT_TRUE(closed[0].closed);
  EXPECT_NE(closed[0].evidence.back().find("closed: -15 K for 20 s, it closes at -3"), std::string::npos)
      << closed[0].evidence.back();
  EXPECT_EQ(closed[0].worst, 5);
  EXPECT_EQ(closed[0].severity, Severity::critical);
  const Json shown = to_json(closed[0]);
  EXPECT_EQ(shown["kind"], "heat");
  EXPECT_EQ(shown["measure"]["opens"], 0);
}

TEST(Alarms, NeitherOpenNorCloseWithoutReadings) {
  World world;
  world.temperature(90);
  world.seconds(5);
  ASSERT_TRUE(world.open("heat.gpu0"));
  const unsigned rung = world.wanted().rung;
  world.fresh = false;
  world.seconds(300);
  EXPECT_TRUE(world.open("heat.gpu0"));
  EXPECT_TRUE(world.open("silent.gpu0"));
  EXPECT_GE(world.wanted().rung, rung);
  world.temperature(60);
  world.fresh = true;
  world.seconds(40);
  EXPECT_TRUE(world.last.open.empty());
}

TEST(Alarms, ARestThatSomebodyAskedForIsNoSilenceUntilItIsTooLong) {
  World world;
  world.temperature(60);
  world.seconds(5);
  world.fresh = false;
  world.gpu().rests = true;
  world.seconds(100);
  EXPECT_FALSE(world.open("silent.gpu0"));
  // Nothing came with the end of it, either: from there on it counts.
  world.gpu().rests = false;
  world.seconds(5);
  EXPECT_FALSE(world.open("silent.gpu0"));
  world.seconds(10);
  EXPECT_TRUE(world.open("silent.gpu0"));
  world.fresh = true;
  world.seconds(10);
  ASSERT_TRUE(world.last.open.empty());
  world.fresh = false;
  world.gpu().rests = true;
  world.seconds(140);
  EXPECT_TRUE(world.open("silent.gpu0"));
}

TEST(Ladder, IsClimbedMildestFirstAndOnlyAsFarAsTheNodeFileAllows) {
  spec::Protect settings;
  settings.harshest = Action::clocks;
  World world(settings);
  world.temperature(86);
  std::vector<std::string> seen;
  world.seconds(600, [&] {
    if (world.last.wanted.empty()) return;
    const auto& w = world.wanted();
    const std::string now =
        fmt::format("{}{}{}{}", w.hold ? "hold" : "", w.power ? fmt::format(" power {}", *w.power) : "",
                    w.clocks ? " clocks" : "", w.pause ? " pause" : "");
    if (seen.empty() || seen.back() != now) seen.push_back(now);
  });
  EXPECT_EQ(seen, (std::vector<std::string>{"", "hold", "hold power 0.85", "hold power 0.7",
                                            "hold power 0.55", "hold power 0.55 clocks"}));
}

TEST(Ladder, StopsWhileItGetsBetter) {
  World world;
  double celsius = 90;
  world.temperature(celsius);
  world.seconds(4);
  world.seconds(60, [&] { world.temperature(celsius -= 0.1); });
  // Six kelvin in a minute is what a step wants to see: nothing but the first rungs was needed.
  EXPECT_LE(world.wanted().rung, 2U);
}

TEST(Ladder, WalksDownOneStepAtATimeAndSlowerWhenTheAlarmComesBack) {
  World world;
  const auto down_after = [&] {
    world.temperature(95);
    while (world.last.wanted.empty() || world.wanted().rung < 3) world.step();
    world.temperature(60);
    int seconds = 0;
    while (world.wanted().rung > 0 && seconds < 4000) {
      const unsigned before = world.wanted().rung;
      world.step();
      EXPECT_GE(world.wanted().rung + 1, before);
      ++seconds;
    }
    return seconds;
  };
  const int first = down_after(), second = down_after();
  EXPECT_LT(first, 200);
  EXPECT_GT(second, first + 60);
}

TEST(Ladder, TakesAtMostSoManyStepsAnHour) {
  Pace pace;
  pace.most_steps = 5;
  World world({}, pace);
  unsigned ups = 0, before = 0;
  bool bounded = false;
  for (int i = 0; i < 3500; ++i) {
    world.temperature(i / 60 % 2 == 0 ? 95 : 60);
    world.step();
    if (world.wanted().rung > before) ++ups;
    before = world.wanted().rung;
    bounded = bounded || world.wanted().bounded;
  }
  EXPECT_LE(ups, 5U);
  EXPECT_TRUE(bounded);
}

TEST(Ladder, LiftsWhatAPredecessorLeftOnceReadingsSayThatAllIsWell) {
  World world;
  world.guard.carry({uuid}, 3);
  world.seconds(100);  // nothing was read: nothing is lifted
  EXPECT_EQ(world.wanted().rung, 3U);
  world.temperature(84);  // the ceiling is not passed, but near
  world.seconds(100);
  EXPECT_EQ(world.wanted().rung, 3U);
  world.temperature(60);
  world.seconds(150);
  EXPECT_EQ(world.wanted().rung, 0U);
}

TEST(Ladder, HoldsABoardWithAFailedFanBelowWhatItWouldReach) {
  const auto run = [](bool act) {
    World world;
    Board board;
    double hottest = 0;
    unsigned rung = 0, highest = 0;
    for (int second = 0; second < 2400; ++second) {
      if (second == 600) board.r_sink = 0.085;   // the fan is gone
      if (second == 1500) board.r_sink = 0.045;  // and back
      board.limit = 700;
      if (act && !world.last.wanted.empty()) {
        rung = world.wanted().rung;
        highest = std::max(highest, rung);
        if (world.wanted().power) board.limit = 700 * *world.wanted().power;
      }
      board.second();
      hottest = std::max(hottest, board.die);
      world.temperature(std::round(board.die));
      world.gpu().watts = Stamped{board.watts, world.now};
      world.gpu().joules = Stamped{board.joules, world.now + 1};
      world.gpu().limit = Stamped{board.limit, world.now};
      world.step();
    }
    return std::tuple(hottest, rung, highest, world.said);
  };
  const auto [free_run, r0, h0, s0] = run(false);
  const auto [guarded, rung, highest, said] = run(true);
  EXPECT_GT(free_run, 93);
  EXPECT_LT(guarded, 88);
  EXPECT_GE(highest, 2U);
  EXPECT_EQ(rung, 0U) << "all is taken back when the fan is";
  EXPECT_EQ(std::count(said.begin(), said.end(), "open heat.gpu0"),
            std::count(said.begin(), said.end(), "close heat.gpu0"));
}

TEST(Alarms, OfCoolingSeeARisingResistanceBeforeTheHeat) {
  World world;
  Board board;
  std::mt19937 random(3);
  double opened_at = -1, hot_at = -1;
  for (int second = 0; second < 7200; ++second) {
    if (second % 60 == 0) board.wanted = 150 + static_cast<double>(random() % 250);  // a load that lives
    if (second >= 2400) board.r_sink = std::min(0.12, 0.045 + (second - 2400) * 0.00003);  // dust, fast
    board.second();
    world.temperature(std::round(board.die));
    world.gpu().watts = Stamped{board.watts, world.now};
    world.gpu().joules = Stamped{board.joules, world.now + 1};
    world.step();
    if (second < 2400) {
      ASSERT_FALSE(world.open("cooling.gpu0")) << second;
    }
    if (world.open("cooling.gpu0") && opened_at < 0) opened_at = second;
    if (board.die >= 85 && hot_at < 0) hot_at = second;
  }
  EXPECT_GT(opened_at, 2400);
  EXPECT_TRUE(hot_at < 0 || opened_at < hot_at) << opened_at << " " << hot_at;
}

TEST(Alarms, OfBrakeAndSlowdownCountEveryNanosecond) {
  World world;
  world.temperature(60);
  world.gpu().power_brake_ns = Stamped{5e9, world.now};
  world.gpu().hw_thermal_ns = Stamped{0, world.now};
  world.seconds(20);
  EXPECT_TRUE(world.last.open.empty()) << "what was before we came is history";
  world.gpu().power_brake_ns->number += 0.3e9;  // 300 ms between two looks; the bit may be gone by now
  world.step();
  ASSERT_TRUE(world.open("power-brake.gpu0"));
  EXPECT_EQ(world.last.open[0].severity, Severity::critical);
  EXPECT_NE(world.last.open[0].what.find("by the rack or its supply"), std::string::npos);
  EXPECT_FALSE(world.open("hw-thermal.gpu0"));
  world.seconds(75);
  EXPECT_FALSE(world.open("power-brake.gpu0"));
}

TEST(Alarms, OfLinksOpenAboveOneInTenThousandAndNotBelow) {
  World world;
  world.temperature(60);
  world.gpu().link_errors = Stamped{0.9e-4, world.now};
  world.reading.ports.push_back({"mlx5_0/1", Stamped{0.5e-4, world.now}});
  world.seconds(30, [&] { world.reading.ports[0].errors->at_s = world.now + 1; });
  EXPECT_TRUE(world.last.open.empty());
  world.gpu().link_errors->number = 1.1e-4;
  world.reading.ports[0].errors->number = 3e-4;
  world.seconds(30, [&] { world.reading.ports[0].errors->at_s = world.now + 1; });
  EXPECT_TRUE(world.open("link-errors.gpu0"));
  EXPECT_TRUE(world.open("link-errors.mlx5_0/1"));
  EXPECT_TRUE(world.wanted().hold);
  EXPECT_EQ(world.wanted().rung, 1U);
}

TEST(Alarms, OfAPortHoldNoGpu) {
  World world;
  world.temperature(60);
  world.reading.ports.push_back({"mlx5_0/1", Stamped{3e-4, world.now}});
  world.seconds(30, [&] { world.reading.ports[0].errors->at_s = world.now + 1; });
  EXPECT_TRUE(world.open("link-errors.mlx5_0/1"));
  EXPECT_EQ(world.wanted().rung, 0U);
}

TEST(Alarms, OfMemoryHoldTheGpuUntilItWasReset) {
  World world;
  world.temperature(60);
  world.gpu().ecc_uncorrected = Stamped{2, world.now};
  world.gpu().remap_pending = Stamped{0, world.now};
  world.gpu().remap_failed = Stamped{0, world.now};
  world.seconds(5);
  EXPECT_TRUE(world.last.open.empty());
  world.gpu().ecc_uncorrected->number = 3;
  world.gpu().remap_pending->number = 1;
  world.seconds(5);
  EXPECT_TRUE(world.open("memory-errors.gpu0"));
  EXPECT_TRUE(world.open("memory-pending.gpu0"));
  EXPECT_TRUE(world.wanted().hold);
  world.gpu().remap_pending->number = 0;
  world.seconds(10);
  EXPECT_FALSE(world.open("memory-pending.gpu0"));
  world.seconds(3700);
  EXPECT_TRUE(world.last.open.empty());
  EXPECT_EQ(world.wanted().rung, 0U);
}

TEST(Alarms, OfPowerLowerEveryGpuOfTheNode) {
  spec::Protect settings;
  settings.node_power = watts(1500);
  settings.rest_power = watts(300);
  World world(settings);
  world.reading.gpus.push_back({.gpu = {"GPU-1"}, .index = 1});
  const auto draw = [&](double each) {
    for (auto& gpu : world.reading.gpus) {
      gpu.celsius = Stamped{60, world.now + 1};
      gpu.watts = Stamped{each, world.now + 1};
      gpu.limit = Stamped{700, world.now + 1};
    }
  };
  world.seconds(5, [&] { draw(550); });
  EXPECT_TRUE(world.last.open.empty());
  world.seconds(25, [&] { draw(650); });
  ASSERT_TRUE(world.open("node-power.host"));
  for (const auto& wanted : world.last.wanted) {
    EXPECT_TRUE(wanted.hold);
    EXPECT_TRUE(wanted.power);
  }
  world.seconds(300, [&] { draw(500); });
  EXPECT_TRUE(world.last.open.empty());
  for (const auto& wanted : world.last.wanted) EXPECT_EQ(wanted.rung, 0U);
}

TEST(Alarms, OfLimitsRacksAndCoolingSayWhatCouldBe) {
  spec::Protect settings;
  settings.rack = spec::Protect::Rack{watts(2400), 2};
  settings.cooling = watts(500);
  World world(settings);
  world.temperature(60);
  world.gpu().limit = Stamped{1300, world.now};
  world.gpu().watts = Stamped{520, world.now};
  world.seconds(60);
  EXPECT_TRUE(world.open("rack-power.host"));
  EXPECT_TRUE(world.open("cooling-capacity.host"));
  for (const auto& alarm : world.last.open)
    if (alarm.kind == Kind::cooling_capacity) {
      EXPECT_NE(alarm.evidence.back().find("1300 W"), std::string::npos);
    }
  settings.rack.reset();  // the operator took it out of the node file
  world.guard.configure(settings);
  world.gpu().watts->number = 300;
  world.seconds(700);
  EXPECT_TRUE(world.last.open.empty());
}

TEST(Alarms, OfFansAndRailsComeFromTheBmc) {
  World world;
  world.temperature(60);
  world.reading.fans = {{"SYS_FAN1", 9000, 0, false}, {"SYS_FAN2", 0, 0, true}};
  world.reading.rails = {{"P12V", 12.1, 11.4, 0, 12}};
  world.seconds(10);
  EXPECT_TRUE(world.open("fan.SYS_FAN2"));
  EXPECT_FALSE(world.open("fan.SYS_FAN1"));
  EXPECT_FALSE(world.open("rail.P12V"));
  EXPECT_EQ(world.wanted().rung, 1U);
  world.reading.rails[0].volts = 11.3;
  world.seconds(60);
  EXPECT_TRUE(world.open("rail.P12V"));
  EXPECT_EQ(world.wanted().rung, highest_rung(Action::power));
  world.reading.fans[1].failed = false;
  world.reading.rails[0].volts = 12.05;
  world.seconds(400);
  EXPECT_TRUE(world.last.open.empty());
  EXPECT_EQ(world.wanted().rung, 0U);
}

TEST(Alarms, OfARampTellUpFromDown) {
  spec::Protect settings;
  settings.ramp = spec::Protect::Ramp{watts(1000), {}};
  World world(settings);
  const auto at = [&](double w) {
    world.temperature(60);
    world.gpu().watts = Stamped{w, world.now + 1};
    world.step();
  };
  for (int i = 0; i < 5; ++i) at(500 + i * 900);
  EXPECT_TRUE(world.last.open.empty());
  at(500 + 5 * 900 - 2600);  // all ranks stop at once
  ASSERT_TRUE(world.open("ramp.host"));
  EXPECT_NE(world.last.open[0].what.find("fell"), std::string::npos);
  EXPECT_EQ(world.wanted().rung, 0U);
}

TEST(Ramp, StaggersStartsByTheBudget) {
  Ramp ramp(2000, 1000);
  std::vector<double> at;
  for (int i = 0; i < 8; ++i) at.push_back(ramp.ask(600, 100));
  EXPECT_EQ(at[0], 0);
  for (std::size_t i = 2; i < at.size(); ++i) EXPECT_NEAR(at[i] - at[i - 1], 0.3, 1e-9);
  // Within any second no more than the rate and the burst.
  for (double from = 0; from < 4; from += 0.05) {
    double sum = 0;
    for (const double a : at)
      if (a >= from && a < from + 1) sum += 600;
    EXPECT_LE(sum, 2000 + 1000 + 1e-9) << from;
  }
}

TEST(Ramp, BooksAStopThatNobodyAskedFor) {
  Ramp ramp(1000, 1000);
  ramp.seen(5000, 10);
  ramp.seen(1000, 11);  // four kilowatts at once: Xid 79 on one rank drops the others
  EXPECT_NEAR(ramp.wait(11), 3, 1e-9);
  EXPECT_NEAR(ramp.ask(500, 11), 3.5, 1e-9);
}

TEST(Ramp, DoesNotBookAnAnnouncedStartTwice) {
  Ramp ramp(1000, 1000);
  ramp.seen(500, 10);
  EXPECT_EQ(ramp.ask(600, 10), 0);
  ramp.seen(1100, 11);
  EXPECT_EQ(ramp.wait(12), 0);
  EXPECT_EQ(ramp.ask(600, 12), 0);
}

TEST(Ramp, WithoutABudgetNobodyWaits) {
  Ramp ramp;
  for (int i = 0; i < 100; ++i) EXPECT_EQ(ramp.ask(1e6, 0), 0);
}

TEST(Guard, WithstandsReadingsOfEveryKind) {
  std::mt19937 random(11);
  spec::Protect settings;
  settings.node_power = watts(2000);
  settings.cooling = watts(2000);
  settings.ramp = spec::Protect::Ramp{watts(500), {}};
  settings.rack = spec::Protect::Rack{watts(8000), 4};
  settings.harshest = Action::fence;
  Pace pace;
  Guard guard(settings, pace);
  const std::vector<double> odd = {0,    -1,   1e300, -1e300, std::nan(""), INFINITY, 84.9,
                                   85.1, 1e-4, 1e9,   3,      600};
  Reading reading;
  std::map<std::string, std::vector<double>> ups;
  std::map<std::string, unsigned> before;
  for (int i = 0; i < 4000; ++i) {
    reading.at_s += (random() % 100 == 0) ? 500 : 1;
    reading.wall += std::chrono::seconds(1);
    reading.gpus.clear();
    for (unsigned g = 0; g < 3; ++g) {
      if (random() % 50 == 0) continue;
      GpuReading gpu{.gpu = {"GPU-" + std::to_string(g)}, .index = g};
      for (auto* seen : {&gpu.celsius, &gpu.margin, &gpu.watts, &gpu.limit, &gpu.joules, &gpu.hw_thermal_ns,
                         &gpu.power_brake_ns, &gpu.ecc_uncorrected, &gpu.remap_pending, &gpu.remap_failed,
                         &gpu.link_errors})
        if (random() % 4 != 0)
          *seen = Stamped{odd[random() % odd.size()], reading.at_s - (random() % 10 == 0 ? 30 : 0)};
      reading.gpus.push_back(gpu);
    }
    reading.fans = {{"F\x1b[31m", odd[random() % odd.size()], reading.at_s, random() % 2 == 0}};
    reading.rails = {{"R", odd[random() % odd.size()], odd[random() % odd.size()], reading.at_s, 12}};
    const auto decision = guard.step(reading);
    for (const auto& alarm : decision.open) {
      EXPECT_LE(alarm.evidence.size(), 12U);
      EXPECT_EQ(alarm.id.find('\x1b'), std::string::npos);
      EXPECT_FALSE(alarm.closed);
    }
    for (const auto& wanted : decision.wanted) {
      ASSERT_LE(wanted.rung, highest_rung(settings.harshest));
      auto& mine = ups[wanted.gpu.text];
      unsigned& was = before[wanted.gpu.text];
      ASSERT_LE(wanted.rung, was + 1);
      ASSERT_GE(wanted.rung + 1, was);
      if (wanted.rung > was) mine.push_back(reading.at_s);
      was = wanted.rung;
      std::erase_if(mine, [&](double at) { return reading.at_s - at > 3600; });
      ASSERT_LE(mine.size(), pace.most_steps);
    }
  }
}

}  // namespace
}  // namespace bulkhead::protect
