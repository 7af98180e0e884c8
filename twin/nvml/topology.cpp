// How GPUs lie to each other and to the CPUs. What the kernel knows is read from the twin's own sysfs, as the
// vendor's library reads the host's.
#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"
#include "twin/nvml/library.hpp"

using namespace bulkhead::twin;        // NOLINT(google-build-using-namespace): this file is the library
using namespace bulkhead::twin::nvml;  // NOLINT(google-build-using-namespace)

namespace {

using Dev = const bulkhead::twin::nvml::Device&;

std::filesystem::path pci_devices() { return root_directory() / "sys/bus/pci/devices"; }

std::string address_of(const Gpu& gpu) {
  return fmt::format("{:04x}:{:02x}:{:02x}.0", gpu.pci_domain, gpu.pci_bus, gpu.pci_device);
}

// Bits of `numbers` into words of the caller's size; what does not fit is dropped, as NVML does.
void set_bits(const std::vector<unsigned>& numbers, unsigned words, unsigned long* out) {
  std::fill(out, out + words, 0UL);
  for (const unsigned n : numbers) {
    if (n / 64 < words) out[n / 64] |= 1UL << (n % 64);
  }
}

nvmlReturn_t cpus_near(Dev d, unsigned words, unsigned long* out) {
  const auto text = bulkhead::read_trimmed(pci_devices() / address_of(*d.gpu) / "local_cpulist");
  const auto numbers = text.ok() ? bulkhead::parse_ranges(*text) : std::nullopt;
  if (!numbers) return NVML_ERROR_NOT_SUPPORTED;
  set_bits(*numbers, words, out);
  return NVML_SUCCESS;
}

unsigned links_up(const Gpu& gpu) {
  return static_cast<unsigned>(std::count_if(std::begin(gpu.nvlink_active), std::end(gpu.nvlink_active),
                                             [](auto a) { return a != 0; }));
}

nvmlReturn_t on_link(const char* function, nvmlDevice_t device, unsigned link, bool ok,
                     Borrowed<nvmlReturn_t(Dev)> answer) {
  return ask(function, device, ok && link < max_nvlinks, [&](Dev d) {
    // NvLinkDisable=1, as in the guest that the recordings come from: the chip has links and the driver none.
    const bool disabled = links_up(*d.gpu) == 0 && d.state->nvswitch_count == 0;
    return disabled || link >= d.chip->nvlinks ? NVML_ERROR_NOT_SUPPORTED : answer(d);
  });
}

// PCI functions of the NVSwitches, in address order.
std::vector<std::string> switches() {
  std::vector<std::string> found;
  const auto names = bulkhead::list_directory(pci_devices());
  if (!names.ok()) return found;
  for (const std::string& name : *names) {
    const auto cls = bulkhead::read_trimmed(pci_devices() / name / "class");
    if (!cls.ok() || *cls != "0x068000") continue;
    const auto vendor = bulkhead::read_trimmed(pci_devices() / name / "vendor");
    if (vendor.ok() && *vendor == "0x10de") found.push_back(name);
  }
  return found;
}

nvmlReturn_t remote_of(Dev d, unsigned link, nvmlPciInfo_t& pci) {
  if (d.gpu->nvlink_active[link] == 0) return NVML_ERROR_NOT_SUPPORTED;
  const auto all = switches();
  if (all.empty()) return NVML_ERROR_NOT_SUPPORTED;
  const std::string& name = all[link % all.size()];
  pci = {};
  unsigned domain = 0, bus = 0, dev = 0;
  if (std::sscanf(name.c_str(), "%x:%x:%x.0", &domain, &bus, &dev) != 3) return NVML_ERROR_UNKNOWN;
  pci.domain = domain;
  pci.bus = bus;
  pci.device = dev;
  const auto id = bulkhead::read_trimmed(pci_devices() / name / "device");
  if (id.ok())
    pci.pciDeviceId = static_cast<unsigned>(std::strtoul(id->c_str(), nullptr, 16)) << 16U | 0x10deU;
  put(fmt::format("{:04X}:{:02X}:{:02X}.0", domain, bus, dev), pci.busIdLegacy);
  put(fmt::format("{:08X}:{:02X}:{:02X}.0", domain, bus, dev), pci.busId);
  return NVML_SUCCESS;
}

// Runs `answer` with the slots of two GPUs.
nvmlReturn_t ask_two(const char* function, nvmlDevice_t one, nvmlDevice_t two, bool ok,
                     Borrowed<nvmlReturn_t(const State&, std::uint32_t, std::uint32_t)> answer) {
  std::uint32_t first = none;
  const nvmlReturn_t code = ask(function, one, ok, [&](Dev d) {
    first = d.slot;
    return NVML_SUCCESS;
  });
  if (code != NVML_SUCCESS) return code;
  return ask(function, two, true, [&](Dev d) { return answer(*d.state, first, d.slot); });
}

nvmlGpuTopologyLevel_t between(const State& state, std::uint32_t a, std::uint32_t b) {
  if (a == b) return NVML_TOPOLOGY_INTERNAL;
  return state.gpus[a].numa_node == state.gpus[b].numa_node ? NVML_TOPOLOGY_NODE : NVML_TOPOLOGY_SYSTEM;
}

}  // namespace

nvmlReturn_t nvmlDeviceGetCpuAffinity(nvmlDevice_t device, unsigned words, unsigned long* out) {
  return ask(__func__, device, out != nullptr && words > 0, [&](Dev d) { return cpus_near(d, words, out); });
}
nvmlReturn_t nvmlDeviceGetCpuAffinityWithinScope(nvmlDevice_t device, unsigned words, unsigned long* out,
                                                 nvmlAffinityScope_t scope) {
  return ask(__func__, device, out != nullptr && words > 0 && scope <= NVML_AFFINITY_SCOPE_SOCKET,
             [&](Dev d) { return cpus_near(d, words, out); });
}
nvmlReturn_t nvmlDeviceGetMemoryAffinity(nvmlDevice_t device, unsigned words, unsigned long* out,
                                         nvmlAffinityScope_t scope) {
  return ask(__func__, device, out != nullptr && words > 0 && scope <= NVML_AFFINITY_SCOPE_SOCKET,
             [&](Dev d) {
               // A host without NUMA says -1; its memory is all on node 0.
               set_bits({d.gpu->numa_node == none ? 0 : d.gpu->numa_node}, words, out);
               return NVML_SUCCESS;
             });
}
nvmlReturn_t nvmlDeviceSetCpuAffinity(nvmlDevice_t device) {
  return ask(__func__, device, true, [](Dev) { return NVML_SUCCESS; });
}
nvmlReturn_t nvmlDeviceClearCpuAffinity(nvmlDevice_t device) {
  return ask(__func__, device, true, [](Dev) { return NVML_SUCCESS; });
}
nvmlReturn_t nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t one, nvmlDevice_t two,
                                                 nvmlGpuTopologyLevel_t* out) {
  return ask_two(__func__, one, two, out != nullptr, [&](const State& s, std::uint32_t a, std::uint32_t b) {
    *out = between(s, a, b);
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetTopologyNearestGpus(nvmlDevice_t device, nvmlGpuTopologyLevel_t level,
                                              unsigned* count, nvmlDevice_t* out) {
  return ask(__func__, device, count != nullptr, [&](Dev d) {
    std::vector<std::uint32_t> found;
    for (std::uint32_t g = 0; g < d.state->gpu_count; ++g) {
      if (g != d.slot && enumerated(*d.state, g) && between(*d.state, d.slot, g) <= level) found.push_back(g);
    }
    if (out == nullptr) {
      *count = static_cast<unsigned>(found.size());
      return NVML_SUCCESS;
    }
    return put_list(found, count, out, [](std::uint32_t g) { return handle_of_gpu(g); });
  });
}
nvmlReturn_t nvmlDeviceGetP2PStatus(nvmlDevice_t one, nvmlDevice_t two, nvmlGpuP2PCapsIndex_t kind,
                                    nvmlGpuP2PStatus_t* out) {
  return ask_two(__func__, one, two,
                 out != nullptr && static_cast<unsigned>(kind) < NVML_P2P_CAPS_INDEX_UNKNOWN,
                 [&](const State& s, std::uint32_t a, std::uint32_t b) {
                   const bool linked = links_up(s.gpus[a]) > 0 && links_up(s.gpus[b]) > 0;
                   // MIG forbids peer access altogether (kmigmgrIsMIGNvlinkP2PSupported_IMPL).
                   const bool mig = s.gpus[a].mig_current != 0 || s.gpus[b].mig_current != 0;
                   *out = mig                                            ? NVML_P2P_STATUS_NOT_SUPPORTED
                          : linked || kind != NVML_P2P_CAPS_INDEX_NVLINK ? NVML_P2P_STATUS_OK
                                                                         : NVML_P2P_STATUS_NOT_SUPPORTED;
                   return NVML_SUCCESS;
                 });
}

// ---- NVLink
nvmlReturn_t nvmlDeviceGetNvLinkState(nvmlDevice_t device, unsigned link, nvmlEnableState_t* out) {
  return on_link(__func__, device, link, out != nullptr, [&](Dev d) {
    *out = d.gpu->nvlink_active[link] != 0 ? NVML_FEATURE_ENABLED : NVML_FEATURE_DISABLED;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetNvLinkVersion(nvmlDevice_t device, unsigned link, unsigned* out) {
  return on_link(__func__, device, link, out != nullptr, [&](Dev d) {
    *out = d.chip->nvlink_version;
    return NVML_SUCCESS;
  });
}
nvmlReturn_t nvmlDeviceGetNvLinkCapability(nvmlDevice_t device, unsigned link,
                                           nvmlNvLinkCapability_t capability, unsigned* out) {
  return on_link(__func__, device, link,
                 out != nullptr && static_cast<unsigned>(capability) < NVML_NVLINK_CAP_COUNT, [&](Dev) {
                   *out = capability == NVML_NVLINK_CAP_SLI_BRIDGE ? 0 : 1;
                   return NVML_SUCCESS;
                 });
}
nvmlReturn_t nvmlDeviceGetNvLinkErrorCounter(nvmlDevice_t device, unsigned link,
                                             nvmlNvLinkErrorCounter_t counter, unsigned long long* out) {
  return on_link(__func__, device, link,
                 out != nullptr && static_cast<unsigned>(counter) < NVML_NVLINK_ERROR_COUNT, [&](Dev d) {
                   *out = counter == NVML_NVLINK_ERROR_DL_CRC_FLIT ? d.gpu->nvlink_crc_errors[link] : 0;
                   return NVML_SUCCESS;
                 });
}
nvmlReturn_t nvmlDeviceGetNvLinkRemotePciInfo_v2(nvmlDevice_t device, unsigned link, nvmlPciInfo_t* out) {
  return on_link(__func__, device, link, out != nullptr, [&](Dev d) { return remote_of(d, link, *out); });
}
nvmlReturn_t nvmlDeviceGetNvLinkRemotePciInfo(nvmlDevice_t device, unsigned link, nvmlPciInfo_t* out) {
  nvmlPciInfo_t whole{};
  if (out == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  const nvmlReturn_t code = nvmlDeviceGetNvLinkRemotePciInfo_v2(device, link, &whole);
  if (code == NVML_SUCCESS) std::memcpy(out, &whole, offsetof(nvmlPciInfo_t, pciSubSystemId));
  return code;
}
nvmlReturn_t nvmlDeviceGetNvLinkRemoteDeviceType(nvmlDevice_t device, unsigned link,
                                                 nvmlIntNvLinkDeviceType_t* out) {
  return on_link(__func__, device, link, out != nullptr, [&](Dev d) {
    *out = d.gpu->nvlink_active[link] == 0 ? NVML_NVLINK_DEVICE_TYPE_UNKNOWN
           : d.state->nvswitch_count > 0   ? NVML_NVLINK_DEVICE_TYPE_SWITCH
                                           : NVML_NVLINK_DEVICE_TYPE_GPU;
    return NVML_SUCCESS;
  });
}
