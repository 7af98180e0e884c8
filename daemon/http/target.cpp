#include "daemon/http/target.hpp"

#include <cstdint>

namespace bulkhead::http {
namespace {

constexpr std::size_t parameters = 256;

int hex_of(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// Once: "%252e" stays "%2e", a name like any other.
bool decode(std::string_view sent, bool plus_is_space, std::string& out) {
  out.clear();
  out.reserve(sent.size());
  bool plain = true;
  for (std::size_t i = 0; i < sent.size(); ++i) {
    char c = sent[i];
    if (c == '%') {
      if (i + 2 >= sent.size()) return false;
      const int high = hex_of(sent[i + 1]), low = hex_of(sent[i + 2]);
      if (high < 0 || low < 0) return false;
      c = static_cast<char>(high * 16 + low);
      i += 2;
    } else if (c == '+' && plus_is_space) {
      c = ' ';
    }
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) return false;
    plain = plain && byte < 0x80;
    out.push_back(c);
  }
  return plain || valid_utf8(out);
}

bool parse_path(std::string_view sent, std::string& path) {
  std::string segment;
  path.clear();
  path.reserve(sent.size());
  for (std::size_t at = 0; at < sent.size();) {
    if (sent[at] == '/') {
      ++at;
      continue;
    }
    const std::size_t end = std::min(sent.find('/', at), sent.size());
    if (!decode(sent.substr(at, end - at), false, segment)) return false;
    at = end;
    if (segment == ".") continue;
    if (segment == ".." || segment.find_first_of("/\\") != std::string::npos) return false;
    path += '/';
    path += segment;
  }
  if (path.empty()) path = "/";
  return true;
}

}  // namespace

bool valid_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto first = static_cast<unsigned char>(text[i++]);
    if (first < 0x80) continue;
    int more = 0;
    std::uint32_t point = 0, least = 0;
    if ((first & 0xe0) == 0xc0) {
      more = 1, point = first & 0x1fU, least = 0x80;
    } else if ((first & 0xf0) == 0xe0) {
      more = 2, point = first & 0x0fU, least = 0x800;
    } else if ((first & 0xf8) == 0xf0) {
      more = 3, point = first & 0x07U, least = 0x10000;
    } else {
      return false;
    }
    for (; more > 0; --more) {
      if (i == text.size()) return false;
      const auto next = static_cast<unsigned char>(text[i++]);
      if ((next & 0xc0) != 0x80) return false;
      point = (point << 6) | (next & 0x3fU);
    }
    // Overlong forms spell a character a second way; surrogates are no characters.
    if (point < least || point > 0x10ffff || (point >= 0xd800 && point <= 0xdfff)) return false;
  }
  return true;
}

std::optional<Target> parse_target(std::string_view sent) {
  for (const char c : sent) {
    if (c <= 0x20 || c >= 0x7f || c == '#' || c == '\\') return std::nullopt;
  }
  Target target;
  if (sent == "*") {
    target.path = "*";
    return target;
  }
  for (const std::string_view scheme : {"http://", "https://"}) {
    if (sent.starts_with(scheme)) {
      sent.remove_prefix(scheme.size());
      const std::size_t end = sent.find_first_of("/?");
      if (end == 0) return std::nullopt;
      sent.remove_prefix(std::min(end, sent.size()));
      if (sent.empty() || sent.front() == '?') {
        target.path = "/";
      }
      break;
    }
  }
  if (target.path.empty() && (sent.empty() || sent.front() != '/')) return std::nullopt;
  const std::size_t mark = std::min(sent.find('?'), sent.size());
  if (!parse_path(sent.substr(0, mark), target.path)) return std::nullopt;
  std::string_view rest = sent.substr(std::min(mark + 1, sent.size()));
  while (!rest.empty()) {
    const std::size_t end = std::min(rest.find('&'), rest.size());
    const std::string_view pair = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (pair.empty()) continue;
    if (target.query.size() == parameters) return std::nullopt;
    const std::size_t equals = std::min(pair.find('='), pair.size());
    auto& [name, value] = target.query.emplace_back();
    if (!decode(pair.substr(0, equals), true, name)) return std::nullopt;
    if (equals < pair.size() && !decode(pair.substr(equals + 1), true, value)) return std::nullopt;
  }
  return target;
}

}  // namespace bulkhead::http
