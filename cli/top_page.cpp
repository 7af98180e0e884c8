#include "cli/top_page.hpp"

#include <wchar.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <utility>

#include <fmt/format.h>

#include "base/text.hpp"

namespace bulkhead::cli::top {

namespace {

using sample::Signal;
using sample::State;
using sample::Tier;
using sample::Value;

constexpr std::uint64_t second_ns = 1'000'000'000;

// ---- characters
struct Letter {
  std::string_view bytes = {};  // as they stand in the text; empty: to be shown as '?'
  std::size_t width = 1;
};

// The next character of outside text. What has no width of its own (marks, joiners, the controls that turn
// the direction of writing around) is not printed: it could make a row lie.
Letter next_letter(std::string_view text, std::size_t& at, bool wide) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(at);
  if (first < 0x80) {
    const Letter out{first >= 0x20 && first != 0x7f ? text.substr(at, 1) : std::string_view(), 1};
    ++at;
    return out;
  }
  const std::size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4 || at + length > text.size()) {
    ++at;
    return {};
  }
  std::uint32_t code = first & (0x7fU >> length);
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(at + i) & 0xc0U) != 0x80) {
      ++at;
      return {};
    }
    code = code << 6U | (byte(at + i) & 0x3fU);
  }
  const auto bytes = text.substr(at, length);
  at += length;
  const int columns = wide ? ::wcwidth(static_cast<wchar_t>(code)) : -1;
  if (columns < 1) return {};
  return {bytes, static_cast<std::size_t>(columns)};
}

struct Cut {
  std::string text = {};
  std::size_t width = 0;
  bool whole = true;
};
Cut cut(std::string_view text, std::size_t most, bool wide) {
  Cut out;
  for (std::size_t at = 0; at < text.size();) {
    const Letter letter = next_letter(text, at, wide);
    if (out.width + letter.width > most) {
      out.whole = false;
      break;
    }
    out.text += letter.bytes.empty() ? std::string_view("?") : letter.bytes;
    out.width += letter.width;
  }
  return out;
}

std::size_t columns_of(std::string_view text, bool wide) { return cut(text, std::string::npos, wide).width; }

// ---- values
// A value that its tier should have renewed long ago is no answer to "now".
bool fresh(const sample::Gpu& gpu, Signal signal, const Value& value, std::uint64_t now) {
  if (!value.known()) return false;
  const auto tier = static_cast<std::size_t>(sample::rows()[static_cast<std::size_t>(signal)].tier);
  // What is dear is asked rarely, by a far sampler as rarely as once a minute.
  const auto which = static_cast<Tier>(tier);
  const bool often =
      which == Tier::quick || which == Tier::second || which == Tier::gpm || which == Tier::slices;
  const double limit = std::max(often ? 5e9 : 90e9, gpu.tier[tier].period_ms * 3e6 + 2e9);
  return now <= value.at_ns || static_cast<double>(now - value.at_ns) <= limit;
}

struct Cell {
  std::string text = {};
  Tone tone = Tone::plain;
};

Cell number(const sample::Gpu& gpu, const sample::Values& values, Signal signal, std::uint64_t now,
            double scale = 1, int digits = 0) {
  const Value& value = values[static_cast<std::size_t>(signal)];
  if (!value.known()) return {"-", Tone::dim};
  return {fmt::format("{:.{}f}", value.number * scale, digits),
          fresh(gpu, signal, value, now) ? Tone::plain : Tone::dim};
}

std::string gib(double bytes) {
  const double g = bytes / (1U << 30U);
  return fmt::format("{:.{}f}", g, g < 99.95 ? 1 : 0);
}

std::string short_name(std::string_view name) {
  constexpr std::string_view maker = "NVIDIA ";
  return std::string(name.starts_with(maker) ? name.substr(maker.size()) : name);
}

std::string plural(std::size_t n, std::string_view one, std::string_view many) {
  return fmt::format("{} {}", n, n == 1 ? one : many);
}

bool holds(std::string_view text, std::string_view word) {
  return lower(text).find(word) != std::string::npos;
}

// ---- columns
struct Column {
  std::string head = {};
  std::size_t width = 0, most = 0;  // it may grow to `most`
  int priority = 0;                 // 0 first; the last ones go when there is no room
  bool right = false;
  std::function<Cell(std::size_t row, std::size_t width)> cell = {};
};

// Those that fit, at the widths that fill the line.
std::vector<Column> chosen_columns(std::vector<Column> columns, std::size_t width) {
  std::vector<std::size_t> order(columns.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](auto a, auto b) { return columns[a].priority < columns[b].priority; });
  std::vector<bool> in(columns.size(), false);
  std::size_t used = 0;
  for (const std::size_t i : order) {
    if (used + columns[i].width + 1 > width + 1 && columns[i].priority > 0) break;
    in[i] = true;
    used += columns[i].width + 1;
  }
  std::vector<Column> out;
  for (std::size_t i = 0; i < columns.size(); ++i)
    if (in[i]) out.push_back(std::move(columns[i]));
  for (bool grew = true; grew && used < width + 1;) {
    grew = false;
    for (Column& column : out) {
      if (column.width >= column.most || used >= width + 1) continue;
      ++column.width;
      ++used;
      grew = true;
    }
  }
  return out;
}

class Drawing {
 public:
  Drawing(const View& view, const Looking& looking) : view_(view), looking_(looking) {}

  Page page() {
    find_shown();
    std::vector<Line> head, body, foot;
    title(head);
    switch (looking_.screen) {
      case Screen::all:
        alarm_lines(head, looking_.height == 0 ? 1000 : looking_.height >= 40 ? 6 : 3);
        gpu_table(head);
        lower_part(head, body);
        break;
      case Screen::gpu:
        gpu_page(head, body);
        break;
      case Screen::alarms:
        alarm_page(head, body);
        break;
      case Screen::help:
        help_page(body);
        break;
    }
    if (looking_.keys && looking_.height > 0) foot.push_back(key_line());
    return assemble(std::move(head), std::move(body), std::move(foot));
  }

 private:
  bool wide() const { return looking_.blocks; }
  std::uint64_t now() const { return view_.now_ns; }

  // ---- lines
  Line line(std::vector<Span> spans) const { return Line{std::move(spans), false}; }
  Line line(std::string text, Tone tone = Tone::plain) const {
    return Line{{{std::move(text), tone}}, false};
  }
  Line row(const std::vector<Column>& columns, std::size_t at) const {
    Line out;
    for (std::size_t c = 0; c < columns.size(); ++c) {
      if (c > 0) out.spans.push_back({" ", Tone::plain});
      Cell cell = columns[c].cell(at, columns[c].width);
      out.spans.push_back({fit(cell.text, columns[c].width, wide(), columns[c].right), cell.tone});
    }
    return out;
  }
  Line heads(const std::vector<Column>& columns) const {
    std::string text;
    for (std::size_t c = 0; c < columns.size(); ++c)
      text += (c > 0 ? " " : "") + fit(columns[c].head, columns[c].width, wide(), columns[c].right);
    return line(std::move(text), Tone::dim);
  }
  void rule(std::vector<Line>& to, const std::string& text, Tone tone = Tone::bold) const {
    const std::string dash = looking_.blocks ? "─" : "-";
    Line out;
    out.spans.push_back({dash + dash + " ", Tone::dim});
    const std::size_t room = looking_.width > 4 ? looking_.width - 4 : 0;
    const Cut said = cut(text, room, wide());
    out.spans.push_back({said.text, tone});
    std::string rest = " ";
    for (std::size_t i = said.width + 4; i < looking_.width; ++i) rest += dash;
    out.spans.push_back({rest, Tone::dim});
    to.push_back(std::move(out));
  }
  std::vector<std::string> wrapped(const std::string& text, std::size_t width) const {
    std::vector<std::string> out(1);
    for (const auto word : split(text, ' ')) {
      if (!out.back().empty() && columns_of(out.back(), wide()) + 1 + columns_of(word, wide()) > width)
        out.emplace_back();
      out.back() += (out.back().empty() ? "" : " ") + std::string(word);
    }
    return out;
  }

  // ---- the filter
  // A number is an index, a lease or a pid, and no part of a name: "1" is not every H100.
  bool is_number() const {
    return !looking_.filter.empty() && looking_.filter.find_first_not_of("0123456789") == std::string::npos;
  }
  bool passes(const Part& part) const {
    if (looking_.filter.empty()) return true;
    if (is_number()) {
      return std::to_string(part.lease) == looking_.filter ||
             std::any_of(part.processes.begin(), part.processes.end(), [&](const Process& process) {
               return std::to_string(process.pid) == looking_.filter;
             });
    }
    const auto word = lower(looking_.filter);
    return holds(part.tenant, word) || holds(part.profile, word) ||
           std::any_of(part.processes.begin(), part.processes.end(),
                       [&](const Process& process) { return holds(process.name, word); });
  }
  bool named(const Gpu& gpu) const {
    if (is_number()) return std::to_string(gpu.seen.index) == looking_.filter;
    const auto word = lower(looking_.filter);
    return word.empty() || holds(gpu.seen.name, word) || holds(gpu.pool, word) ||
           holds(gpu.seen.uuid.text, word) || holds(gpu.seen.pci.str(), word);
  }
  void find_shown() {
    for (std::size_t i = 0; i < view_.gpus.size(); ++i) {
      const bool part_passes = std::any_of(view_.parts.begin(), view_.parts.end(), [&](const Part& part) {
        return part.gpu == i && !looking_.filter.empty() && passes(part);
      });
      if (named(view_.gpus[i]) || part_passes) shown_.push_back(i);
    }
    if (shown_.empty()) return;
    at_ = 0;
    for (std::size_t i = 0; i < shown_.size(); ++i)
      if (shown_[i] <= looking_.chosen) at_ = i;
  }
  std::size_t chosen() const { return shown_.empty() ? 0 : shown_[at_]; }

  // ---- the top
  void title(std::vector<Line>& to) const {
    double power = 0, limit = 0;
    for (const Gpu& gpu : view_.gpus) {
      const Value& draws = gpu.seen[Signal::power];
      if (fresh(gpu.seen, Signal::power, draws, now())) power += draws.number;
      const Value& may = gpu.seen[Signal::power_limit];
      if (may.known()) limit += may.number;
    }
    Line out;
    const auto say = [&](const std::string& text, Tone tone = Tone::plain) {
      if (text.empty()) return;
      if (!out.spans.empty()) out.spans.push_back({"  ", Tone::plain});
      out.spans.push_back({text, tone});
    };
    say(view_.host.empty() ? "bulkhead top" : view_.host, Tone::bold);
    say(plural(view_.gpus.size(), "GPU", "GPUs"));
    if (power > 0)
      say(limit > 0 ? fmt::format("{:.1f} of {:.1f} kW", power / 1000, limit / 1000)
                    : fmt::format("{:.1f} kW", power / 1000));
    const auto critical = std::count_if(view_.alarms.begin(), view_.alarms.end(),
                                        [](const Alarm& a) { return a.level == Level::critical; });
    if (view_.alarms.empty()) {
      say("no alarms", Tone::dim);
    } else {
      say(plural(view_.alarms.size(), "alarm", "alarms"), critical > 0 ? Tone::bad : Tone::warn);
    }
    if (!view_.tenants_known) say("no daemon", Tone::dim);
    say(view_.from, Tone::dim);
    if (!view_.driver.empty() && looking_.width >= 100) say("driver " + view_.driver, Tone::dim);
    std::string right = view_.time;
    if (looking_.height > 0 && right.size() > 19) right = right.substr(11, 8) + " UTC";
    if (!looking_.paused.empty()) right = "paused for " + looking_.paused;
    std::size_t used = 0;
    for (const Span& span : out.spans) used += columns_of(span.text, wide());
    if (used + right.size() + 2 <= looking_.width) {
      out.spans.push_back({std::string(looking_.width - used - right.size(), ' '), Tone::plain});
      out.spans.push_back({right, looking_.paused.empty() ? Tone::dim : Tone::warn});
    }
    to.push_back(std::move(out));
    if (!looking_.filter.empty() || looking_.typing)
      to.push_back(line({{"filter: ", Tone::dim},
                         {looking_.filter + (looking_.typing ? "_" : ""), Tone::bold},
                         {looking_.typing ? "" : "   (/ changes it, Esc takes it away)", Tone::dim}}));
    for (const auto& note : view_.notes) to.push_back(line(note, Tone::warn));
  }

  void alarm_lines(std::vector<Line>& to, std::size_t most) const {
    const std::size_t lines = view_.alarms.size() > most ? most - 1 : view_.alarms.size();
    for (std::size_t i = 0; i < lines; ++i) to.push_back(alarm_line(view_.alarms[i]));
    if (lines < view_.alarms.size())
      to.push_back(line(fmt::format("  and {} more: a shows them", view_.alarms.size() - lines), Tone::warn));
  }
  Line alarm_line(const Alarm& alarm) const {
    return line({{alarm.level == Level::critical ? "! " : "- ",
                  alarm.level == Level::critical ? Tone::bad : Tone::warn},
                 {alarm.what, alarm.level == Level::critical ? Tone::bad : Tone::warn}});
  }

  // ---- GPUs
  std::vector<const Part*> parts_of(std::size_t gpu) const {
    std::vector<const Part*> out;
    for (const Part& part : view_.parts)
      if (part.gpu == gpu) out.push_back(&part);
    return out;
  }

  Cell what(std::size_t index) const {
    const Gpu& gpu = view_.gpus[index];
    Cell out;
    const auto say = [&](const std::string& text, Tone tone) {
      out.text += (out.text.empty() ? "" : "; ") + text;
      if (tone == Tone::bad || (tone == Tone::warn && out.tone != Tone::bad)) out.tone = tone;
    };
    const Value& power = gpu.seen[Signal::power];
    if (power.known() && !fresh(gpu.seen, Signal::power, power, now()))
      say(age(power.at_ns, now()) + " old", Tone::warn);
    for (const Reason& reason : reasons_of(gpu.seen)) say(std::string(reason.word), reason.tone);
    std::set<std::string> tenants;
    std::size_t slices = 0, taken = 0, processes = 0;
    const auto parts = parts_of(index);
    for (const Part* part : parts) {
      if (!part->tenant.empty()) tenants.insert(part->tenant);
      if (part->instance) ++slices;
      if (!part->tenant.empty() || !part->processes.empty()) ++taken;
      processes += part->processes.size();
    }
    if (!gpu.cordon.empty()) say("cordoned", Tone::warn);
    if (!tenants.empty()) {
      say(join({tenants.begin(), tenants.end()}, ", "), Tone::plain);
    } else if (slices > 0) {
      say(taken == 0 ? plural(slices, "slice", "slices") + (view_.processes_known ? ", idle" : "")
                     : fmt::format("{} of {} in use", taken, plural(slices, "slice", "slices")),
          Tone::plain);
    } else if (gpu.seen.mig) {
      say("MIG, not cut", Tone::plain);
    } else if (processes == 1) {
      say(fmt::format("{} [{}]", parts[0]->processes[0].name, parts[0]->processes[0].pid), Tone::plain);
    } else if (processes > 1) {
      say(plural(processes, "process", "processes"), Tone::plain);
    } else if (out.text.empty()) {
      const Value& sm = gpu.seen[gpu.seen[Signal::sm].known() ? Signal::sm : Signal::busy];
      const bool works = sm.known() && sm.number >= 5;
      out = {gpu.pool == "passthrough" ? "passthrough"
             : !view_.processes_known  ? "-"
             : works                   ? "nobody known"
                                       : "idle",
             works && view_.processes_known ? Tone::warn : Tone::dim};
    }
    return out;
  }

  std::vector<Column> gpu_columns() const {
    const auto gpu_at = [this](std::size_t i) -> const Gpu& { return view_.gpus[i]; };
    const auto value = [this, gpu_at](Signal signal, double scale = 1, int digits = 0) {
      return [this, gpu_at, signal, scale, digits](std::size_t i, std::size_t) {
        return number(gpu_at(i).seen, gpu_at(i).seen.values, signal, now(), scale, digits);
      };
    };
    std::vector<Column> out;
    out.push_back({"GPU", 3, 3, 0, true, [gpu_at](std::size_t i, std::size_t) {
                     return Cell{std::to_string(gpu_at(i).seen.index), Tone::bold};
                   }});
    out.push_back({"model", 16, 20, 12, false, [gpu_at](std::size_t i, std::size_t) {
                     return Cell{short_name(gpu_at(i).seen.name), Tone::plain};
                   }});
    // Where GPM has none (older chips) the driver's utilisation stands in for it.
    out.push_back({"SM%", 4, 4, 0, true, [this, gpu_at](std::size_t i, std::size_t) {
                     const auto& seen = gpu_at(i).seen;
                     return number(seen, seen.values, seen[Signal::sm].known() ? Signal::sm : Signal::busy,
                                   now());
                   }});
    out.push_back({"minute", 10, 60, 3, false, [this, gpu_at](std::size_t i, std::size_t w) {
                     return Cell{graph(gpu_at(i).sm, w, 100, looking_.blocks), Tone::plain};
                   }});
    out.push_back({"W", 8, 8, 0, true, [this, gpu_at](std::size_t i, std::size_t) {
                     const auto& seen = gpu_at(i).seen;
                     Cell cell = number(seen, seen.values, Signal::power, now());
                     if (const Value& limit = seen[Signal::power_limit]; limit.known())
                       cell.text += fmt::format("/{:.0f}", limit.number);
                     return cell;
                   }});
    out.push_back({"minute", 10, 60, 4, false, [this, gpu_at](std::size_t i, std::size_t w) {
                     const Value& limit = gpu_at(i).seen[Signal::power_limit];
                     return Cell{graph(gpu_at(i).power, w, limit.known() ? limit.number : 0, looking_.blocks),
                                 Tone::plain};
                   }});
    out.push_back({looking_.blocks ? "°C" : "C", 4, 4, 0, true, value(Signal::temperature)});
    out.push_back({"left", 4, 4, 1, true, [this, gpu_at](std::size_t i, std::size_t) {
                     const auto& seen = gpu_at(i).seen;
                     Cell cell = number(seen, seen.values, Signal::margin, now());
                     const double left = seen[Signal::margin].number;
                     if (seen[Signal::margin].known() && cell.tone == Tone::plain)
                       cell.tone = left <= 0 ? Tone::bad : left <= 5 ? Tone::warn : Tone::plain;
                     return cell;
                   }});
    out.push_back({"GiB", 9, 9, 1, true, [this, gpu_at](std::size_t i, std::size_t) {
                     const Gpu& gpu = gpu_at(i);
                     Cell cell = number(gpu.seen, gpu.seen.values, Signal::memory_used, now());
                     if (const Value& used = gpu.seen[Signal::memory_used]; used.known()) {
                       cell.text = gib(used.number);
                       if (gpu.memory_total > 0)
                         cell.text +=
                             fmt::format("/{:.0f}", static_cast<double>(gpu.memory_total) / (1U << 30U));
                     }
                     return cell;
                   }});
    out.push_back({"DRAM%", 5, 5, 5, true, value(Signal::dram)});
    out.push_back({"tens%", 5, 5, 6, true, value(Signal::tensor)});
    out.push_back({"MHz", 5, 5, 7, true, value(Signal::clock_sm)});
    out.push_back({"occ%", 4, 4, 8, true, value(Signal::occupancy)});
    out.push_back({"mem C", 5, 5, 9, true, value(Signal::memory_temperature)});
    out.push_back({"NVL MB/s", 8, 8, 10, true, [this, gpu_at](std::size_t i, std::size_t) {
                     const auto& seen = gpu_at(i).seen;
                     Cell cell = number(seen, seen.values, Signal::nvlink_rx, now());
                     if (seen[Signal::nvlink_rx].known())
                       cell.text = fmt::format(
                           "{:.0f}", seen[Signal::nvlink_rx].number + seen[Signal::nvlink_tx].number);
                     return cell;
                   }});
    out.push_back({"pool", 9, 11, 11, false, [gpu_at](std::size_t i, std::size_t) {
                     return Cell{gpu_at(i).pool, Tone::plain};
                   }});
    out.push_back({"in use by", 16, 400, 2, false, [this](std::size_t i, std::size_t) { return what(i); }});
    return out;
  }

  // Instead of a row of values: what hangs, or why there is no GPU.
  std::optional<Line> silent(const Gpu& gpu) const {
    const auto& seen = gpu.seen;
    std::string text;
    Tone tone = Tone::bad;
    switch (seen.state) {
      case State::sampling:
        return std::nullopt;
      case State::hung:
        text = fmt::format("hung in {} for {}", seen.call.empty() ? "the driver" : seen.call,
                           age(seen.since_ns, now()));
        break;
      case State::lost:
        text = "lost: " + (seen.why.empty() ? "the driver has it no more" : seen.why);
        break;
      case State::starting:
        text = seen.why.empty() ? "the driver is being asked" : "starting: " + seen.why;
        tone = Tone::dim;
        break;
      case State::resting:
        text = "let go of, while it is reset or cut";
        tone = Tone::warn;
        break;
    }
    std::string last;
    std::uint64_t youngest = 0;
    const auto say = [&](Signal signal, std::string_view unit) {
      const Value& value = seen[signal];
      if (!value.known()) return;
      last += fmt::format("{}{:.0f} {}", last.empty() ? "" : ", ", value.number, unit);
      youngest = std::max(youngest, value.at_ns);
    };
    say(Signal::power, "W");
    say(Signal::temperature, looking_.blocks ? "°C" : "C");
    say(Signal::sm, "% SM");
    std::vector<Span> spans = {{fit(std::to_string(seen.index), 3, wide(), true), Tone::bold},
                               {" " + text, tone}};
    if (!last.empty()) spans.push_back({fmt::format("; {} ago: {}", age(youngest, now()), last), Tone::dim});
    return line(std::move(spans));
  }

  void gpu_table(std::vector<Line>& to) const {
    if (view_.gpus.empty()) {
      to.push_back(line(""));
      for (const auto& words :
           wrapped(view_.why.empty() ? "no GPU is to be seen" : view_.why, looking_.width))
        to.push_back(line(words, Tone::warn));
      return;
    }
    const auto columns = chosen_columns(gpu_columns(), looking_.width);
    to.push_back(heads(columns));
    if (shown_.empty()) to.push_back(line("no GPU, tenant or process matches the filter", Tone::warn));
    // The table takes at most two thirds of the screen; with many GPUs it moves with the chosen one.
    std::size_t from = 0, count = shown_.size();
    if (looking_.height > 0) {
      const std::size_t most =
          std::max<std::size_t>(3, looking_.height * 2 / 3 - std::min<std::size_t>(to.size(), 8));
      if (count > most) {
        from = std::min(at_ > most / 2 ? at_ - most / 2 : 0, count - most);
        count = most;
      }
    }
    for (std::size_t i = from; i < from + count; ++i) {
      const Gpu& gpu = view_.gpus[shown_[i]];
      auto instead = silent(gpu);
      Line out = instead ? std::move(*instead) : row(columns, shown_[i]);
      out.chosen = looking_.height > 0 && i == at_;
      to.push_back(std::move(out));
    }
    if (count < shown_.size())
      to.push_back(line(fmt::format("    {} to {} of {}", from + 1, from + count, shown_.size()), Tone::dim));
  }

  // ---- slices
  static std::string processes_of(const Part& part) {
    std::string out;
    for (const Process& process : part.processes)
      out += fmt::format("{}{} [{}]", out.empty() ? "" : ", ", process.name, process.pid);
    return out;
  }

  std::vector<Column> part_columns(const std::vector<const Part*>& parts, bool with_gpu) const {
    const auto values = [this, &parts](std::size_t i, Signal signal, double scale = 1, int digits = 0) {
      return number(view_.gpus[parts[i]->gpu].seen, parts[i]->values, signal, now(), scale, digits);
    };
    // Where nobody has a lease there is no column for them; names get the room that they need.
    bool leases = false;
    std::size_t tenant = 6;
    for (const Part* part : parts) {
      leases = leases || part->lease != 0;
      tenant = std::max(tenant, std::min<std::size_t>(columns_of(part->tenant, wide()), 20));
      if (view_.tenants_known && part->tenant.empty() && !part->processes.empty() && part->instance)
        tenant = std::max<std::size_t>(tenant, 8);  // "no lease"
    }
    std::vector<Column> out;
    if (with_gpu)
      out.push_back({"GPU", 3, 3, 0, true, [this, &parts](std::size_t i, std::size_t) {
                       return Cell{std::to_string(view_.gpus[parts[i]->gpu].seen.index), Tone::bold};
                     }});
    out.push_back({"gi", 3, 3, 0, true, [&parts](std::size_t i, std::size_t) {
                     return parts[i]->instance ? Cell{std::to_string(*parts[i]->instance), Tone::plain}
                                               : Cell{"-", Tone::dim};
                   }});
    out.push_back({"slice", 10, 12, 0, false, [&parts](std::size_t i, std::size_t) {
                     return Cell{parts[i]->profile, Tone::plain};
                   }});
    out.push_back({"tenant", std::min<std::size_t>(tenant, 14), tenant, 0, false,
                   [this, &parts](std::size_t i, std::size_t) {
                     if (!parts[i]->tenant.empty()) return Cell{parts[i]->tenant, Tone::bold};
                     const bool used = !parts[i]->processes.empty();
                     // Somebody without a lease works in a slice that leases are given from.
                     if (used && view_.tenants_known && parts[i]->instance)
                       return Cell{"no lease", Tone::warn};
                     return Cell{used || !view_.processes_known ? "-" : "free", Tone::dim};
                   }});
    if (leases)
      out.push_back({"lease", 6, 6, 2, true, [&parts](std::size_t i, std::size_t) {
                       return parts[i]->lease != 0 ? Cell{std::to_string(parts[i]->lease), Tone::plain}
                                                   : Cell{"-", Tone::dim};
                     }});
    out.push_back(
        {"SM%", 4, 4, 0, true, [values](std::size_t i, std::size_t) { return values(i, Signal::sm); }});
    out.push_back({"minute", 8, 60, 3, false, [this, &parts](std::size_t i, std::size_t w) {
                     const Gpu& gpu = view_.gpus[parts[i]->gpu];
                     if (!parts[i]->instance)
                       return Cell{graph(gpu.sm, w, 100, looking_.blocks), Tone::plain};
                     const auto trail = gpu.slices.find(*parts[i]->instance);
                     return Cell{
                         trail != gpu.slices.end() ? graph(trail->second, w, 100, looking_.blocks) : "",
                         Tone::plain};
                   }});
    out.push_back(
        {"tens%", 5, 5, 5, true, [values](std::size_t i, std::size_t) { return values(i, Signal::tensor); }});
    out.push_back(
        {"DRAM%", 5, 5, 4, true, [values](std::size_t i, std::size_t) { return values(i, Signal::dram); }});
    out.push_back({"GiB", 5, 5, 0, true, [values, &parts](std::size_t i, std::size_t) {
                     Cell cell = values(i, Signal::memory_used);
                     const auto& used = parts[i]->values[static_cast<std::size_t>(Signal::memory_used)];
                     if (used.known()) cell.text = gib(used.number);
                     return cell;
                   }});
    out.push_back({"processes", 16, 400, 1, false, [&parts](std::size_t i, std::size_t) {
                     std::string text = processes_of(*parts[i]);
                     if (!parts[i]->state.empty()) text = parts[i]->state + (text.empty() ? "" : "; ") + text;
                     return Cell{text, parts[i]->state.empty() ? Tone::plain : Tone::warn};
                   }});
    return out;
  }

  void part_rows(std::vector<Line>& heading, std::vector<Line>& to, const std::vector<const Part*>& parts,
                 bool with_gpu) const {
    const auto columns = chosen_columns(part_columns(parts, with_gpu), looking_.width);
    heading.push_back(heads(columns));
    for (std::size_t i = 0; i < parts.size(); ++i) to.push_back(row(columns, i));
  }

  std::string about(std::size_t index) const {
    const Gpu& gpu = view_.gpus[index];
    const auto parts = parts_of(index);
    std::size_t slices = 0, taken = 0;
    for (const Part* part : parts) {
      if (!part->instance) continue;
      ++slices;
      if (!part->tenant.empty() || !part->processes.empty()) ++taken;
    }
    std::string out =
        fmt::format("GPU {}  {}  {}", gpu.seen.index, short_name(gpu.seen.name), gpu.seen.pci.str());
    if (slices > 0)
      out += fmt::format("  {}, {} free", plural(slices, "slice", "slices"), slices - taken);
    else if (!gpu.pool.empty())
      out += "  " + gpu.pool;
    if (!gpu.cordon.empty()) out += "  cordoned: " + gpu.cordon;
    return out;
  }

  void lower_part(std::vector<Line>& head, std::vector<Line>& body) {
    if (shown_.empty()) return;
    if (looking_.by_tenant || looking_.height == 0) {
      for (const Part& part : view_.parts) {
        if (!passes(part) && !named(view_.gpus[part.gpu])) continue;
        // On paper the free ones that are whole GPUs say nothing that the row above does not.
        if (part.tenant.empty() && part.processes.empty() && !part.instance) continue;
        listed_.push_back(&part);
      }
      if (looking_.by_tenant) {
        std::stable_sort(listed_.begin(), listed_.end(), [](const Part* a, const Part* b) {
          if (a->tenant.empty() != b->tenant.empty()) return b->tenant.empty();
          if (a->tenant != b->tenant) return a->tenant < b->tenant;
          return a->processes.empty() < b->processes.empty();
        });
        std::set<std::string> tenants;
        for (const Part* part : listed_)
          if (!part->tenant.empty()) tenants.insert(part->tenant);
        rule(head, fmt::format("{}, {} (t: by GPU)", plural(tenants.size(), "tenant", "tenants"),
                               plural(listed_.size(), "slice", "slices")));
      } else if (!listed_.empty()) {
        head.push_back(line(""));
      }
      if (!listed_.empty()) part_rows(head, body, listed_, true);
      return;
    }
    rule(head, about(chosen()));
    listed_ = parts_of(chosen());
    if (!looking_.filter.empty() && !named(view_.gpus[chosen()]))
      std::erase_if(listed_, [&](const Part* part) { return !passes(*part); });
    if (!listed_.empty()) part_rows(head, body, listed_, false);
    // Room that is left shows the minute larger.
    const std::size_t used = head.size() + body.size() + 1;
    if (looking_.height > used + 6)
      charts(body, chosen(), std::min<std::size_t>(looking_.height - used - 2, 16));
  }

  void charts(std::vector<Line>& to, std::size_t index, std::size_t height) const {
    const Gpu& gpu = view_.gpus[index];
    const Value& limit = gpu.seen[Signal::power_limit];
    const double most_power = limit.known() ? limit.number : 0;
    const std::size_t each = (looking_.width - 2) / 2, width = std::min<std::size_t>(each - 7, 120);
    const auto power = chart(gpu.power, width, height, most_power, looking_.blocks);
    const auto sm = chart(gpu.sm, width, height, 100, looking_.blocks);
    to.push_back(line(""));
    to.push_back(line({{fit("   SM%, the last minute", each, wide()), Tone::dim},
                       {"  " + fit("     W, the last minute", each, wide()), Tone::dim}}));
    const auto scale = [&](std::size_t i, double most) {
      return fit(i == 0            ? fmt::format("{:.0f}", most)
                 : i + 1 == height ? "0"
                 : i == height / 2 ? fmt::format("{:.0f}", most / 2)
                                   : "",
                 5, wide(), true);
    };
    for (std::size_t i = 0; i < height; ++i) {
      to.push_back(line({{scale(i, 100) + " ", Tone::dim},
                         {fit(sm[i], each - 6, wide()), Tone::plain},
                         {"  " + scale(i, most_power) + " ", Tone::dim},
                         {power[i], Tone::plain}}));
    }
  }

  // ---- one GPU
  void gpu_page(std::vector<Line>& head, std::vector<Line>& body) {
    if (shown_.empty()) {
      head.push_back(line("no GPU, tenant or process matches the filter", Tone::warn));
      return;
    }
    const std::size_t index = chosen();
    const Gpu& gpu = view_.gpus[index];
    rule(head, about(index));
    if (auto instead = silent(gpu)) body.push_back(std::move(*instead));
    for (const Alarm& alarm : view_.alarms)
      if (alarm.gpu == gpu.seen.index) body.push_back(alarm_line(alarm));
    std::string held;
    for (const Reason& reason : reasons_of(gpu.seen))
      held += (held.empty() ? "" : ", ") + std::string(reason.word);
    body.push_back(
        line({{"clocks held down by: ", Tone::dim}, {held.empty() ? "nothing" : held, Tone::plain}}));
    body.push_back(line({{"uuid: ", Tone::dim}, {gpu.seen.uuid.text, Tone::plain}}));

    listed_ = parts_of(index);
    if (!listed_.empty()) {
      body.push_back(line(""));
      const auto columns = chosen_columns(part_columns(listed_, false), looking_.width);
      body.push_back(heads(columns));
      for (std::size_t i = 0; i < listed_.size(); ++i) {
        body.push_back(row(columns, i));
        for (const Process& process : listed_[i]->processes)
          body.push_back(
              line({{fmt::format("      pid {:<9} ", process.pid), Tone::dim},
                    {fit(process.name, 24, wide()), Tone::plain},
                    {process.memory ? " " + gib(static_cast<double>(*process.memory)) + " GiB" : "",
                     Tone::plain}}));
        if (!listed_[i]->expires.empty())
          body.push_back(line("      lease until " + listed_[i]->expires, Tone::dim));
      }
    }
    body.push_back(line(""));
    values_grid(body, gpu);
    charts(body, index, 6);
  }

  void values_grid(std::vector<Line>& to, const Gpu& gpu) const {
    struct Entry {
      std::string text = {};
      Tone tone = Tone::plain;
    };
    std::vector<Entry> entries;
    for (const auto& about_signal : sample::rows()) {
      const Value& value = gpu.seen[about_signal.signal];
      std::string text = fmt::format("{:<19}", about_signal.name);
      for (char& c : text)
        if (c == '_') c = ' ';
      Tone tone = Tone::plain;
      if (!value.known()) {
        text += value.refused ? fmt::format("{} ({})", "-", name_of(*value.refused)) : "-";
        tone = Tone::dim;
      } else {
        const bool bits = about_signal.unit == "bits", bytes = about_signal.unit == "B";
        const bool times = about_signal.unit == "ns";
        std::string shown =
            bits    ? fmt::format("0x{:x}", static_cast<std::uint64_t>(value.number))
            : bytes ? gib(value.number) + " GiB"
            : times
                ? fmt::format("{:.1f} s", value.number / 1e9)
                : fmt::format(
                      "{:.{}f} {}", value.number,
                      value.number < 10 && value.number != std::floor(value.number) ? 1 : 0,
                      about_signal.unit == "count" || about_signal.unit == "flag" ? "" : about_signal.unit);
        text += fmt::format("{:<12}", shown);
        if (!fresh(gpu.seen, about_signal.signal, value, now())) {
          text += age(value.at_ns, now()) + " old";
          tone = Tone::warn;
        }
      }
      entries.push_back({std::move(text), tone});
    }
    const std::size_t across = std::max<std::size_t>(1, looking_.width / 40), each = looking_.width / across;
    const std::size_t down = (entries.size() + across - 1) / across;
    for (std::size_t i = 0; i < down; ++i) {
      Line out;
      for (std::size_t c = 0; c < across && c * down + i < entries.size(); ++c) {
        const Entry& entry = entries[c * down + i];
        out.spans.push_back({fit(entry.text, each - 1, wide()) + " ", entry.tone});
      }
      to.push_back(std::move(out));
    }
  }

  // ---- the other screens
  void alarm_page(std::vector<Line>& head, std::vector<Line>& body) const {
    rule(head, view_.alarms.empty() ? "no alarms" : plural(view_.alarms.size(), "alarm", "alarms"));
    for (const Alarm& alarm : view_.alarms) {
      bool first = true;
      for (const auto& words : wrapped(alarm.what, looking_.width - 4)) {
        const Tone tone = alarm.level == Level::critical ? Tone::bad : Tone::warn;
        body.push_back(
            line({{first ? (alarm.level == Level::critical ? "! " : "- ") : "  ", tone}, {words, tone}}));
        first = false;
      }
      if (!alarm.since.empty()) body.push_back(line("  since " + alarm.since, Tone::dim));
    }
  }

  void help_page(std::vector<Line>& to) const {
    static constexpr std::pair<std::string_view, std::string_view> rows[] = {
        {"up, down, j, k", "choose a GPU; below stand its slices and who is in them"},
        {"Enter", "the chosen GPU alone: processes, every value and its age; again, or Esc: back"},
        {"left, right", "there: the GPU before and after"},
        {"PgUp, PgDn", "move what is below, where it is longer than the screen"},
        {"t", "below: every slice in use, sorted by tenant"},
        {"a", "all alarms"},
        {"/", "a filter: GPU, tenant, profile, process or pid; Esc takes it away"},
        {"p", "pause: the page stands still, and says for how long"},
        {"q", "quit"},
        {"", ""},
        {"left", "degrees to the point where the chip slows itself down"},
        {"SM%", "part of the multiprocessors with work; older chips: time with any kernel"},
        {"tens%, DRAM%", "part of the tensor pipes' and the memory's peak"},
        {"power cap", "it draws what its limit allows: normal under load"},
        {"hot", "too warm: look at fans and at the air going in"},
        {"power brake", "the rack or a supply holds it down, not its tenant"},
        {"free", "a slice with no process and, as far as is known, no lease"},
        {"dim", "a value that is old; after some seconds its row says how old"},
    };
    to.push_back(line("Keys, and what the words mean", Tone::bold));
    to.push_back(line(""));
    for (const auto& [key, says] : rows) {
      bool first = true;
      for (const auto& words : wrapped(std::string(says), looking_.width - 18)) {
        to.push_back(line({{fit(first ? key : "", 16, wide()), Tone::bold}, {" " + words, Tone::plain}}));
        first = false;
      }
    }
  }

  Line key_line() const {
    if (looking_.typing)
      return line("type a GPU, tenant, profile, process or pid; Enter keeps it, Esc takes it away",
                  Tone::dim);
    static constexpr std::pair<std::string_view, std::string_view> all[] = {
        {"Enter", "one GPU"}, {"t", "tenants"}, {"/", "filter"}, {"a", "alarms"},
        {"p", "pause"},       {"h", "help"},    {"q", "quit"}};
    static constexpr std::pair<std::string_view, std::string_view> inner[] = {
        {"Esc", "back"}, {"left right", "other GPUs"}, {"PgUp PgDn", "more"}, {"p", "pause"}, {"q", "quit"}};
    Line out;
    const auto say = [&](std::string_view key, std::string_view word) {
      out.spans.push_back({std::string(out.spans.empty() ? "" : "  ") + std::string(key), Tone::bold});
      out.spans.push_back({" " + std::string(word), Tone::dim});
    };
    if (looking_.screen == Screen::all) {
      say(looking_.blocks ? "↑↓" : "up down", "GPU");
      for (const auto& [key, word] : all) say(key, word);
    } else {
      for (const auto& [key, word] : inner) {
        if (key == "left right" && looking_.screen != Screen::gpu) continue;
        say(key == "left right" && looking_.blocks ? "←→" : key, word);
      }
    }
    return out;
  }

  Page assemble(std::vector<Line> head, std::vector<Line> body, std::vector<Line> foot) {
    Page page;
    page.shown = shown_;
    std::size_t from = 0, count = body.size();
    if (looking_.height > 0) {
      const std::size_t fixed = std::min<std::size_t>(looking_.height, head.size() + foot.size());
      const std::size_t room = looking_.height - fixed;
      if (count > room) {
        page.most_scroll = count - room;
        from = std::min(looking_.scroll, page.most_scroll);
        count = room;
      }
    }
    page.lines = std::move(head);
    for (std::size_t i = from; i < from + count; ++i) page.lines.push_back(std::move(body[i]));
    if (looking_.height > 0) {
      const std::size_t keep = looking_.height > foot.size() ? looking_.height - foot.size() : 0;
      page.lines.resize(keep);  // fills up, or cuts
      for (auto& one : foot) page.lines.push_back(std::move(one));
      page.lines.resize(std::min<std::size_t>(page.lines.size(), looking_.height));
    }
    // The one place where all text passes on its way to a terminal.
    for (Line& one : page.lines) {
      std::size_t room = looking_.width;
      for (Span& span : one.spans) {
        Cut kept = cut(span.text, room, wide());
        room -= kept.width;
        span.text = std::move(kept.text);
      }
      if (one.chosen && room > 0) one.spans.push_back({std::string(room, ' '), Tone::plain});
    }
    return page;
  }

  const View& view_;
  const Looking& looking_;
  std::vector<std::size_t> shown_ = {};
  std::size_t at_ = 0;                    // the chosen one, in shown_
  std::vector<const Part*> listed_ = {};  // what the columns of parts point into
};

}  // namespace

std::string fit(std::string_view text, std::size_t width, bool wide, bool to_the_right) {
  Cut kept = cut(text, width, wide);
  if (!kept.whole && width > 3) {
    kept = cut(text, width - 1, wide);
    kept.text += '~';
    ++kept.width;
  }
  const std::string room(width - kept.width, ' ');
  return to_the_right ? room + kept.text : kept.text + room;
}

namespace {

// The highest of each cell's seconds.
std::vector<std::optional<double>> cells(const Trail& trail, std::size_t width) {
  std::vector<std::optional<double>> out(width);
  for (std::size_t i = 0; i < width; ++i) {
    const std::size_t from = i * trail_seconds / width;
    const std::size_t to = std::max(from + 1, (i + 1) * trail_seconds / width);
    for (std::size_t s = from; s < to; ++s)
      if (trail[s]) out[i] = std::max(out[i].value_or(0), *trail[s]);
  }
  return out;
}

constexpr std::string_view eighths[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
constexpr std::string_view letters = "_.-=+*%#";

}  // namespace

std::string graph(const Trail& trail, std::size_t width, double most, bool blocks) {
  std::string out;
  for (const auto& value : cells(trail, width)) {
    if (!value || !(most > 0)) {
      out += ' ';
      continue;
    }
    const auto level = static_cast<std::size_t>(std::clamp(*value / most * 8, 0.0, 7.0));
    if (blocks) {
      out += eighths[level];
    } else {
      out += letters[level];
    }
  }
  return out;
}

std::vector<std::string> chart(const Trail& trail, std::size_t width, std::size_t height, double most,
                               bool blocks) {
  std::vector<std::string> out(height);
  for (const auto& value : cells(trail, width)) {
    const double full =
        value && most > 0 ? std::clamp(*value / most, 0.0, 1.0) * static_cast<double>(height) : 0;
    for (std::size_t line = 0; line < height; ++line) {
      const double part = full - static_cast<double>(height - 1 - line);
      const bool lowest = line + 1 == height;
      if (!value || most <= 0 || (part <= 0 && !lowest)) {
        out[line] += ' ';
      } else if (blocks) {
        out[line] += eighths[static_cast<std::size_t>(std::clamp(part * 8 - 0.5, 0.0, 7.0))];
      } else {
        out[line] += part >= 0.75 ? '#' : part >= 0.25 ? '=' : '_';
      }
    }
  }
  return out;
}

std::string age(std::uint64_t then_ns, std::uint64_t now_ns) {
  const std::uint64_t seconds = now_ns > then_ns ? (now_ns - then_ns) / second_ns : 0;
  if (seconds < 120) return fmt::format("{} s", seconds);
  if (seconds < 7200) return fmt::format("{} min", seconds / 60);
  return fmt::format("{} h", seconds / 3600);
}

std::vector<Reason> reasons_of(const sample::Gpu& gpu) {
  // nvml.h, nvmlClocksEventReason*. The bit for any slowdown by the hardware stands beside those that say
  // which.
  struct Row {
    std::uint64_t bit, unless;
    Reason reason;
  };
  static constexpr Row table[] = {
      {0x40, 0, {"hot (hardware slows it)", Tone::bad}},
      {0x80, 0, {"power brake", Tone::bad}},
      {0x08, 0xc0, {"slowed by hardware", Tone::bad}},
      {0x20, 0, {"hot (driver slows it)", Tone::warn}},
      {0x04, 0, {"power cap", Tone::plain}},
      {0x02, 0, {"clocks set", Tone::plain}},
      {0x10, 0, {"sync boost", Tone::plain}},
      {0x100, 0, {"display clocks", Tone::plain}},
  };
  std::vector<Reason> out;
  const Value& value = gpu[Signal::reasons];
  if (!value.known() || gpu.state != State::sampling) return out;
  const auto bits = static_cast<std::uint64_t>(value.number);
  for (const Row& row : table)
    if ((bits & row.bit) != 0 && (bits & row.unless) == 0) out.push_back(row.reason);
  return out;
}

std::vector<Alarm> alarms_of(const sample::Gpu& gpu, std::uint64_t now) {
  std::vector<Alarm> out;
  const auto add = [&](Level level, const std::string& what) {
    out.push_back({level, gpu.index, fmt::format("GPU {}: {}", gpu.index, what), {}});
  };
  const auto of = [&](Signal signal) { return gpu[signal].known() ? gpu[signal].number : 0; };
  if (gpu.state == State::hung)
    add(Level::critical,
        fmt::format("its driver call {} has not come back for {}", gpu.call, age(gpu.since_ns, now)));
  if (gpu.state == State::lost) add(Level::critical, "lost: " + gpu.why);
  for (const Reason& reason : reasons_of(gpu)) {
    if (reason.tone != Tone::bad && reason.tone != Tone::warn) continue;
    const bool hot = reason.word.starts_with("hot");
    add(reason.tone == Tone::bad ? Level::critical : Level::warning,
        std::string(reason.word) + (hot ? fmt::format(", at {:.0f} C", of(Signal::temperature)) : ""));
  }
  if (of(Signal::remap_failed) > 0)
    add(Level::critical, "bad memory rows can no longer be replaced by spare ones: have the part exchanged");
  if (of(Signal::remap_pending) > 0)
    add(Level::warning, "a bad memory row waits to be replaced: reset the GPU when it is free");
  if (of(Signal::ecc_uncorrected) > 0)
    add(Level::critical,
        fmt::format("{:.0f} uncorrectable memory error{} since the driver was loaded",
                    of(Signal::ecc_uncorrected), of(Signal::ecc_uncorrected) == 1 ? "" : "s"));
  return out;
}

void Trails::add(const std::string& key, std::uint64_t at_ns, double value) {
  Ring& ring = rings_[key];
  const std::uint64_t second = at_ns / second_ns + 1;
  const std::size_t place = second % ring.value.size();
  ring.value[place] = ring.second[place] == second ? std::max(ring.value[place], value) : value;
  ring.second[place] = second;
}

Trail Trails::get(const std::string& key, std::uint64_t now_ns) const {
  Trail out;
  const auto found = rings_.find(key);
  if (found == rings_.end()) return out;
  const Ring& ring = found->second;
  const std::uint64_t last = now_ns / second_ns + 1;
  const auto at = [&](std::uint64_t second) -> std::optional<double> {
    const std::size_t place = second % ring.value.size();
    if (second == 0 || ring.second[place] != second) return std::nullopt;
    return ring.value[place];
  };
  // A value stands until the next one comes, for as long as sampling takes at its slowest pace for graphs:
  // a line with holes in it would look like load that comes and goes.
  constexpr std::uint64_t bridge = 4;
  for (std::size_t i = 0; i < trail_seconds; ++i) {
    const std::uint64_t back = trail_seconds - 1 - i;
    if (last <= back) continue;
    const std::uint64_t second = last - back;
    for (std::uint64_t before = 0; before < bridge && before < second && !out[i]; ++before)
      out[i] = at(second - before);
  }
  return out;
}

Page draw(const View& view, const Looking& looking) {
  Looking checked = looking;
  checked.width = std::clamp(checked.width, 40U, 1000U);
  return Drawing(view, checked).page();
}

std::string plain(const Context& context, const Page& page) {
  std::string out;
  for (const Line& line : page.lines) {
    std::string text;
    for (std::size_t i = 0; i < line.spans.size(); ++i) {
      std::string span = line.spans[i].text;
      if (i + 1 == line.spans.size()) span.erase(span.find_last_not_of(' ') + 1);
      text += line.spans[i].tone == Tone::plain ? span : paint(context, line.spans[i].tone, span);
    }
    if (!context.colour) text.erase(text.find_last_not_of(' ') + 1);
    out += text + "\n";
  }
  return out;
}

Json to_json(const View& view) {
  sample::Snapshot snapshot{.at_ns = view.now_ns, .why = view.why, .gpus = {}};
  for (const Gpu& gpu : view.gpus) snapshot.gpus.push_back(gpu.seen);
  Json document = Json{{"time", view.time},
                       {"host", view.host},
                       {"driver", view.driver},
                       {"from", view.from},
                       {"tenants_known", view.tenants_known}};
  document.update(sample::to_json(snapshot));
  Json& gpus = document["gpus"];
  for (std::size_t i = 0; i < view.gpus.size() && i < gpus.size(); ++i) {
    gpus[i]["pool"] = view.gpus[i].pool;
    if (view.gpus[i].memory_total > 0) gpus[i]["memory_total"] = view.gpus[i].memory_total;
    if (!view.gpus[i].cordon.empty()) gpus[i]["cordon"] = view.gpus[i].cordon;
    Json held = Json::array();
    for (const Reason& reason : reasons_of(view.gpus[i].seen)) held.push_back(reason.word);
    gpus[i]["held_down_by"] = std::move(held);
    gpus[i]["parts"] = Json::array();
  }
  for (const Part& part : view.parts) {
    if (part.gpu >= gpus.size()) continue;
    Json one = Json::object();
    if (part.instance) one["gpu_instance"] = *part.instance;
    one["profile"] = part.profile;
    if (!part.tenant.empty()) one["tenant"] = part.tenant;
    if (part.lease != 0) one["lease"] = part.lease;
    if (!part.state.empty()) one["state"] = part.state;
    if (!part.expires.empty()) one["expires"] = part.expires;
    Json processes = Json::array();
    for (const Process& process : part.processes) {
      processes.push_back({{"pid", process.pid}, {"name", process.name}});
      if (process.memory) processes.back()["memory"] = *process.memory;
    }
    one["processes"] = std::move(processes);
    gpus[part.gpu]["parts"].push_back(std::move(one));
  }
  Json alarms = Json::array();
  for (const Alarm& alarm : view.alarms) {
    Json one = {{"severity", alarm.level == Level::critical ? "critical" : "warning"}};
    if (alarm.gpu) one["gpu"] = *alarm.gpu;
    one["what"] = alarm.what;
    if (!alarm.since.empty()) one["since"] = alarm.since;
    alarms.push_back(std::move(one));
  }
  document["alarms"] = std::move(alarms);
  document["notes"] = view.notes;
  return document;
}

}  // namespace bulkhead::cli::top
