// The control loop on a twin: leases asked for, granted, renewed, ended; restarts, kills and full disks.
#include "engine/control/control.hpp"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sqlite3.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <future>
#include <set>
#include <thread>

#include "base/fd.hpp"
#include "base/prng.hpp"
#include "base/text.hpp"
#include "edge/book/book.hpp"
#include "twin/control/control.hpp"

namespace bulkhead::control {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;
using lease::State;
using testing::Contains;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

constexpr std::string_view pools_file = R"(apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: [0, 1]}
    mode: mig
    layout: dynamic
  - select: {index: [2, 3]}
    mode: share
  - select: {index: [4, 5, 6, 7]}
    mode: exclusive
)";

class ControlTest : public testing::Test {
 protected:
  ControlTest() {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-control-XXXXXX").string();
    directory_ = ::mkdtemp(pattern.data());
    const auto made =
        twin::up({.profile = "dgx-h100", .directory = directory_ / "twin", .realtime = false, .init = false});
    EXPECT_TRUE(made.ok()) << (made.ok() ? "" : made.error().message());
    std::ofstream(directory_ / "node.yaml") << pools_file;
  }
  ~ControlTest() override {
    control_.reset();
    fs::remove_all(directory_);
  }

  fs::path twin() const { return directory_ / "twin"; }
  Settings settings() {
    return {.access = {.root = twin() / "root",
                       .nvml_library = (twin() / "lib/libnvidia-ml.so.1").string(),
                       .state_dir = twin() / "root/var/lib/bulkhead"},
            .state = twin() / "root/var/lib/bulkhead",
            .node_file = directory_ / "node.yaml",
            .tick = 20ms,
            .look_every = 200ms,
            .grace = 200ms,
            .clock = [this] { return wall_now() + std::chrono::milliseconds(ahead_.load()); }};
  }
  void start() { start(settings()); }
  void start(Settings with) {
    control_.reset();
    auto made = Control::start(std::move(with));
    ASSERT_TRUE(made.ok()) << made.error().message();
    control_ = std::move(*made);
  }
  template <class T, class F>
  Answer<T> ask(F&& command) {
    std::promise<Answer<T>> promise;
    auto answer = promise.get_future();
    command([&promise](Answer<T> what) { promise.set_value(std::move(what)); });
    return answer.get();
  }
  Answer<lease::Lease> create(const Caller& caller, lease::Ask wanted, Once once = {}) {
    return ask<lease::Lease>([&](auto then) { control_->create_lease(caller, wanted, once, then); });
  }
  Answer<lease::Lease> release(const Caller& caller, std::int64_t id) {
    return ask<lease::Lease>([&](auto then) { control_->release_lease(caller, id, std::nullopt, then); });
  }
  void tenant(const std::string& name, tenant::Quota quota = {}, std::uint32_t weight = 100) {
    const auto made = ask<tenant::Tenant>([&](auto then) {
      control_->put_tenant(admin(), {.name = name, .weight = weight, .quota = quota}, std::nullopt, then);
    });
    ASSERT_TRUE(std::holds_alternative<tenant::Tenant>(made)) << std::get<Refusal>(made).what;
  }
  static Caller admin() { return {.user = "root", .role = access::Role::admin, .from = "uid 0"}; }
  static Caller of(const std::string& name) {
    return {.user = "ada", .tenant = name, .role = access::Role::tenant, .from = "192.0.2.7:4711"};
  }
  static lease::Ask exclusive(unsigned count = 1) { return {.cls = lease::Class::exclusive, .count = count}; }
  static lease::Ask mig(std::string profile, unsigned count = 1) {
    return {.cls = lease::Class::mig, .profile = std::move(profile), .count = count};
  }
  static lease::Ask share(unsigned weight, std::uint64_t gib) {
    return {.cls = lease::Class::share, .memory = mebibytes(gib * 1024), .weight = weight};
  }
  std::shared_ptr<const lease::Lease> lease_now(std::int64_t id) {
    const auto now = control_->now();
    const auto at = now->leases.find(id);
    return at == now->leases.end() ? nullptr : at->second;
  }
  bool reaches(std::int64_t id, State state, std::chrono::milliseconds within = 20s) {
    const auto until = std::chrono::steady_clock::now() + within;
    while (std::chrono::steady_clock::now() < until) {
      if (const auto lease = lease_now(id); lease && lease->state == state) return true;
      std::this_thread::sleep_for(2ms);
    }
    const auto lease = lease_now(id);
    ADD_FAILURE() << "lease " << id << " is "
                  << (lease ? std::string(name_of(lease->state)) + ": " + lease->reason : "nowhere");
    return false;
  }
  static const lease::Lease& granted(const Answer<lease::Lease>& answer) {
    static const lease::Lease none{};
    if (const auto* refusal = std::get_if<Refusal>(&answer)) {
      ADD_FAILURE() << refusal->what << ": " << testing::PrintToString(refusal->reasons)
                    << testing::PrintToString(refusal->ways);
      return none;
    }
    return std::get<lease::Lease>(answer);
  }
  static const Refusal& refused(const Answer<lease::Lease>& answer) {
    static const Refusal none{};
    if (const auto* lease = std::get_if<lease::Lease>(&answer)) {
      ADD_FAILURE() << "granted: lease " << lease->id;
      return none;
    }
    return std::get<Refusal>(answer);
  }

  fs::path directory_;
  std::atomic<std::int64_t> ahead_ = 0;  // milliseconds
  std::unique_ptr<Control> control_;
};

TEST_F(ControlTest, AWholeGpuIsGrantedInOneBatchAndComesBack) {
  start();
  tenant("vision");
  const auto answer = create(of("vision"), exclusive());
  const auto& lease = granted(answer);
  EXPECT_EQ(lease.state, State::active);
  ASSERT_EQ(lease.parts.size(), 1U);
  EXPECT_TRUE(lease.parts[0].device.text.starts_with("GPU-"));
  EXPECT_THAT(lease.parts[0].device_nodes, Contains("/dev/nvidiactl"));
  EXPECT_TRUE(lease.expires);
  EXPECT_EQ(control_->now()->held.at("vision").gpus, 1U);
  const auto back = release(of("vision"), lease.id);
  EXPECT_EQ(granted(back).state, State::releasing);
  EXPECT_TRUE(reaches(lease.id, State::ended));
  EXPECT_FALSE(control_->now()->held.contains("vision"));
  ASSERT_TRUE(verify_audit(settings().state).ok());
  EXPECT_EQ(verify_audit(settings().state)->broken, "");
}

TEST_F(ControlTest, AMigSliceIsCutOnDemandAndGivenAgainWithoutCutting) {
  start();
  tenant("vision");
  const auto first = granted(create(of("vision"), mig("3g.40gb")));
  EXPECT_EQ(first.state, State::preparing);
  ASSERT_TRUE(reaches(first.id, State::active));
  const auto ready = lease_now(first.id);
  EXPECT_TRUE(ready->parts[0].device.text.starts_with("MIG-"));
  EXPECT_GT(ready->parts[0].generation, 0);
  EXPECT_TRUE(ready->parts[0].made);
  granted(release(of("vision"), first.id));
  ASSERT_TRUE(reaches(first.id, State::ended));
  const auto second = granted(create(of("vision"), mig("3g.40gb")));
  EXPECT_EQ(second.state, State::active) << "the idle instance is there";
  EXPECT_EQ(second.parts[0].device, ready->parts[0].device);
}

TEST_F(ControlTest, SharesFillAGpuByWeightAndMemory) {
  start();
  tenant("vision");
  std::set<std::string> where;
  for (int i = 0; i < 4; ++i) {
    const auto lease = granted(create(of("vision"), share(500, 39)));
    EXPECT_EQ(lease.state, State::active);
    where.insert(lease.parts[0].gpu.text);
  }
  EXPECT_EQ(where.size(), 2U);
  const auto no = refused(create(of("vision"), share(500, 10)));
  EXPECT_EQ(no.why, Denied::no_room);
  EXPECT_THAT(no.ways, Contains(HasSubstr("fits after lease")));
}

// ---- who may, and how much
TEST_F(ControlTest, QuotasAreNeverPassedAndSayBothNumbers) {
  start();
  tenant("vision", {.leases = 3, .gpus = 2});
  granted(create(of("vision"), exclusive()));
  granted(create(of("vision"), exclusive()));
  const auto no = refused(create(of("vision"), exclusive()));
  EXPECT_EQ(no.why, Denied::quota);
  EXPECT_THAT(no.reasons, Contains(HasSubstr("holds 2 of 2 whole GPUs and asks for 1")));
  EXPECT_THAT(no.ways, Contains(HasSubstr("its lease 1 ends at")));
  // A lease that waits counts as a lease, and is not granted while the quota says no.
  auto waits = exclusive();
  waits.wait = true;
  const auto queued = granted(create(of("vision"), waits));
  EXPECT_EQ(queued.state, State::queued);
  EXPECT_THAT(queued.reason, HasSubstr("holds 2 of 2 whole GPUs"));
  EXPECT_EQ(refused(create(of("vision"), waits)).why, Denied::quota) << "a fourth lease";
  granted(release(of("vision"), 1));
  EXPECT_TRUE(reaches(queued.id, State::active));
}

TEST_F(ControlTest, ATenantWhoIsRefusedWithoutEndFillsNoLogAndNoOthersLinesAreMissing) {
  start();
  tenant("vision", {.leases = 0});
  tenant("speech", {.leases = 0});
  std::promise<void> over;
  std::atomic<int> left = 1500;
  for (int i = 0; i < 1500; ++i) {
    control_->create_lease(of("vision"), exclusive(), {}, [&](const Answer<lease::Lease>& answer) {
      EXPECT_EQ(refused(answer).why, Denied::quota);
      if (--left == 0) over.set_value();
    });
  }
  over.get_future().wait();
  refused(create(of("speech"), exclusive()));
  const auto events = control_->events_after(0, 5000).value();
  const auto of_tenant = [&](std::string_view name) {
    return std::count_if(events.begin(), events.end(), [&](const Event& event) {
      return event.tenant == name && event.outcome.starts_with("refused");
    });
  };
  EXPECT_GE(of_tenant("vision"), 600);
  EXPECT_LE(of_tenant("vision"), 1200) << "a minute may have ended meanwhile";
  EXPECT_EQ(of_tenant("speech"), 1);
}

TEST_F(ControlTest, MonthlyGpuHoursRunUpAndRefuseWhenSpent) {
  start();
  tenant("vision", {.gpu_seconds_month = 3600});
  auto whole = exclusive();
  whole.ttl = 86'400s;
  const auto lease = granted(create(of("vision"), whole));
  ahead_ = 1800 * 1000;
  std::this_thread::sleep_for(60ms);
  EXPECT_NEAR(static_cast<double>(control_->now()->gpu_seconds_month.at("vision")), 1800, 5);
  granted(create(of("vision"), mig("1g.10gb")));
  ahead_ = 7200 * 1000;
  const auto no = refused(create(of("vision"), exclusive()));
  EXPECT_EQ(no.why, Denied::quota);
  const auto renewed = ask<lease::Lease>(
      [&](auto then) { control_->renew_lease(of("vision"), lease.id, 86'400s, std::nullopt, then); });
  EXPECT_EQ(refused(renewed).why, Denied::quota);
  // It survives a restart, and so does what was on the clock.
  start();
  std::this_thread::sleep_for(60ms);
  EXPECT_NEAR(static_cast<double>(control_->now()->gpu_seconds_month.at("vision")), 7200, 900);
}

TEST_F(ControlTest, AnothersLeaseIsAsIfItWereNot) {
  start();
  tenant("vision");
  tenant("speech");
  const auto lease = granted(create(of("vision"), exclusive()));
  const auto theirs = refused(release(of("speech"), lease.id));
  const auto none = refused(release(of("speech"), 999));
  EXPECT_EQ(theirs.why, Denied::not_found);
  EXPECT_EQ(none.why, Denied::not_found);
  EXPECT_EQ(theirs.what, "there is no lease 1");
  EXPECT_EQ(none.what, "there is no lease 999");
  const auto renewed = ask<lease::Lease>(
      [&](auto then) { control_->renew_lease(of("speech"), lease.id, 60s, std::nullopt, then); });
  EXPECT_EQ(refused(renewed).why, Denied::not_found);
  EXPECT_EQ(refused(ask<lease::Lease>([&](auto then) { control_->old_lease(of("speech"), 1, then); })).why,
            Denied::not_found);
  EXPECT_EQ(lease_now(lease.id)->state, State::active);
  Caller auditor{.user = "eve", .role = access::Role::audit};
  EXPECT_EQ(refused(release(auditor, lease.id)).why, Denied::forbidden);
  EXPECT_EQ(refused(create(Caller{.user = "eve", .tenant = "ghost"}, exclusive())).why, Denied::forbidden);
  auto high = exclusive();
  high.priority = 10;
  EXPECT_EQ(refused(create(of("speech"), high)).why, Denied::forbidden);
}

TEST_F(ControlTest, TenantsAreChangedByVersionAndEndWithoutLeases) {
  start();
  tenant("vision");
  const auto put = [&](Caller caller, tenant::Tenant wanted, std::optional<std::int64_t> version) {
    return ask<tenant::Tenant>([&](auto then) { control_->put_tenant(caller, wanted, version, then); });
  };
  EXPECT_EQ(std::get<Refusal>(put(admin(), {.name = "vision"}, 0)).why, Denied::conflict);
  EXPECT_EQ(std::get<Refusal>(put(admin(), {.name = "vision"}, 7)).why, Denied::conflict);
  EXPECT_EQ(std::get<tenant::Tenant>(put(admin(), {.name = "vision", .weight = 7}, 1)).version, 2);
  EXPECT_NE(std::get<Refusal>(put(of("vision"), {.name = "vision", .weight = 9}, 2)).what, "");
  EXPECT_EQ(std::get<Refusal>(put(admin(), {.name = "No Name"}, 0)).why, Denied::invalid);
  const auto end = [&] {
    return ask<tenant::Tenant>([&](auto then) { control_->end_tenant(admin(), "vision", then); });
  };
  const auto lease = granted(create(of("vision"), exclusive()));
  EXPECT_EQ(std::get<Refusal>(end()).why, Denied::conflict);
  granted(release(of("vision"), lease.id));
  ASSERT_TRUE(reaches(lease.id, State::ended));
  EXPECT_TRUE(std::holds_alternative<tenant::Tenant>(end()));
  EXPECT_EQ(refused(create(of("vision"), exclusive())).why, Denied::forbidden);
}

TEST_F(ControlTest, TokensOpenUntilTheyAreRevokedOrOver) {
  start();
  tenant("vision");
  const auto first = first_token(*control_);
  ASSERT_TRUE(first.ok() && *first);
  EXPECT_FALSE(*first_token(*control_));
  ASSERT_TRUE(control_->authenticate(**first, ""));
  EXPECT_EQ(control_->authenticate(**first, "")->role, access::Role::admin);
  const auto make = [&](AskToken wanted) {
    return ask<NewToken>([&](auto then) { control_->create_token(admin(), wanted, then); });
  };
  const auto token =
      std::get<NewToken>(make({.user = "ada", .tenant = "vision", .role = access::Role::tenant, .ttl = 60s}));
  const auto who = control_->authenticate(token.secret, "");
  ASSERT_TRUE(who);
  EXPECT_EQ(who->user, "ada");
  EXPECT_EQ(who->tenant, "vision");
  std::string wrong = token.secret;
  wrong.back() = wrong.back() == '0' ? '1' : '0';
  EXPECT_FALSE(control_->authenticate(wrong, ""));
  EXPECT_FALSE(control_->authenticate("bh_", ""));
  EXPECT_FALSE(control_->authenticate(std::string(100'000, 'x'), ""));
  ahead_ = 61'000;
  EXPECT_FALSE(control_->authenticate(token.secret, "")) << "its time is over";
  ahead_ = 0;
  ASSERT_TRUE(control_->authenticate(token.secret, ""));
  const auto revoked = ask<User>([&](auto then) { control_->revoke_token(admin(), token.user.id, then); });
  EXPECT_TRUE(std::get<User>(revoked).revoked);
  EXPECT_FALSE(control_->authenticate(token.secret, "")) << "as soon as the answer is there";
  const std::string print(64, 'a');
  EXPECT_TRUE(
      std::get<NewToken>(
          make({.user = "ci", .tenant = "vision", .role = access::Role::tenant, .certificate = print}))
          .secret.empty());
  EXPECT_TRUE(control_->authenticate("", std::string(64, 'A')));
  EXPECT_EQ(std::get<Refusal>(make({.user = "ci", .tenant = "vision", .certificate = print})).why,
            Denied::conflict);
  EXPECT_EQ(std::get<Refusal>(ask<NewToken>([&](auto then) {
              control_->create_token(of("vision"), {.user = "x", .tenant = "vision"}, then);
            })).why,
            Denied::forbidden);
  start();
  EXPECT_FALSE(control_->authenticate(token.secret, ""));
  EXPECT_TRUE(control_->authenticate(**first, ""));
  // No secret in the audit log.
  const auto events = control_->events_after(0, 1000);
  ASSERT_TRUE(events.ok());
  for (const auto& event : *events) EXPECT_THAT(event.body.dump(), Not(HasSubstr(token.secret.substr(20))));
}

TEST_F(ControlTest, TheSameKeyGetsTheFirstAnswerAlsoAfterARestart) {
  start();
  tenant("vision");
  tenant("speech");
  const Once once{.key = "build-17", .request = std::string(64, 'a')};
  const auto first = granted(create(of("vision"), exclusive(), once));
  EXPECT_EQ(granted(create(of("vision"), exclusive(), once)).id, first.id);
  EXPECT_EQ(refused(create(of("vision"), exclusive(2), {once.key, std::string(64, 'b')})).why,
            Denied::conflict);
  EXPECT_NE(granted(create(of("speech"), exclusive(), once)).id, first.id) << "another tenant's key";
  EXPECT_EQ(refused(create(of("vision"), exclusive(), {"two words", std::string(64, 'a')})).why,
            Denied::invalid);
  start();
  const auto again = granted(create(of("vision"), exclusive(), once));
  EXPECT_EQ(again.id, first.id);
  EXPECT_EQ(lease::to_json(again), lease::to_json(first));
  ahead_ = 25LL * 3600 * 1000;
  EXPECT_NE(granted(create(of("vision"), exclusive(), once)).id, first.id) << "keys are kept for a day";
}

TEST_F(ControlTest, ATenantMadeWithAKeyIsMadeOnceAlsoAfterARestart) {
  start();
  const auto put = [&](const tenant::Tenant& wanted, const Once& once) {
    return ask<tenant::Tenant>([&](auto then) { control_->put_tenant(admin(), wanted, 0, then, once); });
  };
  const Once once{.key = "onboard-vision", .request = std::string(64, 'c')};
  const auto made = std::get<tenant::Tenant>(put({.name = "vision", .weight = 3}, once));
  EXPECT_EQ(std::get<tenant::Tenant>(put({.name = "vision", .weight = 3}, once)).version, made.version);
  EXPECT_EQ(std::get<Refusal>(put({.name = "other"}, {once.key, std::string(64, 'd')})).why,
            Denied::conflict);
  EXPECT_EQ(std::get<Refusal>(put({.name = "vision", .weight = 3}, {})).why, Denied::conflict);
  start();
  const auto again = std::get<tenant::Tenant>(put({.name = "vision", .weight = 3}, once));
  EXPECT_EQ(tenant::to_json(again), tenant::to_json(made));
  EXPECT_EQ(std::get<Refusal>(put({.name = "other"}, {once.key, std::string(64, 'd')})).why,
            Denied::conflict);
  EXPECT_FALSE(control_->now()->tenants.contains("other"));
}

// ---- time
TEST_F(ControlTest, LeasesEndWhenTheirTimeIsOverAndARenewalNeverShortens) {
  start();
  tenant("vision");
  auto short_one = exclusive();
  short_one.ttl = 60s;
  const auto lease = granted(create(of("vision"), short_one));
  const auto renewed = ask<lease::Lease>(
      [&](auto then) { control_->renew_lease(of("vision"), lease.id, 600s, std::int64_t{1}, then); });
  EXPECT_EQ(granted(renewed).version, 2);
  EXPECT_EQ(refused(ask<lease::Lease>([&](auto then) {
              control_->renew_lease(of("vision"), lease.id, 600s, std::int64_t{1}, then);
            })).why,
            Denied::conflict);
  const auto shorter = ask<lease::Lease>(
      [&](auto then) { control_->renew_lease(of("vision"), lease.id, 20s, std::nullopt, then); });
  EXPECT_EQ(granted(shorter).expires, granted(renewed).expires);
  ahead_ = 120'000;
  std::this_thread::sleep_for(100ms);
  EXPECT_EQ(lease_now(lease.id)->state, State::active);
  ahead_ = 700'000;
  ASSERT_TRUE(reaches(lease.id, State::ended));
  EXPECT_EQ(lease_now(lease.id)->reason, "its time is over");
}

TEST_F(ControlTest, WhoWaitsGetsItsTurnInOrderOrFailsAtItsDeadline) {
  start();
  tenant("vision");
  auto all = exclusive(4);
  const auto holder = granted(create(of("vision"), all));
  auto wait = exclusive(2);
  wait.wait = true;
  const auto first = granted(create(of("vision"), wait));
  const auto second = granted(create(of("vision"), wait));
  auto late = wait;
  late.deadline = wall_now() + 5s;
  const auto third = granted(create(of("vision"), late));
  EXPECT_EQ(first.state, State::queued);
  EXPECT_THAT(first.ways, Contains(HasSubstr("fits after lease 1 ends at")));
  EXPECT_EQ(refused(create(of("vision"), exclusive())).why, Denied::no_room) << "no jumping the queue";
  const auto stands = [&](const Caller& caller, std::int64_t id) {
    return ask<Standing>([&](auto then) { control_->standing(caller, id, then); });
  };
  const auto place = std::get<Standing>(stands(of("vision"), second.id));
  EXPECT_EQ(place.state, State::queued);
  EXPECT_EQ(place.ahead, 1U);
  EXPECT_EQ(place.own, 3U);
  EXPECT_EQ(place.waiting, 3U);
  EXPECT_NE(place.why, "");
  EXPECT_EQ(std::get<Standing>(stands(of("vision"), holder.id)).own, 0U) << "it does not wait";
  EXPECT_EQ(std::get<Refusal>(stands(of("speech"), second.id)).why, Denied::not_found);
  granted(release(of("vision"), holder.id));
  EXPECT_TRUE(reaches(first.id, State::active));
  EXPECT_TRUE(reaches(second.id, State::active));
  EXPECT_EQ(lease_now(third.id)->state, State::queued);
  ahead_ = 10'000;
  EXPECT_TRUE(reaches(third.id, State::failed));
  EXPECT_THAT(lease_now(third.id)->reason, HasSubstr("not granted by its deadline"));
  const auto fourth = granted(create(of("vision"), wait));
  EXPECT_EQ(granted(release(of("vision"), fourth.id)).state, State::ended) << "given up while it waited";
}

TEST_F(ControlTest, AHigherPriorityTakesThePlaceOfAPreemptibleLeaseAfterNotice) {
  start();
  tenant("vision");
  tenant("speech");
  auto low = exclusive(2);
  low.preemptible = true;
  low.priority = -10;
  const auto firm = granted(create(of("vision"), exclusive(2)));
  const auto victim = granted(create(of("vision"), low));
  auto urgent = exclusive();
  urgent.priority = 50;
  Caller operator_for_speech{.user = "root", .tenant = "speech", .role = access::Role::admin};
  const auto no = refused(create(operator_for_speech, urgent));
  EXPECT_THAT(no.ways, Contains(HasSubstr("fits when lease 2 is preempted: ask with wait")));
  urgent.wait = true;
  const auto queued = granted(create(operator_for_speech, urgent));
  EXPECT_EQ(queued.state, State::queued);
  ASSERT_TRUE(lease_now(victim.id)->notice);
  EXPECT_FALSE(lease_now(firm.id)->notice);
  EXPECT_EQ(lease_now(victim.id)->state, State::active) << "until the notice is over";
  ahead_ = 61'000;
  EXPECT_TRUE(reaches(victim.id, State::ended));
  EXPECT_THAT(lease_now(victim.id)->reason, HasSubstr("preempted"));
  EXPECT_TRUE(reaches(queued.id, State::active));
  // A tenant's own priorities order its own leases alone.
  auto mine = exclusive(4);
  mine.wait = true;
  const auto waits = granted(create(of("speech"), mine));
  EXPECT_EQ(waits.state, State::queued);
  EXPECT_FALSE(lease_now(queued.id)->notice);
}

TEST_F(ControlTest, WhenThePreemptorGivesUpItsVictimMayStay) {
  start();
  tenant("vision");
  auto low = exclusive(4);
  low.preemptible = true;
  low.priority = -10;
  const auto victim = granted(create(of("vision"), low));
  auto urgent = exclusive();
  urgent.wait = true;
  const auto queued = granted(create(of("vision"), urgent));
  ASSERT_TRUE(lease_now(victim.id)->notice) << "within a tenant its own priorities count";
  granted(release(of("vision"), queued.id));
  EXPECT_FALSE(lease_now(victim.id)->notice);
  ahead_ = 61'000;
  std::this_thread::sleep_for(100ms);
  EXPECT_EQ(lease_now(victim.id)->state, State::active);
}

TEST_F(ControlTest, WhileDrainingNothingNewIsGranted) {
  start();
  tenant("vision");
  const auto lease = granted(create(of("vision"), exclusive()));
  EXPECT_TRUE(std::get<bool>(ask<bool>([&](auto then) { control_->drain(admin(), true, then); })));
  EXPECT_EQ(refused(create(of("vision"), exclusive())).why, Denied::unavailable);
  EXPECT_EQ(std::get<Refusal>(ask<bool>([&](auto then) { control_->drain(of("vision"), false, then); })).why,
            Denied::forbidden);
  start();
  EXPECT_TRUE(control_->now()->draining);
  EXPECT_EQ(lease_now(lease.id)->state, State::active);
  ask<bool>([&](auto then) { control_->drain(admin(), false, then); });
  granted(create(of("vision"), exclusive()));
}

TEST_F(ControlTest, ACordonedGpuKeepsItsLeaseAndGetsNoOther) {
  start();
  tenant("vision");
  const auto lease = granted(create(of("vision"), exclusive()));
  const Uuid gpu = lease.parts.at(0).gpu;
  const auto cordon = [&](const Caller& who, const std::string& why) {
    return ask<PoolGpu>([&](auto then) { control_->cordon(who, gpu, why, then); });
  };
  EXPECT_EQ(std::get<Refusal>(cordon(of("vision"), "mine")).why, Denied::forbidden);
  EXPECT_EQ(std::get<Refusal>(cordon(admin(), "")).why, Denied::invalid);
  EXPECT_EQ(std::get<Refusal>(cordon(admin(), "two\nlines")).why, Denied::invalid);
  EXPECT_EQ(std::get<Refusal>(ask<PoolGpu>([&](auto then) {
              control_->cordon(admin(), {"GPU-none"}, "dust", then);
            })).why,
            Denied::not_found);
  const auto held = std::get<PoolGpu>(cordon(admin(), "row remapping failed"));
  ASSERT_TRUE(held.cordon);
  EXPECT_EQ(held.cordon->why, "row remapping failed");
  EXPECT_EQ(std::get<PoolGpu>(cordon(admin(), "another word")).cordon->why, "row remapping failed");
  EXPECT_EQ(lease_now(lease.id)->state, State::active);
  granted(release(of("vision"), lease.id));
  ASSERT_TRUE(reaches(lease.id, State::ended));
  // Over a restart, and though the GPU is free: nobody gets it.
  start();
  std::set<std::string> given;
  for (int i = 0; i < 8; ++i) {
    const auto answer = create(of("vision"), exclusive());
    if (const auto* got = std::get_if<lease::Lease>(&answer)) given.insert(got->parts.at(0).gpu.text);
  }
  EXPECT_FALSE(given.empty());
  EXPECT_FALSE(given.contains(gpu.text));
  EXPECT_FALSE(
      std::get<PoolGpu>(ask<PoolGpu>([&](auto then) { control_->uncordon(admin(), gpu, then); })).cordon);
  EXPECT_EQ(granted(create(of("vision"), exclusive())).parts.at(0).gpu, gpu);
}

TEST_F(ControlTest, AGpuOfManyLettersIsNoneAndIsInNobodysWay) {
  start();
  tenant("vision");
  const Uuid gpu{std::string(6'000, 'x')};
  const auto no = ask<PoolGpu>([&](auto then) { control_->cordon(admin(), gpu, "dust", then); });
  EXPECT_EQ(std::get<Refusal>(no).why, Denied::not_found);
  EXPECT_EQ(control_->now()->trouble, "");
  const auto there = ask<PoolGpu>([&](auto then) { control_->uncordon(admin(), gpu, then); });
  EXPECT_EQ(std::get<Refusal>(there).why, Denied::not_found);
}

TEST_F(ControlTest, WhoLosesALeaseIsToldWhy) {
  start();
  tenant("vision");
  const auto lease = granted(create(of("vision"), exclusive()));
  const auto evict = [&](const Caller& who, const std::string& why) {
    return ask<lease::Lease>([&](auto then) { control_->evict(who, lease.id, why, then); });
  };
  EXPECT_EQ(std::get<Refusal>(evict(of("vision"), "tired of it")).why, Denied::forbidden);
  EXPECT_EQ(std::get<Refusal>(evict(admin(), "")).why, Denied::invalid);
  granted(evict(admin(), "its GPU fell off the bus (XID 79)"));
  ASSERT_TRUE(reaches(lease.id, State::ended));
  EXPECT_EQ(lease_now(lease.id)->reason, "its GPU fell off the bus (XID 79)");
}

// ---- the hardware
TEST_F(ControlTest, AnIdleInstanceIsReclaimedAndItsPlaceCutAnew) {
  auto with = settings();
  with.idle_keep = 5s;
  start(with);
  tenant("vision");
  const auto first = granted(create(of("vision"), mig("1g.10gb", 7)));
  ASSERT_TRUE(reaches(first.id, State::active));
  granted(release(of("vision"), first.id));
  ASSERT_TRUE(reaches(first.id, State::ended));
  // Wanted otherwise at once: what is idle makes room.
  const auto whole = granted(create(of("vision"), mig("7g.80gb", 2)));
  ASSERT_TRUE(reaches(whole.id, State::active));
  granted(release(of("vision"), whole.id));
  ASSERT_TRUE(reaches(whole.id, State::ended));
  // As the twin has it: a second look through the driver's library would not be behind the control's gate.
  const auto count = [&] {
    std::size_t all = 0;
    if (const auto seen = twin::status(twin()); seen.ok())
      for (const auto& gpu : seen->at("gpus"))
        all += gpu.contains("instances") ? gpu.at("instances").size() : 0;
    return all;
  };
  EXPECT_EQ(count(), 2U);
  ahead_ = 6'000;
  for (int i = 0; i < 500 && count() > 0; ++i) std::this_thread::sleep_for(10ms);
  EXPECT_EQ(count(), 0U) << "nobody wanted them for the time they are kept";
}

TEST_F(ControlTest, ALostGpuEndsItsLeasesWithTheReason) {
  start();
  tenant("vision");
  const auto lease = granted(create(of("vision"), exclusive(4)));
  twin::FaultRequest fault;
  fault.name = "lost-from-nvml";
  fault.gpu = 5;
  ASSERT_TRUE(twin::break_it(twin(), fault).ok());
  ASSERT_TRUE(reaches(lease.id, State::ended));
  EXPECT_THAT(lease_now(lease.id)->reason, HasSubstr("gpu 5 was lost"));
  EXPECT_EQ(refused(create(of("vision"), exclusive(4))).why, Denied::no_room);
  granted(create(of("vision"), exclusive(3)));
  ASSERT_TRUE(twin::mend(twin(), "", 5).ok());
  auto wait = exclusive();
  wait.wait = true;
  EXPECT_TRUE(reaches(granted(create(of("vision"), wait)).id, State::active)) << "it came back";
}

// Programs of tenants that have the capability file of a part open.
class Stubborn {
 public:
  // Each tells of a SIGTERM here, and goes on.
  Stubborn() {
    int ends[2] = {-1, -1};
    EXPECT_EQ(::pipe2(ends, O_CLOEXEC), 0);
    told_ = UniqueFd(ends[0]);
    tells_ = UniqueFd(ends[1]);
    tell = ends[1];
  }
  ~Stubborn() { end(); }
  Stubborn(const Stubborn&) = delete;
  Stubborn& operator=(const Stubborn&) = delete;

  static fs::path file_of(const fs::path& root, const lease::Part& part) {
    for (const auto& node : part.device_nodes)
      if (node.find("nvidia-cap") != std::string::npos) return root / fs::path(node).relative_path();
    ADD_FAILURE() << "the part has no file of its own";
    return {};
  }
  void start(const fs::path& part) {
    const std::string file = part.string();
    int ready[2] = {-1, -1};
    ASSERT_EQ(::pipe2(ready, O_CLOEXEC), 0);
    const UniqueFd reads(ready[0]), writes(ready[1]);
    const pid_t program = ::fork();
    if (program == 0) {
      ::signal(SIGTERM, [](int) { (void)!::write(tell, "t", 1); });
      if (::open(file.c_str(), O_RDWR | O_CLOEXEC) < 0 || ::setuid(64'123) != 0) ::_exit(1);
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // another user's forgets it
      (void)!::write(ready[1], "x", 1);
      while (true) ::pause();
    }
    programs_.push_back(program);
    char byte = 0;
    ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  }
  std::size_t asked(std::size_t wanted) const {
    std::size_t count = 0;
    pollfd wait{.fd = told_.get(), .events = POLLIN, .revents = 0};
    while (count<wanted&& ::poll(&wait, 1, 60'000)> 0) {
      char byte = 0;
      if (::read(told_.get(), &byte, 1) == 1) ++count;
    }
    return count;
  }
  bool all_there() const {
    return std::all_of(programs_.begin(), programs_.end(),
                       [](pid_t program) { return ::waitpid(program, nullptr, WNOHANG) == 0; });
  }
  void end() {
    for (const pid_t program : programs_) {
      ::kill(program, SIGKILL);
      ::waitpid(program, nullptr, 0);
    }
    programs_.clear();
  }

 private:
  inline static int tell = -1;
  UniqueFd told_ = {}, tells_ = {};
  std::vector<pid_t> programs_ = {};
};

TEST_F(ControlTest, ManyLeasesWhoseProgramsIgnoreSigtermWaitForTheirGracesBesideEachOther) {
  constexpr std::size_t many = 12;
  auto with = settings();
  with.grace = 120s;  // longer than this test waits: one behind another would not be asked in its time
  start(std::move(with));
  tenant("vision");
  std::vector<std::int64_t> ids;
  Stubborn programs;
  for (std::size_t i = 0; i < many; ++i) {
    const auto lease = granted(create(of("vision"), mig("1g.10gb")));
    ASSERT_TRUE(reaches(lease.id, State::active));
    ids.push_back(lease.id);
    programs.start(Stubborn::file_of(twin() / "root", lease_now(lease.id)->parts.front()));
  }
  for (const auto id : ids) granted(release(of("vision"), id));
  EXPECT_EQ(programs.asked(many), many) << "all are asked to end while none has ended";
  EXPECT_TRUE(programs.all_there());
  programs.end();
  for (const auto id : ids) EXPECT_TRUE(reaches(id, State::ended));
}

TEST_F(ControlTest, AProgramThatIgnoresSigtermKeepsNoChangeOfOthersWaiting) {
  auto with = settings();
  with.grace = 120s;  // nothing below waits as long: what is granted is granted before it is over
  start(std::move(with));
  tenant("vision");
  tenant("speech");
  const auto lease = granted(create(of("vision"), mig("1g.10gb", 3)));
  ASSERT_TRUE(reaches(lease.id, State::active));
  Stubborn programs;
  const auto held = lease_now(lease.id)->parts;
  for (const auto& part : held) programs.start(Stubborn::file_of(twin() / "root", part));
  granted(release(of("vision"), lease.id));
  EXPECT_EQ(programs.asked(held.size()), held.size()) << "in all parts, while none has ended";
  // Cut anew, on GPUs that have the others' parts as well.
  for (const unsigned count : {3U, 2U}) {
    const auto next = granted(create(of("speech"), mig("2g.20gb", count)));
    ASSERT_TRUE(reaches(next.id, State::active));
    for (const auto& mine : lease_now(next.id)->parts)
      for (const auto& theirs : held) EXPECT_NE(mine.device, theirs.device);
  }
  EXPECT_EQ(lease_now(lease.id)->state, State::releasing) << "nothing of it is given to the next meanwhile";
  EXPECT_TRUE(programs.all_there()) << "the grace is not over";
  programs.end();
  EXPECT_TRUE(reaches(lease.id, State::ended));
}

TEST_F(ControlTest, AGpuThatSomebodyUsesWithoutALeaseIsNotGiven) {
  const auto pid = twin::attach(twin(), {.gpu = 6, .name = "stranger", .memory_bytes = 1 << 30});
  ASSERT_TRUE(pid.ok());
  start();
  tenant("vision");
  const auto no = refused(create(of("vision"), exclusive(4)));
  EXPECT_THAT(no.reasons, Contains(HasSubstr("stranger")));
  const auto lease = granted(create(of("vision"), exclusive(3)));
  for (const auto& part : lease.parts) EXPECT_NE(part.gpu, control_->now()->gpus[6].gpu);
  ASSERT_TRUE(twin::detach(twin(), *pid).ok());
  auto wait = exclusive();
  wait.wait = true;
  EXPECT_TRUE(reaches(granted(create(of("vision"), wait)).id, State::active));
}

TEST_F(ControlTest, WhoeverComesToAGpuWhileItsLeaseWaitsForItsTurnKeepsTheLeaseFromStarting) {
  start();
  tenant("vision");
  std::atomic<bool> its_turn{false};
  std::atomic<unsigned> asked{0};
  control_->on_start([&](const lease::Lease&) {
    ++asked;
    return its_turn ? 0ms : 50ms;
  });
  auto wanted = exclusive();
  wanted.wait = true;
  const auto lease = granted(create(of("vision"), wanted));
  ASSERT_EQ(lease.state, State::preparing);
  const auto gpu = lease.parts.at(0).gpu;
  unsigned index = 0;
  for (const auto& one : control_->now()->gpus)
    if (one.gpu == gpu) index = one.index;
  const auto pid = twin::attach(twin(), {.gpu = index, .name = "stranger", .memory_bytes = 1 << 30});
  ASSERT_TRUE(pid.ok());
  // What was seen before the stranger came counts no more once the turn has been asked for anew.
  for (const unsigned before = asked; asked == before;) std::this_thread::sleep_for(5ms);
  its_turn = true;
  // It is tried a few times, then it waits as anybody does; it starts where nobody is.
  ASSERT_TRUE(reaches(lease.id, State::active));
  EXPECT_NE(lease_now(lease.id)->parts.at(0).gpu, gpu) << "a stranger is there";
  ASSERT_TRUE(twin::detach(twin(), *pid).ok());
  control_->on_start({});
}

TEST_F(ControlTest, ADriverThatHangsDoesNotStopTheLoop) {
  // The thread that stays behind in the driver keeps its library loaded: not the one of the tests to come.
  const auto library = twin() / "lib/libnvidia-ml.so.1";
  const auto original = fs::canonical(library);
  fs::remove(library);
  fs::copy_file(original, library);
  auto with = settings();
  with.access.driver_timeout_ms = 500;
  with.look_every = 10s;
  start(with);
  tenant("vision");
  twin::FaultRequest fault;
  fault.name = "hang-call";
  fault.function = "nvmlDeviceGetHandleByIndex_v2";
  fault.delay_ms = 3'000;
  ASSERT_TRUE(twin::break_it(twin(), fault).ok());
  const auto cut = granted(create(of("vision"), mig("3g.40gb")));
  EXPECT_EQ(cut.state, State::preparing);
  for (int i = 0; i < 20; ++i) {
    const auto lease = granted(create(of("vision"), share(10, 1)));
    EXPECT_EQ(lease.state, State::active);
  }
  ASSERT_TRUE(twin::mend(twin(), "", twin::none).ok());
  // However it went, the end of the story is known and nothing is held for nobody.
  for (int i = 0; i < 3000 && lease_now(cut.id)->state == State::preparing; ++i)
    std::this_thread::sleep_for(10ms);
  EXPECT_NE(lease_now(cut.id)->state, State::preparing);
}

// ---- restarts
TEST_F(ControlTest, ARestartFindsEveryLeaseAsItWas) {
  start();
  tenant("vision");
  const auto gpu = granted(create(of("vision"), exclusive()));
  const auto cut = granted(create(of("vision"), mig("2g.20gb")));
  const auto part = granted(create(of("vision"), share(300, 10)));
  auto wait = exclusive(4);
  wait.wait = true;
  const auto queued = granted(create(of("vision"), wait));
  ASSERT_TRUE(reaches(cut.id, State::active));
  const auto before = control_->now();
  start();
  const auto after = control_->now();
  ASSERT_EQ(after->leases.size(), before->leases.size());
  for (const auto& [id, lease] : before->leases)
    EXPECT_EQ(lease::to_json(*after->leases.find(id)->second), lease::to_json(*lease));
  EXPECT_EQ(after->held, before->held);
  EXPECT_EQ(refused(create(of("vision"), exclusive(4))).why, Denied::no_room);
  granted(release(of("vision"), gpu.id));
  EXPECT_TRUE(reaches(queued.id, State::active)) << "it still waits after the restart";
  granted(release(of("vision"), part.id));
  EXPECT_TRUE(reaches(part.id, State::ended));
  const auto next = granted(create(of("vision"), share(10, 1)));
  EXPECT_GT(next.id, queued.id) << "ids are never used again";
  EXPECT_EQ(Control::start(settings()).error().code(), Errc::in_use) << "one loop a book";
}

TEST_F(ControlTest, WhoHeldMuchWaitsBehindWhoHeldLittleAlsoAfterARestart) {
  start();
  for (const auto* name : {"heavy", "light", "other"}) tenant(name);
  auto all = exclusive(4);
  all.ttl = 20h;
  const auto long_held = granted(create(of("heavy"), all));
  ahead_ = std::chrono::milliseconds(12h).count();
  granted(release(of("heavy"), long_held.id));
  ASSERT_TRUE(reaches(long_held.id, State::ended));
  const auto holder = granted(create(of("other"), all));
  all.wait = true;
  const auto heavy = granted(create(of("heavy"), all));
  const auto light = granted(create(of("light"), all));
  ASSERT_EQ(light.state, State::queued);
  start();
  const auto place =
      std::get<Standing>(ask<Standing>([&](auto then) { control_->standing(of("heavy"), heavy.id, then); }));
  EXPECT_EQ(place.tenants_ahead, 1U);
  granted(release(of("other"), holder.id));
  EXPECT_TRUE(reaches(light.id, State::active));
  EXPECT_EQ(lease_now(heavy.id)->state, State::queued) << "asked first, but held much";
}

TEST_F(ControlTest, AnInstanceThatWentWhileTheDaemonWasDownEndsItsLease) {
  start();
  tenant("vision");
  const auto cut = granted(create(of("vision"), mig("2g.20gb")));
  const auto gpu = granted(create(of("vision"), exclusive()));
  ASSERT_TRUE(reaches(cut.id, State::active));
  control_.reset();
  ASSERT_TRUE(twin::reboot(twin()).ok());
  start();
  EXPECT_TRUE(reaches(cut.id, State::ended));
  EXPECT_THAT(lease_now(cut.id)->reason, HasSubstr("is gone"));
  EXPECT_EQ(lease_now(gpu.id)->state, State::active) << "a whole GPU outlives a reboot";
  EXPECT_EQ(control_->now()->held.at("vision").slices, 0U);
}

TEST_F(ControlTest, EventsCountWithoutAGapAndTellWhatHappened) {
  start();
  std::mutex mutex;
  std::vector<Event> told;
  control_->on_events([&](const std::vector<Event>& events) {
    const std::lock_guard hold(mutex);
    told.insert(told.end(), events.begin(), events.end());
  });
  tenant("vision");
  const auto lease = granted(create(of("vision"), exclusive()));
  granted(release(of("vision"), lease.id));
  ASSERT_TRUE(reaches(lease.id, State::ended));
  (void)refused(create(of("vision"), exclusive(5)));
  const auto all = control_->events_after(0, 1000);
  ASSERT_TRUE(all.ok());
  std::vector<std::string> verbs;
  for (std::size_t i = 0; i < all->size(); ++i) {
    EXPECT_EQ((*all)[i].id, static_cast<std::int64_t>(i) + 1);
    verbs.push_back((*all)[i].verb + " " + (*all)[i].what + " " + (*all)[i].outcome);
  }
  EXPECT_EQ(verbs, (std::vector<std::string>{"create tenant/vision done", "create lease/1 done",
                                             "release lease/1 done", "scrubbed lease/1 done",
                                             "create lease refused: no-room"}));
  EXPECT_EQ((*all)[2].user, "ada");
  EXPECT_EQ((*all)[3].user, "bulkhead");
  EXPECT_EQ((*all)[3].body.at("state"), "ended");
  EXPECT_EQ(control_->now()->last_event, 5);
  const auto count = [&] {
    const std::lock_guard hold(mutex);
    return told.size();
  };
  for (int i = 0; i < 1000 && count() < 5; ++i) std::this_thread::sleep_for(2ms);
  const std::lock_guard hold(mutex);
  ASSERT_EQ(told.size(), 5U);
  EXPECT_EQ(told[4].what, "lease");
  EXPECT_EQ(told[4].tenant, "vision");
}

TEST_F(ControlTest, ALeaseOfLongAgoIsFoundInTheBook) {
  start();
  tenant("vision");
  const auto lease = granted(create(of("vision"), share(1, 1)));
  granted(release(of("vision"), lease.id));
  ASSERT_TRUE(reaches(lease.id, State::ended));
  const auto old = ask<lease::Lease>([&](auto then) { control_->old_lease(of("vision"), lease.id, then); });
  EXPECT_EQ(granted(old).state, State::ended);
  EXPECT_EQ(refused(ask<lease::Lease>([&](auto then) { control_->old_lease(of("vision"), 77, then); })).why,
            Denied::not_found);
}

// ---- full disks
std::atomic<bool> disk_is_full = false;
using Pwrite = ssize_t (*)(int, const void*, size_t, off_t);
Pwrite real_pwrite = nullptr;
ssize_t pwrite_or_full(int fd, const void* data, size_t size, off_t offset) {
  if (!disk_is_full) return real_pwrite(fd, data, size, offset);
  errno = ENOSPC;
  return -1;
}

TEST_F(ControlTest, AFullDiskGrantsNothingAndTheServiceGoesOnWithRoom) {
  sqlite3_initialize();
  auto* vfs = sqlite3_vfs_find(nullptr);
  real_pwrite = reinterpret_cast<Pwrite>(vfs->xGetSystemCall(vfs, "pwrite64"));
  const char* call = "pwrite64";
  if (real_pwrite == nullptr) {
    call = "pwrite";
    real_pwrite = reinterpret_cast<Pwrite>(vfs->xGetSystemCall(vfs, call));
  }
  ASSERT_NE(real_pwrite, nullptr);
  ASSERT_EQ(vfs->xSetSystemCall(vfs, call, reinterpret_cast<sqlite3_syscall_ptr>(pwrite_or_full)), SQLITE_OK);
  start();
  tenant("vision");
  auto brief = exclusive();
  brief.ttl = 60s;
  const auto lease = granted(create(of("vision"), brief));
  disk_is_full = true;
  for (int i = 0; i < 5; ++i) {
    const auto no = refused(create(of("vision"), exclusive()));
    EXPECT_EQ(no.why, Denied::unavailable);
  }
  EXPECT_EQ(refused(release(of("vision"), lease.id)).why, Denied::unavailable);
  EXPECT_EQ(lease_now(lease.id)->state, State::active);
  EXPECT_EQ(control_->now()->held.at("vision").gpus, 1U);
  EXPECT_THAT(control_->now()->trouble, HasSubstr("could not be kept"));
  ahead_ = 61'000;  // its end cannot be written either
  std::this_thread::sleep_for(100ms);
  EXPECT_EQ(lease_now(lease.id)->state, State::active);
  disk_is_full = false;
  EXPECT_TRUE(reaches(lease.id, State::ended)) << "it goes on by itself";
  EXPECT_EQ(granted(create(of("vision"), exclusive(4))).state, State::active)
      << "nothing was lost on the way";
  EXPECT_EQ(control_->now()->trouble, "");
  vfs->xSetSystemCall(vfs, call, nullptr);
  const auto events = control_->events_after(0, 1000);
  ASSERT_TRUE(events.ok());
  EXPECT_EQ(verify_audit(settings().state)->broken, "");
}

// ---- kill -9
// What a daemon of its own does under load until it is killed; what it was told is durable goes to `out`.
[[noreturn]] void work_until_killed(Settings settings, int out, std::uint64_t seed) {
  settings.clock = {};
  auto control = Control::start(std::move(settings));
  if (!control.ok()) {
    (void)!::write(out, "E\n", 2);
    ::_exit(1);
  }
  (void)!::write(out, "S\n", 2);
  const auto say = [out](const char* what, std::int64_t id) {
    const std::string line = std::string(what) + std::to_string(id) + "\n";
    (void)!::write(out, line.data(), line.size());
  };
  std::vector<std::thread> clients;
  for (unsigned client = 0; client < 6; ++client)
    clients.emplace_back([&, client] {
      Prng random(seed * 31 + client);
      const Caller caller{.user = "ada", .tenant = client % 2 == 0 ? "vision" : "speech"};
      std::vector<std::int64_t> mine;
      while (true) {
        const bool give_back = mine.size() > 3 || (!mine.empty() && random.below(3) == 0);
        std::promise<std::int64_t> promise;
        if (give_back) {
          const auto id = mine.back();
          mine.pop_back();
          (*control)->release_lease(caller, id, std::nullopt, [&](Answer<lease::Lease> answer) {
            const bool done = std::holds_alternative<lease::Lease>(answer);
            if (done) say("R", id);
            promise.set_value(0);
          });
          promise.get_future().get();
          continue;
        }
        lease::Ask ask;
        switch (random.below(3)) {
          case 0:
            ask = {.cls = lease::Class::exclusive, .count = 1 + static_cast<unsigned>(random.below(2))};
            break;
          case 1:
            ask = {.cls = lease::Class::mig, .profile = random.below(2) == 0 ? "1g.10gb" : "3g.40gb"};
            break;
          default:
            ask = {.cls = lease::Class::share, .memory = mebibytes(1024), .weight = 100};
        }
        ask.wait = random.below(4) == 0;
        (*control)->create_lease(caller, ask, {}, [&](Answer<lease::Lease> answer) {
          const auto* lease = std::get_if<lease::Lease>(&answer);
          if (lease != nullptr) say("G", lease->id);
          promise.set_value(lease == nullptr ? 0 : lease->id);
        });
        if (const auto id = promise.get_future().get(); id != 0)
          mine.push_back(id);
        else
          std::this_thread::sleep_for(1ms);
      }
    });
  while (true) ::pause();
}

// Nothing is held twice: by the book alone, with arithmetic of its own.
void expect_none_double(const std::vector<lease::Lease>& leases) {
  std::map<std::string, std::int64_t> whole;
  std::map<std::string, unsigned> weight;
  std::map<std::string, std::uint64_t> cells;  // of a GPU's grid
  std::map<std::string, std::int64_t> device;
  for (const auto& lease : leases) {
    if (!lease::holds(lease.state)) continue;
    for (const auto& part : lease.parts) {
      if (lease.ask.cls == lease::Class::share) {
        weight[part.gpu.text] += part.weight;
        EXPECT_LE(weight[part.gpu.text], 1000U) << "lease " << lease.id;
        continue;
      }
      if (lease.ask.cls == lease::Class::exclusive) {
        EXPECT_TRUE(whole.emplace(part.gpu.text, lease.id).second)
            << "leases " << lease.id << " and " << whole[part.gpu.text];
        continue;
      }
      const std::uint64_t size = part.profile == "1g.10gb" ? 1 : 4;
      const std::uint64_t mask = ((1ULL << size) - 1) << *part.start;
      EXPECT_EQ(cells[part.gpu.text] & mask, 0U) << "lease " << lease.id;
      cells[part.gpu.text] |= mask;
      if (!part.device.text.empty()) {
        EXPECT_TRUE(device.emplace(part.device.text, lease.id).second) << "lease " << lease.id;
      }
    }
  }
  for (const auto& [gpu, mask] : cells) EXPECT_FALSE(whole.contains(gpu));
}

TEST_F(ControlTest, KilledAtAnyMomentUnderLoadItLosesNoLeaseAndGrantsNoneTwice) {
  const char* more = std::getenv("BULKHEAD_KILL_ROUNDS");
  const int rounds = more != nullptr ? std::atoi(more) : 8;
  start();
  tenant("vision");
  tenant("speech");
  control_.reset();
  Prng random(1);
  std::set<std::int64_t> had, back;
  for (int round = 0; round < rounds; ++round) {
    int pipe[2];
    ASSERT_EQ(::pipe(pipe), 0);
    const pid_t child = ::fork();
    if (child == 0) {
      ::close(pipe[0]);
      work_until_killed(settings(), pipe[1], static_cast<std::uint64_t>(round));
    }
    ::close(pipe[1]);
    // From before it is ready to well into its work.
    const auto pause = std::chrono::microseconds(random.below(10) == 0 ? random.below(60'000)
                                                                       : 60'000 + random.below(500'000));
    std::string said;
    std::thread killer([&] {
      std::this_thread::sleep_for(pause);
      ::kill(child, SIGKILL);
    });
    char buffer[4096];
    for (ssize_t got = 0; (got = ::read(pipe[0], buffer, sizeof buffer)) > 0;)
      said.append(buffer, static_cast<std::size_t>(got));
    killer.join();
    ::waitpid(child, nullptr, 0);
    ::close(pipe[0]);
    ASSERT_THAT(said, Not(HasSubstr("E"))) << "round " << round << ": it could not start";
    for (const auto line : split_lines(said)) {
      if (line.size() < 2) continue;
      const auto id = parse_i64(line.substr(1));
      if (!id || !said.ends_with("\n")) continue;
      if (line[0] == 'G') {
        EXPECT_TRUE(had.insert(*id).second) << "lease " << *id << " was granted twice";
      }
      if (line[0] == 'R') back.insert(*id);
    }
    auto book = book::Book::open(settings().state, book::Book::Access::read_only);
    ASSERT_TRUE(book.ok()) << book.error().message();
    const auto records = (*book)->leases(true);
    ASSERT_TRUE(records.ok());
    std::vector<lease::Lease> leases;
    std::set<std::int64_t> known;
    for (const auto& record : *records) {
      auto lease = lease::parse(record.body);
      ASSERT_TRUE(lease.ok()) << lease.error().message();
      known.insert(record.id);
      if (back.contains(record.id)) {
        EXPECT_TRUE(lease->state == State::releasing || lease::over(lease->state)) << "lease " << record.id;
      } else if (had.contains(record.id)) {
        EXPECT_TRUE(!lease::over(lease->state) || lease->state == State::failed ||
                    lease->reason.find("released") != std::string::npos ||
                    lease->reason.find("given up") != std::string::npos)
            << "round " << round << ": lease " << record.id << " ended: " << lease->reason;
      }
      leases.push_back(std::move(*lease));
    }
    for (const auto id : had) EXPECT_TRUE(known.contains(id)) << "lease " << id << " is lost";
    expect_none_double(leases);
    const auto audit = verify_audit(settings().state);
    ASSERT_TRUE(audit.ok());
    EXPECT_EQ(audit->broken, "") << "round " << round;
  }
  EXPECT_GT(had.size(), 0U);
  // The last one comes up, tidies, and everything can be had again.
  start();
  const auto until = std::chrono::steady_clock::now() + 60s;
  bool idle = false;
  while (!idle && std::chrono::steady_clock::now() < until) {
    idle = true;
    const auto now = control_->now();
    for (const auto& [id, lease] : now->leases) {
      if (lease::over(lease->state)) continue;
      idle = false;
      if (lease->state == State::active || lease->state == State::queued)
        (void)release({.user = "root", .role = access::Role::admin}, id);
    }
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_TRUE(idle);
  EXPECT_TRUE(control_->now()->held.empty());
  EXPECT_EQ(granted(create(of("vision"), exclusive(4))).state, State::active);
  EXPECT_TRUE(reaches(granted(create(of("vision"), mig("7g.80gb", 2))).id, State::active));
}

}  // namespace
}  // namespace bulkhead::control
