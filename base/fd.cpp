#include "base/fd.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include <fmt/format.h>

#include "base/text.hpp"

namespace bulkhead {

void UniqueFd::reset(int fd) {
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

Result<std::string> read_file(const std::filesystem::path& path, std::size_t limit) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK));
  if (!fd) return errno_error("read " + path.string(), errno);
  std::string out;
  char block[16384];
  while (true) {
    const ssize_t got = ::read(fd.get(), block, sizeof block);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno_error("read " + path.string(), errno);
    if (got == 0) return out;
    if (out.size() + static_cast<std::size_t>(got) > limit) {
      return Error(Errc::invalid, fmt::format("read {}: larger than {} bytes", path.string(), limit));
    }
    out.append(block, static_cast<std::size_t>(got));
  }
}

Result<std::string> read_trimmed(const std::filesystem::path& path) {
  BH_TRY(const std::string text, read_file(path));
  return std::string(trim(text));
}

namespace {
Status write_all(int fd, std::string_view content, const std::string& what) {
  while (!content.empty()) {
    const ssize_t put = ::write(fd, content.data(), content.size());
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return errno_error("write " + what, errno);
    content.remove_prefix(static_cast<std::size_t>(put));
  }
  return ok_status();
}
}  // namespace

Status write_file_atomic(const std::filesystem::path& path, std::string_view content, unsigned mode) {
  const std::string temporary = fmt::format("{}.{}.new", path.string(), ::getpid());
  {
    const UniqueFd fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, mode));
    if (!fd) return errno_error("write " + path.string(), errno);
    Status status = write_all(fd.get(), content, path.string());
    if (status.ok() && ::fchmod(fd.get(), mode) != 0) status = errno_error("chmod " + path.string(), errno);
    if (status.ok() && ::fsync(fd.get()) != 0) status = errno_error("fsync " + path.string(), errno);
    if (!status.ok()) {
      ::unlink(temporary.c_str());
      return status;
    }
  }
  if (::rename(temporary.c_str(), path.c_str()) != 0) {
    const int err = errno;
    ::unlink(temporary.c_str());
    return errno_error("rename to " + path.string(), err);
  }
  const auto parent = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  const UniqueFd directory(::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory) ::fsync(directory.get());
  return ok_status();
}

Status write_attribute(const std::filesystem::path& path, std::string_view content) {
  const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_TRUNC));
  if (!fd) return errno_error("write " + path.string(), errno);
  // One call: sysfs takes each write(2) as a whole command.
  const ssize_t put = ::write(fd.get(), content.data(), content.size());
  if (put < 0) return errno_error("write " + path.string(), errno);
  if (static_cast<std::size_t>(put) != content.size()) {
    return Error(Errc::io,
                 fmt::format("write {}: only {} of {} bytes taken", path.string(), put, content.size()));
  }
  return ok_status();
}

Result<std::vector<std::string>> list_directory(const std::filesystem::path& path) {
  const std::unique_ptr<DIR, int (*)(DIR*)> dir(::opendir(path.c_str()), ::closedir);
  if (!dir) return errno_error("list " + path.string(), errno);
  std::vector<std::string> names;
  while (const dirent* entry = ::readdir(dir.get())) {
    const std::string_view name = entry->d_name;
    if (name == "." || name == "..") continue;
    if (names.size() >= limits::directory_entries) {
      return Error(Errc::invalid,
                   fmt::format("list {}: more than {} entries", path.string(), limits::directory_entries));
    }
    names.emplace_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace bulkhead
