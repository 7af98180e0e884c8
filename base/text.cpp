#include "base/text.hpp"

#include <algorithm>
#include <charconv>

#include <fmt/format.h>

namespace bulkhead {

namespace {
constexpr std::string_view white_space = " \t\r\n\v\f";
template <class Int>
std::optional<Int> parse_int(std::string_view text, int base) {
  if (base == 16 && (text.starts_with("0x") || text.starts_with("0X"))) text.remove_prefix(2);
  Int value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (error != std::errc() || end != text.data() + text.size() || text.empty()) return std::nullopt;
  return value;
}
}  // namespace

std::string_view trim(std::string_view text) {
  const auto first = text.find_first_not_of(white_space);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(white_space) - first + 1);
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  while (true) {
    const auto at = text.find(separator);
    parts.push_back(text.substr(0, at));
    if (at == std::string_view::npos) return parts;
    text.remove_prefix(at + 1);
  }
}

std::vector<std::string_view> split_lines(std::string_view text) {
  if (text.ends_with('\n')) text.remove_suffix(1);
  if (text.empty()) return {};
  return split(text, '\n');
}

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return out;
}

std::string join(const std::vector<std::string>& parts, std::string_view separator) {
  return fmt::format("{}", fmt::join(parts, separator));
}

std::optional<std::uint64_t> parse_u64(std::string_view text, int base) {
  return parse_int<std::uint64_t>(text, base);
}
std::optional<std::int64_t> parse_i64(std::string_view text, int base) {
  return parse_int<std::int64_t>(text, base);
}

std::optional<std::vector<unsigned>> parse_ranges(std::string_view text, std::size_t limit) {
  std::vector<unsigned> numbers;
  for (const auto part : split(trim(text), ',')) {
    const auto ends = split(trim(part), '-');
    if (ends.size() > 2) return std::nullopt;
    const auto first = parse_u64(ends.front());
    const auto last = parse_u64(ends.back());
    if (!first || !last || *first > *last || *last > 0xffffffffU) return std::nullopt;
    if (*last - *first >= limit - std::min(limit, numbers.size())) return std::nullopt;
    for (auto n = *first; n <= *last; ++n) numbers.push_back(static_cast<unsigned>(n));
  }
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  return numbers;
}

std::string format_ranges(std::vector<unsigned> numbers) {
  std::sort(numbers.begin(), numbers.end());
  std::string out;
  for (std::size_t i = 0; i < numbers.size();) {
    std::size_t j = i;
    while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) ++j;
    if (!out.empty()) out += ',';
    out += i == j ? fmt::format("{}", numbers[i]) : fmt::format("{}-{}", numbers[i], numbers[j]);
    i = j + 1;
  }
  return out;
}

std::string_view closest(std::string_view word, const std::vector<std::string_view>& candidates) {
  if (word.size() > 64) return {};
  std::string_view best;
  std::size_t best_distance = std::max<std::size_t>(1, word.size() / 3) + 1;
  for (const auto candidate : candidates) {
    std::vector<std::size_t> row(candidate.size() + 1);
    for (std::size_t j = 0; j < row.size(); ++j) row[j] = j;
    for (std::size_t i = 0; i < word.size(); ++i) {
      std::size_t diagonal = row[0]++;
      for (std::size_t j = 0; j < candidate.size(); ++j) {
        const std::size_t substitute = diagonal + (word[i] == candidate[j] ? 0U : 1U);
        diagonal = row[j + 1];
        row[j + 1] = std::min({substitute, row[j] + 1, row[j + 1] + 1});
      }
    }
    if (row.back() < best_distance) {
      best_distance = row.back();
      best = candidate;
    }
  }
  return best;
}

std::string printable(std::string_view text, std::size_t limit) {
  std::string out;
  for (std::size_t i = 0; i < text.size();) {
    if (out.size() >= limit) return out + "...";
    const auto byte = static_cast<unsigned char>(text[i]);
    const std::size_t length = byte < 0x80              ? 1
                               : (byte & 0xe0U) == 0xc0 ? 2
                               : (byte & 0xf0U) == 0xe0 ? 3
                               : (byte & 0xf8U) == 0xf0 ? 4
                                                        : 0;
    bool good = length > 0 && i + length <= text.size() && (length > 1 || (byte >= 0x20 && byte != 0x7f));
    for (std::size_t k = 1; good && k < length; ++k)
      good = (static_cast<unsigned char>(text[i + k]) & 0xc0U) == 0x80;
    if (good && length == 2 && byte < 0xc3 && static_cast<unsigned char>(text[i + 1]) < 0xa0)
      good = false;  // C1 controls
    if (good) {
      out.append(text.substr(i, length));
      i += length;
    } else {
      out += fmt::format("\\x{:02x}", byte);
      ++i;
    }
  }
  return out;
}

std::string human(Bytes bytes) {
  static constexpr const char* names[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes.count);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(names)) {
    value /= 1024;
    ++unit;
  }
  const bool whole = value >= 100 || value == static_cast<double>(static_cast<std::uint64_t>(value));
  return whole ? fmt::format("{:.0f} {}", value, names[unit]) : fmt::format("{:.1f} {}", value, names[unit]);
}

}  // namespace bulkhead
