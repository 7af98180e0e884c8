#include "engine/diagnose/diagnose.hpp"

#include <unistd.h>
#include <algorithm>
#include <map>
#include <tuple>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "edge/archive/archive.hpp"
#include "edge/events/events.hpp"
#include "edge/kmsg/kmsg.hpp"
#include "engine/diagnose/fabric.hpp"

namespace bulkhead::diagnose {

namespace {

Result<std::string> read_stdin() {
  std::string out;
  std::vector<char> buffer(1U << 18U);
  for (;;) {
    const auto n = ::read(0, buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno_error("read standard input", errno);
    if (n == 0) return out;
    out.append(buffer.data(), static_cast<std::size_t>(n));
    if (out.size() > largest_input) return Error(Errc::invalid, "standard input: more than 1 GiB");
  }
}

// Binary members of a bundle say nothing line by line.
bool is_text(std::string_view text) { return text.substr(0, 4096).find('\0') == std::string_view::npos; }

}  // namespace

Result<std::vector<Input>> read_inputs(const std::filesystem::path& path) {
  const auto name = path == "-" ? std::string("standard input") : path.string();
  auto content = path == "-" ? read_stdin() : read_file(path, largest_input);
  if (!content.ok()) return std::move(content).error();
  std::string bytes = std::move(content).value();
  if (archive::is_gzip(bytes)) {
    auto plain = archive::gunzip(bytes, largest_input);
    if (!plain.ok()) return std::move(plain).error().in(name);
    bytes = std::move(plain).value();
  }
  std::vector<Input> out;
  if (archive::is_tar(bytes)) {
    auto members = archive::untar(bytes);
    if (!members.ok()) return std::move(members).error().in(name);
    for (auto& member : *members) {
      std::string text = std::move(member.content);
      if (archive::is_gzip(text)) {
        auto plain = archive::gunzip(text, largest_input);
        if (!plain.ok()) continue;
        text = std::move(plain).value();
      }
      // A bundle's own findings are no evidence a second time.
      if (is_text(text) && !member.name.ends_with("diagnosis.json"))
        out.push_back({name + ":" + member.name, std::move(text)});
    }
    return out;
  }
  out.push_back({name, std::move(bytes)});
  return out;
}

Result<Input> read_kernel_log(const std::filesystem::path& root, std::uint64_t& lost) {
  auto reader = kmsg::Reader::open(root / "dev/kmsg", true);
  if (!reader.ok()) return std::move(reader).error();
  Input out{"/dev/kmsg", {}};
  lost = 0;
  for (int i = 0; i < 64; ++i) {
    auto batch = reader->read();
    if (!batch.ok()) return std::move(batch).error();
    if (batch->text.empty()) break;
    lost += batch->lost;
    out.text += batch->text;
  }
  return out;
}

Outcome run(const logs::Matcher& matcher, const std::vector<Input>& inputs, WallTime now,
            std::optional<std::int64_t> since_ms) {
  Outcome out;
  std::vector<Evidence> evidence;
  const auto after = since_ms ? now.time_since_epoch().count() - *since_ms : INT64_MIN;
  std::vector<std::string> notes;
  for (const auto& input : inputs) {
    auto found = matcher.match(input.text, now);
    out.lines += found.lines;
    out.bytes += input.text.size();
    if (found.cut)
      notes.push_back(input.name + ": more than a million lines of evidence; the rest is not counted");
    for (auto& hit : found.hits) {
      if (hit.wall_ms && *hit.wall_ms < after) continue;
      evidence.push_back(from(std::move(hit), input.name));
    }
  }
  out.diagnosis = diagnose(std::move(evidence));
  out.diagnosis.notes.insert(out.diagnosis.notes.end(), notes.begin(), notes.end());
  return out;
}

namespace {

std::string cgroup_now(const std::filesystem::path& root, std::uint32_t pid) {
  const auto text = read_file(root / "proc" / std::to_string(pid) / "cgroup", 65'536);
  if (!text.ok()) return {};
  for (const auto line : split_lines(*text))
    if (line.starts_with("0::")) return std::string(line.substr(3));
  return {};
}

}  // namespace

void Memory::look(std::int64_t now_s) {
  const auto names = list_directory(root_ / "proc");
  if (!names.ok()) return;
  std::vector<std::pair<std::uint32_t, Known>> seen;
  for (const auto& name : *names) {
    const auto pid = parse_u64(name);
    if (!pid || *pid > UINT32_MAX || seen.size() > limits::processes) continue;
    if (auto cgroup = cgroup_now(root_, static_cast<std::uint32_t>(*pid)); !cgroup.empty())
      seen.emplace_back(static_cast<std::uint32_t>(*pid), Known{std::move(cgroup), now_s});
  }
  std::ranges::sort(seen, {}, [](const auto& one) { return one.first; });
  const auto alive = seen.size();
  for (auto& old : known_) {
    const auto end = seen.begin() + static_cast<std::ptrdiff_t>(alive);
    const auto at = std::lower_bound(seen.begin(), end, old.first,
                                     [](const auto& one, std::uint32_t pid) { return one.first < pid; });
    if (now_s - old.second.seen_s < 600 && (at == end || at->first != old.first) &&
        seen.size() < 2 * limits::processes)
      seen.push_back(std::move(old));
  }
  std::ranges::sort(seen, {}, [](const auto& one) { return one.first; });
  known_ = std::move(seen);
}

std::string Memory::cgroup_of(std::uint32_t pid) const {
  const auto at = std::ranges::lower_bound(known_, pid, {}, [](const auto& one) { return one.first; });
  return at != known_.end() && at->first == pid ? at->second.cgroup : std::string();
}

namespace {

constexpr std::uint64_t settle_ns = 300'000'000;
constexpr std::size_t most_of_a_batch = 100'000;

void add_note(std::vector<std::string>& notes, std::string note) {
  if (notes.size() < 32 && std::ranges::find(notes, note) == notes.end()) notes.push_back(std::move(note));
}

}  // namespace

namespace {

// One hostile or broken thing that repeats must not push out what happened once: every other event of those
// with the most goes first.
std::size_t thin(std::vector<Evidence>& kept, std::size_t most) {
  const auto before = kept.size();
  using Kind = std::tuple<Source, std::optional<unsigned>, std::optional<unsigned>, const logs::Rule*,
                          std::optional<PciAddress>, std::string>;
  const auto kind = [](const Evidence& one) {
    return Kind{one.source, one.xid, one.sxid, one.rule, one.at, one.tenant};
  };
  std::map<Kind, std::size_t> counts;
  for (const auto& one : kept) ++counts[kind(one)];
  const auto many = std::max<std::size_t>(most / 16, 64);
  std::map<Kind, std::size_t> seen;
  std::erase_if(kept, [&](const Evidence& one) {
    const auto which = kind(one);
    return counts[which] > many && ++seen[which] % 2 == 0;
  });
  if (const auto limit = most - most / 8; kept.size() > limit)
    kept.erase(kept.begin(), kept.end() - static_cast<std::ptrdiff_t>(limit));
  return before - kept.size();
}

}  // namespace

Result<Followed> follow(const Live& live, const logs::Matcher& matcher, const std::function<bool()>& stop,
                        const std::function<void(const Followed&)>& told) {
  Followed out;
  std::vector<std::string> notes;
  // First, while this process has no thread.
  std::optional<events::Watch> own;
  if (live.watch == nullptr && live.start_watch && !live.ear) {
    auto started = events::Watch::start(live.nvml_library);
    if (started.ok())
      own.emplace(std::move(*started));
    else
      notes.push_back("NVML's events: " + started.error().message());
  }
  events::Watch* watch = own ? &*own : live.watch;
  auto reader = kmsg::Reader::open(live.root / "dev/kmsg", true);
  if (!reader.ok()) {
    out.kernel = false;
    notes.push_back(fmt::format("the kernel's log is not read ({}): the driver's events name no process",
                                reader.error().message()));
  }
  if (reader.ok() && live.after) reader->after(*live.after);
  Memory memory(live.root);
  Fabric fabric(live.root, live.fabric_unit, live.heard);
  std::vector<Evidence> kept = live.before;
  std::uint64_t lines = 0, dropped = 0;
  for (const auto& one : kept) lines = std::max(lines, one.number);
  std::uint64_t next_look = 0, unsaid_since = kept.empty() ? 0 : monotonic_ns();
  bool first = true, driver_said = false;
  const auto take = [&](Evidence&& one) {
    if (one.pid) {
      one.tenant = memory.cgroup_of(*one.pid);
      // Younger than the last look, and perhaps not gone yet.
      if (one.tenant.empty()) one.tenant = cgroup_now(live.root, *one.pid);
    }
    if (live.name) live.name(one);
    kept.push_back(std::move(one));
  };
  const auto tell = [&] {
    if (live.keep_ms > 0) {
      const auto oldest = wall_now().time_since_epoch().count() - live.keep_ms;
      std::erase_if(kept, [oldest](const Evidence& one) { return one.wall_ms && *one.wall_ms < oldest; });
    }
    out.diagnosis = diagnose(kept);
    out.evidence = &kept;
    out.heard = fabric.heard();
    out.sequence = out.kernel && reader.ok() ? reader->sequence() : live.after;
    auto& said = out.diagnosis.notes;
    said.insert(said.end(), notes.begin(), notes.end());
    if (out.lost > 0)
      said.push_back(
          fmt::format("{} records of the kernel's log were overwritten before they could be read", out.lost));
    if (dropped > 0)
      said.push_back(
          fmt::format("{} events, of storms or the oldest, are no longer counted in the incidents", dropped));
    driver_said = out.driver;
    told(out);
    out.evidence = nullptr;
    unsaid_since = 0;
  };
  while (!stop()) {
    const auto now = monotonic_ns();
    if (now >= next_look) {
      memory.look(static_cast<std::int64_t>(now / 1'000'000'000));
      if (live.look) live.look();
      next_look = monotonic_ns() + live.look_ns;
    }
    bool fresh = false;
    std::shared_ptr<events::Watch> held;  // no longer than its batch is read: somebody may wait for its end
    if (live.ear) {
      held = live.ear();
      watch = held.get();
      out.driver = false;
    }
    if (watch != nullptr) {
      auto batch = watch->read();
      for (const auto& event_of : batch.events) {
        if (event_of.xid > 99'999) {
          add_note(notes, fmt::format("the driver told of Xid {}, which cannot be", event_of.xid));
          continue;
        }
        ++out.driver_events;
        take(event(Source::nvml, event_of.gpu, static_cast<unsigned>(event_of.xid), event_of.gpu_instance,
                   event_of.wall_ms));
        fresh = true;
      }
      for (auto& words : batch.said) {
        add_note(notes, "NVML's events: " + std::move(words));
        fresh = true;
      }
      out.driver = watch->gpus() > 0;
      if (!live.ear && !out.driver && watch->fd() < 0 && !out.kernel)
        return Error(Errc::unavailable, join(notes, "; "),
                     "sudo bulkhead diagnose --live; or files: bulkhead diagnose --from FILE");
    } else if (!out.kernel && !live.ear) {
      return Error(Errc::unavailable, join(notes, "; "));
    }
    held.reset();
    if (out.driver != driver_said) fresh = true;
    if (out.kernel) {
      auto batch = reader->read();
      if (!batch.ok()) {
        out.kernel = false;
        add_note(notes, "the kernel's log: " + batch.error().message());
        fresh = true;
      } else {
        out.lost += batch->lost;
        fresh = fresh || batch->lost > 0;
        const auto at = wall_now();
        const auto wall = at.time_since_epoch().count();
        const auto since_boot = static_cast<std::int64_t>(monotonic_ns() / 1'000'000);
        auto found = matcher.match(batch->text, at, most_of_a_batch);
        for (auto& hit : found.hits) {
          hit.number += lines;
          auto one = from(std::move(hit), "/dev/kmsg");
          // The driver's events carry the wall's clock. What was in the log before has the kernel's, which
          // drifts from it; what comes now, came now.
          if (!one.wall_ms)
            one.wall_ms = first && one.boot_us
                              ? wall - std::max<std::int64_t>(since_boot - *one.boot_us / 1000, 0)
                              : wall;
          if (one.xid) ++out.kernel_events;
          take(std::move(one));
          fresh = true;
        }
        lines += found.lines;
        if (batch->text.empty()) first = false;
      }
    }
    for (auto& one : fabric.read(matcher, notes)) {
      one.number = ++lines;
      take(std::move(one));
      fresh = true;
    }
    if (kept.size() > live.most) dropped += thin(kept, live.most);
    if (fresh && unsaid_since == 0) unsaid_since = monotonic_ns();
    if (unsaid_since != 0 && monotonic_ns() - unsaid_since >= settle_ns) tell();
    usleep(50'000);
  }
  if (unsaid_since != 0) tell();
  return out;
}

}  // namespace bulkhead::diagnose
