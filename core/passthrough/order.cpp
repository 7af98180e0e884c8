// What stands in the way, and what has to be done in which order.
#include <algorithm>
#include <set>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/passthrough/passthrough.hpp"

namespace bulkhead::passthrough {

namespace {

// Written here once; the plan quotes it.
std::string kind_of(const Function& function) {
  switch (function.class_code >> 8U) {
    case 0x0106:
      return "SATA controller";
    case 0x0108:
      return "NVMe controller";
    case 0x0200:
      return "network card";
    case 0x0300:
    case 0x0302:
      return "graphics device";
    case 0x0403:
      return "audio device";
    case 0x0601:
      return "ISA bridge";
    case 0x0604:
      return "PCI bridge";
    case 0x0c03:
      return "USB controller";
    case 0x0c05:
      return "SMBus controller";
    default:
      return fmt::format("device of class {:04x}", function.class_code >> 8U);
  }
}

std::string driver_words(const Function& function) {
  return function.driver.empty() ? "no driver" : fmt::format("driver {}", printable(function.driver, 40));
}

std::string holder_words(const std::vector<inventory::Holder>& holders) {
  std::vector<std::string> words;
  for (const auto& holder : holders) {
    if (words.size() == 4) {
      words.push_back(fmt::format("{} more", holders.size() - 4));
      break;
    }
    words.push_back(fmt::format("pid {} ({})", holder.pid, printable(holder.name, 40)));
  }
  return join(words, ", ");
}

bool same_slot(const PciAddress& a, const PciAddress& b) {
  return a.domain == b.domain && a.bus == b.bus && a.device == b.device;
}

constexpr std::string_view own_driver = "*";
Binding given() { return {.driver = std::string(vfio_driver), .driver_override = std::string(vfio_driver)}; }
Binding now(const Function& function) {
  return {.driver = function.driver, .driver_override = function.driver_override};
}

class Maker {
 public:
  Maker(const Tree& tree, const Wishes& wishes) : tree_(tree), wishes_(wishes) {}

  std::variant<Order, std::vector<Obstacle>> make() {
    std::set<PciAddress> seen;
    for (const auto& wanted : wishes_.devices) {
      if (!seen.insert(wanted.address).second) {
        stop(Hindrance::asked_twice, wanted, "is named twice", "keep one of the two");
        continue;
      }
      const Function* function = tree_.find(wanted.address);
      if (function == nullptr) {
        stop(Hindrance::no_such_function, wanted, "is not on the PCI bus",
             "bulkhead inventory lists what is; after a hot plug: echo 1 > /sys/bus/pci/rescan");
        continue;
      }
      if (wanted.purpose == Purpose::host) {
        give_back(wanted, *function);
      } else if (wanted.vfs) {
        virtual_functions(wanted, *function);
      } else if (wanted.purpose == Purpose::virtual_machine) {
        whole(wanted, *function);
      }
    }
    if (!obstacles_.empty()) return std::move(obstacles_);
    if (needs_vfio_ && !tree_.modules_missing.empty()) {
      order_.deeds.insert(order_.deeds.begin(),
                          {LoadModules{tree_.modules_missing, false, true}, "VFIO is not loaded", {}});
    }
    return std::move(order_);
  }

 private:
  static std::string subject_of(const Wanted& wanted) {
    return wanted.label.empty() ? wanted.address.str()
                                : fmt::format("{} ({})", wanted.label, wanted.address.str());
  }
  void stop(Hindrance kind, const Wanted& wanted, std::string why, std::string way_out,
            std::vector<inventory::Holder> holders = {}) {
    obstacles_.push_back({.hindrance = kind,
                          .subject = subject_of(wanted),
                          .why = std::move(why),
                          .holders = std::move(holders),
                          .way_out = std::move(way_out)});
  }
  void add(Deed deed, std::string why, std::vector<inventory::Holder> evicts = {}) {
    order_.deeds.push_back({std::move(deed), std::move(why), std::move(evicts)});
  }

  bool is_wanted(const PciAddress& address) const {
    for (const auto& wanted : wishes_.devices) {
      if (wanted.purpose != Purpose::virtual_machine) continue;
      if (!wanted.vfs && wanted.address == address) return true;
      // The other functions of a wanted device go with it.
      const Function* other = tree_.find(address);
      if (!wanted.vfs && same_slot(wanted.address, address) && other != nullptr && !other->physical)
        return true;
      const Function* function = tree_.find(wanted.address);
      if (wanted.vfs && function != nullptr) {
        const auto& all = function->virtual_functions;
        const auto count = std::min<std::size_t>(*wanted.vfs, all.size());
        if (std::find(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(count), address) !=
            all.begin() + static_cast<std::ptrdiff_t>(count))
          return true;
      }
    }
    return false;
  }

  // What the host loses with it. Holders of a device that is with VFIO are virtual machines: it is theirs
  // already.
  void uses(const Wanted& wanted, const Function& function, std::vector<inventory::Holder>& evicts) {
    const std::string which =
        function.address == wanted.address ? "" : fmt::format("{} ", function.address.str());
    if (function.boot_vga && !function.with_vfio()) {
      stop(
          Hindrance::boot_display, wanted,
          fmt::format("{}is the display that the firmware started on: the host's console would be gone",
                      which),
          "let the firmware start on another display (often called primary display), or use a serial console "
          "and boot with video=efifb:off");
    }
    for (const auto& use : function.uses) {
      if (function.with_vfio()) continue;
      stop(Hindrance::host_uses, wanted,
           fmt::format("{}{} is in use by the host: {}", which, kind_of(function), use),
           use.starts_with("default route") ? "move the default route to another card first"
           : use.starts_with("swap")        ? "swapoff it, and take it out of /etc/fstab"
                                            : "unmount it, and take it out of /etc/fstab; a root file system "
                                              "cannot be given away");
    }
    if (!function.holders.empty() && !function.with_vfio()) {
      if (wishes_.evict) {
        evicts.insert(evicts.end(), function.holders.begin(), function.holders.end());
      } else {
        stop(Hindrance::held, wanted, fmt::format("{}is held by {}", which, holder_words(function.holders)),
             "stop them, or take it from them with --evict", function.holders);
      }
    }
  }

  bool in_a_group(const Wanted& wanted, const Function& function) {
    if (!function.group) {
      stop(Hindrance::no_group, wanted,
           tree_.firmware_table
               ? "is in no IOMMU group: the firmware offers an IOMMU and the kernel leaves it off"
               : "is in no IOMMU group: the firmware offers no IOMMU",
           tree_.firmware_table
               ? "take intel_iommu=off, amd_iommu=off or iommu=off from the kernel's command line, or add "
                 "intel_iommu=on; then reboot. bulkhead doctor --for passthrough has the evidence"
               : "turn on VT-d or AMD-Vi (IOMMU) in the firmware, then reboot");
      return false;
    }
    for (const auto& group : tree_.groups) {
      if (group.number == *function.group && group.noiommu) {
        stop(Hindrance::no_isolation, wanted,
             fmt::format(
                 "its group {} was made without an IOMMU (vfio-noiommu): a guest could reach all memory",
                 group.number),
             "turn the IOMMU on, and enable_unsafe_noiommu_mode off");
        return false;
      }
    }
    return true;
  }

  // The functions that go with it: those of its slot. Others of the group are strangers.
  std::vector<const Function*> company(const Wanted& wanted, const Function& function) {
    std::vector<const Function*> all;
    std::vector<std::string> strangers;
    for (const Function* member : tree_.members(*function.group)) {
      if (member->is_bridge()) {
        // The kernel lets bridges be: pcieport does no DMA of its own for others.
        if (!member->driver.empty() && member->driver != "pcieport") {
          stop(Hindrance::bridge, wanted,
               fmt::format("shares IOMMU group {} with bridge {}, which has {}", *function.group,
                           member->address.str(), driver_words(*member)),
               fmt::format("unbind it: echo {} > /sys/bus/pci/drivers/{}/unbind", member->address.str(),
                           member->driver));
        }
        continue;
      }
      const bool own =
          same_slot(member->address, function.address) && !member->physical && !function.physical;
      if (own || member->address == function.address) {
        all.push_back(member);
      } else if (!is_wanted(member->address)) {
        strangers.push_back(
            fmt::format("{} ({}, {})", member->address.str(), kind_of(*member), driver_words(*member)));
      }
    }
    if (!strangers.empty()) {
      stop(Hindrance::stranger, wanted,
           fmt::format("shares IOMMU group {} with {}: a guest could reach {} through the device",
                       *function.group, join(strangers, ", "), strangers.size() == 1 ? "it" : "them"),
           "put it in another slot, turn on ACS in the firmware, or give all of them away: list them under "
           "devices with mode: passthrough");
    }
    return all;
  }

  void bind(const Wanted& wanted, const Function& function, const Target& target) {
    const Binding before = now(function);
    if (before == given()) return;
    std::vector<inventory::Holder> evicts;
    uses(wanted, function, evicts);
    std::string why = fmt::format("it has {}", driver_words(function));
    if (function.address != wanted.address && !target.vf)
      why = fmt::format("it belongs to {}'s IOMMU group, and has {}", wanted.address.str(),
                        driver_words(function));
    if (function.driver == vfio_driver)
      why = "vfio-pci has it, but a rescan or a new driver would take it away";
    add(SetDriver{target, before, given()}, std::move(why), std::move(evicts));
    bound_ = true;
  }

  void permission_and_proof(const Target& target) {
    const bool proved =
        std::find(wishes_.proved.begin(), wishes_.proved.end(), target) != wishes_.proved.end();
    if (bound_ || !proved) {
      // The device file is made anew, root's alone, whenever a group gets its first member.
      if (wishes_.permission && *wishes_.permission != Permission{})
        add(SetPermission{target, {}, *wishes_.permission},
            "the device file is made for root alone at each bind");
      add(Prove{target, false}, bound_ ? "only opening it shows that it can be used"
                                       : "it was not opened since it was bound on this boot");
    }
  }

  void whole(const Wanted& wanted, const Function& function) {
    needs_vfio_ = true;
    bound_ = false;
    if (function.vfs_now > 0) {
      stop(Hindrance::live_functions, wanted,
           fmt::format("has {} virtual functions, which would lose their device", function.vfs_now),
           fmt::format("give them back first: bulkhead reclaim {}", function.address.str()));
      return;
    }
    if (!function.bars_without_room.empty()) {
      stop(Hindrance::no_room, wanted,
           fmt::format("BAR {} has no address: the window of the bridge above is too small",
                       format_ranges(function.bars_without_room)),
           "turn on Above 4G decoding in the firmware, or boot with pci=realloc");
    }
    if (!in_a_group(wanted, function)) return;
    fabric(wanted, function);
    for (const Function* member : company(wanted, function)) bind(wanted, *member, {member->address, {}});
    permission_and_proof({function.address, {}});
  }

  // FABRIC_MODE 1 (shared NVSwitch) and 2 (vGPU) let partitions be switched for guests; 0 gives the fabric to
  // this host.
  void fabric(const Wanted& wanted, const Function& function) {
    const bool switches = std::any_of(tree_.functions.begin(), tree_.functions.end(), [](const Function& f) {
      return f.vendor == 0x10de && f.class_code >> 8U == 0x0680;
    });
    if (!switches || function.vendor != 0x10de || function.class_code >> 16U != 0x03) return;
    if (tree_.fabric_mode && *tree_.fabric_mode != 0) return;
    bool all = true;  // with every GPU and switch in one virtual machine the fabric goes with them
    for (const auto& f : tree_.functions) {
      const bool gpu = f.class_code >> 16U == 0x03, of_fabric = f.class_code >> 8U == 0x0680;
      if (f.vendor == 0x10de && (gpu || of_fabric) && !is_wanted(f.address)) all = false;
    }
    if (all) return;
    stop(Hindrance::fabric, wanted,
         fmt::format(
             "this is an NVSwitch system, and FABRIC_MODE is {}: in a guest its GPU would start no CUDA "
             "(error 802)",
             tree_.fabric_mode ? std::to_string(*tree_.fabric_mode) : "not readable"),
         "set FABRIC_MODE=1 in /usr/share/nvidia/nvswitch/fabricmanager.cfg and restart "
         "nvidia-fabricmanager, or "
         "give all GPUs and switches to one virtual machine");
  }

  void virtual_functions(const Wanted& wanted, const Function& function) {
    bound_ = false;
    const unsigned count = *wanted.vfs;
    if (!function.vfs_total || *function.vfs_total == 0) {
      if (count == 0) return;
      stop(Hindrance::no_sriov, wanted, fmt::format("{} has no SR-IOV", kind_of(function)),
           "remove sriov, or turn SR-IOV on in the firmware and the device's own settings");
      return;
    }
    if (count > *function.vfs_total) {
      stop(Hindrance::too_many, wanted,
           fmt::format("has {} virtual functions at most, {} are wanted", *function.vfs_total, count),
           fmt::format("write sriov: {{vfs: {}}}", *function.vfs_total));
      return;
    }
    const bool away = wanted.purpose == Purpose::virtual_machine;
    if (count != function.vfs_now) {
      if (function.driver.empty() || function.with_vfio()) {
        stop(Hindrance::no_host_driver, wanted,
             fmt::format("has {}; only the vendor's driver makes virtual functions", driver_words(function)),
             fmt::format("give it its driver back: bulkhead reclaim {}", function.address.str()));
        return;
      }
      if (!release(wanted, function)) return;
      add(SetVirtualFunctions{function.address, function.vfs_now, count, function.autoprobe,
                              !away && count > 0},
          fmt::format("there are {}", function.vfs_now));
    }
    if (!away) return;
    if (count > 0) needs_vfio_ = true;
    for (unsigned i = 0; i < count; ++i) {
      const Target target{function.address, i};
      bound_ = false;
      if (count == function.vfs_now && i < function.virtual_functions.size()) {
        const Function* vf = tree_.find(function.virtual_functions[i]);
        if (vf == nullptr || !in_a_group(wanted, *vf)) continue;
        static_cast<void>(company(wanted, *vf));
        bind(wanted, *vf, target);
      } else {
        if (i == 0 && !in_a_group(wanted, function)) return;  // one IOMMU or none for both
        // Made without a driver, unless vfio-pci makes them itself.
        add(SetDriver{target, {}, given()}, "it is made for a virtual machine");
        bound_ = true;
      }
      permission_and_proof(target);
    }
  }

  // Takes the virtual functions away from VFIO; false: somebody has one open.
  bool release(const Wanted& wanted, const Function& function) {
    bool free = true;
    for (unsigned i = 0; i < function.virtual_functions.size(); ++i) {
      const Function* vf = tree_.find(function.virtual_functions[i]);
      if (vf == nullptr) continue;
      std::vector<inventory::Holder> evicts;
      for (const auto& use : vf->uses) {
        stop(Hindrance::host_uses, wanted, fmt::format("its VF {} is in use by the host: {}", i, use),
             "stop that use first");
        free = false;
      }
      if (!vf->holders.empty()) {
        if (wishes_.evict) {
          evicts = vf->holders;
        } else {
          stop(Hindrance::held, wanted,
               fmt::format("its VF {} ({}) is held by {}; taking it would block until they let go", i,
                           vf->address.str(), holder_words(vf->holders)),
               "stop the virtual machine, or take it with --evict", vf->holders);
          free = false;
          continue;
        }
      }
      if (now(*vf) != Binding{})
        add(SetDriver{{function.address, i}, now(*vf), {}}, "the virtual functions go", std::move(evicts));
    }
    return free;
  }

  Binding original(const Target& target) const {
    for (const auto& one : wishes_.originals) {
      if (one.target == target) return one.binding;
    }
    return {.driver = std::string(own_driver), .driver_override = {}};
  }

  void give_back(const Wanted& wanted, const Function& function) {
    if (function.vfs_now > 0) {
      if (wanted.vfs.value_or(0) != 0) return;
      if (!release(wanted, function)) return;
      add(SetVirtualFunctions{function.address, function.vfs_now, 0, function.autoprobe, true},
          "the device goes back to the host as one");
    }
    std::vector<const Function*> all = {&function};
    if (function.group && !function.physical) {
      for (const Function* member : tree_.members(*function.group)) {
        if (member != &function && same_slot(member->address, function.address)) all.push_back(member);
      }
    }
    bool any = false;
    // The last bound goes first: audio and USB functions find their GPU as it was when they lost it.
    for (auto member = all.rbegin(); member != all.rend(); ++member) {
      const Function& one = **member;
      const bool ours = one.with_vfio() || one.driver_override == vfio_driver;
      if (!ours) continue;
      any = true;
      std::vector<inventory::Holder> evicts;
      if (!one.holders.empty()) {
        if (!wishes_.evict) {
          stop(Hindrance::held, wanted,
               fmt::format("{}is held by {}; taking it back would block until they let go",
                           one.address == wanted.address ? "" : one.address.str() + " ",
                           holder_words(one.holders)),
               "stop the virtual machine, or take it with --evict", one.holders);
          continue;
        }
        evicts = one.holders;
      }
      add(SetDriver{{one.address, {}}, now(one), original({one.address, {}})}, "it goes back to the host",
          std::move(evicts));
    }
    if (!any && function.vfs_now == 0)
      order_.notes.push_back(
          fmt::format("{} is the host's already ({})", subject_of(wanted), driver_words(function)));
  }

  const Tree& tree_;
  const Wishes& wishes_;
  Order order_ = {};
  std::vector<Obstacle> obstacles_ = {};
  bool needs_vfio_ = false;
  bool bound_ = false;  // something of the device at hand gets a driver
};

}  // namespace

const Function* Tree::find(const PciAddress& address) const {
  for (const auto& function : functions) {
    if (function.address == address) return &function;
  }
  return nullptr;
}

std::vector<const Function*> Tree::members(unsigned group) const {
  std::vector<const Function*> out;
  for (const auto& function : functions) {
    if (function.group == group) out.push_back(&function);
  }
  return out;
}

std::string str(const Target& target) {
  return target.vf ? fmt::format("{} VF {}", target.function.str(), *target.vf) : target.function.str();
}

std::optional<PciAddress> resolve(const Tree& tree, const Target& target) {
  if (!target.vf) return target.function;
  const Function* function = tree.find(target.function);
  if (function == nullptr || *target.vf >= function->virtual_functions.size()) return std::nullopt;
  return function->virtual_functions[*target.vf];
}

std::variant<Order, std::vector<Obstacle>> order(const Tree& tree, const Wishes& wishes) {
  return Maker(tree, wishes).make();
}

}  // namespace bulkhead::passthrough
