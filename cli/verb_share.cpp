// bulkhead share: software slices. Thin: what it does is in engine/share.
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>

#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/json.hpp"
#include "base/text.hpp"
#include "cli/cli.hpp"
#include "engine/share/share.hpp"

namespace bulkhead::cli {

namespace {

struct Options {
  std::string cls = {}, memory = {}, latency = {}, gpu = {}, name = {}, user = {}, on_escape = {},
              guard_library = {}, ceiling = {}, who = {}, board = {};
  std::optional<unsigned> weight = {};
  std::uint64_t allocate = 0;
  bool json = false, guard = false, mps = false, no_selftest = false, once = false;
  std::vector<std::string> words = {};
};

share::Place place_of(const Context& context) {
  return {.root = context.root, .nvml_library = context.nvml_library};
}

std::string percent(double fraction) { return fmt::format("{:.0f} %", fraction * 100); }

std::string slice_text(std::uint64_t us) {
  if (us == 0) return "-";
  return us % 1000 == 0 ? fmt::format("{} ms", us / 1000)
         : us >= 10'000 ? fmt::format("{:.1f} ms", static_cast<double>(us) / 1000)
                        : fmt::format("{} us", us);
}

// The options that `run` and `set` share, onto what is asked. Empty options change nothing.
Status apply(const Options& o, share::Asked& asked) {
  if (!o.cls.empty()) {
    BH_TRY(asked.cls, sharing::parse_class(o.cls));
  }
  if (o.weight) {
    if (*o.weight < sharing::min_weight || *o.weight > sharing::max_weight)
      return Error(Errc::invalid, fmt::format("--weight {}: from {} to {}", *o.weight, sharing::min_weight,
                                              sharing::max_weight));
    asked.weight = *o.weight;
  }
  if (o.ceiling == "none") {
    asked.ceiling.reset();
  } else if (!o.ceiling.empty()) {
    auto digits = std::string_view(o.ceiling);
    if (digits.ends_with("%")) digits.remove_suffix(1);
    const auto value = parse_u64(digits);
    if (!value || *value < 1 || *value > 99)
      return Error(Errc::invalid,
                   fmt::format("--ceiling {}: from 1 to 99 percent, or none", printable(o.ceiling, 32)));
    asked.ceiling = static_cast<unsigned>(*value);
  }
  if (o.memory == "none") {
    asked.memory.reset();
  } else if (!o.memory.empty()) {
    BH_TRY(const auto bytes, parse_memory(o.memory));
    if (bytes < (64ULL << 20U))
      return Error(Errc::invalid,
                   fmt::format("--memory {}: less than 64 MiB holds no program", printable(o.memory, 32)),
                   "a CUDA context alone takes about 520 MiB on an H100");
    asked.memory = Bytes(bytes);
  }
  if (!o.latency.empty()) {
    BH_TRY(const auto ns, parse_duration(o.latency));
    asked.latency_us = ns / 1000;
  }
  if (o.on_escape.empty()) return ok_status();
  if (o.on_escape == "report")
    asked.on_escape = share::OnEscape::report;
  else if (o.on_escape == "pause")
    asked.on_escape = share::OnEscape::pause;
  else if (o.on_escape == "end")
    asked.on_escape = share::OnEscape::end;
  else
    return Error(Errc::invalid,
                 fmt::format("--on-escape {}: report, pause or end", printable(o.on_escape, 32)));
  return ok_status();
}

int run_selftest(const Context& context, const Options& o) {
  const auto place = place_of(context);
  const auto gpu = share::choose_gpu(place, o.gpu);
  if (!gpu.ok()) return fail(context, gpu.error());
  const bool quiet = o.json || ::isatty(STDERR_FILENO) == 0;
  const auto found = share::selftest(place, *gpu, [&](std::string_view step) {
    if (!quiet) std::fputs(fmt::format("  {}\n", step).c_str(), stderr);
  });
  if (!found.ok()) return fail(context, found.error());
  const bool obeys = found->slices && found->pauses && found->memory;
  if (o.json) {
    const auto code = print(dump(Json{{"slices", found->slices},
                                      {"pauses", found->pauses},
                                      {"memory", found->memory},
                                      {"asked", found->asked},
                                      {"received", found->received},
                                      {"pausedRate", found->paused_rate},
                                      {"offMicroseconds", found->off_us},
                                      {"onMicroseconds", found->on_us},
                                      {"inForceMicroseconds", found->in_force_us},
                                      {"notes", found->notes}}) +
                            "\n");
    return code != exit_ok ? code : obeys ? exit_ok : exit_findings;
  }
  const auto verdict = [&](bool good) {
    return paint(context, good ? Tone::good : Tone::bad, good ? "obeys" : "DOES NOT OBEY");
  };
  std::string text = fmt::format("time slices  {}   asked {}, received {:.1f} %\n", verdict(found->slices),
                                 percent(found->asked), found->received * 100);
  text += fmt::format("pauses       {}   a ceiling of 20 % left {:.1f} % of the rate; off {} us, on {} us\n",
                      verdict(found->pauses), found->paused_rate * 100, found->off_us, found->on_us);
  text += fmt::format("memory cap   {}   2 GiB were {} against a cap of 1 GiB\n", verdict(found->memory),
                      found->memory ? "refused" : "NOT refused");
  text += fmt::format("in force     {:.1f} ms after a program's first channel group\n",
                      static_cast<double>(found->in_force_us) / 1000);
  for (const auto& note : found->notes) text += fmt::format("note: {}\n", note);
  const auto code = print(text);
  return code != exit_ok ? code : obeys ? exit_ok : exit_findings;
}

int run_program(const Context& context, const Options& o) {
  const auto place = place_of(context);
  share::Run request;
  request.asked.name = o.name;
  request.asked.command = o.words;
  request.user = o.user;
  request.asked.mps = o.mps;
  request.guard = o.guard;
  request.guard_library = o.guard_library;
  if (o.guard && request.guard_library.empty()) {
    const auto found = share::find_guard();
    if (!found.ok()) return fail(context, found.error());
    request.guard_library = *found;
  }
  if (o.guard) {  // the program's children may be elsewhere
    std::error_code failed;
    request.guard_library = std::filesystem::absolute(request.guard_library, failed).string();
    if (!std::filesystem::exists(request.guard_library, failed))
      return fail(context, Error(Errc::not_found, fmt::format("{}: no such file", request.guard_library),
                                 "leave --guard-library out, or name libbulkhead-guard.so"));
  }
  if (auto applied = apply(o, request.asked); !applied.ok()) return fail(context, applied.error());
  const auto gpu = share::choose_gpu(place, o.gpu);
  if (!gpu.ok()) return fail(context, gpu.error());
  request.asked.gpu = *gpu;
  if (!o.no_selftest && !share::remembered_costs(place))
    std::fputs(
        "bulkhead: this driver was not tested since boot: `bulkhead share selftest` says whether it obeys\n",
        stderr);
  const auto code = share::run(place, std::move(request));
  if (!code.ok()) return fail(context, code.error());
  return *code;
}

int run_set(const Context& context, const Options& o) {
  const auto changed =
      share::set(place_of(context), o.who, [&](share::Asked& asked) { return apply(o, asked); });
  if (!changed.ok()) return fail(context, changed.error());
  return print(fmt::format("{}: weight {}, {}{}{}\n", changed->name, changed->weight,
                           sharing::name_of(changed->cls),
                           changed->ceiling ? fmt::format(", at most {} %", *changed->ceiling) : "",
                           changed->memory ? ", " + human(*changed->memory) : ""));
}

std::string table_of(const Context& context, const std::vector<share::Tenant>& tenants) {
  Table table({"NAME", "CLASS", "WEIGHT", "SHARE", "BUSY", "SLICE", "MEMORY", "CAP", "PROCS", "STATE"});
  for (const auto& tenant : tenants) {
    const auto& asked = tenant.asked;
    const bool running = tenant.now && !tenant.now->groups.empty();
    std::string slice = running ? slice_text(tenant.line.slice_us) : "-";
    if (tenant.line.in_turns) slice += fmt::format(", turns of {}", slice_text(tenant.line.turn_us));
    if (tenant.line.duty_on_us != 0)
      slice += fmt::format(", {} of {}", slice_text(tenant.line.duty_on_us),
                           slice_text(tenant.line.duty_period_us));
    std::string state = asked.mps     ? "MPS: one fault domain, no time held"
                        : !tenant.now ? "starting"
                        : !running    ? "no GPU work yet"
                        : asked.held  ? "held"
                                      : "gated (guard)";
    Tone tone = running ? Tone::good : Tone::dim;
    if (tenant.now) {
      const auto& now = *tenant.now;
      if (now.refused != 0) state += fmt::format(", {} refused", now.refused);
      if (now.self_set != 0) state += fmt::format(", tried to set its own slice {}x", now.self_set);
      if (now.reasserted != 0) state += fmt::format(", slice changed by others {}x", now.reasserted);
      if (now.beyond && now.beyond->count != 0)
        state += fmt::format(", {} beyond the ledger", human(*now.beyond)), tone = Tone::bad;
      if (now.escapes != 0) state += fmt::format(", {} escapes", now.escapes), tone = Tone::bad;
      for (const auto& trouble : now.troubles) state += "; " + trouble, tone = Tone::bad;
    }
    table.row({asked.name, std::string(sharing::name_of(asked.cls)),
               asked.ceiling ? fmt::format("{} <= {} %", asked.weight, *asked.ceiling)
                             : std::to_string(asked.weight),
               running ? percent(tenant.line.expected) : "-",
               tenant.now && tenant.now->busy ? percent(*tenant.now->busy) : "-", slice,
               tenant.now ? human(tenant.now->used) : "-", asked.memory ? human(*asked.memory) : "none",
               tenant.now ? std::to_string(tenant.now->processes.size()) : "-", state},
              {Tone::bold, Tone::plain, Tone::plain, Tone::plain, Tone::plain, Tone::plain, Tone::plain,
               Tone::plain, Tone::plain, tone});
  }
  return table.str(context);
}

int run_list(const Context& context, const Options& o) {
  const auto tenants = share::list(place_of(context));
  if (!tenants.ok()) return fail(context, tenants.error());
  if (o.json) {
    Json out{{"tenants", Json::array()}};
    for (const auto& tenant : *tenants) out["tenants"].push_back(share::to_json(tenant));
    return print(dump(out) + "\n");
  }
  if (tenants->empty())
    return print("no tenants share a GPU of this host\ntry: bulkhead share run --weight 50 -- PROGRAM\n");
  return print(table_of(context, *tenants));
}

int run_top(const Context& context, const Options& o) {
  const bool terminal = ::isatty(STDOUT_FILENO) == 1 && !o.once;
  for (;;) {
    const auto tenants = share::list(place_of(context));
    if (!tenants.ok()) return fail(context, tenants.error());
    double busy = 0;
    for (const auto& tenant : *tenants)
      if (tenant.now) busy += tenant.now->busy.value_or(0);
    std::string text = terminal ? "\033[H\033[2J" : "";
    text += fmt::format("{} tenant{}, {} busy{}\n", tenants->size(), tenants->size() == 1 ? "" : "s",
                        percent(busy), terminal ? "   (q or Ctrl-C ends)" : "");
    if (!tenants->empty()) text += table_of(context, *tenants);
    if (const int code = print(text); code != exit_ok) return code;
    if (!terminal) return exit_ok;
    pollfd key{.fd = STDIN_FILENO, .events = POLLIN, .revents = 0};
    if (::poll(&key, ::isatty(STDIN_FILENO) == 1 ? 1 : 0, 1000) > 0) {
      char c = 0;
      if (::read(STDIN_FILENO, &c, 1) <= 0 || c == 'q') return exit_ok;
    }
  }
}

}  // namespace

std::function<int(const Context&)> bind_share(CLI::App& app) {
  Subverbs<Options> verbs(app);
  const auto o = verbs.options;
  const auto verb = [&](auto&&... row) { verbs.add(std::forward<decltype(row)>(row)...); };
  const auto asked = [&](CLI::App& sub) {
    sub.add_option("--weight", o->weight,
                   "Parts of the GPU's time, against the other tenants' (1 to 1000; 100)");
    sub.add_option(
           "--class", o->cls,
           "interactive: at once when it has work; batch: its share; background: what is left (batch)")
        ->type_name("CLASS");
    sub.add_option("--ceiling", o->ceiling,
                   "Never more than this much of the GPU's time, also on an idle GPU; none takes it away")
        ->type_name("PERCENT");
    sub.add_option("--memory", o->memory,
                   "Cap on device memory, managed memory included, like 20GiB; none: no cap")
        ->type_name("SIZE");
    sub.add_option("--latency", o->latency, "interactive: the longest wait for others it accepts, like 5ms")
        ->type_name("TIME");
    sub.add_option("--on-escape", o->on_escape,
                   "When the audit finds more device memory than the cap: report, pause or end")
        ->type_name("WHAT");
  };
  verb(
      "run", "Run a program as a tenant and wait for it",
      "bulkhead share run --weight 30 -- python3 train.py\n"
      "bulkhead share run --class interactive --memory 20GiB -- ./serve\n"
      "bulkhead share run --ceiling 25 --name cheap -- ./job      never more than a quarter, also on an idle "
      "GPU\n"
      "bulkhead share run --user alice -- ./job                   as that user\n"
      "bulkhead share run --guard -- ./job                        without a listener: the preloaded guard "
      "caps and gates",
      [&](CLI::App& sub) {
        sub.add_option("program", o->words, "PROGRAM and its arguments, after --")
            ->required()
            ->expected(1, -1);
        asked(sub);
        sub.add_option("--gpu", o->gpu, "Index or UUID (default: the GPU with the fewest tenants)")
            ->type_name("GPU");
        sub.add_option("--name", o->name, "For list and set (default: program and number)")
            ->type_name("NAME");
        sub.add_option("--user", o->user, "Run the program as this user")->type_name("USER");
        sub.add_flag("--guard", o->guard,
                     "Preload the guard instead of holding from outside: faster allocation, only for "
                     "programs that play along");
        sub.add_option("--guard-library", o->guard_library,
                       "libbulkhead-guard.so (default: the one installed with bulkhead)")
            ->type_name("FILE");
        sub.add_flag("--mps", o->mps,
                     "Join the GPU's MPS server: throughput for tenants that trust each other. One fault "
                     "ends them all; no time is held");
        sub.add_flag("--untested", o->no_selftest, "Do not ask for a self-test");
        sub.positionals_at_end();
      },
      run_program);
  verb(
      "list", "Show who shares the GPUs",
      "bulkhead share list\n"
      "bulkhead share list --json",
      [&](CLI::App& sub) { sub.add_flag("--json", o->json, "For programs"); }, run_list);
  verb(
      "set", "Change a tenant while it runs",
      "bulkhead share set train --weight 60\n"
      "bulkhead share set serve --class interactive --latency 5ms\n"
      "bulkhead share set cheap --ceiling none",
      [&](CLI::App& sub) {
        sub.add_option("tenant", o->who, "Its name or id (bulkhead share list)")->required();
        asked(sub);
      },
      run_set);
  verb(
      "top", "Watch them",
      "bulkhead share top\n"
      "bulkhead share top --once   one look, for scripts",
      [&](CLI::App& sub) { sub.add_flag("--once", o->once, "One look"); }, run_top);
  verb(
      "selftest", "Does this driver obey? About eight seconds, best on an idle GPU",
      "bulkhead share selftest\n"
      "bulkhead share selftest --gpu 1 --json",
      [&](CLI::App& sub) {
        sub.add_option("--gpu", o->gpu, "Index or UUID")->type_name("GPU");
        sub.add_flag("--json", o->json, "For programs");
      },
      run_selftest);
  verb(
      "spin", "The self-test's spinning program", "",
      [&](CLI::App& sub) {
        sub.add_option("board", o->board, "File shared with the self-test")->required();
        sub.add_option("allocate", o->allocate, "Allocate so many bytes instead");
        sub.group("");  // hidden
      },
      [](const Context&, const Options& options) { return share::spin(options.allocate, options.board); });
  return verbs.run();
}

}  // namespace bulkhead::cli
