// Lines of kernel, hypervisor, Fabric Manager and container runtimes: which of them mean something. One pass
// over a buffer, of any size, finds the few lines that hold a word of a rule; those alone are taken apart.
// Text of tenants stands in these lines: what a line says is believed only from who may say it (the kernel's
// rules from the kernel), and patterns run in linear time (RE2).
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/clock.hpp"
#include "core/xid/xid.hpp"

namespace bulkhead::logs {

enum class Where : std::uint8_t { kmsg, qemu, libvirt, fm, audit, oci };
enum class Kind : std::uint8_t {
  fault,
  config,   // nothing is broken but the set-up
  noise,    // looks bad and is not
  info,     // explains or closes others
  context,  // tells what the host is
};
std::string_view name_of(Where where);
std::string_view name_of(Kind kind);

struct Rule {
  std::string_view id = {};  // "pci.d3cold"
  Where where = Where::kmsg;
  Kind kind = Kind::fault;
  std::array<std::string_view, 4> needles =
      {};                         // one of them stands in every line that matches, 4 bytes or more
  std::string_view pattern = {};  // RE2; named groups become fields
  std::string_view scope = {};
  unsigned lines_after = 0;  // lines that belong to this one
  std::string_view cause = {};
  std::string_view remedy = {};
  std::string_view how = {};  // how well the words are known: source, report, knowledge
  std::string_view source = {};
  std::array<std::string_view, 3> examples = {};
};
std::span<const Rule> rules();
const Rule* find(std::string_view id);

// ---- who says a line, and when
enum class Speaker : std::uint8_t {
  kernel,   // the kernel's ring buffer, or a journal that says so
  program,  // named by syslog or journal
  unknown,  // a bare line: a file of its own, or somebody's clipboard
};
struct Head {
  Speaker speaker = Speaker::unknown;
  std::string_view program = {};             // "kernel", "nv-fabricmanager"
  std::optional<std::uint32_t> pid = {};     // of the program
  std::optional<std::int64_t> wall_ms = {};  // since 1970; a year that is not written is that of `now`
  std::optional<std::int64_t> boot_us = {};  // since the kernel began
  std::optional<std::uint64_t> sequence = {};
  bool vouched = false;
  std::string_view body = {};
};
// Takes the forms of dmesg (plain, -T, -x, --time-format iso), /dev/kmsg, syslog (both times), journalctl -o
// short, short-iso, and Fabric Manager's own log. Never fails: what has no head is all body.
Head head_of(std::string_view line, WallTime now);

struct Hit {
  std::string line = {};                         // as it was in the file, without its end
  std::unique_ptr<const std::string> text = {};  // the message alone; the views below are into it
  std::uint64_t number = 0;                      // of the line, from 1
  Speaker speaker = Speaker::unknown;
  bool vouched = false;  // of a form that only the kernel fills: dmesg, /dev/kmsg, a journal's own record
  std::string program = {};
  std::optional<std::int64_t> wall_ms = {};
  std::optional<std::int64_t> boot_us = {};
  std::optional<std::uint64_t> sequence = {};
  std::optional<xid::Line> xid = {};
  std::optional<xid::SwitchLine> sxid = {};
  const Rule* rule = nullptr;
  std::vector<std::pair<std::string, std::string>> fields = {};  // named groups of the rule
  bool forged = false;  // the words of the kernel from somebody who is not the kernel

  std::string_view field(std::string_view name) const;  // empty: no such group, or nothing in it
};

// The words of all rules, found in one pass.
class Filter {
 public:
  explicit Filter(std::span<const std::string_view> needles);
  // Calls `found` with each needle's number and place, in order of places.
  void scan(std::string_view text,
            const std::function<void(std::size_t needle, std::size_t at)>& found) const;
  // The same without the machine's wide instructions, for comparing.
  void scan_plainly(std::string_view text,
                    const std::function<void(std::size_t needle, std::size_t at)>& found) const;

 private:
  struct Word {
    std::string text;
    std::size_t offset = 0;  // of the four bytes that are looked for
    std::size_t number = 0;
  };
  template <class Candidates>
  void run(std::string_view text, const std::function<void(std::size_t, std::size_t)>& found,
           Candidates&& candidates) const;

  std::array<std::vector<Word>, 8> buckets_;
  // By place in the four bytes and by nibble: the buckets that may be there.
  alignas(16) std::array<std::array<std::uint8_t, 16>, 4> low_ = {};
  alignas(16) std::array<std::array<std::uint8_t, 16>, 4> high_ = {};
  std::array<std::array<std::uint8_t, 256>, 4> whole_ = {};
  std::size_t reach_ = 0;  // the farthest that the four bytes stand into a word
};

class Matcher {
 public:
  Matcher();
  ~Matcher();
  Matcher(Matcher&&) noexcept;
  Matcher& operator=(Matcher&&) noexcept;

  // Every line of `text` that means something, in order. `now` gives syslog lines their year. Records of
  // journalctl -o json are read as such. Lines longer than 8 KiB are cut; at most `limit` hits, then `cut` is
  // set.
  struct Found {
    std::vector<Hit> hits = {};
    std::uint64_t lines = 0;
    bool cut = false;
  };
  Found match(std::string_view text, WallTime now, std::size_t limit = 1'000'000) const;

  // One line, whatever it holds; nullopt: no rule knows it.
  std::optional<Hit> match_line(std::string_view line, WallTime now) const;

  const Filter& filter() const;

 private:
  struct Inside;
  std::unique_ptr<Inside> inside_;
};

}  // namespace bulkhead::logs
