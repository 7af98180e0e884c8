// One archive for a support case. What is packed is a list of paths; what looks like a secret is taken out of
// every text, because a log holds whatever somebody logged.
#include <algorithm>
#include <array>
#include <cctype>
#include <optional>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"
#include "edge/archive/archive.hpp"
#include "engine/diagnose/diagnose.hpp"

namespace bulkhead::diagnose {

namespace {

constexpr std::size_t most_bytes = 64U << 20U;
constexpr std::size_t most_of_one = 16U << 20U;

constexpr std::array<std::string_view, 19> files = {"etc/os-release",
                                                    "proc/version",
                                                    "proc/cmdline",
                                                    "proc/meminfo",
                                                    "proc/cpuinfo",
                                                    "proc/modules",
                                                    "proc/devices",
                                                    "proc/iomem",
                                                    "proc/driver/nvidia/version",
                                                    "proc/driver/nvidia/params",
                                                    "proc/driver/nvidia-caps/mig-minors",
                                                    "etc/bulkhead/node.yaml",
                                                    "var/log/fabricmanager.log",
                                                    "var/log/kern.log",
                                                    "var/log/dmesg",
                                                    "var/log/syslog",
                                                    "var/log/messages",
                                                    "sys/module/nvidia/version",
                                                    "sys/devices/virtual/dmi/id/bios_version"};

bool word_character(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '-';
}

// Names whose value is a secret, wherever they end such a word: HF_TOKEN=..., "api_key": "...".
constexpr std::array<std::string_view, 11> names = {
    "token",      "password",    "passwd",     "secret",        "api_key",    "apikey",
    "access_key", "private_key", "credential", "authorization", "session_key"};
constexpr std::array<std::string_view, 7> prefixes = {"ghp_", "github_pat_", "hf_",     "sk-",
                                                      "AKIA", "xoxb-",       "eyJhbGci"};

bool is_name(std::string_view word) {
  return std::ranges::any_of(names, [&](std::string_view name) { return word.ends_with(name); });
}

struct Value {
  std::size_t from, to;
};

// What follows a name that ends at `end`: nothing where no : or = does.
std::optional<Value> value_of(std::string_view text, std::string_view name, std::size_t end) {
  // JSON in JSON has a backslash before each of its quotes.
  const auto quote = [&](std::size_t k) { return text[k] == '"' || text[k] == '\''; };
  const auto between = [&](std::size_t k) { return text[k] == ' ' || text[k] == '\\' || quote(k); };
  auto from = end;
  while (from < text.size() && between(from)) ++from;
  if (from == text.size() || (text[from] != '=' && text[from] != ':')) return std::nullopt;
  ++from;
  char opened = 0;  // what is quoted ends at that quote, whatever stands in it
  while (from < text.size() && between(from)) {
    if (quote(from)) opened = text[from];
    ++from;
  }
  const bool header = name.ends_with("authorization");  // two words
  auto to = from;
  while (
      to < text.size() && text[to] != '\n' &&
      (opened != 0 ? text[to] != opened : header || (text[to] != ' ' && text[to] != ',' && text[to] != ';')))
    ++to;
  return to > from ? std::optional(Value{from, to}) : std::nullopt;
}

// "TOKEN= password: x", "token: Bearer x": where what is taken out ends in a name itself, that one's value
// goes with it.
std::size_t with_next(std::string_view text, std::string_view small, std::size_t from, std::size_t to) {
  for (;;) {
    auto end = to;
    while (end > from && std::string_view(" \"'\\:=").find(text[end - 1]) != std::string_view::npos) --end;
    const auto name = small.substr(from, end - from);
    if (name.ends_with("bearer") && to < text.size() && text[to] == ' ') {
      from = ++to;
      while (to < text.size() && static_cast<unsigned char>(text[to]) > ' ' && text[to] != '"') ++to;
      continue;
    }
    if (!is_name(name)) return to;
    const auto value = value_of(text, name, end);
    if (!value || value->to <= to) return to;
    from = std::max(to, value->from);
    to = value->to;
  }
}

}  // namespace

std::string without_secrets(std::string_view text, std::uint64_t& removed) {
  std::string out;
  out.reserve(text.size());
  const auto small = lower(text);
  std::size_t at = 0;
  const auto cut_to = [&](std::size_t from, std::size_t to) {
    out.append(text.substr(at, from - at));
    out += "[removed]";
    at = to;
    ++removed;
  };
  for (std::size_t i = 0; i < text.size();) {
    if (text.compare(i, 11, "-----BEGIN ") == 0) {
      const auto key = text.find("PRIVATE KEY", i);
      const auto end = text.find("-----END ", i);
      if (key != std::string_view::npos && key < i + 40) {
        const auto close =
            end == std::string_view::npos ? text.size() : std::min(text.find('\n', end), text.size());
        cut_to(i, close);
        i = close;
        continue;
      }
    }
    if (i > 0 && word_character(text[i - 1])) {
      ++i;
      continue;
    }
    if (!word_character(text[i])) {
      ++i;
      continue;
    }
    std::size_t end = i;
    while (end < text.size() && word_character(text[end])) ++end;
    const auto word = std::string_view(small).substr(i, end - i);
    bool whole = false;
    for (const auto prefix : prefixes)
      whole = whole || (text.substr(i).starts_with(prefix) && end - i > prefix.size() + 12);
    if (word.starts_with("bearer") && end < text.size() && text[end] == ' ') {
      auto stop = end + 1;
      while (stop < text.size() && static_cast<unsigned char>(text[stop]) > ' ' && text[stop] != '"') ++stop;
      if (stop > end + 8) {
        stop = with_next(text, small, end + 1, stop);
        cut_to(end + 1, stop);
        i = stop;
        continue;
      }
    }
    if (whole) {
      auto stop = end;
      while (stop < text.size() && (word_character(text[stop]) || text[stop] == '.')) ++stop;
      stop = with_next(text, small, i, stop);
      cut_to(i, stop);
      i = stop;
      continue;
    }
    if (is_name(word)) {
      if (const auto value = value_of(text, word, end)) {
        const auto stop = with_next(text, small, value->from, value->to);
        cut_to(value->from, stop);
        i = stop;
        continue;
      }
    }
    i = end;
  }
  out.append(text.substr(at));
  return out;
}

Result<Packed> bundle(const std::filesystem::path& root, const std::filesystem::path& to,
                      const std::vector<Input>& extra, WallTime now) {
  Packed out;
  std::vector<archive::Member> members;
  std::size_t total = 0;
  const auto add = [&](std::string name, std::string_view content) {
    auto text = without_secrets(content, out.redacted);
    if (total + text.size() > most_bytes) {
      out.left_out.push_back(name + ": the bundle is full (64 MiB)");
      return;
    }
    total += text.size();
    out.members.push_back(name);
    members.push_back({"bundle/" + std::move(name), std::move(text)});
  };
  for (const auto& one : extra) add(one.name, one.text);
  std::uint64_t lost = 0;
  if (const auto kernel = read_kernel_log(root, lost); kernel.ok()) {
    add("kmsg.txt", kernel->text);
  } else {
    out.left_out.push_back("kmsg.txt: " + kernel.error().message());
  }
  std::vector<std::string> paths(files.begin(), files.end());
  for (const auto* directory : {"proc/driver/nvidia/gpus", "var/log/libvirt/qemu"}) {
    const auto names_in = list_directory(root / directory);
    if (!names_in.ok()) continue;
    for (const auto& name : *names_in) {
      if (paths.size() > 128) break;
      const auto path = std::string(directory) + "/" + name;
      paths.push_back(path.starts_with("proc/") ? path + "/information" : path);
    }
  }
  for (const auto& path : paths) {
    auto content = read_file(root / path, 1U << 30U);
    if (!content.ok()) {
      if (content.error().code() != Errc::not_found)
        out.left_out.push_back(path + ": " + content.error().message());
      continue;
    }
    std::string_view text = *content;
    if (text.size() > most_of_one) {  // the end is what happened last
      text = text.substr(text.size() - most_of_one);
      text = text.substr(std::min(text.find('\n'), text.size() - 1) + 1);
      out.left_out.push_back(path + ": all but its last 16 MiB");
    }
    if (path.size() > 90) continue;
    add(path, text);
  }
  BH_TRY(const auto packed, archive::tar(members, now));
  BH_TRY(const auto small, archive::gzip(packed));
  BH_CHECK(write_file_atomic(to, small, 0600));
  out.bytes = small.size();
  return out;
}

}  // namespace bulkhead::diagnose
