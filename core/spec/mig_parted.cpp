// NVIDIA mig-parted's configuration file, as its own parser accepts it (api/spec/v1/spec.go): "version: v1"
// and "mig-configs", each a list of {device-filter, devices, mig-enabled, mig-devices}.
#include <algorithm>
#include <map>

#include <fmt/format.h>

#include "base/limits.hpp"
#include "base/text.hpp"
#include "core/spec/profile_name.hpp"
#include "core/spec/spec.hpp"
#include "core/yaml/yaml.hpp"

namespace bulkhead::spec {

using yaml::at_item;
using yaml::at_key;
using yaml::in_quotes;
using yaml::Node;
using yaml::parse_tree;
using yaml::Reader;

namespace {

constexpr std::size_t configs_limit = 1024;
constexpr std::size_t rules_limit = 256;

bool share_one(const GpuRule& a, const GpuRule& b) {
  const auto meet = [](const auto& x, const auto& y) {
    return x.empty() || y.empty() || std::any_of(x.begin(), x.end(), [&](const auto& item) {
             return std::find(y.begin(), y.end(), item) != y.end();
           });
  };
  return meet(a.select.index, b.select.index) && meet(a.select.pci_id, b.select.pci_id);
}

class MigPartedReader : public Reader {
 public:
  std::vector<Imported> configurations(const Node& root) {
    std::vector<Imported> out;
    const auto top = fields(root, "", {"version", "mig-configs"});
    if (const Node* version = required(top, "version", root, "");
        version != nullptr && version->text != "v1") {
      mistake(*version, "version", fmt::format("{} is not known", in_quotes(version->text)),
              "write version: v1");
    }
    const Node* configs = required(top, "mig-configs", root, "");
    if (configs == nullptr) return out;
    if (configs->kind != Node::Kind::map || configs->items.empty() ||
        configs->items.size() / 2 > configs_limit) {
      mistake(*configs, "mig-configs",
              fmt::format("must be a mapping of 1 to {} names to configurations", configs_limit));
      return out;
    }
    std::map<std::string, unsigned> lines;
    for (std::size_t i = 0; i + 1 < configs->items.size(); i += 2) {
      const Node& key = configs->items[i];
      const std::string path = at_key("mig-configs", printable(key.text, 60));
      const bool plain = key.kind == Node::Kind::scalar && !key.text.empty() && key.text.size() <= 128 &&
                         std::all_of(key.text.begin(), key.text.end(), [](char c) {
                           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                                  (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.' || c == '+';
                         });
      if (!plain) {
        mistake(key, path, "a name has letters, digits, - _ . + only");
        continue;
      }
      if (const auto [at, first] = lines.emplace(key.text, key.line); !first) {
        mistake(key, path, fmt::format("is given twice, first in line {}", at->second), "remove one");
        continue;
      }
      out.push_back(configuration(key.text, configs->items[i + 1], path));
    }
    return out;
  }

 private:
  Imported configuration(const std::string& name, const Node& node, const std::string& path) {
    Imported out;
    out.name = out.node.name = name;
    const auto& rules = items(node, path, rules_limit);
    if (node.kind == Node::Kind::sequence && node.items.empty())
      mistake(node, path, "needs one entry at least");
    for (std::size_t i = 0; i < rules.size(); ++i) rule(rules[i], at_item(path, i), out);
    for (std::size_t i = 0; i < out.node.gpus.size(); ++i) {
      for (std::size_t j = i + 1; j < out.node.gpus.size(); ++j) {
        if (!share_one(out.node.gpus[i], out.node.gpus[j])) continue;
        out.remarks.push_back(fmt::format(
            "the entries in lines {} and {} can name the same GPU: mig-parted applies one after the other, "
            "bulkhead refuses a GPU with two rules; keep the later one",
            out.node.gpus[i].line, out.node.gpus[j].line));
      }
    }
    return out;
  }

  void rule(const Node& node, const std::string& path, Imported& into) {
    const std::size_t before = mistakes.size();
    GpuRule out;
    out.line = node.line;
    const auto keys = fields(node, path, {"device-filter", "devices", "mig-enabled", "mig-devices"});
    bool none = false;
    if (const Node* at = required(keys, "devices", node, path))
      none = devices(*at, at_key(path, "devices"), out);
    if (const auto at = keys.find("device-filter"); at != keys.end())
      filter(*at->second, at_key(path, "device-filter"), out);
    if (!out.select.pci_id.empty()) out.select.all = false;
    const Node* enabled_at = required(keys, "mig-enabled", node, path);
    const auto enabled =
        enabled_at != nullptr ? boolean(*enabled_at, at_key(path, "mig-enabled")) : std::nullopt;
    const auto wanted = keys.find("mig-devices");
    out.mode = enabled == true ? Mode::mig : Mode::exclusive;
    if (wanted != keys.end()) {
      layout(*wanted->second, at_key(path, "mig-devices"), out, into);
      if (enabled == false && !out.layout.empty())
        mistake(*wanted->second, at_key(path, "mig-devices"), "has MIG devices while mig-enabled is false");
    } else if (enabled == true) {
      mistake(node, path, "mig-enabled is true but mig-devices is missing", "write mig-devices: {}");
    }
    if (mistakes.size() != before) return;
    if (none) {
      into.remarks.push_back(
          fmt::format("the entry in line {} names no GPU (devices: []) and was left out", node.line));
      return;
    }
    into.node.gpus.push_back(std::move(out));
  }

  // True when the list is empty: the entry is for nothing.
  bool devices(const Node& node, const std::string& path, GpuRule& out) {
    if (node.kind == Node::Kind::scalar) {
      out.select.all = node.text == "all";
      if (!out.select.all)
        mistake(node, path, fmt::format("{} is neither 'all' nor a list of indices", in_quotes(node.text)));
      return false;
    }
    for (const auto& item : items(node, path, limits::gpus)) {
      if (const auto index = number(item, path, 0, limits::gpus - 1)) out.select.index.push_back(*index);
    }
    std::sort(out.select.index.begin(), out.select.index.end());
    out.select.index.erase(std::unique(out.select.index.begin(), out.select.index.end()),
                           out.select.index.end());
    return node.kind == Node::Kind::sequence && node.items.empty();
  }

  // "0x233010DE": device id, then vendor id.
  void filter(const Node& node, const std::string& path, GpuRule& out) {
    for (const Node* item : one_or_more(node, path, rules_limit)) {
      const auto id = item->kind == Node::Kind::scalar ? parse_u64(item->text, 16) : std::nullopt;
      if (!id || *id > 0xffffffffU) {
        mistake(*item, path, fmt::format("{} is not a device id", in_quotes(item->text)),
                "write it like \"0x233010DE\"");
        continue;
      }
      out.select.pci_id.push_back(
          {static_cast<std::uint16_t>(*id & 0xffffU), static_cast<std::uint16_t>(*id >> 16U)});
    }
  }

  void layout(const Node& node, const std::string& path, GpuRule& out, Imported& into) {
    if (node.kind != Node::Kind::map) {
      mistake(node, path, "must be a mapping of profile names to counts");
      return;
    }
    std::map<std::string, unsigned> seen;
    for (std::size_t i = 0; i + 1 < node.items.size(); i += 2) {
      const Node& key = node.items[i];
      const std::string where = at_key(path, printable(key.text, 60));
      if (const auto [at, first] = seen.emplace(key.text, key.line); !first) {
        mistake(key, where, fmt::format("is given twice, first in line {}", at->second), "add the counts");
        continue;
      }
      const auto count = number(node.items[i + 1], where, 0, 64);
      if (!count) continue;
      Slice slice;
      slice.line = key.line;
      slice.column = key.column;
      const auto dot = key.text.find("c.");
      const auto compute =
          dot != std::string::npos ? parse_u64(std::string_view(key.text).substr(0, dot)) : std::nullopt;
      slice.profile = lower(compute ? key.text.substr(dot + 2) : key.text);
      if (key.kind != Node::Kind::scalar || !is_profile_name(slice.profile) ||
          slice.profile.starts_with("mig ")) {
        mistake(key, where, fmt::format("{} is not a MIG profile name", in_quotes(key.text)),
                "write it like 3g.40gb or 1g.10gb+me");
        continue;
      }
      if (*count == 0)
        into.remarks.push_back(fmt::format("line {}: {} with count 0 was left out", key.line, slice.profile));
      unsigned left = *count;
      if (compute) {
        // mig-parted fills a GPU instance with compute instances before it makes the next.
        const auto whole = parse_u64(std::string_view(slice.profile).substr(0, slice.profile.find('g')));
        const std::uint64_t part = compute.value_or(0);
        if (part == 0 || part > whole.value_or(0)) {
          mistake(key, where,
                  fmt::format("{} has more compute slices than its instance", in_quotes(key.text)));
          continue;
        }
        const unsigned each = static_cast<unsigned>(whole.value_or(0) / part);
        into.remarks.push_back(fmt::format("line {}: {} compute instances {} are put {} to an instance",
                                           key.line, left, key.text, each));
        while (left > 0) {
          const unsigned now = std::min(each, left);
          slice.compute.assign(now, fmt::format("{}c", part));
          out.layout.push_back(slice);
          left -= now;
        }
        continue;
      }
      out.layout.insert(out.layout.end(), left, slice);
    }
    if (out.layout.size() > 64) mistake(node, path, "has more than 64 instances");
  }
};

}  // namespace

std::variant<std::vector<Imported>, std::vector<Mistake>> import_mig_parted(std::string_view yaml) {
  auto tree = parse_tree(yaml);
  if (auto* mistakes = std::get_if<std::vector<Mistake>>(&tree)) return std::move(*mistakes);
  MigPartedReader reader;
  auto out = reader.configurations(std::get<Node>(tree));
  if (!reader.mistakes.empty()) return std::move(reader.mistakes);
  return out;
}

}  // namespace bulkhead::spec
