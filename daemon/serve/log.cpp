#include "daemon/serve/log.hpp"

#include <unistd.h>

#include <cstdlib>
#include <future>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/text.hpp"

namespace bulkhead::serve {

namespace {
constexpr std::size_t lines_waiting = 4096;
constexpr double lines_a_second = 100, lines_at_once = 200;

void write_line(const std::string& line) {
  std::string_view left = line;
  while (!left.empty()) {
    const ssize_t n = ::write(STDERR_FILENO, left.data(), left.size());
    if (n <= 0) return;
    left.remove_prefix(static_cast<std::size_t>(n));
  }
}
}  // namespace

Log::Log()
    : journal_(std::getenv("JOURNAL_STREAM") != nullptr),
      buckets_(lines_a_second, lines_at_once),
      worker_(lines_waiting) {}

Log::~Log() {
  auto written = std::make_shared<std::promise<void>>();
  auto done = written->get_future();
  if (worker_.put([written] { written->set_value(); })) (void)done.wait_for(std::chrono::seconds(1));
}

void Log::say(Level level, std::string line) {
  // systemd takes the level from the front of the line and the time from its own clock.
  std::string text = journal_ ? fmt::format("<{}>{}\n", static_cast<int>(level), line)
                              : fmt::format("{} {}\n", rfc3339(wall_now()), line);
  (void)worker_.put([text = std::move(text)] { write_line(text); });
}

void Log::often(const std::function<std::string()>& line) {
  std::uint64_t missed = 0;
  {
    const std::lock_guard hold(mutex_);
    if (buckets_.take("", monotonic_ns()) != 0) {
      ++left_out_;
      return;
    }
    std::swap(missed, left_out_);
  }
  if (missed > 0) say(Level::info, fmt::format("log left-out={}", missed));
  say(Level::info, line());
}

std::string value(std::string_view text, std::size_t most) {
  std::string out = printable(text, most);
  for (auto at = out.find("bh_"); at != std::string::npos; at = out.find("bh_", at + 1)) {
    const auto end = std::min(out.find_first_not_of("0123456789abcdefABCDEF_", at + 3), out.size());
    if (end - at > 8) out.replace(at, end - at, "(token)");
  }
  if (!out.empty() && out.find_first_of(" \"=") == std::string::npos) return out;
  std::string quoted = "\"";
  for (const char c : out) {
    if (c == '"') quoted += '\\';
    quoted += c;
  }
  return quoted + '"';
}

}  // namespace bulkhead::serve
