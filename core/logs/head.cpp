// The heads of lines: who says it, and when.
#include <algorithm>
#include <charconv>

#include "base/text.hpp"
#include "core/logs/logs.hpp"

namespace bulkhead::logs {

namespace {

bool digit(char c) { return c >= '0' && c <= '9'; }

bool number(std::string_view& rest, std::size_t least, std::size_t most, std::int64_t& out) {
  std::size_t n = 0;
  while (n < rest.size() && n < most && digit(rest[n])) ++n;
  if (n < least) return false;
  if (std::from_chars(rest.data(), rest.data() + n, out).ec != std::errc()) return false;
  rest.remove_prefix(n);
  return true;
}
bool eat(std::string_view& rest, char c) {
  if (rest.empty() || rest.front() != c) return false;
  rest.remove_prefix(1);
  return true;
}

std::optional<unsigned> month(std::string_view text) {
  constexpr std::array<std::string_view, 12> names = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                                      "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
  const auto at = std::ranges::find(names, text.substr(0, 3));
  if (at == names.end()) return std::nullopt;
  return static_cast<unsigned>(at - names.begin()) + 1;
}

std::optional<std::int64_t> instant(std::int64_t year, unsigned month, std::int64_t day, std::int64_t hour,
                                    std::int64_t minute, std::int64_t second) {
  using namespace std::chrono;
  const year_month_day date(std::chrono::year(static_cast<int>(year)), std::chrono::month(month),
                            std::chrono::day(static_cast<unsigned>(day)));
  if (!date.ok() || hour > 23 || minute > 59 || second > 60) return std::nullopt;
  const auto days = sys_days(date).time_since_epoch().count();
  return ((static_cast<std::int64_t>(days) * 24 + hour) * 60 + minute) * 60'000 + second * 1000;
}

// "18:14:07"
bool clock(std::string_view& rest, std::int64_t& hour, std::int64_t& minute, std::int64_t& second) {
  return number(rest, 2, 2, hour) && eat(rest, ':') && number(rest, 2, 2, minute) && eat(rest, ':') &&
         number(rest, 2, 2, second);
}

// "Nov 23 10:00:00 " or "Nov  3 10:00:00 ": no year.
std::optional<std::int64_t> syslog_time(std::string_view& rest, WallTime now) {
  auto in = rest;
  const auto mon = month(in);
  if (!mon || in.size() < 16 || in[3] != ' ') return std::nullopt;
  in.remove_prefix(4);
  (void)eat(in, ' ');
  std::int64_t day = 0;
  std::int64_t hour = 0;
  std::int64_t minute = 0;
  std::int64_t second = 0;
  if (!number(in, 1, 2, day) || !eat(in, ' ') || !clock(in, hour, minute, second)) return std::nullopt;
  if (eat(in, '.')) {
    std::int64_t ignored = 0;
    (void)number(in, 1, 9, ignored);
  }
  if (!eat(in, ' ')) return std::nullopt;
  const auto now_ms = now.time_since_epoch().count();
  const auto today = std::chrono::year_month_day(std::chrono::floor<std::chrono::days>(now));
  auto year = static_cast<std::int64_t>(static_cast<int>(today.year()));
  auto out = instant(year, *mon, day, hour, minute, second);
  // Two days of grace: the file's time zone is not ours.
  if (!out || *out > now_ms + 2 * 86'400'000LL) out = instant(year - 1, *mon, day, hour, minute, second);
  if (!out) return std::nullopt;
  rest = in;
  return out;
}

// "kwi 15 07:56:59 ", "jan. 29 20:50:17 ", "11月 15 14:15:47 ": months of other languages. Which one is not
// known here, and neither is the time; but who speaks is read all the same.
bool foreign_time(std::string_view& rest) {
  auto in = rest;
  const auto space = in.find(' ');
  if (space == std::string_view::npos || space == 0 || space > 24) return false;
  const auto word = in.substr(0, space);
  const bool letters = std::ranges::all_of(word, [](char c) {
    return digit(c) || c == '.' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           static_cast<unsigned char>(c) >= 0x80;
  });
  if (!letters || digit(word.back())) return false;
  in.remove_prefix(space + 1);
  (void)eat(in, ' ');
  std::int64_t day = 0;
  std::int64_t hour = 0;
  std::int64_t minute = 0;
  std::int64_t second = 0;
  if (!number(in, 1, 2, day) || !eat(in, ' ') || !clock(in, hour, minute, second) || !eat(in, ' '))
    return false;
  rest = in;
  return true;
}

// "2026-11-23T10:00:00.123456+00:00 ", ",123456": dmesg's. `comma` says which.
std::optional<std::int64_t> iso_time(std::string_view& rest, bool& comma) {
  auto in = rest;
  std::int64_t year = 0;
  std::int64_t mon = 0;
  std::int64_t day = 0;
  std::int64_t hour = 0;
  std::int64_t minute = 0;
  std::int64_t second = 0;
  if (!number(in, 4, 4, year) || !eat(in, '-') || !number(in, 2, 2, mon) || !eat(in, '-') ||
      !number(in, 2, 2, day) || (!eat(in, 'T') && !eat(in, ' ')) || !clock(in, hour, minute, second))
    return std::nullopt;
  std::int64_t fraction_ms = 0;
  comma = !in.empty() && in.front() == ',';
  if (comma || (!in.empty() && in.front() == '.')) {
    in.remove_prefix(1);
    std::size_t n = 0;
    std::int64_t scale = 100;
    while (n < in.size() && digit(in[n])) {
      fraction_ms += (in[n] - '0') * scale;
      scale /= 10;
      ++n;
    }
    in.remove_prefix(n);
  }
  std::int64_t offset_minutes = 0;
  if (!in.empty() && (in.front() == '+' || in.front() == '-')) {
    const bool west = in.front() == '-';
    in.remove_prefix(1);
    std::int64_t hours = 0;
    std::int64_t minutes = 0;
    if (!number(in, 2, 2, hours)) return std::nullopt;
    (void)eat(in, ':');
    (void)number(in, 2, 2, minutes);
    offset_minutes = (hours * 60 + minutes) * (west ? -1 : 1);
  } else {
    (void)eat(in, 'Z');
  }
  (void)eat(in, ':');  // what libvirt writes of QEMU: "2026-11-23 10:00:00.000+0000: ..."
  if (!eat(in, ' ')) return std::nullopt;
  const auto out =
      instant(year, mon >= 1 && mon <= 12 ? static_cast<unsigned>(mon) : 0, day, hour, minute, second);
  if (!out) return std::nullopt;
  rest = in;
  return *out + fraction_ms - offset_minutes * 60'000;
}

// "host program[12]: ", or "program: " where `with_host` is false.
bool speaker(std::string_view& rest, Head& out, bool with_host) {
  auto in = rest;
  if (with_host) {
    const auto space = in.find(' ');
    if (space == std::string_view::npos || space == 0 || space > 255) return false;
    // Without a host, as in what people paste: "Sep 06 22:24:12 kernel: ".
    if (in[space - 1] != ':') in.remove_prefix(space + 1);
  }
  const auto colon = in.find(": ");
  if (colon == std::string_view::npos || colon == 0 || colon > 128) return false;
  auto tag = in.substr(0, colon);
  if (tag.find(' ') != std::string_view::npos) return false;
  if (tag.ends_with(']')) {
    const auto open = tag.rfind('[');
    if (open == std::string_view::npos) return false;
    auto digits = tag.substr(open + 1, tag.size() - open - 2);
    std::int64_t pid = 0;
    if (number(digits, 1, 10, pid) && digits.empty()) out.pid = static_cast<std::uint32_t>(pid);
    tag = tag.substr(0, open);
  }
  out.program = tag;
  // The kernel has no pid; `logger -t kernel` has one in every journal.
  out.speaker = tag == "kernel" && !out.pid ? Speaker::kernel : Speaker::program;
  rest = in.substr(colon + 2);
  return true;
}

// The caller that some kernels add: "[ T123] ", or "[ C1] " of a processor. Newer dmesg puts a space before
// it.
void skip_caller(std::string_view& rest) {
  auto in = rest;
  (void)eat(in, ' ');
  if (!eat(in, '[')) return;
  while (eat(in, ' ')) {
  }
  std::int64_t ignored = 0;
  if ((eat(in, 'T') || eat(in, 'C')) && number(in, 1, 10, ignored) && eat(in, ']')) rest = in;
}

// "[  123.456789] ", and the caller.
bool boot_time(std::string_view& rest, Head& out) {
  auto in = rest;
  if (!eat(in, '[')) return false;
  while (eat(in, ' ')) {
  }
  std::int64_t seconds = 0;
  if (!number(in, 1, 9, seconds) || !eat(in, '.')) return false;
  std::int64_t micros = 0;
  if (!number(in, 6, 6, micros) || !eat(in, ']')) return false;
  skip_caller(in);
  (void)eat(in, ' ');
  out.boot_us = seconds * 1'000'000 + micros;
  rest = in;
  return true;
}

// dmesg --human: "[  +0.000004] ", the time since the line before, and "[Nov23 10:00] " once a minute.
bool human_time(std::string_view& rest) {
  auto in = rest;
  if (!eat(in, '[')) return false;
  std::int64_t ignored = 0;
  if (month(in)) {
    in.remove_prefix(3);
    (void)eat(in, ' ');
    if (!number(in, 1, 2, ignored) || !eat(in, ' ') || !number(in, 2, 2, ignored) || !eat(in, ':') ||
        !number(in, 2, 2, ignored) || !eat(in, ']'))
      return false;
  } else {
    while (eat(in, ' ')) {
    }
    if (!eat(in, '+') || !number(in, 1, 9, ignored) || !eat(in, '.') || !number(in, 6, 6, ignored) ||
        !eat(in, ']'))
      return false;
  }
  (void)eat(in, ' ');
  rest = in;
  return true;
}

// What journalctl -o short-monotonic has behind its time: "gpu7 kernel: ", or "kernel: " without the host.
bool monotonic_speaker(std::string_view& rest) {
  auto in = rest;
  if (!in.starts_with("kernel: ")) {
    const auto space = in.find(' ');
    if (space == std::string_view::npos || space == 0 || space > 255) return false;
    if (!std::ranges::all_of(in.substr(0, space), [](char c) {
          return digit(c) || c == '-' || c == '.' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
        }))
      return false;
    in.remove_prefix(space + 1);
    if (!in.starts_with("kernel: ")) return false;
  }
  rest = in.substr(8);
  return true;
}

std::string_view trim_left(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  return text;
}

// "Mon Nov 23 10:00:00 2026] " after its bracket.
std::optional<std::int64_t> ctime_time(std::string_view& rest) {
  auto in = rest;
  if (in.size() < 25 || in[3] != ' ') return std::nullopt;
  in.remove_prefix(4);
  const auto mon = month(in);
  if (!mon) return std::nullopt;
  in.remove_prefix(3);
  in = trim_left(in);
  std::int64_t day = 0;
  std::int64_t hour = 0;
  std::int64_t minute = 0;
  std::int64_t second = 0;
  std::int64_t year = 0;
  if (!number(in, 1, 2, day) || !eat(in, ' ') || !clock(in, hour, minute, second) || !eat(in, ' ') ||
      !number(in, 4, 4, year) || !eat(in, ']'))
    return std::nullopt;
  skip_caller(in);
  (void)eat(in, ' ');
  const auto out = instant(year, *mon, day, hour, minute, second);
  if (out) rest = in;
  return out;
}

// "Jul 09 2024 18:14:07] [ERROR] [tid 12727] " after its bracket.
std::optional<std::int64_t> fabric_time(std::string_view& rest) {
  auto in = rest;
  const auto mon = month(in);
  if (!mon || in.size() < 22) return std::nullopt;
  in.remove_prefix(3);
  std::int64_t day = 0;
  std::int64_t hour = 0;
  std::int64_t minute = 0;
  std::int64_t second = 0;
  std::int64_t year = 0;
  if (!eat(in, ' ') || !number(in, 1, 2, day) || !eat(in, ' ') || !number(in, 4, 4, year) || !eat(in, ' ') ||
      !clock(in, hour, minute, second) || !eat(in, ']'))
    return std::nullopt;
  for (int i = 0; i < 2; ++i) {  // level and thread
    in = trim_left(in);
    if (in.empty() || in.front() != '[') break;
    const auto close = in.find(']');
    if (close == std::string_view::npos) break;
    in.remove_prefix(close + 1);
  }
  const auto out = instant(year, *mon, day, hour, minute, second);
  if (out) rest = trim_left(in);
  return out;
}

}  // namespace

Head head_of(std::string_view line, WallTime now) {
  Head out;
  auto rest = trim_left(line);
  // /dev/kmsg: "3,1234,567890,-;body"
  if (auto in = rest; !in.empty() && digit(in.front())) {
    std::int64_t priority = 0;
    std::int64_t sequence = 0;
    std::int64_t micros = 0;
    if (number(in, 1, 4, priority) && eat(in, ',') && number(in, 1, 18, sequence) && eat(in, ',') &&
        number(in, 1, 18, micros) && eat(in, ',')) {
      const auto semicolon = in.find(';');
      if (semicolon != std::string_view::npos && semicolon < 64) {
        out.sequence = static_cast<std::uint64_t>(sequence);
        out.boot_us = micros;
        // Facility 0 is the kernel's; what is written into /dev/kmsg by root carries another.
        out.speaker = priority >> 3 == 0 ? Speaker::kernel : Speaker::program;
        out.vouched = out.speaker == Speaker::kernel;
        out.program = out.vouched ? "kernel" : "writer of /dev/kmsg";
        out.body = in.substr(semicolon + 1);
        return out;
      }
    }
  }
  if (auto in = rest; eat(in, '<')) {
    std::int64_t priority = 0;
    if (number(in, 1, 3, priority) && eat(in, '>')) rest = in;
  }
  if (rest.starts_with("kern  :")) {  // dmesg -x
    const auto at = rest.find(" : ", 7);
    const auto tight = rest.find(": ", 7);
    const auto end = std::min(at == std::string_view::npos ? at : at + 3,
                              tight == std::string_view::npos ? tight : tight + 2);
    if (end != std::string_view::npos && end < 24) rest = trim_left(rest.substr(end));
  }
  if (rest.starts_with('[')) {
    if (boot_time(rest, out) || human_time(rest)) {
      out.speaker = Speaker::kernel;
      out.vouched = !monotonic_speaker(rest);  // a journal as text: anybody's lines look like that
      out.program = "kernel";
      out.body = rest;
      return out;
    }
    auto inside = rest.substr(1);
    if (const auto time = ctime_time(inside)) {
      out.wall_ms = time;
      out.speaker = Speaker::kernel;
      out.vouched = true;
      out.program = "kernel";
      out.body = inside;
      return out;
    }
    if (const auto time = fabric_time(inside)) {
      out.wall_ms = time;
      out.speaker = Speaker::program;
      out.program = "nv-fabricmanager";
      out.body = inside;
      return out;
    }
  }
  bool comma = false;
  if (const auto time = iso_time(rest, comma)) {
    out.wall_ms = time;
    if (comma) {
      out.speaker = Speaker::kernel;
      out.vouched = true;
      out.program = "kernel";
    } else if (!speaker(rest, out, true)) {
      (void)speaker(rest, out, false);
    }
  } else if (const auto syslog = syslog_time(rest, now)) {
    out.wall_ms = syslog;
    (void)speaker(rest, out, true);
  } else if (foreign_time(rest)) {
    (void)speaker(rest, out, true);
  } else if (rest.starts_with("kernel: ")) {
    rest.remove_prefix(8);
    out.speaker = Speaker::kernel;
    out.program = "kernel";
  }
  if (out.speaker == Speaker::kernel) (void)boot_time(rest, out);
  out.body = trim_left(rest);
  return out;
}

}  // namespace bulkhead::logs
