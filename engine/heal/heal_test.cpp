// The healer on a twin with a real control loop and the real check: it is shown incidents that the test makes
// up, and what it does is read in the twin's driver, the book and its file.
#include "engine/heal/heal.hpp"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <future>
#include <thread>

#include "base/fd.hpp"
#include "engine/execute/execute.hpp"
#include "twin/control/control.hpp"

namespace bulkhead::heal {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;
using lease::State;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr const char* whole =
    "apiVersion: bulkhead/v1\nkind: Node\ngpus:\n  - select: {all: true}\n    mode: exclusive\n";
constexpr const char* sliced =
    "apiVersion: bulkhead/v1\nkind: Node\ngpus:\n  - select: {index: \"0\"}\n    mode: mig\n    layout: "
    "[3g.40gb, 3g.40gb]\n  - select: {index: \"1-7\"}\n    mode: exclusive\n";

const control::Caller admin{.user = "root", .role = access::Role::admin, .from = "uid 0"};

class HealerTest : public testing::Test {
 protected:
  HealerTest() {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-healer-XXXXXX").string();
    directory_ = ::mkdtemp(pattern.data());
    const auto made = twin::up({.profile = "dgx-h100", .directory = directory_ / "twin", .init = false});
    EXPECT_TRUE(made.ok()) << (made.ok() ? "" : made.error().message());
    // What the check needs to find the twin's CUDA.
    ::setenv("BULKHEAD_TWIN", (directory_ / "twin").c_str(), 1);
    ::setenv("BULKHEAD_ROOT", (directory_ / "twin/root").c_str(), 1);
    ::setenv("LD_PRELOAD", (directory_ / "twin/lib/libbulkhead-twin-device.so").c_str(), 1);
    program_ = fs::read_symlink("/proc/self/exe").parent_path() / "bulkhead";
    // The twin's tool calls the program that made the twin, which here is the tests.
    const auto tool = directory_ / "twin/root/usr/bin/nvidia-smi";
    fs::remove(tool);
    std::ofstream(tool) << "#!/bin/sh\nexec '" << program_.string() << "' twin reset \"$3\" --dir '"
                        << (directory_ / "twin").string() << "'\n";
    fs::permissions(tool, fs::perms::owner_all);
  }
  // The check is a process of the program, with the twin's CUDA: a tree of the tests alone has neither.
  void SetUp() override {
    if (!fs::exists(program_) || !fs::exists(program_.parent_path() / "libcuda.so.1"))
      GTEST_SKIP() << "no bulkhead or no libcuda.so.1 beside the tests";
  }
  ~HealerTest() override {
    healer_.reset();
    control_.reset();
    for (const char* name : {"BULKHEAD_TWIN", "BULKHEAD_ROOT", "LD_PRELOAD"}) ::unsetenv(name);
    fs::remove_all(directory_);
  }

  fs::path state() const { return directory_ / "twin/root/var/lib/bulkhead"; }
  observe::Access access() const {
    return {.root = directory_ / "twin/root",
            .nvml_library = (directory_ / "twin/lib/libnvidia-ml.so.1").string(),
            .state_dir = state()};
  }
  void serve(const std::string& node, const std::string& heal) {
    head_ = node;
    mode(heal);
    control::Settings settings{.access = access(), .state = state(), .node_file = directory_ / "node.yaml"};
    settings.tick = 20ms;
    settings.look_every = 200ms;
    settings.grace = 100ms;
    auto control = control::Control::start(settings);
    ASSERT_TRUE(control.ok()) << (control.ok() ? "" : control.error().message());
    control_ = std::move(*control);
    for (const auto& gpu : control_->now()->gpus) uuids_.push_back(gpu.gpu);
    ASSERT_EQ(uuids_.size(), 8U);
    const auto host = observe::host(access());
    ASSERT_TRUE(host.ok());
    for (const auto& gpu : host->gpus) {
      sample::Gpu seen{.index = gpu.index, .uuid = gpu.uuid};
      seen.pci = gpu.pci.address;
      seen.mig = gpu.mig_now;
      seen_.gpus.push_back(seen);
    }
    start();
  }
  void mode(const std::string& heal) {
    std::ofstream(directory_ / "node.yaml") << head_ << "heal: " << heal << "\n";
  }
  void start() {
    healer_.reset();
    healer_ = std::make_unique<Healer>(*control_,
                                       Healer::Place{.access = access(),
                                                     .state = state(),
                                                     .node_file = directory_ / "node.yaml",
                                                     .let_go = {},
                                                     .program = program_,
                                                     .grace_ms = 100,
                                                     .check_ms = 20'000},
                                       [this](const std::string& id, const std::string&) {
                                         const std::lock_guard hold(mutex_);
                                         mended_.push_back(id);
                                       });
  }
  diagnose::Incident fault(unsigned gpu, Act act, std::optional<unsigned> instance = {}) {
    diagnose::Incident out;
    out.id = fmt::format("fault@{}#{}", gpu, ++faults_);
    out.title = "a fault of the test";
    out.remedy = act;
    out.at = seen_.gpus.at(gpu).pci;
    out.gpu_instance = instance;
    out.confidence = diagnose::Confidence::high;
    out.count = 1;
    out.last_ms = wall_now().time_since_epoch().count();
    return out;
  }
  void beat() { healer_->step(open_, seen_, *control_->now(), wall_now()); }
  template <class F>
  bool until(F holds, std::chrono::milliseconds within = 30s) {
    const auto end = std::chrono::steady_clock::now() + within;
    while (!holds()) {
      if (std::chrono::steady_clock::now() > end) return false;
      beat();
      std::this_thread::sleep_for(10ms);
    }
    return true;
  }
  // Of the newest act: how it ended.
  std::optional<Doing> ended() const {
    const auto view = healer_->view();
    if (view.tasks.empty() || view.tasks.front().doing == Doing::under_way) return std::nullopt;
    return view.tasks.front().doing;
  }
  std::string said() const {
    std::string out;
    for (const auto& task : healer_->view().tasks) out += dump(to_json(task));
    return out;
  }
  bool shut(unsigned gpu) const { return control_->now()->gpus.at(gpu).cordon.has_value(); }
  std::int64_t lease(lease::Ask ask) {
    std::promise<void> named;
    control_->put_tenant(admin, {.name = "blue"}, std::nullopt, [&](const auto&) { named.set_value(); });
    named.get_future().wait();
    std::promise<control::Answer<lease::Lease>> made;
    control::Caller caller = admin;
    caller.tenant = "blue";
    control_->create_lease(caller, std::move(ask), {},
                           [&](auto answer) { made.set_value(std::move(answer)); });
    const auto answer = made.get_future().get();
    const auto* granted = std::get_if<lease::Lease>(&answer);
    EXPECT_NE(granted, nullptr) << std::get<control::Refusal>(answer).what;
    if (granted == nullptr) return 0;
    EXPECT_TRUE(until([&] { return state_of(granted->id) == State::active; }));
    return granted->id;
  }
  std::shared_ptr<const lease::Lease> the(std::int64_t id) const {
    const auto now = control_->now();
    const auto at = now->leases.find(id);
    return at == now->leases.end() ? nullptr : at->second;
  }
  State state_of(std::int64_t id) const {
    const auto it = the(id);
    return it == nullptr ? State::ended : it->state;
  }
  unsigned gpu_of(std::int64_t id) const {
    const auto it = the(id);
    for (unsigned gpu = 0; gpu < uuids_.size(); ++gpu)
      if (it != nullptr && it->parts.at(0).gpu == uuids_[gpu]) return gpu;
    return ~0U;
  }

  fs::path directory_, program_;
  std::string head_;
  std::unique_ptr<control::Control> control_;
  std::unique_ptr<Healer> healer_;
  std::vector<Uuid> uuids_;
  sample::Snapshot seen_;
  std::vector<diagnose::Incident> open_;
  std::mutex mutex_;
  std::vector<std::string> mended_;
  unsigned faults_ = 0;
};

TEST_F(HealerTest, SuggestingItSaysWhatItWouldDoToWhomAndTouchesNothing) {
  serve(whole, "{mode: suggest}");
  const auto id = lease({.cls = lease::Class::exclusive});
  open_ = {fault(gpu_of(id), Act::reset_gpu)};
  beat();
  std::this_thread::sleep_for(100ms);
  beat();
  const auto view = healer_->view();
  ASSERT_EQ(view.open.size(), 1U);
  EXPECT_EQ(view.open[0].decision.act, Act::reset_gpu);
  EXPECT_FALSE(view.open[0].decision.now);
  ASSERT_EQ(view.open[0].decision.victims.size(), 1U);
  EXPECT_EQ(view.open[0].decision.victims[0].lease, id);
  EXPECT_FALSE(view.open[0].decision.commands.empty());
  EXPECT_THAT(view.tasks, IsEmpty());
  EXPECT_EQ(state_of(id), State::active);
  EXPECT_FALSE(shut(gpu_of(id)));
}

TEST_F(HealerTest, AGpuIsResetAfterItsLeaseWasToldAndServesAgainAfterTheCheck) {
  serve(whole, "{mode: act}");
  const auto id = lease({.cls = lease::Class::exclusive}), other = lease({.cls = lease::Class::exclusive});
  const unsigned gpu = gpu_of(id);
  ASSERT_TRUE(twin::break_it(directory_ / "twin", {.name = "ecc", .gpu = gpu, .count = 1}).ok());
  open_ = {fault(gpu, Act::reset_gpu)};
  ASSERT_TRUE(until([&] { return ended().has_value(); })) << said();
  EXPECT_EQ(ended(), Doing::helped) << said();
  EXPECT_EQ(state_of(id), State::ended);
  EXPECT_THAT(the(id)->reason, HasSubstr("healing: reset-gpu"));
  EXPECT_EQ(state_of(other), State::active);
  EXPECT_TRUE(until([&] { return !shut(gpu); }));
  EXPECT_THAT(said(), HasSubstr("successfully reset"));
  EXPECT_THAT(said(), HasSubstr("each word as it was"));
  const std::lock_guard hold(mutex_);
  EXPECT_EQ(mended_, std::vector<std::string>{open_[0].id});
}

TEST_F(HealerTest, WhoElseHasTheGpuOpenIsNamedBeforeAResetAndNoneIsTried) {
  serve(whole, "{mode: suggest}");
  const std::string node = (directory_ / "twin/root/dev/nvidia3").string();
  ASSERT_TRUE(fs::exists(node));
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const int open = ::open(node.c_str(), O_RDONLY);  // stays open over exec
    if (open >= 0) ::execl("/bin/sleep", "sleep", "300", static_cast<char*>(nullptr));
    ::_exit(127);
  }
  open_ = {fault(3, Act::reset_gpu)};
  const std::string who = fmt::format("pid {} (sleep)", child);
  EXPECT_TRUE(until([&] {
    const auto view = healer_->view();
    return view.open.size() == 1 &&
           std::any_of(view.open[0].decision.disturbed.begin(), view.open[0].decision.disturbed.end(),
                       [&](const std::string& one) { return one.starts_with(who); });
  }));
  mode("{mode: act}");
  healer_->reload();
  EXPECT_TRUE(until([&] { return ended().has_value(); })) << said();
  EXPECT_THAT(said(), HasSubstr("a reset needs it alone, and none was tried"));
  EXPECT_THAT(said(), HasSubstr(who));
  EXPECT_TRUE(shut(3));
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

TEST(HealHolders, AreNamedWithWhatEndsThem) {
  process::Opener one;
  one.who.pid = 4711;
  one.who.name = "dcgm";
  one.who.cgroup = "/system.slice/nvidia-dcgm.service";
  EXPECT_EQ(words_of(one),
            "pid 4711 (dcgm) in /system.slice/nvidia-dcgm.service has it open, to end it: systemctl stop "
            "nvidia-dcgm.service");
  for (const char* owners : {"", "/", "/user.slice/user-1000.slice/user@1000.service",
                             "/system.slice/a.service/b.service", "/system.slice/-H.service",
                             "/system.slice/a;reboot;.service", "/system.slice/.service/../x.service"}) {
    one.who.cgroup = owners;
    EXPECT_THAT(words_of(one), testing::EndsWith(" has it open, to end it: kill 4711")) << owners;
  }
}

TEST_F(HealerTest, ASliceIsMadeAnewWhileItsNeighbourKeepsItsLease) {
  {  // the layout is there before the daemon is
    std::ofstream(directory_ / "node.yaml") << sliced;
    execute::Options options{.access = access()};
    const auto parsed = spec::parse(sliced);
    const auto done = execute::apply(options, std::get<spec::NodeFile>(parsed), sliced);
    ASSERT_TRUE(done.ok() && done->verdict == execute::Verdict::applied);
  }
  serve(sliced, "{mode: act}");
  const auto one = lease({.cls = lease::Class::mig, .profile = "3g.40gb"}),
             two = lease({.cls = lease::Class::mig, .profile = "3g.40gb"});
  const auto place = the(one)->parts.at(0);
  open_ = {fault(0, Act::recreate_slice, place.gpu_instance)};
  ASSERT_TRUE(until([&] { return ended().has_value(); })) << said();
  EXPECT_EQ(ended(), Doing::helped) << said();
  EXPECT_EQ(state_of(one), State::ended);
  EXPECT_EQ(state_of(two), State::active);
  EXPECT_THAT(said(), HasSubstr("made anew"));
  EXPECT_TRUE(until([&] { return !shut(0); }));
  const auto again = lease({.cls = lease::Class::mig, .profile = "3g.40gb"});
  EXPECT_EQ(the(again)->parts.at(0).start, place.start);
}

TEST_F(HealerTest, WhatFailsItsCheckStaysShutAndIsNotOpenedByANewStart) {
  serve(whole, "{mode: act, most_an_hour: 1}");
  open_ = {fault(2, Act::drain_slice)};
  ASSERT_TRUE(twin::break_it(directory_ / "twin", {.name = "ecc", .gpu = 2, .count = 1}).ok());
  ASSERT_TRUE(until([&] { return ended().has_value(); })) << said();
  EXPECT_EQ(ended(), Doing::failed) << said();
  EXPECT_TRUE(shut(2));
  EXPECT_THAT(control_->now()->gpus.at(2).cordon->why, HasSubstr("healing: "));
  beat();
  // The breaker holds the next act back, and says so.
  auto view = healer_->view();
  ASSERT_EQ(view.open.size(), 1U);
  EXPECT_EQ(view.open[0].decision.act, Act::reset_gpu);
  EXPECT_THAT(view.open[0].decision.held.at(0), HasSubstr("at most 1"));
  start();
  for (int i = 0; i < 20; ++i) {
    beat();
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_TRUE(shut(2));
  EXPECT_EQ(healer_->view().tasks.size(), 1U);
}

TEST_F(HealerTest, TheLastGpuThatServesIsLeftToAPerson) {
  serve(whole, "{mode: act, keep_healthy: 8}");
  open_ = {fault(5, Act::reset_gpu)};
  beat();
  std::this_thread::sleep_for(50ms);
  const auto view = healer_->view();
  ASSERT_EQ(view.open.size(), 1U);
  EXPECT_FALSE(view.open[0].decision.now);
  EXPECT_THAT(view.open[0].decision.held.at(0), HasSubstr("would still serve"));
  EXPECT_THAT(view.tasks, IsEmpty());
  EXPECT_FALSE(shut(5));
}

TEST_F(HealerTest, AnActThatWasCutOffAtAnyStageIsFinishedByTheNextDaemon) {
  serve(whole, "{mode: act}");
  const std::vector<Step> steps{Step::cordon, Step::evict, Step::let_go,
                                Step::act,    Step::gate,  Step::uncordon};
  const char* quick = std::getenv("BULKHEAD_QUICK");
  const std::size_t stride = quick != nullptr && std::string_view(quick) == "0" ? 1 : 3;
  for (std::size_t stage = 0; stage < steps.size(); stage += stride) {
    SCOPED_TRACE(name_of(steps[stage]));
    healer_.reset();
    const unsigned gpu = static_cast<unsigned>(stage);
    Task task{.id = static_cast<std::int64_t>(stage) + 1,
              .incident = "cut off",
              .cause = "a fault of the test",
              .act = Act::reset_gpu,
              .gpu = uuids_[gpu],
              .pci = seen_.gpus[gpu].pci,
              .index = gpu};
    task.steps = steps;
    task.stage = stage;
    task.at_s = std::chrono::duration_cast<std::chrono::seconds>(wall_now().time_since_epoch()).count();
    if (stage > 0) {  // as it was left: shut
      std::promise<void> done;
      control_->cordon(admin, uuids_[gpu], "x", [&](const auto&) { done.set_value(); });
      done.get_future().wait();
      std::promise<void> open;
      control_->uncordon(admin, uuids_[gpu], [&](const auto&) { open.set_value(); });
      open.get_future().wait();
      std::promise<void> again;
      control_->cordon({.user = "bulkhead", .role = access::Role::admin, .from = "healing"}, uuids_[gpu],
                       "healing: reset-gpu after a fault of the test",
                       [&](const auto&) { again.set_value(); });
      again.get_future().wait();
      task.ours = true;
    }
    ASSERT_TRUE(write_file_atomic(state() / "healing.json", dump(Json::array({to_json(task)})), 0600).ok());
    start();
    ASSERT_TRUE(until([&] { return ended().has_value(); })) << said();
    EXPECT_EQ(ended(), Doing::helped) << said();
    EXPECT_TRUE(until([&] { return !shut(gpu); })) << said();
  }
}

TEST_F(HealerTest, AProcessIsEndedOnlyWhenItsTenantIsCharged) {
  serve(whole, "{mode: act}");
  open_ = {fault(1, Act::end_process)};
  diagnose::Evidence line;
  line.pid = 4'000'000;
  open_[0].evidence.push_back(line);
  beat();
  const auto view = healer_->view();
  ASSERT_EQ(view.open.size(), 1U);
  EXPECT_FALSE(view.open[0].decision.now);
  EXPECT_THAT(view.open[0].decision.held.back(), HasSubstr("innocent"));
}

TEST(HealTask, IsReadBackAsItWasWritten) {
  Task task{.id = 7, .incident = "xid-79@0000:3b:00.0#1", .cause = "fell off the bus", .act = Act::rescan};
  task.gpu = {"GPU-1"};
  task.steps = {Step::cordon, Step::act};
  task.stage = 1;
  task.doing = Doing::failed;
  task.leases = {3, 4};
  task.said = {"it did not come back"};
  const auto read = task_from_json(to_json(task));
  ASSERT_TRUE(read.ok());
  EXPECT_EQ(dump(to_json(*read)), dump(to_json(task)));
  auto broken = to_json(task);
  for (const auto& key : {"id", "act", "steps", "doing"}) {
    auto one = broken;
    one[key] = Json::object();
    EXPECT_FALSE(task_from_json(one).ok()) << key;
  }
}

}  // namespace
}  // namespace bulkhead::heal
