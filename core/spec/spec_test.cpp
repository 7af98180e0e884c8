#include "core/spec/spec.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <random>

#include "base/limits.hpp"

namespace bulkhead::spec {
namespace {

constexpr const char* head = "apiVersion: bulkhead/v1\nkind: Node\n";

NodeFile good(const std::string& yaml) {
  auto parsed = parse(yaml);
  if (const auto* mistakes = std::get_if<std::vector<Mistake>>(&parsed))
    ADD_FAILURE() << render(*mistakes, "test.yaml");
  return std::holds_alternative<NodeFile>(parsed) ? std::get<NodeFile>(parsed) : NodeFile{};
}
std::string bad(const std::string& yaml) {
  const auto parsed = parse(yaml);
  const auto* mistakes = std::get_if<std::vector<Mistake>>(&parsed);
  return mistakes != nullptr ? render(*mistakes, "f") : "no mistake was found";
}
// One rule with the given lines below it.
std::string rule(const std::string& lines) {
  return std::string(head) + "gpus:\n  - select: {all: true}\n" + lines;
}

TEST(NodeFile, OfTheReadmeIsUnderstoodWhole) {
  const auto node = good(R"(apiVersion: bulkhead/v1
kind: Node
metadata: {name: rack7-node3}
gpus:
  - select: {index: "0-3"}            # or uuid, pci, model
    mode: mig
    layout: [3g.40gb, 2g.20gb, 1g.10gb, 1g.10gb]
  - select: {index: "4-6"}
    mode: share
    power_limit_w: 500
  - select: {index: "7"}
    mode: exclusive
    clocks: {lock_mhz: [1200, 1500]}
host:
  kernel_args: [intel_iommu=on, iommu=pt]
  cpu_governor: performance
  fabric_manager: {unit: nvidia-fabricmanager, port: 5555}
)");
  EXPECT_EQ(node.name, "rack7-node3");
  ASSERT_EQ(node.gpus.size(), 3U);
  EXPECT_EQ(node.gpus[0].select.index, (std::vector<unsigned>{0, 1, 2, 3}));
  EXPECT_EQ(node.gpus[0].mode, Mode::mig);
  ASSERT_EQ(node.gpus[0].layout.size(), 4U);
  EXPECT_EQ(node.gpus[0].layout[1].profile, "2g.20gb");
  EXPECT_EQ(node.gpus[0].layout[1].line, 7U);
  EXPECT_EQ(node.gpus[0].layout[1].column, 23U);
  EXPECT_EQ(node.gpus[1].power_limit, watts(500));
  EXPECT_EQ(node.gpus[2].clocks, (ClockLock{Megahertz(1200), Megahertz(1500)}));
  EXPECT_EQ(node.host.kernel_args, (std::vector<std::string>{"intel_iommu=on", "iommu=pt"}));
  EXPECT_EQ(node.host.cpu_governor, "performance");
  EXPECT_EQ(node.host.fabric_manager->unit, "nvidia-fabricmanager.service");
  EXPECT_EQ(node.host.fabric_manager->port, 5555U);
}

TEST(NodeFile, TakesEveryFormOfEveryKey) {
  const auto node = good(std::string(head) + R"(
gpus:
  - select:
      index: [0, "2-3", 2]
      uuid: [GPU-aaaa-1, GPU-bbbb-2]
      pci: 1b:00.0
      model: "*H100*"
      pci_id: ["10de:2330", "10DE:2331"]
    mode: mig
    layout:
      - MIG 1G.10GB
      - {profile: 1g.10gb+me, at: 3}
      - {profile: 2g.20gb, count: 2, compute: [1c, 1c]}
      - {profile: 1g.24gb-me, compute: 1c}
    power_limit_w: 312.5
    clocks: {lock_mhz: 1410}
    persistence: false
host:
  fabric_manager: {}
  units: [nvidia-dcgm, {name: foo.timer, enabled: false, active: true}]
  modprobe:
    - name: vfio.conf
      lines: ["options vfio-pci ids=10de:2330", "# why", "softdep nvidia pre: vfio-pci"]
)");
  const auto& rule = node.gpus.at(0);
  EXPECT_EQ(rule.select.index, (std::vector<unsigned>{0, 2, 3}));
  EXPECT_EQ(rule.select.uuid.size(), 2U);
  EXPECT_EQ(rule.select.pci.at(0).str(), "0000:1b:00.0");
  EXPECT_EQ(rule.select.pci_id.at(1), (PciId{0x10de, 0x2331}));
  ASSERT_EQ(rule.layout.size(), 5U);
  EXPECT_EQ(rule.layout[0].profile, "1g.10gb");
  EXPECT_EQ(rule.layout[1].at, 3U);
  EXPECT_EQ(rule.layout[3].compute, (std::vector<std::string>{"1c", "1c"}));
  EXPECT_EQ(rule.power_limit, Milliwatts(312500));
  EXPECT_EQ(rule.clocks->low, rule.clocks->high);
  EXPECT_EQ(rule.persistence, false);
  EXPECT_EQ(node.host.units.at(0).name, "nvidia-dcgm.service");
  EXPECT_EQ(node.host.units.at(1).name, "foo.timer");
  EXPECT_FALSE(node.host.units.at(1).enabled);
  EXPECT_EQ(node.host.modprobe.at(0).lines.size(), 3U);
}

TEST(NodeFile, ReportsEveryMistakeAtOnceWithItsPlace) {
  EXPECT_EQ(
      bad(R"(apiVersion: bulkhead/v2
kind: Nod
gpus:
  - select: {index: "0-3"}
    mode: migg
    layout: [3g.40gb, 1c.3g.40gb, {profile: 1g.10gb, at: 0, count: 2}]
  - select: all
    mode: share
    power_limit: 500
    power_limit_w: 500W
  - select: {idx: 3, uuid: MIG-aa}
    clocks: {lock_mhz: [1500, 1200]}
    clocks: {lock_mhz: 3}
)"),
      "f:1:13: apiVersion: 'bulkhead/v2' is not known; write apiVersion: bulkhead/v1\n"
      "f:2:7: kind: 'Nod' is not known; write kind: Node\n"
      "f:5:11: gpus[0].mode: 'migg' is not a mode; did you mean 'mig'?\n"
      "f:6:23: gpus[0].layout[1]: '1c.3g.40gb' is not a MIG profile name; write {profile: 3g.40gb, compute: "
      "[1c]}\n"
      "f:6:35: gpus[0].layout[2]: at and count together: only one instance can start there; write one entry "
      "for each start\n"
      "f:7:13: gpus[1].select: must be a mapping with the keys all, index, uuid, pci, model, pci_id; write "
      "select: {all: true}\n"
      "f:9:5: gpus[1]: unknown key 'power_limit'; did you mean 'power_limit_w'?\n"
      "f:10:20: gpus[1].power_limit_w: '500W' is not a number of watts; write 500: the key names the unit\n"
      "f:11:5: gpus[2]: the key 'mode' is missing\n"
      "f:11:14: gpus[2].select: unknown key 'idx'\n"
      "f:11:28: gpus[2].select.uuid: 'MIG-aa' is not a GPU's UUID; that is a MIG device; write its GPU's "
      "UUID\n"
      "f:12:24: gpus[2].clocks.lock_mhz: low 1500 is above high 1200; write [1200, 1500]\n"
      "f:13:5: gpus[2]: key 'clocks' is given twice, first in line 12; remove one\n");
}

struct Case {
  std::string yaml, words;
};
TEST(NodeFile, NamesEachMistakeAndItsRemedy) {
  const std::string h = head;
  const std::vector<Case> cases = {
      {"", "f:1:1: the file is empty"},
      {"just words", "must be a mapping with the keys apiVersion, kind, metadata, gpus, devices, host"},
      {"gpus: []", "the key 'apiVersion' is missing"},
      {"apiVersion: [a]\nkind: Node", "apiVersion: must be a word"},
      {"apiVersion:\nkind: Node", "apiVersion: has no value; write one or remove the key"},
      {"version: v1\nmig-configs: {}",
       "this is a mig-parted configuration; try: bulkhead import mig-parted FILE"},
      {h + "metadata: {name: 'a b'}", "has other characters than letters"},
      {h + "metadata: {name: ''}", "metadata.name: must be a word"},
      {h + "metadata: {name: " + std::string(200, 'x') + "}", "is longer than 128 bytes"},
      {h + "Host: {}", "unknown key 'Host'; did you mean 'host'?"},
      {h + "? [a, b]\n: c\n", "a key must be a plain word"},
      {h + "gpus: {}", "gpus: must be a list"},
      {h + "gpus: [{select: {}, mode: share}]", "names no GPU"},
      {h + "gpus: [{select: {all: true, index: 1}, mode: share}]", "all stands beside other keys"},
      {h + "gpus: [{select: {all: false}, mode: share}]", "false selects nothing"},
      {h + "gpus: [{select: {all: yes}, mode: share}]", "'yes' is not true or false; write true"},
      {h + "gpus: [{select: {all: [1]}, mode: share}]", "must be true or false"},
      {h + "gpus: [{select: {all: 'off'}, mode: share}]", "write false"},
      {h + "gpus: [{select: {index: 64}, mode: share}]", "'64' is not a GPU index or range below 64"},
      {h + "gpus: [{select: {index: []}, mode: share}]", "is an empty list"},
      {h + "gpus: [{select: {index: [[1]]}, mode: share}]", "is not a GPU index"},
      {h + "gpus: [{select: {uuid: abc}, mode: share}]", "it starts with GPU-"},
      {h + "gpus: [{select: {pci: 1b}, mode: share}]",
       "'1b' is not a PCI address; write it like 0000:1b:00.0"},
      {h + "gpus: [{select: {pci_id: 2330}, mode: share}]", "is not a PCI id"},
      {rule("    mode: mig\n"),
       "mode mig needs a layout; write layout: [1g.10gb, ...], [] for none, or dynamic where leases make"},
      {rule("    mode: mig\n    layout: dynamics\n"), "'dynamics' is not a layout; did you mean 'dynamic'?"},
      {rule("    mode: mig\n    layout: 3g.40gb\n"), "'3g.40gb' is not a layout; write layout: [3g.40gb]"},
      {rule("    mode: mig\n    layout: {dynamic: true}\n"), "layout: must be a list"},
      {rule("    mode: mig\n    layout: [dynamic]\n"), "'dynamic' is not a MIG profile name"},
      {rule("    mode: exclusive\n    layout: dynamic\n"),
       "a layout is for mode mig, this is mode exclusive"},
      {rule("    mode: dynamic\n"), "'dynamic' is not a mode; write mode: mig and layout: dynamic"},
      {rule("    mode: passtrough\n"), "'passtrough' is not a mode; did you mean 'passthrough'?"},
      {rule("    mode: passthrough\n    layout: []\n"), "a layout is for mode mig, this is mode passthrough"},
      {rule("    mode: passthrough\n    power_limit_w: 500\n"), "remove power_limit_w"},
      {rule("    mode: passthrough\n    persistence: true\n"),
       "a GPU for passthrough is set by the driver in its virtual machine, not by this host's"},
      {rule("    mode: share\n    layout: [1g.10gb]\n"), "a layout is for mode mig, this is mode share"},
      {rule("    mode: whole\n"), "'whole' is not a mode; modes are mig, share, exclusive and passthrough"},
      {rule("    mode: mig\n    layout: [3g40gb]\n"), "write it like 3g.40gb or 1g.10gb+me"},
      {rule("    mode: mig\n    layout: [{at: 1}]\n"), "the key 'profile' is missing"},
      {rule("    mode: mig\n    layout: [{profile: 1g.10gb, at: 99}]\n"), "99 is out of range 0 to 63"},
      {rule("    mode: mig\n    layout: [{profile: 1g.10gb, count: 64}, 1g.10gb]\n"),
       "the layout has more than 64 instances"},
      {rule("    mode: mig\n    layout: [{profile: 3g.40gb, compute: [5c]}]\n"),
       "'5c' is not a compute instance"},
      {rule("    mode: share\n    power_limit_w: 0\n"), "0 W is out of range 1 to 10000"},
      {rule("    mode: share\n    power_limit_w: 1.2345\n"), "is not a number of watts"},
      {rule("    mode: share\n    power_limit_w: [1]\n"), "must be a number of watts"},
      {rule("    mode: share\n    clocks: {}\n"), "the key 'lock_mhz' is missing"},
      {rule("    mode: share\n    clocks: {lock_mhz: [1, 2, 3]}\n"), "must be a clock or [low, high]"},
      {rule("    mode: share\n    clocks: {lock_mhz: [1, 2MHz]}\n"),
       "'2MHz' is not a whole number; write 2: the key names the unit"},
      {rule("    mode: share\n    clocks: {lock_mhz: [{}, 2]}\n"), "must be a whole number"},
      {h + "host: {kernel_args: [a b]}", "write one list item for each argument"},
      {h + "host: {kernel_args: ['a=$(reboot)']}", "is not one kernel argument"},
      {h + "host: {kernel_args: ['\"']}", "is not one kernel argument"},
      {h + "host: {kernel_args: [a, a]}", "'a' is given twice"},
      {h + "host: {cpu_governor: perfomance}", "did you mean 'performance'?"},
      {h + "host: {cpu_governor: turbo}", "one of performance, powersave"},
      {h + "host: {fabric_manager: {port: 70000}}", "70000 is out of range 1 to 65535"},
      {h + "host: {fabric_manager: {unit: ../x}}", "is not a systemd unit name"},
      {h + "host: {units: [a, a.service]}", "unit 'a.service' is named twice"},
      {h + "host: {fabric_manager: {}, units: [nvidia-fabricmanager]}", "is named twice"},
      {h + "host: {units: [{enabled: true}]}", "the key 'name' is missing"},
      {h + "host: {modprobe: [{name: ../evil.conf, lines: []}]}", "is not a file name below /etc/modprobe.d"},
      {h + "host: {modprobe: [{name: a.conf, lines: [optoins a]}]}", "did you mean 'options'?"},
      {h + "host: {modprobe: [{name: a.conf, lines: [frobnicate]}]}", "a line starts with options"},
      {h + "host: {modprobe: [{name: a.conf, lines: [\"options a\\nb\"]}]}", "holds a line break"},
      {h + "host: {modprobe: [{name: a.conf, lines: [[]]}]}", "must be a word"},
      {h + "host: {modprobe: [{name: [], lines: []}]}", "must be a word"},
      {h + "host: {modprobe: [{name: a.conf, lines: []}, {name: a.conf, lines: []}]}",
       "file 'a.conf' is named twice"},
      {h + "---\nkind: Node\n", "a second document in one file"},
      {h + "host: {units: [&a x, *a]}", "an anchor (&name) is not allowed"},
      {h + "host: {units: [&a x, *a]}", "an alias (*name) is not allowed"},
      {h + "host: !!map {}", "a tag (!name) is not allowed"},
      {h + "host: {units: [", "not YAML"},
      {h + "host: {units: [*nope]}", "not YAML"},
      {h + std::string("host: \0", 7), "control byte 0x00"},
      {h + "# \xff\n", "f:3:3: byte 0xff is not UTF-8"},
      {h + "# \xe0\x80\x80\n", "byte 0xe0 is not UTF-8"},
      {h + "# \xc3", "is not UTF-8"},
      {h + "# \xed\xa0\x80", "is not UTF-8"},
      {h + "# \xf4\x90\x80\x80", "is not UTF-8"},
  };
  for (const auto& [yaml, words] : cases) {
    const auto said = bad(yaml);
    EXPECT_NE(said.find(words), std::string::npos) << yaml << "\n-> " << said << "\nexpected: " << words;
  }
}

TEST(NodeFile, ShowsNoControlBytesOfTheFileInItsMistakes) {
  const auto said = bad(std::string(head) + "\"\\e[31mred\": 1\n");
  EXPECT_EQ(said.find('\x1b'), std::string::npos);
  EXPECT_NE(said.find("\\x1b[31mred"), std::string::npos) << said;
}

TEST(NodeFile, ListsAHundredMistakesAtMost) {
  std::string yaml = head;
  for (int i = 0; i < 5000; ++i) yaml += "key" + std::to_string(i) + ": 1\n";
  const auto parsed = parse(yaml);
  const auto& mistakes = std::get<std::vector<Mistake>>(parsed);
  EXPECT_EQ(mistakes.size(), 101U);
  EXPECT_EQ(mistakes.back().what, "and more mistakes, not listed");
  std::string anchors = head + std::string("host: {units: [");
  for (int i = 0; i < 500; ++i) anchors += "&a" + std::to_string(i) + " x,";
  EXPECT_LE(std::get<std::vector<Mistake>>(parse(anchors + "]}")).size(), 100U);
}

TEST(NodeFile, RefusesHostileInputQuickly) {
  const auto start = std::chrono::steady_clock::now();
  const auto refused = [](const std::string& yaml) {
    return std::holds_alternative<std::vector<Mistake>>(parse(yaml));
  };
  EXPECT_TRUE(refused(std::string(10U << 20U, 'a')));
  EXPECT_TRUE(refused(std::string(100000, '[')));
  EXPECT_TRUE(refused(std::string(100000, '{')));
  EXPECT_TRUE(refused(std::string(100000, '-')));
  std::string dashes, questions, indented, commas = "[";
  for (int i = 0; i < 20000; ++i) {
    dashes += "- ";
    questions += "? ";
    commas += "a,";
  }
  for (int i = 0; i < 500; ++i) indented += std::string(static_cast<std::size_t>(i), ' ') + "a:\n";
  EXPECT_TRUE(refused(dashes));
  EXPECT_TRUE(refused(questions));
  EXPECT_TRUE(refused(indented));
  while (commas.size() < 900000) commas += "a,";
  EXPECT_TRUE(refused(commas + "]"));  // more values than any node file has
  EXPECT_TRUE(refused("a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\n"));
  EXPECT_TRUE(refused(std::string(head) + "metadata: {name: \"" + std::string(1000000, 'x') + "\"}"));
  EXPECT_LT(std::chrono::steady_clock::now() - start,
            std::chrono::seconds(20));  // unoptimised, with sanitizers
}

// ---- round trip
bool same(const Slice& a, const Slice& b) {
  return a.profile == b.profile && a.at == b.at && a.compute == b.compute;
}
bool same(const GpuRule& a, const GpuRule& b) {
  return a.select.all == b.select.all && a.select.index == b.select.index && a.select.uuid == b.select.uuid &&
         a.select.pci == b.select.pci && a.select.model == b.select.model &&
         a.select.pci_id == b.select.pci_id && a.mode == b.mode && a.power_limit == b.power_limit &&
         a.clocks == b.clocks && a.persistence == b.persistence && a.dynamic == b.dynamic &&
         std::equal(a.layout.begin(), a.layout.end(), b.layout.begin(), b.layout.end(),
                    [](const Slice& x, const Slice& y) { return same(x, y); });
}
bool same(const NodeFile& a, const NodeFile& b) {
  const auto& x = a.host;
  const auto& y = b.host;
  return a.name == b.name &&
         std::equal(a.gpus.begin(), a.gpus.end(), b.gpus.begin(), b.gpus.end(),
                    [](const GpuRule& p, const GpuRule& q) { return same(p, q); }) &&
         x.kernel_args == y.kernel_args && x.cpu_governor == y.cpu_governor &&
         x.fabric_manager.has_value() == y.fabric_manager.has_value() &&
         (!x.fabric_manager || (x.fabric_manager->unit == y.fabric_manager->unit &&
                                x.fabric_manager->port == y.fabric_manager->port)) &&
         std::equal(x.units.begin(), x.units.end(), y.units.begin(), y.units.end(),
                    [](const Unit& p, const Unit& q) {
                      return p.name == q.name && p.enabled == q.enabled && p.active == q.active;
                    }) &&
         std::equal(x.modprobe.begin(), x.modprobe.end(), y.modprobe.begin(), y.modprobe.end(),
                    [](const ModprobeFile& p, const ModprobeFile& q) {
                      return p.name == q.name && p.lines == q.lines;
                    }) &&
         std::equal(a.devices.begin(), a.devices.end(), b.devices.begin(), b.devices.end(),
                    [](const DeviceRule& p, const DeviceRule& q) {
                      return p.pci == q.pci && p.purpose == q.purpose && p.vfs == q.vfs;
                    }) &&
         x.vfio.has_value() == y.vfio.has_value() &&
         (!x.vfio || (x.vfio->owner == y.vfio->owner && x.vfio->mode == y.vfio->mode)) &&
         a.protect == b.protect && a.heal == b.heal;
}

NodeFile random_node(std::mt19937& random) {
  const auto luck = [&](unsigned n) { return static_cast<unsigned>(random() % n); };
  NodeFile node;
  if (luck(2) == 0) node.name = "node-" + std::to_string(luck(1000));
  for (unsigned r = luck(4); r > 0; --r) {
    GpuRule rule;
    if (luck(4) == 0) {
      rule.select.all = true;
    } else {
      rule.select.index = {luck(64)};
      if (luck(2) == 0) rule.select.uuid = {{"GPU-" + std::to_string(luck(99999))}};
      if (luck(2) == 0)
        rule.select.pci = {
            {luck(9), static_cast<std::uint8_t>(luck(256)), static_cast<std::uint8_t>(luck(32)), 0}};
      if (luck(2) == 0)
        rule.select.model = {"*\"H100\": \\ #" + std::to_string(luck(9)) + "*", "L40S\xc3\xa9"};
      if (luck(2) == 0) rule.select.pci_id = {{0x10de, static_cast<std::uint16_t>(luck(65536))}};
    }
    rule.mode = static_cast<Mode>(luck(4));
    rule.dynamic = rule.mode == Mode::mig && luck(4) == 0;
    if (rule.mode == Mode::mig && !rule.dynamic) {
      for (unsigned s = luck(5); s > 0; --s) {
        Slice slice;
        slice.profile = luck(2) == 0 ? "3g.40gb" : "1g.10gb+me";
        if (luck(3) == 0) slice.at = luck(8);
        if (luck(3) == 0) slice.compute = {"1c", "2c"};
        rule.layout.push_back(slice);
      }
    }
    if (rule.mode == Mode::passthrough) {
      node.gpus.push_back(rule);
      continue;
    }
    if (luck(2) == 0) rule.power_limit = Milliwatts(1000 + luck(9999000));
    if (luck(2) == 0) rule.clocks = ClockLock{Megahertz(1 + luck(1000)), Megahertz(1001 + luck(1000))};
    if (luck(2) == 0) rule.persistence = luck(2) == 0;
    node.gpus.push_back(rule);
  }
  for (unsigned d = luck(3); d > 0; --d) {
    DeviceRule rule;
    rule.pci = {{0, static_cast<std::uint8_t>(d), 0, 0}, {1, static_cast<std::uint8_t>(d), 3, 1}};
    rule.purpose = static_cast<DevicePurpose>(luck(3));
    if (rule.purpose == DevicePurpose::leave || luck(2) == 0)
      rule.vfs = rule.purpose == DevicePurpose::host ? 0 : luck(65536);
    node.devices.push_back(rule);
  }
  if (luck(2) == 0) node.host.vfio = Vfio{"libvirt-qemu", luck(2) == 0 ? 0660U : 0600U};
  if (luck(2) == 0) node.host.kernel_args = {"iommu=pt", "vfio-pci.ids=10de:2330"};
  if (luck(2) == 0) node.host.cpu_governor = "schedutil";
  if (luck(2) == 0)
    node.host.fabric_manager =
        FabricManager{"fm.service", luck(2) == 0 ? std::optional<unsigned>(5555) : std::nullopt};
  if (luck(2) == 0) node.host.units = {{"dcgm.service", luck(2) == 0, luck(2) == 0}, {"a@b.socket"}};
  if (luck(2) == 0) node.host.modprobe = {{"vfio.conf", {"options a b=\"c d\"", "# \\ ' : [x]"}}};
  if (luck(2) == 0) {
    if (luck(2) == 0) node.heal = Heal{static_cast<Heal::Mode>(luck(3)), luck(100), luck(64), 1 + luck(700)};
    Protect& p = node.protect.emplace();
    p.mode = luck(2) == 0 ? Protect::Mode::act : Protect::Mode::observe;
    p.ceiling = 40 + luck(71);
    p.guard = luck(31);
    p.harshest = static_cast<Protect::Action>(1 + luck(6));
    if (luck(2) == 0) p.node_power = Milliwatts(1000 + luck(20'000'000));
    if (luck(2) == 0) p.rest_power = watts(1 + luck(3000));
    if (luck(2) == 0) p.rack = Protect::Rack{watts(1000 * (1 + luck(100))), 1 + luck(8)};
    if (luck(2) == 0) p.ramp = Protect::Ramp{watts(1 + luck(9000)), {}};
    if (luck(4) == 0) p.ramp = Protect::Ramp{watts(1 + luck(9000)), watts(1 + luck(9000))};
    if (luck(2) == 0) p.cooling = watts(1 + luck(20'000));
  }
  return node;
}

TEST(NodeFile, ParsesToTheSameValueAfterBeingWritten) {
  std::mt19937 random(7);
  for (int i = 0; i < 2000; ++i) {
    const NodeFile node = random_node(random);
    const std::string yaml = to_yaml(node);
    const auto parsed = parse(yaml);
    if (const auto* mistakes = std::get_if<std::vector<Mistake>>(&parsed))
      FAIL() << render(*mistakes, "f") << yaml;
    ASSERT_TRUE(same(node, std::get<NodeFile>(parsed))) << yaml;
  }
}

TEST(Devices, AreReadWithTheirMistakes) {
  const auto all = [](const std::string& text) {
    const auto parsed = parse("apiVersion: bulkhead/v1\nkind: Node\n" + text);
    const auto* mistakes = std::get_if<std::vector<Mistake>>(&parsed);
    return mistakes != nullptr ? render(*mistakes, "f") : std::string("accepted");
  };
  EXPECT_EQ(
      all("devices:\n  - {pci: \"1b:00.0\", mode: passthrough}\n  - {pci: 0000:3b:00.0, sriov: {vfs: 4}}\n"
          "host:\n  vfio: {owner: libvirt-qemu, mode: \"0600\"}\n"),
      "accepted");
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"devices:\n  - {pci: 1b:00.0}\n", "write mode: passthrough, mode: host or sriov: {vfs: 4}"},
      {"devices:\n  - {mode: passthrough}\n", "pci"},
      {"devices:\n  - {pci: x, mode: passthrough}\n", "'x' is not a PCI address"},
      {"devices:\n  - {pci: 1b:00.0, mode: vfio-pci}\n", "write mode: passthrough"},
      {"devices:\n  - {pci: 1b:00.0, mode: host, sriov: {vfs: 2}}\n", "keeps no virtual functions"},
      {"devices:\n  - {pci: 1b:00.0, mode: host}\n  - {pci: 1b:00.0, mode: host}\n", "is named twice"},
      {"devices:\n  - {pci: 1b:00.0, sriov: {vfs: 70000}}\n", "65535"},
      {"host:\n  vfio: {owner: \"a b\"}\n", "is not a user's name"},
      {"host:\n  vfio: {mode: \"0666\"}\n", "others never"},
      {"host:\n  vfio: {mode: \"0400\"}\n", "is not a mode"},
  };
  for (const auto& [text, wanted] : cases)
    EXPECT_NE(all(text).find(wanted), std::string::npos) << text << all(text);
}

TEST(Protect, IsReadWithItsUnits) {
  const auto plain = good(std::string(head) + "protect: {}\n");
  ASSERT_TRUE(plain.protect);
  EXPECT_EQ(*plain.protect, Protect{});
  EXPECT_EQ(plain.protect->mode, Protect::Mode::observe);
  EXPECT_FALSE(good(head).protect);
  const auto full = good(std::string(head) +
                         "protect:\n  mode: act\n  ceiling: 80\n  guard: 3\n  harshest: drain\n"
                         "  node_power: 10.2kW\n  rest_power: 900 W\n  rack: {power: 0.04MW, nodes: 4}\n"
                         "  ramp: {rate: 2kW/s, burst: 1.5kW}\n  cooling: 11kW\n");
  ASSERT_TRUE(full.protect);
  const Protect expected{.mode = Protect::Mode::act,
                         .ceiling = 80,
                         .guard = 3,
                         .harshest = Protect::Action::drain,
                         .node_power = watts(10'200),
                         .rest_power = watts(900),
                         .rack = Protect::Rack{watts(40'000), 4},
                         .ramp = Protect::Ramp{watts(2000), watts(1500)},
                         .cooling = watts(11'000)};
  EXPECT_EQ(*full.protect, expected);
  EXPECT_EQ(good(std::string(head) + "protect: {ramp: 500W/s}\n").protect->ramp->per_second, watts(500));
}

TEST(HealPart, IsReadAndHasDefaults) {
  EXPECT_FALSE(good(head).heal);
  EXPECT_EQ(*good(std::string(head) + "heal: {}\n").heal, Heal{});
  const auto full =
      good(std::string(head) + "heal: {mode: act, most_an_hour: 2, keep_healthy: 0, relapse_hours: 48}\n");
  EXPECT_EQ(*full.heal, (Heal{Heal::Mode::act, 2, 0, 48}));
}

TEST(Protect, NamesEachMistakeAndItsRemedy) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"{mode: watch}", "write one of observe, act"},
      {"{mode: acts}", "did you mean 'act'?"},
      {"{ceiling: 20}", "40"},
      {"{harshest: clock}", "did you mean 'clocks'?"},
      {"{node_power: 10}", "has no unit; write 10W"},
      {"{node_power: 10kw}", "write 10kW"},
      {"{node_power: 10 horses}", "W, kW or MW"},
      {"{node_power: 99999kW}", "out of range"},
      {"{node_power: [1]}", "must be a power with its unit"},
      {"{ramp: 2kW}", "must end in /s"},
      {"{ramp: {burst: 1kW}}", "rate"},
      {"{rack: {power: 40kW}}", "nodes"},
      {"{celing: 80}", "ceiling"},
  };
  for (const auto& [text, wanted] : cases) {
    const auto said = bad(std::string(head) + "protect: " + text + "\n");
    EXPECT_NE(said.find(wanted), std::string::npos) << text << "\n" << said;
  }
  const auto all = bad(std::string(head) + "protect: {mode: x, ceiling: 1, ramp: 2, cooling: y}\n");
  for (const auto* key : {"protect.mode", "protect.ceiling", "protect.ramp", "protect.cooling"})
    EXPECT_NE(all.find(key), std::string::npos) << all;
}

TEST(Schema, DescribesEveryKeyThatTheParserTakes) {
  const Json s = schema();
  EXPECT_EQ(s["$schema"], "http://json-schema.org/draft-07/schema#");
  const auto keys = [](const Json& object) {
    std::vector<std::string> names;
    for (const auto& [key, value] : object["properties"].items()) names.push_back(key);
    EXPECT_EQ(object["additionalProperties"], false);
    return names;
  };
  using Names = std::vector<std::string>;
  EXPECT_EQ(keys(s), (Names{"apiVersion", "kind", "metadata", "gpus", "devices", "host", "protect", "heal"}));
  EXPECT_EQ(keys(s["properties"]["protect"]), (Names{"mode", "ceiling", "guard", "harshest", "node_power",
                                                     "rest_power", "rack", "ramp", "cooling"}));
  const auto& rule = s["properties"]["gpus"]["items"];
  EXPECT_EQ(keys(rule), (Names{"select", "mode", "layout", "power_limit_w", "clocks", "persistence"}));
  EXPECT_EQ(keys(rule["properties"]["select"]), (Names{"all", "index", "uuid", "pci", "model", "pci_id"}));
  EXPECT_EQ(keys(rule["properties"]["layout"]["anyOf"][0]["items"]["anyOf"][1]),
            (Names{"profile", "at", "count", "compute"}));
  const auto& host = s["properties"]["host"];
  EXPECT_EQ(keys(host),
            (Names{"kernel_args", "cpu_governor", "fabric_manager", "units", "modprobe", "vfio"}));
  EXPECT_EQ(keys(s["properties"]["devices"]["items"]), (Names{"pci", "mode", "sriov"}));
}

}  // namespace
}  // namespace bulkhead::spec
