// The private table that nvidia-smi asks for. What its slots mean was learned by watching the real program (facts/
// nvml-clients); those we do not know answer NOT_SUPPORTED and never touch their arguments.
#include <array>
#include <cstdio>
#include <cstdlib>

#include "twin/nvml/library.hpp"

using namespace bulkhead::twin;          // NOLINT(google-build-using-namespace): this file is the library
using namespace bulkhead::twin::nvml;    // NOLINT(google-build-using-namespace)

namespace {

constexpr std::size_t slots = 512;
constexpr unsigned char wanted_guid[16] = {0xc4, 0xfe, 0x3e, 0x6c, 0xc9, 0x8f, 0x6c, 0x4e, 0xa3, 0x27, 0xee, 0x69, 0x6e, 0x12, 0xf7, 0xc4};

int unknown() { return NVML_ERROR_NOT_SUPPORTED; }
int log_hook() { return 0; }

template <int N>
int traced(void* a, void* b, void* c, void* d, void* e) {
  std::fprintf(stderr, "slot %d %p %p %p %p %p\n", N, a, b, c, d, e);
  return NVML_ERROR_NOT_SUPPORTED;
}

template <std::size_t... I>
void fill_traced(void** table, std::index_sequence<I...>) {
  ((table[I] = reinterpret_cast<void*>(&traced<static_cast<int>(I)>)), ...);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) nvmlReturn_t nvmlInternalGetExportTable(const void** table, const void* guid);
nvmlReturn_t nvmlInternalGetExportTable(const void** table, const void* guid) {
  static const auto* const exported = [] {
    auto* t = new std::array<void*, slots>();
    t->fill(reinterpret_cast<void*>(&unknown));
    if (std::getenv("TRACE_SLOTS")) fill_traced(t->data(), std::make_index_sequence<slots>());
    (*t)[0] = reinterpret_cast<void*>(sizeof(*t));
    (*t)[26] = reinterpret_cast<void*>(&log_hook);
    (*t)[81] = reinterpret_cast<void*>(&nvmlDeviceGetHandleByIndex_v2);
    return t;
  }();
  if (table == nullptr || guid == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  if (std::memcmp(guid, wanted_guid, sizeof wanted_guid) != 0) return NVML_ERROR_NOT_FOUND;
  *table = exported->data();
  return NVML_SUCCESS;
}
