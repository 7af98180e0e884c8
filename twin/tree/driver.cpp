// What nvidia.ko shows of itself: /proc/driver/nvidia, nvidia-caps, /sys/module, device nodes. Text as on the
// H100 host (facts hosts/h100-sxm-80gb.json, "proc"); minors of capabilities from facts mig-semantics.md
// section 7.
#include <fmt/format.h>

#include "base/text.hpp"
#include "twin/tree/writer.hpp"

namespace bulkhead::twin {

void write_driver(Writer& out, const Host& host, const State& state) {
  const std::string version(state.driver_version.view());
  const bool open_modules = host.nvidia_module_license != "NVIDIA";
  out.file("proc/driver/nvidia/version",
           fmt::format("NVRM version: NVIDIA UNIX {}Kernel Module for x86_64  {}  Release Build  \nGCC "
                       "version:  gcc version 12.2.0 (Debian 12.2.0-14)\n",
                       open_modules ? "Open " : "", version),
           0444);
  std::string params;
  for (const auto& [key, value] : host.nvidia_parameters) params += fmt::format("{}: {}\n", key, value);
  out.file("proc/driver/nvidia/params", params, 0444);
  out.file("proc/driver/nvidia/registry", "Binary: \"\"\n");
  out.file("proc/driver/nvidia/suspend", "suspend hibernate resume\n");
  out.file("proc/driver/nvidia/suspend_depth", "default modeset uvm\n");
  out.file("proc/driver/nvidia/patches/README",
           "The NVIDIA graphics driver's kernel interface files can be\npatched to improve compatibility "
           "with new Linux kernels or to\nfix bugs in these files.\n",
           0444);
  out.file("proc/driver/nvidia/warnings/README",
           "The NVIDIA graphics driver tries to detect potential problems\nwith the host system and warns "
           "about them using the system's\nlogging mechanisms.\n",
           0444);
  const auto capability = [&](const std::string& name, unsigned minor, unsigned mode) {
    out.file("proc/driver/nvidia/capabilities/" + name,
             fmt::format("DeviceFileMinor: {}\nDeviceFileMode: {}\nDeviceFileModify: 1\n", minor, mode),
             0444);
    out.file(fmt::format("dev/nvidia-caps/nvidia-cap{}", minor), "", mode);
  };
  capability("mig/config", 1, 256);
  capability("mig/monitor", 2, 292);
  capability("fabric-imex-mgmt", 4323, 256);
  if (state.nvswitch_count > 0) capability("fabric-mgmt", 0, 256);
  // The whole table of minors, whether instances exist or not: gpuG, giI, ciC = 3 + 135 G + 9 I (+ 1 + C).
  std::string minors = "config 1\nmonitor 2\n";
  for (unsigned g = 0; g < 32; ++g) {
    for (unsigned i = 0; i < 15; ++i) {
      const unsigned base = 3 + 135 * g + 9 * i;
      minors += fmt::format("gpu{}/gi{}/access {}\n", g, i, base);
      for (unsigned c = 0; c < 8; ++c)
        minors += fmt::format("gpu{}/gi{}/ci{}/access {}\n", g, i, c, base + 1 + c);
    }
  }
  out.file("proc/driver/nvidia-caps/mig-minors", minors, 0444);
  out.file("proc/driver/nvidia-caps/sys-minors",
           state.nvswitch_count > 0 ? "fabric-mgmt 0\nfabric-imex-mgmt 4323\n" : "fabric-imex-mgmt 4323\n",
           0444);
  out.file("dev/nvidiactl", "", 0666);
  out.file("dev/nvidia-uvm", "", 0666);
  out.file("dev/nvidia-uvm-tools", "", 0666);
  for (std::uint32_t g = 0; g < state.gpu_count; ++g) {
    const Gpu& gpu = state.gpus[g];
    const Chip& chip = state.chips[gpu.chip];
    const std::string address =
        fmt::format("{:04x}:{:02x}:{:02x}.0", gpu.pci_domain, gpu.pci_bus, gpu.pci_device);
    const std::string path = "proc/driver/nvidia/gpus/" + address;
    out.file(path + "/information",
             fmt::format("Model: \t\t {}\nIRQ:   \t\t {}\nGPU UUID: \t {}\nVideo BIOS: \t {}\nBus Type: \t "
                         "PCIe\nDMA Size: \t 52 bits\n"
                         "DMA Mask: \t 0xfffffffffffff\nBus Location: \t {}\nDevice Minor: \t {}\nGPU "
                         "Firmware: \t {}\nGPU Excluded:\t No\n",
                         chip.model.view(), gpu.irq, gpu.uuid.view(), lower(chip.vbios.view()), address,
                         gpu.minor, version),
             0444);
    out.file(path + "/registry", "Binary: \"\"\n");
    out.file(path + "/power",
             "Runtime D3 status:          Disabled by default\nVideo Memory:               Active\n\nGPU "
             "Hardware Support:\n"
             " Video Memory Self Refresh: Not Supported\n Video Memory Off:          Not Supported\n\nS0ix "
             "Power Management:\n"
             " Platform Support:          Not Supported\n Status:                    Disabled\n\nNotebook "
             "Dynamic Boost:     Not Supported\n",
             0444);
    out.file(fmt::format("dev/nvidia{}", gpu.minor), "", 0666);
  }
  if (state.nvswitch_count > 0) {
    out.file("dev/nvidia-nvswitchctl", "", 0666);
    std::uint32_t n = 0;
    for (const auto& f : host.pci) {
      if (f.driver != "nvidia-nvswitch") continue;
      out.file(fmt::format("dev/nvidia-nvswitch{}", n), "", 0666);
      out.file(fmt::format("proc/driver/nvidia-nvswitch/devices/{}/information", address_of(f)),
               fmt::format("BIOS Version:\t 96.10.55.00.01\nPhysical ID:\t {}\nDevice Minor:\t {}\n", n, n),
               0444);
      ++n;
    }
  }
  std::string modules;
  std::uint64_t at = 0xffffffffc0400000ULL;
  for (const auto& m : host.modules) {
    std::string by;
    for (const auto& user : m.by) by += user + ",";
    const bool nvidia = m.name.starts_with("nvidia");
    modules += fmt::format("{} {} {} {} Live 0x{:016x}{}\n", m.name, m.size, m.used, by.empty() ? "-" : by,
                           at, nvidia ? " (OE)" : "");
    at += (m.size + 0xfff) & ~0xfffULL;
    const std::string path = "sys/module/" + m.name;
    out.attribute(path + "/initstate", "live");
    out.attribute(path + "/refcnt", fmt::format("{}", m.used));
    out.attribute(path + "/coresize", fmt::format("{}", m.size));
    out.directory(path + "/holders");
    if (nvidia) {
      out.attribute(path + "/version", version);
      out.attribute(path + "/taint", "OE");
    }
    for (const auto& user : m.by) out.link(path + "/holders/" + user, "sys/module/" + user);
  }
  out.file("proc/modules", modules, 0444);
  for (const auto& f : host.pci) {
    if (f.driver == "nvidia") out.link("sys/bus/pci/drivers/nvidia/module", "sys/module/nvidia");
  }
}

}  // namespace bulkhead::twin
