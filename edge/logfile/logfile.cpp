#include "edge/logfile/logfile.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include <fmt/format.h>

namespace bulkhead::logfile {

namespace {

constexpr std::size_t most_at_once = 1U << 20U;

}  // namespace

Tail::Tail(std::filesystem::path path, const Place& place)
    : path_(std::move(path)), place_(place), from_end_(place == Place{}) {
  std::error_code failed;
  if (from_end_ && !std::filesystem::exists(path_, failed)) from_end_ = false;
}

Status Tail::open() {
  // O_NONBLOCK: a FIFO of that name must not hold us.
  UniqueFd fd(::open(path_.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!fd) return errno_error("open " + path_.string(), errno);
  struct stat now = {};
  if (::fstat(fd.get(), &now) != 0) return errno_error("stat " + path_.string(), errno);
  if (!S_ISREG(now.st_mode)) return Error(Errc::invalid, path_.string() + " is no file");
  if ((now.st_uid != 0 && now.st_uid != ::geteuid()) || (now.st_mode & (S_IWGRP | S_IWOTH)) != 0)
    return Error(Errc::permission,
                 fmt::format("{} may be written by others than root: it is not believed", path_.string()),
                 fmt::format("chown root {0}; chmod go-w {0}", path_.string()));
  const bool same = now.st_dev == place_.device && now.st_ino == place_.inode;
  Place place{now.st_dev, now.st_ino, same ? place_.offset : 0};
  if (from_end_) place.offset = static_cast<std::uint64_t>(now.st_size);
  from_end_ = false;
  place_ = place;
  fd_ = std::move(fd);
  return ok_status();
}

Result<std::string> Tail::read() {
  if (!fd_) BH_CHECK(open());
  struct stat ours = {};
  if (::fstat(fd_.get(), &ours) != 0) return errno_error("stat " + path_.string(), errno);
  if (static_cast<std::uint64_t>(ours.st_size) < place_.offset) {  // truncated: logrotate's copytruncate
    place_.offset = 0;
    skipping_ = false;
  }
  const auto there = static_cast<std::uint64_t>(ours.st_size) - place_.offset;
  std::string text(std::min<std::uint64_t>(there, most_at_once), '\0');
  ssize_t n = 0;
  do {
    if (!text.empty()) n = ::pread(fd_.get(), text.data(), text.size(), static_cast<off_t>(place_.offset));
  } while (n < 0 && errno == EINTR);
  if (n < 0) return errno_error("read " + path_.string(), errno);
  text.resize(static_cast<std::size_t>(n));
  const auto end = text.rfind('\n');
  const bool whole = end != text.npos;
  if (!whole && text.size() == most_at_once) {
    place_.offset += text.size();
    skipping_ = true;
    return std::string();
  }
  text.resize(whole ? end + 1 : 0);
  place_.offset += text.size();
  if (skipping_ && whole) {
    text.erase(0, text.find('\n') + 1);
    skipping_ = false;
  }
  // Nothing more in it: another may have its name by now.
  struct stat named = {};
  if (text.empty() &&
      (::stat(path_.c_str(), &named) != 0 || named.st_dev != ours.st_dev || named.st_ino != ours.st_ino)) {
    fd_.reset();
    skipping_ = false;
  }
  return text;
}

}  // namespace bulkhead::logfile
