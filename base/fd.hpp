// Files, bounded: read whole, write so that a crash leaves the old or the new content, never a mix.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/limits.hpp"
#include "base/result.hpp"

namespace bulkhead {

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) reset(std::exchange(other.fd_, -1));
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }
  void reset(int fd = -1);

 private:
  int fd_ = -1;
};

// The whole file, refused beyond `limit` bytes. Works for /proc and /sys files, whose size reads 0.
Result<std::string> read_file(const std::filesystem::path& path, std::size_t limit = limits::proc_file_bytes);

// read_file without trailing white space: what sysfs attributes need.
Result<std::string> read_trimmed(const std::filesystem::path& path);

// Writes to a temporary sibling, fsyncs, renames, fsyncs the directory. Keeps mode `mode`.
Status write_file_atomic(const std::filesystem::path& path, std::string_view content, unsigned mode = 0644);

// One write(2) to an existing file, as sysfs and procfs attributes want. Never creates.
Status write_attribute(const std::filesystem::path& path, std::string_view content);

// Sorted names in a directory, without "." and "..".
Result<std::vector<std::string>> list_directory(const std::filesystem::path& path);

}  // namespace bulkhead
