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

// Services that hold a GPU by themselves, by the names of their processes (the kernel keeps 15 letters): each
// is stopped in its own way, and killed it would come back.
constexpr struct {
  std::string_view process, words;
} services[] = {
    {"nvidia-persiste", "the persistence daemon: systemctl stop nvidia-persistenced"},
    {"nv-hostengine", "DCGM: systemctl stop nvidia-dcgm"},
    {"dcgm-exporter", "DCGM's exporter: stop its container, or systemctl stop dcgm-exporter"},
    {"nv-fabricmanage", "the Fabric Manager: systemctl stop nvidia-fabricmanager"},
    {"Xorg", "the display server: systemctl isolate multi-user.target"},
};

// How to be rid of whoever holds a device of the host's.
std::string ways_to_end(const std::vector<inventory::Holder>& holders) {
  std::vector<std::string> ways;
  bool others = false;
  for (const auto& holder : holders) {
    const auto* row = std::find_if(std::begin(services), std::end(services), [&](const auto& one) {
      return std::string_view(holder.name).starts_with(one.process);
    });
    if (row == std::end(services)) {
      others = true;
    } else if (std::find(ways.begin(), ways.end(), row->words) == ways.end()) {
      ways.emplace_back(row->words);
    }
  }
  if (ways.empty()) return "stop them, or take it from them with --evict";
  if (others) ways.emplace_back("stop the others, or take it from them with --evict");
  return join(ways, "; ");
}

// Of the chipset: what hangs on it (TPM, BMC, clock, fans) is the host's, and its neighbours in the slot are
// not its companions.
bool is_of_chipset(const Function& function) {
  const auto kind = function.class_code >> 8U;
  return kind == 0x0601 || kind == 0x0c05;
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
      if (hangs(wanted, *function) || is_dead(wanted, *function)) continue;
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
    // Functions of one group share its file, and so whoever holds it, who is ended once.
    std::erase_if(evicts, [&](const inventory::Holder& holder) {
      return !evicted_.insert({holder.pid, holder.start_time}).second;
    });
    order_.deeds.push_back({std::move(deed), std::move(why), std::move(evicts)});
  }
  bool refused_already(const Wanted& wanted, const std::vector<inventory::Holder>& holders) {
    bool known = true;
    for (const auto& holder : holders) known &= !refused_.insert({wanted.address, holder.pid}).second;
    return known;
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

  // Named itself, not only in the slot of one that is: a group of its own does not go along.
  bool is_given(const PciAddress& address) const {
    return std::any_of(wishes_.devices.begin(), wishes_.devices.end(), [&](const Wanted& wanted) {
      return wanted.address == address && wanted.purpose == Purpose::virtual_machine && !wanted.vfs;
    });
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
      } else if (!refused_already(wanted, function.holders)) {
        stop(Hindrance::held, wanted, fmt::format("{}is held by {}", which, holder_words(function.holders)),
             ways_to_end(function.holders), function.holders);
      }
    }
  }

  // Whether somebody's write to it, to a function of its group or to one of its virtual functions never came
  // back: each of ours would wait behind it.
  bool hangs(const Wanted& wanted, const Function& function) {
    for (const auto& one : tree_.functions) {
      const bool its = one.address == function.address || (function.group && one.group == function.group) ||
                       one.physical == function.address;
      if (!one.stuck || !its) continue;
      stop(
          Hindrance::stuck, wanted,
          fmt::format("an unbind, a probe or a reset of {} hangs in the kernel: nothing can be written to it",
                      one.address == function.address ? "it" : one.address.str()),
          "see who waits: ps -eo pid,stat,wchan:24,args | grep ' D'; what they wait for is whoever has the "
          "device open: when that ends, so do they");
      return true;
    }
    return false;
  }

  // Whether it, or what would be given away with it, answers nothing. It may go back to the host: its driver
  // will say no, or be content with what a power cycle makes of it.
  bool is_dead(const Wanted& wanted, const Function& function) {
    for (const auto& one : tree_.functions) {
      const bool with_it =
          !wanted.vfs && one.group == function.group && same_slot(one.address, function.address);
      if (!one.dead || (one.address != function.address && !with_it && one.physical != function.address))
        continue;
      const std::string which = one.address == function.address ? "" : fmt::format("{}: ", one.address.str());
      if (wanted.purpose == Purpose::host) {
        order_.notes.push_back(
            fmt::format("{}: {}; no driver can start it. Power-cycle its slot or the "
                        "machine, then: bulkhead reclaim {} --rescan",
                        one.address.str(), dead_words, function.address.str()));
        continue;
      }
      stop(Hindrance::dead, wanted, fmt::format("{}{}", which, dead_words), std::string(dead_mend));
      return true;
    }
    return false;
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
      const bool own = same_slot(member->address, function.address) && !member->physical &&
                       !function.physical && !is_of_chipset(*member);
      if (own || member->address == function.address) {
        all.push_back(member);
      } else if (is_of_chipset(*member) ? !is_given(member->address) : !is_wanted(member->address)) {
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

  // `function`: as it is now, where it is there and stays bound.
  void permission_and_proof(const Target& target, const Function* function) {
    const bool proved =
        std::find(wishes_.proved.begin(), wishes_.proved.end(), target) != wishes_.proved.end();
    // The device file is made anew, root's alone, whenever a group gets its first member.
    const bool made_anew = bound_ || function == nullptr || !function->permission;
    Permission has = made_anew ? Permission{} : *function->permission;
    // A node file may give the owner as a number.
    if (!made_anew && wishes_.permission && wishes_.permission->owner == function->owner_id)
      has.owner = function->owner_id;
    if (wishes_.permission && *wishes_.permission != has)
      add(SetPermission{target, has, *wishes_.permission},
          made_anew ? "the device file is made for root alone at each bind"
                    : fmt::format("the device file is {}'s with mode {:04o}", has.owner, has.mode));
    if (bound_ || !proved)
      add(Prove{target, false}, bound_ ? "only opening it shows that it can be used"
                                       : "it was not opened since it was bound on this boot");
  }

  // Unbinding takes the device file away, and with it whose it was: a step of its own, so that an undo gives
  // it back.
  void take_permission(const Target& target, const Function& function) {
    if (!function.permission || *function.permission == Permission{} || !function.group ||
        !taken_.insert(*function.group).second)
      return;
    add(SetPermission{target, *function.permission, {}}, "it goes back to the host");
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
    left_behind(function);
    permission_and_proof({function.address, {}}, &function);
  }

  // Functions of its slot that are in groups of their own stay where they are. The guest may have the device
  // without them; only a reset of the whole slot would need them.
  void left_behind(const Function& function) {
    std::vector<std::string> names;
    for (const auto& one : tree_.functions) {
      if (!same_slot(one.address, function.address) || one.group == function.group || one.physical ||
          one.with_vfio() || is_given(one.address))
        continue;
      names.push_back(fmt::format("{} ({}, {})", one.address.str(), kind_of(one), driver_words(one)));
    }
    if (names.empty() || function.physical) return;
    order_.notes.push_back(fmt::format(
        "{}: {} of its slot {} in another IOMMU group and {} left behind: the device can be reset "
        "by itself, if it has a way, and not with its slot. To give {} along, list {} under "
        "devices with mode: passthrough",
        function.address.str(), join(names, ", "), names.size() == 1 ? "is" : "are",
        names.size() == 1 ? "is" : "are", names.size() == 1 ? "it" : "them",
        names.size() == 1 ? "it" : "them"));
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
      const Function* there = nullptr;
      bound_ = false;
      if (count == function.vfs_now && i < function.virtual_functions.size()) {
        const Function* vf = tree_.find(function.virtual_functions[i]);
        if (vf == nullptr || !in_a_group(wanted, *vf)) continue;
        static_cast<void>(company(wanted, *vf));
        bind(wanted, *vf, target);
        there = vf;
      } else {
        if (i == 0 && !in_a_group(wanted, function)) return;  // one IOMMU or none for both
        // Made without a driver, unless vfio-pci makes them itself.
        add(SetDriver{target, {}, given()}, "it is made for a virtual machine");
        bound_ = true;
      }
      permission_and_proof(target, there);
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
      if (now(*vf) == Binding{}) continue;
      take_permission({function.address, i}, *vf);
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
    for (const Function* member : all) take_permission({member->address, {}}, *member);
    // The last bound goes first: audio and USB functions find their GPU as it was when they lost it.
    for (auto member = all.rbegin(); member != all.rend(); ++member) {
      const Function& one = **member;
      // Without a driver, and somebody has it open: an unbind of it waits for them.
      const bool waits = one.driver.empty() && !one.holders.empty();
      const bool ours = one.with_vfio() || one.driver_override == vfio_driver || waits;
      if (!ours) continue;
      any = true;
      std::vector<inventory::Holder> evicts;
      if (!one.holders.empty()) {
        if (!wishes_.evict) {
          if (refused_already(wanted, one.holders)) continue;
          stop(Hindrance::held, wanted,
               fmt::format("{}is held by {}; taking it back would block until they let go",
                           one.address == wanted.address ? "" : one.address.str() + " ",
                           holder_words(one.holders)),
               "stop the virtual machine, or take it with --evict", one.holders);
          continue;
        }
        evicts = one.holders;
      }
      const Binding after = original({one.address, {}});
      // A virtual function comes and goes with its physical one, never by itself.
      const bool replug = wishes_.rescan && !one.physical;
      add(SetDriver{{one.address, {}}, now(one), after, replug}, "it goes back to the host",
          std::move(evicts));
      if (replug) {
        order_.notes.push_back(
            after.driver_override.empty()
                ? fmt::format(
                      "{}: removing it from the bus loses its driver_override; it had none before it was "
                      "given away, so nothing is lost",
                      one.address.str())
                : fmt::format(
                      "{}: removing it from the bus loses its driver_override; {} is written again once it "
                      "is back",
                      one.address.str(), printable(after.driver_override, 40)));
      }
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
  std::set<std::pair<int, std::uint64_t>> evicted_ = {};
  std::set<std::pair<PciAddress, int>> refused_ = {};
  std::set<unsigned> taken_ = {};  // groups whose file is root's again
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

SlotReset slot_reset(std::span<const TakenAlong> all, unsigned group) {
  if (all.empty()) return {false, "the kernel names no function that a reset of its slot would take along"};
  std::vector<std::string> left_behind;
  bool others = false;
  for (const auto& one : all) {
    if (!one.driver.starts_with("vfio"))
      left_behind.push_back(fmt::format("{} ({})", one.address.str(),
                                        one.driver.empty() ? "no driver" : printable(one.driver, 40)));
    others |= one.group != group;
  }
  if (!left_behind.empty())
    return {false, fmt::format("a reset of its slot would take {} along, which {} left behind",
                               join(left_behind, ", "), left_behind.size() == 1 ? "is" : "are")};
  // Each group has its own guest, or will have: none resets the other's.
  if (others) return {false, "its slot is reset when nobody has any of its functions open"};
  return {true, {}};
}

std::variant<Order, std::vector<Obstacle>> order(const Tree& tree, const Wishes& wishes) {
  return Maker(tree, wishes).make();
}

}  // namespace bulkhead::passthrough
