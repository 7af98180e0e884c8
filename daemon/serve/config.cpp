// /etc/bulkhead/serve.yaml, every mistake at once.
#include <arpa/inet.h>

#include <algorithm>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/tenant/tenant.hpp"
#include "daemon/serve/serve.hpp"

namespace bulkhead::serve {

namespace {

using yaml::Node;

constexpr std::size_t path_bytes = 4096, most_locals = 256;

struct Unit {
  std::string_view name;
  std::uint64_t factor;
};

// "30s" with the units given; the longest unit's name first.
std::optional<std::uint64_t> with_unit(std::string_view text, std::initializer_list<Unit> units) {
  for (const auto& unit : units) {
    if (!text.ends_with(unit.name)) continue;
    const auto number = parse_u64(text.substr(0, text.size() - unit.name.size()));
    if (!number || *number > UINT64_MAX / unit.factor) return std::nullopt;
    return *number * unit.factor;
  }
  return std::nullopt;
}

class ConfigReader : public yaml::Reader {
 public:
  Config config(const Node& root) {
    Config out;
    const auto top = fields(root, "",
                            {"listen", "socket", "state", "node_file", "certificate", "key", "names",
                             "client_ca", "local", "requests_per_second", "streams", "connections",
                             "connections_of_one", "body", "answer_time", "grace", "access_log",
                             "telemetry", "sample_every", "dcgm_names"});
    const auto at = [&](std::string_view key) {
      const auto found = top.find(key);
      return found == top.end() ? nullptr : found->second;
    };
    if (const Node* node = at("listen")) listen(*node, out);
    if (const Node* node = at("socket")) {
      if (node->kind == Node::Kind::scalar && node->text == "none")
        out.socket.clear();
      else
        out.socket = path(node, "socket").value_or(out.socket);
      if (out.socket.size() > 107)
        mistake(*node, "socket", fmt::format("has {} bytes, the kernel takes 107", out.socket.size()));
    }
    if (const Node* node = at("names"))
      for (const Node* one : one_or_more(*node, "names", 64))
        if (auto name = text(*one, "names", 253)) out.names.push_back(std::move(*name));
    out.state = path(at("state"), "state").value_or("");
    out.node_file = path(at("node_file"), "node_file").value_or("");
    out.certificate = path(at("certificate"), "certificate").value_or("");
    out.key = path(at("key"), "key").value_or("");
    out.client_ca = path(at("client_ca"), "client_ca").value_or("");
    if (out.certificate.empty() != out.key.empty()) {
      const Node* node = out.certificate.empty() ? at("key") : at("certificate");
      mistake(*node, out.certificate.empty() ? "key" : "certificate",
              "certificate and key go together: give both, or neither for a certificate of its own");
    }
    if (const Node* node = at("local")) {
      const auto& all = items(*node, "local", most_locals);
      for (std::size_t i = 0; i < all.size(); ++i)
        out.local.push_back(local(all[i], yaml::at_item("local", i)));
    }
    if (const Node* node = at("requests_per_second"))
      out.requests_per_second = number(*node, "requests_per_second", 1, 1'000'000).value_or(1);
    const auto count = [&](std::string_view key, std::size_t& value, unsigned least, unsigned most) {
      if (const Node* node = at(key))
        if (const auto said = number(*node, std::string(key), least, most)) value = *said;
    };
    count("streams", out.streams, 0, 100'000);
    count("connections", out.connections, 8, 1'000'000);
    count("connections_of_one", out.connections_of_one, 1, 1'000'000);
    if (const Node* node = at("body")) {
      const auto bytes = quantity(*node, "body", {{"MiB", 1U << 20U}, {"KiB", 1U << 10U}, {"", 1}}, "1MiB",
                                  1024, 64U << 20U);
      out.body = bytes.value_or(out.body);
    }
    const auto time = [&](std::string_view key, std::chrono::milliseconds& value, std::uint64_t least) {
      const Node* node = at(key);
      if (node == nullptr) return;
      const auto ms =
          quantity(*node, std::string(key), {{"ms", 1}, {"s", 1000}, {"m", 60'000}}, "10s", least, 600'000);
      if (ms) value = std::chrono::milliseconds(static_cast<std::int64_t>(*ms));
    };
    time("answer_time", out.answer_time, 1000);
    time("grace", out.grace, 0);
    time("sample_every", out.sample_every, 10);
    if (const Node* node = at("telemetry")) {
      // "on" and "off" are what people write here.
      if (node->kind == Node::Kind::scalar && (node->text == "on" || node->text == "off"))
        out.telemetry = node->text == "on";
      else
        out.telemetry = boolean(*node, "telemetry").value_or(true);
    }
    if (const Node* node = at("dcgm_names")) out.dcgm_names = boolean(*node, "dcgm_names").value_or(false);
    if (const Node* node = at("access_log")) out.access_log = boolean(*node, "access_log").value_or(true);
    if (out.listen.empty() && out.socket.empty())
      mistake(root, "listen", "nothing is listened on: neither listen nor socket says where");
    return out;
  }

 private:
  std::optional<std::string> path(const Node* node, const std::string& key) {
    if (node == nullptr) return std::nullopt;
    if (node->kind == Node::Kind::scalar && node->text.empty()) return std::string();
    auto said = text(*node, key, path_bytes);
    if (said && !said->starts_with('/')) {
      mistake(*node, key, fmt::format("{} is no absolute path", yaml::in_quotes(*said)),
              "a daemon has no folder of its own: start with /");
      return std::nullopt;
    }
    return said;
  }

  void listen(const Node& node, Config& out) {
    const auto said = text(node, "listen", 100);
    if (!said) return;
    out.listen = *said == "none" ? "" : *said;
    if (out.listen.empty()) return;
    if (const auto parsed = parse_listen(*said); !parsed.ok())
      mistake(node, "listen", parsed.error().message(),
              parsed.error().hint() + ", or none for the socket alone");
  }

  std::optional<std::uint64_t> quantity(const Node& node, const std::string& key,
                                        std::initializer_list<Unit> units, std::string_view example,
                                        std::uint64_t least, std::uint64_t most) {
    const auto said = text(node, key, 32);
    if (!said) return std::nullopt;
    const auto value = with_unit(*said, units);
    if (!value || *value < least || *value > most) {
      mistake(node, key, fmt::format("{} is out of bounds or not understood", yaml::in_quotes(*said)),
              fmt::format("write it like {}", example));
      return std::nullopt;
    }
    return value;
  }

  Config::Local local(const Node& node, const std::string& where) {
    Config::Local out;
    const auto keys = fields(node, where, {"user", "group", "tenant", "role"});
    const auto word = [&](std::string_view key) -> std::optional<std::string> {
      const auto at = keys.find(key);
      return at == keys.end() ? std::nullopt : text(*at->second, yaml::at_key(where, key), 100);
    };
    out.user = word("user").value_or("");
    out.group = word("group").value_or("");
    if (node.kind == Node::Kind::map && keys.contains("user") == keys.contains("group"))
      mistake(node, where, "says who by user or by group: give one of the two");
    if (const auto role = word("role")) {
      if (const auto parsed = access::parse_role(*role); parsed.ok()) {
        out.role = *parsed;
      } else {
        mistake(*keys.at("role"), yaml::at_key(where, "role"), parsed.error().message(),
                yaml::meant(*role, {"admin", "operator", "tenant", "auditor"}));
      }
    }
    if (const auto tenant = word("tenant")) {
      if (const auto name = tenant::parse_name(*tenant); name.ok()) {
        out.tenant = *name;
      } else {
        mistake(*keys.at("tenant"), yaml::at_key(where, "tenant"), name.error().message());
      }
    } else if (out.role == access::Role::tenant && !keys.contains("tenant") && node.kind == Node::Kind::map) {
      mistake(node, where, "role tenant needs a tenant", "add tenant: NAME, or role: auditor");
    }
    return out;
  }
};

}  // namespace

Result<std::pair<std::string, std::uint16_t>> parse_listen(std::string_view text) {
  const Error bad(Errc::invalid, fmt::format("{} is no address to listen on", yaml::in_quotes(text)),
                  "write it like 0.0.0.0:443, [::]:443, 127.0.0.1:8443 or :8443");
  const auto colon = text.rfind(':');
  std::string host;
  if (colon != std::string_view::npos) host = text.substr(0, colon);
  const auto port = parse_u64(colon == std::string_view::npos ? text : text.substr(colon + 1));
  if (!port || *port > 65535) return bad;
  in6_addr six{};
  in_addr four{};
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
    if (::inet_pton(AF_INET6, host.c_str(), &six) != 1) return bad;
  } else if (host.empty() || host == "*") {
    host = "0.0.0.0";
  } else if (host != "localhost" && ::inet_pton(AF_INET, host.c_str(), &four) != 1) {
    return bad;
  }
  return std::pair<std::string, std::uint16_t>(host, static_cast<std::uint16_t>(*port));
}

std::variant<Config, std::vector<yaml::Mistake>> parse(std::string_view text) {
  if (trim(text).empty()) return Config{};
  auto tree = yaml::parse_tree(text);
  if (auto* mistakes = std::get_if<std::vector<yaml::Mistake>>(&tree)) return std::move(*mistakes);
  auto& root = std::get<Node>(tree);
  if (root.kind == Node::Kind::null) root.kind = Node::Kind::map;  // all as it comes
  ConfigReader reader;
  Config config = reader.config(root);
  if (reader.mistakes.empty()) return config;
  return reader.in_order();
}

}  // namespace bulkhead::serve
