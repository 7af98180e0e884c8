// bulkhead lease: ask for a slice, keep it, run in it, give it back.
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <optional>

#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/text.hpp"
#include "cli/api.hpp"
#include "core/lease/lease.hpp"

namespace bulkhead::cli {

namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  std::string url = {}, cls = {}, profile = {}, memory = {}, topology = {}, ttl = {}, within = {},
              tenant = {}, label = {}, state = {}, why = {};
  std::string wait = {};  // empty: not; "true": as long as it takes; else so long
  std::int64_t id = 0;
  std::optional<unsigned> weight = {}, count = {};
  std::optional<int> priority = {};
  std::vector<std::string> models = {}, words = {};
  std::size_t most = 100;
  bool json = false, progress = false, preemptible = false, all = false;
  bool waits() const { return !wait.empty() && wait != "false"; }
};

using api::Asked, api::over;

std::string path_of(std::int64_t id) { return fmt::format("/api/v1/leases/{}", id); }

Result<Json> request_of(const Options& o) {
  if (o.cls.empty())
    return Error(Errc::invalid, "which class? --class mig, share, exclusive or passthrough",
                 "bulkhead lease create --help");
  Json out{{"class", o.cls}};
  if (!o.tenant.empty()) out["tenant"] = o.tenant;
  if (!o.profile.empty()) out["profile"] = o.profile;
  if (!o.memory.empty()) {
    BH_TRY(const auto bytes, parse_memory(o.memory));
    if (o.cls == "share" && bytes < lease::smallest_share.count)
      return Error(Errc::invalid,
                   fmt::format("--memory {}: the smallest share is {}", printable(o.memory, 32),
                               human(lease::smallest_share)),
                   "no program comes up in less; a CUDA context alone takes about 520 MiB on an H100");
    out["memory"] = bytes;
  }
  if (o.weight) out["weight"] = *o.weight;
  if (o.count) out["count"] = *o.count;
  if (!o.topology.empty()) out["topology"] = o.topology;
  if (!o.ttl.empty()) {
    BH_TRY(out["ttlSeconds"], api::seconds_of(o.ttl));
  }
  if (!o.within.empty()) {
    BH_TRY(const auto seconds, api::seconds_of(o.within));
    const std::time_t at = ::time(nullptr) + static_cast<std::time_t>(seconds);
    tm parts{};
    std::array<char, 32> text{};
    ::gmtime_r(&at, &parts);
    if (std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", &parts) > 0)
      out["deadline"] = text.data();
  }
  if (o.waits()) out["wait"] = true;
  if (o.priority) out["priority"] = *o.priority;
  if (o.preemptible) out["preemptible"] = true;
  if (!o.models.empty()) out["models"] = o.models;
  if (!o.label.empty()) out["label"] = o.label;
  return out;
}

std::string place_of(const Json& lease) {
  std::string out;
  const auto devices = lease.value("devices", Json::array());
  for (const auto& device : devices) {
    if (!out.empty()) out += ", ";
    const auto profile = api::text(device, "profile"), uuid = api::text(device, "device");
    out += fmt::format("{}{}{}", profile, profile.empty() ? "" : " ",
                       uuid.empty() ? api::text(device, "gpu") : uuid);
  }
  return out;
}

// "queued: no room; fits after lease 7 ends at 14:05"
std::string progress(const Json& lease) {
  std::string out = fmt::format("lease {} {}", api::number(lease, "id"), api::text(lease, "state"));
  if (const auto reason = api::text(lease, "reason"); !reason.empty()) out += ": " + reason;
  const auto ways = lease.value("ways", Json::array());
  for (const auto& way : ways)
    if (way.is_string()) out += "; " + printable(way.get_ref<const std::string&>(), 512);
  if (const auto place = place_of(lease); !place.empty()) out += " on " + place;
  return out;
}

// "place 2 of your 3; 1 other tenant goes before: nothing that is free fits it". Empty: it does not wait.
std::string place_in_line(const Json& place) {
  const auto own = api::number(place, "own"), at = api::number(place, "place"),
             others = api::number(place, "tenantsAhead");
  if (own == 0) return {};
  std::string out = own == 1 ? "the only one of its tenant that waits"
                             : fmt::format("place {} of the {} of its tenant that wait", at, own);
  if (others > 0) out += fmt::format("; {} other tenant{} before it", others, others == 1 ? " goes" : "s go");
  if (const auto why = api::text(place, "why"); !why.empty()) out += ": " + why;
  return out;
}

struct Wait {
  std::optional<Clock::time_point> until = {};  // nullopt: as long as it takes
  bool progress = false;                        // on stderr
};

// Until the lease is active or over, a signal came, or the time is over. A stream tells of changes; now and
// then it is asked anew, so that nothing depends on the stream.
Result<Json> wait_until_active(api::Client& client, Json lease, const Wait& wait) {
  const auto id = api::number(lease, "id");
  const auto tell = [&](const std::string& line) {
    if (wait.progress) std::fputs((line + "\n").c_str(), stderr);
  };
  std::string told, stood;
  auto look = Clock::now();
  std::optional<Error> wrong;
  const auto enough = [&] {
    const auto state = api::text(lease, "state");
    if (auto now = progress(lease); now != told) tell(told = std::move(now));
    return state == "active" || over(state) || Asked::to_stop != 0 ||
           (wait.until && Clock::now() >= *wait.until);
  };
  const auto stand = [&] {  // where it stands, when that changed
    if (!wait.progress || Clock::now() < look || api::text(lease, "state") != "queued") return;
    look = Clock::now() + std::chrono::seconds(2);
    const auto place = api::get(client, path_of(id) + "/place");
    if (!place.ok()) return;  // a server that went or knows no such thing: the stream will tell
    if (auto now = place_in_line(*place); !now.empty() && now != stood)
      tell(fmt::format("lease {}: {}", id, stood = std::move(now)));
  };
  unsigned quiet = 0, failures = 0;
  while (!enough()) {
    bool first = true;
    const auto followed = client.follow(
        fmt::format("/api/v1/events?lease={}", id), -1, [&](std::int64_t event, const Json& body) {
          failures = 0;
          if (event != 0 && body.contains("lease") && body["lease"].is_object() &&
              api::number(body["lease"], "id") == id) {
            lease = body["lease"];
          } else if (Asked::to_stop == 0 && (first || event != 0 || ++quiet % 5 == 0)) {
            auto now = api::get(client, path_of(id));
            if (now.ok())
              lease = std::move(*now);
            else if (now.error().code() != Errc::unavailable && now.error().code() != Errc::timeout)
              wrong = now.error();
          }
          first = false;
          if (wrong || enough()) return false;
          stand();
          return true;
        });
    if (wrong) return *wrong;
    if (followed.ok() || Asked::to_stop != 0) continue;
    if (followed.error().code() != Errc::unavailable && followed.error().code() != Errc::timeout &&
        followed.error().code() != Errc::in_use)
      return followed.error();
    if (++failures > 60) return followed.error();
    if (failures == 1) tell("the server is away; the lease waits on: trying again");
    ::poll(nullptr, 0, 1000);
    if (auto now = api::get(client, path_of(id)); now.ok()) lease = std::move(*now), failures = 0;
  }
  return lease;
}

std::string shown(const Context& context, const Json& lease) {
  const auto state = api::text(lease, "state");
  const auto tone = state == "active" ? Tone::good : over(state) ? Tone::dim : Tone::warn;
  std::string out =
      fmt::format("lease {}   {}   {} of {}\n", paint(context, Tone::bold, api::id_of_lease(lease)),
                  paint(context, tone, state), api::text(lease, "user"), api::text(lease, "tenant"));
  const auto line = [&](std::string_view name, const std::string& value) {
    if (!value.empty()) out += fmt::format("{:<11}{}\n", name, value);
  };
  std::string what = api::text(lease, "class");
  if (const auto profile = api::text(lease, "profile"); !profile.empty()) what += " " + profile;
  if (lease.contains("memory"))
    what += " " + human(Bytes(static_cast<std::uint64_t>(api::number(lease, "memory"))));
  if (lease.contains("weight"))
    what += fmt::format(", {} thousandths of the time", api::number(lease, "weight"));
  if (api::number(lease, "count") > 1) what += fmt::format(" x {}", api::number(lease, "count"));
  line("class", what);
  line("label", api::text(lease, "label"));
  line("reason", api::text(lease, "reason"));
  const auto ways = lease.value("ways", Json::array());
  for (const auto& way : ways)
    if (way.is_string()) line("way", printable(way.get_ref<const std::string&>(), 512));
  if (lease.contains("expires"))
    line("until",
         fmt::format("{} ({})", api::text(lease, "expires"), api::when(api::text(lease, "expires"))));
  if (lease.contains("notice"))
    line("NOTICE",
         fmt::format("will be ended for one of higher priority {}", api::when(api::text(lease, "notice"))));
  const auto devices = lease.value("devices", Json::array());
  for (const auto& device : devices) {
    std::string text = fmt::format("{} {}", api::text(device, "gpuName"), api::text(device, "device"));
    if (const auto profile = api::text(device, "profile"); !profile.empty()) text = profile + " of " + text;
    if (device.contains("numaNode")) text += fmt::format(", NUMA node {}", api::number(device, "numaNode"));
    if (const auto cpus = api::text(device, "cpus"); !cpus.empty()) text += ", cores " + cpus;
    if (const auto cdi = api::text(device, "cdi"); !cdi.empty()) text += ", CDI " + cdi;
    line("device", text);
    const auto nodes = device.value("deviceNodes", Json::array());
    for (const auto& node : nodes)
      if (node.is_string()) line("", printable(node.get_ref<const std::string&>(), 256));
  }
  const auto environment = lease.value("environment", Json::object());
  for (const auto& [name, value] : environment.items())
    if (value.is_string())
      line("env",
           fmt::format("{}={}", printable(name, 80), printable(value.get_ref<const std::string&>(), 2048)));
  const auto guarantees = lease.value("guarantees", Json::array());
  for (const auto& one : guarantees)
    if (one.is_string()) line("promise", printable(one.get_ref<const std::string&>(), 1024));
  return out;
}

int show(const Context& context, const Options& o, const Json& lease) {
  return print(o.json ? dump(lease) + "\n" : shown(context, lease));
}

using Act = Result<int> (*)(const Context&, const Options&, api::Client&);
Subverbs<Options>::Act speaking(const char* verb, Act act) {
  return [verb, act](const Context& context, const Options& options) {
    auto client = api::connect(options.url);
    if (!client.ok()) return fail(context, Error(client.error()).in(verb));
    auto code = act(context, options, **client);
    return code.ok() ? *code : api::refused(context, verb, code.error());
  };
}

Result<Json> ask(const Options& o, api::Client& client) {
  BH_TRY(const Json body, request_of(o));
  const auto key = api::fresh_key();
  std::vector<std::pair<std::string, std::string>> headers;
  if (!key.empty()) headers.emplace_back("Idempotency-Key", key);
  auto lease = api::document(client, client.call("POST", "/api/v1/leases", body, headers));
  if (!lease.ok() && o.tenant.empty() &&
      lease.error().message().find("tenant: is missing") != std::string::npos)
    return Error(lease.error())
        .with_hint("bulkhead lease create --tenant NAME ...; bulkhead tenant list names them");
  return lease;
}

// Gives it back, quietly where it is gone already.
void give_back(api::Client& client, std::int64_t id) {
  const auto gone = api::document(client, client.call("DELETE", path_of(id), std::nullopt));
  if (!gone.ok() && gone.error().code() != Errc::not_found && gone.error().code() != Errc::conflict)
    std::fputs(fmt::format("bulkhead: lease {} was not released: {}\n  bulkhead lease release {}\n", id,
                           gone.error().message(), id)
                   .c_str(),
               stderr);
  else
    std::fputs(fmt::format("lease {} released\n", id).c_str(), stderr);
}

// Made, and if it was to be waited for active, over, or as it is when the waiting ended.
Result<Json> make(const Options& o, api::Client& client, bool to_the_end) {
  Wait wait{.progress = o.progress || ::isatty(STDERR_FILENO) == 1};
  if (o.waits() && o.wait != "true") {
    BH_TRY(const auto seconds, api::seconds_of(o.wait));
    wait.until = Clock::now() + std::chrono::seconds(seconds);
  }
  BH_TRY(Json lease, ask(o, client));
  if (!to_the_end) return lease;
  auto waited = wait_until_active(client, lease, wait);
  if (waited.ok()) return waited;
  const auto id = api::number(lease, "id");
  return Error(waited.error())
      .with_hint(fmt::format("lease {} is there: bulkhead lease show {}, or release it", id, id));
}

// Who stops waiting is told what stays, for it will be granted without them.
void say_what_stays(const Json& lease) {
  const auto id = api::number(lease, "id");
  const auto state = api::text(lease, "state");
  std::fputs(fmt::format("bulkhead: lease create: {}; lease {} {}\n  watch it: bulkhead lease watch {}\n  "
                         "give it up: bulkhead lease release {}\n",
                         Asked::to_stop != 0 ? "stopped waiting" : "the time to wait is over", id,
                         state == "queued" ? "stays in the queue and starts when there is room"
                                           : "is " + state + " and goes on",
                         id, id)
                 .c_str(),
             stderr);
}

Result<int> create(const Context& context, const Options& o, api::Client& client) {
  const Asked signals;
  BH_TRY(const Json lease, make(o, client, o.waits()));
  const int code = show(context, o, lease);
  const auto state = api::text(lease, "state");
  if (code != exit_ok) return code;
  if (state == "active" || (!o.waits() && !over(state))) return exit_ok;
  if (!over(state)) say_what_stays(lease);
  return exit_findings;
}

Result<int> list(const Context& context, const Options& o, api::Client& client) {
  BH_TRY(const Json everything, api::all(client, "/api/v1/leases", o.all ? 100'000 : o.most));
  Json all = Json::array();
  for (const auto& one : everything)
    if (o.all || !over(api::text(one, "state"))) all.push_back(one);
  if (o.json) return print(dump(Json{{"leases", all}}) + "\n");
  if (all.empty())
    return print("no leases\ntry: bulkhead lease create --class mig --profile 1g.10gb --ttl 1h\n");
  Table table({"ID", "TENANT", "USER", "CLASS", "STATE", "UNTIL", "PLACE"});
  for (const auto& one : all) {
    const auto state = api::text(one, "state");
    auto cls = api::text(one, "class");
    if (const auto profile = api::text(one, "profile"); !profile.empty()) cls += " " + profile;
    if (api::number(one, "count") > 1) cls += fmt::format(" x {}", api::number(one, "count"));
    // Of one that is over: when it ended, and why. Its place is somebody else's by now.
    const bool gone = over(state);
    const char* time = gone ? "ended" : "expires";
    const auto place = gone ? std::string() : place_of(one);
    table.row({api::id_of_lease(one), api::text(one, "tenant"), api::text(one, "user"), cls, state,
               one.contains(time) ? api::when(api::text(one, time)) : "-",
               place.empty() ? api::text(one, "reason") : place},
              {Tone::bold, Tone::plain, Tone::plain, Tone::plain,
               state == "active" ? Tone::good
               : over(state)     ? Tone::dim
                                 : Tone::warn,
               Tone::plain, Tone::plain});
  }
  return print(table.str(context));
}

Result<int> show_one(const Context& context, const Options& o, api::Client& client) {
  BH_TRY(const Json lease, api::get(client, path_of(o.id)));
  return show(context, o, lease);
}

Result<int> environment(const Context&, const Options& o, api::Client& client) {
  BH_TRY(const Json lease, api::get(client, path_of(o.id)));
  if (api::text(lease, "state") != "active")
    return Error(Errc::conflict,
                 fmt::format("lease {} is {}: it has no environment", o.id, api::text(lease, "state")),
                 fmt::format("bulkhead lease watch {}", o.id));
  std::string out;
  const auto all = lease.value("environment", Json::object());
  for (const auto& [name, value] : all.items()) {
    const bool fits = !name.empty() && std::isdigit(static_cast<unsigned char>(name[0])) == 0 &&
                      std::all_of(name.begin(), name.end(),
                                  [](unsigned char c) { return std::isalnum(c) != 0 || c == '_'; });
    if (fits && value.is_string())
      out += fmt::format("export {}={}\n", name, shell_word(value.get_ref<const std::string&>()));
  }
  return print(out);
}

Result<int> renew(const Context& context, const Options& o, api::Client& client) {
  BH_TRY(const auto seconds, api::seconds_of(o.ttl));
  BH_TRY(const Json lease,
         api::document(client, client.call("POST", path_of(o.id) + "/renew", Json{{"ttlSeconds", seconds}})));
  if (o.json) return show(context, o, lease);
  return print(fmt::format("lease {} until {} ({})\n", o.id, api::text(lease, "expires"),
                           api::when(api::text(lease, "expires"))));
}

Result<int> release(const Context& context, const Options& o, api::Client& client) {
  BH_TRY(const Json lease, api::document(client, client.call("DELETE", path_of(o.id), std::nullopt)));
  if (o.json) return show(context, o, lease);
  return print(fmt::format("lease {} {}\n", o.id, api::text(lease, "state")));
}

Result<int> evict(const Context& context, const Options& o, api::Client& client) {
  BH_TRY(const Json lease,
         api::document(client, client.call("POST", path_of(o.id) + "/evict", Json{{"why", o.why}})));
  if (o.json) return show(context, o, lease);
  return print(
      fmt::format("lease {} of {} {}\n", o.id, api::text(lease, "tenant"), api::text(lease, "state")));
}

Result<int> watch(const Context& context, const Options& o, api::Client& client) {
  const Asked signals;
  std::int64_t last = -1;
  bool ended = false;
  int code = exit_ok;
  if (o.id != 0) {
    BH_TRY(const Json lease, api::get(client, path_of(o.id)));
    if (!o.json) code = print(progress(lease) + "\n");
    ended = over(api::text(lease, "state"));
  }
  const auto path = o.id != 0 ? fmt::format("/api/v1/events?lease={}", o.id) : std::string("/api/v1/events");
  unsigned failures = 0;
  while (!ended && Asked::to_stop == 0 && code == exit_ok) {
    const auto followed = client.follow(path, last, [&](std::int64_t id, const Json& event) {
      if (Asked::to_stop != 0) return false;
      failures = 0;
      if (id == 0) return true;
      last = id;
      if (o.json)
        code = print(event.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
      else
        code = print(
            fmt::format("{}  {:<10} {:<10} {}\n", api::text(event, "at"), api::text(event, "what"),
                        api::text(event, "verb"),
                        event.contains("lease") ? progress(event["lease"]) : api::text(event, "tenant")));
      ended = o.id != 0 && event.contains("lease") && over(api::text(event["lease"], "state"));
      return code == exit_ok && !ended;
    });
    if (followed.ok()) break;
    const auto why = followed.error().code();
    if ((why != Errc::unavailable && why != Errc::timeout && why != Errc::in_use) || ++failures > 60)
      return followed.error();
    if (failures == 1)
      std::fputs(paint(Context{}, Tone::dim, "the server is away; coming back with the last event\n").c_str(),
                 stderr);
    ::poll(nullptr, 0, 1000);
  }
  (void)context;
  return code;
}

// The words that start the program in the lease. A share is held from outside: by `share run` of this host.
Result<std::vector<std::string>> words_of(const Context& context, const Options& o, const Json& lease) {
  if (api::text(lease, "class") != "share") return o.words;
  const auto devices = lease.value("devices", Json::array());
  if (devices.size() != 1)
    return Error(Errc::unsupported,
                 fmt::format("a share of {} GPUs: `lease run` holds a program on one", devices.size()),
                 "--count 1, or: bulkhead lease env ID and a program of your own for each");
  std::vector<std::string> out{"/proc/self/exe", "--root", context.root.string()};
  if (!context.nvml_library.empty()) out.insert(out.end(), {"--nvml", context.nvml_library});
  out.insert(out.end(), {"share", "run", "--untested", "--name", "lease-" + api::id_of_lease(lease), "--gpu",
                         api::text(devices[0], "gpu")});
  if (api::number(devices[0], "weight") > 0)
    out.insert(out.end(), {"--weight", std::to_string(api::number(devices[0], "weight"))});
  if (api::number(lease, "memory") > 0)
    out.insert(out.end(), {"--memory", std::to_string(api::number(lease, "memory"))});
  out.emplace_back("--");
  out.insert(out.end(), o.words.begin(), o.words.end());
  return out;
}

// Runs the words and renews the lease meanwhile. The program's exit code, 128 + signal when it was killed.
Result<int> hold_and_run(const std::vector<std::string>& words, const Json& lease, api::Client& client) {
  const auto id = api::number(lease, "id");
  const auto ttl = std::max<std::int64_t>(api::number(lease, "ttlSeconds"), 10);
  std::vector<std::string> environment;
  for (char** at = environ; *at != nullptr; ++at) {
    const std::string_view one = *at;
    if (!one.starts_with("BULKHEAD_TOKEN=")) environment.emplace_back(one);  // the program is not who we are
  }
  const auto ours = lease.value("environment", Json::object());
  for (const auto& [name, value] : ours.items()) {
    if (!value.is_string() || name.find('=') != std::string::npos) continue;
    std::erase_if(environment,
                  [&, start = name + "="](const std::string& one) { return one.starts_with(start); });
    environment.push_back(name + "=" + value.get<std::string>());
  }
  std::vector<char*> arguments, variables;
  for (const auto& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
  for (const auto& one : environment) variables.push_back(const_cast<char*>(one.c_str()));
  arguments.push_back(nullptr);
  variables.push_back(nullptr);

  const Asked signals;
  const pid_t child = ::fork();
  if (child < 0) return errno_error("fork", errno);
  if (child == 0) {
    ::signal(SIGINT, SIG_DFL);
    ::signal(SIGTERM, SIG_DFL);
    ::execvpe(arguments[0], arguments.data(), variables.data());
    const int err = errno;
    (void)!::write(STDERR_FILENO, "bulkhead: lease run: cannot start the program: ", 47);
    const char* why = std::strerror(err);
    (void)!::write(STDERR_FILENO, why, std::strlen(why));
    (void)!::write(STDERR_FILENO, "\n", 1);
    ::_exit(err == ENOENT ? 127 : 126);
  }
  auto next = Clock::now() + std::chrono::seconds(std::max<std::int64_t>(ttl / 3, 3));
  bool lost = false, noticed = false;
  int passed_on = 0;
  for (;;) {
    int status = 0;
    const pid_t got = ::waitpid(child, &status, WNOHANG);
    if (got == child) return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    if (got < 0 && errno != EINTR) return errno_error("waitpid", errno);
    // The terminal sends Ctrl-C to the program itself.
    if (Asked::to_stop == SIGTERM && passed_on != SIGTERM) ::kill(child, passed_on = SIGTERM);
    if (!lost && Clock::now() >= next) {
      const auto kept =
          api::document(client, client.call("POST", path_of(id) + "/renew", Json{{"ttlSeconds", ttl}}));
      next = Clock::now() + std::chrono::seconds(kept.ok() ? std::max<std::int64_t>(ttl / 3, 3) : 2);
      if (kept.ok() && kept->contains("notice") && !noticed) {
        noticed = true;
        std::fputs(fmt::format("bulkhead: lease {} will be ended {} for one of higher priority\n", id,
                               api::when(api::text(*kept, "notice")))
                       .c_str(),
                   stderr);
      } else if (!kept.ok() && kept.error().code() != Errc::unavailable &&
                 kept.error().code() != Errc::timeout && kept.error().code() != Errc::in_use) {
        lost = true;
        std::fputs(fmt::format("bulkhead: lease {} is not renewed: {}\n", id, kept.error().message()).c_str(),
                   stderr);
      }
    }
    ::poll(nullptr, 0, 50);
  }
}

Result<int> run(const Context& context, const Options& given, api::Client& client) {
  Options o = given;
  const bool made = !o.cls.empty();
  if (!made) {
    const auto id = parse_i64(o.words[0]);
    o.words.erase(o.words.begin());
    // The parser leaves the dashes in when a word stands before them.
    if (!o.words.empty() && o.words.front() == "--") o.words.erase(o.words.begin());
    if (!id || *id < 1 || o.words.empty())
      return Error(
          Errc::invalid, "in which lease, and which program?",
          "bulkhead lease run 7 -- PROGRAM, or bulkhead lease run --class mig --profile 1g.10gb -- PROGRAM");
    o.id = *id;
  }
  Json lease;
  if (made) {
    const Asked signals;
    BH_TRY(lease, make(o, client, true));
    const auto state = api::text(lease, "state");
    if (state != "active" && !over(state)) {  // nobody would use it
      std::fputs(Asked::to_stop != 0 ? "bulkhead: lease run: stopped waiting\n"
                                     : "bulkhead: lease run: the time to wait is over\n",
                 stderr);
      give_back(client, api::number(lease, "id"));
      return exit_findings;
    }
  } else {
    BH_TRY(lease, api::get(client, path_of(o.id)));
  }
  const auto id = api::number(lease, "id");
  if (const auto state = api::text(lease, "state"); state != "active") {
    std::string why = api::text(lease, "reason");
    return Error(made ? Errc::no_capacity : Errc::conflict,
                 fmt::format("lease {} is {}{}{}", id, state, why.empty() ? "" : ": ", why),
                 fmt::format("bulkhead lease show {}", id));
  }
  auto words = words_of(context, o, lease);
  auto code = words.ok() ? hold_and_run(*words, lease, client) : Result<int>(words.error());
  if (made) give_back(client, id);
  return code;
}

void common(CLI::App& sub, const std::shared_ptr<Options>& o) {
  sub.add_flag("--json", o->json, "For programs");
  api::add_url(sub, o->url);
}
void number(CLI::App& sub, const std::shared_ptr<Options>& o) {
  sub.add_option("id", o->id, "The lease's number")->required()->check([](const std::string& text) {
    const auto id = parse_i64(text);
    return id && *id > 0 ? "" : "is no number of a lease";
  });
}
void wishes(CLI::App& sub, const std::shared_ptr<Options>& o) {
  sub.add_option("--class", o->cls, "mig, share, exclusive or passthrough")->type_name("CLASS");
  sub.add_option("--profile", o->profile, "Of class mig, like 3g.40gb")->type_name("PROFILE");
  sub.add_option("--memory", o->memory, "Of class share: the cap, like 20GiB; 64MiB at least")
      ->type_name("SIZE");
  sub.add_option("--weight", o->weight, "Of class share: thousandths of a GPU's time (1 to 1000)");
  sub.add_option("--count", o->count, "So many, all or none (1)");
  sub.add_option("--topology", o->topology, "any, same-gpu, same-numa, same-node or spread (any)")
      ->type_name("HOW");
  sub.add_option("--ttl", o->ttl, "For so long, like 30m, 8h or 7d (1h)")->type_name("TIME");
  sub.add_option("--within", o->within, "Granted within this time, or it fails")->type_name("TIME");
  sub.add_option("--priority", o->priority, "Among your tenant's own (-100 to 100; above 0 for operators)");
  sub.add_flag("--preemptible", o->preemptible, "May be ended, with notice, for one of higher priority");
  sub.add_option("--model", o->models, "Only GPUs of this name, like '*H100*'; may be repeated")
      ->type_name("PATTERN");
  sub.add_option("--tenant", o->tenant, "For this tenant (operators)")->type_name("TENANT");
  sub.add_option("--label", o->label, "Your own words")->type_name("TEXT");
  sub.add_flag(
      "--wait", o->wait,
      "Queue when there is no room, and come back when it is active, or after --wait=TIME, like 10m");
  sub.add_flag("--progress", o->progress,
               "While it waits, say on stderr where it stands and why (on a terminal: always)");
}

}  // namespace

std::function<int(const Context&)> bind_lease(CLI::App& app) {
  Subverbs<Options> verbs(app);
  const auto o = verbs.options;
  verbs.add(
      "create", "Ask for a slice",
      "bulkhead lease create --class mig --profile 3g.40gb --ttl 1h --wait --json\n"
      "bulkhead lease create --class share --memory 20GiB --weight 300\n"
      "bulkhead lease create --class exclusive --count 2 --topology same-numa --wait --within 30m\n"
      "bulkhead lease create --class mig --profile 1g.10gb --wait=10m   after that it stays queued, and 1",
      [&](CLI::App& sub) { wishes(sub, o), common(sub, o); }, speaking("lease create", create));
  verbs.add(
      "list", "Leases that are not over, newest first",
      "bulkhead lease list\nbulkhead lease list --all --json",
      [&](CLI::App& sub) {
        sub.add_flag("--all", o->all, "Those that ended, too");
        sub.add_option("--most", o->most, "Look at so many of the newest (100)");
        common(sub, o);
      },
      speaking("lease list", list));
  verbs.add(
      "show", "One lease: its devices, environment, and what it promises", "bulkhead lease show 7",
      [&](CLI::App& sub) { number(sub, o), common(sub, o); }, speaking("lease show", show_one));
  verbs.add(
      "env", "Its environment, for a shell", "eval \"$(bulkhead lease env 7)\"",
      [&](CLI::App& sub) { number(sub, o), api::add_url(sub, o->url); }, speaking("lease env", environment));
  verbs.add(
      "renew", "Keep it longer: from now, never shorter", "bulkhead lease renew 7 --ttl 2h",
      [&](CLI::App& sub) {
        number(sub, o);
        sub.add_option("--ttl", o->ttl, "For so long from now")->required()->type_name("TIME");
        common(sub, o);
      },
      speaking("lease renew", renew));
  verbs.add(
      "release", "Give it back", "bulkhead lease release 7",
      [&](CLI::App& sub) { number(sub, o), common(sub, o); }, speaking("lease release", release));
  verbs.add(
      "evict", "End somebody's lease and tell them why (operators)",
      "bulkhead lease evict 7 --why 'its GPU goes for repair'",
      [&](CLI::App& sub) {
        number(sub, o);
        sub.add_option("--why", o->why, "What its tenant reads")->required()->type_name("TEXT");
        common(sub, o);
      },
      speaking("lease evict", evict));
  verbs.add(
      "watch", "What happens, as it happens; of one lease until it is over",
      "bulkhead lease watch 7\nbulkhead lease watch --json    a line an event",
      [&](CLI::App& sub) {
        sub.add_option("id", o->id, "Of this lease alone");
        common(sub, o);
      },
      speaking("lease watch", watch));
  verbs.add(
      "run", "Run a program in a lease, renewed while it runs; one made for it is given back",
      "bulkhead lease run 7 -- python3 train.py\n"
      "bulkhead lease run --class mig --profile 1g.10gb --wait -- nvidia-smi -L",
      [&](CLI::App& sub) {
        sub.add_option("words", o->words,
                       "The lease's number, unless --class makes one; then -- PROGRAM and its arguments")
            ->required()
            ->expected(1, -1);
        wishes(sub, o);
        api::add_url(sub, o->url);
        sub.positionals_at_end();
      },
      speaking("lease run", run));
  return verbs.run();
}

}  // namespace bulkhead::cli
