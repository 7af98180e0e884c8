// bulkhead simulate: what a placement policy would get out of a fleet.
#include <memory>

#include <fmt/format.h>

#include "base/text.hpp"
#include "cli/simulate_page.hpp"
#include "core/churn/churn.hpp"
#include "core/inventory/inventory.hpp"
#include "core/models/models.hpp"
#include "core/replay/replay.hpp"

namespace bulkhead::cli {

namespace {

int list(const Context& context, const SimulateOptions& options) {
  if (options.json) {
    Json out = {{"apiVersion", "bulkhead/v1"}, {"kind", "SimulationChoices"}};
    for (const auto policy : replay::kPolicies) out["tracePolicies"].push_back(replay::name_of(policy));
    for (const auto& row : churn::policies())
      out["migPolicies"].push_back({{"name", row.name}, {"what", row.why}});
    for (const auto& row : churn::mixes()) out["mixes"].push_back({{"name", row.name}, {"what", row.why}});
    for (const auto& model : models::all()) {
      // As an inventory prints it, so that programs read both alike.
      inventory::Gpu gpu;
      gpu.mig_capable = true;
      gpu.geometry = models::geometry(model);
      const Json shown = inventory::to_json(inventory::Host{.gpus = {gpu}})["gpus"][0]["mig"];
      out["models"].push_back(
          {{"name", model.name},
           {"title", model.title},
           {"source", model.source},
           {"mig", {{"memory_slices", shown["memory_slices"]}, {"profiles", shown["profiles"]}}}});
    }
    return print(dump(out) + "\n");
  }
  std::string out = paint(context, Tone::bold, "Policies for --trace") + "\n  ";
  std::vector<std::string> names;
  for (const auto policy : replay::kPolicies) names.emplace_back(replay::name_of(policy));
  out += join(names, ", ") + "\n\n" + paint(context, Tone::bold, "Policies for --mig") + "\n";
  Table policies({"POLICY", "WHAT IT DOES"});
  for (const auto& row : churn::policies()) policies.row({std::string(row.name), std::string(row.why)});
  Table mixes({"MIX", "WHAT IS ASKED FOR"});
  for (const auto& row : churn::mixes()) mixes.row({std::string(row.name), std::string(row.why)});
  Table models({"MODEL", "WHAT IT IS", "WHERE ITS GEOMETRY WAS READ"});
  for (const auto& model : models::all())
    models.row({std::string(model.name), std::string(model.title), std::string(model.source)});
  out += policies.str(context) + "\n" + paint(context, Tone::bold, "Mixes for --mix") + "\n" +
         mixes.str(context) + "\n" + paint(context, Tone::bold, "Models for --mig") + " (or: host)\n" +
         models.str(context);
  return print(out);
}

int run(const Context& context, const SimulateOptions& options) {
  if (options.list) return list(context, options);
  const bool trace = !options.trace.empty(), mig = !options.mig.empty();
  const auto refuse = [&](std::string what, std::string hint) {
    return fail(context, Error(Errc::invalid, "simulate: " + std::move(what), std::move(hint)));
  };
  if (trace == mig) {
    return refuse(trace ? "--trace and --mig are two experiments" : "what to simulate is missing",
                  "a trace of pods:       bulkhead simulate --trace PODS.csv --nodes-file NODES.csv\n"
                  "a stream of MIG jobs:  bulkhead simulate --mig h100 --mix uniform\n"
                  "what can be chosen:    bulkhead simulate --list");
  }
  return trace ? simulate_trace(context, options) : simulate_mig(context, options);
}

}  // namespace

std::function<int(const Context&)> bind_simulate(CLI::App& app) {
  auto o = std::make_shared<SimulateOptions>();
  app.add_option("--trace", o->trace,
                 "Replay the pods of this list (openb's columns) on the nodes of --nodes-file")
      ->type_name("PODS.csv");
  app.add_option("--nodes-file", o->nodes_file, "The nodes: sn,cpu_milli,memory_mib,gpu,model")
      ->type_name("NODES.csv");
  app.add_option(
         "--mig", o->mig,
         "A stream of MIG jobs on GPUs of this model, without hardware; or 'host': the geometry that this "
         "host's driver reports")
      ->type_name("MODEL");
  app.add_option(
         "--mix", o->mixes,
         "What the MIG jobs ask for: names, 'all', or weights like 1g.10gb=3,3g.40gb=1 (default uniform)")
      ->type_name("MIX");
  app.add_option(
         "--policy", o->policies,
         "Policies, comma-separated; --list shows them (default: ours and those it is measured against)")
      ->type_name("LIST");
  app.add_option("--seeds", o->seeds,
                 "Seeds of the runs: 42..51 or 1,2,7 (default: 42..51 for --trace, 1 for --mig)")
      ->type_name("SEEDS");
  app.add_option("--gpus", o->gpus,
                 "GPUs of the fleet: the nodes' list is repeated or cut; --mig: how many (default 100)");
  app.add_option("--nodes", o->nodes, "Nodes of the fleet: the nodes' list is repeated or cut (--trace)");
  app.add_option("--arrivals", o->arrivals, "Percent of the fleet's GPUs that arrive (--trace)")
      ->default_str("130");
  app.add_flag("--times", o->times,
               "The trace's own arrivals and departures instead of draws from it (--trace)");
  app.add_option(
         "--published", o->published,
         "Published figures to show beside: trace,policy,seeds,allocation_percent_mean,allocation_percent_sd "
         "(default: published_allocation.csv beside the trace, if there)")
      ->type_name("FILE");
  app.add_option("--load", o->load, "Jobs offered, of what the fleet could carry at the very best (--mig)")
      ->default_str("0.95");
  app.add_option("--jobs", o->jobs, "Arrivals that count, of each run (--mig)")->default_str("200000");
  app.add_option("--holding", o->holding, "How long jobs stay: exponential, fixed or heavy (--mig)")
      ->default_str("exponential");
  app.add_option("--plot", o->plot, "Draw the figures into this SVG file")->type_name("FILE.svg");
  app.add_option("--threads", o->threads,
                 "Runs at a time (default: as many as there are cores, which is the most)");
  app.add_flag("--json", o->json, "Figures for programs");
  app.add_flag("--quiet", o->quiet, "No progress bar");
  app.add_flag("--list", o->list, "Show policies, mixes and models, and simulate nothing");
  return [o](const Context& context) { return run(context, *o); };
}

}  // namespace bulkhead::cli
