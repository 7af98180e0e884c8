#include <algorithm>
#include <bit>
#include <cstring>

#include <re2/re2.h>

#include "base/json.hpp"
#include "core/logs/logs.hpp"

namespace bulkhead::logs {

namespace {

constexpr std::size_t longest_line = 8192;

// Words that are no rule's: the driver's own lines, which are parsed by hand, and journal records whose
// message is an array of bytes because it is no UTF-8. A tenant brings that about by the name of a process.
constexpr std::array<std::string_view, 4> own_words = {"NVRM: Xid (", ": SXid (PCI:", "\"MESSAGE\":[",
                                                       "\"MESSAGE\" : ["};

std::uint64_t count_lines(std::string_view text) {
  std::uint64_t out = 0;
  std::size_t i = 0;
  for (; i + 8 <= text.size(); i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, text.data() + i, 8);
    word ^= 0x0a0a0a0a0a0a0a0aULL;
    const auto nonzero = ((word & 0x7f7f7f7f7f7f7f7fULL) + 0x7f7f7f7f7f7f7f7fULL) | word;
    out += 8U - static_cast<unsigned>(std::popcount(nonzero & 0x8080808080808080ULL));
  }
  for (; i < text.size(); ++i) out += text[i] == '\n' ? 1 : 0;
  return out;
}

std::optional<std::int64_t> number_of(const Json& record, const char* key) {
  const auto at = record.find(key);
  if (at == record.end()) return std::nullopt;
  if (at->is_number_integer()) return at->get<std::int64_t>();
  if (!at->is_string()) return std::nullopt;
  const auto& text = at->get_ref<const std::string&>();
  std::int64_t out = 0;
  if (text.empty() || text.size() > 18) return std::nullopt;
  for (const char c : text) {
    if (c < '0' || c > '9') return std::nullopt;
    out = out * 10 + (c - '0');
  }
  return out;
}

std::string text_of(const Json& record, const char* key) {
  const auto at = record.find(key);
  if (at == record.end()) return {};
  if (at->is_string()) return at->get<std::string>();
  std::string out;
  if (at->is_array() && at->size() <= longest_line)
    for (const auto& byte : *at)
      if (byte.is_number_unsigned()) out += static_cast<char>(byte.get<std::uint64_t>() & 0xffU);
  return out;
}

bool may_say(const Rule& rule, Speaker speaker) {
  switch (rule.where) {
    case Where::kmsg:
      return speaker != Speaker::program;
    case Where::audit:
      return true;  // the kernel's, or auditd's
    case Where::qemu:
    case Where::libvirt:
    case Where::fm:
    case Where::oci:
      return speaker != Speaker::kernel;
  }
  return false;
}

}  // namespace

struct Matcher::Inside {
  struct Compiled {
    std::unique_ptr<RE2> pattern;
    std::vector<std::pair<std::string, int>> groups;
    int count = 0;
  };
  std::vector<std::string_view> words;
  std::vector<std::size_t> rule_of;  // by word; the own words: beyond the rules
  std::vector<Compiled> compiled;
  std::unique_ptr<Filter> filter;

  // `which`: the rules a word of which stands in the line, in the table's order.
  bool fill(Hit& hit, const Head& head, const std::vector<std::size_t>& which) const {
    hit.speaker = head.speaker;
    hit.vouched = head.vouched;
    hit.program = std::string(head.program.substr(0, 128));
    hit.wall_ms = head.wall_ms;
    hit.boot_us = head.boot_us;
    hit.sequence = head.sequence;
    hit.text = std::make_unique<const std::string>(head.body.substr(0, longest_line));
    const std::string_view body = *hit.text;
    const bool kernel = head.speaker != Speaker::program;
    if ((hit.xid = xid::parse(body))) {
      hit.forged = !kernel;
      return true;
    }
    if ((hit.sxid = xid::parse_switch(body))) {
      hit.forged = !kernel;
      return true;
    }
    const auto table = rules();
    for (const auto index : which) {
      const auto& rule = table[index];
      if (!may_say(rule, head.speaker)) continue;
      const auto& re = compiled[index];
      std::array<re2::StringPiece, 10> groups;
      if (!re.pattern->Match(re2::StringPiece(body.data(), body.size()), 0, body.size(), RE2::UNANCHORED,
                             groups.data(), std::min(re.count + 1, static_cast<int>(groups.size()))))
        continue;
      hit.rule = &rule;
      for (const auto& [name, group] : re.groups)
        if (group < static_cast<int>(groups.size()) && !groups.at(static_cast<std::size_t>(group)).empty())
          hit.fields.emplace_back(name, std::string(groups.at(static_cast<std::size_t>(group))));
      return true;
    }
    return false;
  }

  std::optional<Hit> take(std::string_view line, WallTime now, std::vector<std::size_t>& which) const {
    while (line.ends_with('\r')) line.remove_suffix(1);
    if (line.size() > longest_line && !line.starts_with('{')) line = line.substr(0, longest_line);
    std::ranges::sort(which);
    which.erase(std::unique(which.begin(), which.end()), which.end());
    while (!which.empty() && which.back() >= rules().size()) which.pop_back();
    Hit hit;
    if (line.starts_with('{') && line.size() <= 1U << 20U) {
      if (const auto record = parse_json(line, 8); record.ok() && record->is_object()) {
        const auto message = text_of(*record, "MESSAGE");
        const auto identifier = text_of(*record, "SYSLOG_IDENTIFIER");
        Head head;
        // Fields that begin with an underscore are the journal's own; no client can set them.
        const bool kernel = text_of(*record, "_TRANSPORT") == "kernel";
        const bool known = record->contains("_TRANSPORT");
        head.speaker = kernel ? Speaker::kernel : known ? Speaker::program : Speaker::unknown;
        head.vouched = kernel;
        head.program = kernel ? std::string_view("kernel") : std::string_view(identifier);
        if (const auto wall = number_of(*record, "__REALTIME_TIMESTAMP")) head.wall_ms = *wall / 1000;
        head.boot_us = number_of(*record, "_SOURCE_MONOTONIC_TIMESTAMP");
        head.body = message;
        // The words were looked for in the record's form: a message of bytes was not seen through.
        std::vector<std::size_t> again;
        filter->scan(message, [&](std::size_t word, std::size_t) { again.push_back(rule_of[word]); });
        std::ranges::sort(again);
        again.erase(std::unique(again.begin(), again.end()), again.end());
        while (!again.empty() && again.back() >= rules().size()) again.pop_back();
        if (!fill(hit, head, again)) return std::nullopt;
        hit.line = (head.program.empty() ? "" : std::string(head.program) + ": ") + *hit.text;
        return hit;
      }
    }
    if (!fill(hit, head_of(line, now), which)) return std::nullopt;
    hit.line = std::string(line.substr(0, longest_line));
    return hit;
  }
};

Matcher::Matcher() : inside_(std::make_unique<Inside>()) {
  RE2::Options options;
  options.set_log_errors(false);
  options.set_encoding(RE2::Options::EncodingLatin1);  // bytes: a line need not be UTF-8
  options.set_max_mem(1 << 20);
  const auto table = rules();
  for (std::size_t i = 0; i < table.size(); ++i) {
    for (const auto needle : table[i].needles) {
      if (needle.empty()) continue;
      inside_->words.push_back(needle);
      inside_->rule_of.push_back(i);
    }
    Inside::Compiled one;
    one.pattern =
        std::make_unique<RE2>(re2::StringPiece(table[i].pattern.data(), table[i].pattern.size()), options);
    BH_ASSERT(one.pattern->ok());
    one.count = one.pattern->NumberOfCapturingGroups();
    for (const auto& [name, group] : one.pattern->NamedCapturingGroups())
      one.groups.emplace_back(name, group);
    inside_->compiled.push_back(std::move(one));
  }
  for (const auto word : own_words) {
    inside_->words.push_back(word);
    inside_->rule_of.push_back(table.size());
  }
  inside_->filter = std::make_unique<Filter>(inside_->words);
}
Matcher::~Matcher() = default;
Matcher::Matcher(Matcher&&) noexcept = default;
Matcher& Matcher::operator=(Matcher&&) noexcept = default;

const Filter& Matcher::filter() const { return *inside_->filter; }

Matcher::Found Matcher::match(std::string_view text, WallTime now, std::size_t limit) const {
  Found out;
  std::vector<std::size_t> which;
  std::size_t begin = 0;
  std::size_t end = 0;  // of the line that `which` is about
  std::size_t counted = 0;
  std::uint64_t number = 0;
  const auto close = [&] {
    if (which.empty()) return;
    number += count_lines(text.substr(counted, begin - counted));
    counted = begin;
    if (out.hits.size() >= limit) {
      out.cut = true;
    } else if (auto hit = inside_->take(text.substr(begin, end - begin), now, which)) {
      hit->number = number + 1;
      out.hits.push_back(std::move(*hit));
    }
    which.clear();
  };
  inside_->filter->scan(text, [&](std::size_t word, std::size_t at) {
    if (which.empty() || at >= end) {
      close();
      const auto before = at == 0 ? std::string_view::npos : text.rfind('\n', at - 1);
      begin = before == std::string_view::npos ? 0 : before + 1;
      const auto after = text.find('\n', at);
      end = after == std::string_view::npos ? text.size() : after;
    }
    which.push_back(inside_->rule_of[word]);
  });
  close();
  out.lines = number + count_lines(text.substr(counted)) + (!text.empty() && !text.ends_with('\n') ? 1 : 0);
  return out;
}

std::optional<Hit> Matcher::match_line(std::string_view line, WallTime now) const {
  std::vector<std::size_t> which;
  inside_->filter->scan(line,
                        [&](std::size_t word, std::size_t) { which.push_back(inside_->rule_of[word]); });
  if (which.empty()) return std::nullopt;
  auto hit = inside_->take(line, now, which);
  if (hit) hit->number = 1;
  return hit;
}

std::string_view Hit::field(std::string_view name) const {
  for (const auto& [key, value] : fields)
    if (key == name) return value;
  return {};
}

const Rule* find(std::string_view id) {
  for (const auto& rule : rules())
    if (rule.id == id) return &rule;
  return nullptr;
}

std::string_view name_of(Where where) {
  constexpr std::array<std::string_view, 6> names = {"kernel log",     "QEMU",  "libvirt",
                                                     "Fabric Manager", "audit", "container runtime"};
  return names.at(static_cast<std::size_t>(where));
}
std::string_view name_of(Kind kind) {
  constexpr std::array<std::string_view, 5> names = {"fault", "config", "noise", "info", "context"};
  return names.at(static_cast<std::size_t>(kind));
}

}  // namespace bulkhead::logs
