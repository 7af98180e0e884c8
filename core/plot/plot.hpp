// Figures as SVG text: curves over an axis, and bars in groups. White ground, direct labels, colours that
// most colour-blind readers tell apart. Pure: the same figure gives the same bytes.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace bulkhead::plot {

inline constexpr std::size_t kMostSeries = 32;    // more are left out, and the figure says so
inline constexpr std::size_t kMostPoints = 2000;  // of one curve; more are thinned evenly

struct Axis {
  std::string label = {};
  std::string unit = {};                     // behind each number: "%"
  std::optional<double> from = {}, to = {};  // else from the data; what lies outside is cut
};

struct Curve {
  std::string name = {};
  std::vector<std::pair<double, double>> points = {};  // by rising x
  bool dashed = false;                                 // a bound or a published figure
};
struct Curves {
  std::string title = {};
  std::string note = {};  // one line below
  Axis x = {}, y = {};
  std::vector<Curve> curves = {};
};
// Points that are no numbers are left out.
std::string draw(const Curves& figure);

struct Bar {
  double value = 0;
  double half_width = 0;  // of its interval; 0: none drawn
};
struct Bars {
  std::string title = {};
  std::string note = {};
  Axis y = {};
  std::vector<std::string> groups = {};  // below the bars
  struct Row {
    std::string name = {};
    std::vector<std::optional<Bar>> bars = {};  // one per group; empty: not known
  };
  std::vector<Row> rows = {};
};
std::string draw(const Bars& figure);

}  // namespace bulkhead::plot
