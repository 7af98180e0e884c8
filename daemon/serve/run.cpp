// The daemon's life: sockets, the control loop, signals, systemd, the end.
#include <fcntl.h>
#include <malloc.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <optional>
#include <thread>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "daemon/serve/app.hpp"
#include "daemon/serve/notify.hpp"
#include "daemon/serve/telemetry.hpp"
#include "daemon/serve/tidings.hpp"
#include "engine/incidents/incidents.hpp"
#include "engine/meter/meter.hpp"
#include "engine/protect/protect.hpp"

namespace bulkhead::serve {

namespace {

constexpr std::chrono::milliseconds turn_period{250};
// From this size on a block is a mapping of its own, which goes back to the system when it is freed. Left alone,
// glibc raises the bound to the largest block it has seen freed (mallopt(3)), and then one connection that stays
// keeps 130 MiB of others' bodies in the heap behind it.
constexpr int own_mapping = 128 << 10;  // bytes
constexpr unsigned let_go_ms = 5'000;  // then who hangs in the driver is killed

// A signal is a byte for the thread that may do what a handler may not. Children that the engine forks have
// the handler but not the word: the process is compared.
std::atomic<int> signal_fd{-1};
std::atomic<pid_t> signal_process{0};
extern "C" void on_signal(int number) {
  const int saved = errno;
  const char byte = static_cast<char>(number);
  if (::getpid() == signal_process.load() && signal_fd.load() >= 0)
    (void)!::write(signal_fd.load(), &byte, 1);
  else if (number != SIGHUP)
    ::_exit(128 + number);
  errno = saved;
}

class Signals {
 public:
  explicit Signals(std::function<void(int)> told) : told_(std::move(told)) {
    int ends[2] = {-1, -1};
    if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return;
    read_ = UniqueFd(ends[0]);
    write_ = UniqueFd(ends[1]);
    signal_process = ::getpid();
    signal_fd = write_.get();
    struct sigaction action {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART;
    for (std::size_t i = 0; i < std::size(numbers); ++i) ::sigaction(numbers[i], &action, &before_[i]);
    struct sigaction ignore {};
    ignore.sa_handler = SIG_IGN;
    ::sigaction(SIGPIPE, &ignore, &pipe_before_);
    thread_ = std::thread([this] { listen(); });
  }
  ~Signals() {
    if (!thread_.joinable()) return;
    for (std::size_t i = 0; i < std::size(numbers); ++i) ::sigaction(numbers[i], &before_[i], nullptr);
    ::sigaction(SIGPIPE, &pipe_before_, nullptr);
    signal_fd = -1;
    const char over = 0;
    (void)!::write(write_.get(), &over, 1);
    thread_.join();
  }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;

 private:
  static constexpr int numbers[] = {SIGTERM, SIGINT, SIGHUP};
  void listen() {
    while (true) {
      pollfd waits{read_.get(), POLLIN, 0};
      if (::poll(&waits, 1, -1) < 0 && errno != EINTR) return;
      char byte = 0;
      while (::read(read_.get(), &byte, 1) == 1) {
        if (byte == 0) return;
        told_(byte);
      }
    }
  }
  const std::function<void(int)> told_;
  UniqueFd read_ = {}, write_ = {};
  struct sigaction before_[std::size(numbers)] = {}, pipe_before_ = {};
  std::thread thread_ = {};
};

bool is_local(int fd) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  return ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0 && address.ss_family == AF_UNIX;
}

Status make_folder(const std::filesystem::path& path, unsigned mode) {
  std::error_code failed;
  if (std::filesystem::is_directory(path, failed)) return ok_status();
  std::filesystem::create_directories(path.parent_path(), failed);
  if (::mkdir(path.c_str(), mode) != 0 && errno != EEXIST)
    return errno_error("make " + path.string(), errno)
        .with_hint("be root, or choose another: --state-dir DIR");
  return ok_status();
}

std::vector<std::string> host_names(const Config& config) {
  auto out = config.names;
  if (const auto listen = parse_listen(config.listen);
      listen.ok() && listen->first != "0.0.0.0" && listen->first != "::")
    out.push_back(listen->first);
  return out;
}

// Once, for whoever comes first; root alone can read it. A token whose secret nobody got is taken back.
Status write_first_token(control::Control& control, const std::filesystem::path& state, Log& log) {
  BH_TRY(const auto token, control::first_token(control));
  if (!token) return ok_status();
  const auto file = state / "admin.token";
  if (auto written = write_file_atomic(file, *token + "\n", 0600); !written.ok()) {
    control.revoke_token({.user = "bulkhead", .role = access::Role::admin, .from = "first start"},
                         token->substr(3, token->find('_', 3) - 3), [](const auto&) {});
    return std::move(written).error().in("the first token");
  }
  log.say(Log::Level::notice,
          fmt::format("start the first admin's token is in {}: bulkhead login takes it; delete the file then",
                      file.string()));
  return ok_status();
}

}  // namespace

Status run(const Config& config, const control::Settings& given) {
  (void)::mallopt(M_MMAP_THRESHOLD, own_mapping);  // refused only for a value out of range
  Log log;
  control::Settings settings = given;
  if (!config.state.empty()) settings.state = config.state;
  if (!config.node_file.empty()) settings.node_file = config.node_file;
  if (settings.state.empty()) settings.state = "/var/lib/bulkhead";
  BH_CHECK(make_folder(settings.state, 0700));

  http::Settings web;
  BH_TRY(web.inherited, listen_fds());
  bool tcp_given = false, local_given = false;
  for (const int fd : web.inherited) (is_local(fd) ? local_given : tcp_given) = true;
  if (!local_given && !config.socket.empty()) {
    web.socket = config.socket;
    BH_CHECK(make_folder(std::filesystem::path(config.socket).parent_path(), 0755));
  }
  if (!tcp_given && !config.listen.empty()) {
    BH_TRY(const auto listen, parse_listen(config.listen));
    web.listen = http::Listen{.address = listen.first, .port = listen.second};
  }
  if (tcp_given || web.listen) {
    http::Tls tls{
        .certificate_file = config.certificate, .key_file = config.key, .client_ca_file = config.client_ca};
    if (tls.certificate_file.empty()) {
      tls.certificate_file = settings.state / "serve.crt";
      tls.key_file = settings.state / "serve.key";
      auto made = http::ensure_certificate(tls.certificate_file, tls.key_file, host_names(config));
      if (!made.ok()) return std::move(made).error();
      log.say(Log::Level::notice, fmt::format("start certificate={} sha256={}", tls.certificate_file, *made));
    }
    web.tls = tls;
  }
  web.limits.body = config.body;
  web.limits.connections = config.connections;
  web.limits.connections_of_one = config.connections_of_one;

  // Sockets first: a port that is taken is said before anything is touched, and who comes early waits.
  std::unique_ptr<App> app;
  BH_TRY(auto server,
         http::Server::bind(web, [&app](http::Request request, std::shared_ptr<http::Reply> reply) {
           app->handle(std::move(request), std::move(reply));
         }));
  notify("STATUS=reading the book and the host");
  std::unique_ptr<monitor::Monitor> monitor;
  std::unique_ptr<incidents::Watcher> watcher;
  std::atomic<incidents::Watcher*> ears{nullptr};
  if (config.telemetry) {
    monitor = std::make_unique<monitor::Monitor>(
        sample::Settings{.library = settings.access.nvml_library,
                         .tick_ms = static_cast<unsigned>(config.sample_every.count()),
                         .root = settings.access.root.string()});
    settings.let_go = [&monitor, &ears](bool away) {
      incidents::Watcher* const listener = ears;
      if (away) {
        const bool deaf = listener == nullptr || listener->rest(let_go_ms);
        return monitor->rest(let_go_ms) && deaf;
      }
      monitor->resume();
      if (listener != nullptr) listener->resume();
      return true;
    };
  }
  BH_TRY(auto control, control::Control::start(settings));
  std::unique_ptr<Telemetry> telemetry;
  if (monitor) telemetry = std::make_unique<Telemetry>(*monitor, *control, log);
  app = std::make_unique<App>(config, *control, settings.state, log, telemetry.get());
  app->serves(*server);
  std::unique_ptr<Rest> rest;
  if (monitor) {
    rest = std::make_unique<Rest>(settings.let_go, *control, log);
    app->rests(rest.get());
  }
  BH_CHECK(write_first_token(*control, settings.state, log));
  // After telemetry in the file, before it in the end: a beat must find it.
  std::unique_ptr<protect::Guardian> guardian;
  if (telemetry) {
    guardian = std::make_unique<protect::Guardian>(
        *control, protect::Guardian::Settings{
                      .access = settings.access, .state = settings.state, .node_file = settings.node_file});
    telemetry->add("protection", [&guardian](const auto& gpus, const auto& leases, WallTime wall,
                                             std::uint64_t now) { guardian->step(gpus, leases, wall, now); });
    app->guards(guardian.get());
  }
  std::unique_ptr<meter::Meter> meter;
  if (telemetry) {
    auto opened = meter::Meter::open(settings.state, {.root = settings.access.root});
    if (!opened.ok()) {  // tenants are served all the same
      log.say(Log::Level::error, fmt::format("usage nothing is counted: {}", opened.error().message()));
    } else {
      meter = std::move(opened).value();
      telemetry->add("usage", [&meter, &log, root = settings.access.root](
                                  const auto& gpus, const auto& leases, WallTime wall, std::uint64_t now) {
        const auto done = meter->step(gpus, leases, wall, now, meter::shares_now(root, leases));
        if (!done.ok())
          log.say(Log::Level::error, fmt::format("usage {}", value(done.error().message(), 1000)));
      });
    }
  }
  // What the kernel and the driver tell of, and what is done about it.
  incidents::Owners owners;
  std::unique_ptr<heal::Healer> healer;
  std::optional<Tidings> tidings;
  if (telemetry) {
    watcher = std::make_unique<incidents::Watcher>(incidents::Watcher::Settings{
        .root = settings.access.root,
        .state = settings.state,
        .nvml_library = settings.access.nvml_library,
        .name = [&owners, &control](diagnose::Evidence& one) { owners.name(one, *control->now()); },
        .fabric_unit = heal::fabric_unit(settings.node_file)});
    ears = watcher.get();
    healer = std::make_unique<heal::Healer>(
        *control,
        heal::Healer::Place{.access = settings.access,
                            .state = settings.state,
                            .node_file = settings.node_file,
                            .let_go = settings.let_go,
                            .grace_ms = static_cast<unsigned>(settings.grace.count())},
        [&watcher, &log](const std::string& incident, const std::string& why) {
          (void)watcher->close(incident, why, wall_now());
          log.say(Log::Level::notice,
                  fmt::format("healed incident={} {}", value(incident, 100), value(why, 500)));
        });
    tidings.emplace(*control);
    telemetry->add("healing", [&](const auto& gpus, const auto& leases, WallTime wall, std::uint64_t now) {
      owners.look(settings.access.root, leases, now);
      const auto open = watcher->open(wall);
      tidings->step(*open, leases);
      healer->step(*open, gpus, leases, wall);
    });
    app->hears(watcher.get());
    app->heals(healer.get());
  }
  if (telemetry) telemetry->begin();

  const auto dog = watchdog();
  std::uint64_t fed = 0;
  std::atomic<bool> again{false};
  server->every(turn_period, [&] {
    app->turn();
    if (again.exchange(false)) {
      notify(fmt::format("RELOADING=1\nMONOTONIC_USEC={}", monotonic_ns() / 1000));
      if (const auto done = server->reload(); done.ok())
        log.say(Log::Level::notice, "reload certificates: read again");
      else
        log.say(Log::Level::error, fmt::format("reload {}: the old ones stay", done.error().message()));
      if (guardian) guardian->reload();
      if (healer) healer->reload();
      if (!settings.node_file.empty())
        control->reload({.user = "bulkhead", .role = access::Role::admin, .from = "SIGHUP"},
                        [&log](const control::Answer<bool>& answer) {
                          if (const auto* refusal = std::get_if<control::Refusal>(&answer))
                            log.say(Log::Level::error,
                                    fmt::format("reload {}: the old one stays", value(refusal->what, 2000)));
                          else
                            log.say(Log::Level::notice, "reload node file: read again");
                        });
      if (!config.file.empty()) {
        const auto text = read_file(config.file, 1U << 20U);
        auto parsed = text.ok() ? parse(*text) : std::variant<Config, std::vector<Mistake>>();
        if (!text.ok()) {
          log.say(Log::Level::error, fmt::format("reload {}: as it was", text.error().message()));
        } else if (const auto* mistakes = std::get_if<std::vector<Mistake>>(&parsed)) {
          const std::string told = render(*mistakes, config.file.string());
          for (const auto line : split_lines(told))
            log.say(Log::Level::error, fmt::format("reload {}", line));
        } else {
          app->reload(std::get<Config>(parsed));
          log.say(Log::Level::notice,
                  fmt::format("reload {}: local, requests_per_second, streams, access_log "
                              "taken; the rest at the next start",
                              config.file.string()));
        }
      }
      notify("READY=1");
    }
    const std::uint64_t now = monotonic_ns();
    if (dog && app->turning() && now - fed >= static_cast<std::uint64_t>(dog->count()) * 1000 / 4) {
      fed = now;
      notify("WATCHDOG=1");
    }
  });

  {
    const Signals signals([&](int number) {
      if (number == SIGHUP) {
        again = true;
        return;
      }
      log.say(Log::Level::notice,
              fmt::format("end signal={}: no new connections, requests under way get {} ms", number,
                          config.grace.count()));
      app->draining();
      notify("STOPPING=1\nSTATUS=ending");
      server->stop(config.grace);
    });
    std::string where = web.socket.empty() ? "" : web.socket;
    if (web.listen)
      where += fmt::format("{}{}:{}", where.empty() ? "" : " ", web.listen->address, server->port());
    if (!web.inherited.empty())
      where += fmt::format("{}{} sockets of systemd", where.empty() ? "" : " ", web.inherited.size());
    log.say(Log::Level::notice, fmt::format("start listening={}", value(where)));
    notify(fmt::format("READY=1\nSTATUS=serving on {}", where));
    server->run();
  }
  // Who still waits is answered by the app, the loop finishes its batch, and the server goes last: late
  // answers have somewhere to fall.
  app->end();
  if (rest) rest->end();  // whoever waits for its turn in the driver gets it before the loop ends
  if (telemetry) telemetry->end();
  app->heals(nullptr);
  app->hears(nullptr);
  healer.reset();
  if (watcher) watcher->end();
  meter.reset();
  app->guards(nullptr);
  guardian.reset();
  control.reset();
  app.reset();
  log.say(Log::Level::notice, "end done");
  return ok_status();
}

}  // namespace bulkhead::serve
