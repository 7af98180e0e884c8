// bulkhead diagnose, and bulkhead bundle: from logs to incidents, and everything a support case needs.
#include <atomic>
#include <csignal>
#include <map>
#include <memory>
#include <set>

#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "cli/api.hpp"
#include "cli/cli.hpp"
#include "core/xid/xid.hpp"
#include "engine/diagnose/diagnose.hpp"
#include "engine/share/share.hpp"

namespace bulkhead::cli {

namespace {

std::atomic<bool> stopped = false;

Tone tone_of(const diagnose::Incident& in) {
  if (in.closed) return Tone::dim;
  switch (in.severity) {
    case xid::Severity::critical:
      return Tone::bad;
    case xid::Severity::warn:
      return Tone::warn;
    default:
      return Tone::plain;
  }
}

std::string when_of(std::optional<std::int64_t> ms) {
  if (!ms) return "-";
  // Before 1990: the kernel's own clock, since it began.
  if (*ms < 631'152'000'000) return fmt::format("{:.3f} s after boot", static_cast<double>(*ms) / 1000);
  return rfc3339(WallTime(std::chrono::milliseconds(*ms)));
}

std::string page_of(const Context& context, const diagnose::Incident& in, std::size_t shown_lines) {
  std::string out;
  {
    out += fmt::format("{}  {}\n", paint(context, tone_of(in), xid::name_of(in.severity)),
                       paint(context, Tone::bold, printable(in.title, 160)));
    const auto row = [&](std::string_view name, const std::string& text) {
      if (!text.empty()) out += fmt::format("  {:<11}{}\n", name, text);
    };
    row("when", in.count > 1
                    ? fmt::format("{} to {}, {} times", when_of(in.first_ms), when_of(in.last_ms), in.count)
                    : when_of(in.first_ms));
    row("cause", in.cause);
    row("reaches", fmt::format("{} ({})", diagnose::name_of(in.blast), in.blast_why));
    row("to blame", fmt::format("{}: {}{}", diagnose::name_of(in.blame), in.blame_why,
                                in.charged.empty() ? "; no tenant is charged"
                                                   : "; charged: " + printable(in.charged, 128)));
    std::string who;
    for (std::size_t i = 0; i < in.processes.size() && i < 4; ++i)
      who += (i > 0 ? ", " : "") + in.processes[i];
    if (in.processes.size() > 4) who += fmt::format(" and {} more", in.processes.size() - 4);
    row("processes", who);
    row("sure", fmt::format("{}: {}", diagnose::name_of(in.confidence), in.confidence_why));
    if (!in.immediate.empty())
      row("NVIDIA", fmt::format("{}: {}", in.immediate, xid::bucket_text(in.immediate)));
    row("do", fmt::format("{}{}{}", heal::name_of(in.remedy), in.advice.empty() ? "" : ": ", in.advice));
    for (const auto& command : in.commands) out += "               " + command + "\n";
    if (!in.disputed.empty()) row("disputed", in.disputed);
    for (const auto& note : in.notes) row("note", note);
    for (std::size_t i = 0; i < in.evidence.size() && i < shown_lines; ++i)
      row("line", fmt::format("{}:{}: {}", printable(in.evidence[i].file, 64), in.evidence[i].number,
                              printable(in.evidence[i].line, 240)));
    if (in.evidence_lines > shown_lines) row("", fmt::format("and {} more", in.evidence_lines - shown_lines));
    out += "\n";
  }
  return out;
}

std::string page(const Context& context, const diagnose::Diagnosis& diagnosis, std::size_t shown_lines) {
  std::string out;
  for (const auto& in : diagnosis.incidents) out += page_of(context, in, shown_lines);
  for (const auto& note : diagnosis.notes) out += note + "\n";
  return out;
}

// Whose a process is, better than its cgroup: a software share by its processes, a lease by its GPU or its
// slice. What was known stays known for ten minutes after it is gone.
class Owners {
 public:
  Owners(const Context& context, const std::string& url) : context_(context), url_(url) {}

  void look() {
    const auto now = monotonic_ns();
    if (const auto shares = share::list({.root = context_.root, .nvml_library = context_.nvml_library});
        shares.ok())
      for (const auto& tenant : *shares)
        if (tenant.now)
          for (const auto pid : tenant.now->processes)
            if (pid > 0 && processes_.size() < most)
              processes_[static_cast<std::uint32_t>(pid)] = {tenant.asked.name, now};
    std::erase_if(processes_, [now](const auto& one) { return now - one.second.second > remembered_ns; });
    if (now < next_ask_) return;
    ask();
    next_ask_ = monotonic_ns() + (daemon_ ? 2'000'000'000 : 10'000'000'000);
  }

  void name(diagnose::Evidence& e) {
    if (e.pid) {
      if (const auto found = processes_.find(*e.pid); found != processes_.end()) {
        e.tenant = "share " + printable(found->second.first, 64);
        if (const auto lease = found->second.first.starts_with("lease-")
                                   ? tenants_.find(found->second.first.substr(6))
                                   : tenants_.end();
            lease != tenants_.end())
          e.tenant = "tenant " + printable(lease->second, 64) + ", lease " + lease->first;
        return;
      }
    }
    // Only who owns the channel is sure to run where the lease is: callers come from anywhere.
    if (!e.pid || !e.at || !e.xid) return;
    const auto* row = xid::find(*e.xid);
    if (row == nullptr || row->attribution != xid::Attribution::channel) return;
    const auto now = monotonic_ns();
    const auto key = std::pair(PciAddress{e.at->domain, e.at->bus, e.at->device, 0},
                               e.gpu_instance ? static_cast<int>(*e.gpu_instance) : -1);
    if (const auto found = places_.find(key);
        found != places_.end() && now - found->second.second <= remembered_ns)
      e.tenant = found->second.first;
  }

  const std::string& why_not() const { return why_not_; }

 private:
  static constexpr std::size_t most = 65'536;
  static constexpr std::uint64_t remembered_ns = 600'000'000'000;
  static std::string words(const Json& holder) {
    const auto lease = holder.find("lease");
    if (lease == holder.end() || api::text(holder, "tenant").empty()) return {};
    return fmt::format("tenant {}, lease {}", api::text(holder, "tenant"), api::number(holder, "lease"));
  }

  void ask() {
    daemon_ = false;
    auto client = api::connect(url_);
    if (!client.ok()) {
      why_not_ = client.error().message();
      return;
    }
    auto leases = api::all(**client, "/api/v1/leases");
    auto seen = leases.ok() ? api::get(**client, "/api/v1/telemetry") : Result<Json>(Error(leases.error()));
    if (leases.ok() && leases->is_array()) {
      daemon_ = true;
      tenants_.clear();
      for (const auto& lease : *leases)
        if (tenants_.size() < most) tenants_[api::id_of_lease(lease)] = api::text(lease, "tenant");
    }
    if (!seen.ok()) {
      why_not_ = seen.error().message();
      return;
    }
    why_not_.clear();
    const auto now = monotonic_ns();
    for (const auto& gpu : seen->value("gpus", Json::array())) {
      const auto at = PciAddress::parse(api::text(gpu, "pci"));
      if (!at.ok() || places_.size() > most) continue;
      const auto put = [&](int instance, const Json& holder) {
        if (auto who = words(holder); !who.empty())
          places_[{PciAddress{at->domain, at->bus, at->device, 0}, instance}] = {std::move(who), now};
      };
      put(-1, gpu);
      for (const auto& slice : gpu.value("slices", Json::array()))
        put(static_cast<int>(api::number(slice, "gpuInstance")), slice);
    }
    std::erase_if(places_, [now](const auto& one) { return now - one.second.second > remembered_ns; });
  }

  const Context& context_;
  std::string url_;
  bool daemon_ = false;
  std::uint64_t next_ask_ = 0;
  std::string why_not_ = "not asked yet";
  std::map<std::uint32_t, std::pair<std::string, std::uint64_t>> processes_;
  std::map<std::string, std::string> tenants_;  // by lease
  std::map<std::pair<PciAddress, int>, std::pair<std::string, std::uint64_t>> places_;
};

Json line_of(std::string_view event) { return {{"event", event}, {"at", rfc3339(wall_now())}}; }
std::string text_of(const Json& line) {
  return line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

struct LiveOptions {
  std::string url = {};
  bool json = false;
  std::size_t lines = 3;
};

int live(const Context& context, const logs::Matcher& matcher, const LiveOptions& o) {
  struct sigaction action = {};
  action.sa_handler = [](int) { stopped = true; };
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  bool broken = false;
  Owners owners(context, o.url);
  // What was printed of each, so that it comes again when it says something else.
  std::map<std::string, std::string> printed;
  std::set<std::string> notes;
  bool greeted = false;
  const auto put = [&](const std::string& text) { broken = broken || print(text) != exit_ok; };
  const auto show = [&](const diagnose::Followed& now) {
    const auto sources =
        fmt::format("{}{}{}", now.kernel ? "the kernel's log" : "", now.kernel && now.driver ? " and " : "",
                    now.driver ? "the driver's events" : "");
    if (!greeted && now.driver) {
      greeted = true;
      put(o.json ? text_of({{"event", "following"},
                            {"at", rfc3339(wall_now())},
                            {"kernel", now.kernel},
                            {"driver", now.driver}})
                 : paint(context, Tone::dim, "following " + sources + "; Ctrl-C ends it") + "\n");
    }
    for (const auto& in : now.diagnosis.incidents) {
      auto said =
          fmt::format("{} {} {} {} {} {}", in.count, xid::name_of(in.severity), diagnose::name_of(in.blame),
                      in.charged, diagnose::name_of(in.blast), in.closed);
      auto& before = printed[in.id];
      if (before == said) continue;
      before = std::move(said);
      if (o.json) {
        auto line = line_of("incident");
        line["incident"] = diagnose::to_json(in);
        put(text_of(line));
      } else {
        put("---- " + rfc3339(wall_now()) + "\n" + page_of(context, in, o.lines));
      }
    }
    for (const auto& note : now.diagnosis.notes) {
      if (!notes.insert(note).second) continue;
      auto line = line_of("note");
      line["note"] = note;
      put(o.json ? text_of(line) : note + "\n");
    }
    (void)std::fflush(stdout);
  };
  const auto done = diagnose::follow(
      {.root = context.root,
       .nvml_library = context.nvml_library,
       .name = [&owners](diagnose::Evidence& e) { owners.name(e); },
       .look = [&owners] { owners.look(); }},
      matcher, [&broken] { return stopped.load() || broken; }, show);
  if (!done.ok()) return fail(context, Error(done.error()).in("diagnose"));
  std::uint64_t open = 0, events = 0;
  for (const auto& in : done->diagnosis.incidents) {
    open += in.closed ? 0 : 1;
    events += in.count;
  }
  if (o.json) {
    auto line = line_of("summary");
    line["incidents"] = done->diagnosis.incidents.size();
    line["open"] = open;
    line["events"] = events;
    line["kernelEvents"] = done->kernel_events;
    line["driverEvents"] = done->driver_events;
    line["kernelRecordsLost"] = done->lost;
    line["kernel"] = done->kernel;
    line["driver"] = done->driver;
    line["leases"] = owners.why_not().empty() ? Json(true) : Json(owners.why_not());
    line["notes"] = done->diagnosis.notes;
    put(text_of(line));
  } else {
    put(
        fmt::format("{} incidents, {} of them open: {} events, {} told by the kernel and {} by the driver; "
                    "{} records of the kernel's log lost\n",
                    done->diagnosis.incidents.size(), open, events, done->kernel_events, done->driver_events,
                    done->lost));
    if (!owners.why_not().empty())
      put("leases were not asked for: " + printable(owners.why_not(), 160) + "\n");
  }
  if (broken) return exit_could_not;
  return open > 0 ? exit_findings : exit_ok;
}

}  // namespace

std::function<int(const Context&)> bind_diagnose(CLI::App& app) {
  struct Options {
    std::vector<std::string> from = {};
    std::string since = {};
    bool json = false;
    bool live = false;
    std::string url = {};
    std::size_t lines = 3;
  };
  auto options = std::make_shared<Options>();
  app.add_option("--from", options->from, "Files of one machine: logs, .gz, a bundle; - is standard input")
      ->allow_extra_args();
  app.add_option("--since", options->since, "Only what is younger: 2h, 30m");
  app.add_option("--lines", options->lines, "Lines of evidence to show for each incident")
      ->check(CLI::Range(0, 24));
  app.add_flag("--live", options->live,
               "Follow this host's kernel log and the driver's events; Ctrl-C ends it");
  api::add_url(app, options->url);
  app.add_flag("--json", options->json, "For programs; with --live a line each");
  return [options](const Context& context) {
    const logs::Matcher matcher;
    std::optional<std::int64_t> since;
    if (!options->since.empty()) {
      const auto ns = parse_duration(options->since);
      if (!ns.ok()) return fail(context, Error(ns.error()).in("diagnose: --since"));
      since = static_cast<std::int64_t>(*ns / 1'000'000);
    }
    if (options->live) {
      if (!options->from.empty())
        return fail(context, Error(Errc::invalid,
                                   "diagnose: --live looks at this host, --from at files: one of them"));
      return live(context, matcher, {.url = options->url, .json = options->json, .lines = options->lines});
    }
    std::vector<diagnose::Input> inputs;
    std::uint64_t lost = 0;
    if (options->from.empty()) {
      auto kernel = diagnose::read_kernel_log(context.root, lost);
      if (!kernel.ok()) return fail(context, Error(kernel.error()).in("diagnose"));
      inputs.push_back(std::move(kernel).value());
    }
    for (const auto& path : options->from) {
      auto some = diagnose::read_inputs(path);
      if (!some.ok()) return fail(context, Error(some.error()).in("diagnose"));
      for (auto& one : *some) inputs.push_back(std::move(one));
    }
    auto outcome = diagnose::run(matcher, inputs, wall_now(), since);
    if (lost > 0)
      outcome.diagnosis.notes.push_back(
          fmt::format("{} records of the kernel's log were overwritten before they could be read", lost));
    bool open = false;
    for (const auto& in : outcome.diagnosis.incidents) open = open || !in.closed;
    std::string text;
    if (options->json) {
      auto document = diagnose::to_json(outcome.diagnosis);
      document["lines"] = outcome.lines;
      text = dump(document) + "\n";
    } else {
      text = page(context, outcome.diagnosis, options->lines);
      if (outcome.diagnosis.incidents.empty())
        text = fmt::format("Nothing wrong in {} lines.\n", outcome.lines) + text;
    }
    const int printed = print(text);
    return printed != exit_ok ? printed : open ? exit_findings : exit_ok;
  };
}

std::function<int(const Context&)> bind_bundle(CLI::App& app) {
  struct Options {
    std::string out = "bulkhead-bundle.tar.gz";
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  app.add_option("--out", options->out, "The archive to write (0600)");
  app.add_flag("--json", options->json, "What is in it, for programs");
  return [options](const Context& context) {
    const logs::Matcher matcher;
    std::vector<diagnose::Input> extra;
    std::uint64_t lost = 0;
    if (auto kernel = diagnose::read_kernel_log(context.root, lost); kernel.ok()) {
      std::vector<diagnose::Input> inputs;
      inputs.push_back(std::move(kernel).value());
      extra.push_back(
          {"diagnosis.json",
           dump(diagnose::to_json(diagnose::run(matcher, inputs, wall_now(), std::nullopt).diagnosis)) +
               "\n"});
    }
    const auto packed = diagnose::bundle(context.root, options->out, extra, wall_now());
    if (!packed.ok()) return fail(context, Error(packed.error()).in("bundle"));
    if (options->json) {
      Json out = {{"file", options->out}, {"bytes", packed->bytes}, {"removed", packed->redacted}};
      out["members"] = packed->members;
      out["left_out"] = packed->left_out;
      return print(dump(out) + "\n");
    }
    std::string text = fmt::format("{}: {} files, {} bytes; {} secrets taken out\n", options->out,
                                   packed->members.size(), packed->bytes, packed->redacted);
    for (const auto& one : packed->left_out) text += "  left out: " + printable(one, 200) + "\n";
    text += "  look through it before it leaves your hands: tar tzf " + shell_word(options->out) + "\n";
    return print(text);
  };
}

}  // namespace bulkhead::cli
