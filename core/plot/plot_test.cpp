#include "core/plot/plot.hpp"

#include <cmath>

#include <gtest/gtest.h>

namespace bulkhead::plot {
namespace {

std::size_t count(const std::string& text, const std::string& what) {
  std::size_t n = 0;
  for (auto at = text.find(what); at != std::string::npos; at = text.find(what, at + what.size())) ++n;
  return n;
}

Curves two() {
  return {.title = "GPUs in use",
          .x = {.label = "arrived", .unit = "%"},
          .y = {.label = "in use", .unit = "%"},
          .curves = {{.name = "ours", .points = {{0, 0}, {50, 50}, {130, 96}}},
                     {.name = "random", .points = {{0, 0}, {50, 49}, {130, 87}}, .dashed = true}}};
}

TEST(Plot, ACurveIsALineWithItsNameAtItsEnd) {
  const auto svg = draw(two());
  EXPECT_TRUE(svg.starts_with("<svg ")) << svg;
  EXPECT_TRUE(svg.ends_with("</svg>\n"));
  EXPECT_EQ(count(svg, "<polyline"), 2U);
  EXPECT_EQ(count(svg, "stroke-dasharray"), 1U);
  EXPECT_EQ(count(svg, ">ours</text>"), 1U);
  EXPECT_EQ(count(svg, ">100%</text>"), 2U);  // both axes
}

TEST(Plot, TheSameFigureGivesTheSameBytes) { EXPECT_EQ(draw(two()), draw(two())); }

TEST(Plot, NamesFromOutsideCannotBreakTheDocument) {
  auto figure = two();
  figure.curves[0].name = "</svg><script>&\"\n";
  const auto svg = draw(figure);
  EXPECT_EQ(count(svg, "<script>"), 0U);
  EXPECT_EQ(count(svg, "</svg>"), 1U);
  EXPECT_EQ(count(svg, "&lt;/svg&gt;&lt;script&gt;&amp;&quot; "), 1U);
}

TEST(Plot, ACurveIsCutWhereTheAxisBegins) {
  auto figure = two();
  figure.x.from = 100;
  figure.curves.resize(1);
  const auto svg = draw(figure);
  EXPECT_NE(svg.find("points=\"64.0,"), std::string::npos) << svg;  // starts on the axis
  EXPECT_EQ(count(svg, ">50%</text>"), 0U);
}

TEST(Plot, NothingAndNonsenseStillGiveAFigure) {
  EXPECT_TRUE(draw(Curves{}).ends_with("</svg>\n"));
  EXPECT_TRUE(draw(Bars{}).ends_with("</svg>\n"));
  Curves odd{
      .curves = {{.name = "a", .points = {{NAN, 1}, {1, INFINITY}}}, {.name = "b", .points = {{1, 1}}}}};
  const auto svg = draw(odd);
  EXPECT_EQ(count(svg, "nan"), 0U);
  EXPECT_EQ(count(svg, "inf"), 0U);
}

TEST(Plot, TooManyCurvesAreLeftOutAndItSaysSo) {
  Curves many;
  for (int i = 0; i < 40; ++i) many.curves.push_back({.name = "c", .points = {{0, 0}, {1, 1}}});
  const auto svg = draw(many);
  EXPECT_EQ(count(svg, "<polyline"), kMostSeries);
  EXPECT_EQ(count(svg, "32 of 40 drawn"), 1U);
}

TEST(Plot, ALongCurveIsThinnedAndKeepsItsEnds) {
  Curves figure{.curves = {{.name = "c"}}};
  for (int i = 0; i <= 100'000; ++i) figure.curves[0].points.emplace_back(i, i);
  const auto svg = draw(figure);
  EXPECT_LT(svg.size(), 60'000U);
  EXPECT_NE(svg.find("600.0,62.0"), std::string::npos);
}

TEST(Plot, BarsStandInGroupsWithTheirIntervals) {
  const auto svg =
      draw(Bars{.title = "Accepted",
                .y = {.unit = "%"},
                .groups = {"uniform", "small"},
                .rows = {{"ours", {Bar{95, 0.5}, Bar{94, 0}}}, {"mfi", {Bar{93, 0}, std::nullopt}}}});
  EXPECT_EQ(count(svg, "<title>ours, uniform: 95.00%</title>"), 1U);
  EXPECT_EQ(count(svg, "<title>mfi, "), 1U);
  EXPECT_EQ(count(svg, ">uniform</text>"), 1U);
  EXPECT_EQ(count(svg, ">0%</text>"), 0U);  // the axis is cut near the bars
}

}  // namespace
}  // namespace bulkhead::plot
