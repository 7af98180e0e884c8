#include <fcntl.h>
#include <fmt/format.h>
#include <grp.h>
#include <linux/memfd.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
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
constexpr std::uint64_t last_wait_ns = 2'000'000'000;  // for the driver to take back what the program had

struct Account {
  uid_t uid = 0;
  gid_t gid = 0;
  std::string name = {}, home = {}, shell = {};
  std::vector<gid_t> groups = {};
};

Result<std::optional<Account>> account_of(const std::string& user) {
  if (user.empty()) return std::optional<Account>();
  errno = 0;
  const passwd* found = ::getpwnam(user.c_str());
  if (found == nullptr) {
    if (errno != 0 && errno != ENOENT) return errno_error(fmt::format("look up user {}", user), errno);
    return Error(Errc::not_found, fmt::format("no user {}", user), "see `getent passwd`");
  }
  Account account{.uid = found->pw_uid,
                  .gid = found->pw_gid,
                  .name = found->pw_name,
                  .home = found->pw_dir,
                  .shell = found->pw_shell};
  // Here and not in the child: what answers (nscd, sssd) uses shared mappings, which stop at the listener.
  int count = 64;
  account.groups.resize(static_cast<std::size_t>(count));
  while (::getgrouplist(user.c_str(), account.gid, account.groups.data(), &count) < 0) {
    if (count <= static_cast<int>(account.groups.size()))
      return Error(Errc::io, fmt::format("look up the groups of user {}", user), "see `id USER`");
    account.groups.resize(static_cast<std::size_t>(count));
  }
  account.groups.resize(static_cast<std::size_t>(count));
  return std::optional<Account>(std::move(account));
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

// The launcher's own signals: what a person or `timeout`, systemd, a batch system sends to it is meant for
// the program. What comes from the terminal (si_code > 0) the program has already, in its process group.
constexpr int forwarded_signals[] = {SIGINT, SIGQUIT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2};
int forward_to = -1;  // pidfd of the program
pid_t forward_pid = -1;
void forward(int number, siginfo_t* info, void* /*context*/) {
  if (info->si_code > 0 || info->si_pid == forward_pid) return;  // its own `kill 0` would go round for ever
  const int saved = errno;
  ::syscall(SYS_pidfd_send_signal, forward_to, number, nullptr, 0);
  errno = saved;
}

// While it lives a program can be run; afterwards the signals are as they were.
class Signals {
 public:
  Signals() {
    sigset_t block;
    ::sigemptyset(&block);
    for (const int number : forwarded_signals) ::sigaddset(&block, number);
    ::sigprocmask(SIG_BLOCK, &block, &mask_);
    // Inherited as ignored (some service managers do) the exit code would be lost.
    struct sigaction normal {};
    normal.sa_handler = SIG_DFL;
    ::sigaction(SIGCHLD, &normal, &child_);
  }
  // Once the program is forked. What was ignored (nohup, a shell's background job) stays ignored by both.
  void start(pid_t program, int pidfd) {
    forward_pid = program;
    forward_to = pidfd;
    struct sigaction ours {};
    ours.sa_sigaction = forward;
    ours.sa_flags = SA_SIGINFO;
    for (std::size_t i = 0; i < std::size(forwarded_signals); ++i) {
      ::sigaction(forwarded_signals[i], nullptr, &before_[i]);
      if (before_[i].sa_handler != SIG_IGN) ::sigaction(forwarded_signals[i], &ours, nullptr);
    }
    started_ = true;
    ::sigprocmask(SIG_SETMASK, &mask_, nullptr);
  }
  // In the child, before exec: async-signal-safe.
  void give_back() const {
    ::sigaction(SIGCHLD, &child_, nullptr);
    ::sigprocmask(SIG_SETMASK, &mask_, nullptr);
  }
  ~Signals() {
    for (std::size_t i = 0; started_ && i < std::size(forwarded_signals); ++i)
      ::sigaction(forwarded_signals[i], &before_[i], nullptr);
    forward_to = forward_pid = -1;
    give_back();
  }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;

 private:
  sigset_t mask_;
  struct sigaction child_ {
  }, before_[std::size(forwarded_signals)] = {};
  bool started_ = false;
};

// What the child does between fork and exec: async-signal-safe calls only.
struct Child {
  const char* const* argv;
  const char* const* environment;
  const char* program;  // resolved path
  int socket;           // sends the listener; gets a byte when the arbiter is there
  int launcher_socket;  // the other end: while it is open here, the launcher's death goes unnoticed
  int failed;           // close-on-exec: what failed
  int page;             // inherited by the guard; -1: none
  bool listen;
  const Account* account;
  const Signals* signals;
};
enum class Step : int { listen, user, exec };
struct Failure {
  Step step;
  int err;
};

[[noreturn]] void child_main(const Child& child) {
  const auto give_up = [&](Step step, int err) {
    const Failure failure{step, err};
    (void)!::write(child.failed, &failure, sizeof failure);
    ::_exit(127);
  };
  ::close(child.launcher_socket);
  child.signals->give_back();
  if (child.listen) {
    const auto installed = seccomp::install();
    if (installed.listener < 0) give_up(Step::listen, installed.error);
    if (const int err = seccomp::send_fd(child.socket, installed.listener); err != 0)
      give_up(Step::listen, -err);
    ::close(installed.listener);
  }
  char go = 0;
  ssize_t got = 0;
  while ((got = ::read(child.socket, &go, 1)) < 0 && errno == EINTR) {
  }
  if (got != 1) ::_exit(127);
  if (child.account != nullptr) {
    if (::setgroups(child.account->groups.size(), child.account->groups.data()) != 0 ||
        ::setgid(child.account->gid) != 0 || ::setuid(child.account->uid) != 0)
      give_up(Step::user, errno);
  }
  if (child.page >= 0 && ::fcntl(child.page, F_SETFD, 0) != 0) give_up(Step::exec, errno);
  ::execve(child.program, const_cast<char* const*>(child.argv), const_cast<char* const*>(child.environment));
  give_up(Step::exec, errno);
  ::_exit(127);
}

Error failure_error(const Failure& failure, const std::string& program, const std::string& user) {
  const int err = failure.err;
  if (failure.step == Step::listen) {
    auto error = errno_error(fmt::format("hold {} from outside (seccomp listener)", program), err);
    return std::move(error).with_hint(
        err == EBUSY ? "something listens already: a tenant in a tenant, or a container's; use --guard"
        : err == EPERM || err == EACCES ? "run as root, or with CAP_SYS_ADMIN"
                                        : "this kernel has no such listener (Linux 5.5); use --guard");
  }
  if (failure.step == Step::user)
    return errno_error(fmt::format("become user {}", user), err).with_hint("run as root");
  auto error = errno_error(fmt::format("start {}", program), err);
  if (err == ENOEXEC) return std::move(error).with_hint("a script needs #!INTERPRETER as its first line");
  if (err == ENOENT) return std::move(error).with_hint("its interpreter or loader is missing");
  if (err == EACCES && !user.empty())
    return std::move(error).with_hint(fmt::format("may {} read and execute it?", user));
  if (err == E2BIG) return std::move(error).with_hint("shorter arguments, or a smaller environment");
  return error;
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

// `name=value`, in the place of what was there: programs take the first.
void set_variable(std::vector<std::string>& environment, const std::string& name, const std::string& value) {
  std::erase_if(environment, [&](const std::string& one) { return one.starts_with(name + "="); });
  environment.push_back(name + "=" + value);
}

std::vector<std::string> environment_for(const Run& request, const Account* account, int page) {
  std::vector<std::string> out;
  std::string preload;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view variable(*entry);
    if (variable.starts_with("LD_PRELOAD=")) {
      preload = variable.substr(11);
      continue;
    }
    out.emplace_back(variable);
  }
  if (!request.asked.gpu.empty()) set_variable(out, "CUDA_VISIBLE_DEVICES", request.asked.gpu);
  if (account != nullptr) {
    set_variable(out, "HOME", account->home);
    set_variable(out, "USER", account->name);
    set_variable(out, "LOGNAME", account->name);
    set_variable(out, "SHELL", account->shell);
    std::erase_if(out, [](const std::string& one) { return one.starts_with("XDG_RUNTIME_DIR="); });
  }
  if (request.guard) {
    set_variable(out, guard::wire_environment, std::to_string(page));
    // For children of programs that close what they do not know.
    set_variable(out, guard::wire_path_environment, fmt::format("/proc/{}/fd/{}", ::getpid(), page));
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

// As it is printed, and no id: `share set` takes either.
Status check_name(const std::string& name) {
  if (name.size() <= 64 && printable(name, 64) == name && !parse_u64(name)) return ok_status();
  return Error(Errc::invalid, fmt::format("--name {}: no name for a tenant", printable(name, 64)),
               "at most 64 printable characters, not a number");
}

// Others' descriptors that the caller had open (a pipe, a lock): a program that ends must end them too.
void close_inherited() {
  const auto open = list_directory("/proc/self/fd");
  if (!open.ok()) return;
  for (const auto& name : *open) {
    const auto fd = parse_u64(name);
    if (!fd || *fd < 3) continue;
    const int flags = ::fcntl(static_cast<int>(*fd), F_GETFD);
    if (flags >= 0 && (flags & FD_CLOEXEC) == 0) ::close(static_cast<int>(*fd));
  }
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
        fmt::format("{}-{}", printable(fs::path(program).filename().string(), 48), ::getpid());
  BH_CHECK(check_name(request.asked.name));
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
    int last[2];  // an arbiter's last words
    if (::pipe2(last, O_CLOEXEC | O_NONBLOCK) != 0) return errno_error("pipe", errno);
    const UniqueFd words_read(last[0]), words_write(last[1]);

    auto words = environment_for(request, account ? &*account : nullptr, page_memory.fd.get());
    if (request.asked.mps) {
      BH_TRY(auto more, join_mps(place, request.asked));
      for (const auto& word : more) {
        const auto equals = word.find('=');
        set_variable(words, word.substr(0, equals), word.substr(equals + 1));
      }
    }
    const auto environment = pointers(words);
    const auto argv = pointers(request.asked.command);
    Signals signals;
    const Child child{.argv = argv.data(),
                      .environment = environment.data(),
                      .program = program.c_str(),
                      .socket = theirs.get(),
                      .launcher_socket = ours.get(),
                      .failed = failed_write.get(),
                      .page = request.guard ? page_memory.fd.get() : -1,
                      .listen = listen,
                      .account = account ? &*account : nullptr,
                      .signals = &signals};
    const pid_t tenant = ::fork();
    if (tenant < 0) return errno_error("fork", errno);
    if (tenant == 0) child_main(child);
    const auto give_up = [&](const char* what, int err) -> Error {
      ::kill(tenant, SIGKILL);
      while (::waitpid(tenant, nullptr, 0) < 0 && errno == EINTR) {
      }
      return errno_error(what, err);
    };
    UniqueFd tenant_fd(static_cast<int>(::syscall(SYS_pidfd_open, tenant, 0)));
    if (!tenant_fd) return give_up("pidfd_open", errno);
    signals.start(tenant, tenant_fd.get());
    theirs.reset();
    failed_write.reset();

    const auto failure = [&]() -> std::optional<Error> {
      Failure said{};
      ssize_t got = 0;
      while ((got = ::read(failed_read.get(), &said, sizeof said)) < 0 && errno == EINTR) {
      }
      if (got != sizeof said) return std::nullopt;
      return failure_error(said, program, request.user);
    };
    const auto why_not = [&]() -> Error {
      auto error = failure();
      int status = 0;
      while (::waitpid(tenant, &status, 0) < 0 && errno == EINTR) {
      }
      if (error) return std::move(*error);
      if (WIFSIGNALED(status))
        return Error(Errc::io, fmt::format("signal {} before {} was started", WTERMSIG(status), program));
      return Error(Errc::io, fmt::format("{} ended before it was started", program), "run it again");
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
      for (const int number : forwarded_signals) ::signal(number, SIG_IGN);
      ::signal(SIGPIPE, SIG_IGN);
      close_inherited();
      // A descriptor or more for each process of the tenant.
      if (rlimit files{}; ::getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
        files.rlim_cur = files.rlim_max;
        (void)::setrlimit(RLIMIT_NOFILE, &files);
      }
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
      if (!done.ok()) {
        const auto& text = done.error().message();
        (void)!::write(words_write.get(), text.data(), std::min<std::size_t>(text.size(), 512));
      }
      ::_exit(done.ok() ? 0 : 1);
    };
    pid_t arbiter = start_arbiter();
    if (arbiter < 0) return give_up("fork the arbiter", errno);
    if (::send(ours.get(), "g", 1, MSG_NOSIGNAL) != 1) return why_not();

    const auto reap = [](pid_t pid, int& status, int flags) {
      pid_t got = 0;
      while ((got = ::waitpid(pid, &status, flags)) < 0 && errno == EINTR) {
      }
      return got;
    };
    // Waits for the program, and starts the arbiter again whenever it dies before the tenant does.
    int restarts = 0, status = 0;
    std::uint64_t last_restart = 0;
    std::string told;
    bool done = false;  // the arbiter: the tenant is gone
    for (;;) {
      if (arbiter < 0 && !done) {  // no process was to be had: the tenant waits, so try for ever
        ::usleep(100'000);
        arbiter = start_arbiter();
      }
      int how = 0;
      const pid_t ended = reap(-1, how, arbiter < 0 && !done ? WNOHANG : 0);
      if (ended < 0) return errno_error("wait for the program", errno);
      if (ended == tenant) {
        status = how;
        break;
      }
      if (ended != arbiter || ended == 0) continue;
      if (WIFEXITED(how) && WEXITSTATUS(how) == 0) {  // the program's exit code follows
        done = true;
        arbiter = -1;
        continue;
      }
      char text[512];
      if (const auto got = ::read(words_read.get(), text, sizeof text); got > 0) {
        auto why = printable({text, static_cast<std::size_t>(got)});
        if (why != told)
          std::fputs(fmt::format("bulkhead: the arbiter of {} ended and is started again: {}\n",
                                 request.asked.name, why)
                         .c_str(),
                     stderr);
        told = std::move(why);
      }
      const auto now = monotonic_ns();
      restarts = now - last_restart < 1'000'000'000 ? restarts + 1 : 1;
      last_restart = now;
      if (restarts > arbiter_restarts) ::usleep(1'000'000);
      arbiter = start_arbiter();
    }
    // With its last process the tenant's name and memory are free again when this returns. Processes that it
    // left behind keep their arbiter.
    pollfd under{.fd = listener.get(), .events = 0, .revents = 0};
    const bool nobody = !listen || (::poll(&under, 1, 0) == 1 && (under.revents & POLLHUP) != 0);
    int how = 0;
    if (!nobody) {
      if (!done && (arbiter < 0 || reap(arbiter, how, WNOHANG) == arbiter)) start_arbiter();
    } else if (!done) {
      bool left = arbiter < 0;
      const auto until = monotonic_ns() + last_wait_ns;
      while (!left && monotonic_ns() < until) {
        left = reap(arbiter, how, WNOHANG) == arbiter;
        if (!left) ::usleep(500);
      }
      if (left && !(WIFEXITED(how) && WEXITSTATUS(how) == 0 && arbiter >= 0)) entry.leave();
    }
    if (auto error = failure()) return std::move(*error);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  }();
  if (!started.ok()) entry.leave();
  return started;
}

}  // namespace bulkhead::share
