// Any bytes as a line of the driver: views stay inside it, and everything derived holds still.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/xid/xid.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace bulkhead;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto inside = [&](std::string_view part) {
    if (!part.empty() && (part.data() < text.data() || part.data() + part.size() > text.data() + size))
      __builtin_trap();
  };
  if (const auto line = xid::parse(text)) {
    if (!text.starts_with("NVRM: Xid (")) __builtin_trap();
    inside(line->name);
    inside(line->message);
    if (const auto held = xid::containment(*line)) inside(held->unit);
    if (const auto change = xid::recovery(*line)) inside(change->to_text);
    if (const auto fault = xid::link_fault(*line)) inside(fault->sub);
    (void)xid::place(*line);
    (void)xid::nvlink4_words(*line);
    (void)xid::nvlink4_asks(*line);
    (void)xid::find(line->id);
  }
  if (const auto line = xid::parse_switch(text)) {
    inside(line->message);
    (void)xid::find_switch(line->id);
  }
  return 0;
}
