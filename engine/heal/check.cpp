// What a GPU must do before the next tenant gets it. Asked through the driver's own libraries, by dlopen.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <vector>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/text.hpp"
#include "edge/nvml/nvml.hpp"
#include "engine/heal/gate.hpp"
#include "engine/heal/heal.hpp"

namespace bulkhead::heal {

namespace {

// Of the public CUDA driver API, version 13: names and numbers are the vendor's.
using Result32 = int;
using Device = int;
using Pointer = unsigned long long;
struct Cuda {
  Result32 (*init)(unsigned) = nullptr;
  Result32 (*device)(Device*, int) = nullptr;
  Result32 (*retain)(void**, Device) = nullptr;
  Result32 (*current)(void*) = nullptr;
  Result32 (*info)(std::size_t*, std::size_t*) = nullptr;
  Result32 (*allocate)(Pointer*, std::size_t) = nullptr;
  Result32 (*free)(Pointer) = nullptr;
  Result32 (*set)(Pointer, unsigned, std::size_t) = nullptr;
  Result32 (*to)(Pointer, const void*, std::size_t) = nullptr;
  Result32 (*from)(void*, Pointer, std::size_t) = nullptr;
  Result32 (*copy)(Pointer, Pointer, std::size_t) = nullptr;
  Result32 (*wait)() = nullptr;
  Result32 (*name)(Result32, const char**) = nullptr;
  Result32 (*attribute)(int*, int, Device) = nullptr;
  Result32 (*load)(void**, const void*) = nullptr;
  Result32 (*unload)(void*) = nullptr;
  Result32 (*function)(void**, void*, const char*) = nullptr;
  Result32 (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                     void**, void**) = nullptr;
};
constexpr int attribute_multiprocessors = 16, attribute_capability_major = 75;  // cuda.h, CUdevice_attribute

template <class F>
bool find(void* library, const char* symbol, F& out) {
  out = reinterpret_cast<F>(::dlsym(library, symbol));
  return out != nullptr;
}

// Together more than any cache of a chip (50 MiB on an H100): all are written before the first is read.
constexpr std::size_t block = 16U << 20U, blocks = 8;
constexpr unsigned passes = 4;
// Blocks for each multiprocessor: with 256 threads each, all that one can hold (2048 threads).
constexpr unsigned blocks_of_one = 8;

// Runs the kernel on every multiprocessor and compares each word. False: `said` ends with what is wrong.
template <class Good>
bool computes(const Cuda& cuda, const Good& good, const gate::Kernel& kernel,
              const std::vector<std::uint32_t>& expected, unsigned multiprocessors, Json& said) {
  const unsigned count = multiprocessors * blocks_of_one;
  std::vector<std::uint32_t> back(std::size_t{count} * gate::threads + count);
  void *module = nullptr, *function = nullptr;
  Pointer results = 0;
  unsigned rounds = kernel.rounds;
  void* parameters[] = {&results, &rounds};
  // What is left over of an earlier answer must not pass for one.
  if (!good("translate a kernel", cuda.load(&module, kernel.ptx)) ||
      !good("find the kernel", cuda.function(&function, module, kernel.name)) ||
      !good("allocate", cuda.allocate(&results, back.size() * 4)) ||
      !good("clear", cuda.set(results, ~0U, back.size())))
    return false;
  const std::uint64_t began = monotonic_ns();
  if (!good("launch",
            cuda.launch(function, count, 1, 1, gate::threads, 1, 1, 0, nullptr, parameters, nullptr)) ||
      !good("compute", cuda.wait()))
    return false;
  const double ms = static_cast<double>(monotonic_ns() - began) / 1e6;
  if (!good("read back", cuda.from(back.data(), results, back.size() * 4)) ||
      !good("free", cuda.free(results)) || !good("unload", cuda.unload(module)))
    return false;
  const std::uint32_t* const places = back.data() + std::size_t{count} * gate::threads;
  std::map<std::uint32_t, std::size_t> wrong;  // by multiprocessor
  std::size_t words = 0;
  for (unsigned i = 0; i < count; ++i)
    for (unsigned thread = 0; thread < gate::threads; ++thread)
      if (back[std::size_t{i} * gate::threads + thread] != expected[thread]) ++wrong[places[i]], ++words;
  const std::set<std::uint32_t> ran(places, places + count);
  if (wrong.empty()) {
    said.push_back(fmt::format("{}: {} rounds on {} of {} multiprocessors, every result right, in {:.1f} ms",
                               kernel.what, rounds, ran.size(), multiprocessors, ms));
    return true;
  }
  std::string where;
  for (const auto& [multiprocessor, found] : wrong) {
    if (where.size() > 100) {
      where += ", ...";
      break;
    }
    where += fmt::format("{}{} ({})", where.empty() ? "" : ", ", multiprocessor, found);
  }
  said.push_back(fmt::format("{}: {} of {} results wrong, on multiprocessor {}", kernel.what, words,
                             std::size_t{count} * gate::threads, where));
  return false;
}

}  // namespace

Json check_health(const observe::Access& access, const Uuid& gpu) {
  Json out{{"ok", false}, {"said", Json::array()}, {"devices", Json::array()}};
  auto& said = out["said"];
  auto where = access;
  where.only = {gpu};
  const auto host = observe::host(where);
  if (!host.ok()) {
    said.push_back("the driver does not answer: " + host.error().message());
    return out;
  }
  if (host->gpus.empty()) {
    said.push_back("the driver does not show it");
    return out;
  }
  const auto& its = host->gpus.front();
  bool ok = true;
  if (its.ecc) {
    said.push_back(fmt::format("{} uncorrected and {} corrected memory errors since the driver was loaded",
                               its.ecc->uncorrected, its.ecc->corrected));
    ok = ok && its.ecc->uncorrected == 0;
  } else {
    said.push_back("memory errors cannot be read: " + printable(its.ecc.why, 200));
  }
  if (auto driver = nvml::Nvml::open(access.nvml_library); driver.ok()) {
    if (const auto device = (*driver)->device(gpu); device.ok()) {
      struct Question {
        unsigned field;
        const char* words;
      };
      // nvml.h: NVML_FI_DEV_REMAPPED_PENDING, _FAILURE and NVML_FI_DEV_GET_GPU_RECOVERY_ACTION (driver 570
      // and later; 0: none). One that the driver does not know is no verdict.
      for (const Question row :
           {Question{144, "a remapped row of memory waits for a reset"},
            Question{145, "a row of memory could not be remapped: the board is to be replaced"},
            Question{230, "the driver itself asks for a recovery action"}}) {
        nvml::Field field{.id = row.field};
        if (!(*driver)->fields(*device, {&field, 1}).ok() || field.refused || !field.number) continue;
        if (*field.number == 0) continue;
        said.push_back(row.field == 230 ? fmt::format("{}: {}", row.words, field.count) : row.words);
        ok = false;
      }
    }
  }
  if (its.mig_now != its.mig_pending) {
    said.push_back("a change of its MIG mode waits for a reset");
    ok = false;
  }
  if (its.mig_now) {
    for (const auto& instance : its.instances)
      for (const auto& compute : instance.compute)
        if (compute.uuid) out["devices"].push_back(compute.uuid->text);
    if (out["devices"].empty()) said.push_back("in MIG mode without a slice: nothing can compute on it yet");
  } else {
    out["devices"].push_back(its.uuid.text);
  }
  out["ok"] = ok;
  return out;
}

Json check_device(const std::string& cuda_library, const std::string& device) {
  Json out{{"ok", false}, {"said", Json::array()}};
  auto& said = out["said"];
  ::setenv("CUDA_VISIBLE_DEVICES", device.c_str(), 1);
  void* const library = ::dlopen(cuda_library.c_str(), RTLD_NOW);
  if (library == nullptr) {
    // Nothing that was not computed on is called good: a person may still open it.
    const char* why = ::dlerror();
    said.push_back(fmt::format("not computed on: {}", printable(why == nullptr ? "no libcuda" : why, 200)));
    return out;
  }
  Cuda cuda;
  const bool whole =
      find(library, "cuInit", cuda.init) && find(library, "cuDeviceGet", cuda.device) &&
      find(library, "cuDevicePrimaryCtxRetain", cuda.retain) &&
      find(library, "cuCtxSetCurrent", cuda.current) && find(library, "cuMemGetInfo_v2", cuda.info) &&
      find(library, "cuMemAlloc_v2", cuda.allocate) && find(library, "cuMemFree_v2", cuda.free) &&
      find(library, "cuMemsetD32_v2", cuda.set) && find(library, "cuMemcpyHtoD_v2", cuda.to) &&
      find(library, "cuMemcpyDtoH_v2", cuda.from) && find(library, "cuMemcpyDtoD_v2", cuda.copy) &&
      find(library, "cuCtxSynchronize", cuda.wait) && find(library, "cuGetErrorName", cuda.name) &&
      find(library, "cuDeviceGetAttribute", cuda.attribute) && find(library, "cuModuleLoadData", cuda.load) &&
      find(library, "cuModuleUnload", cuda.unload) && find(library, "cuModuleGetFunction", cuda.function) &&
      find(library, "cuLaunchKernel", cuda.launch);
  if (!whole) {
    said.push_back("libcuda lacks a function of CUDA 11");
    return out;
  }
  const auto good = [&](const char* what, Result32 code) {
    if (code == 0) return true;
    const char* name = nullptr;
    if (cuda.name(code, &name) != 0 || name == nullptr) name = "?";
    said.push_back(fmt::format("{}: {} ({})", what, printable(name, 60), code));
    return false;
  };
  Device number = 0;
  void* context = nullptr;
  if (!good("start", cuda.init(0)) || !good("find it", cuda.device(&number, 0)) ||
      !good("make a context", cuda.retain(&context, number)) || !good("enter it", cuda.current(context)))
    return out;
  std::size_t left = 0, total = 0;
  if (!good("ask for its memory", cuda.info(&left, &total))) return out;
  const std::size_t size = std::min(block, left / (4 * blocks) / 4096 * 4096), words = size / 4;
  if (size < 4096) {
    said.push_back(fmt::format("only {} bytes of its memory are free", left));
    return out;
  }
  std::array<Pointer, blocks> from{}, to{};
  for (std::size_t i = 0; i < blocks; ++i)
    if (!good("allocate", cuda.allocate(&from[i], size)) || !good("allocate", cuda.allocate(&to[i], size)))
      return out;
  std::vector<std::uint32_t> sent(words), back(words);
  // Both polarities of every bit, then words that differ from their neighbours and from block to block.
  const auto fill = [&](unsigned pass, std::size_t which) {
    if (pass < 2) return std::fill(sent.begin(), sent.end(), pass == 0 ? 0x55555555U : 0xaaaaaaaaU);
    for (std::size_t i = 0; i < words; ++i)
      sent[i] = (static_cast<std::uint32_t>(i + which * words) ^ (pass == 2 ? 0U : ~0U)) * 2654435761U;
  };
  const std::uint64_t began = monotonic_ns();
  std::uint64_t copying = 0;
  for (unsigned pass = 0; pass < passes; ++pass) {
    for (std::size_t i = 0; i < blocks; ++i) {
      fill(pass, i);
      if (!good("write", pass < 2 ? cuda.set(from[i], sent[0], words) : cuda.to(from[i], sent.data(), size)))
        return out;
    }
    if (!good("wait", cuda.wait())) return out;
    const std::uint64_t copied = monotonic_ns();
    for (std::size_t i = 0; i < blocks; ++i)
      if (!good("copy", cuda.copy(to[i], from[i], size))) return out;
    if (!good("wait", cuda.wait())) return out;
    copying += monotonic_ns() - copied;
    for (std::size_t i = 0; i < blocks; ++i) {
      fill(pass, i);
      if (!good("read back", cuda.from(back.data(), to[i], size))) return out;
      if (std::memcmp(sent.data(), back.data(), size) == 0) continue;
      std::size_t wrong = 0;
      for (std::size_t w = 0; w < words; ++w) wrong += sent[w] != back[w] ? 1U : 0U;
      said.push_back(fmt::format("{} of {} words came back wrong", wrong, words));
      return out;
    }
  }
  const double seconds = static_cast<double>(monotonic_ns() - began) / 1e9;
  for (std::size_t i = 0; i < blocks; ++i)
    if (!good("free", cuda.free(from[i])) || !good("free", cuda.free(to[i]))) return out;
  said.push_back(
      fmt::format("{} MiB written, copied and read back {} times, each word as it was, in {:.2f} s; copies "
                  "on it at {:.1f} "
                  "GB/s",
                  size * blocks >> 20U, passes, seconds,
                  static_cast<double>(size) * blocks * passes * 2 /
                      static_cast<double>(std::max<std::uint64_t>(copying, 1))));
  int multiprocessors = 0, capability = 0;
  if (!good("ask for its multiprocessors",
            cuda.attribute(&multiprocessors, attribute_multiprocessors, number)) ||
      !good("ask for its capability", cuda.attribute(&capability, attribute_capability_major, number)))
    return out;
  const auto many = static_cast<unsigned>(std::clamp(multiprocessors, 1, 1024));
  if (!computes(cuda, good, gate::arithmetic, gate::expected_arithmetic(gate::arithmetic.rounds), many, said))
    return out;
  if (capability >= gate::tensor.capability &&
      !computes(cuda, good, gate::tensor, gate::expected_tensor(gate::tensor.rounds), many, said))
    return out;
  out["ok"] = true;
  return out;
}

}  // namespace bulkhead::heal
