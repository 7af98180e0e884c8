#include "core/plot/plot.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>

#include <fmt/format.h>

#include "base/markup.hpp"

namespace bulkhead::plot {

namespace {

constexpr double kLeft = 64, kTop = 58;
constexpr std::string_view kInk = "#333", kFaint = "#ddd";
constexpr std::array<std::string_view, 8> kColours = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                                      "#e69f00", "#56b4e9", "#7a5c00", "#666666"};
std::string_view colour(std::size_t i) { return kColours[i % kColours.size()]; }

struct Page {
  std::string out;
  Page(double width, double height, std::string_view title) {
    out = fmt::format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0:.0f} {1:.0f}\" width=\"{0:.0f}\" "
        "height=\"{1:.0f}\" role=\"img\" font-family=\"sans-serif\" font-size=\"13\"><title>{2}</title>\n"
        "<rect width=\"{0:.0f}\" height=\"{1:.0f}\" fill=\"#fff\"/>\n"
        "<text x=\"16\" y=\"26\" font-size=\"15\" fill=\"{3}\">{2}</text>\n",
        width, height, markup(title), kInk);
  }
  void line(double x1, double y1, double x2, double y2, std::string_view stroke, std::string_view more = "") {
    out += fmt::format("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"{}\"{}/>\n",
                       x1, y1, x2, y2, stroke, more);
  }
  void text(double x, double y, std::string_view words, std::string_view anchor,
            std::string_view fill = kInk) {
    out += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\" fill=\"{}\">{}</text>\n", x, y,
                       anchor, fill, markup(words));
  }
  std::string done() { return out + "</svg>\n"; }
};

// A scale with round ticks: 1, 2 or 5 times a power of ten apart.
struct Scale {
  double from = 0, to = 1, step = 0.2;
  double low = 0, high = 1;  // in pixels, of `from` and `to`
  double at(double value) const { return low + (high - low) * (value - from) / (to - from); }
  std::vector<double> ticks() const {
    std::vector<double> out;
    const double first = std::ceil(from / step - 1e-9);
    for (int i = 0; i < 100; ++i) {
      const double value = (first + i) * step;
      if (value > to + step * 1e-6) break;
      out.push_back(value);
    }
    return out;
  }
  std::string name(double value, std::string_view unit) const {
    const int digits = step >= 1 ? 0 : std::min(9, static_cast<int>(std::ceil(-std::log10(step) - 1e-9)));
    if (std::abs(value) < step * 1e-6) value = 0;
    return fmt::format("{:.{}f}{}{}", value, digits, unit.empty() || unit == "%" ? "" : " ", unit);
  }
};

// `cling`: the ends are what the data has; else they are rounded to ticks.
Scale scale(const Axis& axis, double least, double most, double low, double high, bool cling) {
  if (!(least <= most)) least = 0, most = 1;
  double from = axis.from.value_or(least), to = axis.to.value_or(most);
  if (!std::isfinite(from)) from = 0;
  if (!std::isfinite(to)) to = from + 1;
  if (to - from < 1e-9 * std::max(1.0, std::abs(from))) to = from + 1;
  const double raw = (to - from) / 6, power = std::pow(10, std::floor(std::log10(raw)));
  const double lead = raw / power;
  const double step = power * (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10);
  if (!cling) {
    if (!axis.from) from = std::floor(from / step + 1e-9) * step;
    if (!axis.to) to = std::ceil(to / step - 1e-9) * step;
  }
  return {.from = from, .to = to, .step = step, .low = low, .high = high};
}

void grid(Page& page, const Scale& y, std::string_view unit, std::string_view label, double right) {
  for (const double value : y.ticks()) {
    page.line(kLeft, y.at(value), right, y.at(value), kFaint);
    page.text(kLeft - 8, y.at(value) + 4, y.name(value, unit), "end");
  }
  page.text(16, kTop - 10, label, "start", "#777");
}

bool number(const std::pair<double, double>& point) {
  return std::isfinite(point.first) && std::isfinite(point.second);
}

// The part of the line between a and b whose x is at or right of `x`.
std::pair<double, double> cut(const std::pair<double, double>& a, const std::pair<double, double>& b,
                              double x) {
  const double part = (x - a.first) / (b.first - a.first);
  return {x, a.second + part * (b.second - a.second)};
}

std::vector<std::pair<double, double>> visible(const Curve& curve, const Scale& x) {
  std::vector<std::pair<double, double>> in, out;
  for (const auto& point : curve.points) {
    if (number(point)) in.push_back(point);
  }
  for (std::size_t i = 0; i < in.size(); ++i) {
    const bool inside = in[i].first >= x.from && in[i].first <= x.to;
    if (i > 0 && in[i - 1].first < x.from && in[i].first > x.from)
      out.push_back(cut(in[i - 1], in[i], x.from));
    if (i > 0 && in[i - 1].first < x.to && in[i].first > x.to) out.push_back(cut(in[i - 1], in[i], x.to));
    if (inside) out.push_back(in[i]);
  }
  if (out.size() <= kMostPoints) return out;
  std::vector<std::pair<double, double>> thin;
  for (std::size_t i = 0; i < kMostPoints; ++i) thin.push_back(out[i * (out.size() - 1) / (kMostPoints - 1)]);
  return thin;
}

// Wide enough for what stands above and below; letters of a sans-serif font are about this wide.
double wide_enough(double width, std::string_view title, std::string_view note) {
  return std::min(1600.0, std::max({width, 32 + 8.0 * static_cast<double>(title.size()),
                                    32 + 6.8 * static_cast<double>(note.size())}));
}

std::string left_out(std::size_t drawn, std::size_t all, const std::string& note) {
  if (drawn == all) return note;
  return fmt::format("{}{}{} of {} drawn", note, note.empty() ? "" : "; ", drawn, all);
}

}  // namespace

std::string draw(const Curves& figure) {
  const std::size_t count = std::min(figure.curves.size(), kMostSeries);
  std::size_t longest = 4;
  double least_x = INFINITY, most_x = -INFINITY, least_y = INFINITY, most_y = -INFINITY;
  for (std::size_t i = 0; i < count; ++i) {
    longest = std::max(longest, std::min<std::size_t>(figure.curves[i].name.size(), 32));
    for (const auto& point : figure.curves[i].points) {
      if (!number(point)) continue;
      least_x = std::min(least_x, point.first);
      most_x = std::max(most_x, point.first);
    }
  }
  const double width = 600 + 48 + 7.5 * static_cast<double>(longest);
  const double height = std::max(440.0, kTop + 80 + 17 * static_cast<double>(count));
  const double right = 600, bottom = height - 64;
  const Scale x = scale(figure.x, least_x, most_x, kLeft, right, true);
  std::vector<std::vector<std::pair<double, double>>> lines;
  for (std::size_t i = 0; i < count; ++i) {
    lines.push_back(visible(figure.curves[i], x));
    for (const auto& point : lines.back()) {
      least_y = std::min(least_y, point.second);
      most_y = std::max(most_y, point.second);
    }
  }
  const Scale y = scale(figure.y, least_y, most_y, bottom, kTop + 4, false);
  Page page(wide_enough(width, figure.title, figure.note), height, figure.title);
  grid(page, y, figure.y.unit, figure.y.label, right);
  for (const double value : x.ticks()) {
    page.line(x.at(value), bottom, x.at(value), bottom + 5, kInk);
    page.text(x.at(value), bottom + 20, x.name(value, figure.x.unit), "middle");
  }
  page.line(kLeft, bottom, right, bottom, kInk);
  page.text((kLeft + right) / 2, bottom + 40, figure.x.label, "middle");

  struct Label {
    std::size_t curve;
    double wanted, at;
  };
  std::vector<Label> labels;
  for (std::size_t i = 0; i < count; ++i) {
    if (lines[i].empty()) continue;
    std::string points;
    for (const auto& [px, py] : lines[i])
      points += fmt::format("{}{:.1f},{:.1f}", points.empty() ? "" : " ", x.at(px),
                            y.at(std::clamp(py, y.from, y.to)));
    page.out += fmt::format("<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"{}/>\n",
                            points, colour(i), figure.curves[i].dashed ? " stroke-dasharray=\"6 4\"" : "");
    const double end = y.at(std::clamp(lines[i].back().second, y.from, y.to));
    labels.push_back({i, end, end});
  }
  // Names stand where their curves end, moved apart where they would touch.
  std::stable_sort(labels.begin(), labels.end(),
                   [](const Label& a, const Label& b) { return a.wanted < b.wanted; });
  for (std::size_t i = 1; i < labels.size(); ++i)
    labels[i].at = std::max(labels[i].at, labels[i - 1].at + 17);
  for (std::size_t i = labels.size(); i-- > 0;) {
    const double below = i + 1 < labels.size() ? labels[i + 1].at - 17 : bottom;
    labels[i].at = std::min(labels[i].at, below);
  }
  for (const auto& label : labels) {
    page.line(right + 2, label.wanted, right + 14, label.at, colour(label.curve));
    page.text(right + 18, label.at + 4, figure.curves[label.curve].name.substr(0, 64), "start",
              colour(label.curve));
  }
  page.text(16, height - 8, left_out(count, figure.curves.size(), figure.note), "start", "#777");
  return page.done();
}

std::string draw(const Bars& figure) {
  const std::size_t count = std::min(figure.rows.size(), kMostSeries);
  const std::size_t groups = std::min(figure.groups.size(), kMostSeries);
  double least = INFINITY, most = -INFINITY;
  std::size_t longest = 4;
  for (std::size_t r = 0; r < count; ++r) {
    longest = std::max(longest, std::min<std::size_t>(figure.rows[r].name.size(), 32));
    for (const auto& bar : figure.rows[r].bars) {
      if (!bar || !std::isfinite(bar->value)) continue;
      const double half = std::isfinite(bar->half_width) ? bar->half_width : 0;
      least = std::min(least, bar->value - half);
      most = std::max(most, bar->value + half);
    }
  }
  // Bars that all lie near the top say more with the axis cut; the axis shows where it starts.
  const double room = std::max(most - least, 1e-9);
  Axis axis = figure.y;
  if (!axis.from && least >= 0 && least < 2 * room) axis.from = 0;
  if (!axis.from) least -= 0.15 * room;
  const double bar_width = std::clamp(36.0 - 2 * static_cast<double>(count), 8.0, 28.0);
  const double group_width = bar_width * static_cast<double>(count) + 28;
  const double right = std::max(kLeft + 200, kLeft + 12 + group_width * static_cast<double>(groups));
  const double width = right + 48 + 7.5 * static_cast<double>(longest);
  const double height = std::max(440.0, kTop + 80 + 18 * static_cast<double>(count)), bottom = height - 64;
  const Scale y = scale(axis, least, most, bottom, kTop + 4, false);
  Page page(wide_enough(width, figure.title, figure.note), height, figure.title);
  grid(page, y, figure.y.unit, figure.y.label, right);
  for (std::size_t g = 0; g < groups; ++g) {
    const double start = kLeft + 12 + group_width * static_cast<double>(g);
    for (std::size_t r = 0; r < count; ++r) {
      if (g >= figure.rows[r].bars.size() || !figure.rows[r].bars[g]) continue;
      const Bar& bar = *figure.rows[r].bars[g];
      if (!std::isfinite(bar.value)) continue;
      const double left = start + bar_width * static_cast<double>(r);
      const double top = y.at(std::clamp(bar.value, y.from, y.to));
      page.out += fmt::format(
          "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" fill=\"{}\"><title>{}, {}: "
          "{:.2f}{}</title></rect>\n",
          left, top, bar_width - 2, bottom - top, colour(r), markup(figure.rows[r].name),
          markup(figure.groups[g]), bar.value, markup(figure.y.unit));
      if (bar.half_width > 0 && std::isfinite(bar.half_width)) {
        const double middle = left + bar_width / 2 - 1;
        page.line(middle, y.at(std::clamp(bar.value - bar.half_width, y.from, y.to)), middle,
                  y.at(std::clamp(bar.value + bar.half_width, y.from, y.to)), kInk);
      }
    }
    page.text(start + bar_width * static_cast<double>(count) / 2, bottom + 20, figure.groups[g], "middle");
  }
  page.line(kLeft, bottom, right, bottom, kInk);
  for (std::size_t r = 0; r < count; ++r) {
    const double at = kTop + 8 + 18 * static_cast<double>(r);
    page.out += fmt::format("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"12\" height=\"12\" fill=\"{}\"/>\n",
                            right + 12, at, colour(r));
    page.text(right + 30, at + 11, figure.rows[r].name.substr(0, 64), "start");
  }
  page.text(16, height - 8, left_out(count, figure.rows.size(), figure.note), "start", "#777");
  return page.done();
}

}  // namespace bulkhead::plot
