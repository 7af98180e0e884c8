// Rollback and settling of device steps, on a directory tree that stands for the bus, with a real journal and
// the real worker. What a kernel makes of the same is in tests/lab: power-rollback, reclaim-rescan.
#include "engine/execute/execute.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

namespace bulkhead::execute {
namespace {

namespace fs = std::filesystem;
using plan::SetDriver;
using testing::HasSubstr;

constexpr const char* gpu = "0000:01:00.0";
constexpr const char* sound = "0000:01:00.1";
constexpr const char* usb = "0000:01:00.2";

PciAddress at(const std::string& text) { return *PciAddress::parse(text); }
// The step of a reclaim that gave a function back to its driver.
SetDriver back_to(const std::string& driver, const std::string& function, bool replug = false) {
  return {{at(function), {}}, {"vfio-pci", "vfio-pci"}, {driver, ""}, replug};
}

class ExecuteTest : public testing::Test {
 protected:
  ExecuteTest() {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-execute-XXXXXX").string();
    root_ = ::mkdtemp(pattern.data());
    options_.access.root = root_;
    options_.access.state_dir = root_ / "state";
    options_.access.nvml_library = (root_ / "no-library.so").string();
    fs::create_directories(options_.access.state_dir);
    for (const auto* module : {"vfio_pci", "vfio_iommu_type1"})
      fs::create_directories(root_ / "sys/module" / module);
    fs::create_directories(root_ / "sys/bus/pci/devices");
    put("sys/bus/pci/rescan", "");
    boot("this-boot");
  }
  ~ExecuteTest() override { fs::remove_all(root_); }

  void put(const std::string& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path, std::ios::binary) << text;
  }
  void boot(const std::string& id) { put("proc/sys/kernel/random/boot_id", id + "\n"); }
  fs::path device(const std::string& function) const { return root_ / "sys/devices" / function; }
  fs::path entry(const std::string& function) const { return root_ / "sys/bus/pci/devices" / function; }
  void function(const std::string& address, const std::string& driver, const std::string& override_now) {
    put("sys/devices/" + address + "/driver_override", override_now + "\n");
    fs::create_directories(root_ / "sys/bus/pci/drivers" / driver);
    fs::create_symlink("../../bus/pci/drivers/" + driver, device(address) / "driver");
    fs::create_symlink("../../../devices/" + address, entry(address));
  }
  std::string override_of(const std::string& address) const {
    std::ifstream file(device(address) / "driver_override");
    std::string text;
    std::getline(file, text);
    return text;
  }
  std::unique_ptr<store::Store> journal() {
    auto opened = store::Store::open(options_.access.state_dir, store::Store::Access::read_write);
    EXPECT_TRUE(opened.ok());
    return std::move(opened).value();
  }
  // A run of the boot that is on, cut off after `done` of the steps it meant to take; all of them are in its
  // first intent.
  std::int64_t cut_off(const std::vector<plan::Action>& meant, std::size_t done) {
    const auto store = journal();
    const auto run = store->begin_run({.verb = "apply", .boot_id = boot_now(), .pid = 1, .node_file = "x"});
    Json devices = Json::array();
    for (const auto& action : meant) devices.push_back(plan::to_json(action));
    for (std::size_t i = 0; i < done; ++i) {
      Json detail = Json::object();
      if (i == 0) detail["devices"] = devices;
      const auto step = store->intend({.run = *run,
                                       .kind = std::string(plan::kind_of(meant[i])),
                                       .action = plan::to_json(meant[i]),
                                       .detail = detail});
      EXPECT_TRUE(store->settle(*step, store::StepState::done, "", {}).ok());
    }
    EXPECT_TRUE(store->end_run(*run, store::RunState::interrupted, "killed").ok());
    return *run;
  }
  std::string boot_now() const {
    std::ifstream file(root_ / "proc/sys/kernel/random/boot_id");
    std::string text;
    std::getline(file, text);
    return text;
  }

  fs::path root_;
  Options options_;
};

// The boot left two functions with vfio-pci and no override, which an undo makes whole with one write, and
// the third as it was before the run.
class AfterAReclaimCutOffAtItsFirstFunction : public ExecuteTest {
 protected:
  AfterAReclaimCutOffAtItsFirstFunction() {
    function(gpu, "vfio-pci", "(null)");
    function(sound, "vfio-pci", "(null)");
    function(usb, "vfio-pci", "vfio-pci");
    run_ = cut_off({back_to("nvidia", gpu), back_to("snd_hda_intel", sound), back_to("xhci_hcd", usb)}, 1);
  }
  std::int64_t run_ = 0;
};

TEST_F(AfterAReclaimCutOffAtItsFirstFunction, RollbackInTheSameBootTakesBackWhatWasDone) {
  const auto outcome = rollback(options_);
  ASSERT_TRUE(outcome.ok()) << outcome.error().message();
  EXPECT_EQ(outcome->verdict, Verdict::rolled_back) << outcome->failure;
  EXPECT_EQ(outcome->steps_undone, 1U);
  EXPECT_EQ(override_of(gpu), "vfio-pci");
  EXPECT_EQ(override_of(sound), "(null)");
}

TEST_F(AfterAReclaimCutOffAtItsFirstFunction,
       RollbackInAnotherBootTakesBackAllItMeantToDoButWhatIsSoAlready) {
  boot("the-next-boot");
  const auto outcome = rollback(options_);
  ASSERT_TRUE(outcome.ok()) << outcome.error().message();
  EXPECT_EQ(outcome->verdict, Verdict::rolled_back) << outcome->failure;
  EXPECT_EQ(outcome->steps_undone, 2U);
  for (const auto* one : {gpu, sound, usb}) EXPECT_EQ(override_of(one), "vfio-pci") << one;
  EXPECT_EQ((*journal()->run(run_))->state, store::RunState::rolled_back);
  const auto again = rollback(options_);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->verdict, Verdict::nothing_to_do);
}

TEST_F(AfterAReclaimCutOffAtItsFirstFunction, RollbackThatCannotNamesWhatIsLeftAndTheWaysOut) {
  boot("the-next-boot");
  fs::remove(device(sound) / "driver");  // no kernel here binds it again
  const auto outcome = rollback(options_);
  ASSERT_TRUE(outcome.ok()) << outcome.error().message();
  EXPECT_EQ(outcome->verdict, Verdict::stuck);
  ASSERT_FALSE(outcome->left.empty());
  EXPECT_THAT(outcome->left.front(), HasSubstr(sound));
  EXPECT_THAT(outcome->hint, HasSubstr(std::string("bulkhead reclaim ") + gpu));
  EXPECT_THAT(outcome->hint, HasSubstr("bulkhead apply -f FILE"));
}

// A boot may finish what a reclaim began. Asked for again there is nothing left to do, and an apply that
// comes later is a run of its own: its rollback must not take the reclaim back with it.
TEST_F(ExecuteTest, ARunCutOffThatIsAskedForAgainAndFoundCompleteIsOver) {
  function(gpu, "vfio-pci", "(null)");  // an undo is one write
  const auto run = cut_off({back_to("nvidia", gpu)}, 1);
  boot("the-next-boot");
  put("proc/sys/kernel/osrelease", "6.1.0\n");
  const std::string text = "apiVersion: bulkhead/v1\nkind: Node\n";
  const spec::NodeFile node = {};
  const auto other = apply(options_, node, text);
  ASSERT_TRUE(other.ok()) << other.error().message();
  EXPECT_EQ(other->verdict, Verdict::nothing_to_do);
  EXPECT_EQ((*journal()->run(run))->state, store::RunState::interrupted) << "another node file's";
  const auto same = apply(options_, node, "x");
  ASSERT_TRUE(same.ok()) << same.error().message();
  EXPECT_EQ(same->verdict, Verdict::nothing_to_do);
  EXPECT_EQ((*journal()->run(run))->state, store::RunState::done);
  const auto back = rollback(options_);  // and it may be taken back like any other
  ASSERT_TRUE(back.ok()) << back.error().message();
  EXPECT_EQ((*journal()->run(run))->state, store::RunState::rolled_back);
}

TEST_F(ExecuteTest, ARecordOfSomethingElseThanDevicesIsCorruptAndNothingIsTouched) {
  function(gpu, "vfio-pci", "(null)");
  cut_off({back_to("nvidia", gpu), plan::SetPersistence{{"GPU-1"}, false, true}}, 1);
  boot("the-next-boot");
  const auto outcome = rollback(options_);
  ASSERT_FALSE(outcome.ok());
  EXPECT_EQ(outcome.error().code(), Errc::corrupt);
  EXPECT_EQ(override_of(gpu), "(null)");
}

TEST_F(ExecuteTest, ARunKilledBetweenRemovalAndScanIsEndedByAScan) {
  function(gpu, "nvidia", "(null)");
  fs::remove(entry(gpu));
  {
    const auto store = journal();
    const auto run = store->begin_run({.verb = "apply", .boot_id = boot_now(), .pid = 1, .node_file = "x"});
    const plan::Action action = back_to("nvidia", gpu, true);
    ASSERT_TRUE(store->intend({.run = *run, .kind = "set-driver", .action = plan::to_json(action)}).ok());
  }
  // The kernel's part: who scans finds it.
  std::atomic<bool> stop = false;
  std::thread bus([&] {
    while (!stop) {
      std::error_code failed;
      if (fs::file_size(root_ / "sys/bus/pci/rescan", failed) > 0 && !fs::is_symlink(entry(gpu)))
        fs::create_symlink(std::string("../../../devices/") + gpu, entry(gpu), failed);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  options_.plan.evict = true;
  const auto outcome = rollback(options_);
  stop = true;
  bus.join();
  ASSERT_TRUE(outcome.ok()) << outcome.error().message();
  ASSERT_EQ(outcome->settled.size(), 1U);
  EXPECT_THAT(outcome->settled[0], HasSubstr("it is done"));
  EXPECT_TRUE(fs::is_symlink(entry(gpu)));
}

TEST_F(ExecuteTest, AReplugOfWhatHadNoDriverIsDoneWhenItHasNone) {
  function(gpu, "none", "(null)");
  fs::remove(device(gpu) / "driver");
  {
    const auto store = journal();
    const auto run = store->begin_run({.verb = "apply", .boot_id = boot_now(), .pid = 1, .node_file = "x"});
    const plan::Action action = back_to("", gpu, true);
    ASSERT_TRUE(store
                    ->intend({.run = *run,
                              .kind = "set-driver",
                              .action = plan::to_json(action),
                              .detail = Json::object()})
                    .ok());
  }
  const auto outcome = rollback(options_);
  ASSERT_TRUE(outcome.ok()) << outcome.error().message();
  ASSERT_EQ(outcome->settled.size(), 1U);
  EXPECT_THAT(outcome->settled[0], HasSubstr("it is done"));
}

TEST_F(ExecuteTest, ADeviceThatNoScanFindsIsSettledAsGoneAndBlocksNothing) {
  put("sys/devices/" + std::string(gpu) + "/driver_override", "(null)\n");  // off the bus
  {
    const auto store = journal();
    const auto run = store->begin_run({.verb = "apply", .boot_id = boot_now(), .pid = 1, .node_file = "x"});
    const plan::Action action = back_to("nvidia", gpu, true);
    ASSERT_TRUE(store
                    ->intend({.run = *run,
                              .kind = "set-driver",
                              .action = plan::to_json(action),
                              .detail = Json::object()})
                    .ok());
  }
  const auto outcome = rollback(options_);
  ASSERT_TRUE(outcome.ok()) << outcome.error().message();
  ASSERT_EQ(outcome->settled.size(), 1U);
  EXPECT_THAT(outcome->settled[0], HasSubstr("the device is gone"));
  EXPECT_TRUE(journal()->in_flight()->empty());
}

}  // namespace
}  // namespace bulkhead::execute
