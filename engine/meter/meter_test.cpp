#include "engine/meter/meter.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <malloc.h>
#include <sys/stat.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <map>
#include <set>

#include <fmt/format.h>

#include "base/prng.hpp"
#include "edge/accounts/accounts.hpp"

namespace bulkhead::meter {
namespace {

namespace fs = std::filesystem;
using accounts::Accounts;
using accounts::Kind;
using sample::Signal;
using std::chrono::milliseconds;

constexpr WallTime noon{milliseconds(1'800'000'000'000)};  // on a quarter of an hour

// A host: its wall clock, its GPUs with what they draw, its leases. The meter is shown it as the daemon
// would.
struct World {
  struct Gpu {
    std::string uuid = {}, name = "NVIDIA H100 80GB HBM3";
    double watts = 100, joules = 0;
    double sm = 0;
    std::map<unsigned, double> slices = {};  // GPU instance -> SM activity
    sample::State state = sample::State::sampling;
    bool silent = false;  // its counter is not read
    std::uint64_t read_at = 0;
    double read = 0;
    bool cordoned = false;
  };
  fs::path dir = {};
  WallTime wall = noon;
  std::uint64_t mono = 1'000'000'000'000;
  std::vector<Gpu> gpus = {};
  std::map<std::int64_t, lease::Lease> leases = {};
  std::vector<unsigned> hurried = {};
  Shares shares = {};
  std::unique_ptr<Meter> meter = {};

  explicit World(unsigned count = 1) {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-meter-XXXXXX").string();
    EXPECT_NE(::mkdtemp(pattern.data()), nullptr);
    dir = pattern;
    for (unsigned i = 0; i < count; ++i) gpus.push_back({.uuid = fmt::format("GPU-{}", i)});
    fs::create_directories(dir / "root/sys/module");
    boot("11111111-1111-4111-8111-111111111111");
    fs::create_directories(dir / "state");
  }
  ~World() {
    meter.reset();
    fs::remove_all(dir);
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  void boot(const std::string& id) {
    fs::create_directories(dir / "root/proc/sys/kernel/random");
    std::ofstream(dir / "root/proc/sys/kernel/random/boot_id") << id << "\n";
    load_driver();
  }
  void load_driver() {
    // Made before the old one goes, so that it has another inode, as in sysfs.
    fs::create_directories(dir / "root/sys/module/new");
    fs::remove_all(dir / "root/sys/module/nvidia");
    fs::rename(dir / "root/sys/module/new", dir / "root/sys/module/nvidia");
    for (auto& gpu : gpus) gpu.joules = 0;
  }
  void start() {
    auto opened = Meter::open(
        dir / "state", {.root = dir / "root", .hurry = [this](unsigned gpu) { hurried.push_back(gpu); }});
    ASSERT_TRUE(opened.ok()) << opened.error().message();
    meter = std::move(opened).value();
  }
  // As kill -9 leaves the files.
  void kill() {
    fs::remove_all(dir / "copy");
    fs::copy(dir / "state", dir / "copy", fs::copy_options::recursive);
    meter.reset();
    fs::remove_all(dir / "state");
    fs::rename(dir / "copy", dir / "state");
  }
  void pass(std::int64_t ms) {
    wall += milliseconds(ms);
    mono += static_cast<std::uint64_t>(ms) * 1'000'000;
    for (auto& gpu : gpus) gpu.joules += gpu.watts * static_cast<double>(ms) / 1000;
  }
  void read() {
    for (auto& gpu : gpus) {
      if (gpu.silent) continue;
      gpu.read = gpu.joules;
      gpu.read_at = mono;
    }
  }
  lease::Lease& hold(std::int64_t id, std::string tenant, lease::Class cls, std::vector<lease::Part> parts) {
    leases[id] = {.id = id,
                  .tenant = std::move(tenant),
                  .user = "u",
                  .ask = {.cls = cls},
                  .state = lease::State::active,
                  .parts = std::move(parts),
                  .created = wall,
                  .active_since = wall};
    return leases[id];
  }
  void end(std::int64_t id) {
    leases[id].state = lease::State::ended;
    leases[id].ended = wall;
  }
  lease::Part slice(unsigned gpu, unsigned instance, unsigned compute = 1) const {
    return {.gpu = {gpus[gpu].uuid},
            .profile = fmt::format("{}g.{}gb", compute, compute * 10),
            .gpu_instance = instance,
            .generation = instance + 100,
            .memory = mebibytes(10'240 * compute)};
  }
  sample::Snapshot said() const {
    sample::Snapshot out{.at_ns = mono};
    for (unsigned i = 0; i < gpus.size(); ++i) {
      const auto& gpu = gpus[i];
      sample::Gpu one{.index = i, .uuid = {gpu.uuid}, .name = gpu.name, .state = gpu.state};
      const auto put = [&](sample::Values& values, Signal signal, double number, std::uint64_t at) {
        values[static_cast<std::size_t>(signal)] = {.number = number, .at_ns = at};
      };
      if (gpu.read_at != 0) put(one.values, Signal::energy, gpu.read, gpu.read_at);
      put(one.values, Signal::sm, gpu.sm * 100, mono);
      for (const auto& [id, sm] : gpu.slices) {
        one.slices.push_back({.gpu_instance = id});
        put(one.slices.back().values, Signal::sm, sm * 100, mono);
      }
      out.gpus.push_back(one);
    }
    return out;
  }
  control::Snapshot has() const {
    control::Snapshot out{.at = wall};
    for (const auto& [id, one] : leases) out.leases.put(id, std::make_shared<const lease::Lease>(one));
    for (unsigned i = 0; i < gpus.size(); ++i) {
      out.gpus.push_back({.gpu = {gpus[i].uuid}, .index = i, .name = gpus[i].name, .pool = "mig"});
      if (gpus[i].cordoned) out.gpus.back().cordon = control::Cordon{.why = "w", .by = "b", .since = noon};
    }
    return out;
  }
  Status step() { return meter->step(said(), has(), wall, mono, shares); }
  void run(int seconds) {
    for (int i = 0; i < seconds; ++i) {
      pass(1000);
      read();
      const auto done = step();
      EXPECT_TRUE(done.ok()) << (done.ok() ? "" : done.error().message());
    }
  }
  accounts::Answer ask(bool by_lease = true, bool by_gpu = false) {
    EXPECT_TRUE(meter->write().ok());
    auto file = Accounts::open(dir / "state", Accounts::Access::read_only);
    EXPECT_TRUE(file.ok());
    return (*file)->ask({.from = 0, .to = INT32_MAX, .by_lease = by_lease, .by_gpu = by_gpu}).value();
  }
  // What the accounts have must be what passed, however it was split.
  static void adds_up(const accounts::Answer& answer) {
    std::uint64_t unit_us = 0, mj = 0, us = 0, counted = 0;
    for (const auto& sum : answer.sums) {
      unit_us += sum.amounts.unit_us;
      mj += sum.amounts.idle_mj + sum.amounts.dynamic_mj;
    }
    for (const auto& gpu : answer.gpus) us += gpu.us, counted += gpu.energy_mj;
    EXPECT_EQ(unit_us, us * usage::whole_gpu);
    EXPECT_EQ(mj, counted);
  }
};

usage::Amounts of_lease(const accounts::Answer& answer, std::int64_t id) {
  usage::Amounts out;
  for (const auto& sum : answer.sums)
    if (sum.holder.kind == Kind::lease && sum.holder.lease == id) out = out + sum.amounts;
  return out;
}
usage::Amounts of_kind(const accounts::Answer& answer, Kind kind) {
  usage::Amounts out;
  for (const auto& sum : answer.sums)
    if (sum.holder.kind == kind) out = out + sum.amounts;
  return out;
}
std::uint64_t energy(const usage::Amounts& amounts) { return amounts.idle_mj + amounts.dynamic_mj; }

TEST(Meter, ALeaseIsCountedFromItsOwnTimesNotFromWhenTheMeterLooked) {
  World world;
  world.start();
  world.run(5);
  world.pass(137);
  world.hold(1, "a", lease::Class::mig, {world.slice(0, 1, 3)});
  world.run(60);
  world.pass(411);
  world.end(1);
  world.run(5);
  const auto answer = world.ask();
  EXPECT_EQ(of_lease(answer, 1).unit_us, 3000UL * 60'411'000);
  EXPECT_EQ(of_lease(answer, 1).mib_us, 30'720UL * 60'411'000);
  ASSERT_EQ(answer.sums.size(), 2U);
  EXPECT_EQ(answer.sums[0].holder.generation, 101);
  World::adds_up(answer);
}

TEST(Meter, ALeaseThatCameAndWentBetweenTwoStepsIsCounted) {
  World world;
  world.start();
  world.run(5);
  world.pass(100);
  world.hold(1, "a", lease::Class::mig, {world.slice(0, 1)});
  world.pass(250);
  world.end(1);
  world.run(5);
  EXPECT_EQ(of_lease(world.ask(), 1).unit_us, 1000UL * 250'000);
  world.run(20);
  EXPECT_EQ(of_lease(world.ask(), 1).unit_us, 1000UL * 250'000);
}

TEST(Meter, EnergyOfTheAccountsIsTheCountersToTheMillijoule) {
  World world;
  world.start();
  world.gpus[0].watts = 50;
  world.run(3);
  world.gpus[0].watts = 333.333;
  world.hold(1, "a", lease::Class::mig, {world.slice(0, 1, 3)});
  world.hold(2, "b", lease::Class::mig, {world.slice(0, 2, 4)});
  world.gpus[0].slices = {{1, 0.25}, {2, 0.75}};
  world.gpus[0].sm = (3 * 0.25 + 4 * 0.75) / 7;
  world.run(100);
  const auto answer = world.ask();
  World::adds_up(answer);
  ASSERT_EQ(answer.gpus.size(), 1U);
  // From the first reading, of the first second, to the last that is counted, two seconds before the end.
  EXPECT_NEAR(static_cast<double>(answer.gpus[0].energy_mj), 333'333.0 * 98 + 50'000 * 2, 2);
  EXPECT_EQ(answer.gpus[0].unmetered_us, 0U);
  EXPECT_GT(energy(of_lease(answer, 2)), 3 * energy(of_lease(answer, 1)));
  EXPECT_FALSE(world.hurried.empty());
}

TEST(Meter, AKilledDaemonLosesNoSecondAndCountsNoneTwice) {
  World world;
  world.start();
  world.hold(1, "a", lease::Class::mig, {world.slice(0, 1)});
  world.run(33);
  world.kill();
  world.pass(3'600'000);  // an hour; leases go on
  world.hold(2, "b", lease::Class::mig, {world.slice(0, 2)});
  world.pass(1'000'000);
  world.end(1);
  world.pass(200'000);
  world.start();
  world.run(10);
  const auto answer = world.ask();
  World::adds_up(answer);
  EXPECT_EQ(of_lease(answer, 1).unit_us,
            1000UL * (33 - 1 + 4800 - 200) * 1'000'000);  // the meter was shown the first second's end
  EXPECT_EQ(of_lease(answer, 2).unit_us, 1000UL * (1200 + 10 - 2) * 1'000'000);
  EXPECT_NEAR(static_cast<double>(answer.gpus[0].energy_mj), 100'000.0 * (32 + 4800 + 8), 2);
  EXPECT_EQ(of_lease(answer, 1).unmetered_us, 0U);
  EXPECT_GE(of_lease(answer, 1).blind_us, 4'600'000'000U);
}

TEST(Meter, WhenTheDriverWasLoadedAnewTheGapIsNotMeteredAndTheTimeIs) {
  World world;
  world.start();
  world.hold(1, "a", lease::Class::mig, {world.slice(0, 1)});
  world.run(30);
  world.load_driver();
  world.run(30);
  world.kill();
  world.load_driver();
  world.gpus[0].joules = 1e7;  // above what it was: the number alone says nothing
  world.pass(10'000);
  world.start();
  world.run(30);
  const auto answer = world.ask();
  World::adds_up(answer);
  EXPECT_EQ(of_lease(answer, 1).unit_us, 1000UL * (29 + 30 + 10 + 28) * 1'000'000);
  EXPECT_GT(of_lease(answer, 1).unmetered_us, 10'000'000U);
  EXPECT_LT(of_lease(answer, 1).unmetered_us, 22'000'000U);
  EXPECT_LT(answer.gpus[0].energy_mj, 100'000UL * 90);
  EXPECT_EQ(answer.epochs.size(), 3U);
}

TEST(Meter, ACounterThatFellBeganAnewThoughNothingElseSaysSo) {
  World world;
  world.start();
  world.run(30);
  world.gpus[0].joules = 0;
  world.run(30);
  const auto answer = world.ask();
  World::adds_up(answer);
  EXPECT_NEAR(static_cast<double>(answer.gpus[0].energy_mj), 100'000.0 * (29 + 27), 2);
  EXPECT_EQ(answer.gpus[0].unmetered_us, 1'000'000U);
}

TEST(Meter, NobodyPaysForAMachineThatWasOff) {
  World world;
  world.start();
  world.hold(1, "a", lease::Class::mig, {world.slice(0, 1)});
  world.run(60);
  world.kill();
  world.pass(7'200'000);
  world.boot("22222222-2222-4222-8222-222222222222");
  world.mono = 40'000'000'000;
  world.gpus[0].read_at = 0;
  world.end(1);
  world.start();
  world.run(60);
  const auto answer = world.ask();
  World::adds_up(answer);
  EXPECT_LE(of_lease(answer, 1).unit_us, 1000UL * 59 * 1'000'000);
  EXPECT_GE(of_lease(answer, 1).unit_us, 1000UL * 50 * 1'000'000);
  EXPECT_GE(of_kind(answer, Kind::out_of_service).unit_us, 7000UL * 7'200'000'000);
  EXPECT_EQ(answer.gpus[0].us, (59UL + 7200 + 58) * 1'000'000);
}

TEST(Meter, AWallClockThatIsSetNeitherMakesTimeNorLosesIt) {
  for (const int hours : {-3, 3}) {
    World world;
    world.start();
    world.hold(1, "a", lease::Class::mig, {world.slice(0, 1)});
    world.run(30);
    world.wall += std::chrono::hours(hours);
    world.run(15);
    world.end(1);
    world.run(10);
    world.wall -= std::chrono::hours(hours);
    world.pass(300);
    world.hold(2, "a", lease::Class::mig, {world.slice(0, 2)});
    world.run(20);
    const auto answer = world.ask();
    World::adds_up(answer);
    EXPECT_EQ(of_lease(answer, 1).unit_us, 1000UL * 44 * 1'000'000) << hours;
    EXPECT_EQ(of_lease(answer, 2).unit_us, 1000UL * 18 * 1'000'000) << hours;
    EXPECT_NEAR(static_cast<double>(answer.gpus[0].us), 72.3e6, 10) << hours;
  }
}

TEST(Meter, AnotherGenerationOfAnInstanceIsAnotherLine) {
  World world;
  world.start();
  world.hold(1, "a", lease::Class::mig, {world.slice(0, 1)});
  world.run(10);
  world.leases[1].parts[0].generation = 7;  // cut anew for the same lease
  world.run(10);
  const auto answer = world.ask();
  World::adds_up(answer);
  EXPECT_EQ(of_lease(answer, 1).unit_us, 1000UL * 17 * 1'000'000);
  auto file = Accounts::open(world.dir / "state", Accounts::Access::read_only).value();
  ASSERT_EQ(answer.sums.size(), 2U);
  EXPECT_EQ(answer.sums[0].holder.generation, 0);  // more than one
}

TEST(Meter, PreparingScrubbingCordonedAndHungAreOutOfService) {
  World world(3);
  world.start();
  world.hold(1, "a", lease::Class::mig, {world.slice(0, 1, 3)}).state = lease::State::preparing;
  world.leases[1].active_since.reset();
  world.gpus[1].cordoned = true;
  world.gpus[2].state = sample::State::hung;
  world.hold(2, "a", lease::Class::mig, {world.slice(1, 1, 2)});
  world.run(13);
  auto answer = world.ask(true, true);
  World::adds_up(answer);
  std::map<std::string, std::uint64_t> out;
  for (const auto& sum : answer.sums)
    if (sum.holder.kind == Kind::out_of_service) out[sum.gpu.text] += sum.amounts.unit_us;
  EXPECT_EQ(out["GPU-0"], 3000UL * 10'000'000);
  EXPECT_EQ(out["GPU-1"], 5000UL * 10'000'000);
  EXPECT_EQ(out["GPU-2"], 7000UL * 10'000'000);
  EXPECT_EQ(of_lease(answer, 1).unit_us, 0U);
  EXPECT_EQ(of_lease(answer, 2).unit_us, 2000UL * 10'000'000);
  // Released: the tenant is done with it, the scrubbing goes on.
  world.leases[2].state = lease::State::releasing;
  world.leases[2].ended = world.wall;
  world.gpus[1].cordoned = false;
  world.run(12);
  answer = world.ask();
  EXPECT_EQ(of_lease(answer, 2).unit_us, 2000UL * 12'000'000);
}

TEST(Meter, AGpuWhoseCounterIsSilentIsUnmeteredAndWhatComesToLightIsTheOperators) {
  World world;
  world.start();
  world.hold(1, "a", lease::Class::mig, {world.slice(0, 1, 7)});
  world.run(30);
  world.gpus[0].silent = true;
  world.run(300);
  world.gpus[0].silent = false;
  world.run(30);
  const auto answer = world.ask();
  World::adds_up(answer);
  EXPECT_NEAR(static_cast<double>(answer.gpus[0].energy_mj), 100'000.0 * 357, 3);
  EXPECT_GT(of_lease(answer, 1).unmetered_us, 200'000'000U);
  EXPECT_GT(energy(of_kind(answer, Kind::unallocated)), 200UL * 100'000);
  EXPECT_LT(energy(of_lease(answer, 1)), 100'000UL * 130);
}

TEST(Meter, SharesAreThousandthsAndOneWhoSharesWithNobodyIsMeasured) {
  World world;
  world.start();
  world.gpus[0].sm = 0.3;
  lease::Part part{.gpu = {"GPU-0"}, .weight = 300};
  world.hold(1, "a", lease::Class::share, {part});
  world.run(12);
  auto answer = world.ask();
  EXPECT_EQ(of_lease(answer, 1).unit_us, 300UL * 7 * 9'000'000);
  EXPECT_EQ(of_lease(answer, 1).used_unit_us, of_lease(answer, 1).unit_us);  // all of its own 0.3
  EXPECT_EQ(of_lease(answer, 1).blind_us, 0U);
  part.weight = 500;
  world.hold(2, "b", lease::Class::share, {part});
  world.run(10);
  answer = world.ask();
  World::adds_up(answer);
  EXPECT_EQ(of_lease(answer, 2).blind_us, 8'000'000U);  // nobody says whose work it was
}

TEST(Meter, OfThoseWhoTakeTurnsEachPaysForThePartOfTheWorkThatTheDriverSaysItDid) {
  World world;
  world.start();
  world.gpus[0].watts = 500;
  world.gpus[0].sm = 0.9;
  const lease::Part half{.gpu = {"GPU-0"}, .weight = 500};
  world.hold(1, "a", lease::Class::share, {half});
  world.hold(2, "b", lease::Class::share, {half});
  world.shares = {{{"GPU-0", 1}, 0.3}, {{"GPU-0", 2}, 0.6}};
  world.run(60);
  auto answer = world.ask();
  World::adds_up(answer);
  const auto a = of_lease(answer, 1), b = of_lease(answer, 2);
  EXPECT_GT(a.unit_us, 0U);
  EXPECT_EQ(a.idle_mj, b.idle_mj);  // they hold as much
  // b had more than its half, because a left it: that is its work all the same.
  EXPECT_NEAR(static_cast<double>(b.sm_us) / static_cast<double>(a.sm_us), 2, 0.01);
  EXPECT_NEAR(static_cast<double>(b.dynamic_mj) / static_cast<double>(a.dynamic_mj), 2, 0.03);
  EXPECT_LE(b.used_unit_us, b.unit_us);
  EXPECT_EQ(a.blind_us + b.blind_us, 0U);
  world.shares = {{{"GPU-0", 1}, 0.2}, {{"GPU-0", 2}, 0.4}};
  world.gpus[0].sm = 0.6;
  world.run(4);
  const auto before = world.ask();
  world.run(300);
  answer = world.ask();
  World::adds_up(answer);
  const auto of = [&](std::int64_t id) {
    return static_cast<double>(of_lease(answer, id).dynamic_mj - of_lease(before, id).dynamic_mj);
  };
  EXPECT_NEAR(of(2) / of(1), 2, 0.03);
  // Where the driver does not say it of one of them, each counts by its slice.
  world.shares.erase({"GPU-0", 2});
  world.run(30);
  EXPECT_GT(of_lease(world.ask(), 1).blind_us, 20'000'000U);
}

TEST(Meter, AnInstanceThatNobodyLeasedAndThatWorksIsTheOperators) {
  World world;
  world.start();
  world.hold(1, "a", lease::Class::mig, {world.slice(0, 1)});
  world.gpus[0].slices = {{1, 0}, {9, 1}};
  world.gpus[0].sm = 3.0 / 7;
  world.gpus[0].watts = 400;
  world.run(60);
  const auto answer = world.ask();
  World::adds_up(answer);
  EXPECT_LT(energy(of_lease(answer, 1)), energy(of_kind(answer, Kind::unallocated)) / 4);
}

TEST(Meter, ALyingCounterIsNotBelieved) {
  World world;
  world.start();
  world.run(10);
  world.gpus[0].joules += 1e9;
  world.pass(1000);
  world.read();
  bool said_so = false;
  for (int i = 0; i < 5; ++i) {
    said_so = said_so || !world.step().ok();
    world.pass(1000);
    world.read();
  }
  EXPECT_TRUE(said_so);
  const auto answer = world.ask();
  World::adds_up(answer);
  EXPECT_LT(answer.gpus[0].energy_mj, 100'000UL * 20);
}

TEST(Meter, ThePowerModelIsFittedAndComesBack) {
  World world;
  world.start();
  Prng random(3);
  for (int i = 0; i < 120; ++i) {
    world.gpus[0].sm = random.unit();
    world.gpus[0].watts = 90 + 400 * world.gpus[0].sm;
    world.run(1);
  }
  world.run(5);
  (void)world.ask();
  world.kill();
  world.start();
  auto file = Accounts::open(world.dir / "state", Accounts::Access::read_only).value();
  const auto fits = file->fits().value();
  ASSERT_EQ(fits.size(), 1U);
  EXPECT_TRUE(fits[0].fitted);
  EXPECT_NEAR(fits[0].power.idle, 90, 30);
  EXPECT_NEAR(fits[0].power.sm, 400, 60);
}

// Days of a host in which everything happens, against an account of the test's own.
TEST(Meter, WhateverHappensItAddsUp) {
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    SCOPED_TRACE(seed);
    Prng random(seed);
    World world(2);
    world.start();
    world.run(1);
    const auto begin = world.mono;
    std::map<std::int64_t, std::uint64_t> due;  // milliseconds of leases
    std::map<unsigned, std::set<std::int64_t>> on;
    std::int64_t next = 1;
    double seen = 0;  // mJ between readings of one epoch
    std::map<unsigned, double> last;
    std::map<unsigned, bool> broken;
    for (unsigned g = 0; g < 2; ++g) last[g] = world.gpus[g].read;
    const auto pass = [&](std::int64_t ms) {
      world.pass(ms);
      for (const auto& [gpu, ids] : on)
        for (const auto id : ids) due[id] += static_cast<std::uint64_t>(ms);
    };
    const auto read = [&](unsigned g) {
      auto& gpu = world.gpus[g];
      gpu.read = gpu.joules, gpu.read_at = world.mono;
      if (!broken[g]) seen += std::round(gpu.read * 1000) - std::round(last[g] * 1000);
      broken[g] = false;
      last[g] = gpu.read;
    };
    // What was shown before a load of the driver is in the file: a daemon killed around it would not know.
    const auto settle = [&] {
      for (int i = 0; i < 12; ++i) {
        pass(1000);
        read(0), read(1);
        ASSERT_TRUE(world.step().ok());
      }
    };
    settle();
    for (int i = 0; i < 250; ++i) {
      pass(static_cast<std::int64_t>(1 + random.below(random.below(20) == 0 ? 300'000 : 1500)));
      const auto g = static_cast<unsigned>(random.below(2));
      auto& gpu = world.gpus[g];
      gpu.watts = 60 + 600 * random.unit();
      gpu.slices[1] = random.unit();
      gpu.slices[2] = random.unit();
      switch (random.below(8)) {
        case 0:
        case 1:
          if (on[g].size() < 3) {
            world.hold(next, "t" + std::to_string(random.below(3)), lease::Class::mig,
                       {world.slice(g, static_cast<unsigned>(on[g].size()),
                                    1 + static_cast<unsigned>(random.below(2)))});
            on[g].insert(next++);
          }
          break;
        case 2:
          if (!on[g].empty()) {
            const auto id = *on[g].begin();
            world.end(id);
            on[g].erase(id);
          }
          break;
        case 3:
          if (random.below(4) == 0) {
            world.kill();
            pass(static_cast<std::int64_t>(random.below(4'000'000)));
            world.start();
          }
          break;
        case 4:
          if (random.below(8) == 0) {
            settle();
            for (unsigned n = 0; n < 2; ++n) broken[n] = true;
            world.load_driver();
            settle();
          }
          break;
        case 5:
          gpu.cordoned = !gpu.cordoned;
          break;
        default:
          break;
      }
      if (random.below(3) > 0) read(0), read(1);
      const auto done = world.step();
      ASSERT_TRUE(done.ok()) << done.error().message();
    }
    // What is on its way arrives.
    for (unsigned g = 0; g < 2; ++g) {
      while (!on[g].empty()) world.end(*on[g].begin()), on[g].erase(on[g].begin());
    }
    read(0), read(1);
    ASSERT_TRUE(world.step().ok());
    const auto end = world.mono;
    for (int i = 0; i < 100; ++i) {
      world.pass(1000);
      ASSERT_TRUE(world.step().ok());
    }
    const auto answer = world.ask();
    World::adds_up(answer);
    for (const auto& [id, ms] : due) {
      std::uint64_t units = 0;
      for (const auto& part : world.leases[id].parts) units += part.profile == "1g.10gb" ? 1000 : 2000;
      EXPECT_EQ(of_lease(answer, id).unit_us, units * ms * 1000) << "lease " << id;
    }
    std::uint64_t mj = 0, us = 0;
    for (const auto& gpu : answer.gpus) mj += gpu.energy_mj, us += gpu.us;
    EXPECT_NEAR(static_cast<double>(mj), seen, 1) << "of the counters";
    EXPECT_GE(us, 2 * (end - begin) / 1000);
  }
}

// An hour and a half on eight GPUs of seven slices in which six leases come or go every second.
TEST(Meter, ThousandsOfLeasesComeAndGoInBoundedMemoryAndEveryQuarterOfEveryGpuAddsUp) {
  constexpr unsigned gpus = 8, slots = 7;
  constexpr int seconds = 5400, settled = 1800;
  World world(gpus);
  auto opened =
      Meter::open(world.dir / "state", {.root = world.dir / "root", .write_every = milliseconds(60'000)});
  ASSERT_TRUE(opened.ok());
  world.meter = std::move(*opened);
  world.read();
  ASSERT_TRUE(world.step().ok());  // from here on it counts
  Prng random(7);
  std::int64_t last = 0;
  std::map<std::int64_t, std::uint64_t> due;                 // lease -> microseconds of a slice
  std::array<std::array<std::int64_t, slots>, gpus> held{};  // 0: nobody
  std::deque<std::int64_t> over;
  const auto in_use = [] { return ::mallinfo2().uordblks; };
  std::size_t before = 0, worst = 0;
  for (int at = 0; at < seconds; ++at) {
    for (int change = 0; change < 6; ++change) {
      world.pass(change == 5 ? 170 : 166);
      const auto g = static_cast<unsigned>(random.below(gpus)),
                 s = static_cast<unsigned>(random.below(slots));
      auto& id = held[g][s];
      if (id == 0) {
        id = ++last;
        world.hold(id, fmt::format("tenant-{}", id % 50), lease::Class::mig, {world.slice(g, s + 1)});
      } else {
        world.end(id);
        due[id] = static_cast<std::uint64_t>((world.wall - *world.leases[id].active_since).count()) * 1000;
        over.push_back(id);
        id = 0;
      }
      world.gpus[g].watts = 100 + static_cast<double>(random.below(500));
    }
    // The control loop forgets those that ended a while ago.
    while (!over.empty() && *world.leases[over.front()].ended + milliseconds(30'000) < world.wall) {
      world.leases.erase(over.front());
      over.pop_front();
    }
    if (random.below(3) > 0) world.read();
    const auto done = world.step();
    ASSERT_TRUE(done.ok()) << done.error().message();
    if (at == settled) before = in_use() - due.size() * 64;
    if (at > settled && at % 60 == 0) worst = std::max(worst, in_use() - due.size() * 64);
  }
  world.run(5);
  EXPECT_GT(due.size(), 10'000U);
  // What grew is what the test itself remembers, and pages of SQLite's cache.
#ifdef __SANITIZE_ADDRESS__
  constexpr bool tells = false;  // its allocator tells mallinfo2 nothing
#else
  constexpr bool tells = true;
#endif
  EXPECT_TRUE(!tells || worst < before + (4U << 20U)) << worst << " against " << before;
  ASSERT_TRUE(world.meter->write().ok());
  auto file = Accounts::open(world.dir / "state", Accounts::Access::read_only);
  ASSERT_TRUE(file.ok());
  const auto first = static_cast<std::int32_t>(noon.time_since_epoch().count() / 900'000);
  for (int quarter = 0; quarter < seconds / 900; ++quarter) {
    const auto answer =
        (*file)
            ->ask({.from = first + quarter, .to = first + quarter + 1, .by_lease = true, .by_gpu = true})
            .value();
    std::map<std::string, std::uint64_t> units, joules;
    for (const auto& sum : answer.sums) {
      units[sum.gpu.text] += sum.amounts.unit_us;
      joules[sum.gpu.text] += energy(sum.amounts);
    }
    ASSERT_EQ(answer.gpus.size(), gpus) << "quarter " << quarter;
    for (const auto& gpu : answer.gpus) {
      EXPECT_EQ(gpu.us, 900'000'000U) << gpu.gpu.text << ", quarter " << quarter;
      EXPECT_EQ(units[gpu.gpu.text], gpu.us * usage::whole_gpu) << gpu.gpu.text << ", quarter " << quarter;
      EXPECT_EQ(joules[gpu.gpu.text], gpu.energy_mj) << gpu.gpu.text << ", quarter " << quarter;
    }
  }
  const auto all = (*file)->ask({.from = 0, .to = INT32_MAX, .by_lease = true}).value();
  World::adds_up(all);
  std::map<std::int64_t, std::uint64_t> counted;
  for (const auto& sum : all.sums)
    if (sum.holder.kind == Kind::lease) counted[sum.holder.lease] += sum.amounts.unit_us;
  for (const auto& [id, us] : due) ASSERT_EQ(counted[id], us * 1000) << "lease " << id;
  std::uintmax_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(world.dir / "state"))
    if (entry.is_regular_file()) bytes += entry.file_size();
  EXPECT_LT(bytes, due.size() * 600) << "a lease takes two rows where a quarter of an hour parts it";
}

}  // namespace
}  // namespace bulkhead::meter
