#include "cli/top_page.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <clocale>

namespace bulkhead::cli::top {
namespace {

using sample::Signal;
using testing::HasSubstr;
using testing::Not;

constexpr std::uint64_t second = 1'000'000'000, now = 1'000 * second;

class TopPage : public testing::Test {
 protected:
  TopPage() { std::setlocale(LC_CTYPE, "C.UTF-8"); }
  ~TopPage() override { std::setlocale(LC_CTYPE, "C"); }

  static void set(sample::Values& values, Signal signal, double number, std::uint64_t at = now) {
    values[static_cast<std::size_t>(signal)] = {.number = number, .at_ns = at};
  }
  static Gpu gpu(unsigned index) {
    Gpu out;
    out.seen.index = index;
    out.seen.uuid = {"GPU-" + std::to_string(index)};
    out.seen.name = "NVIDIA H100 80GB HBM3";
    out.seen.state = sample::State::sampling;
    out.memory_total = 80ULL << 30U;
    set(out.seen.values, Signal::power, 350 + index);
    set(out.seen.values, Signal::power_limit, 700);
    set(out.seen.values, Signal::temperature, 55);
    set(out.seen.values, Signal::sm, 42);
    set(out.seen.values, Signal::reasons, 0);
    return out;
  }
  static View host(unsigned gpus) {
    View view{.now_ns = now, .time = "2026-11-23T10:00:00.000Z", .host = "node", .processes_known = true};
    for (unsigned i = 0; i < gpus; ++i) view.gpus.push_back(gpu(i));
    return view;
  }
  static std::string text(const View& view, const Looking& looking) {
    return plain(Context{}, draw(view, looking));
  }
};

TEST_F(TopPage, FillsTheScreenExactlyAtEverySize) {
  View view = host(8);
  for (std::size_t i = 0; i < 8; ++i)
    for (unsigned slice = 0; slice < 7; ++slice)
      view.parts.push_back(
          {.gpu = i, .instance = slice, .profile = "1g.10gb", .tenant = "a-tenant-with-a-long-name"});
  view.alarms.assign(30, {Level::critical, 3U, std::string(300, 'x'), {}});
  for (const Screen screen : {Screen::all, Screen::gpu, Screen::alarms, Screen::help}) {
    for (unsigned width = 40; width <= 240; width += 20) {
      for (unsigned height = 8; height <= 60; height += 4) {
        const Page page = draw(view, {.width = width, .height = height, .screen = screen, .chosen = 7});
        ASSERT_EQ(page.lines.size(), height);
        for (const Line& line : page.lines) {
          std::string all;
          for (const Span& span : line.spans) all += span.text;
          EXPECT_TRUE(fit(all, width, true).starts_with(all)) << width << "x" << height << ": " << all;
        }
      }
    }
  }
}

TEST_F(TopPage, NamesCannotMoveTheCursorNorTurnTheLine) {
  View view = host(1);
  view.parts.push_back({.gpu = 0,
                        .profile = "whole",
                        .tenant = "\033[2Jx",
                        .processes = {{7,
                                       "a\n\xe2\x80\xae"
                                       "b\xff",
                                       {}}}});
  const std::string seen = text(view, {.width = 200, .height = 30});
  EXPECT_THAT(seen, HasSubstr("?[2Jx"));
  EXPECT_THAT(seen, HasSubstr("a??b? [7]"));
  EXPECT_THAT(seen, Not(HasSubstr("\033")));
}

TEST_F(TopPage, WideLettersTakeTheirTwoColumns) {
  EXPECT_EQ(fit("日本", 6, true), "日本  ");
  EXPECT_EQ(fit("日本語", 5, true), "日本~");
  EXPECT_EQ(fit("日本", 6, false), "??    ");
}

TEST_F(TopPage, AHungGpuSaysInWhatSinceWhenAndWhatItSaidLast) {
  View view = host(2);
  view.gpus[1].seen.state = sample::State::hung;
  view.gpus[1].seen.call = "nvmlDeviceGetTemperature";
  view.gpus[1].seen.since_ns = now - 12 * second;
  set(view.gpus[1].seen.values, Signal::sm, 42, now - 13 * second);
  set(view.gpus[1].seen.values, Signal::power, 351, now - 13 * second);
  set(view.gpus[1].seen.values, Signal::temperature, 55, now - 13 * second);
  EXPECT_THAT(text(view, {.width = 120}),
              HasSubstr("1 hung in nvmlDeviceGetTemperature for 12 s; 13 s ago: 351 W, 55 °C, 42 % SM"));
  const auto alarms = alarms_of(view.gpus[1].seen, now);
  ASSERT_EQ(alarms.size(), 1U);
  EXPECT_EQ(alarms[0].level, Level::critical);
}

TEST_F(TopPage, AnOldValueSaysItsAge) {
  View view = host(1);
  set(view.gpus[0].seen.values, Signal::power, 350, now - 14 * second);
  EXPECT_THAT(text(view, {}), HasSubstr("14 s old"));
  set(view.gpus[0].seen.values, Signal::power, 350, now - 3 * second);
  EXPECT_THAT(text(view, {}), Not(HasSubstr(" old")));
  // What is asked rarely is not old the sooner.
  set(view.gpus[0].seen.values, Signal::energy, 5, now - 50 * second);
  view.gpus[0].seen.tier[static_cast<std::size_t>(sample::Tier::energy)].period_ms = 60'000;
  EXPECT_THAT(text(view, {.height = 0, .screen = Screen::gpu}), Not(HasSubstr(" old")));
}

TEST_F(TopPage, ReasonsAreWordsAndOnlyHarmfulOnesAlarms) {
  Gpu one = gpu(0);
  const auto words = [&](std::uint64_t bits) {
    set(one.seen.values, Signal::reasons, static_cast<double>(bits));
    std::string out;
    for (const auto& reason : reasons_of(one.seen)) out += std::string(reason.word) + ";";
    return out;
  };
  EXPECT_EQ(words(0x1), "");
  EXPECT_EQ(words(0x4), "power cap;");
  EXPECT_TRUE(alarms_of(one.seen, now).empty());
  EXPECT_EQ(words(0x88), "power brake;");  // not said twice
  EXPECT_EQ(words(0x08), "slowed by hardware;");
  EXPECT_EQ(alarms_of(one.seen, now).size(), 1U);
}

TEST_F(TopPage, TheFilterFindsGpusByWhoIsThere) {
  View view = host(3);
  view.parts = {{.gpu = 0, .instance = 1, .profile = "3g.40gb", .tenant = "vision"},
                {.gpu = 2, .profile = "whole", .processes = {{99, "trainer", {}}}}};
  EXPECT_THAT(draw(view, {.filter = "VIS"}).shown, testing::ElementsAre(0U));
  EXPECT_THAT(draw(view, {.filter = "99"}).shown, testing::ElementsAre(2U));
  EXPECT_THAT(draw(view, {.filter = "1"}).shown, testing::ElementsAre(1U));
  EXPECT_THAT(draw(view, {.filter = "h100"}).shown, testing::SizeIs(3));
  EXPECT_THAT(text(view, {.filter = "nobody"}), HasSubstr("matches the filter"));
}

TEST_F(TopPage, ByTenantThoseWhoHaveNothingComeLast) {
  View view = host(2);
  view.parts = {{.gpu = 0, .instance = 1, .profile = "1g.10gb"},
                {.gpu = 0, .instance = 2, .profile = "1g.10gb", .tenant = "zoo"},
                {.gpu = 1, .instance = 3, .profile = "1g.10gb", .tenant = "ant"}};
  const std::string seen = text(view, {.by_tenant = true});
  EXPECT_LT(seen.find(" ant "), seen.find(" zoo "));
  EXPECT_LT(seen.find(" zoo "), seen.find("free"));
}

TEST_F(TopPage, WorkOfNobodyKnownIsNotCalledIdle) {
  View view = host(1);
  EXPECT_THAT(text(view, {}), HasSubstr("nobody known"));
  set(view.gpus[0].seen.values, Signal::sm, 0);
  EXPECT_THAT(text(view, {}), HasSubstr("idle"));
  view.processes_known = false;
  EXPECT_THAT(text(view, {}), Not(HasSubstr("idle")));
}

TEST_F(TopPage, TrailsBridgeSlowSamplingButNotSilence) {
  Trails trails;
  for (std::uint64_t at = 900; at <= 960; at += 2) trails.add("x", at * second, static_cast<double>(at % 10));
  const Trail during = trails.get("x", 960 * second);
  for (const auto& value : during) EXPECT_TRUE(value.has_value());
  const Trail after = trails.get("x", 990 * second);
  EXPECT_TRUE(after[20].has_value());
  EXPECT_FALSE(after.back().has_value());
  EXPECT_EQ(trails.get("y", now), Trail());
}

TEST_F(TopPage, GraphsScaleToTheirLimitAndHaveAnAsciiForm) {
  Trail trail;
  trail.back() = 700;
  trail[trail_seconds - 2] = 0;
  EXPECT_EQ(graph(trail, trail_seconds, 700, true).substr(trail_seconds - 2), "▁█");
  EXPECT_EQ(graph(trail, trail_seconds, 700, false).substr(trail_seconds - 2), "_#");
  EXPECT_EQ(graph(trail, 10, 0, true), std::string(10, ' '));  // no limit known: no graph
  const auto high = chart(trail, trail_seconds, 3, 700, false);
  ASSERT_EQ(high.size(), 3U);
  EXPECT_EQ(high[0].back(), '#');
  EXPECT_EQ(high[2].substr(trail_seconds - 2), "_#");
}

}  // namespace
}  // namespace bulkhead::cli::top
