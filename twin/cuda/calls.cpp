// Entry points that need no driver, and all that this library does not do.
#include <cstdint>

#include "twin/cuda/cuda_api.h"

#define EXPORT extern "C" [[gnu::visibility("default")]]

namespace bulkhead::twin::cuda {
int get_proc_address(const char* symbol, void** function, int version, std::uint64_t flags, int* status);
int error_name(int code, const char** name);
int error_text(int code, const char** text);
}  // namespace bulkhead::twin::cuda

using namespace bulkhead::twin::cuda;

EXPORT CUresult cuGetProcAddress_v2(const char* symbol, void** function, int version, std::uint64_t flags,
                                    int* status) {
  return get_proc_address(symbol, function, version, flags, status);
}
EXPORT CUresult cuGetProcAddress(const char* symbol, void** function, int version, std::uint64_t flags) {
  return get_proc_address(symbol, function, version, flags, nullptr);
}
EXPORT CUresult cuGetErrorName(CUresult error, const char** name) { return error_name(error, name); }
EXPORT CUresult cuGetErrorString(CUresult error, const char** text) { return error_text(error, text); }

// The vendor's own libraries ask for undocumented tables here.
EXPORT CUresult cuGetExportTable(const void** table, const CUuuid*) {
  if (table != nullptr) *table = nullptr;
  return CUDA_ERROR_NOT_FOUND;
}

EXPORT CUresult cuProfilerInitialize(const char*, const char*, int) { return CUDA_ERROR_PROFILER_DISABLED; }
EXPORT CUresult cuProfilerStart() { return CUDA_SUCCESS; }
EXPORT CUresult cuProfilerStop() { return CUDA_SUCCESS; }
EXPORT CUresult cuFlushGPUDirectRDMAWrites(int, int) { return CUDA_SUCCESS; }

#define ROW(name) \
  EXPORT CUresult name() { return CUDA_ERROR_NOT_SUPPORTED; }
#include "twin/cuda/unsupported.inc"
#undef ROW

// What a debugger looks for in the library: words that it reads, and functions that it makes the program
// call.
#define DEBUGGER_WORD(name)  \
  EXPORT std::uint32_t name; \
  std::uint32_t name = 0
#define DEBUGGER_CALL(name) \
  EXPORT void name() {}
DEBUGGER_WORD(cudbgApiClientPid);
DEBUGGER_WORD(cudbgApiClientRevision);
DEBUGGER_WORD(cudbgAttachHandlerAvailable);
DEBUGGER_WORD(cudbgDebuggerCapabilities);
DEBUGGER_WORD(cudbgDebuggerInitialized);
DEBUGGER_WORD(cudbgDetachSuspendedDevicesMask);
DEBUGGER_WORD(cudbgEnableIntegratedMemcheck);
DEBUGGER_WORD(cudbgEnableLaunchBlocking);
DEBUGGER_WORD(cudbgEnablePreemptionDebugging);
DEBUGGER_WORD(cudbgIpcFlag);
DEBUGGER_WORD(cudbgReportDriverApiErrorFlags);
DEBUGGER_WORD(cudbgReportedDriverApiErrorCode);
DEBUGGER_WORD(cudbgReportedDriverApiErrorFuncNameAddr);
DEBUGGER_WORD(cudbgReportedDriverApiErrorFuncNameSize);
DEBUGGER_WORD(cudbgReportedDriverApiErrorNameAddr);
DEBUGGER_WORD(cudbgReportedDriverApiErrorNameSize);
DEBUGGER_WORD(cudbgReportedDriverApiErrorSource);
DEBUGGER_WORD(cudbgReportedDriverApiErrorStringAddr);
DEBUGGER_WORD(cudbgReportedDriverApiErrorStringSize);
DEBUGGER_WORD(cudbgReportedDriverInternalErrorCode);
DEBUGGER_WORD(cudbgResumeForAttachDetach);
DEBUGGER_WORD(cudbgRpcEnabled);
DEBUGGER_WORD(cudbgSessionId);
DEBUGGER_WORD(cudbgUseExternalDebugger);
EXPORT char cudbgInjectionPath[4096];
char cudbgInjectionPath[4096] = {};
DEBUGGER_CALL(cudbgApiAttach)
DEBUGGER_CALL(cudbgApiDetach)
DEBUGGER_CALL(cudbgApiInit)
DEBUGGER_CALL(cudbgMain)
DEBUGGER_CALL(cudbgReportDriverApiError)
DEBUGGER_CALL(cudbgReportDriverInternalError)
EXPORT int cudbgGetAPI(std::uint32_t, std::uint32_t, std::uint32_t, void**) {
  return 10;
}  // not supported here
EXPORT int cudbgGetAPIVersion(std::uint32_t* major, std::uint32_t* minor, std::uint32_t* revision) {
  if (major != nullptr) *major = 13;
  if (minor != nullptr) *minor = 0;
  if (revision != nullptr) *revision = 0;
  return 0;
}
