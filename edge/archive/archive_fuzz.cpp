// Any bytes as a bundle: refused or read within the bounds, and what was read packs and reads the same again.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "edge/archive/archive.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace bulkhead;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  constexpr std::size_t limit = 1U << 20U;

  const auto members = [&](std::string_view content) {
    const auto read = archive::untar(content);
    if (!read) return;
    std::size_t sum = 0;
    for (const auto& member : *read) {
      sum += member.content.size();
      if (member.name.size() >= 512) __builtin_trap();
    }
    if (read->size() > 10'000 || sum > content.size()) __builtin_trap();
  };
  (void)archive::is_tar(bytes);
  members(bytes);
  if (const auto plain = archive::gunzip(bytes, limit); plain) {
    if (plain->size() > limit) __builtin_trap();
    members(*plain);
  }
  // There and back.
  const auto packed = archive::gzip(bytes);
  if (!packed || !archive::is_gzip(*packed)) __builtin_trap();
  const auto back = archive::gunzip(*packed, size + 1);
  if (!back || *back != bytes) __builtin_trap();
  const auto box = archive::tar({{"bundle/a", std::string(bytes)}}, WallTime(std::chrono::milliseconds(0)));
  if (!box) __builtin_trap();
  const auto out = archive::untar(*box);
  if (!out || out->size() != 1 || out->front().content != bytes || out->front().name != "bundle/a")
    __builtin_trap();
  return 0;
}
