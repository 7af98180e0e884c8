#include "twin/rm/rm.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "abi/rm/rm.hpp"
#include "base/fd.hpp"
#include "twin/rm/store.hpp"
#include "twin/state/state.hpp"

namespace bulkhead::twin::rm {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t us = 1000, ms = 1000 * us, second = 1000 * ms;
constexpr std::uint64_t MiB = 1ULL << 20, GiB = 1ULL << 30;
constexpr std::uint32_t hopper_channel = 0xc86f;

// A twin's directory with two boards of 80 GiB, 1 GiB of it reserved, and a clock that moves by step() only.
class Rm : public testing::Test {
 protected:
  void SetUp() override {
    const fs::path place = ::access("/dev/shm", W_OK) == 0 ? fs::path("/dev/shm") : fs::temp_directory_path();
    std::string pattern = (place / "bulkhead-rm-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    twin_ = pattern;
    fs::create_directories(twin_ / "root/dev");
    fs::create_directories(twin_ / "root/proc");
    ASSERT_TRUE(write_file_atomic(twin_ / "root/dev/nvidiactl", "", 0666).ok());
    const auto state = std::make_unique<State>();
    state->version = state_version;
    state->gpu_count = 2;
    state->chip_count = 1;
    state->driver_loaded = 1;
    state->now_ns = 600 * second;
    state->chips[0].memory_bytes = 80 * GiB;
    state->chips[0].reserved_bytes = 1 * GiB;
    state->gpus[0].on_pci = state->gpus[1].on_pci = 1;
    ASSERT_TRUE(StateFile::create(twin_ / "state.bin", *state).ok());
    auto file = StateFile::open(twin_ / "state.bin");
    ASSERT_TRUE(file.ok());
    state_ = std::move(*file);
    driver_ = open_driver();
  }
  void TearDown() override;

  std::unique_ptr<Driver> open_driver() const {
    auto opened = Driver::open(twin_);
    EXPECT_TRUE(opened.ok()) << opened.error().message();
    return opened.ok() ? std::move(*opened) : nullptr;
  }
  UniqueFd open_file() const {
    return UniqueFd(::open((twin_ / "root/dev/nvidiactl").c_str(), O_RDWR | O_CLOEXEC));
  }
  void step(std::uint64_t ns) {
    state_->write([&](State& s) {
      s.now_ns += ns;
      return true;
    });
  }
  void plant(FaultKind kind) {
    state_->write([&](State& s) {
      s.faults[0] = {};
      s.faults[0].kind = kind;
      s.faults[0].gpu = none;
      s.faults[0].remaining = kind == FaultKind::nothing ? 0 : none;
      return true;
    });
  }
  Process row(std::uint32_t pid, std::uint32_t gpu = 0) const {
    Process found{};
    state_->read([&](const State& s) {
      for (const Process& p : s.processes) {
        if (p.used != 0 && p.pid == pid && p.gpu == gpu) found = p;
      }
    });
    return found;
  }
  static std::uint32_t self() { return static_cast<std::uint32_t>(::getpid()); }

  fs::path twin_;
  std::unique_ptr<StateFile> state_;
  std::unique_ptr<Driver> driver_;
};

// What libcuda does, through one open file.
struct Tenant {
  Driver& driver;
  UniqueFd file;
  std::uint32_t client = 0;

  static constexpr std::uint32_t device = 0x5c000002, subdevice = 0x5c000003, group = 0x5c000015, channel = 0x5c00001c;

  std::uint32_t alloc(std::uint32_t parent, std::uint32_t handle, std::uint32_t cls, void* params = nullptr,
                      std::uint32_t* given = nullptr) {
    abi::Alloc call{};
    call.root = client;
    call.parent = parent;
    call.handle = handle;
    call.cls = cls;
    call.params = reinterpret_cast<std::uint64_t>(params);
    EXPECT_EQ(driver.ioctl_on(file.get(), abi::request(abi::esc_alloc, sizeof call), &call), 0);
    if (given != nullptr) *given = call.handle;
    return call.status;
  }
  std::uint32_t control(std::uint32_t object, std::uint32_t command, void* params, std::size_t size) {
    abi::Control call{};
    call.client = client;
    call.object = object;
    call.command = command;
    call.params = reinterpret_cast<std::uint64_t>(params);
    call.params_size = static_cast<std::uint32_t>(size);
    EXPECT_EQ(driver.ioctl_on(file.get(), abi::request(abi::esc_control, sizeof call), &call), 0);
    return call.status;
  }
  std::uint32_t free(std::uint32_t handle) {
    abi::Free call{client, client, handle, 0};
    EXPECT_EQ(driver.ioctl_on(file.get(), abi::request(abi::esc_free, sizeof call), &call), 0);
    return call.status;
  }
  std::uint32_t begin(std::uint32_t gpu = 0) {
    if (const auto status = alloc(0, 0, abi::class_client, nullptr, &client); status != abi::ok) return status;
    abi::DeviceParams params{};
    params.device = gpu;
    if (const auto status = alloc(client, device, abi::class_device, &params); status != abi::ok) return status;
    return alloc(device, subdevice, abi::class_subdevice);
  }
  std::uint32_t add_group(std::uint32_t handle = group, std::uint32_t first_channel = channel, unsigned channels = 2,
                          std::uint32_t engine = abi::engine_compute) {
    abi::GroupParams params{};
    params.engine = engine;
    if (const auto status = alloc(device, handle, abi::class_channel_group, &params); status != abi::ok) return status;
    for (unsigned i = 0; i < channels; ++i) {
      if (const auto status = alloc(handle, first_channel + i, hopper_channel); status != abi::ok) return status;
    }
    std::uint8_t schedule[3] = {1, 0, 0};
    return control(handle, abi::cmd_group_schedule, schedule, sizeof schedule);
  }
  std::uint32_t add_memory(std::uint32_t handle, std::uint64_t bytes, std::uint64_t* got = nullptr) {
    abi::MemoryParams params{};
    params.size = bytes;
    const auto status = alloc(device, handle, abi::class_device_memory, &params);
    if (got != nullptr) *got = params.size;
    return status;
  }
  std::uint32_t set_slice(std::uint64_t slice_us, std::uint32_t of = group) {
    return control(of, abi::cmd_group_set_timeslice, &slice_us, sizeof slice_us);
  }
  std::uint64_t slice(std::uint32_t of = group) {
    std::uint64_t slice_us = 0;
    EXPECT_EQ(control(of, abi::cmd_group_get_timeslice, &slice_us, sizeof slice_us), 0U);
    return slice_us;
  }
  std::uint32_t switch_channels(bool on, unsigned count = 2, std::uint32_t first_channel = channel) {
    abi::DisableChannels params{};
    params.disable = on ? 0 : 1;
    params.count = count;
    for (unsigned i = 0; i < count; ++i) {
      params.clients[i] = client;
      params.channels[i] = first_channel + i;
    }
    return control(subdevice, abi::cmd_disable_channels, &params, sizeof params);
  }
  std::uint64_t heap_free() {
    abi::FbInfo info{};
    info.count = 1;
    info.list[0].index = abi::fb_heap_free;
    EXPECT_EQ(control(subdevice, abi::cmd_fb_get_info_v2, &info, sizeof info), 0U);
    return std::uint64_t{info.list[0].data} << 10U;
  }
  // Keeps the group busy: `jobs` of `ns` each.
  void work(std::uint64_t ns, unsigned jobs = 1000) {
    for (unsigned i = 0; i < jobs; ++i) {
      if (!driver.submit({client, group}, ns).ok()) return;
    }
  }
  Progress progress() {
    const auto progress = driver.progress({client, group});
    EXPECT_TRUE(progress.ok());
    return progress.ok() ? *progress : Progress{};
  }
};

// Every list, count and sum of the page against every other; nothing when it is sound.
std::string unsound(const fs::path& twin) {
  auto opened = Store::open(twin / "rm.bin");
  if (!opened.ok()) return opened.error().message();
  Store& store = **opened;
  const Store::Lock lock(store);
  const Page& page = store.page();
  if (page.journal.bytes != 0) return "a step is half done";
  std::string wrong;
  const auto check = [&](bool fine, const char* what) {
    if (!fine && wrong.empty()) wrong = what;
  };
  const auto free_list = [&](const auto& table, const FreeList& list) {
    std::size_t used = 0, vacant = 0;
    for (Index at = 1; at <= list.used; ++at) used += table[at].used;
    for (Index at = list.head; at != 0 && vacant <= list.used; at = table[at].link, ++vacant)
      check(table[at].used == 0, "a free element is in use");
    check(used + vacant == list.used, "an element is neither used nor free");
  };
  free_list(page.files, page.counters.files);
  free_list(page.clients, page.counters.clients);
  free_list(page.objects, page.counters.objects);
  free_list(page.memory, page.counters.memory);
  free_list(page.exports, page.counters.exports);
  free_list(page.charges, page.counters.charges);
  free_list(page.groups, page.counters.groups);
  std::map<Index, std::uint32_t> channels, disabled, holders, exports, groups_of;
  std::map<Index, std::uint64_t> charged;
  std::uint64_t bytes[max_gpus] = {};
  std::size_t objects = 0, hashed = 0;
  for (Index at = 1; at <= page.counters.objects.used; ++at) {
    const Object& object = page.objects[at];
    if (object.used == 0) continue;
    ++objects;
    check(page.clients[object.client].used != 0, "an object of no client");
    if (object.parent == 0) check(page.clients[object.client].object == at, "a client is another object");
    if (object.parent != 0) check(page.objects[object.parent].used != 0, "an object below nothing");
    Index before = 0;
    for (Index child = object.first_child; child != 0; child = page.objects[child].next_sibling) {
      check(page.objects[child].used != 0 && page.objects[child].parent == at &&
                page.objects[child].previous_sibling == before,
            "a list of children is torn");
      before = child;
    }
    if (object.memory != 0) ++holders[object.memory];
    if (abi::is_channel(object.cls)) {
      ++channels[object.group];
      if (object.disables > 0) ++disabled[object.group];
    } else if (object.group != 0) {
      check(page.groups[object.group].object == at, "a group of another object");
    }
  }
  for (const Index bucket : page.hash) {
    for (Index at = bucket; at != 0; at = page.objects[at].hash_next, ++hashed)
      check(page.objects[at].used != 0, "a name of no object");
  }
  check(objects == hashed, "an object without a name");
  for (Index at = 1; at <= page.counters.exports.used; ++at) {
    if (page.exports[at].used != 0) ++exports[page.exports[at].memory];
  }
  for (Index at = 1; at <= page.counters.memory.used; ++at) {
    const Memory& memory = page.memory[at];
    if (memory.used == 0) continue;
    std::uint32_t held = 0;
    for (Index o = memory.first_holder; o != 0; o = page.objects[o].next_holder, ++held)
      check(page.objects[o].memory == at, "a holder of other memory");
    check(held == holders[at] && memory.exports == exports[at] && held + memory.exports > 0, "memory nobody holds");
    check((memory.charge != 0) == (held != 0), "memory that is charged to nobody");
    charged[memory.charge] += memory.bytes;
    bytes[memory.gpu] += memory.bytes;
  }
  for (std::size_t g = 0; g < max_gpus; ++g) {
    const Gpu& gpu = page.gpus[g];
    check(gpu.memory_bytes == bytes[g], "a GPU's bytes do not add up");
    Index before = 0;
    bool loaded = gpu.loaded == 0, turn = gpu.turn == 0;
    for (Index at = gpu.first; at != 0; at = page.groups[at].next) {
      check(page.groups[at].used != 0 && page.groups[at].previous == before, "a runlist is torn");
      loaded |= gpu.loaded == at;
      turn |= gpu.turn == at;
      before = at;
    }
    check(gpu.last == before && loaded && turn, "a GPU runs what is not there");
  }
  for (Index at = 1; at <= page.counters.groups.used; ++at) {
    const Group& group = page.groups[at];
    if (group.used == 0) continue;
    ++groups_of[group.charge];
    check(page.objects[group.object].group == at, "an object of another group");
    check(group.channels == channels[at] && group.disabled == disabled[at], "a group's channels do not add up");
    check(group.completed <= group.submitted && (group.head_left_ns > 0) == (group.completed < group.submitted),
          "a queue is torn");
  }
  for (Index at = 1; at <= page.counters.charges.used; ++at) {
    const Charge& charge = page.charges[at];
    if (charge.used == 0) continue;
    check(charge.bytes == charged[at] && charge.groups == groups_of[at], "a process's bytes do not add up");
  }
  return wrong;
}

void Rm::TearDown() {
  if (driver_) {
    EXPECT_EQ(unsound(twin_), "");
  }
  fs::remove_all(twin_);
}

class Scheduling : public Rm {
 protected:
  Tenant& tenant(std::uint64_t slice_us = 0, std::uint32_t gpu = 0) {
    tenants_.push_back(std::make_unique<Tenant>(Tenant{*driver_, open_file()}));
    Tenant& made = *tenants_.back();
    EXPECT_EQ(made.begin(gpu), 0U);
    EXPECT_EQ(made.add_group(), 0U);
    if (slice_us != 0) {
      EXPECT_EQ(made.set_slice(slice_us), 0U);
    }
    return made;
  }
  // GPU time of each over `ns` from now.
  std::vector<double> run(std::uint64_t ns, std::uint64_t stride = 0) {
    std::vector<std::uint64_t> before;
    for (auto& t : tenants_) before.push_back(t->progress().busy_ns);
    for (std::uint64_t done = 0; done < ns; done += stride == 0 ? ns : stride) {
      step(stride == 0 ? ns : stride);
      if (stride != 0) {
        EXPECT_TRUE(driver_->follow().ok());
      }
    }
    std::vector<double> out;
    for (std::size_t i = 0; i < tenants_.size(); ++i)
      out.push_back(static_cast<double>(tenants_[i]->progress().busy_ns - before[i]) / static_cast<double>(ns));
    return out;
  }
  std::vector<std::unique_ptr<Tenant>> tenants_;
};

TEST_F(Scheduling, AloneAGroupHasTheWholeGpuWhateverItsSlice) {
  tenant(50).work(20 * ms);
  EXPECT_DOUBLE_EQ(run(10 * second)[0], 1.0);
}

TEST_F(Scheduling, SharesFollowTheSlices) {
  for (const auto& slices : {std::vector<std::uint64_t>{3000, 1000}, {28000, 12000}, {2000, 4000, 6000, 8000},
                             {5000, 5000, 5000}, {1000, 1000, 2000, 4000, 8000}}) {
    tenants_.clear();
    ASSERT_TRUE(driver_->follow().ok());
    std::uint64_t round = 0;
    for (const auto slice : slices) {
      tenant(slice).work(100 * ms);
      round += slice;
    }
    const auto shares = run(20 * second);
    double sum = 0;
    for (const double share : shares) sum += share;
    for (std::size_t i = 0; i < slices.size(); ++i)
      EXPECT_NEAR(shares[i] / sum, static_cast<double>(slices[i]) / static_cast<double>(round), 0.01);
    // Each turn costs a switch of 200 us.
    const double turns = static_cast<double>(slices.size()) * 0.2;
    EXPECT_NEAR(sum, static_cast<double>(round) / 1000 / (static_cast<double>(round) / 1000 + turns), 0.01);
  }
}

TEST_F(Scheduling, ALongTimeInOneStepIsTheSameAsManySmallOnes) {
  const auto both = [&](std::uint64_t stride) {
    tenants_.clear();
    EXPECT_TRUE(driver_->follow().ok());
    tenant(700).work(1700 * us);
    tenant(150).work(40 * ms, 100);
    tenant(9000).work(333 * us, 900);
    std::vector<std::uint64_t> out;
    const std::uint64_t begin = tenants_[0]->progress().now_ns;
    run(2 * second, stride);
    for (auto& t : tenants_) {
      const auto p = t->progress();
      out.push_back(p.busy_ns);
      out.push_back(p.completed);
      out.push_back(p.last_done_ns - begin);
    }
    return out;
  };
  const auto whole = both(0);
  EXPECT_EQ(whole, both(2 * ms));
  EXPECT_EQ(whole, both(125 * us));
}

TEST_F(Scheduling, SlicesBelowTheSwitchTimeStopEverybodyAmongSeveral) {
  for (int i = 0; i < 3; ++i) tenant(50).work(100 * ms);
  for (const double share : run(10 * second)) EXPECT_EQ(share, 0);
  // As measured: two at 200 us get 40 to 47 % in sum, at 500 us 73 to 80 %.
  tenants_.pop_back();
  for (auto& t : tenants_) t->set_slice(200);
  ASSERT_TRUE(driver_->follow().ok());
  const auto shares = run(10 * second);
  EXPECT_NEAR(shares[0] + shares[1], 0.5, 0.01);
}

TEST_F(Scheduling, WhatOneLeavesTheOtherGets) {
  tenant(2000).work(100 * ms);
  Tenant& short_one = tenant(100'000);
  // An interactive tenant: 1 ms of work every 10 ms, in front of a 50 us slice.
  tenants_[0]->set_slice(50);
  std::uint64_t worst = 0;
  double share = 0;
  for (int i = 0; i < 100; ++i) {
    const std::uint64_t asked = short_one.progress().now_ns;
    const auto ticket = driver_->submit({short_one.client, Tenant::group}, 1 * ms);
    ASSERT_TRUE(ticket.ok());
    share += run(10 * ms)[0] / 100;
    const auto done = driver_->finished_at_ns({short_one.client, Tenant::group}, *ticket);
    ASSERT_TRUE(done.ok());
    worst = std::max(worst, *done - asked);
  }
  EXPECT_LE(worst, 1 * ms + 50 * us + switch_ns);
  EXPECT_GT(share, 0.86);
}

TEST_F(Scheduling, DisabledGroupsDoNotRunAndDisablesNest) {
  tenant(2000).work(100 * ms);
  tenant(2000).work(100 * ms);
  run(100 * ms);
  Tenant& t = *tenants_[0];
  ASSERT_EQ(t.switch_channels(false), 0U);
  ASSERT_EQ(t.switch_channels(false), 0U);
  EXPECT_FALSE(t.progress().on);
  auto shares = run(1 * second);
  EXPECT_EQ(shares[0], 0);
  EXPECT_GT(shares[1], 0.999);  // at most 0.4 ms went by taking the other off
  ASSERT_EQ(t.switch_channels(true), 0U);
  EXPECT_EQ(run(1 * second)[0], 0);
  ASSERT_EQ(t.switch_channels(true), 0U);
  EXPECT_TRUE(t.progress().on);
  ASSERT_EQ(t.switch_channels(true), 0U);  // one too many does nothing
  EXPECT_NEAR(run(1 * second)[0], 0.4545, 0.01);
  ASSERT_EQ(t.switch_channels(false), 0U);
  EXPECT_EQ(run(1 * second)[0], 0);
  // A group is off when all of its channels are.
  ASSERT_EQ(t.switch_channels(true, 1), 0U);
  EXPECT_NEAR(run(1 * second)[0], 0.4545, 0.01);
}

TEST_F(Scheduling, TakingARunningGroupOffCostsTheGpuFourTenthsOfAMillisecond) {
  Tenant& a = tenant(2000);
  a.work(100 * ms);
  run(10 * ms);
  ASSERT_EQ(a.switch_channels(false), 0U);
  Tenant& b = tenant(2000);
  b.work(100 * ms);
  EXPECT_DOUBLE_EQ(run(10 * ms)[1], 0.96);
  // Idle or not on the GPU: nothing.
  ASSERT_EQ(a.switch_channels(true), 0U);
  ASSERT_EQ(a.switch_channels(false), 0U);
  EXPECT_DOUBLE_EQ(run(10 * ms)[1], 1.0);
}

TEST_F(Scheduling, TurnsByDisablingLoseLittle) {
  for (int i = 0; i < 3; ++i) {
    tenant(50).work(100 * ms);
    ASSERT_EQ(tenants_.back()->switch_channels(false), 0U);
  }
  std::vector<double> got(3);
  for (int turn = 0; turn < 150; ++turn) {
    auto& t = *tenants_[static_cast<std::size_t>(turn % 3)];
    ASSERT_EQ(t.switch_channels(true), 0U);
    const auto shares = run(20 * ms);
    for (std::size_t i = 0; i < 3; ++i) got[i] += shares[i] / 150;
    ASSERT_EQ(t.switch_channels(false), 0U);
  }
  for (const double share : got) EXPECT_NEAR(share, 0.327, 0.003);
}

TEST_F(Scheduling, SlicesSetBeforeSchedulingAreLost) {
  Tenant t{*driver_, open_file()};
  ASSERT_EQ(t.begin(), 0U);
  abi::GroupParams params{};
  params.engine = abi::engine_compute;
  ASSERT_EQ(t.alloc(Tenant::device, Tenant::group, abi::class_channel_group, &params), 0U);
  EXPECT_EQ(t.slice(), 1024U);
  EXPECT_EQ(t.set_slice(7000), 0U);
  std::uint8_t schedule[3] = {1, 0, 0};
  EXPECT_EQ(t.control(Tenant::group, abi::cmd_group_schedule, schedule, sizeof schedule), 0U);
  EXPECT_EQ(t.slice(), 2048U);
  EXPECT_EQ(t.set_slice(7000), 0U);
  EXPECT_EQ(t.control(Tenant::group, abi::cmd_group_schedule, schedule, sizeof schedule), 0U);
  EXPECT_EQ(t.slice(), 7000U);
  ASSERT_EQ(t.add_group(0x5c00003e, 0x5c000040, 1, 0xb), 0U);
  EXPECT_EQ(t.set_slice(7000, 0x5c00003e), abi::err_not_supported);
  std::uint32_t level = 2;
  EXPECT_EQ(t.control(Tenant::group, abi::cmd_group_set_interleave, &level, sizeof level), 0U);
}

TEST_F(Scheduling, ADriverMayBeMadeToIgnoreSlicesAndDisables) {
  tenant(3000).work(100 * ms);
  tenant(1000).work(100 * ms);
  plant(FaultKind::ignores_slices);
  ASSERT_TRUE(driver_->follow().ok());
  run(50 * ms);
  auto shares = run(5 * second);
  EXPECT_NEAR(shares[0] / shares[1], 1, 0.02);
  EXPECT_EQ(tenants_[0]->slice(), 3000U);
  plant(FaultKind::ignores_disable);
  ASSERT_EQ(tenants_[0]->switch_channels(false), 0U);
  shares = run(5 * second);
  EXPECT_NEAR(shares[0] / shares[1], 3, 0.05);
  plant(FaultKind::nothing);
  ASSERT_TRUE(driver_->follow().ok());
  EXPECT_EQ(run(1 * second)[0], 0);
}

TEST_F(Scheduling, GpusAreApartAndSoAreTheirTenants) {
  tenant(1000, 0).work(100 * ms);
  tenant(1000, 1).work(100 * ms);
  for (const double share : run(1 * second)) EXPECT_DOUBLE_EQ(share, 1.0);
}

TEST_F(Scheduling, AQueueIsBoundedAndTicketsTellWhenTheyEnd) {
  Tenant& t = tenant();
  const GroupName name{t.client, Tenant::group};
  for (std::size_t i = 1; i <= queue_depth; ++i) {
    const auto ticket = driver_->submit(name, 1 * ms);
    ASSERT_TRUE(ticket.ok());
    EXPECT_EQ(*ticket, i);
  }
  const auto refused = driver_->submit(name, 1 * ms);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code(), Errc::in_use);
  EXPECT_EQ(*driver_->at_least_ns(name, 3), 3 * ms);
  const std::uint64_t begin = t.progress().now_ns;
  step(2500 * us);
  EXPECT_EQ(*driver_->at_least_ns(name, 3), 500 * us);
  EXPECT_EQ(*driver_->at_least_ns(name, 2), 0U);
  EXPECT_EQ(*driver_->finished_at_ns(name, 2), begin + 2 * ms);
  EXPECT_EQ(driver_->finished_at_ns(name, 3).error().code(), Errc::in_use);
  EXPECT_TRUE(driver_->submit(name, 1 * ms).ok());
  EXPECT_EQ(driver_->finished_at_ns(name, 1).error().code(), Errc::gone);
  EXPECT_EQ(driver_->submit({t.client, 77}, 1).error().code(), Errc::not_found);
}

TEST_F(Scheduling, TheTwinSeesWhatShareOfTheGpuAProcessHad) {
  tenant(3000).work(100 * ms);
  EXPECT_EQ(row(self()).busy, 0);
  run(2 * second);
  EXPECT_DOUBLE_EQ(row(self()).busy, 1.0);
  run(200 * second);  // its work ends
  run(2 * second);
  EXPECT_EQ(row(self()).busy, 0);
}

// ---- objects

TEST_F(Rm, HandlesMustBeRightAndClientsBelongToTheirFile) {
  Tenant a{*driver_, open_file()}, b{*driver_, open_file()};
  ASSERT_EQ(a.begin(), 0U);
  ASSERT_EQ(b.begin(), 0U);
  EXPECT_EQ(a.client, 0xc1d00001U);
  EXPECT_EQ(b.client, 0xc1d00002U);
  ASSERT_EQ(a.add_group(), 0U);
  EXPECT_EQ(a.alloc(Tenant::device, Tenant::subdevice, abi::class_subdevice), abi::err_insert_duplicate_name);
  EXPECT_EQ(a.alloc(0x77, 0x78, abi::class_vaspace), abi::err_invalid_object_handle);
  EXPECT_EQ(a.free(0x77), abi::err_object_not_found);
  std::uint64_t slice_us = 0;
  EXPECT_EQ(a.control(0x77, abi::cmd_group_get_timeslice, &slice_us, 8), abi::err_object_not_found);
  Tenant thief{*driver_, open_file(), a.client};
  EXPECT_EQ(thief.control(Tenant::group, abi::cmd_group_get_timeslice, &slice_us, 8), abi::err_invalid_client);
  EXPECT_EQ(thief.free(a.client), abi::err_invalid_client);
  b.client = a.client;
  EXPECT_EQ(b.control(Tenant::group, abi::cmd_group_get_timeslice, &slice_us, 8), abi::err_invalid_client);
  std::uint32_t chosen = 0;
  EXPECT_EQ(a.alloc(Tenant::device, 0, abi::class_vaspace, nullptr, &chosen), 0U);
  EXPECT_NE(chosen, 0U);
  abi::DeviceParams params{};
  params.device = 2;
  EXPECT_EQ(a.alloc(a.client, 0x99, abi::class_device, &params), abi::err_invalid_argument);
}

TEST_F(Rm, TheOlderFormOfAllocWorks) {
  const UniqueFd file = open_file();
  abi::AllocOld call{};
  call.cls = abi::class_client;
  EXPECT_EQ(driver_->ioctl_on(file.get(), abi::request(abi::esc_alloc, sizeof call), &call), 0);
  EXPECT_EQ(call.status, 0U);
  EXPECT_EQ(call.handle, 0xc1d00001U);
}

TEST_F(Rm, BadRequestsAreAnsweredAsTheKernelWould) {
  const UniqueFd file = open_file();
  abi::Alloc call{};
  EXPECT_EQ(driver_->ioctl_on(file.get(), 0x5401, &call), -ENOTTY);
  EXPECT_EQ(driver_->ioctl_on(file.get(), abi::request(0x99, 16), &call), -ENOTTY);
  EXPECT_EQ(driver_->ioctl_on(file.get(), abi::request(abi::esc_alloc, 40), &call), -EINVAL);
  EXPECT_EQ(driver_->ioctl_on(file.get(), abi::request(abi::esc_alloc, 48), nullptr), -EFAULT);
  EXPECT_EQ(driver_->ioctl_on(file.get(), abi::request(abi::esc_alloc, 48), reinterpret_cast<void*>(16)), -EFAULT);
  call.cls = abi::class_device;
  call.params = 16;
  EXPECT_EQ(driver_->ioctl_on(file.get(), abi::request(abi::esc_alloc, 48), &call), -EFAULT);
  const UniqueFd reader(::open((twin_ / "root/dev/nvidiactl").c_str(), O_RDONLY | O_CLOEXEC));
  call.params = 0;
  EXPECT_EQ(driver_->ioctl_on(reader.get(), abi::request(abi::esc_alloc, 48), &call), -EBADF);
}

TEST_F(Rm, MemoryIsRoundedChargedAndRefusedWhenItIsOut) {
  Tenant t{*driver_, open_file()};
  ASSERT_EQ(t.begin(), 0U);
  EXPECT_EQ(t.heap_free(), 79 * GiB);
  std::uint64_t got = 0;
  ASSERT_EQ(t.add_memory(0x100, 3 * MiB, &got), 0U);
  EXPECT_EQ(got, 4 * MiB);
  EXPECT_EQ(row(self()).memory_bytes, 4 * MiB);
  EXPECT_EQ(t.heap_free(), 79 * GiB - 4 * MiB);
  EXPECT_EQ(t.add_memory(0x101, 0), abi::err_invalid_argument);
  EXPECT_EQ(t.add_memory(0x101, UINT64_MAX), abi::err_invalid_argument);
  EXPECT_EQ(t.add_memory(0x101, 79 * GiB), abi::err_no_memory);
  EXPECT_EQ(row(self()).memory_bytes, 4 * MiB);
  // What `twin attach` put there counts as well.
  state_->write([](State& s) {
    s.processes[100].used = 1;
    s.processes[100].pid = 4194305;
    s.processes[100].memory_bytes = 70 * GiB;
    return true;
  });
  EXPECT_EQ(t.add_memory(0x101, 10 * GiB), abi::err_no_memory);
  EXPECT_EQ(t.add_memory(0x101, 8 * GiB), 0U);
  EXPECT_EQ(t.free(0x101), 0U);
  EXPECT_EQ(t.free(0x100), 0U);
  EXPECT_EQ(row(self()).used, 0U);
  EXPECT_EQ(t.heap_free(), 9 * GiB);
}

TEST_F(Rm, FreeingAClientFreesEverythingBelowIt) {
  Tenant t{*driver_, open_file()};
  for (int round = 0; round < 3; ++round) {
    ASSERT_EQ(t.begin(), 0U);
    ASSERT_EQ(t.add_group(), 0U);
    for (std::uint32_t i = 0; i < 500; ++i) ASSERT_EQ(t.add_memory(0x1000 + i, 2 * MiB), 0U);
    EXPECT_EQ(row(self()).memory_bytes, 1000 * MiB);
    ASSERT_EQ(t.free(t.client), 0U);
    EXPECT_EQ(row(self()).used, 0U);
    EXPECT_EQ(driver_->progress({t.client, Tenant::group}).error().code(), Errc::not_found);
    t.client = 0;
  }
}

TEST_F(Rm, DuplicatesKeepMemoryAndAreChargedOnce) {
  Tenant t{*driver_, open_file()};
  ASSERT_EQ(t.begin(), 0U);
  ASSERT_EQ(t.add_memory(0x100, 64 * MiB), 0U);
  abi::Dup dup{t.client, Tenant::device, 0x200, t.client, 0x100, 0, 0};
  ASSERT_EQ(driver_->ioctl_on(t.file.get(), abi::request(abi::esc_dup_object, sizeof dup), &dup), 0);
  ASSERT_EQ(dup.status, 0U);
  EXPECT_EQ(row(self()).memory_bytes, 64 * MiB);
  EXPECT_EQ(t.free(0x100), 0U);
  EXPECT_EQ(row(self()).memory_bytes, 64 * MiB);
  EXPECT_EQ(t.free(0x200), 0U);
  EXPECT_EQ(row(self()).used, 0U);
}

TEST_F(Rm, ExportedMemoryLivesAsLongAsTheExportedFile) {
  Tenant t{*driver_, open_file()};
  ASSERT_EQ(t.begin(), 0U);
  ASSERT_EQ(t.add_memory(0x100, 64 * MiB), 0U);
  UniqueFd exported = open_file();
  abi::ExportObjects out{};
  out.fd = exported.get();
  out.max_objects = out.count = 1;
  out.objects[0] = 0x100;
  out.metadata[0] = 42;
  ASSERT_EQ(t.control(t.client, abi::cmd_export_objects_to_fd, &out, sizeof out), 0U);
  EXPECT_EQ(t.free(0x100), 0U);
  EXPECT_EQ(row(self()).used, 0U);  // in nobody's bytes
  EXPECT_EQ(t.heap_free(), 79 * GiB - 64 * MiB);
  ExportInfo info{};
  info.fd = exported.get();
  ASSERT_EQ(t.control(t.client, cmd_get_export_info, &info, sizeof info), 0U);
  EXPECT_EQ(info.metadata[0], 42);
  ImportObjects in{};
  in.fd = exported.get();
  in.parent = Tenant::device;
  in.count = 1;
  ASSERT_EQ(t.control(t.client, abi::cmd_import_objects_from_fd, &in, sizeof in), 0U);
  EXPECT_EQ(row(self()).memory_bytes, 64 * MiB);
  exported.reset();
  ASSERT_TRUE(driver_->follow().ok());
  EXPECT_EQ(t.heap_free(), 79 * GiB - 64 * MiB);
  EXPECT_EQ(t.free(in.objects[0]), 0U);
  EXPECT_EQ(t.heap_free(), 79 * GiB);
}

TEST_F(Rm, AnOpenFileLivesThroughDupAndForkUntilItsLastDescriptorIsClosed) {
  Tenant t{*driver_, open_file()};
  ASSERT_EQ(t.begin(), 0U);
  ASSERT_EQ(t.add_memory(0x100, 64 * MiB), 0U);
  int ends[2], back[2];
  ASSERT_EQ(::pipe(ends), 0);
  ASSERT_EQ(::pipe(back), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    char byte = 0;
    ::close(ends[1]);
    // The child speaks for the same client through the descriptor it was born with.
    const char ok = t.add_memory(0x101, 2 * MiB) == abi::ok ? 'y' : 'n';
    if (::write(back[1], &ok, 1) != 1) ::_exit(2);
    if (::read(ends[0], &byte, 1) < 0) ::_exit(2);
    ::_exit(0);
  }
  char ok = 0;
  ASSERT_EQ(::read(back[0], &ok, 1), 1);
  EXPECT_EQ(ok, 'y');
  EXPECT_EQ(row(self()).memory_bytes, 66 * MiB);
  UniqueFd twice(::dup(t.file.get()));
  t.file.reset();
  ASSERT_TRUE(driver_->follow().ok());
  EXPECT_EQ(row(self()).memory_bytes, 66 * MiB);
  t.file = std::move(twice);
  EXPECT_EQ(t.add_memory(0x102, 2 * MiB), 0U);
  t.file.reset();
  ASSERT_TRUE(driver_->follow().ok());
  EXPECT_EQ(row(self()).memory_bytes, 68 * MiB);  // the child has it still
  ::close(ends[1]);
  ::waitpid(child, nullptr, 0);
  ASSERT_TRUE(driver_->follow().ok());
  EXPECT_EQ(row(self()).used, 0U);
  for (const int fd : {ends[0], back[0], back[1]}) ::close(fd);
}

TEST_F(Rm, ABorrowedDescriptorSpeaksForItsOpener) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const auto driver = Driver::open(twin_);
    if (!driver.ok()) ::_exit(2);
    Tenant t{**driver, open_file()};
    if (t.begin() != 0 || t.add_group() != 0 || t.add_memory(0x100, 64 * MiB) != 0) ::_exit(2);
    const int said[2] = {t.file.get(), static_cast<int>(t.client)};
    if (::write(ends[1], said, sizeof said) < 0) ::_exit(2);
    for (;;) ::pause();
  }
  int said[2] = {};
  ASSERT_EQ(::read(ends[0], said, sizeof said), static_cast<ssize_t>(sizeof said));
  const UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, child, 0)));
  UniqueFd borrowed(static_cast<int>(::syscall(SYS_pidfd_getfd, process.get(), said[0], 0)));
  ASSERT_TRUE(borrowed) << std::strerror(errno);
  Tenant t{*driver_, std::move(borrowed), static_cast<std::uint32_t>(said[1])};
  EXPECT_EQ(t.set_slice(5000), 0U);
  EXPECT_EQ(t.slice(), 5000U);
  EXPECT_EQ(t.switch_channels(false), 0U);
  EXPECT_FALSE(t.progress().on);
  EXPECT_EQ(t.add_memory(0x101, 2 * MiB), 0U);  // on the tenant's behalf: the tenant's bytes
  const auto pid = static_cast<std::uint32_t>(child);
  EXPECT_EQ(row(pid).memory_bytes, 66 * MiB);
  EXPECT_EQ(row(self()).used, 0U);
  EXPECT_TRUE(fs::is_symlink(twin_ / "root/proc" / std::to_string(child)));
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  // As with the real driver, the borrowed descriptor keeps the file open.
  ASSERT_TRUE(driver_->follow().ok());
  EXPECT_EQ(row(pid).memory_bytes, 66 * MiB);
  t.file.reset();
  ASSERT_TRUE(driver_->follow().ok());
  EXPECT_EQ(row(pid).used, 0U);
  EXPECT_FALSE(fs::is_symlink(twin_ / "root/proc" / std::to_string(child)));
  for (const int fd : ends) ::close(fd);
}

TEST_F(Rm, AFileCannotBeMovedToAnothersNumber) {
  Tenant t{*driver_, open_file()};
  ASSERT_EQ(t.begin(), 0U);
  Tenant thief{*driver_, open_file(), t.client};
  ASSERT_GE(::lseek(thief.file.get(), ::lseek(t.file.get(), 0, SEEK_CUR), SEEK_SET), 0);
  EXPECT_EQ(thief.free(t.client), abi::err_invalid_client);
  EXPECT_EQ(t.add_memory(0x100, 2 * MiB), 0U);
}

// Processes die at random instructions of every kind of call while others go on; nothing may be lost, left or stuck.
TEST_F(Rm, ProcessesKilledAtAnyInstructionLeaveNothingAndHarmNobody) {
  Tenant survivor{*driver_, open_file()};
  ASSERT_EQ(survivor.begin(), 0U);
  ASSERT_EQ(survivor.add_group(), 0U);
  ASSERT_EQ(survivor.add_memory(0x100, 10 * MiB), 0U);
  std::mt19937 random(7);
  for (int round = 0; round < 150; ++round) {
    std::vector<pid_t> children;
    for (int c = 0; c < 2; ++c) {
      const pid_t child = ::fork();
      if (child == 0) {
        const auto driver = Driver::open(twin_);
        if (!driver.ok()) ::_exit(2);
        for (std::uint32_t i = 0;; ++i) {
          Tenant t{**driver, open_file()};
          if (t.begin() != 0 || t.add_group() != 0) ::_exit(3);
          for (std::uint32_t m = 0; m < 10; ++m) {
            if (t.add_memory(0x100 + m, 2 * MiB) != 0) ::_exit(3);
          }
          t.work(1 * ms, 20);
          t.switch_channels(i % 2 == 0);
          t.set_slice(1000 + i);
          if (t.free(0x104) != 0) ::_exit(3);
          if (i % 3 == 0 && t.free(t.client) != 0) ::_exit(3);
        }
      }
      children.push_back(child);
    }
    ::usleep(static_cast<unsigned>(random() % 3000));
    EXPECT_EQ(survivor.add_memory(0x101, 2 * MiB), 0U);
    survivor.work(1 * ms, 3);
    step(20 * ms);
    EXPECT_EQ(survivor.free(0x101), 0U);
    for (const pid_t child : children) {
      ::kill(child, SIGKILL);
      int status = 0;
      ::waitpid(child, &status, 0);
      EXPECT_TRUE(WIFSIGNALED(status)) << "exit " << WEXITSTATUS(status);
    }
    step(20 * ms);
    ASSERT_EQ(unsound(twin_), "");
    ASSERT_TRUE(driver_->follow().ok());
    ASSERT_EQ(unsound(twin_), "");
    EXPECT_EQ(survivor.heap_free(), 79 * GiB - 10 * MiB);
    unsigned rows = 0;
    state_->read([&](const State& s) {
      for (const Process& p : s.processes) rows += p.used;
    });
    EXPECT_EQ(rows, 1U);
  }
  step(10 * second);
  const auto end = survivor.progress();
  EXPECT_EQ(end.completed, 450U);
  EXPECT_EQ(end.busy_ns, 450 * ms);
}

// The same by single steps: each kind of call, killed after its first, its second, ... instruction in strides.
TEST_F(Rm, EveryCallMayBeCutOffAtAnyOfItsInstructions) {
  const std::vector<std::function<void(Tenant&)>> calls = {
      [](Tenant& t) { t.begin(1); },
      [](Tenant& t) { t.add_group(0x5c00003e, 0x5c000040, 1); },
      [](Tenant& t) { t.add_memory(0x300, 6 * MiB); },
      [](Tenant& t) { t.free(0x101); },
      [](Tenant& t) { t.free(t.client); },
      [](Tenant& t) { t.switch_channels(false); },
      [](Tenant& t) { static_cast<void>(t.driver.submit({t.client, Tenant::group}, 3 * ms)); },
      [](Tenant& t) {
        abi::Dup dup{t.client, Tenant::device, 0x200, t.client, 0x100, 0, 0};
        t.driver.ioctl_on(t.file.get(), abi::request(abi::esc_dup_object, sizeof dup), &dup);
      },
  };
  std::mt19937 random(11);
  for (std::size_t round = 0; round < 4 * calls.size(); ++round) {
    const pid_t child = ::fork();
    if (child == 0) {
      const auto driver = Driver::open(twin_);
      if (!driver.ok()) ::_exit(2);
      Tenant t{**driver, open_file()};
      if (t.begin() != 0 || t.add_group() != 0 || t.add_memory(0x100, 2 * MiB) != 0 ||
          t.add_memory(0x101, 2 * MiB) != 0)
        ::_exit(3);
      t.work(1 * ms, 3);
      state_->write([](State& s) {
        s.now_ns += 1500 * us;
        return true;
      });
      if (::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) ::_exit(4);
      ::raise(SIGSTOP);
      calls[round % calls.size()](t);
      ::_exit(0);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 4) GTEST_SKIP() << "ptrace is forbidden here";
    ASSERT_TRUE(WIFSTOPPED(status)) << WEXITSTATUS(status);
    const unsigned long instructions = 500 + random() % 5500;
    for (unsigned long i = 0; i < instructions && WIFSTOPPED(status); ++i) {
      if (::ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) break;
      ::waitpid(child, &status, 0);
    }
    if (WIFSTOPPED(status)) {
      ::kill(child, SIGKILL);
      ::waitpid(child, &status, 0);
    }
    ASSERT_EQ(unsound(twin_), "") << "call " << round % calls.size() << " after " << instructions;
    ASSERT_TRUE(driver_->follow().ok());
    ASSERT_EQ(unsound(twin_), "") << "call " << round % calls.size() << " after " << instructions;
    unsigned rows = 0;
    state_->read([&](const State& s) {
      for (const Process& p : s.processes) rows += p.used;
    });
    ASSERT_EQ(rows, 0U);
  }
}

}  // namespace
}  // namespace bulkhead::twin::rm
