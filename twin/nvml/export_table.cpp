// The private table that nvidia-smi asks for. What its slots mean was learned by watching the real program
// (facts/ nvml-clients); those we do not know answer NOT_SUPPORTED and never touch their arguments.
#include <algorithm>
#include <array>
#include <vector>

#include "twin/nvml/library.hpp"

using namespace bulkhead::twin;        // NOLINT(google-build-using-namespace): this file is the library
using namespace bulkhead::twin::nvml;  // NOLINT(google-build-using-namespace)

namespace {

constexpr std::size_t slots = 512;
constexpr unsigned char wanted_guid[16] = {0xc4, 0xfe, 0x3e, 0x6c, 0xc9, 0x8f, 0x6c, 0x4e,
                                           0xa3, 0x27, 0xee, 0x69, 0x6e, 0x12, 0xf7, 0xc4};

int unknown() { return NVML_ERROR_NOT_SUPPORTED; }
int log_hook() { return 0; }

// Slots 213 to 215: the processes of a GPU, as nvidia-smi merges them (by ascending pid): compute, MPS,
// graphics. 4128 bytes an entry.
struct ProcessEntry {
  unsigned pid;
  unsigned long long memory;
  unsigned gpu_instance, compute_instance;
  unsigned long long protected_memory;
  char name[4096];
};
static_assert(sizeof(ProcessEntry) == 4128);

nvmlReturn_t list(nvmlDevice_t device, unsigned* count, ProcessEntry* entries, bool graphics) {
  return ask(
      "nvmlDeviceGetRunningProcessDetailList", device, count != nullptr && entries != nullptr,
      [&](const bulkhead::twin::nvml::Device& d) {
        std::vector<const Process*> found;
        for (const Process& process : d.state->processes) {
          const bool here = !d.is_mig() || (process.gpu_instance == d.instance->id &&
                                            process.compute_instance == d.compute->id);
          if (process.used != 0 && process.gpu == d.slot && here && (process.graphics != 0) == graphics)
            found.push_back(&process);
        }
        std::sort(found.begin(), found.end(), [](const auto* a, const auto* b) { return a->pid < b->pid; });
        return put_list(found, count, entries, [&](const Process* process) {
          ProcessEntry entry{};
          entry.pid = process->pid;
          entry.memory = process->memory_bytes;
          entry.gpu_instance = d.mig_on() ? process->gpu_instance : none;
          entry.compute_instance = d.mig_on() ? process->compute_instance : none;
          put(process->name.view(), entry.name);
          return entry;
        });
      },
      Accept::gpu_or_mig);
}
int compute_list(nvmlDevice_t device, unsigned* count, ProcessEntry* entries) {
  return list(device, count, entries, false);
}
int graphics_list(nvmlDevice_t device, unsigned* count, ProcessEntry* entries) {
  return list(device, count, entries, true);
}
int mps_list(nvmlDevice_t device, unsigned* count, ProcessEntry* entries) {
  return ask(
      "nvmlDeviceGetMPSComputeRunningProcesses_v3", device, count != nullptr && entries != nullptr,
      [&](const bulkhead::twin::nvml::Device&) {
        *count = 0;
        return NVML_SUCCESS;
      },
      Accept::gpu_or_mig);
}

// Slot 23: how near two GPUs lie, by bus id: 0 PIX, 1 PXB, 2 PHB, 3 NODE, 4 SYS. NVLink is nvidia-smi's own
// affair.
int nearness(const char* one, const char* two, int* level) {
  nvmlDevice_t a = nullptr, b = nullptr;
  nvmlGpuTopologyLevel_t common = NVML_TOPOLOGY_SYSTEM;
  if (one == nullptr || two == nullptr || level == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  nvmlReturn_t code = nvmlDeviceGetHandleByPciBusId_v2(one, &a);
  if (code == NVML_SUCCESS) code = nvmlDeviceGetHandleByPciBusId_v2(two, &b);
  if (code == NVML_SUCCESS) code = nvmlDeviceGetTopologyCommonAncestor(a, b, &common);
  if (code == NVML_SUCCESS)
    *level = static_cast<int>(common) / 10 - 1;  // the enum counts in tens from INTERNAL
  return code;
}

// Slot 230: the PCIe generation that the host's port can do.
int host_generation(nvmlDevice_t device, unsigned* out) {
  return nvmlDeviceGetMaxPcieLinkGeneration(device, out);
}

template <class F>
void* slot(F* function) {
  return reinterpret_cast<void*>(function);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) nvmlReturn_t nvmlInternalGetExportTable(const void** table,
                                                                                          const void* guid);
nvmlReturn_t nvmlInternalGetExportTable(const void** table, const void* guid) {
  static const auto* const exported = [] {
    auto* t = new std::array<void*, slots>();
    t->fill(slot(&unknown));
    (*t)[0] = reinterpret_cast<void*>(sizeof(*t));
    (*t)[23] = slot(&nearness);
    (*t)[26] = slot(&log_hook);
    (*t)[81] = slot(&nvmlDeviceGetHandleByIndex_v2);
    (*t)[213] = slot(&compute_list);
    (*t)[214] = slot(&mps_list);
    (*t)[215] = slot(&graphics_list);
    (*t)[230] = slot(&host_generation);
    return t;
  }();
  if (table == nullptr || guid == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  if (std::memcmp(guid, wanted_guid, sizeof wanted_guid) != 0) return NVML_ERROR_NOT_FOUND;
  *table = exported->data();
  return NVML_SUCCESS;
}
