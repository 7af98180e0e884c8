// Instances cut for leases, on a twin: made, taken away, in use, cut off, hung.
#include "engine/slice/slice.hpp"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/json.hpp"
#include "edge/process/process.hpp"
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

TEST_F(SliceTest, MigModeGoesOffWhereNothingIsToStay) {
  const auto made = create({{gpus_[0], "1g.10gb", 0}, {gpus_[0], "1g.10gb", 1}, {gpus_[1], "1g.10gb", 0}});
  ASSERT_EQ(made.size(), 3U);
  const auto no = change(settings(), {.destroy = {made[0].place}, .mig_off = {gpus_[0]}});
  ASSERT_FALSE(no.ok());
  EXPECT_EQ(no.error().code(), Errc::in_use);
  EXPECT_THAT(layout(), ElementsAre("0: 1g.10gb@0 1g.10gb@1", "1: 1g.10gb@0"));
  const Change both{.destroy = {made[0].place, made[1].place}, .mig_off = {gpus_[0], gpus_[5]}};
  for (int i = 0; i < 2; ++i) {
    const auto off = change(settings(), both);
    ASSERT_TRUE(off.ok()) << off.error().message();
    EXPECT_THAT(layout(), ElementsAre("1: 1g.10gb@0"));
  }
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

TEST_F(SliceTest, TheCdiFileOfALeaseIsWhatAContainerRuntimeReads) {
  lease::Lease lease{.id = 17};
  lease.parts = {{.device = {"MIG-a"},
                  .device_nodes = {"/dev/nvidia0", "/dev/nvidiactl"},
                  .cdi = "bulkhead.dev/slice=l17-0"},
                 {.device = {"MIG-b"},
                  .device_nodes = {"/dev/nvidia1", "/dev/nvidiactl"},
                  .cdi = "bulkhead.dev/slice=l17-1"}};
  const auto written = write_cdi(settings(), lease);
  ASSERT_TRUE(written.ok()) << written.error().message();
  const fs::path path = twin() / "root/run/cdi/bulkhead.dev-slice-17.json";
  const auto file = parse_json(read_file(path).value_or(""));
  ASSERT_TRUE(file.ok());
  EXPECT_EQ((*file)["cdiVersion"], "0.3.0");
  EXPECT_EQ((*file)["kind"], "bulkhead.dev/slice");
  const auto& devices = (*file)["devices"];
  ASSERT_EQ(devices.size(), 3U);
  EXPECT_EQ(devices[0]["name"], "l17-0");
  EXPECT_EQ(devices[1]["containerEdits"]["env"][0], "CUDA_VISIBLE_DEVICES=MIG-b");
  EXPECT_EQ(devices[2]["name"], "l17");
  EXPECT_EQ(devices[2]["containerEdits"]["env"][0], "CUDA_VISIBLE_DEVICES=MIG-a,MIG-b");
  EXPECT_EQ(devices[2]["containerEdits"]["deviceNodes"].size(), 3U);
  ASSERT_TRUE(remove_cdi(settings(), 17).ok());
  EXPECT_FALSE(fs::exists(path));
  EXPECT_TRUE(remove_cdi(settings(), 17).ok());
  lease.parts[0].cdi = "nvidia.com/gpu=0";
  EXPECT_FALSE(write_cdi(settings(), lease).ok());
  lease.ask.cls = lease::Class::share;
  const auto shared = write_cdi(settings(), lease);
  ASSERT_FALSE(shared.ok());
  EXPECT_EQ(shared.error().code(), Errc::unsupported);
}

// ---- scrub

// A real process that has a file open and waits. `how` runs in it first, with the descriptor.
class Guest {
 public:
  Guest(const fs::path& file, unsigned uid, const std::function<void(int)>& how) {
    int ready[2];
    EXPECT_EQ(::pipe(ready), 0);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      const int fd = ::open(file.c_str(), O_RDWR | O_CLOEXEC);
      if (fd < 0) ::_exit(1);
      if (uid != 0 && ::setuid(uid) != 0) ::_exit(1);
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      how(fd);
      (void)!::write(ready[1], "x", 1);
      while (true) ::pause();
    }
    ::close(ready[1]);
    char byte = 0;
    EXPECT_EQ(::read(ready[0], &byte, 1), 1) << "the guest could not begin";
    ::close(ready[0]);
  }
  ~Guest() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  bool alive() const { return !zombie(); }
  int pid() const { return pid_; }

 private:
  bool zombie() const {
    siginfo_t info{};
    return ::waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
           info.si_pid == pid_;
  }
  pid_t pid_ = 0;
};
void nothing(int) {}

class ScrubTest : public SliceTest {
 protected:
  void SetUp() override {
    if (::geteuid() != 0) GTEST_SKIP() << "needs root: it looks into processes of others";
  }
  lease::Lease lease_of(const std::vector<Device>& devices) const {
    lease::Lease out{.id = 17, .tenant = "a", .state = lease::State::releasing};
    for (const auto& device : devices)
      out.parts.push_back({.gpu = device.place.gpu,
                           .device = device.device,
                           .profile = device.place.profile,
                           .start = device.place.start,
                           .gpu_instance = device.gpu_instance,
                           .compute_instance = device.compute_instance,
                           .generation = device.generation,
                           .memory = device.memory,
                           .device_nodes = device.device_nodes});
    return out;
  }
  fs::path file(const std::string& node) const { return twin() / "root" / fs::path(node).relative_path(); }
};
constexpr unsigned somebody = 64'123;

TEST_F(ScrubTest, WhoHasTheInstanceOpenIsEndedEvenIfItDoesNotWantToAndItsNeighbourIsNot) {
  const auto made = create({{gpus_[0], "3g.40gb", 0}, {gpus_[0], "3g.40gb", 4}});
  ASSERT_EQ(made.size(), 2U);
  const Guest stubborn(file(made[0].device_nodes[5]), somebody, [](int) { ::signal(SIGTERM, SIG_IGN); });
  const Guest polite(file(made[0].device_nodes[4]), somebody, nothing);
  const Guest hidden(file(made[0].device_nodes[5]), somebody, [](int) {
    ::prctl(PR_SET_DUMPABLE, 0);  // its /proc files are root's then
  });
  const Guest neighbour(file(made[1].device_nodes[5]), somebody, nothing);
  const Guest other(file("/dev/nvidia0"), somebody, nothing);
  const auto lease = lease_of(made);
  const auto done = scrub(settings(), lease, lease.parts[0]);
  ASSERT_TRUE(done.ok()) << done.error().message();
  EXPECT_EQ(done->ended, 3U);
  EXPECT_TRUE(done->left.empty()) << done->left.front();
  EXPECT_FALSE(stubborn.alive());
  EXPECT_FALSE(polite.alive());
  EXPECT_FALSE(hidden.alive());
  EXPECT_TRUE(neighbour.alive());
  EXPECT_TRUE(other.alive());
  const auto again = scrub(settings(), lease, lease.parts[0]);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->ended, 0U);
}

TEST_F(ScrubTest, AMappingOrAThreadWithATableOfItsOwnDoesNotHide) {
  const auto made = create({{gpus_[0], "1g.10gb", 0}});
  ASSERT_EQ(made.size(), 1U);
  const fs::path node = file(made[0].device_nodes[5]);
  fs::permissions(node, fs::perms::all);
  fs::resize_file(node, 4096);
  const Guest mapping(node, somebody, [](int fd) {
    if (::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED) ::_exit(1);
    ::close(fd);
  });
  const Guest thread(node, somebody, [](int fd) {
    static std::atomic<bool> ready{false};
    std::thread([] {
      (void)::unshare(CLONE_FILES);
      ready = true;
      while (true) ::pause();
    }).detach();
    while (!ready) ::usleep(1000);
    ::close(fd);  // in the table of the first thread alone
  });
  const auto lease = lease_of(made);
  const auto done = scrub(settings(), lease, lease.parts[0]);
  ASSERT_TRUE(done.ok()) << done.error().message();
  EXPECT_EQ(done->ended, 2U);
  EXPECT_FALSE(mapping.alive());
  EXPECT_FALSE(thread.alive());
}

TEST_F(ScrubTest, WhatLooksAfterTheMachineStays) {
  lease::Lease lease{.id = 3, .ask = {.cls = lease::Class::exclusive}};
  lease.active_since = wall_now() + std::chrono::seconds(60);  // so the guests were there before it
  lease.parts = {{.gpu = gpus_[1], .device_nodes = {"/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia-uvm"}}};
  // The tests' own program is spared as bulkhead's is: the guest runs another one.
  const auto begin = [&](const char* more) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      const int first = ::open(file("/dev/nvidia1").c_str(), O_RDWR);
      const int second = *more != 0 ? ::open(more, O_RDWR) : 0;
      if (first < 0 || second < 0) ::_exit(1);
      ::execl("/bin/sleep", "sleep", "1000", static_cast<char*>(nullptr));
      ::_exit(1);
    }
    ::usleep(100'000);
    return child;
  };
  const std::string uvm = file("/dev/nvidia-uvm").string();
  const pid_t monitor = begin("");
  const pid_t computes = begin(uvm.c_str());
  const auto gone = [](pid_t pid) {
    siginfo_t info{};
    return ::waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
           info.si_pid == pid;
  };
  auto done = scrub(settings(), lease, lease.parts[0]);
  ASSERT_TRUE(done.ok()) << done.error().message();
  EXPECT_EQ(done->ended, 1U);
  EXPECT_TRUE(done->left.empty());
  EXPECT_FALSE(gone(monitor));
  EXPECT_TRUE(gone(computes));
  // The same process, where the lease was there first.
  lease.active_since = wall_now() - std::chrono::seconds(60);
  done = scrub(settings(), lease, lease.parts[0]);
  ASSERT_TRUE(done.ok());
  EXPECT_EQ(done->ended, 1U);
  EXPECT_TRUE(gone(monitor));
  for (const pid_t pid : {monitor, computes}) {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
  }
}

TEST_F(ScrubTest, WhatCannotBeEndedIsSaid) {
  const auto made = create({{gpus_[0], "1g.10gb", 0}});
  ASSERT_EQ(made.size(), 1U);
  // Known to the driver alone, as a process behind another kernel's pid namespace would be.
  ASSERT_TRUE(twin::attach(twin(), {.gpu = 0,
                                    .gpu_instance = made[0].gpu_instance,
                                    .compute_instance = made[0].compute_instance,
                                    .name = "train",
                                    .memory_bytes = 5ULL << 30U})
                  .ok());
  const auto lease = lease_of(made);
  auto done = scrub(settings(), lease, lease.parts[0]);
  ASSERT_TRUE(done.ok()) << done.error().message();
  EXPECT_THAT(done->left, Contains(HasSubstr("(train) is no process of this machine")));
  EXPECT_THAT(done->left, Contains(HasSubstr("5120 MiB of its memory")));
  ASSERT_TRUE(twin::detach(twin(), std::nullopt).ok());
  done = scrub(settings(), lease, lease.parts[0]);
  ASSERT_TRUE(done.ok());
  EXPECT_TRUE(done->left.empty());
}

TEST_F(ScrubTest, OneLookTellsThePartsNobodyTouchedFromThoseToBeScrubbed) {
  const auto made = create({{gpus_[0], "1g.10gb", 0},
                            {gpus_[0], "1g.10gb", 1},
                            {gpus_[0], "1g.10gb", 2},
                            {gpus_[1], "1g.10gb", 0}});
  ASSERT_EQ(made.size(), 4U);
  const auto lease = lease_of(made);
  std::vector<Held> parts;
  for (const auto& part : lease.parts) parts.push_back({lease, part});
  auto all = clean(settings(), parts);
  ASSERT_TRUE(all.ok()) << all.error().message();
  EXPECT_EQ(*all, (std::vector<bool>{true, true, true, true}));
  {
    const Guest guest(file(made[1].device_nodes[5]), somebody, nothing);
    ASSERT_TRUE(twin::attach(twin(), {.gpu = 0,
                                      .gpu_instance = made[2].gpu_instance,
                                      .compute_instance = made[2].compute_instance,
                                      .name = "train",
                                      .memory_bytes = 5ULL << 30U})
                    .ok());
    all = clean(settings(), parts);
    ASSERT_TRUE(all.ok());
    EXPECT_EQ(*all, (std::vector<bool>{true, false, false, true}));
    EXPECT_TRUE(guest.alive());
  }
  ASSERT_TRUE(twin::detach(twin(), std::nullopt).ok());
  EXPECT_EQ(*clean(settings(), parts), (std::vector<bool>{true, true, true, true}));
  EXPECT_TRUE(clean(settings(), {})->empty());
}

TEST_F(ScrubTest, AVirtualMachineThatStillHasItsGpuIsEnded) {
  fs::create_directories(file("/dev/vfio"));
  for (const char* node : {"/dev/vfio/vfio", "/dev/vfio/7"}) std::ofstream(file(node)) << "";
  lease::Lease lease{.id = 5, .ask = {.cls = lease::Class::passthrough}};
  lease.parts = {{.gpu = {"PCI-0000:99:00.0"}, .device_nodes = {"/dev/vfio/vfio", "/dev/vfio/7"}}};
  const Guest machine(file("/dev/vfio/7"), somebody, nothing);
  const Guest other(file("/dev/vfio/vfio"), somebody, nothing);
  const Held part{lease, lease.parts[0]};
  EXPECT_EQ(*clean(settings(), {&part, 1}), std::vector<bool>{false});
  const auto done = scrub(settings(), lease, lease.parts[0]);
  ASSERT_TRUE(done.ok()) << done.error().message();
  EXPECT_EQ(done->ended, 1U);
  EXPECT_TRUE(done->left.empty());
  EXPECT_FALSE(machine.alive());
  EXPECT_TRUE(other.alive());
  EXPECT_EQ(*clean(settings(), {&part, 1}), std::vector<bool>{true});
}

TEST_F(ScrubTest, AVirtualMachineThatHasSeveralDevicesOfItsLeaseIsEndedOnce) {
  fs::create_directories(file("/dev/vfio"));
  for (const char* node : {"/dev/vfio/vfio", "/dev/vfio/7"}) std::ofstream(file(node)) << "";
  // Two functions of one group share its file.
  lease::Lease lease{.id = 6, .ask = {.cls = lease::Class::passthrough}};
  lease.parts = {{.gpu = {"PCI-0000:99:00.0"}, .device_nodes = {"/dev/vfio/vfio", "/dev/vfio/7"}},
                 {.gpu = {"PCI-0000:99:00.1"}, .device_nodes = {"/dev/vfio/vfio", "/dev/vfio/7"}}};
  const Guest machine(file("/dev/vfio/7"), somebody, nothing);
  unsigned ended = 0;
  for (const auto& part : lease.parts) {
    const auto done = scrub(settings(), lease, part);
    ASSERT_TRUE(done.ok()) << done.error().message();
    EXPECT_TRUE(done->left.empty());
    ended += done->ended;
  }
  EXPECT_EQ(ended, 1U);
  EXPECT_FALSE(machine.alive());
}

}  // namespace
}  // namespace bulkhead::slice
