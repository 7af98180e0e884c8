// A reading is a value, or the reason in words why there is none ("Not Supported", "no driver loaded").
// Used wherever bulkhead shows what a host says: what cannot be read says why.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "base/result.hpp"

namespace bulkhead {

template <class T>
struct Reading {
  std::optional<T> value = std::nullopt;
  std::string why = {};  // why there is no value; empty when there is one

  Reading() = default;
  Reading(T v) : value(std::move(v)) {}  // NOLINT(google-explicit-constructor)
  Reading(Result<T> result) {            // NOLINT(google-explicit-constructor)
    if (result.ok()) {
      value = std::move(result).value();
    } else {
      why = result.error().message();
    }
  }
  static Reading missing(std::string reason) {  // NOLINT(performance-unnecessary-value-param): it is moved
    Reading r;
    r.why = std::move(reason);
    return r;
  }

  explicit operator bool() const { return value.has_value(); }
  const T& operator*() const { return *value; }
  const T* operator->() const { return &*value; }
  T value_or(T otherwise) const { return value.value_or(std::move(otherwise)); }
  friend bool operator==(const Reading&, const Reading&) = default;
};

}  // namespace bulkhead
