#include "twin/profile/profile.hpp"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <set>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/ids.hpp"
#include "base/text.hpp"
#include "twin/profile/embedded.hpp"

namespace bulkhead::twin {

namespace {

// Where a profile's files come from: the binary, or a directory.
struct Source {
  std::filesystem::path directory = {};  // empty: the embedded files
  Result<std::string> text(const std::string& name) const {
    if (!directory.empty()) {
      if (auto own = read_file(directory / name); own.ok()) return own;
    }
    for (const auto& file : embedded_files()) {
      if (file.name == name) return file.content;
    }
    return Error(Errc::not_found, fmt::format("no file {} among the twin's profiles", printable(name)),
                 "see: bulkhead twin list");
  }
};

// A mapping that must be read completely: a key nobody asked for is a spelling mistake, reported with its
// line. The first mistake wins; readers go on with zero so that one function reads like a list of fields.
class Map {
 public:
  Map(YAML::Node node, std::string where, std::optional<Error>& error)
      : node_(std::move(node)), where_(std::move(where)), error_(error) {
    if (!node_.IsMap()) complain(node_, "should be a mapping");
  }
  Map(const Map&) = delete;
  Map& operator=(const Map&) = delete;
  ~Map() {
    if (error_ || !node_.IsMap()) return;
    std::vector<std::string_view> known(asked_.begin(), asked_.end());
    for (const auto& entry : node_) {
      const auto key = entry.first.Scalar();
      if (key == "source" || asked_.contains(key)) continue;
      const auto meant = closest(key, known);
      complain(entry.first, meant.empty()
                                ? fmt::format("unknown key {}", printable(key))
                                : fmt::format("unknown key {}; did you mean {}?", printable(key), meant));
      return;
    }
  }

  bool has(const std::string& key) {
    asked_.insert(key);
    return node_.IsMap() && node_[key].IsDefined() && !node_[key].IsNull();
  }
  YAML::Node node(const std::string& key) {
    if (has(key)) return node_[key];
    complain(node_, fmt::format("{} is missing", key));
    return YAML::Node();
  }
  std::string text(const std::string& key) {
    const auto found = node(key);
    if (!found.IsDefined() || found.IsNull()) return {};
    if (!found.IsScalar()) {
      complain(found, fmt::format("{} should be text", key));
      return {};
    }
    // The one word for "nobody read it": NVML answers "not supported" for an empty text.
    return found.Scalar() == "unknown" ? std::string() : found.Scalar();
  }
  std::string text_or(const std::string& key, std::string otherwise) {
    return has(key) ? text(key) : std::move(otherwise);
  }
  template <class T = std::uint32_t>
  T number(const std::string& key) {
    return as_number<T>(node(key), key);
  }
  template <class T = std::uint32_t>
  T number_or(const std::string& key, T otherwise) {
    return has(key) ? number<T>(key) : otherwise;
  }
  bool flag_or(const std::string& key, bool otherwise) {
    if (!has(key)) return otherwise;
    bool value = false;
    if (!YAML::convert<bool>::decode(node_[key], value))
      complain(node_[key], fmt::format("{} should be true or false", key));
    return value;
  }
  template <class T = std::uint32_t>
  std::vector<T> numbers(const std::string& key) {
    std::vector<T> out;
    const auto list = node(key);
    if (!list.IsDefined() || !list.IsSequence()) {
      complain(list, fmt::format("{} should be a list", key));
      return out;
    }
    for (const auto& item : list) out.push_back(as_number<T>(item, key));
    return out;
  }
  std::vector<std::string> texts(const std::string& key) {
    std::vector<std::string> out;
    for (const auto& item : node(key)) out.push_back(item.Scalar());
    return out;
  }
  Map map(const std::string& key) { return Map(node(key), where_, error_); }

  template <class T>
  T as_number(const YAML::Node& value, const std::string& key) {
    if (!value.IsDefined() || !value.IsScalar()) {
      complain(value, fmt::format("{} should be a number", key));
      return T{};
    }
    const std::string& raw = value.Scalar();
    if constexpr (std::is_floating_point_v<T>) {
      T out{};
      if (YAML::convert<T>::decode(value, out) && std::isfinite(out)) return out;
    } else {
      const bool hex = raw.starts_with("0x");
      if (const auto wide = hex ? parse_u64(std::string_view(raw).substr(2), 16) : parse_u64(raw)) {
        if (*wide <= static_cast<std::uint64_t>(std::numeric_limits<T>::max())) return static_cast<T>(*wide);
      } else if constexpr (std::is_signed_v<T>) {
        if (const auto negative = parse_i64(raw); negative && *negative >= std::numeric_limits<T>::min()) {
          return static_cast<T>(*negative);
        }
      }
    }
    complain(value, fmt::format("{}: {} is no number that fits", key, printable(raw)));
    return T{};
  }

  void complain(const YAML::Node& at, const std::string& what) {
    if (error_) return;
    const int line = at.IsDefined() ? at.Mark().line + 1 : node_.Mark().line + 1;
    error_.emplace(Errc::invalid, fmt::format("{}:{}: {}", where_, line, what));
  }

 private:
  YAML::Node node_;
  std::string where_;
  std::optional<Error>& error_;
  std::set<std::string> asked_ = {};
};

Result<YAML::Node> parse(const Source& source, const std::string& name) {
  BH_TRY(const auto text, source.text(name));
  try {
    return YAML::Load(text);
  } catch (const YAML::Exception& e) {
    return Error(Errc::invalid, fmt::format("{}: {}", name, printable(e.what())));
  }
}

struct ChipFile {
  Chip chip = {};
  std::vector<BarSpec> bars = {};
  unsigned vfs_total = 0;
  std::uint32_t class_code = 0;
  std::uint8_t revision = 0;
};

// The value of a recorded field, as the bytes of nvmlValue_t.
std::uint64_t field_bits(Map& map, const YAML::Node& value, std::uint32_t type) {
  if (value.IsNull()) return 0;
  if (type == 0) {  // NVML_VALUE_TYPE_DOUBLE
    const auto number = map.as_number<double>(value, "fields");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &number, sizeof bits);
    return bits;
  }
  if (type == 5) {  // NVML_VALUE_TYPE_SIGNED_INT: the low four bytes
    return static_cast<std::uint32_t>(map.as_number<std::int32_t>(value, "fields"));
  }
  return map.as_number<std::uint64_t>(value, "fields");
}

Result<ChipFile> load_chip(const Source& source, const std::string& name) {
  const std::string file = fmt::format("chips/{}.yaml", name);
  BH_TRY(const auto root, parse(source, file));
  ChipFile out;
  Chip& chip = out.chip;
  std::optional<Error> error;
  {
    Map map(root, file, error);
    if (map.text("chip") != name) map.complain(root, "chip should be the file's own name");
    chip.model.set(map.text("model"));
    chip.architecture = map.number("architecture");
    chip.brand = map.number("brand");
    if (const auto cc = map.numbers("compute_capability"); cc.size() == 2) {
      chip.cc_major = cc[0];
      chip.cc_minor = cc[1];
    } else {
      map.complain(root, "compute_capability should be two numbers");
    }
    chip.cores = map.number("cores");
    {
      auto pci = map.map("pci");
      chip.pci_device = pci.number("device");
      chip.pci_subsystem = pci.number("subsystem");
      out.class_code = pci.number("class");
      out.revision = pci.number<std::uint8_t>("revision");
    }
    for (const auto& row : map.node("bars")) {
      Map bar(row, file, error);
      out.bars.push_back({.index = bar.number("index"),
                          .size = bar.number<std::uint64_t>("size"),
                          .flags = bar.number<std::uint64_t>("flags")});
    }
    if (map.has("sriov")) out.vfs_total = map.map("sriov").number("total_vfs");
    {
      auto memory = map.map("memory");
      chip.memory_bytes = memory.number<std::uint64_t>("total_bytes");
      chip.reserved_bytes = memory.number<std::uint64_t>("reserved_bytes");
      chip.bar1_bytes = memory.number<std::uint64_t>("bar1_bytes");
      chip.memory_bus_bits = memory.number("bus_bits");
      chip.row_remap_banks = memory.number("row_remap_banks");
      chip.memory_temperature = memory.flag_or("temperature", false) ? 1 : 0;
    }
    {
      auto pcie = map.map("pcie");
      chip.pcie_gen = pcie.number("generation");
      chip.pcie_width = pcie.number("width");
    }
    chip.vbios.set(map.text("vbios"));
    {
      auto inforom = map.map("inforom");
      chip.inforom_image.set(inforom.text("image"));
      chip.inforom_oem.set(inforom.text("oem"));
      chip.inforom_ecc.set(inforom.text("ecc"));
      chip.inforom_power.set(inforom.text("power"));
    }
    chip.board_part.set(map.text("board_part"));
    chip.gpu_part.set(map.text("gpu_part"));
    {
      auto power = map.map("power_mw");
      chip.power_idle_mw = power.number("idle");
      chip.power_default_mw = power.number("default");
      chip.power_min_mw = power.number("min");
      chip.power_max_mw = power.number("max");
    }
    {
      auto limits = map.map("thresholds_c");
      chip.threshold_shutdown = limits.number<std::int32_t>("shutdown");
      chip.threshold_slowdown = limits.number<std::int32_t>("slowdown");
      chip.threshold_mem_max = limits.number<std::int32_t>("memory_max");
      chip.threshold_gpu_max = limits.number<std::int32_t>("gpu_max");
      chip.tlimit_zero_at = limits.number<std::int32_t>("margin_zero_at");
    }
    {
      auto thermal = map.map("thermal");
      chip.r_die_sink = thermal.number<double>("r_die_sink");
      chip.r_sink_air = thermal.number<double>("r_sink_air");
      chip.c_die = thermal.number<double>("c_die");
      chip.c_sink = thermal.number<double>("c_sink");
      if (!(chip.r_die_sink > 0 && chip.r_sink_air > 0 && chip.c_die > 0 && chip.c_sink > 0)) {
        map.complain(root, "thermal: resistances and capacities must be positive");
      }
    }
    {
      auto clocks = map.map("clocks_mhz");
      {
        auto graphics = clocks.map("graphics");
        chip.clock_graphics_max = graphics.number("max");
        chip.clock_graphics_min = graphics.number("min");
        chip.clock_graphics_step = graphics.number("step");
        chip.clock_graphics_idle = graphics.number("idle");
        if (chip.clock_graphics_step == 0) map.complain(root, "clocks_mhz: graphics: step must not be 0");
      }
      const auto memory = clocks.numbers("memory");
      if (memory.empty() || memory.size() > 4)
        map.complain(root, "clocks_mhz: memory should be one to four clocks");
      for (const auto mhz : memory) {
        if (chip.clock_memory_count < 4) chip.clock_memory[chip.clock_memory_count++] = mhz;
      }
      chip.clock_video_max = clocks.number("video_max");
    }
    {
      auto nvlink = map.map("nvlink");
      chip.nvlinks = std::min<std::uint32_t>(nvlink.number("links"), max_nvlinks);
      chip.nvlink_version = nvlink.number("version");
    }
    chip.fan_count = map.number("fans");
    {
      auto mig = map.map("mig");
      const auto activation = mig.text("activation");
      if (activation == "immediate") {
        chip.mig = MigActivation::immediate;
      } else if (activation == "needs_reset") {
        chip.mig = MigActivation::needs_reset;
      } else if (activation == "unsupported") {
        chip.mig = MigActivation::unsupported;
      } else {
        mig.complain(root, "mig: activation should be immediate, needs_reset or unsupported");
      }
      if (chip.mig != MigActivation::unsupported) {
        const auto policy = mig.text("placement_policy");
        if (policy == "most_pairs_left") {
          chip.placement_policy = PlacementPolicy::most_pairs_left;
        } else if (policy == "most_ids_left") {
          chip.placement_policy = PlacementPolicy::most_ids_left;
        } else {
          mig.complain(root, "mig: placement_policy should be most_pairs_left or most_ids_left");
        }
        chip.memory_slices = mig.number("memory_slices");
        chip.compute_slices = mig.number("compute_slices");
        for (const auto& row : mig.node("profiles")) {
          Map profile(row, file, error);
          if (chip.profile_count == max_profiles) {
            profile.complain(row, "more MIG profiles than the twin has room for");
            break;
          }
          MigProfile& p = chip.profiles[chip.profile_count++];
          p.name.set(profile.text("name"));
          p.nvml_enum = profile.number("nvml_enum");
          p.id = profile.number("id");
          p.slices = profile.number("slices");
          p.max_instances = profile.number("max");
          p.memory_mib = profile.number("memory_mib");
          p.sm = profile.number("sm");
          p.ce = profile.number("ce");
          p.dec = profile.number("dec");
          p.enc = profile.number("enc");
          p.jpg = profile.number("jpg");
          p.ofa = profile.number("ofa");
          p.size = profile.number("size");
          for (const auto start : profile.numbers("starts")) {
            if (p.start_count == 16 || start + p.size > chip.memory_slices) {
              profile.complain(row, fmt::format("a placement of {} outside the chip", p.name.view()));
              break;
            }
            p.starts[p.start_count++] = start;
          }
        }
      }
    }
    for (const auto& row : map.node("fields")) {
      if (!row.IsSequence() || row.size() != 4 || chip.field_count == max_fields) {
        map.complain(row, "fields: each should be [field, nvmlReturn, value type, value]");
        break;
      }
      FieldAnswer& field = chip.fields[chip.field_count++];
      field.id = map.as_number<std::uint32_t>(row[0], "fields");
      field.nvml_return = map.as_number<std::uint32_t>(row[1], "fields");
      field.value_type = map.as_number<std::uint32_t>(row[2], "fields");
      field.bits = field_bits(map, row[3], field.value_type);
    }
  }
  if (error) return std::move(*error);
  return out;
}

Result<std::map<std::string, PciFunction>> load_devices(const Source& source) {
  BH_TRY(const auto root, parse(source, "devices.yaml"));
  std::map<std::string, PciFunction> out;
  std::optional<Error> error;
  {
    Map map(root, "devices.yaml", error);
    for (const auto& entry : map.node("devices")) {
      Map row(entry.second, "devices.yaml", error);
      PciFunction f;
      f.type = entry.first.Scalar();
      f.vendor = row.number<std::uint16_t>("vendor");
      f.device_id = row.number<std::uint16_t>("device");
      f.subsystem_vendor = row.number_or<std::uint16_t>("subsystem_vendor", 0);
      f.subsystem_device = row.number_or<std::uint16_t>("subsystem", 0);
      f.class_code = row.number("class");
      f.revision = row.number<std::uint8_t>("revision");
      f.driver = row.text_or("driver", "");
      f.is_bridge = row.flag_or("bridge", false);
      f.reset_method = row.text_or("reset", "");
      f.vfs_total = row.number_or("vfs", 0U);
      if (row.has("attributes")) {
        for (const auto& attribute : row.node("attributes"))
          f.attributes.emplace_back(attribute.first.Scalar(), attribute.second.Scalar());
      }
      if (row.has("link")) {
        const auto link = row.numbers("link");
        if (link.size() == 2) {
          f.link_generation = f.link_generation_now = link[0];
          f.link_width = f.link_width_now = link[1];
        }
      }
      if (row.has("bars")) {
        for (const auto& bar_row : row.node("bars")) {
          Map bar(bar_row, "devices.yaml", error);
          f.bars.push_back({.index = bar.number("index"),
                            .size = bar.number<std::uint64_t>("size"),
                            .flags = bar.number<std::uint64_t>("flags")});
        }
      }
      out.emplace(f.type, std::move(f));
    }
  }
  if (error) return std::move(*error);
  return out;
}

// SplitMix64: identities that look random, from a seed, the same on every machine.
struct Random {
  std::uint64_t state;
  std::uint64_t next() {
    std::uint64_t z = (state += 0x9e3779b97f4a7c15U);
    z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27U)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31U);
  }
  std::string uuid() {
    const auto high = next();
    const auto low = next();
    return fmt::format("{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}", high >> 32U, (high >> 16U) & 0xffffU,
                       high & 0xfffU, ((low >> 48U) & 0x3fffU) | 0x8000U, low & 0xffffffffffffU);
  }
};

std::uint64_t hash_of(std::string_view text) {
  std::uint64_t h = 0xcbf29ce484222325U;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
  return h;
}

void read_host(Map& map, const std::string& file, Host& host, std::optional<Error>& error) {
  host.hostname = map.text("hostname");
  {
    auto os = map.map("os");
    host.os_id = os.text("id");
    host.os_version = os.text("version");
    host.os_codename = os.text("codename");
    host.os_pretty = os.text("pretty");
  }
  {
    auto kernel = map.map("kernel");
    host.kernel_release = kernel.text("release");
    host.kernel_version = kernel.text("version");
  }
  host.cmdline = map.text("cmdline");
  {
    auto cpu = map.map("cpu");
    host.cpu.vendor = cpu.text("vendor");
    host.cpu.model = cpu.text("model");
    host.cpu.family = cpu.number("family");
    host.cpu.model_number = cpu.number("model_number");
    host.cpu.stepping = cpu.number("stepping");
    host.cpu.microcode = cpu.text("microcode");
    host.cpu.sockets = cpu.number("sockets");
    host.cpu.cores_per_socket = cpu.number("cores_per_socket");
    host.cpu.threads_per_core = cpu.number("threads_per_core");
    host.cpu.mhz_base = cpu.number("mhz_base");
    host.cpu.mhz_min = cpu.number("mhz_min");
    host.cpu.mhz_max = cpu.number("mhz_max");
    host.cpu.cpufreq_driver = cpu.text("cpufreq_driver");
    host.cpu.governors = cpu.texts("governors");
    host.cpu.governor = cpu.text("governor");
    host.cpu.flags = cpu.text("flags");
    auto caches = cpu.map("caches_kib");
    host.cpu.l1d_kib = caches.number("l1d");
    host.cpu.l1i_kib = caches.number("l1i");
    host.cpu.l2_kib = caches.number("l2");
    host.cpu.l3_kib = caches.number("l3");
    const auto total =
        static_cast<std::uint64_t>(host.cpu.sockets) * host.cpu.cores_per_socket * host.cpu.threads_per_core;
    if (total == 0 || total > 1024) cpu.complain(YAML::Node(), "cpu: 1 to 1024 CPUs");
  }
  for (const auto gib : map.numbers<std::uint64_t>("numa_memory_gib"))
    host.numa_memory_kib.push_back(gib << 20U);
  if (host.numa_memory_kib.empty()) map.complain(YAML::Node(), "numa_memory_gib: at least one node");
  host.virtual_machine = map.flag_or("virtual_machine", false);
  {
    auto dmi = map.map("dmi");
    {
      auto bios = dmi.map("bios");
      host.bios_vendor = bios.text("vendor");
      host.bios_version = bios.text("version");
      host.bios_date = bios.text("date");
    }
    {
      auto system = dmi.map("system");
      host.system_vendor = system.text("vendor");
      host.product_name = system.text("product");
      host.product_version = system.text("version");
    }
    {
      auto board = dmi.map("board");
      host.board_vendor = board.text("vendor");
      host.board_name = board.text("name");
    }
    host.chassis_type = dmi.number("chassis_type");
  }
  {
    auto iommu = map.map("iommu");
    host.iommu = iommu.text("kind");
    if (host.iommu == "none") host.iommu.clear();
    host.iommu_type = iommu.text_or("type", "");
    host.interrupt_remapping = iommu.flag_or("interrupt_remapping", false);
  }
  for (const auto& row : map.node("modules")) {
    Map module(row, file, error);
    KernelModule m{.name = module.text("name"),
                   .size = module.number<std::uint64_t>("size"),
                   .used = module.number("used")};
    if (module.has("by")) m.by = module.texts("by");
    host.modules.push_back(std::move(m));
  }
  for (const auto& entry : map.node("nvidia_parameters"))
    host.nvidia_parameters.emplace_back(entry.first.Scalar(), entry.second.Scalar());
}

Result<Machine> build(const Source& source, const std::string& file, std::string text, std::uint64_t seed) {
  YAML::Node root;
  try {
    root = YAML::Load(text);
  } catch (const YAML::Exception& e) {
    return Error(Errc::invalid, fmt::format("{}: {}", file, printable(e.what())));
  }
  BH_TRY(const auto devices, load_devices(source));
  Machine machine;
  machine.yaml = std::move(text);
  machine.state = std::make_unique<State>();
  std::memset(static_cast<void*>(machine.state.get()), 0, sizeof(State));
  State& s = *machine.state;
  Host& host = machine.host;
  std::map<std::string, std::pair<std::uint32_t, ChipFile>> chips;
  std::map<std::string, int> behind;  // address -> index in host.pci
  std::optional<Error> error;
  {
    Map map(root, file, error);
    const auto name = map.text("profile");
    map.text("summary");
    s.version = state_version;
    s.profile.set(name);
    s.seed = seed;
    Random random{seed ^ hash_of(name)};
    s.boot_id.set(random.uuid());
    s.realtime = 1;
    s.next_event = 1;
    s.driver_loaded = 1;
    {
      auto driver = map.map("driver");
      s.driver_version.set(driver.text("version"));
      s.nvml_version.set(driver.text("nvml"));
      s.cuda_version = driver.number("cuda");
      host.nvidia_module_license = driver.text("license");
    }
    s.caps_major = map.number("caps_major");
    const auto virtualization = map.text("virtualization");
    if (virtualization != "none" && virtualization != "passthrough")
      map.complain(root, "virtualization should be none or passthrough");
    s.virtualization = virtualization == "passthrough" ? 1 : 0;  // NVML_GPU_VIRTUALIZATION_MODE_PASSTHROUGH
    const auto inlet = map.number<double>("inlet_c");
    const auto fabric = map.text("fabric");
    if (fabric != "completed" && fabric != "unsupported")
      map.complain(root, "fabric should be completed or unsupported");
    const bool nvlink = map.flag_or("nvlink", true);
    {
      auto host_map = map.map("host");
      read_host(host_map, file, host, error);
    }
    std::size_t unit = 0;
    for (const auto& row : map.node("units")) {
      Map u(row, file, error);
      if (unit == max_units) break;
      Unit& out = s.units[unit++];
      out.name.set(u.text("name"));
      out.description.set(u.text("description"));
      out.used = 1;
      out.loaded = u.flag_or("loaded", true) ? 1 : 0;
      out.enabled = u.flag_or("enabled", true) ? 1 : 0;
      out.active = u.flag_or("active", true) ? 1 : 0;
    }

    // Placed functions first without their bridges, then joined by address: rows may stand in any order.
    std::vector<std::pair<std::string, YAML::Node>> waiting;
    const auto place = [&](Map& row, PciFunction f) {
      const auto at = row.text("at");
      const auto address = PciAddress::parse(at);
      if (!address.ok()) {
        row.complain(YAML::Node(), address.error().message());
        return;
      }
      f.domain = address->domain;
      f.bus = address->bus;
      f.device = address->device;
      f.function = address->function;
      f.numa = row.number<int>("numa");
      f.iommu_group = host.iommu.empty() ? -1 : row.number<int>("group");
      if (host.iommu.empty()) row.number_or<int>("group", -1);
      if (f.numa >= static_cast<int>(host.numa_memory_kib.size()))
        row.complain(YAML::Node(), fmt::format("{}: no such NUMA node", at));
      if (!behind.emplace(at, static_cast<int>(host.pci.size())).second)
        row.complain(YAML::Node(), fmt::format("{} is there twice", at));
      waiting.emplace_back(row.text_or("behind", ""), YAML::Node());
      host.pci.push_back(std::move(f));
    };
    for (const auto& row_node : map.node("pci")) {
      Map row(row_node, file, error);
      const auto type = row.text("is");
      const auto found = devices.find(type);
      if (found == devices.end()) {
        row.complain(row_node, fmt::format("{}: no such row in devices.yaml", printable(type)));
        break;
      }
      if (type.starts_with("nvswitch")) ++s.nvswitch_count;
      place(row, found->second);
    }
    for (const auto& row_node : map.node("gpus")) {
      Map row(row_node, file, error);
      if (s.gpu_count == max_gpus) {
        row.complain(row_node, fmt::format("at most {} GPUs", max_gpus));
        break;
      }
      const auto chip_name = row.text("chip");
      if (!chips.contains(chip_name)) {
        if (s.chip_count == max_chips) {
          row.complain(row_node, fmt::format("at most {} kinds of chips", max_chips));
          break;
        }
        BH_TRY(auto chip_file, load_chip(source, chip_name));
        s.chips[s.chip_count] = chip_file.chip;
        chips.emplace(chip_name, std::pair(s.chip_count++, std::move(chip_file)));
      }
      const auto& [chip_index, chip_file] = chips.at(chip_name);
      const Chip& chip = chip_file.chip;
      Gpu& gpu = s.gpus[s.gpu_count];
      PciFunction f;
      f.type = "gpu";
      f.gpu = s.gpu_count;
      f.vendor = static_cast<std::uint16_t>(chip.pci_device & 0xffffU);
      f.device_id = static_cast<std::uint16_t>(chip.pci_device >> 16U);
      f.subsystem_vendor = static_cast<std::uint16_t>(chip.pci_subsystem & 0xffffU);
      f.subsystem_device = static_cast<std::uint16_t>(chip.pci_subsystem >> 16U);
      f.class_code = chip_file.class_code;
      f.revision = chip_file.revision;
      f.driver = "nvidia";
      f.bars = chip_file.bars;
      f.link_generation = f.link_generation_now = chip.pcie_gen;
      f.link_width = f.link_width_now = chip.pcie_width;
      f.vfs_total = row.flag_or("sriov", true) ? chip_file.vfs_total : 0;
      // Read on H100: "flr"; behind a bridge of its own the kernel adds the bus reset (facts passthrough.md).
      f.reset_method = row.text_or("reset", "flr bus");
      f.irq = row.number_or("irq", 60 + s.gpu_count * 5);
      f.slot = row.number_or("slot", 0U);
      if (row.has("bar_starts")) {
        for (const auto& entry : row.node("bar_starts")) {
          for (auto& bar : f.bars) {
            if (bar.index == row.as_number<unsigned>(entry.first, "bar_starts"))
              bar.start = row.as_number<std::uint64_t>(entry.second, "bar_starts");
          }
        }
      }
      gpu.module = row.number("module");
      const auto irq = f.irq;
      place(row, std::move(f));
      if (error) break;
      const PciFunction& placed = host.pci.back();
      gpu.chip = chip_index;
      gpu.uuid.set("GPU-" + random.uuid());
      gpu.serial.set(
          fmt::format("165{:010}", random.next() % 10000000000U));  // 13 digits, as the boards' numbers have
      gpu.pci_domain = placed.domain;
      gpu.pci_bus = placed.bus;
      gpu.pci_device = placed.device;
      gpu.minor = s.gpu_count;
      gpu.numa_node = placed.numa < 0 ? none : static_cast<std::uint32_t>(placed.numa);
      gpu.irq = irq;
      gpu.on_pci = gpu.in_nvml = 1;
      gpu.persistence = 1;
      gpu.ecc_current = gpu.ecc_pending = 1;
      gpu.power_limit_mw = chip.power_default_mw;
      gpu.app_clock_graphics = chip.clock_graphics_max;
      gpu.app_clock_memory = chip.clock_memory[0];
      gpu.fabric_state = fabric == "completed" ? 3 : 0;  // NVML_GPU_FABRIC_STATE_COMPLETED, NOT_SUPPORTED
      for (std::uint32_t link = 0; link < chip.nvlinks; ++link) gpu.nvlink_active[link] = nvlink ? 1 : 0;
      if (!nvlink && map.has("nvlink")) { /* the links are there and off */
      }
      gpu.generation = 1;
      gpu.asked_watts = -1;
      gpu.inlet = inlet;
      const double idle_w = chip.power_idle_mw / 1000.0;
      gpu.sink_temperature = inlet + idle_w * chip.r_sink_air;
      gpu.temperature = gpu.sink_temperature + idle_w * chip.r_die_sink;
      gpu.watts = gpu.watts_average = idle_w;
      gpu.clock_graphics = chip.clock_graphics_idle;
      gpu.clock_memory = chip.clock_memory[0];
      gpu.clock_reasons = 1;  // nvmlClocksEventReasonGpuIdle
      ++s.gpu_count;
    }
    for (std::size_t i = 0; i < waiting.size() && !error; ++i) {
      if (waiting[i].first.empty()) continue;
      const auto bridge = behind.find(waiting[i].first);
      if (bridge == behind.end() || !host.pci[static_cast<std::size_t>(bridge->second)].is_bridge) {
        map.complain(root, fmt::format("behind {}: no such bridge", printable(waiting[i].first)));
        break;
      }
      host.pci[i].parent = bridge->second;
    }
  }
  if (error) return std::move(*error);
  if (s.gpu_count == 0) return Error(Errc::invalid, fmt::format("{}: no GPUs", file));
  return machine;
}

}  // namespace

std::vector<ProfileName> profiles() {
  std::vector<ProfileName> out;
  for (const auto& file : embedded_files()) {
    if (file.name.find('/') != std::string_view::npos || file.name == "devices.yaml") continue;
    ProfileName entry{.name = std::string(file.name.substr(0, file.name.rfind('.')))};
    for (const auto line : split_lines(file.content)) {
      if (line.starts_with("summary: ")) entry.summary = line.substr(9);
    }
    out.push_back(std::move(entry));
  }
  return out;
}

Result<Machine> load_profile(std::string_view name, std::uint64_t seed) {
  const auto known = profiles();
  const bool there = std::any_of(known.begin(), known.end(), [&](const auto& p) { return p.name == name; });
  if (!there) {
    std::vector<std::string_view> names;
    for (const auto& p : known) names.push_back(p.name);
    const auto meant = closest(name, names);
    return Error(Errc::not_found, fmt::format("no profile {}", printable(name)),
                 meant.empty() ? "see: bulkhead twin list"
                               : fmt::format("did you mean {}? see: bulkhead twin list", meant));
  }
  const std::string file = std::string(name) + ".yaml";
  const Source source;
  BH_TRY(auto text, source.text(file));
  return build(source, file, std::move(text), seed);
}

Result<Machine> load_profile_file(const std::filesystem::path& path, std::uint64_t seed) {
  BH_TRY(auto text, read_file(path));
  const Source source{.directory = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".")};
  return build(source, path.filename().string(), std::move(text), seed);
}

}  // namespace bulkhead::twin
