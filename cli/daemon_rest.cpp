#include "cli/daemon_rest.hpp"

#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <optional>
#include <string>

#include <fmt/format.h>

#include "api/v1/v1.hpp"
#include "base/text.hpp"
#include "cli/api.hpp"

namespace bulkhead::cli {

namespace {

constexpr int held_s = 15;  // without a word of ours the daemon goes on after that
constexpr int again_ms = 5'000;
constexpr unsigned end_ms = 2'000;
constexpr std::string_view no_daemon = "-";  // what the child says; empty: it rests; else why not

// Of this host and no other: what a login names may be another machine, and a twin's root is not this one's.
std::optional<std::string> local_daemon(const Context& context) {
  if (const char* named = std::getenv("BULKHEAD_URL");
      named != nullptr && std::string_view(named).starts_with("unix:"))
    return named;
  const auto socket = context.root / "run/bulkhead/api.sock";
  struct stat found {};
  if (::stat(socket.c_str(), &found) != 0 || !S_ISSOCK(found.st_mode)) return std::nullopt;
  return "unix:" + socket.string();
}

std::string ask(client::Client& daemon, const std::string& path) {
  const auto answer = daemon.call("PUT", path, Json{{"seconds", held_s}});
  if (!answer.ok()) {
    // A socket that nobody serves any more: the daemon is not there.
    return answer.error().code() == Errc::unavailable || answer.error().code() == Errc::not_found
               ? std::string(no_daemon)
               : answer.error().message();
  }
  if (answer->status >= 200 && answer->status < 300) return {};
  // One that samples nothing, or is too old to be asked: it holds nothing either, or did always.
  if (answer->status == 404 || answer->status == 405) return std::string(no_daemon);
  if (answer->status == 503 &&
      client::problem_error(*answer).message().find("nothing is sampled") != std::string::npos)
    return std::string(no_daemon);
  return client::problem_error(*answer).message();
}

[[noreturn]] void serve(const std::string& url, int alive, int answers) {
  ::prctl(PR_SET_NAME, "bh-rest");
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) (void)::signal(number, SIG_IGN);
  const std::string path =
      fmt::format("{}/telemetry/rests/command-{}", bulkhead::api::v1::prefix, api::fresh_key());
  std::string said;
  std::unique_ptr<client::Client> daemon;
  auto target = client::target(url);
  if (target.ok()) {
    if (auto made = client::Client::connect(std::move(*target)); made.ok())
      daemon = std::move(*made);
    else
      said = made.error().message();
  } else {
    said = target.error().message();
  }
  if (daemon) said = ask(*daemon, path);
  said.resize(std::min<std::size_t>(said.size(), 1024));
  (void)!::write(answers, said.c_str(), said.size() + 1);
  ::close(answers);
  if (daemon && said.empty()) {
    pollfd waits{alive, POLLIN, 0};
    while (::poll(&waits, 1, again_ms) == 0) (void)ask(*daemon, path);
    (void)daemon->call("DELETE", path, std::nullopt);
  }
  ::_exit(0);
}

}  // namespace

bool DaemonRest::somebody(const Context& context) { return local_daemon(context).has_value(); }

Result<std::unique_ptr<DaemonRest>> DaemonRest::begin(const Context& context) {
  const auto url = local_daemon(context);
  if (!url) return std::unique_ptr<DaemonRest>();
  int alive[2] = {-1, -1}, answers[2] = {-1, -1};
  if (::pipe2(alive, O_CLOEXEC) != 0) return errno_error("pipe", errno);
  UniqueFd alive_read(alive[0]), alive_write(alive[1]);
  if (::pipe2(answers, O_CLOEXEC) != 0) return errno_error("pipe", errno);
  UniqueFd answers_read(answers[0]), answers_write(answers[1]);
  const pid_t child = ::fork();
  if (child < 0) return errno_error("fork", errno);
  if (child == 0) {
    // Nothing of ours stays open in it: the journal's lock is not to outlive this process by a moment.
    ::dup2(alive_read.get(), 0);
    ::dup2(answers_write.get(), 1);
    (void)::syscall(SYS_close_range, 3U, ~0U, 0U);
    serve(*url, 0, 1);
  }
  auto made = std::unique_ptr<DaemonRest>(new DaemonRest(child, std::move(alive_write)));
  answers_write.reset();
  std::string said;
  char part[256];
  ssize_t got = 0;
  while ((got = ::read(answers_read.get(), part, sizeof part)) > 0 || (got < 0 && errno == EINTR))
    if (got > 0) said.append(part, static_cast<std::size_t>(got));
  if (said.empty()) return Error(Errc::io, "who was to ask the daemon ended without a word");
  said.pop_back();
  if (said == no_daemon) return std::unique_ptr<DaemonRest>();
  if (!said.empty())
    return Error(
        Errc::in_use,
        fmt::format("the daemon of this host does not let go of the driver: {}", printable(said, 500)),
        "try again in a moment, or stop it first: systemctl stop bulkhead");
  return made;
}

DaemonRest::~DaemonRest() {
  alive_.reset();
  for (unsigned waited = 0; waited < end_ms; waited += 5) {
    if (::waitpid(child_, nullptr, WNOHANG) != 0) return;
    ::usleep(5'000);
  }
}

}  // namespace bulkhead::cli
