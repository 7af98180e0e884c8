#include <fcntl.h>
#include <fmt/format.h>
#include <grp.h>
#include <linux/memfd.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>

#include "base/clock.hpp"
#include "base/text.hpp"
#include "edge/seccomp/seccomp.hpp"
#include "engine/share/arbiter.hpp"

namespace bulkhead::share {

namespace fs = std::filesystem;

namespace {

constexpr int arbiter_restarts =
    20;  // in a row without a second between them: then something is wrong for good

struct Account {
  uid_t uid = 0;
  gid_t gid = 0;
  std::string name = {};
};

Result<std::optional<Account>> account_of(const std::string& user) {
  if (user.empty()) return std::optional<Account>();
  errno = 0;
  const passwd* found = ::getpwnam(user.c_str());
  if (found == nullptr) {
    if (errno != 0 && errno != ENOENT) return errno_error(fmt::format("look up user {}", user), errno);
    return Error(Errc::not_found, fmt::format("no user {}", user), "see `getent passwd`");
  }
  return std::optional<Account>(Account{found->pw_uid, found->pw_gid, user});
}

// The page, as a memfd of fixed size that nobody can shrink under the other's feet.
struct Shared {
  UniqueFd fd;
  void* memory = nullptr;
};
Result<Shared> shared_memory(const char* name, std::size_t bytes) {
  Shared out;
  out.fd.reset(static_cast<int>(::syscall(SYS_memfd_create, name, MFD_CLOEXEC | MFD_ALLOW_SEALING)));
  if (!out.fd) return errno_error("memfd_create", errno);
  if (::ftruncate(out.fd.get(), static_cast<off_t>(bytes)) != 0)
    return errno_error("size the shared page", errno);
  if (::fcntl(out.fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    return errno_error("seal the shared page", errno);
  out.memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, out.fd.get(), 0);
  if (out.memory == MAP_FAILED) return errno_error("map the shared page", errno);
  return out;
}

// What the child does between fork and exec: async-signal-safe calls only.
struct Child {
  const char* const* argv;
  const char* const* environment;
  const char* program;  // resolved path
  int socket;           // sends the listener; gets a byte when the arbiter is there
  int failed;           // close-on-exec: errno of what failed
  int page;             // inherited by the guard; -1: none
  bool listen;
  const Account* account;
};

[[noreturn]] void child_main(const Child& child) {
  const auto give_up = [&](int err) {
    (void)!::write(child.failed, &err, sizeof err);
    ::_exit(127);
  };
  for (const int number : {SIGINT, SIGQUIT, SIGTERM, SIGHUP, SIGCHLD, SIGPIPE}) ::signal(number, SIG_DFL);
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  if (child.listen) {
    const auto installed = seccomp::install();
    if (installed.listener < 0) give_up(installed.error);
    if (const int err = seccomp::send_fd(child.socket, installed.listener); err != 0) give_up(-err);
    ::close(installed.listener);
  }
  char go = 0;
  if (::read(child.socket, &go, 1) != 1) ::_exit(127);
  if (child.account != nullptr) {
    if (::initgroups(child.account->name.c_str(), child.account->gid) != 0 ||
        ::setgid(child.account->gid) != 0 || ::setuid(child.account->uid) != 0)
      give_up(errno);
  }
  if (child.page >= 0 && ::fcntl(child.page, F_SETFD, 0) != 0) give_up(errno);
  ::execve(child.program, const_cast<char* const*>(child.argv), const_cast<char* const*>(child.environment));
  give_up(errno);
  ::_exit(127);
}

// execvp's search, done before the fork so that a mistyped name fails with words.
Result<std::string> find_program(const std::string& name) {
  const auto usable = [](const std::string& path) {
    struct stat found {};
    return ::stat(path.c_str(), &found) == 0 && S_ISREG(found.st_mode) && ::access(path.c_str(), X_OK) == 0;
  };
  if (name.find('/') != std::string::npos) {
    if (usable(name)) return name;
    return Error(Errc::not_found, fmt::format("{}: no such program, or not executable", name));
  }
  const char* path = std::getenv("PATH");
  for (const auto& dir : split(path != nullptr ? path : "/usr/local/bin:/usr/bin:/bin", ':')) {
    const auto full = fmt::format("{}/{}", dir.empty() ? "." : dir, name);
    if (usable(full)) return full;
  }
  return Error(Errc::not_found, fmt::format("{}: not found in PATH", name),
               "put the program after --, with its path");
}

std::vector<std::string> environment_for(const Run& request, int page) {
  std::vector<std::string> out;
  std::string preload;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view variable(*entry);
    if (!request.asked.gpu.empty() && variable.starts_with("CUDA_VISIBLE_DEVICES=")) continue;
    if (variable.starts_with("LD_PRELOAD=")) {
      preload = variable.substr(11);
      continue;
    }
    out.emplace_back(variable);
  }
  if (!request.asked.gpu.empty()) out.push_back("CUDA_VISIBLE_DEVICES=" + request.asked.gpu);
  if (request.guard) {
    out.push_back(fmt::format("{}={}", guard::wire_environment, page));
    // For children of programs that close what they do not know.
    out.push_back(fmt::format("{}=/proc/{}/fd/{}", guard::wire_path_environment, ::getpid(), page));
    preload = preload.empty() ? request.guard_library : request.guard_library + ":" + preload;
  }
  if (!preload.empty()) out.push_back("LD_PRELOAD=" + preload);
  return out;
}

std::vector<const char*> pointers(const std::vector<std::string>& words) {
  std::vector<const char*> out;
  for (const auto& word : words) out.push_back(word.c_str());
  out.push_back(nullptr);
  return out;
}

// The GPU's MPS server, started when it is not there. Its clients share one context on the GPU: more
// throughput, and one client's fault ends the others (CUDA MPS manual, "Memory protection and error
// containment").
Result<std::vector<std::string>> join_mps(const Place& place, const Asked& asked) {
  const auto dir = place.run_dir() / ("mps-" + asked.gpu);
  std::error_code failed;
  fs::create_directories(dir / "log", failed);
  if (failed) return errno_error(fmt::format("make {}", dir.string()), failed.value());
  BH_TRY(const auto control, find_program("nvidia-cuda-mps-control"));
  const std::vector<std::string> words = {"CUDA_MPS_PIPE_DIRECTORY=" + dir.string(),
                                          "CUDA_MPS_LOG_DIRECTORY=" + (dir / "log").string(),
                                          "CUDA_VISIBLE_DEVICES=" + asked.gpu};
  if (!fs::exists(dir / "control")) {  // the control daemon's pipe
    const auto environment = pointers(words);
    const std::vector<std::string> command = {control, "-d"};
    const auto argv = pointers(command);
    const pid_t pid = ::fork();
    if (pid < 0) return errno_error("fork", errno);
    if (pid == 0) {
      ::execve(control.c_str(), const_cast<char* const*>(argv.data()),
               const_cast<char* const*>(environment.data()));
      ::_exit(127);
    }
    int status = 0;
    if (::waitpid(pid, &status, 0) != pid || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
      return Error(Errc::unavailable, fmt::format("{} -d did not start", control),
                   fmt::format("its log: {}", (dir / "log").string()));
  }
  std::vector<std::string> out = {
      words[0], words[1], fmt::format("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE={}", std::min(asked.weight, 100U))};
  if (asked.memory)
    out.push_back(fmt::format("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0={}M", to_mebibytes(*asked.memory)));
  return out;
}

}  // namespace

Result<int> run(const Place& place, Run request) {
  BH_TRY(const auto account, account_of(request.user));
  BH_TRY(const auto program, find_program(request.asked.command.front()));
  request.asked.id = static_cast<std::uint64_t>(::getpid());
  const bool listen = !request.guard && !request.asked.mps;
  request.asked.held = listen;
  if (request.asked.name.empty())
    request.asked.name =
        printable(fmt::format("{}-{}", fs::path(program).filename().string(), ::getpid()), 64);
  BH_TRY(auto entry, Entry::enter(place, request.asked));

  auto started = [&]() -> Result<int> {
    BH_TRY(const auto page_memory, shared_memory("bulkhead-tenant", sizeof(guard::Page)));
    auto* page = new (page_memory.memory) guard::Page{};
    page->magic = guard::wire_magic;
    page->version = guard::wire_version;
    page->tenant = request.asked.id;
    for (auto& cap : page->cap) cap.store(request.asked.memory ? request.asked.memory->count : guard::no_cap);
    page->authority.store(
        static_cast<std::uint32_t>(request.guard ? guard::Authority::guard : guard::Authority::hold));
    BH_TRY(const auto inflight, hold::make_inflight());

    int sockets[2], failed[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) != 0)
      return errno_error("socketpair", errno);
    UniqueFd ours(sockets[0]), theirs(sockets[1]);
    if (::pipe2(failed, O_CLOEXEC) != 0) return errno_error("pipe", errno);
    UniqueFd failed_read(failed[0]), failed_write(failed[1]);

    auto words = environment_for(request, page_memory.fd.get());
    if (request.asked.mps) {
      BH_TRY(auto more, join_mps(place, request.asked));
      words.insert(words.end(), more.begin(), more.end());
    }
    const auto environment = pointers(words);
    const auto argv = pointers(request.asked.command);
    const Child child{.argv = argv.data(),
                      .environment = environment.data(),
                      .program = program.c_str(),
                      .socket = theirs.get(),
                      .failed = failed_write.get(),
                      .page = request.guard ? page_memory.fd.get() : -1,
                      .listen = listen,
                      .account = account ? &*account : nullptr};
    // The terminal's signals are the program's business; the launcher lives until it has its exit code.
    for (const int number : {SIGINT, SIGQUIT}) ::signal(number, SIG_IGN);
    const pid_t tenant = ::fork();
    if (tenant < 0) return errno_error("fork", errno);
    if (tenant == 0) child_main(child);
    UniqueFd tenant_fd(static_cast<int>(::syscall(SYS_pidfd_open, tenant, 0)));
    theirs.reset();
    failed_write.reset();

    const auto why_not = [&]() -> Error {
      int err = 0;
      const bool said = ::read(failed_read.get(), &err, sizeof err) == sizeof err;
      ::waitpid(tenant, nullptr, 0);
      if (!said) return Error(Errc::io, "the program ended before it started");
      auto error = errno_error(fmt::format("start {}", program), err);
      if (err == EPERM || err == EACCES)
        return std::move(error).with_hint("run as root, or with CAP_SYS_ADMIN");
      return error;
    };
    UniqueFd listener;
    if (listen) {
      listener.reset(seccomp::recv_fd(ours.get()));
      if (!listener) return why_not();
    }

    const auto start_arbiter = [&]() -> pid_t {
      const pid_t arbiter = ::fork();
      if (arbiter != 0) return arbiter;
      ::setsid();
      for (const int number : {SIGINT, SIGQUIT, SIGHUP, SIGTERM, SIGPIPE}) ::signal(number, SIG_IGN);
      const int nowhere = ::open("/dev/null", O_RDWR | O_CLOEXEC);
      for (const int fd : {0, 1, 2}) ::dup2(nowhere, fd);
      ::prctl(PR_SET_NAME, "bulkhead-arbit", 0, 0, 0);
      ours.reset();
      failed_read.reset();
      Duty duty{.place = place,
                .asked = request.asked,
                .entry = Entry::adopt(place.run_dir(), request.asked.id,
                                      UniqueFd(::fcntl(entry.lock(), F_DUPFD_CLOEXEC, 3))),
                .listener = listener ? UniqueFd(::fcntl(listener.get(), F_DUPFD_CLOEXEC, 3)) : UniqueFd(),
                .page = page,
                .program = tenant,
                .program_gone = UniqueFd(::fcntl(tenant_fd.get(), F_DUPFD_CLOEXEC, 3))};
      listener.reset();
      if (listen) {
        const auto memory = hold::map_inflight(inflight.get());
        if (!memory.ok()) ::_exit(1);
        duty.inflight = *memory;
      }
      const auto done = arbitrate(std::move(duty));
      ::_exit(done.ok() ? 0 : 1);
    };
    pid_t arbiter = start_arbiter();
    if (arbiter < 0) {
      const int err = errno;
      ::kill(tenant, SIGKILL);
      ::waitpid(tenant, nullptr, 0);
      return errno_error("fork the arbiter", err);
    }
    if (::write(ours.get(), "g", 1) != 1) return why_not();

    // Waits for the program, and starts the arbiter again whenever it dies before the tenant does.
    int restarts = 0;
    std::uint64_t last_restart = 0;
    for (;;) {
      int status = 0;
      const pid_t ended = ::waitpid(-1, &status, 0);
      if (ended < 0 && errno == EINTR) continue;
      if (ended < 0) return errno_error("wait for the program", errno);
      if (ended == tenant) {
        int err = 0;
        if (::read(failed_read.get(), &err, sizeof err) == sizeof err) {
          auto error = errno_error(fmt::format("start {}", program), err);
          return error;
        }
        return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
      }
      if (ended == arbiter) {
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
          arbiter = -1;  // the tenant is gone: its exit code follows
          continue;
        }
        const auto now = monotonic_ns();
        restarts = now - last_restart < 1'000'000'000 ? restarts + 1 : 1;
        last_restart = now;
        if (restarts > arbiter_restarts) ::usleep(1'000'000);
        arbiter = start_arbiter();
      }
    }
  }();
  if (!started.ok()) entry.leave();
  return started;
}

}  // namespace bulkhead::share
