// GPU performance metrics: Hopper and later. A sample is what the physics knew when it was taken.
#include <algorithm>
#include <array>
#include <mutex>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "twin/nvml/library.hpp"
#include "twin/physics/physics.hpp"

using namespace bulkhead::twin;        // NOLINT(google-build-using-namespace): this file is the library
using namespace bulkhead::twin::nvml;  // NOLINT(google-build-using-namespace)

namespace {

using Dev = const bulkhead::twin::nvml::Device&;

constexpr unsigned hopper = 9;  // NVML_DEVICE_ARCH_HOPPER
constexpr unsigned metrics_known = 140;

struct Sample {
  std::uint64_t now_ns = 0;
  double busy = 0;
  double link_mib = 0;  // a second, into the board over NVLink
};

struct Samples {
  std::mutex mutex;
  std::vector<Sample*> all;
};
Samples& samples() {
  static Samples* const it = new Samples();
  return *it;
}
Sample* known(nvmlGpmSample_t handle) {
  auto& all = samples().all;
  auto* wanted = reinterpret_cast<Sample*>(handle);
  return std::find(all.begin(), all.end(), wanted) == all.end() ? nullptr : wanted;
}

// Short names as the driver of the recorded H100 gives them; ids without one exist and read 0.
const std::array<std::string, metrics_known + 1>& names() {
  static const auto* const table = [] {
    auto* t = new std::array<std::string, metrics_known + 1>();
    const char* first[] = {"",      "gract", "smutil", "smocc", "intutil", "mmaact", "dfmat",
                           "hmmat", "",      "immat",  "dram",  "fp64",    "fp32",   "fp16"};
    for (unsigned i = 0; i < std::size(first); ++i) (*t)[i] = first[i];
    (*t)[20] = "pcitx", (*t)[21] = "pcirx";
    for (unsigned i = 0; i < 8; ++i) {
      (*t)[30 + i] = fmt::format("nvdec{}", i);
      (*t)[40 + i] = fmt::format("nvjpg{}", i);
    }
    (*t)[50] = "nvofa0", (*t)[51] = "nvofa1", (*t)[60] = "nvlrx", (*t)[61] = "nvltx";
    for (unsigned i = 0; i < 18; ++i) {
      (*t)[62 + 2 * i] = fmt::format("nvl{}rx", i);
      (*t)[63 + 2 * i] = fmt::format("nvl{}tx", i);
    }
    const char* c2c[] = {"ttx", "trx", "dtx", "drx"};
    for (unsigned i = 0; i < 4; ++i) (*t)[100 + i] = fmt::format("c2c{}", c2c[i]);
    for (unsigned i = 104; i <= metrics_known; ++i)
      (*t)[i] = fmt::format("c2c{}{}", (i - 104) / 4, c2c[(i - 104) % 4]);
    return t;
  }();
  return *table;
}

double value_of(unsigned id, const Sample& sample) {
  switch (id) {
    case 1:
      return sample.busy * 100;  // graphics engine active
    case 2:
      return sample.busy * 95;  // SM utilisation
    case 3:
      return sample.busy * 40;  // occupancy
    case 5:
      return sample.busy * 60;  // tensor cores
    case 10:
      return sample.busy * 50;  // DRAM bandwidth
    case 60:
      return sample.link_mib;
    default:
      return 0;
  }
}

nvmlReturn_t take(const char* function, nvmlDevice_t device, nvmlGpmSample_t handle,
                  std::uint32_t gpu_instance) {
  return ask(function, device, handle != nullptr, [&](Dev d) {
    if (d.chip->architecture < hopper) return NVML_ERROR_NOT_SUPPORTED;
    double busy = d.gpu->busy;
    if (gpu_instance != none) {
      if (mig::find(*d.state, d.slot, gpu_instance) == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
      busy = 0;
      for (const Process& process : d.state->processes) {
        if (process.used != 0 && process.gpu == d.slot && process.gpu_instance == gpu_instance)
          busy = std::max(busy, process.busy);
      }
    }
    const std::lock_guard<std::mutex> lock(samples().mutex);
    Sample* sample = known(handle);
    if (sample == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
    const bool linked = gpu_instance == none && physics::damaged_flits(*d.state, d.slot).has_value();
    *sample = {d.state->now_ns, busy,
               linked ? physics::faulty_link_flits * physics::flit_bytes / (1024 * 1024) : 0};
    return NVML_SUCCESS;
  });
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)
nvmlReturn_t nvmlGpmMigSampleGet(nvmlDevice_t device, unsigned gpu_instance, nvmlGpmSample_t sample);
nvmlReturn_t nvmlGpmQueryIfStreamingEnabled(nvmlDevice_t device, unsigned* state);
#pragma GCC visibility pop
}

nvmlReturn_t nvmlGpmQueryDeviceSupport(nvmlDevice_t device, nvmlGpmSupport_t* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    out->isSupportedDevice = d.chip->architecture >= hopper ? 1 : 0;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlGpmSampleAlloc(nvmlGpmSample_t* out) {
  return ask_host(__func__, out != nullptr, [&](const State&) {
    const std::lock_guard<std::mutex> lock(samples().mutex);
    samples().all.push_back(new Sample());
    *out = reinterpret_cast<nvmlGpmSample_t>(samples().all.back());
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlGpmSampleFree(nvmlGpmSample_t handle) {
  return ask_host(__func__, true, [&](const State&) {
    const std::lock_guard<std::mutex> lock(samples().mutex);
    Sample* sample = known(handle);
    if (sample == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
    std::erase(samples().all, sample);
    delete sample;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlGpmSampleGet(nvmlDevice_t device, nvmlGpmSample_t sample) {
  return take(__func__, device, sample, none);
}
nvmlReturn_t nvmlGpmMigSampleGet(nvmlDevice_t device, unsigned gpu_instance, nvmlGpmSample_t sample) {
  return take(__func__, device, sample, gpu_instance);
}
nvmlReturn_t nvmlGpmQueryIfStreamingEnabled(nvmlDevice_t device, unsigned* out) {
  return ask(__func__, device, out != nullptr, [&](Dev d) {
    if (d.chip->architecture < hopper) return NVML_ERROR_NOT_SUPPORTED;
    *out = 0;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlGpmMetricsGet(nvmlGpmMetricsGet_t* out) {
  return ask_host(__func__, out != nullptr, [&](const State&) {
    const std::lock_guard<std::mutex> lock(samples().mutex);
    const Sample* last = known(out->sample2);
    if (known(out->sample1) == nullptr || last == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
    // The array grew between versions of the header; numMetrics says how much of it the caller filled.
    nvmlGpmMetric_t* metrics = &out->metrics[0];
    for (unsigned i = 0; i < out->numMetrics; ++i) {
      nvmlGpmMetric_t& metric = metrics[i];
      const bool exists = metric.metricId >= 1 && metric.metricId <= metrics_known;
      metric.nvmlReturn = exists ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
      metric.value = exists ? value_of(metric.metricId, *last) : 0;
      const std::string* name = exists ? &names()[metric.metricId] : nullptr;
      char* text = name == nullptr || name->empty() ? nullptr : const_cast<char*>(name->c_str());
      metric.metricInfo.shortName = metric.metricInfo.longName = text;
      metric.metricInfo.unit = nullptr;
    }
    return NVML_SUCCESS;
  });
}
