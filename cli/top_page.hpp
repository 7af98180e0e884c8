// What `bulkhead top` shows, as a value: a view of the machine and a way of looking at it make a page of
// lines. Pure, but for the locale, which says how wide a character is. Internal to cli.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.hpp"
#include "cli/cli.hpp"
#include "core/inventory/inventory.hpp"
#include "engine/sample/sample.hpp"

namespace bulkhead::cli::top {

// ---- what there is to see
struct Process {
  int pid = 0;
  std::string name = {};
  std::optional<std::uint64_t> memory = {};  // bytes on the device
};

// Something that can be had: an instance of a GPU, a software slice, or the whole of a GPU.
struct Part {
  std::size_t gpu = 0;  // place in View::gpus
  std::optional<unsigned> instance = {};
  std::string profile = {};  // "3g.40gb", "share 300", "whole"
  std::string tenant = {};   // empty: nobody's that we know of
  std::int64_t lease = 0;    // 0: none
  std::string state = {};    // of the lease, when it is not active
  std::string expires = {};  // RFC 3339
  std::vector<Process> processes = {};
  sample::Values values = {};
};

enum class Level { warning, critical };
struct Alarm {
  Level level = Level::warning;
  std::optional<unsigned> gpu = {};  // index
  std::string what = {};             // one sentence
  std::string since = {};            // RFC 3339, or empty
};

// The last minute, by the second; the last one is now.
inline constexpr std::size_t trail_seconds = 60;
using Trail = std::array<std::optional<double>, trail_seconds>;

struct Gpu {
  sample::Gpu seen = {};
  std::string pool = {};
  std::uint64_t memory_total = 0;  // bytes; 0: unknown
  std::string cordon = {};         // why it gets no new leases
  Trail power = {}, sm = {};
  std::map<unsigned, Trail> slices = {};  // SM, by GPU instance
};

struct View {
  std::uint64_t now_ns = 0;  // monotonic, the clock of the values' times
  std::string time = {}, host = {}, driver = {};
  std::string from = {};  // who sampled: "sampled here", "https://gpu7:443"
  std::string why = {};   // why there are no GPUs
  std::vector<Gpu> gpus = {};
  std::vector<Part> parts = {};  // by GPU, then by instance
  std::vector<Alarm> alarms = {};
  std::vector<std::string> notes = {};  // what could not be looked at, and why
  bool tenants_known = false;           // a daemon said who has what
  bool processes_known = false;         // the host was looked at
};

// What the readings alone say is wrong; a daemon knows more.
std::vector<Alarm> alarms_of(const sample::Gpu& gpu, std::uint64_t now_ns);
// Why the clocks are held down, in words; idle is none.
struct Reason {
  std::string_view word = {};
  Tone tone = Tone::plain;
};
std::vector<Reason> reasons_of(const sample::Gpu& gpu);
// "12s", "4m": of something that happened then.
std::string age(std::uint64_t then_ns, std::uint64_t now_ns);

// The last minute of one thing: samples come as they may, at most one a second counts, the highest.
class Trails {
 public:
  void add(const std::string& key, std::uint64_t at_ns, double value);
  Trail get(const std::string& key, std::uint64_t now_ns) const;

 private:
  struct Ring {
    std::array<double, 2 * trail_seconds> value = {};
    std::array<std::uint64_t, 2 * trail_seconds> second = {};  // 0: nothing
  };
  std::map<std::string, Ring> rings_;
};

// ---- how to look at it
enum class Screen { all, gpu, alarms, help };
struct Looking {
  unsigned width = 80, height = 24;  // height 0: as long as it gets
  bool blocks = true;                // block characters may be used; else ASCII alone
  bool keys = true;                  // a line of keys at the end
  Screen screen = Screen::all;
  std::size_t chosen = 0;  // place in View::gpus
  std::size_t scroll = 0;  // lines of the lower part that are above its window
  bool by_tenant = false;  // the lower part: every GPU's, sorted by tenant
  std::string filter = {};
  bool typing = false;      // the filter is being typed
  std::string paused = {};  // since when: "12s"
};

struct Span {
  std::string text = {};
  Tone tone = Tone::plain;
};
struct Line {
  std::vector<Span> spans = {};
  bool chosen = false;
};
struct Page {
  std::vector<Line> lines = {};
  std::size_t most_scroll = 0;          // beyond it nothing more comes
  std::vector<std::size_t> shown = {};  // the GPUs that the filter lets through
};
Page draw(const View& view, const Looking& looking);
std::string plain(const Context& context, const Page& page);
Json to_json(const View& view);

// Outside text in exactly `width` columns, filled up or cut; what a terminal might take for more than a
// letter becomes '?', what is not ASCII too unless `wide`.
std::string fit(std::string_view text, std::size_t width, bool wide, bool to_the_right = false);
// A trail in `width` cells between 0 and `most`.
std::string graph(const Trail& trail, std::size_t width, double most, bool blocks);
// The same, several lines high, the topmost first.
std::vector<std::string> chart(const Trail& trail, std::size_t width, std::size_t height, double most,
                               bool blocks);

}  // namespace bulkhead::cli::top
