#include "edge/vfio/patient.hpp"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/clock.hpp"
#include "base/fd.hpp"

namespace bulkhead::vfio {

namespace {

constexpr std::size_t text_bytes = 255;
constexpr useconds_t second_look_usec = 200'000;
constexpr std::size_t stuck_limit = 16;  // processes left behind in one reading

struct Frame {  // below PIPE_BUF: whole or not at all
  unsigned char there = 0;
  unsigned char size = 0;
  char text[text_bytes] = {};
};

// In a child of who knows how many threads: system calls alone.
[[noreturn]] void speak(int out, const std::vector<std::string>& files, std::size_t from) {
  ::signal(SIGPIPE, SIG_DFL);  // nobody listens any more: end
  // Left behind, it must not keep what its parent holds: locks, sockets.
  if (out > 0) ::syscall(SYS_close_range, 0U, static_cast<unsigned>(out) - 1, 0U);
  ::syscall(SYS_close_range, static_cast<unsigned>(out) + 1, ~0U, 0U);
  for (std::size_t i = from; i < files.size(); ++i) {
    Frame frame;
    const int fd = ::open(files[i].c_str(), O_RDONLY | O_CLOEXEC);
    const ssize_t got = fd >= 0 ? ::read(fd, frame.text, text_bytes) : -1;
    if (fd >= 0) ::close(fd);
    if (got >= 0) {
      frame.there = 1;
      frame.size = static_cast<unsigned char>(got);
    }
    if (::write(out, &frame, sizeof frame) != sizeof frame) break;
  }
  ::_exit(0);
}

// Its parent ends at once, so that nobody has to wait for it: init does.
UniqueFd speaker(const std::vector<std::string>& files, std::size_t from) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return {};
  UniqueFd in(ends[0]);
  const UniqueFd out(ends[1]);
  const pid_t child = ::fork();
  if (child < 0) return {};
  if (child == 0) {
    if (::fork() == 0) speak(out.get(), files, from);
    ::_exit(0);
  }
  while (::waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
  return in;
}

enum class Heard { frame, nothing, silence };
Heard hear(int fd, Frame& frame, unsigned wait_ms) {
  const std::uint64_t deadline = monotonic_ns() + std::uint64_t{wait_ms} * 1'000'000;
  std::size_t have = 0;
  while (have < sizeof frame) {
    const std::uint64_t now = monotonic_ns();
    if (now >= deadline) return Heard::silence;
    pollfd poll_fd = {fd, POLLIN, 0};
    const int ready = ::poll(&poll_fd, 1, static_cast<int>((deadline - now) / 1'000'000 + 1));
    if (ready < 0 && errno != EINTR) return Heard::nothing;
    if (ready <= 0) continue;
    const ssize_t got = ::read(fd, reinterpret_cast<char*>(&frame) + have, sizeof frame - have);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return Heard::nothing;
    have += static_cast<std::size_t>(got);
  }
  return Heard::frame;
}

}  // namespace

std::vector<Patient> read_patiently(const std::vector<std::string>& files, unsigned wait_ms) {
  std::vector<Patient> out(files.size());
  std::size_t at = 0;
  for (std::size_t stuck = 0; at < files.size() && stuck < stuck_limit;) {
    const UniqueFd in = speaker(files, at);
    if (!in) break;
    while (at < files.size()) {
      Frame frame;
      const Heard heard = hear(in.get(), frame, wait_ms);
      if (heard != Heard::frame) {
        // One that ended without a word was killed: that file is asked no second time.
        out[at].waits = true;
        ++at;
        ++stuck;
        break;
      }
      if (frame.there != 0) out[at].text = std::string(frame.text, frame.size);
      ++at;
    }
  }
  // So many that hang: the rest is not asked.
  for (; at < files.size(); ++at) out[at].waits = true;
  return out;
}

// The ids, command, class and header type. The ids alone would not do: virtual functions have ones there.
bool all_ones(std::string_view config) {
  constexpr std::size_t head = 16;
  return config.size() >= head && config.substr(0, head).find_first_not_of('\xff') == std::string_view::npos;
}

Answers answers(const std::filesystem::path& root, const PciAddress& address, unsigned wait_ms) {
  const std::vector<std::string> file = {(root / "sys/bus/pci/devices" / address.str() / "config").string()};
  for (int look = 0; look < 2; ++look) {
    if (look != 0) ::usleep(second_look_usec);
    const auto said = read_patiently(file, wait_ms);
    if (said[0].waits) return Answers::waits;
    if (!all_ones(said[0].text.value_or(""))) return Answers::yes;
  }
  return Answers::all_ones;
}

}  // namespace bulkhead::vfio
