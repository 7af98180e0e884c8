#include "engine/hold/processes.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <linux/kcmp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/text.hpp"
#include "edge/process/process.hpp"

#ifndef PIDFD_THREAD
#define PIDFD_THREAD O_EXCL
#endif

namespace bulkhead::hold {

namespace {

constexpr std::size_t most_threads = 1024;  // remembered; beyond, all are met anew
constexpr std::size_t status_bytes = 16384;

bool ended_now(int pidfd) {
  pollfd waiting{pidfd, POLLIN, 0};
  return ::poll(&waiting, 1, 0) > 0 && waiting.revents != 0;
}
std::uint64_t start_of(int pid) {
  const auto found = process::look("/", pid);
  return found.ok() ? found->start_time : 0;
}
int leader_of(int tid) {
  const auto text = read_file(fmt::format("/proc/{}/status", tid), status_bytes);
  if (!text.ok()) return 0;
  for (const auto line : split_lines(*text))
    if (line.starts_with("Tgid:")) return static_cast<int>(parse_u64(trim(line.substr(5))).value_or(0));
  return 0;
}

}  // namespace

UniqueFd open_pidfd(int pid, bool of_thread) {
  return UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, of_thread ? PIDFD_THREAD : 0U)));
}

bool any_number(const std::string& path, const std::function<bool(int)>& visit) {
  DIR* open = ::opendir(path.c_str());
  if (open == nullptr) return false;
  bool found = false;
  while (const dirent* entry = found ? nullptr : ::readdir(open)) {
    if (entry->d_name[0] >= '0' && entry->d_name[0] <= '9') found = visit(std::atoi(entry->d_name));
  }
  ::closedir(open);
  return found;
}

// ---- closing

Closer::Closer() : done_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)), thread_([this] { run(); }) {}

Closer::~Closer() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void Closer::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stop_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    busy_ = true;
    lock.unlock();
    job.files.clear();
    lock.lock();
    busy_ = false;
    finished_.push_back(job.token);
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto told = ::write(done_.get(), &one, sizeof one);
    idle_.notify_all();
  }
}

void Closer::close(std::vector<rm::DriverFile> files, std::uint64_t token) {
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back({std::move(files), token});
  }
  wake_.notify_one();
}

void Closer::wait() {
  std::unique_lock lock(mutex_);
  idle_.wait(lock, [this] { return jobs_.empty() && !busy_; });
}

std::vector<std::uint64_t> Closer::finished() {
  std::uint64_t count = 0;
  [[maybe_unused]] const auto got = ::read(done_.get(), &count, sizeof count);
  const std::lock_guard lock(mutex_);
  return std::exchange(finished_, {});
}

// ---- processes

Processes::Processes(std::filesystem::path root)
    : root_(std::move(root)), epoll_(::epoll_create1(EPOLL_CLOEXEC)) {}

bool Processes::adopt(std::uint32_t number, int pid, std::uint64_t start_time) {
  next_ = std::max(next_, number + 1);
  auto pidfd = open_pidfd(pid);
  // Opened first, compared afterwards: what the descriptor names is what was compared.
  if (!pidfd || start_of(pid) != start_time) return false;
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = number;
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, pidfd.get(), &event);
  processes_[number] = {pid, start_time, std::move(pidfd)};
  by_pid_[pid] = number;
  return true;
}

void Processes::forget(std::uint32_t number) {
  const auto known = processes_.find(number);
  if (known == processes_.end()) return;
  if (const auto at = by_pid_.find(known->second.pid); at != by_pid_.end() && at->second == number)
    by_pid_.erase(at);
  std::erase_if(threads_, [number](const auto& thread) { return thread.second.process == number; });
  std::erase_if(files_, [number](const auto& file) { return file.first.first == number; });
  processes_.erase(known);
}

std::vector<std::uint32_t> Processes::ended() {
  std::vector<std::uint32_t> out;
  epoll_event events[64];
  for (;;) {
    const int count = ::epoll_wait(epoll_.get(), events, 64, 0);
    for (int i = 0; i < count; ++i) {
      const auto number = static_cast<std::uint32_t>(events[i].data.u64);
      const auto known = processes_.find(number);
      if (number == 0 || known == processes_.end()) continue;
      ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, known->second.pidfd.get(), nullptr);
      out.push_back(number);
    }
    if (count < 64) return out;
  }
}

std::vector<std::uint32_t> Processes::born() { return std::exchange(born_, {}); }

Result<std::uint32_t> Processes::process_of(int tid) {
  const auto gone = [tid] { return Error(Errc::gone, fmt::format("thread {} is no more", tid)); };
  if (const auto known = threads_.find(tid); known != threads_.end()) {
    const Thread& thread = known->second;
    const bool alive = thread.pidfd ? !ended_now(thread.pidfd.get()) : start_of(tid) == thread.start;
    if (alive && processes_.contains(thread.process)) return thread.process;
    threads_.erase(known);
  }
  Thread thread;
  thread.pidfd = open_pidfd(tid, true);
  if (!thread.pidfd) thread.start = start_of(tid);
  const int pid = leader_of(tid);
  if (pid <= 0) return gone();
  const auto start = start_of(pid);
  if (start == 0) return gone();
  if (const auto at = by_pid_.find(pid); at != by_pid_.end() && processes_[at->second].start_time == start) {
    thread.process = at->second;
  } else {
    thread.process = next_;
    if (!adopt(next_, pid, start)) return gone();
    born_.push_back(thread.process);
  }
  const auto process = thread.process;
  if (threads_.size() >= most_threads) threads_.clear();
  threads_[tid] = std::move(thread);
  return process;
}

// ---- files

Processes::FileId Processes::identify(const char* path) const {
  FileId out;
  struct ::stat file {};
  if (::stat((root_ / path).c_str(), &file) != 0) return out;
  out.device = file.st_dev;
  out.inode = file.st_ino;
  out.character = S_ISCHR(file.st_mode) ? file.st_rdev : 0;
  out.known = true;
  return out;
}

FileKind Processes::kind_of(const struct ::stat& file) {
  if (!S_ISCHR(file.st_mode) && !S_ISREG(file.st_mode)) return FileKind::other;
  if (!control_.known) control_ = identify("dev/nvidiactl");
  if (!uvm_.known) uvm_ = identify("dev/nvidia-uvm");
  const auto is = [&file](const FileId& id) {
    if (!id.known) return false;
    // A device node made elsewhere, in a container say, is the same device.
    if (id.character != 0) return S_ISCHR(file.st_mode) && file.st_rdev == id.character;
    return file.st_dev == id.device && file.st_ino == id.inode;
  };
  if (is(control_)) return FileKind::control;
  return is(uvm_) ? FileKind::uvm : FileKind::other;
}

FileKind Processes::kind_of(int tid, int fd) {
  // The thread's own descriptor table, which need not be its process's.
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/fd/%d", tid, fd);
  struct ::stat file {};
  return ::stat(path, &file) == 0 ? kind_of(file) : FileKind::other;
}

bool Processes::same_file(int pid, int fd, int ours) const {
  return ::syscall(SYS_kcmp, ::getpid(), pid, KCMP_FILE, ours, fd) == 0;
}

bool Processes::in_a_thread(int pid, int ours) const {
  return any_number(fmt::format("/proc/{}/task", pid), [&](int tid) {
    if (tid == pid || ::syscall(SYS_kcmp, pid, tid, KCMP_FILES, 0, 0) == 0) return false;
    return any_number(fmt::format("/proc/{}/fd", tid), [&](int fd) { return same_file(tid, fd, ours); });
  });
}

bool Processes::filtered(int pid) {
  const auto status = read_file(fmt::format("/proc/{}/status", pid), status_bytes);
  return status.ok() && status->find("\nSeccomp:\t2") != std::string::npos;
}

std::uint32_t Processes::met(int pid) {
  const auto start = start_of(pid);
  if (start == 0) return 0;
  if (const auto at = by_pid_.find(pid); at != by_pid_.end() && processes_[at->second].start_time == start)
    return at->second;
  const auto number = next_;
  if (!adopt(number, pid, start)) return 0;
  born_.push_back(number);
  return number;
}

// A child that was forked with the file open and made no call yet has it under the same number.
std::uint32_t Processes::find_heir(int fd, int ours) {
  std::uint32_t heir = 0;
  any_number("/proc", [&](int pid) {
    if (pid <= 0 || pid == ::getpid() || by_pid_.contains(pid) || !same_file(pid, fd, ours) || !filtered(pid))
      return false;
    heir = met(pid);
    return heir != 0;
  });
  return heir;
}

std::uint32_t Processes::find_heir(int fd, const std::function<bool(const rm::DriverFile&)>& is) {
  std::uint32_t heir = 0;
  any_number("/proc", [&](int pid) {
    if (pid <= 0 || pid == ::getpid() || kind_of(pid, fd) != FileKind::control || !filtered(pid))
      return false;
    const auto pidfd = open_pidfd(pid);
    if (!pidfd) return false;
    auto file = rm::DriverFile::borrow(pidfd.get(), fd);
    if (!file.ok() || !is(*file)) return false;
    heir = met(pid);
    if (heir != 0) files_.emplace(std::pair{heir, fd}, std::move(*file));
    return heir != 0;
  });
  return heir;
}

int Processes::getfd_source(std::uint32_t process, int tid) {
  if (const auto thread = threads_.find(tid); thread != threads_.end() && thread->second.pidfd)
    return thread->second.pidfd.get();
  const auto known = processes_.find(process);
  return known != processes_.end() ? known->second.pidfd.get() : -1;
}

rm::DriverFile* Processes::control_file(std::uint32_t process, int tid, int fd) {
  const auto at = files_.find({process, fd});
  if (at != files_.end() && same_file(tid, fd, at->second.fd())) return &at->second;
  auto file = rm::DriverFile::borrow(getfd_source(process, tid), fd);
  if (!file.ok()) return nullptr;
  struct ::stat what {};
  if (::fstat(file->fd(), &what) != 0 || kind_of(what) != FileKind::control) return nullptr;
  // What was at this descriptor before is found or closed by lost(); it must not be overwritten unseen.
  if (at != files_.end()) return nullptr;
  return &files_.emplace(std::pair{process, fd}, std::move(*file)).first->second;
}

rm::DriverFile* Processes::control_file(std::uint32_t process, int fd) {
  if (const auto at = files_.find({process, fd}); at != files_.end()) return &at->second;
  const auto known = processes_.find(process);
  return known != processes_.end() ? control_file(process, known->second.pid, fd) : nullptr;
}

std::vector<Processes::Lost> Processes::lost(std::optional<std::uint32_t> only_of_gone) {
  std::vector<Lost> out;
  for (auto at = files_.begin(); at != files_.end();) {
    const std::uint32_t number_here = at->first.first;
    const int fd = at->first.second;
    const auto known = processes_.find(number_here);
    const bool gone = only_of_gone.has_value();
    if ((gone && number_here != *only_of_gone) ||
        (!gone && known != processes_.end() && same_file(known->second.pid, fd, at->second.fd()))) {
      ++at;
      continue;
    }
    Lost lost{.process = number_here, .fd = fd};
    for (const auto& [other, process] : processes_) {
      if (lost.heir != 0) break;
      if (gone && other == number_here) continue;
      const bool found = any_number(
          fmt::format("/proc/{}/fd", process.pid), [&, number_of = other, pid = process.pid](int theirs) {
            if (!same_file(pid, theirs, at->second.fd()) || files_.contains({number_of, theirs}))
              return false;
            lost.heir_fd = theirs;
            return true;
          });
      if (found) lost.heir = other;
    }
    if (lost.heir == 0 && std::any_of(processes_.begin(), processes_.end(), [&](const auto& one) {
          return (!gone || one.first != number_here) && in_a_thread(one.second.pid, at->second.fd());
        })) {
      ++at;
      continue;
    }
    if (lost.heir == 0) lost.heir = find_heir(fd, at->second.fd());
    if (lost.heir != 0 && lost.heir_fd < 0) lost.heir_fd = fd;
    auto node = files_.extract(at++);
    if (lost.heir != 0) {
      node.key() = {lost.heir, lost.heir_fd};
      files_.insert(std::move(node));
    } else {
      lost.file = std::move(node.mapped());
    }
    out.push_back(std::move(lost));
  }
  return out;
}

std::uint64_t Processes::mapped_managed(std::uint32_t process) {
  const auto known = processes_.find(process);
  if (known == processes_.end()) return 0;
  if (!uvm_.known) uvm_ = identify("dev/nvidia-uvm");
  if (!uvm_.known) return 0;
  // "7f00-7f10 rw-s 0000 08:01 1234 /path": the device and inode of the file that is mapped; for a device
  // node, of the node, so that it is told by its name as well.
  std::FILE* maps = std::fopen(fmt::format("/proc/{}/maps", known->second.pid).c_str(), "re");
  if (maps == nullptr) return ~0ULL;
  std::uint64_t sum = 0;
  char line[8192];
  while (std::fgets(line, sizeof line, maps) != nullptr) {
    unsigned long from = 0, to = 0, inode = 0;
    unsigned major = 0, minor = 0;
    int name = 0;
    if (std::sscanf(line, "%lx-%lx %*s %*x %x:%x %lu %n", &from, &to, &major, &minor, &inode, &name) < 5)
      continue;
    const bool it = uvm_.character != 0 ? name > 0 && std::strstr(line + name, "nvidia-uvm") != nullptr
                                        : inode == uvm_.inode && makedev(major, minor) == uvm_.device;
    if (it) sum += to - from;
  }
  std::fclose(maps);
  return sum;
}

}  // namespace bulkhead::hold
