// The node file: desired state of one host, parsed once at the boundary. Parsing reports every mistake at
// once, with line, column and a suggestion; unknown keys are mistakes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/ids.hpp"
#include "base/json.hpp"
#include "base/units.hpp"
#include "core/yaml/yaml.hpp"

namespace bulkhead::spec {

using yaml::Mistake;
using yaml::render;

enum class Mode {
  mig,          // MIG instances
  share,        // software slices
  exclusive,    // the whole GPU
  passthrough,  // the whole GPU, for a virtual machine
};
std::string_view name_of(Mode mode);

struct PciId {
  std::uint16_t vendor = 0, device = 0;
  friend auto operator<=>(const PciId&, const PciId&) = default;
};

// Which GPUs a rule is for. All given keys must match; `all` matches every GPU.
struct Select {
  bool all = false;
  std::vector<unsigned> index = {};  // NVML indices
  std::vector<Uuid> uuid = {};
  std::vector<PciAddress> pci = {};
  std::vector<std::string> model = {};  // shell patterns over the model name: "*H100*"
  std::vector<PciId> pci_id = {};       // PCI vendor and device id, as lspci -n prints them: "10de:2330"
};

// One line of a MIG layout. The profile stays a name: only the GPU's own geometry can resolve it.
struct Slice {
  std::string profile = {};
  std::optional<unsigned> at = {};  // start in memory slices, when the placement matters
  std::vector<std::string> compute =
      {};                         // compute instances, "1c" ...; empty: one that fills the GPU instance
  unsigned line = 0, column = 0;  // where it was written
};

struct ClockLock {
  Megahertz low = {}, high = {};
  friend bool operator==(const ClockLock&, const ClockLock&) = default;
};

struct GpuRule {
  Select select = {};
  Mode mode = Mode::exclusive;
  std::vector<Slice> layout = {};  // only with Mode::mig
  bool dynamic = false;            // only with Mode::mig: no layout, its instances come and go with leases
  std::optional<Milliwatts> power_limit = {};
  std::optional<ClockLock> clocks = {};
  std::optional<bool> persistence = {};
  unsigned line = 0;
};

struct FabricManager {
  std::string unit = "nvidia-fabricmanager.service";
  std::optional<unsigned> port = {};  // TCP, for the probe; the daemon's own default is 6666
};

struct Unit {
  std::string name = {};
  bool enabled = true, active = true;
};

struct ModprobeFile {
  std::string name = {};  // file below /etc/modprobe.d, ends in .conf
  std::vector<std::string> lines = {};
};

struct Vfio {  // who may open the device files of VFIO groups
  std::string owner = "root";
  unsigned mode = 0600;
};

struct HostRule {
  std::vector<std::string> kernel_args = {};
  std::optional<std::string> cpu_governor = {};
  std::optional<FabricManager> fabric_manager = {};
  std::vector<Unit> units = {};
  std::vector<ModprobeFile> modprobe = {};
  std::optional<Vfio> vfio = {};
};

// Any PCI device, GPU or not.
enum class DevicePurpose {
  leave,        // the host's as it is; with `vfs`, so are its virtual functions
  passthrough,  // for virtual machines; with `vfs`, the virtual functions are
  host,         // back to its own driver
};
struct DeviceRule {
  std::vector<PciAddress> pci = {};
  DevicePurpose purpose = DevicePurpose::leave;
  std::optional<unsigned> vfs = {};  // SR-IOV: how many virtual functions
  unsigned line = 0;
};

// What is done about heat, power and broken parts while the daemon runs; docs/design/protection.md.
struct Protect {
  enum class Mode { observe, act };
  enum class Action { none, hold, power, clocks, pause, drain, fence };  // mildest first
  struct Rack {
    Milliwatts power = {};
    unsigned nodes = 1;  // that share it, each with the same part
    friend bool operator==(const Rack&, const Rack&) = default;
  };
  struct Ramp {
    Milliwatts per_second = {};
    std::optional<Milliwatts> burst = {};  // at once; empty: one second of it
    friend bool operator==(const Ramp&, const Ramp&) = default;
  };
  Mode mode = Mode::observe;
  unsigned ceiling = 85;                      // C, of the GPU
  unsigned guard = 5;                         // K, kept of the part's own margin
  Action harshest = Action::pause;            // never more than this
  std::optional<Milliwatts> node_power = {};  // what the node may draw
  Milliwatts rest_power = {};                 // what the node draws beside its GPUs, where no BMC says
  std::optional<Rack> rack = {};
  std::optional<Ramp> ramp = {};
  std::optional<Milliwatts> cooling = {};  // heat that is taken away from this node
  friend bool operator==(const Protect&, const Protect&) = default;
};
// What is done about faults while the daemon runs; docs/design/healing.md.
struct Heal {
  enum class Mode { observe, suggest, act };
  Mode mode = Mode::suggest;
  unsigned most_an_hour = 4;    // acts of the whole host without a person
  unsigned keep_healthy = 1;    // GPUs that must still serve
  unsigned relapse_hours = 24;  // the same fault again within this time: the act before did not help
  friend bool operator==(const Heal&, const Heal&) = default;
};
std::string_view name_of(Heal::Mode mode);

std::string_view name_of(Protect::Mode mode);
std::string_view name_of(Protect::Action action);

struct NodeFile {
  std::string name = {};  // metadata.name, optional
  std::vector<GpuRule> gpus = {};
  std::vector<DeviceRule> devices = {};
  HostRule host = {};
  std::optional<Protect> protect = {};
  std::optional<Heal> heal = {};
};

using Parsed = std::variant<NodeFile, std::vector<Mistake>>;

// At most limits::node_file_bytes. Aliases and anchors are refused (a small file may not become a large one).
Parsed parse(std::string_view yaml);

// Writes a node file that parses to the same value: for import and export.
std::string to_yaml(const NodeFile& node);

// JSON Schema, draft-07, of the node file.
Json schema();

// NVIDIA mig-parted's "version: v1, mig-configs: {name: [...]}": one node file for each named configuration.
struct Imported {
  std::string name = {};
  NodeFile node = {};
  std::vector<std::string> remarks = {};  // what could not be carried over, in words
};
std::variant<std::vector<Imported>, std::vector<Mistake>> import_mig_parted(std::string_view yaml);

}  // namespace bulkhead::spec
