// The guardian on a twin with a real control loop: what it wants is done to the twin's driver and book. It is
// shown readings that the test makes up, seconds that pass as fast as the test asks.
#include "engine/protect/protect.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <future>
#include <thread>

#include "base/fd.hpp"
#include "engine/execute/execute.hpp"
#include "twin/control/control.hpp"

namespace bulkhead::protect {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;
using lease::State;
using sample::Signal;
using testing::HasSubstr;

constexpr const char* head =
    "apiVersion: bulkhead/v1\nkind: Node\ngpus:\n  - select: {all: true}\n    mode: exclusive\n";

class GuardianTest : public testing::Test {
 protected:
  GuardianTest() {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-guardian-XXXXXX").string();
    directory_ = ::mkdtemp(pattern.data());
    const auto made =
        twin::up({.profile = "dgx-h100", .directory = directory_ / "twin", .realtime = false, .init = false});
    EXPECT_TRUE(made.ok()) << (made.ok() ? "" : made.error().message());
    node("");
    control::Settings settings{.access = access(), .state = state(), .node_file = directory_ / "node.yaml"};
    settings.tick = 20ms;
    settings.look_every = 60s;
    settings.grace = 100ms;
    auto control = control::Control::start(settings);
    EXPECT_TRUE(control.ok()) << (control.ok() ? "" : control.error().message());
    control_ = std::move(*control);
    for (const auto& gpu : control_->now()->gpus) uuids_.push_back(gpu.gpu);
    EXPECT_EQ(uuids_.size(), 8U);
    celsius_.assign(uuids_.size(), 40);
  }
  ~GuardianTest() override {
    guardian_.reset();
    control_.reset();
    fs::remove_all(directory_);
  }

  fs::path state() const { return directory_ / "twin/root/var/lib/bulkhead"; }
  observe::Access access() const {
    return {.root = directory_ / "twin/root",
            .nvml_library = (directory_ / "twin/lib/libnvidia-ml.so.1").string(),
            .state_dir = state()};
  }
  void node(const std::string& protect) {
    std::ofstream(directory_ / "node.yaml") << head << (protect.empty() ? "" : "protect: " + protect + "\n");
  }
  void start() {
    guardian_.reset();
    guardian_ = std::make_unique<Guardian>(
        *control_, Guardian::Settings{.access = access(),
                                      .state = state(),
                                      .node_file = directory_ / "node.yaml",
                                      .pace = {.patience_s = 4, .critical_patience_s = 2, .cool_down_s = 4}});
  }
  // Seconds of readings, none of which is waited for.
  void beats(unsigned seconds) {
    for (unsigned i = 0; i < seconds; ++i) {
      now_ += 1'000'000'000;
      sample::Snapshot said{.at_ns = now_};
      for (unsigned g = 0; g < uuids_.size(); ++g) {
        sample::Gpu gpu{.index = g, .uuid = uuids_[g], .name = "H100", .state = sample::State::sampling};
        const auto put = [&](Signal signal, double number) {
          gpu.values[static_cast<std::size_t>(signal)] = {.number = number, .at_ns = now_};
        };
        put(Signal::temperature, celsius_[g]);
        put(Signal::power, watts_);
        put(Signal::power_limit, 700);
        said.gpus.push_back(gpu);
      }
      guardian_->step(said, *control_->now(), wall_now(), now_);
    }
  }
  template <class F>
  bool until(F holds, std::chrono::milliseconds within = 20s) {
    const auto end = std::chrono::steady_clock::now() + within;
    while (!holds()) {
      if (std::chrono::steady_clock::now() > end) return false;
      std::this_thread::sleep_for(5ms);
    }
    return true;
  }
  double limit_of(unsigned gpu) const {
    return twin::status(directory_ / "twin")->at("gpus").at(gpu).at("power_limit_watts").get<double>();
  }
  bool held(unsigned gpu) const { return control_->now()->gpus.at(gpu).cordon.has_value(); }
  const Guardian::Measure* measure(unsigned gpu) {
    view_ = guardian_->view();
    for (const auto& one : view_.measures)
      if (one.wanted.index == gpu) return &one;
    return nullptr;
  }
  std::int64_t lease(bool preemptible = false) {
    static const control::Caller admin{.user = "root", .role = access::Role::admin, .from = "uid 0"};
    std::promise<void> named;
    control_->put_tenant(admin, {.name = "blue"}, std::nullopt, [&](const auto&) { named.set_value(); });
    named.get_future().wait();
    std::promise<control::Answer<lease::Lease>> made;
    control::Caller caller = admin;
    caller.tenant = "blue";
    control_->create_lease(caller, {.cls = lease::Class::exclusive, .preemptible = preemptible}, {},
                           [&](auto answer) { made.set_value(std::move(answer)); });
    const auto answer = made.get_future().get();
    const auto* granted = std::get_if<lease::Lease>(&answer);
    EXPECT_NE(granted, nullptr) << std::get<control::Refusal>(answer).what;
    return granted == nullptr ? 0 : granted->id;
  }
  State state_of(std::int64_t id) const {
    const auto now = control_->now();
    const auto at = now->leases.find(id);
    return at == now->leases.end() ? State::ended : at->second->state;
  }
  unsigned gpu_of(std::int64_t id) const {
    const auto now = control_->now();
    for (const auto& gpu : now->gpus)
      if (std::find(gpu.leases.begin(), gpu.leases.end(), id) != gpu.leases.end()) return gpu.index;
    return ~0U;
  }

  fs::path directory_;
  std::unique_ptr<control::Control> control_;
  std::unique_ptr<Guardian> guardian_;
  std::vector<Uuid> uuids_;
  std::vector<double> celsius_;
  double watts_ = 400;
  std::uint64_t now_ = monotonic_ns();
  Guardian::View view_;
};

TEST_F(GuardianTest, ObservingItSaysWhatItWouldDoAndTouchesNothing) {
  start();
  beats(5);
  EXPECT_TRUE(guardian_->view().open.empty());
  celsius_[3] = 90;
  beats(20);
  ASSERT_EQ(guardian_->view().open.size(), 1U);
  EXPECT_EQ(guardian_->view().open[0].id, "heat.gpu3");
  ASSERT_NE(measure(3), nullptr);
  EXPECT_EQ(measure(3)->doing, Guardian::Doing::would);
  EXPECT_GE(measure(3)->wanted.rung, 0U);
  EXPECT_THAT(guardian_->metrics(), HasSubstr("bulkhead_alarm{alarm=\"heat.gpu3\",kind=\"heat\""));
  EXPECT_THAT(guardian_->metrics(), HasSubstr("bulkhead_protect_acting 0"));
  const auto page = to_json(guardian_->view());
  EXPECT_EQ(page["mode"], "observe");
  EXPECT_EQ(page["measures"][0]["doing"], "would");
  std::this_thread::sleep_for(100ms);
  EXPECT_FALSE(held(3));
  EXPECT_EQ(limit_of(3), 700);
  celsius_[3] = 50;
  beats(40);
  EXPECT_TRUE(guardian_->view().open.empty());
  ASSERT_EQ(guardian_->view().recent.size(), 1U);
  EXPECT_THAT(guardian_->view().recent[0].evidence.back(), HasSubstr("closed: "));
}

TEST_F(GuardianTest, ActingItHoldsAndLowersAndTakesBothBack) {
  node("{mode: act, harshest: clocks}");
  start();
  celsius_[2] = 87;
  beats(4);
  ASSERT_TRUE(until([&] { return held(2); }));
  EXPECT_EQ(limit_of(2), 700);
  beats(4);
  ASSERT_TRUE(until([&] { return limit_of(2) == 595; })) << limit_of(2);
  ASSERT_TRUE(until([&] { return measure(2) != nullptr && measure(2)->limit_mw == 595'000U; }));
  EXPECT_EQ(measure(2)->limit_before_mw, 700'000U);
  EXPECT_EQ(limit_of(1), 700);
  celsius_[2] = 60;
  for (int i = 0; i < 60 && (held(2) || limit_of(2) < 700); ++i) {
    beats(2);
    std::this_thread::sleep_for(50ms);
  }
  EXPECT_TRUE(until([&] { return !held(2) && limit_of(2) == 700; })) << held(2) << ' ' << limit_of(2);
  const auto runs = execute::history(access(), std::nullopt);
  ASSERT_TRUE(runs.ok());
  EXPECT_GE(runs->size(), 2U);
  for (const auto& one : *runs) {
    EXPECT_EQ(one.run.verb, "protect");
    EXPECT_FALSE(one.cut_off);
  }
}

TEST_F(GuardianTest, ASuccessorFindsWhatIsInForceAndLiftsIt) {
  node("{mode: act, harshest: power}");
  start();
  celsius_[4] = 87;
  beats(4);
  ASSERT_TRUE(until([&] { return held(4); }));
  beats(4);
  ASSERT_TRUE(until([&] { return limit_of(4) == 595; }));
  guardian_.reset();  // as a daemon that was killed: nothing is taken back
  EXPECT_EQ(limit_of(4), 595);
  EXPECT_TRUE(held(4));
  celsius_[4] = 50;
  start();
  beats(2);
  ASSERT_NE(measure(4), nullptr);
  EXPECT_GE(measure(4)->wanted.rung, 1U);
  for (int i = 0; i < 60 && (held(4) || limit_of(4) < 700); ++i) {
    beats(2);
    std::this_thread::sleep_for(50ms);
  }
  EXPECT_TRUE(until([&] { return !held(4) && limit_of(4) == 700; })) << held(4) << ' ' << limit_of(4);
}

TEST_F(GuardianTest, TheLimitThatSomebodyElseSetMeanwhileIsLeftAlone) {
  node("{mode: act, harshest: power}");
  start();
  celsius_[1] = 87;
  beats(8);
  ASSERT_TRUE(until([&] { return limit_of(1) < 700; }));
  const double lowered = limit_of(1);
  execute::Options options{.access = access(), .lock_wait_ms = 5'000};
  options.access.only = {uuids_[1]};
  control_->alone([&] {
    const auto set = execute::alter(
        options, [&](const inventory::Host&, const plan::Remembered&) -> Result<execute::Wanted> {
          execute::Wanted out;
          spec::GpuRule rule;
          rule.select.uuid = {uuids_[1]};
          rule.mode = spec::Mode::exclusive;
          rule.power_limit = Milliwatts(450'000);
          out.node.gpus.push_back(rule);
          out.text = spec::to_yaml(out.node);
          return out;
        });
    ASSERT_TRUE(set.ok()) << set.error().message();
  });
  ASSERT_EQ(limit_of(1), 450);
  ASSERT_NE(lowered, 450);
  celsius_[1] = 50;
  for (int i = 0; i < 60 && held(1); ++i) {
    beats(2);
    std::this_thread::sleep_for(50ms);
  }
  EXPECT_TRUE(until([&] { return !held(1); }));
  EXPECT_EQ(limit_of(1), 450);
}

TEST_F(GuardianTest, LeasesEndLastOfAllThePreemptibleOnesFirst) {
  node("{mode: act, harshest: fence}");
  start();
  beats(1);
  const auto stays = lease(false), goes = lease(true);
  ASSERT_TRUE(until([&] { return state_of(stays) == State::active && state_of(goes) == State::active; }));
  const unsigned first = gpu_of(stays), second = gpu_of(goes);
  celsius_[first] = celsius_[second] = 95;
  bool in_order = true;
  for (int i = 0; i < 200 && state_of(stays) == State::active; ++i) {
    beats(1);
    std::this_thread::sleep_for(30ms);
    if (state_of(stays) != State::active) in_order = state_of(goes) != State::active;
  }
  EXPECT_TRUE(until([&] { return state_of(stays) != State::active && state_of(goes) != State::active; }));
  EXPECT_TRUE(in_order);
  const auto lines = control_->events_after(0, 1000);
  ASSERT_TRUE(lines.ok());
  bool said = false;
  for (const auto& line : *lines) said = said || dump(line.body).find("protection: ") != std::string::npos;
  EXPECT_TRUE(said);
}

TEST_F(GuardianTest, HarshestIsThePlaceWhereItStops) {
  node("{mode: act, harshest: hold}");
  start();
  const auto mine = lease(true);
  ASSERT_TRUE(until([&] { return state_of(mine) == State::active; }));
  const unsigned gpu = gpu_of(mine);
  celsius_[gpu] = 99;
  for (int i = 0; i < 40; ++i) {
    beats(2);
    std::this_thread::sleep_for(5ms);
  }
  EXPECT_TRUE(until([&] { return held(gpu); }));
  EXPECT_EQ(limit_of(gpu), 700);
  EXPECT_EQ(state_of(mine), State::active);
}

TEST_F(GuardianTest, AMistakeInTheNodeFileLeavesTheOldWordInForce) {
  node("{mode: act, harshest: hold, ceiling: 70}");
  start();
  EXPECT_EQ(guardian_->view().settings.ceiling, 70);
  node("{mode: act, ceiling: 7}");
  guardian_->reload();
  // Before the first reading as after it: no beat is needed for the old word to stay.
  ASSERT_TRUE(until([&] { return !guardian_->view().trouble.empty(); }));
  EXPECT_EQ(guardian_->view().settings.ceiling, 70);
  node("{mode: observe, ceiling: 75}");
  guardian_->reload();
  ASSERT_TRUE(until([&] { return guardian_->view().settings.ceiling == 75; }));
  EXPECT_EQ(guardian_->view().trouble, "");
}

TEST_F(GuardianTest, GoingOverToObserveTakesEverythingBack) {
  node("{mode: act, harshest: power}");
  start();
  celsius_[6] = 87;
  beats(8);
  ASSERT_TRUE(until([&] { return held(6) && limit_of(6) < 700; }));
  node("{mode: observe}");
  guardian_->reload();
  // Still as hot: the mode is what counts.
  EXPECT_TRUE(until([&] {
    beats(1);
    return !held(6) && limit_of(6) == 700;
  })) << held(6)
      << ' ' << limit_of(6);
}

TEST_F(GuardianTest, StartsWaitForTheirTurnInTheBudgetOfWattsASecond) {
  node("{mode: act, ramp: {rate: 300W/s, burst: 300W}}");
  watts_ = 100;
  start();
  beats(3);
  const auto begun = std::chrono::steady_clock::now();
  const std::vector<std::int64_t> all = {lease(), lease(), lease()};
  ASSERT_TRUE(until([&] {
    return std::all_of(all.begin(), all.end(),
                       [&](std::int64_t id) { return state_of(id) == State::active; });
  }));
  // Each may rise by 600 W: the account has 300 and is paid 300 a second.
  EXPECT_GT(std::chrono::steady_clock::now() - begun, 2s);
  EXPECT_GT(guardian_->view().ramp_wait_s, 2);
}

TEST_F(GuardianTest, FilesOfItsOwnThatAreGarbageAreAsNone) {
  fs::create_directories(state());
  for (const auto* text :
       {"", "{", "[1,2]", R"({"low":{"gpu":7}})", R"({"GPU-x":{"levels":[{"level":-1}]}})"}) {
    std::ofstream(state() / "protect-paused.json") << text;
    std::ofstream(state() / "protect-cooling.json") << text;
    node("{mode: act}");
    start();
    beats(2);
    EXPECT_TRUE(guardian_->view().open.empty()) << text;
  }
}

TEST_F(GuardianTest, AGpuThatIsNotReadIsHeldAndNothingIsLiftedMeanwhile) {
  node("{mode: act, harshest: power}");
  start();
  celsius_[0] = 87;
  beats(8);
  ASSERT_TRUE(until([&] { return held(0) && limit_of(0) < 700; }));
  // It hangs: the values that it has grow old.
  sample::Snapshot said{.at_ns = now_};
  sample::Gpu gpu{.index = 0, .uuid = uuids_[0], .state = sample::State::hung, .call = "nvmlX"};
  gpu.values[static_cast<std::size_t>(Signal::temperature)] = {.number = 40, .at_ns = now_};
  said.gpus.push_back(gpu);
  for (int i = 0; i < 60; ++i) {
    now_ += 1'000'000'000;
    guardian_->step(said, *control_->now(), wall_now(), now_);
  }
  const auto open = guardian_->view().open;
  EXPECT_TRUE(
      std::any_of(open.begin(), open.end(), [](const Alarm& one) { return one.id == "silent.gpu0"; }));
  std::this_thread::sleep_for(200ms);
  EXPECT_TRUE(held(0));
  EXPECT_LT(limit_of(0), 700);
}

}  // namespace
}  // namespace bulkhead::protect
