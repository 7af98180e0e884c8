#include "core/diagnose/diagnose.hpp"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <unordered_map>

#include <fmt/format.h>

#include "base/text.hpp"

namespace bulkhead::diagnose {

namespace {

using xid::Attribution;
using xid::Severity;

constexpr std::size_t kept_evidence = 24;
constexpr std::size_t kept_names = 32;
constexpr std::int64_t same_burst_ms = 600'000;  // the same fault of the same thing again: one incident
constexpr std::int64_t follows_ms = 5'000;       // what a fault drags along
constexpr std::int64_t same_event_ms = 2'000;    // one event, told by two sources
constexpr std::int64_t memory_ms = 60'000;       // the lines of one uncorrectable error
constexpr std::size_t most_incidents = 10'000;

std::string bdf(const PciAddress& at) { return at.str(); }
bool same_slot(const PciAddress& a, const PciAddress& b) {
  return a.domain == b.domain && a.bus == b.bus && a.device == b.device;
}

// Codes that a fault drags along: never an incident of their own while their cause is in sight.
bool is_follower(unsigned id) { return id == 43 || id == 45 || id == 154 || id == 171 || id == 172; }
// One uncorrectable error of memory speaks in several codes; the gravest leads.
int memory_rank(unsigned id) {
  switch (id) {
    case 95:
      return 9;
    case 64:
      return 8;
    case 157:
      return 7;
    case 48:
      return 6;
    case 140:
      return 5;
    case 94:
      return 4;
    case 156:
      return 3;
    case 63:
      return 2;
    case 171:
    case 172:
      return 1;
    default:
      return 0;
  }
}

struct Open {  // an incident while it grows
  Incident incident;
  std::set<std::string> tenants, processes;
  std::set<std::uint32_t> pids;
  std::map<std::pair<Source, std::string>, std::uint64_t> tellings;
  std::set<Source> sources;
  std::set<std::string> places;
  std::set<unsigned> codes;
  std::optional<xid::Containment> containment;
  std::optional<unsigned> recovery;
  const xid::LinkRow* link_row = nullptr;
  std::optional<xid::LinkAsks> link_asks;  // the gravest of its lines
  Severity switch_says = Severity::unknown;
  const logs::Rule* rule = nullptr;
  bool vouched = false;
  bool believed_program = true;
  std::optional<std::int64_t> at_ms;
};

void add_name(std::set<std::string>& set, const std::string& name) {
  if (!name.empty() && set.size() < kept_names) set.insert(name);
}

// One clock for all lines: the wall's, or the kernel's own where nothing else is said.
std::optional<std::int64_t> time_of(const Evidence& e) {
  if (e.wall_ms) return e.wall_ms;
  if (e.boot_us) return *e.boot_us / 1000;
  return std::nullopt;
}

bool near(std::optional<std::int64_t> a, std::optional<std::int64_t> b, std::int64_t within) {
  if (!a || !b) return true;  // no time at all: order is all there is
  return std::abs(*a - *b) <= within;
}

// Of two reaches of contained errors the wider; one that is not known counts as more than one program.
xid::Scope wider(xid::Scope a, xid::Scope b) {
  const auto rank = [](xid::Scope scope) {
    return scope == xid::Scope::gpu ? 3 : scope == xid::Scope::vm ? 2 : scope == xid::Scope::unknown ? 1 : 0;
  };
  return rank(a) >= rank(b) ? a : b;
}

void absorb(Open& open, Evidence e, bool consequence) {
  auto& in = open.incident;
  if (e.counts && !consequence) ++open.tellings[{e.source, e.file}];
  open.sources.insert(e.source);
  open.vouched = open.vouched || e.vouched;
  add_name(open.tenants, e.tenant);
  if (e.pid && open.pids.size() < kept_names) open.pids.insert(*e.pid);
  if (!e.process.empty() || e.pid)
    add_name(open.processes, fmt::format("{} ({})", e.pid ? fmt::format("pid {}", *e.pid) : "no pid",
                                         e.process.empty() ? "no name" : printable(e.process, 64)));
  if (e.place && !consequence) open.places.insert(fmt::format("GPC {} TPC {}", e.place->gpc, e.place->tpc));
  if (e.xid) open.codes.insert(*e.xid);
  if (e.containment) {
    if (!open.containment) open.containment = e.containment;
    open.containment->reset = open.containment->reset || e.containment->reset;
    open.containment->drain_and_reset = open.containment->drain_and_reset || e.containment->drain_and_reset;
    open.containment->contained = open.containment->contained && e.containment->contained;
    open.containment->reach = wider(open.containment->reach, e.containment->reach);
  }
  if (e.link_asks) {
    using enum xid::LinkAsks;  // a bit that nobody explains is no reason to look away
    open.link_asks = !open.link_asks ? *e.link_asks
                     : *open.link_asks == unknown || *e.link_asks == unknown
                         ? unknown
                         : std::max(*open.link_asks, *e.link_asks);
  }
  if (e.switch_says != Severity::unknown && open.switch_says != Severity::critical)
    open.switch_says = e.switch_says;
  if (e.recovery) {
    if (*e.recovery == 0) {
      in.closed = true;
    } else {
      in.closed = false;
      open.recovery = e.recovery;
    }
  }
  if (e.link_row != nullptr && (open.link_row == nullptr || e.link_row->severity != "Non-fatal"))
    open.link_row = e.link_row;
  if (!e.words.empty() && std::ranges::find(in.notes, e.words) == in.notes.end() && in.notes.size() < 8)
    in.notes.push_back(e.words);
  if (const auto t = time_of(e)) {
    in.first_ms = in.first_ms ? std::min(*in.first_ms, *t) : *t;
    in.last_ms = in.last_ms ? std::max(*in.last_ms, *t) : *t;
    if (!consequence || !open.at_ms) open.at_ms = open.at_ms ? std::max(*open.at_ms, *t) : *t;
  }
  ++in.evidence_lines;
  if (in.evidence.size() < kept_evidence) in.evidence.push_back(std::move(e));
}

std::vector<std::string> commands_for(heal::Act act, const Incident& in) {
  const auto gpu = in.at ? bdf(*in.at) : std::string("GPU");
  const auto which = fmt::format("nvidia-smi -i {} --query-gpu=index,uuid,name --format=csv,noheader", gpu);
  switch (act) {
    case heal::Act::none:
      return {};
    case heal::Act::end_process:
      return {fmt::format(
          "nvidia-smi -i {} --query-compute-apps=pid,name --format=csv   # is it still there?", gpu)};
    case heal::Act::drain_slice:
    case heal::Act::recreate_slice:
      return {which, "bulkhead lease list", "bulkhead gpus cordon INDEX --why '" + in.id + "'"};
    case heal::Act::reset_gpu:
      return {which, "bulkhead gpus cordon INDEX --why '" + in.id + "'",
              "bulkhead lease list   # wait until nobody holds it",
              fmt::format("nvidia-smi --gpu-reset -i {}", gpu), "bulkhead gpus uncordon INDEX"};
    case heal::Act::rescan:
      return {"bulkhead gpus cordon INDEX --why '" + in.id + "'",
              fmt::format("lspci -s {} -vv   # ff everywhere: gone", gpu),
              fmt::format("echo 1 > /sys/bus/pci/devices/{}/remove; echo 1 > /sys/bus/pci/rescan", gpu),
              "reboot   # if it does not come back"};
    case heal::Act::restart_fabric_manager:
      return {"systemctl restart nvidia-fabricmanager", "nvidia-smi -q | grep -A3 Fabric"};
    case heal::Act::quarantine:
      return {which, "bulkhead gpus cordon INDEX --why '" + in.id + "'",
              "bulkhead bundle   # for the support case"};
    case heal::Act::reboot:
      return {"bulkhead gpus cordon all --why '" + in.id + "'", "reboot"};
  }
  return {};
}

heal::Act act_of_bucket(std::string_view bucket, Severity severity) {
  if (bucket == "RESTART_APP" || bucket == "XID_154_EVAL" || bucket == "CHECK_APP")
    return heal::Act::end_process;
  if (bucket == "RESET_GPU" || bucket == "WORKFLOW_XID_48" || bucket == "WORKFLOW_NVLINK_ERR" ||
      bucket == "CHECK_UVM")
    return heal::Act::reset_gpu;
  if (bucket == "RESTART_BM") return heal::Act::reboot;
  if (bucket == "RESTART_VM") return heal::Act::drain_slice;
  if (bucket == "CHECK_MECHANICALS") return heal::Act::quarantine;
  if (bucket == "CONTACT_SUPPORT" && severity == Severity::critical) return heal::Act::quarantine;
  return heal::Act::none;
}

void judge_xid(Open& open) {
  auto& in = open.incident;
  const auto id = *in.xid;
  const auto* row = xid::find(id);
  const auto where = in.at ? bdf(*in.at) : std::string("an unnamed GPU");
  const auto slice = in.gpu_instance ? fmt::format(" GPU instance {}", *in.gpu_instance) : std::string();
  if (row == nullptr) {
    in.title = fmt::format("Xid {} on {}{}: unknown to this catalogue", id, where, slice);
    in.cause =
        "NVIDIA's catalogue, as compiled into this version, has no such code. It is shown as the driver said "
        "it.";
    in.severity = Severity::unknown;
    in.blame = Blame::unknown;
    in.blame_why = "nothing is known of the code; nobody is charged";
    in.blast = Blast::nothing;
    in.blast_why = "unknown";
    in.confidence = Confidence::low;
    in.confidence_why = "the code is unknown";
    in.advice = "look for it in NVIDIA's current catalogue; open a support case if it comes again";
    in.commands = {"bulkhead bundle"};
    return;
  }
  in.title = fmt::format("Xid {} on {}{}: {}", id, where, slice, row->description);
  in.cause = row->note.empty() ? std::string(row->description) : std::string(row->note);
  in.severity = row->severity == Severity::by_text || row->severity == Severity::by_decode ? Severity::warn
                                                                                           : row->severity;
  in.immediate = row->immediate;
  in.investigate = row->investigate;
  for (const auto& claim : claims())
    if (claim.xid == id) in.disputed = fmt::format("{} - {}", claim.says, claim.found);

  switch (row->scope) {
    case xid::Scope::process:
      in.blast = Blast::process;
      break;
    case xid::Scope::vm:
      in.blast = Blast::slice;
      break;
    case xid::Scope::link:
      in.blast = Blast::partition;
      break;
    case xid::Scope::gpu:
      in.blast = Blast::gpu;
      break;
    case xid::Scope::node:
      in.blast = Blast::gpu;
      break;
    case xid::Scope::nothing:
    case xid::Scope::unknown:
      in.blast = Blast::nothing;
      break;
  }
  in.blast_why = fmt::format("by the table: {}", name_of(row->scope));
  in.remedy = act_of_bucket(row->immediate, row->severity);
  bool evidence_of_reach = false;

  if (id == 79) {
    in.remedy = heal::Act::rescan;
    in.advice =
        "read the AER and slot power logs; take the GPU off the bus and find it again; if it stays away, "
        "restart the host";
  }
  if (id == 110) {
    in.remedy = heal::Act::quarantine;
    in.advice = "a cold restart of the host: the driver's source says that a reset does not clear this fault";
  }
  if (row->category == "memory_ecc" && open.codes.contains(48) &&
      (open.codes.contains(63) || open.codes.contains(64))) {
    in.advice = "48 with 63 or 64: let running jobs end, then reset (NVIDIA: drain and reset)";
    in.remedy = heal::Act::reset_gpu;
  }
  if (open.link_row != nullptr) {
    const auto& link = *open.link_row;
    in.immediate = link.immediate;
    in.investigate = link.investigate;
    in.severity = link.severity == "Non-fatal" ? Severity::info : Severity::critical;
    in.remedy = act_of_bucket(link.immediate, in.severity);
    in.blast = link.severity == "Non-fatal" ? Blast::nothing : Blast::gpu;
    in.blast_why =
        fmt::format("decoded by NVIDIA's table: {} in {}, {}", link.severity, link.sub, link.where);
    evidence_of_reach = true;
  }
  if (id == 74 && open.link_asks == xid::LinkAsks::nothing) {
    in.severity = Severity::info, in.blast = Blast::nothing, in.remedy = heal::Act::none;
    in.blast_why = "its registers hold only bits that NVIDIA's workflow says to ignore";
    evidence_of_reach = true;
  }
  if (id == 74 && open.link_asks == xid::LinkAsks::the_other) {
    in.severity = Severity::warn, in.blast = Blast::nothing, in.remedy = heal::Act::none;
    in.blast_why = "its registers say that it is the consequence of another error";
    in.advice = "act on the Xid or SXid that came with it; if there is none, open a support case";
    evidence_of_reach = true;
  }
  if (open.containment) {
    evidence_of_reach = true;
    const auto& held = *open.containment;
    if (held.reset) {
      in.blast = Blast::gpu;
      in.remedy = heal::Act::reset_gpu;
      in.severity = Severity::critical;
      in.blast_why = "the driver printed RST: Yes";
    } else if (held.drain_and_reset) {
      in.blast = in.gpu_instance ? Blast::slice : Blast::gpu;
      in.remedy = heal::Act::reset_gpu;
      in.blast_why =
          "the driver printed D-RST: Yes: the rest runs on, the reset waits until its jobs are done";
      in.advice = "admit nobody new, let running jobs end, then reset";
    } else if (held.contained && held.reach != xid::Scope::gpu) {
      in.remedy = heal::Act::end_process;
      if (held.reach == xid::Scope::process) {
        in.blast = Blast::process;
        in.blast_why =
            "the driver printed Contained, RST: No, D-RST: No, of a unit where it ends the programs of one "
            "address "
            "space";
      } else if (held.reach == xid::Scope::vm) {
        in.blast = Blast::slice;
        in.blast_why = fmt::format(
            "the driver printed Contained, RST: No, D-RST: No, of a unit where it ends every program of one "
            "instance{}",
            in.gpu_instance ? "" : "; the line does not say of which");
      } else {
        in.blast = in.gpu_instance ? Blast::slice : Blast::process;
        in.blast_why = "the driver printed Contained, RST: No, D-RST: No";
      }
    } else {
      in.blast = Blast::gpu;
      in.remedy = heal::Act::end_process;
      in.blast_why =
          "the driver printed Uncontained, but RST: No: every job of the GPU is lost, a reset is not asked "
          "for";
    }
  }
  if (open.recovery) {
    evidence_of_reach = true;
    std::string_view means = "an action that this version does not know";
    for (const auto& recovery : xid::recoveries())
      if (recovery.value == *open.recovery) means = recovery.text;
    switch (*open.recovery) {
      case 1:
        in.blast = Blast::gpu, in.remedy = heal::Act::reset_gpu;
        break;
      case 2:
        in.blast = Blast::node, in.remedy = heal::Act::reboot;
        break;
      case 3:
        in.blast = Blast::partition, in.remedy = heal::Act::none;
        break;
      case 4:
        in.blast = Blast::gpu, in.remedy = heal::Act::reset_gpu;
        break;
      case 5:
        in.blast = Blast::node, in.remedy = heal::Act::none;
        break;
      default:
        in.blast = Blast::gpu, in.remedy = heal::Act::quarantine;
    }
    in.severity = Severity::critical;
    in.blast_why = fmt::format("the driver asks for it (Xid 154): {}", means);
    for (const auto& recovery : xid::recoveries())
      if (recovery.value == *open.recovery) in.advice = recovery.means;
  }
  if (in.closed) {
    in.remedy = heal::Act::none;
    in.advice = "the driver itself says that no recovery is needed any more (Xid 154 to None)";
  }

  // Who.
  switch (row->attribution) {
    case Attribution::channel:
      if (row->category == "user_app" || row->category == "engine" || row->category == "nvlink") {
        in.blame = Blame::application;
        in.blame_why =
            "the process named owns the channel that faulted; NVIDIA: usually the application, can be driver "
            "or hardware";
      } else {
        in.blame = Blame::innocent;
        in.blame_why = fmt::format("the process named owns the channel that was hit; the cause is {}, not it",
                                   row->category);
      }
      break;
    case Attribution::caller:
      in.blame = Blame::innocent;
      in.blame_why =
          "the process named is whoever called the driver when it noticed, often a monitor: not the cause";
      break;
    case Attribution::victim:
      in.blame = Blame::innocent;
      in.blame_why = "the process named lost its work by somebody else's fault";
      break;
    case Attribution::nobody:
      in.blame = Blame::nobody;
      in.blame_why = "the fault is the GPU's own; no process is meant";
      break;
    case Attribution::unknown:
      in.blame = Blame::unknown;
      in.blame_why = "the sources do not say what the process named is to this code; nobody is charged";
      break;
  }

  if (open.sources.size() > 1) {
    in.confidence = Confidence::high;
    in.confidence_why = "two sources tell of it";
  } else if (evidence_of_reach && open.vouched) {
    in.confidence = Confidence::high;
    in.confidence_why = "the driver's own flags are in the line";
  } else if (row->severity == Severity::unknown || row->description.starts_with("(only in")) {
    in.confidence = Confidence::low;
    in.confidence_why = "NVIDIA's catalogue names the code and says no more";
  } else if (open.vouched) {
    in.confidence = Confidence::medium;
    in.confidence_why = "a line of the kernel and NVIDIA's table";
  } else {
    in.confidence = Confidence::medium;
    in.confidence_why = "NVIDIA's table; a text file does not prove who wrote the line";
  }
}

void judge_sxid(Open& open) {
  auto& in = open.incident;
  const auto* row = xid::find_switch(*in.sxid);
  const auto where = in.at ? bdf(*in.at) : std::string("an NVSwitch");
  in.blame = Blame::nobody;
  in.blame_why = "an NVSwitch's own fault";
  in.confidence = Confidence::medium;
  in.confidence_why = "NVIDIA's Fabric Manager guide";
  const auto kind = row == nullptr ? xid::SwitchKind::unknown : row->kind;
  in.title = fmt::format("SXid {} on {}: {}", *in.sxid, where,
                         row == nullptr ? "unknown to this catalogue" : row->name);
  in.cause = row != nullptr && !row->note.empty() ? std::string(row->note) : std::string(xid::text_of(kind));
  using enum xid::SwitchKind;
  switch (kind) {
    case unknown:
      in.severity = Severity::unknown;
      in.confidence = Confidence::low;
      in.confidence_why = "known by name alone";
      break;
    case info:
    case ignore_ecc_sbe:
    case thermal_end:
      in.severity = Severity::info;
      break;
    case nonfatal_watch:
    case nonfatal_config:
    case thermal_start:
      in.severity = Severity::warn;
      break;
    case nonfatal_vm:
      in.severity = Severity::warn, in.blast = Blast::slice, in.remedy = heal::Act::drain_slice;
      break;
    case fatal_port:
      in.severity = Severity::critical, in.blast = Blast::partition, in.remedy = heal::Act::reset_gpu;
      in.advice =
          "find the GPU on that port (nvidia-smi nvlink -s, Fabric Manager's log), end what uses it, reset "
          "it";
      break;
    case fatal_switch:
    case fatal_fabric:
    case reset_all:
      in.severity = Severity::critical, in.blast = Blast::node, in.remedy = heal::Act::reboot;
      break;
  }
  in.blast_why = xid::text_of(kind);
  // What the switch printed of this very error goes before what the guide says of its number.
  const bool by_table =
      kind == fatal_port || kind == fatal_switch || kind == fatal_fabric || kind == reset_all;
  if (open.switch_says == Severity::critical && !by_table) {
    in.severity = Severity::critical, in.blast = Blast::partition, in.remedy = heal::Act::reset_gpu;
    in.blast_why = "the switch printed Fatal; the guide has the number as milder, or not at all";
    in.advice =
        "find the GPU on that port (nvidia-smi nvlink -s, Fabric Manager's log), end what uses it, reset it; "
        "if it "
        "comes again, restart the host and open a support case";
  } else if (open.switch_says == Severity::warn && by_table) {
    in.severity = Severity::warn, in.blast = Blast::nothing, in.remedy = heal::Act::none;
    in.blast_why = "the switch printed Non-fatal; the guide has the number as fatal";
    in.advice = "traffic goes on; watch whether Fatal follows";
  }
  if (open.switch_says == Severity::critical || open.switch_says == Severity::warn) {
    in.confidence = open.vouched ? Confidence::high : in.confidence;
    if (open.vouched) in.confidence_why = "the switch's own word for it is in the line";
  }
  in.immediate = "";
}

void judge_rule(Open& open) {
  auto& in = open.incident;
  const auto& rule = *open.rule;
  in.title = fmt::format("{}{}", rule.id, in.at ? " on " + bdf(*in.at) : std::string());
  in.cause = rule.cause;
  in.advice = rule.remedy;
  in.severity = rule.kind == logs::Kind::fault ? Severity::critical : Severity::warn;
  in.blame = Blame::nobody;
  in.blame_why = "a fault of the machine or its set-up";
  in.confidence = rule.how == "knowledge" ? Confidence::low : Confidence::medium;
  in.confidence_why = rule.how == "source" ? "the words stand in the vendor's source"
                      : rule.how == "report"
                          ? "the words are known from public reports"
                          : "the words are known from the kernel's source, not yet seen in a report";
  if (rule.scope == "gpu" || rule.scope == "nvlink" || rule.scope == "pcie" || rule.scope == "gpu_or_vm")
    in.blast = Blast::gpu;
  if (rule.scope == "nvlink_partition") in.blast = Blast::partition;
  if (rule.scope == "node" || rule.scope == "node_or_container" || rule.scope == "gpu_or_node")
    in.blast = Blast::node;
  if (rule.scope == "process" || rule.scope == "container") in.blast = Blast::process;
  if (rule.scope == "vm" || rule.scope == "vm_or_container") in.blast = Blast::slice;
  in.blast_why = fmt::format("by the rule: {}", rule.scope);
  if (rule.id == "nvrm.fallen_off" || rule.id == "nvrm.fallen_off_probe" || rule.id == "pcie.link_down")
    in.remedy = heal::Act::rescan;
  if (rule.id.starts_with("nvrm.init_why")) in.severity = Severity::critical;
  if (rule.id == "nvrm.rminit" || rule.id == "pci.d3cold" || rule.id == "pci.not_ready" ||
      rule.id == "nvrm.probe_failed")
    in.remedy = heal::Act::quarantine;
  if (rule.id == "fm.unit_failed" || rule.id == "cuda.802" || rule.id == "fm.multicast_gpu")
    in.remedy = heal::Act::restart_fabric_manager;
  if (in.closed) {
    in.remedy = heal::Act::none;
    in.advice = "the Fabric Manager was started after it: nothing, unless it fails again";
  }
  if (rule.id == "nvrm.nccl_segv")
    in.severity = Severity::warn, in.blame = Blame::unknown,
    in.blame_why = "a crash inside NCCL; links and network may be the cause";
}

// Rules of PCI and IOMMU speak of any device: they matter where the device is a GPU or a switch.
bool needs_known_device(const logs::Rule& rule) {
  return rule.id.starts_with("pci.") || rule.id.starts_with("pcie.") || rule.id.starts_with("aer.") ||
         rule.id.starts_with("iommu.dmar") || rule.id.starts_with("iommu.amd");
}
// Rules that tell of the same fault of one GPU: a lost one.
bool of_the_bus(std::string_view id) {
  return id == "nvrm.fallen_off" || id == "nvrm.fallen_off_probe" || id == "pcie.link_down" ||
         id == "pci.d3cold" || id == "pci.not_ready" || id.starts_with("aer.");
}

// The Fabric Manager did not run: over once it does.
bool ends_with_a_start(std::string_view id) {
  return id == "fm.unit_failed" || id == "fm.topology_mismatch" || id == "fm.config_value";
}

int gravity(const Incident& in) {
  if (in.closed) return 0;
  switch (in.severity) {
    case Severity::critical:
      return 4;
    case Severity::warn:
      return 3;
    case Severity::unknown:
      return 2;
    default:
      return 1;
  }
}

}  // namespace

Evidence from(logs::Hit&& hit, std::string_view file) {
  Evidence e;
  e.file = std::string(file);
  e.number = hit.number;
  e.line = std::move(hit.line);
  e.vouched = hit.vouched;
  e.forged = hit.forged;
  e.program = std::move(hit.program);
  e.wall_ms = hit.wall_ms;
  e.boot_us = hit.boot_us;
  e.rule = hit.rule;
  if (hit.xid) {
    const auto& line = *hit.xid;
    e.at = line.gpu;
    e.xid = line.id;
    e.gpu_instance = line.gpu_instance;
    e.pid = line.pid;
    if (line.name != "<unknown>") e.process = std::string(line.name);
    e.message = std::string(line.message);
    e.previous = line.previous;
    if (auto held = xid::containment(line)) {
      held->unit = {};
      e.containment = held;
    }
    if (const auto change = xid::recovery(line)) e.recovery = change->to;
    if (line.id == 13) e.place = xid::place(line);
    if (const auto fault = xid::link_fault(line)) {
      e.link = fault->link;
      e.link_row = fault->row;
      if (fault->row == nullptr)
        e.words =
            fmt::format("{} is not in NVIDIA's decode table; follow Xid 154", printable(fault->sub, 32));
    }
    if (line.id == 74) {
      e.words = xid::nvlink4_words(line);
      e.link_asks = xid::nvlink4_asks(line);
    }
  } else if (hit.sxid) {
    e.at = hit.sxid->at;
    e.sxid = hit.sxid->id;
    e.counts = hit.sxid->counts;
    e.message = std::string(hit.sxid->message);
    e.switch_says = hit.sxid->severity == "Fatal"         ? Severity::critical
                    : hit.sxid->severity == "Non-fatal"   ? Severity::warn
                    : hit.sxid->severity == "Correctable" ? Severity::info
                                                          : Severity::unknown;
    if (hit.sxid->link) e.link = static_cast<int>(*hit.sxid->link);
  } else if (hit.rule != nullptr) {
    if (const auto address = PciAddress::parse(
            hit.field("bdf").ends_with('.') ? hit.field("bdf").substr(0, hit.field("bdf").size() - 1)
            : hit.field("bdf").find('.') == std::string_view::npos && !hit.field("bdf").empty()
                ? std::string(hit.field("bdf")) + ".0"
                : std::string(hit.field("bdf")));
        address.ok())
      e.at = *address;
    if (const auto pid = parse_u64(hit.field("pid")); pid && *pid <= UINT32_MAX)
      e.pid = static_cast<std::uint32_t>(*pid);
    e.process = std::string(hit.field("comm"));
    if (const auto code = parse_u64(hit.field("sxid")); code && *code <= 99'999) {
      if (hit.rule->id == "fm.fatal" || hit.rule->id == "fm.nonfatal") e.sxid = static_cast<unsigned>(*code);
    }
  }
  return e;
}

Evidence event(Source source, PciAddress gpu, unsigned id, std::optional<unsigned> gpu_instance,
               std::int64_t wall_ms) {
  Evidence e;
  e.source = source;
  e.vouched = true;
  e.at = gpu;
  e.xid = id;
  e.gpu_instance = gpu_instance;
  e.wall_ms = wall_ms;
  e.file = name_of(source);
  e.line = fmt::format("{}: Xid {} on {}", name_of(source), id, gpu.str());
  return e;
}

namespace {

// "Graphics Exception: channel 0x1e, Class ..." of driver 580, "ChID 0008, Class ..." of earlier ones.
bool tells_channel(std::string_view line) {
  const auto at = line.find("Graphics Exception: ");
  if (at == line.npos) return false;
  const auto rest = line.substr(at + 20);
  return rest.starts_with("channel ") || rest.starts_with("ChID ");
}

// One Xid 13 is told in several lines, and only the last names the process ("Graphics SM Warp Exception on
// ...", "ESR ...", then "pid=7, name=x, ... channel"; NVML tells of it once: seen on an H100, 580.159.04).
// Those before are its details, and its process's. Where several share the GPU the driver may put a
// neighbour's pid to those, and the owner's to the line of the channel alone (seen there too:
// docs/twin-against-real.md).
void gather_details(std::vector<Evidence>& evidence) {
  constexpr std::uint64_t most_lines = 512;  // of one event: two for each SM that saw it
  std::map<PciAddress, std::size_t> named;   // the next line of this GPU that names the process
  for (auto i = evidence.size(); i-- > 0;) {
    auto& e = evidence[i];
    if (e.rule != nullptr && e.rule->id == "nvrm.bar_invalid" && !e.at && i + 1 < evidence.size()) {
      const auto& next = evidence[i + 1];
      if (next.rule != nullptr && next.rule->id == "nvrm.bar_where" && !next.forged && next.file == e.file &&
          next.number == e.number + 1)
        e.at = next.at;
    }
    if (e.source != Source::log || e.xid != 13u || !e.at || e.forged) continue;
    const PciAddress slot{e.at->domain, e.at->bus, e.at->device, 0};
    const auto found = named.find(slot);
    const bool of_channel = e.pid && tells_channel(e.line);
    if (e.pid && (of_channel || found == named.end() || evidence[found->second].pid == e.pid ||
                  !tells_channel(evidence[found->second].line))) {
      named[slot] = i;
      continue;
    }
    if (found == named.end()) continue;
    const auto& whole = evidence[found->second];
    if (whole.file != e.file || whole.number < e.number || whole.number - e.number > most_lines ||
        !near(time_of(whole), time_of(e), same_event_ms))
      continue;
    e.counts = false;
    e.pid = whole.pid;
    e.process = whole.process;
    e.tenant = whole.tenant;
    if (!e.gpu_instance) e.gpu_instance = whole.gpu_instance;
  }
}

// The driver's events name no process: each is put behind the one kernel line of the same event, whatever
// came first, and takes from it whose it is. What finds no line stays where it was.
void pair_events(std::vector<Evidence>& evidence) {
  if (std::ranges::none_of(evidence, [](const Evidence& e) { return e.source != Source::log; })) return;
  using Key = std::tuple<PciAddress, unsigned>;
  const auto key_of = [](const Evidence& e) {
    return Key{PciAddress{e.at->domain, e.at->bus, e.at->device, 0}, *e.xid};
  };
  std::map<Key, std::vector<std::size_t>> lines;
  for (std::size_t i = 0; i < evidence.size(); ++i)
    if (const auto& e = evidence[i];
        e.source == Source::log && e.xid && e.at && e.wall_ms && !e.forged && e.counts)
      lines[key_of(e)].push_back(i);
  constexpr auto alone = static_cast<std::size_t>(-1);
  constexpr std::size_t ahead = 256;  // lines that are looked at for one event
  std::vector<std::size_t> line_of(evidence.size(), alone);
  for (const auto source : {Source::nvml, Source::tracepoint}) {
    std::map<Key, std::size_t> begun;
    std::vector<bool> taken(evidence.size(), false);
    for (std::size_t i = 0; i < evidence.size(); ++i) {
      const auto& e = evidence[i];
      if (e.source != source || !e.xid || !e.at || !e.wall_ms) continue;
      const auto found = lines.find(key_of(e));
      if (found == lines.end()) continue;
      const auto& candidates = found->second;
      auto& from = begun[found->first];
      while (from < candidates.size() &&
             (taken[candidates[from]] || *evidence[candidates[from]].wall_ms < *e.wall_ms - same_event_ms))
        ++from;
      for (auto at = from; at < candidates.size() && at < from + ahead; ++at) {
        const auto& line = evidence[candidates[at]];
        if (*line.wall_ms > *e.wall_ms + same_event_ms) break;
        if (taken[candidates[at]] ||
            (e.gpu_instance && line.gpu_instance && *e.gpu_instance != *line.gpu_instance))
          continue;
        taken[candidates[at]] = true;
        line_of[i] = candidates[at];
        break;
      }
    }
  }
  std::vector<std::vector<std::size_t>> behind(evidence.size());
  for (std::size_t i = 0; i < evidence.size(); ++i)
    if (line_of[i] != alone) behind[line_of[i]].push_back(i);
  std::vector<Evidence> out;
  out.reserve(evidence.size());
  for (std::size_t i = 0; i < evidence.size(); ++i) {
    if (line_of[i] != alone) continue;
    const auto at = out.size();
    out.push_back(std::move(evidence[i]));
    for (const auto other : behind[i]) {
      auto& e = evidence[other];
      if (!out[at].gpu_instance) out[at].gpu_instance = e.gpu_instance;
      e.gpu_instance = out[at].gpu_instance;
      e.tenant = out[at].tenant;
      e.pid = out[at].pid;
      e.process = out[at].process;
      e.link = out[at].link;
      e.previous = out[at].previous;
      e.recovery = out[at].recovery;
      out.push_back(std::move(e));
    }
  }
  evidence = std::move(out);
}

// Who stands behind a name: the tenant of a lease, whichever lease it was, or the user, job, pod or container
// of a cgroup. One tenant that faults in two places of its own must not look like two that share a broken
// GPU.
std::string party_of(const std::string& name) {
  if (name.starts_with("tenant ")) return name.substr(0, name.rfind(", lease "));
  if (!name.starts_with('/')) return name;
  std::string out;
  for (const auto part : split(std::string_view(name).substr(1), '/')) {
    out += '/';
    out += part;
    const bool user = part.starts_with("user-") && part.ends_with(".slice");
    const bool pod =
        part.starts_with("pod") || (part.starts_with("kubepods") && part.find("-pod") != part.npos);
    if (user || pod || part.starts_with("uid_") || part.starts_with("job_") || part.ends_with(".scope"))
      break;
  }
  return out;
}

// How many there are for certain. A process whose lease was not found is known by its cgroup alone: it may be
// one of the same tenant, so that names of both kinds are not added up.
std::size_t parties(const std::set<std::string>& whos) {
  const auto leases = static_cast<std::size_t>(
      std::ranges::count_if(whos, [](const std::string& who) { return who.starts_with("tenant "); }));
  return std::max(leases, whos.size() - leases);
}

}  // namespace

Diagnosis diagnose(std::vector<Evidence> evidence) {
  Diagnosis out;
  out.evidence = evidence.size();
  // Files keep their order; times of one clock order across files.
  const bool timed = std::ranges::all_of(evidence, [](const Evidence& e) { return e.wall_ms.has_value(); }) ||
                     std::ranges::all_of(evidence, [](const Evidence& e) { return e.boot_us && !e.wall_ms; });
  if (timed) std::ranges::stable_sort(evidence, {}, [](const Evidence& e) { return *time_of(e); });

  gather_details(evidence);
  pair_events(evidence);

  std::set<PciAddress> known;  // GPUs and switches that the lines themselves name
  for (const auto& e : evidence) {
    if (!e.at || e.forged) continue;
    const bool ours =
        e.xid || e.sxid ||
        (e.rule != nullptr && (e.rule->id.starts_with("nvrm.") || e.rule->id == "context.gpu" ||
                               e.rule->id.starts_with("vfio.") || e.rule->id == "iommu.direct_map")) ||
        e.line.find("nvidia 0") != std::string::npos || e.line.find("vfio-pci ") != std::string::npos;
    if (ours) known.insert(PciAddress{e.at->domain, e.at->bus, e.at->device, 0});
  }
  const auto is_known = [&](const PciAddress& at) {
    return known.contains(PciAddress{at.domain, at.bus, at.device, 0});
  };

  std::vector<Open> open;
  // The newest incidents by what they are about, so that a storm costs no more than its lines.
  std::unordered_map<std::string, std::size_t> newest;
  std::map<PciAddress, std::size_t> last_on;  // of this GPU: a cause that others may follow
  std::map<PciAddress, std::size_t> memory_on, bus_on;
  std::unordered_map<std::uint32_t, std::optional<std::int64_t>> oom;  // pid -> when
  std::map<std::string, std::uint64_t> disbelieved;
  std::uint64_t elsewhere = 0;
  std::optional<Evidence>
      unexplained;  // why a GPU did not start, of which the log does not say that it did not
  std::uint64_t explained_by_oom = 0;
  std::uint64_t left_out = 0;
  std::optional<PciAddress> last_context;
  std::uint64_t last_context_number = 0;

  const auto begin = [&](const std::string& key, Evidence&& e) -> std::optional<std::size_t> {
    if (open.size() >= most_incidents) {
      ++left_out;
      return std::nullopt;
    }
    Open one;
    one.incident.at = e.at;
    one.incident.gpu_instance = e.gpu_instance;
    one.incident.xid = e.xid;
    one.incident.sxid = e.xid ? std::nullopt : e.sxid;
    if (!e.xid && !e.sxid && e.rule != nullptr) {
      one.rule = e.rule;
      one.incident.rule = std::string(e.rule->id);
    }
    absorb(one, std::move(e), false);
    open.push_back(std::move(one));
    newest[key] = open.size() - 1;
    return open.size() - 1;
  };

  for (auto& e : evidence) {
    if (e.forged) {
      ++disbelieved[e.program.empty() ? "a program" : printable(e.program, 64)];
      continue;
    }
    const auto when = time_of(e);
    if (e.rule != nullptr && e.rule->kind == logs::Kind::context) {
      if (e.at) {
        last_context = e.at;
        last_context_number = e.number;
      }
      continue;
    }
    if (e.rule != nullptr && e.rule->id == "oom.tenant") {
      if (e.pid) oom[*e.pid] = when;
      continue;
    }
    // A line about no GPU by itself, right after the one that names it.
    if (e.rule != nullptr && !e.at && e.rule->id == "nvrm.fallen_off_probe" && last_context &&
        e.number - last_context_number <= 4)
      e.at = last_context;
    const auto slot =
        e.at ? std::optional(PciAddress{e.at->domain, e.at->bus, e.at->device, 0}) : std::nullopt;

    if (e.xid) {
      const auto id = *e.xid;
      if (id == 45 && e.pid && oom.contains(*e.pid) && near(oom[*e.pid], when, follows_ms)) {
        ++explained_by_oom;
        continue;
      }
      // What follows a cause on the same GPU.
      if (const auto at = slot ? last_on.find(*slot) : last_on.end(); at != last_on.end()) {
        auto& cause = open[at->second];
        const bool named = e.previous && cause.codes.contains(*e.previous);
        const bool same_process = !e.pid || cause.pids.empty() || cause.pids.contains(*e.pid) || id == 45;
        const auto window = id == 154 ? 60'000 : named ? memory_ms : follows_ms;
        if (is_follower(id) && near(cause.at_ms, when, window) && (named || (same_process && !e.previous)) &&
            (memory_rank(id) == 0 || memory_rank(*cause.incident.xid) > 0)) {
          absorb(cause, std::move(e), true);
          continue;
        }
      }
      if (id == 162 || (id == 154 && e.recovery && *e.recovery == 0)) {
        // Ends what is open there.
        for (auto& other : open)
          if (other.incident.at && slot && same_slot(*other.incident.at, *slot) &&
              (id == 154 ? other.incident.xid.has_value() : other.incident.xid == 163u))
            other.incident.closed = true;
        continue;
      }
      if (memory_rank(id) > 0 && slot) {
        if (const auto at = memory_on.find(*slot);
            at != memory_on.end() && near(open[at->second].at_ms, when, memory_ms)) {
          auto& other = open[at->second];
          if (memory_rank(id) > memory_rank(*other.incident.xid)) other.incident.xid = id;
          absorb(other, std::move(e), false);
          continue;
        }
      }
      if (id == 79 && slot) {
        if (const auto at = bus_on.find(*slot);
            at != bus_on.end() && near(open[at->second].at_ms, when, 10'000)) {
          auto& other = open[at->second];
          other.incident.xid = id;
          last_on[*slot] = at->second;
          absorb(other, std::move(e), false);
          continue;
        }
      }
      const auto key = fmt::format("x{}@{}/{}/{}/{}", id, slot ? bdf(*slot) : "-",
                                   e.gpu_instance ? static_cast<int>(*e.gpu_instance) : -1, e.tenant,
                                   e.link ? *e.link : -1);
      auto at = newest.find(key);
      // NVML knows no process and no link, the kernel's line often no instance: the same event all the same.
      if (at == newest.end() && e.source != Source::log && slot)
        if (const auto last = last_on.find(*slot); last != last_on.end() &&
                                                   open[last->second].incident.xid == id &&
                                                   near(open[last->second].at_ms, when, 2'000)) {
          if (e.gpu_instance && !open[last->second].incident.gpu_instance)
            open[last->second].incident.gpu_instance = e.gpu_instance;
          absorb(open[last->second], std::move(e), false);
          continue;
        }
      std::optional<std::size_t> index;
      if (at != newest.end() && near(open[at->second].at_ms, when, same_burst_ms) &&
          !open[at->second].incident.closed) {
        index = at->second;
        absorb(open[*index], std::move(e), false);
      } else {
        index = begin(key, std::move(e));
      }
      if (!index || !slot) continue;
      if (!is_follower(id)) last_on[*slot] = *index;
      if (memory_rank(id) > 0) memory_on[*slot] = *index;
      if (id == 79) bus_on[*slot] = *index;
      continue;
    }
    if (e.sxid) {
      if (*e.sxid == 10005) {
        for (auto& other : open)
          if (other.incident.sxid == 10004u && other.incident.at == e.at) other.incident.closed = true;
        continue;
      }
      const auto key = fmt::format("s{}@{}/{}", *e.sxid, slot ? bdf(*slot) : "-", e.rule != nullptr ? -1 : 0);
      // Details of one error carry no link: they belong to the newest of the same number.
      if (auto at = newest.find(key);
          at != newest.end() && (!e.counts || near(open[at->second].at_ms, when, same_burst_ms)))
        absorb(open[at->second], std::move(e), false);
      else
        (void)begin(key, std::move(e));
      continue;
    }
    if (e.rule == nullptr) continue;
    if (e.rule->id.starts_with("nvrm.init_why") && !unexplained) unexplained = e;
    if (e.rule->id == "fm.ok" || e.rule->id == "fm.started") {
      for (auto& other : open)
        if (ends_with_a_start(other.incident.rule)) other.incident.closed = true;
      continue;
    }
    if (e.rule->kind != logs::Kind::fault && e.rule->kind != logs::Kind::config) continue;
    if (needs_known_device(*e.rule) && !(e.at && is_known(*e.at))) {
      ++elsewhere;
      continue;
    }
    if (of_the_bus(e.rule->id) && slot) {
      if (const auto at = bus_on.find(*slot);
          at != bus_on.end() && near(open[at->second].at_ms, when, 10'000)) {
        if (e.rule->id.starts_with("aer.")) {
          const auto note =
              fmt::format("PCIe said so too ({}): the path, not the process, is at fault", e.rule->id);
          auto& notes = open[at->second].incident.notes;
          if (std::ranges::find(notes, note) == notes.end()) notes.push_back(note);
        }
        absorb(open[at->second], std::move(e), false);
        continue;
      }
    }
    const bool bus = of_the_bus(e.rule->id);
    const auto key = fmt::format("{}@{}", e.rule->id, slot ? bdf(*slot) : "-");
    std::optional<std::size_t> index;
    if (auto at = newest.find(key); at != newest.end() && near(open[at->second].at_ms, when, same_burst_ms) &&
                                    !open[at->second].incident.closed) {
      index = at->second;
      absorb(open[*index], std::move(e), false);
    } else {
      index = begin(key, std::move(e));
    }
    if (bus && index && slot) bus_on[*slot] = *index;
  }
  if (unexplained &&
      std::ranges::none_of(open, [](const Open& one) { return one.incident.rule == "nvrm.rminit"; }))
    (void)begin("nvrm.init_why@-", std::move(*unexplained));

  for (auto& one : open) {
    auto& in = one.incident;
    for (const auto& [source, count] : one.tellings) in.count = std::max(in.count, count);
    in.count = std::max<std::uint64_t>(in.count, 1);
    in.tenants.assign(one.tenants.begin(), one.tenants.end());
    in.processes.assign(one.processes.begin(), one.processes.end());
    if (in.xid) {
      judge_xid(one);
    } else if (in.sxid) {
      judge_sxid(one);
    } else {
      judge_rule(one);
    }
    if (one.tellings.size() > 1)
      in.notes.push_back(fmt::format("told by {} sources, counted once", one.tellings.size()));
  }

  // Repeats: one tenant on many GPUs is an application, many on one GPU are hardware.
  struct Seen {
    std::set<std::string> gpus, whos;
    std::vector<std::size_t> where;
  };
  std::map<std::pair<unsigned, std::string>, Seen> by_who, by_gpu;
  std::map<std::pair<std::string, std::string>, Seen> by_place;
  for (std::size_t i = 0; i < open.size(); ++i) {
    const auto& one = open[i];
    const auto& in = one.incident;
    if (!in.xid || !in.at) continue;
    const auto* row = xid::find(*in.xid);
    if (row == nullptr || row->attribution != Attribution::channel || row->category != "user_app" ||
        *in.xid == 43)
      continue;
    const auto gpu = bdf(*in.at);
    for (const auto& name : in.tenants) {
      const auto who = party_of(name);
      auto& mine = by_who[{*in.xid, who}];
      mine.gpus.insert(gpu);
      mine.where.push_back(i);
      auto& gpus = by_gpu[{*in.xid, gpu}];
      gpus.whos.insert(who);
      gpus.where.push_back(i);
      for (const auto& place : one.places) {
        auto& spot = by_place[{gpu, place}];
        spot.whos.insert(who);
        spot.where.push_back(i);
      }
    }
  }
  for (const auto& [key, seen] : by_who)
    if (seen.gpus.size() > 1)
      for (const auto i : seen.where)
        if (parties(by_gpu[{key.first, bdf(*open[i].incident.at)}].whos) == 1)
          open[i].incident.notes.push_back(
              fmt::format("the same tenant on {} GPUs: its application", seen.gpus.size()));
  const auto to_hardware = [&](const Seen& seen, const std::string& why) {
    for (const auto i : seen.where) {
      auto& in = open[i].incident;
      if (in.blame == Blame::hardware) continue;
      in.blame = Blame::hardware;
      in.blame_why = why;
      in.severity = Severity::critical;
      in.advice =
          "drain the GPU and run NVIDIA's diagnostic (dcgmi diag -r 3); the field diagnostic if it passes";
      in.remedy = heal::Act::quarantine;
    }
  };
  for (const auto& [key, seen] : by_place)
    if (const auto count = parties(seen.whos); count > 1)
      to_hardware(seen, fmt::format("{} tenants faulted at {} of the same GPU", count, key.second));
  for (const auto& [key, seen] : by_gpu)
    if (const auto count = parties(seen.whos); count > 1)
      to_hardware(seen, fmt::format("{} tenants had the same fault on this GPU", count));

  // NVLink: both ends, and whole fabrics.
  std::set<std::string> linked;
  for (const auto& one : open)
    if (one.incident.xid && *one.incident.xid >= 144 && *one.incident.xid <= 150 && one.incident.at)
      linked.insert(bdf(*one.incident.at));
  for (auto& one : open) {
    auto& in = one.incident;
    if (in.xid && *in.xid >= 144 && *in.xid <= 150 && linked.size() >= 3) {
      if (in.severity == Severity::critical) in.blast = Blast::partition;
      in.notes.push_back(
          fmt::format("{} GPUs report NVLink faults: look at the fabric, not at one GPU", linked.size()));
    }
    if (in.xid != 74u) continue;
    for (const auto& other : open)
      if (other.incident.sxid == 20034u && near(other.at_ms, one.at_ms, 30'000)) {
        in.notes.push_back("the switch saw the link fail too (SXid 20034): one fault, told from both ends");
        break;
      }
  }

  std::map<std::string, unsigned> ids;
  for (auto& one : open) {
    auto& in = one.incident;
    if (in.blame == Blame::application && in.tenants.size() == 1) in.charged = in.tenants.front();
    const auto name = in.xid    ? fmt::format("xid-{}", *in.xid)
                      : in.sxid ? fmt::format("sxid-{}", *in.sxid)
                                : in.rule;
    const auto base = name + (in.at ? "@" + bdf(*in.at) : "");
    in.id = fmt::format("{}#{}", base, ++ids[base]);
    in.commands = in.commands.empty() ? commands_for(in.remedy, in) : in.commands;
    out.incidents.push_back(std::move(in));
  }
  std::ranges::stable_sort(out.incidents, std::greater<>(), gravity);

  for (const auto& [who, count] : disbelieved)
    out.notes.push_back(fmt::format(
        "{} lines with the kernel's words came from {}, not from the kernel: not believed", count, who));
  if (elsewhere > 0)
    out.notes.push_back(
        fmt::format("{} lines about PCI devices that are no GPU or NVSwitch here: not shown", elsewhere));
  if (explained_by_oom > 0)
    out.notes.push_back(fmt::format(
        "{} lines of Xid 45 follow the kernel ending the process for want of host memory: the GPU is healthy",
        explained_by_oom));
  if (left_out > 0)
    out.notes.push_back(fmt::format("{} events beyond {} incidents: not shown", left_out, most_incidents));
  return out;
}

std::string_view name_of(Source source) {
  constexpr std::array<std::string_view, 3> names = {"log", "tracepoint", "nvml"};
  return names.at(static_cast<std::size_t>(source));
}
std::string_view name_of(Blast blast) {
  constexpr std::array<std::string_view, 6> names = {"nothing", "process",   "slice",
                                                     "gpu",     "partition", "node"};
  return names.at(static_cast<std::size_t>(blast));
}
std::string_view name_of(Blame blame) {
  constexpr std::array<std::string_view, 5> names = {"nobody", "application", "hardware", "innocent",
                                                     "unknown"};
  return names.at(static_cast<std::size_t>(blame));
}
std::string_view name_of(Confidence confidence) {
  constexpr std::array<std::string_view, 3> names = {"low", "medium", "high"};
  return names.at(static_cast<std::size_t>(confidence));
}

}  // namespace bulkhead::diagnose
