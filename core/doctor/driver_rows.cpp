// The NVIDIA driver and what must fit it: libraries, CUDA toolkits, container images.
#include <algorithm>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/doctor/rows.hpp"

namespace bulkhead::doctor {

namespace {

constexpr const char* version_file = "/proc/driver/nvidia/version";

std::vector<std::string> driver_packages(const Evidence& e) {
  return install(e, "nvidia-driver nvidia-smi", "nvidia-driver nvidia-driver-cuda",
                 "nvidia-open-driver-G06-signed-kmp-default nvidia-compute-utils-G06");
}

std::optional<std::string> kernel_driver(const Evidence& e) {
  if (const auto& text = e.text(version_file)) {
    if (const auto line = line_with(*text, "NVRM version")) return first_version(*line);
  }
  return std::nullopt;
}

bool all_on_vfio(const Evidence& e) {
  const auto gpus = all_gpus(e);
  return !gpus.empty() &&
         std::all_of(gpus.begin(), gpus.end(), [](const auto* gpu) { return on_vfio(*gpu); });
}

Judgement loaded(const Evidence& e) {
  if (all_on_vfio(e)) return ok("every GPU is on vfio-pci: the NVIDIA driver is not needed on this host");
  const auto version = kernel_driver(e);
  if (!version) {
    return fail("the NVIDIA kernel driver is not loaded", {quote(e, version_file)},
                driver_packages(e) +
                    std::vector<std::string>{sudo(e, "modprobe nvidia"),
                                             sudo(e, "dmesg") + " | grep -E 'NVRM|nvidia' | tail -20"});
  }
  if (!e.host.cuda_version) {
    return fail("the kernel driver is loaded and its library does not answer",
                {quote(e, version_file), {"NVML", e.host.cuda_version.why}},
                {"nvidia-smi", sudo(e, "dmesg") + " | grep NVRM | tail -20"});
  }
  if (e.host.gpus.empty())
    return fail("the driver answers and sees no GPU", {quote(e, version_file), {"NVML", "0 devices"}},
                {"lspci -nnk -d 10de:", sudo(e, "dmesg") + " | grep NVRM | tail -20"});
  return ok(fmt::format("driver {}", *version), {quote(e, version_file)});
}

Judgement library(const Evidence& e) {
  const auto version = kernel_driver(e);
  if (!version)
    return all_on_vfio(e) ? ok("no NVIDIA driver is in use")
                          : waits("driver.loaded", "no driver to compare with");
  std::vector<Source> other;
  std::optional<Source> same;
  for (const auto& [directory, reading] : e.names) {
    if (!reading || !directory.starts_with("/usr/lib")) continue;
    for (const std::string& name : *reading) {
      for (const std::string_view stem : {"libnvidia-ml.so.", "libcuda.so."}) {
        if (!name.starts_with(stem) || name.find('.', stem.size()) == std::string::npos) continue;
        const std::string found = name.substr(stem.size());
        Source source{directory + "/" + name, fmt::format("library {}, kernel driver {}", found, *version)};
        if (found == *version)
          same = source;
        else
          other.push_back(source);
      }
    }
  }
  if (same) return ok("the driver's libraries fit the loaded kernel driver", {*same});
  if (!other.empty()) {
    return fail(
        "libraries and loaded kernel driver are of different versions", other,
        {"# the driver was upgraded and not reloaded: stop what holds the GPUs, then", sudo(e, "reboot")});
  }
  if (e.host.driver_version && *e.host.driver_version == *version) {
    return ok("the library answers for the loaded kernel driver",
              {{"NVML", *e.host.driver_version}, quote(e, version_file)});
  }
  return unknown("no versioned driver library was found in the usual places", {quote(e, version_file)});
}

Judgement api_mismatch(const Evidence& e) {
  if (!e.kernel_log)
    return unknown("the kernel log cannot be read", {{"kernel log", e.kernel_log.why}}, as_root(e));
  if (const auto line = line_with(e.kernel_log->text, "NVRM: API mismatch")) {
    return warn(
        "a process brought driver libraries of another version", {{e.kernel_log->source, *line}},
        {"# one container: mend its image, it must not ship libcuda; every process: reload the driver",
         sudo(e, "dmesg") + " | grep -A4 'NVRM: API mismatch'"});
  }
  return ok("no process was turned away for its library version",
            {{e.kernel_log->source, "no \"NVRM: API mismatch\""}});
}

Judgement rival(const Evidence& e) {
  std::vector<Source> taken;
  for (const auto* device : all_gpus(e)) {
    if (!device->driver || *device->driver == "nvidia" || on_vfio(*device)) continue;
    taken.push_back({sysfs(*device, "driver"), "-> " + *device->driver});
  }
  if (taken.empty()) return ok("no GPU is held by another driver");
  return fail("another driver holds a GPU", taken,
              {"printf 'blacklist nouveau\\noptions nouveau modeset=0\\n' | " +
                   sudo(e, "tee /etc/modprobe.d/bulkhead-nouveau.conf"),
               family(e) == Family::debian ? sudo(e, "update-initramfs -u") : sudo(e, "dracut --force"),
               sudo(e, "reboot")});
}

Judgement lost(const Evidence& e) {
  std::vector<Source> gone;
  for (const auto& gpu : e.host.lost) {
    if (on_vfio(gpu.pci)) continue;
    gone.push_back({"/sys/bus/pci/devices/" + gpu.pci.address.str(), gpu.why});
  }
  if (gone.empty()) return ok("every GPU on the PCI bus answers or is on vfio-pci");
  if (!kernel_driver(e)) return waits("driver.loaded", "no GPU answers without the driver");
  if (e.kernel_log) {
    for (const char* words :
         {"GPU has fallen off the bus", "RmInitAdapter failed", "fallen off the bus and is not responding"}) {
      if (const auto line = line_with(e.kernel_log->text, words))
        gone.push_back({e.kernel_log->source, *line});
    }
  }
  const std::string address = e.host.lost.front().pci.address.str();
  return fail(
      "a GPU is on the PCI bus and the driver does not answer for it", gone,
      {sudo(e, "dmesg") + " | grep -E 'NVRM|AER' | tail -20",
       sudo(e, fmt::format("sh -c 'echo 1 > /sys/bus/pci/devices/{}/remove; echo 1 > /sys/bus/pci/rescan'",
                           address)),
       "# still gone: power-cycle the node; if it returns, replace the GPU"});
}

Judgement toolkit(const Evidence& e) {
  std::vector<Source> all, newer_minor, newer_major;
  const auto driver = e.host.cuda_version ? Version::parse(*e.host.cuda_version) : std::nullopt;
  for (const char* pattern : {"/usr/local/cuda*/version.json", "/usr/local/cuda*/version.txt",
                              "/usr/lib/cuda/version.txt", "/opt/cuda/version.json"}) {
    for (const auto& [path, text] : e.matching(pattern)) {
      // version.json: {"cuda": {"name": "CUDA SDK", "version": "12.4.1"}, ...}; version.txt: CUDA
      // Version 11.0.3
      std::string_view rest = text;
      if (const std::size_t at = rest.find("\"cuda\""); at != std::string_view::npos) rest.remove_prefix(at);
      const auto found = first_version(rest);
      const auto version = found ? Version::parse(*found) : std::nullopt;
      if (!version) continue;
      Source source{path, "CUDA toolkit " + *found};
      all.push_back(source);
      if (!driver) continue;
      if (version->major_part() > driver->major_part())
        newer_major.push_back(source);
      else if (version->major_part() == driver->major_part() && version->parts.size() > 1 &&
               driver->parts.size() > 1 && version->parts[1] > driver->parts[1])
        newer_minor.push_back(source);
    }
  }
  if (all.empty()) return ok("no CUDA toolkit is installed on the host: containers bring theirs");
  if (!driver) return waits("driver.loaded", "toolkits are installed and no driver says what it supports");
  const std::string supports = fmt::format("the driver supports CUDA {}", *e.host.cuda_version);
  if (!newer_major.empty())
    return fail(supports + " and a newer major toolkit is installed", newer_major, driver_packages(e));
  if (!newer_minor.empty())
    return warn(supports + "; a newer minor toolkit runs only without PTX and new features", newer_minor,
                driver_packages(e));
  return ok(supports + ", toolkits fit", all);
}

Judgement images(const Evidence& e) {
  const auto driver = e.host.cuda_version ? Version::parse(*e.host.cuda_version) : std::nullopt;
  std::vector<Source> newer;
  std::size_t judged = 0;
  for (const char* pattern : {"/var/lib/docker/image/overlay2/imagedb/content/sha256/*",
                              "/var/lib/containers/storage/overlay-images/*/*"}) {
    for (const auto& [path, text] : e.matching(pattern)) {
      const std::size_t at = text.find("CUDA_VERSION=");
      if (at == std::string::npos) continue;
      const auto version = Version::parse(std::string_view(text).substr(at + 13, 32));
      if (!version) continue;
      ++judged;
      if (driver && version->major_part() > driver->major_part()) {
        newer.push_back({path, text.substr(at, std::min<std::size_t>(text.find('"', at) - at, 32))});
      }
    }
  }
  if (judged > 0 && !driver)
    return waits("driver.loaded", "images with CUDA are stored and no driver says what it supports");
  if (!newer.empty()) {
    return warn(fmt::format("{} of {} CUDA images need a newer driver than CUDA {}", newer.size(), judged,
                            *e.host.cuda_version),
                newer, driver_packages(e));
  }
  if (judged == 0) {
    const std::string store = "/var/lib/docker/image/overlay2/imagedb/content/sha256";
    if (e.names.contains(store) && !e.list(store) && e.list(store).why.find("denied") != std::string::npos) {
      return unknown("the image store is closed to this user", {quote(e, store)}, as_root(e));
    }
    return ok("no container image with CUDA is stored on this host");
  }
  return ok(fmt::format("{} CUDA images fit the driver", judged));
}

Judgement persistence(const Evidence& e) {
  std::vector<Source> off;
  std::size_t known = 0;
  std::string which;
  for (const auto& gpu : e.host.gpus) {
    if (!gpu.persistence) continue;
    ++known;
    if (*gpu.persistence) continue;
    off.push_back({"NVML", name_of(gpu) + ": persistence mode off"});
    which += fmt::format("{}{}", which.empty() ? "" : ",", gpu.index);
  }
  if (known == 0) return unknown("no GPU tells its persistence mode");
  if (off.empty()) return ok(fmt::format("on for {} GPUs", known));
  return warn(fmt::format("off for {} GPUs", off.size()), off,
              {sudo(e, "systemctl enable --now nvidia-persistenced"),
               sudo(e, fmt::format("nvidia-smi -i {} -pm 1", which))});
}

}  // namespace

std::vector<Check> driver_rows() {
  return {
      {.id = "driver.loaded",
       .title = "The NVIDIA driver answers",
       .requirements = {"R3", "R20"},
       .purposes = for_driver,
       .reads = {{How::text, version_file}},
       .why = "Nothing can be sliced or measured without the driver.",
       .judge = loaded},
      {.id = "driver.library",
       .title = "Driver library and kernel driver are one version",
       .requirements = {"R20"},
       .purposes = for_driver,
       .reads = {{How::text, version_file},
                 {How::names, "/usr/lib/x86_64-linux-gnu"},
                 {How::names, "/usr/lib/x86_64-linux-gnu/nvidia/current"},
                 {How::names, "/usr/lib64"},
                 {How::names, "/usr/lib/aarch64-linux-gnu"}},
       .why = "After an upgrade without a reload every new process fails with \"Driver/library version "
              "mismatch\".",
       .judge = library},
      {.id = "driver.api-mismatch",
       .title = "No process brings foreign driver libraries",
       .requirements = {"R20", "R23"},
       .purposes = for_driver,
       .reads = {},
       .why = "A container that ships its own libcuda works on one host and fails on the next.",
       .judge = api_mismatch},
      {.id = "driver.rival",
       .title = "No other driver holds a GPU",
       .requirements = {"R20"},
       .purposes = for_all,
       .reads = {{How::link, "/sys/bus/pci/devices/*/driver"}},
       .why = "nouveau and framebuffer drivers claim the GPU first and keep it.",
       .judge = rival},
      {.id = "gpu.lost",
       .title = "Every GPU on the bus answers",
       .requirements = {"R16", "R23"},
       .purposes = for_all,
       .reads = {},
       .why = "A GPU that fell off the bus disappears from nvidia-smi without a word.",
       .judge = lost},
      {.id = "cuda.toolkit",
       .title = "CUDA toolkits fit the driver",
       .requirements = {"R20"},
       .purposes = for_driver,
       .reads = {{How::text, "/usr/local/cuda*/version.json"},
                 {How::text, "/usr/local/cuda*/version.txt"},
                 {How::text, "/usr/lib/cuda/version.txt"},
                 {How::text, "/opt/cuda/version.json"}},
       .why = "A program built with a newer CUDA than the driver supports cannot create a context.",
       .judge = toolkit},
      {.id = "cuda.images",
       .title = "Container images fit the driver",
       .requirements = {"R20"},
       .purposes = for_driver,
       .reads = {{How::names, "/var/lib/docker/image/overlay2/imagedb/content/sha256"},
                 {How::text, "/var/lib/docker/image/overlay2/imagedb/content/sha256/*"},
                 {How::text, "/var/lib/containers/storage/overlay-images/*/*"}},
       .why = "The toolkit inside an image counts, not the one on the host.",
       .judge = images},
      {.id = "driver.persistence",
       .title = "Persistence mode is on",
       .requirements = {"R18", "R29"},
       .purposes = for_driver,
       .reads = {},
       .why = "Without it clock locks and power limits are forgotten when the last process ends, and the "
              "next start is slow.",
       .judge = persistence},
  };
}

}  // namespace bulkhead::doctor
