#include "core/logs/logs.hpp"

#include <algorithm>
#include <random>
#include <set>

#include <gtest/gtest.h>

namespace bulkhead::logs {
namespace {

using namespace std::chrono_literals;
const WallTime now = WallTime(1'795'427'000'000ms);  // 2026-11-23

const Matcher& matcher() {
  static const Matcher one;
  return one;
}

TEST(LogRules, EachExampleIsFoundByItsOwnRule) {
  std::set<std::string_view> ids;
  for (const auto& rule : rules()) {
    EXPECT_TRUE(ids.insert(rule.id).second) << rule.id;
    EXPECT_FALSE(rule.examples[0].empty()) << rule.id;
    for (const auto example : rule.examples) {
      if (example.empty()) continue;
      const auto hit = matcher().match_line(example, now);
      ASSERT_TRUE(hit) << rule.id << ": " << example;
      ASSERT_NE(hit->rule, nullptr) << example;
      EXPECT_EQ(hit->rule->id, rule.id) << example;
    }
  }
}

TEST(LogFilter, FindsWhatAPlainSearchFinds) {
  const std::vector<std::string_view> words = {"NVRM: Xid (", "SXid", "is not viable", "aaab", " AER: "};
  const Filter filter(words);
  std::mt19937 random(7);
  std::string text;
  for (int i = 0; i < 4000; ++i) {
    if (random() % 9 == 0) {
      text += words[random() % words.size()];
    } else {
      text += static_cast<char>("a: ANVRMXid\n"[random() % 12]);
    }
  }
  for (std::size_t cut = 0; cut < 80; ++cut) {
    const auto part = std::string_view(text).substr(cut, text.size() - 2 * cut);
    std::set<std::pair<std::size_t, std::size_t>> expected;
    for (std::size_t w = 0; w < words.size(); ++w)
      for (auto at = part.find(words[w]); at != std::string_view::npos; at = part.find(words[w], at + 1))
        expected.emplace(w, at);
    std::set<std::pair<std::size_t, std::size_t>> wide;
    std::set<std::pair<std::size_t, std::size_t>> plain;
    filter.scan(part, [&](std::size_t w, std::size_t at) { wide.emplace(w, at); });
    filter.scan_plainly(part, [&](std::size_t w, std::size_t at) { plain.emplace(w, at); });
    ASSERT_EQ(wide, expected) << cut;
    ASSERT_EQ(plain, expected) << cut;
  }
}

TEST(LogHead, KnowsTheFormsOfKernelLogs) {
  const std::string body = "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.";
  for (const auto* head :
       {"[  123.456789] ", "[  123.456789][ T1234] ", "[  123.456789] [ T1234] ", "[  123.456789] [    C1] ",
        "[Mon Nov 23 10:00:00 2026] [ T1234] ", "[Mon Nov 23 10:00:00 2026] ", "<3>[  123.456789] ",
        "kern  :err   : [  123.456789] ", "3,1234,123456789,-;", "3,1234,123456789,-,caller=T12;",
        "2026-11-23T10:00:00,123456+00:00 ", "Nov 23 10:00:00 gpu7 kernel: ", "Nov  3 10:00:00 gpu7 kernel: ",
        "Nov 23 10:00:00 gpu7 kernel: [  123.456789] ", "2026-11-23T10:00:00.123456+01:00 gpu7 kernel: ",
        "2026-11-23T10:00:00+0000 gpu7 kernel: ", "kernel: ",
        // dmesg --human, journalctl -o short-monotonic, syslog of other languages
        "[  +0.000004] ", "[Nov23 10:00] ", "[  123.456789] kernel: ", "[  123.456789] gpu7 kernel: ",
        "Sep 06 22:24:12 kernel: ", "kwi 15 07:56:59 gpu7 kernel: ", "jan. 29 20:50:17 gpu7 kernel: ",
        "11\xe6\x9c\x88 15 14:15:47 gpu7 kernel: "}) {
    const auto line = head + body;
    const auto got = head_of(line, now);
    EXPECT_EQ(got.speaker, Speaker::kernel) << line;
    EXPECT_EQ(got.body, body) << line;
  }
  EXPECT_EQ(head_of(body, now).speaker, Speaker::unknown);
}

TEST(LogHead, AJournalAsTextIsNotVouchedFor) {
  EXPECT_TRUE(head_of("[  123.456789] NVRM: x", now).vouched);
  EXPECT_FALSE(head_of("[  123.456789] gpu7 kernel: NVRM: x", now).vouched);
  EXPECT_EQ(head_of("kwi 15 07:56:59 gpu7 app[7]: NVRM: x", now).speaker, Speaker::program);
  EXPECT_EQ(head_of("a b 15 07:56:59 gpu7 kernel: NVRM: x", now).speaker, Speaker::unknown);
  EXPECT_EQ(head_of("kwi/ 15 07:56:59 gpu7 kernel: NVRM: x", now).speaker, Speaker::unknown);
}

TEST(LogHead, GivesTimes) {
  EXPECT_EQ(head_of("[  123.456789] [x] y", now).body, "[x] y");
  EXPECT_EQ(head_of("[  123.456789] x", now).boot_us, 123'456'789);
  EXPECT_EQ(head_of("[Mon Nov 23 10:00:00 2026] x", now).wall_ms, 1'795'428'000'000);
  EXPECT_EQ(head_of("2026-11-23T11:00:00.500+01:00 h kernel: x", now).wall_ms, 1'795'428'000'500);
  // No year is written: a day far ahead is last year's.
  EXPECT_EQ(head_of("Dec 24 10:00:00 h kernel: x", now).wall_ms, 1'766'570'400'000);
  EXPECT_EQ(head_of("[Jul 09 2024 18:14:07] [ERROR] [tid 12727] detected", now).program, "nv-fabricmanager");
  EXPECT_EQ(head_of("[Jul 09 2024 18:14:07] [ERROR] [tid 12727] detected", now).body, "detected");
}

TEST(LogMatcher, AProgramThatSpeaksAsTheKernelIsForging) {
  const auto hit = matcher().match_line(
      "Nov 23 10:00:00 gpu7 logger[99]: NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.", now);
  ASSERT_TRUE(hit);
  EXPECT_TRUE(hit->forged);
  const auto posing = matcher().match_line(
      "Nov 23 10:00:00 gpu7 kernel[99]: NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.", now);
  ASSERT_TRUE(posing);
  EXPECT_TRUE(posing->forged);
}

TEST(LogMatcher, ReadsJournalRecords) {
  const auto found = matcher().match(
      R"({"_TRANSPORT":"kernel","__REALTIME_TIMESTAMP":"1795428000000000","MESSAGE":"NVRM: Xid (PCI:0000:3b:00): 31, pid=7, name=x, Ch 00000008"})"
      "\n"
      R"({"_TRANSPORT":"syslog","SYSLOG_IDENTIFIER":"kernel","MESSAGE":"NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."})"
      "\n",
      now);
  ASSERT_EQ(found.hits.size(), 2U);
  EXPECT_EQ(found.lines, 2U);
  EXPECT_FALSE(found.hits[0].forged);
  EXPECT_EQ(found.hits[0].xid->pid, 7U);
  EXPECT_EQ(found.hits[0].wall_ms, 1'795'428'000'000);
  EXPECT_TRUE(found.hits[1].forged);
}

TEST(LogMatcher, AMessageOfBytesIsNoHidingPlace) {
  std::string record = R"({"_TRANSPORT":"kernel","MESSAGE":[)";
  const std::string message = "NVRM: Xid (PCI:0000:3b:00): 31, pid=7, name=\xff\xfe, Ch 00000008";
  for (const char c : message) record += std::to_string(static_cast<unsigned char>(c)) + ",";
  record.back() = ']';
  record += '}';
  const auto found = matcher().match(record, now);
  ASSERT_EQ(found.hits.size(), 1U);
  EXPECT_EQ(found.hits[0].xid->id, 31U);
}

TEST(LogMatcher, CountsLinesAndBoundsHits) {
  std::string text;
  for (int i = 0; i < 50; ++i)
    text += "nothing\n[    1.000000] NVRM: Xid (PCI:0000:3b:00): 13, pid=1, name=a, Ch 1\n";
  const auto all = matcher().match(text, now);
  EXPECT_EQ(all.lines, 100U);
  ASSERT_EQ(all.hits.size(), 50U);
  EXPECT_EQ(all.hits[49].number, 100U);
  const auto some = matcher().match(text, now, 10);
  EXPECT_EQ(some.hits.size(), 10U);
  EXPECT_TRUE(some.cut);
}

TEST(LogMatcher, WordsOfARuleInsideANameAreNotItsLine) {
  for (const auto* line :
       {"[    1.000000] oom-kill:constraint=CONSTRAINT_NONE,task_memcg=/NVRM: GPU 0000:3b:00.0: GPU has "
        "fallen off the bus",
        "[    1.000000] audit: comm=\"NVRM: Xid (PCI:\"",
        "[    1.000000] x[1]: segfault at 0 ip 0 in NVRM: API mismatch: the client 'a' (pid 1)"}) {
    const auto hit = matcher().match_line(line, now);
    if (hit) {
      EXPECT_FALSE(hit->xid) << line;
      EXPECT_TRUE(hit->rule == nullptr || hit->rule->id == "oom.tenant") << line;
    }
  }
}

}  // namespace
}  // namespace bulkhead::logs
