#include <gtest/gtest.h>

#include "core/spec/spec.hpp"

namespace bulkhead::spec {
namespace {

std::vector<Imported> good(const std::string& yaml) {
  auto answer = import_mig_parted(yaml);
  if (const auto* mistakes = std::get_if<std::vector<Mistake>>(&answer)) {
    ADD_FAILURE() << render(*mistakes, "f");
    return {};
  }
  return std::get<std::vector<Imported>>(std::move(answer));
}
std::string bad(const std::string& yaml) {
  const auto answer = import_mig_parted(yaml);
  const auto* mistakes = std::get_if<std::vector<Mistake>>(&answer);
  return mistakes != nullptr ? render(*mistakes, "f") : "no mistake was found";
}

// The shapes of mig-parted's published default file, by hand.
constexpr const char* shapes = R"(version: v1
mig-configs:
  all-disabled:
    - devices: all
      mig-enabled: false
  all-enabled:
    - devices: all
      mig-enabled: true
      mig-devices: {}
  all-1g.10gb.me:
    - devices: all
      mig-enabled: true
      mig-devices:
        "1g.10gb+me": 1
  all-balanced:
    - device-filter: ["0x233010DE", "0x233110DE"]
      devices: all
      mig-enabled: true
      mig-devices:
        "1g.10gb": 2
        "2g.20gb": 1
        "3g.40gb": 1
    - device-filter: "0x20B710DE"
      devices: all
      mig-enabled: true
      mig-devices:
        "1g.6gb": 2
        "2g.12gb": 1
  custom-config:
    - devices: [0,1,2,3]
      mig-enabled: false
    - devices: [4]
      mig-enabled: true
      mig-devices:
        "1c.3g.40gb": 4
        "1g.24gb-me": 0
    - devices: []
      mig-enabled: false
)";

TEST(MigParted, ConfigurationsBecomeNodeFiles) {
  const auto all = good(shapes);
  ASSERT_EQ(all.size(), 5U);
  EXPECT_EQ(all[0].name, "all-disabled");
  EXPECT_TRUE(all[0].node.gpus.at(0).select.all);
  EXPECT_EQ(all[0].node.gpus.at(0).mode, Mode::exclusive);
  EXPECT_EQ(all[1].node.gpus.at(0).mode, Mode::mig);
  EXPECT_TRUE(all[1].node.gpus.at(0).layout.empty());
  EXPECT_EQ(all[2].node.gpus.at(0).layout.at(0).profile, "1g.10gb+me");
  const auto& balanced = all[3].node.gpus;
  ASSERT_EQ(balanced.size(), 2U);
  EXPECT_FALSE(balanced[0].select.all);
  EXPECT_EQ(balanced[0].select.pci_id, (std::vector<PciId>{{0x10de, 0x2330}, {0x10de, 0x2331}}));
  EXPECT_EQ(balanced[0].layout.size(), 4U);
  EXPECT_EQ(balanced[1].select.pci_id, (std::vector<PciId>{{0x10de, 0x20b7}}));
  EXPECT_TRUE(all[3].remarks.empty());
  const auto& custom = all[4];
  ASSERT_EQ(custom.node.gpus.size(), 2U);
  EXPECT_EQ(custom.node.gpus[0].select.index, (std::vector<unsigned>{0, 1, 2, 3}));
  ASSERT_EQ(custom.node.gpus[1].layout.size(), 2U);  // four compute instances, three to an instance
  EXPECT_EQ(custom.node.gpus[1].layout[0].compute, (std::vector<std::string>{"1c", "1c", "1c"}));
  EXPECT_EQ(custom.node.gpus[1].layout[1].compute, (std::vector<std::string>{"1c"}));
  EXPECT_EQ(custom.remarks.size(), 3U);
}

TEST(MigParted, NodeFilesParseToThemselves) {
  for (const auto& imported : good(shapes)) {
    const std::string yaml = to_yaml(imported.node);
    const auto parsed = parse(yaml);
    ASSERT_TRUE(std::holds_alternative<NodeFile>(parsed)) << yaml;
    EXPECT_EQ(to_yaml(std::get<NodeFile>(parsed)), yaml);
  }
}

TEST(MigParted, RemarksOnEntriesForTheSameGpu) {
  const auto all = good(R"(version: v1
mig-configs:
  two:
    - {devices: all, mig-enabled: false}
    - {devices: [0, 0], mig-enabled: true, mig-devices: {1g.10gb: 7}}
)");
  ASSERT_EQ(all.at(0).remarks.size(), 1U);
  EXPECT_NE(all[0].remarks[0].find("lines 4 and 5 can name the same GPU"), std::string::npos);
}

TEST(MigParted, RefusesWhatMigPartedRefuses) {
  struct Case {
    const char *yaml, *words;
  };
  const Case cases[] = {
      {"mig-configs: {a: [{devices: all, mig-enabled: false}]}", "the key 'version' is missing"},
      {"version: v2\nmig-configs: {a: [{devices: all, mig-enabled: false}]}", "write version: v1"},
      {"version: v1", "the key 'mig-configs' is missing"},
      {"version: v1\nmig-configs: {}", "mig-configs: must be a mapping"},
      {"version: v1\nmig-configs: {a: []}", "needs one entry at least"},
      {"version: v1\nmig-configs: {a: 3}", "must be a list"},
      {"version: v1\nmig-configs: {'../a': [{devices: all, mig-enabled: false}]}",
       "a name has letters, digits"},
      {"version: v1\nmig-configs: {a: [{devices: all, mig-enabled: false}], a: [{devices: all, mig-enabled: "
       "false}]}",
       "is given twice"},
      {"version: v1\nmig-configs: {a: [{mig-enabled: false}]}", "the key 'devices' is missing"},
      {"version: v1\nmig-configs: {a: [{devices: all}]}", "the key 'mig-enabled' is missing"},
      {"version: v1\nmig-configs: {a: [{devices: some, mig-enabled: false}]}", "is neither 'all' nor a list"},
      {"version: v1\nmig-configs: {a: [{devices: [x], mig-enabled: false}]}", "is not a whole number"},
      {"version: v1\nmig-configs: {a: [{devices: all, mig-enabled: maybe}]}", "is not true or false"},
      {"version: v1\nmig-configs: {a: [{devices: all, mig-enabled: true}]}", "mig-devices is missing"},
      {"version: v1\nmig-configs: {a: [{devices: all, mig-enabled: false, mig-devices: {1g.10gb: 1}}]}",
       "while mig-enabled is false"},
      {"version: v1\nmig-configs: {a: [{devices: all, mig-enabled: true, mig-devices: [1]}]}",
       "must be a mapping of profile names"},
      {"version: v1\nmig-configs: {a: [{devices: all, mig-enabled: true, mig-devices: {1g10gb: 1}}]}",
       "is not a MIG profile name"},
      {"version: v1\nmig-configs: {a: [{devices: all, mig-enabled: true, mig-devices: {4c.3g.40gb: 1}}]}",
       "more compute slices than its instance"},
      {"version: v1\nmig-configs: {a: [{devices: all, mig-enabled: true, mig-devices: {1g.10gb: 1, 1g.10gb: "
       "2}}]}",
       "is given twice"},
      {"version: v1\nmig-configs: {a: [{devices: all, mig-enabled: true, mig-devices: {1g.10gb: 60, 1g.20gb: "
       "60}}]}",
       "more than 64 instances"},
      {"version: v1\nmig-configs: {a: [{devices: all, mig-enabled: true, mig-devices: {1g.10gb: -1}}]}",
       "is not a whole number"},
      {"version: v1\nmig-configs: {a: [{devices: all, mig-enabled: false, device-filter: x}]}",
       "is not a device id"},
      {"version: v1\nmig-configs: {a: [{devices: all, mig-enabled: false, nodes: x}]}",
       "unknown key 'nodes'"},
      {"{", "not YAML"},
  };
  for (const auto& [yaml, words] : cases) {
    const auto said = bad(yaml);
    EXPECT_NE(said.find(words), std::string::npos) << yaml << "\n-> " << said;
  }
}

}  // namespace
}  // namespace bulkhead::spec
