#include "engine/incidents/incidents.hpp"

#include <algorithm>
#include <chrono>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/text.hpp"
#include "core/xid/xid.hpp"
#include "edge/process/process.hpp"
#include "engine/share/share.hpp"
#include "engine/slice/slice.hpp"

namespace bulkhead::incidents {

namespace {

constexpr std::uint64_t remembered_ns = 600'000'000'000;
constexpr std::uint64_t soon_ns = 20'000'000;  // a storm of events reads the table no more often
constexpr unsigned most_generations = 64;
// Between the end of a lease and the last line about its processes, which are ended then.
constexpr std::int64_t after_ms = 60'000;

std::string name_of(const lease::Lease& lease) {
  return fmt::format("tenant {}, lease {}", printable(lease.tenant, 64), lease.id);
}
std::int64_t ms_of(WallTime at) { return at.time_since_epoch().count(); }
PciAddress slot_of(const PciAddress& at) { return PciAddress{at.domain, at.bus, at.device, 0}; }

}  // namespace

void Owners::look(const std::filesystem::path& root, const control::Snapshot& leases, std::uint64_t now) {
  std::map<std::string, std::string> names;
  for (const auto& [id, one] : leases.leases)
    if (one->ask.cls == lease::Class::share && lease::holds(one->state))
      names[slice::share_name(id)] = name_of(*one);
  std::vector<share::Tenant> tenants;
  if (!names.empty())
    if (auto read = share::list({.root = root}); read.ok()) tenants = std::move(*read);
  const std::lock_guard hold(mutex_);
  root_ = root;
  looked_ns_ = now;
  for (const auto& tenant : tenants) {
    const auto lease = names.find(tenant.asked.name);
    if (lease == names.end() || !tenant.now) continue;
    const auto add = [&](int pid, const std::string& whose) {
      if (pid <= 0 || processes_.size() >= most_processes) return;
      auto& member = processes_[static_cast<std::uint32_t>(pid)];
      if (member.start_time == 0 || member.lease != whose) {  // once, not at every look
        const auto alive = process::look(root, pid);
        member.start_time = alive.ok() ? alive->start_time : 0;
      }
      member.lease = whose;
      member.seen_ns = now;
    };
    add(tenant.now->program, lease->second);
    for (const int pid : tenant.now->processes) add(pid, lease->second);
    add(tenant.now->arbiter, {});
  }
  std::erase_if(processes_, [now](const auto& one) {
    return now > one.second.seen_ns && now - one.second.seen_ns > remembered_ns;
  });
}

std::optional<std::string> Owners::of_process(std::uint32_t pid) const {
  for (unsigned generation = 0; generation < most_generations && pid > 1; ++generation) {
    const auto alive = process::look(root_, static_cast<int>(pid));
    const auto known = processes_.find(pid);
    // The number may be another process's by now.
    if (known != processes_.end() &&
        (!alive.ok() || known->second.start_time == 0 || known->second.start_time == alive->start_time))
      return known->second.lease;
    if (!alive.ok()) break;
    pid = static_cast<std::uint32_t>(alive->parent);
  }
  return std::nullopt;
}

void Owners::name(diagnose::Evidence& evidence, const control::Snapshot& leases) {
  if (!evidence.pid) return;
  for (const bool again : {false, true}) {
    std::unique_lock hold(mutex_);
    if (auto lease = of_process(*evidence.pid)) {
      evidence.tenant = std::move(*lease);
      return;
    }
    const auto now = monotonic_ns();
    if (again || looked_ns_ == 0 || now - looked_ns_ < soon_ns) break;
    const auto root = root_;
    hold.unlock();
    look(root, leases, now);
  }
  // Only who owns the channel is sure to run where the lease is: callers come from anywhere.
  if (!evidence.at || !evidence.xid || !evidence.wall_ms) return;
  const auto* row = xid::find(*evidence.xid);
  if (row == nullptr || row->attribution != xid::Attribution::channel) return;
  if (batch_ != leases.batch) {
    stays_.clear();
    for (const auto& [id, one] : leases.leases) {
      if (!one->active_since || one->ask.cls == lease::Class::share) continue;
      for (const auto& part : one->parts)
        if (const auto at = PciAddress::parse(part.pci); at.ok())
          stays_[{slot_of(*at), part.gpu_instance ? static_cast<int>(*part.gpu_instance) : -1}].push_back(
              {ms_of(*one->active_since), one->ended ? ms_of(*one->ended) + after_ms : INT64_MAX,
               name_of(*one)});
    }
    batch_ = leases.batch;
  }
  const auto here = stays_.find(
      {slot_of(*evidence.at), evidence.gpu_instance ? static_cast<int>(*evidence.gpu_instance) : -1});
  if (here == stays_.end()) return;
  const Stay* last = nullptr;
  for (const auto& stay : here->second)
    if (stay.from_ms <= *evidence.wall_ms && (last == nullptr || stay.from_ms > last->from_ms)) last = &stay;
  if (last != nullptr && *evidence.wall_ms <= last->to_ms) evidence.tenant = last->name;
}

bool concerns(const diagnose::Incident& incident, const lease::Lease& lease) {
  const auto name = name_of(lease);
  if (std::find(incident.tenants.begin(), incident.tenants.end(), name) != incident.tenants.end())
    return true;
  if (!lease.active_since) return false;
  if (incident.last_ms && ms_of(*lease.active_since) > *incident.last_ms) return false;
  if (lease.ended && incident.first_ms && ms_of(*lease.ended) < *incident.first_ms) return false;
  if (incident.blast < diagnose::Blast::slice) return false;
  if (incident.blast >= diagnose::Blast::partition) return true;
  return std::any_of(lease.parts.begin(), lease.parts.end(), [&](const lease::Part& part) {
    const auto at = PciAddress::parse(part.pci);
    if (!at.ok() || !incident.at || slot_of(*at) != slot_of(*incident.at)) return false;
    return incident.blast == diagnose::Blast::gpu || part.gpu_instance == incident.gpu_instance;
  });
}

}  // namespace bulkhead::incidents
