// Between two tenants.
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>
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

// The files of a part that nobody else has: the whole GPU's own, its IOMMU group's, or the capabilities of
// its instances. The others of the list (nvidiactl, and /dev/nvidiaN of a MIG device) are its neighbours'
// too.
std::vector<std::string> own_files(const lease::Part& part, lease::Class cls) {
  std::vector<std::string> out;
  const auto numbered = [](std::string_view node, std::string_view prefix) {
    return node.starts_with(prefix) && parse_u64(node.substr(prefix.size())).has_value();
  };
  for (const auto& node : part.device_nodes) {
    const bool own = cls == lease::Class::mig           ? node.starts_with("/dev/nvidia-caps/")
                     : cls == lease::Class::passthrough ? numbered(node, "/dev/vfio/")
                                                        : numbered(node, "/dev/nvidia");
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

// The files that are looked for in one look at /proc: those of all parts at hand.
class Files {
 public:
  explicit Files(const fs::path& root) : root_(root) {}
  std::size_t add(std::string_view node) {
    const auto [at, first] = places_.emplace(std::string(node), paths_.size());
    if (first) paths_.push_back(root_ / fs::path(node).relative_path());
    return at->second;
  }
  Result<process::Openers> openers() const { return process::openers(paths_); }

 private:
  const fs::path& root_;
  std::vector<fs::path> paths_ = {};
  std::map<std::string, std::size_t> places_ = {};
};

// Class mig, exclusive and passthrough: the hardware says who computes, the kernel who has it open.
class Device {
 public:
  Device(const Settings& settings, const lease::Lease& lease, const lease::Part& part, Files& files)
      : settings_(settings), lease_(lease), part_(part), uvm_(files.add(uvm)) {
    for (const auto& file : own_files(part, lease.ask.cls)) own_.insert(files.add(file));
  }

  Seen computing(const inventory::Host& host) const {
    Seen seen;
    const auto its = std::find_if(host.gpus.begin(), host.gpus.end(),
                                  [&](const inventory::Gpu& gpu) { return gpu.uuid == part_.gpu; });
    if (its == host.gpus.end()) {
      // A GPU that is with vfio, or has gone: nobody computes on it through this driver.
      seen.why = fmt::format("the driver does not show {}", printable(part_.gpu.text, 64));
      for (const auto& note : host.notes) seen.why += "; " + note;
      return seen;
    }
    const auto& gpu = *its;
    if (lease_.ask.cls != lease::Class::mig) {
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
  std::vector<Holder> holding(const process::Openers& open, const std::vector<Holder>& computing) {
    std::vector<Holder> out;
    for (const auto& one : open.who) {
      const auto has = [&](std::size_t file) {
        return std::binary_search(one.files.begin(), one.files.end(), file);
      };
      if (std::none_of(own_.begin(), own_.end(), has)) continue;
      const bool computes = has(uvm_) || std::any_of(computing.begin(), computing.end(),
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

  // As far as the driver knows.
  bool idle(const Seen& seen) const {
    if (!seen.holders.empty()) return false;
    if (!seen.used) return lease_.ask.cls == lease::Class::passthrough;
    return seen.used->count <= idle_bytes(part_);
  }

  // Whether the driver says that the instance is gone. Its files may be another one's by now.
  bool gone(const inventory::Host& host) const {
    if (lease_.ask.cls != lease::Class::mig || !part_.start) return false;
    for (const auto& gpu : host.gpus) {
      if (gpu.uuid != part_.gpu) continue;
      return gpu.mig_why.empty() &&
             std::none_of(gpu.instances.begin(), gpu.instances.end(), [&](const auto& instance) {
               return instance.id == part_.gpu_instance && instance.place.start == *part_.start;
             });
    }
    return false;
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
  std::size_t uvm_ = 0;
  std::set<std::size_t> own_ = {};  // files that are the part's alone
  std::set<unsigned> users_ = {};   // whose processes had it open
};

Result<inventory::Host> host_of(const Settings& settings, std::vector<Uuid> gpus) {
  observe::Access access = settings.access;
  access.detail = observe::Detail::brief;
  access.only = std::move(gpus);
  return observe::host(access);
}

// All processes of these users, until the end of the scope. Whose parts are scrubbed beside each other go on
// when the last of the scopes ends: whoever is stopped is stopped for the whole of this process.
class Stopped {
 public:
  explicit Stopped(std::set<unsigned> users) : users_(std::move(users)) {
    const std::lock_guard hold(mutex());
    for (const unsigned user : users_) {
      ++scopes()[user];
      (void)process::freeze_user(user, true);
    }
  }
  ~Stopped() {
    const std::lock_guard hold(mutex());
    for (const unsigned user : users_) {
      const auto at = scopes().find(user);
      if (--at->second > 0) continue;
      scopes().erase(at);
      (void)process::freeze_user(user, false);
    }
  }
  Stopped(const Stopped&) = delete;
  Stopped& operator=(const Stopped&) = delete;

 private:
  static std::mutex& mutex() {
    static std::mutex its;
    return its;
  }
  static std::map<unsigned, unsigned>& scopes() {
    static std::map<unsigned, unsigned> its;
    return its;
  }
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
  Ending(const fs::path& root, const Settings& settings) : root_(root), settings_(settings) {}

  void end(const std::vector<Holder>& holders, unsigned grace_ms) {
    const bool waits = settings_.waits && grace_ms > 0 && !holders.empty();
    if (waits) settings_.waits(true);
    const auto answers = process::terminate_all(root_, holders, grace_ms);
    if (waits) settings_.waits(false);
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
  const Settings& settings_;
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
  Files files(settings.access.root);
  Device device(settings, lease, part, files);
  const auto computes = [&]() -> Result<Seen> {
    BH_TRY(const auto host, host_of(settings, {part.gpu}));
    return device.computing(host);
  };
  const auto holds = [&](const Seen& seen) -> Result<std::vector<Holder>> {
    BH_TRY(const auto open, files.openers());
    return device.holding(open, seen.holders);
  };
  const fs::path here = "/";
  Ending computing(settings.access.root, settings);  // the driver's pids; a twin has some of its own
  Ending holding(here, settings);
  BH_TRY(auto seen, computes());
  BH_TRY(auto open, holds(seen));
  {
    // A process of both lists is the kernel's to name.
    std::vector<Holder> simulated = seen.holders;
    std::erase_if(simulated, [&](const Holder& h) {
      return std::any_of(open.begin(), open.end(), [&](const Holder& o) { return o.pid == h.pid; });
    });
    holding.end(open, static_cast<unsigned>(settings.grace.count()));
    computing.end(simulated, static_cast<unsigned>(settings.grace.count()));
  }
  if (!open.empty() || !seen.holders.empty()) {
    // Others may have changed the GPU meanwhile.
    BH_TRY(const auto host, host_of(settings, {part.gpu}));
    if (device.gone(host))
      return Scrubbed{
          .ended = computing.ended() + holding.ended(),
          .left = {"its instance went while its programs were being ended; it is looked at again"}};
    seen = device.computing(host);
  }
  for (int round = 0; round < kill_rounds; ++round) {
    // One that hands on to a child and goes, faster than anybody can look, is seen only with all processes of
    // its user stopped. Those that have nothing open go on afterwards.
    const Stopped stopped(device.users());
    BH_TRY(open, holds(seen));
    auto fresh = holding.fresh(open);
    if (fresh.empty()) break;
    // What forks while it is being ended is stopped first, all of it, and then killed.
    for (int i = 0; i < freeze_rounds; ++i) {
      process::freeze(fresh);
      BH_TRY(auto again, holds(seen));
      const auto before = fresh.size();
      add(fresh, holding.fresh(std::move(again)));
      if (fresh.size() == before) break;
    }
    holding.end(fresh, 0);
  }
  Scrubbed out;
  for (int tries = 0; tries < settle_tries; ++tries) {
    BH_TRY(seen, computes());
    const auto fresh = computing.fresh(seen.holders);
    if (fresh.empty() && (!seen.used || seen.used->count <= idle_bytes(part))) break;
    if (fresh.empty() && !seen.holders.empty()) break;  // the memory is theirs who could not be ended
    computing.end(fresh, 0);
    ::usleep(settle_pause_usec);
  }
  BH_TRY(open, holds(seen));
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
auto tenants_of(const Settings& settings) {
  return share::list({.root = settings.access.root, .nvml_library = settings.access.nvml_library});
}
Result<Tenancy> tenancy(const Settings& settings, const std::string& name) {
  BH_TRY(const auto tenants, tenants_of(settings));
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
  Ending ending(here, settings);
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

// ---- what nobody has touched
// Three looks are what a scrub of a part that nobody seems to have takes, too.
constexpr int looks = 3;

Result<std::vector<bool>> clean_devices(const Settings& settings, std::span<const Held> parts) {
  std::set<Uuid> gpus;
  Files files(settings.access.root);
  std::vector<Device> devices;
  devices.reserve(parts.size());
  for (const auto& one : parts) {
    gpus.insert(one.part.gpu);
    devices.emplace_back(settings, one.lease, one.part, files);
  }
  // The driver first: whoever computes later has it open when /proc is read.
  BH_TRY(const auto host, host_of(settings, {gpus.begin(), gpus.end()}));
  std::vector<bool> out(parts.size());
  std::vector<Seen> seen;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    seen.push_back(devices[i].computing(host));
    out[i] = devices[i].idle(seen[i]);
  }
  for (int look = 0; look < looks && std::find(out.begin(), out.end(), true) != out.end(); ++look) {
    BH_TRY(const auto open, files.openers());
    for (std::size_t i = 0; i < parts.size(); ++i)
      out[i] = out[i] && devices[i].holding(open, seen[i].holders).empty();
    if (open.all) break;
  }
  return out;
}

Result<std::vector<bool>> clean_shares(const Settings& settings, std::span<const Held> parts) {
  BH_TRY(const auto tenants, tenants_of(settings));
  std::set<std::string, std::less<>> there;
  for (const auto& tenant : tenants) there.insert(tenant.asked.name);
  std::vector<bool> out;
  for (const auto& one : parts) out.push_back(!there.contains(share_name(one.lease.id)));
  return out;
}

}  // namespace

Result<std::vector<bool>> clean(const Settings& settings, std::span<const Held> parts) {
  std::vector<Held> shares, devices;
  for (const auto& one : parts) (one.lease.ask.cls == lease::Class::share ? shares : devices).push_back(one);
  std::vector<bool> of_shares, of_devices;
  if (!shares.empty()) {
    BH_TRY(of_shares, clean_shares(settings, shares));
  }
  if (!devices.empty()) {
    BH_TRY(of_devices, clean_devices(settings, devices));
  }
  std::vector<bool> out;
  auto share = of_shares.begin(), device = of_devices.begin();
  for (const auto& one : parts)
    out.push_back(one.lease.ask.cls == lease::Class::share ? *share++ : *device++);
  return out;
}

std::string share_name(std::int64_t lease) { return fmt::format("lease-{}", lease); }

Result<Scrubbed> scrub(const Settings& settings, const lease::Lease& lease, const lease::Part& part) {
  if (lease.ask.cls == lease::Class::share) return scrub_share(settings, lease);
  return scrub_device(settings, lease, part);
}

}  // namespace bulkhead::slice
