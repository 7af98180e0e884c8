#include "core/diagnose/diagnose.hpp"

#include <gtest/gtest.h>

namespace bulkhead::diagnose {
namespace {

using namespace std::chrono_literals;
const WallTime now = WallTime(1'795'427'000'000ms);

std::vector<Evidence> read(std::string_view text, std::string_view file = "dmesg") {
  static const logs::Matcher matcher;
  std::vector<Evidence> out;
  auto found = matcher.match(text, now);
  for (auto& hit : found.hits) out.push_back(from(std::move(hit), file));
  return out;
}

TEST(Diagnose, WhatAFaultDragsAlongIsPartOfIt) {
  const auto got =
      diagnose(read("[  1.000000] NVRM: Xid (PCI:0000:3b:00): 31, pid=7, name=x, Ch 00000010, intr 0\n"
                    "[  1.100000] NVRM: Xid (PCI:0000:3b:00): 45, pid=7, name=x, Ch 00000010\n"
                    "[  1.200000] NVRM: Xid (PCI:0000:3b:00): 43, pid=7, name=x, Ch 00000010\n"));
  ASSERT_EQ(got.incidents.size(), 1U);
  EXPECT_EQ(got.incidents[0].xid, 31U);
  EXPECT_EQ(got.incidents[0].count, 1U);
  EXPECT_EQ(got.incidents[0].evidence_lines, 3U);
}

TEST(Diagnose, TheSameEventOfTwoFilesAndNvmlCountsOnce) {
  auto evidence = read(
      "2026-11-23T10:00:00,000000+00:00 NVRM: Xid (PCI:0000:3b:00): 79, pid=7, name=x, GPU has fallen off "
      "the bus.\n");
  auto other = read(
      "2026-11-23T10:00:00+0000 h kernel: NVRM: Xid (PCI:0000:3b:00): 79, pid=7, name=x, GPU has fallen off "
      "the bus.\n",
      "syslog");
  const auto at = *evidence[0].wall_ms;
  evidence.push_back(std::move(other.at(0)));
  evidence.push_back(event(Source::nvml, *evidence[0].at, 79, std::nullopt, at + 100));
  const auto got = diagnose(std::move(evidence));
  ASSERT_EQ(got.incidents.size(), 1U);
  EXPECT_EQ(got.incidents[0].count, 1U);
  EXPECT_EQ(got.incidents[0].confidence, Confidence::high);
  EXPECT_EQ(got.incidents[0].blame, Blame::innocent);
}

// As an H100 with driver 580.159.04 wrote them for one misaligned store.
TEST(Diagnose, TheLinesOfOneGraphicsExceptionAreOneEventOfItsProcess) {
  auto evidence = read(
      "2026-11-23T10:00:00,000000+00:00 NVRM: Xid (PCI:0000:00:06): 13, Graphics SM Warp Exception on (GPC "
      "1, "
      "TPC 4, SM 0): Misaligned Address\n"
      "2026-11-23T10:00:00,001000+00:00 NVRM: Xid (PCI:0000:00:06): 13, Graphics Exception: ESR "
      "0x519730=0x500000f 0x519734=0x0 0x519728=0x1f81fb60 0x51972c=0x1174\n"
      "2026-11-23T10:00:00,003000+00:00 NVRM: Xid (PCI:0000:00:06): 13, pid=450, name=cuda_fault, Graphics "
      "Exception: channel 0x0000001e, Class 0000cbc0, Offset 00000000, Data 00000000\n");
  ASSERT_EQ(evidence.size(), 3U);
  evidence[2].tenant = "a";
  evidence.push_back(event(Source::nvml, *evidence[0].at, 13, std::nullopt, *evidence[0].wall_ms - 5));
  const auto got = diagnose(std::move(evidence));
  ASSERT_EQ(got.incidents.size(), 1U);
  EXPECT_EQ(got.incidents[0].count, 1U);
  EXPECT_EQ(got.incidents[0].charged, "a");
  EXPECT_EQ(got.incidents[0].confidence, Confidence::high);
}

TEST(Diagnose, EventsOfTwoTenantsThatCrossAreCountedOnceEach) {
  std::string text;
  for (int i = 0; i < 200; ++i)
    text += "2026-11-23T10:00:00," + std::to_string(100000 + i * 1000) +
            "+00:00 NVRM: Xid (PCI:0000:3b:00): 31, pid=" + std::to_string(7 + i % 2) + ", name=x, Ch 1\n";
  auto evidence = read(text);
  ASSERT_EQ(evidence.size(), 200U);
  for (std::size_t i = 0; i < 200; ++i) {
    evidence[i].tenant = i % 2 == 0 ? "a" : "b";
    // The driver's come before and after the kernel's.
    evidence.push_back(event(Source::nvml, *evidence[i].at, 31, std::nullopt,
                             *evidence[i].wall_ms + (i % 3 == 0 ? 150 : -20)));
  }
  const auto got = diagnose(std::move(evidence));
  ASSERT_EQ(got.incidents.size(), 2U);
  EXPECT_EQ(got.incidents[0].count, 100U);
  EXPECT_EQ(got.incidents[1].count, 100U);
}

TEST(Diagnose, NobodyIsChargedForAnotherCode) {
  for (const auto& row : xid::catalogue()) {
    auto evidence = read("[  1.000000] NVRM: Xid (PCI:0000:3b:00): " + std::to_string(row.id) +
                         ", pid=7, name=x, words\n");
    ASSERT_EQ(evidence.size(), 1U);
    evidence[0].tenant = "a";
    for (const auto& in : diagnose(std::move(evidence)).incidents)
      if (row.attribution != xid::Attribution::channel) {
        EXPECT_TRUE(in.charged.empty()) << row.id;
      }
  }
}

TEST(Diagnose, ManyTenantsOnOneGpuAreHardwareAndOneOnManyIsItsApplication) {
  auto many = read(
      "[  1.000000] NVRM: Xid (PCI:0000:3b:00): 31, pid=7, name=x, Ch 1\n[ 99.000000] NVRM: Xid "
      "(PCI:0000:3b:00): 31, pid=8, name=y, Ch 1\n");
  many[0].tenant = "a";
  many[1].tenant = "b";
  for (const auto& in : diagnose(std::move(many)).incidents) {
    EXPECT_EQ(in.blame, Blame::hardware);
    EXPECT_TRUE(in.charged.empty());
  }
  auto one = read(
      "[  1.000000] NVRM: Xid (PCI:0000:3b:00): 31, pid=7, name=x, Ch 1\n[ 99.000000] NVRM: Xid "
      "(PCI:0000:5e:00): 31, pid=8, name=x, Ch 1\n");
  for (auto& e : one) e.tenant = "a";
  for (const auto& in : diagnose(std::move(one)).incidents) EXPECT_EQ(in.charged, "a");
}

// Of an H100 that two tenants shared (580.159.04): the driver put the other's arbiter to what the SM said,
// and the one who faulted to the line of the channel.
TEST(Diagnose, TheLineOfTheChannelSaysWhoFaultedAndTheSmsMayNot) {
  auto evidence = read(
      "[   35.982286] NVRM: Xid (PCI:0000:00:06): 13, pid=465, name=bulkhead-arbit, Graphics SM Warp "
      "Exception on "
      "(GPC 1, TPC 4, SM 0): Misaligned Address\n"
      "[   35.983835] NVRM: Xid (PCI:0000:00:06): 13, pid=465, name=bulkhead-arbit, Graphics Exception: ESR "
      "0x519730=0x500000f 0x519734=0x0 0x519728=0x1f81fb60 0x51972c=0x1174\n"
      "[   35.985421] NVRM: Xid (PCI:0000:00:06): 13, pid=557, name=cuda_fault, Graphics Exception: channel "
      "0x0000001e, "
      "Class 0000cbc0, Offset 00000000, Data 00000000\n"
      "[   36.569783] NVRM: Xid (PCI:0000:00:06): 13, Graphics SM Warp Exception on (GPC 1, TPC 4, SM 0): "
      "Misaligned Address\n"
      "[   36.571321] NVRM: Xid (PCI:0000:00:06): 13, Graphics Exception: ESR 0x519730=0x500000f "
      "0x519734=0x0\n"
      "[   36.572913] NVRM: Xid (PCI:0000:00:06): 13, pid=563, name=cuda_fault, Graphics Exception: channel "
      "0x0000001e, "
      "Class 0000cbc0, Offset 00000000, Data 00000000\n");
  ASSERT_EQ(evidence.size(), 6U);
  std::int64_t at = 1'000'000;
  for (auto& e : evidence) {
    e.wall_ms = at += 2;
    if (e.pid) e.tenant = *e.pid == 465 ? "tenant a, lease 1" : "tenant b, lease 2";
    if (e.number == evidence[3].number) at += 600;
  }
  for (const std::size_t i : {0U, 1U, 2U, 5U})  // NVML tells of each line with a pid
    evidence.push_back(event(Source::nvml, *evidence[0].at, 13, std::nullopt, *evidence[i].wall_ms + 1));
  const auto got = diagnose(std::move(evidence));
  ASSERT_EQ(got.incidents.size(), 1U);
  EXPECT_EQ(got.incidents[0].tenants, std::vector<std::string>{"tenant b, lease 2"});
  EXPECT_EQ(got.incidents[0].charged, "tenant b, lease 2");
  EXPECT_EQ(got.incidents[0].blame, Blame::application);
}

TEST(Diagnose, OneTenantUnderTwoNamesIsNotTwoTenants) {
  const auto blame = [](const char* first, const char* second) {
    auto both = read(
        "[  1.000000] NVRM: Xid (PCI:0000:3b:00): 31, pid=7, name=x, Ch 1\n[ 99.000000] NVRM: Xid "
        "(PCI:0000:3b:00): 31, pid=8, name=y, Ch 1\n");
    both[0].tenant = first;
    both[1].tenant = second;
    return diagnose(std::move(both)).incidents.at(0).blame;
  };
  EXPECT_EQ(blame("tenant b, lease 2", "tenant b, lease 7"), Blame::application);
  EXPECT_EQ(blame("tenant b, lease 2", "tenant c, lease 3"), Blame::hardware);
  // As on an H100: a process that was gone too soon is known by its cgroup alone.
  EXPECT_EQ(blame("tenant b, lease 2", "/system.slice/x.service"), Blame::application);
  EXPECT_EQ(
      blame("/user.slice/user-7.slice/session-1.scope", "/user.slice/user-7.slice/user@7.service/app.slice"),
      Blame::application);
  EXPECT_EQ(blame("/user.slice/user-7.slice/session-1.scope", "/user.slice/user-8.slice/session-2.scope"),
            Blame::hardware);
  EXPECT_EQ(blame("/slurm/uid_7/job_1/step_0", "/slurm/uid_7/job_2/step_0"), Blame::application);
  EXPECT_EQ(blame("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podA.slice/cri-1.scope",
                  "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podA.slice/cri-2.scope"),
            Blame::application);
  EXPECT_EQ(blame("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podA.slice/cri-1.scope",
                  "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podB.slice/cri-2.scope"),
            Blame::hardware);
}

TEST(Diagnose, TheDriversFlagsGoBeforeTheTable) {
  const auto reset = diagnose(
      read("[  1.000000] NVRM: Xid (PCI:0000:01:00): 94, pid=7, Contained: PMU. RST: Yes, D-RST: No\n"));
  EXPECT_EQ(reset.incidents.at(0).remedy, heal::Act::reset_gpu);
  EXPECT_EQ(reset.incidents.at(0).blast, Blast::gpu);
  const auto not_needed = diagnose(
      read("[  1.000000] NVRM: Xid (PCI:0000:01:00): 95, pid=7, Uncontained: FBHUB. RST: No, D-RST: No\n"));
  EXPECT_EQ(not_needed.incidents.at(0).remedy, heal::Act::end_process);
  const auto node =
      diagnose(read("[  1.000000] NVRM: Xid (PCI:0000:01:00): 31, pid=7, name=x, Ch 1\n"
                    "[  1.500000] NVRM: Xid (PCI:0000:01:00): 154, GPU recovery action changed from 0x0 "
                    "(None) to 0x2 (Node Reboot Required)\n"));
  EXPECT_EQ(node.incidents.at(0).blast, Blast::node);
  EXPECT_EQ(node.incidents.at(0).remedy, heal::Act::reboot);
}

TEST(Diagnose, NoneClosesAndOutOfMemoryExplains) {
  const auto closed =
      diagnose(read("[  1.000000] NVRM: Xid (PCI:0000:01:00): 119, pid=7, name=x, Timeout\n"
                    "[ 90.500000] NVRM: Xid (PCI:0000:01:00): 154, GPU recovery action changed from 0x1 (GPU "
                    "Reset Required) to 0x0 (None)\n"));
  ASSERT_EQ(closed.incidents.size(), 1U);
  EXPECT_TRUE(closed.incidents[0].closed);
  const auto oom = diagnose(read(
      "[  1.000000] "
      "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),task_memcg=/a,task=python,pid=7007,uid=1000\n"
      "[  1.100000] NVRM: Xid (PCI:0000:01:00): 45, pid=7007, name=python, Ch 1\n"));
  EXPECT_TRUE(oom.incidents.empty());
  EXPECT_EQ(oom.notes.size(), 1U);
}

// NVIDIA/open-gpu-kernel-modules 595.45.04: the units are those of error_cont.h, what each kills stands in
// kern_gpu_error_cont_ga100.c and kern_gpu_error_cont_gb100.c.
TEST(Diagnose, AContainedErrorReachesAsFarAsItsUnitSays) {
  struct Case {
    std::string_view text;
    Blast blast;
    heal::Act remedy;
  };
  for (const auto& c : {
           Case{"94, pid=7, name=x, Contained: SM (0x1). RST: No, D-RST: No", Blast::process,
                heal::Act::end_process},
           Case{"94, pid=7, name=x, Contained: CE User Channel (0x9). RST: No, D-RST: No", Blast::process,
                heal::Act::end_process},
           Case{"94, pid=7, name=x, Contained: LTC GPC (0x2, 0x1). RST: No, D-RST: No", Blast::slice,
                heal::Act::end_process},
           Case{"94, pid=7, name=x, Contained: PCIE Ingress. RST: No, D-RST: No", Blast::slice,
                heal::Act::end_process},
           Case{"94, pid=7, name=x, Contained: DED CBC (0x2, 0x1). physAddr: 0x00012000 RST: No, D-RST: Yes",
                Blast::gpu, heal::Act::reset_gpu},
           Case{"94, pid=7, name=x, Contained: GSP. RST: Yes, D-RST: No", Blast::gpu, heal::Act::reset_gpu},
           Case{"95, pid=7, name=x, Uncontained: LTC TAG (0x2, 0x1). RST: Yes, D-RST: No", Blast::gpu,
                heal::Act::reset_gpu},
           Case{"95, pid=7, name=x, Uncontained: FBHUB. RST: No, D-RST: No", Blast::gpu,
                heal::Act::end_process},
           Case{"94, pid=7, name=x, Contained ECC error", Blast::process, heal::Act::end_process},
       }) {
    const auto line = "[  1.000000] NVRM: Xid (PCI:0000:01:00): " + std::string(c.text) + "\n";
    const auto got = diagnose(read(line));
    ASSERT_EQ(got.incidents.size(), 1U) << line;
    EXPECT_EQ(got.incidents[0].blast, c.blast) << line << got.incidents[0].blast_why;
    EXPECT_EQ(got.incidents[0].remedy, c.remedy) << line;
    EXPECT_TRUE(got.incidents[0].charged.empty());
  }
  // Under MIG the instance is in the line; a unit of one address space still ends no more than that.
  const auto mig =
      diagnose(read("[  1.000000] NVRM: Xid (PCI:0000:01:00 GPU-I:05): 94, pid=7194, Contained: CE User "
                    "Channel (0x9). RST: "
                    "No, D-RST: No\n"));
  EXPECT_EQ(mig.incidents.at(0).blast, Blast::process);
  EXPECT_EQ(mig.incidents.at(0).gpu_instance, 5U);
  const auto whole =
      diagnose(read("[  1.000000] NVRM: Xid (PCI:0000:01:00 GPU-I:05): 94, pid=7194, Contained: DED CBC "
                    "(0x1, 0x0). RST: No, "
                    "D-RST: Yes\n"));
  EXPECT_EQ(whole.incidents.at(0).blast, Blast::slice);
  // A unit that a newer driver may print.
  const auto strange =
      diagnose(read("[  1.000000] NVRM: Xid (PCI:0000:01:00 GPU-I:05): 94, pid=7, Contained: NEW UNIT. RST: "
                    "No, D-RST: No\n"));
  EXPECT_EQ(strange.incidents.at(0).blast, Blast::slice);
  // Two of one minute: the wider of them.
  const auto two = diagnose(
      read("[  1.000000] NVRM: Xid (PCI:0000:01:00): 94, pid=7, Contained: SM (0x1). RST: No, D-RST: No\n"
           "[  2.000000] NVRM: Xid (PCI:0000:01:00): 94, pid=7, Contained: LTC GPC (0x2, 0x1). RST: No, "
           "D-RST: No\n"));
  ASSERT_EQ(two.incidents.size(), 1U);
  EXPECT_EQ(two.incidents[0].blast, Blast::slice);
}

// NVIDIA's Xid catalogue: 63 is IGNORE, 64 RESET_GPU, WORKFLOW_XID_48 drains and resets where a remap came
// with it.
TEST(Diagnose, RemappingDecidesAboutAnUncorrectableError) {
  const auto alone =
      diagnose(read("[  1.000000] NVRM: Xid (PCI:0000:01:00): 63, Row Remapper: New row marked\n"));
  EXPECT_EQ(alone.incidents.at(0).remedy, heal::Act::none);
  const auto failed = diagnose(read("[  1.000000] NVRM: Xid (PCI:0000:01:00): 64, Row Remapper: failed\n"));
  EXPECT_EQ(failed.incidents.at(0).remedy, heal::Act::reset_gpu);
  const auto both =
      diagnose(read("[  1.000000] NVRM: Xid (PCI:0000:01:00): 48, DBE at partition 1\n"
                    "[  1.200000] NVRM: Xid (PCI:0000:01:00): 63, Row Remapper: New row marked\n"));
  ASSERT_EQ(both.incidents.size(), 1U);
  EXPECT_EQ(both.incidents[0].remedy, heal::Act::reset_gpu);
  EXPECT_NE(both.incidents[0].advice.find("let running jobs end"), std::string::npos);
}

// ctrl2080gpu.h and nvml.h: NV2080_CTRL_GPU_RECOVERY_ACTION, 0 to 5. What the driver asks for goes before
// every table.
TEST(Diagnose, EachRecoveryActionOfTheDriver) {
  struct Case {
    unsigned action;
    Blast blast;
    heal::Act remedy;
  };
  for (const auto& c : {Case{1, Blast::gpu, heal::Act::reset_gpu}, Case{2, Blast::node, heal::Act::reboot},
                        Case{3, Blast::partition, heal::Act::none}, Case{4, Blast::gpu, heal::Act::reset_gpu},
                        Case{5, Blast::node, heal::Act::none}, Case{9, Blast::gpu, heal::Act::quarantine}}) {
    const auto got = diagnose(read(
        "[  1.000000] NVRM: Xid (PCI:0000:01:00): 94, pid=7, Contained: SM (0x1). RST: No, D-RST: No\n"
        "[  1.500000] NVRM: Xid (PCI:0000:01:00): 154, GPU recovery action changed from 0x0 (None) to 0x" +
        std::to_string(c.action) + " (words)\n"));
    ASSERT_EQ(got.incidents.size(), 1U) << c.action;
    EXPECT_EQ(got.incidents[0].blast, c.blast) << c.action;
    EXPECT_EQ(got.incidents[0].remedy, c.remedy) << c.action;
  }
}

// NVIDIA's Xid catalogue, WORKFLOW_NVLINK_ERR, and the line of NVSentinel's tests.
TEST(Diagnose, TheRegistersOfAnNvlinkErrorDecide) {
  const auto with = [](std::string_view registers) {
    return diagnose(read("[  1.000000] NVRM: Xid (PCI:0000:b8:00): 74, pid='<unknown>', name=<unknown>, "
                         "NVLink: fatal "
                         "error detected on link 14(" +
                         std::string(registers) + ")\n"))
        .incidents.at(0);
  };
  EXPECT_EQ(with("0x10000, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0").remedy, heal::Act::reset_gpu);
  EXPECT_EQ(with("0x800001, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0").remedy, heal::Act::none)
      << "bits 0 and 23: ignored";
  EXPECT_EQ(with("0x800001, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0").severity, xid::Severity::info);
  EXPECT_EQ(with("0x100002, 0x0, 0x0, 0x30000, 0x0, 0x0, 0x0").remedy, heal::Act::none) << "a consequence";
  EXPECT_EQ(with("0x0, 0x0, 0x0, 0x40000, 0x0, 0x0, 0x0").remedy, heal::Act::reset_gpu)
      << "register 4 bit 18";
  EXPECT_EQ(with("0x1, 0x0, 0x0, 0x0, 0x80, 0x0, 0x0").remedy, heal::Act::reset_gpu)
      << "a bit nobody explains";
}

// The second sheet of the catalogue; 151 is a virtual machine's, 155 to 158 reset.
TEST(Diagnose, LinksOfTheFifthGenerationAreDecoded) {
  const auto down =
      diagnose(read("[  1.000000] NVRM: Xid (PCI:0018:01:00): 149, NETIR_LINK_EVT Fatal XC0 i0 Link 08 "
                    "(0x004505c6 0x00000000 "
                    "0x00000000 0x00000000 0x00000000 0x00000000)\n"));
  EXPECT_EQ(down.incidents.at(0).remedy, heal::Act::reset_gpu);
  EXPECT_EQ(down.incidents.at(0).blast, Blast::gpu);
  const auto minor = diagnose(read(
      "[  1.000000] NVRM: Xid (PCI:0018:01:00): 146, TLW_RX Nonfatal XC0 i0 Link 08 (0x0000000a 0x00000001 "
      "0x00000000 0x00000000 0x00000000 0x00000000)\n"));
  EXPECT_EQ(minor.incidents.at(0).remedy, heal::Act::none);
}

// error_nvswitch.c prints "Fatal", "Non-fatal" or "Correctable" with a link; Fabric Manager User Guide,
// appendix of SXids.
TEST(Diagnose, WhatASwitchPrintsGoesBeforeTheGuide) {
  const auto with = [](std::string_view text) {
    return diagnose(
               read("[  1.000000] nvidia-nvswitch1: SXid (PCI:0000:06:00.0): " + std::string(text) + "\n"))
        .incidents.at(0);
  };
  EXPECT_EQ(with("20034, Fatal, Link 48 LTSSM Fault Up").blast, Blast::partition);
  EXPECT_EQ(with("20034, Non-fatal, Link 48 LTSSM Fault Up").remedy, heal::Act::none);
  EXPECT_EQ(with("22013, Non-fatal, Link 44 Minion Link DLREQ interrupt").remedy, heal::Act::none);
  EXPECT_EQ(with("22013, Fatal, Link 44 Minion Link DLREQ interrupt").remedy, heal::Act::reset_gpu);
  EXPECT_EQ(with("99998, Fatal, Link 3 words of a newer driver").severity, xid::Severity::critical);
  EXPECT_EQ(with("99998, Non-fatal, Link 3 words of a newer driver").severity, xid::Severity::unknown);
}

}  // namespace
}  // namespace bulkhead::diagnose
