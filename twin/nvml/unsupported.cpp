// Entry points that this host has no hardware or feature for: vGPU, S-class units, fans, confidential
// computing and what the newest drivers added. Each checks what it is given and answers NOT_SUPPORTED; the
// rows are of nvml.h 13 and of the real library's symbol list. In a file of its own, without the vendor's
// header: one shape of function serves all.
#include <cstdint>
#include <string_view>

namespace bulkhead::twin::nvml {
int check_unsupported(const char* function, std::string_view shape, void* const* arguments);
}

// Shape: d a GPU's handle, i a GPU instance's, p a pointer that must not be null, s a number or anything
// unchecked.
#define UNSUPPORTED(name, shape)                                                                          \
  extern "C" __attribute__((visibility("default"))) int name(void* a, void* b, void* c, void* d, void* e, \
                                                             void* f);                                    \
  extern "C" int name(void* a, void* b, void* c, void* d, void* e, void* f) {                             \
    void* const arguments[] = {a, b, c, d, e, f};                                                         \
    return bulkhead::twin::nvml::check_unsupported(#name, shape, arguments);                              \
  }
#include "twin/nvml/unsupported.inc"
