#include "engine/observe/observe.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/text.hpp"
#include "edge/nvml/nvml.hpp"
#include "edge/process/process.hpp"
#include "edge/store/store.hpp"
#include "edge/sysfs/sysfs.hpp"
#include "edge/systemd/systemd.hpp"

namespace bulkhead::observe {

inventory::Host of_the_kernel(const std::filesystem::path& root) {
  inventory::Host host;
  sysfs::read_host(root, host);
  return host;
}

namespace {

using inventory::Gpu;
using inventory::Host;
using nvml::Device;
using nvml::Nvml;

constexpr const char* units_looked_after[] = {"nvidia-fabricmanager.service", "nvidia-persistenced.service"};

inventory::Clocks clocks_of(const nvml::Clocks& clocks) {
  return {clocks.graphics, clocks.sm, clocks.memory};
}

template <class T, class From, class F>
Reading<T> converted(const Result<From>& from, F&& convert) {
  if (from.ok()) return convert(*from);
  return Reading<T>::missing(from.error().message());
}

// Names each pid once, however many instances it holds.
class Names {
 public:
  Names(const std::filesystem::path& root, Nvml& driver) : root_(root), driver_(driver) {}

  inventory::Holder holder(const nvml::ProcessEntry& entry) {
    auto known = names_.find(entry.pid);
    if (known == names_.end()) {
      process::Identity identity;
      if (auto found = process::look(root_, entry.pid); found.ok()) {
        identity = std::move(found).value();
      } else if (auto name = driver_.process_name(entry.pid); name.ok()) {
        // A process of another pid namespace, or of a simulated host. The driver tells the whole path.
        identity.name = name->substr(name->rfind('/') + 1);
      }
      known = names_.emplace(entry.pid, std::move(identity)).first;
    }
    return {.pid = entry.pid,
            .start_time = known->second.start_time,
            .name = known->second.name,
            .cgroup = known->second.cgroup,
            .memory = entry.memory,
            .gpu_instance = entry.gpu_instance,
            .compute_instance = entry.compute_instance};
  }

 private:
  const std::filesystem::path& root_;
  Nvml& driver_;
  std::map<int, process::Identity> names_;
};

void read_processes(Nvml& driver, Device device, Names& names, Gpu& gpu, std::vector<std::string>& notes) {
  const auto found = driver.processes(device);
  if (!found.ok()) {
    notes.push_back(fmt::format("GPU {}: processes: {}", gpu.index, found.error().message()));
    return;
  }
  for (const auto& entry : *found) {
    std::vector<inventory::Holder>* where = &gpu.holders;
    if (entry.gpu_instance) {
      for (auto& instance : gpu.instances) {
        if (instance.id != *entry.gpu_instance || instance.compute.empty()) continue;
        // A compute instance that went away meanwhile: the process still holds its GPU instance.
        where = &instance.compute.front().holders;
        for (auto& compute : instance.compute) {
          if (compute.id == entry.compute_instance) where = &compute.holders;
        }
      }
    }
    where->push_back(names.holder(entry));
  }
}

void read_mig(Nvml& driver, Device device, const Access& access, Gpu& gpu, std::vector<std::string>& notes) {
  const auto mode = driver.mig_mode(device);
  if (!mode.ok()) {
    gpu.mig_why = mode.error().message();
    return;
  }
  gpu.mig_capable = true;
  gpu.mig_now = mode->now;
  gpu.mig_pending = mode->pending;
  if (access.detail == Detail::brief && !mode->now && !mode->pending) return;
  auto geometry = driver.geometry(device);
  if (!geometry.ok()) {
    gpu.mig_why = geometry.error().message();
    notes.push_back(fmt::format("GPU {}: {}", gpu.index, gpu.mig_why));
    return;
  }
  gpu.geometry = std::move(geometry).value();
  if (!gpu.mig_now) return;
  const auto instances = driver.instances(device);
  if (!instances.ok()) {
    gpu.mig_why = instances.error().message();
    notes.push_back(fmt::format("GPU {}: {}", gpu.index, gpu.mig_why));
    return;
  }
  std::size_t compute_instances = 0;
  for (const auto& instance : *instances) {
    inventory::GpuInstance out{.id = instance.id, .profile = instance.profile_id, .place = instance.place};
    const mig::Profile* profile = nullptr;
    for (const auto& candidate : gpu.geometry.profiles) {
      if (candidate.id == instance.profile_id) profile = &candidate;
    }
    out.name = profile != nullptr ? profile->name : fmt::format("profile {}", instance.profile_id);
    for (const auto& compute : instance.compute) {
      out.compute.push_back({.id = compute.id, .profile = compute.profile, .place = compute.place});
    }
    compute_instances += out.compute.size();
    gpu.instances.push_back(std::move(out));
  }
  const auto devices = driver.mig_devices(device, compute_instances, !access.only.empty());
  for (auto& instance : gpu.instances) {
    for (auto& compute : instance.compute) {
      if (!devices.ok()) {
        compute.uuid = Reading<Uuid>::missing(devices.error().message());
        continue;
      }
      const auto same = [&](const nvml::MigDevice& d) {
        return d.gpu_instance == instance.id && d.compute_instance == compute.id;
      };
      const auto found = std::find_if(devices->begin(), devices->end(), same);
      compute.uuid = found != devices->end()
                         ? Reading<Uuid>(found->uuid)
                         : Reading<Uuid>::missing("the driver lists no MIG device for it");
      if (found != devices->end()) compute.memory_used = found->used;
    }
  }
}

// The dear readings: a round trip to the GPU's own processor each.
void read_slow(Nvml& driver, Device device, Gpu& gpu) {
  gpu.vbios = driver.vbios(device);
  gpu.slowdown_at = driver.slowdown_at(device);
  gpu.shutdown_at = driver.shutdown_at(device);
  gpu.clocks = converted<inventory::Clocks>(driver.clocks(device), clocks_of);
  gpu.clock_event_reasons = driver.clock_event_reasons(device);
}

void skip_slow(Gpu& gpu) {
  const std::string why = "not asked";
  gpu.vbios = Reading<std::string>::missing(why);
  gpu.slowdown_at = gpu.shutdown_at = Reading<Celsius>::missing(why);
  gpu.clocks = Reading<inventory::Clocks>::missing(why);
  gpu.clock_event_reasons = Reading<std::uint64_t>::missing(why);
}

// `switched`: the host has NVSwitches, so the GPU must register with the Fabric Manager before CUDA works.
void read_nvlink(Nvml& driver, Device device, Detail detail, std::optional<unsigned> count, bool switched,
                 Gpu& gpu, std::vector<std::string>& notes) {
  if (detail != Detail::brief) {
    if (const auto links = driver.nvlinks(device, count); links.ok()) {
      gpu.nvlink.links = links->links;
      gpu.nvlink.active = links->active;
    } else {
      notes.push_back(fmt::format("GPU {}: NVLink: {}", gpu.index, links.error().message()));
    }
  }
  if (!switched && gpu.nvlink.links == 0) {
    gpu.nvlink.fabric_state = gpu.nvlink.fabric_status = Reading<std::string>::missing("no NVLink in use");
    return;
  }
  const auto fabric = driver.fabric(device);
  if (fabric.ok()) {
    gpu.nvlink.fabric_state = fabric->state;
    gpu.nvlink.fabric_status = fabric->status;
  } else {
    gpu.nvlink.fabric_state = gpu.nvlink.fabric_status =
        Reading<std::string>::missing(fabric.error().message());
  }
}

// GPUs of the same board, by PCI ids, name and memory: they offer the same MIG profiles.
class Boards {
 public:
  explicit Boards(Nvml& driver) : driver_(driver) {}

  void add(Device device, const Gpu& gpu) {
    for (const auto& [other, of] : known_) {
      if (of.pci.vendor == gpu.pci.vendor && of.pci.device == gpu.pci.device &&
          of.pci.subsystem_vendor == gpu.pci.subsystem_vendor &&
          of.pci.subsystem_device == gpu.pci.subsystem_device && of.model == gpu.model &&
          of.memory.count == gpu.memory.count && gpu.memory.count > 0 && gpu.pci.device != 0) {
        driver_.alike(device, other);
        return;
      }
    }
    known_.emplace_back(device, Gpu{.model = gpu.model, .pci = gpu.pci, .memory = gpu.memory});
  }

 private:
  Nvml& driver_;
  std::vector<std::pair<Device, Gpu>> known_;
};

void read_gpu(Nvml& driver, Device device, const Access& access, bool switched, Boards& boards, Names& names,
              Gpu& gpu, std::vector<std::string>& notes) {
  const Detail detail = access.detail;
  const auto memory = driver.memory(device);
  if (memory.ok()) {
    gpu.memory = memory->total;
    gpu.memory_used = memory->used;
  } else {
    gpu.memory_used = Reading<Bytes>::missing(memory.error().message());
  }
  gpu.serial = driver.serial(device);
  gpu.minor = driver.minor(device);
  gpu.compute_capability = driver.compute_capability(device);
  gpu.persistence = driver.persistence(device);
  gpu.temperature = driver.temperature(device);
  gpu.margin = driver.margin(device);
  if (detail == Detail::full) {
    read_slow(driver, device, gpu);
  } else {
    skip_slow(gpu);
  }
  gpu.clocks_max = detail != Detail::brief
                       ? converted<inventory::Clocks>(driver.clocks_max(device), clocks_of)
                       : Reading<inventory::Clocks>::missing("not asked");
  gpu.virtualization = driver.virtualization(device);
  std::optional<unsigned> nvlink_count;
  if (const auto sensors = driver.sensors(device); sensors.ok()) {
    gpu.power = {sensors->power_average, sensors->limit, sensors->limit_default, sensors->limit_min,
                 sensors->limit_max};
    if (sensors->ecc_corrected && sensors->ecc_uncorrected) {
      gpu.ecc = inventory::EccCounts{*sensors->ecc_corrected, *sensors->ecc_uncorrected};
    } else {
      gpu.ecc =
          Reading<inventory::EccCounts>::missing(sensors->ecc_corrected.why + sensors->ecc_uncorrected.why);
    }
    nvlink_count = sensors->nvlinks;
  } else {
    const std::string& why = sensors.error().message();
    gpu.power.draw = gpu.power.limit = gpu.power.limit_default = gpu.power.limit_min = gpu.power.limit_max =
        Reading<Milliwatts>::missing(why);
    gpu.ecc = Reading<inventory::EccCounts>::missing(why);
  }
  read_nvlink(driver, device, detail, nvlink_count, switched, gpu, notes);
  boards.add(device, gpu);
  read_mig(driver, device, access, gpu, notes);
  read_processes(driver, device, names, gpu, notes);
  gpu.pool = gpu.mig_now ? inventory::Pool::mig : inventory::Pool::exclusive;
}

// Why a GPU on the bus is not in NVML: from what the kernel shows of it, then from what the driver said.
std::string why_lost(const inventory::PciDevice& pci, const std::string& driver_said) {
  if (pci.driver && pci.driver->starts_with("vfio"))
    return fmt::format("bound to {}: set apart for virtual machines", *pci.driver);
  if (!pci.driver) return "no driver is bound to it";
  if (*pci.driver != "nvidia") return fmt::format("bound to {}, not to the NVIDIA driver", *pci.driver);
  if (!pci.link_now && pci.link_max) return "fell off the bus: its PCI Express link is down";
  if (!driver_said.empty()) return driver_said;
  return "the NVIDIA driver holds it, but its library does not list it";
}

void read_pci(const std::filesystem::path& root, sysfs::PciDetail detail, Host& host,
              std::vector<inventory::PciDevice>& gpus) {
  const auto heads = sysfs::pci_heads(root);
  if (!heads.ok()) {
    host.notes.push_back("PCI: " + heads.error().message());
    return;
  }
  for (const auto& head : *heads) {
    const bool gpu_like = head.is_display() || head.is_accelerator();
    if (!head.is_nvswitch() && !gpu_like) continue;
    auto device = sysfs::pci_device(root, head.address, detail);
    if (!device.ok()) {
      host.notes.push_back("PCI: " + device.error().message());
      continue;
    }
    if (head.is_nvswitch()) {
      host.nvswitches.push_back(std::move(device).value());
    } else if (device->physical_function) {
      if (detail == sysfs::PciDetail::brief) device = sysfs::pci_device(root, head.address);
      if (!device.ok()) continue;
      host.virtual_functions.push_back(std::move(device).value());
    } else if (head.vendor == sysfs::vendor_nvidia) {
      gpus.push_back(std::move(device).value());
    } else if (head.is_accelerator() || head.vendor == sysfs::vendor_amd ||
               head.vendor == sysfs::vendor_intel) {
      // A BMC's display is nobody's accelerator.
      if (detail == sysfs::PciDetail::brief) device = sysfs::pci_device(root, head.address);
      if (device.ok()) host.accelerators.push_back(sysfs::accelerator(root, std::move(device).value()));
    }
  }
}

void read_driver(const Access& access, Nvml& driver, Host& host, std::vector<inventory::PciDevice>& on_bus,
                 std::string& driver_said) {
  if (auto version = driver.driver_version(); version.ok()) host.driver_version = *version;
  host.cuda_version = driver.cuda_version();
  const auto count = driver.device_count();
  if (!count.ok()) {
    driver_said = count.error().message();
    host.notes.push_back("NVML: " + driver_said);
    return;
  }
  Names names(access.root, driver);
  Boards boards(driver);
  for (unsigned index = 0; index < *count; ++index) {
    const auto device = driver.device(index);
    const auto address = device.ok() ? driver.pci_address(*device) : Result<PciAddress>(device.error());
    const auto uuid = address.ok() ? driver.uuid(*device) : Result<Uuid>(address.error());
    if (!uuid.ok()) {
      driver_said = uuid.error().message();
      // The bus tells which GPU it is: see why_lost.
      host.notes.push_back(fmt::format("GPU {}: {}", index, driver_said));
      continue;
    }
    if (!access.only.empty() &&
        std::find(access.only.begin(), access.only.end(), *uuid) == access.only.end()) {
      std::erase_if(on_bus, [&](const auto& pci) { return pci.address == *address; });
      continue;
    }
    Gpu gpu;
    gpu.index = index;
    gpu.uuid = *uuid;
    gpu.model = driver.name(*device).value_or("unknown");
    const auto at =
        std::find_if(on_bus.begin(), on_bus.end(), [&](const auto& pci) { return pci.address == *address; });
    if (at != on_bus.end()) {
      gpu.pci = std::move(*at);
      on_bus.erase(at);
    } else {
      gpu.pci.address = *address;
      host.notes.push_back(
          fmt::format("GPU {}: {} is not on the PCI bus that the kernel shows", index, address->str()));
    }
    read_gpu(driver, *device, access, !host.nvswitches.empty(), boards, names, gpu, host.notes);
    host.gpus.push_back(std::move(gpu));
  }
}

// Marks the instances that the journal says are ours. No journal: none is.
void mark_ours(const Access& access, Host& host) {
  if (access.state_dir.empty() || !host.boot_id) return;
  if (std::none_of(host.gpus.begin(), host.gpus.end(),
                   [](const auto& gpu) { return !gpu.instances.empty(); }))
    return;
  const auto journal = store::Store::open(access.state_dir, store::Store::Access::read_only);
  if (!journal.ok()) {
    if (journal.error().code() != Errc::not_found)
      host.notes.push_back("journal: " + journal.error().message());
    return;
  }
  const auto owned = (*journal)->owned(*host.boot_id);
  if (!owned.ok()) {
    host.notes.push_back("journal: " + owned.error().message());
    return;
  }
  for (auto& gpu : host.gpus) {
    for (auto& instance : gpu.instances) {
      instance.ours = std::any_of(owned->begin(), owned->end(), [&](const store::OwnedInstance& one) {
        return one.gpu == gpu.uuid && one.gpu_instance == instance.id && one.profile_id == instance.profile &&
               one.start == instance.place.start;
      });
    }
  }
}

void read_units(const std::filesystem::path& root, Host& host) {
  // Nothing listens: a container or a host without systemd. Nothing to say until a node file asks for a unit.
  auto bus = systemd::Systemd::connect(root);
  if (!bus.ok()) {
    host.notes.push_back(bus.error().message());
    return;
  }
  for (const char* name : units_looked_after) {
    auto unit = (*bus)->unit(name);
    if (unit.ok()) {
      host.units.push_back(std::move(unit).value());
    } else {
      host.notes.push_back(unit.error().message());
    }
  }
}

// What the driver is asked, in a thread of its own: a call into it cannot be interrupted, only left behind.
struct Asking {
  Access access = {};
  Host host = {};
  std::vector<inventory::PciDevice> on_bus = {};
  std::string driver_said = {};
  Cost spent = {};
  std::optional<Error> refused = {};  // the library could not be opened

  std::mutex mutex = {};
  std::condition_variable ended = {};
  bool done = false;

  void ask() {
    const std::uint64_t opening = monotonic_ns();
    auto driver = Nvml::open(access.nvml_library);
    spent.driver_open_ns = monotonic_ns() - opening;
    if (!driver.ok()) {
      refused = std::move(driver).error();
      return;
    }
    read_driver(access, **driver, host, on_bus, driver_said);
    for (const auto& call : (*driver)->costs())
      spent.driver.push_back({call.function, call.calls, call.nanoseconds});
  }
};

// A thread of ours sits in the driver: at exit, destructors would pull the ground from under it.
void exit_at_once() {
  static const int registered = ::on_exit(
      [](int status, void*) {
        std::fflush(nullptr);
        ::_exit(status);
      },
      nullptr);
  static_cast<void>(registered);
}

Error hanging(const nvml::CallInFlight& call, unsigned timeout_ms) {
  const std::string gpu = call.gpu ? fmt::format(" (gpu {})", *call.gpu) : std::string();
  return Error(Errc::timeout,
               fmt::format("driver call {} has not answered for {:g} s{}; the driver hangs", call.function,
                           static_cast<double>(timeout_ms) / 1000, gpu),
               "look at the driver: dmesg | grep -i -e xid -e nvrm\n"
               "who else waits for it: ps -eo pid,stat,wchan:32,comm | grep ' D'\n"
               "to allow more time: BULKHEAD_DRIVER_TIMEOUT=SECONDS");
}

// Where nobody holds the GPUs open, the first call initialises them, which takes seconds for each.
constexpr unsigned slower_start = 3;

Result<std::thread> start(const std::shared_ptr<Asking>& asking) {
  try {
    return std::thread([asking] {
      asking->ask();
      const std::lock_guard lock(asking->mutex);
      asking->done = true;
      asking->ended.notify_one();
    });
  } catch (const std::system_error& error) {
    return Error(Errc::io, fmt::format("start a thread for the driver: {}", error.what()));
  }
}

Status wait_for(const std::shared_ptr<Asking>& asking, std::thread& thread) {
  const unsigned timeout_ms = asking->access.driver_timeout_ms;
  const auto pause = std::chrono::milliseconds(std::clamp(timeout_ms / 10, 1U, 500U));
  std::unique_lock lock(asking->mutex);
  while (!asking->ended.wait_for(lock, pause, [&] { return asking->done; })) {
    const auto call = nvml::call_in_flight();
    if (!call) continue;
    const unsigned allowed_ms =
        timeout_ms * (std::string_view(call->function) == "nvmlInit_v2" ? slower_start : 1);
    if (monotonic_ns() < call->since_ns + std::uint64_t{allowed_ms} * 1'000'000) continue;
    thread.detach();
    exit_at_once();
    return hanging(*call, allowed_ms);
  }
  lock.unlock();
  thread.join();
  return ok_status();
}

}  // namespace

Result<Host> host(const Access& access, Cost* cost) {
  const std::uint64_t began = monotonic_ns();
  const auto asking = std::make_shared<Asking>();
  asking->access = access;
  const auto pci_detail = access.detail == Detail::brief ? sysfs::PciDetail::brief : sysfs::PciDetail::full;
  read_pci(access.root, pci_detail, asking->host, asking->on_bus);
  BH_TRY(std::thread thread, start(asking));

  // The driver takes its time: the kernel and systemd are asked meanwhile.
  Host host;
  Cost spent;
  sysfs::read_host(access.root, host);
  spent.kernel_ns = monotonic_ns() - began;
  Host of_units;
  const std::uint64_t asking_units = monotonic_ns();
  read_units(access.root, of_units);
  spent.units_ns = monotonic_ns() - asking_units;
  BH_CHECK(wait_for(asking, thread));

  Host& asked = asking->host;
  host.gpus = std::move(asked.gpus);
  host.nvswitches = std::move(asked.nvswitches);
  host.accelerators = std::move(asked.accelerators);
  host.virtual_functions = std::move(asked.virtual_functions);
  if (asked.driver_version) host.driver_version = std::move(asked.driver_version);
  host.cuda_version = std::move(asked.cuda_version);
  host.notes.insert(host.notes.end(), asked.notes.begin(), asked.notes.end());
  std::vector<inventory::PciDevice> on_bus = std::move(asking->on_bus);
  std::string driver_said = std::move(asking->driver_said);
  spent.driver = std::move(asking->spent.driver);
  spent.driver_open_ns = asking->spent.driver_open_ns;
  if (const auto& refused = asking->refused) {
    driver_said = refused->message();
    host.cuda_version = Reading<std::string>::missing(driver_said);
    host.notes.push_back(refused->hint().empty() ? driver_said
                                                 : fmt::format("{} ({})", driver_said, refused->hint()));
  }
  for (auto& pci : on_bus) {
    if (pci_detail == sysfs::PciDetail::brief) {  // its link may tell why
      if (auto whole = sysfs::pci_device(access.root, pci.address); whole.ok())
        pci = std::move(whole).value();
    }
    std::string why = why_lost(pci, driver_said);
    host.lost.push_back({.pci = std::move(pci), .why = std::move(why)});
  }
  if (asking->refused && !host.kernel && !host.boot_id && host.memory.count == 0) {
    return Error(Errc::not_found, fmt::format("nothing of a host can be read below {}", access.root.string()),
                 "check --root and BULKHEAD_ROOT");
  }
  mark_ours(access, host);
  host.units = std::move(of_units.units);
  host.notes.insert(host.notes.end(), of_units.notes.begin(), of_units.notes.end());
  spent.total_ns = monotonic_ns() - began;
  if (cost != nullptr) *cost = std::move(spent);
  return host;
}

}  // namespace bulkhead::observe
