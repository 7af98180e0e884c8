// Between two tenants.
#include <unistd.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/text.hpp"
#include "edge/process/process.hpp"
#include "engine/share/share.hpp"
#include "engine/slice/slice.hpp"

namespace bulkhead::slice {

namespace fs = std::filesystem;
using inventory::Holder;

namespace {

constexpr int kill_rounds = 8;    // after the grace: what a process made of itself while it was ended
constexpr int freeze_rounds = 4;  // of one kill round
constexpr int settle_tries = 40;  // for the driver to clean up after the dead
constexpr useconds_t settle_pause_usec = 50'000;
constexpr std::size_t most_named = 8;
// An empty part may show a little as used: an idle H100 shows 0 MiB, an idle MIG device some MiB of its own
// page tables, more of them the larger it is (the MIG User Guide's examples: 3 MiB of 5 GB, 11 MiB of 20 GB).
std::uint64_t idle_bytes(const lease::Part& part) {
  return std::max<std::uint64_t>(64U << 20U, part.memory.count / 256);
}

constexpr std::string_view uvm = "/dev/nvidia-uvm";

// The files of a part that nobody else has: the whole GPU's own, or the capabilities of its instances. The
// others of the list (nvidiactl, and /dev/nvidiaN of a MIG device) are its neighbours' too.
std::vector<std::string> own_files(const lease::Part& part, bool mig) {
  std::vector<std::string> out;
  for (const auto& node : part.device_nodes) {
    constexpr std::string_view whole = "/dev/nvidia", caps = "/dev/nvidia-caps/";
    const bool own = mig ? node.starts_with(caps)
                         : node.starts_with(whole) && parse_u64(node.substr(whole.size())).has_value();
    if (own) out.push_back(node);
  }
  return out;
}

bool matches(const Settings& settings, const std::string& cgroup) {
  return std::any_of(settings.spare.begin(), settings.spare.end(), [&](const std::string& unit) {
    return cgroup == unit || cgroup.starts_with(unit + "/");
  });
}

struct Seen {
  std::vector<Holder> holders = {};
  std::optional<Bytes> used = {};  // of the part's memory; empty: nobody asked, or it is gone
  std::string why = {};            // what could not be read
};

// Class mig, exclusive and passthrough: the hardware says who computes, the kernel who has it open.
class Device {
 public:
  Device(const Settings& settings, const lease::Lease& lease, const lease::Part& part)
      : settings_(settings), lease_(lease), part_(part), mig_(lease.ask.cls == lease::Class::mig) {
    for (const auto& file : own_files(part, mig_))
      files_.push_back(settings.access.root / fs::path(file).relative_path());
    own_ = files_.size();
    files_.push_back(settings.access.root / fs::path(uvm).relative_path());
  }

  Result<Seen> computing() const {
    observe::Access access = settings_.access;
    access.detail = observe::Detail::brief;
    access.only = {part_.gpu};
    BH_TRY(const auto host, observe::host(access));
    Seen seen;
    if (host.gpus.empty()) {
      // A GPU that is with vfio, or has gone: nobody computes on it through this driver.
      seen.why = fmt::format("the driver does not show {}", printable(part_.gpu.text, 64));
      for (const auto& note : host.notes) seen.why += "; " + note;
      return seen;
    }
    const auto& gpu = host.gpus.front();
    if (!mig_) {
      seen.holders = gpu.holders;
      for (const auto& instance : gpu.instances) {
        for (auto& holder : instance.holders()) seen.holders.push_back(std::move(holder));
      }
      if (gpu.memory_used) seen.used = *gpu.memory_used;
      if (!gpu.memory_used) seen.why = gpu.memory_used.why;
      return seen;
    }
    if (!gpu.mig_why.empty()) seen.why = gpu.mig_why;
    for (const auto& instance : gpu.instances) {
      if (instance.id != part_.gpu_instance || !part_.start || instance.place.start != *part_.start) continue;
      seen.holders = instance.holders();
      for (const auto& compute : instance.compute) {
        if (compute.id != part_.compute_instance) continue;
        if (compute.memory_used) seen.used = *compute.memory_used;
        if (!compute.memory_used) seen.why = compute.memory_used.why;
      }
    }
    return seen;
  }

  // Those that have the part open and are the tenant's, as far as anybody can tell: not what the machine
  // itself runs to look after its GPUs.
  Result<std::vector<Holder>> holding(const std::vector<Holder>& computing) {
    BH_TRY(const auto open, process::openers(files_));
    std::vector<Holder> out;
    for (const auto& one : open) {
      if (std::none_of(one.files.begin(), one.files.end(), [&](std::size_t i) { return i < own_; })) continue;
      const bool computes =
          std::any_of(one.files.begin(), one.files.end(), [&](std::size_t i) { return i == own_; }) ||
          std::any_of(computing.begin(), computing.end(),
                      [&](const Holder& h) { return h.pid == one.who.pid; });
      if (!computes && spared(one)) continue;
      out.push_back({.pid = one.who.pid,
                     .start_time = one.who.start_time,
                     .name = one.who.name,
                     .cgroup = one.who.cgroup});
      if (one.uid != 0 && one.uid != ~0U) users_.insert(one.uid);
    }
    return out;
  }

  const std::set<unsigned>& users() const { return users_; }

 private:
  bool spared(const process::Opener& one) const {
    if (matches(settings_, one.who.cgroup)) return true;
    if (one.uid != 0 || !one.here) return false;
    if (one.same_program) return true;
    // A monitor that was there before the lease, and looks without computing.
    if (!lease_.active_since) return false;
    const auto since = process::started(one.who);
    return since.ok() && *since + std::chrono::seconds(2) < *lease_.active_since;
  }

  const Settings& settings_;
  const lease::Lease& lease_;
  const lease::Part& part_;
  bool mig_ = false;
  std::vector<fs::path> files_ = {};
  std::size_t own_ = 0;            // the first so many of them are the part's alone
  std::set<unsigned> users_ = {};  // whose processes had it open
};

// All processes of these users, until the end of the scope.
class Stopped {
 public:
  explicit Stopped(std::set<unsigned> users) : users_(std::move(users)) {
    for (const unsigned user : users_) (void)process::freeze_user(user, true);
  }
  ~Stopped() {
    for (const unsigned user : users_) (void)process::freeze_user(user, false);
  }
  Stopped(const Stopped&) = delete;
  Stopped& operator=(const Stopped&) = delete;

 private:
  std::set<unsigned> users_;
};

void add(std::vector<Holder>& to, const std::vector<Holder>& more) {
  for (const auto& holder : more) {
    const bool known = std::any_of(to.begin(), to.end(), [&](const Holder& h) {
      return h.pid == holder.pid && h.start_time == holder.start_time;
    });
    if (!known) to.push_back(holder);
  }
}

// Ends them and remembers who would not; the number of those that ended.
class Ending {
 public:
  explicit Ending(const fs::path& root) : root_(root) {}

  void end(const std::vector<Holder>& holders, unsigned grace_ms) {
    const auto answers = process::terminate_all(root_, holders, grace_ms);
    for (std::size_t i = 0; i < holders.size(); ++i) {
      const std::pair who{holders[i].pid, holders[i].start_time};
      if (answers[i].ok()) {
        stuck_.erase(who);
        ended_.insert(who);
      } else {
        stuck_[who] = answers[i].error().message();
      }
    }
  }
  // Those that were not tried yet in vain.
  std::vector<Holder> fresh(std::vector<Holder> holders) const {
    std::erase_if(holders, [&](const Holder& h) { return stuck_.contains({h.pid, h.start_time}); });
    return holders;
  }
  unsigned ended() const { return static_cast<unsigned>(ended_.size()); }
  std::string why(const Holder& holder) const {
    const auto at = stuck_.find({holder.pid, holder.start_time});
    return at != stuck_.end() ? at->second
                              : fmt::format("pid {} ({}) is still there", holder.pid, holder.name);
  }

 private:
  const fs::path& root_;
  std::map<std::pair<int, std::uint64_t>, std::string> stuck_;
  std::set<std::pair<int, std::uint64_t>> ended_;
};

void name(std::vector<std::string>& left, const std::vector<Holder>& holders, const Ending& ending) {
  for (const auto& holder : holders) {
    if (left.size() == most_named) {
      left.push_back(fmt::format("{} more processes", holders.size() - most_named));
      break;
    }
    left.push_back(ending.why(holder));
  }
}

Result<Scrubbed> scrub_device(const Settings& settings, const lease::Lease& lease, const lease::Part& part) {
  Device device(settings, lease, part);
  const fs::path here = "/";
  Ending computing(settings.access.root);  // the driver's pids; a twin has some of its own
  Ending holding(here);
  BH_TRY(auto seen, device.computing());
  BH_TRY(auto open, device.holding(seen.holders));
  {
    // A process of both lists is the kernel's to name.
    std::vector<Holder> simulated = seen.holders;
    std::erase_if(simulated, [&](const Holder& h) {
      return std::any_of(open.begin(), open.end(), [&](const Holder& o) { return o.pid == h.pid; });
    });
    holding.end(open, static_cast<unsigned>(settings.grace.count()));
    computing.end(simulated, static_cast<unsigned>(settings.grace.count()));
  }
  for (int round = 0; round < kill_rounds; ++round) {
    // One that hands on to a child and goes, faster than anybody can look, is seen only with all processes of
    // its user stopped. Those that have nothing open go on afterwards.
    const Stopped stopped(device.users());
    BH_TRY(open, device.holding(seen.holders));
    auto fresh = holding.fresh(open);
    if (fresh.empty()) break;
    // What forks while it is being ended is stopped first, all of it, and then killed.
    for (int i = 0; i < freeze_rounds; ++i) {
      process::freeze(fresh);
      BH_TRY(auto again, device.holding(seen.holders));
      const auto before = fresh.size();
      add(fresh, holding.fresh(std::move(again)));
      if (fresh.size() == before) break;
    }
    holding.end(fresh, 0);
  }
  Scrubbed out;
  for (int tries = 0; tries < settle_tries; ++tries) {
    BH_TRY(seen, device.computing());
    const auto fresh = computing.fresh(seen.holders);
    if (fresh.empty() && (!seen.used || seen.used->count <= idle_bytes(part))) break;
    if (fresh.empty() && !seen.holders.empty()) break;  // the memory is theirs who could not be ended
    computing.end(fresh, 0);
    ::usleep(settle_pause_usec);
  }
  BH_TRY(open, device.holding(seen.holders));
  out.ended = computing.ended() + holding.ended();
  name(out.left, open, holding);
  std::erase_if(seen.holders, [&](const Holder& h) {
    return std::any_of(open.begin(), open.end(), [&](const Holder& o) { return o.pid == h.pid; });
  });
  name(out.left, seen.holders, computing);
  if (seen.used && seen.used->count > idle_bytes(part)) {
    out.left.push_back(fmt::format("{} MiB of its memory are still charged", seen.used->count >> 20U));
  } else if (!seen.why.empty() && lease.ask.cls != lease::Class::passthrough) {
    out.left.push_back(
        fmt::format("whether its memory is free cannot be read: {}", printable(seen.why, 300)));
  }
  return out;
}

// ---- class share: what the registry knows by the lease's name
struct Tenancy {
  std::vector<Holder> processes = {};
  bool alive = false;
  Bytes used = {};
};
Result<Tenancy> tenancy(const Settings& settings, const std::string& name) {
  BH_TRY(const auto tenants,
         share::list({.root = settings.access.root, .nvml_library = settings.access.nvml_library}));
  Tenancy out;
  std::set<int> pids;
  for (const auto& tenant : tenants) {
    if (tenant.asked.name != name) continue;
    out.alive = out.alive || tenant.alive;
    if (!tenant.now) continue;
    out.used.count += tenant.now->used.count;
    if (tenant.now->program > 1) pids.insert(tenant.now->program);
    pids.insert(tenant.now->processes.begin(), tenant.now->processes.end());
  }
  for (const int pid : pids) {
    if (auto who = process::look("/", pid); who.ok())
      out.processes.push_back({.pid = pid, .start_time = who->start_time, .name = who->name});
  }
  return out;
}

Result<Scrubbed> scrub_share(const Settings& settings, const lease::Lease& lease) {
  const std::string share = share_name(lease.id);
  const fs::path here = "/";
  Ending ending(here);
  BH_TRY(auto now, tenancy(settings, share));
  ending.end(now.processes, static_cast<unsigned>(settings.grace.count()));
  for (int tries = 0; tries < settle_tries; ++tries) {
    BH_TRY(now, tenancy(settings, share));
    if (!now.alive && now.processes.empty()) break;
    const auto fresh = ending.fresh(now.processes);
    process::freeze(fresh);
    ending.end(fresh, 0);
    ::usleep(settle_pause_usec);
  }
  Scrubbed out{.ended = ending.ended()};
  name(out.left, now.processes, ending);
  if (now.alive && now.processes.empty())
    out.left.push_back(fmt::format("its launcher or arbiter still holds the share {}", share));
  if (now.alive && now.used.count > 0)
    out.left.push_back(fmt::format("{} MiB of its memory are still charged", now.used.count >> 20U));
  return out;
}

}  // namespace

std::string share_name(std::int64_t lease) { return fmt::format("lease-{}", lease); }

Result<Scrubbed> scrub(const Settings& settings, const lease::Lease& lease, const lease::Part& part) {
  if (lease.ask.cls == lease::Class::share) return scrub_share(settings, lease);
  return scrub_device(settings, lease, part);
}

}  // namespace bulkhead::slice
