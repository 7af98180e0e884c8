// Reads what there is to diagnose: files of any machine, compressed or in a bundle, or this host's kernel
// log. And packs what a support case needs, without secrets.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/diagnose/diagnose.hpp"
#include "edge/events/events.hpp"
#include "edge/logfile/logfile.hpp"

namespace bulkhead::diagnose {

inline constexpr std::size_t largest_input = 1U << 30U;  // of one file, unpacked

struct Input {
  std::string name = {};
  std::string text = {};
};
// A text, a .gz, a .tar or .tar.gz (each member an input of its own); "-" is standard input.
Result<std::vector<Input>> read_inputs(const std::filesystem::path& path);
// ROOT/dev/kmsg as it is now; `lost`: records that were overwritten between two that were read.
Result<Input> read_kernel_log(const std::filesystem::path& root, std::uint64_t& lost);

struct Outcome {
  Diagnosis diagnosis = {};
  std::uint64_t lines = 0;
  std::uint64_t bytes = 0;
};
// `since_ms`: older events are left out, before `now`; lines without a wall clock are kept.
Outcome run(const logs::Matcher& matcher, const std::vector<Input>& inputs, WallTime now,
            std::optional<std::int64_t> since_ms);

// Which cgroup a process was in, also a while after it is gone.
class Memory {
 public:
  explicit Memory(std::filesystem::path root) : root_(std::move(root)) {}
  void look(std::int64_t now_s);  // all processes; forgets those gone for ten minutes
  std::string cgroup_of(std::uint32_t pid) const;

 private:
  struct Known {
    std::string cgroup = {};
    std::int64_t seen_s = 0;
  };
  std::filesystem::path root_;
  std::vector<std::pair<std::uint32_t, Known>> known_;  // by pid
};

// How far the Fabric Manager's words are read: of the journal, of its own log.
struct Heard {
  std::string cursor = {};
  logfile::Place log = {};
};

struct Live {
  std::filesystem::path root = "/";
  std::string nvml_library = {};
  // Puts a tenant to evidence whose process is known, better than its cgroup. May be empty.
  std::function<void(Evidence&)> name = {};
  // Called about once a second, for what `name` wants to remember. May be empty.
  std::function<void()> look = {};
  std::uint64_t look_ns = 1'000'000'000;  // processes are looked at this often, for those that die
  // The driver's events, followed already by who has threads; else, with `start_watch`, they are from here
  // on.
  events::Watch* watch = nullptr;
  bool start_watch = true;
  // Instead of both: who follows them now, asked each time; nobody for a while is no mistake, and an Error
  // never comes then.
  std::function<std::shared_ptr<events::Watch>()> ear = {};
  // An earlier follower's of this boot: what it kept, and the newest record of the kernel's log that is in
  // it.
  std::vector<Evidence> before = {};
  std::optional<std::uint64_t> after = {};
  Heard heard = {};
  std::string fabric_unit = "nvidia-fabricmanager.service";  // empty: what it says is not followed
  std::size_t most = 100'000;  // events kept; of storms, and then of the oldest, some go
  std::int64_t keep_ms = 0;    // older ones go; 0: none does
};
struct Followed {
  Diagnosis diagnosis = {};  // of all that came
  std::uint64_t kernel_events = 0, driver_events = 0, lost = 0;
  bool kernel = true, driver = false;  // whether that source could be read
  // While `told` is called: what was kept, and how far the kernel's log is read.
  const std::vector<Evidence>* evidence = nullptr;
  std::optional<std::uint64_t> sequence = {};
  Heard heard = {};
};
// Follows ROOT/dev/kmsg, the driver's events and the Fabric Manager's words until `stop`; calls `told` after new evidence, when both
// sources had 300 ms to tell of it. One source is enough; an Error: neither of the first two can be read.
Result<Followed> follow(const Live& live, const logs::Matcher& matcher, const std::function<bool()>& stop,
                        const std::function<void(const Followed&)>& told);

// ---- bundle
struct Packed {
  std::vector<std::string> members = {};
  std::vector<std::string> left_out = {};  // with why
  std::uint64_t redacted = 0;              // secrets that were taken out
  std::size_t bytes = 0;
};
// Logs, driver files, bulkhead's own view, into a tar.gz at `to` (0600), at most 64 MiB of content.
// `extra`: documents of the caller, by name ("inventory.json").
Result<Packed> bundle(const std::filesystem::path& root, const std::filesystem::path& to,
                      const std::vector<Input>& extra, WallTime now);
// Tokens, keys, passwords and environment in a text, as "[removed]".
std::string without_secrets(std::string_view text, std::uint64_t& removed);

}  // namespace bulkhead::diagnose
