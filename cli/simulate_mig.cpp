// simulate --mig: a stream of MIG jobs on GPUs of one model, a run for each mix, policy and seed.
#include <algorithm>
#include <cmath>
#include <optional>

#include <fmt/format.h>

#include "base/text.hpp"
#include "cli/plan_page.hpp"
#include "cli/simulate_page.hpp"
#include "core/churn/churn.hpp"
#include "core/models/models.hpp"
#include "core/plot/plot.hpp"

namespace bulkhead::cli {

namespace {

struct Chip {
  std::string name = {};
  std::string source = {};
  mig::Geometry geometry = {};
};

Result<Chip> chip_of(const Context& context, const std::string& name) {
  if (lower(name) != "host") {
    if (const auto* model = models::find(name))
      return Chip{std::string(model->title), std::string(model->source), models::geometry(*model)};
    const auto names = models::names();
    const auto meant = closest(name, names);
    std::string known;
    for (const auto one : names) known += (known.empty() ? "" : ", ") + std::string(one);
    return Error(Errc::invalid, fmt::format("--mig {}: no such model", printable(name, 64)),
                 meant.empty() ? fmt::format("known without hardware: {}\nthis host's own: --mig host", known)
                               : fmt::format("did you mean: --mig {}", meant));
  }
  auto access = access_of(context);
  access.detail = observe::Detail::plan;
  BH_TRY(const auto host, observe::host(access));
  for (const auto& gpu : host.gpus) {
    if (!gpu.mig_capable || gpu.geometry.profiles.empty()) continue;
    return Chip{gpu.model, fmt::format("the driver of this host, GPU {}", gpu.index), gpu.geometry};
  }
  return Error(Errc::unsupported, "--mig host: this host has no GPU that can do MIG",
               "name a model instead: bulkhead simulate --list");
}

struct Cell {
  std::vector<std::uint64_t> seeds = {};
  std::vector<churn::Outcome> outcomes = {};
  std::vector<double> seconds = {};
  Spread accepted() const {
    std::vector<double> values;
    for (const auto& outcome : outcomes) values.push_back(outcome.accepted_percent);
    return spread(values);
  }
  // Of one run its own interval; of several that of their mean, taken as independent.
  double half_width() const {
    double squares = 0;
    for (const auto& outcome : outcomes) squares += outcome.half_width * outcome.half_width;
    return outcomes.empty() ? 0 : std::sqrt(squares) / static_cast<double>(outcomes.size());
  }
  double mean(double (*figure)(const churn::Outcome&)) const {
    double sum = 0;
    for (const auto& outcome : outcomes) sum += figure(outcome);
    return outcomes.empty() ? 0 : sum / static_cast<double>(outcomes.size());
  }
};

Json to_json(const churn::Outcome& o, std::uint64_t seed, double seconds) {
  Json kinds = Json::array();
  for (const auto& kind : o.kinds)
    kinds.push_back({{"profile", kind.profile},
                     {"slices", kind.slices},
                     {"offered", kind.offered},
                     {"accepted", kind.accepted}});
  return {{"seed", seed},
          {"acceptedPercent", o.accepted_percent},
          {"halfWidth", o.half_width},
          {"jobsPercent", o.jobs_percent},
          {"busyPercent", o.busy_percent},
          {"offered", o.offered},
          {"accepted", o.accepted},
          {"moves", o.moves},
          {"movesPer100", o.moves_per_100},
          {"events", o.events},
          {"seconds", seconds},
          {"kinds", std::move(kinds)}};
}

}  // namespace

int simulate_mig(const Context& context, const SimulateOptions& options) {
  const auto refuse = [&](Error error) { return fail(context, std::move(error).in("simulate")); };
  if (!options.nodes_file.empty() || options.nodes > 0 || options.times)
    return refuse(Error(Errc::invalid, "--nodes-file, --nodes and --times belong to --trace",
                        "how many GPUs --mig has: --gpus N"));
  const auto seeds = parse_seeds(options.seeds.empty() ? "1" : options.seeds);
  if (!seeds.ok()) return refuse(seeds.error());
  const auto chip = chip_of(context, options.mig);
  if (!chip.ok()) return refuse(chip.error());
  churn::Holding holding = churn::Holding::exponential;
  if (options.holding == "fixed")
    holding = churn::Holding::fixed;
  else if (options.holding == "heavy")
    holding = churn::Holding::heavy;
  else if (options.holding != "exponential")
    return refuse(Error(Errc::invalid, fmt::format("--holding {}: exponential, fixed or heavy",
                                                   printable(options.holding, 64))));

  // A mix written out has commas of its own, so each --mix is one name list or one such mix.
  std::vector<churn::Mix> mixes;
  for (const auto& given : options.mixes.empty() ? std::vector<std::string>{"uniform"} : options.mixes) {
    std::vector<std::string> names;
    if (given.find('=') != std::string::npos) {
      names = {given};
    } else if (given == "all") {
      for (const auto& row : churn::mixes()) names.emplace_back(row.name);
    } else {
      names = names_of({given});
    }
    for (const auto& name : names) {
      auto mix = churn::parse_mix(name, chip->geometry);
      if (!mix.ok()) {
        auto error = std::move(mix).error().in("--mix");
        if (error.hint().empty()) error = std::move(error).with_hint("try: bulkhead simulate --list");
        return refuse(std::move(error));
      }
      if (std::none_of(mixes.begin(), mixes.end(),
                       [&](const auto& known) { return known.name == mix->name; }))
        mixes.push_back(std::move(*mix));
    }
  }
  auto names = names_of(options.policies);
  if (names.empty()) names = {"ours", "ours+3@5", "ours+3", "mfi", "best-fit", "first-fit", "free"};
  std::vector<churn::Policy> policies;
  for (const auto& name : names) {
    auto policy = churn::named_policy(name == "free" ? "repack" : name);
    if (!policy.ok()) {
      auto error = std::move(policy).error().in("--policy");
      if (error.hint().empty()) error = std::move(error).with_hint("try: bulkhead simulate --list");
      return refuse(std::move(error));
    }
    policies.push_back(*policy);
  }
  constexpr std::uint64_t most_gpus = 1'000'000;
  if (options.gpus > most_gpus)
    return refuse(Error(Errc::invalid, fmt::format("--gpus {}: at most {}", options.gpus, most_gpus)));
  const auto gpus = static_cast<unsigned>(options.gpus == 0 ? 100 : options.gpus);

  std::vector<Run> runs;
  std::vector<std::optional<Result<churn::Outcome>>> answers(mixes.size() * policies.size() * seeds->size());
  for (const auto& mix : mixes) {
    for (std::size_t p = 0; p < policies.size(); ++p) {
      for (const auto seed : *seeds) {
        const std::size_t i = runs.size();
        runs.push_back({fmt::format("{} {} seed {}", printable(mix.name, 32), names[p], seed),
                        [&, i, p, seed](const std::function<bool(std::uint64_t, std::uint64_t)>& tick) {
                          answers[i] = churn::simulate({.pools = {{chip->geometry, gpus}},
                                                        .mix = mix,
                                                        .policy = policies[p],
                                                        .holding = holding,
                                                        .load = options.load,
                                                        .jobs = options.jobs,
                                                        .seed = seed},
                                                       tick);
                        }});
      }
    }
  }
  const Crew crew = carry_out(context, runs, options.threads, options.quiet);
  std::vector<std::vector<Cell>> cells(mixes.size(), std::vector<Cell>(policies.size()));
  std::size_t done = 0;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (!answers[i]) continue;
    if (!answers[i]->ok()) {
      if (crew.stopped && answers[i]->error().code() == Errc::timeout) continue;
      return refuse(Error(answers[i]->error()).in(runs[i].name));
    }
    Cell& cell = cells[i / seeds->size() / policies.size()][i / seeds->size() % policies.size()];
    cell.seeds.push_back((*seeds)[i % seeds->size()]);
    cell.seconds.push_back(static_cast<double>(crew.ns[i]) / 1e9);
    cell.outcomes.push_back(std::move(*answers[i]).value());
    ++done;
  }

  if (!options.plot.empty() && done > 0) {
    plot::Bars figure{
        .title = fmt::format("Accepted of the slices asked for, {} x {}, load {:g}", gpus, chip->name,
                             options.load),
        .note = "free: no online rule, all instances may move at will; whiskers: 95 % intervals",
        .y = {.label = "slices accepted, of those asked for", .unit = "%"}};
    for (const auto& mix : mixes) figure.groups.push_back(printable(mix.name, 24));
    for (std::size_t p = 0; p < policies.size(); ++p) {
      plot::Bars::Row row{.name = names[p]};
      for (std::size_t m = 0; m < mixes.size(); ++m) {
        const Cell& cell = cells[m][p];
        row.bars.push_back(cell.outcomes.empty()
                               ? std::nullopt
                               : std::optional(plot::Bar{cell.accepted().mean, cell.half_width()}));
      }
      figure.rows.push_back(std::move(row));
    }
    const auto written = write_plot(options.plot, plot::draw(figure));
    if (!written.ok()) return refuse(written.error());
  }

  // The bound that the others are measured against, where it was asked for.
  const auto bound = std::find_if(policies.begin(), policies.end(),
                                  [](const auto& policy) { return policy.rule == churn::Rule::repack; });
  const auto bound_at = static_cast<std::size_t>(bound - policies.begin());
  std::string out;
  if (options.json) {
    Json list = Json::array();
    for (std::size_t m = 0; m < mixes.size(); ++m) {
      Json rows = Json::array();
      for (std::size_t p = 0; p < policies.size(); ++p) {
        const Cell& cell = cells[m][p];
        Json each = Json::array();
        for (std::size_t i = 0; i < cell.outcomes.size(); ++i)
          each.push_back(to_json(cell.outcomes[i], cell.seeds[i], cell.seconds[i]));
        Json row = {{"policy", names[p]}, {"runs", std::move(each)}};
        if (!cell.outcomes.empty()) {
          row["acceptedPercent"] = {
              {"mean", cell.accepted().mean}, {"sd", cell.accepted().sd}, {"halfWidth", cell.half_width()}};
          if (bound != policies.end() && !cells[m][bound_at].outcomes.empty())
            row["belowFree"] = cells[m][bound_at].accepted().mean - cell.accepted().mean;
        }
        rows.push_back(std::move(row));
      }
      Json shares = Json::array();
      for (const auto& share : mixes[m].shares)
        shares.push_back({{"profile", share.profile}, {"weight", share.weight}});
      list.push_back({{"mix", mixes[m].name}, {"shares", std::move(shares)}, {"policies", std::move(rows)}});
    }
    out = dump(Json{{"apiVersion", "bulkhead/v1"},
                    {"kind", "Simulation"},
                    {"experiment", "mig"},
                    {"model", chip->name},
                    {"geometryFrom", chip->source},
                    {"gpus", gpus},
                    {"load", options.load},
                    {"holding", options.holding},
                    {"jobs", options.jobs},
                    {"seeds", *seeds},
                    {"stopped", crew.stopped},
                    {"mixes", std::move(list)}}) +
          "\n";
  } else {
    out = paint(context, Tone::bold,
                fmt::format("{} x {}, load {:g} of what they could carry at best, {} jobs a run", gpus,
                            printable(chip->name), options.load, options.jobs)) +
          "\n" + paint(context, Tone::dim, fmt::format("geometry: {}", printable(chip->source))) + "\n\n";
    std::vector<std::string> header = {"MIX", "POLICY", "SEEDS", "ACCEPTED %", "+-"};
    if (bound != policies.end()) header.emplace_back("BELOW FREE");
    header.insert(header.end(), {"BUSY %", "MOVES PER 100", "EVENTS/S"});
    Table table(header);
    for (std::size_t m = 0; m < mixes.size(); ++m) {
      for (std::size_t p = 0; p < policies.size(); ++p) {
        const Cell& cell = cells[m][p];
        if (cell.outcomes.empty()) continue;
        const double accepted = cell.accepted().mean;
        std::vector<std::string> row = {printable(mixes[m].name, 32), names[p],
                                        std::to_string(cell.seeds.size()), fmt::format("{:.2f}", accepted),
                                        fmt::format("{:.2f}", cell.half_width())};
        if (bound != policies.end()) {
          const Cell& best = cells[m][bound_at];
          row.push_back(best.outcomes.empty() || p == bound_at
                            ? "-"
                            : fmt::format("{:.2f}", best.accepted().mean - accepted));
        }
        double events = 0, seconds = 0;
        for (std::size_t i = 0; i < cell.outcomes.size(); ++i) {
          events += static_cast<double>(cell.outcomes[i].events);
          seconds += cell.seconds[i];
        }
        row.push_back(fmt::format("{:.2f}", cell.mean([](const auto& o) { return o.busy_percent; })));
        row.push_back(fmt::format("{:.2f}", cell.mean([](const auto& o) { return o.moves_per_100; })));
        row.push_back(fmt::format("{:.0f}", seconds > 0 ? events / seconds : 0));
        table.row(std::move(row));
      }
    }
    out += table.str(context);
    if (!options.plot.empty() && done > 0) out += fmt::format("\nDrawn: {}\n", printable(options.plot));
  }
  return print_figures(context, out, crew, done);
}

}  // namespace bulkhead::cli
