// Inside the twin's libnvidia-ml.so.1: one session a process, handles that remember what they meant, and the
// three ways an entry point runs: `ask` (read), `tell` (root only, one transaction), and their host-wide
// forms. Each takes the lock once, checks in the driver's order (initialised, planted fault, arguments,
// handle, lost device) and never lets a client's pointer be followed before that.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string_view>

#include "twin/mig/mig.hpp"
#include "twin/nvml/abi.hpp"
#include "twin/state/state.hpp"

namespace bulkhead::twin::nvml {

inline constexpr auto lost = NVML_ERROR_GPU_IS_LOST;

// A borrowed callable: entry points allocate nothing.
template <class Signature>
class Borrowed;
template <class R, class... A>
class Borrowed<R(A...)> {
 public:
  template <class F>
  Borrowed(F&& f)  // NOLINT(google-explicit-constructor)
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* object, A... arguments) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(arguments...);
        }) {}
  R operator()(A... arguments) const { return call_(object_, arguments...); }

 private:
  void* object_;
  R (*call_)(void*, A...);
};

enum class Kind : std::uint32_t { gpu, mig_device, gpu_instance, compute_instance };

// What a handle points to. The address is what the client holds; records are never freed.
struct Handle {
  Kind kind = Kind::gpu;
  std::uint32_t gpu = none, gpu_instance = none, compute_instance = none;
  std::uint64_t born = 0;  // of the instance it names
};

// A device that answers now.
struct Device {
  const State* state = nullptr;
  std::uint32_t slot = 0;  // index into State::gpus
  const Gpu* gpu = nullptr;
  const Chip* chip = nullptr;
  const GpuInstance* instance = nullptr;  // of a MIG device
  const ComputeInstance* compute = nullptr;
  bool is_mig() const { return compute != nullptr; }
  bool mig_on() const { return gpu->mig_current != 0; }
};

enum class Accept { gpu, gpu_or_mig };

nvmlReturn_t ask_host(const char* function, bool arguments_ok, Borrowed<nvmlReturn_t(const State&)> answer);
nvmlReturn_t ask(const char* function, nvmlDevice_t device, bool arguments_ok,
                 Borrowed<nvmlReturn_t(const Device&)> answer, Accept accept = Accept::gpu);
// Root only. `change` returns NVML_SUCCESS to commit.
nvmlReturn_t tell(const char* function, nvmlDevice_t device, bool arguments_ok,
                  Borrowed<nvmlReturn_t(State&, std::uint32_t gpu)> change, bool touches_mig = false);

// The same for GPU instance and compute instance handles.
nvmlReturn_t ask_instance(const char* function, const void* handle, bool arguments_ok,
                          Borrowed<nvmlReturn_t(const Device&)> answer, bool compute = false);
nvmlReturn_t tell_instance(
    const char* function, const void* handle, bool arguments_ok,
    Borrowed<nvmlReturn_t(State&, std::uint32_t gpu, GpuInstance&, ComputeInstance*)> change,
    bool compute = false);

nvmlDevice_t handle_of_gpu(std::uint32_t gpu);
nvmlDevice_t handle_of_mig(std::uint32_t gpu, const GpuInstance& instance, const ComputeInstance& compute);
nvmlGpuInstance_t handle_of(std::uint32_t gpu, const GpuInstance& instance);
nvmlComputeInstance_t handle_of(std::uint32_t gpu, const GpuInstance& instance,
                                const ComputeInstance& compute);

// GPUs that NVML enumerates: those that no fault took away.
bool enumerated(const State& state, std::uint32_t gpu);
std::uint32_t index_of(const State& state, std::uint32_t gpu);
// The slot at an NVML index, or none.
std::uint32_t slot_at(const State& state, std::uint32_t index);
bool off_the_bus(const State& state, std::uint32_t gpu);
// The fault `other_clients` is there, and so is a process beside this one that has NVML open. Inside a call
// only.
bool held_by_others(const State& state, std::uint32_t gpu);

// The twin's host tree. Inside a call only.
std::filesystem::path root_directory();

// Copies with its NUL or answers INSUFFICIENT_SIZE.
nvmlReturn_t put(std::string_view text, char* out, std::size_t length);
template <std::size_t N>
void put(std::string_view text, char (&out)[N]) {
  const std::size_t n = text.size() < N - 1 ? text.size() : N - 1;
  std::memcpy(out, text.data(), n);
  std::memset(out + n, 0, N - n);
}

// The list idiom: `*count` in is the room, out is how many there are; INSUFFICIENT_SIZE when it does not fit.
template <class T, class Range, class Convert>
nvmlReturn_t put_list(const Range& range, unsigned* count, T* out, Convert convert) {
  const auto n = static_cast<unsigned>(range.size());
  const unsigned room = *count;
  *count = n;
  if (n == 0) return NVML_SUCCESS;
  if (out == nullptr || room < n) return NVML_ERROR_INSUFFICIENT_SIZE;
  unsigned i = 0;
  for (const auto& item : range) out[i++] = convert(item);
  return NVML_SUCCESS;
}

inline nvmlReturn_t to_nvml(mig::Code code) { return static_cast<nvmlReturn_t>(code); }

// Bytes that processes hold on a GPU, or in one of its instances.
std::uint64_t memory_of_processes(const State& state, std::uint32_t gpu, std::uint32_t gpu_instance = none);

}  // namespace bulkhead::twin::nvml
