// Modules, libraries and functions. Any image will do: functions are names, and a name says how long its
// kernel takes:
// `..._us_1600` takes 1600 us (ns and ms likewise), `..._us_param` as many as its first parameter, a u64,
// says; `fault...` touches an illegal address; every other kernel takes 5 us. A few compute something:
// kernels.cpp.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string_view>

#include "base/text.hpp"
#include "twin/cuda/driver.hpp"

namespace bulkhead::twin::cuda {

std::uint64_t duration(const CUfunc_st& function, void* const* params, void* const* extra) {
  if (function.param_unit_ns == 0) return function.ns;
  std::uint64_t count = 0;
  if (params != nullptr && params[0] != nullptr) {
    std::memcpy(&count, params[0], sizeof count);
  } else if (extra != nullptr) {
    for (int i = 0; extra[i] != CU_LAUNCH_PARAM_END && i < 8; i += 2) {
      if (extra[i] == CU_LAUNCH_PARAM_BUFFER_POINTER) std::memcpy(&count, extra[i + 1], sizeof count);
    }
  }
  constexpr std::uint64_t longest_ns = 3'600'000'000'000;
  return std::min(count, longest_ns / function.param_unit_ns) * function.param_unit_ns;
}

namespace {

void read_name(CUfunc_st& function) {
  const std::string_view name = function.name;
  function.faults = name.starts_with("fault");
  function.work = work_of(name);
  for (const auto& [word, unit] :
       {std::pair<std::string_view, std::uint64_t>{"_ns_", 1}, {"_us_", 1000}, {"_ms_", 1'000'000}}) {
    const auto at = name.rfind(word);
    if (at == std::string_view::npos) continue;
    const auto rest = name.substr(at + word.size());
    if (rest == "param") {
      function.param_unit_ns = unit;
    } else if (const auto number = parse_u64(rest); number && *number < 3'600'000'000) {
      function.ns = *number * unit;
    }
  }
  function.attributes[0] = 1024;  // threads a block
  function.attributes[4] = 32;    // registers
  function.attributes[5] = 90;    // PTX version
  function.attributes[6] = 90;    // binary version
  function.attributes[8] = 49152 - 1024;
}

CUfunction function_named(std::map<std::string, std::unique_ptr<CUfunc_st>>& functions, const char* name) {
  auto& function = functions[name];
  if (function == nullptr) {
    function = std::make_unique<CUfunc_st>();
    function->name = name;
    read_name(*function);
  }
  return function.get();
}

CUmod_st* find_module(CUmodule module) {
  const auto found = process().modules.find(module);
  if (found != process().modules.end()) return found->second.get();
  for (const auto& [handle, library] : process().libraries) {
    if (&library->module == module) return module;
  }
  return nullptr;
}
CUlib_st* find_library(CUlibrary library) {
  const auto found = process().libraries.find(library);
  return found != process().libraries.end() ? found->second.get() : nullptr;
}

}  // namespace
}  // namespace bulkhead::twin::cuda

using namespace bulkhead::twin::cuda;

EXPORT CUresult cuModuleLoadData(CUmodule* out, const void* image) {
  ENTER(call, context);
  if (out == nullptr || image == nullptr) return CUDA_ERROR_INVALID_VALUE;
  auto module = std::make_unique<CUmod_st>();
  module->context = call.context();
  *out = module.get();
  process().modules.emplace(module.get(), std::move(module));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule* out, const void* image, unsigned, int*, void**) {
  return cuModuleLoadData(out, image);
}
EXPORT CUresult cuModuleLoadFatBinary(CUmodule* out, const void* image) {
  return cuModuleLoadData(out, image);
}
EXPORT CUresult cuModuleLoad(CUmodule* out, const char* path) {
  if (path == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (::access(path, R_OK) != 0) return CUDA_ERROR_FILE_NOT_FOUND;
  return cuModuleLoadData(out, path);
}
EXPORT CUresult cuModuleUnload(CUmodule module) {
  ENTER(call, context);
  return process().modules.erase(module) != 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
EXPORT CUresult cuModuleGetLoadingMode(int* mode) {
  if (mode == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *mode = 2;  // lazy
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction* out, CUmodule handle, const char* name) {
  ENTER(call, context);
  CUmod_st* const module = find_module(handle);
  if (module == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (out == nullptr || name == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (*name == '\0') return CUDA_ERROR_NOT_FOUND;
  CUfunction const function = function_named(module->functions, name);
  function->module = module;
  *out = function;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunctionCount(unsigned* count, CUmodule handle) {
  ENTER(call, driver);
  const CUmod_st* const module = find_module(handle);
  if (module == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (count == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *count = static_cast<unsigned>(module->functions.size());
  return CUDA_SUCCESS;
}
// What an image defines is not read: there are no variables in it.
EXPORT CUresult cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule handle, const char* name) {
  ENTER(call, context);
  if (find_module(handle) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  return name == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_NOT_FOUND;
}

EXPORT CUresult cuLibraryLoadData(CUlibrary* out, const void* image, int*, void**, unsigned, int*, void**,
                                  unsigned) {
  ENTER(call, driver);
  if (out == nullptr || image == nullptr) return CUDA_ERROR_INVALID_VALUE;
  auto library = std::make_unique<CUlib_st>();
  *out = library.get();
  process().libraries.emplace(library.get(), std::move(library));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLibraryLoadFromFile(CUlibrary* out, const char* path, int*, void**, unsigned, int*, void**,
                                      unsigned) {
  if (path == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (::access(path, R_OK) != 0) return CUDA_ERROR_FILE_NOT_FOUND;
  return cuLibraryLoadData(out, path, nullptr, nullptr, 0, nullptr, nullptr, 0);
}
EXPORT CUresult cuLibraryUnload(CUlibrary library) {
  ENTER(call, driver);
  return process().libraries.erase(library) != 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
EXPORT CUresult cuLibraryGetKernel(CUkernel* out, CUlibrary handle, const char* name) {
  ENTER(call, driver);
  CUlib_st* const library = find_library(handle);
  if (library == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (out == nullptr || name == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (*name == '\0') return CUDA_ERROR_NOT_FOUND;
  CUfunction const function = function_named(library->kernels, name);
  function->library = library;
  function->module = &library->module;
  *out = reinterpret_cast<CUkernel>(function);  // either may be launched
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLibraryGetKernelCount(unsigned* count, CUlibrary handle) {
  ENTER(call, driver);
  const CUlib_st* const library = find_library(handle);
  if (library == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (count == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *count = static_cast<unsigned>(library->kernels.size());
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLibraryGetModule(CUmodule* out, CUlibrary handle) {
  ENTER(call, context);
  CUlib_st* const library = find_library(handle);
  if (library == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (out == nullptr) return CUDA_ERROR_INVALID_VALUE;
  library->module.context = call.context();
  *out = &library->module;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLibraryGetGlobal(CUdeviceptr*, size_t*, CUlibrary handle, const char*) {
  ENTER(call, context);
  return find_library(handle) == nullptr ? CUDA_ERROR_INVALID_HANDLE : CUDA_ERROR_NOT_FOUND;
}
EXPORT CUresult cuLibraryGetManaged(CUdeviceptr*, size_t*, CUlibrary handle, const char*) {
  ENTER(call, driver);
  return find_library(handle) == nullptr ? CUDA_ERROR_INVALID_HANDLE : CUDA_ERROR_NOT_FOUND;
}
EXPORT CUresult cuKernelGetFunction(CUfunction* out, CUkernel kernel) {
  ENTER(call, context);
  if (out == nullptr || kernel == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *out = reinterpret_cast<CUfunction>(kernel);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuKernelGetLibrary(CUlibrary* out, CUkernel kernel) {
  ENTER(call, driver);
  if (out == nullptr || kernel == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *out = reinterpret_cast<CUfunction>(kernel)->library;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetName(const char** name, CUfunction function) {
  ENTER(call, driver);
  if (name == nullptr || function == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *name = function->name.c_str();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuKernelGetName(const char** name, CUkernel kernel) {
  return cuFuncGetName(name, reinterpret_cast<CUfunction>(kernel));
}
EXPORT CUresult cuFuncGetModule(CUmodule* module, CUfunction function) {
  ENTER(call, driver);
  if (module == nullptr || function == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *module = function->module;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncIsLoaded(int* state, CUfunction function) {
  ENTER(call, driver);
  if (state == nullptr || function == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *state = 1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncLoad(CUfunction function) {
  ENTER(call, driver);
  return function == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int* value, int attribute, CUfunction function) {
  ENTER(call, driver);
  if (value == nullptr || function == nullptr || attribute < 0 || attribute > 15)
    return CUDA_ERROR_INVALID_VALUE;
  *value = function->attributes[attribute];
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value) {
  ENTER(call, driver);
  if (function == nullptr || attribute < 8 || attribute > 15) return CUDA_ERROR_INVALID_VALUE;
  function->attributes[attribute] = value;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuKernelGetAttribute(int* value, int attribute, CUkernel kernel, CUdevice) {
  return cuFuncGetAttribute(value, attribute, reinterpret_cast<CUfunction>(kernel));
}
EXPORT CUresult cuKernelSetAttribute(int attribute, int value, CUkernel kernel, CUdevice) {
  return cuFuncSetAttribute(reinterpret_cast<CUfunction>(kernel), attribute, value);
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, int) { return cuFuncLoad(function); }
EXPORT CUresult cuFuncSetSharedMemConfig(CUfunction function, int) { return cuFuncLoad(function); }
EXPORT CUresult cuKernelSetCacheConfig(CUkernel kernel, int, CUdevice) {
  return cuFuncLoad(reinterpret_cast<CUfunction>(kernel));
}

// ---- occupancy: by threads and shared memory, as registers are not known
namespace {
int blocks_of_one(const Device& device, int block, std::size_t shared) {
  const std::size_t all_shared = device.cc_major >= 9   ? 228UL << 10
                                 : device.cc_minor == 0 ? 164UL << 10
                                                        : 100UL << 10;
  const int by_threads = 2048 / static_cast<int>(round_up(static_cast<std::uint64_t>(block), 32));
  const int by_shared = static_cast<int>(std::min<std::size_t>(all_shared / (shared + 1024), 32));
  return std::min({by_threads, by_shared, 32});
}
}  // namespace
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, CUfunction function,
                                                                     int block, size_t shared, unsigned) {
  ENTER(call, context);
  if (count == nullptr || function == nullptr || block <= 0 || block > 1024) return CUDA_ERROR_INVALID_VALUE;
  *count = blocks_of_one(call.device(), block, shared);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction function, int block,
                                                            size_t shared) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(count, function, block, shared, 0);
}
EXPORT CUresult cuOccupancyMaxPotentialBlockSizeWithFlags(int* grid, int* block, CUfunction function,
                                                          CUoccupancyB2DSize, size_t, int limit, unsigned) {
  ENTER(call, context);
  if (grid == nullptr || block == nullptr || function == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *block = limit > 0 ? std::min(limit, 1024) : 1024;
  *grid = static_cast<int>(call.device().multiprocessors) * blocks_of_one(call.device(), *block, 0);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxPotentialBlockSize(int* grid, int* block, CUfunction function,
                                                 CUoccupancyB2DSize shared_of, size_t shared, int limit) {
  return cuOccupancyMaxPotentialBlockSizeWithFlags(grid, block, function, shared_of, shared, limit, 0);
}
EXPORT CUresult cuOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, CUfunction function, int blocks,
                                                        int block) {
  ENTER(call, context);
  if (bytes == nullptr || function == nullptr || blocks <= 0 || block <= 0) return CUDA_ERROR_INVALID_VALUE;
  const std::size_t all_shared = call.device().cc_major >= 9 ? 228UL << 10 : 100UL << 10;
  *bytes = all_shared / static_cast<std::size_t>(blocks) - 1024;
  return CUDA_SUCCESS;
}
