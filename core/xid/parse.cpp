// The lines of the driver, by hand: no regular expression ever meets what a tenant wrote.
#include <algorithm>
#include <array>
#include <charconv>

#include "core/xid/xid.hpp"

namespace bulkhead::xid {

namespace {

// Eats from the left of a text; every step says whether it could.
struct Cursor {
  std::string_view rest;

  bool eat(std::string_view word) {
    if (!rest.starts_with(word)) return false;
    rest.remove_prefix(word.size());
    return true;
  }
  // At least `least` and at most `most` digits of `base`.
  template <class T>
  bool number(T& out, std::size_t least, std::size_t most, int base = 10) {
    std::size_t digits = 0;
    while (digits < rest.size() && digits < most && is_digit(rest[digits], base)) ++digits;
    if (digits < least || (digits < rest.size() && is_digit(rest[digits], base))) return false;
    const auto [end, ec] = std::from_chars(rest.data(), rest.data() + digits, out, base);
    if (ec != std::errc() || end != rest.data() + digits) return false;
    rest.remove_prefix(digits);
    return true;
  }
  // Up to `stop`, which is eaten too.
  bool until(std::string_view stop, std::string_view& out) {
    const auto at = rest.find(stop);
    if (at == std::string_view::npos) return false;
    out = rest.substr(0, at);
    rest.remove_prefix(at + stop.size());
    return true;
  }
  static bool is_digit(char c, int base) {
    if (c >= '0' && c <= '9') return true;
    return base == 16 && ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'));
  }
};

bool pci(Cursor& in, PciAddress& out, bool must_have_function) {
  std::uint32_t domain = 0;
  std::uint8_t bus = 0;
  std::uint8_t device = 0;
  std::uint8_t function = 0;
  if (!in.number(domain, 4, 8, 16) || !in.eat(":") || !in.number(bus, 2, 2, 16) || !in.eat(":") ||
      !in.number(device, 2, 2, 16))
    return false;
  if (in.eat(".")) {
    if (!in.number(function, 1, 1) || function > 7) return false;
  } else if (must_have_function) {
    return false;
  }
  if (device > 31) return false;
  out = {domain, bus, device, function};
  return true;
}

// How messages of the driver begin: tells a comma inside a process's name from the one that ends it.
constexpr std::array<std::string_view, 14> openings = {
    "Ch ",       "channel ", "Channel ",     "Graphics", "GPU ",   "Contained: ", "Uncontained: ",
    "MMU Fault", "Timeout",  "errorString ", "DRAM Row", "NVLink", "CE",          "GR ",
};
constexpr std::size_t longest_name = 15;  // TASK_COMM_LEN without its end

void split_name(std::string_view text, Line& out) {
  std::size_t first = std::string_view::npos;
  for (auto at = text.find(", "); at != std::string_view::npos && at <= longest_name;
       at = text.find(", ", at + 1)) {
    if (first == std::string_view::npos) first = at;
    const auto after = text.substr(at + 2);
    if (std::ranges::any_of(openings, [&](std::string_view word) { return after.starts_with(word); })) {
      first = at;
      break;
    }
  }
  // Names longer than the kernel's come from drivers of other systems, and from cut lines.
  if (first == std::string_view::npos) first = text.find(", ");
  if (first == std::string_view::npos) {
    out.name = text;
    return;
  }
  out.name = text.substr(0, first);
  out.message = text.substr(first + 2);
}

std::optional<std::uint32_t> hex_word(Cursor& in) {
  std::uint32_t value = 0;
  if (!in.eat("0x") || !in.number(value, 1, 8, 16)) return std::nullopt;
  return value;
}

bool matches(std::string_view pattern, std::uint32_t value) {
  for (std::size_t i = 0; i < 32; ++i) {
    if (pattern[i] == '-') continue;
    const bool bit = ((value >> (31U - i)) & 1U) != 0;
    if (bit != (pattern[i] == '1')) return false;
  }
  return true;
}

template <class Rows>
auto find_in(const Rows& rows, unsigned id) -> decltype(rows.data()) {
  const auto at = std::ranges::lower_bound(rows, id, {}, [](const auto& row) { return row.id; });
  return at != rows.end() && at->id == id ? &*at : nullptr;
}

// The catalogue writes a unit that was renamed in R575 with both names, "NETIR_LINK_EVT/NETIR_LINK_DOWN"; a
// driver prints one of them, first in the message.
bool names_unit(std::string_view units, std::string_view head) {
  if (head.empty()) return true;  // no name in the line: the registers decide
  while (!units.empty()) {
    const auto unit = units.substr(0, units.find('/'));
    units.remove_prefix(std::min(units.size(), unit.size() + 1));
    if (head.starts_with(unit) &&
        (head.size() == unit.size() || head[unit.size()] == ' ' || head[unit.size()] == '/'))
      return true;
  }
  return false;
}

}  // namespace

std::optional<Line> parse(std::string_view body) {
  Cursor in{body};
  Line out;
  if (!in.eat("NVRM: Xid (")) return std::nullopt;
  (void)in.eat("PCI:");
  if (!pci(in, out.gpu, false)) return std::nullopt;
  unsigned instance = 0;
  if (in.eat(" GPU-I:")) {
    if (!in.number(instance, 1, 3)) return std::nullopt;
    out.gpu_instance = instance;
    if (in.eat(" GPU-CI:")) {
      if (!in.number(instance, 1, 3)) return std::nullopt;
      out.compute_instance = instance;
    }
  }
  if (!in.eat("): ") || !in.number(out.id, 1, 4)) return std::nullopt;
  if (in.rest.empty()) return out;
  if (!in.eat(", ")) return std::nullopt;
  if (in.eat("pid=")) {
    const bool quoted = in.eat("'");
    std::uint32_t pid = 0;
    if (in.number(pid, 1, 10)) {
      out.pid = pid;
    } else {
      (void)in.eat("<unknown>");
    }
    if (quoted) (void)in.eat("'");
    if (in.rest.empty()) return out;
    if (!in.eat(", ")) return std::nullopt;
    if (in.eat("name=")) {
      split_name(in.rest, out);
    } else {
      out.message = in.rest;
    }
  } else {
    out.message = in.rest;
  }
  constexpr std::string_view tail = " caused by previous Xid ";
  if (const auto at = out.message.rfind(tail); at != std::string_view::npos) {
    Cursor number{out.message.substr(at + tail.size())};
    unsigned previous = 0;
    if (number.number(previous, 1, 4) && number.rest.empty()) {
      out.previous = previous;
      out.message = out.message.substr(0, at);
    }
  }
  return out;
}

std::optional<Containment> containment(const Line& line) {
  if (line.id != 94 && line.id != 95) return std::nullopt;
  auto text = line.message;
  Containment out;
  const auto flag = [&](std::string_view word, bool& into) {
    for (const bool yes : {true, false}) {
      const std::string_view value = yes ? "Yes" : "No";
      if (text.ends_with(value) && text.substr(0, text.size() - value.size()).ends_with(word)) {
        text.remove_suffix(value.size() + word.size());
        into = yes;
        return true;
      }
    }
    return false;
  };
  if (!flag(", D-RST: ", out.drain_and_reset) || !flag("RST: ", out.reset)) return std::nullopt;
  // The last of them: what stands before may be a name.
  const auto contained = text.rfind("Contained: ");
  const auto uncontained = text.rfind("Uncontained: ");
  if (uncontained != std::string_view::npos &&
      (contained == std::string_view::npos || uncontained > contained)) {
    text.remove_prefix(uncontained + 13);
  } else if (contained != std::string_view::npos) {
    out.contained = true;
    text.remove_prefix(contained + 11);
  } else {
    return std::nullopt;
  }
  out.unit = text.substr(0, text.find_first_of(".("));
  while (out.unit.ends_with(' ')) out.unit.remove_suffix(1);
  // The names are those of error_cont.h, NV_ERROR_CONT_ERR_ID_STRING_PUBLIC; what each kills is in the two
  // tables of S4, which agree where both have the unit.
  constexpr std::array<std::string_view, 8> one_address_space = {"SM",    "CE User Channel", "MMU",   "GCC",
                                                                 "CTXSW", "NVDEC",           "NVJPG", "OFA"};
  constexpr std::array<std::string_view, 3> one_instance = {"DED CBC", "LTC GPC", "PCIE Ingress"};
  constexpr std::array<std::string_view, 4> all = {"PMU", "SEC2", "GSP", "FB Falcon"};
  if (!out.contained || std::ranges::find(all, out.unit) != all.end()) {
    out.reach = Scope::gpu;
  } else if (std::ranges::find(one_instance, out.unit) != one_instance.end()) {
    out.reach = Scope::vm;
  } else if (std::ranges::find(one_address_space, out.unit) != one_address_space.end()) {
    out.reach = Scope::process;
  }
  return out;
}

std::optional<RecoveryChange> recovery(const Line& line) {
  if (line.id != 154) return std::nullopt;
  const auto at = line.message.rfind("GPU recovery action changed from 0x");
  if (at == std::string_view::npos) return std::nullopt;
  Cursor in{line.message.substr(at + 35)};
  RecoveryChange out;
  std::string_view ignored;
  if (!in.number(out.from, 1, 8, 16) || !in.eat(" (") || !in.until(") to 0x", ignored) ||
      !in.number(out.to, 1, 8, 16) || !in.eat(" (") || !in.until(")", out.to_text))
    return std::nullopt;
  return out;
}

std::optional<Place> place(const Line& line) {
  const auto at = line.message.find("GPC ");
  if (at == std::string_view::npos) return std::nullopt;
  Cursor in{line.message.substr(at + 4)};
  Place out;
  if (!in.number(out.gpc, 1, 3) || !in.eat(", TPC ") || !in.number(out.tpc, 1, 3)) return std::nullopt;
  unsigned sm = 0;
  if (in.eat(", SM ") && in.number(sm, 1, 3)) out.sm = sm;
  return out;
}

std::optional<SwitchLine> parse_switch(std::string_view body) {
  Cursor in{body};
  SwitchLine out;
  if (!in.eat("nvidia-nvswitch") || !in.number(out.nvswitch, 1, 3) || !in.eat(": SXid (PCI:") ||
      !pci(in, out.at, true) || !in.eat("): ") || !in.number(out.id, 5, 5) || !in.eat(", "))
    return std::nullopt;
  for (const std::string_view severity : {"Correctable", "Non-fatal", "Fatal"}) {
    Cursor ahead = in;
    if (!ahead.eat(severity) || !ahead.eat(", ")) continue;
    out.severity = severity;
    out.counts = true;
    in = ahead;
    unsigned link = 0;
    if (ahead.eat("Link ") && ahead.number(link, 1, 3)) {
      out.link = link;
      (void)ahead.eat(" ");
      in = ahead;
    }
    break;
  }
  out.message = in.rest;
  // Errors of the whole switch have no severity of a link; their details say so themselves.
  if (!out.counts) out.counts = !out.message.starts_with("Severity ") && !out.message.starts_with("Data {");
  return out;
}

std::optional<LinkFault> link_fault(const Line& line) {
  if (line.id < 144 || line.id > 150) return std::nullopt;
  // From the end: "... Link 08 (0x.. 0x.. ...)"; what stands before may be a name.
  const auto open = line.message.rfind(" (0x");
  if (open == std::string_view::npos || !line.message.ends_with(')')) return std::nullopt;
  Cursor registers{line.message.substr(open + 2)};
  LinkFault out;
  const auto intr = hex_word(registers);
  if (!intr || !registers.eat(" ")) return std::nullopt;
  const auto status = hex_word(registers);
  if (!status) return std::nullopt;
  out.intr_info = *intr;
  out.error_status = *status;
  const auto head = line.message.substr(0, open);
  if (const auto at = head.rfind("Link "); at != std::string_view::npos) {
    Cursor number{head.substr(at + 5)};
    unsigned link = 0;
    if (number.number(link, 1, 3)) out.link = static_cast<int>(link);
  }
  out.sub = head.substr(0, head.find(' '));
  for (const std::string_view severity : {" Link Fatal ", " Non-fatal ", " Nonfatal ", " Fatal "}) {
    if (head.find(severity) == std::string_view::npos) continue;
    out.severity = severity.substr(1, severity.size() - 2);
    break;
  }
  // The exact errorStatus first, then a row of which a bit is set, then one that takes any.
  int best = 0;
  for (const auto& row : link_catalogue()) {
    if (row.xid != line.id || !names_unit(row.sub, head)) continue;
    if (!matches(row.intr_v2, out.intr_info) && !matches(row.intr_v1, out.intr_info)) continue;
    const auto wanted = static_cast<std::uint32_t>(row.status);
    int fits = 0;
    if (row.status < 0) {
      fits = 1;
    } else if (wanted == out.error_status) {
      fits = 3;
    } else if (wanted != 0 && (wanted & (wanted - 1)) == 0 && (wanted & out.error_status) != 0) {
      fits = 2;
    }
    if (fits > best) {
      best = fits;
      out.row = &row;
    }
  }
  return out;
}

namespace {
std::optional<std::array<std::uint32_t, 7>> nvlink4_registers(const Line& line) {
  if (line.id != 74) return std::nullopt;
  const auto open = line.message.rfind("(0x");
  if (open == std::string_view::npos) return std::nullopt;
  Cursor in{line.message.substr(open + 1)};
  std::array<std::uint32_t, 7> registers = {};
  for (std::size_t i = 0; i < registers.size(); ++i) {
    if (i > 0 && !in.eat(", ")) return std::nullopt;
    const auto word = hex_word(in);
    if (!word) return std::nullopt;
    registers.at(i) = *word;
  }
  if (!in.eat(")")) return std::nullopt;
  return registers;
}
}  // namespace

LinkAsks nvlink4_asks(const Line& line) {
  const auto registers = nvlink4_registers(line);
  if (!registers) return LinkAsks::unknown;
  struct Bits {
    std::uint32_t ignore, other, acts;
  };
  const auto bits = [](std::initializer_list<unsigned> list) {
    std::uint32_t out = 0;
    for (const auto bit : list) out |= 1U << bit;
    return out;
  };
  // S1, the workflow of Xid 74; Hopper fills the registers 1, 3, 4 and 5.
  const std::array<Bits, 7> table = {
      {{bits({0, 23, 30}), bits({1, 20}), bits({4, 5, 8, 9, 12, 16, 17, 21, 22, 24, 27, 28, 29})},
       {},
       {0, 0, bits({0, 1, 2, 6, 13, 16, 17, 18, 19})},
       {0, bits({16, 17}), bits({18})},
       {0, 0, bits({18, 19, 21, 22, 24, 25, 27, 28})},
       {},
       {}}};
  auto out = LinkAsks::unknown;
  bool any = false;
  for (std::size_t i = 0; i < table.size(); ++i) {
    const auto value = registers->at(i);
    const auto& row = table.at(i);
    if (value == 0) continue;
    any = true;
    if ((value & ~(row.ignore | row.other | row.acts)) != 0) return LinkAsks::unknown;
    const auto asks = (value & row.acts) != 0    ? LinkAsks::something
                      : (value & row.other) != 0 ? LinkAsks::the_other
                                                 : LinkAsks::nothing;
    out = std::max(out, asks);
  }
  return any ? out : LinkAsks::unknown;
}

std::string nvlink4_words(const Line& line) {
  const auto found = nvlink4_registers(line);
  if (!found) return {};
  const auto& registers = *found;
  struct Meaning {
    unsigned reg;
    std::uint32_t bits;
    std::string_view says;
  };
  const auto bits = [](std::initializer_list<unsigned> list) {
    std::uint32_t out = 0;
    for (const auto bit : list) out |= 1U << bit;
    return out;
  };
  // NVIDIA's workflow of Xid 74 (S1); bits that it says to ignore are not here.
  const std::array<Meaning, 11> meanings = {{
      {1, bits({8, 9, 12, 16, 17, 24, 28}), "may be hardware, or mechanical: look at cables and seating"},
      {1, bits({4, 5}), "ECC or parity in hardware; more than twice on one link: the GPU is at fault"},
      {1, bits({21, 22}), "marginal signal integrity"},
      {1, bits({1, 20}), "a consequence of another error"},
      {1, bits({27, 29}), "report it if it repeats"},
      {3, bits({0, 1, 2, 6}), "ECC or parity in hardware; more than twice on one link: the GPU is at fault"},
      {3, bits({13}), "unexpected"},
      {3, bits({16, 19}), "run the field diagnostic if it repeats"},
      {3, bits({17, 18}), "report it if it repeats"},
      {4, bits({16, 17, 18}), "a consequence of another error; bit 18 needs the fabric reset"},
      {5, bits({18, 19, 21, 22, 24, 25, 27, 28}),
       "ECC or parity in hardware; more than twice on one link: the GPU is at fault"},
  }};
  std::string out;
  for (const auto& meaning : meanings) {
    const auto set = registers.at(meaning.reg - 1) & meaning.bits;
    if (set == 0) continue;
    std::string which;
    for (unsigned bit = 0; bit < 32; ++bit)
      if ((set >> bit & 1U) != 0) which += (which.empty() ? "" : ",") + std::to_string(bit);
    if (!out.empty()) out += "; ";
    out += "register " + std::to_string(meaning.reg) + " bit " + which + ": " + std::string(meaning.says);
  }
  return out;
}

const Row* find(unsigned id) { return find_in(catalogue(), id); }
const SwitchRow* find_switch(unsigned id) { return find_in(switch_catalogue(), id); }

std::string_view bucket_text(std::string_view name) {
  for (const auto& bucket : buckets())
    if (bucket.name == name) return bucket.says;
  return {};
}

std::string_view name_of(Severity severity) {
  constexpr std::array<std::string_view, 6> names = {"unknown",  "info",    "warn",
                                                     "critical", "by-text", "by-decode"};
  return names.at(static_cast<std::size_t>(severity));
}
std::string_view name_of(Scope scope) {
  constexpr std::array<std::string_view, 7> names = {"unknown", "nothing", "process", "vm",
                                                     "link",    "gpu",     "node"};
  return names.at(static_cast<std::size_t>(scope));
}
std::string_view name_of(Attribution attribution) {
  constexpr std::array<std::string_view, 5> names = {"unknown", "nobody", "channel", "caller", "victim"};
  return names.at(static_cast<std::size_t>(attribution));
}
std::string_view name_of(SwitchKind kind) {
  constexpr std::array<std::string_view, 12> names = {
      "unknown",       "info",        "corrected",  "watch",        "configuration", "vm",
      "thermal-start", "thermal-end", "fatal-port", "fatal-switch", "fatal-fabric",  "reset-all"};
  return names.at(static_cast<std::size_t>(kind));
}
std::string_view text_of(SwitchKind kind) {
  constexpr std::array<std::string_view, 12> texts = {
      "known by name alone: NVIDIA's guide does not say what it means",
      "for information",
      "corrected; nothing to do",
      "a marginal link if it repeats: look at connections",
      "fabric partitions are misconfigured, or something reached outside its own",
      "the virtual machine that hit it has to start again",
      "the switch became too hot",
      "the switch is cool again",
      "fatal for one port: of a GPU, that GPU and its tenants; of a trunk, every partition whose traffic "
      "crosses it",
      "fatal for this switch: every GPU behind it",
      "fatal for the whole fabric: restart the host, or reset all GPUs and NVSwitches together",
      "reset all GPUs and NVSwitches together",
  };
  return texts.at(static_cast<std::size_t>(kind));
}

}  // namespace bulkhead::xid
