#include "core/inventory/inventory.hpp"

#include <algorithm>

#include <fmt/format.h>

#include "base/text.hpp"

namespace bulkhead::inventory {

std::string_view name_of(Pool pool) {
  switch (pool) {
    case Pool::exclusive:
      return "exclusive";
    case Pool::mig:
      return "mig";
    case Pool::share:
      return "share";
    case Pool::passthrough:
      return "passthrough";
    case Pool::broken:
      return "broken";
  }
  return "unknown";
}

bool GpuInstance::busy() const {
  return std::any_of(compute.begin(), compute.end(),
                     [](const ComputeInstance& c) { return !c.holders.empty(); });
}

std::vector<Holder> GpuInstance::holders() const {
  std::vector<Holder> all;
  for (const auto& instance : compute)
    all.insert(all.end(), instance.holders.begin(), instance.holders.end());
  return all;
}

bool Gpu::busy() const {
  return !holders.empty() ||
         std::any_of(instances.begin(), instances.end(), [](const auto& i) { return i.busy(); });
}

const GpuInstance* Gpu::instance(unsigned id) const {
  const auto found =
      std::find_if(instances.begin(), instances.end(), [&](const auto& i) { return i.id == id; });
  return found == instances.end() ? nullptr : &*found;
}

namespace {

// A reading whose value needs a function to become JSON.
template <class T, class F>
Json json_of(const Reading<T>& reading, F&& convert) {
  if (reading) return convert(*reading);
  return Json{{"unavailable", reading.why}};
}
template <class T>
Json json_of(const Reading<T>& reading) {
  return json_of(reading, [](const T& value) { return Json(value); });
}
template <class Tag, class Rep>
Json json_of(const Reading<Quantity<Tag, Rep>>& reading) {
  return json_of(reading, [](const auto& quantity) { return Json(quantity.count); });
}

Json json_of(const PciLink& link) { return {{"speed_gts", link.speed_gts}, {"width", link.width}}; }

Json json_of(const Clocks& clocks) {
  return {{"graphics_mhz", clocks.graphics.count},
          {"sm_mhz", clocks.sm.count},
          {"memory_mhz", clocks.memory.count}};
}

Json json_of(const mig::Placement& place) { return {{"start", place.start}, {"size", place.size}}; }

Json json_of(const Holder& holder) {
  Json out = {{"pid", holder.pid},
              {"start_time", holder.start_time},
              {"name", holder.name},
              {"cgroup", holder.cgroup},
              {"memory_bytes", json_of(holder.memory)}};
  if (holder.gpu_instance) out["gpu_instance"] = *holder.gpu_instance;
  if (holder.compute_instance) out["compute_instance"] = *holder.compute_instance;
  return out;
}

Json json_of(const Holder& holder);
Json json_of(const ComputeInstance& instance);
Json json_of(const GpuInstance& instance);
Json json_of(const mig::Profile& profile);
Json json_of(const Bar& bar);
Json json_of(const Gpu& gpu);
Json json_of(const LostGpu& lost);
Json json_of(const PciDevice& pci);
Json json_of(const NumaNode& node);
Json json_of(const SystemdUnit& unit);
Json json_of(const VirtualShare& share);
Json json_of(const Accelerator& one);

template <class T>
Json list_of(const std::vector<T>& values) {
  Json out = Json::array();
  for (const auto& value : values) out.push_back(json_of(value));
  return out;
}

Json json_of(const ComputeInstance& instance) {
  return {{"id", instance.id},
          {"profile", instance.profile},
          {"placement", json_of(instance.place)},
          {"uuid", json_of(instance.uuid, [](const Uuid& uuid) { return Json(uuid.text); })},
          {"holders", list_of(instance.holders)}};
}

Json json_of(const GpuInstance& instance) {
  return {{"id", instance.id},
          {"profile_id", instance.profile},
          {"profile", instance.name},
          {"placement", json_of(instance.place)},
          {"ours", instance.ours},
          {"busy", instance.busy()},
          {"compute_instances", list_of(instance.compute)}};
}

Json json_of(const mig::Profile& profile) {
  return {{"id", profile.id},
          {"name", profile.name},
          {"compute_slices", profile.compute_slices},
          {"memory_slices", profile.size},
          {"memory_bytes", profile.memory.count},
          {"multiprocessors", profile.multiprocessors},
          {"copy_engines", profile.copy_engines},
          {"decoders", profile.decoders},
          {"encoders", profile.encoders},
          {"jpeg_engines", profile.jpeg_engines},
          {"optical_flow", profile.optical_flow},
          {"max_instances", profile.max_instances},
          {"starts", profile.starts}};
}

Json json_of(const Bar& bar) {
  return {{"index", bar.index},
          {"start", fmt::format("{:#x}", bar.start)},
          {"size_bytes", bar.size},
          {"flags", fmt::format("{:#x}", bar.flags)}};
}

Json json_of(const PciDevice& pci) {
  Json siblings = Json::array();
  for (const auto& sibling : pci.group_siblings) siblings.push_back(sibling.str());
  Json out = {{"address", pci.address.str()},
              {"vendor", fmt::format("{:04x}", pci.vendor)},
              {"device", fmt::format("{:04x}", pci.device)},
              {"subsystem", fmt::format("{:04x}:{:04x}", pci.subsystem_vendor, pci.subsystem_device)},
              {"class", fmt::format("{:06x}", pci.class_code)},
              {"iommu_group", json_of(pci.iommu_group)},
              {"iommu_group_siblings", std::move(siblings)},
              {"numa_node", json_of(pci.numa_node)},
              {"local_cpus", pci.local_cpus},
              {"driver", json_of(pci.driver)},
              {"link_now", json_of(pci.link_now, [](const PciLink& link) { return json_of(link); })},
              {"link_max", json_of(pci.link_max, [](const PciLink& link) { return json_of(link); })},
              {"bars", list_of(pci.bars)},
              {"boot_vga", pci.boot_vga},
              {"sriov", {{"vfs_total", json_of(pci.vfs_total)}, {"vfs_now", json_of(pci.vfs_now)}}}};
  if (pci.physical_function) out["physical_function"] = pci.physical_function->str();
  return out;
}

Json json_of(const Gpu& gpu) {
  Json mig = {{"capable", gpu.mig_capable}};
  if (gpu.mig_capable) {
    mig["enabled"] = gpu.mig_now;
    mig["pending"] = gpu.mig_pending;
    mig["memory_slices"] = gpu.geometry.memory_slices;
    mig["profiles"] = list_of(gpu.geometry.profiles);
    mig["instances"] = list_of(gpu.instances);
  }
  if (!gpu.mig_why.empty()) mig["why"] = gpu.mig_why;
  return {{"index", gpu.index},
          {"uuid", gpu.uuid.text},
          {"model", gpu.model},
          {"pool", name_of(gpu.pool)},
          {"busy", gpu.busy()},
          {"serial", json_of(gpu.serial)},
          {"minor", json_of(gpu.minor)},
          {"vbios", json_of(gpu.vbios)},
          {"compute_capability", json_of(gpu.compute_capability)},
          {"virtualization", json_of(gpu.virtualization)},
          {"pci", json_of(gpu.pci)},
          {"memory_bytes", gpu.memory.count},
          {"memory_used_bytes", json_of(gpu.memory_used)},
          {"persistence", json_of(gpu.persistence)},
          {"temperature",
           {{"gpu_c", json_of(gpu.temperature)},
            {"margin_c", json_of(gpu.margin)},
            {"slowdown_c", json_of(gpu.slowdown_at)},
            {"shutdown_c", json_of(gpu.shutdown_at)}}},
          {"power",
           {{"draw_mw", json_of(gpu.power.draw)},
            {"limit_mw", json_of(gpu.power.limit)},
            {"limit_default_mw", json_of(gpu.power.limit_default)},
            {"limit_min_mw", json_of(gpu.power.limit_min)},
            {"limit_max_mw", json_of(gpu.power.limit_max)}}},
          {"clocks", json_of(gpu.clocks, [](const Clocks& clocks) { return json_of(clocks); })},
          {"clocks_max", json_of(gpu.clocks_max, [](const Clocks& clocks) { return json_of(clocks); })},
          {"clock_event_reasons", json_of(gpu.clock_event_reasons)},
          {"ecc", json_of(gpu.ecc,
                          [](const EccCounts& ecc) {
                            return Json{{"corrected", ecc.corrected}, {"uncorrected", ecc.uncorrected}};
                          })},
          {"nvlink",
           {{"links", gpu.nvlink.links},
            {"active", gpu.nvlink.active},
            {"fabric_state", json_of(gpu.nvlink.fabric_state)},
            {"fabric_status", json_of(gpu.nvlink.fabric_status)}}},
          {"mig", std::move(mig)},
          {"holders", list_of(gpu.holders)}};
}

Json json_of(const LostGpu& lost) { return {{"why", lost.why}, {"pci", json_of(lost.pci)}}; }

Json json_of(const NumaNode& node) {
  Json pages = Json::array();
  for (const auto& of : node.hugepages)
    pages.push_back({{"size_bytes", of.size.count}, {"total", of.total}, {"free", of.free}});
  return {{"id", node.id},
          {"cpus", node.cpus},
          {"memory_bytes", node.memory.count},
          {"hugepages", std::move(pages)}};
}

Json json_of(const VirtualShare& share) {
  return {{"function", share.number},
          {"quantum_ms", json_of(share.quantum_ms)},
          {"preempt_us", json_of(share.preempt_us)},
          {"priority", json_of(share.priority)},
          {"memory_bytes", json_of(share.memory)}};
}

Json json_of(const Accelerator& one) {
  Json out = {{"maker", one.maker},
              {"model", json_of(one.model)},
              {"memory_bytes", json_of(one.memory)},
              {"memory_used_bytes", json_of(one.memory_used)},
              {"abilities", abilities(one)},
              {"pci", json_of(one.pci)}};
  if (one.compute_partition || !one.compute_partitions.empty())
    out["compute_partition"] = {{"now", json_of(one.compute_partition)}, {"offered", one.compute_partitions}};
  if (one.memory_partition || !one.memory_partitions.empty())
    out["memory_partition"] = {{"now", json_of(one.memory_partition)}, {"offered", one.memory_partitions}};
  if (one.shares_set) out["function_shares"] = list_of(one.shares);
  return out;
}

Json json_of(const SystemdUnit& unit) {
  return {{"name", unit.name},
          {"load_state", unit.load_state},
          {"active_state", unit.active_state},
          {"sub_state", unit.sub_state},
          {"file_state", unit.file_state}};
}

}  // namespace

std::vector<std::string> abilities(const Accelerator& one) {
  std::vector<std::string> out;
  if (!one.compute_partitions.empty()) {
    out.push_back(fmt::format("compute partitions: {} now, can be {}",
                              one.compute_partition.value_or("unknown"), join(one.compute_partitions, ", ")));
  } else if (one.compute_partition) {
    out.push_back(fmt::format("compute partitions: {}, not to be changed from here", *one.compute_partition));
  }
  if (!one.memory_partitions.empty()) {
    out.push_back(fmt::format("memory partitions: {} now, can be {}",
                              one.memory_partition.value_or("unknown"), join(one.memory_partitions, ", ")));
  } else if (one.memory_partition) {
    out.push_back(fmt::format("memory partitions: {}, not to be changed from here", *one.memory_partition));
  }
  if (one.pci.vfs_total && *one.pci.vfs_total > 0) {
    out.push_back(
        fmt::format("virtual functions: {} of {} made", one.pci.vfs_now.value_or(0), *one.pci.vfs_total));
  }
  if (one.shares_set) out.emplace_back("the share of each virtual function can be set (sriov_admin)");
  if (one.pci.driver && one.pci.driver->starts_with("vfio")) {
    out.push_back(fmt::format("bound to {}: set apart for virtual machines", *one.pci.driver));
  } else if (one.pci.iommu_group) {
    out.emplace_back("passthrough: it is in an IOMMU group");
  }
  return out;
}

Json to_json(const Host& host) {
  return {{"apiVersion", "bulkhead/v1"},
          {"kind", "Inventory"},
          {"host",
           {{"hostname", host.hostname},
            {"os", json_of(host.os)},
            {"os_id", json_of(host.os_id)},
            {"kernel", json_of(host.kernel)},
            {"machine", json_of(host.machine)},
            {"cpu_model", json_of(host.cpu_model)},
            {"cpus_online", host.cpus_online},
            {"cpu_governor", json_of(host.cpu_governor)},
            {"numa_nodes", list_of(host.numa)},
            {"memory_bytes", host.memory.count},
            {"kernel_cmdline", json_of(host.kernel_cmdline)},
            {"boot_id", json_of(host.boot_id)}}},
          {"driver", {{"version", json_of(host.driver_version)}, {"cuda", json_of(host.cuda_version)}}},
          {"gpus", list_of(host.gpus)},
          {"lost_gpus", list_of(host.lost)},
          {"nvswitches", list_of(host.nvswitches)},
          {"accelerators", list_of(host.accelerators)},
          {"virtual_functions", list_of(host.virtual_functions)},
          {"units", list_of(host.units)},
          {"notes", host.notes}};
}

}  // namespace bulkhead::inventory
