// BH_ASSERT is for our own bugs only, and stays on in release builds: a wrong plan is worse than a crash that
// the journal survives. The world's faults are Errors.
#pragma once

namespace bulkhead {
[[noreturn]] void assertion_failed(const char* expression, const char* file, int line);
}

#define BH_ASSERT(expression) \
  ((expression) ? static_cast<void>(0) : ::bulkhead::assertion_failed(#expression, __FILE__, __LINE__))
