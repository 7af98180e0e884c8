// Small text tools that the standard library lacks.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/units.hpp"

namespace bulkhead {

std::string_view trim(std::string_view text);
std::vector<std::string_view> split(std::string_view text, char separator);
std::vector<std::string_view> split_lines(std::string_view text);
std::string lower(std::string_view text);
std::string join(const std::vector<std::string>& parts, std::string_view separator);

// Whole-string conversions; nullopt on anything left over or out of range.
std::optional<std::uint64_t> parse_u64(std::string_view text, int base = 10);
std::optional<std::int64_t> parse_i64(std::string_view text, int base = 10);

// "0-3,8" -> {0,1,2,3,8}; nullopt on nonsense or more than `limit` numbers.
std::optional<std::vector<unsigned>> parse_ranges(std::string_view text, std::size_t limit = 65536);
// The other way round, shortest form.
std::string format_ranges(std::vector<unsigned> numbers);

// The candidate closest to `word` (edit distance at most a third of its length), for "did you mean"; or
// empty.
std::string_view closest(std::string_view word, const std::vector<std::string_view>& candidates);

// Outside text for a terminal or a log line: control bytes and invalid UTF-8 become \xNN, at most `limit`
// bytes.
std::string printable(std::string_view text, std::size_t limit = 512);

// "39.5 GiB", "80 GiB", "512 MiB".
std::string human(Bytes bytes);

}  // namespace bulkhead
