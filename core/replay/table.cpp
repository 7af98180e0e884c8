#include "core/replay/table.hpp"

#include <algorithm>
#include <cstring>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/replay/replay.hpp"

namespace bulkhead::replay {

namespace {

constexpr std::size_t kNoColumn = static_cast<std::size_t>(-1);

std::string_view without_blanks(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
  return text;
}

// The next field of a line, which loses it and the comma behind it. `scratch` is written only for doubled
// quotes. Nothing: the quotes do not end, or something follows them; `last`: no comma followed.
std::optional<std::string_view> take_field(std::string_view& line, bool& last, std::string& scratch) {
  std::size_t begin = 0;
  while (begin < line.size() && (line[begin] == ' ' || line[begin] == '\t')) ++begin;
  if (begin == line.size() || line[begin] != '"') {
    const void* comma = line.empty() ? nullptr : std::memchr(line.data(), ',', line.size());
    const std::size_t end = comma == nullptr
                                ? line.size()
                                : static_cast<std::size_t>(static_cast<const char*>(comma) - line.data());
    const std::string_view field = without_blanks(line.substr(0, end));
    last = comma == nullptr;
    line.remove_prefix(last ? end : end + 1);
    return field;
  }
  std::size_t end = begin + 1;
  bool doubled = false;
  for (;; ++end) {
    end = line.find('"', end);
    if (end == std::string_view::npos) return std::nullopt;
    if (end + 1 == line.size() || line[end + 1] != '"') break;
    ++end;
    doubled = true;
  }
  std::string_view field = line.substr(begin + 1, end - begin - 1);
  std::size_t after = end + 1;
  while (after < line.size() && (line[after] == ' ' || line[after] == '\t')) ++after;
  if (after < line.size() && line[after] != ',') return std::nullopt;
  last = after == line.size();
  line.remove_prefix(last ? after : after + 1);
  if (doubled) {
    scratch.clear();
    for (std::size_t i = 0; i < field.size(); ++i) {
      scratch += field[i];
      if (field[i] == '"') ++i;
    }
    field = scratch;
  }
  return field;
}

}  // namespace

void Mistakes::at(std::size_t line, std::string_view what) {
  if (++count_ > kMostMistakes) return;
  if (!text_.empty()) text_ += '\n';
  text_ += line == 0 ? std::string(what) : fmt::format("line {}: {}", line, what);
}

Error Mistakes::error() const {
  std::string text = text_;
  if (count_ > kMostMistakes) text += fmt::format("\nand {} more", count_ - kMostMistakes);
  return {Errc::invalid, text};
}

Table::Table(std::string_view text, std::span<const Column> columns, Mistakes& mistakes)
    : rest_(text),
      mistakes_(mistakes),
      has_(columns.size()),
      fields_(columns.size()),
      unquoted_(columns.size()) {
  if (text.size() > kMostText) {
    mistakes_.at(0, fmt::format("{} bytes; at most {} are read", text.size(), kMostText));
    return;
  }
  if (rest_.substr(0, 3) == "\xef\xbb\xbf") rest_.remove_prefix(3);
  std::string_view line;
  if (!take_line(line)) {
    mistakes_.at(0, "empty; wanted a heading and rows");
    return;
  }
  std::string scratch;
  for (bool last = false; !last;) {
    const auto name = take_field(line, last, scratch);
    if (!name) {
      mistakes_.at(line_, "quotes of the heading do not end");
      return;
    }
    std::size_t column = kNoColumn;
    for (std::size_t i = 0; i < columns.size(); ++i)
      if (std::find(columns[i].names.begin(), columns[i].names.end(), *name) != columns[i].names.end())
        column = i;
    if (column != kNoColumn && has_[column]) {
      mistakes_.at(line_, fmt::format("the heading has {} twice", columns[column].names.front()));
      return;
    }
    if (column != kNoColumn) has_[column] = true;
    wanted_.push_back(column);
  }
  bool whole = true;
  for (std::size_t i = 0; i < columns.size(); ++i) {
    if (!columns[i].needed || has_[i]) continue;
    mistakes_.at(line_, fmt::format("the heading lacks {}", columns[i].names.front()));
    whole = false;
  }
  if (whole) width_ = wanted_.size();
}

bool Table::take_line(std::string_view& line) {
  while (!rest_.empty()) {
    const void* end = std::memchr(rest_.data(), '\n', rest_.size());
    const std::size_t size = end == nullptr
                                 ? rest_.size()
                                 : static_cast<std::size_t>(static_cast<const char*>(end) - rest_.data());
    line = rest_.substr(0, size);
    rest_.remove_prefix(end == nullptr ? size : size + 1);
    ++line_;
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (!without_blanks(line).empty()) return true;
  }
  return false;
}

bool Table::next() {
  if (width_ == 0) return false;
  std::string_view line;
  while (take_line(line))
    if (cut(line)) return true;
  return false;
}

bool Table::cut(std::string_view line) {
  std::size_t count = 0;
  std::string ignored;
  for (bool last = false; !last; ++count) {
    const std::size_t column = count < width_ ? wanted_[count] : kNoColumn;
    const auto field = take_field(line, last, column == kNoColumn ? ignored : unquoted_[column]);
    if (!field) {
      mistakes_.at(line_,
                   fmt::format("field {}: its quotes do not end, or something follows them", count + 1));
      return false;
    }
    if (column != kNoColumn) fields_[column] = *field;
  }
  if (count == width_) return true;
  mistakes_.at(line_, fmt::format("{} fields; the heading has {}", count, width_));
  return false;
}

}  // namespace bulkhead::replay
