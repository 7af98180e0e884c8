// Errors are values. A fallible function returns Result<T>; an Error carries context outermost first, like a
// path ("apply: gpu 3: enable MIG: in use by pid 4711 (python3)"), and a hint: the next command to type.
// Return an error or log it, never both. A refusal is an answer with reasons and has its own types in core.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "base/check.hpp"

namespace bulkhead {

// What a caller may react to. A code exists only if some code reacts to it.
enum class Errc {
  invalid,      // the input is wrong; nothing was done
  not_found,    // the named thing does not exist
  unsupported,  // this host, driver or chip cannot do it
  in_use,       // somebody holds the thing
  permission,   // the caller may not
  no_capacity,  // it does not fit (GPU slices, disk)
  io,           // the system refused to read or write
  timeout,      // no answer within the deadline
  gone,         // a handle outlived its thing, a device fell off the bus
  conflict,     // the world changed between plan and act
  corrupt,      // outside data breaks its own rules
  unavailable,  // the driver, daemon or bus is not there
};

std::string_view name_of(Errc code);

class [[nodiscard]] Error {
 public:
  Error(Errc code, std::string message, std::string hint = {}, int native = 0)
      : code_(code), message_(std::move(message)), hint_(std::move(hint)), native_(native) {}

  // Puts `outer` in front: Error("no such file").in("read /etc/x") -> "read /etc/x: no such file".
  [[nodiscard]] Error in(std::string_view outer) && {
    message_.insert(0, std::string(outer) + ": ");
    return std::move(*this);
  }
  [[nodiscard]] Error with_hint(std::string hint) && {
    hint_ = std::move(hint);
    return std::move(*this);
  }

  Errc code() const { return code_; }
  const std::string& message() const { return message_; }
  const std::string& hint() const { return hint_; }  // empty when there is nothing useful to say
  int native() const { return native_; }             // errno or nvmlReturn_t; 0 when neither

 private:
  Errc code_;
  std::string message_;
  std::string hint_;
  int native_;
};

// An Error made from errno: "open /x: Permission denied", with the fitting code.
Error errno_error(std::string_view what, int err);

template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value)
      : state_(std::in_place_index<0>, std::move(value)) {}  // NOLINT(google-explicit-constructor)
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}  // NOLINT

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }

  T& value() & {
    BH_ASSERT(ok());
    return *std::get_if<0>(&state_);
  }
  const T& value() const& {
    BH_ASSERT(ok());
    return *std::get_if<0>(&state_);
  }
  T&& value() && {
    BH_ASSERT(ok());
    return std::move(*std::get_if<0>(&state_));
  }
  T value_or(T otherwise) const& { return ok() ? value() : std::move(otherwise); }

  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

  const Error& error() const& {
    BH_ASSERT(!ok());
    return *std::get_if<1>(&state_);
  }
  Error&& error() && {
    BH_ASSERT(!ok());
    return std::move(*std::get_if<1>(&state_));
  }

 private:
  std::variant<T, Error> state_;
};

struct Unit {};
using Status = Result<Unit>;
inline Status ok_status() { return Unit{}; }

}  // namespace bulkhead

#define BH_CONCAT_(a, b) a##b
#define BH_CONCAT(a, b) BH_CONCAT_(a, b)
#define BH_TRY_(tmp, decl, expr)                \
  auto tmp = (expr);                            \
  if (!tmp.ok()) return std::move(tmp).error(); \
  decl = std::move(tmp).value()
// BH_TRY(auto bytes, read_file(path)): binds the value or returns the error.
#define BH_TRY(decl, expr) BH_TRY_(BH_CONCAT(bh_try_, __LINE__), decl, expr)
#define BH_CHECK_(tmp, expr)                                         \
  do {                                                               \
    if (auto tmp = (expr); !tmp.ok()) return std::move(tmp).error(); \
  } while (false)
// BH_CHECK(write_file(path, text)): returns the error, if any. Nests: the name inside differs line by line.
#define BH_CHECK(expr) BH_CHECK_(BH_CONCAT(bh_status_, __LINE__), expr)
