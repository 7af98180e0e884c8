// bulkhead inventory: what the host has, on one page.
#include <algorithm>
#include <memory>

#include <fmt/format.h>

#include "base/json.hpp"
#include "base/text.hpp"
#include "cli/cli.hpp"
#include "core/inventory/inventory.hpp"
#include "engine/observe/observe.hpp"

namespace bulkhead::cli {

namespace {

using inventory::Gpu;
using inventory::GpuInstance;
using inventory::Host;

struct Options {
  bool json = false, wide = false, cost = false;
  int gpu = -1;
};

std::string gigabytes(Bytes bytes) {
  return fmt::format("{:.1f}", static_cast<double>(bytes.count) / (1024.0 * 1024 * 1024));
}

std::string short_model(std::string_view model) {
  if (model.starts_with("NVIDIA ")) model.remove_prefix(7);
  return std::string(model);
}

std::string degrees(const Reading<Celsius>& reading) {
  return reading ? fmt::format("{}C", reading->count) : "-";
}
std::string in_watts(const Reading<Milliwatts>& reading) {
  return reading ? fmt::format("{}", (reading->count + 500) / 1000) : "-";
}
std::string numa_of(const inventory::PciDevice& pci) {
  return pci.numa_node ? std::to_string(*pci.numa_node) : "-";
}
std::string group_of(const inventory::PciDevice& pci) {
  if (!pci.iommu_group) return "-";
  const auto others = pci.group_siblings.size();
  return others == 0 ? std::to_string(*pci.iommu_group) : fmt::format("{} (+{})", *pci.iommu_group, others);
}
std::string link_of(const inventory::PciDevice& pci) {
  if (!pci.link_now) return "-";
  return fmt::format("{:g} GT/s x{}", pci.link_now->speed_gts, pci.link_now->width);
}
// GT/s per lane name the generation; the encoding changed at 8.
std::string generation(double gts) {
  if (gts >= 64) return "6";
  if (gts >= 32) return "5";
  if (gts >= 16) return "4";
  if (gts >= 8) return "3";
  return gts >= 5 ? "2" : "1";
}

Tone tone_of(const Gpu& gpu) {
  if (gpu.temperature && gpu.slowdown_at && *gpu.temperature >= *gpu.slowdown_at) return Tone::bad;
  if (gpu.margin && gpu.margin->count <= 5) return Tone::warn;
  return Tone::plain;
}

std::size_t processes_of(const Gpu& gpu) {
  std::size_t n = gpu.holders.size();
  for (const auto& instance : gpu.instances) n += instance.holders().size();
  return n;
}

// The instances where they lie, memory slice by memory slice:
//   |3g.40gb *              |2g.20gb    |1g.10gb ?|  .  |
std::string drawn(const Context& context, const Gpu& gpu) {
  const unsigned slices = gpu.geometry.memory_slices;
  if (slices == 0) return {};
  const std::size_t room = context.width > 12 ? context.width - 8 : 40;
  std::size_t cell = std::clamp<std::size_t>(room / slices, 4, 10);
  std::vector<const GpuInstance*> order;
  for (const auto& instance : gpu.instances) order.push_back(&instance);
  std::sort(order.begin(), order.end(),
            [](const auto* a, const auto* b) { return a->place.start < b->place.start; });
  std::string line = "|";
  unsigned at = 0;
  for (const auto* instance : order) {
    if (instance->place.start < at || instance->place.end() > slices)
      continue;  // the driver overlaps itself: not drawable
    for (; at < instance->place.start; ++at)
      line += std::string(cell / 2, ' ') + "." + std::string(cell - 2 - cell / 2, ' ') + "|";
    std::string text = instance->name;
    if (instance->busy()) text += '*';
    if (!instance->ours) text += '?';
    if (instance->compute.empty()) text += '!';
    const std::size_t width = cell * instance->place.size - 1;
    if (text.size() > width) text = text.substr(0, width);
    const std::size_t fill = width - text.size();
    const Tone tone = instance->compute.empty() ? Tone::bad : instance->busy() ? Tone::good : Tone::plain;
    line += paint(context, tone, text) + std::string(fill, ' ') + "|";
    at = instance->place.end();
  }
  for (; at < slices; ++at)
    line += std::string(cell / 2, ' ') + "." + std::string(cell - 2 - cell / 2, ' ') + "|";
  return line;
}

std::string mig_line(const Context& context, const Gpu& gpu) {
  if (!gpu.mig_capable) return {};
  if (gpu.mig_now != gpu.mig_pending) {
    return paint(context, Tone::warn,
                 fmt::format("MIG is {} and will be {} after a GPU reset", gpu.mig_now ? "on" : "off",
                             gpu.mig_pending ? "on" : "off")) +
           (gpu.mig_now ? "\n     " + drawn(context, gpu) : "");
  }
  if (!gpu.mig_now) return {};
  if (gpu.instances.empty() && gpu.mig_why.empty())
    return paint(context, Tone::warn, "MIG is on, no instances: CUDA sees nothing here");
  return drawn(context, gpu);
}

void add_field(std::string& out, const Context& context, std::string_view name, std::string_view value) {
  // Continuation lines stand under the first.
  std::string indented;
  for (const char c : value) {
    indented += c;
    if (c == '\n') indented += std::string(13, ' ');
  }
  out += fmt::format("  {} {}\n", paint(context, Tone::dim, fmt::format("{:<10}", name)), indented);
}

std::string why_not(std::string_view why) { return fmt::format("unknown ({})", why); }

template <class T>
std::string text_of(const Reading<T>& reading) {
  return reading ? fmt::format("{}", *reading) : why_not(reading.why);
}

std::string host_block(const Context& context, const Host& host) {
  std::string out = paint(context, Tone::bold, host.hostname.empty() ? "this host" : host.hostname);
  out += fmt::format("  {}\n", host.machine ? *host.machine : std::string("machine unknown"));
  std::string system = host.os ? *host.os : std::string("system unknown");
  if (host.kernel) system += fmt::format(", Linux {}", *host.kernel);
  add_field(out, context, "System", system);
  std::string cpu =
      host.cpus_online > 0 ? fmt::format("{} CPUs", host.cpus_online) : std::string("CPUs unknown");
  if (host.cpu_model) cpu += fmt::format(", {}", *host.cpu_model);
  if (host.cpu_governor) cpu += fmt::format(", governor {}", *host.cpu_governor);
  add_field(out, context, "CPU", cpu);
  std::string memory = host.memory.count > 0 ? human(host.memory) : std::string("unknown");
  if (host.numa.size() > 1) {
    memory += fmt::format(" in {} NUMA nodes:", host.numa.size());
    for (const auto& node : host.numa)
      memory += fmt::format("{} {} = {} (CPUs {})", node.id == 0 ? "" : ",", node.id, human(node.memory),
                            node.cpus);
  }
  add_field(out, context, "Memory", memory);
  std::string driver =
      host.driver_version ? fmt::format("NVIDIA {}", *host.driver_version) : why_not(host.driver_version.why);
  if (host.cuda_version) driver += fmt::format(", CUDA up to {}", *host.cuda_version);
  add_field(out, context, "Driver", driver);
  for (const auto& unit : host.units) {
    if (unit.load_state != "loaded") continue;
    add_field(out, context, "Unit", fmt::format("{}: {} ({})", unit.name, unit.active_state, unit.sub_state));
  }
  if (!host.nvswitches.empty()) {
    std::string switches = fmt::format("{} NVSwitches:", host.nvswitches.size());
    for (const auto& pci : host.nvswitches) switches += " " + pci.address.str();
    add_field(out, context, "Fabric", switches);
    std::vector<std::string> waiting;
    for (const auto& gpu : host.gpus) {
      const bool joined = gpu.nvlink.fabric_state.value_or("") == "completed" &&
                          gpu.nvlink.fabric_status.value_or("") == "success";
      if (joined) continue;
      waiting.push_back(fmt::format(
          "GPU {}: {}", gpu.index,
          gpu.nvlink.fabric_state ? *gpu.nvlink.fabric_state +
                                        (gpu.nvlink.fabric_status ? " with " + *gpu.nvlink.fabric_status : "")
                                  : gpu.nvlink.fabric_state.why));
    }
    if (waiting.empty() && !host.gpus.empty()) {
      add_field(out, context, "", "every GPU has joined the fabric");
    } else if (!waiting.empty()) {
      add_field(out, context, "", paint(context, Tone::warn, "not joined: " + join(waiting, "; ")));
    }
  }
  return out;
}

std::string gpu_table(const Context& context, const Host& host, const Options& options) {
  std::vector<std::string> header = {"GPU",     "MODEL", "PCI",   "NUMA", "POOL",
                                     "MEM GiB", "TEMP",  "WATTS", "PROCS"};
  if (options.wide) header.insert(header.end(), {"LINK", "IOMMU", "DRIVER", "UUID"});
  // Rows and the MIG drawings between them: the table is made whole first, so that columns line up.
  Table table(header);
  std::vector<std::string> below;
  for (const auto& gpu : host.gpus) {
    if (options.gpu >= 0 && gpu.index != static_cast<unsigned>(options.gpu)) continue;
    std::vector<std::string> cells = {
        std::to_string(gpu.index),
        short_model(gpu.model),
        gpu.pci.address.str(),
        numa_of(gpu.pci),
        std::string(name_of(gpu.pool)),
        gpu.memory_used ? fmt::format("{}/{}", gigabytes(*gpu.memory_used), gigabytes(gpu.memory)) : "-",
        degrees(gpu.temperature),
        fmt::format("{}/{}", in_watts(gpu.power.draw), in_watts(gpu.power.limit)),
        std::to_string(processes_of(gpu))};
    std::vector<Tone> tones(9, Tone::plain);
    tones[6] = tone_of(gpu);
    if (options.wide) {
      cells.insert(cells.end(),
                   {link_of(gpu.pci), group_of(gpu.pci), gpu.pci.driver.value_or("-"), gpu.uuid.text});
    }
    table.row(std::move(cells), std::move(tones));
    below.push_back(mig_line(context, gpu));
  }
  for (const auto& lost : host.lost) {
    if (options.gpu >= 0) continue;
    const bool set_apart = lost.pci.driver && lost.pci.driver->starts_with("vfio");
    std::vector<std::string> cells = {"-",
                                      fmt::format("{:04x}:{:04x}", lost.pci.vendor, lost.pci.device),
                                      lost.pci.address.str(),
                                      numa_of(lost.pci),
                                      set_apart ? "passthrough" : "broken",
                                      "-",
                                      "-",
                                      "-",
                                      "-"};
    std::vector<Tone> tones(9, Tone::plain);
    tones[4] = set_apart ? Tone::plain : Tone::bad;
    if (options.wide)
      cells.insert(cells.end(), {link_of(lost.pci), group_of(lost.pci), lost.pci.driver.value_or("-"), "-"});
    table.row(std::move(cells), std::move(tones));
    below.push_back(paint(context, set_apart ? Tone::dim : Tone::warn, lost.why));
  }
  Context unbounded = context;
  unbounded.width = 1000;  // --wide may be wider than the terminal: rows are never broken
  const std::string text = table.str(unbounded);
  std::string out;
  std::size_t line_number = 0;
  for (const auto line : split_lines(text)) {
    out += fmt::format("{}\n", line);
    if (line_number > 0 && line_number <= below.size() && !below[line_number - 1].empty()) {
      out += fmt::format("     {}\n", below[line_number - 1]);
    }
    ++line_number;
  }
  return out;
}

std::string accelerator_table(const Context& context, const Host& host) {
  if (host.accelerators.empty()) return {};
  Context unbounded = context;
  unbounded.width = 1000;
  Table table({"ACCELERATOR", "MODEL", "PCI", "NUMA", "DRIVER", "MEM GiB"});
  for (const auto& one : host.accelerators) {
    table.row({one.maker, one.model.value_or(fmt::format("{:04x}:{:04x}", one.pci.vendor, one.pci.device)),
               one.pci.address.str(), numa_of(one.pci), one.pci.driver.value_or("-"),
               one.memory ? fmt::format("{}/{}", one.memory_used ? gigabytes(*one.memory_used) : "-",
                                        gigabytes(*one.memory))
                          : "-"});
  }
  const std::string text = table.str(unbounded);
  std::string out = "\n";
  std::size_t at = 0;
  for (const auto line : split_lines(text)) {
    out += fmt::format("{}\n", line);
    if (at > 0 && at <= host.accelerators.size()) {
      for (const auto& can : inventory::abilities(host.accelerators[at - 1]))
        out += fmt::format("     {}\n", can);
    }
    ++at;
  }
  return out;
}

std::string legend(const Host& host) {
  bool busy = false, foreign = false, hollow = false;
  for (const auto& gpu : host.gpus) {
    for (const auto& instance : gpu.instances) {
      busy |= instance.busy();
      foreign |= !instance.ours;
      hollow |= instance.compute.empty();
    }
  }
  std::vector<std::string> parts;
  if (busy) parts.emplace_back("* in use");
  if (foreign) parts.emplace_back("? not made by bulkhead");
  if (hollow) parts.emplace_back("! no compute instance: shows 0 MB, CUDA cannot use it");
  return parts.empty() ? std::string() : fmt::format("     {}\n", join(parts, "   "));
}

std::string process_table(const Context& context, const Host& host, const Options& options) {
  Table table({"GPU", "SLICE", "PID", "NAME", "MEMORY", "CGROUP"});
  bool any = false;
  const auto add = [&](const Gpu& gpu, const std::string& slice, const inventory::Holder& holder) {
    any = true;
    table.row({std::to_string(gpu.index), slice, std::to_string(holder.pid),
               holder.name.empty() ? "?" : holder.name, holder.memory ? human(*holder.memory) : "-",
               holder.cgroup.empty() ? "-" : holder.cgroup});
  };
  for (const auto& gpu : host.gpus) {
    if (options.gpu >= 0 && gpu.index != static_cast<unsigned>(options.gpu)) continue;
    for (const auto& holder : gpu.holders) add(gpu, "whole", holder);
    for (const auto& instance : gpu.instances) {
      for (const auto& compute : instance.compute) {
        for (const auto& holder : compute.holders)
          add(gpu, fmt::format("{} gi{}/ci{}", instance.name, instance.id, compute.id), holder);
      }
    }
  }
  return any ? "\n" + table.str(context) : std::string();
}

std::string pci_text(const inventory::PciDevice& pci) {
  std::string text = pci.address.str();
  if (pci.iommu_group) {
    text += fmt::format(", IOMMU group {}", *pci.iommu_group);
    if (pci.group_siblings.empty()) {
      text += " of its own";
    } else {
      std::vector<std::string> names;
      for (const auto& sibling : pci.group_siblings) names.push_back(sibling.str());
      text += " shared with " + join(names, " ");
    }
  } else {
    text += ", " + pci.iommu_group.why;
  }
  return text;
}

// Everything about one GPU, for --gpu.
std::string gpu_block(const Context& context, const Gpu& gpu) {
  std::string out = "\n";
  const auto field = [&](std::string_view name, const std::string& value) {
    add_field(out, context, name, value);
  };
  field("UUID", gpu.uuid.text);
  field("PCI", pci_text(gpu.pci));
  field("NUMA", gpu.pci.numa_node
                    ? fmt::format("node {}, CPUs {}", *gpu.pci.numa_node, gpu.pci.local_cpus)
                    : fmt::format("{}; local CPUs {}", why_not(gpu.pci.numa_node.why), gpu.pci.local_cpus));
  if (gpu.pci.link_now) {
    std::string link =
        fmt::format("PCIe {} x{}", generation(gpu.pci.link_now->speed_gts), gpu.pci.link_now->width);
    if (gpu.pci.link_max)
      link += fmt::format(", at most PCIe {} x{}", generation(gpu.pci.link_max->speed_gts),
                          gpu.pci.link_max->width);
    field("Link", link);
  } else {
    field("Link", why_not(gpu.pci.link_now.why));
  }
  std::string bars;
  for (const auto& bar : gpu.pci.bars) {
    bars += fmt::format("{}BAR{} {} at {:#x}", bars.empty() ? "" : ", ", bar.index, human(Bytes(bar.size)),
                        bar.start);
  }
  field("BARs", bars.empty() ? "none assigned" : bars);
  field("Kernel", fmt::format("driver {}, /dev/nvidia{}", text_of(gpu.pci.driver), text_of(gpu.minor)));
  field("SR-IOV", gpu.pci.vfs_total ? fmt::format("{} of {} virtual functions", gpu.pci.vfs_now.value_or(0),
                                                  *gpu.pci.vfs_total)
                                    : gpu.pci.vfs_total.why);
  field("Board", fmt::format("serial {}, VBIOS {}, compute capability {}", text_of(gpu.serial),
                             text_of(gpu.vbios), text_of(gpu.compute_capability)));
  field("Driver",
        fmt::format("persistence {}, virtualization {}",
                    gpu.persistence ? (*gpu.persistence ? "on" : "off") : why_not(gpu.persistence.why),
                    text_of(gpu.virtualization)));
  field("Heat",
        fmt::format("{}, {} left to slowdown; slows at {}, shuts down at {}", degrees(gpu.temperature),
                    gpu.margin ? fmt::format("{}C", gpu.margin->count) : why_not(gpu.margin.why),
                    degrees(gpu.slowdown_at), degrees(gpu.shutdown_at)));
  field("Power", fmt::format("{} W of {} W; default {} W, settable {}..{} W", in_watts(gpu.power.draw),
                             in_watts(gpu.power.limit), in_watts(gpu.power.limit_default),
                             in_watts(gpu.power.limit_min), in_watts(gpu.power.limit_max)));
  if (gpu.clocks && gpu.clocks_max) {
    field("Clocks", fmt::format("graphics {} of {} MHz, memory {} of {} MHz", gpu.clocks->graphics.count,
                                gpu.clocks_max->graphics.count, gpu.clocks->memory.count,
                                gpu.clocks_max->memory.count));
  } else {
    field("Clocks", why_not(gpu.clocks ? gpu.clocks_max.why : gpu.clocks.why));
  }
  field("ECC", gpu.ecc ? fmt::format("{} corrected, {} uncorrected since the driver was loaded",
                                     gpu.ecc->corrected, gpu.ecc->uncorrected)
                       : why_not(gpu.ecc.why));
  field("NVLink", gpu.nvlink.links == 0
                      ? gpu.nvlink.fabric_state.why
                      : fmt::format("{} of {} links active, fabric {}{}", gpu.nvlink.active, gpu.nvlink.links,
                                    gpu.nvlink.fabric_state ? *gpu.nvlink.fabric_state
                                                            : why_not(gpu.nvlink.fabric_state.why),
                                    gpu.nvlink.fabric_status ? ": " + *gpu.nvlink.fabric_status : ""));
  if (!gpu.mig_capable) {
    field("MIG", fmt::format("none: {}", gpu.mig_why));
    return out;
  }
  std::vector<std::string> offered;
  for (const auto& profile : gpu.geometry.profiles)
    offered.push_back(fmt::format("{} x{}", profile.name, profile.max_instances));
  field("MIG",
        fmt::format("{}; profiles and how many fit: {}", gpu.mig_now ? "on" : "off", join(offered, ", ")));
  for (const auto& instance : gpu.instances) {
    for (const auto& compute : instance.compute) {
      field("", fmt::format("gi{}/ci{} {} at {}+{} {}", instance.id, compute.id, instance.name,
                            instance.place.start, instance.place.size,
                            compute.uuid ? compute.uuid->text : why_not(compute.uuid.why)));
    }
  }
  return out;
}

std::string cost_table(const Context& context, const observe::Cost& cost) {
  Table table({"DRIVER CALL", "CALLS", "TOTAL us", "EACH us"});
  std::uint64_t calls = 0, driver_ns = 0;
  for (const auto& call : cost.driver) {
    calls += call.calls;
    driver_ns += call.nanoseconds;
    table.row({call.function, std::to_string(call.calls),
               fmt::format("{:.1f}", static_cast<double>(call.nanoseconds) / 1e3),
               fmt::format("{:.2f}",
                           static_cast<double>(call.nanoseconds) / 1e3 / static_cast<double>(call.calls))});
  }
  const auto ms = [](std::uint64_t ns) { return static_cast<double>(ns) / 1e6; };
  return fmt::format(
      "\n{}{} driver calls, {:.2f} ms; library opened in {:.2f} ms; /proc and /sys {:.2f} ms; systemd {:.2f} "
      "ms; all {:.2f} ms\n",
      table.str(context), calls, ms(driver_ns), ms(cost.driver_open_ns), ms(cost.kernel_ns),
      ms(cost.units_ns), ms(cost.total_ns));
}

int run(const Context& context, const Options& options) {
  observe::Cost cost;
  const bool page = !options.json && !options.wide && options.gpu < 0;
  auto host = observe::host({.root = context.root,
                             .nvml_library = context.nvml_library,
                             .state_dir = context.state_dir,
                             .detail = page ? observe::Detail::brief : observe::Detail::full,
                             .driver_timeout_ms = context.driver_timeout_ms},
                            &cost);
  if (!host.ok()) return fail(context, std::move(host).error().in("inventory"));
  const auto chosen = std::find_if(host->gpus.begin(), host->gpus.end(), [&](const Gpu& gpu) {
    return gpu.index == static_cast<unsigned>(options.gpu);
  });
  if (options.gpu >= 0 && chosen == host->gpus.end()) {
    return fail(context, Error(Errc::not_found,
                               fmt::format("inventory: the driver shows no GPU {} ({} GPUs in all)",
                                           options.gpu, host->gpus.size()),
                               "try: bulkhead inventory"));
  }
  if (options.json) {
    if (options.gpu >= 0) {
      const Gpu one = *chosen;
      host->gpus = {one};
    }
    Json document = to_json(*host);
    if (options.cost) {
      Json calls = Json::array();
      for (const auto& call : cost.driver)
        calls.push_back(
            {{"function", call.function}, {"calls", call.calls}, {"nanoseconds", call.nanoseconds}});
      document["cost"] = {{"driver_calls", std::move(calls)},
                          {"driver_open_ns", cost.driver_open_ns},
                          {"kernel_ns", cost.kernel_ns},
                          {"units_ns", cost.units_ns},
                          {"total_ns", cost.total_ns}};
    }
    return print(dump(document) + "\n");
  }
  std::string out;
  if (options.gpu < 0) out += host_block(context, *host) + "\n";
  if (host->gpus.empty() && host->lost.empty()) {
    out += "No NVIDIA GPU on the PCI bus.\n";
  } else {
    out += gpu_table(context, *host, options) + legend(*host);
  }
  if (options.gpu >= 0) out += gpu_block(context, *chosen);
  if (options.gpu < 0) out += accelerator_table(context, *host);
  out += process_table(context, *host, options);
  if (options.gpu < 0 && !host->virtual_functions.empty()) {
    Table table({"VIRTUAL FUNCTION", "OF", "DRIVER", "IOMMU"});
    for (const auto& vf : host->virtual_functions) {
      table.row({vf.address.str(), vf.physical_function ? vf.physical_function->str() : "-",
                 vf.driver.value_or("-"), group_of(vf)});
    }
    out += "\n" + table.str(context);
  }
  if (!host->notes.empty()) {
    out += "\n" + paint(context, Tone::dim, "Not read:") + "\n";
    for (const auto& note : host->notes) out += fmt::format("  {}\n", note);
  }
  if (options.cost) out += cost_table(context, cost);
  return print(out);
}

}  // namespace

std::function<int(const Context&)> bind_inventory(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_flag("--json", options->json, "Print everything that was read, as JSON");
  app.add_option("--gpu", options->gpu, "Show one GPU in full, by its index")->check(CLI::Range(0, 63));
  app.add_flag("--wide", options->wide, "Add link, IOMMU group, driver and UUID columns");
  app.add_flag("--cost", options->cost, "Add what the looking cost: driver calls and time");
  return [options](const Context& context) { return run(context, *options); };
}

}  // namespace bulkhead::cli
