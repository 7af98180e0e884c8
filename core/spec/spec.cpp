#include "core/spec/spec.hpp"

#include <algorithm>
#include <array>
#include <set>

#include <fmt/format.h>

#include "base/limits.hpp"
#include "base/text.hpp"
#include "core/spec/profile_name.hpp"
#include "core/yaml/yaml.hpp"

namespace bulkhead::spec {

using yaml::at_item;
using yaml::at_key;
using yaml::in_quotes;
using yaml::meant;
using yaml::Node;
using yaml::parse_tree;
using yaml::Reader;

namespace {

constexpr std::size_t slices_limit = 64;  // instances in one layout; GPUs have 7 or fewer
constexpr std::size_t list_limit = 256;   // entries of any other list

constexpr std::string_view letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
constexpr std::string_view digits = "0123456789";

bool only(std::string_view text, std::string_view more) {
  return std::all_of(text.begin(), text.end(), [&](char c) {
    return letters.find(c) != std::string_view::npos || digits.find(c) != std::string_view::npos ||
           more.find(c) != std::string_view::npos;
  });
}

const std::vector<std::string_view>& governors() {  // Documentation/admin-guide/pm/cpufreq.rst
  static const std::vector<std::string_view> names = {"performance", "powersave",    "schedutil",
                                                      "ondemand",    "conservative", "userspace"};
  return names;
}

std::string with_unit_suffix(std::string name) {
  for (const auto suffix : {".service", ".socket", ".timer", ".target", ".path", ".mount"}) {
    if (name.ends_with(suffix)) return name;
  }
  return name + ".service";
}

class NodeReader : public Reader {
 public:
  NodeFile node(const Node& root) {
    NodeFile out;
    if (root.kind == Node::Kind::map) {
      for (std::size_t i = 0; i + 1 < root.items.size(); i += 2) {
        if (root.items[i].text == "mig-configs") {
          mistake(root.items[i], "", "this is a mig-parted configuration",
                  "try: bulkhead import mig-parted FILE");
          return out;
        }
      }
    }
    const auto top =
        fields(root, "", {"apiVersion", "kind", "metadata", "gpus", "devices", "host", "protect", "heal"});
    constant(required(top, "apiVersion", root, ""), "apiVersion", "bulkhead/v1");
    constant(required(top, "kind", root, ""), "kind", "Node");
    if (const auto at = top.find("metadata"); at != top.end()) {
      const auto meta = fields(*at->second, "metadata", {"name"});
      if (const auto name = meta.find("name"); name != meta.end()) {
        if (const auto word = text(*name->second, "metadata.name", 128)) {
          if (only(*word, "-_.+")) {
            out.name = *word;
          } else {
            mistake(*name->second, "metadata.name",
                    fmt::format("{} has other characters than letters, digits, - _ . +", in_quotes(*word)));
          }
        }
      }
    }
    if (const auto at = top.find("gpus"); at != top.end()) {
      const auto& rules = items(*at->second, "gpus", list_limit);
      for (std::size_t i = 0; i < rules.size(); ++i) out.gpus.push_back(rule(rules[i], at_item("gpus", i)));
    }
    if (const auto at = top.find("devices"); at != top.end()) {
      const auto& rules = items(*at->second, "devices", list_limit);
      std::set<PciAddress> named;
      for (std::size_t i = 0; i < rules.size(); ++i)
        out.devices.push_back(device(rules[i], at_item("devices", i), named));
    }
    if (const auto at = top.find("host"); at != top.end()) out.host = host(*at->second);
    if (const auto at = top.find("protect"); at != top.end()) out.protect = protect(*at->second);
    if (const auto at = top.find("heal"); at != top.end()) out.heal = heal(*at->second);
    return out;
  }

 private:
  void constant(const Node* node, const std::string& path, std::string_view expected) {
    if (node == nullptr || (node->kind == Node::Kind::scalar && node->text == expected)) return;
    mistake(*node, path,
            node->kind == Node::Kind::scalar ? fmt::format("{} is not known", in_quotes(node->text))
                                             : "must be a word",
            fmt::format("write {}: {}", path, expected));
  }

  GpuRule rule(const Node& node, const std::string& path) {
    GpuRule out;
    out.line = node.line;
    const auto keys =
        fields(node, path, {"select", "mode", "layout", "power_limit_w", "clocks", "persistence"});
    if (const Node* at = required(keys, "select", node, path))
      out.select = select(*at, at_key(path, "select"));
    const Node* mode_at = required(keys, "mode", node, path);
    const auto chosen = mode_at != nullptr ? mode(*mode_at, at_key(path, "mode")) : std::nullopt;
    const bool known = chosen.has_value();
    out.mode = chosen.value_or(Mode::exclusive);
    const auto layout_at = keys.find("layout");
    if (layout_at != keys.end()) {
      out.dynamic = dynamic(*layout_at->second, at_key(path, "layout"));
      if (layout_at->second->kind != Node::Kind::scalar)
        out.layout = layout(*layout_at->second, at_key(path, "layout"));
      if (known && out.mode != Mode::mig) {
        mistake(*layout_at->second, at_key(path, "layout"),
                fmt::format("a layout is for mode mig, this is mode {}", name_of(out.mode)),
                "write mode: mig or remove the layout");
      }
    } else if (known && out.mode == Mode::mig) {
      mistake(node, path, "mode mig needs a layout",
              "write layout: [1g.10gb, ...], [] for none, or dynamic where leases make the instances");
    }
    if (known && out.mode == Mode::passthrough) {
      for (const auto* key : {"power_limit_w", "clocks", "persistence"}) {
        if (const auto at = keys.find(key); at != keys.end()) {
          mistake(*at->second, at_key(path, key),
                  "a GPU for passthrough is set by the driver in its virtual machine, not by this host's",
                  fmt::format("remove {}", key));
        }
      }
    }
    if (const auto at = keys.find("power_limit_w"); at != keys.end())
      out.power_limit = power(*at->second, at_key(path, "power_limit_w"));
    if (const auto at = keys.find("clocks"); at != keys.end())
      out.clocks = clocks(*at->second, at_key(path, "clocks"));
    if (const auto at = keys.find("persistence"); at != keys.end())
      out.persistence = boolean(*at->second, at_key(path, "persistence"));
    return out;
  }

  // A power with its unit: 700W, 10kW, 1.5 MW; `more` follows it: "/s".
  std::optional<Milliwatts> watts_with_unit(const Node& node, const std::string& path, std::string_view more,
                                            std::string_view example) {
    const auto wrong = [&](std::string_view what, std::string_view suggestion) {
      mistake(node, path,
              node.kind == Node::Kind::scalar ? fmt::format("{} {}", in_quotes(node.text), what)
                                              : std::string("must be a power with its unit"),
              std::string(suggestion));
      return std::optional<Milliwatts>();
    };
    if (node.kind != Node::Kind::scalar) return wrong("", fmt::format("write it like {}", example));
    std::string word(trim(node.text));
    if (!more.empty()) {
      if (!word.ends_with(more))
        return wrong(fmt::format("does not say how fast: it must end in {}", more),
                     fmt::format("write it like {}", example));
      word.resize(word.size() - more.size());
    }
    const auto end = std::min(word.find_first_not_of("0123456789."), word.size());
    const std::string number = word.substr(0, end);
    const std::string unit = std::string(trim(word.substr(end)));
    const auto parts = split(number, '.');
    const auto whole = parse_u64(parts.front());
    const std::string fraction = parts.size() == 2 ? std::string(parts[1]) : "0";
    std::uint64_t scale = 0;  // milliwatts
    if (unit == "W") scale = 1000;
    if (unit == "kW") scale = 1'000'000;
    if (unit == "MW") scale = 1'000'000'000;
    if (!whole || parts.size() > 2 || fraction.empty() || fraction.size() > 3)
      return wrong("is not a power", fmt::format("write it like {}", example));
    if (scale == 0) {
      const std::string small = lower(unit);
      const std::string meant_unit = small == "w" ? "W" : small == "kw" ? "kW" : small == "mw" ? "MW" : "";
      return wrong(unit.empty() ? "has no unit" : "has a unit that is not known: W, kW or MW",
                   fmt::format("write {}{}{}", number, meant_unit.empty() ? "W" : meant_unit, more));
    }
    std::uint64_t thousandths = *parse_u64(fraction);
    for (auto digits_left = fraction.size(); digits_left < 3; ++digits_left) thousandths *= 10;
    if (*whole > 1'000'000) return wrong("is out of range 1 W to 1 MW", "");
    const std::uint64_t milliwatts = *whole * scale + thousandths * (scale / 1000);
    if (milliwatts < 1000 || milliwatts > 1'000'000'000) return wrong("is out of range 1 W to 1 MW", "");
    return Milliwatts(milliwatts);
  }

  template <class Word>
  void choose(const Node& node, const std::string& path, std::initializer_list<Word> all, Word& out) {
    const auto word = text(node, path);
    if (!word) return;
    std::vector<std::string_view> names;
    for (const Word one : all) {
      if (*word == name_of(one)) {
        out = one;
        return;
      }
      names.push_back(name_of(one));
    }
    std::string suggestion = meant(*word, names);
    if (suggestion.empty())
      suggestion =
          fmt::format("write one of {}", join(std::vector<std::string>(names.begin(), names.end()), ", "));
    mistake(node, path, fmt::format("{} is not known", in_quotes(*word)), suggestion);
  }

  Protect protect(const Node& node) {
    Protect out;
    const auto keys = fields(
        node, "protect",
        {"mode", "ceiling", "guard", "harshest", "node_power", "rest_power", "rack", "ramp", "cooling"});
    const auto at = [&](std::string_view key) -> const Node* {
      const auto found = keys.find(key);
      return found == keys.end() ? nullptr : found->second;
    };
    using A = Protect::Action;
    if (const Node* n = at("mode"))
      choose(*n, "protect.mode", {Protect::Mode::observe, Protect::Mode::act}, out.mode);
    if (const Node* n = at("ceiling")) out.ceiling = number(*n, "protect.ceiling", 40, 110).value_or(85);
    if (const Node* n = at("guard")) out.guard = number(*n, "protect.guard", 0, 30).value_or(5);
    if (const Node* n = at("harshest"))
      choose(*n, "protect.harshest", {A::hold, A::power, A::clocks, A::pause, A::drain, A::fence},
             out.harshest);
    if (const Node* n = at("node_power"))
      out.node_power = watts_with_unit(*n, "protect.node_power", "", "10kW");
    if (const Node* n = at("rest_power"))
      out.rest_power = watts_with_unit(*n, "protect.rest_power", "", "2kW").value_or(Milliwatts());
    if (const Node* n = at("cooling")) out.cooling = watts_with_unit(*n, "protect.cooling", "", "11kW");
    if (const Node* n = at("rack")) {
      const auto inner = fields(*n, "protect.rack", {"power", "nodes"});
      Protect::Rack rack;
      if (const Node* power_at = required(inner, "power", *n, "protect.rack"))
        rack.power = watts_with_unit(*power_at, "protect.rack.power", "", "40kW").value_or(Milliwatts());
      if (const Node* nodes_at = required(inner, "nodes", *n, "protect.rack"))
        rack.nodes = number(*nodes_at, "protect.rack.nodes", 1, 256).value_or(1);
      out.rack = rack;
    }
    if (const Node* n = at("ramp")) {
      Protect::Ramp ramp;
      if (n->kind == Node::Kind::map) {
        const auto inner = fields(*n, "protect.ramp", {"rate", "burst"});
        if (const Node* rate = required(inner, "rate", *n, "protect.ramp"))
          ramp.per_second = watts_with_unit(*rate, "protect.ramp.rate", "/s", "2kW/s").value_or(Milliwatts());
        if (const auto burst = inner.find("burst"); burst != inner.end())
          ramp.burst = watts_with_unit(*burst->second, "protect.ramp.burst", "", "1kW");
      } else {
        ramp.per_second = watts_with_unit(*n, "protect.ramp", "/s", "2kW/s").value_or(Milliwatts());
      }
      out.ramp = ramp;
    }
    return out;
  }

  Heal heal(const Node& node) {
    Heal out;
    const auto keys = fields(node, "heal", {"mode", "most_an_hour", "keep_healthy", "relapse_hours"});
    const auto at = [&](std::string_view key) -> const Node* {
      const auto found = keys.find(key);
      return found == keys.end() ? nullptr : found->second;
    };
    using M = Heal::Mode;
    if (const Node* n = at("mode")) choose(*n, "heal.mode", {M::observe, M::suggest, M::act}, out.mode);
    if (const Node* n = at("most_an_hour"))
      out.most_an_hour = number(*n, "heal.most_an_hour", 0, 100).value_or(4);
    if (const Node* n = at("keep_healthy"))
      out.keep_healthy = number(*n, "heal.keep_healthy", 0, 64).value_or(1);
    if (const Node* n = at("relapse_hours"))
      out.relapse_hours = number(*n, "heal.relapse_hours", 1, 720).value_or(24);
    return out;
  }

  DeviceRule device(const Node& node, const std::string& path, std::set<PciAddress>& named) {
    DeviceRule out;
    out.line = node.line;
    const auto keys = fields(node, path, {"pci", "mode", "sriov"});
    static_cast<void>(required(keys, "pci", node, path));
    each(keys, "pci", path, [&](const Node& item, const std::string& where) {
      const auto address = PciAddress::parse(item.text);
      if (item.kind != Node::Kind::scalar || !address.ok()) {
        mistake(item, where, fmt::format("{} is not a PCI address", in_quotes(item.text)),
                "write it like 0000:1b:00.0");
      } else if (!named.insert(*address).second) {
        mistake(item, where, fmt::format("{} is named twice", address->str()), "keep one of the two");
      } else {
        out.pci.push_back(*address);
      }
    });
    const auto mode_at = keys.find("mode");
    if (mode_at != keys.end()) {
      const std::string where = at_key(path, "mode");
      if (const auto word = text(*mode_at->second, where)) {
        if (*word == "passthrough") {
          out.purpose = DevicePurpose::passthrough;
        } else if (*word == "host") {
          out.purpose = DevicePurpose::host;
        } else {
          std::string suggestion = meant(*word, {"passthrough", "host"});
          if (*word == "vfio" || *word == "vfio-pci") suggestion = "write mode: passthrough";
          if (suggestion.empty()) suggestion = "a device is for passthrough, or for the host";
          mistake(*mode_at->second, where, fmt::format("{} is not a mode of a device", in_quotes(*word)),
                  suggestion);
        }
      }
    }
    if (const auto at = keys.find("sriov"); at != keys.end()) {
      const std::string where = at_key(path, "sriov");
      const auto inner = fields(*at->second, where, {"vfs"});
      if (const Node* count = required(inner, "vfs", *at->second, where))
        out.vfs = number(*count, at_key(where, "vfs"), 0, 65535);
      if (out.purpose == DevicePurpose::host && out.vfs.value_or(0) > 0) {
        mistake(*at->second, where, "a device that goes back to the host keeps no virtual functions",
                "remove mode: host, or write vfs: 0");
      }
    } else if (mode_at == keys.end()) {
      mistake(node, path, "says nothing of what the device is for",
              "write mode: passthrough, mode: host or sriov: {vfs: 4}");
    }
    return out;
  }

  std::optional<Vfio> vfio(const Node& node) {
    Vfio out;
    const auto keys = fields(node, "host.vfio", {"owner", "mode"});
    if (const auto at = keys.find("owner"); at != keys.end()) {
      if (const auto word = text(*at->second, "host.vfio.owner", 64)) {
        // The word ends up in a udev rule.
        if (only(*word, "-_.") && !word->empty() && !word->starts_with("-")) {
          out.owner = *word;
        } else {
          mistake(*at->second, "host.vfio.owner", fmt::format("{} is not a user's name", in_quotes(*word)),
                  "write it like libvirt-qemu");
        }
      }
    }
    if (const auto at = keys.find("mode"); at != keys.end()) {
      const auto bits =
          at->second->kind == Node::Kind::scalar ? parse_u64(at->second->text, 8) : std::nullopt;
      // Whoever may open a group has the device, and all memory that is mapped for it.
      if (!bits || *bits > 0666 || (*bits & 0111U) != 0 || (*bits & 0006U) != 0 || (*bits & 0600U) != 0600) {
        mistake(*at->second, "host.vfio.mode",
                fmt::format("{} is not a mode for it", in_quotes(at->second->text)),
                "write \"0600\" or \"0660\"; others never");
      } else {
        out.mode = static_cast<unsigned>(*bits);
      }
    }
    return out;
  }

  std::optional<Mode> mode(const Node& node, const std::string& path) {
    const auto word = text(node, path);
    if (!word) return std::nullopt;
    for (const auto m : {Mode::mig, Mode::share, Mode::exclusive, Mode::passthrough}) {
      if (*word == name_of(m)) return m;
    }
    std::string suggestion = meant(*word, {"mig", "share", "exclusive", "passthrough"});
    if (*word == "dynamic") suggestion = "write mode: mig and layout: dynamic";
    if (*word == "vfio") suggestion = "write mode: passthrough";
    if (suggestion.empty()) suggestion = "modes are mig, share, exclusive and passthrough";
    mistake(node, path, fmt::format("{} is not a mode", in_quotes(*word)), suggestion);
    return std::nullopt;
  }

  Select select(const Node& node, const std::string& path) {
    Select out;
    const auto keys = fields(node, path, {"all", "index", "uuid", "pci", "model", "pci_id"});
    if (node.kind == Node::Kind::scalar && node.text == "all")
      mistakes.back().suggestion = "write select: {all: true}";
    if (node.kind == Node::Kind::map && node.items.empty()) {
      mistake(node, path, "names no GPU", "write {all: true} or one of index, uuid, pci, model, pci_id");
    }
    if (const auto at = keys.find("all"); at != keys.end()) {
      const auto all = boolean(*at->second, at_key(path, "all"));
      out.all = all.value_or(false);
      if (all == false) mistake(*at->second, at_key(path, "all"), "false selects nothing", "remove the key");
      if (out.all && keys.size() > 1)
        mistake(node, path, "all stands beside other keys", "keep all: true or the others");
    }
    if (const auto at = keys.find("index"); at != keys.end()) {
      const std::string where = at_key(path, "index");
      for (const Node* item : one_or_more(*at->second, where, list_limit)) {
        const auto ranges =
            item->kind == Node::Kind::scalar ? parse_ranges(item->text, limits::gpus) : std::nullopt;
        if (!ranges || ranges->empty() || ranges->back() >= limits::gpus) {
          mistake(*item, where,
                  fmt::format("{} is not a GPU index or range below {}", in_quotes(item->text), limits::gpus),
                  "write 3 or \"0-3,6\"");
          continue;
        }
        out.index.insert(out.index.end(), ranges->begin(), ranges->end());
      }
      std::sort(out.index.begin(), out.index.end());
      out.index.erase(std::unique(out.index.begin(), out.index.end()), out.index.end());
    }
    each(keys, "uuid", path, [&](const Node& item, const std::string& where) {
      const auto word = text(item, where, 96);
      if (!word) return;
      if (!word->starts_with("GPU-") || !only(*word, "-")) {
        mistake(item, where, fmt::format("{} is not a GPU's UUID", in_quotes(*word)),
                word->starts_with("MIG-") ? "that is a MIG device; write its GPU's UUID"
                                          : "it starts with GPU-, as nvidia-smi -L prints it");
        return;
      }
      out.uuid.push_back({*word});
    });
    each(keys, "pci", path, [&](const Node& item, const std::string& where) {
      const auto address = PciAddress::parse(item.text);
      if (item.kind != Node::Kind::scalar || !address.ok()) {
        mistake(item, where, fmt::format("{} is not a PCI address", in_quotes(item.text)),
                "write it like 0000:1b:00.0");
        return;
      }
      out.pci.push_back(address.value());
    });
    each(keys, "model", path, [&](const Node& item, const std::string& where) {
      if (auto word = text(item, where, 128)) out.model.push_back(*std::move(word));
    });
    each(keys, "pci_id", path, [&](const Node& item, const std::string& where) {
      const auto parts = split(item.text, ':');
      const auto vendor = parse_u64(parts.front(), 16), device = parse_u64(parts.back(), 16);
      if (item.kind != Node::Kind::scalar || parts.size() != 2 || !vendor || !device || *vendor > 0xffff ||
          *device > 0xffff) {
        mistake(item, where, fmt::format("{} is not a PCI id", in_quotes(item.text)),
                "write vendor:device in hexadecimal, like \"10de:2330\"");
        return;
      }
      out.pci_id.push_back({static_cast<std::uint16_t>(*vendor), static_cast<std::uint16_t>(*device)});
    });
    return out;
  }

  template <class Read>
  void each(const Fields& keys, std::string_view key, const std::string& path, const Read& read) {
    const auto at = keys.find(key);
    if (at == keys.end()) return;
    const std::string where = at_key(path, key);
    for (const Node* item : one_or_more(*at->second, where, list_limit)) read(*item, where);
  }

  // The one word that stands for a layout.
  bool dynamic(const Node& node, const std::string& path) {
    if (node.kind != Node::Kind::scalar) return false;
    if (node.text == "dynamic") return true;
    std::string suggestion = meant(node.text, {"dynamic"});
    if (suggestion.empty()) {
      suggestion =
          is_profile_name(node.text)
              ? fmt::format("write layout: [{}]", printable(node.text, 40))
              : "write layout: [1g.10gb, ...], [] for none, or dynamic where leases make the instances";
    }
    mistake(node, path, fmt::format("{} is not a layout", in_quotes(node.text)), suggestion);
    return false;
  }

  std::vector<Slice> layout(const Node& node, const std::string& path) {
    std::vector<Slice> out;
    const auto& list = items(node, path, slices_limit);
    for (std::size_t i = 0; i < list.size(); ++i) {
      const Node& item = list[i];
      const std::string where = at_item(path, i);
      Slice slice;
      slice.line = item.line;
      slice.column = item.column;
      unsigned count = 1;
      if (item.kind == Node::Kind::map) {
        const auto keys = fields(item, where, {"profile", "at", "count", "compute"});
        const Node* name = required(keys, "profile", item, where);
        if (name == nullptr || !profile(*name, at_key(where, "profile"), slice)) continue;
        if (const auto at = keys.find("at"); at != keys.end())
          slice.at = number(*at->second, at_key(where, "at"), 0, 63);
        if (const auto at = keys.find("count"); at != keys.end())
          count = number(*at->second, at_key(where, "count"), 1, slices_limit).value_or(1);
        if (slice.at && count > 1)
          mistake(item, where, "at and count together: only one instance can start there",
                  "write one entry for each start");
        if (const auto at = keys.find("compute"); at != keys.end())
          compute(*at->second, at_key(where, "compute"), slice);
      } else if (!profile(item, where, slice)) {
        continue;
      }
      if (out.size() + count > slices_limit) {
        mistake(item, where, fmt::format("the layout has more than {} instances", slices_limit));
        return out;
      }
      out.insert(out.end(), count, slice);
    }
    return out;
  }

  bool profile(const Node& node, const std::string& path, Slice& slice) {
    const auto word = text(node, path, 64);
    if (!word) return false;
    if (!is_profile_name(*word)) {
      const auto dot = word->find("c.");
      const bool compute =
          dot != std::string::npos && dot > 0 && is_profile_name(std::string_view(*word).substr(dot + 2));
      mistake(node, path, fmt::format("{} is not a MIG profile name", in_quotes(*word)),
              compute ? fmt::format("write {{profile: {}, compute: [{}c]}}", word->substr(dot + 2),
                                    word->substr(0, dot))
                      : "write it like 3g.40gb or 1g.10gb+me");
      return false;
    }
    slice.profile = lower(trim(*word));
    if (slice.profile.starts_with("mig ")) slice.profile.erase(0, 4);
    return true;
  }

  void compute(const Node& node, const std::string& path, Slice& slice) {
    for (const Node* item : one_or_more(node, path, 16)) {
      const auto word = text(*item, path, 16);
      if (!word) continue;
      static const std::vector<std::string_view> names = {"1c", "2c", "3c", "4c", "6c", "7c", "8c"};
      if (std::find(names.begin(), names.end(), *word) == names.end()) {
        mistake(*item, path, fmt::format("{} is not a compute instance", in_quotes(*word)),
                "write 1c, 2c, 3c, 4c, 6c, 7c or 8c");
        continue;
      }
      slice.compute.push_back(*word);
    }
  }

  // Watts, with at most three decimals: NVML counts milliwatts.
  std::optional<Milliwatts> power(const Node& node, const std::string& path) {
    const auto parts = split(node.text, '.');
    const auto whole = parse_u64(parts.front());
    std::string fraction = parts.size() == 2 ? std::string(parts[1]) : "0";
    const bool good = node.kind == Node::Kind::scalar && whole && parts.size() <= 2 && !fraction.empty() &&
                      fraction.size() <= 3 && fraction.find_first_not_of(digits) == std::string::npos;
    if (!good) {
      const auto end = node.text.find_first_not_of(digits);
      mistake(node, path,
              node.kind == Node::Kind::scalar
                  ? fmt::format("{} is not a number of watts", in_quotes(node.text))
                  : "must be a number of watts",
              end != std::string::npos && end > 0 && end < 8
                  ? fmt::format("write {}: the key names the unit", node.text.substr(0, end))
                  : "");
      return std::nullopt;
    }
    fraction.append(3 - fraction.size(), '0');
    const std::uint64_t milliwatts = std::min<std::uint64_t>(*whole, 1000000) * 1000 + *parse_u64(fraction);
    if (milliwatts < 1000 || milliwatts > 10000000) {
      mistake(node, path, fmt::format("{} W is out of range 1 to 10000", printable(node.text, 40)));
      return std::nullopt;
    }
    return Milliwatts(milliwatts);
  }

  std::optional<ClockLock> clocks(const Node& node, const std::string& path) {
    const auto keys = fields(node, path, {"lock_mhz"});
    const Node* at = required(keys, "lock_mhz", node, path);
    if (at == nullptr) return std::nullopt;
    const std::string where = at_key(path, "lock_mhz");
    if (at->kind == Node::Kind::scalar) {
      const auto both = number(*at, where, 1, 10000);
      return both ? std::optional(ClockLock{Megahertz(*both), Megahertz(*both)}) : std::nullopt;
    }
    if (at->kind != Node::Kind::sequence || at->items.size() != 2) {
      mistake(*at, where, "must be a clock or [low, high]", "write lock_mhz: [1200, 1500]");
      return std::nullopt;
    }
    const auto low = number(at->items[0], at_item(where, 0), 1, 10000);
    const auto high = number(at->items[1], at_item(where, 1), 1, 10000);
    if (!low || !high) return std::nullopt;
    if (*low > *high) {
      mistake(*at, where, fmt::format("low {} is above high {}", *low, *high),
              fmt::format("write [{}, {}]", *high, *low));
      return std::nullopt;
    }
    return ClockLock{Megahertz(*low), Megahertz(*high)};
  }

  HostRule host(const Node& node) {
    HostRule out;
    const auto keys =
        fields(node, "host", {"kernel_args", "cpu_governor", "fabric_manager", "units", "modprobe", "vfio"});
    if (const auto at = keys.find("vfio"); at != keys.end()) out.vfio = vfio(*at->second);
    if (const auto at = keys.find("kernel_args"); at != keys.end()) {
      const auto& list = items(*at->second, "host.kernel_args", 64);
      for (std::size_t i = 0; i < list.size(); ++i) {
        const std::string where = at_item("host.kernel_args", i);
        const auto word = text(list[i], where);
        if (!word) continue;
        // The words end up in a file that a shell reads, as root.
        if (!only(*word, "-_.,:;=/+@%") || word->starts_with("-") || word->starts_with("=")) {
          mistake(list[i], where, fmt::format("{} is not one kernel argument", in_quotes(*word)),
                  word->find(' ') != std::string::npos
                      ? "write one list item for each argument"
                      : "letters, digits and - _ . , : ; = / + @ % are allowed");
        } else if (std::find(out.kernel_args.begin(), out.kernel_args.end(), *word) !=
                   out.kernel_args.end()) {
          mistake(list[i], where, fmt::format("{} is given twice", in_quotes(*word)), "remove one");
        } else {
          out.kernel_args.push_back(*word);
        }
      }
    }
    if (const auto at = keys.find("cpu_governor"); at != keys.end()) {
      if (const auto word = text(*at->second, "host.cpu_governor")) {
        if (std::find(governors().begin(), governors().end(), *word) == governors().end()) {
          std::string suggestion = meant(*word, governors());
          if (suggestion.empty()) suggestion = fmt::format("one of {}", fmt::join(governors(), ", "));
          mistake(*at->second, "host.cpu_governor",
                  fmt::format("{} is not a cpufreq governor", in_quotes(*word)), suggestion);
        } else {
          out.cpu_governor = *word;
        }
      }
    }
    std::set<std::string> names;
    if (const auto at = keys.find("fabric_manager"); at != keys.end()) {
      FabricManager manager;
      const auto inner = fields(*at->second, "host.fabric_manager", {"unit", "port"});
      if (const auto unit = inner.find("unit"); unit != inner.end()) {
        manager.unit = unit_name(*unit->second, "host.fabric_manager.unit").value_or(manager.unit);
      }
      if (const auto port = inner.find("port"); port != inner.end())
        manager.port = number(*port->second, "host.fabric_manager.port", 1, 65535);
      names.insert(manager.unit);
      out.fabric_manager = manager;
    }
    if (const auto at = keys.find("units"); at != keys.end()) {
      const auto& list = items(*at->second, "host.units", list_limit);
      for (std::size_t i = 0; i < list.size(); ++i) {
        const std::string where = at_item("host.units", i);
        Unit unit;
        std::optional<std::string> name;
        if (list[i].kind == Node::Kind::scalar) {
          name = unit_name(list[i], where);
        } else {
          const auto inner = fields(list[i], where, {"name", "enabled", "active"});
          if (const Node* word = required(inner, "name", list[i], where))
            name = unit_name(*word, at_key(where, "name"));
          if (const auto key = inner.find("enabled"); key != inner.end())
            unit.enabled = boolean(*key->second, at_key(where, "enabled")).value_or(true);
          if (const auto key = inner.find("active"); key != inner.end())
            unit.active = boolean(*key->second, at_key(where, "active")).value_or(true);
        }
        if (!name) continue;
        unit.name = *name;
        if (!names.insert(unit.name).second) {
          mistake(list[i], where, fmt::format("unit {} is named twice", in_quotes(unit.name)), "remove one");
          continue;
        }
        out.units.push_back(unit);
      }
    }
    if (const auto at = keys.find("modprobe"); at != keys.end()) {
      const auto& list = items(*at->second, "host.modprobe", list_limit);
      for (std::size_t i = 0; i < list.size(); ++i) {
        if (auto file = modprobe(list[i], at_item("host.modprobe", i))) {
          if (!names.insert("modprobe/" + file->name).second) {
            mistake(list[i], at_item("host.modprobe", i),
                    fmt::format("file {} is named twice", in_quotes(file->name)), "put its lines together");
            continue;
          }
          out.modprobe.push_back(*std::move(file));
        }
      }
    }
    return out;
  }

  std::optional<std::string> unit_name(const Node& node, const std::string& path) {
    const auto word = text(node, path, 200);
    if (!word) return std::nullopt;
    if (!only(*word, "-_.:@\\") || word->starts_with(".") || word->starts_with("-")) {
      mistake(node, path, fmt::format("{} is not a systemd unit name", in_quotes(*word)));
      return std::nullopt;
    }
    return with_unit_suffix(*word);
  }

  std::optional<ModprobeFile> modprobe(const Node& node, const std::string& path) {
    ModprobeFile out;
    const auto keys = fields(node, path, {"name", "lines"});
    const Node* name = required(keys, "name", node, path);
    const Node* lines = required(keys, "lines", node, path);
    bool good = name != nullptr && lines != nullptr;
    if (name != nullptr) {
      const std::string where = at_key(path, "name");
      const auto word = text(*name, where, 100);
      if (!word) {
        good = false;
      } else if (!only(*word, "-_.") || word->starts_with(".") || !word->ends_with(".conf")) {
        mistake(*name, where, fmt::format("{} is not a file name below /etc/modprobe.d", in_quotes(*word)),
                "write a name that ends in .conf, without a path");
        good = false;
      } else {
        out.name = *word;
      }
    }
    if (lines != nullptr) {
      const std::string where = at_key(path, "lines");
      const auto& list = items(*lines, where, list_limit);
      for (std::size_t i = 0; i < list.size(); ++i) {
        const auto line = text(list[i], at_item(where, i), 1024);
        if (!line) {
          good = false;
          continue;
        }
        // modprobe.d(5)
        static const std::vector<std::string_view> commands = {"options", "blacklist", "install",
                                                               "alias",   "softdep",   "remove"};
        const auto first = split(trim(*line), ' ').front();
        if (line->find_first_of("\r\n") != std::string::npos) {
          mistake(list[i], at_item(where, i), "holds a line break", "write one list item for each line");
          good = false;
        } else if (!first.starts_with('#') &&
                   std::find(commands.begin(), commands.end(), first) == commands.end()) {
          std::string suggestion = meant(first, commands);
          if (suggestion.empty())
            suggestion = "a line starts with options, blacklist, install, alias, softdep, remove or #";
          mistake(list[i], at_item(where, i), fmt::format("{} is not a modprobe.d command", in_quotes(first)),
                  suggestion);
          good = false;
        } else {
          out.lines.push_back(*line);
        }
      }
    }
    return good ? std::optional(out) : std::nullopt;
  }
};

// A YAML double-quoted scalar: JSON's quoting is a subset of it.
std::string yaml_text(std::string_view text) {
  return Json(std::string(text)).dump(-1, ' ', true, Json::error_handler_t::replace);
}

template <class Items, class Show>
std::string flow(const Items& list, const Show& show) {
  std::vector<std::string> words;
  for (const auto& item : list) words.push_back(show(item));
  return fmt::format("[{}]", join(words, ", "));
}

// As the protect part takes it: "10kW", "700.5W".
std::string with_unit(Milliwatts power) {
  const bool kilo = power.count % 1'000'000 == 0;
  if (kilo) return fmt::format("{}kW", power.count / 1'000'000);
  std::string text = fmt::format("{}.{:03}", power.count / 1000, power.count % 1000);
  while (text.ends_with('0')) text.pop_back();
  if (text.ends_with('.')) text.pop_back();
  return text + "W";
}

std::string watts_text(Milliwatts power) {
  if (power.count % 1000 == 0) return fmt::format("{}", power.count / 1000);
  std::string text = fmt::format("{}.{:03}", power.count / 1000, power.count % 1000);
  while (text.ends_with('0')) text.pop_back();
  return text;
}

std::string select_text(const Select& select) {
  std::vector<std::string> keys;
  if (select.all) keys.emplace_back("all: true");
  if (!select.index.empty()) keys.push_back(fmt::format("index: \"{}\"", format_ranges(select.index)));
  if (!select.uuid.empty())
    keys.push_back("uuid: " + flow(select.uuid, [](const Uuid& u) { return yaml_text(u.text); }));
  if (!select.pci.empty())
    keys.push_back("pci: " + flow(select.pci, [](const PciAddress& p) { return yaml_text(p.str()); }));
  if (!select.model.empty())
    keys.push_back("model: " + flow(select.model, [](const std::string& m) { return yaml_text(m); }));
  if (!select.pci_id.empty()) {
    keys.push_back("pci_id: " + flow(select.pci_id, [](const PciId& p) {
                     return fmt::format("\"{:04x}:{:04x}\"", p.vendor, p.device);
                   }));
  }
  return fmt::format("{{{}}}", join(keys, ", "));
}

std::string slice_text(const Slice& slice) {
  if (!slice.at && slice.compute.empty()) return slice.profile;
  std::string text = "{profile: " + slice.profile;
  if (slice.at) text += fmt::format(", at: {}", *slice.at);
  if (!slice.compute.empty()) text += fmt::format(", compute: [{}]", join(slice.compute, ", "));
  return text + "}";
}

}  // namespace

std::string_view name_of(Mode mode) {
  switch (mode) {
    case Mode::mig:
      return "mig";
    case Mode::share:
      return "share";
    case Mode::exclusive:
      return "exclusive";
    case Mode::passthrough:
      return "passthrough";
  }
  return "exclusive";
}

std::string_view name_of(Protect::Mode mode) { return mode == Protect::Mode::act ? "act" : "observe"; }

std::string_view name_of(Heal::Mode mode) {
  static constexpr std::array<std::string_view, 3> names = {"observe", "suggest", "act"};
  return names[static_cast<std::size_t>(mode)];
}

std::string_view name_of(Protect::Action action) {
  static constexpr std::array<std::string_view, 7> names = {"none",  "hold",  "power", "clocks",
                                                            "pause", "drain", "fence"};
  return names[static_cast<std::size_t>(action)];
}

Parsed parse(std::string_view yaml) {
  auto tree = parse_tree(yaml);
  if (auto* mistakes = std::get_if<std::vector<Mistake>>(&tree)) return std::move(*mistakes);
  NodeReader reader;
  NodeFile node = reader.node(std::get<Node>(tree));
  if (reader.mistakes.empty()) return node;
  return reader.in_order();
}

std::string to_yaml(const NodeFile& node) {
  std::string out = "apiVersion: bulkhead/v1\nkind: Node\n";
  if (!node.name.empty()) out += fmt::format("metadata:\n  name: {}\n", yaml_text(node.name));
  if (!node.gpus.empty()) out += "gpus:\n";
  for (const auto& rule : node.gpus) {
    out += fmt::format("  - select: {}\n    mode: {}\n", select_text(rule.select), name_of(rule.mode));
    if (rule.mode == Mode::mig)
      out += fmt::format("    layout: {}\n", rule.dynamic ? "dynamic" : flow(rule.layout, slice_text));
    if (rule.power_limit) out += fmt::format("    power_limit_w: {}\n", watts_text(*rule.power_limit));
    if (rule.clocks)
      out += fmt::format("    clocks: {{lock_mhz: [{}, {}]}}\n", rule.clocks->low.count,
                         rule.clocks->high.count);
    if (rule.persistence) out += fmt::format("    persistence: {}\n", *rule.persistence);
  }
  if (!node.devices.empty()) out += "devices:\n";
  for (const auto& rule : node.devices) {
    std::vector<std::string> keys = {"pci: " +
                                     flow(rule.pci, [](const PciAddress& p) { return yaml_text(p.str()); })};
    if (rule.purpose != DevicePurpose::leave)
      keys.emplace_back(rule.purpose == DevicePurpose::host ? "mode: host" : "mode: passthrough");
    if (rule.vfs) keys.push_back(fmt::format("sriov: {{vfs: {}}}", *rule.vfs));
    out += fmt::format("  - {{{}}}\n", join(keys, ", "));
  }
  std::string host;
  if (!node.host.kernel_args.empty())
    host += fmt::format("  kernel_args: {}\n",
                        flow(node.host.kernel_args, [](const std::string& a) { return yaml_text(a); }));
  if (node.host.cpu_governor) host += fmt::format("  cpu_governor: {}\n", *node.host.cpu_governor);
  if (const auto& manager = node.host.fabric_manager) {
    host += fmt::format("  fabric_manager: {{unit: {}", yaml_text(manager->unit));
    if (manager->port) host += fmt::format(", port: {}", *manager->port);
    host += "}\n";
  }
  if (!node.host.units.empty()) host += "  units:\n";
  for (const auto& unit : node.host.units) {
    host += fmt::format("    - {{name: {}, enabled: {}, active: {}}}\n", yaml_text(unit.name), unit.enabled,
                        unit.active);
  }
  if (!node.host.modprobe.empty()) host += "  modprobe:\n";
  for (const auto& file : node.host.modprobe) {
    host += fmt::format("    - name: {}\n      lines: {}\n", yaml_text(file.name),
                        flow(file.lines, [](const std::string& l) { return yaml_text(l); }));
  }
  if (node.host.vfio)
    host += fmt::format("  vfio: {{owner: {}, mode: \"{:04o}\"}}\n", yaml_text(node.host.vfio->owner),
                        node.host.vfio->mode);
  if (!host.empty()) out += "host:\n" + host;
  if (const auto& p = node.protect) {
    out += fmt::format("protect:\n  mode: {}\n  ceiling: {}\n  guard: {}\n  harshest: {}\n", name_of(p->mode),
                       p->ceiling, p->guard, name_of(p->harshest));
    if (p->node_power) out += fmt::format("  node_power: {}\n", with_unit(*p->node_power));
    if (p->rest_power.count > 0) out += fmt::format("  rest_power: {}\n", with_unit(p->rest_power));
    if (p->rack)
      out += fmt::format("  rack: {{power: {}, nodes: {}}}\n", with_unit(p->rack->power), p->rack->nodes);
    if (p->ramp) {
      out += fmt::format("  ramp: {{rate: {}/s", with_unit(p->ramp->per_second));
      if (p->ramp->burst) out += fmt::format(", burst: {}", with_unit(*p->ramp->burst));
      out += "}\n";
    }
    if (p->cooling) out += fmt::format("  cooling: {}\n", with_unit(*p->cooling));
  }
  if (const auto& h = node.heal)
    out += fmt::format("heal: {{mode: {}, most_an_hour: {}, keep_healthy: {}, relapse_hours: {}}}\n",
                       name_of(h->mode), h->most_an_hour, h->keep_healthy, h->relapse_hours);
  return out;
}

bool is_profile_name(std::string_view text) {
  std::string name = lower(trim(text));
  if (name.starts_with("mig ")) name.erase(0, 4);
  const std::string_view digits = "0123456789";
  std::size_t i = std::min(name.find_first_not_of(digits), name.size());
  if (i == 0 || i > 2 || name.compare(i, 2, "g.") != 0) return false;
  const std::size_t from = i + 2;
  i = std::min(name.find_first_not_of(digits, from), name.size());
  if (i == from || i - from > 4 || name.compare(i, 2, "gb") != 0) return false;
  const std::string_view suffix = std::string_view(name).substr(i + 2);
  if (suffix.empty()) return true;
  return (suffix[0] == '+' || suffix[0] == '-') && suffix.size() > 1 && suffix.size() <= 16 &&
         suffix.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789.", 1) == std::string_view::npos;
}

}  // namespace bulkhead::spec
