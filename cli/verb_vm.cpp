// bulkhead vm xml: what libvirt needs to give devices to a virtual machine.
#include <algorithm>
#include <memory>

#include <fmt/format.h>

#include "base/text.hpp"
#include "cli/api.hpp"
#include "cli/plan_page.hpp"
#include "core/passthrough/passthrough.hpp"
#include "engine/observe/observe.hpp"

namespace bulkhead::cli {

namespace {

struct Options {
  std::vector<std::string> devices = {};
  std::string domain = {}, memory = "16GiB", url = {};
  unsigned vcpus = 8;
  bool hostdev = false, no_hugepages = false, uefi = false;
};

// The addresses of a lease's devices, from the daemon that granted it.
Result<std::vector<PciAddress>> devices_of_lease(const std::string& url, std::uint64_t id) {
  BH_TRY(const auto client, api::connect(url));
  BH_TRY(const auto lease, api::get(*client, fmt::format("/api/v1/leases/{}", id)));
  const std::string what = fmt::format("lease {}", id);
  if (const auto cls = api::text(lease, "class"); cls != "passthrough") {
    return Error(Errc::invalid, fmt::format("{} is of class {}: it stays with the host's driver", what, cls),
                 "for a virtual machine: bulkhead lease create --class passthrough --wait");
  }
  if (const auto state = api::text(lease, "state"); state != "active") {
    return Error(Errc::conflict, fmt::format("{} is {}, not active", what, state),
                 fmt::format("bulkhead lease show {0}", id));
  }
  std::vector<PciAddress> out;
  const auto devices = lease.find("devices");
  if (devices != lease.end() && devices->is_array()) {
    for (const auto& device : *devices) {
      const auto address = PciAddress::parse(api::text(device, "pci"));
      if (!address.ok()) return Error(Errc::corrupt, fmt::format("{}: a device without a PCI address", what));
      out.push_back(*address);
    }
  }
  if (out.empty()) return Error(Errc::corrupt, fmt::format("{} has no devices", what));
  return out;
}

Result<std::vector<PciAddress>> asked_for(const Options& options) {
  std::vector<PciAddress> out;
  for (const auto& word : options.devices) {
    // An address has colons, the number of a lease has none.
    if (const auto id = parse_u64(word); id && *id > 0) {
      BH_TRY(const auto of_lease, devices_of_lease(options.url, *id));
      out.insert(out.end(), of_lease.begin(), of_lease.end());
      continue;
    }
    const auto address = PciAddress::parse(word);
    if (!address.ok())
      return Error(
          Errc::invalid,
          fmt::format("'{}' is neither a PCI address nor the number of a lease", printable(word, 40)),
          "like: bulkhead vm xml 0000:1b:00.0; bulkhead inventory lists them");
    out.push_back(*address);
  }
  return out;
}

void note(const Context& context, const std::string& text) {
  std::fputs((paint(context, Tone::warn, "note: ") + text + "\n").c_str(), stderr);
}

// The largest pages of which the node has enough free. Where it has enough of none, the smallest are asked
// for all the same, and what is missing is said: they are set aside before the guest starts, not now.
std::optional<Bytes> page_for(const Context& context, const inventory::Host& host,
                              const passthrough::Machine& machine) {
  struct Size {
    Bytes size = {};
    std::uint64_t free = 0;
  };
  std::vector<Size> sizes;
  for (const auto& node : host.numa) {
    if (machine.node && node.id != *machine.node) continue;
    for (const auto& pages : node.hugepages) {
      const auto same = std::find_if(sizes.begin(), sizes.end(),
                                     [&](const Size& s) { return s.size.count == pages.size.count; });
      if (same != sizes.end()) {
        same->free += pages.free;
      } else {
        sizes.push_back({pages.size, pages.free});
      }
    }
  }
  if (sizes.empty()) return Bytes(0);  // the kernel shows none: libvirt takes the default size
  std::sort(sizes.begin(), sizes.end(),
            [](const Size& a, const Size& b) { return a.size.count < b.size.count; });
  const auto needed = [&](const Size& s) { return (machine.memory.count + s.size.count - 1) / s.size.count; };
  for (auto at = sizes.rbegin(); at != sizes.rend(); ++at)
    if (machine.memory.count % at->size.count == 0 && at->free >= needed(*at)) return at->size;
  const Size& small = sizes.front();
  const std::string where = machine.node ? fmt::format("NUMA node {}", *machine.node) : "this host";
  const std::string folder = machine.node
                                 ? fmt::format("/sys/devices/system/node/node{}/hugepages", *machine.node)
                                 : "/sys/kernel/mm/hugepages";
  note(context, fmt::format("{} has {} free pages of {}, the guest needs {}: before it starts, "
                            "echo {} | sudo tee {}/hugepages-{}kB/nr_hugepages; or use --no-hugepages",
                            where, small.free, human(small.size), needed(small), needed(small), folder,
                            small.size.count / 1024));
  return small.size;
}

int xml(const Context& context, const Options& options) {
  const auto wrong = [&](const Error& error) { return fail(context, Error(error).in("vm xml")); };
  const auto asked = asked_for(options);
  if (!asked.ok()) return wrong(asked.error());
  const auto tree = execute::devices(access_of(context));
  if (!tree.ok()) return wrong(tree.error());
  auto handed = passthrough::handed(*tree, *asked);
  if (!handed.ok()) return wrong(handed.error());
  if (options.hostdev) {
    std::string out;
    for (const auto& address : handed->devices) out += passthrough::host_device_xml(address, "");
    return print(out);
  }
  const auto memory = parse_memory(options.memory);
  if (!memory.ok()) return wrong(memory.error());
  constexpr std::uint64_t mebibyte = 1U << 20U;
  if (*memory < mebibyte || *memory % mebibyte != 0 || *memory >> 50U != 0)
    return wrong(Error(Errc::invalid,
                       fmt::format("--memory {}: whole MiB, at least one", printable(options.memory, 40)),
                       "like: --memory 64GiB"));
  passthrough::Machine machine{.name = options.domain,
                               .memory = Bytes(*memory),
                               .vcpus = options.vcpus,
                               .cpus = handed->cpus,
                               .node = handed->node,
                               .uefi = options.uefi,
                               .devices = std::move(handed->devices)};
  const auto host = observe::of_the_kernel(context.root);
  // A machine with one node has nothing to pin to.
  if (host.numa.size() < 2) {
    machine.node.reset();
    machine.cpus.clear();
  } else if (handed->nodes_differ) {
    note(context, "the devices are near different NUMA nodes: nothing is pinned");
  } else if (!machine.node) {
    note(context, "the firmware does not say which NUMA node the device is near: nothing is pinned");
  } else if (const auto near = parse_ranges(machine.cpus); near && near->size() < machine.vcpus) {
    note(context, fmt::format("{} virtual processors share the {} CPUs of NUMA node {}", machine.vcpus,
                              near->size(), *machine.node));
  }
  if (!options.no_hugepages) machine.hugepage = page_for(context, host, machine);
  return print(options.domain.empty() ? passthrough::snippet_xml(machine) : passthrough::domain_xml(machine));
}

}  // namespace

std::function<int(const Context&)> bind_vm(CLI::App& app) {
  Subverbs<Options> verbs(app);
  const auto options = verbs.options;
  verbs.add(
      "xml", "Print what libvirt needs to give devices to a virtual machine",
      "bulkhead vm xml 0000:1b:00.0                         the elements, to put into a domain\n"
      "bulkhead vm xml 7 --domain guest > guest.xml         the devices of lease 7, a whole domain\n"
      "bulkhead vm xml 0000:1b:00.0 --hostdev               the <hostdev> elements alone",
      [options](CLI::App& sub) {
        sub.add_option("devices", options->devices,
                       "PCI addresses that are with vfio-pci, or numbers of leases of class passthrough; the "
                       "rest of each IOMMU group comes along")
            ->required()
            ->expected(1, 64)
            ->type_name("ADDRESS|LEASE");
        sub.add_option("--domain", options->domain, "A whole domain of this name, not only its elements")
            ->check([](const std::string& name) {
              const bool good = !name.empty() && name.size() <= 64 && name.find('/') == std::string::npos &&
                                printable(name, 64) == name && name.front() != ' ';
              return good ? std::string() : std::string("a domain's name has 1 to 64 characters and no '/'");
            })
            ->type_name("NAME");
        sub.add_option("--memory", options->memory, "Like 16GiB")->capture_default_str();
        sub.add_option("--vcpus", options->vcpus, "Virtual processors")
            ->check(CLI::Range(1U, 4096U))
            ->capture_default_str();
        sub.add_flag("--hostdev", options->hostdev, "The <hostdev> elements alone, for virsh attach-device");
        sub.add_flag("--no-hugepages", options->no_hugepages, "Ordinary pages");
        sub.add_flag("--uefi", options->uefi, "Start it with UEFI, which libvirt looks for on the host");
        api::add_url(sub, options->url);
      },
      xml);
  return verbs.run();
}

}  // namespace bulkhead::cli
