// simulate --trace: a list of pods replayed on a list of nodes, a run for each policy and seed.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <optional>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"
#include "cli/simulate_page.hpp"
#include "core/plot/plot.hpp"
#include "core/replay/replay.hpp"

namespace bulkhead::cli {

namespace {

constexpr std::size_t kPublishedBytes = 1U << 20U;
constexpr unsigned kCurvePoints = 130;

struct Published {
  double mean = 0;
  double sd = 0;
};
using PublishedTable = std::map<std::string, Published, std::less<>>;  // by policy's published name

// "…/openb_pod_list_default.csv" -> "default".
std::string trace_name(const std::string& path) {
  std::string name = std::filesystem::path(path).stem().string();
  constexpr std::string_view prefix = "openb_pod_list_";
  return name.starts_with(prefix) ? name.substr(prefix.size()) : name;
}

std::optional<double> number(std::string_view text) {
  const std::string copy(trim(text));
  char* end = nullptr;
  const double value = std::strtod(copy.c_str(), &end);
  if (copy.empty() || *end != '\0' || !std::isfinite(value)) return std::nullopt;
  return value;
}

Result<PublishedTable> read_published(const std::string& path, const std::string& trace) {
  BH_TRY(const std::string text, read_file(path, kPublishedBytes));
  PublishedTable out;
  std::size_t number_of_line = 0;
  for (const auto line : split_lines(text)) {
    ++number_of_line;
    if (number_of_line == 1 || trim(line).empty()) continue;
    const auto cells = split(line, ',');
    const auto bad = [&](std::string_view why) {
      return Error(Errc::invalid, fmt::format("{}: line {}: {}", printable(path), number_of_line, why),
                   "its columns: trace,policy,seeds,allocation_percent_mean,allocation_percent_sd");
    };
    if (cells.size() != 5) return bad("not five columns");
    if (trim(cells[0]) != trace) continue;
    const auto mean = number(cells[3]), sd = number(cells[4]);
    if (!mean || !sd) return bad("mean or sd is no number");
    const auto policy = replay::policy_named(trim(cells[1]));
    if (policy) out[std::string(replay::name_of(*policy))] = {*mean, *sd};
  }
  return out;
}

struct Row {
  replay::Policy policy = replay::Policy::ours;
  std::vector<std::uint64_t> seeds = {};  // of the runs that were done
  std::vector<replay::Outcome> outcomes = {};
  std::vector<double> seconds = {};
  std::optional<Published> published = {};
  Spread allocated() const {
    std::vector<double> values;
    for (const auto& outcome : outcomes) values.push_back(outcome.allocated_percent);
    return spread(values);
  }
  double mean(double (*figure)(const replay::Outcome&)) const {
    double sum = 0;
    for (const auto& outcome : outcomes) sum += figure(outcome);
    return outcomes.empty() ? 0 : sum / static_cast<double>(outcomes.size());
  }
};

double at(const std::vector<replay::Point>& curve, bool times, double x) {
  const auto where = [&](const replay::Point& point) {
    return times ? point.time / 3600 : point.arrived_percent;
  };
  const auto after =
      std::find_if(curve.begin(), curve.end(), [&](const auto& point) { return where(point) >= x; });
  if (after == curve.end()) return curve.empty() ? 0 : curve.back().allocated_percent;
  if (after == curve.begin()) return after->allocated_percent;
  const auto before = std::prev(after);
  const double span = where(*after) - where(*before);
  const double part = span > 0 ? (x - where(*before)) / span : 1;
  return before->allocated_percent + part * (after->allocated_percent - before->allocated_percent);
}

// The mean over a row's seeds, at even distances.
plot::Curve mean_curve(const Row& row, bool times) {
  plot::Curve out{.name = std::string(replay::name_of(row.policy))};
  double last = INFINITY;
  for (const auto& outcome : row.outcomes) {
    if (!outcome.curve.empty())
      last = std::min(last, times ? outcome.curve.back().time / 3600 : outcome.curve.back().arrived_percent);
  }
  if (!std::isfinite(last)) return out;
  for (unsigned i = 0; i <= kCurvePoints; ++i) {
    const double x = last * i / kCurvePoints;
    double sum = 0;
    for (const auto& outcome : row.outcomes) sum += at(outcome.curve, times, x);
    out.points.emplace_back(x, sum / static_cast<double>(row.outcomes.size()));
  }
  return out;
}

Json to_json(const Row& row, bool times) {
  const Spread allocated = row.allocated();
  Json runs = Json::array();
  for (std::size_t i = 0; i < row.outcomes.size(); ++i) {
    const auto& o = row.outcomes[i];
    runs.push_back({{"seed", row.seeds[i]},
                    {"allocatedPercent", o.allocated_percent},
                    {"fragmentationPercent", o.fragmentation_percent},
                    {"arrivals", o.arrivals},
                    {"failed", o.failed},
                    {"gpuMilliArrived", o.gpu_milli_arrived},
                    {"gpuMilliFailed", o.gpu_milli_failed},
                    {"seconds", row.seconds[i]}});
  }
  Json out = {{"policy", replay::name_of(row.policy)}, {"runs", std::move(runs)}};
  if (row.outcomes.empty()) return out;
  out["allocatedPercent"] = {{"mean", allocated.mean}, {"sd", allocated.sd}};
  if (row.published) {
    out["published"] = {{"mean", row.published->mean}, {"sd", row.published->sd}};
    out["difference"] = allocated.mean - row.published->mean;
  }
  Json curve = Json::array();
  for (const auto& [x, y] : mean_curve(row, times).points) curve.push_back({x, y});
  out["curve"] = std::move(curve);
  return out;
}

}  // namespace

int simulate_trace(const Context& context, const SimulateOptions& options) {
  const auto refuse = [&](Error error) { return fail(context, std::move(error).in("simulate")); };
  if (!options.mixes.empty())
    return refuse(Error(Errc::invalid, "--mix belongs to --mig", "try: bulkhead simulate --help"));
  if (options.nodes_file.empty())
    return refuse(Error(
        Errc::invalid, "--trace wants the nodes too",
        fmt::format("try: bulkhead simulate --trace {} --nodes-file NODES.csv", shell_word(options.trace))));
  if (options.nodes > 0 && options.gpus > 0)
    return refuse(
        Error(Errc::invalid, "--nodes and --gpus both say how large the fleet is", "give one of them"));
  const auto seeds = parse_seeds(options.seeds.empty() ? "42..51" : options.seeds);
  if (!seeds.ok()) return refuse(seeds.error());

  auto names = names_of(options.policies);
  if (names.empty()) names = {"ours", "fgd", "best-fit", "random"};
  std::vector<Row> rows;
  for (const auto& name : names) {
    std::vector<replay::Policy> chosen;
    if (name == "all") {
      chosen.assign(std::begin(replay::kPolicies), std::end(replay::kPolicies));
    } else if (const auto policy = replay::policy_named(name)) {
      chosen = {*policy};
    } else {
      static const std::vector<std::string_view> known = {
          "ours", "random", "dotprod", "gpuclustering", "gpupacking", "best-fit", "fgd"};
      const auto meant = closest(name, known);
      return refuse(Error(
          Errc::invalid, fmt::format("--policy {}: no such policy for a trace", printable(name, 64)),
          meant.empty() ? "try: bulkhead simulate --list" : fmt::format("did you mean: --policy {}", meant)));
    }
    for (const auto policy : chosen) {
      if (std::none_of(rows.begin(), rows.end(), [&](const Row& row) { return row.policy == policy; }))
        rows.push_back({.policy = policy});
    }
  }

  const auto read = [](const std::string& path) { return read_file(path, replay::kMostText); };
  const auto pod_text = read(options.trace);
  if (!pod_text.ok()) return refuse(Error(pod_text.error()).in("--trace"));
  const auto pods = replay::parse_pods(*pod_text);
  if (!pods.ok()) return refuse(Error(pods.error()).in(printable(options.trace)));
  const auto node_text = read(options.nodes_file);
  if (!node_text.ok()) return refuse(Error(node_text.error()).in("--nodes-file"));
  auto nodes = replay::parse_nodes(*node_text);
  if (!nodes.ok()) return refuse(Error(nodes.error()).in(printable(options.nodes_file)));
  std::size_t wanted_nodes = options.nodes;
  if (options.gpus > 0) {
    const auto needed = replay::nodes_for_gpus(*nodes, options.gpus);
    if (!needed.ok()) return refuse(Error(needed.error()).in("--gpus"));
    wanted_nodes = *needed;
  }
  const bool resized = wanted_nodes > 0 && wanted_nodes != nodes->nodes.size();
  if (wanted_nodes > 0) {
    auto larger = replay::enlarge(*nodes, wanted_nodes);
    if (!larger.ok()) return refuse(Error(larger.error()).in("--nodes"));
    nodes = std::move(larger);
  }

  // Published figures are of the experiment as published: its fleet, 130 % of arrivals, no departures.
  const std::string trace = trace_name(options.trace);
  const bool comparable = !resized && !options.times && options.arrivals == 130;
  const auto beside = std::filesystem::path(options.trace).parent_path() / "published_allocation.csv";
  std::error_code ignored;
  const bool found = options.published.empty() && std::filesystem::exists(beside, ignored);
  if (comparable && (found || !options.published.empty())) {
    const auto table = read_published(found ? beside.string() : options.published, trace);
    if (!table.ok()) return refuse(Error(table.error()).in("--published"));
    for (auto& row : rows) {
      const auto entry = table->find(replay::name_of(row.policy));
      if (entry != table->end()) row.published = entry->second;
    }
  }

  std::vector<Run> runs;
  std::vector<std::optional<Result<replay::Outcome>>> answers(rows.size() * seeds->size());
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::size_t s = 0; s < seeds->size(); ++s) {
      const std::size_t i = runs.size();
      runs.push_back({fmt::format("{} seed {}", replay::name_of(rows[r].policy), (*seeds)[s]),
                      [&, r, s, i](const std::function<bool(std::uint64_t, std::uint64_t)>& tick) {
                        const replay::Options one{.seed = (*seeds)[s], .arrived_percent = options.arrivals};
                        answers[i] = options.times
                                         ? replay::replay_times(*nodes, *pods, rows[r].policy, one, tick)
                                         : replay::sample(*nodes, *pods, rows[r].policy, one, tick);
                      }});
    }
  }
  const Crew crew = carry_out(context, runs, options.threads, options.quiet);
  std::size_t done = 0;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (!answers[i]) continue;
    if (!answers[i]->ok()) return refuse(Error(answers[i]->error()).in(runs[i].name));
    if ((**answers[i]).cancelled) continue;  // a part of a run is no figure
    Row& row = rows[i / seeds->size()];
    row.seeds.push_back((*seeds)[i % seeds->size()]);
    row.seconds.push_back(static_cast<double>(crew.ns[i]) / 1e9);
    row.outcomes.push_back(std::move(*answers[i]).value());
    ++done;
  }

  if (!options.plot.empty() && done > 0) {
    plot::Curves figure{.title = fmt::format("GPUs in use, {} on {} GPUs", trace, nodes->gpus()),
                        .note = fmt::format("mean of {} seeds", seeds->size()),
                        .x = {.label = options.times ? "hours" : "GPUs asked for so far, of the fleet's",
                              .unit = options.times ? "" : "%"},
                        .y = {.label = "GPUs in use, of the fleet's", .unit = "%"}};
    if (!options.times) figure.x.to = options.arrivals;
    // Up to here every policy places all that comes, and their curves are one.
    if (!options.times && options.arrivals > 80) figure.x.from = 70;
    for (const auto& row : rows) {
      if (!row.outcomes.empty()) figure.curves.push_back(mean_curve(row, options.times));
    }
    const auto written = write_plot(options.plot, plot::draw(figure));
    if (!written.ok()) return refuse(written.error());
  }

  std::string out;
  if (options.json) {
    Json list = Json::array();
    for (const auto& row : rows) list.push_back(to_json(row, options.times));
    out = dump(Json{{"apiVersion", "bulkhead/v1"},
                    {"kind", "Simulation"},
                    {"experiment", options.times ? "trace-times" : "trace"},
                    {"trace", trace},
                    {"pods", pods->pods.size()},
                    {"nodes", nodes->nodes.size()},
                    {"gpus", nodes->gpus()},
                    {"arrivalsPercent", options.arrivals},
                    {"seeds", *seeds},
                    {"stopped", crew.stopped},
                    {"policies", std::move(list)}}) +
          "\n";
  } else {
    out = paint(context, Tone::bold,
                fmt::format("{}: {} pods, {} nodes, {} GPUs", printable(trace), pods->pods.size(),
                            nodes->nodes.size(), nodes->gpus())) +
          (options.times
               ? "; the trace's own arrivals and departures\n"
               : fmt::format("; arrivals to {:g} % of the GPUs, drawn with replacement\n", options.arrivals));
    out += "\n";
    const bool any_published =
        std::any_of(rows.begin(), rows.end(), [](const Row& row) { return row.published.has_value(); });
    std::vector<std::string> header = {"POLICY", "SEEDS", "IN USE %", "SD"};
    if (any_published) header.insert(header.end(), {"PUBLISHED", "DIFFERENCE"});
    header.insert(header.end(), {"TURNED AWAY", "UNUSABLE IDLE %", "PODS/S"});
    Table table(header);
    for (const auto& row : rows) {
      if (row.outcomes.empty()) continue;
      const Spread allocated = row.allocated();
      std::vector<std::string> cells = {std::string(replay::name_of(row.policy)),
                                        std::to_string(row.seeds.size()),
                                        fmt::format("{:.2f}", allocated.mean),
                                        row.seeds.size() < 2 ? "-" : fmt::format("{:.2f}", allocated.sd)};
      if (any_published) {
        cells.push_back(row.published ? fmt::format("{:.2f}", row.published->mean) : "-");
        cells.push_back(row.published ? fmt::format("{:+.2f}", allocated.mean - row.published->mean) : "-");
      }
      double arrivals = 0, seconds = 0;
      for (std::size_t i = 0; i < row.outcomes.size(); ++i) {
        arrivals += static_cast<double>(row.outcomes[i].arrivals);
        seconds += row.seconds[i];
      }
      cells.push_back(
          fmt::format("{:.0f}", row.mean([](const auto& o) { return static_cast<double>(o.failed); })));
      cells.push_back(fmt::format("{:.1f}", row.mean([](const auto& o) { return o.fragmentation_percent; })));
      cells.push_back(fmt::format("{:.0f}", seconds > 0 ? arrivals / seconds : 0));
      table.row(std::move(cells));
    }
    out += table.str(context);
    if (!options.plot.empty() && done > 0) out += fmt::format("\nDrawn: {}\n", printable(options.plot));
  }
  return print_figures(context, out, crew, done);
}

}  // namespace bulkhead::cli
