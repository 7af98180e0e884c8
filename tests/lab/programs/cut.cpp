// lab_cut kill|end|stop|hold [row/]CALL[:PART] N COMMAND...: lets the command run until it, or a process it
// makes, enters its N-th system call CALL (a name of the table below; with PART only those on a file whose
// path has that in it count), and kills that process there, ends all of them, stops it or holds it. Exit: 137
// cut, else the command's. The kernel wakes the tracer at that call alone: a run costs what it costs without.
// (strace 6.1 injects nothing with --seccomp-bpf, and without it is ten times slower here.) With "stop" it
// prints "cut" and waits for ever; with "hold" until SIGUSR1, and then lets the command go on to its end.
// With row/ only the first of several such calls counts that this process makes with no other call of the
// table in between: of a transaction's pwrite64 each leaves what the one before left, a transaction that is
// not committed.
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr struct {
  const char* name;
  unsigned number;
} calls[] = {{"write", SYS_write},        {"pwrite64", SYS_pwrite64}, {"fdatasync", SYS_fdatasync},
             {"fsync", SYS_fsync},        {"rename", SYS_rename},     {"unlink", SYS_unlink},
             {"sendto", SYS_sendto},      {"ioctl", SYS_ioctl},       {"fchmod", SYS_fchmod},
             {"chown", SYS_chown},        {"chmod", SYS_chmod},       {"execve", SYS_execve},
             {"ftruncate", SYS_ftruncate}};

[[noreturn]] void run(unsigned number, bool all, char** command) {
  std::vector<sock_filter> code = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr))};
  for (const auto& one : calls) {
    if (!all && one.number != number) continue;
    code.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, one.number, 0, 1));
    code.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRACE));
  }
  code.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  const sock_fprog filter = {static_cast<unsigned short>(code.size()), code.data()};
  ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
  raise(SIGSTOP);  // until the tracer has set its options
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0) _exit(126);
  execvp(command[0], command);
  _exit(127);
}

unsigned call_of(pid_t who) {
  user_regs_struct registers{};
  return ptrace(PTRACE_GETREGS, who, nullptr, &registers) == 0 ? static_cast<unsigned>(registers.orig_rax)
                                                               : ~0U;
}

// The path behind the first argument of the call that `who` stands before.
std::string path_of(pid_t who) {
  user_regs_struct registers{};
  if (ptrace(PTRACE_GETREGS, who, nullptr, &registers) != 0) return {};
  const std::string link =
      "/proc/" + std::to_string(who) + "/fd/" + std::to_string(static_cast<int>(registers.rdi));
  char path[4096];
  const ssize_t size = readlink(link.c_str(), path, sizeof path);
  return size > 0 ? std::string(path, static_cast<std::size_t>(size)) : std::string();
}

void on_signal(int) {}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) return 64;
  const bool stop = std::strcmp(argv[1], "stop") == 0, hold = std::strcmp(argv[1], "hold") == 0,
             end = std::strcmp(argv[1], "end") == 0;
  const bool row = std::strncmp(argv[2], "row/", 4) == 0;
  const std::string asked = argv[2] + (row ? 4 : 0), call = asked.substr(0, asked.find(':'));
  const std::string part = call.size() < asked.size() ? asked.substr(call.size() + 1) : std::string();
  struct sigaction act {};
  act.sa_handler = on_signal;
  sigaction(SIGUSR1, &act, nullptr);  // ends a pause()
  const unsigned long at = std::strtoul(argv[3], nullptr, 10);
  unsigned number = ~0U;
  for (const auto& one : calls) {
    if (call == one.name) number = one.number;
  }
  if (number == ~0U) return 64;
  const pid_t child = fork();
  if (child == 0) run(number, row, argv + 4);
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) return 2;
  ptrace(PTRACE_SETOPTIONS, child, nullptr,
         PTRACE_O_TRACESECCOMP | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE |
             PTRACE_O_TRACEEXEC);
  ptrace(PTRACE_CONT, child, nullptr, nullptr);
  std::map<pid_t, unsigned long> made;
  std::map<pid_t, bool> in_row;
  bool cut = false;
  int code = 2;
  while (true) {
    const pid_t who = waitpid(-1, &status, __WALL);
    if (who < 0) break;  // all have ended
    if (WIFEXITED(status) || WIFSIGNALED(status)) {
      if (who == child) code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      if (who == child && hold) return code;  // what it left behind in the kernel is not waited for
      continue;
    }
    if (!WIFSTOPPED(status)) continue;
    long signal = WSTOPSIG(status);
    const int event = status >> 16;
    bool counts = event == PTRACE_EVENT_SECCOMP && !cut;
    if (counts && row) {
      const bool such = call_of(who) == number;
      const bool goes_on = std::exchange(in_row[who], such);
      counts = such && !goes_on;
    }
    counts = counts && (part.empty() || path_of(who).find(part) != std::string::npos);
    if (counts && ++made[who] == at) {
      cut = !hold;
      if (stop) {
        std::printf("\ncut\n");  // a line of its own, whatever the command has printed
        std::fflush(stdout);
        pause();  // whoever is at the call stays there, until the power goes
      }
      if (hold) {
        std::printf("\ncut\n");  // a line of its own, whatever the command has printed
        std::fflush(stdout);
        pause();
        ptrace(PTRACE_CONT, who, nullptr, nullptr);
        made[who] = at + 1;
        continue;
      }
      if (end) kill(child, SIGKILL);  // the first: it must not see the other go
      kill(who, SIGKILL);
      continue;
    }
    // A new process begins with a SIGSTOP of the tracer's making.
    if (event != 0 || (signal == SIGSTOP && made.try_emplace(who, 0).second)) signal = 0;
    ptrace(PTRACE_CONT, who, nullptr, signal);
  }
  return cut ? 137 : code;
}
