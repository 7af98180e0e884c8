// protect_plot < "NAME SECONDS WATTS" lines: how fast the node's power changes (W/s over one second), as SVG.
#include <algorithm>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include "core/plot/plot.hpp"

int main() {
  std::map<std::string, std::vector<std::pair<double, double>>> power;
  std::string name;
  double at = 0, watts = 0;
  while (std::cin >> name >> at >> watts) {
    if (power.size() < 16 && power[name].size() < 100'000) power[name].emplace_back(at, watts);
  }
  if (power.empty()) {
    std::cerr << "protect_plot: nothing on standard input; lines are NAME SECONDS WATTS\n";
    return 2;
  }
  bulkhead::plot::Curves figure;
  figure.title = "Eight jobs asked for at once: change of the node's power";
  figure.note =
      "W/s over one second, read every 0.1 s; budget 1 kW/s and a burst of 700 W; twin of a DGX H100, 650 W "
      "a job";
  figure.x = {.label = "seconds since the jobs were asked for"};
  figure.y = {.label = "dP/dt", .unit = " W/s"};
  for (const auto& [curve, points] : power) {
    bulkhead::plot::Curve out{.name = curve};
    std::size_t before = 0;
    for (std::size_t i = 0; i < points.size(); ++i) {
      while (before + 1 < i && points[i].first - points[before + 1].first >= 1) ++before;
      const double dt = points[i].first - points[before].first;
      if (dt >= 1) out.points.emplace_back(points[i].first, (points[i].second - points[before].second) / dt);
    }
    figure.curves.push_back(std::move(out));
  }
  std::cout << bulkhead::plot::draw(figure);
  return 0;
}
