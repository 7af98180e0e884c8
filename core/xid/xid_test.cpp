#include "core/xid/xid.hpp"

#include <gtest/gtest.h>

namespace bulkhead::xid {
namespace {

TEST(XidCatalogue, IsOrderedAndNamesOnlyBucketsThatExist) {
  unsigned before = 0;
  for (const auto& row : catalogue()) {
    EXPECT_GT(row.id, before);
    before = row.id;
    EXPECT_FALSE(row.mnemonic.empty()) << row.id;
    for (const auto bucket : {row.immediate, row.investigate})
      EXPECT_TRUE(bucket.empty() || !bucket_text(bucket).empty()) << row.id << ' ' << bucket;
    EXPECT_FALSE(row.sources.empty()) << row.id;
    if (!row.example.empty()) {
      const auto line = parse(row.example);
      ASSERT_TRUE(line) << row.example;
      EXPECT_EQ(line->id, row.id) << row.example;
    }
  }
  EXPECT_EQ(find(31)->description, "GPU memory page fault");
  EXPECT_EQ(find(9999), nullptr);
}

TEST(XidCatalogue, OfSwitchesIsOrdered) {
  unsigned before = 0;
  for (const auto& row : switch_catalogue()) {
    EXPECT_GT(row.id, before);
    before = row.id;
  }
  EXPECT_EQ(find_switch(20034)->kind, SwitchKind::fatal_port);
}

TEST(XidCatalogue, EveryPatternOfNvlinkHasThirtyTwoBits) {
  for (const auto& row : link_catalogue()) {
    EXPECT_EQ(row.intr_v1.size(), 32U) << row.sub;
    EXPECT_EQ(row.intr_v2.size(), 32U) << row.sub;
  }
}

TEST(XidLine, GivesPidNameAndMessage) {
  const auto line =
      parse("NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python, GPU has fallen off the bus.");
  ASSERT_TRUE(line);
  EXPECT_EQ(line->gpu.str(), "0000:3b:00.0");
  EXPECT_EQ(line->id, 79U);
  EXPECT_EQ(line->pid, 1234U);
  EXPECT_EQ(line->name, "python");
  EXPECT_EQ(line->message, "GPU has fallen off the bus.");
}

TEST(XidLine, TakesMigTags) {
  const auto line =
      parse("NVRM: Xid (PCI:0000:01:00 GPU-I:05 GPU-CI:00): 31, pid=7194, name=python3, Ch 00000010");
  ASSERT_TRUE(line);
  EXPECT_EQ(line->gpu_instance, 5U);
  EXPECT_EQ(line->compute_instance, 0U);
}

TEST(XidLine, TakesOldFormsAndUnknownProcesses) {
  EXPECT_EQ(parse("NVRM: Xid (0000:03:00): 14, Channel 00000001")->id, 14U);
  const auto line =
      parse("NVRM: Xid (PCI:0000:05:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.");
  ASSERT_TRUE(line);
  EXPECT_FALSE(line->pid);
  EXPECT_EQ(line->message, "GPU has fallen off the bus.");
}

TEST(XidLine, ANameWithCommasDoesNotReachTheMessage) {
  const auto line =
      parse("NVRM: Xid (PCI:0000:18:00): 45, pid=99, name=a,b c, Ch 00000008 caused by previous Xid 94");
  ASSERT_TRUE(line);
  EXPECT_EQ(line->name, "a,b c");
  EXPECT_EQ(line->previous, 94U);
  const auto sly = parse("NVRM: Xid (PCI:0000:18:00): 31, pid=99, name=x, y, z, Ch 00000008, intr 0");
  ASSERT_TRUE(sly);
  EXPECT_EQ(sly->name, "x, y, z");
}

TEST(XidLine, WordsInTheMiddleAreNotALine) {
  EXPECT_FALSE(parse("oom-kill: task=NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."));
  EXPECT_FALSE(parse("NVRM: Xid (PCI:0000:3b:00): 79x"));
  EXPECT_FALSE(parse("NVRM: Xid (PCI:0000:3b:0"));
  EXPECT_FALSE(parse("NVRM: Xid (PCI:0000:3b:40): 79"));
  EXPECT_FALSE(parse("NVRM: Xid (PCI:0000:3b:00): 99999"));
}

TEST(XidLine, FlagsAreReadFromTheEnd) {
  const auto line = parse(
      "NVRM: Xid (PCI:0000:01:00 GPU-I:05): 94, pid=7194, Contained: CE User Channel (0x9). RST: No, D-RST: "
      "Yes");
  ASSERT_TRUE(line);
  const auto held = containment(*line);
  ASSERT_TRUE(held);
  EXPECT_TRUE(held->contained);
  EXPECT_EQ(held->unit, "CE User Channel");
  EXPECT_FALSE(held->reset);
  EXPECT_TRUE(held->drain_and_reset);
  const auto other = parse(
      "NVRM: Xid (PCI:0000:01:00): 95, pid=1, name=RST: Yes, D-RST, Uncontained: FBHUB. RST: No, D-RST: No");
  ASSERT_TRUE(other);
  EXPECT_FALSE(containment(*other)->contained);
  EXPECT_FALSE(containment(*other)->reset);
}

TEST(XidLine, SaysWhatTheDriverWantsDone) {
  const auto line = parse(
      "NVRM: Xid (PCI:0008:01:00): 154, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset "
      "Required)");
  ASSERT_TRUE(line);
  EXPECT_EQ(recovery(*line)->to, 1U);
  EXPECT_EQ(recovery(*line)->to_text, "GPU Reset Required");
}

TEST(XidLine, DecodesNvlink) {
  const auto line = parse(
      "NVRM: Xid (PCI:0018:01:00): 149, NETIR_LINK_EVT Fatal XC0 i0 Link 08 (0x004505c6 0x00000000 "
      "0x00000000 "
      "0x00000000 0x00000000 0x00000000)");
  ASSERT_TRUE(line);
  const auto fault = link_fault(*line);
  ASSERT_TRUE(fault);
  EXPECT_EQ(fault->link, 8);
  EXPECT_EQ(fault->sub, "NETIR_LINK_EVT");
  EXPECT_EQ(fault->intr_info, 0x004505c6U);
  ASSERT_NE(fault->row, nullptr) << "the catalogue has both names of the unit in one cell";
  EXPECT_EQ(fault->row->immediate, "RESET_GPU");
  for (const std::string_view unit : {"NETIR_LINK_DOWN", "NETIR_LINK_EVT/NETIR_LINK_DOWN"}) {
    const auto text = "NVRM: Xid (PCI:0018:01:00): 149, " + std::string(unit) +
                      " Fatal XC0 i0 Link 08 (0x00400011 0x00000000 0x00000000)";
    const auto renamed = parse(text);
    ASSERT_TRUE(renamed);
    EXPECT_NE(link_fault(*renamed)->row, nullptr) << unit;
  }
  const auto strange =
      parse("NVRM: Xid (PCI:0018:01:00): 149, NETIR_LINK_EVTS Fatal XC0 i0 Link 08 (0x004505c6 0x00000000)");
  ASSERT_TRUE(strange);
  EXPECT_EQ(link_fault(*strange)->row, nullptr) << "a unit that the catalogue does not have";
  const auto old = parse(
      "NVRM: Xid (PCI:0000:b8:00): 74, pid='<unknown>', name=<unknown>, NVLink: fatal error detected on link "
      "14(0x10000, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0)");
  ASSERT_TRUE(old);
  EXPECT_NE(nvlink4_words(*old).find("register 1 bit 16"), std::string::npos);
}

TEST(SxidLine, OnlyTheFirstOfOneErrorCounts) {
  const auto first = parse_switch(
      "nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 28006, Non-fatal, Link 46 MC TS crumbstore MCTO (First)");
  ASSERT_TRUE(first);
  EXPECT_TRUE(first->counts);
  EXPECT_EQ(first->link, 46U);
  EXPECT_EQ(first->id, 28006U);
  const auto second = parse_switch(
      "nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 28006, Severity 0 Engine instance 46 Sub-engine instance "
      "00");
  ASSERT_TRUE(second);
  EXPECT_FALSE(second->counts);
}

}  // namespace
}  // namespace bulkhead::xid
