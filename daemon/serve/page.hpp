// Lines of a Prometheus page, text format 0.0.4. Written straight into one string: a page of thousands of
// lines is made while a scraper waits.
#pragma once

#include <charconv>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace bulkhead::serve {

// What a label may say: the three that the format escapes; anything else outside printable ASCII is a dot,
// because names come from drivers, BMCs and tenants.
inline std::string label(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (const char c : text) {
    if (c == '\\' || c == '"') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else {
      out += static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) > 0x7e ? '.' : c;
    }
  }
  return out;
}

class Page {
 public:
  explicit Page(std::string_view prefix = "bulkhead_") : prefix_(prefix) {}
  // `type`: counter, gauge. Its lines follow; one that gets none leaves no trace.
  void family(std::string_view name, std::string_view type, std::string_view help) {
    name_.assign(prefix_).append(name);
    type_ = type;
    help_ = help;
    told_ = false;
  }
  template <class Number>
  void value(std::string_view labels, Number number) {
    begin();
    if (!labels.empty()) out_.append("{").append(labels).append("}");
    put(number);
  }
  // With one label more; `word` needs no escapes.
  template <class Number>
  void value(std::string_view labels, std::string_view key, std::string_view word, Number number) {
    begin();
    out_.append("{").append(labels).append(",").append(key).append("=\"").append(word).append("\"}");
    put(number);
  }
  template <class Number>
  void one(std::string_view name, std::string_view type, std::string_view help, Number number) {
    family(name, type, help);
    value("", number);
  }
  void reserve(std::size_t bytes) { out_.reserve(bytes); }
  // Lines made elsewhere.
  void append(std::string_view lines) { out_ += lines; }
  std::string text() && { return std::move(out_); }

 private:
  void begin() {
    if (!told_) {
      told_ = true;
      out_.append("# HELP ").append(name_).append(" ").append(help_);
      out_.append("\n# TYPE ").append(name_).append(" ").append(type_).append("\n");
    }
    out_ += name_;
  }
  template <class Number>
  void put(Number number) {
    char text[40];
    std::to_chars_result end{};
    if constexpr (std::is_same_v<Number, bool>)
      end = std::to_chars(text, text + sizeof text, number ? 1 : 0);
    else
      end = std::to_chars(text, text + sizeof text, number);
    out_ += ' ';
    out_.append(text, end.ptr);
    out_ += '\n';
  }
  const std::string_view prefix_;
  std::string name_ = {}, out_ = {};
  std::string_view type_ = {}, help_ = {};
  bool told_ = false;
};

}  // namespace bulkhead::serve
