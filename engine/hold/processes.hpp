// The tenant's processes and threads as they are met in calls, and its driver files, borrowed. All of it is
// found again by looking: nothing here needs to outlive the arbiter.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/fd.hpp"
#include "base/result.hpp"
#include "edge/rm/rm.hpp"

struct stat;

namespace bulkhead::hold {

// Closes files on a thread of its own: the last close of a driver file tears a process's contexts down, which
// takes the driver long, and pump() must not wait for it.
class Closer {
 public:
  Closer();
  ~Closer();
  int fd() const { return done_.get(); }  // readable when something was closed
  void close(std::vector<rm::DriverFile> files, std::uint64_t token);
  void wait();                            // until all is closed
  std::vector<std::uint64_t> finished();  // tokens of what was closed since the last call
 private:
  void run();
  UniqueFd done_;
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  struct Job {
    std::vector<rm::DriverFile> files;
    std::uint64_t token = 0;
  };
  std::deque<Job> jobs_;
  std::vector<std::uint64_t> finished_;
  bool busy_ = false, stop_ = false;
  std::thread thread_;
};

enum class FileKind { other, control, uvm };

// Calls `visit` with each number that names an entry of a directory, until it says true.
bool any_number(const std::string& path, const std::function<bool(int)>& visit);
UniqueFd open_pidfd(int pid, bool of_thread = false);

class Processes {
 public:
  struct One {
    int pid = 0;
    std::uint64_t start_time = 0;
    UniqueFd pidfd = {};
  };
  explicit Processes(std::filesystem::path root);

  int epoll() const { return epoll_.get(); }
  // The process of a thread, which must exist: its call waits. A process met for the first time gets the
  // number `next`, which is told by `born`. Errc::gone: it ended meanwhile.
  Result<std::uint32_t> process_of(int tid);
  // A process known from before, by number. False: it is no more.
  bool adopt(std::uint32_t number, int pid, std::uint64_t start_time);
  void forget(std::uint32_t number);
  std::vector<std::uint32_t> ended();  // those whose end was not told yet
  const std::map<std::uint32_t, One>& all() const { return processes_; }
  std::vector<std::uint32_t> born();  // those met since the last call

  FileKind kind_of(int tid, int fd);
  FileKind kind_of(const struct ::stat& file);
  // Under some seccomp filter, as all processes of tenants are.
  static bool filtered(int pid);
  // The driver's control file behind the thread's descriptor; null when it is none, or another one than was
  // borrowed under this number before and is not given up yet (lost()). Valid until the next call here.
  rm::DriverFile* control_file(std::uint32_t process, int tid, int fd);
  // The same by what was borrowed before, for a process as a whole.
  rm::DriverFile* control_file(std::uint32_t process, int fd);

  struct Lost {
    std::uint32_t process = 0;
    int fd = -1;
    std::uint32_t heir =
        0;  // another process that has the same file open, or the same one elsewhere; 0: nobody
    int heir_fd = -1;
    std::optional<rm::DriverFile> file = {};  // when nobody: to be closed
  };
  // Borrowed files that their process has no longer at that descriptor; or all those of a process that ended.
  // May meet processes, see born().
  std::vector<Lost> lost(std::optional<std::uint32_t> only_of_gone = {});
  // A living process under some filter that has at `fd` a driver file of which `is` says that it is the one;
  // for files whose borrowed copy died with an arbiter. 0: none. May meet a process.
  std::uint32_t find_heir(int fd, const std::function<bool(const rm::DriverFile&)>& is);
  std::uint64_t mapped_managed(std::uint32_t process);  // bytes; ~0: cannot be read

 private:
  struct Thread {
    UniqueFd pidfd = {};      // of the thread, where the kernel has such
    std::uint64_t start = 0;  // else
    std::uint32_t process = 0;
  };
  struct FileId {
    std::uint64_t device = 0, inode = 0, character = 0;
    bool known = false;
  };
  FileId identify(const char* path) const;
  bool same_file(int pid, int fd, int ours) const;
  bool in_a_thread(int pid, int ours) const;  // open in a thread that has descriptors of its own
  std::uint32_t find_heir(int fd, int ours);
  std::uint32_t met(int pid);  // its number, now if not before; 0: it is gone
  int getfd_source(std::uint32_t process, int tid);

  std::filesystem::path root_;
  UniqueFd epoll_;
  std::unordered_map<int, Thread> threads_;
  std::map<std::uint32_t, One> processes_;
  std::unordered_map<int, std::uint32_t> by_pid_;
  std::vector<std::uint32_t> born_;
  std::uint32_t next_ = 1;
  std::map<std::pair<std::uint32_t, int>, rm::DriverFile> files_;
  FileId control_, uvm_;
};

}  // namespace bulkhead::hold
