// The control loop on a twin: leases asked for, granted, renewed, ended; restarts, kills and full disks.
#include "engine/control/control.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <future>
#include <set>
#include <thread>

#include "base/fd.hpp"
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
  static lease::Ask exclusive(unsigned count = 1) {
    return {.cls = lease::Class::exclusive, .count = count};
  }
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

}  // namespace
}  // namespace bulkhead::control
