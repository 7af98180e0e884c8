// XIDs from the state's ring to event sets. A set starts with what happens after it was made; waiting is
// polling, since the ring lives in a file that other processes write.
#include <time.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "twin/nvml/library.hpp"

using namespace bulkhead::twin;        // NOLINT(google-build-using-namespace): this file is the library
using namespace bulkhead::twin::nvml;  // NOLINT(google-build-using-namespace)

namespace {

constexpr unsigned long long supported_events = 65439;  // read on the H100, driver 580.159.04
constexpr unsigned long long xid_event = 0x8;           // nvmlEventTypeXidCriticalError

struct EventSet {
  std::uint64_t next = 0;  // the first sequence not yet delivered
  unsigned long long types[max_gpus] = {};
};

struct Sets {
  std::mutex mutex;
  std::vector<EventSet*> all;
};
Sets& sets() {
  static Sets* const it = new Sets();
  return *it;
}
// Under the mutex of `sets()`.
EventSet* known(nvmlEventSet_t set) {
  auto& all = sets().all;
  auto* wanted = reinterpret_cast<EventSet*>(set);
  return std::find(all.begin(), all.end(), wanted) == all.end() ? nullptr : wanted;
}

std::uint64_t milliseconds() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1000 + static_cast<std::uint64_t>(now.tv_nsec) / 1000000;
}

nvmlReturn_t wait(const char* function, nvmlEventSet_t handle, nvmlEventData_t* data, unsigned timeout_ms,
                  bool with_instances) {
  if (data == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  const std::uint64_t until = milliseconds() + timeout_ms;
  for (;;) {
    const nvmlReturn_t code = ask_host(function, true, [&](const State& state) {
      const std::lock_guard<std::mutex> lock(sets().mutex);
      EventSet* set = known(handle);
      if (set == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
      // What fell out of the ring is gone, as from the driver's queue.
      const std::uint64_t oldest = state.next_event > max_events ? state.next_event - max_events : 0;
      for (set->next = std::max(set->next, oldest); set->next < state.next_event;) {
        const Event& event = state.events[set->next % max_events];
        ++set->next;
        if (event.gpu >= state.gpu_count || (set->types[event.gpu] & xid_event) == 0) continue;
        nvmlEventData_t out{};
        out.device = handle_of_gpu(event.gpu);
        out.eventType = xid_event;
        out.eventData = event.xid;
        out.gpuInstanceId = event.gpu_instance;
        out.computeInstanceId = event.compute_instance;
        std::memcpy(data, &out, with_instances ? sizeof out : offsetof(nvmlEventData_t, gpuInstanceId));
        return NVML_SUCCESS;
      }
      return NVML_ERROR_TIMEOUT;
    });
    if (code != NVML_ERROR_TIMEOUT || milliseconds() >= until) return code;
    const timespec pause{0, 5000000};
    ::nanosleep(&pause, nullptr);
  }
}

}  // namespace

nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t* out) {
  return ask_host(__func__, out != nullptr, [&](const State& state) {
    const std::lock_guard<std::mutex> lock(sets().mutex);
    auto* set = new EventSet();
    set->next = state.next_event;
    sets().all.push_back(set);
    *out = reinterpret_cast<nvmlEventSet_t>(set);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t handle) {
  return ask_host(__func__, true, [&](const State&) {
    const std::lock_guard<std::mutex> lock(sets().mutex);
    EventSet* set = known(handle);
    if (set == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
    std::erase(sets().all, set);
    delete set;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long types, nvmlEventSet_t handle) {
  return ask(__func__, device, types != 0, [&](const bulkhead::twin::nvml::Device& d) {
    const std::lock_guard<std::mutex> lock(sets().mutex);
    EventSet* set = known(handle);
    if (set == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
    if ((types & ~supported_events) != 0) return NVML_ERROR_NOT_SUPPORTED;
    set->types[d.slot] |= types;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, unsigned long long* out) {
  return ask(__func__, device, out != nullptr, [&](const bulkhead::twin::nvml::Device&) {
    *out = supported_events;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlEventSetWait_v2(nvmlEventSet_t set, nvmlEventData_t* data, unsigned timeout_ms) {
  return wait(__func__, set, data, timeout_ms, true);
}
nvmlReturn_t nvmlEventSetWait(nvmlEventSet_t set, nvmlEventData_t* data, unsigned timeout_ms) {
  return wait(__func__, set, data, timeout_ms, false);
}
