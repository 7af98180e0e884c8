// Is this host fit for slicing its GPUs? A check is one row of a table: what it reads, why it matters, and a
// pure function from what was read to a judgement. The evidence is gathered once, elsewhere (engine/examine),
// so every verdict can be repeated from the same value. A verdict rests on what the machine shows, never on
// the kernel's command line alone: "DMAR: IOMMU enabled" is printed on machines that have no IOMMU.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.hpp"
#include "base/reading.hpp"
#include "core/inventory/inventory.hpp"

namespace bulkhead::doctor {

// ---- what was read

// How a path is looked at.
enum class How {
  text,   // the whole file, any bytes
  tail,   // the last 256 KiB of a log
  names,  // the names in a directory
  link,   // where a symbolic link points
  node,   // mode, owner and whether it is a device
};

// One thing to look at. The path is absolute as the host sees it; a component may hold '*', which never
// matches '/'.
struct Look {
  How how = How::text;
  std::string_view path = {};
};

// Whether a path is one that such a pattern names.
bool path_matches(std::string_view pattern, std::string_view path);

struct Node {
  unsigned mode = 0;  // permission bits
  unsigned uid = 0, gid = 0;
  bool device = false;  // a character device; false for a plain file, as in a copied tree
  friend bool operator==(const Node&, const Node&) = default;
};

// Who asks. Groups by number and, where the host's group file names them, by name.
struct Caller {
  unsigned uid = 0;
  std::string name = {};
  std::vector<unsigned> gids = {};
  std::vector<std::string> groups = {};
};

struct KernelLog {
  std::string source = {};  // "/dev/kmsg", "/var/log/kern.log"
  std::string text = {};
};

// Everything a check may know. Keys are paths as the host sees them. A path that was looked at and could not
// be read has a Reading that says why.
struct Evidence {
  inventory::Host host = {};
  Caller caller = {};
  Reading<KernelLog> kernel_log = {};
  std::map<std::string, Reading<std::string>> texts = {};
  std::map<std::string, Reading<std::vector<std::string>>> names = {};
  std::map<std::string, Reading<std::string>> links = {};
  std::map<std::string, Reading<Node>> nodes = {};
  std::map<std::uint16_t, Reading<bool>> ports = {};  // TCP ports of this host: does somebody listen?

  // Missing, with a reason, when the path was never looked at.
  const Reading<std::string>& text(const std::string& path) const;
  const Reading<std::vector<std::string>>& list(const std::string& path) const;
  const Reading<std::string>& link(const std::string& path) const;
  const Reading<Node>& node(const std::string& path) const;
  // The readable texts whose path matches a pattern, in path order.
  std::vector<std::pair<std::string, std::string>> matching(std::string_view pattern) const;
};

// ---- what it means

enum class Verdict { ok, unknown, warn, fail };  // in order of badness
std::string_view name_of(Verdict verdict);

struct Purposes {
  bool mig = true, passthrough = true, share = true;
  bool meets(const Purposes& other) const {
    return (mig && other.mig) || (passthrough && other.passthrough) || (share && other.share);
  }
};

// A place and the words read there.
struct Source {
  std::string where = {};
  std::string words = {};
  friend bool operator==(const Source&, const Source&) = default;
};

// A check's answer.
struct Judgement {
  Verdict verdict = Verdict::unknown;
  std::string says = {};  // one sentence: what is so
  std::vector<Source> evidence = {};
  std::vector<std::string> mend =
      {};                     // commands to paste; a line starting with '#' is for hands (firmware setup)
  std::string waits_on = {};  // id of the check to be mended first, when that is why this is unknown
  bool ask_host = false;
};

struct Check {
  std::string_view id = {};  // "iommu.kernel"
  std::string_view title = {};
  std::vector<std::string_view> requirements = {};  // rows of the requirements, "R8"
  Purposes purposes = {};
  std::vector<Look> reads = {};  // beyond the Host; several checks may name the same path
  std::string_view why = {};     // why it matters
  Judgement (*judge)(const Evidence&) = nullptr;
};

struct Finding {
  std::string id = {}, title = {};
  Verdict verdict = Verdict::unknown;
  std::string says = {};
  std::vector<Source> evidence = {};
  std::string why = {};
  std::vector<std::string> mend = {};
  std::string waits_on = {};
  bool ask_host = false;
  std::vector<std::string> requirements = {};
};

// The table, in the order of the story: platform, boot, PCI, driver, fabric, MIG, access, heat, host.
const std::vector<Check>& checks();

// One finding for each check that serves one of the purposes, in table order.
std::vector<Finding> examine(const Evidence& evidence, const Purposes& purposes = {});

// Worst first, table order among equals.
void sort_worst_first(std::vector<Finding>& findings);

// Set when the host is itself a virtual machine: how that is known. Questions about firmware and slots then
// belong to the host below, and what cannot be seen is `unknown` instead of `fail`.
std::optional<Source> virtual_machine(const Evidence& evidence);

// The TCP ports Fabric Manager is configured to listen on (its own default 6666), to be probed.
std::vector<std::uint16_t> fabric_ports(const Evidence& evidence);

Json to_json(const Finding& finding);

}  // namespace bulkhead::doctor
