// libliar.so: an NVML that lies. Every call goes to the twin's library, which this one is linked to, but for
// the one lie that BULKHEAD_LIE names. Lies about answers make the answer wild; lies about commands say
// SUCCESS and do something else.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

#define NVML_NO_UNVERSIONED_FUNC_DEFS
#include <nvml.h>

#define LIAR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr unsigned wild = 1U << 31U;

bool lie(std::string_view name) {
  static const char* const told = std::getenv("BULKHEAD_LIE");
  return told != nullptr && name == told;
}

// The same function of the twin's library.
template <class F>
F* truth(F*, const char* name) {
  static void* const library = ::dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_NOLOAD);
  void* const found = library == nullptr ? nullptr : ::dlsym(library, name);
  if (found == nullptr) {
    std::fprintf(stderr, "liar: no %s in the twin's library\n", name);
    std::abort();
  }
  return reinterpret_cast<F*>(found);
}
#define TRUTH(function) truth(&function, #function)

}  // namespace

// ---- wild answers
LIAR_EXPORT nvmlReturn_t nvmlDeviceGetCount_v2(unsigned* count) {
  const nvmlReturn_t code = TRUTH(nvmlDeviceGetCount_v2)(count);
  if (lie("device-count")) *count = wild;
  return code;
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t* device) {
  // One that means its count: every index has a device.
  return TRUTH(nvmlDeviceGetHandleByIndex_v2)(lie("device-count") ? index % 2 : index, device);
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char* name, unsigned length) {
  const nvmlReturn_t code = TRUTH(nvmlDeviceGetName)(device, name, length);
  if (lie("name-unterminated")) std::memset(name, 'A', length);
  if (lie("name-control")) std::snprintf(name, length, "\x1b[2J\x1b]0;owned\x07NVIDIA\r\n\xff\xfe%s", "H100");
  return code;
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char* uuid, unsigned length) {
  const nvmlReturn_t code = TRUTH(nvmlDeviceGetUUID)(device, uuid, length);
  if (lie("uuid-equal")) std::snprintf(uuid, length, "GPU-11111111-2222-4333-8444-555555555555");
  if (lie("uuid-control")) std::snprintf(uuid, length, "GPU-\x1b[31m\n../../etc/passwd\r\x07%u", length);
  if (lie("uuid-unterminated")) std::memset(uuid, 'f', length);
  if (lie("uuid-empty")) uuid[0] = '\0';
  return code;
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t* pci) {
  const nvmlReturn_t code = TRUTH(nvmlDeviceGetPciInfo_v3)(device, pci);
  if (lie("pci-wild")) {
    std::memset(pci, 0xff, sizeof *pci);
  }
  return code;
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t* memory) {
  const nvmlReturn_t code = TRUTH(nvmlDeviceGetMemoryInfo)(device, memory);
  if (lie("memory-zero")) *memory = {};
  if (lie("memory-wild")) *memory = {.total = 1, .free = ~0ULL, .used = ~0ULL};
  return code;
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t* memory) {
  const nvmlReturn_t code = TRUTH(nvmlDeviceGetMemoryInfo_v2)(device, memory);
  if (lie("memory-zero")) memory->total = memory->free = memory->used = memory->reserved = 0;
  if (lie("memory-wild")) memory->total = 1, memory->free = memory->used = memory->reserved = ~0ULL;
  return code;
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, nvmlTemperatureSensors_t sensor,
                                                  unsigned* temperature) {
  const nvmlReturn_t code = TRUTH(nvmlDeviceGetTemperature)(device, sensor, temperature);
  if (lie("temperature-wild")) *temperature = 4294967295U;
  // Outside the enumeration, which the compiler would not take: by its bytes.
  nvmlReturn_t unknown = code;
  constexpr int number = 424242;
  std::memcpy(&unknown, &number, sizeof unknown);
  return lie("code-unknown") ? unknown : code;
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, nvmlFieldValue_t* values) {
  if (lie("fields-untouched")) return NVML_SUCCESS;
  const nvmlReturn_t code = TRUTH(nvmlDeviceGetFieldValues)(device, count, values);
  for (int i = 0; lie("fields-wild") && i < count; ++i) {
    values[i].nvmlReturn = NVML_SUCCESS;
    constexpr int type = 77;
    std::memcpy(&values[i].valueType, &type, sizeof values[i].valueType);
    values[i].value.ullVal = ~0ULL;
  }
  return code;
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t device, unsigned* low,
                                                                      unsigned* high) {
  const nvmlReturn_t code = TRUTH(nvmlDeviceGetPowerManagementLimitConstraints)(device, low, high);
  if (lie("limits-crossed")) *low = 4294967295U, *high = 0;
  return code;
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned* now, unsigned* pending) {
  const nvmlReturn_t code = TRUTH(nvmlDeviceGetMigMode)(device, now, pending);
  if (lie("mig-mode-wild")) *now = *pending = 77;
  return code;
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceGetGpuInstancePossiblePlacements_v2(nvmlDevice_t device, unsigned profile,
                                                                       nvmlGpuInstancePlacement_t* places,
                                                                       unsigned* count) {
  const nvmlReturn_t code =
      TRUTH(nvmlDeviceGetGpuInstancePossiblePlacements_v2)(device, profile, places, count);
  if (lie("placement-count")) *count = wild;
  if (lie("placement-wild") && places != nullptr && code == NVML_SUCCESS && *count > 0)
    places[0] = {.start = 4000000000U, .size = 4000000000U};
  return code;
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceGetGpuInstances(nvmlDevice_t device, unsigned profile,
                                                   nvmlGpuInstance_t* instances, unsigned* count) {
  const nvmlReturn_t code = TRUTH(nvmlDeviceGetGpuInstances)(device, profile, instances, count);
  if (lie("instance-count")) *count = wild;
  if (lie("instance-null") && *count > 0) std::memset(instances, 0, *count * sizeof *instances);
  return code;
}

LIAR_EXPORT nvmlReturn_t nvmlGpuInstanceGetInfo(nvmlGpuInstance_t instance, nvmlGpuInstanceInfo_t* info) {
  const nvmlReturn_t code = TRUTH(nvmlGpuInstanceGetInfo)(instance, info);
  if (lie("instance-wild")) info->placement = {.start = 4000000000U, .size = 1};
  return code;
}

LIAR_EXPORT nvmlReturn_t nvmlGpuInstanceGetComputeInstances(nvmlGpuInstance_t instance, unsigned profile,
                                                            nvmlComputeInstance_t* computes,
                                                            unsigned* count) {
  const nvmlReturn_t code = TRUTH(nvmlGpuInstanceGetComputeInstances)(instance, profile, computes, count);
  if (lie("compute-count")) *count = wild;
  return code;
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned* count) {
  const nvmlReturn_t code = TRUTH(nvmlDeviceGetMaxMigDeviceCount)(device, count);
  if (lie("mig-device-count")) *count = wild;
  return code;
}

// A list that is never long enough, and a count nobody can hold.
LIAR_EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned* count,
                                                                 nvmlProcessInfo_t* processes) {
  if (lie("process-grows")) {
    *count = *count < 1000000 ? 1000000 : *count * 2;
    return NVML_ERROR_INSUFFICIENT_SIZE;
  }
  const nvmlReturn_t code = TRUTH(nvmlDeviceGetComputeRunningProcesses_v3)(device, count, processes);
  if (lie("process-count") && processes != nullptr) {
    *count = wild;
    return NVML_SUCCESS;
  }
  return code;
}

// ---- commands that say SUCCESS
LIAR_EXPORT nvmlReturn_t nvmlDeviceSetPowerManagementLimit(nvmlDevice_t device, unsigned limit) {
  if (lie("limit-ignored")) return NVML_SUCCESS;
  return TRUTH(nvmlDeviceSetPowerManagementLimit)(device, limit);
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceSetPersistenceMode(nvmlDevice_t device, nvmlEnableState_t mode) {
  if (lie("persistence-ignored")) return NVML_SUCCESS;
  return TRUTH(nvmlDeviceSetPersistenceMode)(device, mode);
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceSetMigMode(nvmlDevice_t device, unsigned mode, nvmlReturn_t* activation) {
  if (lie("mig-mode-ignored")) {
    *activation = NVML_SUCCESS;
    return NVML_SUCCESS;
  }
  return TRUTH(nvmlDeviceSetMigMode)(device, mode, activation);
}

LIAR_EXPORT nvmlReturn_t nvmlDeviceCreateGpuInstanceWithPlacement(nvmlDevice_t device, unsigned profile,
                                                                  const nvmlGpuInstancePlacement_t* place,
                                                                  nvmlGpuInstance_t* instance) {
  if (lie("create-ignored")) {
    *instance = nullptr;
    return NVML_SUCCESS;
  }
  nvmlGpuInstancePlacement_t where = *place;
  // The last place of the profile instead of the first.
  if (lie("create-elsewhere")) {
    nvmlGpuInstancePlacement_t places[64];
    unsigned count = 64;
    if (TRUTH(nvmlDeviceGetGpuInstancePossiblePlacements_v2)(device, profile, places, &count) ==
        NVML_SUCCESS) {
      for (unsigned i = 0; i < count; ++i) {
        if (places[i].start > where.start) where = places[i];
      }
    }
  }
  return TRUTH(nvmlDeviceCreateGpuInstanceWithPlacement)(device, profile, &where, instance);
}

LIAR_EXPORT nvmlReturn_t nvmlGpuInstanceCreateComputeInstance(nvmlGpuInstance_t instance, unsigned profile,
                                                              nvmlComputeInstance_t* compute) {
  if (lie("compute-ignored")) {
    *compute = nullptr;
    return NVML_SUCCESS;
  }
  return TRUTH(nvmlGpuInstanceCreateComputeInstance)(instance, profile, compute);
}

LIAR_EXPORT nvmlReturn_t nvmlGpuInstanceDestroy(nvmlGpuInstance_t instance) {
  if (lie("destroy-ignored")) return NVML_SUCCESS;
  return TRUTH(nvmlGpuInstanceDestroy)(instance);
}
