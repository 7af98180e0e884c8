// The host itself: kernel, CPU, memory, governor.
#include <fmt/format.h>

#include "base/text.hpp"
#include "core/doctor/rows.hpp"

namespace bulkhead::doctor {

namespace {

Judgement kernel_version(const Evidence& e) {
  if (!e.host.kernel)
    return unknown("the kernel's version cannot be read",
                   {{"/proc/sys/kernel/osrelease", e.host.kernel.why}});
  const auto version = Version::parse(*e.host.kernel);
  const Source source{"/proc/sys/kernel/osrelease", *e.host.kernel};
  if (!version) return unknown("the kernel's version cannot be understood", {source});
  if (*version >= Version{{5, 15}}) return ok(fmt::format("kernel {}", *e.host.kernel), {source});
  return fail(
      fmt::format("kernel {} is older than 5.15", *e.host.kernel), {source},
      (family(e) == Family::debian
           ? std::vector{sudo(e, "apt-get update"), sudo(e, "apt-get install linux-image-amd64")}
       : family(e) == Family::rhel ? std::vector{sudo(e, "dnf upgrade kernel")}
       : family(e) == Family::suse ? std::vector{sudo(e, "zypper update kernel-default")}
                                   : std::vector<std::string>{"# install a kernel of 5.15 or newer"}) +
          std::vector<std::string>{sudo(e, "reboot")});
}

Judgement virtualization(const Evidence& e) {
  const auto& cpus = e.text("/proc/cpuinfo");
  if (!cpus) return unknown("the CPU cannot be identified", {quote(e, "/proc/cpuinfo")});
  const auto flags = line_with(*cpus, "flags");
  if (!flags) return unknown("the CPU lists no flags", {{"/proc/cpuinfo", "no line \"flags\""}});
  for (const char* flag : {"vmx", "svm"}) {
    if (has_word(*flags, flag))
      return ok("the CPU runs virtual machines", {{"/proc/cpuinfo", fmt::format("flags: ... {} ...", flag)}});
  }
  if (virtual_machine(e)) return ask_the_host(e, "the CPU offers no virtualization here");
  return fail("the CPU's virtualization is off", {{"/proc/cpuinfo", "flags hold neither vmx nor svm"}},
              {"# firmware setup: enable \"Intel Virtualization Technology (VT-x)\" or \"SVM Mode\""});
}

Judgement memory(const Evidence& e) {
  const std::string path = "/proc/meminfo";
  if (e.host.memory.count == 0) return unknown("the size of memory cannot be read", {quote(e, path)});
  // 128 GB of modules show as a little less: firmware and kernel keep some.
  constexpr std::uint64_t wanted = 120ULL * 1000 * 1000 * 1000;
  const Source source{path, "MemTotal " + human(e.host.memory)};
  if (e.host.memory.count >= wanted) return ok(fmt::format("{} of memory", human(e.host.memory)), {source});
  return warn(fmt::format("{} of memory: 128 GB or more is wanted", human(e.host.memory)), {source},
              {"# add memory: a guest with a passed-through GPU pins all of its memory, and pinned staging "
               "buffers of tenants come on top"});
}

Judgement governor(const Evidence& e) {
  const auto& now = e.host.cpu_governor;
  const std::string where = "/sys/devices/system/cpu/cpufreq/policy*/scaling_governor";
  if (!now) {
    if (virtual_machine(e)) return ask_the_host(e, "CPU frequency is not visible");
    return unknown("the kernel does not control CPU frequency here: firmware does, or no driver is loaded",
                   {{where, fmt::format("({})", now.why)}});
  }
  if (*now == "performance") return ok("all CPUs run the performance governor", {{where, *now}});
  return warn(fmt::format("the CPU governor is {}", *now), {{where, *now}},
              {sudo(e, "cpupower frequency-set -g performance"),
               "# for good: cpu_governor: performance in the node file"});
}

}  // namespace

std::vector<Check> host_rows() {
  return {
      {.id = "kernel.version",
       .title = "Kernel 5.15 or newer",
       .requirements = {"R7"},
       .purposes = for_all,
       .reads = {},
       .why = "Older kernels lack parts of VFIO and of the drivers' interfaces.",
       .judge = kernel_version},
      {.id = "cpu.virtualization",
       .title = "The CPU runs virtual machines",
       .requirements = {"R1", "R15"},
       .purposes = for_passthrough,
       .reads = {{How::text, "/proc/cpuinfo"}},
       .why = "Passthrough hands a device to a virtual machine.",
       .judge = virtualization},
      {.id = "memory.size",
       .title = "128 GB of memory or more",
       .requirements = {"R2"},
       .purposes = for_all,
       .reads = {{How::text, "/proc/meminfo"}},
       .why = "A guest with a passed-through device has all of its memory pinned: it can neither be swapped "
              "nor shared.",
       .judge = memory},
      {.id = "cpu.governor",
       .title = "CPU governor is performance",
       .requirements = {"R28"},
       .purposes = for_all,
       .reads = {},
       .why = "Kernel launches wait for the CPU; a clock that ramps up shows as jitter in every tenant.",
       .judge = governor},
  };
}

}  // namespace bulkhead::doctor
