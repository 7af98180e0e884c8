// From lines to incidents. Several sources tell of one fault (kernel log, tracepoint, NVML), one fault is
// told in several lines, and a process named in a line may be innocent: this folder joins, counts, and says
// who is to blame only where NVIDIA's catalogue says that the line names the culprit. Pure: lines in,
// incidents out.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.hpp"
#include "base/json.hpp"
#include "core/heal/heal.hpp"
#include "core/logs/logs.hpp"
#include "core/xid/xid.hpp"

namespace bulkhead::diagnose {

enum class Source : std::uint8_t { log, tracepoint, nvml };
std::string_view name_of(Source source);

// One telling of one event.
struct Evidence {
  Source source = Source::log;
  std::string file = {};     // where it was read
  std::uint64_t number = 0;  // of the line
  std::string line = {};     // as it was
  bool vouched = false;      // of a form that only the kernel or the driver fills
  bool forged = false;
  std::string program = {};
  std::optional<std::int64_t> wall_ms = {};
  std::optional<std::int64_t> boot_us = {};

  std::optional<PciAddress> at = {};  // GPU, switch or other device
  std::optional<unsigned> gpu_instance = {};
  std::optional<unsigned> xid = {};
  std::optional<unsigned> sxid = {};
  bool counts = true;  // false: further detail of an SXid or of an Xid 13
  const logs::Rule* rule = nullptr;
  std::optional<std::uint32_t> pid = {};
  std::string process = {};
  std::string message = {};
  std::optional<unsigned> previous = {};
  std::optional<xid::Containment> containment = {};  // its `unit` is not kept
  std::optional<unsigned> recovery = {};             // Xid 154: the new action
  std::optional<xid::Place> place = {};
  std::optional<int> link = {};
  const xid::LinkRow* link_row = nullptr;
  std::string words = {};                              // registers in words; the cause an errno stands for
  std::optional<xid::LinkAsks> link_asks = {};         // what the registers of an Xid 74 ask for
  xid::Severity switch_says = xid::Severity::unknown;  // of an SXid: critical (Fatal), warn (Non-fatal), info

  std::string tenant = {};  // who the process was, where a live host could say; empty: not known
  std::string slice = {};
};

Evidence from(logs::Hit&& hit, std::string_view file);
// An event of NVML (no process is known) or of the driver's tracepoint.
Evidence event(Source source, PciAddress gpu, unsigned id, std::optional<unsigned> gpu_instance,
               std::int64_t wall_ms);

// How far it reaches, by evidence where there is any: the driver's own flags over the table.
enum class Blast : std::uint8_t { nothing, process, slice, gpu, partition, node };
std::string_view name_of(Blast blast);

// What the process in the lines is to the fault.
enum class Blame : std::uint8_t {
  nobody,       // the hardware's or the driver's own; nobody is charged
  application,  // the process named did it
  hardware,     // the process named ran into it: others did too, or the same place on the chip again
  innocent,     // it called the driver at that moment, or lost its work by another's fault
  unknown,
};
std::string_view name_of(Blame blame);
enum class Confidence : std::uint8_t { low, medium, high };
std::string_view name_of(Confidence confidence);

struct Incident {
  std::string id = {};     // "xid-31@0000:3b:00.0#1": stable for the same input
  std::string title = {};  // one line
  std::string cause = {};
  xid::Severity severity = xid::Severity::unknown;  // info, warn, critical or unknown
  std::optional<PciAddress> at = {};
  std::optional<unsigned> gpu_instance = {};
  std::optional<unsigned> xid = {};
  std::optional<unsigned> sxid = {};
  std::string rule = {};

  Blame blame = Blame::unknown;
  std::string blame_why = {};
  std::string charged = {};                               // the tenant, or empty: nobody is
  std::vector<std::string> tenants = {}, processes = {};  // those in the lines, whatever they are to it

  Blast blast = Blast::nothing;
  std::string blast_why = {};
  Confidence confidence = Confidence::low;
  std::string confidence_why = {};
  heal::Act remedy = heal::Act::none;
  std::string advice = {};
  std::vector<std::string> commands = {};
  std::string immediate = {}, investigate = {};  // NVIDIA's buckets
  std::string disputed = {};                     // what guides say and NVIDIA does not

  std::uint64_t count = 0;  // events, each once however many sources tell of it
  std::optional<std::int64_t> first_ms = {}, last_ms = {};
  bool closed = false;                  // the driver, or the switch, said that it is over
  std::vector<Evidence> evidence = {};  // the first of each kind, at most 24
  std::uint64_t evidence_lines = 0;     // of all
  std::vector<std::string> notes = {};
};

struct Diagnosis {
  std::vector<Incident> incidents = {};  // gravest first
  std::vector<std::string> notes = {};   // lines not believed, losses, what was left out
  std::uint64_t evidence = 0;
};
Diagnosis diagnose(std::vector<Evidence> evidence);

Json to_json(const Incident& incident);
Json to_json(const Diagnosis& diagnosis);

// ---- one code or line, explained
struct Explanation {
  std::string title = {};
  std::vector<std::pair<std::string, std::string>> facts = {};  // "NVIDIA says", "RESTART_APP: ..."
  bool known = true;
};
Explanation explain_xid(unsigned id);
Explanation explain_sxid(unsigned id);
Explanation explain_line(const logs::Matcher& matcher, std::string_view line, WallTime now);

// What guides say and the vendor's own material does not bear out; both are told.
struct Claim {
  std::string_view words = {};  // as they go around
  unsigned xid = 0;             // 0: of a message
  std::string_view says = {};
  std::string_view found = {};
};
std::span<const Claim> claims();

}  // namespace bulkhead::diagnose
