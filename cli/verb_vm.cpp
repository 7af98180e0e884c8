// bulkhead vm xml: what libvirt needs to give devices to a virtual machine.
#include <algorithm>
#include <memory>

#include <fmt/format.h>

#include "base/text.hpp"
#include "cli/plan_page.hpp"
#include "core/passthrough/passthrough.hpp"

namespace bulkhead::cli {

namespace {

struct Options {
  std::vector<std::string> devices = {};
  std::string name = "guest", memory = "16GiB";
  unsigned vcpus = 8;
  bool hostdev = false, no_hugepages = false;
};

int xml(const Context& context, const Options& options) {
  const auto tree = execute::devices(access_of(context));
  if (!tree.ok()) return fail(context, Error(tree.error()).in("vm xml"));
  passthrough::Machine machine{
      .name = options.name, .vcpus = options.vcpus, .hugepages = !options.no_hugepages};
  const auto memory = parse_memory(options.memory);
  if (!memory.ok()) return fail(context, Error(memory.error()).in("vm xml"));
  machine.memory = Bytes(*memory);
  std::optional<unsigned> node;
  bool one_node = true;
  for (const auto& word : options.devices) {
    const auto address = PciAddress::parse(word);
    const auto* function = address.ok() ? tree->find(*address) : nullptr;
    if (function == nullptr) {
      return fail(context, Error(Errc::invalid,
                                 fmt::format("vm xml: '{}' is no device of this host", printable(word, 40)),
                                 "like: bulkhead vm xml 0000:1b:00.0; bulkhead inventory lists them"));
    }
    const auto companions = function->group ? tree->members(*function->group) : std::vector{function};
    for (const auto* member : companions) {
      const bool own =
          member == function ||
          (!function->physical && !member->is_bridge() && member->address.bus == address->bus &&
           member->address.domain == address->domain && member->address.device == address->device);
      if (!own ||
          std::find(machine.devices.begin(), machine.devices.end(), member->address) != machine.devices.end())
        continue;
      if (member->driver != passthrough::vfio_driver) {
        return fail(
            context,
            Error(Errc::conflict,
                  fmt::format("vm xml: {} has {}: a virtual machine would not start", member->address.str(),
                              member->driver.empty() ? "no driver" : "driver " + member->driver),
                  "give it away first, with mode: passthrough in the node file: bulkhead apply -f FILE"));
      }
      machine.devices.push_back(member->address);
    }
    if (function->numa_node) {
      one_node = one_node && (!node || *node == *function->numa_node);
      node = function->numa_node;
      machine.cpus = function->local_cpus;
    }
  }
  if (node && one_node) {
    machine.node = node;
  } else {
    machine.cpus.clear();  // devices of two nodes, or of an unknown one: pinning to either would be a guess
  }
  if (!options.hostdev) return print(passthrough::domain_xml(machine));
  std::string out;
  for (const auto& address : machine.devices) out += passthrough::host_device_xml(address, "");
  return print(out);
}

}  // namespace

std::function<int(const Context&)> bind_vm(CLI::App& app) {
  Subverbs<Options> verbs(app);
  const auto options = verbs.options;
  verbs.add(
      "xml", "Print a libvirt domain that has the devices",
      "bulkhead vm xml 0000:1b:00.0 > guest.xml             a machine, pinned to the device's NUMA node\n"
      "bulkhead vm xml 0000:1b:00.0 --hostdev               the <hostdev> elements alone",
      [options](CLI::App& sub) {
        sub.add_option("devices", options->devices,
                       "PCI addresses that are with vfio-pci; their companions come along")
            ->required()
            ->type_name("ADDRESS");
        sub.add_option("--name", options->name, "Of the domain")->capture_default_str();
        sub.add_option("--memory", options->memory, "Like 16GiB")->capture_default_str();
        sub.add_option("--vcpus", options->vcpus, "Virtual processors")
            ->check(CLI::Range(1U, 4096U))
            ->capture_default_str();
        sub.add_flag("--hostdev", options->hostdev, "The <hostdev> elements alone, for virsh attach-device");
        sub.add_flag("--no-hugepages", options->no_hugepages, "Ordinary pages, locked");
      },
      xml);
  return verbs.run();
}

}  // namespace bulkhead::cli
