#include "twin/ask/ask.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

#include <fmt/format.h>

#define NVML_NO_UNVERSIONED_FUNC_DEFS
#include <nvml.h>

#include "base/clock.hpp"
#include "base/fd.hpp"

namespace bulkhead::twin {

namespace {

constexpr std::size_t answer_bytes = 4U << 20U;

// One library in the child process.
class Library {
 public:
  explicit Library(void* handle) : handle_(handle) {}

  Json error(int code) const {
    using Name = const char* (*)(int);
    const auto name = reinterpret_cast<Name>(::dlsym(handle_, "nvmlErrorString"));
    return Json{{"error", name != nullptr ? name(code) : "?"}, {"code", code}};
  }

  // Calls a function by name; `read` makes the answer of its outputs.
  template <class Read, class... A>
  Json call(const char* name, Read read, A... arguments) const {
    using Function = int (*)(A...);
    const auto function = reinterpret_cast<Function>(::dlsym(handle_, name));
    if (function == nullptr) return Json{{"error", "Function Not Found"}, {"code", 13}};
    const int code = function(arguments...);
    return code == 0 ? Json(read()) : error(code);
  }

 private:
  void* handle_;
};

enum class Shape {
  number,
  wide,
  integer,
  two,
  two_integers,
  three,
  four,
  text,
  text_fixed,
  list,
  processes,
  probe
};

struct Question {
  const char* name;
  Shape shape;
  unsigned version = 0, size = 0;  // of the structure, for `probe` and the like
};

// What the recordings asked of a GPU and takes no argument but outputs.
constexpr Question questions[] = {
    {"nvmlDeviceGetAccountingBufferSize", Shape::number},
    {"nvmlDeviceGetAccountingMode", Shape::number},
    {"nvmlDeviceGetAccountingPids", Shape::list},
    {"nvmlDeviceGetActiveVgpus", Shape::list},
    {"nvmlDeviceGetAdaptiveClockInfoStatus", Shape::number},
    {"nvmlDeviceGetArchitecture", Shape::number},
    {"nvmlDeviceGetAttributes", Shape::probe},
    {"nvmlDeviceGetAttributes_v2", Shape::probe},
    {"nvmlDeviceGetAutoBoostedClocksEnabled", Shape::two},
    {"nvmlDeviceGetBoardId", Shape::number},
    {"nvmlDeviceGetBoardPartNumber", Shape::text},
    {"nvmlDeviceGetBrand", Shape::number},
    {"nvmlDeviceGetBridgeChipInfo", Shape::probe},
    {"nvmlDeviceGetBusType", Shape::number},
    {"nvmlDeviceGetClkMonStatus", Shape::probe},
    {"nvmlDeviceGetComputeInstanceId", Shape::number},
    {"nvmlDeviceGetComputeMode", Shape::number},
    {"nvmlDeviceGetComputeRunningProcesses", Shape::processes},
    {"nvmlDeviceGetComputeRunningProcesses_v2", Shape::processes},
    {"nvmlDeviceGetComputeRunningProcesses_v3", Shape::processes},
    {"nvmlDeviceGetConfComputeGpuCertificate", Shape::probe},
    {"nvmlDeviceGetCreatableVgpus", Shape::list},
    {"nvmlDeviceGetCudaComputeCapability", Shape::two_integers},
    {"nvmlDeviceGetCurrPcieLinkGeneration", Shape::number},
    {"nvmlDeviceGetCurrPcieLinkWidth", Shape::number},
    {"nvmlDeviceGetCurrentClocksEventReasons", Shape::wide},
    {"nvmlDeviceGetCurrentClocksThrottleReasons", Shape::wide},
    {"nvmlDeviceGetDecoderUtilization", Shape::two},
    {"nvmlDeviceGetDisplayActive", Shape::number},
    {"nvmlDeviceGetDisplayMode", Shape::number},
    {"nvmlDeviceGetDriverModel", Shape::two},
    {"nvmlDeviceGetDriverModel_v2", Shape::two},
    {"nvmlDeviceGetFanSpeedRPM", Shape::probe, 1, 12},
    {"nvmlDeviceGetEccMode", Shape::two},
    {"nvmlDeviceGetEncoderSessions", Shape::list},
    {"nvmlDeviceGetEncoderStats", Shape::three},
    {"nvmlDeviceGetEncoderUtilization", Shape::two},
    {"nvmlDeviceGetEnforcedPowerLimit", Shape::number},
    {"nvmlDeviceGetFBCSessions", Shape::list},
    {"nvmlDeviceGetFanSpeed", Shape::number},
    {"nvmlDeviceGetGpcClkMinMaxVfOffset", Shape::two_integers},
    {"nvmlDeviceGetGpcClkVfOffset", Shape::integer},
    {"nvmlDeviceGetGpuInstanceId", Shape::number},
    {"nvmlDeviceGetGpuMaxPcieLinkGeneration", Shape::number},
    {"nvmlDeviceGetGpuOperationMode", Shape::two},
    {"nvmlDeviceGetGraphicsRunningProcesses", Shape::processes},
    {"nvmlDeviceGetGraphicsRunningProcesses_v2", Shape::processes},
    {"nvmlDeviceGetGraphicsRunningProcesses_v3", Shape::processes},
    {"nvmlDeviceGetGspFirmwareMode", Shape::two},
    {"nvmlDeviceGetGspFirmwareVersion", Shape::text_fixed},
    {"nvmlDeviceGetHostVgpuMode", Shape::number},
    {"nvmlDeviceGetIndex", Shape::number},
    {"nvmlDeviceGetInforomConfigurationChecksum", Shape::number},
    {"nvmlDeviceGetInforomImageVersion", Shape::text},
    {"nvmlDeviceGetIrqNum", Shape::number},
    {"nvmlDeviceGetJpgUtilization", Shape::two},
    {"nvmlDeviceGetLastBBXFlushTime", Shape::two},
    {"nvmlDeviceGetMPSComputeRunningProcesses", Shape::processes},
    {"nvmlDeviceGetMPSComputeRunningProcesses_v2", Shape::processes},
    {"nvmlDeviceGetMPSComputeRunningProcesses_v3", Shape::processes},
    {"nvmlDeviceGetMaxMigDeviceCount", Shape::number},
    {"nvmlDeviceGetMaxPcieLinkGeneration", Shape::number},
    {"nvmlDeviceGetMaxPcieLinkWidth", Shape::number},
    {"nvmlDeviceGetMemClkMinMaxVfOffset", Shape::two_integers},
    {"nvmlDeviceGetMemClkVfOffset", Shape::integer},
    {"nvmlDeviceGetMemoryBusWidth", Shape::number},
    {"nvmlDeviceGetMigMode", Shape::two},
    {"nvmlDeviceGetMinMaxFanSpeed", Shape::two},
    {"nvmlDeviceGetMinorNumber", Shape::number},
    {"nvmlDeviceGetModuleId", Shape::number},
    {"nvmlDeviceGetMultiGpuBoard", Shape::number},
    {"nvmlDeviceGetName", Shape::text},
    {"nvmlDeviceGetNumFans", Shape::number},
    {"nvmlDeviceGetNumGpuCores", Shape::number},
    {"nvmlDeviceGetNumaNodeId", Shape::number},
    {"nvmlDeviceGetOfaUtilization", Shape::two},
    {"nvmlDeviceGetPcieLinkMaxSpeed", Shape::number},
    {"nvmlDeviceGetPcieReplayCounter", Shape::number},
    {"nvmlDeviceGetPcieSpeed", Shape::number},
    {"nvmlDeviceGetPerformanceState", Shape::number},
    {"nvmlDeviceGetPersistenceMode", Shape::number},
    {"nvmlDeviceGetPowerManagementDefaultLimit", Shape::number},
    {"nvmlDeviceGetPowerManagementLimit", Shape::number},
    {"nvmlDeviceGetPowerManagementLimitConstraints", Shape::two},
    {"nvmlDeviceGetPowerManagementMode", Shape::number},
    {"nvmlDeviceGetPowerSource", Shape::number},
    {"nvmlDeviceGetPowerState", Shape::number},
    {"nvmlDeviceGetPowerUsage", Shape::number},
    {"nvmlDeviceGetRemappedRows", Shape::four},
    {"nvmlDeviceGetRetiredPagesPendingStatus", Shape::number},
    {"nvmlDeviceGetSerial", Shape::text},
    {"nvmlDeviceGetSupportedClocksEventReasons", Shape::wide},
    {"nvmlDeviceGetSupportedClocksThrottleReasons", Shape::wide},
    {"nvmlDeviceGetSupportedEventTypes", Shape::wide},
    {"nvmlDeviceGetSupportedMemoryClocks", Shape::list},
    {"nvmlDeviceGetSupportedVgpus", Shape::list},
    {"nvmlDeviceGetTotalEnergyConsumption", Shape::wide},
    {"nvmlDeviceGetUUID", Shape::text},
    {"nvmlDeviceGetVbiosVersion", Shape::text},
    {"nvmlDeviceGetVgpuHeterogeneousMode", Shape::probe, 1, 8},
    {"nvmlDeviceGetVgpuSchedulerCapabilities", Shape::probe},
    {"nvmlDeviceGetVgpuSchedulerLog", Shape::probe},
    {"nvmlDeviceGetVgpuSchedulerState", Shape::probe},
    {"nvmlDeviceGetVirtualizationMode", Shape::number},
};

// Structures with a version word that hold one or two numbers behind it.
struct Versioned {
  const char* name;
  unsigned version, size;
  bool wide;
  unsigned numbers;
};
constexpr Versioned versioned[] = {
    {"nvmlDeviceGetAddressingMode", 1, 8, false, 1},
    {"nvmlDeviceGetMarginTemperature", 1, 8, false, 1},
    {"nvmlDeviceGetPdi", 1, 16, true, 1},
    {"nvmlDeviceGetRepairStatus", 1, 12, false, 2},
};

Json simple(const Library& library, const Question& q, nvmlDevice_t device) {
  std::array<unsigned, 4> n{};
  unsigned long long wide = 0;
  std::array<unsigned long, 8192> buffer{};  // the largest structure (a vGPU scheduler log) is 8 KiB
  char text[256] = {};
  switch (q.shape) {
    case Shape::number:
      return library.call(
          q.name, [&] { return Json(n[0]); }, device, &n[0]);
    case Shape::integer:
      return library.call(
          q.name, [&] { return Json(static_cast<int>(n[0])); }, device, &n[0]);
    case Shape::wide:
      return library.call(
          q.name, [&] { return Json(wide); }, device, &wide);
    case Shape::two:
      // LastBBXFlushTime writes two wide words: room for both, the low halves are read.
      return library.call(
          q.name,
          [&] {
            return Json{static_cast<unsigned>(buffer[0]), static_cast<unsigned>(buffer[2])};
          },
          device, &buffer[0], &buffer[2]);
    case Shape::two_integers:
      return library.call(
          q.name,
          [&] {
            return Json{static_cast<int>(n[0]), static_cast<int>(n[1])};
          },
          device, &n[0], &n[1]);
    case Shape::three:
      return library.call(
          q.name,
          [&] {
            return Json{n[0], n[1], n[2]};
          },
          device, &n[0], &n[1], &n[2]);
    case Shape::four:
      return library.call(
          q.name,
          [&] {
            return Json{n[0], n[1], n[2], n[3]};
          },
          device, &n[0], &n[1], &n[2], &n[3]);
    case Shape::text:
      return library.call(
          q.name, [&] { return Json(text); }, device, &text[0], 96U);
    case Shape::text_fixed:
      return library.call(
          q.name, [&] { return Json(text); }, device, &text[0]);
    case Shape::list: {
      std::array<unsigned, 1024> items{};
      unsigned count = items.size();
      if (std::strstr(q.name, "Sessions") != nullptr)
        count = 0;  // entries are structures: ask for the number alone
      return library.call(
          q.name,
          [&] {
            return Json(
                std::vector<unsigned>(items.begin(), items.begin() + std::min<unsigned>(count, 1024)));
          },
          device, &count, &items[0]);
    }
    case Shape::processes: {
      // The pids, whatever the version of the entries: only their number is compared.
      unsigned count = 0;
      Json found = Json::array();
      const Json answer = library.call(
          q.name, [&] { return Json::array(); }, device, &count, static_cast<void*>(nullptr));
      if (answer.is_object() && answer.value("code", 0) == NVML_ERROR_INSUFFICIENT_SIZE)
        return Json::array({count});
      return answer;
    }
    case Shape::probe: {
      const unsigned word = q.size | q.version << 24U;
      std::memcpy(buffer.data(), &word, sizeof word);
      return library.call(
          q.name, [] { return Json("answered"); }, device, &buffer[0]);
    }
  }
  return {};
}

Json pci_info(const Library& library, const char* name, nvmlDevice_t device) {
  nvmlPciInfo_t pci{};
  return library.call(
      name,
      [&] {
        return Json{{"busIdLegacy", pci.busIdLegacy},
                    {"domain", pci.domain},
                    {"bus", pci.bus},
                    {"device", pci.device},
                    {"pciDeviceId", pci.pciDeviceId},
                    {"pciSubSystemId", pci.pciSubSystemId},
                    {"busId", pci.busId}};
      },
      device, &pci);
}

void structures(const Library& library, nvmlDevice_t device, Json& out) {
  nvmlBAR1Memory_t bar{};
  out["nvmlDeviceGetBAR1MemoryInfo"] = library.call(
      "nvmlDeviceGetBAR1MemoryInfo",
      [&] {
        return Json{{"bar1Total", bar.bar1Total}, {"bar1Free", bar.bar1Free}, {"bar1Used", bar.bar1Used}};
      },
      device, &bar);
  nvmlMemory_t memory{};
  const auto three = [&] {
    return Json{{"total", memory.total}, {"free", memory.free}, {"used", memory.used}};
  };
  out["nvmlDeviceGetMemoryInfo"] = library.call("nvmlDeviceGetMemoryInfo", three, device, &memory);
  memory = {};
  out["nvmlDeviceGetConfComputeProtectedMemoryUsage"] =
      library.call("nvmlDeviceGetConfComputeProtectedMemoryUsage", three, device, &memory);
  unsigned long long kib[2] = {};
  out["nvmlDeviceGetConfComputeMemSizeInfo"] = library.call(
      "nvmlDeviceGetConfComputeMemSizeInfo",
      [&] {
        return Json{{"protectedMemSizeKib", kib[0]}, {"unprotectedMemSizeKib", kib[1]}};
      },
      device, &kib[0]);
  out["nvmlDeviceGetPciInfo_v3"] = pci_info(library, "nvmlDeviceGetPciInfo_v3", device);
  unsigned c2c = 0;
  out["nvmlDeviceGetC2cModeInfoV"] = library.call(
      "nvmlDeviceGetC2cModeInfoV",
      [&] {
        return Json{{"isC2cEnabled", c2c}};
      },
      device, &c2c);
  nvmlUtilization_t use{};
  out["nvmlDeviceGetUtilizationRates"] = library.call(
      "nvmlDeviceGetUtilizationRates",
      [&] {
        return Json{{"gpu", use.gpu}, {"memory", use.memory}};
      },
      device, &use);
  nvmlRowRemapperHistogramValues_t rows{};
  out["nvmlDeviceGetRowRemapperHistogram"] = library.call(
      "nvmlDeviceGetRowRemapperHistogram",
      [&] {
        return Json{{"max", rows.max},
                    {"high", rows.high},
                    {"partial", rows.partial},
                    {"low", rows.low},
                    {"none", rows.none}};
      },
      device, &rows);
  nvmlFBCStats_t fbc{};
  out["nvmlDeviceGetFBCStats"] = library.call(
      "nvmlDeviceGetFBCStats",
      [&] {
        return Json{{"sessionsCount", fbc.sessionsCount},
                    {"averageFPS", fbc.averageFPS},
                    {"averageLatency", fbc.averageLatency}};
      },
      device, &fbc);
  nvmlGridLicensableFeatures_t grid{};
  out["nvmlDeviceGetGridLicensableFeatures_v4"] = library.call(
      "nvmlDeviceGetGridLicensableFeatures_v4",
      [&] {
        return Json{{"isGridLicenseSupported", grid.isGridLicenseSupported},
                    {"licensableFeaturesCount", grid.licensableFeaturesCount}};
      },
      device, &grid);
  nvmlGpuDynamicPstatesInfo_t dynamic{};
  out["nvmlDeviceGetDynamicPstatesInfo"] = library.call(
      "nvmlDeviceGetDynamicPstatesInfo",
      [&] {
        Json list = Json::array();
        for (const auto& u : dynamic.utilization) {
          list.push_back({{"bIsPresent", u.bIsPresent},
                          {"percentage", u.percentage},
                          {"incThreshold", u.incThreshold},
                          {"decThreshold", u.decThreshold}});
        }
        return Json{{"flags", dynamic.flags}, {"utilization", list}};
      },
      device, &dynamic);
  unsigned ecc = 0;
  out["nvmlDeviceGetDefaultEccMode"] = library.call(
      "nvmlDeviceGetDefaultEccMode", [&] { return Json::array({ecc}); }, device, &ecc);
  nvmlDevice_t parent = nullptr;
  out["nvmlDeviceGetDeviceHandleFromMigDeviceHandle"] = library.call(
      "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", [] { return Json("answered"); }, device, &parent);
  std::array<unsigned, 16> states{};
  out["nvmlDeviceGetSupportedPerformanceStates"] = library.call(
      "nvmlDeviceGetSupportedPerformanceStates",
      [&] {
        Json list = Json::array();
        for (const unsigned state : states) {
          if (state != NVML_PSTATE_UNKNOWN) list.push_back(state);
        }
        return list;
      },
      device, &states[0], static_cast<unsigned>(sizeof states));
  unsigned unrepairable = 0;
  out["nvmlDeviceGetUnrepairableMemoryFlag_v1"] = library.call(
      "nvmlDeviceGetUnrepairableMemoryFlag_v1", [&] { return Json(unrepairable); }, device, &unrepairable);

  for (const Versioned& v : versioned) {
    std::array<unsigned, 8> words{};
    words[0] = v.size | v.version << 24U;
    out[v.name] = library.call(
        v.name,
        [&] {
          if (v.wide) return Json(static_cast<unsigned long long>(words[3]) << 32U | words[2]);
          if (v.numbers == 2) return Json{words[1], words[2]};
          return Json(static_cast<int>(words[1]));
        },
        device, &words[0]);
  }
  struct Modes {
    unsigned version;
    char text[2048];
  };
  for (const char* name : {"nvmlDeviceGetPerformanceModes", "nvmlDeviceGetCurrentClockFreqs"}) {
    auto modes = std::make_unique<Modes>();
    modes->version = static_cast<unsigned>(sizeof(Modes)) | 1U << 24U;
    out[name] = library.call(
        name,
        [&] {
          std::string text = modes->text;
          for (std::size_t at = 0; (at = text.find(';', at)) != std::string::npos; ++at) {
            if (at == 0 || text[at - 1] != ' ')
              text.insert(at++, 1, ' ');  // spacing around the separator varies
          }
          return Json(text);
        },
        device, modes.get());
  }
}

void tables(const Library& library, nvmlDevice_t device, Json& out) {
  for (unsigned i = 0; i < 10; ++i) {
    unsigned value = 0;
    out[fmt::format("temp_threshold_{}", i)] = library.call(
        "nvmlDeviceGetTemperatureThreshold", [&] { return Json(value); }, device, i, &value);
  }
  for (unsigned i = 0; i < 4; ++i) {
    unsigned value = 0;
    out[fmt::format("clock_{}", i)] = library.call(
        "nvmlDeviceGetClockInfo", [&] { return Json(value); }, device, i, &value);
    out[fmt::format("maxclock_{}", i)] = library.call(
        "nvmlDeviceGetMaxClockInfo", [&] { return Json(value); }, device, i, &value);
  }
  for (const Json& memory : out["nvmlDeviceGetSupportedMemoryClocks"]) {
    if (!memory.is_number()) continue;
    std::array<unsigned, 1024> clocks{};
    unsigned count = clocks.size();
    out[fmt::format("graphics_clocks_{}", memory.get<unsigned>())] = library.call(
        "nvmlDeviceGetSupportedGraphicsClocks",
        [&] {
          return Json(
              std::vector<unsigned>(clocks.begin(), clocks.begin() + std::min<unsigned>(count, 1024)));
        },
        device, memory.get<unsigned>(), &count, &clocks[0]);
  }
  for (unsigned i = 0; i < 18; ++i) {
    unsigned active = 0;
    out[fmt::format("nvlink_state_{}", i)] = library.call(
        "nvmlDeviceGetNvLinkState", [&] { return Json(active); }, device, i, &active);
  }
}

void profiles(const Library& library, nvmlDevice_t device, Json& out) {
  Json list = Json::array();
  for (unsigned e = 0; e < 17; ++e) {
    nvmlGpuInstanceProfileInfo_v2_t p{};
    p.version = static_cast<unsigned>(sizeof p) | 2U << 24U;
    Json row = library.call(
        "nvmlDeviceGetGpuInstanceProfileInfoV",
        [&] {
          return Json{{"id", p.id},
                      {"isP2pSupported", p.isP2pSupported},
                      {"sliceCount", p.sliceCount},
                      {"instanceCount", p.instanceCount},
                      {"multiprocessorCount", p.multiprocessorCount},
                      {"copyEngineCount", p.copyEngineCount},
                      {"decoderCount", p.decoderCount},
                      {"encoderCount", p.encoderCount},
                      {"jpegCount", p.jpegCount},
                      {"ofaCount", p.ofaCount},
                      {"memorySizeMB", p.memorySizeMB},
                      {"name", p.name},
                      {"profile_enum", e}};
        },
        device, e, &p);
    if (row.contains("error")) continue;
    std::array<nvmlGpuInstancePlacement_t, 32> places{};
    unsigned count = places.size();
    row["placements"] = library.call(
        "nvmlDeviceGetGpuInstancePossiblePlacements_v2",
        [&] {
          Json at = Json::array();
          for (unsigned i = 0; i < count && i < places.size(); ++i)
            at.push_back({places[i].start, places[i].size});
          return at;
        },
        device, p.id, &places[0], &count);
    unsigned remaining = 0;
    row["remaining"] = library.call(
        "nvmlDeviceGetGpuInstanceRemainingCapacity", [&] { return Json(remaining); }, device, p.id,
        &remaining);
    list.push_back(row);
  }
  out["gpu_instance_profiles"] = list;
}

void fields(const Library& library, nvmlDevice_t device, Json& out) {
  Json all = Json::object();
  for (unsigned id = 1; id < 290; ++id) {
    nvmlFieldValue_t value{};
    value.fieldId = id;
    all[std::to_string(id)] = library.call(
        "nvmlDeviceGetFieldValues",
        [&]() -> Json {
          const auto code = static_cast<unsigned>(value.nvmlReturn),
                     type = static_cast<unsigned>(value.valueType);
          if (code != 0) return Json{code, type, nullptr};
          switch (type) {
            case 0:
              return Json{code, type, value.value.dVal};
            case 1:
              return Json{code, type, value.value.uiVal};
            case 5:
              return Json{code, type, value.value.uiVal};  // signed; the recordings hold the bits
            default:
              return Json{code, type, value.value.ullVal};
          }
        },
        device, 1, &value);
  }
  out["fields"] = all;
}

void gpm(const Library& library, nvmlDevice_t device, Json& out) {
  nvmlGpmSample_t first = nullptr, second = nullptr;
  const auto nothing = [] { return Json(nullptr); };
  if (library.call("nvmlGpmSampleAlloc", nothing, &first).is_object() ||
      library.call("nvmlGpmSampleAlloc", nothing, &second).is_object())
    return;
  const Json taken = library.call("nvmlGpmSampleGet", nothing, device, first);
  if (taken.is_object()) {
    out["gpm"] = taken;
  } else {
    ::usleep(150000);
    (void)library.call("nvmlGpmSampleGet", nothing, device, second);
    Json all = Json::object();
    auto metrics = std::make_unique<std::array<char, 1U << 16U>>();  // room for any version's array
    for (unsigned id = 1; id <= 140; ++id) {
      metrics->fill(0);
      auto* get = reinterpret_cast<nvmlGpmMetricsGet_t*>(metrics->data());
      get->version = 1;
      get->numMetrics = 1;
      get->sample1 = first;
      get->sample2 = second;
      get->metrics[0].metricId = id;
      all[std::to_string(id)] = library.call(
          "nvmlGpmMetricsGet",
          [&] {
            const auto& metric = get->metrics[0];
            return Json{
                static_cast<unsigned>(metric.nvmlReturn), metric.value,
                metric.metricInfo.shortName == nullptr ? Json(nullptr) : Json(metric.metricInfo.shortName)};
          },
          get);
    }
    out["gpm"] = all;
  }
  (void)library.call("nvmlGpmSampleFree", nothing, first);
  (void)library.call("nvmlGpmSampleFree", nothing, second);
}

Json ask_all(void* handle, unsigned gpu) {
  const Library library(handle);
  Json out = Json::object();
  const auto nothing = [] { return Json(nullptr); };
  if (const Json started = library.call("nvmlInit_v2", nothing); started.is_object())
    return Json{{"init", started}};
  char text[96] = {};
  for (const char* name : {"nvmlSystemGetDriverVersion", "nvmlSystemGetNVMLVersion"}) {
    out[name] = library.call(
        name, [&] { return Json(text); }, &text[0], 96U);
  }
  int cuda = 0;
  out["nvmlSystemGetCudaDriverVersion_v2"] = library.call(
      "nvmlSystemGetCudaDriverVersion_v2", [&] { return Json(cuda); }, &cuda);
  nvmlDevice_t device = nullptr;
  if (const Json opened = library.call("nvmlDeviceGetHandleByIndex_v2", nothing, gpu, &device);
      opened.is_object()) {
    out["device"] = opened;
    return out;
  }
  for (const Question& q : questions) out[q.name] = simple(library, q, device);
  structures(library, device, out);
  tables(library, device, out);
  profiles(library, device, out);
  fields(library, device, out);
  gpm(library, device, out);
  (void)library.call("nvmlShutdown", nothing);
  return out;
}

[[noreturn]] void child(const std::filesystem::path& path, const std::filesystem::path& twin, unsigned gpu,
                        int out) {
  if (twin.empty()) {
    ::unsetenv("BULKHEAD_TWIN");
  } else {
    ::setenv("BULKHEAD_TWIN", twin.c_str(), 1);
  }
  std::string text;
  if (void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL); handle != nullptr) {
    text = "ok" + ask_all(handle, gpu).dump(-1, ' ', false, Json::error_handler_t::replace);
  } else {
    const char* why = ::dlerror();
    text = std::string("no") + (why != nullptr ? why : "dlopen failed");
  }
  for (std::size_t at = 0; at < text.size();) {
    const ssize_t n = ::write(out, text.data() + at, text.size() - at);
    if (n <= 0) break;
    at += static_cast<std::size_t>(n);
  }
  ::_exit(0);
}

// ---- comparing
bool starts(std::string_view text, std::initializer_list<std::string_view> any) {
  return std::any_of(any.begin(), any.end(), [&](std::string_view one) {
    return text == one || (text.starts_with(one) && (text[one.size()] == '.' || text[one.size()] == '['));
  });
}

DifferenceKind kind_of(std::string_view question) {
  if (starts(question, {"nvmlDeviceGetUUID", "nvmlDeviceGetSerial", "nvmlDeviceGetPdi", "nvmlDeviceGetIrqNum",
                        "nvmlDeviceGetBoardId", "nvmlDeviceGetMinorNumber", "nvmlDeviceGetModuleId",
                        "nvmlDeviceGetPciInfo_v3.busIdLegacy", "nvmlDeviceGetPciInfo_v3.busId",
                        "nvmlDeviceGetPciInfo_v3.bus", "nvmlDeviceGetPciInfo_v3.device",
                        "nvmlDeviceGetPciInfo_v3.domain"})) {
    return DifferenceKind::identity;
  }
  if (starts(question, {"nvmlDeviceGetPowerUsage",
                        "nvmlDeviceGetTotalEnergyConsumption",
                        "nvmlDeviceGetMarginTemperature",
                        "nvmlDeviceGetUtilizationRates",
                        "nvmlDeviceGetMemoryInfo.free",
                        "nvmlDeviceGetMemoryInfo.used",
                        "nvmlDeviceGetBAR1MemoryInfo.bar1Free",
                        "nvmlDeviceGetBAR1MemoryInfo.bar1Used",
                        "nvmlDeviceGetCurrentClocksEventReasons",
                        "nvmlDeviceGetCurrentClocksThrottleReasons",
                        "nvmlDeviceGetCurrentClockFreqs",
                        "nvmlDeviceGetDynamicPstatesInfo",
                        "clock_0",
                        "clock_1",
                        "clock_2",
                        "clock_3",
                        "fields.3",  // ECC totals: a board's own history (23 corrected ones read on one H100)
                        "fields.4",
                        "fields.5",
                        "fields.6",
                        "fields.142",  // remapped rows: likewise
                        "fields.143",
                        "fields.74",
                        "fields.75",
                        "fields.76",
                        "fields.77",
                        "fields.78",
                        "fields.79",
                        "fields.80",
                        "fields.81",
                        "fields.82",
                        "fields.83",
                        "fields.169",  // PCIE_L0_TO_RECOVERY_COUNTER: 105, 313 and 339 read on real boards
                        "fields.185",
                        "fields.186",
                        "fields.191",
                        "fields.197",
                        "fields.198",
                        "fields.175",
                        "fields.176",
                        "fields.177",
                        "fields.269",
                        "fields.270",
                        "fields.271"})) {
    // A field answers [return code, type, value]: only its value lives.
    const bool fact = question.starts_with("fields.") && !question.ends_with("[2]");
    return fact ? DifferenceKind::differs : DifferenceKind::live;
  }
  // A metric's return code and name are facts, its value is not.
  if (question.starts_with("gpm.") && question.ends_with("[1]")) return DifferenceKind::live;
  return DifferenceKind::differs;
}

void walk(const std::string& at, const Json& real, const Json& twin, std::vector<Difference>& found) {
  if (real.is_object() && twin.is_object() && !real.contains("error") && !twin.contains("error")) {
    for (const auto& [key, value] : real.items()) {
      if (twin.contains(key)) walk(at.empty() ? key : at + "." + key, value, twin[key], found);
    }
    return;
  }
  if (real.is_array() && twin.is_array() && real.size() == twin.size()) {
    for (std::size_t i = 0; i < real.size(); ++i) walk(fmt::format("{}[{}]", at, i), real[i], twin[i], found);
    return;
  }
  const bool same_number = real.is_number() && twin.is_number() && real.get<double>() == twin.get<double>();
  if (real == twin || same_number) return;
  if (real.is_object() && twin.is_object() && real.value("code", -1) == twin.value("code", -2))
    return;  // words vary by driver
  found.push_back({at, real.dump(), twin.dump(), kind_of(at)});
}

}  // namespace

Result<Json> ask_nvml(const std::filesystem::path& library, const std::filesystem::path& twin, unsigned gpu,
                      std::chrono::milliseconds limit) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return errno_error("pipe", errno);
  UniqueFd in(ends[0]), out(ends[1]);
  const pid_t pid = ::fork();
  if (pid < 0) return errno_error("fork", errno);
  if (pid == 0) child(library, twin, gpu, out.get());
  out.reset();

  std::string text;
  const std::uint64_t until = monotonic_ns() + static_cast<std::uint64_t>(limit.count()) * 1000000;
  bool late = false;
  for (;;) {
    const std::uint64_t now = monotonic_ns();
    pollfd wait{in.get(), POLLIN, 0};
    if (now >= until || ::poll(&wait, 1, static_cast<int>((until - now) / 1000000 + 1)) == 0) {
      late = true;
      break;
    }
    char part[65536];
    const ssize_t n = ::read(in.get(), part, sizeof part);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0 || text.size() > answer_bytes) break;
    text.append(part, static_cast<std::size_t>(n));
  }
  if (late) ::kill(pid, SIGKILL);
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  const std::string name = library.string();
  if (late)
    return Error(Errc::timeout, fmt::format("ask {}: no answer within {} s", name, limit.count() / 1000));
  if (WIFSIGNALED(status))
    return Error(Errc::gone,
                 fmt::format("ask {}: the process that asked died of signal {}", name, WTERMSIG(status)));
  if (text.starts_with("no"))
    return Error(Errc::unavailable, fmt::format("load {}: {}", name, text.substr(2)),
                 "name the library: --library /usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1");
  if (!text.starts_with("ok")) return Error(Errc::corrupt, fmt::format("ask {}: no answer", name));
  return parse_json(std::string_view(text).substr(2));
}

std::vector<Difference> compare(const Json& real, const Json& twin) {
  std::vector<Difference> found;
  walk("", real, twin, found);
  return found;
}

std::size_t count_questions(const Json& answers) {
  std::size_t n = 0;
  for (const auto& [key, value] : answers.items())
    n += (key == "fields" || key == "gpm" || key == "gpu_instance_profiles") && !value.contains("error")
             ? value.size()
             : 1;
  return n;
}

}  // namespace bulkhead::twin
