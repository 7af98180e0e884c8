// Names: errors, entry points by version, and the functions that only say no.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#define EXPORT extern "C" [[gnu::visibility("default")]]

// The entry points as names alone: what they take is not this file's business.
#define ROW(name) extern "C" [[gnu::visibility("default")]] void name();
#include "twin/cuda/symbols.inc"
#undef ROW

namespace {

enum Result : int { success = 0, invalid_value = 1, not_found = 500, not_supported = 801 };

struct Symbol {
  const char* name;
  void (*function)();
};
constexpr Symbol symbols[] = {
#define ROW(name) {#name, &name},
#include "twin/cuda/symbols.inc"
#undef ROW
};

struct Form {
  const char* base;
  int form, version;
};
constexpr Form forms[] = {
#define ROW(name, form, version) {#name, form, version},
#include "twin/cuda/versions.inc"
#undef ROW
};

struct Error {
  int code;
  const char *name, *text;
};
constexpr Error errors[] = {
#define ROW(name, code, text) {code, #name, text},
#include "twin/cuda/errors.inc"
#undef ROW
};

void* find_symbol(const std::string& name) {
  const auto* const at =
      std::lower_bound(std::begin(symbols), std::end(symbols), name,
                       [](const Symbol& symbol, const std::string& wanted) { return symbol.name < wanted; });
  return at != std::end(symbols) && at->name == name ? reinterpret_cast<void*>(at->function) : nullptr;
}

constexpr std::uint64_t per_thread_stream = 2;
enum Query : int { found = 0, symbol_not_found = 1, version_not_sufficient = 2 };

// The newest form that is not newer than what the caller was built for.
Query look_up(const char* base, int version, std::uint64_t flags, void*& function) {
  bool known = false;
  int best = 0;
  for (const Form& form : forms) {
    if (std::strcmp(form.base, base) != 0) continue;
    known = true;
    if (form.version <= version) best = std::max(best, form.form);
  }
  if (!known) return symbol_not_found;
  if (best == 0) return version_not_sufficient;
  const std::string name = best == 1 ? base : std::string(base) + "_v" + std::to_string(best);
  function = nullptr;
  if ((flags & per_thread_stream) != 0) {
    for (const char* suffix : {"_ptsz", "_ptds"}) {
      if (function == nullptr) function = find_symbol(name + suffix);
    }
  }
  if (function == nullptr) function = find_symbol(name);
  return function != nullptr ? found : symbol_not_found;
}

const Error* error_of(int code) {
  const auto* const at = std::find_if(std::begin(errors), std::end(errors),
                                      [&](const Error& error) { return error.code == code; });
  return at != std::end(errors) ? at : nullptr;
}

}  // namespace

namespace bulkhead::twin::cuda {
int get_proc_address(const char* symbol, void** function, int version, std::uint64_t flags, int* status) {
  if (symbol == nullptr || *symbol == '\0' || function == nullptr || flags > 3) return invalid_value;
  *function = nullptr;
  const Query answer = look_up(symbol, version, flags, *function);
  if (status != nullptr) *status = answer;
  return answer == found ? success : not_found;
}
int error_name(int code, const char** name) {
  if (name == nullptr) return invalid_value;
  const Error* const error = error_of(code);
  *name = error != nullptr ? error->name : nullptr;
  return error != nullptr ? success : invalid_value;
}
int error_text(int code, const char** text) {
  if (text == nullptr) return invalid_value;
  const Error* const error = error_of(code);
  *text = error != nullptr ? error->text : nullptr;
  return error != nullptr ? success : invalid_value;
}
}  // namespace bulkhead::twin::cuda
