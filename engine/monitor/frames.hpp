// Numbers and short texts as bytes and back. The reader checks every length, and stays failed once it is.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

namespace bulkhead::monitor {

class Writer {
 public:
  template <class T>
  void put(T value) {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    char raw[sizeof(T)];
    std::memcpy(raw, &value, sizeof(T));  // both ends are this program on this machine
    out_.append(raw, sizeof(T));
  }
  void text(std::string_view value) {
    value = value.substr(0, most_text);
    put(static_cast<std::uint16_t>(value.size()));
    out_.append(value);
  }
  void reserve(std::size_t bytes) { out_.reserve(bytes); }
  std::string take() { return std::move(out_); }
  static constexpr std::size_t most_text = 1024;

 private:
  std::string out_ = {};
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : left_(bytes) {}
  template <class T>
  T get() {
    static_assert(std::is_arithmetic_v<T>);
    T value{};
    if (left_.size() < sizeof(T)) return fail(), value;
    std::memcpy(&value, left_.data(), sizeof(T));
    left_.remove_prefix(sizeof(T));
    return value;
  }
  bool flag() {
    const auto value = get<std::uint8_t>();
    if (value > 1) fail();
    return value == 1;
  }
  // A number below `end`.
  template <class T>
  T below(T end) {
    const T value = get<T>();
    if (value >= end) return fail(), T{};
    return value;
  }
  template <class E>
  E one_of(E end) {
    return static_cast<E>(below<std::uint8_t>(static_cast<std::uint8_t>(end)));
  }
  std::string text() {
    const auto size = get<std::uint16_t>();
    if (size > Writer::most_text || left_.size() < size) return fail(), std::string();
    std::string value(left_.substr(0, size));
    left_.remove_prefix(size);
    return value;
  }
  bool good() const { return good_; }
  bool whole() const { return good_ && left_.empty(); }  // nothing missing, nothing over

 private:
  void fail() {
    good_ = false;
    left_ = {};
  }
  std::string_view left_;
  bool good_ = true;
};

}  // namespace bulkhead::monitor
