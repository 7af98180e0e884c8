#include "core/plan/plan.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "core/mig/models_for_tests.hpp"

namespace bulkhead::plan {
namespace {

using inventory::Gpu;
using inventory::GpuInstance;
using inventory::Holder;
using inventory::Host;

Gpu h100(unsigned index) {
  Gpu gpu;
  gpu.index = index;
  gpu.uuid = {"GPU-h100-" + std::to_string(index)};
  gpu.model = "NVIDIA H100 80GB HBM3";
  gpu.pci.address = {0, static_cast<std::uint8_t>(0x10 + index), 0, 0};
  gpu.pci.vendor = 0x10de;
  gpu.pci.device = 0x2330;
  gpu.persistence = false;
  gpu.power = {watts(100), watts(700), watts(700), watts(200), watts(700)};
  gpu.clocks_max = inventory::Clocks{Megahertz(1980), Megahertz(1980), Megahertz(2619)};
  gpu.compute_capability = std::string("9.0");
  gpu.virtualization = std::string("none");
  gpu.nvlink.links = 18;
  gpu.mig_capable = true;
  gpu.geometry = mig::h100();
  return gpu;
}
Gpu l40s(unsigned index) {
  Gpu gpu = h100(index);
  gpu.uuid = {"GPU-l40s-" + std::to_string(index)};
  gpu.model = "NVIDIA L40S";
  gpu.pci.device = 0x26b9;
  gpu.pci.vfs_total = 32U;
  gpu.mig_capable = false;
  gpu.mig_why = "Not Supported";
  gpu.geometry = {};
  gpu.nvlink.links = 0;
  return gpu;
}

unsigned compute_enum(unsigned slices) {
  return slices == 7 ? 4 : slices == 6 ? 6 : slices == 8 ? 5 : slices - 1;
}
unsigned compute_count(unsigned id) { return id == 4 ? 7 : id == 5 ? 8 : id == 6 ? 6 : id == 7 ? 1 : id + 1; }

GpuInstance instance(const Gpu& gpu, unsigned id, unsigned profile_id, unsigned start, bool ours = true) {
  const auto& p = *gpu.geometry.by_id(profile_id);
  GpuInstance out;
  out.id = id;
  out.profile = profile_id;
  out.name = p.name;
  out.place = {start, p.size};
  out.compute = {{0, compute_enum(p.compute_slices), {0, p.compute_slices}}};
  out.ours = ours;
  return out;
}
Holder holder(int pid) { return {pid, static_cast<std::uint64_t>(pid) * 10, "python3", "/tenant-a"}; }

Host host_of(std::vector<Gpu> gpus) {
  Host host;
  host.os = std::string("Debian GNU/Linux 12");
  host.os_id = std::string("debian");
  host.cpu_governor = std::string("schedutil");
  host.kernel_cmdline = std::string("BOOT_IMAGE=/vmlinuz root=/dev/sda1 quiet");
  host.units = {{"nvidia-fabricmanager.service", "loaded", "inactive", "dead", "disabled"}};
  host.gpus = std::move(gpus);
  return host;
}

spec::NodeFile node_of(const std::string& rules, const std::string& host = "") {
  auto parsed =
      spec::parse("apiVersion: bulkhead/v1\nkind: Node\n" + (rules.empty() ? "" : "gpus:\n" + rules) + host);
  if (const auto* mistakes = std::get_if<std::vector<spec::Mistake>>(&parsed))
    ADD_FAILURE() << spec::render(*mistakes, "test");
  return std::holds_alternative<spec::NodeFile>(parsed) ? std::get<spec::NodeFile>(parsed) : spec::NodeFile{};
}

// ---- a machine that does what the steps say, and refuses what a driver refuses
struct Machine {
  Host host;
  Remembered remembered;

  Gpu& gpu(const Uuid& uuid) {
    const auto at =
        std::find_if(host.gpus.begin(), host.gpus.end(), [&](const Gpu& g) { return g.uuid == uuid; });
    EXPECT_NE(at, host.gpus.end());
    return *at;
  }
  void end(const Holder& victim) {
    const auto is = [&](const Holder& h) { return h.pid == victim.pid && h.start_time == victim.start_time; };
    for (auto& g : host.gpus) {
      std::erase_if(g.holders, is);
      for (auto& i : g.instances) {
        for (auto& c : i.compute) std::erase_if(c.holders, is);
      }
    }
  }
  void run(const Step& step) {
    for (const auto& victim : step.evicts) end(victim);
    std::visit([this](const auto& a) { act(a); }, step.action);
  }
  void undo(const Action& action) {
    std::visit([this](const auto& a) { act(a); }, undo_of(action));
  }

  void act(const SetPersistence& a) {
    ASSERT_EQ(gpu(a.gpu).persistence.value_or(!a.before), a.before);
    gpu(a.gpu).persistence = a.after;
  }
  void act(const SetMigMode& a) {
    Gpu& g = gpu(a.gpu);
    ASSERT_FALSE(g.busy()) << "MIG mode on a busy GPU";
    ASSERT_TRUE(g.instances.empty()) << "MIG mode with instances";
    g.mig_now = g.mig_pending = a.after;
  }
  void act(const DestroyInstance& a) {
    Gpu& g = gpu(a.gpu);
    const auto at = std::find_if(g.instances.begin(), g.instances.end(), [&](const GpuInstance& i) {
      return i.place == a.place && i.profile == a.profile_id;
    });
    ASSERT_NE(at, g.instances.end());
    ASSERT_FALSE(at->busy()) << "destroying a busy instance";
    g.instances.erase(at);
  }
  void act(const CreateInstance& a) {
    Gpu& g = gpu(a.gpu);
    ASSERT_TRUE(g.mig_now);
    std::vector<mig::NewInstance> all = {{a.profile_id, a.place}};
    std::set<unsigned> ids;
    for (const auto& i : g.instances) {
      all.push_back({i.profile, i.place});
      ids.insert(i.id);
    }
    ASSERT_TRUE(mig::legal(g.geometry, all));
    unsigned id = 1;
    while (ids.contains(id)) ++id;
    GpuInstance made = instance(g, id, a.profile_id, a.place.start);
    if (!a.compute_slices.empty()) {
      made.compute.clear();
      for (const auto slices : a.compute_slices)
        made.compute.push_back({static_cast<unsigned>(made.compute.size()), compute_enum(slices), {}});
    }
    g.instances.push_back(made);
  }
  void act(const CreateCompute& a) {
    for (auto& i : gpu(a.gpu).instances) {
      if (i.id != a.gpu_instance) continue;
      ASSERT_EQ(i.compute.empty(), !a.remove);
      const unsigned slices = gpu(a.gpu).geometry.by_id(i.profile)->compute_slices;
      i.compute.clear();
      if (!a.remove) i.compute = {{0, compute_enum(slices), {0, slices}}};
      return;
    }
    FAIL() << "no such GPU instance";
  }
  void act(const SetPowerLimit& a) {
    ASSERT_EQ(*gpu(a.gpu).power.limit, a.before);
    gpu(a.gpu).power.limit = a.after;
  }
  void act(const LockClocks& a) {
    auto& locks = remembered.clock_locks;
    std::erase_if(locks, [&](const auto& l) { return l.gpu == a.gpu; });
    if (a.after) locks.push_back({a.gpu, *a.after});
  }
  void act(const SetGovernor& a) { host.cpu_governor = a.after; }
  void act(const SetUnit& a) {
    for (auto& u : host.units) {
      if (u.name != a.unit) continue;
      u.file_state = a.enabled_after ? "enabled" : "disabled";
      u.active_state = a.active_after ? "active" : "inactive";
    }
  }
  // This machine's wishes name no PCI device: tests/lab has those, on a kernel.
  template <class Deed>
  void unasked(const Deed& a) {
    ADD_FAILURE() << describe(Action(a));
  }
  void act(const LoadModules& a) { unasked(a); }
  void act(const SetVirtualFunctions& a) { unasked(a); }
  void act(const SetDriver& a) { unasked(a); }
  void act(const SetPermission& a) { unasked(a); }
  void act(const Prove& a) { unasked(a); }

  void act(const SetFile& a) {
    for (auto& f : remembered.files) {
      if (f.path != a.path) continue;
      ASSERT_EQ(f.content, a.before);
      f.content = a.after;
      return;
    }
    remembered.files.push_back({a.path, a.after});
  }

  // All that a plan can change, in a form to compare. A GPU instance without compute instances reads as
  // filled.
  std::string state() const {
    Json out = Json::array();
    for (const auto& g : host.gpus) {
      std::set<std::string> instances;
      for (const auto& i : g.instances) {
        std::vector<unsigned> slices;
        for (const auto& c : i.compute) slices.push_back(compute_count(c.profile));
        if (slices.empty()) slices = {g.geometry.by_id(i.profile)->compute_slices};
        std::sort(slices.begin(), slices.end());
        instances.insert(Json{i.profile, i.place.start, slices}.dump());
      }
      out.push_back(Json{g.mig_now, instances, g.persistence.value_or(false),
                         g.power.limit ? g.power.limit->count : 0});
    }
    out.push_back(host.cpu_governor.value_or(""));
    for (const auto& u : host.units)
      out.push_back(Json{u.name, u.file_state == "enabled", u.active_state == "active"});
    for (const auto& f : remembered.files) out.push_back(f.content ? Json(*f.content) : Json(nullptr));
    std::map<std::string, unsigned> locks;
    for (const auto& l : remembered.clock_locks) locks[l.gpu.text] = l.range.low.count;
    out.push_back(locks);
    return out.dump();
  }
};

std::string words(const std::variant<Plan, Refusal>& answer, const Host& host) {
  return dump(std::holds_alternative<Plan>(answer) ? to_json(std::get<Plan>(answer), host)
                                                   : to_json(std::get<Refusal>(answer)));
}
Plan planned(const spec::NodeFile& node, const Host& host, const Remembered& remembered = {},
             const Options& options = {}) {
  auto answer = make(node, host, remembered, options);
  if (!std::holds_alternative<Plan>(answer)) {
    ADD_FAILURE() << words(answer, host);
    return {};
  }
  return std::get<Plan>(std::move(answer));
}
Refusal refused(const spec::NodeFile& node, const Host& host, const Remembered& remembered = {},
                const Options& options = {}) {
  auto answer = make(node, host, remembered, options);
  if (!std::holds_alternative<Refusal>(answer)) {
    ADD_FAILURE() << words(answer, host);
    return {};
  }
  return std::get<Refusal>(std::move(answer));
}
std::vector<std::string> lines(const Plan& plan, const Host& host) {
  std::vector<std::string> out;
  for (const auto& step : plan.steps) out.push_back(describe(step.action, &host));
  return out;
}
using Lines = std::vector<std::string>;
bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }
bool noted(const Plan& plan, const std::string& part) {
  return std::any_of(plan.notes.begin(), plan.notes.end(),
                     [&](const std::string& n) { return has(n, part); });
}

// ---- the order and the words
TEST(Plan, GoesFromHostToGpuAndFromModeToLayout) {
  const Host host = host_of({h100(0), h100(1)});
  const auto node = node_of(
      "  - select: {index: 0}\n    mode: mig\n    layout: [3g.40gb, {profile: 2g.20gb, compute: [1c, 1c]}]\n "
      "   persistence: true\n"
      "    power_limit_w: 500\n    clocks: {lock_mhz: [1200, 1500]}\n",
      "host:\n  kernel_args: [intel_iommu=on, quiet]\n  cpu_governor: performance\n  fabric_manager: {port: "
      "5555}\n"
      "  modprobe: [{name: vfio.conf, lines: [options a b=1]}]\n");
  const auto plan = planned(node, host);
  EXPECT_EQ(
      lines(plan, host),
      (Lines{"host: write /etc/default/grub.d/bulkhead.cfg, then update-grub",
             "host: write /etc/modprobe.d/vfio.conf, then update-initramfs -u",
             "host: cpu governor performance (was schedutil)",
             "host: enable and start nvidia-fabricmanager.service", "gpu 0: persistence mode on",
             "gpu 0: MIG mode on", "gpu 0: create 3g.40gb at 0-3", "gpu 0: create 2g.20gb at 4-5 with 1c, 1c",
             "gpu 0: power limit 500 W (was 700 W)", "gpu 0: lock clocks to 1200-1500 MHz"}));
  EXPECT_TRUE(plan.reboot_owed());
  EXPECT_TRUE(noted(plan, "gpu 1: no rule selects it"));
  EXPECT_TRUE(noted(plan, "gpu 0: under MIG it has no NVLink"));
  for (const auto& step : plan.steps) EXPECT_FALSE(step.why.empty());
  EXPECT_EQ(std::get<SetFile>(plan.steps[0].action).after,
            "# Written by bulkhead from the node file; the next apply replaces it.\n"
            "GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT intel_iommu=on\"\n");
  const Json json = to_json(plan, host);
  EXPECT_EQ(json["steps"][5]["undo"]["step"], "gpu 0: MIG mode off");
  EXPECT_EQ(json["reboot_owed"], true);
}

TEST(Plan, ChangesOneInstanceAndLeavesTheBusyOneAlone) {
  Gpu gpu = h100(0);
  gpu.mig_now = gpu.mig_pending = true;
  gpu.instances = {instance(gpu, 2, 9, 4), instance(gpu, 3, 14, 0), instance(gpu, 9, 19, 2),
                   instance(gpu, 10, 19, 3)};
  gpu.instances[0].compute[0].holders = {holder(4711)};
  const Host host = host_of({gpu});
  const auto plan = planned(
      node_of("  - select: {all: true}\n    mode: mig\n    layout: [3g.40gb, 1g.20gb, 1g.10gb, 1g.10gb]\n"),
      host);
  EXPECT_EQ(lines(plan, host), (Lines{"gpu 0: destroy 2g.20gb at 0-1", "gpu 0: create 1g.20gb at 0-1"}));
  EXPECT_TRUE(noted(plan, "gpu 0: 3 instances stay untouched"));
}

TEST(Plan, RefusesBusyInstancesWithTheirHoldersAndTakesThemWithEvict) {
  Gpu gpu = h100(3);
  gpu.mig_now = gpu.mig_pending = true;
  gpu.instances = {instance(gpu, 1, 9, 0), instance(gpu, 7, 19, 4)};
  gpu.instances[0].compute[0].holders = {holder(4711)};
  const Host host = host_of({gpu});
  const auto node = node_of("  - select: {index: 3}\n    mode: mig\n    layout: [4g.40gb]\n");
  const auto no = refused(node, host);
  ASSERT_EQ(no.reasons.size(), 1U);
  EXPECT_EQ(no.reasons[0].subject, "gpu 3 (GPU-h100-3)");
  EXPECT_TRUE(has(no.reasons[0].why, "3g.40gb (gi 1) at 0-3 stays; held by pid 4711 (python3)"))
      << no.reasons[0].why;
  EXPECT_TRUE(has(no.reasons[0].way_out, "--evict")) << no.reasons[0].way_out;
  EXPECT_FALSE(has(no.reasons[0].way_out, "--adopt"));
  ASSERT_EQ(no.reasons[0].holders.size(), 1U);
  EXPECT_EQ(to_json(no)["reasons"][0]["holders"][0]["pid"], 4711);
  const auto plan = planned(node, host, {}, {.evict = true});
  ASSERT_EQ(plan.steps.size(), 3U);
  ASSERT_EQ(plan.steps[0].losses.size(), 1U);
  EXPECT_EQ(plan.steps[0].losses[0].who, "pid 4711 (python3), cgroup /tenant-a");
  EXPECT_EQ(plan.steps[0].losses[0].what, "its MIG device 3g.40gb (gi 1)");
  EXPECT_EQ(plan.steps[0].evicts.size(), 1U);
}

TEST(Plan, LeavesForeignInstancesAloneUnlessAdopted) {
  Gpu gpu = h100(0);
  gpu.mig_now = gpu.mig_pending = true;
  gpu.instances = {instance(gpu, 1, 9, 0, false)};
  gpu.instances[0].compute.clear();
  const Host host = host_of({gpu});
  const auto node = node_of("  - select: {all: true}\n    mode: mig\n    layout: [3g.40gb]\n");
  const auto plan = planned(node, host);
  EXPECT_EQ(lines(plan, host), (Lines{"gpu 0: create 3g.40gb at 4-7"}));
  EXPECT_TRUE(noted(plan, "3g.40gb (gi 1) was not made by bulkhead; left alone. It has no compute instance"));
  EXPECT_EQ(lines(planned(node, host, {}, {.adopt = true}), host),
            (Lines{"gpu 0: create the compute instance of 3g.40gb (gi 1)"}));
  const auto seven = node_of("  - select: {all: true}\n    mode: mig\n    layout: [7g.80gb]\n");
  EXPECT_TRUE(has(refused(seven, host).reasons.at(0).way_out, "--adopt"));
  const auto off = node_of("  - select: {all: true}\n    mode: share\n");
  EXPECT_TRUE(has(refused(off, host).reasons.at(0).why, "bulkhead did not make 3g.40gb (gi 1)"));
  EXPECT_EQ(lines(planned(off, host, {}, {.adopt = true}), host),
            (Lines{"gpu 0: destroy 3g.40gb at 0-3", "gpu 0: MIG mode off"}));
}

TEST(Plan, LeavesTheInstancesOfADynamicLayoutToLeases) {
  Gpu busy = h100(0), off = h100(1);
  busy.mig_now = busy.mig_pending = true;
  busy.instances = {instance(busy, 1, 9, 0), instance(busy, 9, 19, 4), instance(busy, 11, 19, 5, false)};
  busy.instances[0].compute[0].holders = {holder(7)};
  busy.instances[2].compute.clear();
  const Host host = host_of({busy, off});
  const auto node = node_of("  - select: {all: true}\n    mode: mig\n    layout: dynamic\n");
  for (const bool adopt : {false, true}) {
    const auto plan = planned(node, host, {}, {.evict = true, .adopt = adopt});
    EXPECT_EQ(lines(plan, host), (Lines{"gpu 1: MIG mode on"}));
    EXPECT_TRUE(noted(plan,
                      "gpu 0: its layout is dynamic: instances belong to leases; left as they are: 3g.40gb "
                      "at 0, 1g.10gb at 4, 1g.10gb at 5"));
    EXPECT_TRUE(noted(plan, "gpu 1: its layout is dynamic: instances belong to leases; it has none now"));
  }
  EXPECT_TRUE(has(refused(node, host_of({l40s(0)})).reasons.at(0).why, "has no MIG"));
}

TEST(Plan, OfPassthroughTurnsMigOffAndSaysWhatItDoesNotDo) {
  Gpu gpu = h100(0);
  gpu.mig_now = gpu.mig_pending = true;
  gpu.instances = {instance(gpu, 1, 9, 0)};
  Host host = host_of({gpu, l40s(1)});
  const auto node = node_of("  - select: {all: true}\n    mode: passthrough\n");
  const auto plan = planned(node, host);
  EXPECT_EQ(lines(plan, host), (Lines{"gpu 0: destroy 3g.40gb at 0-3", "gpu 0: MIG mode off"}));
  EXPECT_TRUE(
      noted(plan,
            "gpu 0, gpu 1: for passthrough; drivers are changed only where bulkhead looks at this machine "
            "itself, not at a tree below another root"));
  // One that is with vfio already is what the rule wants, though NVML does not see it.
  host = host_of({});
  host.lost = {{{{0, 0x99, 0, 0}}, "bound to vfio-pci: set apart for virtual machines"}};
  host.lost[0].pci.driver = std::string("vfio-pci");
  const std::string rule = "  - select: {pci: \"99:00.0\"}\n    mode: ";
  EXPECT_TRUE(
      noted(planned(node_of(rule + "passthrough\n"), host), "GPU at 0000:99:00.0 is with vfio-pci already"));
  EXPECT_EQ(refused(node_of(rule + "exclusive\n"), host).reasons.size(), 1U);
}

passthrough::Tree bus_of(const Gpu& gpu) {
  passthrough::Tree tree;
  passthrough::Function first;
  first.address = gpu.pci.address;
  first.vendor = 0x10de;
  first.class_code = 0x030200;
  first.driver = "nvidia";
  first.group = 5;
  passthrough::Function sound = first;
  sound.address.function = 1;
  sound.class_code = 0x040300;
  sound.driver = "snd_hda_intel";
  tree.functions = {first, sound};
  tree.groups = {{5, "DMA", false}};
  return tree;
}

TEST(Plan, OfPassthroughEndsPersistenceFirstAndWritesTheBootsRuleLast) {
  Gpu gpu = h100(0);
  gpu.persistence = true;  // the kernel's: no process holds anything, and an unbind would hang
  const Host host = host_of({gpu});
  const auto node = node_of("  - select: {all: true}\n    mode: passthrough\n",
                            "host:\n  vfio: {owner: libvirt-qemu, mode: \"0600\"}\n");
  Remembered remembered;
  remembered.tree = bus_of(gpu);
  const auto plan = planned(node, host, remembered);
  ASSERT_EQ(plan.steps.size(), 6U);
  EXPECT_EQ(describe(plan.steps[0].action, &host), "gpu 0: persistence mode off");
  EXPECT_TRUE(has(plan.steps[0].why, "its driver would not let it go"));
  for (const std::size_t i : {1U, 2U}) EXPECT_EQ(kind_of(plan.steps[i].action), "set-driver");
  EXPECT_EQ(kind_of(plan.steps[3].action), "set-permission");
  EXPECT_EQ(kind_of(plan.steps[4].action), "prove");
  const auto* rule = std::get_if<SetFile>(&plan.steps[5].action);
  ASSERT_NE(rule, nullptr);
  EXPECT_EQ(rule->path, "/etc/udev/rules.d/10-bulkhead-vfio.rules");
  for (const auto* function : {"0000:10:00.0", "0000:10:00.1"})
    EXPECT_TRUE(
        has(*rule->after, fmt::format("KERNEL==\"{}\", ATTR{{driver_override}}=\"vfio-pci\"", function)));
  EXPECT_TRUE(has(*rule->after, "OWNER=\"libvirt-qemu\", MODE=\"0600\""));
}

TEST(Plan, OfPassthroughNamesProcessesThatTheDriverKnowsAndServicesByTheirWayOut) {
  Gpu gpu = h100(0);
  auto service = holder(41);
  service.name = "nv-hostengine";
  gpu.holders = {service, holder(42)};
  Remembered remembered;
  remembered.tree = bus_of(gpu);
  const auto node = node_of("  - select: {all: true}\n    mode: passthrough\n");
  const auto no = refused(node, host_of({gpu}), remembered);
  ASSERT_EQ(no.reasons.size(), 1U);
  EXPECT_EQ(no.reasons[0].holders.size(), 2U);
  EXPECT_TRUE(has(no.reasons[0].why, "pid 41 (nv-hostengine), pid 42 (python3)"));
  EXPECT_TRUE(has(no.reasons[0].way_out, "systemctl stop nvidia-dcgm"));
}

TEST(Pools, AreWhatTheRulesSayOfEachGpu) {
  const Host host = host_of({h100(0), h100(1), l40s(2), l40s(3), l40s(4), h100(5)});
  const auto node = node_of(
      "  - select: {index: 0}\n    mode: mig\n    layout: dynamic\n"
      "  - select: {index: 1}\n    mode: mig\n    layout: [1g.10gb]\n"
      "  - select: {model: \"*L40S*\", index: \"2-3\"}\n    mode: share\n"
      "  - select: {index: \"3,5\"}\n    mode: passthrough\n");
  const auto in = pools(node, host);
  ASSERT_EQ(in.size(), 6U);
  EXPECT_EQ(in[0].mode, spec::Mode::mig);
  EXPECT_TRUE(in[0].dynamic);
  EXPECT_EQ(in[1].mode, spec::Mode::mig);
  EXPECT_FALSE(in[1].dynamic);
  EXPECT_EQ(in[2].mode, spec::Mode::share);
  EXPECT_FALSE(in[3].mode);
  EXPECT_TRUE(has(in[3].why, "is selected by the rules in lines 10 and 12"));
  EXPECT_FALSE(in[4].mode);
  EXPECT_EQ(in[4].why, "no rule of the node file selects it");
  EXPECT_EQ(in[5].mode, spec::Mode::passthrough);
  EXPECT_EQ(in[5].gpu, host.gpus[5].uuid);
}

TEST(Plan, ChangesTheModeOfIdleGpusOnly) {
  Gpu gpu = h100(0);
  gpu.holders = {holder(1), holder(2)};
  const Host host = host_of({gpu});
  const auto node = node_of("  - select: {all: true}\n    mode: mig\n    layout: []\n");
  const auto no = refused(node, host);
  EXPECT_TRUE(has(no.reasons.at(0).why, "only on an idle GPU, and pid 1 (python3), pid 2 (python3) hold it"));
  EXPECT_EQ(no.reasons.at(0).holders.size(), 2U);
  const auto plan = planned(node, host, {}, {.evict = true});
  ASSERT_EQ(plan.steps.size(), 1U);
  EXPECT_EQ(plan.steps[0].losses.at(1).what, "gpu 0");
}

TEST(Plan, TakesBackAPendingModeAndWaitsForAVirtualMachinesReboot) {
  Gpu gpu = h100(0);
  gpu.mig_pending = true;
  const auto off = node_of("  - select: {all: true}\n    mode: exclusive\n");
  const auto plan = planned(off, host_of({gpu}));
  ASSERT_EQ(plan.steps.size(), 1U);
  EXPECT_TRUE(has(plan.steps[0].why, "MIG mode is off, but on is pending"));
  gpu.compute_capability = std::string("8.0");
  gpu.virtualization = std::string("pass-through");
  const auto on = node_of("  - select: {all: true}\n    mode: mig\n    layout: [7g.80gb]\n");
  EXPECT_TRUE(planned(on, host_of({gpu})).empty());
  EXPECT_TRUE(noted(planned(on, host_of({gpu})), "is pending until this virtual machine reboots"));
  gpu.mig_pending = false;
  const auto first = planned(on, host_of({gpu}));
  ASSERT_EQ(first.steps.size(), 1U);
  EXPECT_TRUE(first.reboot_owed());
}

TEST(Plan, RefusesALayoutWhereThereIsNoMigAndSaysWhatThereIs) {
  const auto no = refused(node_of("  - select: {model: \"*l40?\"}\n    mode: mig\n    layout: [1g.10gb]\n"),
                          host_of({l40s(0)}));
  EXPECT_EQ(no.reasons.at(0).why,
            "NVIDIA L40S has no MIG (Not Supported); what it has: mode: share (software slices) and mode: "
            "exclusive, and SR-IOV with 32 virtual functions");
  EXPECT_TRUE(planned(node_of("  - select: {all: true}\n    mode: share\n"), host_of({l40s(0)})).empty());
}

TEST(Plan, RefusesWhatTheGpuDoesNotOffer) {
  const Host host = host_of({h100(0)});
  const auto layout = [&](const std::string& text) {
    return refused(node_of("  - select: {all: true}\n    mode: mig\n    layout: " + text + "\n"), host)
        .reasons.at(0);
  };
  EXPECT_EQ(layout("[3g.20gb, 3g.20gb]").why,
            "has no MIG profile 3g.20gb (line 6); it has 1g.10gb, 1g.10gb+me, 1g.20gb, 2g.20gb, 3g.40gb, "
            "4g.40gb, 7g.80gb");
  EXPECT_TRUE(has(layout("[3g.20gb]").way_out, "did you mean"));
  EXPECT_TRUE(has(layout("[3g.40gb, 3g.40gb, 1g.10gb]").why, "need 9 memory slices, the GPU has 8"));
  EXPECT_TRUE(has(layout("[{profile: 2g.20gb, compute: [2c, 1c]}]").why,
                  "has 2 compute slices, its compute instances need 3"));
  const auto rule = [&](const std::string& text) {
    return refused(node_of("  - select: {all: true}\n    mode: share\n    " + text + "\n"), host)
        .reasons.at(0)
        .why;
  };
  EXPECT_EQ(rule("power_limit_w: 150"), "power limit 150 W is outside what the board allows: 200 W to 700 W");
  EXPECT_TRUE(has(rule("clocks: {lock_mhz: 2500}"), "is above the GPU's 1980 MHz"));
}

TEST(Plan, RefusesWhatCannotBeRead) {
  Host host = host_of({h100(0)});
  host.gpus[0].persistence = Reading<bool>::missing("Not Supported");
  host.gpus[0].power = {};
  host.gpus[0].power.limit = Reading<Milliwatts>::missing("Not Supported");
  host.cpu_governor = Reading<std::string>::missing("no cpufreq");
  host.units = {};
  const auto no = refused(
      node_of("  - select: {all: true}\n    mode: share\n    persistence: true\n    power_limit_w: 500\n",
              "host:\n  cpu_governor: performance\n  fabric_manager: {}\n"),
      host);
  ASSERT_EQ(no.reasons.size(), 4U);
  for (const auto& reason : no.reasons) EXPECT_FALSE(reason.way_out.empty());
}

TEST(Plan, RefusesUnitsThatAreMissingOrMasked) {
  Host host = host_of({});
  const auto node = node_of("", "host:\n  units: [a, {name: b, enabled: false, active: false}, c, d]\n");
  host.units = {{"a.service", "not-found", "inactive", "dead", ""},
                {"b.service", "not-found", "inactive", "dead", ""},
                {"c.service", "masked", "inactive", "dead", "masked"},
                {"d.service", "loaded", "active", "running", "static"}};
  const auto no = refused(node, host);
  ASSERT_EQ(no.reasons.size(), 2U);
  EXPECT_EQ(no.reasons[0].why, "is not installed");
  EXPECT_EQ(no.reasons[1].way_out, "systemctl unmask c.service");
  EXPECT_EQ(units_of_interest(node), (Lines{"a.service", "b.service", "c.service", "d.service"}));
}

TEST(Plan, RefusesAmbiguousAndMissingGpusAllAtOnce) {
  Host host = host_of({h100(0), h100(1)});
  host.lost = {{{{0, 0x99, 0, 0}}, "held by vfio-pci"}};
  const auto no =
      refused(node_of("  - select: {index: \"0-1\"}\n    mode: share\n  - select: {uuid: GPU-h100-1}\n    "
                      "mode: share\n  - select: {index: 9}\n    mode: share\n"
                      "  - select: {uuid: GPU-nope}\n    mode: share\n  - select: {pci: \"99:00.0\"}\n    "
                      "mode: share\n  - select: {pci: \"98:00.0\"}\n    mode: share\n"
                      "  - select: {index: 0, model: L40S}\n    mode: share\n"),
              host);
  ASSERT_EQ(no.reasons.size(), 6U);
  EXPECT_TRUE(has(no.reasons[0].why, "is selected by the rules in lines 4 and 6"));
  EXPECT_TRUE(
      has(no.reasons[1].why, "names gpu 9, and the host shows 0-1; 1 more on the PCI bus is lost to NVML"));
  EXPECT_TRUE(has(no.reasons[2].why, "names GPU-nope"));
  EXPECT_TRUE(has(no.reasons[3].why, "is on the PCI bus but not in NVML: held by vfio-pci"));
  EXPECT_TRUE(has(no.reasons[4].why, "where the host has no GPU"));
  EXPECT_TRUE(has(no.reasons[5].why, "do not match its other keys"));
  const auto plan = planned(node_of("  - select: {pci_id: \"10de:20b7\"}\n    mode: share\n  - select: "
                                    "{pci_id: \"10de:2330\"}\n    mode: share\n"),
                            host);
  EXPECT_TRUE(noted(plan, "rule in line 4 selects no GPU of this host"));
  EXPECT_TRUE(noted(plan, "GPU at 0000:99:00.0 is on the PCI bus but not in NVML"));
}

// ---- kernel arguments
TEST(KernelArguments, OweNoStepAndNoRebootWhenTheKernelHasThem) {
  Host host = host_of({});
  const auto node = node_of("", "host: {kernel_args: [quiet]}\n");
  EXPECT_TRUE(planned(node, host).empty());
  host.os_id = std::string("slackware");
  EXPECT_TRUE(planned(node, host).empty());
  const auto more = node_of("", "host: {kernel_args: [iommu=pt]}\n");
  EXPECT_TRUE(has(refused(more, host).reasons.at(0).way_out, "by hand"));
}

TEST(KernelArguments, OfOursStayOursAcrossTheReboot) {
  Machine machine{host_of({}), {}};
  const auto node = node_of("", "host: {kernel_args: [iommu=pt]}\n");
  EXPECT_EQ(files_of_interest(node, machine.host), (Lines{"/etc/default/grub.d/bulkhead.cfg"}));
  auto plan = planned(node, machine.host);
  for (const auto& step : plan.steps) machine.run(step);
  plan = planned(node, machine.host, machine.remembered);
  EXPECT_TRUE(plan.empty());
  EXPECT_TRUE(noted(plan, "a reboot is owed: the running kernel lacks iommu=pt"));
  machine.host.kernel_cmdline = std::string("quiet iommu=pt");
  EXPECT_TRUE(planned(node, machine.host, machine.remembered).empty());
  // The node file changes its mind: the file changes, the argument that goes owes no reboot of ours.
  plan = planned(node_of("", "host: {kernel_args: [quiet]}\n"), machine.host, machine.remembered);
  ASSERT_EQ(plan.steps.size(), 1U);
  EXPECT_EQ(std::get<SetFile>(plan.steps[0].action).after, std::nullopt);
}

TEST(KernelArguments, GoThroughGrubbyOnRedHat) {
  Machine machine{host_of({}), {}};
  machine.host.os_id = std::string("rocky");
  machine.host.kernel_cmdline = Reading<std::string>::missing("not read");
  const auto node = node_of("", "host: {kernel_args: [iommu=pt, a=1]}\n");
  EXPECT_EQ(files_of_interest(node, machine.host), (Lines{"/etc/bulkhead/kernel-args"}));
  auto plan = planned(node, machine.host);
  const auto& file = std::get<SetFile>(plan.steps.at(0).action);
  EXPECT_EQ(file.then, (Lines{"grubby", "--update-kernel=ALL", "--args=iommu=pt a=1"}));
  EXPECT_EQ(file.then_undo, (Lines{"grubby", "--update-kernel=ALL", "--remove-args=iommu=pt a=1"}));
  EXPECT_EQ(std::get<SetFile>(undo_of(plan.steps[0].action)).then, file.then_undo);
  machine.run(plan.steps[0]);
  EXPECT_TRUE(planned(node, machine.host, machine.remembered).empty());
  plan = planned(node_of("", "host: {kernel_args: [iommu=pt]}\n"), machine.host, machine.remembered);
  EXPECT_EQ(std::get<SetFile>(plan.steps.at(0).action).then,
            (Lines{"grubby", "--update-kernel=ALL", "--args=iommu=pt", "--remove-args=a=1"}));
}

TEST(Files, OfOthersAreNotOverwritten) {
  const Host host = host_of({});
  const auto node = node_of("", "host: {modprobe: [{name: vfio.conf, lines: [options a b=1]}]}\n");
  const Remembered remembered{{}, {{"/etc/modprobe.d/vfio.conf", "options a b=2\n"}}};
  EXPECT_TRUE(has(refused(node, host, remembered).reasons.at(0).why, "was not written by bulkhead"));
  EXPECT_EQ(planned(node, host, remembered, {.adopt = true}).steps.size(), 1U);
}

TEST(Clocks, AreUnlockedWhenTheNodeFileNoLongerLocksThem) {
  const Host host = host_of({h100(0)});
  const Remembered remembered{{{host.gpus[0].uuid, {Megahertz(1), Megahertz(2)}}}, {}};
  EXPECT_EQ(lines(planned(node_of("  - select: {all: true}\n    mode: share\n"), host, remembered), host),
            (Lines{"gpu 0: unlock clocks"}));
}

TEST(Variants, AnInstanceWithOtherComputeInstancesIsMadeAnew) {
  Gpu gpu = h100(0);
  gpu.mig_now = gpu.mig_pending = true;
  gpu.instances = {instance(gpu, 1, 9, 0)};
  const Host host = host_of({gpu});
  EXPECT_TRUE(
      planned(
          node_of(
              "  - select: {all: true}\n    mode: mig\n    layout: [{profile: 3g.40gb, compute: [3c]}]\n"),
          host)
          .empty());
  const auto plan = planned(
      node_of(
          "  - select: {all: true}\n    mode: mig\n    layout: [{profile: 3g.40gb, compute: [1c, 2c]}]\n"),
      host);
  EXPECT_EQ(lines(plan, host),
            (Lines{"gpu 0: destroy 3g.40gb at 0-3", "gpu 0: create 3g.40gb at 0-3 with 2c, 1c"}));
}

// ---- thousands of hosts
Machine random_machine(std::mt19937& random) {
  const auto luck = [&](unsigned n) { return static_cast<unsigned>(random() % n); };
  std::vector<Gpu> gpus;
  int pid = 100;
  for (unsigned index = 0; index < 1 + luck(4); ++index) {
    Gpu gpu = luck(5) == 0 ? l40s(index) : h100(index);
    gpu.persistence = luck(2) == 0;
    gpu.power.limit = watts(300 + 100 * luck(4));
    if (gpu.mig_capable && luck(3) != 0) {
      gpu.mig_now = gpu.mig_pending = true;
      std::vector<mig::NewInstance> all;
      for (unsigned tries = luck(8); tries > 0; --tries) {
        const auto& p = gpu.geometry.profiles[luck(7)];
        all.push_back({p.id, {p.starts[luck(static_cast<unsigned>(p.starts.size()))], p.size}});
        if (!mig::legal(gpu.geometry, all)) {
          all.pop_back();
          continue;
        }
        auto made =
            instance(gpu, static_cast<unsigned>(all.size()), p.id, all.back().place.start, luck(4) != 0);
        if (luck(6) == 0) {
          made.compute.clear();
        } else if (luck(4) == 0) {
          made.compute[0].holders = {holder(++pid)};
        } else if (p.compute_slices == 3 && luck(2) == 0) {
          made.compute = {{0, 1, {}}, {1, 0, {}}};
        }
        gpu.instances.push_back(made);
      }
    } else if (luck(4) == 0) {
      gpu.holders = {holder(++pid)};
    }
    gpus.push_back(gpu);
  }
  Machine machine{host_of(std::move(gpus)), {}};
  if (luck(3) == 0) machine.host.os_id = std::string("rhel");
  if (luck(3) == 0) machine.host.cpu_governor = std::string("performance");
  if (luck(3) == 0)
    machine.remembered.clock_locks = {{machine.host.gpus[0].uuid, {Megahertz(1000), Megahertz(1100)}}};
  return machine;
}

spec::NodeFile random_wish(std::mt19937& random, const Host& host) {
  const auto luck = [&](unsigned n) { return static_cast<unsigned>(random() % n); };
  std::string rules;
  for (const auto& gpu : host.gpus) {
    if (luck(6) == 0) continue;
    rules += "  - select: {index: " + std::to_string(gpu.index) + "}\n";
    if (gpu.mig_capable && luck(3) != 0) {
      static constexpr const char* layouts[] = {
          "[3g.40gb, 2g.20gb, 1g.10gb, 1g.10gb]",
          "[3g.40gb, 3g.40gb]",
          "[7g.80gb]",
          "[]",
          "[2g.20gb, 2g.20gb, 2g.20gb]",
          "[1g.10gb, 1g.10gb, 1g.10gb+me]",
          "[{profile: 3g.40gb, compute: [2c, 1c]}, {profile: 1g.10gb, at: 0}]",
          "[4g.40gb, 1g.20gb]",
          "[{profile: 3g.40gb, at: 4}]",
          "dynamic"};
      rules += std::string("    mode: mig\n    layout: ") + layouts[luck(10)] + "\n";
    } else {
      rules += luck(2) == 0 ? "    mode: share\n" : "    mode: exclusive\n";
    }
    if (luck(3) == 0) rules += "    persistence: true\n";
    if (luck(3) == 0) rules += "    power_limit_w: 500\n";
    if (luck(3) == 0) rules += "    clocks: {lock_mhz: [1200, 1500]}\n";
  }
  std::string wish = "host:\n  units: []\n";
  if (luck(2) == 0) wish += "  kernel_args: [intel_iommu=on, quiet]\n";
  if (luck(2) == 0) wish += "  cpu_governor: performance\n";
  if (luck(2) == 0) wish += "  fabric_manager: {}\n";
  if (luck(2) == 0) wish += "  modprobe: [{name: a.conf, lines: [options a b=1]}]\n";
  return node_of(rules, wish);
}

TEST(Plan, OnceCarriedOutIsEmptyAndItsUndosRestoreTheHost) {
  std::mt19937 random(4242);
  unsigned plans = 0, refusals = 0, steps = 0;
  for (unsigned round = 0; round < 4000; ++round) {
    const Machine before = random_machine(random);
    const auto node = random_wish(random, before.host);
    const Options options{round % 3 == 1, round % 3 != 0 && round % 2 == 0};
    auto answer = make(node, before.host, before.remembered, options);
    if (const auto* no = std::get_if<Refusal>(&answer)) {
      ++refusals;
      ASSERT_FALSE(no->reasons.empty());
      for (const auto& reason : no->reasons) {
        ASSERT_FALSE(reason.subject.empty() || reason.why.empty() || reason.way_out.empty());
      }
      // Evicting and adopting opens every way but the impossible layout, and none here is impossible.
      ASSERT_TRUE(std::holds_alternative<Plan>(make(node, before.host, before.remembered, {true, true})))
          << words(answer, before.host);
      continue;
    }
    ++plans;
    const auto& plan = std::get<Plan>(answer);
    Machine machine = before;
    for (const auto& path : files_of_interest(node, machine.host))
      machine.remembered.files.push_back({path, std::nullopt});
    const std::string first = machine.state();
    for (const auto& step : plan.steps) {
      ++steps;
      machine.run(step);
      ASSERT_FALSE(testing::Test::HasFatalFailure()) << words(answer, before.host);
      const auto read = action_from_json(to_json(step.action));
      ASSERT_TRUE(read.ok());
      ASSERT_EQ(to_json(read.value()), to_json(step.action));
    }
    // Idle or with holders, the machine is now as wanted.
    const auto second = make(node, machine.host, machine.remembered, {false, options.adopt});
    ASSERT_TRUE(std::holds_alternative<Plan>(second)) << words(second, machine.host);
    ASSERT_TRUE(std::get<Plan>(second).empty()) << words(answer, before.host) << words(second, machine.host);
    for (auto at = plan.steps.rbegin(); at != plan.steps.rend(); ++at) machine.undo(at->action);
    ASSERT_EQ(machine.state(), first) << words(answer, before.host);
  }
  EXPECT_GT(plans, 1000U);
  EXPECT_GT(refusals, 100U);
  EXPECT_GT(steps, 5000U);
}

// ---- actions as JSON
std::vector<Action> one_of_each() {
  const Uuid gpu{"GPU-1"};
  return {SetPersistence{gpu, false, true},
          SetMigMode{gpu, false, true},
          DestroyInstance{gpu, 3, "3g.40gb", 9, {4, 4}, {1, 0, 4, 5, 6, 3, 2}},
          CreateInstance{gpu, "3g.40gb", 9, {4, 4}, {2, 1}},
          CreateCompute{gpu, 3, "3g.40gb", {4, 4}, false},
          SetPowerLimit{gpu, watts(700), Milliwatts(512500)},
          LockClocks{gpu, std::nullopt, spec::ClockLock{Megahertz(1), Megahertz(2)}},
          SetGovernor{"powersave", "performance"},
          SetUnit{"a.service", false, true, true, true, 5555},
          SetFile{"/etc/a", std::nullopt, "x\n", {"update-grub"}, {"undo"}},
          LoadModules{{"vfio_pci"}, false, true},
          SetVirtualFunctions{{0, 1, 0, 0}, 0, 4, true, false},
          SetDriver{{{0, 1, 0, 0}, 2}, {"nvme", ""}, {"vfio-pci", "vfio-pci"}},
          SetDriver{{{0, 1, 0, 0}, {}}, {"vfio-pci", "vfio-pci"}, {"nvme", ""}, true},
          SetPermission{{{0, 1, 0, 0}, {}}, {}, {"libvirt-qemu", 0660}},
          Prove{{{0, 1, 0, 0}, {}}, false}};
}

TEST(Action, SurvivesJsonAndItsUndoIsItsOpposite) {
  std::set<std::string> kinds;
  for (const auto& action : one_of_each()) {
    kinds.insert(std::string(kind_of(action)));
    const Json json = to_json(action);
    const auto text = parse_json(dump(json));
    ASSERT_TRUE(text.ok());
    const auto read = action_from_json(text.value());
    ASSERT_TRUE(read.ok()) << read.error().message();
    EXPECT_EQ(to_json(read.value()), json);
    EXPECT_EQ(kind_of(undo_of(undo_of(action))), kind_of(action));
    if (!std::holds_alternative<DestroyInstance>(action)) {
      EXPECT_EQ(to_json(undo_of(undo_of(action))), json);
    }
    EXPECT_FALSE(describe(action).empty());
    EXPECT_NE(describe(action), describe(undo_of(action)));
  }
  EXPECT_EQ(kinds.size(), std::variant_size_v<Action>);
  EXPECT_EQ(describe(SetUnit{"a.service", true, true, true, true, {}}), "host: probe a.service");
  EXPECT_EQ(describe(SetPowerLimit{{"GPU-1"}, watts(700), Milliwatts(512500)}),
            "GPU-1: power limit 512.5 W (was 700 W)");
  EXPECT_EQ(describe(SetFile{"/etc/a", "x", std::nullopt, {}, {}}), "host: remove /etc/a");
}

TEST(Action, OfAnOlderJournalHasNoReplug) {
  Json old = to_json(SetDriver{{{0, 1, 0, 0}, {}}, {"vfio-pci", "vfio-pci"}, {"nvme", ""}, true});
  old.erase("replug");
  const auto read = action_from_json(old);
  ASSERT_TRUE(read.ok()) << read.error().message();
  EXPECT_FALSE(std::get<SetDriver>(*read).replug);
}

TEST(Action, FromAJournalThatSomebodyTouchedIsAnError) {
  const auto message = [](const Json& json) {
    const auto read = action_from_json(json);
    return read.ok() ? std::string("accepted") : read.error().message();
  };
  EXPECT_EQ(message(Json(3)), "an action must be a JSON object");
  EXPECT_EQ(message(Json::object()), "an action without a kind");
  EXPECT_EQ(message(Json{{"kind", "rm-rf"}}), "unknown kind of action 'rm-rf'");
  EXPECT_EQ(message(Json{{"kind", "set-mig-mode"}}), "action set-mig-mode: 'gpu' must be text");
  // Each field in turn: gone, of a wrong type, too large.
  for (const auto& action : one_of_each()) {
    const Json whole = to_json(action);
    for (const auto& [key, value] : whole.items()) {
      if (key == "kind") continue;
      Json gone = whole;
      gone.erase(key);
      // Older journals have no such key.
      if (key != "replug") {
        EXPECT_NE(message(gone), "accepted") << key;
      }
      for (const Json& wrong : {Json(Json::array({Json::array()})), Json(-1), Json(1.5), Json{{"start", "x"}},
                                Json(std::string(2U << 20U, 'x'))}) {
        Json hostile = whole;
        hostile[key] = wrong;
        EXPECT_NE(message(hostile), "accepted") << key << " " << wrong.dump().substr(0, 40);
      }
    }
  }
  Json big = to_json(Action(DestroyInstance{}));
  big["gpu_instance"] = 0x100000000ULL;
  EXPECT_NE(message(big), "accepted");
  big = to_json(Action(DestroyInstance{}));
  big["compute_profiles"] = std::vector<unsigned>(300, 1);
  EXPECT_NE(message(big), "accepted");
  big = to_json(Action(SetFile{}));
  big["then"] = std::vector<std::string>(300, "x");
  EXPECT_NE(message(big), "accepted");
  big = to_json(Action(CreateInstance{}));
  big["place"] = Json{{"start", 65}, {"size", 1}};
  EXPECT_NE(message(big), "accepted");
  big = to_json(Action(LockClocks{}));
  big["after"] = Json{{"low_mhz", 2}, {"high_mhz", 1}};
  EXPECT_NE(message(big), "accepted");
}

}  // namespace
}  // namespace bulkhead::plan
