// What NVIDIA's driver says of a fault: Xids of GPUs, SXids of NVSwitches. The catalogue is three tables of
// rows (rows.cpp, switch_rows.cpp, link_rows.cpp); the lines are parsed by hand, because a tenant chooses the
// name of the process in the middle of them.
//
// Sources named in the rows:
//   S1  NVIDIA's Xid catalogue workbook, https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html
//   S2  open-gpu-kernel-modules 595.45.04, src/common/sdk/nvidia/inc/nverror.h
//   S3  the same, src/nvidia/src/kernel/gpu/rc/kernel_rc.c, krcReportXid_IMPL: the format of the line
//   S4  the same, arch/ampere/kern_gpu_error_cont_ga100.c, arch/blackwell/kern_gpu_error_cont_gb100.c
//   S5  Fabric Manager User Guide, appendix of SXids
//   S6  the same modules, src/common/nvswitch/interface/ctrl_dev_nvswitch.h, kernel/inc/common_nvswitch.h
//   S8  the same modules, ctrl2080gpu.h (recovery actions); nvml.h
//   S9  kubernetes-sigs/dra-driver-nvidia-gpu issues 689 and 904: the line and the NVML event under MIG
//   S10 the same modules, osinit.c osHandleGpuLost; arch/hopper/kern_gpu_gh100.c: SEC_FAULT
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "base/ids.hpp"

namespace bulkhead::xid {

enum class Severity : std::uint8_t { unknown, info, warn, critical, by_text, by_decode };
enum class Scope : std::uint8_t { unknown, nothing, process, vm, link, gpu, node };

// Whom the process named in the line is to the fault.
enum class Attribution : std::uint8_t {
  unknown,
  nobody,   // the GPU's own; no process is meant
  channel,  // the process whose channel faulted: usually its own doing
  caller,   // whoever happened to call the driver when it noticed: often a monitor, often innocent
  victim,   // lost its channel by somebody else's fault
};
std::string_view name_of(Severity severity);
std::string_view name_of(Scope scope);
std::string_view name_of(Attribution attribution);

struct Row {
  unsigned id = 0;
  std::string_view mnemonic = {};     // in nverror.h
  std::string_view description = {};  // in the catalogue
  std::string_view boards = {};       // those that use it, by the catalogue; empty: none, or not said
  std::string_view immediate = {};    // NVIDIA's bucket: what to do now; empty: not said
  std::string_view investigate = {};  // NVIDIA's bucket: what to look into
  std::string_view category = {};     // memory_ecc, nvlink, user_app ...; empty: unused or unknown
  Severity severity = Severity::unknown;
  Scope scope = Scope::unknown;
  Attribution attribution = Attribution::unknown;
  std::string_view note = {};
  bool told_by_154 = false;       // newer drivers say with Xid 154 what to do about it
  std::string_view example = {};  // a line as the driver prints it, where one is at hand
  std::string_view sources = {};
};
std::span<const Row> catalogue();  // ordered by id
const Row* find(unsigned id);      // nullptr: unknown to this catalogue
struct Bucket {
  std::string_view name = {};  // "RESTART_APP"
  std::string_view says = {};
};
std::span<const Bucket> buckets();
std::string_view bucket_text(std::string_view name);  // empty: no such bucket

// The line of Xid 154, NVML field 230: what the driver itself wants done.
struct Recovery {
  unsigned value = 0;
  std::string_view text = {};
  std::string_view means = {};
};
std::span<const Recovery> recoveries();

// ---- lines
// The body of a kernel message, without time stamps: "NVRM: Xid (PCI:0000:3b:00): 31, pid=7, name=x, ...".
// Views are into the line given. Anything that is not exactly such a line is nullopt; the words must stand at
// the beginning, so that no name of a process or a cgroup in another message can pass for one.
struct Line {
  PciAddress gpu = {};
  std::optional<unsigned> gpu_instance = {};
  std::optional<unsigned> compute_instance = {};
  unsigned id = 0;
  std::optional<std::uint32_t> pid = {};  // of the host; the driver prints <unknown> where it has none
  std::string_view name = {};             // chosen by the tenant: for showing, never for deciding
  std::string_view message = {};
  std::optional<unsigned> previous = {};  // "caused by previous Xid N"
};
std::optional<Line> parse(std::string_view body);

// "Contained: CE User Channel (0x9). RST: No, D-RST: No", the end of a line of Xid 94 or 95. Read from the
// end, where a process's name (15 bytes at most) cannot reach.
struct Containment {
  bool contained = false;
  std::string_view unit = {};
  bool reset = false;            // RST: the GPU must be reset
  bool drain_and_reset = false;  // D-RST: when its jobs are done
  // Whose channels the driver tears down, by S4's table of units: process (those of one address space), vm
  // (all of one MIG instance or virtual function), gpu (all); unknown: a contained error of a unit not in the
  // table.
  Scope reach = Scope::unknown;
};
std::optional<Containment> containment(const Line& line);

struct RecoveryChange {
  unsigned from = 0;
  unsigned to = 0;
  std::string_view to_text = {};
};
std::optional<RecoveryChange> recovery(const Line& line);

// "(GPC 1, TPC 2, SM 0)" in an Xid 13: where on the chip.
struct Place {
  unsigned gpc = 0;
  unsigned tpc = 0;
  std::optional<unsigned> sm = {};
};
std::optional<Place> place(const Line& line);

struct SwitchLine {
  unsigned nvswitch = 0;
  PciAddress at = {};
  unsigned id = 0;
  bool counts = false;             // the first of the up to four lines of one error; others are detail
  std::string_view severity = {};  // "Fatal", "Non-fatal", "Correctable"; empty in details
  std::optional<unsigned> link = {};
  std::string_view message = {};
};
std::optional<SwitchLine> parse_switch(std::string_view body);

// ---- NVSwitch
enum class SwitchKind : std::uint8_t {
  unknown,
  info,
  ignore_ecc_sbe,   // corrected
  nonfatal_watch,   // a marginal link, if it repeats
  nonfatal_config,  // partitions misconfigured, or a reach outside one
  nonfatal_vm,      // the virtual machine that hit it starts again
  thermal_start,
  thermal_end,
  fatal_port,    // a GPU's port: that GPU; a trunk port: every partition whose traffic crosses it
  fatal_switch,  // this switch
  fatal_fabric,  // every GPU and switch of the host
  reset_all,
};
std::string_view name_of(SwitchKind kind);
std::string_view text_of(SwitchKind kind);
struct SwitchRow {
  unsigned id = 0;
  std::string_view name = {};
  SwitchKind kind = SwitchKind::unknown;
  std::string_view note = {};
};
std::span<const SwitchRow> switch_catalogue();  // ordered by id
const SwitchRow* find_switch(unsigned id);

// ---- NVLink
struct LinkRow {
  unsigned xid = 0;
  std::string_view sub = {};
  std::string_view intr_v1 = {};
  std::string_view intr_v2 = {};
  std::int64_t status = -1;
  std::string_view immediate = {};
  std::string_view investigate = {};
  std::string_view severity = {};
  std::string_view where = {};  // HW, SW, FW
};
std::span<const LinkRow> link_catalogue();

// "NETIR_LINK_EVT Fatal XC0 i0 Link 08 (0x004505c6 0x00000000 ...)": Xid 144 to 150.
struct LinkFault {
  std::string_view sub = {};
  std::string_view severity = {};
  int link = -1;  // -1: no one link
  std::uint32_t intr_info = 0;
  std::uint32_t error_status = 0;
  const LinkRow* row = nullptr;  // nullptr: the table does not have it; follow Xid 154
};
std::optional<LinkFault> link_fault(const Line& line);

// The seven registers of Xid 74 (A100, H100), in words: "link 3: hardware or mechanical (register 1 bit 8)".
// Empty: no registers in the line, or nothing set that NVIDIA explains.
std::string nvlink4_words(const Line& line);
// What these registers ask for, by the same workflow.
enum class LinkAsks : std::uint8_t {
  unknown,    // no registers in the line, or a bit that NVIDIA does not explain: report it
  nothing,    // every bit set can be ignored
  the_other,  // a consequence: act on the error it came with
  something,  // hardware, cabling or a report
};
LinkAsks nvlink4_asks(const Line& line);

}  // namespace bulkhead::xid
