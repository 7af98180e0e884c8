// Comma-separated text, one pass, nothing copied but quoted fields. Private to core/replay.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.hpp"

namespace bulkhead::replay {

// The mistakes of one list: the first kMostMistakes in words, the others counted.
class Mistakes {
 public:
  void at(std::size_t line, std::string_view what);  // line 0: of the list as a whole
  bool none() const { return count_ == 0; }
  Error error() const;  // of at least one

 private:
  std::string text_;
  std::size_t count_ = 0;
};

// A column that a list may have: its names (any of them), and whether the list needs it.
struct Column {
  std::vector<std::string_view> names;
  bool needed = true;
};

// Reads the heading in its constructor, then a row a call.
class Table {
 public:
  Table(std::string_view text, std::span<const Column> columns, Mistakes& mistakes);
  bool has(std::size_t column) const { return has_[column]; }
  // False at the end (or when the heading was no good). A row that cannot be read is told and skipped.
  bool next();
  std::size_t line() const { return line_; }
  // Of the present row; empty where the list lacks the column. Valid until next().
  std::string_view field(std::size_t column) const { return fields_[column]; }

 private:
  bool take_line(std::string_view& line);
  // Sets fields_ from a row, or tells why not.
  bool cut(std::string_view line);

  std::string_view rest_;
  Mistakes& mistakes_;
  std::size_t line_ = 0;
  std::size_t width_ = 0;            // fields of the heading; 0: no heading
  std::vector<std::size_t> wanted_;  // for each field of the heading, the column, or none
  std::vector<bool> has_;
  std::vector<std::string_view> fields_;
  std::vector<std::string> unquoted_;  // by column: a field that had quotes inside quotes
};

}  // namespace bulkhead::replay
