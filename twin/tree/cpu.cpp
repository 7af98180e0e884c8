// /sys/devices/system/{cpu,node}, /proc/cpuinfo: what lscpu, hwloc and bulkhead read of processors and
// memory.
#include <fmt/format.h>

#include "base/text.hpp"
#include "twin/tree/writer.hpp"

namespace bulkhead::twin {

namespace {

struct Cache {
  unsigned level;
  const char* type;
  unsigned kib;
  bool per_socket;
};

void write_cpu(Writer& out, const Host& host, unsigned cpu, const std::vector<std::string>& node_of_cpu,
               std::string& cpuinfo) {
  const Cpu& c = host.cpu;
  const unsigned cores = c.sockets * c.cores_per_socket;
  const unsigned total = cpu_total(host);
  const unsigned core = cpu % cores;
  const unsigned socket = core / c.cores_per_socket;
  std::vector<unsigned> siblings, package;
  for (unsigned t = 0; t < c.threads_per_core; ++t) {
    siblings.push_back(t * cores + core);
    for (unsigned k = 0; k < c.cores_per_socket; ++k)
      package.push_back(t * cores + socket * c.cores_per_socket + k);
  }
  const std::string path = fmt::format("sys/devices/system/cpu/cpu{}", cpu);
  const auto topology = [&](const char* key, const std::string& value) {
    out.attribute(path + "/topology/" + key, value);
  };
  const std::string thread_mask = cpu_mask(siblings, total), thread_list = format_ranges(siblings);
  const std::string package_mask = cpu_mask(package, total), package_list = format_ranges(package);
  topology("core_id", fmt::format("{}", core % c.cores_per_socket));
  topology("physical_package_id", fmt::format("{}", socket));
  topology("die_id", "0");
  topology("thread_siblings", thread_mask);
  topology("thread_siblings_list", thread_list);
  topology("core_cpus", thread_mask);
  topology("core_cpus_list", thread_list);
  topology("core_siblings", package_mask);
  topology("core_siblings_list", package_list);
  topology("package_cpus", package_mask);
  topology("package_cpus_list", package_list);
  if (cpu > 0) out.attribute(path + "/online", "1", 0644);
  out.link(path + "/" + node_of_cpu[cpu], "sys/devices/system/node/" + node_of_cpu[cpu]);
  const Cache caches[] = {{1, "Data", c.l1d_kib, false},
                          {1, "Instruction", c.l1i_kib, false},
                          {2, "Unified", c.l2_kib, false},
                          {3, "Unified", c.l3_kib, true}};
  unsigned index = 0;
  for (const auto& cache : caches) {
    if (cache.kib == 0) continue;
    const std::string at = fmt::format("{}/cache/index{}", path, index++);
    out.attribute(at + "/level", fmt::format("{}", cache.level));
    out.attribute(at + "/type", cache.type);
    out.attribute(at + "/size", fmt::format("{}K", cache.kib));
    out.attribute(at + "/coherency_line_size", "64");
    out.attribute(at + "/shared_cpu_map", cache.per_socket ? package_mask : thread_mask);
    out.attribute(at + "/shared_cpu_list", cache.per_socket ? package_list : thread_list);
  }
  if (!c.cpufreq_driver.empty()) {
    const std::string policy = fmt::format("sys/devices/system/cpu/cpufreq/policy{}", cpu);
    const auto set = [&](const char* key, const std::string& value, unsigned mode = 0444) {
      out.attribute(policy + "/" + key, value, mode);
    };
    set("affected_cpus", fmt::format("{}", cpu));
    set("related_cpus", fmt::format("{}", cpu));
    set("scaling_driver", c.cpufreq_driver);
    set("scaling_governor", c.governor, 0644);
    set("scaling_available_governors", join(c.governors, " "));
    set("scaling_cur_freq", fmt::format("{}", c.mhz_base * 1000));
    set("scaling_min_freq", fmt::format("{}", c.mhz_min * 1000), 0644);
    set("scaling_max_freq", fmt::format("{}", c.mhz_max * 1000), 0644);
    set("cpuinfo_min_freq", fmt::format("{}", c.mhz_min * 1000));
    set("cpuinfo_max_freq", fmt::format("{}", c.mhz_max * 1000));
    out.link(path + "/cpufreq", policy);
  }
  cpuinfo += fmt::format(
      "processor\t: {}\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: {}\nstepping\t: "
      "{}\nmicrocode\t: {}\n"
      "cpu MHz\t\t: {}.000\ncache size\t: {} KB\nphysical id\t: {}\nsiblings\t: {}\ncore id\t\t: {}\ncpu "
      "cores\t: {}\napicid\t\t: {}\n"
      "initial apicid\t: {}\nfpu\t\t: yes\nfpu_exception\t: yes\ncpuid level\t: 32\nwp\t\t: yes\nflags\t\t: "
      "{}\nbugs\t\t:\n"
      "bogomips\t: {}.00\nclflush size\t: 64\ncache_alignment\t: 64\naddress sizes\t: 52 bits physical, 57 "
      "bits virtual\npower management:\n\n",
      cpu, c.vendor, c.family, c.model_number, c.model, c.stepping, c.microcode, c.mhz_base, c.l3_kib, socket,
      c.cores_per_socket * c.threads_per_core, core % c.cores_per_socket, c.cores_per_socket, cpu, cpu,
      c.flags, c.mhz_base * 2);
}

}  // namespace

void write_cpus(Writer& out, const Host& host) {
  const unsigned total = cpu_total(host);
  const auto nodes = host.numa_memory_kib.size();
  const std::string all = total == 1 ? "0" : fmt::format("0-{}", total - 1);
  for (const char* set : {"online", "possible", "present"})
    out.attribute(fmt::format("sys/devices/system/cpu/{}", set), all);
  out.attribute("sys/devices/system/cpu/offline", "");
  out.attribute("sys/devices/system/cpu/isolated", "");
  out.attribute("sys/devices/system/cpu/kernel_max", "8191");
  out.attribute("sys/devices/system/cpu/smt/active", host.cpu.threads_per_core > 1 ? "1" : "0");
  out.attribute("sys/devices/system/cpu/smt/control", host.cpu.threads_per_core > 1 ? "on" : "notsupported",
                0644);
  std::vector<std::string> node_of_cpu(total);
  const std::string all_nodes = nodes == 1 ? "0" : fmt::format("0-{}", nodes - 1);
  for (const char* set : {"online", "possible", "has_cpu", "has_memory", "has_normal_memory"}) {
    out.attribute(fmt::format("sys/devices/system/node/{}", set), all_nodes);
  }
  const std::size_t per_socket = (nodes + host.cpu.sockets - 1) / host.cpu.sockets;
  for (std::size_t n = 0; n < nodes; ++n) {
    const std::string node = fmt::format("node{}", n);
    const std::string path = "sys/devices/system/node/" + node;
    const auto cpus = cpus_of_node(host, static_cast<int>(n));
    for (const unsigned cpu : cpus) {
      node_of_cpu[cpu] = node;
      out.link(fmt::format("{}/cpu{}", path, cpu), fmt::format("sys/devices/system/cpu/cpu{}", cpu));
    }
    out.attribute(path + "/cpumap", cpu_mask(cpus, total));
    out.attribute(path + "/cpulist", format_ranges(cpus));
    std::string distance;
    for (std::size_t other = 0; other < nodes; ++other) {
      distance += fmt::format("{}{}", other == 0 ? "" : " ",
                              other == n                             ? 10
                              : other / per_socket == n / per_socket ? 12
                                                                     : 21);
    }
    out.attribute(path + "/distance", distance);
    const std::uint64_t kib = host.numa_memory_kib[n];
    const auto line = [&](const char* key, std::uint64_t value) {
      return fmt::format("Node {} {:<15} {:>8} kB\n", n, fmt::format("{}:", key), value);
    };
    out.file(path + "/meminfo",
             line("MemTotal", kib) + line("MemFree", kib / 16 * 15) + line("MemUsed", kib / 16) +
                 fmt::format("Node {} HugePages_Total:     0\nNode {} HugePages_Free:      0\n", n, n),
             0444);
    out.attribute(path + "/hugepages/hugepages-2048kB/nr_hugepages", "0", 0644);
    out.attribute(path + "/hugepages/hugepages-2048kB/free_hugepages", "0");
  }
  std::string cpuinfo;
  for (unsigned cpu = 0; cpu < total; ++cpu) write_cpu(out, host, cpu, node_of_cpu, cpuinfo);
  out.file("proc/cpuinfo", cpuinfo, 0444);
}

}  // namespace bulkhead::twin
