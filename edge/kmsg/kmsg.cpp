#include "edge/kmsg/kmsg.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cerrno>
#include <vector>

#include "base/text.hpp"

namespace bulkhead::kmsg {

Result<Reader> Reader::open(const std::filesystem::path& path, bool from_start) {
  Reader out;
  out.fd_.reset(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
  if (!out.fd_)
    return errno_error("open " + path.string(), errno)
        .with_hint("root may: sudo; or give a file: dmesg > d.txt; bulkhead diagnose --from d.txt");
  struct stat status = {};
  if (fstat(out.fd_.get(), &status) != 0) return errno_error("stat " + path.string(), errno);
  out.device_ = S_ISCHR(status.st_mode);
  if (!from_start) (void)lseek(out.fd_.get(), 0, SEEK_END);
  return out;
}

Result<Reader::Batch> Reader::read() {
  Batch out;
  std::vector<char> buffer(device_ ? 16'384 : 1U << 18U);
  while (out.text.size() < (4U << 20U)) {
    const auto n = ::read(fd_.get(), buffer.data(), buffer.size());
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN) break;
      if (errno == EPIPE) continue;   // overwritten under us: the next sequence number says how many
      if (errno == EINVAL) continue;  // a record longer than the buffer: skipped, and seen as lost
      return errno_error("read the kernel's log", errno);
    }
    if (n == 0) break;
    rest_.append(buffer.data(), static_cast<std::size_t>(n));
    for (auto end = rest_.find('\n'); end != std::string::npos; end = rest_.find('\n')) {
      const std::string_view line = std::string_view(rest_).substr(0, end);
      // " KEY=value" lines belong to the record before: a dictionary, not a message.
      if (!line.empty() && line.front() != ' ') {
        const auto comma = line.find(',');
        const auto second = comma == std::string_view::npos ? comma : line.find(',', comma + 1);
        if (second != std::string_view::npos)
          if (const auto sequence = parse_u64(line.substr(comma + 1, second - comma - 1))) {
            if (after_ && *sequence <= *after_) {
              rest_.erase(0, end + 1);
              continue;
            }
            if (last_ && *sequence > *last_ + 1) out.lost += *sequence - *last_ - 1;
            last_ = sequence;
          }
        out.text.append(line);
        out.text += '\n';
      }
      rest_.erase(0, end + 1);
    }
    if (rest_.size() > 65'536) rest_.clear();
  }
  return out;
}

}  // namespace bulkhead::kmsg
