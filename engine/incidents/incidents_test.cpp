#include "engine/incidents/incidents.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>
#include <array>
#include <ctime>

#include <filesystem>
#include <fstream>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "engine/share/registry.hpp"
#include "engine/slice/slice.hpp"

namespace bulkhead::incidents {
namespace {

namespace fs = std::filesystem;

class Incidents : public testing::Test {
 protected:
  Incidents() {
    std::string pattern = (fs::temp_directory_path() / "incidents.XXXXXX").string();
    dir_ = ::mkdtemp(pattern.data());
    for (const char* folder : {"root/dev", "root/proc/sys/kernel/random", "state"})
      fs::create_directories(dir_ / folder);
    boot("0f3d0588-1dc8-40ab-81e1-cc07b9523faa");
    std::ofstream(dir_ / "root/dev/kmsg");
  }
  ~Incidents() override { fs::remove_all(dir_); }

  void boot(const std::string& id) const {
    std::ofstream(dir_ / "root/proc/sys/kernel/random/boot_id") << id << "\n";
  }
  void say(const std::string& text) {
    std::ofstream(dir_ / "root/dev/kmsg", std::ios::app)
        << fmt::format("3,{},{},-;{}\n", ++sequence_, monotonic_ns() / 1000, text);
  }
  void fault(unsigned xid, const std::string& gpu = "0000:3b:00") {
    say(fmt::format("NVRM: Xid (PCI:{}): {}, pid=77, name=train, Ch 00000008", gpu, xid));
  }
  std::unique_ptr<Watcher> watcher() const {
    return std::make_unique<Watcher>(
        Watcher::Settings{.root = dir_ / "root",
                          .state = dir_ / "state",
                          .nvml_library = {},
                          .name = [](diagnose::Evidence& one) { one.tenant = "tenant blue, lease 1"; },
                          .program = {}});
  }
  // What is seen when it is settled: so many incidents with so many events in all.
  static std::vector<Incident> seen(const Watcher& watcher, std::size_t incidents, std::uint64_t events) {
    std::vector<Incident> out;
    for (int i = 0; i < 2'000; ++i) {
      out = watcher.view(wall_now()).incidents;
      std::uint64_t count = 0;
      for (const auto& one : out) count += one.what.count;
      if (out.size() == incidents && count == events) break;
      ::usleep(5'000);
    }
    return out;
  }

  fs::path dir_ = {};
  std::uint64_t sequence_ = 0;
};

TEST_F(Incidents, KeepTheirNamesCountsAndTenantsOverRestarts) {
  std::vector<Incident> before;
  {
    const auto first = watcher();
    fault(31);
    fault(31);
    fault(79, "0000:5e:00");
    before = seen(*first, 2, 3);
  }
  ASSERT_EQ(before.size(), 2U);
  fault(31);  // while nobody follows
  const auto again = watcher();
  const auto after = seen(*again, 2, 4);
  ASSERT_EQ(after.size(), 2U);
  for (const auto& one : before) {
    const auto its = std::find_if(after.begin(), after.end(),
                                  [&](const auto& other) { return other.what.id == one.what.id; });
    ASSERT_NE(its, after.end()) << one.what.id;
    EXPECT_EQ(its->what.charged, one.what.charged);
    EXPECT_EQ(its->what.first_ms, one.what.first_ms);
  }
}

TEST_F(Incidents, StayClosedOverARestartAndOpenWithAnotherEvent) {
  std::string id;
  {
    const auto first = watcher();
    fault(79);
    const auto got = seen(*first, 1, 1);
    ASSERT_EQ(got.size(), 1U);
    id = got[0].what.id;
    EXPECT_TRUE(got[0].open);
    EXPECT_TRUE(first->close(id, "reset-gpu helped", wall_now()));
    EXPECT_FALSE(first->close(id, "again", wall_now()));
    EXPECT_TRUE(first->open(wall_now())->empty());
  }
  const auto again = watcher();
  auto got = seen(*again, 1, 1);
  ASSERT_EQ(got.size(), 1U);
  EXPECT_FALSE(got[0].open);
  EXPECT_EQ(got[0].closed_why, "reset-gpu helped");
  ::usleep(2'000);
  fault(79);
  got = seen(*again, 1, 2);
  ASSERT_EQ(got.size(), 1U);
  EXPECT_TRUE(got[0].open);
  EXPECT_EQ(got[0].what.id, id);
}

TEST_F(Incidents, AreClosedByABootAndTheLogOfTheNewOneIsReadFromItsBeginning) {
  {
    const auto first = watcher();
    fault(79);
    ASSERT_EQ(seen(*first, 1, 1).size(), 1U);
  }
  boot("11111111-1dc8-40ab-81e1-cc07b9523faa");
  fs::remove(dir_ / "root/dev/kmsg");
  sequence_ = 0;
  ::usleep(2'000);
  fault(79, "0000:5e:00");
  const auto again = watcher();
  const auto got = seen(*again, 2, 2);
  ASSERT_EQ(got.size(), 2U);
  EXPECT_TRUE(got[0].open);
  EXPECT_EQ(got[0].what.at->str(), "0000:5e:00.0");
  EXPECT_EQ(got[1].closed_why, "the host was booted after it");
}

TEST_F(Incidents, AFileThatIsDamagedIsSaidAndTheLogReadAnew) {
  std::ofstream(dir_ / "state/incidents.json") << "{\"version\":1,\"events\":[";
  fault(79);
  const auto one = watcher();
  EXPECT_EQ(seen(*one, 1, 1).size(), 1U);
}

TEST_F(Incidents, OfTheFabricManagersOwnLogAreKeptAndWhatItSaysMeanwhileIsHeard) {
  const auto log = dir_ / "root/var/log/fabricmanager.log";
  const auto says = [&](const std::string& text) {
    const std::time_t now = std::time(nullptr);
    std::array<char, 64> at = {};  // local time without a zone, as Fabric Manager writes it
    (void)std::strftime(at.data(), at.size(), "[%b %d %Y %H:%M:%S]", std::localtime(&now));
    std::ofstream(log, std::ios::app) << at.data() << " [ERROR] [tid 1] " << text << '\n';
    fs::permissions(log, fs::perms::owner_read | fs::perms::owner_write);
  };
  const std::string topology =
      "detected number of NVSwitches don't match with any supported system topology, aborting fabric manager";
  fs::create_directories(log.parent_path());
  says(topology);  // before anybody followed
  std::string id;
  {
    const auto first = watcher();
    fault(79);
    ASSERT_EQ(seen(*first, 1, 1).size(), 1U);
    says(
        "detected NVSwitch fatal error 20034 on fid 0 on NVSwitch pci bus id 00000000:86:00.0 physical id 3 "
        "port 33");
    const auto got = seen(*first, 2, 2);
    ASSERT_EQ(got.size(), 2U);
    const auto its = std::ranges::find_if(got, [](const auto& one) { return one.what.sxid == 20034U; });
    ASSERT_NE(its, got.end());
    id = its->what.id;
    EXPECT_EQ(its->what.evidence.at(0).file, "/var/log/fabricmanager.log");
  }
  says(topology);  // while nobody follows
  {
    const auto again = watcher();
    const auto got = seen(*again, 3, 3);
    ASSERT_EQ(got.size(), 3U);
    EXPECT_TRUE(std::ranges::any_of(got, [&](const auto& one) { return one.what.id == id; }));
    const auto its =
        std::ranges::find_if(got, [](const auto& one) { return one.what.rule == "fm.topology_mismatch"; });
    ASSERT_NE(its, got.end());
    EXPECT_TRUE(its->open);
    EXPECT_EQ(its->what.count, 1U);
    says("Successfully configured all the available NVSwitches to route NVLink traffic.");
    for (int i = 0; i < 400 && again->open(wall_now())->size() == 3; ++i) ::usleep(10'000);
    EXPECT_EQ(again->open(wall_now())->size(), 2U) << "it runs";
  }
}

TEST_F(Incidents, OfAFileThatSomebodyWroteAreBoundedAndHarmless) {
  std::ofstream(dir_ / "state/incidents.json")
      << R"({"version":1,"boot":7,"sequence":-1,"booted":"x","closed":{"a":1,"b":{"at":"x","count":-4,"why":9}},)"
      << R"("names":{"n":[]},"events":[1,{},{"line":"no fault"},{"gpu":"x","xid":1},{"gpu":"0000:3b:00.0","xid":-1},)"
      << R"({"gpu":"0000:3b:00.0","xid":79,"at":99}]})"
      << "\n";
  const auto one = watcher();
  ::usleep(400'000);
  EXPECT_LE(one->view(wall_now()).incidents.size(), 1U);
}

TEST_F(Incidents, OfManyEventsAreBounded) {
  for (int i = 0; i < 12'000; ++i) fault(31);
  fault(79, "0000:5e:00");
  const auto one = watcher();
  std::vector<Incident> got;
  for (int i = 0; i < 2'000 && got.size() != 2; ++i) {
    got = one->view(wall_now()).incidents;
    ::usleep(5'000);
  }
  ASSERT_EQ(got.size(), 2U);  // what happened once is not pushed out
  const auto notes = one->view(wall_now()).notes;
  EXPECT_TRUE(std::any_of(notes.begin(), notes.end(),
                          [](const auto& note) { return note.find("of storms") != std::string::npos; }));
  EXPECT_LT(fs::file_size(dir_ / "state/incidents.json"), 4U << 20U);
}

// ---- whose it is

lease::Lease lease_of(std::int64_t id, const std::string& tenant, std::int64_t from_ms,
                      std::optional<std::int64_t> to_ms) {
  lease::Lease out;
  out.id = id;
  out.tenant = tenant;
  out.ask.cls = lease::Class::exclusive;
  out.state = to_ms ? lease::State::ended : lease::State::active;
  out.active_since = WallTime(std::chrono::milliseconds(from_ms));
  if (to_ms) out.ended = WallTime(std::chrono::milliseconds(*to_ms));
  lease::Part part;
  part.pci = "0000:3b:00.0";
  out.parts.push_back(part);
  return out;
}
std::string owner(unsigned xid, std::int64_t at_ms) {
  control::Snapshot leases;
  leases.batch = 1;
  leases.leases.put(1, std::make_shared<const lease::Lease>(lease_of(1, "blue", 1'000'000, 2'000'000)));
  leases.leases.put(2, std::make_shared<const lease::Lease>(lease_of(2, "red", 3'000'000, std::nullopt)));
  Owners owners;
  auto one =
      diagnose::event(diagnose::Source::log, *PciAddress::parse("0000:3b:00.0"), xid, std::nullopt, at_ms);
  one.pid = 77;
  one.tenant = "/a/cgroup";
  owners.name(one, leases);
  return one.tenant;
}

TEST(Owners, AreThoseWhoHadThePlaceAtThatTime) {
  EXPECT_EQ(owner(31, 999'999), "/a/cgroup");
  EXPECT_EQ(owner(31, 1'000'000), "tenant blue, lease 1");
  EXPECT_EQ(owner(31, 2'030'000), "tenant blue, lease 1");  // its processes are ended then
  EXPECT_EQ(owner(31, 2'100'000), "/a/cgroup");
  EXPECT_EQ(owner(31, 3'000'001), "tenant red, lease 2");
}

TEST(Owners, OfACodeThatNamesWhoeverCalledAreNotGuessed) { EXPECT_EQ(owner(119, 3'500'000), "/a/cgroup"); }

TEST(Owners, OfAShareAreWhatItsProgramStartedAndNobodyForItsArbiter) {
  const auto root = std::filesystem::path(testing::TempDir()) / fmt::format("owners.{}", ::getpid());
  const auto process = [&root](int pid, int parent, std::uint64_t start) {
    const auto dir = root / "proc" / std::to_string(pid);
    std::filesystem::create_directories(dir);
    std::ofstream(dir / "stat") << pid << " (a b) S " << parent << " 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 "
                                << start << " 0\n";
  };
  process(1, 0, 1), process(300, 1, 5), process(400, 300, 10), process(500, 300, 20), process(501, 500, 30),
      process(502, 501, 40);
  process(600, 1, 50);
  control::Snapshot leases;
  auto share = lease_of(5, "green", 1'000'000, std::nullopt);
  share.ask.cls = lease::Class::share;
  leases.leases.put(5, std::make_shared<const lease::Lease>(share));
  const auto run = share::Place{.root = root}.run_dir();
  std::filesystem::create_directories(run);
  const auto write = [&](const char* name, const Json& what) { std::ofstream(run / name) << what.dump(); };
  write("1.json", share::to_json(share::Asked{.id = 1, .name = slice::share_name(5)}));
  share::Now now;
  now.arbiter = 400, now.program = 500;
  write("1.now.json", share::to_json(now));
  UniqueFd lock(::open((run / "1.lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(::flock(lock.get(), LOCK_EX), 0);
  Owners owners;
  owners.look(root, leases, monotonic_ns());
  const auto named = [&](std::uint32_t pid) {
    auto one = diagnose::event(diagnose::Source::log, *PciAddress::parse("0000:3b:00.0"), 31, std::nullopt,
                               3'500'000);
    one.pid = pid, one.tenant = "/a/cgroup";
    owners.name(one, leases);
    return one.tenant;
  };
  EXPECT_EQ(named(400), "");
  for (const std::uint32_t pid : {500U, 501U, 502U}) EXPECT_EQ(named(pid), "tenant green, lease 5") << pid;
  EXPECT_EQ(named(600), "/a/cgroup");
  EXPECT_EQ(named(77), "/a/cgroup");
  process(501, 1, 99);  // the number is somebody else's now
  EXPECT_EQ(named(501), "/a/cgroup");
  process(500, 1, 99);
  EXPECT_EQ(named(500), "/a/cgroup");
  std::filesystem::remove_all(root);
}

TEST(Concerns, ThoseWhoseSliceIsReachedWhileTheyHadIt) {
  const auto mine = lease_of(2, "red", 3'000'000, std::nullopt);
  diagnose::Incident one;
  one.at = *PciAddress::parse("0000:3b:00.0");
  one.first_ms = one.last_ms = 3'500'000;
  one.blast = diagnose::Blast::process;
  EXPECT_FALSE(concerns(one, mine));
  one.tenants = {"tenant red, lease 2"};
  EXPECT_TRUE(concerns(one, mine));
  one.tenants = {"tenant red, lease 22"};
  EXPECT_FALSE(concerns(one, mine));
  one.blast = diagnose::Blast::gpu;
  EXPECT_TRUE(concerns(one, mine));
  one.at = *PciAddress::parse("0000:5e:00.0");
  EXPECT_FALSE(concerns(one, mine));
  one.blast = diagnose::Blast::node;
  EXPECT_TRUE(concerns(one, mine));
  one.first_ms = one.last_ms = 2'500'000;  // before it
  EXPECT_FALSE(concerns(one, mine));
}

}  // namespace
}  // namespace bulkhead::incidents
