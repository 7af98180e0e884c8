// bulkhead twin: pretend machines to try everything on. Thin: every word of it is in twin/control.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>

#include <unistd.h>

#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/json.hpp"
#include "base/text.hpp"
#include "cli/cli.hpp"
#include "twin/control/control.hpp"

namespace bulkhead::cli {

namespace {

struct Options {
  std::string profile = {}, profile_file = {}, directory = {}, library = {}, fault = {}, function = {},
              target = {}, reset = {}, duration = {}, name = {}, memory = {}, real = "libnvidia-ml.so.1",
              recording = {};
  std::uint64_t seed = 1, delay_ms = 0, count = 1;
  bool stepped = false, no_init = false, json = false, list = false, graphics = false, all = false;
  unsigned port = 0;
  std::uint32_t gpu = twin::none, times = twin::none, pid = 0, code = 0;
  std::int32_t answer = 999;
  std::optional<double> watts = {}, busy = {}, inlet = {};
  double process_busy = 0;
  std::vector<std::string> words = {};
};

// --dir, else BULKHEAD_TWIN, else the one twin that runs.
Result<std::filesystem::path> directory_of(const Options& options) {
  if (!options.directory.empty()) return std::filesystem::path(options.directory);
  if (const char* set = std::getenv("BULKHEAD_TWIN"); set != nullptr && *set != '\0')
    return std::filesystem::path(set);
  if (!options.profile.empty()) return twin::default_directory(options.profile);
  const auto all = twin::running();
  if (all.size() == 1) return all[0].directory;
  if (all.empty())
    return Error(Errc::not_found, "no twin is up in the default place",
                 "bring one up: bulkhead twin up dgx-h100\nor name one:   --dir DIR");
  return Error(Errc::invalid, fmt::format("{} twins are up", all.size()), "name one: --dir DIR");
}

int said(const Context& context, const Status& status, std::string_view done) {
  if (!status.ok()) return fail(context, status.error());
  return print(fmt::format("{}\n", done));
}

int run_reset(const Context& context, const Options& o) {
  const auto directory = directory_of(o);
  if (!directory.ok()) return fail(context, directory.error());
  const auto status = twin::status(*directory);
  if (!status.ok()) return fail(context, status.error());
  std::uint32_t gpu = twin::none;
  for (const auto& row : (*status)["gpus"]) {
    const auto index = row.value("index", twin::none);
    if (row.value("uuid", std::string()) == o.reset ||
        parse_u64(o.reset) == std::optional<std::uint64_t>(index))
      gpu = index;
  }
  if (gpu == twin::none)
    return fail(context, Error(Errc::not_found, fmt::format("there is no GPU {}", printable(o.reset, 80)),
                               "bulkhead twin status lists them"));
  return said(context, twin::reset(*directory, gpu), fmt::format("GPU {} was successfully reset.", gpu));
}

int run_up(const Context& context, const Options& o) {
  twin::UpOptions up{.profile = o.profile,
                     .profile_file = o.profile_file,
                     .directory = o.directory,
                     .library = o.library,
                     .seed = o.seed,
                     .realtime = !o.stepped,
                     .init = !o.no_init,
                     .fabric_manager_port = o.port};
  const auto made = twin::up(up);
  if (!made.ok()) return fail(context, made.error());
  std::string text =
      fmt::format("twin {} is up in {}\n", o.profile.empty() ? o.profile_file : o.profile, made->string());
  for (const auto& line : twin::environment(*made)) text += fmt::format("  export {}\n", line);
  return print(text + fmt::format("try: bulkhead twin run --dir {} -- nvidia-smi -L\n", made->string()));
}

int run_list(const Context& context, const Options& o) {
  const auto known = twin::profiles();
  const auto up = twin::running();
  if (o.json) {
    Json out = {{"profiles", Json::array()}, {"running", Json::array()}};
    for (const auto& p : known) out["profiles"].push_back({{"name", p.name}, {"summary", p.summary}});
    for (const auto& t : up)
      out["running"].push_back({{"name", t.name},
                                {"profile", t.profile},
                                {"directory", t.directory.string()},
                                {"init_pid", t.init_pid}});
    return print(dump(out) + "\n");
  }
  Table profiles({"PROFILE", "WHAT"});
  for (const auto& p : known) profiles.row({p.name, p.summary});
  std::string text = profiles.str(context);
  if (!up.empty()) {
    Table table({"UP", "PROFILE", "DIRECTORY"});
    for (const auto& t : up) table.row({t.name, t.profile, t.directory.string()}, {Tone::good});
    text += "\n" + table.str(context);
  }
  return print(text);
}

int run_status(const Context& context, const Options& o) {
  const auto directory = directory_of(o);
  if (!directory.ok()) return fail(context, directory.error());
  const auto status = twin::status(*directory);
  if (!status.ok()) return fail(context, status.error());
  const Json& s = *status;
  if (o.json) return print(dump(s) + "\n");
  Table gpus({"GPU", "PCI", "MIG", "BUSY", "WATTS", "TEMP", "MHZ", "MODEL"});
  for (const auto& g : s["gpus"]) {
    std::size_t compute = 0;
    for (const auto& gi : g["instances"]) compute += gi["compute"].size();
    gpus.row(
        {fmt::format("{}", g["index"].get<unsigned>()), g["pci"].get<std::string>(),
         g["mig"]["current"].get<bool>() ? fmt::format("{} GI {} CI", g["instances"].size(), compute) : "off",
         fmt::format("{:.0f}%", g["busy"].get<double>() * 100),
         fmt::format("{:.0f}/{:.0f}", g["watts"].get<double>(), g["power_limit_watts"].get<double>()),
         fmt::format("{:.0f}C", g["temperature_c"].get<double>()),
         fmt::format("{}", g["graphics_mhz"].get<long>()), g["model"].get<std::string>()});
  }
  std::string text =
      fmt::format("{} in {}, driver {}, {:.1f} s after boot{}\n\n", s["profile"].get<std::string>(),
                  s["directory"].get<std::string>(), s["driver_version"].get<std::string>(),
                  s["clock"]["seconds_since_boot"].get<double>(),
                  s["clock"]["follows_host"].get<bool>() ? "" : " (stepped clock)") +
      gpus.str(context);
  for (const auto& p : s["processes"]) {
    text += fmt::format(
        "process {} {} on GPU {}{}\n", p["pid"].get<unsigned>(), p["name"].get<std::string>(),
        p["gpu"].get<unsigned>(),
        p.contains("gpu_instance") ? fmt::format(", instance {}", p["gpu_instance"].get<unsigned>()) : "");
  }
  for (const auto& f : s["faults"])
    text += paint(context, Tone::bad, fmt::format("fault {}", dump(f))) + "\n";
  return print(text);
}

int run_command(const Context& context, const Options& o) {
  std::vector<std::string> command = o.words;
  std::filesystem::path directory = o.directory;
  bool temporary = false;
  if (directory.empty()) {
    const auto known = twin::profiles();
    const bool named = !command.empty() && std::any_of(known.begin(), known.end(),
                                                       [&](const auto& p) { return p.name == command[0]; });
    if (named) {
      const std::string profile = command[0];
      command.erase(command.begin());
      if (!command.empty() && command[0] == "--") command.erase(command.begin());
      directory = twin::default_directory(profile);
      if (!twin::open_twin(directory).ok()) {
        // Nobody's twin: one for this program alone, gone after it.
        std::string pattern = (std::filesystem::temp_directory_path() / "bulkhead-twin-XXXXXX").string();
        if (::mkdtemp(pattern.data()) == nullptr)
          return fail(context, errno_error("make a temporary directory", errno));
        directory = pattern;
        const auto made = twin::up({.profile = profile,
                                    .directory = directory,
                                    .library = o.library,
                                    .seed = o.seed,
                                    .realtime = !o.stepped,
                                    .init = !o.no_init});
        if (!made.ok()) {
          std::error_code ignored;
          std::filesystem::remove_all(directory, ignored);
          return fail(context, made.error());
        }
        temporary = true;
      }
    } else {  // BULKHEAD_TWIN, or the only one
      const auto found = directory_of(o);
      if (!found.ok() && !command.empty())
        return fail(context,
                    Error(Errc::invalid,
                          fmt::format("twin run: '{}' is no profile, and {}", printable(command[0], 80),
                                      found.error().message()),
                          "like: bulkhead twin run dgx-h100 -- nvidia-smi\nprofiles: bulkhead twin list"));
      if (!found.ok()) return fail(context, found.error());
      directory = *found;
    }
  }
  if (!command.empty() && command[0] == "--") command.erase(command.begin());
  const auto code = twin::run(directory, command);
  if (temporary) {
    if (auto gone = twin::down(directory); !gone.ok()) fail(context, gone.error());
  }
  if (!code.ok()) return fail(context, code.error());
  return *code;
}

std::string_view name_of(twin::DifferenceKind kind) {
  switch (kind) {
    case twin::DifferenceKind::live:
      return "live";
    case twin::DifferenceKind::identity:
      return "identity";
    case twin::DifferenceKind::differs:
      return "differs";
  }
  return "";
}

int run_compare(const Context& context, const Options& o) {
  const auto known = twin::profiles();
  if (std::none_of(known.begin(), known.end(), [&](const auto& p) { return p.name == o.profile; }))
    return fail(context, Error(Errc::not_found, fmt::format("no profile {}", printable(o.profile, 80)),
                               "see: bulkhead twin list"));
  const auto result = twin::compare_with_real({.profile = o.profile,
                                               .real = o.real,
                                               .recording = o.recording,
                                               .library = o.library,
                                               .gpu = o.gpu == twin::none ? 0 : o.gpu});
  if (!result.ok()) return fail(context, result.error());
  std::size_t counts[3] = {};
  for (const auto& d : result->differences) ++counts[static_cast<std::size_t>(d.kind)];
  const std::size_t differ = counts[static_cast<std::size_t>(twin::DifferenceKind::differs)];
  if (o.json) {
    Json out = {
        {"profile", o.profile}, {"asked", result->asked}, {"differ", differ}, {"differences", Json::array()}};
    for (const auto& d : result->differences)
      out["differences"].push_back(
          {{"question", d.question}, {"kind", name_of(d.kind)}, {"real", d.real}, {"twin", d.twin}});
    if (const int code = print(dump(out) + "\n"); code != exit_ok) return code;
    return differ == 0 ? exit_ok : exit_findings;
  }
  Table table({"QUESTION", "KIND", "REAL", "TWIN"});
  bool shown = false;
  for (const auto& d : result->differences) {
    if (d.kind != twin::DifferenceKind::differs && !o.all) continue;
    shown = true;
    table.row(
        {printable(d.question), std::string(name_of(d.kind)), printable(d.real, 120), printable(d.twin, 120)},
        {});
  }
  const std::string text =
      (shown ? table.str(context) + "\n" : std::string()) +
      fmt::format("{} questions: {} differ, {} are live readings, {} are the board's own{}\n", result->asked,
                  differ, counts[static_cast<std::size_t>(twin::DifferenceKind::live)],
                  counts[static_cast<std::size_t>(twin::DifferenceKind::identity)],
                  o.all ? "" : " (--all shows them)");
  if (const int code = print(text); code != exit_ok) return code;
  return differ == 0 ? exit_ok : exit_findings;
}

int run_attach(const Context& context, const Options& o) {
  const auto directory = directory_of(o);
  if (!directory.ok()) return fail(context, directory.error());
  twin::Attach wanted{.name = o.name, .busy = o.process_busy, .graphics = o.graphics};
  const auto parts = split(o.target, ':');
  std::uint32_t* const fields[] = {&wanted.gpu, &wanted.gpu_instance, &wanted.compute_instance};
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const auto number = parse_u64(parts[i]);
    if (i >= 3 || !number || *number > 1000)
      return fail(context, Error(Errc::invalid, fmt::format("{} is no GPU[:GI[:CI]]", printable(o.target)),
                                 "like 0, or 3:1:0"));
    *fields[i] = static_cast<std::uint32_t>(*number);
  }
  // The default compute instance of a named GPU instance.
  if (wanted.gpu_instance != twin::none && wanted.compute_instance == twin::none) wanted.compute_instance = 0;
  const auto memory = parse_memory(o.memory);
  if (!memory.ok()) return fail(context, memory.error());
  wanted.memory_bytes = *memory;
  if (o.pid != 0) wanted.pid = o.pid;
  const auto pid = twin::attach(*directory, wanted);
  if (!pid.ok()) return fail(context, pid.error());
  return print(fmt::format("{}\n", *pid));
}

}  // namespace

std::function<int(const Context&)> bind_twin(CLI::App& app) {
  Subverbs<Options> verbs(app);
  const auto o = verbs.options;
  const auto verb = [&](auto&&... row) { verbs.add(std::forward<decltype(row)>(row)...); };
  const auto on_twin = [&o](CLI::App& sub) {
    sub.add_option("--dir", o->directory,
                   "The twin's directory (default: BULKHEAD_TWIN, or the only twin that is up)")
        ->type_name("DIR");
  };
  // For the verbs that change a twin: find it, then do it.
  const auto changing = [](std::function<Status(const std::filesystem::path&, const Options&)> act,
                           std::string done) {
    return [act, done](const Context& context, const Options& options) {
      const auto directory = directory_of(options);
      if (!directory.ok()) return fail(context, directory.error());
      return said(context, act(*directory, options), done);
    };
  };

  verb(
      "up", "Bring a pretend machine up",
      "bulkhead twin up dgx-h100               in the default place, as real time goes\n"
      "bulkhead twin up dgx-h100 --dir /tmp/d  in a directory of your choice\n"
      "bulkhead twin up h100-vm --stepped      time moves by `bulkhead twin step` alone\n"
      "bulkhead twin up --profile-file mine.yaml --dir /tmp/d",
      [&](CLI::App& sub) {
        sub.add_option("profile", o->profile, "Which (bulkhead twin list)");
        sub.add_option("--profile-file", o->profile_file, "A profile of your own")->type_name("FILE");
        sub.add_option("--library", o->library,
                       "The twin's libnvidia-ml.so.1 (default: the one installed with bulkhead)");
        sub.add_option("--seed", o->seed, "Decides UUIDs and serial numbers");
        sub.add_option("--fabric-manager-port", o->port,
                       "TCP port of the pretend Fabric Manager (default: none)");
        sub.add_flag("--stepped", o->stepped, "Time moves by `twin step` only");
        sub.add_flag("--no-init", o->no_init, "Without the pretend systemd");
        on_twin(sub);
      },
      [](const Context& context, const Options& options) {
        if (options.profile.empty() == options.profile_file.empty()) {
          return fail(context, Error(Errc::invalid, "twin up: name one profile, or one --profile-file",
                                     "see: bulkhead twin list"));
        }
        return run_up(context, options);
      });
  verb(
      "down", "Take it away",
      "bulkhead twin down           the only one that is up\n"
      "bulkhead twin down dgx-h100  the one in its default place\n"
      "bulkhead twin down --dir /tmp/d",
      [&](CLI::App& sub) {
        sub.add_option("profile", o->profile, "The twin in this profile's default directory");
        on_twin(sub);
      },
      changing([](const auto& directory, const Options&) { return twin::down(directory); },
               "the twin is down"));
  verb(
      "list", "Show the profiles and the twins that are up",
      "bulkhead twin list\n"
      "bulkhead twin list --json",
      [&](CLI::App& sub) { sub.add_flag("--json", o->json, "For programs"); }, run_list);
  verb(
      "status", "Show a twin's GPUs, processes and faults",
      "bulkhead twin status --dir /tmp/d\n"
      "bulkhead twin status --json  with instance ids, units, clock",
      [&](CLI::App& sub) {
        sub.add_flag("--json", o->json, "For programs");
        on_twin(sub);
      },
      run_status);
  verb(
      "run", "Run a program in it",
      "bulkhead twin run --dir /tmp/d -- nvidia-smi -L   in a twin that is up\n"
      "bulkhead twin run dgx-h100 -- bulkhead inventory  in one made for this alone, gone after it\n"
      "bulkhead twin run dgx-h100 -- bash                a shell on eight H100",
      [&](CLI::App& sub) {
        sub.add_option("words", o->words, "PROFILE -- COMMAND..., or with --dir COMMAND... alone")
            ->expected(1, -1);
        sub.add_option("--library", o->library, "The twin's libnvidia-ml.so.1")->type_name("FILE");
        sub.add_option("--seed", o->seed, "Decides UUIDs and serial numbers");
        sub.positionals_at_end();
        on_twin(sub);
      },
      run_command);
  verb(
      "step", "Let simulated time pass",
      "bulkhead twin step 10s\n"
      "bulkhead twin step 2m --dir /tmp/d",
      [&](CLI::App& sub) {
        sub.add_option("time", o->duration, "500ms, 10s, 2m, 1h")->required();
        on_twin(sub);
      },
      [](const Context& context, const Options& options) {
        const auto time = parse_duration(options.duration);
        if (!time.ok()) return fail(context, time.error());
        const auto directory = directory_of(options);
        if (!directory.ok()) return fail(context, directory.error());
        return said(context, twin::step(*directory, *time), fmt::format("{} later", options.duration));
      });
  verb(
      "reboot", "Reboot the host: files stay, what lives in the driver is as after a boot",
      "bulkhead twin reboot --dir /tmp/d", [&](CLI::App& sub) { on_twin(sub); },
      changing([](const auto& directory, const Options&) { return twin::reboot(directory); }, "rebooted"));
  verb(
      "load", "Make a GPU work, or draw power",
      "bulkhead twin load 0 --busy 1     all of GPU 0 works\n"
      "bulkhead twin load 0 --watts 650  it draws that, up to its limit\n"
      "bulkhead twin load 0 --inlet 38   warm air\n"
      "bulkhead twin load 0              the load ends",
      [&](CLI::App& sub) {
        sub.add_option("gpu", o->gpu, "Its index")->required();
        sub.add_option("--watts", o->watts, "What the board draws if nothing limits it");
        sub.add_option("--busy", o->busy, "0 to 1");
        sub.add_option("--inlet", o->inlet, "Temperature of the cooling air, C");
        on_twin(sub);
      },
      [](const Context& context, const Options& options) {
        const auto directory = directory_of(options);
        if (!directory.ok()) return fail(context, directory.error());
        const bool ends = !options.watts && !options.busy && !options.inlet;
        return said(context,
                    twin::load(*directory, options.gpu,
                               {.watts = options.watts, .busy = options.busy, .inlet = options.inlet}),
                    ends ? fmt::format("the load of GPU {} ended", options.gpu)
                         : fmt::format("GPU {} is loaded; how it warms: bulkhead twin status", options.gpu));
      });
  verb(
      "attach", "Put a process on a GPU or MIG instance; prints its pid",
      "bulkhead twin attach 0 --memory 20GiB --busy 0.9  a simulated process on GPU 0\n"
      "bulkhead twin attach 3:1:0 --name train           on compute instance 0 of GPU instance 1 of GPU 3\n"
      "bulkhead twin attach 3:1:0 --pid $!               a real process: apply --evict can end it",
      [&](CLI::App& sub) {
        sub.add_option("target", o->target,
                       "GPU, or GPU:GI:CI with the ids of its instances (twin status --json)")
            ->required();
        sub.add_option("--pid", o->pid, "A real process (default: a simulated one)");
        sub.add_option("--name", o->name, "Its name");
        sub.add_option("--memory", o->memory, "Device memory it holds: 20GiB");
        sub.add_option("--busy", o->process_busy, "0 to 1 of its slice");
        sub.add_flag("--graphics", o->graphics, "A graphics client");
        on_twin(sub);
      },
      run_attach);
  verb(
      "detach", "End processes' hold on GPUs",
      "bulkhead twin detach 4194305  as attach printed it, or `bulkhead twin status` shows it\n"
      "bulkhead twin detach --all",
      [&](CLI::App& sub) {
        auto* pid = sub.add_option("pid", o->pid, "Which");
        sub.add_flag("--all", o->all, "Every one")->excludes(pid);
        on_twin(sub);
      },
      [](const Context& context, const Options& options) {
        if (options.pid == 0 && !options.all)
          return fail(context, Error(Errc::invalid, "twin detach: name a pid, or --all",
                                     "who is attached: bulkhead twin status"));
        const auto directory = directory_of(options);
        if (!directory.ok()) return fail(context, directory.error());
        return said(context,
                    twin::detach(*directory, options.all ? std::nullopt : std::optional(options.pid)),
                    "detached");
      });
  verb(
      "xid", "Report an XID: an NVML event and a line in the kernel log",
      "bulkhead twin xid 3 79                GPU 3 has fallen off the bus, by the log\n"
      "bulkhead twin xid 3 31 --pid 4194305  a page fault of one process",
      [&](CLI::App& sub) {
        sub.add_option("gpu", o->gpu, "Its index")->required();
        sub.add_option("code", o->code, "31, 48, 79 ...")->required();
        sub.add_option("--pid", o->pid, "The attached process that caused it");
        on_twin(sub);
      },
      changing(
          [](const auto& directory, const Options& options) {
            return twin::xid(directory, options.gpu, options.code,
                             options.pid == 0 ? std::nullopt : std::optional(options.pid));
          },
          "reported: to NVML's listeners and in the kernel log"));
  verb(
      "reset", "Reset a GPU, as nvidia-smi --gpu-reset does on a board",
      "bulkhead twin reset 3  refused while a process is on it",
      [&](CLI::App& sub) {
        sub.add_option("gpu", o->reset, "Its index or UUID")->required();
        on_twin(sub);
      },
      run_reset);
  verb(
      "break", "Break one thing",
      "bulkhead twin break --list\n"
      "bulkhead twin break lost-from-nvml --gpu 3\n"
      "bulkhead twin break fail-call --function nvmlDeviceCreateGpuInstanceWithPlacement --code 999 --times "
      "1\n"
      "bulkhead twin break slow-destroy --delay-ms 5000\n"
      "bulkhead twin break ecc --gpu 2 --count 4",
      [&](CLI::App& sub) {
        sub.add_option("fault", o->fault, "Which (--list)");
        sub.add_flag("--list", o->list, "Show the faults");
        sub.add_flag("--json", o->json, "With --list: for programs");
        sub.add_option("--gpu", o->gpu, "On this GPU (default: every one, where that makes sense)");
        sub.add_option("--function", o->function,
                       "The NVML function, for fail-call, hang-call, kill-before, kill-after");
        sub.add_option("--code", o->answer, "The nvmlReturn_t that fail-call answers");
        sub.add_option("--delay-ms", o->delay_ms, "Milliseconds, for hang-call and slow-destroy");
        sub.add_option("--times", o->times, "How often it happens (default: until mended)");
        sub.add_option(
            "--count", o->count,
            "How many errors, for ecc; of a million flits, for link-errors; which multiprocessor, for "
            "computes-wrong");
        on_twin(sub);
      },
      [](const Context& context, const Options& options) {
        if (options.list || options.fault.empty()) {
          if (options.json) {
            Json all = Json::array();
            for (const auto& f : twin::fault_names())
              all.push_back({{"name", f.name}, {"summary", f.summary}});
            return print(dump(all) + "\n");
          }
          Table table({"FAULT", "WHAT"});
          for (const auto& f : twin::fault_names()) table.row({std::string(f.name), std::string(f.summary)});
          return print(table.str(context));
        }
        const auto directory = directory_of(options);
        if (!directory.ok()) return fail(context, directory.error());
        static constexpr std::string_view of_one_gpu[] = {"lost-from-nvml", "off-the-bus", "ecc"};
        if (options.gpu == twin::none &&
            std::find(std::begin(of_one_gpu), std::end(of_one_gpu), options.fault) != std::end(of_one_gpu)) {
          return fail(context, Error(Errc::invalid, fmt::format("{} happens to one GPU", options.fault),
                                     "name it: --gpu 3"));
        }
        return said(
            context,
            twin::break_it(*directory, {.name = options.fault,
                                        .gpu = options.gpu,
                                        .function = options.function,
                                        .code = options.answer,
                                        .delay_ms = options.delay_ms,
                                        .times = options.times,
                                        .count = options.count}),
            fmt::format("broken: {}; to mend it: bulkhead twin mend {}", options.fault, options.fault));
      });
  verb(
      "mend", "Mend what was broken",
      "bulkhead twin mend  everything\n"
      "bulkhead twin mend lost-from-nvml --gpu 3",
      [&](CLI::App& sub) {
        sub.add_option("fault", o->fault, "Which (default: everything)");
        sub.add_option("--gpu", o->gpu, "On this GPU (default: every one, where that makes sense)");
        on_twin(sub);
      },
      changing([](const auto& directory,
                  const Options& options) { return twin::mend(directory, options.fault, options.gpu); },
               "mended"));
  verb(
      "compare", "Ask the real library and a twin the same questions",
      "bulkhead twin compare h100-vm                           on a machine with one H100\n"
      "bulkhead twin compare h100-vm --all                     readings and identities too\n"
      "bulkhead twin compare h100-vm --recording answers.json  without a GPU",
      [&](CLI::App& sub) {
        sub.add_option("profile", o->profile, "The twin of this machine: h100-vm")->required();
        sub.add_option("--real", o->real,
                       "The real library (default libnvidia-ml.so.1 by the loader's rules)");
        sub.add_option("--recording", o->recording, "Recorded answers instead of a real library");
        sub.add_option("--library", o->library, "The twin's libnvidia-ml.so.1")->type_name("FILE");
        sub.add_option("--gpu", o->gpu, "Of the real machine");
        sub.add_flag("--json", o->json, "For programs");
        sub.add_flag("--all", o->all, "Show live readings and identities as well");
      },
      run_compare);
  return verbs.run();
}

}  // namespace bulkhead::cli
