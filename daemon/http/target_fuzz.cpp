// Any bytes as the address of a request line: refused, or one canonical path that no rule can be passed by
// with.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include <fmt/format.h>

#include "daemon/http/target.hpp"

namespace {

bool clean(std::string_view text) {
  for (const char c : text)
    if ((c >= 0 && c < 0x20) || c == 0x7f) return false;
  return bulkhead::http::valid_utf8(text);
}

std::string encoded(std::string_view text, std::string_view keep) {
  std::string out;
  for (const char c : text) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       keep.find(c) != std::string_view::npos;
    out += plain ? std::string(1, c) : fmt::format("%{:02X}", static_cast<unsigned char>(c));
  }
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto target = bulkhead::http::parse_target({reinterpret_cast<const char*>(data), size});
  if (!target) return 0;
  const std::string& path = target->path;
  if (path == "*") return 0;
  if (path.empty() || path.front() != '/' || !clean(path) || path.find('\\') != std::string::npos)
    std::abort();
  if (path.size() > 1 && path.back() == '/') std::abort();
  for (const char* segment : {"//", "/./", "/../"})
    if ((path + "/").find(segment) != std::string::npos && path != "/") std::abort();
  std::string again = encoded(path, "/-._~");
  char separator = '?';
  for (const auto& [key, value] : target->query) {
    if (!clean(key) || !clean(value)) std::abort();
    again += std::exchange(separator, '&') + encoded(key, "") + '=' + encoded(value, "");
  }
  // Encoded anew, it says the same: decoding happened once, not twice.
  const auto second = bulkhead::http::parse_target(again);
  if (!second || second->path != path || second->query != target->query) std::abort();
  return 0;
}
