// `twin run`: a program inside the pretend machine.
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <system_error>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "twin/control/control.hpp"

namespace bulkhead::twin {

namespace fs = std::filesystem;

namespace {

// Why the child could not start, told to the parent through a close-on-exec pipe: an empty pipe is a started
// program.
struct Failure {
  int err;
  char what[200];
};

[[noreturn]] void give_up(int pipe, const std::string& what, int err) {
  Failure failure{};
  failure.err = err;
  std::strncpy(failure.what, what.c_str(), sizeof failure.what - 1);
  if (::write(pipe, &failure, sizeof failure) < 0) ::_exit(126);
  ::_exit(127);
}

bool bind(const fs::path& from, const fs::path& over) {
  return ::mount(from.c_str(), over.c_str(), nullptr, MS_BIND | MS_REC, nullptr) == 0;
}

// The twin's files over the real ones. Only what exists on both sides can be covered: /proc cannot grow
// entries, so /proc/driver is covered whole.
std::string cover(const fs::path& root) {
  if (::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return "make mounts private";
  for (const char* entry : {"driver", "devices", "modules", "cmdline", "meminfo", "cpuinfo", "iomem",
                            "interrupts", "version", "uptime", "sys/kernel/osrelease", "sys/kernel/hostname",
                            "sys/kernel/tainted", "sys/kernel/random/boot_id"}) {
    const fs::path over = fs::path("/proc") / entry;
    struct stat info {};
    if (::stat(over.c_str(), &info) != 0 || ::stat((root / "proc" / entry).c_str(), &info) != 0) continue;
    if (!bind(root / "proc" / entry, over)) return "mount over " + over.string();
  }
  // A /dev that may grow: an empty one, the real entries bound into it, the twin's beside them.
  char staging[] = "/tmp/bulkhead-dev-XXXXXX";
  if (::mkdtemp(staging) == nullptr) return "make a directory for /dev";
  if (::mount("tmpfs", staging, "tmpfs", MS_NOSUID, "mode=0755") != 0) return "mount a new /dev";
  const fs::path dev = staging;
  std::error_code failed;
  for (const auto& entry : fs::directory_iterator("/dev", failed)) {
    const fs::path to = dev / entry.path().filename();
    const std::string name = entry.path().filename().string();
    if (name.starts_with("nvidia")) continue;
    const auto kind = entry.symlink_status(failed).type();
    if (kind == fs::file_type::symlink) {
      fs::copy_symlink(entry.path(), to, failed);
    } else if (kind == fs::file_type::directory) {
      fs::create_directory(to, failed);
      if (!bind(entry.path(), to)) return "bind " + entry.path().string();
    } else {
      const UniqueFd made(::open(to.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
      if (!made || !bind(entry.path(), to)) return "bind " + entry.path().string();
    }
  }
  for (const auto& entry : fs::directory_iterator(root / "dev", failed)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("nvidia")) continue;
    const fs::path to = dev / name;
    if (entry.is_directory()) {
      fs::create_directory(to, failed);
    } else {
      const UniqueFd made(::open(to.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    }
    if (!bind(entry.path(), to)) return "bind " + entry.path().string();
  }
  if (::mount(staging, "/dev", nullptr, MS_MOVE, nullptr) != 0) return "put the new /dev in place";
  ::rmdir(staging);
  // systemctl and libsystemd look for /run/systemd/system and the manager's socket beside it.
  struct stat info {};
  if (::stat((root / "run/systemd").c_str(), &info) == 0) {
    if (::stat("/run/systemd", &info) != 0) fs::create_directories("/run/systemd", failed);
    if (!bind(root / "run/systemd", "/run/systemd")) return "mount over /run/systemd";
  }
  // Last: nothing above may look for itself in a /sys that is already the twin's.
  if (!bind(root / "sys", "/sys")) return "mount over /sys";
  return {};
}

// The twin's driver answers ioctl inside the program. Only for what `run` starts: in somebody's shell the
// loader would complain at every command once the twin is down, as it would here of a library that is not
// there. It takes a space or a colon for the end of a name.
std::string preload(const fs::path& directory) {
  std::error_code failed;
  const std::string device = (fs::absolute(directory, failed) / "lib/libbulkhead-twin-device.so").string();
  const char* already = std::getenv("LD_PRELOAD");
  const std::string before = already != nullptr ? already : "";
  if (!fs::exists(device, failed) || device.find_first_of(" :") != std::string::npos ||
      before.find(device) != std::string::npos) {
    return before;
  }
  return before.empty() ? device : before + ":" + device;
}

}  // namespace

std::vector<std::string> environment(const fs::path& directory) {
  std::error_code failed;
  const fs::path full = fs::absolute(directory, failed);
  const char* already = std::getenv("LD_LIBRARY_PATH");
  std::string library_path = (full / "lib").string();
  if (already != nullptr && *already != '\0') library_path += fmt::format(":{}", already);
  return {"BULKHEAD_TWIN=" + full.string(), "BULKHEAD_ROOT=" + (full / "root").string(),
          "BULKHEAD_NVML=" + (full / "lib/libnvidia-ml.so.1").string(), "LD_LIBRARY_PATH=" + library_path};
}

Result<int> run(const fs::path& directory, const std::vector<std::string>& command) {
  if (command.empty())
    return Error(Errc::invalid, "no program to run", "bulkhead twin run PROFILE -- nvidia-smi -L");
  BH_TRY(const auto checked, open_twin(directory));
  std::error_code failed;
  const fs::path root = fs::absolute(directory / "root", failed);
  auto extra = environment(directory);
  if (const auto preloaded = preload(directory); !preloaded.empty())
    extra.push_back("LD_PRELOAD=" + preloaded);
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return errno_error("pipe", errno);
  UniqueFd reader(ends[0]), writer(ends[1]);
  std::fflush(nullptr);
  // Who ends us ends the program: a signal to this process alone is passed on.
  sigset_t heard, before;
  ::sigemptyset(&heard);
  for (const int one : {SIGTERM, SIGHUP, SIGCHLD}) ::sigaddset(&heard, one);
  ::pthread_sigmask(SIG_BLOCK, &heard, &before);
  const pid_t child = ::fork();
  if (child < 0) {
    const int why = errno;
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return errno_error("fork", why);
  }
  if (child == 0) {
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (::geteuid() == 0) {
      if (::unshare(CLONE_NEWNS) != 0) {
        // A container without the right to make namespaces: the library path still serves everything that
        // uses NVML.
        if (errno != EPERM) give_up(writer.get(), "make a mount namespace", errno);
      } else if (const auto what = cover(root); !what.empty()) {
        give_up(writer.get(), what, errno);
      }
    }
    for (const auto& entry : extra) {
      const auto equals = entry.find('=');
      ::setenv(entry.substr(0, equals).c_str(), entry.substr(equals + 1).c_str(), 1);
    }
    std::vector<char*> argv;
    for (const auto& word : command)
      argv.push_back(const_cast<char*>(word.c_str()));  // execvp's old signature
    argv.push_back(nullptr);
    ::execvp(argv[0], argv.data());
    give_up(writer.get(), command[0], errno);
  }
  writer.reset();
  // The terminal's interrupt goes to the whole foreground group: the program decides, we wait for it.
  struct sigaction ignore {
  }, before_int{}, before_quit{};
  ignore.sa_handler = SIG_IGN;
  ::sigaction(SIGINT, &ignore, &before_int);
  ::sigaction(SIGQUIT, &ignore, &before_quit);
  Failure failure{};
  const auto got = ::read(reader.get(), &failure, sizeof failure);
  int wait_status = 0;
  for (pid_t ended = 0; ended == 0 || (ended < 0 && errno == EINTR);) {
    ended = ::waitpid(child, &wait_status, WNOHANG);
    if (ended != 0) continue;
    const timespec most{.tv_sec = 0, .tv_nsec = 200'000'000};
    if (const int told = ::sigtimedwait(&heard, nullptr, &most); told == SIGTERM || told == SIGHUP)
      ::kill(child, told);
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  ::sigaction(SIGINT, &before_int, nullptr);
  ::sigaction(SIGQUIT, &before_quit, nullptr);
  if (got == static_cast<ssize_t>(sizeof failure))
    return errno_error(fmt::format("run {}", failure.what), failure.err);
  if (WIFSIGNALED(wait_status)) return 128 + WTERMSIG(wait_status);
  return WEXITSTATUS(wait_status);
}

}  // namespace bulkhead::twin
