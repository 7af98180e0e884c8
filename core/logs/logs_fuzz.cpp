// Any bytes as a log: heads stay inside their line, the filter's two ways agree, what is found stands in the
// text, and a line matched in a whole log is the line matched alone.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "core/logs/logs.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace bulkhead;
  static const logs::Matcher matcher;
  const WallTime now = WallTime(std::chrono::milliseconds(1'795'427'000'000));
  const std::string_view text(reinterpret_cast<const char*>(data), size);

  const auto inside = [&](std::string_view part) {
    if (!part.empty() && (part.data() < text.data() || part.data() + part.size() > text.data() + size))
      __builtin_trap();
  };
  for (std::size_t at = 0; at < size;) {
    const auto end = std::min(text.find('\n', at), size);
    const auto line = text.substr(at, end - at);
    const auto head = logs::head_of(line, now);
    inside(head.body);
    if (head.program != "kernel" && head.program != "nv-fabricmanager" &&
        head.program != "writer of /dev/kmsg")
      inside(head.program);
    if (head.vouched && head.speaker != logs::Speaker::kernel) __builtin_trap();
    at = end + 1;
  }

  std::vector<std::pair<std::size_t, std::size_t>> wide;
  std::vector<std::pair<std::size_t, std::size_t>> plain;
  matcher.filter().scan(text, [&](std::size_t word, std::size_t place) { wide.emplace_back(word, place); });
  matcher.filter().scan_plainly(
      text, [&](std::size_t word, std::size_t place) { plain.emplace_back(word, place); });
  std::ranges::sort(wide);
  std::ranges::sort(plain);
  if (wide != plain) __builtin_trap();

  const auto found = matcher.match(text, now, 1000);
  for (const auto& hit : found.hits) {
    if (hit.number == 0 || hit.number > found.lines) __builtin_trap();
    if (!hit.xid && !hit.sxid && hit.rule == nullptr) __builtin_trap();
    if (hit.forged && hit.speaker != logs::Speaker::program) __builtin_trap();
    const auto alone = matcher.match_line(hit.line, now);
    // A record of a journal is shown as "kernel: message", which needs not read the same.
    if (text.find('{') == std::string_view::npos &&
        (!alone || alone->rule != hit.rule || alone->xid.has_value() != hit.xid.has_value()))
      __builtin_trap();
  }
  return 0;
}
